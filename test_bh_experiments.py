#!/usr/bin/env python3
"""Tests of run_bh_experiments.py, without network or download: `python test_bh_experiments.py`, or `pytest`.

Mathematics is checked against references (scipy, a slow loop, the paper's example); the seam on a mock model
and on tiny random OLMoE and Mixtral models of transformers; the whole on the trained model in
models/olmoe-mini as well.

Contents: 1 routing function - 2 runner set-up - 3 applying and restoring - 4 one experiment -
5 a mini suite - 6 analysis, plots, report - 7 checkpoint and resume - 8 drift - 9 the embedded model -
10 data sets and downstream tasks (those need the optional libraries datasets and lm_eval)
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
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster on one thread; also for child processes

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from scipy import stats
from torch import nn

import run_bh_experiments as bh

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "models" / "olmoe-mini"
CALIBRATION = {"CALIBRATION_SEQUENCES": 6, "CALIBRATION_LENGTH": 24}  # just enough for alpha = 0.01
STABLE_COLUMNS = [column for column in bh.RESULT_COLUMNS if column not in bh.CLOCK_COLUMNS]

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
    """Calibrate on little text, except for the embedded model."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CALIBRATION.items():
            patch.setattr(bh, name, value)
        yield


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


def as_read(frame):
    """A frame as a reader of its CSV sees it: missing texts are empty, missing numbers NaN."""
    frame = frame.copy()
    for column in frame:
        if column in bh.STRING_COLUMNS:
            frame[column] = frame[column].fillna("").astype(str)
        else:
            frame[column] = pd.to_numeric(frame[column]).astype(float)
    return frame


def assert_same_results(left, right, columns=STABLE_COLUMNS):
    pd.testing.assert_frame_equal(as_read(left)[columns], as_read(right)[columns], check_exact=True)


# ---------------------------------------------------------------------------------------------------------
# 1. BH routing function
# ---------------------------------------------------------------------------------------------------------

BH1995 = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
          0.6528, 0.7590, 1.0]  # fmt: skip


def random_logits(*shape, seed=0, spread=2.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def test_paper_example():
    """Benjamini and Hochberg (1995), section 3.2: four of the fifteen hypotheses are rejected at 0.05."""
    assert bh.bh_rejections(torch.tensor(BH1995, dtype=torch.float64), 0.05) == 4


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
def test_rejections_equal_scipy(alpha):
    """The number of rejections is that of scipy.stats.false_discovery_control on many p-values."""
    random = np.random.default_rng(0)
    p = random.uniform(size=(3000, 64)) ** random.uniform(0.3, 8, size=(3000, 1))
    expected = (stats.false_discovery_control(p, axis=1) <= alpha).sum(1)
    found = bh.bh_rejections(torch.tensor(p), alpha)
    assert found.tolist() == expected.tolist()
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
    *_, count, found = bh.benjamini_hochberg_routing(logits, 0.5, min_k=2, max_k=3, return_stats=True)
    assert set(found) == {"p_values", "thresholds", "rejections"}
    q = torch.softmax(logits.double(), -1).numpy()
    np.testing.assert_allclose(found["p_values"], stats.beta.sf(q, 1, 63), rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(found["thresholds"], 0.5 * np.arange(1, 65) / 64, rtol=1e-12)
    expected = (stats.false_discovery_control(found["p_values"], axis=1) <= 0.5).sum(1)
    assert found["rejections"].tolist() == expected.tolist()
    assert {0, 1, 2, 4} <= set(expected)
    assert count.tolist() == expected.clip(2, 3).tolist()


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


def test_docstring_examples():
    result = doctest.testmod(bh)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("experts", [1, 2, 16, 64])
def test_flat_null(experts):
    """The upper tail of Beta(1, E - 1), uniform when the gate vector is uniform on the simplex."""
    q = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    if experts > 1:
        found = bh.FlatNull(experts).p_values(q.log())
        np.testing.assert_allclose(found, stats.beta.sf(q, 1, experts - 1), rtol=1e-9)
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
    if name == "empirical":
        scores = bh.gate_scores(random_logits(500, experts, seed=5))
        return bh.EmpiricalNull(scores[scores < scores.topk(8).values[:, -1:]])
    return {"flat": bh.FlatNull, "softmax": bh.SoftmaxNull}[name](experts)


@pytest.mark.parametrize("name", ["flat", "softmax", "empirical"])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_critical_scores_decide_like_p_values(name, alpha, temperature):
    """The table of critical scores gives the number that BH finds from the p-values, sorting or counting."""
    fresh, own = random_logits(3000, 64, seed=6, spread=3), random_logits(500, 64, seed=5)
    scores = torch.cat([bh.gate_scores(fresh, temperature), bh.gate_scores(own)])  # own: ties with the null
    null = make_null(name)
    expected = bh.bh_rejections(null.p_values(scores), alpha)
    critical = null.critical_scores(bh.bh_levels(alpha, 64)).float()
    assert (critical.diff().nan_to_num(0) <= 0).all()
    assert torch.equal(bh.count_rejections(scores, critical), expected)
    few = bh.FEW_SCORES // 64
    assert torch.equal(bh.count_rejections(scores[:few], critical), expected[:few])
    assert torch.equal(bh.count_rejections(scores[-few:], critical), expected[-few:])


@pytest.mark.parametrize("copies", [1, 1000], ids=["sorted", "counted"])
def test_rank_beyond_a_failed_one(copies):
    """Where the first ranks fail and a deeper one passes, the deeper one counts."""
    critical = torch.tensor([5.0, 4.0, 3.0, 2.0])
    scores = torch.tensor(
        [[3.5, 3.4, 3.3, 0.0], [3.5, 3.4, 2.9, 2.5], [3.5, 3.4, 2.9, 1.9], [9.0, 3.0, 2.0, 1.0]]
    )
    assert bh.count_rejections(scores.repeat(copies, 1), critical).tolist() == [3, 4, 0, 1] * copies


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
# 2. Runner set-up
# ---------------------------------------------------------------------------------------------------------


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


def test_damaged_weights(tiny_folder, tmp_path):
    """A model folder whose weights are cut short is one line, not a traceback."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(bh.UserError, match="cannot be loaded"):
        bh.BHExperimentRunner(str(tmp_path / "model"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"method": "bhh"}, 'Did you mean "bh"'), ({}, "method"), ({"method": "bh", "k": 3}, "k does not apply"),
     ({"method": "topk", "k": 0}, "k = 0"), ({"method": "bh", "alpha": 2}, "alpha = 2"),
     ({"method": "bh", "min_k": 5, "max_k": 4}, "min_k = 5"),
     ({"method": "bh", "p_values": "flatt"}, "empirical, flat, softmax"),
     ({"method": "bh", "alhpa": 0.1}, "alhpa"), ({"method": "topk", "k": 65}, "65")],
)  # fmt: skip
def test_bad_configuration(config, message, mock_model, tmp_path):
    """Refused before anything is run, with the configuration's name, the field and what is allowed."""
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path / "out").run_full_experiment_suite({"mine": config}, PROMPTS, 2)
    assert not (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path / "out")._apply_routing_config(config)


def test_log_has_no_duplicate_lines(mock_model, tmp_path):
    """However many runners are made, each line is logged once, and no handler is left behind."""
    for i in range(3):
        mock_runner(mock_model, tmp_path)
        mock_runner(mock_model, tmp_path).run_full_experiment_suite(CONFIGS, PROMPTS[: i + 1], 2)
    with bh.log_to(tmp_path / "experiment_log.txt"), bh.log_to(tmp_path / "experiment_log.txt"):
        bh.logger.info("only once")
    lines = (tmp_path / "experiment_log.txt").read_text().splitlines()
    assert sum("only once" in line for line in lines) == 1
    assert len(lines) == len(set(lines)) > 3  # a line written twice has the same time
    assert logging.getLogger("bh_experiments").handlers == []


def test_import_is_cheap_and_silent(tmp_path):
    """The script alone in an empty folder can be imported, prints nothing and loads no heavy library."""
    shutil.copy(HERE / "run_bh_experiments.py", tmp_path)
    code = (
        "import sys, logging, run_bh_experiments as b; "
        "assert not b.logger.handlers and not logging.root.handlers; "
        "print(*{'transformers', 'matplotlib', 'seaborn', 'scipy'} & set(sys.modules), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------
# 3. Applying and restoring configurations
# ---------------------------------------------------------------------------------------------------------


def fixed(count, widest):
    """A BH configuration whose rule always ends at its floor."""
    return {**FLAT, "alpha": 1e-9, "min_k": count, "max_k": widest, "p_values": "softmax"}


def test_keeping_all_changes_nothing(subject):
    """A rule that keeps exactly the model's own experts gives bit-identical logits."""
    ids, k = sample_ids(), subject.own_k
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
        assert (recorder.total().counts.sum(0).nonzero() == k).all()
    assert not torch.allclose(logits_of(subject.model, ids), native, atol=1e-2)


def test_bfloat16_model():
    """The invariants hold in 16 bits: keeping all is bit-identical, a fixed count is the native model."""
    model, native = (build("olmoe-grouped_mm", top_k=k).bfloat16() for k in (4, 3))
    ids = sample_ids()
    expected = logits_of(model, ids)
    with bh.patched_routing(model, fixed(4, 4)):
        assert torch.equal(logits_of(model, ids), expected)
    with bh.patched_routing(model, fixed(3, 6)):
        found = logits_of(model, ids)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, logits_of(native, ids), rtol=0.05, atol=0.05)
    assert torch.equal(logits_of(model, ids), expected)


class Boom(Exception):
    pass


@pytest.mark.parametrize("failure", [None, Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["inside", "in the experts"])
def test_restored_whatever_happens(subject, failure, where):
    """After leaving, by whatever way, the model is bit-identical and nothing is left on any instance."""
    ids = sample_ids()
    before, expected = state_of(subject.model), logits_of(subject.model, ids)
    for config in (FLAT, EMPIRICAL, {"method": "topk", "k": 2}):
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
    pairs = recorder.total().counts @ torch.arange(recorder.total().counts.shape[1])
    assert seen == pairs.tolist() == recorder.total().use.sum(1).tolist()
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
    ids, lengths = sample_ids(3, 12), (12, 7, 4)
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


HOT = {**EMPIRICAL, "temperature": 2.0, "min_k": 2, "alpha": 0.02}


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
    layers, experts = len(subject.layers), subject.layers[0].num_experts
    counts, use = np.zeros((layers, experts + 1), int), np.zeros((layers, experts), int)
    numbers, nothing, mass = [], 0, []
    for call, logits in enumerate(taken):
        layer = call % layers
        empirical = config["p_values"] == "empirical"
        null = subject.calibration.null(layer, config["temperature"]) if empirical else bh.FlatNull(experts)
        p = null.p_values(bh.gate_scores(logits, config["temperature"])).numpy()
        for token in range(len(logits)):
            rejected = int((stats.false_discovery_control(p[token]) <= config["alpha"]).sum())
            number = min(max(rejected, config["min_k"]), config["max_k"])
            counts[layer, number] += 1
            kept = logits[token].argsort(descending=True)[:number]
            use[layer, kept.numpy()] += 1
            mass.append(logits[token].softmax(-1)[kept].sum().item())
            numbers.append(number)
            nothing += rejected == 0
    assert recorder.total().counts.tolist() == counts.tolist()
    assert recorder.total().use.tolist() == use.tolist()
    summary = recorder.total().row()
    numbers = np.array(numbers)
    assert summary == pytest.approx({
        "avg_experts_per_token": numbers.mean(), "std_experts_per_token": numbers.std(),
        "min_experts": numbers.min(), "max_experts": numbers.max(),
        "expert_utilization_cv": np.mean(use.std(1) / use.mean(1)),
        "expert_utilization_max_min_ratio": np.mean(use.max(1) / use.min(1).clip(1)),
        "floor_frac": np.mean(numbers == config["min_k"]), "cap_frac": np.mean(numbers == config["max_k"]),
        "zero_rejection_frac": nothing / len(numbers), "gate_mass_frac": np.mean(mass),
    })  # fmt: skip
    assert set(summary) == set(bh.ROUTING_COLUMNS)
    assert numbers.min() < numbers.max()


def test_patching_twice(subject):
    """A patched model is not patched again; one configuration after the other is fine."""
    ids, before = sample_ids(), state_of(subject.model)
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
    ids, before = sample_ids(), state_of(mock_model)
    expected = logits_of(mock_model, ids)
    recorder = runner._patch_bh_routing(alpha=0.1, temperature=1.0, min_k=2, max_k=5)
    logits_of(mock_model, ids)
    assert set(recorder.total().counts.sum(0).nonzero().flatten().tolist()) <= {2, 3, 4, 5}
    recorder = runner._apply_routing_config({"method": "topk", "k": 3})
    logits_of(mock_model, ids)
    assert recorder.total().counts.sum(0).nonzero().flatten().tolist() == [3]
    for _ in range(2):
        runner._restore_original_routing()
        assert state_of(mock_model) == before
        assert torch.equal(logits_of(mock_model, ids), expected)


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
    from_file = bh.calibrate(subject.model, subject.tokenizer, text_path=text)
    assert from_file.logits.shape[1] % 23 == 0
    text.write_text("too short")
    with pytest.raises(bh.UserError, match="24"):
        bh.calibrate(subject.model, subject.tokenizer, text_path=text)


def test_calibration_cache(mock_model, tmp_path, monkeypatch, caplog):
    """Calibration is read back by the next runner, made again when damaged or made from something else."""
    first = mock_runner(mock_model, tmp_path).calibration
    made = []
    monkeypatch.setattr(bh, "calibrate", lambda *args, real=bh.calibrate: made.append(1) or real(*args))
    assert torch.equal(mock_runner(mock_model, tmp_path).calibration.logits, first.logits)
    assert not made
    (tmp_path / "calibration.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(mock_runner(mock_model, tmp_path).calibration.logits, first.logits)
    assert "calibrating again" in caplog.text
    assert not torch.equal(mock_runner(mock_model, tmp_path, seed=1).calibration.logits, first.logits)
    assert len(made) == 2


# ---------------------------------------------------------------------------------------------------------
# 4. One experiment
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk_8", "bh_flat", "bh_moderate"])
def test_row(subject, name, tmp_path):
    """A row has exactly RESULT_COLUMNS, its values agree, and the model is clean afterwards."""
    runner = bh.BHExperimentRunner("x", tmp_path, model=subject.model, tokenizer=subject.tokenizer)
    runner._calibration = subject.calibration
    config = {**CONFIGS, **bh.ROUTING_CONFIGS}[name]
    before = state_of(subject.model)
    row = runner.run_single_experiment(name, config, PROMPTS[0], max_new_tokens=6)
    assert tuple(row) == bh.RESULT_COLUMNS
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
    if name == "topk_8":
        assert (row["k"], row["avg_experts_per_token"], row["std_experts_per_token"]) == (low, low, 0)
        assert row["floor_frac"] is row["cap_frac"] is row["zero_rejection_frac"] is row["alpha"] is None
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
    assert {c: first[c] for c in STABLE_COLUMNS} == {c: second[c] for c in STABLE_COLUMNS}


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


# ---------------------------------------------------------------------------------------------------------
# 5. A mini suite
# ---------------------------------------------------------------------------------------------------------


def test_mini_suite(mock_model, tmp_path):
    """2 configurations x 3 prompts: every pair once, configurations in turn, CSV equal to the frame."""
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(CONFIGS, PROMPTS, 5)
    assert list(frame) == list(bh.RESULT_COLUMNS)
    pairs = list(zip(frame["config_name"], frame["prompt_id"], strict=True))
    assert pairs == [(name, prompt["id"]) for prompt in PROMPTS for name in CONFIGS]
    assert (frame["status"] == "ok").all()
    assert frame["prompt_category"].tolist()[::2] == ["plain", "awkward", "NA"]
    read = bh.read_results(tmp_path / "bh_routing_results.csv")
    assert_same_results(read, frame, list(bh.RESULT_COLUMNS))
    assert read["max_new_tokens"].tolist() == [5] * 6
    stored = pd.DataFrame(rows_in(tmp_path / "checkpoints" / "latest_checkpoint.json"))
    stored["run_id"] = frame["run_id"]  # a run's, not a row's: a larger run may take the row over
    assert_same_results(stored[list(bh.RESULT_COLUMNS)], frame, list(bh.RESULT_COLUMNS))


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
    read = bh.read_results(tmp_path / "bh_routing_results.csv")["generated_text"].tolist()
    assert read == [text.replace("\0", "\u2400")] * 2


def test_failed_experiment_becomes_a_row(mock_model, tmp_path):
    """The error is recorded with its configuration and prompt, and the other experiments are run."""
    prompts = [PROMPTS[0], {"id": "long", "text": "word " * 300}, PROMPTS[2]]
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(CONFIGS, prompts, 3)
    assert frame["status"].tolist() == ["ok", "ok", "error", "error", "ok", "ok"]
    failed = frame[frame["status"] == "error"]
    assert failed["error"].str.contains("context of 256").all()
    assert failed["avg_experts_per_token"].isna().all()
    assert (failed["prompt_id"] == "long").all()
    assert_same_results(bh.read_results(tmp_path / "bh_routing_results.csv"), frame, list(bh.RESULT_COLUMNS))
    analysis = bh.write_report(frame, tmp_path)
    assert (analysis["n_experiments"], analysis["n_failed"]) == (6, 2)
    assert "Failed experiments" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("configs", "prompts", "tokens", "message"),
    [({}, PROMPTS, 2, "at least one"), (CONFIGS, [], 2, "at least one"),
     (CONFIGS, PROMPTS[:1] * 2, 2, "'one' occurs"),
     (CONFIGS, [{"text": ""}], 2, "no text"), (CONFIGS, PROMPTS, 0, "max_new_tokens 0")],
)  # fmt: skip
def test_bad_suite(mock_model, tmp_path, configs, prompts, tokens, message):
    with pytest.raises(bh.UserError, match=message):
        mock_runner(mock_model, tmp_path / "out").run_full_experiment_suite(configs, prompts, tokens)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# 6. Analysis, plots, report
# ---------------------------------------------------------------------------------------------------------

SECTIONS = ("Executive summary", "Summary by configuration", "Statistical tests", "Performance by category",
            "Plots", "Conclusions and recommendations", "Configuration details")  # fmt: skip


def invented_results(configs=("topk_8", "bh_strict", "bh_loose"), prompts=8):
    """A results table with random measurements."""
    random, rows = np.random.default_rng(0), []
    for p, (c, name) in itertools.product(range(prompts), enumerate(configs)):
        config = bh.resolve_config(name, bh.ROUTING_CONFIGS[name])
        seconds = random.uniform(0.5, 1.5)
        experts = 8.0 if config["method"] == "topk" else random.uniform(4, 5) + c
        row = dict.fromkeys(bh.RESULT_COLUMNS) | dict.fromkeys(bh.STRING_COLUMNS, "x")
        row |= {f: config[f] for f in bh.CONFIG_FIELDS}
        nll = random.uniform(2.9, 3.0)
        row |= {"reference_nll": nll, "reference_tokens": 50, "reference_bytes": 200,
                "reference_perplexity": 19.0, "reference_avg_experts": experts,
                "kl_to_baseline": 0.01, "top1_agreement": 0.9, "static_nll": "",
                "document": f"p{p}", "run_id": "", "task_metric": ""}  # fmt: skip
        if name == "topk_8":
            row |= {
                "repeat_reference_nll": nll,
                "repeat_inference_time_sec": seconds + random.normal(0, 0.01),
            }
            row["static_nll"] = json.dumps({k: nll + 0.5 / k**2 for k in range(1, 8)})
        row |= {column: random.uniform() for column in bh.ROUTING_COLUMNS}
        row |= {"config_name": name, "prompt_id": f"p{p}", "prompt_category": f"c{p % 3}", "status": "ok",
                "error": "", "avg_experts_per_token": experts, "min_experts": 1, "max_experts": 8, "seed": 0,
                "num_input_tokens": 5, "num_output_tokens": 10, "max_new_tokens": 10, "peak_memory_gb": None,
                "inference_time_sec": seconds, "tokens_per_sec": 10 / seconds, "time_to_first_token_sec": 0.1,
                "decode_sec_per_token": (seconds - 0.1) / 9}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows, columns=list(bh.RESULT_COLUMNS))


def strict_loads(text):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("n", [2, 3, 12, 60])
def test_paired_comparison_equals_scipy(n):
    """t, interval and d agree with scipy and the textbook formula."""
    random = np.random.default_rng(n)
    base = random.uniform(1, 2, n)
    other = base + random.normal(0.2, 0.3, n)
    found = bh.paired_comparison(base, other)
    t = stats.ttest_rel(other, base)
    assert found["t_statistic"] == pytest.approx(t.statistic)
    assert found["p_value"] == pytest.approx(t.pvalue)
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx(tuple(t.confidence_interval(0.95)))
    assert found["cohens_d"] == pytest.approx((other - base).mean() / (other - base).std(ddof=1))
    assert found["cohens_d"] == pytest.approx(found["t_statistic"] / np.sqrt(n))
    assert found["median_ratio"] == pytest.approx(np.median(other / base))
    assert (found["n_pairs"], found["reason"]) == (n, None)


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
    found = bh.paired_comparison(base, other)
    assert found["n_pairs"] == pairs
    assert (found["reason"] is None) == (reason is None)
    assert reason is None or reason in found["reason"]
    assert (found["p_value"] is not None) == (reason is None)
    strict_loads(json.dumps(found))


def test_pairs_are_formed_by_prompt(tmp_path):
    """Row order does not matter, and a prompt that one side lacks is left out."""
    frame = invented_results()
    frame = frame[~((frame["config_name"] == "bh_strict") & (frame["prompt_id"] == "p3"))]
    shuffled = frame.sample(frac=1, random_state=1)
    wide = frame.pivot(index="prompt_id", columns="config_name", values="inference_time_sec")
    expected = stats.ttest_rel(wide["bh_strict"], wide["topk_8"], nan_policy="omit")
    for rows in (frame, shuffled):
        test = bh.analyze_results(rows, tmp_path)["statistical_tests"]["bh_strict"]["inference_time_sec"]
        assert test["n_pairs"] == 7
        assert (test["t_statistic"], test["p_value"]) == pytest.approx((expected.statistic, expected.pvalue))


def test_analysis(tmp_path):
    """Summaries and adjusted p-values follow from the table; the file is strict JSON and says the same."""
    frame = invented_results()
    analysis = bh.analyze_results(frame, tmp_path)
    assert strict_loads((tmp_path / "analysis_summary.json").read_text()) == analysis
    assert analysis["baseline"] == "topk_8"
    loose = frame[frame["config_name"] == "bh_loose"]
    summary = analysis["summary_by_config"]["bh_loose"]["inference_time_sec"]
    assert summary["mean"] == pytest.approx(loose["inference_time_sec"].mean())
    assert summary["std"] == pytest.approx(loose["inference_time_sec"].std())
    by_category = analysis["summary_by_category"]["c1"]["bh_loose"]["avg_experts_per_token"]
    assert by_category["mean"] == pytest.approx(
        loose[loose["prompt_category"] == "c1"]["avg_experts_per_token"].mean()
    )
    tests = [test for by_metric in analysis["statistical_tests"].values() for test in by_metric.values()]
    adjusted = stats.false_discovery_control([test["p_value"] for test in tests])
    assert [test["p_value_adjusted"] for test in tests] == pytest.approx(adjusted.tolist())
    assert all(test["significant"] == (test["p_value_adjusted"] < 0.05) for test in tests)


def test_hypotheses(tmp_path):
    """Each expectation stands beside its measured value; it held when that lies within the bounds."""
    frame = invented_results()
    rows = bh.analyze_results(frame, tmp_path)["hypotheses"]
    means = frame.groupby("config_name")["avg_experts_per_token"].mean()
    for row in rows:
        if row["configuration"] not in means:
            assert row["measured"] is row["held"] is None
            continue
        upper = float("inf") if row["high"] is None else row["high"]
        assert row["held"] == (row["low"] <= row["measured"] <= upper)
        if row["quantity"] == "avg_experts_per_token":
            assert row["measured"] == pytest.approx(means[row["configuration"]])
    assert {row["held"] for row in rows} == {True, False, None}


def table_widths(text):
    """For every table of a Markdown text: the numbers of unescaped pipes of its rows."""
    widths, inside = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            widths += [] if inside else [set()]
            widths[-1].add(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)))
        inside = line.startswith("|")
    return widths


