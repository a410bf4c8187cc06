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
#     "jinja2>=3.1.6",
#     "markdown-it-py>=3.0",
#     "pillow>=10.3",
#     "numpy>=1.26",
#     "safetensors>=0.8",
#     "filelock>=3.24",
#     "psutil>=5.9",
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
    python run_bh_experiments.py --suite frontier --text FOLDER    # score your text under many configurations
    python run_bh_experiments.py --tasks arc_easy,hellaswag        # tasks of lm-evaluation-harness
    python run_bh_experiments.py --dataset NAME --limit 50         # prompts from a data set
    python run_bh_experiments.py --analyze-only --output results   # tables, plots and report from the CSV
    python run_bh_experiments.py compare DIR DIR --output DIR      # folders of results side by side

    from run_bh_experiments import BHExperimentRunner, analyze_results
    runner = BHExperimentRunner("models/olmoe-mini", output_dir="results")
    frame = runner.run_full_experiment_suite(max_new_tokens=50)

Contents, in reading order
    1   Settings                   what can be varied
    2   Prompts and texts          what is fed in
    3   Nulls                      score -> p-value -> critical scores
    4   Rules                      how many of a token's ranked experts run
    5   Routers                    found in a model, and understood by what they do
    6   The seam                   routers patched, experts skipped, all recorded and restored
    7   Calibration                nulls, knobs and diagnostics from text
    8   Tables                     what a row holds
    9   Checkpoints                nothing finished is lost
    10  The machine                device, model, log, lock, processes
    11  Measuring                  generation, scores of text, scores of tasks
    12  BHExperimentRunner         configurations x prompts and texts -> rows
    13  Analysis                   rows -> paired tests, verdicts at equal compute
    14  Figures
    15  Report
    16  Folders side by side       runs of several models, seeds or machines
    17  Command line

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
import bz2
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gzip
import hashlib
import html
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import lzma
import math
import numbers
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn, TypeVar

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


accelerate = _Lazy("accelerate")
jinja2 = _Lazy("jinja2")
markdown_it = _Lazy("markdown_it")
optimize = _Lazy("scipy.optimize")
pil_image = _Lazy("PIL.Image")
plt = _Lazy("matplotlib.pyplot")
psutil = _Lazy("psutil")
sns = _Lazy("seaborn")
special = _Lazy("scipy.special")
stats = _Lazy("scipy.stats")
tqdm = _Lazy("tqdm.auto")
transformers = _Lazy("transformers")
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
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in hidden
        else character
        for character in text
    )


def strict_json(value: Any) -> Any:
    """`value` as plain JSON data: numpy scalars become numbers, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


PART = ".part"  # what a file is called until it is whole


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` in one step, so that nobody ever sees half a file, and
    a power cut leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from error
    finally:
        part.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file if it is there, and what a killed process left of writing it."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + PART).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Replace a JSON file in one step; `content` is plain data already, see `strict_json`."""
    write_whole(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a run left; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def fingerprint(content: Any) -> str:
    """16 hex digits that name a piece of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of what a file holds, of which a piece at a time is in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


LARGEST_SEED = 2**63 - 1  # what a column of whole numbers can hold


def _is_whole_number(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def check_least(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; UserError unless it is a whole number of at least `least`."""
    if not _is_whole_number(value, least):
        raise UserError(f"{name} {value!r}: it must be a whole number of at least {least}")
    return int(value)


def check_seed(name: str, value: Any) -> int:
    """`value` as an int; UserError unless torch, numpy and the columns of a table can all hold it."""
    if not _is_whole_number(value, 0) or value > LARGEST_SEED:
        raise UserError(f"{name} {value!r}: it must be a whole number from 0 to {LARGEST_SEED}")
    return int(value)


def check_name(name: str, kind: str = "configuration") -> None:
    """Names go into tables and plots as they are: raises UserError for one that could break them."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,64}", name, re.ASCII):
        raise UserError(f"{kind} name {name!r}: it must be 1 to 64 letters, digits, or any of _ . + -")


def _choice(what: str, value: Any, allowed: Sequence[str]) -> Any:
    """`value` if it is one of `allowed`, else a UserError that suggests the nearest."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise UserError(f"unknown {what} {value!r}.{hint} Available: {', '.join(allowed)}")


def _unused_name(name: str, taken: Collection[str]) -> str:
    """`name`, or one like it that no configuration has."""
    candidates = itertools.chain([name, f"static_{name}"], (f"static_{name}_{n}" for n in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def amount(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


@dataclass(frozen=True)
class Metric:
    """How a measured quantity is named in tables and tests: title, unit ("" for none) and digits."""

    title: str
    unit: str
    digits: int


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, type (str, int, float or bool) and meaning, in the words of the manual.

    clock: it may differ when the same command is run again. metric: configurations are compared by it.
    """

    name: str
    kind: type
    words: str
    clock: bool = False
    metric: Metric | None = None


# ---------------------------------------------------------------------------------------------------------
# 1. Settings: what can be varied
# ---------------------------------------------------------------------------------------------------------

DEFAULT_MODEL = "allenai/OLMoE-1B-7B-0924"
DEFAULT_OUTPUT = "./results"
DEFAULT_MAX_TOKENS = 50
DEFAULT_CHECKPOINT_INTERVAL = 5
DEFAULT_SEED = 0
DEFAULT_WINDOW = 256
DEFAULT_LIMIT = 100  # rows of a data set that become prompts
DEFAULT_TEXT_LIMIT = 10_000  # ... or documents to be scored
DEFAULT_MAX_WINDOWS = 100  # windows of the text that is scored where none is named ...
MANY_PARAMETERS = 10**9
MAX_WINDOWS_ON_CPU = 30  # ... and under a model of more parameters than that, on a CPU
CALIBRATION_SEQUENCES = 32  # sequences of calibration text ...
CALIBRATION_LENGTH = 128  # ... and tokens in each; the first position of each is left out
SIGNIFICANCE_LEVEL = 0.05  # for the tests in the report; unrelated to a configuration's alpha
BASELINE = "topk_8"

# A configuration names a rule, its `method`, and values of the fields that this rule takes; section 4
# declares both. Any number may be a list, one value for each MoE layer.
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
# On a model whose own K is not 8, as OLMoE's is, the 8 of these is the model's own K: see `with_own_k`.
BUILT_IN = ROUTING_CONFIGS | {name: config for name, config in _CONTROLS.items() if "max_k" in config}


# Every published rule, to be moved to the same mean numbers of experts by --match-experts; without it to
# these shares of the model's own K (3, 4, 5 and 6 where it is 8).
FIELD_SHARES = (3 / 8, 4 / 8, 5 / 8, 6 / 8)
_FIELD: dict[str, dict[str, Any]] = {
    "bh": _BH | {"alpha": 0.05},
    "bh_flat": _BH | {"alpha": 0.5, "p_values": "flat"},
    "bh_pooled": _BH | {"alpha": 0.5, "p_values": "pooled"},
    "bh_pooled_logits": _BH | {"alpha": 0.5, "p_values": "pooled_logits"},
    "by": _BH | {"method": "by", "alpha": 0.05},
    "hc_empirical": {"method": "hc", "p_values": "empirical"},
    "hc_pooled": {"method": "hc", "p_values": "pooled"},
    "hc_pooled_logits": {"method": "hc", "p_values": "pooled_logits"},
    **{
        method: {"method": method}
        for method in (
            *("threshold", "relative_threshold", "contribution", "top_p", "topk_p", "min_p"),
            *("entropy", "elbow", "gap"),
        )
    },
}
LINEAR = "linear:16"
STATIC_STAND_INS = ("nothing", "mean", LINEAR)  # beside static Top-K


def _with_stand_in(name: str, config: Mapping[str, Any], stand_in: str) -> dict[str, dict[str, Any]]:
    """A configuration with a stand-in, under a name that says which."""
    suffix = "" if stand_in == "nothing" else f"_{stand_in.replace(':', '')}"
    return {name + suffix: {**config, "stand_in": stand_in}}


def field_suite() -> dict[str, dict[str, Any]]:
    """Every rule with nothing and with the expert's mean standing in; BH, threshold and static Top-K also
    with a linear map; the oracle at four thresholds, as a bound."""
    suite: dict[str, dict[str, Any]] = {}
    for name, static in _STATIC.items():
        for stand_in in STATIC_STAND_INS:
            suite |= _with_stand_in(name, static, stand_in)
    suite[BASELINE] = ROUTING_CONFIGS.get(BASELINE, {"method": "topk", "k": 8})
    for name, config in _FIELD.items():
        for stand_in in ("nothing", "mean"):
            suite |= _with_stand_in(name, config, stand_in)
    for name in ("bh", "threshold"):
        suite |= _with_stand_in(name, _FIELD[name], LINEAR)
    for threshold in (0.4, 0.6, 0.8, 1.0):
        suite[f"oracle_{threshold:g}"] = {"method": "oracle", "threshold": threshold}
    return suite


def field_on(configs: Configs, own_k: int) -> dict[str, Config]:
    """`configs` of the field suite on a model with its own K: without static Top-k above it, which the suite
    has up to 7."""
    wider = {name for name, static in _STATIC.items() if static["k"] > own_k}
    left_out = {
        of_suite
        for name in wider
        for stand_in in STATIC_STAND_INS
        for of_suite in _with_stand_in(name, {}, stand_in)
    }
    return {name: config for name, config in configs.items() if name not in left_out}


def suites() -> dict[str, dict[str, dict[str, Any]]]:
    """The families of configurations, by name, with what ROUTING_CONFIGS holds when this is called.

    Where two have one name, `default`, `controls` and `all` take that of ROUTING_CONFIGS; `frontier` and
    `field` take only the baseline from there.
    """
    baseline = {name: config for name, config in ROUTING_CONFIGS.items() if name == BASELINE}
    return {
        "default": {**ROUTING_CONFIGS},
        "frontier": _STATIC | baseline | _LADDER,
        "controls": _STATIC | ROUTING_CONFIGS | _CONTROLS | ROUTING_CONFIGS,
        "field": field_suite(),
        "all": _STATIC | ROUTING_CONFIGS | _LADDER | _CONTROLS | ROUTING_CONFIGS,
    }


# ---------------------------------------------------------------------------------------------------------
# 2. Prompts and texts: what is fed in
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
# Which of them, and of a text's, a finished row depends on; every field is classified, or a test fails.
PROMPT_IDENTITY: dict[str, bool] = {
    "id": False,  # names the row
    "text": True,
    "category": True,
    "description": False,  # for the reader of the prompts only
    "reference": False,  # not of what is generated; a row of TextItem says so itself
}


def input_hashes(prompt: Prompt, chat_template: str | None = None) -> dict[str, str]:
    """Field -> hash, for each field of a resolved prompt that its generated rows depend on, and what
    `chat_template_fingerprint` says of the template it is fed in by, if there is one."""
    hashes = {field: fingerprint(prompt[field]) for field, counts in PROMPT_IDENTITY.items() if counts}
    return hashes if chat_template is None else {**hashes, "chat_template": chat_template}


MAX_CHARACTERS = 10_000_000  # of a prompt, beyond any context: a compressed file can unfold to anything


def resolve_prompt(prompt: Prompt) -> dict[str, str]:
    """A prompt with exactly PROMPT_FIELDS; only `text` is needed. Raises UserError where that is missing."""
    text = prompt.get("text")
    name = f"prompt {prompt.get('id', dict(prompt))!r:.80}"
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name} has no text: it needs a non-empty string under 'text'")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}: shorten it")
    unknown = sorted(set(prompt) - set(PROMPT_FIELDS))
    if unknown:
        raise UserError(
            f"{name}: unknown {', '.join(map(repr, unknown))}; it takes {', '.join(PROMPT_FIELDS)}"
        )
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    defaults = {"id": f"prompt_{digest[:12]}", "category": "none", "description": "", "reference": ""}
    resolved = defaults | dict(prompt)
    for field in PROMPT_FIELDS:
        value = resolved[field]
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            raise UserError(f"{name}: {field} must be a string, without half a character (a surrogate)")
    return {field: resolved[field] for field in PROMPT_FIELDS}


def _read_text(path: Path, option: str) -> str:
    """A UTF-8 file that is not empty, else a UserError that names the option."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: {error}") from error
    if not text.strip():
        raise UserError(f"{option} {path}: the file is empty")
    return text


def check_ids(ids: Sequence[str]) -> None:
    """Results are paired by id: raises UserError for one that occurs twice."""
    for name, times in collections.Counter(ids).most_common(1):
        if times > 1:
            raise UserError(f"ids must differ, but {name!r} occurs {times} times")


PROMPT_FILES = (".txt", ".jsonl", ".json", ".csv")


def _prompt_entries(text: str, suffix: str) -> list[Any]:
    """What the entries of a prompt file are, not yet checked. ValueError where it is not of its kind."""
    if suffix == ".csv":
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        return [{key: value for key, value in row.items() if value} for row in table.to_dict("records")]
    if suffix == ".json":
        entries = json.loads(text)
        return entries if isinstance(entries, list) else []
    # Not `splitlines`, which also cuts at characters that may stand inside a text, such as U+2028.
    lines = [line for line in text.split("\n") if line.strip()]
    return [{"text": line} if suffix == ".txt" else json.loads(line) for line in lines]


def load_prompts(path: Path) -> list[dict[str, str]]:
    """Prompts from a file: .txt (one a line), .jsonl, .json (a list) or .csv, with PROMPT_FIELDS as keys.

    Raises UserError naming file and entry for what is not a prompt, and for ids that occur twice.
    """
    suffix = path.suffix.lower()
    _choice("kind of --prompts file", suffix, PROMPT_FILES)
    text = _read_text(path, "--prompts")
    try:
        entries = _prompt_entries(text, suffix)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path}: not valid {suffix[1:]}: {error}") from error
    if not entries:
        raise UserError(f"--prompts {path}: it must hold a list of prompts")
    prompts = []
    for number, entry in enumerate(entries, 1):
        try:
            if not isinstance(entry, dict):
                raise UserError(f"it is {type(entry).__name__}, not an object with 'text'")
            given = {field: entry[field] for field in PROMPT_FIELDS if entry.get(field) is not None}
            prompts.append(resolve_prompt(given))
        except UserError as error:
            raise UserError(f"--prompts {path}, entry {number}: {error}") from error
    check_ids([prompt["id"] for prompt in prompts])
    return prompts


DATASET_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000  # rows held at a time when rows are drawn at random


def _dataset_source(option: str, dataset: str) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """The name of a data set, and the arguments with which `datasets.load_dataset` finds it."""
    path = Path(dataset)
    if path.is_file():
        builder = DATASET_FILES[_choice(f"kind of {option} file", path.suffix.lower(), tuple(DATASET_FILES))]
        return path.name, (builder,), {"data_files": str(path)}
    if path.exists():
        return path.name or dataset, (dataset,), {}
    return dataset, tuple(dataset.split(":", 1)), {}


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What is held of a data set that is read: texts may be long, and a compressed file can unfold to anything.
MAX_ROWS_CHARACTERS = 200_000_000
MAX_PAGE_BYTES = 500_000_000
PAGE_ROWS = 1024
PARQUET_ROWS = 32  # read at a time
CSV_ROWS = 10_000  # read at a time, or less where the first ones have more than ...
CSV_CHARACTERS = 20_000_000


@contextlib.contextmanager
def _cells_up_to(characters: int) -> Iterator[None]:
    """Python's csv module reads cells of that length inside the block; by itself it stops at 131,072."""
    before = csv.field_size_limit(characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _UnfoldedLines:
    """The lines of a file. UserError where those of one row, which ends where `end_row` is called, have more
    than `most` bytes."""

    def __init__(self, where: str, file: IO[bytes], most: int):
        self.where = where
        self.file = file
        self.most = most
        self.length = 0  # of the row so far

    def end_row(self) -> int:
        """Returns how long it was."""
        length = self.length
        self.length = 0
        return length

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(self.most + 1):
            self.length += len(line)
            if self.length > self.most:
                raise UserError(f"{self.where}: a row has more than {self.most:,} characters")
            # Its lengths and quotes are looked at only; the csv module refuses the two others.
            yield line.replace(b"\r", b" ").replace(b"\0", b" ").decode("latin-1")


def _row_lengths(where: str, file: IO[bytes], is_csv: bool, most: int) -> Iterator[int]:
    """The length of each row of a file, in bytes. A row is a line, but for a quoted cell of CSV, which may
    span many. UserError: see `_UnfoldedLines`."""
    lines = _UnfoldedLines(where, file, most)
    with _cells_up_to(most):
        for _ in csv.reader(lines) if is_csv else lines:
            yield lines.end_row()


def _refuse_endless_rows(option: str, path: Path, rows: int) -> None:
    """UserError where one of the first rows of a compressed file, or of one in an archive, unfolds to more
    than any prompt may hold: the datasets library holds a row several times over."""
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            unfolded = {name: stack.enter_context(archive.open(name)) for name in archive.namelist()}
        else:
            unfolded = {path.stem: stack.enter_context(COMPRESSED[path.suffix.lower()](path, "rb"))}
        for name, file in unfolded.items():
            is_csv = Path(name).suffix.lower() == ".csv"
            lengths = _row_lengths(f"{option} {path}", file, is_csv, MAX_CHARACTERS)
            for _ in itertools.islice(lengths, rows + 1):  # one may name the columns
                pass


def _refuse_endless_files(option: str, dataset: str, rows: int) -> None:
    """`_refuse_endless_rows` for the compressed files of a local folder."""
    path = Path(dataset)
    for file in sorted(path.rglob("*")) if path.is_dir() else []:
        if file.suffix.lower() in (*COMPRESSED, ".zip") and file.is_file():
            _refuse_endless_rows(option, file, rows)


def _csv_rows(option: str, path: Path) -> int:
    """How many rows of a local CSV file are read at a time: CSV_ROWS, or less where they are long."""
    characters = 0
    with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
        lengths = _row_lengths(f"{option} {path}", file, is_csv=True, most=MAX_ROWS_CHARACTERS)
        for number, length in enumerate(itertools.islice(lengths, CSV_ROWS + 1)):  # from the names of columns
            characters += length
            if characters > CSV_CHARACTERS:
                return max(number - 1, 1)
    return CSV_ROWS


def _num_characters(value: Any) -> int:
    """How long the texts in a row are together."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, (list, tuple)) else 0


class _NumberedRows:
    """Numbers the rows of a data set as they are read. UserError before they fill the memory."""

    def __init__(self, where: str, is_random: bool):
        self.where = where
        self.is_random = is_random
        self.characters = 0

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        self.characters += _num_characters(row)
        if self.characters > MAX_ROWS_CHARACTERS:
            way_out = f"--limit {number} takes fewer" if number else "shorten it"
            if self.is_random:
                way_out = f"--random-rows holds {SHUFFLE_BUFFER:,} rows at a time: leave it out"
            why = f"its texts up to row {number} hold more than {MAX_ROWS_CHARACTERS:,} characters"
            raise UserError(f"{self.where}: {why}; {way_out}")
        return {"row": row, "number": number}


def _refuse_endless_pages(option: str, path: str, group: Any) -> None:
    """UserError where what is read at once of a row group of parquet unfolds to more than may be held.

    That is a page of each column: as long as the writer liked, and with pyarrow, which looks at the length
    every PAGE_ROWS rows only, the longer the longer the texts are. group: what pyarrow knows of it.
    """
    rows = min(group.num_rows, PAGE_ROWS)
    unfolded = group.total_byte_size * rows // max(group.num_rows, 1)
    if unfolded > MAX_PAGE_BYTES:
        why = f"{rows:,} of its rows can only be read together, and unfold to {unfolded:,} bytes"
        way_out = "write it with fewer rows in a row group"
        raise UserError(f"{option} {path}: {why}, more than {MAX_PAGE_BYTES:,}; {way_out}")


def _parquet_rows(option: str, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of local parquet files, of which few are held at a time."""
    import pyarrow.parquet as pq

    for path in files:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for number in range(file.num_row_groups):
                _refuse_endless_pages(option, path, file.metadata.row_group(number))
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[number]):
                    yield from batch.to_pylist()


def _streamed_splits(option: str, dataset: str) -> Mapping[str, Any]:
    """The splits of a data set, whose rows are read when they are asked for.

    The datasets library reads 10,000 rows of CSV to give the first, and unfolds a whole row group of parquet:
    of local files, which may hold anything, fewer rows are read together, and parquet by pyarrow itself.
    """
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.parquet.parquet import Parquet

    _, source, files = _dataset_source(option, dataset)
    builder = datasets.load_dataset_builder(*source, **files)
    if not Path(dataset).exists():
        return builder.as_streaming_dataset()
    if isinstance(builder, Parquet):
        return {
            str(split): datasets.IterableDataset.from_generator(
                _parquet_rows, gen_kwargs={"option": option, "files": list(paths)}
            )
            for split, paths in builder.config.data_files.items()
        }
    if isinstance(builder, Csv):
        paths = [Path(path) for of_split in builder.config.data_files.values() for path in of_split]
        known = [path for path in paths if path.suffix.lower() in (".csv", *COMPRESSED)]
        builder.config.chunksize = min((_csv_rows(option, path) for path in known), default=CSV_ROWS)
    return builder.as_streaming_dataset()


def _dataset_rows(
    option: str, dataset: str, split: str | None, limit: int, random_seed: int | None = None
) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """The split that was read, and (number, row) of the rows taken: at least one, else a UserError."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{option} {dataset} needs the datasets library: pip install datasets")
    import datasets

    is_random = random_seed is not None
    try:
        _refuse_endless_files(option, dataset, SHUFFLE_BUFFER if is_random else limit)
        splits = _streamed_splits(option, dataset)
        if split is None:
            split = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
            chosen = f"default --split of {dataset}"
        else:
            chosen = f"--split of {dataset}"
        rows = splits[_choice(chosen, split, tuple(splits))]
        # Numbered before they are shuffled: a row keeps its number, whichever rows are drawn.
        numbered = _NumberedRows(f"{option} {dataset}", is_random)
        rows = rows.map(numbered, with_indices=True, remove_columns=rows.column_names)
        if is_random:
            rows = rows.shuffle(seed=random_seed, buffer_size=SHUFFLE_BUFFER)
        # Not `rows.take`, which reads one row more.
        taken = [(item["number"], item["row"]) for item in itertools.islice(rows, limit)]
    except UserError:
        raise
    except (
        *(OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError),
        *(EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile),  # of a damaged compressed file
    ) as error:
        kinds = "csv, json, jsonl or parquet" if option == "--dataset" else "txt, csv, json, jsonl or parquet"
        way_out = f"(give a local file or folder of {kinds}, or a data set of the hub)"
        raise UserError(f"{option} {dataset} cannot be read: {_first_line(error)} {way_out}") from error
    if not taken:
        raise UserError(f"{option} {dataset}, split {split}: none of 0 rows has a text")
    return split, taken


def _only_text_column(option: str, dataset: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The column that holds the texts: "text" where there is one, else the only column of strings."""
    columns = tuple(rows[0])
    if "text" in columns:
        return "text"
    of_strings = [
        column for column in columns if {type(row.get(column)) for row in rows} in ({str}, {str, type(None)})
    ]
    if len(of_strings) != 1:
        why = f'has no column "text" and {len(of_strings)} columns of strings: choose one with --text-column'
        raise UserError(f"{option} {dataset} {why}. Available: {', '.join(columns)}")
    return of_strings[0]


def _rows_with_text(
    option: str, dataset: str, split: str, column: str, rows: Sequence[tuple[int, Mapping[str, Any]]]
) -> list[tuple[int, Mapping[str, Any]]]:
    """Those that have a text; the log says how many have none. UserError where none has."""
    filled = [
        (number, row) for number, row in rows if isinstance(row.get(column), str) and row[column].strip()
    ]
    if not filled:
        raise UserError(f"{option} {dataset}, split {split}: none of {len(rows)} rows has a text")
    missing = len(rows) - len(filled)
    if missing:
        logger.warning(f"{option} {dataset}: {missing} of {len(rows)} rows have no text in column {column!r}")
    return filled


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
    option = "--dataset"
    split, taken = _dataset_rows(option, dataset, split, limit, random_seed)
    rows = [row for _, row in taken]
    for field, column in (
        ("text", text_column),
        ("category", category_column),
        ("reference", reference_column),
    ):
        if column is not None:
            _choice(f"--{field}-column", column, tuple(rows[0]))
    columns = {
        "text": text_column or _only_text_column(option, dataset, rows),
        "category": category_column,
        "reference": reference_column,
    }
    name, _, _ = _dataset_source(option, dataset)
    prompts = []
    for number, row in _rows_with_text(option, dataset, split, columns["text"], taken):
        given = {field: str(row[column]) for field, column in columns.items() if row.get(column) is not None}
        prompts.append(resolve_prompt({"id": f"{name}-{number}", "category": name, **given}))
    return prompts


@dataclass(frozen=True)
class TextItem:
    """A text to be scored: the first `context` tokens are given, the others are predicted."""

    id: str
    document: str  # what it was cut from
    category: str
    token_ids: np.ndarray  # int32 [S]
    context: int
    num_bytes: int  # of the predicted text, in UTF-8
    inputs: dict[str, str]  # field -> hash, of everything that its scores depend on
    source: str = "text"  # or "reference", of a prompt

    def __post_init__(self) -> None:
        """Takes any list of token ids. UserError where there is nothing given, or nothing to predict."""
        ids = np.array(None)
        with contextlib.suppress(ValueError):  # lists of different lengths: refused below
            ids = np.asarray(self.token_ids)
        is_list = ids.ndim == 1 and len(ids) >= 2 and np.issubdtype(ids.dtype, np.integer)
        if not is_list or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            raise UserError(f"text {self.id!r}: token_ids must be a list of at least 2 whole numbers")
        if not 1 <= self.context < len(ids):
            allowed = f"it must be 1 to {len(ids) - 1}"
            raise UserError(f"text {self.id!r}: context = {self.context}, but {allowed}")
        object.__setattr__(self, "token_ids", ids.astype(np.int32))


def start_token(tokenizer: Any) -> int:
    """What a text begins with: the beginning-of-text token, else the end-of-text token, else 0."""
    return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)


CHAT_SECONDS = 10.0  # that a chat template may take for one prompt


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block after so many seconds; without a limit where Python has no such timer:
    outside the main thread, and on Windows."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def chat_tokens(text: str, tokenizer: Any) -> list[int]:
    """Token ids of `text` as the one message of a user, by the tokenizer's chat template, up to where the
    answer begins; special tokens are those that the template writes. Raises UserError.

    A template is data that comes with a model: transformers renders it in a sandbox of jinja2, where it can
    import nothing, open nothing and call nothing of Python's. Here it cannot take for ever either.
    """
    message = {"role": "user", "content": text}
    try:
        with _time_limit(CHAT_SECONDS):
            encoded = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
    except Exception as error:  # whatever a template can raise
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"--apply-chat-template: the model's chat template cannot be used: {why}") from error
    return list(encoded["input_ids"])


def prompt_tokens(text: str, tokenizer: Any, as_chat: bool = False) -> list[int]:
    """Token ids of a prompt as it is fed in."""
    if as_chat:
        return chat_tokens(text, tokenizer)
    return list(tokenizer(text, verbose=False)["input_ids"])


def chat_template_fingerprint(tokenizer: Any, model_name: str) -> str:
    """16 hex digits that name what a chat template makes of a message. UserError where there is none, or one
    that cannot be used."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--apply-chat-template: the tokenizer of {model_name} has no chat template; leave the option "
            "out, or give an instruct model"
        )
    return fingerprint([int(token) for token in chat_tokens("How are you?", tokenizer)])


def reference_items(
    prompts: Sequence[Prompt], tokenizer: Any, chat_template: str | None = None
) -> list[TextItem]:
    """The references of resolved prompts, each to be scored after its prompt; a document of its own.

    chat_template: see `input_hashes`; the prompt is then fed in by it.
    """
    items = []
    for prompt in prompts:
        reference = prompt["reference"]
        if reference:
            given = prompt_tokens(prompt["text"], tokenizer, chat_template is not None)
            predicted = tokenizer(reference, add_special_tokens=False, verbose=False)["input_ids"]
            if not given or not predicted:
                logger.warning(f"prompt {prompt['id']!r} or its reference has no tokens: it is not scored")
                continue
            items.append(
                TextItem(
                    id=prompt["id"],
                    document=prompt["id"],
                    category=prompt["category"],
                    token_ids=np.array([*given, *predicted], dtype=np.int32),
                    context=len(given),
                    num_bytes=len(reference.encode()),
                    inputs={
                        **input_hashes(prompt, chat_template),
                        "reference": fingerprint(prompt["reference"]),
                    },
                    source="reference",
                )
            )
    return items


def deciding_sources(sources: Iterable[str]) -> set[str]:
    """Which scored texts decide, by their `source`: text where text was scored, else the prompts' references.

    Both are never in one test: a reference is a few dozen tokens after a prompt, a window some hundred of
    running text, and the mean over both would be about neither. Older tables do not tell them apart.
    """
    present = set(sources)
    return {"text"} if "text" in present else present


# Texts to be scored: documents, cut into windows


@dataclass(frozen=True)
class Document:
    """A text that is cut into windows. Those of one document are not independent of each other."""

    name: str
    text: str
    category: str = "text"


NO_TEXT = "none"  # as --text: score no text but the prompts' references
HELDOUT_FOLDER = "heldout"  # in a model's folder
PYTHON_DOCS = "pydoc_data.topics"
# What is scored where no text is named: category of its documents -> what it is, in the report.
DEFAULT_TEXTS = {
    HELDOUT_FOLDER: "text that comes with the model, of the same kind as its training data but held out of "
    "it",
    PYTHON_DOCS: "the language reference that every Python carries (`pydoc_data.topics`). The model was "
    "probably trained on it: a paired comparison can bear that, but it says nothing about other text; "
    "`--text` takes yours",
}


def default_documents(model_name: str) -> list[Document]:
    """What is scored where no text is named: that of the model's folder, else what every Python brings."""
    folder = Path(model_name) / HELDOUT_FOLDER
    files = sorted(folder.rglob("*.txt"))
    if files:
        return [
            Document(file.relative_to(folder).as_posix(), _read_text(file, "--text"), HELDOUT_FOLDER)
            for file in files
        ]
    try:
        topics = importlib.import_module(PYTHON_DOCS).topics
    except ImportError as error:
        raise UserError(f"this Python lacks its text: {error}") from error
    return [Document(f"{PYTHON_DOCS}/{name}", text, PYTHON_DOCS) for name, text in sorted(topics.items())]


def _text_rows(
    dataset: str, split: str | None, text_column: str | None, limit: int, prefix: str = ""
) -> list[Document]:
    """The first `limit` rows of a data set that have a text, a document each, as NAME-ROW."""
    option = "--text"
    split, taken = _dataset_rows(option, dataset, split, limit)
    rows = [row for _, row in taken]
    if text_column is not None:
        _choice("--text-column", text_column, tuple(rows[0]))
    column = text_column or _only_text_column(option, dataset, rows)
    if len(taken) == limit:
        logger.info(f"{option} {dataset}: the first {limit:,} rows were read; --limit N takes others")
    name, _, _ = _dataset_source(option, dataset)
    return [
        Document(f"{prefix}{name}-{number}", row[column])
        for number, row in _rows_with_text(option, dataset, split, column, taken)
    ]


TEXT_FOLDER_FILES = (".txt", ".csv", ".jsonl", ".parquet")  # .json is too often about the others


def _folder_documents(folder: Path, split: str | None, text_column: str | None, limit: int) -> list[Document]:
    """The documents of a folder with .txt files: each of these, and the rows of its data files."""
    documents = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file():
            continue
        if file.suffix.lower() == ".txt":
            documents.append(Document(name, _read_text(file, "--text")))
        elif file.suffix.lower() in TEXT_FOLDER_FILES:
            prefix = name.removesuffix(file.name)
            documents += _text_rows(str(file), split, text_column, limit, prefix)
    return documents


def _may_be_of_hub(source: str) -> bool:
    """Whether what is not there may be a data set of the hub, and no mistyped file."""
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/\\]+)?", source)
    return bool(is_name) and Path(source).suffix.lower() not in (".txt", ".md", *DATASET_FILES)


def _told_apart(documents: Sequence[Document], folders: Sequence[Path]) -> list[Document]:
    """The documents, of which those that share a name have as many of the folders above them in front of it
    as it takes to tell them apart. folders: where each one's name begins, absolute."""
    names = [document.name for document in documents]
    paths = [folder / document.name for document, folder in zip(documents, folders, strict=True)]
    deepest = max((len(folder.parts) for folder in folders), default=0)
    for depth in range(1, deepest):
        paths_of = collections.defaultdict(set)
        for name, path in zip(names, paths, strict=True):
            paths_of[name].add(path)
        for place, document in enumerate(documents):
            if len(paths_of[names[place]]) > 1:  # what was given twice has but one
                above = folders[place].parts[1:][-depth:]  # without the root
                names[place] = "/".join((*above, document.name))
    return [dataclasses.replace(document, name=name) for document, name in zip(documents, names, strict=True)]


def load_text_documents(
    sources: Sequence[str | Path],
    split: str | None = None,
    text_column: str | None = None,
    limit: int = DEFAULT_TEXT_LIMIT,
) -> list[Document]:
    """The documents of text files, data sets and folders of either.

    A text file is a document. So is a row of a data set: a .csv, .json, .jsonl or .parquet file, a folder of
    such files, or a hub NAME or NAME:CONFIG (see `load_dataset_prompts` for split and text_column; of each
    the first `limit` rows). Of a folder with .txt files every text and data file is taken. Documents of two
    sources that have one name get the folders above them in front of it. Raises UserError.
    """
    documents: list[Document] = []
    folders: list[Path] = []  # of each document, the one in which its name begins
    for source in map(str, sources):
        path = Path(source)
        is_dataset = path.suffix.lower() in DATASET_FILES if path.exists() else _may_be_of_hub(source)
        if path.is_dir():
            suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
            if suffixes.isdisjoint((".txt", *DATASET_FILES)):
                kinds = ", ".join(DATASET_FILES)
                raise UserError(f"--text {source}: the folder holds no .txt file, and none of {kinds}")
            is_dataset = ".txt" not in suffixes
        folder = path.parent
        if is_dataset:
            documents += _text_rows(source, split, text_column, limit)
        elif path.is_dir():
            folder = path
            documents += _folder_documents(path, split, text_column, limit)
        else:
            documents.append(Document(path.name, _read_text(path, "--text")))
        folders += [Path(os.path.abspath(folder))] * (len(documents) - len(folders))
    return _told_apart(documents, folders)


@dataclass(frozen=True)
class Window:
    """A window of a document: token_ids int32 [S], the first of which stands before it."""

    document: Document
    first: int  # place of its own first token in the document
    token_ids: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.document.name}:{self.first}"

    def item(self, tokenizer: Any) -> TextItem:
        return TextItem(
            id=self.name,
            document=self.document.name,
            category=self.document.category,
            token_ids=self.token_ids,
            context=1,
            num_bytes=len(tokenizer.decode(self.token_ids[1:]).encode()),
            inputs={
                "token_ids": fingerprint(self.token_ids.tolist()),
                "document": fingerprint(self.document.name),
            },
        )


def cut_windows(documents: Iterable[Document], tokenizer: Any, window: int) -> list[Window]:
    """Documents cut into windows of `window` tokens.

    Every token is in one window, with the one before it as first context (the end-of-text token at the
    start): the windows of lm-evaluation-harness's rolling log-likelihood. A last window shorter than half a
    window, or half of DEFAULT_WINDOW where that is less, is left out.
    """
    shortest = max(1, min(window, DEFAULT_WINDOW) // 2)
    windows = []
    for document in documents:
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.array([start_token(tokenizer), *tokens], dtype=np.int32)
        for first in range(1, len(tokens), window):
            part = tokens[first - 1 : first + window]
            if len(part) > shortest:
                windows.append(Window(document, first - 1, part))
    if not windows:
        way_out = "give a longer text, or a smaller --window"
        raise UserError(f"--text: no document has {amount(shortest, 'token')}: {way_out}")
    check_ids([part.name for part in windows])
    return windows


def _evenly(number: int, of: int) -> list[int]:
    """`number` places spread evenly over range(`of`)."""
    return [int((place + 0.5) * of / number) for place in range(number)]


def spread_over_documents(windows: Sequence[Window], most: int) -> list[Window]:
    """At most `most` windows: of every document as many as of any other, as far as it has them, spread evenly
    over it. Of more documents than that, one each of some that are spread evenly over all."""
    by_document: dict[str, list[Window]] = {}
    for window in windows:
        by_document.setdefault(window.document.name, []).append(window)
    groups = list(by_document.values())
    if len(groups) > most:
        groups = [groups[place] for place in _evenly(most, len(groups))]
    taken = [0] * len(groups)
    remaining = min(most, sum(map(len, groups)))
    while remaining:
        for place, group in enumerate(groups):
            if remaining and taken[place] < len(group):
                taken[place] += 1
                remaining -= 1
    return [
        group[place]
        for group, number in zip(groups, taken, strict=True)
        for place in (_evenly(number, len(group)) if number else ())
    ]


@dataclass(frozen=True)
class TextSample:
    """Of a text the windows that are scored, and the others, on which nulls can be calibrated."""

    scored: list[TextItem]
    unscored: list[Window]


def sample_text(
    documents: Iterable[Document],
    tokenizer: Any,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = None,
) -> TextSample:
    """The windows of documents, of which at most `max_windows` are scored: all of them, unless told."""
    windows = cut_windows(documents, tokenizer, window)
    chosen = windows if max_windows is None else spread_over_documents(windows, max_windows)
    names = {part.name for part in chosen}
    unscored = [part for part in windows if part.name not in names]
    return TextSample([part.item(tokenizer) for part in chosen], unscored)


def text_windows(sources: Sequence[str | Path], tokenizer: Any, window: int) -> list[TextItem]:
    """All windows of `window` tokens of text files, data sets and folders of either, to be scored; see
    `load_text_documents` and `cut_windows`."""
    return sample_text(load_text_documents(sources), tokenizer, window).scored


# ---------------------------------------------------------------------------------------------------------
# 3. Nulls: score -> p-value -> critical scores
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
    on_logits: ClassVar[bool] = False

    def smallest_alpha(self, num_experts: int) -> float:
        return 0.0

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
    on_logits: ClassVar[bool] = False

    def smallest_alpha(self, num_experts: int) -> float:
        return 0.0

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

    def __init__(self, null_scores: Tensor, on_logits: bool = False):
        """null_scores: [n0] scores of irrelevant (token, expert) pairs, any order. on_logits: they, and what
        is tested, are router logits / temperature instead of their log-softmax."""
        self.on_logits = on_logits
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


@dataclass(frozen=True)
class StandIn:
    """What is put out in place of an expert that was dropped, for the E experts of a layer: offset + up down
    x.

    offset [E, H]; down [E, r, H] and up [E, H, r], an affine map of rank r of the layer's input x [H], or
    None: the offset alone.
    """

    offset: Tensor
    down: Tensor | None = None
    up: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> StandIn:
        return StandIn(
            offset=self.offset.to(device, dtype),
            down=None if self.down is None else self.down.to(device, dtype),
            up=None if self.up is None else self.up.to(device, dtype),
        )

    def output(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum over candidates of weight x stand-in: hidden [T, H], indices and weights [T, K] -> [T, H]."""
        num_experts = len(self.offset)
        weights = weights.to(self.offset.dtype)
        by_expert = weights.new_zeros(len(hidden), num_experts).scatter(1, indices, weights)  # [T, E]
        output = by_expert @ self.offset
        if self.down is None:
            return output.to(hidden.dtype)
        token, slot = weights.nonzero(as_tuple=True)  # [P] pairs
        if len(token) < num_experts:  # few: only the maps that are asked for are read
            expert = indices[token, slot]
            inner = torch.bmm(self.down[expert], hidden[token, :, None])  # [P, r, 1]
            pairs = torch.bmm(self.up[expert], inner)[..., 0] * weights[token, slot, None]  # [P, H]
            return output.index_add(0, token, pairs).to(hidden.dtype)
        rank = self.down.shape[1]
        inner = (hidden @ self.down.flatten(0, 1).T).view(-1, num_experts, rank) * by_expert[..., None]
        return (output + inner.flatten(1) @ self.up.transpose(1, 2).flatten(0, 1)).to(hidden.dtype)


class Calibration:
    """What the unpatched routers did on calibration text: the source of the empirical nulls.

    logits [L, N, E] float32 and own [L, N, K] int16, the experts that the model chose, for N tokens. Both are
    kept, and not the scores, so that one forward pass serves every temperature. means [L, E, H] and norms [L,
    E], if they were asked for: what an expert puts out on average for tokens that rank it in the lower half
    of their Top-K, and the mean norm of what it puts out for all tokens that chose it. max_k int16 [L]: the
    most experts that each layer can run; older files lack it.
    """

    def __init__(
        self,
        logits: Tensor,
        own: Tensor,
        means: Tensor | None = None,
        norms: Tensor | None = None,
        max_k: Tensor | None = None,
    ):
        self.logits = logits
        self.own = own
        self.means = means
        self.norms = norms
        self.max_k = max_k
        self.linear_maps: dict[int, list[StandIn]] = {}  # rank -> one a layer
        self._nulls: dict[Any, EmpiricalNull] = {}

    def scores(self, layer_index: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Scores [N, E] of one layer, and bool [N, E]: which pairs lie outside the model's own Top-K."""
        scores = gate_scores(self.logits[layer_index], temperature)
        everywhere = torch.ones_like(scores, dtype=torch.bool)
        return scores, everywhere.scatter(1, self.own[layer_index].long(), False)

    def widest(self, layer_index: int) -> int:
        """The most experts that a layer can run; E where that was not kept."""
        return self.logits.shape[-1] if self.max_k is None else int(self.max_k[layer_index])

    def null(self, layer_index: int, temperature: float) -> EmpiricalNull:
        """The null of one layer: the scores of its irrelevant pairs. Built once: every patch asks for it."""
        key = (layer_index, temperature)
        if key not in self._nulls:
            scores, outside = self.scores(layer_index, temperature)
            self._nulls[key] = EmpiricalNull(scores[outside])
        return self._nulls[key]

    def pooled_null(self, layer_index: int, temperature: float, on_logits: bool) -> EmpiricalNull:
        """The scores, or the logits / temperature, of all pairs of a layer."""
        key = (layer_index, temperature, on_logits)
        if key not in self._nulls:
            logits = self.logits[layer_index]
            scores = logits / temperature if on_logits else gate_scores(logits, temperature)
            self._nulls[key] = EmpiricalNull(scores.flatten(), on_logits)
        return self._nulls[key]

    def relative_norms(self, layer_index: int) -> Tensor:
        """Mean norm of what each expert puts out, over the mean of all: [E]. UserError without norms."""
        if self.norms is None:
            raise UserError(
                "method 'contribution' needs calibration=calibrate(model, tokenizer, outputs=True)"
            )
        return self.norms[layer_index] / self.norms[layer_index].mean()

    def stand_in(self, layer_index: int, kind: str) -> StandIn:
        """What stands in for the experts of a layer. UserError where it was not calibrated."""
        if kind == "mean" and self.means is not None:
            return StandIn(self.means[layer_index])
        rank = linear_rank(kind)
        if rank in self.linear_maps:
            return self.linear_maps[rank][layer_index]
        how = "outputs=True" if kind == "mean" else f"linear_ranks=({rank},)"
        raise UserError(f"stand_in {kind!r} needs calibration=calibrate(model, tokenizer, {how})")

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write as safetensors, whole or not at all, together with what it was made from."""
        names = ("logits", "own", "means", "norms", "max_k")
        tensors = {name: getattr(self, name) for name in names}
        save_tensors(path, {name: part for name, part in tensors.items() if part is not None}, about)

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any]) -> Calibration | None:
        """The calibration saved at `path` if it was made from exactly `about`, else None."""
        tensors = load_tensors(path, about)
        return cls(**tensors) if tensors else None


def linear_rank(stand_in: str) -> int | None:
    """The rank r of the stand-in "linear:r"; None for the others."""
    name, _, rank = stand_in.partition(":")
    return int(rank) if name == "linear" else None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write as safetensors, whole or not at all, together with what they were made from."""
    with replacing(path) as part:
        try:
            safetensors.torch.save_file(dict(tensors), part, metadata={"about": json.dumps(about)})
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(errno.EIO, str(error)) from error


def load_tensors(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors saved at `path` if they were made from exactly `about`, else none."""
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("about", "null")) == about:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        logger.warning(f"{path} is not readable ({error}); calibrating again")
    return {}


@dataclass(frozen=True)
class NullKind:
    """A null that a configuration can name: its p-value and assumption in words, and how it is made.

    make: (calibration, layer index, temperature, E) -> the null of a layer.
    """

    p_value: str
    assumption: str
    make: Callable[[Calibration | None, int, float, int], Null]
    is_calibrated: bool = False


def _calibrated(calibration: Calibration | None, null: str) -> Calibration:
    if calibration is None:
        raise UserError(f'p_values "{null}" needs calibration=calibrate(model, tokenizer); "flat" does not')
    return calibration


def _empirical_null(
    calibration: Calibration | None, layer_index: int, temperature: float, num_experts: int
) -> Null:
    return _calibrated(calibration, "empirical").null(layer_index, temperature)


def _pooled_null(
    calibration: Calibration | None, layer_index: int, temperature: float, num_experts: int
) -> Null:
    return _calibrated(calibration, "pooled").pooled_null(layer_index, temperature, on_logits=False)


def _pooled_logits_null(
    calibration: Calibration | None, layer_index: int, temperature: float, num_experts: int
) -> Null:
    return _calibrated(calibration, "pooled_logits").pooled_null(layer_index, temperature, on_logits=True)


@functools.cache
def _closed_form(kind: type[FlatNull | SoftmaxNull], num_experts: int) -> Null:
    """One null for all layers and patches, which keeps its tables of critical scores."""
    return kind(num_experts)


NULLS = {
    "empirical": NullKind(
        "(1 + number of null scores >= s) / (n0 + 1), per layer",
        "the null scores are those of all (token, expert) pairs *outside the model's own Top-K* on "
        "calibration text; a tested irrelevant score is exchangeable with them. Needs n0 + 1 >= E / alpha",
        _empirical_null,
        is_calibrated=True,
    ),
    "flat": NullKind(
        "(1 - q)^(E - 1)",
        "the gates are uniform on the simplex (flat Dirichlet, so each is Beta(1, E - 1)). Closed form, no "
        "data; strict",
        lambda calibration, layer_index, temperature, num_experts: _closed_form(FlatNull, num_experts),
    ),
    "pooled": NullKind(
        "(1 + number of null scores >= s) / (n0 + 1), per layer",
        "every pair of a layer counts as irrelevant, the chosen ones too: the earlier attempt's null, "
        "a smoothed distribution of all scores. A share alpha of all pairs is all that can stand out",
        _pooled_null,
        is_calibrated=True,
    ),
    "pooled_logits": NullKind(
        "the same of router logits / temperature",
        "as `pooled`, and a logit means the same for every token",
        _pooled_logits_null,
        is_calibrated=True,
    ),
    "softmax": NullKind(
        "1 - q",
        "none that holds. p_(k) >= 1 - 1/k for any logits, so BH always returns `min_k`. For the record: an "
        "earlier attempt used it",
        lambda calibration, layer_index, temperature, num_experts: _closed_form(SoftmaxNull, num_experts),
    ),
}

# ---------------------------------------------------------------------------------------------------------
# 4. Rules: how many of a token's ranked experts run
# ---------------------------------------------------------------------------------------------------------
#
# A rule is declared once, by `register_rule`: its name, its knob, where it was published, and a pure function
# of the gates. Configurations, JSON files, --match-experts, the report and the manual know it from there.


def _plain_number(value: Any) -> Any:
    """A number of numpy's as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True)
class Field:
    """A field of a routing configuration: its type, default, what is valid (test and words), and meaning.

    A number may be given as a list as well, one for each MoE layer, from layer 0 on.
    """

    name: str
    kind: type
    default: Any
    is_valid: Callable[[Any], bool]
    allowed: str
    words: str

    @property
    def varies_by_layer(self) -> bool:
        return self.kind in (int, float)

    def parse(self, value: Any) -> Any:
        """`value` as plain Python, numpy's numbers too. ValueError where it is not valid for one layer."""
        if isinstance(value, list):  # of layers
            value = [_plain_number(item) for item in value]
        value = _plain_number(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is float and is_number:
            value = float(value)
        elif not isinstance(value, self.kind) or (self.varies_by_layer and not is_number):
            raise ValueError
        if not self.is_valid(value):
            raise ValueError
        return value


def share_field(name: str, default: float, words: str) -> Field:
    """A field that is a number in (0, 1]."""
    return Field(name, float, default, lambda value: 0 < value <= 1, "a number in (0, 1]", words)


def count_field(name: str, default: int, words: str) -> Field:
    """A field that is a whole number of experts."""
    return Field(name, int, default, lambda value: value >= 1, "a whole number of at least 1", words)


def rate_field(name: str, default: float, low: float, high: float, words: str) -> Field:
    """A field that is a number between two others, both left out."""
    return Field(
        name, float, default, lambda value: low < value < high, f"a number in ({low}, {high})", words
    )


def _choice_field(name: str, allowed: tuple[str, ...], words: str) -> Field:
    return Field(name, str, allowed[0], allowed.__contains__, f"one of {', '.join(allowed)}", words)


def _is_layer_selection(value: Any) -> bool:
    """ "all", "first N", "last N", or a list of layer numbers."""
    if isinstance(value, str):
        return value == "all" or re.fullmatch(r"(first|last) [1-9]\d{0,3}", value, re.ASCII) is not None
    is_numbered = isinstance(value, list) and all(_is_whole_number(layer, 0) for layer in value)
    return is_numbered and 0 < len(value) == len(set(value))


# What every rule takes, and what every rule takes that decides by token. A rule's knob is declared with it.
WEIGHTS_FIELD = _choice_field(
    "renormalize",
    ("model", "none", "sum", "topk_mass", "own_k"),
    "what kept weights sum to: `model` its own convention, `none` left as they are, `sum` 1, `topk_mass` the "
    "sum of the model's own Top-K; `own_k`: divided by the sum of the model's own Top-K, however few run",
)
STAND_IN_FIELD = Field(
    "stand_in",
    str,
    "nothing",
    lambda value: value in ("nothing", "mean") or re.fullmatch(r"linear:[1-9]\d{0,3}", value, re.ASCII),
    'nothing, mean or "linear:R" with a rank R of at least 1',
    "what is put out, times the router's weight, for experts of the model's own Top-K that are dropped: "
    "`nothing`, the expert's `mean` output, or `linear:R`, an affine map of rank R of the layer's input",
)
LAYERS_FIELD = Field(
    "layers",
    object,
    "all",
    _is_layer_selection,
    'all, "first N", "last N" or a list of different layer numbers from 0',
    "the MoE layers that are routed so, from 0; the others are left alone",
)
NULL_FIELD = _choice_field("p_values", tuple(NULLS), "the null behind the p-values")
ADAPTIVE_FIELDS = (
    Field("temperature", float, 1.0, lambda value: 0 < value < math.inf, "a number above 0",
          "router logits are divided by it before the softmax that gives the scores (not the weights)"),
    count_field("min_k", 1, "fewest experts"),
    count_field("max_k", 8, "most experts"),
    Field("shuffle", bool, False, lambda value: True, "true or false",
          "permute the counts over the tokens of a forward pass, padding left out: a control for *which* "
          "token gets many. In decoding a pass has one token a text, and nothing to permute where there is "
          "one text"),
    Field("random", bool, False, lambda value: True, "true or false",
          "run as many experts of the model's own Top-K, but any: a control for *which* experts run. Drawn "
          "by the same seed in every pass, so in decoding each token gets those of the same ranks"),
)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _places(number: int, device: torch.device) -> Tensor:
    """1..number, int64. Kept: it is asked for in every layer of every token."""
    return torch.arange(1, number + 1, device=device)


def _last_true(mask: Tensor) -> Tensor:
    """Position, from 1, of the last True along the last axis, 0 where there is none: [..., D] -> [...]."""
    return (mask * _places(mask.shape[-1], mask.device)).amax(-1)


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


def _check_alpha(null: Null, alpha: float, num_experts: int, correction: float) -> None:
    """UserError where the null rests on too few scores for BH at alpha / correction to reject anything."""
    smallest = null.smallest_alpha(num_experts) * correction
    if alpha < smallest:
        experts = "E" if correction == 1 else f"{correction:.3g} E"
        needed = f"{experts} / alpha = {correction * num_experts / alpha:,.0f}"
        raise UserError(
            f"alpha = {alpha:.2g} needs n0 + 1 >= {needed} null scores a layer; the calibration has n0 = "
            f"{null.n0:,}, enough for alpha >= {smallest:.2g}. Use a larger alpha, a longer "
            "--calibration-text, or --p-values flat"
        )


# Every layer of every token asks for the same tables; they go when their null does.
_TABLES: weakref.WeakKeyDictionary[Null, dict[tuple[Any, ...], Tensor]] = weakref.WeakKeyDictionary()


def critical_scores(null: Null, alpha: float, correction: float, scores: Tensor) -> Tensor:
    """The scores c_1 >= ... >= c_E at which BH at alpha / correction rejects, like `scores` [..., E]: [E].

    For a fixed null p_(k) <= k alpha / E is the same event as s_(k) >= c_k. Computed once for a null. Raises
    UserError where the null rests on too few scores for so small an alpha.
    """
    num_experts = scores.shape[-1]
    of_null = _TABLES.setdefault(null, {})
    key = (alpha, correction, num_experts, scores.device, scores.dtype)
    if key not in of_null:
        _check_alpha(null, alpha, num_experts, correction)
        levels = bh_levels(alpha / correction, num_experts)
        of_null[key] = null.critical_scores(levels).to(device=scores.device, dtype=scores.dtype)
    return of_null[key]


# So few tokens are ranked on a CPU by the operation that the router has just used: in decoding, code that is
# in the cache counts for more than the number of steps.
FEW_TOKENS = 8


@dataclass
class Gates:
    """The gates of T tokens in one layer, as a rule sees them."""

    scores: Tensor  # s = log q at the configuration's temperature, float32 or better [T, E]
    null: Null | None = None  # of this layer, for the rules that test
    logits: Tensor | None = None  # router logits / temperature [T, E], for nulls of logits
    own_k: int = 0  # the model's own K
    relative_norms: Tensor | None = None  # of what the experts put out on calibration text [E]
    # Of weight x what each candidate of the model's own Top-K puts out for this token, 0 for others [T, K]
    output_norms: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    @functools.cached_property
    def ranked(self) -> Tensor:
        """The scores, best first: [T, E]."""
        if self.scores.device.type != "cpu":
            return self.scores.sort(dim=-1, descending=True).values
        if len(self.scores) <= FEW_TOKENS:
            return self.scores.topk(self.num_experts).values
        # torch sorts their places along, which takes 20 times as long.
        return torch.from_numpy(np.sort(self.scores.detach().numpy(), axis=-1)).flip(-1)

    @functools.cached_property
    def mass(self) -> Tensor:
        """S_j = q_1 + ... + q_j, the gate mass of the j best: [T, E]."""
        return self.ranked.exp().cumsum(-1)

    @functools.cached_property
    def tested(self) -> Tensor:
        """What the null is about, best first: the scores or the logits [T, E]."""
        if self.null.on_logits:
            return self.logits.to(self.scores.dtype).sort(dim=-1, descending=True).values
        return self.ranked

    def rejections(self, alpha: float, correction: float = 1.0) -> Tensor:
        """How many experts BH at alpha / correction picks: the largest k with s_(k) >= c_k, over all E ranks:
        [T]. UserError where the null rests on too few scores for so small an alpha."""
        table = critical_scores(self.null, alpha, correction, self.scores)
        return _last_true(self.tested >= table)

    @functools.cached_property
    def p_values(self) -> Tensor:
        """p-values of the experts, the smallest first, float64: [T, E]."""
        return self.null.p_values(self.tested)


Count = Callable[[Gates, Config], Tensor]  # (gates of T tokens, configuration of the layer) -> int64 [T]


@dataclass(frozen=True)
class Rule:
    """How many of a token's ranked experts run, before floor and cap."""

    name: str
    count: Count
    knob: Field  # moves the mean number of experts
    search: tuple[float, float]  # the values of the knob between which `match_experts` looks
    words: str
    source: str
    is_static: bool  # the same number for every token
    uses_null: bool  # asks for `Gates.rejections` or `Gates.p_values`
    uses_norms: bool  # asks for `Gates.relative_norms`
    uses_outputs: bool  # asks for `Gates.output_norms`: it runs every candidate
    smallest_knob: Callable[[Null, int], float] | None  # see `register_rule`

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields that a configuration by this rule takes."""
        null = (NULL_FIELD,) if self.uses_null else ()
        adaptive = () if self.is_static else ADAPTIVE_FIELDS
        return (self.knob, *null, *adaptive, WEIGHTS_FIELD, STAND_IN_FIELD, LAYERS_FIELD)


RULES: dict[str, Rule] = {}


def _check_search(name: str, knob: Field, search: tuple[float, float]) -> None:
    """UserError unless `search` is a range of values that the knob can have, all above 0."""
    try:
        lowest, highest = map(knob.parse, search)
        is_range = 0 < lowest < highest < math.inf
    except (ValueError, TypeError, OverflowError):
        is_range = False
    if not is_range:
        ends = f"two values of {knob.name} above 0, the smaller first ({knob.name} is {knob.allowed})"
        raise UserError(f"rule {name!r}: search = {search}, but it must be {ends}")


def register_rule(
    name: str,
    knob: Field,
    *,
    words: str,
    source: str = "",
    search: tuple[float, float] = (1e-6, 1.0),
    is_static: bool = False,
    uses_null: bool = False,
    uses_norms: bool = False,
    uses_outputs: bool = False,
    smallest_knob: Callable[[Null, int], float] | None = None,
) -> Callable[[Count], Count]:
    """Declare a rule; used as a decorator of its counting function, here or in a notebook.

    The rule is then a `method` of configurations everywhere. search: the knob's values, above 0, between
    which `--match-experts` looks. is_static: the knob is how many experts run. uses_*: what it asks of
    `Gates`. smallest_knob: where a null bounds the knob, (null, E) -> the smallest value at which anything
    can be rejected. A later rule of the same name takes the place of the earlier. Raises UserError for a name
    or a range that cannot be.

        @register_rule("half", Field("share", float, 0.5, lambda v: 0 < v <= 1, "a number in (0, 1]", "..."),
                       words="as many as have a gate of at least `share` over E")
        def half(gates, config):
            return (gates.scores.exp() >= config["share"] / gates.num_experts).sum(-1)
    """
    check_name(name, "rule")
    shared = (*ADAPTIVE_FIELDS, NULL_FIELD, WEIGHTS_FIELD, STAND_IN_FIELD, LAYERS_FIELD)
    if knob.name in ("method", "description", *(field.name for field in shared)):
        raise UserError(f"rule {name!r}: knob = {knob.name!r}, but it must be no field that others have")
    if not is_static:
        _check_search(name, knob, search)

    def register(count: Count) -> Count:
        RULES[name] = Rule(
            name=name,
            count=count,
            knob=knob,
            search=search,
            words=words,
            source=source,
            is_static=is_static,
            uses_null=uses_null or smallest_knob is not None,
            uses_norms=uses_norms,
            uses_outputs=uses_outputs,
            smallest_knob=smallest_knob,
        )
        return count

    return register


@register_rule(
    "topk",
    count_field("k", 8, "how many experts run"),
    words="the best k, always",
    source="static Top-K; llama.cpp `--override-kv ...expert_used_count`",
    is_static=True,
)
def _count_static(gates: Gates, config: Config) -> Tensor:
    return gates.scores.new_full(gates.scores.shape[:1], config["k"], dtype=torch.int64)


def by_correction(num_experts: int) -> float:
    """1 + 1/2 + ... + 1/E: BH at alpha over this is valid under any dependence."""
    return sum(1 / k for k in range(1, num_experts + 1))


_ALPHA = share_field("alpha", 0.05, "false-discovery-rate level of the step-up")


@register_rule(
    "bh",
    _ALPHA,
    words="as many as the Benjamini-Hochberg step-up rejects",
    source="Benjamini and Hochberg 1995, eq. 1",
    smallest_knob=lambda null, num_experts: null.smallest_alpha(num_experts),
)
def _count_bh(gates: Gates, config: Config) -> Tensor:
    return gates.rejections(config["alpha"])


@register_rule(
    "by",
    _ALPHA,
    words="BH at alpha / (1 + 1/2 + ... + 1/E), valid under any dependence",
    source="Benjamini and Yekutieli 2001, theorem 1.3",
    smallest_knob=lambda null, num_experts: null.smallest_alpha(num_experts) * by_correction(num_experts),
)
def _count_by(gates: Gates, config: Config) -> Tensor:
    return gates.rejections(config["alpha"], by_correction(gates.num_experts))


@register_rule(
    "top_p",
    share_field("p", 0.5, "gate mass to be reached"),
    words="as few as reach gate mass p",
    source="Huang et al. 2024, arXiv 2403.07652",
)
def _count_top_p(gates: Gates, config: Config) -> Tensor:
    # An expert runs while the mass of the better ones is below p.
    return (gates.mass < config["p"]).sum(-1) + 1


@register_rule(
    "min_p",
    share_field("ratio", 0.2, "share of the best gate"),
    words="those with at least `ratio` times the best gate",
    source="ik_llama.cpp, pull request 239; for K = 2 Lu et al. 2024, arXiv 2402.14800",
)
def _count_min_p(gates: Gates, config: Config) -> Tensor:
    best = gates.scores.amax(-1, keepdim=True)
    return (gates.scores >= best + math.log(config["ratio"])).sum(-1)


@register_rule(
    "threshold",
    share_field("threshold", 0.03, "least gate probability"),
    words="those with gate at least `threshold`",
    source="vLLM, issue 17150",
)
def _count_threshold(gates: Gates, config: Config) -> Tensor:
    return (gates.scores >= math.log(config["threshold"])).sum(-1)


@register_rule(
    "hc",
    share_field("ranks", 0.5, "share of the ranks, from the best, among which the maximum is sought"),
    words="Higher Criticism: the rank i where sqrt(E) (i/E - p_(i)) / sqrt(p_(i) (1 - p_(i))) is largest",
    source="Donoho and Jin 2004",
    search=(0.02, 1.0),
    uses_null=True,
)
def _count_hc(gates: Gates, config: Config) -> Tensor:
    num_experts = gates.num_experts
    rank = torch.arange(1, num_experts + 1, device=gates.scores.device)
    p = gates.p_values
    spread = (p * (1 - p)).sqrt()
    # Where a p-value is 0 or 1 the criterion is not defined: such a rank is none.
    criterion = ((rank / num_experts - p) / spread).masked_fill(spread == 0, -math.inf)
    last = max(1, math.ceil(config["ranks"] * num_experts))
    return criterion[:, :last].argmax(-1) + 1


@register_rule(
    "topk_p",
    share_field("p", 0.7, "share of the gate mass of the model's own Top-K to be reached"),
    words="as few as reach the share p of the gate mass of the model's own Top-K",
    source="top-p within the top-k: a patch to llama.cpp (AMG)",
)
def _count_topk_p(gates: Gates, config: Config) -> Tensor:
    own_mass = gates.mass[:, gates.own_k - 1, None]
    return (gates.mass[:, : gates.own_k] < config["p"] * own_mass).sum(-1).clamp(max=gates.own_k - 1) + 1


@register_rule(
    "relative_threshold",
    share_field("threshold", 0.08, "least share of the gate mass of the model's own Top-K"),
    words="those of the model's own Top-K whose share of its gate mass is at least `threshold`",
    source="DualSparse-MoE 2025, arXiv 2508.18376, 1T-Drop",
)
def _count_relative_threshold(gates: Gates, config: Config) -> Tensor:
    own = gates.ranked[:, : gates.own_k].exp()
    return (own >= config["threshold"] * own.sum(-1, keepdim=True)).sum(-1)


@register_rule(
    "contribution",
    share_field("threshold", 0.03, "least gate probability x relative norm of the expert's output"),
    words="as many as have gate x mean norm of the expert's output, over the layer's mean, of at least "
    "`threshold`",
    source="contribution scores of CocoRoF/moe_optimizer",
    uses_norms=True,
)
def _count_contribution(gates: Gates, config: Config) -> Tensor:
    return (gates.scores.exp() * gates.relative_norms >= config["threshold"]).sum(-1)


@register_rule(
    "entropy",
    rate_field("scale", 0.8, 0, 4, "how fast the number grows with the entropy"),
    words="min_k + (max_k - min_k) x scale x H(q) / log E, rounded",
    source="adaptive-k on PyPI, without its bins",
    search=(0.01, 3.99),
)
def _count_entropy(gates: Gates, config: Config) -> Tensor:
    entropy = torch.special.entr(gates.scores.exp()).sum(-1) / math.log(gates.num_experts)
    span = config["max_k"] - config["min_k"]
    return (config["min_k"] + span * config["scale"] * entropy).round().long()


@register_rule(
    "elbow",
    rate_field("slope", 1.0, 0, 10, "weight of the straight line from the best to the worst gate"),
    words="the rank i where (q_1 - q_i) / (q_1 - q_E) - slope x (i - 1) / (E - 1) is largest",
    source="moe-profiler, arXiv 2608.04401; slope 1 as published",
    search=(0.01, 9.99),
)
def _count_elbow(gates: Gates, config: Config) -> Tensor:
    gate = gates.ranked.exp()
    fall = (gate[:, :1] - gate) / (gate[:, :1] - gate[:, -1:]).clamp(min=torch.finfo(gate.dtype).tiny)
    line = torch.linspace(0, 1, gates.num_experts, device=gate.device, dtype=gate.dtype)
    return (fall - config["slope"] * line).argmax(-1) + 1


@register_rule(
    "gap",
    rate_field("ratio", 1.5, 1, 20, "ratio of two gates that follow each other"),
    words="those before the first gap: the first i with q_i / q_(i+1) of at least `ratio`",
    source="moe-profiler",
    search=(1.001, 19.99),
)
def _count_gap(gates: Gates, config: Config) -> Tensor:
    is_gap = gates.ranked[:, :-1] - gates.ranked[:, 1:] >= math.log(config["ratio"])  # [T, E - 1]
    first = is_gap.long().argmax(-1) + 1
    return first.masked_fill(~is_gap.any(-1), gates.num_experts)


@register_rule(
    "oracle",
    Field("threshold", float, 0.1, lambda value: 0 < value < 100, "a number in (0, 100)",
          "least norm of weight x output, over the mean of the token's own Top-K"),
    words="a bound, not a rule: runs every candidate, and keeps those of the model's own Top-K whose weight "
    "x output has a norm of at least `threshold` times the mean",
    source="control",
    search=(0.01, 10.0),
    uses_outputs=True,
)  # fmt: skip
def _count_oracle(gates: Gates, config: Config) -> Tensor:
    mean = gates.output_norms.sum(-1, keepdim=True) / gates.own_k
    return (gates.output_norms >= config["threshold"] * mean).sum(-1)


# What a configuration says


def _parse_field(about: str, field: Field, value: Any, num_layers: int | None) -> Any:
    """A field's value, one number or one a layer, checked and as plain Python."""
    if isinstance(value, tuple):
        value = list(value)
    is_list = field.varies_by_layer and isinstance(value, list)
    if is_list and num_layers is not None and len(value) != num_layers:
        has = f"{field.name} has {len(value)} values"
        raise UserError(f"{about}: {has}, but the model has {num_layers} MoE layers: give one for each")
    parsed = []
    for item in value if is_list else [value]:
        try:
            parsed.append(field.parse(item))
        except (ValueError, TypeError, OverflowError):
            also = ", or a list of such, one for each MoE layer" if field.varies_by_layer else ""
            raise UserError(
                f"{about}: {field.name} = {item!r}, but it must be {field.allowed}{also}"
            ) from None
    if is_list and not parsed:
        raise UserError(f"{about}: {field.name} is an empty list: give one value for each MoE layer")
    return parsed if is_list else parsed[0]


def _num_layers_told_apart(about: str, config: Config) -> int:
    """How many values the lists of a configuration have, 1 without lists. UserError where they differ."""
    lists = {name: value for name, value in config.items() if isinstance(value, list) and name != "layers"}
    if len(set(map(len, lists.values()))) > 1:
        lengths = ", ".join(f"{name} has {len(value)}" for name, value in lists.items())
        raise UserError(f"{about}: lists must have a value for each MoE layer, but {lengths}")
    return len(next(iter(lists.values()), [None]))


def layer_config(config: Config, layer_index: int) -> dict[str, Any]:
    """A resolved configuration as it is in one MoE layer: every number is one number."""
    return {
        name: value[layer_index] if isinstance(value, list) and name != "layers" else value
        for name, value in config.items()
    }


def count_bounds(config: Config) -> tuple[int, int]:
    """Floor and cap of the number of experts, of a configuration in one layer."""
    rule = RULES[config["method"]]
    if rule.is_static:
        return config[rule.knob.name], config[rule.knob.name]
    return config["min_k"], config["max_k"]


def _chosen_layers(about: str, chosen: str | list[int], num_layers: int) -> str | list[int]:
    """ "all", or the numbers of the MoE layers that `layers` chooses, if these are fewer. UserError for one
    that the model lacks."""
    if chosen == "all":
        return chosen
    numbered = chosen
    if isinstance(chosen, str):
        end, number = chosen.split()
        first = 0 if end == "first" else num_layers - int(number)
        numbered = list(range(first, first + int(number)))
    if not 0 <= min(numbered) <= max(numbered) < num_layers:
        raise UserError(
            f"{about}: layers = {chosen!r}, but the model has {num_layers} MoE layers, 0 to {num_layers - 1}"
        )
    return "all" if len(numbered) == num_layers else sorted(numbered)


def resolve_config(name: str, config: Config, num_layers: int | None = None) -> dict[str, Any]:
    """A routing configuration with its defaults filled in and its values checked, as plain Python.

    Returns a dict with `method`, every field of its rule, and `description`. A number may be a list, one
    value a MoE layer; with `num_layers` the lengths of lists and the numbers of layers are checked too.
    Raises UserError naming configuration, field, value and what is allowed.
    """
    check_name(name)
    about = f"configuration {name!r}"
    given = {field: value for field, value in config.items() if value is not None}
    description = given.pop("description", "")
    rule = RULES[_choice(f"method in {about}", given.pop("method", None), tuple(RULES))]
    takes = [field.name for field in rule.fields]
    unknown = sorted(set(given) - set(takes))
    if unknown:
        why = f"does not apply to method {rule.name!r}, which takes {', '.join(takes)}"
        raise UserError(f"{about}: {', '.join(unknown)} {why}")
    resolved = {"method": rule.name}
    for field in rule.fields:
        resolved[field.name] = _parse_field(about, field, given.get(field.name, field.default), num_layers)
    for layer in range(_num_layers_told_apart(about, resolved)):
        floor, cap = count_bounds(layer_config(resolved, layer))
        if floor > cap:
            raise UserError(f"{about}: min_k = {floor} is above max_k = {cap}")
    if resolved["stand_in"] != "nothing" and resolved["renormalize"] != "model":
        raise UserError(f"{about}: stand_in goes with renormalize = 'model', not {resolved['renormalize']!r}")
    if num_layers is not None:
        resolved["layers"] = _chosen_layers(about, resolved["layers"], num_layers)
    return resolved | {"description": str(description)}


def _chosen_null(config: Config) -> dict[str, Any]:
    """The null of a configuration, which --p-values may have chosen, if it takes one."""
    return {"p_values": config["p_values"]} if "p_values" in config else {}


def with_own_k(name: str, config: Config, own_k: int) -> dict[str, Any]:
    """A configuration of BUILT_IN, resolved, on a model whose own K is `own_k`: the baseline runs as many,
    the others at most as many, so that static Top-K up to the model's own can be their measure."""
    if name == BASELINE:
        return {**config, "k": own_k, "description": f"Fixed Top-{own_k}, the baseline: the model's own K"}
    if config["max_k"] <= own_k:
        return dict(config)
    words = f"{config['description']}; " if config["description"] else ""
    return {**config, "max_k": own_k, "description": f"{words}at most {own_k}, the model's own K"}


def is_routed(config: Config, layer_index: int) -> bool:
    """Whether a configuration, resolved for its model, routes a MoE layer or leaves it alone."""
    return config["layers"] == "all" or layer_index in config["layers"]


def static_k(config: Config) -> int | None:
    """The k of a configuration that is plain static Top-k, a point of the static curve; None for any other.

    What a configuration is follows from what it does, never from its name.
    """
    is_plain = (
        config.get("method") == "topk"
        and config.get("renormalize", "model") == "model"
        and config.get("stand_in", "nothing") == "nothing"
        and config.get("layers", "all") == "all"
    )
    if not is_plain:
        return None
    k = config["k"]
    if isinstance(k, list):
        return k[0] if len(set(k)) == 1 else None
    return k


def layer_null(
    config: Config, layer_index: int, num_experts: int, calibration: Calibration | None
) -> Null | None:
    """The null of one layer for a configuration of that layer; None where its rule needs none."""
    if "p_values" not in config:
        return None
    return NULLS[config["p_values"]].make(calibration, layer_index, config["temperature"], num_experts)


def uses_calibrated_null(config: Config) -> bool:
    return "p_values" in config and NULLS[config["p_values"]].is_calibrated


def uses_calibrated_outputs(config: Config) -> bool:
    return RULES[config["method"]].uses_norms or config["stand_in"] == "mean"


def needs_calibration(config: Config) -> bool:
    """Whether a resolved configuration rests on anything that was measured on calibration text."""
    is_linear = linear_rank(config["stand_in"]) is not None
    return uses_calibrated_null(config) or uses_calibrated_outputs(config) or is_linear


def configuration_cell(config: Config) -> str:
    """A resolved configuration as a table holds it: JSON, without the description."""
    return json.dumps({name: value for name, value in config.items() if name != "description"})


def _best_experts(gates: Gates, number: int) -> Tensor:
    """The experts with the `number` highest scores, best first, ties to the lower index: [..., number]."""
    best = gates.scores.topk(number).indices
    # Which of equal scores comes first, topk leaves open: tokens that have such are sorted.
    is_tied = (gates.ranked[..., : number + 1].diff(dim=-1) == 0).any(-1)
    if is_tied.any():
        best[is_tied] = gates.scores[is_tied].argsort(dim=-1, descending=True, stable=True)[..., :number]
    return best


def _explain_nan_scores(router_logits: Tensor, temperature: float) -> None:
    """UserError: which of the reasons there are makes scores NaN."""
    if torch.isnan(router_logits).any() or torch.isposinf(router_logits).any():
        raise UserError("router_logits must not contain NaN or +inf")
    if torch.isneginf(router_logits).all(dim=-1).any():
        raise UserError("router_logits has a token whose experts are all -inf; at least one must be allowed")
    raise UserError(f"router_logits / temperature passes float32: temperature = {temperature} is too low")


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
    settings = {"method": "bh", "alpha": alpha, "temperature": temperature, "min_k": min_k, "max_k": max_k}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):  # which a configuration may have, one value a layer
            raise UserError(f"{name} = {value!r}, but it must be one number: the logits are of one layer")
    config = resolve_config("benjamini_hochberg_routing", settings)
    scores = gate_scores(router_logits, config["temperature"])  # [..., E]
    if torch.isnan(scores).any():
        _explain_nan_scores(router_logits, temperature)

    num_experts = router_logits.shape[-1]
    logits = router_logits.to(scores.dtype) / config["temperature"]
    gates = Gates(scores, null or _closed_form(FlatNull, num_experts), logits)
    rejections = gates.rejections(config["alpha"])  # [...]
    wanted = rejections.clamp(config["min_k"], config["max_k"]).unsqueeze(-1)  # [..., 1]

    width = min(config["max_k"], num_experts)
    best = _best_experts(gates, width)  # [..., width]
    best_scores = scores.gather(-1, best)
    rank = torch.arange(width, device=scores.device)
    is_kept = (rank < wanted) & (best_scores > -math.inf)  # [..., width]
    num_selected = is_kept.sum(-1)
    kept_weights = torch.softmax(best_scores.masked_fill(~is_kept, -math.inf), dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, best, kept_weights)  # [..., E]
    padding = (0, config["max_k"] - width)
    experts = nn.functional.pad(best.masked_fill(~is_kept, -1), padding, value=-1)  # [..., max_k]
    if not return_stats:
        return weights, experts, num_selected
    statistics = {
        "p_values": gates.null.p_values(logits if gates.null.on_logits else scores),
        "thresholds": bh_levels(alpha, num_experts),
        "rejections": rejections,
    }
    return weights, experts, num_selected, statistics


# ---------------------------------------------------------------------------------------------------------
# 5. Routers: found in a model, and understood by what they do
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoELayer:
    """One router and the experts it feeds, as found in a model by looking at what they do."""

    index: int  # among the MoE layers of the model, from 0: what tables by layer go by
    num_layers: int  # how many MoE layers the model has
    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int  # E
    own_k: int  # the model's own K
    knob: tuple[Any, str] | None  # the object and attribute that set K; without one, K cannot be raised
    is_ranked: bool  # whether candidates come best first
    topk_call: int | None  # which of the router's calls of `topk` picks the candidates, where it calls that
    scaled_by: str | None  # whose sum scales the kept: "weights", "scores" of that topk, or nothing
    returns_probabilities: bool  # whether the first output is not logits but their softmax
    device: torch.device  # where it computes
    hidden_size: int  # H
    expert_size: int  # weights of one expert: its multiplications for a token

    @property
    def max_k(self) -> int:
        """The most experts that it can run."""
        return self.num_experts if self.knob else self.own_k

    @property
    def knob_id(self) -> Any:
        """The same for layers whose K hangs on one object."""
        return (id(self.knob[0]), self.knob[1]) if self.knob else self.index

    def logits(self, first_output: Tensor) -> Tensor:
        """Router logits [T, E] from the router's first output."""
        return first_output.log() if self.returns_probabilities else first_output


@dataclass(frozen=True)
class Candidates:
    """The experts that a router picked for T tokens: three tensors [T, K]."""

    weights: Tensor
    indices: Tensor
    scores: Tensor | None  # of the topk that picked them; None where the router calls no topk

    @property
    def k(self) -> int:
        return self.indices.shape[1]


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
        matching = [i for i, (_, picked, _) in enumerate(self.calls) if torch.equal(picked, indices)]
        return matching[-1] if matching else None

    def scores(self, call: int | None) -> Tensor | None:
        return None if call is None else self.calls[call][0]


class _NotPatchable(Exception):
    """Why a router cannot be patched."""


_PATCHING = threading.RLock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time: to look at a model changes it for a moment, and a patch is many steps."""
    with _PATCHING:
        yield


_HOLDERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # model -> its lock


@contextlib.contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """The model for this thread inside the block; UserError where another thread holds it.

    What is measured without a patch, calibration for example, is wrong if another thread patches the model
    meanwhile, or looks at it: both change it.
    """
    with _alone():
        lock = _HOLDERS.setdefault(model, threading.RLock())
    is_held = False
    try:
        is_held = lock.acquire(blocking=False)
        if not is_held:
            kind = type(model).__name__
            raise UserError(f"this {kind} is at work in another thread: wait for it, or load the model again")
        yield
    finally:
        if is_held:
            lock.release()


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


def _refuse_other_forward(name: str, module: nn.Module, forward: Callable) -> None:
    """UserError where somebody put another `forward` in the place of this one: that one is gone when the old
    one is put back, and what it kept to put back is of no use."""
    if vars(module).get("forward") is not forward:
        raise UserError(
            f"{name}: its forward was replaced while it was patched, by an accelerate hook for example; "
            "add hooks before the block, or take them off in it"
        )


def _replace_forward(stack: contextlib.ExitStack, name: str, module: nn.Module, forward: Callable) -> None:
    """Set a module's `forward` until the stack closes, which looks whether it is still there."""
    _replace(stack, module, "forward", forward)
    # Of the stack itself: a `with` of its own would leave the patch behind, if Ctrl-C came where that ends.
    stack.callback(_refuse_other_forward, name, module, forward)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; each module that trained before trains again after it."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if module.training:
                _replace(stack, module, "training", False)
        yield


ModuleCall = tuple[tuple, dict[str, Any]]  # args and kwargs of a module's forward


def _router_output(router: nn.Module, call: ModuleCall) -> tuple[Tensor, Candidates, _TopK]:
    """Logits [T, E], candidates, calls of topk of a router. _NotPatchable where it returns something else."""
    args, kwargs = call
    with _TopK() as topk:
        output = router(*args, **kwargs)
    parts = output if isinstance(output, tuple) else (output,)
    is_known = len(parts) == 3 and all(isinstance(part, Tensor) and part.ndim == 2 for part in parts)
    if is_known:
        logits, weights, indices = parts
        is_known = weights.shape == indices.shape and indices.shape[1] < logits.shape[1]
        is_known = is_known and not indices.is_floating_point()
    if not is_known:
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise _NotPatchable(
            f"it returns {shapes}, not logits [T, E], weights [T, K], indices [T, K] with K < E"
        )
    scores = topk.scores(topk.position(indices))
    return logits, Candidates(weights, indices, scores), topk


def _check_experts(experts: Any, call: ModuleCall | None, picked: Candidates) -> None:
    """_NotPatchable unless the experts take (hidden, indices, weights), and one expert for a token."""
    args, kwargs = call or ((), {})
    shapes = [getattr(part, "shape", None) for part in args[1:3]]
    if shapes != [picked.indices.shape, picked.weights.shape]:
        raise _NotPatchable("no `experts` beside it is called with (hidden, indices, weights)")
    hidden = args[0]
    rest = args[3:]
    try:  # one row for each pair of token and expert: how dropped experts are skipped
        experts(hidden, picked.indices[:, :1], picked.weights[:, :1], *rest, **kwargs)
    except Exception as error:
        raise _NotPatchable(
            f"its experts cannot run one expert for a token ({_first_line(error)})"
        ) from error


def _whole_numbers(router: nn.Module, value: int) -> Iterator[tuple[Any, str]]:
    """(object, attribute) of every whole number `value` that a router, or something it holds, has."""
    for owner in (router, *vars(router).values()):
        for name, held in list(getattr(owner, "__dict__", {}).items()):
            if type(held) is int and held == value:
                yield owner, name


def _find_knob(router: nn.Module, call: ModuleCall, own_k: int) -> tuple[tuple[Any, str], Candidates] | None:
    """What sets K, as (object, attribute), and the candidates at another K; None where nothing does.

    Found by setting each whole number that equals K to another one and counting the candidates.
    """
    other_k = max(1, own_k // 2) if own_k > 1 else 2
    for owner, name in _whole_numbers(router, own_k):
        # Any failure only says that this number is something else.
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
            _replace(stack, owner, name, other_k)
            _, candidates, _ = _router_output(router, call)
            if candidates.k == other_k:
                return (owner, name), candidates
    return None


def _values_for(few: Candidates, many: Candidates, values: Tensor, num_experts: int) -> Tensor:
    """What `values` [T, K] of the many candidates are for the few: [T, k]; NaN for one not among them."""
    by_expert = values.new_full((len(values), num_experts), math.nan, dtype=torch.float32)
    return by_expert.scatter(1, many.indices, values.float()).gather(1, few.indices)


def _explain_weights(few: Candidates, many: Candidates, num_experts: int) -> tuple[str | None, float]:
    """How the weights at a smaller K follow from those at a larger: whose sum scales them, and the error.

    The error is the largest over tokens, as a share of the token's largest weight; infinite where the few
    are not among the many. Tokens whose choice is a tie do not count unless they are most of them.
    """
    unscaled = _values_for(few, many, many.weights, num_experts)  # [T, k]
    nested = ~unscaled.isnan().any(1)  # [T]
    if nested.float().mean() <= 0.5:
        return None, math.inf
    guesses = {None: unscaled}
    for name, values in (("weights", many.weights), ("scores", many.scores)):
        if values is not None:
            of_many = values.float().sum(1, keepdim=True)
            of_few = _values_for(few, many, values, num_experts).sum(1, keepdim=True)
            guesses[name] = unscaled * (of_many / of_few)
    actual = few.weights.float()
    largest = actual.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)  # [T]
    errors = {}
    for name, guess in guesses.items():
        error = ((actual - guess).abs().amax(1) / largest)[nested].amax().item()
        errors[name] = math.inf if math.isnan(error) else error
    rounding = max(1e-5, 2 * torch.finfo(few.weights.dtype).eps)  # below it the simplest is taken
    best = min(errors, key=lambda name: max(errors[name], rounding))
    return best, errors[best]


def _inspect(
    index: int,
    num_layers: int,
    name: str,
    router: nn.Module,
    experts: Any,
    calls: Mapping[nn.Module, ModuleCall],
) -> MoELayer:
    """A layer's router and experts, from what they do with the inputs they were seen to get."""
    call = calls[router]
    logits, candidates, topk = _router_output(router, call)
    num_experts = logits.shape[1]
    _check_experts(experts, calls.get(experts), candidates)

    topk_call = topk.position(candidates.indices)
    is_ranked = True if topk_call is None else topk.calls[topk_call][2]
    if topk_call is None and not (logits.gather(1, candidates.indices).diff(dim=1) <= 0).all():
        raise _NotPatchable("it returns its candidates in an order that cannot be told")

    found = _find_knob(router, call, candidates.k)
    if found is None and candidates.k == 1:
        raise _NotPatchable("it picks one expert: there is nothing to drop, and it cannot be asked for more")
    knob = None
    scaled_by = None
    if found is not None:
        knob, others = found
        few, many = sorted((candidates, others), key=lambda picked: picked.k)
        scaled_by, error = _explain_weights(few, many, num_experts)
        if error >= 0.05:  # more than 16-bit rounding
            at = f"K = {others.k} do not follow from those at K = {candidates.k}"
            raise _NotPatchable(f"its weights at {at}, nor by scaling them")
    sums = logits.float().sum(1)
    are_probabilities = bool((logits >= 0).all()) and torch.allclose(sums, sums.new_ones(()), atol=0.01)
    return MoELayer(
        index=index,
        num_layers=num_layers,
        name=name,
        router=router,
        experts=experts,
        num_experts=num_experts,
        own_k=candidates.k,
        knob=knob,
        is_ranked=is_ranked,
        topk_call=topk_call,
        scaled_by=scaled_by,
        returns_probabilities=are_probabilities,
        device=logits.device,
        hidden_size=calls[experts][0][0].shape[-1],
        expert_size=sum(weight.numel() for weight in experts.parameters()) // num_experts,
    )


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


def _declared_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> router, by the architecture's own declaration: `_can_record_outputs["router_logits"]`."""
    declared: list[tuple[type, str]] = []  # class of the routers, and a part of their names
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            kind = getattr(entry, "target_class", entry)
            part = getattr(entry, "layer_name", None) or ""
            if isinstance(kind, type):
                declared.append((kind, f".{part.strip('.')}." if part else ""))
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(module, kind) and part in f".{name}." for kind, part in declared)
    }


@torch.no_grad()
def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a transformers model, in order, by the architecture's own declaration.

    What the routers return, and what they make of another K, is found by running eight tokens. No list of
    architectures or of attribute names is needed. Raises UserError, in one line, for a model that cannot be
    patched.
    """
    with _alone(), holding(model):
        return _find_moe_layers(model)


def _find_moe_layers(model: nn.Module) -> list[MoELayer]:
    routers = _declared_routers(model)
    for name, router in routers.items():
        _refuse_patched(name, router)
    experts = {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None) for name in routers
    }
    layers = []
    with evaluating(model):
        calls = _observed_calls(model, [*routers.values(), *experts.values()])
        called = [(name, router) for name, router in routers.items() if router in calls]
        for index, (name, router) in enumerate(called):
            try:
                layers.append(_inspect(index, len(called), name, router, experts[name], calls))
            except _NotPatchable as error:
                kind = type(router).__name__
                raise UserError(f"{name} ({kind}) cannot be patched: {error}") from error
    kind = type(model).__name__
    if not layers:
        raise UserError(
            f"{kind} has no router that this script can patch: it needs a mixture-of-experts model of "
            "transformers >= 5.17 that declares one, for example OLMoE (see --list-architectures)"
        )
    for field in ("num_experts", "own_k"):
        values = {getattr(layer, field) for layer in layers}
        if len(values) > 1:
            raise UserError(f"{kind} has layers that differ in {field}: {sorted(values)}")
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


# Models that bring quantised weights: `quant_method` of config.json -> what was run, and what came of it. By
# the tests, on tiny models on a CPU. The seam itself does not ask for the format.
QUANTIZED_WEIGHTS = {
    "fp8": "taken: fine-grained FP8. transformers unpacks it on a CPU, and on a GPU that has no FP8. With "
    "its FP8 kernels on a newer GPU: not run",
    "mxfp4": "taken: GPT-OSS, unpacked to `--dtype`, four times the memory or more: its kernels, which come "
    "from the hub, choose the experts themselves, so the seam cannot",
    "bitsandbytes": "taken: 8 bits, and 4 bits as FP4 or NF4 with nested scales, with bitsandbytes 0.50. It "
    "packs linear layers, here attention; experts and router stay as they are",
    "compressed-tensors": "taken: FP8 weights with a scale for each row, with compressed-tensors 0.20; "
    "attention and experts are unpacked. Its other formats: not run",
    "torchao": "taken: int8 and float8 weights, int8 activations, of linear layers likewise, with torchao "
    "0.18. Packed experts: float8 with grouped_mm or eager, int8 with eager only; elsewhere torchao lacks an "
    "operation, and the model is refused. int4: not run",
}


def list_architectures() -> list[dict[str, str]]:
    """The causal language models of the installed transformers that declare a router, and what is known."""
    auto = transformers.models.auto
    types = collections.defaultdict(list)
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
# hands weights and indices to an experts module. The seam wraps both on the instance. The router is asked for
# its K best candidates, so that scoring, bias, grouping and scaling stay the model's own; the rule says how
# many stay; the weights of the others become zero. The experts see only the pairs with a weight. So a zero
# weight *is* a dropped expert, and any reader of the router's output sees a valid routing. What stands in for
# dropped experts, if anything, is added beside.


def sum_of_pairs(pair_output: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """The sum of each token's rows, at least in float32: pair_output [P, H], token [P] ascending -> [T, H].

    Each token's rows are added in their order, as a sum over slots [T, K, H] would be, of which most are
    empty. Not by `index_add_`, whose order on a GPU changes from run to run.
    """
    wide = pair_output.to(torch.promote_types(pair_output.dtype, torch.float32))
    first = torch.searchsorted(token, torch.arange(num_tokens, device=token.device))
    rows = torch.arange(len(token), device=token.device)
    return nn.functional.embedding_bag(rows, wide, first, mode="sum")


class _LayerRouting:
    """The routing of one layer by a configuration: what the `forward` of its router, and that of its experts,
    do instead."""

    def __init__(
        self,
        layer: MoELayer,
        config: Config,
        width: int,
        calibration: Calibration | None,
        observe: Callable[[Tensor], None],
        find_tokens: Callable[[int], Tensor],
    ):
        """config: of this layer, resolved. width: K, how many candidates the router returns. observe: called
        with the counts [T] before floor and cap. find_tokens: T -> which of these are no padding [T]."""
        self.layer = layer
        self.config = config
        self.observe = observe
        self.find_tokens = find_tokens
        self.rule = RULES[config["method"]]
        floor, cap = count_bounds(config)
        self.floor = min(floor, layer.max_k)
        self.cap = min(cap, layer.max_k)
        self.temperature = config.get("temperature", 1.0)
        self.shuffles = config.get("shuffle", False)
        self.is_random = config.get("random", False)
        self.weight_sum = self._weight_sum()
        self.sums_scores = self.weight_sum in ("candidates", "own_share") and layer.scaled_by == "scores"
        # The scores that chose are looked at only where they are needed: watching costs time for each token.
        self.watches_topk = self.sums_scores or not layer.is_ranked
        self.ranks = torch.arange(width, device=layer.device)
        self.null = layer_null(config, layer.index, layer.num_experts, calibration)
        # One that has measured nothing says what is missing.
        measured = calibration or Calibration(torch.empty(0), torch.empty(0))
        self.relative_norms = None
        if self.rule.uses_norms:
            self.relative_norms = measured.relative_norms(layer.index).to(layer.device)
        self.stand_in: StandIn | None = None
        if config["stand_in"] != "nothing":
            weight = next(layer.experts.parameters())
            stand_in = measured.stand_in(layer.index, config["stand_in"])
            self.stand_in = stand_in.to(layer.device, weight.dtype)
        self.replaced: Tensor | None = None  # weights [T, K] of what was dropped in the call that is at work
        # Asked once beforehand, so that what cannot work is refused before anything runs.
        even = torch.zeros(1, layer.num_experts, device=layer.device)
        self.count(even, torch.ones(1, width, device=layer.device))

    def _weight_sum(self) -> str:
        """What kept weights are scaled to: `renormalize`, and what "model" is for this layer."""
        if self.config["renormalize"] != "model":
            return self.config["renormalize"]
        if not self.layer.scaled_by:
            return "none"
        # As if the model had been asked for fewer: the kept take over the sum of all candidates. Where
        # something stands in for the dropped, each has the weight that the model's own Top-K gives it.
        return "candidates" if self.config["stand_in"] == "nothing" else "own_share"

    def count(self, logits: Tensor, output_norms: Tensor | None) -> Tensor:
        """How many experts the rule wants, before floor and cap: logits [T, E] -> [T]."""
        gates = Gates(
            gate_scores(logits, self.temperature),
            self.null,
            logits if self.temperature == 1 else logits / self.temperature,
            self.layer.own_k,
            self.relative_norms,
            output_norms,
        )
        return self.rule.count(gates, self.config)

    def rank_by_router(self, candidates: Candidates) -> Tensor:
        """Each candidate's rank from 0 by the router's own choice: [K], or [T, K] where they come in any
        order."""
        if self.layer.is_ranked:
            return self.ranks
        return candidates.scores.argsort(dim=-1, descending=True, stable=True).argsort()

    def output_norms(self, experts_forward: Callable, hidden: Tensor, candidates: Candidates) -> Tensor:
        """The norm of weight x output of each candidate of the model's own Top-K, each expert run by itself;
        0 for the others: [T, K]."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        norms = [
            experts_forward(hidden, indices[:, None], weights[:, None]).float().norm(dim=-1)
            for indices, weights in zip(candidates.indices.T, candidates.weights.T, strict=True)
        ]
        is_wider = self.rank_by_router(candidates) >= self.layer.own_k
        return torch.stack(norms, dim=1).masked_fill(is_wider, 0)

    def rank(self, candidates: Candidates, output_norms: Tensor | None) -> Tensor:
        """Each candidate's rank from 0, by which it is kept or dropped: [K] or [T, K]."""
        if self.is_random:
            generator = torch.Generator().manual_seed(self.layer.index)
            order = torch.rand(candidates.indices.shape, generator=generator).to(self.layer.device)
            order = order.masked_fill(self.rank_by_router(candidates) >= self.layer.own_k, math.inf)
            return order.argsort(dim=-1).argsort()
        if output_norms is not None:
            return output_norms.argsort(dim=-1, descending=True, stable=True).argsort()
        return self.rank_by_router(candidates)

    def scaled_weights(self, candidates: Candidates, rank: Tensor, dropped: Tensor) -> Tensor:
        """The weights of all candidates, scaled as `renormalize` says for those that are kept: [T, K]."""
        if self.weight_sum == "none":
            return candidates.weights
        shares = candidates.scores if self.sums_scores else candidates.weights
        kept_total = shares.masked_fill(dropped, 0).sum(-1, keepdim=True)
        own_total = shares.masked_fill(rank >= self.layer.own_k, 0).sum(-1, keepdim=True)
        total = 1.0
        if self.weight_sum in ("candidates", "own_share"):
            total = shares.sum(-1, keepdim=True)
        elif self.weight_sum == "topk_mass":
            total = own_total
        # With nothing dropped the factor of "candidates" is exactly 1, and with the model's own K asked for
        # that of "own_share".
        factor = total / (own_total if self.weight_sum in ("own_share", "own_k") else kept_total)
        return (candidates.weights * factor).to(candidates.weights.dtype)

    def shuffled(self, count: Tensor) -> Tensor:
        """The counts [T, 1] permuted over the tokens of the call; padding keeps its own."""
        token = self.find_tokens(len(count)).nonzero()[:, 0].to(count.device)
        generator = torch.Generator().manual_seed(self.layer.index)
        order = torch.randperm(len(token), generator=generator).to(count.device)
        return count.index_copy(0, token, count[token[order]])

    def wrap_router(self, forward: Callable, experts_forward: Callable) -> Callable:
        """A `forward` for the router: its own candidates, those beyond the rule's count with weight zero."""

        @functools.wraps(forward)
        def adaptive_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            with _TopK() if self.watches_topk else contextlib.nullcontext() as topk:
                first, weights, indices = forward(*args, **kwargs)  # [T, E], [T, K], [T, K]
            scores = topk.scores(self.layer.topk_call) if self.watches_topk else None
            candidates = Candidates(weights, indices, scores)
            output_norms = None
            if self.rule.uses_outputs:
                output_norms = self.output_norms(experts_forward, args[0], candidates)  # [T, K]
            wanted = self.count(self.layer.logits(first), output_norms)  # [T]
            self.observe(wanted)
            count = wanted.clamp(self.floor, self.cap).unsqueeze(-1)  # [T, 1]
            if self.shuffles:
                count = self.shuffled(count)
            rank = self.rank(candidates, output_norms)
            dropped = rank >= count  # [T, K]
            scaled = self.scaled_weights(candidates, rank, dropped)
            if self.stand_in is not None:
                self.replaced = scaled.masked_fill(~dropped | (rank >= self.layer.own_k), 0)
            return first, scaled.masked_fill(dropped, 0), indices

        return adaptive_forward

    def wrap_experts(self, forward: Callable) -> Callable:
        """A `forward` for the experts that computes only the (token, expert) pairs whose weight is not zero,
        and adds what stands in for the others.

        Each kept pair becomes one row with K = 1, so the model's own experts do the work on every back end.
        With nothing dropped the original runs as it is and the result is bit-identical.
        """

        @functools.wraps(forward)
        def skipping_forward(
            hidden: Tensor, indices: Tensor, weights: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            replaced = self.replaced
            self.replaced = None
            token, slot = weights.nonzero(as_tuple=True)  # [P] pairs; the only wait for a GPU
            if len(slot) == weights.numel():
                return forward(hidden, indices, weights, *args, **kwargs)
            if len(weights) == 1:  # one token, as in decoding: the same as a smaller K
                kept_indices = indices.index_select(1, slot)  # [1, P]
                kept_weights = weights.index_select(1, slot)  # [1, P]
                output = forward(hidden, kept_indices, kept_weights, *args, **kwargs)
            else:
                pair_indices = indices[token, slot, None]  # [P, 1]
                pair_weights = weights[token, slot, None]  # [P, 1]
                pair_hidden = hidden.index_select(0, token)  # [P, H]
                pair_output = forward(pair_hidden, pair_indices, pair_weights, *args, **kwargs)
                output = sum_of_pairs(pair_output, token, len(hidden)).to(hidden.dtype)
            if replaced is not None:
                output = output + self.stand_in.output(hidden, indices, replaced)
            return output

        return skipping_forward


# A decision is one token in one layer; c is the number of experts that ran in it.
ROUTING_COLUMNS = (
    Column("avg_experts_per_token", float, "mean of c over all decisions",
           metric=Metric("experts per token and layer", "", 2)),
    Column("effective_experts", float,
           "`avg_experts_per_token`, and for each expert of the model's own Top-K that something stands in "
           "for its share of an expert's multiplications: the compute that is compared"),
    Column("std_experts_per_token", float, "standard deviation of c over all decisions (population)"),
    Column("min_experts", int, "least c"),
    Column("max_experts", int, "most c"),
    Column("expert_utilization_cv", float,
           "per layer, standard deviation / mean of the use of all E experts, unused ones included; mean "
           "over layers. 0 is perfect balance",
           metric=Metric("load imbalance, CV over experts", "", 2)),
    Column("expert_utilization_max_min_ratio", float,
           "per layer, use of the most used / least used expert, an unused one counted as used once; mean "
           "over layers",
           metric=Metric("most to least used expert", "", 1)),
    Column("floor_frac", float, "share of decisions with c = `min_k`; empty for Top-K"),
    Column("cap_frac", float, "share of decisions with c = `max_k`; empty for Top-K"),
    Column("zero_rejection_frac", float,
           "share of decisions in which the rule chose no expert, so that `min_k` decided; empty for Top-K"),
    Column("gate_mass_frac", float,
           "mean over decisions of the share of softmax(router logits) that the experts which ran have"),
)  # fmt: skip
# What that costs, by the shapes of the model's own parameters. Experts are those that the router picks from,
# with the share of what stands in for the dropped. All else is used by every token: embeddings, attention,
# norms, routers, shared experts, dense layers and the head.
COMPUTE_COLUMNS = (
    Column("total_parameters", int, "parameters of the model, a tensor that is used twice once"),
    Column("active_parameters", float,
           "of these, what a token uses, mean over tokens: all but the experts that did not run, and what is "
           "no part of the text decoder. Embedding tables in full, as models are named in the field"),
    Column("active_expert_parameters", float, "of the active, those of the experts that ran"),
    Column("expert_flops_per_token", float,
           "floating-point operations of these experts for a token: 2 for each multiply-add, 1 for a bias"),
    Column("weight_bytes_per_token", float,
           "bytes of weights that are read to decode one token: of the active, with one row of an embedding "
           "table that is not the head's as well. Where text was generated: of the tokens after the prefill"),
)  # fmt: skip
LAYER_COLUMNS = (
    *ROUTING_COLUMNS,
    Column("use_entropy_bits", float, "entropy of the use of the E experts; log2(E) when even"),
    Column("num_tokens", int, "decisions counted"),
)


def stand_in_multiplications(hidden_size: int, rank: int) -> int:
    """For one token and expert, of a `StandIn` of this rank; the mean has rank 0."""
    return hidden_size + 2 * hidden_size * rank


def stand_in_cost(stand_in: str, layer: MoELayer) -> float:
    """What stands in for one dropped expert costs, as a share of that expert's multiplications."""
    if stand_in == "nothing":
        return 0.0
    return stand_in_multiplications(layer.hidden_size, linear_rank(stand_in) or 0) / layer.expert_size


MASS_UNIT = 2**32  # gate mass is summed in whole numbers: exact, and the same in any order


def _packed(values: np.ndarray) -> str:
    """Whole numbers as text for a checkpoint."""
    return base64.b85encode(zlib.compress(values.tobytes())).decode()


def _unpacked(text: str, kind: str) -> np.ndarray:
    """What `_packed` wrote: [n] of a numpy type."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), kind)


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routers of L layers did with some tokens, as int64 sums; those of two texts add up.

    counts [L, E + 1]: tokens by the number of experts that ran. use [L, E]: times each expert ran. unchosen
    [L]: tokens for which the rule chose no expert. mass [L]: gate mass of the experts that ran, in 1 /
    MASS_UNIT.
    """

    counts: np.ndarray
    use: np.ndarray
    unchosen: np.ndarray
    mass: np.ndarray
    config: Config  # resolved
    layers: tuple[MoELayer, ...]  # the MoE layers that the rows are of

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(
            counts=self.counts + other.counts,
            use=self.use + other.use,
            unchosen=self.unchosen + other.unchosen,
            mass=self.mass + other.mass,
            config=self.config,
            layers=self.layers,
        )

    def by_layer(self) -> pd.DataFrame:
        """LAYER_COLUMNS, one row a layer that saw a token."""
        measures = self._decision_measures(self._sums()) | self._use_measures()
        index = pd.Index([layer.index for layer in self.layers], name="layer")
        frame = pd.DataFrame(measures, index=index)
        frame = frame.loc[frame["num_tokens"] > 0, [column.name for column in LAYER_COLUMNS]]
        return frame.astype({column.name: column.kind for column in LAYER_COLUMNS})

    def row(self) -> dict[str, Any]:
        """ROUTING_COLUMNS over all layers, as plain numbers; all None if no token came by."""
        if not self.counts.any():
            return {column.name: None for column in ROUTING_COLUMNS}
        over_layers = {name: values.sum(0, keepdims=True) for name, values in self._sums().items()}
        of_use = {name: values.mean(keepdims=True) for name, values in self._use_measures().items()}
        measures = self._decision_measures(over_layers) | of_use
        return strict_json({column.name: measures[column.name][0] for column in ROUTING_COLUMNS})

    @property
    def effective_experts(self) -> np.ndarray:
        """Mean effective experts of a token by layer [L]; 0 in a layer that no token came by."""
        sums = self._sums()
        ran = sums["counts"] @ np.arange(self.counts.shape[1])
        return (ran + sums["stand_ins"]) / sums["counts"].sum(1).clip(min=1)

    def _sums(self) -> dict[str, np.ndarray]:
        """What may be added over layers, one entry a layer."""
        number = np.arange(self.counts.shape[1])
        stand_ins = np.zeros(len(self.layers))  # what stood in for dropped experts, in experts
        names = ("adaptive_decisions", "at_floor", "at_cap", "unchosen")
        adaptive = {name: np.zeros(len(self.layers), dtype=np.int64) for name in names}
        is_adaptive = not RULES[self.config["method"]].is_static
        for row, layer in enumerate(self.layers):
            if not is_routed(self.config, layer.index):
                continue
            dropped = (layer.own_k - number).clip(min=0)
            stand_ins[row] = self.counts[row] @ dropped * stand_in_cost(self.config["stand_in"], layer)
            if is_adaptive:
                floor, cap = count_bounds(layer_config(self.config, layer.index))
                adaptive["adaptive_decisions"][row] = self.counts[row].sum()
                adaptive["at_floor"][row] = self.counts[row, min(floor, layer.max_k)]
                adaptive["at_cap"][row] = self.counts[row, min(cap, layer.max_k)]
                adaptive["unchosen"][row] = self.unchosen[row]
        return {"counts": self.counts, "mass": self.mass, "stand_ins": stand_ins, **adaptive}

    @staticmethod
    def _decision_measures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns from what `_sums` gives, or from its sums over layers."""
        counts = sums["counts"]
        number = np.arange(counts.shape[1])
        tokens = counts.sum(1)
        occurs = counts > 0
        with np.errstate(invalid="ignore"):  # nothing seen, or no decision by a rule: NaN
            mean = counts @ number / tokens
            variance = counts @ number**2 / tokens - mean**2
            return {
                "avg_experts_per_token": mean,
                "effective_experts": mean + sums["stand_ins"] / tokens,
                "std_experts_per_token": np.sqrt(variance.clip(min=0)),
                "min_experts": occurs.argmax(1),
                "max_experts": number[-1] - occurs[:, ::-1].argmax(1),
                "floor_frac": sums["at_floor"] / sums["adaptive_decisions"],
                "cap_frac": sums["at_cap"] / sums["adaptive_decisions"],
                "zero_rejection_frac": sums["unchosen"] / sums["adaptive_decisions"],
                "gate_mass_frac": sums["mass"] / MASS_UNIT / tokens,
                "num_tokens": tokens,
            }

    def _use_measures(self) -> dict[str, np.ndarray]:
        """Columns about which experts ran, one entry a layer."""
        share = self.use / self.use.sum(1, keepdims=True).clip(min=1)  # [L, E]
        return {
            "expert_utilization_cv": share.std(1) * share.shape[1],
            # An unused expert counts as used once, so that the ratio stays finite.
            "expert_utilization_max_min_ratio": self.use.max(1) / self.use.min(1).clip(min=1),
            "use_entropy_bits": special.entr(share).sum(1) / math.log(2),
        }

    def pack(self) -> str:
        """The sums as text for a checkpoint."""
        parts = (self.counts, self.use, self.unchosen[:, None], self.mass[:, None])
        sums = np.concatenate(parts, axis=1).astype("<i8")  # [L, 2 E + 3]
        return _packed(sums)

    @classmethod
    def unpack(cls, text: str, config: Config, layers: Sequence[MoELayer]) -> RoutingStatistics:
        """What `pack` wrote."""
        sums = _unpacked(text, "<i8").reshape(len(layers), -1)
        num_experts = (sums.shape[1] - 3) // 2
        counts, use, unchosen, mass = np.split(sums, [num_experts + 1, 2 * num_experts + 1, -1], axis=1)
        return cls(
            counts=counts,
            use=use,
            unchosen=unchosen[:, 0],
            mass=mass[:, 0],
            config=config,
            layers=tuple(layers),
        )


def parameter_count(parameter: Tensor) -> int:
    """How many numbers a parameter holds, also where bitsandbytes packs two into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def stored_parts(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is stored in: itself, or what a quantised one of torchao holds."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [part for name in names for part in stored_parts(getattr(parameter, name))]


def parameter_bytes(parameter: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in stored_parts(parameter))


def _text_parameters(model: nn.Module) -> dict[int, Tensor]:
    """Parameters that a token of text can use, by identity: of the decoder and the head, or of the whole
    model where it does not say what these are. A vision tower is not among them."""
    parts = [model]
    if hasattr(model, "get_decoder"):
        parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    return {id(parameter): parameter for part in parts for parameter in part.parameters()}


def _unread_bytes(model: nn.Module, parameters: Mapping[int, Tensor]) -> int:
    """Bytes of embedding tables that a token does not read: all rows but one, where the head reads none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    tables = {
        id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)
    }
    unread = [table for key, table in tables.items() if key in parameters and key not in of_head]
    return sum(parameter_bytes(table) * (len(table) - 1) // len(table) for table in unread)


@dataclass(frozen=True)
class ModelCost:
    """What a token costs a model beside its experts, and what one expert of each of L layers costs."""

    total_parameters: int
    shared_parameters: int  # used by every token, embedding tables in full
    shared_bytes: int  # of weights, read for one decoded token
    expert_parameters: np.ndarray  # [L], of one expert
    expert_flops: np.ndarray  # [L], of one expert for one token
    expert_bytes: np.ndarray  # [L], of one expert

    @classmethod
    def of(cls, model: nn.Module, experts: Sequence[nn.Module], num_experts: int) -> ModelCost:
        """experts: the experts module of each MoE layer, with `num_experts` experts each."""
        parameters = _text_parameters(model)
        sizes = np.zeros(len(experts))
        flops = np.zeros(len(experts))
        nbytes = np.zeros(len(experts))
        routed: set[int] = set()
        for place, module in enumerate(experts):
            for name, parameter in module.named_parameters():
                routed.add(id(parameter))
                size = parameter_count(parameter) / num_experts
                sizes[place] += size
                flops[place] += size if name.endswith("bias") else 2 * size
                nbytes[place] += parameter_bytes(parameter) / num_experts
        shared = [parameter for key, parameter in parameters.items() if key not in routed]
        return cls(
            total_parameters=sum(parameter_count(parameter) for parameter in model.parameters()),
            shared_parameters=sum(parameter_count(parameter) for parameter in shared),
            shared_bytes=sum(map(parameter_bytes, shared)) - _unread_bytes(model, parameters),
            expert_parameters=sizes,
            expert_flops=flops,
            expert_bytes=nbytes,
        )

    def bytes_read(self, experts: np.ndarray) -> float:
        """Bytes of weights read where so many experts of each layer run, [L]."""
        return float(self.shared_bytes + experts @ self.expert_bytes)

    def row(self, routing: RoutingStatistics, decoding: RoutingStatistics) -> dict[str, Any]:
        """COMPUTE_COLUMNS, of all tokens that were routed and of those that were decoded; None for none."""
        row = dict.fromkeys((column.name for column in COMPUTE_COLUMNS), None)
        row["total_parameters"] = self.total_parameters
        if routing.counts.any():
            experts = routing.effective_experts
            of_experts = float(experts @ self.expert_parameters)
            row["active_parameters"] = self.shared_parameters + of_experts
            row["active_expert_parameters"] = of_experts
            row["expert_flops_per_token"] = float(experts @ self.expert_flops)
        if decoding.counts.any():
            row["weight_bytes_per_token"] = self.bytes_read(decoding.effective_experts)
        return row


MASS_STEPS = 2**16 - 1  # gate mass of a single token is kept in such steps: 2 bytes


@dataclass(frozen=True)
class TokenRouting:
    """What was decided for each token of a text, in L layers.

    ids [n or n + 1]: the tokens; one that comes last was written or predicted, but never routed. counts [n,
    L]: experts that ran. mass [n, L]: gate mass of these, in 1 / MASS_STEPS. num_given: how many tokens were
    given; the others were written, or predicted.
    """

    ids: np.ndarray
    counts: np.ndarray
    mass: np.ndarray
    num_given: int

    def pack(self) -> dict[str, Any]:
        """As plain data for a checkpoint: about a byte a token and layer for the counts, two for the mass."""
        return {
            "num_given": self.num_given,
            "ids": _packed(self.ids.astype("<i4")),
            "counts": _packed(self.counts.T.astype("<u2")),
            "mass": _packed(self.mass.T.astype("<u2")),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], num_layers: int) -> TokenRouting:
        """What `pack` made."""
        counts = _unpacked(packed["counts"], "<u2").reshape(num_layers, -1).T.astype(np.int64)
        mass = _unpacked(packed["mass"], "<u2").reshape(num_layers, -1).T.astype(np.int64)
        return cls(_unpacked(packed["ids"], "<i4"), counts, mass, packed["num_given"])

    def of_text(self, ids: Any, num_given: int) -> TokenRouting | None:
        """The same with all ids of its text [n + 1]; None where it is not of all of them but the last."""
        ids = np.asarray(ids)
        if not np.array_equal(self.ids, ids[:-1]):
            return None
        return dataclasses.replace(self, ids=ids, num_given=num_given)


@dataclass
class _Call:
    """One forward pass of the model, as the recorder keeps it until it is summed."""

    mask: Tensor | None  # attention mask [B, at least S]; padding is not counted
    shape: tuple[int, int] | None  # B, S
    phase: int  # 0 for the first since the start, a prefill where text is generated; 1 for the others
    outputs: dict[int, tuple]  # place of the layer -> (logits [T, E], weights [T, K], indices [T, K])
    wanted: dict[int, Tensor]  # place of the layer -> counts [T] before floor and cap
    ids: Tensor | None = None  # [B, S], where tokens are kept


@dataclass(frozen=True)
class _KeptTokens:
    """What was decided for the tokens of some calls, where it was computed."""

    shapes: list[tuple[int, int]]  # B, S of each call
    ids: Tensor  # [N]
    is_token: Tensor  # [N], False for padding
    decided: list[Tensor]  # of each layer: counts and gate mass in 1 / MASS_STEPS, int32 [2, N]

    def calls(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each call: ids [B, S], is_token [B, S] and what was decided [L, 2, B, S]."""
        ids = self.ids.cpu().numpy()
        is_token = self.is_token.cpu().numpy()
        decided = np.stack([layer.cpu().numpy() for layer in self.decided])  # [L, 2, N]
        start = 0
        for shape in self.shapes:
            part = slice(start, start + math.prod(shape))
            of_call = decided[:, :, part].reshape(*decided.shape[:2], *shape)
            yield ids[part].reshape(shape), is_token[part].reshape(shape), of_call
            start = part.stop


def _joined_text(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenRouting:
    """A text from its parts, one of each call: ids [n] and what was decided [L, 2, n]."""
    decided = np.concatenate([part for _, part in parts], axis=2)
    ids = np.concatenate([ids for ids, _ in parts])
    return TokenRouting(ids, decided[:, 0].T, decided[:, 1].T, num_given=len(parts[0][0]))


class _LayerSums:
    """The sums of one layer, for each of 2 phases and R rows of the batch, on the layer's device."""

    def __init__(self, layer: MoELayer, rows: int):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=layer.device)

        self.layer = layer
        self.counts = zeros(2, rows, layer.num_experts + 1)
        self.use = zeros(2, rows, layer.num_experts)
        self.unchosen = zeros(2, rows)
        self.mass = zeros(2, rows)

    def add(
        self,
        output: tuple[Tensor, Tensor, Tensor],
        wanted: Tensor | None,
        place: tuple[Tensor, Tensor],
        is_token: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add N tokens. output: logits [N, E], weights [N, K], indices [N, K]. wanted: counts [N] before
        floor and cap. place: phase [N] and row of the batch [N]. is_token: False for padding [N].

        Returns how many experts ran for each token [N], and their gate mass [N].
        """
        phase, row = place
        first, weights, indices = output
        ran = (weights != 0) & is_token[:, None]  # [N, K]
        gates = self.layer.logits(first).float().softmax(-1)
        mass = gates.gather(-1, indices.clamp(max=gates.shape[-1] - 1)).double()  # [N, K]
        number = ran.sum(-1)  # [N]
        kept_mass = mass.masked_fill(~ran, 0).sum(-1)  # [N]; what padding has may be NaN
        self._count(self.counts, (phase, row, number), is_token)
        token, slot = ran.nonzero(as_tuple=True)
        self._count(self.use, (phase[token], row[token], indices[token, slot]), torch.ones_like(token))
        self._count(self.mass, (phase, row), kept_mass.mul(MASS_UNIT).round())
        if wanted is not None:
            self._count(self.unchosen, (phase, row), (wanted == 0) & is_token)
        return number, kept_mass

    @staticmethod
    def _count(sums: Tensor, place: tuple[Tensor, ...], number: Tensor) -> None:
        sums.index_put_(place, number.long(), accumulate=True)


class RoutingRecorder:
    """Router statistics by PyTorch forward hooks; memory O(L E), whatever the number of tokens.

    A hook only keeps what it sees; the sums are taken on the layer's device once for many calls, so that
    recording costs decoding next to nothing and never waits for a GPU. The first call since the start, a
    prefill where text is generated, is told apart from those after it. Padding, by the attention mask that
    the model was given, is not counted. In a notebook it shows itself as a table by layer; where `view` is
    set, also as the texts that were read and written, each token shaded by its experts.

    After `keep_tokens` also what was decided for each single token is kept, on the device until it is asked
    for: memory O(L) a token.
    """

    MAX_CALLS = 256  # what is kept at most before it is summed
    MAX_TOKENS = 8192

    def __init__(self, layers: Sequence[MoELayer], config: Config):
        self.config = config
        self.layers = list(layers)
        self.view: Callable[[Sequence[TokenRouting]], str] | None = None  # texts -> HTML
        self._most_kept: float = 0  # tokens
        self.start()

    def start(self, rows: int | None = None) -> None:
        """Begin anew. rows: the batch size, to count each row of the batch by itself."""
        self._rows = rows
        self._phase = 0
        self._calls: list[_Call] = []
        self._tokens = 0
        self._sums = [_LayerSums(layer, rows or 1) for layer in self.layers]
        self._kept: list[_KeptTokens] = []

    def keep_tokens(self, most: float = math.inf) -> None:
        """Keep what is decided for each token from now on; no more begins when `most` tokens are kept."""
        self._most_kept = most

    def watch_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook for the model: a new call begins."""
        if len(self._calls) >= self.MAX_CALLS or self._tokens >= self.MAX_TOKENS:
            self._flush()
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        shape = None if ids is None else tuple(ids.shape[:2])
        self._begin_call(mask, shape, ids if self._most_kept else None)
        self._tokens += 0 if ids is None else ids.numel()

    def _begin_call(
        self, mask: Tensor | None, shape: tuple[int, int] | None, ids: Tensor | None = None
    ) -> None:
        self._calls.append(_Call(mask, shape, self._phase, {}, {}, ids))
        self._phase = 1

    def _call(self, place: int) -> _Call:
        """The call that a layer is in: a new one where it was called without the whole model."""
        if not self._calls or place in self._calls[-1].outputs:
            self._begin_call(None, None)
        return self._calls[-1]

    def hook(self, place: int) -> Callable:
        """A forward hook for the router of the layer at `place` in `layers`."""

        def record(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._call(place).outputs[place] = tuple(part.detach() for part in output)

        return record

    def observer(self, place: int) -> Callable[[Tensor], None]:
        """A function that takes the counts [T] of a layer before floor and cap."""

        def observe(wanted: Tensor) -> None:
            self._call(place).wanted[place] = wanted

        return observe

    def token_finder(self, place: int) -> Callable[[int], Tensor]:
        """A function that says which of the T tokens that a layer is at work on are no padding: T -> [T]."""

        def find_tokens(tokens: int) -> Tensor:
            return self._is_token(self._call(place), tokens)

        return find_tokens

    def _keeps(self, calls: Sequence[_Call]) -> bool:
        """Whether what is decided for each token of these calls is to be kept, and can be."""
        num_kept = sum(len(kept.ids) for kept in self._kept)
        return bool(calls) and num_kept < self._most_kept and all(map(self._is_whole, calls))

    def _is_whole(self, call: _Call) -> bool:
        """Whether every layer saw every token of the call."""
        tokens = -1 if call.ids is None else call.ids.numel()
        return [len(output[0]) for output in call.outputs.values()] == [tokens] * len(self.layers)

    @torch.no_grad()
    def _flush(self) -> None:
        """Add what was kept to the sums."""
        calls = self._calls
        self._calls = []
        self._tokens = 0
        keeps = self._keeps(calls)
        decided = []  # of each layer, for the tokens of these calls
        for place, sums in enumerate(self._sums):
            seen = [call for call in calls if place in call.outputs]
            if not seen:
                continue
            outputs = [call.outputs[place] for call in seen]
            output = tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
            is_tested = all(place in call.wanted for call in seen)
            wanted = torch.cat([call.wanted[place] for call in seen]) if is_tested else None
            row = torch.cat([self._row_of_tokens(call, place) for call in seen])
            tokens = torch.tensor([len(call.outputs[place][0]) for call in seen])
            phase = torch.tensor([call.phase for call in seen]).repeat_interleave(tokens)
            is_token = torch.cat([self._is_token(call, len(call.outputs[place][0])) for call in seen])
            device = sums.counts.device
            number, mass = sums.add(output, wanted, (phase.to(device), row.to(device)), is_token.to(device))
            if keeps:
                steps = mass.mul(MASS_STEPS).round().clamp(max=MASS_STEPS)
                decided.append(torch.stack([number.int(), steps.int()]))
        if keeps:
            shapes = [call.shape for call in calls]
            ids = torch.cat([call.ids.reshape(-1) for call in calls])
            self._kept.append(_KeptTokens(shapes, ids, is_token, decided))

    def _row_of_tokens(self, call: _Call, place: int) -> Tensor:
        """The row of the batch that each token [T] is in; 0 where rows are not told apart."""
        tokens = len(call.outputs[place][0])
        if not self._rows or call.shape is None or math.prod(call.shape) != tokens:
            return torch.zeros(tokens, dtype=torch.int64)
        return torch.arange(tokens) // call.shape[1]

    @staticmethod
    def _is_token(call: _Call, tokens: int) -> Tensor:
        """Which of the tokens [T] of a call are no padding."""
        if call.mask is None or call.shape is None or math.prod(call.shape) != tokens:
            return torch.ones(tokens, dtype=torch.bool)
        return call.mask[:, -call.shape[1] :].reshape(-1) != 0

    NAMES = ("counts", "use", "unchosen", "mass")

    def _seen(self) -> dict[str, np.ndarray]:
        """The sums since the start, brought over at once: name -> [L, 2 phases, R rows, ...]."""
        self._flush()
        parts = [getattr(sums, name) for name in self.NAMES for sums in self._sums]
        at_once = torch.cat([part.flatten().to(parts[0].device) for part in parts]).cpu()
        arrays = [
            values.view(part.shape).numpy()
            for values, part in zip(at_once.split([part.numel() for part in parts]), parts, strict=True)
        ]
        num_layers = len(self._sums)
        return {
            name: np.stack(arrays[place * num_layers : (place + 1) * num_layers])
            for place, name in enumerate(self.NAMES)
        }

    def _statistics_of(self, sums: Mapping[str, np.ndarray]) -> RoutingStatistics:
        return RoutingStatistics(**sums, config=self.config, layers=tuple(self.layers))

    def statistics(self) -> list[RoutingStatistics]:
        """What was seen since the start: one for each row of the batch, or one."""
        seen = self._seen()
        return [
            self._statistics_of({name: sums[:, :, row].sum(1) for name, sums in seen.items()})
            for row in range(self._rows or 1)
        ]

    def phases(self) -> list[RoutingStatistics]:
        """What was seen in the first call of the model since the start, and in all after it: prefill and
        decoding, where text was generated."""
        seen = self._seen()
        return [
            self._statistics_of({name: sums[:, phase].sum(1) for name, sums in seen.items()})
            for phase in (0, 1)
        ]

    def total(self) -> RoutingStatistics:
        """What was seen since the start."""
        return functools.reduce(RoutingStatistics.__add__, self.statistics())

    def texts(self) -> list[TokenRouting]:
        """The texts whose tokens were kept, each row of a batch by itself, in the order they were begun.

        A call with one token a row goes on with the texts of the call before; any other begins new ones.
        """
        self._flush()
        texts: list[list[tuple[np.ndarray, np.ndarray]]] = []
        current: list[list[tuple[np.ndarray, np.ndarray]]] = []  # those that the latest call is of
        for kept in self._kept:
            for ids, is_token, decided in kept.calls():
                rows, length = ids.shape
                if length > 1 or rows != len(current):
                    current = [[] for _ in range(rows)]
                    texts += current
                for row, parts in enumerate(current):
                    parts.append((ids[row][is_token[row]], decided[:, :, row][:, :, is_token[row]]))
        return [_joined_text(parts) for parts in texts]

    def summary(self) -> pd.DataFrame:
        """What was seen since the start, one row a layer: LAYER_COLUMNS."""
        return self.total().by_layer()

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format="{:.3f}".format)
        return table if self.view is None else self.view(self.texts()) + table


@contextlib.contextmanager
def counting_distinct_experts(layers: Sequence[MoELayer]) -> Iterator[list[list[Tensor]]]:
    """Count how many different experts of each layer run in a call of the model, inside the block: what a
    batch of tokens makes it read. Yields a list a layer, which grows by a number a call."""
    counts: list[list[Tensor]] = [[] for _ in layers]

    def counter(place: int) -> Callable:
        num_experts = layers[place].num_experts

        def count(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, indices = output  # [T, K]
            expert = indices.masked_fill(weights == 0, num_experts).flatten()  # a dropped one is the last
            runs = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
            counts[place].append(runs.index_fill(0, expert, 1)[:num_experts].sum())

        return count

    with contextlib.ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.enter_context(layer.router.register_forward_hook(counter(place)))
        yield counts


def _asked_candidates(layers: Sequence[MoELayer], config: Config) -> list[int]:
    """K, how many candidates each router is asked for.

    Where K hangs on an object that layers share, such as the model's config, the widest is asked for: what
    is too much for a layer is dropped there.
    """
    wanted: list[int] = []
    for layer in layers:
        number = layer.own_k
        if layer.knob and is_routed(config, layer.index):
            number = min(count_bounds(layer_config(config, layer.index))[1], layer.max_k)
            needs_all = config["renormalize"] in ("topk_mass", "own_k") or config["stand_in"] != "nothing"
            if needs_all or config.get("random") or RULES[config["method"]].uses_outputs:
                number = max(number, layer.own_k)
        wanted.append(number)
    widest: dict[Any, int] = {}
    for layer, number in zip(layers, wanted, strict=True):
        widest[layer.knob_id] = max(number, widest.get(layer.knob_id, 0))
    return [widest[layer.knob_id] for layer in layers]


def _sharing_layers(model: nn.Module, layers: Sequence[MoELayer]) -> list[MoELayer]:
    """The other layers of a model whose K hangs on an object that sets the K of some of `layers`."""
    given = {layer.index for layer in layers}
    shared = {layer.knob_id for layer in layers if layer.knob and layer.knob[0] is not layer.router}
    if not shared or len(given) == layers[0].num_layers:
        return []
    return [layer for layer in find_moe_layers(model) if layer.index not in given and layer.knob_id in shared]


_LEFT_ALONE = {"method": "topk", "renormalize": "model", "stand_in": "nothing"}  # with the model's own K


def _needs_rule(layer: MoELayer, config: Config, candidates: int) -> bool:
    """Whether asking the router for fewer is not enough."""
    if not is_routed(config, layer.index):
        return candidates > layer.own_k
    is_plain = RULES[config["method"]].is_static and config["renormalize"] == "model"
    is_plain = is_plain and config["stand_in"] == "nothing"
    _, cap = count_bounds(layer_config(config, layer.index))
    return not is_plain or candidates > cap


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
    of `find_moe_layers` that are patched and recorded, all of them when None. Raises UserError for a model
    that is patched already.

        with patched_routing(model, ROUTING_CONFIGS["bh_moderate"], calibrate(model, tokenizer)) as recorder:
            model.generate(**inputs)
    """
    if layers is None:
        layers = find_moe_layers(model)
    if not layers:
        raise UserError("layers is empty: give layers of find_moe_layers(model), or None for all of them")
    config = resolve_config("routing", config, layers[0].num_layers)
    recorder = RoutingRecorder(layers, config)
    # Others must keep their own K, also where it hangs on what is changed for these.
    patched = [*layers, *_sharing_layers(model, layers)]
    config = config | {"layers": [layer.index for layer in layers if is_routed(config, layer.index)]}
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as alone:
        alone.enter_context(_alone())
        alone.enter_context(holding(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(model.register_forward_pre_hook(recorder.watch_model, with_kwargs=True))
        candidates = _asked_candidates(patched, config)
        for place, layer in enumerate(patched):
            _refuse_patched(layer.name, layer.router)
            _replace(stack, layer.router, "_bh_patched", True)
            if _needs_rule(layer, config, candidates[place]):
                own = _LEFT_ALONE | {"k": layer.own_k}
                settings = layer_config(config, layer.index) if is_routed(config, layer.index) else own
                observe = recorder.observer(place)
                find_tokens = recorder.token_finder(place)
                width = candidates[place]
                routing = _LayerRouting(layer, settings, width, calibration, observe, find_tokens)
                router_forward = routing.wrap_router(layer.router.forward, layer.experts.forward)
                experts_forward = routing.wrap_experts(layer.experts.forward)
                _replace_forward(stack, layer.name, layer.router, router_forward)
                _replace_forward(stack, f"the experts of {layer.name}", layer.experts, experts_forward)
            # config.num_experts_per_tok has no effect after loading; the router's own attribute has.
            if layer.knob:
                _replace(stack, *layer.knob, candidates[place])
            if place < len(layers):
                stack.enter_context(layer.router.register_forward_hook(recorder.hook(place)))
        alone.close()
        yield recorder


# ---------------------------------------------------------------------------------------------------------
# 7. Calibration: nulls, knobs and diagnostics from text
# ---------------------------------------------------------------------------------------------------------


# How a model is made to write: here, and wherever it is measured


def generation_settings(tokenizer: Any, new_tokens: int, **options: Any) -> Any:
    """Exactly `new_tokens` tokens: no early end of text, so that clocks compare equal work."""
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return transformers.GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        **options,
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
            special_tokens = {name: getattr(own, name, None) for name in names}
            _replace(stack, model, "generation_config", transformers.GenerationConfig(**special_tokens))
        yield


_SEEDING = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random generators seeded inside the block, and as they were after it; one thread at a time,
    because all threads share them."""
    with _SEEDING, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# What is calibrated on


def sample_calibration_text(
    model: nn.Module, tokenizer: Any, seed: int, sequences: int | None = None
) -> Tensor:
    """Text that the model itself writes: int64 [sequences, CALIBRATION_LENGTH], CALIBRATION_SEQUENCES of them
    unless told.

    Plain sampling at temperature 1 over the whole vocabulary, from the first token on, so that the text
    follows the model's own distribution. The global random generators are left as they were.
    """
    device = input_device(model)
    remaining = sequences or CALIBRATION_SEQUENCES
    settings = generation_settings(tokenizer, CALIBRATION_LENGTH - 1, do_sample=True, top_k=0)
    texts = []
    with holding(model), writing_plainly(model), seeded(seed, device), torch.inference_mode():
        while remaining > 0:
            rows = min(remaining, CALIBRATION_SEQUENCES)
            start = torch.full((rows, 1), start_token(tokenizer), device=device)
            mask = torch.ones_like(start)
            texts.append(model.generate(start, attention_mask=mask, generation_config=settings))
            remaining -= rows
    return torch.cat(texts)


SHARED_RUN = 32  # so many equal tokens in a row are the same text, not the same phrase
LINEAR_SEQUENCES = 256  # sequences of calibration text for the linear stand-ins: 32,768 tokens


@dataclass(frozen=True)
class CalibrationText:
    """What nulls and stand-ins are calibrated on: in words, as part of a run's identity, and its windows,
    int64 [W, CALIBRATION_LENGTH]; None for text that the model writes itself."""

    words: str
    identity: str
    windows: Tensor | None = None

    def take(self, sequences: int) -> Tensor | None:
        """So many of the windows, spread evenly over them, or all of them where there are fewer."""
        if self.windows is None:
            return None
        last = len(self.windows) - 1
        return self.windows[torch.linspace(0, last, min(last + 1, sequences)).round().long()]


SAMPLED = "sampled"  # as --calibration-text
SAMPLED_TEXT = CalibrationText("text sampled from the model", SAMPLED)


def read_calibration_text(path: Path, tokenizer: Any) -> CalibrationText:
    """All of a text file. UserError where it has no CALIBRATION_LENGTH tokens."""
    text = _read_text(path, "--calibration-text")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    number = len(tokens) // CALIBRATION_LENGTH
    if not number:
        raise UserError(f"--calibration-text {path}: {len(tokens)} tokens, {CALIBRATION_LENGTH} are needed")
    windows = tokens[: number * CALIBRATION_LENGTH].view(number, CALIBRATION_LENGTH)
    identity = file_hash(path)[:16]
    return CalibrationText(f"--calibration-text {path}", identity, windows)


def _runs_of(tokens: Tensor, length: int) -> list[tuple[int, ...]]:
    """All runs of `length` tokens in a row, of token ids [B, S]."""
    return list(map(tuple, tokens.unfold(1, length, 1).flatten(0, 1).tolist()))


def calibration_rest(text: TextSample) -> CalibrationText | None:
    """What calibration can take of a text: its windows that are not scored, without those that have a run of
    SHARED_RUN tokens in common with the scored ones. None where these are too few."""
    parts = [torch.as_tensor(window.token_ids[1:], dtype=torch.int64) for window in text.unscored]
    pieces = [piece for part in parts for piece in part.split(CALIBRATION_LENGTH)]
    pieces = [piece for piece in pieces if len(piece) == CALIBRATION_LENGTH]
    if len(pieces) < CALIBRATION_SEQUENCES:
        return None
    windows = CalibrationText("", "", torch.stack(pieces)).take(2 * LINEAR_SEQUENCES)
    length = min(SHARED_RUN, CALIBRATION_LENGTH)
    places: dict[tuple[int, ...], list[int]] = {}  # run -> the windows that have it
    for place, window in enumerate(windows):
        for run in _runs_of(window[None], length):
            places.setdefault(run, []).append(place)
    is_free = torch.ones(len(windows), dtype=torch.bool)
    for item in text.scored:
        if len(item.token_ids) >= length:
            for run in _runs_of(torch.as_tensor(item.token_ids, dtype=torch.int64)[None], length):
                is_free[places.get(run, [])] = False
    windows = windows[is_free]
    if len(windows) < CALIBRATION_SEQUENCES:
        return None
    category = text.unscored[0].document.category
    name = category if category in DEFAULT_TEXTS else "the text"
    words = f"windows of {name} that are not scored"
    return CalibrationText(words, fingerprint(windows.tolist()), windows)


def count_shared_tokens(texts: Sequence[Tensor], calibration_text: CalibrationText) -> int:
    """How many tokens of `texts`, each [1, S], lie in a run of SHARED_RUN tokens of the calibration text.

    Of that only the windows that calibration takes count, and a text shorter than such a run is looked for
    as a whole. First positions are left out, as everywhere in calibration. 0 where the model wrote its own
    calibration text. Some are told with a warning: there, nothing that is diagnosed was held out.
    """
    windows = calibration_text.take(CALIBRATION_SEQUENCES)  # [W, CALIBRATION_LENGTH]
    if windows is None:
        return 0
    longest = min(SHARED_RUN, windows.shape[1])
    known: dict[int, set[tuple[int, ...]]] = {}  # by length of the runs
    shared = 0
    for text in texts:
        length = min(longest, text.numel())
        if length not in known:
            known[length] = set(_runs_of(windows, length))
        is_shared = torch.zeros(text.numel(), dtype=torch.bool)
        for start, run in enumerate(_runs_of(text, length)):
            if run in known[length]:
                is_shared[start : start + length] = True
        shared += int(is_shared[1:].sum())
    if shared:
        total = sum(text.numel() - 1 for text in texts)
        logger.warning(
            f"{calibration_text.words} shares text with what is scored: {shared} of the {total} tokens on "
            "which the nulls are diagnosed were calibrated on: they say too little about new text"
        )
    return shared


class _OutputSums:
    """What the experts of a layer put out, summed over the tokens that chose them."""

    def __init__(self, layer: MoELayer):
        size = (layer.num_experts, layer.hidden_size)
        exact = {"dtype": torch.float64, "device": layer.device}
        self.layer = layer
        self.lower = torch.zeros(size, **exact)  # for tokens that rank them in the lower half of their Top-K
        self.all = torch.zeros(size, **exact)
        self.lower_count = torch.zeros(size[0], 1, **exact)
        self.all_count = torch.zeros(size[0], 1, **exact)
        self.norms = torch.zeros(size[0], **exact)

    def add(self, experts_forward: Callable, hidden: Tensor, indices: Tensor, weights: Tensor) -> None:
        """hidden [N, H]; indices, weights [N, K]. Each expert is run by itself, with weight 1."""
        rank = weights.argsort(dim=-1, descending=True, stable=True).argsort()
        for slot in range(indices.shape[1]):
            expert = indices[:, slot]  # [N]
            output = experts_forward(hidden, expert[:, None], torch.ones_like(weights[:, :1])).double()
            is_lower = (rank[:, slot, None] >= self.layer.own_k // 2).double()  # [N, 1]
            self.all.index_add_(0, expert, output)
            self.lower.index_add_(0, expert, output * is_lower)
            self.all_count.index_add_(0, expert, torch.ones_like(is_lower))
            self.lower_count.index_add_(0, expert, is_lower)
            self.norms.index_add_(0, expert, output.norm(dim=-1))

    def means(self) -> Tensor:
        """[E, H] float32. An expert that nobody ranks so low: over all tokens that chose it; else 0."""
        over_all = self.all / self.all_count.clamp(min=1)
        over_lower = self.lower / self.lower_count.clamp(min=1)
        return torch.where(self.lower_count > 0, over_lower, over_all).float().cpu()

    def mean_norms(self) -> Tensor:
        """[E] float32; that of the layer for an expert that nobody chose."""
        count = self.all_count[:, 0]
        return (
            torch.where(count > 0, self.norms / count.clamp(min=1), self.norms.sum() / count.sum())
            .float()
            .cpu()
        )


@contextlib.contextmanager
def _watched_experts(
    layers: Sequence[MoELayer], take: Callable[[MoELayer, Callable, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the block each call of a layer's experts is shown to `take`: layer, the experts' `forward`,
    hidden [T, H], indices and weights [T, K]."""

    def watcher(layer: MoELayer) -> Callable:
        def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            def forward(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
                return module.forward(hidden, indices, weights, *args[3:], **kwargs)

            take(layer, forward, *args[:3])

        return watch

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.experts.register_forward_pre_hook(watcher(layer), with_kwargs=True))
        yield


def _but_first_positions(tokens: Tensor, length: int) -> Tensor:
    """[B S, ...] -> [B (S - 1), ...]: the routing of a first position is an outlier in every layer."""
    return tokens.unflatten(0, (-1, length))[:, 1:].flatten(0, 1)


def _run_for_hooks(model: nn.Module, ids: Tensor) -> None:
    """Run the model on token ids [B, S] for what hooks see inside it."""
    # Logits are not looked at, and those of all positions take a tenth of the time.
    can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    fewest = {"logits_to_keep": 1} if can_leave_out else {}
    ids = ids.to(input_device(model))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **fewest)


def record_routers(model: nn.Module, batches: Sequence[Tensor], outputs: bool = False) -> Calibration:
    """Run the unpatched model on token ids [B, S] and keep what its routers did, first positions left out.

    outputs: in the same pass, also what the experts put out.
    """
    layers = find_moe_layers(model)
    logits: list[list[Tensor]] = [[] for _ in layers]  # by layer and batch: [N, E]
    own: list[list[Tensor]] = [[] for _ in layers]  # by layer and batch: [N, K]
    sums = [_OutputSums(layer) for layer in layers] if outputs else []
    length = 0

    def recorder(layer: MoELayer) -> Callable:
        def record(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            first, _, indices = (_but_first_positions(part, length) for part in output)
            logits[layer.index].append(layer.logits(first).float().cpu())
            own[layer.index].append(indices.to("cpu", torch.int16))

        return record

    def add_outputs(layer: MoELayer, forward: Callable, *seen: Tensor) -> None:
        sums[layer.index].add(forward, *(_but_first_positions(part, length) for part in seen))

    with contextlib.ExitStack() as stack, holding(model), evaluating(model), torch.inference_mode():
        for layer in layers:
            stack.enter_context(layer.router.register_forward_hook(recorder(layer)))
        if outputs:
            stack.enter_context(_watched_experts(layers, add_outputs))
        for batch in batches:
            length = batch.shape[1]
            _run_for_hooks(model, batch)
    calibration = Calibration(
        logits=torch.stack(list(map(torch.cat, logits))),
        own=torch.stack(list(map(torch.cat, own))),
        max_k=torch.tensor([layer.max_k for layer in layers], dtype=torch.int16),
    )
    if outputs:
        calibration.means = torch.stack([layer_sums.means() for layer_sums in sums])
        calibration.norms = torch.stack([layer_sums.mean_norms() for layer_sums in sums])
    return calibration


RIDGE = 10.0  # times the mean variance of the inputs: as if so many tokens said that the map is zero


def _fit_linear_map(inputs: Tensor, outputs: Tensor, ranks: Sequence[int]) -> dict[int, tuple[Tensor, ...]]:
    """Ridge regression of outputs [n, H] on inputs [n, H], cut to each rank: offset [H], down [r, H], up [H,
    r].

    The map is W' with W = (X'X + ridge I)^-1 X'Y of the centred X and Y, and is cut by its singular values.
    """
    mean_input = inputs.mean(0)
    mean_output = outputs.mean(0)
    centred = inputs - mean_input
    ridge = RIDGE * centred.square().mean() + torch.finfo(inputs.dtype).tiny
    gram = centred.T @ centred
    gram.diagonal().add_(ridge)
    weights = torch.linalg.solve(gram, centred.T @ (outputs - mean_output))  # [H, H]
    most = max(ranks)
    if len(weights) <= 512:
        left, values, right = torch.linalg.svd(weights, full_matrices=False)
        right = right.T
    else:  # a few singular values of a large matrix, by random projections
        with seeded(DEFAULT_SEED, weights.device):
            left, values, right = torch.svd_lowrank(weights, q=min(most + 8, len(weights)), niter=4)
    maps = {}
    for rank in ranks:
        down = (left[:, :rank] * values[:rank]).T
        up = right[:, :rank]
        maps[rank] = (mean_output - up @ (down @ mean_input), down, up)
    return maps


def fit_linear_maps(
    model: nn.Module, batches: Sequence[Tensor], ranks: Sequence[int]
) -> dict[int, list[StandIn]]:
    """Rank -> what stands in for the experts of each layer: affine maps from the layer's input to an expert's
    output, fitted on the tokens that chose it.

    Layer by layer and expert by expert: what is held is the layers' inputs [L, N, H], in the model's
    precision, and the work of one expert. An expert that nobody chose puts out zero.
    """
    layers = find_moe_layers(model)
    inputs: list[list[Tensor]] = [[] for _ in layers]  # by layer and batch: [N, H]
    chosen: list[list[Tensor]] = [[] for _ in layers]  # by layer and batch: [N, K]
    forwards: dict[int, Callable] = {}
    length = 0

    def keep(layer: MoELayer, forward: Callable, hidden: Tensor, indices: Tensor, weights: Tensor) -> None:
        inputs[layer.index].append(_but_first_positions(hidden, length).cpu())
        chosen[layer.index].append(_but_first_positions(indices, length).to("cpu", torch.int16))
        forwards[layer.index] = forward

    with holding(model), evaluating(model), torch.inference_mode():
        with _watched_experts(layers, keep):
            for batch in batches:
                length = batch.shape[1]
                _run_for_hooks(model, batch)
        maps: dict[int, list[StandIn]] = {rank: [] for rank in ranks}
        for layer in layers:
            hidden = torch.cat(inputs[layer.index])
            own = torch.cat(chosen[layer.index])
            inputs[layer.index].clear()
            size = (layer.num_experts, layer.hidden_size)
            stand_ins = {
                rank: StandIn(
                    offset=torch.zeros(size),
                    down=torch.zeros(layer.num_experts, rank, layer.hidden_size),
                    up=torch.zeros(*size, rank),
                )
                for rank in ranks
            }
            for expert in range(layer.num_experts):
                own_inputs = hidden[(own == expert).any(1)].to(layer.device)  # [n, H]
                if not len(own_inputs):
                    continue
                index = torch.full((len(own_inputs), 1), expert, device=layer.device)
                weight = torch.ones(len(own_inputs), 1, dtype=own_inputs.dtype, device=layer.device)
                outputs = forwards[layer.index](own_inputs, index, weight)
                fitted = _fit_linear_map(own_inputs.float(), outputs.float(), ranks)
                for rank, (offset, down, up) in fitted.items():
                    stand_ins[rank].offset[expert] = offset.cpu()
                    stand_ins[rank].down[expert] = down.cpu()
                    stand_ins[rank].up[expert] = up.cpu()
            for rank in ranks:
                maps[rank].append(stand_ins[rank])
    return maps


def calibration_tokens(
    model: nn.Module, tokenizer: Any, seed: int, text: CalibrationText, sequences: int
) -> Tensor:
    """Token ids of calibration text, at most `sequences` of them: int64 [S, CALIBRATION_LENGTH]."""
    if text.windows is None:
        return sample_calibration_text(model, tokenizer, seed, sequences)
    return text.take(sequences)


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    seed: int = DEFAULT_SEED,
    text: CalibrationText | Path | None = None,
    *,
    outputs: bool = False,
    linear_ranks: Sequence[int] = (),
) -> Calibration:
    """Record the unpatched routers on a text, or a text file, or by default on text sampled with `seed`.

    outputs: also what the experts put out, for the stand-in "mean" and the rule "contribution". linear_ranks:
    also fit the stand-in "linear:R" for these R, on LINEAR_SEQUENCES sequences.
    """
    if not isinstance(text, CalibrationText):
        text = SAMPLED_TEXT if text is None else read_calibration_text(text, tokenizer)
    tokens = calibration_tokens(model, tokenizer, seed, text, CALIBRATION_SEQUENCES)
    calibration = record_routers(model, tokens.split(4), outputs)
    if linear_ranks:
        tokens = calibration_tokens(model, tokenizer, seed, text, LINEAR_SEQUENCES)
        calibration.linear_maps = fit_linear_maps(model, tokens.split(4), linear_ranks)
    return calibration


MATCHING_ERROR = 0.05  # experts: a rule that misses its target by more jumps over it


def _calibration_gates(config: Config, calibration: Calibration) -> dict[int, Gates]:
    """Layer -> the gates that the calibration text had in it, for the layers that `config` routes."""
    num_layers, _, num_experts = calibration.logits.shape
    uses_norms = RULES[config["method"]].uses_norms
    gates = {}
    for layer in range(num_layers):
        if is_routed(config, layer):
            settings = layer_config(config, layer)
            logits = calibration.logits[layer]
            gates[layer] = Gates(
                gate_scores(logits, settings["temperature"]),
                layer_null(settings, layer, num_experts, calibration),
                logits / settings["temperature"],
                calibration.own.shape[-1],
                calibration.relative_norms(layer) if uses_norms else None,
            )
    return gates


def _mean_experts(config: Config, gates: Mapping[int, Gates], calibration: Calibration) -> float:
    """How many experts `config` keeps on the calibration text, on average over tokens and all MoE layers."""
    num_layers = len(calibration.logits)
    own_k = calibration.own.shape[-1]
    total = float(own_k * (num_layers - len(gates)))
    for layer, of_layer in gates.items():
        settings = layer_config(config, layer)
        floor, cap = (min(bound, calibration.widest(layer)) for bound in count_bounds(settings))
        counts = RULES[config["method"]].count(of_layer, settings).clamp(floor, cap)
        total += counts.double().mean().item()
    return total / num_layers


def match_experts(name: str, config: Config, target: float, calibration: Calibration) -> dict[str, Any]:
    """The configuration with its rule's knob set so that it keeps `target` experts; a static one as it is.

    The mean is over tokens and MoE layers of the calibration text, as routed by the unpatched model; on other
    text, and under its own routing, the configuration will keep a few more or fewer. Raises UserError naming
    the range the rule can reach.
    """
    num_layers, _, num_experts = calibration.logits.shape
    config = resolve_config(name, config, num_layers)
    rule = RULES[config["method"]]
    if rule.is_static:
        return config
    if rule.uses_outputs:
        raise UserError(f"--match-experts {target:g}: {name} needs the experts' outputs, which are not kept")
    knob = rule.knob
    gates = _calibration_gates(config, calibration)

    def kept_at(value: float) -> float:
        return _mean_experts(config | {knob.name: value}, gates, calibration)

    def kept_at_log(log_value: float) -> float:
        value = math.exp(log_value)
        return kept_at(round(value) if knob.kind is int else value)

    lowest, highest = rule.search
    first_null = next(iter(gates.values())).null
    if first_null is not None and rule.smallest_knob is not None:
        lowest = max(lowest, 1.001 * rule.smallest_knob(first_null, num_experts))
    ends = (math.log(lowest), math.log(highest))
    least, most = sorted(map(kept_at_log, ends))
    if not least <= target <= most:
        reach = f"{least:.2f} to {most:.2f} experts on the calibration text by its {knob.name}"
        raise UserError(f"--match-experts {target:g}: {name} can keep {reach}")
    value = math.exp(optimize.bisect(lambda log_value: kept_at_log(log_value) - target, *ends, xtol=1e-3))
    if knob.kind is int:  # the better of the whole numbers beside it
        value = min(math.floor(value), math.ceil(value), key=lambda number: abs(kept_at(number) - target))
    else:  # as it is written
        value = float(f"{value:.4g}")
    achieved = kept_at(value)
    where = f"{knob.name} = {value:.4g}"
    kept = f"{achieved:.2f} experts on the calibration text"
    if abs(achieved - target) > MATCHING_ERROR:
        raise UserError(f"--match-experts {target:g}: {name} jumps over it at {where}, where it keeps {kept}")
    logger.info(f"{name} keeps {kept} at {where}")
    return config | {knob.name: value}


def match_ladder(
    configs: Configs, targets: Sequence[float], calibration: Calibration
) -> dict[str, dict[str, Any]]:
    """`configs` with every rule that has a knob to be matched at each of `targets`, as NAME_TARGET.

    With one target the names stay. A target that a rule cannot reach is left out, and the log names it; with
    one target that is a UserError.
    """
    matched: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        rule = RULES[config["method"]]
        if rule.is_static or rule.uses_outputs:
            matched[name] = dict(config)
            continue
        for target in targets:
            try:
                moved = match_experts(name, config, target, calibration)
            except UserError as error:
                if len(targets) == 1:
                    raise
                logger.warning(f"{error}; left out")
                continue
            matched[name if len(targets) == 1 else f"{name}_{target:g}"] = moved
    return matched


DIAGNOSED_ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

NULL_DIAGNOSTICS = "null_diagnostics.json"
CALIBRATION_FILE = "calibration.safetensors"
LINEAR_FILE = "stand_in_linear_{rank}.safetensors"


def _realised(p_values: Tensor, outside: Tensor, alpha: float) -> Tensor:
    """Of each token: rejections of BH at alpha, the share of them that are null, and whether there is none.

    p_values, outside: [N, E]; returns [3, N].
    """
    order = p_values.argsort(dim=-1, stable=True)
    null_by_rank = outside.gather(1, order).long().cumsum(-1)  # null pairs among the k best
    null_by_rank = nn.functional.pad(null_by_rank, (1, 0))  # [N, E + 1], for k = 0 to E
    rejected = bh_rejections(p_values, alpha)  # [N]
    false_share = null_by_rank.gather(1, rejected[:, None])[:, 0] / rejected.clamp(min=1)
    return torch.stack([rejected.double(), false_share, (rejected == 0).double()])


def diagnose_nulls(calibration: Calibration, heldout: Calibration) -> dict[str, Any]:
    """Do the empirical and the flat null hold on text they were not calibrated on? At temperature 1, as JSON
    data, for each:

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
        shares = []
        distances = []
        realised: dict[float, list[Tensor]] = {alpha: [] for alpha in DIAGNOSED_ALPHAS}
        for layer in range(num_layers):
            scores, outside = heldout.scores(layer, 1.0)  # [N, E], [N, E]
            p_values = NULLS[name].make(calibration, layer, 1.0, num_experts).p_values(scores)
            null_p = p_values[outside].sort().values
            shares.append((torch.searchsorted(null_p, levels, side="right") / len(null_p)).tolist())
            distances.append(stats.kstest(null_p.numpy(), "uniform", method="asymp").statistic)
            for alpha in DIAGNOSED_ALPHAS:
                realised[alpha].append(_realised(p_values, outside, alpha))
        rows = []
        for alpha, by_layer in realised.items():
            rejections, false_share, none = torch.cat(by_layer, dim=1).mean(1).tolist()
            means = {"mean_rejections": rejections, "realised_fdp": false_share, "zero_rejection_frac": none}
            rows.append({"alpha": alpha, **means})
        report["nulls"][name] = {"layers": shares, "ks": distances, "alphas": rows}
    return strict_json(report)


# ---------------------------------------------------------------------------------------------------------
# 8. Tables: what a row holds
# ---------------------------------------------------------------------------------------------------------
#
# Three things are measured, and each has its table: generation, scores of text, scores of tasks. Three more
# tables say what the routers did. Every column is declared once, with its words: the CSV files, their types,
# the tests, the manual and the checks of the drift between them read it from here.


@dataclass(frozen=True)
class Items:
    """Which columns of a table name its item, the item's category and its document; and what it is called."""

    item: str
    category: str
    document: str
    word: str


@dataclass(frozen=True)
class Table:
    """A CSV file of a run: its name, what one row is, and its columns in order.

    Of what is measured also the kind of its rows in the checkpoint, the frame of `Results` that holds it, and
    the items that configurations are compared on.
    """

    file: str
    row: str
    columns: tuple[Column, ...]
    kind: str = ""
    frame: str = ""
    items: Items | None = None

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Column -> how it is named, for the columns that configurations are compared by."""
        return {column.name: column.metric for column in self.columns if column.metric}


# Metrics of a generated text: a function of it, and one line in TEXT_METRICS.


@dataclass(frozen=True)
class GeneratedText:
    """A text that was generated, and its token ids [n] beside those of the model's own routing [n]."""

    text: str
    tokens: Tensor
    own_tokens: Tensor


def tokens_until_divergence(generated: GeneratedText) -> int:
    """How many tokens come before the first that the model's own routing would not have written."""
    return int((generated.tokens == generated.own_tokens).long().cumprod(0).sum())


TEXT_METRICS: dict[Callable[[GeneratedText], float], Column] = {
    tokens_until_divergence: Column(
        "tokens_until_divergence",
        int,
        "new tokens before the text first differs from that of the model's own routing (with the same seed)",
    )
}

_STATUS = (Column("status", str, "`ok`, or `error`"), Column("error", str, "the reason of an error"))
_ORIGIN = (
    Column("timestamp", str, "when it was begun, UTC", clock=True),
    Column("command", str, "the command line that ran it", clock=True),
    Column("method", str, "the rule of the configuration"),
    Column("configuration", str, "the configuration as it was run: every field that its rule takes, as JSON"),
    Column("own_k", int, "how many experts the model itself runs"),
    Column("model_name", str, "folder or hub name of the model"),
    Column("model_revision", str, "commit of a hub model"),
    Column("model_hash", str, "hash over samples of all weights"),
    Column("device", str, "`cpu`, or the name of the GPU"),
    Column("dtype", str, "precision of weights and arithmetic"),
    Column("num_threads", int, "threads that PyTorch had on the CPU", clock=True),
    Column("seed", int, "seed of whatever is sampled"),
    Column("torch_version", str, "version of torch"),
    Column("transformers_version", str, "version of transformers"),
    Column("script_hash", str, "which version of the script"),
    Column("git_commit", str, "the commit that the script lies in, if any"),
    Column("input_hash", str, "hash of everything that was fed in"),
    Column("run_id", str, "hash of settings, configurations and inputs: all files of a run have the same"),
)
_CONFIG_NAME = Column("config_name", str, "name of the configuration")

GENERATION = Table(
    "bh_routing_results.csv",
    "a configuration and a prompt (and a sample of its text)",
    (
        _CONFIG_NAME,
        Column("prompt_id", str, "name of the prompt"),
        Column("sample", int, "which sample of its text, from 0"),
        Column("prompt_category", str, "category of the prompt"),
        Column("prompt_text", str, "the prompt"),
        *_STATUS,
        Column("generated_text", str, "the continuation"),
        Column("full_text", str, "prompt, with `--apply-chat-template` as it was fed in, and continuation"),
        Column("num_input_tokens", int, "tokens of the prompt"),
        Column("num_output_tokens", int, "new tokens"),
        *ROUTING_COLUMNS,
        Column("prefill_experts", float, "`avg_experts_per_token` in the prefill: the tokens of the prompt"),
        Column("decode_experts", float,
               "the same in decoding: the new tokens but the last; empty where only one was asked for"),
        *COMPUTE_COLUMNS,
        *TEXT_METRICS.values(),
        Column("inference_time_sec", float, "whole generation, prompt included", clock=True,
               metric=Metric("inference time", "s", 3)),
        Column("tokens_per_sec", float, "`num_output_tokens` / `inference_time_sec`", clock=True,
               metric=Metric("throughput", "tokens/s", 1)),
        Column("time_to_first_token_sec", float, "start to the end of the prefill", clock=True),
        Column("decode_sec_per_token", float, "time after the prefill / (new tokens - 1)", clock=True,
               metric=Metric("decode time per token", "s", 4)),
        Column("repeat_inference_time_sec", float,
               "model's own routing only: measured a second time, the noise floor", clock=True),
        Column("peak_memory_gb", float,
               "peak of allocated GPU memory during the generation, GiB; empty on a CPU", clock=True),
        Column("max_new_tokens", int, "how many new tokens were asked for"),
        Column("sampling", str, "`greedy`, or temperature and top_p as JSON"),
        *_ORIGIN,
    ),
    kind="generation",
    frame="generation",
    items=Items("prompt_id", "prompt_category", "prompt_id", "prompt"),
)  # fmt: skip
SCORES = Table(
    "text_scores.csv",
    "a configuration and a window of scored text: a prompt's reference, or a window of `--text`",
    (
        _CONFIG_NAME,
        Column("item_id", str, "name of the window, FILE:FIRST-TOKEN, or of the prompt for its reference"),
        Column("document", str, "what the window was cut from: windows of a document are not independent"),
        Column("source", str, "`text`, or `reference` of a prompt: where there is text, it alone decides"),
        Column("category", str, "category of the prompt; `text` for `--text`; where no text was named, what "
               "was scored: `heldout` or `pydoc_data.topics`"),
        *_STATUS,
        Column("nll", float, "mean NLL of the scored tokens, nats"),
        Column("num_tokens", int, "how many tokens were scored"),
        Column("num_bytes", int, "how many bytes of UTF-8 they are"),
        Column("perplexity", float, "exp(`nll`). Over windows it is exp(sum of NLL / sum of tokens)"),
        Column("bits_per_byte", float, "`nll` x `num_tokens` / (ln 2 x `num_bytes`)"),
        Column("kl_to_own", float,
               "mean over scored tokens of KL(model's own routing, this routing) over the whole vocabulary, "
               "nats, float32"),
        Column("top1_agreement", float,
               "share of scored tokens whose most probable token is that of the model's own routing"),
        Column("repeat_nll", float,
               "model's own routing only, first batch: scored a second time, the noise floor"),
        *ROUTING_COLUMNS,
        *COMPUTE_COLUMNS,
        Column("batch_size", int, "windows in the forward pass that scored it", clock=True),
        *_ORIGIN,
    ),
    kind="score",
    frame="scores",
    items=Items("item_id", "category", "document", "window"),
)  # fmt: skip
TASKS = Table(
    "task_scores.csv",
    "a configuration and a document of a task of lm-evaluation-harness",
    (
        _CONFIG_NAME,
        Column("task", str, "name of the task"),
        Column("document", str, "TASK:NUMBER of the document"),
        Column("prompt_text", str, "the end of what was asked"),
        *_STATUS,
        Column("generated_text", str, "the answer, where one is generated"),
        Column("metric", str,
               "the first metric of the task whose mean over documents the harness reports; for a perplexity "
               "`bits_per_byte` or `bits_per_word`; empty where a task has neither"),
        Column("score", float, "its value for this document"),
        *ROUTING_COLUMNS,
        Column("batch_size", int, "requests that were answered together", clock=True),
        *_ORIGIN,
    ),
    kind="task",
    frame="tasks",
    items=Items("document", "task", "document", "document"),
)  # fmt: skip

THROUGHPUT = Table(
    "throughput.csv",
    "a configuration and a batch of prompts that are continued together (`--generate-batch`)",
    (
        _CONFIG_NAME,
        Column("batch_size", int, "texts that are generated together"),
        Column("num_prompts", int, "different prompts among them"),
        *_STATUS,
        Column("repeats", int, "how often it was timed; times are medians of these"),
        Column("tokens_per_sec", float, "new tokens of all texts / `inference_time_sec`", clock=True),
        Column("inference_time_sec", float, "whole generation, prompts included", clock=True),
        Column("time_to_first_token_sec", float, "start to the end of the prefill", clock=True),
        Column("decode_sec_per_step", float,
               "time after the prefill / (new tokens - 1): a step gives each text a token", clock=True),
        Column("decode_experts", float, "mean of c in decoding"),
        Column("distinct_experts", float,
               "how many different experts of a layer run in a decoding step, mean over steps and layers"),
        Column("weight_bytes_per_step", float,
               "bytes of weights that are read for a decoding step: as `weight_bytes_per_token`, of the "
               "distinct experts. What stands in for the dropped is not counted"),
        Column("peak_memory_gb", float,
               "peak of allocated GPU memory during the generation, GiB; empty on a CPU", clock=True),
        Column("max_new_tokens", int, "how many new tokens each text gets"),
        *_ORIGIN,
    ),
    kind="throughput",
    frame="throughput",
)  # fmt: skip
MEASURED = (GENERATION, SCORES, TASKS, THROUGHPUT)
TABLE_OF_KIND = {table.kind: table for table in MEASURED}  # kind of a row in the checkpoint -> its table
KINDS = {table.frame: table for table in MEASURED if table.items}  # frame of `Results` -> what has items

_KIND = Column("kind", str, "what the tokens belong to: `generation`, `score` or `task`")
_LAYER = Column("layer", int, "MoE layer, from 0")
_RUN_ID = Column("run_id", str, "the run that wrote it")
DOCUMENTS_OF_CATEGORY = 200  # so many are kept one by one, for the permutation test: the first ones
LAYER_STATISTICS = Table(
    "layer_statistics.csv",
    "a configuration, a kind of measurement and a MoE layer",
    (
        _CONFIG_NAME,
        _KIND,
        _LAYER,
        Column("router", str, "name of its router in the model"),
        *LAYER_COLUMNS,
        Column("category_divergence_bits", float,
               "Jensen-Shannon divergence of the use of experts between categories; 0 when all use the same "
               "ones"),
        Column("category_p_value", float,
               "permutation test of that divergence, categories permuted over documents, "
               f"the first {DOCUMENTS_OF_CATEGORY} of each; empty with one category or fewer than two "
               "documents in one"),
        _RUN_ID,
    ),
)  # fmt: skip
EXPERT_USAGE = Table(
    "expert_usage.csv",
    "a configuration, a kind of measurement, a category, a MoE layer and an expert",
    (
        _CONFIG_NAME,
        _KIND,
        Column("category", str, "category of prompt or text, or the task"),
        _LAYER,
        Column("expert", int, "expert, from 0"),
        Column("count", int, "tokens it ran for"),
        Column("share", float, "of all that ran in the layer"),
        _RUN_ID,
    ),
)
EXPERT_COUNTS = Table(
    "expert_counts.csv",
    "a configuration, a kind of measurement, a MoE layer and a number of experts",
    (
        _CONFIG_NAME,
        _KIND,
        _LAYER,
        Column("num_experts", int, "so many experts ran"),
        Column("tokens", int, "for so many tokens"),
        _RUN_ID,
    ),
)
_TOKEN = (
    Column("position", int, "place of the token in its text, from 0"),
    Column("phase", str, "`prompt`: given; `new`: written; `scored`: predicted"),
    Column("token_id", int, "number of the token"),
    Column("token", str,
           "its text; that of a character of several tokens stands with the first of them"),
    Column("token_kinds", str, "its kinds, as in `token_kinds.csv`, separated by spaces"),
)  # fmt: skip
_SAMPLE = Column("sample", int, "which sample of a generated text, from 0")
TOKEN_COUNTS = Table(
    "token_counts.csv",
    "a configuration, a prompt (and a sample of its text) and a token of the text",
    (
        _CONFIG_NAME,
        Column("prompt_id", str, "name of the prompt"),
        _SAMPLE,
        *_TOKEN,
        Column("avg_experts", float, "mean over layers of how many experts ran; empty for the last token"),
        Column("experts_by_layer", str, "how many ran in each MoE layer, in order"),
        _RUN_ID,
    ),
)
TOKEN_KINDS = Table(
    "token_kinds.csv",
    "a configuration, a kind of measurement, a document and a kind of token",
    (
        _CONFIG_NAME,
        _KIND,
        Column("document", str, "the prompt, or what a window was cut from"),
        Column("token_kind", str, "kind of token"),
        Column("tokens", int, "tokens of this kind"),
        Column("avg_experts", float, "mean over these and the layers of how many experts ran"),
        Column("other_tokens", int, "all other tokens of the document"),
        Column("other_avg_experts", float, "mean over these"),
        _RUN_ID,
    ),
)
TABLES = (*MEASURED, *(LAYER_STATISTICS, EXPERT_USAGE, EXPERT_COUNTS), *(TOKEN_COUNTS, TOKEN_KINDS))
# Written on demand, and not as a plain CSV: it has a row for every decision.
TOKEN_LOG = Table(
    "token_log",
    "a configuration, a prompt or window of text, a token and a layer",
    (
        _RUN_ID,
        _CONFIG_NAME,
        _KIND,
        Column("item_id", str, "name of the prompt or window"),
        _SAMPLE,
        *_TOKEN,
        _LAYER,
        Column("num_experts", int, "how many experts ran"),
        Column("gate_mass", float, f"their share of softmax(router logits), in steps of 1/{MASS_STEPS}"),
    ),
)
TOKEN_LOG_FILES = {  # the first one that can be written is
    f"{TOKEN_LOG.file}.parquet": f"with --token-log, a row: {TOKEN_LOG.row}",
    f"{TOKEN_LOG.file}.csv.gz": "the same, where pyarrow is not installed",
}

# A spreadsheet would run a cell that begins like this; one more quote in front makes it text, and goes again.
_FORMULA = re.compile(r"(?='*[=+\-@\t\r])")
# From pandas 3 on floats are read as they were written, and saying so is deprecated.
_EXACT_FLOATS = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
_READ_AT_ONCE = 1000  # rows: reading in parts takes a quarter of the memory


def _csv_cell(value: Any) -> Any:
    """A value as it is written: text that a spreadsheet would run, or that ends a cell, is made harmless."""
    if not isinstance(value, str):
        return value
    value = value.replace("\0", "\u2400")  # many a CSV reader ends a cell there
    return f"'{value}" if _FORMULA.match(value) else value


def _plain_text(cell: str) -> str:
    """What `_csv_cell` made of a text, undone."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell, 1) else cell


def write_table(table: Table, rows: Iterable[Row], folder: Path) -> Path:
    """Write rows as CSV, whole or not at all, one after the other: memory does not grow with them."""
    path = folder / table.file
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(table.names)
        for row in rows:
            writer.writerow([_csv_cell(row.get(name)) for name in table.names])
    return path


def _csv_header(path: Path) -> list[str]:
    """The names of a CSV's columns. Raises UserError where the file is no CSV."""
    try:
        return list(pd.read_csv(path, nrows=0).columns)
    except (OSError, ValueError) as error:  # no file, undecodable bytes, no columns
        raise UserError(f"{path} is not a results CSV: {_first_line(error)}") from error


def _refuse_lacking(path: Path, frame: pd.DataFrame, needed: Iterable[str]) -> None:
    """UserError where a CSV lacks a column that every version of this script wrote."""
    lacking = sorted(set(needed) - set(frame))
    if lacking:
        raise UserError(f"{path} is not a results CSV of this script: it lacks {', '.join(lacking)}")


def read_csv(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    """A CSV of this script as it was written, with the columns it has, each of its declared type.

    A missing text is "", a missing number NaN. Raises UserError where the file is none of this script's.
    """
    types = {column.name: column.kind for column in columns}
    header = _csv_header(path)
    texts = [name for name in header if types.get(name, str) is str]
    # A generated text may well be "NA" or "null": only number columns have missing values.
    missing = dict.fromkeys(set(header) - set(texts), [""])
    try:
        parts = pd.read_csv(
            path,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values=missing,
            chunksize=_READ_AT_ONCE,
            **_EXACT_FLOATS,
        )
        frames = [part.assign(**{name: part[name].map(_plain_text) for name in texts}) for part in parts]
    except (OSError, ValueError) as error:  # undecodable bytes, words in a number column
        raise UserError(f"{path} is not a results CSV: {_first_line(error)}") from error
    return pd.concat(frames, ignore_index=True)


def _number_cells(cells: pd.Series, kind: type) -> pd.Series:
    """Cells as numbers of a kind, NaN for an empty one. ValueError or TypeError where one is none."""
    if kind is float and not pd.api.types.is_numeric_dtype(cells):
        # pandas 2 loses the last digit of a number in a text, Python does not.
        cells = cells.map(lambda cell: float(cell) if isinstance(cell, str) and cell else cell)
    return pd.to_numeric(cells)


def fit_table(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """`frame` with exactly the columns of `table`, in order: what it lacks is empty, what is foreign goes.

    Tables of older scripts lack columns, and frames made by hand may.
    """
    fitted = {}
    for column in table.columns:
        if column.name not in frame:
            empty = "" if column.kind is str else math.nan
            fitted[column.name] = pd.Series(empty, index=frame.index)
        elif column.kind is str:
            fitted[column.name] = frame[column.name].fillna("").astype(str)
        else:
            try:
                fitted[column.name] = _number_cells(frame[column.name], column.kind)
            except (ValueError, TypeError) as error:
                why = f"column {column.name}: {_first_line(error)}"
                raise UserError(f"{table.file} is not a results CSV: {why}") from error
    return pd.DataFrame(fitted)


def read_table(table: Table, folder: Path) -> pd.DataFrame:
    """A table of a run; without rows where the run has no such file. Raises UserError for another's file."""
    path = folder / table.file
    if not path.is_file():
        return fit_table(pd.DataFrame(), table)
    frame = read_csv(path, table.columns)
    _refuse_lacking(path, frame, {"config_name", "status"} & set(table.names))
    return fit_table(frame, table)


# What `Results.summary` shows the means of.
RESULTS_MEANS = ("avg_experts_per_token", "effective_experts", "inference_time_sec", "nll", "score")


@dataclass(frozen=True)
class Results:
    """What a run measured, as frames with the columns of GENERATION, SCORES and TASKS. Beside these three,
    over which it iterates, stands THROUGHPUT: it has no items to pair.

    In a notebook it shows itself as `summary`.
    """

    generation: pd.DataFrame
    scores: pd.DataFrame
    tasks: pd.DataFrame
    throughput: pd.DataFrame = dataclasses.field(
        default_factory=lambda: fit_table(pd.DataFrame(), THROUGHPUT)
    )

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return iter((self.generation, self.scores, self.tasks))

    @property
    def num_failed(self) -> int:
        return sum(int((frame["status"] != "ok").sum()) for frame in (*self, self.throughput))

    def __str__(self) -> str:
        amounts = zip(("experiments", "scores of text", "scores of tasks"), map(len, self), strict=True)
        return ", ".join(f"{number} {what}" for what, number in amounts if number) or "nothing"

    def finished(self) -> Results:
        """The rows that did not fail."""
        return Results(*(frame[frame["status"] == "ok"] for frame in (*self, self.throughput)))

    def summary(self) -> pd.DataFrame:
        """One row a table and configuration: rows, how many failed, and means over those that did not."""
        parts = {}
        for frame, (name, table) in zip(self, KINDS.items(), strict=True):
            has_failed = (frame["status"] != "ok").groupby(frame["config_name"], sort=False)
            rows = has_failed.agg(rows="size", failed="sum")
            done = frame[frame["status"] == "ok"].groupby("config_name", sort=False)
            shown = [column for column in RESULTS_MEANS if column in table.names]
            if len(frame):
                parts[name] = rows.join(done[shown].mean())
        return pd.concat(parts, names=["table"]) if parts else pd.DataFrame()

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="{:.3f}".format, na_rep="")

    @classmethod
    def read(cls, folder: Path) -> Results:
        """What a run left in its folder. Raises UserError where it left no table."""
        needed = [table.file for table in KINDS.values()]  # there is no throughput without these
        if not any((folder / file).is_file() for file in needed):
            files = ", ".join(needed)
            raise UserError(
                f"{folder} holds none of {files}: run the experiments first, or give their folder"
            )
        if not is_of_older_script(folder):
            return cls(**{table.frame: read_table(table, folder) for table in MEASURED})
        try:
            return results_of_older_script(folder)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # a cell that no script wrote
            path = folder / GENERATION.file
            raise UserError(f"{path} is not a results CSV: {_first_line(error)}") from error


def run_ids(frame: pd.DataFrame) -> set[str]:
    """The runs whose rows these are; "" for an older script's."""
    return set(frame["run_id"])


def read_side_file(path: Path, runs: set[str]) -> dict[str, Any]:
    """A JSON file that a run left beside its tables; empty where there is none of just these runs."""
    content = read_json_object(path)
    return content if {content.get("run_id", "")} == runs else {}


def read_side_table(table: Table, folder: Path, runs: set[str]) -> pd.DataFrame:
    """A table by layer that a run left; without rows where there is none of just these runs."""
    try:
        frame = read_table(table, folder)
    except UserError:
        frame = fit_table(pd.DataFrame(), table)
    return frame if run_ids(frame) == runs else frame[:0]


# Scripts before the three tables wrote everything into one CSV. It is read, as far as it goes.


def is_of_older_script(folder: Path) -> bool:
    """Whether the folder's results are in the one table of older scripts."""
    path = folder / GENERATION.file
    return path.is_file() and "reference_nll" in _csv_header(path)


_OLDER_NAMES = {  # column of an older script -> column of SCORES or TASKS
    "prompt_id": "item_id",
    "prompt_category": "category",
    "reference_nll": "nll",
    "reference_tokens": "num_tokens",
    "reference_bytes": "num_bytes",
    "reference_perplexity": "perplexity",
    "kl_to_baseline": "kl_to_own",
    "repeat_reference_nll": "repeat_nll",
    "reference_avg_experts": "avg_experts_per_token",
    "reference_floor_frac": "floor_frac",
    "reference_cap_frac": "cap_frac",
    "reference_zero_rejection_frac": "zero_rejection_frac",
}
_OLDER_NUMBERS = ("k", "alpha", "p", "ratio", "threshold", "temperature", "min_k", "max_k")
_OLDER_WORDS = ("p_values", "renormalize")


def _older_configuration(row: Row) -> str:
    """The `configuration` of a row whose fields were columns of their own."""
    given: dict[str, Any] = {"method": row["method"]}
    for name in _OLDER_NUMBERS:
        if row.get(name):
            number = float(row[name])
            given[name] = int(number) if number.is_integer() else number
    given |= {name: row[name] for name in _OLDER_WORDS if row.get(name)}
    if row.get("shuffle"):
        given["shuffle"] = row["shuffle"] == "True"
    return configuration_cell(resolve_config(row["config_name"], given))


def results_of_older_script(folder: Path) -> Results:
    """The three tables from the one of an older script; what it did not record is empty."""
    path = folder / GENERATION.file
    older = read_csv(path, ())  # all as text
    needed = {"config_name", "prompt_id", "status", "method", "inference_time_sec", "reference_nll"}
    _refuse_lacking(path, older, needed)
    rows = older.to_dict("records")
    older["configuration"] = [_older_configuration(row) for row in rows]
    is_own = (older["method"] == "topk") & (
        older["repeat_inference_time_sec"] + older["repeat_reference_nll"] != ""
    )
    older["own_k"] = older.loc[is_own, "k"].max() if is_own.any() else ""

    of_task = older["task_metric"] != "" if "task_metric" in older else older["config_name"] == ""
    older["effective_experts"] = older["avg_experts_per_token"]  # nothing stood in for a dropped expert
    tasks = older[of_task].rename(
        columns={"prompt_category": "task", "task_metric": "metric", "task_score": "score"}
    )
    routing = {column.name for column in ROUTING_COLUMNS}
    renamed = routing & set(_OLDER_NAMES.values())
    of_generation = sorted(routing - renamed)  # where a text was generated; else of the scored window
    scores = older[older["reference_nll"] != ""].drop(columns=list(renamed)).rename(columns=_OLDER_NAMES)
    scores.loc[scores["inference_time_sec"] != "", of_generation] = ""
    present = set(older["config_name"])
    ladder = []  # the static scores that the own routing's rows carried as JSON
    for row in scores[scores["static_nll"] != ""].to_dict("records"):
        for k, nll in json.loads(row["static_nll"]).items():
            name = _unused_name(f"topk_{k}", present)
            config = resolve_config(name, {"method": "topk", "k": int(k)})
            point = {"config_name": name, "configuration": configuration_cell(config), "nll": nll}
            lacking = ("perplexity", "bits_per_byte", "kl_to_own", "top1_agreement", "repeat_nll")
            unknown = dict.fromkeys((*lacking, *of_generation), "")
            ladder.append(row | unknown | point | {"avg_experts_per_token": k})
    scores = pd.concat([scores, pd.DataFrame(ladder, columns=scores.columns)], ignore_index=True)
    scores["effective_experts"] = scores["avg_experts_per_token"]
    generation = older[~of_task & (older["reference_nll"] == "") | (older["inference_time_sec"] != "")]
    return Results(fit_table(generation, GENERATION), fit_table(scores, SCORES), fit_table(tasks, TASKS))


EMPTY_RESULTS = Results(**{table.frame: fit_table(pd.DataFrame(), table) for table in MEASURED})


def divergence_bits(use: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of the categories' use of experts [categories, L, E], bits: [L]."""
    shares = use / use.sum(2, keepdims=True)
    entropy_of_mean = special.entr(shares.mean(0)).sum(-1)
    mean_entropy = special.entr(shares).mean(0).sum(-1)
    return (entropy_of_mean - mean_entropy) / math.log(2)


class FirstDocuments:
    """Of the first documents of each category the use of experts, for the permutation test.

    They are DOCUMENTS_OF_CATEGORY at most; fewer where there are many categories, so that no more than
    MAX_DOCUMENTS are held, but always two.
    """

    MAX_DOCUMENTS = 2000
    PERMUTATIONS = 199
    ROUNDING = 1e-12  # bits; categories that swap their documents diverge as before, but for this much

    def __init__(self) -> None:
        self.use: dict[tuple[str, str], np.ndarray] = {}  # (category, document) -> [L, E]
        self.num_kept: collections.Counter[str] = collections.Counter()  # by category

    def add(self, category: str, document: str, use: np.ndarray) -> None:
        """Add the use of experts [L, E] in a document, or in a part of it."""
        if category not in self.num_kept:
            self.num_kept[category] = 0
            self._trim()
        key = (category, document)
        if key not in self.use:
            if self.num_kept[category] >= self._quota():
                return
            self.num_kept[category] += 1
        total = self.use.get(key, 0) + use
        self.use[key] = total.astype(np.min_scalar_type(total.max()))  # there may be thousands: as few bytes

    def _quota(self) -> int:
        """How many documents of each category are kept."""
        return max(2, min(DOCUMENTS_OF_CATEGORY, self.MAX_DOCUMENTS // len(self.num_kept)))

    def _trim(self) -> None:
        """Let go what the quota, with one category more, has no room for: the last documents of each."""
        quota = self._quota()
        if max(self.num_kept.values()) <= quota:
            return
        for key in reversed(list(self.use)):
            category, _ = key
            if self.num_kept[category] > quota:
                del self.use[key]
                self.num_kept[category] -= 1

    @property
    def can_be_compared(self) -> bool:
        """Whether there are two categories, and two documents in each."""
        return len(self.num_kept) > 1 and min(self.num_kept.values()) > 1

    def p_values(self) -> np.ndarray:
        """Is it chance that the categories use different experts? A permutation test for each layer: [L]."""
        labels, categories = pd.factorize(np.array([category for category, _ in self.use]))
        use = np.stack(list(self.use.values())).astype(float)  # [documents, L, E]

        def divergence(order: np.ndarray) -> np.ndarray:
            is_in = np.eye(len(categories))[labels[order]]  # [documents, categories]
            return divergence_bits(np.einsum("dc,dle->cle", is_in, use))

        generator = np.random.default_rng(0)
        observed = divergence(np.arange(len(labels)))
        permuted = [divergence(generator.permutation(len(labels))) for _ in range(self.PERMUTATIONS)]
        as_large = (np.stack(permuted) >= observed - self.ROUNDING).sum(0)
        return (1 + as_large) / (1 + self.PERMUTATIONS)


class LayerTables:
    """What the routers of every layer did, summed by configuration, kind and category: three CSV files."""

    def __init__(self, layers: Sequence[MoELayer], run_id: str):
        self.routers = {layer.index: layer.name for layer in layers}
        self.run_id = run_id
        # (configuration, kind) -> category -> what the routers did
        self.sums: dict[tuple[str, str], dict[str, RoutingStatistics]] = collections.defaultdict(dict)
        self.documents: dict[tuple[str, str], FirstDocuments] = collections.defaultdict(FirstDocuments)

    def add(self, name: str, kind: str, category: str, document: str, routing: RoutingStatistics) -> None:
        """Count what the routers did with one document, or a part of it."""
        sums = self.sums[name, kind]
        sums[category] = sums[category] + routing if category in sums else routing
        self.documents[name, kind].add(category, document, routing.use)

    def _divergence(self, name: str, kind: str) -> pd.DataFrame:
        """Do categories use different experts? One row a layer; none where there is nothing to compare."""
        documents = self.documents[name, kind]
        if not documents.can_be_compared:
            return pd.DataFrame({"category_divergence_bits": [], "category_p_value": []})
        use = np.stack([routing.use for routing in self.sums[name, kind].values()])  # [categories, L, E]
        columns = {"category_divergence_bits": divergence_bits(use), "category_p_value": documents.p_values()}
        return pd.DataFrame(columns, index=list(self.routers))

    def _layer_rows(self) -> Iterator[Row]:
        for (name, kind), by_category in self.sums.items():
            total = functools.reduce(RoutingStatistics.__add__, by_category.values()).by_layer()
            table = total.join(self._divergence(name, kind))
            about = {"config_name": name, "kind": kind, "run_id": self.run_id}
            for layer, row in zip(table.index, table.to_dict("records"), strict=True):
                yield about | {"layer": layer, "router": self.routers[layer]} | strict_json(row)

    def _usage_rows(self) -> Iterator[Row]:
        for (name, kind), by_category in self.sums.items():
            for category, routing in by_category.items():
                about = {"config_name": name, "kind": kind, "category": category, "run_id": self.run_id}
                share = routing.use / routing.use.sum(1, keepdims=True).clip(min=1)  # [L, E]
                for place, layer in enumerate(routing.layers):
                    for expert, count in enumerate(routing.use[place].tolist()):
                        more = {"expert": expert, "count": count, "share": float(share[place, expert])}
                        yield about | {"layer": layer.index} | more

    def _count_rows(self) -> Iterator[Row]:
        for (name, kind), by_category in self.sums.items():
            total = functools.reduce(RoutingStatistics.__add__, by_category.values())
            about = {"config_name": name, "kind": kind, "run_id": self.run_id}
            for place, layer in enumerate(total.layers):
                for number, tokens in enumerate(total.counts[place].tolist()):
                    if tokens:
                        yield about | {"layer": layer.index, "num_experts": number, "tokens": tokens}

    def write(self, folder: Path) -> None:
        """Write the three tables, if anything was counted."""
        if self.sums:
            write_table(LAYER_STATISTICS, self._layer_rows(), folder)
            write_table(EXPERT_USAGE, self._usage_rows(), folder)
            write_table(EXPERT_COUNTS, self._count_rows(), folder)


# What each token got


@dataclass(frozen=True)
class TokenKind:
    """A kind of token: what the report calls such tokens, and which they are."""

    title: str
    words: str


# A token has one of the four kinds in the middle; or none, where it is a special token or white space.
KINDS_OF_TOKENS = {
    "first_position": TokenKind("first positions", "the first token of each text"),
    "word_start": TokenKind(
        "beginnings of words",
        "tokens with a letter that begin with white space, or after one that ends in no letter or digit",
    ),
    "word_continuation": TokenKind("continuations of words", "all other tokens with a letter"),
    "digits": TokenKind("digits", "tokens with a digit and no letter"),
    "punctuation": TokenKind("punctuation", "tokens with no letter or digit, but something to be seen"),
    "rare": TokenKind(
        "rare tokens", "those that occur once in all that a configuration generated, or scored"
    ),
    "frequent": TokenKind("frequent tokens", "the most frequent ones, which make up half of that"),
}


def word_kind(text: str, before: str) -> str:
    """The kind of a token by its text and that of the token before it; empty for white space."""
    if any(character.isalpha() for character in text):
        begins = text[0].isspace() or not before[-1:].isalnum()
        return "word_start" if begins else "word_continuation"
    if any(character.isnumeric() for character in text):
        return "digits"
    return "punctuation" if text.strip() else ""


class TokenTexts:
    """What tokens stand for, of any tokenizer that can decode: each is decoded behind a letter, so that the
    space before a word is seen also where the tokenizer drops it at the beginning of a text."""

    LONGEST = 8  # tokens that a character is looked for in
    UNKNOWN = "\ufffd"  # what part of a character is decoded to

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special = set(getattr(tokenizer, "all_special_ids", ()))
        self.anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self.anchor_text = self._decode(self.anchor)
        self._one = functools.lru_cache(maxsize=None)(lambda token: self._behind_anchor([token]))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _behind_anchor(self, ids: Sequence[int]) -> str:
        text = self._decode([*self.anchor, *ids])
        behind = text[len(self.anchor_text) :]
        return behind if behind and text.startswith(self.anchor_text) else self._decode(ids)

    def _character(self, ids: Sequence[int]) -> tuple[str, int]:
        """The character that `ids` begin with in the middle of, and how many of them it takes."""
        for length in range(2, min(len(ids), self.LONGEST) + 1):
            text = self._behind_anchor(ids[:length])
            if self.UNKNOWN not in text:
                return text, length
        return self._one(ids[0]), 1

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; a character of several stands with the first, and the others are empty."""
        ids = [int(token) for token in ids]
        texts: list[str] = []
        while len(texts) < len(ids):
            text = self._one(ids[len(texts)])
            length = 1
            if self.UNKNOWN in text:
                text, length = self._character(ids[len(texts) :])
            texts += [text] + [""] * (length - 1)
        return texts

    def word_kinds(self, ids: Sequence[int], texts: Sequence[str]) -> list[str]:
        """`word_kind` of each token; empty for special ones."""
        kinds = []
        before = ""
        for token, text in zip(ids, texts, strict=True):
            is_special = int(token) in self.special
            kinds.append("" if is_special else word_kind(text, before))
            if text:
                before = "" if is_special else text
        return kinds


@dataclass(frozen=True)
class RoutedText:
    """A text under a configuration, and what each of its tokens got. item: the prompt or window."""

    config_name: str
    kind: str
    source: str  # of a scored text, as in SCORES; empty for a generated one
    item: str
    sample: int
    category: str
    document: str
    routing: TokenRouting

    @property
    def group(self) -> tuple[str, str, str]:
        """The texts among which its tokens are rare or frequent."""
        return self.config_name, self.kind, self.source

    def phases(self) -> list[str]:
        given = self.routing.num_given
        follows = "new" if self.kind == "generation" else "scored"
        return ["prompt"] * given + [follows] * (len(self.routing.ids) - given)


@dataclass(frozen=True)
class Frequencies:
    """Which tokens are rare and which are frequent, in a group of texts."""

    rare: np.ndarray
    frequent: np.ndarray

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> Frequencies:
        ids = np.array(sorted(counts, key=lambda token: (-counts[token], token)))
        number = np.array([counts[token] for token in ids.tolist()])
        before = number.cumsum() - number  # tokens that are more frequent
        return cls(ids[number == 1], ids[before < number.sum() / 2])


def _write_parquet(frames: Iterable[pd.DataFrame], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int32(), float: pa.float32()}
    schema = pa.schema([(column.name, types[column.kind]) for column in TOKEN_LOG.columns])
    with pq.ParquetWriter(path, schema) as writer:
        for frame in frames:
            writer.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))


def _write_csv_gz(frames: Iterable[pd.DataFrame], path: Path) -> None:
    texts = [column.name for column in TOKEN_LOG.columns if column.kind is str]
    # Without a name and a time in it the file is the same whenever the same is written.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write((",".join(f'"{name}"' for name in TOKEN_LOG.names) + "\n").encode())
        for frame in frames:
            safe = frame.assign(**{name: frame[name].map(_csv_cell) for name in texts})
            lines = safe.to_csv(
                index=False,
                header=False,
                quoting=csv.QUOTE_NONNUMERIC,
                lineterminator="\n",
                float_format="%.6f",
            )
            packed.write(lines.encode())


def write_token_log(frames: Iterable[pd.DataFrame], folder: Path) -> Path:
    """Write TOKEN_LOG, whole or not at all: as parquet where pyarrow is installed, else as csv.gz."""
    parquet, csv_gz = TOKEN_LOG_FILES
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    path = folder / (parquet if has_pyarrow else csv_gz)
    with replacing(path) as part:
        if has_pyarrow:
            _write_parquet(frames, part)
        else:
            _write_csv_gz(frames, part)
    logger.info(f"token log: {path}" + ("" if has_pyarrow else "; with pyarrow installed it is parquet"))
    return path


class TokenTables:
    """What each token of a run got: two tables and, on demand, a log with a row a token and layer.

    texts: called for a pass over the texts, of which one at a time is held in memory. Of the scored ones the
    table of kinds counts those that decide; the log has all.
    """

    LOGGED_TOGETHER = 100_000  # rows

    def __init__(
        self,
        texts: Callable[[], Iterator[RoutedText]],
        token_texts: TokenTexts,
        layers: Sequence[MoELayer],
        run_id: str,
    ):
        self.texts = texts
        self.token_texts = token_texts
        self.layers = np.array([layer.index for layer in layers])
        self.run_id = run_id
        self.frequencies = self._frequencies()
        scored = (source for _, kind, source in self.frequencies if kind == "score")
        self.deciding = deciding_sources(scored)

    def _frequencies(self) -> dict[tuple[str, str, str], Frequencies]:
        """Group of texts -> which of its tokens are rare and frequent."""
        counts: dict[tuple[str, str, str], collections.Counter[int]]
        counts = collections.defaultdict(collections.Counter)
        for text in self.texts():
            counts[text.group].update(text.routing.ids[: len(text.routing.counts)].tolist())
        return {group: Frequencies.of(numbers) for group, numbers in counts.items()}

    def _is_of_kind(self, text: RoutedText, word_kinds: Sequence[str]) -> dict[str, np.ndarray]:
        """Kind of token -> which of the tokens [n] are of it."""
        ids = text.routing.ids
        frequencies = self.frequencies[text.group]
        words = np.array(word_kinds)
        is_of_kind = {kind: words == kind for kind in KINDS_OF_TOKENS}
        is_of_kind["first_position"] = np.arange(len(ids)) == 0
        is_of_kind["rare"] = np.isin(ids, frequencies.rare)
        is_of_kind["frequent"] = np.isin(ids, frequencies.frequent)
        return is_of_kind

    def _tokens(self, text: RoutedText) -> pd.DataFrame:
        """The tokens of a text, one row each: what the table and the log say of them."""
        ids = text.routing.ids
        texts = self.token_texts.texts(ids)
        is_of_kind = self._is_of_kind(text, self.token_texts.word_kinds(ids, texts))
        kinds = [
            " ".join(kind for kind in KINDS_OF_TOKENS if is_of_kind[kind][place]) for place in range(len(ids))
        ]
        return pd.DataFrame(
            {
                "position": np.arange(len(ids)),
                "phase": text.phases(),
                "token_id": ids,
                "token": texts,
                "token_kinds": kinds,
            }
        )

    def _count_rows(self) -> Iterator[Row]:
        for text in self.texts():
            if text.kind != "generation":
                continue
            about = {"config_name": text.config_name, "prompt_id": text.item, "sample": text.sample}
            counts = text.routing.counts
            for place, token in enumerate(self._tokens(text).to_dict("records")):
                row = about | token | {"run_id": self.run_id}
                if place < len(counts):
                    row["avg_experts"] = float(counts[place].mean())
                    row["experts_by_layer"] = " ".join(map(str, counts[place].tolist()))
                yield row

    def _kind_rows(self) -> Iterator[Row]:
        # (configuration, kind, document) -> for each kind of token, and for all: tokens, and their experts
        # in all layers
        sums: dict[tuple[str, str, str], np.ndarray]
        sums = collections.defaultdict(lambda: np.zeros((len(KINDS_OF_TOKENS) + 1, 2), dtype=np.int64))
        for text in self.texts():
            if text.kind == "score" and text.source not in self.deciding:
                continue
            experts = text.routing.counts.sum(1)  # [n]
            ids = text.routing.ids
            word_kinds = self.token_texts.word_kinds(ids, self.token_texts.texts(ids))
            is_of_kind = self._is_of_kind(text, word_kinds)
            flags = np.array([*is_of_kind.values(), np.ones(len(ids), bool)])[:, : len(experts)]
            key = (text.config_name, text.kind, text.document)
            sums[key] += np.stack([flags.sum(1), flags @ experts], axis=1)
        for (name, kind, document), of_document in sums.items():
            about = {"config_name": name, "kind": kind, "document": document, "run_id": self.run_id}
            *of_kinds, of_all = of_document
            for token_kind, of_kind in zip(KINDS_OF_TOKENS, of_kinds, strict=True):
                row = about | {"token_kind": token_kind}
                for prefix, (tokens, experts) in (("", of_kind), ("other_", of_all - of_kind)):
                    row[f"{prefix}tokens"] = int(tokens)
                    if tokens:
                        row[f"{prefix}avg_experts"] = float(experts / (tokens * len(self.layers)))
                yield row

    def _log_frames(self) -> Iterator[pd.DataFrame]:
        """The rows of the log, so many together that writing them pays."""
        frames = []
        for text in self.texts():
            counts = text.routing.counts
            num_layers = len(self.layers)
            tokens = self._tokens(text)[: len(counts)]
            frame = tokens.loc[tokens.index.repeat(num_layers)]
            about = {"config_name": text.config_name, "kind": text.kind, "item_id": text.item}
            frame = frame.assign(
                **about,
                run_id=self.run_id,
                sample=text.sample,
                layer=np.tile(self.layers, len(counts)),
                num_experts=counts.reshape(-1),
                gate_mass=text.routing.mass.reshape(-1) / MASS_STEPS,
            )
            frames.append(frame[TOKEN_LOG.names])
            if sum(map(len, frames)) >= self.LOGGED_TOGETHER:
                yield pd.concat(frames, ignore_index=True)
                frames = []
        if frames:
            yield pd.concat(frames, ignore_index=True)

    def write(self, folder: Path, with_log: bool) -> None:
        """Write the tables, and the log if it is asked for; what this run does not have goes."""
        kinds = {kind for _, kind, _ in self.frequencies}
        written = []
        if "generation" in kinds:
            written.append(write_table(TOKEN_COUNTS, self._count_rows(), folder))
        if kinds:
            written.append(write_table(TOKEN_KINDS, self._kind_rows(), folder))
        if kinds and with_log:
            written.append(write_token_log(self._log_frames(), folder))
        for name in (TOKEN_COUNTS.file, TOKEN_KINDS.file, *TOKEN_LOG_FILES):
            if folder / name not in written:
                discard(folder / name)


def read_token_log(folder: str | Path) -> pd.DataFrame:
    """What a run with token_log wrote: TOKEN_LOG, a row a token and layer. Raises UserError where it is
    missing, or parquet that nothing installed here can read."""
    parquet, csv_gz = (Path(folder) / name for name in TOKEN_LOG_FILES)
    if parquet.exists():
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{parquet} needs pyarrow: pip install pyarrow")
        log = pd.read_parquet(parquet)
        return log if list(log.columns) == TOKEN_LOG.names else fit_table(log, TOKEN_LOG)
    if not csv_gz.exists():
        raise UserError(f"{folder} holds no token log: run the experiments with --token-log")
    return fit_table(read_csv(csv_gz, TOKEN_LOG.columns), TOKEN_LOG)


# The view of the same: texts as HTML, each token shaded by its experts


VIEWED_TOKENS = 2000  # that `BHExperimentRunner.routing` keeps for a notebook
VIEW_LIMIT = 900_000  # characters of HTML; prompts beyond that are only counted
VIEWED_AT_FIRST = 3  # configurations that are shown without being selected
_SHADES = 10
_SHADED_FROM_TO = (
    0.05,
    0.95,
)  # quantiles of the tokens' experts: a few odd tokens must not blanch the others


@dataclass(frozen=True)
class ViewedText:
    """A text to be shown. experts, by_layer: of each token, its mean number of experts and their numbers by
    layer in words; NaN and empty for one that was not routed."""

    name: str  # of the prompt
    category: str
    config_name: str
    tokens: list[str]
    experts: np.ndarray
    by_layer: list[str]
    num_given: int


def _shown_token(text: str) -> str:
    """The text of a token in HTML: nothing of it acts, and line ends and odd characters are seen."""
    if not text:
        return "·"  # the rest of a character whose first token shows all of it
    return "↵".join(html.escape(_visible(line)) for line in text.replace("\r\n", "\n").split("\n"))


_VIEW_STYLE = (
    ".bh-tokens{overflow-wrap:anywhere}"
    ".bh-tokens p{margin:.2em 0 .8em}"
    ".bh-tokens details{border-top:1px solid rgba(128,128,128,.4);padding:.4em 0}"
    ".bh-tokens summary{cursor:pointer;font-weight:600}"
    ".bh-tokens details p{white-space:pre-wrap;line-height:1.7;overflow:hidden}"
    ".bh-tokens div,.bh-tokens .legend,.bh-tokens .choice{font-size:.9em}"
    ".bh-tokens details div{margin:.5em 0 0}"
    ".bh-tokens label{display:inline-block;margin-right:.8em}"
    ".bh-tokens u{text-decoration:none;border-radius:2px}"
    ".bh-tokens .legend span{white-space:nowrap}"
    ".bh-tokens .legend u{border:solid rgba(128,128,128,.5);border-width:1px 0;border-radius:0}"
    ".bh-tokens u[title]:hover{outline:1px solid}"
)


class _TokenView:
    """The HTML of `token_view_html`; all texts in it have the same scale of shades."""

    def __init__(self, texts: Sequence[ViewedText]):
        self.by_prompt: dict[str, list[ViewedText]] = collections.defaultdict(list)
        for text in texts:
            self.by_prompt[text.name].append(text)
        experts: dict[str, list[np.ndarray]] = collections.defaultdict(list)  # by configuration
        for text in texts:
            experts[text.config_name].append(text.experts)
        # What adapts is what one wants to see, so it comes first.
        adapting = [name for name, parts in experts.items() if np.nanstd(np.concatenate(parts)) > 0]
        self.configs = [*adapting, *(name for name in experts if name not in adapting)]
        self.shown = set(self.configs[:VIEWED_AT_FIRST])
        scaled = [part for name in adapting or experts for part in experts[name]]
        self.low, self.high = np.nanquantile(np.concatenate(scaled), _SHADED_FROM_TO).tolist()

    def shade(self, experts: float) -> int:
        share = (experts - self.low) / (self.high - self.low) if self.high > self.low else 1.0
        return min(max(int(share * _SHADES), 0), _SHADES - 1)

    def token(self, text: str, experts: float, by_layer: str) -> str:
        shown = _shown_token(text)
        if math.isnan(experts):
            return f"<u>{shown}</u>"
        title = html.escape(f"{experts:.2f}: {by_layer}")
        return f'<u class="s{self.shade(experts)}" title="{title}">{shown}</u>'

    def text(self, text: ViewedText) -> str:
        tokens = [self.token(*of) for of in zip(text.tokens, text.experts, text.by_layer, strict=True)]
        for place, (token, follows) in enumerate(itertools.pairwise(text.tokens)):
            if token.endswith("\n") and not follows.startswith("\n"):  # empty lines would only take room
                tokens[place] += "\n"
        given = "".join(tokens[: text.num_given])
        written = "".join(tokens[text.num_given :])
        mean = float(np.nanmean(text.experts))
        return (
            f'<div class="c{self.configs.index(text.config_name)}">'
            f"<code>{html.escape(text.config_name)}</code> {mean:.2f} experts per token and layer"
            f"<p><i>{given}</i>{written}</p></div>\n"
        )

    def prompt(self, name: str, is_open: bool) -> str:
        texts = self.by_prompt[name]
        parts = sorted(texts, key=lambda text: self.configs.index(text.config_name))
        summary = html.escape(_visible(f"{texts[0].category}: {name}" if texts[0].category else name))
        opened = " open" if is_open else ""
        return f"<details{opened}><summary>{summary}</summary>\n{''.join(map(self.text, parts))}</details>\n"

    def legend(self) -> str:
        swatches = "".join(f'<u class="s{number}">&nbsp;&nbsp;</u>' for number in range(_SHADES))
        return (
            '<p class="legend">Experts that ran for a token, mean over layers: '
            f"<span>≤ {self.low:.1f} {swatches} ≥ {self.high:.1f}.</span> "
            "<i>The prompt is in italics</i>, what was written follows. Pointing at a token shows its mean, "
            "then its number in each layer from 0. The last token was never routed.</p>\n"
        )

    def choice(self) -> str:
        """Which configurations are shown: boxes to tick, which work by style alone."""
        boxes = []
        for number, name in enumerate(self.configs):
            ticked = " checked" if name in self.shown else ""
            label = f"<code>{html.escape(name)}</code>"
            boxes.append(f'<label><input type="checkbox" class="i{number}"{ticked}>{label}</label>')
        return f'<p class="choice">{" ".join(boxes)}</p>\n' if len(boxes) > 1 else ""

    def style(self) -> str:
        """All of it is for this fragment only. Shades let the page's own colours through, light or dark."""
        shades = "".join(
            f".bh-tokens .s{number}{{background:rgba(40,150,220,{0.07 * number:.2f})}}"
            for number in range(_SHADES)
        )
        hidden = "".join(
            f".bh-tokens:has(.i{number}:not(:checked)) .c{number}{{display:none}}"
            for number in range(len(self.configs))
        )
        return f"<style>{_VIEW_STYLE}{shades}{hidden}</style>\n"

    def html(self) -> str:
        """Prompts in order; the first of each category is open. Where there is not room for all, each
        category has its share."""
        rank: dict[str, int] = {}  # of a prompt in its category
        num_seen: collections.Counter[str] = collections.Counter()  # by category
        for name, texts in self.by_prompt.items():
            category = texts[0].category
            rank[name] = num_seen[category]
            num_seen[category] += 1
        parts: dict[str, str] = {}
        room = VIEW_LIMIT
        for name in sorted(self.by_prompt, key=rank.__getitem__):
            part = self.prompt(name, is_open=rank[name] == 0)
            room -= len(part.encode())
            if parts and room < 0:
                break
            parts[name] = part
        left_out = len(self.by_prompt) - len(parts)
        more = f"<p>{left_out} more prompts are in <code>{TOKEN_COUNTS.file}</code>.</p>" if left_out else ""
        body = "".join(parts[name] for name in self.by_prompt if name in parts)
        head = self.style() + self.legend() + self.choice()
        return f'<div class="bh-tokens">\n{head}{body}{more}</div>\n'


def token_view_html(texts: Sequence[ViewedText]) -> str:
    """Texts as a fragment of HTML, each token shaded by its mean number of experts; empty without any.

    It needs no script, carries its own style, and nothing in the texts acts as markup.
    """
    texts = [text for text in texts if not np.isnan(text.experts).all()]
    return _TokenView(texts).html() if texts else ""


def view_texts(config_name: str, token_texts: TokenTexts, texts: Sequence[TokenRouting]) -> str:
    """`token_view_html` of what a recorder kept, for a notebook."""
    viewed = []
    for number, text in enumerate(texts, 1):
        by_layer = [" ".join(map(str, counts)) for counts in text.counts.tolist()]
        tokens = token_texts.texts(text.ids)
        experts = text.counts.mean(1)
        viewed.append(
            ViewedText(f"text {number}", "", config_name, tokens, experts, by_layer, text.num_given)
        )
    return token_view_html(viewed)


def viewed_texts(counts: pd.DataFrame, categories: Mapping[str, str]) -> list[ViewedText]:
    """The texts of TOKEN_COUNTS, of several samples the first. categories: of the prompts, by name."""
    texts = []
    first = counts[counts["sample"] == 0]
    for (name, prompt), rows in first.groupby(["config_name", "prompt_id"], sort=False):
        texts.append(
            ViewedText(
                name=prompt,
                category=categories.get(prompt, ""),
                config_name=name,
                tokens=rows["token"].tolist(),
                experts=rows["avg_experts"].to_numpy(float),
                by_layer=rows["experts_by_layer"].tolist(),
                num_given=int((rows["phase"] == "prompt").sum()),
            )
        )
    return texts


def token_view(results: Results, folder: Path) -> str:
    """`token_view_html` of a run, from the table that it left in `folder`."""
    generation = results.generation
    counts = read_side_table(TOKEN_COUNTS, folder, run_ids(generation))
    categories = dict(zip(generation["prompt_id"], generation["prompt_category"], strict=True))
    return token_view_html(viewed_texts(counts, categories))


# ---------------------------------------------------------------------------------------------------------
# 9. Checkpoints: nothing finished is lost
# ---------------------------------------------------------------------------------------------------------

WAY_OUT = "choose another --output, or --no-resume to set what is there aside"
CHECKPOINT_FILE = "latest_checkpoint.json"  # of the first process; the others write PROCESS_FILE
PROCESS_FILE = "process_{rank}.json"

Key = tuple[Any, ...]  # kind, and what names a row of that kind
KEY_COLUMNS = {
    "generation": ("config_name", "prompt_id", "sample"),
    "score": ("config_name", "item_id"),
    "task": ("config_name", "task"),
    "throughput": ("config_name", "batch_size", "input_hash"),  # of other prompts: another measurement
}


def row_key(row: Row) -> Key:
    """What names a row: of two rows with the same key one counts."""
    return (row["kind"], *(row[column] for column in KEY_COLUMNS[row["kind"]]))


def generation_key(config_name: str, prompt_id: str, sample: int) -> Key:
    return ("generation", config_name, prompt_id, sample)


def score_key(config_name: str, item_id: str) -> Key:
    return ("score", config_name, item_id)


def task_key(config_name: str, task: str) -> Key:
    return ("task", config_name, task)


def throughput_key(config_name: str, batch_size: int, input_hash: str) -> Key:
    return ("throughput", config_name, batch_size, input_hash)


def item_words(row: Row) -> str:
    """What a row measured its configuration on."""
    item = row_key(row)[2]
    return f"batch of {item}" if row["kind"] == "throughput" else item


def _checked_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line of a checkpoint holds; None where it is not whole."""
    text, _, tail = line.rpartition(b', "crc32": ')
    text += b"}"
    checksum, _, end = tail.partition(b"}")
    if end.strip(b",]}\n") or checksum != b"%d" % zlib.crc32(text):
        return None
    return json.loads(text)


def _parsed_head(lines: Sequence[bytes]) -> dict[str, Any]:
    """Schema and settings from the first lines of a checkpoint. ValueError where they are something else."""
    return json.loads(b"".join(lines[:2]).rstrip().rstrip(b",") + b"}")


def settings_beside(output_dir: Path) -> dict[str, Any]:
    """The settings of the run whose checkpoint an output folder holds; empty where none can be read."""
    try:
        with open(output_dir / "checkpoints" / CHECKPOINT_FILE, "rb") as file:
            return dict(_parsed_head([file.readline(), file.readline()])["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # a damaged one is refused, in words, where the run opens it


@dataclass(frozen=True, slots=True)  # there is one for every row
class _Place:
    """Where a finished row lies in a checkpoint file, in bytes, when it was made, and whether it failed."""

    offset: int
    length: int
    status: str
    timestamp: str

    @classmethod
    def of(cls, row: Row, offset: int, length: int) -> _Place:
        # Interned: many rows have the same.
        status = sys.intern(row["status"])
        return cls(offset, length, status, sys.intern(row.get("timestamp") or ""))


class CheckpointFile:
    """Finished rows of one process: a JSON file that is valid at every moment and grows in O(1).

    A line a row, each with a checksum; the file ends in "\\n]}\\n". An append overwrites that end with the
    next row and a new end, in one write, so a killed process loses nothing; `sync_every` rows are forced to
    the disk together, which bounds what a power cut can take. Of two rows with the same key the later one
    counts. Only where each row lies is held in memory.
    """

    SCHEMA = 3
    END = b"\n]}\n"

    def __init__(self, path: Path, settings: Mapping[str, Any], sync_every: int = 1, is_own: bool = True):
        """Open or create. Raises UserError, touching nothing, where the file is of another run or not a
        checkpoint.

        settings: what every row of the run has in common; a run resumes only with equal settings. is_own:
        another process's file is only read, and not mended.
        """
        self.path = path
        self.settings = strict_json(settings)
        self.sync_every = sync_every
        self.places: dict[Key, _Place] = {}
        self._unsynced = 0
        if not is_own:
            # The rows are read from the file they were found in: its owner may mend it meanwhile.
            self._file = open(path, "rb")  # noqa: SIM115 - stays open
            self._read(self._file)
            return
        if not path.exists():
            self._write(b"")
        with open(path, "rb") as file:
            is_whole, damaged = self._read(file)
        if not is_whole or damaged:
            self._salvage(is_whole, damaged)
            with open(path, "rb") as file:
                self._read(file)
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - stays open for appending
        self._end = self._file.seek(-len(self.END), os.SEEK_END)

    def _write(self, rows: bytes) -> None:
        head = f'{{"schema": {self.SCHEMA},\n"settings": {json.dumps(self.settings)},\n"results": ['
        with replacing(self.path) as part:
            part.write_bytes(head.encode() + rows + self.END)

    def _read(self, file: io.BufferedReader) -> tuple[bool, int]:
        """Find the rows. Returns whether the file has its end, and how many lines are no rows."""
        self.places.clear()
        is_whole = False
        damaged = 0
        self._check_head([file.readline() for _ in range(3)])
        offset = file.tell()
        for line in file:
            row = None if line == self.END[1:] else _checked_row(line)
            if row is not None:
                self.places[row_key(row)] = _Place.of(row, offset, len(line))
            elif line == self.END[1:]:
                is_whole = True
            else:
                damaged += 1
            offset += len(line)
        return is_whole, damaged

    def _check_head(self, head: list[bytes]) -> None:
        """Refuse what is not a checkpoint of this run."""
        try:
            content = _parsed_head(head)
            schema = content["schema"]
            stored = dict(content["settings"])
            if schema == self.SCHEMA and head[2].rstrip() != b'"results": [':
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            why = "is not a checkpoint of this script, or its head is damaged"
            raise UserError(f"{self.path} {why}; {WAY_OUT}") from None
        if schema != self.SCHEMA:
            why = f"has checkpoint schema {schema}, this script writes {self.SCHEMA}"
            raise UserError(f"{self.path} {why}; use the script that wrote it, {WAY_OUT}")
        differing = [
            f"{key} is {stored.get(key)!r} there, {self.settings.get(key)!r} here"
            for key in {**stored, **self.settings}
            if stored.get(key) != self.settings.get(key)
        ]
        if differing:
            where = self.path.parent.parent
            raise UserError(f"{where} holds results of another run: {'; '.join(differing)}; {WAY_OUT}")

    def _salvage(self, is_whole: bool, damaged: int) -> None:
        """Write the file anew with the rows that are whole."""
        with open(self.path, "rb") as file:
            rows = [self._line(file, place) for place in self.places.values()]
        aside = ""
        # A torn last line is what a killed process leaves; anything more is worth keeping for a look.
        if damaged > 1 or is_whole:
            aside = f"; the damaged file is kept as {shutil.copy(self.path, self._unused('damaged'))}"
        self._write(b",".join(b"\n" + row for row in rows))
        saved = f"{len(rows)} finished experiments were saved from it{aside}"
        logger.warning(f"{self.path} was torn or damaged; {saved}")

    def _unused(self, word: str) -> Path:
        """A name beside the file that is not there yet."""
        names = (self.path.with_name(f"{self.path.stem}.{word}{n}.json") for n in itertools.count(1))
        return next(name for name in names if not name.exists())

    @staticmethod
    def _line(file: io.RawIOBase | io.BufferedReader, place: _Place) -> bytes:
        file.seek(place.offset)
        return file.read(place.length).rstrip(b",]}\n") + b"}"

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

    def append(self, row: Row) -> Key:
        """Add one finished row; returns its key. OSError when the disk is full; the file is then as it was
        before."""
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
        offset = self._end + len(data) - len(line)
        key = row_key(row)
        self.places[key] = _Place.of(row, offset, len(line))
        self._end += len(data)
        self._unsynced += 1
        if self._unsynced >= self.sync_every:
            self.sync()
        return key

    def row(self, key: Key) -> dict[str, Any]:
        """The row of a key in `places`."""
        return _checked_row(self._line(self._file, self.places[key])) or {}

    def sync(self) -> None:
        """Force all rows to the disk."""
        if self._unsynced and not self._file.closed:
            os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        if not self._file.closed:
            if self._file.writable():
                self._stay()
            self.sync()
            self._file.close()


class Checkpoint:
    """The finished rows of a run, of any number of processes: each writes its own file and reads them all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int = 0, sync_every: int = 1):
        """rank: of this process, from 0. For the rest see `CheckpointFile`."""
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        name = CHECKPOINT_FILE if rank == 0 else PROCESS_FILE.format(rank=rank)
        self.own_path = folder / name
        self.others: list[CheckpointFile] = []
        self.read_others()  # first, so that nothing is written beside another run's file
        self.own = CheckpointFile(self.own_path, settings, sync_every)

    def read_others(self) -> None:
        """Look at what the other processes have finished by now."""
        for other in self.others:
            other.close()
        name = re.compile(f"{CHECKPOINT_FILE}|{PROCESS_FILE.format(rank='[0-9]+')}")  # no damaged copies
        self.others = [
            CheckpointFile(path, self.settings, is_own=False)
            for path in sorted(self.folder.iterdir())
            if name.fullmatch(path.name) and path != self.own_path
        ]

    def append(self, row: Row) -> Key:
        """Add one finished row to this process's file; returns its key."""
        return self.own.append(row)

    def _file_with(self, key: Key) -> CheckpointFile | None:
        """The file whose row of this key counts: the latest that did not fail, if there is one.

        Of a batch that was timed the latest of all: every configuration is timed anew together, and what was
        timed before does not compare.
        """

        def order(file: CheckpointFile) -> tuple[Any, ...]:
            place = file.places[key]
            is_finished = place.status == "ok"
            if key[0] == "throughput":
                return (place.timestamp, is_finished)
            return (is_finished, place.timestamp)

        holding = [file for file in (self.own, *self.others) if key in file.places]
        return max(holding, key=order, default=None)

    def keys(self) -> list[Key]:
        """What is there, finished or failed, in the order of the files."""
        return list(dict.fromkeys(key for file in (self.own, *self.others) for key in file.places))

    def done(self, retry_failed: bool = False) -> set[Key]:
        """What need not be run: what is there, or of that what did not fail."""
        keys = self.keys()
        if not retry_failed:
            return set(keys)
        return {key for key in keys if self._file_with(key).places[key].status == "ok"}

    def rows(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """The rows of those of `keys` that are finished, in their order."""
        for key in keys:
            file = self._file_with(key)
            if file is not None:
                yield file.row(key)

    def sync(self) -> None:
        """Force all rows of this process to the disk."""
        self.own.sync()

    def close(self) -> None:
        for file in (self.own, *self.others):
            file.close()


EARLIER = "earlier_{number}"  # the folder that takes what an earlier run left


def set_aside(output_dir: Path, names: Iterable[str]) -> None:
    """Move the files and folders of an earlier run, of those `names`, into one folder beside them."""
    present = [output_dir / name for name in names if (output_dir / name).exists()]
    if not present:
        return
    folders = (output_dir / EARLIER.format(number=number) for number in itertools.count(1))
    aside = next(folder for folder in folders if not folder.exists())
    aside.mkdir()
    for path in present:
        path.rename(aside / path.name)
    logger.info(f"earlier results were set aside in {aside}")


# ---------------------------------------------------------------------------------------------------------
# 10. The machine: device, model, log, lock, processes
# ---------------------------------------------------------------------------------------------------------

LOG_FILE = "experiment_log.txt"


def choose_device(device: str | None) -> torch.device:
    """CUDA for "auto" or None where there is one, else the CPU. UserError for "cuda" where there is none."""
    device = device or "auto"
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


def quantization_of(model_name: str, source: Mapping[str, Any]) -> str | None:
    """The format of the weights that a model brings, as its config.json calls it; None for plain ones.

    ValueError for one that transformers does not know: it would go on with random weights.
    """
    config = transformers.AutoConfig.from_pretrained(model_name, **source)
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method", "bitsandbytes")  # older ones of these do not say so
    known = [known.value for known in transformers.utils.quantization_config.QuantizationMethod]
    if method not in known:
        raise ValueError(f"transformers knows no quantised weights of the kind {method!r}")
    return method


def _to_one_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights that were unpacked come at the precision of their scales, the others as they were stored: all
    get the one that was asked for, but for what the architecture keeps in float32."""
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    kept += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _without_bars(is_wanted: bool) -> Iterator[None]:
    """Inside the block transformers shows no bars of its own, if that is wanted."""
    bars = transformers.utils.logging
    was_shown = bars.is_progress_bar_enabled()
    if is_wanted and was_shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if is_wanted and was_shown:
            bars.enable_progress_bar()


def _refuse_unsafe_shards(model_name: str, revision: str | None) -> None:
    """ValueError where the index of the weights names what is not a safetensors file of its own folder:
    transformers would open a file anywhere, and would unpickle one that is called otherwise."""
    maybe = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = transformers.utils.cached_file(
        model_name, transformers.utils.SAFE_WEIGHTS_INDEX_NAME, revision=revision, **maybe
    )
    if index is None:
        return
    shards = json.loads(_read_text(Path(index), "--model"))["weight_map"].values()
    for shard in sorted(set(shards)):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"the index of its weights names {shard!r}, no safetensors file of its folder")


def _load_weights(
    model_name: str, dtype: torch.dtype, placed: Mapping[str, Any], source: Mapping[str, Any]
) -> nn.Module:
    """The model, all of its weights from safetensors of its own. placed, source: what transformers is given.
    ValueError, and whatever transformers raises."""
    _refuse_unsafe_shards(model_name, source["revision"])
    placed = dict(placed)
    quantization = quantization_of(model_name, source)
    if quantization == "mxfp4":  # its kernels choose the experts themselves
        logger.info(f"{model_name} brings MXFP4 weights: they are unpacked to {dtype}")
        placed["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    elif quantization not in (None, "fp8"):  # what is not packed has a precision that fits what is
        placed["dtype"] = "auto"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        model_name, output_loading_info=True, **placed, **source
    )
    # transformers would go on with random numbers in their place; packed weights have names of their own
    if report["missing_keys"] and not quantization:
        raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    if quantization and not getattr(model, "is_quantized", False):
        _to_one_precision(model, dtype)
    return model


@dataclass(frozen=True)
class Precision:
    """In which precision a model runs, and in words why."""

    dtype: torch.dtype
    reason: str


PEAK = 1.25  # times its weights: the memory that a run of a model needs


@contextlib.contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """PyTorch computes with so many threads inside the block; it is a setting of the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def expert_shapes(model: nn.Module) -> list[torch.Size]:
    """The shapes of one expert's matrices: of the module with the largest stack of them [E, ., .]."""
    shapes: list[torch.Size] = []
    largest = 0
    for module in model.modules():
        stacks = [stack for stack in module.parameters(recurse=False) if stack.ndim == 3]
        size = sum(stack.numel() for stack in stacks)
        if size > largest:
            shapes = [stack.shape[1:] for stack in stacks]
            largest = size
    return shapes


COLD_BYTES = 64e6  # more than caches hold
MOST_COPIES = 64


def projection_seconds(shapes: Sequence[torch.Size], turns: int = 5) -> dict[str, float]:
    """Time for matrices of these shapes [., .], each times one vector, by precision: the least of `turns`.

    In decoding an expert's weights come from memory, so that their size counts: a turn takes as many copies
    as no cache holds, of small ones MOST_COPIES. Both precisions are tried with one thread and with all: on a
    busy machine one is what is taken later (see `choose_threads`), and the time of all would say nothing.
    """
    num_copies = int(np.clip(COLD_BYTES / (4 * sum(map(math.prod, shapes))), 1, MOST_COPIES))
    seconds = {"float32": math.inf, "bfloat16": math.inf}  # where both take as long, the first is taken
    work = {
        name: [
            (torch.full((1, shape[-1]), 0.5, dtype=dtype), torch.full(tuple(shape), 0.5, dtype=dtype))
            for shape in list(shapes) * num_copies
        ]
        for name, dtype in ((name, getattr(torch, name)) for name in seconds)
    }
    for threads in {1, torch.get_num_threads()}:
        with computing_with(threads), torch.inference_mode():
            for _ in range(turns):
                for name, pairs in work.items():
                    start = time.perf_counter()
                    for vector, matrix in pairs:
                        nn.functional.linear(vector, matrix)
                    seconds[name] = min(seconds[name], (time.perf_counter() - start) / num_copies)
    return seconds


def choose_cpu_precision(outline: nn.Module) -> Precision:
    """On a CPU: of float32 and bfloat16 what is faster at the width of the model's experts, if float32 fits
    into memory. outline: the model without its weights, see `model_outline`.

    That a CPU computes in bfloat16 says little: narrow experts are several times faster in float32, wide ones
    in bfloat16.
    """
    needed = PEAK * 4 * sum(parameter.numel() for parameter in outline.parameters())
    available = psutil.virtual_memory().available
    if needed > available:
        sizes = f"float32 needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
        return Precision(torch.bfloat16, sizes)
    shapes = expert_shapes(outline)
    if not shapes:
        return Precision(choose_dtype(torch.device("cpu")), "the model has no stack of experts to time")
    seconds = projection_seconds(shapes)
    fastest = min(seconds, key=seconds.__getitem__)
    times = " and ".join(f"{1e6 * spent:.0f} us in {name}" for name, spent in seconds.items())
    return Precision(getattr(torch, fastest), f"one expert's projections of one token take {times}")


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with one of them the user has chosen
ONE_THREAD_MARGIN = 1.5  # how many times faster one thread must be


def choose_threads(work: Callable[[], Any], turns: int = 5, seconds: float = 2.0) -> int:
    """One thread or all that PyTorch has, by the median time of `work`, tried in turns until `seconds` have
    passed.

    Threads wait for each other in every layer: where another process holds a core, a token takes many times
    as long. With another number of threads PyTorch sums in another order (5e-6 in float32 logits), so on an
    idle machine the choice must not depend on chance; hence a margin.
    """
    most = torch.get_num_threads()
    if most == 1 or any(os.environ.get(name) for name in THREAD_VARIABLES):
        return most
    taken: dict[int, list[float]] = {1: [], most: []}
    begin = time.perf_counter()
    for turn in range(turns + 1):
        for threads, times in taken.items():
            with computing_with(threads):
                start = time.perf_counter()
                work()
            if turn:  # the first warms up
                times.append(time.perf_counter() - start)
        if turn and time.perf_counter() - begin > seconds:
            break
    one, many = (float(np.median(times)) for times in taken.values())
    if many <= ONE_THREAD_MARGIN * one:
        return most
    times = f"{1000 * one:.1f} ms with one thread, {1000 * many:.1f} ms with {most}"
    logger.info(f"this machine is busy: a token takes {times}; computing with one")
    return 1


@contextlib.contextmanager
def _loading(model_name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a damaged folder can raise
        raise UserError(
            f"--model {model_name} cannot be loaded: {_first_line(error)} (give a folder with config.json, "
            "tokenizer and safetensors, or the name of a hub model; offline, use models/olmoe-mini)"
        ) from error


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
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    placed = {"dtype": dtype, "device_map": device_map or str(device), "use_safetensors": True}
    with _loading(model_name):
        with _without_bars(Path(model_name).is_dir() or not sys.stderr.isatty()):  # a download shows its own
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, **source)
            model = _load_weights(model_name, dtype, placed, source)
        if not tokenizer("text")["input_ids"]:  # what comes of a folder without the tokenizer's files
            raise ValueError("its tokenizer knows no words")
    return model, tokenizer


def announce_remote_code(model_name: str, trust_remote_code: bool) -> None:
    """Say it before anything of the model is read."""
    if trust_remote_code:
        logger.warning(f"--trust-remote-code: Python code that comes with {model_name} will be executed")


def model_outline(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights: its tensors have a shape and nothing else. Raises UserError."""
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _loading(model_name):
        config = transformers.AutoConfig.from_pretrained(model_name, **source)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


_ADAPTER_FIELDS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # of a layer of PEFT


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits that name the weights: of each tensor the name, shape and up to 2,048 values; and which
    adapters of PEFT are in use."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # what a quantised module keeps beside its weights
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in stored_parts(tensor):
            if not part.is_meta:  # offloaded to disk: known by name and shape only
                values = part.detach().flatten()
                digest.update(values[:: max(1, values.numel() // 1024)].double().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if "_active_adapter" in vars(module):
            adapters = [vars(module).get(field) for field in _ADAPTER_FIELDS]
            digest.update(f"{name} {adapters}".encode())
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
    path = Path(__file__).resolve()
    git = ["git", "-C", str(path.parent)]
    run_git = functools.partial(subprocess.run, capture_output=True, text=True, timeout=10, check=True)
    try:
        run_git([*git, "ls-files", "--error-unmatch", path.name])  # installed: not of the repository around
        commit = run_git([*git, "rev-parse", "HEAD"]).stdout
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"script_hash": file_hash(path)[:16], "git_commit": commit.strip()}


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
def waiting_for(path: Path) -> Iterator[None]:
    """Hold a lock file inside the block, after whoever holds it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path):
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs. UserError names the process that holds it; a dead one holds none."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    holder = folder / ".holder"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = _visible(holder.read_text(encoding="utf-8")) if holder.exists() else "an unknown process"
        raise UserError(f"{folder} is in use by {who}; wait, or choose another --output") from None
    try:
        write_whole(holder, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def duration(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"


SAY_EVERY = 30.0  # seconds between lines that tell how far a phase is, where no terminal shows a bar


class Phase:
    """A part of a run that takes its time: one bar on a terminal; without one, a line of the log now and
    then. At its end the log says how much was done in how long.

    words: what is being made, as in "60 of 60 experiments generated". done: how many there were before.
    """

    def __init__(self, words: str, total: int, done: int = 0, is_shown: bool = True):
        self._words = words
        self._total = total
        self._done = done
        self._start = time.perf_counter()
        self._said = self._start
        self._is_shown = is_shown
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            desc=words,
            disable=None if is_shown else True,  # None: shown on a terminal only
            leave=False,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]",
        )

    def now(self, what: str) -> None:
        """Show what is being done."""
        self._bar.set_description_str(f"{self._words}, {_visible(what)[:30]}")

    def advance(self, number: int) -> None:
        self._done += number
        self._bar.update(number)
        seconds = time.perf_counter() - self._said
        if self._is_shown and self._bar.disable and seconds > SAY_EVERY and self._done < self._total:
            self._said = time.perf_counter()
            logger.info(f"{self._amounts()}, for {duration(self._said - self._start)} now")

    def _amounts(self) -> str:
        return f"{self._done:,} of {self._total:,} {self._words}"

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        if self._is_shown:
            logger.info(f"{self._amounts()} in {duration(time.perf_counter() - self._start)}")


class Processes:
    """This process among those that `accelerate launch` started; alone without it."""

    def __init__(self, use_cpu: bool):
        self._state = None
        self.rank = 0
        self.world = 1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._state = accelerate.PartialState(cpu=use_cpu, timeout=timedelta(days=30))
            self.rank = self._state.process_index
            self.world = self._state.num_processes

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first process, which alone does it."""
        values = [work() if self.rank == 0 else None]
        if self._state is not None:
            accelerate.utils.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()


# ---------------------------------------------------------------------------------------------------------
# 11. Measuring: generation, scores of text, scores of tasks
# ---------------------------------------------------------------------------------------------------------
#
# Each of these measures a model as it is routed now, and knows nothing of configurations.


def check_finite(values: Tensor) -> None:
    """FloatingPointError where logits are NaN or infinite: the model does not work."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("the model returned NaN or infinite logits; try --dtype float32")


# Generation


class _StepWatch:
    """A logits processor that changes nothing: it notes when the prefill was done, and the largest logits."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.prefill_done: float | None = None
        self.largest: list[Tensor] = []  # [B] each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prefill_done is None:
            self.synchronize()
            self.prefill_done = time.perf_counter()
        self.largest.append(scores.amax(-1))
        return scores


@dataclass(frozen=True)
class Generation:
    """What was generated: its token ids [n], of a batch those of the first prompt; and the clock columns."""

    tokens: Tensor
    clock: dict[str, float | None]


class PromptRun:
    """A prompt to be continued under several configurations, by exactly `new_tokens` tokens each time.

    The seed decides what is sampled; the global random generators are left as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str,
        new_tokens: int,
        sampling: Mapping[str, float] | None,
        seed: int,
        as_chat: bool = False,
    ):
        """sampling: temperature and top_p, or None for greedy decoding. as_chat: see `chat_tokens`."""
        self.model = model
        self.tokenizer = tokenizer
        self.text = text
        self.new_tokens = new_tokens
        self.seed = seed
        self.as_chat = as_chat
        self.device = input_device(model)
        ids = torch.tensor([prompt_tokens(text, tokenizer, as_chat)], dtype=torch.int64, device=self.device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # [1, S]
        how = {"do_sample": False} if sampling is None else {"do_sample": True, "top_k": 0, **sampling}
        self.settings = generation_settings(tokenizer, new_tokens, **how)

    @staticmethod
    def together(runs: Sequence[PromptRun]) -> PromptRun:
        """The prompts of `runs` as one batch, with the settings of the first.

        Padded on the left, so that each text goes on where its prompt ends; the mask leaves padding out of
        attention and of what the recorder counts. Texts may differ from those of batch 1 by rounding.
        """
        batch = copy.copy(runs[0])
        pad = batch.settings.pad_token_id
        filler = {"input_ids": 0 if pad is None else pad, "attention_mask": 0}
        batch.inputs = {
            name: nn.utils.rnn.pad_sequence(
                [run.inputs[name][0] for run in runs],
                batch_first=True,
                padding_value=filler[name],
                padding_side="left",
            )
            for name in batch.inputs
        }  # [B, S]
        return batch

    @property
    def num_input_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def shown_prompt(self) -> str:
        """The prompt as a reader of the results sees it: with what a chat template wrote around it."""
        return self.tokenizer.decode(self.inputs["input_ids"][0]) if self.as_chat else self.text

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generate(self) -> Generation:
        """Continue the prompt with the model as it is routed now, timed."""
        on_gpu = self.device.type == "cuda"
        watch = _StepWatch(self._synchronize)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with writing_plainly(self.model), seeded(self.seed, self.device), torch.inference_mode():
            self._synchronize()
            start = time.perf_counter()
            output = self.model.generate(
                **self.inputs, generation_config=self.settings, logits_processor=[watch]
            )
            self._synchronize()
            end = time.perf_counter()
        check_finite(torch.stack(watch.largest))
        steps = self.new_tokens - 1
        clock = {
            "inference_time_sec": end - start,
            "tokens_per_sec": len(output) * self.new_tokens / (end - start),
            "time_to_first_token_sec": watch.prefill_done - start,
            "decode_sec_per_token": (end - watch.prefill_done) / steps if steps else None,
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None,
        }
        return Generation(output[0, self.num_input_tokens :], clock)

    @functools.cached_property
    def own(self) -> Generation:
        """What the model's own routing writes; asked for outside any patch."""
        return self.generate()

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


# Scores of text


def perplexity(nll: float | None) -> float | None:
    """exp of a mean NLL, in nats a token; None where that is not known or larger than a float holds."""
    return math.exp(nll) if nll is not None and nll < 700 else None


class ScoredBatch:
    """Texts that are teacher-forced together, and what the model's own routing says of them.

    ids [B, S], padded on the right; mask [B, S], 1 for tokens; context [B], how many tokens come first and
    are not scored. Positions are those that predict a token which is scored in some row: [B, S - first].
    """

    def __init__(self, model: nn.Module, items: Sequence[TextItem], keeps_tokens: bool = False):
        """keeps_tokens: rows also have what was decided for each token, a `TokenRouting`."""
        device = input_device(model)
        self.keeps_tokens = keeps_tokens
        texts = [torch.as_tensor(item.token_ids, dtype=torch.int64) for item in items]
        self.model = model
        self.items = list(items)
        self.ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        ones = [torch.ones_like(ids) for ids in texts]
        self.mask = nn.utils.rnn.pad_sequence(ones, batch_first=True).to(device)
        self.context = torch.tensor([item.context for item in items], device=device)
        self.first = int(self.context.min())
        position = torch.arange(self.ids.shape[1], device=device)
        is_scored = (position >= self.context[:, None]) & (self.mask > 0)  # [B, S], by the token predicted
        self.is_scored = is_scored[:, self.first :]
        self.targets = self.ids[:, self.first :, None]  # [B, S - first, 1]
        # Of the model's own routing, from `score_own`:
        self.own_rows: list[dict[str, Any]] | None = None
        self.own_probabilities: Tensor | None = None  # p [B, S - first, V]
        self.own_negentropy: Tensor | None = None  # sum of p log p [B, S - first]
        self.own_best: Tensor | None = None  # most probable token [B, S - first, 1]

    @torch.inference_mode()
    def _log_probabilities(self) -> Tensor:
        """Log-probabilities of every token at every position, float32: [B, S - first, V]."""
        # The last token of a row predicts nothing: it is left out, as padding where a longer row goes on.
        inputs = {"input_ids": self.ids[:, :-1], "attention_mask": self.mask[:, 1:]}
        logits = self.model(**inputs, use_cache=False).logits[:, self.first - 1 :]
        return logits.float().log_softmax(-1)

    def _means(self, values: Tensor) -> list[float]:
        """The mean of `values` [B, S - first] over each row's scored tokens."""
        total = values.double().masked_fill(~self.is_scored, 0).sum(1)
        return (total / self.is_scored.sum(1)).tolist()

    def _nll_of(self, log_probabilities: Tensor) -> list[float]:
        nll = self._means(-log_probabilities.gather(2, self.targets)[..., 0])
        check_finite(torch.tensor(nll))
        return nll

    def nll(self) -> list[float]:
        """Mean NLL of each text, nats per token, as the model is routed now: [B]."""
        return self._nll_of(self._log_probabilities())

    def _start(self, recorder: RoutingRecorder) -> None:
        recorder.start(rows=len(self.items))
        if self.keeps_tokens:
            recorder.keep_tokens()

    @torch.inference_mode()
    def score_own(self, recorder: RoutingRecorder) -> None:
        """Score by the model's own routing, in which it is patched now: what the others are compared with."""
        self._start(recorder)
        log_probabilities = self._log_probabilities()
        size = len(self.items)
        agreement = {"kl_to_own": [0.0] * size, "top1_agreement": [1.0] * size}
        rows = self._rows(self._nll_of(log_probabilities), agreement, recorder)
        self.own_probabilities = log_probabilities.exp()
        self.own_negentropy = torch.linalg.vecdot(self.own_probabilities, log_probabilities)
        self.own_best = log_probabilities.argmax(-1, keepdim=True)
        self.own_rows = rows

    @torch.inference_mode()
    def score(self, recorder: RoutingRecorder) -> list[dict[str, Any]]:
        """Score as the model is routed now: for each text [B] the columns of SCORES, and `routing`."""
        self._start(recorder)
        log_probabilities = self._log_probabilities()
        nll = self._nll_of(log_probabilities)
        # KL(own || this) in one pass: exactly 0 for equal scores; rounding may take it below.
        divergence = self.own_negentropy - torch.linalg.vecdot(self.own_probabilities, log_probabilities)
        # Comparing with the largest is five times faster than another argmax.
        is_best = log_probabilities.gather(2, self.own_best)[..., 0] == log_probabilities.amax(-1)
        agreement = {
            "kl_to_own": self._means(divergence.clamp(min=0)),
            "top1_agreement": self._means(is_best),
        }
        return self._rows(nll, agreement, recorder)

    def _rows(
        self, nll: list[float], agreement: Mapping[str, list[float]], recorder: RoutingRecorder
    ) -> list[dict[str, Any]]:
        rows = []
        texts = recorder.texts() if self.keeps_tokens else []
        for place, (item, tokens, routing) in enumerate(
            zip(self.items, self.is_scored.sum(1).tolist(), recorder.statistics(), strict=True)
        ):
            bits_per_byte = None
            kept = None
            if len(texts) == len(self.items):
                kept = texts[place].of_text(item.token_ids, item.context)
            if item.num_bytes:
                bits_per_byte = nll[place] * tokens / (math.log(2) * item.num_bytes)
            row = {
                "nll": nll[place],
                "num_tokens": tokens,
                "num_bytes": item.num_bytes,
                "perplexity": perplexity(nll[place]),
                "bits_per_byte": bits_per_byte,
                "batch_size": len(self.items),
                "routing": routing,
                "tokens": kept,
            }
            row |= {name: values[place] for name, values in agreement.items()}
            rows.append(row | routing.row())
        return rows

    def release(self) -> None:
        """Give back the memory of the own routing's scores."""
        self.own_rows = self.own_probabilities = self.own_negentropy = self.own_best = None


# Scores of tasks


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Inside the block templates of tasks are filled in by jinja2's sandbox: a template of the harness's own
    environment can call anything."""
    import jinja2.sandbox
    from lm_eval import utils

    own = utils.env
    sandbox = jinja2.sandbox.SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=True)
    sandbox.filters.update(own.filters)
    with contextlib.ExitStack() as stack:
        _replace(stack, utils, "env", sandbox)
        yield


@contextlib.contextmanager
def _only_harness_code() -> Iterator[None]:
    """Inside the block task files outside the harness are data: the Python functions and the metrics by path
    that they may name are refused before anything of them is imported."""
    import lm_eval
    from lm_eval.tasks import _yaml_loader

    evaluate = importlib.import_module("evaluate")  # a requirement of the harness, not of this script
    harness = Path(lm_eval.__file__).resolve().parent
    import_function = _yaml_loader._import_func_in_yml
    load_metric = evaluate.load
    way_out = "is not executed without --trust-remote-code: give that if you trust who wrote it"

    def import_own(function: str, folder: Path) -> Any:
        if not Path(folder).resolve().is_relative_to(harness):
            raise PermissionError(f"the Python function {function} {way_out}")
        return import_function(function, folder)

    def load_known(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name != path or Path(path).exists():
            raise PermissionError(f"the metric {path} {way_out}")
        return load_metric(path, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        _replace(stack, _yaml_loader, "_import_func_in_yml", import_own)
        _replace(stack, evaluate, "load", load_known)
        yield


def _load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None) -> dict[str, Mapping[str, Any]]:
    loaded: dict[str, Mapping[str, Any]] = {}
    asked_by: dict[str, str] = {}  # task -> the name it was asked for by
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            close = ", ".join(near) or "nothing"
            raise UserError(f"unknown task {name!r} in --tasks; close: {close}. lm-eval ls tasks lists all")
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # whatever a task's own code or data can raise
            way_out = "most tasks fetch their data from the hub once; without network use --include-path"
            why = f"{type(error).__name__}: {_first_line(error)} ({way_out})"
            raise UserError(f"--tasks {name} cannot be loaded: {why}") from error
        for part, task in loaded[name]["tasks"].items():
            first_asked_by = asked_by.setdefault(part, name)
            if first_asked_by != name:
                raise UserError(f"--tasks: {part} is in both {first_asked_by} and {name}; name one of them")
            fewshot = task.get_config("num_fewshot")
            if fewshot is None or (num_fewshot is not None and fewshot != 0):
                task.set_config("num_fewshot", num_fewshot or 0)
    return loaded


def _find_tasks(
    names: Sequence[str], include_path: str | Path | None, num_fewshot: int | None
) -> dict[str, Mapping[str, Any]]:
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _load_tasks(TaskManager(), names, num_fewshot)
    if not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: there is no such folder")
    # The index of the harness's own 14,000 tasks takes a while: it is read only where it is needed.
    with contextlib.suppress(UserError):
        own_tasks = TaskManager(include_path=str(include_path), include_defaults=False)
        return _load_tasks(own_tasks, names, num_fewshot)
    return _load_tasks(TaskManager(include_path=str(include_path)), names, num_fewshot)


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Mapping[str, Any]]:
    """Name -> tasks and groups of lm-evaluation-harness that it stands for. Raises UserError.

    include_path: a folder with task files of your own, beside the harness's tasks; Python functions that they
    name are refused without `trust_remote_code`. num_fewshot: examples in the context, instead of a task's
    own number; one that says 0 keeps it.
    """
    with contextlib.ExitStack() as stack:
        if trust_remote_code:
            logger.warning("--trust-remote-code: Python code that task files name will be executed")
        else:
            stack.enter_context(_only_harness_code())
        stack.enter_context(_sandboxed_templates())
        return _find_tasks(names, include_path, num_fewshot)


@contextlib.contextmanager
def _harness_seeds(device: torch.device) -> Iterator[None]:
    """The global random generators seeded as lm-evaluation-harness does, and put back."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - what the harness uses
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of a model that is loaded already
    try:
        with seeded(DEFAULT_OTHER_SEED, device):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
            yield
    finally:
        log.setLevel(level)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


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
            by_document = itertools.groupby(requests, lambda request: (request.task_name, request.doc_id))
            documents = [(key, list(group)) for key, group in by_document]
            answers = []
            for key, group in tqdm.tqdm(documents, desc=answer.__name__, unit="document", leave=False):
                self.recorder.start()
                answers += answer(group, disable_tqdm=True)
                routing = self.recorder.total()
                self.seen[key] = self.seen[key] + routing if key in self.seen else routing
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


@dataclass(frozen=True)
class DocumentScores:
    """The metric that a task's documents can be compared by, and their values; "" and None without one."""

    metric: str
    values: list[float | None]


def document_scores(samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> DocumentScores:
    """The first metric of a task whose mean over documents is what the harness reports.

    A perplexity is no mean: its documents come as (log-likelihood, number of bytes or words), and their score
    is bits per byte or word. A task may have neither, only a correlation for example.
    """
    metrics = samples[0]["metrics"]
    suffix = samples[0]["filter"]
    for metric in metrics:
        values = [sample.get(metric) for sample in samples]
        reported = results.get(f"{metric},{suffix}")
        if all(isinstance(value, (bool, int, float)) for value in [reported, *values]):
            mean = sum(values) / len(values)
            if math.isclose(mean, reported, rel_tol=1e-9, abs_tol=1e-12):
                return DocumentScores(metric, [float(value) for value in values])
    for metric, unit in (("bits_per_byte", "byte"), ("byte_perplexity", "byte"), ("word_perplexity", "word")):
        if metric in metrics:
            bits = []
            for log_likelihood, size in (sample[metric] for sample in samples):
                bits.append(-log_likelihood / (size * math.log(2)) if size else None)
            return DocumentScores(f"bits_per_{unit}", bits)
    return DocumentScores("", [None] * len(samples))


TASK_RESULTS = "task_results.json"
_SHOWN_TEXT = 200  # characters of a document's prompt that its row shows: the last ones
# Of what the harness reports:
_HARNESS_PARTS = ("results", "groups", "higher_is_better", "versions", "n-shot", "n-samples")


@dataclass(frozen=True)
class TaskRun:
    """What a task gave: rows of its documents, each with the columns of TASKS that are its own and `routing`
    (None where documents were mixed in batches), and what the harness reports."""

    documents: list[dict[str, Any]]
    report: dict[str, Any]


def run_task(
    lm: Any,
    recorder: RoutingRecorder,
    tasks: Mapping[str, Any],
    limit: float | None,
    apply_chat_template: bool = False,
) -> TaskRun:
    """Run one task, or a group, with the model as it is routed now; see `harness_model` for `lm`."""
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    lm.recorder = recorder
    lm.seen = {}
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # Never with the harness's cache: it finds answers by the model's name, whatever its routing.
    with _sandboxed_templates():
        evaluated = evaluate(lm, task_dict=tasks, limit=limit, apply_chat_template=apply_chat_template)
    documents = []
    for task, samples in evaluated["samples"].items():
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        scores = document_scores(samples, evaluated["results"][task])
        if not scores.metric:
            logger.warning(f"{task} has no metric of single documents: it is reported, but not tested")
        for sample, score in zip(samples, scores.values, strict=True):
            asked = str(sample["arguments"][0][0])
            answer = sample["filtered_resps"][0]
            documents.append(
                {
                    "task": task,
                    "document": f"{task}:{sample['doc_id']}",
                    "prompt_text": asked if len(asked) <= _SHOWN_TEXT else f"... {asked[-_SHOWN_TEXT:]}",
                    "generated_text": answer if isinstance(answer, str) else "",
                    "metric": scores.metric,
                    "score": score,
                    "input_hash": fingerprint(repr(sample["arguments"])),
                    "routing": lm.seen.get((task, sample["doc_id"])),
                }
            )
    return TaskRun(documents, {key: evaluated[key] for key in _HARNESS_PARTS if key in evaluated})


# ---------------------------------------------------------------------------------------------------------
# 12. BHExperimentRunner: configurations x prompts and texts -> rows
# ---------------------------------------------------------------------------------------------------------

THROUGHPUT_REPEATS = 3  # how often a batch is timed under each configuration, after one run that is not
PHASES = {  # kind of row -> what is done when it is there
    "generation": "experiments generated",
    "throughput": "batches timed",
    "score": "scores of text computed",
}
AUTO_BATCH_TOKENS = 8192  # what --batch-size auto begins with; halved whenever memory does not suffice
ANALYSIS = "analysis_summary.json"
REPORT = "REPORT.md"
REPORT_PAGE = "report.html"
# What a run leaves in its folder, in the words of the manual. These are set aside together:
RUN_FILES: dict[str, str] = {
    **{table.file: f"a row: {table.row}" for table in TABLES},
    **TOKEN_LOG_FILES,
    TASK_RESULTS: "with --tasks: what lm-evaluation-harness reports, by configuration and task",
    NULL_DIAGNOSTICS: "do the nulls hold on the scored text?",
    ANALYSIS: "summaries, tests and verdicts; strict JSON, null with a reason where a test says nothing",
    REPORT: "the report: answer, tables, tests, plots, what an earlier attempt expected beside what was "
    "measured",
    REPORT_PAGE: "the report in one file, its plots inside: to be sent, and opened anywhere",
    "plots": "the plots, PNG at 300 DPI",
    "checkpoints": f"what is finished: `{CHECKPOINT_FILE}` and a file of each further process; settings, and "
    "a `results` list of rows, each with a checksum and what its routers did",
}
# These stay: the next run writes the log on, and takes the calibration if it was made from the same.
KEPT_FILES: dict[str, str] = {
    LOG_FILE: "what happened: a line for each prompt and batch that is done (`tail -f` tells how far it is), "
    "tracebacks of what failed",
    CALIBRATION_FILE: "router logits on the calibration text",
    LINEAR_FILE.format(rank="R"): "with a stand_in linear:R: its maps, fitted on calibration text",
    EARLIER.format(number="N"): "what --no-resume, or a run that found no checkpoint, moved aside",
}


# What a finished row depends on: it counts only while all of that is as it was. Every argument of a run is
# classified here, or a test fails; the fields of prompts are in PROMPT_IDENTITY, those of configurations all
# count.
BY_ROW = "compared row by row"
NOTHING = "no row depends on it"
RUN_IDENTITY: dict[str, str] = {  # argument -> BY_ROW, NOTHING, or the entry of the settings that holds it
    # BHExperimentRunner
    **dict.fromkeys(("model_name", "model", "revision", "trust_remote_code"), "model"),
    "tokenizer": "tokenizer",
    "device": "device",
    **dict.fromkeys(("dtype", "use_fp16", "keep_precision"), "dtype"),
    "seed": "seed",
    "sampling": "sampling",
    "apply_chat_template": "chat_template",
    "calibration_text": "calibration_text",
    **dict.fromkeys(("output_dir", "checkpoint_interval", "command"), NOTHING),
    **dict.fromkeys(("device_map", "batch_size"), NOTHING),  # beyond rounding
    # run_full_experiment_suite, run_tasks
    **dict.fromkeys(("routing_configs", "test_prompts", "texts", "num_samples", "tasks"), BY_ROW),
    "max_new_tokens": "max_new_tokens",
    "generate_batch": BY_ROW,
    "token_log": "token_log",  # its rows have more in the checkpoint
    "num_fewshot": "num_fewshot",
    "limit": "limit",
    "include_path": "task_files",
    **dict.fromkeys(("baseline", "resume", "retry_failed", "fail_fast"), NOTHING),
}


# What counts of a folder with task files
NO_TASK_FILES = hashlib.sha256(b"").hexdigest()[:16]
# So much is read, the smallest files first; beyond it a file's size and time of change count.
HASHED_BYTES = 2**30
WRITTEN_BY_RUNS = (
    *RUN_FILES, LOG_FILE, CALIBRATION_FILE, LINEAR_FILE.format(rank="*"), EARLIER.format(number="*"),
)  # fmt: skip


def task_files(folder: Path, output_dir: Path) -> Iterator[Path]:
    """The files below a folder, which tasks can use: code and data too. Without hidden ones, Python's and the
    hub's caches, and what runs have written."""
    from datasets import config

    caches = {Path(config.HF_CACHE_HOME).resolve(), Path(config.HF_DATASETS_CACHE).resolve()}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        is_of_run = here.resolve() == output_dir.resolve()
        is_of_run = is_of_run or (here / "checkpoints" / CHECKPOINT_FILE).exists()
        patterns = (".*", "__pycache__", *(WRITTEN_BY_RUNS if is_of_run else ()))
        left_out = {name for name in (*folders, *files) for of in patterns if fnmatch.fnmatchcase(name, of)}
        folders[:] = [
            name for name in folders if name not in left_out and (here / name).resolve() not in caches
        ]
        yield from (here / name for name in files if name not in left_out and (here / name).is_file())


def task_files_hash(folder: Path, output_dir: Path) -> str:
    """The names and contents of `task_files`, as far as HASHED_BYTES go."""
    files = [(path.stat(), path) for path in task_files(folder, output_dir)]
    remaining = HASHED_BYTES
    unread = 0
    content: dict[str, Any] = {}
    for about, path in sorted(files, key=lambda entry: (entry[0].st_size, entry[1])):
        name = path.relative_to(folder).as_posix()
        if about.st_size <= remaining and os.access(path, os.R_OK):
            remaining -= about.st_size
            content[name] = file_hash(path)
        else:
            unread += 1
            content[name] = [about.st_size, about.st_mtime_ns]
    if unread:
        what = f"{amount(unread, 'file')} of --include-path {folder}"
        logger.info(f"{what}: size and time of change are compared on resume, not what they hold")
    return fingerprint(content)


@dataclass(frozen=True)
class SuitePlan:
    """What a suite measures: each prompt continued under `configs`, each text scored under
    `scored_configs`."""

    configs: Configs  # the model's own routing among them
    scored_configs: Configs  # the same, and the static ladder
    prompts: Sequence[Prompt]
    texts: Sequence[TextItem]
    new_tokens: int
    num_samples: int
    chat_template: str | None
    generate_batch: int | None  # how many prompts are continued together besides, to measure the throughput
    token_log: bool  # whether what every token of the texts got is kept

    @property
    def deciding_texts(self) -> list[TextItem]:
        """Those that the verdict will be about."""
        deciding = deciding_sources(text.source for text in self.texts)
        return [text for text in self.texts if text.source in deciding]

    @property
    def batch(self) -> list[Prompt]:
        """The prompts that are continued together: from the first on, again from there where they are too
        few."""
        return list(itertools.islice(itertools.cycle(self.prompts), self.generate_batch or 0))

    @property
    def batch_inputs(self) -> dict[str, str]:
        texts = {"texts": fingerprint([prompt["text"] for prompt in self.batch])}
        return texts if self.chat_template is None else texts | {"chat_template": self.chat_template}

    def keys(self) -> dict[str, list[Key]]:
        """The rows it will have, by kind, in the order of their tables."""
        generation = [
            generation_key(name, prompt["id"], sample)
            for prompt in self.prompts
            for sample in range(self.num_samples)
            for name in self.configs
        ]
        score = [score_key(name, text.id) for text in self.texts for name in self.scored_configs]
        keys = {"generation": generation, "score": score}
        if self.generate_batch:
            batch_hash = fingerprint(self.batch_inputs)
            keys["throughput"] = [
                throughput_key(name, self.generate_batch, batch_hash) for name in self.configs
            ]
        return keys

    def inputs(self) -> dict[str, dict[str, str]]:
        """Kind and name of everything that is fed in -> its hashes by field."""
        prompts = {
            f"generation {prompt['id']}": input_hashes(prompt, self.chat_template) for prompt in self.prompts
        }
        return prompts | {f"score {text.id}": text.inputs for text in self.texts}


class _Stopped(Exception):
    """A row failed, and --fail-fast asks to stop there."""


class _Saver:
    """Takes finished rows into the checkpoint, unless they are there; counts them, and says when to stop."""

    def __init__(self, checkpoint: Checkpoint, done: set[Key], fail_fast: bool):
        self.checkpoint = checkpoint
        self.done = done
        self.fail_fast = fail_fast
        self._phase: Phase | None = None

    @contextlib.contextmanager
    def phase(self, words: str, total: int, done: int, is_shown: bool) -> Iterator[Phase]:
        """Count rows for a `Phase`, in the block."""
        with Phase(words, total, done, is_shown) as self._phase:
            yield self._phase
        self._phase = None

    def lacks(self, key: Key) -> bool:
        return key not in self.done

    def forget(self, keys: Iterable[Key]) -> None:
        """These are measured anew, whatever was finished; the later row counts."""
        self.done.difference_update(keys)

    def save(self, row: Row) -> None:
        if row_key(row) in self.done:
            return
        self.done.add(self.checkpoint.append(row))  # one key in both, not two that are equal
        if self._phase is not None:
            self._phase.advance(1)
        if self.fail_fast and row["status"] != "ok":
            raise _Stopped


@dataclass(frozen=True)
class _Unit:
    """What is run in one go: a prompt, or texts in one batch, under every configuration."""

    kind: str  # of its rows
    name: str
    keys: list[Key]
    work: Callable[[], None]


def _millions(number: int) -> str:
    """A number of parameters, in words."""
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


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
    model, tokenizer: a model that is loaded already; device and dtype are then its own.
    calibration_text: a text file for the empirical nulls, or "sampled": the model writes its own text; see
    `calibration_source` for what is taken without it.
    seed: for the sampled calibration text, and for sampling. dtype: a name; "auto" is `choose_dtype` on a GPU
    and `choose_cpu_precision` on a CPU, or with `keep_precision` that of the run which the output folder
    holds. revision, device_map, trust_remote_code: see `load_model`.
    sampling: {"temperature": ..., "top_p": ...}, greedy when None.
    batch_size: scored texts in a forward pass, a number or "auto". command: what the rows say ran them.
    apply_chat_template: feed each prompt in as the message of a user, see `chat_tokens`.

    `results` holds the tables of the last run. Raises UserError for a model that cannot be loaded or
    has no routers to patch, or an unknown device.
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
        apply_chat_template: bool = False,
        keep_precision: bool = True,
    ):
        if (model is None) != (tokenizer is None):
            raise UserError("a ready model needs its tokenizer: pass both model= and tokenizer=, or neither")
        if calibration_text not in (None, SAMPLED) and not Path(calibration_text).is_file():
            why = f"there is no such file; {SAMPLED} stands for text that the model samples"
            raise UserError(f"--calibration-text {calibration_text}: {why}")
        if not use_fp16 and dtype not in ("auto", "float32"):
            raise UserError(f"--no-fp16 means --dtype float32, but dtype is {dtype}: give one of them")
        self.model_name = model_name
        self._loaded = ""
        self.output_dir = Path(output_dir)
        self.checkpoint_interval = check_least("checkpoint_interval", checkpoint_interval)
        self.seed = check_seed("seed", seed)
        self.batch_size = "auto" if batch_size == "auto" else check_least("batch_size", batch_size)
        self.calibration_text = calibration_text
        self.command = command
        self.trust_remote_code = trust_remote_code
        self.precision_reason = "the model came so"
        self.sampling: dict[str, float] | None = None
        if sampling is not None:
            self.sampling = {"temperature": 1.0, "top_p": 1.0}
            self.sampling |= {name: float(value) for name, value in sampling.items()}

        place = choose_device(device) if model is None else input_device(model)
        self.processes = Processes(use_cpu=place.type == "cpu")
        if model is None:
            earlier = settings_beside(self.output_dir) if keep_precision else {}
            dtype = dtype if use_fp16 else "float32"
            model, tokenizer = self._load(place, dtype, device_map, revision, earlier)
        self.model = model
        self.tokenizer = tokenizer
        self.apply_chat_template = apply_chat_template
        self.chat_template = chat_template_fingerprint(tokenizer, model_name) if apply_chat_template else None
        self.layers = find_moe_layers(model)
        self.device = input_device(model)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.revision = getattr(model.config, "_commit_hash", None) or revision or ""
        text_config = getattr(model.config, "get_text_config", lambda: model.config)()
        self.context = getattr(text_config, "max_position_embeddings", None) or math.inf

        self.own_k = self.layers[0].own_k
        self.results: Results | None = None
        self.checkpoint: Checkpoint | None = None
        self._routing = contextlib.ExitStack()
        self._calibration: Calibration | None = None
        self._calibration_source: CalibrationText | None = None
        self._batch_limit = sys.maxsize  # how many texts the memory was enough for

    def _load(
        self,
        place: torch.device,
        dtype: str,
        device_map: str | None,
        revision: str | None,
        earlier: Mapping[str, Any],
    ) -> tuple[nn.Module, Any]:
        """Model and tokenizer, in the precision that `dtype` names. earlier: settings, see `_precision`."""
        if self.processes.world > 1 and device_map:
            raise UserError("--device-map spreads one process over all GPUs: leave out accelerate launch")
        if self.processes.world > 1 and place.type == "cuda":
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        announce_remote_code(self.model_name, self.trust_remote_code)
        outline = functools.partial(model_outline, self.model_name, revision, self.trust_remote_code)
        precision = self._precision(dtype, place, outline, earlier)
        self.precision_reason = precision.reason
        start = time.perf_counter()
        model, tokenizer = load_model(
            self.model_name, place, precision.dtype, device_map, revision, self.trust_remote_code
        )
        self._loaded = f"loaded in {duration(time.perf_counter() - start)}: "
        return model, tokenizer

    @functools.cached_property
    def shape(self) -> str:
        """The model in words: layers, experts, parameters, and how many of these compute for a token."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        idle = sum((layer.num_experts - layer.own_k) * layer.expert_size for layer in self.layers)
        layers = f"{len(self.layers)} MoE layers x {self.layers[0].num_experts} experts, top-{self.own_k}"
        parameters = f"{_millions(total)} parameters, {_millions(total - idle)} active for a token"
        return f"{type(self.model).__name__}, {layers}, {parameters}, {self.dtype} on {self.device}"

    def __repr__(self) -> str:
        shape = f"{len(self.layers)} MoE layers x {self.layers[0].num_experts} experts, top-{self.own_k}"
        return f"BHExperimentRunner({self.model_name!r}, {shape}, {self.dtype} on {self.device})"

    def _precision(
        self, dtype: str, place: torch.device, outline: Callable[[], nn.Module], earlier: Mapping[str, Any]
    ) -> Precision:
        """The precision of that name. On a CPU "auto" goes by the clock, which may fall the other way another
        day: where the `earlier` settings are of a run on a CPU, that run's precision is taken."""
        if dtype != "auto":
            return Precision(choose_dtype(place, dtype), "asked for")
        if place.type != "cpu":
            return Precision(choose_dtype(place), "what the hardware computes in")
        if earlier.get("device") == "cpu" and earlier.get("dtype") in DTYPES:
            return Precision(getattr(torch, earlier["dtype"]), f"as in the run that {self.output_dir} holds")
        # By the clock of one process, or some would choose otherwise.
        return self.processes.first(lambda: choose_cpu_precision(outline()))

    @functools.cached_property
    def num_threads(self) -> int:
        """How many threads PyTorch computes with in a run: see `choose_threads`."""
        if self.device.type != "cpu":
            return torch.get_num_threads()
        token = torch.zeros((1, 1), dtype=torch.int64)

        @torch.inference_mode()
        def one_token() -> None:
            self.model(input_ids=token, use_cache=False)

        with evaluating(self.model):
            return choose_threads(one_token)

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return computing_with(self.num_threads)

    # Routing by hand: one configuration at a time, outside the suite

    @contextlib.contextmanager
    def routing(self, config: str | Config) -> Iterator[RoutingRecorder]:
        """Route by a configuration, or the built-in one of that name, in the block; yields the recorder."""
        self._refuse_changed_model()
        name = "routing"
        if isinstance(config, str):
            name = config
            known = suites()["all"]
            config = known[_choice("configuration", name, tuple(known))]
        with self._routed(self._resolve(name, config)) as recorder:
            recorder.keep_tokens(VIEWED_TOKENS)
            recorder.view = functools.partial(view_texts, name, TokenTexts(self.tokenizer))
            yield recorder

    def generate(self, text: str, max_new_tokens: int = DEFAULT_MAX_TOKENS) -> str:
        """What the model writes after `text` as it is routed now; sampled if the runner samples."""
        run = self._prompt_run(resolve_prompt({"text": text}), max_new_tokens, self.seed)
        with holding(self.model):
            return run.decode(run.generate().tokens)

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
        return patched_routing(self.model, config, self.calibration_for([config]), self.layers)

    def _refuse_changed_model(self) -> None:
        """Rows and calibration are kept by the model's fingerprint, which is taken once."""
        if model_fingerprint(self.model) != self.settings["model"]:
            raise UserError(
                "the model is another than this runner was made for (its weights, or the adapter in use): "
                "make a new BHExperimentRunner of it"
            )

    # Configurations, as they are on this model

    def _resolve(self, name: str, config: Config) -> dict[str, Any]:
        """`resolve_config` for this model: the 8 of the built-in configurations, which is OLMoE's own K,
        becomes the model's own, and no cap is above what a layer can run."""
        resolved = resolve_config(name, config, len(self.layers))
        if name in BUILT_IN and resolved == resolve_config(name, BUILT_IN[name] | _chosen_null(resolved)):
            resolved = with_own_k(name, resolved, self.own_k)
        widest = min(layer.max_k for layer in self.layers)
        caps = resolved.get("max_k")
        if isinstance(caps, list):
            resolved["max_k"] = [min(cap, widest) for cap in caps]
        elif caps is not None:
            resolved["max_k"] = min(caps, widest)
        for layer in range(len(self.layers)):
            floor, _ = count_bounds(layer_config(resolved, layer))
            if floor > widest:
                rule = RULES[resolved["method"]]
                field = rule.knob.name if rule.is_static else "min_k"
                why = f"{field} = {floor}, but a layer can run {widest} experts"
                raise UserError(f"configuration {name!r}: {why}")
        return resolved

    def _static(self, k: int) -> dict[str, Any]:
        return self._resolve("static", {"method": "topk", "k": k, "description": f"Fixed Top-{k}"})

    def _configs(self, given: Configs | None, baseline: str | None) -> dict[str, dict[str, Any]]:
        """The configurations of a run, resolved; first the model's own routing, where it is not among them:
        what it predicts is what all others are compared with."""
        given = ROUTING_CONFIGS if given is None else given
        if not given:
            raise UserError("a run needs at least one configuration")
        configs = {name: self._resolve(name, config) for name, config in given.items()}
        if not any(static_k(config) == self.own_k for config in configs.values()):
            name = _unused_name(f"topk_{self.own_k}", configs)
            configs = {name: self._static(self.own_k)} | configs
        if baseline is not None:
            _choice("baseline", baseline, tuple(configs))
        return configs

    @staticmethod
    def _say_what_was_added(configs: Configs, given: Configs | None) -> None:
        given = ROUTING_CONFIGS if given is None else given
        for name in configs:
            if name not in given:
                why = "the others are compared with it"
                logger.info(f"{name}, the model's own routing, is run as well: {why}")

    def _say_what_names_mean(self, configs: Configs) -> None:
        """What the default names, which are OLMoE's, stand for on a model with another K."""
        if self.own_k == ROUTING_CONFIGS.get(BASELINE, {}).get("k"):
            return
        for name in ROUTING_CONFIGS:
            if name in configs:
                logger.info(f"{name} on this model: {configs[name]['description']}")

    def _with_static_ladder(self, configs: Configs) -> dict[str, dict[str, Any]]:
        """`configs` and every static Top-k up to the model's own that is not among them."""
        ladder = dict(configs)
        present = {static_k(config) for config in configs.values()}
        for k in range(1, self.own_k):
            if k not in present:
                ladder[_unused_name(f"topk_{k}", ladder)] = self._static(k)
        return ladder

    # Text that is scored where none is named, and text to calibrate on

    @property
    def _why_few_windows(self) -> str:
        """Why fewer windows of the default text are scored than elsewhere; empty where as many are."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        if self.device.type != "cpu" or size <= MANY_PARAMETERS:
            return ""
        return f"this model has {size / 1e9:.1f} billion parameters and runs on a CPU"

    def sample_default_text(self, window: int = DEFAULT_WINDOW, max_windows: int | None = None) -> TextSample:
        """Of the text that is scored where none is named (what the model's folder brings, else what Python
        brings) `max_windows` windows; unless told, fewer of them where they would take long. UserError where
        there is no such text, or too little of it."""
        if max_windows is None:
            max_windows = MAX_WINDOWS_ON_CPU if self._why_few_windows else DEFAULT_MAX_WINDOWS
        documents = default_documents(self.model_name)
        return sample_text(documents, self.tokenizer, min(window, self.context), max_windows)

    @functools.cached_property
    def default_text(self) -> TextSample:
        """That text as it is without being told; nothing where there is none."""
        with contextlib.suppress(UserError):
            return self.sample_default_text()
        return TextSample([], [])

    def default_text_to_score(
        self, window: int = DEFAULT_WINDOW, max_windows: int | None = None
    ) -> TextSample:
        """That text for a run that scores it, which the log is told where it is less than elsewhere."""
        try:
            text = self.sample_default_text(window, max_windows)
        except UserError as error:
            logger.warning(f"no text is scored, as none was named: {error}")
            return TextSample([], [])
        if max_windows is None and self._why_few_windows:
            why = f"{self._why_few_windows}; --max-windows N scores more"
            logger.info(f"only {len(text.scored)} windows of text are scored: {why}")
        return text

    def calibrate_on(self, text: TextSample) -> None:
        """Calibrate on what of a text is not scored, unless a calibration text was named; where that is too
        little, on the default text, without what it shares with the one that is scored; else on text that the
        model samples."""
        if self.calibration_text is not None:
            return
        source = calibration_rest(text)
        if source is None:
            source = calibration_rest(TextSample(text.scored, self.default_text.unscored))
        self._calibration_source = source or SAMPLED_TEXT
        self._calibration = None

    @property
    def calibration_source(self) -> CalibrationText:
        """The calibration text: the one that was named, else what `calibrate_on` chose, which is the default
        text unless it was told another."""
        if self._calibration_source is None:
            if self.calibration_text is None:
                self.calibrate_on(self.default_text)
            elif self.calibration_text == SAMPLED:
                self._calibration_source = SAMPLED_TEXT
            else:
                self._calibration_source = read_calibration_text(Path(self.calibration_text), self.tokenizer)
        return self._calibration_source

    # What decides the numbers, besides configuration and prompt

    @functools.cached_property
    def _subject(self) -> dict[str, Any]:
        """What runs, and where."""
        return {
            "model": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dtype": self.dtype,
            "device": self.device.type,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What every row of this runner has in common; a run is resumed only with the same."""
        return {
            **self._subject,
            "seed": self.seed,
            "calibration_text": self.calibration_source.identity,
            "sampling": self.sampling,
            "chat_template": self.chat_template,
        }

    @functools.cached_property
    def cost(self) -> ModelCost:
        """What a token costs this model."""
        experts = [layer.experts for layer in self.layers]
        return ModelCost.of(self.model, experts, self.layers[0].num_experts)

    @property
    def calibration(self) -> Calibration:
        """The calibration of this model: from the output folder if it was made from the same, or made now."""
        return self._calibrated(outputs=False)

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def calibration_for(self, configs: Iterable[Config]) -> Calibration | None:
        """What these configurations need, from one pass over the calibration text; None for nothing."""
        needing = [config for config in configs if needs_calibration(config)]
        if not needing:
            return None
        calibration = self._calibrated(any(uses_calibrated_outputs(config) for config in needing))
        for rank in sorted({linear_rank(config["stand_in"]) for config in needing} - {None}):
            if rank not in calibration.linear_maps:
                calibration.linear_maps[rank] = self._linear_maps(rank)
        return calibration

    @property
    def _calibrated_from(self) -> dict[str, Any]:
        """What a calibration depends on: it is used again only if all of it is the same."""
        about = {**self.settings, "sequences": CALIBRATION_SEQUENCES, "length": CALIBRATION_LENGTH}
        del about["sampling"]
        del about["chat_template"]
        return about

    def _calibrated(self, outputs: bool) -> Calibration:
        """outputs: with what the experts put out."""
        if self._calibration is not None and (self._calibration.means is not None or not outputs):
            return self._calibration
        path = self.output_dir / CALIBRATION_FILE
        start = time.perf_counter()
        with waiting_for(self.output_dir / ".calibration.lock"):  # one process makes it, the others read it
            self._calibration = Calibration.load(path, self._calibrated_from)
            if self._calibration is not None and (self._calibration.means is not None or not outputs):
                return self._calibration
            logger.info(f"calibrating on {self.calibration_source.words}")
            with self._computing():
                self._calibration = calibrate(
                    self.model, self.tokenizer, self.seed, self.calibration_source, outputs=outputs
                )
            self._calibration.save(path, self._calibrated_from)
        null = self._calibration.null(0, 1.0)
        smallest = null.smallest_alpha(self.layers[0].num_experts)
        logger.info(
            f"calibrated on {self._calibration.logits.shape[1]} tokens of {self.calibration_source.words} in "
            f"{time.perf_counter() - start:.1f} s: n0 = {null.n0:,} null scores a layer, enough for alpha >= "
            f"{smallest:.2g}"
        )
        return self._calibration

    @property
    def _linear_source(self) -> CalibrationText:
        """The calibration text, unless nobody named it and it is too short to fit linear maps on."""
        source = self.calibration_source
        is_short = source.windows is not None and len(source.windows) < LINEAR_SEQUENCES
        return SAMPLED_TEXT if is_short and self.calibration_text is None else source

    def _linear_maps(self, rank: int) -> list[StandIn]:
        """The stand-ins "linear:rank", one a layer: from the output folder, or fitted now."""
        about = {**self._calibrated_from, "sequences": LINEAR_SEQUENCES, "rank": rank}
        path = self.output_dir / LINEAR_FILE.format(rank=rank)
        start = time.perf_counter()
        with waiting_for(self.output_dir / ".calibration.lock"):
            stored = load_tensors(path, about)
            if not stored:
                source = self._linear_source
                tokens = calibration_tokens(self.model, self.tokenizer, self.seed, source, LINEAR_SEQUENCES)
                maps = fit_linear_maps(self.model, tokens.split(4), [rank])[rank]
                stored = {
                    name: torch.stack([getattr(layer_maps, name) for layer_maps in maps])
                    for name in ("offset", "down", "up")
                }
                save_tensors(path, {name: part.contiguous() for name, part in stored.items()}, about)
                seconds = time.perf_counter() - start
                logger.info(
                    f"linear stand-ins of rank {rank} fitted on {tokens.numel()} tokens of {source.words} in "
                    f"{seconds:.1f} s"
                )
        by_layer = zip(stored["offset"], stored["down"], stored["up"], strict=True)
        return [StandIn(offset=offset, down=down, up=up) for offset, down, up in by_layer]

    def diagnose(self, texts: Sequence[TextItem], run_id: str = "", max_tokens: int = 8192) -> dict[str, Any]:
        """`diagnose_nulls` on scored texts, up to `max_tokens`; also written to null_diagnostics.json.

        As where they are scored, all tokens but the last are fed in. The routing of a first one does not
        count: shorter texts are left out.
        """
        batches: list[Tensor] = []
        total = 0
        for item in texts:
            ids = torch.as_tensor(item.token_ids, dtype=torch.int64)[None, :-1]  # [1, S]
            if total < max_tokens and 2 <= ids.numel() <= self.context:
                batches.append(ids)
                total += ids.numel()
        if not batches:
            return {}
        report = diagnose_nulls(self.calibration, record_routers(self.model, batches))
        report["n_shared_tokens"] = count_shared_tokens(batches, self.calibration_source)
        report["calibrated_on"] = self.calibration_source.words
        write_json(self.output_dir / NULL_DIAGNOSTICS, {"run_id": run_id} | report, indent=None)
        return report

    def _diagnose(self, texts: Sequence[TextItem], run_id: str) -> None:
        """`diagnose`, without which a run goes on where it fails."""
        try:
            self.diagnose(texts, run_id)
        except Exception as error:  # such as too little memory
            logger.warning(f"the nulls are not diagnosed: {type(error).__name__}: {_first_line(error)}")
            logger.debug("where it failed", exc_info=True)
            self._empty_cache()

    # Rows

    @functools.cached_property
    def _origin(self) -> dict[str, Any]:
        """The columns that all rows of this runner share."""
        on_cpu = self.device.type == "cpu"
        return {
            "status": "ok",
            "error": "",
            "own_k": self.own_k,
            "model_name": self.model_name,
            "model_revision": self.revision,
            "model_hash": self._subject["model"],
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(self.device),
            "dtype": self.dtype,
            "seed": self.seed,
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "command": self.command,
            **script_origin(),
        }

    def _row(self, kind: str, name: str, config: Config, inputs: Mapping[str, str]) -> dict[str, Any]:
        """A row as it is before anything was measured. Only the checkpoint keeps `kind` and `inputs`: from
        these a resumed run can say what is another than it was."""
        return {
            **self._origin,
            "kind": kind,
            "config_name": name,
            "method": config["method"],
            "configuration": configuration_cell(config),
            "inputs": dict(inputs),
            "input_hash": fingerprint(inputs),
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "num_threads": torch.get_num_threads(),
        }

    def _empty_cache(self) -> None:
        """After an out-of-memory error, start clean."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _failed(self, row: dict[str, Any], error: Exception) -> dict[str, Any]:
        """The row of a failure, which the log says as well."""
        message = f"{type(error).__name__}: {error}"
        logger.error(f"{row['config_name']} x {item_words(row)} failed: {message}")
        logger.debug("where it failed", exc_info=True)
        self._empty_cache()
        return row | {"status": "error", "error": message}

    # Generation

    def _prompt_run(self, prompt: Prompt, new_tokens: int, seed: int) -> PromptRun:
        """UserError where the prompt and the new tokens exceed the context."""
        run = PromptRun(
            self.model,
            self.tokenizer,
            prompt["text"],
            new_tokens,
            sampling=self.sampling,
            seed=seed,
            as_chat=self.apply_chat_template,
        )
        longest = self.context - new_tokens
        if not 0 < run.num_input_tokens <= longest:
            raise UserError(
                f"prompt {prompt['id']!r} has {run.num_input_tokens} tokens; with {new_tokens} new ones it "
                f"must have 1 to {longest} for this model's context of {self.context}"
            )
        return run

    def _sample_seed(self, prompt: Prompt, sample: int) -> int:
        """What a text is sampled by: seed, prompt and sample only, not order or resume."""
        digest = hashlib.sha256(f"{self.seed} {sample} {prompt['id']}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _generated_row(
        self, run: PromptRun, name: str, config: Config, prompt: Prompt, sample: int
    ) -> dict[str, Any]:
        """The row of a prompt that is continued under one configuration."""
        row = self._prompt_row(name, config, prompt, sample, run.new_tokens)
        with self._routed(config) as recorder:
            recorder.keep_tokens()
            generation = run.generate()
            prefill, decoding = recorder.phases()
            texts = recorder.texts()
        routing = prefill + decoding
        # The model's own routing runs again by itself: what the others are compared with, and, beside its
        # first run, the noise floor.
        own = run.own
        if static_k(config) == self.own_k:
            row["repeat_inference_time_sec"] = own.clock["inference_time_sec"]
        text = run.decode(generation.tokens)
        generated = GeneratedText(text, generation.tokens, own.tokens)
        ids = torch.cat([run.inputs["input_ids"][0], generation.tokens]).cpu()
        # A model without a cache reads the whole text for each token: the last time it read all of it.
        tokens = texts[-1].of_text(ids, run.num_input_tokens) if texts else None
        return {
            **row,
            **generation.clock,
            **routing.row(),
            "prefill_experts": prefill.row()["avg_experts_per_token"],
            "decode_experts": decoding.row()["avg_experts_per_token"],
            **self.cost.row(routing, decoding),
            **{column.name: measure(generated) for measure, column in TEXT_METRICS.items()},
            "generated_text": text,
            "full_text": run.shown_prompt + text,
            "num_input_tokens": run.num_input_tokens,
            "num_output_tokens": len(generation.tokens),
            "routing": routing.pack(),
            "tokens": tokens and tokens.pack(),
        }

    def _prompt_row(
        self, name: str, config: Config, prompt: Prompt, sample: int, new_tokens: int
    ) -> dict[str, Any]:
        return {
            **self._row("generation", name, config, input_hashes(prompt, self.chat_template)),
            "prompt_id": prompt["id"],
            "sample": sample,
            "prompt_category": prompt["category"],
            "prompt_text": prompt["text"],
            "max_new_tokens": new_tokens,
            "sampling": "greedy" if self.sampling is None else json.dumps(self.sampling),
        }

    def run_single_experiment(
        self,
        config_name: str,
        config: Config,
        prompt_data: Prompt,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        sample: int = 0,
    ) -> dict[str, Any]:
        """Continue one prompt under one configuration; returns a row with the columns of GENERATION.

        Its routing statistics cover every token that was routed: the prompt and all new tokens but the last.
        The model's own routing is run twice: its `repeat_*` column is the noise floor. `sample` tells several
        samples of a prompt apart. The model is unpatched afterwards, whatever happened. Raises UserError for
        a prompt that does not fit.
        """
        self._restore_original_routing()
        config = self._resolve(config_name, config)
        prompt = resolve_prompt(prompt_data)
        run = self._prompt_run(prompt, max_new_tokens, self._sample_seed(prompt, sample))
        with holding(self.model):
            self._refuse_changed_model()
            row = self._generated_row(run, config_name, config, prompt, sample)
        return {name: row.get(name) for name in GENERATION.names}

    def _generate_unit(self, plan: SuitePlan, prompt: Prompt, sample: int, saver: _Saver) -> None:
        """Continue a prompt under every configuration that is not done; a failure is a row."""
        run: PromptRun | None = None
        for name, config in plan.configs.items():
            if not saver.lacks(generation_key(name, prompt["id"], sample)):
                continue
            try:
                if run is None:
                    run = self._prompt_run(prompt, plan.new_tokens, self._sample_seed(prompt, sample))
                row = self._generated_row(run, name, config, prompt, sample)
            except Exception as error:  # one failed experiment must not end the suite
                row = self._prompt_row(name, config, prompt, sample, plan.new_tokens)
                row = self._failed(row, error)
            saver.save(row)

    # Throughput

    def _throughput_row(self, name: str, config: Config, plan: SuitePlan) -> dict[str, Any]:
        return {
            **self._row("throughput", name, config, plan.batch_inputs),
            "batch_size": plan.generate_batch,
            "num_prompts": min(plan.generate_batch, len(plan.prompts)),
            "max_new_tokens": plan.new_tokens,
            "repeats": THROUGHPUT_REPEATS,
        }

    def _routing_of_batch(self, batch: PromptRun, config: Config) -> dict[str, Any]:
        """The columns of THROUGHPUT that no clock decides, from a run that also warms up."""
        with self._routed(config) as recorder, counting_distinct_experts(self.layers) as counts:
            batch.generate()
            _, decoding = recorder.phases()
        columns = {"decode_experts": decoding.row()["avg_experts_per_token"]}
        steps = [of_layer[1:] for of_layer in counts]  # without the prefill
        if all(steps):
            distinct = np.array([torch.stack(of_layer).double().mean().item() for of_layer in steps])  # [L]
            columns["distinct_experts"] = float(distinct.mean())
            columns["weight_bytes_per_step"] = self.cost.bytes_read(distinct)
        return columns

    def _throughput_unit(self, plan: SuitePlan, saver: _Saver) -> None:
        """Continue a batch of prompts under every configuration, in turns; a failure is a row. Where one is
        lacking all are timed anew, and saved together: what was timed alone does not compare."""
        rows = {name: self._throughput_row(name, config, plan) for name, config in plan.configs.items()}
        keys = [row_key(row) for row in rows.values()]
        if not any(map(saver.lacks, keys)):
            return
        saver.forget(keys)
        batch: PromptRun | None = None
        clocks: dict[str, list[dict[str, float | None]]] = {name: [] for name in rows}
        for turn in range(1 + THROUGHPUT_REPEATS):
            for name in [name for name, row in rows.items() if row["status"] == "ok"]:
                config = plan.configs[name]
                try:
                    if batch is None:
                        runs = [self._prompt_run(prompt, plan.new_tokens, self.seed) for prompt in plan.batch]
                        batch = PromptRun.together(runs)
                    if turn == 0:
                        rows[name] |= self._routing_of_batch(batch, config)
                    else:
                        with self._routed(config):
                            clocks[name].append(batch.generate().clock)
                except Exception as error:  # one failed configuration must not end the suite
                    rows[name] = self._failed(rows[name], error)
        for name, row in rows.items():
            if row["status"] == "ok":
                row |= self._median_clock(clocks[name])
        # Failures last: --fail-fast stops at the first, and must lose nothing that was measured.
        for row in sorted(rows.values(), key=lambda row: row["status"] != "ok"):
            saver.save(row)

    @staticmethod
    def _median_clock(clocks: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
        """The clock columns of THROUGHPUT from those of several generations."""
        medians = strict_json(pd.DataFrame(clocks, dtype=float).median().to_dict())
        return {
            **{name: medians[name] for name in THROUGHPUT.names if name in medians},
            "decode_sec_per_step": medians["decode_sec_per_token"],
        }

    # Scoring

    def _score_row(self, name: str, config: Config, item: TextItem) -> dict[str, Any]:
        return {
            **self._row("score", name, config, item.inputs),
            "item_id": item.id,
            "document": item.document,
            "source": item.source,
            "category": item.category,
        }

    def _scored_rows(
        self, batch: ScoredBatch, name: str, config: Config, repeats: bool
    ) -> list[dict[str, Any]]:
        """Rows of a batch under one configuration. repeats: the model's own routing is scored once more."""
        for item in batch.items:
            if len(item.token_ids) - 1 > self.context:
                length = f"{len(item.token_ids)} tokens to score"
                raise UserError(f"text {item.id!r}: {length} exceed this model's context of {self.context}")
        if batch.own_rows is None:
            with self._routed(self._static(self.own_k)) as recorder:
                batch.score_own(recorder)
        if static_k(config) != self.own_k:
            with self._routed(config) as recorder:
                measured = batch.score(recorder)
        else:
            measured = batch.own_rows
            if repeats:
                with self._routed(config):
                    again = batch.nll()
                measured = [row | {"repeat_nll": nll} for row, nll in zip(measured, again, strict=True)]
        rows = []
        for item, row in zip(batch.items, measured, strict=True):
            routing = row["routing"]
            cost = self.cost.row(routing, routing)
            packed = {"routing": routing.pack(), "tokens": row["tokens"] and row["tokens"].pack()}
            rows.append(self._score_row(name, config, item) | row | cost | packed)
        return rows

    def _rows_or_failures(
        self, batch: ScoredBatch, name: str, config: Config, repeats: bool
    ) -> list[dict[str, Any]]:
        """`_scored_rows`, whose failure is a row. Where a batch fails its texts are tried one by one, so that
        a row fails by its own fault only; out-of-memory is passed on: a smaller batch may do."""
        is_single = len(batch.items) == 1
        one_by_one = config.get("shuffle") and not is_single  # counts would be shuffled over the whole batch
        if not one_by_one:
            try:
                return self._scored_rows(batch, name, config, repeats)
            except Exception as error:  # one failed experiment must not end the suite
                batch.release()
                if is_single:
                    return [self._failed(self._score_row(name, config, batch.items[0]), error)]
                if accelerate.utils.memory.should_reduce_batch_size(error):
                    raise
                logger.info(f"a batch of {len(batch.items)} failed ({type(error).__name__}): one by one")
        rows = []
        for item in batch.items:
            single = ScoredBatch(self.model, [item], batch.keeps_tokens)
            rows += self._rows_or_failures(single, name, config, repeats)
        return rows

    def _score_unit(self, plan: SuitePlan, texts: Sequence[TextItem], repeats: bool, saver: _Saver) -> None:
        """Score texts under every configuration, together as far as the memory is enough.

        As `accelerate.utils.find_executable_batch_size` would, but memory is cleared where it was not enough
        only: that takes longer than to score a text.
        """
        remaining = list(texts)
        while remaining:
            part = remaining[: self._batch_limit]  # never empty: a single text is always dealt with
            if self._score_together(plan, part, repeats, saver):
                remaining = remaining[len(part) :]
            else:
                logger.info(f"memory is not enough for a batch of {len(part)}: trying half of it")
                self._batch_limit = len(part) // 2
                accelerate.utils.memory.clear_device_cache(garbage_collection=True)

    def _score_together(
        self, plan: SuitePlan, texts: Sequence[TextItem], repeats: bool, saver: _Saver
    ) -> bool:
        """Score texts in one batch, under every configuration that is not done; whether the memory was
        enough, or a smaller batch cannot be."""
        try:
            batch = ScoredBatch(self.model, texts, plan.token_log)
            for name, config in plan.scored_configs.items():
                if any(saver.lacks(score_key(name, text.id)) for text in texts):
                    for row in self._rows_or_failures(batch, name, config, repeats):
                        saver.save(row)
        except RuntimeError as error:
            if not accelerate.utils.memory.should_reduce_batch_size(error):
                raise
            if len(texts) > 1:
                return False
            self._fail_text(plan, texts[0], error, saver)
        return True

    def _fail_text(self, plan: SuitePlan, text: TextItem, error: Exception, saver: _Saver) -> None:
        """Rows of failures for a text, under every configuration that is not done."""
        for name, config in plan.scored_configs.items():
            if saver.lacks(score_key(name, text.id)):
                saver.save(self._failed(self._score_row(name, config, text), error))

    def _batches(self, texts: Sequence[TextItem]) -> list[list[TextItem]]:
        """Which texts are scored together, by length. This follows from the texts alone, not from what is
        finished already, so that a resumed run rounds as an uninterrupted one."""
        remaining = sorted(texts, key=lambda text: -len(text.token_ids))
        batches = []
        while remaining:
            size = self.batch_size
            if size == "auto":
                size = max(1, AUTO_BATCH_TOKENS // len(remaining[0].token_ids))
            batches.append(remaining[:size])
            remaining = remaining[size:]
        return batches

    # Suites

    def run_full_experiment_suite(
        self,
        routing_configs: Configs | None = None,
        test_prompts: Sequence[Prompt] | None = None,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        resume: bool = True,
        *,
        texts: Sequence[TextItem] | None = None,
        num_samples: int = 1,
        generate_batch: int | None = None,
        retry_failed: bool = False,
        fail_fast: bool = False,
        baseline: str | None = None,
        token_log: bool = False,
    ) -> pd.DataFrame:
        """Continue every prompt and score every text under every configuration.

        Returns the rows of generation, one for each prompt and configuration in that order; `results` has all
        three tables, and they are written to the output folder. Scored are the prompts' references and
        `texts` (see `text_windows`), also by static Top-k for every k up to the model's own. None: the
        `default_text` beside the built-in prompts, no text beside prompts of your own. Where text is scored
        the verdict is about it alone, not about the references.

        Configurations take turns within each prompt, so that a machine that slows down slows all of them
        alike. The model's own routing is run as well where it is not among them. With `resume`, what the
        output folder holds is not run again; without, it is set aside. A failed experiment becomes a row with
        status "error"; retry_failed tries the earlier ones again, fail_fast stops at the first. num_samples:
        texts to sample for each prompt. generate_batch: so many prompts are continued together as well, for
        the throughput at that batch size, see THROUGHPUT. baseline: the configuration that the others will be
        compared with; refused where it is not one of them. token_log: what every token got in every layer is
        also written to a file, see `read_token_log`. Ctrl-C keeps what is finished and is passed on. Under
        `accelerate launch` each process runs its share.
        """
        plan = self._plan(
            routing_configs=routing_configs,
            test_prompts=test_prompts,
            max_new_tokens=max_new_tokens,
            texts=texts,
            num_samples=num_samples,
            generate_batch=generate_batch,
            baseline=baseline,
            token_log=token_log,
        )
        settings = {**self.settings, "max_new_tokens": plan.new_tokens}
        keys = plan.keys()
        run_id = fingerprint(strict_json([settings, plan.configs, plan.scored_configs, plan.inputs(), keys]))
        # Whether tokens are logged is no part of the run's name: it changes the log and token_kinds.csv only.
        with self._opened(settings | {"token_log": token_log}, resume) as checkpoint, self._computing():
            self._check_rows(checkpoint, plan.scored_configs, plan.inputs())
            self._say_what_was_added(plan.configs, routing_configs)
            self._say_what_names_mean(plan.configs)
            done = checkpoint.done(retry_failed)
            all_keys = [key for of_kind in keys.values() for key in of_kind]
            pending = sum(key not in done for key in all_keys)
            logger.info(
                f"{len(keys['generation'])} experiments and {len(keys['score'])} scores, "
                f"{len(all_keys) - pending} of them finished already"
            )
            self._calibrate_for(plan.configs)
            diagnosed = read_json_object(self.output_dir / NULL_DIAGNOSTICS).get("run_id")
            is_needed = any(uses_calibrated_null(config) for config in plan.configs.values())
            if is_needed and self.processes.rank == 0 and diagnosed != run_id:
                self._diagnose(plan.deciding_texts, run_id)
            if pending:
                self._warm_up(plan)
            self._run_units(plan, _Saver(checkpoint, done, fail_fast))
            results = self._finish(checkpoint, plan.scored_configs, keys, run_id, token_log=token_log)
            return results.generation

    def _plan(
        self,
        *,
        routing_configs: Configs | None,
        test_prompts: Sequence[Prompt] | None,
        max_new_tokens: int,
        texts: Sequence[TextItem] | None,
        num_samples: int,
        generate_batch: int | None,
        baseline: str | None,
        token_log: bool,
    ) -> SuitePlan:
        """What a suite will measure, checked."""
        if texts is None:
            texts = self.default_text_to_score().scored if test_prompts is None else ()
        prompts = [resolve_prompt(p) for p in (TEST_PROMPTS if test_prompts is None else test_prompts)]
        new_tokens = check_least("max_new_tokens", max_new_tokens)
        num_samples = check_least("num_samples", num_samples)
        if num_samples > 1 and self.sampling is None:
            raise UserError(f"num_samples {num_samples}: greedy texts are all alike; sample with --do-sample")
        if generate_batch is not None:
            check_least("generate_batch", generate_batch, 2)
            if not prompts:
                raise UserError(
                    f"generate_batch {generate_batch}: there is no prompt to be continued; give some"
                )
        scored = [*reference_items(prompts, self.tokenizer, self.chat_template), *texts]
        if not prompts and not scored:
            raise UserError("a suite needs at least one prompt or text")
        check_ids([prompt["id"] for prompt in prompts])
        check_ids([text.id for text in scored])
        configs = self._configs(routing_configs, baseline)
        return SuitePlan(
            configs=configs,
            scored_configs=self._with_static_ladder(configs) if scored else configs,
            prompts=prompts,
            texts=scored,
            new_tokens=new_tokens,
            num_samples=num_samples,
            chat_template=self.chat_template,
            generate_batch=generate_batch,
            token_log=token_log,
        )

    def _calibrate_for(self, configs: Configs) -> None:
        """Calibrate if a configuration needs it; a mistake in what was asked for ends the run here."""
        self.calibration_for(configs.values())
        for config in configs.values():
            with self._routed(config):
                pass

    def _warm_up(self, plan: SuitePlan) -> None:
        """Touch every code path once, so that no experiment pays for it. A failure will show in the rows it
        spoils."""
        new_tokens = min(plan.new_tokens, 4)
        for name, config in plan.configs.items():
            with contextlib.suppress(Exception):
                if plan.prompts:
                    run = self._prompt_run(plan.prompts[0], new_tokens, self.seed)
                    self._generated_row(run, name, config, plan.prompts[0], 0)

    def _units(self, plan: SuitePlan, saver: _Saver) -> list[_Unit]:
        """This process's share of a suite."""
        units = []
        for prompt in plan.prompts:
            for sample in range(plan.num_samples):
                work = functools.partial(self._generate_unit, plan, prompt, sample, saver)
                keys = [generation_key(name, prompt["id"], sample) for name in plan.configs]
                units.append(_Unit("generation", f"prompt {prompt['id']}", keys, work))
        if plan.generate_batch:
            work = functools.partial(self._throughput_unit, plan, saver)
            keys = plan.keys()["throughput"]
            units.append(_Unit("throughput", f"{plan.generate_batch} prompts together", keys, work))
        for number, texts in enumerate(self._batches(plan.texts)):
            repeats = number == 0  # one batch shows the noise floor, at little cost
            work = functools.partial(self._score_unit, plan, texts, repeats, saver)
            keys = [score_key(name, text.id) for text in texts for name in plan.scored_configs]
            named = f"text {texts[0].id}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")
            units.append(_Unit("score", named, keys, work))
        return units[self.processes.rank :: self.processes.world]

    def _run_units(self, plan: SuitePlan, saver: _Saver) -> None:
        """Run this process's share of what is not done: first prompts, then texts; each row is saved at
        once."""
        share = self._units(plan, saver)
        number = 0
        for kind, of_kind in itertools.groupby(share, key=lambda unit: unit.kind):
            units = list(of_kind)
            keys = [key for unit in units for key in unit.keys]
            done = sum(not saver.lacks(key) for key in keys)
            with saver.phase(PHASES[kind], len(keys), done, self.processes.rank == 0) as phase:
                for unit in units:
                    number += 1
                    phase.now(unit.name)
                    start = time.perf_counter()
                    try:
                        unit.work()
                    except _Stopped:
                        logger.error("stopped at the first failed experiment, as --fail-fast asks")
                        return
                    seconds = time.perf_counter() - start
                    logger.debug(
                        f"{number} of {len(share)}: {unit.name}, {len(unit.keys)} rows in {seconds:.2f} s"
                    )

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
        """Run tasks of lm-evaluation-harness under every configuration; returns TASKS, a row a document.

        What the harness itself reports goes to task_results.json. num_fewshot and limit (documents of each
        task, or a share below 1) are the harness's own; include_path: see `load_tasks`. A task under a
        configuration is saved when it is finished, and not run again with `resume`. Batch size "auto" is 1
        here; router statistics are recorded with 1 only. For the rest see `run_full_experiment_suite`.
        """
        try:
            import lm_eval
        except ImportError:
            raise UserError("--tasks needs lm-evaluation-harness: pip install lm_eval") from None
        names = list(dict.fromkeys(tasks))
        if not names:
            raise UserError("a run needs at least one task")
        configs = self._configs(routing_configs, baseline)
        with _harness_seeds(self.device):
            loaded = load_tasks(names, include_path, num_fewshot, self.trust_remote_code)
        own_files = NO_TASK_FILES
        if include_path is not None:
            own_files = task_files_hash(Path(include_path), self.output_dir)
        how = {"lm_eval": lm_eval.__version__, "num_fewshot": num_fewshot, "limit": limit}
        settings = {**self.settings, **how, "task_files": own_files}
        keys = {"task": [task_key(config, name) for name in names for config in configs]}
        inputs = {f"task {name}": {"task": fingerprint(name)} for name in names}
        run_id = fingerprint(strict_json([settings, configs, keys]))
        with self._opened(settings, resume) as checkpoint, self._computing():
            self._check_rows(checkpoint, configs, inputs)
            self._say_what_was_added(configs, routing_configs)
            self._say_what_names_mean(configs)
            done = checkpoint.done(retry_failed)
            finished = sum(key in done for key in keys["task"])
            logger.info(f"{len(keys['task'])} tasks x configurations, {finished} of them finished already")
            # Shared out first: processes may look at different moments at what is done.
            share = keys["task"][self.processes.rank :: self.processes.world]
            pending = [key for key in share if key not in done]
            self._calibrate_for(configs)
            saver = _Saver(checkpoint, done, fail_fast)
            if pending:
                lm = harness_model(
                    self.model, self.tokenizer, 1 if self.batch_size == "auto" else self.batch_size
                )
            for number, (_, config_name, task) in enumerate(pending, 1):
                logger.info(f"{task} under {config_name}: {number} of {len(pending)}")
                row = self._task_row(config_name, configs[config_name], task, loaded[task], lm, limit)
                try:
                    saver.save(row)
                except _Stopped:
                    logger.error("stopped at the first failed task, as --fail-fast asks")
                    break
            return self._finish(checkpoint, configs, keys, run_id, how).tasks

    def _task_row(
        self, name: str, config: Config, task: str, parts: Mapping[str, Any], lm: Any, limit: float | None
    ) -> dict[str, Any]:
        """One task under one configuration: what its documents share, the rest for each under `documents`,
        and what the harness reports. A failure is a row with status "error"."""
        row = self._row("task", name, config, {"task": fingerprint(task)})
        row |= {"task": task, "batch_size": lm.batch_size, "documents": [], "report": {}}
        try:
            with _harness_seeds(self.device), self._routed(config) as recorder:
                run = run_task(lm, recorder, parts, limit, self.apply_chat_template)
        except Exception as error:  # one failed task must not end the run
            return self._failed(row, error)
        for document in run.documents:
            routing = document.pop("routing")
            if routing is not None:
                document |= {**routing.row(), "routing": routing.pack()}
            row["documents"].append(document)
        return row | {"report": run.report}

    # Around a run

    @contextlib.contextmanager
    def _opened(self, settings: Mapping[str, Any], resume: bool) -> Iterator[Checkpoint]:
        """The log, the lock and the checkpoint of a run. The first process prepares the folder; each appends
        to its own file and reads them all."""
        self._restore_original_routing()
        folder = self.output_dir / "checkpoints"
        with contextlib.ExitStack() as stack:
            stack.enter_context(holding(self.model))
            self._refuse_changed_model()
            if self.processes.rank == 0:
                stack.enter_context(log_to(self.output_dir / LOG_FILE))
                stack.enter_context(locked(self.output_dir))
                logger.info(f"model {self.model_name}, {self._loaded}{self.shape}")
                if not resume or not any(folder.glob("*.json")):
                    set_aside(self.output_dir, RUN_FILES)
            self.processes.wait()
            rank = self.processes.rank
            checkpoint = Checkpoint(folder, settings, rank, self.checkpoint_interval)
            stack.callback(checkpoint.close)
            logger.info(f"{self.dtype}: {self.precision_reason}")
            self.checkpoint = checkpoint
            yield checkpoint

    def _check_rows(
        self, checkpoint: Checkpoint, configs: Configs, inputs: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Finished rows must be of the same configurations and inputs as what now goes by their names."""
        for row in checkpoint.rows(checkpoint.keys()):
            kind, name, item = row_key(row)[:3]
            is_batch = kind == "throughput"  # its texts are in its key
            if name not in configs or not (is_batch or f"{kind} {item}" in inputs):
                continue
            where = f"{self.output_dir} holds {name} x {item_words(row)}"
            before = json.loads(row["configuration"])
            now = json.loads(configuration_cell(configs[name]))
            for field in {**before, **now}:
                if before.get(field) != now.get(field):
                    values = f"{field} = {before.get(field)!r}, now it is {now.get(field)!r}"
                    raise UserError(f"{where} with {values}; {WAY_OUT}")
            fed_in = row["inputs"] if is_batch else inputs[f"{kind} {item}"]
            for field in {**row["inputs"], **fed_in}:
                if row["inputs"].get(field) != fed_in.get(field):
                    raise UserError(f"{where}, run with another {field}; {WAY_OUT}")

    def _finish(
        self,
        checkpoint: Checkpoint,
        configs: Configs,
        keys: Mapping[str, Sequence[Key]],
        run_id: str,
        how: Mapping[str, Any] | None = None,
        token_log: bool = False,
    ) -> Results:
        """When all processes are done the first one writes the tables; each returns them as they stand there.

        how: the harness's settings, for the file with its own numbers.
        """
        checkpoint.sync()
        self.processes.wait()
        if self.processes.rank == 0:
            checkpoint.read_others()
            layer_tables = LayerTables(self.layers, run_id)
            for kind, table in TABLE_OF_KIND.items():
                rows = checkpoint.rows(keys.get(kind, ()))
                if keys.get(kind):
                    counted = self._counted(rows, configs, layer_tables, run_id)
                    write_table(table, counted, self.output_dir)
                else:
                    discard(self.output_dir / table.file)
            layer_tables.write(self.output_dir)
            kinds = ("generation", "score") if token_log else ("generation",)
            texts = functools.partial(self._routed_texts, checkpoint, keys, kinds)
            TokenTables(texts, TokenTexts(self.tokenizer), self.layers, run_id).write(
                self.output_dir, token_log
            )
            if how is not None:
                reports: dict[str, dict[str, Any]] = {name: {} for name in configs}
                for row in checkpoint.rows(keys["task"]):
                    reports[row["config_name"]][row["task"]] = row["report"]
                content = {"run_id": run_id, **how, "configurations": reports}
                write_json(self.output_dir / TASK_RESULTS, strict_json(content))
        self.processes.wait()
        self.results = Results.read(self.output_dir)
        failed = f", {self.results.num_failed} failed" if self.results.num_failed else ""
        logger.info(f"{self.results}{failed}: {self.output_dir}")
        return self.results

    def _counted(
        self, rows: Iterable[Row], configs: Configs, layer_tables: LayerTables, run_id: str
    ) -> Iterator[Row]:
        """The rows as their table holds them; what their routers did goes into the layer tables."""
        for row in rows:
            shared = {name: value for name, value in row.items() if name not in ("documents", "report")}
            for part in row.get("documents") or [{}]:
                part = shared | part | {"run_id": run_id}
                if part.get("routing"):
                    name = part["config_name"]
                    routing = RoutingStatistics.unpack(part["routing"], configs[name], self.layers)
                    items = TABLE_OF_KIND[part["kind"]].items
                    category = part[items.category]
                    layer_tables.add(name, part["kind"], category, part[items.document], routing)
                yield part

    def _routed_texts(
        self, checkpoint: Checkpoint, keys: Mapping[str, Sequence[Key]], kinds: Sequence[str]
    ) -> Iterator[RoutedText]:
        """The finished texts of a run of which is kept what each token got, one after the other."""
        for kind in kinds:
            items = TABLE_OF_KIND[kind].items
            for row in checkpoint.rows(keys.get(kind, ())):
                if row.get("tokens"):
                    yield RoutedText(
                        config_name=row["config_name"],
                        kind=kind,
                        source=row.get("source", ""),
                        item=row_key(row)[2],
                        sample=row.get("sample", 0),
                        category=row[items.category],
                        document=row[items.document],
                        routing=TokenRouting.unpack(row["tokens"], len(self.layers)),
                    )

    def _save_checkpoint(self) -> None:
        """Force everything finished so far to the disk."""
        if self.checkpoint is not None:
            self.checkpoint.sync()


# ---------------------------------------------------------------------------------------------------------
# 13. Analysis: rows -> paired tests, verdicts at equal compute
# ---------------------------------------------------------------------------------------------------------

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


# One test for every comparison


def paired_test(
    differences: Sequence[float], margin: float | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """The test of every comparison: is the mean of paired differences [n] zero? Student's t, two-sided.

    differences: one for each independent unit (document, prompt). cohens_d is mean over standard deviation
    (d_z for paired samples; Lakens 2013, eq. 6). smallest_detectable is the effect that a two-sided 5 %
    t-test finds with 80 % power: (t_.975 + t_.80) sd / sqrt(n). With a margin, equivalence to zero by two
    one-sided t-tests (TOST; Schuirmann 1987): equivalence_p_value is the larger of the two. Units without
    any spread have no p-value; for those see `equivalence_without_spread`.

    Where the test has nothing to say its entries are None and `reason` says why, decided before it is
    called. Differences below 1e-12 `scale` are rounding. Nothing is claimed here: see `adjust_p_values`.
    """
    x = np.asarray(differences, dtype=float)
    n = len(x)
    numbers = ("ci95_low", "ci95_high", "t_statistic", "p_value", "cohens_d", "smallest_detectable")
    result = {"n_units": n, "mean_difference": float(x.mean()) if n else None}
    result |= dict.fromkeys((*numbers, "equivalence_p_value", "reason"))
    if n < 2:
        return result | {"reason": f"at least 2 independent units are needed, not {n}"}
    rounding = 1e-12 * max(scale, np.abs(x).max())
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


def equivalence_without_spread(test: Mapping[str, Any], margin: float) -> bool | None:
    """Whether units that all differ by the same amount are equivalent to zero; None where that is tested, or
    where there are fewer than two units.

    Identical on every unit is equivalent by construction: there is nothing to estimate, hence no p-value, and
    none enters an adjustment. In general the limit of TOST as the spread goes to 0: within the margin or not.
    """
    if test["n_units"] < 2 or test["reason"] is None:
        return None
    return abs(test["mean_difference"]) < margin


_Values = TypeVar("_Values", pd.Series, pd.DataFrame)


def item_units(values: _Values, documents: pd.Series) -> _Values:
    """One value per document whose plain mean is the mean over items; tests on them respect clustering.

    A document with n_c items that sum to S_c gives u_c = d + (S_c - d n_c) / mean(n), d = sum S / sum n:
    the linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, section 9A.2 and eq. 6.13),
    so var(u) / units is the cluster-robust variance of d. Where every item is its own document, u = values.
    values and documents are indexed by item; a table is taken column by column.
    """
    documents = documents.loc[values.index]
    if documents.is_unique:
        return values
    by_document = values.groupby(documents, sort=False)
    count = by_document.count()
    mean = values.mean()
    return mean + (by_document.sum() - mean * count) / count.mean()


def paired_comparison(
    baseline: Sequence[float], other: Sequence[float], documents: pd.Series | None = None
) -> dict[str, Any]:
    """`paired_test` of `other` minus `baseline`, two series indexed by item, or lists in the same order.

    Items that one of them lacks are left out. documents: item -> document, by default its own.
    """
    base, values = pd.Series(baseline, dtype=float).align(pd.Series(other, dtype=float), join="inner")
    is_complete = base.notna() & values.notna()
    base = base[is_complete]
    values = values[is_complete]
    differences = values - base
    units = differences if documents is None else item_units(differences, documents)
    means = {"n_pairs": len(base), "mean_baseline": None, "mean": None, "median_ratio": None}
    scale = 0.0
    if len(base):
        means["mean_baseline"] = float(base.mean())
        means["mean"] = float(values.mean())
        scale = max(base.abs().max(), values.abs().max())
        if (base > 0).all():
            means["median_ratio"] = float((values / base).median())
    return means | paired_test(units, scale=scale)


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


# What was measured, by configuration


def distinct(values: Iterable[str]) -> list[str]:
    """Distinct values in order of appearance: configurations and categories keep the order of the run."""
    return list(dict.fromkeys(values))


def _read_configuration(cell: str, where: str) -> dict[str, Any]:
    """The configuration in a cell of a table; empty where an older script described none."""
    try:
        config = json.loads(cell or "{}")
    except (ValueError, TypeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("method", ""), str):
        raise UserError(
            f"{where} is described by {str(cell)[:60]!r}, not by a JSON object with a method: restore this "
            "table, or run the configuration again"
        )
    return config


def configurations(results: Results) -> dict[str, dict[str, Any]]:
    """Name -> configuration as it was run; empty for one that no row describes.

    A field that an older script did not know has its default. Raises UserError for a cell that holds none.
    """
    configs: dict[str, dict[str, Any]] = {}
    for table, frame in zip(KINDS.values(), results, strict=True):
        for row in frame.drop_duplicates("config_name").to_dict("records"):
            name = row["config_name"]
            if name not in configs:
                config = _read_configuration(row["configuration"], f"{table.file}: configuration {name!r}")
                rule = RULES.get(config.get("method"))
                defaults = {field.name: field.default for field in rule.fields} if rule else {}
                configs[name] = {"method": config["method"], **defaults, **config} if rule else config
    return configs


def own_k_of(results: Results) -> int | None:
    """How many experts the model itself runs; None where no row says so."""
    known = [int(own_k) for frame in results for own_k in frame["own_k"].dropna().unique()]
    return next(iter(known), None)


def choose_baseline(results: Results, name: str | None = None) -> str:
    """What the others are compared with: `name` if it is given, else the model's own routing, else the widest
    static Top-K, else the first configuration. Raises UserError for a name that is not there."""
    configs = configurations(results)
    if name is not None:
        return _choice("baseline", name, tuple(configs))
    widths = {name: static_k(config) for name, config in configs.items()}
    static = {name: k for name, k in widths.items() if k is not None}
    own_k = own_k_of(results)
    of_model = [name for name, k in static.items() if k == own_k]
    if of_model:
        return of_model[0]
    return max(static, key=static.__getitem__) if static else next(iter(configs))


def _describe(values: pd.Series) -> dict[str, Any]:
    known = values.dropna()
    measures = {name: getattr(known, name)() for name in ("mean", "std", "median", "min", "max")}
    return measures | {"n": len(known)}


SPREAD = "std_experts_per_token"  # summarized like a metric, but nothing that configurations are tested by


def summarize(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Configuration -> metric, or SPREAD -> mean, std, median, min, max, n; each from the first table with
    it."""
    summary: dict[str, dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for table, frame in zip(KINDS.values(), results, strict=True):
        for name, rows in frame.groupby("config_name", sort=False):
            for metric in (*table.metrics, SPREAD):
                if metric not in summary[name]:
                    summary[name][metric] = _describe(rows[metric])
    return dict(summary)


def main_kind(results: Results) -> str:
    """What a report is about: generation; where nothing was generated the scores of text, else of tasks."""
    return next((kind for kind in KINDS if len(getattr(results, kind))), "generation")


def summarize_categories(results: Results) -> dict[str, dict[str, Any]]:
    """Category -> what `summarize` gives for it, of the table that the report is about."""
    kind = main_kind(results)
    by_category = getattr(results, kind).groupby(KINDS[kind].items.category, sort=False)
    return {
        category: summarize(Results(**{**vars(EMPTY_RESULTS), kind: rows})) for category, rows in by_category
    }


def documents_of(frame: pd.DataFrame, kind: str = "scores") -> pd.Series:
    """Item -> the document it is of, of a table in KINDS: what tests count as independent units.

    Older scripts named no document: their items are documents of their own.
    """
    columns = KINDS[kind].items
    rows = frame.drop_duplicates(columns.item).set_index(columns.item, drop=False)
    documents = rows[columns.document]
    return documents.where(documents != "", rows[columns.item])


def compare_with_baseline(results: Results, baseline: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Configuration -> metric -> `paired_comparison` with the baseline, BH-adjusted over all of them.

    Of what was generated, or, where nothing was, of the scored text: what is scored beside generation, the
    static ladder, is not among these tests. A prompt, or a window of text, is an item; several samples of a
    prompt are one, their mean. Empty for tasks, which `compare_tasks` compares.
    """
    kind = main_kind(results)
    if kind == "tasks":
        return {}
    frame = getattr(results, kind)
    columns = KINDS[kind].items
    metrics = list(KINDS[kind].metrics)
    documents = documents_of(frame, kind)
    items = {
        name: rows.groupby(columns.item, sort=False)[metrics].mean()
        for name, rows in frame.groupby("config_name", sort=False)
    }
    base = items.pop(baseline, None)
    if base is None:
        return {}
    tests = {
        name: {metric: paired_comparison(base[metric], rows[metric], documents) for metric in metrics}
        for name, rows in items.items()
    }
    adjust_p_values([test for by_metric in tests.values() for test in by_metric.values()])
    return tests


def noise_floor(results: Results) -> dict[str, dict[str, Any]]:
    """The model's own routing, its second run against its first: what any other difference must exceed."""
    floors = {}
    for kind, column in (("generation", "inference_time_sec"), ("scores", "nll")):
        repeat = f"repeat_{column}"
        frame = getattr(results, kind)
        twice = frame[frame[repeat].notna()]
        means = twice.groupby(KINDS[kind].items.item, sort=False)[[column, repeat]].mean()
        floors[column] = paired_comparison(means[column], means[repeat], documents_of(twice, kind))
    return floors


# Quality at equal compute

QUALITY_MARGIN = math.log(1.01)  # nats per token: 1 % of perplexity, what counts as "no loss" in the TOST
COMPUTE = "effective_experts"  # what "equal compute" is about
_NEEDED_SCORES = ["nll", "num_tokens", COMPUTE]  # an item that lacks one is left out


@dataclass(frozen=True)
class NotComparable:
    """Why a configuration cannot be compared with static Top-K."""

    reason: str


@dataclass(frozen=True)
class StaticMixture:
    """Static Top-K at any mean number of experts: a share of the tokens gets k_high, the others k_low."""

    k_low: int
    k_high: int
    share: float


Curve = Mapping[int, pd.DataFrame]  # k -> the scored items of static Top-k, indexed by item_id


def token_mean(rows: pd.DataFrame, column: str) -> float | None:
    """Mean over tokens of a column that holds means over each item's tokens; None where one is missing."""
    if rows.empty or rows[column].isna().any():
        return None
    values = rows[column].to_numpy(float)
    tokens = rows["num_tokens"].to_numpy(float)
    return float((values * tokens).sum() / tokens.sum())


def effective_experts(rows: pd.DataFrame) -> pd.Series:
    """Those of each row; older tables, which lack them, have those that ran: nothing stood in there."""
    return rows.get(COMPUTE, pd.Series(math.nan, index=rows.index)).fillna(rows["avg_experts_per_token"])


def scored_items(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Configuration -> its finished rows with a finite score, indexed by item_id. Raises UserError where an
    item occurs twice."""
    done = scores[scores["status"] == "ok"]
    done = done.assign(**{COMPUTE: effective_experts(done)})
    done = done[np.isfinite(done[_NEEDED_SCORES].to_numpy(float)).all(axis=1)]
    tables = {}
    for name, rows in done.groupby("config_name", sort=False):
        tables[name] = rows.set_index("item_id")
        if not tables[name].index.is_unique:
            twice = tables[name].index[tables[name].index.duplicated()][0]
            raise UserError(f"configuration {name!r} has item_id {twice!r} twice")
    return tables


def static_curve(by_config: Mapping[str, pd.DataFrame], configs: Configs) -> dict[int, pd.DataFrame]:
    """k -> the scored items of static Top-k, of what `scored_items` returns."""
    curve: dict[int, pd.DataFrame] = {}
    for name, rows in by_config.items():
        k = static_k(configs[name])
        if k is not None:
            curve.setdefault(k, rows)
    return curve


def deciding_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores that a verdict is about."""
    return scores[scores["source"].isin(deciding_sources(scores["source"]))]


def static_mixture(curve: Curve, mean_experts: float) -> StaticMixture | NotComparable:
    """The mixture of the two static neighbours that spends `mean_experts`, by the means they achieved.

    NLL and compute of a mixture are both linear in the share. Never extrapolates, nor across a gap: the curve
    is convex, so a mixture across a gap would flatter what it is compared with.
    """
    points = sorted((token_mean(rows, COMPUTE), k) for k, rows in curve.items() if len(rows))
    if not points:
        return NotComparable("no static Top-K configuration was run")
    below = [point for point in points if point[0] <= mean_experts + 1e-9]
    above = [point for point in points if point[0] >= mean_experts - 1e-9]
    if not below or not above:
        first = points[0][0]
        last = points[-1][0]
        span = f"{first:.2f} to {last:.2f}" if len(points) > 1 else f"{first:.2f} only"
        return NotComparable(f"{mean_experts:.2f} experts, but static Top-K was measured at {span}")
    x_low, low = below[-1]
    x_high, high = above[0]
    if high - low > 1:
        gap = f"between Top-{low} and Top-{high} nothing was measured"
        return NotComparable(f"{mean_experts:.2f} experts, but {gap}")
    share = 0.0 if low == high else (mean_experts - x_low) / (x_high - x_low)
    return StaticMixture(low, high, share)


@dataclass(frozen=True)
class EqualCompute:
    """A static mixture, and the items on which a configuration can be compared with it."""

    items: pd.Index
    mixture: StaticMixture


def equal_compute(rows: pd.DataFrame, items: pd.Index, curve: Curve) -> EqualCompute | NotComparable:
    """The static mixture that spends what a configuration spends, on those of `items` that all of them have.

    Leaving out an item moves the mean, which may move the neighbours; the set of items only shrinks.
    """
    while len(items):
        mixture = static_mixture(curve, token_mean(rows.loc[items], COMPUTE))
        if isinstance(mixture, NotComparable):
            return mixture
        in_both = items.isin(curve[mixture.k_low].index) & items.isin(curve[mixture.k_high].index)
        if in_both.all():
            return EqualCompute(items, mixture)
        items = items[in_both]
    return NotComparable("no item was scored by it, the baseline and its static neighbours")


def comparable_static(
    rows: pd.DataFrame, items: pd.Index, curve: Curve, config: Config
) -> EqualCompute | NotComparable:
    """`equal_compute` of a configuration; plain static Top-K is the curve, and is not compared with it."""
    if static_k(config) is not None:
        return NotComparable("static Top-K: it is the curve")
    return equal_compute(rows, items, curve)


def mixed(low: pd.DataFrame, high: pd.DataFrame, share: float, column: str) -> pd.Series:
    """A column of each item where a share of the tokens gets what `high` runs, the others what `low` does."""
    return (1 - share) * low[column] + share * high[column]


def worth_of_experts(low: pd.DataFrame, high: pd.DataFrame, surplus: pd.Series) -> pd.Series:
    """By how much the NLL of each item changes for a `surplus` of experts, on the line from `low` to `high`.

    The share of a mixture is itself estimated from its items, so each gets this first-order term (delta
    method): slope x (item's experts - mean), whose mean is zero. Without it a rule whose experts vary by item
    is found different from its equal far too often, or hardly ever.
    """
    step = token_mean(high, COMPUTE) - token_mean(low, COMPUTE)
    slope = (high["nll"] - low["nll"]).mean() / step if step else 0.0
    weight = low["num_tokens"] / low["num_tokens"].mean()
    return slope * surplus * weight


def difference_to_static(rows: pd.DataFrame, mixture: StaticMixture, curve: Curve) -> pd.Series:
    """NLL of each item minus that of the static mixture with the same mean experts."""
    low = curve[mixture.k_low].loc[rows.index]
    high = curve[mixture.k_high].loc[rows.index]
    static_nll = mixed(low, high, mixture.share, "nll")
    surplus = rows[COMPUTE] - token_mean(rows, COMPUTE)
    return rows["nll"] - static_nll - worth_of_experts(low, high, surplus)


_TEST_NUMBERS = ("ci95_low", "ci95_high", "p_value", "cohens_d", "smallest_detectable")


def _verdict_numbers(
    rows: pd.DataFrame,
    base: pd.DataFrame,
    compared: EqualCompute | NotComparable,
    curve: Curve,
    documents: pd.Series,
    margin: float,
) -> dict[str, Any]:
    """What `quality_verdicts` says of one configuration before anything is adjusted; `rows` are its scores
    of the items that are compared, `base` those of the baseline."""
    differences = rows["nll"] - base["nll"].loc[rows.index]
    to_baseline = paired_test(item_units(differences, documents), margin)
    if isinstance(compared, EqualCompute):
        differences = difference_to_static(rows, compared.mixture, curve)
        at_equal_compute = paired_test(item_units(differences, documents), margin)
    else:
        at_equal_compute = dict.fromkeys((*_TEST_NUMBERS, "mean_difference"))
        at_equal_compute["reason"] = compared.reason
    return {
        "mean_experts": token_mean(rows, COMPUTE),
        "kept_experts": token_mean(rows, "avg_experts_per_token"),
        "delta_nll": at_equal_compute["mean_difference"],
        **{key: at_equal_compute[key] for key in _TEST_NUMBERS},
        "static_mixture": vars(compared.mixture) if isinstance(compared, EqualCompute) else None,
        "delta_to_baseline": to_baseline["mean_difference"],
        "delta_to_baseline_ci95_low": to_baseline["ci95_low"],
        "delta_to_baseline_ci95_high": to_baseline["ci95_high"],
        "equivalence_p_value": to_baseline["equivalence_p_value"],
        "equivalent_untested": equivalence_without_spread(to_baseline, margin),
        "n_items": len(rows),
        "n_units": to_baseline["n_units"],
        "n_left_out": len(documents) - len(rows),
        "perplexity": perplexity(token_mean(rows, "nll")),
        "kl_to_own": token_mean(rows, "kl_to_own"),
        "top1_agreement": token_mean(rows, "top1_agreement"),
        "reason": at_equal_compute["reason"],
    }


def _verdict_word(row: Mapping[str, Any], is_claimed: bool | None) -> str | None:
    if row["delta_nll"] is None:
        return None
    if not is_claimed:
        return "undecided"
    return "better" if row["delta_nll"] < 0 else "worse"


def quality_verdicts(
    scores: pd.DataFrame, configs: Configs, baseline: str, margin: float = QUALITY_MARGIN
) -> dict[str, Any]:
    """Does a configuration predict the text better than static Top-K that spends the same experts?

    delta_nll is its NLL minus that of the static mixture with its own mean experts, a mean over the items
    which it, the baseline and both static neighbours have; all its other numbers are over the same items.
    "better" or "worse": p, BH-adjusted over all configurations, is below SIGNIFICANCE_LEVEL; "equivalent"
    likewise, or by construction: see `equivalence_without_spread`.

    Returns configuration -> numbers. The verdict is None where nothing was compared: for plain static Top-K
    (is_static), and where `reason` says why there is no delta_nll.
    """
    by_config = scored_items(scores)
    documents = documents_of(scores)
    curve = static_curve(by_config, configs)
    nothing = scores[:0].set_index("item_id")
    base = by_config.get(baseline, nothing)
    verdicts = {}
    for name in distinct(scores["config_name"]):
        rows = by_config.get(name, nothing)
        items = rows.index.intersection(base.index)
        compared = comparable_static(rows, items, curve, configs[name])
        if isinstance(compared, EqualCompute):
            items = compared.items
        verdicts[name] = _verdict_numbers(rows.loc[items], base, compared, curve, documents, margin)
    adjust_p_values(list(verdicts.values()))
    adjust_p_values(list(verdicts.values()), "equivalence_p_value", "equivalent_to_baseline")
    for name, row in verdicts.items():
        untested = row.pop("equivalent_untested")
        if name != baseline and row["equivalent_to_baseline"] is None:
            row["equivalent_to_baseline"] = untested
        row["is_static"] = static_k(configs[name]) is not None
        row["verdict"] = _verdict_word(row, is_claimed=row.pop("significant"))
    return verdicts


def shuffle_effects(scores: pd.DataFrame, configs: Configs) -> dict[str, Any]:
    """Each shuffled configuration against the same one unshuffled, if both ran: NLL difference per item.

    Both keep the same numbers of experts; what differs is which token gets them. Each is a `paired_test` over
    documents with `unshuffled`, BH-adjusted over all of them.
    """
    by_config = scored_items(scores)
    documents = documents_of(scores)
    effects = {}
    for name, config in configs.items():
        for twin, other in configs.items():
            are_twins = config.get("shuffle") and other == config | {"shuffle": False}
            if are_twins and name in by_config and twin in by_config:
                difference = by_config[name]["nll"] - by_config[twin]["nll"]
                units = item_units(difference.dropna(), documents)
                effects[name] = {"unshuffled": twin} | paired_test(units)
    adjust_p_values(list(effects.values()))
    return effects


# Rule against rule: ladders of one rule, compared at the same compute


def _family_words(config: Config, fields: Sequence[str]) -> str:
    """A family's label: the rule, and its value of each of `fields`."""
    words = [config.get("method", "")]
    for field in fields:
        value = config.get(field)
        if field == "shuffle":
            words += ["shuffled"] if value else []
        elif field == "random":
            words += ["random experts"] if value else []
        elif field == "stand_in":
            words += [f"+ {value}"] if value not in (None, "nothing") else []
        elif isinstance(value, (int, float)):
            words.append(f"{field} {value:g}")
        elif value is not None:
            words.append(value if isinstance(value, str) else f"{field} {value}")
    return ", ".join(words).replace(", + ", " + ")


def families(configs: Configs) -> dict[str, list[str]]:
    """Label -> configurations that differ in their knob only; a label names what differs between families.

    Where a configuration's rule is not known, it is a family of its own.
    """
    known: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        rule = RULES.get(config.get("method"))
        if rule is not None:
            not_told = (rule.knob.name, "description")
            known[name] = {field: value for field, value in config.items() if field not in not_told}
    fields = distinct(field for config in known.values() for field in config if field != "method")
    differing = [
        field for field in fields if len({str(config.get(field)) for config in known.values()} - {"None"}) > 1
    ]
    groups: dict[str, list[str]] = {}
    for name in configs:
        label = _family_words(known[name], differing) if name in known else name
        groups.setdefault(label, []).append(name)
    return groups


def in_order(stand_ins: Iterable[str]) -> list[str]:
    """Distinct stand-ins: nothing, the mean, linear maps."""
    return sorted(set(stand_ins), key=lambda name: (name != "nothing", name != "mean", name))


@dataclass(frozen=True)
class Ladder:
    """A rule at several values of its knob: a curve of NLL against compute, on items that all have."""

    label: str
    stand_in: str
    rule: Rule
    is_plain: bool  # plain static Top-K, what the others are shown against
    names: list[str]  # the configurations of this rule that were scored
    experts: list[float]  # compute of each member, ascending
    members: list[pd.DataFrame]  # their scores, indexed by item_id

    def spans(self, experts: float) -> bool:
        return self.experts[0] - 1e-9 <= experts <= self.experts[-1] + 1e-9

    def at(self, experts: float) -> pd.Series:
        """NLL of each item at this compute, between the two neighbours, never beyond: with the first-order
        term of what each item spends more or less, see `worth_of_experts`."""
        high = int(np.clip(np.searchsorted(self.experts, experts), 1, len(self.experts) - 1))
        low = high - 1
        share = (experts - self.experts[low]) / (self.experts[high] - self.experts[low])
        below = self.members[low]
        above = self.members[high]
        spent = mixed(below, above, share, COMPUTE)
        return mixed(below, above, share, "nll") - worth_of_experts(below, above, spent - experts)


def scored_families(by_config: Mapping[str, pd.DataFrame], configs: Configs) -> dict[str, list[str]]:
    """`families` of the configurations that have scores."""
    return families({name: config for name, config in configs.items() if name in by_config})


def items_of_most(own: pd.Index, members: Iterable[pd.DataFrame]) -> pd.Index:
    """The items of the model's own routing on which ladders are compared: those that all members have, except
    for members that lack so many that fewer scores would be left in all than without them.

    From the most complete member on, as many are taken as keep the most scores: members x shared items. So
    one that has hardly begun is left out, where a few failed items are left out under all.
    """
    held = [own[own.isin(rows.index)] for rows in members]
    items = own
    best = own
    most = 0
    for number, items_of_member in enumerate(sorted(held, key=len, reverse=True), start=1):
        items = items[items.isin(items_of_member)]
        if number * len(items) >= most:
            best = items
            most = number * len(items)
    return best


def ladders_of(by_config: Mapping[str, pd.DataFrame], configs: Configs, items: pd.Index) -> list[Ladder]:
    """The ladders of at least two configurations that have all of these items."""
    ladders = []
    for label, names in scored_families(by_config, configs).items():
        tables = [by_config[name].loc[items] for name in names if items.isin(by_config[name].index).all()]
        points = sorted(((token_mean(table, COMPUTE), place) for place, table in enumerate(tables)))
        points = [
            point for place, point in enumerate(points) if not place or point[0] - points[place - 1][0] > 1e-6
        ]
        if len(points) > 1:
            config = configs[names[0]]
            ladders.append(
                Ladder(
                    label=label,
                    stand_in=config.get("stand_in", "nothing"),
                    rule=RULES[config["method"]],
                    is_plain=any(static_k(configs[name]) is not None for name in names),
                    names=names,
                    experts=[experts for experts, _ in points],
                    members=[tables[place] for _, place in points],
                )
            )
    return ladders


FIELD_MARGINS = {"1 %": math.log(1.01), "0.5 %": math.log(1.005)}  # of the model's own perplexity, nats


def fewest_experts(ladder: Ladder, own: pd.Series, documents: pd.Series, margin: float) -> dict[str, Any]:
    """The fewest experts at which a ladder is equivalent to the model's own routing, by TOST within `margin`.

    fewest: from there on the test holds all the way up the ladder. ci95_low and ci95_high: where the 95 %
    interval of the difference, its lower and upper end, crosses the margin. None where the ladder does not
    reach so far, and over fewer than two documents.
    """
    grid = np.linspace(ladder.experts[0], ladder.experts[-1], 10 * len(ladder.experts) + 1)
    differences = pd.DataFrame({experts: ladder.at(experts) - own for experts in grid})
    units = item_units(differences, documents).to_numpy().T  # [G, units]
    if units.shape[1] < 2:  # nothing to test with
        return {"fewest": None, "ci95_low": None, "ci95_high": None}
    mean = units.mean(1)
    error = stats.sem(units, axis=1)  # 0 at the model's own routing: see `equivalence_without_spread`
    df = units.shape[1] - 1
    half = stats.t.ppf(0.975, df) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        above = stats.t.sf((mean + margin) / error, df)
        below = stats.t.cdf((mean - margin) / error, df)
    is_equivalent = np.where(error > 0, np.fmax(above, below) < SIGNIFICANCE_LEVEL, np.abs(mean) < margin)

    def from_where(holds: np.ndarray) -> float | None:
        failing = np.flatnonzero(~holds)
        first = failing[-1] + 1 if len(failing) else 0
        return float(grid[first]) if first < len(grid) else None

    def crossing(bound: np.ndarray) -> float | None:
        """Where it comes below the margin for good, between two points of the grid: the next point of the
        grid would be half a step too far on average."""
        failing = np.flatnonzero(~(bound < margin))
        if not len(failing):
            return float(grid[0])
        last = failing[-1]
        if last + 1 == len(grid):
            return None
        share = (bound[last] - margin) / (bound[last] - bound[last + 1])
        return float(grid[last] + share * (grid[last + 1] - grid[last]))

    return {
        "fewest": from_where(is_equivalent),
        "ci95_low": crossing(mean - half),
        "ci95_high": crossing(mean + half),
    }


Curves = Mapping[tuple[str, float], pd.Series]  # (ladder, number of experts) -> NLL of each item
COMPARED_STEPS = 8  # rules are compared at every eighth of the model's own K: of 8, at whole numbers


def compared_numbers(own_k: int, most: float) -> list[float]:
    """The numbers of experts at which rules are compared, up to `most`; whole ones as int."""
    steps = range(1, int(most * COMPARED_STEPS / own_k) + 1)
    return [own_k * step / COMPARED_STEPS if own_k * step % COMPARED_STEPS else own_k * step // COMPARED_STEPS
            for step in steps]  # fmt: skip


def _pair_tests(ladders: Sequence[Ladder], curves: Curves, documents: pd.Series) -> list[dict[str, Any]]:
    """Every two ladders at every compared number of experts that both reach: a `paired_test`, BH-adjusted."""
    numbers = sorted({number for _, number in curves})
    # `item_units` is linear: the units of a difference are the difference of the units.
    units = {key: item_units(nll, documents) for key, nll in curves.items()}
    pairs = []
    for first, second in itertools.combinations([ladder.label for ladder in ladders], 2):
        for experts in numbers:
            if (first, experts) in units and (second, experts) in units:
                test = paired_test(units[first, experts] - units[second, experts])
                pairs.append({"first": first, "second": second, "experts": experts, **test})
    adjust_p_values(pairs)
    return pairs


def _beaten_by(label: str, pairs: Sequence[Row]) -> set[str]:
    """The ladders that are better than one at some number of experts, by the adjusted p."""
    better = set()
    for pair in pairs:
        if pair["significant"] and label in (pair["first"], pair["second"]):
            is_first = label == pair["first"]
            loses = pair["mean_difference"] > 0 if is_first else pair["mean_difference"] < 0
            if loses:
                better.add(pair["second"] if is_first else pair["first"])
    return better


def _differences(
    ladder: Ladder, alike: Sequence[Ladder], curves: Curves, static: str, own: pd.Series
) -> dict[float, dict[str, float | None]]:
    """Compared number of experts -> a ladder's NLL minus that of static Top-K, of the best of `alike`, and of
    the model's own routing."""
    means = {key: nll.mean() for key, nll in curves.items()}
    differences = {}
    for label, experts in curves:
        if label == ladder.label:
            nll = means[label, experts]
            at_others = [means[other.label, experts] for other in alike if (other.label, experts) in means]
            at_static = means.get((static, experts))
            differences[experts] = {
                "to_static": None if at_static is None else nll - at_static,
                "to_best": nll - min(at_others, default=nll),
                "to_own": nll - own.mean(),
            }
    return differences


def own_routing(names: Iterable[str], configs: Configs, own_k: int | None) -> str | None:
    """Which of these configurations is the model's own routing: plain static Top-K of its own k."""
    is_known = own_k is not None
    return next((name for name in names if is_known and static_k(configs[name]) == own_k), None)


def compare_field(
    scores: pd.DataFrame, configs: Configs, own_k: int | None, margins: Mapping[str, float] = FIELD_MARGINS
) -> dict[str, Any]:
    """Is it this rule, or would any do? Every ladder against every other, at each compared number of experts
    that both reach: paired by item, tested over documents, BH-adjusted over all pairs. Items: see
    `items_of_most`; configurations in no ladder have no say in them.

    Returns ladders: label, members (the scored configurations of the rule), stand_in, is_bound (no rule: it
    is compared with none), low and high (experts), at (see `_differences`), within (margin ->
    `fewest_experts`), beaten_by (ladders with the same stand-in); pairs; experts (the compared numbers that
    more than half of the ladders reach); n_items, n_units; n_own_items, those of the model's own routing;
    left_out, the members that lack some of the items -> how many of n_own_items they have. Empty where fewer
    than two rules have a ladder.
    """
    by_config = scored_items(scores)
    own_name = own_routing(by_config, configs, own_k)
    if own_name is None:
        return {}
    own_items = by_config[own_name].index
    members = {
        name: by_config[name]
        for names in scored_families(by_config, configs).values()
        for name in names
        if len(names) > 1
    }
    items = items_of_most(own_items, members.values())
    ladders = ladders_of(by_config, configs, items) if len(items) else []
    if sum(not ladder.rule.is_static for ladder in ladders) < 2:
        return {}
    documents = documents_of(scores)
    own = by_config[own_name].loc[items, "nll"]
    most = max(ladder.experts[-1] for ladder in ladders)
    curves = {
        (ladder.label, experts): ladder.at(experts)
        for ladder in ladders
        for experts in compared_numbers(own_k, most)
        if ladder.spans(experts)
    }
    compared = [ladder for ladder in ladders if not ladder.rule.uses_outputs]
    pairs = _pair_tests(compared, curves, documents)
    static = next((ladder.label for ladder in ladders if ladder.is_plain), "")
    rows = []
    for ladder in ladders:
        alike = [other for other in compared if other.stand_in == ladder.stand_in]
        labels = {other.label for other in alike}
        within = {name: fewest_experts(ladder, own, documents, margin) for name, margin in margins.items()}
        rows.append(
            {
                "label": ladder.label,
                "members": ladder.names,
                "stand_in": ladder.stand_in,
                "is_bound": ladder.rule.uses_outputs,
                "low": ladder.experts[0],
                "high": ladder.experts[-1],
                "at": _differences(ladder, alike, curves, static, own),
                "within": within,
                "beaten_by": sorted(_beaten_by(ladder.label, pairs) & labels),
            }
        )
    reached = collections.Counter(experts for _, experts in curves)
    return {
        "ladders": rows,
        "pairs": pairs,
        "experts": sorted(experts for experts, number in reached.items() if 2 * number > len(ladders)),
        "n_items": len(items),
        "n_units": documents[items].nunique(),
        "n_own_items": len(own_items),
        "left_out": {
            name: int(own_items.isin(rows.index).sum())
            for name, rows in members.items()
            if not items.isin(rows.index).all()
        },
    }


def higher_is_better(task: str, metric: str, report: Mapping[str, Any]) -> bool:
    """The direction of a task's metric, as the harness reports it; without a word of it, an error rate or a
    number of bits is better low. report: task_results.json."""
    for units in report.get("configurations", {}).values():
        for unit in units.values():
            said = unit.get("higher_is_better", {}).get(task, {}).get(metric)
            if said is not None:
                return said
    return not metric.startswith("bits_per_")


def asked_the_same(rows: pd.DataFrame, base: pd.DataFrame) -> pd.Series:
    """Which rows of a task were not asked anything else than `base` was of the same document: where the data
    of a task were edited between runs its documents keep their names. Older scripts did not record it."""
    of_base = rows["document"].map(base.set_index("document")["input_hash"]).fillna("")
    return (rows["input_hash"] == of_base) | (rows["input_hash"] == "") | (of_base == "")


def compare_field_on_tasks(
    tasks: pd.DataFrame, configs: Configs, own_k: int | None, report: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Task -> `compare_field` of its documents' scores, where rules have ladders: perplexity alone can pick
    the wrong setting. A score that is better high counts as its negative, so that lower is better in all of
    it; `sign` times a difference is one of scores. No margin: a score has no perplexity to be within 1 % of.
    Scores of a document that was asked something else than of the model's own routing are left out:
    n_other_inputs says how many.
    """
    fields = {}
    with_metric = tasks[tasks["metric"] != ""]
    for task, rows in with_metric.groupby("task", sort=False):
        sign = -1 if higher_is_better(task, rows["metric"].iloc[0], report) else 1
        own_name = own_routing(distinct(rows["config_name"]), configs, own_k)
        is_alike = asked_the_same(rows, rows[rows["config_name"] == own_name])
        alike = rows[is_alike]
        losses = alike.assign(item_id=alike["document"], nll=sign * alike["score"], num_tokens=1)
        field = compare_field(losses, configs, own_k, margins={})
        if field:
            field |= {"sign": sign, "metric": rows["metric"].iloc[0]}
            fields[task] = field | {"n_other_inputs": int((~is_alike).sum())}
    return fields


@dataclass(frozen=True)
class Unbeaten:
    """Of the rules with one stand-in: how many are compared, which of them no other beats, and whether BH,
    on whatever null, is among these; None where it is not compared."""

    n_compared: int
    labels: list[str]
    has_bh: bool | None


def is_bh(label: str) -> bool:
    """Whether a ladder's label begins with the rule's name."""
    return re.fullmatch(r"bh([ ,].*)?", label) is not None


def unbeaten_rules(field: Mapping[str, Any]) -> dict[str, Unbeaten]:
    """Stand-in -> its rules that no other beats, from `compare_field`; empty where nothing was tested."""
    if not field or field["n_units"] < 2:
        return {}
    unbeaten = {}
    for stand_in in in_order(ladder["stand_in"] for ladder in field["ladders"]):
        alike = [ladder for ladder in field["ladders"] if ladder["stand_in"] == stand_in]
        compared = [ladder for ladder in alike if not ladder["is_bound"]]
        if len(compared) > 1:
            labels = [ladder["label"] for ladder in compared if not ladder["beaten_by"]]
            has_bh = any(map(is_bh, labels)) if any(is_bh(ladder["label"]) for ladder in compared) else None
            unbeaten[stand_in] = Unbeaten(len(compared), labels, has_bh)
    return unbeaten


# Tasks, layers, hypotheses


def _harness_numbers(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metric -> value and standard error, from what the harness reports of one task."""
    return {
        key: {"value": value, "stderr": values.get(key.replace(",", "_stderr,", 1))}
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def compare_tasks(tasks: pd.DataFrame, baseline: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tasks x configurations: what lm-evaluation-harness reports, and paired tests over the documents.

    A dict each with task, configuration, metric, what `paired_comparison` with the baseline gives for the
    documents' scores, BH-adjusted over all of them, n_other_inputs (documents that are left out, as they were
    asked something else than of the baseline), experts (mean per token and layer) and `harness`: metric ->
    value and standard error. Tasks are tested one by one: their scores differ in meaning and direction. A
    group of tasks has what the harness reports only. Empty where no task was run. report: task_results.json.
    """
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    with_metric = tasks[tasks["metric"] != ""]
    scores = dict(list(with_metric.groupby(["task", "config_name"], sort=False)))
    for (task, name), rows in scores.items():
        entry = {"metric": rows["metric"].iloc[0], "experts": rows["avg_experts_per_token"].mean()}
        if name == baseline:
            entry |= {"n_documents": len(rows), "mean": rows["score"].mean()}
        elif (task, baseline) in scores:
            base = scores[task, baseline]
            is_alike = asked_the_same(rows, base)
            own = rows[is_alike].set_index("document")["score"]
            entry |= paired_comparison(base.set_index("document")["score"], own)
            entry["n_other_inputs"] = int((~is_alike).sum())
        else:
            entry |= paired_comparison([], [])
        entries[task, name] = entry
    adjust_p_values([entry for entry in entries.values() if "p_value" in entry])
    for name, units in report.get("configurations", {}).items():
        for unit in units.values():
            for task, values in unit.get("results", {}).items():
                numbers = _harness_numbers(values)
                if numbers:
                    entries.setdefault((task, name), {})["harness"] = numbers
    tasks_in_order = distinct(task for task, _ in entries)
    keys = sorted(entries, key=lambda key: tasks_in_order.index(key[0]))
    return [{"task": task, "configuration": name, **entries[task, name]} for task, name in keys]


def first_kind(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table by layer about generation; where nothing was generated, about text or tasks."""
    kinds = distinct(table["kind"])
    return table[table["kind"] == kinds[0]] if kinds else table


def summarize_layers(table: pd.DataFrame) -> dict[str, Any]:
    """Configuration -> which layers run most and fewest experts, and whether categories use different ones.

    category_p_values: one permutation test a layer, BH-adjusted over the layers of the configuration.
    """
    summary = {}
    for name, rows in first_kind(table).groupby("config_name", sort=False):
        experts = rows.set_index("layer")["avg_experts_per_token"]
        p_values = rows["category_p_value"].dropna()
        is_tested = len(p_values) > 0
        summary[name] = {
            "fewest_experts": experts.min(),
            "fewest_in_layer": int(experts.idxmin()),
            "most_experts": experts.max(),
            "most_in_layer": int(experts.idxmax()),
            "gate_mass_frac": rows["gate_mass_frac"].mean(),
            "use_entropy_bits": rows["use_entropy_bits"].mean(),
            "category_divergence_bits": rows["category_divergence_bits"].mean() if is_tested else None,
            "category_p_values": list(stats.false_discovery_control(p_values)) if is_tested else None,
        }
    return summary


# Compute: what configurations cost, what that allows, and what was measured


def _ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None where one is not known."""
    return None if pd.isna(above) or pd.isna(below) else float(above / below)


def summarize_compute(
    results: Results, baseline: str, tests: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Configuration -> means of COMPUTE_COLUMNS, experts and median times of prefill and decoding, and how
    many times as fast as the baseline it decodes.

    `allowed_speedup`: as if reading weights were all that takes time. `decode_speedup`: measured, 1 / the
    median over prompts of the ratio to the baseline's time. From what was generated, else from the scores of
    text; empty for rows of older scripts.
    """
    rows = results.generation if len(results.generation) else results.scores
    rows = rows[rows["active_parameters"].notna()]
    by_name = dict(list(rows.groupby("config_name", sort=False)))
    means = {column.name: None for column in COMPUTE_COLUMNS}
    summary = {}
    for name, own in by_name.items():
        entry = {column: own[column].mean() for column in means}
        entry |= {"prefill_experts": None, "decode_experts": None, "prefill_sec": None, "decode_sec": None}
        if len(results.generation):
            entry |= {
                "prefill_experts": own["prefill_experts"].mean(),
                "decode_experts": own["decode_experts"].mean(),
                "prefill_sec": own["time_to_first_token_sec"].dropna().median(),
                "decode_sec": own["decode_sec_per_token"].dropna().median(),  # a single token has none
            }
        summary[name] = entry
    base = summary.get(baseline, {})
    for name, entry in summary.items():
        test = tests.get(name, {}).get("decode_sec_per_token", {})
        slowdown = 1.0 if name == baseline and not pd.isna(entry["decode_sec"]) else test.get("median_ratio")
        entry["allowed_speedup"] = _ratio(base.get("weight_bytes_per_token"), entry["weight_bytes_per_token"])
        entry["decode_speedup"] = _ratio(1.0, slowdown)
    return summary


def summarize_throughput(results: Results, baseline: str) -> list[dict[str, Any]]:
    """Tokens a second at batch 1, the median over prompts, and below it at the batch size that was measured;
    each beside the baseline's at the same batch size. Empty without `--generate-batch`.

    weight_bytes: at batch 1 with what stands in for dropped experts, by its share of an expert; at a larger
    batch size without it, see THROUGHPUT.
    """
    if not len(results.throughput):
        return []
    entries = []
    for name, own in results.generation.groupby("config_name", sort=False):
        entries.append({
            "configuration": name,
            "batch_size": 1,
            "tokens_per_sec": own["tokens_per_sec"].median(),
            "decode_experts": own["decode_experts"].mean(),
            "distinct_experts": own["decode_experts"].mean(),
            "weight_bytes": own["weight_bytes_per_token"].mean(),
        })  # fmt: skip
    for row in results.throughput.to_dict("records"):
        named = {"configuration": row["config_name"], "weight_bytes": row["weight_bytes_per_step"]}
        columns = ("batch_size", "tokens_per_sec", "decode_experts", "distinct_experts")
        entries.append(named | {column: row[column] for column in columns})
    base = {entry["batch_size"]: entry for entry in entries if entry["configuration"] == baseline}
    for entry in entries:
        beside = base.get(entry["batch_size"], {})
        entry["speedup"] = _ratio(entry["tokens_per_sec"], beside.get("tokens_per_sec"))
        entry["allowed_speedup"] = _ratio(beside.get("weight_bytes"), entry["weight_bytes"])
    return entries


def compare_token_kinds(table: pd.DataFrame, configs: Configs) -> list[dict[str, Any]]:
    """Do tokens of a kind get more experts than all others? Of scored text, where a run logged its tokens,
    else of what was generated.

    table: TOKEN_KINDS. An entry for each configuration whose rule adapts and each kind of token: in each
    document that has both, the mean of this kind minus that of all other tokens; a `paired_comparison` over
    documents, BH-adjusted over all entries.
    """
    measured = "score" if (table["kind"] == "score").any() else "generation"
    rows = table[table["kind"] == measured].set_index("document")
    tests = []
    for (name, token_kind), documents in rows.groupby(["config_name", "token_kind"], sort=False):
        rule = RULES.get(configs.get(name, {}).get("method"))
        if rule is None or rule.is_static:
            continue
        both = documents[(documents["tokens"] > 0) & (documents["other_tokens"] > 0)]
        about = {
            "configuration": name,
            "kind": measured,
            "token_kind": token_kind,
            "token_share": documents["tokens"].sum() / documents[["tokens", "other_tokens"]].sum().sum(),
        }
        tests.append(about | paired_comparison(both["other_avg_experts"], both["avg_experts"]))
    adjust_p_values(tests)
    return tests


def _hypothesis_value(analysis: Mapping[str, Any], name: str, quantity: str) -> float | None:
    """What was measured of a quantity that the earlier attempt expected something of. What it expected of
    tests was about the model's own Top-K: those against another baseline say nothing of it."""
    baseline = analysis["configurations"][analysis["baseline"]]
    is_own = analysis["own_k"] is None or static_k(baseline) == analysis["own_k"]
    tests = analysis["statistical_tests"].get(name, {}) if is_own else {}
    experts = tests.get("avg_experts_per_token", {})
    if quantity == "experts_p_value":
        return experts.get("p_value")
    if quantity == "experts_abs_d":
        effect = experts.get("cohens_d")
        return None if effect is None else abs(effect)
    if quantity == "slowdown_percent":
        ratio = tests.get("inference_time_sec", {}).get("median_ratio")
        return None if ratio is None else 100 * (ratio - 1)
    return analysis["summary_by_config"].get(name, {}).get(quantity, {}).get("mean")


def check_hypotheses(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each expectation of the earlier attempt beside what was measured; `held` is None where nothing was."""
    rows = []
    for names, quantity, low, high in HYPOTHESES:
        for name in names:
            value = _hypothesis_value(analysis, name, quantity)
            held = None if pd.isna(value) else bool(low <= value <= high)
            row = {"configuration": name, "quantity": quantity, "low": low, "high": high}
            rows.append(row | {"measured": value, "held": held})
    return rows


def results_beside(df: pd.DataFrame, output_dir: Path) -> Results:
    """The rows of generation `df` as a table, and the tables that the same run left in `output_dir`.

    Raises UserError for a frame that is none of this script's.
    """
    needed = ("config_name", "prompt_id", "status")
    lacking = [column for column in needed if column not in df]
    if lacking:
        why = "pass what run_full_experiment_suite returned, or Results.read(folder).generation"
        raise UserError(f"the table of results lacks {', '.join(lacking)}: {why}")
    try:
        stored = Results.read(output_dir)
    except UserError:  # nothing is there: the frame is all
        stored = EMPTY_RESULTS
    generation = fit_table(df, GENERATION)
    runs = run_ids(generation)
    beside = [
        frame if not runs or run_ids(frame) <= runs else frame[:0]
        for frame in (stored.scores, stored.tasks, stored.throughput)
    ]
    return Results(generation, *beside)


def analyze_tables(results: Results, folder: Path, baseline: str | None = None) -> dict[str, Any]:
    """`analyze_results` of the tables of a run that have been read."""
    done = results.finished()
    n_rows = sum(map(len, results))
    n_done = sum(map(len, done))
    if not n_done:
        raise UserError(f"nothing to analyse: none of {n_rows} experiments finished")
    configs = configurations(results)
    for name in configs:
        check_name(name)
    baseline = choose_baseline(done, baseline)
    scores = deciding_scores(results.scores)
    tests = compare_with_baseline(dataclasses.replace(results, scores=scores).finished(), baseline)
    runs = set().union(*map(run_ids, results))
    task_report = read_side_file(folder / TASK_RESULTS, runs)
    own_k = own_k_of(results)
    analysis = {
        "baseline": baseline,
        "own_k": own_k,
        "n_rows": n_rows + len(results.throughput),
        "n_failed": results.num_failed,
        "n_prompts": done.generation["prompt_id"].nunique(),
        "configurations": configs,
        "summary_by_config": summarize(done),
        "summary_by_category": summarize_categories(done),
        "statistical_tests": tests,
        "compute": summarize_compute(done, baseline, tests),
        "throughput": summarize_throughput(done, baseline),
        "verdict": quality_verdicts(scores, configs, baseline),
        "shuffle_effects": shuffle_effects(scores, configs),
        "field": compare_field(scores, configs, own_k),
        "task_fields": compare_field_on_tasks(done.tasks, configs, own_k, task_report),
        "quality_margin": QUALITY_MARGIN,
        "noise_floor": noise_floor(done),
        "tasks": compare_tasks(done.tasks, baseline, task_report),
        "null_diagnostics": read_side_file(folder / NULL_DIAGNOSTICS, runs) or None,
        "layers": summarize_layers(read_side_table(LAYER_STATISTICS, folder, runs)),
        "token_kinds": compare_token_kinds(read_side_table(TOKEN_KINDS, folder, runs), configs),
    }
    analysis = strict_json(analysis | {"hypotheses": check_hypotheses(analysis)})
    write_json(folder / ANALYSIS, analysis)
    return analysis


def analyze_results(df: pd.DataFrame, output_dir: str | Path, baseline: str | None = None) -> dict[str, Any]:
    """Summaries and paired tests of what a run measured; also in `analysis_summary.json`, strict JSON.

    df: rows of generation, as `run_full_experiment_suite` returns them; the other tables of the same run are
    taken from `output_dir`. Rows whose status is not "ok" are counted and left out. Pairs are formed by the
    item's name, never by row order. baseline: the configuration that the others are compared with, see
    `choose_baseline`.

    Returns a dict with baseline, own_k, n_rows, n_failed, n_prompts, configurations, summary_by_config,
    summary_by_category, statistical_tests (configuration -> metric -> tests against the baseline), compute
    (`summarize_compute`), throughput (`summarize_throughput`), verdict (`quality_verdicts`), shuffle_effects,
    field (`compare_field`), task_fields (`compare_field_on_tasks`), quality_margin, noise_floor, tasks
    (`compare_tasks`), null_diagnostics, layers (`summarize_layers`),
    token_kinds (`compare_token_kinds`) and hypotheses. Raises UserError for a table that is none of this
    script's, for a baseline that is not in it, and when no row is left.
    """
    folder = Path(output_dir)
    return analyze_tables(results_beside(df, folder), folder, baseline)


# ---------------------------------------------------------------------------------------------------------
# 14. Figures
# ---------------------------------------------------------------------------------------------------------
#
# Each plot_* draws what it is given into given axes and returns them; PLOTS says what it is given, and
# saving is done in one place, `draw_plots`.

LEGEND_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
ROW_OF_NAMES = 80  # characters; longer names do not fit side by side below a plot: a row each instead
MOST_ROWS = 40  # of a plot with a row a configuration; more are drawn in a row a family
MAX_INCHES = 60  # of a figure's height, however many rows it has
MARKERS = "osD^v<>phdXP*"  # of the members of a family
VERDICT_COLORS = {"better": "#0173b2", "worse": "#d55e00", "undecided": "0.5"}
EXPERTS_LABEL = "experts per token and layer"
NOT_FROM_ZERO = "(axis not from 0)"  # where a plot that began at 0 would be mostly empty


def _axes(ax: Any, height: float = 4.2) -> Any:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(7, min(max(height, 4.2), MAX_INCHES)), layout="constrained")[1]


def _two_axes(axes: Any, height: float = 4.2) -> Any:
    if axes is not None:
        return axes
    return plt.subplots(1, 2, figsize=(10, height), layout="constrained")[1]


def _owns_figure(ax: Any) -> bool:
    """Whether the figure is this plot's own, so that its size may be changed."""
    return len(ax.figure.axes) == 1


def _in_rows(names: Sequence[str]) -> bool:
    """Whether names stand below each other because side by side they would overlap."""
    return len(names) * max(map(len, names), default=0) > ROW_OF_NAMES


def _legend_beside(ax: Any, entries: int) -> None:
    """The legend right of `ax`, small where it has many entries."""
    small = {"fontsize": "x-small", "labelspacing": 0.25} if entries > 10 else {}
    sns.move_legend(ax, **LEGEND_BESIDE, title=None, **small)


def _distinct_colors(number: int) -> list[Any]:
    return sns.color_palette("colorblind", number) if number <= 10 else sns.husl_palette(number)


def _families(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, list[str]]:
    """`families` of the configurations of a frame that has config_name and configuration."""
    cells = frame.drop_duplicates("config_name").set_index("config_name")["configuration"]
    return families({name: json.loads(cells.get(name) or "{}") for name in names})


def _palette(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Configuration -> colour: one for each family, its members from full to light in their order."""
    groups = _families(frame, names)
    colors = {}
    for color, members in zip(_distinct_colors(len(groups)), groups.values(), strict=True):
        for name, white in zip(members, np.linspace(0, 0.6, len(members)), strict=True):
            colors[name] = tuple(channel + white * (1 - channel) for channel in color)
    return {name: colors[name] for name in names}


def _markers(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, str]:
    """Configuration -> marker: the members of a family have different ones."""
    markers = {}
    for members in _families(frame, names).values():
        markers |= dict(zip(members, itertools.cycle(MARKERS)))
    return markers


def _student_interval(values: Any) -> tuple[float, float]:
    """95 % interval of the mean of `values`; nothing to draw where there are fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def plot_bars(frame: pd.DataFrame, ax: Any = None, *, column: str, label: str, median: bool = False) -> Any:
    """One bar per configuration with its prompts as dots, so that a mean never hides its spread."""
    order = distinct(frame["config_name"])
    in_rows = _in_rows(order)
    ax = _axes(ax, 1 + 0.24 * len(order) if in_rows else 4.2)
    x, y = (column, "config_name") if in_rows else ("config_name", column)
    common = {"data": frame, "x": x, "y": y, "order": order, "ax": ax}
    style = {"alpha": 0.75, "capsize": 0.15, "err_kws": {"linewidth": 1.2, "color": "0.2"}, "legend": False}
    spread = {"estimator": "median", "errorbar": ("pi", 50)} if median else {"errorbar": _student_interval}
    sns.barplot(**common, hue="config_name", palette=_palette(frame, order), **spread, **style)
    sns.stripplot(**common, color="0.25", size=3, alpha=0.4, jitter=False)
    note = "median and quartiles" if median else "mean and 95 % interval"
    title = GENERATION.metrics[column].title
    quantity = title[0].upper() + title[1:]
    over = f"{note} over {amount(frame['prompt_id'].nunique(), 'prompt')}"
    ax.set_title(f"{quantity}:\n{over}" if in_rows else f"{quantity}: {over}")
    if in_rows:
        ax.set(xlabel=label, ylabel="", xlim=(0, None))
    else:
        ax.set(xlabel="", ylabel=label, ylim=(0, None))
    return ax


def plot_experts_by_category(frame: pd.DataFrame, ax: Any = None) -> Any:
    """Distribution over prompts of mean experts, by prompt category and configuration."""
    order = distinct(frame["config_name"])
    categories = distinct(frame["prompt_category"])
    common = {"data": frame, "linewidth": 0.9, "fliersize": 2.5, "gap": 0.15}
    value = "avg_experts_per_token"
    if _in_rows(order):  # a row a configuration, a colour a category
        groups = {"y": "config_name", "order": order}
        colors = {"hue": "prompt_category", "hue_order": categories}
        colors["palette"] = _distinct_colors(len(categories))
    else:
        groups = {"x": "prompt_category", "order": categories}
        colors = {"hue": "config_name", "hue_order": order, "palette": _palette(frame, order)}
        if _in_rows(categories):
            groups = {"y": "prompt_category", "order": categories}
    in_rows = "y" in groups
    ax = _axes(ax, 1 + 0.12 * len(order) * len(categories) if in_rows else 4.2)
    with warnings.catch_warnings():  # seaborn names the direction in a way that matplotlib will give up
        warnings.filterwarnings("ignore", ".*vert: bool")
        sns.boxplot(**common, **groups, **({"x": value} if in_rows else {"y": value}), **colors, ax=ax)
    ax.set(xlabel="", ylabel="", title="Experts by prompt category")
    if in_rows:
        ax.set_xlabel(EXPERTS_LABEL)
    else:
        ax.set_ylabel(EXPERTS_LABEL)
    _legend_beside(ax, len(colors["hue_order"]))
    return ax


def plot_experts_vs_latency(frame: pd.DataFrame, ax: Any = None) -> Any:
    """Mean experts against decode time per token: a dot a prompt, a large mark a configuration's medians."""
    order = distinct(frame["config_name"])
    ax = _axes(ax, 0.6 + 0.15 * len(order))
    data = frame.assign(latency=frame["decode_sec_per_token"] * 1000)
    medians = data.groupby("config_name", sort=False)[["avg_experts_per_token", "latency"]].median()
    common = {"x": "avg_experts_per_token", "y": "latency", "hue": "config_name", "hue_order": order}
    common |= {"palette": _palette(frame, order), "ax": ax}
    sns.scatterplot(data, **common, s=16, alpha=0.5, linewidth=0, legend=False)
    marks = {"style": "config_name", "style_order": order, "markers": _markers(frame, order)}
    large = {"s": 80, "edgecolor": "0.2", "linewidth": 0.7, "zorder": 4}
    sns.scatterplot(medians.reset_index(), **common, **marks, **large)
    ax.set(xlabel=EXPERTS_LABEL, ylabel=f"decode time, ms per token {NOT_FROM_ZERO}")
    ax.set_title("Experts against latency (large: medians of a configuration)")
    _legend_beside(ax, len(order))
    return ax


def _nats_scale(ax: Any, which: str, values: list[float]) -> None:
    """Linear within +-0.01 nats, logarithmic beyond: 0.4 and 0.004 nats can be read off one axis."""
    low = 1.3 * min(values)
    high = 1.3 * max(values)
    if max(-low, high) <= 0.05:
        ax.locator_params(which, nbins=6)
        return
    axis = getattr(ax, f"{which}axis")
    getattr(ax, f"set_{which}scale")("symlog", linthresh=0.01)
    steps = (0.005, *(step * 10.0**power for power in range(-2, 2) for step in (1, 3)))
    ticks = [tick for tick in (*(-step for step in steps), 0.0, *steps) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.set_ticks([], minor=True)
    if which == "x":
        ax.tick_params(axis="x", labelsize="x-small")  # beside each other they need the room


MOST_COLORS = 12  # that can be told apart in one plot; more families are coloured by what stands in


def _styles_of_families(rows: pd.DataFrame, groups: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Family -> label, colour, marker and width of its line: its own or, where there are too many, those of
    what stands in, the bounds apart."""
    configs = {row["config_name"]: json.loads(row["configuration"]) for row in rows.to_dict("records")}
    first = {family: configs[members[0]] for family, members in groups.items()}
    stand_ins = in_order(config.get("stand_in", "nothing") for config in first.values())
    if len(groups) <= MOST_COLORS or len(stand_ins) < 2:
        colors = _distinct_colors(len(groups))
        markers = itertools.cycle(MARKERS[1:])
        return {
            family: {"label": family, "color": color, "marker": marker, "linewidth": 1.2}
            for family, color, marker in zip(groups, colors, markers, strict=False)
        }
    colors = dict(zip(stand_ins, _distinct_colors(len(stand_ins)), strict=True))
    styles = {}
    for family, config in first.items():
        stand_in = config.get("stand_in", "nothing")
        style = {"label": f"rules, {stand_in} stands in", "color": colors[stand_in], "marker": MARKERS[1]}
        style |= {"linewidth": 0.9, "alpha": 0.6}
        rule = RULES.get(config.get("method"))
        if rule is not None and rule.is_static:
            kept = {"label": f"Top-K, {stand_in} stands in", "marker": MARKERS[0], "linewidth": 1.6}
            style |= kept | {"alpha": 1.0}
        elif rule is not None and rule.uses_outputs:
            style |= {"label": f"{family}, a bound", "color": "0.2", "linestyle": ":", "linewidth": 1.6}
        styles[family] = style
    return styles


def plot_quality_vs_experts(verdicts: pd.DataFrame, ax: Any = None) -> Any:
    """Difference to the baseline in NLL against mean experts: the static curve, and each rule's ladder.

    verdicts: see `verdict_frame`. Differences are paired by item, so band and bars (95 %) hold what the
    comparison leaves uncertain, not how hard the items are. Between two static points the curve is their
    mixture.
    """
    ax = _axes(ax)
    difference = "delta_to_baseline"
    rows = verdicts.dropna(subset=difference)
    # No width where no item differs: the baseline itself.
    low = rows[f"{difference}_ci95_low"].fillna(rows[difference])
    high = rows[f"{difference}_ci95_high"].fillna(rows[difference])
    rows = rows.assign(low=low, high=high)
    static = rows[rows["is_static"]].sort_values("mean_experts")
    if len(static):
        ends = static["mean_experts"].iloc[[0, -1]]
        x = np.union1d(np.linspace(*ends, 400), static["mean_experts"])
        band = {key: np.interp(x, static["mean_experts"], static[key]) for key in ("low", difference, "high")}
        gray = {"color": "0.2", "linewidth": 1.4, "markersize": 5}
        ax.fill_between(x, band["low"], band["high"], color="0.2", alpha=0.15, linewidth=0)
        ax.plot(x, band[difference], **gray)
        ax.plot(static["mean_experts"], static[difference], "o", color="0.2", markersize=5)
        ax.plot([], [], "o-", **gray, label="static Top-K")
    groups = _families(rows, list(rows.loc[~rows["is_static"], "config_name"]))
    styles = _styles_of_families(rows, groups)
    labels = set()
    for name, members in groups.items():
        ladder = rows[rows["config_name"].isin(members)].sort_values("mean_experts")
        bars = np.maximum([ladder[difference] - ladder["low"], ladder["high"] - ladder[difference]], 0)
        style = dict(styles[name])
        if style["label"] in labels:
            del style["label"]  # it stands in the legend once
        labels.add(styles[name]["label"])
        ax.errorbar(
            ladder["mean_experts"],
            ladder[difference],
            yerr=bars,
            **style,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=0.8,
        )
    if _owns_figure(ax):
        ax.figure.set_size_inches(8.5, max(4.2, 0.5 + 0.2 * len(labels)))  # room for the legend
    if len(rows):
        _nats_scale(ax, "y", [*low, *high])
        ax.legend(**LEGEND_BESIDE, fontsize="small")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel=EXPERTS_LABEL, ylabel=f"NLL minus {verdicts.attrs['baseline']}'s, nats per token")
    ax.set_title("Quality against compute (lower is better)" if len(rows) else "No configuration was scored")
    return ax


def _draw_verdict(ax: Any, height: float, mark: Mapping[str, Any], width: float) -> list[float]:
    """Draw one difference with its interval; returns the ends of what was drawn."""
    delta = mark["delta_nll"]
    if pd.isna(delta):
        return []
    color = VERDICT_COLORS[mark["verdict"]]
    is_tested = not pd.isna(mark["ci95_low"])
    ends = [mark["ci95_low"], mark["ci95_high"]] if is_tested else [delta, delta]
    ax.plot(ends, [height, height], color=color, linewidth=width, solid_capstyle="butt")
    face = color if is_tested else "white"
    ax.plot(delta, height, "o", color=color, markersize=2.8 * width, markerfacecolor=face)
    return ends


def plot_delta_at_equal_compute(verdicts: pd.DataFrame, ax: Any = None) -> Any:
    """One row per adaptive configuration: NLL minus that of static Top-K with the same mean experts, 95 %.
    Where there are many, one row per rule, with a mark for each value of its knob."""
    ax = _axes(ax)
    rows = verdicts[~verdicts["is_static"]]
    lines = {name: [name] for name in rows["config_name"]}
    if len(rows) > MOST_ROWS:
        lines = _families(rows, list(rows["config_name"]))
    if _owns_figure(ax):
        ax.figure.set_figheight(1.7 + 0.26 * max(len(lines), 4))
    spans = [0.0]
    side = {"va": "center", "transform": ax.get_yaxis_transform()}
    for y, members in enumerate(lines.values()):
        marks = rows[rows["config_name"].isin(members)].sort_values("mean_experts")
        experts = distinct(f"{number:.2f}" for number in marks["mean_experts"].dropna())
        ends_of_line = experts if len(experts) < 3 else [experts[0], experts[-1]]
        ax.text(1.02, y, " to ".join(ends_of_line) or "–", **side)
        if marks["delta_nll"].isna().all():
            ax.text(0.98, y, "not comparable", ha="right", color="0.5", **side)
        apart = 0.16 * (np.arange(len(marks)) - (len(marks) - 1) / 2) * min(1, 4 / len(marks))
        for height, mark in zip(y + apart, marks.to_dict("records"), strict=True):
            spans += _draw_verdict(ax, height, mark, 1.8 if len(marks) == 1 else 1.2)
    _nats_scale(ax, "x", spans)
    ax.axvline(0, color="0.2", linewidth=1)
    for verdict, color in VERDICT_COLORS.items():
        ax.plot([], [], "o-", color=color, linewidth=1.8, markersize=5, label=verdict)
    ax.set_yticks(range(len(lines)), list(lines))
    ax.set(ylim=(len(lines) - 0.4, -0.6), xlabel="NLL minus static Top-K at equal experts, nats per token")
    ax.set_title("Against static Top-K at equal compute (left is better)", pad=22)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, borderaxespad=0.1)
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate("experts", (1.02, 1), (0, 4), **place, color="0.4")
    return ax


def _spread(places: Sequence[float], gap: float) -> np.ndarray:
    """`places`, ascending, moved as little as keeps them `gap` apart (least squares)."""
    steps = gap * np.arange(len(places))
    return optimize.isotonic_regression(np.asarray(places) - steps).x + steps


FIELD_COLORS = {
    "beaten by no other": "#029e73",
    "BH, beaten by no other": "#0173b2",
    "BH, beaten": "#d55e00",
    "bound": "0.2",
    "others": "0.7",
}


def _kind_in_field(config: Config, is_unbeaten: bool) -> str:
    """Which of FIELD_COLORS a rule's ladder has; BH is the one on the empirical null."""
    if RULES[config["method"]].uses_outputs:
        return "bound"
    if config["method"] == "bh" and config["p_values"] == "empirical":
        return "BH, beaten by no other" if is_unbeaten else "BH, beaten"
    return "beaten by no other" if is_unbeaten else "others"


def _name_ends(ax: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name right of `ax` what ends there, none over another; ends: height in the data, name and colour."""
    transform = ax.transData + ax.transAxes.inverted()
    ends = sorted(ends)
    heights = _spread([transform.transform((0, end))[1] for end, _, _ in ends], 0.033)
    for height, (_, label, color) in zip(heights, ends, strict=True):
        ax.text(1.01, height, label, transform=ax.transAxes, fontsize=6.5, color=color, va="center")


def plot_field(verdicts: pd.DataFrame, axes: Any = None) -> Any:
    """Each rule's ladder against static Top-K at the same compute, a panel for each stand-in: those that no
    other with this stand-in beats and BH in colour, the others in grey, each named at its end."""
    rows = verdicts[verdicts["delta_nll"].notna()]
    configs = {row["config_name"]: json.loads(row["configuration"]) for row in rows.to_dict("records")}
    stand_ins = in_order(config["stand_in"] for config in configs.values())
    if axes is None:
        size = (3.6 * len(stand_ins) + 1.0, 4.6)
        axes = plt.subplots(
            1, len(stand_ins), figsize=size, layout="constrained", sharey=True, squeeze=False
        )[1][0]
    _nats_scale(axes[0], "y", [*rows["delta_nll"], 0.0])
    names_at: list[list[tuple[float, str, str]]] = []
    drawn: set[str] = set()
    for ax, stand_in in zip(axes, stand_ins, strict=True):
        alike = {name: config for name, config in configs.items() if config["stand_in"] == stand_in}
        ladders = {
            label: rows[rows["config_name"].isin(members)].sort_values("mean_experts")
            for label, members in families(alike).items()
            if len(members) > 1
        }
        ends: list[tuple[float, str, str]] = []  # where each ladder ends, its name and colour
        for label, ladder in ladders.items():
            first = ladder.iloc[0]
            kind = _kind_in_field(alike[first["config_name"]], first["is_unbeaten"])
            drawn.add(kind)
            color = FIELD_COLORS[kind]
            width = 1.0 if kind == "others" else 1.8
            dots = {"markersize": 3.5, "zorder": 1 if kind == "others" else 2}
            style = ":" if kind == "bound" else "-"
            ax.plot(
                ladder["mean_experts"], ladder["delta_nll"], f"o{style}", color=color, linewidth=width, **dots
            )
            ends.append((ladder["delta_nll"].iloc[-1], label, color if kind != "others" else "0.4"))
        names_at.append(ends)
        ax.axhline(0, color="0.2", linewidth=1.2)
        words = "Nothing stands in" if stand_in == "nothing" else f"{stand_in} stands in"
        ax.set(xlabel="effective experts", title=words[0].upper() + words[1:])
    # Named when all is drawn: until then the axis, which all panels share, may change.
    for ax, ends in zip(axes, names_at, strict=True):
        _name_ends(ax, ends)
    for kind, color in FIELD_COLORS.items():
        if kind in drawn:
            axes[0].plot([], [], "o-", color=color, markersize=3.5, label=kind)
    figure = axes[0].figure
    below = {"loc": "outside lower center", "ncols": len(drawn), "frameon": False, "fontsize": "small"}
    figure.legend(*axes[0].get_legend_handles_labels(), **below)
    axes[0].set_ylabel("NLL minus static Top-K at equal compute")
    return axes


def _is_plain(table: pd.DataFrame) -> pd.Series:
    """Which rows are of plain static Top-K."""
    return table["configuration"].map(lambda cell: static_k(json.loads(cell)) is not None).astype(bool)


def plot_expert_counts(table: pd.DataFrame, ax: Any = None) -> Any:
    """How many experts how often: shares of the decisions, all layers together, a line a configuration. Plain
    Top-K, which always runs the same number, is left out."""
    names = distinct(table["config_name"])
    drawn = table[~_is_plain(table)]
    order = distinct(drawn["config_name"])
    ax = _axes(ax, 0.6 + 0.15 * len(order))
    counts = drawn.groupby(["config_name", "num_experts"], sort=False)["tokens"].sum()
    shares = (counts / counts.groupby("config_name").transform("sum")).rename("share").reset_index()
    fewest = int(shares["num_experts"].min())
    most = int(shares["num_experts"].max())
    every = pd.MultiIndex.from_product([order, range(fewest, most + 1)], names=["config_name", "num_experts"])
    shares = shares.set_index(["config_name", "num_experts"]).reindex(every, fill_value=0.0).reset_index()
    sns.lineplot(
        shares,
        x="num_experts",
        y="share",
        hue="config_name",
        hue_order=order,
        palette=_palette(table, names),
        style="config_name",
        style_order=order,
        markers=_markers(table, names),
        dashes=False,
        markersize=6,
        linewidth=1.2,
        ax=ax,
    )
    ax.set(xlabel="experts that ran", ylabel="share of decisions", ylim=(0, None))
    ax.set_xlim(fewest - 0.3, most + 0.3)
    ax.set_title("How many experts, how often (a decision is a token in a layer)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    _legend_beside(ax, len(order))
    return ax


def plot_null_calibration(diagnostics: Mapping[str, Any], axes: Any = None) -> Any:
    """Are the nulls right? Left: share of held-out null pairs with p <= level, a line a layer; on the
    diagonal a p-value is exact, above it too small. Right: realised false-discovery proportion of BH against
    alpha.
    """
    left, right = _two_axes(axes)
    levels = diagnostics["levels"]
    colors = sns.color_palette("colorblind")
    for color, (name, null) in zip(colors, diagnostics["nulls"].items(), strict=False):
        curve = pd.DataFrame(null["alphas"])
        for index, shares in enumerate(null["layers"]):
            left.plot(levels, shares, color=color, linewidth=0.9, alpha=0.7, label=None if index else name)
        above_zero = curve["realised_fdp"].where(curve["realised_fdp"] > 0)  # as far as a logarithm reaches
        right.plot(curve["alpha"], above_zero, "o-", color=color, markersize=4, label=name)
    for ax, first, last, label in ((left, levels[0], 1, "exact"), (right, 0.001, 0.5, "alpha")):
        ax.plot([first, last], [first, last], color="0.2", linestyle=":", label=label)
        ax.set(xscale="log", yscale="log")
        ax.legend(frameon=False)
    left.set(xlabel="p-value level", ylabel="share of null pairs at or below", ylim=(levels[0] / 2, 1.5))
    left.set_title("Uniformity on held-out text, by layer")
    right.set(xlabel="alpha", ylabel="realised proportion, where above 0", ylim=(3e-4, 1))
    right.set_title("False discoveries of BH, before floor and cap")
    return left, right


def plot_layer_profile(table: pd.DataFrame, axes: Any = None) -> Any:
    """Layer by layer: mean experts, and the share of the gate mass that the experts which ran have."""
    order = distinct(table["config_name"])
    axes = _two_axes(axes, max(4.2, 0.6 + 0.15 * len(order)))
    common = {"x": "layer", "hue": "config_name", "hue_order": order, "palette": _palette(table, order)}
    common |= {"style": "config_name", "style_order": order, "markers": _markers(table, order)}
    for ax, column, label, title in (
        (axes[0], "avg_experts_per_token", "experts per token", "Experts by layer"),
        (axes[1], "gate_mass_frac", "share of gate mass that ran", "Gate mass by layer"),
    ):
        sns.lineplot(table, y=column, ax=ax, **common, dashes=False, markersize=5, linewidth=1.2)
        ax.set(xlabel="MoE layer", ylabel=f"{label} {NOT_FROM_ZERO}", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend_.remove()
    _legend_beside(axes[1], len(order))
    return axes


def plot_task_scores(frame: pd.DataFrame, axes: Any = None) -> Any:
    """Mean score of each task by configuration, one panel for each kind of score."""
    metrics = distinct(frame["metric"])
    order = distinct(frame["config_name"])
    tasks = distinct(frame["task"])
    in_rows = _in_rows(order)  # a row a configuration, a colour a task
    if in_rows:
        groups = {"x": "score", "y": "config_name", "order": order}
        colors = {"hue": "task", "hue_order": tasks, "palette": _distinct_colors(len(tasks))}
    else:
        groups = {"x": "task", "y": "score"}
        colors = {"hue": "config_name", "hue_order": order, "palette": _palette(frame, order)}
    if axes is None:
        height = min(1 + 0.14 * len(order) * (len(tasks) + 1), MAX_INCHES) if in_rows else 4.2
        size = (2 + 3.2 * len(metrics), height)
        panels = {"squeeze": False, "layout": "constrained", "figsize": size, "sharey": in_rows}
        axes = plt.subplots(1, len(metrics), **panels)[1][0]
    style = {"alpha": 0.75, "errorbar": _student_interval, "capsize": 0.1}
    style["err_kws"] = {"linewidth": 1.0, "color": "0.2"}
    for ax, metric in zip(axes, metrics, strict=True):
        sns.barplot(frame[frame["metric"] == metric], **groups, **colors, **style, ax=ax)
        ax.set(xlabel="", ylabel="")
        if in_rows:
            ax.set_xlabel(f"{metric},\nmean and 95 % interval")
        else:
            ax.set_ylabel(f"{metric}, mean and 95 % interval")
            if _in_rows(tasks):
                ax.tick_params(axis="x", rotation=20)
        if ax is not axes[-1]:
            ax.legend_.remove()
    _legend_beside(axes[-1], len(colors["hue_order"]))
    return axes


HEATMAP_CONFIGS = 5  # the first ones; more would be too small to read


def plot_expert_usage_heatmap(usage: pd.DataFrame, figure: Any = None) -> Any:
    """How often each expert of each layer ran, relative to even use, for the first configurations."""
    names = distinct(usage["config_name"])[:HEATMAP_CONFIGS]
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


@dataclass(frozen=True)
class PlotData:
    """Everything a plot may be drawn from; each frame is empty where the run has none."""

    generation: pd.DataFrame
    verdicts: pd.DataFrame  # see `verdict_frame`
    tasks: pd.DataFrame
    layers: pd.DataFrame  # LAYER_STATISTICS
    usage: pd.DataFrame  # EXPERT_USAGE, the baseline first
    counts: pd.DataFrame  # EXPERT_COUNTS; empty where every configuration is plain Top-K
    diagnostics: Mapping[str, Any]
    has_field: bool  # whether several rules have ladders


@dataclass(frozen=True)
class Plot:
    """draw: plot_x(data, ax=None). data: what it is given; nothing is drawn where that is empty. most: with
    more configurations it could not be read, and is left out."""

    title: str
    draw: Callable[..., Any]
    data: Callable[[PlotData], Any]
    most: int = 60


def _generated(column: str) -> Callable[[PlotData], pd.DataFrame]:
    """The generated rows that have a value of `column`."""
    return lambda data: data.generation[data.generation[column].notna()]


PLOTS: dict[str, Plot] = {  # file name, in the order of the report
    "quality_vs_experts": Plot(
        "Quality against compute",
        plot_quality_vs_experts,
        lambda data: data.verdicts.dropna(subset="delta_to_baseline"),
        most=1000,
    ),
    "delta_at_equal_compute": Plot(
        "Quality at equal compute",
        plot_delta_at_equal_compute,
        lambda data: data.verdicts[~data.verdicts["is_static"]],
        most=1000,
    ),
    "field": Plot(
        "Every rule at equal compute",
        plot_field,
        lambda data: data.verdicts if data.has_field else (),
        most=1000,
    ),
    "task_scores": Plot("Downstream tasks", plot_task_scores, lambda data: data.tasks),
    "avg_experts_comparison": Plot(
        "Experts per token and layer",
        functools.partial(plot_bars, column="avg_experts_per_token", label=EXPERTS_LABEL),
        _generated("avg_experts_per_token"),
    ),
    "expert_counts": Plot("How many experts, how often", plot_expert_counts, lambda data: data.counts),
    "inference_time_comparison": Plot(
        "Inference time",
        functools.partial(plot_bars, column="inference_time_sec", label="seconds per prompt", median=True),
        _generated("inference_time_sec"),
    ),
    "experts_vs_latency": Plot(
        "Experts against latency", plot_experts_vs_latency, _generated("decode_sec_per_token")
    ),
    "experts_by_category": Plot(
        "Experts by category", plot_experts_by_category, _generated("avg_experts_per_token")
    ),
    "expert_utilization_cv": Plot(
        "Balance of expert use",
        functools.partial(plot_bars, column="expert_utilization_cv", label="CV of use, mean of layers"),
        _generated("expert_utilization_cv"),
    ),
    "layer_profile": Plot("Layer by layer", plot_layer_profile, lambda data: data.layers),
    "expert_usage_heatmap": Plot(
        "Use of every expert", plot_expert_usage_heatmap, lambda data: data.usage, most=1000
    ),
    "null_calibration": Plot(
        "Calibration of the nulls", plot_null_calibration, lambda data: data.diagnostics, most=1000
    ),
}


def verdict_frame(analysis: Mapping[str, Any]) -> pd.DataFrame:
    """The verdicts as a frame, with config_name, configuration, is_static, is_unbeaten (its rule, by those
    with the same stand-in); its `attrs` name the baseline."""
    unbeaten = {
        label for found in unbeaten_rules(analysis.get("field", {})).values() for label in found.labels
    }
    unbeaten_names = {
        name
        for ladder in analysis.get("field", {}).get("ladders", ())
        if ladder["label"] in unbeaten
        for name in ladder["members"]
    }
    rows = []
    for name, verdict in analysis["verdict"].items():
        config = json.dumps(analysis["configurations"][name])
        about = {"config_name": name, "configuration": config, "is_unbeaten": name in unbeaten_names}
        rows.append(about | verdict)
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["is_static", "delta_to_baseline"])
    numbers = [name for name in frame if name.startswith(("mean_", "delta_", "ci95_"))]
    frame = frame.astype(dict.fromkeys(numbers, float))
    frame.attrs["baseline"] = analysis["baseline"]
    return frame


def plot_data(results: Results, analysis: Mapping[str, Any], output_dir: Path) -> PlotData:
    """What the plots of a run are drawn from. Somebody's words are shown as they are, not as formulas."""

    def shown(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
        literal = {name: frame[name].map(_visible).str.replace("$", r"\$", regex=False) for name in columns}
        return frame.assign(**literal)

    done = results.finished()
    runs = set().union(*map(run_ids, results))
    cells = {name: json.dumps(config) for name, config in analysis["configurations"].items()}

    def by_layer(table: Table) -> pd.DataFrame:
        rows = read_side_table(table, output_dir, runs)
        rows = first_kind(rows[rows["config_name"].isin(cells)])  # the folder may hold more than is analysed
        return rows.assign(configuration=rows["config_name"].map(cells))

    counts = by_layer(EXPERT_COUNTS)
    usage = by_layer(EXPERT_USAGE)
    is_other = usage["config_name"] != analysis["baseline"]
    return PlotData(
        generation=shown(done.generation, "prompt_category"),
        verdicts=verdict_frame(analysis),
        tasks=shown(done.tasks[done.tasks["score"].notna()], "task", "metric"),
        layers=by_layer(LAYER_STATISTICS),
        usage=usage.iloc[is_other.argsort(kind="stable")],
        counts=counts if (~_is_plain(counts)).any() else counts[:0],
        diagnostics=analysis["null_diagnostics"] or {},
        has_field=bool(analysis["field"]),
    )


@dataclass(frozen=True)
class DrawnPlots:
    """Paths of the plots that were drawn, and plot -> why, for those that could not be."""

    paths: list[Path]
    failed: dict[str, str]


def _has_data(plot: Plot, data: PlotData) -> bool:
    """Whether there is something to draw; where that cannot be told, drawing it will say why."""
    try:
        return len(plot.data(data)) > 0
    except Exception:
        return True


def _save_figure(path: Path) -> None:
    """Save the figure that was drawn last."""
    figure = plt.gcf()
    sns.despine(figure, left=True)
    with replacing(path) as part:
        # No creation date or version in the file: the same results give the same bytes.
        figure.savefig(part, format="png", dpi=300, metadata={"Software": None})


def draw_plots(results: Results, output_dir: Path, analysis: Mapping[str, Any]) -> DrawnPlots:
    """Draw every plot in PLOTS that has data. One that fails is left out and named: it must not lose the
    report."""
    data = plot_data(results, analysis, output_dir)
    drawn = DrawnPlots([], {})
    for name in PLOTS:  # no plot of an earlier run beside the report of this one
        discard(output_dir / "plots" / f"{name}.png")
    readable = {name: plot for name, plot in PLOTS.items() if len(analysis["configurations"]) <= plot.most}
    wanted = {name: plot for name, plot in readable.items() if _has_data(plot, data)}
    style = sns.axes_style("whitegrid")
    with style, sns.plotting_context("paper", font_scale=1.1), Phase("plots drawn", len(wanted)) as phase:
        for name, plot in wanted.items():
            phase.now(name)
            path = output_dir / "plots" / f"{name}.png"
            try:
                plot.draw(plot.data(data))
                _save_figure(path)
                drawn.paths.append(path)
                phase.advance(1)
            except OSError:  # a full disk, say: the report would not fit either
                raise
            except Exception as error:
                drawn.failed[name] = f"{type(error).__name__}: {_first_line(error)}"
                logger.error(f"plot {name} could not be drawn and is left out: {drawn.failed[name]}")
                logger.debug("where it failed", exc_info=True)
            finally:
                plt.close("all")
    return drawn


def create_visualizations(
    df: pd.DataFrame, output_dir: str | Path, baseline: str | None = None
) -> list[Path]:
    """Draw every plot in PLOTS that has data into `output_dir`/plots, PNG at 300 DPI; returns the paths.

    df, baseline: see `analyze_results`. A plot that cannot be drawn is left out, and named in the log.
    """
    folder = Path(output_dir)
    results = results_beside(df, folder)
    return draw_plots(results, folder, analyze_tables(results, folder, baseline)).paths


# ---------------------------------------------------------------------------------------------------------
# 15. Report
# ---------------------------------------------------------------------------------------------------------
#
# A template that looks like the report it makes. Whatever claims something is a sentence, a tested function
# of the analysis; whatever is a table is declared in REPORT_TABLES.


def markdown_text(value: Any) -> str:
    """Text of a run in Markdown: no character of it can end a cell, a row or a table, or act as HTML."""
    text = _visible(" ".join(str(value).split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + mark if mark in "\\`*_{}[]|#!" else mark for mark in text)


NOTHING_TO_SHOW = "–"


def show(row: Mapping[str, Any], key: str, form: str = "") -> str:
    """An entry of `row` as a cell, NOTHING_TO_SHOW where there is none.

    form: a format of Python's for numbers; "a to b" for the interval of KEY_low and KEY_high; "p" for a
    p-value, "code" for a name, "s" for words of this script; empty for the text of a run, made harmless, and
    for numbers as they come.
    """
    if " to " in form:
        number_form = form.split(" to ")[0]
        low = show(row, f"{key}_low", number_form)
        high = show(row, f"{key}_high", number_form)
        return NOTHING_TO_SHOW if NOTHING_TO_SHOW in (low, high) else f"{low} to {high}"
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value) or value is pd.NA or value != value:
        return NOTHING_TO_SHOW
    if form == "p":
        return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if form == "code":
        return f"`{value}`"
    if form:
        return format(value, form)
    return f"{value:g}" if isinstance(value, float) else markdown_text(value)


@dataclass(frozen=True)
class ReportColumn:
    """A column of a table in the report: its title, and what `show` is given."""

    title: str
    key: str
    form: str = ""


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[ReportColumn]) -> str:
    """A Markdown table: numbers right, words and the first column left, and no column of nothing."""
    shown = []
    for place, column in enumerate(columns):
        cells = [show(row, column.key, column.form) for row in rows]
        if place == 0 or set(cells) != {NOTHING_TO_SHOW}:
            is_numbers = all(cell == NOTHING_TO_SHOW or re.match(r"[-+<]? ?\d", cell) for cell in cells)
            shown.append([column.title, "---:" if place and is_numbers else "---", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*shown, strict=True))


def render_markdown(
    template: str, context: Mapping[str, Any], tables: Mapping[str, Sequence[ReportColumn]]
) -> str:
    """A template filled with `context`, which may say bullets(sentences) and table(name of one of `tables`,
    rows). What is missing in it raises."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        context,
        bullets=lambda sentences: "\n".join(f"- {sentence}" for sentence in sentences),
        table=lambda name, rows: markdown_table(rows, tables[name]),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


_CONFIGURATION = ReportColumn("configuration", "configuration", "code")
REPORT_TABLES: dict[str, tuple[ReportColumn, ...]] = {
    "quality": (
        _CONFIGURATION,
        ReportColumn("experts", "mean_experts", ".2f"),
        ReportColumn("NLL at equal compute", "delta_nll", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("detectable", "smallest_detectable", ".4f"),
        ReportColumn("verdict", "verdict", "s"),
        ReportColumn("NLL to baseline", "delta_to_baseline", "+.4f"),
        ReportColumn("95 % interval to baseline", "delta_to_baseline_ci95", "+.4f to +.4f"),
        ReportColumn("equivalent", "equivalent_to_baseline", "s"),
        ReportColumn("perplexity", "perplexity", ".2f"),
        ReportColumn("KL", "kl_to_own", ".4f"),
        ReportColumn("top-1 agreement", "top1_agreement", ".3f"),
        ReportColumn("items", "items", "s"),
    ),
    "league": (
        ReportColumn("rule", "label", "s"),
        ReportColumn("experts", "span", ".2f to .2f"),
        # Here `league_table` puts a column for each number of experts.
        ReportColumn("within 1 % at", "within_1", ".2f"),
        ReportColumn("95 %", "ci95_1", ".2f to .2f"),
        ReportColumn("within 0.5 % at", "within_05", ".2f"),
        ReportColumn("95 %", "ci95_05", ".2f to .2f"),
        ReportColumn("beaten by", "beaten_by", "s"),
    ),
    "nulls": (
        ReportColumn("null", "null", "s"),
        ReportColumn("alpha", "alpha", "g"),
        ReportColumn("rejections, mean", "mean_rejections", ".2f"),
        ReportColumn("realised false-discovery proportion", "realised_fdp", ".4f"),
        ReportColumn("no rejection", "zero_rejection_frac", ".1%"),
    ),
    "tasks": (
        ReportColumn("task", "task"),
        _CONFIGURATION,
        ReportColumn("harness's own numbers ± stderr", "numbers"),
        ReportColumn("score", "metric"),
        ReportColumn("documents", "n_documents", "d"),
        ReportColumn("mean", "mean", ".4f"),
        ReportColumn("difference", "mean_difference", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("d", "cohens_d", ".2f"),
        ReportColumn("significant", "is_significant", "s"),
        ReportColumn("experts", "experts", ".2f"),
    ),
    "summary": (
        _CONFIGURATION,
        ReportColumn("experts, mean ± sd", "experts", "s"),
        ReportColumn("range", "range", ".0f to .0f"),
        ReportColumn("at floor", "floor_frac", ".1%"),
        ReportColumn("at cap", "cap_frac", ".1%"),
        ReportColumn("no rejection", "zero_rejection_frac", ".1%"),
        ReportColumn("time, s", "inference_time_sec", ".3f"),
        ReportColumn("decode, ms/token", "decode_ms", ".2f"),
        ReportColumn("load CV", "expert_utilization_cv", ".2f"),
        ReportColumn("max/min use", "expert_utilization_max_min_ratio", ".1f"),
    ),
    "compute": (
        _CONFIGURATION,
        ReportColumn("active parameters", "active", "s"),
        ReportColumn("of experts", "of_experts", "s"),
        ReportColumn("expert FLOPs", "flops", "s"),
        ReportColumn("weights read to decode a token", "read", "s"),
        ReportColumn("faster decoding allowed", "allowed_speedup", ".2f"),
        ReportColumn("measured", "decode_speedup", ".2f"),
    ),
    "phases": (
        _CONFIGURATION,
        ReportColumn("experts in prefill", "prefill_experts", ".2f"),
        ReportColumn("experts in decoding", "decode_experts", ".2f"),
        ReportColumn("prefill, ms", "prefill_ms", ".1f"),
        ReportColumn("decode, ms/token", "decode_ms", ".2f"),
    ),
    "throughput": (
        _CONFIGURATION,
        ReportColumn("batch size", "batch_size", "d"),
        ReportColumn("tokens/s", "tokens_per_sec", ".1f"),
        ReportColumn("of the baseline's", "speedup", ".2f"),
        ReportColumn("allowed", "allowed_speedup", ".2f"),
        ReportColumn("experts a token", "decode_experts", ".2f"),
        ReportColumn("distinct experts a step", "distinct_experts", ".1f"),
    ),
    "layers": (
        _CONFIGURATION,
        ReportColumn("fewest experts (layer)", "fewest", "s"),
        ReportColumn("most experts (layer)", "most", "s"),
        ReportColumn("gate mass that ran", "gate_mass_frac", ".3f"),
        ReportColumn("entropy of use, bits", "use_entropy_bits", ".2f"),
        ReportColumn("categories diverge, bits", "category_divergence_bits", ".3f"),
        ReportColumn("diverge in layers", "diverging", "s"),
    ),
    "token_kinds": (
        _CONFIGURATION,
        ReportColumn("kind of token", "words", "s"),
        ReportColumn("share of tokens", "token_share", ".1%"),
        ReportColumn("experts", "mean", ".2f"),
        ReportColumn("all others", "mean_baseline", ".2f"),
        ReportColumn("difference", "mean_difference", "+.2f"),
        ReportColumn("95 % interval", "ci95", "+.2f to +.2f"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("units", "n_units", "d"),
        ReportColumn("significant", "is_significant", "s"),
    ),
    "tests": (
        _CONFIGURATION,
        ReportColumn("quantity", "title", "s"),
        ReportColumn("pairs", "n_pairs", "d"),
        ReportColumn("difference", "difference", "s"),
        ReportColumn("95 % interval", "interval", "s"),
        ReportColumn("ratio, median", "median_ratio", ".2f"),
        ReportColumn("p", "p_value", "p"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("d", "cohens_d", ".2f"),
        ReportColumn("significant", "is_significant", "s"),
    ),
    "expected": (
        _CONFIGURATION,
        ReportColumn("quantity", "title", "s"),
        ReportColumn("expected", "expected", "s"),
        ReportColumn("measured", "measured", "s"),
        ReportColumn("held", "verdict", "s"),
    ),
    "details": (_CONFIGURATION, ReportColumn("method", "method", "s"), ReportColumn("settings", "settings")),
    "settings": (ReportColumn("setting", "setting", "s"), ReportColumn("value", "value")),
    "failures": (_CONFIGURATION, ReportColumn("item", "item"), ReportColumn("error", "error")),
}


# Sentences that claim something


def names_of(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def is_static(verdict: Row) -> bool:
    """Whether a row of `quality_verdicts` is plain Top-K: part of the static curve, not compared with it."""
    return verdict["is_static"]


def verdict_sentence(analysis: Mapping[str, Any]) -> str:
    """The answer in one sentence; it claims nothing whose adjusted p-value is not below the level."""
    verdicts = analysis["verdict"]
    if not verdicts:
        return "No text was scored in this run: it says nothing about quality."
    compared = {name: row for name, row in verdicts.items() if row["delta_nll"] is not None}
    if not compared:
        reasons = [row["reason"] for row in verdicts.values() if not is_static(row)]
        reason = reasons[0] if reasons else "only static Top-K was run"
        return f"This run cannot compare quality at equal compute: {reason}."
    counts = {word: sum(row["verdict"] == word for row in compared.values()) for word in VERDICT_COLORS}
    better = [name for name, row in compared.items() if row["verdict"] == "better"]
    best = min(better or compared, key=lambda name: compared[name]["delta_nll"])
    row = compared[best]
    kind = "largest gain" if better else "lowest estimate, which is no evidence of a gain,"
    documents = f" of {amount(row['n_units'], 'document')}" if row["n_units"] != row["n_items"] else ""
    return (
        f"**Against static Top-K that spends the same number of experts, {counts['better']} of "
        f"{len(compared)} configurations predict the text better, {counts['worse']} worse, "
        f"{counts['undecided']} undecided; the {kind} is `{best}`'s, {row['delta_nll']:+.4f} nats per "
        f"token (95 % interval {show(row, 'ci95', '+.4f to +.4f')}, adjusted p "
        f"{show(row, 'p_value_adjusted', 'p')}, {amount(row['n_items'], 'item')}{documents}) at "
        f"{row['mean_experts']:.2f} experts.**"
    )


def task_sentence(analysis: Mapping[str, Any]) -> str:
    """What the tasks say, in one sentence."""
    tested = [entry for entry in analysis["tasks"] if entry.get("n_pairs")]
    if not tested:
        return f"No task could be compared with `{analysis['baseline']}` document by document."
    differing = [
        f"`{entry['configuration']}` on {markdown_text(entry['task'])} ({entry['mean_difference']:+.4f} "
        f"{markdown_text(entry['metric'])})"
        for entry in tested
        if entry["significant"]
    ]
    return (
        f"**Of {len(tested)} comparisons with `{analysis['baseline']}` on a task, paired by document, "
        f"{len(differing)} differ significantly{': ' if differing else ''}{', '.join(differing)}.** A "
        "difference that was not found is not shown to be absent: see the intervals."
    )


def other_input_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which configurations were asked something else in a task than the baseline was."""
    return [
        f"`{entry['configuration']}` on {markdown_text(entry['task'])}: "
        f"{amount(entry['n_other_inputs'], 'document')} left out, whose input was not "
        f"`{analysis['baseline']}`'s."
        for entry in analysis["tasks"]
        if entry.get("n_other_inputs")
    ]


def field_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """For each stand-in: which rules no other beats, and whether BH is among them."""
    sentences = []
    if analysis["field"] and analysis["field"]["n_units"] < 2:
        return ["Which rule beats which is not tested: all of the scored text is of one document."]
    for stand_in, unbeaten in unbeaten_rules(analysis["field"]).items():
        named = ", ".join(f"`{label}`" for label in unbeaten.labels) or "none"
        words = "With nothing standing in" if stand_in == "nothing" else f"With {stand_in} standing in"
        among = {True: "; BH is among them", False: "; BH is not among them", None: ""}[unbeaten.has_bh]
        sentences.append(
            f"{words}, of {unbeaten.n_compared} rules these are beaten by no other at any compared number of "
            f"experts (adjusted p below {SIGNIFICANCE_LEVEL:g}): {named}{among}."
        )
    return sentences


def left_out_sentences(field: Mapping[str, Any]) -> list[str]:
    """Which scores a comparison of rules is without, and why."""
    if not field:
        return []
    sentences = [
        f"`{name}` is left out: it has only {number} of the {field['n_own_items']} items of the "
        "model's own routing."
        for name, number in field["left_out"].items()
    ]
    if field["n_items"] < field["n_own_items"]:
        sentences.append(
            f"Compared are the {field['n_items']} of {field['n_own_items']} items that all the others have."
        )
    if field.get("n_other_inputs"):
        scores = amount(field["n_other_inputs"], "score")
        sentences.append(f"Left out: {scores} of documents whose input was not the model's own routing's.")
    return sentences


def answer_sentence(analysis: Mapping[str, Any]) -> str:
    """What the run says, in the first lines of the report."""
    if analysis["tasks"]:
        return task_sentence(analysis)
    of_field = field_sentences(analysis)
    if of_field:
        return " ".join(f"**{sentence}**" for sentence in of_field)
    return verdict_sentence(analysis)


def baseline_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What differences are to, where that is not the model's own routing."""
    base = analysis["baseline"]
    own_k = analysis["own_k"]
    if own_k is None:
        return [f"No row shows which configuration is the model's own Top-K; differences are to `{base}`."]
    if static_k(analysis["configurations"][base]) == own_k:
        return []
    return [f"Differences are to `{base}`; the model's own routing is Top-{own_k}."]


def name_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which static configurations are another Top-K than their names say."""
    sentences = []
    for name, config in analysis["configurations"].items():
        k = static_k(config)
        named = re.fullmatch(r"topk_(\d+)", name)
        if named and k is not None and int(named[1]) != k:
            own = ", the model's own routing" if k == analysis["own_k"] else ""
            sentences.append(f"`{name}` is Top-{k} on this model{own}, whatever its name says.")
    return sentences


MOST_FINDINGS = 30  # configurations that get a sentence each


def finding_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """One for each adaptive configuration; a difference in time is claimed only where it is significant."""
    base = analysis["baseline"]
    sentences = []
    again = analysis["noise_floor"]["inference_time_sec"]["median_ratio"]
    noise = "" if again is None else f"; the model's own routing against itself {again:.2f}"
    if len(analysis["statistical_tests"]) > MOST_FINDINGS:
        return [f"{len(analysis['statistical_tests'])} configurations are compared with `{base}` below."]
    for name, tests in analysis["statistical_tests"].items():
        experts = tests["avg_experts_per_token"]
        if not experts["n_pairs"] or static_k(analysis["configurations"][name]) is not None:
            continue
        saved = round(100 * (1 - experts["mean"] / experts["mean_baseline"]))
        compared = "within 1 % of"
        if saved:
            compared = f"{saved} % fewer than" if saved > 0 else f"{-saved} % more than"
        sentence = f"`{name}` ran {experts['mean']:.2f} experts per token and layer, {compared} `{base}`"
        clock = tests.get("inference_time_sec", {})
        if clock.get("median_ratio") is not None:
            claim = "which this run cannot tell from noise"
            if clock["significant"]:
                direction = "slower" if clock["mean_difference"] > 0 else "faster"
                claim = f"{direction} with adjusted p {show(clock, 'p_value_adjusted', 'p')}"
            ratio = f"{clock['median_ratio']:.2f} times the baseline's"
            sentence += f"; its inference time was {ratio} (median{noise}), {claim}"
        sentences.append(sentence + ".")
    return sentences


def reason_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which configurations have no test at equal compute, and why."""
    untested = {
        name: row for name, row in analysis["verdict"].items() if row["reason"] and not is_static(row)
    }
    return [f"`{name}` has no test at equal compute: {row['reason']}." for name, row in untested.items()]


def noise_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What the model's own routing differs from itself by: what any other difference must exceed."""
    sentences = []
    clock = analysis["noise_floor"]["inference_time_sec"]
    nll = analysis["noise_floor"]["nll"]
    if clock["n_pairs"]:
        interval = ""
        if clock["ci95_low"] is not None:
            interval = f", mean difference {show(clock, 'ci95', '+.4f to +.4f')} s (95 %)"
        sentences.append(f"Time: run twice, {clock['median_ratio']:.3f} times itself (median){interval}.")
    if nll["n_pairs"]:
        sentences.append(f"NLL: scored twice, mean difference {nll['mean_difference']:+.6f} nats per token.")
    return sentences


def shuffle_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Whether it matters which token gets many experts."""
    sentences = []
    for name, effect in analysis["shuffle_effects"].items():
        if effect["mean_difference"] is None:
            continue
        claim = "not shown to differ"
        if effect["significant"]:
            claim = "worse" if effect["mean_difference"] > 0 else "better"
        sentences.append(
            f"`{name}`, the counts of `{effect['unshuffled']}` given to other tokens: {claim}, "
            f"{show(effect, 'mean_difference', '+.4f')} nats per token (95 % interval "
            f"{show(effect, 'ci95', '+.4f to +.4f')}, adjusted p {show(effect, 'p_value_adjusted', 'p')})."
        )
    return sentences


MOST_TOKEN_KINDS = 3  # configurations whose kinds of tokens the report shows; all are in the analysis


def _kind_title(entry: Mapping[str, Any]) -> str:
    """The kind of token of an entry in words."""
    return KINDS_OF_TOKENS[entry["token_kind"]].title


def token_definitions() -> str:
    """What the kinds of tokens are."""
    text = "; ".join(f"{kind.title}: {kind.words}" for kind in KINDS_OF_TOKENS.values())
    return f"{text[0].upper()}{text[1:]}."


def token_source(analysis: Mapping[str, Any]) -> str:
    """Which texts the kinds of tokens were looked at in."""
    kinds = {entry["kind"] for entry in analysis["token_kinds"]}
    return "the scored text" if kinds == {"score"} else "the prompts and what was written after them"


def shown_token_kinds(analysis: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Configuration -> its entries of `compare_token_kinds`, for the first configurations."""
    by_config: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for entry in analysis["token_kinds"]:
        by_config[entry["configuration"]].append(entry)
    return dict(itertools.islice(by_config.items(), MOST_TOKEN_KINDS))


def token_kind_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which kinds of tokens get more experts than all others, and which fewer."""
    sentences = []
    for name, entries in shown_token_kinds(analysis).items():
        tested = [entry for entry in entries if entry["significant"] is not None]
        if not tested:
            continue
        entries = sorted(tested, key=lambda entry: -entry["mean_difference"])
        more = [entry for entry in entries if entry["significant"] and entry["mean_difference"] > 0]
        fewer = [entry for entry in entries[::-1] if entry["significant"] and entry["mean_difference"] < 0]
        parts = []
        for word, group in (("more experts than other tokens get", more), ("fewer get", fewer)):
            if group:
                kinds = [f"{_kind_title(entry)} ({entry['mean_difference']:+.2f})" for entry in group]
                parts.append(f"{word} {', '.join(kinds)}")
        undecided = [_kind_title(entry) for entry in entries if not entry["significant"]]
        if undecided:
            parts.append(f"not shown to differ: {', '.join(undecided)}")
        sentences.append(f"Under `{name}`, {'; '.join(parts)}.")
    return sentences


# Student's interval holds what it says for symmetric differences, however long their tails, and with enough
# units for skewed ones.
# Simulated with documents of 1 to 10 items, 95 % intervals hold the mean so often (the tests redo it):
#   units                       6     12     30     50    100
#   t with 3 degrees         .937   .945   .945   .949   .955
#   lognormal, sigma 0.5     .906   .916   .929   .937   .941    skewness 1.7
#   lognormal, sigma 1       .855   .872   .892   .904   .920    skewness 6.2
INTERVALS_HOLD_FROM = 50  # independent units: from here on 93 to 97 %, unless the skew is strong


def few_units_sentence(tests: Iterable[Mapping[str, Any]]) -> str:
    """What to think of the intervals of a table, its tests, when they are over few units; empty where they
    hold."""
    units = [test["n_units"] for test in tests if test.get("ci95_low") is not None]
    if not units or min(units) >= INTERVALS_HOLD_FROM:
        return ""
    return (
        f"Intervals over fewer than {INTERVALS_HOLD_FROM} independent units (here as few as {min(units)}) "
        "are too narrow when differences are skewed: in simulations they hold the mean in 90 to 93 % "
        "instead of 95 %, in 85 to 90 % when a few units decide it."
    )


def null_origin(diagnostics: Mapping[str, Any]) -> str:
    """Whether the nulls are judged on what they were made from; results of older scripts do not say."""
    shared = diagnostics.get("n_shared_tokens")
    if shared is None:
        return "of which it is not known whether they were used for calibration"
    if shared == 0:
        return "not used for calibration"
    return f"of which {shared} were used for calibration as well (there the nulls look better than they are)"


def calibration_sentence(diagnostics: Mapping[str, Any]) -> str:
    """What the empirical null was calibrated on; results of older scripts do not say."""
    words = diagnostics.get("calibrated_on")
    return f"Calibrated on {markdown_text(words)}." if words else ""


def text_sentences(scores: pd.DataFrame) -> list[str]:
    """What text was scored: what it is where none was named, and what else was scored and does not count."""
    sentences = []
    for category in distinct(scores["category"][scores["source"] == "text"]):
        if category in DEFAULT_TEXTS:
            sentences.append(f"The scored text: {DEFAULT_TEXTS[category]}.")
    others = len(scores["item_id"].unique()) - len(deciding_scores(scores)["item_id"].unique())
    if others:
        sentences.append(
            f"The references of {amount(others, 'prompt')} were scored too, in `text_scores.csv`; the tests "
            "are about the text alone."
        )
    return sentences


def null_distances(diagnostics: Mapping[str, Any]) -> str:
    """How far the p-values of each null are from uniform, by layer."""
    return "; ".join(
        f"{name}: {', '.join(f'{distance:.3f}' for distance in null['ks'])}"
        for name, null in diagnostics.get("nulls", {}).items()
    )


def clock_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which configurations were faster or slower, where that is significant."""
    base = analysis["baseline"]
    clocks = {
        name: tests["inference_time_sec"]
        for name, tests in analysis["statistical_tests"].items()
        if tests.get("inference_time_sec", {}).get("n_pairs")
    }
    differing = {name: test for name, test in clocks.items() if test["significant"]}
    faster = [name for name, test in differing.items() if test["mean_difference"] < 0]
    slower = [name for name, test in differing.items() if test["mean_difference"] > 0]
    sentences = []
    if faster:
        sentences.append(f"Faster than `{base}` on this machine: {names_of(faster)}.")
    if slower:
        sentences.append(f"Slower than `{base}` on this machine: {names_of(slower)}.")
    if clocks and not differing:
        sentences.append(
            f"No configuration was significantly faster or slower than `{base}` on this machine."
        )
    return sentences


def may_adapt(config: Config) -> bool:
    """Whether a configuration can give tokens different numbers of experts at all."""
    rule = RULES.get(config.get("method"))
    return rule is not None and not rule.is_static and config["min_k"] != config["max_k"]


def constancy_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Adaptive configurations that gave every token in every layer the same number of experts."""
    sentences = []
    for name, summary in analysis["summary_by_config"].items():
        spread = summary["avg_experts_per_token"]
        is_same_between_texts = spread["n"] > 1 and spread["min"] == spread["max"]
        is_same_within_texts = summary[SPREAD]["max"] == 0  # None where the table is of a script without it
        config = analysis["configurations"][name]
        if may_adapt(config) and is_same_between_texts and is_same_within_texts:
            advice = f"choose another `{RULES[config['method']].knob.name}`"
            if config.get("p_values") == "softmax":
                advice = "with `p_values` = softmax that is certain (see `SoftmaxNull` in the script)"
            mean = f"{spread['mean']:.2f}"
            sentences.append(f"`{name}` ran {mean} experts everywhere: it does not adapt; {advice}.")
    return sentences


def hypothesis_sentences(analysis: Mapping[str, Any]) -> list[str]:
    held = [item["held"] for item in analysis["hypotheses"] if item["held"] is not None]
    return [f"{sum(held)} of {len(held)} measured expectations of the earlier attempt held."] if held else []


def quality_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """Which configurations are better or worse at equal compute, and which are equivalent to the baseline."""
    verdicts = analysis["verdict"]
    sentences = []
    for word in ("better", "worse"):
        names = [name for name, row in verdicts.items() if row["verdict"] == word]
        if names:
            sentences.append(f"{word.capitalize()} than static Top-K at equal compute: {names_of(names)}.")
    equivalent = [
        name for name, row in verdicts.items() if not is_static(row) and row["equivalent_to_baseline"]
    ]
    if equivalent:
        margin = 100 * math.expm1(analysis["quality_margin"])
        within = f"Within {margin:.0f} % of `{analysis['baseline']}`'s perplexity (equivalence test)"
        sentences.append(f"{within}: {names_of(equivalent)}.")
    return sentences


def amount_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """What so few prompts can show."""
    prompts = analysis["n_prompts"]
    if 0 < prompts < 30:
        return [f"So few prompts ({prompts}) show large effects only; small ones need more."]
    return []


def machine(row: Row) -> str:
    """Precision and device of a measured row."""
    return f"{show(row, 'dtype')} on {show(row, 'device')}"


def scored_words(results: Results, analysis: Mapping[str, Any]) -> str:
    """How much text was scored, and under what: what was asked for, and the static curve beside it."""
    deciding = deciding_scores(results.scores)
    documents = amount(documents_of(deciding[deciding["status"] == "ok"]).nunique(), "document")
    names = distinct(results.scores["config_name"])
    asked = distinct(results.generation["config_name"])
    static = [name for name in names if static_k(analysis["configurations"][name]) is not None]
    added = [name for name in static if name not in asked]
    under = f"{len(static)} of them static Top-K"
    if asked and added:
        under = f"the same {len(names) - len(added)} and {len(added)} of static Top-K beside them"
    return f"the text of {documents} scored under {amount(len(names), 'configuration')}, {under}"


def subject_sentence(results: Results, analysis: Mapping[str, Any]) -> str:
    """What was run, how much of it, and how much of that failed."""
    done = results.finished()
    first = getattr(done, main_kind(done)).iloc[0]
    amounts = []
    if len(done.generation):
        names = amount(results.generation["config_name"].nunique(), "configuration")
        prompts = amount(done.generation["prompt_id"].nunique(), "prompt")
        tokens = ""
        if not pd.isna(first["max_new_tokens"]):
            tokens = f" with {amount(int(first['max_new_tokens']), 'new token')} each"
        took = duration(done.generation["inference_time_sec"].sum())
        amounts.append(f"{names} x {prompts}{tokens}, {took} of inference")
    if len(done.scores):
        amounts.append(scored_words(results, analysis))
    if len(done.tasks):
        names = amount(results.tasks["config_name"].nunique(), "configuration")
        documents = amount(done.tasks["document"].nunique(), "document")
        amounts.append(f"{names} x {documents} of tasks")
    failed = ""
    if analysis["n_failed"]:
        failed = f" {analysis['n_failed']} of {analysis['n_rows']} rows failed and are left out."
    return f"{show(first, 'model_name')}, {machine(first)}: {'; '.join(amounts)}.{failed}"


def suite_time_sentence(results: Results) -> str:
    """How long the generation took, beside what was expected of it; empty where nothing was generated."""
    done = results.finished().generation
    if not len(done):
        return ""
    took = duration(done["inference_time_sec"].sum())
    expected = [
        f"{low} to {high} minutes on {where}" for where, (low, high) in EXPECTED_SUITE_MINUTES.items()
    ]
    return (
        f"Suite time: {took} of inference here, {machine(done.iloc[0])}; expected for OLMoE-1B-7B: "
        f"{'; '.join(expected)}."
    )


def scaled(number: float | None, units: Sequence[str], digits: int = 2) -> str:
    """A number with the unit that keeps it short, each unit a thousand times the one before; empty for
    None."""
    if number is None:
        return ""
    place = 0
    while number >= 999.5 and place < len(units) - 1:
        number /= 1000
        place += 1
    return f"{number:.{digits}f} {units[place]}".strip()


PARAMETERS = ("", "k", "M", "B")  # as models are named: 1.28 B of 6.92 B
FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
BYTES = ("B", "kB", "MB", "GB", "TB")


def cost_sentence(analysis: Mapping[str, Any]) -> str:
    """What a token costs the model under the baseline; the report's table has the others. Empty for results
    that do not say it."""
    baseline = analysis["baseline"]
    entry = analysis["compute"].get(baseline)
    if entry is None:
        return ""
    active = scaled(entry["active_parameters"], PARAMETERS)
    total = scaled(entry["total_parameters"], PARAMETERS)
    flops = scaled(entry["expert_flops_per_token"], FLOPS)
    read = scaled(entry["weight_bytes_per_token"], BYTES)
    decoded = f", and {read} of weights are read to decode one" if read else ""
    return (
        f"A token under `{baseline}` uses {active} of {total} parameters and {flops} in its experts{decoded}."
    )


CONCLUSIONS: tuple[Callable[[Mapping[str, Any]], list[str]], ...] = (
    quality_sentences,
    clock_sentences,
    constancy_sentences,
    hypothesis_sentences,
    amount_sentences,
)


# Rows of the report's tables, from the analysis


def quality_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, verdict in analysis["verdict"].items():
        left_out = f" ({verdict['n_left_out']} left out)" if verdict["n_left_out"] else ""
        shown = {"configuration": name, "items": f"{verdict['n_items']}{left_out}"}
        word = "static" if is_static(verdict) else verdict["verdict"]
        rows.append(verdict | shown | {"verdict": word})
    return rows


def significance(test: Mapping[str, Any]) -> bool | str | None:
    """Whether a test is significant; where it has nothing to say the reason, if there is one."""
    return test.get("reason") if test.get("significant") is None else test["significant"]


def task_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for entry in analysis["tasks"]:
        numbers = []
        for key, number in entry.get("harness", {}).items():
            stderr = number["stderr"]
            spread = f" ± {stderr:.4f}" if isinstance(stderr, (int, float)) else ""
            numbers.append(f"{key.removesuffix(',none')} {number['value']:.4f}{spread}")
        shown = {"numbers": ", ".join(numbers), "is_significant": significance(entry)}
        rows.append({"n_documents": entry.get("n_pairs")} | entry | shown)
    return rows


def middle_of(experts: Sequence[int]) -> int | None:
    """The number of experts that a league is sorted by."""
    return experts[len(experts) // 2] if experts else None


def league_key(experts: float | None) -> str:
    """The entry of `league_rows` for a number of experts; of none, one that no row has."""
    return "" if experts is None else f"at_{experts:g}"


def league_rows(field: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ladder of `compare_field`, those with the same stand-in together, the best of them first."""
    sign = field.get("sign", 1)
    middle = middle_of(field["experts"])
    rows = []
    for ladder in field["ladders"]:
        at = {float(experts): differences for experts, differences in ladder["at"].items()}
        row = {"label": ladder["label"], "stand_in": ladder["stand_in"]}
        row |= {"span_low": ladder["low"], "span_high": ladder["high"]}
        for experts, differences in at.items():
            if differences["to_static"] is not None:
                row[league_key(experts)] = sign * differences["to_static"] + 0.0  # never shown as -0.0000
        if middle in at:
            row["to_best"] = sign * at[middle]["to_best"] + 0.0
        for key, margin in (("1", "1 %"), ("05", "0.5 %")):
            within = ladder["within"].get(margin, {})
            row |= {f"within_{key}": within.get("fewest")}
            row |= {f"ci95_{key}_low": within.get("ci95_low"), f"ci95_{key}_high": within.get("ci95_high")}
        row["beaten_by"] = f"{len(ladder['beaten_by'])} of these" if ladder["beaten_by"] else "none"
        if ladder["is_bound"]:
            row["beaten_by"] = "a bound"
        rows.append(row)
    stand_ins = in_order(row["stand_in"] for row in rows)

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        to_static = row.get(league_key(middle))
        loss = math.inf if to_static is None else sign * to_static
        return stand_ins.index(row["stand_in"]), loss

    return sorted(rows, key=order)


def league_table(field: Mapping[str, Any]) -> str:
    """Markdown of `league_rows`; its columns of numbers of experts are those that the ladders reach."""
    if not field:
        return ""
    columns = REPORT_TABLES["league"]
    at = [ReportColumn(f"at {number:g}", league_key(number), "+.4f") for number in field["experts"]]
    middle = middle_of(field["experts"])
    if middle is not None:
        at.append(ReportColumn(f"to the best at {middle:g}", "to_best", "+.4f"))
    return markdown_table(league_rows(field), (*columns[:2], *at, *columns[2:]))


def null_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    nulls = (analysis["null_diagnostics"] or {}).get("nulls", {})
    return [{"null": name, **row} for name, null in nulls.items() for row in null["alphas"]]


def compute_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, entry in analysis["compute"].items():
        shown = {
            "configuration": name,
            "active": scaled(entry["active_parameters"], PARAMETERS),
            "of_experts": scaled(entry["active_expert_parameters"], PARAMETERS),
            "flops": scaled(entry["expert_flops_per_token"], FLOPS),
            "read": scaled(entry["weight_bytes_per_token"], BYTES),
        }
        rows.append(entry | shown)
    return rows


def phase_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """None where nothing was generated."""
    rows = []
    for name, entry in analysis["compute"].items():
        if entry["prefill_experts"] is not None:
            row = {"configuration": name}
            row |= {column: entry[column] for column in ("prefill_experts", "decode_experts")}
            for phase in ("prefill", "decode"):
                seconds = entry[f"{phase}_sec"]
                row[f"{phase}_ms"] = None if seconds is None else 1000 * seconds
            rows.append(row)
    return rows


def layer_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, layers in analysis["layers"].items():
        shown = {"configuration": name}
        for end in ("fewest", "most"):
            shown[end] = f"{layers[f'{end}_experts']:.2f} ({layers[f'{end}_in_layer']})"
        p_values = layers["category_p_values"]
        if p_values:
            diverging = sum(p < SIGNIFICANCE_LEVEL for p in p_values)
            shown["diverging"] = f"{diverging} of {len(p_values)}"
        rows.append(layers | shown)
    return rows


def token_kind_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for entries in shown_token_kinds(analysis).values():
        for entry in entries:
            shown = {"words": _kind_title(entry), "is_significant": significance(entry)}
            rows.append({**entry, **shown})
    return rows


def summary_rows(analysis: Mapping[str, Any], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """rows: of the table that the summary is about."""
    summaries = []
    for name, own in rows.groupby("config_name", sort=False):
        summary = analysis["summary_by_config"][name]
        experts = summary["avg_experts_per_token"]
        spread = f" ± {show(experts, 'std', '.2f')}" if experts["n"] > 1 else ""
        means = {metric: values["mean"] for metric, values in summary.items()}
        medians = {metric: values["median"] for metric, values in summary.items()}
        decode = medians.get("decode_sec_per_token")
        shares = own[["floor_frac", "cap_frac", "zero_rejection_frac"]].mean()
        summaries.append(
            {
                **means,
                **shares,
                "configuration": name,
                "experts": f"{show(experts, 'mean', '.2f')}{spread}",
                "range_low": own["min_experts"].min(),
                "range_high": own["max_experts"].max(),
                "inference_time_sec": medians.get("inference_time_sec"),
                "decode_ms": None if decode is None else 1000 * decode,
            }
        )
    return summaries


def test_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = GENERATION.metrics | SCORES.metrics
    rows = []
    for name, tests in analysis["statistical_tests"].items():
        for column, test in tests.items():
            if test["n_pairs"]:
                metric = metrics[column]
                form = f".{metric.digits + 1}f"
                shown = {
                    "configuration": name,
                    "title": f"{metric.title}, {metric.unit}" if metric.unit else metric.title,
                    "difference": show(test, "mean_difference", form),
                    "interval": show(test, "ci95", f"{form} to {form}"),
                    "is_significant": significance(test),
                }
                rows.append(test | shown)
    return rows


def expected_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for item in analysis["hypotheses"]:
        if item["configuration"] not in analysis["summary_by_config"]:
            continue
        low = item["low"]
        high = item["high"]
        expected = f"{low:g} to {high:g}" if low and high else f"> {low:g}" if low else f"< {high:g}"
        form = "p" if item["quantity"] == "experts_p_value" else ".2f"
        shown = {
            "title": QUANTITIES[item["quantity"]],
            "expected": expected,
            "measured": show(item, "measured", form),
            "verdict": "not measured" if item["held"] is None else item["held"],
        }
        rows.append(item | shown)
    return rows


def detail_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, config in analysis["configurations"].items():
        settings = {field: value for field, value in config.items() if field != "method"}
        shown = ", ".join(f"{field} = {value}" for field, value in settings.items())
        rows.append({"configuration": name, "method": config.get("method"), "settings": shown})
    return rows


def category_table(analysis: Mapping[str, Any], names: Sequence[str]) -> str:
    """Mean experts by category and configuration, as a table; the more numerous of the two are its rows."""
    by_category = analysis["summary_by_category"]
    means = pd.DataFrame(
        [
            [by_name[name]["avg_experts_per_token"]["mean"] if name in by_name else None for name in names]
            for by_name in by_category.values()
        ],
        index=[markdown_text(category) for category in by_category],
        columns=[f"`{name}`" for name in names],
    )
    corner = "category"
    if len(names) > len(by_category):
        means = means.T
        corner = "configuration"
    columns = [ReportColumn(corner, "label", "s")]
    columns += [ReportColumn(title, str(place), ".2f") for place, title in enumerate(means.columns)]
    rows = []
    for label, values in zip(means.index, means.to_numpy(float), strict=True):
        rows.append({"label": label} | {str(place): value for place, value in enumerate(values)})
    return markdown_table(rows, columns)


def setting_rows(results: Results) -> list[dict[str, Any]]:
    """What all rows have in common; a setting that none of them has is left out."""
    rows = []
    for name in ("max_new_tokens", "sampling", *(column.name for column in _ORIGIN)):
        if name not in ("timestamp", "method", "configuration", "input_hash"):
            values = [value for frame in results if name in frame for value in frame[name].dropna().unique()]
            shown = distinct(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            if any(shown):
                rows.append({"setting": name, "value": ", ".join(shown)})
    return rows


def failure_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for kind, frame in zip(KINDS, results, strict=True):
        for row in frame[frame["status"] != "ok"].to_dict("records"):
            item = row[KINDS[kind].items.item] or row[KINDS[kind].items.category]
            rows.append({"configuration": row["config_name"], "item": item, "error": row["error"]})
    batches = results.throughput[results.throughput["status"] != "ok"]
    for row in batches.to_dict("records"):
        item = f"batch of {row['batch_size']}"
        rows.append({"configuration": row["config_name"], "item": item, "error": row["error"]})
    return rows


REPORT_TEMPLATE = """\
# BH routing against Top-K: report

## Executive summary

{{ answer }}

{{ subject }}

{% if first_plot %}
![{{ first_plot.title }}](plots/{{ first_plot.name }}.png)

{% endif %}
{{ bullets(findings) }}

{% if tasks %}
## Downstream tasks

{{ table("tasks", tasks) }}

The harness's own numbers are as lm-evaluation-harness reports them, also in `task_results.json`. Score: \
the first of them that is a mean over documents; for a perplexity, bits per byte (or word) of a document, \
lower is better. Difference: to `{{ baseline }}`, paired by document; interval and p: Student's t, \
adjusted over all rows of this table; d: mean difference over its standard deviation; significant: \
adjusted p below {{ level }}.

{{ bullets(other_inputs) }}

{{ few_units(tasks) }}
{% endif %}

{% for task, (metric, league, left_out) in task_leagues.items() %}
### Every rule on {{ task }}

{{ bullets(left_out) }}

{{ league }}

At: {{ metric }} minus static Top-K's at so many experts, a mean over documents; a curve is interpolated and \
never extrapolated. Beaten by: rules with the same stand-in that are better at some compared number of \
experts, paired by document, p adjusted over all pairs.

{% endfor %}
{% if quality %}
## Quality at equal compute

NLL in nats per token of the scored text (reference continuations, or the windows of `--text`), a mean \
over items. *At equal compute*: minus that of static Top-K mixed to the same mean number of experts on the \
same items. Intervals and p: Student's t on paired differences of documents, p BH-adjusted over the \
configurations; verdict: better or worse if and only if the adjusted p is below {{ level }}; static: the \
same Top-K in every layer, the curve that all others are compared with. Detectable: the smallest effect \
found with 80 % power. Equivalent: two one-sided t-tests against `{{ baseline }}` \
within {{ margin }} of perplexity, adjusted likewise. KL: from the predictions of the model's own routing, \
nats.

{{ bullets(scored_text) }}

{{ table("quality", quality) }}

{{ bullets(untested) }}

{{ few_units(quality) }}

{% if field or league %}
### Every rule

{{ bullets(field) }}

{{ league }}

A rule at several values of its knob is a curve, interpolated and never extrapolated. Numbers of experts \
are effective ones: kept, and for each dropped one of the model's own Top-K what stands in for it costs. \
At: NLL minus static Top-K's at so many experts. Within: the fewest experts at which the perplexity stays \
within so much of the model's own (two one-sided t-tests), and where the ends of the 95 % interval of the \
difference cross that margin. Rules are compared at every eighth of the model's own K that both reach; \
beaten by: rules with the same stand-in that are better at one of them, p adjusted over all pairs. The \
oracle runs every expert: it is a bound, not a rule.
{% endif %}

{% if noise %}
Noise floor, the model's own routing against itself:

{{ bullets(noise) }}
{% endif %}

{% if shuffles %}
Does it matter which token gets many experts?

{{ bullets(shuffles) }}

{{ few_units(shuffled) if few_units(shuffled) != few_units(quality) }}
{% endif %}
{% endif %}

{% if nulls %}
## Calibration of the nulls

An expert counts as *irrelevant* for a token when the model's own Top-K leaves it out. On {{ \
diagnostics.n_tokens }} tokens of the scored text, {{ null_origin }}, the p-values of such pairs should be \
uniform, and BH at alpha should reject at most a share alpha of them. FDR bounds experts picked though \
irrelevant in this sense; it promises nothing about quality. {{ calibrated_on }} Before floor and cap:

{{ table("nulls", nulls) }}

Kolmogorov-Smirnov distance from uniform, by layer: {{ distances }}.
{% endif %}

## Summary by configuration

{{ table("summary", summary) }}

Experts: mean and standard deviation over {{ item }}s of the mean over tokens and layers; range: fewest and \
most experts that any token got in any layer. At floor, at cap, no rejection: of the rules that have them, \
shares of the (token, layer) decisions of a {{ item }}, a mean over {{ item }}s.{% if is_timed %} Times are \
medians over prompts.{% endif %}

{% if compute %}
## Compute

{{ table("compute", compute) }}

By the shapes of the model's own parameters, {{ total_parameters }} in all, a tied tensor once. Active: all \
but the routed experts that did not run, embedding tables in full. Of experts: routed ones; shared ones \
count with the rest. FLOPs of the routed experts: 2 for each multiply-add. Read to decode a token: active \
parameters at their precision, of an embedding table one row. Allowed: times as fast as `{{ baseline }}` if \
reading weights were all that takes time. Measured: from the median over prompts of the ratio of their \
decode times. A model that fits into caches, or is small beside what each step costs anyway, gains less.

{% if phases %}
{{ table("phases", phases) }}

Prefill: all tokens of the prompt at once, until the first new token; decoding: the others, one by one. \
Times are medians over prompts.
{% endif %}

{% if throughput %}
### Throughput of a batch

{{ table("throughput", throughput) }}

New tokens a second, prefill included: at batch size 1 the median over prompts, at a larger one that of {{ \
repeats }} runs of one batch, configurations in turns; and as a multiple of `{{ baseline }}`'s at the same \
batch size. Allowed: by the bytes of weights that a decoding step reads, of every expert which some text of \
the batch uses. What stands in for a dropped expert is counted by its share of an expert at batch size 1, \
and not at a larger one. Prompts are padded on the left; padding is not counted.
{% endif %}
{% endif %}

{% if layers %}
## Layers

{{ table("layers", layers) }}

Means over layers, from `layer_statistics.csv`; every expert is in `expert_usage.csv`.{% if diverging %} \
Categories diverge: Jensen-Shannon divergence of their use of experts (0: the same experts), and in how many \
layers it is more than chance (permutation test, adjusted p below {{ level }}).{% endif %}

{% endif %}

{% if token_kinds %}
## Which tokens get many experts

{{ bullets(token_findings) }}

{{ table("token_kinds", token_kinds) }}

Of {{ token_source }}. In each document, the mean over tokens and layers of how many experts ran for tokens \
of this kind minus that for all other tokens; Student's interval over the documents that have both, a prompt \
being its own; p BH-adjusted over all {{ n_token_tests }} such tests of this run (all are in \
`analysis_summary.json`). {{ token_definitions }} Every token is in `token_counts.csv`.

{{ few_units(token_kinds) }}
{% endif %}

## Statistical tests

{% if tests %}
Each configuration against `{{ baseline }}`, paired by {{ item }}. Interval and p: Student's t on the \
differences of documents (a prompt is its own). Adjusted: Benjamini-Hochberg over all tests of this table. \
d: mean difference over its standard deviation. Significant: adjusted p below {{ level }}. A difference in \
experts says that the rule did something, not that it did good.

{{ table("tests", tests) }}

{{ few_units(tests) }}
{% elif tasks %}
Tasks are compared one by one, in the table of downstream tasks.
{% else %}
There is nothing to compare: no {{ item }} was measured under `{{ baseline }}` and another configuration.
{% endif %}

## Performance by category

Mean experts per token and layer.

{{ category_table }}

## Plots

{{ bullets(undrawn) }}

{% for name, title in plots %}
### {{ title }}

![{{ title }}](plots/{{ name }}.png)

{% else %}
{{ "No further plot lies" if first_plot else "No plot lies" }} beside this report.

{% endfor %}

## What was expected, and what was measured

An earlier attempt wrote these expectations down for OLMoE-1B-7B-0924 without measuring them. Measured \
here on {{ model }}.

{% if expected %}
{{ table("expected", expected) }}
{% else %}
This run has no configuration of theirs.
{% endif %}

{{ suite_time }}

## Conclusions and recommendations

{{ bullets(conclusions) or "This run supports no conclusion beyond its tables." }}

## Configuration details

{{ table("details", details) }}

{{ table("settings", settings) if settings }}

{% if failures %}
## Failed experiments

{{ table("failures", failures) }}
{% endif %}
"""


FIRST_PLOT = "quality_vs_experts"  # stands with the answer; the others have a section


def report_context(
    results: Results, analysis: Mapping[str, Any], folder: Path, failed_plots: Mapping[str, str]
) -> dict[str, Any]:
    """What the template is filled with; every number is from the results or the analysis."""
    done = results.finished()
    kind = main_kind(done)
    measured = getattr(done, kind)
    layers = layer_rows(analysis)
    diagnostics = analysis["null_diagnostics"] or {}
    drawn = [name for name in PLOTS if (folder / "plots" / f"{name}.png").exists()]
    first = FIRST_PLOT if FIRST_PLOT in drawn else None
    return {
        "answer": answer_sentence(analysis),
        "subject": subject_sentence(results, analysis),
        "item": KINDS[kind].items.word,
        "is_timed": kind == "generation",
        "findings": [*name_sentences(analysis), *baseline_sentences(analysis), *finding_sentences(analysis)],
        "tasks": task_rows(analysis),
        "quality": quality_rows(analysis),
        "other_inputs": other_input_sentences(analysis),
        "field": [*field_sentences(analysis), *left_out_sentences(analysis["field"])],
        "league": league_table(analysis["field"]),
        "task_leagues": {
            markdown_text(task): (
                markdown_text(field["metric"]),
                league_table(field),
                left_out_sentences(field),
            )
            for task, field in analysis["task_fields"].items()
        },
        "scored_text": text_sentences(results.scores),
        "untested": reason_sentences(analysis),
        "noise": noise_sentences(analysis),
        "shuffles": shuffle_sentences(analysis),
        "shuffled": list(analysis["shuffle_effects"].values()),
        "nulls": null_rows(analysis),
        "diagnostics": diagnostics,
        "null_origin": null_origin(diagnostics),
        "calibrated_on": calibration_sentence(diagnostics),
        "distances": null_distances(diagnostics),
        "summary": summary_rows(analysis, measured),
        "compute": compute_rows(analysis),
        "total_parameters": next(
            (scaled(entry["total_parameters"], PARAMETERS) for entry in analysis["compute"].values()), ""
        ),
        "phases": phase_rows(analysis),
        "throughput": analysis["throughput"],
        "repeats": next((int(number) for number in results.throughput["repeats"].dropna()), 0),
        "layers": layers,
        "diverging": any("diverging" in row for row in layers),
        "token_kinds": token_kind_rows(analysis),
        "token_findings": token_kind_sentences(analysis),
        "token_source": token_source(analysis),
        "token_definitions": token_definitions(),
        "n_token_tests": len(analysis["token_kinds"]),
        "tests": test_rows(analysis),
        "category_table": category_table(analysis, distinct(measured["config_name"])),
        "undrawn": [
            f"`{name}` could not be drawn: {markdown_text(why)}" for name, why in failed_plots.items()
        ],
        "first_plot": {"name": first, "title": PLOTS[first].title} if first else None,
        "plots": [(name, PLOTS[name].title) for name in drawn if name != first],
        "expected": expected_rows(analysis),
        "suite_time": suite_time_sentence(results),
        "conclusions": [sentence for conclude in CONCLUSIONS for sentence in conclude(analysis)],
        "details": detail_rows(analysis),
        "settings": setting_rows(results),
        "failures": failure_rows(results),
        "baseline": analysis["baseline"],
        "model": show(measured.iloc[0], "model_name"),
        "level": f"{SIGNIFICANCE_LEVEL:g}",
        "margin": f"{100 * math.expm1(analysis['quality_margin']):.0f} %",
        "few_units": few_units_sentence,
    }


def report_text(
    results: Results, analysis: Mapping[str, Any], folder: Path, failed_plots: Mapping[str, str]
) -> str:
    """The text of REPORT.md in `folder`; see `generate_markdown_report`."""
    context = report_context(results, analysis, folder, failed_plots)
    return render_markdown(REPORT_TEMPLATE, context, REPORT_TABLES)


def generate_markdown_report(
    df: pd.DataFrame,
    analysis: Mapping[str, Any],
    output_path: str | Path,
    failed_plots: Mapping[str, str] | None = None,
) -> Path:
    """Write REPORT.md from what `analyze_results` returned for `df`; it links the plots beside it.

    failed_plots: plot -> why it could not be drawn, to be named.
    """
    path = Path(output_path)
    results = results_beside(df, path.parent)
    write_whole(path, report_text(results, analysis, path.parent, failed_plots or {}))
    return path


# The report as a page


PLOT_PIXELS = 1600  # width of a plot in the page: sharp on a screen of twice the usual density
LONGEST_TEXT = 4000  # characters of a text of others that the page shows; the tables of the run have it whole
SHORT_CELL = 36  # characters of a cell that stay on one line
SHORT_CODE = 24  # and of a name in a sentence
FRAGMENTS_BEFORE = "summary-by-configuration"  # heading of the page that further fragments stand before
PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
PAGE_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --text: #1d2430; --soft: #5b6472; --page: #fff; --card: #f5f6f8; --line: #d9dde3; --accent: #0b6aa8;
  --better: #0173b2; --worse: #b34a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e3e6ea; --soft: #a2abb8; --page: #15181d; --card: #1f242b; --line: #363d47; --accent: #6cb6ea;
    --better: #67b7ee; --worse: #f39a5b;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
nav {
  position: sticky; top: 0; z-index: 3; overflow-x: auto; padding: .55rem 1.2rem;
  background: var(--page); border-bottom: 1px solid var(--line); font-size: .85rem;
}
nav a { display: inline-block; margin-right: 1.1rem; color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--accent); text-decoration: underline; }
main { max-width: 76rem; margin: 0 auto; padding: .5rem 1.2rem 4rem; }
main > p, main > ul { max-width: 52rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .5rem; }
h1 + h2 { border: 0; margin-top: 0; padding-top: 0; font-size: 1rem; color: var(--soft); }
h1 + h2 + p { padding: .9rem 1.1rem; background: var(--card); border-left: 4px solid var(--accent); }
h1 + h2 + p strong { font-weight: 600; }
strong code { font-weight: inherit; }
ul { padding-left: 1.2rem; }
code {
  font: .88em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; overflow-wrap: anywhere;
}
.table {
  overflow: auto; width: fit-content; max-width: 100%; max-height: 80vh; margin: .9rem 0;
  border: 1px solid var(--line); border-radius: 6px;
}
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; line-height: 1.35; }
th, td {
  padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  unicode-bidi: isolate; font-variant-numeric: tabular-nums;
}
th {
  position: sticky; top: 0; z-index: 1; background: var(--card); font-weight: 600; vertical-align: bottom;
}
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
th:first-child { z-index: 2; }
td { max-width: 36rem; overflow-wrap: anywhere; }
td:first-child { max-width: 15rem; overflow-wrap: break-word; }
.table code { overflow-wrap: inherit; }
.short { white-space: nowrap; }
.number { text-align: right; }
tbody tr:last-child td { border-bottom: 0; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.undecided, .static { color: var(--soft); }
figure { margin: 1rem 0; max-width: 56rem; overflow-x: auto; }
figure img {
  display: block; max-width: 100%; height: auto; padding: .7rem; background: #fff; border-radius: 6px;
  border: 1px solid var(--line);
}
@media (prefers-color-scheme: dark) { figure img { filter: brightness(.93); } }
@media (max-width: 40rem) {
  main { padding: .3rem .8rem 3rem; }
  nav { padding: .5rem .8rem; white-space: nowrap; }
  table { font-size: .78rem; }
  th, td { padding: .3rem .5rem; }
  td:first-child, th:first-child { max-width: 8.5rem; }
  td:first-child, td:first-child .short { white-space: normal; }
  figure img { padding: .25rem; max-width: none; width: max(100%, 36rem); }
}
@media print {
  :root {
    --text: #000; --soft: #444; --page: #fff; --card: #f3f3f3; --line: #bbb; --accent: #0b6aa8;
    --better: #0173b2; --worse: #b34a00;
  }
  @page { size: A4 landscape; margin: 12mm; }
  nav { display: none; }
  body { font-size: 10pt; }
  main, main > p, main > ul { max-width: none; }
  main { padding: 0; }
  .table { overflow: visible; max-height: none; border: 0; }
  table { font-size: 7.2pt; }
  th, td { padding: 2pt 4pt; position: static !important; }
  .short { white-space: normal; overflow-wrap: normal; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  figure { max-width: none; overflow: visible; }
  figure img { max-height: 165mm; max-width: 100%; width: auto; border: 0; padding: 0; filter: none; }
}
</style>
</head>
<body>
<nav aria-label="Contents">
{% for id, heading in contents %}
<a href="#{{ id }}">{{ heading|safe }}</a>
{% endfor %}
</nav>
<main>
{{ content|safe }}
</main>
</body>
</html>
"""


def plot_data_url(path: Path) -> tuple[str, int, int]:
    """A plot as a data URL of PNG, no wider than PLOT_PIXELS and in 256 colours; its width and height."""
    with pil_image.open(path) as image:
        plot = image.convert("RGB")
    if plot.width > PLOT_PIXELS:
        plot = plot.resize((PLOT_PIXELS, max(1, round(plot.height * PLOT_PIXELS / plot.width))))
    stored = io.BytesIO()
    plot.quantize(256, dither=0).save(stored, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}", plot.width, plot.height


class _PageParts:
    """How the page shows what Markdown says: no HTML of a text, no link, no image but the run's own plots."""

    def __init__(self, plots_folder: Path):
        self._plots = {f"plots/{name}.png": plots_folder / f"{name}.png" for name in PLOTS}
        self._parser = markdown_it.MarkdownIt("commonmark", {"html": False})
        self._parser.enable("table").disable(["link", "autolink", "reference", "html_block", "html_inline"])
        self._parser.renderer.rules |= {
            "text": self._text,
            "code_inline": self._code,
            "image": self._image,
            "heading_open": self._heading,
            "th_open": self._cell,
            "td_open": self._cell,
            "table_open": self._table,
            "table_close": self._table_end,
        }
        self._headings: collections.Counter[str] = collections.Counter()

    def render(self, markdown: str) -> str:
        shown = self._parser.render(markdown)
        return re.sub(r"<p>(<figure>.*?</figure>)</p>", r"\1", shown)  # a paragraph holds no figure

    def _text(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        text = tokens[place].content
        if len(text) > LONGEST_TEXT:
            text = f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"
        return html.escape(text)

    def _code(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        words = self._text(tokens, place, options, env)
        return f'<code class="short">{words}</code>' if len(words) < SHORT_CODE else f"<code>{words}</code>"

    def _image(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        token = tokens[place]
        source = token.attrs.get("src", "")
        words = html.escape(token.content)
        path = self._plots.get(source)
        if path is None or not path.is_file():
            return f"{words} ({html.escape(str(source))})"
        try:
            url, width, height = plot_data_url(path)
        except (OSError, ValueError) as error:
            return f"{words}: {html.escape(_visible(_first_line(error)))}"
        size = f'width="{width}" height="{height}"'
        return f'<figure><img src="{url}" alt="{words}" {size}></figure>'

    def _heading(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", tokens[place + 1].content.lower()).strip("-") or "section"
        self._headings[words] += 1
        number = self._headings[words]
        return f'<{tokens[place].tag} id="{words}{"" if number == 1 else f"-{number}"}">'

    def _cell(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        """Short ones stay on one line; numbers and verdicts are told by their class."""
        token = tokens[place]
        content = tokens[place + 1].content
        classes = []
        if "right" in str(token.attrs.get("style", "")):
            classes.append("number")
        if token.tag == "td" and len(content) < SHORT_CELL:
            classes.append("short")
        if content in (*VERDICT_COLORS, "static"):
            classes.append(content)
        return f'<{token.tag} class="{" ".join(classes)}">' if classes else f"<{token.tag}>"

    def _table(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        return '<div class="table" tabindex="0">\n<table>\n'

    def _table_end(self, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        return "</table>\n</div>\n"


def page_html(report_markdown: str, plots_folder: Path, sections: Sequence[str] = ()) -> str:
    """The report as one page that needs nothing beside it and runs nothing.

    report_markdown: REPORT.md. plots_folder: where the plots lie that it shows. sections: further fragments
    of HTML, each from its own `<h2 id=...>` on, made harmless by who made them; they stand before the
    summary by configuration.
    """
    content = _PageParts(plots_folder).render(report_markdown)
    before, heading, after = content.partition(f'<h2 id="{FRAGMENTS_BEFORE}">')
    content = "\n".join([before, *sections, heading + after])
    title = re.search(r"<h1[^>]*>(.*?)</h1>", content)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    return environment.from_string(PAGE_TEMPLATE).render(
        policy=PAGE_POLICY,
        title=html.unescape(title[1]) if title else "BH routing against Top-K",
        contents=re.findall(r'<h2 id="([\w-]+)"[^>]*>(.*?)</h2>', content),
        content=content,
    )


def write_page(folder: Path, sections: Sequence[str] = ()) -> Path:
    """Write report.html from the REPORT.md and the plots that lie in `folder`; sections: see `page_html`."""
    markdown = (folder / REPORT).read_text(encoding="utf-8")
    path = folder / REPORT_PAGE
    write_whole(path, page_html(markdown, folder / "plots", sections))
    return path


@dataclass(frozen=True)
class WrittenReport(DrawnPlots):
    """The plots of a report, and the analysis that it tells."""

    analysis: dict[str, Any]


def write_report(df: pd.DataFrame, output_dir: str | Path, baseline: str | None = None) -> WrittenReport:
    """Analysis, plots and report of a run, into `output_dir`; see `analyze_results` for the arguments."""
    folder = Path(output_dir)
    start = time.perf_counter()
    results = results_beside(df, folder)
    analysis = analyze_tables(results, folder, baseline)
    logger.info(f"analysed in {duration(time.perf_counter() - start)}")
    drawn = draw_plots(results, folder, analysis)
    write_whole(folder / REPORT, report_text(results, analysis, folder, drawn.failed))
    tokens = token_view(results, folder)
    sections = [f'<h2 id="tokens">Token by token</h2>\n{tokens}'] if tokens else []
    write_page(folder, sections)
    return WrittenReport(drawn.paths, drawn.failed, analysis)


# The answer on a terminal


TERMINAL_COLUMNS = 80
TERMINAL_ROWS = 12  # of a table; the report has them all
TERMINAL_TABLES: dict[str, tuple[ReportColumn, ...]] = {
    "configurations": (
        ReportColumn("configuration", "configuration", "s"),
        ReportColumn("experts", "experts", ".2f"),
        ReportColumn("saved", "saved", ".0%"),
        ReportColumn("time", "time", ".2f"),
        ReportColumn("NLL", "delta_nll", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("verdict", "verdict", "s"),
    ),
    "rules": (
        ReportColumn("rule", "label", "s"),
        ReportColumn("experts", "span", ".2f to .2f"),
        ReportColumn("NLL", "at_middle", "+.4f"),
        ReportColumn("within 1 %", "within_1", ".2f"),
        ReportColumn("beaten by", "beaten_by", "s"),
    ),
    "tasks": (
        ReportColumn("task", "task", "s"),
        ReportColumn("configuration", "configuration", "s"),
        ReportColumn("score", "metric", "s"),
        ReportColumn("mean", "mean", ".3f"),
        ReportColumn("diff.", "mean_difference", "+.3f"),
        ReportColumn("95 % interval", "ci95", "+.3f to +.3f"),
        ReportColumn("differs", "is_significant", "s"),
    ),
}


def _columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters two, marks on others none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _shortened(text: str, columns: int) -> str:
    """`text` in so many columns; where something had to go, an ellipsis stands in its middle."""
    text = _visible(text[: 20 * columns])
    if _columns_of(text) <= columns:
        return text
    while _columns_of(text) > columns - 1:
        middle = len(text) // 2
        text = text[:middle] + text[middle + 1 :]
    middle = len(text) // 2
    return f"{text[:middle]}…{text[middle:]}"


def _padded(text: str, columns: int, is_number: bool) -> str:
    space = " " * (columns - _columns_of(text))
    return space + text if is_number else text + space


def terminal_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[ReportColumn]) -> list[str]:
    """The lines of a table in TERMINAL_COLUMNS: numbers right, words left, no column that has nothing to
    show. The widest words are shortened as far as it needs."""
    shown: list[list[str]] = []
    numbers: list[bool] = []
    for place, column in enumerate(columns):
        texts = [show(row, column.key, column.form or "s") for row in rows]
        if place == 0 or set(texts) != {NOTHING_TO_SHOW}:
            shown.append([column.title, *texts])
            numbers.append(column.form not in ("", "s"))
    widths = [max(map(_columns_of, texts)) for texts in shown]
    room = TERMINAL_COLUMNS - 2 * (len(shown) - 1)
    while sum(widths) > room:
        widest = max((place for place in range(len(shown)) if not numbers[place]), key=widths.__getitem__)
        widths[widest] -= 1
    lines = []
    for cells in zip(*shown, strict=True):
        fitted = zip(cells, widths, numbers, strict=True)
        padded = [_padded(_shortened(cell, width), width, is_number) for cell, width, is_number in fitted]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(_columns_of, lines)))
    return lines


def plain_text(sentence: str) -> str:
    """A sentence of the report without its Markdown."""
    text = re.sub(r"\*\*|(?<!\\)`", "", sentence)
    return html.unescape(re.sub(r"\\([\\`*_{}\[\]|#!])", r"\1", text))


def configuration_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the terminal shows of configurations: the baseline, then those compared with it; the best first
    where they are too many."""
    base = analysis["baseline"]
    rows = []
    for name in analysis["configurations"]:
        verdict = analysis["verdict"].get(name, {})
        summary = analysis["summary_by_config"].get(name, {})
        if name != base and verdict and is_static(verdict):
            continue
        generated = summary.get("avg_experts_per_token", {}).get("mean")
        tests = analysis["statistical_tests"].get(name, {})
        clock = tests.get("inference_time_sec", {})
        scored = verdict.get("mean_experts")
        row = verdict | {"configuration": name, "experts": generated if scored is None else scored}
        row["time"] = clock.get("median_ratio")
        row["verdict"] = "baseline" if name == base else verdict.get("verdict")
        rows.append(row)
    rows.sort(key=lambda row: row["configuration"] != base)
    of_base = rows[0]["experts"]
    for row in rows[1:]:
        if of_base and row["experts"] is not None:
            row["saved"] = 1 - row["experts"] / of_base
    if len(rows) > TERMINAL_ROWS:
        order = {verdict: place for place, verdict in enumerate(("baseline", "better", "undecided", "worse"))}

        def rank(row: Mapping[str, Any]) -> tuple[int, float]:
            delta = row.get("delta_nll")
            return order.get(row["verdict"], len(order)), math.inf if delta is None else delta

        rows.sort(key=rank)
    return rows


TERMINAL_NOTES = {  # key of a column -> what it means
    "saved": "experts, against {baseline}",
    "time": "of inference, median over prompts of the ratio to {baseline}'s",
    "delta_nll": "nats per token, minus static Top-K's at the same number of experts",
    "at_middle": "nats per token, minus static Top-K's, at {middle} effective experts",
    "within_1": "fewest effective experts within 1 % of the model's own perplexity",
    "beaten_by": "of the rules with the same stand-in",
    "mean_difference": "to {baseline}, paired by document",
    "is_significant": "adjusted p below {level}",
}
FIELD_FROM = 6  # rules: so many are shown as rules; where fewer are compared, their configurations say more


def rule_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the terminal shows of rules: those that no other beats, then the nearest to the best."""

    middle = middle_of(analysis["field"]["experts"])
    rows = [row | {"at_middle": row.get(league_key(middle))} for row in league_rows(analysis["field"])]
    return sorted(rows, key=lambda row: (row["beaten_by"] != "none", row.get("to_best", math.inf)))


def compared_task_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the terminal shows of tasks: what is compared with the baseline, significant differences first."""
    rows = [row for row in task_rows(analysis) if row["configuration"] != analysis["baseline"]]
    return sorted(rows, key=lambda row: row.get("significant") is not True)


def terminal_answer(analysis: Mapping[str, Any]) -> str:
    """What a run says, for a terminal of TERMINAL_COLUMNS: the answer, and the table it rests on."""
    if analysis["tasks"]:
        kind = "tasks"
        answer = task_sentence(analysis)
        rows = compared_task_rows(analysis)
    elif len(analysis["field"].get("ladders", ())) >= FIELD_FROM:
        kind = "rules"
        answer = answer_sentence(analysis)
        rows = rule_rows(analysis)
    else:
        kind = "configurations"
        answer = verdict_sentence(analysis)
        rows = configuration_rows(analysis)
    shown = rows[:TERMINAL_ROWS]
    lines = [*textwrap.wrap(_visible(plain_text(answer)), TERMINAL_COLUMNS), ""]
    if shown:
        lines += terminal_table(shown, TERMINAL_TABLES[kind])
    if len(rows) > len(shown):
        more = f"{len(rows) - len(shown)} more {'comparisons' if kind == 'tasks' else kind}"
        lines.append(f"{more} stand in the report{'.' if kind == 'tasks' else '; these are the best.'}")
    words = {"baseline": analysis["baseline"], "level": f"{SIGNIFICANCE_LEVEL:g}"}
    words["middle"] = str(middle_of(analysis["field"]["experts"])) if kind == "rules" else ""
    notes = [
        f"{column.title}: {TERMINAL_NOTES[column.key].format(**words)}"
        for column in TERMINAL_TABLES[kind]
        if column.key in TERMINAL_NOTES and any(row.get(column.key) is not None for row in shown)
    ]
    lines += ["", *textwrap.wrap("; ".join(notes), TERMINAL_COLUMNS)]
    lines += ["", *textwrap.wrap(_visible(plain_text(cost_sentence(analysis))), TERMINAL_COLUMNS)]
    return "\n".join(lines).rstrip()


def terminal_paths(folder: Path) -> str:
    """Where to read on: the report as a page and as Markdown, the plots, and the tables of the run."""
    lines = []
    reports = [folder / REPORT_PAGE, folder / REPORT]
    tables = [folder / table.file for table in TABLES]
    for title, paths in (("report", reports), ("plots", [folder / "plots"]), ("tables", tables)):
        there = [path for path in paths if path.exists()]
        lines += [f"{title if not place else '':8}{_visible(str(path))}" for place, path in enumerate(there)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# 16. Folders side by side: runs of several models, seeds or machines
# ---------------------------------------------------------------------------------------------------------
#
# `compare`: what several runs measured, of several models, seeds or machines, in one table and one plot.
# Where two of them measured the same items, the difference between them is tested as any other.

COMPARISON_FILES = ("COMPARISON.md", "comparison.json", "plots/comparison.png")
MOST_FOLDERS = 26  # each has a letter
BETWEEN = {  # quantity -> what its difference between two folders is
    "delta_nll": "NLL at equal compute, nats per token",
    "share_of_own": "effective experts, as a share of the model's own K",
    "task_score": "{metric} of {task}",
}


@dataclass(frozen=True)
class ResultsFolder:
    """A folder of results among others: its letter there, and what is known of its configurations."""

    letter: str
    path: Path
    results: Results  # what did not fail
    configs: Configs
    own_k: int | None
    baseline: str
    verdicts: Mapping[str, Mapping[str, Any]]  # see `quality_verdicts`
    tasks: Sequence[Row]  # see `compare_tasks`; without what the harness alone reports


def _task_entries(path: Path, tasks: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
    """`compare_tasks` of a folder, each with the direction of its metric."""
    report = read_side_file(path / TASK_RESULTS, run_ids(tasks))
    entries = [entry for entry in compare_tasks(tasks, baseline, report) if "metric" in entry]
    for entry in entries:
        entry["higher_is_better"] = higher_is_better(entry["task"], entry["metric"], report)
    return entries


def read_results_folder(letter: str, path: Path) -> ResultsFolder:
    """The results in a folder, which is left as it is. UserError where there are none."""
    if not path.is_dir():
        raise UserError(f"compare {path}: there is no such folder")
    results = Results.read(path)
    # As in the analysis of the folder, what decides is chosen among all rows: not what happened to finish.
    done = dataclasses.replace(results, scores=deciding_scores(results.scores)).finished()
    if not sum(map(len, done)):
        raise UserError(f"compare {path}: none of its {sum(map(len, results))} experiments finished")
    configs = configurations(done)
    for name in configs:
        check_name(name)
    baseline = choose_baseline(done)
    return ResultsFolder(
        letter=letter,
        path=path,
        results=done,
        configs=configs,
        own_k=own_k_of(done),
        baseline=baseline,
        verdicts=quality_verdicts(done.scores, configs, baseline),
        tasks=_task_entries(path, done.tasks, baseline),
    )


def read_results_folders(paths: Sequence[str | Path]) -> list[ResultsFolder]:
    """Folders of results, lettered from A. UserError for fewer than two, or one that is there twice."""
    given = [Path(path) for path in paths]
    if not 2 <= len(given) <= MOST_FOLDERS:
        raise UserError(f"compare takes 2 to {MOST_FOLDERS} folders of results, not {len(given)}")
    seen: set[Path] = set()
    for path in given:
        if path.resolve() in seen:
            raise UserError(f"compare {path}: this folder is given twice; a run is not compared with itself")
        seen.add(path.resolve())
    return [read_results_folder(chr(ord("A") + place), path) for place, path in enumerate(given)]


def _folder_row(folder: ResultsFolder) -> dict[str, Any]:
    """What a folder holds: model, its K, machine, and how much was measured."""
    results = folder.results
    first = getattr(results, main_kind(results)).iloc[0]
    model = show(first, "model_name", "s")
    return {
        "folder": folder.letter,
        "path": str(folder.path),
        "model": "" if model == NOTHING_TO_SHOW else model,
        "own_k": folder.own_k,
        "machine": machine(first),
        "seed": first["seed"],
        "baseline": folder.baseline,
        "n_prompts": results.generation["prompt_id"].nunique(),
        "n_windows": results.scores["item_id"].nunique(),
        "n_documents": documents_of(results.scores).nunique(),
        "n_task_documents": results.tasks["document"].nunique(),
    }


def _experts_of(folder: ResultsFolder, name: str) -> dict[str, float | None]:
    """Experts and effective experts of a configuration: of the scored text, else of what was generated."""
    verdict = folder.verdicts.get(name)
    if verdict is not None:
        return {"experts": verdict["kept_experts"], "effective_experts": verdict["mean_experts"]}
    frame = getattr(folder.results, main_kind(folder.results))
    rows = frame[frame["config_name"] == name]
    ran = rows["avg_experts_per_token"].mean()
    return {"experts": ran, "effective_experts": effective_experts(rows).mean()}


def _configuration_row(folder: ResultsFolder, name: str) -> dict[str, Any]:
    """What one folder says of one configuration."""
    row: dict[str, Any] = {"configuration": name, "folder": folder.letter, **_experts_of(folder, name)}
    row["share_of_own"] = None
    if folder.own_k and not pd.isna(row["effective_experts"]):
        row["share_of_own"] = row["effective_experts"] / folder.own_k
    verdict = folder.verdicts.get(name, {})
    for key in ("delta_nll", "ci95_low", "ci95_high", "verdict", "n_units", "reason"):
        row[key] = verdict.get(key)
    k = static_k(folder.configs[name])
    if k is not None:
        row["verdict"] = f"own Top-{k}" if k == folder.own_k else f"Top-{k}"
        row["reason"] = None
    elif row["delta_nll"] is None:
        row["reason"] = row["reason"] or "no text was scored"
    return row


def _task_entries_by_folder(folders: Sequence[ResultsFolder]) -> list[dict[str, Any]]:
    """What all folders say of their tasks: those of a task and configuration beside each other."""
    entries = [{"folder": folder.letter} | entry for folder in folders for entry in folder.tasks]
    tasks = distinct(entry["task"] for entry in entries)
    names = distinct(entry["configuration"] for entry in entries)
    return sorted(
        entries, key=lambda entry: (tasks.index(entry["task"]), names.index(entry["configuration"]))
    )


def _compared_names(folders: Sequence[ResultsFolder]) -> list[str]:
    """The configurations that folders are compared by: those that adapt, and the model's own routing; the
    other points of the static curve only where there is nothing else."""
    names = distinct(name for folder in folders for name in folder.configs)
    shown = [
        name
        for name in names
        if any(
            name == folder.baseline or static_k(folder.configs[name]) is None
            for folder in folders
            if name in folder.configs
        )
    ]
    return shown if len(shown) > 1 else names


@dataclass(frozen=True)
class SharedItems:
    """The items that two folders measured alike, of one of the tables in KINDS, in words; none, with why."""

    kind: str
    items: pd.Index
    words: str


def _inputs_of(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Each item's hash of inputs and, where text was scored, its number of tokens, indexed by item."""
    rows = frame.drop_duplicates(KINDS[kind].items.item).set_index(KINDS[kind].items.item)
    return rows[["input_hash", "num_tokens"]] if kind == "scores" else rows[["input_hash"]]


def _paired_kinds(first: ResultsFolder, other: ResultsFolder) -> list[str]:
    """The tables whose items two folders are paired by: the scores of text, else what was generated; and
    those of tasks. Where they share none it is generation, which then has no pair."""
    both = [kind for kind in KINDS if all(len(getattr(folder.results, kind)) for folder in (first, other))]
    if "scores" in both and "generation" in both:
        both.remove("generation")
    return both or ["generation"]


def shared_items(first: ResultsFolder, other: ResultsFolder, kind: str) -> SharedItems:
    """The items of a table with the same name and the same inputs in both folders.

    Names and hashes say nothing of a tokenizer where a hash is of words: the same words must also be as many
    tokens, in all items, or NLL per token is of different things.
    """
    tables = [_inputs_of(getattr(folder.results, kind), kind) for folder in (first, other)]
    both = tables[0].join(tables[1].add_suffix("_other"), how="inner")
    word = KINDS[kind].items.word
    pair = f"{other.letter} and {first.letter}"
    nothing = both.index[:0]
    known = both[(both["input_hash"] != "") & (both["input_hash_other"] != "")]
    same = known[known["input_hash"] == known["input_hash_other"]]
    if both.empty:
        return SharedItems(kind, nothing, f"{pair} are not paired: no {word} has the same name in both")
    if known.empty:
        why = f"an older script did not record what its {word}s were"
        return SharedItems(kind, nothing, f"{pair} are not paired: {why}")
    if same.empty:
        why = f"{word}s of the same name hold other text, or other tokens of it"
        return SharedItems(kind, nothing, f"{pair} are not paired: {why}")
    if kind == "scores" and (same["num_tokens"] != same["num_tokens_other"]).any():
        why = "the same text is another number of tokens there, so NLL per token is of different things"
        return SharedItems(kind, nothing, f"{pair} are not paired: {why}")
    return SharedItems(kind, same.index, f"{pair} are paired on {amount(len(same), word)} that both measured")


def _equal_compute_differences(folder: ResultsFolder, items: pd.Index) -> dict[str, pd.Series]:
    """Configuration -> NLL of each of `items` minus that of static Top-K with the same mean experts."""
    scores = folder.results.scores
    by_config = scored_items(scores[scores["item_id"].isin(items)])
    curve = static_curve(by_config, folder.configs)
    differences = {}
    for name, rows in by_config.items():
        compared = comparable_static(rows, rows.index, curve, folder.configs[name])
        if isinstance(compared, EqualCompute):
            differences[name] = difference_to_static(rows.loc[compared.items], compared.mixture, curve)
    return differences


def _shares_of_own(folder: ResultsFolder, shared: SharedItems) -> dict[str, pd.Series]:
    """Configuration -> each item's effective experts as a share of the model's own K."""
    if not folder.own_k:
        return {}
    frame = getattr(folder.results, shared.kind)
    item = KINDS[shared.kind].items.item
    frame = frame[frame[item].isin(shared.items)]
    frame = frame.assign(**{COMPUTE: effective_experts(frame)})
    return {
        name: rows.groupby(item, sort=False)[COMPUTE].mean() / folder.own_k
        for name, rows in frame.groupby("config_name", sort=False)
    }


def _task_scores(folder: ResultsFolder, items: pd.Index) -> dict[str, dict[str, pd.Series]]:
    """Task and its metric in words -> configuration -> the score of each of `items` that is of it."""
    tasks = folder.results.tasks
    tasks = tasks[tasks["document"].isin(items) & (tasks["metric"] != "")]
    scores: dict[str, dict[str, pd.Series]] = collections.defaultdict(dict)
    for (task, metric, name), rows in tasks.groupby(["task", "metric", "config_name"], sort=False):
        title = BETWEEN["task_score"].format(metric=metric, task=task)
        scores[title][name] = rows.set_index("document")["score"]
    return scores


@dataclass(frozen=True)
class Measured:
    """A quantity of BETWEEN in one folder: configuration -> its value for each item."""

    quantity: str
    title: str
    values: Mapping[str, pd.Series]


def _measured(folder: ResultsFolder, shared: SharedItems) -> list[Measured]:
    """What a folder measured of items."""
    values = {}
    if shared.kind == "scores":
        values["delta_nll"] = _equal_compute_differences(folder, shared.items)
    values["share_of_own"] = _shares_of_own(folder, shared)
    measured = [Measured(quantity, BETWEEN[quantity], by_config) for quantity, by_config in values.items()]
    if shared.kind == "tasks":
        by_title = _task_scores(folder, shared.items)
        measured += [Measured("task_score", title, by_config) for title, by_config in by_title.items()]
    return measured


def _tests_between(
    first: ResultsFolder, other: ResultsFolder, shared: SharedItems, names: Sequence[str]
) -> list[dict[str, Any]]:
    """`paired_comparison` of another folder minus the first, of everything that both measured."""
    documents = documents_of(getattr(first.results, shared.kind), shared.kind)
    of_other = {measured.title: measured.values for measured in _measured(other, shared)}
    tests = []
    for measured in _measured(first, shared):
        others = of_other.get(measured.title, {})
        for name in names:
            if name in measured.values and name in others:
                about = {"configuration": name, "quantity": measured.quantity, "title": measured.title}
                about["folders"] = f"{other.letter} minus {first.letter}"
                tests.append(about | paired_comparison(measured.values[name], others[name], documents))
    return tests


def between_folders(folders: Sequence[ResultsFolder], names: Sequence[str]) -> dict[str, Any]:
    """Each folder against the first, by `paired_comparison` over the items that both measured alike.

    Returns `tests`, one for each configuration and quantity of BETWEEN, adjusted over all of them, and
    `notes`, what was paired and what was not.
    """
    first, *others = folders
    tests: list[dict[str, Any]] = []
    notes = []
    for other in others:
        for kind in _paired_kinds(first, other):
            shared = shared_items(first, other, kind)
            notes.append(shared.words)
            if len(shared.items):
                tests += _tests_between(first, other, shared, names)
    adjust_p_values(tests)
    return {"tests": tests, "notes": notes}


def _as_code(value: Any) -> str:
    """A value of a folder's configurations as code in Markdown."""
    return "`" + _visible(str(value)).replace("`", "'") + "`"


def _verdict_notes(rows: Sequence[Row]) -> list[str]:
    """Each configuration's verdicts, where more than one folder has one; or why there is nothing to say."""
    notes = []
    for name in distinct(row["configuration"] for row in rows):
        judged = [row for row in rows if row["configuration"] == name and row["delta_nll"] is not None]
        words = {row["verdict"] for row in judged}
        if len(judged) > 1 and len(words) == 1:
            letters = ", ".join(row["folder"] for row in judged)
            notes.append(f"`{name}` is {words.pop()} in each of {letters}.")
        elif len(judged) > 1:
            by_folder = ", ".join(f"{row['verdict']} in {row['folder']}" for row in judged)
            notes.append(f"`{name}` is {by_folder}.")
    counts = collections.Counter(row["configuration"] for row in rows)
    if max(counts.values()) < 2:
        return ["No configuration stands in more than one folder: nothing can be set side by side."]
    return notes or ["No configuration has a verdict in more than one folder."]


def _setting_notes(folders: Sequence[ResultsFolder], names: Sequence[str]) -> list[str]:
    """Where a configuration has other settings in another folder."""
    notes = []
    for name in names:
        having = [folder for folder in folders if name in folder.configs]
        for field in distinct(field for folder in having for field in folder.configs[name]):
            values = [folder.configs[name].get(field) for folder in having]
            if any(value != values[0] for value in values):
                by_folder = ", ".join(
                    f"{_as_code(value)} in {folder.letter}"
                    for folder, value in zip(having, values, strict=True)
                )
                notes.append(f"`{name}` is not the same everywhere: {_as_code(field)} is {by_folder}.")
    return notes


# What is said of it

COMPARISON_TABLES: dict[str, tuple[ReportColumn, ...]] = {
    "folders": (
        ReportColumn("folder", "folder", "s"),
        ReportColumn("path", "path"),
        ReportColumn("model", "model"),
        ReportColumn("its own K", "own_k", "d"),
        ReportColumn("machine", "machine"),
        ReportColumn("seed", "seed", ".0f"),
        ReportColumn("baseline", "baseline", "code"),
        ReportColumn("prompts", "prompts", "d"),
        ReportColumn("windows", "windows", "s"),
        ReportColumn("documents of tasks", "task_documents", "d"),
    ),
    "configurations": (
        _CONFIGURATION,
        ReportColumn("folder", "folder", "s"),
        ReportColumn("experts", "experts", ".2f"),
        ReportColumn("effective", "effective_experts", ".2f"),
        ReportColumn("share of K", "share_of_own", ".0%"),
        ReportColumn("NLL at equal compute", "delta_nll", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("verdict", "verdict", "s"),
        ReportColumn("documents", "n_units", "d"),
        ReportColumn("why not", "reason"),
    ),
    "tasks": (
        ReportColumn("task", "task"),
        _CONFIGURATION,
        ReportColumn("folder", "folder", "s"),
        ReportColumn("score", "metric"),
        ReportColumn("better", "direction", "s"),
        ReportColumn("mean", "mean", ".4f"),
        ReportColumn("difference", "mean_difference", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("significant", "is_significant", "s"),
        ReportColumn("documents", "n_shown", "d"),
    ),
    "between": (
        _CONFIGURATION,
        ReportColumn("difference", "folders", "s"),
        ReportColumn("of", "title"),
        ReportColumn("mean", "mean_difference", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("p", "p_value", "p"),
        ReportColumn("p adjusted", "p_value_adjusted", "p"),
        ReportColumn("d", "cohens_d", ".2f"),
        ReportColumn("significant", "is_significant", "s"),
        ReportColumn("items", "n_pairs", "d"),
        ReportColumn("documents", "n_units", "d"),
    ),
    "terminal": (
        ReportColumn("configuration", "configuration", "s"),
        ReportColumn("in", "folder", "s"),
        ReportColumn("experts", "effective_experts", ".2f"),
        ReportColumn("of K", "share_of_own", ".0%"),
        ReportColumn("NLL", "delta_nll", "+.4f"),
        ReportColumn("95 % interval", "ci95", "+.4f to +.4f"),
        ReportColumn("verdict", "verdict", "s"),
    ),
    "terminal_tasks": (
        ReportColumn("task", "task", "s"),
        ReportColumn("configuration", "configuration", "s"),
        ReportColumn("in", "folder", "s"),
        ReportColumn("score", "metric", "s"),
        ReportColumn("mean", "mean", ".3f"),
        ReportColumn("diff.", "mean_difference", "+.3f"),
        ReportColumn("differs", "is_significant", "s"),
    ),
}

COMPARISON_TEMPLATE = """\
# Folders of results side by side

{{ bullets(verdict_notes) }}

## Folders

{{ table("folders", folders) }}

## Configurations

{{ table("configurations", configurations) }}

Experts: mean over tokens and layers of the scored text, else of what was generated, or of tasks; effective: \
what stands in for a dropped expert is counted by its cost; share of K: effective experts over those that \
the model itself runs. NLL at equal compute: nats per token minus that of static Top-K mixed to the same \
experts, on the same text; interval and verdict (adjusted p below {{ level }} within the folder) as in each \
folder's own report.

{{ bullets(setting_notes) }}

![Configurations by folder](plots/comparison.png)

{% if tasks %}
## Tasks

{{ table("tasks", tasks) }}

Difference: to the baseline of the same folder, paired by document, p adjusted over that folder's tests, as \
in its own report; better: whether a high or a low score is.
{% endif %}

## Between folders

{{ bullets(pair_notes) }}

{% if tests %}
{{ table("between", tests) }}

Paired by items of the same name and inputs: another folder minus {{ first }}, Student's t over documents, \
p adjusted over all rows of this table, significant below {{ level }}.
{% else %}
No difference between folders was tested.
{% endif %}
"""


def _difference_notes(tests: Sequence[Row]) -> list[str]:
    """The differences between folders that are claimed, or that there is none."""
    claimed = [test for test in tests if test["significant"]]
    if tests and not claimed:
        return ["Between folders no difference is significant."]
    return [
        f"{test['folders']}, {test['configuration']}, {test['title']}: "
        f"{show(test, 'mean_difference', '+.4f')} ({show(test, 'ci95', '+.4f to +.4f')})"
        for test in claimed
    ]


def _shown_tasks(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the tables of tasks."""
    return [
        entry
        | {
            "direction": "high" if entry["higher_is_better"] else "low",
            "is_significant": significance(entry),
            "n_shown": entry.get("n_documents", entry.get("n_pairs")),
        }
        for entry in comparison["tasks"]
    ]


def terminal_comparison(comparison: Mapping[str, Any]) -> str:
    """What `compare` says on the terminal: folders, table, verdicts, and what was paired."""
    lines = []
    for folder in comparison["folders"]:
        own_k = f"top-{folder['own_k']}" if folder["own_k"] else "K unknown"
        words = f"{folder['folder']}  {folder['path']}: {folder['model']}, {own_k}, {folder['machine']}"
        lines += textwrap.wrap(_visible(words), TERMINAL_COLUMNS, subsequent_indent="   ")
    lines += ["", *terminal_table(comparison["configurations"], COMPARISON_TABLES["terminal"]), ""]
    if comparison["tasks"]:
        tasks = _shown_tasks(comparison)
        lines += [*terminal_table(tasks, COMPARISON_TABLES["terminal_tasks"]), ""]
    for note in (
        *comparison["verdict_notes"],
        *comparison["setting_notes"],
        *comparison["pair_notes"],
        *_difference_notes(comparison["tests"]),
    ):
        lines += textwrap.wrap(_visible(note), TERMINAL_COLUMNS, subsequent_indent="   ")
    return "\n".join(lines)


def plot_comparison(comparison: Mapping[str, Any], axes: Any = None) -> Any:
    """Share of the model's own K that ran, and NLL at equal compute with 95 % intervals, by folder."""
    names = distinct(row["configuration"] for row in comparison["configurations"])
    letters = [folder["folder"] for folder in comparison["folders"]]
    height = 1.9 + 0.17 * len(names) * (len(letters) + 1)
    axes = _two_axes(axes, min(max(height, 3.4), MAX_INCHES))
    colors = dict(zip(letters, _distinct_colors(len(letters)), strict=True))
    spans = [0.0]
    folders_of = collections.defaultdict(list)
    for row in comparison["configurations"]:
        folders_of[row["configuration"]].append(row["folder"])
    for row in comparison["configurations"]:
        having = folders_of[row["configuration"]]
        place = having.index(row["folder"]) - (len(having) - 1) / 2
        y = names.index(row["configuration"]) + 0.7 * place / len(letters)
        color = colors[row["folder"]]
        if row["share_of_own"] is not None:
            axes[0].plot(100 * row["share_of_own"], y, "o", color=color, markersize=5)
        if row["delta_nll"] is not None:
            is_tested = row["ci95_low"] is not None
            ends = [row["ci95_low"], row["ci95_high"]] if is_tested else [row["delta_nll"]] * 2
            axes[1].plot(ends, [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
            axes[1].plot(row["delta_nll"], y, "o", color=color, markersize=5)
            spans += ends
    _nats_scale(axes[1], "x", spans)
    axes[0].axvline(100, color="0.2", linewidth=1)
    axes[1].axvline(0, color="0.2", linewidth=1)
    for folder in comparison["folders"]:
        label = f"{folder['folder']}: {Path(folder['path']).name}, {Path(folder['model']).name}"
        label = _visible(label)[:40].replace("$", r"\$")
        axes[1].plot([], [], "o-", color=colors[folder["folder"]], label=label)
    for ax in axes:
        ax.grid(visible=False, axis="y")
        ax.set(ylim=(len(names) - 0.4, -0.6))
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
        for y in range(0, len(names), 2):  # every other configuration on a band of its own
            ax.axhspan(y - 0.5, y + 0.5, color="0.5", alpha=0.07, linewidth=0)
    axes[0].set(xlabel="effective experts, % of the model's K", title="Compute")
    axes[0].set_xlim(0, 1.04 * axes[0].get_xlim()[1])
    axes[1].set(xlabel="NLL minus static Top-K's, nats per token")
    axes[1].set_title("Quality at equal compute (left is better)")
    axes[1].legend(**LEGEND_BESIDE, fontsize="small")
    return axes


def _comparison_context(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is filled with."""
    folders = []
    for folder in comparison["folders"]:
        shown = dict(folder)
        shown["prompts"] = folder["n_prompts"] or None
        shown["task_documents"] = folder["n_task_documents"] or None
        if folder["n_windows"]:
            shown["windows"] = f"{folder['n_windows']} of {amount(folder['n_documents'], 'document')}"
        folders.append(shown)
    return {
        **comparison,
        "folders": folders,
        "tasks": _shown_tasks(comparison),
        "tests": [test | {"is_significant": significance(test)} for test in comparison["tests"]],
        "first": comparison["folders"][0]["folder"],
        "level": f"{SIGNIFICANCE_LEVEL:g}",
    }


def compare_results(folders: Sequence[str | Path], output_dir: str | Path) -> dict[str, Any]:
    """Two or more folders of results side by side: COMPARISON.md, comparison.json and plots/comparison.png.

    folders: of any models, seeds and machines, of older scripts too; they are only read. Configurations go by
    their names. Folders whose items are the same, by name and hash of inputs, are compared with the first by
    `paired_comparison`; others stand beside each other.

    Returns a dict with folders, configurations (one entry for each configuration and folder), tasks (each
    folder's `compare_tasks`), tests (see `between_folders`), verdict_notes, setting_notes and pair_notes.
    Raises UserError for fewer than two folders, one that is there twice, or one without results.
    """
    read = read_results_folders(folders)
    names = _compared_names(read)
    rows = [_configuration_row(folder, name) for name in names for folder in read if name in folder.configs]
    between = between_folders(read, names)
    comparison = strict_json(
        {
            "folders": [_folder_row(folder) for folder in read],
            "configurations": rows,
            "tasks": _task_entries_by_folder(read),
            "tests": between["tests"],
            "verdict_notes": _verdict_notes(rows),
            "setting_notes": _setting_notes(read, names),
            "pair_notes": between["notes"],
        }
    )
    folder = Path(output_dir)
    write_json(folder / "comparison.json", comparison)
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        try:
            plot_comparison(comparison)
            _save_figure(folder / "plots" / "comparison.png")
        finally:
            plt.close("all")
    text = render_markdown(COMPARISON_TEMPLATE, _comparison_context(comparison), COMPARISON_TABLES)
    write_whole(folder / "COMPARISON.md", text)
    return comparison


# ---------------------------------------------------------------------------------------------------------
# 17. Command line
# ---------------------------------------------------------------------------------------------------------


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, but it must be a whole number, or auto") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, but it must be numbers, separated by commas") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _config_terms(text: str) -> list[str]:
    """Names, and grids "RULE:FIELD=NUMBER,NUMBER" as a term "RULE:FIELD=NUMBER" for each number.

    Commas and semicolons separate. A number that follows a grid with a comma belongs to it: a value is a
    number, a name is not.
    """
    terms = []
    for part in text.split(";"):
        grid = ""
        for word in map(str.strip, part.split(",")):
            if "=" in word:
                grid = word.split("=")[0].strip()
            elif not _is_number(word):
                grid = ""
            continues = grid and "=" not in word
            terms.append(f"{grid}={word}" if continues else word)
    return terms


@dataclass(frozen=True)
class Option:
    """An option of the command line, with its words for --help and the manual.

    parse: how its value is read; None for a switch. default: what --help says it is without. needs: another
    option without which it means nothing, or several, "one or other". least: of a whole number.
    """

    name: str
    words: str
    parse: Callable[[str], Any] | None = str
    default: Any = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    several: bool = False
    needs: str | None = None
    least: int | None = None

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def needed(self) -> tuple[str, ...]:
        """The options of which it needs one."""
        return tuple(self.needs.split(" or ")) if self.needs else ()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        if self.parse is None:
            parser.add_argument(f"--{self.name}", action="store_true", help=self.words)
            return
        more: dict[str, Any] = {"choices": self.choices} if self.choices else {"metavar": self.metavar}
        if self.several:
            more["nargs"] = "+"
        parser.add_argument(f"--{self.name}", type=self.parse, default=self.default, help=self.words, **more)


OPTIONS = (
    Option("model", "folder or hub name of the model", default=DEFAULT_MODEL),
    Option("output", "folder for results", Path, Path(DEFAULT_OUTPUT)),
    Option("max-tokens", "new tokens for each prompt; always exactly so many: clocks compare equal work",
           int, DEFAULT_MAX_TOKENS, "N", least=1),
    Option("checkpoint-interval",
           "every finished row is written at once; so many are forced to the disk together, which bounds "
           "what a power cut can take", int, DEFAULT_CHECKPOINT_INTERVAL, "N", least=1),
    Option("no-resume", "set earlier results in --output aside, do not go on from them", None),
    Option("device", "where the model runs", choices=("auto", "cuda", "cpu"), default="auto"),
    Option("device-map", "spread a model that is too big for one GPU over all of them, the rest over memory "
           "and disk", choices=("auto",)),
    Option("dtype", "precision of weights and arithmetic; auto: on a GPU bfloat16 where it computes in it, "
           "else float16; on a CPU float32 or bfloat16, what is faster at the width of the model's experts "
           "and fits into memory", choices=DTYPES, default="auto"),
    Option("no-fp16", "the same as --dtype float32", None),
    Option("revision", "branch, tag or commit of a hub model"),
    Option("trust-remote-code", "execute Python code that a model brings or that task files name", None),
    Option("batch-size", f"texts scored in one forward pass; auto begins with {AUTO_BATCH_TOKENS:,} tokens "
           "and halves when memory is short. Results do not depend on it, but for rounding", _batch_size,
           "auto", "N"),
    Option("generate-batch", "continue N prompts together as well: throughput at that batch size, beside "
           "that of one prompt at a time", int, metavar="N", least=2),
    Option("suite", "family of configurations: default, frontier, controls, field or all", default="default"),
    Option("configs", "only these configurations: names, separated by commas; RULE:FIELD=NUMBER,NUMBER is "
           "one for each number, such as bh:alpha=0.001,0.01", _config_terms, metavar="NAMES"),
    Option("routing-configs", "JSON file of your own configurations, by name", Path, metavar="FILE"),
    Option("match-experts", "set every adaptive rule's knob to keep K experts on the calibration text; of "
           "several numbers, each: NAME_K", _numbers, metavar="K[,K...]"),
    Option("prompts", "prompts from a file: .txt (one a line), .jsonl, .json, .csv with text and, if you "
           "like, id, category, description, reference", Path, metavar="FILE"),
    Option("text", "text to score, cut into windows: text files, data sets as for --dataset (a row is a "
           "document), folders of either. Beside prompts of your own these are generated, text is scored; "
           "alone, nothing is generated. Without it: text that comes with the model, or with Python; none: "
           "only the prompts' references", metavar="PATH", several=True),
    Option("window", "tokens in a window of text", int, DEFAULT_WINDOW, "N", least=1),
    Option("max-windows", "windows to score, spread evenly over the documents; all of --text if not given, "
           f"{DEFAULT_MAX_WINDOWS} where no text is named", int, metavar="N", least=1),
    Option("dataset", "prompts from a data set: a .csv, .json, .jsonl or .parquet file, a folder of such "
           "files, or a hub NAME or NAME:CONFIG", metavar="NAME[:CONFIG]"),
    Option("split", "split of --dataset, else of the data sets in --text; train if not given, or the only "
           "one", needs="dataset or text"),
    Option("text-column", "of --dataset, else of the data sets in --text; text if not given, or the only one "
           "of strings", metavar="COLUMN", needs="dataset or text"),
    Option("category-column", "of --dataset; without it the data set is the category", metavar="COLUMN",
           needs="dataset"),
    Option("reference-column", "of --dataset: a continuation of the text, to be scored", metavar="COLUMN",
           needs="dataset"),
    Option("limit", f"rows to take of --dataset, {DEFAULT_LIMIT} if not given, else of the data sets in "
           f"--text, {DEFAULT_TEXT_LIMIT:,} if not given", int, metavar="N", needs="dataset or text",
           least=1),
    Option("random-rows", "draw the rows of --dataset by --seed, not the first ones", None, needs="dataset"),
    Option("token-log", f"write a row for {TOKEN_LOG.row} to {' or '.join(TOKEN_LOG_FILES)}", None),
    Option("tasks", "comma-separated tasks or groups of lm-evaluation-harness, instead of prompts", _names,
           metavar="NAMES"),
    Option("num-fewshot", "examples in the context of --tasks; a task's own if not given", int, metavar="N",
           needs="tasks", least=0),
    Option("task-limit", "documents of each of --tasks, or a share below 1", float, metavar="N",
           needs="tasks"),
    Option("include-path", "folder with task files of your own for --tasks", Path, metavar="FOLDER",
           needs="tasks"),
    Option("baseline", "the configuration that the others are compared with; the model's own routing if not "
           "given", metavar="NAME"),
    Option("p-values", "null for every rule that tests, instead of its own", choices=tuple(NULLS)),
    Option("calibration-text", "text file for the empirical null; sampled: text that the model samples. "
           "Windows of text that are not scored if not given, where they are enough", metavar="FILE"),
    Option("apply-chat-template", "feed each prompt in as the message of a user, by the chat template of an "
           "instruct model", None),
    Option("do-sample", "sample the texts instead of greedy decoding", None),
    Option("sampling-temperature", "with --do-sample; 1 if not given", float, metavar="T", needs="do-sample"),
    Option("sampling-top-p", "with --do-sample; 1 if not given", float, metavar="P", needs="do-sample"),
    Option("num-samples", "with --do-sample: texts for each prompt, 1 if not given; in the tests their mean "
           "counts", int, metavar="N", needs="do-sample", least=1),
    Option("seed", "for sampling texts and the calibration text", int, DEFAULT_SEED, "N"),
    Option("retry-failed", "run again what failed in an earlier run", None),
    Option("fail-fast", "stop at the first failure", None),
    Option("list-architectures", "print which models can be patched, and end", None),
    Option("analyze-only", "redo analysis, plots and report from the tables in --output", None),
)  # fmt: skip
ALONE = {  # option that runs nothing -> the options that mean something beside it
    "analyze_only": ("output", "baseline"),
    "list_architectures": (),
}


COMPARE = "compare"  # the one subcommand: folders of results, and these options
COMPARE_OPTIONS = (Option("output", f"folder for {', '.join(COMPARISON_FILES)}", Path, Path("comparison")),)


class _OneLineParser(argparse.ArgumentParser):
    """A mistake is one line, without the whole list of options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def program_name() -> str:
    """What this is called by: the script, or the command that pip installs."""
    installed = "bh-experiments"
    return installed if Path(sys.argv[0]).stem == installed else "run_bh_experiments.py"


def build_parser() -> argparse.ArgumentParser:
    """The command line, from OPTIONS."""
    parser = _OneLineParser(
        prog=program_name(),
        description="Compare Benjamini-Hochberg expert routing with Top-K in a mixture-of-experts model.",
        epilog=f"{COMPARE} DIR DIR ... --output DIR sets folders of results side by side: {COMPARE} --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option in OPTIONS:
        option.add_to(parser)
    return parser


def build_compare_parser() -> argparse.ArgumentParser:
    """The command line of `compare`, from COMPARE_OPTIONS."""
    parser = _OneLineParser(
        prog=f"{program_name()} {COMPARE}",
        description="Set two or more folders of results side by side: of other models, seeds or machines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a folder that a run wrote")
    for option in COMPARE_OPTIONS:
        option.add_to(parser)
    return parser


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, and which of them it gave: `given`, for those with a default too.

    `folders` are those of `compare`, None for any other command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if words[:1] == [COMPARE]:
        parser = build_compare_parser()
        words = words[1:]
    args = parser.parse_args(words)
    nothing = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is set already gets no default
    seen = vars(parser.parse_args(words, nothing))
    args.given = {name for name, value in seen.items() if value is not None}
    args.folders = getattr(args, "folders", None)
    return args


def _check_option(option: Option, given: Mapping[str, Any]) -> None:
    """UserError where an option that was given is empty, too small, or lacks the one it needs."""
    if given[option.key] in ("", [""]):
        raise UserError(f"--{option.name} is empty")
    if option.least is not None:
        check_least(f"--{option.name}", given[option.key], option.least)
    if option.needed and not any(name.replace("-", "_") in given for name in option.needed):
        raise UserError(f"--{option.name} needs --{' or --'.join(option.needed)}")


def _check_text(given: Mapping[str, Any]) -> None:
    """UserError where --text has an empty name, or no text and more, or options that need some text."""
    text = given.get("text", ())
    if "" in text:
        raise UserError("--text is empty")
    if NO_TEXT not in text:
        return
    if len(text) > 1:
        others = " ".join(source for source in text if source != NO_TEXT)
        raise UserError(f"--text {NO_TEXT} goes alone, without {others}; a file of this name is ./{NO_TEXT}")
    about_text = ["window", "max_windows"]
    if "dataset" not in given:
        about_text += ["split", "text_column", "limit"]
    for name in about_text:
        if name in given:
            raise UserError(
                f"--{name.replace('_', '-')} means nothing beside --text {NO_TEXT}: no text is read"
            )


def only_scores(args: argparse.Namespace) -> bool:
    """Whether --text stands alone: it is scored, and nothing is generated."""
    has_text = bool(args.text) and args.text != [NO_TEXT]
    return has_text and not (args.prompts or args.dataset)


def _check_exclusions(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """UserError for options that contradict each other."""
    for sources in (
        ("prompts", "dataset", "tasks"),
        ("text", "tasks"),
        ("max_windows", "tasks"),
        ("window", "tasks"),
    ):
        both = [f"--{name.replace('_', '-')}" for name in sources if name in given]
        if len(both) > 1:
            raise UserError(f"{both[0]} and {both[1]} exclude each other: a run takes its items from one")
    if args.generate_batch and (args.tasks or only_scores(args)):
        other = "--tasks" if args.tasks else "--text without --prompts or --dataset"
        raise UserError(
            f"--generate-batch and {other} exclude each other: there is no prompt to be continued"
        )
    if args.tasks and args.do_sample:
        raise UserError("--tasks and --do-sample exclude each other: a task says itself how to generate")
    if args.tasks and args.token_log:
        raise UserError("--tasks and --token-log exclude each other: tokens of tasks are not told apart")
    if args.device_map and args.device != "auto":
        raise UserError(f"--device {args.device} and --device-map exclude each other")


def _check_ranges(given: Mapping[str, Any]) -> None:
    """UserError for numbers out of range, of options that are no whole numbers."""
    temperature = given.get("sampling_temperature", 1)
    if not 0 < temperature < math.inf:
        raise UserError(f"--sampling-temperature {temperature}: it must be above 0")
    top_p = given.get("sampling_top_p", 1)
    if not 0 < top_p <= 1:
        raise UserError(f"--sampling-top-p {top_p}: it must be in (0, 1]")
    limit = given.get("task_limit", 1)
    if not (0 < limit < 1 or limit % 1 == 0 < limit):
        raise UserError(f"--task-limit {limit:g}: it must be a whole number, or a share below 1")


def check_options(args: argparse.Namespace) -> None:
    """UserError for options that are out of range, mean nothing or contradict each other."""
    if args.folders is not None:
        return
    given = {option.key: getattr(args, option.key) for option in OPTIONS if option.key in args.given}
    for owner, allowed in ALONE.items():
        others = [name for name in given if name not in (owner, *allowed)]
        if owner in given and others:
            other = others[0].replace("_", "-")
            alone = owner.replace("_", "-")
            raise UserError(f"--{other} means nothing beside --{alone}: leave one of them out")
    for option in OPTIONS:
        if option.key in given:
            _check_option(option, given)
    check_seed("--seed", args.seed)
    _check_text(given)
    _check_exclusions(args, given)
    _check_ranges(given)


def read_routing_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Configurations by name from a JSON file."""
    option = f"--routing-configs {path}"
    try:
        configs = json.loads(_read_text(path, "--routing-configs"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: not valid JSON: {error}") from error
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise UserError(f'{option}: it must hold {{"name": {{"method": ...}}}}')
    return configs


def grid_configuration(term: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a term "RULE:FIELD=NUMBER" of --configs: bh_alpha_0.01. Raises UserError."""
    head, _, value = term.partition("=")
    method, _, name = map(str.strip, head.partition(":"))
    rule = RULES[_choice("rule in --configs", method, tuple(RULES))]
    fields = {field.name: field for field in rule.fields if field.varies_by_layer}
    field = fields[_choice(f"field of rule {method!r} in --configs", name, tuple(fields))]
    try:
        number = float(value)
        number = int(number) if field.kind is int and number.is_integer() else number
        number = field.parse(number)
    except (ValueError, OverflowError):
        shown = value.strip()
        raise UserError(f"--configs {head}={shown}: {field.name} must be {field.allowed}") from None
    description = f"{rule.words}; {field.name} = {number:.15g}"
    return f"{method}_{name}_{number:.15g}", {"method": method, name: number, "description": description}


def choose_configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configurations that --suite, --configs, --routing-configs and --p-values ask for.

    Raises UserError where --p-values, --match-experts or --baseline has none to work on.
    """
    by_suite = suites()
    suite = by_suite[_choice("--suite", args.suite, tuple(by_suite))]
    own = read_routing_configs(args.routing_configs) if args.routing_configs else {}
    known = by_suite["all"] | suite | own
    testing = [rule.name for rule in RULES.values() if rule.uses_null]
    configs = {}
    for term in args.configs or [*suite, *own]:
        if "=" in term or ":" in term:
            name, config = grid_configuration(term)
        else:
            name = term
            config = known[_choice("configuration in --configs", name, tuple(known))]
        if args.p_values and config.get("method") in testing:
            config = config | {"p_values": args.p_values}
        configs[name] = resolve_config(name, config)
    rules = [RULES[config["method"]] for config in configs.values()]
    if args.p_values and not any(rule.uses_null for rule in rules):
        raise UserError(
            f"--p-values {args.p_values}: no chosen configuration takes a null; choose one with method "
            f"{' or '.join(testing)}, see --suite and --configs"
        )
    if args.match_experts is not None and all(rule.is_static for rule in rules):
        asked = ",".join(f"{number:g}" for number in args.match_experts)
        raise UserError(
            f"--match-experts {asked}: every chosen configuration is Top-K; choose one that "
            "adapts, see --suite and --configs"
        )
    keeps_names = len(args.match_experts or ()) < 2 and args.suite != "field"
    # Else the run itself will say: which Top-K is the model's own, and run beside others, is not known here.
    may_be_own = BASELINE not in configs and re.fullmatch(r"topk_\d+", args.baseline or "")
    if args.baseline is not None and keeps_names and not may_be_own:
        _choice("--baseline", args.baseline, tuple(configs))
    return configs


def choose_prompts(args: argparse.Namespace) -> Sequence[Prompt]:
    """The prompts that the options ask for: none where only a text is to be scored."""
    if args.dataset:
        return load_dataset_prompts(
            args.dataset,
            split=args.split,
            text_column=args.text_column,
            category_column=args.category_column,
            reference_column=args.reference_column,
            limit=args.limit or DEFAULT_LIMIT,
            random_seed=args.seed if args.random_rows else None,
        )
    if args.prompts:
        return load_prompts(args.prompts)
    return () if only_scores(args) else TEST_PROMPTS


def choose_documents(args: argparse.Namespace, prompts: Sequence[Prompt]) -> list[Document] | None:
    """The text that is to be scored; None for the default text, which waits for the model.

    Prompts that bring references of their own have their text: beside them no other is taken by itself.
    """
    if args.text == [NO_TEXT] or args.tasks:
        return []
    if args.text:
        if args.dataset:  # --split, --text-column and --limit are about the prompts then
            return load_text_documents(args.text)
        return load_text_documents(args.text, args.split, args.text_column, args.limit or DEFAULT_TEXT_LIMIT)
    has_references = prompts is not TEST_PROMPTS and any(prompt.get("reference") for prompt in prompts)
    for name in ("window", "max_windows"):
        if has_references and name in args.given:
            why = "the prompts bring references, which are scored instead of other text"
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} needs --text: {why}")
    return [] if has_references else None


def build_runner(args: argparse.Namespace) -> BHExperimentRunner:
    sampling = None
    if args.do_sample:
        sampling = {"temperature": args.sampling_temperature, "top_p": args.sampling_top_p}
        sampling = {name: value for name, value in sampling.items() if value is not None}
    return BHExperimentRunner(
        args.model,
        args.output,
        args.checkpoint_interval,
        args.device,
        not args.no_fp16,
        calibration_text=args.calibration_text,
        seed=args.seed,
        dtype=args.dtype,
        revision=args.revision,
        device_map=args.device_map,
        trust_remote_code=args.trust_remote_code,
        sampling=sampling,
        batch_size=args.batch_size,
        command=args.command,
        apply_chat_template=args.apply_chat_template,
        keep_precision=not args.no_resume,
    )


def choose_text(
    args: argparse.Namespace, documents: list[Document] | None, runner: BHExperimentRunner
) -> TextSample:
    """The windows that are scored, and that the runner may calibrate on what else there is of the text."""
    if documents is None:
        text = runner.default_text_to_score(args.window, args.max_windows)
    elif documents:
        window = min(args.window, runner.context)
        text = sample_text(documents, runner.tokenizer, window, args.max_windows)
    else:
        return TextSample([], [])
    runner.calibrate_on(text)
    return text


def matched_configs(
    args: argparse.Namespace, configs: dict[str, dict[str, Any]], runner: BHExperimentRunner
) -> dict[str, dict[str, Any]]:
    """The configurations, with knobs that keep the experts which --match-experts, or the suite, asks for."""
    targets = args.match_experts or ()
    if args.suite == "field" and not args.configs:
        configs = field_on(configs, runner.own_k)
        targets = targets or [share * runner.own_k for share in FIELD_SHARES]
    if not targets:
        return configs
    configs = {name: runner._resolve(name, config) for name, config in configs.items()}
    calibration = runner.calibration_for(configs.values()) or runner.calibration
    return match_ladder(configs, targets, calibration)


def measure(args: argparse.Namespace) -> Results | None:
    """Run what the options ask for; None in a process that leaves the report to the first."""
    configs = choose_configs(args)
    prompts = choose_prompts(args)
    documents = choose_documents(args, prompts)
    if args.apply_chat_template and not (prompts or args.tasks):
        raise UserError("--apply-chat-template needs prompts: --text is scored as it is, without a template")
    runner = build_runner(args)
    if "window" in args.given and args.window > runner.context:
        raise UserError(f"--window {args.window}: this model's context is {runner.context}")
    with contextlib.ExitStack() as stack:
        if runner.processes.rank == 0:
            stack.enter_context(log_to(args.output / LOG_FILE))
        text = choose_text(args, documents, runner)
        configs = matched_configs(args, configs, runner)
    options = {
        "resume": not args.no_resume,
        "retry_failed": args.retry_failed,
        "fail_fast": args.fail_fast,
        "baseline": args.baseline,
    }
    if args.tasks:
        limit = args.task_limit
        if limit is not None and limit >= 1:
            limit = int(limit)
        runner.run_tasks(args.tasks, configs, args.num_fewshot, limit, args.include_path, **options)
    else:
        samples = args.num_samples or 1
        runner.run_full_experiment_suite(
            configs,
            prompts,
            args.max_tokens,
            texts=text.scored,
            num_samples=samples,
            generate_batch=args.generate_batch,
            token_log=args.token_log,
            **options,
        )
    return runner.results if runner.processes.rank == 0 else None


def say(text: str) -> None:
    """Print to stdout, what it cannot show as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def run(args: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code: 0, or 1 when something failed."""
    check_options(args)
    if args.folders is not None:
        say(terminal_comparison(compare_results(args.folders, args.output)))
        logger.info(f"comparison: {args.output / COMPARISON_FILES[0]}")
        return 0
    if args.list_architectures:
        columns = [ReportColumn(title, title, "s") for title in ("model type", "class", "status", "why")]
        say(markdown_table(list_architectures(), columns))
        return 0
    results = Results.read(args.output) if args.analyze_only else measure(args)
    if results is None:
        return 0
    with log_to(args.output / LOG_FILE):
        written = write_report(results.generation, args.output, args.baseline)
        logger.debug(f"report: {args.output / REPORT}")
    say(f"\n{terminal_answer(written.analysis)}\n\n{terminal_paths(args.output)}")
    return 1 if written.failed or results.num_failed else 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, what a scheduler sends before it kills, or SIGHUP, what a closed terminal sends."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated(number)


def _end_on_signals(stack: contextlib.ExitStack) -> None:
    """SIGTERM and SIGHUP end a run as Ctrl-C does, until `stack` puts back what they did before."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handler
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What is ignored stays ignored: `nohup` starts a program that way.
        before = signal.SIG_IGN if number is None else signal.getsignal(number)
        if before is not signal.SIG_IGN:
            signal.signal(number, _terminate)
            stack.callback(signal.signal, number, before or signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 failures, 2 a wrong call, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    args = parse_options(argv)
    args.command = shlex.join([program_name(), *(sys.argv[1:] if argv is None else argv)])
    is_first = os.environ.get("RANK", "0") == "0"  # one of several processes speaks, but all may complain
    console = _ConsoleHandler(logging.INFO if is_first else logging.WARNING)
    console.setFormatter(_LineFormatter())
    level = logger.level
    signals = contextlib.ExitStack()
    _end_on_signals(signals)
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
        return 128 + (stop.number if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        signals.close()
        logger.removeHandler(console)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
