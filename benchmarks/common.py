"""What the benchmark programs share: interleaved timing, the Markdown table, the machine in one line.

With CPU_TIME=1 in the environment they count CPU time of the process instead of wall time. On a machine that
does other work nothing else can be compared; with OMP_NUM_THREADS=1, because threads that wait count as well.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import OlmoeConfig

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models" / "olmoe-mini"
sys.path.insert(0, str(ROOT))  # so that every program finds run_bh_experiments, wherever it is started


clock = time.process_time if os.environ.get("CPU_TIME") else time.perf_counter


def olmoe_config(**changes: Any) -> OlmoeConfig:
    """The shape of OLMoE-1B-7B with changes, for the tokens of the embedded model: 0 ends a text, 1 pads."""
    # Its experts are 1024 wide, where the default of `OlmoeConfig` is 2048.
    return OlmoeConfig(**{"intermediate_size": 1024, "pad_token_id": 1, "eos_token_id": 0, **changes})


def machine(device: str = "cpu") -> str:
    """Versions and hardware, for the line above a table."""
    kind = "CPU time, " if os.environ.get("CPU_TIME") else ""
    where = f"{kind}{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {where}"


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Time of one call; on a GPU until its kernels are done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def medians(
    calls: Mapping[Hashable, Callable[[], float]], repeats: int, warm_up: int = 3
) -> dict[Hashable, float]:
    """Median of what each call returns. They take turns: a machine that slows down slows all alike."""
    taken = {name: [] for name in calls}
    for turn in range(repeats + warm_up):
        for name, call in calls.items():
            value = call()
            if turn >= warm_up:
                taken[name].append(value)
    return {name: median(values) for name, values in taken.items()}


def print_header(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns), flush=True)


def print_row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