SPEC_PLOTS = {"avg_experts_comparison", "inference_time_comparison", "expert_utilization_cv",
              "experts_by_category", "experts_vs_latency"}  # fmt: skip


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
    headings = re.findall(r"^## (.*)$", report, flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    links = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert {Path(link).stem for link in links} == drawn
    assert all((folder / link).is_file() for link in links)
    assert not re.search(r"\b(nan|None|inf)\b", report)
    assert all(len(widths) == 1 for widths in table_widths(report))
    assert all(name in report for name in configs)
    return report


@pytest.mark.parametrize(
    ("configs", "prompts"),
    [(tuple(bh.ROUTING_CONFIGS), 8), (("topk_8",), 3), (("bh_loose",), 1), (("topk_8", "bh_loose"), 1)],
)
def test_report(configs, prompts, tmp_path):
    """Complete for the whole suite, for one configuration and for one prompt."""
    bh.write_report(invented_results(configs, prompts), tmp_path)
    check_outputs(tmp_path, configs)


def report_of(frame, folder):
    path = bh.generate_markdown_report(frame, bh.analyze_results(frame, folder), folder / "REPORT.md")
    return path.read_text(encoding="utf-8")


NASTY = "a|b \\| `c` \\\n\n## d\n| e <script>alert(1)</script> [f](g) ![h](i) \r\n---"


@pytest.mark.parametrize(
    "column", ["prompt_category", "prompt_id", "prompt_text", "generated_text", "model_name", "error"]
)
def test_texts_cannot_break_the_report(column, tmp_path):
    """Pipes, newlines, backticks, headings and HTML in any text leave the tables whole."""
    frame = invented_results(("topk_8", "bh_loose"), 3)
    frame.loc[frame["prompt_id"] == "p2", ["status", "error"]] = ["error", "failed"]
    clean = report_of(frame, tmp_path)
    nasty = frame.copy()
    nasty.loc[nasty["config_name"] == "bh_loose", column] = NASTY
    if column == "prompt_id":
        nasty[column] = [f"{NASTY} {i // 2}" for i in range(len(nasty))]
    report = report_of(nasty, tmp_path)
    assert all(len(widths) == 1 for widths in table_widths(report))
    assert "<script>" not in report
    assert len(table_widths(report)) == len(table_widths(clean))
    assert re.findall("^#+ .*", report, flags=re.MULTILINE) == re.findall("^#+ .*", clean, flags=re.MULTILINE)


def test_a_configuration_name_that_could_break_the_report_is_refused(tmp_path):
    frame = invented_results(("topk_8", "bh_loose"), 3)
    frame.loc[frame["config_name"] == "bh_loose", "config_name"] = NASTY
    with pytest.raises(bh.UserError, match="configuration name"):
        report_of(frame, tmp_path)


def test_analysis_needs_a_finished_experiment(tmp_path):
    frame = invented_results().assign(status="error")
    for function in (bh.analyze_results, bh.create_visualizations):
        with pytest.raises(bh.UserError, match="none of 24"):
            function(frame, tmp_path)


def cli(folder, output, *options):
    """Run the command line in this process."""
    fixed_options = ["--model", str(folder), "--output", str(output), "--device", "cpu", "--no-fp16"]
    return bh.main([*fixed_options, *map(str, options)])


@pytest.fixture(scope="module")
def softmax_run(tiny_folder, tmp_path_factory):
    """The output of the whole default suite from the command line, with the degenerate p-values."""
    output = tmp_path_factory.mktemp("softmax")
    assert cli(tiny_folder, output, "--p-values", "softmax", "--max-tokens", 2) == 0
    return output


def test_command_line(softmax_run):
    """60 experiments, all files, and the degenerate rule shown for what it is: mean experts 1.00."""
    frame = bh.read_results(softmax_run / "bh_routing_results.csv")
    assert len(frame) == 60
    adaptive = frame[frame["method"] == "bh"]
    assert len(adaptive) == 48
    assert (adaptive["avg_experts_per_token"] == 1).all()
    assert (frame[frame["method"] == "topk"]["avg_experts_per_token"] == 4).all()
    report = check_outputs(softmax_run, bh.ROUTING_CONFIGS)
    assert "| `bh_loose` | 1.00 ± 0.00 |" in report
    assert "same amount" in report
    assert (softmax_run / "experiment_log.txt").stat().st_size > 0


def only_plots(monkeypatch, *names):
    """Drawing takes most of the time of a small run: leave out the plots that a test does not look at."""
    monkeypatch.setattr(bh, "PLOTS", {name: bh.PLOTS[name] for name in names})


def test_analyze_only(softmax_run, tmp_path, monkeypatch):
    """Analysis, plots and report are redone from the tables alone, byte for byte."""
    for name in ("bh_routing_results", "layer_statistics", "expert_usage"):
        shutil.copy(softmax_run / f"{name}.csv", tmp_path)
    only_plots(monkeypatch, "experts_by_category", "layer_profile")
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 0
    plots = [f"plots/{name}.png" for name in bh.PLOTS]
    for name in ("analysis_summary.json", *plots):
        assert (tmp_path / name).read_bytes() == (softmax_run / name).read_bytes(), name
    reports = [(folder / "REPORT.md").read_text().split("## Plots") for folder in (tmp_path, softmax_run)]
    assert reports[0][0] == reports[1][0]
    assert reports[0][1].split("## What")[1] == reports[1][1].split("## What")[1]


def test_one_new_token(mock_model, tmp_path):
    """With a single new token there is no decode time: left out of plots and report, not an error."""
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(CONFIGS, PROMPTS, 1)
    assert frame["decode_sec_per_token"].isna().all()
    bh.write_report(frame, tmp_path)
    check_outputs(tmp_path, CONFIGS, without={"experts_vs_latency"})


# ---------------------------------------------------------------------------------------------------------
# 7. Checkpoint and resume
# ---------------------------------------------------------------------------------------------------------


def checkpoint_row(i):
    text = 'é "]}\n, {"results": [' * i
    names = {"config_name": f"c{i}", "prompt_id": f"p{i}", "sample": 0, "status": "ok"}
    return {**names, "text": text, "value": i / 3}


def rows_of(checkpoint):
    return list(checkpoint.rows(list(checkpoint.places)))


def rows_in(path):
    """The rows of a checkpoint as a plain JSON reader sees them."""
    rows = strict_loads(path.read_text())["results"]
    return [{key: value for key, value in row.items() if key != "crc32"} for row in rows]


def open_checkpoint(path, **settings):
    return bh.Checkpoint(path, {"model": "m", "seed": 0, **settings}, 2)


def filled(path, rows):
    """A checkpoint file with some rows; returns its bytes."""
    checkpoint = open_checkpoint(path)
    for i in range(rows):
        checkpoint.append(checkpoint_row(i))
    checkpoint.close()
    return path.read_bytes()


def test_checkpoint_is_valid_at_every_moment(tmp_path):
    """Strict JSON after every append; the bytes of earlier rows stay; texts and floats survive."""
    path = tmp_path / "c" / "latest.json"
    checkpoint = open_checkpoint(path)
    before = path.read_bytes()
    for i in range(12):
        checkpoint.append({**checkpoint_row(i), "number": np.float32(0.5), "missing": float("nan")})
        content = path.read_bytes()
        assert content.startswith(before[: -len(bh.Checkpoint.END)])
        rows = rows_in(path)
        assert rows == rows_of(checkpoint)
        assert rows == [{**checkpoint_row(n), "number": 0.5, "missing": None} for n in range(i + 1)]
        before = content
    checkpoint.close()
    assert rows_of(open_checkpoint(path)) == rows


@pytest.mark.parametrize("tear", ["cut", "half overwritten"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_torn_end(tmp_path, rows, tear):
    """A file cut at any byte of its last row, or half overwritten, keeps every row before."""
    path, end = tmp_path / "latest.json", bh.Checkpoint.END
    start = len(filled(path, rows)) - len(end)
    path.unlink()
    whole = filled(path, rows + 1)
    if tear == "cut":
        states = [whole[:stop] for stop in range(start, len(whole))]
    else:
        states = [whole[: start + n] + end[n:] for n in range(len(end))]
    for torn in states:
        path.write_bytes(torn)
        checkpoint = open_checkpoint(path)
        kept = rows_of(checkpoint)
        assert kept[:rows] == [checkpoint_row(n) for n in range(rows)], torn
        assert kept[rows:] in ([], [checkpoint_row(rows)]), torn
        checkpoint.append(checkpoint_row(9))
        checkpoint.close()
        assert rows_in(path) == [*kept, checkpoint_row(9)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, "not a checkpoint") for text in ("hello", "", "[1, 2]", "null", '{"results": []}')),
        ("[" * 100_000, "not a checkpoint"),
        ('{"schema": 99,\n"settings": {},\n"results": []}', "schema 99"),
        (
            '{"schema": 2,\n"settings": {"model": "m", "seed": 7},\n"results": [\n]}\n',
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


def count_experiments(monkeypatch, tokens, stop_after=None):
    """Count experiments, without warm-up; Ctrl-C in place of the one after `stop_after` of them."""
    real, done = bh.BHExperimentRunner._run, []

    def run(runner, name, config, prompts, max_new_tokens, sample):
        if max_new_tokens == tokens:
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(name)
        return real(runner, name, config, prompts, max_new_tokens, sample)

    monkeypatch.setattr(bh.BHExperimentRunner, "_run", run)
    return done


SUITE = {**CONFIGS, "bh_loose": bh.ROUTING_CONFIGS["bh_loose"]}


@pytest.fixture(scope="module")
def uninterrupted(mock_model, tmp_path_factory):
    """The frame and the folder of 3 configurations x 3 prompts, run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return mock_runner(mock_model, folder).run_full_experiment_suite(SUITE, PROMPTS, 6), folder


@pytest.mark.parametrize("finished", [0, 1, 5, 8])
def test_resume_after_ctrl_c(mock_model, tmp_path, monkeypatch, uninterrupted, finished):
    """Interrupted and resumed equals uninterrupted; nothing is run twice; the model is clean after Ctrl-C."""
    shutil.copy(uninterrupted[1] / "calibration.safetensors", tmp_path)
    before = state_of(mock_model)
    with monkeypatch.context() as patch:
        first = count_experiments(patch, 6, stop_after=finished)
        with pytest.raises(KeyboardInterrupt):
            mock_runner(mock_model, tmp_path).run_full_experiment_suite(SUITE, PROMPTS, 6)
    assert len(first) == finished
    assert state_of(mock_model) == before
    second = count_experiments(monkeypatch, 6)
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(SUITE, PROMPTS, 6)
    assert len(second) == 9 - finished
    assert_same_results(frame, uninterrupted[0])
    saved = [bh.read_results(folder / "bh_routing_results.csv") for folder in (tmp_path, uninterrupted[1])]
    assert_same_results(*saved)


def test_finished_work_is_not_run_again(mock_model, tmp_path, monkeypatch, uninterrupted):
    """The same suite again runs nothing, a larger one what is new, and without resume everything."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[1], folder)
    calls = []
    real = mock_model.generate
    monkeypatch.setitem(mock_model.__dict__, "generate", lambda **kwargs: calls.append(1) or real(**kwargs))
    frame = mock_runner(mock_model, folder).run_full_experiment_suite(SUITE, PROMPTS, 6)
    assert not calls
    pd.testing.assert_frame_equal(frame, uninterrupted[0])
    monkeypatch.undo()
    done = count_experiments(monkeypatch, 6)
    more = mock_runner(mock_model, folder).run_full_experiment_suite(
        SUITE | {"topk_2": {"method": "topk", "k": 2}}, PROMPTS, 6
    )
    assert (len(more), len(done)) == (12, 3)
    fresh = mock_runner(mock_model, folder).run_full_experiment_suite(SUITE, PROMPTS, 6, resume=False)
    assert len(done) == 3 + 9
    assert_same_results(fresh, frame)
    assert len(list((folder / "checkpoints").glob("*.json"))) == 1
    assert (folder / "earlier_1" / "checkpoints" / "latest_checkpoint.json").exists()


def test_save_checkpoint_by_hand(mock_model, tmp_path):
    """Harmless at any time: before a suite, where there is nothing to save, and after it."""
    runner = mock_runner(mock_model, tmp_path)
    runner._save_checkpoint()
    runner.run_full_experiment_suite({"bh_flat": FLAT}, PROMPTS[:1], 2)
    runner._save_checkpoint()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 7}, "max_new_tokens is 6 there, 7 here"), ({"seed": 3}, "seed is 0 there, 3 here"),
     ({"configs": {**SUITE, "bh_flat": {**FLAT, "alpha": 0.25}}}, "alpha = 0.5, now it is 0.25"),
     ({"prompts": [{**PROMPTS[0], "text": "other"}]}, "topk_8 x one, run with another text"),
     ({"model": "other weights"}, "model is")],
)  # fmt: skip
def test_other_runs_results_are_refused(mock_model, tmp_path, uninterrupted, change, message):
    """Other settings, weights, configuration or prompt under the same name: refused, untouched."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[1], folder)
    path = folder / "checkpoints" / "latest_checkpoint.json"
    before = path.read_bytes()
    model = mock_model
    if "model" in change:
        model = copy.deepcopy(mock_model)
        model.layers[2].experts.up.data += 1e-3
    runner = mock_runner(model, folder, seed=change.get("seed", 0))
    asked = (change.get("configs", SUITE), change.get("prompts", PROMPTS), change.get("tokens", 6))
    with pytest.raises(bh.UserError, match=message):
        runner.run_full_experiment_suite(*asked)
    assert path.read_bytes() == before


def test_exit_codes(tiny_folder, tmp_path, monkeypatch, capsys):
    """0 done, 1 when an experiment failed, 130 after Ctrl-C with a hint how to go on; never a traceback."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "ROUTING_CONFIGS", CONFIGS)
    monkeypatch.setattr(bh, "TEST_PROMPTS", PROMPTS[:2])
    with monkeypatch.context() as patch:

        def interrupt(*args):
            raise KeyboardInterrupt

        patch.setattr(bh.BHExperimentRunner, "_run", interrupt)
        assert cli(tiny_folder, tmp_path, "--max-tokens", 2) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert cli(tiny_folder, tmp_path, "--max-tokens", 2) == 0
    monkeypatch.setattr(bh, "TEST_PROMPTS", [*PROMPTS[:2], {"id": "long", "text": "x" * 800}])
    assert cli(tiny_folder, tmp_path, "--max-tokens", 2) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert bh.logger.handlers == []


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
    assert cli(tiny_folder, tmp_path / "out", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message.replace("{file}", str(file)) in lines[0]
    assert file.read_text() == "keep me"


# ---------------------------------------------------------------------------------------------------------
# 8. Drift
# ---------------------------------------------------------------------------------------------------------


def test_requirements_equal_script_header():
    """The PEP 723 block of the script lists the runtime part of requirements.txt."""
    header = re.search(
        r"^# dependencies = \[\n(.*?)^# \]", (HERE / "run_bh_experiments.py").read_text(), re.M | re.S
    )
    runtime = (HERE / "requirements.txt").read_text().split("\n#")[0]
    assert re.findall(r'"(.+?)"', header[1]) == runtime.split()


def test_manual_names_everything():
    """Every option, column, plot and configuration stands in the manual; README.md is the same file."""
    manual = (HERE / "README_BH_EXPERIMENTS.md").read_text(encoding="utf-8")
    options = [
        option
        for action in bh.build_parser()._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    ]
    wanted = [*options, *bh.RESULT_COLUMNS, *bh.PLOTS, *bh.ROUTING_CONFIGS, *bh.P_VALUES]
    assert [name for name in wanted if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", manual)] == []
    assert (HERE / "README.md").resolve() == HERE / "README_BH_EXPERIMENTS.md"


def test_troubleshooting_covers_every_message():
    """Each error and warning in the script is found by the words of a row of the manual's table."""
    manual = (HERE / "README_BH_EXPERIMENTS.md").read_text(encoding="utf-8")
    table = manual.split("## Troubleshooting")[1].split("\n## ")[0]
    words = [word for row in table.splitlines() for word in re.findall("`([^`]+)`", row.split(" | ")[0])]
    patterns = [".*".join(re.escape(part) for part in word.split("...")) for word in words]
    tree, messages = ast.parse(Path(bh.__file__).read_text(encoding="utf-8")), []

    def text(node, local):  # of a message, with X for what is known at run time only
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part, local) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return text(node.value, local)
        if isinstance(node, ast.Constant):
            return str(node.value)
        return text(local[node.id], local) if getattr(node, "id", None) in local else "X"

    def strings(body):  # name -> what is assigned to it, where that is a text
        pairs = []
        for node in ast.walk(body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                pairs += zip(node.targets[0].elts, getattr(node.value, "elts", ()), strict=False)
            elif isinstance(node, ast.Assign):
                pairs.append((node.targets[0], node.value))
        return {name.id: value for name, value in pairs if isinstance(name, ast.Name)
                and isinstance(value, ast.JoinedStr | ast.Constant)}  # fmt: skip

    constants = strings(ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], []))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        local = constants | strings(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *("UserError", "FloatingPointError", "logger.warning", "logger.error"),
            ):
                messages.append(text(node.args[0], local))
    assert len(messages) > 70
    unnamed = ("error: X", "X X: X")  # what stands in them has a row of its own, or comes from the system
    missing = [m for m in messages if m not in unnamed and not any(re.search(p, m) for p in patterns)]
    assert not missing, missing


def test_contents_match_rulers():
    """Contents and rulers of the script agree."""
    source = (HERE / "run_bh_experiments.py").read_text()
    contents = re.findall(r"^    (\d+)   ?(.+?)(?:  +.*)?$", bh.__doc__, re.M)
    rulers = re.findall(r"^# -{90,}\n# (\d+)\. (.+)\n# -{90,}$", source, re.M)
    assert [number for number, _ in contents] == [number for number, _ in rulers]


