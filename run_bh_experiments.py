#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.9,<2.14",
#     "transformers>=5.17,<6",
#     "accelerate>=1.10",
#     "pandas>=2.2",
#     "scipy>=1.13",
#     "matplotlib>=3.9",
#     "seaborn>=0.13.2",
#     "tqdm>=4.66",
# ]
# ///
"""Can a token use fewer experts? Benjamini-Hochberg (BH) against Top-K routing, measured.

A mixture-of-experts (MoE) language model sends every token to a fixed number K of its experts. This script
replaces that fixed number by a decision per token and layer: each expert's router score becomes a p-value,
and the BH step-up procedure decides how many experts stand out from the ones the model would not have chosen.
Dropped experts are really skipped. Configurations x prompts are run, timed, scored, checkpointed, compared
with static Top-K at the same compute, and reported.

    python run_bh_experiments.py --model models/olmoe-mini         # the embedded model: no download, no GPU
    python run_bh_experiments.py                                   # OLMoE-1B-7B-0924 from the hub
    python run_bh_experiments.py --suite frontier --text FOLDER    # score text under many configurations
    python run_bh_experiments.py --tasks arc_easy,hellaswag        # tasks of lm-evaluation-harness
    python run_bh_experiments.py --dataset NAME --limit 50         # prompts from a data set
    python run_bh_experiments.py --analyze-only --output results   # tables, plots and report from the CSV

    from run_bh_experiments import BHExperimentRunner, analyze_results
    runner = BHExperimentRunner("models/olmoe-mini", output_dir="results")
    frame = runner.run_full_experiment_suite(max_new_tokens=50)

Contents, in reading order
    1   Settings and routing configurations      what is varied
    2   Prompts                                  what is fed in
    3   Nulls                                    score -> p-value -> table of critical scores
    4   Selection                                scores or p-values -> how many experts
    5   Routers                                  found in a model, and understood by what they do
    6   The seam                                 routers patched, experts skipped, all recorded and restored
    7   Calibration                              nulls, knobs and diagnostics from text
    8   Checkpoints                              nothing finished is lost
    9   Results                                  rows -> CSV files
    10  The machine                              device, model, log, lock, processes
    11  Downstream tasks                         what lm-evaluation-harness asks, document by document
    12  BHExperimentRunner                       configurations x prompts -> rows
    13  Analysis                                 rows -> paired tests, verdicts at equal compute
    14  Figures
    15  Report
    16  Command line

Words used throughout
    T tokens (batch and positions flattened) · E experts of a layer · L MoE layers · K candidates the router
    is asked for (`max_k`) · q gate probability, softmax(logits / temperature) · s score, log q · p p-value ·
    alpha the false-discovery-rate level · null: how scores of irrelevant experts are distributed. An expert
    is *irrelevant* for a token when the model's own Top-K leaves it out. That is a definition made by the
    model, not a truth about usefulness: alpha bounds how many such experts are picked, not any loss of
    quality.

Reference: Y. Benjamini and Y. Hochberg, "Controlling the false discovery rate: a practical and powerful
approach to multiple testing", J. R. Statist. Soc. B 57 (1995), 289-300; the step-up rule is its equation (1).
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import copy
import csv
import difflib
import errno
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Lazy:
    """A library that is imported when it is first used: to import this script takes little time."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


accelerate, tqdm, transformers = _Lazy("accelerate"), _Lazy("tqdm.auto"), _Lazy("transformers")
optimize, special, stats = _Lazy("scipy.optimize"), _Lazy("scipy.special"), _Lazy("scipy.stats")
plt, sns = _Lazy("matplotlib.pyplot"), _Lazy("seaborn")
logger = logging.getLogger("bh_experiments")
Config = Prompt = Row = Mapping[str, Any]  # a routing configuration, a prompt, a row of the results
Configs = Mapping[str, Config]  # by name


class UserError(ValueError):
    """A mistake in what was asked for; the message says what is allowed. The command line exits with 2."""


def _first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _visible(text: str) -> str:
    """`text` on one line, with control and direction characters shown as escapes: nothing hides in it."""
    hidden, category = ("Cc", "Cf", "Cs", "Zl", "Zp"), unicodedata.category
    return "".join(c.encode("unicode_escape").decode() if category(c) in hidden else c for c in text)


def strict_json(value: Any) -> Any:
    """`value` as plain JSON data: numpy scalars become numbers, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` in one step, so that nobody ever sees half a file, and
    a power cut leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Replace a JSON file in one step; `content` is plain data already, see `strict_json`."""
    write_whole(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def _read_json(path: Path, runs: set[str] | None = None) -> dict[str, Any] | None:
    """What a run left in its folder beside the results; None where there is nothing that can be read.

    runs: the ids of the results' runs, see `run_ids`; what is not of just that run is not read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or (runs is not None and runs != {str(content.get("run_id", ""))}):
        return None
    return content


# ---------------------------------------------------------------------------------------------------------
# 1. Settings and routing configurations
# ---------------------------------------------------------------------------------------------------------

DEFAULT_MODEL = "allenai/OLMoE-1B-7B-0924"
DEFAULT_OUTPUT = "./results"
DEFAULT_MAX_TOKENS = 50
DEFAULT_CHECKPOINT_INTERVAL = 5
DEFAULT_SEED = 0
LARGEST_SEED = 2**63 - 1  # what a column of whole numbers can hold
DEFAULT_WINDOW = 256
DEFAULT_LIMIT = 100  # rows of a data set that become prompts
CALIBRATION_SEQUENCES = 32  # sequences of calibration text ...
CALIBRATION_LENGTH = 128  # ... and tokens in each; the first position of each is left out
SIGNIFICANCE_LEVEL = 0.05  # for the tests in the report; unrelated to a configuration's alpha
BASELINE = "topk_8"

# Every rule but "topk" decides how many of the ranked experts run, per token and layer, from min_k to max_k.
# method       "topk": the best k, always. "bh": as many as the Benjamini-Hochberg step-up rejects.
#              "by": the same with Benjamini-Yekutieli's correction, valid under any dependence.
#              "top_p": as few as reach gate mass `p`. "min_p": gate at least `ratio` of the best gate.
#              "threshold": gate at least `threshold`.
# alpha        false-discovery-rate level of the step-up
# temperature  router logits are divided by it before the softmax that gives the scores (not the weights)
# p_values     the null behind the p-values, see section 3: "empirical", "flat" or "softmax"
# shuffle      permute the counts over the tokens of a forward pass: a control for *which* token gets many
# renormalize  what kept weights sum to: "model" its own convention, "none" left as they are, "sum" 1,
#              "topk_mass" the sum of the model's own Top-K
_BH = {"method": "bh", "temperature": 1.0, "min_k": 1, "max_k": 8, "p_values": "empirical"}
ROUTING_CONFIGS: dict[str, dict[str, Any]] = {
    "topk_8": {"method": "topk", "k": 8, "description": "Fixed Top-K, the baseline: the model's own K"},
    "bh_strict": _BH | {"alpha": 0.01, "description": "BH at a strict level: few experts"},
    "bh_moderate": _BH | {"alpha": 0.05, "description": "BH at the customary level"},
    "bh_loose": _BH | {"alpha": 0.10, "description": "BH at a loose level: more experts"},
    "bh_adaptive": _BH | {"alpha": 0.05, "temperature": 2.0, "description": "BH on calibrated temperature"},
}
_STATIC = {f"topk_{k}": {"method": "topk", "k": k, "description": f"Fixed Top-{k}"} for k in range(1, 8)}
_LADDER = {
    f"bh_{null}_{alpha:g}_max{max_k}": _BH | {"alpha": alpha, "max_k": max_k, "p_values": null}
    for max_k in (8, 16)
    for null, alphas in (("empirical", (0.001, 0.01, 0.05, 0.1)), ("flat", (0.01, 0.05, 0.1, 0.5)))
    for alpha in alphas
}
_CONTROLS = {
    "bh_strict_shuffled": ROUTING_CONFIGS["bh_strict"] | {"shuffle": True},
    "bh_moderate_shuffled": ROUTING_CONFIGS["bh_moderate"] | {"shuffle": True},
    "bh_strict_topk_mass": ROUTING_CONFIGS["bh_strict"] | {"renormalize": "topk_mass"},
    "bh_strict_sum": ROUTING_CONFIGS["bh_strict"] | {"renormalize": "sum"},
    "by_moderate": ROUTING_CONFIGS["bh_moderate"] | {"method": "by"},
    "top_p": {"method": "top_p", "p": 0.4},
    "min_p": {"method": "min_p", "ratio": 0.25},
    "threshold": {"method": "threshold", "threshold": 0.03},
}


def suites() -> dict[str, dict[str, dict[str, Any]]]:
    """The families of configurations, by name, with what ROUTING_CONFIGS holds when this is called.

    Where two have one name, that of ROUTING_CONFIGS is taken.
    """
    baseline = {name: config for name, config in ROUTING_CONFIGS.items() if name == BASELINE}
    return {
        "default": {**ROUTING_CONFIGS},
        "frontier": _STATIC | baseline | _LADDER,
        "controls": _STATIC | ROUTING_CONFIGS | _CONTROLS | ROUTING_CONFIGS,
        "all": _STATIC | ROUTING_CONFIGS | _LADDER | _CONTROLS | ROUTING_CONFIGS,
    }


P_VALUES = ("empirical", "flat", "softmax")
RENORMALIZE = ("model", "none", "sum", "topk_mass")
_ANY = ("temperature", "min_k", "max_k", "shuffle", "renormalize")
STEP_UP = ("bh", "by")  # the methods that take a null
METHODS = {  # method -> the fields it takes; the first is the knob that moves its mean number of experts
    "topk": ("k", "renormalize"),
    "bh": ("alpha", "p_values", *_ANY),
    "by": ("alpha", "p_values", *_ANY),
    "top_p": ("p", *_ANY),
    "min_p": ("ratio", *_ANY),
    "threshold": ("threshold", *_ANY),
}


def _plain(value: Any) -> Any:
    """`value`, as Python's own number where it is one of numpy's, so that it can be written as JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and 0 < value <= 1


def check_least(what: str, value: Any, least: int = 1) -> int:
    """`value` as an int; UserError unless it is a whole number of at least `least`."""
    value = _plain(value)
    if not _is_count(value, least):
        raise UserError(f"{what} {value!r}: it must be a whole number of at least {least}")
    return value


def check_seed(what: str, value: Any) -> int:
    """`value` as an int; UserError unless torch, numpy and the columns of a table can all hold it."""
    value = _plain(value)
    if not _is_count(value, 0) or value > LARGEST_SEED:
        raise UserError(f"{what} {value!r}: it must be a whole number from 0 to {LARGEST_SEED}")
    return value


@dataclass(frozen=True)
class Field:
    """A field of a routing configuration."""

    default: Any
    is_valid: Callable[[Any], bool]
    allowed: str  # what is valid, in words
    search: tuple[float, float] | None = None  # of a knob: where --match-experts looks, on a log scale


FIELDS = {
    "k": Field(8, _is_count, "a whole number of at least 1"),
    # The empirical null sets a lower end of its own: the smallest alpha at which anything is rejected.
    "alpha": Field(0.05, _is_share, "a number in (0, 1]", search=(1e-6, 1.0)),
    "p": Field(0.5, _is_share, "a number in (0, 1]", search=(1e-6, 1.0)),
    "ratio": Field(0.2, _is_share, "a number in (0, 1]", search=(1e-6, 1.0)),
    "threshold": Field(0.03, _is_share, "a number in (0, 1]", search=(1e-6, 1.0)),
    "temperature": Field(1.0, lambda value: 0 < value < math.inf, "a number above 0"),
    "min_k": Field(1, _is_count, "a whole number of at least 1"),
    "max_k": Field(8, _is_count, "a whole number of at least 1"),
    "p_values": Field("empirical", P_VALUES.__contains__, f"one of {', '.join(P_VALUES)}"),
    "shuffle": Field(False, lambda value: isinstance(value, bool), "true or false"),
    "renormalize": Field("model", RENORMALIZE.__contains__, f"one of {', '.join(RENORMALIZE)}"),
}
CONFIG_FIELDS = ("method", *FIELDS)


def _choice(what: str, value: Any, allowed: Sequence[str]) -> Any:
    """`value` if it is one of `allowed`, else a UserError that suggests the nearest."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise UserError(f"unknown {what} {value!r}.{hint} Available: {', '.join(allowed)}")


def check_name(name: str) -> None:
    """Names go into tables and plots as they are: raises UserError for one that could break them."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,64}", name, re.ASCII):
        raise UserError(f"configuration name {name!r}: it must be 1 to 64 letters, digits, or any of _ . + -")


def resolve_config(name: str, config: Config) -> dict[str, Any]:
    """A routing configuration with its defaults filled in and its values checked.

    Returns a dict with exactly CONFIG_FIELDS (None where the method has no such field) and `description`.
    Raises UserError naming configuration, field, value and what is allowed.
    """
    check_name(name)
    what = f"configuration {name!r}"
    given = {field: _plain(value) for field, value in config.items() if value is not None}
    method = _choice(f"method in {what}", given.pop("method", None), tuple(METHODS))
    full = {"method": method, **dict.fromkeys(FIELDS), "description": given.pop("description", "")}
    takes = METHODS[method]
    if unknown := sorted(set(given) - set(takes)):
        why = f"does not apply to method {method!r}, which takes {', '.join(takes)}"
        raise UserError(f"{what}: {', '.join(unknown)} {why}")
    for field in takes:
        value = full[field] = given.get(field, FIELDS[field].default)
        try:
            accepted = FIELDS[field].is_valid(value)
        except TypeError:
            accepted = False
        if not accepted:
            raise UserError(f"{what}: {field} = {value!r}, but it must be {FIELDS[field].allowed}")
    if (full["min_k"] or 0) > (full["max_k"] or math.inf):
        raise UserError(f"{what}: min_k = {full['min_k']} is above max_k = {full['max_k']}")
    return full


def is_plain_topk(config: Mapping[str, Any]) -> bool:
    """Whether a resolved configuration, or a row with its fields, is static Top-K as the model has it."""
    return config["method"] == "topk" and config["renormalize"] == "model"


# ---------------------------------------------------------------------------------------------------------
# 2. Prompts
# ---------------------------------------------------------------------------------------------------------

# Each prompt carries a continuation written for this script, so that quality can be scored on text that no
# model had a part in. Ids are stable: results are paired by them.
_PROMPTS = (  # id, category, description, text, reference
    ("simple_cat", "simple", "the shortest everyday sentence",
     "The cat sat on the",
     " mat in front of the fire and washed its paws. Outside the rain fell on the garden, and the wind "
     "moved the branches of the old apple tree. After a while the cat lay down, closed its eyes and "
     "went to sleep. When the children came home from school they found it there, warm and quiet, and "
     "they did not wake it."),
    ("simple_story", "simple", "the opening of a fairy tale",
     "Once upon a time, there was a",
     " poor woodcutter who lived with his daughter at the edge of a great forest. Every morning he went "
     "out to cut wood, and every evening she cooked a soup of roots and herbs. One winter the snow was "
     "so deep that he could not find the path home. Then a grey fox came out of the trees and showed "
     "him the way."),
    ("simple_capital", "simple", "a single fact",
     "The capital of France is",
     " Paris, a city on the river Seine in the north of the country. It has been the seat of government "
     "for most of the time since the Middle Ages. More than two million people live in the city itself, "
     "and many more in the towns around it. Visitors come to see its museums, its churches and the iron "
     "tower that was built in 1889."),
    ("medium_linked_list", "medium", "a definition from computer science",
     "In computer science, a linked list is a linear collection of elements in which each element",
     " points to the next one. Each node holds a value and a reference to its successor, and the last "
     "node refers to nothing. Because the nodes need not lie beside each other in memory, an element "
     "can be inserted or removed without moving the others. The price is that there is no direct "
     "access: to reach the tenth element, the program must follow the list from its head."),
    ("medium_climate", "medium", "a definition from earth science",
     "Climate change refers to long-term shifts in temperature and weather patterns that",
     " can be seen over decades or longer. Some of these changes are natural, for example those caused "
     "by variations in the activity of the sun or by large volcanic eruptions. Since the nineteenth "
     "century, however, the main cause has been the burning of coal, oil and gas, which releases carbon "
     "dioxide into the air. The gas holds back heat that would otherwise leave the earth."),
    ("medium_crash", "medium", "a cause from economic history",
     "The stock market crashed in 1929 because the prices of shares had risen",
     " far above the value of the companies behind them. Many people had bought shares with borrowed "
     "money, and hoped to pay back the loan when prices went up. When prices began to fall, the banks "
     "asked for their money, and owners had to sell at any price. In a few days of October, a large "
     "part of the savings of the country was lost."),
    ("complex_arithmetic", "complex", "arithmetic, step by step",
     "A baker sells rolls in boxes of twelve. On Monday she sells seven boxes and five single rolls, "
     "and on Tuesday twice as many rolls as on Monday. Find the total number of rolls sold, step by "
     "step. First,",
     " find the number of rolls sold on Monday. Seven boxes of twelve rolls are 84 rolls, and with the "
     "five single rolls this makes 89 rolls. Second, find the number sold on Tuesday. Twice 89 is 178. "
     "Third, add the two numbers: 89 and 178 are 267. The baker therefore sold 267 rolls in total on "
     "the two days."),
    ("complex_renaissance", "complex", "a comparison from the history of ideas",
     "Compare the Renaissance with the Enlightenment. Both periods changed the way in which people in "
     "Europe thought about knowledge, but they differed in their sources. While the Renaissance",
     " looked back to the art and the writings of Greece and Rome, the Enlightenment looked forward and "
     "put its trust in reason and experiment. The first gave new life to painting, sculpture and the "
     "study of old languages. The second gave rise to the modern sciences, to the idea of natural "
     "rights, and to the demand that a government should answer to the people it rules."),
    ("complex_learning", "complex", "a comparison from machine learning",
     "Explain the difference between supervised and unsupervised learning. In supervised learning, the "
     "algorithm is given examples together with the correct answers. In unsupervised learning, on the "
     "other hand,",
     " there are no answers, and the algorithm has to find structure in the data by itself. It may "
     "group similar examples into clusters, or look for a small number of directions that explain most "
     "of the variation. The first kind is used when the aim is to predict a known quantity, such as a "
     "price. The second is used to explore data before one knows what to ask."),
    ("domain_decorators", "domain_specific", "programming: Python decorators",
     "In Python, a decorator is a function that takes another function as its argument and",
     " returns a new function in its place. The new function usually calls the original one and does "
     "something before or after the call, for example writing a message to a log or measuring the time. "
     "The at sign in front of the definition is only a short form: it calls the decorator and binds the "
     "result to the same name. Several decorators can be applied, and the one nearest to the function "
     "is applied first."),
    ("domain_mitochondria", "domain_specific", "biology: mitochondria",
     "Mitochondria are organelles found in the cells of most plants and animals. Their main function is "
     "to",
     " release energy from food in a form that the cell can use. Inside the inner membrane, a chain of "
     "proteins passes electrons from one to the next and pumps protons across the membrane. When the "
     "protons flow back, their energy is used to make a molecule called ATP. Mitochondria have their "
     "own small circle of DNA, which in most animals is inherited only from the mother."),
    ("domain_uncertainty", "domain_specific", "physics: the uncertainty principle",
     "The uncertainty principle of quantum mechanics states that the position and the momentum of a "
     "particle",
     " cannot both be known exactly at the same time. The more precisely the position is fixed, the "
     "less precisely the momentum is determined, and the other way round. This is not a defect of the "
     "measuring instruments but a property of nature: a wave that is confined to a small region must be "
     "made of many wavelengths. For large objects the effect is far too small to be noticed."),
)  # fmt: skip
TEST_PROMPTS: list[dict[str, str]] = [
    dict(zip(("id", "category", "description", "text", "reference"), row, strict=True)) for row in _PROMPTS
]


PROMPT_FIELDS = ("id", "text", "category", "description", "reference")


def resolve_prompt(prompt: Prompt) -> dict[str, Any]:
    """A prompt with all its fields; only `text` is needed. Raises UserError where that is missing.

    `document` groups the items of one text (an item is its own document otherwise), and `token_ids`, a list
    or array of integers, is scored as it is, the first being context only, and nothing is generated: see
    `text_windows`.
    """
    text, name = prompt.get("text"), f"prompt {prompt.get('id', dict(prompt))!r:.80}"
    if not isinstance(text, str) or not (text.strip() or "token_ids" in prompt):
        raise UserError(f"{name} has no text: it needs a non-empty string under 'text'")
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    full = {"id": f"prompt_{digest[:12]}", "category": "none", "description": "", "reference": "", **prompt}
    for field in PROMPT_FIELDS:
        if not isinstance(full[field], str) or re.search("[\ud800-\udfff]", full[field]):
            raise UserError(f"{name}: {field} must be a string, without half a character (a surrogate)")
    if "token_ids" in full:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # those are refused below
            full["token_ids"] = torch.as_tensor(full["token_ids"])
        ids = full["token_ids"]
        if not isinstance(ids, Tensor) or ids.ndim != 1 or len(ids) < 2 or ids.is_floating_point():
            raise UserError(f"{name}: token_ids must be a list of at least 2 whole numbers")
    return {"document": full["id"], **full}


def _read_text(path: Path, option: str) -> str:
    """A UTF-8 file that is not empty, else a UserError that names the option."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: {error}") from error
    if not text.strip():
        raise UserError(f"{option} {path}: the file is empty")
    return text


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Results are paired by id: raises UserError for one that occurs twice."""
    [(name, times)] = collections.Counter(prompt["id"] for prompt in prompts).most_common(1)
    if times > 1:
        raise UserError(f"prompt ids must differ, but {name!r} occurs {times} times")


def load_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts from a file: .txt (one a line), .jsonl, .json (a list) or .csv, with PROMPT_FIELDS as keys.

    Raises UserError naming file and entry for what is not a prompt, and for ids that occur twice.
    """
    text, suffix = _read_text(path, "--prompts"), path.suffix.lower()
    _choice("kind of --prompts file", suffix, (".txt", ".jsonl", ".json", ".csv"))
    # Not `splitlines`, which also cuts at characters that may stand inside a text, such as U+2028.
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        if suffix == ".csv":
            rows = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False).to_dict("records")
            rows = [{key: value for key, value in row.items() if value} for row in rows]
        elif suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [{"text": line} if suffix == ".txt" else json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path}: not valid {suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--prompts {path}: it must hold a list of prompts")
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise UserError(f"it is {type(row).__name__}, not an object with 'text'")
            prompts.append(resolve_prompt({k: row[k] for k in PROMPT_FIELDS if row.get(k) is not None}))
        except UserError as error:
            raise UserError(f"--prompts {path}, entry {number}: {error}") from error
    check_ids(prompts)
    return prompts


DATASET_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000  # rows held at a time when rows are drawn at random


def load_dataset_prompts(
    dataset: str,
    split: str | None = None,
    text_column: str | None = None,
    category_column: str | None = None,
    reference_column: str | None = None,
    limit: int = DEFAULT_LIMIT,
    random_seed: int | None = None,
) -> list[dict[str, Any]]:
    """Prompts from the first `limit` rows of a data set: a file, a folder, or a hub NAME or NAME:CONFIG.

    The rows are streamed: a large data set is not downloaded whole. split: "train" where there is one, else
    the only one. text_column: "text" where there is one, else the only column of strings. random_seed: draw
    the rows at random instead, from a buffer of SHUFFLE_BUFFER rows, so uniformly if there are no more. Ids
    are NAME-ROW, whatever is drawn. Rows without text are left out. Raises UserError.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset needs the datasets library: pip install datasets") from None

    what, path = f"--dataset {dataset}", Path(dataset)
    name, source, files = path.name or dataset, (dataset,), {}
    if path.is_file():
        source = (DATASET_FILES[_choice("kind of --dataset file", path.suffix.lower(), (*DATASET_FILES,))],)
        files = {"data_files": str(path)}
    elif not path.exists():
        name, source = dataset, tuple(dataset.split(":", 1))
    try:
        splits = datasets.load_dataset(*source, **files, streaming=True)
        which = f"{'' if split else 'default '}--split of {dataset}"
        split = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
        rows = splits[_choice(which, split, tuple(splits))]
        old = rows.column_names
        rows = rows.map(lambda row, n: {"row": row, "number": n}, with_indices=True, remove_columns=old)
        if random_seed is not None:
            rows = rows.shuffle(seed=random_seed, buffer_size=SHUFFLE_BUFFER)
        taken = [(item["number"], item["row"]) for item in rows.take(limit)]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        way_out = "(give a local file or folder of csv, json, jsonl or parquet, or a data set of the hub)"
        raise UserError(f"{what} cannot be read: {_first_line(error)} {way_out}") from error
    columns, words = tuple(taken[0][1]) if taken else (), ({str}, {str, type(None)})
    strings = [c for c in columns if {type(row.get(c)) for _, row in taken} in words]
    text_column = text_column or ("text" if "text" in columns else strings[0] if len(strings) == 1 else None)
    if taken and text_column is None:
        why = f'has no column "text" and {len(strings)} columns of strings: choose one with --text-column'
        raise UserError(f"{what} {why}. Available: {', '.join(columns)}")
    fields = {"text": text_column, "category": category_column, "reference": reference_column}
    for field, column in fields.items():
        if taken and column is not None:
            _choice(f"--{field}-column", column, columns)
    prompts = []
    for number, row in taken:
        if isinstance(row.get(text_column), str) and row[text_column].strip():
            given = {field: str(row[c]) for field, c in fields.items() if row.get(c) is not None}
            prompts.append(resolve_prompt({"id": f"{name}-{number}", "category": name, **given}))
    if not prompts:
        raise UserError(f"{what}, split {split}: none of {len(taken)} rows has a text")
    if missing := len(taken) - len(prompts):
        logger.warning(f"{what}: {missing} of {len(taken)} rows have no text in column {text_column!r}")
    return prompts


def start_token(tokenizer: Any) -> int:
    """What a text begins with: the beginning-of-text token, else the end-of-text token, else 0."""
    return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)


