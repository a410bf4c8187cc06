#!/usr/bin/env python3
"""Tests of run_bh_experiments.py, without network or download: `python test_bh_experiments.py`, or `pytest`.

`python test_bh_experiments.py --write-manual` writes the tables of the manual anew, from the declarations,
and the lists of requirements from requirements.txt.

Mathematics is checked against references (scipy, a slow loop, the paper's example); the seam on a mock model
and on tiny random OLMoE and Mixtral models of transformers; the whole on the trained model in
models/olmoe-mini as well.

The sections follow those of the script. Data sets and downstream tasks need the optional libraries datasets
and lm_eval; their tests are skipped without them.
"""

import ast
import collections
import colorsys
import contextlib
import copy
import csv
import dataclasses
import doctest
import errno
import functools
import gc
import gzip
import hashlib
import html
import html.parser
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster on one thread; also for child processes

import jinja2
import jinja2.meta
import numpy as np
import pandas as pd
import pytest
import torch
import tqdm.auto
from hypothesis import HealthCheck, given, settings, strategies
from scipy import stats
from scipy.spatial import distance
from torch import nn

import run_bh_experiments as bh

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "models" / "olmoe-mini"
DEFAULT_DOCUMENTS = bh.default_documents  # a little text stands for it in most tests
CALIBRATION = {"CALIBRATION_SEQUENCES": 6, "CALIBRATION_LENGTH": 24}  # just enough for alpha = 0.01
TABLES = {"generation": bh.GENERATION, "scores": bh.SCORES, "tasks": bh.TASKS}


def stable(table):
    """The columns of a table that are the same when the same command is run again."""
    return [column.name for column in table.columns if not column.clock]


FLAT = {"method": "bh", "alpha": 0.5, "temperature": 1.0, "min_k": 1, "max_k": 4, "p_values": "flat"}
EMPIRICAL = {**FLAT, "alpha": 0.05, "p_values": "empirical"}
CONFIGS = {"topk_8": bh.ROUTING_CONFIGS["topk_8"], "bh_flat": FLAT}
PROMPTS = [
    {"id": "one", "text": "a small boat on the river", "category": "plain"},
    {"id": "two", "text": 'he said "no | never",\nand left', "category": "awkward"},
    {"id": "three", "text": "null", "category": "NA"},
]


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------


class MockEncoding(dict):
    def to(self, device):
        return MockEncoding({name: tensor.to(device) for name, tensor in self.items()})


class MockTokenizer:
    """One token a word; decodes to texts that a careless CSV reader takes for missing values."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __call__(self, text, return_tensors=None, **ignored):
        ids = [3 + zlib.crc32(word.encode()) % 997 for word in text.split()]
        if return_tensors is None:
            return {"input_ids": ids}
        ids = torch.tensor([ids])
        return MockEncoding(input_ids=ids, attention_mask=torch.ones_like(ids))

    def decode(self, ids, skip_special_tokens=True):
        return ("NA", "null", 'x, "y"\n', "1.0", "a\r\nb", "")[int(ids[0]) % 6]


class MockRouter(nn.Module):
    def __init__(self, hidden, experts, top_k):
        super().__init__()
        self.top_k, self.num_experts, self.hidden_dim = top_k, experts, hidden
        self.weight = nn.Parameter(torch.randn(experts, hidden) * 0.15)

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, indices = logits.softmax(-1).topk(self.top_k)
        return logits, weights, indices


class MockExperts(nn.Module):
    def __init__(self, hidden, experts, width=16):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)

    def forward(self, hidden, indices, weights):
        inner = nn.functional.silu(self.up[indices] @ hidden[:, None, :, None])  # [T, K, width, 1]
        return ((self.down[indices] @ inner)[..., 0] * weights[..., None]).sum(1)


class MockBlock(nn.Module):
    def __init__(self, hidden, experts, top_k):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(hidden), MockRouter(hidden, experts, top_k)
        self.experts = MockExperts(hidden, experts)

    def forward(self, hidden, mask):
        """A running mean over the sequence stands in for attention."""
        mean = (hidden * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)
        flat = self.norm(hidden + mean).flatten(0, 1)
        _, weights, indices = self.gate(flat)
        return hidden + self.experts(flat, indices, weights).view_as(hidden)


class MockMoE(nn.Module):
    """4 layers, 64 experts, top-8, hidden 128, vocabulary 1000, with the interface of transformers."""

    _can_record_outputs = {"router_logits": MockRouter}

    def __init__(self, top_k=8, layers=4, experts=64, hidden=128, vocabulary=1000):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=256)
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(MockBlock(hidden, experts, top_k) for _ in range(layers))
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids, attention_mask=None, use_cache=None, **ignored):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask.unsqueeze(-1))
        return SimpleNamespace(logits=self.head(hidden))

    def generate(self, input_ids, attention_mask, generation_config, logits_processor=()):
        for _ in range(generation_config.max_new_tokens):
            scores = self(input_ids, attention_mask).logits[:, -1]
            for process in logits_processor:
                scores = process(input_ids, scores)
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1)
            else:
                chosen = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, chosen], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(chosen)], dim=1)
        return input_ids


def byte_tokenizer():
    """A real tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build(kind, top_k=None):
    """A model with seeded weights, the same for every `top_k`: mock, olmoe-<experts back end> or mixtral."""
    import transformers

    torch.manual_seed(0)
    if kind == "mock":
        return MockMoE(top_k or 8).eval()
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": top_k or 4,
             "max_position_embeddings": 768, "pad_token_id": 0, "bos_token_id": None,
             "eos_token_id": 0}  # fmt: skip
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, num_local_experts=16))
    else:
        model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape, num_experts=16))
        model.set_experts_implementation(kind.removeprefix("olmoe-"))
    for layer in bh.find_moe_layers(model):  # the usual initialisation routes almost uniformly
        nn.init.normal_(layer.router.weight, std=0.5)
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _small_calibration():
    """Calibrate on little text, except for the embedded model; where no text is named, a little is scored.

    So little that nothing is left to calibrate on: the model samples its own text.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CALIBRATION.items():
            patch.setattr(bh, name, value)
        patch.setattr(bh, "default_documents", short_documents)
        yield


def short_documents(model_name):
    return [bh.Document(f"short {number}", f"{number} is a number. " * 60) for number in range(2)]


KINDS = ("mock", "olmoe-eager", "olmoe-grouped_mm", "olmoe-batched_mm", "mixtral")


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    """Kind, model and a small calibration of each model family."""
    model = build(request.param)
    tokenizer = MockTokenizer() if request.param == "mock" else byte_tokenizer()
    calibration = bh.calibrate(model, tokenizer, seed=0)
    layers = bh.find_moe_layers(model)
    parts = {"kind": request.param, "model": model, "tokenizer": tokenizer, "calibration": calibration}
    return SimpleNamespace(**parts, layers=layers, own_k=layers[0].own_k)


@pytest.fixture(scope="module")
def mock_model():
    return build("mock")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny OLMoE with its tokenizer, saved as a model folder."""
    folder = tmp_path_factory.mktemp("tiny-olmoe")
    build("olmoe-grouped_mm").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def mock_runner(model, folder, **options):
    return bh.BHExperimentRunner("mock", folder, model=model, tokenizer=MockTokenizer(), **options)


def sample_ids(rows=2, length=12):
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def state_of(model):
    """Everything that patching touches."""
    modules = [module for layer in bh.find_moe_layers(model) for module in (layer.router, layer.experts)]
    return [(sorted(m.__dict__), m.__dict__.get("forward"), getattr(m, "top_k", None), len(m._forward_hooks),
             len(m._forward_pre_hooks)) for m in modules]  # fmt: skip


def as_read(frame, table):
    """A frame as a reader of its CSV sees it: missing texts are empty, missing numbers NaN."""
    fitted = bh.fit_table(frame, table)
    for column in table.columns:
        if column.kind is not str:
            fitted[column.name] = fitted[column.name].astype(float)
    return fitted


def assert_same_rows(left, right, table, columns=None):
    """Two frames of a table agree exactly in the columns that no clock decides, or in `columns`."""
    columns = columns or stable(table)
    pd.testing.assert_frame_equal(
        as_read(left, table)[columns], as_read(right, table)[columns], check_exact=True
    )


def assert_same_results(left, right):
    """All three tables of two runs agree exactly in the columns that no clock decides."""
    for name, table in TABLES.items():
        assert_same_rows(getattr(left, name), getattr(right, name), table)


def strict_loads(text):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def cli(folder, output, *options):
    """Run the command line in this process."""
    fixed_options = ["--model", str(folder), "--output", str(output), "--device", "cpu", "--no-fp16"]
    return bh.main([*fixed_options, *map(str, options)])


def error_lines(capsys):
    """What a command line complained about: the lines that begin with "error: "."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def only_plots(monkeypatch, *names):
    """Drawing takes most of the time of a small run: leave out the plots that a test does not look at."""
    monkeypatch.setattr(bh, "PLOTS", {name: bh.PLOTS[name] for name in names})


# One configuration of every rule, on a model with 16 experts and top-4, and the model's own.
RULES = {
    "topk_4": {"method": "topk", "k": 4},
    "topk_2": {"method": "topk", "k": 2},
    "bh": {"method": "bh", "alpha": 0.3, "max_k": 4, "p_values": "flat"},
    "by": {"method": "by", "alpha": 0.3, "max_k": 4, "p_values": "flat"},
    "top_p": {"method": "top_p", "p": 0.6, "max_k": 4},
    "min_p": {"method": "min_p", "ratio": 0.3, "max_k": 4},
    "threshold": {"method": "threshold", "threshold": 0.1, "max_k": 4},
}


SMALL = {"topk_2": {"method": "topk", "k": 2}, "bh": {**FLAT, "max_k": 8}, "bh_2": {**FLAT, "alpha": 0.2}}


def fixed(count, widest):
    """A BH configuration whose rule always ends at its floor."""
    return {**FLAT, "alpha": 1e-9, "min_k": count, "max_k": widest, "p_values": "softmax"}


def random_logits(*shape, seed=0, spread=2.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


class Boom(Exception):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A runner on a tiny real OLMoE."""
    folder = tmp_path_factory.mktemp("tiny")
    return bh.BHExperimentRunner("tiny", folder, model=build("olmoe-grouped_mm"), tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def mock_calibration(mock_model):
    return bh.calibrate(mock_model, MockTokenizer(), seed=0)


def table_widths(text):
    """For every table of a Markdown text: the numbers of unescaped pipes of its rows."""
    widths, inside = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            widths += [] if inside else [set()]
            widths[-1].add(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)))
        inside = line.startswith("|")
    return widths


def plain_nll(model, ids, context):
    """transformers' own loss over the tokens after `context`."""
    labels = ids.clone()
    labels[:, :context] = -100
    with torch.inference_mode():
        return model(input_ids=ids, labels=labels).loss.item()


FUZZ = int(os.environ.get("BH_FUZZ", 150))  # inputs for each kind of file; BH_FUZZ=3000 for a long look
fuzzed = settings(
    max_examples=FUZZ, deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


HOSTILE = (
    "=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "'=1", "a | b\n| c | d |\n\n# heading",
    "```\ncode\n```", "<script>alert(1)</script><!-- ", "[link](http://x) ![image](http://x/y.png)",
    "\u202egpj.exe \u2066x\u2069 \u200b", "bell \x07 escape \x1b[2J\x1b]0;title\x07 return \r over",
    "2026-01-01 00:00:00,000 ERROR forged\n2026-01-01 00:00:00,000 INFO line", "\x00 NUL",
    "$\\frac{1$ $x^$ \\", "é" * 500_000,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------


def test_own_configurations(tmp_path):
    """--routing-configs adds to the suite, and --configs picks from both."""
    path = tmp_path / "own.json"
    path.write_text('{"mine": {"method": "top_p", "p": 0.3}}')
    parse = bh.build_parser().parse_args
    assert list(bh.choose_configs(parse(["--routing-configs", str(path)]))) == [*bh.ROUTING_CONFIGS, "mine"]
    chosen = bh.choose_configs(parse(["--routing-configs", str(path), "--configs", "mine, topk_3"]))
    assert list(chosen) == ["mine", "topk_3"]
    sizes = {name: len(bh.choose_configs(parse(["--suite", name]))) for name in bh.suites()}
    rules = len(bh._FIELD)
    field = (
        3 * 7 + 1 + 2 * rules + 2 + 4
    )  # static, the model's own, each with and without means, linear, oracle
    assert sizes == {"default": 5, "frontier": 24, "controls": 20, "all": 36, "field": field}


def test_the_field_suite_follows_the_models_own_k():
    """On a model of Top-4 no static rule is wider; on one of Top-8 nothing is left out."""
    suite = bh.field_suite()
    assert bh.field_on(suite, 8) == suite
    on_four = bh.field_on(suite, 4)
    widths = {
        config["k"] for name, config in on_four.items() if config["method"] == "topk" and name != "topk_8"
    }
    assert widths == {1, 2, 3, 4}
    assert set(on_four) >= {"topk_8", "topk_4_mean", "bh_mean", "oracle_1"}


# ---------------------------------------------------------------------------------------------------------
# 2. Prompts and texts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", b"", "empty"), ("a.txt", b"\xff\xfe\x00x", "codec"), ("a.jsonl", b"{", "not valid jsonl"),
     ("a.jsonl", b'{"id": "x"}', "entry 1.*no text"), ("a.json", b"3", "list of prompts"),
     ("a.json", b"[1]", "entry 1: it is int"),
     ("a.csv", b"name\nx\n", "entry 1.*no text"), ("a.txt", b"same\nsame\n", "occurs 2 times"),
     ("a.xml", b"x", "kind of --prompts"), ("a.json", b'[{"text": 4}]', "no text")],
)  # fmt: skip
def test_bad_prompt_files(tmp_path, capsys, name, content, message):
    """One clear line and exit code 2, before a model is loaded."""
    path = tmp_path / name
    path.write_bytes(content)
    assert bh.main(["--prompts", str(path), "--model", "nowhere", "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_prompt_files(tmp_path):
    """The four kinds of file give the same prompts."""
    rows = [{"id": "a", "text": "One, two", "category": "x"}, {"id": "b", "text": "Three"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "p.csv").write_text('id,text,category\na,"One, two",x\nb,Three,\n')
    (tmp_path / "p.txt").write_text("One, two\n\nThree\n")
    assert set(bh.PROMPT_FILES) == {path.suffix for path in tmp_path.iterdir()}
    first, *others = (bh.load_prompts(tmp_path / f"p.{kind}") for kind in ("json", "jsonl", "csv", "txt"))
    assert others[:2] == [first, first]
    assert [prompt["text"] for prompt in others[2]] == ["One, two", "Three"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_lines_end_at_line_ends_only(tmp_path, character):
    text = f"one{character}two"
    for end in ("\n", "\r\n"):
        (tmp_path / "p.txt").write_bytes(f"{text}{end}three{end}".encode())
        assert [prompt["text"] for prompt in bh.load_prompts(tmp_path / "p.txt")] == [text, "three"]
        if character >= "\x80":  # JSON forbids the others inside a string
            line = json.dumps({"text": text}, ensure_ascii=False)
            (tmp_path / "p.jsonl").write_bytes(f'{line}{end}{{"text": "three"}}{end}'.encode())
            assert [prompt["text"] for prompt in bh.load_prompts(tmp_path / "p.jsonl")] == [text, "three"]


def test_bytes_that_are_no_text(tmp_path, capsys):
    for option, name in (("--prompts", "p.txt"), ("--text", "t.txt"), ("--routing-configs", "c.json")):
        (tmp_path / name).write_bytes(b"caf\xe9 \xff\xfe")
        arguments = [option, str(tmp_path / name), "--model", str(EMBEDDED), "--output", str(tmp_path / "o")]
        assert bh.main(arguments) == 2
        assert str(tmp_path / name) in capsys.readouterr().err


CONFIG_FIELDS = sorted({field.name for rule in bh.RULES.values() for field in rule.fields})
json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(max_size=12) | strategies.sampled_from([*bh.RULES, *CONFIG_FIELDS, "text", "id"]),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(
        strategies.sampled_from([*CONFIG_FIELDS, *bh.PROMPT_FIELDS])
        | strategies.text(max_size=5), inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
prompt_like = strategies.fixed_dictionaries(
    {"text": strategies.text(max_size=8) | json_values},
    optional={field: json_values for field in (*bh.PROMPT_FIELDS, "token_ids") if field != "text"},
)


def as_file(kind, value, random):
    """A value as a file of some kind, sometimes with a byte changed, cut off or put in."""
    entries = value if isinstance(value, list) else [value]
    if kind == ".json":
        text = json.dumps(value)
    elif kind == ".jsonl":
        text = "\n".join(map(json.dumps, entries))
    elif kind == ".csv":
        rows = [",".join(map(str, row.values())) if isinstance(row, dict) else str(row) for row in entries]
        text = "\n".join(rows)
    else:
        text = str(value)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if kind == ".csv" and random.integers(4):
        content = bytearray(b"id,text,category\n") + content
    for _ in range(random.integers(3) if content else 0):
        place = int(random.integers(len(content)))
        content[place : place + int(random.integers(3))] = random.bytes(int(random.integers(3)))
        if not content:
            break
    return bytes(content)


def accepts_or_explains(work):
    """What `work` returns, or None where it refuses with a UserError; anything else is a failure."""
    with contextlib.suppress(bh.UserError):
        return work()
    return None


@fuzzed
@given(
    strategies.sampled_from(bh.PROMPT_FILES), strategies.integers(0, 2**32),
    strategies.binary(max_size=40) | json_values | strategies.lists(prompt_like, max_size=3),
)  # fmt: skip
def test_prompt_files_of_anything(tmp_path_factory, kind, seed, value):
    path = tmp_path_factory.getbasetemp() / f"fuzz{kind}"
    random = np.random.default_rng(seed)
    path.write_bytes(value if isinstance(value, bytes) else as_file(kind, value, random))
    prompts = accepts_or_explains(lambda: bh.load_prompts(path))
    for prompt in prompts or []:
        assert set(prompt) == set(bh.PROMPT_FIELDS)
        assert prompt["text"].strip()
        json.dumps(prompt, allow_nan=False).encode()


def test_text_windows_are_those_of_rolling_log_likelihood(tiny, tmp_path, monkeypatch):
    """Windows cover every token once, with one token of context, and their NLL is a plain forward pass."""
    text = "The quick brown fox jumps over the lazy dog. " * 5
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Short but long enough to be a window.", encoding="utf-8")
    items = bh.text_windows([tmp_path], tiny.tokenizer, 32)
    assert {item.document for item in items} == {"b.txt", "sub/a.txt"}
    ids = tiny.tokenizer(text)["input_ids"]
    windows = [item.token_ids.tolist() for item in items if item.document == "sub/a.txt"]
    assert [token for window in windows for token in window[1:]] == ids[: sum(len(w) - 1 for w in windows)]
    assert [window[0] for window in windows] == [0, *ids[31:-1:32]][: len(windows)]
    configs = {name: RULES[name] for name in ("topk_4", "bh")}
    generated = tiny.run_full_experiment_suite(configs, [], texts=items, resume=False)
    scores = tiny.results.scores
    assert len(generated) == 0
    assert (scores["status"] == "ok").all()
    row = scores[(scores["document"] == "sub/a.txt") & (scores["config_name"] == "topk_4")].iloc[1]
    assert row["nll"] == pytest.approx(plain_nll(tiny.model, torch.tensor([windows[1]]), 1), abs=1e-4)
    assert (scores["avg_experts_per_token"] > 0).all()
    only_plots(monkeypatch, "inference_time_comparison", "quality_vs_experts")
    bh.write_report(generated, tiny.output_dir)
    analysis = strict_loads((tiny.output_dir / "analysis_summary.json").read_text())
    assert analysis["verdict"]["bh"]["n_units"] == 2
    assert [path.stem for path in (tiny.output_dir / "plots").iterdir()] == ["quality_vs_experts"]


# Data sets

DATA = pd.DataFrame(
    {"text": ["The river runs", " ", "A cat is an", None, "He was born"], "kind": [*"ababa"], "n": range(5)}
)


def write_data(folder):
    """The same rows as every kind of file, and a folder with two splits."""
    DATA.to_parquet(folder / "d.parquet")
    DATA.to_csv(folder / "d.csv", index=False)
    DATA.to_json(folder / "d.jsonl", orient="records", lines=True)
    for split in ("validation", "test"):
        (folder / "splits").mkdir(exist_ok=True)
        DATA.to_csv(folder / "splits" / f"{split}.csv", index=False)
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text("{nope")
    (folder / "code.py").write_text("raise SystemExit")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        write_data(folder)
        yield folder


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_prompts_from_a_dataset(kind, data_folder, caplog):
    """Rows keep their numbers, whatever is left out."""
    path = str(data_folder / f"d.{kind}")
    with caplog.at_level("WARNING"):
        prompts = bh.load_dataset_prompts(path, category_column="kind", reference_column="n")
    assert "2 of 5 rows have no text" in caplog.text
    assert [(p["id"], p["text"], p["category"], p["reference"]) for p in prompts] == [
        (f"d.{kind}-{row}", DATA["text"][row], "a", str(row)) for row in (0, 2, 4)
    ]
    assert [p["id"] for p in bh.load_dataset_prompts(path, limit=1)] == [f"d.{kind}-0"]


def test_rows_drawn_at_random(data_folder):
    """The seed decides which; rows keep their numbers."""
    path = str(data_folder / "d.csv")
    drawn = [bh.load_dataset_prompts(path, limit=3, random_seed=seed) for seed in (1, 1, *range(9))]
    assert drawn[0] == drawn[1]
    assert len({tuple(p["id"] for p in one) for one in drawn}) > 3
    assert all(p["text"] == DATA["text"][int(p["id"].split("-")[1])] for one in drawn for p in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--dataset", "nobody/nothing"], "Couldn't reach"), (["--dataset", "empty"], "any data files"),
     (["--dataset", "bad.json"], "JSON parse error"), (["--dataset", "code.py"], "kind of --dataset file"),
     (["--dataset", "splits", "--split", "tst"], 'Did you mean "test"? Available: validation, test'),
     (["--dataset", "splits"], "Available: validation, test"),
     (["--dataset", "d.csv", "--text-column", "txt"], "Available: text, kind, n"),
     (["--dataset", "d.csv", "--category-column", "x"], "unknown --category-column"),
     (["--dataset", "d.csv", "--text-column", "n"], "none of 5 rows has a text"),
     (["--dataset", "d.csv", "--limit", "0"], "--limit 0"), (["--split", "test"], "--split needs --dataset"),
     (["--limit", "3"], "--limit needs --dataset"), (["--random-rows"], "--random-rows needs --dataset"),
     (["--dataset", "d.csv", "--prompts", "x.txt"], "exclude each other"),
     (["--dataset", "d.csv", "--tasks", "x"], "exclude each other")],
)  # fmt: skip
def test_bad_datasets(options, message, data_folder, tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before a model is loaded."""
    monkeypatch.chdir(data_folder)
    assert cli("nowhere", tmp_path / "out", *options) == 2
    errors = error_lines(capsys)
    assert len(errors) == 1
    assert message in errors[0]


def test_embedded_model_runs_a_dataset(data_folder, tmp_path):
    options = ["--dataset", data_folder / "d.parquet", "--limit", 3, "--max-tokens", 2, "--configs", "topk_8"]
    assert cli(EMBEDDED, tmp_path, *options, "--text", "none") == 0
    frame = bh.Results.read(tmp_path).generation
    assert list(frame["prompt_id"]) == ["d.parquet-0", "d.parquet-2"]
    assert list(frame["full_text"].str.startswith(tuple(DATA["text"].dropna()))) == [True, True]


# ---------------------------------------------------------------------------------------------------------
# 3. Nulls
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 16, 64])
def test_flat_null(experts):
    """The upper tail of Beta(1, E - 1), uniform when the gate vector is uniform on the simplex."""
    q = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    if experts > 1:
        p_values = bh.FlatNull(experts).p_values(q.log())
        np.testing.assert_allclose(p_values, stats.beta.sf(q, 1, experts - 1), rtol=1e-9)
    else:
        assert bh.FlatNull(1).p_values(torch.zeros(3)).tolist() == [1, 1, 1]
        return
    gates = np.random.default_rng(0).dirichlet(np.ones(experts), size=4000)[:, 0]
    assert stats.kstest(bh.FlatNull(experts).p_values(torch.tensor(gates).log()), "uniform").pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.98])
def test_softmax_null_is_degenerate(alpha):
    """1 - q never rejects past rank 1 for alpha < 1 - 1/E, whatever the logits: BH returns min_k."""
    extreme = [torch.zeros(64), torch.eye(64)[0] * 50, torch.eye(64)[:2].sum(0) * 50, torch.arange(64.0)]
    logits = torch.cat([random_logits(2000, 64, spread=8), torch.stack(extreme)])
    for floor in (1, 3):
        count = bh.benjamini_hochberg_routing(logits, alpha, min_k=floor, null=bh.SoftmaxNull(64))[2]
        assert (count == floor).all()


def test_empirical_null():
    """p = (1 + #{null >= s}) / (n0 + 1) by direct count; never 0; uniform for fresh scores."""
    random = np.random.default_rng(0)
    null_scores = random.normal(size=3000).round(2).astype(np.float32)  # with ties
    null = bh.EmpiricalNull(torch.tensor(null_scores))
    scores = np.append(random.normal(size=500).round(2), [-99, 99]).astype(np.float32)
    expected = [(1 + (null_scores >= s).sum()) / 3001 for s in scores]
    np.testing.assert_allclose(null.p_values(torch.tensor(scores)), expected, rtol=1e-15)
    assert min(expected) > 0
    fresh = bh.EmpiricalNull(torch.tensor(random.normal(size=50_000)))
    assert stats.kstest(fresh.p_values(torch.tensor(random.normal(size=2000))), "uniform").pvalue > 0.01
    with pytest.raises(ValueError, match="finite"):
        bh.EmpiricalNull(torch.tensor([1.0, torch.nan]))


def make_null(name, experts=64):
    """The null of that name, for a layer whose calibration text had random logits."""
    logits = random_logits(1, 500, experts, seed=5)
    calibration = bh.Calibration(logits, logits.topk(8).indices.to(torch.int16))
    return bh.NULLS[name].make(calibration, 0, 1.0, experts)


@pytest.mark.parametrize("name", list(bh.NULLS))
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_critical_scores_decide_like_p_values(name, alpha, temperature):
    """The table of critical scores gives the number that BH finds from the p-values."""
    fresh = random_logits(3000, 64, seed=6, spread=3) / temperature
    logits = torch.cat([fresh, random_logits(500, 64, seed=5)])  # the last ones: ties with the null
    scores = bh.gate_scores(logits)
    null = make_null(name)
    expected = bh.bh_rejections(null.p_values(logits if null.on_logits else scores), alpha)
    critical = null.critical_scores(bh.bh_levels(alpha, 64)).float()
    assert (critical.diff().nan_to_num(0) <= 0).all()
    assert torch.equal(bh.Gates(scores, null, logits).rejections(alpha), expected)


class TableNull:
    """A null with the critical scores that it is given."""

    on_logits = False

    def __init__(self, critical):
        self.critical = torch.tensor(critical)

    def smallest_alpha(self, num_experts):
        return 0.0

    def critical_scores(self, levels):
        return self.critical


@pytest.mark.parametrize("copies", [1, 1000])
def test_rank_beyond_a_failed_one(copies):
    """Where the first ranks fail and a deeper one passes, the deeper one counts."""
    scores = torch.tensor(
        [[3.5, 3.4, 3.3, 0.0], [3.5, 3.4, 2.9, 2.5], [3.5, 3.4, 2.9, 1.9], [9.0, 3.0, 2.0, 1.0]]
    )
    gates = bh.Gates(scores.repeat(copies, 1), TableNull([5.0, 4.0, 3.0, 2.0]))
    assert gates.rejections(0.05).tolist() == [3, 4, 0, 1] * copies


def test_too_few_null_scores(mock_model):
    """An alpha that the calibration cannot support is refused, with the smallest alpha that it can."""
    logits = random_logits(4, 10, 64)
    own = logits.topk(8).indices.to(torch.int16)
    calibration = bh.Calibration(logits, own)
    n0 = 10 * 56
    assert calibration.null(0, 1.0).n0 == n0
    with (
        pytest.raises(bh.UserError, match=f"alpha >= {64 / (n0 + 1):.2g}"),
        bh.patched_routing(mock_model, {**EMPIRICAL, "alpha": 0.1}, calibration),
    ):
        pass
    with bh.patched_routing(mock_model, {**EMPIRICAL, "alpha": 0.12}, calibration):
        pass


# ---------------------------------------------------------------------------------------------------------
# 4. Rules
# ---------------------------------------------------------------------------------------------------------

# The routing function

BH1995 = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
          0.6528, 0.7590, 1.0]  # fmt: skip


def test_paper_example():
    """Benjamini and Hochberg (1995), section 3.2: four of the fifteen hypotheses are rejected at 0.05."""
    assert bh.bh_rejections(torch.tensor(BH1995, dtype=torch.float64), 0.05) == 4


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
def test_rejections_equal_scipy(alpha):
    """The number of rejections is that of scipy.stats.false_discovery_control on many p-values."""
    random = np.random.default_rng(0)
    p = random.uniform(size=(3000, 64)) ** random.uniform(0.3, 8, size=(3000, 1))
    expected = (stats.false_discovery_control(p, axis=1) <= alpha).sum(1)
    assert bh.bh_rejections(torch.tensor(p), alpha).tolist() == expected.tolist()
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.125, 0.75, 0.75, 0.75], 1),  # exactly on the line: rejected
        ([0.125 + 2**-40, 0.75, 0.75, 0.75], 0),  # just above it: not
        ([0.5, 0.5, 0.5, 0.5], 4),  # step-up: ranks 1 to 3 fail, rank 4 passes and takes them along
        ([0.2, 0.25, 0.9, 0.9], 2),  # a step-down rule would stop at rank 1
        ([0.9, 0.25, 0.9, 0.2], 2),  # order does not matter
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([0.0, 0.0, 0.0, 0.0], 4),
    ],
)
def test_step_up_and_boundary(p_values, expected):
    """At alpha 0.5 over four p-values the line is 1/8, 1/4, 3/8, 1/2, all exact in binary."""
    assert bh.bh_rejections(torch.tensor(p_values, dtype=torch.float64), 0.5) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 64), (2, 1, 3, 16), (0, 64), (5, 4), (3, 1)])
@pytest.mark.parametrize(("min_k", "max_k"), [(1, 8), (2, 3), (4, 4), (1, 100)])
def test_shape_of_result(shape, dtype, min_k, max_k):
    """Weights sum to 1 and are zero outside the selection; padding -1 begins exactly at num_selected."""
    logits = random_logits(*shape).to(dtype)
    weights, experts, count = bh.benjamini_hochberg_routing(logits, 0.5, 1.0, min_k, max_k)
    assert weights.shape == shape
    assert experts.shape == (*shape[:-1], max_k)
    assert count.shape == shape[:-1]
    assert experts.dtype == count.dtype == torch.int64
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]), check_dtype=False)
    assert ((count >= min(min_k, shape[-1])) & (count <= min(max_k, shape[-1]))).all()
    assert torch.equal(experts == -1, torch.arange(max_k) >= count.unsqueeze(-1))
    chosen = torch.zeros(*shape[:-1], shape[-1] + 1).scatter(-1, experts.where(experts >= 0, shape[-1]), 1.0)
    assert torch.equal(weights > 0, chosen[..., :-1] > 0)


def test_weights_order_and_ties():
    """Best first, ties to the lower index, weights the softmax over the selection at the temperature."""
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    weights, experts, _ = bh.benjamini_hochberg_routing(logits, 0.01, 2.0, min_k=4, max_k=4)
    assert experts.tolist() == [1, 2, 4, 3]
    expected = torch.zeros(5).scatter(0, experts, torch.softmax(logits[experts] / 2, 0))
    torch.testing.assert_close(weights, expected)
    ranked = bh.benjamini_hochberg_routing(random_logits(50, 64), 1.0, max_k=64)[1]
    assert torch.equal(ranked, random_logits(50, 64).sort(descending=True, stable=True).indices)


@pytest.mark.parametrize("width", [1, 3, 8, 63, 64])
@pytest.mark.parametrize("shape", [(64,), (500, 64), (20, 25, 64)])
def test_any_ties_go_to_the_lower_index(shape, width):
    """Logits of few different values: the chosen are those of a stable sort, at every width."""
    for steps in (1, 2, 8):  # different values in a unit
        logits = (random_logits(*shape, seed=steps) * steps).round() / steps
        experts = bh.benjamini_hochberg_routing(logits, 0.05, 1.0, width, width)[1]
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        assert torch.equal(experts, expected)


def test_weights_have_gradients():
    """They are those of the softmax over the selection."""
    logits = random_logits(30, 16).double().requires_grad_()
    weights, experts, _ = bh.benjamini_hochberg_routing(logits, 0.5, min_k=3, max_k=3)
    target = random_logits(30, 16, seed=1).double()
    (found,) = torch.autograd.grad((weights * target).sum(), logits)
    chosen = logits.gather(-1, experts).softmax(-1)
    (expected,) = torch.autograd.grad((chosen * target.gather(-1, experts)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_excluded_experts():
    """An expert at -inf is never chosen, even where the floor or alpha = 1 asks for more than are left."""
    logits = random_logits(20, 8)
    logits[:, [1, 4, 5, 6, 7]] = -torch.inf
    weights, experts, count = bh.benjamini_hochberg_routing(logits, 1.0, min_k=5, max_k=8)
    assert (count == 3).all()
    assert set(experts.unique().tolist()) == {-1, 0, 2, 3}
    assert (weights[:, [1, 4, 5, 6, 7]] == 0).all()


def test_alpha_and_temperature():
    """A larger alpha never keeps fewer; a higher temperature flattens the scores and keeps fewer."""
    logits = random_logits(500, 64)
    alphas = (0.001, 0.01, 0.1, 0.5, 0.9, 1.0)
    counts = [bh.benjamini_hochberg_routing(logits, alpha, max_k=64)[2] for alpha in alphas]
    assert all((low <= high).all() for low, high in zip(counts, counts[1:], strict=False))
    assert counts[0].float().mean() < counts[3].float().mean() < counts[-1].float().mean() == 64
    hot = bh.benjamini_hochberg_routing(logits, 0.5, temperature=4.0, max_k=64)[2]
    assert hot.float().mean() < counts[3].float().mean()


def test_statistics():
    """return_stats gives p-values, thresholds and the rejections before floor and cap."""
    logits = torch.cat([random_logits(100, 64, spread=spread) for spread in (0.5, 2.5, 4)])
    *_, count, statistics = bh.benjamini_hochberg_routing(logits, 0.5, min_k=2, max_k=3, return_stats=True)
    assert set(statistics) == {"p_values", "thresholds", "rejections"}
    q = torch.softmax(logits.double(), -1).numpy()
    np.testing.assert_allclose(statistics["p_values"], stats.beta.sf(q, 1, 63), rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(statistics["thresholds"], 0.5 * np.arange(1, 65) / 64, rtol=1e-12)
    expected = (stats.false_discovery_control(statistics["p_values"], axis=1) <= 0.5).sum(1)
    assert statistics["rejections"].tolist() == expected.tolist()
    assert {0, 1, 2, 4} <= set(expected)
    assert count.tolist() == expected.clip(2, 3).tolist()


def test_return_stats_comes_before_null():
    *_, count, statistics = bh.benjamini_hochberg_routing(random_logits(4, 16), 0.05, 1.0, 1, 16, True)
    assert statistics["rejections"].clamp(1, 16).tolist() == count.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(bh.NULLS))
def test_the_path_of_critical_scores_agrees_with_that_of_p_values(name, dtype):
    """The rejections, from critical scores, are those of BH on the null's p-values of the same scores."""
    null = make_null(name)
    seen = set()
    for alpha in (0.005, 0.05, 0.3, 0.99):
        for temperature in (0.7, 1.0, 2.0):
            logits = random_logits(2000, 64, seed=int(alpha * 1000), spread=3).to(dtype)
            arguments = (logits, alpha, temperature, 1, 64)
            *_, count, statistics = bh.benjamini_hochberg_routing(*arguments, return_stats=True, null=null)
            scores = bh.gate_scores(logits, temperature)
            p_values = null.p_values(logits.to(scores.dtype) / temperature if null.on_logits else scores)
            expected = bh.bh_rejections(p_values, alpha)
            assert torch.equal(statistics["p_values"], p_values)
            assert torch.equal(statistics["rejections"], expected)
            assert torch.equal(count, expected.clamp(1, 64))
            assert torch.equal(bh.benjamini_hochberg_routing(*arguments, null=null)[2], count)
            seen |= set(expected.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [("alpha", 0), ("alpha", -0.1), ("alpha", 1.01), ("alpha", float("nan")), ("alpha", "0.05"),
     ("temperature", 0), ("temperature", -1.0), ("temperature", float("inf")), ("min_k", 0), ("min_k", 1.5),
     ("max_k", 0), ("max_k", 2.5), ("min_k", 9), ("router_logits", torch.ones(3, dtype=torch.int64)),
     ("router_logits", torch.tensor(1.0)), ("router_logits", torch.ones(2, 0)),
     ("router_logits", torch.tensor([1.0, torch.nan])), ("router_logits", torch.tensor([1.0, torch.inf])),
     ("router_logits", torch.full((2, 4), -torch.inf))],
)  # fmt: skip
def test_bad_arguments(argument, value):
    """Each bad argument is refused by name, with one line."""
    arguments = {"router_logits": torch.ones(4), argument: value}
    with pytest.raises(ValueError, match=argument) as error:
        bh.benjamini_hochberg_routing(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument", ["alpha", "temperature", "min_k", "max_k"])
def test_one_call_is_of_one_layer(argument):
    """A list, one value for each MoE layer, means nothing here."""
    with pytest.raises(bh.UserError, match=argument) as error:
        bh.benjamini_hochberg_routing(torch.ones(4), **{argument: [1, 1]})
    assert "\n" not in str(error.value)


def test_docstring_examples():
    result = doctest.testmod(bh)
    assert result.attempted > 0
    assert result.failed == 0


floats_of_all_kinds = strategies.floats(width=32) | strategies.sampled_from(
    [0.0, 1e30, -1e30, 1e-30, math.inf, -math.inf, math.nan]
)
settings_of_bh = strategies.fixed_dictionaries({
    "alpha": strategies.sampled_from([1e-30, 1e-6, 0.05, 0.5, 1.0]) | floats_of_all_kinds,
    "temperature": strategies.sampled_from([1e-3, 1.0, 1e3]) | floats_of_all_kinds,
    "min_k": strategies.integers(-1, 12), "max_k": strategies.integers(-1, 100),
})  # fmt: skip


def logits_of_kind(kind, shape, dtype, seed):
    """Random logits: normal, huge, tiny, with ties, with experts excluded, or with what is no number."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=random, dtype=torch.float64)
    logits = logits * {"huge": 1e4, "tiny": 1e-7}.get(kind, 3.0)
    if kind == "ties":
        logits = logits.round()
    if kind in ("holes", "bad") and logits.numel():
        logits = logits.masked_fill(torch.rand(logits.shape, generator=random) < 0.3, -math.inf)
        if kind == "bad":
            logits.view(-1)[0] = (math.nan, math.inf)[seed % 2]
    return logits.to(dtype)


def check_selection(logits, chosen, weights, selected, number, statistics):
    """What the docstring of the routing function promises."""
    *leading, experts = logits.shape
    assert weights.shape == logits.shape
    assert selected.shape == (*leading, chosen["max_k"])
    assert number.shape == tuple(leading)
    allowed = torch.isfinite(logits).sum(-1)
    low, high = (torch.minimum(allowed, torch.tensor(chosen[key])) for key in ("min_k", "max_k"))
    assert ((low <= number) & (number <= high)).all()
    clipped = statistics["rejections"].clamp(chosen["min_k"], chosen["max_k"])
    assert torch.equal(number, torch.minimum(clipped, high))
    assert weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * number.numel(), abs=1e-5)
    assert torch.equal((selected >= 0).sum(-1), number)
    filled = torch.arange(chosen["max_k"]) < number.unsqueeze(-1)
    assert torch.equal(selected >= 0, filled)
    places = torch.zeros(*leading, experts + 1, dtype=torch.bool)  # the last for the padding
    mask = places.scatter(-1, selected % (experts + 1), True)[..., :experts]
    assert torch.equal(mask.sum(-1), number)  # no expert twice
    assert (weights[~mask] == 0).all()
    scores = bh.gate_scores(logits, chosen["temperature"])  # float32: logits that differ by less are ties
    best_left = scores.masked_fill(mask, -math.inf).amax(-1)
    worst_kept = scores.masked_fill(~mask, math.inf).amin(-1)
    assert (worst_kept >= best_left).all()
    assert ((statistics["p_values"] >= 0) & (statistics["p_values"] <= 1)).all()


@fuzzed
@given(
    strategies.lists(strategies.integers(0, 3), max_size=2), strategies.integers(1, 70), settings_of_bh,
    strategies.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    strategies.sampled_from(["normal", "huge", "tiny", "ties", "holes", "bad"]), strategies.integers(0, 99),
)  # fmt: skip
def test_routing_function_on_anything(leading, experts, chosen, dtype, kind, seed):
    """Refused with a UserError, or everything that the docstring promises holds."""
    logits = logits_of_kind(kind, (*leading, experts), dtype, seed)
    try:
        weights, selected, number, statistics = bh.benjamini_hochberg_routing(
            logits, **chosen, return_stats=True
        )
    except bh.UserError:
        in_range = (0 < chosen["alpha"] <= 1 and 0 < chosen["temperature"] < math.inf
                    and 1 <= chosen["min_k"] <= chosen["max_k"])  # fmt: skip
        may_overflow = torch.isinf(logits).any() or chosen["temperature"] < 1e-30
        assert kind in ("holes", "bad") or may_overflow or not in_range
        return
    check_selection(logits, chosen, weights, selected, number, statistics)


# Rules


def reference_count(name, config, q):
    """How many experts a rule keeps of a token with gates `q`, best first, by its definition."""
    num_experts = len(q)
    ranks = range(1, num_experts + 1)
    if name in ("bh", "by"):
        alpha = config["alpha"] / (sum(1 / k for k in ranks) if name == "by" else 1)
        p_values = [(1 - value) ** (num_experts - 1) for value in q]
        return max([k for k in ranks if p_values[k - 1] <= k * alpha / num_experts], default=0)
    if name == "top_p":
        return next(k for k in ranks if sum(q[:k]) >= config["p"])
    if name == "min_p":
        return sum(value >= config["ratio"] * q[0] for value in q)
    assert name == "threshold"
    return sum(value >= config["threshold"] for value in q)


ADAPTIVE_RULES = [name for name, rule in bh.RULES.items() if not rule.is_static]
# The others are compared with a transcription of their formula in section 17.
COUNTED_BY_GATE = ["bh", "by", "top_p", "min_p", "threshold"]


def counts_by(config, logits, null=None, own_k=4, norms=None):
    """What the rule of a resolved configuration wants for tokens with these logits."""
    temperature = config["temperature"]
    gates = bh.Gates(bh.gate_scores(logits, temperature), null, logits / temperature, own_k, norms)
    return bh.RULES[config["method"]].count(gates, config)


@pytest.mark.parametrize("name", COUNTED_BY_GATE)
def test_rules_count_what_they_say(name):
    """Each rule against its definition in a loop over tokens, experts ranked by gate."""
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(3)) * 2
    config = bh.resolve_config(name, RULES[name] | {"max_k": 16})
    counts = counts_by(config, logits, bh.FlatNull(16))
    for row, count in zip(logits.double().softmax(-1).tolist(), counts.tolist(), strict=True):
        assert count == reference_count(name, config, sorted(row, reverse=True))
    assert len(counts.unique()) > 1


@pytest.mark.parametrize("rule", bh.RULES.values(), ids=list(bh.RULES))
def test_rules_are_declared_whole(rule):
    """Words, a knob that no other field is called, defaults that are valid, ends of the search that are."""
    assert rule.words
    assert rule.source
    names = [field.name for field in rule.fields]
    assert len(set(names)) == len(names)
    assert names[0] == rule.knob.name
    config = bh.resolve_config("x", {"method": rule.name})
    assert set(config) == {"method", *names, "description"}
    for field in rule.fields:
        assert config[field.name] == field.default
        assert field.words
        assert field.allowed
    if not rule.is_static:
        assert [rule.knob.parse(end) for end in rule.search] == sorted(rule.search)
    assert (bh.NULL_FIELD in rule.fields) == rule.uses_null


@pytest.fixture
def new_rules():
    """The rules, to be added to: afterwards there are those of before."""
    before = dict(bh.RULES)
    yield bh.RULES
    bh.RULES.clear()
    bh.RULES.update(before)


def register_two_rules():
    """As in a notebook: one whose knob is a share, and one whose knob is a number above 1."""

    @bh.register_rule(
        "half", bh.share_field("share", 0.5, "least gate, as a share of 1 / E"), words="gates above average"
    )
    def half(gates, config):
        return (gates.scores.exp() >= config["share"] / gates.num_experts).sum(-1)

    margin = bh.Field("margin", float, 3.0, lambda value: value > 0, "a number above 0", "logits behind best")

    @bh.register_rule("margin", margin, words="those at most `margin` behind the best", search=(0.5, 40.0))
    def within(gates, config):
        return (gates.scores >= gates.scores.amax(-1, keepdim=True) - config["margin"]).sum(-1)


OWN_RULES = {
    "mine_half": {"method": "half", "share": 0.9, "max_k": 4},
    "mine_wide": {"method": "margin", "margin": 6.0, "max_k": 16},
    "mine_default": {"method": "margin", "max_k": [3, 4]},
}


def test_a_rule_of_ones_own_runs_everywhere(new_rules, tiny_folder, tmp_path, monkeypatch):
    """From a JSON file through the command line into tables, analysis and report."""
    register_two_rules()
    only_plots(monkeypatch, "quality_vs_experts")
    (tmp_path / "own.json").write_text(json.dumps(OWN_RULES))
    (tmp_path / "prompts.json").write_text(json.dumps([bh.TEST_PROMPTS[0], bh.TEST_PROMPTS[3]]))
    options = ["--routing-configs", tmp_path / "own.json", "--prompts", tmp_path / "prompts.json",
               "--configs", f"topk_8,{','.join(OWN_RULES)}", "--max-tokens", 3]  # fmt: skip
    assert cli(tiny_folder, tmp_path / "out", *options) == 0
    results = bh.Results.read(tmp_path / "out")
    for frame in (results.generation, results.scores):
        assert (frame["status"] == "ok").all()
        rows = frame.drop_duplicates("config_name").set_index("config_name")
        for name, settings_given in OWN_RULES.items():
            config = bh.resolve_config(name, settings_given)
            assert rows.loc[name, "method"] == settings_given["method"]
            assert json.loads(rows.loc[name, "configuration"]) == json.loads(bh.configuration_cell(config))
        own = frame[frame["config_name"].isin(OWN_RULES)]
        assert own.groupby("config_name")["avg_experts_per_token"].mean().nunique() == len(OWN_RULES)
        assert own["floor_frac"].between(0, 1).all()
    analysis = strict_loads((tmp_path / "out" / "analysis_summary.json").read_text())
    assert set(OWN_RULES) < set(analysis["verdict"])
    report = (tmp_path / "out" / "REPORT.md").read_text()
    for name in OWN_RULES:
        assert f"`{name}`" in report
    for words in ("margin", "share"):
        assert words in report
    new_rules.clear()  # who looks at the results need not have the rules
    assert bh.main(["--analyze-only", "--output", str(tmp_path / "out")]) == 0


def test_a_rule_of_ones_own_is_matched(new_rules, tiny_folder, tmp_path, monkeypatch):
    """--match-experts looks between the ends of the rule's own range, also where that is not in (0, 1]."""
    register_two_rules()
    only_plots(monkeypatch)
    (tmp_path / "own.json").write_text(json.dumps({"mine": {"method": "margin", "max_k": 16}}))
    (tmp_path / "prompts.json").write_text(json.dumps(bh.TEST_PROMPTS[:1]))
    options = ["--routing-configs", tmp_path / "own.json", "--prompts", tmp_path / "prompts.json",
               "--configs", "topk_8,mine", "--max-tokens", 3, "--match-experts", 2.5]  # fmt: skip
    assert cli(tiny_folder, tmp_path / "out", *options) == 0
    frame = bh.Results.read(tmp_path / "out").generation
    (cell,) = frame.loc[frame["config_name"] == "mine", "configuration"]
    config = json.loads(cell)
    assert config["margin"] > 1
    calibration = calibration_of_a_run(tiny_folder)
    counts = torch.stack([counts_by(config, logits) for logits in calibration.logits]).clamp(1, 16)
    assert counts.double().mean().item() == pytest.approx(2.5, abs=0.06)


def calibration_of_a_run(folder):
    """The calibration that a run of the command line on this model makes."""
    runner = bh.BHExperimentRunner(str(folder), folder.parent / "unused", device="cpu", use_fp16=False)
    return bh.calibrate(runner.model, runner.tokenizer, bh.DEFAULT_SEED)


def test_a_rule_that_tests_asks_the_null(new_rules, tiny):
    """One that asks for rejections takes p_values, and its smallest knob is respected by the search."""

    @bh.register_rule(
        "twice", bh.share_field("level", 0.05, "twice the level of BH"), words="BH at twice the level",
        smallest_knob=lambda null, num_experts: null.smallest_alpha(num_experts) / 2,
    )  # fmt: skip
    def twice(gates, config):
        return gates.rejections(min(2 * config["level"], 1.0))

    assert new_rules["twice"].uses_null
    ids = sample_ids(1, 60) % 250 + 1
    for null in bh.NULLS:
        of_bh = {"method": "bh", "alpha": 0.3, "max_k": 4, "p_values": null}
        with bh.patched_routing(tiny.model, of_bh, tiny.calibration) as recorder:
            expected = logits_of(tiny.model, ids)
        config = {"method": "twice", "level": 0.15, "max_k": 4, "p_values": null}
        with bh.patched_routing(tiny.model, config, tiny.calibration) as again:
            assert torch.equal(logits_of(tiny.model, ids), expected)
        assert again.total().row() == recorder.total().row()
    matched = bh.match_experts("x", {"method": "twice", "max_k": 4}, 2.5, tiny.calibration)
    of_bh = bh.match_experts("x", {"method": "bh", "max_k": 4}, 2.5, tiny.calibration)
    assert matched["level"] == pytest.approx(of_bh["alpha"] / 2, rel=0.02)


def test_a_static_rule_of_ones_own(new_rules, tiny):
    """Its knob is the number of experts, whatever it is called."""
    bh.register_rule("fixed", bh.count_field("number", 3, "so many"), words="always so many", is_static=True)(
        lambda gates, config: gates.scores.new_full(gates.scores.shape[:1], config["number"]).long()
    )
    ids = sample_ids(1, 20) % 250 + 1
    with bh.patched_routing(tiny.model, {"method": "topk", "k": 3}):
        expected = logits_of(tiny.model, ids)
    for config in ({"method": "fixed"}, {"method": "fixed", "number": [3, 3]}):
        with bh.patched_routing(tiny.model, config) as recorder:
            assert torch.equal(logits_of(tiny.model, ids), expected)
        row = recorder.total().row()
        assert (row["avg_experts_per_token"], row["floor_frac"]) == (3, None)
    assert bh.match_experts("x", {"method": "fixed"}, 2, tiny.calibration)["number"] == 3
    with pytest.raises(bh.UserError, match="number = 17, but a layer can run 16"):
        tiny._resolve("x", {"method": "fixed", "number": 17})


def test_a_knob_of_whole_numbers_is_matched_by_whole_numbers(new_rules, tiny):
    bh.register_rule("one_in", bh.count_field("parts", 4, "parts of E"), words="E / parts", search=(1, 16))(
        lambda gates, config: gates.scores.new_full(
            gates.scores.shape[:1], gates.num_experts // config["parts"], dtype=torch.int64
        )
    )
    given = {"method": "one_in", "max_k": 16}
    for target, parts in ((16, 1), (8, 2), (7.96, 2), (8.04, 2), (5, 3), (4, 4), (1, 9)):
        found = bh.match_experts("x", given, target, tiny.calibration)["parts"]
        assert type(found) is int
        assert 16 // found == 16 // parts
        bh.resolve_config("x", given | {"parts": found})
    with pytest.raises(bh.UserError, match="jumps over it at parts = [12],"):
        bh.match_experts("x", given, 12, tiny.calibration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("two words", bh.share_field("x", 0.5, "")), "rule name 'two words'"),
     (("", bh.share_field("x", 0.5, "")), "rule name ''"),
     (("new", bh.share_field("max_k", 0.5, "")), "knob = 'max_k'"),
     (("new", bh.share_field("method", 0.5, "")), "knob = 'method'"),
     (("new", bh.share_field("layers", 0.5, "")), "knob = 'layers'"),
     (("new", bh.share_field("p_values", 0.5, "")), "knob = 'p_values'"),
     (("new", bh.share_field("x", 0.5, ""), (0.0, 1.0)), "search = "),
     (("new", bh.share_field("x", 0.5, ""), (0.5, 0.5)), "search = "),
     (("new", bh.share_field("x", 0.5, ""), (0.5, 2.0)), r"search = \(0.5, 2.0\).*a number in \(0, 1\]"),
     (("new", bh.share_field("x", 0.5, ""), (0.5, math.nan)), "search = "),
     (("new", bh.count_field("x", 1, "")), "search = .*a whole number")],
)  # fmt: skip
def test_rules_that_cannot_be(arguments, message, new_rules):
    """Refused when they are declared, in one line; nothing is registered."""
    name, knob, *search = arguments
    before = dict(new_rules)
    with pytest.raises(bh.UserError, match=message) as error:
        bh.register_rule(name, knob, words="...", **({"search": search[0]} if search else {}))
    assert "\n" not in str(error.value)
    assert new_rules == before


# Configurations

config_like = strategies.fixed_dictionaries(
    {"method": strategies.sampled_from([*bh.RULES]) | json_values},
    optional=dict.fromkeys(CONFIG_FIELDS, json_values),
)


@fuzzed
@given(
    strategies.integers(0, 2**32),
    strategies.binary(max_size=40) | json_values
    | strategies.dictionaries(strategies.text("ab.-/_", max_size=4), config_like, max_size=3),
)  # fmt: skip
def test_configuration_files_of_anything(tmp_path_factory, seed, value):
    path = tmp_path_factory.getbasetemp() / "fuzz_configs.json"
    random = np.random.default_rng(seed)
    path.write_bytes(value if isinstance(value, bytes) else as_file(".json", value, random))
    args = bh.build_parser().parse_args(["--routing-configs", str(path)])
    configs = accepts_or_explains(lambda: bh.choose_configs(args))
    for name, config in (configs or {}).items():
        assert re.fullmatch(r"[\w.+-]+", name)
        fields = [field.name for field in bh.RULES[config["method"]].fields]
        assert set(config) == {"method", *fields, "description"}
        strict_loads(bh.configuration_cell(config))


def test_numpy_numbers(mock_model, tmp_path):
    """They are taken as numbers, and kept as Python's own; what is no number is refused all the same."""
    static = bh.resolve_config("x", {"method": "topk", "k": np.int64(4)})
    given = {"method": "bh", "alpha": np.float32(0.25), "temperature": np.float64(2), "min_k": np.int32(2),
             "max_k": np.uint8(9), "shuffle": np.bool_(False), "p_values": "flat"}  # fmt: skip
    adaptive = bh.resolve_config("x", given)
    assert {type(adaptive[field]) for field in ("min_k", "max_k")} == {int} == {type(static["k"])}
    assert {type(adaptive[field]) for field in ("alpha", "temperature")} == {float}
    assert json.loads(json.dumps(adaptive))["alpha"] == 0.25
    by_layer = bh.resolve_config("x", {"method": "topk", "k": [np.int64(4), 2], "layers": (np.int64(0), 1)})
    assert json.loads(bh.configuration_cell(by_layer))["k"] == [4, 2]
    for wrong in (np.float64(4), np.bool_(True), np.int64(0), np.array([4]), [4, np.float64(2)]):
        with pytest.raises(bh.UserError, match="k = "):
            bh.resolve_config("x", {"method": "topk", "k": wrong})
    for wrong in (np.float32("nan"), np.bool_(True), np.float64(1.5)):
        with pytest.raises(bh.UserError, match="alpha = "):
            bh.resolve_config("x", {"method": "bh", "alpha": wrong})
    options = {"seed": np.int64(3), "batch_size": np.int64(2), "sampling": {"temperature": np.float32(0.5)}}
    runner = bh.BHExperimentRunner(
        "mock", tmp_path, np.int64(2), model=mock_model, tokenizer=MockTokenizer(), **options
    )
    frame = runner.run_full_experiment_suite({"x": given}, PROMPTS[:1], np.int64(2), num_samples=np.int64(2))
    assert (frame["status"] == "ok").all()
    assert frame["config_name"].tolist() == ["topk_8", "x"] * 2
    assert set(frame["seed"]) == {3}


FOUR_LAYERS = 4  # of the model that these are resolved for


@pytest.mark.parametrize(
    ("config", "message"),
    [({"method": "topk", "k": [1, 2, 3]}, "k has 3 values, but the model has 4 MoE layers"),
     ({"method": "bh", "alpha": [0.1]}, "alpha has 1 values, but the model has 4 MoE layers"),
     ({"method": "bh", "temperature": [1.0] * 5}, "temperature has 5 values"),
     ({"method": "topk", "k": []}, "k "), ({"method": "top_p", "p": []}, "p "),
     ({"method": "top_p", "p": [0.1, 0.2, 1.1, 0.3]}, r"p = 1.1, but it must be a number in \(0, 1\]"),
     ({"method": "topk", "k": [1, 2, 0, 3]}, "k = 0"), ({"method": "topk", "k": [1, 2, "3", 4]}, "k = '3'"),
     ({"method": "topk", "k": [1, 2, [3], 4]}, r"k = \[3\]"),
     ({"method": "topk", "k": [1, 2, None, 4]}, "k = None"),
     ({"method": "topk", "k": [1, 2, True, 4]}, "k = True"),
     ({"method": "bh", "min_k": [1, 2, 5, 1], "max_k": 4}, "min_k = 5 is above max_k = 4"),
     ({"method": "bh", "min_k": 3, "max_k": [4, 4, 4, 2]}, "min_k = 3 is above max_k = 2"),
     ({"method": "bh", "p_values": ["flat"] * 4}, "p_values = "),
     ({"method": "bh", "shuffle": [True] * 4}, "shuffle = "),
     ({"method": ["bh"] * 4}, "method"), ({"method": "topk", "renormalize": ["sum"] * 4}, "renormalize = "),
     ({"method": "topk", "layers": []}, r"layers = \[\]"),
     ({"method": "topk", "layers": [0, 4]}, r"layers = \[0, 4\], but the model has 4 MoE layers, 0 to 3"),
     ({"method": "topk", "layers": [-1]}, r"layers = \[-1\]"),
     ({"method": "topk", "layers": [1, 1]}, r"layers = \[1, 1\]"),
     ({"method": "topk", "layers": [True]}, "layers = "), ({"method": "topk", "layers": [1.0]}, "layers = "),
     ({"method": "topk", "layers": 2}, "layers = 2"), ({"method": "topk", "layers": "2"}, "layers = '2'"),
     ({"method": "topk", "layers": "last 5"}, "layers = 'last 5', but the model has 4 MoE layers"),
     ({"method": "topk", "layers": "first 5"}, "layers = 'first 5'"),
     ({"method": "topk", "layers": "last 0"}, "layers = 'last 0'"),
     ({"method": "topk", "layers": "middle 2"}, 'it must be all, "first N", "last N" or a list'),
     ({"method": "topk", "layers": "last two"}, "layers = 'last two'")],
)  # fmt: skip
def test_bad_lists_and_layers(config, message, mock_model, tmp_path):
    """Refused in one line that names configuration and field, before anything is run."""
    with pytest.raises(bh.UserError, match=message) as error:
        bh.resolve_config("mine", config, FOUR_LAYERS)
    assert "\n" not in str(error.value)
    assert "'mine'" in str(error.value)
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path / "out").run_full_experiment_suite({"mine": config}, PROMPTS, 2)
    assert not (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(bh.UserError, match=message), bh.patched_routing(mock_model, config):
        pass
    assert not any(hasattr(block.gate, "_bh_patched") for block in mock_model.layers)


def test_lists_of_different_lengths_are_refused_without_a_model():
    message = "alpha has 2, max_k has 3"
    with pytest.raises(bh.UserError, match=message):
        bh.resolve_config("x", {"method": "bh", "alpha": [0.1, 0.2], "max_k": [4, 4, 4]})


def test_which_layers_are_routed():
    """First, last and numbered layers, as numbers in order; without a model they stay as they were asked."""

    def chosen(layers):
        return bh.resolve_config("x", {"method": "topk", "layers": layers}, FOUR_LAYERS)["layers"]

    assert chosen("all") == "all"
    assert (chosen("first 1"), chosen("first 3"), chosen("first 4")) == ([0], [0, 1, 2], "all")
    assert (chosen("last 1"), chosen("last 3"), chosen("last 4")) == ([3], [1, 2, 3], "all")
    assert chosen([2, 3, 1, 0]) == "all"
    assert chosen([3, 1]) == chosen((1, 3)) == chosen([np.int64(3), 1]) == [1, 3]
    again = bh.resolve_config("x", bh.resolve_config("x", {"method": "topk", "layers": "last 2"}, 4), 4)
    assert again["layers"] == [2, 3]
    assert bh.resolve_config("x", {"method": "topk", "layers": "last 2"})["layers"] == "last 2"
    config = bh.resolve_config("x", {"method": "topk", "layers": [1]}, FOUR_LAYERS)
    assert [bh.is_routed(config, layer) for layer in range(4)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("given", "k"),
    [({"k": 3}, 3), ({"k": [3, 3, 3, 3]}, 3), ({"k": 3, "layers": [3, 2, 1, 0]}, 3),
     ({"k": [3, 3, 3, 2]}, None), ({"k": 3, "layers": "last 2"}, None),
     ({"k": 3, "renormalize": "sum"}, None)],
)  # fmt: skip
def test_what_is_a_point_of_the_static_curve(given, k):
    """Follows from what a configuration does: the same k in every layer, weights the model's own."""
    assert bh.static_k(bh.resolve_config("x", {"method": "topk", **given}, FOUR_LAYERS)) == k
    held = {"method": "bh", "min_k": 3, "max_k": 3}
    assert bh.static_k(bh.resolve_config("topk_3", held, FOUR_LAYERS)) is None


# ---------------------------------------------------------------------------------------------------------
# 5. Routers
# ---------------------------------------------------------------------------------------------------------

# Whatever a configuration has of these is set; the values fit together.
TINY = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token"), 4),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_layers"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 4), "topk_group": 3,
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "d_state"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_state", "ssm_state_size"), 8),
    "mamba_dt_rank": 8,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads"), 4),
    "mamba_n_heads": 4,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "pad_token_id"), 0),
    "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128, "mlp_only_layers": [],
    "mlp_layer_types": ["sparse", "sparse"], "layers_block_type": None, "bos_token_id": 1, "eos_token_id": 2,
    "enable_moe_block": True, "is_moe": True, "zero_expert_num": 2,
}  # fmt: skip
# What an architecture needs besides; None leaves a field as it is.
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EXTRAS = {
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_next", "kimi_linear", "bailing_hybrid"), HYBRID),
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_groups": 2,
        "expand": 1,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 16},
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "gemma4": {"vision_config": None, "audio_config": None},
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 24, "v_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "hunyuan_v1_moe": {"head_dim": 8},
    "longcat_flash": {"head_dim": 8},
    "phimoe": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["sliding_attention"] * 2,
        "head_dim": 16,
    },
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
}


def tiny_of(model_type, model_class):
    """A random model of an architecture, small enough to run in milliseconds."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    text_class = type(config_class().get_text_config())
    fields = TINY | EXTRAS.get(model_type, {})
    settings = {name: fields[name] for name in fields if name in dir(text_class) and fields[name] is not None}
    if config_class is text_class:
        config = config_class(**settings)
    else:
        config = config_class(text_config=settings, **EXTRAS.get(model_type, {}))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for layer in bh.find_moe_layers(model):
            # Gates that differ but are not saturated, biases and scales that change the order of the experts,
            # experts that matter.
            block = model.get_submodule(layer.name.rpartition(".")[0])
            for part in (*layer.router.parameters(), *layer.router.buffers(), *block.buffers(recurse=False)):
                if part.is_floating_point():
                    part.normal_(std=0.3) if part.ndim == 2 else part.uniform_(0.5, 1.5)
            for part in layer.experts.parameters():
                part.normal_(std=0.3)
    return model


class Architecture:
    """A tiny model of some architecture, and what the invariants of the seam are checked with."""

    def __init__(self, model):
        self.model = model
        self.ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
        self.before = logits_of(model, self.ids)
        self.layers = bh.find_moe_layers(model)
        self.own_k = self.layers[0].own_k
        self.can_widen = self.layers[0].knob is not None

    def logits_and_weights(self):
        """And the first router's weights [T, E]: a norm behind the experts can hide what scales them all."""
        outputs = []
        router = self.layers[0].router
        with router.register_forward_hook(lambda module, args, output: outputs.append(output)):
            logits = logits_of(self.model, self.ids)
        first, weights, indices = outputs[0]
        return logits, torch.zeros_like(first, dtype=weights.dtype).scatter(1, indices, weights)

    def routed(self, config, count):
        """The same under a configuration that keeps `count` experts."""
        with bh.patched_routing(self.model, config) as recorder:
            logits, weights = self.logits_and_weights()
        assert (recorder.total().counts[:, count] == self.ids.numel()).all(), "not that many experts ran"
        return logits, weights

    def native(self, k):
        """The same of the model itself with another K."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                if self.can_widen:
                    bh._replace(stack, *layer.knob, k)
                else:
                    stack.enter_context(zero_weights_beyond(k, layer))
            return self.logits_and_weights()

    def check_restored(self):
        assert torch.equal(logits_of(self.model, self.ids), self.before), "not restored"

    def check_keeping_all(self):
        for config in (fixed(self.own_k, self.own_k), {"method": "topk", "k": self.own_k}):
            assert torch.equal(self.routed(config, self.own_k)[0], self.before), "keeping all changes logits"

    def check_fixed_counts(self):
        """k of so many candidates is the model with that k."""
        own_k = self.own_k
        cases = [(k, own_k) for k in range(1, own_k)]  # experts are dropped
        if self.can_widen:
            cases += [(own_k, own_k + 2), (own_k + 1, own_k + 2)]
        for k, width in cases:
            about = f"{k} of {width}"
            routed, weights = self.routed(fixed(k, width), k)
            native, native_weights = self.native(k)
            error = (routed - native).abs().max()
            effect = (native - self.before).abs().max()
            assert error <= 1e-5 * native.abs().max(), f"{about} is not as native: {error:.1e}"
            assert torch.allclose(weights, native_weights, atol=1e-6), f"{about}: weights are not native"
            assert k == own_k or effect > 500 * error, f"{about} hardly matters: {effect:.1e}, {error:.1e}"

    def check_padding_and_generation(self):
        adaptive = {"method": "threshold", "threshold": 0.15, "min_k": 1, "max_k": self.own_k}
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])  # padded right, and left
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids = self.ids
        model = self.model
        with bh.patched_routing(model, adaptive) as recorder:
            recorder.start(rows=2)
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, position_ids=positions)
            for row, together in enumerate(recorder.statistics()):
                recorder.start()
                logits_of(model, ids[row : row + 1, mask[row].bool()])
                assert np.array_equal(recorder.total().use, together.use), "padding changes the routing"
            recorder.start()
            everything = torch.ones_like(ids)
            with torch.no_grad():
                out = model.generate(ids, attention_mask=everything, max_new_tokens=3, min_new_tokens=3)
            assert out.shape == (2, 10)
            counts = recorder.total().counts  # [L, E + 1]
        assert (counts.sum(1) == 2 * (7 + 2)).all()
        assert counts[:, : self.own_k].sum() > 0, "generate() drops nothing"


def zero_weights_beyond(k, layer):
    """A native reference for a router whose K is fixed: the model's own experts, weights beyond k are 0."""

    def hook(module, args, output):
        first, weights, indices = output
        return first, weights * (torch.arange(weights.shape[1]) < k), indices

    return layer.router.register_forward_hook(hook)


def check_architecture(model):
    """The invariants of the seam; AssertionError or UserError where one does not hold."""
    architecture = Architecture(model)
    architecture.check_keeping_all()
    architecture.check_restored()
    architecture.check_fixed_counts()
    architecture.check_restored()
    architecture.check_padding_and_generation()
    architecture.check_restored()


SAME_TRANSFORMERS = version("transformers").startswith(bh.VERIFIED_WITH)  # as the tables were made with


def declared_architectures():
    """(model type, class) for each causal language model that declares a router, one type a class."""
    by_class = {row["class"]: row["model type"].split(", ")[-1] for row in bh.list_architectures()}
    return [(model_type, name) for name, model_type in by_class.items()]


@pytest.mark.parametrize(("model_type", "model_class"), declared_architectures())
def test_architecture(model_type, model_class):
    """The table of --list-architectures is true: what is verified holds every invariant, the rest is refused
    in one line. With another transformers what cannot be built or patched is skipped; what can, must hold."""
    try:
        check_architecture(tiny_of(model_type, model_class))
        refusal = None
    except AssertionError:
        raise
    except Exception as error:
        if not SAME_TRANSFORMERS:
            pytest.skip(f"not with this transformers: {error}")
        if not isinstance(error, bh.UserError):
            raise
        refusal = str(error)
    if refusal:
        assert "cannot be patched" in refusal
        assert "\n" not in refusal
    if SAME_TRANSFORMERS:
        table = bh.REFUSED_ARCHITECTURES if refusal else bh.VERIFIED_ARCHITECTURES.split()
        assert model_type in table, refusal or "it holds every invariant"


def test_list_of_architectures(capsys):
    """At least 40 are verified, those that the manual promises among them; a refusal says why."""
    assert bh.main(["--list-architectures"]) == 0
    out = capsys.readouterr().out
    promised = ("olmoe", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3",
                "gpt_oss", "granitemoe", "phimoe", "glm4_moe", "ernie4_5_moe")  # fmt: skip
    assert set(promised) <= set(bh.VERIFIED_ARCHITECTURES.split())
    assert not set(bh.VERIFIED_ARCHITECTURES.split()) & set(bh.REFUSED_ARCHITECTURES)
    assert re.search(r"^\| olmoe \| OlmoeForCausalLM \| verified", out, re.M)
    assert re.search(r"^\| llama4, llama4_text \|.* refused \| its router", out, re.M)
    if SAME_TRANSFORMERS:
        assert out.count("| verified |") >= 40
        assert "not verified" not in out
    else:
        assert "| verified |" not in out


def tiny_olmoe(**settings):
    import transformers

    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "num_experts", "num_experts_per_tok", "pad_token_id")  # fmt: skip
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**{name: TINY[name] for name in fields} | settings)
    return transformers.OlmoeForCausalLM(config).eval()


def test_looking_leaves_a_model_as_it_was():
    """Training and evaluating parts stay what they were, nothing is left on any module or in the config."""

    def everything(model):
        keys = [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()]
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        return keys, hooks, model.config.to_dict()

    model = tiny_olmoe().train()
    model.model.layers[0].eval()
    before = everything(model)
    bh.find_moe_layers(model)
    assert everything(model) == before


@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("own_k", [2, 4])
@pytest.mark.parametrize("gate", [0.0, 1.0, 2000.0], ids=["silent", "usual", "saturated"])
def test_ties_and_saturation_are_no_reason_to_refuse(experts, own_k, gate):
    """A first token whose embedding is zero ties all experts; a steep gate leaves weights of exactly zero."""
    model = tiny_olmoe(num_experts=experts, num_experts_per_tok=own_k)
    with torch.no_grad():
        for layer in model.model.layers[:1]:
            layer.mlp.gate.weight.mul_(gate or 1)
        model.model.embed_tokens.weight[: 0 if gate else 2].zero_()
    layers = bh.find_moe_layers(model)
    for layer in layers:
        assert (layer.scaled_by, layer.is_ranked, layer.knob[1]) == (None, True, "top_k")


class Batched(MockRouter):
    def forward(self, hidden):
        logits, weights, indices = super().forward(hidden)
        return logits[None], weights, indices


class FixedK(MockRouter):
    def __init__(self, hidden, experts, top_k):
        super().__init__(hidden, experts, 1)
        self.top_k = None

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        return logits, *logits.softmax(-1).topk(1)


class ByIndex(MockRouter):
    def forward(self, hidden):
        logits, weights, indices = super().forward(hidden)
        order = indices.argsort(-1)
        return logits, weights.gather(1, order), indices.gather(1, order)


class Broken(MockRouter):
    def forward(self, hidden):
        raise IndexError("too far\n and a second line")


class Sharpened(MockRouter):
    """Weights that change with K in a way of their own."""

    def forward(self, hidden):
        logits, weights, indices = super().forward(hidden)
        return logits, weights ** (1 + 1 / self.top_k), indices


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            Batched,
            r"layers.2.gate \(Batched\) cannot be patched: it returns \[\(1, 8, 64\), \(8, 8\), \(8, 8\)\]",
        ),
        (FixedK, "it picks one expert"),
        (ByIndex, "in an order that cannot be told"),
        (Sharpened, "its weights at K = 4 do not follow from those at K = 8"),
        (Broken, r"MockMoE cannot read eight tokens \(IndexError: too far\)"),
        (None, "layers that differ in num_experts: \\[32, 64\\]"),
        ("top_k", "layers that differ in own_k: \\[4, 8\\]"),
    ],
)
def test_refusals_name_the_router_and_the_reason(router, message):
    """In one line, and before anything is patched."""
    model = MockMoE()
    block = model.layers[2]
    if isinstance(router, type):
        block.gate = router(128, 64, 8)
        model._can_record_outputs = {"router_logits": MockRouter}
    elif router == "top_k":
        block.gate.top_k = 4
    else:
        model.layers[2] = MockBlock(128, 32, 8)
    with pytest.raises(bh.UserError, match=message) as caught, bh.patched_routing(model, FLAT):
        pass
    assert "\n" not in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_offloaded_model(tiny_folder, tmp_path):
    """A model whose weights wait on the disk is patched, measured and restored like any other."""
    from accelerate import disk_offload
    from transformers import AutoModelForCausalLM

    ids = sample_ids(1, 8)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = logits_of(model, ids)
    with bh.patched_routing(model, fixed(2, 4)):
        dropped = logits_of(model, ids)
    disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    before = [layer.router.forward for layer in bh.find_moe_layers(model)]
    with bh.patched_routing(model, fixed(4, 4)):
        assert torch.equal(logits_of(model, ids), expected)
    with bh.patched_routing(model, fixed(2, 4)):
        assert torch.equal(logits_of(model, ids), dropped)
    assert [layer.router.forward for layer in bh.find_moe_layers(model)] == before
    assert torch.equal(logits_of(model, ids), expected)
    runner = bh.BHExperimentRunner("offloaded", tmp_path, model=model, tokenizer=byte_tokenizer())
    assert str(runner.device) == "cpu"
    assert runner.settings["model"]


# ---------------------------------------------------------------------------------------------------------
# 6. The seam
# ---------------------------------------------------------------------------------------------------------


def test_keeping_all_changes_nothing(subject):
    """A rule that keeps exactly the model's own experts gives bit-identical logits."""
    ids = sample_ids()
    k = subject.own_k
    expected = logits_of(subject.model, ids)
    configs = (fixed(k, k), {**FLAT, "alpha": 1.0, "max_k": k}, {"method": "topk", "k": k})
    for config in configs:
        with bh.patched_routing(subject.model, config) as recorder:
            assert torch.equal(logits_of(subject.model, ids), expected)
        assert recorder.total().counts[:, k].tolist() == [ids.numel()] * len(subject.layers)


@pytest.mark.parametrize("k", [1, 3])
def test_fixed_k_equals_native_model(subject, k):
    """`topk`, and BH held at k of more candidates, equal the model built with that k."""
    ids = sample_ids()
    native = logits_of(build(subject.kind, top_k=k), ids)
    with bh.patched_routing(subject.model, {"method": "topk", "k": k}):
        assert torch.equal(logits_of(subject.model, ids), native)
    for widest in (subject.own_k, subject.own_k + 3):
        with bh.patched_routing(subject.model, fixed(k, widest)) as recorder:
            torch.testing.assert_close(logits_of(subject.model, ids), native, rtol=1e-4, atol=2e-5)
        assert set(recorder.total().counts.sum(0).nonzero()[0]) == {k}
    assert not torch.allclose(logits_of(subject.model, ids), native, atol=1e-2)


def test_bfloat16_model():
    """The invariants hold in 16 bits: keeping all is bit-identical, a fixed count is the native model."""
    model, native = (build("olmoe-grouped_mm", top_k=k).bfloat16() for k in (4, 3))
    ids = sample_ids()
    expected = logits_of(model, ids)
    with bh.patched_routing(model, fixed(4, 4)):
        assert torch.equal(logits_of(model, ids), expected)
    with bh.patched_routing(model, fixed(3, 6)):
        dropped = logits_of(model, ids)
    assert dropped.dtype == torch.bfloat16
    torch.testing.assert_close(dropped, logits_of(native, ids), rtol=0.05, atol=0.05)
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("failure", [None, Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["inside", "in the experts"])
def test_restored_whatever_happens(subject, failure, where):
    """After leaving, by whatever way, the model is bit-identical and nothing is left on any instance."""
    ids = sample_ids()
    before = state_of(subject.model)
    expected = logits_of(subject.model, ids)
    by_layer = {"method": "topk", "k": [2, *[3] * (len(subject.layers) - 1)], "layers": "first 1"}
    for config in (FLAT, EMPIRICAL, {"method": "topk", "k": 2}, by_layer):
        last = subject.layers[-1].experts

        def fail(*_):
            raise failure

        def use(config=config, last=last, fail=fail):
            with bh.patched_routing(subject.model, config, subject.calibration):
                if failure and where == "in the experts":
                    with last.register_forward_pre_hook(fail):
                        logits_of(subject.model, ids)
                logits_of(subject.model, ids)
                if failure:
                    fail()

        if failure:
            with pytest.raises(failure):
                use()
        else:
            use()
        assert state_of(subject.model) == before
        assert torch.equal(logits_of(subject.model, ids), expected)


def test_dropped_experts_are_not_computed(subject, monkeypatch):
    """Only the kept (token, expert) pairs reach the model's experts; an instance forward is put back."""
    seen = []
    for layer in subject.layers:

        def counting(hidden, indices, weights, *args, original=layer.experts.forward, **kwargs):
            seen.append(indices.numel())
            return original(hidden, indices, weights, *args, **kwargs)

        monkeypatch.setitem(layer.experts.__dict__, "forward", counting)
    before = state_of(subject.model)
    seen.clear()  # `state_of` looks at the layers
    with bh.patched_routing(subject.model, EMPIRICAL, subject.calibration, subject.layers) as recorder:
        logits_of(subject.model, sample_ids())
    total = recorder.total()
    pairs = total.counts @ np.arange(total.counts.shape[1])
    assert seen == pairs.tolist() == total.use.sum(1).tolist()
    assert sum(seen) < sample_ids().numel() * 4 * len(subject.layers)
    assert state_of(subject.model) == before


def routed(subject, config, ids, mask=None):
    """Logits, and the number of experts of every token in every layer [L, B, S], under a configuration."""
    counts = []
    with bh.patched_routing(subject.model, config, subject.calibration), contextlib.ExitStack() as stack:
        for layer in subject.layers:
            hook = layer.router.register_forward_hook(lambda m, i, out: counts.append((out[1] != 0).sum(-1)))
            stack.enter_context(hook)
        logits = logits_of(subject.model, ids, mask)
    return logits, torch.stack(counts).view(len(counts), *ids.shape)


@pytest.mark.parametrize("config", [FLAT, EMPIRICAL], ids=["flat", "empirical"])
def test_batch_and_padding_do_not_matter(subject, config):
    """A prompt gets the same experts and logits alone and in a left-padded batch."""
    ids = sample_ids(3, 12)
    lengths = (12, 7, 4)
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    together, counts = routed(subject, config, ids * mask, mask)
    assert counts.unique().numel() > 1
    for row, length in enumerate(lengths):
        alone, own_counts = routed(subject, config, ids[row : row + 1, 12 - length :])
        assert torch.equal(own_counts[:, 0], counts[:, row, 12 - length :])
        torch.testing.assert_close(alone[0], together[row, 12 - length :], rtol=1e-3, atol=1e-4)


def test_generate_equals_stepwise_argmax(subject):
    """generate() under a configuration takes the same path as calling the patched model token by token."""
    from transformers import GenerationConfig

    ids = sample_ids(1, 6)
    settings = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with bh.patched_routing(subject.model, EMPIRICAL, subject.calibration) as recorder:
        made = subject.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        seen = recorder.total().counts.sum(1).tolist()
        for _ in range(8):
            ids = torch.cat([ids, logits_of(subject.model, ids)[:, -1:].argmax(-1)], dim=1)
    assert made.tolist() == ids.tolist()
    if subject.kind != "mock":  # with a cache every token but the last is routed once
        assert seen == [13] * len(subject.layers)


def test_shuffle_keeps_the_counts_and_moves_them(tiny):
    """A shuffled rule has the same histogram of counts in every layer, on other tokens."""
    ids = sample_ids(1, 60) % 250 + 1
    plain = RULES["top_p"]
    shuffled = RULES["top_p"] | {"shuffle": True}
    with bh.patched_routing(tiny.model, plain) as first:
        one = logits_of(tiny.model, ids)
    with bh.patched_routing(tiny.model, shuffled) as second:
        other = logits_of(tiny.model, ids)
    with bh.patched_routing(tiny.model, shuffled):
        assert torch.equal(logits_of(tiny.model, ids), other)
    assert np.array_equal(first.total().counts[0], second.total().counts[0])
    assert not torch.allclose(one, other)


WEIGHT_SUMS = bh.WEIGHTS_FIELD.allowed.removeprefix("one of ").split(", ")


@pytest.mark.parametrize(("kind", "own"), [("olmoe-eager", False), ("mixtral", True)])
def test_renormalize(kind, own):
    """What the kept weights sum to, as the experts get them, for models that do and do not renormalise."""
    model = build(kind)
    router = bh.find_moe_layers(model)[0].router

    def sums(config):
        seen = []
        with (
            bh.patched_routing(model, config),
            router.register_forward_hook(lambda m, a, out: seen.append(out[1])),
        ):
            logits_of(model, sample_ids() % 250 + 1)
        return seen[0].sum(-1)

    by_target = {t: sums({"method": "topk", "k": 2, "renormalize": t}) for t in WEIGHT_SUMS}
    torch.testing.assert_close(by_target["sum"], torch.ones_like(by_target["sum"]))
    torch.testing.assert_close(by_target["topk_mass"], sums({"method": "topk", "k": 4}))
    assert torch.allclose(by_target["model"], by_target["sum"]) == own
    assert (sums(fixed(2, 4) | {"renormalize": "none"}) < 0.999).all()


def test_patching_twice(subject):
    """A patched model is not patched again; one configuration after the other is fine."""
    ids = sample_ids()
    before = state_of(subject.model)
    with bh.patched_routing(subject.model, FLAT):
        first = logits_of(subject.model, ids)
        for other in (FLAT, {"method": "topk", "k": 2}):
            second = bh.patched_routing(subject.model, other)
            with pytest.raises(bh.UserError, match="patched already"), second:
                pass
        assert torch.equal(logits_of(subject.model, ids), first)
    with bh.patched_routing(subject.model, {"method": "topk", "k": 1}):
        assert not torch.equal(logits_of(subject.model, ids), first)
    with bh.patched_routing(subject.model, FLAT):
        assert torch.equal(logits_of(subject.model, ids), first)
    assert state_of(subject.model) == before


def test_apply_and_restore(mock_model, tmp_path):
    """A runner applies one configuration, replaces it by the next, and restores, twice if asked."""
    runner = mock_runner(mock_model, tmp_path)
    ids = sample_ids()
    before = state_of(mock_model)
    expected = logits_of(mock_model, ids)
    recorder = runner._patch_bh_routing(alpha=0.1, temperature=1.0, min_k=2, max_k=5)
    logits_of(mock_model, ids)
    assert set(recorder.total().counts.sum(0).nonzero()[0]) <= {2, 3, 4, 5}
    recorder = runner._apply_routing_config({"method": "topk", "k": 3})
    logits_of(mock_model, ids)
    assert recorder.total().counts.sum(0).nonzero()[0].tolist() == [3]
    for _ in range(2):
        runner._restore_original_routing()
        assert state_of(mock_model) == before
        assert torch.equal(logits_of(mock_model, ids), expected)


def test_training_flags_stay(tmp_path):
    """A model that partly trains is looked at, calibrated, patched and run in eval mode, and trains again."""

    def make():
        torch.manual_seed(0)
        model = MockMoE(top_k=4, layers=2, experts=16, hidden=32)
        model.head = nn.Sequential(model.head, nn.Dropout(0.5))
        return model

    def results_of(model, folder):
        runner = mock_runner(model, folder, seed=1)
        prompts = [{**PROMPTS[0], "reference": "and so they went"}, PROMPTS[1]]
        runner.run_full_experiment_suite({"topk_4": fixed(4, 4), "bh": EMPIRICAL}, prompts, 3)
        return runner.results

    expected = results_of(make().eval(), tmp_path / "eval")
    model = make().train()
    model.layers[1].eval()
    model.layers[1].norm.train()
    flags = [module.training for module in model.modules()]
    ids = sample_ids()

    def check():
        assert [module.training for module in model.modules()] == flags

    layers = bh.find_moe_layers(model)
    check()
    calibration = bh.calibrate(model, MockTokenizer())
    check()
    with bh.patched_routing(model, EMPIRICAL, calibration, layers):
        assert not any(module.training for module in model.modules())
        assert torch.equal(logits_of(model, ids), logits_of(model, ids))
    check()
    runner = mock_runner(model, tmp_path / "by hand")
    check()
    assert runner.generate("a small boat") == runner.generate("a small boat")
    check()
    runner._patch_bh_routing(0.05, 1.0, 1, 4)
    runner._restore_original_routing()
    check()
    rows = [runner.run_single_experiment("bh", EMPIRICAL, PROMPTS[0], 3) for _ in range(2)]
    assert rows[0]["generated_text"] == rows[1]["generated_text"]
    check()
    assert_same_results(results_of(model, tmp_path / "train"), expected)
    check()


def test_training_flags_stay_with_the_harness(tiny_folder):
    pytest.importorskip("lm_eval")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).train()
    bh.harness_model(model, byte_tokenizer(), 1)
    assert all(module.training for module in model.modules())


# Layers


def watching(layers, seen):
    """Keep the inputs and outputs of each router and experts module in `seen`, by kind and layer."""
    stack = contextlib.ExitStack()
    for layer in layers:
        for kind in ("router", "experts"):

            def keep(module, args, output, key=(kind, layer.index)):
                seen[key] = (args, output)

            stack.enter_context(getattr(layer, kind).register_forward_hook(keep))
    return stack


@pytest.mark.parametrize("picked", [(2, 3), (1,), (3, 0)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_some_layers_only(mock_model, mock_calibration, picked, shuffle):
    """Each patched layer uses the nulls and the shuffle of its own index; the others run as they are."""
    config = bh.resolve_config("x", {**EMPIRICAL, "max_k": 8, "shuffle": shuffle})
    ids = sample_ids(4, 20)
    layers = bh.find_moe_layers(mock_model)
    before = logits_of(mock_model, ids)
    seen = {}
    native = {}
    with watching(layers, native):
        logits_of(mock_model, ids)
    chosen = [layers[index] for index in picked]
    with bh.patched_routing(mock_model, config, mock_calibration, chosen) as recorder, watching(layers, seen):
        logits_of(mock_model, ids)
        for index, layer in enumerate(layers):
            for module in (layer.router, layer.experts):
                assert ("forward" in vars(module)) == (index in picked)
    assert torch.equal(logits_of(mock_model, ids), before)
    for row, index in enumerate(picked):
        logits, weights, _ = seen["router", index][1]
        count = counts_by(config, logits, mock_calibration.null(index, 1.0)).clamp(1, 8)
        if shuffle:
            count = count[torch.randperm(len(count), generator=torch.Generator().manual_seed(index))]
        assert torch.equal((weights != 0).sum(-1), count)
        assert recorder.total().counts[row].tolist() == torch.bincount(count, minlength=65).tolist()
        mean = recorder.summary()["avg_experts_per_token"].iloc[row]
        assert mean == pytest.approx(count.double().mean().item())
    assert recorder.summary().index.tolist() == list(picked)
    for index in range(min(picked)):  # what comes before the first patched layer saw the same
        for kind in ("router", "experts"):
            for found, expected in zip(seen[kind, index], native[kind, index], strict=True):
                assert all(map(torch.equal, found, expected))
    for index in set(range(len(layers))) - set(picked):  # the rest keeps all of the model's own choice
        assert (seen["router", index][1][1] != 0).all()
    with (
        pytest.raises(bh.UserError, match="layers is empty"),
        bh.patched_routing(mock_model, config, mock_calibration, []),
    ):
        pass


@pytest.mark.parametrize("chosen", ["last 2", [1], [0, 3]])
@pytest.mark.parametrize("given", [EMPIRICAL | {"max_k": 9}, RULES["top_p"], {"method": "topk", "k": 2}])
def test_layers_that_are_left_alone(mock_model, mock_calibration, chosen, given):
    """`layers` in a configuration is the same as patching these, bit for bit; the others are counted with
    the model's own K, and the shares of floor and cap are of the routed ones only."""
    layers = bh.find_moe_layers(mock_model)
    ids = sample_ids(3, 15)
    seen = {}
    native = {}
    config = bh.resolve_config("x", given | {"layers": chosen}, len(layers))
    picked = config["layers"]
    alone = sorted(set(range(len(layers))) - set(picked))
    with bh.patched_routing(mock_model, given, mock_calibration, [layers[i] for i in picked]) as only:
        expected = logits_of(mock_model, ids)
    with watching(layers, native):
        logits_of(mock_model, ids)
    with bh.patched_routing(mock_model, config, mock_calibration) as recorder, watching(layers, seen):
        assert torch.equal(logits_of(mock_model, ids), expected)
        assert not any("forward" in vars(layers[index].router) for index in alone)
        assert not any("forward" in vars(layers[index].experts) for index in alone)
    total = recorder.total()
    row = recorder.total().row()
    assert total.counts[alone, 8].tolist() == [ids.numel()] * len(alone)
    assert np.array_equal(total.counts[picked], only.total().counts)
    assert np.array_equal(total.use[picked], only.total().use)
    for name in ("floor_frac", "cap_frac", "zero_rejection_frac"):
        assert row[name] == only.total().row()[name]
        by_layer = recorder.summary()[name]
        assert by_layer.loc[alone].isna().all()
        pd.testing.assert_series_equal(by_layer.loc[picked], only.summary()[name])
    numbers = np.arange(65)
    assert row["avg_experts_per_token"] == pytest.approx((total.counts @ numbers).sum() / total.counts.sum())
    for index in range(min(picked)):  # before the first routed layer all is as it was
        for kind in ("router", "experts"):
            for found, own in zip(seen[kind, index], native[kind, index], strict=True):
                assert all(map(torch.equal, found, own))


def with_lists(config, num_layers):
    """A configuration, every number of which is another one in each layer; and the same layer by layer."""
    rule = bh.RULES[config["method"]]
    resolved = bh.resolve_config("x", config)
    lists = {}
    for field in rule.fields:
        value = resolved[field.name]
        if field.kind is float:
            lists[field.name] = [value * factor for factor in (1.0, 0.6, 0.8, 0.5)[:num_layers]]
    if rule.is_static:
        lists[rule.knob.name] = [2, 3, 1, 5][:num_layers]
    else:
        lists |= {"min_k": [1, 2, 1, 2][:num_layers], "max_k": [4, 3, 6, 2][:num_layers]}
    assert set(lists) == {field.name for field in rule.fields if field.varies_by_layer}
    listed = config | lists
    return listed, [bh.layer_config(listed, layer) for layer in range(num_layers)]


LISTED_RULES = {
    **{name: config for name, config in RULES.items() if name != "topk_4"},
    "empirical": {"method": "bh", "alpha": 0.2, "p_values": "empirical"},
    "shuffled": RULES["min_p"] | {"shuffle": True},
    "summed": RULES["top_p"] | {"renormalize": "sum"},
}


@pytest.mark.parametrize("name", LISTED_RULES)
def test_lists_equal_patching_each_layer_by_itself(subject, name):
    """Every number of every rule may be a list: bit for bit what each layer's own configuration gives."""
    if subject.kind in ("olmoe-grouped_mm", "olmoe-batched_mm"):
        pytest.skip("three kinds are enough")
    ids = sample_ids()
    listed, by_layer = with_lists(LISTED_RULES[name], len(subject.layers))
    with contextlib.ExitStack() as stack:
        alone = []
        for layer, config in zip(subject.layers, by_layer, strict=True):
            patch = bh.patched_routing(subject.model, config, subject.calibration, [layer])
            alone.append(stack.enter_context(patch))
        expected = logits_of(subject.model, ids)
    with bh.patched_routing(subject.model, listed, subject.calibration) as recorder:
        assert torch.equal(logits_of(subject.model, ids), expected)
    for layer, one in enumerate(alone):
        assert np.array_equal(recorder.total().counts[layer], one.total().counts[0])
        assert np.array_equal(recorder.total().use[layer], one.total().use[0])
        pd.testing.assert_frame_equal(recorder.summary().loc[[layer]], one.summary())


def test_lists_that_are_constant_change_nothing(subject):
    """They are the same configuration as the number, bit for bit."""
    ids = sample_ids()
    number = len(subject.layers)
    for config in ({"method": "topk", "k": 3}, RULES["top_p"], RULES["bh"]):
        with bh.patched_routing(subject.model, config) as recorder:
            expected = logits_of(subject.model, ids)
        fields = bh.RULES[config["method"]].fields
        resolved = bh.resolve_config("x", config)
        lists = {field.name: [resolved[field.name]] * number for field in fields if field.varies_by_layer}
        with bh.patched_routing(subject.model, resolved | lists) as again:
            assert torch.equal(logits_of(subject.model, ids), expected)
        assert again.total().row() == recorder.total().row()


def native_by_layer(kind, widths):
    """A model whose layers have these K, made without any patch."""
    model = build(kind)
    routers = [layer.router for layer in bh.find_moe_layers(model)]
    for router, width in zip(routers, widths, strict=True):
        router.top_k = width
    return model


def test_a_k_for_each_layer_equals_the_native_model(subject):
    """`topk` with a list is bit for bit the model whose layers have these K; dropping to them comes close."""
    ids = sample_ids()
    number = len(subject.layers)
    before = logits_of(subject.model, ids)
    for widths in ([3, 1, 2, 5][:number], [1, 6, 4, 4][:number]):
        native = logits_of(native_by_layer(subject.kind, widths), ids)
        with bh.patched_routing(subject.model, {"method": "topk", "k": widths}) as recorder:
            assert torch.equal(logits_of(subject.model, ids), native)
        assert recorder.total().counts.nonzero()[1].tolist() == widths
        held = fixed(widths, [width + 1 + layer for layer, width in enumerate(widths)])
        with bh.patched_routing(subject.model, held):
            torch.testing.assert_close(logits_of(subject.model, ids), native, rtol=1e-4, atol=2e-5)
        assert not torch.allclose(native, before, atol=1e-2)


def test_static_k_by_layer_is_a_configuration_like_any_other(tiny, tmp_path, monkeypatch):
    """It is run, resumed, compared at equal compute and reported; it is no point of the static curve."""
    only_plots(monkeypatch)
    configs = {"topk_4": RULES["topk_4"], "by_layer": {"method": "topk", "k": [1, 3]},
               "half": {"method": "topk", "k": 2, "layers": "last 1"}}  # fmt: skip
    prompts = bh.TEST_PROMPTS[:3]
    for _ in range(2):  # the second time all is finished already
        runner = bh.BHExperimentRunner("tiny", tmp_path, model=tiny.model, tokenizer=tiny.tokenizer)
        frame = runner.run_full_experiment_suite(configs, prompts, 3)
    for rows in (frame, runner.results.scores):
        means = rows.groupby("config_name")["avg_experts_per_token"].agg(["min", "max"])
        assert means.loc["by_layer"].tolist() == [2, 2]
        assert means.loc["half"].tolist() == [3, 3]
        assert rows.loc[rows["config_name"] == "by_layer", "floor_frac"].isna().all()
    bh.write_report(frame, tmp_path)
    verdict = strict_loads((tmp_path / "analysis_summary.json").read_text())["verdict"]
    assert verdict["by_layer"]["mean_experts"] == 2
    assert verdict["half"]["mean_experts"] == 3
    assert (verdict["topk_4"]["verdict"], verdict["by_layer"]["verdict"] is None) == (None, False)
    assert re.search(r"by_layer.*\\?\[1, 3\\?\]", (tmp_path / "REPORT.md").read_text())
    changed = configs | {"by_layer": {"method": "topk", "k": [3, 1]}}
    with pytest.raises(bh.UserError, match=r"k = \[1, 3\], now it is \[3, 1\]"):
        runner.run_full_experiment_suite(changed, prompts, 3)


def test_floor_and_cap_are_those_of_each_layer(mock_model):
    """Where they differ between layers, the shares count each layer by its own."""
    config = {"method": "threshold", "threshold": 0.9, "min_k": [1, 2, 3, 4], "max_k": [5, 5, 5, 4]}
    with bh.patched_routing(mock_model, config) as recorder:
        logits_of(mock_model, sample_ids())
    counts = recorder.total().counts
    at_floor = [counts[layer, floor] for layer, floor in enumerate(config["min_k"])]
    at_cap = [counts[layer, cap] for layer, cap in enumerate(config["max_k"])]
    row = recorder.total().row()
    assert row["floor_frac"] == sum(at_floor) / counts.sum() > 0.9
    assert row["cap_frac"] == sum(at_cap) / counts.sum() >= 0.25
    assert (row["min_experts"], row["zero_rejection_frac"]) == (1, pytest.approx(1, abs=0.1))


# A K that layers share


class SharedRouter(MockRouter):
    """Its K is in an object that it has in common with the other layers."""

    def __init__(self, config):
        super().__init__(128, 64, None)
        self.config = config

    def forward(self, hidden):
        logits = hidden @ self.weight.T
        weights, indices = logits.softmax(-1).topk(self.config.num_experts_per_tok)
        return logits, weights, indices


def model_that_shares_k(kind):
    """A model whose routers read their K from one object."""
    if kind == "mock":
        model = build("mock")
        config = SimpleNamespace(num_experts_per_tok=8)
        for block in model.layers:
            weight = block.gate.weight
            block.gate = SharedRouter(config)
            block.gate.weight = weight
        return model
    if not SAME_TRANSFORMERS:
        pytest.skip("not known of this transformers")
    return tiny_of("gemma4_text", "Gemma4ForCausalLM")


def with_k_by_layer(model, widths):
    """Inside the block each layer reads its own K, without any patch of the script."""
    stack = contextlib.ExitStack()
    for layer, width in zip(bh.find_moe_layers(model), widths, strict=True):
        owner, name = layer.knob
        own = getattr(owner, name)

        def before(module, args, owner=owner, name=name, width=width):
            setattr(owner, name, width)

        def after(module, args, output, owner=owner, name=name, own=own):
            setattr(owner, name, own)

        stack.enter_context(layer.router.register_forward_pre_hook(before))
        stack.enter_context(layer.router.register_forward_hook(after))
    return stack


@pytest.fixture(scope="module", params=["mock", "gemma4_text"])
def sharing(request):
    """A model whose layers share what sets their K, its layers and what it reads here."""
    model = model_that_shares_k(request.param)
    layers = bh.find_moe_layers(model)
    assert len({layer.knob_id for layer in layers}) == 1
    return SimpleNamespace(model=model, layers=layers, own_k=layers[0].own_k, ids=sample_ids() % 90)


def test_a_shared_k_by_layer_equals_the_native_model(sharing):
    """The widest is asked for and the rest dropped, to what each layer alone would do."""
    ids = sharing.ids
    number = len(sharing.layers)
    expected = logits_of(sharing.model, ids)
    for widths in ([1, 3, 2, 5][:number], [4, 2, 6, 1][:number], [2] * number):
        with with_k_by_layer(sharing.model, widths):
            native = logits_of(sharing.model, ids)
        assert torch.equal(logits_of(sharing.model, ids), expected)
        for config in ({"method": "topk", "k": widths}, fixed(widths, [width + 1 for width in widths])):
            with bh.patched_routing(sharing.model, config) as recorder:
                torch.testing.assert_close(logits_of(sharing.model, ids), native, rtol=1e-4, atol=1e-5)
            assert recorder.total().counts.nonzero()[1].tolist() == widths
        assert not torch.allclose(native, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(logits_of(sharing.model, ids), expected)


@pytest.mark.parametrize("config", [{"method": "topk", "k": 1}, {"method": "topk", "k": 6}, RULES["min_p"]])
def test_a_shared_k_leaves_other_layers_alone(sharing, config):
    """Whether they are left out by the configuration or by the call: they keep the model's own K."""
    ids = sharing.ids
    number = len(sharing.layers)
    seen = {}
    last = sharing.layers[-1]
    with bh.patched_routing(sharing.model, config | {"layers": [last.index]}) as recorder:
        by_configuration = logits_of(sharing.model, ids)
    counts = recorder.total().counts
    assert counts[:-1, sharing.own_k].tolist() == [ids.numel()] * (number - 1)
    with bh.patched_routing(sharing.model, config, layers=[last]) as only, watching(sharing.layers, seen):
        by_call = logits_of(sharing.model, ids)
    torch.testing.assert_close(by_call, by_configuration, rtol=1e-5, atol=1e-6)
    assert np.array_equal(only.total().counts, counts[-1:])
    for layer in sharing.layers[:-1]:
        assert ((seen["router", layer.index][1][1] != 0).sum(-1) == sharing.own_k).all()
    assert [getattr(*layer.knob) for layer in sharing.layers] == [sharing.own_k] * number
    assert not any("forward" in vars(layer.router) for layer in sharing.layers)


# The recorder

HOT = {**EMPIRICAL, "temperature": 2.0, "min_k": 2, "alpha": 0.02}


def slow_reference(subject, config, taken):
    """From router logits, layer after layer and call after call, to p-values to ranks, in plain loops."""
    layers = len(subject.layers)
    experts = subject.layers[0].num_experts
    reference = SimpleNamespace(
        counts=np.zeros((layers, experts + 1), int), use=np.zeros((layers, experts), int),
        numbers=[], nothing=0, mass=[],
    )  # fmt: skip
    for call, logits in enumerate(taken):
        layer = call % layers
        temperature = config["temperature"]
        empirical = config["p_values"] == "empirical"
        null = subject.calibration.null(layer, temperature) if empirical else bh.FlatNull(experts)
        p = null.p_values(bh.gate_scores(logits, temperature)).numpy()
        for token in range(len(logits)):
            rejected = int((stats.false_discovery_control(p[token]) <= config["alpha"]).sum())
            number = min(max(rejected, config["min_k"]), config["max_k"])
            reference.counts[layer, number] += 1
            kept = logits[token].argsort(descending=True)[:number]
            reference.use[layer, kept.numpy()] += 1
            reference.mass.append(logits[token].softmax(-1)[kept].sum().item())
            reference.numbers.append(number)
            reference.nothing += rejected == 0
    return reference


@pytest.mark.parametrize("config", [FLAT, EMPIRICAL, HOT], ids=["flat", "empirical", "hot"])
def test_recorder_equals_reference(subject, config):
    """Counts, use and summary equal a slow loop from router logits to p-values to ranks."""
    taken = []
    patch = bh.patched_routing(subject.model, config, subject.calibration)
    with patch as recorder, contextlib.ExitStack() as stack:
        for layer in subject.layers:
            stack.enter_context(layer.router.register_forward_hook(lambda m, i, out: taken.append(out[0])))
        logits_of(subject.model, sample_ids())
        logits_of(subject.model, sample_ids(1, 5))
    reference = slow_reference(subject, config, taken)
    use = reference.use
    numbers = np.array(reference.numbers)
    assert recorder.total().counts.tolist() == reference.counts.tolist()
    assert recorder.total().use.tolist() == use.tolist()
    summary = recorder.total().row()
    assert summary == pytest.approx({
        "avg_experts_per_token": numbers.mean(), "effective_experts": numbers.mean(),
        "std_experts_per_token": numbers.std(),
        "min_experts": numbers.min(), "max_experts": numbers.max(),
        "expert_utilization_cv": np.mean(use.std(1) / use.mean(1)),
        "expert_utilization_max_min_ratio": np.mean(use.max(1) / use.min(1).clip(1)),
        "floor_frac": np.mean(numbers == config["min_k"]), "cap_frac": np.mean(numbers == config["max_k"]),
        "zero_rejection_frac": reference.nothing / len(numbers), "gate_mass_frac": np.mean(reference.mass),
    })  # fmt: skip
    assert list(summary) == [column.name for column in bh.ROUTING_COLUMNS]
    assert numbers.min() < numbers.max()


def test_padding_is_not_counted(subject):
    """A left-padded batch gives the statistics of its rows one by one."""
    ids = sample_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    config = {**FLAT, "alpha": 0.9}
    if subject.kind == "mock":
        pytest.skip("the mock takes no positions")
    with bh.patched_routing(subject.model, config) as recorder:
        recorder.start(rows=2)
        logits_of(subject.model, ids, mask)
        rows = recorder.statistics()
    lengths = [[6] * len(subject.layers), [10] * len(subject.layers)]
    assert [row.counts.sum(1).tolist() for row in rows] == lengths
    with bh.patched_routing(subject.model, config) as recorder:
        logits_of(subject.model, ids[:1, 4:])
    assert np.array_equal(recorder.total().counts, rows[0].counts)


SUMS = ("counts", "use", "unchosen", "mass")


def assert_same_sums(left, right):
    for name in SUMS:
        assert np.array_equal(getattr(left, name), getattr(right, name)), name
    assert left.layers == right.layers


def test_recorder_forgets_nothing_between_sums(mock_model, monkeypatch):
    """However often it takes its sums, and however it is called, they are the same."""
    ids = sample_ids(1, 6)
    seen = []
    for calls in (1, 3, 256):
        monkeypatch.setattr(bh.RoutingRecorder, "MAX_CALLS", calls)
        with bh.patched_routing(mock_model, FLAT) as recorder:
            for _ in range(5):
                logits_of(mock_model, ids)
            hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
            mock_model.layers[1].gate(hidden)  # a router by itself
        seen.append(recorder.total())
    for other in seen[1:]:
        assert_same_sums(seen[0], other)
    assert {field.name for field in dataclasses.fields(seen[0])} == {*SUMS, "config", "layers"}
    assert seen[0].counts.sum(1).tolist() == [30, 33, 30, 30]


def test_statistics_add_up_and_are_kept_as_text(mock_model):
    """Those of two texts add up to those of both, and what was packed is unpacked."""
    ids = sample_ids(2, 6)
    with bh.patched_routing(mock_model, FLAT) as recorder:
        recorder.start(rows=2)
        logits_of(mock_model, ids)
        first, second = recorder.statistics()
        total = recorder.total()
    assert_same_sums(first + second, total)
    assert not np.array_equal(first.counts, second.counts)
    again = bh.RoutingStatistics.unpack(total.pack(), total.config, total.layers)
    assert_same_sums(again, total)
    assert again.row() == total.row()
    assert again.counts.shape == (4, 65)
    nothing = bh.RoutingRecorder(bh.find_moe_layers(mock_model), total.config).total()
    assert nothing.row() == {column.name: None for column in bh.ROUTING_COLUMNS}
    assert len(nothing.by_layer()) == 0
    assert list(total.by_layer()) == [column.name for column in bh.LAYER_COLUMNS]


# Threads and interruptions

LINES = 3 * int(os.environ.get("BH_KILLS", 4))  # of the script, to be interrupted at


def test_two_threads(mock_model):
    """While one thread has a model patched, another cannot patch it; afterwards it can."""
    before = state_of(mock_model)
    refused = []

    def other():
        try:
            with bh.patched_routing(mock_model, FLAT):
                pass
        except bh.UserError as error:
            refused.append(str(error))

    def in_threads(number):
        threads = [threading.Thread(target=other) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with bh.patched_routing(mock_model, FLAT):
        in_threads(4)
    assert len(refused) == 4
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):  # all at once: they look at the model and patch it in turn
            in_threads(4)
            assert state_of(mock_model) == before
    finally:
        sys.setswitchinterval(usual)
    assert all("patched already" in message for message in refused)


@pytest.mark.parametrize("config", [FLAT, {"method": "topk", "k": [1, 9, 2, 8], "layers": [0, 1]}])
def test_interrupted_at_any_line(mock_model, config):
    """Ctrl-C at any line of the script, patching and putting back included, leaves nothing behind."""
    layers = bh.find_moe_layers(mock_model)
    before = state_of(mock_model)
    ids = sample_ids(1, 3)
    expected = logits_of(mock_model, ids)
    lines = [0, 0]
    random = np.random.default_rng(0)
    heads = {
        line
        for node in ast.walk(TREE)
        if isinstance(node, ast.With)
        for line in range(node.lineno, node.body[0].lineno)
    }
    entered = collections.defaultdict(set)  # frame -> heads of `with` that it has been at

    def trace(frame, event, argument):
        if frame.f_code.co_filename != bh.__file__:
            return None
        # At its end a `with` is at its head again. There no signal is looked for before its exit is called.
        ends_with = event == "line" and frame.f_lineno in entered[frame]
        if event == "line" and frame.f_lineno in heads:
            entered[frame].add(frame.f_lineno)
        lines[0] += event == "line" and not ends_with
        if event == "line" and not ends_with and lines[0] == lines[1]:
            raise KeyboardInterrupt
        return trace

    def use(stop, given):
        lines[:] = [0, stop]
        entered.clear()
        traced = sys.gettrace()
        sys.settrace(trace)
        try:
            with bh.patched_routing(mock_model, config, layers=given):
                logits_of(mock_model, ids)
        finally:
            sys.settrace(traced)
        return lines[0]

    for chosen in (layers, None):
        use(0, chosen)  # what is computed once and kept has more lines
        for stop in random.choice(use(0, chosen), LINES, replace=False) + 1:
            with pytest.raises(KeyboardInterrupt):
                use(stop, chosen)
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in mock_model.modules()), stop
            assert state_of(mock_model) == before, stop
            assert torch.equal(logits_of(mock_model, ids), expected), stop


# ---------------------------------------------------------------------------------------------------------
# 7. Calibration
# ---------------------------------------------------------------------------------------------------------


def test_calibration(subject, tmp_path):
    """From the unpatched routers with a fixed seed, first positions left out, global randomness untouched."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = bh.calibrate(subject.model, subject.tokenizer, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    experts = subject.layers[0].num_experts
    assert again.logits.shape == (len(subject.layers), 6 * 23, experts)
    torch.testing.assert_close(again.logits, subject.calibration.logits, rtol=1e-3, atol=1e-3)
    best = again.logits.topk(subject.own_k).indices.sort().values
    assert torch.equal(again.own.long().sort().values, best)
    assert again.null(0, 1.0).n0 == 6 * 23 * (experts - subject.own_k)
    other = bh.calibrate(subject.model, subject.tokenizer, seed=1)
    assert not torch.equal(other.logits, again.logits)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    from_file = bh.calibrate(subject.model, subject.tokenizer, text=text)
    assert from_file.logits.shape[1] % 23 == 0
    text.write_text("too short")
    with pytest.raises(bh.UserError, match="24"):
        bh.calibrate(subject.model, subject.tokenizer, text=text)


def test_calibration_cache(mock_model, tmp_path, monkeypatch, caplog):
    """Calibration is read back by the next runner, made again when damaged or made from something else."""
    first = mock_runner(mock_model, tmp_path).calibration
    made = []
    monkeypatch.setattr(
        bh, "calibrate", lambda *args, real=bh.calibrate, **more: made.append(1) or real(*args, **more)
    )
    assert torch.equal(mock_runner(mock_model, tmp_path).calibration.logits, first.logits)
    assert not made
    (tmp_path / "calibration.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(mock_runner(mock_model, tmp_path).calibration.logits, first.logits)
    assert "calibrating again" in caplog.text
    assert not torch.equal(mock_runner(mock_model, tmp_path, seed=1).calibration.logits, first.logits)
    assert len(made) == 2


HOSTILE_GENERATION = {
    "temperature": 0.1, "top_p": 0.2, "min_p": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05, "top_h": 0.3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3,
    "bad_words_ids": [[token] for token in range(40, 80)], "suppress_tokens": list(range(100, 200)),
    "begin_suppress_tokens": list(range(1, 250)), "forced_bos_token_id": 7, "forced_eos_token_id": 9,
    "sequence_bias": [[[5], 50.0]], "exponential_decay_length_penalty": (1, 9.0), "num_return_sequences": 2,
    "max_time": 1e-9, "guidance_scale": 3.0, "prompt_lookup_num_tokens": 3, "remove_invalid_values": True,
    "renormalize_logits": True, "watermarking_config": {"bias": 20.0}, "cache_implementation": "static",
    "use_cache": False, "output_scores": True, "return_dict_in_generate": True, "stop_strings": ["a"],
    "max_length": 3, "min_length": 600, "an_entry_of_its_own": 1,
}  # fmt: skip


def texts_of(greedy, sampling):
    """Calibration text, greedy text and sampled text of the model of two runners."""
    texts = [runner.generate("a small boat on the river", 24) for runner in (greedy, sampling)]
    return [*texts, bh.sample_calibration_text(greedy.model, greedy.tokenizer, 3).tolist()]


def test_the_models_own_generation_settings_do_not_matter(tmp_path):
    """Neither each by itself nor many at once changes a text; afterwards they are there again."""
    model = build("olmoe-eager")
    usual = model.generation_config
    ready = {"model": model, "tokenizer": byte_tokenizer()}
    runners = [
        bh.BHExperimentRunner("x", tmp_path, **ready, sampling=sampling)
        for sampling in (None, {"temperature": 1.5})
    ]
    expected = texts_of(*runners)
    together = ("temperature", "top_p", "min_p", "repetition_penalty", "bad_words_ids", "num_beams")
    cases = [{name: value} for name, value in HOSTILE_GENERATION.items()]
    for case in [*cases, {name: HOSTILE_GENERATION[name] for name in together}]:
        hostile = model.generation_config = copy.deepcopy(usual)
        vars(hostile).update(case)
        assert texts_of(*runners) == expected, case
        assert model.generation_config is hostile
        assert vars(hostile) == {**vars(usual), **case}


def test_special_tokens_come_from_the_model_where_the_tokenizer_has_none():
    model = build("olmoe-eager")
    model.generation_config.update(eos_token_id=[5, 6], pad_token_id=8, bos_token_id=7, top_k=3)
    with bh.writing_plainly(model):
        inside = model.generation_config
        assert [inside.eos_token_id, inside.pad_token_id, inside.bos_token_id] == [[5, 6], 8, 7]
        assert inside.top_k is None
    assert model.generation_config.top_k == 3


def test_text_shared_with_calibration_is_counted(tiny_folder, tmp_path, caplog):
    """Tokens that are diagnosed and were calibrated on are counted and told; others are not."""
    letters = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes().decode()
    one = tmp_path / "one.txt"
    other = tmp_path / "other.txt"
    one.write_text(letters[:2000])
    other.write_text(letters[2000:])

    def diagnosed(text, calibration_text, window):
        folder = tmp_path / f"{text.stem}-{calibration_text and calibration_text.stem}"
        runner = bh.BHExperimentRunner(str(tiny_folder), folder, calibration_text=calibration_text)
        with caplog.at_level("WARNING"):
            caplog.clear()
            return runner.diagnose(bh.text_windows([text], runner.tokenizer, window))

    length, sequences = (CALIBRATION[f"CALIBRATION_{name}"] for name in ("LENGTH", "SEQUENCES"))
    shared = diagnosed(one, one, 500)
    assert sequences * length * 0.9 < shared["n_shared_tokens"] <= sequences * length
    assert f"{shared['n_shared_tokens']} of the {shared['n_tokens']} tokens" in caplog.text
    assert diagnosed(one, one, 8)["n_shared_tokens"] > 0  # windows shorter than a run
    for calibration_text in (other, None):
        assert diagnosed(one, calibration_text, 500)["n_shared_tokens"] == 0
        assert "shares text" not in caplog.text
    saved = json.loads((tmp_path / "one-one" / "null_diagnostics.json").read_text())
    assert saved["n_shared_tokens"] > 0


def mean_by(config, calibration):
    """How many experts a configuration keeps of the calibration text, on average over tokens and layers."""
    means = []
    for index, logits in enumerate(calibration.logits):
        settings = bh.layer_config(config, index)
        null = bh.layer_null(settings, index, logits.shape[1], calibration)
        own_k = calibration.own.shape[-1]
        norms = None if calibration.norms is None else calibration.relative_norms(index)
        counts = counts_by(settings, logits, null, own_k, norms).clamp(*bh.count_bounds(settings))
        means.append(counts.double().mean())
    return torch.stack(means).mean().item()


TARGETS = {"by": 1.4, "bh": 1.9}  # 2.5 for the others


@pytest.mark.parametrize("name", [name for name in ADAPTIVE_RULES if not bh.RULES[name].uses_outputs])
def test_match_experts(tiny, name):
    """Every adaptive rule reaches the asked-for mean on the calibration text."""
    given = RULES.get(name, {"method": name, "max_k": 4})
    target = TARGETS.get(name, 2.5)
    calibration = tiny.calibration_for([bh.resolve_config(name, given)]) or tiny.calibration
    if name == "hc":  # its knob is a share of 16 ranks, so it jumps: to one of the means that it has
        target = mean_by(bh.resolve_config(name, given | {"ranks": 0.5}), calibration)
    config = bh.match_experts(name, given, target, calibration)
    assert mean_by(config, calibration) == pytest.approx(target, abs=0.06)
    before = bh.resolve_config(name, given)
    assert [field for field in config if config[field] != before[field]] == [bh.RULES[name].knob.name]


def test_match_experts_says_what_it_can_reach(tiny):
    with pytest.raises(bh.UserError, match="bh can keep .* to 4.00 experts"):
        bh.match_experts("bh", RULES["bh"], 6, tiny.calibration)
    with pytest.raises(bh.UserError, match="jumps over it"):
        bh.match_experts("bh", RULES["bh"], 3, tiny.calibration)
    assert bh.match_experts("topk_2", RULES["topk_2"], 6, tiny.calibration)["k"] == 2


def test_match_experts_with_lists_and_layers(tiny):
    """One knob for all routed layers; those left alone count with the model's own K."""
    listed = RULES["top_p"] | {"max_k": [3, 6], "temperature": [1.0, 0.5], "p": [0.2, 0.9]}
    config = bh.match_experts("x", listed, 2.2, tiny.calibration)
    assert isinstance(config["p"], float)
    assert config["max_k"] == [3, 6]
    assert mean_by(config, tiny.calibration) == pytest.approx(2.2, abs=0.06)
    config = bh.match_experts("x", RULES["top_p"] | {"layers": [1]}, 3.0, tiny.calibration)
    by_one = bh.layer_config(config, 1)
    counts = counts_by(by_one, tiny.calibration.logits[1]).clamp(1, 4).double().mean().item()
    assert (counts + 4) / 2 == pytest.approx(3.0, abs=0.06)
    with pytest.raises(bh.UserError, match=r"can keep 2\.50 to 4\.00"):
        bh.match_experts("x", RULES["top_p"] | {"layers": [1]}, 2.0, tiny.calibration)


def test_each_knob_is_searched_where_its_rule_says(tiny, monkeypatch):
    """--match-experts finds a value inside the range of the knob, and says what that range can reach."""
    wide = {"method": "top_p", "max_k": 16}
    usual = bh.match_experts("top_p", wide, 2.0, tiny.calibration)["p"]

    def matched_between(*search):
        monkeypatch.setitem(bh.RULES, "top_p", dataclasses.replace(bh.RULES["top_p"], search=search))
        return bh.match_experts("top_p", wide, 2.0, tiny.calibration)["p"]

    for search in ((usual / 2, 1.0), (1e-3, usual * 1.1)):
        assert matched_between(*search) == pytest.approx(usual, rel=0.02)
    for search in ((usual * 1.1, 1.0), (1e-3, usual / 1.1)):
        with pytest.raises(bh.UserError, match="can keep"):
            matched_between(*search)


def test_diagnosed_nulls(tiny):
    """On the calibration text itself the empirical null is uniform and its FDP is at most about alpha."""
    report = bh.diagnose_nulls(tiny.calibration, tiny.calibration)
    assert max(report["nulls"]["empirical"]["ks"]) < 0.01
    for row in report["nulls"]["empirical"]["alphas"]:
        assert row["realised_fdp"] <= row["alpha"] * 1.1 + 0.01
    assert [row["alpha"] for row in report["nulls"]["empirical"]["alphas"]] == list(bh.DIAGNOSED_ALPHAS)
    assert max(report["nulls"]["flat"]["ks"]) > 0.1
    import matplotlib

    matplotlib.use("Agg")
    left, right = bh.plot_null_calibration(report)
    layers = [line for null in report["nulls"].values() for line in null["layers"]]
    assert len(left.get_lines()) == len(layers) + 1
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["empirical", "flat", "alpha"]


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_realised_false_discoveries_against_a_loop(alpha):
    """Rejections, the share of them that is null, and whether there is none: of each token."""
    random = np.random.default_rng(0)
    p_values = random.uniform(size=(200, 16)) ** random.uniform(0.3, 6, size=(200, 1))
    outside = random.uniform(size=(200, 16)) < 0.7
    realised = bh._realised(torch.tensor(p_values), torch.tensor(outside), alpha)
    for token in range(200):
        rejected = stats.false_discovery_control(p_values[token]) <= alpha
        false = (rejected & outside[token]).sum()
        expected = [rejected.sum(), false / max(rejected.sum(), 1), float(not rejected.any())]
        assert realised[:, token].tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------
# 8. Tables
# ---------------------------------------------------------------------------------------------------------

SCORED_PROMPTS = [
    {**prompt, "reference": f"and {word} on the way home"}
    for prompt, word in zip(PROMPTS, ("snow", "rain", "sun"), strict=True)
]
TOP_8 = {"topk_8": {"method": "topk", "k": 8}}


def text_item(name, ids, document="file"):
    """A window as `text_windows` cuts it."""
    inputs = {"token_ids": bh.fingerprint(list(ids)), "document": bh.fingerprint(document)}
    return bh.TextItem(name, document, "text", np.array(ids, dtype=np.int32), 1, 4 * len(ids), inputs)


WINDOWS = [text_item(f"w{n}", range(6 + n, 18 + n)) for n in range(3)]


def run_suite(model, folder, configs=CONFIGS, prompts=SCORED_PROMPTS, tokens=2, **options):
    """Run a suite of the mock model; returns its three tables."""
    runner = mock_runner(model, folder)
    runner.run_full_experiment_suite(configs, prompts, tokens, **options)
    return runner.results


def cells_of(path):
    """Header and rows of a CSV as a plain reader sees them."""
    csv.field_size_limit(10**8)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return rows[0], rows[1:]


@pytest.fixture(scope="module")
def folders_of_tables(mock_model, task_run, tmp_path_factory):
    """A run with prompts, references and windows, in which a prompt fails; and a run of tasks."""
    folder = tmp_path_factory.mktemp("tables")
    runner = mock_runner(mock_model, folder, sampling={"temperature": 1.5}, command="run")
    prompts = [*SCORED_PROMPTS, {"id": "again", "text": "a boat again", "category": "plain"}]
    prompts += [{"id": "other", "text": "another word", "category": "awkward"}]
    long = {"id": "long", "text": "word " * 300, "category": "plain", "reference": "and more"}
    configs = CONFIGS | {"bh": EMPIRICAL}
    options = {"texts": WINDOWS, "num_samples": 2}
    runner.run_full_experiment_suite(configs, [*prompts, long], 2, **options)
    runner.run_full_experiment_suite(configs, prompts, 2, generate_batch=2, **options)
    shutil.copytree(folder, folder / "without failure")
    runner.run_full_experiment_suite(configs, [*prompts, long], 2, generate_batch=6, **options)
    return folder, folder / "without failure", task_run[1]


@pytest.mark.parametrize("table", bh.TABLES, ids=lambda table: table.file)
def test_tables_have_their_declared_columns_and_types(table, folders_of_tables):
    """Exactly its own columns, in order; each cell as its column declares; none that is never filled."""
    filled = set()
    for folder in folders_of_tables:
        if not (folder / table.file).exists():
            continue
        header, rows = cells_of(folder / table.file)
        assert header == table.names
        assert rows
        with (folder / table.file).open(newline="", encoding="utf-8") as file:
            typed = list(csv.reader(file, quoting=csv.QUOTE_NONNUMERIC))[1:]  # what is not quoted is a number
        frame = bh.read_table(table, folder)
        for place, column in enumerate(table.columns):
            cells = [row[place] for row in rows]
            filled |= {column.name for cell in cells if cell}
            for cell, value in zip(cells, (row[place] for row in typed), strict=True):
                if column.kind is str or not cell:
                    assert isinstance(value, str), column
                else:
                    assert isinstance(value, float), column
                    assert column.kind is float or re.fullmatch(r"-?\d+", cell), (column, cell)
            if column.kind is not str and all(cells):
                assert frame[column.name].dtype == column.kind, column
    elsewhere = {"model_revision", "peak_memory_gb", "git_commit"}  # of a hub model, on a GPU, in a clone
    if table is bh.TASKS:  # whose run had no failure, and no configuration that adapts
        elsewhere |= {"error", "floor_frac", "cap_frac", "zero_rejection_frac"}
    assert filled | elsewhere >= set(table.names)


def test_each_quantity_is_in_the_table_of_its_kind():
    """What a row is of and where it is from, and what the routers did, is in all three; nothing else is."""
    in_all = set(bh.GENERATION.names) & set(bh.SCORES.names) & set(bh.TASKS.names)
    routing = {column.name for column in bh.ROUTING_COLUMNS}
    assert routing | {"config_name", "configuration", "status", "error", "run_id"} <= in_all
    assert not in_all & {*bh.SCORES.metrics} - routing
    assert set(bh.GENERATION.metrics) & set(bh.SCORES.metrics) == {
        column.name for column in bh.ROUTING_COLUMNS if column.metric
    }
    assert not any(name.startswith(("nll", "kl_", "task")) for name in bh.GENERATION.names)
    assert not any(name.endswith("_sec") for name in [*bh.SCORES.names, *bh.TASKS.names])


AWKWARD_TEXTS = [
    "=1+1", "'=1", "@x", "- item", "\t'", "'",
    "NA", "null", "nan", "", " x ", "1.0", 'a "b", c',
    "a\nb", "a\rb", "a\r\nb\rc", "\u00e9 \u2028 \x00", "|<b>`",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_texts_survive_the_csv(text, mock_model, tmp_path):
    """Whatever a model writes, the CSV gives it back; a NUL becomes its symbol."""
    tokenizer = MockTokenizer()
    tokenizer.decode = lambda *args, **kwargs: text
    runner = bh.BHExperimentRunner("mock", tmp_path, model=mock_model, tokenizer=tokenizer)
    runner.run_full_experiment_suite(CONFIGS, PROMPTS[:1], 1)
    read = bh.read_table(bh.GENERATION, tmp_path)["generated_text"].tolist()
    assert read == [text.replace("\0", "\u2400")] * 2


def test_a_table_without_rows_is_read(tmp_path):
    """As one that is not there: no rows, all columns."""
    for table in bh.TABLES:
        for _ in range(2):
            frame = bh.read_table(table, tmp_path)
            assert (len(frame), list(frame)) == (0, table.names)
            bh.write_table(table, [], tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"nonsense", b"config_name,prompt_id\ntopk_8,one\n"]
)
@pytest.mark.parametrize("table", [bh.GENERATION, bh.SCORES, bh.TASKS], ids=lambda table: table.file)
def test_what_is_no_results_table_is_refused(table, content, tmp_path, capsys):
    """In one line that names the file and, where it is a table, what it lacks."""
    path = tmp_path / table.file
    path.write_bytes(content)
    with pytest.raises(bh.UserError, match="is not a results CSV") as refused:
        bh.Results.read(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    if content.startswith(b"config_name"):
        assert "it lacks" in str(refused.value)
        assert "status" in str(refused.value)
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 2
    assert len(error_lines(capsys)) == 1
    assert path.read_bytes() == content


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(bh.UserError, match="holds none of bh_routing_results.csv, text_scores.csv"):
        bh.Results.read(tmp_path)


# Tables of older scripts

TESTDATA = HERE / "testdata"
# Results of the first command with `--prompts testdata/prompts.json --configs topk_8,bh_loose --max-tokens 4
# --dtype float32`, written by the script at these commits.
OLDER = ["92f8b74", "6894e3a"]
OLD_CONFIGS = {name: bh.ROUTING_CONFIGS[name] for name in ("topk_8", "bh_loose")}


def written_by_older(folder):
    with (folder / bh.GENERATION.file).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("commit", OLDER)
def test_older_results_are_read(commit, tmp_path):
    """What an older script did not know is empty; the rest is analysed, its side files with it."""
    shutil.copytree(TESTDATA / commit, tmp_path, dirs_exist_ok=True)
    results = bh.Results.read(tmp_path)
    assert [list(frame) for frame in results] == [table.names for table in TABLES.values()]
    for frame in results:
        assert (frame[["input_hash", "run_id"]] == "").all(axis=None)
    assert len(results.tasks) == 0
    scores = results.scores.set_index(["config_name", "item_id"])
    written = written_by_older(TESTDATA / commit)
    for old, row in zip(written, results.generation.to_dict("records"), strict=True):
        assert old["generated_text"] == row["generated_text"]
        assert float(old["inference_time_sec"]) == row["inference_time_sec"]
        score = scores.loc[old["config_name"], old["prompt_id"]]
        assert float(old["reference_nll"]) == score["nll"]
        assert float(old["reference_avg_experts"]) == score["avg_experts_per_token"]
        assert score["document"] == old["prompt_id"]
        for k, nll in json.loads(old["static_nll"] or "{}").items():
            assert scores.loc[f"topk_{k}", old["prompt_id"]]["nll"] == nll
    assert len(scores) == 4 + 2 * 7  # each configuration, and seven static points beside the model's own
    analysis = bh.analyze_results(results.generation, tmp_path)
    assert (analysis["n_rows"], analysis["n_failed"], analysis["own_k"]) == (4 + 18, 0, 8)
    assert analysis["baseline"] == "topk_8"
    assert analysis["null_diagnostics"]["n_tokens"] > 0
    assert set(analysis["layers"]) == set(OLD_CONFIGS)
    assert analysis["verdict"]["bh_loose"]["delta_nll"] is not None


@pytest.mark.parametrize("folder", [*(TESTDATA / commit for commit in OLDER), HERE / "results" / "example"])
def test_older_results_are_analysed_from_the_command_line(folder, tmp_path, monkeypatch):
    """A report as of a run of today; the tables are left as they were."""
    only_plots(monkeypatch, "quality_vs_experts")
    for path in folder.glob("*.csv"):
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 0
    report = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert "**Against static Top-K that spends the same number of experts" in report
    assert (tmp_path / "plots" / "quality_vs_experts.png").exists()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_the_example_is_read():
    """Each of 60 experiments; 12 references and 100 windows under as many configurations and the ladder."""
    results = bh.Results.read(HERE / "results" / "example")
    assert (len(results.generation), len(results.scores)) == (60, (12 + 100) * (5 + 7))
    assert results.num_failed == 0
    assert set(results.generation["config_name"]) == set(bh.ROUTING_CONFIGS)
    assert results.scores["document"].nunique() == 12 + 64


# Tables by layer


@pytest.fixture(scope="module", params=["mock", "olmoe-eager"])
def spoken(request, tmp_path_factory):
    """A run on prompts of three categories, each one word said again and again; its runner and prompts."""
    folder = tmp_path_factory.mktemp("spoken")
    tokenizer = MockTokenizer() if request.param == "mock" else byte_tokenizer()
    runner = bh.BHExperimentRunner("m", folder, model=build(request.param), tokenizer=tokenizer)
    prompts = [
        {"id": f"{word}{n}", "text": f"{word} " * (4 + n), "category": word, "reference": f"and {word} {n}"}
        for word in ("apple", "river", "=cmd") for n in range(3)
    ]  # fmt: skip
    runner.run_full_experiment_suite(CONFIGS, prompts, 4)
    return SimpleNamespace(kind=request.param, folder=folder, runner=runner, prompts=prompts)


def routed_tokens(spoken):
    """(kind, item) -> how many tokens the routers saw of it, the same under every configuration."""
    seen = {}
    for row in spoken.runner.results.generation.to_dict("records"):
        seen["generation", row["prompt_id"]] = row["num_input_tokens"] + row["num_output_tokens"] - 1
    for item in bh.reference_items(spoken.prompts, spoken.runner.tokenizer):
        seen["score", item.id] = len(item.token_ids) - 1  # the last one predicts nothing
    return seen


def test_layer_statistics_sum_up_the_rows(spoken):
    """Tokens and means by layer agree with the rows and with a recorder that saw the same texts."""
    layers = bh.read_table(bh.LAYER_STATISTICS, spoken.folder)
    runner = spoken.runner
    assert layers["router"].unique().tolist() == [layer.name for layer in runner.layers]
    tokens = routed_tokens(spoken)
    kinds = {
        "generation": ("prompt_id", runner.results.generation),
        "score": ("item_id", runner.results.scores),
    }
    for kind, (item, frame) in kinds.items():
        if kind == "generation" and spoken.kind == "mock":  # the mock has no cache: it reads all again
            continue
        for name, rows in frame.groupby("config_name"):
            own = layers[(layers["config_name"] == name) & (layers["kind"] == kind)]
            weights = [tokens[kind, item_id] for item_id in rows[item]]
            assert (own["num_tokens"] == sum(weights)).all()
            for column in ("avg_experts_per_token", "gate_mass_frac"):
                expected = np.average(rows[column].astype(float), weights=weights)
                assert own[column].mean() == pytest.approx(expected)
    columns = [column.name for column in bh.LAYER_COLUMNS]
    for name in CONFIGS:
        own = layers[(layers["config_name"] == name) & (layers["kind"] == "generation")]
        with runner.routing(runner._resolve(name, CONFIGS[name])) as recorder:
            for prompt in spoken.prompts:
                runner.generate(prompt["text"], 4)
        summary = recorder.summary()
        pd.testing.assert_frame_equal(
            summary.reset_index(drop=True), own[columns].reset_index(drop=True), check_dtype=False
        )
        assert "<table" in recorder._repr_html_()
        use = recorder.total().use
        entropy = [stats.entropy(row, base=2) for row in use / use.sum(1, keepdims=True)]
        assert summary["use_entropy_bits"].tolist() == pytest.approx(entropy)


def test_expert_counts_agree_with_rows_and_layers(spoken):
    """How many experts how often: its sums are tokens, means, spread, ends and use of the other tables."""
    counts = bh.read_table(bh.EXPERT_COUNTS, spoken.folder)
    usage = bh.read_table(bh.EXPERT_USAGE, spoken.folder)
    layers = bh.read_table(bh.LAYER_STATISTICS, spoken.folder)
    results = spoken.runner.results
    assert (counts["tokens"] > 0).all()
    key = ["config_name", "kind", "layer"]
    assert not counts.duplicated([*key, "num_experts"]).any()
    used = usage.groupby(key)["count"].sum()
    for place, row in layers.set_index(key).iterrows():
        own = counts.set_index(key).loc[[place]]
        number = own["num_experts"].to_numpy()
        tokens = own["tokens"].to_numpy()
        assert tokens.sum() == row["num_tokens"]
        mean = np.average(number, weights=tokens)
        assert mean == pytest.approx(row["avg_experts_per_token"])
        spread = math.sqrt(np.average((number - mean) ** 2, weights=tokens))
        assert spread == pytest.approx(row["std_experts_per_token"], abs=1e-9)
        assert (number.min(), number.max()) == (row["min_experts"], row["max_experts"])
        assert (number * tokens).sum() == used[place]
    tokens = routed_tokens(spoken)
    for kind, item, frame in (
        ("generation", "prompt_id", results.generation), ("score", "item_id", results.scores)
    ):  # fmt: skip
        for name, rows in frame.groupby("config_name"):
            if kind == "generation" and spoken.kind == "mock":
                continue
            own = counts[(counts["config_name"] == name) & (counts["kind"] == kind)]
            weights = [tokens[kind, item_id] for item_id in rows[item]]
            mean = np.average(rows["avg_experts_per_token"].astype(float), weights=weights)
            assert np.average(own["num_experts"], weights=own["tokens"]) == pytest.approx(mean)
            assert own["num_experts"].min() == rows["min_experts"].min()
            assert own["num_experts"].max() == rows["max_experts"].max()


def test_categories_that_differ_diverge(spoken, monkeypatch):
    """Each category is one word said again and again: they cannot use the same experts."""
    layers = bh.read_table(bh.LAYER_STATISTICS, spoken.folder)
    usage = bh.read_table(bh.EXPERT_USAGE, spoken.folder)
    shares = usage.groupby(["config_name", "kind", "category", "layer"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1)
    assert set(usage["category"]) == {"apple", "river", "=cmd"}
    generated = layers[layers["kind"] == "generation"]
    assert (generated["category_p_value"] < 0.06).all()
    assert (generated["category_divergence_bits"] > 0.05).all()
    only_plots(monkeypatch, "layer_profile", "expert_usage_heatmap")
    analysis = bh.analyze_results(spoken.runner.results.generation, spoken.folder)
    assert set(analysis["layers"]) == set(CONFIGS)
    paths = bh.create_visualizations(spoken.runner.results.generation, spoken.folder)
    assert {path.stem for path in paths} == set(bh.PLOTS)


def test_categories_that_are_alike_do_not_diverge():
    """Under the null the permutation test rejects in about 5 % of cases."""
    generator = np.random.default_rng(0)
    small = 0
    for _ in range(40):
        use = generator.integers(0, 9, (8, 1, 6))
        documents = bh.FirstDocuments()
        for n in range(8):
            documents.add("ab"[n % 2], str(n), use[n])
        small += documents.p_values()[0] <= 0.05
    assert small <= 7


@pytest.mark.parametrize("categories", [("", "a", "b"), ("", "", "a"), ("NA", "", "null")])
def test_any_word_is_a_category(categories, mock_model, tmp_path):
    """Also one without letters: its use of experts is told apart like that of the others."""
    prompts = [
        {"id": f"{category}{n}", "text": f"{category} {n}", "category": category, "reference": "and on"}
        for n in range(2) for category in dict.fromkeys(categories)
    ]  # fmt: skip
    results = run_suite(mock_model, tmp_path, prompts=prompts)
    assert results.num_failed == 0
    usage = bh.read_table(bh.EXPERT_USAGE, tmp_path)
    for kind in ("generation", "score"):
        assert set(usage.loc[usage["kind"] == kind, "category"]) == set(categories)
    layers = bh.read_table(bh.LAYER_STATISTICS, tmp_path)
    assert layers["category_p_value"].notna().all()


# ---------------------------------------------------------------------------------------------------------
# 9. Checkpoints
# ---------------------------------------------------------------------------------------------------------

SCHEMA = bh.CheckpointFile.SCHEMA


def checkpoint_row(i, status="ok"):
    text = 'é "]}\n, {"results": [' * i
    names = {"kind": "generation", "config_name": f"c{i}", "prompt_id": f"p{i}", "sample": 0}
    return {**names, "status": status, "text": text, "value": i / 3}


def rows_of(file):
    return [file.row(key) for key in file.places]


def rows_in(path):
    """The rows of a checkpoint as a plain JSON reader sees them."""
    rows = strict_loads(path.read_text())["results"]
    return [{key: value for key, value in row.items() if key != "crc32"} for row in rows]


def open_checkpoint(path, **settings):
    return bh.CheckpointFile(path, {"model": "m", "seed": 0, **settings}, 2)


def filled(path, rows):
    """A checkpoint file with some rows; returns its bytes."""
    file = open_checkpoint(path)
    for i in range(rows):
        file.append(checkpoint_row(i))
    file.close()
    return path.read_bytes()


def test_checkpoint_is_valid_at_every_moment(tmp_path):
    """Strict JSON after every append; the bytes of earlier rows stay; texts and floats survive."""
    path = tmp_path / "latest.json"
    file = open_checkpoint(path)
    before = path.read_bytes()
    for i in range(12):
        file.append({**checkpoint_row(i), "number": np.float32(0.5), "missing": float("nan")})
        content = path.read_bytes()
        assert content.startswith(before[: -len(bh.CheckpointFile.END)])
        rows = rows_in(path)
        assert rows == rows_of(file)
        assert rows == [{**checkpoint_row(n), "number": 0.5, "missing": None} for n in range(i + 1)]
        before = content
    file.close()
    assert rows_of(open_checkpoint(path)) == rows


@pytest.mark.parametrize("tear", ["cut", "half overwritten"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_torn_end(tmp_path, rows, tear):
    """A file cut at any byte of its last row, or half overwritten, keeps every row before."""
    path, end = tmp_path / "latest.json", bh.CheckpointFile.END
    start = len(filled(path, rows)) - len(end)
    path.unlink()
    whole = filled(path, rows + 1)
    if tear == "cut":
        states = [whole[:stop] for stop in range(start, len(whole))]
    else:
        states = [whole[: start + n] + end[n:] for n in range(len(end))]
    for torn in states:
        path.write_bytes(torn)
        file = open_checkpoint(path)
        kept = rows_of(file)
        assert kept[:rows] == [checkpoint_row(n) for n in range(rows)], torn
        assert kept[rows:] in ([], [checkpoint_row(rows)]), torn
        file.append(checkpoint_row(9))
        file.close()
        assert rows_in(path) == [*kept, checkpoint_row(9)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, "not a checkpoint") for text in ("hello", "", "[1, 2]", "null", '{"results": []}')),
        ("[" * 100_000, "not a checkpoint"),
        ('{"schema": 99,\n"settings": {},\n"results": []}', "schema 99"),
        (
            f'{{"schema": {SCHEMA},\n"settings": {{"model": "m", "seed": 7}},\n"results": [\n]}}\n',
            "seed is 7 there, 0 here",
        ),
    ],
)
def test_foreign_files_are_refused(content, message, tmp_path):
    """What is not this run's checkpoint is named and left exactly as it was."""
    path = tmp_path / "latest.json"
    path.write_text(content)
    with pytest.raises(bh.UserError, match=message):
        open_checkpoint(path)
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("commit", OLDER)
@pytest.mark.parametrize("name", [bh.CHECKPOINT_FILE, bh.PROCESS_FILE.format(rank=1)])
def test_older_checkpoints_are_refused(commit, name, mock_model, tmp_path):
    """In one line that says which schema it is and the ways out; nothing is touched."""
    shutil.copytree(TESTDATA / commit, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    (folder / bh.CHECKPOINT_FILE).rename(folder / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = f"{name} has checkpoint schema 2, this script writes {SCHEMA}; use the script that wrote it"
    with pytest.raises(bh.UserError, match=message) as refused:
        run_suite(mock_model, tmp_path, OLD_CONFIGS, tokens=4)
    assert bh.WAY_OUT in str(refused.value)
    assert "\n" not in str(refused.value)
    (tmp_path / bh.LOG_FILE).unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: content for path, content in files.items() if path.name != ".lock"} == before


def test_truncated_at_every_byte_and_bits_flipped(tmp_path):
    """Whole rows are kept exactly, damaged ones left out, the file set aside or refused as it is."""
    path = tmp_path / "latest.json"
    whole = filled(path, 3)
    good, head = [checkpoint_row(i) for i in range(3)], whole.index(b"[") + 1
    random, outcomes = np.random.default_rng(0), collections.Counter()
    states = [whole[:stop] for stop in range(len(whole))]
    for _ in range(300):
        place, flipped = int(random.integers(len(whole))), bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        states.append(bytes(flipped))
    for state in states:
        for file in tmp_path.iterdir():
            file.unlink()
        path.write_bytes(state)
        try:
            with contextlib.closing(open_checkpoint(path)) as checkpoint:
                kept = rows_of(checkpoint)
        except bh.UserError:
            assert path.read_bytes() == state
            assert list(tmp_path.iterdir()) == [path]
            outcomes["refused"] += 1
            continue
        assert all(row in good for row in kept), state
        lost = [row for row in good if row not in kept]
        if lost and good.index(lost[0]) < 2 and len(state) == len(whole):  # no torn end: kept for a look
            assert [file.read_bytes() for file in tmp_path.glob("*damaged1.json")] == [state]
        if len(state) < len(whole):  # rows that were there whole
            assert kept == good[: len(kept)]
            assert len(kept) >= state[head:].count(b"},")
        assert rows_in(path) == kept
        outcomes["salvaged" if lost else "whole"] += 1
    assert sum(outcomes.values()) == len(whole) + 300
    assert min(outcomes[word] for word in ("refused", "salvaged", "whole")) > 0


@pytest.mark.parametrize("fault", ["damaged", "removed"])
def test_disk_full_while_saving_a_checkpoint(tmp_path, monkeypatch, fault):
    """A damaged file is replaced, and a removed one given up, only when its rows are somewhere else."""
    path = tmp_path / "latest.json"
    whole = filled(path, 3)

    def write(part, data):
        with part.open("wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fault == "damaged":
            path.write_bytes(whole.replace(b"c1", b"c7"))
            patch.setattr(Path, "write_bytes", write)
            with pytest.raises(OSError, match=f"No space left on device.*{path}"):
                open_checkpoint(path)
        else:
            checkpoint = open_checkpoint(path)
            path.unlink()
            patch.setattr(Path, "write_bytes", write)
            with pytest.raises(OSError, match=f"No space left on device.*{path}"):
                checkpoint.append(checkpoint_row(3))
    assert not list(tmp_path.glob("*.part"))
    if fault == "removed":
        checkpoint.close()
        assert path.read_bytes() == whole
    else:
        open_checkpoint(path).close()
        assert rows_in(path) == [checkpoint_row(0), checkpoint_row(2)]


def test_disk_full_while_a_row_is_added(tmp_path, monkeypatch):
    """The file is as it was before, and the next row goes where this one should have gone."""
    path = tmp_path / "latest.json"
    whole = filled(path, 2)
    file = open_checkpoint(path)

    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, data):
            return real.write(data[:7]) if len(data) > len(bh.CheckpointFile.END) else real.write(data)

    real = file._file
    with monkeypatch.context() as patch:
        patch.setattr(file, "_file", Full())
        with pytest.raises(OSError, match="No space left on device"):
            file.append(checkpoint_row(2))
    assert path.read_bytes() == whole
    file.append(checkpoint_row(3))
    assert rows_in(path) == [checkpoint_row(0), checkpoint_row(1), checkpoint_row(3)]


# Several processes


def open_folder(folder, rank=0, **settings):
    return bh.Checkpoint(folder, {"model": "m", **settings}, rank)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_process_appends_to_its_own_file_and_reads_them_all(tmp_path):
    """No file of another process is written, mended or removed; rows come in the order that is asked for."""
    opened = [open_folder(tmp_path, rank) for rank in range(3)]
    for i in range(6):
        before = bytes_in(tmp_path)
        opened[i % 3].append(checkpoint_row(i))
        changed = {name for name, content in bytes_in(tmp_path).items() if content != before[name]}
        assert changed == {opened[i % 3].own.path.name}
    assert sorted(bytes_in(tmp_path)) == ["latest_checkpoint.json", "process_1.json", "process_2.json"]
    keys = [bh.row_key(checkpoint_row(i)) for i in range(7)]
    for rank, checkpoint in enumerate(opened):
        assert checkpoint.done() >= {keys[i] for i in range(6) if i % 3 == rank}
        checkpoint.read_others()
        assert checkpoint.done() == set(keys[:6])
        assert list(checkpoint.rows(reversed(keys))) == [checkpoint_row(i) for i in range(5, -1, -1)]
    before = bytes_in(tmp_path)
    for checkpoint in opened:
        checkpoint.close()
    for rank in (0, 2, 4):  # another number of processes
        with contextlib.closing(open_folder(tmp_path, rank)) as again:
            assert again.done() == set(keys[:6])
    assert bytes_in(tmp_path).keys() == {*before, "process_4.json"}
    assert {name: content for name, content in bytes_in(tmp_path).items() if name in before} == before


def test_a_torn_file_is_mended_by_its_owner_only(tmp_path):
    """The others take its whole rows and leave it as it is."""
    with contextlib.closing(open_folder(tmp_path, 1)) as checkpoint:
        for i in range(3):
            checkpoint.append(checkpoint_row(i))
    path = tmp_path / "process_1.json"
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    with contextlib.closing(open_folder(tmp_path)) as other:
        assert other.done() == {bh.row_key(checkpoint_row(i)) for i in range(2)}
        assert list(other.rows(other.done())) != []
    assert path.read_bytes() == torn
    with contextlib.closing(open_folder(tmp_path, 1)) as checkpoint:
        checkpoint.append(checkpoint_row(2))
    assert rows_in(path) == [checkpoint_row(i) for i in range(3)]


def test_a_file_is_read_while_its_owner_mends_it(tmp_path, monkeypatch):
    """What was found in the damaged file is read from it, not from the new one in its place."""
    path = tmp_path / "process_1.json"
    with contextlib.closing(open_folder(tmp_path, 1)) as checkpoint:
        for i in range(4):
            checkpoint.append(checkpoint_row(i))
    path.write_bytes(path.read_bytes().replace(b"c0", b"c9"))  # all other rows will move
    real = bh.CheckpointFile._read

    def read(file, *arguments):
        found = real(file, *arguments)
        if file.path == path and b"c9" in path.read_bytes():
            path.write_bytes(path.read_bytes())
            monkeypatch.setattr(bh.CheckpointFile, "_read", real)
            open_folder(tmp_path, 1).close()
        return found

    monkeypatch.setattr(bh.CheckpointFile, "_read", read)
    with contextlib.closing(open_folder(tmp_path)) as other:
        assert b"c9" not in path.read_bytes()
        assert [row for file in other.others for row in rows_of(file)] == [
            checkpoint_row(i) for i in (1, 2, 3)
        ]


def test_of_two_rows_the_one_that_did_not_fail_counts(tmp_path):
    """Whichever process ran it; one that failed everywhere is tried again where that is asked for."""
    with contextlib.closing(open_folder(tmp_path)) as first:
        for i in range(3):
            first.append(checkpoint_row(i, "ok" if i == 0 else "error"))
    with contextlib.closing(open_folder(tmp_path, 1)) as second:
        keys = [bh.row_key(checkpoint_row(i)) for i in range(3)]
        assert second.done() == set(keys)
        assert second.done(retry_failed=True) == {keys[0]}
        second.append(checkpoint_row(1))
        assert second.done(retry_failed=True) == set(keys[:2])
    for rank in (0, 1, 2):
        with contextlib.closing(open_folder(tmp_path, rank)) as checkpoint:
            rows = list(checkpoint.rows(keys))
            assert [row["status"] for row in rows] == ["ok", "ok", "error"]
            assert checkpoint.done(retry_failed=True) == set(keys[:2])


def test_files_of_other_processes_are_checked_and_copies_left_out(tmp_path):
    """A file of another run is refused; what was set aside for a look is nobody's file."""
    with contextlib.closing(open_folder(tmp_path, 1)) as checkpoint:
        for i in range(4):
            checkpoint.append(checkpoint_row(i))
    path = tmp_path / "process_1.json"
    path.write_bytes(path.read_bytes().replace(b"c1", b"c7").replace(b"c2", b"c8"))
    open_folder(tmp_path, 1).close()
    assert (tmp_path / "process_1.damaged1.json").exists()
    with contextlib.closing(open_folder(tmp_path)) as checkpoint:
        assert [file.path.name for file in checkpoint.others] == ["process_1.json"]
        assert checkpoint.done() == {bh.row_key(checkpoint_row(i)) for i in (0, 3)}
    open_folder(tmp_path / "other", 1, seed=1).close()
    shutil.copy(tmp_path / "other" / "process_1.json", tmp_path / "process_2.json")
    with pytest.raises(bh.UserError, match="seed is 1 there, None here"):
        open_folder(tmp_path)


# Killed processes: what happens on borrowed machines, caused for real

KILLS = int(os.environ.get("BH_KILLS", 4))  # random moments to die at; BH_KILLS=50 for a long look


class TornFile:
    """A checkpoint's file whose process is killed in the middle of one of its writes."""

    def __init__(self, file, random):
        self.file, self.random, self.left = file, random, int(random.integers(1, 9))

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.left -= 1
        if self.left == 0:
            self.file.write(data[: int(self.random.integers(0, len(data) + 1))])
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)


def tear_a_write(random):
    """From now on this process is killed in the middle of a write to its checkpoint."""
    opened = bh.CheckpointFile.__init__

    def tear(file, *arguments, **options):
        opened(file, *arguments, **options)
        if file._file.writable():
            file._file = TornFile(file._file, random)

    bh.CheckpointFile.__init__ = tear


def when_writing(name, fault):
    """From now on `fault` happens in this process whenever it has begun to write a file of that name."""
    real = bh.replacing

    @contextlib.contextmanager
    def replacing(path):
        with real(path) as part:
            if path.name == name:
                with fault(path):
                    yield part
            else:
                yield part

    bh.replacing = replacing


@contextlib.contextmanager
def no_file_above(limit, is_killed):
    """No file of this process gets longer than `limit` bytes inside the block: its disk is full there, or the
    system kills it there, which no handler sees either."""
    import resource  # POSIX only

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def without_folder(folder):
    """The folder has just been removed."""
    shutil.rmtree(folder)
    yield


def in_child(work, stderr=None):
    """Start a copy of this process that does `work` and ends with its exit code; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    # Copies share the lock of the progress bars: one that is killed while it holds it blocks all later ones.
    for bars in (tqdm.std.tqdm, tqdm.auto.tqdm):
        bars.set_lock(threading.RLock())
    os.dup2(os.open(stderr or os.devnull, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    code = 70
    try:
        code = work()
    finally:
        os._exit(code)


def ended(pid):
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended_within(pid, seconds):
    """How a child ended, and whether it did so by itself: as a scheduler does, it is killed after a while. A
    SIGTERM that comes while Python runs a callback of the garbage collector is lost there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return ended(pid), False


def wait_for_rows(path, number, pid):
    while not path.exists() or path.read_bytes().count(b'"crc32"') < number:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended too early"
        time.sleep(0.001)


def keys_by_file(folder):
    """Checkpoint file -> the keys of its whole rows, as a plain reader of its lines finds them."""
    keys = {}
    for path in folder.glob("checkpoints/*.json"):
        keys[path.name] = []
        for line in path.read_bytes().splitlines()[3:]:
            with contextlib.suppress(ValueError, KeyError):
                keys[path.name].append(bh.row_key(json.loads(line.rstrip(b","))))
    return keys


def small_mock():
    """A mock model whose suites take no time: 2 layers, 8 experts, top-2."""
    torch.manual_seed(0)
    return MockMoE(top_k=2, layers=2, experts=8, hidden=16).eval()


TOKEN_LOG_FILE = list(bh.TOKEN_LOG_FILES)[importlib.util.find_spec("pyarrow") is None]  # that is written here
LEFT_ALONE = 75  # exit code of a process that waits for one that is gone; a launcher would end it


class KillSeries:
    """A small run that is killed again and again, and resumed by any number of processes."""

    side_files = (bh.LAYER_STATISTICS.file, bh.EXPERT_USAGE.file, bh.EXPERT_COUNTS.file)  # without a clock

    def __init__(self, folder, kills, most_processes):
        torch.set_num_threads(1)
        self.model = small_mock()
        self.random = np.random.default_rng(0)
        self.folder = folder
        self.kills = kills
        self.most_processes = most_processes
        counted = (
            "killed",
            "terminated",
            "in a write",
            "in a table",
            "rows lost",
            "rows twice",
            "torn tables",
            "others' files changed",
            "other results",
            "left behind",
            "signals not heeded",
        )
        self.report = dict.fromkeys(("suites", *counted), 0)

    def new_runner(self, output):
        return mock_runner(self.model, output)

    def measure(self, runner):
        runner.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 8)

    def tear(self):
        tear_a_write(self.random)

    def suite(self, output, rank=0, world=1, wait=lambda: None, torn=False):
        runner = self.new_runner(output)
        runner.processes = SimpleNamespace(rank=rank, world=world, wait=wait)
        if torn:
            self.tear()
        with contextlib.ExitStack() as stack:
            bh._end_on_signals(stack)
            try:
                self.measure(runner)
            except bh._Terminated:
                return 128 + signal.SIGTERM
            except threading.BrokenBarrierError:
                return LEFT_ALONE
        return 0

    def attempt(self, output, usual):
        """Some processes run the suite, and are killed if enough have not been; whether they finished."""
        world = int(self.random.integers(1, self.most_processes + 1))
        barrier = multiprocessing.get_context("fork").Barrier(world, timeout=600)
        kill = self.report["killed"] < self.kills
        torn_rank = int(self.random.integers(world)) if kill and self.random.integers(2) else None
        pids = []
        for rank in range(world):
            torn = rank == torn_rank
            work = functools.partial(self.suite, output, rank, world, barrier.wait, torn)
            pids.append(in_child(work))
        if torn_rank is not None:
            how = [ended(pids.pop(torn_rank))]
        else:
            how = []
            time.sleep(self.random.uniform(0, usual) if kill else 0)
        for pid in pids:  # as a launcher does when one is gone
            if kill and (torn_rank is None or how[0] != 0):
                os.kill(pid, self.random.choice([signal.SIGKILL, signal.SIGTERM]))
                time.sleep(self.random.uniform(0, usual / 10))
        for pid in pids:
            way, was_heeded = ended_within(pid, 30 if kill else 600)
            how.append(way)
            self.report["signals not heeded"] += not was_heeded
        # SIGTERM by itself where it comes before it is waited for.
        ends = {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGXFSZ, LEFT_ALONE}
        assert set(how) <= ends, how
        self.report["terminated"] += 128 + signal.SIGTERM in how
        finished = not any(how)
        self.report["killed"] += not finished
        self.report["in a write"] += torn_rank is not None and not finished
        self.report["in a table"] += -signal.SIGXFSZ in how
        return world, finished

    def run_until_complete(self, output, usual):
        seen = {}
        finished = False
        while not finished:
            before = bytes_in(output / "checkpoints") if (output / "checkpoints").exists() else {}
            world, finished = self.attempt(output, usual)
            found = keys_by_file(output)
            for name, keys in seen.items():
                self.report["rows lost"] += len(set(keys) - set(found.get(name, [])))
            every = [key for keys in found.values() for key in keys]
            self.report["rows twice"] += len(every) - len(set(every))
            own = {bh.CHECKPOINT_FILE, *(bh.PROCESS_FILE.format(rank=rank) for rank in range(1, world))}
            now = bytes_in(output / "checkpoints") if before else {}
            for name in before:
                if name.removesuffix(".part") not in own:  # its own may lie there, half written
                    self.report["others' files changed"] += now.get(name) != before[name]
            seen = found
            # The tables are of a finished run, or not there.
            for name, content in self.tables_of(output).items():
                self.report["torn tables"] += content.count(b"\n") != self.whole[name].count(b"\n")
        return seen

    def tables_of(self, output):
        names = [*(table.file for table in TABLES.values()), *self.side_files]
        paths = [output / name for name in names]
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def run(self):
        start = time.perf_counter()
        assert self.suite(self.folder / "whole") == 0
        usual = time.perf_counter() - start
        whole = bh.Results.read(self.folder / "whole")
        self.whole = self.tables_of(self.folder / "whole")
        files = set()
        while self.report["killed"] < self.kills:
            output = self.folder / f"suite{self.report['suites']}"
            files |= set(self.run_until_complete(output, usual))
            self.report["suites"] += 1
            try:
                assert_same_results(bh.Results.read(output), whole)
                for name in self.side_files:
                    assert (output / name).read_bytes() == self.whole[name]
            except AssertionError:
                self.report["other results"] += 1
            self.report["left behind"] += len(list(output.rglob("*.part")))
        return self.report | {"files": sorted(files)}


class BatchSeries(KillSeries):
    """The same with texts only, scored in batches that are saved row by row."""

    def new_runner(self, output):
        return mock_runner(self.model, output, batch_size=4)

    def measure(self, runner):
        texts = [text_item(f"w{n}", range(6 + n, 18 + n), f"d{n // 3}") for n in range(18)]
        runner.run_full_experiment_suite(SMALL, [], 1, texts=texts)


class TaskSeries(KillSeries):
    """The same with tasks, each saved as a whole under each configuration."""

    def __init__(self, folder, kills, most_processes):
        super().__init__(folder, kills, most_processes)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        write_tasks(self.tasks)
        self.model = build("olmoe-eager")
        self.tokenizer = byte_tokenizer()

    def new_runner(self, output):
        return bh.BHExperimentRunner("tiny", output, model=self.model, tokenizer=self.tokenizer)

    def measure(self, runner):
        names = ["mini_choice", "mini_text"]
        runner.run_tasks(names, SMALL, limit=1, include_path=self.tasks)


class LogSeries(KillSeries):
    """The same with a log of every token, killed in the middle of that and of the tables too."""

    side_files = (*KillSeries.side_files, bh.TOKEN_COUNTS.file, bh.TOKEN_KINDS.file, TOKEN_LOG_FILE)

    def tear(self):
        if self.random.integers(2):
            tear_a_write(self.random)
            return
        name = self.random.choice(self.side_files)
        limit = int(self.random.integers(len(self.whole[name])))
        when_writing(name, lambda _: no_file_above(limit, is_killed=True))

    def measure(self, runner):
        runner.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 8, token_log=True)


SERIES = {"suite": KillSeries, "batches": BatchSeries, "tasks": TaskSeries, "token log": LogSeries}


def kill_series(kind, folder, kills, most_processes):
    return SERIES[kind](Path(folder), kills, most_processes).run()


def in_fresh_process(call, *arguments):
    """Call a function of this file in a process of its own, where forking is safe; its JSON comes back."""
    code = (
        f"import json, sys; import {Path(__file__).stem} as t; "
        f"print(json.dumps(t.{call}(*json.loads(sys.argv[1]))))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        cwd=Path(__file__).parent, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")


@needs_fork
@pytest.mark.parametrize(
    ("kind", "most_processes"), [("suite", 1), ("suite", 3), ("batches", 3), ("tasks", 2), ("token log", 2)]
)
def test_killed_at_random_moments(kind, most_processes, tmp_path):
    """Killed at random moments and in the middle of writes, resumed by another number of processes each time:
    no row is lost or run twice, nobody's file is touched by another, and the tables are the same."""
    if kind == "tasks":
        pytest.importorskip("lm_eval")
    if kind == "token log" and "BH_KILLS" not in os.environ:
        pytest.skip("long; test_killed_runs_end_with_the_same_log is the short one")
    kills = KILLS if kind == "suite" or "BH_KILLS" in os.environ else KILLS // 3
    report = in_fresh_process("kill_series", kind, tmp_path, kills, most_processes)
    print(kind, report)
    assert report["killed"] >= kills
    assert report["in a write"] + report["terminated"] > 0
    lost = ("rows lost", "rows twice", "torn tables", "others' files changed", "other results", "left behind")
    assert [report[name] for name in lost] == [0] * len(lost)
    assert len(report["files"]) == most_processes


class SignalSeries:
    """Signals, a full disk and a removed folder, each to a real run of the command line: what came of it."""

    def __init__(self, model_folder, folder):
        torch.set_num_threads(1)
        vars(bh).update(CALIBRATION, PLOTS={}, ROUTING_CONFIGS=SMALL)
        bh.TEST_PROMPTS = SCORED_PROMPTS
        self.model_folder = model_folder
        self.folder = folder
        self.report = {}

    def start(self, name, limit=None):
        import resource  # POSIX only

        def work():
            # What starts the tests may ignore signals (`nohup`, `&` in a script), and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return cli(self.model_folder, self.folder / name, "--max-tokens", 12, "--text", "none")

        return in_child(work, stderr=f"{self.folder / name}.err")

    def checkpoint(self, name):
        return self.folder / name / "checkpoints" / bh.CHECKPOINT_FILE

    def resume(self, name, how):
        """Note how it ended, run the same command again, and note what that gives."""
        rows = len(strict_loads(self.checkpoint(name).read_text())["results"])
        again = ended(self.start(name))
        results = bh.Results.read(self.folder / name)
        is_same = True
        try:
            assert_same_results(results, self.whole)
        except AssertionError:
            is_same = False
        self.report[name] = {
            "exit": how, "rows": rows, "again": again, "all": [len(frame) for frame in results],
            "same": is_same, "errors": (self.folder / f"{name}.err").read_text(),
        }  # fmt: skip

    def run(self):
        # In this process, which also imports all that the children would import one by one.
        assert cli(self.model_folder, self.folder / "whole", "--max-tokens", 12, "--text", "none") == 0
        self.whole = bh.Results.read(self.folder / "whole")
        size = self.checkpoint("whole").stat().st_size
        for name, signals in (("SIGINT", 1), ("SIGTERM", 1), ("SIGHUP", 1), ("SIGINT twice", 2)):
            pid = self.start(name)
            wait_for_rows(self.checkpoint(name), 2, pid)
            for _ in range(signals):
                os.kill(pid, getattr(signal, name.split()[0]))
                time.sleep(0.02 * (signals - 1))
            self.resume(name, ended(pid))
        self.resume("full disk", ended(self.start("full disk", limit=size // 2)))
        pid = self.start("removed folder")
        wait_for_rows(self.checkpoint("removed folder"), 2, pid)
        shutil.rmtree(self.folder / "removed folder")
        self.resume("removed folder", ended(pid))
        self.report["tables"] = self.full_disk_at_the_tables()
        return self.report

    def full_disk_at_the_tables(self):
        """All is measured, and the tables are written anew on a disk too small for the smallest of them: how
        that ends, and which files of the run are not as they were."""
        name = "tables"
        shutil.copytree(self.folder / "whole", self.folder / name)
        tables = [self.folder / name / table.file for table in (bh.GENERATION, bh.SCORES, bh.EXPERT_COUNTS)]
        before = {path: path.read_bytes() for path in tables}
        code = ended(self.start(name, limit=min(map(len, before.values())) // 2))
        changed = [path.name for path, content in before.items() if path.read_bytes() != content]
        leftovers = [path.name for path in (self.folder / name).iterdir() if ".part" in path.name]
        return {"exit": code, "changed": changed, "leftovers": leftovers}


def signal_series(model_folder, folder):
    return SignalSeries(model_folder, Path(folder)).run()


@needs_fork
def test_signals_full_disk_and_removed_folder(tiny_folder, tmp_path):
    """Each ends as documented or survives, keeps every finished row, and the same command completes it."""
    report = in_fresh_process("signal_series", tiny_folder, tmp_path)
    assert report.pop("tables") == {"exit": 2, "changed": [], "leftovers": []}
    generated, scored = 4 * 3, 6 * 3  # also the model's own Top-4; in the scores Top-1 and Top-3 besides
    ends = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "full disk": 2, "removed folder": 0}
    for name, code in ends.items():
        assert report[name]["exit"] == code, report[name]
    # The second signal can come when the first was dealt with already, or while Python itself winds up.
    assert report["SIGINT twice"]["exit"] in (130, 1, -signal.SIGINT)
    for name, found in report.items():
        assert (found["again"], found["all"], found["same"]) == (0, [generated, scored, 0], True), (
            name,
            found,
        )
        total = generated + scored
        assert found["rows"] == total if name == "removed folder" else 1 <= found["rows"] < total, (
            name,
            found,
        )
        assert "Traceback" not in found["errors"] or name == "SIGINT twice", found["errors"]
    assert "same command goes on" in report["SIGINT"]["errors"]
    assert "mend this, then run the same command again" in report["full disk"]["errors"]
    assert "removed while in use" in report["removed folder"]["errors"]


class FileFaults:
    """A finished run, its report and a comparison, each written anew by its command while something goes
    wrong at one of its files: what came of it. Undisturbed, a command writes the same bytes each time."""

    FILES = {
        "run": (
            *(table.file for table in (bh.GENERATION, bh.SCORES)),
            *(table.file for table in (bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS)),
            *(bh.TOKEN_COUNTS.file, bh.TOKEN_KINDS.file, TOKEN_LOG_FILE),
        ),
        "report": ("analysis_summary.json", "plots/quality_vs_experts.png", "REPORT.md", "report.html"),
        "compare": ("comparison.json", "plots/comparison.png", "COMPARISON.md"),
    }
    FAULTS = ("killed", "killed, none before", "full disk", "removed folder")
    FEW = (  # of all cases, which come to sixty
        ("report", "report.html", "killed"),
        ("report", "REPORT.md", "full disk"),
        ("compare", "COMPARISON.md", "killed, none before"),
        ("compare", "comparison.json", "removed folder"),
    )

    def __init__(self, folder):
        torch.set_num_threads(1)
        model = small_mock()
        vars(bh).update(ROUTING_CONFIGS=SMALL, TEST_PROMPTS=SCORED_PROMPTS)
        bh.build_runner = lambda args: mock_runner(model, args.output)
        bh.PLOTS = {"quality_vs_experts": bh.PLOTS["quality_vs_experts"]}
        self.folder = folder
        self.said = folder / "said.txt"
        self.whole = {}
        self.random = np.random.default_rng(0)
        self.outputs = {name: folder / ("comparison" if name == "compare" else "run") for name in self.FILES}
        self.commands = {
            "run": ["--max-tokens", "12", "--text", "none", "--token-log"],
            "report": ["--analyze-only"],
            "compare": ["compare", folder / "first", folder / "second"],
        }

    def main(self, command):
        return bh.main([*map(str, self.commands[command]), "--output", str(self.outputs[command])])

    def start(self, command, prepare=lambda: None):
        def work():
            prepare()
            return self.main(command)

        self.said.write_text("")
        return in_child(work, stderr=self.said)

    def state(self, command):
        """What the command writes, but for the log: name -> bytes; and what should not be there."""
        output = self.outputs[command]
        files = {file.relative_to(output).as_posix(): file for file in output.rglob("*") if file.is_file()}
        found = {name: files[name].read_bytes() for name in self.FILES[command] if name in files}
        return found, [name for name in files if name.endswith(".part")]

    def look(self, command, code):
        """How the command ended, and what it left."""
        found, strays = self.state(command)
        lines = self.said.read_text(encoding="utf-8").splitlines()
        return {
            "exit": code,
            "torn": [name for name, content in found.items() if content != self.whole[command][name]],
            "missing": [name for name in self.FILES[command] if name not in found],
            "left behind": strays,
            "errors": [line for line in lines if line.startswith("error: ")],
            "traceback": any("Traceback" in line for line in lines),
        }

    def fault(self, command, name, fault):
        """Let it happen in the middle of the file."""
        path = self.outputs[command] / name
        limit = len(self.whole[command][name]) // 2
        happens = {
            "killed": lambda _: no_file_above(limit, is_killed=True),
            "full disk": lambda _: no_file_above(limit, is_killed=False),
            "removed folder": lambda _: without_folder(self.outputs[command]),
        }[fault.split(",")[0]]
        if "none before" in fault:
            path.unlink(missing_ok=True)
        code = ended(self.start(command, lambda: when_writing(path.name, happens)))
        return self.look(command, code)

    def kill(self, command, usual):
        """kill -9 at a random moment."""
        pid = self.start(command)
        time.sleep(self.random.uniform(0, usual))
        os.kill(pid, signal.SIGKILL)
        return self.look(command, ended(pid))

    def again(self, command):
        """The same command, with nothing in its way."""
        return self.look(command, ended(self.start(command)))

    def put_back(self):
        """The results of the run, where they were removed with their folder after its end."""
        shutil.rmtree(self.outputs["run"], ignore_errors=True)
        shutil.copytree(self.folder / "first", self.outputs["run"])

    def begin(self):
        """Write all for the first time; returns how many seconds each command takes."""
        seconds = {}
        for command in self.FILES:
            start = time.perf_counter()
            assert self.main(command) == 0
            seconds[command] = time.perf_counter() - start
            self.whole[command], _ = self.state(command)
            if command == "report":
                for copy_of_run in ("first", "second"):
                    shutil.copytree(self.outputs["run"], self.folder / copy_of_run)
        return seconds

    def cases(self):
        """(command, file, fault)"""
        if "BH_KILLS" not in os.environ:
            return self.FEW
        return [(command, name, fault) for command, names in self.FILES.items()
                for name, fault in itertools.product(names, self.FAULTS)]  # fmt: skip

    def run(self):
        """A list of (what was done, the fault, the file or command, what came of it)."""
        seconds = self.begin()
        report = []
        for command, cases in itertools.groupby(self.cases(), key=lambda case: case[0]):
            for _, name, fault in cases:
                report.append(["fault", fault, name, self.fault(command, name, fault)])
                if fault == "removed folder":
                    if command == "report":
                        self.put_back()
                    report.append(["again", fault, name, self.again(command)])
            report.append(["again", "all", command, self.again(command)])
        for command in ("report", "compare") if "BH_KILLS" in os.environ else ():
            for _ in range(KILLS // 2):
                report.append(["fault", "kill -9", command, self.kill(command, seconds[command])])
            report.append(["again", "kill -9", command, self.again(command)])
        return report


def file_faults(folder):
    return FileFaults(Path(folder)).run()


@needs_fork
def test_faults_in_the_middle_of_each_file(tmp_path):
    """Tables, token log, report and comparison: each file is there as a whole, the old one or the new, or not
    at all; one line says what was wrong; and the same command writes all of them and leaves nothing else."""
    report = in_fresh_process("file_faults", tmp_path)
    plot = "plots/quality_vs_experts.png"  # an old one goes before anything is drawn
    for kind, fault, name, found in report:
        case = (kind, fault, name, found)
        half_there = f"{name}.part" in found["left behind"]
        assert (found["torn"], found["traceback"]) == ([], False), case
        if kind == "again":
            assert (found["exit"], found["missing"], found["left behind"]) == (0, [], []), case
        elif fault == "kill -9":
            assert found["exit"] in (0, -signal.SIGKILL), case
            assert {*found["missing"]} <= {plot}, case
        elif "killed" in fault:
            assert (found["exit"], half_there) == (-signal.SIGXFSZ, True), case
            assert found["missing"] == ([name] if "none before" in fault or name == plot else []), case
        else:
            assert (found["exit"], half_there, len(found["errors"])) == (2, False, 1), case
            assert "mend this, then run the same command again" in found["errors"][0], case
            assert fault != "full disk" or name in found["errors"][0], case
    faults = collections.Counter(fault for kind, fault, _, _ in report if kind == "fault")
    print("files", dict(faults), collections.Counter(found["exit"] for *_, found in report))


@needs_fork
def test_half_a_file_does_not_stay_for_ever(mock_model, tmp_path, monkeypatch):
    """Where a later run has no such file, what a killed one left of it goes too."""

    def killed_while_logging():
        when_writing(TOKEN_LOG_FILE, lambda _: no_file_above(100, is_killed=True))
        run_suite(mock_model, tmp_path, SMALL, PROMPTS, token_log=True)
        return 0

    assert ended(in_child(killed_while_logging)) == -signal.SIGXFSZ
    assert (tmp_path / f"{TOKEN_LOG_FILE}.part").exists()
    (tmp_path / f"{bh.TASKS.file}.part").write_text("half")
    results = run_suite(mock_model, tmp_path, SMALL, PROMPTS, resume=False)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "quality_vs_experts.png.part").write_text("half")  # not drawn without scores
    only_plots(monkeypatch, "quality_vs_experts")
    bh.draw_plots(results, tmp_path, bh.analyze_results(results.generation, tmp_path))
    assert not [path.name for path in tmp_path.rglob("*.part")]


# Resume


class Calls:
    """Counts what a suite runs, without its warm-up: `generated` and `scored`, (configuration, item) each;
    Ctrl-C in place of the one after `stop_after` of them."""

    def __init__(self, patch, tokens, stop_after=None):
        self.generated = []
        self.scored = []
        generate = bh.BHExperimentRunner._generated_row
        score = bh.BHExperimentRunner._scored_rows

        def generated_row(runner, run, name, config, prompt, sample):
            if run.new_tokens == tokens:
                self.count(self.generated, (name, prompt["id"]), stop_after)
            return generate(runner, run, name, config, prompt, sample)

        def scored_rows(runner, batch, name, *arguments):
            self.count(self.scored, (name, tuple(item.id for item in batch.items)), stop_after)
            return score(runner, batch, name, *arguments)

        patch.setattr(bh.BHExperimentRunner, "_generated_row", generated_row)
        patch.setattr(bh.BHExperimentRunner, "_scored_rows", scored_rows)

    def count(self, calls, call, stop_after):
        if len(self.generated) + len(self.scored) == stop_after:
            raise KeyboardInterrupt
        calls.append(call)

    def __len__(self):
        return len(self.generated) + len(self.scored)


SUITE = {**CONFIGS, "bh_loose": bh.ROUTING_CONFIGS["bh_loose"]}
LADDER = [f"topk_{k}" for k in range(1, 8)]  # what the mock model scores besides, with its own top-8


@pytest.fixture(scope="module")
def uninterrupted(mock_model, tmp_path_factory):
    """The tables and the folder of 3 configurations x 3 prompts with references, run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_suite(mock_model, folder, SUITE, tokens=6), folder


@pytest.mark.parametrize("finished", [0, 1, 5, 8, 9, 13, 18])
def test_resume_after_ctrl_c(mock_model, tmp_path, monkeypatch, uninterrupted, finished):
    """Interrupted and resumed equals uninterrupted; nothing is run twice; the model is clean after Ctrl-C."""
    shutil.copy(uninterrupted[1] / bh.CALIBRATION_FILE, tmp_path)
    before = state_of(mock_model)
    with monkeypatch.context() as patch:
        first = Calls(patch, 6, stop_after=finished)
        with pytest.raises(KeyboardInterrupt):
            run_suite(mock_model, tmp_path, SUITE, tokens=6)
    assert len(first) == finished
    assert state_of(mock_model) == before
    second = Calls(monkeypatch, 6)
    results = run_suite(mock_model, tmp_path, SUITE, tokens=6)
    assert len(second.generated) == 9 - len(first.generated)
    assert len(second.scored) == len(SUITE) + len(LADDER) - len(first.scored)  # one batch each
    assert not set(second.generated) & set(first.generated)
    assert not set(second.scored) & set(first.scored)
    assert_same_results(results, uninterrupted[0])
    for table in (bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS):
        assert (tmp_path / table.file).read_bytes() == (uninterrupted[1] / table.file).read_bytes()


def test_finished_work_is_not_run_again(mock_model, tmp_path, monkeypatch, uninterrupted):
    """The same suite again runs nothing, a larger one what is new, and without resume everything."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[1], folder)
    calls = []
    real = mock_model.generate
    monkeypatch.setitem(mock_model.__dict__, "generate", lambda **kwargs: calls.append(1) or real(**kwargs))
    with monkeypatch.context() as patch:
        done = Calls(patch, 6)
        results = run_suite(mock_model, folder, SUITE, tokens=6)
        assert (len(calls), len(done)) == (0, 0)
    for frame, before in zip(results, uninterrupted[0], strict=True):
        pd.testing.assert_frame_equal(frame, before)
    monkeypatch.undo()
    done = Calls(monkeypatch, 6)
    more = run_suite(mock_model, folder, SUITE | {"topk_2": {"method": "topk", "k": 2}}, tokens=6)
    assert (len(more.generation), len(done.generated)) == (12, 3)
    assert done.scored == []  # Top-2 is a point of the ladder
    fresh = run_suite(mock_model, folder, SUITE, tokens=6, resume=False)
    assert (len(done.generated), len(done.scored)) == (3 + 9, len(SUITE) + len(LADDER))
    assert_same_results(fresh, results)
    assert len(list((folder / "checkpoints").glob("*.json"))) == 1
    assert (folder / "earlier_1" / "checkpoints" / bh.CHECKPOINT_FILE).exists()


def test_another_process_resumes(mock_model, tmp_path, monkeypatch):
    """The second of two processes runs what is left of its share, or what failed of it, into its own file;
    nothing of the first one's file changes."""
    with monkeypatch.context() as patch:
        patch.setattr(bh.BHExperimentRunner, "_generated_row", lambda *_: 1 / 0)
        run_suite(mock_model, tmp_path, SMALL, PROMPTS)
    folder = tmp_path / "checkpoints"
    first = (folder / bh.CHECKPOINT_FILE).read_bytes()
    for own in (4, 0):  # the second time its share is finished
        runner = mock_runner(mock_model, tmp_path)
        runner.processes = SimpleNamespace(rank=1, world=2, wait=lambda: None)
        path = folder / bh.PROCESS_FILE.format(rank=1)
        before = len(rows_in(path)) if path.exists() else 0
        runner.run_full_experiment_suite(SMALL, PROMPTS, 2, retry_failed=True)
        assert [row["status"] for row in rows_in(path)[before:]] == ["ok"] * own
        assert {row["prompt_id"] for row in rows_in(path)} == {"two"}
        assert (folder / bh.CHECKPOINT_FILE).read_bytes() == first
    results = run_suite(mock_model, tmp_path, SMALL, PROMPTS)
    assert (results.generation["status"] == "ok").sum() == 4
    assert sorted(path.name for path in folder.iterdir()) == [bh.CHECKPOINT_FILE, path.name]


LAUNCHED = """
import sys
sys.path.insert(0, {here!r})
import run_bh_experiments as bh
bh.PLOTS = {{}}  # they take most of the time
bh.TEST_PROMPTS = bh.TEST_PROMPTS[:5]
sys.exit(bh.main())
"""


def launched(folder, options, processes):
    """Run the command line under `accelerate launch`; returns what it said."""
    script = folder / "script.py"
    script.write_text(LAUNCHED.format(here=str(HERE)))
    # Without a GPU, --multi_gpu is what makes accelerate start two processes; --cpu starts one.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes", processes, "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", script, *options]  # fmt: skip
    command = list(map(str, command))
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stderr


def test_processes_share_the_work(tiny_folder, tmp_path, monkeypatch):
    """Two processes give what one gives; what two began, one finishes, and nobody's file is changed."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", bh.TEST_PROMPTS[:5])
    options = ["--model", tiny_folder, "--device", "cpu", "--no-fp16", "--max-tokens", 3, "--text", "none",
               "--calibration-text", "sampled", "--p-values", "flat",
               "--configs", "topk_8,bh_loose"]  # fmt: skip
    said = launched(tmp_path, [*options, "--output", tmp_path / "two"], 2)
    assert said.count("10 experiments and 25 scores, 0 of them finished already") == 1
    assert bh.main([*map(str, options), "--output", str(tmp_path / "one")]) == 0
    one = bh.Results.read(tmp_path / "one")
    assert_same_results(bh.Results.read(tmp_path / "two"), one)
    folder = tmp_path / "two" / "checkpoints"
    assert sorted(path.name for path in folder.glob("*")) == [bh.CHECKPOINT_FILE, "process_1.json"]
    keys = keys_by_file(tmp_path / "two")
    assert not set(keys[bh.CHECKPOINT_FILE]) & set(keys["process_1.json"])
    assert {key[2] for key in keys["process_1.json"] if key[0] == "generation"} == {
        prompt["id"] for prompt in bh.TEST_PROMPTS[1::2]
    }
    # As if both had been killed: each file has lost its last rows, one is torn.
    for name, kept, torn in ((bh.CHECKPOINT_FILE, 4, 0), ("process_1.json", 3, 30)):
        lines = (folder / name).read_bytes().splitlines(keepends=True)[: 3 + kept]
        content = b"".join(lines).rstrip(b",\n") + bh.CheckpointFile.END
        (folder / name).write_bytes(content[: len(content) - torn])
    others = (folder / "process_1.json").read_bytes()
    assert bh.main([*map(str, options), "--output", str(tmp_path / "two")]) == 0
    assert "6 of them finished already" in (tmp_path / "two" / bh.LOG_FILE).read_text()
    assert (folder / "process_1.json").read_bytes() == others
    assert len({key for keys in keys_by_file(tmp_path / "two").values() for key in keys}) == 35
    assert_same_results(bh.Results.read(tmp_path / "two"), one)


def test_save_checkpoint_by_hand(mock_model, tmp_path):
    """Harmless at any time: before a suite, where there is nothing to save, and after it."""
    runner = mock_runner(mock_model, tmp_path)
    runner._save_checkpoint()
    runner.run_full_experiment_suite({"bh_flat": FLAT}, PROMPTS[:1], 2)
    runner._save_checkpoint()


# ---------------------------------------------------------------------------------------------------------
# 10. The machine
# ---------------------------------------------------------------------------------------------------------


def test_device_and_dtype(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bh.choose_device("auto") == bh.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(bh.UserError, match="--device cpu"):
        bh.choose_device("cuda")
    with pytest.raises(bh.UserError, match='Did you mean "cuda"'):
        bh.choose_device("cud")
    assert bh.choose_dtype(torch.device("cpu"), "float16") == torch.float16
    assert bh.choose_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with caplog.at_level("INFO"):
        assert bh.choose_dtype(torch.device("cuda")) == torch.float16
    assert "Tesla T4 has no bfloat16" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert bh.choose_dtype(torch.device("cuda")) == torch.bfloat16


def test_damaged_weights(tiny_folder, tmp_path):
    """A model folder whose weights are cut short is one line, not a traceback."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(bh.UserError, match="cannot be loaded"):
        bh.BHExperimentRunner(str(tmp_path / "model"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("kind", ["pickle", "remote code", "no tokenizer", "not a model"])
def test_unsafe_or_broken_model_folders(kind, tiny_folder, tmp_path, capsys):
    """Pickled weights and code that comes with a model are refused, in one line that says the way out."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    if kind == "pickle":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": own}))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / "config.json").write_text("{}")
    assert cli(folder, tmp_path / "out") == 2
    errors = error_lines(capsys)
    assert len(errors) == 1
    assert str(folder) in errors[0]
    assert "safetensors" in errors[0]
    assert not (tmp_path / "ran").exists()


def test_model_options(tiny_folder, tmp_path, caplog):
    """A device map and a dtype are taken; remote code is announced before it could run."""
    with caplog.at_level("WARNING"):
        runner = bh.BHExperimentRunner(
            str(tiny_folder), tmp_path, device_map="auto", dtype="bfloat16", trust_remote_code=True
        )
    assert runner.dtype == "bfloat16"
    assert "will be executed" in caplog.text
    greedy = runner.generate("a small boat", 8)
    texts = []
    for temperature in (1e-3, 2.0):
        runner.sampling = {"temperature": temperature, "top_p": 1.0}
        texts.append(runner.generate("a small boat", 8))
    assert texts[0] == greedy != texts[1]


def test_log_has_no_duplicate_lines(mock_model, tmp_path):
    """However many runners are made, each line is logged once, and no handler is left behind."""
    path = tmp_path / bh.LOG_FILE
    for i in range(3):
        mock_runner(mock_model, tmp_path)
        run_suite(mock_model, tmp_path, prompts=PROMPTS[: i + 1])
    with bh.log_to(path), bh.log_to(path):
        bh.logger.info("only once")
    lines = path.read_text().splitlines()
    assert sum("only once" in line for line in lines) == 1
    assert len(lines) == len(set(lines)) > 3  # a line written twice has the same time
    assert logging.getLogger("bh_experiments").handlers == []


def test_a_second_run_is_refused(mock_model, tmp_path, monkeypatch):
    """It says which process holds the folder, and touches nothing."""
    runner, messages = mock_runner(mock_model, tmp_path), []

    def meanwhile(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        other = copy.copy(runner)
        for resume in (True, False):
            with pytest.raises(bh.UserError, match=f"in use by process {os.getpid()} on") as refused:
                other.run_full_experiment_suite(SMALL, PROMPTS, 2, resume)
            messages.append(str(refused.value))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before

    monkeypatch.setattr(runner, "_warm_up", meanwhile)
    frame = runner.run_full_experiment_suite(SMALL, PROMPTS[:1], 2)
    assert len(messages) == 2
    assert (frame["status"] == "ok").all()
    assert not (tmp_path / ".holder").exists()
    assert len(run_suite(mock_model, tmp_path, SMALL, PROMPTS[:1]).generation) == len(frame)


def test_read_only_folder(tiny_folder, tmp_path, capsys):
    """Exit code 2 and one line, before anything is run."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:  # root may write anywhere but on a file system that is read-only
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a read-only file system here")
    folder.chmod(0o555) if os.geteuid() else None
    try:
        assert cli(tiny_folder, folder / "out", "--max-tokens", 2) == 2
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    errors = [line for line in captured.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(folder) in captured


def test_files_are_as_private_as_the_system_says(mock_model, tmp_path):
    before = os.umask(0o077)
    try:
        run_suite(mock_model, tmp_path / "out", prompts=SCORED_PROMPTS[:1])
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert not [path for path in files if path.stat().st_mode & 0o077]


# ---------------------------------------------------------------------------------------------------------
# 11. Measuring: generation, scores, tasks
# ---------------------------------------------------------------------------------------------------------


SCORED = {"id": "scored", "text": "The river is", "reference": " wide and slow in the plain."}


def tiny_runner(tiny, folder, **options):
    return bh.BHExperimentRunner("tiny", folder, model=tiny.model, tokenizer=tiny.tokenizer, **options)


def test_scores_agree_with_an_independent_computation(tiny, tmp_path):
    """NLL is transformers' own loss; the model's own routing is at KL 0; KL is the textbook sum."""
    ids = torch.tensor([byte_tokenizer()(SCORED["text"] + SCORED["reference"])["input_ids"]])
    context = len(byte_tokenizer()(SCORED["text"])["input_ids"])
    runner = tiny_runner(tiny, tmp_path)
    runner.run_full_experiment_suite(RULES, [SCORED], 4)
    rows = runner.results.scores.set_index("config_name")
    assert list(rows.index) == [*RULES, "topk_1", "topk_3"]
    own = rows.loc["topk_4"]
    assert own["nll"] == pytest.approx(plain_nll(tiny.model, ids, context), abs=1e-4)
    assert own["repeat_nll"] == own["nll"]
    assert (own["kl_to_own"], own["top1_agreement"]) == (0, 1)
    assert (own["num_tokens"], own["num_bytes"]) == (len(SCORED["reference"]),) * 2
    assert own["perplexity"] == pytest.approx(math.exp(own["nll"]))
    assert own["bits_per_byte"] == pytest.approx(own["nll"] / math.log(2))
    generated = runner.results.generation.set_index("config_name")
    assert list(generated.index) == [*RULES]
    assert generated.loc["topk_4", "tokens_until_divergence"] == 4
    for k in (1, 2, 3):
        native = build("olmoe-grouped_mm", top_k=k)
        assert rows.loc[f"topk_{k}", "nll"] == pytest.approx(plain_nll(native, ids, context), abs=1e-4)
    base = logits_of(tiny.model, ids)[0, context - 1 : -1].double().log_softmax(-1)
    with bh.patched_routing(tiny.model, RULES["bh"]):
        other = logits_of(tiny.model, ids)[0, context - 1 : -1].double().log_softmax(-1)
    kl = (base.exp() * (base - other)).sum(-1).mean().item()
    assert rows.loc["bh", "kl_to_own"] == pytest.approx(kl, abs=1e-5)
    assert rows.loc["bh", "kl_to_own"] > 1e-4
    agreement = (base.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert rows.loc["bh", "top1_agreement"] == pytest.approx(agreement)
    assert rows["repeat_nll"].drop("topk_4").isna().all()


def test_perplexity_equals_lm_evaluation_harness(tiny, tmp_path):
    """The same text and windows give the harness's rolling log-likelihood, an optional dependency."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    text = "The quick brown fox jumps over the lazy dog; "[:32] * 6  # one token a byte: six whole windows
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    runner = tiny_runner(tiny, tmp_path / "out")
    items = bh.text_windows([tmp_path / "a.txt"], tiny.tokenizer, 32)
    runner.run_full_experiment_suite({"topk_4": RULES["topk_4"]}, (), texts=items)
    rows = runner.results.scores
    rows = rows[rows["config_name"] == "topk_4"]
    assert rows["num_tokens"].sum() == 192
    total = (rows["nll"] * rows["num_tokens"]).sum()
    model = harness.HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, max_length=32, batch_size=1)
    (expected,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert math.exp(total / 192) == pytest.approx(math.exp(-expected / 192), rel=1e-3)


@pytest.mark.parametrize("ids", [[], [5], [1.5, 2.0], "text", [[1, 2]], None, ["a", "b"], [True, False]])
def test_token_ids(mock_model, tmp_path, ids):
    """A list is as good as an array; anything else is refused before anything runs."""

    def item(token_ids):
        return bh.TextItem("x", "x", "text", token_ids, 1, 12, {})

    with pytest.raises(bh.UserError, match="text 'x': token_ids must be a list of at least 2 whole numbers"):
        item(ids)
    nlls = []
    for number, given_ids in enumerate(([1, 7, 9, 4], np.array([1, 7, 9, 4]), torch.tensor([1, 7, 9, 4]))):
        folder = tmp_path / str(number)
        nlls.append(run_suite(mock_model, folder, {"bh": FLAT}, (), texts=[item(given_ids)]).scores["nll"])
    assert (nlls[0] > 0).all()
    assert nlls[0].equals(nlls[1])
    assert nlls[0].equals(nlls[2])


@pytest.mark.parametrize("context", [0, 4, -1])
def test_a_text_without_context_or_without_anything_to_predict_is_refused(context):
    with pytest.raises(bh.UserError, match=f"text 'x': context = {context}, but it must be 1 to 3"):
        bh.TextItem("x", "x", "text", [1, 7, 9, 4], context, 12, {})


def test_references_without_tokens_are_left_out(mock_model, tmp_path):
    """What a tokenizer makes nothing of cannot be scored: it is said, and the rest is run."""
    prompts = [SCORED_PROMPTS[0], {**PROMPTS[1], "reference": " \n "}]
    results = run_suite(mock_model, tmp_path, prompts=prompts)
    assert results.num_failed == 0
    assert set(results.scores["item_id"]) == {"one"}
    assert len(results.generation) == 4


def windows_of(tokenizer, folder, lengths=(150, 70, 90), window=48):
    """Windows of different lengths from three small files."""
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths):
        (folder / f"{number}.txt").write_text(
            ("The quick brown fox jumps over the lazy dog. " * 5)[number:length]
        )
    return bh.text_windows([folder], tokenizer, window)


BATCH_RULES = {"topk_4": RULES["topk_4"], "bh": RULES["bh"], "bh_shuffled": RULES["bh"] | {"shuffle": True}}


def test_scores_do_not_depend_on_the_batch(tmp_path):
    """Padding is neither scored nor counted: routing equal, NLL equal but for rounding."""
    model, frames = build("olmoe-eager"), []
    for size in (1, 3, "auto"):
        options = {"model": model, "tokenizer": byte_tokenizer(), "batch_size": size}
        runner = bh.BHExperimentRunner("tiny", tmp_path / str(size), **options)
        items = windows_of(runner.tokenizer, tmp_path / "texts")
        assert len({len(item.token_ids) for item in items}) > 1
        runner.run_full_experiment_suite(BATCH_RULES, [SCORED], 2, texts=items)
        frames.append(runner.results.scores)
    exact = ["config_name", "item_id", "num_tokens", "num_bytes", "status", "min_experts", "max_experts"]
    routing = [column.name for column in bh.ROUTING_COLUMNS]
    for frame in frames[1:]:
        assert_same_rows(frame, frames[0], bh.SCORES, exact)
        pd.testing.assert_frame_equal(frame[routing].astype(float), frames[0][routing].astype(float))
        for column in ("nll", "kl_to_own", "bits_per_byte"):
            assert frame[column].to_numpy(float) == pytest.approx(frames[0][column].to_numpy(float), abs=1e-5)
    used = frames[1].groupby("config_name")["batch_size"].max()
    assert used.to_dict() == {name: 1 if name == "bh_shuffled" else 3 for name in used.index}


def test_batches_of_short_texts_are_larger(tmp_path, monkeypatch):
    """The size follows from the length of the texts, whatever came before: as many tokens as fit."""
    runner = bh.BHExperimentRunner("t", tmp_path, model=build("olmoe-eager"), tokenizer=byte_tokenizer())
    monkeypatch.setattr(bh, "AUTO_BATCH_TOKENS", 100)
    items = [text_item(f"{length}-{n}", range(3, 3 + length)) for length in (60, 50, 20) for n in range(6)]
    runner.run_full_experiment_suite({"topk_4": RULES["topk_4"]}, (), texts=items)
    scores = runner.results.scores
    sizes = scores.drop_duplicates("item_id").set_index("item_id")["batch_size"].to_dict()
    assert sizes == {item.id: {60: 1, 50: 2, 20: 5}[len(item.token_ids)] for item in items} | {"20-5": 1}


def test_batch_is_halved_until_memory_suffices(tmp_path, monkeypatch):
    """Out of memory above two rows: all is scored all the same, in rows that say how."""
    model = build("olmoe-eager")
    runner = bh.BHExperimentRunner("tiny", tmp_path / "out", model=model, tokenizer=byte_tokenizer())
    real, sizes = model.forward, []

    def forward(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(input_ids=input_ids, **kwargs)

    items = windows_of(runner.tokenizer, tmp_path / "texts", (190, 170, 150))
    monkeypatch.setattr(model, "forward", forward)
    runner.batch_size = 5
    runner.run_full_experiment_suite({n: RULES[n] for n in ("topk_4", "bh")}, (), texts=items)
    scores = runner.results.scores
    assert len(items) > 7
    assert (scores["status"] == "ok").all()
    assert set(scores["batch_size"]) == {1, 2}
    # What did not fit is not tried again, neither for each configuration nor for the next texts.
    assert sum(size > 2 for size in sizes) == 1
    assert not scores.duplicated(["config_name", "item_id"]).any()
    assert "trying half of it" in (tmp_path / "out" / bh.LOG_FILE).read_text()


def test_samples(mock_model, tmp_path, monkeypatch):
    """Seeded by prompt and sample: the same again in any order; the global generator is left alone."""
    before = torch.random.get_rng_state()
    names = {"topk_8": CONFIGS["topk_8"], "bh_flat": FLAT}

    def suite(folder, prompts, samples):
        runner = mock_runner(mock_model, tmp_path / folder, sampling={"temperature": 1.5})
        runner.run_full_experiment_suite(names, prompts, 5, num_samples=samples)
        return runner.results

    def decoded(self, ids, **_):
        return " ".join(map(str, torch.as_tensor(ids).tolist()))

    monkeypatch.setattr(MockTokenizer, "decode", decoded)
    results = suite("a", SCORED_PROMPTS, 3)
    fewer = suite("b", SCORED_PROMPTS[::-1], 2)
    more = suite("b", SCORED_PROMPTS[::-1], 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    frame = results.generation
    assert (len(frame), len(fewer.generation), len(more.generation)) == (18, 12, 18)
    assert len(results.scores) == len(more.scores) == 3 * 9  # a reference is the same for every sample
    key = ["config_name", "prompt_id", "sample"]
    same = [one.sort_values(key).reset_index(drop=True) for one in (frame, more.generation)]
    assert_same_rows(*same, bh.GENERATION, [name for name in stable(bh.GENERATION) if name != "run_id"])
    texts = frame[frame["config_name"] == "topk_8"].groupby("prompt_id")["generated_text"].nunique()
    assert (texts == 3).all()
    analysis = bh.analyze_results(frame, tmp_path / "a")
    assert analysis["statistical_tests"]["bh_flat"]["avg_experts_per_token"]["n_pairs"] == len(PROMPTS)
    assert json.loads(frame["sampling"][0]) == {"temperature": 1.5, "top_p": 1.0}


# Downstream tasks

TASK_YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
fewshot_split: test
doc_to_text: "{{{{{asked}}}}}"
doc_to_target: "{{{{{target}}}}}"
"""
MINI_TASKS = ["mini", "mini_text"]  # the first is a group of two
TASK_CONFIGS = {name: bh.suites()["all"][name] for name in ("topk_1", "topk_8")}


def write_tasks(folder):
    """Tasks of local data: choosing a continuation, perplexity of texts, generation; and a group."""
    beginnings = [" ".join(prompt["reference"].split()[:5]) for prompt in bh.TEST_PROMPTS]
    rows = [
        {"asked": prompt["text"], "text": beginnings[n], "gold": 0,
         "choices": [beginnings[(n + other) % 12] for other in (0, first, first + 1, first + 2)]}
        for first in (1, 4) for n, prompt in enumerate(bh.TEST_PROMPTS)
    ]  # fmt: skip
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    data = folder / "rows.json"
    few = {"asked": "asked", "target": "text", "data": data}
    generating = "generation_kwargs: {until: ['.'], max_gen_toks: %d, do_sample: false}\n"
    metric = "metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n"
    files = {
        "mini_choice": TASK_YAML.format(name="mini_choice", kind="multiple_choice", **few)
        .replace("{{text}}", "{{gold}}")
        + 'doc_to_choice: "{{choices}}"\n' + metric % "acc",
        "mini_text": TASK_YAML.format(name="mini_text", kind="loglikelihood_rolling", **few)
        + "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n",
        "mini_write": TASK_YAML.format(name="mini_write", kind="generate_until", **few)
        + generating % 3 + metric % "exact_match",
        "too_long": TASK_YAML.format(name="too_long", kind="generate_until", **few)
        + generating % 9999 + metric % "exact_match",
        "far_away": TASK_YAML.format(name="far_away", kind="generate_until", **few)
        .replace("json\n", "nobody/nothing\n", 1) + metric % "exact_match",
        "mini": "group: mini\ntask: [mini_choice, mini_write]\naggregate_metric_list: [{metric: acc}]\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    from lm_eval import tasks

    real = tasks.TaskManager
    with pytest.MonkeyPatch.context() as patch:  # the index of the harness's own tasks takes long
        patch.setattr(tasks, "TaskManager", lambda **options: real(**options | {"include_defaults": False}))
        patch.setenv("HF_HOME", str(folder / "cache"))
        yield folder


def task_runner(folder, **options):
    return bh.BHExperimentRunner(str(EMBEDDED), folder, device="cpu", use_fp16=False, **options)


@pytest.fixture(scope="module")
def task_run(task_folder, tmp_path_factory):
    """Frame and folder of a run of all tasks, with one example in the context."""
    folder = tmp_path_factory.mktemp("task_run")
    how = {"num_fewshot": 1, "limit": 24, "include_path": task_folder}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    runner = task_runner(folder, command="run tasks")
    frame = runner.run_tasks(MINI_TASKS, TASK_CONFIGS, **how)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(table) for table in runner.results] == [0, 0, len(frame)]
    return frame, folder, how


def test_tasks_equal_the_harness_alone(task_run, task_folder):
    """What the harness reports for the unpatched model is in task_results.json, to the last digit."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    frame, folder, how = task_run
    runner = task_runner(folder)
    model = HFLM(pretrained=runner.model, tokenizer=runner.tokenizer, batch_size=1)
    options = {"num_fewshot": how["num_fewshot"], "limit": how["limit"], "use_cache": None}
    manager = TaskManager(include_path=task_folder)
    alone = simple_evaluate(model, tasks=MINI_TASKS, task_manager=manager, **options)
    saved = strict_loads((folder / bh.TASK_RESULTS).read_text())["configurations"]
    together = {task: found for unit in saved["topk_8"].values() for task, found in unit["results"].items()}
    assert together == json.loads(json.dumps(alone["results"], default=float))
    own = frame[frame["config_name"] == "topk_8"].set_index("document")
    for task, samples in alone["samples"].items():
        for sample in samples:
            row = own.loc[f"{task}:{sample['doc_id']}"]
            if row["metric"] == "bits_per_byte":
                total, size = sample["byte_perplexity"]
                assert row["score"] == pytest.approx(-total / size / math.log(2), rel=1e-12)
            else:
                assert row["score"] == sample[row["metric"]]


def test_task_rows(task_run):
    """Documents are paired, differ between configurations, and have the routing they ran with."""
    frame, folder, _ = task_run
    assert_same_rows(bh.read_table(bh.TASKS, folder), frame, bh.TASKS)
    assert not (folder / bh.GENERATION.file).exists()
    assert frame["task"].value_counts().to_dict() == dict.fromkeys(
        ("mini_choice", "mini_write", "mini_text"), 48
    )
    assert frame.groupby("document")["input_hash"].nunique().eq(1).all()  # asked the same
    scores = frame.pivot_table("score", "document", "config_name")
    for task, least in (("mini_choice", 1), ("mini_text", 24)):
        of_task = scores[scores.index.str.startswith(task)]
        assert (of_task["topk_1"] != of_task["topk_8"]).sum() >= least
    assert (frame["avg_experts_per_token"] == frame["config_name"].map({"topk_1": 1, "topk_8": 8})).all()
    assert (frame["generated_text"].fillna("") != "").sum() >= 24
    counts = bh.read_table(bh.EXPERT_COUNTS, folder)
    assert set(counts["kind"]) == {"task"}
    assert (counts["num_experts"] == counts["config_name"].map({"topk_1": 1, "topk_8": 8})).all()


def test_report_of_tasks(task_run):
    """Scores of tasks are tested by document; the report says what the harness says besides."""
    frame, folder, _ = task_run
    empty = bh.Results.read(folder).generation
    analysis = bh.analyze_results(empty, folder)
    bh.write_report(empty, folder)
    report = report_in(folder)
    found = {(entry["task"], entry["configuration"]): entry for entry in analysis["tasks"]}
    one = found["mini_text", "topk_1"]
    scores = frame.pivot_table("score", "document", "config_name")
    difference = (scores["topk_1"] - scores["topk_8"])[scores.index.str.startswith("mini_text")]
    assert one["mean_difference"] == pytest.approx(difference.mean())
    assert one["significant"] is True
    assert one["p_value_adjusted"] >= one["p_value"]
    assert found["mini", "topk_8"]["harness"]["acc,none"]["stderr"] is not None
    assert "`topk_1` on mini\\_text (+" in report
    assert (folder / "plots" / "task_scores.png").exists()


def report_in(folder):
    """The report of a run: nothing of Python's in it, every table of one width."""
    report = (folder / "REPORT.md").read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|None(?! of their)|inf)\b", report)
    assert all(len(widths) == 1 for widths in table_widths(report))
    return report


def test_tasks_resume_after_ctrl_c(task_folder, tmp_path, monkeypatch):
    """A task under a configuration is not run again; interrupted and resumed equals uninterrupted."""
    how = {"limit": 3, "include_path": task_folder}
    frame = task_runner(tmp_path / "uninterrupted").run_tasks(MINI_TASKS, TASK_CONFIGS, **how)
    real, done, stop = bh.BHExperimentRunner._task_row, [], 3

    def task_row(runner, name, config, task, *rest):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append((task, name))
        return real(runner, name, config, task, *rest)

    monkeypatch.setattr(bh.BHExperimentRunner, "_task_row", task_row)
    with pytest.raises(KeyboardInterrupt):
        task_runner(tmp_path).run_tasks(MINI_TASKS, TASK_CONFIGS, **how)
    stop = None
    again = task_runner(tmp_path).run_tasks(MINI_TASKS, TASK_CONFIGS, **how)
    assert done == list(itertools.product(MINI_TASKS, TASK_CONFIGS))
    assert_same_rows(again, frame, bh.TASKS)
    reports = [
        json.loads((path / bh.TASK_RESULTS).read_text()) for path in (tmp_path, tmp_path / "uninterrupted")
    ]
    assert reports[0] == reports[1]
    with pytest.raises(bh.UserError, match="limit is 3 there, 5 here"):
        task_runner(tmp_path).run_tasks(MINI_TASKS, TASK_CONFIGS, **how | {"limit": 5})
    with pytest.raises(bh.UserError, match="holds results of another run"):
        task_runner(tmp_path).run_full_experiment_suite(TASK_CONFIGS, PROMPTS[:1], 2)


def test_tasks_in_batches(task_run, task_folder, tmp_path):
    """Batches change rounding only; padding hides what was routed, so nothing is recorded."""
    frame, *_ = task_run
    runner = task_runner(tmp_path, batch_size=8)
    batched = runner.run_tasks(["mini_text"], TASK_CONFIGS, include_path=task_folder)
    one = frame[frame["task"] == "mini_text"]
    assert list(batched["score"]) == pytest.approx(list(one["score"]), rel=1e-4)
    assert batched["avg_experts_per_token"].isna().all()
    assert not (tmp_path / bh.EXPERT_COUNTS.file).exists()
    bh.write_report(bh.Results.read(tmp_path).generation, tmp_path)
    report_in(tmp_path)


def test_a_failed_task_becomes_a_row(task_folder, tmp_path):
    options = ["--tasks", "too_long,mini_text", "--include-path", task_folder, "--task-limit", 2]
    assert cli(EMBEDDED, tmp_path, "--configs", "topk_8", *options) == 1
    frame = bh.read_table(bh.TASKS, tmp_path)
    assert list(frame["task"]) == ["too_long", "mini_text", "mini_text"]
    assert list(frame["document"]) == ["", "mini_text:0", "mini_text:1"]
    assert list(frame["status"]) == ["error", "ok", "ok"]
    assert "requested max tokens to generate" in frame["error"][0]
    assert "requested max tokens to generate" in report_in(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("mini_chioce", "unknown task 'mini_chioce' in --tasks; close: mini_choice"),
     ("far_away", "far_away cannot be loaded: ConnectionError: Couldn't reach"),
     ("mini,mini_write", "mini_write is in both mini and mini_write")],
)  # fmt: skip
def test_bad_tasks(tasks, message, task_folder, tiny_folder, tmp_path, capsys):
    assert cli(tiny_folder, tmp_path / "out", "--tasks", tasks, "--include-path", task_folder) == 2
    errors = error_lines(capsys)
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("library", "option"), [("datasets", ["--dataset", "x.csv"]), ("lm_eval", ["--tasks", "x"])]
)
def test_a_missing_library_is_named(library, option, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert cli(tiny_folder, tmp_path, *option) == 2
    assert f"pip install {library}" in capsys.readouterr().err


def test_tasks_add_the_models_own_routing(task_folder, tmp_path):
    """Of tasks too: the baseline is run, the side file has the run's id, the log tells how far it is."""
    runner = bh.BHExperimentRunner(str(EMBEDDED), tmp_path, device="cpu", dtype="float32")
    one = {"topk_1": bh.suites()["all"]["topk_1"]}
    with pytest.raises(bh.UserError, match="unknown baseline 'topk_2'"):
        runner.run_tasks(["mini_text"], one, limit=2, include_path=task_folder, baseline="topk_2")
    frame = runner.run_tasks(["mini_text"], one, limit=2, include_path=task_folder)
    assert frame["config_name"].unique().tolist() == ["topk_8", "topk_1"]
    assert frame.groupby("document")["input_hash"].nunique().eq(1).all()
    assert frame["input_hash"].nunique() == 2
    saved = json.loads((tmp_path / bh.TASK_RESULTS).read_text())
    assert {saved["run_id"]} == set(frame["run_id"])
    assert "mini_text under topk_1: 2 of 2" in (tmp_path / bh.LOG_FILE).read_text()
    empty = runner.results.generation
    assert any("harness" in row for row in bh.analyze_results(empty, tmp_path)["tasks"])
    bh.write_json(tmp_path / bh.TASK_RESULTS, saved | {"run_id": "another"})
    assert not any("harness" in row for row in bh.analyze_results(empty, tmp_path)["tasks"])


def test_a_process_runs_its_share_of_tasks(task_folder, tmp_path):
    """Each task under a configuration is run by one process, into its own file; the tables have all."""
    how = {"limit": 2, "include_path": task_folder}
    frame = task_runner(tmp_path / "one").run_tasks(MINI_TASKS, TASK_CONFIGS, **how)
    barrier = threading.Barrier(2, timeout=120)
    runners = [task_runner(tmp_path / "two") for _ in range(2)]
    for rank, runner in enumerate(runners):
        runner.processes = SimpleNamespace(rank=rank, world=2, wait=barrier.wait)
    frames = [None, None]
    alone = threading.Lock()  # what runs in a process is not made for threads
    real = bh.BHExperimentRunner._task_row

    def task_row(*arguments):
        with alone:
            return real(*arguments)

    def run(rank):
        frames[rank] = runners[rank].run_tasks(MINI_TASKS, TASK_CONFIGS, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bh.BHExperimentRunner, "_task_row", task_row)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    keys = keys_by_file(tmp_path / "two")
    assert {name: len(found) for name, found in keys.items()} == {bh.CHECKPOINT_FILE: 2, "process_1.json": 2}
    for found in frames:
        assert_same_rows(found, frame, bh.TASKS)


# ---------------------------------------------------------------------------------------------------------
# 12. BHExperimentRunner
# ---------------------------------------------------------------------------------------------------------

# Set-up


def test_default_suite():
    """Five configurations and twelve prompts, three a category; ids differ, references exist."""
    table = {n: [c.get(f) for f in ("method", "alpha", "temperature")] for n, c in bh.ROUTING_CONFIGS.items()}
    assert table == {
        "topk_8": ["topk", None, None],
        "bh_strict": ["bh", 0.01, 1.0],
        "bh_moderate": ["bh", 0.05, 1.0],
        "bh_loose": ["bh", 0.10, 1.0],
        "bh_adaptive": ["bh", 0.05, 2.0],
    }
    assert all((c.get("k") or c.get("max_k")) == 8 and c["description"] for c in bh.ROUTING_CONFIGS.values())
    categories = [prompt["category"] for prompt in bh.TEST_PROMPTS]
    assert {c: categories.count(c) for c in categories} == dict.fromkeys(
        ("simple", "medium", "complex", "domain_specific"), 3
    )
    assert len({prompt["id"] for prompt in bh.TEST_PROMPTS}) == 12
    assert all(len(prompt["reference"]) > 100 for prompt in bh.TEST_PROMPTS)


def test_ready_model(mock_model, tmp_path):
    """A ready model and tokenizer are taken as they are; making a runner writes nothing."""
    runner = mock_runner(mock_model, tmp_path / "out")
    assert runner.model is mock_model
    assert not runner.model.training
    assert "4 MoE layers x 64 experts, top-8" in repr(runner)
    assert not (tmp_path / "out").exists()


def test_model_folder(tiny_folder, tmp_path):
    """A model folder is loaded on the chosen device, in float32 where 16 bits are not wanted."""
    runner = bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu", use_fp16=False)
    assert (runner.device.type, runner.dtype) == ("cpu", "float32")
    assert [(layer.num_experts, layer.own_k) for layer in runner.layers] == [(16, 4)] * 2


def test_device_none_is_auto(tiny_folder, tmp_path):
    assert bh.BHExperimentRunner(str(tiny_folder), tmp_path, device=None).device == bh.choose_device("auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": MockMoE(layers=1)}, "tokenizer"), ({"tokenizer": MockTokenizer()}, "model="),
     ({"checkpoint_interval": 0}, "checkpoint_interval"), ({"calibration_text": "no.txt"}, "no.txt"),
     ({"device": "gpu"}, "device"), ({}, "models/olmoe-mini")],
)  # fmt: skip
def test_bad_runner(options, message, tmp_path):
    """Bad arguments, and a model name that is nowhere, get one line that says what to do."""
    with pytest.raises(bh.UserError, match=message) as error:
        bh.BHExperimentRunner("nobody/no-such-model", tmp_path, **options)
    assert "\n" not in str(error.value)


def test_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))
    with pytest.raises(bh.UserError, match="LlamaForCausalLM has no router"):
        mock_runner(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"method": "bhh"}, 'Did you mean "bh"'), ({}, "method"),
     ({"method": "bh", "k": 3}, "k does not apply"),
     ({"method": "topk", "k": 0}, "k = 0"), ({"method": "bh", "alpha": 2}, "alpha = 2"),
     ({"method": "bh", "min_k": 5, "max_k": 4}, "min_k = 5"),
     ({"method": "bh", "p_values": "flatt"}, f"must be one of {', '.join(bh.NULLS)}"),
     ({"method": "bh", "alhpa": 0.1}, "alhpa"), ({"method": "topk", "k": 65}, "65"),
     ({"method": "topk", "k": [1, 2]}, "k has 2 values, but the model has 4 MoE layers"),
     ({"method": "bh", "layers": [4]}, "4 MoE layers, 0 to 3")],
)  # fmt: skip
def test_bad_configuration(config, message, mock_model, tmp_path):
    """Refused before anything is run, with the configuration's name, the field and what is allowed."""
    with pytest.raises(bh.UserError, match=message):
        run_suite(mock_model, tmp_path / "out", {"mine": config}, PROMPTS)
    assert not (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path / "out")._apply_routing_config(config)


def test_import_is_cheap_and_silent(tmp_path):
    """The script alone in an empty folder can be imported, prints nothing and loads no heavy library."""
    shutil.copy(HERE / "run_bh_experiments.py", tmp_path)
    code = (
        "import sys, logging, run_bh_experiments as b; "
        "assert not b.logger.handlers and not logging.root.handlers; "
        "heavy = {'transformers', 'accelerate', 'matplotlib', 'seaborn', 'scipy', 'jinja2'}; "
        "print(*heavy & set(sys.modules), end='')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("seed", [99999999999999999999, 2**63, -1])
def test_seeds_out_of_range(seed, mock_model, tmp_path, capsys):
    message = f"seed {seed}: it must be a whole number from 0 to {2**63 - 1}"
    assert bh.main(["--model", "nowhere", "--output", str(tmp_path), f"--seed={seed}"]) == 2
    assert f"--{message}" in capsys.readouterr().err
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path, seed=seed)


def test_largest_seed(mock_model, tmp_path):
    runner = mock_runner(mock_model, tmp_path, seed=2**63 - 1, sampling={})
    frame = runner.run_full_experiment_suite({"bh": FLAT}, PROMPTS[:1], 2)
    assert frame["status"].tolist() == ["ok"] * 2  # also of the model's own routing
    assert frame["seed"].tolist() == [2**63 - 1] * 2
    assert len(bh.sample_calibration_text(mock_model, MockTokenizer(), 2**63 - 1))


# One experiment


@pytest.mark.parametrize("name", ["topk_8", "bh_flat", "bh_moderate"])
def test_row(subject, name, tmp_path):
    """A row has exactly the columns of its table, its values agree, and the model is clean afterwards."""
    runner = bh.BHExperimentRunner("x", tmp_path, model=subject.model, tokenizer=subject.tokenizer)
    runner.calibration = subject.calibration
    config = {**CONFIGS, **bh.ROUTING_CONFIGS}[name]
    before = state_of(subject.model)
    row = runner.run_single_experiment(name, config, PROMPTS[0], max_new_tokens=6)
    assert list(row) == bh.GENERATION.names
    assert state_of(subject.model) == before
    assert (row["status"], row["error"], row["max_new_tokens"]) == ("ok", "", row["num_output_tokens"])
    assert row["num_output_tokens"] == 6
    assert row["num_input_tokens"] == len(subject.tokenizer(PROMPTS[0]["text"])["input_ids"])
    assert row["full_text"] == PROMPTS[0]["text"] + row["generated_text"]
    assert row["tokens_per_sec"] == pytest.approx(6 / row["inference_time_sec"])
    decode = row["inference_time_sec"] - row["time_to_first_token_sec"]
    assert row["decode_sec_per_token"] == pytest.approx(decode / 5)
    low, high = (subject.own_k,) * 2 if name == "topk_8" else (config["min_k"], config["max_k"])
    assert low <= row["min_experts"] <= row["avg_experts_per_token"] <= row["max_experts"] <= high
    shown = json.loads(row["configuration"])
    assert list(shown) == ["method", *(field.name for field in bh.RULES[config["method"]].fields)]
    assert row["own_k"] == subject.own_k
    if name == "topk_8":
        assert (shown["k"], row["avg_experts_per_token"], row["std_experts_per_token"]) == (low, low, 0)
        assert row["floor_frac"] is row["cap_frac"] is row["zero_rejection_frac"] is None
        assert "alpha" not in shown
    else:
        assert shown["alpha"] == config["alpha"]
    json.dumps(bh.strict_json(row), allow_nan=False)


def test_end_of_text_does_not_end_early(tmp_path):
    """Every experiment makes the same number of tokens, so that clocks compare equal work."""
    model, tokenizer = build("olmoe-grouped_mm"), byte_tokenizer()
    model.lm_head.weight.data[257:] = 0  # only tokens that the tokenizer has
    ids = tokenizer(PROMPTS[0]["text"], return_tensors="pt")["input_ids"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(logits_of(model, ids)[0, -1].argmax().item())
    runner = bh.BHExperimentRunner("x", tmp_path, model=model, tokenizer=tokenizer)
    row = runner.run_single_experiment("topk_8", bh.ROUTING_CONFIGS["topk_8"], PROMPTS[0], 5)
    assert row["num_output_tokens"] == 5


def test_run_again_gives_the_same(mock_model, tmp_path):
    """Two runs agree in every column but the clocks, also for a calibration that is sampled anew."""
    asked = ("bh_loose", bh.ROUTING_CONFIGS["bh_loose"], PROMPTS[1], 5)
    first, second = (mock_runner(mock_model, tmp_path / n).run_single_experiment(*asked) for n in "ab")
    names = stable(bh.GENERATION)
    assert {name: first[name] for name in names} == {name: second[name] for name in names}


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [({"text": "word " * 250, "id": "long"}, 7, "context of 256"),
     ({"text": " \n", "id": "blank"}, 2, "blank"),
     ({"id": "none"}, 2, "none"), ({"text": "fine", "id": "zero"}, 0, "max_new_tokens")],
)  # fmt: skip
def test_bad_prompt(mock_model, tmp_path, prompt, tokens, message):
    """Refused with the prompt's id or the argument's name; the model stays clean."""
    before = state_of(mock_model)
    with pytest.raises(ValueError, match=message):
        mock_runner(mock_model, tmp_path).run_single_experiment("bh_flat", FLAT, prompt, tokens)
    assert state_of(mock_model) == before


# A mini suite


def test_mini_suite(mock_model, tmp_path):
    """2 configurations x 3 prompts: every pair once, configurations in turn, CSV equal to the frame."""
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(CONFIGS, PROMPTS, 5)
    assert list(frame) == bh.GENERATION.names
    pairs = list(zip(frame["config_name"], frame["prompt_id"], strict=True))
    assert pairs == [(name, prompt["id"]) for prompt in PROMPTS for name in CONFIGS]
    assert (frame["status"] == "ok").all()
    assert frame["prompt_category"].tolist()[::2] == ["plain", "awkward", "NA"]
    read = bh.read_table(bh.GENERATION, tmp_path)
    assert_same_rows(read, frame, bh.GENERATION, bh.GENERATION.names)
    assert read["max_new_tokens"].tolist() == [5] * 6
    stored = pd.DataFrame(rows_in(tmp_path / "checkpoints" / bh.CHECKPOINT_FILE))
    stored["run_id"] = frame["run_id"]  # a run's, not a row's: a larger run may take the row over
    assert_same_rows(stored, frame, bh.GENERATION, bh.GENERATION.names)
    assert not (tmp_path / bh.SCORES.file).exists()  # no prompt has a reference


def test_prompts_and_texts_together(mock_model, tmp_path):
    """Prompts are continued, their references and the texts scored, each document by itself; the row of a
    text is the same whatever is run beside it."""
    results = run_suite(mock_model, tmp_path / "both", texts=WINDOWS)
    pairs = list(zip(results.generation["config_name"], results.generation["prompt_id"], strict=True))
    assert pairs == [(name, prompt["id"]) for prompt in SCORED_PROMPTS for name in CONFIGS]
    scoring = [*CONFIGS, *LADDER]
    items = [*(prompt["id"] for prompt in SCORED_PROMPTS), *(item.id for item in WINDOWS)]
    scores = results.scores
    pairs = list(zip(scores["config_name"], scores["item_id"], strict=True))
    assert pairs == [(name, item) for item in items for name in scoring]
    documents = scores.drop_duplicates("item_id").set_index("item_id")
    assert documents["document"].tolist() == ["one", "two", "three", "file", "file", "file"]
    assert documents["category"].tolist() == ["plain", "awkward", "NA", "text", "text", "text"]
    assert len(results.tasks) == 0
    assert results.num_failed == 0
    analysis = bh.analyze_results(results.generation, tmp_path / "both")
    assert (analysis["verdict"]["bh_flat"]["n_items"], analysis["verdict"]["bh_flat"]["n_units"]) == (3, 1)
    assert analysis["n_prompts"] == 3
    for name, asked in (("prompts", {}), ("texts", {"prompts": (), "texts": WINDOWS})):
        alone = run_suite(mock_model, tmp_path / name, **asked).scores
        beside = scores[scores["item_id"].isin(set(alone["item_id"]))].reset_index(drop=True)
        for column in ("nll", "kl_to_own", "avg_experts_per_token"):
            assert alone[column].to_numpy(float) == pytest.approx(beside[column].to_numpy(float), abs=1e-5)
        assert alone["input_hash"].equals(beside["input_hash"])


def test_texts_only(mock_model, tmp_path, monkeypatch):
    """Nothing is generated: no table of generated texts, neither in the folder nor in the report."""
    only_plots(monkeypatch, "quality_vs_experts", "inference_time_comparison")
    runner = mock_runner(mock_model, tmp_path)
    monkeypatch.setattr(mock_model, "generate", lambda **options: 1 / 0)
    frame = runner.run_full_experiment_suite(CONFIGS, (), texts=WINDOWS)
    assert (len(frame), list(frame)) == (0, bh.GENERATION.names)
    assert frame is runner.results.generation
    assert not (tmp_path / bh.GENERATION.file).exists()
    assert len(runner.results.scores) == 3 * 9
    assert set(bh.read_table(bh.LAYER_STATISTICS, tmp_path)["kind"]) == {"score"}
    bh.write_report(frame, tmp_path)
    report = report_in(tmp_path)
    assert "Against static Top-K that spends the same number of experts" in report
    assert [path.stem for path in (tmp_path / "plots").iterdir()] == ["quality_vs_experts"]


def test_references_are_documents_of_the_scored_text(mock_model, tmp_path):
    """Each reference is an item and a document of its own, scored after its prompt, once, by every
    configuration and the static ladder; a prompt without one is generated only."""
    prompts = [*SCORED_PROMPTS, {"id": "none", "text": "nothing follows"}]
    results = run_suite(mock_model, tmp_path, prompts=prompts)
    scores = results.scores
    assert (scores["item_id"] == scores["document"]).all()
    assert scores["item_id"].unique().tolist() == ["one", "two", "three"]
    assert scores.groupby("item_id")["config_name"].agg(list).tolist() == [[*CONFIGS, *LADDER]] * 3
    for prompt in SCORED_PROMPTS:
        rows = scores[scores["item_id"] == prompt["id"]]
        assert (rows["category"] == prompt["category"]).all()
        assert (rows["num_tokens"] == len(prompt["reference"].split())).all()
        assert (rows["num_bytes"] == len(prompt["reference"].encode())).all()
        ids = MockTokenizer()(prompt["text"] + " " + prompt["reference"], return_tensors="pt")["input_ids"]
        given_tokens = len(prompt["text"].split())
        logits = logits_of(mock_model, ids)[0, given_tokens - 1 : -1]
        nll = nn.functional.cross_entropy(logits, ids[0, given_tokens:]).item()
        assert rows["nll"].iloc[0] == pytest.approx(nll, abs=1e-5)
    assert set(results.generation["prompt_id"]) == {"one", "two", "three", "none"}


def test_each_row_is_run_with_its_own_configuration(mock_model, tmp_path):
    """The cell holds every field of the rule as JSON; what it says decides what was run."""
    per_layer = {"method": "topk", "k": [1, 2, 3, 4]}
    last = {**FLAT, "layers": "last 2"}
    results = run_suite(mock_model, tmp_path, {"per_layer": per_layer, "last": last})
    assert results.num_failed == 0
    cells = {}
    for frame in (results.generation, results.scores):
        cells |= frame.drop_duplicates("config_name").set_index("config_name")["configuration"].to_dict()
        means = frame.groupby("config_name")["avg_experts_per_token"].mean()
        assert means["per_layer"] == 2.5
        assert 4.5 <= means["last"] <= 6  # the first two as they are, the others 1 to 4
    assert json.loads(cells["per_layer"])["k"] == [1, 2, 3, 4]
    assert json.loads(cells["last"])["layers"] == [2, 3]
    usual = {"renormalize": "model", "stand_in": "nothing", "layers": "all"}
    assert json.loads(cells["topk_8"]) == {"method": "topk", "k": 8, **usual}


def test_failed_experiment_becomes_a_row(mock_model, tmp_path, monkeypatch):
    """The error is recorded with its configuration and prompt, and the other experiments are run."""
    long = {"id": "long", "text": "word " * 300, "reference": "and more"}
    results = run_suite(mock_model, tmp_path, prompts=[SCORED_PROMPTS[0], long, PROMPTS[2]], tokens=3)
    only_plots(monkeypatch)
    frame = results.generation
    assert frame["status"].tolist() == ["ok", "ok", "error", "error", "ok", "ok"]
    failed = frame[frame["status"] == "error"]
    assert failed["error"].str.contains("context of 256").all()
    assert failed["avg_experts_per_token"].isna().all()
    assert (failed["prompt_id"] == "long").all()
    scores = results.scores
    assert scores.groupby("item_id")["status"].unique().map(list).to_dict() == {
        "one": ["ok"],
        "long": ["error"],
    }
    assert scores.loc[scores["item_id"] == "long", "error"].str.contains("exceed this model's context").all()
    assert_same_results(bh.Results.read(tmp_path), results)
    analysis = bh.analyze_results(frame, tmp_path)
    assert (analysis["n_rows"], analysis["n_failed"]) == (6 + 18, 2 + 9)
    bh.write_report(frame, tmp_path)
    assert "Failed experiments" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("configs", "prompts", "tokens", "message"),
    [({}, PROMPTS, 2, "at least one"), (CONFIGS, [], 2, "at least one"),
     (CONFIGS, PROMPTS[:1] * 2, 2, "'one' occurs"),
     (CONFIGS, [{"text": ""}], 2, "no text"), (CONFIGS, PROMPTS, 0, "max_new_tokens 0")],
)  # fmt: skip
def test_bad_suite(mock_model, tmp_path, configs, prompts, tokens, message):
    with pytest.raises(bh.UserError, match=message):
        run_suite(mock_model, tmp_path / "out", configs, prompts, tokens)
    assert not (tmp_path / "out").exists()


def test_texts_and_references_need_different_ids(mock_model, tmp_path):
    with pytest.raises(bh.UserError, match="'one' occurs 2 times"):
        run_suite(mock_model, tmp_path / "out", texts=[text_item("one", range(5, 9))])
    assert not (tmp_path / "out").exists()


def test_one_new_token(mock_model, tmp_path, monkeypatch):
    """With a single new token there is no decode time: left out of plots and report, not an error."""
    names = ("avg_experts_comparison", "inference_time_comparison", "expert_utilization_cv")
    only_plots(monkeypatch, *names, "experts_by_category", "experts_vs_latency")
    frame = run_suite(mock_model, tmp_path, prompts=PROMPTS, tokens=1).generation
    assert (frame["status"] == "ok").all()
    assert frame["decode_sec_per_token"].isna().all()
    bh.write_report(frame, tmp_path)
    report_in(tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {*names, "experts_by_category"}


def test_exit_codes(tiny_folder, tmp_path, monkeypatch, capsys):
    """0 done, 1 when an experiment failed, 130 after Ctrl-C with a hint how to go on; never a traceback."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "ROUTING_CONFIGS", CONFIGS)
    monkeypatch.setattr(bh, "TEST_PROMPTS", PROMPTS[:2])
    with monkeypatch.context() as patch:

        def interrupt(*args):
            raise KeyboardInterrupt

        patch.setattr(bh.BHExperimentRunner, "_generated_row", interrupt)
        assert cli(tiny_folder, tmp_path, "--max-tokens", 2, "--text", "none") == 130
    assert "same command goes on" in capsys.readouterr().err
    assert cli(tiny_folder, tmp_path, "--max-tokens", 2, "--text", "none") == 0
    monkeypatch.setattr(bh, "TEST_PROMPTS", [*PROMPTS[:2], {"id": "long", "text": "x" * 800}])
    assert cli(tiny_folder, tmp_path, "--max-tokens", 2, "--text", "none") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert bh.logger.handlers == []


def refused_in_one_line(options, model_folder, folder, capsys):
    """The one line that a command line ends with, by exit code 2."""
    assert cli(model_folder, folder / "out", *options) == 2
    (error,) = error_lines(capsys)
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--max-tokens", "0"], "--max-tokens 0"), (["--checkpoint-interval", "0"], "--checkpoint-interval 0"),
     (["--calibration-text", "no.txt"], "no.txt"), (["--model", "nobody/no-such-model"], "models/olmoe-mini"),
     (["--output", "{file}"], "{file}"), (["--output", "{file}/x"], "{file}")],
)  # fmt: skip
def test_bad_command_lines(options, message, tiny_folder, tmp_path, capsys):
    """Wrong input ends with exit code 2 and one line that names it."""
    file = tmp_path / "file"
    file.write_text("keep me")
    options = [option.replace("{file}", str(file)) for option in options]
    error = refused_in_one_line(options, tiny_folder, tmp_path, capsys)
    assert message.replace("{file}", str(file)) in error
    assert file.read_text() == "keep me"


# Faults


class OutOfMemory(torch.OutOfMemoryError):
    pass


FAULTS = {
    "memory": "OutOfMemory",
    "nan": "FloatingPointError",
    "inf": "FloatingPointError",
    "exception": "Boom",
}
UNLUCKY = {"id": "bad", "text": "the faulty prompt", "reference": " and its unlucky end"}


def faulty_forward(fault, word):
    """A `forward` of the mock model that goes wrong, in patched layers, wherever it reads `word`."""
    real = MockMoE.forward
    marker = MockTokenizer()(word)["input_ids"][0]

    def forward(self, input_ids, *arguments, **options):
        output = real(self, input_ids, *arguments, **options)
        is_patched = any(hasattr(layer.gate, "_bh_patched") for layer in self.layers)
        is_bad = (input_ids == marker).any(-1)
        if is_patched and is_bad.any():
            if fault == "memory":
                raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")
            if fault == "exception":
                raise Boom("a line\nand another")
            output.logits[is_bad, :, 5] = math.nan if fault == "nan" else math.inf
        return output

    return forward


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("word", ["faulty", "unlucky"])
def test_a_fault_is_a_row_and_can_be_tried_again(tmp_path, monkeypatch, fault, word):
    """Whatever goes wrong in one prompt: rows say so, the model is healthy, the others are run; the retry
    gives what a run without fault gives; --fail-fast stops at the first."""
    model = small_mock()
    before, ids = state_of(model), sample_ids()
    expected = logits_of(model, ids)
    prompts = [SCORED_PROMPTS[0], UNLUCKY, PROMPTS[2]]

    def suite(folder, **options):
        runner = mock_runner(model, tmp_path / folder, batch_size=1)
        runner.run_full_experiment_suite(CONFIGS, prompts, 3, **options)
        return runner.results

    whole = suite("whole")
    with monkeypatch.context() as patch:
        patch.setattr(MockMoE, "forward", faulty_forward(fault, word))
        results = suite("out")
        in_generation = (
            ["error"] * 2 if word == "faulty" else ["ok"] * 2
        )  # the last word is read in scoring only
        assert results.generation["status"].tolist() == ["ok", "ok", *in_generation, "ok", "ok"]
        assert results.scores["status"].tolist() == ["ok"] * 3 + ["error"] * 3  # its static ladder is Top-1
        errors = pd.concat([frame.loc[frame["status"] == "error", "error"] for frame in results])
        assert errors.str.startswith(FAULTS[fault]).all()
        first = suite("fast", fail_fast=True)
        assert first.num_failed == 1
        assert len(first.generation) == (3 if word == "faulty" else 6)
    assert state_of(model) == before
    assert torch.equal(logits_of(model, ids), expected)
    again = suite("out")
    assert_same_results(again, results)
    assert_same_results(suite("out", retry_failed=True), whole)
    assert_same_results(suite("fast", retry_failed=True), whole)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_text_in_a_batch_fails_alone(tmp_path, monkeypatch, fault):
    """The texts that shared its batch are scored: by halves where memory was short, else one by one."""
    model = small_mock()
    prompts = [*SCORED_PROMPTS, UNLUCKY]
    windows = [text_item(f"w{n}", range(6 + n, 18 + n)) for n in range(4)]
    whole = run_suite(model, tmp_path / "whole", prompts=prompts, texts=windows).scores
    assert set(whole["batch_size"]) == {8}
    with monkeypatch.context() as patch:
        patch.setattr(MockMoE, "forward", faulty_forward(fault, "unlucky"))
        results = run_suite(model, tmp_path / "out", prompts=prompts, texts=windows)
    scores = results.scores
    assert results.num_failed == 3
    is_bad = scores["item_id"] == "bad"
    assert scores["status"].tolist() == ["error" if bad else "ok" for bad in is_bad]
    assert scores.loc[is_bad, "error"].str.startswith(FAULTS[fault]).all()
    assert scores.loc[is_bad, "nll"].isna().all()
    for column in ("nll", "kl_to_own", "avg_experts_per_token"):
        values = scores.loc[~is_bad, column].to_numpy(float)
        assert values == pytest.approx(whole.loc[~is_bad, column].to_numpy(float), abs=1e-5)
    sizes = {1, 2, 4} if fault == "memory" else {1}
    assert set(scores.loc[~is_bad, "batch_size"]) == sizes
    assert (scores.loc[is_bad, "batch_size"].isna()).all()
    assert not scores.duplicated(["config_name", "item_id"]).any()
    log = (tmp_path / "out" / bh.LOG_FILE).read_text()
    assert ("trying half of it" if fault == "memory" else "a batch of 8 failed") in log
    again = run_suite(model, tmp_path / "out", prompts=prompts, texts=windows, retry_failed=True)
    assert again.num_failed == 0


def test_a_fault_of_one_configuration_is_its_own(tmp_path, monkeypatch):
    """A text that fails under one configuration is scored by the others, in the batch it was in."""
    model = build("mock")
    real = bh._LayerRouting.count

    def count(routing, logits, output_norms):
        if routing.config["method"] == "bh" and len(logits) > 30:  # not where it is asked once beforehand
            raise Boom("not with so many")
        return real(routing, logits, output_norms)

    monkeypatch.setattr(bh._LayerRouting, "count", count)
    results = run_suite(model, tmp_path, prompts=SCORED_PROMPTS, texts=WINDOWS)
    assert results.num_failed == 0
    sizes = results.scores.groupby("config_name")["batch_size"].unique().map(list).to_dict()
    assert sizes == {"bh_flat": [1]} | {name: [6] for name in LADDER} | {"topk_8": [6]}


def test_out_of_memory_in_generation_is_a_row(tmp_path, monkeypatch):
    """Only the experiment that was too big; the model is as it was."""
    model = build("mock")
    before = state_of(model)
    real = bh.PromptRun.generate

    def generate(run):
        if len(run.text) > 20 and any(hasattr(layer.gate, "_bh_patched") for layer in model.layers):
            raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")
        return real(run)

    monkeypatch.setattr(bh.PromptRun, "generate", generate)
    results = run_suite(model, tmp_path)
    assert results.generation["status"].tolist() == ["error"] * 4 + ["ok"] * 2
    assert (results.scores["status"] == "ok").all()
    assert state_of(model) == before
    assert "OutOfMemory: CUDA out of memory" in results.generation["error"][0]


def test_interrupted_at_any_call(mock_model, tmp_path, monkeypatch):
    """Ctrl-C in any layer of any forward pass of a suite leaves the model as it was."""
    before, ids = state_of(mock_model), sample_ids()
    expected, real, calls = logits_of(mock_model, ids), MockExperts.forward, [0, 0]

    def forward(self, *arguments):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(MockExperts, "forward", forward)
    run_suite(mock_model, tmp_path / "whole", SMALL, tokens=4)
    in_all = calls[0]
    for stop in (1, 2, 7, 30, 61, 100, in_all - 60, in_all - 5, in_all - 1):  # the last ones in scoring
        calls[:] = [0, stop]
        with pytest.raises(KeyboardInterrupt):
            run_suite(mock_model, tmp_path / str(stop), SMALL, tokens=4)
        calls[:] = [0, 0]
        assert state_of(mock_model) == before
        assert not mock_model._forward_pre_hooks
        assert torch.equal(logits_of(mock_model, ids), expected)


# What belongs to a run


def test_every_field_and_argument_is_classified():
    """A new field of a prompt or argument of a run must be said to be part of the identity, or not to be."""
    tree, read = ast.parse(Path(bh.__file__).read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):  # prompt["field"], wherever the script reads one
        owner = ast.unparse(node.value) if isinstance(node, ast.Subscript) else ""
        if owner == "prompt" and isinstance(node.slice, ast.Constant):
            read.add(node.slice.value)
    assert {"reference", "text", "category"} <= read
    assert set(bh.PROMPT_IDENTITY) == {*bh.PROMPT_FIELDS, *read}
    runner = bh.BHExperimentRunner
    calls = (runner.__init__, runner.run_full_experiment_suite, runner.run_tasks)
    arguments = {name for call in calls for name in inspect.signature(call).parameters} - {"self"}
    assert set(bh.RUN_IDENTITY) == arguments


def test_settings_hold_what_is_classified_as_theirs(mock_model, tmp_path):
    """Each entry that an argument is classified to be held by is there, and each entry holds an argument."""
    entries = set(bh.RUN_IDENTITY.values()) - {bh.BY_ROW, bh.NOTHING}
    run_suite(mock_model, tmp_path, prompts=PROMPTS[:1])
    head = (tmp_path / "checkpoints" / bh.CHECKPOINT_FILE).read_text().splitlines()[1]
    of_suite = set(json.loads(head.removeprefix('"settings": ').rstrip(",")))
    of_tasks = {"num_fewshot", "limit", "task_files"}  # see test_tasks_resume_after_ctrl_c
    assert entries == of_suite | of_tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 7}, "max_new_tokens is 6 there, 7 here"), ({"seed": 3}, "seed is 0 there, 3 here"),
     ({"configs": {**SUITE, "bh_flat": {**FLAT, "alpha": 0.25}}}, "alpha = 0.5, now it is 0.25"),
     ({"configs": {**SUITE, "bh_flat": {**FLAT, "layers": [1]}}}, r"layers = 'all', now it is \[1\]"),
     ({"prompts": [{**PROMPTS[0], "text": "other"}]}, "topk_8 x one, run with another text"),
     ({"model": "other weights"}, "model is")],
)  # fmt: skip
def test_other_runs_results_are_refused(mock_model, tmp_path, uninterrupted, change, message):
    """Other settings, weights, configuration or prompt under the same name: refused, untouched."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[1], folder)
    path = folder / "checkpoints" / bh.CHECKPOINT_FILE
    before = path.read_bytes()
    model = mock_model
    if "model" in change:
        model = copy.deepcopy(mock_model)
        model.layers[2].experts.up.data += 1e-3
    runner = mock_runner(model, folder, seed=change.get("seed", 0))
    asked = (change.get("configs", SUITE), change.get("prompts", SCORED_PROMPTS), change.get("tokens", 6))
    with pytest.raises(bh.UserError, match=message):
        runner.run_full_experiment_suite(*asked)
    assert path.read_bytes() == before


CHANGES = {
    "text": {"text": "another boat on the river"},
    "reference": {"reference": "and snow on the way back"},
    "category": {"category": "other"},
}
SCORE_FIELDS = ("text", "category", "reference")  # what a reference's scores depend on


@pytest.mark.parametrize("field", CHANGES)
def test_another_prompt_is_refused(field, mock_model, tmp_path):
    """A folder whose rows come of another input is refused, naming configuration, prompt and field."""
    run_suite(mock_model, tmp_path)
    path = tmp_path / "checkpoints" / bh.CHECKPOINT_FILE
    before = path.read_bytes()
    changed = [SCORED_PROMPTS[0] | CHANGES[field], *SCORED_PROMPTS[1:]]
    more = CONFIGS | {"bh_third": {**FLAT, "alpha": 0.1}}
    message = f"topk_8 x one, run with another {field}; choose another --output"
    with pytest.raises(bh.UserError, match=message):
        run_suite(mock_model, tmp_path, more, changed)
    assert path.read_bytes() == before
    described = [prompt | {"description": "new words"} for prompt in SCORED_PROMPTS]
    assert len(run_suite(mock_model, tmp_path, more, described).generation) == 9


def test_each_field_of_a_prompt_counts_where_it_is_fed_in():
    """The hashes of what is generated, and of what is scored, follow the fields that they depend on."""
    assert set(CHANGES) == set(bh.PROMPT_FIELDS) - {"id", "description"}
    base = bh.resolve_prompt(SCORED_PROMPTS[0])
    tokenizer = MockTokenizer()
    for field in bh.PROMPT_FIELDS:
        changed = bh.resolve_prompt(base | CHANGES.get(field, {field: "new words"}))
        assert (bh.input_hashes(changed) != bh.input_hashes(base)) == bh.PROMPT_IDENTITY[field]
        (was,), (now,) = (bh.reference_items([prompt], tokenizer) for prompt in (base, changed))
        assert (now.inputs != was.inputs) == (field in SCORE_FIELDS)


@pytest.mark.parametrize("field", ["token_ids", "document"])
def test_another_text_is_refused(field, mock_model, tmp_path):
    """Also one whose tokens the tokenizer decodes as before, and one of another file."""
    run_suite(mock_model, tmp_path, prompts=(), texts=WINDOWS)
    path = tmp_path / "checkpoints" / bh.CHECKPOINT_FILE
    before = path.read_bytes()
    ids = [*range(6, 17), 500] if field == "token_ids" else range(6, 18)
    changed = text_item("w0", ids, "other" if field == "document" else "file")
    with pytest.raises(bh.UserError, match=f"topk_8 x w0, run with another {field}; choose another --output"):
        run_suite(mock_model, tmp_path, prompts=(), texts=[changed, *WINDOWS[1:]])
    assert path.read_bytes() == before
    results = run_suite(mock_model, tmp_path, prompts=SCORED_PROMPTS, texts=WINDOWS)  # more is no other
    assert len(results.scores) == 6 * 9


def test_windows_of_other_text_are_other_inputs(tmp_path):
    """`text_windows` hashes tokens and document of each window."""
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("one two three four " * 4)
    (tmp_path / "b.txt").write_text("one two three four " * 3 + "one two three five ")
    first, second = (bh.text_windows([tmp_path / name], tokenizer, 32) for name in ("a.txt", "b.txt"))
    same = [
        one.inputs["token_ids"] == two.inputs["token_ids"] for one, two in zip(first, second, strict=True)
    ]
    assert same == [True, True, False][: len(same)]
    assert all(
        one.inputs["document"] != two.inputs["document"] for one, two in zip(first, second, strict=True)
    )


def test_a_reference_taken_away_is_not_scored(mock_model, tmp_path, monkeypatch):
    """What was generated stays as it is: it does not depend on the reference."""
    before = run_suite(mock_model, tmp_path)
    calls = Calls(monkeypatch, 2)
    results = run_suite(mock_model, tmp_path, prompts=PROMPTS)
    assert len(calls) == 0
    names = [name for name in bh.GENERATION.names if name != "run_id"]
    assert_same_rows(results.generation, before.generation, bh.GENERATION, names)
    assert len(results.scores) == 0
    assert not (tmp_path / bh.SCORES.file).exists()
    assert set(bh.read_table(bh.LAYER_STATISTICS, tmp_path)["kind"]) == {"generation"}
    assert_same_results(run_suite(mock_model, tmp_path), before)
    assert len(calls) == 0


def test_another_tokenizer_is_refused(mock_model, tmp_path, monkeypatch):
    """The same weights with other token ids are another run."""
    run_suite(mock_model, tmp_path)
    real = MockTokenizer.__call__

    def shifted(self, text, **options):
        return real(self, f"begin {text}", **options)

    monkeypatch.setattr(MockTokenizer, "__call__", shifted)
    with pytest.raises(bh.UserError, match="tokenizer is"):
        run_suite(mock_model, tmp_path)


def test_rows_carry_a_hash_of_their_input(mock_model, tmp_path):
    """16 hex digits, the same for what is fed the same, another for any other field."""
    runner = mock_runner(mock_model, tmp_path)
    prompts = [SCORED_PROMPTS[0], *(SCORED_PROMPTS[0] | CHANGES[field] for field in ("text", "category"))]
    rows = [runner.run_single_experiment("bh_flat", FLAT, prompt, 1) for prompt in prompts]
    hashes = [row["input_hash"] for row in rows]
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)
    assert len(set(hashes)) == len(prompts)
    for change in ({"description": "x"}, CHANGES["reference"]):
        again = runner.run_single_experiment("topk_8", TOP_8["topk_8"], SCORED_PROMPTS[0] | change, 2)
        assert again["input_hash"] == hashes[0]
    scored = run_suite(mock_model, tmp_path / "suite", TOP_8, texts=WINDOWS).scores
    assert scored.groupby("item_id")["input_hash"].nunique().eq(1).all()
    assert scored["input_hash"].nunique() == 6


# The files of a run


def files_below(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_no_resume_sets_everything_aside(mock_model, tmp_path, monkeypatch):
    """After a run of three processes that was killed: nothing of it is taken over, whatever the settings; its
    files are together in one folder, the log and the calibration stay, and nobody else's file is touched."""
    only_plots(monkeypatch, "avg_experts_comparison")
    configs = CONFIGS | {"bh": EMPIRICAL}
    bh.write_report(run_suite(mock_model, tmp_path, configs, generate_batch=2).generation, tmp_path)
    checkpoint = tmp_path / "checkpoints" / bh.CHECKPOINT_FILE
    lines = checkpoint.read_text().splitlines(keepends=True)  # the others' rows are in their own files
    for rank in (1, 2):
        path = checkpoint.parent / bh.PROCESS_FILE.format(rank=rank)
        path.write_text("".join(lines[:3]) + lines[-1 - rank].rstrip(",\n") + "\n" + lines[-1])
    (checkpoint.parent / "process_1.damaged1.json").write_text("damaged")
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: path.read_bytes() for name, path in files_below(tmp_path).items()}
    stay = {bh.LOG_FILE, bh.CALIBRATION_FILE, "notes.txt", ".lock", ".calibration.lock"}
    assert {bh.LOG_FILE, bh.CALIBRATION_FILE} <= set(bh.KEPT_FILES)
    of_run = {name.split("/")[0] for name in before} - stay
    unwritten = {bh.TASKS.file, bh.TASK_RESULTS, *bh.TOKEN_LOG_FILES}
    assert of_run == set(bh.RUN_FILES) - unwritten
    for number, tokens in ((1, 3), (2, 2)):  # with other settings, then with the first ones again
        results = run_suite(mock_model, tmp_path, configs, SCORED_PROMPTS[:1], tokens, resume=False)
        assert (len(results.generation), set(results.generation["prompt_id"])) == (3, {"one"})
        assert set(results.scores["item_id"]) == {"one"}
        assert len(rows_in(checkpoint)) == 3 + 10
        assert [path.name for path in checkpoint.parent.iterdir()] == [bh.CHECKPOINT_FILE]
        assert (tmp_path / f"earlier_{number}" / "checkpoints" / bh.CHECKPOINT_FILE).exists()
    aside = {name: path.read_bytes() for name, path in files_below(tmp_path / "earlier_1").items()}
    assert aside == {name: content for name, content in before.items() if name not in stay}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / bh.CALIBRATION_FILE).read_bytes() == before[bh.CALIBRATION_FILE]
    assert (tmp_path / bh.LOG_FILE).read_bytes().startswith(before[bh.LOG_FILE])
    assert not (tmp_path / "plots").exists()
    assert bh.Results.read(tmp_path / "earlier_1").num_failed == 0  # it can be read where it is


@pytest.mark.parametrize("name", [bh.CHECKPOINT_FILE, bh.PROCESS_FILE.format(rank=1)])
def test_no_message_advises_what_was_given(name, tiny_folder, tmp_path, monkeypatch, capsys):
    """With --no-resume no file of an earlier run can stop a run, and none makes it advise --no-resume."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", PROMPTS[:1])
    options = ["--max-tokens", 2, "--configs", "topk_8", "--text", "none"]
    path = tmp_path / "checkpoints" / name
    for schema in ("", 2, SCHEMA):
        path.parent.mkdir(exist_ok=True)
        head = f'{{"schema": {schema},\n"settings": {{"model": "other"}},\n"results": [\n]}}\n'
        path.write_text(head if schema else "hello")
        assert cli(tiny_folder, tmp_path, *options) == 2
        assert "or --no-resume" in capsys.readouterr().err
        assert cli(tiny_folder, tmp_path, *options, "--no-resume") == 0
        assert "or --no-resume" not in capsys.readouterr().err
    assert [path.name for path in path.parent.iterdir()] == [bh.CHECKPOINT_FILE]


def test_results_whose_checkpoint_is_gone_are_set_aside(mock_model, tmp_path):
    """A run that begins anew leaves no side file of the earlier one beside its own."""
    run_suite(mock_model, tmp_path, CONFIGS | {"bh": EMPIRICAL})
    shutil.rmtree(tmp_path / "checkpoints")
    run_suite(mock_model, tmp_path, CONFIGS, PROMPTS[:1])
    assert not (tmp_path / bh.NULL_DIAGNOSTICS).exists()
    assert not (tmp_path / bh.SCORES.file).exists()
    earlier = tmp_path / "earlier_1"
    assert (earlier / bh.NULL_DIAGNOSTICS).exists()
    assert [len(frame) for frame in bh.Results.read(earlier)] == [9, 30, 0]


def test_side_files_of_another_run_are_ignored(mock_model, tmp_path, monkeypatch):
    """Diagnostics, scores and layer tables go into the report of the run that wrote them only."""
    only_plots(monkeypatch, "null_calibration", "quality_vs_experts", "expert_counts")
    configs = CONFIGS | {"bh": EMPIRICAL}
    long = run_suite(mock_model, tmp_path / "long", configs).generation
    short = run_suite(mock_model, tmp_path / "short", configs, PROMPTS[:1]).generation  # nothing to be scored
    assert bh.analyze_results(long, tmp_path / "long")["null_diagnostics"] is not None
    assert {path.stem for path in bh.create_visualizations(long, tmp_path / "long")} == set(bh.PLOTS)
    side_files = (bh.SCORES, bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS)
    for name in (bh.NULL_DIAGNOSTICS, *(table.file for table in side_files)):
        shutil.copy(tmp_path / "long" / name, tmp_path / "short")
    analysis = bh.analyze_results(short, tmp_path / "short")
    assert (analysis["null_diagnostics"], analysis["layers"], analysis["verdict"]) == (None, {}, {})
    bh.write_report(short, tmp_path / "short")
    assert "of the scored text" not in (tmp_path / "short" / "REPORT.md").read_text()
    assert not list((tmp_path / "short" / "plots").glob("*.png"))


def test_side_files_without_an_id_belong_to_results_without_one(mock_model, tmp_path):
    """As older scripts left them; and to no others."""
    configs = CONFIGS | {"bh": EMPIRICAL}
    frame = run_suite(mock_model, tmp_path, configs).generation
    assert bh.analyze_results(frame.assign(run_id=""), tmp_path)["layers"] == {}
    for table in (bh.SCORES, bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS):
        header, rows = cells_of(tmp_path / table.file)
        bh.write_table(dataclasses.replace(table, columns=table.columns[:-1]), [
            dict(zip(header, row, strict=True)) for row in rows
        ], tmp_path)  # fmt: skip
    path = tmp_path / bh.NULL_DIAGNOSTICS
    content = json.loads(path.read_text())
    del content["run_id"]
    bh.write_json(path, content)
    analysis = bh.analyze_results(frame, tmp_path)
    assert (analysis["null_diagnostics"], analysis["layers"], analysis["verdict"]) == (None, {}, {})
    analysis = bh.analyze_results(frame.drop(columns="run_id"), tmp_path)
    assert analysis["null_diagnostics"]["n_tokens"] == content["n_tokens"]
    assert set(analysis["layers"]) == set(configs)
    assert {*configs, *LADDER} == set(analysis["verdict"])


def test_side_files_follow_a_run_that_grows_or_shrinks(mock_model, tmp_path):
    """Whatever part of what a folder holds is asked for, the files beside the results are of that part."""
    configs = CONFIGS | {"bh": EMPIRICAL}
    seen = set()
    for asked, prompts, texts in (
        (configs, SCORED_PROMPTS[:2], ()),
        (configs | {"bh_2": FLAT}, SCORED_PROMPTS, WINDOWS),
        (configs, (), WINDOWS),
        (configs, SCORED_PROMPTS, ()),
    ):
        results = run_suite(mock_model, tmp_path, asked, prompts, texts=texts)
        assert len(results.generation) == len(asked) * len(prompts)
        assert len(results.scores) == (len(asked) + len(LADDER)) * (len(prompts) + len(texts))
        assert (tmp_path / bh.GENERATION.file).exists() == bool(prompts)
        (run_id,) = {*results.generation["run_id"], *results.scores["run_id"]}
        seen.add(run_id)
        assert json.loads((tmp_path / bh.NULL_DIAGNOSTICS).read_text())["run_id"] == run_id
        for table in (bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS):
            names = set(bh.read_side_table(table, tmp_path, {run_id})["config_name"])
            assert names == {*asked, *LADDER}
    assert len(seen) == 4
    again = run_suite(mock_model, tmp_path, configs)
    for frame, before in zip(again, results, strict=True):
        pd.testing.assert_frame_equal(frame, before)


# The model's own routing and the static ladder


def test_the_models_own_routing_is_always_run(mock_model, tmp_path):
    """Where no configuration does what the model does, one is added, under a name that is free."""
    results = run_suite(mock_model, tmp_path / "a", {"bh_flat": FLAT}, SCORED_PROMPTS[:1])
    assert results.generation["config_name"].tolist() == ["topk_8", "bh_flat"]
    log = (tmp_path / "a" / bh.LOG_FILE).read_text()
    assert "topk_8, the model's own routing, is run as well" in log
    own = results.generation.iloc[0]
    assert own["repeat_inference_time_sec"] > 0
    assert np.isnan(results.generation["repeat_inference_time_sec"][1])
    scores = results.scores.set_index("config_name")
    assert list(scores.index) == ["topk_8", "bh_flat", *LADDER]
    assert scores.loc["topk_8", "kl_to_own"] == 0
    taken = {"topk_8": {"method": "topk", "k": 4}, "static_topk_8": FLAT}
    frame = run_suite(mock_model, tmp_path / "b", taken, SCORED_PROMPTS[:1]).generation
    assert frame["config_name"].tolist() == ["static_topk_8_2", "topk_8", "static_topk_8"]
    assert [json.loads(cell).get("k") for cell in frame["configuration"]] == [8, 4, None]
    mine = {"mine": TOP_8["topk_8"], "bh_flat": FLAT}
    frame = run_suite(mock_model, tmp_path / "c", mine, SCORED_PROMPTS[:1]).generation
    assert frame["config_name"].tolist() == ["mine", "bh_flat"]  # by what it does, not by its name
    same = {"mine": {"method": "topk", "k": [8, 8, 8, 8]}}
    frame = run_suite(mock_model, tmp_path / "e", same, SCORED_PROMPTS[:1]).generation
    assert frame["config_name"].tolist() == ["mine"]
    with pytest.raises(bh.UserError, match="at least one configuration"):
        run_suite(mock_model, tmp_path / "d", {})


def ladder_of(results):
    """k -> the names under which plain static Top-k was scored."""
    names = collections.defaultdict(list)
    for row in results.scores.drop_duplicates("config_name").to_dict("records"):
        k = bh.static_k(json.loads(row["configuration"]))
        if k is not None:
            names[k].append(row["config_name"])
    return dict(names)


def test_the_static_curve_leaves_out_what_plain_top_k_runs(mock_model, tmp_path):
    """Whatever its name: `topk_4` that is another rule takes nothing from the curve, `my3` does."""
    others = {"topk_4": FLAT, "topk_5": {"method": "topk", "k": 5, "renormalize": "sum"}}
    configs = TOP_8 | others | {"my3": {"method": "topk", "k": 3}}
    ladder = ladder_of(run_suite(mock_model, tmp_path, configs, SCORED_PROMPTS[:1]))
    assert ladder == {
        8: ["topk_8"], 3: ["my3"], 1: ["topk_1"], 2: ["topk_2"], 4: ["static_topk_4"],
        5: ["static_topk_5"], 6: ["topk_6"], 7: ["topk_7"],
    }  # fmt: skip


def test_the_static_curve_has_each_point_once(mock_model, tmp_path):
    """Also when a static configuration joins a finished run, or two are the model's own routing."""
    four = {"topk_4": {"method": "topk", "k": 4}}
    first = run_suite(mock_model, tmp_path, TOP_8 | {"bh_flat": FLAT})
    assert ladder_of(first) == {k: [f"topk_{k}"] for k in range(1, 9)}
    results = run_suite(mock_model, tmp_path, TOP_8 | four | {"bh_flat": FLAT, "my8": TOP_8["topk_8"]})
    assert ladder_of(results) == {k: [f"topk_{k}"] for k in range(1, 8)} | {8: ["topk_8", "my8"]}
    scores = [frame.set_index(["config_name", "item_id"])["nll"] for frame in (first.scores, results.scores)]
    assert scores[1]["topk_4"].equals(scores[0]["topk_4"])
    assert scores[1]["my8"].equals(scores[0]["topk_8"])
    assert set(results.generation["config_name"]) == {"topk_8", "topk_4", "bh_flat", "my8"}
    verdict = bh.analyze_results(results.generation, tmp_path)["verdict"]
    assert verdict["bh_flat"]["delta_nll"] is not None


def test_runner_scores_the_curve_whatever_configurations_are_called(mock_model, tmp_path):
    """k = 2 is scored beside a rule that is called topk_2, and not beside a Top-2 of another name."""
    own = bh.find_moe_layers(mock_model)[0].own_k
    configs = {"topk_8": bh.ROUTING_CONFIGS["topk_8"], "topk_2": FLAT, "mine": {"method": "topk", "k": 1}}
    results = run_suite(mock_model, tmp_path, configs, SCORED_PROMPTS[:1])
    assert sorted(ladder_of(results)) == list(range(1, own + 1))
    analysis = bh.analyze_results(results.generation, tmp_path)
    assert [n for n, row in analysis["verdict"].items() if bh.is_static(row)] == [
        *("topk_8", "mine", "static_topk_2"),
        *(f"topk_{k}" for k in range(3, own)),
    ]


def test_scores_of_the_ladder_are_those_of_the_model_at_that_k(mock_model, tmp_path):
    """Each point is the native model with so many experts, whatever is run beside it."""
    scores = run_suite(mock_model, tmp_path, {"bh_flat": FLAT}, SCORED_PROMPTS[:1]).scores
    nlls = scores.set_index("config_name")["nll"]
    (item,) = bh.reference_items([bh.resolve_prompt(SCORED_PROMPTS[0])], MockTokenizer())
    for k in range(1, 9):
        native = bh.ScoredBatch(build("mock", top_k=k), [item])
        assert nlls[f"topk_{k}"] == pytest.approx(native.nll()[0], abs=1e-6)


def test_an_unknown_baseline_is_refused(mock_model, tmp_path):
    with pytest.raises(bh.UserError, match="unknown baseline 'topk_9'.*Available: topk_8, bh_flat"):
        run_suite(mock_model, tmp_path, {"bh_flat": FLAT}, baseline="topk_9")
    assert not (tmp_path / "checkpoints").exists()
    results = run_suite(mock_model, tmp_path, {"bh_flat": FLAT}, SCORED_PROMPTS[:1], baseline="topk_8")
    assert len(results.generation) == 2


def test_the_log_tells_how_far_a_run_is(mock_model, tmp_path, capsys):
    """A line for each prompt or batch that is done, in the log only."""
    console = bh._ConsoleHandler(logging.INFO)
    bh.logger.addHandler(console)
    try:
        run_suite(mock_model, tmp_path, prompts=SCORED_PROMPTS[:2], texts=WINDOWS)
    finally:
        bh.logger.removeHandler(console)
    lines = re.findall(r"DEBUG (\d+ of \d+: .*) in \d+\.\d\d s$", (tmp_path / bh.LOG_FILE).read_text(), re.M)
    assert lines == [
        "1 of 3: prompt one, 2 rows",
        "2 of 3: prompt two, 2 rows",
        f"3 of 3: text two and 4 more, {5 * 9} rows",  # the longest first
    ]
    assert "of 3: " not in capsys.readouterr().err


def test_names_are_looked_up_when_they_are_used(mock_model, tmp_path, monkeypatch):
    """A configuration added to ROUTING_CONFIGS is known to suites, options and runner, and comes first."""
    late = {"method": "threshold", "threshold": 0.01}
    monkeypatch.setitem(bh.ROUTING_CONFIGS, "late", late)
    monkeypatch.setitem(bh.ROUTING_CONFIGS, "top_p", late)
    assert list(bh.choose_configs(bh.parse_options(["--configs", "late, topk_3"]))) == ["late", "topk_3"]
    for suite in ("default", "controls", "all"):
        chosen = bh.choose_configs(bh.parse_options(["--suite", suite]))
        assert {chosen[name]["threshold"] for name in ("late", "top_p")} == {0.01}
    with mock_runner(mock_model, tmp_path).routing("late") as recorder:
        assert recorder.config["threshold"] == 0.01


def test_a_registered_rule_is_run_like_any_other(mock_model, tmp_path, monkeypatch):
    """Its configuration is in the tables, and what its function says is what runs."""
    monkeypatch.setattr(bh, "RULES", dict(bh.RULES))

    @bh.register_rule("odd", bh.share_field("share", 0.5, "a share"), words="three for odd tokens, else one")
    def odd(gates, config):
        return 1 + 2 * (torch.arange(len(gates.scores)) % 2)

    results = run_suite(mock_model, tmp_path, {"odd": {"method": "odd", "share": 0.25}})
    assert results.num_failed == 0
    rows = results.generation[results.generation["method"] == "odd"]
    assert (rows[["min_experts", "max_experts"]] == [1, 3]).all(axis=None)
    assert json.loads(rows["configuration"].iloc[0])["share"] == 0.25


# Whatever is fed in


@pytest.fixture(scope="module")
def hostile_run(mock_model, tmp_path_factory):
    """The folder of a run whose prompts, categories, references and answers are all hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    answers = itertools.cycle(HOSTILE)
    prompts = [
        {"id": text[:60], "text": f"{text} x", "category": text[:60], "description": text, "reference": text}
        for text in HOSTILE
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockTokenizer, "decode", lambda self, ids, **ignored: next(answers))
        runner = mock_runner(mock_model, folder, command="run '\n# forged")
        runner.run_full_experiment_suite(CONFIGS, prompts, 2)
        only_plots(patch, "experts_by_category", "avg_experts_comparison")
        with bh.log_to(folder / bh.LOG_FILE):
            bh.write_report(runner.results.generation, folder)
    return folder


def test_hostile_texts_stay_data_in_the_tables(hostile_run):
    """They are read back as they were, a NUL as its symbol; no cell is a formula."""
    results = bh.Results.read(hostile_run)
    shown = [text.replace("\0", "\u2400") for text in HOSTILE]
    frame = results.generation
    assert frame["prompt_id"].tolist() == [text[:60] for text in shown for _ in CONFIGS]
    assert frame["prompt_text"].tolist() == [f"{text} x" for text in shown for _ in CONFIGS]
    assert set(frame["generated_text"]) <= set(shown)
    assert results.scores["document"].unique().tolist() == [text[:60] for text in shown]
    assert results.num_failed == 0
    for table in bh.TABLES:
        if (hostile_run / table.file).exists():
            _, rows = cells_of(hostile_run / table.file)
            assert not [cell for row in rows for cell in row if re.match(r"[=+@\t\r]|-[^\d]", cell)]
    usage = bh.read_table(bh.EXPERT_USAGE, hostile_run)
    assert set(usage["category"]) <= {text[:60] for text in shown}


def assert_hostile_texts_get_nowhere(folder):
    """No table, markup, line or hidden character of the report and the log of a run is theirs."""
    report = (folder / "REPORT.md").read_text(encoding="utf-8")
    assert all(len(widths) == 1 for widths in table_widths(report))
    log = (folder / bh.LOG_FILE).read_text(encoding="utf-8")
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ ", line) for line in log.splitlines())
    hidden = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
    for text in (report, log):
        assert not hidden.search(text)
        assert "ERROR forged" not in re.sub(r".*\\n.*", "", log)
    outside = re.sub(r"\n```.*?\n```\n", "", report, flags=re.S)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    assert "\n# heading" not in report
    assert "\n# forged" not in report


def test_hostile_texts_get_nowhere_in_report_and_log(hostile_run):
    """Prompts, categories and answers are data, whatever they hold."""
    assert_hostile_texts_get_nowhere(hostile_run)
    assert {path.stem for path in (hostile_run / "plots").iterdir()} == {
        "experts_by_category",
        "avg_experts_comparison",
    }


def test_the_same_command_gives_the_same_bytes(tiny_folder, tmp_path, monkeypatch):
    """Apart from the clock columns, byte for byte; every row says what it came from, the report how."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", bh.TEST_PROMPTS[:2])
    for name in ("one", "two"):
        assert (
            cli(tiny_folder, tmp_path / name, "--max-tokens", 4, "--text", "none", "--generate-batch", 2) == 0
        )
    for table in bh.TABLES:
        if table is bh.TASKS:
            continue
        kept = [place for place, column in enumerate(table.columns) if not column.clock]
        one, two = (cells_of(tmp_path / name / table.file)[1] for name in ("one", "two"))
        assert [[row[place] for place in kept] for row in one] == [
            [row[place] for place in kept] for row in two
        ]
    results = bh.Results.read(tmp_path / "one")
    report = (tmp_path / "two" / "REPORT.md").read_text()
    assert f"--output {tmp_path / 'two'}".replace("_", "\\_") in report
    for table, frame in ((bh.GENERATION, results.generation), (bh.SCORES, results.scores)):
        origin = table.names[table.names.index("timestamp") :]
        for name in set(origin) - {"model_revision", "git_commit"}:  # of a hub model, of a clone
            assert (frame[name].astype(str) != "").all(), name
        assert len(frame["script_hash"][0]) == len(frame["model_hash"][0]) == 16
        for name in origin:
            if name in ("timestamp", "command", "configuration", "input_hash", "method"):
                continue
            if frame[name].dtype.kind not in "if" and frame[name][0]:
                assert bh.markdown_text(frame[name][0]) in report, name


@fuzzed
@given(
    strategies.sampled_from([bh.GENERATION, bh.SCORES, bh.TASKS, None]), strategies.integers(0, 2**32),
    strategies.integers(0, 3),
)  # fmt: skip
def test_tables_of_anything(tmp_path_factory, folders_of_tables, table, seed, changes):
    """A table, also an older script's, with bytes changed, cut off or put in is read or refused."""
    random = np.random.default_rng(seed)
    source = TESTDATA / OLDER[1]
    if table is not None:
        source = next(folder for folder in folders_of_tables if (folder / table.file).exists())
    table = table or bh.GENERATION
    content = bytearray((source / table.file).read_bytes())
    for _ in range(changes):
        place = int(random.integers(min(len(content), 2000)))
        content[place : place + int(random.integers(40))] = random.bytes(int(random.integers(3)))
    folder = tmp_path_factory.getbasetemp() / "fuzz_tables"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / table.file).write_bytes(content[: int(random.integers(len(content)))] if changes else content)
    try:
        results = bh.Results.read(folder)
    except bh.UserError:
        assert changes
        return
    assert [list(frame) for frame in results] == [declared.names for declared in TABLES.values()]


# The embedded model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A runner of the embedded model, calibrated on as much text as a real run."""
    runner = bh.BHExperimentRunner(
        str(EMBEDDED), tmp_path_factory.mktemp("mini"), device="cpu", use_fp16=False
    )
    with calibrating_as_runs_do():
        runner.calibration  # noqa: B018 - made here and kept: later tests calibrate on little text again
    return runner


@contextlib.contextmanager
def calibrating_as_runs_do():
    """Inside the block calibration takes as much text as in a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bh, "CALIBRATION_SEQUENCES", 32)
        patch.setattr(bh, "CALIBRATION_LENGTH", 128)
        yield


def test_embedded_model_is_olmoe(embedded):
    """OLMoE's own architecture and routing shape, small, in safetensors only."""
    config = embedded.model.config
    assert type(embedded.model).__name__ == "OlmoeForCausalLM"
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (64, 8, False)
    assert len(embedded.layers) >= 4
    files = [file for file in EMBEDDED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert any(file.suffix == ".safetensors" for file in files)
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".pkl", ".py"}


def test_embedded_model_adapts(embedded):
    """Mean experts rise from strict to loose, and no rule sits at its floor or cap."""
    configs = {name: bh.ROUTING_CONFIGS[name] for name in ("bh_strict", "bh_moderate", "bh_loose")}
    frame = embedded.run_full_experiment_suite(configs, bh.TEST_PROMPTS[::5], max_new_tokens=16)
    assert embedded.results.num_failed == 0
    for rows in (frame, embedded.results.scores):
        rows = rows[rows["config_name"].isin(configs)]
        strict, moderate, loose = rows.groupby("config_name", sort=False)["avg_experts_per_token"].mean()
        assert 1.5 < strict < moderate < loose < 7.8
        assert (rows["floor_frac"] < 0.9).all()
        assert (rows["cap_frac"] < 0.9).all()


def test_embedded_model_uses_its_experts(embedded):
    """The built-in continuations are more probable with eight experts than with one."""
    nll = {}
    for k in (1, 8):
        with bh.patched_routing(embedded.model, {"method": "topk", "k": k}):
            losses = []
            for prompt in bh.TEST_PROMPTS[:6]:
                ids = torch.tensor([embedded.tokenizer(prompt["text"] + prompt["reference"])["input_ids"]])
                logits = logits_of(embedded.model, ids)[0, :-1]
                losses.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        nll[k] = torch.cat(losses).mean()
    assert nll[8] < nll[1] - 0.1
    assert nll[8] < 5.5


# ---------------------------------------------------------------------------------------------------------
# 13. Analysis
# ---------------------------------------------------------------------------------------------------------


# One test for every comparison


@pytest.mark.parametrize("n", [2, 3, 12, 60])
def test_paired_comparison_equals_scipy(n):
    """t, interval and d agree with scipy and the textbook formula."""
    random = np.random.default_rng(n)
    base = random.uniform(1, 2, n)
    other = base + random.normal(0.2, 0.3, n)
    test = bh.paired_comparison(base, other)
    expected = stats.ttest_rel(other, base)
    interval = expected.confidence_interval(0.95)
    assert test["t_statistic"] == pytest.approx(expected.statistic)
    assert test["p_value"] == pytest.approx(expected.pvalue)
    assert (test["ci95_low"], test["ci95_high"]) == pytest.approx((interval.low, interval.high))
    assert test["cohens_d"] == pytest.approx((other - base).mean() / (other - base).std(ddof=1))
    assert test["cohens_d"] == pytest.approx(test["t_statistic"] / np.sqrt(n))
    assert test["median_ratio"] == pytest.approx(np.median(other / base))
    assert (test["n_pairs"], test["reason"]) == (n, None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("base", "other", "pairs", "reason"),
    [([], [], 0, "are needed, not 0"), ([1.0], [2.0], 1, "are needed, not 1"),
     ([1.0, np.nan, 3.0], [np.nan, 2.0, 4.0], 1, "are needed, not 1"),
     ([8.0] * 5, [8.0] * 5, 5, "nothing differs"),
     ([0.0] * 5, [0.0] * 5, 5, "nothing differs"), ([8.0] * 5, [1.0] * 5, 5, "same amount"),
     ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 3, "same amount"), ([1.0, 2.0], [2.0, 1.0], 2, None),
     ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], 3, None), ([1.0, np.nan, 2.0, 5.0], [2.0, 1.0, 4.0, np.nan], 2, None),
     ([None, None], [None, None], 0, "are needed, not 0")],
)  # fmt: skip
def test_degenerate_comparisons(base, other, pairs, reason):
    """A test that says nothing gives None and a reason; nothing warns, nothing is NaN."""
    test = bh.paired_comparison(base, other)
    assert test["n_pairs"] == pairs
    assert (test["reason"] is None) == (reason is None)
    assert reason is None or reason in test["reason"]
    assert (test["p_value"] is not None) == (reason is None)
    strict_loads(json.dumps(test))


def test_paired_test_against_direct_computation():
    x = np.random.default_rng(2).gamma(2, 0.01, 30) - 0.015
    test = bh.paired_test(x, margin=0.02)
    error = stats.sem(x)
    half = stats.t.ppf(0.975, 29) * error
    assert (test["ci95_low"], test["ci95_high"]) == pytest.approx((x.mean() - half, x.mean() + half))
    assert test["p_value"] == pytest.approx(2 * stats.t.sf(abs(x.mean() / error), 29))
    assert test["cohens_d"] == pytest.approx(x.mean() / x.std(ddof=1))
    one_sided = (stats.t.sf((x.mean() + 0.02) / error, 29), stats.t.cdf((x.mean() - 0.02) / error, 29))
    assert test["equivalence_p_value"] == pytest.approx(max(one_sided))
    assert test["equivalence_p_value"] < 0.05 < bh.paired_test(x, margin=0.001)["equivalence_p_value"]
    shift = test["smallest_detectable"] / error  # its power by the noncentral t
    assert stats.nct.sf(stats.t.ppf(0.975, 29), 29, shift) == pytest.approx(0.80, abs=0.01)
    assert shift == pytest.approx(stats.t.ppf(0.975, 29) + stats.t.ppf(0.80, 29))


@pytest.mark.parametrize(
    ("units", "reason"), [([], "not 0"), ([0.1], "not 1"), ([0.0] * 5, "nothing"), ([0.1] * 5, "same amount")]
)
def test_degenerate_differences_have_a_reason_and_no_numbers(units, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = bh.paired_test(units, margin=0.01)
    assert reason in test["reason"]
    assert all(test[key] is None for key in ("ci95_low", "p_value", "equivalence_p_value"))


@pytest.mark.parametrize("units", [[0.1, 0.2], [0.0, 0.0, 0.1], [0.1, 0.1, -0.1], [0.0] * 9 + [1.0]])
def test_small_and_tied_samples_give_finite_numbers_without_warnings(units):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = bh.paired_test(units, margin=0.01)
    assert test["ci95_low"] <= test["mean_difference"] <= test["ci95_high"]
    json.dumps(test, allow_nan=False)


def test_adjusted_p_values_are_those_of_scipy():
    """One family a table; a test that says nothing is no member of it."""
    tests = [{"p": p} for p in (0.02, None, 0.9, 0.001)]
    bh.adjust_p_values(tests, "p", "is_claimed")
    expected = iter(stats.false_discovery_control([0.02, 0.9, 0.001]))
    for test in tests:
        if test["p"] is None:
            assert test == {"p": None, "p_adjusted": None, "is_claimed": None}
        else:
            adjusted = next(expected)
            assert test["p_adjusted"] == pytest.approx(adjusted)
            assert test["is_claimed"] == (adjusted < bh.SIGNIFICANCE_LEVEL)
    bh.adjust_p_values([])


# Units that are independent


def test_units_are_the_values_when_every_item_is_its_own_document():
    values = pd.Series([1.0, -2.0, 4.5], index=["a", "b", "c"])
    units = bh.item_units(values, pd.Series({"c": "c", "a": "a", "b": "b", "left_out": "x"}))
    np.testing.assert_allclose(units[["a", "b", "c"]], values, rtol=0, atol=1e-15)


def test_units_of_clusters_give_the_ratio_estimators_variance():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 9, 60)
    documents = pd.Series(np.repeat(np.arange(60), sizes)).map("d{}".format)
    values = pd.Series(np.repeat(rng.normal(0, 1, 60), sizes) + rng.normal(0.3, 0.5, sizes.sum()))
    units = bh.item_units(values, documents)
    assert units.mean() == pytest.approx(values.mean())
    sums = values.groupby(documents).sum() - values.mean() * documents.value_counts()
    closed = (sums**2).sum() / len(values) ** 2 * 60 / 59  # cluster-robust variance of a mean, CR1
    assert units.var(ddof=1) / 60 == pytest.approx(closed)
    groups = [group.to_numpy() for _, group in values.groupby(documents)]
    means = [np.concatenate([groups[i] for i in rng.integers(0, 60, 60)]).mean() for _ in range(4000)]
    assert units.std(ddof=1) / math.sqrt(60) == pytest.approx(np.std(means), rel=0.06)
    assert closed > 2 * values.var() / len(values)  # ignoring the clusters would claim far too much


NO_EFFECT = {  # differences whose true mean is zero
    "t with 3 degrees": lambda random, shape: random.standard_t(3, shape),
    "lognormal, sigma 0.5": lambda random, shape: random.lognormal(0, 0.5, shape) - math.exp(0.5**2 / 2),
    "lognormal, sigma 1": lambda random, shape: random.lognormal(0, 1.0, shape) - math.exp(1 / 2),
}


def clustered(draw, documents, ragged, random):
    """Differences of items without effect, and their documents: 1 to 10 items each, which share a part."""
    sizes = random.integers(1, 11, documents) if ragged else np.ones(documents, int)
    of_item = np.repeat(np.arange(documents), sizes)
    values = draw(random, documents)[of_item]
    return (values + draw(random, len(of_item)) if ragged else values), of_item


def coverage(draw, documents, ragged, sets, seed=0):
    """Share of `sets` simulations whose 95 % interval over documents holds zero, vectorised."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 11, (sets, documents)) if ragged else np.ones((sets, documents), int)
    sums = sizes * draw(random, (sets, documents))
    if ragged:
        sums = sums + (draw(random, (sets, documents, 10)) * (np.arange(10) < sizes[..., None])).sum(-1)
    mean = sums.sum(1, keepdims=True) / sizes.sum(1, keepdims=True)
    units = mean + (sums - mean * sizes) / sizes.mean(1, keepdims=True)
    interval = stats.ttest_1samp(units, 0, axis=1).confidence_interval(0.95)
    return ((interval.low <= 0) & (interval.high >= 0)).mean()


@pytest.mark.parametrize("ragged", [False, True])
def test_simulated_intervals_are_those_of_the_script(ragged):
    """The vectorised formulas of `coverage` are `item_units` and `paired_test`."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        values, documents = clustered(NO_EFFECT["t with 3 degrees"], 9, ragged, random)
        test = bh.paired_test(bh.item_units(pd.Series(values), pd.Series(documents)))
        sums = np.bincount(documents, weights=values)
        sizes = np.bincount(documents)
        units = values.mean() + (sums - values.mean() * sizes) / sizes.mean()
        expected = stats.ttest_1samp(units, 0).confidence_interval(0.95)
        assert (test["ci95_low"], test["ci95_high"]) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", NO_EFFECT)
def test_coverage_of_intervals(name, ragged):
    """Without effect a 95 % interval holds zero in 93 to 97 %, from INTERVALS_HOLD_FROM units on.

    Below it, and for a strong skew, it holds at least what the report says. Simulated often enough that four
    standard errors are below a percent.
    """
    for documents in (6, 12, 30, 50, 100):
        sets = 16_000 if documents < 30 else 8_000
        share = coverage(NO_EFFECT[name], documents, ragged, sets, seed=documents)
        error = 4 * math.sqrt(0.93 * 0.07 / sets)
        assert share <= 0.97 + error
        if name == "lognormal, sigma 1":
            assert share >= {6: 0.81, 12: 0.84, 30: 0.87, 50: 0.89, 100: 0.91}[documents] - error
        elif documents >= bh.INTERVALS_HOLD_FROM:
            assert share >= 0.93 - error / 4
        else:
            assert share >= 0.90 - error


# A whole run, invented


def rows_of_run(table, rows):
    """Rows with what all rows of a run have in common, as a frame with the columns of their table."""
    common = {column.name: "x" for column in bh._ORIGIN if column.kind is str}
    common |= {"status": "ok", "error": "", "seed": 0, "own_k": 8, "run_id": "run", "sampling": "greedy"}
    return bh.fit_table(pd.DataFrame([common | row for row in rows], columns=None if rows else []), table)


def own_config(name, config=None):
    """A configuration as the rows of a run have it."""
    config = bh.suites()["all"][name] if config is None else config
    config = bh.resolve_config(name, config)
    described = {"method": config["method"], "configuration": bh.configuration_cell(config)}
    return config, {"config_name": name} | described


def invented_generation(configs, prompts):
    random = np.random.default_rng(0)
    rows = []
    for p in range(prompts):
        for c, name in enumerate(configs):
            config, about = own_config(name)
            seconds = random.uniform(0.5, 1.5)
            experts = float(config["k"]) if config["method"] == "topk" else random.uniform(4, 5) + c
            measured = {column.name: random.uniform() for column in bh.ROUTING_COLUMNS}
            measured |= {"avg_experts_per_token": experts, "effective_experts": experts}
            measured |= {"min_experts": 1, "max_experts": 8}
            if name == "topk_8":
                measured["repeat_inference_time_sec"] = seconds + random.normal(0, 0.01)
            rows.append(about | measured | {
                "prompt_id": f"p{p}", "sample": 0, "prompt_category": f"c{p % 3}", "prompt_text": "x",
                "generated_text": "x", "full_text": "x", "num_input_tokens": 5, "num_output_tokens": 10,
                "max_new_tokens": 10, "tokens_until_divergence": 3, "inference_time_sec": seconds,
                "tokens_per_sec": 10 / seconds, "time_to_first_token_sec": 0.1,
                "decode_sec_per_token": (seconds - 0.1) / 9,
            })  # fmt: skip
    return rows_of_run(bh.GENERATION, rows)


def invented_scores(configs, windows, ladder=range(1, 8)):
    """Scores of the configurations, and of static Top-k for the k of `ladder` that are not among them."""
    random = np.random.default_rng(1)
    rows = []
    for p in range(windows):
        nll = random.uniform(2.9, 3.0)
        for name in dict.fromkeys([*configs, *(f"topk_{k}" for k in ladder)]):
            config, about = own_config(name)
            if config["method"] == "topk":
                experts = float(config["k"])
            else:
                experts = random.uniform(4, 5) + 0.5 * list(configs).index(name) % 3
            measured = {column.name: random.uniform() for column in bh.ROUTING_COLUMNS}
            scored = nll + 0.5 / experts**2 - 0.5 / 64 + (experts < 8) * random.normal(0, 0.002)
            measured |= {"nll": scored, "num_tokens": 50, "num_bytes": 200, "perplexity": math.exp(scored)}
            measured |= {"bits_per_byte": 1.1, "kl_to_own": 0.01, "top1_agreement": 0.9, "batch_size": 1}
            measured |= {"avg_experts_per_token": experts, "effective_experts": experts}
            measured |= {"min_experts": 1, "max_experts": 8}
            if name == "topk_8":
                measured["repeat_nll"] = scored
            item = {"item_id": f"p{p}", "document": f"p{p}", "category": f"c{p % 3}"}
            rows.append(about | item | measured)
    return rows_of_run(bh.SCORES, rows)


def invented_tasks(configs, documents):
    random = np.random.default_rng(2)
    rows = []
    for task, metric in (("choice", "acc"), ("words_of_text", "bits_per_byte")):
        for n in range(documents):
            for name in configs:
                _, about = own_config(name)
                measured = {column.name: random.uniform() for column in bh.ROUTING_COLUMNS}
                measured |= {"min_experts": 1, "max_experts": 8, "batch_size": 1}
                score = float(random.integers(2)) if metric == "acc" else random.uniform(2, 3)
                item = {"task": task, "document": f"{task}:{n}", "prompt_text": "x"}
                rows.append(about | item | measured | {"metric": metric, "score": score})
    return rows_of_run(bh.TASKS, rows)


def invented_results(configs=("topk_8", "bh_strict", "bh_loose"), prompts=8):
    """What a run of the default kind measures, at random: prompts, and their references scored."""
    nothing = bh.EMPTY_RESULTS.tasks
    return bh.Results(invented_generation(configs, prompts), invented_scores(configs, prompts), nothing)


def write_results(results, folder):
    """The tables of a run, as a run leaves them; those without rows are not written."""
    for table, frame in zip((bh.GENERATION, bh.SCORES, bh.TASKS), results, strict=True):
        (folder / table.file).unlink(missing_ok=True)
        if len(frame):
            rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
            bh.write_table(table, rows, folder)


def analysis_of(results, folder, baseline=None):
    write_results(results, folder)
    return bh.analyze_results(results.generation, folder, baseline)


def report_of(results, folder, **changes):
    """The report, of the results' analysis with some of its entries changed."""
    analysis = analysis_of(results, folder) | changes
    path = bh.generate_markdown_report(results.generation, analysis, folder / "REPORT.md")
    return path.read_text(encoding="utf-8")


def changed(results, change):
    """`results` with each table that has rows as `change` makes it."""
    return bh.Results(*(change(frame.copy()) if len(frame) else frame for frame in results))


def only(results, *names):
    """The rows of some configurations."""
    return changed(results, lambda frame: frame[frame["config_name"].isin(names)])


def renamed(results, **names):
    return changed(results, lambda frame: frame.assign(config_name=frame["config_name"].replace(names)))


def configured(results, name, **fields):
    """`results` with other fields in a configuration; None takes a field away."""

    def change(frame):
        rows = frame["config_name"] == name
        config = json.loads(frame.loc[rows, "configuration"].iloc[0]) | fields
        config = {field: value for field, value in config.items() if value is not None}
        frame.loc[rows, "configuration"] = json.dumps(config)
        frame.loc[rows, "method"] = config["method"]
        return frame

    return changed(results, lambda frame: change(frame) if (frame["config_name"] == name).any() else frame)


# What makes `bh` static, for `configured`.
ADAPTIVE_GONE = dict.fromkeys(("random", "alpha", "p_values", "temperature", "min_k", "max_k", "shuffle"))


def test_invented_results_are_results(tmp_path):
    """They are read back as they were written, so the tests below are about tables of this script."""
    invented = invented_results()
    results = dataclasses.replace(invented, tasks=invented_tasks(("topk_8",), 2))
    write_results(results, tmp_path)
    assert_same_results(bh.Results.read(tmp_path), results)


# What was measured, by configuration


def test_pairs_are_formed_by_prompt(tmp_path):
    """Row order does not matter, and a prompt that one side lacks is left out."""
    results = invented_results()
    frame = results.generation
    frame = frame[~((frame["config_name"] == "bh_strict") & (frame["prompt_id"] == "p3"))]
    wide = frame.pivot(index="prompt_id", columns="config_name", values="inference_time_sec")
    expected = stats.ttest_rel(wide["bh_strict"], wide["topk_8"], nan_policy="omit")
    for rows in (frame, frame.sample(frac=1, random_state=1)):
        analysis = analysis_of(dataclasses.replace(results, generation=rows), tmp_path)
        test = analysis["statistical_tests"]["bh_strict"]["inference_time_sec"]
        assert test["n_pairs"] == 7
        assert (test["t_statistic"], test["p_value"]) == pytest.approx((expected.statistic, expected.pvalue))


def test_analysis(tmp_path):
    """Summaries and adjusted p-values follow from the table; the file is strict JSON and says the same."""
    results = invented_results()
    analysis = analysis_of(results, tmp_path)
    assert strict_loads((tmp_path / "analysis_summary.json").read_text()) == analysis
    assert analysis["baseline"] == "topk_8"
    frame = results.generation
    loose = frame[frame["config_name"] == "bh_loose"]
    summary = analysis["summary_by_config"]["bh_loose"]["inference_time_sec"]
    assert summary["mean"] == pytest.approx(loose["inference_time_sec"].mean())
    assert summary["std"] == pytest.approx(loose["inference_time_sec"].std())
    by_category = analysis["summary_by_category"]["c1"]["bh_loose"]["avg_experts_per_token"]
    of_category = loose[loose["prompt_category"] == "c1"]
    assert by_category["mean"] == pytest.approx(of_category["avg_experts_per_token"].mean())
    tests = [test for by_metric in analysis["statistical_tests"].values() for test in by_metric.values()]
    adjusted = stats.false_discovery_control([test["p_value"] for test in tests])
    assert [test["p_value_adjusted"] for test in tests] == pytest.approx(adjusted.tolist())
    assert all(test["significant"] == (test["p_value_adjusted"] < 0.05) for test in tests)


def test_every_metric_is_summarized_and_tested(tmp_path):
    """Of the declared metrics, each from the table that has it; the static ladder is not tested."""
    results = invented_results()
    analysis = analysis_of(results, tmp_path)
    assert set(analysis["summary_by_config"]["bh_loose"]) == {*bh.GENERATION.metrics, bh.SPREAD}
    assert set(analysis["summary_by_config"]["topk_4"]) == {*bh.SCORES.metrics, bh.SPREAD}
    assert {name: set(tests) for name, tests in analysis["statistical_tests"].items()} == dict.fromkeys(
        ("bh_strict", "bh_loose"), set(bh.GENERATION.metrics)
    )
    scored = analysis_of(dataclasses.replace(results, generation=results.generation[:0]), tmp_path)
    assert {name: set(tests) for name, tests in scored["statistical_tests"].items()} == dict.fromkeys(
        ("bh_strict", "bh_loose", *(f"topk_{k}" for k in range(1, 8))), set(bh.SCORES.metrics)
    )


def test_samples_of_a_prompt_are_one_item(tmp_path):
    """Their mean: many samples of a prompt are no more prompts."""
    results = invented_results(("topk_8", "bh_strict"), 6)
    again = results.generation.assign(sample=1)
    again["inference_time_sec"] *= np.where(again["config_name"] == "topk_8", 3, 2)
    both = pd.concat([results.generation, again], ignore_index=True)
    test = analysis_of(dataclasses.replace(results, generation=both), tmp_path)["statistical_tests"]
    times = both.groupby(["config_name", "prompt_id"])["inference_time_sec"].mean().unstack("config_name")
    expected = stats.ttest_rel(times["bh_strict"], times["topk_8"])
    assert test["bh_strict"]["inference_time_sec"]["n_pairs"] == 6
    assert test["bh_strict"]["inference_time_sec"]["p_value"] == pytest.approx(expected.pvalue)


def test_noise_floor_is_the_second_run_against_the_first(tmp_path):
    results = invented_results(("topk_8", "bh_strict"), 6)
    results.scores.loc[results.scores["repeat_nll"].notna(), "repeat_nll"] += [0.1, 0.2, 0, 0, 0, 0]
    floor = analysis_of(results, tmp_path)["noise_floor"]
    own = results.generation[results.generation["config_name"] == "topk_8"]
    ratio = own["repeat_inference_time_sec"] / own["inference_time_sec"]
    assert floor["inference_time_sec"]["median_ratio"] == pytest.approx(ratio.median())
    assert floor["nll"]["mean_difference"] == pytest.approx(0.05)
    assert (floor["nll"]["n_pairs"], floor["inference_time_sec"]["n_pairs"]) == (6, 6)


def test_windows_of_a_document_are_no_independent_units(tmp_path):
    """Every table tests documents: windows that repeat each other make no difference significant."""
    results = invented_results(("topk_8", "bh_strict"), 6)
    once = analysis_of(dataclasses.replace(results, generation=results.generation[:0]), tmp_path)
    parts = [results.scores.assign(item_id=results.scores["item_id"] + f":{window}") for window in range(8)]
    windows = bh.Results(results.generation[:0], pd.concat(parts, ignore_index=True), results.tasks)
    often = analysis_of(windows, tmp_path)
    assert set(once["statistical_tests"]["bh_strict"]) == set(bh.SCORES.metrics)
    for metric, test in once["statistical_tests"]["bh_strict"].items():
        repeated = often["statistical_tests"]["bh_strict"][metric]
        assert (repeated["n_pairs"], repeated["n_units"]) == (48, 6)
        assert repeated["p_value"] == pytest.approx(test["p_value"])
    row = often["verdict"]["bh_strict"]
    assert (row["n_items"], row["n_units"]) == (48, 6)
    assert row["p_value"] == pytest.approx(once["verdict"]["bh_strict"]["p_value"])


def test_hypotheses(tmp_path):
    """Each expectation stands beside its measured value; it held when that lies within the bounds."""
    results = invented_results()
    rows = analysis_of(results, tmp_path)["hypotheses"]
    means = results.generation.groupby("config_name")["avg_experts_per_token"].mean()
    assert len(rows) == sum(len(names) for names, *_ in bh.HYPOTHESES)
    for row in rows:
        if row["configuration"] not in means:
            assert row["measured"] is row["held"] is None
            continue
        upper = float("inf") if row["high"] is None else row["high"]
        assert row["held"] == (row["low"] <= row["measured"] <= upper)
        if row["quantity"] == "avg_experts_per_token":
            assert row["measured"] == pytest.approx(means[row["configuration"]])
    assert {row["held"] for row in rows} == {True, False, None}
    unmeasured = dataclasses.replace(
        results, generation=results.generation.assign(avg_experts_per_token=math.nan)
    )
    rows = bh.check_hypotheses(bh.analyze_results(unmeasured.generation, tmp_path))
    held = [row["held"] for row in rows if row["quantity"] == "avg_experts_per_token"]
    assert held == [None] * len(held)


def test_analysis_needs_a_finished_experiment(tmp_path):
    frame = invented_results().generation.assign(status="error")
    for function in (bh.analyze_results, bh.create_visualizations):
        with pytest.raises(bh.UserError, match="none of 24"):
            function(frame, tmp_path)


def test_foreign_tables_are_refused_and_incomplete_ones_analysed(tmp_path, monkeypatch):
    results = invented_results(("topk_8", "bh_strict"), 4)
    for call in (bh.analyze_results, bh.create_visualizations, bh.write_report):
        with pytest.raises(bh.UserError, match="lacks config_name, status: pass what"):
            call(pd.DataFrame({"prompt_id": ["a"], "value": [1]}), tmp_path)
    only_plots(monkeypatch, "avg_experts_comparison", "experts_by_category")
    expected = analysis_of(results, tmp_path)
    newer = ["repeat_inference_time_sec", "tokens_until_divergence", "script_hash", "device", "own_k"]
    bh.write_report(results.generation.drop(columns=newer), tmp_path)
    check_outputs(tmp_path, ("topk_8", "bh_strict"), without=SPEC_PLOTS - set(bh.PLOTS))
    analysis = json.loads((tmp_path / "analysis_summary.json").read_text())
    tests = analysis["statistical_tests"]["bh_strict"]["inference_time_sec"]
    assert tests == expected["statistical_tests"]["bh_strict"]["inference_time_sec"]
    for table in bh.TABLES:
        (tmp_path / table.file).unlink(missing_ok=True)
    bare = results.generation[["config_name", "prompt_id", "status"]]
    bh.write_report(bare, tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert not re.search(r"\b(nan|None|inf)\b", report)
    assert "No text was scored in this run: it says nothing about quality." in report


def test_tables_of_another_run_are_left_out(tmp_path):
    """Rows of generation are analysed with what the same run scored, and with nothing else."""
    results = invented_results(("topk_8", "bh_strict"), 4)
    assert analysis_of(results, tmp_path)["verdict"]
    other = results.generation.assign(run_id="another")
    analysis = bh.analyze_results(other, tmp_path)
    assert (analysis["verdict"], analysis["n_rows"]) == ({}, 8)


# What is the baseline


def test_baseline_is_the_models_own_routing_whatever_it_is_called():
    results = invented_results(("topk_8", "bh_strict"), 6)
    wide = configured(renamed(only(results, "topk_8"), topk_8="wide"), "wide", k=16)
    with_wide = bh.Results(*(pd.concat(pair, ignore_index=True) for pair in zip(wide, results, strict=True)))
    assert bh.choose_baseline(with_wide) == "topk_8"
    assert bh.choose_baseline(renamed(with_wide, topk_8="mine")) == "mine"
    # A rule that has the built-in name is not the baseline.
    posing = renamed(only(results, "topk_8", "bh_strict"), topk_8="mine", bh_strict="topk_8")
    assert bh.choose_baseline(posing) == "mine"
    # Nor is Top-K with other weights, or in some of the layers.
    static = only(results, "topk_8", "topk_4")
    for fields in ({"renormalize": "sum"}, {"layers": [1]}, {"k": [8, 8, 4]}):
        assert bh.choose_baseline(configured(static, "topk_8", **fields)) == "topk_4"
    assert bh.choose_baseline(wide) == "wide"
    assert bh.choose_baseline(only(results, "bh_strict")) == "bh_strict"


def test_baseline_can_be_chosen(tmp_path, monkeypatch):
    results = invented_results(("topk_8", "bh_strict", "bh_loose"), 6)
    write_results(results, tmp_path)
    only_plots(monkeypatch, "quality_vs_experts")
    bh.write_report(results.generation, tmp_path, baseline="bh_loose")
    analysis = json.loads((tmp_path / "analysis_summary.json").read_text())
    assert analysis["baseline"] == "bh_loose"
    assert analysis["own_k"] == 8
    assert set(analysis["statistical_tests"]) == {"topk_8", "bh_strict"}
    assert analysis["noise_floor"]["inference_time_sec"]["n_pairs"] == 6
    assert analysis["verdict"]["bh_loose"]["delta_to_baseline"] == 0
    report = check_outputs(tmp_path, ("topk_8", "bh_strict", "bh_loose"), without=SPEC_PLOTS)
    assert "Differences are to `bh_loose`; the model's own routing is Top-8." in report
    assert "Noise floor, the model's own routing against itself" in report
    for call in (bh.analyze_results, bh.write_report, bh.create_visualizations):
        with pytest.raises(bh.UserError, match="unknown baseline 'bh_lose'.*bh_loose.*Available: topk_8"):
            call(results.generation, tmp_path, baseline="bh_lose")


# Quality at equal compute


def quality_frame(columns, experts, tokens=None, documents=None):
    """Rows of scores from configuration -> NLL per item and configuration -> experts (one or per item)."""
    rows = []
    for name, nlls in columns.items():
        _, about = own_config(name, None if name.startswith("topk_") else bh.ROUTING_CONFIGS["bh_strict"])
        for i, nll in enumerate(nlls):
            rows.append(about | {
                "status": "ok", "item_id": f"p{i}", "nll": nll,
                "document": f"p{i}" if documents is None else documents[i],
                "num_tokens": 100 if tokens is None else tokens[i], "kl_to_own": 0.01, "top1_agreement": 0.9,
                "avg_experts_per_token": np.broadcast_to(experts[name], len(nlls))[i],
            })  # fmt: skip
    return pd.DataFrame(rows)


def configs_of(scores):
    return bh.configurations(bh.Results(bh.EMPTY_RESULTS.generation, scores, bh.EMPTY_RESULTS.tasks))


def verdicts_of(scores, baseline="topk_5"):
    return bh.quality_verdicts(scores, configs_of(scores), baseline)


def simulated(seed, effect=0.0, n=40):
    """Item effects shared by all; static Top-4 and Top-5; `bh` between them, whose experts vary by item."""
    rng = np.random.default_rng(seed)
    item = rng.normal(3, 0.4, n)
    sensitivity = rng.normal(1, 0.3, n)
    experts = rng.normal(4.4, 0.2, n)
    loss = {"topk_4": 0.023, "topk_5": 0.009}
    columns = {name: item + x * sensitivity + rng.normal(0, 0.003, n) for name, x in loss.items()}
    on_curve = 0.023 - (experts - 4) * (0.023 - 0.009)  # what static Top-K would lose at these experts
    columns["bh"] = item + on_curve * sensitivity + rng.normal(0, 0.008, n) + effect
    return quality_frame(columns, {"topk_4": 4.0, "topk_5": 5.0, "bh": experts})


def more_rows(frame, *parts):
    return pd.concat([frame, *parts], ignore_index=True)


def copies_of_bh(frame, name, nll=None, **fields):
    """The rows of `bh` under another name, with other scores and fields of the configuration."""
    rows = frame[frame["config_name"] == "bh"].assign(config_name=name)
    config = json.loads(rows["configuration"].iloc[0]) | fields
    rows["configuration"] = json.dumps(config)
    return rows if nll is None else rows.assign(nll=nll)


def static_curve(frame):
    items = bh.scored_items(frame)
    return {int(name.removeprefix("topk_")): rows for name, rows in items.items() if name != "bh"}


def test_static_curve_is_interpolated_and_never_extrapolated():
    columns = {"topk_3": [3.0, 5.0], "topk_4": [2.0, 3.0], "topk_8": [1.0, 2.0], "bh": [9.0, 9.0]}
    frame = quality_frame(columns, {"topk_3": 3.0, "topk_4": 4.0, "topk_8": 8.0, "bh": 3.75})
    frame = frame.sample(frac=1, random_state=0)
    curve = static_curve(frame)
    mixture = bh.static_mixture(curve, 3.75)
    assert mixture == bh.StaticMixture(3, 4, 0.75)
    rows = bh.scored_items(frame)["bh"]
    assert (9 - bh.difference_to_static(rows, mixture, curve)).to_dict() == {"p0": 2.25, "p1": 3.5}
    at_the_end = bh.static_mixture(curve, 8.0)
    assert at_the_end == bh.StaticMixture(8, 8, 0.0)
    assert (9 - bh.difference_to_static(rows, at_the_end, curve)).to_dict() == {"p0": 1.0, "p1": 2.0}
    for outside in (2.9, 8.1):
        assert "3.00 to 8.00" in bh.static_mixture(curve, outside).reason
    assert "between Top-4 and Top-8" in bh.static_mixture(curve, 5.0).reason  # a gap is not bridged
    assert bh.static_mixture({8: curve[8]}, 5).reason.endswith("8.00 only")
    assert bh.static_mixture({}, 5).reason.startswith("no static")


def test_verdict_pairs_by_id_and_leaves_incomplete_items_out():
    tokens = np.random.default_rng(0).integers(50, 120, 40)
    frame = simulated(3, effect=-0.02).assign(num_tokens=list(tokens) * 3)
    keep = ~frame["item_id"].isin(["p1", "p2", "p3"])
    expected = verdicts_of(frame[keep])["bh"]
    broken = frame.sample(frac=1, random_state=1).reset_index(drop=True)
    at = {name: (broken["config_name"] == name) for name in ("bh", "topk_4", "topk_5")}
    broken.loc[at["bh"] & (broken["item_id"] == "p1"), "status"] = "error"
    broken.loc[at["topk_4"] & (broken["item_id"] == "p2"), "nll"] = math.nan
    broken = broken[~(at["topk_5"] & (broken["item_id"] == "p3"))]
    row = verdicts_of(broken)["bh"]
    assert (row["n_items"], row["n_left_out"], row["verdict"]) == (37, 3, "better")
    for key in ("mean_experts", "delta_nll", "p_value", "perplexity", "delta_to_baseline"):
        assert row[key] == pytest.approx(expected[key])
    own = frame[keep & (frame["config_name"] == "bh")].set_index("item_id")
    weights = own["num_tokens"] / own["num_tokens"].sum()
    assert row["mean_experts"] == pytest.approx((own["avg_experts_per_token"] * weights).sum())
    assert row["perplexity"] == pytest.approx(math.exp((own["nll"] * weights).sum()))
    curve = static_curve(frame[keep])
    share = row["mean_experts"] - 4
    assert row["static_mixture"] == {"k_low": 4, "k_high": 5, "share": pytest.approx(share)}
    static_nll = (1 - share) * curve[4]["nll"] + share * curve[5]["nll"]
    assert row["delta_nll"] == pytest.approx((own["nll"] - static_nll).mean())
    with pytest.raises(bh.UserError, match="twice"):
        verdicts_of(more_rows(frame, frame[:1]))


def test_a_rule_on_the_static_curve_is_exactly_zero_whatever_items_get_more_experts():
    """Items at 4 or at 5 static experts are a static mixture: experts that vary by item are not noise."""
    columns = {"topk_4": simulated(0).query("config_name == 'topk_4'")["nll"].to_numpy()}
    columns["topk_5"] = columns["topk_4"] - 0.01
    wide = np.arange(40) % 3 == 0
    columns["bh"] = np.where(wide, columns["topk_5"], columns["topk_4"])
    experts = {"topk_4": 4.0, "topk_5": 5.0, "bh": np.where(wide, 5.0, 4.0)}
    row = verdicts_of(quality_frame(columns, experts))["bh"]
    assert row["delta_nll"] == pytest.approx(0, abs=1e-12)
    assert row["reason"] == "nothing differs"


def test_verdicts_that_cannot_be_given_say_why():
    frame = simulated(4)
    high = copies_of_bh(frame, "bh_high").assign(avg_experts_per_token=9.0)
    failed = copies_of_bh(frame, "bh_failed").assign(status="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = verdicts_of(more_rows(frame, high, failed))
    assert rows["topk_5"]["verdict"] is None
    assert rows["topk_5"]["delta_to_baseline"] == 0
    assert "measured at 4.00 to 5.00" in rows["bh_high"]["reason"]
    assert rows["bh_high"]["delta_to_baseline"] is not None
    assert rows["bh_failed"]["n_items"] == 0
    assert rows["bh_high"]["verdict"] is rows["bh_failed"]["verdict"] is None  # nothing was tested
    assert [name for name, row in rows.items() if row["is_static"]] == ["topk_4", "topk_5"]
    assert rows["bh"]["p_value_adjusted"] == rows["bh"]["p_value"]  # the only test of the family
    json.dumps(bh.strict_json(rows), allow_nan=False)


def test_clustered_items_widen_the_interval():
    frame = simulated(5)
    document = {f"p{i}": f"d{i // 8}" for i in range(40)}
    shift = frame["item_id"].map(document).map({f"d{i}": 0.02 * (i - 2) for i in range(5)})
    frame["nll"] += shift.where(frame["config_name"] == "bh", 0)
    alone = verdicts_of(frame)["bh"]
    together = verdicts_of(frame.assign(document=frame["item_id"].map(document)))["bh"]
    assert (alone["n_units"], together["n_units"]) == (40, 5)
    assert together["delta_nll"] == pytest.approx(alone["delta_nll"])
    assert together["ci95_high"] - together["ci95_low"] > 1.4 * (alone["ci95_high"] - alone["ci95_low"])


def simulated_verdicts(effect, sets):
    return pd.DataFrame([verdicts_of(simulated(seed, effect))["bh"] for seed in range(sets)])


def test_verdict_is_wrong_in_about_five_percent_and_finds_four_standard_errors():
    without = simulated_verdicts(0.0, sets=120)
    standard_error = without["delta_nll"].std()
    assert abs(without["delta_nll"].mean()) < 3 * standard_error / math.sqrt(120)
    estimated = without["delta_nll"] / without["cohens_d"] / math.sqrt(40)
    assert estimated.mean() == pytest.approx(standard_error, rel=0.1)
    assert (without["verdict"] != "undecided").mean() <= 0.08
    with_effect = simulated_verdicts(-4 * standard_error, sets=40)
    assert (with_effect["verdict"] == "better").mean() > 0.90


def test_equivalence_is_claimed_by_its_adjusted_p_value():
    frame = simulated(2)
    nll = frame.loc[frame["config_name"] == "bh", "nll"]
    rules = [copies_of_bh(frame, f"bh_{i + 2}", nll + 0.004 * i) for i in range(-2, 3)]
    verdicts = verdicts_of(more_rows(frame, *rules))
    rows = [row for row in verdicts.values() if row["equivalence_p_value"] is not None]
    adjusted = stats.false_discovery_control([row["equivalence_p_value"] for row in rows])
    assert [row["equivalence_p_value_adjusted"] for row in rows] == pytest.approx(adjusted.tolist())
    assert [row["equivalent_to_baseline"] for row in rows] == (adjusted < 0.05).tolist()
    assert 0 < sum(adjusted < 0.05) < len(rows)


# What is static, whatever it is called


def test_static_topk_under_any_name_is_the_curve():
    """What a configuration is follows from what it does: another name changes names only."""
    frame = simulated(3, effect=-0.02)
    expected = verdicts_of(frame)
    mine = frame.assign(config_name=frame["config_name"].replace({"topk_4": "my4", "topk_5": "my5"}))
    verdicts = verdicts_of(mine, "my5")
    assert verdicts["my4"] == expected["topk_4"]
    assert verdicts["my5"] == expected["topk_5"]
    assert verdicts["bh"] == expected["bh"]
    assert verdicts["bh"]["verdict"] == "better"
    assert verdicts["my4"]["verdict"] is None
    # Twice the same: both are the curve.
    again = frame[frame["config_name"] == "topk_4"].assign(config_name="again")
    verdicts = verdicts_of(more_rows(frame, again))
    assert verdicts["again"] == verdicts["topk_4"] == expected["topk_4"]
    assert verdicts["bh"]["delta_nll"] == expected["bh"]["delta_nll"]


def test_static_topk_beside_the_ladder_of_a_run(tmp_path):
    """A Top-4 of another name is the curve's point, and is not compared with itself."""
    results = invented_results(("topk_8", "bh_strict"), 12)
    expected = analysis_of(results, tmp_path)["verdict"]
    ladder = only(results, "topk_4").scores.assign(config_name="my4")
    generated = configured(renamed(only(results, "topk_8"), topk_8="my4"), "my4", k=4).generation
    generated = generated.assign(avg_experts_per_token=4.0, repeat_inference_time_sec=math.nan)
    both = bh.Results(
        more_rows(results.generation, generated),
        more_rows(results.scores[results.scores["config_name"] != "topk_4"], ladder),
        results.tasks,
    )
    analysis = analysis_of(both, tmp_path)
    assert analysis["verdict"]["my4"]["verdict"] is None
    assert "topk_4" not in analysis["verdict"]
    assert analysis["verdict"]["bh_strict"]["delta_nll"] == pytest.approx(expected["bh_strict"]["delta_nll"])
    report = report_of(both, tmp_path)
    assert "`my4` ran" not in report
    assert report.count("choose another") == 0


def test_a_rule_named_like_a_static_one_is_a_rule(tmp_path):
    """It neither removes its namesake from the curve nor counts as it."""
    results = invented_results(("topk_8", "bh_strict", "bh_loose"), 12)
    expected = analysis_of(results, tmp_path)
    names = {"bh_strict": "topk_4", "bh_loose": "topk_5"}
    names |= {"topk_4": "static_topk_4", "topk_5": "static_topk_5"}
    analysis = analysis_of(renamed(results, **names), tmp_path)
    assert analysis["baseline"] == "topk_8"
    for name, new_name in names.items():
        assert analysis["verdict"][new_name] == expected["verdict"][name]
    assert analysis["verdict"]["topk_4"]["verdict"] is not None
    assert analysis["verdict"]["static_topk_4"]["verdict"] is None
    assert "`topk_4` ran " in report_of(renamed(results, **names), tmp_path)


def test_topk_with_a_k_for_each_layer_is_compared_with_the_curve(tmp_path):
    """As a rule is: only the same k in every layer is a point of the curve."""
    results = invented_results(("topk_8", "bh_strict"), 12)
    fields = {"method": "topk", "k": [4, 5, 4, 5]}
    by_layer = configured(renamed(results, bh_strict="mine"), "mine", **ADAPTIVE_GONE | fields)
    row = analysis_of(by_layer, tmp_path)["verdict"]["mine"]
    assert row == analysis_of(results, tmp_path)["verdict"]["bh_strict"]
    assert row["delta_nll"] is not None
    report = report_of(by_layer, tmp_path)
    assert "`mine` ran " in report
    assert "static: the same Top-K in every layer, the curve that all others are compared with." in report
    assert (
        "| `mine` | topk | k = \\[4, 5, 4, 5\\], renormalize = model, stand\\_in = nothing, layers = all |"
        in report
    )
    same = configured(by_layer, "mine", k=[4, 4, 4, 4])
    assert analysis_of(same, tmp_path)["verdict"]["mine"]["verdict"] is None


def test_the_runs_ladder_is_static_whatever_configurations_are_called(mock_model, tmp_path):
    """k = 2 is scored beside a rule that is called topk_2, and not beside a Top-1 of another name."""
    prompt = {"id": "one", "text": "a small boat", "reference": " on the river"}
    own_k = bh.find_moe_layers(mock_model)[0].own_k
    configs = {"topk_8": bh.ROUTING_CONFIGS["topk_8"], "topk_2": FLAT, "mine": {"method": "topk", "k": 1}}
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(configs, [prompt], 2)
    verdicts = bh.analyze_results(frame, tmp_path)["verdict"]
    assert [name for name, row in verdicts.items() if bh.is_static(row)] == [
        *("topk_8", "mine", "static_topk_2"),
        *(f"topk_{k}" for k in range(3, own_k)),
    ]


@pytest.mark.parametrize("commit", ["92f8b74", "6894e3a"])
def test_an_older_ladder_beside_a_rule_of_its_name(commit, tmp_path):
    """Older scripts kept the ladder in a cell; its points get names that no configuration has."""
    text = (HERE / "testdata" / commit / bh.GENERATION.file).read_text(encoding="utf-8")
    path = tmp_path / bh.GENERATION.file
    path.write_text(text)
    expected = bh.analyze_results(bh.Results.read(tmp_path).generation, tmp_path)["verdict"]
    path.write_text(text.replace('"bh_loose"', '"topk_2"'))
    posing = bh.analyze_results(bh.Results.read(tmp_path).generation, tmp_path)["verdict"]
    assert posing.pop("static_topk_2") == expected.pop("topk_2")
    assert posing.pop("topk_2") == expected.pop("bh_loose")
    assert posing == expected


def test_older_windows_keep_what_their_routers_did(tmp_path):
    """A row holds the routing of what was generated; that of a scored window is its own."""
    source = HERE / "testdata" / "6894e3a" / bh.GENERATION.file
    written = pd.read_csv(source, dtype=str, keep_default_na=False)
    written["inference_time_sec"] = ""  # as of a run with --text
    written.to_csv(tmp_path / bh.GENERATION.file, index=False, quoting=csv.QUOTE_NONNUMERIC)
    scores = bh.Results.read(tmp_path).scores.set_index(["config_name", "item_id"])
    for row in written.to_dict("records"):
        of_row = scores.loc[row["config_name"], row["prompt_id"]]
        assert of_row["expert_utilization_cv"] == float(row["expert_utilization_cv"])
        assert of_row["avg_experts_per_token"] == float(row["reference_avg_experts"])
    assert scores.loc["topk_3"]["expert_utilization_cv"].isna().all()
    shutil.copy(source, tmp_path)
    assert bh.Results.read(tmp_path).scores["expert_utilization_cv"].isna().all()


# Which token gets many experts


def with_shuffled(frame, differences):
    """`frame` of `simulated` and, for each list of differences [n], a shuffled `bh` that differs by it."""
    nll = frame.loc[frame["config_name"] == "bh", "nll"].to_numpy()
    shuffled = [
        copies_of_bh(frame, f"shuffled_{i}", nll + difference, shuffle=True)
        for i, difference in enumerate(differences)
    ]
    return more_rows(frame, *shuffled)


def test_shuffle_effects():
    """A shuffled configuration is set against its twin item by item, and the report says what came of it."""
    frame = simulated(7)
    difference = 0.03 + np.random.default_rng(0).normal(0, 0.01, 40)
    both = with_shuffled(frame, [difference])
    effects = bh.shuffle_effects(both, configs_of(both))
    assert effects["shuffled_0"]["unshuffled"] == "bh"
    assert effects["shuffled_0"]["mean_difference"] == pytest.approx(difference.mean())
    (sentence,) = bh.shuffle_sentences({"shuffle_effects": effects})
    assert "`shuffled_0`, the counts of `bh` given to other tokens: worse" in sentence
    failed = both.assign(status=np.where(both["config_name"] == "shuffled_0", "error", "ok"))
    assert bh.shuffle_effects(failed, configs_of(failed)) == {}
    other = both[both["config_name"] != "bh"]
    assert bh.shuffle_effects(other, configs_of(other)) == {}


@pytest.mark.parametrize("n", [3, 12])
def test_shuffled_counts_are_claimed_by_the_adjusted_p_value(n):
    """Without effect the sentence claims something in about 5 %; an interval alone is no claim."""
    random = np.random.default_rng(0)
    frame = simulated(1, n=n)
    claims = 0
    for difference in random.normal(0, 0.01, (200, n)):
        both = with_shuffled(frame, [difference])
        effects = bh.shuffle_effects(both, configs_of(both))
        (sentence,) = bh.shuffle_sentences({"shuffle_effects": effects})
        claims += ": worse, " in sentence or ": better, " in sentence
    assert claims <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)
    both = with_shuffled(frame, random.normal(0.006, 0.01, (8, n)))
    effects = bh.shuffle_effects(both, configs_of(both))
    adjusted = stats.false_discovery_control([effect["p_value"] for effect in effects.values()])
    sentences = bh.shuffle_sentences({"shuffle_effects": effects})
    for effect, p_value, sentence in zip(effects.values(), adjusted, sentences, strict=True):
        assert effect["p_value_adjusted"] == pytest.approx(p_value)
        assert effect["significant"] == (p_value < 0.05) == ("not shown to differ" not in sentence)


# ---------------------------------------------------------------------------------------------------------
# 14. Figures
# ---------------------------------------------------------------------------------------------------------


def invented_layers(configs, layers=4, experts=16):
    """Rows of the three tables by layer: table -> rows."""
    random = np.random.default_rng(3)
    rows = {bh.LAYER_STATISTICS: [], bh.EXPERT_USAGE: [], bh.EXPERT_COUNTS: []}
    for name in configs:
        config, _ = own_config(name)
        for layer in range(layers):
            about = {"config_name": name, "kind": "generation", "layer": layer, "run_id": "run"}
            used = random.integers(1, 100, experts)
            if config["method"] == "topk":
                counts = {config["k"]: 1000}
            else:
                counts = dict(enumerate(np.bincount(random.binomial(config["max_k"] - 1, 0.6, 1000)), 1))
            mean = sum(number * tokens for number, tokens in counts.items()) / 1000
            measured = {column.name: random.uniform() for column in bh.LAYER_COLUMNS}
            measured |= {"avg_experts_per_token": mean, "router": f"layers.{layer}.gate"}
            measured |= {"category_divergence_bits": 0.1, "category_p_value": random.uniform()}
            rows[bh.LAYER_STATISTICS].append(about | measured)
            rows[bh.EXPERT_USAGE] += [
                about | {"category": "c0", "expert": expert, "count": int(count), "share": count / used.sum()}
                for expert, count in enumerate(used)
            ]
            rows[bh.EXPERT_COUNTS] += [
                about | {"num_experts": number, "tokens": int(tokens)}
                for number, tokens in counts.items()
                if tokens
            ]
    return rows


def invented_diagnostics(layers=4):
    """As `diagnose_nulls` gives them, of an exact null and of one that rejects nothing at small alpha."""
    levels = np.geomspace(1e-4, 1, 41)
    alphas = [0.001, 0.01, 0.1, 0.5]

    def null(power, distance):
        curve = [
            {"alpha": a, "mean_rejections": 8 * a**0.2, "zero_rejection_frac": 0.01,
             "realised_fdp": a**power if a**power > 1e-3 else 0.0}
            for a in alphas
        ]  # fmt: skip
        shares = [(levels**power).tolist() for _ in range(layers)]
        return {"layers": shares, "ks": [distance] * layers, "alphas": curve}

    nulls = {"empirical": null(1, 0.012), "flat": null(8, 0.4)}
    return {"n_tokens": 1458, "n_shared_tokens": 0, "levels": levels.tolist(), "nulls": nulls}


def write_run(folder, configs, prompts=8, tasks=True):
    """Everything that a run leaves, invented: tables, side tables and diagnostics; returns the results."""
    results = invented_results(configs, prompts)
    if tasks:
        results = dataclasses.replace(results, tasks=invented_tasks(configs, prompts))
    write_results(results, folder)
    for table, rows in invented_layers(configs).items():
        bh.write_table(table, rows, folder)
    bh.write_json(folder / bh.NULL_DIAGNOSTICS, {"run_id": "run"} | invented_diagnostics())
    return results


SUITES = {"5": tuple(bh.ROUTING_CONFIGS), "24": tuple(bh.suites()["frontier"])}


@pytest.fixture(scope="module", params=SUITES)
def invented_run(request, tmp_path_factory):
    """The names of the configurations of an invented run, its results and what its plots are drawn from."""
    folder = tmp_path_factory.mktemp("invented")
    configs = SUITES[request.param]
    results = write_run(folder, configs, 6)
    analysis = bh.analyze_results(results.generation, folder)
    data = bh.plot_data(results, analysis, folder)
    return SimpleNamespace(configs=configs, results=results, analysis=analysis, data=data)


@pytest.fixture
def as_drawn():
    """The style in which plots are drawn, on a canvas without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    with bh.sns.axes_style("whitegrid"), bh.sns.plotting_context("paper", font_scale=1.1):
        yield
    matplotlib.pyplot.close("all")


def visible_boxes(figure, labels):
    """The places of labels on the canvas, empty ones left out."""
    renderer = figure.canvas.get_renderer()
    shown = [label for label in labels if label.get_text() and label.get_visible()]
    return [label.get_window_extent(renderer) for label in shown]


def labels_of(ax):
    """Legend, ticks of each axis and the free texts: labels of a group must not overlap."""
    legend = ax.get_legend()
    groups = [[] if legend is None else legend.get_texts(), ax.texts]
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        groups.append(
            [tick.label1 for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
        )
    return groups


def is_inside(box, figure):
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", bh.PLOTS)
def test_labels_do_not_overlap(name, invented_run, as_drawn):
    """Names, ticks, legends and titles of each plot, with 5 and with 24 configurations."""
    plot = bh.PLOTS[name]
    content = plot.data(invented_run.data)
    if name == "field" and not invented_run.data.has_field:
        pytest.skip("one rule has nothing to be compared with")
    assert len(content)
    plot.draw(content)
    figure = bh.plt.gcf()
    figure.canvas.draw()
    for ax in figure.axes:
        for labels in labels_of(ax):
            boxes = visible_boxes(figure, labels)
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
            assert all(is_inside(box, figure) for box in boxes)
    for labels in zip(*[(ax.title, ax.xaxis.label, ax.yaxis.label) for ax in figure.axes], strict=True):
        boxes = visible_boxes(figure, labels)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(is_inside(box, figure) for box in boxes)


def test_configurations_can_be_told_apart(invented_run):
    """By colour; the members of a family have one hue, and different markers."""
    frame = invented_run.results.generation
    order = list(invented_run.configs)
    palette = bh._palette(frame, order)
    markers = bh._markers(frame, order)
    assert list(palette) == order
    assert len(set(palette.values())) == len(order)
    for members in bh._families(frame, order).values():
        assert len({markers[name] for name in members}) == len(members)
        hues = {colorsys.rgb_to_hsv(*palette[name])[0] for name in members}
        assert max(hues) - min(hues) < 0.03


def shares_drawn(ax):
    """For each axis the share of it that the marks of the data take."""
    points = [collection.get_offsets() for collection in ax.collections if len(collection.get_offsets())]
    points += [line.get_xydata() for line in ax.lines if len(line.get_xydata()) > 1]
    points = np.concatenate(points)
    points = points[np.isfinite(points).all(1)]
    span = points.max(0) - points.min(0)
    limits = np.array([ax.get_xlim(), ax.get_ylim()])
    return span / (limits[:, 1] - limits[:, 0])


def test_data_fill_the_plots(invented_run, as_drawn):
    """An axis that would be mostly empty from 0 on does not begin there, and says so."""
    for name in ("experts_vs_latency", "layer_profile"):
        plot = bh.PLOTS[name]
        axes = np.atleast_1d(plot.draw(plot.data(invented_run.data)))
        for ax in axes:
            assert shares_drawn(ax).min() > 0.8
            assert bh.NOT_FROM_ZERO in ax.get_ylabel()
        bh.plt.close("all")


@pytest.mark.parametrize("configurations", [0, 1, 30])
def test_quality_plots_show_every_configuration(configurations, as_drawn):
    frame = simulated(6, n=8)
    many = [copies_of_bh(frame, f"bh_{i}", shuffle=i % 2 == 1) for i in range(configurations)]
    frame = more_rows(frame[frame["config_name"] != "bh"], *many)
    parts = {"verdict": verdicts_of(frame), "configurations": configs_of(frame), "baseline": "topk_5"}
    verdicts = bh.verdict_frame(parts)
    ax = bh.plot_delta_at_equal_compute(verdicts)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == [f"bh_{i}" for i in range(configurations)]
    ax = bh.plot_quality_vs_experts(verdicts)
    families = [text.get_text() for text in ax.get_legend().get_texts()]
    assert families == ["static Top-K", "bh", "bh, shuffled"][: configurations + 1]


def test_expert_counts_are_drawn_as_shares(as_drawn):
    """Of all decisions of a configuration, over its layers; a number that never ran has share 0."""
    counts = [("topk_8", 0, 8, 50), ("topk_8", 1, 8, 50), ("bh", 0, 2, 30), ("bh", 1, 2, 30),
              ("bh", 1, 5, 40), ("by_layer", 0, 3, 50), ("by_layer", 1, 6, 50)]  # fmt: skip
    cells = {
        "topk_8": own_config("topk_8")[1]["configuration"],
        "bh": own_config("bh_strict")[1]["configuration"],
        "by_layer": own_config("by_layer", {"method": "topk", "k": [3, 6]})[1]["configuration"],
    }
    table = pd.DataFrame(counts, columns=["config_name", "layer", "num_experts", "tokens"])
    table["configuration"] = table["config_name"].map(cells)
    ax = bh.plot_expert_counts(table)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["bh", "by_layer"]  # plain Top-K always runs the same
    expected = {"bh": {2: 0.6, 5: 0.4}, "by_layer": {3: 0.5, 6: 0.5}}
    for name, line in zip(names, ax.get_lines(), strict=False):
        shares = {k: pytest.approx(expected[name].get(k, 0.0)) for k in range(2, 7)}
        assert dict(map(tuple, line.get_xydata())) == shares
    low, high = ax.get_xlim()
    assert 1 < low < 2
    assert 6 < high < 7


def test_a_configuration_has_one_colour_in_all_plots(tmp_path, as_drawn):
    """Whatever a plot leaves out."""
    names = ("topk_4", "topk_8", "bh_strict", "bh_loose")
    results = write_run(tmp_path, names, 3, tasks=False)
    data = bh.plot_data(results, bh.analyze_results(results.generation, tmp_path), tmp_path)
    palette = bh._palette(results.generation, names)
    for name in ("expert_counts", "experts_vs_latency"):
        ax = bh.PLOTS[name].draw(bh.PLOTS[name].data(data))
        legend = ax.get_legend()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            drawn = bh.plt.matplotlib.colors.to_rgb(handle.get_color())
            assert drawn == pytest.approx(palette[text.get_text()]), name
        bh.plt.close("all")


@pytest.mark.parametrize(("prompts", "words"), [(1, "over 1 prompt"), (3, "over 3 prompts")])
def test_bars_say_how_many_prompts_they_are_over(prompts, words, as_drawn):
    frame = invented_generation(("topk_8", "bh_strict"), prompts)
    ax = bh.plot_bars(frame, column="inference_time_sec", label="seconds", median=True)
    assert ax.get_title() == f"Inference time: median and quartiles {words}"
    ax = bh.plot_bars(frame, column="avg_experts_per_token", label="experts")
    assert ax.get_title() == f"Experts per token and layer: mean and 95 % interval {words}"


def test_null_calibration_is_drawn(as_drawn):
    """A line a layer and the diagonal; a proportion of 0, which a logarithm cannot show, is left out."""
    diagnostics = invented_diagnostics()
    left, right = bh.plot_null_calibration(diagnostics)
    layers = [line for null in diagnostics["nulls"].values() for line in null["layers"]]
    assert len(left.get_lines()) == len(layers) + 1
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["empirical", "flat", "alpha"]
    drawn = [line.get_ydata() for line in right.get_lines()[:2]]
    for heights, null in zip(drawn, diagnostics["nulls"].values(), strict=True):
        measured = [row["realised_fdp"] for row in null["alphas"]]
        assert np.nan_to_num(heights).tolist() == measured
        assert not (heights == 0).any()


def test_the_baseline_is_shown_first(tmp_path, as_drawn):
    """Whatever the order of the run: a plot of the first few must not lose it."""
    names = ("bh_strict", "bh_loose", "bh_moderate", "top_p", "min_p", "threshold", "topk_8")
    results = write_run(tmp_path, names, 3, tasks=False)
    for baseline, first in ((None, "topk_8"), ("min_p", "min_p")):
        analysis = bh.analyze_results(results.generation, tmp_path, baseline)
        data = bh.plot_data(results, analysis, tmp_path)
        axes = bh.plot_expert_usage_heatmap(data.usage)
        titles = [ax.get_title(loc="left") for ax in axes]
        others = [name for name in names if name != first]
        assert titles == [first, *others[: bh.HEATMAP_CONFIGS - 1]]


def test_no_plot_is_drawn_of_nothing(tmp_path, monkeypatch):
    """Without an adaptive configuration neither counts nor a comparison; without scores no quality."""
    write_run(tmp_path, ("topk_8",), 3, tasks=False)
    frame = bh.Results.read(tmp_path).generation
    only_plots(monkeypatch, "quality_vs_experts", "delta_at_equal_compute", "expert_counts", "layer_profile")
    drawn = {path.stem for path in bh.create_visualizations(frame, tmp_path)}
    assert drawn == {"quality_vs_experts", "layer_profile"}
    (tmp_path / bh.SCORES.file).unlink()
    drawn = {path.stem for path in bh.create_visualizations(frame, tmp_path)}
    assert drawn == {"layer_profile"}
    assert not (tmp_path / "plots" / "quality_vs_experts.png").exists()


def test_a_plot_that_fails_does_not_lose_the_report(tmp_path, monkeypatch):
    results = invented_results(("topk_8", "bh_strict"), 6)

    def broken(frame, ax=None):
        raise ZeroDivisionError("no | width")

    by_category, latency = (bh.PLOTS[name] for name in ("experts_by_category", "experts_vs_latency"))
    failing = dataclasses.replace(latency, draw=broken)
    monkeypatch.setattr(bh, "PLOTS", {"experts_by_category": by_category, "experts_vs_latency": failing})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "experts_vs_latency.png").write_bytes(b"of an earlier run")
    write_results(results, tmp_path)
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 1
    report = (tmp_path / "REPORT.md").read_text()
    assert "- `experts_vs_latency` could not be drawn: ZeroDivisionError: no \\| width" in report
    assert "![Experts by category]" in report
    assert "![Experts against latency]" not in report
    assert "plot experts_vs_latency could not be drawn" in (tmp_path / "experiment_log.txt").read_text()
    drawn = bh.create_visualizations(results.generation, tmp_path)
    assert [path.stem for path in drawn] == ["experts_by_category"]


# ---------------------------------------------------------------------------------------------------------
# 15. Report
# ---------------------------------------------------------------------------------------------------------


# Sentences that claim something: for each function, cases with what it is given and what it says


def a_test(**entries):
    """A paired test as an analysis has it, of an effect that is significant, with other entries."""
    usual = {"n_pairs": 12, "n_units": 12, "mean_baseline": 8.0, "mean": 6.0, "mean_difference": -2.0,
             "median_ratio": 0.75, "ci95_low": -2.5, "ci95_high": -1.5, "p_value": 0.001,
             "p_value_adjusted": 0.002, "significant": True, "cohens_d": -2.0, "reason": None}  # fmt: skip
    return usual | entries


NOT_SHOWN = {"significant": False, "p_value_adjusted": 0.6}
NOTHING_DIFFERS = dict.fromkeys(("ci95_low", "ci95_high", "p_value", "p_value_adjusted", "significant"))


def a_verdict(word="better", **entries):
    usual = {"verdict": word, "is_static": word is None, "mean_experts": 5.25, "delta_nll": -0.012,
             "ci95_low": -0.02, "ci95_high": -0.004, "p_value_adjusted": 0.01, "n_items": 40, "n_units": 40,
             "reason": None, "equivalent_to_baseline": False}  # fmt: skip
    return usual | entries


def an_analysis(**entries):
    """As much of an analysis as the sentences need; nothing was measured."""
    configs = {name: own_config(name)[0] for name in ("topk_8", "topk_4", "bh_strict", "bh_loose", "top_p")}
    nothing = {"n_pairs": 0, "median_ratio": None, "mean_difference": None}
    usual = {"baseline": "topk_8", "own_k": 8, "configurations": configs, "verdict": {}, "tasks": [],
             "statistical_tests": {}, "compute": {},
             "noise_floor": {"inference_time_sec": nothing, "nll": nothing},
             "shuffle_effects": {}, "token_kinds": [], "field": {}, "summary_by_config": {},
             "hypotheses": [], "n_prompts": 0, "quality_margin": bh.QUALITY_MARGIN, "n_failed": 0,
             "n_rows": 60}  # fmt: skip
    return usual | entries


def a_field(ladders, n_units=80):
    """What `compare_field` gives, as far as sentences read it."""
    return {"ladders": ladders, "n_units": n_units}


def a_ladder(label, beaten_by=()):
    return {"label": label, "stand_in": "nothing", "is_bound": False, "beaten_by": list(beaten_by)}


def a_task(name, **entries):
    return {"task": "arc_easy", "configuration": name, "metric": "acc"} | entries


STATIC = a_verdict(None, delta_nll=None, reason="static Top-K: it is the curve")
NOT_COMPARABLE = a_verdict(None, is_static=False, delta_nll=None, reason="9.00 experts, but ...")
CLOCK = a_test(median_ratio=1.1, mean_difference=0.2)
TWICE = {"inference_time_sec": a_test(median_ratio=1.012, ci95_low=-0.01, ci95_high=0.02),
         "nll": a_test(mean_difference=-0.00002)}  # fmt: skip
SHUFFLED = a_test(unshuffled="bh_strict", mean_difference=0.03, ci95_low=0.02, ci95_high=0.04)
CONSTANT = {"avg_experts_per_token": {"mean": 4.0, "min": 4.0, "max": 4.0, "n": 12},
            "std_experts_per_token": {"mean": 0.0, "min": 0.0, "max": 0.0, "n": 12}}  # fmt: skip
VARYING = CONSTANT | {"avg_experts_per_token": {"mean": 4.0, "min": 3.0, "max": 5.0, "n": 12}}
SPREAD_WITHIN = CONSTANT | {"std_experts_per_token": {"mean": 0.5, "min": 0.0, "max": 1.97, "n": 12}}
SPREAD_UNKNOWN = CONSTANT | {"std_experts_per_token": dict.fromkeys(("mean", "min", "max")) | {"n": 0}}
SOFTMAX = own_config("bh_strict", bh.ROUTING_CONFIGS["bh_strict"] | {"p_values": "softmax"})[0]
FIXED = own_config("bh_loose", bh.ROUTING_CONFIGS["bh_loose"] | {"min_k": 4, "max_k": 4})[0]


def some_scores(sources, categories):
    """Rows of text_scores.csv, an item each."""
    items = [f"item {number}" for number in range(len(sources))]
    return pd.DataFrame({"source": sources, "category": categories, "item_id": items}, dtype=object)


def a_kind(token_kind, difference, significant=True, configuration="bh_strict"):
    """An entry of `compare_token_kinds`, as far as its sentence reads it."""
    return {"configuration": configuration, "token_kind": token_kind, "mean_difference": difference,
            "significant": significant}  # fmt: skip


def with_tests(**tests):
    """An analysis with tests of bh_strict."""
    return an_analysis(statistical_tests={"bh_strict": tests})


COST = {"active_parameters": 1.28e9, "total_parameters": 6.92e9, "weight_bytes_per_token": 2.4e9,
        "expert_flops_per_token": 1.61e9, "allowed_speedup": 1.0, "decode_speedup": 1.0}  # fmt: skip
SENTENCES = {
    "token_kind_sentences": {
        "claim": (
            an_analysis(token_kinds=[a_kind("rare", 0.5), a_kind("digits", -0.25), a_kind("word_start", 1.0),
                                     a_kind("punctuation", -0.5), a_kind("first_position", 2.0, False)]),
            ["Under `bh_strict`, more experts than other tokens get beginnings of words (+1.00), rare tokens "
             "(+0.50); fewer get punctuation (-0.50), digits (-0.25); not shown to differ: first positions."],
        ),
        "no claim": (
            an_analysis(token_kinds=[a_kind("rare", 0.5, False), a_kind("digits", None, None)]),
            ["Under `bh_strict`, not shown to differ: rare tokens."],
        ),
        "nothing to say": (an_analysis(token_kinds=[a_kind("digits", None, None)]), []),
        "the first three configurations": (
            an_analysis(token_kinds=[a_kind("rare", 1.0, configuration=name) for name in "abcd"]),
            [f"Under `{name}`, more experts than other tokens get rare tokens (+1.00)." for name in "abc"],
        ),
    },
    "verdict_sentence": {
        "claim": (
            an_analysis(verdict={"topk_8": STATIC, "bh_strict": a_verdict(), "bh_loose": a_verdict("worse")}),
            "**Against static Top-K that spends the same number of experts, 1 of 2 configurations predict "
            "the text better, 1 worse, 0 undecided; the largest gain is `bh_strict`'s, -0.0120 nats per "
            "token (95 % interval -0.0200 to -0.0040, adjusted p 0.0100, 40 items) at 5.25 experts.**",
        ),
        "claim over documents": (
            an_analysis(verdict={"bh_strict": a_verdict(n_units=7, p_value_adjusted=1e-9)}),
            "**Against static Top-K that spends the same number of experts, 1 of 1 configurations predict "
            "the text better, 0 worse, 0 undecided; the largest gain is `bh_strict`'s, -0.0120 nats per "
            "token (95 % interval -0.0200 to -0.0040, adjusted p < 0.0001, 40 items of 7 documents) at 5.25 "
            "experts.**",
        ),
        "claim over one document": (
            an_analysis(verdict={"bh_strict": a_verdict("undecided", n_units=1, **NOTHING_DIFFERS)}),
            "**Against static Top-K that spends the same number of experts, 0 of 1 configurations predict "
            "the text better, 0 worse, 1 undecided; the lowest estimate, which is no evidence of a gain, is "
            "`bh_strict`'s, -0.0120 nats per token (95 % interval –, adjusted p –, 40 items of 1 document) "
            "at 5.25 experts.**",
        ),
        "no claim": (  # the lowest estimate is not called a gain; one that is worse may be it
            an_analysis(verdict={"bh_strict": a_verdict("undecided", p_value_adjusted=0.2), "x": STATIC}),
            "**Against static Top-K that spends the same number of experts, 0 of 1 configurations predict "
            "the text better, 0 worse, 1 undecided; the lowest estimate, which is no evidence of a gain, is "
            "`bh_strict`'s, -0.0120 nats per token (95 % interval -0.0200 to -0.0040, adjusted p 0.2000, 40 "
            "items) at 5.25 experts.**",
        ),
        "no test": (
            an_analysis(verdict={"bh_strict": a_verdict("undecided", **NOTHING_DIFFERS, delta_nll=0.0)}),
            "**Against static Top-K that spends the same number of experts, 0 of 1 configurations predict "
            "the text better, 0 worse, 1 undecided; the lowest estimate, which is no evidence of a gain, is "
            "`bh_strict`'s, +0.0000 nats per token (95 % interval –, adjusted p –, 40 items) at 5.25 "
            "experts.**",
        ),
        "nothing to say": (
            an_analysis(), "No text was scored in this run: it says nothing about quality."
        ),
        "not comparable": (
            an_analysis(verdict={"topk_8": STATIC, "bh_strict": NOT_COMPARABLE}),
            "This run cannot compare quality at equal compute: 9.00 experts, but ....",
        ),
        "static only": (
            an_analysis(verdict={"topk_8": STATIC}),
            "This run cannot compare quality at equal compute: only static Top-K was run.",
        ),
    },
    "task_sentence": {
        "claim": (
            an_analysis(tasks=[a_task("topk_8"), a_task("bh_strict", **a_test(mean_difference=-0.05)),
                               a_task("bh_loose", **a_test(**NOT_SHOWN))]),
            "**Of 2 comparisons with `topk_8` on a task, paired by document, 1 differ significantly: "
            "`bh_strict` on arc\\_easy (-0.0500 acc).** A difference that was not found is not shown to be "
            "absent: see the intervals.",
        ),
        "no claim": (
            an_analysis(tasks=[a_task("bh_strict", **a_test(**NOT_SHOWN))]),
            "**Of 1 comparisons with `topk_8` on a task, paired by document, 0 differ significantly.** A "
            "difference that was not found is not shown to be absent: see the intervals.",
        ),
        "nothing to say": (  # a group of tasks, of which the harness alone reports
            an_analysis(tasks=[{"task": "mmlu", "configuration": "bh_strict", "harness": {}}]),
            "No task could be compared with `topk_8` document by document.",
        ),
    },
    "baseline_sentences": {
        "claim": (
            an_analysis(baseline="bh_loose"),
            ["Differences are to `bh_loose`; the model's own routing is Top-8."],
        ),
        "another Top-K": (
            an_analysis(baseline="topk_4"), ["Differences are to `topk_4`; the model's own routing is Top-8."]
        ),
        "no claim": (
            an_analysis(own_k=None),
            ["No row shows which configuration is the model's own Top-K; differences are to `topk_8`."],
        ),
        "nothing to say": (an_analysis(), []),
    },
    "name_sentences": {
        "claim": (
            an_analysis(own_k=4, configurations={"topk_8": {"method": "topk", "k": 4}}),
            ["`topk_8` is Top-4 on this model, the model's own routing, whatever its name says."],
        ),
        "no claim": (
            an_analysis(own_k=4, configurations={"topk_7": {"method": "topk", "k": 2}}),
            ["`topk_7` is Top-2 on this model, whatever its name says."],
        ),
        "nothing to say": (an_analysis(), []),
    },
    "finding_sentences": {
        "claim": (
            with_tests(avg_experts_per_token=a_test(), inference_time_sec=CLOCK)
            | {"noise_floor": TWICE},
            ["`bh_strict` ran 6.00 experts per token and layer, 25 % fewer than `topk_8`; its inference time "
             "was 1.10 times the baseline's (median; the model's own routing against itself 1.01), slower "
             "with adjusted p 0.0020."],
        ),
        "faster": (
            with_tests(avg_experts_per_token=a_test(mean=9.0),
                     inference_time_sec=CLOCK | {"mean_difference": -0.1, "median_ratio": 0.9}),
            ["`bh_strict` ran 9.00 experts per token and layer, 12 % more than `topk_8`; its inference time "
             "was 0.90 times the baseline's (median), faster with adjusted p 0.0020."],
        ),
        "no claim": (
            with_tests(avg_experts_per_token=a_test(mean=7.99), inference_time_sec=CLOCK | NOT_SHOWN),
            ["`bh_strict` ran 7.99 experts per token and layer, within 1 % of `topk_8`; its inference time "
             "was 1.10 times the baseline's (median), which this run cannot tell from noise."],
        ),
        "no clock": (
            with_tests(avg_experts_per_token=a_test()),
            ["`bh_strict` ran 6.00 experts per token and layer, 25 % fewer than `topk_8`."],
        ),
        "nothing to say": (
            an_analysis(statistical_tests={"topk_4": {"avg_experts_per_token": a_test()},
                                           "bh_strict": {"avg_experts_per_token": a_test(n_pairs=0)}}),
            [],
        ),
    },
    "reason_sentences": {
        "claim": (
            an_analysis(verdict={"topk_8": STATIC, "a": a_verdict(), "bh_strict": NOT_COMPARABLE}),
            ["`bh_strict` has no test at equal compute: 9.00 experts, but ...."],
        ),
        "no claim": (an_analysis(verdict={"topk_8": STATIC, "a": a_verdict("undecided")}), []),
        "nothing to say": (an_analysis(), []),
    },
    "noise_sentences": {
        "claim": (
            an_analysis(noise_floor=TWICE),
            ["Time: run twice, 1.012 times itself (median), mean difference -0.0100 to +0.0200 s (95 %).",
             "NLL: scored twice, mean difference -0.000020 nats per token."],
        ),
        "no claim": (  # of one prompt there is no interval
            an_analysis(noise_floor=TWICE | {"inference_time_sec": a_test(**NOTHING_DIFFERS),
                                             "nll": a_test(n_pairs=0)}),
            ["Time: run twice, 0.750 times itself (median)."],
        ),
        "nothing to say": (an_analysis(), []),
    },
    "field_sentences": {
        "claim": (
            an_analysis(field=a_field([a_ladder("bh, flat"), a_ladder("top_p", ["bh, flat"])])),
            ["With nothing standing in, of 2 rules these are beaten by no other at any compared number of "
             "experts (adjusted p below 0.05): `bh, flat`; BH is among them."],
        ),
        "no claim": (
            an_analysis(field=a_field([a_ladder("bh", ["top_p"]), a_ladder("top_p", ["bh"])])),
            ["With nothing standing in, of 2 rules these are beaten by no other at any compared number of "
             "experts (adjusted p below 0.05): none; BH is not among them."],
        ),
        "one document": (
            an_analysis(field=a_field([a_ladder("bh"), a_ladder("top_p")], n_units=1)),
            ["Which rule beats which is not tested: all of the scored text is of one document."],
        ),
        "one rule only": (an_analysis(field=a_field([a_ladder("bh, empirical")])), []),
        "nothing to say": (an_analysis(), []),
    },
    "answer_sentence": {
        "claim": (
            an_analysis(field=a_field([a_ladder("bh"), a_ladder("threshold", ["bh"])])),
            "**With nothing standing in, of 2 rules these are beaten by no other at any compared number of "
            "experts (adjusted p below 0.05): `bh`; BH is among them.**",
        ),
        "no claim": (
            an_analysis(verdict={"topk_8": STATIC}),
            "This run cannot compare quality at equal compute: only static Top-K was run.",
        ),
        "nothing to say": (
            an_analysis(), "No text was scored in this run: it says nothing about quality."
        ),
    },
    "shuffle_sentences": {
        "claim": (
            an_analysis(shuffle_effects={"s": SHUFFLED, "t": SHUFFLED | {"mean_difference": -0.03}}),
            ["`s`, the counts of `bh_strict` given to other tokens: worse, +0.0300 nats per token (95 % "
             "interval +0.0200 to +0.0400, adjusted p 0.0020).",
             "`t`, the counts of `bh_strict` given to other tokens: better, -0.0300 nats per token (95 % "
             "interval +0.0200 to +0.0400, adjusted p 0.0020)."],
        ),
        "no claim": (  # also where the interval of this one test leaves zero out
            an_analysis(shuffle_effects={"s": SHUFFLED | NOT_SHOWN}),
            ["`s`, the counts of `bh_strict` given to other tokens: not shown to differ, +0.0300 nats per "
             "token (95 % interval +0.0200 to +0.0400, adjusted p 0.6000)."],
        ),
        "no test": (
            an_analysis(shuffle_effects={"s": SHUFFLED | NOTHING_DIFFERS | {"mean_difference": 0.0}}),
            ["`s`, the counts of `bh_strict` given to other tokens: not shown to differ, +0.0000 nats per "
             "token (95 % interval –, adjusted p –)."],
        ),
        "nothing to say": (an_analysis(shuffle_effects={"s": {"mean_difference": None}}), []),
    },
    "few_units_sentence": {
        "claim": (
            [a_test(n_units=12), a_test(n_units=90)],
            "Intervals over fewer than 50 independent units (here as few as 12) are too narrow when "
            "differences are skewed: in simulations they hold the mean in 90 to 93 % instead of 95 %, in 85 "
            "to 90 % when a few units decide it.",
        ),
        "no claim": ([a_test(n_units=50)], ""),
        "no interval": ([a_test(n_units=3, **NOTHING_DIFFERS), {"verdict": None}], ""),
        "nothing to say": ([], ""),
    },
    "null_origin": {
        "claim": (
            {"n_shared_tokens": 50},
            "of which 50 were used for calibration as well (there the nulls look better than they are)",
        ),
        "no claim": ({"n_shared_tokens": 0}, "not used for calibration"),
        "nothing to say": ({}, "of which it is not known whether they were used for calibration"),
    },
    "cost_sentence": {
        "claim": (
            an_analysis(compute={"topk_8": COST}),
            "A token under `topk_8` uses 1.28 B of 6.92 B parameters and 1.61 GFLOP in its experts, and 2.40 "
            "GB of weights are read to decode one.",
        ),
        "no claim": (
            an_analysis(compute={"topk_8": COST | {"weight_bytes_per_token": None}}),
            "A token under `topk_8` uses 1.28 B of 6.92 B parameters and 1.61 GFLOP in its experts.",
        ),
        "nothing to say": (an_analysis(compute={"bh_strict": COST}), ""),
    },
    "clock_sentences": {
        "claim": (
            an_analysis(statistical_tests={"bh_strict": {"inference_time_sec": CLOCK},
                                           "top_p": {"inference_time_sec": CLOCK},
                                           "topk_4": {"inference_time_sec": CLOCK | {"mean_difference": -1}},
                                           "bh_loose": {"inference_time_sec": CLOCK | NOT_SHOWN}}),
            ["Faster than `topk_8` on this machine: `topk_4`.",
             "Slower than `topk_8` on this machine: `bh_strict`, `top_p`."],
        ),
        "no claim": (
            with_tests(inference_time_sec=CLOCK | NOT_SHOWN),
            ["No configuration was significantly faster or slower than `topk_8` on this machine."],
        ),
        "nothing to say": (with_tests(avg_experts_per_token=a_test()), []),
    },
    "constancy_sentences": {
        "claim": (
            an_analysis(summary_by_config={"bh_strict": CONSTANT, "top_p": CONSTANT}),
            ["`bh_strict` ran 4.00 experts everywhere: it does not adapt; choose another `alpha`.",
             "`top_p` ran 4.00 experts everywhere: it does not adapt; choose another `p`."],
        ),
        "degenerate null": (
            an_analysis(summary_by_config={"soft": CONSTANT}, configurations={"soft": SOFTMAX}),
            ["`soft` ran 4.00 experts everywhere: it does not adapt; with `p_values` = softmax that is "
             "certain (see `SoftmaxNull` in the script)."],
        ),
        "no claim": (
            an_analysis(summary_by_config={"bh_strict": VARYING, "bh_loose": SPREAD_WITHIN,
                                           "top_p": SPREAD_UNKNOWN}),
            [],
        ),
        "nothing to say": (  # of what cannot adapt, and of one prompt
            an_analysis(
                summary_by_config={
                    "topk_4": CONSTANT, "fixed": CONSTANT,
                    "bh_loose": CONSTANT
                    | {"avg_experts_per_token": CONSTANT["avg_experts_per_token"] | {"n": 1}},
                },
                configurations=an_analysis()["configurations"] | {"fixed": FIXED},
            ),
            [],
        ),
    },
    "hypothesis_sentences": {
        "claim": (
            an_analysis(hypotheses=[{"held": True}, {"held": False}, {"held": None}, {"held": True}]),
            ["2 of 3 measured expectations of the earlier attempt held."],
        ),
        "no claim": (
            an_analysis(hypotheses=[{"held": False}]),
            ["0 of 1 measured expectations of the earlier attempt held."],
        ),
        "nothing to say": (an_analysis(hypotheses=[{"held": None}]), []),
    },
    "quality_sentences": {
        "claim": (
            an_analysis(verdict={"topk_7": STATIC | {"equivalent_to_baseline": True},
                                 "a": a_verdict(), "b": a_verdict(equivalent_to_baseline=True),
                                 "c": a_verdict("worse"),
                                 "d": a_verdict("undecided", equivalent_to_baseline=True)}),
            ["Better than static Top-K at equal compute: `a`, `b`.",
             "Worse than static Top-K at equal compute: `c`.",
             "Within 1 % of `topk_8`'s perplexity (equivalence test): `b`, `d`."],
        ),
        "no claim": (an_analysis(verdict={"a": a_verdict("undecided")}), []),
        "nothing to say": (an_analysis(), []),
    },
    "amount_sentences": {
        "claim": (
            an_analysis(n_prompts=12),
            ["So few prompts (12) show large effects only; small ones need more."],
        ),
        "no claim": (an_analysis(n_prompts=30), []),
        "nothing to say": (an_analysis(n_prompts=0), []),
    },
    "left_out_sentences": {
        "claim": (
            {"left_out": {"bh_3": 2}, "n_items": 23, "n_own_items": 24, "n_other_inputs": 1},
            ["`bh_3` is left out: it has only 2 of the 24 items of the model's own routing.",
             "Compared are the 23 of 24 items that all the others have.",
             "Left out: 1 score of documents whose input was not the model's own routing's."],
        ),
        "no claim": ({"left_out": {}, "n_items": 24, "n_own_items": 24}, []),
        "nothing to say": ({}, []),
    },
    "other_input_sentences": {
        "claim": (
            {"baseline": "topk_8", "tasks": [{"configuration": "a", "task": "arc", "n_other_inputs": 2}]},
            ["`a` on arc: 2 documents left out, whose input was not `topk_8`'s."],
        ),
        "no claim": (
            {"baseline": "topk_8", "tasks": [{"configuration": "a", "task": "arc", "n_other_inputs": 0}]},
            [],
        ),
        "nothing to say": ({"baseline": "topk_8", "tasks": []}, []),
    },
    "calibration_sentence": {
        "claim": ({"calibrated_on": "text of *mine*"}, "Calibrated on text of \\*mine\\*."),
        "no claim": ({"n_tokens": 3}, ""),
        "nothing to say": ({}, ""),
    },
    "text_sentences": {
        "claim": (
            some_scores(["reference", "text", "text"], ["plain", "heldout", "heldout"]),
            [f"The scored text: {bh.DEFAULT_TEXTS['heldout']}.",
             "The references of 1 prompt were scored too, in `text_scores.csv`; the tests are about the text "
             "alone."],
        ),
        "no claim": (some_scores(["text", "text"], ["text", "heldout text"]), []),
        "references": (some_scores(["reference"], ["heldout"]), []),
        "older": (some_scores([""], ["heldout"]), []),
        "nothing to say": (some_scores([], []), []),
    },
}  # fmt: skip
CASES = [
    pytest.param(name, given, said, id=f"{name}: {case}")
    for name, cases in SENTENCES.items()
    for case, (given, said) in cases.items()
]


@pytest.mark.parametrize(("name", "given", "said"), CASES)
def test_sentences(name, given, said):
    assert getattr(bh, name)(given) == said


def test_every_sentence_has_cases():
    """Each function that claims something: with a claim, without one, and with nothing to say."""
    of_results = {"subject_sentence", "suite_time_sentence"}  # see the reports below
    functions = {name for name in vars(bh) if re.search("_sentences?$", name)}
    assert functions | {"null_origin"} == set(SENTENCES) | of_results
    assert {conclude.__name__ for conclude in bh.CONCLUSIONS} <= set(SENTENCES)
    for cases in SENTENCES.values():
        assert {"claim", "no claim", "nothing to say"} <= set(cases)


def test_cells():
    """Every form of a cell, and what stands where there is nothing."""
    row = {"number": 0.123456, "count": 12, "tiny": 1e-9, "p": 0.0333, "flag": True, "word": "a_b",
           "nan": math.nan, "empty": "", "text": "a|b\n*c* <d>", "none": None, "x_low": -1.0,
           "x_high": 2.0, "y_low": 1.0, "numpy": np.bool_(False)}  # fmt: skip
    for key, form, cell in (
        ("number", ".2f", "0.12"), ("number", "", "0.123456"), ("count", "d", "12"),
        ("tiny", "p", "< 0.0001"), ("p", "p", "0.0333"), ("flag", "s", "yes"), ("numpy", "", "no"),
        ("word", "code", "`a_b`"), ("word", "s", "a_b"), ("word", "", "a\\_b"),
        ("text", "", "a\\|b \\*c\\* &lt;d&gt;"),
        ("x", "+.1f to +.1f", "-1.0 to +2.0"), ("y", ".1f to .1f", bh.NOTHING_TO_SHOW),
        *((key, ".2f", bh.NOTHING_TO_SHOW) for key in ("nan", "none", "empty", "absent")),
    ):  # fmt: skip
        assert bh.show(row, key, form) == cell


def test_tables_of_the_report():
    """A column that has nothing to show in any row is left out; the first always stands."""
    columns = [bh.ReportColumn(*of) for of in (("name", "name", "code"), ("x", "x", ".1f"), ("y", "y"))]
    rows = [{"name": "a", "x": 1.0, "y": None}, {"name": "b", "x": None}]
    assert bh.markdown_table(rows, columns) == "| name | x |\n| --- | ---: |\n| `a` | 1.0 |\n| `b` | – |"
    assert bh.markdown_table([{}], columns) == "| name |\n| --- |\n| – |"


def test_categories_and_configurations_make_the_smaller_table():
    """The more numerous of the two are the rows."""

    def analysis(categories, names):
        mean = {"avg_experts_per_token": {"mean": 4.0}}
        by_category = {category: dict.fromkeys(names[: n + 1], mean) for n, category in enumerate(categories)}
        return {"summary_by_category": by_category}

    few = bh.category_table(analysis(["a|b"], ["x", "y"]), ["x", "y"])
    assert few == "| configuration | a\\|b |\n| --- | ---: |\n| `x` | 4.00 |\n| `y` | – |"
    many = bh.category_table(analysis(["a", "configuration"], ["x", "y"]), ["x", "y"])
    lines = ["| category | `x` | `y` |", "| --- | ---: | ---: |", "| a | 4.00 | – |"]
    assert many == "\n".join([*lines, "| configuration | 4.00 | 4.00 |"])


# Whole reports

SECTIONS = ("Executive summary", "Summary by configuration", "Statistical tests", "Performance by category",
            "Plots", "Conclusions and recommendations", "Configuration details")  # fmt: skip
SPEC_PLOTS = {"avg_experts_comparison", "inference_time_comparison", "expert_utilization_cv",
              "experts_by_category", "experts_vs_latency"}  # fmt: skip


def check_report(text):
    """It reads as a report: the sections, tables of one width, nothing empty, nothing of Python's."""
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    assert len(set(headings)) == len(headings)
    parts = re.split(r"^(#+) (.*)$", text, flags=re.MULTILINE)[1:]
    levels = [*parts[::3], ""]
    for level, following, title, content in zip(levels, levels[1:], parts[1::3], parts[2::3], strict=False):
        has_parts = len(following) > len(level)
        assert content.strip() or has_parts, f"an empty section: {title}"
    for widths in table_widths(text):
        assert len(widths) == 1
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE):
        assert table.count("\n") > 2, f"a table without rows: {table}"
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        for _, _, *column in zip(*cells, strict=True):
            assert {cell.strip() for cell in column} != {bh.NOTHING_TO_SHOW}
    assert not re.search(r"\b(nan|None|inf|NaN|NaT|Undefined|dict_|array)\b", text)
    assert not re.search(r"(?<!of )\b1 (configurations|prompts|documents|new tokens)\b", text)
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]$|  \.|\( |: *$(?!\n\n[|-])", text, flags=re.MULTILINE)


def sections_of(text):
    """Heading -> what stands below it, for the headings of the second level."""
    _, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {heading: content.strip() for heading, content in zip(parts[::2], parts[1::2], strict=True)}


def check_outputs(folder, configs, without=frozenset()):
    """Plots and report of a run are complete."""
    from PIL import Image

    drawn = {path.stem for path in (folder / "plots").glob("*.png")}
    assert SPEC_PLOTS - without <= drawn <= set(bh.PLOTS)
    for name in drawn:
        with Image.open(folder / "plots" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert min(image.size) > 600
            assert any(low < high for low, high in image.convert("RGB").getextrema())
    report = (folder / "REPORT.md").read_text(encoding="utf-8")
    check_report(report)
    links = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert {Path(link).stem for link in links} == drawn
    assert all((folder / link).is_file() for link in links)
    assert all(name in report for name in configs)
    return report


@pytest.mark.parametrize(
    ("configs", "prompts"),
    [(tuple(bh.ROUTING_CONFIGS), 8), (("topk_8",), 3), (("bh_loose",), 1), (("topk_8", "bh_loose"), 1)],
)
def test_report(configs, prompts, tmp_path):
    """Complete for the whole suite, for one configuration and for one prompt."""
    results = invented_results(configs, prompts)
    write_results(results, tmp_path)
    bh.write_report(results.generation, tmp_path)
    check_outputs(tmp_path, configs)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The default suite on the embedded model, from the command line, with few new tokens."""
    output = tmp_path_factory.mktemp("default")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CALIBRATION.items():
            patch.setattr(bh, name, value)
        patch.setattr(bh, "default_documents", DEFAULT_DOCUMENTS)
        assert cli(EMBEDDED, output, "--max-tokens", 4, "--max-windows", 12) == 0
    return output


def test_report_of_the_default_run(default_run):
    """It says what was asked for and what was scored beside it; every plot of the kind is there."""
    report = check_outputs(default_run, bh.ROUTING_CONFIGS)
    results = bh.Results.read(default_run)
    assert re.search(
        r"float32 on cpu: 5 configurations x 12 prompts with 4 new tokens each, \d+\.\d seconds of "
        r"inference; the text of 12 documents scored under 12 configurations, the same 5 and 7 of static "
        r"Top-K beside them\.\n",
        report,
    )
    sections = sections_of(report)
    assert "Failed experiments" not in sections
    tested = re.findall(r"^\| `(\w+)`", sections["Statistical tests"], flags=re.MULTILINE)
    assert set(tested) == {name for name in bh.ROUTING_CONFIGS if name != bh.BASELINE}
    verdicts = re.findall(r"^\| `(\w+)`", sections["Quality at equal compute"], flags=re.MULTILINE)
    assert set(verdicts) == set(results.scores["config_name"])
    assert "Suite time: " in report
    drawn = {path.stem for path in (default_run / "plots").glob("*.png")}
    assert drawn == set(bh.PLOTS) - {"task_scores", "field"}


def test_analysis_summary_of_the_default_run(default_run):
    analysis = strict_loads((default_run / "analysis_summary.json").read_text())
    assert {"summary_by_config", "summary_by_category", "statistical_tests"} <= set(analysis)
    assert analysis["n_rows"] == 60 + (12 + 12) * 12
    assert {row["n_items"] for row in analysis["verdict"].values()} == {12}
    assert set(analysis["statistical_tests"]) == set(bh.ROUTING_CONFIGS) - {bh.BASELINE}


def text_only():
    return dataclasses.replace(invented_results(("topk_8", "bh_strict", "top_p"), 6),
                               generation=bh.EMPTY_RESULTS.generation)  # fmt: skip


def tasks_only():
    return dataclasses.replace(bh.EMPTY_RESULTS, tasks=invented_tasks(("topk_8", "bh_strict"), 6))


def all_failed_but(name):
    """A run in which everything failed, except for one prompt under one configuration."""

    def fail(frame):
        failed = (frame["config_name"] != name) | (frame["prompt_id"] != "p0")
        frame.loc[failed, ["status", "error"]] = ["error", "OutOfMemoryError: no | memory"]
        numbers = [column.name for column in bh.GENERATION.columns if column.kind is float]
        frame.loc[failed, numbers] = math.nan
        return frame

    results = invented_results(("topk_8", "bh_strict"), 3)
    return dataclasses.replace(bh.EMPTY_RESULTS, generation=fail(results.generation))


ODD_RUNS = {  # name -> results, what the summary says, and what sections must and must not be there
    "text only": (
        text_only,
        "the text of 6 documents scored under 10 configurations, 8 of them static Top-K.",
        {"Statistical tests": "Each configuration against `topk_8`, paired by window.",
         "Summary by configuration": "over windows of the mean over tokens and layers",
         "Quality at equal compute": "| `bh_strict` | "},
        ("Suite time", "Times are medians", "time, s", "new tokens", "could not be drawn", "by prompt"),
    ),
    "tasks only": (
        tasks_only,
        "2 configurations x 12 documents of tasks.",
        {"Statistical tests": "Tasks are compared one by one, in the table of downstream tasks.",
         "Downstream tasks": "| words\\_of\\_text | `bh_strict` |",
         "Performance by category": "| choice | ",
         "Conclusions and recommendations": "measured expectations of the earlier attempt held."},
        ("Quality at equal compute", "Suite time", "time, s", "scored text"),
    ),
    "tasks of other names": (
        lambda: renamed(tasks_only(), topk_8="own", bh_strict="mine"),
        "2 configurations x 12 documents of tasks.",
        {"Conclusions and recommendations": "This run supports no conclusion beyond its tables.",
         "What was expected, and what was measured": "This run has no configuration of theirs."},
        ("measured expectations",),
    ),
    "one configuration": (
        lambda: invented_results(("topk_8",), 3),
        "1 configuration x 3 prompts with 10 new tokens each, ",
        {"Executive summary": "the same 1 and 7 of static Top-K beside them.",
         "Statistical tests": "There is nothing to compare: no prompt was measured under"},
        ("all differ by the same amount", "paired by"),
    ),
    "one prompt": (
        lambda: invented_results(("topk_8", "bh_strict"), 1),
        "2 configurations x 1 prompt with 10 new tokens each, ",
        {"Statistical tests": "at least 2 independent units are needed, not 1",
         "Quality at equal compute": "- `bh_strict` has no test at equal compute: at least 2 independent",
         "Summary by configuration": "| `topk_8` | 8.00 |"},
        ("95 % interval -", "1 items"),
    ),
    "all failed but one": (
        lambda: all_failed_but("bh_strict"),
        "2 configurations x 1 prompt with 10 new tokens each, ",
        {"Executive summary": "5 of 6 rows failed and are left out.",
         "Statistical tests": "There is nothing to compare: no prompt was measured under",
         "Failed experiments": "| `topk_8` | p0 | OutOfMemoryError: no \\| memory |"},
        ("Quality at equal compute", "± 0", "topk_8` | 8"),
    ),
    "no plot": (
        lambda: invented_results(("topk_8", "bh_strict"), 2),
        "2 configurations x 2 prompts",
        {"Plots": "No plot lies beside this report."},
        ("![",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_RUNS)
def test_report_of_odd_runs(kind, tmp_path):
    """No part of a report is empty or of something that the run does not have."""
    make, amount, said, unsaid = ODD_RUNS[kind]
    results = make()
    if kind == "no plot":
        report = report_of(results, tmp_path)
    else:
        write_results(results, tmp_path)
        drawn = bh.write_report(results.generation, tmp_path)
        assert drawn.failed == {}
        report = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    check_report(report)
    assert f"x, x on x: {amount}" in report
    sections = sections_of(report)
    for heading, words in said.items():
        assert words in sections[heading], (heading, sections[heading])
    assert [words for words in unsaid if words in report] == []


def test_a_key_that_is_missing_raises(tmp_path, monkeypatch):
    """StrictUndefined: a report is written whole, or not at all; and nothing is computed that none reads."""
    results = invented_results(("topk_8", "bh_strict"), 3)
    diagnostics = {"null_diagnostics": invented_diagnostics()}
    report_of(results, tmp_path)
    analysis = analysis_of(results, tmp_path) | diagnostics
    context = bh.report_context(results, analysis, tmp_path, {"layer_profile": "no width"})
    shown = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(bh.REPORT_TEMPLATE))
    assert shown == set(context) | {"bullets", "table"}
    # With something in every conditional part, so that each is looked at.
    rows = {name: [{"configuration": "x"}] for name in ("tasks", "layers", "failures")}
    rows |= {name: [{"configuration": "x"}] for name in ("compute", "phases", "throughput")}
    rows["token_kinds"] = [{"words": "x"}]
    leagues = {"league": "x", "task_leagues": {"x": ("x", "x", ["x"])}}
    full = context | rows | leagues | {"shuffles": ["x"], "diverging": True, "plots": [("x", "X")]}
    before = (tmp_path / "REPORT.md").read_bytes()
    for name in full:
        lacking = {key: value for key, value in full.items() if key != name}
        monkeypatch.setattr(bh, "report_context", lambda *args, lacking=lacking: lacking)
        with pytest.raises(jinja2.UndefinedError, match=f"'{name}' is undefined"):
            bh.generate_markdown_report(results.generation, analysis, tmp_path / "REPORT.md")
        assert (tmp_path / "REPORT.md").read_bytes() == before


def test_tables_of_the_template_are_declared():
    """Each table is shown once, and each that is shown is declared."""
    shown = re.findall(r'table\("(\w+)"', bh.REPORT_TEMPLATE)
    assert sorted([*shown, "league"]) == sorted(bh.REPORT_TABLES)  # that one is shown by `league_table`


def test_report_says_where_intervals_hold(tmp_path):
    """Next to the intervals, and only where there are too few units."""
    for prompts, told in ((12, True), (bh.INTERVALS_HOLD_FROM, False)):
        report = report_of(invented_results(("topk_8", "bh_strict"), prompts), tmp_path)
        assert ("are too narrow when differences are skewed" in report) is told
        assert (f"as few as {prompts})" in report) is told


def test_advice_fits_the_method(tmp_path):
    """A constant count is told of rules that could adapt, with their own knob, and of nothing else."""
    results = invented_results(("topk_8", "bh_strict", "bh_loose"), 4)
    constant = results.generation.assign(avg_experts_per_token=4.0, std_experts_per_token=0.0)
    results = dataclasses.replace(results, generation=constant)
    for weights in ("model", "sum"):
        fields = {"method": "topk", "k": 4, "renormalize": weights}
        results = configured(results, "bh_strict", **ADAPTIVE_GONE | fields)
        report = report_of(results, tmp_path)
        assert "`bh_strict` ran 4.00 experts on every prompt" not in report
        advice = "`bh_loose` ran 4.00 experts everywhere: it does not adapt; choose another `alpha`"
        assert advice in report
    top_p = configured(results, "bh_loose", method="top_p", p=0.4, alpha=None, p_values=None)
    assert "it does not adapt; choose another `p`" in report_of(top_p, tmp_path)


def test_results_without_the_models_own_topk(tmp_path):
    """The report says what differences are to, and why there is no comparison."""
    results = invented_results(("topk_8", "bh_strict"), 6)
    alone = changed(only(results, "bh_strict"), lambda frame: frame.assign(own_k=math.nan))
    report = report_of(alone, tmp_path)
    differences = "No row shows which configuration is the model's own Top-K; differences are to `bh_strict`."
    assert differences in report
    assert "cannot compare quality at equal compute: no static Top-K configuration was run." in report
    narrow = renamed(only(results, "topk_4", "bh_strict"), topk_4="narrow")
    narrow.scores.loc[narrow.scores["config_name"] == "bh_strict", "avg_experts_per_token"] = 5.0
    report = report_of(narrow, tmp_path)
    assert "Differences are to `narrow`; the model's own routing is Top-8." in report
    assert "but static Top-K was measured at 4.00 only" in report


def test_calibration_on_the_scored_text_is_told(tmp_path):
    results = invented_results(("topk_8", "bh_strict"), 3)
    diagnostics = invented_diagnostics()
    del diagnostics["n_shared_tokens"]
    for shared, words in (
        ({}, "1458 tokens of the scored text, of which it is not known whether they were used for calib"),
        ({"n_shared_tokens": 0}, "1458 tokens of the scored text, not used for calibration,"),
        ({"n_shared_tokens": 50}, "of which 50 were used for calibration as well"),
    ):
        report = report_of(results, tmp_path, null_diagnostics=diagnostics | shared)
        assert words in report
        assert ("not used for calibration" in report) == (shared == {"n_shared_tokens": 0})


# Texts of others in the report

NASTY = "a|b \\| `c` \\\n\n## d\n| e <script>alert(1)</script> [f](g) ![h](i) \r\n---"


@pytest.mark.parametrize(
    "column", ["prompt_category", "prompt_id", "prompt_text", "generated_text", "model_name", "error"]
)
def test_texts_cannot_break_the_report(column, tmp_path):
    """Pipes, newlines, backticks, headings and HTML in any text leave the tables whole."""
    results = dataclasses.replace(bh.EMPTY_RESULTS, generation=invented_generation(("topk_8", "bh_loose"), 3))
    frame = results.generation
    frame.loc[frame["prompt_id"] == "p2", ["status", "error"]] = ["error", "failed"]
    clean = report_of(results, tmp_path)
    nasty = frame.copy()
    nasty.loc[nasty["config_name"] == "bh_loose", column] = NASTY
    if column == "prompt_id":
        nasty[column] = [f"{NASTY} {i // 2}" for i in range(len(nasty))]
    report = report_of(dataclasses.replace(results, generation=nasty), tmp_path)
    assert all(len(widths) == 1 for widths in table_widths(report))
    assert "<script>" not in report
    assert len(table_widths(report)) == len(table_widths(clean))
    assert re.findall("^#+ .*", report, flags=re.MULTILINE) == re.findall("^#+ .*", clean, flags=re.MULTILINE)


@pytest.mark.parametrize("column", ["item_id", "document", "category", "task", "metric", "generated_text"])
def test_texts_of_scores_and_tasks_cannot_break_the_report(column, tmp_path):
    results = dataclasses.replace(text_only(), tasks=tasks_only().tasks)
    write_results(results, tmp_path)
    clean = report_of(results, tmp_path)
    nasty = changed(
        results, lambda frame: frame.assign(**{column: NASTY + frame[column]}) if column in frame else frame
    )
    report = report_of(nasty, tmp_path)
    assert all(len(widths) == 1 for widths in table_widths(report))
    assert "<script>" not in report
    assert len(table_widths(report)) == len(table_widths(clean))
    assert re.findall("^#+ .*", report, flags=re.MULTILINE) == re.findall("^#+ .*", clean, flags=re.MULTILINE)


def test_a_configuration_name_that_could_break_the_report_is_refused(tmp_path):
    results = renamed(invented_results(("topk_8", "bh_loose"), 3), bh_loose=NASTY)
    with pytest.raises(bh.UserError, match="configuration name"):
        report_of(results, tmp_path)


HOSTILE_TEXTS = (
    "=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "'=1", "a | b\n| c | d |\n\n# heading",
    "```\ncode\n```", "<script>alert(1)</script><!-- ", "[link](http://x) ![image](http://x/y.png)",
    "\u202egpj.exe \u2066x\u2069 \u200b", "bell \x07 escape \x1b[2J\x1b]0;title\x07 return \r over",
    "2026-01-01 00:00:00,000 ERROR forged\n2026-01-01 00:00:00,000 INFO line", "\x00 NUL",
    "$\\frac{1$ $x^$ \\", "é" * 500_000,
)  # fmt: skip


def test_hostile_texts_get_nowhere(mock_model, tmp_path, monkeypatch):
    """Prompts, categories and answers are data in CSV, report, log and plots, whatever they hold."""
    answers = itertools.cycle(HOSTILE_TEXTS)
    monkeypatch.setattr(MockTokenizer, "decode", lambda self, ids, **ignored: next(answers))
    prompts = [
        {"id": text[:60], "text": f"{text} x", "category": text[:60], "description": text, "reference": text}
        for text in HOSTILE_TEXTS
    ]  # fmt: skip
    runner = mock_runner(mock_model, tmp_path, command="run '\n# forged")
    with bh.log_to(tmp_path / "experiment_log.txt"):
        frame = runner.run_full_experiment_suite(CONFIGS, prompts, 2)
    shown = [text.replace("\0", "\u2400") for text in HOSTILE_TEXTS]
    assert frame["prompt_id"].tolist() == [text[:60] for text in shown for _ in CONFIGS]
    assert frame["prompt_text"].tolist() == [f"{text} x" for text in shown for _ in CONFIGS]
    assert set(frame["generated_text"]) <= set(shown)
    csv.field_size_limit(10**8)
    for table in (bh.GENERATION, bh.SCORES):
        with (tmp_path / table.file).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert not [cell for row in rows for cell in row if re.match(r"[=+@\t\r]|-[^\d]", cell)]
    only_plots(monkeypatch, "experts_by_category", "avg_experts_comparison")
    bh.write_report(frame, tmp_path)
    assert_hostile_texts_get_nowhere(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# 16. Command line
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def softmax_run(tiny_folder, tmp_path_factory):
    """The output of the whole default suite from the command line, with the degenerate p-values."""
    output = tmp_path_factory.mktemp("softmax")
    assert cli(tiny_folder, output, "--p-values", "softmax", "--max-tokens", 2, "--text", "none") == 0
    return output


def test_command_line(softmax_run):
    """60 experiments, all files, and the degenerate rule shown for what it is: mean experts 1.00."""
    frame = bh.Results.read(softmax_run).generation
    assert len(frame) == 60
    adaptive = frame[frame["method"] == "bh"]
    assert len(adaptive) == 48
    assert (adaptive["avg_experts_per_token"] == 1).all()
    assert (frame[frame["method"] == "topk"]["avg_experts_per_token"] == 4).all()
    report = check_outputs(softmax_run, bh.ROUTING_CONFIGS)
    assert "| `bh_loose` | 1.00 ± 0.00 |" in report
    assert "same amount" in report
    assert "with `p_values` = softmax that is certain" in report
    assert (softmax_run / "experiment_log.txt").stat().st_size > 0


def test_analyze_only(softmax_run, tmp_path, monkeypatch):
    """Analysis, plots and report are redone from the tables alone, byte for byte."""
    for table in bh.TABLES:
        if (softmax_run / table.file).exists():
            shutil.copy(softmax_run / table.file, tmp_path)
    only_plots(monkeypatch, "experts_by_category", "layer_profile", "quality_vs_experts")
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 0
    plots = [f"plots/{name}.png" for name in bh.PLOTS]
    for name in ("analysis_summary.json", *plots):
        assert (tmp_path / name).read_bytes() == (softmax_run / name).read_bytes(), name
    reports = [(folder / "REPORT.md").read_text().split("## Plots") for folder in (tmp_path, softmax_run)]
    assert reports[0][0] == reports[1][0]
    assert reports[0][1].split("## What")[1] == reports[1][1].split("## What")[1]


# Options


def test_options_are_declared_whole():
    """Each option once, with words; what it needs is an option; what has choices has a valid default."""
    names = [option.name for option in bh.OPTIONS]
    assert len(set(names)) == len(names)
    parsed = vars(bh.build_parser().parse_args([]))
    for option in bh.OPTIONS:
        assert option.words
        assert not option.words.endswith(".")
        assert set(option.needed) <= set(names)
        assert option.choices is None or option.default in (None, *option.choices)
        assert parsed[option.key] == (False if option.parse is None else option.default)
        assert (option.least is None) == (option.parse is not int or option.name == "seed")
    assert set(parsed) == {option.key for option in bh.OPTIONS}
    for owner, allowed in bh.ALONE.items():
        assert {owner, *allowed} <= set(parsed)


WHOLE_NUMBERS = [option for option in bh.OPTIONS if option.least is not None]


@pytest.mark.parametrize("option", WHOLE_NUMBERS, ids=lambda option: option.name)
def test_whole_numbers_below_the_least_are_refused(option, tmp_path, capsys):
    given = {option.needed[0]: "x"} if option.needs else {}
    needed = [f"--{name}" if name == "do-sample" else f"--{name}={value}" for name, value in given.items()]
    least = option.least
    call = ["--model", "nowhere", "--output", str(tmp_path), *needed, f"--{option.name}={least - 1}"]
    assert bh.main(call) == 2
    (error,) = error_lines(capsys)
    assert error == f"error: --{option.name} {least - 1}: it must be a whole number of at least {least}"


@pytest.mark.parametrize("option", [option for option in bh.OPTIONS if option.needs], ids=lambda o: o.name)
def test_options_name_the_one_they_need(option, tmp_path, capsys):
    value = [] if option.parse is None else ["1"]
    assert bh.main(["--model", "nowhere", "--output", str(tmp_path), f"--{option.name}", *value]) == 2
    assert error_lines(capsys) == [f"error: --{option.name} needs --{' or --'.join(option.needed)}"]


EMPTY = [option for option in bh.OPTIONS if option.parse in (str, bh._names) and not option.choices]


@pytest.mark.parametrize("option", EMPTY, ids=lambda option: option.name)
def test_empty_words_are_refused(option, tmp_path, capsys):
    assert bh.main(["--output", str(tmp_path), f"--{option.name}="]) == 2
    assert error_lines(capsys) == [f"error: --{option.name} is empty"]


ANALYZE = "--analyze-only"
LIST = "--list-architectures"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--text", "none", "--window", "256"], "--window means nothing beside --text none"),
     (["--p-values", "flat", "--configs", "topk_8,top_p"], "no chosen configuration takes a null"),
     (["--match-experts", "4", "--configs", "topk_1,topk_8"], "every chosen configuration is Top-K"),
     (["--baseline", "bh_strct"], 'Did you mean "bh_strict"'),
     (["--baseline", "topk_3", "--configs", "topk_8,top_p"], "Available: topk_8, top_p"),
     ([ANALYZE], "holds none of bh_routing_results.csv"), ([ANALYZE, "--output", "{file}"], "{file}"),
     ([ANALYZE, "--seed", "0"], "--seed means nothing beside --analyze-only"),
     ([ANALYZE, "--model", "x"], "--model means nothing beside --analyze-only"),
     ([ANALYZE, "--no-resume"], "--no-resume means nothing beside --analyze-only"),
     ([LIST, "--window", "256"], "--window means nothing beside --list-architectures"),
     ([LIST, "--output", "x"], "--output means nothing beside --list-architectures"),
     ([LIST, ANALYZE], "means nothing beside")],
)  # fmt: skip
def test_options_that_mean_nothing(options, message, tmp_path, monkeypatch, capsys):
    """They are refused, even with their default as value, before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("keep me")

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(bh, "load_model", load)
    assert bh.main([option.replace("{file}", str(file)) for option in options]) == 2
    (error,) = error_lines(capsys)
    assert message.replace("{file}", str(file)) in error
    assert file.read_text() == "keep me"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--suite", "frontir"], 'Did you mean "frontier"'),
     (["--configs", "bh_strct"], 'Did you mean "bh_strict"'),
     (["--match-experts", "9"], "can keep"), (["--text", "x", "--window", "0"], "--window 0"),
     (["--text", "nowhere.txt"], "nowhere.txt"),
     (["--prompts", "x.txt", "--dataset", "y.csv"], "--prompts and --dataset exclude each other"),
     (["--prompts", "x.txt", "--tasks", "y"], "--prompts and --tasks exclude each other"),
     (["--text", "x.txt", "--tasks", "y"], "--text and --tasks exclude each other"),
     (["--tasks", ""], "--tasks is empty"), (["--configs", ""], "--configs is empty"),
     (["--routing-configs", "nowhere.json"], "--routing-configs nowhere.json: [Errno 2]")],
)  # fmt: skip
def test_bad_options(tiny_folder, tmp_path, capsys, arguments, message):
    """Mistakes on the command line are one line and exit code 2."""
    base = ["--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert bh.main([*base, *arguments]) == 2
    (error,) = error_lines(capsys)
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--num-samples", "2"], "needs --do-sample"), (["--sampling-top-p", "0.9"], "needs --do-sample"),
     (["--do-sample", "--sampling-top-p", "0"], r"in \(0, 1\]"),
     (["--do-sample", "--sampling-temperature", "0"], "above 0"),
     (["--do-sample", "--tasks", "x"], "--tasks and --do-sample exclude each other"),
     (["--tasks", "x", "--task-limit", "1.5"], "--task-limit 1.5: it must be a whole number, or a share"),
     (["--tasks", "x", "--task-limit", "0"], "--task-limit 0: "),
     (["--tasks", "x", "--task-limit", "nan"], "--task-limit nan: "),
     (["--dtype", "bfloat16"], "--no-fp16 means"), (["--device-map", "auto"], "exclude each other"),
     (["--num-samples", "0"], "--num-samples 0"), (["--batch-size", "0"], "batch_size 0")],
)  # fmt: skip
def test_contradictory_options(options, message, tiny_folder, tmp_path, capsys):
    """They end with exit code 2 and one line that names them."""
    error = refused_in_one_line(options, tiny_folder, tmp_path, capsys)
    assert re.search(message, error)


def test_baseline_is_passed_on(tmp_path, monkeypatch, capsys):
    """--baseline reaches the run and the report; the report alone knows the names from the results."""
    results = renamed(invented_results(("topk_8", "bh_loose"), 2), bh_loose="mine")
    seen = []

    class Runner:
        processes = SimpleNamespace(rank=0)

        def __init__(self, *args, **options):
            self.results = results

        def run(self, *args, baseline, **options):
            seen.append(baseline)

        run_full_experiment_suite = run_tasks = run

    monkeypatch.setattr(bh, "BHExperimentRunner", Runner)

    def write_report(frame, folder, baseline):
        assert frame is results.generation or len(frame) == len(results.generation)
        seen.append(baseline)
        return bh.WrittenReport([], {}, analysis)

    analysis = analysis_of(results, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(bh, "write_report", write_report)
        for options, expected in (
            (["--text", "none"], [None, None]),
            (["--baseline", "bh_loose", "--text", "none"], ["bh_loose"] * 2),
            (["--baseline", "bh_loose", "--tasks", "x"], ["bh_loose"] * 2),
            ([ANALYZE, "--baseline", "mine"], ["mine"]),
        ):
            seen.clear()
            assert bh.main(["--output", str(tmp_path), *options]) == 0
            assert seen == expected
    assert bh.main(["--output", str(tmp_path), ANALYZE, "--baseline", "bh_loose"]) == 2
    (error,) = error_lines(capsys)
    assert "unknown baseline 'bh_loose'" in error
    assert "Available: topk_8, mine" in error


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--match-experts", "3,x", "numbers, separated by commas"),
        ("--batch-size", "x", "a whole number, or auto"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_in_words(option, value, allowed, capsys):
    with pytest.raises(SystemExit):
        bh.main([option, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument {option}: {value!r}, but it must be {allowed}")


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        bh.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("tokens in a window of text (default: 256)", "calibration text (default: 0)"):
        assert words in text
    for option in bh.OPTIONS:
        assert f"--{option.name}" in text
        assert re.sub(r"[\s-]", "", option.words) in re.sub(r"[\s-]", "", text)
    args = bh.parse_options(["--seed", "0", "--no-resume"])
    assert (args.seed, args.window, args.given) == (0, bh.DEFAULT_WINDOW, {"seed", "no_resume"})


def test_the_null_of_every_rule_that_tests_is_set():
    """--p-values is for those, and leaves the others as they are."""
    args = bh.parse_options(["--suite", "all", "--p-values", "flat"])
    for config in bh.choose_configs(args).values():
        rule = bh.RULES[config["method"]]
        assert config.get("p_values") == ("flat" if rule.uses_null else None)


FUZZED_CALLS = int(os.environ.get("BH_FUZZ", 150)) // 2  # BH_FUZZ=3000 for a long look
option_words = strategies.text("ab0-.,:/\n\u202e'\"$", max_size=6) | strategies.sampled_from(
    ["-1", "0", "1", "1e9", "nan", "inf", "auto", "bh_strict", "frontier", "cpu", "", "../x", "*"]
)


@settings(max_examples=FUZZED_CALLS, deadline=None, derandomize=True, database=None, print_blob=False,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(strategies.lists(strategies.tuples(strategies.sampled_from(bh.OPTIONS), option_words), max_size=5))
def test_command_lines_of_anything(tmp_path_factory, options):
    """Exit code 2 with a message, or 0 where a list was asked for; never an exception."""
    folder = tmp_path_factory.getbasetemp() / "fuzz_cli"
    argv = [f"--{option.name}" + ("" if option.parse is None else f"={word}") for option, word in options]
    if any(part.startswith(("--tasks", "--dataset", "--text=", "--list-arch")) for part in argv):
        return  # those that load libraries or print lists have tests of their own
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = bh.main([*argv, "--model", str(folder / "no model"), "--output", str(folder)])
        except SystemExit as stop:  # argparse
            code = stop.code
    assert code == 2, (argv, errors.getvalue())
    assert "error: " in errors.getvalue()
    assert "Traceback" not in errors.getvalue()


# How the script is written


def script_functions():
    tree = ast.parse(Path(bh.__file__).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_functions_are_short():
    """At most 80 lines, their docstring not counted."""
    lengths = {}
    for node in script_functions():
        docstring = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1
        lengths[node.name] = lines - (len(docstring.splitlines()) if docstring else 0)
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_nothing_is_named_inside_a_comprehension():
    """A walrus in one is an assignment that is easily overlooked."""
    tree = ast.parse(Path(bh.__file__).read_text(encoding="utf-8"))
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    hidden = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, comprehensions)
        and any(isinstance(part, ast.NamedExpr) for part in ast.walk(node))
    ]
    assert hidden == []


def test_names_say_what_a_thing_is():
    """`found`, `what` and `how` fit everything, so they say nothing: rare as names of values."""
    tree = ast.parse(Path(bh.__file__).read_text(encoding="utf-8"))
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    uses = {name: names.count(name) for name in ("found", "what", "how")}
    print(f"names that say nothing: {uses}")
    assert max(uses.values()) <= 10


def test_nothing_is_executed():
    """The script neither evaluates text nor unpickles, and starts one program: git, for its own version."""
    tree = ast.parse(Path(bh.__file__).read_text(encoding="utf-8"))
    forbidden = {"pickle", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "os.system", "torch.load", "__import__"), called
            assert not called.startswith("subprocess.") or called.startswith("subprocess.run")
            if called == "subprocess.run":
                assert ast.unparse(node.args[0]) == "command"
            assert not [word for word in node.keywords if word.arg == "shell"]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & forbidden
    assert bh.build_parser().parse_args([]).trust_remote_code is False


# ---------------------------------------------------------------------------------------------------------
# 17. The field: every published rule, what stands in for dropped experts, rule against rule
# ---------------------------------------------------------------------------------------------------------

STAND_INS = ("mean", "linear:3")
FIELD_MODELS = ("olmoe-grouped_mm", "mixtral", "mock")


def gates_of(logits, own_k=4, null=None, **more):
    return bh.Gates(bh.gate_scores(logits), null, logits, own_k, **more)


def literal_count(method, q, config, own_k, p_values, norms):
    """The published formula for one token, in plain Python; q, p_values [E] in the order of the experts."""
    ranked = sorted(q, reverse=True)
    experts = len(q)
    own = sum(ranked[:own_k])
    if method == "topk_p":
        return next(j for j in range(1, own_k + 1) if sum(ranked[:j]) / own >= config["p"] or j == own_k)
    if method == "relative_threshold":
        return sum(gate / own >= config["threshold"] for gate in ranked[:own_k])
    if method == "contribution":
        return sum(gate * norm >= config["threshold"] for gate, norm in zip(q, norms, strict=True))
    if method == "entropy":
        entropy = -sum(gate * math.log(gate) for gate in q) / math.log(experts)
        return round(config["min_k"] + (config["max_k"] - config["min_k"]) * config["scale"] * entropy)
    if method == "elbow":
        fall = [(ranked[0] - gate) / (ranked[0] - ranked[-1]) for gate in ranked]
        values = [fall[i] - config["slope"] * i / (experts - 1) for i in range(experts)]
        return values.index(max(values)) + 1
    if method == "gap":
        ratios = [ranked[i] / ranked[i + 1] for i in range(experts - 1)]
        return next((i + 1 for i, ratio in enumerate(ratios) if ratio >= config["ratio"]), experts)
    p = sorted(p_values)
    first = max(1, math.ceil(config["ranks"] * experts))
    values = [
        ((i + 1) / experts - p[i]) / math.sqrt(p[i] * (1 - p[i])) if 0 < p[i] < 1 else -math.inf
        for i in range(first)
    ]
    return values.index(max(values)) + 1


@pytest.mark.parametrize(
    ("method", "knobs"),
    [("topk_p", (0.3, 0.7, 1.0)), ("relative_threshold", (0.05, 0.2, 0.4)),
     ("contribution", (0.02, 0.1, 0.3)), ("entropy", (0.3, 0.8, 2.5)), ("elbow", (0.3, 1.0, 4.0)),
     ("gap", (1.05, 1.4, 6.0)), ("hc", (0.1, 0.5, 1.0))],
)  # fmt: skip
def test_rules_are_their_published_formula(method, knobs):
    torch.manual_seed(3)
    logits = torch.randn(200, 16, dtype=torch.float64) * 1.5
    norms = torch.rand(16, dtype=torch.float64) + 0.5
    null = bh.FlatNull(16)
    gates = gates_of(logits, null=null, relative_norms=norms)
    p_values = null.p_values(gates.scores)
    for knob in knobs:
        rule = bh.RULES[method]
        config = bh.resolve_config("x", {"method": method, rule.knob.name: knob, "max_k": 8})
        counts = rule.count(gates, config).tolist()
        expected = [
            literal_count(method, q.tolist(), config, 4, p.tolist(), norms.tolist())
            for q, p in zip(logits.softmax(-1), p_values, strict=True)
        ]
        assert counts == expected
        assert len(set(counts)) > 1 or knob in (knobs[0], knobs[-1])


def test_pooled_nulls_are_about_all_pairs():
    torch.manual_seed(0)
    logits = torch.randn(2, 50, 16)
    own = logits.topk(4).indices.to(torch.int16)
    calibration = bh.Calibration(logits, own)
    layer = 1
    for name, values in (
        ("pooled", bh.gate_scores(logits[layer], 2.0)),
        ("pooled_logits", logits[layer] / 2),
    ):
        null = bh.NULLS[name].make(calibration, layer, 2.0, 16)
        assert torch.equal(null.null_scores, values.flatten().sort().values)
        gates = bh.Gates(bh.gate_scores(logits[layer], 2.0), null, logits[layer] / 2, 4)
        p_values = null.p_values(values)
        for alpha in (0.05, 0.3, 0.9):
            assert torch.equal(gates.rejections(alpha), bh.bh_rejections(p_values, alpha))
        assert torch.allclose(gates.p_values, p_values.sort(dim=-1).values)


@pytest.mark.parametrize("null", [name for name, kind in bh.NULLS.items() if kind.is_calibrated])
def test_rules_that_need_calibration_say_so(mock_model, null):
    for config in (
        {"method": "bh", "p_values": null, "alpha": 0.5}, {"method": "contribution"},
        {"method": "topk", "k": 4, "stand_in": "mean"}, {"method": "topk", "k": 4, "stand_in": "linear:2"},
    ):  # fmt: skip
        with (
            pytest.raises(bh.UserError, match="calibration=calibrate"),
            bh.patched_routing(mock_model, config),
        ):
            pass


@pytest.fixture(scope="module", params=FIELD_MODELS)
def field_subject(request):
    """A model with all that rules and stand-ins can ask of a calibration."""
    model = build(request.param)
    tokenizer = MockTokenizer() if request.param == "mock" else byte_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bh, "LINEAR_SEQUENCES", 6)
        calibration = bh.calibrate(model, tokenizer, outputs=True, linear_ranks=(3,))
    layers = bh.find_moe_layers(model)
    return SimpleNamespace(model=model, calibration=calibration, layers=layers, own_k=layers[0].own_k)


def outputs_by_hand(subject, config):
    """Inputs and outputs of every layer's experts: layer -> ((hidden, indices, weights), output)."""
    seen = {}

    def watch(index):
        def hook(module, args, output):
            seen[index] = (args[:3], output)

        return hook

    patch = bh.patched_routing(subject.model, config, subject.calibration, subject.layers)
    with patch, contextlib.ExitStack() as stack:
        for layer in subject.layers:
            stack.enter_context(layer.experts.register_forward_hook(watch(layer.index)))
        logits_of(subject.model, sample_ids(2, 9))
    return seen


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_stand_ins_add_what_they_say(field_subject, stand_in):
    """Kept experts with the weights of the model's own Top-K, and for each dropped its weight x stand-in."""
    keep = field_subject.own_k - 2
    config = {"method": "topk", "k": keep, "stand_in": stand_in}
    for index, ((hidden, indices, weights), output) in outputs_by_hand(field_subject, config).items():
        layer = field_subject.layers[index]
        own = {}
        with torch.no_grad():
            # The router's own answer to the same input.
            hidden_again = hidden
            _, own_weights, own_indices = layer.router(hidden_again)
        own = dict(zip(("weights", "indices"), (own_weights, own_indices), strict=True))
        assert torch.equal(own["indices"], indices)
        expected = torch.zeros_like(hidden)
        stand_ins = field_subject.calibration.stand_in(index, stand_in)
        with torch.no_grad():
            for slot in range(field_subject.own_k):
                expert, weight = own["indices"][:, slot], own["weights"][:, slot, None]
                if slot < keep:
                    expected += layer.experts(hidden, expert[:, None], weight)
                else:
                    put = stand_ins.offset[expert]
                    if stand_ins.down is not None:
                        inner = torch.einsum("trh,th->tr", stand_ins.down[expert], hidden)
                        put = put + torch.einsum("thr,tr->th", stand_ins.up[expert], inner)
                    expected += weight * put
        assert torch.allclose(output, expected, atol=2e-5, rtol=1e-4)
        assert (weights != 0).sum(-1).unique().tolist() == [keep]


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_stand_ins_with_nothing_dropped_change_nothing(field_subject, stand_in):
    ids = sample_ids()
    before = logits_of(field_subject.model, ids)
    state = state_of(field_subject.model)
    for config in ({"method": "topk", "k": field_subject.own_k}, {"method": "threshold", "threshold": 1e-6}):
        config = config | {"stand_in": stand_in}
        if config["method"] == "threshold":
            config["max_k"] = field_subject.own_k
        with bh.patched_routing(field_subject.model, config, field_subject.calibration) as recorder:
            assert torch.equal(logits_of(field_subject.model, ids), before)
        assert recorder.total().row()["effective_experts"] == field_subject.own_k
    assert torch.equal(logits_of(field_subject.model, ids), before)
    assert state_of(field_subject.model) == state


def test_linear_maps_do_not_depend_on_what_was_drawn_before():
    """Those of wide layers are cut by random projections."""
    torch.manual_seed(0)
    inputs = torch.randn(12, 520)
    outputs = torch.randn(12, 520)
    fits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fits.append(bh._fit_linear_map(inputs, outputs, [2])[2])
    for first, second in zip(*fits, strict=True):
        assert torch.equal(first, second)


def test_one_token_and_many_get_the_same_stand_in(field_subject):
    """Few pairs read single maps, many go through one product: the sums are the same."""
    for stand_in in STAND_INS:
        part = field_subject.calibration.stand_in(0, stand_in)
        experts, hidden_size = part.offset.shape
        torch.manual_seed(1)
        hidden, weights = torch.randn(40, hidden_size), torch.rand(40, 3)
        indices = torch.stack([torch.randperm(experts)[:3] for _ in range(40)])
        together = part.output(hidden, indices, weights)
        alone = [part.output(hidden[t, None], indices[t, None], weights[t, None]) for t in range(40)]
        assert torch.allclose(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_effective_experts_count_what_stands_in(field_subject):
    layer = field_subject.layers[0]
    keep = field_subject.own_k - 1
    size = sum(weight.numel() for weight in layer.experts.parameters()) / layer.num_experts
    for stand_in, rank in (("nothing", None), ("mean", 0), ("linear:3", 3)):
        config = {"method": "topk", "k": keep, "stand_in": stand_in}
        with bh.patched_routing(field_subject.model, config, field_subject.calibration) as recorder:
            logits_of(field_subject.model, sample_ids())
        cost = 0 if rank is None else layer.hidden_size * (1 + 2 * rank) / size
        row = recorder.total().row()
        assert row["avg_experts_per_token"] == keep
        assert row["effective_experts"] == pytest.approx(keep + cost)


def test_means_are_those_of_the_lower_half():
    """Against a slow loop over tokens and slots."""
    model = build("olmoe-eager")
    layers = bh.find_moe_layers(model)
    ids = sample_ids(3, 20)
    calibration = bh.record_routers(model, [ids], outputs=True)
    seen = {}
    hook = layers[1].experts.register_forward_hook(lambda module, args, output: seen.update(args=args))
    logits_of(model, ids)
    hook.remove()
    hidden, indices, weights = (part.unflatten(0, (3, 20))[:, 1:].flatten(0, 1) for part in seen["args"])
    sums = collections.defaultdict(list)
    norms = collections.defaultdict(list)
    with torch.no_grad():
        for token in range(len(hidden)):
            for slot in range(4):  # OLMoE's candidates come best first
                expert = int(indices[token, slot])
                output = layers[1].experts(
                    hidden[token, None], indices[token, slot, None, None], torch.ones(1, 1)
                )[0]
                norms[expert].append(float(output.norm()))
                if slot >= 2:
                    sums[expert].append(output)
    for expert, outputs in sums.items():
        assert torch.allclose(calibration.means[1, expert], torch.stack(outputs).mean(0), atol=1e-5)
    for expert, values in norms.items():
        assert float(calibration.norms[1, expert]) == pytest.approx(np.mean(values), rel=1e-4)


def test_linear_maps_recover_a_linear_expert():
    """Outputs that are an affine map of rank 2 of the inputs are fitted exactly, but for the ridge."""
    torch.manual_seed(0)
    inputs = torch.randn(4000, 12, dtype=torch.float64)
    down, up, offset = torch.randn(2, 12).double(), torch.randn(12, 2).double(), torch.randn(12).double()
    outputs = offset + inputs @ down.T @ up.T
    fitted = bh._fit_linear_map(inputs, outputs, (1, 2))
    error = {
        rank: (offset + inputs @ down.T @ up.T - outputs).square().mean() / outputs.var()
        for rank, (offset, down, up) in fitted.items()
    }
    assert error[2] < (bh.RIDGE / len(inputs)) ** 2 * 4  # what the ridge takes off, squared
    assert error[2] < 0.001 * error[1]


def test_own_k_divides_by_the_models_own_sum(field_subject):
    keep = field_subject.own_k - 1
    for renormalize in ("own_k", "sum"):
        config = {"method": "topk", "k": keep, "renormalize": renormalize}
        for index, ((hidden, _, weights), _) in outputs_by_hand(field_subject, config).items():
            with torch.no_grad():
                _, own, _ = field_subject.layers[index].router(hidden)
            total = (
                own.sum(-1, keepdim=True) if renormalize == "own_k" else own[:, :keep].sum(-1, keepdim=True)
            )
            assert torch.allclose(weights[:, :keep], (own / total)[:, :keep], atol=1e-6)
            assert not weights[:, keep:].any()


def test_random_experts_keep_the_counts(field_subject):
    config = {"method": "threshold", "threshold": 0.1, "max_k": field_subject.own_k}
    counts = {}
    for is_random in (False, True):
        seen = outputs_by_hand(field_subject, config | {"random": is_random})
        (_, indices, weights), _ = seen[0]
        counts[is_random] = (weights != 0).sum(-1)
        assert indices.shape[1] == field_subject.own_k
    assert torch.equal(counts[False], counts[True])  # the first layer sees the same tokens


@pytest.mark.parametrize("width", [1, 2])
def test_the_oracle_keeps_what_puts_out_most(field_subject, width):
    """Of the model's own Top-K, however many candidates the router is asked for."""
    own_k = field_subject.own_k
    config = {"method": "oracle", "threshold": 1.0, "max_k": width * own_k}
    (hidden, indices, weights), _ = outputs_by_hand(field_subject, config)[0]
    layer = field_subject.layers[0]
    with torch.no_grad():
        _, own, chosen = layer.router(hidden)
        outputs = [layer.experts(hidden, chosen[:, k, None], own[:, k, None]) for k in range(own_k)]
        norms = torch.stack([output.norm(dim=-1) for output in outputs], 1)
    is_large = norms >= norms.mean(-1, keepdim=True)
    kept = [set(row[ran].tolist()) for row, ran in zip(indices, weights != 0, strict=True)]
    assert kept == [set(row[large].tolist()) for row, large in zip(chosen, is_large, strict=True)]


def test_every_rule_and_stand_in_runs_through_the_script(tiny_folder, tmp_path, monkeypatch):
    """One command; a rule that cannot reach a target is left out and named."""
    monkeypatch.setattr(bh, "LINEAR_SEQUENCES", 6)
    monkeypatch.setattr(bh, "LINEAR", "linear:2")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        letters = np.random.default_rng(number).integers(97, 123, 60).astype(np.uint8).tobytes().decode()
        (text / f"{number}.txt").write_text(letters)
    options = ["--suite", "field", "--match-experts", "2,3", "--text", text, "--window", "60", "--no-fp16"]
    assert bh.main(["--model", str(tiny_folder), "--output", str(tmp_path / "out"), *map(str, options)]) == 0
    results = bh.Results.read(tmp_path / "out")
    assert (results.scores["status"] == "ok").all()
    run = {json.loads(cell)["method"] for cell in results.scores["configuration"]}
    assert run == set(bh.RULES)
    analysis = json.loads((tmp_path / "out" / "analysis_summary.json").read_text())
    assert {ladder["stand_in"] for ladder in analysis["field"]["ladders"]} >= {"nothing", "mean"}
    report = (tmp_path / "out" / "REPORT.md").read_text()
    assert "beaten by no other" in report
    assert (tmp_path / "out" / "plots" / "field.png").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [({"method": "entropy", "scale": 4.5}, r"scale = 4.5, but it must be a number in \(0, 4\)"),
     ({"method": "gap", "ratio": 1}, r"a number in \(1, 20\)"),
     ({"method": "elbow", "slope": 0}, r"in \(0, 10\)"),
     ({"method": "topk", "k": 2, "stand_in": "linear"}, "linear:R"),
     ({"method": "topk", "stand_in": "linear:0"}, "linear:R"),
     ({"method": "bh", "stand_in": "mean", "renormalize": "sum"}, "stand_in goes with renormalize = 'model'"),
     ({"method": "hc", "p_values": "pooled_scores"}, "must be one of empirical, flat, pooled")],
)  # fmt: skip
def test_bad_rules_and_stand_ins(config, message):
    with pytest.raises(bh.UserError, match=message):
        bh.resolve_config("x", config)


# Rule against rule


def simulated_field(seed, effects, documents=60, windows=3, points=(2.0, 3.0, 4.0, 5.0)):
    """Scores of static Top-1 to 8 and of rules whose NLL lies `effect` above the static curve, as rows of
    SCORES, with their configurations."""
    random = np.random.default_rng(seed)
    items = [f"d{d}:{w}" for d in range(documents) for w in range(windows)]
    owners = [item.split(":")[0] for item in items]
    hard = random.normal(3, 0.3, len(items))
    configs, rows = {}, []

    def curve(experts):
        return 0.5 * np.exp(-0.6 * experts)

    def add(name, config, experts, shift):
        configs[name] = bh.resolve_config(name, config)
        spent = experts + random.normal(0, 0.2, len(items)) * (config["method"] != "topk")
        noise = random.normal(0, 0.01, len(items))
        for item, owner, base, used, extra in zip(items, owners, hard, spent, noise, strict=True):
            rows.append(
                {"config_name": name, "item_id": item, "document": owner, "status": "ok", "num_tokens": 100,
                 "nll": base + curve(used) + shift + extra, "avg_experts_per_token": used,
                 "effective_experts": used, "kl_to_own": 0.0, "top1_agreement": 1.0,
                 "configuration": bh.configuration_cell(configs[name])}
            )  # fmt: skip

    for k in range(1, 9):
        add(f"topk_{k}", {"method": "topk", "k": k}, float(k), 0.0)
    for method, effect in effects.items():
        rule = bh.RULES[method]
        for place, experts in enumerate(points):
            knob = rule.knob.default * (1 + 0.01 * place)
            add(f"{method}_{place}", {"method": method, rule.knob.name: knob}, experts, effect)
    return bh.fit_table(pd.DataFrame(rows), bh.SCORES), configs


def test_rule_against_rule_finds_the_better_one():
    scores, configs = simulated_field(0, {"threshold": -0.02, "min_p": 0.0, "topk_p": 0.02})
    field = bh.compare_field(scores, configs, 8)
    beaten = {ladder["label"]: ladder["beaten_by"] for ladder in field["ladders"]}
    assert beaten["threshold"] == []
    assert "threshold" in beaten["min_p"]
    assert {"threshold", "min_p", "topk"} <= set(beaten["topk_p"])
    at = {ladder["label"]: ladder["at"] for ladder in field["ladders"]}
    assert at["threshold"][3]["to_static"] == pytest.approx(-0.02, abs=0.004)
    assert at["topk_p"][3]["to_best"] == pytest.approx(0.04, abs=0.006)
    assert 5 not in at["threshold"] or at["threshold"][5]["to_static"] == pytest.approx(-0.02, abs=0.004)


def test_rule_against_rule_claims_nothing_where_nothing_differs():
    """Where rules are equal one run in twenty may claim anything; of 20 runs, 4 at the very most."""
    claims = 0
    for seed in range(20):
        scores, configs = simulated_field(seed, {"threshold": 0.0, "min_p": 0.0}, 30, 1, (2.0, 3.0, 4.0))
        pairs = bh.compare_field(scores, configs, 8)["pairs"]
        claims += any(pair["significant"] for pair in pairs)
    assert claims <= 4


def test_ladders_are_not_extrapolated():
    scores, configs = simulated_field(1, {"threshold": 0.0, "min_p": 0.0}, points=(2.5, 3.5))
    ladders = {ladder["label"]: ladder for ladder in bh.compare_field(scores, configs, 8)["ladders"]}
    assert set(ladders["threshold"]["at"]) == {3}
    assert set(ladders["topk"]["at"]) == set(range(1, 9))


def test_the_league_shows_the_numbers_of_experts_that_the_ladders_reach():
    scores, configs = simulated_field(1, {"threshold": 0.0, "min_p": 0.01}, points=(1.5, 2.5, 3.5))
    field = bh.compare_field(scores, configs, 8)
    assert field["experts"] == [2, 3]
    titles = [cell.strip() for cell in bh.league_table(field).splitlines()[0].strip("|").split("|")]
    assert titles[:5] == ["rule", "experts", "at 2", "at 3", "to the best at 3"]
    rows = {row["label"]: row for row in bh.league_rows(field)}
    assert rows["min_p"]["to_best"] == pytest.approx(field_entry(field, "min_p", 3)["to_best"])
    assert rows["topk"]["at_3"] == pytest.approx(0.0, abs=1e-12)


def field_entry(field, label, experts):
    """What `compare_field` says of a ladder at a number of experts."""
    return next(ladder["at"][experts] for ladder in field["ladders"] if ladder["label"] == label)


def test_rules_are_compared_at_eighths_of_the_models_own_k():
    """On a model of Top-4 whole numbers would be two or three: too few to say anything by."""
    assert bh.compared_numbers(8, 8.0) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert bh.compared_numbers(4, 2.2) == [0.5, 1, 1.5, 2]
    assert bh.compared_numbers(6, 2) == [0.75, 1.5]
    scores, configs = simulated_field(0, {"threshold": -0.02, "min_p": 0.0}, points=(1.4, 2.2, 2.8))
    scores = scores[~scores["config_name"].isin(["topk_5", "topk_6", "topk_7", "topk_8"])]
    field = bh.compare_field(scores, configs, 4)
    assert field["experts"] == [1.5, 2, 2.5]
    assert "at 2.5" in bh.league_table(field)


@pytest.mark.parametrize("is_better_high", [True, False])
def test_rules_have_a_league_on_a_task(is_better_high, tmp_path):
    """Signs are those of the task's score; the better rule is above in either direction."""
    scores, configs = simulated_field(0, {"threshold": -0.03, "min_p": 0.0}, 80, 1, (2.5, 3.5, 4.5))
    sign = -1 if is_better_high else 1
    tasks = scores.assign(
        task="quiz", metric="acc", score=sign * scores["nll"], prompt_text="", document=scores["item_id"]
    )
    tasks = bh.fit_table(tasks, bh.TASKS)
    report = {"configurations": {"topk_8": {"quiz": {"higher_is_better": {"quiz": {"acc": is_better_high}}}}}}
    fields = bh.compare_field_on_tasks(tasks, configs, 8, report)
    field = fields["quiz"]
    assert field["sign"] == sign
    labels = [row["label"] for row in bh.league_rows(field)]
    assert labels[0] == "threshold"
    found = bh.league_rows(field)[0]
    assert found["at_4"] == pytest.approx(sign * -0.03, abs=0.01)
    beaten = {ladder["label"]: ladder["beaten_by"] for ladder in field["ladders"]}
    assert beaten["threshold"] == []
    assert "threshold" in beaten["min_p"]
    assert not any(ladder["within"] for ladder in field["ladders"])


def test_without_ladders_a_task_has_no_league():
    scores, configs = simulated_field(0, {"threshold": 0.0}, 5, 1, (3.0,))
    tasks = scores.assign(task="quiz", metric="acc", score=scores["nll"], document=scores["item_id"])
    assert bh.compare_field_on_tasks(bh.fit_table(tasks, bh.TASKS), configs, 8, {}) == {}
    nothing = bh.fit_table(tasks.assign(metric=""), bh.TASKS)
    assert bh.compare_field_on_tasks(nothing, configs, 8, {}) == {}


@pytest.mark.parametrize(("metric", "expected"), [("acc", True), ("bits_per_byte", False)])
def test_the_direction_of_a_metric_nobody_told(metric, expected):
    assert bh.higher_is_better("quiz", metric, {}) is expected


def test_fewest_experts_by_equivalence():
    """The margin of 1 % is crossed where the simulated curve crosses it, within the interval."""
    scores, configs = simulated_field(2, {"threshold": 0.0, "min_p": 0.0}, documents=80)
    ladders = {ladder["label"]: ladder for ladder in bh.compare_field(scores, configs, 8)["ladders"]}
    within = ladders["topk"]["within"]["1 %"]
    grid = np.linspace(1, 8, 7001)
    gap = np.interp(grid, range(1, 9), 0.5 * np.exp(-0.6 * np.arange(1, 9))) - 0.5 * np.exp(-4.8)
    crossing = grid[np.argmax(gap <= math.log(1.01))]
    step = (8 - 1) / 80  # of the grid that is searched
    assert within["ci95_low"] - step <= crossing <= within["ci95_high"] + step
    assert within["fewest"] >= crossing - step
    half = ladders["topk"]["within"]["0.5 %"]
    assert half["fewest"] >= within["fewest"]


def test_one_document_tests_no_rule():
    """Without two independent units nothing is equivalent, nothing beaten, and nothing warned of."""
    scores, configs = simulated_field(2, {"threshold": 0.0, "min_p": 0.0}, documents=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        field = bh.compare_field(scores, configs, 8)
    assert field["n_units"] == 1
    for ladder in field["ladders"]:
        for within in ladder["within"].values():
            assert within == {"fewest": None, "ci95_low": None, "ci95_high": None}


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [
        ("mixtral", "MixtralForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
    ],
)
def test_every_rule_runs_on_other_conventions(model_type, model_class, tmp_path, monkeypatch):
    """Weights normalised over the kept; scaled, biased and grouped; softmax after the top-k."""
    if not any(name == model_type for name, _ in declared_architectures()):
        pytest.skip("this transformers declares no router for it")
    monkeypatch.setitem(TINY, "vocab_size", 300)
    monkeypatch.setattr(bh, "LINEAR_SEQUENCES", 6)
    model = tiny_of(model_type, model_class)
    runner = bh.BHExperimentRunner("tiny", tmp_path, model=model, tokenizer=byte_tokenizer())
    configs = {}
    for name, rule in bh.RULES.items():
        for stand_in in ("nothing", "mean", "linear:2"):
            config = {"method": name, "stand_in": stand_in}
            config |= {"k": 2} if rule.is_static else {"max_k": runner.own_k}
            configs[f"{name}_{stand_in.replace(':', '')}"] = config
    (tmp_path / "t.txt").write_text("a small boat on the river, and the river runs to the sea")
    texts = bh.text_windows([tmp_path / "t.txt"], runner.tokenizer, 24)
    frame = runner.run_full_experiment_suite(configs, PROMPTS[:1], 2, texts=texts)
    assert (frame["status"] == "ok").all(), frame["error"].max()
    scores = runner.results.scores
    assert (scores["status"] == "ok").all(), scores["error"].max()
    assert set(configs) <= set(scores["config_name"])
    own = scores[scores["config_name"] == f"topk_{runner.own_k}"].set_index("item_id")["nll"]
    # With nothing dropped the stand-in is never asked: the loosest rule is the model itself.
    loose = {"method": "threshold", "threshold": 1e-9, "max_k": runner.own_k, "stand_in": "mean"}
    with runner.routing(loose):
        nll = bh.ScoredBatch(model, texts).nll()
    assert dict(zip([text.id for text in texts], nll, strict=True)) == pytest.approx(dict(own), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------
# 17. Drift: header, contents, manual and benchmarks say what the script says
# ---------------------------------------------------------------------------------------------------------

SCRIPT = HERE / "run_bh_experiments.py"
MANUAL = HERE / "README_BH_EXPERIMENTS.md"
SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# The manual's tables, from the declarations


def manual_table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def manual_words(words):
    """Words of the script as the manual has them: options are code."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z0-9-]*)", r"`\1`", words)


def options_table():
    rows = []
    for option in bh.OPTIONS:
        value = f" {{{','.join(option.choices)}}}" if option.choices else ""
        if option.metavar:
            value = f" {option.metavar}{' ...' if option.several else ''}"
        default = "off" if option.parse is None else ""
        if option.default is not None:
            default = str(option.default)
        rows.append([f"`--{option.name}{value}`", default, manual_words(option.words)])
    return manual_table(["option", "default", "meaning"], rows)


def configurations_table():
    rows = []
    for name, config in bh.ROUTING_CONFIGS.items():
        fields = [field.name for field in bh.RULES[config["method"]].fields if field.name in config]
        shown = ", ".join(f"`{field}` {config[field]}" for field in fields)
        rows.append([f"`{name}`", f"`{config['method']}`", shown, config["description"]])
    return manual_table(["name", "rule", "settings", "in words"], rows)


def rules_table():
    rows = [[f"`{rule.name}`", rule.words, f"`{rule.knob.name}`", rule.source] for rule in bh.RULES.values()]
    return manual_table(["method", "how many of the ranked experts run", "knob", "source"], rows)


def fields_table():
    takers = {}  # field -> the rules that take it
    for rule in bh.RULES.values():
        for field in rule.fields:
            takers.setdefault(field, []).append(rule)
    rows = []
    for field, rules in takers.items():
        adaptive = [rule for rule in bh.RULES.values() if not rule.is_static]
        whose = ", ".join(f"`{rule.name}`" for rule in rules)
        if len(rules) == len(bh.RULES):
            whose = "all"
        elif rules == adaptive:
            whose = "all that adapt"
        default = f"`{json.dumps(field.default)}`"
        rows.append([f"`{field.name}`", whose, field.allowed, default, field.words])
    return manual_table(["field", "of rules", "value", "default", "meaning"], rows)


def nulls_table():
    rows = [[f"`{name}`", null.p_value, null.assumption] for name, null in bh.NULLS.items()]
    return manual_table(["null", "p-value", "assumption"], rows)


def files_table():
    files = bh.RUN_FILES | bh.KEPT_FILES
    rows = [[f"`{name}`", manual_words(words)] for name, words in files.items()]
    return manual_table(["file", "what"], rows)


def plots_table():
    rows = []
    for name, plot in bh.PLOTS.items():
        draw = getattr(plot.draw, "func", plot.draw)
        paragraph = inspect.getdoc(draw).split("\n\n")[0]
        rows.append([f"`{name}.png`", plot.title, " ".join(paragraph.split()).rstrip(".")])
    return manual_table(["file in `plots/`", "title", "shows"], rows)


def metrics_table():
    tables = {}  # column -> the tables that have it
    for table in bh.KINDS.values():
        for name in table.metrics:
            tables.setdefault(name, []).append(table)
    rows = []
    for name, holders in tables.items():
        metric = holders[0].metrics[name]
        files = ", ".join(f"`{table.file}`" for table in holders)
        rows.append([f"`{name}`", metric.title, metric.unit, files])
    return manual_table(["column", "in the report", "unit", "of"], rows)


KINDS_OF_VALUES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def columns_table(columns):
    rows = []
    for column in columns:
        kind = KINDS_OF_VALUES[column.kind] + (", *clock*" if column.clock else "")
        rows.append([f"`{column.name}`", kind, manual_words(column.words)])
    return manual_table(["column", "kind", "meaning"], rows)


def quantized_table():
    rows = [[f"`{name}`", manual_words(words)] for name, words in bh.QUANTIZED_WEIGHTS.items()]
    return manual_table(["`quant_method`", "what was run, and what came of it"], rows)


def manual_tables():
    """Marker in the manual -> the table that stands there."""
    in_all = [
        column
        for column in bh.GENERATION.columns
        if column in bh.SCORES.columns and column in bh.TASKS.columns and column not in bh.ROUTING_COLUMNS
    ]
    tables = {
        "configurations": configurations_table(),
        "rules": rules_table(),
        "fields": fields_table(),
        "nulls": nulls_table(),
        "options": options_table(),
        "files": files_table(),
        "plots": plots_table(),
        "metrics": metrics_table(),
        "routing columns": columns_table(bh.ROUTING_COLUMNS),
        "columns of every row": columns_table(in_all),
        "compute columns": columns_table(bh.COMPUTE_COLUMNS),
        "quantized weights": quantized_table(),
    }
    tables["kinds of tokens"] = manual_table(
        ["kind", "in the report", "tokens"],
        [[f"`{name}`", kind.title, kind.words] for name, kind in bh.KINDS_OF_TOKENS.items()],
    )
    for table in (*bh.TABLES, bh.TOKEN_LOG):
        elsewhere = [*bh.ROUTING_COLUMNS, *bh.COMPUTE_COLUMNS]
        if table in (bh.GENERATION, bh.SCORES, bh.TASKS, bh.THROUGHPUT):
            elsewhere += in_all
        own = [column for column in table.columns if column not in elsewhere]
        tables[f"columns of {table.file}"] = columns_table(own)
    return tables


def with_tables(text):
    """A text of the manual with every table as the script declares it now."""
    for name, table in manual_tables().items():
        start = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n\n{table}\n\n{end}{after}"
    return text


def write_manual():
    """Write the tables of the manual anew: `--write-manual`."""
    MANUAL.write_text(with_tables(MANUAL.read_text(encoding="utf-8")), encoding="utf-8")


def test_manual_has_the_tables_of_the_script():
    """Where this fails: `python test_bh_experiments.py --write-manual`."""
    text = MANUAL.read_text(encoding="utf-8")
    assert text == with_tables(text)
    assert sorted(re.findall(r"<!-- ([^/].*?) -->", text)) == sorted(manual_tables())


def test_write_manual_mends_the_tables_and_nothing_else(tmp_path, monkeypatch):
    """Words changed, or a row gone: both come back, and the rest of the page stays."""
    text = with_tables(MANUAL.read_text(encoding="utf-8"))
    lines = text.splitlines()
    changed = next(line for line in lines if line.startswith("| `--seed "))
    gone = next(line for line in lines if line.startswith("| `avg_experts_per_token` | number |"))
    copy = tmp_path / "README.md"
    copy.write_text(text.replace(changed, "| old words |").replace(f"{gone}\n", ""), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "MANUAL", copy)
    write_manual()
    assert copy.read_text(encoding="utf-8") == text


def test_manual_names_everything():
    """What no table of the manual lists stands in its prose; README.md is the same file."""
    text = MANUAL.read_text(encoding="utf-8")
    analysis = re.search(r"Returns a dict with (.*?)\. Raises", inspect.getdoc(bh.analyze_results), re.S)[1]
    keys = re.sub(r"\(.*?\)", "", analysis, flags=re.S).replace(" and ", ", ").split(",")
    wanted = [*bh.suites(), *map(str.strip, keys)]
    assert len(wanted) > 15
    assert [name for name in wanted if f"`{name}`" not in text] == []
    assert (HERE / "README.md").resolve() == MANUAL


def test_a_run_leaves_what_is_declared(mock_model, tmp_path):
    """The files of a run, an earlier one set aside, are those that the manual lists; so are the results."""
    for resume in (True, False):
        runner = mock_runner(mock_model, tmp_path)
        options = {"resume": resume, "generate_batch": 2}
        frame = runner.run_full_experiment_suite(CONFIGS, PROMPTS[:2], 2, **options)
        bh.write_report(frame, tmp_path)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    patterns = {bh.EARLIER.format(number="N"), bh.LINEAR_FILE.format(rank="R")}
    declared = {*bh.RUN_FILES, *bh.KEPT_FILES, "earlier_1"} - patterns
    assert left <= declared
    assert declared - left == {bh.SCORES.file, bh.TASKS.file, bh.TASK_RESULTS, bh.NULL_DIAGNOSTICS,
                               bh.CALIBRATION_FILE, *bh.TOKEN_LOG_FILES}  # fmt: skip
    analysis = json.loads((tmp_path / "analysis_summary.json").read_text(encoding="utf-8"))
    documented = inspect.getdoc(bh.analyze_results)
    assert [key for key in analysis if key not in documented and key != "quality_margin"] == []


# Header, contents, requirements


def requirements():
    """The requirements of the script, without those of its tests."""
    text = (HERE / "requirements.txt").read_text(encoding="utf-8")
    return text.split("\n#")[0].split()


def imported_libraries():
    """What the script imports by name, wherever it stands, and does not come with Python."""
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_Lazy":
            names.add(node.args[0].value)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


# The files that repeat the requirements, and what their lines begin with.
REQUIRED_IN = {SCRIPT: "# ", HERE / "pyproject.toml": ""}


def with_requirements(text, mark):
    """A text whose list of dependencies is that of requirements.txt."""
    lines = "".join(f'{mark}    "{line}",\n' for line in requirements())
    pattern = rf"^({mark}dependencies = \[\n).*?^({mark}\])"
    text, number = re.subn(pattern, lambda found: found[1] + lines + found[2], text, flags=re.M | re.S)
    assert number == 1
    return text


def write_requirements():
    """Copy the requirements to where they stand as well: `--write-manual`."""
    for path, mark in REQUIRED_IN.items():
        path.write_text(with_requirements(path.read_text(encoding="utf-8"), mark), encoding="utf-8")


@pytest.mark.parametrize("path", REQUIRED_IN, ids=lambda path: path.name)
def test_requirements_stand_in_one_place(path):
    """The PEP 723 block of the script and the package list the runtime part of requirements.txt. Where this
    fails: `python test_bh_experiments.py --write-manual`."""
    text = path.read_text(encoding="utf-8")
    assert text == with_requirements(text, REQUIRED_IN[path])


def test_everything_imported_by_name_is_required():
    """Also what torch or transformers bring; but for the libraries that are optional."""
    required = {re.match(r"[\w-]+", line)[0] for line in requirements()}
    imported_as = {"markdown-it-py": "markdown_it", "pillow": "PIL"}
    required = {imported_as.get(name, name) for name in required}
    assert imported_libraries() - {"datasets", "lm_eval", "pyarrow"} == required


def test_oldest_versions_are_pinned_in_ci():
    """The line of `.ci/run` that makes pins of the requirements leaves none out, and names real versions."""
    command = re.search(r"^sed -E '(.+?)' requirements\.txt", (HERE / ".ci" / "run").read_text(), re.M)[1]
    sed = ["sed", "-E", command, str(HERE / "requirements.txt")]
    pins = subprocess.run(sed, capture_output=True, text=True, check=True).stdout.split()
    oldest = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in requirements() if "torch" not in line]
    assert pins == oldest


def test_contents_match_rulers():
    """Contents and rulers of the script agree in numbers, titles, subtitles and order."""
    contents = re.findall(r"^    (\d+) +(.+?)(?:  +(.*))?$", bh.__doc__, re.M)
    rulers = re.findall(r"^# -{90,}\n# (\d+)\. (.+?)(?:: (.+))?\n# -{90,}$", SOURCE, re.M)
    assert contents == rulers
    assert [int(number) for number, _, _ in rulers] == list(range(1, len(rulers) + 1))


def test_one_idea_a_statement():
    """No assignment packs several values: `a, b = 1, 2` says two things at once."""
    packed = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        if any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    assert packed == []


# Messages


def assigned_texts(body):
    """Name -> the expressions of texts that are assigned to it somewhere in `body`."""
    texts = collections.defaultdict(list)
    for node in ast.walk(body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    texts[target.id].append(node.value)
    return dict(texts)


def readings(node, known):
    """All that an expression may say, with X for what is known at run time only."""
    if isinstance(node, ast.JoinedStr):
        parts = [readings(part, known) for part in node.values]
        return ["".join(reading) for reading in itertools.product(*parts)]
    if isinstance(node, ast.FormattedValue):
        return readings(node.value, known)
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    values = known.get(getattr(node, "id", None), [])
    return [reading for value in values for reading in readings(value, known)] or ["X"]


def script_messages():
    """Each error and warning of the script, in all its readings."""
    module = ast.Module([node for node in TREE.body if isinstance(node, ast.Assign)], [])
    constants = assigned_texts(module)
    spoken = ("UserError", "FloatingPointError", "logger.warning", "logger.error")
    messages = set()
    for function in (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)):
        known = constants | assigned_texts(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in spoken:
                messages |= set(readings(node.args[0], known))
    return messages


def troubleshooting_patterns():
    """Words of a row in the manual's table of messages -> what they look for."""
    table = MANUAL.read_text(encoding="utf-8").split("## Troubleshooting")[1].split("\n## ")[0]
    words = [word for row in table.splitlines() for word in re.findall("`([^`]+)`", row.split(" | ")[0])]
    return {word: ".*".join(re.escape(part) for part in word.split("...")) for word in words}


def test_troubleshooting_covers_every_message():
    """Each error and warning in the script is found by the words of a row of the manual's table."""
    messages = script_messages()
    assert len(messages) > 100
    patterns = troubleshooting_patterns().values()
    unnamed = ("error: X", "X X: X")  # what stands in them has a row of its own, or comes from the system
    missing = [m for m in messages if m not in unnamed and not any(re.search(p, m) for p in patterns)]
    assert missing == []


def test_troubleshooting_has_no_message_that_is_gone():
    """Each row of the table is about something that the script says."""
    sentences = {reading for node in ast.walk(TREE) if isinstance(node, ast.JoinedStr)
                 for reading in readings(node, {})}  # fmt: skip
    spoken = script_messages() | sentences
    patterns = troubleshooting_patterns().items()
    assert [word for word, pattern in patterns if not any(re.search(pattern, text) for text in spoken)] == []


# What the manual tells to run


def manual_blocks(language):
    """The blocks of code in the manual that are marked as of this language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", MANUAL.read_text(encoding="utf-8"), re.M | re.S)
    return [block for marked, block in blocks if marked == language]


def test_notebook_snippets_of_the_manual(tmp_path, monkeypatch):
    """Every Python block of the manual runs, in order, as a reader would paste it."""
    for name in ("models", "run_bh_experiments.py"):
        (tmp_path / name).symlink_to(HERE / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bh, "PLOTS", {"layer_profile": bh.PLOTS["layer_profile"]})
    monkeypatch.setattr(bh, "RULES", dict(bh.RULES))
    blocks = manual_blocks("python")
    assert len(blocks) >= 5
    space = {}
    for block in blocks:
        exec(compile(block, "manual", "exec"), space)
    folder = tmp_path / "results" / "notebook"
    assert (folder / "earlier_1" / "plots" / "layer_profile.png").exists()
    scores = space["runner"].results.scores
    assert set(scores["document"]) == {"README.md"}
    assert len(scores) == 2 * scores["config_name"].nunique()
    assert "over_even" in bh.RULES
    assert space["stats"].summary()["avg_experts_per_token"].min() >= 1


def test_configurations_of_the_manual_are_valid():
    """Its JSON files of configurations, for the four layers of the embedded model."""
    blocks = manual_blocks("json")
    assert blocks
    for block in blocks:
        configs = json.loads(block)
        assert configs
        for name, config in configs.items():
            resolved = bh.resolve_config(name, config, num_layers=4)
            assert config.items() <= (resolved | {"layers": config.get("layers", "all")}).items()


def manual_commands():
    """Options of every command line of the script in the manual."""
    text = MANUAL.read_text(encoding="utf-8")
    lines = [line for block in manual_blocks("") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]*run_bh_experiments\.py[^`\n]*)`", text)
    for line in lines:
        command, _, options = line.partition("run_bh_experiments.py ")
        if options and "-c" not in command.split():
            yield shlex.split(options)


def test_commands_of_the_manual_are_valid():
    """Every command line in it can be given as it stands."""
    commands = list(manual_commands())
    assert len(commands) >= 12
    for command in commands:
        bh.check_options(bh.parse_options(command))


def test_links_of_the_manual_lead_somewhere():
    """To a heading of the page, or to a file of the repository."""
    text = MANUAL.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https:")]
    assert len(targets) > 5
    for target in targets:
        leads = target[1:] in anchors if target.startswith("#") else (HERE / target).exists()
        assert leads, target


def script_names(path):
    """Names of the script that a program uses: `bh.NAME`, and those it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bh":
            yield node.attr
        if isinstance(node, ast.ImportFrom) and node.module == "run_bh_experiments":
            yield from (alias.name for alias in node.names)


def test_programs_use_names_that_exist():
    """Benchmarks ask the script for what it has."""
    used = {(path.name, name) for path in (HERE / "benchmarks").glob("*.py") for name in script_names(path)}
    shell = (HERE / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    used |= {("gpu.sh", name) for name in re.findall(r"^from run_bh_experiments import (\w+)$", shell, re.M)}
    assert len({program for program, _ in used}) >= 5
    assert sorted((program, name) for program, name in used if not hasattr(bh, name)) == []


def test_places_to_extend_exist():
    """Sections and names in the manual's table of what to add where."""
    table = MANUAL.read_text(encoding="utf-8").split("## Extend it")[1].split("\n## ")[0]
    rulers = dict(re.findall(r"^# (\d+)\. (.+)\n# -{90,}$", SOURCE, re.M))
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| a")]
    assert len(rows) > 10
    for _, number, declared, *_ in rows:
        section = SOURCE.split(f"# {number}. {rulers[number]}\n")[1].split("\n# -----")[0]
        names = re.findall(r"`(\w+)(?:`|=)", declared)
        assert names, declared
        assert [name for name in names if not re.search(rf"\b{name}\b", section)] == [], number


# ---------------------------------------------------------------------------------------------------------
# 18. Text by default, text from data sets, and what calibration takes of it
# ---------------------------------------------------------------------------------------------------------


def numbered(document, number):
    """A document's windows, as the cutting gives them."""
    return [
        bh.Window(bh.Document(document, ""), 10 * place, np.arange(11, dtype=np.int32))
        for place in range(number)
    ]


@pytest.mark.parametrize(
    ("sizes", "most", "places"),
    [((5,), 1, [[2]]), ((5,), 9, [[0, 1, 2, 3, 4]]), ((1, 8, 2), 6, [[0], [1, 4, 6], [0, 1]]),
     ((1, 1, 1, 1, 1, 1), 2, [[], [0], [], [], [0], []]), ((4, 4), 3, [[1, 3], [2]])],
)  # fmt: skip
def test_windows_are_spread_over_documents(sizes, most, places):
    """As many of each document as of any other, as far as it has them, and spread over it."""
    groups = [numbered(f"d{place}", size) for place, size in enumerate(sizes)]
    chosen = bh.spread_over_documents(list(itertools.chain(*groups)), most)
    expected = [f"d{place}:{10 * window}" for place, of_one in enumerate(places) for window in of_one]
    assert [window.name for window in chosen] == expected


def test_scored_and_unscored_windows_are_all_there_are(tiny):
    documents = [bh.Document(name, name * 700) for name in ("ab", "xyz")]
    everything = bh.sample_text(documents, tiny.tokenizer, 64)
    part = bh.sample_text(documents, tiny.tokenizer, 64, 7)
    assert everything.unscored == []
    assert len(part.scored) == 7
    names = [item.id for item in part.scored] + [window.name for window in part.unscored]
    assert sorted(names) == sorted(item.id for item in everything.scored)
    as_scored = {item.id: item for item in everything.scored}
    assert all(item.inputs == as_scored[item.id].inputs for item in part.scored)


def test_documents_of_files_folders_and_data_sets(data_folder, tmp_path):
    """A text file is a document, and so is a row; a folder with text files is read file by file."""
    rows = [0, 2, 4]
    for kind in ("csv", "jsonl", "parquet"):
        documents = bh.load_text_documents([data_folder / f"d.{kind}"])
        assert [(d.name, d.text) for d in documents] == [(f"d.{kind}-{n}", DATA["text"][n]) for n in rows]
    kinds = bh.load_text_documents([data_folder / "d.csv"], text_column="kind", limit=2)
    assert [(d.name, d.text) for d in kinds] == [("d.csv-0", "a"), ("d.csv-1", "b")]
    of_split = bh.load_text_documents([str(data_folder / "splits")], split="test")
    assert [d.name for d in of_split] == [f"splits-{n}" for n in rows]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "sources.json").write_text('{"about": "the others"}')
    shutil.copy(data_folder / "d.parquet", tmp_path / "sub")
    mixed = bh.load_text_documents([tmp_path, tmp_path / "a.txt"])
    assert [d.name for d in mixed] == ["a.txt", *(f"sub/d.parquet-{n}" for n in rows), "a.txt"]


BAD_TEXTS = [
    (["--text", "none", "a.txt"], "--text none goes alone, without a.txt"),
    (["--text", "none", "--max-windows", "3"], "--max-windows means nothing beside --text none"),
    (["--text", "none", "--split", "test"], "--split means nothing beside --text none"),
    (["--tasks", "x", "--max-windows", "3"], "--max-windows and --tasks exclude each other"),
    (["--tasks", "x", "--window", "256"], "--window and --tasks exclude each other"),
    (["--prompts", "prompts.json", "--max-windows", "3"], "--max-windows 3 needs --text"),
    (["--max-windows", "0"], "--max-windows 0: it must be a whole number of at least 1"),
    (["--text", ""], "--text is empty"), (["--text", "empty"], "--text empty: the folder holds no .txt file"),
    (["--text", "d.csv", "--text-column", "txt"], "Available: text, kind, n"),
    (["--text", "d.csv", "--text-column", "n"], "--text d.csv, split train: none of 5 rows has a text"),
    (["--text", "splits", "--split", "tst"], "Available: validation, test"),
    (["--text", "nobody/nothing"], "--text nobody/nothing cannot be read: Couldn't reach"),
    (["--text", "no/such/folder"], "no/such/folder"), (["--text", "d.csv", "--limit", "0"], "--limit 0"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_TEXTS)
def test_bad_texts(options, message, data_folder, tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before a model is loaded."""
    monkeypatch.chdir(data_folder)
    (data_folder / "prompts.json").write_text(json.dumps(SCORED_PROMPTS))
    assert cli("nowhere", tmp_path / "out", *options) == 2
    (error,) = error_lines(capsys)
    assert message in error


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [("a", [], "--text: no document has 128 tokens"), ("a", ["--window", "4"], "no document has 2 tokens"),
     ("a" * 500, ["--window", "9999"], "--window 9999: this model's context is 768")],
)  # fmt: skip
def test_texts_that_are_too_short(content, options, message, tiny_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(content)
    assert cli(tiny_folder, tmp_path / "out", "--text", tmp_path / "a.txt", *options) == 2
    (error,) = error_lines(capsys)
    assert message in error


# What is scored where no text is named


def test_the_embedded_model_brings_heldout_text():
    """At least 60 documents and at most 200 kB, held out by the rule of the training, with their terms."""
    folder = EMBEDDED / bh.HELDOUT_FOLDER
    documents = DEFAULT_DOCUMENTS(str(EMBEDDED))
    assert len(documents) >= 60
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 200_000
    assert {document.category for document in documents} == {bh.HELDOUT_FOLDER}
    for document in documents:
        source, _, rest = document.name.partition("__")
        assert int.from_bytes(hashlib.sha256(f"{source}/{rest}".encode()).digest()[:8], "big") % 1000 < 25
        assert (folder / "terms" / source).read_text().strip()
    assert len({document.name.partition("__")[0] for document in documents}) >= 15


def test_other_models_get_the_text_of_every_python(tiny, monkeypatch):
    documents = DEFAULT_DOCUMENTS("nowhere")
    assert len(documents) > 70
    assert {document.category for document in documents} == {bh.PYTHON_DOCS}
    monkeypatch.setattr(bh, "default_documents", DEFAULT_DOCUMENTS)
    text = tiny.sample_default_text(32)
    assert len(text.scored) == bh.DEFAULT_MAX_WINDOWS
    assert len({item.document for item in text.scored}) == len(documents)


def test_a_large_model_on_a_cpu_gets_fewer_windows(tiny, monkeypatch, caplog):
    monkeypatch.setattr(bh, "MANY_PARAMETERS", 1)
    monkeypatch.setattr(bh, "MAX_WINDOWS_ON_CPU", 3)
    with caplog.at_level("INFO"):
        assert len(tiny.default_text_to_score(64).scored) == 3
    assert "only 3 windows of text are scored" in caplog.text
    assert "--max-windows N scores more" in caplog.text
    caplog.clear()
    assert len(tiny.default_text_to_score(64, 5).scored) == 5
    assert len(tiny.sample_default_text(64).scored) == 3  # for calibration, say: nothing is scored
    assert not caplog.text


def test_default_text_that_cannot_be_used_is_left_out(mock_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bh, "default_documents", lambda model_name: [bh.Document("d", "too short")])
    monkeypatch.setattr(bh, "TEST_PROMPTS", SCORED_PROMPTS[:1])
    runner = mock_runner(mock_model, tmp_path)
    with caplog.at_level("WARNING"):
        assert runner.default_text == bh.TextSample([], [])
        assert runner.calibration_source is bh.SAMPLED_TEXT
        assert not caplog.text  # it is not known yet whether text is to be scored
        runner.run_full_experiment_suite(TOP_8, max_new_tokens=1)
    said = "no text is scored, as none was named: --text: no document has"
    assert caplog.text.count(said) == 1
    assert set(runner.results.scores["source"]) == {"reference"}


def test_what_is_generated_and_what_is_scored(tiny_folder, tmp_path, monkeypatch):
    """Prompts are generated, text is scored; references of one's own are text enough; none is none."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", SCORED_PROMPTS[:1])
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(PROMPTS[:2]))
    own = tmp_path / "own.json"
    own.write_text(json.dumps(SCORED_PROMPTS))
    text = tmp_path / "text.txt"
    text.write_text("some words " * 40)
    short = {f"short {number}" for number in range(2)}
    cases = {
        "default": ([], {"one"}, {"one", *short}),
        "none": (["--text", "none"], {"one"}, {"one"}),
        "text": (["--text", text, "--window", 64], set(), {"text.txt"}),
        "prompts": (["--prompts", plain], {"one", "two"}, short),
        "both": (["--prompts", plain, "--text", text], {"one", "two"}, {"text.txt"}),
        "references": (["--prompts", own], {"one", "two", "three"}, {"one", "two", "three"}),
    }
    for name, (options, generated, scored) in cases.items():
        output = tmp_path / name
        common = ["--max-tokens", 2, "--configs", "topk_8", "--max-windows", 2]
        limited = common if name not in ("none", "references") else common[:-2]
        assert cli(tiny_folder, output, *limited, *options) == 0
        results = bh.Results.read(output)
        assert set(results.generation["prompt_id"]) == generated, name
        assert set(results.scores["document"]) == scored, name


def test_the_runner_scores_the_default_text_beside_the_built_in_prompts(mock_model, tmp_path, monkeypatch):
    monkeypatch.setattr(bh, "TEST_PROMPTS", SCORED_PROMPTS[:1])
    runner = mock_runner(mock_model, tmp_path)
    runner.run_full_experiment_suite(TOP_8, None, 1)
    assert set(runner.results.scores["source"]) == {"text", "reference"}
    runner.run_full_experiment_suite(TOP_8, SCORED_PROMPTS, 1, resume=False)
    assert set(runner.results.scores["source"]) == {"reference"}


def test_text_decides_and_references_beside_it_do_not(tmp_path):
    """The verdict is that of the text alone; where there is no text, that of the references."""
    windows = invented_scores(("topk_8", "bh_strict"), 12)
    references = windows.assign(
        source="reference", nll=windows["nll"] + 1.0 * (windows["config_name"] == "bh_strict"),
        item_id="r" + windows["item_id"], document="r" + windows["document"],
    )  # fmt: skip
    windows = windows.assign(source="text")
    together = invented_results(("topk_8", "bh_strict"))

    def verdict(*parts):
        results = dataclasses.replace(together, scores=pd.concat(parts, ignore_index=True))
        return analysis_of(results, tmp_path)["verdict"]["bh_strict"]

    alone = verdict(windows)
    assert verdict(windows, references) == alone
    assert verdict(references)["delta_nll"] > alone["delta_nll"] + 0.9


# What calibration takes of it


def words_of(seed, number):
    return " ".join(str(word) for word in np.random.default_rng(seed).integers(0, 10_000, number))


def test_calibration_takes_what_is_not_scored():
    """No run of the scored text is in it; where too little is left, nothing is."""
    documents = [bh.Document("a", words_of(0, 800)), bh.Document("b", words_of(1, 800))]
    text = bh.sample_text(documents, MockTokenizer(), 64, 5)
    source = bh.calibration_rest(text)
    length = bh.CALIBRATION_LENGTH
    assert source.windows.shape[1] == length
    scored = [torch.as_tensor(item.token_ids, dtype=torch.int64)[None] for item in text.scored]
    assert bh.count_shared_tokens(scored, source) == 0
    assert len(source.take(6)) == 6
    # A copy of a scored document is not taken, whatever it is called.
    copied = bh.TextSample(text.scored, [*text.unscored, *bh.cut_windows(documents, MockTokenizer(), 64)])
    assert bh.count_shared_tokens(scored, bh.calibration_rest(copied)) == 0
    everything = bh.sample_text(documents, MockTokenizer(), 64)
    assert bh.calibration_rest(everything) is None
    only_scored = bh.TextSample(everything.scored, bh.cut_windows(documents, MockTokenizer(), 64))
    assert bh.calibration_rest(only_scored) is None


def test_where_a_runner_calibrates(mock_model, tmp_path, monkeypatch):
    """The file that was named; else what is not scored of the text, or of the default text; else sampled."""
    many = [bh.Document(f"d{n}", words_of(n, 600), bh.PYTHON_DOCS) for n in range(4)]
    monkeypatch.setattr(bh, "DEFAULT_MAX_WINDOWS", 3)
    own = bh.sample_text([bh.Document("mine", words_of(9, 900))], MockTokenizer(), 64, 4)
    scored_only = bh.TextSample(own.scored, [])
    file = tmp_path / "file.txt"
    file.write_text(words_of(5, 300))

    def source_of(text, **options):
        runner = mock_runner(mock_model, tmp_path / "out", **options)
        if text is not None:
            runner.calibrate_on(text)
        assert runner.settings["calibration_text"] == runner.calibration_source.identity
        return runner.calibration_source

    assert source_of(own, calibration_text=file).words == f"--calibration-text {file}"
    assert source_of(own, calibration_text="sampled") is bh.SAMPLED_TEXT
    assert source_of(own).words == "windows of the text that are not scored"
    assert source_of(scored_only) is bh.SAMPLED_TEXT  # the little text that stands for the default one
    monkeypatch.setattr(bh, "default_documents", lambda model_name: many)
    of_default = "windows of pydoc_data.topics that are not scored"
    assert source_of(scored_only).words == of_default
    assert source_of(None).words == of_default
    assert source_of(own).identity != source_of(None).identity


def test_calibration_text_is_part_of_a_run_and_named(mock_model, tmp_path, monkeypatch, caplog):
    """Another one is refused in the same folder; diagnosis and log say which it was."""
    many = [bh.Document(f"d{n}", words_of(n, 600), bh.PYTHON_DOCS) for n in range(4)]
    monkeypatch.setattr(bh, "default_documents", lambda model_name: many)
    monkeypatch.setattr(bh, "DEFAULT_MAX_WINDOWS", 3)
    configs = TOP_8 | {"bh": EMPIRICAL}
    runner = mock_runner(mock_model, tmp_path)
    with caplog.at_level("INFO"):
        runner.run_full_experiment_suite(configs, PROMPTS[:1], 1, texts=runner.default_text.scored)
    words = "windows of pydoc_data.topics that are not scored"
    assert f"calibrated on 138 tokens of {words} in" in caplog.text
    diagnosed = json.loads((tmp_path / "null_diagnostics.json").read_text())
    assert (diagnosed["calibrated_on"], diagnosed["n_shared_tokens"]) == (words, 0)
    with pytest.raises(bh.UserError, match="calibration_text is '[0-9a-f]+' there, 'sampled' here"):
        mock_runner(mock_model, tmp_path, calibration_text="sampled").run_full_experiment_suite(
            configs, PROMPTS[:1], 1, texts=runner.default_text.scored
        )
    # Linear maps need more text than nulls: where it is too short, the model samples theirs.
    monkeypatch.setattr(bh, "LINEAR_SEQUENCES", 10**6)
    assert runner._linear_source is bh.SAMPLED_TEXT
    monkeypatch.setattr(bh, "LINEAR_SEQUENCES", 8)
    assert runner._linear_source is runner.calibration_source


def test_embedded_nulls_of_text_and_of_sampled_text_agree(embedded):
    """Mean experts of the three BH configurations at temperature 1 within .1, on held-out windows."""
    tokenizer = embedded.tokenizer
    text = bh.sample_text(DEFAULT_DOCUMENTS(str(EMBEDDED)), tokenizer, 256, 100)
    with calibrating_as_runs_do():
        from_text = bh.calibrate(embedded.model, tokenizer, text=bh.calibration_rest(text))
    batches = [torch.as_tensor(item.token_ids, dtype=torch.int64)[None] for item in text.scored[::12]]
    seen = bh.record_routers(embedded.model, [batch for batch in batches if batch.shape[1] == 257])
    for name in ("bh_strict", "bh_moderate", "bh_loose"):
        config = bh.resolve_config(name, bh.ROUTING_CONFIGS[name])
        means = []
        for calibration in (from_text, embedded.calibration):
            counts = [
                counts_by(config, logits, calibration.null(layer, 1.0), 8).clamp(1, 8)
                for layer, logits in enumerate(seen.logits)
            ]
            means.append(torch.stack(counts).double().mean().item())
        assert abs(means[0] - means[1]) < 0.1, name


# ---------------------------------------------------------------------------------------------------------
# 19. Compute, phases, throughput of a batch, quantised weights
# ---------------------------------------------------------------------------------------------------------

# What a token costs


def cost_of(model):
    layers = bh.find_moe_layers(model)
    return bh.ModelCost.of(model, [layer.experts for layer in layers], layers[0].num_experts)


def meta_olmoe(**changes):
    """OLMoE-1B-7B as published, in bfloat16, without memory; and its cost."""
    import transformers

    config = transformers.OlmoeConfig(**{"intermediate_size": 1024, **changes})
    with torch.device("meta"):
        model = transformers.OlmoeForCausalLM(config).bfloat16()
    return bh.ModelCost.of(model, [layer.mlp.experts for layer in model.model.layers], config.num_experts)


def test_published_shape_of_olmoe():
    """1.3 B active of 6.9 B parameters, counted by hand; and the bounds of speed that follow."""
    hidden, wide, layers, experts, words = 2048, 1024, 16, 64, 50304
    expert = 3 * hidden * wide
    attention = 4 * hidden**2 + 2 * hidden  # and the norms of queries and keys
    norms = 2 * hidden
    rest = layers * (attention + norms + experts * hidden) + hidden + 2 * words * hidden
    cost = meta_olmoe()
    assert cost.total_parameters == rest + layers * experts * expert == 6_919_161_856
    assert cost.shared_parameters == rest
    assert cost.expert_parameters.tolist() == [expert] * layers
    assert cost.expert_flops.tolist() == [2 * expert] * layers
    active = rest + 8 * layers * expert
    assert active == 1_282_017_280
    assert cost.shared_bytes == 2 * (rest - (words - 1) * hidden)  # one row of the embedding
    read = {k: cost.bytes_read(np.full(layers, float(k))) for k in (8, 6, 5, 4, 2)}
    assert read[8] == 2 * (active - (words - 1) * hidden)
    assert [round(read[8] / read[k], 2) for k in (6, 5, 4, 2)] == [1.21, 1.34, 1.52, 2.05]


def test_a_tied_embedding_counts_once():
    """And is read in full: it is the head."""
    plain = meta_olmoe()
    tied = meta_olmoe(tie_word_embeddings=True)
    table = 50304 * 2048
    assert plain.total_parameters - tied.total_parameters == table
    assert plain.shared_parameters - tied.shared_parameters == table
    assert plain.shared_bytes - tied.shared_bytes == 2 * 2048  # the row of the table that is no head


COSTED = {
    "olmoe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v3": {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]},
    "gpt_oss": {},
    "cohere2_moe": {},  # tied
}


@pytest.fixture(scope="module", params=COSTED)
def costed(request):
    """A tiny model of an architecture."""
    with pytest.MonkeyPatch.context() as patch:
        fields = {name: value for name, value in COSTED[request.param].items() if value is not None}
        patch.setattr(sys.modules[__name__], "TINY", TINY | fields)
        classes = dict(declared_architectures())
        if request.param not in classes:
            pytest.skip("this transformers declares no router for it")
        model = tiny_of(request.param, classes[request.param])
    model.set_experts_implementation("eager")
    return model


def test_cost_is_what_takes_part(costed):
    """Parameters and bytes, against gradients: what one token's logits depend on was read, whole tensors, of
    experts those that ran, of an embedding table that is no head the rows that were looked up."""
    cost = cost_of(costed)
    layers = bh.find_moe_layers(costed)
    costed.zero_grad()
    costed(input_ids=torch.tensor([[7]]), use_cache=False).logits.sum().backward()
    of_experts = {id(p) for layer in layers for p in layer.experts.parameters()}
    head = costed.get_output_embeddings().weight
    tables = {id(m.weight) for m in costed.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    read = 0
    experts_read = 0
    for name, parameter in costed.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        rows = parameter.grad.flatten(1).any(1).sum().item() if parameter.ndim > 1 else None
        if id(parameter) in of_experts:
            experts_read += rows * parameter[0].numel()
        elif id(parameter) in tables:
            read += rows * parameter.shape[1]
        else:
            read += parameter.numel()
    own_k = np.full(len(layers), float(layers[0].own_k))
    assert own_k @ cost.expert_parameters == experts_read
    assert cost.shared_bytes == 4 * read
    assert cost.bytes_read(own_k) == 4 * (read + experts_read)
    total = cost.shared_parameters + layers[0].num_experts * cost.expert_parameters.sum()
    assert cost.total_parameters == total == sum(p.numel() for p in costed.parameters())
    costed.zero_grad()


def test_flops_of_experts_are_those_that_torch_counts(costed):
    """Without biases, which torch does not count."""
    from torch.utils.flop_counter import FlopCounterMode

    layers = bh.find_moe_layers(costed)
    counted = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            counter = FlopCounterMode(display=False)
            enter = layer.experts.register_forward_pre_hook(
                lambda *_, counter=counter: counter.__enter__() and None
            )
            leave = layer.experts.register_forward_hook(
                lambda *_, counter=counter: counter.__exit__(None, None, None)
            )
            stack.callback(enter.remove)
            stack.callback(leave.remove)
            counted.append(counter)
        costed(input_ids=torch.tensor([[7]]), use_cache=False)
    cost = cost_of(costed)
    for place, layer in enumerate(layers):
        named = layer.experts.named_parameters()
        biases = sum(p.numel() for name, p in named if "bias" in name) / layer.num_experts
        flops = layer.own_k * (cost.expert_flops[place] - biases)
        assert counted[place].get_total_flops() == flops > 0


def test_what_stands_in_is_counted(tiny):
    """Effective experts, by layer; with one of the two layers left alone."""
    model, tokenizer = tiny.model, tiny.tokenizer
    calibration = bh.calibrate(model, tokenizer, seed=0, outputs=True)
    config = {"method": "topk", "k": 2, "stand_in": "mean", "layers": [1]}
    layers = bh.find_moe_layers(model)
    with bh.patched_routing(model, config, calibration) as recorder:
        logits_of(model, sample_ids())
    routing = recorder.total()
    share = layers[1].hidden_size / layers[1].expert_size
    assert routing.effective_experts == pytest.approx([4, 2 + 2 * share])
    cost = cost_of(model)
    row = cost.row(routing, routing)
    of_experts = (6 + 2 * share) * layers[0].expert_size
    assert row["active_expert_parameters"] == pytest.approx(of_experts)
    assert row["active_parameters"] == pytest.approx(cost.shared_parameters + of_experts)
    assert row["expert_flops_per_token"] == pytest.approx(2 * of_experts)
    assert row["weight_bytes_per_token"] == pytest.approx(cost.shared_bytes + 4 * of_experts)
    assert list(row) == [column.name for column in bh.COMPUTE_COLUMNS]


def test_a_vision_tower_is_not_active():
    """Only the decoder and the head of a model that also sees."""

    class Seeing(MockMoE):
        def __init__(self):
            super().__init__(8)
            self.vision_tower = nn.Linear(10, 10)

        def get_decoder(self):
            return self.text

        def get_output_embeddings(self):
            return None

    model = Seeing()
    model.text = nn.ModuleList([part for name, part in model.named_children() if name != "vision_tower"])
    plain = cost_of(MockMoE(8))
    cost = cost_of(model)
    assert cost.total_parameters == plain.total_parameters + 110
    assert cost.shared_parameters == plain.shared_parameters
    assert cost.shared_bytes == plain.shared_bytes


# Prefill and decoding apart


@pytest.mark.parametrize("kept_calls", [1, 256])
def test_prefill_and_decoding_are_told_apart(tiny, monkeypatch, kept_calls):
    """Against a hook that counts for itself; also where sums are taken in between."""
    monkeypatch.setattr(bh.RoutingRecorder, "MAX_CALLS", kept_calls)
    seen = []

    def count(module, args, output):
        seen.append((output[1] != 0).sum(1))

    run = bh.PromptRun(tiny.model, tiny.tokenizer, "a small boat", 5, None, 0)
    with bh.patched_routing(tiny.model, FLAT) as recorder:
        hook = tiny.layers[0].router.register_forward_hook(count)
        run.generate()
        hook.remove()
        prefill, decoding = recorder.phases()
    assert [len(counts) for counts in seen] == [run.num_input_tokens, 1, 1, 1, 1]
    for phase, counts in ((prefill, seen[0]), (decoding, torch.cat(seen[1:]))):
        assert phase.counts[0].tolist() == counts.bincount(minlength=17).tolist()
    total = recorder.total()
    assert_same_sums(prefill + decoding, total)
    recorder.start()
    assert not any(phase.counts.any() for phase in recorder.phases())


def test_sums_are_brought_over_at_once(tiny):
    """One transfer, whatever the number of layers and rows."""

    class Transfers(torch.overrides.TorchFunctionMode):
        number = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.number += func is torch.Tensor.cpu
            return func(*args, **(kwargs or {}))

    with bh.patched_routing(tiny.model, FLAT) as recorder:
        recorder.start(rows=2)
        logits_of(tiny.model, sample_ids())
    with Transfers() as transfers:
        recorder.statistics()
    assert transfers.number == 1


def test_rows_have_both_phases_and_the_cost(tiny, tmp_path):
    model = tiny.model
    runner = bh.BHExperimentRunner("x", tmp_path, model=model, tokenizer=tiny.tokenizer)
    row = runner.run_single_experiment("bh", FLAT, PROMPTS[0], 6)
    prompt = row["num_input_tokens"]
    both = (prompt * row["prefill_experts"] + 5 * row["decode_experts"]) / (prompt + 5)
    assert row["avg_experts_per_token"] == pytest.approx(both)
    size = tiny.layers[0].expert_size
    of_experts = 2 * row["avg_experts_per_token"] * size
    assert row["active_expert_parameters"] == pytest.approx(of_experts)
    decoded = runner.cost.shared_bytes + 4 * 2 * row["decode_experts"] * size
    assert row["weight_bytes_per_token"] == pytest.approx(decoded)
    row = runner.run_single_experiment("bh", FLAT, PROMPTS[0], 1)
    assert row["prefill_experts"] == row["avg_experts_per_token"]
    assert row["decode_experts"] is row["weight_bytes_per_token"] is None


# Throughput of a batch


def test_a_batch_is_its_prompts_together(tiny):
    """Padding counts nowhere; the routing of a batch is that of its prompts one by one, and so are its texts,
    in float32 on a model this small."""
    texts = ["a small boat on the river", "he", "said, and left"]
    runs = [bh.PromptRun(tiny.model, tiny.tokenizer, text, 5, None, 0) for text in texts]
    with bh.patched_routing(tiny.model, FLAT) as recorder:
        alone = [run.generate() for run in runs]
        together = recorder.total()
        recorder.start(rows=3)
        batch = bh.PromptRun.together(runs)
        generation = batch.generate()
        rows = recorder.statistics()
        prefill, decoding = recorder.phases()
    in_batch = functools.reduce(bh.RoutingStatistics.__add__, rows)
    for name in ("counts", "use", "unchosen"):
        assert np.array_equal(getattr(in_batch, name), getattr(together, name)), name
    assert in_batch.mass == pytest.approx(together.mass, rel=1e-6)  # rounding
    lengths = [run.num_input_tokens for run in runs]
    assert prefill.counts.sum(1).tolist() == [sum(lengths)] * 2
    assert decoding.counts.sum(1).tolist() == [3 * 4] * 2
    assert [row.counts[0].sum() for row in rows] == [length + 4 for length in lengths]
    assert torch.equal(generation.tokens, alone[0].tokens)
    clock = generation.clock
    assert clock["tokens_per_sec"] == pytest.approx(3 * 5 / clock["inference_time_sec"])
    assert batch.num_input_tokens == max(lengths)
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    assert all(batch.inputs["attention_mask"][:, -1] == 1)


def test_distinct_experts(tiny):
    """Of a batch, against sets; dropped ones do not count."""
    picked = []

    def look(module, args, output):
        _, weights, indices = output
        picked.append(len({int(expert) for expert in indices[weights != 0]}))

    with bh.patched_routing(tiny.model, {**FLAT, "max_k": 2}):
        hook = tiny.layers[1].router.register_forward_hook(look)
        with bh.counting_distinct_experts(tiny.layers) as counts:
            for rows in (1, 3):
                logits_of(tiny.model, sample_ids(rows, 5))
        hook.remove()
    assert [int(number) for number in counts[1]] == picked
    assert len(counts[0]) == 2
    logits_of(tiny.model, sample_ids())
    assert len(counts[0]) == 2  # the hook is gone


def read_throughput(folder):
    return bh.read_table(bh.THROUGHPUT, folder)


def test_throughput_of_a_suite(tiny_folder, tmp_path, monkeypatch):
    """A table of its own: in turns, resumed, measured anew for another batch, and gone when not asked for."""
    only_plots(monkeypatch)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS))
    configs = {"two": {"method": "topk", "k": 2}, "bh": FLAT}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    options = ["--prompts", tmp_path / "prompts.jsonl", "--routing-configs", tmp_path / "configs.json"]
    options += ["--configs", "two,bh", "--max-tokens", 4, "--text", "none"]
    turns = []
    routed = bh.BHExperimentRunner._routed

    def watched(self, config):
        turns.append(config)
        return routed(self, config)

    monkeypatch.setattr(bh.BHExperimentRunner, "_routed", watched)
    folder = tmp_path / "out"
    assert cli(tiny_folder, folder, *options, "--generate-batch", 5) == 0
    frame = read_throughput(folder)
    names = ["topk_4", "two", "bh"]  # and the model's own
    assert frame["config_name"].tolist() == names
    assert frame["status"].tolist() == ["ok"] * 3
    assert frame[
        ["batch_size", "num_prompts", "repeats", "max_new_tokens"]
    ].drop_duplicates().values.tolist() == [[5, 3, bh.THROUGHPUT_REPEATS, 4]]
    assert turns[-3 * (1 + bh.THROUGHPUT_REPEATS) :] == turns[-3:] * (1 + bh.THROUGHPUT_REPEATS)
    assert (frame[["tokens_per_sec", "decode_sec_per_step"]] > 0).all(axis=None)
    by_name = frame.set_index("config_name")
    assert by_name.loc["topk_4", "decode_experts"] == 4
    assert (frame["distinct_experts"] >= frame["decode_experts"]).all()
    assert by_name.loc["two", "distinct_experts"] < by_name.loc["topk_4", "distinct_experts"] <= 16
    report = (folder / "REPORT.md").read_text()
    assert "### Throughput of a batch" in report
    entries = bh.analyze_results(bh.Results.read(folder).generation, folder)["throughput"]
    assert [(entry["configuration"], entry["batch_size"]) for entry in entries] == [
        (name, size) for size in (1, 5) for name in names
    ]
    assert [entry["speedup"] for entry in entries if entry["configuration"] == "topk_4"] == [1, 1]
    assert all(entry["allowed_speedup"] >= 1 for entry in entries)

    runner = bh.BHExperimentRunner(str(tiny_folder), folder, device="cpu", use_fp16=False)
    suite = functools.partial(runner.run_full_experiment_suite, configs, PROMPTS, 4)
    suite(generate_batch=5)
    pd.testing.assert_frame_equal(runner.results.throughput, frame)  # nothing was measured again
    suite(generate_batch=2)
    assert runner.results.throughput["batch_size"].tolist() == [2] * 3
    suite()
    assert len(runner.results.throughput) == 0
    assert not (folder / bh.THROUGHPUT.file).exists()


def test_a_failed_batch_is_a_row(mock_model, tmp_path, monkeypatch, caplog):
    """The others go on, the run fails, and the report says why."""
    together = bh.PromptRun.generate
    layers = bh.find_moe_layers(mock_model)

    def fail(self):
        if len(self.inputs["input_ids"]) > 1 and layers[0].router.top_k == 2:
            raise RuntimeError("no room")
        return together(self)

    monkeypatch.setattr(bh.PromptRun, "generate", fail)
    configs = {**CONFIGS, "topk_2": {"method": "topk", "k": 2}}
    results = run_suite(mock_model, tmp_path, configs, PROMPTS[:2], generate_batch=3)
    frame = results.throughput.set_index("config_name")
    assert frame["status"].to_dict() == {"topk_8": "ok", "bh_flat": "ok", "topk_2": "error"}
    assert frame.loc["topk_2", "error"] == "RuntimeError: no room"
    assert "topk_2 x batch of 3 failed: RuntimeError: no room" in caplog.messages
    assert results.num_failed == 1
    only_plots(monkeypatch)
    bh.write_report(results.generation, tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert "| `topk_2` | batch of 3 | RuntimeError: no room |" in report


def test_a_prompt_that_does_not_fit_fails_the_batch_only(mock_model, tmp_path):
    prompts = [PROMPTS[0], {"id": "long", "text": "word " * 200}]
    runner = mock_runner(mock_model, tmp_path)
    runner.context = 100
    frame = runner.run_full_experiment_suite(CONFIGS, prompts, 2, generate_batch=2)
    assert frame["status"].tolist() == ["ok", "ok", "error", "error"]
    assert runner.results.throughput["status"].tolist() == ["error"] * 2
    assert runner.results.throughput["error"].str.contains("prompt 'long' has").all()


def test_one_new_token_has_no_step(mock_model, tmp_path):
    frame = run_suite(mock_model, tmp_path, CONFIGS, PROMPTS[:1], 1, generate_batch=2).throughput
    assert frame["status"].tolist() == ["ok"] * 2
    steps = ["decode_sec_per_step", "decode_experts", "distinct_experts", "weight_bytes_per_step"]
    assert frame[steps].isna().all(axis=None)


@pytest.mark.parametrize(("options", "message"), [
    (["--generate-batch", "1"], "--generate-batch 1: it must be a whole number of at least 2"),
    (["--generate-batch", "4", "--tasks", "x"], "--generate-batch and --tasks exclude each other"),
    (["--generate-batch", "4", "--text", "x"], "--generate-batch and --text without --prompts or --dataset"),
])  # fmt: skip
def test_batches_that_cannot_be(options, message, tmp_path, capsys):
    assert bh.main(["--model", "nowhere", "--output", str(tmp_path), *options]) == 2
    assert message in error_lines(capsys)[0]


def test_a_batch_needs_prompts(mock_model, tmp_path):
    texts = [text_item("t", range(10))]
    with pytest.raises(bh.UserError, match="generate_batch 2: there is no prompt to be continued"):
        mock_runner(mock_model, tmp_path).run_full_experiment_suite(
            CONFIGS, [], texts=texts, generate_batch=2
        )


# Analysis and report


def results_with_cost(bytes_per_token, seconds):
    """Two configurations on three prompts: bytes read and seconds a decoded token, by configuration."""
    results = invented_results(tuple(bytes_per_token), prompts=3)
    frame = results.generation
    frame["weight_bytes_per_token"] = frame["config_name"].map(bytes_per_token).astype(float)
    frame["decode_sec_per_token"] = frame["config_name"].map(seconds)
    frame["total_parameters"] = 6.9e9
    frame["active_parameters"] = frame["weight_bytes_per_token"] / 2
    frame["active_expert_parameters"] = 0.8e9
    frame["expert_flops_per_token"] = 1.6e9
    frame["prefill_experts"] = 5.0
    frame["decode_experts"] = 4.5
    return results


def test_allowed_and_measured_speed(tmp_path):
    results = results_with_cost({"topk_8": 2.4e9, "bh_strict": 1.6e9}, {"topk_8": 0.03, "bh_strict": 0.024})
    compute = analysis_of(results, tmp_path)["compute"]
    assert list(compute) == ["topk_8", "bh_strict"]
    assert compute["bh_strict"]["allowed_speedup"] == pytest.approx(1.5)
    assert compute["bh_strict"]["decode_speedup"] == pytest.approx(1.25)
    assert compute["topk_8"]["allowed_speedup"] == compute["topk_8"]["decode_speedup"] == 1
    analysis = bh.analyze_results(results.generation, tmp_path)
    uses = "uses 1.20 B of 6.90 B parameters and 1.60 GFLOP in its experts"
    said = f"A token under `topk_8` {uses}, and 2.40 GB of weights are read to decode one."
    assert bh.cost_sentence(analysis) == said
    report = report_of(results, tmp_path)
    assert "| `bh_strict` | 800.00 M | 800.00 M | 1.60 GFLOP | 1.60 GB | 1.50 | 1.25 |" in report
    assert "| `bh_strict` | 5.00 | 4.50 | 100.0 | 24.00 |" in report


def test_cost_of_scored_text(mock_model, tmp_path):
    """Without generation the table is of the scored text; nothing is timed."""
    texts = [text_item(name, range(3, 20)) for name in "ab"]
    runner = mock_runner(mock_model, tmp_path)
    frame = runner.run_full_experiment_suite(CONFIGS, [], texts=texts)
    compute = bh.analyze_results(frame, tmp_path)["compute"]
    assert {"topk_8", "bh_flat", "topk_1"} < set(compute)
    assert compute["topk_1"]["allowed_speedup"] > compute["bh_flat"]["allowed_speedup"] > 1
    assert compute["bh_flat"]["decode_speedup"] is compute["bh_flat"]["prefill_experts"] is None
    path = bh.generate_markdown_report(frame, bh.analyze_results(frame, tmp_path), tmp_path / "REPORT.md")
    assert "experts in prefill" not in path.read_text()


def test_results_without_the_cost_have_no_table_of_it(tmp_path):
    """As those of older scripts."""
    results = invented_results()
    analysis = analysis_of(results, tmp_path)
    assert (analysis["compute"], analysis["throughput"]) == ({}, [])
    assert bh.cost_sentence(analysis) == ""
    assert "## Compute" not in report_of(results, tmp_path)


@pytest.mark.parametrize(("number", "units", "text"), [
    (0.0, bh.BYTES, "0.00 B"), (999.0, bh.BYTES, "999.00 B"), (999.7, bh.BYTES, "1.00 kB"),
    (6_919_161_856, bh.PARAMETERS, "6.92 B"), (5e15, bh.FLOPS, "5000.00 TFLOP"), (None, bh.BYTES, ""),
    (12.0, bh.PARAMETERS, "12.00"),
])  # fmt: skip
def test_numbers_with_units(number, units, text):
    assert bh.scaled(number, units) == text


# Quantised weights


def plain_folder(kind, folder):
    """A tiny model with random weights whose sizes are multiples of 32, and a tokenizer."""
    import transformers

    shape = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 32, "num_experts_per_tok": 4,
             "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None,
             "eos_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    if kind == "olmoe":
        model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape, num_experts=8))
    else:
        model = transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**shape, head_dim=32, num_local_experts=8)
        )
    for layer in bh.find_moe_layers(model):
        nn.init.normal_(layer.router.weight, std=0.5)
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def rewrite_weights(folder, change, settings):
    """Put what `change` makes of each tensor in its place, and the quantisation into config.json."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    changed = {}
    for name, tensor in load_file(path).items():
        changed |= change(name, tensor)
    save_file(changed, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


UNQUANTIZED = ["lm_head", "model.embed_tokens", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]


def fp8_tensors(name, tensor):
    """Blocks of 32 x 32, each with its scale, of the linear layers and the experts."""
    if tensor.ndim != 2 or name.removesuffix(".weight") in UNQUANTIZED:
        return {name: tensor}
    rows, columns = tensor.shape
    blocks = tensor.float().view(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": scale}


def mxfp4_tensors(name, tensor):
    """Random 4-bit numbers, 32 to a scale, for the experts; [E, in, out] is stored by its columns."""
    if not name.endswith(("gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    experts, rows, columns = tensor.shape
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (experts, columns, rows // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(123, 126, (experts, columns, rows // 32), generator=generator, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def channel_tensors(name, tensor):
    """FP8 with a scale for each row, as compressed-tensors stores it."""
    if tensor.ndim != 2 or name.removesuffix(".weight") in UNQUANTIZED:
        return {name: tensor}
    scale = tensor.float().abs().amax(1, keepdim=True) / 448
    return {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}


def quantized_folder(name, folder):
    """A folder with a tiny model in a format, as a user would download it."""
    import transformers

    if name == "fp8":
        plain_folder("olmoe", folder)
        settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic",
                    "modules_to_not_convert": UNQUANTIZED}  # fmt: skip
        rewrite_weights(folder, fp8_tensors, settings)
    elif name == "mxfp4":
        plain_folder("gpt_oss", folder)
        spared = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        rewrite_weights(folder, mxfp4_tensors, {"quant_method": "mxfp4", "modules_to_not_convert": spared})
    elif name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        plain_folder("olmoe", folder)
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        settings = {"quant_method": name, "format": "float-quantized", "quantization_status": "compressed",
                    "ignore": ["lm_head", "re:.*mlp.gate$"],
                    "config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
        rewrite_weights(folder, channel_tensors, settings)
    else:
        if name.startswith("torchao"):
            quantization = pytest.importorskip("torchao.quantization")
            weights = {
                "torchao-int8": quantization.Int8WeightOnlyConfig,
                "torchao-int8-activations": quantization.Int8DynamicActivationInt8WeightConfig,
                "torchao-float8": quantization.Float8WeightOnlyConfig,
            }
            how = transformers.TorchAoConfig(weights[name]())
        else:
            pytest.importorskip("bitsandbytes")
            options = {
                "bitsandbytes-8": {"load_in_8bit": True},
                "bitsandbytes-fp4": {"load_in_4bit": True},
                "bitsandbytes-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                     "bnb_4bit_use_double_quant": True},
            }  # fmt: skip
            how = transformers.BitsAndBytesConfig(**options[name])
        plain_folder("olmoe", folder / "plain")
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder / "plain", quantization_config=how, device_map="cpu", dtype=torch.bfloat16)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


QUANTIZED = {
    **dict.fromkeys(("fp8", "mxfp4"), ("float32", "bfloat16")),
    **dict.fromkeys(("bitsandbytes-8", "bitsandbytes-fp4", "bitsandbytes-nf4"), ("float32",)),
    **dict.fromkeys(("torchao-int8", "torchao-int8-activations", "torchao-float8"), ("float32",)),
    "compressed-tensors": ("float32",),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_taken(name, tmp_path):
    """What the manual lists: keeping all is bit-identical, dropped is the native smaller K (in 16 bits but
    for rounding), the model is restored, and a runner generates."""
    folder = quantized_folder(name, tmp_path / "model")
    assert any(name.startswith(method) for method in bh.QUANTIZED_WEIGHTS)
    for dtype in QUANTIZED[name]:
        model, tokenizer = bh.load_model(str(folder), torch.device("cpu"), getattr(torch, dtype))
        architecture = Architecture(model)
        architecture.check_keeping_all()
        exact = next(model.parameters()).dtype == torch.float32
        for k in range(1, architecture.own_k):
            routed, _ = architecture.routed(fixed(k, architecture.own_k), k)
            native, _ = architecture.native(k)
            error = ((routed - native).abs().max() / native.abs().max()).item()
            assert error < (1e-5 if exact else 0.02), k
            assert (routed - architecture.before).abs().max() > 0.05 * native.abs().max(), k
        architecture.check_restored()
        runner = bh.BHExperimentRunner("x", tmp_path / dtype, model=model, tokenizer=tokenizer)
        row = runner.run_single_experiment("bh", FLAT, PROMPTS[0], 3)
        assert (row["status"], row["num_output_tokens"]) == ("ok", 3)
        assert row["total_parameters"] == bh.ModelCost.of(model, [], 1).total_parameters
    if name in ("fp8", "mxfp4"):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("packed", ["bitsandbytes-8", "bitsandbytes-nf4", "torchao-int8"])
def test_quantized_weights_are_counted_as_what_they_stand_for(packed, tmp_path):
    """As many parameters as unpacked, in fewer bytes."""
    folder = quantized_folder(packed, tmp_path / "model")
    model, _ = bh.load_model(str(folder), torch.device("cpu"), torch.bfloat16)
    plain, _ = bh.load_model(str(folder / "plain"), torch.device("cpu"), torch.bfloat16)
    cost = cost_of(model)
    plain_cost = cost_of(plain)
    assert cost.total_parameters == plain_cost.total_parameters
    assert cost.shared_bytes < plain_cost.shared_bytes


@pytest.mark.parametrize(("method", "settings"), [
    ("bitsandbytes", {"load_in_8bit": True}), ("torchao", {"quant_type": "int8"}), ("gptq", {"bits": 4}),
    ("no_such_format", {}),
])  # fmt: skip
def test_quantized_weights_without_their_library(method, settings, tmp_path, capsys):
    """Refused in one line, before anything runs."""
    if importlib.util.find_spec({"gptq": "gptqmodel"}.get(method, method)):
        pytest.skip(f"{method} is installed")
    plain_folder("olmoe", tmp_path / "model")
    settings = {"quant_method": method, **settings}
    rewrite_weights(tmp_path / "model", lambda name, tensor: {name: tensor}, settings)
    assert cli(tmp_path / "model", tmp_path / "out") == 2
    lines = error_lines(capsys)
    assert len(lines) == 1
    assert "cannot be loaded: " in lines[0]


def test_packed_experts_of_torchao(tmp_path):
    """Where torchao lacks an operation for the experts, the model is refused in one line."""
    quantization = pytest.importorskip("torchao.quantization")
    refused = {}
    for kind in (quantization.Int8Tensor, quantization.Float8Tensor):
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            model = build("olmoe-eager").bfloat16()
            for layer in model.model.layers:
                for name in ("gate_up_proj", "down_proj"):
                    weight = getattr(layer.mlp.experts, name).data
                    packed = kind.from_hp(weight, granularity=quantization.PerRow())
                    setattr(layer.mlp.experts, name, nn.Parameter(packed, requires_grad=False))
            model.set_experts_implementation(implementation)
            try:
                bh.find_moe_layers(model)
            except bh.UserError as error:
                refused[kind.__name__, implementation] = str(error)
    assert not any("\n" in message for message in refused.values())
    assert set(refused) == {
        ("Int8Tensor", "grouped_mm"),
        ("Int8Tensor", "batched_mm"),
        ("Float8Tensor", "batched_mm"),
    }


# ---------------------------------------------------------------------------------------------------------
# 20. Which token got many experts
# ---------------------------------------------------------------------------------------------------------

LOGGED_CONFIGS = {"topk_8": {"method": "topk", "k": 4}, "bh": {**FLAT, "max_k": 6}}
LOGGED_WINDOWS = [
    text_item(f"w{n}", [3 + (5 * n + 7 * i) % 250 for i in range(length)], f"d{n // 2}")
    for n, length in enumerate((9, 20, 14, 20, 12))
]


def logged_run(folder, model=None, **options):
    """A run of a real model with a cache, with what every token got; its runner."""
    size = options.pop("batch_size", "auto")
    model = build("olmoe-eager") if model is None else model
    runner = bh.BHExperimentRunner("m", folder, model=model, tokenizer=byte_tokenizer(), batch_size=size)
    settings = {"texts": LOGGED_WINDOWS, "token_log": True} | options
    runner.run_full_experiment_suite(LOGGED_CONFIGS, SCORED_PROMPTS, 4, **settings)
    return runner


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    runner = logged_run(folder)
    return SimpleNamespace(folder=folder, runner=runner, log=bh.read_token_log(folder))


def token_files(folder):
    """What a run says of its tokens, byte for byte."""
    names = (bh.TOKEN_COUNTS.file, bh.TOKEN_KINDS.file, *bh.TOKEN_LOG_FILES)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_token_log_agrees_with_counts_and_rows(logged):
    """Its rows are the decisions that all other tables sum up: as many, each once, with the same numbers."""
    log = logged.log
    assert list(log) == bh.TOKEN_LOG.names
    key = ["config_name", "kind", "item_id", "sample", "position", "layer"]
    assert not log.duplicated(key).any()
    counts = bh.read_table(bh.EXPERT_COUNTS, logged.folder)
    of_log = log.groupby(["config_name", "kind", "layer", "num_experts"]).size()
    of_table = counts.set_index(["config_name", "kind", "layer", "num_experts"])["tokens"]
    assert of_log.sort_index().to_dict() == of_table.sort_index().to_dict()
    assert of_table.index.get_level_values("num_experts").nunique() > 3
    results = logged.runner.results
    for kind, item, frame in (
        ("generation", "prompt_id", results.generation), ("score", "item_id", results.scores)
    ):  # fmt: skip
        for row in frame.to_dict("records"):
            own = log[(log["config_name"] == row["config_name"]) & (log["kind"] == kind)]
            own = own[own["item_id"] == row[item]]
            assert own["num_experts"].mean() == pytest.approx(row["avg_experts_per_token"], abs=1e-12)
            assert own["gate_mass"].mean() == pytest.approx(row["gate_mass_frac"], abs=1e-5)
            assert own.groupby("layer")["position"].apply(list).map(lambda p: p == list(range(len(p)))).all()
            if kind == "generation":
                assert len(own) == 2 * (row["num_input_tokens"] + row["num_output_tokens"] - 1)
                assert (own["phase"] == "prompt").sum() == 2 * row["num_input_tokens"]
    assert set(log["run_id"]) == set(results.generation["run_id"])


def test_token_counts_are_the_log_by_token(logged):
    """A row a token of every generated text: its id, text and counts; the last one without counts."""
    counts = bh.read_table(bh.TOKEN_COUNTS, logged.folder)
    log = logged.log[logged.log["kind"] == "generation"]
    results = logged.runner.results.generation
    for row in results.to_dict("records"):
        own = counts[
            (counts["config_name"] == row["config_name"]) & (counts["prompt_id"] == row["prompt_id"])
        ]
        assert "".join(own["token"]).startswith(row["prompt_text"])
        prompt = own[own["phase"] == "prompt"]
        assert prompt["token_id"].tolist() == byte_tokenizer()(row["prompt_text"])["input_ids"]
        assert len(own) == len(prompt) + row["num_output_tokens"]
        assert own["avg_experts"].isna().tolist() == [False] * (len(own) - 1) + [True]
        decisions = log[(log["config_name"] == row["config_name"]) & (log["item_id"] == row["prompt_id"])]
        by_layer = [[int(n) for n in cell.split()] for cell in own["experts_by_layer"][:-1]]
        assert np.array(by_layer).reshape(-1).tolist() == decisions["num_experts"].tolist()
        assert own["avg_experts"][:-1].tolist() == pytest.approx(np.mean(by_layer, axis=1))


def test_kinds_of_tokens_are_summed_by_document(logged):
    """`token_kinds.csv` from the log alone, with rare and frequent as they are defined."""
    tokens = logged.log.groupby(
        ["config_name", "kind", "item_id", "position", "token_id", "token_kinds"], as_index=False
    )["num_experts"].mean()
    documents = {item.id: item.document for item in LOGGED_WINDOWS}
    tokens["document"] = tokens["item_id"].map(lambda item: documents.get(item, item))
    table = bh.read_table(bh.TOKEN_KINDS, logged.folder)
    assert set(table["token_kind"]) == set(bh.KINDS_OF_TOKENS)
    # Where text was scored it alone decides: the references are in the log, and not among its documents.
    is_reference = (tokens["kind"] == "score") & ~tokens["item_id"].isin(documents)
    assert is_reference.any()
    tokens = tokens[~is_reference]
    assert set(table.loc[table["kind"] == "score", "document"]) == set(documents.values())
    for row in table.to_dict("records"):
        of_config = tokens[(tokens["config_name"] == row["config_name"]) & (tokens["kind"] == row["kind"])]
        own = of_config[of_config["document"] == row["document"]]
        times = of_config["token_id"].value_counts()
        is_kind = own["token_kinds"].map(lambda kinds, kind=row["token_kind"]: kind in kinds.split())
        if row["token_kind"] == "rare":
            assert is_kind.tolist() == (own["token_id"].map(times) == 1).tolist()
        if row["token_kind"] == "first_position":
            assert is_kind.tolist() == (own["position"] == 0).tolist()
        assert (row["tokens"], row["other_tokens"]) == (is_kind.sum(), (~is_kind).sum())
        for column, part in (("avg_experts", own[is_kind]), ("other_avg_experts", own[~is_kind])):
            expected = part["num_experts"].mean()
            assert row[column] == pytest.approx(expected) or math.isnan(row[column] + expected)


@pytest.mark.parametrize(
    ("counts", "rare", "frequent"),
    [({5: 1, 6: 3, 7: 1, 8: 3}, [5, 7], [6, 8]), ({5: 4, 6: 1}, [6], [5]), ({9: 1, 2: 1}, [2, 9], [2])],
)
def test_rare_and_frequent(counts, rare, frequent):
    """Rare occurs once; the most frequent make up half, and ties are broken by the number of the token."""
    frequencies = bh.Frequencies.of(counts)
    assert sorted(frequencies.rare.tolist()) == rare
    assert sorted(frequencies.frequent.tolist()) == frequent


def test_without_the_log_all_else_is_the_same(logged, tmp_path):
    """Every other table, byte for byte but for clocks; scored tokens are not kept; and its folder is
    another's."""
    runner = logged_run(tmp_path, token_log=False)
    assert_same_results(runner.results, logged.runner.results)
    for table in (bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS, bh.TOKEN_COUNTS):
        assert (tmp_path / table.file).read_bytes() == (logged.folder / table.file).read_bytes()
    assert set(bh.read_table(bh.TOKEN_KINDS, tmp_path)["kind"]) == {"generation"}
    assert sorted(token_files(tmp_path)) == [bh.TOKEN_COUNTS.file, bh.TOKEN_KINDS.file]
    rows = rows_in(tmp_path / "checkpoints" / bh.CHECKPOINT_FILE)
    assert {row["kind"]: row["tokens"] is None for row in rows} == {"generation": False, "score": True}
    with pytest.raises(bh.UserError, match="token_log is False there, True here; choose another --output"):
        logged_run(tmp_path)
    with pytest.raises(bh.UserError, match="holds no token log: run the experiments with --token-log"):
        bh.read_token_log(tmp_path)


def test_a_batch_of_windows_is_logged_as_one_by_one(logged, tmp_path):
    """Padding is in no row, and a row of a batch is the text it is of."""
    logged_run(tmp_path, batch_size=1)
    pd.testing.assert_frame_equal(bh.read_token_log(tmp_path), logged.log, atol=2e-5)
    lengths = logged.log[logged.log["layer"] == 0].groupby(["config_name", "item_id"]).size()
    assert [lengths["bh", item.id] for item in LOGGED_WINDOWS] == [8, 19, 13, 19, 11]


def test_killed_runs_end_with_the_same_log(logged, tmp_path):
    """Killed in the middle of a write, and again while the log is written: what is left is whole, and the
    run that goes on ends with the same bytes."""

    model = build("olmoe-eager")

    def killed_while_writing():
        tear_a_write(np.random.default_rng(1))
        logged_run(tmp_path, model)
        return 0

    def killed_while_logging():
        def write(frames, path):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        bh._write_parquet = bh._write_csv_gz = write
        logged_run(tmp_path, model)
        return 0

    assert ended(in_child(killed_while_writing)) == -signal.SIGKILL
    finished = keys_by_file(tmp_path)[bh.CHECKPOINT_FILE]
    assert not token_files(tmp_path)
    assert ended(in_child(killed_while_logging)) == -signal.SIGKILL
    assert not [name for name in token_files(tmp_path) if name in bh.TOKEN_LOG_FILES]
    logged_run(tmp_path, model)
    assert token_files(tmp_path) == token_files(logged.folder)
    assert 0 < len(finished) < len(keys_by_file(tmp_path)[bh.CHECKPOINT_FILE])


def test_log_without_pyarrow(logged, tmp_path, monkeypatch, caplog):
    """csv.gz with the same content; a token that a spreadsheet would run is made harmless, and read back."""
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(bh.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
        patch.setattr(bh.TokenTables, "LOGGED_TOGETHER", 50)
        with caplog.at_level("INFO", bh.logger.name):
            logged_run(tmp_path)
        assert "token_log.csv.gz; with pyarrow installed it is parquet" in caplog.text
        read = bh.read_token_log(tmp_path)
        (tmp_path / "token_log.parquet").write_bytes(b"")
        with pytest.raises(bh.UserError, match=r"token_log\.parquet needs pyarrow: pip install pyarrow"):
            bh.read_token_log(tmp_path)
    expected = logged.log.assign(token=[text.replace("\0", "\u2400") for text in logged.log["token"]])
    pd.testing.assert_frame_equal(read, expected, check_dtype=False, atol=2e-6)
    lines = gzip.decompress((tmp_path / "token_log.csv.gz").read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(lines, newline="")))
    assert {row["token"] for row in rows if row["token"].endswith(("=", "+"))} <= {"'=", "'+"}
    assert len(rows) == len(logged.log)


# What tokens stand for


def sentencepiece_like():
    """A tokenizer that marks the space before a word, drops it at the beginning, and falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "▁", "▁the", "▁cat", "s", "a", "▁a", ",", "12", "▁'"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"), vocabulary


def test_texts_of_tokens_of_sentencepiece():
    """Spaces before words are seen, characters of several bytes stand with their first token."""
    tokenizer, numbers = sentencepiece_like()
    euro = [f"<0x{byte:02X}>" for byte in "€".encode()]
    pieces = ["<s>", "▁the", "▁cat", "s", ",", "12", *euro, "<0xFF>", "▁a"]
    ids = [numbers[piece] for piece in pieces]
    token_texts = bh.TokenTexts(tokenizer)
    texts = token_texts.texts(ids)
    assert texts == ["<s>", " the", " cat", "s", ",", "12", "€", "", "", "\ufffd", " a"]
    kinds = token_texts.word_kinds(ids, texts)
    assert kinds == ["", "word_start", "word_start", "word_continuation", "punctuation", "digits",
                     "punctuation", "", "", "punctuation", "word_start"]  # fmt: skip


def test_texts_of_tokens_of_byte_level_bpe():
    """The same of the embedded model's tokenizer: together they are the text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    text = "The cat’s 27 encyclopaedias, 日本 é\n\n\tx = 3; naïveté"
    ids = tokenizer(text)["input_ids"]
    token_texts = bh.TokenTexts(tokenizer)
    texts = token_texts.texts(ids)
    assert "".join(texts) == text
    assert "日" in "".join(texts)
    kinds = dict(zip(texts, token_texts.word_kinds(ids, texts), strict=True))
    assert kinds["The"] == kinds[" cat"] == "word_start"
    assert kinds[","] == "punctuation"
    assert "word_continuation" in kinds.values()
    assert "digits" in kinds.values()
    byte_texts = bh.TokenTexts(byte_tokenizer()).texts(byte_tokenizer()("ab é€")["input_ids"])
    assert byte_texts == ["a", "b", " ", "é", "", "€", "", ""]


@pytest.mark.parametrize(
    ("text", "before", "kind"),
    [(" word", "x", "word_start"), ("word", "", "word_start"), ("Word", "(", "word_start"),
     ("word", " ", "word_start"), ("ing", " walk", "word_continuation"), ("'s", " it", "word_continuation"),
     ("b", "1", "word_continuation"), ("b", " a", "word_continuation"), (" 12", "x", "digits"),
     ("½", "", "digits"), (".", "x", "punctuation"), (" (", "x", "punctuation"),
     ("\n\n", ".", ""), (" ", "a", ""), ("", "a", "")],
)  # fmt: skip
def test_kind_of_a_word(text, before, kind):
    assert bh.word_kind(text, before) == kind


# Are they different?


def test_kinds_are_compared_within_documents():
    """The mean difference over documents that have both, of scored text where there is some; what is static
    or unknown has no test; one adjustment over all."""

    def rows(name, kind, means, token_kind="rare"):
        return [
            {"config_name": name, "kind": kind, "document": f"d{n}", "token_kind": token_kind, "tokens": 2,
             "avg_experts": own, "other_tokens": 6, "other_avg_experts": others, "run_id": "r"}
            for n, (own, others) in enumerate(means)
        ]  # fmt: skip

    means = [(5.0, 4.0), (5.5, 4.0), (6.0, 4.0)]
    absent = {**rows("bh", "score", means)[0], "document": "none", "tokens": 0, "avg_experts": math.nan}
    table = pd.DataFrame(
        [*rows("bh", "generation", [(1, 9), (1, 8)]), *rows("bh", "score", means), absent,
         *rows("bh", "score", means, "digits"), *rows("topk_8", "score", means), *rows("x", "score", means)]
    )  # fmt: skip
    configs = {"bh": FLAT, "topk_8": {"method": "topk", "k": 8}}
    tests = bh.compare_token_kinds(table, configs)
    assert [(test["configuration"], test["kind"], test["token_kind"]) for test in tests] == [
        ("bh", "score", "rare"), ("bh", "score", "digits")
    ]  # fmt: skip
    expected = stats.ttest_1samp([1.0, 1.5, 2.0], 0)
    for test, share in zip(tests, (6 / (3 * 8 + 6), 0.25), strict=True):
        assert test["mean_difference"] == pytest.approx(1.5)
        assert (test["n_units"], test["mean"], test["mean_baseline"]) == (3, 5.5, 4.0)
        assert test["p_value"] == pytest.approx(expected.pvalue)
        assert test["token_share"] == pytest.approx(share)
        assert test["p_value_adjusted"] == pytest.approx(expected.pvalue)
    assert bh.compare_token_kinds(table[:0], configs) == []


def test_kinds_of_tokens_in_the_report(logged, tmp_path, monkeypatch):
    """The finding, its table and its words; of what was generated where no log has the scored text."""
    only_plots(monkeypatch)
    shutil.copytree(logged.folder, tmp_path / "run")
    bh.write_report(logged.runner.results.generation, tmp_path / "run")
    section = sections_of((tmp_path / "run" / "REPORT.md").read_text())["Which tokens get many experts"]
    assert "Under `bh`, " in section
    assert "| `bh` | rare tokens | " in section
    assert "Of the scored text. In each document" in section
    assert all(kind.words in section for kind in bh.KINDS_OF_TOKENS.values())
    kinds = bh.read_table(bh.TOKEN_KINDS, tmp_path / "run")
    rows = kinds[kinds["kind"] == "generation"].to_dict("records")
    bh.write_table(bh.TOKEN_KINDS, rows, tmp_path / "run")
    bh.write_report(logged.runner.results.generation, tmp_path / "run")
    report = (tmp_path / "run" / "REPORT.md").read_text()
    assert "Of the prompts and what was written after them." in report
    check_report(report)


# The view


class Markup(HTMLParser):
    """The elements of a page, and its text; every element that is opened is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], collections.Counter(), ""
        self.attributes = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attributes}
        if tag != "input":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


HARMLESS = {"div", "style", "p", "span", "label", "input", "code", "details", "summary", "i", "u"}


def viewed(tokens, name="p", category="c", config_name="bh", experts=None):
    experts = np.arange(1.0, len(tokens) + 1) if experts is None else np.array(experts, float)
    by_layer = ["1 2"] * len(tokens)
    return bh.ViewedText(name, category, config_name, list(tokens), experts, by_layer, 1)


def test_view_of_a_run(logged):
    """Every prompt under every configuration, the first of each category open, tokens with their numbers."""
    page = bh.token_view(logged.runner.results, logged.folder)
    markup = Markup(page)
    assert set(markup.elements) <= HARMLESS
    assert markup.elements["details"] == 3
    assert page.count("<details open>") == len({prompt["category"] for prompt in SCORED_PROMPTS})
    assert markup.elements["input"] == 2
    counts = bh.read_table(bh.TOKEN_COUNTS, logged.folder)
    assert page.count(' title="') == counts["avg_experts"].notna().sum()
    row = counts[counts["config_name"] == "bh"].iloc[3]
    assert f'title="{row["avg_experts"]:.2f}: {row["experts_by_layer"]}">{row["token"]}</u>' in page
    assert page.index("<code>bh</code> ") < page.index("<code>topk_8</code> ")  # what adapts comes first


def test_hostile_tokens_get_nowhere_in_the_view():
    """Nothing of a token, a name or a category is markup, and nothing hides."""
    names = [text[:60] for text in HOSTILE]
    texts = [viewed(["x", *HOSTILE[:-1], "y"], name, name) for name in names]
    page = bh.token_view_html(texts)
    markup = Markup(page)
    assert set(markup.elements) <= HARMLESS
    assert markup.attributes <= {"class", "title", "type", "checked", "open"}
    assert "alert(1)" in markup.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", page)


def test_view_has_a_limit(monkeypatch):
    """Beyond it prompts are counted only, and every category has its share."""
    texts = [viewed(["word"] * 50, f"{category}{n}", category) for category in "ab" for n in range(10)]
    whole = bh.token_view_html(texts)
    monkeypatch.setattr(bh, "VIEW_LIMIT", len(whole) // 2)
    page = bh.token_view_html(texts)
    assert len(page) < 0.7 * len(whole)
    shown = re.findall(r"<summary>(.): (.\d)</summary>", page)
    assert {category for category, _ in shown} == {"a", "b"}
    assert f"<p>{20 - len(shown)} more prompts are in <code>token_counts.csv</code>.</p>" in page
    assert bh.token_view_html([]) == ""
    assert bh.token_view_html([viewed("x", experts=[math.nan])]) == ""


def test_shades_go_from_few_to_many():
    """A scale for all; line ends and rests of characters are shown; without a difference all is dark."""
    page = bh.token_view_html([viewed(["a", "b\n", "\n", "", "c"], experts=[1, 2, 3, 4, math.nan])])
    shades = [int(number) for number in re.findall(r'class="s(\d)" title', page)]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0, 9)
    assert '">b↵</u>' in page
    assert '">↵</u>\n' in page
    assert '">·</u>' in page
    assert "<u>c</u>" in page
    assert re.findall(r'class="s(\d)" title', bh.token_view_html([viewed("ab", experts=[4, 4])])) == ["9"] * 2


def test_a_notebook_shows_its_texts(logged):
    """`stats` shows what was read and written, each text by itself, and a batch without its padding."""
    runner = logged.runner
    with runner.routing(LOGGED_CONFIGS["bh"]) as recorder:
        written = [runner.generate(text, 3) for text in ("a cat", "<b>")]
        page = recorder._repr_html_()
        recorder.start()
        ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        runner.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        texts = recorder.texts()
        total = recorder.total()
    assert [(len(text.ids), text.num_given) for text in texts] == [(4, 2), (6, 4)]
    assert sum(text.counts.sum(0) for text in texts).tolist() == (total.counts @ np.arange(17)).tolist()
    assert len(written) == page.count("<details")
    assert "&lt;" in page
    assert "<b>" not in page
    assert "<table" in page


def test_a_notebook_keeps_so_many_tokens(logged, monkeypatch):
    """Memory is bounded: a text begins only while there is room."""
    monkeypatch.setattr(bh, "VIEWED_TOKENS", 10)
    monkeypatch.setattr(bh.RoutingRecorder, "MAX_CALLS", 2)
    with logged.runner.routing(LOGGED_CONFIGS["bh"]) as recorder:
        for _ in range(5):
            logged.runner.generate("a cat and", 3)
        assert 10 <= sum(len(text.ids) for text in recorder.texts()) < 22
        assert recorder.total().counts[0].sum() == 5 * 11


def test_the_log_is_not_for_tasks(tmp_path, capsys):
    assert bh.main(["--token-log", "--tasks", "x", "--output", str(tmp_path)]) == 2
    assert "--tasks and --token-log exclude each other" in error_lines(capsys)[0]


# ---------------------------------------------------------------------------------------------------------
# 21. Seen at once: the answer on the terminal, the bar, the report as a page
# ---------------------------------------------------------------------------------------------------------


def terminal_of(results, folder):
    """What the terminal shows of results, by lines: none too wide, and none with anything hidden."""
    shown = bh.terminal_answer(analysis_of(results, folder))
    assert not re.search("[^\n -~–…]", shown)
    assert max(map(len, shown.splitlines())) <= 80
    return shown.splitlines()


def table_rows(lines):
    """The rows below the ruler of the only table among some lines."""
    (ruler,) = [place for place, line in enumerate(lines) if re.fullmatch("-+", line)]
    return list(itertools.takewhile(bool, lines[ruler + 1 :]))


def test_terminal_shows_the_answer(tmp_path):
    """The sentence of the report, and a row a configuration: the baseline, then those compared with it."""
    results = invented_results(tuple(bh.ROUTING_CONFIGS), 60)
    lines = terminal_of(results, tmp_path)
    analysis = analysis_of(results, tmp_path)
    sentence = bh.verdict_sentence(analysis).replace("*", "").replace("`", "")
    assert " ".join(lines).startswith(sentence)
    header = lines[lines.index("") + 1].split("  ")
    columns = ["configuration", "experts", "saved", "time", "NLL", "95 % interval", "verdict"]
    assert [title.strip() for title in header if title] == columns
    rows = table_rows(lines)
    assert [row.split()[0] for row in rows] == list(bh.ROUTING_CONFIGS)
    assert rows[0].split() == ["topk_8", "8.00", "–", "–", "–", "–", "baseline"]
    verdict = analysis["verdict"]["bh_strict"]
    saved = f"{1 - verdict['mean_experts'] / 8:.0%}"
    cells = [f"{verdict['mean_experts']:.2f}", saved]
    assert rows[1].split()[1:3] == cells
    assert (
        f"{verdict['delta_nll']:+.4f}  {bh.show(verdict, 'ci95', '+.4f to +.4f')}  {verdict['verdict']}"
        in rows[1]
    )
    assert "saved: experts, against topk_8; time: of inference" in " ".join(lines)


def test_terminal_shows_the_best_of_many_configurations(tmp_path):
    """And says how many more there are; names that are too long are cut where one sees it."""
    long = {name: f"{name}_{'x' * (64 - len(name) - 2)}{place % 10}"
            for place, name in enumerate(bh.suites()["frontier"]) if name.startswith("bh")}  # fmt: skip
    results = renamed(invented_results(("topk_8", *long), 60), **long)
    lines = terminal_of(results, tmp_path)
    rows = table_rows(lines)
    assert rows.pop() == f"{len(long) + 1 - 12} more configurations stand in the report; these are the best."
    assert len(rows) == 12
    assert rows[0].startswith("topk_8 ")
    assert all("…" in row.split()[0] for row in rows[1:])
    deltas = [float(re.search(r" ([+-]0\.\d{4}) ", row)[1]) for row in rows[1:] if row.endswith("better")]
    assert deltas == sorted(deltas)


def test_terminal_of_other_runs(tmp_path):
    """Generation without scores, tasks, and text alone: no column that has nothing to show."""
    configs = ("topk_8", "bh_strict")
    generation = dataclasses.replace(bh.EMPTY_RESULTS, generation=invented_generation(configs, 6))
    lines = terminal_of(generation, tmp_path)
    assert lines[0] == "No text was scored in this run: it says nothing about quality."
    assert lines[2].split() == ["configuration", "experts", "saved", "time", "verdict"]
    lines = terminal_of(tasks_only(), tmp_path)
    assert lines[0].startswith("Of 2 comparisons with topk_8 on a task, paired by document, ")
    assert [row.split()[:2] for row in table_rows(lines)] == [["choice", "bh_strict"],
                                                             ["words…_text", "bh_strict"]]  # fmt: skip
    lines = terminal_of(text_only(), tmp_path)
    assert "time" not in lines[lines.index("") + 1]
    alone = dataclasses.replace(bh.EMPTY_RESULTS, generation=invented_generation(("bh_strict",), 1))
    assert table_rows(terminal_of(alone, tmp_path))[0].split() == ["bh_strict", *ANYTHING, "baseline"]


ANYTHING = [f"{invented_generation(('bh_strict',), 1)['avg_experts_per_token'][0]:.2f}"]


def test_terminal_shows_rules_where_many_are_compared(tmp_path):
    """Those that no other beats first; the bounds are called so."""
    methods = {"bh": -0.02, "threshold": -0.02, "top_p": 0.01, "min_p": 0.02, "entropy": 0.0, "oracle": -0.05}
    scores, _ = simulated_field(3, methods, documents=20, windows=1)
    common = rows_of_run(bh.SCORES, [{}]).iloc[0]
    filled = scores.assign(own_k=8, status="ok", run_id="run").fillna({"model_name": "x", "category": "c"})
    filled["method"] = filled["configuration"].map(lambda cell: json.loads(cell)["method"])
    filled = filled.assign(**{name: common[name] for name in ("model_name", "dtype", "device", "seed")})
    lines = terminal_of(dataclasses.replace(bh.EMPTY_RESULTS, scores=filled), tmp_path)
    rows = [row for row in table_rows(lines) if "more rules" not in row]
    assert {row.split()[0].strip(",") for row in rows[:2]} == {"bh", "threshold"}
    assert [row for row in rows if row.startswith("oracle")][0].endswith("a bound")


def test_terminal_tables_keep_hostile_words_in_their_place():
    """On their line, in their column, with nothing that a terminal obeys."""
    rows = [{"task": text, "configuration": "a", "mean": 1.0} for text in HOSTILE]
    rows.append({"task": "\u8a9e" * 200, "configuration": "b" * 64, "mean": -1.0})
    lines = bh.terminal_table(rows, bh.TERMINAL_TABLES["tasks"])
    assert len(lines) == len(rows) + 2
    assert max(map(bh._columns_of, lines)) <= bh.TERMINAL_COLUMNS
    assert not any(
        re.search("[\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", line) for line in lines
    )
    assert len({bh._columns_of(line) for line in lines[2:]}) == 1  # the last column ends at one place
    assert bh.plain_text(f"`a` on {bh.markdown_text('x_y `z` <b> & *')}") == "a on x_y `z` <b> & *"


def test_analyze_only_ends_with_answer_and_paths(tmp_path, monkeypatch, capsys):
    """On stdout; what is there is named, the page too; a terminal that knows ASCII only gets escapes."""
    only_plots(monkeypatch)
    write_results(invented_results(("topk_8", "bh_strict"), 3), tmp_path)
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(plain):
        assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 0
    plain.seek(0)
    assert "\\u2013" in plain.read()
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    answer, paths = printed.out.strip().split("\n\nreport  ")
    assert answer.startswith("Against static Top-K that spends")
    named = [Path(line.split()[-1]) for line in paths.splitlines()]
    assert {"report.html", "REPORT.md", bh.GENERATION.file, bh.SCORES.file} == {path.name for path in named}
    assert all(path.exists() for path in named)
    assert "analysed in " in printed.err
    assert "%|" not in printed.err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_on_a_terminal(monkeypatch):
    """It says what is done, and nothing hides in the name; it leaves no line behind."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bh.Phase("experiments generated", 4, 1) as phase:
        phase.now("a\x1b[2J\u202eb")
        phase.advance(2)
    shown = terminal.getvalue()
    assert "experiments generated, a\\x1b[2J\\u202eb:  25% |" in shown
    assert "1/4 [00:00" in shown
    assert "\x1b[2J" not in shown
    assert "\n" not in shown
    assert shown.split("\r")[-1].strip() == ""


def test_without_a_terminal_lines_tell_how_far(monkeypatch, caplog, capsys):
    """Now and then, and at the end; no bar."""
    monkeypatch.setattr(bh, "SAY_EVERY", -1.0)
    with caplog.at_level("INFO"), bh.Phase("experiments generated", 3, 1) as phase:
        phase.advance(1)
        phase.advance(1)
    with caplog.at_level("INFO"), bh.Phase("of another process", 3, is_shown=False) as phase:
        phase.advance(3)
    lines = [re.sub(r"\d+\.\d", "N", line) for line in caplog.messages]
    assert lines == [
        "2 of 3 experiments generated, for N seconds now",
        "3 of 3 experiments generated in N seconds",
    ]
    assert capsys.readouterr().err == ""


def test_the_log_names_the_phases(mock_model, tmp_path):
    """Model with its shape, what was generated, what was scored; a resumed run counts what was there."""
    for _ in range(2):
        run_suite(mock_model, tmp_path, prompts=SCORED_PROMPTS[:2], texts=WINDOWS)
    log = re.sub(r"\d+\.\d+ seconds", "N seconds", (tmp_path / bh.LOG_FILE).read_text())
    parameters = sum(weights.numel() for weights in mock_model.parameters())
    model = re.search(
        r"INFO model \S+, (\w+), (\d+) MoE layers x (\d+) experts, top-(\d+), (\S+) million", log
    )
    assert float(model[5]) == pytest.approx(parameters / 1e6, abs=0.06)
    assert log.count("4 of 4 experiments generated in N seconds") == 2
    assert log.count("45 of 45 scores of text computed in N seconds") == 2


def test_active_parameters_are_those_of_the_kept_experts(tiny):
    weights = sum(parameter.numel() for parameter in tiny.layers[0].experts.parameters())
    share = 1 - tiny.own_k / tiny.layers[0].num_experts
    total = sum(parameter.numel() for parameter in tiny.model.parameters())
    active = total - len(tiny.layers) * weights * share
    assert f"{bh._millions(round(active))} active for a token" in tiny.shape
    assert bh._millions(6_919_000_000) == "6.92 billion"


# Plots


def field_verdicts(methods):
    scores, configs = simulated_field(3, methods, documents=20, windows=1)
    verdicts = bh.quality_verdicts(scores, configs, "topk_8")
    analysis = {"verdict": verdicts, "configurations": configs, "baseline": "topk_8"}
    return analysis | {"field": bh.compare_field(scores, configs, 8)}


def test_the_field_marks_what_the_report_calls_unbeaten(as_drawn):
    analysis = field_verdicts({"bh": -0.01, "threshold": -0.03, "top_p": 0.02})
    (sentence,) = bh.field_sentences(analysis)
    assert "no other at any compared number of experts (adjusted p below 0.05): `threshold" in sentence
    axes = bh.plot_field(bh.verdict_frame(analysis))
    colors = {text.get_text().split(",")[0]: text.get_color() for text in axes[0].texts}
    assert colors["threshold"] == bh.FIELD_COLORS["beaten by no other"]
    assert colors["bh"] == bh.FIELD_COLORS["BH, beaten"]
    assert colors["top_p"] == "0.4"
    legend = {text.get_text() for text in axes[0].figure.legends[0].get_texts()}
    assert legend == {"beaten by no other", "BH, beaten", "others"}


def test_many_configurations_share_rows_and_colours(as_drawn):
    """A row a rule, and a colour a stand-in, where a row and a colour each could not be read."""
    configs = {}
    for method in ("bh", "threshold", "top_p", "min_p", "entropy", "elbow", "gap"):
        for stand_in in ("nothing", "mean"):
            knob = bh.RULES[method].knob
            for place in range(3):
                config = {"method": method, "stand_in": stand_in, knob.name: knob.default * (1 + place / 100)}
                configs[f"{method}_{stand_in}_{place}"] = bh.resolve_config("x", config)
    rows = [
        {"config_name": name, "configuration": json.dumps(config), "is_static": False, "is_unbeaten": False,
         "mean_experts": 3.0 + place % 3, "delta_nll": -0.01, "ci95_low": -0.02, "ci95_high": 0.0,
         "verdict": "better", "delta_to_baseline": 0.1, "delta_to_baseline_ci95_low": 0.0,
         "delta_to_baseline_ci95_high": 0.2}
        for place, (name, config) in enumerate(configs.items())
    ]  # fmt: skip
    verdicts = pd.DataFrame(rows)
    verdicts.attrs["baseline"] = "topk_8"
    ax = bh.plot_delta_at_equal_compute(verdicts)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(bh.families(configs))
    assert {text.get_text() for text in ax.texts} == {"3.00 to 5.00", "experts"}
    assert ax.figure.get_figheight() < 10
    ax = bh.plot_quality_vs_experts(verdicts)
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["rules, nothing stands in", "rules, mean stands in"]


def test_boxes_are_drawn_without_a_warning(as_drawn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bh.plot_experts_by_category(invented_generation(("topk_8", "bh_strict"), 6))


# The page


class Page(html.parser.HTMLParser):
    """What a page holds: its tags with attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


PAGE_TAGS = {
    "html", "head", "meta", "title", "style", "body", "nav", "a", "main", "h1", "h2", "h3", "p", "strong",
    "em", "code", "pre", "ul", "ol", "li", "div", "table", "thead", "tbody", "tr", "th", "td", "figure",
    "img", "hr", "br", "blockquote",
}  # fmt: skip
EVIL = """<script>top.ran.push(1)</script><img src="SITE/a.png" onerror="top.ran.push(2)">
<svg onload="top.ran.push(3)"><style>@import "SITE/b.css"; body{background:url(SITE/c.png);width:9999px}
</style>![a](SITE/d.png) ![b](data:image/svg+xml;base64,PHN2Zy8+) ![c](plots/../../../x.png)
[go](javascript:top.ran.push(4))
<http://SITE/e> [f]: SITE/f 'x' <iframe src="SITE/g"></iframe><base href="SITE/"><meta http-equiv="refresh"
content="0;url=SITE/h"><details ontoggle="top.ran.push(5)" open>x</details> &lt;script&gt; \u202egpj.exe"""


def png(path, size=(40, 30)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def check_page(page):
    """One page with what it may have: no script, no link out, no image but its own."""
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} <= PAGE_TAGS
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes or (tag, attributes["src"][:22]) == ("img", "data:image/png;base64,")
        assert "href" not in attributes or (tag, attributes["href"][0]) == ("a", "#")
    policies = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv")]
    assert policies == [bh.PAGE_POLICY]
    assert "default-src 'none'" in bh.PAGE_POLICY
    assert len(parsed.all("style")) == 1
    assert parsed.all("html") == [{"lang": "en"}]
    assert [meta for meta in parsed.all("meta") if meta.get("name") == "viewport"]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"][1:] for link in parsed.all("a")} <= set(ids)
    assert len(page) < 5_000_000
    return parsed


def test_page_of_hostile_texts(tmp_path):
    """Markup of others is shown as it is written, and does nothing: no tag, link or image comes of it."""
    png(tmp_path / "x.png")
    hostile = [EVIL, *HOSTILE[:-1], NASTY]
    blocks = ["# T", *(f"- {text}" for text in hostile), *(f"## {text}" for text in hostile)]
    cells = [bh.markdown_text(text) for text in (*hostile, "x" * 1_000_000)]
    table = "\n".join(["| a |", "| --- |", *(f"| {cell} |" for cell in cells)])
    page = bh.page_html("\n\n".join([*blocks, table]), tmp_path / "deep" / "er" / "plots")
    parsed = check_page(page)
    assert parsed.all("img") == []
    for shown in (
        "<script>top.ran.push(1)</script>",
        "onerror=",
        "javascript:top",
        "data:image/svg+xml",
        "<base href",
    ):
        assert shown in parsed.text
    assert "x… (996,000 more characters)" in parsed.text


def test_page_shows_its_own_plots_only_and_further_fragments(tmp_path):
    """Smaller than they are in the folder; a broken one is named; fragments stand before the summary."""
    png(tmp_path / "quality_vs_experts.png", (4000, 2000))
    (tmp_path / "layer_profile.png").write_bytes(b"no picture")
    png(tmp_path / "own.png")
    markdown = "# The <title>\n\n## Answer\n\n" + "".join(
        f"![{name}](plots/{name}.png)\n\n" for name in ("quality_vs_experts", "layer_profile", "own", "field")
    )
    fragment = '<h2 id="tokens">Which token</h2><p>many</p>'
    page = bh.page_html(f"{markdown}\n\n## Summary by configuration\n\nx", tmp_path, [fragment])
    parsed = check_page(page)
    (image,) = parsed.all("img")
    assert (image["width"], image["height"], image["alt"]) == ("1600", "800", "quality_vs_experts")
    assert "layer_profile: cannot identify image" in parsed.text
    assert "own (plots/own.png)" in parsed.text
    assert "field (plots/field.png)" in parsed.text
    assert page.index('id="answer"') < page.index(fragment) < page.index('id="summary-by-configuration"')
    links = [link["href"] for link in parsed.all("a")]
    assert links == ["#answer", "#tokens", "#summary-by-configuration"]
    assert "<title>The &lt;title&gt;</title>" in page
    assert fragment in bh.page_html("# T", tmp_path, [fragment])


@pytest.fixture(scope="module")
def page_run(tmp_path_factory):
    """A report with a few plots, of a run in which others' texts are everywhere."""
    folder = tmp_path_factory.mktemp("page")
    results = write_run(folder, tuple(bh.ROUTING_CONFIGS), 6)
    frame = results.generation
    frame["prompt_category"] = frame["prompt_category"].replace({"c0": EVIL, "c1": "x" * 100_000})
    frame.loc[frame["prompt_id"] == "p2", ["status", "error"]] = ["error", EVIL + "y" * 1_000_000]
    write_results(results, folder)
    with pytest.MonkeyPatch.context() as patch:
        only_plots(patch, "quality_vs_experts", "layer_profile")
        bh.write_report(frame, folder)
    return folder


def test_page_of_a_run(page_run):
    """The report's own tables, plots and words, whole; the same results give the same bytes."""
    page = (page_run / "report.html").read_text(encoding="utf-8")
    parsed = check_page(page)
    report = (page_run / "REPORT.md").read_text(encoding="utf-8")
    assert len(parsed.all("table")) == len(table_widths(report))
    assert [image["alt"] for image in parsed.all("img")] == ["Quality against compute", "Layer by layer"]
    assert report.index("![Quality against compute]") < report.index(
        "\n## ", report.index("Executive summary")
    )
    cells = {words for attributes in parsed.all("td") for words in attributes.get("class", "").split()}
    assert {"number", "short", "static"} <= cells
    assert bh.page_html(report, page_run / "plots") == page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WATCHER = """<!doctype html><script>var ran = [], loaded = 0, seen = [];
function look() { if (++loaded < FRAMES) return; setTimeout(function () {
  for (var frame of document.querySelectorAll("iframe")) { var page = frame.contentDocument;
    var root = page.documentElement, images = [...page.images];
    seen.push({width: root.clientWidth, wide: root.scrollWidth, high: root.scrollHeight,
      images: images.map(image => image.naturalWidth), inner: page.body.scrollWidth,
      boxes: [...page.querySelectorAll(".table")].map(box => box.getBoundingClientRect().right)}); }
  document.querySelector("pre").textContent = JSON.stringify({ran: ran, pages: seen}); }, 300); }
</script><pre></pre>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_in_a_browser(page_run, tmp_path):
    """At the width of a desktop and of a telephone: nothing wider than the page, every picture there, no
    script ran, no request left. A page without any of this beside it shows that it would be seen."""
    asked = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{site.server_port}"
    page = (page_run / "report.html").read_text(encoding="utf-8").replace("SITE", address)
    control = (
        f'<img src="{address}/control"><script>top.ran.push("control")</script><p style="width:9999px">x'
    )
    frames = [
        f'<iframe style="width:{width}px;height:800px;border:0" onload="look()" '
        f'srcdoc="{html.escape(shown)}"></iframe>'
        for width, shown in ((1280, page), (390, page), (390, control))
    ]
    watcher = tmp_path / "watcher.html"
    watcher.write_text(WATCHER.replace("FRAMES", "3") + "".join(frames), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
               watcher.as_uri()]  # fmt: skip
    try:
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        site.shutdown()
        site.server_close()
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", dom)[1]))
    desktop, telephone, seen = found["pages"]
    assert found["ran"] == ["control"]
    assert set(asked) == {"/control"}
    assert seen["wide"] > 9000
    for measured, width in ((desktop, 1280), (telephone, 390)):
        assert width - 20 <= measured["width"] <= width
        assert measured["wide"] <= measured["width"]
        assert max(measured["boxes"]) <= measured["width"]
        assert len(measured["images"]) == 2
        assert min(measured["images"]) > 600


# ---------------------------------------------------------------------------------------------------------
# 22. Other threads, the hooks of others, and what a hostile folder may hold
# ---------------------------------------------------------------------------------------------------------


def in_another_thread(work):
    """What `work` returns, or the UserError that it raises, in a thread of its own."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except bh.UserError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def test_a_model_at_work_is_refused_to_another_thread(mock_model, tmp_path, monkeypatch):
    """While one runner measures, or calibrates, without a patch, a second one on the same model is refused
    whatever it wants, and changes nothing; afterwards it may."""
    second = mock_runner(mock_model, tmp_path / "second")
    layers = second.layers
    prompt = bh.resolve_prompt(SCORED_PROMPTS[0])

    def patch():
        with bh.patched_routing(mock_model, FLAT, layers=layers):
            pass

    attempts = {
        "suite": lambda: run_suite(mock_model, tmp_path / "second"),
        "one": lambda: second.run_single_experiment("flat", FLAT, prompt, 2),
        "text": lambda: second.generate("The cat"),
        "patch": patch,
        "look": lambda: bh.find_moe_layers(mock_model),
        "calibrate": lambda: bh.calibrate(mock_model, MockTokenizer(), 0),
    }
    refused = collections.defaultdict(list)

    def meanwhile(moment):
        for name, attempt in attempts.items():
            outcome = in_another_thread(attempt)
            refused[moment].append((name, "at work in another thread" in str(outcome)))

    generate = mock_model.generate

    def generating(*args, **kwargs):
        if not refused["generating"]:
            meanwhile("generating")
        return generate(*args, **kwargs)

    undisturbed = run_suite(mock_model, tmp_path / "undisturbed", SMALL)
    monkeypatch.setattr(mock_model, "generate", generating, raising=False)
    bh.sample_calibration_text(mock_model, MockTokenizer(), 0)
    calibrating = refused.pop("generating")
    assert_same_results(run_suite(mock_model, tmp_path / "first", SMALL), undisturbed)
    assert calibrating == refused["generating"] == [(name, True) for name in attempts]
    for name, attempt in attempts.items():
        assert not isinstance(in_another_thread(attempt), bh.UserError), name


def test_two_runs_at_once_give_what_they_give_alone(tmp_path):
    """Two runners of two models, in two threads that share torch's random generators: each samples the text
    that it samples alone."""

    # Made one after the other: their weights are drawn from the generator that all threads share.
    models = {name: small_mock() for name in ("alone", "a", "b")}

    def sampled(name):
        runner = mock_runner(models[name], tmp_path / name, sampling={"temperature": 1.0})
        return list(runner.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 8, num_samples=2).generated_text)

    alone = sampled("alone")
    together = {}
    threads = [
        threading.Thread(target=lambda name=name: together.update({name: sampled(name)}))
        for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {"a": alone, "b": alone}


def test_activations_are_captured_as_they_are_computed(tiny):
    """Forward hooks that somebody else has on router, experts and block see what is computed, dropped slots
    with weight zero, and are there afterwards; what they saw is what the recorder counts."""
    layer = tiny.layers[0]
    block = tiny.model.get_submodule(layer.name.rpartition(".")[0])
    seen = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        for name, module in (("router", layer.router), ("experts", layer.experts), ("block", block)):
            keep = lambda module, args, output, name=name: seen[name].append((args, output))  # noqa: E731
            stack.callback(module.register_forward_hook(keep).remove)
        plain = logits_of(tiny.model, sample_ids())
        seen.clear()
        with bh.patched_routing(tiny.model, FLAT, layers=tiny.layers) as recorder:
            routed = logits_of(tiny.model, sample_ids())
            counts = recorder.total().counts[0]
        weights = seen["router"][0][1][1]  # [T, K]
        assert torch.equal(seen["experts"][0][0][2], weights)
        kept = torch.bincount((weights != 0).sum(1), minlength=len(counts))
        assert kept.tolist() == counts.tolist()
        output = seen["block"][0][1]
        assert torch.equal(output.reshape(-1, output.shape[-1]), seen["experts"][0][1])
        seen.clear()
        assert torch.equal(logits_of(tiny.model, sample_ids()), plain)
        assert not torch.equal(routed, plain)
        assert [len(calls) for calls in seen.values()] == [1, 1, 1]


def test_hooks_of_accelerate(mock_model):
    """One that is there before is gone through as before, and stays; one that is put on a patched module is
    refused at the end of the block, where the model is itself again."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    ids = sample_ids()
    plain = logits_of(mock_model, ids)
    with bh.patched_routing(mock_model, FLAT):
        routed = logits_of(mock_model, ids)
    layers = bh.find_moe_layers(mock_model)
    for module in (layers[0].router, layers[1].experts):
        hook = Counting()
        add_hook_to_module(module, hook)
        with bh.patched_routing(mock_model, FLAT, layers=layers):
            assert torch.equal(logits_of(mock_model, ids), routed)
        assert hook.calls == 1
        assert torch.equal(logits_of(mock_model, ids), plain)
        assert hook.calls == 2
        remove_hook_from_module(module)
    before = state_of(mock_model)
    for module in (layers[0].router, layers[1].experts):
        patching = bh.patched_routing(mock_model, FLAT, layers=layers)
        with pytest.raises(bh.UserError, match="was replaced while it was patched"), patching:
            add_hook_to_module(module, Counting())
        assert torch.equal(logits_of(mock_model, ids), plain)
        for name in ("_hf_hook", "_old_forward"):
            vars(module).pop(name)
        assert state_of(mock_model) == before


class Adapter(nn.Module):
    """A low-rank adapter as PEFT puts it around a linear layer, with the names that PEFT's layers have."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)
        self.scaling = {"default": 2.0}
        self.merged_adapters = []
        self._active_adapter = ["default"]
        self._disable_adapters = False

    def forward(self, hidden):
        output = self.base_layer(hidden)
        if self._disable_adapters:
            return output
        return output + hidden @ self.down.T @ self.up.T * self.scaling["default"]

    def merged(self):
        merged = copy.deepcopy(self.base_layer)
        merged.weight.data += self.up.data @ self.down.data * self.scaling["default"]
        return merged


def test_an_adapter_on_attention(tmp_path):
    """A model with one is scored like the model that it is merged into; the adapter in use is part of what a
    run and a calibration belong to, and a runner whose model was switched is refused."""
    model = tiny_olmoe()
    merged = copy.deepcopy(model)
    torch.manual_seed(0)
    for own, other in zip(model.model.layers, merged.model.layers, strict=True):
        own.self_attn.q_proj = Adapter(own.self_attn.q_proj)
        other.self_attn.q_proj = own.self_attn.q_proj.merged()

    def runner(model, folder):
        return bh.BHExperimentRunner("tiny", tmp_path / folder, model=model, tokenizer=byte_tokenizer())

    scores = []
    for name, subject in (("adapted", model), ("merged", merged)):
        runs = runner(subject, name)
        runs.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 2)
        scores.append(runs.results.scores)
    np.testing.assert_allclose(scores[0].nll, scores[1].nll, atol=1e-4)
    used = runner(model, "adapted")
    used.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 2)
    for layer in model.model.layers:
        layer.self_attn.q_proj._disable_adapters = True
    prompt = SCORED_PROMPTS[0]
    for work in (
        lambda: used.run_full_experiment_suite(SMALL, SCORED_PROMPTS, 2),
        lambda: used.run_single_experiment("flat", FLAT, prompt, 2),
        lambda: used.routing(FLAT).__enter__(),
    ):
        with pytest.raises(bh.UserError, match="another than this runner was made for"):
            work()
    with pytest.raises(bh.UserError, match="results of another run"):
        runner(model, "adapted").run_full_experiment_suite(SMALL, SCORED_PROMPTS, 2)


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_index(folder, shard):
    """A model folder whose weights are named by an index, in a file `shard`."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shard.endswith(".bin"):
        torch.save(weights, folder / shard)
    else:
        save_file(weights, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_hostile(kind, folder):
    """Change a good model folder into one that would have code run, or files read, that are not its own."""
    code = f"open({str(folder.parent / 'ran')!r}, 'w')\n"
    (folder / "evil.py").write_text(code)
    if kind == "code for a model that is known":
        own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        rewritten(folder / "config.json", auto_map=own)
    elif kind == "code of a tokenizer":
        own = {"AutoTokenizer": ["evil.Tokenizer", None]}
        rewritten(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Tokenizer")
    elif kind in ("a template that loops", "a template that imports"):
        loop = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
        imports = "{{ cycler.__init__.__globals__.os.system('touch " + str(folder.parent / "ran") + "') }}"
        template = loop if "loops" in kind else imports
        rewritten(folder / "tokenizer_config.json", chat_template=template)
        (folder / "chat_template.jinja").write_text(template)
    elif kind == "weights above":
        with_index(folder, "../outside.safetensors")
    elif kind == "weights by an absolute path":
        with_index(folder, str(folder.parent / "absolute.safetensors"))
    elif kind == "pickled weights in an index":
        with_index(folder, "weights.bin")
    else:
        assert kind == "a tensor is missing"
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [
    "code for a model that is known", "code of a tokenizer", "a template that loops",
    "a template that imports",
])  # fmt: skip
def test_what_a_model_folder_may_hold_and_does_nothing(kind, tiny_folder, tmp_path):
    """The model is loaded and is the same; nothing of it is executed, and no template is filled in."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    make_hostile(kind, tmp_path / "model")
    runner = bh.BHExperimentRunner(str(tmp_path / "model"), tmp_path / "out", device="cpu", use_fp16=False)
    good = bh.BHExperimentRunner(str(tiny_folder), tmp_path / "good", device="cpu", use_fp16=False)
    assert runner.generate("The cat", 2) == good.generate("The cat", 2)
    assert runner.settings == good.settings
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [
    "weights above", "weights by an absolute path", "pickled weights in an index", "a tensor is missing",
])  # fmt: skip
def test_weights_that_are_not_the_folders_own_are_refused(kind, tiny_folder, tmp_path, capsys):
    """In one line; transformers alone would load them all, and put random numbers where a tensor lacks."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    make_hostile(kind, tmp_path / "model")
    assert cli(tmp_path / "model", tmp_path / "out") == 2
    errors = error_lines(capsys)
    assert len(errors) == 1
    assert re.search("no safetensors file of its folder|its weights lack model.norm.weight", errors[0])


def test_weights_in_several_files(tiny_folder, tmp_path):
    """An index that names safetensors files of its own folder is what large models have."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    with_index(tmp_path / "model", "model-00001-of-00001.safetensors")
    how = (torch.device("cpu"), torch.float32)
    whole, _ = bh.load_model(str(tiny_folder), *how)
    sharded, _ = bh.load_model(str(tmp_path / "model"), *how)
    assert bh.model_fingerprint(whole) == bh.model_fingerprint(sharded)


def test_code_beside_data_is_not_run(tmp_path):
    """A folder of data with a Python program of its name, which datasets once executed."""
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(bh.UserError, match="cannot be read"):
        bh.load_dataset_prompts(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_compressed_data_that_unfolds(kind, tmp_path):
    """A text beyond any context is refused in one line; a compressed line of that length is not unfolded."""
    pytest.importorskip("datasets")
    import gzip

    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "rows"
    folder.mkdir()
    long = "a" * (bh.MAX_CHARACTERS + 1)
    if kind == "parquet":
        table = pyarrow.table({"text": [long]})
        pyarrow.parquet.write_table(table, folder / "train.parquet", compression="zstd")
    else:
        lines = {"jsonl": f'{{"text": "{long}"}}\n', "csv": f"text\n{long}\n"}
        with gzip.open(folder / f"train.{kind}.gz", "wt", compresslevel=1) as file:
            file.write(lines[kind])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    message = "10,000,001 characters, more than" if kind == "parquet" else "a row has more than 10,000,000"
    with pytest.raises(bh.UserError, match=message):
        bh.load_dataset_prompts(str(folder))


HOSTILE_TASKS = {
    "function": "process_docs: !function evil.work\n",
    "included": "include: ../outside.yaml\n",
    "standard": "process_docs: !function os.system\n",
    "metric": "metric_list: [{metric: %(evil)s, aggregation: mean, higher_is_better: true}]\n",
    "template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch %(ran)s') }}\"\n",
}


@pytest.mark.parametrize("kind", HOSTILE_TASKS)
def test_task_files_are_data(kind, task_folder, tmp_path):
    """What a task file would execute, also by a file that it includes, is refused before it is imported."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    ran = tmp_path / "ran"
    shutil.copy(task_folder / "rows.json", folder)
    plain = (task_folder / "mini_write.yaml").read_text().replace("mini_write", "bad")
    names = {"evil": folder / "evil.py", "ran": ran}
    replaced = HOSTILE_TASKS[kind].split(":")[0]
    lines = [line for line in plain.splitlines() if not line.startswith(replaced)]
    (folder / "bad.yaml").write_text("\n".join(lines) + "\n" + HOSTILE_TASKS[kind] % names)
    (tmp_path / "outside.yaml").write_text("process_docs: !function evil.work\n")
    for path in (folder, tmp_path):
        (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\ndef work(docs): return docs\n")
    message = ""
    try:
        bh.load_tasks(["bad"], folder)
    except bh.UserError as error:
        message = str(error)
    assert not ran.exists()
    assert "\n" not in message
    assert "--tasks bad cannot be loaded" in message or kind == "metric"  # the harness goes on without it
    if kind in ("function", "included"):
        assert "--trust-remote-code" in message
        bh.load_tasks(["bad"], folder, trust_remote_code=True)
        assert ran.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX only")
@pytest.mark.parametrize("kind", ["usual", "ignored", "of Windows"])
def test_sighup_ends_a_run_unless_it_is_ignored(kind, monkeypatch):
    """`nohup` ignores it: such a run goes on. All is as it was afterwards."""
    hangup = signal.SIGHUP
    first = signal.SIG_IGN if kind == "ignored" else signal.SIG_DFL
    before = signal.signal(hangup, first)
    try:
        terminate = signal.getsignal(signal.SIGTERM)
        if kind == "of Windows":
            monkeypatch.delattr(signal, "SIGHUP")
        with contextlib.ExitStack() as stack:
            bh._end_on_signals(stack)
            assert signal.getsignal(signal.SIGTERM) is bh._terminate
            assert signal.getsignal(hangup) is (bh._terminate if kind == "usual" else first)
        assert (signal.getsignal(hangup), signal.getsignal(signal.SIGTERM)) == (first, terminate)
    finally:
        signal.signal(hangup, before)


# What mutants survived: benchmarks/mutants.md


def test_a_patched_forward_has_the_name_and_signature_of_the_models_own(tiny):
    """Whoever looks at a module to see what it takes finds the same inside the block."""
    modules = [module for layer in tiny.layers for module in (layer.router, layer.experts)]
    own = [(module.forward.__name__, inspect.signature(module.forward)) for module in modules]
    with bh.patched_routing(tiny.model, FLAT, layers=tiny.layers):
        assert all("forward" in vars(module) for module in modules)
        assert [(module.forward.__name__, inspect.signature(module.forward)) for module in modules] == own


def test_levels_of_the_diagnosed_nulls(tiny):
    """Ten to a decade from 0.0001 to 1, where every null pair is at or below."""
    report = bh.diagnose_nulls(tiny.calibration, tiny.calibration)
    assert report["levels"] == pytest.approx([10 ** (-4 + n / 10) for n in range(41)])
    for null in report["nulls"].values():
        assert {shares[-1] for shares in null["layers"]} == {1}


def test_multiplications_of_what_stands_in():
    assert bh.stand_in_multiplications(16, 0) == 16
    assert bh.stand_in_multiplications(16, 3) == 16 + 16 * 3 + 3 * 16


def test_a_rule_takes_a_null_only_if_it_says_so(new_rules):
    knob = bh.rate_field("share", 0.5, 0, 1, "of nothing")
    bh.register_rule("own", knob, words="w", search=(0.1, 0.9))(lambda gates, config: None)
    rule = bh.RULES["own"]
    assert not rule.uses_null
    assert bh.NULL_FIELD.name not in [field.name for field in rule.fields]


def test_fewest_experts_are_where_the_interval_crosses_the_margin():
    """Against scipy's interval at every point of the grid, with few documents, where each counts."""
    scores, configs = simulated_field(5, {"threshold": 0.0, "min_p": 0.0}, documents=4, windows=1)
    by_config = bh.scored_items(scores)
    items = by_config["topk_8"].index
    own = by_config["topk_8"]["nll"]
    documents = by_config["topk_8"]["document"]
    ladder = next(x for x in bh.ladders_of(by_config, configs, items) if x.label == "topk")
    margin = 0.05
    found = bh.fewest_experts(ladder, own, documents, margin)
    grid = np.linspace(1, 8, 81)[:-1]  # at the last nothing differs
    low, high = np.transpose(
        [stats.ttest_1samp(ladder.at(experts) - own, 0).confidence_interval(0.95) for experts in grid]
    )
    for end, name in ((low, "ci95_low"), (high, "ci95_high")):
        last = np.flatnonzero(end >= margin)[-1]
        share = (end[last] - margin) / (end[last] - end[last + 1])
        assert found[name] == pytest.approx(grid[last] + share * (grid[last + 1] - grid[last])), name


def test_the_third_line_of_a_checkpoint_counts(tmp_path):
    """Also where it comes later in the alphabet than what is expected."""
    path = tmp_path / "latest.json"
    for line in ('"results":  [', '"rows": [', "["):
        path.write_text(f'{{"schema": {SCHEMA},\n"settings": {{"model": "m", "seed": 0}},\n{line}\n]}}\n')
        with pytest.raises(bh.UserError, match="not a checkpoint"):
            open_checkpoint(path)


def test_one_token_without_any_allowed_expert_is_named():
    logits = torch.zeros(3, 4)
    logits[1] = -math.inf
    with pytest.raises(bh.UserError, match="a token whose experts are all -inf"):
        bh.benjamini_hochberg_routing(logits, 0.1)


@pytest.mark.parametrize("width", [1, 3])
def test_experts_that_are_called_with_something_else_are_refused(width):
    """With more candidates, or fewer, than the router beside them returned."""
    picked = bh.Candidates(torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int64), None)
    call = ((torch.zeros(5, 8), torch.zeros(5, width, dtype=torch.int64), torch.ones(5, width)), {})
    with pytest.raises(bh._NotPatchable, match="no `experts` beside it"):
        bh._check_experts(lambda *arguments: None, call, picked)


STATISTICS = int(os.environ.get("BH_STATISTICS", 8))  # simulated runs; BH_STATISTICS=400 for a long look


def test_error_rates_of_whole_runs(monkeypatch):
    """Runs of the default shape with a known truth, through the whole analysis: a claim in a run without any
    difference in at most 5.5 %, differences of three standard errors found in at least 80 %, and every
    interval right in 93 to 97 %; up to chance, which decides less with more runs."""
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    import error_rates

    def at_most(share):
        return stats.binom.ppf(0.999, STATISTICS, share) / STATISTICS

    rates = error_rates.in_default_shape(STATISTICS)
    print(rates)
    assert len(rates) == 7
    for name, found in rates.items():
        if name.startswith("false"):
            assert found["rate"] <= at_most(0.055), name
        elif name.startswith("interval"):
            assert 1 - at_most(1 - 0.93) <= found["rate"] <= at_most(0.97), name
        elif name.endswith("all"):  # of one alone the adjustment finds fewer
            assert found["rate"] >= 1 - at_most(1 - 0.80), name


@pytest.mark.parametrize("name", bh.RULES)
def test_no_knob_takes_a_negative_number(name):
    """The lower bound of what each rule's knob admits is 0 at least."""
    knob = bh.RULES[name].knob
    for value in (-1, -0.5, 0):
        with pytest.raises(bh.UserError, match=re.escape(f"{knob.name} = {value}")):
            bh.resolve_config("x", {"method": name, knob.name: value})


@pytest.mark.parametrize("cell", ["{", "[1]", '{"1": "x"}'])
def test_a_cell_that_no_older_script_wrote(cell, tmp_path):
    """It is refused in one line, whatever is wrong with it."""
    source = HERE / "testdata" / "6894e3a" / bh.GENERATION.file
    rows = pd.read_csv(source, dtype=str, keep_default_na=False)
    rows.loc[rows["static_nll"] != "", "static_nll"] = cell
    rows.to_csv(tmp_path / bh.GENERATION.file, index=False)
    with pytest.raises(bh.UserError, match="is not a results CSV") as refused:
        bh.Results.read(tmp_path)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------
# 23. Fits into what people have: grids, chat templates, folders side by side, notebook, package
# ---------------------------------------------------------------------------------------------------------

# A grid of one knob


@pytest.mark.parametrize(
    ("words", "names"),
    [("topk_8,bh:alpha=0.001,0.01,0.1", ["topk_8", "bh_alpha_0.001", "bh_alpha_0.01", "bh_alpha_0.1"]),
     ("bh:alpha=.5, 0.50,topk_8", ["bh_alpha_0.5", "topk_8"]),
     ("bh:alpha=1e-5;topk_8 ; topk:k=1,2", ["bh_alpha_1e-05", "topk_8", "topk_k_1", "topk_k_2"]),
     ("min_p:ratio=0.1,bh_strict,bh:max_k=4", ["min_p_ratio_0.1", "bh_strict", "bh_max_k_4"])],
)  # fmt: skip
def test_grids(words, names):
    """A value is a number, a name is not; the names say field and value, and fit a file and a table."""
    configs = bh.choose_configs(bh.parse_options(["--configs", words]))
    assert list(configs) == names
    for name, config in configs.items():
        bh.check_name(name)
        method, field, value = re.fullmatch(r"(?:(\w+?)_(alpha|k|ratio|max_k)_)?(.+)", name).groups()
        if method and name not in bh.suites()["all"]:
            assert config["method"] == method
            assert config[field] == float(value)
            assert config["description"].endswith(f"{field} = {value}")


def test_a_grid_of_a_rule_of_ones_own(new_rules):
    register_two_rules()
    configs = bh.choose_configs(bh.parse_options(["--configs", "topk_8,margin:margin=2,3"]))
    assert {name: config.get("margin") for name, config in configs.items()} == {
        "topk_8": None, "margin_margin_2": 2.0, "margin_margin_3": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [("bhh:alpha=0.1", "unknown rule in --configs 'bhh'. Did you mean \"bh\"?"),
     ("bh:alfa=0.1", "unknown field of rule 'bh' in --configs 'alfa'. Did you mean \"alpha\"?"),
     ("bh:p_values=1", "Available: alpha, temperature, min_k, max_k"),
     ("bh:alpha=0.1,2", "--configs bh:alpha=2: alpha must be a number in (0, 1]"),
     ("bh:alpha=nan", "alpha must be"), ("bh:alpha=", "alpha must be"), ("bh:alpha", "alpha must be"),
     ("topk:k=1.5", "k must be a whole number of at least 1"), ("topk:k=inf", "k must be a whole number"),
     ("bh:alpha=0.1;0.2", "unknown configuration in --configs '0.2'"),
     ("bh:min_k=9", "min_k = 9 is above max_k = 8")],
)  # fmt: skip
def test_bad_grids(words, message, tmp_path, capsys):
    assert bh.main(["--model", "nowhere", "--output", str(tmp_path), "--configs", words]) == 2
    (error,) = error_lines(capsys)
    assert message in error


# Chat templates

CHAT = "{{ bos_token }}<user>{{ messages[0]['content'] }}{% if add_generation_prompt %}<answer>{% endif %}"


def chat_tokenizer(template=CHAT):
    """Bytes, and a tokenizer of the kind that puts a beginning-of-text token before whatever it is given."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<user>", "<answer>"]})
    first = [("<bos>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=first)
    tokenizer.chat_template = template
    return tokenizer


def chat_runner(folder, apply=True, template=CHAT):
    return bh.BHExperimentRunner(
        "tiny", folder, model=build("olmoe-grouped_mm"), tokenizer=chat_tokenizer(template),
        apply_chat_template=apply,
    )  # fmt: skip


def test_prompts_are_fed_in_by_the_chat_template(tmp_path):
    """One message of a user, up to where the answer begins, with one beginning; references come after it."""
    runner = chat_runner(tmp_path)
    prompt = {"id": "a", "text": "two <b> ", "reference": " is more than one"}
    runner.run_full_experiment_suite({"topk_4": RULES["topk_4"]}, [prompt], 3)
    tokenizer = runner.tokenizer
    bos, user, answer = tokenizer.convert_tokens_to_ids(["<bos>", "<user>", "<answer>"])
    asked = tokenizer(prompt["text"], add_special_tokens=False)["input_ids"]
    given = [bos, user, *asked, answer]
    assert tokenizer(prompt["text"])["input_ids"] == [bos, *asked]
    (row,) = runner.results.generation.to_dict("records")
    with torch.no_grad():
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        written = runner.model.generate(torch.tensor([given]), **settings)[0, len(given) :]
    assert row["num_input_tokens"] == len(given)
    assert row["generated_text"] == tokenizer.decode(written, skip_special_tokens=True)
    assert row["full_text"] == f"<bos><user>{prompt['text']}<answer>{row['generated_text']}"
    assert row["prompt_text"] == prompt["text"]
    predicted = tokenizer(prompt["reference"], add_special_tokens=False)["input_ids"]
    scores = runner.results.scores.set_index("config_name")
    assert scores.loc["topk_4", "num_tokens"] == len(predicted)
    expected = plain_nll(runner.model, torch.tensor([[*given, *predicted]]), len(given))
    assert scores.loc["topk_4", "nll"] == pytest.approx(expected, abs=1e-5)


def test_a_chat_template_is_part_of_what_a_run_is(tmp_path):
    """Without it, or with another, the results are another run's; every row's hash of inputs differs."""
    hashes = {}
    for folder, apply, template in (("a", True, CHAT), ("b", False, CHAT), ("c", True, CHAT + " ")):
        runner = chat_runner(tmp_path / folder, apply, template)
        prompt = {"id": "a", "text": "two", "reference": " and one"}
        runner.run_full_experiment_suite({"topk_4": RULES["topk_4"]}, [prompt], 1)
        hashes[folder] = [set(frame["input_hash"]) for frame in runner.results if len(frame)]
    for kind in (0, 1):
        assert len(set.union(*(of_run[kind] for of_run in hashes.values()))) == 3
    for apply, template in ((False, CHAT), (True, CHAT + " ")):
        with pytest.raises(bh.UserError, match="holds results of another run: chat_template is"):
            chat_runner(tmp_path / "a", apply, template).run_full_experiment_suite(CONFIGS, [prompt], 1)


def test_a_model_without_a_chat_template_is_refused(tiny_folder, tmp_path, capsys):
    assert cli(tiny_folder, tmp_path / "out", "--apply-chat-template") == 2
    (error,) = error_lines(capsys)
    assert f"--apply-chat-template: the tokenizer of {tiny_folder} has no chat template" in error
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    assert cli(tiny_folder, tmp_path / "out", "--apply-chat-template", "--text", text) == 2
    (error,) = error_lines(capsys)
    assert "--apply-chat-template needs prompts" in error


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "{{ 'x' * 10 ** 13 }}",
     "{% import 'os' as os %}{{ os.system('touch FILE') }}", "{% include 'FILE' %}",
     "{{ cycler.__init__.__globals__.os.system('touch FILE') }}", "{{ ().__class__.__subclasses__() }}",
     "{{ messages.append.__self__.__class__ }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{"],
)  # fmt: skip
def test_chat_templates_execute_nothing(template, tmp_path, monkeypatch):
    """What loops for ever, imports, opens or reaches for Python objects ends in one line and did nothing."""
    monkeypatch.setattr(bh, "CHAT_SECONDS", 0.3)
    file = tmp_path / "made"
    before = signal.getsignal(signal.SIGALRM)
    start = time.perf_counter()
    with pytest.raises(bh.UserError) as caught:
        chat_runner(tmp_path, template=template.replace("FILE", str(file)))
    assert str(caught.value).startswith("--apply-chat-template: the model's chat template cannot be used: ")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5
    assert not file.exists()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_harness_applies_the_chat_template(task_folder, tmp_path):
    """--tasks asks by it as well: the harness's own way."""
    runner = task_runner(tmp_path)
    runner.tokenizer.chat_template = "Q: {{ messages[0]['content'] }} A:"
    options = {"apply_chat_template": True, "model": runner.model, "tokenizer": runner.tokenizer}
    runner = bh.BHExperimentRunner("mini", tmp_path, **options)
    how = {"limit": 2, "include_path": task_folder}
    frame = runner.run_tasks(["mini_write"], {"topk_8": bh.ROUTING_CONFIGS["topk_8"]}, **how)
    assert (frame["status"] == "ok").all()
    assert all(asked.endswith(" A:") for asked in frame["prompt_text"])
    assert all("Q: " in asked for asked in frame["prompt_text"])


# Folders side by side


def two_folders(folder, change=None, names=("topk_8", "bh_strict", "bh_loose"), prompts=12):
    """Two folders of the same invented run, the second with its scores changed: [first, second]."""
    results = invented_results(names, prompts)
    other = results
    if change is not None:
        other = dataclasses.replace(results, scores=change(results.scores.copy()))
    for name, content in (("first", results), ("second", other)):
        (folder / name).mkdir()
        write_results(content, folder / name)
    return [folder / "first", folder / "second"]


def shifted(scores):
    """The scores with bh_strict worse by .01 nats, more or less: the shifts are those of `shifts`."""
    rows = scores["config_name"] == "bh_strict"
    scores.loc[rows, "nll"] += shifts(rows.sum())
    return scores


def shifts(number):
    return np.random.default_rng(5).normal(0.01, 0.003, number)


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compare_sets_folders_side_by_side(tmp_path, capsys):
    """Each folder's own numbers and verdicts in one table, on the terminal too; no folder is changed."""
    folders = two_folders(tmp_path, shifted)
    before = [files_in(folder) for folder in folders]
    output = tmp_path / "out"
    assert bh.main(["compare", *map(str, folders), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert [files_in(folder) for folder in folders] == before
    assert {str(name) for name in files_in(output)} == set(bh.COMPARISON_FILES)
    comparison = strict_loads((output / "comparison.json").read_text(encoding="utf-8"))
    rows = {(row["configuration"], row["folder"]): row for row in comparison["configurations"]}
    assert list(rows) == list(itertools.product(("topk_8", "bh_strict", "bh_loose"), "AB"))
    text = (output / "COMPARISON.md").read_text(encoding="utf-8")
    assert all(len(widths) == 1 for widths in table_widths(text))
    for letter, folder in zip("AB", folders, strict=True):
        results = bh.Results.read(folder)
        configs = bh.configurations(results)
        verdicts = bh.quality_verdicts(results.scores, configs, "topk_8")
        for name in ("bh_strict", "bh_loose"):
            row = rows[name, letter]
            for key in ("delta_nll", "ci95_low", "ci95_high", "verdict"):
                assert row[key] == verdicts[name][key]
            assert row["share_of_own"] == pytest.approx(verdicts[name]["mean_experts"] / 8)
            experts = f"{verdicts[name]['mean_experts']:.2f}"
            for shown in (said, text):
                assert re.search(rf"{name}\W+{letter}\W+{re.escape(experts)}.*{row['verdict']}", shown)
        assert rows["topk_8", letter]["verdict"] == "own Top-8"
    assert rows["bh_strict", "A"]["verdict"] != rows["bh_strict", "B"]["verdict"]
    assert f"`bh_strict` is {rows['bh_strict', 'A']['verdict']} in A, worse in B." in text


def test_folders_with_the_same_items_are_tested(tmp_path):
    """By the test of every comparison, on the differences item by item, adjusted over all of the table."""
    comparison = bh.compare_results(two_folders(tmp_path, shifted), tmp_path / "out")
    tests = {(test["configuration"], test["quantity"]): test for test in comparison["tests"]}
    assert set(tests) == {
        ("topk_8", "share_of_own"),
        *itertools.product(("bh_strict", "bh_loose"), ("delta_nll", "share_of_own")),
    }
    test = tests["bh_strict", "delta_nll"]
    expected = bh.paired_test(shifts(12))
    assert (test["n_pairs"], test["n_units"], test["folders"]) == (12, 12, "B minus A")
    for key in ("mean_difference", "p_value", "ci95_low", "ci95_high"):
        assert test[key] == pytest.approx(expected[key], rel=1e-9)
    known = [test["p_value"] for test in comparison["tests"] if test["p_value"] is not None]
    adjusted = [test["p_value_adjusted"] for test in comparison["tests"] if test["p_value"] is not None]
    assert adjusted == pytest.approx(list(stats.false_discovery_control(known)))
    assert test["significant"] is True
    assert tests["bh_loose", "delta_nll"]["reason"] == "nothing differs"
    assert comparison["pair_notes"] == ["B and A are paired on 12 windows that both measured"]
    assert "B minus A, bh_strict, NLL at equal compute" in bh.terminal_comparison(comparison).replace(
        "\n  ", ""
    )


@pytest.mark.parametrize(
    ("change", "note"),
    [(lambda scores: scores.assign(item_id="other" + scores["item_id"]), "no window has the same name"),
     (lambda scores: scores.assign(input_hash="y"), "windows of the same name hold other text"),
     (lambda scores: scores.assign(input_hash=""), "an older script did not record what its windows were"),
     (lambda scores: scores.assign(num_tokens=51), "the same text is another number of tokens there")],
)  # fmt: skip
def test_folders_with_other_items_are_not_paired(change, note, tmp_path):
    """They stand side by side, nothing is tested, and it is said why."""
    comparison = bh.compare_results(two_folders(tmp_path, change), tmp_path / "out")
    assert comparison["tests"] == []
    (said,) = comparison["pair_notes"]
    assert said.startswith("B and A are not paired: ")
    assert note in said
    text = (tmp_path / "out" / "COMPARISON.md").read_text(encoding="utf-8")
    assert said in text
    assert "No difference between folders was tested." in text
    assert len(comparison["configurations"]) == 6


def test_only_the_items_that_both_have_are_paired(tmp_path):
    folders = two_folders(tmp_path, lambda scores: scores[~scores["item_id"].isin(["p0", "p3"])])
    comparison = bh.compare_results(folders, tmp_path / "out")
    assert {test["n_pairs"] for test in comparison["tests"]} == {10}
    assert {test["reason"] for test in comparison["tests"]} == {"nothing differs"}


def test_folders_that_share_no_configuration_are_told(tmp_path, capsys):
    for name, configs in (("first", ["bh_strict"]), ("second", ["bh_loose"])):
        (tmp_path / name).mkdir()
        results = only(invented_results(("topk_8", *configs), 4), *configs)
        write_results(dataclasses.replace(results, generation=results.generation[:0]), tmp_path / name)
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert bh.main(["compare", *folders, "--output", str(tmp_path / "out")]) == 0
    assert "No configuration stands in more than one folder" in capsys.readouterr().out.replace("\n   ", " ")
    text = (tmp_path / "out" / "COMPARISON.md").read_text(encoding="utf-8")
    assert "No configuration stands in more than one folder" in text


def test_folders_of_different_models(mock_model, tiny_folder, tmp_path, monkeypatch):
    """Top-8 and Top-4, beside an older folder: shares of K, and what differs in a configuration."""
    only_plots(monkeypatch)
    first, second = tmp_path / "mock", tmp_path / "tiny"
    configs = {"topk_8": bh.ROUTING_CONFIGS["topk_8"], "bh_loose": {**FLAT, "max_k": 8}}
    run_suite(mock_model, first, configs)
    runner = bh.BHExperimentRunner(
        "tiny", second, model=build("olmoe-grouped_mm"), tokenizer=byte_tokenizer()
    )
    runner.run_full_experiment_suite(configs | {"bh_loose": FLAT}, SCORED_PROMPTS, 2)
    comparison = bh.compare_results([first, second, TESTDATA / OLDER[0]], tmp_path / "out")
    assert [folder["own_k"] for folder in comparison["folders"]] == [8, 4, 8]
    rows = {(row["configuration"], row["folder"]): row for row in comparison["configurations"]}
    assert [rows["topk_8", letter]["share_of_own"] for letter in "ABC"] == [1, 1, 1]
    assert rows["topk_8", "B"]["verdict"] == "own Top-4"
    assert rows["bh_loose", "B"]["experts"] / 4 == rows["bh_loose", "B"]["share_of_own"]
    notes = comparison["setting_notes"]
    assert "`topk_8` is not the same everywhere: `k` is `8` in A, `4` in B, `8` in C." in notes
    assert any("`bh_loose`" in note and "`max_k`" in note for note in notes)
    assert len(comparison["pair_notes"]) == 2
    assert max(map(len, bh.terminal_comparison(comparison).splitlines())) <= 80


def test_hostile_words_get_nowhere_in_a_comparison(tmp_path):
    """The name of a model, of a machine, of a folder: no table breaks, nothing hides on the terminal."""
    folders = two_folders(
        tmp_path, lambda scores: scores.assign(model_name=HOSTILE[6], device="a\x1b[2J | b")
    )
    hostile = folders[1].rename(tmp_path / "x | <b> `$")
    results = bh.Results.read(hostile)
    generation = results.generation.assign(model_name=HOSTILE[6], device="a\x1b[2J | b")
    write_results(dataclasses.replace(results, generation=generation), hostile)
    comparison = bh.compare_results([folders[0], hostile], tmp_path / "out")
    text = (tmp_path / "out" / "COMPARISON.md").read_text(encoding="utf-8")
    assert all(len(widths) == 1 for widths in table_widths(text))
    assert "<b>" not in text
    assert "\x1b" not in text + bh.terminal_comparison(comparison)
    assert (tmp_path / "out" / "plots" / "comparison.png").stat().st_size > 0


def test_no_name_is_defined_twice():
    """The later one would silently take the place of the earlier."""
    for tree in (TREE, ast.parse(Path(__file__).read_text(encoding="utf-8"))):
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert [name for name, times in collections.Counter(defined).items() if times > 1] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "required: DIR"), (["{a}"], "compare takes 2 to 26 folders of results, not 1"),
     (["{a}", "{a}/../a"], "this folder is given twice"), (["{a}", "{b}"], "run the experiments first"),
     (["{a}", "{b}/nowhere"], "there is no such folder"), (["{a}", "{file}"], "there is no such folder"),
     (["{a}", "{a}", "--colour"], "unrecognized arguments: --colour"),
     (["{a}", "{c}", "--output", "{file}"], "{file}"), (["{a}"] * 27, "not 27"),
     (["{a}", "{failed}"], "none of its 4 experiments finished")],
)  # fmt: skip
def test_bad_comparisons(words, message, tmp_path, capsys):
    """One line, exit code 2, and nothing is written."""
    names = {name: tmp_path / name for name in ("a", "b", "c", "failed", "file")}
    names["b"].mkdir()
    names["file"].write_text("keep me")
    results = invented_results(("topk_8",), 4)
    broken = changed(results, lambda frame: frame.assign(status="error"))
    for name, content in (("a", results), ("c", results), ("failed", broken)):
        names[name].mkdir()
        write_results(dataclasses.replace(content, scores=results.scores[:0]), names[name])
    output = [] if "--output" in words else ["--output", str(tmp_path / "out")]
    given = [word.format(**names) for word in words]
    try:
        code = bh.main(["compare", *given, *output])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line
    assert message.format(**names) in line
    assert not (tmp_path / "out").exists()
    assert names["file"].read_text() == "keep me"


# Models with another K


def test_the_default_configurations_on_a_model_with_another_k(tiny_folder, tmp_path, monkeypatch, caplog):
    """On a Top-4 model they run at most 4, and descriptions, log and report say so; what was asked for by
    other names or numbers stays as it is."""
    only_plots(monkeypatch, "expert_counts")
    caplog.set_level("INFO", "bh_experiments")
    runner = bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu", use_fp16=False)
    assert runner.own_k == 4
    default = {name: runner._resolve(name, config) for name, config in bh.ROUTING_CONFIGS.items()}
    assert [config.get("k", config.get("max_k")) for config in default.values()] == [4] * 5
    assert default["topk_8"]["description"] == "Fixed Top-4, the baseline: the model's own K"
    words = bh.ROUTING_CONFIGS["bh_strict"]["description"]
    assert default["bh_strict"]["description"] == f"{words}; at most 4, the model's own K"
    for name, null in (("bh_strict_shuffled", "empirical"), ("bh_loose", "flat")):
        config = bh.suites()["all"][name] | {"p_values": null}
        assert runner._resolve(name, config)["max_k"] == 4
    assert runner._resolve("bh_flat_0.5_max16", bh.suites()["all"]["bh_flat_0.5_max16"])["max_k"] == 16
    assert runner._resolve("mine", bh.ROUTING_CONFIGS["bh_strict"])["max_k"] == 8
    assert runner._resolve("bh_strict", bh.ROUTING_CONFIGS["bh_strict"] | {"max_k": 7})["max_k"] == 7

    configs = {name: bh.ROUTING_CONFIGS[name] for name in ("topk_8", "bh_loose")}
    frame = runner.run_full_experiment_suite(configs, SCORED_PROMPTS, 2)
    assert frame["max_experts"].max() <= 4
    assert "topk_8 on this model: Fixed Top-4" in caplog.text
    assert "bh_loose on this model: BH at a loose level: more experts; at most 4" in caplog.text
    bh.write_report(frame, tmp_path)
    report = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert "- `topk_8` is Top-4 on this model, the model's own routing, whatever its name says." in report
    verdict = json.loads((tmp_path / "analysis_summary.json").read_text())["verdict"]["bh_loose"]
    assert verdict["delta_nll"] is not None


def test_the_default_configurations_on_a_model_with_their_k(mock_model, tmp_path, caplog):
    caplog.set_level("INFO", "bh_experiments")
    runner = mock_runner(mock_model, tmp_path)
    default = {name: runner._resolve(name, config) for name, config in bh.ROUTING_CONFIGS.items()}
    for name, config in default.items():
        assert config == bh.resolve_config(name, bh.ROUTING_CONFIGS[name]) | {
            "description": config["description"]
        }
        assert "at most" not in config["description"]
    runner._say_what_names_mean(default)
    assert "on this model" not in caplog.text


# Another baseline


def test_expectations_of_tests_are_about_the_models_own_routing(tmp_path):
    """Against another baseline they are not measured; what needs no baseline is, as before."""
    results = invented_results()
    by_baseline = {}
    for baseline in (None, "bh_loose"):
        rows = analysis_of(results, tmp_path, baseline)["hypotheses"]
        by_baseline[baseline] = {(row["configuration"], row["quantity"]): row["measured"] for row in rows}
    for (name, quantity), measured in by_baseline["bh_loose"].items():
        if quantity in ("slowdown_percent", "experts_p_value", "experts_abs_d"):
            assert measured is None
            assert (by_baseline[None][name, quantity] is not None) == (name in ("bh_strict", "bh_loose"))
        else:
            assert measured == by_baseline[None][name, quantity]


def test_a_baseline_that_was_only_scored(tmp_path):
    """A point of the static curve, of which nothing was generated: said so; differences of NLL are to it."""
    report = report_of(invented_results(), tmp_path)
    assert "There is nothing to compare" not in report
    analysis = analysis_of(invented_results(), tmp_path, "topk_3")
    path = bh.generate_markdown_report(invented_results().generation, analysis, tmp_path / "REPORT.md")
    text = path.read_text(encoding="utf-8")
    assert "no prompt was measured under `topk_3` and another configuration" in text
    assert "Differences are to `topk_3`; the model's own routing is Top-8." in text
    assert analysis["verdict"]["bh_strict"]["delta_to_baseline"] < 0


def test_the_models_own_routing_can_be_the_baseline_before_it_is_known():
    """`topk_8` is run beside others where it is not among them, so it may be named; nothing else may."""
    asked = ["--configs", "bh_strict,bh_loose", "--baseline"]
    for name in ("topk_8", "topk_4"):
        assert list(bh.choose_configs(bh.parse_options([*asked, name]))) == ["bh_strict", "bh_loose"]
    with pytest.raises(bh.UserError, match="unknown --baseline 'bh_moderate'"):
        bh.choose_configs(bh.parse_options([*asked, "bh_moderate"]))


# The three tables in a notebook


def test_results_show_themselves():
    """A row a table and configuration; words of a run are no markup there."""
    results = invented_results(("topk_8", "bh_strict"), 4)
    results.generation.loc[0, "status"] = "error"
    summary = results.summary()
    assert set(summary.index.get_level_values("table")) == {"generation", "scores"}
    row = summary.loc["generation", "topk_8"]
    assert (row["rows"], row["failed"]) == (4, 1)
    done = results.finished().generation
    times = done.loc[done["config_name"] == "topk_8", "inference_time_sec"]
    assert row["inference_time_sec"] == pytest.approx(times.mean())
    scores = results.scores
    nll = scores.loc[scores["config_name"] == "bh_strict", "nll"].mean()
    assert summary.loc["scores", "bh_strict"]["nll"] == pytest.approx(nll)
    shown = results._repr_html_()
    assert shown.count("<tr") == len(summary) + 2
    assert f"{nll:.3f}" in shown
    hostile = renamed(results, bh_strict="<script>")
    assert "<script>" not in hostile._repr_html_()
    assert bh.EMPTY_RESULTS.summary().empty
    assert bh.EMPTY_RESULTS._repr_html_()


# The notebook


def test_notebook_runs(tmp_path, monkeypatch):
    """Every cell, on the embedded model: nothing is installed, the run is whole, page and tables shown."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    chosen = {"MODEL": EMBEDDED, "DTYPE": "float32", "MAX_TOKENS": 2, "OUTPUT": tmp_path}
    prompts = shlex.quote(str(TESTDATA / "prompts.json"))
    chosen["MORE"] = f"--configs topk_8,bh_flat_0.5_max8 --text none --prompts {prompts}"
    for name, value in chosen.items():
        monkeypatch.setenv(f"BH_{name}", str(value))
    notebook = nbformat.read(HERE / "notebooks" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = {cell["id"]: cell for cell in notebook.cells}
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)  # stored without results
    resources = {"metadata": {"path": str(HERE / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    (said,) = cells["install"]["outputs"]
    assert said["text"] == "installed: nothing was lacking\n"
    results = bh.Results.read(tmp_path)
    assert (len(results.generation), results.num_failed) == (4, 0)
    (page,) = cells["page"]["outputs"]
    assert 'srcdoc="&lt;' in page["data"]["text/html"]
    (tables,) = cells["tables"]["outputs"]
    assert tables["data"]["text/html"] == results._repr_html_()


def test_settings_of_the_notebook_are_for_a_t4():
    """Without anything set in the environment: OLMoE in float16, and options that the script takes."""
    notebook = json.loads((HERE / "notebooks" / "colab.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    space = {}
    code = cells["settings"].replace("os.environ.get", "(lambda name, default: default)")
    exec(compile(code, "settings", "exec"), space)
    assert (space["MODEL"], space["DTYPE"], space["MORE"]) == (bh.DEFAULT_MODEL, "float16", "")
    assert space["MAX_TOKENS"] == str(bh.DEFAULT_MAX_TOKENS)
    options = re.search(r"settings = \[(.*)\]", cells["run"])[1]
    words = [str(space.get(word, word)).strip('"') for word in options.split(", ")]
    bh.check_options(bh.parse_options(words))


# ---------------------------------------------------------------------------------------------------------
# Speed: precision and threads are chosen by the clock, and change no number that a row holds


# ---------------------------------------------------------------------------------------------------------
# 24. Speed: precision and threads are chosen by the clock, and change no number that a row holds
# ---------------------------------------------------------------------------------------------------------


def timed_as(monkeypatch, **seconds):
    """Let one expert's projections take so long."""
    monkeypatch.setattr(bh, "projection_seconds", lambda shapes: dict(seconds))


def test_cpu_precision_is_the_faster_one_that_fits(monkeypatch):
    """By the clock, where float32 fits into memory; the shapes are those of one expert."""
    outline = bh.model_outline(str(EMBEDDED))
    assert bh.expert_shapes(outline) == [(128, 192), (192, 64)]
    assert all(parameter.is_meta for parameter in outline.parameters())
    timed_as(monkeypatch, float32=2e-6, bfloat16=1e-6)
    assert bh.choose_cpu_precision(outline).dtype == torch.bfloat16
    timed_as(monkeypatch, float32=1e-6, bfloat16=2e-6)
    precision = bh.choose_cpu_precision(outline)
    assert precision.dtype == torch.float32
    assert "1 us in float32 and 2 us in bfloat16" in precision.reason
    needed = 4 * sum(parameter.numel() for parameter in outline.parameters())
    memory = SimpleNamespace(available=needed)  # without room for anything beside the weights
    monkeypatch.setattr(bh.psutil, "virtual_memory", lambda: memory, raising=False)
    precision = bh.choose_cpu_precision(outline)
    assert precision.dtype == torch.bfloat16
    assert "float32 needs" in precision.reason


def test_projections_are_timed_in_both_precisions():
    """At real widths, in next to no time, and with the threads that were there."""
    before = torch.get_num_threads()
    seconds = bh.projection_seconds([torch.Size((128, 192)), torch.Size((192, 64))])
    assert list(seconds) == ["float32", "bfloat16"]
    assert all(0 < spent < 1 for spent in seconds.values())
    assert torch.get_num_threads() == before


def test_model_without_a_stack_of_experts(monkeypatch):
    """Nothing to time: what the hardware computes in."""
    monkeypatch.setattr(bh, "projection_seconds", None)
    precision = bh.choose_cpu_precision(nn.Linear(3, 3))
    assert precision.dtype == bh.choose_dtype(torch.device("cpu"))


def test_resume_keeps_the_precision_of_the_earlier_run(tiny_folder, tmp_path, monkeypatch):
    """Also where the clock would now choose otherwise, which would make it another run."""
    timed_as(monkeypatch, float32=1.0, bfloat16=0.5)
    configs = {"topk_2": {"method": "topk", "k": 2}}
    runner = bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu")
    runner.run_full_experiment_suite(configs, PROMPTS[:1], 2)
    assert runner.dtype == "bfloat16"
    assert "bfloat16: one expert's projections" in (tmp_path / bh.LOG_FILE).read_text()
    timed_as(monkeypatch, float32=0.5, bfloat16=1.0)
    resumed = bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu")
    frame = resumed.run_full_experiment_suite(configs, PROMPTS[:2], 2)
    assert set(frame["dtype"]) == {"bfloat16"}
    assert "bfloat16: as in the run" in (tmp_path / bh.LOG_FILE).read_text()
    assert bh.BHExperimentRunner(str(tiny_folder), tmp_path / "new", device="cpu").dtype == "float32"
    assert bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu", dtype="float32").dtype == "float32"
    head = tmp_path / "checkpoints" / bh.CHECKPOINT_FILE
    head.write_bytes(b"{" + head.read_bytes())  # damaged: refused where it is opened, and not before
    assert bh.settings_beside(tmp_path) == {}


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine with two cores whose user set nothing."""
    for name in bh.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with bh.computing_with(2):
        yield


def test_threads_are_chosen_by_the_clock(two_threads, monkeypatch, caplog):
    """One where all of them take much longer, all where the difference is small; what was set is put back."""

    def slowed(one, many):
        return lambda: time.sleep(one if torch.get_num_threads() == 1 else many)

    with caplog.at_level("INFO"):
        assert bh.choose_threads(slowed(0.001, 0.02)) == 1
    assert "this machine is busy" in caplog.text
    assert bh.choose_threads(slowed(0.010, 0.011)) == 2
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user has chosen
    assert bh.choose_threads(lambda: pytest.fail("it was timed")) == 2


def test_threads_of_a_run_are_put_back(two_threads, mock_model, tmp_path, monkeypatch):
    """The suite computes with the number that was chosen, and says so; the process has its own again."""
    monkeypatch.setattr(bh, "choose_threads", lambda work: work() or 1)
    runner = mock_runner(mock_model, tmp_path)
    runner.run_full_experiment_suite({"bh_flat": FLAT}, PROMPTS[:1], 2)
    assert set(runner.results.generation["num_threads"]) == {1}
    assert torch.get_num_threads() == 2


def test_threads_change_rounding_only(embedded):
    """Attention sums in another order with another number of threads: scores agree to rounding, not more."""
    item = text_item("a", embedded.tokenizer((EMBEDDED / "README.md").read_text())["input_ids"][:200])
    rows = []
    for threads in (1, 2):
        batch = bh.ScoredBatch(embedded.model, [item])
        with bh.computing_with(threads), bh.patched_routing(embedded.model, FLAT) as recorder:
            batch.score_own(recorder)
        rows += batch.own_rows
    assert rows[0]["nll"] == pytest.approx(rows[1]["nll"], abs=1e-4)
    assert rows[0]["avg_experts_per_token"] == pytest.approx(rows[1]["avg_experts_per_token"], abs=0.02)


# ---------------------------------------------------------------------------------------------------------
# 25. One decision, one place: what decides among scored texts, what is said of them, folders with tasks
# ---------------------------------------------------------------------------------------------------------

# References of prompts beside a text


@pytest.mark.parametrize(
    ("sources", "deciding"),
    [(["reference", "text"], {"text"}), (["reference"], {"reference"}), ([""], {""}), ([], set())],
)
def test_text_decides_where_there_is_text(sources, deciding):
    """Else the references, or what an older table has without telling them apart."""
    assert bh.deciding_sources(sources) == deciding
    scores = pd.DataFrame({"source": sources})
    assert set(bh.deciding_scores(scores)["source"]) == deciding


def test_without_text_the_kinds_of_tokens_are_those_of_references(tmp_path):
    logged_run(tmp_path, texts=[])
    table = bh.read_table(bh.TOKEN_KINDS, tmp_path)
    scored = table[table["kind"] == "score"]
    assert set(scored["document"]) == {prompt["id"] for prompt in SCORED_PROMPTS}


@pytest.mark.parametrize("windows", [LOGGED_WINDOWS[:2], []])
def test_nulls_are_diagnosed_on_what_decides(windows, mock_model, tmp_path, monkeypatch):
    """On the text alone; without text on the references."""
    seen = []
    monkeypatch.setattr(bh.BHExperimentRunner, "diagnose", lambda runner, texts, run_id: seen.extend(texts))
    runner = mock_runner(mock_model, tmp_path)
    runner.run_full_experiment_suite(TOP_8 | {"bh": EMPIRICAL}, SCORED_PROMPTS[:1], 1, texts=windows)
    expected = [text.id for text in windows] or [SCORED_PROMPTS[0]["id"]]
    assert [text.id for text in seen] == expected


# What is said of the text by default


def said_by_main(words, caplog):
    """What the log says of text in a run of these words."""
    caplog.clear()
    with caplog.at_level("INFO"):
        assert bh.main(words) == 0
    return [message for message in caplog.messages if "of text are scored" in message or "no text" in message]


def test_text_by_default_is_spoken_of_where_it_is_scored(tiny_folder, tmp_path, monkeypatch, caplog):
    """Once, though calibration takes what is left of it as well; not where it is only calibrated on."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", SCORED_PROMPTS[:1])
    monkeypatch.setattr(bh, "MANY_PARAMETERS", 1)
    monkeypatch.setattr(bh, "MAX_WINDOWS_ON_CPU", 1)
    own = tmp_path / "own.txt"
    own.write_text("a few words of text, " * 20)
    run = ["--model", str(tiny_folder), "--configs", "bh_loose", "--max-tokens", "1"]
    assert len(said_by_main([*run, "--output", str(tmp_path / "default")], caplog)) == 1
    assert said_by_main([*run, "--output", str(tmp_path / "own"), "--text", str(own)], caplog) == []


# The log


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_writes_the_log(rank, tiny_folder, tmp_path, monkeypatch):
    """Also while knobs are matched."""

    class Started(bh.Processes):
        def __init__(self, use_cpu):
            super().__init__(use_cpu)
            self.rank = rank

    monkeypatch.setattr(bh, "Processes", Started)
    monkeypatch.setattr(bh.BHExperimentRunner, "run_full_experiment_suite", lambda *args, **options: None)
    options = ["--configs", "bh_loose", "--match-experts", 2.5, "--calibration-text", "sampled"]
    assert cli(tiny_folder, tmp_path, *options, "--text", "none") == 0
    assert (tmp_path / bh.CALIBRATION_FILE).exists()
    assert (tmp_path / bh.LOG_FILE).exists() == (rank == 0)


# Throughput with stand-ins


def test_stand_ins_are_counted_for_a_single_text_only(mock_model, tmp_path):
    """As the report says: their share of an expert at batch size 1, nothing at a larger one."""
    configs = TOP_8 | {"bh": {**FLAT, "stand_in": "mean"}}
    runner = mock_runner(mock_model, tmp_path)
    frame = runner.run_full_experiment_suite(configs, PROMPTS[:2], 3, generate_batch=2)
    entries = bh.analyze_results(frame, tmp_path)["throughput"]
    cost = runner.cost
    of_bh = {entry["batch_size"]: entry for entry in entries if entry["configuration"] == "bh"}
    without = {
        size: cost.shared_bytes + entry["distinct_experts"] * cost.expert_bytes.sum()
        for size, entry in of_bh.items()
    }
    assert of_bh[2]["weight_bytes"] == pytest.approx(without[2])
    assert of_bh[1]["weight_bytes"] > 1.001 * without[1]


# Folders side by side: with tasks, and older ones


def two_folders_of_tasks(folder, change, documents=20):
    """Two folders of one invented run of tasks, the second with its scores changed."""
    tasks = invented_tasks(("topk_8", "bh_strict"), documents)
    for name, frame in (("first", tasks), ("second", change(tasks.copy()))):
        (folder / name).mkdir()
        write_results(dataclasses.replace(bh.EMPTY_RESULTS, tasks=frame), folder / name)
    return [folder / "first", folder / "second"]


def more_bits(tasks):
    """More bits a byte for bh_strict, by `shifts`."""
    rows = (tasks["config_name"] == "bh_strict") & (tasks["metric"] == "bits_per_byte")
    tasks.loc[rows, "score"] += shifts(rows.sum())
    return tasks


def test_tasks_of_folders_are_set_side_by_side(tmp_path):
    """Each folder's own tests of its tasks; between folders the test of every comparison, task by task."""
    folders = two_folders_of_tasks(tmp_path, more_bits)
    comparison = bh.compare_results(folders, tmp_path / "out")
    for letter, folder in zip("AB", folders, strict=True):
        own = bh.compare_tasks(bh.Results.read(folder).tasks, "topk_8", {})
        shown = [entry for entry in comparison["tasks"] if entry["folder"] == letter]
        assert [{key: entry[key] for key in row} for entry, row in zip(shown, own, strict=True)] == own
    order = [(entry["task"], entry["configuration"], entry["folder"]) for entry in comparison["tasks"]]
    assert order == list(itertools.product(("choice", "words_of_text"), ("topk_8", "bh_strict"), "AB"))
    assert [entry["higher_is_better"] for entry in comparison["tasks"]] == [True] * 4 + [False] * 4
    tests = {(test["configuration"], test["title"]): test for test in comparison["tests"]}
    titles = ("acc of choice", "bits_per_byte of words_of_text", bh.BETWEEN["share_of_own"])
    assert set(tests) == set(itertools.product(("topk_8", "bh_strict"), titles))
    test = tests["bh_strict", "bits_per_byte of words_of_text"]
    expected = bh.paired_test(shifts(20))
    assert (test["n_pairs"], test["quantity"], test["significant"]) == (20, "task_score", True)
    for key in ("mean_difference", "p_value", "ci95_low"):
        assert test[key] == pytest.approx(expected[key], rel=1e-9)
    assert tests["bh_strict", "acc of choice"]["reason"] == "nothing differs"
    assert comparison["pair_notes"] == ["B and A are paired on 40 documents that both measured"]
    text = (tmp_path / "out" / "COMPARISON.md").read_text(encoding="utf-8")
    assert all(len(widths) == 1 for widths in table_widths(text))
    mean = comparison["tasks"][-1]["mean"]
    assert re.search(
        rf"words\\_of\\_text \| `bh_strict` \| B \| bits\\_per\\_byte \| low \| {mean:.4f}", text
    )
    said = bh.terminal_comparison(comparison)
    assert max(map(len, said.splitlines())) <= bh.TERMINAL_COLUMNS
    assert re.search(rf"bh_strict\s+B\s.*{mean:.3f}", said)


@pytest.mark.parametrize(
    ("change", "note"),
    [(lambda tasks: tasks.assign(input_hash="y"), "documents of the same name hold other text"),
     (lambda tasks: tasks.assign(document="x" + tasks["document"]), "no document has the same name")],
)  # fmt: skip
def test_tasks_that_asked_something_else_are_not_paired(change, note, tmp_path):
    """Other examples in the context, say: another hash of what was asked."""
    comparison = bh.compare_results(two_folders_of_tasks(tmp_path, change, 4), tmp_path / "out")
    assert comparison["tests"] == []
    assert note in comparison["pair_notes"][0]
    assert len(comparison["tasks"]) == 8


def test_a_folder_of_text_and_one_of_tasks_stand_beside_each_other(tmp_path):
    text, _ = two_folders(tmp_path, prompts=4)
    (tmp_path / "tasks").mkdir()
    _, tasks = two_folders_of_tasks(tmp_path / "tasks", more_bits, 4)
    comparison = bh.compare_results([text, tasks], tmp_path / "out")
    assert {entry["folder"] for entry in comparison["tasks"]} == {"B"}
    assert comparison["pair_notes"] == ["B and A are not paired: no prompt has the same name in both"]


def test_tasks_without_a_score_of_documents_are_left_out(tmp_path):
    folders = two_folders_of_tasks(tmp_path, lambda tasks: tasks.assign(metric="", score=math.nan), 4)
    comparison = bh.compare_results(folders, tmp_path / "out")
    assert {entry["folder"] for entry in comparison["tasks"]} == {"A"}
    assert {test["quantity"] for test in comparison["tests"]} == {"share_of_own"}


def test_experts_that_ran_stand_for_the_effective_ones_of_an_older_folder(tmp_path):
    """Its tables lack those: it is compared as its own report does, by what ran."""
    first, second = two_folders(tmp_path)
    results = bh.Results.read(second)
    older = changed(results, lambda frame: frame.assign(effective_experts=math.nan))
    write_results(dataclasses.replace(older, scores=older.scores[:0]), second)
    write_results(dataclasses.replace(results, scores=results.scores[:0]), first)
    comparison = bh.compare_results([first, second], tmp_path / "out")
    shares = {
        (row["configuration"], row["folder"]): row["share_of_own"] for row in comparison["configurations"]
    }
    assert shares["bh_strict", "A"] == shares["bh_strict", "B"] < 1
    tests = {test["configuration"]: test for test in comparison["tests"]}
    assert (tests["bh_strict"]["n_pairs"], tests["bh_strict"]["mean_difference"]) == (12, 0)


# ---------------------------------------------------------------------------------------------------------
# 26. Data sets that would fill the memory
# ---------------------------------------------------------------------------------------------------------


READ_ROWS = """
import re, sys
import datasets.packaged_modules.parquet.parquet
sys.path.insert(0, {here!r})
import run_bh_experiments as bh

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

before = peak()
for path in sys.argv[1:]:
    try:
        print(len(bh.load_dataset_prompts(path, limit=5)), "prompts", end="; ")
    except bh.UserError as error:
        print(error, end="; ")
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_few_rows_take_little_memory(tmp_path):
    """The first 5 rows of three files: a small one of parquet, whose one row group unfolds to 600 MB; 200 MB
    of CSV; and a compressed CSV whose second row is a cell of 200,000 lines, 100 MB."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "folder"
    folder.mkdir()
    paths = [tmp_path / "rows.parquet", tmp_path / "rows.csv", folder / "train.csv.gz"]
    texts = pyarrow.DictionaryArray.from_arrays(np.zeros(600, dtype=np.int32), ["b" * 1_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), paths[0], compression="zstd")
    with paths[1].open("wb") as file:
        file.write(b"text\n")
        for _ in range(200):
            file.write(b"b" * 1_000_000 + b"\n")
    with gzip.open(paths[2], "wb", compresslevel=1) as file:
        file.write(b'text\nfirst\n"' + (b"a" * 499 + b"\n") * 200_000 + b'"\n')
    assert max(paths[0].stat().st_size, paths[2].stat().st_size) < 2_000_000
    code = READ_ROWS.format(here=str(HERE))
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, (*paths[:2], folder))],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [line.rpartition("; ")[0] for line in process.stdout.splitlines()]
    too_long = f"--dataset {paths[2]}: a row has more than 10,000,000 characters"
    assert said == ["5 prompts", "5 prompts", too_long]
    megabytes = [int(line.rpartition("; ")[2]) for line in process.stdout.splitlines()]
    assert max(megabytes) < 280, megabytes


@pytest.mark.parametrize("length", [10, 2_000])
def test_rows_of_csv_read_together(length, tmp_path, monkeypatch):
    """As many as the datasets library takes, or as hold so many characters; it makes no difference."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(bh, "CSV_CHARACTERS", 20_000)
    rows = [f"{number} {'a' * length}" for number in range(60)]
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "\n".join(rows) + "\n")
    assert bh._csv_rows("--dataset", path) == (bh.CSV_ROWS if length == 10 else 9)
    assert [prompt["text"] for prompt in bh.load_dataset_prompts(str(path), limit=50)] == rows[:50]


def test_long_row_in_an_archive(tmp_path, monkeypatch):
    """It is refused before it is unfolded, in whichever of its files; and a damaged archive is one line."""
    pytest.importorskip("datasets")
    import zipfile

    monkeypatch.setattr(bh, "MAX_CHARACTERS", 100)
    path = tmp_path / "rows" / "train.zip"
    path.parent.mkdir()
    for last, message in ((b"b" * 50, None), (b"b" * 101, f"{path}: a row has more than 100 characters")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", '{"text": "short"}\n')
            archive.writestr("b.jsonl", b'{"text": "' + last + b'"}\n')
        if message is None:
            assert len(bh.load_dataset_prompts(str(path.parent))) == 2
        else:
            with pytest.raises(bh.UserError, match=re.escape(message)):
                bh.load_dataset_prompts(str(path.parent))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(bh.UserError, match="cannot be read"):
        bh.load_dataset_prompts(str(path.parent))


def test_rows_of_compressed_csv_that_are_no_row_too_long(tmp_path, monkeypatch):
    """Many lines in cells, a quote in the middle of one, odd line ends: short rows, however many; and the
    csv module is as it was."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(bh, "MAX_CHARACTERS", 100)
    lines = ["text", '"several', 'lines"', 'a 5" disk', *["short"] * 50, '"a ""quote"""', "with\rand\0"]
    with gzip.open(tmp_path / "train.csv.gz", "wt", newline="") as file:
        file.write("\n".join(lines) + "\n")
    before = csv.field_size_limit()
    prompts = bh.load_dataset_prompts(str(tmp_path), limit=53)
    assert [prompt["text"] for prompt in prompts[:3]] == ["several\nlines", 'a 5" disk', "short"]
    assert prompts[52]["text"] == 'a "quote"'
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("seed", [None, 0])
def test_rows_that_would_fill_the_memory(seed, tmp_path, monkeypatch):
    """Refused with the number of rows that fit; rows drawn at random are held in a buffer besides."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(bh, "MAX_ROWS_CHARACTERS", 999)
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"text": "b" * 200, "more": {"of it": ["c" * 40, "d" * 10]}})
    path.write_text(f"{row}\n" * 20)
    way_out = "--limit 3 takes fewer" if seed is None else "--random-rows holds 10,000 rows at a time"
    with pytest.raises(bh.UserError, match=f"its texts up to row 3 hold more than 999 characters; {way_out}"):
        bh.load_dataset_prompts(str(path), limit=10, random_seed=seed)
    assert len(bh.load_dataset_prompts(str(path), limit=3)) == 3
    with pytest.raises(bh.UserError, match="--text .*its texts up to row 3"):
        bh.load_text_documents([path])


def test_parquet_that_can_only_be_read_in_long_parts(tmp_path, monkeypatch):
    """Refused with the way out; the same rows in smaller groups are read, and a group nobody asks for is not
    looked at."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(bh, "MAX_PAGE_BYTES", 100_000)
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["short"] * 40 + [f"{n} " * 5000 for n in range(40)]})
    pyarrow.parquet.write_table(table, path, row_group_size=40)
    assert len(bh.load_dataset_prompts(str(path), limit=40)) == 40
    way_out = "more than 100,000; write it with fewer rows in a row group"
    with pytest.raises(bh.UserError, match=f"40 of its rows can only be read together, .*{way_out}"):
        bh.load_dataset_prompts(str(path), limit=41)
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    assert len(bh.load_dataset_prompts(str(path), limit=80)) == 80


def test_local_parquet_is_read_as_the_datasets_library_reads_it(tmp_path, monkeypatch):
    """Row for row, in all its files and splits, drawn at random too."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setattr(Parquet, "SLEEP_ON_THREADS_SHUTDOWNS", False, raising=False)  # 5 seconds

    for name, first in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", 60),
        ("test-00000-of-00001", 120),
    ):
        rows = range(first, first + 60)
        table = pyarrow.table({
            "number": list(rows),
            "text": [f"row {row}" if row % 7 else None for row in rows],
            "topic": pyarrow.array([f"t{row % 3}" for row in rows]).dictionary_encode(),
            "more": [{"list": [row, None], "word": "w"} for row in rows],
        })  # fmt: skip
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=25)
    theirs = datasets.load_dataset(str(tmp_path), streaming=True)
    for split in ("train", "test"):
        ours = bh._dataset_rows("--dataset", str(tmp_path), split, 1000)[1]
        assert ours == list(enumerate(theirs[split]))
    drawn = bh._dataset_rows("--dataset", str(tmp_path), "train", 1000, random_seed=3)[1]
    expected = (
        theirs["train"].map(lambda row, n: {"n": n}, with_indices=True).shuffle(seed=3, buffer_size=10_000)
    )
    assert [number for number, _ in drawn] == [row["n"] for row in expected]


# ---------------------------------------------------------------------------------------------------------
# 27. Files of versions before and after this one
# ---------------------------------------------------------------------------------------------------------


def of_another_version(path, table):
    """Take a column from a table that a run left, and give it one that nobody knows; returns its name."""
    lacking = [column.name for column in table.columns if column.metric is None and column.kind is str][-1]
    is_parquet = path.suffix == ".parquet"
    frame = pd.read_parquet(path) if is_parquet else pd.read_csv(path, keep_default_na=False)
    frame = frame.drop(columns=lacking).assign(of_tomorrow="=1+1")
    if is_parquet:
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return lacking


@pytest.fixture(scope="module")
def small_log(tmp_path_factory):
    """The folder of a small run with a token log."""
    folder = tmp_path_factory.mktemp("small-log")
    run_suite(small_mock(), folder, SMALL, SCORED_PROMPTS, token_log=True)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "csv.gz"])
def test_token_log_of_another_version(kind, small_log, tmp_path):
    """What it lacks is empty, and what is foreign goes, in both formats."""
    whole = bh.read_token_log(small_log)
    path = tmp_path / f"token_log.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        whole.to_parquet(path)
    else:
        whole.to_csv(path, index=False)
    lacking = of_another_version(path, bh.TOKEN_LOG)
    read = bh.read_token_log(tmp_path)
    assert list(read.columns) == bh.TOKEN_LOG.names
    assert (read[lacking] == "").all()
    expected = whole.assign(**{lacking: ""})
    pd.testing.assert_frame_equal(read, expected, check_dtype=False)


def test_report_and_comparison_of_another_version(small_log, tmp_path, monkeypatch):
    """Tables that a script of another day wrote are reported on and compared; they stay as they are."""
    monkeypatch.setattr(bh, "PLOTS", {})
    folder = tmp_path / "run"
    shutil.copytree(small_log, folder)
    tables = (bh.GENERATION, bh.SCORES, bh.LAYER_STATISTICS, bh.EXPERT_USAGE, bh.EXPERT_COUNTS,
              bh.TOKEN_COUNTS, bh.TOKEN_KINDS)  # fmt: skip
    paths = [folder / table.file for table in tables]
    for path, table in zip(paths, tables, strict=True):
        of_another_version(path, table)
    before = [path.read_bytes() for path in paths]
    assert bh.main(["--analyze-only", "--output", str(folder)]) == 0
    assert bh.main(["compare", str(small_log), str(folder), "--output", str(tmp_path / "out")]) == 0
    assert [path.read_bytes() for path in paths] == before
    pages = [folder / "REPORT.md", folder / "report.html", tmp_path / "out" / "COMPARISON.md"]
    for page in pages:
        assert "of_tomorrow" not in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# 28. What is compared with what, and of how many independent units
# ---------------------------------------------------------------------------------------------------------


def undocumented(scores):
    """Scores as an older script left them, and the same ones with every item as its own document."""
    return scores.assign(document=""), scores.assign(document=scores["item_id"])


def everything_tested(scores):
    """All that the analysis tests of scored text."""
    results = bh.Results(bh.EMPTY_RESULTS.generation, scores, bh.EMPTY_RESULTS.tasks)
    configs = bh.configurations(results)
    return {
        "verdicts": bh.quality_verdicts(scores, configs, "topk_8"),
        "shuffles": bh.shuffle_effects(scores, configs),
        "tests": bh.compare_with_baseline(results, "topk_8"),
        "field": bh.compare_field(scores, configs, 8),
        "noise": bh.noise_floor(results),
    }


def test_items_that_name_no_document_are_documents_of_their_own():
    """Else all windows of an older table would be one unit, with which nothing can be tested."""
    scores, _ = simulated_field(3, {"threshold": 0.01, "min_p": 0.0}, 12, 1)
    is_twin = scores["config_name"] == "threshold_0"
    config = json.loads(scores.loc[is_twin, "configuration"].iloc[0]) | {"shuffle": True}
    twin = scores[is_twin].assign(config_name="shuffled", configuration=json.dumps(config))
    scores = more_rows(scores, twin.assign(nll=twin["nll"] + np.linspace(0, 0.1, len(twin))))
    is_own = scores["config_name"] == "topk_8"
    scores["repeat_nll"] = (scores["nll"] + np.linspace(0, 1e-3, len(scores))).where(is_own)
    older, alone = map(everything_tested, undocumented(scores))
    assert older == alone
    assert older["field"]["n_units"] == older["noise"]["nll"]["n_units"] == 12
    assert (
        older["shuffles"]["shuffled"]["n_units"]
        == older["tests"]["min_p_0"]["avg_experts_per_token"]["n_units"]
        == 12
    )


def test_folders_whose_items_name_no_document_are_compared_item_by_item(tmp_path):
    def compared(place):
        folder = tmp_path / str(place)
        folder.mkdir()
        folders = two_folders(folder, shifted)
        for path in folders:
            results = bh.Results.read(path)
            write_results(dataclasses.replace(results, scores=undocumented(results.scores)[place]), path)
        return bh.compare_results(folders, folder / "out")

    older, alone = compared(0), compared(1)
    assert older["tests"] == alone["tests"]
    assert older["tests"][0]["n_units"] == 12
    assert [row["n_documents"] for row in older["folders"]] == [12, 12]


def test_a_score_beyond_any_float_has_no_perplexity_and_ends_nothing(tmp_path):
    """A broken static point may score hundreds of nats: its NLL stands, exp of it does not."""
    assert bh.perplexity(None) is None
    assert bh.perplexity(710.0) is None
    assert bh.perplexity(0.0) == 1.0
    frame = simulated(2)
    frame["nll"] += 800.0 * (frame["config_name"] == "topk_4")
    row = verdicts_of(frame)["topk_4"]
    assert (row["perplexity"], row["verdict"]) == (None, None)
    assert row["delta_to_baseline"] == pytest.approx(800, abs=0.1)
    assert verdicts_of(frame)["bh"]["perplexity"] > 1


def test_what_cannot_be_compared_has_no_verdict_anywhere():
    """Undecided is the word for a test that finds nothing, not for none."""
    frame = simulated(4)
    frame = more_rows(frame, copies_of_bh(frame, "bh_high").assign(avg_experts_per_token=9.0))
    verdicts = verdicts_of(frame)
    analysis = {"verdict": verdicts, "configurations": configs_of(frame), "baseline": "topk_5"}
    shown = {row["configuration"]: row["verdict"] for row in bh.quality_rows(analysis)}
    assert shown == {"topk_4": "static", "topk_5": "static", "bh": "undecided", "bh_high": None}
    assert bh.reason_sentences(analysis)[0].startswith("`bh_high` has no test at equal compute: 9.00 experts")
    drawn = bh.verdict_frame(analysis).set_index("config_name")
    assert drawn["is_static"].to_dict() == {"topk_4": True, "topk_5": True, "bh": False, "bh_high": False}
    ax = bh.plot_delta_at_equal_compute(bh.verdict_frame(analysis))
    assert "not comparable" in [text.get_text() for text in ax.texts]
    bh.plt.close("all")


def test_what_is_identical_to_the_baseline_is_equivalent_by_construction():
    """It has no p-value, and does not make other claims easier: the adjustment is over what was tested."""
    frame = simulated(2)
    own = frame[frame["config_name"] == "topk_5"]
    same = copies_of_bh(frame, "bh_wide", own["nll"].to_numpy()).assign(avg_experts_per_token=5.0)
    moved = same.assign(config_name="bh_moved", nll=same["nll"] + 0.02)
    verdicts = verdicts_of(more_rows(frame, same, moved))
    before = verdicts_of(frame)
    assert verdicts["bh_wide"]["equivalent_to_baseline"] is True
    assert verdicts["bh_wide"]["equivalence_p_value"] is None
    assert verdicts["bh_moved"]["equivalent_to_baseline"] is False  # by 2 % everywhere
    assert verdicts["topk_5"]["equivalent_to_baseline"] is None  # the baseline itself
    for name in ("topk_4", "bh"):
        key = "equivalence_p_value_adjusted"
        assert verdicts[name][key] == before[name][key]
    analysis = {"verdict": verdicts, "baseline": "topk_5", "quality_margin": bh.QUALITY_MARGIN}
    assert any("`bh_wide`" in sentence for sentence in bh.quality_sentences(analysis))


def test_fewest_experts_and_verdicts_call_the_same_thing_equivalent():
    """A ladder that is the model's own routing at its top is equivalent there, as the verdict says."""
    scores, configs = simulated_field(2, {"threshold": 0.0, "min_p": 0.0}, documents=30)
    own = scores[scores["config_name"] == "topk_8"]
    for name in ("threshold_3", "min_p_3"):
        top = scores["config_name"] == name
        for column in ("nll", "avg_experts_per_token", "effective_experts"):
            scores.loc[top, column] = own[column].to_numpy()
    verdicts = bh.quality_verdicts(scores, configs, "topk_8")
    assert verdicts["threshold_3"]["equivalent_to_baseline"] is True
    ladders = {ladder["label"]: ladder for ladder in bh.compare_field(scores, configs, 8)["ladders"]}
    assert ladders["threshold"]["within"]["1 %"]["fewest"] <= 8.0


def lone(scores, name, items, **fields):
    """The first few scores of a configuration under another name, with other fields."""
    rows = scores[scores["config_name"] == name].head(items)
    config = json.loads(rows["configuration"].iloc[0]) | fields
    return rows.assign(config_name="lone", configuration=json.dumps(config))


def field_of(scores):
    return bh.compare_field(scores, configs_of(scores), 8)


def test_a_configuration_in_no_ladder_has_no_say_in_what_rules_are_compared_on():
    scores, _ = simulated_field(3, {"threshold": 0.01, "min_p": 0.0}, 12, 2)
    expected = field_of(scores)
    assert (expected["n_items"], expected["left_out"]) == (24, {})
    assert field_of(more_rows(scores, lone(scores, "threshold_0", 1, shuffle=True))) == expected


def test_an_unfinished_member_is_left_out_and_named():
    """A few failed items are left out under all members, one that has hardly begun is left out itself."""
    scores, _ = simulated_field(3, {"threshold": 0.01, "min_p": 0.0}, 12, 2)
    knob = bh.RULES["threshold"].knob
    begun = lone(scores, "threshold_0", 1, **{knob.name: knob.default * 1.5})
    field = field_of(more_rows(scores, begun))
    assert (field["n_items"], field["n_own_items"], field["left_out"]) == (24, 24, {"lone": 1})
    assert field["pairs"] == field_of(scores)["pairs"]
    (sentence,) = bh.left_out_sentences(field)
    assert sentence.startswith("`lone` is left out: it has only 1 of the 24 items")
    is_failed = (scores["config_name"] == "min_p_1") & (scores["item_id"] == "d0:0")
    field = field_of(scores.assign(status=np.where(is_failed, "error", "ok")))
    assert (field["n_items"], field["left_out"]) == (23, {})
    assert bh.left_out_sentences(field) == ["Compared are the 23 of 24 items that all the others have."]


def test_a_configuration_that_failed_wholly_changes_no_label_in_the_plot():
    """Labels say what differs among what was scored: the plot takes the members from the comparison."""
    scores, _ = simulated_field(3, {"threshold": -0.02, "min_p": 0.0}, 20, 2)
    failed = lone(scores, "threshold_0", 40, max_k=16).assign(status="error", nll=math.nan)
    scores = more_rows(scores, failed)
    configs = configs_of(scores)
    analysis = {"field": field_of(scores), "configurations": configs, "baseline": "topk_8",
                "verdict": bh.quality_verdicts(scores, configs, "topk_8")}  # fmt: skip
    frame = bh.verdict_frame(bh.strict_json(analysis))
    unbeaten = frame.loc[frame["is_unbeaten"], "config_name"]
    assert {f"threshold_{place}" for place in range(4)} <= set(unbeaten)
    assert "lone" not in set(unbeaten)


def test_rules_are_shown_against_plain_static_topk_whatever_stands_first():
    scores, _ = simulated_field(3, {"threshold": 0.01, "min_p": 0.0}, 12, 2)
    static = scores[scores["config_name"].str.startswith("topk_")]
    cells = static["configuration"].map(lambda cell: json.dumps(json.loads(cell) | {"renormalize": "none"}))
    scaled = static.assign(
        config_name="scaled_" + static["config_name"], configuration=cells, nll=static["nll"] + 1
    )
    field = field_of(more_rows(scaled, scores))
    at = {ladder["label"]: ladder["at"][3]["to_static"] for ladder in field["ladders"]}
    assert at["topk, none"] == pytest.approx(1, abs=0.01)
    assert at["threshold, model"] == pytest.approx(0.01, abs=0.01)


def test_units_of_a_difference_are_the_difference_of_units():
    random = np.random.default_rng(0)
    items = [f"w{i}" for i in range(60)]
    documents = pd.Series([f"d{i // 7}" for i in range(60)], index=items)
    one, other = (pd.Series(random.normal(3, 1, 60), index=items) for _ in range(2))
    apart = bh.item_units(one, documents) - bh.item_units(other, documents)
    assert apart.to_numpy() == pytest.approx(bh.item_units(one - other, documents).to_numpy(), abs=1e-14)


@pytest.mark.parametrize("cell", ["oops", "[1]", '{"method": ["bh"]}'])
def test_a_damaged_configuration_is_named_with_its_table(cell, tmp_path):
    results = invented_results(("topk_8", "bh_strict"), 4)
    is_one = results.scores["config_name"] == "topk_4"
    scores = results.scores.assign(configuration=results.scores["configuration"].mask(is_one, cell))
    with pytest.raises(
        bh.UserError, match="text_scores.csv: configuration 'topk_4' is described by '"
    ) as error:
        analysis_of(dataclasses.replace(results, scores=scores), tmp_path)
    assert "\n" not in str(error.value)


def test_where_all_generation_failed_tests_are_of_the_text_and_not_of_references_too(tmp_path):
    results = invented_results(("topk_8", "bh_strict"), 6)
    references = results.scores.assign(
        source="reference", item_id="r" + results.scores["item_id"], document="r" + results.scores["document"]
    )
    scores = more_rows(results.scores.assign(source="text"), references)
    failed = results.generation.assign(status="error")
    analysis = analysis_of(bh.Results(failed, scores, results.tasks), tmp_path)
    tests = analysis["statistical_tests"]["bh_strict"]
    assert {test["n_pairs"] for test in tests.values()} == {6}


def test_documents_of_tasks_that_were_asked_something_else_are_not_paired():
    scores, configs = simulated_field(0, {"threshold": -0.03, "min_p": 0.0}, 40, 1, (2.5, 3.5, 4.5))
    tasks = scores.assign(
        task="quiz", metric="bits_per_byte", score=scores["nll"], document=scores["item_id"]
    )
    tasks["input_hash"] = "old " + tasks["document"]
    edited = (tasks["config_name"] == "min_p_1") & tasks["document"].isin(["d0:0", "d1:0", "d2:0"])
    tasks.loc[edited, "input_hash"] = "new"
    tasks = bh.fit_table(tasks, bh.TASKS)
    entries = bh.compare_tasks(tasks, "topk_8", {})
    paired = {
        entry["configuration"]: (entry.get("n_pairs"), entry.get("n_other_inputs")) for entry in entries
    }
    assert paired["min_p_1"] == (37, 3)
    assert paired["min_p_0"] == (40, 0)
    (sentence,) = bh.other_input_sentences({"tasks": entries, "baseline": "topk_8"})
    assert sentence == "`min_p_1` on quiz: 3 documents left out, whose input was not `topk_8`'s."
    field = bh.compare_field_on_tasks(tasks, configs, 8, {})["quiz"]
    assert (field["n_other_inputs"], field["n_items"], field["left_out"]) == (3, 40, {"min_p_1": 37})
    assert "3 scores of documents whose input was not" in bh.left_out_sentences(field)[-1]
    older = bh.compare_tasks(tasks.assign(input_hash=""), "topk_8", {})
    assert {entry["n_pairs"] for entry in older if "n_pairs" in entry} == {40}


# ---------------------------------------------------------------------------------------------------------
# 29. Tables by layer, figures and report: what a second reading found
# ---------------------------------------------------------------------------------------------------------

# Do categories use different experts?


def test_categories_that_swap_their_names_are_a_tie():
    """Of the 90 ways to give six documents three categories, two each, 6 are the measured one with other
    names: of 199 permutations drawn, 13. No difference is so large that p is smaller."""
    random = np.random.default_rng(0)
    p_values = []
    for _ in range(20):
        documents = bh.FirstDocuments()
        for n in range(6):
            use = random.integers(1, 50, (2, 5))
            use[:, n // 2] += 100
            documents.add("abc"[n // 2], str(n), use)
        p_values += documents.p_values().tolist()
    assert set(p_values) == {(1 + 13) / 200}


def used(use):
    """What the routers did, as far as tables of categories ask: the use of experts [L, E]."""
    layers = tuple(SimpleNamespace(index=index, own_k=2) for index in range(len(use)))
    counts = np.zeros((len(use), use.shape[1] + 1), dtype=np.int64)
    counts[:, 2] = use.sum(1) // 2
    config = bh.resolve_config("topk_2", {"method": "topk", "k": 2})
    return bh.RoutingStatistics(counts, use, counts[:, 0], counts[:, 2], config, layers)


def layer_tables(*categories):
    """Two layers under one configuration; categories: name, number of documents, the expert they favour."""
    random = np.random.default_rng(0)
    tables = bh.LayerTables([SimpleNamespace(index=index, name=f"l{index}") for index in range(2)], "run")
    for category, number, favoured in categories:
        for n in range(number):
            use = random.integers(1, 9, (2, 4))
            use[:, favoured] += 9
            tables.add("a", "task", category, f"{category}:{n}", used(use))
    return tables


def test_a_long_category_before_another_leaves_it_room(monkeypatch):
    """Tasks come one after the other: of each some documents are kept."""
    monkeypatch.setattr(bh, "DOCUMENTS_OF_CATEGORY", 30)
    rows = list(layer_tables(("long", 70, 0), ("other", 40, 1), ("short", 2, 2))._layer_rows())
    assert [row["category_p_value"] for row in rows] == [0.005, 0.005]
    assert all(row["category_divergence_bits"] > 0.1 for row in rows)
    rows = list(layer_tables(("long", 70, 0), ("single", 1, 1))._layer_rows())
    assert [row["category_p_value"] for row in rows] == [None, None]


def test_divergence_is_of_all_documents(monkeypatch):
    """As `expert_usage.csv` has them; the permutation test alone is of the first ones."""
    tables = layer_tables(("x", 25, 0), ("y", 9, 1))
    shares = pd.DataFrame(tables._usage_rows()).set_index(["layer", "category"])
    expected = []
    for layer in range(2):
        x, y = (shares.loc[(layer, category), "share"].to_numpy() for category in "xy")
        expected.append(distance.jensenshannon(x, y, base=2) ** 2)
    for quota in (200, 3):
        monkeypatch.setattr(bh, "DOCUMENTS_OF_CATEGORY", quota)
        rows = layer_tables(("x", 25, 0), ("y", 9, 1))._layer_rows()
        assert [row["category_divergence_bits"] for row in rows] == pytest.approx(expected)


def test_documents_kept_for_the_permutation_test_are_few_and_small(monkeypatch):
    """The first of each category, in parts or whole; fewer the more categories there are, but always two."""
    monkeypatch.setattr(bh, "DOCUMENTS_OF_CATEGORY", 4)
    monkeypatch.setattr(bh.FirstDocuments, "MAX_DOCUMENTS", 9)
    documents = bh.FirstDocuments()
    use = np.full((1, 2), 200)
    kept = []
    for category in "abcdef":
        for n in (0, 1, 0, 2, 3, 4):
            documents.add(category, str(n), use)
        documents.add("a", "3", use)  # once it has gone it does not come back
        assert collections.Counter(category for category, _ in documents.use) == documents.num_kept
        kept.append(list(documents.num_kept.values()))
    assert kept == [[4], [4, 4], [3, 3, 3], [2] * 4, [2] * 5, [2] * 6]
    assert list(documents.use) == [(category, str(n)) for category in "abcdef" for n in range(2)]
    assert {key[1]: (total.dtype, total[0, 0]) for key, total in documents.use.items()} == {
        "0": (np.uint16, 400),
        "1": (np.uint8, 200),
    }
    assert documents.can_be_compared


# The report


FEW_UNITS = r"\(here as few as (\d+)\)"


@pytest.mark.parametrize(
    ("documents", "units", "told"),
    [(60, 12, ["12"]),  # of the shuffled counts alone: the tables say nothing of them
     (20, 12, ["20", "12", "20"]),  # the table of quality, the shuffled counts, the table of tests
     (20, 20, ["20", "20"])],  # once for quality and the shuffled counts, which are of the same
)  # fmt: skip
def test_few_units_are_told_of_the_table_they_are_in(documents, units, told, tmp_path):
    effect = a_test(n_units=units, mean_difference=0.03, unshuffled="bh_strict")
    results = invented_results(("topk_8", "bh_strict"), documents)
    report = report_of(results, tmp_path, shuffle_effects={"s": effect})
    assert re.findall(FEW_UNITS, report) == told
    shuffles = report.index("the counts of `bh_strict` given to other tokens")
    if documents > units:
        assert report.index(f"as few as {units})") > shuffles


def test_the_report_does_not_contradict_its_own_summary(tmp_path):
    """The same mean in every prompt says nothing of the tokens in it."""
    results = invented_results(("topk_8", "bh_strict"), 4)
    same_means = dataclasses.replace(results, generation=results.generation.assign(avg_experts_per_token=4.0))
    assert "does not adapt" not in report_of(same_means, tmp_path)


def test_the_summary_says_what_its_shares_are(tmp_path):
    """A mean over prompts: a short one counts like a long one."""
    results = invented_results(("topk_8", "bh_strict"), 2)
    is_bh = results.generation["config_name"] == "bh_strict"
    frame = results.generation
    frame.loc[is_bh, "floor_frac"] = [0.1, 0.4]
    frame.loc[is_bh, "num_output_tokens"] = [1, 1000]
    report = report_of(dataclasses.replace(results, generation=frame), tmp_path)
    assert "shares of the (token, layer) decisions of a prompt, a mean over prompts." in report
    assert re.search(r"\| `bh_strict` \| .* \| 25\.0% \|", sections_of(report)["Summary by configuration"])


def test_a_report_reads_the_measured_tables_once(tmp_path, monkeypatch):
    """They are large: analysis, plots, report and view share what was read."""
    only_plots(monkeypatch, "expert_counts")
    results = write_run(tmp_path, ("topk_8", "bh_strict"), 3)
    read = collections.Counter()
    read_csv = bh.read_csv

    def counting(path, columns):
        read[path.name] += 1
        return read_csv(path, columns)

    monkeypatch.setattr(bh, "read_csv", counting)
    bh.write_report(results.generation, tmp_path)
    tables = (bh.GENERATION, bh.SCORES, bh.TASKS)
    assert [read[table.file] for table in tables] == [1, 1, 1]


# Some configurations of a folder


def test_plots_of_some_configurations_of_a_folder(tmp_path, monkeypatch):
    """Also where nothing was scored: the tables by layer hold the others too."""
    results = dataclasses.replace(
        write_run(tmp_path, ("topk_8", "bh_strict", "bh_loose"), 3, tasks=False),
        scores=bh.EMPTY_RESULTS.scores,
    )
    write_results(results, tmp_path)
    some = results.generation[results.generation["config_name"].isin(["topk_8", "bh_strict"])]
    data = bh.plot_data(bh.results_beside(some, tmp_path), bh.analyze_results(some, tmp_path), tmp_path)
    for frame in (data.layers, data.usage, data.counts):
        assert set(frame["config_name"]) == {"topk_8", "bh_strict"}
        assert frame["configuration"].map(json.loads).map(len).all()
    only_plots(monkeypatch, "expert_counts")
    assert [path.stem for path in bh.create_visualizations(some, tmp_path)] == ["expert_counts"]


# The view of many texts


class Counted(str):
    """A word that counts how often such words are compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_view_of_many_texts_looks_at_each_once(monkeypatch):
    """Which prompt of its category a prompt is, is not found by looking at all the others."""
    monkeypatch.setattr(bh, "VIEW_LIMIT", 1000)
    monkeypatch.setattr(Counted, "comparisons", 0)
    texts = [viewed(["a", "b"], f"p{n}", Counted(f"c{n % 2}")) for n in range(300)]
    page = bh.token_view_html(texts)
    assert Counted.comparisons < 5 * len(texts)
    shown = re.findall(r"<summary>c(\d): p(\d+)</summary>", page)
    assert shown[:2] == [("0", "0"), ("1", "1")]
    assert f"{len(texts) - len(shown)} more prompts are in" in page


# The answer on the terminal


def test_terminal_shows_experts_of_what_was_generated_alone(tmp_path):
    """Where a configuration's scores all failed, the experts of its texts stand in their place."""
    results = invented_results(("topk_8", "bh_strict"), 6)
    scores = results.scores
    failed = scores["config_name"] == "bh_strict"
    scores.loc[failed, ["nll", "avg_experts_per_token", "effective_experts"]] = math.nan
    scores.loc[failed, "status"] = "error"
    analysis = analysis_of(dataclasses.replace(results, scores=scores), tmp_path)
    assert analysis["verdict"]["bh_strict"]["mean_experts"] is None
    rows = bh.configuration_rows(analysis)
    generated = results.generation.set_index("config_name").loc["bh_strict", "avg_experts_per_token"]
    assert rows[1]["experts"] == pytest.approx(generated.mean())
    assert rows[1]["saved"] == pytest.approx(1 - generated.mean() / 8)


# ---------------------------------------------------------------------------------------------------------
# 30. What a run goes by: files of tasks, the latest clock, the mask under shuffle, memory, names
# ---------------------------------------------------------------------------------------------------------


# Files of tasks


def folder_of_task_files(folder):
    """Files as tasks have them, and what is no part of them."""
    files = {
        "mine.yaml": "task: mine",
        "data/rows.jsonl": '{"text": "a"}',
        "utils.py": "def f(): pass",
        ".hidden": "x",
        "__pycache__/utils.pyc": "x",
        "cache/rows.arrow": "x",
        "out/REPORT.md": "x",
        "out/experiment.log": "x",
        "elsewhere/checkpoints/latest_checkpoint.json": "x",
        "elsewhere/task_scores.csv": "x",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "counts"),
    [("mine.yaml", True), ("data/rows.jsonl", True), ("utils.py", True), ("new.csv", True),
     (".hidden", False), ("__pycache__/utils.pyc", False), ("cache/rows.arrow", False),
     ("out/REPORT.md", False), ("out/earlier_1", False), ("elsewhere/task_scores.csv", False)],
)  # fmt: skip
def test_files_that_tasks_can_use_are_part_of_a_run(name, counts, tmp_path, monkeypatch):
    """Code and data too, and none that a run or a cache writes meanwhile."""
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of_task_files(tmp_path)
    before = bh.task_files_hash(folder, folder / "out")
    assert bh.task_files_hash(folder, folder / "out") == before
    (folder / name).write_text("y")
    assert (bh.task_files_hash(folder, folder / "out") != before) == counts


def test_a_renamed_task_file_is_another_and_a_huge_one_goes_by_its_time(tmp_path, monkeypatch, caplog):
    pytest.importorskip("datasets")
    folder = folder_of_task_files(tmp_path)

    def now():
        return bh.task_files_hash(folder, folder / "out")

    before = now()
    (folder / "utils.py").rename(folder / "tools.py")
    assert now() != before
    monkeypatch.setattr(bh, "HASHED_BYTES", 12)  # enough for the smallest
    with caplog.at_level("INFO"):
        before = now()
    assert "2 files of --include-path" in caplog.text
    huge = folder / "data" / "rows.jsonl"
    about = huge.stat()
    huge.write_text(huge.read_text().replace("a", "b"))
    os.utime(huge, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    assert now() != before


def failing_tasks(monkeypatch):
    """Let every task fail at once; returns a list of those asked for: (task, configuration)."""
    asked = []

    def task_row(runner, name, config, task, *rest):
        asked.append((task, name))
        row = runner._row("task", name, config, {"task": bh.fingerprint(task)})
        return row | {"task": task, "documents": [], "report": {}, "status": "error", "error": "stopped"}

    monkeypatch.setattr(bh.BHExperimentRunner, "_task_row", task_row)
    monkeypatch.setattr(bh, "harness_model", lambda *given: None)
    monkeypatch.setattr(bh, "load_tasks", lambda names, *given: dict.fromkeys(names, {}))
    return asked


def test_a_run_of_tasks_is_refused_where_their_data_changed(mock_model, tmp_path, monkeypatch):
    """As one of changed prompts is; what the run itself writes there changes nothing."""
    pytest.importorskip("lm_eval")
    failing_tasks(monkeypatch)
    folder = folder_of_task_files(tmp_path / "mine")

    def run_mine():
        return mock_runner(mock_model, folder / "new").run_tasks(["mine"], TOP_8, include_path=folder)

    run_mine()
    run_mine()
    (folder / "data" / "rows.jsonl").write_text('{"text": "b"}')
    with pytest.raises(bh.UserError, match="holds results of another run: task_files is"):
        run_mine()


def test_processes_share_tasks_before_they_look_at_what_is_done(mock_model, tmp_path, monkeypatch):
    """One that looks when the other has finished something still runs all of its share."""
    pytest.importorskip("lm_eval")
    asked = failing_tasks(monkeypatch)
    names = ["one", "two", "three"]
    for rank in range(2):
        runner = mock_runner(mock_model, tmp_path)
        runner.processes = SimpleNamespace(rank=rank, world=2, wait=lambda: None)
        if rank == 1:  # whose tables the first process would have written
            monkeypatch.setattr(runner, "_finish", lambda *given: bh.EMPTY_RESULTS)
        runner.run_tasks(names, TOP_8, fail_fast=rank == 0)
    assert asked == [("one", "topk_8"), ("two", "topk_8")]


# The latest row counts


def clock_row(name, speed, time, status="ok"):
    return {
        "kind": "throughput",
        "config_name": name,
        "batch_size": 4,
        "input_hash": "h",
        "status": status,
        "tokens_per_sec": speed,
        "timestamp": f"2026-01-01T00:00:{time:02}+00:00",
    }


def speeds_after(folder, *by_process):
    """Configuration -> the speed that counts when each process has written its rows, as either sees it."""
    for rank, rows in enumerate(by_process):
        with contextlib.closing(open_folder(folder, rank)) as checkpoint:
            for row in rows:
                checkpoint.append(row)
    seen = []
    for rank in range(2):
        with contextlib.closing(open_folder(folder, rank)) as checkpoint:
            rows = list(checkpoint.rows(checkpoint.keys()))
            seen.append({row["config_name"]: row["tokens_per_sec"] for row in rows})
            failed = {row["config_name"] for row in rows if row["status"] != "ok"}
            done = {name for _, name, *_ in checkpoint.done(retry_failed=True)}
            assert done == set(seen[-1]) - failed
    assert seen[0] == seen[1]
    return seen[0]


def test_what_was_timed_together_stands_together(tmp_path):
    """A batch that another process times anew replaces all that was timed before, what finished too."""
    first = [clock_row("topk_8", 10, 1), clock_row("bh", None, 1, "error")]
    again = [clock_row("topk_8", 20, 5), clock_row("bh", 22, 5)]
    failed = [clock_row("topk_8", None, 5, "error"), clock_row("bh", 22, 5)]
    assert speeds_after(tmp_path / "a", first, again) == {"topk_8": 20, "bh": 22}
    assert speeds_after(tmp_path / "b", again, first) == {"topk_8": 20, "bh": 22}
    assert speeds_after(tmp_path / "c", first, failed) == {"topk_8": None, "bh": 22}


def test_other_rows_that_finished_stay_before_later_failures(tmp_path):
    rows = [checkpoint_row(1, status) | {"timestamp": time} for status, time in (("ok", "1"), ("error", "2"))]
    for rank, row in enumerate(rows):
        with contextlib.closing(open_folder(tmp_path, rank)) as checkpoint:
            checkpoint.append(row)
    with contextlib.closing(open_folder(tmp_path, 1)) as checkpoint:
        assert [row["status"] for row in checkpoint.rows(checkpoint.keys())] == ["ok"]


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_shuffle_leaves_padding_out(side, tiny):
    """The tokens of a padded batch have the counts that they have unshuffled, on other tokens."""
    ids = sample_ids(2, 40) % 250 + 1
    mask = torch.ones_like(ids)
    padding = slice(6, None) if side == "right" else slice(None, -6)
    mask[1, padding] = 0
    config = RULES["top_p"]
    counts = []
    for shuffle in (False, True):
        with bh.patched_routing(tiny.model, config | {"shuffle": shuffle}) as recorder:
            recorder.keep_tokens()
            logits_of(tiny.model, ids, mask)
            texts = recorder.texts()
        counts.append(np.concatenate([text.counts[:, 0] for text in texts]))
    assert len(counts[0]) == 46
    assert sorted(counts[0]) == sorted(counts[1])
    assert list(counts[0]) != list(counts[1])


def test_padding_that_is_no_number_adds_nothing(tiny):
    layer = tiny.layers[0]
    sums = bh._LayerSums(layer, 1)
    logits = torch.zeros(2, layer.num_experts)
    logits[1] = math.nan
    nowhere = torch.zeros(2, dtype=torch.int64)
    picked = torch.tensor([[0, 1], [0, 1]])
    sums.add((logits, torch.ones(2, 2), picked), None, (nowhere, nowhere), torch.tensor([True, False]))
    assert sums.mass.tolist() == [[2 * bh.MASS_UNIT // layer.num_experts], [0]]


# Diagnostics, and memory


def test_texts_are_diagnosed_as_they_are_scored(mock_model, tmp_path, monkeypatch):
    """All tokens but the last are fed in, so what fits the context is no token too long."""
    runner = mock_runner(mock_model, tmp_path)
    runner.context = 16
    fed = []
    real = bh.record_routers

    def record(model, batches, *given):
        fed.extend(batch.shape for batch in batches)
        return real(model, batches, *given)

    runner.calibration_for([EMPIRICAL | {"stand_in": "nothing"}])
    monkeypatch.setattr(bh, "record_routers", record)
    texts = [text_item(str(n), range(3, 3 + n)) for n in (2, 17, 18, 5)]
    assert runner.diagnose(texts)["n_tokens"] == 15 + 3
    assert fed == [(1, 16), (1, 4)]


def test_a_run_goes_on_without_a_diagnosis(mock_model, tmp_path, monkeypatch, caplog):
    def diagnose(*given):
        raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bh, "diagnose_nulls", diagnose)
    with caplog.at_level("WARNING"):
        results = run_suite(mock_model, tmp_path, {"x": EMPIRICAL}, prompts=PROMPTS[:1], texts=WINDOWS[:1])
    assert "the nulls are not diagnosed: OutOfMemory: CUDA out of memory" in caplog.text
    assert results.num_failed == 0
    assert not (tmp_path / bh.NULL_DIAGNOSTICS).exists()


def test_a_text_too_large_for_memory_fails_alone(mock_model, tmp_path, monkeypatch):
    """Where not even its batch can be built: rows of failures for it, and the others are scored."""
    tried = []

    class Batch(bh.ScoredBatch):
        def __init__(self, model, items, *given):
            names = [item.id for item in items]
            if "w1" in names:
                tried.append(len(names))
                assert len(tried) < 20  # not for ever
                raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")
            super().__init__(model, items, *given)

    monkeypatch.setattr(bh, "ScoredBatch", Batch)
    scores = run_suite(mock_model, tmp_path, prompts=[], texts=WINDOWS).scores
    failed = scores[scores["status"] == "error"]
    assert set(failed["item_id"]) == {"w1"}
    assert len(failed) == scores["config_name"].nunique()
    assert len(scores) == 3 * len(failed)
    assert tried == [3, 1]


# Nulls


def counting_tables(monkeypatch, kind):
    """The nulls of a kind of which a table of critical scores was computed, each time it was."""
    computed = []
    real = kind.critical_scores

    def critical_scores(null, levels):
        computed.append(weakref.ref(null))
        return real(null, levels)

    monkeypatch.setattr(kind, "critical_scores", critical_scores)
    return computed


def test_tables_of_critical_scores_go_with_their_null(tiny, monkeypatch):
    """Computed once for all patches, and kept no longer than the calibration."""
    calibration = bh.Calibration(tiny.calibration.logits, tiny.calibration.own)
    computed = counting_tables(monkeypatch, bh.EmpiricalNull)
    for _ in range(2):
        with bh.patched_routing(tiny.model, EMPIRICAL | {"alpha": 0.3}, calibration):
            logits_of(tiny.model, sample_ids())
    assert len(computed) == len(tiny.layers)
    null = weakref.ref(calibration.null(0, 1.0))
    del calibration
    gc.collect()
    assert null() is None


def test_a_closed_form_is_asked_once_for_all_layers_and_patches(tiny, monkeypatch):
    computed = counting_tables(monkeypatch, bh.FlatNull)
    for _ in range(2):
        with bh.patched_routing(tiny.model, FLAT | {"alpha": 0.123}):
            logits_of(tiny.model, sample_ids())
    assert len(computed) == 1


def test_too_few_null_scores_for_by_name_its_own_alpha():
    """Not alpha / (1 + 1/2 + ... + 1/E), which nobody asked for; at what the message says it works."""
    null = bh.EmpiricalNull(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    gates = bh.Gates(torch.randn(2, 64).log_softmax(-1), null)
    message = r"alpha = 0\.05 needs n0 \+ 1 >= 4\.74 E / alpha = 6,072 .* alpha >= 0\.076"
    with pytest.raises(bh.UserError, match=message):
        bh.RULES["by"].count(gates, {"alpha": 0.05})
    bh.RULES["by"].count(gates, {"alpha": 0.077})
    with pytest.raises(bh.UserError, match=r"alpha = 0\.01 needs n0 \+ 1 >= E / alpha = 6,400 .* >= 0\.016"):
        bh.RULES["bh"].count(gates, {"alpha": 0.01})


# Layers that cannot run more than their own K


def test_cap_and_floor_of_a_layer_without_a_knob(tiny):
    """At its own K it is at the cap, however large the configuration's."""
    layers = [dataclasses.replace(layer, knob=None) for layer in tiny.layers]
    own_k = layers[0].own_k
    everything = {"method": "threshold", "threshold": 1e-9, "max_k": 2 * own_k}
    with bh.patched_routing(tiny.model, everything, layers=layers) as recorder:
        logits_of(tiny.model, sample_ids())
    row = recorder.total().row()
    assert (row["max_experts"], row["cap_frac"], row["floor_frac"]) == (own_k, 1, 0)
    floor = everything | {"min_k": 2 * own_k}
    with bh.patched_routing(tiny.model, floor, layers=layers) as recorder:
        logits_of(tiny.model, sample_ids())
    assert recorder.total().row()["floor_frac"] == 1


def test_match_experts_goes_no_further_than_the_layers_can(tiny, tmp_path, monkeypatch):
    """Where K has no knob, a target above it cannot be reached, also by a calibration that was saved."""
    find = bh.find_moe_layers
    monkeypatch.setattr(
        bh, "find_moe_layers", lambda model: [dataclasses.replace(layer, knob=None) for layer in find(model)]
    )
    calibration = bh.record_routers(tiny.model, [sample_ids(2, 30)])
    calibration.save(tmp_path / "x.safetensors", {})
    rule = {"method": "top_p", "p": 0.5, "max_k": 16}
    own_k = tiny.layers[0].own_k
    for known in (calibration, bh.Calibration.load(tmp_path / "x.safetensors", {})):
        with pytest.raises(bh.UserError, match=f"can keep 1.00 to {own_k}.00 experts"):
            bh.match_experts("x", rule, own_k + 2, known)
    older = bh.Calibration(calibration.logits, calibration.own)
    with pytest.raises(bh.UserError, match="can keep 1.00 to 15"):
        bh.match_experts("x", rule, 17, older)


# Names, precision, and what decides


def test_texts_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """As many folders as it takes, and only where names clash."""
    names = ["x/a/test.txt", "y/a/test.txt", "x/b/test.txt", "x/b/other.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name} " * 20)

    def named(*sources):
        documents = bh.load_text_documents([tmp_path / source for source in sources])
        return [document.name for document in documents]

    assert named("x/a/test.txt", "x/b/test.txt") == ["a/test.txt", "b/test.txt"]
    assert named(*names) == ["x/a/test.txt", "y/a/test.txt", "b/test.txt", "other.txt"]
    assert named("x/a", "x/b") == ["a/test.txt", "other.txt", "b/test.txt"]
    assert named("x/a/test.txt", "x/b/other.txt") == ["test.txt", "other.txt"]
    windows = bh.text_windows([tmp_path / name for name in names[:3]], MockTokenizer(), 8)
    assert {text.document for text in windows} == {"x/a/test.txt", "y/a/test.txt", "b/test.txt"}
    with pytest.raises(bh.UserError, match="ids must differ"):
        bh.text_windows([tmp_path / names[0]] * 2, MockTokenizer(), 8)


def test_beginning_anew_chooses_the_precision_anew(tiny_folder, tmp_path, monkeypatch):
    """--no-resume does not take it from the run that it sets aside."""
    timed_as(monkeypatch, float32=1.0, bfloat16=0.5)
    runner = bh.BHExperimentRunner(str(tiny_folder), tmp_path, device="cpu")
    runner.run_full_experiment_suite({"topk_2": {"method": "topk", "k": 2}}, PROMPTS[:1], 2)
    timed_as(monkeypatch, float32=0.5, bfloat16=1.0)
    options = ["--model", str(tiny_folder), "--output", str(tmp_path), "--device", "cpu"]
    made = []
    for more in ([], ["--no-resume"]):
        args = bh.parse_options(options + more)
        args.command = ""
        made.append(bh.build_runner(args).dtype)
    assert made == ["bfloat16", "float32"]


def test_compare_decides_as_the_analysis_where_all_text_failed(tmp_path):
    """The references of prompts do not step in for text that could not be scored."""

    def text_failed(scores):
        text = scores.assign(source="text", item_id="w" + scores["item_id"], status="error", nll=math.nan)
        return pd.concat([scores.assign(source="reference"), text], ignore_index=True)

    folders = two_folders(tmp_path, text_failed)
    results = bh.Results.read(folders[1])
    analysis = bh.analyze_results(results.generation, folders[1])
    assert {verdict["delta_nll"] for verdict in analysis["verdict"].values()} == {None}
    comparison = bh.compare_results(folders, tmp_path / "out")
    of_failed = [row for row in comparison["configurations"] if row["folder"] == "B"]
    assert of_failed
    assert {row.get("delta_nll") for row in of_failed} == {None}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-manual"]:
        write_manual()
        write_requirements()
    else:
        sys.exit(pytest.main([__file__, *sys.argv[1:]]))