# ---------------------------------------------------------------------------------------------------------
# 9. The embedded model
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A runner of the embedded model, calibrated on as much text as a real run."""
    runner = bh.BHExperimentRunner(
        str(EMBEDDED), tmp_path_factory.mktemp("mini"), device="cpu", use_fp16=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bh, "CALIBRATION_SEQUENCES", 32)
        patch.setattr(bh, "CALIBRATION_LENGTH", 128)
        yield runner


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
    assert (frame["status"] == "ok").all()
    frame = frame[frame["config_name"] != "topk_8"]  # what they are compared with
    strict, moderate, loose = frame.groupby("config_name", sort=False)["avg_experts_per_token"].mean()
    assert 1.5 < strict < moderate < loose < 7.8
    assert (frame["floor_frac"] < 0.9).all()
    assert (frame["cap_frac"] < 0.9).all()


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
# 9. Quality, controls and the verdict
# ---------------------------------------------------------------------------------------------------------


def plain_nll(model, ids, context):
    """transformers' own loss over the tokens after `context`."""
    labels = ids.clone()
    labels[:, :context] = -100
    with torch.inference_mode():
        return model(input_ids=ids, labels=labels).loss.item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A runner on a tiny real OLMoE."""
    folder = tmp_path_factory.mktemp("tiny")
    return bh.BHExperimentRunner("tiny", folder, model=build("olmoe-grouped_mm"), tokenizer=byte_tokenizer())


SCORED = {"id": "scored", "text": "The river is", "reference": " wide and slow in the plain."}
RULES = {
    "topk_4": {"method": "topk", "k": 4},
    "topk_2": {"method": "topk", "k": 2},
    "bh": {"method": "bh", "alpha": 0.3, "max_k": 4, "p_values": "flat"},
    "by": {"method": "by", "alpha": 0.3, "max_k": 4, "p_values": "flat"},
    "top_p": {"method": "top_p", "p": 0.6, "max_k": 4},
    "min_p": {"method": "min_p", "ratio": 0.3, "max_k": 4},
    "threshold": {"method": "threshold", "threshold": 0.1, "max_k": 4},
}


def test_scores_agree_with_an_independent_computation(tiny):
    """NLL is transformers' own loss; the baseline is at KL 0 from itself; KL is the textbook sum."""
    ids = torch.tensor([byte_tokenizer()(SCORED["text"] + SCORED["reference"])["input_ids"]])
    context = len(byte_tokenizer()(SCORED["text"])["input_ids"])
    rows = {name: tiny.run_single_experiment(name, config, SCORED, 4) for name, config in RULES.items()}
    own = rows["topk_4"]
    assert own["reference_nll"] == pytest.approx(plain_nll(tiny.model, ids, context), abs=1e-4)
    assert own["repeat_reference_nll"] == own["reference_nll"]
    assert (own["kl_to_baseline"], own["top1_agreement"], own["tokens_until_divergence"]) == (0, 1, 4)
    assert own["reference_tokens"] == own["reference_bytes"] == len(SCORED["reference"])
    assert own["reference_perplexity"] == pytest.approx(math.exp(own["reference_nll"]))
    assert own["bits_per_byte"] == pytest.approx(own["reference_nll"] / math.log(2))
    curve = {int(k): nll for k, nll in json.loads(own["static_nll"]).items()}
    assert set(curve) == {1, 2, 3}
    assert curve[2] == rows["topk_2"]["reference_nll"]
    base = logits_of(tiny.model, ids)[0, context - 1 : -1].double().log_softmax(-1)
    with bh.patched_routing(tiny.model, RULES["bh"]):
        other = logits_of(tiny.model, ids)[0, context - 1 : -1].double().log_softmax(-1)
    kl = (base.exp() * (base - other)).sum(-1).mean().item()
    assert rows["bh"]["kl_to_baseline"] == pytest.approx(kl, abs=1e-5)
    assert rows["bh"]["kl_to_baseline"] > 1e-4


@pytest.mark.parametrize("name", ["bh", "by", "top_p", "min_p", "threshold"])
def test_rules_count_what_they_say(name):
    """Each rule against its definition in a loop over tokens, experts ranked by gate."""
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(3)) * 2
    config = bh.resolve_config(name, RULES[name] | {"max_k": 16})
    critical = bh.critical_scores(config, 16, 0, None)
    counts = bh.counting_rule(config, critical)(bh.gate_scores(logits))
    for row, count in zip(logits.double().softmax(-1).tolist(), counts.tolist(), strict=True):
        q = sorted(row, reverse=True)
        if name in ("bh", "by"):
            alpha = 0.3 / (sum(1 / k for k in range(1, 17)) if name == "by" else 1)
            expected = max([k for k in range(1, 17) if (1 - q[k - 1]) ** 15 <= k * alpha / 16], default=0)
        elif name == "top_p":
            expected = next(k for k in range(1, 17) if sum(q[:k]) >= 0.6)
        elif name == "min_p":
            expected = sum(value >= 0.3 * q[0] for value in q)
        else:
            expected = sum(value >= 0.1 for value in q)
        assert count == expected


def test_shuffle_keeps_the_counts_and_moves_them(tiny):
    """A shuffled rule has the same histogram of counts in every layer, on other tokens."""
    ids = sample_ids(1, 60) % 250 + 1
    plain, shuffled = RULES["top_p"], RULES["top_p"] | {"shuffle": True}
    with bh.patched_routing(tiny.model, plain) as first:
        one = logits_of(tiny.model, ids)
    with bh.patched_routing(tiny.model, shuffled) as second:
        other = logits_of(tiny.model, ids)
    with bh.patched_routing(tiny.model, shuffled):
        assert torch.equal(logits_of(tiny.model, ids), other)
    assert torch.equal(first.total().counts[0], second.total().counts[0])
    assert not torch.allclose(one, other)


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

    by_target = {t: sums({"method": "topk", "k": 2, "renormalize": t}) for t in bh.RENORMALIZE}
    torch.testing.assert_close(by_target["sum"], torch.ones_like(by_target["sum"]))
    torch.testing.assert_close(by_target["topk_mass"], sums({"method": "topk", "k": 4}))
    assert torch.allclose(by_target["model"], by_target["sum"]) == own


def test_match_experts(tiny):
    """Every adaptive rule reaches the asked-for mean on the calibration text, or says what it can reach."""
    for name, target in {"by": 1.4, "bh": 1.9, "top_p": 2.5, "min_p": 2.5, "threshold": 2.5}.items():
        config = bh.match_experts(name, RULES[name], target, tiny.calibration)
        counts = []
        for index, logits in enumerate(tiny.calibration.logits):
            critical = bh.critical_scores(config, 16, index, None)
            counts.append(
                bh.counting_rule(config, critical)(bh.gate_scores(logits)).clamp(1, 4).double().mean()
            )
        assert torch.stack(counts).mean().item() == pytest.approx(target, abs=0.06)
    with pytest.raises(bh.UserError, match="bh can keep .* to 4.00 experts"):
        bh.match_experts("bh", RULES["bh"], 6, tiny.calibration)
    with pytest.raises(bh.UserError, match="jumps over it"):
        bh.match_experts("bh", RULES["bh"], 3, tiny.calibration)
    assert bh.match_experts("topk_2", RULES["topk_2"], 6, tiny.calibration)["k"] == 2


def test_text_windows_are_those_of_rolling_log_likelihood(tiny, tmp_path):
    """Windows cover every token once, with one token of context, and their NLL is a plain forward pass."""
    text = "The quick brown fox jumps over the lazy dog. " * 5
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Short but long enough to be a window.", encoding="utf-8")
    items = bh.text_windows([tmp_path], tiny.tokenizer, 32)
    assert {item["document"] for item in items} == {"b.txt", "sub/a.txt"}
    ids = tiny.tokenizer(text)["input_ids"]
    windows = [item["token_ids"].tolist() for item in items if item["document"] == "sub/a.txt"]
    assert [token for window in windows for token in window[1:]] == ids[: sum(len(w) - 1 for w in windows)]
    assert [window[0] for window in windows] == [0, *ids[31:-1:32]][: len(windows)]
    frame = tiny.run_full_experiment_suite({n: RULES[n] for n in ("topk_4", "bh")}, items, resume=False)
    assert (frame["status"] == "ok").all()
    assert (frame["generated_text"] == "").all()
    row = frame[(frame["document"] == "sub/a.txt") & (frame["config_name"] == "topk_4")].iloc[1]
    assert row["reference_nll"] == pytest.approx(
        plain_nll(tiny.model, torch.tensor([windows[1]]), 1), abs=1e-4
    )
    assert (frame["avg_experts_per_token"] == frame["reference_avg_experts"]).all()
    analysis = bh.write_report(frame, tmp_path / "out")
    assert analysis["verdict"]["bh"]["n_units"] == 2
    assert not (tmp_path / "out" / "plots" / "inference_time_comparison.png").exists()