def text_windows(paths: Sequence[Path], tokenizer: Any, window: int) -> list[dict[str, Any]]:
    """Plain text files, or folders of .txt files, cut into items of `window` tokens to be scored.

    Each file is a document. Every token is scored once, with the one before its window as first context (the
    end-of-text token at the start): the windows of lm-evaluation-harness's rolling log-likelihood. A last
    window shorter than half is left out. Their `text` stays empty: the tokens hold it in less memory.
    """
    files = []  # (file, name)
    for path in paths:
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--text {path}: the folder holds no .txt file")
        files += [(file, str(file.relative_to(path)) if path.is_dir() else file.name) for file in found]
    items = []
    for file, name in files:
        tokens = tokenizer(_read_text(file, "--text"), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.array([start_token(tokenizer), *tokens], dtype=np.int32)
        for first in range(1, len(tokens), window):
            part = tokens[first - 1 : first + window]
            if len(part) > max(1, window // 2):
                item = {"id": f"{name}:{first - 1}", "text": "", "category": "text", "document": name}
                items.append(resolve_prompt(item | {"token_ids": part}))
    if not items:
        raise UserError(f"--text: no file has {window // 2} tokens, half a window of {window}")
    check_ids(items)
    return items


# ---------------------------------------------------------------------------------------------------------
# 3. Nulls: score -> p-value -> table of critical scores
# ---------------------------------------------------------------------------------------------------------
#
# A null says how large the score of an irrelevant expert may be by chance. Each null gives p-values for
# scores and, the other way round, the smallest score that reaches a given p-value. The second form is what
# runs inside the model: for a fixed null, p_(k) <= k alpha / E is the same event as s_(k) >= c_k, so a table
# of E critical scores per layer replaces all p-values.


def gate_scores(router_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Scores s = log softmax(logits / temperature), at least float32: [..., E] -> [..., E]."""
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    if temperature != 1:
        router_logits = router_logits.to(dtype) / temperature
    return torch.log_softmax(router_logits, dim=-1, dtype=dtype)


@dataclass(frozen=True)
class FlatNull:
    """Closed form: the gate vector of an irrelevant set of experts is uniform on the simplex.

    A flat Dirichlet over E experts has Beta(1, E - 1) marginals, so the upper-tail p-value of a gate
    probability q is exactly (1 - q)^(E - 1). It needs no data. Real routers are more peaked than this null,
    and all probabilities of one token sum to 1, so it is strict: few experts are kept.
    """

    num_experts: int

    def p_values(self, scores: Tensor) -> Tensor:
        """[..., E] scores -> [..., E] p-values in float64."""
        if self.num_experts == 1:  # Beta(1, 0): the only expert always has q = 1
            return torch.ones_like(scores, dtype=torch.float64)
        return torch.exp((self.num_experts - 1) * torch.log1p(-scores.double().exp().clamp(max=1)))

    def critical_scores(self, levels: Tensor) -> Tensor:
        """[E] p-value levels -> [E] smallest scores whose p-value is at most the level, float64."""
        if self.num_experts == 1:
            return torch.where(levels < 1, math.inf, -math.inf).double()
        return torch.log(-torch.expm1(levels.double().log() / (self.num_experts - 1)))


@dataclass(frozen=True)
class SoftmaxNull:
    """p = 1 - q, as in an earlier attempt. Degenerate, kept for the record.

    The k best probabilities sum to at most 1, so q_(k) <= 1/k and p_(k) >= 1 - 1/k, whatever the logits: past
    rank 1 no level below 1/2 is ever reached, and BH returns min_k for every customary alpha.
    """

    num_experts: int

    def p_values(self, scores: Tensor) -> Tensor:
        """[..., E] scores -> [..., E] values in float64."""
        return -torch.expm1(scores.double())

    def critical_scores(self, levels: Tensor) -> Tensor:
        """[E] levels -> [E] smallest scores that reach them, float64."""
        return torch.log1p(-levels.double())


class EmpiricalNull:
    """The scores that irrelevant experts really had, on calibration text: p = (1 + #{null >= s}) / (n0 + 1).

    This is the p-value of a permutation test (Phipson and Smyth 2010): never 0, and valid when the tested
    score is exchangeable with the null scores. The smallest p-value is 1 / (n0 + 1), so a level alpha over E
    experts needs n0 + 1 >= E / alpha.
    """

    def __init__(self, null_scores: Tensor):
        """`null_scores`: [n0] scores of (token, expert) pairs outside the model's own Top-K, any order."""
        self.null_scores = null_scores.detach().float().flatten().sort().values
        self.n0 = self.null_scores.numel()
        if self.n0 == 0 or not torch.isfinite(self.null_scores).all():
            raise UserError(f"an empirical null needs finite scores; got {self.n0} scores")

    def smallest_alpha(self, num_experts: int) -> float:
        """The smallest alpha at which BH over `num_experts` can reject a single expert."""
        return num_experts / (self.n0 + 1)

    def p_values(self, scores: Tensor) -> Tensor:
        """[..., E] scores -> [..., E] p-values in float64."""
        null = self.null_scores.to(scores.device)
        below = torch.searchsorted(null, scores.float().contiguous(), side="left")
        return (1 + self.n0 - below).double() / (self.n0 + 1)

    def critical_scores(self, levels: Tensor) -> Tensor:
        """[E] levels -> [E] smallest float32 scores whose p-value is at most the level; inf where none is."""
        counts = torch.arange(self.n0 + 1, dtype=torch.float64)
        reachable = (1 + counts) / (self.n0 + 1)  # the p-value when `count` null scores reach s, ascending
        # At most `allowed` null scores may reach s: those s that lie above the next largest of them.
        allowed = torch.searchsorted(reachable, levels.double().cpu(), side="right") - 1
        above = self.null_scores.flip(0).cpu()
        bound = above[allowed.clamp(0, self.n0 - 1)]
        critical = torch.nextafter(bound, torch.tensor(math.inf))
        return critical.masked_fill(allowed < 0, math.inf).masked_fill(allowed >= self.n0, -math.inf)


Null = FlatNull | SoftmaxNull | EmpiricalNull

# ---------------------------------------------------------------------------------------------------------
# 4. Selection: scores or p-values -> how many experts
# ---------------------------------------------------------------------------------------------------------


def _last_true(mask: Tensor) -> Tensor:
    """Position, from 1, of the last True along the last axis, 0 where there is none: [..., D] -> [...]."""
    return (mask * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax(-1)


def bh_levels(alpha: float, num_experts: int) -> Tensor:
    """The step-up line k alpha / E for k = 1..E, float64: [E]."""
    return torch.arange(1, num_experts + 1, dtype=torch.float64) * alpha / num_experts


def bh_rejections(p_values: Tensor, alpha: float) -> Tensor:
    """Number of hypotheses that BH rejects: the largest k with p_(k) <= k alpha / E (1995, eq. 1).

    p_values: [..., E] in [0, 1]; returns int64 [...]. Controls the FDR at alpha for independent or positively
    dependent (PRDS) p-values; under any dependence the bound is alpha * (1 + 1/2 + ... + 1/E).
    """
    ranked = p_values.double().sort(dim=-1).values
    return _last_true(ranked <= bh_levels(alpha, p_values.shape[-1]).to(ranked.device))


FEW_SCORES = 4096  # up to here, tokens times experts, a sort takes less time than counting does


def count_rejections(scores: Tensor, critical: Tensor) -> Tensor:
    """The same number from scores and a table of critical scores: the largest k with s_(k) >= c_k.

    scores: [T, E]; critical: [E], non-increasing; returns int64 [T], exact at every rank.

    For many tokens on a CPU a sort is what costs, so there nothing is sorted. With n(k) the number of scores
    >= c_k, the answer is the largest k with n(k) >= k. n grows with k: from k = E on, k <- n(k) falls until
    k = n(k), and cannot pass the answer. 5 to 9 steps are usual with 64 experts. On a GPU each step would
    wait for the host, and the sort is cheap.
    """
    if scores.device.type != "cpu" or scores.numel() <= FEW_SCORES:
        return _last_true(scores.sort(dim=-1, descending=True).values >= critical)
    table = nn.functional.pad(critical, (1, 0), value=math.inf)  # [E + 1], at 0 what no score reaches
    scores = scores.detach()
    reached = torch.empty_like(scores)  # reused, and not bool: a sum of bool costs three times as much

    def number(level: Tensor) -> Tensor:
        return torch.ge(scores, level, out=reached).sum(-1).long()  # [T, E] -> [T]

    count = number(table[-1])  # n(E)
    while not torch.equal(fewer := number(table[count].unsqueeze(-1)), count):
        count = fewer
    return count


def counting_rule(config: Config, critical: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The rule of a resolved configuration: scores [T, E] -> counts before floor and cap, int64 [T].

    critical: the table [E] of a step-up rule, see `critical_scores`; None for the others.
    """
    method = config["method"]
    if method in STEP_UP:
        return lambda scores: count_rejections(scores, critical)
    if method == "top_p":  # an expert runs while the mass of the better ones is below p

        def count(scores: Tensor) -> Tensor:
            mass = scores.topk(min(config["max_k"], scores.shape[-1])).values.exp().cumsum(-1)
            return (mass < config["p"]).sum(-1) + 1

        return count
    if method == "min_p":
        return lambda scores: (scores >= scores.amax(-1, keepdim=True) + math.log(config["ratio"])).sum(-1)
    if method == "threshold":
        return lambda scores: (scores >= math.log(config["threshold"])).sum(-1)
    return lambda scores: scores.new_full(scores.shape[:1], config["k"], dtype=torch.int64)


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 8,
    return_stats: bool = False,
    null: Null | None = None,
) -> tuple[Tensor, ...]:
    """Select experts for each token by the Benjamini-Hochberg step-up, clipped to [min_k, max_k].

    router_logits: [..., E], any floating dtype; -inf marks an expert that may not be chosen, NaN and +inf are
        refused. All arithmetic is float32 or better.
    alpha: false-discovery-rate level in (0, 1]. temperature: divides the logits before the softmax, > 0.
    min_k, max_k: floor and cap of the number of experts; E is a cap in any case. null: gives the p-values;
    FlatNull(E), the closed form, when None; pass a calibrated EmpiricalNull otherwise.

    Returns
        routing_weights [..., E]: softmax(logits / temperature) over the selected experts, zero elsewhere, sum
        1. selected_experts [..., max_k]: int64, best first, padded with -1; ties go to the lower index.
        num_selected [...]: int64. With return_stats also a dict: p_values [..., E], thresholds [E] = k alpha
        / E, rejections [...] before floor and cap.

    Raises ValueError for arguments outside these ranges.

    Assumption: each p-value is uniform or larger for an irrelevant expert, and the p-values of a token are
    independent or positively dependent. They come from one hidden state, so this cannot be shown; the worst
    case is in `bh_rejections`. The guarantee is about irrelevant experts picked, not about quality lost.

    >>> weights, experts, count = benjamini_hochberg_routing(torch.tensor([9.0, 5.0, 0.0]), 0.5, max_k=3)
    >>> experts.tolist(), int(count)
    ([0, -1, -1], 1)
    """
    if not router_logits.is_floating_point() or router_logits.ndim == 0 or router_logits.shape[-1] == 0:
        got = f"{router_logits.dtype} {tuple(router_logits.shape)}"
        raise UserError(f"router_logits must be floating point [..., E]; got {got}")
    if torch.isnan(router_logits).any() or torch.isposinf(router_logits).any():
        raise UserError("router_logits must not contain NaN or +inf")
    if torch.isneginf(router_logits).all(dim=-1).any():
        raise UserError("router_logits has a token whose experts are all -inf; at least one must be allowed")
    settings = {"method": "bh", "alpha": alpha, "temperature": temperature, "min_k": min_k, "max_k": max_k}
    resolve_config("benjamini_hochberg_routing", settings)
    num_experts, scores = router_logits.shape[-1], gate_scores(router_logits, temperature)  # [..., E]
    if torch.isnan(scores).any():
        raise UserError(f"router_logits / temperature passes float32: temperature = {temperature} is too low")
    p_values = (null or FlatNull(num_experts)).p_values(scores)  # [..., E]
    rejections = bh_rejections(p_values, alpha)  # [...]
    num_selected = torch.minimum(rejections.clamp(min_k, max_k), torch.isfinite(scores).sum(-1))

    ranked = scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(num_experts, device=scores.device) < num_selected.unsqueeze(-1)  # [..., E], by rank
    kept_weights = torch.softmax(ranked.values.masked_fill(~kept, -math.inf), dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, ranked.indices, kept_weights)  # [..., E]
    padding = (0, max(0, max_k - num_experts))
    experts = nn.functional.pad(ranked.indices.masked_fill(~kept, -1), padding, value=-1)[..., :max_k]
    if not return_stats:
        return weights, experts, num_selected
    found = {"p_values": p_values, "thresholds": bh_levels(alpha, num_experts), "rejections": rejections}
    return weights, experts, num_selected, found


class Calibration:
    """What the unpatched routers did on calibration text: the source of the empirical nulls.

    logits [L, N, E] float32 and own [L, N, K] int16, the experts that the model chose, for N tokens. Both
    are kept, and not the scores, so that one forward pass serves every temperature.
    """

    def __init__(self, logits: Tensor, own: Tensor):
        self.logits, self.own = logits, own
        # Built once: tables of critical scores above all, which every patch asks for.
        self.null, self.critical_scores = map(functools.cache, (self._null, self._critical_scores))

    def scores(self, layer_index: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Scores [N, E] of one layer, and bool [N, E]: which pairs lie outside the model's own Top-K."""
        scores = gate_scores(self.logits[layer_index], temperature)
        everywhere = torch.ones_like(scores, dtype=torch.bool)
        return scores, everywhere.scatter(1, self.own[layer_index].long(), False)

    def _null(self, layer_index: int, temperature: float) -> EmpiricalNull:
        """The null of one layer: the scores of its irrelevant pairs."""
        scores, outside = self.scores(layer_index, temperature)
        return EmpiricalNull(scores[outside])

    def _critical_scores(self, layer_index: int, temperature: float, alpha: float) -> Tensor:
        """The table of critical scores [E] of one layer."""
        levels = bh_levels(alpha, self.logits.shape[-1])
        return self.null(layer_index, temperature).critical_scores(levels)

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write as safetensors, whole or not at all, together with what it was made from."""
        about = {"about": json.dumps(about)}
        with replacing(path) as part:
            try:
                safetensors.torch.save_file({"logits": self.logits, "own": self.own}, part, metadata=about)
            except safetensors.SafetensorError as error:  # such as a full disk
                raise OSError(errno.EIO, str(error)) from error

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any]) -> Calibration | None:
        """The calibration saved at `path` if it was made from exactly `about`, else None."""
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                if json.loads((file.metadata() or {}).get("about", "null")) == about:
                    return cls(file.get_tensor("logits"), file.get_tensor("own"))
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            logger.warning(f"{path} is not readable ({error}); calibrating again")
        return None


def _correction(config: Config, num_experts: int) -> float:
    """What divides alpha: Benjamini-Yekutieli is BH at alpha / (1 + 1/2 + ... + 1/E) (2001, theorem 1.3)."""
    return sum(1 / k for k in range(1, num_experts + 1)) if config["method"] == "by" else 1.0


def critical_scores(
    config: Config, num_experts: int, layer_index: int, calibration: Calibration | None
) -> Tensor | None:
    """The table c_1 >= ... >= c_E of one layer for a resolved step-up rule, float32 [E]; None for others."""
    if config["method"] not in STEP_UP:
        return None
    alpha = config["alpha"] / _correction(config, num_experts)
    if config["p_values"] != "empirical":
        null = FlatNull(num_experts) if config["p_values"] == "flat" else SoftmaxNull(num_experts)
        return null.critical_scores(bh_levels(alpha, num_experts)).float()
    if calibration is None:
        raise UserError('p_values "empirical" needs calibration=calibrate(model, tokenizer); "flat" does not')
    null = calibration.null(layer_index, config["temperature"])
    if alpha < (smallest := null.smallest_alpha(num_experts)):
        raise UserError(
            f"alpha = {alpha:.2g} needs n0 + 1 >= E / alpha = {num_experts / alpha:,.0f} null scores a "
            f"layer; the calibration has n0 = {null.n0:,}, enough for alpha >= {smallest:.2g}. Use a "
            "larger alpha, a longer --calibration-text, or --p-values flat"
        )
    return calibration.critical_scores(layer_index, config["temperature"], alpha)


# ---------------------------------------------------------------------------------------------------------
# 5. Routers: found in a model, and understood by what they do
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoELayer:
    """One router and the experts it feeds, as found in a model by looking at what they do."""

    index: int  # its place among the MoE layers of the model, from 0: what tables by layer go by
    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int  # E
    own_k: int  # the model's own K
    knob: tuple[Any, str] | None  # the object and attribute that set K; without one, K cannot be raised
    ranked: bool  # whether candidates come best first
    choice: int | None  # which of the router's calls of `topk` picks the candidates, where it calls that
    renormalizes: str | None  # whose sum scales the kept: "weights", "scores" of that topk, or nothing
    probabilities: bool  # whether the first output is not logits but their softmax
    device: torch.device  # where it computes

    @property
    def max_k(self) -> int:
        return self.num_experts if self.knob else self.own_k

    def logits(self, first_output: Tensor) -> Tensor:
        return first_output.log() if self.probabilities else first_output


class _TopK(TorchFunctionMode):
    """Keeps what each `topk` returned inside the block: values, indices, and whether they are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            is_sorted = args[4] if len(args) > 4 else (kwargs or {}).get("sorted", True)
            self.calls.append((*result, is_sorted))
        return result

    def position(self, indices: Tensor) -> int | None:
        """Which call picked these candidates [T, K]: the last that returned them, or None."""
        found = [i for i, call in enumerate(self.calls) if torch.equal(call[1], indices)]
        return found[-1] if found else None


_PATCHING = threading.RLock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time: to look at a model changes it for a moment, and a patch is many steps."""
    with _PATCHING:
        yield


def _refuse_patched(name: str, router: nn.Module) -> None:
    if hasattr(router, "_bh_patched"):
        raise UserError(f"{name} is patched already: leave the first `with` block before the next")


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute on an instance; `stack` puts back exactly what the instance held, or nothing.

    How to undo it is noted before it is done, and is one step: Ctrl-C cannot come in between.
    """
    held = vars(owner)
    undo = (held.update, {name: held[name]}) if name in held else (held.pop, name, None)
    stack.callback(*undo)
    setattr(owner, name, value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; each module that trained before trains again after it."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if module.training:
                _replace(stack, module, "training", False)
        yield


Candidates = tuple[Tensor, Tensor, Tensor | None]  # weights, indices, scores of the topk that chose: [T, K]


def _find_knob(router: nn.Module, call: tuple, own_k: int) -> tuple[Any, Any]:
    """What sets K: (object, attribute) of the router or of something it holds, such as a config.

    Found by setting each whole number that equals K to another K and counting the candidates. Returns the
    knob and the candidates at the other K, or (None, None).
    """
    other = max(1, own_k // 2) if own_k > 1 else 2
    for owner in (router, *vars(router).values()):
        for key, value in list(getattr(owner, "__dict__", {}).items()):
            if type(value) is int and value == own_k:
                # Any failure only says that this number is something else.
                with contextlib.suppress(Exception), contextlib.ExitStack() as stack, _TopK() as topk:
                    _replace(stack, owner, key, other)
                    _, weights, indices = router(*call[0], **call[1])
                    if indices.shape[1] == other:
                        position = topk.position(indices)
                        scores = None if position is None else topk.calls[position][0]
                        return (owner, key), (weights, indices, scores)
    return None, None


def _weights_at_two_k(num_experts: int, few: Candidates, many: Candidates) -> tuple[str | None, float]:
    """How the weights at a smaller K follow from those at a larger: whose sum scales them, and the error.

    The error is the largest over tokens, as a share of the token's largest weight; infinite where the few
    are not among the many. Tokens whose choice is a tie do not count unless they are most of them.
    """

    def of_few(values: Tensor) -> Tensor:  # what the larger K says [T, K] about the candidates of the smaller
        spread = values.new_full((len(values), num_experts), math.nan, dtype=torch.float32)
        return spread.scatter(1, many[1], values.float()).gather(1, few[1])

    def scale(values: Tensor) -> Tensor:  # [T, 1]
        return values.float().sum(1, keepdim=True) / of_few(values).sum(1, keepdim=True)

    actual, kept = few[0].float(), of_few(many[0])
    nested = ~kept.isnan().any(1)  # [T]
    if nested.float().mean() <= 0.5:
        return None, math.inf
    guesses = {None: kept, "weights": kept * scale(many[0])}
    if many[2] is not None:
        guesses["scores"] = kept * scale(many[2])
    largest = actual.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)  # [T]
    errors = {how: ((actual - g).abs().amax(1) / largest)[nested].amax().item() for how, g in guesses.items()}
    rounding = max(1e-5, 2 * torch.finfo(few[0].dtype).eps)  # below it the simplest is taken
    best = min(errors, key=lambda how: max(errors[how], rounding) if errors[how] >= 0 else math.inf)
    return best, errors[best]


def _inspect(
    index: int, name: str, router: nn.Module, experts: Any, call: tuple, experts_call: tuple | None
) -> MoELayer:
    """A layer's router and experts, from what they do with the inputs they were seen to get."""
    args, kwargs = call

    def refuse(why: str) -> UserError:
        return UserError(f"{name} ({type(router).__name__}) cannot be patched: {why}")

    with _TopK() as topk:
        output = router(*args, **kwargs)
    parts = output if isinstance(output, tuple) else (output,)
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    wrong = refuse(f"it returns {shapes}, not logits [T, E], weights [T, K], indices [T, K] with K < E")
    if len(parts) != 3 or not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        raise wrong
    logits, weights, indices = parts  # [T, E], [T, K], [T, K]
    num_experts, own_k = logits.shape[1], indices.shape[1]
    if indices.is_floating_point() or weights.shape != indices.shape or own_k >= num_experts:
        raise wrong
    given = [getattr(part, "shape", None) for part in experts_call[0][1:3]] if experts_call else []
    if given != [indices.shape] * 2:
        raise refuse("no `experts` beside it is called with (hidden, indices, weights)")
    try:  # one row for each pair of token and expert: how dropped experts are skipped
        experts(experts_call[0][0], indices[:, :1], weights[:, :1], *experts_call[0][3:], **experts_call[1])
    except Exception as error:
        raise refuse(f"its experts cannot run one expert for a token ({_first_line(error)})") from error

    choice = topk.position(indices)
    scores, ranked = (None, None) if choice is None else topk.calls[choice][::2]
    if ranked is None and not (logits.gather(1, indices).diff(dim=1) <= 0).all():
        raise refuse("it returns its candidates in an order that cannot be told")
    knob, others = _find_knob(router, call, own_k)
    if knob is None and own_k == 1:
        raise refuse("it picks one expert: there is nothing to drop, and it cannot be asked for more")
    renormalizes, error = None, 0.0
    if knob is not None:
        few, many = sorted([(weights, indices, scores), others], key=lambda c: c[1].shape[1])
        renormalizes, error = _weights_at_two_k(num_experts, few, many)
    if not error < 0.05:  # 16-bit rounding
        at = f"K = {others[1].shape[1]} do not follow from those at K = {own_k}"
        raise refuse(f"its weights at {at}, nor by scaling them")
    first = logits.float()
    probabilities = bool((first >= 0).all()) and torch.allclose(first.sum(1), first.new_ones(()), atol=0.01)
    found = (knob, ranked is not False, choice, renormalizes, probabilities, logits.device)
    return MoELayer(index, name, router, experts, num_experts, own_k, *found)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids; with weights offloaded by accelerate, where it computes."""
    device = next(model.parameters()).device
    if device.type == "meta":
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next(place for place in places if place is not None)
    return torch.device(device)


def _observed_calls(model: nn.Module, modules: Sequence[Any]) -> dict[nn.Module, tuple[tuple, dict]]:
    """What each module is called with when the model reads eight tokens: its args and kwargs."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(module, (args, kwargs))

    with contextlib.ExitStack() as stack:
        for module in (module for module in modules if isinstance(module, nn.Module)):
            stack.enter_context(module.register_forward_pre_hook(keep, with_kwargs=True))
        if modules:
            ids = torch.arange(8, device=input_device(model))[None]
            try:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            except Exception as error:
                why = f"{type(error).__name__}: {_first_line(error)}"
                raise UserError(f"{type(model).__name__} cannot read eight tokens ({why})") from error
    return calls


@_alone()
@torch.no_grad()
def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a transformers model, in order, by the architecture's own declaration.

    `_can_record_outputs["router_logits"]` of a model class names its router class; what the routers return,
    and what they make of another K, is found by running eight tokens. No list of architectures or of
    attribute names is needed. Raises UserError, in one line, for a model that cannot be patched.
    """
    declared: list[tuple[type, str]] = []  # class of the routers, and a part of their names
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            kind, part = getattr(entry, "target_class", entry), getattr(entry, "layer_name", None) or ""
            if isinstance(kind, type):
                declared.append((kind, f".{part.strip('.')}." if part else ""))
    routers = {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(module, kind) and part in f".{name}." for kind, part in declared)
    }
    for name, router in routers.items():
        _refuse_patched(name, router)
    beside = {n: getattr(model.get_submodule(n.rpartition(".")[0]), "experts", None) for n in routers}
    with evaluating(model):
        calls = _observed_calls(model, [*routers.values(), *beside.values()])
        called = {name: router for name, router in routers.items() if router in calls}
        layers = [
            _inspect(index, name, router, beside[name], calls[router], calls.get(beside[name]))
            for index, (name, router) in enumerate(called.items())
        ]
    what = type(model).__name__
    if not layers:
        raise UserError(
            f"{what} has no router that this script can patch: it needs a mixture-of-experts model of "
            "transformers >= 5.17 that declares one, for example OLMoE (see --list-architectures)"
        )
    for field in ("num_experts", "own_k"):
        if len(numbers := {getattr(layer, field) for layer in layers}) > 1:
            raise UserError(f"{what} has layers that differ in {field}: {sorted(numbers)}")
    return layers


# What the tests of this script found, by building a tiny random model of each and checking the invariants of
# the seam. The seam itself uses neither table: another architecture may work as well.
VERIFIED_WITH = "5.23"
VERIFIED_ARCHITECTURES = """
afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe
glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe
hy_v3 hy_v4 inkling2_text jamba kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m2
minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next
qwen4_exp_text solar_open
"""
REFUSED_ARCHITECTURES = {
    "dbrx": "its router returns logits only",
    "doge": "its experts are single neurons, chosen inside the block",
    "inkling_text": "its router weighs the shared experts together with the others",
    "jetmoe": "its router sorts the tokens by expert itself",
    "llama4_text": "its router returns scores of all experts, no selection",
    "longcat_flash": "its experts cannot run one expert for a token",
    "zaya": "its router returns a state for the next layer besides, and picks one expert",
}


def list_architectures() -> list[dict[str, str]]:
    """The causal language models of the installed transformers that declare a router, and what is known."""
    auto, types = transformers.models.auto, collections.defaultdict(list)
    for model_type, names in auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = auto.configuration_auto.model_type_to_module_name(model_type)
        path = Path(auto.__file__).parents[1] / module / f"modeling_{module}.py"
        if path.exists() and '"router_logits"' in path.read_text(encoding="utf-8"):
            types[names if isinstance(names, str) else names[0]].append(model_type)
    same = transformers.__version__.startswith(VERIFIED_WITH)
    verified = "verified" if same else f"verified with transformers {VERIFIED_WITH}"
    rows = []
    for name, models in sorted(types.items(), key=lambda item: item[1]):
        why = next((REFUSED_ARCHITECTURES[m] for m in models if m in REFUSED_ARCHITECTURES), "")
        known = verified if set(models) & set(VERIFIED_ARCHITECTURES.split()) else "not verified"
        status = "refused" if why else known
        rows.append({"model type": ", ".join(models), "class": name, "status": status, "why": why})
    return rows


# ---------------------------------------------------------------------------------------------------------
# 6. The seam: routers patched, experts skipped, all recorded and restored
# ---------------------------------------------------------------------------------------------------------
#
# A transformers MoE block calls a router, which returns (logits [T, E], weights [T, K], indices [T, K]), and
# hands weights and indices to an experts module. The seam wraps both on the instance. The router is asked
# for its K best candidates, so that scoring, bias, grouping and scaling stay the model's own; the rule says
# how many stay; the weights of the others become zero. The experts see only the pairs with a weight. So a
# zero weight *is* a dropped expert: nothing else passes between the two, and any other reader of the
# router's output sees a valid routing.


def _bounds(config: Config, widest: int) -> tuple[int, int]:
    """Floor and cap of the number of experts, no more than a layer can give."""
    k = config["k"]
    return (min(k or config["min_k"], widest), min(k or config["max_k"], widest))


def _adaptive_router(
    layer: MoELayer, config: Config, critical: Tensor | None, width: int, observe: Callable, seed: int
) -> Callable:
    """A `forward` for the router: its own candidates, those beyond the rule's count with weight zero.

    critical: see `counting_rule`. width: K, how many candidates the router returns. observe: called with the
    counts [T] before floor and cap. seed: to shuffle.
    """
    forward, rule = layer.router.forward, counting_rule(config, critical)
    temperature, bounds = config["temperature"] or 1.0, _bounds(config, layer.max_k)
    ranks, target = torch.arange(width, device=layer.device), config["renormalize"]
    if target == "model":
        target = "candidates" if layer.renormalizes else "none"
    kept_sum = {  # what the kept are scaled to, from what all candidates have and their ranks, both [T, K]
        "none": None,
        # As if the model had been asked for fewer: the kept take over the sum of all.
        "candidates": lambda shares, rank: shares.sum(-1, keepdim=True),
        "sum": lambda shares, rank: 1.0,
        "topk_mass": lambda shares, rank: shares.masked_fill(rank >= layer.own_k, 0).sum(-1, keepdim=True),
    }[target]
    by_scores = target == "candidates" and layer.renormalizes == "scores"
    # The scores that chose are looked at only where they are needed: watching costs time for each token.
    watched = by_scores or not layer.ranked

    @functools.wraps(forward)
    def adaptive_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _TopK() if watched else contextlib.nullcontext() as topk:
            first, weights, indices = forward(*args, **kwargs)  # [T, E], [T, K], [T, K]
        scores = topk.calls[layer.choice][0] if watched else None  # [T, K]
        # A candidate's rank [K], or [T, K] where they come in any order.
        rank = ranks if layer.ranked else scores.argsort(dim=-1, descending=True, stable=True).argsort()
        wanted = rule(gate_scores(layer.logits(first), temperature))  # [T]
        observe(wanted)
        count = wanted.clamp(*bounds).unsqueeze(-1)  # [T, 1]
        if config["shuffle"]:
            shuffled = torch.randperm(len(count), generator=torch.Generator().manual_seed(seed))
            count = count[shuffled.to(count.device)]
        dropped = rank >= count  # [T, K]
        kept_weights = weights.masked_fill(dropped, 0)
        if kept_sum is not None:
            # Where nothing is dropped the factor is exactly 1.
            shares = scores if by_scores else weights
            kept_shares = scores.masked_fill(dropped, 0) if by_scores else kept_weights
            kept_weights = kept_weights * (kept_sum(shares, rank) / kept_shares.sum(-1, keepdim=True))
        return first, kept_weights.to(weights.dtype), indices

    return adaptive_forward


def _skipping_experts(experts: nn.Module) -> Callable:
    """A `forward` for the experts that computes only the (token, expert) pairs whose weight is not zero.

    Each kept pair becomes one row with K = 1, so the model's own experts do the work on every back end. With
    nothing dropped the original runs as it is and the result is bit-identical.
    """
    forward = experts.forward

    @functools.wraps(forward)
    def skipping_forward(
        hidden: Tensor, indices: Tensor, weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        kept = weights != 0  # [T, K]
        token, slot = kept.nonzero(as_tuple=True)  # [P] pairs; the only wait for a GPU
        if len(slot) == kept.numel():
            return forward(hidden, indices, weights, *args, **kwargs)
        if len(kept) == 1:  # one token, as in decoding: the same as a smaller K
            return forward(hidden, indices[:, slot], weights[:, slot], *args, **kwargs)
        pairs = indices[token, slot, None], weights[token, slot, None]  # [P, 1], [P, 1]
        # A sum over slots, not index_add_, whose order on a GPU changes from run to run.
        output = hidden.new_zeros(*weights.shape, hidden.shape[-1])  # [T, K, H]
        output[token, slot] = forward(hidden[token], *pairs, *args, **kwargs).to(output.dtype)
        return output.sum(dim=1)

    return skipping_forward


SHARES = ("floor_frac", "cap_frac", "zero_rejection_frac")  # of the decisions, one a token and layer
ROUTING_COLUMNS = (
    *("avg_experts_per_token", "std_experts_per_token", "min_experts", "max_experts"),
    *("expert_utilization_cv", "expert_utilization_max_min_ratio", *SHARES, "gate_mass_frac"),
)
MASS_UNIT = 2**32  # gate mass is summed in whole numbers: exact, and the same in any order


LAYER_COLUMNS = (*ROUTING_COLUMNS, "use_entropy_bits", "num_tokens")


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routers did with some tokens, as sums [L, 2 E + 3] int64; those of two texts add up.

    For each layer: tokens by the number of experts that ran, 0 to E; times each expert ran; tokens for which
    the rule rejected nothing; gate mass of the experts that ran, in 1 / MASS_UNIT.
    """

    sums: Tensor
    config: Config  # resolved
    layers: tuple[int, ...]  # the index of each layer [L] in the model

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(self.sums + other.sums, self.config, self.layers)

    @property
    def num_experts(self) -> int:
        return (self.sums.shape[1] - 3) // 2

    @property
    def counts(self) -> Tensor:
        return self.sums[:, : self.num_experts + 1]  # [L, E + 1]

    @property
    def use(self) -> Tensor:
        return self.sums[:, self.num_experts + 1 : -2]  # [L, E]

    def by_layer(self) -> pd.DataFrame:
        """One row a layer, under its index; the README gives the formula of each column. Empty if no token
        came by."""
        measures = self._measures(pooled=False)
        frame = pd.DataFrame(measures, columns=LAYER_COLUMNS, index=self.layers if measures else ())
        return frame.astype({"min_experts": int, "max_experts": int, "num_tokens": int})

    def row(self) -> dict[str, Any]:
        """The ROUTING_COLUMNS of a result row, over all layers; all None if no token came by."""
        found = {name: values[0] for name, values in self._measures(pooled=True).items()}
        return strict_json({name: found.get(name) for name in ROUTING_COLUMNS})

    def _measures(self, pooled: bool) -> dict[str, list[float]]:
        """LAYER_COLUMNS, a value a layer, or one for all layers; empty if no token came by."""
        counts, use, rest = self.counts.double(), self.use.double(), self.sums[:, -2:].double()
        use = use / use.sum(1, keepdim=True)  # [L, E] shares
        entropy = torch.special.entr(use).sum(1) / math.log(2)
        # An unused expert counts as used once, so that the ratio stays finite.
        extremes = self.use.amax(1) / self.use.amin(1).clamp(min=1)
        of_layer = torch.stack([use.std(1, correction=0) * use.shape[1], extremes, entropy], dim=1)  # [L, 3]
        if pooled:
            counts, rest = (part.sum(0, keepdim=True) for part in (counts, rest))
            of_layer = of_layer.mean(0, keepdim=True)
        tokens = counts.sum(1)
        if not tokens.all():
            return {}
        number = torch.arange(counts.shape[1], dtype=torch.float64)
        mean = counts @ number / tokens
        spread = (counts @ number**2 / tokens - mean**2).clamp(min=0).sqrt()
        ran = counts > 0
        shares = counts.new_full((len(counts), 3), math.nan)
        if self.config["method"] != "topk":
            floor, cap = _bounds(self.config, self.num_experts)
            shares = torch.stack([counts[:, floor], counts[:, cap], rest[:, 0]], 1) / tokens[:, None]
        columns = (
            *(mean, spread, ran.int().argmax(1), _last_true(ran) - 1),
            *(*of_layer[:, :2].T, *shares.T, rest[:, 1] / MASS_UNIT / tokens, of_layer[:, 2], tokens),
        )
        return dict(zip(LAYER_COLUMNS, (column.tolist() for column in columns), strict=True))

    def pack(self) -> str:
        """The sums as text for a checkpoint."""
        return base64.b85encode(zlib.compress(self.sums.numpy().astype("<i8").tobytes())).decode()

    @classmethod
    def unpack(cls, text: str, num_layers: int, config: Config) -> RoutingStatistics:
        """What `pack` wrote of all the layers of a model."""
        sums = np.frombuffer(zlib.decompress(base64.b85decode(text)), "<i8").reshape(num_layers, -1)
        return cls(torch.from_numpy(sums.copy()), config, tuple(range(num_layers)))


@dataclass
class _Call:
    """One forward pass of the model, as the recorder keeps it until it is summed."""

    mask: Tensor | None  # attention mask [B, at least S]; padding is not counted
    shape: tuple[int, int] | None  # B, S
    outputs: dict[int, tuple]  # layer -> (logits [T, E], weights [T, K], indices [T, K])
    wanted: dict[int, Tensor]  # layer -> counts [T] before floor and cap


class RoutingRecorder:
    """Router statistics by PyTorch forward hooks; memory O(L E), whatever the number of tokens.

    A hook only keeps what it sees; the sums are taken on the layer's device once for many calls, so that
    recording costs decoding next to nothing and never waits for a GPU. Padding, by the attention mask that
    the model was given, is not counted. In a notebook it shows itself as a table by layer.
    """

    MAX_CALLS, MAX_TOKENS = 256, 8192  # what is kept at most before it is summed

    def __init__(self, layers: Sequence[MoELayer], config: Config):
        self.config, self._layers = config, layers
        self._width = max(layer.num_experts for layer in layers)
        self.start()

    def start(self, rows: int | None = None) -> None:
        """Begin anew. rows: the batch size, to count each row of the batch by itself."""
        self._calls: list[_Call] = []
        self._tokens, self._rows = 0, rows
        size = (rows or 1) * (2 * self._width + 3)
        self._sums = [torch.zeros(size, dtype=torch.int64, device=layer.device) for layer in self._layers]

    def watch_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook for the model: a new call begins."""
        if len(self._calls) >= self.MAX_CALLS or self._tokens >= self.MAX_TOKENS:
            self._flush()
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._calls.append(_Call(mask, None if ids is None else tuple(ids.shape[:2]), {}, {}))
        self._tokens += 0 if ids is None else ids.numel()

    def _call(self, index: int) -> _Call:
        """The call that layer `index` is in: a new one where it was called without the whole model."""
        if not self._calls or index in self._calls[-1].outputs:
            self._calls.append(_Call(None, None, {}, {}))
        return self._calls[-1]

    def hook(self, index: int) -> Callable:
        """A forward hook for the router of layer `index`."""

        def record(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._call(index).outputs[index] = tuple(part.detach() for part in output)

        return record

    def observer(self, index: int) -> Callable:
        """A function that takes the rejections [T] of layer `index` before floor and cap."""

        def observe(wanted: Tensor) -> None:
            self._call(index).wanted[index] = wanted

        return observe

    @torch.no_grad()
    def _flush(self) -> None:
        """Add what was kept to the sums."""
        calls, self._calls, self._tokens = self._calls, [], 0
        width, size = self._width, 2 * self._width + 3
        for layer, sums in zip(self._layers, self._sums, strict=True):
            index = layer.index
            seen = [call for call in calls if index in call.outputs]
            if not seen:
                continue
            parts = (torch.cat(part) for part in zip(*(call.outputs[index] for call in seen), strict=True))
            logits, weights, indices = parts  # [N, E], [N, K], [N, K]
            places = (torch.cat(part) for part in zip(*map(self._places, seen), strict=True))
            rows, real = (part.to(layer.device) for part in places)  # [N], bool [N]
            kept = (weights != 0) & real[:, None]
            gates = layer.logits(logits).float().softmax(-1)
            mass = gates.gather(-1, indices.clamp(max=logits.shape[-1] - 1)).double()
            start, real = rows * size, real.long()
            sums.index_add_(0, start + kept.sum(-1), real)
            use = (start[:, None] + width + 1 + indices).clamp(max=len(sums) - 1)
            sums.index_add_(0, use.flatten(), kept.long().flatten())
            if all(index in call.wanted for call in seen):
                none = torch.cat([call.wanted[index] for call in seen]) == 0
                sums.index_add_(0, start + size - 2, none * real)
            sums.index_add_(0, start + size - 1, (mass * kept).sum(-1).mul(MASS_UNIT).round().long())

    def _places(self, call: _Call) -> tuple[Tensor, Tensor]:
        """For each token of a call, [T]: its row of the batch (0 if rows are not told apart), and whether it
        is no padding."""
        logits = next(iter(call.outputs.values()))[0]
        rows = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        real = torch.ones_like(rows, dtype=torch.bool)
        if call.shape is None or math.prod(call.shape) != len(logits):
            return rows, real
        if self._rows:
            rows = torch.arange(len(logits), device=logits.device) // call.shape[1]
        if call.mask is not None:
            real = call.mask[:, -call.shape[1] :].reshape(-1).to(logits.device) != 0
        return rows, real

    def statistics(self) -> list[RoutingStatistics]:
        """What was seen since the start: one for each row of the batch, or one."""
        self._flush()
        sums = torch.stack([part.cpu() for part in self._sums]).unflatten(1, (self._rows or 1, -1))
        layers = tuple(layer.index for layer in self._layers)
        return [RoutingStatistics(part.contiguous(), self.config, layers) for part in sums.unbind(1)]

    def total(self) -> RoutingStatistics:
        """What was seen since the start."""
        return functools.reduce(RoutingStatistics.__add__, self.statistics())

    def summary(self) -> pd.DataFrame:
        """What was seen since the start, one row a layer, under its index: LAYER_COLUMNS."""
        return self.total().by_layer().rename_axis("layer")

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="{:.3f}".format)


@contextlib.contextmanager
def patched_routing(
    model: nn.Module,
    config: Config,
    calibration: Calibration | None = None,
    layers: Sequence[MoELayer] | None = None,
) -> Iterator[RoutingRecorder]:
    """Route `model` by `config` inside the `with` block; yields the recorder of what was routed.

    Reversible and local: instance attributes and hooks only, put back in reverse order whatever happens
    inside. The model is in eval mode in the block. p_values "empirical" needs a `calibration`. layers: those
    of `find_moe_layers` that are patched and recorded, all of them when None; the others stay as they are.
    Raises UserError for a model that is patched already.

        with patched_routing(model, ROUTING_CONFIGS["bh_moderate"], calibrate(model, tokenizer)) as recorder:
            model.generate(**inputs)
    """
    config = resolve_config("routing", config)
    if layers is None:
        layers = find_moe_layers(model)
    if not layers:
        raise UserError("layers is empty: give layers of find_moe_layers(model), or None for all of them")
    if config["max_k"]:
        config["max_k"] = min(config["max_k"], layers[0].max_k)
    recorder = RoutingRecorder(layers, config)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as alone:
        alone.enter_context(_alone())
        stack.enter_context(evaluating(model))
        stack.enter_context(model.register_forward_pre_hook(recorder.watch_model, with_kwargs=True))
        for layer in layers:
            _refuse_patched(layer.name, layer.router)
            _replace(stack, layer.router, "_bh_patched", True)
            width = _bounds(config, layer.max_k)[1]
            if config["renormalize"] == "topk_mass":
                width = max(width, layer.own_k)
            if config["method"] != "topk" or config["renormalize"] != "model" or not layer.knob:
                width = width if layer.knob else layer.own_k
                critical = critical_scores(config, layer.num_experts, layer.index, calibration)
                critical = None if critical is None else critical.to(layer.device)
                observe = recorder.observer(layer.index)
                routed = _adaptive_router(layer, config, critical, width, observe, seed=layer.index)
                _replace(stack, layer.router, "forward", routed)
                _replace(stack, layer.experts, "forward", _skipping_experts(layer.experts))
            # config.num_experts_per_tok has no effect after loading; the router's own attribute has.
            if layer.knob:
                _replace(stack, *layer.knob, width)
            stack.enter_context(layer.router.register_forward_hook(recorder.hook(layer.index)))
        alone.close()
        yield recorder


# ---------------------------------------------------------------------------------------------------------
# 7. Calibration: nulls, knobs and diagnostics from text
# ---------------------------------------------------------------------------------------------------------


def _generation_config(tokenizer: Any, new_tokens: int, **options: Any) -> Any:
    """Exactly `new_tokens` tokens: no early end of text, so that clocks compare equal work."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return transformers.GenerationConfig(
        **lengths, pad_token_id=eos if pad is None else pad, eos_token_id=eos, **options
    )


@contextlib.contextmanager
def writing_plainly(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode, and `model.generate` does what it is given and no more.

    What a `generation_config` leaves open, transformers takes from the model's own: penalties, forbidden or
    forced words, beams, min_p, whatever a model comes with. Only its special tokens stay.
    """
    own = getattr(model, "generation_config", None)
    with evaluating(model), contextlib.ExitStack() as stack:
        if own is not None:
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            special = {name: getattr(own, name, None) for name in names}
            _replace(stack, model, "generation_config", transformers.GenerationConfig(**special))
        yield


def sample_calibration_text(model: nn.Module, tokenizer: Any, seed: int) -> Tensor:
    """Text that the model itself writes: int64 [CALIBRATION_SEQUENCES, CALIBRATION_LENGTH].

    Plain sampling at temperature 1 over the whole vocabulary, from the first token on, so that the text
    follows the model's own distribution. The global random generators are left as they were.
    """
    device = input_device(model)
    start = torch.full((CALIBRATION_SEQUENCES, 1), start_token(tokenizer), device=device)
    settings = _generation_config(tokenizer, CALIBRATION_LENGTH - 1, do_sample=True, top_k=0)
    generators = torch.random.fork_rng([start.device] if start.is_cuda else [])
    with writing_plainly(model), generators, torch.inference_mode():
        torch.manual_seed(seed)
        return model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)


def read_calibration_text(path: Path, tokenizer: Any) -> Tensor:
    """At most CALIBRATION_SEQUENCES windows spread evenly over a text file: int64 [S, CALIBRATION_LENGTH]."""
    tokens = torch.tensor(tokenizer(_read_text(path, "--calibration-text"), verbose=False)["input_ids"])
    windows = len(tokens) // CALIBRATION_LENGTH
    if not windows:
        raise UserError(f"--calibration-text {path}: {len(tokens)} tokens, {CALIBRATION_LENGTH} are needed")
    take = torch.linspace(0, windows - 1, min(windows, CALIBRATION_SEQUENCES)).round().long()
    return tokens[: windows * CALIBRATION_LENGTH].view(windows, CALIBRATION_LENGTH)[take]


SHARED_RUN = 32  # so many equal tokens in a row are the same text, not the same phrase


def count_shared_tokens(texts: Sequence[Tensor], calibration_text: Path | None, tokenizer: Any) -> int:
    """How many tokens of `texts`, each [1, S], lie in a run of SHARED_RUN tokens of the calibration text.

    Only the windows that calibration takes of it count; what is shorter than such a run is looked for as a
    whole. First positions are left out, as everywhere in calibration. 0 where the model wrote its own
    calibration text. A warning says how many there are: on them, nothing was held out.
    """
    if calibration_text is None:
        return 0
    windows = read_calibration_text(calibration_text, tokenizer)  # [W, CALIBRATION_LENGTH]

    @functools.cache
    def calibrated_on(length: int) -> set[tuple[int, ...]]:
        return set(map(tuple, windows.unfold(1, length, 1).flatten(0, 1).tolist()))

    shared = 0
    for text in texts:
        length = min(SHARED_RUN, windows.shape[1], text.numel())
        runs = text.flatten().unfold(0, length, 1).tolist()
        is_shared = [False] * text.numel()
        for start, run in enumerate(runs):
            if tuple(run) in calibrated_on(length):
                is_shared[start : start + length] = [True] * length
        shared += sum(is_shared[1:])
    if shared:
        total = sum(text.numel() - 1 for text in texts)
        logger.warning(
            f"--calibration-text {calibration_text} shares text with what is scored: {shared} of the {total} "
            "tokens on which the nulls are diagnosed were calibrated on"
        )
    return shared


def record_routers(model: nn.Module, batches: Sequence[Tensor]) -> Calibration:
    """Run the unpatched model on token ids [B, S] and keep what its routers did, first positions left out.

    The routing of a first position is an outlier in every layer.
    """
    layers = find_moe_layers(model)
    seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]  # logits [N, E], own [N, K]
    length = 0

    def recorder(layer: MoELayer) -> Callable:
        def record(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            first, _, indices = (part.unflatten(0, (-1, length))[:, 1:].flatten(0, 1) for part in output)
            seen[layer.index][0].append(layer.logits(first).float().cpu())
            seen[layer.index][1].append(indices.to("cpu", torch.int16))

        return record

    with contextlib.ExitStack() as stack, evaluating(model), torch.inference_mode():
        for layer in layers:
            stack.enter_context(layer.router.register_forward_hook(recorder(layer)))
        for batch in batches:
            length, batch = batch.shape[1], batch.to(input_device(model))
            model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    logits, own = (torch.stack([torch.cat(parts) for parts in kind]) for kind in zip(*seen, strict=True))
    return Calibration(logits, own)


def calibrate(
    model: nn.Module, tokenizer: Any, seed: int = DEFAULT_SEED, text_path: Path | None = None
) -> Calibration:
    """Record the unpatched routers on text sampled from the model with `seed`, or on a text file."""
    if text_path is None:
        tokens = sample_calibration_text(model, tokenizer, seed)
    else:
        tokens = read_calibration_text(text_path, tokenizer)
    return record_routers(model, tokens.split(4))


def match_experts(name: str, config: Config, target: float, calibration: Calibration) -> dict[str, Any]:
    """The configuration with its knob (alpha, p, ratio or threshold) set so that it keeps `target` experts.

    The mean is over tokens and layers of the calibration text, as routed by the unpatched model; on other
    text, and under its own routing, the configuration will keep a few more or fewer. Raises UserError naming
    the range the rule can reach.
    """
    config, num_experts = resolve_config(name, config), calibration.logits.shape[-1]
    knob, bounds = METHODS[config["method"]][0], _bounds(config, num_experts)
    if config["method"] == "topk":
        return config
    scores = [gate_scores(logits, config["temperature"]) for logits in calibration.logits]  # L x [N, E]

    def mean_experts(log_value: float) -> float:
        changed, total = config | {knob: math.exp(log_value)}, 0.0
        for index, layer_scores in enumerate(scores):
            critical = critical_scores(changed, num_experts, index, calibration)
            total += counting_rule(changed, critical)(layer_scores).clamp(*bounds).double().mean().item()
        return total / len(scores)

    what = f"--match-experts {target:g}: {name}"
    lowest, highest = FIELDS[knob].search
    if config["p_values"] == "empirical":
        lowest = 1.001 * calibration.null(0, config["temperature"]).smallest_alpha(num_experts)
        lowest *= _correction(config, num_experts)
    ends = math.log(lowest), math.log(highest)
    least, most = sorted(mean_experts(end) for end in ends)
    if not least <= target <= most:
        reach = f"{least:.2f} to {most:.2f} experts on the calibration text by its {knob}"
        raise UserError(f"{what} can keep {reach}")
    log_value = optimize.bisect(lambda value: mean_experts(value) - target, *ends, xtol=1e-3)
    found, achieved = math.exp(log_value), mean_experts(log_value)
    kept = f"{achieved:.2f} experts on the calibration text"
    if abs(achieved - target) > 0.05:
        raise UserError(f"{what} jumps over it at {knob} = {found:.4g}, where it keeps {kept}")
    logger.info(f"{name} keeps {kept} at {knob} = {found:.4g}")
    return config | {knob: float(f"{found:.4g}")}


DIAGNOSED_ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def diagnose_nulls(calibration: Calibration, heldout: Calibration) -> dict[str, Any]:
    """Do the nulls hold on text they were not calibrated on? At temperature 1, as JSON data, for each null:

    levels and layers: share of null pairs (outside the model's own Top-K) with p <= level, one list per
    layer; a valid null has share = level. ks: Kolmogorov-Smirnov distance from uniform, per layer. alphas:
    for each alpha mean rejections of BH before floor and cap, the realised false-discovery proportion
    (rejected pairs that are null / rejected, 0 where nothing is, mean over tokens and layers) and the share
    of decisions without rejection.
    """
    num_layers, num_tokens, num_experts = heldout.logits.shape
    levels = torch.logspace(-4, 0, 41, dtype=torch.float64)
    report: dict[str, Any] = {"n_tokens": num_tokens, "levels": levels.tolist(), "nulls": {}}
    for name in ("empirical", "flat"):
        shares, distances, found = [], [], {alpha: [] for alpha in DIAGNOSED_ALPHAS}
        for index in range(num_layers):
            scores, outside = heldout.scores(index, 1.0)  # [N, E], [N, E]
            null = calibration.null(index, 1.0) if name == "empirical" else FlatNull(num_experts)
            p_values = null.p_values(scores)  # [N, E]
            null_p = p_values[outside].sort().values
            shares.append((torch.searchsorted(null_p, levels, side="right") / len(null_p)).tolist())
            distances.append(stats.kstest(null_p.numpy(), "uniform", method="asymp").statistic)
            order = p_values.argsort(dim=-1, stable=True)
            false_by_rank = outside.gather(1, order).long().cumsum(-1)  # null pairs among the k best
            false_by_rank = nn.functional.pad(false_by_rank, (1, 0))  # [N, E + 1], for k = 0 to E
            for alpha in DIAGNOSED_ALPHAS:
                rejected = bh_rejections(p_values, alpha)  # [N]
                false = false_by_rank.gather(1, rejected[:, None])[:, 0] / rejected.clamp(min=1)
                found[alpha].append(torch.stack([rejected.double(), false, (rejected == 0).double()]))
        rows = []
        for alpha, parts in found.items():
            rejections, fdp, none = torch.cat(parts, dim=1).mean(1).tolist()
            means = {"mean_rejections": rejections, "realised_fdp": fdp, "zero_rejection_frac": none}
            rows.append({"alpha": alpha, **means})
        report["nulls"][name] = {"layers": shares, "ks": distances, "alphas": rows}
    return strict_json(report)


# ---------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# ---------------------------------------------------------------------------------------------------------

WAY_OUT = "choose another --output, or --no-resume to set what is there aside"
Key = tuple[str, str, int]  # configuration, prompt id, sample: what names an experiment
ADDED_SETTINGS = ("tokenizer",)  # which checkpoints of older scripts lack: not compared there

# What a finished row depends on: it counts only while all of that is as it was. Every field of a prompt and
# every argument of a run is classified here, or a test fails; a configuration's fields all count.
PROMPT_IDENTITY: dict[str, bool] = {  # field -> whether it is part of the row's `input_hash`
    "id": False,  # names the row
    **dict.fromkeys(("text", "reference", "category", "document", "token_ids"), True),
    "description": False,  # for the reader of the prompts only
}
ROWS, NOTHING = "compared row by row", "no row depends on it"
RUN_IDENTITY: dict[str, str] = {  # argument -> ROWS, NOTHING, or the entry of the settings that holds it
    # BHExperimentRunner
    **dict.fromkeys(("model_name", "model", "revision", "trust_remote_code"), "model"),
    "tokenizer": "tokenizer",
    "device": "device",
    **dict.fromkeys(("dtype", "use_fp16"), "dtype"),
    "seed": "seed",
    "sampling": "sampling",
    "calibration_text": "calibration_text",
    **dict.fromkeys(("output_dir", "checkpoint_interval", "command"), NOTHING),
    **dict.fromkeys(("device_map", "batch_size"), NOTHING),  # beyond rounding
    # run_full_experiment_suite, run_tasks
    **dict.fromkeys(("routing_configs", "test_prompts", "num_samples", "tasks"), ROWS),
    "max_new_tokens": "max_new_tokens",
    "num_fewshot": "num_fewshot",
    "limit": "limit",
    "include_path": "task_files",
    **dict.fromkeys(("baseline", "resume", "retry_failed", "fail_fast"), NOTHING),
}


def fingerprint(content: Any) -> str:
    """16 hex digits that name a piece of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def input_hashes(prompt: Prompt) -> dict[str, str]:
    """Field -> hash, for each field of a resolved prompt that its rows depend on."""
    hashes = {}
    for field, counts in PROMPT_IDENTITY.items():
        if counts and field in prompt:
            value = prompt[field]
            hashes[field] = fingerprint(value.tolist() if isinstance(value, Tensor) else value)
    return hashes


RUN_FILES = (  # what a run leaves in its folder, beside its log and its calibration
    *("checkpoints/*.json", "bh_routing_results.csv", "layer_statistics.csv", "expert_usage.csv"),
    *("task_results.json", "null_diagnostics.json", "analysis_summary.json", "REPORT.md", "plots/*.png"),
)


def set_aside(folder: Path) -> None:
    """Move all files of an earlier run into a new folder inside `folder`, from where nothing reads them.

    The log goes on in its place. So does the calibration: it is used again only if it was made from the same.
    """
    files = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]
    if not files:
        return
    numbers = itertools.count(1)
    aside = folder / f"earlier_{next(numbers)}"
    while aside.exists():
        aside = folder / f"earlier_{next(numbers)}"
    for file in files:
        target = aside / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    logger.info(f"the files of an earlier run were set aside in {aside}")


def _checked_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line of a checkpoint holds; None where it is not whole."""
    text, _, tail = line.rpartition(b', "crc32": ')
    text += b"}"
    checksum, _, end = tail.partition(b"}")
    if end.strip(b",]}\n") or checksum != b"%d" % zlib.crc32(text):
        return None
    return json.loads(text)


class Checkpoint:
    """The finished experiments of a run: a JSON file that is valid at every moment and grows in O(1).

    A line a row, each with a checksum; the file ends in "\\n]}\\n". An append overwrites that end with the
    next row and a new end, in one write, so a killed process loses nothing; `sync_every` rows are forced to
    the disk together, which bounds what a power cut can take. Of two rows with the same key the later one
    counts. Only where each row lies is held in memory.
    """

    SCHEMA = 2
    END = b"\n]}\n"

    def __init__(self, path: Path, settings: Mapping[str, Any], sync_every: int = 1):
        """Open or create. Raises UserError, touching nothing, where the file is of another run or not a
        checkpoint.

        settings: what every row of the run has in common; a run resumes only with equal settings.
        """
        self.path, self.settings, self.sync_every = path, strict_json(settings), sync_every
        self.places: dict[Key, tuple[int, str]] = {}  # key -> where its row begins, and its status
        self.elsewhere: dict[Key, tuple[int, str]] = {}  # the same of another process's file
        self._unsynced = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._write(b"")
        self._open()

    def _write(self, rows: bytes) -> None:
        head = f'{{"schema": {self.SCHEMA},\n"settings": {json.dumps(self.settings)},\n"results": ['
        with replacing(self.path) as part:
            part.write_bytes(head.encode() + rows + self.END)

    def _unused(self, word: str) -> Path:
        """A name beside the file that is not there yet."""
        names = (self.path.with_name(f"{self.path.stem}.{word}{n}.json") for n in itertools.count(1))
        return next(name for name in names if not name.exists())

    def _stay(self) -> None:
        """Where the file was removed while it is open, alone or with its folder, write it again."""
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return
            self.path = self._unused("rescued")  # another run's file has its place
        except FileNotFoundError:
            pass
        self._file.seek(0)
        with replacing(self.path) as part:
            part.write_bytes(self._file.readall())
        self._file.close()  # until here it is the only copy
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        logger.warning(f"the checkpoint was removed while in use; what is finished is now in {self.path}")

    def _open(self) -> None:
        damaged, whole = 0, False
        with open(self.path, "rb") as file:
            self._check_head([file.readline() for _ in range(3)])
            place = file.tell()
            for line in file:
                row = None
                if line == self.END[1:]:
                    whole = True
                elif (row := _checked_row(line)) is None:
                    damaged += 1
                else:
                    self.places[self.key(row)] = place, row["status"]
                place += len(line)
            if whole and not damaged:
                self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - stays open for appending
                self._end = self._file.seek(-len(self.END), os.SEEK_END)
                return
            rows = [self._line(file, where) for where, _ in self.places.values()]
        aside = ""
        # A torn last line is what a killed process leaves; anything more is worth keeping for a look.
        if damaged > 1 or whole:
            aside = f"; the damaged file is kept as {shutil.copy(self.path, self._unused('damaged'))}"
        self._write(b",".join(b"\n" + row for row in rows))
        what = f"{self.path} was torn or damaged"
        logger.warning(f"{what}; {len(rows)} finished experiments were saved from it{aside}")
        self.places.clear()
        self._open()

    def _check_head(self, head: list[bytes]) -> None:
        """Refuse what is not a checkpoint of this run."""
        try:
            content = json.loads(b"".join(head[:2]).rstrip().rstrip(b",") + b"}")
            schema, stored = content["schema"], dict(content["settings"])
            if schema == self.SCHEMA and head[2].rstrip() != b'"results": [':
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            why = "is not a checkpoint of this script, or its head is damaged"
            raise UserError(f"{self.path} {why}; {WAY_OUT}") from None
        if schema != self.SCHEMA:
            why = f"has checkpoint schema {schema}, this script writes {self.SCHEMA}"
            raise UserError(f"{self.path} {why}; use the script that wrote it, {WAY_OUT}")
        if what := "; ".join(
            f"{key} is {stored.get(key)!r} there, {self.settings.get(key)!r} here"
            for key in {**stored, **self.settings}
            if stored.get(key) != self.settings.get(key) and (key in stored or key not in ADDED_SETTINGS)
        ):
            raise UserError(f"{self.path.parent.parent} holds results of another run: {what}; {WAY_OUT}")

    @staticmethod
    def key(row: Row) -> Key:
        return row["config_name"], row["prompt_id"], row["sample"]

    @staticmethod
    def _line(file: io.RawIOBase | io.BufferedReader, place: int) -> bytes:
        file.seek(place)
        return file.readline().rstrip(b",]}\n") + b"}"

    def append(self, row: Row) -> None:
        """Add one finished experiment. OSError when the disk is full; the file is then as it was before."""
        text = json.dumps(strict_json(row), allow_nan=False)
        line = f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}'.encode()
        data = (b",\n" if self.places else b"\n") + line
        self._stay()
        self._file.seek(self._end)
        try:
            if self._file.write(data + self.END) < len(data + self.END):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._file.write(self.END)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.places[self.key(row)] = self._end + len(data) - len(line), row["status"]
        self._end += len(data)
        self._unsynced += 1
        if self._unsynced >= self.sync_every:
            self.sync()

    def done(self, retry_failed: bool) -> set[Key]:
        """What need not be run: what is there, or of that what did not fail."""
        found = self.elsewhere | self.places
        return {key for key, (_, status) in found.items() if status == "ok" or not retry_failed}

    def rows(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """The rows of those of `keys` that are finished, in their order."""
        self._stay()
        with open(self.path, "rb") as file:
            for key in keys:
                if key in self.places:
                    yield _checked_row(self._line(file, self.places[key][0])) or {}

    def take_over(self, other: Path) -> None:
        """Add the rows of another process's file and delete it."""
        with contextlib.closing(Checkpoint(other, self.settings)) as checkpoint:
            for row in checkpoint.rows(checkpoint.places):
                if self.places.get(self.key(row), (0, ""))[1] != "ok":
                    self.append(row)
            logger.info(f"{len(checkpoint.places)} experiments taken over from {other.name}")
        self.sync()
        other.unlink()

    def sync(self) -> None:
        """Force all rows to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        if not self._file.closed:
            self._stay()
            self.sync()
            self._file.close()


# ---------------------------------------------------------------------------------------------------------
# 9. Results
# ---------------------------------------------------------------------------------------------------------

# Every column of bh_routing_results.csv, in order; the README gives each formula.
IDENTITY_COLUMNS = (
    *("config_name", "prompt_id", "sample", "prompt_category", "document", "prompt_text", "input_hash"),
    *("status", "error"),
)
QUALITY_COLUMNS = (
    *("reference_nll", "reference_tokens", "reference_bytes", "reference_perplexity", "bits_per_byte"),
    *("kl_to_baseline", "top1_agreement", "tokens_until_divergence", "repeat_reference_nll"),
    *("reference_avg_experts", *(f"reference_{share}" for share in SHARES), "static_nll"),
)
TASK_COLUMNS = ("task_metric", "task_score")
TEXT_COLUMNS = ("generated_text", "full_text")
COUNT_COLUMNS = ("num_input_tokens", "num_output_tokens")
CLOCK_COLUMNS = (  # the only ones that may differ when the same experiment is run again
    *("inference_time_sec", "tokens_per_sec", "time_to_first_token_sec", "decode_sec_per_token"),
    *("repeat_inference_time_sec", "peak_memory_gb", "timestamp", "batch_size", "command"),
)
SETTING_COLUMNS = (
    *("model_name", "model_revision", "model_hash", "device", "dtype", "seed", "max_new_tokens", "sampling"),
    *("torch_version", "transformers_version", "script_hash", "git_commit", "run_id"),
)
RESULT_COLUMNS = (
    *(*IDENTITY_COLUMNS, *TEXT_COLUMNS, *COUNT_COLUMNS, *ROUTING_COLUMNS, *QUALITY_COLUMNS),
    *(*TASK_COLUMNS, *CLOCK_COLUMNS, *CONFIG_FIELDS, *SETTING_COLUMNS),
)
STRING_COLUMNS = {*IDENTITY_COLUMNS, *TEXT_COLUMNS, *SETTING_COLUMNS} - {"sample", "seed", "max_new_tokens"}
STRING_COLUMNS |= {"timestamp", "command", "static_nll", "task_metric", "method", "p_values", "renormalize"}
REQUIRED_COLUMNS = ("config_name", "prompt_id", "status")  # an older script's CSV may lack any other
# A spreadsheet would run a cell that begins like this; one more quote in front makes it text, and goes again.
_FORMULA = re.compile(r"(?='*[=+\-@\t\r])")
# From pandas 3 on floats are read as they were written, and saying so is deprecated.
_EXACT_FLOATS = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\0", "\u2400")  # many a CSV reader ends a cell there
    return f"'{value}" if _FORMULA.match(value) else value


def write_results(rows: Iterable[Row], path: Path) -> None:
    """Write result rows as CSV, whole or not at all, one after the other: memory does not grow with them."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(RESULT_COLUMNS)
        # A row that an older script finished may lack a column.
        writer.writerows([_csv_cell(row.get(column)) for column in RESULT_COLUMNS] for row in rows)


def read_results(path: Path) -> pd.DataFrame:
    """The results CSV of a run as it was written; columns that an older script did not know are empty.

    Raises UserError where there is none or it is not one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the experiments first, or give their folder as --output")

    def plain(text: str) -> str:
        return text[1:] if text[:1] == "'" and _FORMULA.match(text, 1) else text

    try:
        header = set(pd.read_csv(path, nrows=0).columns)
        words = header & STRING_COLUMNS
        # A generated text may well be "NA" or "null": only number columns have missing values.
        missing = {"keep_default_na": False, "na_values": dict.fromkeys(header - words, [""])}
        # In parts, which takes a quarter of the memory.
        parts = pd.read_csv(path, dtype=dict.fromkeys(words, str), chunksize=1000, **_EXACT_FLOATS, **missing)
        frames = [part.assign(**{column: part[column].map(plain) for column in words}) for part in parts]
    except ValueError as error:  # undecodable bytes, no columns, or a number column with words in it
        raise UserError(f"{path} is not a results CSV: {error}") from error
    if lacking := [column for column in REQUIRED_COLUMNS if column not in header]:
        raise UserError(f"{path} is not a results CSV of this script: it lacks {', '.join(lacking)}")
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.assign(**dict.fromkeys(STRING_COLUMNS - header, ""))
    return frame.reindex(columns=[*RESULT_COLUMNS, *frame.columns.difference(RESULT_COLUMNS, sort=False)])


def run_ids(frame: pd.DataFrame) -> set[str]:
    """The runs whose rows these are: one, or several where frames were joined; "" for an older script's."""
    return set(frame["run_id"].fillna("")) if "run_id" in frame else {""}


class LayerTables:
    """What the routers of every layer did, summed by configuration and category: two CSV files."""

    MAX_ITEMS = 2000  # whose use of experts is kept one by one, for the permutation test
    PERMUTATIONS = 199

    def __init__(self, configs: Configs, layers: Sequence[str], categories: set[str]):
        self.configs, self.layers, self.several = configs, list(layers), len(categories) > 1
        self.sums: dict[str, dict[str, RoutingStatistics]] = {name: {} for name in configs}  # by category
        self.items: dict[str, dict[str, tuple[str, Tensor]]] = {name: {} for name in configs}

    def add(self, row: Row) -> Row:
        """Count a row of the checkpoint, and pass it on."""
        if row.get("routing"):
            name, category, document = row["config_name"], row["prompt_category"], row["document"]
            found = RoutingStatistics.unpack(row["routing"], len(self.layers), self.configs[name])
            sums, items, use = self.sums[name], self.items[name], found.use.float()
            sums[category] = sums[category] + found if category in sums else found
            if self.several and (document in items or len(items) < self.MAX_ITEMS):
                items[document] = category, (items[document][1] + use if document in items else use)
        return row

    def _divergence(self, name: str) -> pd.DataFrame:
        """Do categories use different experts? For each layer the Jensen-Shannon divergence of their use, in
        bits (0: the same experts), and its p-value when categories are permuted over documents."""
        columns, items = ("category_divergence_bits", "category_p_value"), list(self.items[name].values())
        labels = pd.factorize(np.array([category for category, _ in items]))[0]
        if not len(items) or np.bincount(labels).min() < 2 or labels.max() < 1:
            return pd.DataFrame(columns=columns, dtype=float)
        use = torch.stack([use for _, use in items]).numpy()  # [documents, L, E]

        def divergence(order: Any) -> Any:  # -> [L]
            member = np.eye(labels.max() + 1)[labels[order]]  # [documents, categories]
            shares = np.einsum("dc,dle->cle", member, use)
            shares /= shares.sum(2, keepdims=True)
            return (special.entr(shares.mean(0)) - special.entr(shares).mean(0)).sum(-1) / math.log(2)

        generator, observed = np.random.default_rng(0), divergence(slice(None))
        permuted = [divergence(generator.permutation(len(labels))) for _ in range(self.PERMUTATIONS)]
        p_values = (1 + (np.stack(permuted) >= observed).sum(0)) / (1 + self.PERMUTATIONS)
        return pd.DataFrame(dict(zip(columns, (observed, p_values), strict=True)))

    def write(self, folder: Path, run_id: str) -> None:
        """layer_statistics.csv (configuration x layer) and expert_usage.csv (by category and expert)."""
        layers, usage = [], []
        for name, by_category in self.sums.items():
            if not by_category:
                continue
            table = functools.reduce(RoutingStatistics.__add__, by_category.values()).by_layer()
            about = pd.DataFrame({"config_name": name, "layer": range(len(table)), "router": self.layers})
            layers.append(pd.concat([about, table, self._divergence(name)], axis=1))
            for category, found in by_category.items():
                use = found.use.numpy()  # [L, E]
                about = {"config_name": name, "prompt_category": _csv_cell(category)}
                for key, values in zip(("layer", "expert"), np.indices(use.shape), strict=True):
                    about[key] = values.ravel()
                share = use / use.sum(1, keepdims=True).clip(min=1)
                usage.append(pd.DataFrame({**about, "count": use.ravel(), "share": share.ravel()}))
        for file, tables in (("layer_statistics.csv", layers), ("expert_usage.csv", usage)):
            if tables:
                write_whole(folder / file, pd.concat(tables).assign(run_id=run_id).to_csv(index=False))


# ---------------------------------------------------------------------------------------------------------
# 10. The machine: device, model, log, lock, processes
# ---------------------------------------------------------------------------------------------------------


def choose_device(device: str) -> torch.device:
    """CUDA for "auto" where there is one, else the CPU. Raises UserError for "cuda" where there is none."""
    _choice("device", device, ("auto", "cuda", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """By name; "auto": bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU."""
    if _choice("dtype", dtype, DTYPES) != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        logger.info(f"{torch.cuda.get_device_name(device)} has no bfloat16: using float16")
        return torch.float16
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_model(
    model_name: str,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Model and tokenizer from a folder or the hub, safetensors only. Raises UserError.

    device_map "auto" spreads a model over all GPUs, the rest over memory and disk, instead of `device`.
    """
    if trust_remote_code:
        logger.warning(f"--trust-remote-code: Python code that comes with {model_name} will be executed")
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    placed = {"dtype": dtype, "device_map": device_map or str(device), "use_safetensors": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(model_name, **placed, **source)
        if not tokenizer("text")["input_ids"]:  # what comes of a folder without the tokenizer's files
            raise ValueError("its tokenizer knows no words")
    except Exception as error:  # whatever a damaged folder can raise
        raise UserError(
            f"--model {model_name} cannot be loaded: {_first_line(error)} (give a folder with config.json, "
            "tokenizer and safetensors, or the name of a hub model; offline, use models/olmoe-mini)"
        ) from error
    return model, tokenizer


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits that name the weights: of each tensor the name, shape and up to 2,048 values."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:  # offloaded to disk: known by name and shape only
            values = tensor.detach().flatten()
            digest.update(values[:: max(1, values.numel() // 1024)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


PROBE = (  # words, numbers, code, accents and other scripts: tokenizers that differ split it differently
    "The cat sat on the mat; 3.14159 + 2,718 = ?\n\tdef f(x: int) -> str: return x['key'] # na\u00efve "
    "stra\u00dfe \u0441\u043b\u043e\u0432\u043e \u8a9e \u05de\u05d9\u05dc\u05d4 <s> </s>"
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits that name what a tokenizer does."""
    return fingerprint([int(token) for token in tokenizer(PROBE, verbose=False)["input_ids"]])


@functools.cache
def script_origin() -> dict[str, str]:
    """Which version of this script runs: the hash of the file, and the git commit it lies in, if any."""
    path, options = Path(__file__).resolve(), {"capture_output": True, "text": True, "timeout": 10}
    command = ["git", "-C", str(path.parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, **options, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"script_hash": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "git_commit": commit.strip()}


class _LineFormatter(logging.Formatter):
    """Prompts and errors are data: they cannot begin a new line of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _visible(record.message)
        return super().formatMessage(record)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the log of this script to `path` as well, inside the `with` block; nested blocks write once."""
    path = path.resolve()
    if any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # a full disk: the checkpoint will say so, in one line
    handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs. UserError names the process that holds it; a dead one holds none."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / ".lock"), folder / "holder.txt"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = _visible(holder.read_text(encoding="utf-8")) if holder.exists() else "an unknown process"
        raise UserError(f"{folder.parent} is in use by {who}; wait, or choose another --output") from None
    try:
        write_whole(holder, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


class _Processes:
    """This process among those that `accelerate launch` started; alone without it."""

    def __init__(self, use_cpu: bool):
        self._state = None
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._state = accelerate.PartialState(cpu=use_cpu, timeout=timedelta(days=30))
            self.rank, self.world = self._state.process_index, self._state.num_processes

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others do."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()


# ---------------------------------------------------------------------------------------------------------
# 11. Downstream tasks
# ---------------------------------------------------------------------------------------------------------


def _load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None) -> dict[str, Mapping[str, Any]]:
    known, loaded = manager.all_tasks, {}
    parts: dict[str, str] = {}  # task -> the name it was asked for by
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.5)) or "nothing"
            raise UserError(f"unknown task {name!r} in --tasks; close: {near}. lm-eval ls tasks lists all")
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # whatever a task's own code or data can raise
            way_out = "most tasks fetch their data from the hub once; without network use --include-path"
            why = f"{type(error).__name__}: {_first_line(error)} ({way_out})"
            raise UserError(f"--tasks {name} cannot be loaded: {why}") from error
        for part, task in loaded[name]["tasks"].items():
            if parts.setdefault(part, name) != name:
                raise UserError(f"--tasks: {part} is in both {parts[part]} and {name}; name one of them")
            fewshot = task.get_config("num_fewshot")
            if fewshot is None or (num_fewshot is not None and fewshot != 0):
                task.set_config("num_fewshot", num_fewshot or 0)
    return loaded


def load_tasks(
    names: Sequence[str], include_path: str | Path | None = None, num_fewshot: int | None = None
) -> dict[str, Mapping[str, Any]]:
    """Name -> tasks and groups of lm-evaluation-harness that it stands for. Raises UserError.

    include_path: a folder with task files of your own, beside the harness's tasks. num_fewshot: examples in
    the context, instead of a task's own number; one that says 0 keeps it.
    """
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    if path is not None and not Path(path).is_dir():
        raise UserError(f"--include-path {path}: there is no such folder")
    if path is not None:  # the index of the harness's own 14,000 tasks takes a while: only where it is needed
        with contextlib.suppress(UserError):
            return _load_tasks(TaskManager(include_path=path, include_defaults=False), names, num_fewshot)
    return _load_tasks(TaskManager(include_path=path), names, num_fewshot)


@contextlib.contextmanager
def _harness_seeds(device: torch.device) -> Iterator[None]:
    """The global random generators seeded as lm-evaluation-harness does, and put back."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what the harness uses
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of a model that is loaded already
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def harness_model(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """lm-evaluation-harness's view of a model that is loaded already.

    With batch size 1 it answers document by document, so that `recorder`, if it has one, leaves the routing
    statistics of each in `seen`: (task, document) -> RoutingStatistics. The answers are the harness's own.
    Larger batches mix documents and pad without an attention mask: nothing is recorded.
    """
    from lm_eval.models.huggingface import HFLM

    class DocumentWise(HFLM):
        recorder: RoutingRecorder | None = None
        seen: dict[tuple[str, int], RoutingStatistics] = {}

        def _each(self, answer: Callable, requests: list) -> list:
            if self.batch_size > 1 or self.recorder is None:
                return answer(requests)
            groups = itertools.groupby(requests, lambda request: (request.task_name, request.doc_id))
            documents, answers = [(key, list(group)) for key, group in groups], []
            for key, group in tqdm.tqdm(documents, desc=answer.__name__, unit="document", leave=False):
                self.recorder.start()
                answers += answer(group, disable_tqdm=True)
                found = self.recorder.total()
                self.seen[key] = self.seen[key] + found if key in self.seen else found
            return answers

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            return self._each(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
            return self._each(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
            return self._each(super().generate_until, requests)

        def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list:
            # Its own bar, one for every window of a text, would fill the screen.
            quiet = {"disable_tqdm": self.recorder is not None}
            return super()._loglikelihood_tokens(*args, **kwargs | quiet)

    # A copy, because the harness gives a tokenizer a padding token where it has none.
    with _harness_seeds(model.device), evaluating(model):  # the harness puts it in eval mode for good
        return DocumentWise(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def document_scores(
    samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]
) -> tuple[str, list[float | None]]:
    """The name of a task's metric that its documents can be compared by, and their values.

    It is the first metric whose mean over documents is what the harness reports. A perplexity is not a mean:
    its documents come as (log-likelihood, number of bytes or words), and their score is bits per byte or
    word. The name is empty and the values None where a task has neither, a correlation for example.
    """
    metrics, suffix = samples[0]["metrics"], samples[0]["filter"]
    for metric in metrics:
        values, reported = [sample.get(metric) for sample in samples], results.get(f"{metric},{suffix}")
        if all(isinstance(value, (bool, int, float)) for value in [reported, *values]):
            mean = sum(values) / len(values)
            if math.isclose(mean, reported, rel_tol=1e-9, abs_tol=1e-12):
                return metric, [float(value) for value in values]
    for metric, unit in (("bits_per_byte", "byte"), ("byte_perplexity", "byte"), ("word_perplexity", "word")):
        if metric in metrics:
            pairs = (sample[metric] for sample in samples)
            bits = [-total / (size * math.log(2)) if size else None for total, size in pairs]
            return f"bits_per_{unit}", bits
    return "", [None] * len(samples)


TASK_RESULTS = "task_results.json"
SHOWN_TEXT = 200  # characters of a document's prompt that its row shows: the last ones


def _documents(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """A row for each document, from rows that hold a whole task each; a failed task stays one row."""
    for row in rows:
        shared = {key: value for key, value in row.items() if key not in ("documents", "task_results")}
        yield from ([shared | document for document in row["documents"]] or [shared])


# ---------------------------------------------------------------------------------------------------------
# 12. BHExperimentRunner
# ---------------------------------------------------------------------------------------------------------


class _StepWatch:
    """A logits processor that changes nothing: it notes when the prefill was done, and the largest logits."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize, self.prefill_done = synchronize, None
        self.largest: list[Tensor] = []  # [B] each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prefill_done is None:
            self.synchronize()
            self.prefill_done = time.perf_counter()
        self.largest.append(scores.amax(-1))
        return scores


def _finite(values: Tensor) -> Tensor:
    """`values`, if the model works: FloatingPointError where its logits are NaN or infinite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("the model returned NaN or infinite logits; try --dtype float32")
    return values


@dataclass(frozen=True)
class _ScoredBatch:
    """Texts to be teacher-forced together, padded on the right."""

    ids: Tensor  # [B, S]
    mask: Tensor  # [B, S], 1 for real tokens
    context: Tensor  # [B] how many tokens come first and are not scored
    num_bytes: list[int]  # of the scored text

    @property
    def scored(self) -> Tensor:
        """Which positions predict a token that is scored: bool [B, S - first], from position first - 1 on."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        scored = (position >= self.context[:, None]) & (self.mask > 0)  # [B, S], by the token predicted
        return scored[:, self.first :]

    @functools.cached_property
    def first(self) -> int:
        """The first token that is scored in any row."""
        return int(self.context.min())

    @property
    def targets(self) -> Tensor:
        return self.ids[:, self.first :, None]  # [B, S - first, 1]

    @functools.cached_property
    def key(self) -> tuple[bytes, ...]:
        return tuple(part.cpu().numpy().tobytes() for part in (self.ids, self.mask, self.context))


@dataclass(frozen=True)
class _OwnScores:
    """What the model's own routing says of a batch: what every configuration is compared with."""

    probabilities: Tensor  # p [B, S - first, V]
    negentropy: Tensor  # sum of p log p [B, S - first]
    best: Tensor  # most probable token [B, S - first, 1]
    rows: list[dict[str, Any]]  # what `_score` finds for each text [B]


AUTO_BATCH_TOKENS = 8192  # what --batch-size auto begins with; halved whenever memory does not suffice


class BHExperimentRunner:
    """Runs routing configurations x prompts on one model and keeps what it measured.

        runner = BHExperimentRunner("models/olmoe-mini", output_dir="results/mini")
        frame = runner.run_full_experiment_suite(max_new_tokens=50)
        with runner.routing("bh_moderate") as stats:
            print(runner.generate("The cat sat on the"))
        stats.summary()

    model_name: folder or hub name. output_dir: where results, checkpoint and log go.
    checkpoint_interval: each finished experiment is written at once; so many are forced to the disk together.
    device: "auto" (None is the same), "cuda" or "cpu". use_fp16: False is the same as dtype "float32".
    model, tokenizer: a model that is loaded already; device and dtype are then its own, and it is in eval
    mode only while something runs.
    calibration_text: a text file for the empirical nulls; without it the model writes its own text.
    seed: for the sampled calibration text, and for sampling. dtype: see `choose_dtype`. revision, device_map,
    trust_remote_code: see `load_model`. sampling: {"temperature": ..., "top_p": ...}, greedy when None.
    batch_size: scored texts in a forward pass, a number or "auto". command: what the rows say ran them.

    Raises UserError for a model that cannot be loaded or has no routers to patch, or an unknown device.
    """

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        output_dir: str | Path = DEFAULT_OUTPUT,
        checkpoint_interval: int = DEFAULT_CHECKPOINT_INTERVAL,
        device: str | None = "auto",
        use_fp16: bool = True,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        calibration_text: str | Path | None = None,
        seed: int = DEFAULT_SEED,
        dtype: str = "auto",
        revision: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        sampling: Mapping[str, float] | None = None,
        batch_size: int | str = "auto",
        command: str = "",
    ):
        checkpoint_interval = check_least("checkpoint_interval", checkpoint_interval)
        seed = check_seed("seed", seed)
        if batch_size != "auto":
            batch_size = check_least("batch_size", batch_size)
        if (model is None) != (tokenizer is None):
            raise UserError("a ready model needs its tokenizer: pass both model= and tokenizer=, or neither")
        if calibration_text is not None and not Path(calibration_text).is_file():
            raise UserError(f"--calibration-text {calibration_text}: there is no such file")
        if not use_fp16 and dtype not in ("auto", "float32"):
            raise UserError(f"--no-fp16 means --dtype float32, but dtype is {dtype}: give one of them")
        place = choose_device(device or "auto") if model is None else input_device(model)
        self.processes = _Processes(place.type == "cpu")
        if model is None:
            if self.processes.world > 1 and device_map:
                raise UserError("--device-map spreads one process over all GPUs: leave out accelerate launch")
            if self.processes.world > 1 and place.type == "cuda":
                place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            precision = choose_dtype(place, dtype if use_fp16 else "float32")
            options = (device_map, revision, trust_remote_code)
            model, tokenizer = load_model(model_name, place, precision, *options)
        self.model, self.tokenizer, self.layers = model, tokenizer, find_moe_layers(model)
        self.model_name, self.output_dir, self.seed = model_name, Path(output_dir), seed
        self.revision = getattr(model.config, "_commit_hash", None) or revision or ""
        self.sampling = None
        if sampling is not None:
            given = {name: _plain(value) for name, value in sampling.items()}
            self.sampling = {"temperature": 1.0, "top_p": 1.0, **given}
        self.checkpoint_interval, self.command = checkpoint_interval, command
        self.calibration_text = None if calibration_text is None else Path(calibration_text)
        self.device = input_device(model)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        text_config = getattr(model.config, "get_text_config", lambda: model.config)()
        self.context = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.batch_size, self._fitting = batch_size, sys.maxsize  # asked for; what the memory was enough for
        self.checkpoint: Checkpoint | None = None
        self._routing = contextlib.ExitStack()
        self._own = resolve_config("own", {"method": "topk", "k": self.layers[0].own_k})
        # Static Top-k that the baseline's rows are scored at as well
        self._curve: Sequence[int] = range(1, self.layers[0].own_k)
        self._run_id = ""  # of the run that is at work
        self._repeated: set[str] | None = None  # scored items that show the noise floor; all where None
        # Of the one batch or prompt that is at work: its key, and what the model's own routing makes of it.
        self._own_scored: tuple[Any, Any] = (None, None)
        self._own_text: tuple[Any, Any] = (None, None)

    def __repr__(self) -> str:
        first = self.layers[0]
        shape = f"{len(self.layers)} MoE layers x {first.num_experts} experts, top-{first.own_k}"
        return f"BHExperimentRunner({self.model_name!r}, {shape}, {self.dtype} on {self.device})"

    # Routing by hand: one configuration at a time, outside the suite

    @contextlib.contextmanager
    def routing(self, config: str | Mapping[str, Any]) -> Iterator[RoutingRecorder]:
        """Route by a configuration, or the built-in one of that name, in the block; yields the recorder."""
        name = config if isinstance(config, str) else "routing"
        if isinstance(config, str):
            known = suites()["all"]
            config = known[_choice("configuration", config, tuple(known))]
        with self._routed(self._resolve(name, config)) as recorder:
            yield recorder

    def generate(self, text: str, max_new_tokens: int = DEFAULT_MAX_TOKENS) -> str:
        """What the model writes after `text` as it is routed now; sampled if the runner samples."""
        inputs = self._encode(resolve_prompt({"text": text}), max_new_tokens)
        output, _ = self._generate(inputs, max_new_tokens, self.seed)
        return self.tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _apply_routing_config(self, config: Config) -> RoutingRecorder:
        """Route by `config` until the next call or `_restore_original_routing`; returns the live recorder."""
        self._restore_original_routing()
        return self._routing.enter_context(self._routed(self._resolve("routing", config)))

    def _patch_bh_routing(self, alpha: float, temperature: float, min_k: int, max_k: int) -> RoutingRecorder:
        """Route by BH with these settings and the empirical null."""
        settings = {"alpha": alpha, "temperature": temperature, "min_k": min_k, "max_k": max_k}
        return self._apply_routing_config({"method": "bh", **settings})

    def _restore_original_routing(self) -> None:
        """Put the model back exactly as it was; harmless when nothing is patched."""
        self._routing.close()

    def _routed(self, config: Config) -> contextlib.AbstractContextManager[RoutingRecorder]:
        calibration = self.calibration if config["p_values"] == "empirical" else None
        return patched_routing(self.model, config, calibration, self.layers)

    def _resolve(self, name: str, config: Config) -> dict[str, Any]:
        """`resolve_config`, with the model's own K in the built-in baseline, whose 8 is OLMoE's."""
        config, widest = resolve_config(name, config), self.layers[0].max_k
        if name == BASELINE and config == resolve_config(BASELINE, ROUTING_CONFIGS[BASELINE]):
            config["k"] = self.layers[0].own_k
        for field in ("k", "min_k"):
            if (config[field] or 1) > widest:
                why = f"{field} = {config[field]}, but a layer can run {widest} experts"
                raise UserError(f"configuration {name!r}: {why}")
        if config["max_k"]:
            config["max_k"] = min(config["max_k"], widest)
        return config

    def _configs(self, given: Configs | None) -> dict[str, dict[str, Any]]:
        """The configurations of a run, resolved; first the model's own routing, where it is not among them:
        what it predicts is what all others are compared with."""
        given = ROUTING_CONFIGS if given is None else given
        configs = {name: self._resolve(name, config) for name, config in given.items()}
        if not configs or any(self._is_own(config) for config in configs.values()):
            return configs
        names = (f"topk_{self._own['k']}", "own_topk", *(f"own_topk_{n}" for n in range(2, len(configs) + 2)))
        name = next(name for name in names if name not in configs)
        return {name: self._own | {"description": "The model's own routing"}} | configs

    # What decides the numbers, besides configuration and prompt

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        text = self.calibration_text
        source = "sampled" if text is None else hashlib.sha256(text.read_bytes()).hexdigest()[:16]
        weights = {"model": model_fingerprint(self.model), "dtype": self.dtype, "device": self.device.type}
        weights["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        return {**weights, "seed": self.seed, "calibration_text": source, "sampling": self.sampling}

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The calibration of this model: from the output folder if it was made from the same, or made now."""
        about = {**self.settings, "sequences": CALIBRATION_SEQUENCES, "length": CALIBRATION_LENGTH}
        del about["sampling"]
        path, start = self.output_dir / "calibration.safetensors", time.perf_counter()
        with self.processes.first_alone():
            if calibration := Calibration.load(path, about):
                return calibration
            calibration = calibrate(self.model, self.tokenizer, self.seed, self.calibration_text)
            calibration.save(path, about)
        null, source = calibration.null(0, 1.0), self.calibration_text or "text sampled from the model"
        logger.info(
            f"calibrated on {calibration.logits.shape[1]} tokens of {source} in "
            f"{time.perf_counter() - start:.1f} s: n0 = {null.n0:,} null scores a layer, enough for alpha >= "
            f"{null.smallest_alpha(self.layers[0].num_experts):.2g}"
        )
        return calibration

    def diagnose(self, prompts: Sequence[Prompt], max_tokens: int = 8192) -> dict[str, Any]:
        """`diagnose_nulls` on scored texts, up to `max_tokens`; also written to null_diagnostics.json."""
        texts, total = [], 0
        for prompt in prompts:
            with contextlib.suppress(UserError):  # one that does not fit: its rows will say so
                if total < max_tokens and (batch := self._scored_batch([prompt])):
                    texts.append(batch.ids)
                    total += batch.ids.numel()
        if not texts:
            return {}
        report = diagnose_nulls(self.calibration, record_routers(self.model, texts))
        shared = count_shared_tokens(texts, self.calibration_text, self.tokenizer)
        report["n_shared_tokens"] = shared
        path = self.output_dir / "null_diagnostics.json"
        write_json(path, {"run_id": self._run_id} | report, indent=None)
        return report

    # Experiments

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _generate(
        self, inputs: Mapping[str, Tensor], new_tokens: int, seed: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Exactly `new_tokens` tokens, timed: output ids [S + n] and the clock columns.

        The seed decides what is sampled; the global random generators are left as they were.
        """
        on_gpu, watch = self.device.type == "cuda", _StepWatch(self._synchronize)
        sampling = {"do_sample": False} if self.sampling is None else {"do_sample": True, "top_k": 0}
        settings = _generation_config(self.tokenizer, new_tokens, **sampling, **(self.sampling or {}))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        generators = torch.random.fork_rng([self.device] if on_gpu else [])
        with writing_plainly(self.model), generators, torch.inference_mode():
            torch.manual_seed(seed)
            self._synchronize()
            start = time.perf_counter()
            output = self.model.generate(**inputs, generation_config=settings, logits_processor=[watch])
            self._synchronize()
            end = time.perf_counter()
        _finite(torch.stack(watch.largest))
        return output[0], {
            "inference_time_sec": end - start,
            "tokens_per_sec": new_tokens / (end - start),
            "time_to_first_token_sec": watch.prefill_done - start,
            "decode_sec_per_token": (end - watch.prefill_done) / (new_tokens - 1) if new_tokens > 1 else None,
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None,
        }

    def _encode(self, prompt: Prompt, new_tokens: int) -> dict[str, Tensor]:
        """Token ids and attention mask [1, S]; UserError where they and the new tokens exceed the context."""
        inputs = self.tokenizer(prompt["text"], return_tensors="pt", verbose=False).to(self.device)
        length, most = inputs["input_ids"].shape[1], self.context - new_tokens
        if not 0 < length <= most:
            raise UserError(
                f"prompt {prompt['id']!r} has {length} tokens; with {new_tokens} new ones it must have 1 to "
                f"{most} for this model's context of {self.context}"
            )
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    def _row(self, name: str, config: Config, prompt: Prompt, tokens: int, sample: int) -> dict[str, Any]:
        """The part of a result row that is known before the experiment. Only the checkpoint keeps `inputs`:
        from it a resumed run can say which field of a prompt is another."""
        on_cpu, inputs = self.device.type == "cpu", input_hashes(prompt)
        return dict.fromkeys(RESULT_COLUMNS) | {
            "config_name": name,
            "sample": sample,
            **{f"prompt_{key}": prompt[key] for key in ("id", "category")},
            "prompt_text": self._text(prompt),
            "document": prompt["document"],
            "inputs": inputs,
            "input_hash": fingerprint(inputs),
            "status": "ok",
            **dict.fromkeys(("error", "static_nll", "routing"), ""),
            **{field: config[field] for field in CONFIG_FIELDS},
            "model_name": self.model_name,
            "model_revision": self.revision,
            "model_hash": self.settings["model"],
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(self.device),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_new_tokens": tokens,
            "sampling": "greedy" if self.sampling is None else json.dumps(self.sampling),
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            **script_origin(),
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
        }

    def _text(self, prompt: Prompt) -> str:
        """The text of an item; that of a window is kept as tokens, which take less memory."""
        return prompt["text"] or self.tokenizer.decode(prompt["token_ids"][1:])

    def _scored_batch(self, prompts: Sequence[Prompt]) -> _ScoredBatch | None:
        """What is teacher-forced for these prompts; None for a prompt that has nothing to be scored."""
        texts, contexts, num_bytes = [], [], []
        for prompt in prompts:
            if "token_ids" in prompt:
                ids, context, text = prompt["token_ids"], 1, self._text(prompt)
            elif text := prompt["reference"]:
                ids = self.tokenizer(prompt["text"], verbose=False)["input_ids"]
                context = len(ids)
                ids = ids + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                return None
            if len(ids) - 1 > self.context:
                what = f"prompt {prompt['id']!r}: {len(ids)} tokens to score"
                raise UserError(f"{what} exceed this model's context of {self.context}")
            texts.append(torch.as_tensor(ids, dtype=torch.int64))
            contexts.append(context)
            num_bytes.append(len(text.encode()))
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        parts = (part.to(self.device) for part in (ids, mask, torch.tensor(contexts)))
        return _ScoredBatch(*parts, num_bytes)

    @torch.inference_mode()
    def _log_probabilities(self, batch: _ScoredBatch) -> Tensor:
        """Log-probabilities of every token where any row is scored, float32: [B, S - first, V]."""
        # The last token of a row predicts nothing: it is left out, as padding where a longer row goes on.
        inputs = {"input_ids": batch.ids[:, :-1], "attention_mask": batch.mask[:, 1:]}
        logits = self.model(**inputs, use_cache=False).logits[:, batch.first - 1 :]
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def _means(self, batch: _ScoredBatch, values: Tensor) -> list[float]:
        """The mean of `values` [B, S - first] over each row's scored tokens."""
        scored = batch.scored
        return (values.double().masked_fill(~scored, 0).sum(1) / scored.sum(1)).tolist()

    def _nll(self, batch: _ScoredBatch, scores: Tensor) -> list[float]:
        return self._means(batch, -scores.gather(2, batch.targets)[..., 0])

    @torch.inference_mode()
    def _own_scores(self, batch: _ScoredBatch) -> _OwnScores:
        """Those of the model's own routing, computed and recorded once for all configurations of a batch."""
        if self._own_scored[0] != batch.key:
            self._own_scored = None, None  # never two of them in memory
            with self._routed(self._own) as recorder:
                rows, scores = self._score(batch, recorder, None)
            p, best = scores.exp(), scores.argmax(-1, keepdim=True)
            self._own_scored = batch.key, _OwnScores(p, torch.linalg.vecdot(p, scores), best, rows)
        return self._own_scored[1]

    def _static_curve(self, batch: _ScoredBatch, config: Config) -> list[str]:
        """For each text [B] under the model's own routing, as JSON: k -> NLL under static Top-k, for each k
        that the suite does not run."""
        curve, rows = {}, range(len(batch.ids))
        if not self._curve or not self._is_own(config):
            return ["" for _ in rows]
        for k in self._curve:
            with self._routed(resolve_config(f"topk_{k}", {"method": "topk", "k": k})):
                curve[k] = self._nll(batch, self._log_probabilities(batch))
        return [json.dumps({k: values[row] for k, values in curve.items()}) for row in rows]

    @torch.inference_mode()
    def _score(
        self, batch: _ScoredBatch, recorder: RoutingRecorder, own: _OwnScores | None
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Teacher forcing as the model is routed now: for each text [B] the QUALITY_COLUMNS and `routing`,
        what the routers did; and the log-probabilities behind them. own: what to compare with, if not itself.
        """
        recorder.start(rows=len(batch.ids))
        scores = self._log_probabilities(batch)
        recorded, nlls = recorder.statistics(), self._nll(batch, scores)
        _finite(torch.tensor(nlls))
        kl, agreement = ([number] * len(nlls) for number in (0.0, 1.0))
        if own is not None:
            # KL(own || this) in one pass: exactly 0 for equal scores; rounding may take it below.
            divergence = own.negentropy - torch.linalg.vecdot(own.probabilities, scores)  # [B, S - first]
            kl = self._means(batch, divergence.clamp(min=0))
            best = scores.gather(2, own.best)[..., 0] == scores.amax(-1)  # five times faster than its argmax
            agreement = self._means(batch, best)
        rows = []
        for index, tokens in enumerate(batch.scored.sum(1).tolist()):
            nll, size, routing = nlls[index], batch.num_bytes[index], recorded[index].row()
            row = {"reference_nll": nll, "reference_tokens": tokens, "reference_bytes": size}
            row["reference_perplexity"] = math.exp(nll) if nll < 700 else None
            row["bits_per_byte"] = nll * tokens / (math.log(2) * size)
            row |= {"kl_to_baseline": kl[index], "top1_agreement": agreement[index]}
            row |= {"reference_avg_experts": routing["avg_experts_per_token"], "routing": recorded[index]}
            rows.append(row | {f"reference_{share}": routing[share] for share in SHARES})
        return rows, scores

    def _quality(
        self, batch: _ScoredBatch, config: Config, recorder: RoutingRecorder, own: _OwnScores, repeat: bool
    ) -> list[dict[str, Any]]:
        """What `_score` finds for each text [B] under `config`; the model's own routing, scored before, is
        scored again for the noise floor."""
        if not self._is_own(config):
            return self._score(batch, recorder, own)[0]
        again = self._nll(batch, self._log_probabilities(batch)) if repeat else [None] * len(own.rows)
        return [row | {"repeat_reference_nll": nll} for row, nll in zip(own.rows, again, strict=True)]

    def _is_static(self, config: Config, k: int) -> bool:
        """Whether a resolved configuration is plain Top-k, a point of the static curve, whatever its name."""
        plain = self._own | {"k": k}
        return all(config[field] == plain[field] for field in CONFIG_FIELDS)

    def _is_own(self, config: Config) -> bool:
        """Whether a resolved configuration is the model's own routing."""
        return self._is_static(config, self._own["k"])

    def _static_widths(self, configs: Configs) -> list[int]:
        """The k below the model's own that plain Top-K configurations among these run."""
        widths = range(1, self._own["k"])
        return [k for k in widths if any(self._is_static(config, k) for config in configs.values())]

    def _score_only(
        self, name: str, config: Config, prompts: Sequence[Prompt], tokens: int
    ) -> list[dict[str, Any]]:
        """Result rows of items with `token_ids`, scored together."""
        batch = self._scored_batch(prompts)
        own, curve = self._own_scores(batch), self._static_curve(batch, config)
        repeat = self._repeated is None or prompts[0]["id"] in self._repeated
        with self._routed(config) as recorder:
            quality = self._quality(batch, config, recorder, own, repeat)
        rows = []
        for prompt, found, static in zip(prompts, quality, curve, strict=True):
            row = self._row(name, config, prompt, tokens, 0) | found | found["routing"].row()
            more = {"static_nll": static, "batch_size": len(prompts), "routing": found["routing"].pack()}
            rows.append(row | more)
        return rows

    def _generate_and_score(
        self, name: str, config: Config, prompt: Prompt, tokens: int, sample: int
    ) -> dict[str, Any]:
        """The result row of a prompt: one patch, in which it is continued and its reference scored."""
        row, is_own = self._row(name, config, prompt, tokens, sample), self._is_own(config)
        inputs, batch = self._encode(prompt, tokens), self._scored_batch([prompt])
        if sample > 0:  # the reference is the same for every sample: scored once
            batch = None
        if batch is not None:
            own, row["static_nll"] = self._own_scores(batch), self._static_curve(batch, config)[0]
        digest = hashlib.sha256(f"{self.seed} {sample} {prompt['id']}".encode()).digest()
        seed, length = int.from_bytes(digest[:7], "big"), inputs["input_ids"].shape[1]
        with self._routed(config) as recorder:
            output, clock = self._generate(inputs, tokens, seed)
            routing = recorder.total()
            quality = {} if batch is None else self._quality(batch, config, recorder, own, True)[0]
        new, key = output[length:], (prompt["text"], tokens, seed)
        if is_own or self._own_text[0] != key:  # run again by itself: what the others are compared with
            again, second = self._generate(inputs, tokens, seed)
            self._own_text = key, again[length:]
            row["repeat_inference_time_sec"] = second["inference_time_sec"] if is_own else None
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        row |= quality | routing.row() | clock
        return row | {
            "generated_text": text,
            "full_text": prompt["text"] + text,
            "num_input_tokens": length,
            "num_output_tokens": len(new),
            "tokens_until_divergence": (new == self._own_text[1]).long().cumprod(0).sum().item(),
            "routing": routing.pack(),
        }

    def run_single_experiment(
        self,
        config_name: str,
        config: Config,
        prompt_data: Prompt,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        sample: int = 0,
    ) -> dict[str, Any]:
        """Generate from one prompt and score its reference under one configuration; returns a result row.

        The row has RESULT_COLUMNS as keys. Its routing statistics cover every token that was routed while
        generating: the prompt and all new tokens but the last; those of the scored text are `reference_*`.
        The model's own routing is run twice: its `repeat_*` columns are the noise floor. An item with
        `token_ids` is only scored. `sample` tells several samples of a prompt apart. The model is unpatched
        afterwards, whatever happened. Raises UserError for a prompt that does not fit.
        """
        self._restore_original_routing()
        config, prompt = self._resolve(config_name, config), resolve_prompt(prompt_data)
        row = self._run(config_name, config, [prompt], max_new_tokens, sample)[0]
        return {column: row[column] for column in RESULT_COLUMNS}

    def _run(
        self, name: str, config: Config, prompts: Sequence[Prompt], tokens: int, sample: int
    ) -> list[dict[str, Any]]:
        """Rows of one prompt, or of items that are scored together; each also has `routing`."""
        if "token_ids" in prompts[0]:
            return self._score_only(name, config, prompts, tokens)
        return [self._generate_and_score(name, config, prompts[0], tokens, sample)]

    def _run_safely(
        self, name: str, config: Config, prompts: Sequence[Prompt], tokens: int, sample: int
    ) -> list[dict[str, Any]]:
        """`_run`, whose failure is a row; a batch that fails is halved: a row fails by its own fault only."""
        # Counts shuffled over a batch would depend on the batch.
        size, rows = 1 if config["shuffle"] else min(len(prompts), self._fitting), []
        while len(rows) < len(prompts):
            part = prompts[len(rows) : len(rows) + size]
            try:
                rows += self._run(name, config, part, tokens, sample)
            except Exception as error:  # one failed experiment must not end the suite
                self._own_scored = None, None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # after an out-of-memory error, start clean
                if len(part) > 1:
                    size = len(part) // 2
                    if accelerate.utils.memory.should_reduce_batch_size(error):
                        self._fitting = size
                    logger.info(f"a batch of {len(part)} failed ({type(error).__name__}), trying {size}")
                    continue
                rows.append(self._failed(self._row(name, config, part[0], tokens, sample), error))
        return rows

    def _failed(self, row: dict[str, Any], error: Exception) -> dict[str, Any]:
        """The row of an experiment that failed, which the log says as well."""
        message = f"{type(error).__name__}: {error}"
        logger.error(f"{row['config_name']} x {row['prompt_id']} failed: {message}")
        logger.debug("where it failed", exc_info=True)
        return row | {"status": "error", "error": message}

    def _units(self, prompts: Sequence[Prompt], num_samples: int) -> list[tuple[list[Prompt], int]]:
        """What is run in one go under each configuration: (prompts, sample).

        Items to be scored go together by length. The units follow from the prompts alone, not from what is
        finished already, so that a resumed run rounds as an uninterrupted one.
        """
        windows = sorted((p for p in prompts if "token_ids" in p), key=lambda p: -len(p["token_ids"]))
        units = [([prompt], n) for prompt in prompts if "token_ids" not in prompt for n in range(num_samples)]
        while windows:
            fitting = max(1, AUTO_BATCH_TOKENS // len(windows[0]["token_ids"]))
            size = fitting if self.batch_size == "auto" else self.batch_size
            units.append((windows[:size], 0))
            windows = windows[size:]
        return units

    def run_full_experiment_suite(
        self,
        routing_configs: Configs | None = None,
        test_prompts: Sequence[Prompt] | None = None,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        resume: bool = True,
        *,
        num_samples: int = 1,
        retry_failed: bool = False,
        fail_fast: bool = False,
        baseline: str | None = None,
    ) -> pd.DataFrame:
        """Run every configuration on every prompt; returns a row each, in that order, and writes the CSV.

        Configurations take turns within each prompt, so that a machine that slows down slows all of them
        alike. The model's own routing is run as well where it is not among them. With `resume`, what the
        output folder holds is not run again; without, it is set aside. A failed experiment becomes a row with
        status "error"; retry_failed tries the earlier ones again, fail_fast stops at the first. num_samples:
        texts to sample for each prompt. baseline: the configuration that the others will be compared with;
        refused where it is not one of them. Ctrl-C keeps what is finished and is passed on. Under `accelerate
        launch` each process runs its share; the first one returns all rows, the others their own.
        """
        prompts = [resolve_prompt(p) for p in (TEST_PROMPTS if test_prompts is None else test_prompts)]
        configs = self._configs(routing_configs)
        max_new_tokens = check_least("max_new_tokens", max_new_tokens)
        num_samples = check_least("num_samples", num_samples)
        if not configs or not prompts:
            raise UserError("a suite needs at least one configuration and one prompt")
        if num_samples > 1 and self.sampling is None:
            raise UserError(f"num_samples {num_samples}: greedy texts are all alike; sample with --do-sample")
        check_ids(prompts)
        self._check_baseline(baseline, configs)
        static = self._static_widths(configs)
        self._curve = [k for k in range(1, self._own["k"]) if k not in static]
        units = self._units(prompts, num_samples)
        self._repeated = {prompt["id"] for prompt in units[0][0]}  # one batch shows it, at little cost
        settings = {**self.settings, "max_new_tokens": max_new_tokens}
        plan = [
            (name, prompt["id"], sample)
            for prompt in prompts
            for sample in range(1 if "token_ids" in prompt else num_samples)
            for name in configs
        ]
        empirical = any(config["p_values"] == "empirical" for config in configs.values())
        scored = any("token_ids" in prompt or prompt["reference"] for prompt in prompts)
        with self._opened(settings, resume, configs, prompts, plan) as checkpoint:
            diagnosed = (_read_json(self.output_dir / "null_diagnostics.json") or {}).get("run_id")
            self._say_what_was_added(configs, routing_configs)
            done = checkpoint.done(retry_failed)
            pending = sum(key not in done for key in plan)
            logger.info(f"{self!r}: {len(plan)} experiments, {len(plan) - pending} finished already")
            if pending:
                self._warm_up(configs, units[0], max_new_tokens)
            if empirical and scored and diagnosed != self._run_id:
                self._calibrate_for(configs)  # all processes together
                if self.processes.rank == 0:
                    self.diagnose(prompts)
            self._run_units(units, configs, max_new_tokens, done, checkpoint, fail_fast)
            rows = self._gather(checkpoint)
            if self.processes.rank > 0:
                return pd.DataFrame(rows, columns=RESULT_COLUMNS).assign(run_id=self._run_id)
            return self._finish(checkpoint.rows(plan), configs, {prompt["category"] for prompt in prompts})

    @staticmethod
    def _check_baseline(baseline: str | None, configs: Configs) -> None:
        if baseline is not None:
            _choice("baseline", baseline, tuple(configs))

    @staticmethod
    def _say_what_was_added(configs: Configs, given: Configs | None) -> None:
        given = ROUTING_CONFIGS if given is None else given
        for name in configs:
            if name not in given:
                logger.info(
                    f"{name}, the model's own routing, is run as well: the others are compared with it"
                )

    def _finish(self, rows: Iterable[Row], configs: Configs, categories: set[str]) -> pd.DataFrame:
        """Write results and layer tables to the output folder; returns the results as they were written."""
        tables = LayerTables(configs, [layer.name for layer in self.layers], categories)
        path = self.output_dir / "bh_routing_results.csv"
        self._drop_plots_of_another_run(path)
        rows = self._with_one_static_curve(rows, configs)
        write_results((tables.add(row) | {"run_id": self._run_id} for row in rows), path)
        tables.write(self.output_dir, self._run_id)
        frame = read_results(path)
        logger.info(f"{len(frame)} experiments, {int((frame['status'] != 'ok').sum())} failed: {path}")
        return frame

    def _drop_plots_of_another_run(self, results: Path) -> None:
        """Plots do not say which run they show: those of what `results` holds go, unless it is this run."""
        with contextlib.suppress(OSError, ValueError):
            first = pd.read_csv(results, nrows=1, dtype=str)
            if run_ids(first) != {self._run_id}:
                for name in PLOTS:
                    (self.output_dir / "plots" / f"{name}.png").unlink(missing_ok=True)

    def _with_one_static_curve(self, rows: Iterable[Row], configs: Configs) -> Iterator[Row]:
        """`rows` with each point of the static curve once for each item, whatever else earlier runs into the
        same folder scored: in the rows of the first configuration that is the model's own routing, without
        the k that a configuration of this run has rows of its own for."""
        baseline = next(name for name, config in configs.items() if self._is_own(config))
        own_rows = set(self._static_widths(configs))
        for row in rows:
            if row.get("static_nll"):
                curve = json.loads(row["static_nll"]) if row["config_name"] == baseline else {}
                kept = {k: nll for k, nll in curve.items() if int(k) not in own_rows}
                row = row | {"static_nll": json.dumps(kept) if kept else ""}
            yield row

    def run_tasks(
        self,
        tasks: Sequence[str],
        routing_configs: Configs | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        include_path: str | Path | None = None,
        resume: bool = True,
        *,
        retry_failed: bool = False,
        fail_fast: bool = False,
        baseline: str | None = None,
    ) -> pd.DataFrame:
        """Run tasks of lm-evaluation-harness under every configuration; a row for each document of each.

        Rows are as those of `run_full_experiment_suite`, with `task_metric` and `task_score`, and go to the
        same CSV; what the harness itself reports goes to task_results.json. num_fewshot and limit (documents
        of each task, or a share below 1) are the harness's own; include_path: see `load_tasks`. A task under
        a configuration is saved when it is finished, and not run again with `resume`. Batch size "auto" is 1
        here; router statistics are recorded with 1 only. For the rest see `run_full_experiment_suite`.
        """
        try:
            import lm_eval
        except ImportError:
            raise UserError("--tasks needs lm-evaluation-harness: pip install lm_eval") from None
        names, configs = list(dict.fromkeys(tasks)), self._configs(routing_configs)
        if not configs or not names:
            raise UserError("a run needs at least one configuration and one task")
        self._check_baseline(baseline, configs)
        with _harness_seeds(self.device):
            loaded = load_tasks(names, include_path, num_fewshot)
        items = {name: resolve_prompt({"id": name, "text": name, "category": name}) for name in names}
        own = [] if include_path is None else sorted(Path(include_path).rglob("*.y*ml"))
        files = hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest()[:16]
        how = {"lm_eval": lm_eval.__version__, "num_fewshot": num_fewshot, "limit": limit}
        settings = {**self.settings, **how, "task_files": files}
        plan = [(config, name, 0) for name in names for config in configs]
        with self._opened(settings, resume, configs, list(items.values()), plan) as checkpoint:
            self._say_what_was_added(configs, routing_configs)
            done = checkpoint.done(retry_failed)
            pending = [key for key in plan if key not in done]
            logger.info(f"{self!r}: {len(plan)} tasks x configurations, {len(plan) - len(pending)} finished")
            if pending:
                self._calibrate_for(configs)
                size = 1 if self.batch_size == "auto" else self.batch_size
                lm = harness_model(self.model, self.tokenizer, size)
            share = pending[self.processes.rank :: self.processes.world]
            for number, (config, name, _) in enumerate(share, 1):
                logger.info(f"{name} under {config}")
                start = time.perf_counter()
                row = self._run_task(config, configs[config], items[name], loaded[name], lm, limit)
                checkpoint.append(row)
                seconds = time.perf_counter() - start
                logger.debug(f"{number} of {len(share)}: {config} x {name}, {seconds:.2f} s")
                if fail_fast and row["status"] != "ok":
                    logger.error("stopped at the first failed task, as --fail-fast asks")
                    break
            rows = self._gather(checkpoint)
            if self.processes.rank > 0:
                frame = pd.DataFrame(_documents(rows), columns=RESULT_COLUMNS)
                return frame.assign(run_id=self._run_id)
            harness: dict[str, dict[str, Any]] = {name: {} for name in configs}
            for row in checkpoint.rows(plan):
                harness[row["config_name"]][row["prompt_id"]] = row["task_results"]
            results = {"run_id": self._run_id, **how, "configurations": harness}
            write_json(self.output_dir / TASK_RESULTS, strict_json(results))
            rows = list(_documents(checkpoint.rows(plan)))
            return self._finish(rows, configs, {row["prompt_category"] for row in rows})

    def _run_task(
        self, name: str, config: Config, item: Prompt, tasks: Mapping[str, Any], lm: Any, limit: float | None
    ) -> dict[str, Any]:
        """One task under one configuration: a row with the part of a result row that all its documents share,
        the rest for each under `documents`, and `task_results`. A failure is a row with status "error"."""
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        row = self._row(name, config, item, 0, 0) | {"batch_size": lm.batch_size}
        row |= {"documents": [], "task_results": {}}
        try:
            with _harness_seeds(self.device), self._routed(config) as recorder:
                lm.recorder, lm.seen = recorder, {}
                for task in tasks["tasks"].values():
                    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
                # Never with the harness's cache: it finds answers by the model's name, whatever its routing.
                found = evaluate(lm, task_dict=tasks, limit=limit)
        except Exception as error:  # one failed task must not end the run
            return self._failed(row, error)
        kept = ("results", "groups", "higher_is_better", "versions", "n-shot", "n-samples")
        row["task_results"] = {key: found[key] for key in kept if key in found}
        for part, samples in found["samples"].items():
            samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
            metric, scores = document_scores(samples, found["results"][part])
            if not metric:
                logger.warning(f"{part} has no metric of single documents: it is reported, but not tested")
            for sample, score in zip(samples, scores, strict=True):
                asked, answer = str(sample["arguments"][0][0]), sample["filtered_resps"][0]
                place, routing = f"{part}:{sample['doc_id']}", lm.seen.get((part, sample["doc_id"]))
                document = {
                    "prompt_id": place,
                    "prompt_category": part,
                    "document": place,
                    "prompt_text": asked if len(asked) <= SHOWN_TEXT else f"... {asked[-SHOWN_TEXT:]}",
                    "input_hash": fingerprint(repr(sample["arguments"])),
                    "generated_text": answer if isinstance(answer, str) else None,
                    "task_metric": metric,
                    "task_score": score,
                }
                if routing is not None:
                    document |= {**routing.row(), "routing": routing.pack()}
                row["documents"].append(document)
        return row

    @contextlib.contextmanager
    def _opened(
        self,
        settings: Mapping[str, Any],
        resume: bool,
        configs: Configs,
        prompts: Sequence[Prompt],
        plan: Sequence[Key],
    ) -> Iterator[Checkpoint]:
        """The log, the lock, the id and the checkpoint of a run. Each process has its own file; what an
        earlier run of any number of processes left is gathered in the first one's beforehand.

        The id follows from all that the results follow from: the same command has the same one.
        """
        self._restore_original_routing()
        folder, rank = self.output_dir / "checkpoints", self.processes.rank
        main, by_id = folder / "latest_checkpoint.json", {prompt["id"]: prompt for prompt in prompts}
        inputs = {prompt["id"]: input_hashes(prompt) for prompt in prompts}
        with contextlib.ExitStack() as stack:
            if rank == 0:
                stack.enter_context(log_to(self.output_dir / "experiment_log.txt"))
                stack.enter_context(locked(folder))
                if not resume or not any(folder.glob("*.json")):
                    set_aside(self.output_dir)
                checkpoint = Checkpoint(main, settings, self.checkpoint_interval)
                stack.callback(checkpoint.close)
                self._take_over(checkpoint)
                self._check_rows(checkpoint, configs, by_id, inputs)
            self.processes.wait()
            if rank > 0:
                own = folder / f"process_{rank}.json"
                checkpoint = Checkpoint(own, settings, self.checkpoint_interval)
                stack.callback(checkpoint.close)
                with contextlib.closing(Checkpoint(main, settings)) as gathered:
                    checkpoint.elsewhere = gathered.places
            self.processes.wait()
            self.checkpoint = checkpoint
            self._run_id = fingerprint(strict_json([settings, configs, inputs, sorted(plan)]))
            stack.callback(setattr, self, "_run_id", "")
            yield checkpoint

    def _take_over(self, checkpoint: Checkpoint) -> None:
        for other in sorted(checkpoint.path.parent.glob("process_*.json")):
            checkpoint.take_over(other)

    def _gather(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """When all processes are done, the first one takes over what the others found; they get their own."""
        own = []
        if self.processes.rank > 0:
            own = list(checkpoint.rows(checkpoint.places))
            checkpoint.close()  # the first one will delete the file
        self.processes.wait()
        if self.processes.rank == 0:
            self._take_over(checkpoint)
        return own

    def _check_rows(
        self,
        checkpoint: Checkpoint,
        configs: Configs,
        prompts: Mapping[str, Prompt],
        inputs: Mapping[str, dict[str, str]],
    ) -> None:
        """Finished rows must be of the same configurations and prompts as what now goes by their names."""
        older = 0
        for row in checkpoint.rows(list(checkpoint.places)):
            name, prompt_id = row["config_name"], row["prompt_id"]
            if name in configs and prompt_id in prompts:
                self._check_configuration(row, configs[name])
                if "inputs" in row:
                    before, now = row["inputs"], inputs[prompt_id]
                else:
                    older += 1
                    before, now = self._inputs_that_show(row, prompts[prompt_id])
                for field in {**before, **now}:
                    if before.get(field) != now.get(field):
                        why = f"holds {name} x {prompt_id}, run with another {field} of that prompt"
                        raise UserError(f"{self.output_dir} {why}; {WAY_OUT}")
        if older:
            logger.warning(
                f"{older} finished experiments are of an older script, which did not note all that was fed "
                "in: whether their references are the same is seen by their lengths only"
            )

    def _check_configuration(self, row: Row, config: Config) -> None:
        for field in CONFIG_FIELDS:
            known = field in row or config[field] is None  # an older script may not have known the field
            before = row.get(field) if known else FIELDS[field][0]
            if before != config[field]:
                raise UserError(
                    f"{self.output_dir} holds {row['config_name']} x {row['prompt_id']} with {field} = "
                    f"{before!r}, now it is {config[field]!r}; {WAY_OUT}"
                )

    def _inputs_that_show(self, row: Row, prompt: Prompt) -> tuple[dict[str, Any], dict[str, Any]]:
        """Field -> value, of an older script's row and of a prompt, as far as such a row shows them."""
        now = {"text": self._text(prompt), "category": prompt["category"], "document": prompt["document"]}
        columns = {"text": "prompt_text", "category": "prompt_category", "document": "document"}
        before = {field: row.get(column, now[field]) for field, column in columns.items()}
        if row["status"] == "ok" and row["sample"] == 0 and "token_ids" not in prompt:
            before["reference"] = row.get("reference_bytes") or 0
            now["reference"] = len(prompt["reference"].encode())
        return before, now

    def _calibrate_for(self, configs: Configs) -> None:
        """Calibrate if a configuration needs it; a mistake in what was asked for ends the run here."""
        for config in configs.values():
            with self._routed(config):
                pass

    def _warm_up(self, configs: Configs, unit: tuple[list, int], max_new_tokens: int) -> None:
        """Touch every code path once, so that no experiment pays for it. A failure will show in the rows it
        spoils."""
        self._calibrate_for(configs)
        for name, config in configs.items():
            with contextlib.suppress(Exception):
                self._run(name, config, unit[0][:1], min(max_new_tokens, 4), 0)

    def _run_units(
        self,
        units: Sequence[tuple[list[Prompt], int]],
        configs: Configs,
        max_new_tokens: int,
        done: set[Key],
        checkpoint: Checkpoint,
        fail_fast: bool,
    ) -> None:
        """Run this process's share of what is not done, under a progress bar; each row is saved at once."""
        share = units[self.processes.rank :: self.processes.world]
        jobs = [
            (name, prompts, sample)
            for prompts, sample in share
            for name in configs
            if any((name, prompt["id"], sample) not in done for prompt in prompts)
        ]
        total = sum(len(prompts) for _, prompts, _ in jobs)
        quiet = None if self.processes.rank == 0 else True  # None: shown on a terminal only
        with tqdm.tqdm(total=total, unit="experiment", disable=quiet) as progress:
            for number, (name, prompts, sample) in enumerate(jobs, 1):
                progress.set_description(name)
                start = time.perf_counter()
                for row in self._run_safely(name, configs[name], prompts, max_new_tokens, sample):
                    if Checkpoint.key(row) in done:
                        continue
                    checkpoint.append(row)
                    if fail_fast and row["status"] != "ok":
                        logger.error("stopped at the first failed experiment, as --fail-fast asks")
                        return
                progress.update(len(prompts))
                seconds = time.perf_counter() - start
                done_now = self._in_words(prompts, sample)
                logger.debug(f"{number} of {len(jobs)}: {name} x {done_now}, {seconds:.2f} s")

    @staticmethod
    def _in_words(prompts: Sequence[Prompt], sample: int) -> str:
        """The items of a unit of work, for the log."""
        first = prompts[0]["id"]
        if len(prompts) > 1:
            return f"{len(prompts)} items from {first} on"
        return f"{first}, sample {sample}" if sample else first

    def _save_checkpoint(self) -> None:
        """Force everything finished so far to the disk."""
        if self.checkpoint is not None:
            self.checkpoint.sync()


# ---------------------------------------------------------------------------------------------------------
# 13. Analysis
# ---------------------------------------------------------------------------------------------------------

METRICS: dict[str, tuple[str, str, int]] = {  # what is tested: column -> title, unit, digits in tables
    "avg_experts_per_token": ("experts per token and layer", "", 2),
    "inference_time_sec": ("inference time", "s", 3),
    "decode_sec_per_token": ("decode time per token", "s", 4),
    "tokens_per_sec": ("throughput", "tokens/s", 1),
    "reference_nll": ("NLL of the reference", "nats/token", 4),
    "expert_utilization_cv": ("load imbalance, CV over experts", "", 2),
    "expert_utilization_max_min_ratio": ("most to least used expert", "", 1),
}

REPEATED = ("inference_time_sec", "reference_nll")  # measured twice for the baseline: the noise floor

# What an earlier attempt expected of OLMoE-1B-7B and never measured: configurations, quantity, low, high.
_ALL_BH = ("bh_strict", "bh_moderate", "bh_loose", "bh_adaptive")
QUANTITIES = {
    "avg_experts_per_token": "experts per token and layer",
    "expert_utilization_cv": "load imbalance (CV over experts)",
    "slowdown_percent": "slower than the baseline, %",
    "experts_p_value": "paired t-test on experts, p",
    "experts_abs_d": "effect on experts, absolute d",
}
HYPOTHESES = (
    (("bh_strict",), "avg_experts_per_token", 3.5, 4.5),
    (("bh_moderate",), "avg_experts_per_token", 4.5, 5.5),
    (("bh_loose",), "avg_experts_per_token", 5.5, 6.5),
    (("bh_adaptive",), "avg_experts_per_token", 4.0, 5.0),
    (_ALL_BH, "slowdown_percent", 5.0, 15.0),
    (_ALL_BH, "experts_p_value", 0.0, 0.001),
    (_ALL_BH, "experts_abs_d", 0.8, math.inf),
    (("topk_8",), "expert_utilization_cv", 0.25, 0.35),
    (_ALL_BH, "expert_utilization_cv", 0.20, 0.30),
)
EXPECTED_SUITE_MINUTES = {"an RTX 3090": (15, 20), "a T4": (25, 35), "16 CPU cores": (90, 120)}


def paired_test(
    differences: Sequence[float], margin: float | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """The test of every comparison: is the mean of paired differences [n] zero? Student's t, two-sided.

    differences: one for each independent unit (document, prompt). cohens_d is mean over standard deviation
    (d_z for paired samples; Lakens 2013, eq. 6). smallest_detectable is the effect that a two-sided 5 %
    t-test finds with 80 % power: (t_.975 + t_.80) sd / sqrt(n). With a margin, equivalence to zero by two
    one-sided t-tests (TOST; Schuirmann 1987): equivalence_p_value is the larger of the two.

    Where the test has nothing to say its entries are None and `reason` says why, decided before it is
    called. Differences below 1e-12 `scale` are rounding. Nothing is claimed here: see `adjust_p_values`.
    """
    x = np.asarray(differences, dtype=float)
    n, rounding = len(x), 1e-12 * max(scale, np.abs(x).max(initial=0))
    numbers = ("ci95_low", "ci95_high", "t_statistic", "p_value", "cohens_d", "smallest_detectable")
    result = {"n_units": n, "mean_difference": float(x.mean()) if n else None}
    result |= dict.fromkeys((*numbers, "equivalence_p_value", "reason"))
    if n < 2:
        return result | {"reason": f"at least 2 independent units are needed, not {n}"}
    if (np.abs(x) <= rounding).all():
        return result | {"reason": "nothing differs"}
    if x.std(ddof=1) <= rounding:
        return result | {"reason": "all differ by the same amount"}
    test = stats.ttest_1samp(x, 0)
    interval = test.confidence_interval(0.95)
    result["ci95_low"] = float(interval.low)
    result["ci95_high"] = float(interval.high)
    result["t_statistic"] = float(test.statistic)
    result["p_value"] = float(test.pvalue)
    result["cohens_d"] = float(x.mean() / x.std(ddof=1))
    result["smallest_detectable"] = float(stats.t.ppf([0.975, 0.80], n - 1).sum() * stats.sem(x))
    if margin is not None:
        above = stats.ttest_1samp(x, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(x, margin, alternative="less").pvalue
        result["equivalence_p_value"] = float(max(above, below))
    return result


def item_units(values: pd.Series, documents: pd.Series) -> pd.Series:
    """One value per document whose plain mean is the mean over items; tests on them respect clustering.

    A document with n_c items that sum to S_c gives u_c = d + (S_c - d n_c) / mean(n), d = sum S / sum n:
    the linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, section 9A.2 and eq. 6.13),
    so var(u) / units is the cluster-robust variance of d. Where every item is its own document, u = values.
    Both series are indexed by item.
    """
    documents = documents.loc[values.index]
    if documents.is_unique:
        return values
    clusters = values.groupby(documents, sort=False).agg(["sum", "count"])
    mean = values.mean()
    return mean + (clusters["sum"] - mean * clusters["count"]) / clusters["count"].mean()


def item_documents(frame: pd.DataFrame) -> pd.Series:
    """prompt_id -> document, the independent unit; an item whose document is not known is its own."""
    items = frame.drop_duplicates("prompt_id").set_index("prompt_id", drop=False)
    own = items["prompt_id"]
    return items["document"].mask(items["document"] == "").fillna(own) if "document" in items else own


def paired_comparison(
    baseline: Sequence[float], other: Sequence[float], documents: pd.Series | None = None
) -> dict[str, Any]:
    """`paired_test` of `other` minus `baseline`, two series indexed by item, or lists in the same order.

    Items that one of them lacks are left out. documents: item -> document, by default its own.
    """
    base, values = pd.Series(baseline, dtype=float).align(pd.Series(other, dtype=float), join="inner")
    complete = base.notna() & values.notna()
    base, values = base[complete], values[complete]
    differences = values - base
    units = differences if documents is None else item_units(differences, documents)
    found = {
        "n_pairs": len(base),
        "mean_baseline": float(base.mean()) if len(base) else None,
        "mean": float(values.mean()) if len(base) else None,
        "median_ratio": float((values / base).median()) if len(base) and (base > 0).all() else None,
    }
    return found | paired_test(units, scale=max(base.abs().max(), values.abs().max()) if len(base) else 0.0)


def adjust_p_values(
    tests: Sequence[dict[str, Any]], key: str = "p_value", claim: str = "significant"
) -> None:
    """Add to each test of a table `key`_adjusted, its BH-adjusted p-value over the table, and `claim`.

    claim: whether the adjusted p-value is below SIGNIFICANCE_LEVEL, the one condition for any claim; None
    where there is no p-value.
    """
    known = [test[key] for test in tests if test[key] is not None]
    adjusted = iter(stats.false_discovery_control(known) if known else ())
    for test in tests:
        value = None if test[key] is None else float(next(adjusted))
        test[f"{key}_adjusted"] = value
        test[claim] = None if value is None else value < SIGNIFICANCE_LEVEL


def _describe(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Metric -> mean, std, median, min, max, n; what is undefined becomes None in the JSON."""
    known = {metric: rows[metric].dropna() for metric in METRICS}
    kinds = ("mean", "std", "median", "min", "max")
    return {m: {k: getattr(x, k)() for k in kinds} | {"n": len(x)} for m, x in known.items()}


def _order(values: Iterable[str]) -> list[str]:
    """Distinct values in order of appearance: configurations and categories keep the order of the run."""
    return list(dict.fromkeys(values))


REQUIRED_COLUMNS = ("config_name", "prompt_id", "status")  # without these a table says nothing


def with_todays_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of results with all RESULT_COLUMNS: those that an older script did not write are empty.

    Raises UserError for a table that is none of this script's.
    """
    if lacking := [column for column in REQUIRED_COLUMNS if column not in frame]:
        why = "pass what run_full_experiment_suite or read_results returned"
        raise UserError(f"the table of results lacks {', '.join(lacking)}: {why}")
    empty = {c: "" if c in STRING_COLUMNS else math.nan for c in RESULT_COLUMNS if c not in frame}
    return frame.assign(**empty) if empty else frame


def static_widths(frame: pd.DataFrame) -> dict[str, int]:
    """Configuration -> k, for those that are plain static Top-K: what a row does decides, not its name."""
    rows = frame.drop_duplicates("config_name")[["config_name", "method", "k", "renormalize"]]
    return {row["config_name"]: int(row["k"]) for row in rows.to_dict("records") if is_plain_topk(row)}


def own_routing(frame: pd.DataFrame) -> str | None:
    """The configuration that is the model's own routing; None where no row shows it.

    Only the model's own routing is run twice, carries the static curve, and agrees exactly with itself. Rows
    of tasks have none of these marks: there it is a plain Top-K that has the built-in baseline's name, whose
    k is then the model's own.
    """
    frame = with_todays_columns(frame)
    widths = static_widths(frame)
    rows = frame[frame["config_name"].isin(list(widths))]
    twice = rows[[f"repeat_{column}" for column in REPEATED]].notna().any(axis=1)
    with_curve = rows["static_nll"].fillna("") != ""
    agrees = (rows["kl_to_baseline"] == 0) & (rows["top1_agreement"] == 1)
    for shown in (twice | with_curve, agrees):
        if shown.any():
            return rows["config_name"][shown].iloc[0]
    return BASELINE if BASELINE in widths else None


def choose_baseline(frame: pd.DataFrame, name: str | None = None) -> str:
    """What the others are compared with: `name` if it is given, else the model's own routing, else the widest
    static Top-K, else the first configuration. Raises UserError for a name that is not in the table."""
    names = _order(frame["config_name"])
    if name is not None:
        return _choice("baseline", name, names)
    if own := own_routing(frame):
        return own
    widths = static_widths(with_todays_columns(frame))
    return max(widths, key=widths.__getitem__) if widths else names[0]


def check_hypotheses(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each expectation of the earlier attempt beside what was measured; `held` is None where nothing was."""
    rows = []
    for names, quantity, low, high in HYPOTHESES:
        for name in names:
            tests = analysis["statistical_tests"].get(name, {})
            experts, clock = tests.get("avg_experts_per_token", {}), tests.get("inference_time_sec", {})
            ratio, effect = clock.get("median_ratio"), experts.get("cohens_d")
            value = {
                "slowdown_percent": None if ratio is None else 100 * (ratio - 1),
                "experts_p_value": experts.get("p_value"),
                "experts_abs_d": None if effect is None else abs(effect),
            }.get(quantity, analysis["summary_by_config"].get(name, {}).get(quantity, {}).get("mean"))
            held = None if value is None else bool(low <= value <= high)
            row = {"configuration": name, "quantity": quantity, "low": low, "high": high}
            rows.append(row | {"measured": value, "held": held})
    return rows


QUALITY_MARGIN = math.log(1.01)  # nats per token: 1 % of perplexity, what counts as "no loss" in the TOST
SCORES = ["reference_nll", "reference_tokens", "reference_avg_experts"]  # an item lacking one is left out


def scored_items(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Configuration -> its finished rows with a finite score, indexed by prompt_id. Raises UserError where an
    item occurs twice."""
    done = frame[frame["status"] == "ok"].astype(dict.fromkeys(SCORES, float))
    done = done[(abs(done[SCORES].to_numpy()) < math.inf).all(axis=1)]
    tables = {name: rows.set_index("prompt_id") for name, rows in done.groupby("config_name", sort=False)}
    for name, rows in tables.items():
        if not rows.index.is_unique:
            twice = rows.index[rows.index.duplicated()][0]
            raise UserError(f"configuration {name!r} has prompt_id {twice!r} twice")
    return tables


def _token_mean(rows: pd.DataFrame, column: str) -> float | None:
    """Mean over tokens of a column that holds means over each item's tokens."""
    if column not in rows or rows.empty or rows[column].isna().any():
        return None
    values, tokens = rows[column].to_numpy(float), rows["reference_tokens"].to_numpy()
    return float((values * tokens).sum() / tokens.sum())


def with_static_curve(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` and a row for each static score that the baseline's rows carry in `static_nll`.

    The points are called topk_K, or, where a configuration has that name already, by one it cannot have. A
    width that a configuration has is left out.
    """
    names, widths = set(frame["config_name"]), set(static_widths(frame).values())
    points, empty = {}, {"static_nll": "", "kl_to_baseline": None, "top1_agreement": None}
    for row in frame[frame["static_nll"].fillna("") != ""].to_dict("records"):
        for k, nll in json.loads(row["static_nll"]).items():
            if int(k) not in widths:
                name = f"topk_{k}" if f"topk_{k}" not in names else f"topk_{k} (static)"
                score = {"k": float(k), "reference_nll": nll, "reference_avg_experts": float(k)}
                # The model's own routing may be there under two names, each with the curve.
                points[k, row["prompt_id"]] = row | empty | score | {"config_name": name}
    rows = list(points.values())
    added = pd.DataFrame(rows, columns=frame.columns).astype(frame.dtypes)
    return pd.concat([frame, added], ignore_index=True) if rows else frame


def static_at(
    curve: Mapping[int, pd.DataFrame], mean_experts: float
) -> tuple[pd.Series, tuple[int, int, float]] | tuple[None, str]:
    """NLL per item of static Top-K at `mean_experts`, and the mixture (k_low, k_high, share) that gives it.

    curve: k -> the scored items of static Top-k. A share of the tokens gets k_high experts, the others k_low,
    the two static neighbours by the mean they achieved; NLL and compute are then both linear in the share.
    Items both neighbours have are returned. Never extrapolates, nor across a gap: without k and k + 1 around
    it the answer is None and a reason. (The curve is convex, so a mixture across a gap would flatter what it
    is compared with.)
    """
    points = sorted((_token_mean(rows, "reference_avg_experts"), k) for k, rows in curve.items() if len(rows))
    if not points:
        return None, "no static Top-K configuration was run"
    below = [point for point in points if point[0] <= mean_experts + 1e-9]
    above = [point for point in points if point[0] >= mean_experts - 1e-9]
    if not below or not above:
        first, last = points[0][0], points[-1][0]
        span = f"{first:.2f} to {last:.2f}" if len(points) > 1 else f"{first:.2f} only"
        return None, f"{mean_experts:.2f} experts, but static Top-K was measured at {span}"
    (x_low, low), (x_high, high) = below[-1], above[0]
    if high - low > 1:
        gap = f"between Top-{low} and Top-{high} nothing was measured"
        return None, f"{mean_experts:.2f} experts, but {gap}"
    share = 0.0 if low == high else (mean_experts - x_low) / (x_high - x_low)
    nll = (1 - share) * curve[low]["reference_nll"] + share * curve[high]["reference_nll"]
    return nll.dropna(), (low, high, share)


def quality_verdicts(frame: pd.DataFrame, baseline: str, margin: float = QUALITY_MARGIN) -> dict[str, Any]:
    """Does a configuration predict the text better than static Top-K that spends the same experts?

    delta_nll is its NLL minus that of the static mixture with its own mean experts, a mean over the items
    which it, the baseline and both static neighbours have, paired by prompt_id; all its other numbers are
    over the same items. The share of the mixture is itself estimated from these items, so tests and interval
    get its first-order term (delta method): slope x (item's experts - mean), whose mean is zero. Without it
    a rule whose experts vary by item is found different from its equal far too often, or hardly ever.
    "better" or "worse": p, BH-adjusted over all configurations, is below SIGNIFICANCE_LEVEL; "equivalent"
    likewise.

    Returns configuration -> numbers; static ones have no equal-compute test.
    """
    frame = with_static_curve(frame)
    by_config, static, documents = scored_items(frame), static_widths(frame), item_documents(frame)
    curve: dict[int, pd.DataFrame] = {}
    for name, k in static.items():
        if name in by_config:
            curve.setdefault(k, by_config[name])

    def test_of(differences: pd.Series) -> dict[str, Any]:
        return paired_test(item_units(differences, documents), margin)

    def one(name: str) -> dict[str, Any]:
        own, tested = by_config.get(name, frame[:0].set_index("prompt_id")), name not in static
        common, mixture, reason = own.index, None, "static Top-K: it is the curve"
        common = common.intersection(by_config[baseline].index) if baseline in by_config else common[:0]
        while tested:  # leaving out items moves the mean, which may move the neighbours; the set only shrinks
            experts = _token_mean(own.loc[common], "reference_avg_experts")
            if experts is None:
                tested, reason = False, "no item was scored by it, the baseline and its static neighbours"
                break
            nll, mixture = static_at(curve, experts)
            if nll is None:
                tested, reason, mixture = False, mixture, None
            elif common.isin(nll.index).all():
                break
            else:
                common = common[common.isin(nll.index)]
        own = own.loc[common]
        nlls, tokens = own["reference_nll"], own["reference_tokens"]
        to_baseline = test_of(nlls - by_config[baseline]["reference_nll"][common] if len(common) else nlls)
        test = dict.fromkeys(to_baseline)
        if tested:
            low, high = (curve[k].loc[common] for k in mixture[:2])
            step = _token_mean(high, "reference_avg_experts") - _token_mean(low, "reference_avg_experts")
            slope = (high["reference_nll"] - low["reference_nll"]).mean() / step if step else 0.0
            extra = (own["reference_avg_experts"] - experts) * tokens / tokens.mean()
            test = test_of(nlls - nll[common] - slope * extra)
            reason = test["reason"]
        names = ("ci95_low", "ci95_high", "p_value", "cohens_d", "smallest_detectable")
        mean_nll = _token_mean(own, "reference_nll")
        return {
            "mean_experts": _token_mean(own, "reference_avg_experts"),
            "delta_nll": test["mean_difference"],
            **{key: test[key] for key in names},
            "static_mixture": mixture,
            "delta_to_baseline": to_baseline["mean_difference"],
            **{f"delta_to_baseline_{key}": to_baseline[key] for key in ("ci95_low", "ci95_high")},
            "equivalence_p_value": to_baseline["equivalence_p_value"],
            "n_items": len(common),
            "n_units": to_baseline["n_units"],
            "n_left_out": len(documents) - len(common),
            "perplexity": None if mean_nll is None else math.exp(mean_nll),
            **{key: _token_mean(own, key) for key in ("kl_to_baseline", "top1_agreement")},
            "reason": reason,
        }

    verdict = {name: one(name) for name in _order(frame["config_name"])}
    adjust_p_values(list(verdict.values()))
    adjust_p_values(list(verdict.values()), "equivalence_p_value", "equivalent_to_baseline")
    for name, row in verdict.items():
        word = "undecided"
        if row.pop("significant"):
            word = "better" if row["delta_nll"] < 0 else "worse"
        row["verdict"] = None if name in static else word
    return verdict


def is_static(row: Row) -> bool:
    """Whether a row of `quality_verdicts` is plain Top-K: part of the static curve, not compared with it."""
    return row["verdict"] is None


def shuffle_effects(frame: pd.DataFrame) -> dict[str, Any]:
    """Each shuffled configuration against the same one unshuffled, if both ran: NLL difference per item.

    Both keep the same numbers of experts; what differs is which token gets them. Each is a `paired_test` over
    documents with `unshuffled`, BH-adjusted over all of them.
    """
    by_config, documents, effects = scored_items(frame), item_documents(frame), {}
    first = frame.drop_duplicates("config_name").set_index("config_name")
    settings = first[list(CONFIG_FIELDS)].drop(columns="shuffle").astype(str).apply(tuple, axis=1)
    shuffled = first["shuffle"].astype(str) == "True"
    for name in first.index[shuffled]:
        for twin in first.index[~shuffled & (settings == settings[name])]:
            if name in by_config and twin in by_config:
                difference = by_config[name]["reference_nll"] - by_config[twin]["reference_nll"]
                units = item_units(difference.dropna(), documents)
                effects[name] = {"unshuffled": twin} | paired_test(units)
    adjust_p_values(list(effects.values()))
    return effects


def compare_tasks(frame: pd.DataFrame, baseline: str, output_dir: Path) -> list[dict[str, Any]]:
    """Tasks x configurations: what lm-evaluation-harness reports, and paired tests over the documents.

    A dict each with task, configuration, metric, what `paired_comparison` with the baseline gives for the
    documents' scores, BH-adjusted over all of them, experts (mean per token and layer) and `harness`: metric
    -> value and standard error. Tasks are tested one by one: their scores differ in meaning and direction. A
    group of tasks has what the harness reports only. Empty where no task was run.
    """
    rows = frame[frame["task_metric"].fillna("") != ""]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    scores = {
        key: own.set_index("prompt_id")
        for key, own in rows.groupby(["prompt_category", "config_name"], sort=False)
    }
    for (task, name), own in scores.items():
        entry = {"metric": own["task_metric"].iloc[0], "experts": own["avg_experts_per_token"].mean()}
        if name == baseline:
            entry |= {"n_documents": len(own), "mean": own["task_score"].mean()}
        else:
            base = scores.get((task, baseline), own[:0])["task_score"]
            entry |= paired_comparison(base, own["task_score"])
        found[task, name] = entry
    adjust_p_values([entry for entry in found.values() if "p_value" in entry])
    report = _read_json(output_dir / TASK_RESULTS, run_ids(frame)) if found else None
    for name, units in (report or {}).get("configurations", {}).items():
        for task, values in itertools.chain(*(unit.get("results", {}).items() for unit in units.values())):
            metrics = {
                key: {"value": value, "stderr": values.get(key.replace(",", "_stderr,", 1))}
                for key, value in values.items()
                if "," in key and "_stderr," not in key and isinstance(value, (int, float))
            }
            if metrics:
                found.setdefault((task, name), {})["harness"] = metrics
    order = _order(task for task, _ in found)
    keys = sorted(found, key=lambda key: order.index(key[0]))
    return [{"task": task, "configuration": name, **found[task, name]} for task, name in keys]


def read_layer_table(output_dir: Path, name: str, runs: set[str] | None = None) -> pd.DataFrame | None:
    """layer_statistics or expert_usage of a run, None where the folder has none that can be read, or one that
    is not of `runs`, see `_read_json`."""
    path = output_dir / f"{name}.csv"
    try:
        options = {"keep_default_na": False, "na_values": {"": ""}, "dtype": {"run_id": str}}
        frame = pd.read_csv(path, **_EXACT_FLOATS, **options)
    except (OSError, ValueError):
        return None
    if runs is not None and runs != run_ids(frame):
        return None
    numbers = [c for c in frame if c not in ("config_name", "router", "prompt_category", "run_id")]
    return frame.assign(**{c: pd.to_numeric(frame[c], errors="coerce") for c in numbers})


def summarize_layers(table: pd.DataFrame | None) -> dict[str, Any]:
    """Configuration -> which layers run most and fewest experts, and whether categories use different ones.

    category_p_values: one permutation test a layer, BH-adjusted over the layers of the configuration.
    """
    found = {}
    for name, rows in [] if table is None else table.groupby("config_name", sort=False):
        experts, p_values = rows["avg_experts_per_token"], rows["category_p_value"].dropna()
        found[name] = {
            "fewest_experts": experts.min(),
            "fewest_in_layer": int(rows["layer"][experts.idxmin()]),
            "most_experts": experts.max(),
            "most_in_layer": int(rows["layer"][experts.idxmax()]),
            **{key: rows[key].mean() for key in ("gate_mass_frac", "use_entropy_bits")},
            "category_divergence_bits": rows["category_divergence_bits"].mean() if len(p_values) else None,
            "category_p_values": list(stats.false_discovery_control(p_values)) if len(p_values) else None,
        }
    return found


def analyze_results(df: pd.DataFrame, output_dir: str | Path, baseline: str | None = None) -> dict[str, Any]:
    """Summaries and paired tests of a results table; also written to `analysis_summary.json`, strict JSON.

    df: rows of `run_full_experiment_suite` or `read_results`. Rows whose status is not "ok" are counted and
    left out. Pairs are formed by prompt_id, never by row order. baseline: the configuration that the others
    are compared with, see `choose_baseline`.

    Returns a dict with baseline, own_routing, n_experiments, n_failed, n_prompts, configurations,
    summary_by_config, summary_by_category, statistical_tests (configuration -> metric -> tests against the
    baseline), verdict (`quality_verdicts`), shuffle_effects, noise_floor (the model's own routing, its second
    run against its first), tasks (`compare_tasks`), null_diagnostics, layers (`summarize_layers`) and
    hypotheses. Raises UserError for a table that is none of this script's, for a baseline that is not in it,
    and when no row is left.
    """
    df, folder = with_todays_columns(df), Path(output_dir)
    done = df[df["status"] == "ok"]
    if done.empty:
        raise UserError(f"nothing to analyse: none of {len(df)} experiments finished")
    for name in _order(df["config_name"]):
        check_name(name)
    baseline, by_config = choose_baseline(done, baseline), dict(iter(done.groupby("config_name", sort=False)))
    own, documents = own_routing(done), item_documents(done)
    # Several samples of a prompt are one unit: their mean.
    columns = [*METRICS, *(f"repeat_{column}" for column in REPEATED)]
    items = {name: rows.groupby("prompt_id", sort=False)[columns].mean() for name, rows in by_config.items()}
    base, twice = items[baseline], items[own or baseline]
    tests = {
        name: {metric: paired_comparison(base[metric], rows[metric], documents) for metric in METRICS}
        for name, rows in items.items()
        if name != baseline
    }
    adjust_p_values([test for by_metric in tests.values() for test in by_metric.values()])
    analysis = {
        "baseline": baseline,
        "own_routing": own,
        "n_experiments": len(df),
        "n_failed": len(df) - len(done),
        "n_prompts": done["prompt_id"].nunique(),
        "configurations": {
            row["config_name"]: {field: row[field] for field in CONFIG_FIELDS}
            for row in done.drop_duplicates("config_name").to_dict("records")
        },
        "summary_by_config": {name: _describe(rows) for name, rows in by_config.items()},
        "summary_by_category": {
            word: {name: _describe(rows[rows["prompt_category"] == word]) for name, rows in by_config.items()}
            for word in _order(done["prompt_category"])
        },
        "statistical_tests": tests,
        "verdict": quality_verdicts(df, baseline),
        "shuffle_effects": shuffle_effects(df),
        "quality_margin": QUALITY_MARGIN,
        "noise_floor": {
            column: paired_comparison(twice[column], twice[f"repeat_{column}"], documents)
            for column in REPEATED
        },
        "tasks": compare_tasks(done, baseline, folder),
        "null_diagnostics": _read_json(folder / "null_diagnostics.json", run_ids(df)),
        "layers": summarize_layers(read_layer_table(folder, "layer_statistics", run_ids(df))),
    }
    analysis = strict_json(analysis | {"hypotheses": check_hypotheses(analysis)})
    write_json(folder / "analysis_summary.json", analysis)
    return analysis


# ---------------------------------------------------------------------------------------------------------
# 14. Figures
# ---------------------------------------------------------------------------------------------------------
#
# Each plot_* draws into given axes and returns them; saving is done in one place, `create_visualizations`.


LEGEND_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}


ROW_OF_NAMES = 80  # characters; longer names do not fit side by side below a plot: a row each instead
MAX_INCHES = 60  # of a figure's height, however many rows it has
MARKERS = "osD^v<>phdXP*"  # of the members of a family


def _axes(ax: Any, height: float = 4.2) -> Any:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(7, min(max(height, 4.2), MAX_INCHES)), layout="constrained")[1]


def _two_axes(axes: Any, height: float = 4.2) -> Any:
    return axes if axes is not None else plt.subplots(1, 2, figsize=(9, height), layout="constrained")[1]


def _in_rows(names: Sequence[str]) -> bool:
    """Whether names stand below each other because side by side they would overlap."""
    return len(names) * max(map(len, names), default=0) > ROW_OF_NAMES


def _legend_beside(ax: Any, entries: int, fontsize: str = "medium") -> None:
    """The legend right of `ax`, smaller where it has many entries."""
    style = {"fontsize": "x-small", "labelspacing": 0.25} if entries > 10 else {"fontsize": fontsize}
    sns.move_legend(ax, **LEGEND_BESIDE, title=None, **style)


FAMILY_FIELDS = ("method", "p_values", "max_k", "temperature", "renormalize", "shuffle")


def _families(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, list[str]]:
    """Label -> configurations that differ in their knob only; a label names what differs between families.

    Where `frame` does not say what a configuration is, each is a family.
    """
    rows = frame.drop_duplicates("config_name").set_index("config_name").loc[list(names)]
    if "method" not in rows:
        return {name: [name] for name in names}
    fields = [f for f in FAMILY_FIELDS if f in rows and (f == "method" or rows[f].nunique(dropna=False) > 1)]
    families: dict[str, list[str]] = {}
    for name, row in rows[fields].iterrows():
        row = row[row.notna() & ~row.astype(str).isin(["", "False"])]
        values = row.drop("shuffle", errors="ignore").items()
        words = [f"{f} {v:g}" if isinstance(v, (int, float)) else str(v) for f, v in values]
        families.setdefault(", ".join([*words, *["shuffled"] * ("shuffle" in row)]), []).append(name)
    return families


def _distinct_colors(number: int) -> list[Any]:
    return sns.color_palette("colorblind", number) if number <= 10 else sns.husl_palette(number)


def _palette(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Configuration -> colour: one for each family, its members from full to light in their order."""
    families, colors = _families(frame, names), {}
    for color, members in zip(_distinct_colors(len(families)), families.values(), strict=True):
        for name, white in zip(members, np.linspace(0, 0.6, len(members)), strict=True):
            colors[name] = tuple(channel + white * (1 - channel) for channel in color)
    return {name: colors[name] for name in names}


def _markers(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, str]:
    """Configuration -> marker: the members of a family have different ones."""
    families = _families(frame, names).values()
    return {name: mark for members in families for name, mark in zip(members, itertools.cycle(MARKERS))}


def _student_interval(values: Any) -> tuple[float, float]:
    """95 % interval of the mean of `values`; nothing to draw where there are fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def plot_bars(frame: pd.DataFrame, ax: Any = None, *, column: str, label: str, median: bool = False) -> Any:
    """One bar per configuration with its prompts as dots, so that a mean never hides its spread."""
    order = _order(frame["config_name"])
    rows = _in_rows(order)
    ax = _axes(ax, 1 + 0.24 * len(order) if rows else 4.2)
    x, y = (column, "config_name") if rows else ("config_name", column)
    common = {"data": frame, "x": x, "y": y, "order": order, "ax": ax}
    style = {"alpha": 0.75, "capsize": 0.15, "err_kws": {"linewidth": 1.2, "color": "0.2"}, "legend": False}
    spread = {"estimator": "median", "errorbar": ("pi", 50)} if median else {"errorbar": _student_interval}
    sns.barplot(**common, hue="config_name", palette=_palette(frame, order), **spread, **style)
    sns.stripplot(**common, color="0.25", size=3, alpha=0.4, jitter=False)
    note = "median and quartiles" if median else "mean and 95 % interval"
    quantity = METRICS[column][0][0].upper() + METRICS[column][0][1:]
    over = f"{note} over {frame['prompt_id'].nunique()} prompts"
    ax.set_title(f"{quantity}:\n{over}" if rows else f"{quantity}: {over}")
    if rows:
        ax.set(xlabel=label, ylabel="", xlim=(0, None))
    else:
        ax.set(xlabel="", ylabel=label, ylim=(0, None))
    return ax


def plot_experts_by_category(frame: pd.DataFrame, ax: Any = None) -> Any:
    """Distribution over prompts of mean experts, by prompt category and configuration."""
    order, categories = _order(frame["config_name"]), _order(frame["prompt_category"])
    boxes = len(order) * len(categories)
    if many := _in_rows(order):  # a row a configuration, a colour a category
        groups, hue, colors = "config_name", "prompt_category", _distinct_colors(len(categories))
        shown = {"order": order, "hue_order": categories, "palette": colors}
    else:
        groups, hue, colors = "prompt_category", "config_name", _palette(frame, order)
        shown = {"order": categories, "hue_order": order, "palette": colors}
    value, rows = "avg_experts_per_token", many or _in_rows(categories)
    ax = _axes(ax, 1 + 0.12 * boxes if rows else 4.2)
    x, y = (value, groups) if rows else (groups, value)
    sns.boxplot(frame, x=x, y=y, hue=hue, **shown, ax=ax, linewidth=0.9, fliersize=2.5, gap=0.15)
    ax.set(xlabel="", ylabel="", title="Experts by prompt category")
    (ax.set_xlabel if rows else ax.set_ylabel)("experts per token and layer")
    _legend_beside(ax, len(shown["hue_order"]))
    return ax


def plot_experts_vs_latency(frame: pd.DataFrame, ax: Any = None) -> Any:
    """Mean experts against decode time per token: a dot a prompt, a large mark a configuration's medians."""
    order = _order(frame["config_name"])
    ax = _axes(ax, 0.6 + 0.15 * len(order))
    data = frame.assign(latency=frame["decode_sec_per_token"] * 1000)
    medians = data.groupby("config_name", sort=False)[["avg_experts_per_token", "latency"]].median()
    common = {"x": "avg_experts_per_token", "y": "latency", "hue": "config_name", "hue_order": order}
    common |= {"palette": _palette(frame, order), "ax": ax}
    sns.scatterplot(data, **common, s=16, alpha=0.5, linewidth=0, legend=False)
    marks = {"style": "config_name", "style_order": order, "markers": _markers(frame, order)}
    large = {"s": 80, "edgecolor": "0.2", "linewidth": 0.7, "zorder": 4}
    sns.scatterplot(medians.reset_index(), **common, **marks, **large)
    ax.set(xlabel="experts per token and layer", ylabel="decode time, ms per token", ylim=(0, None))
    ax.set_title("Experts against latency (large: medians of a configuration)")
    _legend_beside(ax, len(order))
    return ax


VERDICT_COLORS = {"better": "#0173b2", "worse": "#d55e00", "undecided": "0.5"}


def _nats_scale(ax: Any, which: str, values: list[float]) -> None:
    """Linear within +-0.01 nats, logarithmic beyond: 0.4 and 0.004 nats can be read off one axis."""
    low, high = 1.3 * min(values), 1.3 * max(values)
    if max(-low, high) <= 0.05:
        ax.locator_params(which, nbins=6)
    else:
        getattr(ax, f"set_{which}scale")("symlog", linthresh=0.01)
        steps = (0.005, *(step * 10.0**power for power in range(-2, 2) for step in (1, 3)))
        ticks = [tick for tick in (*(-step for step in steps), 0.0, *steps) if low <= tick <= high]
        getattr(ax, f"{which}axis").set_ticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
        getattr(ax, f"{which}axis").set_ticks([], minor=True)


def plot_quality_vs_experts(
    frame: pd.DataFrame, ax: Any = None, verdicts: Any = None, baseline: str | None = None
) -> Any:
    """Difference to the baseline in NLL against mean experts: the static curve, and each rule's ladder.

    Differences are paired by item, so band and bars (95 %) hold what the comparison leaves uncertain, not
    how hard the items are. Between two static points the curve is their mixture.
    """
    baseline, (ax, mean) = choose_baseline(frame, baseline), (_axes(ax), "delta_to_baseline")
    found = verdicts or quality_verdicts(frame, baseline)
    rows = pd.DataFrame.from_dict(found, orient="index").dropna(subset=mean)
    low, high = (rows[f"{mean}_ci95_{side}"].astype(float).fillna(rows[mean]) for side in ("low", "high"))
    rows = rows.assign(low=low, high=high)  # no width where no item differs: the baseline itself
    is_curve = rows.index.map(lambda name: is_static(found[name])).astype(bool)
    static = rows[is_curve].sort_values("mean_experts")
    gray, style = {"color": "0.2", "linewidth": 1.4}, {"linewidth": 1.2, "elinewidth": 0.8, "markersize": 5}
    if len(static):
        x = np.union1d(np.linspace(*static["mean_experts"].iloc[[0, -1]], 400), static["mean_experts"])
        band = {key: np.interp(x, static["mean_experts"], static[key]) for key in ("low", mean, "high")}
        ax.fill_between(x, band["low"], band["high"], color="0.2", alpha=0.15, linewidth=0)
        ax.plot(x, band[mean], **gray)
        ax.plot(static["mean_experts"], static[mean], "o", color="0.2", markersize=5)
        ax.plot([], [], "o-", **gray, markersize=5, label="static Top-K")
    families = _families(frame, list(rows.index[~is_curve]))
    colors = _distinct_colors(len(families))
    for i, (label, members) in enumerate(families.items()):
        ladder = rows.loc[members].sort_values("mean_experts")
        bars = np.maximum([ladder[mean] - ladder["low"], ladder["high"] - ladder[mean]], 0)
        mark = {"color": colors[i], "marker": MARKERS[1:][i % 12], "markeredgecolor": "white"}
        mark |= {"markeredgewidth": 0.5, "label": label}
        ax.errorbar(ladder["mean_experts"], ladder[mean], yerr=bars, **mark, **style)
    if len(ax.figure.axes) == 1:  # the figure is this plot's own
        ax.figure.set_figwidth(8.5)  # room for the legend
    if len(rows):
        _nats_scale(ax, "y", [*low, *high])
        ax.legend(**LEGEND_BESIDE, fontsize="small")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="experts per token and layer", ylabel=f"NLL minus {baseline}'s, nats per token")
    ax.set_title("Quality against compute (lower is better)" if len(rows) else "No configuration was scored")
    return ax


def plot_delta_at_equal_compute(frame: pd.DataFrame, ax: Any = None, verdicts: Any = None) -> Any:
    """One row per adaptive configuration: NLL minus that of static Top-K with the same mean experts, 95 %."""
    found = verdicts or quality_verdicts(frame, choose_baseline(frame))
    ax, spans = _axes(ax), [0.0]
    rows = {name: row for name, row in found.items() if not is_static(row)}
    if len(ax.figure.axes) == 1:
        ax.figure.set_figheight(1.7 + 0.26 * max(len(rows), 4))
    side = {"va": "center", "transform": ax.get_yaxis_transform()}
    for y, row in enumerate(rows.values()):
        ax.text(1.02, y, "–" if row["mean_experts"] is None else f"{row['mean_experts']:.2f}", **side)
        color, delta = VERDICT_COLORS[row["verdict"]], row["delta_nll"]
        if delta is None:
            ax.text(0.98, y, "not comparable", ha="right", color="0.5", **side)
            continue
        ends = [delta if row[key] is None else row[key] for key in ("ci95_low", "ci95_high")]
        ax.plot(ends, [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
        ax.plot(delta, y, "o", color=color, markersize=5, markerfacecolor="white" if row["reason"] else color)
        spans += ends
    _nats_scale(ax, "x", spans)
    ax.axvline(0, color="0.2", linewidth=1)
    for verdict, color in VERDICT_COLORS.items():
        ax.plot([], [], "o-", color=color, linewidth=1.8, markersize=5, label=verdict)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="NLL minus static Top-K at equal experts, nats per token")
    ax.set_title("Against static Top-K at equal compute (left is better)", pad=22)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, borderaxespad=0.1)
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate("experts", (1.02, 1), (0, 4), **place, color="0.4")
    return ax


def plot_null_calibration(diagnostics: Mapping[str, Any], axes: Any = None) -> Any:
    """Are the nulls right? Left: share of held-out null pairs with p <= level, a line a layer; on the
    diagonal a p-value is exact, above it too small. Right: realised false-discovery proportion of BH against
    alpha.
    """
    left, right = _two_axes(axes)
    levels, colors = diagnostics["levels"], iter(sns.color_palette("colorblind"))
    for name, null in diagnostics["nulls"].items():
        color, curve = next(colors), pd.DataFrame(null["alphas"])
        for index, shares in enumerate(null["layers"]):
            left.plot(levels, shares, color=color, linewidth=0.9, alpha=0.7, label=None if index else name)
        right.plot(curve["alpha"], curve["realised_fdp"], "o-", color=color, markersize=4, label=name)
    for ax, first, last, label in ((left, levels[0], 1, "exact"), (right, 0.001, 0.5, "alpha")):
        ax.plot([first, last], [first, last], color="0.2", linestyle=":", label=label)
        ax.set(xscale="log", yscale="log")
        ax.legend(frameon=False)
    left.set(xlabel="p-value level", ylabel="share of null pairs at or below", ylim=(levels[0] / 2, 1.5))
    left.set_title("Uniformity on held-out text, by layer")
    right.set(xlabel="alpha", ylabel="realised proportion", ylim=(3e-4, 1))
    right.set_title("False discoveries of BH, before floor and cap")
    return left, right


def plot_layer_profile(table: pd.DataFrame, axes: Any = None) -> Any:
    """Layer by layer: mean experts, and the share of the gate mass that the experts which ran have.

    table: layer_statistics; with the columns of CONFIG_FIELDS beside them, families share a colour.
    """
    order = _order(table["config_name"])
    axes = _two_axes(axes, max(4.2, 0.6 + 0.15 * len(order)))
    common = {"x": "layer", "hue": "config_name", "hue_order": order, "palette": _palette(table, order)}
    common |= {"style": "config_name", "style_order": order, "markers": _markers(table, order)}
    for ax, column, label, title in (
        (axes[0], "avg_experts_per_token", "experts per token", "Experts by layer"),
        (axes[1], "gate_mass_frac", "share of gate mass that ran", "Gate mass by layer"),
    ):
        sns.lineplot(table, y=column, ax=ax, **common, dashes=False, markersize=5, linewidth=1.2)
        ax.set(xlabel="MoE layer", ylabel=label, ylim=(0, None), title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend_.remove()
    _legend_beside(axes[1], len(order), "small")
    return axes


def plot_task_scores(frame: pd.DataFrame, axes: Any = None) -> Any:
    """Mean score of each task by configuration, one panel for each kind of score."""
    frame = frame[frame["task_score"].notna()]
    metrics, order = _order(frame["task_metric"]), _order(frame["config_name"])
    tasks = _order(frame["prompt_category"])
    if many := _in_rows(order):  # a row a configuration, a colour a task
        groups, hue, colors = "config_name", "prompt_category", _distinct_colors(len(tasks))
        shown = {"hue_order": tasks, "palette": dict(zip(tasks, colors, strict=True))}
    else:
        groups, hue = "prompt_category", "config_name"
        shown = {"hue_order": order, "palette": _palette(frame, order)}
    if axes is None:
        height = min(1 + 0.14 * len(order) * (len(tasks) + 1), MAX_INCHES) if many else 4.2
        style = {"squeeze": False, "layout": "constrained", "figsize": (2 + 3.2 * len(metrics), height)}
        axes = plt.subplots(1, len(metrics), sharey=many, **style)[1][0]
    x, y = ("task_score", groups) if many else (groups, "task_score")
    style = {"alpha": 0.75, "errorbar": _student_interval, "capsize": 0.1}
    style["err_kws"] = {"linewidth": 1.0, "color": "0.2"}
    for ax, metric in zip(axes, metrics, strict=True):
        part = frame[frame["task_metric"] == metric]
        sns.barplot(part, x=x, y=y, hue=hue, **shown, **style, ax=ax, order=order if many else None)
        ax.set(xlabel="", ylabel="")
        (ax.set_xlabel if many else ax.set_ylabel)(f"{metric},\nmean and 95 % interval")
        ax.tick_params(axis="x", rotation=0 if many else 20)
        if ax is not axes[-1]:
            ax.legend_.remove()
    _legend_beside(axes[-1], len(shown["hue_order"]))
    return axes


HEATMAP_CONFIGS = 5  # the baseline and the next ones; more would be too small to read


def plot_expert_usage_heatmap(usage: pd.DataFrame, figure: Any = None, baseline: str | None = None) -> Any:
    """How often each expert of each layer ran, relative to even use, for the baseline, where one is given,
    and the first other configurations."""
    names = sorted(_order(usage["config_name"]), key=lambda name: name != baseline)[:HEATMAP_CONFIGS]
    counts = usage.groupby(["config_name", "layer", "expert"], sort=False)["count"].sum().unstack()
    relative = counts.div(counts.mean(axis=1), axis=0)
    figure = figure or plt.figure(layout="constrained")
    layers = counts.index.get_level_values("layer").nunique()
    figure.set_size_inches(9, 1 + len(names) * (0.55 + 0.16 * layers))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    limit = max(2.0, float(relative.loc[names].stack().quantile(0.99)))
    style = {"cmap": sns.color_palette("rocket_r", as_cmap=True), "vmin": 0, "vmax": limit}
    for ax, name in zip(axes, names, strict=True):
        image = ax.imshow(relative.loc[name], aspect="auto", interpolation="nearest", **style)
        ax.set_title(name, loc="left", fontsize="medium")
        ax.set_ylabel("layer")
        ax.grid(visible=False)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("expert")
    figure.colorbar(image, ax=list(axes), label="use relative to even use", extend="max", shrink=0.9)
    return axes


# File name -> how it is drawn, what it shows, and what it is drawn from: a column of the results (the plot is
# empty without it), or one of the other tables in the folder.
PLOTS: dict[str, tuple[Callable, str, str]] = {
    "avg_experts_comparison": (
        functools.partial(plot_bars, column="avg_experts_per_token", label="experts per token and layer"),
        *("Experts per token and layer", "avg_experts_per_token"),
    ),
    "inference_time_comparison": (
        functools.partial(plot_bars, column="inference_time_sec", label="seconds per prompt", median=True),
        *("Inference time", "inference_time_sec"),
    ),
    "expert_utilization_cv": (
        functools.partial(plot_bars, column="expert_utilization_cv", label="CV of use, mean of layers"),
        *("Balance of expert use", "expert_utilization_cv"),
    ),
    "experts_by_category": (plot_experts_by_category, "Experts by category", "avg_experts_per_token"),
    "experts_vs_latency": (plot_experts_vs_latency, "Experts against latency", "decode_sec_per_token"),
    "quality_vs_experts": (plot_quality_vs_experts, "Quality against compute", "reference_nll"),
    "delta_at_equal_compute": (plot_delta_at_equal_compute, "Quality at equal compute", "reference_nll"),
    "task_scores": (plot_task_scores, "Downstream tasks", "task_score"),
    "layer_profile": (plot_layer_profile, "Layer by layer", "layer_statistics"),
    "expert_usage_heatmap": (plot_expert_usage_heatmap, "Use of every expert", "expert_usage"),
    "null_calibration": (plot_null_calibration, "Calibration of the nulls", "null_diagnostics"),
}


class Plots(NamedTuple):
    paths: list[Path]  # what was drawn
    failed: dict[str, str]  # plot -> why it could not be drawn


def draw_plots(
    df: pd.DataFrame,
    output_dir: str | Path,
    analysis: Mapping[str, Any] | None = None,
    baseline: str | None = None,
) -> Plots:
    """`create_visualizations`, which also says what could not be drawn: one plot must not lose the report."""
    df, output_dir, plots = with_todays_columns(df), Path(output_dir), Plots([], {})
    done = df[df["status"] == "ok"]
    if done.empty:
        raise UserError(f"nothing to draw: none of {len(df)} experiments finished")
    if analysis is None:
        baseline = choose_baseline(done, baseline)
        verdicts = quality_verdicts(df, baseline)
    else:
        baseline, verdicts = analysis["baseline"], analysis["verdict"]
    for column in ("prompt_category", "task_metric"):  # somebody's words: their dollar signs are no formula
        words = done[column].astype(str).map(_visible).str.replace("$", r"\$", regex=False)
        done = done.assign(**{column: words})
    runs = run_ids(df)
    about = done.drop_duplicates("config_name")[["config_name", *CONFIG_FIELDS]]
    tables: dict[str, Any] = {"null_diagnostics": _read_json(output_dir / "null_diagnostics.json", runs)}
    for name in ("layer_statistics", "expert_usage"):
        table = read_layer_table(output_dir, name, runs)
        tables[name] = None if table is None else table.merge(about, on="config_name", how="left")
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        for name, (draw, _, needed) in PLOTS.items():
            path = output_dir / "plots" / f"{name}.png"
            path.unlink(missing_ok=True)  # no plot of an earlier run beside the report of this one
            if needed in tables:
                missing, arguments = tables[needed] is None, (tables[needed],)
            else:
                missing, arguments = not done[needed].notna().any(), (done,)
            if missing:
                continue
            more = {"baseline": baseline, "verdicts": verdicts}
            more = {key: value for key, value in more.items() if key in inspect.signature(draw).parameters}
            others = plt.get_fignums()  # of a notebook, say
            try:
                draw(*arguments, **more)
                figure = plt.gcf()
                sns.despine(figure, left=True)
                with replacing(path) as part:
                    # No creation date or version in the file: the same results give the same bytes.
                    figure.savefig(part, format="png", dpi=300, metadata={"Software": None})
                plots.paths.append(path)
            except OSError:  # a full disk, say: the report would not fit either
                raise
            except Exception as error:
                plots.failed[name] = f"{type(error).__name__}: {_first_line(error)}"
                logger.error(f"plot {name} could not be drawn and is left out: {plots.failed[name]}")
                logger.debug("where it failed", exc_info=True)
            finally:
                for number in set(plt.get_fignums()) - set(others):
                    plt.close(number)
    return plots


def create_visualizations(
    df: pd.DataFrame,
    output_dir: str | Path,
    analysis: Mapping[str, Any] | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Draw every plot in PLOTS that has data into `output_dir`/plots, PNG at 300 DPI; returns the paths.

    analysis: what `analyze_results` returned, to save doing its statistics again; its baseline is taken.
    baseline: without `analysis`, see `choose_baseline`. A plot that cannot be drawn is left out, and named in
    the log.
    """
    return draw_plots(df, output_dir, analysis, baseline).paths


# ---------------------------------------------------------------------------------------------------------
# 15. Report
# ---------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    """Text of a run in Markdown: no character of it can end a cell, a row or a table, or act as HTML."""
    text = _visible(" ".join(str(value).split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + mark if mark in "\\`*_{}[]|#!" else mark for mark in text)


def _show(row: Mapping[str, Any], key: str, form: str = "") -> str:
    """An entry of `row` as a cell: "–" where there is none.

    form: a format of Python's for numbers; "a to b" for the interval of KEY_low and KEY_high; "p" for a
    p-value, "code" for a name, "s" for words of this script; empty for the text of a run, made harmless, and
    for numbers as they come.
    """
    if " to " in form:
        ends = [_show(row, f"{key}_{end}", form.split(" to ")[0]) for end in ("low", "high")]
        return " to ".join(ends) if "–" not in ends else "–"
    value = row.get(key)
    if value is None or value == "" or pd.isna(value):
        return "–"
    if form == "p":
        return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not form:
        return f"{value:g}" if isinstance(value, float) else _cell(value)
    return f"`{value}`" if form == "code" else format(value, form)


def _table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table of title -> (key, form) as `_show` takes them; first column left, others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[_show(row, *column) for column in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _significance(test: Mapping[str, Any]) -> bool | str | None:
    """Whether a test is significant; without an answer the reason, if there is one."""
    found = test.get("significant")
    return test.get("reason") if found is None else found


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _verdict_sentence(analysis: Mapping[str, Any]) -> str:
    """The answer in one sentence; it claims nothing whose adjusted p-value is not below the level."""
    compared = {n: row for n, row in analysis["verdict"].items() if row["delta_nll"] is not None}
    if not compared:
        reasons = [row["reason"] for row in analysis["verdict"].values() if not is_static(row)]
        reason = reasons[0] if reasons else "only static Top-K was run"
        return f"This run cannot compare quality at equal compute: {reason}."
    counts = {word: sum(row["verdict"] == word for row in compared.values()) for word in VERDICT_COLORS}
    found = [name for name in compared if compared[name]["verdict"] == "better"]
    best = min(found or compared, key=lambda name: compared[name]["delta_nll"])
    row = compared[best]
    kind = "largest gain" if found else "lowest estimate, which is no evidence of a gain,"
    documents = f" of {row['n_units']} documents" if row["n_units"] != row["n_items"] else ""
    return (
        f"**Against static Top-K that spends the same number of experts, {counts['better']} of "
        f"{len(compared)} configurations predict the text better, {counts['worse']} worse, "
        f"{counts['undecided']} undecided; the {kind} is `{best}`'s, {row['delta_nll']:+.4f} nats per "
        f"token (95 % interval {_show(row, 'ci95', '+.4f to +.4f')}, adjusted p "
        f"{_show(row, 'p_value_adjusted', 'p')}, {row['n_items']} items{documents}) at "
        f"{row['mean_experts']:.2f} experts.**"
    )


QUALITY_TABLE = {
    "configuration": ("configuration", "code"), "experts": ("mean_experts", ".2f"),
    "NLL at equal compute": ("delta_nll", "+.4f"), "95 % interval": ("ci95", "+.4f to +.4f"),
    "p adjusted": ("p_value_adjusted", "p"), "detectable": ("smallest_detectable", ".4f"),
    "verdict": ("verdict", "s"), "NLL to baseline": ("delta_to_baseline", "+.4f"),
    "95 % interval to baseline": ("delta_to_baseline_ci95", "+.4f to +.4f"),
    "equivalent": ("equivalent_to_baseline", "s"), "perplexity": ("perplexity", ".2f"),
    "KL": ("kl_to_baseline", ".4f"), "top-1 agreement": ("top1_agreement", ".3f"), "items": ("items", "s"),
}  # fmt: skip
NULL_TABLE = {
    "null": ("null", "s"), "alpha": ("alpha", "g"), "rejections, mean": ("mean_rejections", ".2f"),
    "realised false-discovery proportion": ("realised_fdp", ".4f"),
    "no rejection": ("zero_rejection_frac", ".1%"),
}  # fmt: skip


def _noise_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What the model's own routing differs from itself by: what any other difference must exceed."""
    lines, (clock, nll) = [], (analysis["noise_floor"][column] for column in REPEATED)
    if clock["n_pairs"]:
        line = (
            f"Time: `{analysis['own_routing']}` run twice, {clock['median_ratio']:.3f} times itself (median)"
        )
        if clock["ci95_low"] is not None:
            line += f", mean difference {_show(clock, 'ci95', '+.4f to +.4f')} s (95 %)"
        lines.append(line + ".")
    if nll["n_pairs"]:
        lines.append(f"NLL: scored twice, mean difference {nll['mean_difference']:+.6f} nats per token.")
    return lines


def _shuffle_sentences(analysis: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, effect in analysis["shuffle_effects"].items():
        if effect["mean_difference"] is not None:
            word = "not shown to differ"
            if effect["significant"]:
                word = "worse" if effect["mean_difference"] > 0 else "better"
            interval = _show(effect, "ci95", "+.4f to +.4f")
            lines.append(
                f"`{name}`, the counts of `{effect['unshuffled']}` given to other tokens: {word}, "
                f"{_show(effect, 'mean_difference', '+.4f')} nats per token (95 % interval {interval}, "
                f"adjusted p {_show(effect, 'p_value_adjusted', 'p')})."
            )
    return lines


# Student's interval holds what it says for symmetric differences, however long their tails, and with enough
# units for skewed ones.
# Simulated with documents of 1 to 10 items, 95 % intervals hold the mean so often (the tests redo it):
#   units                       6     12     30     50    100
#   t with 3 degrees         .939   .945   .949   .952   .952
#   lognormal, sigma 0.5     .904   .917   .930   .935   .942    skewness 1.7
#   lognormal, sigma 1       .856   .867   .891   .902   .920    skewness 6.2; single items .824 to .917
# (Differences of NLL between configurations over 88 documents had skewnesses of at most 1.5.)
INTERVALS_HOLD_FROM = 50  # independent units: from here on 93 to 97 %, unless the skew is strong


def _few_units_sentence(tests: Iterable[Mapping[str, Any]]) -> str:
    """What to think of the intervals of a table when they are over few units; empty where they hold."""
    units = [test["n_units"] for test in tests if test.get("ci95_low") is not None]
    if not units or min(units) >= INTERVALS_HOLD_FROM:
        return ""
    return (
        f"Intervals over fewer than {INTERVALS_HOLD_FROM} independent units (here as few as {min(units)}) "
        "are too narrow when differences are skewed: in simulations they hold the mean in 90 to 93 % "
        "instead of 95 %, and in 82 to 90 % when a few units decide it."
    )


def _null_origin(diagnostics: Mapping[str, Any]) -> str:
    """Whether the nulls are judged on what they were made from; results of older scripts do not say."""
    shared = diagnostics.get("n_shared_tokens")
    if shared is None:
        return "of which it is not known whether they were used for calibration,"
    if shared == 0:
        return "not used for calibration,"
    return f"of which {shared} were used for calibration as well (there the nulls look better than they are),"


def _quality_parts(analysis: Mapping[str, Any]) -> list[str]:
    """The report's sections on quality and on the nulls, if any text was scored."""
    margin, diagnostics = math.expm1(analysis["quality_margin"]), analysis["null_diagnostics"]
    if all(row["mean_experts"] is None for row in analysis["verdict"].values()):
        return ["## Quality at equal compute", "No text was scored in this run."]
    rows = []
    for name, row in analysis["verdict"].items():
        items = f"{row['n_items']}" + (f" ({row['n_left_out']} left out)" if row["n_left_out"] else "")
        rows.append(row | {"configuration": name, "verdict": row["verdict"] or "static", "items": items})
    parts = [
        "## Quality at equal compute",
        "NLL in nats per token of the scored text (reference continuations, or the windows of `--text`), "
        "a mean over items. *At equal compute*: minus that of static Top-K mixed to the same mean number "
        "of experts on the same items. Intervals and p: Student's t on paired differences of documents, p "
        "BH-adjusted over the configurations; verdict: better or worse if and only if the adjusted p is "
        f"below {SIGNIFICANCE_LEVEL:g}. Detectable: the smallest effect found with 80 % power. Equivalent: "
        f"two one-sided t-tests against `{analysis['baseline']}` within {100 * margin:.0f} % of perplexity, "
        "adjusted likewise. KL: from the predictions of the model's own routing, nats.",
        _table(rows, QUALITY_TABLE),
        _few_units_sentence([*rows, *analysis["shuffle_effects"].values()]),
    ]
    if lines := _noise_sentences(analysis):
        parts += ["Noise floor, the model's own routing against itself:\n\n" + _bullets(lines)]
    if lines := _shuffle_sentences(analysis):
        parts += ["Does it matter which token gets many experts?\n\n" + _bullets(lines)]
    if diagnostics:
        nulls = diagnostics["nulls"].items()
        distances = (f"{name}: {', '.join(f'{value:.3f}' for value in null['ks'])}" for name, null in nulls)
        parts += [
            "## Calibration of the nulls",
            "An expert counts as *irrelevant* for a token when the model's own Top-K leaves it out. On "
            f"{diagnostics['n_tokens']} tokens of the scored text, {_null_origin(diagnostics)} the p-values "
            "of such pairs should be uniform, and BH at alpha should reject at most a share alpha of "
            "them. FDR bounds experts picked though irrelevant in this sense; it promises nothing about "
            "quality. Before floor and cap:",
            _table(({"null": name, **row} for name, null in nulls for row in null["alphas"]), NULL_TABLE),
            f"Kolmogorov-Smirnov distance from uniform, by layer: {'; '.join(distances)}.",
        ]
    return parts


TASK_TABLE = {
    "task": ("task", ""), "configuration": ("configuration", "code"),
    "harness's own numbers ± stderr": ("numbers", ""), "score": ("metric", ""),
    "documents": ("n_documents", "d"), "mean": ("mean", ".4f"), "difference": ("mean_difference", "+.4f"),
    "95 % interval": ("ci95", "+.4f to +.4f"), "p adjusted": ("p_value_adjusted", "p"),
    "d": ("cohens_d", ".2f"), "significant": ("significant", "s"), "experts": ("experts", ".2f"),
}  # fmt: skip


def _task_parts(analysis: Mapping[str, Any]) -> list[str]:
    """The report's section on downstream tasks, if any was run."""
    rows = []
    for entry in analysis["tasks"]:
        numbers = ", ".join(
            f"{key.removesuffix(',none')} {found['value']:.4f}"
            + (f" ± {found['stderr']:.4f}" if isinstance(found["stderr"], (int, float)) else "")
            for key, found in entry.get("harness", {}).items()
        )
        more = {"numbers": numbers or None, "significant": _significance(entry)}
        rows.append({"n_documents": entry.get("n_pairs"), **entry, **more})
    if not rows:
        return []
    return [
        "## Downstream tasks",
        _table(rows, TASK_TABLE),
        "The harness's own numbers are as lm-evaluation-harness reports them, also in `task_results.json`. "
        "Score: the first of them that is a mean over documents; for a perplexity, bits per byte (or word) "
        f"of a document, lower is better. Difference: to `{analysis['baseline']}`, paired by document; "
        "interval and p: Student's t, adjusted over all rows of this table; d: mean difference over its "
        f"standard deviation; significant: adjusted p below {SIGNIFICANCE_LEVEL:g}.",
        _few_units_sentence(analysis["tasks"]),
    ]


def _task_sentence(analysis: Mapping[str, Any]) -> str:
    tested = [entry for entry in analysis["tasks"] if entry.get("n_pairs")]
    names = [
        f"`{entry['configuration']}` on {_cell(entry['task'])} ({entry['mean_difference']:+.4f} "
        f"{_cell(entry['metric'])})"
        for entry in tested
        if entry["significant"]
    ]
    return (
        f"**Of {len(tested)} comparisons with `{analysis['baseline']}` on a task, paired by document, "
        f"{len(names)} differ significantly{': ' if names else ''}{', '.join(names)}.** A difference that "
        "was not found is not shown to be absent: see the intervals."
    )


LAYER_TABLE = {
    "configuration": ("configuration", "code"), "fewest experts (layer)": ("fewest", "s"),
    "most experts (layer)": ("most", "s"), "gate mass that ran": ("gate_mass_frac", ".3f"),
    "entropy of use, bits": ("use_entropy_bits", ".2f"),
    "categories diverge, bits": ("category_divergence_bits", ".3f"), "in layers": ("significant", "s"),
}  # fmt: skip


def _layer_parts(analysis: Mapping[str, Any]) -> list[str]:
    """The report's section on layers, if the run has their tables."""
    rows = []
    for name, found in analysis["layers"].items():
        both = ("fewest", "most")
        ends = {end: f"{found[f'{end}_experts']:.2f} ({found[f'{end}_in_layer']})" for end in both}
        if p_values := found["category_p_values"]:
            ends["significant"] = f"{sum(p < SIGNIFICANCE_LEVEL for p in p_values)} of {len(p_values)}"
        rows.append({"configuration": name, **found, **ends})
    if not rows:
        return []
    return [
        "## Layers",
        _table(rows, LAYER_TABLE),
        "Means over layers, from `layer_statistics.csv`; every expert is in `expert_usage.csv`. Categories "
        "diverge: Jensen-Shannon divergence of their use of experts (0: the same experts), and in how many "
        f"layers it is more than chance (permutation test, adjusted p below {SIGNIFICANCE_LEVEL:g}).",
    ]


def _baseline_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What differences are to, where that is not the model's own routing."""
    base, own = analysis["baseline"], analysis["own_routing"]
    if own is None:
        return [f"No row shows which configuration is the model's own Top-K; differences are to `{base}`."]
    return [] if own == base else [f"Differences are to `{base}`; the model's own routing is `{own}`."]


def _findings(analysis: Mapping[str, Any]) -> list[str]:
    """A sentence per configuration; a difference in time is claimed only where it is significant."""
    base, own = analysis["baseline"], analysis["own_routing"]
    lines = _baseline_sentences(analysis)
    again = analysis["noise_floor"]["inference_time_sec"]["median_ratio"]
    noise = "" if again is None else f"; `{own}` against itself {again:.2f}"
    for name, tests in analysis["statistical_tests"].items():
        experts, clock = tests["avg_experts_per_token"], tests["inference_time_sec"]
        if not experts["n_pairs"] or is_static(analysis["verdict"][name]):
            continue
        saved = 100 * (1 - experts["mean"] / experts["mean_baseline"])
        line = f"`{name}` ran {experts['mean']:.2f} experts per token and layer, {abs(saved):.0f} % "
        line += f"{'fewer' if saved >= 0 else 'more'} than `{base}`"
        if clock["median_ratio"] is not None:
            ratio = f"{clock['median_ratio']:.2f} times the baseline's"
            line += f"; its inference time was {ratio} (median{noise}), "
            word = "slower" if clock["mean_difference"] > 0 else "faster"
            sure = f"{word} with adjusted p {_show(clock, 'p_value_adjusted', 'p')}"
            line += sure if clock["significant"] else "which this run cannot tell from noise"
        lines.append(line + ".")
    return lines


def may_adapt(config: Mapping[str, Any]) -> bool:
    """Whether a configuration can give tokens different numbers of experts at all."""
    return config["method"] in METHODS and config["method"] != "topk" and config["min_k"] != config["max_k"]


def _conclusions(analysis: Mapping[str, Any]) -> list[str]:
    """What follows from the numbers, and what does not."""
    lines, base, verdict = [], analysis["baseline"], analysis["verdict"]
    clocks = {name: tests["inference_time_sec"] for name, tests in analysis["statistical_tests"].items()}
    for word, sign in (("Faster", -1), ("Slower", 1)):
        if found := [n for n, t in clocks.items() if t["significant"] and sign * t["mean_difference"] > 0]:
            lines.append(f"{word} than `{base}` on this machine: {_names(found)}.")
    if not lines and any(test["n_pairs"] for test in clocks.values()):
        lines.append(f"No configuration was significantly faster or slower than `{base}` on this machine.")
    for name, summary in analysis["summary_by_config"].items():
        spread, config = summary["avg_experts_per_token"], analysis["configurations"][name]
        if may_adapt(config) and spread["n"] > 1 and spread["min"] == spread["max"]:
            advice = f"choose another `{METHODS[config['method']][0]}`"
            if config["p_values"] == "softmax":
                advice = "with `p_values` = softmax that is certain (see `SoftmaxNull` in the script)"
            mean = f"{spread['mean']:.2f}"
            lines.append(f"`{name}` ran {mean} experts on every prompt: it does not adapt; {advice}.")
    held = [item["held"] for item in analysis["hypotheses"] if item["held"] is not None]
    if held:
        lines.append(f"{sum(held)} of {len(held)} measured expectations of the earlier attempt held.")
    for word in ("better", "worse"):
        if found := [name for name, row in verdict.items() if row["verdict"] == word]:
            lines.append(f"{word.capitalize()} than static Top-K at equal compute: {_names(found)}.")
    if found := [n for n, row in verdict.items() if not is_static(row) and row["equivalent_to_baseline"]]:
        margin = 100 * math.expm1(analysis["quality_margin"])
        lines.append(f"Within {margin:.0f} % of `{base}`'s perplexity (equivalence test): {_names(found)}.")
    if analysis["n_prompts"] < 30:
        lines.append(f"{analysis['n_prompts']} prompts show large effects only; small ones need more.")
    return lines


SUMMARY_TABLE = {
    "configuration": ("configuration", "code"), "experts, mean ± sd": ("experts", "s"),
    "range": ("range", ".0f to .0f"),
    "at floor": ("floor_frac", ".1%"), "at cap": ("cap_frac", ".1%"),
    "no rejection": ("zero_rejection_frac", ".1%"), "time, s": ("inference_time_sec", ".3f"),
    "decode, ms/token": ("decode_ms", ".2f"), "load CV": ("expert_utilization_cv", ".2f"),
    "max/min use": ("expert_utilization_max_min_ratio", ".1f"),
}  # fmt: skip
TEST_TABLE = {
    "configuration": ("configuration", "code"), "quantity": ("title", "s"), "pairs": ("n_pairs", "d"),
    "difference": ("difference", "s"), "95 % interval": ("interval", "s"),
    "ratio, median": ("median_ratio", ".2f"), "p": ("p_value", "p"), "p adjusted": ("p_value_adjusted", "p"),
    "d": ("cohens_d", ".2f"),
    "significant": ("significant", "s"),
}  # fmt: skip
EXPECTED_TABLE = {
    "configuration": ("configuration", "code"), "quantity": ("title", "s"), "expected": ("expected", "s"),
    "measured": ("measured", "s"), "held": ("held", "s"),
}  # fmt: skip


def _summary_row(name: str, summary: Mapping[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    experts, decode = summary["avg_experts_per_token"], summary["decode_sec_per_token"]["median"]
    means = {metric: values["mean"] for metric, values in summary.items()} | dict(rows[list(SHARES)].mean())
    return means | {
        "configuration": name,
        "experts": f"{_show(experts, 'mean', '.2f')} ± {_show(experts, 'std', '.2f')}",
        "range_low": rows["min_experts"].min(),
        "range_high": rows["max_experts"].max(),
        "inference_time_sec": summary["inference_time_sec"]["median"],
        "decode_ms": None if decode is None else 1000 * decode,
    }


def _test_row(name: str, metric: str, test: Mapping[str, Any]) -> dict[str, Any]:
    title, unit, digits = METRICS[metric]
    form = f".{digits + 1}f"
    return {
        **test,
        "configuration": name,
        "title": f"{title}, {unit}" if unit else title,
        "difference": _show(test, "mean_difference", form),
        "interval": _show(test, "ci95", f"{form} to {form}"),
        "significant": _significance(test),
    }


def _expected_row(item: Mapping[str, Any]) -> dict[str, Any]:
    low, high, word = item["low"], item["high"], item["held"]
    form = "p" if item["quantity"] == "experts_p_value" else ".2f"
    return {
        **item,
        "title": QUANTITIES[item["quantity"]],
        "expected": f"> {low:g}" if high is None else f"{low:g} to {high:g}" if low else f"< {high:g}",
        "measured": _show(item, "measured", form),
        "held": "not measured" if word is None else word,
    }


def generate_markdown_report(df: pd.DataFrame, analysis: Mapping[str, Any], output_path: str | Path) -> Path:
    """Write REPORT.md; every number in it comes from `df` or `analysis`. It links the plots beside it, and
    names those that `analysis` has in `failed_plots`."""
    df = with_todays_columns(df)
    done, failed, folder = df[df["status"] == "ok"], df[df["status"] != "ok"], Path(output_path).parent
    first, base, by_config = done.iloc[0], analysis["baseline"], analysis["summary_by_config"]
    minutes = done["inference_time_sec"].sum() / 60
    machine = f"{_show(first, 'dtype')} on {_show(first, 'device')}"
    documents, generated = item_documents(done).nunique(), done["inference_time_sec"].notna().any()
    amount = f"scored text of {documents} documents, nothing generated"
    if generated:
        tokens = _show(first, "max_new_tokens", ".0f")
        amount = f"{tokens} new tokens each, {minutes:.1f} minutes of inference"
    elif analysis["tasks"]:
        amount = f"{documents} documents of tasks"
    times = (f"{low} to {high} minutes on {where}" for where, (low, high) in EXPECTED_SUITE_MINUTES.items())
    summary = [_summary_row(n, found, done[done["config_name"] == n]) for n, found in by_config.items()]
    tests = [
        _test_row(name, metric, test)
        for name, by_metric in analysis["statistical_tests"].items()
        for metric, test in by_metric.items()
        if test["n_pairs"]
    ]
    categories = [
        {"category": category}
        | {name: found["avg_experts_per_token"]["mean"] for name, found in by_name.items()}
        for category, by_name in analysis["summary_by_category"].items()
    ]
    expected = [_expected_row(row) for row in analysis["hypotheses"] if row["configuration"] in by_config]
    failed_plots = analysis.get("failed_plots", {})
    drawn = [(n, title) for n, (_, title, _) in PLOTS.items() if (folder / "plots" / f"{n}.png").exists()]
    details = df.drop_duplicates("config_name").to_dict("records")
    settings = {
        column: ", ".join(_order(df[column].dropna().astype(str))) for column in (*SETTING_COLUMNS, "command")
    }
    undrawn = [f"`{name}` could not be drawn: {_cell(why)}" for name, why in failed_plots.items()]
    parts = [
        "# BH routing against Top-K: report",
        "## Executive summary",
        _task_sentence(analysis) if analysis["tasks"] else _verdict_sentence(analysis),
        f"{_cell(first['model_name'])}, {machine}: {df['config_name'].nunique()} configurations x "
        f"{df['prompt_id'].nunique()} items, {amount}. "
        f"{f'{len(failed)} experiments failed and are left out.' if len(failed) else ''}",
        _bullets(_findings(analysis)),
        *(_task_parts(analysis) or _quality_parts(analysis)),
        "## Summary by configuration",
        _table(summary, SUMMARY_TABLE),
        "Experts: mean and standard deviation over prompts of the mean over tokens and layers; range: "
        "fewest and most experts that any token got in any layer. At floor, at cap, no rejection: shares "
        "of all (token, layer) decisions. Times are medians over prompts.",
        *_layer_parts(analysis),
        "## Statistical tests",
        f"Each configuration against `{base}`, paired by prompt. Interval and p: Student's t on the "
        "differences of documents (a prompt is its own). Adjusted: Benjamini-Hochberg over all tests of this "
        "table. d: mean difference over its standard deviation. Significant: adjusted p below "
        f"{SIGNIFICANCE_LEVEL:g}. A difference in experts says that the rule did something, not that it did "
        "good.",
        _table(tests, TEST_TABLE)
        if tests
        else "Only one configuration was run: there is nothing to compare.",
        _few_units_sentence(tests),
        "## Performance by category",
        "Mean experts per token and layer.",
        _table(
            categories, {"category": ("category", "")} | {f"`{name}`": (name, ".2f") for name in by_config}
        ),
        "## Plots",
        _bullets(undrawn),
        *(f"### {title}\n\n![{title}](plots/{name}.png)" for name, title in drawn),
        "## What was expected, and what was measured",
        "An earlier attempt wrote these expectations down for OLMoE-1B-7B-0924 without measuring them. "
        f"Measured here on {_cell(first['model_name'])}.",
        _table(expected, EXPECTED_TABLE) if expected else "None of their configurations was in this run.",
        f"Suite time: {minutes:.1f} minutes of inference here, {machine}; expected for OLMoE-1B-7B: "
        f"{'; '.join(times)}."
        if generated
        else "",
        "## Conclusions and recommendations",
        _bullets(_conclusions(analysis)),
        "## Configuration details",
        _table(details, {"configuration": ("config_name", "code")} | {f: (f, "") for f in CONFIG_FIELDS}),
        _table(({"s": s, "v": v} for s, v in settings.items()), {"setting": ("s", ""), "value": ("v", "")}),
    ]
    if len(failed):
        columns = {name: (name, "") for name in ("config_name", "prompt_id", "error")}
        parts += ["## Failed experiments", _table(failed.to_dict("records"), columns)]
    write_whole(Path(output_path), "\n\n".join(part.strip() for part in parts if part) + "\n")
    return Path(output_path)


def write_report(df: pd.DataFrame, output_dir: str | Path, baseline: str | None = None) -> dict[str, Any]:
    """Analysis, plots and report of a results table, into `output_dir`; returns the analysis.

    baseline: see `choose_baseline`. The analysis also has `failed_plots`: plot -> why it could not be drawn.
    """
    analysis = analyze_results(df, output_dir, baseline)
    analysis["failed_plots"] = draw_plots(df, output_dir, analysis).failed
    generate_markdown_report(df, analysis, Path(output_dir) / "REPORT.md")
    return analysis


# ---------------------------------------------------------------------------------------------------------
# 16. Command line
# ---------------------------------------------------------------------------------------------------------


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_bh_experiments.py",
        description="Compare Benjamini-Hochberg expert routing with Top-K in a mixture-of-experts model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="folder or hub name of the model")
    add("--output", type=Path, default=Path(DEFAULT_OUTPUT), help="folder for results")
    add("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="new tokens per experiment")
    saving = "each finished experiment is written at once; so many are forced to the disk together"
    add("--checkpoint-interval", type=int, default=DEFAULT_CHECKPOINT_INTERVAL, metavar="N", help=saving)
    add("--no-resume", action="store_true", help="set earlier results aside, do not go on from them")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the model runs")
    add("--device-map", choices=("auto",), help="spread the model over all GPUs, the rest over memory, disk")
    add("--dtype", choices=DTYPES, default="auto", help="precision of weights and arithmetic")
    add("--no-fp16", action="store_true", help="the same as --dtype float32")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="execute Python code that comes with the model")
    sizes = "texts scored in one forward pass; auto halves it when memory does not suffice"
    add("--batch-size", type=_batch_size, default="auto", metavar="N", help=sizes)
    add("--suite", default="default", help=f"family of configurations: {', '.join(suites())}")
    add("--configs", help="comma-separated names: only these configurations")
    add("--routing-configs", type=Path, metavar="FILE", help="JSON file of your own configurations, by name")
    add("--match-experts", type=float, metavar="K", help="move every adaptive rule's knob to keep K experts")
    add("--prompts", type=Path, metavar="FILE", help="prompts of your own: .txt .jsonl .json .csv")
    add("--text", type=Path, nargs="+", metavar="PATH", help="score text files or folders; no generation")
    add("--window", type=int, default=DEFAULT_WINDOW, help="tokens in a window of --text")
    add("--dataset", metavar="NAME[:CONFIG]", help="prompts from a data set: a file, a folder, a hub name")
    add("--split", help="split of --dataset; train if not given, or the only one")
    add("--text-column", metavar="COLUMN", help="of --dataset; text if not given, or the only one of strings")
    add("--category-column", metavar="COLUMN", help="of --dataset; without it the data set is the category")
    add("--reference-column", metavar="COLUMN", help="of --dataset: a continuation of the text, to be scored")
    add("--limit", type=int, metavar="N", help=f"rows of --dataset to take; {DEFAULT_LIMIT} if not given")
    add("--random-rows", action="store_true", help="draw the rows of --dataset by --seed, not the first ones")
    add("--tasks", metavar="NAMES", help="comma-separated tasks of lm-evaluation-harness, instead of prompts")
    add("--num-fewshot", type=int, metavar="N", help="examples in the context of --tasks; else a task's own")
    add("--task-limit", type=float, metavar="N", help="documents of each of --tasks, or a share below 1")
    add("--include-path", type=Path, metavar="FOLDER", help="with task files of your own for --tasks")
    add("--baseline", metavar="NAME", help="the configuration that the others are compared with")
    add("--p-values", choices=P_VALUES, help="null for every step-up rule, instead of its own")
    add("--calibration-text", metavar="FILE", help="text for the empirical null, instead of the model's own")
    add("--do-sample", action="store_true", help="sample the texts instead of greedy decoding")
    add("--sampling-temperature", type=float, metavar="T", help="with --do-sample; 1 if not given")
    add("--sampling-top-p", type=float, metavar="P", help="with --do-sample; 1 if not given")
    add("--num-samples", type=int, metavar="N", help="with --do-sample: texts for each prompt; else 1")
    add("--seed", type=int, default=DEFAULT_SEED, help="for sampling texts and the calibration text")
    add("--retry-failed", action="store_true", help="run experiments again that failed in an earlier run")
    add("--fail-fast", action="store_true", help="stop at the first experiment that fails")
    add("--list-architectures", action="store_true", help="print which models can be patched, and end")
    add("--analyze-only", action="store_true", help="redo tables, plots and report from the CSV in --output")
    return parser


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, and which of them it gave: `given`, for those with a default too."""
    parser = build_parser()
    args = parser.parse_args(argv)
    nothing = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is set already gets no default
    seen = vars(parser.parse_args(argv, nothing))
    args.given = {name for name, value in seen.items() if value is not None}
    return args


def choose_configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configurations that --suite, --configs, --routing-configs and --p-values ask for.

    Raises UserError where --p-values, --match-experts or --baseline has none to work on.
    """
    families = suites()
    suite = families[_choice("--suite", args.suite, tuple(families))]
    own, what = {}, f"--routing-configs {args.routing_configs}"
    if args.routing_configs:
        text = _read_text(args.routing_configs, "--routing-configs")
        try:
            own = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what}: not valid JSON: {error}") from error
        if not isinstance(own, dict) or not all(isinstance(config, dict) for config in own.values()):
            raise UserError(f'{what}: it must hold {{"name": {{"method": ...}}}}')
    known = families["all"] | own
    names = [name.strip() for name in args.configs.split(",")] if args.configs else [*suite, *own]
    configs = {}
    for name in names:
        config = known[_choice("configuration in --configs", name, tuple(known))]
        null = {"p_values": args.p_values} if args.p_values and config.get("method") in STEP_UP else {}
        configs[name] = resolve_config(name, config | null)
    methods = {config["method"] for config in configs.values()}
    if args.p_values and methods.isdisjoint(STEP_UP):
        what = f"--p-values {args.p_values}: no chosen configuration takes a null"
        raise UserError(f"{what}; choose one with method {' or '.join(STEP_UP)}, see --suite and --configs")
    if args.match_experts is not None and methods <= {"topk"}:
        what = f"--match-experts {args.match_experts:g}: every chosen configuration is Top-K"
        raise UserError(f"{what}; choose one that adapts, see --suite and --configs")
    if args.baseline is not None:
        _choice("--baseline", args.baseline, tuple(configs))
    return configs


NEEDS = {  # option -> options that mean nothing without it
    "dataset": ("split", "text_column", "category_column", "reference_column", "limit", "random_rows"),
    "tasks": ("num_fewshot", "task_limit", "include_path"),
    "do_sample": ("sampling_temperature", "sampling_top_p", "num_samples"),
    "text": ("window",),
}
ALONE = {  # option that runs nothing -> the options that mean something beside it
    "analyze_only": ("output", "baseline"),
    "list_architectures": (),
}
LEAST = dict.fromkeys(("max_tokens", "checkpoint_interval", "window", "num_samples", "limit"), 1)
LEAST["num_fewshot"] = 0


def check_options(args: argparse.Namespace) -> None:
    """UserError for options that are out of range, mean nothing or contradict each other."""
    option = {name: name.replace("_", "-") for name in vars(args)}
    given = {name: value for name, value in vars(args).items() if name in args.given}
    for owner, allowed in ALONE.items():
        others = [option[name] for name in given if name not in (owner, *allowed)]
        if owner in given and others:
            raise UserError(f"--{others[0]} means nothing beside --{option[owner]}: leave one of them out")
    for name, value in given.items():
        if value == "":
            raise UserError(f"--{option[name]} is empty")
    for name, least in LEAST.items():
        if name in given:
            check_least(f"--{option[name]}", given[name], least)
    for owner, names in NEEDS.items():
        for name in names:
            if name in given and owner not in given:
                raise UserError(f"--{option[name]} needs --{option[owner]}")
    sources = [option[name] for name in ("prompts", "text", "dataset", "tasks") if name in given]
    if len(sources) > 1:
        raise UserError(
            f"--{sources[0]} and --{sources[1]} exclude each other: a run takes its items from one"
        )
    if args.tasks and args.do_sample:
        raise UserError("--tasks and --do-sample exclude each other: a task says itself how to generate")
    check_seed("--seed", args.seed)
    if args.device_map and args.device != "auto":
        raise UserError(f"--device {args.device} and --device-map exclude each other")
    if not 0 < given.get("sampling_temperature", 1) < math.inf:
        raise UserError(f"--sampling-temperature {args.sampling_temperature}: it must be above 0")
    if not 0 < given.get("sampling_top_p", 1) <= 1:
        raise UserError(f"--sampling-top-p {args.sampling_top_p}: it must be in (0, 1]")
    limit = given.get("task_limit", 1)
    if not (0 < limit < 1 or limit % 1 == 0 < limit):
        raise UserError(f"--task-limit {limit:g}: it must be a whole number, or a share below 1")


def choose_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts that the options ask for; those of --text need the tokenizer and come later."""
    if args.dataset:
        columns = (args.text_column, args.category_column, args.reference_column)
        seed = args.seed if args.random_rows else None
        return load_dataset_prompts(args.dataset, args.split, *columns, args.limit or DEFAULT_LIMIT, seed)
    return load_prompts(args.prompts) if args.prompts else TEST_PROMPTS


def measure(args: argparse.Namespace) -> pd.DataFrame | None:
    """Run the experiments that the options ask for; None in a process that leaves the report to the first."""
    configs, prompts = choose_configs(args), choose_prompts(args)
    sampling = {"temperature": args.sampling_temperature, "top_p": args.sampling_top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    names = "calibration_text seed dtype revision device_map trust_remote_code batch_size command"
    options = {name: getattr(args, name) for name in names.split()}
    options |= {"use_fp16": not args.no_fp16, "sampling": sampling if args.do_sample else None}
    runner = BHExperimentRunner(args.model, args.output, args.checkpoint_interval, args.device, **options)
    if args.text:
        if args.window > runner.context:
            raise UserError(f"--window {args.window}: this model's context is {runner.context}")
        prompts = text_windows(args.text, runner.tokenizer, args.window)
    if args.match_experts is not None:
        with log_to(args.output / "experiment_log.txt"):
            for name, config in configs.items():
                configs[name] = match_experts(name, config, args.match_experts, runner.calibration)
    how = {"resume": not args.no_resume, "retry_failed": args.retry_failed, "fail_fast": args.fail_fast}
    how["baseline"] = args.baseline
    if args.tasks:
        names, limit = [name.strip() for name in args.tasks.split(",")], args.task_limit
        limit = int(limit) if limit is not None and limit >= 1 else limit
        frame = runner.run_tasks(names, configs, args.num_fewshot, limit, args.include_path, **how)
    else:
        how["num_samples"] = args.num_samples or 1
        frame = runner.run_full_experiment_suite(configs, prompts, args.max_tokens, **how)
    return frame if runner.processes.rank == 0 else None


def run(args: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code: 0, or 1 when an experiment or a plot failed."""
    check_options(args)
    if args.list_architectures:
        titles = ("model type", "class", "status", "why")
        print(_table(list_architectures(), {title: (title, "s") for title in titles}), end="")
        return 0
    if args.analyze_only:
        frame = read_results(args.output / "bh_routing_results.csv")
        if args.baseline is not None:
            _choice("--baseline", args.baseline, tuple(frame["config_name"].unique()))
    else:
        frame = measure(args)
    if frame is None:
        return 0
    with log_to(args.output / "experiment_log.txt"):
        analysis = write_report(frame, args.output, baseline=args.baseline)
        logger.info(f"report: {args.output / 'REPORT.md'}")
    return 1 if (frame["status"] != "ok").any() or analysis["failed_plots"] else 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends before it kills."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 an experiment or a plot failed, 2 a mistake in the call, 130
    Ctrl-C, 143 SIGTERM."""
    args = parse_options(argv)
    args.command = shlex.join(["run_bh_experiments.py", *(sys.argv[1:] if argv is None else argv)])
    first = os.environ.get("RANK", "0") == "0"  # one of several processes speaks, but all may complain
    console, level = _ConsoleHandler(logging.INFO if first else logging.WARNING), logger.level
    console.setFormatter(_LineFormatter())
    before = None
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
        before = signal.signal(signal.SIGTERM, _terminate)
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    try:
        return run(args)
    except UserError as error:
        logger.error(f"error: {error}")
        return 2
    except OSError as error:  # a full disk, say
        logger.error(f"error: {error}; what is finished is saved: mend this, then run the same command again")
        return 2
    except KeyboardInterrupt as stop:
        logger.error("interrupted; all finished experiments are saved: the same command goes on from there")
        return 143 if isinstance(stop, _Terminated) else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        logger.removeHandler(console)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
