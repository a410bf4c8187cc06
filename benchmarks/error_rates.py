#!/usr/bin/env python3
"""How often the analysis claims what is not so: simulated score tables with a known truth, of the shapes that
runs have, through the whole chain windows -> documents -> equal compute -> adjusted p-values.

    python benchmarks/error_rates.py --repetitions 400               # the default run's shape
    python benchmarks/error_rates.py --repetitions 400 --shape field # 15 rules x 4 points x 3 stand-ins

A document has 1 to 7 windows, which share its difficulty, its sensitivity to fewer experts and the experts
that a rule spends on it, and have their own besides. The curve of static Top-K is a line, so that without
effect a rule lies on it wherever its mean falls; a window's own line is steeper or flatter. A rule predicts a
window as static Top-K does at the experts that it spends there, plus noise: of its document and of the window
itself, half of it in all rules alike. Rates are over whole runs: one claim
anywhere in a run without effect is a false verdict of it. Effects are in standard errors of a difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_bh_experiments as bh

OWN_K = 8
STEP = 0.006  # nats that static Top-K loses for each expert less
NOISE = 0.004  # of a rule's NLL, for a document and for a window
FIELD_RULES = 15
FIELD_POINTS = (4.0, 5.0, 6.0, 7.0)
STAND_INS = ("nothing", "mean", "linear:4")


class Population:
    """Windows of documents, drawn anew for each repetition."""

    def __init__(self, seed: int, documents: int, most_windows: int):
        self.random = np.random.default_rng(seed)
        sizes = self.random.integers(1, most_windows + 1, documents)
        self.document = np.repeat(np.arange(documents), sizes)
        self.documents = documents
        self.windows = len(self.document)
        self.num_tokens = np.where(self.random.random(self.windows) < 0.8, 255, 160)
        self.hard = 3.1 + self.mixed(0.3)
        self.sensitivity = np.exp(self.mixed(0.15) - 0.15**2)  # of mean 1
        self.common = self.mixed(NOISE)  # what all rules do alike
        self.static = {k: self.loss(k) for k in range(1, OWN_K + 1)}

    def mixed(self, scale: float) -> np.ndarray:
        """Of each window: what its document and what it itself adds, each normal with this deviation."""
        of_document = self.random.normal(0, scale, self.documents)[self.document]
        return of_document + self.random.normal(0, scale, self.windows)

    def loss(self, experts: np.ndarray | float) -> np.ndarray:
        """NLL of each window under static Top-K at so many experts."""
        return self.hard + STEP * (OWN_K - experts) * self.sensitivity

    def rule(self, experts: float, effect: float) -> tuple[np.ndarray, np.ndarray]:
        """NLL and experts of each window under a rule that spends `experts` on average."""
        spent = experts + self.mixed(0.12)
        noise = (self.common + self.mixed(NOISE)) / 2**0.5
        return self.loss(spent) + noise + effect, spent


class Tables:
    """Rows of text_scores.csv, as the analysis takes them."""

    def __init__(self, population: Population):
        self.population = population
        self.configs: dict[str, dict] = {}
        self.parts: list[pd.DataFrame] = []

    def add(self, name: str, config: dict, nll: np.ndarray, experts: np.ndarray | float) -> None:
        people = self.population
        config = bh.resolve_config(name, config)
        self.configs[name] = config
        columns = {
            "config_name": name, "status": "ok", "item_id": [f"w{i}" for i in range(people.windows)],
            "document": [f"d{d}" for d in people.document], "num_tokens": people.num_tokens, "nll": nll,
            "avg_experts_per_token": experts, "effective_experts": experts, "kl_to_own": 0.0,
            "top1_agreement": 1.0, "configuration": bh.configuration_cell(config),
        }  # fmt: skip
        self.parts.append(pd.DataFrame(columns))

    def add_ladder(self) -> None:
        for k, nll in self.population.static.items():
            self.add(f"topk_{k}", {"method": "topk", "k": k}, nll, float(k))

    def scores(self) -> pd.DataFrame:
        return pd.concat(self.parts, ignore_index=True)


DEFAULT_RULES = {"bh_strict": 4.3, "bh_moderate": 5.4, "bh_loose": 6.2, "bh_adaptive": 6.8}  # mean experts


class Counter:
    """Name -> how often, of how many."""

    def __init__(self) -> None:
        self.hits: dict[str, int] = {}
        self.tries: dict[str, int] = {}

    def add(self, name: str, hit: bool) -> None:
        self.hits[name] = self.hits.get(name, 0) + bool(hit)
        self.tries[name] = self.tries.get(name, 0) + 1

    def rates(self) -> dict[str, dict]:
        return {
            name: {"rate": round(self.hits[name] / tries, 4), "of": tries}
            for name, tries in self.tries.items()
        }


def default_run(seed: int, effects: dict[str, float]) -> tuple[dict, dict]:
    """Verdicts of a run of the default shape, and its shuffled twin against its rule."""
    shape = np.random.default_rng(seed)
    population = Population(seed + 1, int(shape.integers(60, 89)), int(shape.integers(2, 8)))
    tables = Tables(population)
    tables.add_ladder()
    for name, experts in DEFAULT_RULES.items():
        config = bh.ROUTING_CONFIGS[name]
        tables.add(name, config, *population.rule(experts, effects.get(name, 0.0)))
        if name == "bh_moderate":
            twin = population.rule(experts, effects.get(name, 0.0))
            shuffled = (f"{name}_shuffled", config | {"shuffle": True}, *twin)
    verdicts = bh.quality_verdicts(tables.scores(), tables.configs, "topk_8")
    tables.add(*shuffled)
    return verdicts, bh.shuffle_effects(tables.scores(), tables.configs)


def in_default_shape(repetitions: int) -> dict[str, dict]:
    counter = Counter()
    errors = {name: [] for name in DEFAULT_RULES}
    truth = {name: STEP * (OWN_K - experts) for name, experts in DEFAULT_RULES.items()}
    for seed in range(repetitions):
        verdicts, shuffled = default_run(10 * seed, {})
        counter.add(
            "false verdict in a run", any(verdicts[name]["verdict"] in ("better", "worse") for name in errors)
        )
        for name in errors:
            row = verdicts[name]
            errors[name].append(row["delta_nll"])
            counter.add("interval at equal compute", row["ci95_low"] <= 0 <= row["ci95_high"])
            low, high = row["delta_to_baseline_ci95_low"], row["delta_to_baseline_ci95_high"]
            counter.add("interval to the baseline", low <= truth[name] <= high)
        (effect,) = shuffled.values()
        counter.add("interval of a shuffled twin", effect["ci95_low"] <= 0 <= effect["ci95_high"])
    error = {name: float(np.std(values)) for name, values in errors.items()}
    at_the_margin = {name: bh.QUALITY_MARGIN - truth[name] for name in errors}
    for seed in range(repetitions):
        for what, effects in (
            ("all", {name: -3 * error[name] for name in error}),
            ("one of four", {"bh_moderate": -3 * error["bh_moderate"]}),
        ):
            verdicts, _ = default_run(10 * seed + 5, effects)
            for name in effects:
                counter.add(f"found: 3 standard errors, {what}", verdicts[name]["verdict"] == "better")
        verdicts, _ = default_run(10 * seed + 7, at_the_margin)
        claimed = any(verdicts[name]["equivalent_to_baseline"] for name in errors)
        counter.add("false equivalence in a run", claimed)
    return counter.rates()


def in_field_shape(repetitions: int, stand_ins: int, miss: float) -> dict[str, dict]:
    """miss: by how many experts the members of a ladder miss their target, at most."""
    counter = Counter()
    rules = [name for name, rule in bh.RULES.items() if not rule.is_static and not rule.uses_outputs]
    rules = rules[:FIELD_RULES]
    crossing = OWN_K - bh.FIELD_MARGINS["1 %"] / STEP
    for seed in range(repetitions):
        population = Population(seed, 60, 3)
        tables = Tables(population)
        tables.add_ladder()
        for rule in rules:
            for stand_in in STAND_INS[:stand_ins]:
                for place, target in enumerate(FIELD_POINTS):
                    experts = target + population.random.uniform(-miss, miss)
                    knob = bh.RULES[rule].knob
                    config = {"method": rule, knob.name: knob.default * (1 - 0.01 * place)}
                    name = f"{rule}_{place}_{stand_in.replace(':', '')}"
                    tables.add(name, config | {"stand_in": stand_in}, *population.rule(experts, 0.0))
        scores = tables.scores()
        field = bh.compare_field(scores, tables.configs, OWN_K)
        verdicts = bh.quality_verdicts(scores, tables.configs, "topk_8")
        counter.add(
            "false verdict in a run", any(v["verdict"] in ("better", "worse") for v in verdicts.values())
        )
        counter.add(
            "false claim of rule against rule in a run", any(p["significant"] for p in field["pairs"])
        )
        counter.add("pairs of a run", len(field["pairs"]))
        for pair in field["pairs"]:
            counter.add("interval of rule against rule", pair["ci95_low"] <= 0 <= pair["ci95_high"])
        for ladder in field["ladders"]:
            within = ladder["within"]["1 %"]
            if None not in (within["ci95_low"], within["ci95_high"]):
                holds = within["ci95_low"] <= crossing <= within["ci95_high"]
                kind = "static Top-K" if ladder["label"].startswith("topk") else "a rule"
                counter.add(f"interval of the fewest experts, {kind}", holds)
    return counter.rates()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--shape", choices=("default", "field"), default="default")
    parser.add_argument("--stand-ins", type=int, default=3, help="of the field: 1 to 3")
    parser.add_argument(
        "--miss", type=float, default=bh.MATCHING_ERROR, help="experts by which rules miss their targets"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    if args.shape == "default":
        rates = in_default_shape(args.repetitions)
    else:
        rates = in_field_shape(args.repetitions, args.stand_ins, args.miss)
    for name, rate in rates.items():
        print(f"{name}: {json.dumps(rate)}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