def test_perplexity_equals_lm_evaluation_harness(tiny, tmp_path):
    """The same text and windows give the harness's rolling log-likelihood, an optional dependency."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    text = "The quick brown fox jumps over the lazy dog; "[:32] * 6  # one token a byte: six whole windows
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    items = bh.text_windows([tmp_path / "a.txt"], tiny.tokenizer, 32)
    rows = [tiny.run_single_experiment("topk_4", RULES["topk_4"], item) for item in items]
    total = sum(row["reference_nll"] * row["reference_tokens"] for row in rows)
    model = harness.HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, max_length=32, batch_size=1)
    (expected,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert math.exp(total / 192) == pytest.approx(math.exp(-expected / 192), rel=1e-3)


def test_diagnosed_nulls(tiny):
    """On the calibration text itself the empirical null is uniform and its FDP is at most about alpha."""
    report = bh.diagnose_nulls(tiny.calibration, tiny.calibration)
    assert max(report["nulls"]["empirical"]["ks"]) < 0.01
    for row in report["nulls"]["empirical"]["alphas"]:
        assert row["realised_fdp"] <= row["alpha"] * 1.1 + 0.01
    assert max(report["nulls"]["flat"]["ks"]) > 0.1
    import matplotlib

    matplotlib.use("Agg")
    left, right = bh.plot_null_calibration(report)
    layers = [line for null in report["nulls"].values() for line in null["layers"]]
    assert len(left.get_lines()) == len(layers) + 1
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["empirical", "flat", "alpha"]


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
    first, *others = (bh.load_prompts(tmp_path / f"p.{kind}") for kind in ("json", "jsonl", "csv", "txt"))
    assert others[:2] == [first, first]
    assert [prompt["text"] for prompt in others[2]] == ["One, two", "Three"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--suite", "frontir"], 'Did you mean "frontier"'),
     (["--configs", "bh_strct"], 'Did you mean "bh_strict"'),
     (["--match-experts", "9"], "can keep"), (["--window", "0"], "--window 0"),
     (["--text", "nowhere.txt"], "nowhere.txt"),
     (["--prompts", "x.txt", "--text", "y.txt"], "exclude each other"),
     (["--tasks", ""], "--tasks is empty"), (["--configs", ""], "--configs is empty"),
     (["--routing-configs", "nowhere.json"], "--routing-configs nowhere.json: [Errno 2]")],
)  # fmt: skip
def test_bad_options(tiny_folder, tmp_path, capsys, arguments, message):
    """Mistakes on the command line are one line and exit code 2."""
    base = ["--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert bh.main([*base, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_own_configurations(tmp_path):
    """--routing-configs adds to the suite, and --configs picks from both."""
    path = tmp_path / "own.json"
    path.write_text('{"mine": {"method": "top_p", "p": 0.3}}')
    parse = bh.build_parser().parse_args
    assert list(bh.choose_configs(parse(["--routing-configs", str(path)]))) == [*bh.ROUTING_CONFIGS, "mine"]
    chosen = bh.choose_configs(parse(["--routing-configs", str(path), "--configs", "mine, topk_3"]))
    assert list(chosen) == ["mine", "topk_3"]
    assert {len(bh.choose_configs(parse(["--suite", name]))) for name in bh.suites()} == {5, 24, 20, 36}


def quality_frame(columns, experts, tokens=None, documents=None):
    """Result rows from configuration -> NLL per item and configuration -> experts (one or per item)."""
    parts = []
    for name, nll in columns.items():
        n, static = len(nll), name.startswith("topk")
        ids = [f"p{i}" for i in range(n)]
        parts.append(
            pd.DataFrame(
                {
                    "config_name": name,
                    "prompt_id": ids,
                    "document": ids if documents is None else documents,
                    "status": "ok",
                    "method": "topk" if static else "bh",
                    "k": float(name.split("_")[1]) if static else math.nan,
                    "renormalize": "model",
                    "static_nll": "",
                    "reference_nll": nll,
                    "reference_tokens": 100 if tokens is None else tokens,
                    "reference_avg_experts": experts[name],
                    "kl_to_baseline": 0.01,
                    "top1_agreement": 0.9,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def simulated(seed, effect=0.0, n=40):
    """Item effects shared by all; static Top-4 and Top-5; `bh` between them experts vary by item."""
    rng = np.random.default_rng(seed)
    item, sensitivity, experts = rng.normal(3, 0.4, n), rng.normal(1, 0.3, n), rng.normal(4.4, 0.2, n)
    loss = {"topk_4": 0.023, "topk_5": 0.009}
    columns = {name: item + x * sensitivity + rng.normal(0, 0.003, n) for name, x in loss.items()}
    on_curve = 0.023 - (experts - 4) * (0.023 - 0.009)  # what static Top-K would lose at these experts
    columns["bh"] = item + on_curve * sensitivity + rng.normal(0, 0.008, n) + effect
    return quality_frame(columns, {"topk_4": 4.0, "topk_5": 5.0, "bh": experts})


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


def test_paired_test_against_direct_computation():
    x = np.random.default_rng(2).gamma(2, 0.01, 30) - 0.015
    found = bh.paired_test(x, margin=0.02)
    error = stats.sem(x)
    half = stats.t.ppf(0.975, 29) * error
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx((x.mean() - half, x.mean() + half))
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(abs(x.mean() / error), 29))
    assert found["cohens_d"] == pytest.approx(x.mean() / x.std(ddof=1))
    one_sided = (stats.t.sf((x.mean() + 0.02) / error, 29), stats.t.cdf((x.mean() - 0.02) / error, 29))
    assert found["equivalence_p_value"] == pytest.approx(max(one_sided))
    assert found["equivalence_p_value"] < 0.05 < bh.paired_test(x, margin=0.001)["equivalence_p_value"]
    shift = found["smallest_detectable"] / error  # its power by the noncentral t
    assert stats.nct.sf(stats.t.ppf(0.975, 29), 29, shift) == pytest.approx(0.80, abs=0.01)


@pytest.mark.parametrize(
    ("units", "reason"), [([], "not 0"), ([0.1], "not 1"), ([0.0] * 5, "nothing"), ([0.1] * 5, "same amount")]
)
def test_degenerate_differences_have_a_reason_and_no_numbers(units, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bh.paired_test(units, margin=0.01)
    assert reason in found["reason"]
    assert all(found[key] is None for key in ("ci95_low", "p_value", "equivalence_p_value"))


@pytest.mark.parametrize("units", [[0.1, 0.2], [0.0, 0.0, 0.1], [0.1, 0.1, -0.1], [0.0] * 9 + [1.0]])
def test_small_and_tied_samples_give_finite_numbers_without_warnings(units):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bh.paired_test(units, margin=0.01)
    assert found["ci95_low"] <= found["mean_difference"] <= found["ci95_high"]
    json.dumps(found, allow_nan=False)


def static_curve(frame):
    items = bh.scored_items(frame)
    return {int(name.removeprefix("topk_")): rows for name, rows in items.items() if name != "bh"}


def test_static_curve_is_interpolated_and_never_extrapolated():
    columns = {"topk_3": [3.0, 5.0], "topk_4": [2.0, 3.0], "topk_8": [1.0, 2.0], "bh": [9.0, 9.0]}
    frame = quality_frame(columns, {"topk_3": 3.0, "topk_4": 4.0, "topk_8": 8.0, "bh": 3.0})
    curve = static_curve(frame.sample(frac=1, random_state=0))
    nll, mixture = bh.static_at(curve, 3.75)
    assert mixture == (3, 4, 0.75)
    assert nll.to_dict() == {"p0": 2.25, "p1": 3.5}
    assert bh.static_at(curve, 8.0)[1] == (8, 8, 0.0)
    assert bh.static_at(curve, 8.0)[0].to_dict() == {"p0": 1.0, "p1": 2.0}
    for outside in (2.9, 8.1):
        nll, reason = bh.static_at(curve, outside)
        assert nll is None
        assert "3.00 to 8.00" in reason
    assert "between Top-4 and Top-8" in bh.static_at(curve, 5.0)[1]  # a gap is not bridged
    assert bh.static_at({8: curve[8]}, 5)[1].endswith("8.00 only")
    assert bh.static_at({}, 5)[1].startswith("no static")


def test_verdict_pairs_by_id_and_leaves_incomplete_items_out():
    tokens = np.random.default_rng(0).integers(50, 120, 40)
    frame = simulated(3, effect=-0.02).assign(reference_tokens=list(tokens) * 3)
    keep = ~frame["prompt_id"].isin(["p1", "p2", "p3"])
    expected = bh.quality_verdicts(frame[keep], "topk_5")["bh"]
    broken = frame.sample(frac=1, random_state=1).reset_index(drop=True)
    at = {name: (broken["config_name"] == name) for name in ("bh", "topk_4", "topk_5")}
    broken.loc[at["bh"] & (broken["prompt_id"] == "p1"), "status"] = "error"
    broken.loc[at["topk_4"] & (broken["prompt_id"] == "p2"), "reference_nll"] = math.nan
    broken = broken[~(at["topk_5"] & (broken["prompt_id"] == "p3"))]
    found = bh.quality_verdicts(broken, "topk_5")["bh"]
    assert (found["n_items"], found["n_left_out"], found["verdict"]) == (37, 3, "better")
    for key in ("mean_experts", "delta_nll", "p_value", "perplexity", "delta_to_baseline"):
        assert found[key] == pytest.approx(expected[key])
    own = frame[keep & (frame["config_name"] == "bh")]
    weights = own["reference_tokens"] / own["reference_tokens"].sum()
    assert found["mean_experts"] == pytest.approx((own["reference_avg_experts"] * weights).sum())
    assert found["perplexity"] == pytest.approx(math.exp((own["reference_nll"] * weights).sum()))
    nll, _ = bh.static_at(static_curve(frame[keep]), found["mean_experts"])
    assert found["delta_nll"] == pytest.approx((own.set_index("prompt_id")["reference_nll"] - nll).mean())
    with pytest.raises(bh.UserError, match="twice"):
        bh.quality_verdicts(pd.concat([frame, frame[:1]]), "topk_5")


def test_a_rule_on_the_static_curve_is_exactly_zero_whatever_items_get_more_experts():
    """Items at 4 or at 5 static experts are a static mixture: experts that vary by item are not noise."""
    frame = simulated(0)
    static = {k: frame[frame["config_name"] == f"topk_{k}"] for k in (4, 5)}
    columns = {f"topk_{k}": rows["reference_nll"].to_numpy() for k, rows in static.items()}
    columns["topk_5"] = columns["topk_4"] - 0.01
    wide = np.arange(40) % 3 == 0
    columns["bh"] = np.where(wide, columns["topk_5"], columns["topk_4"])
    experts = {"topk_4": 4.0, "topk_5": 5.0, "bh": np.where(wide, 5.0, 4.0)}
    row = bh.quality_verdicts(quality_frame(columns, experts), "topk_5")["bh"]
    assert row["delta_nll"] == pytest.approx(0, abs=1e-12)
    assert row["reason"] == "nothing differs"


def test_verdicts_that_cannot_be_given_say_why():
    frame = simulated(4)
    high = frame[frame["config_name"] == "bh"].assign(config_name="bh_high", reference_avg_experts=9.0)
    failed = frame[frame["config_name"] == "bh"].assign(config_name="bh_failed", status="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bh.quality_verdicts(pd.concat([frame, high, failed]), "topk_5")
    rows = found
    assert rows["topk_5"]["verdict"] is None
    assert rows["topk_5"]["delta_to_baseline"] == 0
    assert "measured at 4.00 to 5.00" in rows["bh_high"]["reason"]
    assert rows["bh_high"]["delta_to_baseline"] is not None
    assert rows["bh_failed"]["n_items"] == 0
    assert rows["bh_high"]["verdict"] == rows["bh_failed"]["verdict"] == "undecided"
    assert rows["bh"]["p_value_adjusted"] == rows["bh"]["p_value"]  # the only test of the family
    json.dumps(bh.strict_json(found), allow_nan=False)


def test_shuffle_effects():
    """A shuffled configuration is set against its twin item by item, and the report says what came of it."""
    frame = simulated(7)
    frame = frame.assign(**dict.fromkeys(set(bh.CONFIG_FIELDS) - set(frame))).assign(shuffle=False)
    twin = frame[frame["config_name"] == "bh"]
    other = twin["reference_nll"] + 0.03 + np.random.default_rng(0).normal(0, 0.01, len(twin))
    shuffled = twin.assign(config_name="bh_shuffled", shuffle=True, reference_nll=other)
    effects = bh.shuffle_effects(pd.concat([frame, shuffled], ignore_index=True))
    assert effects["bh_shuffled"]["unshuffled"] == "bh"
    assert effects["bh_shuffled"]["mean_difference"] == pytest.approx((other - twin["reference_nll"]).mean())
    (sentence,) = bh._shuffle_sentences({"shuffle_effects": effects})
    assert "`bh_shuffled`, the counts of `bh` given to other tokens: worse" in sentence
    failed = pd.concat([frame, shuffled.assign(status="error")], ignore_index=True)
    assert bh.shuffle_effects(failed) == {}


def test_clustered_items_widen_the_interval():
    frame, document = simulated(5), {f"p{i}": f"d{i // 8}" for i in range(40)}
    shift = frame["prompt_id"].map(document).map({f"d{i}": 0.02 * (i - 2) for i in range(5)})
    frame["reference_nll"] += shift.where(frame["config_name"] == "bh", 0)
    alone = bh.quality_verdicts(frame, "topk_5")["bh"]
    grouped = frame.assign(document=frame["prompt_id"].map(document))
    together = bh.quality_verdicts(grouped, "topk_5")["bh"]
    assert (alone["n_units"], together["n_units"]) == (40, 5)
    assert together["delta_nll"] == pytest.approx(alone["delta_nll"])
    assert together["ci95_high"] - together["ci95_low"] > 1.4 * (alone["ci95_high"] - alone["ci95_low"])


def simulated_verdicts(effect, sets):
    results = [bh.quality_verdicts(simulated(seed, effect), "topk_5") for seed in range(sets)]
    return pd.DataFrame([result["bh"] for result in results])


def test_verdict_is_wrong_in_about_five_percent_and_finds_four_standard_errors():
    without = simulated_verdicts(0.0, sets=120)
    standard_error = without["delta_nll"].std()
    assert abs(without["delta_nll"].mean()) < 3 * standard_error / math.sqrt(120)
    estimated = without["delta_nll"] / without["cohens_d"] / math.sqrt(40)
    assert estimated.mean() == pytest.approx(standard_error, rel=0.1)
    assert (without["verdict"] != "undecided").mean() <= 0.08
    found = simulated_verdicts(-4 * standard_error, sets=40)
    assert (found["verdict"] == "better").mean() > 0.90


@pytest.mark.parametrize("configurations", [0, 1, 30])
def test_quality_plots_show_every_configuration(configurations):
    import matplotlib

    matplotlib.use("Agg")
    frame = simulated(6, n=8)
    rule = frame[frame["config_name"] == "bh"]
    many = [rule.assign(config_name=f"bh_{i}", shuffle=i % 2 == 1) for i in range(configurations)]
    frame = pd.concat([frame[frame["config_name"] != "bh"], *many], ignore_index=True)
    verdicts = bh.quality_verdicts(frame, "topk_5")
    ax = bh.plot_delta_at_equal_compute(frame, verdicts=verdicts)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == [f"bh_{i}" for i in range(configurations)]
    ax = bh.plot_quality_vs_experts(frame, verdicts=verdicts)
    families = [text.get_text() for text in ax.get_legend().get_texts()]
    assert families == ["static Top-K", "bh", "bh, shuffled"][: configurations + 1]
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------------------------------------------------
# 11. Layers, samples, batches, processes, notebooks
# ---------------------------------------------------------------------------------------------------------


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
        assert len({len(item["token_ids"]) for item in items}) > 1
        frames.append(runner.run_full_experiment_suite(BATCH_RULES, items))
    for frame in frames[1:]:
        assert_same_results(frame, frames[0], ["config_name", "prompt_id", "prompt_text", "reference_tokens"])
        pd.testing.assert_frame_equal(
            frame[list(bh.ROUTING_COLUMNS)].astype(float), frames[0][list(bh.ROUTING_COLUMNS)].astype(float)
        )
        for column in ("reference_nll", "kl_to_baseline", "bits_per_byte"):
            assert frame[column].to_numpy(float) == pytest.approx(frames[0][column].to_numpy(float), abs=1e-5)
    used = frames[1].groupby("config_name")["batch_size"].max()
    assert used.to_dict() == {"topk_4": 3, "bh": 3, "bh_shuffled": 1}


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

    items = windows_of(runner.tokenizer, tmp_path / "texts")
    monkeypatch.setattr(model, "forward", forward)
    frame = runner.run_full_experiment_suite({n: RULES[n] for n in ("topk_4", "bh")}, items)
    assert (frame["status"] == "ok").all()
    assert set(frame["batch_size"]) <= {1, 2}
    assert sum(size > 2 for size in sizes) <= 2  # what did not fit is not tried again for each configuration


def test_samples(mock_model, tmp_path):
    """Seeded by prompt and sample: the same again in any order; the global generator is left alone."""
    before = torch.random.get_rng_state()
    names = {"topk_8": CONFIGS["topk_8"], "bh_flat": FLAT}

    def suite(folder, prompts, samples):
        runner = mock_runner(mock_model, tmp_path / folder, sampling={"temperature": 1.5})
        return runner.run_full_experiment_suite(names, prompts, 5, num_samples=samples)

    real, MockTokenizer.decode = MockTokenizer.decode, lambda self, ids, **_: " ".join(map(str, ids.tolist()))
    try:
        frame = suite("a", PROMPTS, 3)
        fewer = suite("b", PROMPTS[::-1], 2)
        more = suite("b", PROMPTS[::-1], 3)
    finally:
        MockTokenizer.decode = real
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (len(frame), len(fewer), len(more)) == (18, 12, 18)
    key = ["config_name", "prompt_id", "sample"]
    same = [one.sort_values(key).reset_index(drop=True) for one in (frame, more)]
    assert_same_results(*same)
    texts = frame[frame["config_name"] == "topk_8"].groupby("prompt_id")["generated_text"].nunique()
    assert (texts == 3).all()
    analysis = bh.analyze_results(frame, tmp_path / "a")
    assert analysis["statistical_tests"]["bh_flat"]["avg_experts_per_token"]["n_pairs"] == len(PROMPTS)
    assert json.loads(frame["sampling"][0]) == {"temperature": 1.5, "top_p": 1.0}


def test_layer_tables(subject, tmp_path, monkeypatch):
    """The tables sum up the rows: means by layer agree with the recorder, shares sum to 1."""
    if subject.kind not in ("mock", "olmoe-eager"):
        pytest.skip("two kinds are enough")
    runner = bh.BHExperimentRunner("m", tmp_path, model=subject.model, tokenizer=subject.tokenizer)
    prompts = [
        {"id": f"{word}{n}", "text": f"{word} " * (4 + n), "category": word}
        for word in ("apple", "river", "=cmd") for n in range(3)
    ]  # fmt: skip
    frame = runner.run_full_experiment_suite(CONFIGS, prompts, 4)
    layers = bh.read_layer_table(tmp_path, "layer_statistics")
    usage = bh.read_layer_table(tmp_path, "expert_usage")
    assert layers["router"].unique().tolist() == [layer.name for layer in subject.layers]
    for name, rows in frame.groupby("config_name"):
        own = layers[layers["config_name"] == name]
        tokens = rows["num_input_tokens"] + rows["num_output_tokens"] - 1
        assert (own["num_tokens"] == tokens.sum()).all() or subject.kind == "mock"  # the mock has no cache
        if subject.kind != "mock":
            expected = np.average(rows["avg_experts_per_token"].astype(float), weights=tokens)
            assert own["avg_experts_per_token"].mean() == pytest.approx(expected)
        with runner.routing(runner._resolve(name, CONFIGS[name])) as stats:
            for prompt in prompts:
                runner.generate(prompt["text"], 4)
        pd.testing.assert_frame_equal(
            stats.summary().reset_index(drop=True), own[list(bh.LAYER_COLUMNS)].reset_index(drop=True),
            check_dtype=False,
        )  # fmt: skip
        assert "<table" in stats._repr_html_()
    assert usage.groupby(["config_name", "prompt_category", "layer"])[
        "share"
    ].sum().to_numpy() == pytest.approx(1)
    entropy = stats.total().use.double() / stats.total().use.sum(1, keepdim=True)
    expected = [stats_entropy(row) for row in entropy.numpy()]
    assert stats.summary()["use_entropy_bits"].tolist() == pytest.approx(expected)
    # Each category is one word said again and again: they cannot use the same experts.
    assert (layers["category_p_value"] < 0.06).all()
    assert (layers["category_divergence_bits"] > 0.05).all()
    only_plots(monkeypatch, "layer_profile", "expert_usage_heatmap")
    analysis = bh.write_report(frame, tmp_path)
    assert set(analysis["layers"]) == set(CONFIGS)
    assert {"layer_profile.png", "expert_usage_heatmap.png"} <= {
        p.name for p in (tmp_path / "plots").iterdir()
    }


def stats_entropy(shares):
    return stats.entropy(shares, base=2)


def test_categories_that_are_alike_do_not_diverge():
    """Under the null the permutation test rejects in about 5 % of cases."""
    generator, small = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        tables = bh.LayerTables({"x": {}}, ["one"], {"a", "b"})
        use = torch.randint(0, 9, (8, 1, 6), generator=generator).float()
        tables.items["x"] = {str(n): ("ab"[n % 2], use[n]) for n in range(8)}
        small += tables._divergence("x")["category_p_value"][0] <= 0.05
    assert small <= 7


def test_padding_is_not_counted(subject):
    """A left-padded batch gives the statistics of its rows one by one."""
    ids, mask = sample_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    config = {**FLAT, "alpha": 0.9}
    if subject.kind == "mock":
        pytest.skip("the mock takes no positions")
    with bh.patched_routing(subject.model, config) as recorder:
        recorder.start(rows=2)
        logits_of(subject.model, ids, mask)
        rows = recorder.statistics()
    assert [row.counts.sum(1).tolist() for row in rows] == [
        [6] * len(subject.layers),
        [10] * len(subject.layers),
    ]
    with bh.patched_routing(subject.model, config) as recorder:
        logits_of(subject.model, ids[:1, 4:])
    assert torch.equal(recorder.total().counts, rows[0].counts)


def test_recorder_forgets_nothing_between_sums(mock_model, monkeypatch):
    """However often it takes its sums, and however it is called, they are the same."""
    ids, seen = sample_ids(1, 6), []
    for calls in (1, 3, 256):
        monkeypatch.setattr(bh.RoutingRecorder, "MAX_CALLS", calls)
        with bh.patched_routing(mock_model, FLAT) as recorder:
            for _ in range(5):
                logits_of(mock_model, ids)
            hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
            mock_model.layers[1].gate(hidden)  # a router by itself
        seen.append(recorder.total().sums)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert seen[0][:, :65].sum(1).tolist() == [30, 33, 30, 30]
    again = bh.RoutingStatistics.unpack(recorder.total().pack(), 4, FLAT)
    assert torch.equal(again.sums, seen[2])


def test_processes_share_the_work(tiny_folder, tmp_path, monkeypatch):
    """Two processes give what one gives; what two began, one finishes."""
    only_plots(monkeypatch)
    options = ["--model", tiny_folder, "--device", "cpu", "--no-fp16", "--max-tokens", "3",
               "--p-values", "flat", "--configs", "topk_8,bh_loose"]  # fmt: skip
    # Without a GPU, --multi_gpu is what makes accelerate start two processes; --cpu starts one.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    script = tmp_path / "script.py"  # without plots, which take most of the time
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(HERE)!r})",
        "import run_bh_experiments as bh",
        "bh.PLOTS = {}",
    )
    script.write_text("\n".join([*lines, "sys.exit(bh.main())"]))
    command = [*launch, script, *options, "--output", tmp_path / "two"]
    process = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("24 experiments, 0 finished already") == 1
    assert "12 experiments taken over from process_1.json" in process.stderr
    assert bh.main([*map(str, options), "--output", str(tmp_path / "one")]) == 0
    frames = [bh.read_results(tmp_path / name / "bh_routing_results.csv") for name in ("two", "one")]
    assert_same_results(*frames)
    folder = tmp_path / "two" / "checkpoints"
    assert [path.name for path in folder.glob("*.json")] == ["latest_checkpoint.json"]
    # As if both had been killed: the second one's rows are still in its own file.
    content = (folder / "latest_checkpoint.json").read_text().splitlines(keepends=True)
    head, rows = content[:3], [line.rstrip(",\n") for line in content[3:-1]]
    for name, part in (("latest_checkpoint", rows[:5]), ("process_1", rows[9:16])):
        (folder / f"{name}.json").write_text("".join(head) + ",\n".join(part) + "\n]}\n")
    with contextlib.closing(
        bh.Checkpoint(folder / "latest_checkpoint.json", json.loads(head[1][11:-2]))
    ) as left:
        assert len(left.places) == 5
    assert bh.main([*map(str, options), "--output", str(tmp_path / "two")]) == 0
    assert "12 finished already" in (tmp_path / "two" / "experiment_log.txt").read_text()
    assert_same_results(bh.read_results(tmp_path / "two" / "bh_routing_results.csv"), frames[1])


def test_another_process_resumes(mock_model, tmp_path, monkeypatch):
    """The second of two processes runs what is left of its share, or what failed of it, into its own file;
    the first takes that over and deletes it."""
    with monkeypatch.context() as patch:
        patch.setattr(bh.BHExperimentRunner, "_run", lambda *_: 1 / 0)
        mock_runner(mock_model, tmp_path).run_full_experiment_suite(SMALL, PROMPTS, 2)
    path = tmp_path / "checkpoints" / "latest_checkpoint.json"
    for own in (4, 0):  # the second time its share is finished
        runner, waits = mock_runner(mock_model, tmp_path), itertools.count(1)

        def wait(runner=runner, waits=waits):
            if next(waits) == 3:  # all are done
                settings = {**runner.settings, "max_new_tokens": 2}
                with contextlib.closing(bh.Checkpoint(path, settings)) as first:
                    for file in sorted(path.parent.glob("process_*.json")):
                        strict_loads(file.read_text())
                        first.take_over(file)

        runner.processes = SimpleNamespace(rank=1, world=2, wait=wait, first_alone=contextlib.nullcontext)
        rows = runner.run_full_experiment_suite(SMALL, PROMPTS, 2, retry_failed=True)
        assert rows["status"].tolist() == ["ok"] * own
        assert [file.name for file in path.parent.glob("*.json")] == [path.name]
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(SMALL, PROMPTS, 2)
    assert (frame["status"] == "ok").sum() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--num-samples", "2"], "needs --do-sample"), (["--sampling-top-p", "0.9"], "needs --do-sample"),
     (["--do-sample", "--sampling-top-p", "0"], r"in \(0, 1\]"),
     (["--do-sample", "--sampling-temperature", "0"], "above 0"),
     (["--dtype", "bfloat16"], "--no-fp16 means"), (["--device-map", "auto"], "exclude each other"),
     (["--num-samples", "0"], "--num-samples 0"), (["--batch-size", "0"], "batch_size 0")],
)  # fmt: skip
def test_contradictory_options(options, message, tiny_folder, tmp_path, capsys):
    assert cli(tiny_folder, tmp_path, *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


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


def test_notebook_snippets_of_the_manual(tmp_path, monkeypatch):
    """Every Python block of the manual runs, in order, as a reader would paste it."""
    for name in ("models", "run_bh_experiments.py"):
        (tmp_path / name).symlink_to(HERE / name)
    monkeypatch.chdir(tmp_path)
    only_plots(monkeypatch, "layer_profile")
    manual = (HERE / "README_BH_EXPERIMENTS.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", manual, re.M | re.S)
    assert len(blocks) >= 3
    space = {}
    for block in blocks:
        exec(compile(block, "manual", "exec"), space)
    assert (tmp_path / "results" / "notebook" / "plots" / "layer_profile.png").exists()


# ---------------------------------------------------------------------------------------------------------
# 12. Every architecture
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


def zero_weights_beyond(k, layer):
    """A native reference for a router whose K is fixed: the model's own experts, weights beyond k are 0."""

    def hook(module, args, output):
        first, weights, indices = output
        return first, weights * (torch.arange(weights.shape[1]) < k), indices

    return layer.router.register_forward_hook(hook)


def check_architecture(model):
    """The invariants of the seam; AssertionError or UserError where one does not hold."""
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    before, layers = logits_of(model, ids), bh.find_moe_layers(model)
    own_k, can_widen = layers[0].own_k, layers[0].knob is not None

    def logits_and_weights():
        """And the first router's weights [T, E]: a norm behind the experts can hide what scales them all."""
        outputs = []
        hook = layers[0].router.register_forward_hook(lambda module, args, output: outputs.append(output))
        with hook:
            logits = logits_of(model, ids)
        first, weights, indices = outputs[0]
        return logits, torch.zeros_like(first, dtype=weights.dtype).scatter(1, indices, weights)

    def routed_logits(config, count):
        with bh.patched_routing(model, config) as recorder:
            logits, weights = logits_and_weights()
        assert (recorder.total().counts[:, count] == ids.numel()).all(), "not that many experts ran"
        return logits, weights

    for config in (fixed(own_k, own_k), {"method": "topk", "k": own_k}):
        assert torch.equal(routed_logits(config, own_k)[0], before), "keeping all changes the logits"
    assert torch.equal(logits_of(model, ids), before), "not restored"

    cases = [(k, own_k) for k in range(1, own_k)]  # k of so many candidates: experts are dropped
    for k, width in cases + [(own_k, own_k + 2), (own_k + 1, own_k + 2)] * can_widen:
        routed, weights = routed_logits(fixed(k, width), k)
        with contextlib.ExitStack() as stack:
            for layer in layers:
                if can_widen:
                    bh._replace(stack, *layer.knob, k)
                else:
                    stack.enter_context(zero_weights_beyond(k, layer))
            native, native_weights = logits_and_weights()
        error, effect = (routed - native).abs().max(), (native - before).abs().max()
        assert error <= 1e-5 * native.abs().max(), f"{k} of {width} is not as native: {error:.1e}"
        assert torch.allclose(weights, native_weights, atol=1e-6), f"{k} of {width}: weights are not native"
        assert k == own_k or effect > 500 * error, f"{k} of {width} hardly matters: {effect:.1e}, {error:.1e}"
    assert torch.equal(logits_of(model, ids), before), "not restored after dropping"

    adaptive = {"method": "threshold", "threshold": 0.15, "min_k": 1, "max_k": own_k}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])  # padded right, and left
    with bh.patched_routing(model, adaptive) as recorder:
        recorder.start(rows=2)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=positions)
        for row, together in enumerate(recorder.statistics()):
            recorder.start()
            logits_of(model, ids[row : row + 1, mask[row].bool()])
            assert torch.equal(recorder.total().use, together.use), "padding changes the routing"
        recorder.start()
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
        assert out.shape == (2, 10)
        counts = recorder.total().counts  # [L, E + 1]
    assert (counts.sum(1) == 2 * (7 + 2)).all()
    assert counts[:, :own_k].sum() > 0, "generate() drops nothing"
    assert torch.equal(logits_of(model, ids), before), "not restored after generate"


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
    assert [(layer.renormalizes, layer.ranked, layer.knob[1]) for layer in layers] == [
        (None, True, "top_k")
    ] * 2


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
        block.gate, model._can_record_outputs = router(128, 64, 8), {"router_logits": MockRouter}
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
# 13. Faults: what happens on borrowed machines, caused for real
# ---------------------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("BH_KILLS", 6))  # random moments to die at; BH_KILLS=50 for a long look
LINES = 3 * KILLS  # of the script, to be interrupted at
SMALL = {"topk_2": {"method": "topk", "k": 2}, "bh": {**FLAT, "max_k": 8}, "bh_2": {**FLAT, "alpha": 0.2}}


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


