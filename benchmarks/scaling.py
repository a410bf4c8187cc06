"""How the time of a run grows with items, experts, layers and processes, on tiny random OLMoE models.

    python benchmarks/scaling.py            # ten minutes on two idle cores
    python benchmarks/scaling.py --quick

One quantity varies, the others stay: 32 texts of 64 tokens (128 where processes vary), 64 experts, 4 layers,
one process. Each point is a whole suite on scored text, BH and the static curve from Top-1 to the model's own
Top-8, from the end of the warm-up to the results table, in processes of its own with one thread each. Points
take turns; medians. "to the first": time per row of scores, relative to the group's first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from common import EMBEDDED, machine, medians, olmoe_config, print_header, print_row
from harness import TimedRunner, done, random_texts
from transformers import AutoTokenizer, OlmoeForCausalLM

BASE = {"texts": 32, "experts": 64, "layers": 4, "processes": 1}
POINTS = {"texts": (32, 128, 512), "experts": (16, 64, 128), "layers": (2, 4, 8), "processes": (1, 2)}
CONFIGS = {"bh": {"method": "bh", "p_values": "flat", "alpha": 0.1}}
ROWS_OF_A_TEXT = 9  # BH and Top-1 to Top-8


def one_suite(number: int, experts: int, layers: int) -> None:
    """One suite, in this process."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = OlmoeForCausalLM(
        olmoe_config(**shape, vocab_size=4096, num_experts=experts, num_hidden_layers=layers)
    )
    texts = random_texts(torch.randint(2, 4096, (number, 65)))
    runner = TimedRunner(
        *("random", os.environ["SCALING_OUTPUT"]),
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(EMBEDDED),
        batch_size=8,
    )
    runner.run_full_experiment_suite(CONFIGS, [], texts=texts)
    spent = time.perf_counter() - runner.warm
    done(runner.results.scores)
    assert len(runner.results.scores) == number * ROWS_OF_A_TEXT
    if runner.processes.rank == 0:
        print(spent)


def timed(point: dict[str, int]) -> float:
    """Seconds of the experiments of one suite, in processes of its own."""
    command, processes = [sys.executable], point["processes"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--one", *(str(point[name]) for name in ("texts", "experts", "layers"))]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SCALING_OUTPUT": folder}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{point} failed:\n{run.stderr[-2000:]}")
        return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, two points of each")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one_suite(*args.one)
    points = {(name, value): BASE | {name: value} for name, values in POINTS.items() for value in values}
    if args.quick:
        args.repeats, points = (
            1,
            {key: point for key, point in points.items() if key[1] in POINTS[key[0]][:2]},
        )
    for processes in POINTS["processes"]:
        points["processes", processes] |= {"texts": 4 * BASE["texts"]}  # enough to share
    calls = {key: lambda p=point: timed(p) for key, point in points.items()}
    times = medians(calls, args.repeats, warm_up=0)
    print(f"{machine()}; 1 thread a process; medians of {args.repeats}")
    print_header("varied", "value", "texts", "seconds", "ms a row", "to the first")
    first = {}
    for (name, value), spent in times.items():
        texts = points[name, value]["texts"]
        each = spent / texts / ROWS_OF_A_TEXT
        ratio = each / first.setdefault(name, each)
        print_row(name, value, texts, f"{spent:.1f}", f"{1000 * each:.1f}", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