def in_child(work, stderr=None):
    """Start a copy of this process that does `work` and ends with its exit code; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(stderr or os.devnull, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    os._exit(work())


def ended(pid):
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_rows(path, number, pid):
    while not path.exists() or path.read_bytes().count(b'"crc32"') < number:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended too early"
        time.sleep(0.001)


def kill_series(folder, kills):
    """Kill a small suite at random moments, and in the middle of writes, and resume it until it is complete,
    again and again until `kills` processes died. Returns what was lost: nothing."""
    folder = Path(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, random = MockMoE(top_k=2, layers=2, experts=8, hidden=16).eval(), np.random.default_rng(0)
    report = {"killed": 0, "in a write": 0, "rows lost": 0, "rows twice": 0, "other results": 0, "suites": 0}

    def suite(output, torn=False):
        runner = mock_runner(model, output)
        if torn:
            opened = bh.Checkpoint._open

            def tear(checkpoint):
                opened(checkpoint)
                checkpoint._file = TornFile(checkpoint._file, random)

            bh.Checkpoint._open = tear
        runner.run_full_experiment_suite(SMALL, PROMPTS, 8)
        return 0

    start = time.perf_counter()
    suite(folder / "whole")
    usual = time.perf_counter() - start
    whole = bh.read_results(folder / "whole" / "bh_routing_results.csv")
    while report["killed"] < kills:
        output, seen = folder / f"suite{report['suites']}", set()
        path = output / "checkpoints" / "latest_checkpoint.json"
        while True:
            random.random()  # each child goes on from another state
            torn = report["killed"] < kills and bool(random.integers(2))
            pid = in_child(lambda output=output, torn=torn: suite(output, torn))
            if not torn and report["killed"] < kills:
                time.sleep(random.uniform(0, usual))
                os.kill(pid, signal.SIGKILL)
            how = ended(pid)
            assert how in (0, -signal.SIGKILL), how
            rows = re.findall(rb'^\{"config_name": "(\w+)".*?"prompt_id": "(\w+)".*"crc32": \d+\}',
                              path.read_bytes() if path.exists() else b"", re.M)  # fmt: skip
            report["rows lost"] += len(seen - set(rows))
            report["rows twice"] += len(rows) - len(set(rows))
            seen |= set(rows)
            if how == 0:
                break
            report["killed"] += 1
            report["in a write"] += torn
        report["suites"] += 1
        found = bh.read_results(output / "bh_routing_results.csv")
        report["other results"] += not as_read(found)[STABLE_COLUMNS].equals(as_read(whole)[STABLE_COLUMNS])
    return report


def signal_series(model_folder, folder):
    """Signals, a full disk and a removed folder, each to a real run of the command line: what came of it."""
    import resource

    folder = Path(folder)
    torch.set_num_threads(1)
    vars(bh).update(CALIBRATION, PLOTS={}, ROUTING_CONFIGS=SMALL)
    bh.TEST_PROMPTS = PROMPTS
    report = {}

    def run(output, limit=None):
        def work():
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return cli(model_folder, output, "--max-tokens", 12)

        return in_child(work, stderr=str(output) + ".err")

    def checkpoint(output):
        return output / "checkpoints" / "latest_checkpoint.json"

    def result(name, how, **more):
        output = folder / name
        rows = len(strict_loads(checkpoint(output).read_text())["results"])
        again = ended(run(output))
        frame = bh.read_results(output / "bh_routing_results.csv")
        errors = (folder / f"{name}.err").read_text()
        log = (output / "experiment_log.txt").read_text()
        report[name] = {"exit": how, "rows": rows, "again": again, "all": len(frame), "errors": errors,
                        "log": log, "same": as_read(frame)[STABLE_COLUMNS].equals(whole), **more}  # fmt: skip

    # In this process, which also imports all that the children would import one by one.
    assert cli(model_folder, folder / "whole", "--max-tokens", 12) == 0
    whole = as_read(bh.read_results(folder / "whole" / "bh_routing_results.csv"))[STABLE_COLUMNS]
    size = checkpoint(folder / "whole").stat().st_size
    for name, signals in (("SIGINT", 1), ("SIGTERM", 1), ("SIGINT twice", 2)):
        pid = run(folder / name)
        wait_for_rows(checkpoint(folder / name), 2, pid)
        for _ in range(signals):
            os.kill(pid, getattr(signal, name.split()[0]))
            time.sleep(0.02 * (signals - 1))
        result(name, ended(pid))
    result("full disk", ended(run(folder / "full disk", limit=size // 2)))
    pid = run(folder / "removed folder")
    wait_for_rows(checkpoint(folder / "removed folder"), 2, pid)
    shutil.rmtree(folder / "removed folder")
    result("removed folder", ended(pid))
    return report


def in_fresh_process(call, *arguments):
    """Call a function of this file in a process of its own, where forking is safe; its JSON comes back."""
    code = (
        "import json, sys; import test_bh_experiments as t; "
        f"print(json.dumps(t.{call}(*json.loads(sys.argv[1]))))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments, default=str)],
        cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")


@needs_fork
def test_killed_at_random_moments(tmp_path):
    report = in_fresh_process("kill_series", tmp_path, KILLS)
    print(report)
    assert report["killed"] >= KILLS
    assert report["in a write"] > 0
    assert (report["rows lost"], report["rows twice"], report["other results"]) == (0, 0, 0)


@needs_fork
def test_signals_full_disk_and_removed_folder(tiny_folder, tmp_path):
    """Each ends as documented or survives, keeps every finished row, and the same command completes it."""
    report = in_fresh_process("signal_series", tiny_folder, tmp_path)
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("full disk", 2), ("removed folder", 0)):
        assert report[name]["exit"] == code, report[name]
    # The second signal can come when the first was dealt with already, or while Python itself winds up.
    assert report["SIGINT twice"]["exit"] in (130, 1, -signal.SIGINT)
    for name, found in report.items():
        assert (found["again"], found["all"], found["same"]) == (0, 12, True), (name, found)
        assert found["rows"] == 12 if name == "removed folder" else 1 <= found["rows"] < 12, (name, found)
        assert "Traceback" not in found["errors"] or name == "SIGINT twice", found["errors"]
    assert "same command goes on" in report["SIGINT"]["errors"]
    assert "mend this, then run the same command again" in report["full disk"]["errors"]
    assert "removed while in use" in report["removed folder"]["errors"]


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


def test_a_second_run_is_refused(mock_model, tmp_path, monkeypatch):
    """It says which process holds the folder, and touches nothing."""
    runner, messages = mock_runner(mock_model, tmp_path), []

    def meanwhile(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        other = copy.copy(runner)
        with pytest.raises(bh.UserError, match=f"in use by process {os.getpid()} on") as refused:
            other.run_full_experiment_suite(SMALL, PROMPTS, 2)
        messages.append(str(refused.value))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before

    monkeypatch.setattr(runner, "_warm_up", meanwhile)
    frame = runner.run_full_experiment_suite(SMALL, PROMPTS[:1], 2)
    assert len(messages) == 1
    assert (frame["status"] == "ok").all()
    assert not (tmp_path / "checkpoints" / "holder.txt").exists()


class OutOfMemory(torch.OutOfMemoryError):
    pass


@pytest.mark.parametrize("fault", ["memory", "nan", "inf", "exception"])
@pytest.mark.parametrize("where", ["generation", "scoring"])
def test_a_fault_is_a_row_and_can_be_tried_again(tmp_path, monkeypatch, fault, where):
    """Whatever goes wrong in one prompt: a row says so, the model is healthy, the others are run; the retry
    gives what a run without fault gives; --fail-fast stops at the first."""
    model, real = build("mock"), MockMoE.forward
    before, ids = state_of(model), sample_ids()
    expected = logits_of(model, ids)
    bad = {"id": "bad", "text": "the faulty prompt", "reference": " and its unlucky end"}
    marker = MockTokenizer()("faulty" if where == "generation" else "unlucky")["input_ids"][0]

    def forward(self, input_ids, *arguments, **options):
        output = real(self, input_ids, *arguments, **options)
        patched = any(hasattr(layer.gate, "_bh_patched") for layer in self.layers)
        if patched and (input_ids == marker).any():
            if fault == "memory":
                raise OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")
            if fault == "exception":
                raise Boom("a line\nand another")
            output.logits[..., 5] = math.nan if fault == "nan" else math.inf
        return output

    prompts = [PROMPTS[0], bad, PROMPTS[2]]
    whole = mock_runner(model, tmp_path / "whole").run_full_experiment_suite(CONFIGS, prompts, 3)
    with monkeypatch.context() as patch:
        patch.setattr(MockMoE, "forward", forward)
        runner = mock_runner(model, tmp_path / "out")
        frame = runner.run_full_experiment_suite(CONFIGS, prompts, 3)
        assert frame["status"].tolist() == ["ok", "ok", "error", "error", "ok", "ok"]
        name = {"memory": "OutOfMemory", "exception": "Boom"}.get(fault, "FloatingPointError")
        assert frame["error"].str.startswith(name).sum() == 2
        first = mock_runner(model, tmp_path / "fast").run_full_experiment_suite(
            CONFIGS, prompts, 3, fail_fast=True
        )
        assert first["status"].tolist() == ["ok", "ok", "error"]
    assert state_of(model) == before
    assert torch.equal(logits_of(model, ids), expected)
    again = mock_runner(model, tmp_path / "out").run_full_experiment_suite(CONFIGS, prompts, 3)
    assert again["status"].tolist() == frame["status"].tolist()
    again = mock_runner(model, tmp_path / "out").run_full_experiment_suite(
        CONFIGS, prompts, 3, retry_failed=True
    )
    assert_same_results(again, whole)


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
    for stop in (1, 2, 7, 30, 61, 100):
        runner = mock_runner(mock_model, tmp_path / str(stop))
        calls[:] = [0, stop]
        with pytest.raises(KeyboardInterrupt):
            runner.run_full_experiment_suite(SMALL, PROMPTS, 4)
        calls[:] = [0, 0]
        assert state_of(mock_model) == before
        assert not mock_model._forward_pre_hooks
        assert torch.equal(logits_of(mock_model, ids), expected)


def test_two_threads(mock_model):
    """While one thread has a model patched, another cannot patch it; afterwards it can."""
    before, refused = state_of(mock_model), []

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


def test_interrupted_at_any_line(mock_model):
    """Ctrl-C at any line of the script, patching and putting back included, leaves nothing behind."""
    layers, before, ids = bh.find_moe_layers(mock_model), state_of(mock_model), sample_ids(1, 3)
    expected, lines, random = logits_of(mock_model, ids), [0, 0], np.random.default_rng(0)

    def trace(frame, event, argument):
        if frame.f_code.co_filename != bh.__file__:
            return None
        lines[0] += event == "line"
        if event == "line" and lines[0] == lines[1]:
            raise KeyboardInterrupt
        return trace

    def use(stop, found):
        lines[:], traced = [0, stop], sys.gettrace()
        sys.settrace(trace)
        try:
            with bh.patched_routing(mock_model, FLAT, layers=found):
                logits_of(mock_model, ids)
        finally:
            sys.settrace(traced)
        return lines[0]

    for found in (layers, None):
        for stop in random.choice(use(0, found), LINES, replace=False) + 1:
            with pytest.raises(KeyboardInterrupt):
                use(stop, found)
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in mock_model.modules()), stop
            assert state_of(mock_model) == before, stop
            assert torch.equal(logits_of(mock_model, ids), expected), stop


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
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    assert str(folder) in errors


# ---------------------------------------------------------------------------------------------------------
# 14. Bad and hostile input
# ---------------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("BH_FUZZ", 150))  # inputs for each kind of file; BH_FUZZ=3000 for a long look
fuzzed = settings(
    max_examples=FUZZ, deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
numbers = strategies.floats(width=32) | strategies.sampled_from(
    [0.0, 1e30, -1e30, 1e-30, math.inf, -math.inf, math.nan]
)
settings_of_bh = strategies.fixed_dictionaries({
    "alpha": strategies.sampled_from([1e-30, 1e-6, 0.05, 0.5, 1.0]) | numbers,
    "temperature": strategies.sampled_from([1e-3, 1.0, 1e3]) | numbers,
    "min_k": strategies.integers(-1, 12), "max_k": strategies.integers(-1, 100),
})  # fmt: skip


@fuzzed
@given(
    strategies.lists(strategies.integers(0, 3), max_size=2), strategies.integers(1, 70), settings_of_bh,
    strategies.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    strategies.sampled_from(["normal", "huge", "tiny", "ties", "holes", "bad"]), strategies.integers(0, 99),
)  # fmt: skip
def test_routing_function_on_anything(leading, experts, chosen, dtype, kind, seed):
    """Refused with a UserError, or everything that the docstring promises holds."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(*leading, experts, generator=random, dtype=torch.float64)
    scale = {"huge": 1e4, "tiny": 1e-7}.get(kind, 3.0)
    logits = (logits * scale).round() if kind == "ties" else logits * scale
    if kind in ("holes", "bad") and logits.numel():
        hole = torch.rand(logits.shape, generator=random) < 0.3
        logits = logits.masked_fill(hole, -math.inf)
        if kind == "bad":
            logits.view(-1)[0] = (math.nan, math.inf)[seed % 2]
    logits = logits.to(dtype)
    try:
        weights, selected, number, found = bh.benjamini_hochberg_routing(logits, **chosen, return_stats=True)
    except bh.UserError:
        assert kind in ("holes", "bad") or torch.isinf(logits).any() or chosen["temperature"] < 1e-30 or not (
            0 < chosen["alpha"] <= 1 and 0 < chosen["temperature"] < math.inf
            and 1 <= chosen["min_k"] <= chosen["max_k"]
        )  # fmt: skip
        return
    assert weights.shape == logits.shape
    assert selected.shape == (*leading, chosen["max_k"])
    assert number.shape == tuple(leading)
    allowed = torch.isfinite(logits).sum(-1)
    low, high = (torch.minimum(allowed, torch.tensor(chosen[key])) for key in ("min_k", "max_k"))
    assert ((low <= number) & (number <= high)).all()
    assert torch.equal(
        number, torch.minimum(found["rejections"].clamp(chosen["min_k"], chosen["max_k"]), high)
    )
    assert weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * number.numel(), abs=1e-5)
    assert torch.equal((selected >= 0).sum(-1), number)
    filled = torch.arange(chosen["max_k"]) < number.unsqueeze(-1)
    assert torch.equal(selected >= 0, filled)
    mask = torch.zeros(*leading, experts + 1, dtype=torch.bool).scatter(
        -1, selected.clamp(min=-1) % (experts + 1), True
    )
    mask = mask[..., :experts]
    assert torch.equal(mask.sum(-1), number)  # no expert twice
    assert (weights[~mask] == 0).all()
    scores = bh.gate_scores(logits, chosen["temperature"])  # float32: logits that differ by less are ties
    best_left = scores.masked_fill(mask, -math.inf).amax(-1)
    worst_kept = scores.masked_fill(~mask, math.inf).amin(-1)
    assert (worst_kept >= best_left).all()
    assert ((found["p_values"] >= 0) & (found["p_values"] <= 1)).all()


json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(max_size=12) | strategies.sampled_from([*bh.METHODS, *bh.CONFIG_FIELDS, "text", "id"]),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(
        strategies.sampled_from([*bh.CONFIG_FIELDS, *bh.PROMPT_FIELDS, "document", "token_ids"])
        | strategies.text(max_size=5), inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
prompt_like = strategies.fixed_dictionaries(
    {"text": strategies.text(max_size=8) | json_values},
    optional=dict.fromkeys(
        ("id", "category", "reference", "description", "document", "token_ids"), json_values
    ),
)
config_like = strategies.fixed_dictionaries(
    {"method": strategies.sampled_from([*bh.METHODS]) | json_values},
    optional=dict.fromkeys(bh.FIELDS, json_values),
)


def as_file(kind, value, random):
    """A value as a file of some kind, sometimes with a byte changed, cut off or put in."""
    text = {
        ".json": lambda: json.dumps(value),
        ".jsonl": lambda: "\n".join(map(json.dumps, value if isinstance(value, list) else [value])),
        ".csv": lambda: "\n".join(",".join(map(str, row.values())) if isinstance(row, dict) else str(row)
                                  for row in (value if isinstance(value, list) else [value])),
        ".txt": lambda: str(value),
    }[kind]()  # fmt: skip
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
    strategies.sampled_from([".json", ".jsonl", ".csv", ".txt"]), strategies.integers(0, 2**32),
    strategies.binary(max_size=40) | json_values | strategies.lists(prompt_like, max_size=3),
)  # fmt: skip
def test_prompt_files_of_anything(tmp_path_factory, kind, seed, value):
    path = tmp_path_factory.getbasetemp() / f"fuzz{kind}"
    random = np.random.default_rng(seed)
    path.write_bytes(value if isinstance(value, bytes) else as_file(kind, value, random))
    prompts = accepts_or_explains(lambda: bh.load_prompts(path))
    for prompt in prompts or []:
        assert set(bh.PROMPT_FIELDS) <= set(prompt)
        assert prompt["text"].strip()
        json.dumps(prompt, allow_nan=False).encode()


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
        assert set(config) == {*bh.CONFIG_FIELDS, "description"}


OPTIONS = [action.option_strings[0] for action in bh.build_parser()._actions if action.dest != "help"]
words = strategies.text("ab0-.,:/\n\u202e'\"$", max_size=6) | strategies.sampled_from(
    ["-1", "0", "1", "1e9", "nan", "inf", "auto", "bh_strict", "frontier", "cpu", "", "../x", "*"]
)


@settings(fuzzed, max_examples=FUZZ // 2)
@given(strategies.lists(strategies.tuples(strategies.sampled_from(OPTIONS), words), max_size=5))
def test_command_lines_of_anything(tmp_path_factory, options):
    """Exit code 2 with a message, or 0 where a list was asked for; never an exception."""
    folder = tmp_path_factory.getbasetemp() / "fuzz_cli"
    flags = {a.option_strings[0] for a in bh.build_parser()._actions if a.nargs == 0}
    argv = [part for name, word in options for part in ([name] if name in flags else [f"{name}={word}"])]
    if any(part.startswith(("--tasks", "--dataset", "--list-arch")) for part in argv):
        return  # those that load libraries or print lists have tests of their own
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = bh.main([*argv, "--model", str(folder / "no model"), "--output", str(folder)])
        except SystemExit as stop:  # argparse
            code = stop.code
    assert code == 2, (argv, errors.getvalue())
    assert "error: " in errors.getvalue()
    assert "Traceback" not in errors.getvalue()


HOSTILE = (
    "=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "'=1", "a | b\n| c | d |\n\n# heading",
    "```\ncode\n```", "<script>alert(1)</script><!-- ", "[link](http://x) ![image](http://x/y.png)",
    "\u202egpj.exe \u2066x\u2069 \u200b", "bell \x07 escape \x1b[2J\x1b]0;title\x07 return \r over",
    "2026-01-01 00:00:00,000 ERROR forged\n2026-01-01 00:00:00,000 INFO line", "\x00 NUL",
    "$\\frac{1$ $x^$ \\", "é" * 500_000,
)  # fmt: skip


def test_hostile_texts_get_nowhere(mock_model, tmp_path, monkeypatch, caplog):
    """Prompts, categories and answers are data in CSV, report, log and plots, whatever they hold."""
    answers = itertools.cycle(HOSTILE)
    monkeypatch.setattr(MockTokenizer, "decode", lambda self, ids, **ignored: next(answers))
    prompts = [
        {"id": text[:60], "text": f"{text} x", "category": text[:60], "description": text, "reference": text}
        for text in HOSTILE
    ]  # fmt: skip
    runner = mock_runner(mock_model, tmp_path, command="run '\n# forged")
    with bh.log_to(tmp_path / "experiment_log.txt"):
        frame = runner.run_full_experiment_suite(CONFIGS, prompts, 2)
    shown = [text.replace("\0", "\u2400") for text in HOSTILE]
    assert frame["prompt_id"].tolist() == [text[:60] for text in shown for _ in CONFIGS]
    assert frame["prompt_text"].tolist() == [f"{text} x" for text in shown for _ in CONFIGS]
    assert set(frame["generated_text"]) <= set(shown)
    with (tmp_path / "bh_routing_results.csv").open(newline="", encoding="utf-8") as file:
        csv.field_size_limit(10**8)
        rows = list(csv.reader(file))
    assert not [cell for row in rows for cell in row if re.match(r"[=+@\t\r]|-[^\d]", cell)]
    only_plots(monkeypatch, "experts_by_category", "avg_experts_comparison")
    bh.write_report(frame, tmp_path)
    report = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert all(len(widths) == 1 for widths in table_widths(report))
    log = (tmp_path / "experiment_log.txt").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("ids", [[], [5], [1.5, 2.0], "text", [[1, 2]], None, ["a", "b"]])
def test_token_ids(mock_model, tmp_path, ids):
    """A list is as good as an array; anything else is refused before anything runs."""
    with pytest.raises(bh.UserError, match="token_ids must be"):
        bh.resolve_prompt({"id": "x", "text": "", "token_ids": ids})
    listed, array = (
        mock_runner(mock_model, tmp_path).run_single_experiment(
            "bh", FLAT, {"text": "", "id": "x", "token_ids": x}
        )
        for x in ([1, 7, 9, 4], np.array([1, 7, 9, 4]))
    )  # fmt: skip
    assert listed["reference_nll"] == array["reference_nll"] > 0


def test_bytes_that_are_no_text(tmp_path, capsys):
    for option, name in (("--prompts", "p.txt"), ("--text", "t.txt"), ("--routing-configs", "c.json")):
        (tmp_path / name).write_bytes(b"caf\xe9 \xff\xfe")
        arguments = [option, str(tmp_path / name), "--model", str(EMBEDDED), "--output", str(tmp_path / "o")]
        assert bh.main(arguments) == 2
        assert str(tmp_path / name) in capsys.readouterr().err


def test_nothing_is_executed():
    """The script neither evaluates text nor unpickles, and starts one program: git, for its own version."""
    tree, forbidden = (
        ast.parse(Path(bh.__file__).read_text(encoding="utf-8")),
        {"pickle", "marshal", "shelve"},
    )
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
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert str(folder) in errors[0]
    assert "safetensors" in errors[0]
    assert not (tmp_path / "ran").exists()


def test_files_are_as_private_as_the_system_says(mock_model, tmp_path):
    before = os.umask(0o077)
    try:
        mock_runner(mock_model, tmp_path / "out").run_full_experiment_suite(CONFIGS, PROMPTS[:1], 2)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert not [path for path in files if path.stat().st_mode & 0o077]


def test_the_same_command_gives_the_same_bytes(tiny_folder, tmp_path, monkeypatch):
    """Apart from the clock columns, byte for byte; every row says what it came from, the report how."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", bh.TEST_PROMPTS[:2])
    tables = []
    for name in ("one", "two"):
        assert cli(tiny_folder, tmp_path / name, "--max-tokens", 4) == 0
        with (tmp_path / name / "bh_routing_results.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        kept = [i for i, column in enumerate(rows[0]) if column not in bh.CLOCK_COLUMNS]
        tables.append([[row[i] for i in kept] for row in rows])
        usage = [
            (tmp_path / name / f"{file}.csv").read_bytes() for file in ("layer_statistics", "expert_usage")
        ]
        tables[-1].append(usage)
    assert tables[0] == tables[1]
    frame = bh.read_results(tmp_path / "one" / "bh_routing_results.csv")
    known = set(bh.SETTING_COLUMNS) - {"model_revision", "git_commit"}  # of a hub model, of a clone
    for column in [*known, "command"]:
        assert (frame[column].astype(str) != "").all(), column
    assert len(frame["script_hash"][0]) == len(frame["model_hash"][0]) == 16
    report = (tmp_path / "two" / "REPORT.md").read_text()
    assert f"--output {tmp_path / 'two'}".replace("_", "\\_") in report
    for column in bh.SETTING_COLUMNS:
        if str(frame[column][0]) != "" and column not in ("seed", "max_new_tokens", "sampling"):
            assert bh._cell(frame[column][0]) in report, column


# 10. Data sets and downstream tasks
# ---------------------------------------------------------------------------------------------------------

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
     (["--dataset", "d.csv", "--text", "x.txt"], "exclude each other"),
     (["--dataset", "d.csv", "--prompts", "x.txt"], "exclude each other"),
     (["--dataset", "d.csv", "--tasks", "x"], "exclude each other"),
     (["--tasks", "x", "--task-limit", "0"], "--task-limit 0"),
     (["--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot -1"),
     (["--tasks", "x", "--do-sample"], "exclude each other"), (["--task-limit", "3"], "needs --tasks")],
)  # fmt: skip
def test_bad_datasets(options, message, data_folder, tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before a model is loaded."""
    monkeypatch.chdir(data_folder)
    assert cli("nowhere", tmp_path / "out", *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("library", "option"), [("datasets", ["--dataset", "x.csv"]), ("lm_eval", ["--tasks", "x"])]
)
def test_a_missing_library_is_named(library, option, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert cli(tiny_folder, tmp_path, *option) == 2
    assert f"pip install {library}" in capsys.readouterr().err


def test_embedded_model_runs_a_dataset(data_folder, tmp_path):
    options = ["--dataset", data_folder / "d.parquet", "--limit", 3, "--max-tokens", 2, "--configs", "topk_8"]
    assert cli(EMBEDDED, tmp_path, *options) == 0
    frame = bh.read_results(tmp_path / "bh_routing_results.csv")
    assert list(frame["prompt_id"]) == ["d.parquet-0", "d.parquet-2"]
    assert list(frame["full_text"].str.startswith(tuple(DATA["text"].dropna()))) == [True, True]


TASK_YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
fewshot_split: test
doc_to_text: "{{{{{asked}}}}}"
doc_to_target: "{{{{{target}}}}}"
"""
TASKS = ["mini", "mini_text"]  # the first is a group of two
TASK_CONFIGS = {name: bh.suites()["all"][name] for name in ("topk_1", "topk_8")}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Tasks of local data: choosing a continuation, perplexity of texts, generation; and a group."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
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
    frame = task_runner(folder).run_tasks(TASKS, TASK_CONFIGS, **how)
    assert torch.equal(torch.get_rng_state(), before)
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
    alone = simple_evaluate(model, tasks=TASKS, task_manager=TaskManager(include_path=task_folder), **options)
    saved = strict_loads((folder / "task_results.json").read_text())["configurations"]
    together = {task: found for unit in saved["topk_8"].values() for task, found in unit["results"].items()}
    assert together == json.loads(json.dumps(alone["results"], default=float))
    own = frame[frame["config_name"] == "topk_8"].set_index("prompt_id")
    for task, samples in alone["samples"].items():
        for sample in samples:
            row = own.loc[f"{task}:{sample['doc_id']}"]
            if row["task_metric"] == "bits_per_byte":
                total, size = sample["byte_perplexity"]
                assert row["task_score"] == pytest.approx(-total / size / math.log(2), rel=1e-12)
            else:
                assert row["task_score"] == sample[row["task_metric"]]


def test_task_rows(task_run):
    """Documents are paired, differ between configurations, and have the routing they ran with."""
    frame, folder, _ = task_run
    assert_same_results(bh.read_results(folder / "bh_routing_results.csv"), frame)
    assert frame["prompt_category"].value_counts().to_dict() == dict.fromkeys(
        ("mini_choice", "mini_write", "mini_text"), 48
    )
    scores = frame.pivot_table("task_score", "prompt_id", "config_name")
    for task, least in (("mini_choice", 1), ("mini_text", 24)):
        of_task = scores[scores.index.str.startswith(task)]
        assert (of_task["topk_1"] != of_task["topk_8"]).sum() >= least
    assert (frame["avg_experts_per_token"] == frame["config_name"].map({"topk_1": 1, "topk_8": 8})).all()
    assert (frame["generated_text"].fillna("") != "").sum() >= 24
    analysis = bh.write_report(frame, folder)
    report = check_report(folder)
    found = {(entry["task"], entry["configuration"]): entry for entry in analysis["tasks"]}
    one = found["mini_text", "topk_1"]
    difference = scores["topk_1"] - scores["topk_8"]
    assert one["mean_difference"] == pytest.approx(
        difference[scores.index.str.startswith("mini_text")].mean()
    )
    assert one["significant"] is True
    assert one["p_value_adjusted"] >= one["p_value"]
    assert found["mini", "topk_8"]["harness"]["acc,none"]["stderr"] is not None
    assert "`topk_1` on mini\\_text (+" in report
    assert (folder / "plots" / "task_scores.png").exists()


def check_report(folder):
    report = (folder / "REPORT.md").read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|None(?! of their)|inf)\b", report)
    assert all(len(widths) == 1 for widths in table_widths(report))
    return report


def test_tasks_resume_after_ctrl_c(task_folder, tmp_path, monkeypatch):
    """A task under a configuration is not run again; interrupted and resumed equals uninterrupted."""
    how = {"limit": 3, "include_path": task_folder}
    frame = task_runner(tmp_path / "uninterrupted").run_tasks(TASKS, TASK_CONFIGS, **how)
    real, done, stop = bh.BHExperimentRunner._run_task, [], 3

    def run_task(runner, name, config, item, *rest):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append((item["id"], name))
        return real(runner, name, config, item, *rest)

    monkeypatch.setattr(bh.BHExperimentRunner, "_run_task", run_task)
    with pytest.raises(KeyboardInterrupt):
        task_runner(tmp_path).run_tasks(TASKS, TASK_CONFIGS, **how)
    stop = None
    again = task_runner(tmp_path).run_tasks(TASKS, TASK_CONFIGS, **how)
    assert done == list(itertools.product(TASKS, TASK_CONFIGS))
    assert_same_results(again, frame)
    with pytest.raises(bh.UserError, match="limit is 3 there, 5 here"):
        task_runner(tmp_path).run_tasks(TASKS, TASK_CONFIGS, **how | {"limit": 5})


def test_tasks_in_batches(task_run, task_folder, tmp_path):
    """Batches change rounding only; padding hides what was routed, so nothing is recorded."""
    frame, *_ = task_run
    runner = task_runner(tmp_path, batch_size=8)
    batched = runner.run_tasks(["mini_text"], TASK_CONFIGS, include_path=task_folder)
    one = frame[frame["prompt_category"] == "mini_text"]
    assert list(batched["task_score"]) == pytest.approx(list(one["task_score"]), rel=1e-4)
    assert batched["avg_experts_per_token"].isna().all()
    bh.write_report(batched, tmp_path)
    check_report(tmp_path)


def test_a_failed_task_becomes_a_row(task_folder, tmp_path):
    options = ["--tasks", "too_long,mini_text", "--include-path", task_folder, "--task-limit", 2]
    assert cli(EMBEDDED, tmp_path, "--configs", "topk_8", *options) == 1
    frame = bh.read_results(tmp_path / "bh_routing_results.csv")
    assert list(frame["prompt_id"]) == ["too_long", "mini_text:0", "mini_text:1"]
    assert list(frame["status"]) == ["error", "ok", "ok"]
    assert "requested max tokens to generate" in check_report(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("mini_chioce", "unknown task 'mini_chioce' in --tasks; close: mini_choice"),
     ("far_away", "far_away cannot be loaded: ConnectionError: Couldn't reach"),
     ("mini,mini_write", "mini_write is in both mini and mini_write")],
)  # fmt: skip
def test_bad_tasks(tasks, message, task_folder, tiny_folder, tmp_path, capsys):
    assert cli(tiny_folder, tmp_path / "out", "--tasks", tasks, "--include-path", task_folder) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------
# 15. Taken as given: layers, models, numbers, names and options
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mock_calibration(mock_model):
    return bh.calibrate(mock_model, MockTokenizer(), seed=0)


@pytest.mark.parametrize("picked", [(2, 3), (1,), (3, 0)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_some_layers_only(mock_model, mock_calibration, picked, shuffle):
    """Each patched layer uses the nulls and the shuffle of its own index; the others run as they are."""
    config, ids = bh.resolve_config("x", {**EMPIRICAL, "max_k": 8, "shuffle": shuffle}), sample_ids(4, 20)
    layers, before, seen = bh.find_moe_layers(mock_model), logits_of(mock_model, ids), {}
    kinds = [(layer.router, "gate") for layer in layers] + [(layer.experts, "experts") for layer in layers]

    def watch(seen):
        stack = contextlib.ExitStack()
        for number, (module, kind) in enumerate(kinds):
            key = kind, number % len(layers)
            hook = module.register_forward_hook(
                lambda module, args, output, key=key: seen.update({key: (args, output)})
            )
            stack.enter_context(hook)
        return stack

    native = {}
    with watch(native):
        logits_of(mock_model, ids)
    chosen = [layers[index] for index in picked]
    with bh.patched_routing(mock_model, config, mock_calibration, chosen) as recorder, watch(seen):
        logits_of(mock_model, ids)
        for index, layer in enumerate(layers):
            for module in (layer.router, layer.experts):
                assert ("forward" in vars(module)) == (index in picked)
    assert torch.equal(logits_of(mock_model, ids), before)
    for row, index in enumerate(picked):
        logits, weights, _ = seen["gate", index][1]
        critical = bh.critical_scores(config, 64, index, mock_calibration)
        count = bh.count_rejections(bh.gate_scores(logits), critical).clamp(1, 8)
        if shuffle:
            count = count[torch.randperm(len(count), generator=torch.Generator().manual_seed(index))]
        assert torch.equal((weights != 0).sum(-1), count)
        assert recorder.total().counts[row].tolist() == torch.bincount(count, minlength=65).tolist()
        mean = recorder.summary()["avg_experts_per_token"].iloc[row]
        assert mean == pytest.approx(count.double().mean().item())
    assert recorder.summary().index.tolist() == list(picked)
    for index in range(min(picked)):  # what comes before the first patched layer saw the same
        for kind in ("gate", "experts"):
            for found, expected in zip(seen[kind, index], native[kind, index], strict=True):
                assert all(map(torch.equal, found, expected))
    for index in set(range(len(layers))) - set(picked):  # the rest keeps all of the model's own choice
        assert (seen["gate", index][1][1] != 0).all()
    with (
        pytest.raises(bh.UserError, match="layers is empty"),
        bh.patched_routing(mock_model, config, mock_calibration, []),
    ):
        pass


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


def texts_of(model, folder):
    """Calibration text, greedy text and sampled text of a model."""
    tokenizer = byte_tokenizer()
    texts = [bh.sample_calibration_text(model, tokenizer, 3).tolist()]
    for sampling in (None, {"temperature": 1.5}):
        runner = bh.BHExperimentRunner("x", folder, model=model, tokenizer=tokenizer, sampling=sampling)
        texts.append(runner.generate("a small boat on the river", 24))
    return texts


def test_the_models_own_generation_settings_do_not_matter(tmp_path):
    """Neither each by itself nor many at once changes a text; afterwards they are there again."""
    model = build("olmoe-eager")
    usual, expected = model.generation_config, texts_of(model, tmp_path)
    together = ("temperature", "top_p", "min_p", "repetition_penalty", "bad_words_ids", "num_beams")
    cases = [{name: value} for name, value in HOSTILE_GENERATION.items()]
    for case in [*cases, {name: HOSTILE_GENERATION[name] for name in together}]:
        hostile = model.generation_config = copy.deepcopy(usual)
        vars(hostile).update(case)
        assert texts_of(model, tmp_path) == expected, case
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


def test_training_flags_stay(tmp_path):
    """A model that partly trains is looked at, calibrated, patched and run in eval mode, and trains again."""

    def make():
        torch.manual_seed(0)
        model = MockMoE(top_k=4, layers=2, experts=16, hidden=32)
        model.head = nn.Sequential(model.head, nn.Dropout(0.5))
        return model

    def frame_of(model, folder):
        runner = mock_runner(model, folder, seed=1)
        prompts = [{**PROMPTS[0], "reference": "and so they went"}, PROMPTS[1]]
        return runner.run_full_experiment_suite({"topk_4": fixed(4, 4), "bh": EMPIRICAL}, prompts, 3)

    expected = frame_of(make().eval(), tmp_path / "eval")
    model = make().train()
    model.layers[1].eval()
    model.layers[1].norm.train()
    flags, ids = [module.training for module in model.modules()], sample_ids()

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
    assert_same_results(frame_of(model, tmp_path / "train"), expected)
    check()


def test_training_flags_stay_with_the_harness(tiny_folder):
    pytest.importorskip("lm_eval")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).train()
    bh.harness_model(model, byte_tokenizer(), 1)
    assert all(module.training for module in model.modules())


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


def test_numpy_numbers(mock_model, tmp_path):
    """They are taken as numbers, and kept as Python's own; what is no number is refused all the same."""
    static = bh.resolve_config("x", {"method": "topk", "k": np.int64(4)})
    given = {"method": "bh", "alpha": np.float32(0.25), "temperature": np.float64(2), "min_k": np.int32(2),
             "max_k": np.uint8(9), "shuffle": np.bool_(False), "p_values": "flat"}  # fmt: skip
    adaptive = bh.resolve_config("x", given)
    assert {type(adaptive[field]) for field in ("min_k", "max_k")} == {int} == {type(static["k"])}
    assert {type(adaptive[field]) for field in ("alpha", "temperature")} == {float}
    assert json.loads(json.dumps(adaptive))["alpha"] == 0.25
    for wrong in (np.float64(4), np.bool_(True), np.int64(0), np.array([4])):
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
    assert frame["status"].tolist() == ["ok"] * 4  # two samples, also of the model's own routing
    assert frame["seed"].tolist() == [3] * 4


def test_device_none_is_auto(tiny_folder, tmp_path):
    assert bh.BHExperimentRunner(str(tiny_folder), tmp_path, device=None).device == bh.choose_device("auto")


def test_return_stats_comes_before_null():
    *_, count, found = bh.benjamini_hochberg_routing(random_logits(4, 16), 0.05, 1.0, 1, 16, True)
    assert found["rejections"].clamp(1, 16).tolist() == count.tolist()


def test_names_are_looked_up_when_they_are_used(mock_model, tmp_path, monkeypatch):
    """A configuration added to ROUTING_CONFIGS is known to suites, options and runner, and comes first."""
    late = {"method": "threshold", "threshold": 0.01}
    monkeypatch.setitem(bh.ROUTING_CONFIGS, "late", late)
    monkeypatch.setitem(bh.ROUTING_CONFIGS, "top_p", late)
    parse = bh.build_parser().parse_args
    assert list(bh.choose_configs(parse(["--configs", "late, topk_3"]))) == ["late", "topk_3"]
    for suite in ("default", "controls", "all"):
        chosen = bh.choose_configs(parse(["--suite", suite]))
        assert {chosen[name]["threshold"] for name in ("late", "top_p")} == {0.01}
    with mock_runner(mock_model, tmp_path).routing("late") as recorder:
        assert recorder.config["threshold"] == 0.01


def test_each_knob_is_searched_where_its_field_says(tiny, monkeypatch):
    """--match-experts finds a value inside the range of the knob, and says what that range can reach."""
    knobs = {fields[0] for method, fields in bh.METHODS.items() if method != "topk"}
    assert {name for name, field in bh.FIELDS.items() if field.search} == knobs
    wide = {"method": "top_p", "max_k": 16}
    usual = bh.match_experts("top_p", wide, 2.0, tiny.calibration)["p"]
    for search in ((usual / 2, 1.0), (1e-3, usual * 1.1)):
        monkeypatch.setitem(bh.FIELDS, "p", dataclasses.replace(bh.FIELDS["p"], search=search))
        assert bh.match_experts("top_p", wide, 2.0, tiny.calibration)["p"] == pytest.approx(usual, rel=0.02)
    for search in ((usual * 1.1, 1.0), (1e-3, usual / 1.1)):
        monkeypatch.setitem(bh.FIELDS, "p", dataclasses.replace(bh.FIELDS["p"], search=search))
        with pytest.raises(bh.UserError, match="can keep"):
            bh.match_experts("top_p", wide, 2.0, tiny.calibration)


ANALYZE, LIST = "--analyze-only", "--list-architectures"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--window", "256"], "--window needs --text"),
     (["--p-values", "flat", "--configs", "topk_8,top_p"], "no chosen configuration takes a null"),
     (["--match-experts", "4", "--configs", "topk_1,topk_8"], "every chosen configuration is Top-K"),
     (["--baseline", "bh_strct"], 'Did you mean "bh_strict"'),
     (["--baseline", "topk_3", "--configs", "topk_8,top_p"], "Available: topk_8, top_p"),
     ([ANALYZE], "does not exist"), ([ANALYZE, "--output", "{file}"], "{file}"),
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
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message.replace("{file}", str(file)) in errors[0]


def test_baseline_is_passed_on(tmp_path, monkeypatch, capsys):
    """--baseline reaches the run and the report; the report alone knows the names from the results."""
    frame, seen = pd.DataFrame({"config_name": ["topk_8", "mine"], "status": "ok"}), []

    class Runner:
        processes = SimpleNamespace(rank=0)

        def __init__(self, *args, **options):
            pass

        def run(self, *args, baseline, **how):
            seen.append(baseline)
            return frame

        run_full_experiment_suite = run_tasks = run

    monkeypatch.setattr(bh, "BHExperimentRunner", Runner)
    monkeypatch.setattr(bh, "read_results", lambda path: frame)

    def write_report(frame, folder, baseline):
        seen.append(baseline)
        return {"failed_plots": {}}

    monkeypatch.setattr(bh, "write_report", write_report)
    for options, expected in (
        ([], [None, None]),
        (["--baseline", "bh_loose"], ["bh_loose"] * 2),
        (["--baseline", "bh_loose", "--tasks", "x"], ["bh_loose"] * 2),
        ([ANALYZE, "--baseline", "mine"], ["mine"]),
    ):
        seen.clear()
        assert bh.main(["--output", str(tmp_path), *options]) == 0
        assert seen == expected
    assert bh.main(["--output", str(tmp_path), ANALYZE, "--baseline", "bh_loose"]) == 2
    assert "Available: topk_8, mine" in capsys.readouterr().err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        bh.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("tokens in a window of --text (default: 256)", "calibration text (default: 0)"):
        assert words in text
    args = bh.parse_options(["--seed", "0", "--no-resume"])
    assert (args.seed, args.window, args.given) == (0, bh.DEFAULT_WINDOW, {"seed", "no_resume"})


def test_text_shared_with_calibration_is_counted(tiny_folder, tmp_path, caplog):
    """Tokens that are diagnosed and were calibrated on are counted and told; others are not."""
    letters = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8).tobytes().decode()
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text(letters[:2000])
    other.write_text(letters[2000:])

    def diagnosed(text, calibration_text, window):
        folder = tmp_path / f"{text.stem}-{calibration_text and calibration_text.stem}"
        runner = bh.BHExperimentRunner(str(tiny_folder), folder, calibration_text=calibration_text)
        with caplog.at_level("WARNING"):
            caplog.clear()
            return runner.diagnose(bh.text_windows([text], runner.tokenizer, window))

    length, sequences = (CALIBRATION[f"CALIBRATION_{name}"] for name in ("LENGTH", "SEQUENCES"))
    found = diagnosed(one, one, 500)
    assert sequences * length * 0.9 < found["n_shared_tokens"] <= sequences * length
    assert f"{found['n_shared_tokens']} of the {found['n_tokens']} tokens" in caplog.text
    assert diagnosed(one, one, 8)["n_shared_tokens"] > 0  # windows shorter than a run
    for calibration_text in (other, None):
        assert diagnosed(one, calibration_text, 500)["n_shared_tokens"] == 0
        assert "shares text" not in caplog.text
    saved = json.loads((tmp_path / "one-one" / "null_diagnostics.json").read_text())
    assert saved["n_shared_tokens"] > 0


# ---------------------------------------------------------------------------------------------------------
# 16. What belongs to a run: its identity, its files, what an older script left
# ---------------------------------------------------------------------------------------------------------

TESTDATA = HERE / "testdata"
SCORED_PROMPTS = [
    {**prompt, "reference": f"and {word} on the way home"}
    for prompt, word in zip(PROMPTS, ("snow", "rain", "sun"), strict=True)
]
WINDOWS = [
    {"id": f"w{n}", "text": "", "document": "file", "token_ids": list(range(6 + n, 18 + n))} for n in range(3)
]
TOP_8 = {"topk_8": {"method": "topk", "k": 8}}


def run_suite(model, folder, configs=CONFIGS, prompts=SCORED_PROMPTS, tokens=2, **options):
    return mock_runner(model, folder).run_full_experiment_suite(configs, prompts, tokens, **options)


def test_every_field_and_argument_is_classified():
    """A new field of a prompt or argument of a run must be said to be part of the identity, or not to be."""
    whole = bh.resolve_prompt({"text": "x", "token_ids": [1, 2]})
    tree, read = ast.parse(Path(bh.__file__).read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):  # prompt["field"], wherever the script reads one
        owner = ast.unparse(node.value) if isinstance(node, ast.Subscript) else ""
        if owner in ("prompt", "prompts[0]") and isinstance(node.slice, ast.Constant):
            read.add(node.slice.value)
    assert {"reference", "token_ids"} <= read
    assert set(bh.PROMPT_IDENTITY) == {*bh.PROMPT_FIELDS, *whole, *read}
    runner = bh.BHExperimentRunner
    calls = (runner.__init__, runner.run_full_experiment_suite, runner.run_tasks)
    arguments = {name for call in calls for name in inspect.signature(call).parameters} - {"self"}
    assert set(bh.RUN_IDENTITY) == arguments


def test_settings_hold_what_is_classified_as_theirs(mock_model, tmp_path):
    """Each entry that an argument is classified to be held by is there, and each entry holds an argument."""
    entries = set(bh.RUN_IDENTITY.values()) - {bh.ROWS, bh.NOTHING}
    run_suite(mock_model, tmp_path, prompts=PROMPTS[:1])
    head = (tmp_path / "checkpoints" / "latest_checkpoint.json").read_text().splitlines()[1]
    of_suite = set(json.loads(head.removeprefix('"settings": ').rstrip(",")))
    of_tasks = {"num_fewshot", "limit", "task_files"}  # see test_tasks_resume_after_ctrl_c
    assert entries == of_suite | of_tasks


CHANGES = {
    "text": {"text": "another boat on the river"},
    "reference": {"reference": "and snow on the way back"},
    "category": {"category": "other"},
    "document": {"document": "other"},
    "token_ids": {"token_ids": [*range(6, 17), 500]},  # the tokenizer decodes it as before
}


@pytest.mark.parametrize("field", [field for field, counts in bh.PROMPT_IDENTITY.items() if counts])
def test_another_input_is_refused(field, mock_model, tmp_path):
    """A folder whose rows come of another input is refused, naming configuration, prompt and field."""
    prompts = WINDOWS if field == "token_ids" else SCORED_PROMPTS
    run_suite(mock_model, tmp_path, prompts=prompts)
    path = tmp_path / "checkpoints" / "latest_checkpoint.json"
    before = path.read_bytes()
    changed = [prompts[0] | CHANGES[field], *prompts[1:]]
    more = CONFIGS | {"bh_third": {**FLAT, "alpha": 0.1}}
    message = f"topk_8 x {prompts[0]['id']}, run with another {field} of that prompt; choose another --output"
    with pytest.raises(bh.UserError, match=message):
        run_suite(mock_model, tmp_path, more, changed)
    assert path.read_bytes() == before
    described = [prompt | {"description": "new words"} for prompt in prompts]
    assert len(run_suite(mock_model, tmp_path, more, described)) == 9


def test_a_taken_away_reference_is_refused(mock_model, tmp_path):
    run_suite(mock_model, tmp_path)
    with pytest.raises(bh.UserError, match="topk_8 x one, run with another reference"):
        run_suite(mock_model, tmp_path, prompts=PROMPTS)


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
    prompts = [
        SCORED_PROMPTS[0],
        *(SCORED_PROMPTS[0] | change for field, change in CHANGES.items() if field != "token_ids"),
    ]
    rows = [runner.run_single_experiment("bh_flat", FLAT, prompt, 1) for prompt in prompts]
    hashes = [row["input_hash"] for row in rows]
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)
    assert len(set(hashes)) == len(prompts)
    again = runner.run_single_experiment(
        "topk_8", TOP_8["topk_8"], SCORED_PROMPTS[0] | {"description": "x"}, 2
    )
    assert again["input_hash"] == hashes[0]


def files_below(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_no_resume_sets_everything_aside(mock_model, tmp_path, monkeypatch):
    """After a run of two processes that was killed: nothing of it is taken over, whatever the settings; its
    files are together in one folder, the log and the calibration stay, and nobody else's file is touched."""
    only_plots(monkeypatch, "avg_experts_comparison")
    configs = CONFIGS | {"bh": EMPIRICAL}
    bh.write_report(run_suite(mock_model, tmp_path, configs), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "latest_checkpoint.json"
    lines = checkpoint.read_text().splitlines(keepends=True)  # the second one's rows are in its own file
    own = "".join(lines[:3]) + lines[-2] + lines[-1]
    (checkpoint.parent / "process_1.json").write_text(own)
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: path.read_bytes() for name, path in files_below(tmp_path).items()}
    stay = {"experiment_log.txt", "calibration.safetensors", "notes.txt", "checkpoints/.lock"}
    assert stay <= set(before)
    for number, tokens in ((1, 3), (2, 2)):  # with other settings, then with the first ones again
        frame = run_suite(mock_model, tmp_path, configs, SCORED_PROMPTS[:1], tokens, resume=False)
        assert (len(frame), set(frame["prompt_id"])) == (3, {"one"})
        assert len(rows_in(checkpoint)) == 3
        assert (tmp_path / f"earlier_{number}" / "checkpoints" / "latest_checkpoint.json").exists()
    aside = {name: path.read_bytes() for name, path in files_below(tmp_path / "earlier_1").items()}
    assert aside == {name: content for name, content in before.items() if name not in stay}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "plots").glob("*"))


@pytest.mark.parametrize("name", ["latest_checkpoint", "process_1"])
def test_no_message_advises_what_was_given(name, tiny_folder, tmp_path, monkeypatch, capsys):
    """With --no-resume no file of an earlier run can stop a run, and none makes it advise --no-resume."""
    only_plots(monkeypatch)
    monkeypatch.setattr(bh, "TEST_PROMPTS", PROMPTS[:1])
    options = ["--max-tokens", 2, "--configs", "topk_8", "--no-resume"]
    for content in ("hello", '{"schema": 2,\n"settings": {"model": "other"},\n"results": [\n]}\n'):
        path = tmp_path / "checkpoints" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        assert cli(tiny_folder, tmp_path, *options) == 0
        assert "or --no-resume" not in capsys.readouterr().err
    assert not (path.parent / "process_1.json").exists()


def test_results_whose_checkpoint_is_gone_are_set_aside(mock_model, tmp_path):
    """A run that begins anew leaves no side file of the earlier one beside its own."""
    run_suite(mock_model, tmp_path, CONFIGS | {"bh": EMPIRICAL})
    shutil.rmtree(tmp_path / "checkpoints")
    run_suite(mock_model, tmp_path, CONFIGS, PROMPTS[:1])
    assert not (tmp_path / "null_diagnostics.json").exists()
    assert (tmp_path / "earlier_1" / "null_diagnostics.json").exists()
    assert len(bh.read_results(tmp_path / "earlier_1" / "bh_routing_results.csv")) == 9


# Results of the first command with `--prompts testdata/prompts.json --configs topk_8,bh_loose --max-tokens 4
# --dtype float32`, written by the script at these commits.
OLDER = ["92f8b74", "6894e3a"]
OLD_CONFIGS = {name: bh.ROUTING_CONFIGS[name] for name in ("topk_8", "bh_loose")}


@pytest.mark.parametrize("commit", OLDER)
def test_older_results_are_read(commit, tmp_path):
    """What an older script did not know is empty; the rest is analysed, its side files with it."""
    shutil.copytree(TESTDATA / commit, tmp_path, dirs_exist_ok=True)
    frame = bh.read_results(tmp_path / "bh_routing_results.csv")
    assert list(frame) == list(bh.RESULT_COLUMNS)
    assert (frame[["input_hash", "run_id"]] == "").all(axis=None)
    assert frame["task_score"].isna().all()
    with (TESTDATA / commit / "bh_routing_results.csv").open(encoding="utf-8", newline="") as file:
        for written, row in zip(csv.DictReader(file), frame.to_dict("records"), strict=True):
            assert written["generated_text"] == row["generated_text"]
            assert float(written["reference_nll"]) == row["reference_nll"]
    analysis = bh.analyze_results(frame, tmp_path)
    assert analysis["n_experiments"] == 4
    assert analysis["null_diagnostics"]["n_tokens"] > 0
    assert set(analysis["layers"]) == set(OLD_CONFIGS)


def test_the_example_is_read():
    frame = bh.read_results(HERE / "results" / "example" / "bh_routing_results.csv")
    assert list(frame) == list(bh.RESULT_COLUMNS)
    assert len(frame) == 60


def test_what_is_no_results_table_is_refused(tmp_path):
    path = tmp_path / "bh_routing_results.csv"
    path.write_text("config_name,prompt_id\ntopk_8,one\n")
    with pytest.raises(bh.UserError, match="is not a results CSV of this script: it lacks status"):
        bh.read_results(path)


@pytest.fixture(scope="module")
def float32_runner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32")
    return bh.BHExperimentRunner(str(EMBEDDED), folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("commit", OLDER)
def test_changes_since_an_older_checkpoint_are_refused(commit, float32_runner, tmp_path):
    """A changed category, text or length of a reference, or a changed setting."""
    shutil.copytree(TESTDATA / commit, tmp_path, dirs_exist_ok=True)
    float32_runner.output_dir = tmp_path
    prompts = bh.load_prompts(TESTDATA / "prompts.json")
    path = tmp_path / "checkpoints" / "latest_checkpoint.json"
    before = path.read_bytes()
    for field in ("text", "category", "reference"):
        changed = [prompts[0] | {field: prompts[0][field] + "s"}, prompts[1]]
        with pytest.raises(bh.UserError, match=f"topk_8 x cat, run with another {field} of that prompt"):
            float32_runner.run_full_experiment_suite(OLD_CONFIGS, changed, 4)
        assert path.read_bytes() == before
    with pytest.raises(bh.UserError, match="max_new_tokens is 4 there, 5 here"):
        float32_runner.run_full_experiment_suite(OLD_CONFIGS, prompts, 5)


@pytest.mark.parametrize("commit", OLDER)
def test_older_checkpoints_are_resumed(commit, float32_runner, tmp_path, caplog):
    """Their rows are kept and counted, what they lack is empty, and what they do not show is said."""
    shutil.copytree(TESTDATA / commit, tmp_path, dirs_exist_ok=True)
    float32_runner.output_dir = tmp_path
    prompts = bh.load_prompts(TESTDATA / "prompts.json")
    old = rows_in(tmp_path / "checkpoints" / "latest_checkpoint.json")
    frame = float32_runner.run_full_experiment_suite(OLD_CONFIGS | {"bh_flat": FLAT}, prompts, 4)
    assert "4 finished experiments are of an older script" in caplog.text
    assert (frame["status"] == "ok").all()
    kept = frame[frame["config_name"] != "bh_flat"]
    assert kept["reference_nll"].tolist() == [row["reference_nll"] for row in old]
    assert (kept["input_hash"] == "").all()
    new = frame[frame["config_name"] == "bh_flat"]
    assert (new["input_hash"] != "").all()
    assert set(bh.read_layer_table(tmp_path, "layer_statistics")["config_name"]) == set(frame["config_name"])


def test_side_files_of_another_run_are_ignored(mock_model, tmp_path, monkeypatch):
    """Diagnostics and layer tables go into the report of the run that wrote them only."""
    only_plots(monkeypatch, "layer_profile", "null_calibration")
    configs = CONFIGS | {"bh": EMPIRICAL}
    long = run_suite(mock_model, tmp_path / "long", configs)
    short = run_suite(mock_model, tmp_path / "short", configs, PROMPTS[:1])  # nothing to be scored
    assert bh.analyze_results(long, tmp_path / "long")["null_diagnostics"] is not None
    assert {path.stem for path in bh.create_visualizations(long, tmp_path / "long")} == set(bh.PLOTS)
    for name in ("null_diagnostics.json", "layer_statistics.csv", "expert_usage.csv"):
        shutil.copy(tmp_path / "long" / name, tmp_path / "short")
    analysis = bh.write_report(short, tmp_path / "short")
    assert (analysis["null_diagnostics"], analysis["layers"]) == (None, {})
    assert "of the scored text" not in (tmp_path / "short" / "REPORT.md").read_text()
    assert not list((tmp_path / "short" / "plots").glob("*.png"))
    # Files without an id belong to results without one, and to no others.
    assert bh.analyze_results(long.assign(run_id=""), tmp_path / "long")["layers"] == {}
    for path in (tmp_path / "long").glob("*.csv"):
        if path.stem != "bh_routing_results":
            pd.read_csv(path).drop(columns="run_id").to_csv(path, index=False)
    path = tmp_path / "long" / "null_diagnostics.json"
    content = json.loads(path.read_text())
    del content["run_id"]
    bh.write_json(path, content)
    analysis = bh.analyze_results(long, tmp_path / "long")
    assert (analysis["null_diagnostics"], analysis["layers"]) == (None, {})
    analysis = bh.analyze_results(long.drop(columns="run_id"), tmp_path / "long")
    assert analysis["null_diagnostics"]["n_tokens"] == content["n_tokens"]
    assert set(analysis["layers"]) == set(configs)


def test_side_files_follow_a_run_that_grows_or_shrinks(mock_model, tmp_path):
    """Whatever part of what a folder holds is asked for, the files beside the results are of that part."""
    configs = CONFIGS | {"bh": EMPIRICAL}
    seen = set()
    for asked, prompts in (
        (configs, SCORED_PROMPTS[:2]),
        (configs | {"bh_2": FLAT}, SCORED_PROMPTS),
        (configs, SCORED_PROMPTS),
    ):
        (tmp_path / "plots").mkdir(exist_ok=True)
        (tmp_path / "plots" / "avg_experts_comparison.png").write_text("of the run before")
        frame = run_suite(mock_model, tmp_path, asked, prompts)
        [run_id] = set(frame["run_id"])
        seen.add(run_id)
        assert json.loads((tmp_path / "null_diagnostics.json").read_text())["run_id"] == run_id
        table = bh.read_layer_table(tmp_path, "layer_statistics", {run_id})
        assert set(table["config_name"]) == set(asked)
        assert bh.read_layer_table(tmp_path, "expert_usage", {run_id}) is not None
        assert not (tmp_path / "plots" / "avg_experts_comparison.png").exists()
    assert len(seen) == 3
    again = run_suite(mock_model, tmp_path, configs, SCORED_PROMPTS)
    pd.testing.assert_frame_equal(again, frame)


def test_the_models_own_routing_is_always_run(mock_model, tmp_path, caplog):
    """Where no configuration does what the model does, one is added, under a name that is free."""
    frame = run_suite(mock_model, tmp_path / "a", {"bh_flat": FLAT}, SCORED_PROMPTS[:1])
    assert frame["config_name"].tolist() == ["topk_8", "bh_flat"]
    assert (
        "topk_8, the model's own routing, is run as well" in (tmp_path / "a/experiment_log.txt").read_text()
    )
    own = frame.iloc[0]
    assert list(json.loads(own["static_nll"])) == [str(k) for k in range(1, 8)]
    assert frame["kl_to_baseline"].tolist()[0] == 0
    taken = {"topk_8": {"method": "topk", "k": 4}, "own_topk": FLAT}
    frame = run_suite(mock_model, tmp_path / "b", taken, SCORED_PROMPTS[:1])
    assert frame["config_name"].tolist() == ["own_topk_2", "topk_8", "own_topk"]
    assert frame["k"].tolist()[:2] == [8, 4]
    frame = run_suite(
        mock_model, tmp_path / "c", {"mine": TOP_8["topk_8"], "bh_flat": FLAT}, SCORED_PROMPTS[:1]
    )
    assert frame["config_name"].tolist() == ["mine", "bh_flat"]  # by what it does, not by its name
    with pytest.raises(bh.UserError, match="at least one configuration"):
        run_suite(mock_model, tmp_path / "d", {})


def test_the_static_curve_leaves_out_what_plain_top_k_runs(mock_model, tmp_path):
    """Whatever its name: `topk_4` that is another rule takes nothing from the curve, `my4` does."""
    others = {"topk_4": FLAT, "topk_5": {"method": "topk", "k": 5, "renormalize": "sum"}}
    frame = run_suite(
        mock_model, tmp_path, TOP_8 | others | {"my3": {"method": "topk", "k": 3}}, SCORED_PROMPTS[:1]
    )
    curve = json.loads(frame["static_nll"][0])
    assert list(curve) == ["1", "2", "4", "5", "6", "7"]


def test_the_static_curve_has_each_point_once(mock_model, tmp_path):
    """Also when a static configuration joins a finished run, or two are the model's own routing."""
    four = {"topk_4": {"method": "topk", "k": 4}}
    first = run_suite(mock_model, tmp_path, TOP_8 | {"bh_flat": FLAT})
    scored = json.loads(first["static_nll"][0])
    frame = run_suite(mock_model, tmp_path, TOP_8 | four | {"bh_flat": FLAT, "my8": TOP_8["topk_8"]})
    rows = frame[frame["prompt_id"] == "one"].set_index("config_name")
    assert list(json.loads(rows["static_nll"]["topk_8"])) == ["1", "2", "3", "5", "6", "7"]
    assert rows["reference_nll"]["topk_4"] == scored["4"]
    assert rows["static_nll"]["my8"] == ""
    verdict = bh.analyze_results(frame, tmp_path)["verdict"]
    assert verdict["bh_flat"]["delta_nll"] is not None


def test_an_unknown_baseline_is_refused(mock_model, tmp_path):
    with pytest.raises(bh.UserError, match="unknown baseline 'topk_9'.*Available: topk_8, bh_flat"):
        run_suite(mock_model, tmp_path, {"bh_flat": FLAT}, baseline="topk_9")
    assert not (tmp_path / "checkpoints").exists()
    assert len(run_suite(mock_model, tmp_path, {"bh_flat": FLAT}, SCORED_PROMPTS[:1], baseline="topk_8")) == 2


def test_the_log_tells_how_far_a_run_is(mock_model, tmp_path, capsys):
    """A line for each finished experiment or batch, in the log only."""
    console = bh._ConsoleHandler(logging.INFO)
    bh.logger.addHandler(console)
    try:
        run_suite(mock_model, tmp_path / "a", prompts=SCORED_PROMPTS[:2])
        run_suite(mock_model, tmp_path / "b", prompts=WINDOWS)
    finally:
        bh.logger.removeHandler(console)
    pattern = r"DEBUG (\d+ of \d+: .*), \d+\.\d\d s$"
    lines = [re.findall(pattern, (tmp_path / f / "experiment_log.txt").read_text(), re.M) for f in "ab"]
    assert lines[0] == [
        f"{n} of 4: {name} x {item}"
        for n, (item, name) in enumerate(itertools.product(("one", "two"), CONFIGS), 1)
    ]
    assert lines[1] == [f"{n} of 2: {name} x 3 items from w0 on" for n, name in enumerate(CONFIGS, 1)]
    assert "of 4: " not in capsys.readouterr().err


def test_tasks_add_the_models_own_routing(task_folder, tmp_path):
    """Of tasks too: the baseline is run, the side file has the run's id, the log tells how far it is."""
    runner = bh.BHExperimentRunner(str(EMBEDDED), tmp_path, device="cpu", dtype="float32")
    one = {"topk_1": bh.suites()["all"]["topk_1"]}
    with pytest.raises(bh.UserError, match="unknown baseline 'topk_2'"):
        runner.run_tasks(["mini_text"], one, limit=2, include_path=task_folder, baseline="topk_2")
    frame = runner.run_tasks(["mini_text"], one, limit=2, include_path=task_folder)
    assert frame["config_name"].unique().tolist() == ["topk_8", "topk_1"]
    assert frame.groupby("prompt_id")["input_hash"].nunique().eq(1).all()
    assert frame["input_hash"].nunique() == 2
    saved = json.loads((tmp_path / bh.TASK_RESULTS).read_text())
    assert {saved["run_id"]} == set(frame["run_id"])
    assert "DEBUG 2 of 2: topk_1 x mini_text, " in (tmp_path / "experiment_log.txt").read_text()
    tasks = bh.analyze_results(frame, tmp_path)["tasks"]
    assert any("harness" in row for row in tasks)
    bh.write_json(tmp_path / bh.TASK_RESULTS, saved | {"run_id": "another"})
    assert not any("harness" in row for row in bh.analyze_results(frame, tmp_path)["tasks"])


# ---------------------------------------------------------------------------------------------------------
# 17. What is claimed, what it is compared with, and figures
# ---------------------------------------------------------------------------------------------------------

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
        series = pd.Series(values)
        found = bh.paired_test(bh.item_units(series, pd.Series(documents)))
        sums = np.bincount(documents, weights=values)
        sizes = np.bincount(documents)
        units = values.mean() + (sums - values.mean() * sizes) / sizes.mean()
        expected = stats.ttest_1samp(units, 0).confidence_interval(0.95)
        assert (found["ci95_low"], found["ci95_high"]) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", NO_EFFECT)
def test_coverage_of_intervals(name, ragged):
    """Without effect a 95 % interval holds zero in 93 to 97 %, from INTERVALS_HOLD_FROM units on.

    Below it, and for a strong skew, it holds at least what the report says. Simulated often enough that four
    standard errors are below a percent.
    """
    for documents in (6, 12, 30, 50, 100):
        sets = 16_000 if documents < 30 else 8_000
        found = coverage(NO_EFFECT[name], documents, ragged, sets, seed=documents)
        error = 4 * math.sqrt(0.93 * 0.07 / sets)
        assert found <= 0.97 + error
        if name == "lognormal, sigma 1":
            assert found >= {6: 0.81, 12: 0.84, 30: 0.87, 50: 0.89, 100: 0.91}[documents] - error
        elif documents >= bh.INTERVALS_HOLD_FROM:
            assert found >= 0.93 - error / 4
        else:
            assert found >= 0.90 - error


def test_report_says_where_intervals_hold(tmp_path):
    """Next to the intervals, and only where there are too few units."""
    for prompts, told in ((12, True), (bh.INTERVALS_HOLD_FROM, False)):
        frame = invented_results(("topk_8", "bh_strict"), prompts)
        report = report_of(frame, tmp_path)
        assert ("are too narrow when differences are skewed" in report) is told
        assert (f"as few as {prompts})" in report) is told


def with_shuffled(frame, differences):
    """`frame` of `simulated` and, for each list of differences [n], a shuffled `bh` that differs by it."""
    frame = frame.assign(**dict.fromkeys(set(bh.CONFIG_FIELDS) - set(frame))).assign(shuffle=False)
    twin = frame[frame["config_name"] == "bh"]
    nlls = [twin["reference_nll"] + difference for difference in differences]
    shuffled = [
        twin.assign(config_name=f"shuffled_{i}", shuffle=True, reference_nll=nll)
        for i, nll in enumerate(nlls)
    ]
    return pd.concat([frame, *shuffled], ignore_index=True)


@pytest.mark.parametrize("n", [3, 12])
def test_shuffled_counts_are_claimed_by_the_adjusted_p_value(n):
    """Without effect the sentence claims something in about 5 %; an interval alone is no claim."""
    random, claims = np.random.default_rng(0), 0
    for difference in random.normal(0, 0.01, (200, n)):
        effects = bh.shuffle_effects(with_shuffled(simulated(1, n=n), [difference]))
        (sentence,) = bh._shuffle_sentences({"shuffle_effects": effects})
        claims += ": worse, " in sentence or ": better, " in sentence
    assert claims <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)
    effects = bh.shuffle_effects(with_shuffled(simulated(1, n=n), random.normal(0.006, 0.01, (8, n))))
    adjusted = stats.false_discovery_control([effect["p_value"] for effect in effects.values()])
    sentences = bh._shuffle_sentences({"shuffle_effects": effects})
    for effect, p_value, sentence in zip(effects.values(), adjusted, sentences, strict=True):
        assert effect["p_value_adjusted"] == pytest.approx(p_value)
        assert effect["significant"] == (p_value < 0.05) == ("not shown to differ" not in sentence)


def test_windows_of_a_document_are_no_independent_units(tmp_path):
    """Every table tests documents: windows that repeat each other make no difference significant."""
    frame = invented_results(("topk_8", "bh_strict"), 6)
    parts = [frame.assign(prompt_id=frame["prompt_id"] + f":{window}") for window in range(8)]
    once = bh.analyze_results(frame, tmp_path)
    often = bh.analyze_results(pd.concat(parts, ignore_index=True), tmp_path)
    for metric, test in once["statistical_tests"]["bh_strict"].items():
        repeated = often["statistical_tests"]["bh_strict"][metric]
        assert (repeated["n_pairs"], repeated["n_units"]) == (48, 6)
        assert repeated["p_value"] == pytest.approx(test["p_value"])
    row = often["verdict"]["bh_strict"]
    assert (row["n_items"], row["n_units"]) == (48, 6)


def test_equivalence_is_claimed_by_its_adjusted_p_value():
    frame = simulated(2)
    rules = [
        frame[frame["config_name"] == "bh"].assign(
            config_name=f"bh_{i}", reference_nll=lambda rows, i=i: rows["reference_nll"] + 0.004 * i
        )
        for i in range(4)
    ]
    found = bh.quality_verdicts(pd.concat([frame, *rules], ignore_index=True), "topk_5")
    rows = [row for row in found.values() if row["equivalence_p_value"] is not None]
    adjusted = stats.false_discovery_control([row["equivalence_p_value"] for row in rows])
    assert [row["equivalence_p_value_adjusted"] for row in rows] == pytest.approx(adjusted.tolist())
    assert [row["equivalent_to_baseline"] for row in rows] == (adjusted < 0.05).tolist()


def renamed(frame, **names):
    return frame.assign(config_name=frame["config_name"].replace(names))


def test_static_topk_under_any_name_is_the_curve():
    """What a configuration is follows from what it does: another name changes names only."""
    frame = simulated(3, effect=-0.02)
    expected = bh.quality_verdicts(frame, "topk_5")
    found = bh.quality_verdicts(renamed(frame, topk_4="my4", topk_5="my5"), "my5")
    assert found["my4"] == expected["topk_4"]
    assert found["my5"] == expected["topk_5"]
    assert found["bh"] == expected["bh"]
    assert found["bh"]["verdict"] == "better"
    assert found["my4"]["verdict"] is None
    # Twice the same: both are the curve.
    twice = pd.concat([frame, renamed(frame[frame["config_name"] == "topk_4"], topk_4="again")])
    found = bh.quality_verdicts(twice.reset_index(drop=True), "topk_5")
    assert found["again"] == found["topk_4"] == expected["topk_4"]
    assert found["bh"]["delta_nll"] == expected["bh"]["delta_nll"]


def test_static_topk_beside_the_curve_that_rows_carry(tmp_path):
    """A Top-4 of another name is the curve's point, and is not compared with itself."""
    frame = invented_results(("topk_8", "bh_strict"), 12)
    own = frame["config_name"] == "topk_8"
    own_4 = frame[own]["static_nll"].map(lambda curve: json.loads(curve)["4"])
    my4 = frame[own].assign(config_name="my4", k=4, static_nll="", reference_nll=own_4)
    my4 = my4.assign(
        reference_avg_experts=4.0,
        avg_experts_per_token=4.0,
        repeat_reference_nll=math.nan,
        repeat_inference_time_sec=math.nan,
    )
    expected = bh.analyze_results(frame, tmp_path)["verdict"]
    both = pd.concat([frame, my4], ignore_index=True)
    analysis = bh.analyze_results(both, tmp_path)
    assert analysis["verdict"]["my4"]["verdict"] is None
    assert "topk_4" not in analysis["verdict"]
    assert analysis["verdict"]["bh_strict"]["delta_nll"] == pytest.approx(expected["bh_strict"]["delta_nll"])
    report = bh.generate_markdown_report(both, analysis, tmp_path / "REPORT.md").read_text()
    assert "`my4` ran" not in report
    assert report.count("choose another") == 0


def test_a_rule_named_like_a_static_one_is_a_rule(tmp_path):
    """It neither removes its namesake from the curve nor counts as it."""
    frame = invented_results(("topk_8", "bh_strict", "bh_loose"), 12)
    expected = bh.analyze_results(frame, tmp_path)
    posing = renamed(frame, bh_strict="topk_4", bh_loose="topk_5")
    found = bh.analyze_results(posing, tmp_path)
    assert found["baseline"] == "topk_8"
    assert found["verdict"]["topk_4"] == expected["verdict"]["bh_strict"]
    assert found["verdict"]["topk_4"]["verdict"] is not None
    assert found["verdict"]["topk_4 (static)"] == expected["verdict"]["topk_4"]
    with pytest.raises(bh.UserError, match="configuration name"):
        bh.check_name("topk_4 (static)")
    report = bh.generate_markdown_report(posing, found, tmp_path / "REPORT.md").read_text()
    assert "`topk_4` ran " in report


def test_runner_scores_the_curve_whatever_configurations_are_called(mock_model, tmp_path):
    """k = 2 is scored beside a rule that is called topk_2, and not beside a Top-2 of another name."""
    prompt = {"id": "one", "text": "a small boat", "reference": " on the river"}
    own = bh.find_moe_layers(mock_model)[0].own_k
    configs = {"topk_8": bh.ROUTING_CONFIGS["topk_8"], "topk_2": FLAT, "mine": {"method": "topk", "k": 1}}
    frame = mock_runner(mock_model, tmp_path).run_full_experiment_suite(configs, [prompt], 2)
    curve = frame[frame["config_name"] == "topk_8"]["static_nll"].iloc[0]
    assert list(json.loads(curve)) == [str(k) for k in range(2, own)]
    analysis = bh.analyze_results(frame, tmp_path)
    assert [n for n, row in analysis["verdict"].items() if bh.is_static(row)] == [
        *("topk_8", "mine", "topk_2 (static)"),
        *(f"topk_{k}" for k in range(3, own)),
    ]


def test_advice_fits_the_method(tmp_path):
    """A constant count is told of rules that could adapt, with their own knob, and of nothing else."""
    frame = invented_results(("topk_8", "bh_strict", "bh_loose"), 4)
    frame["avg_experts_per_token"] = 4.0
    rows = frame["config_name"] == "bh_strict"
    frame.loc[rows, ["method", "k", "renormalize"]] = ["topk", 4, "model"]
    assert "`bh_strict` ran 4.00 experts on every prompt" not in report_of(frame, tmp_path)
    assert "`bh_loose` ran 4.00 experts on every prompt: it does not adapt; choose another `alpha`" in (
        report_of(frame, tmp_path)
    )
    frame.loc[rows, ["method", "k", "renormalize"]] = ["topk", 4, "sum"]
    assert "`bh_strict` ran 4.00 experts on every prompt" not in report_of(frame, tmp_path)
    frame.loc[frame["config_name"] == "bh_loose", ["method", "p"]] = ["top_p", 0.4]
    assert "it does not adapt; choose another `p`" in report_of(frame, tmp_path)


def test_baseline_is_the_models_own_routing_whatever_it_is_called(tmp_path):
    frame = invented_results(("topk_8", "bh_strict"), 6)
    wide = frame[frame["config_name"] == "topk_8"].assign(
        config_name="wide",
        k=16,
        static_nll="",
        kl_to_baseline=0.02,
        repeat_reference_nll=math.nan,
        repeat_inference_time_sec=math.nan,
    )
    with_wide = pd.concat([wide, frame], ignore_index=True)
    assert bh.choose_baseline(with_wide) == "topk_8"
    assert bh.choose_baseline(renamed(with_wide, topk_8="mine")) == "mine"
    # A rule that has the built-in name is not the baseline.
    posing = renamed(frame[frame["config_name"] == "bh_strict"], bh_strict="topk_8")
    posing = pd.concat([posing, renamed(frame[frame["config_name"] == "topk_8"], topk_8="mine")])
    assert bh.choose_baseline(posing) == "mine"
    assert bh.choose_baseline(wide) == "wide"
    assert bh.own_routing(wide) is None
    assert bh.choose_baseline(frame[frame["config_name"] == "bh_strict"]) == "bh_strict"


def test_baseline_can_be_chosen(tmp_path):
    frame = invented_results(("topk_8", "bh_strict", "bh_loose"), 6)
    analysis = bh.write_report(frame, tmp_path, baseline="bh_loose")
    assert analysis["baseline"] == "bh_loose"
    assert analysis["own_routing"] == "topk_8"
    assert set(analysis["statistical_tests"]) == {"topk_8", "bh_strict"}
    assert analysis["noise_floor"]["inference_time_sec"]["n_pairs"] == 6
    assert analysis["verdict"]["bh_loose"]["delta_to_baseline"] == 0
    report = check_outputs(tmp_path, ("topk_8", "bh_strict", "bh_loose"))
    assert "Differences are to `bh_loose`; the model's own routing is `topk_8`." in report
    assert "`topk_8` run twice" in report
    for call in (bh.analyze_results, bh.write_report, bh.create_visualizations):
        with pytest.raises(bh.UserError, match="unknown baseline 'bh_lose'.*bh_loose.*Available: topk_8"):
            call(frame, tmp_path, baseline="bh_lose")


def test_heatmap_shows_the_baseline_first():
    usage = pd.DataFrame(
        [(name, layer, expert, 1 + expert) for name in "abcdefg" for layer in (0, 1) for expert in range(4)],
        columns=["config_name", "layer", "expert", "count"],
    )
    for baseline, first in ((None, "a"), ("g", "g")):
        axes = bh.plot_expert_usage_heatmap(usage, baseline=baseline)
        assert axes[0].get_title(loc="left") == first
        bh.plt.close("all")


def test_results_without_the_models_own_topk(tmp_path):
    """The report says what differences are to, and why there is no comparison."""
    frame = invented_results(("topk_8", "bh_strict"), 6)
    only_rule = report_of(frame[frame["config_name"] == "bh_strict"], tmp_path)
    assert "No row shows which configuration is the model's own Top-K; differences are to `bh_strict`." in (
        only_rule
    )
    assert "cannot compare quality at equal compute: no static Top-K configuration was run." in only_rule
    narrow = renamed(frame, topk_8="narrow").assign(static_nll="")
    narrow[["repeat_reference_nll", "repeat_inference_time_sec"]] = math.nan
    own = narrow["config_name"] == "narrow"
    narrow.loc[own, ["k", "avg_experts_per_token", "reference_avg_experts"]] = 4.0
    narrow.loc[own, "reference_nll"] = 3.1
    report = report_of(narrow, tmp_path)
    assert "differences are to `narrow`." in report
    assert "but static Top-K was measured at 4.00 only" in report


def test_calibration_on_the_scored_text_is_told(tmp_path):
    diagnostics = {
        "n_tokens": 70,
        "levels": [0.01, 1.0],
        "nulls": {
            "flat": {
                "layers": [[0.01, 1.0]],
                "ks": [0.1],
                "alphas": [
                    {"alpha": 0.05, "mean_rejections": 1.0, "realised_fdp": 0.1, "zero_rejection_frac": 0.0}
                ],
            }
        },
    }
    frame = invented_results(("topk_8", "bh_strict"), 3)
    for shared, words in (
        (
            {},
            "70 tokens of the scored text, of which it is not known whether they were used for calibration,",
        ),
        ({"n_shared_tokens": 0}, "70 tokens of the scored text, not used for calibration,"),
        ({"n_shared_tokens": 50}, "of which 50 were used for calibration as well"),
    ):
        analysis = bh.analyze_results(frame, tmp_path) | {"null_diagnostics": diagnostics | shared}
        report = bh.generate_markdown_report(frame, analysis, tmp_path / "REPORT.md").read_text()
        assert words in report
        assert ("not used for calibration" in report) == (shared == {"n_shared_tokens": 0})


def test_a_plot_that_fails_does_not_lose_the_report(tmp_path, monkeypatch, caplog):
    frame = invented_results(("topk_8", "bh_strict"), 6)

    def broken(frame, ax=None):
        raise ZeroDivisionError("no | width")

    plots = {"experts_by_category": bh.PLOTS["experts_by_category"]}
    plots["experts_vs_latency"] = (broken, "Experts against latency", "decode_sec_per_token")
    monkeypatch.setattr(bh, "PLOTS", plots)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "experts_vs_latency.png").write_bytes(b"of an earlier run")
    as_measured = frame.astype(object).where(frame.notna(), None)
    bh.write_results(as_measured.to_dict("records"), tmp_path / "bh_routing_results.csv")
    assert bh.main(["--analyze-only", "--output", str(tmp_path)]) == 1
    report = (tmp_path / "REPORT.md").read_text()
    assert "- `experts_vs_latency` could not be drawn: ZeroDivisionError: no \\| width" in report
    assert "![Experts by category]" in report
    assert "![Experts against latency]" not in report
    assert "plot experts_vs_latency could not be drawn" in (tmp_path / "experiment_log.txt").read_text()
    assert [path.stem for path in bh.create_visualizations(frame, tmp_path)] == ["experts_by_category"]


def test_foreign_tables_are_refused_and_old_ones_analysed(tmp_path):
    frame = invented_results(("topk_8", "bh_strict"), 4)
    for call in (bh.analyze_results, bh.create_visualizations, bh.write_report):
        with pytest.raises(bh.UserError, match="lacks config_name, status: pass what"):
            call(pd.DataFrame({"prompt_id": ["a"], "value": [1]}), tmp_path)
    expected = bh.analyze_results(frame, tmp_path)
    newer = [*bh.TASK_COLUMNS, "static_nll", "repeat_reference_nll", "document", "script_hash", "device"]
    found = bh.write_report(frame.drop(columns=newer), tmp_path)
    check_outputs(tmp_path, ("topk_8", "bh_strict"))
    tests = found["statistical_tests"]["bh_strict"]["inference_time_sec"]
    assert tests == expected["statistical_tests"]["bh_strict"]["inference_time_sec"]
    bare = frame[["config_name", "prompt_id", "status"]]
    bh.write_report(bare, tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert not re.search(r"\b(nan|None|inf)\b", report)
    assert "cannot compare quality at equal compute" in report


def frontier_results(prompts=6):
    """Invented results of the 24 configurations of the frontier suite."""
    random, parts = np.random.default_rng(0), []
    one = invented_results(("topk_8",), prompts)
    for name, config in bh.suites()["frontier"].items():
        config = bh.resolve_config(name, config)
        experts = float(config["k"] or 0) or random.uniform(2, 8, prompts)
        fields = {field: config[field] for field in bh.CONFIG_FIELDS}
        rows = one.assign(config_name=name, **fields, avg_experts_per_token=experts)
        rows["reference_avg_experts"] = experts
        rows["reference_nll"] = 3 + 1 / rows["reference_avg_experts"] + random.normal(0, 0.01, prompts)
        parts.append(rows if name == "topk_8" else rows.assign(static_nll=""))
    return pd.concat(parts, ignore_index=True)


def visible_boxes(figure, labels):
    """The places of labels on the canvas, empty ones left out."""
    renderer = figure.canvas.get_renderer()
    return [label.get_window_extent(renderer) for label in labels if label.get_text()]


@pytest.mark.parametrize("frame", [invented_results(tuple(bh.ROUTING_CONFIGS), 6), frontier_results()],
                         ids=["5", "24"])  # fmt: skip
def test_labels_do_not_overlap_and_configurations_can_be_told_apart(frame):
    """Bars, boxes, points and lines of 5 and of 24 configurations: names, colours and markers."""
    plt, order = bh.plt, list(dict.fromkeys(frame["config_name"]))
    tasks = frame.assign(task_metric="acc", task_score=frame["avg_experts_per_token"] / 8)
    layers = frame.assign(layer=0)
    for draw, rows in (
        (lambda rows: bh.plot_bars(rows, column="avg_experts_per_token", label="experts"), frame),
        (bh.plot_experts_by_category, frame),
        (bh.plot_experts_vs_latency, frame),
        (bh.plot_quality_vs_experts, frame),
        (bh.plot_delta_at_equal_compute, frame),
        (bh.plot_layer_profile, pd.concat([layers, layers.assign(layer=1)])),
        (bh.plot_task_scores, tasks),
    ):
        with bh.sns.axes_style("whitegrid"), bh.sns.plotting_context("paper", font_scale=1.1):
            draw(rows)
            figure = plt.gcf()
            figure.canvas.draw()
        for ax in figure.axes:
            legend = ax.get_legend()
            groups = [[] if legend is None else legend.get_texts()]
            for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
                groups.append(
                    [t.label1 for t in axis.get_major_ticks() if min(limits) <= t.get_loc() <= max(limits)]
                )
            for boxes in (visible_boxes(figure, labels) for labels in groups):
                assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
                assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
                assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
            title = visible_boxes(figure, [ax.title])
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in title)
        plt.close("all")
    palette, markers = bh._palette(frame, order), bh._markers(frame, order)
    assert list(palette) == order
    assert len(set(palette.values())) == len(order)
    for members in bh._families(frame, order).values():
        assert len({markers[name] for name in members}) == len(members)
        hues = {colorsys.rgb_to_hsv(*palette[name])[0] for name in members}
        assert max(hues) - min(hues) < 0.03


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
