"""Does the script choose well on a CPU, and what does a small or a large model pay? Each section one table.

    python benchmarks/speed.py                       # all sections, about ten minutes
    python benchmarks/speed.py dtype threads         # only these
    python benchmarks/speed.py --quick               # few repeats, small sizes: does it work?
    python benchmarks/speed.py memory --layers 16    # OLMoE's full shape: 14 GB on disk and in memory

dtype       Decoding in float32 and in bfloat16, in turns: what `--dtype auto` chooses, over the better of
            both. The embedded model, and experts of other widths, up to OLMoE's (2 layers, random weights).
decode      The embedded model under BH and under Top-8, in turns, made to write the same tokens, so that
            caches see the same experts. CPU time of the thread, a low quantile of the steps: other processes
            can only lengthen it.
threads     The suite of two prompts by itself on one thread, and beside two processes that compute all the
            time, with the number of threads that the script chooses, and with all.
memory      The script on a saved model of OLMoE's width: peaks of what its process holds by itself (copied)
            and of pages of files (mapped), over the size of the weights. Below it what the script says about
            the time of its steps, calibration among them.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import EMBEDDED, ROOT, machine, medians, olmoe_config, print_header, print_row
from full_size import decode, random_olmoe
from torch import Tensor
from transformers import AutoTokenizer, OlmoeForCausalLM

import run_bh_experiments as bh

WIDTHS = ((256, 128), (512, 256), (1024, 512), (2048, 768), (2048, 1024))  # hidden, of an expert
SUITE = ("--configs", "topk_8,bh_strict", "--max-tokens", "50", "--text", "none", "--dtype", "float32")


def dtype(args: argparse.Namespace) -> None:
    """Target: at most 1.05."""
    print_header("model", "float32, ms a token", "bfloat16, ms a token", "chosen", "chosen / better")
    sizes = [None, *(WIDTHS[:1] if args.quick else WIDTHS)]
    ids = torch.arange(5, 21)[None]
    for size in sizes:
        models = {}
        for name in ("float32", "bfloat16"):
            if size is None:
                models[name], _ = bh.load_model(str(EMBEDDED), torch.device("cpu"), getattr(torch, name))
            else:
                hidden, inner = size
                config = olmoe_config(
                    hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, vocab_size=4096
                )
                torch.manual_seed(0)
                models[name] = OlmoeForCausalLM(config).eval().to(getattr(torch, name))
        calls = {name: lambda model=model: decode(model, ids, 8)[1] for name, model in models.items()}
        times = medians(calls, 3 if args.quick else 7, warm_up=1)
        seconds = bh.projection_seconds(bh.expert_shapes(models["float32"]))
        chosen = min(seconds, key=seconds.__getitem__)
        name = "embedded" if size is None else f"hidden {size[0]}, experts of {size[1]}"
        cells = (f"{1000 * times[kind]:.2f}" for kind in ("float32", "bfloat16"))
        print_row(name, *cells, chosen, f"{times[chosen] / min(times.values()):.3f}")


class ForcedText:
    """A logits processor that makes the model write a given text, and notes the thread's CPU time a step."""

    def __init__(self, text: Tensor):
        self.text = text  # [1, S]
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.thread_time())
        forced = torch.full_like(scores, -1e9)
        forced[0, self.text[0, input_ids.shape[1]]] = 0
        return forced


def decode_small(args: argparse.Namespace) -> None:
    """Target: at most 1.03."""
    runner = bh.BHExperimentRunner(str(EMBEDDED), args.folder / "decode", device="cpu", dtype="float32")
    text = (ROOT / "models" / "olmoe-mini" / "README.md").read_text(encoding="utf-8")
    ids = runner.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, 100:180]
    names = ("topk_8", "bh_strict", "bh_moderate", "bh_loose")
    experts: dict[str, float] = {}

    def timed(name: str) -> float:
        forced = ForcedText(ids)
        settings = bh.generation_settings(runner.tokenizer, 64)
        with runner.routing(name) as recorder, torch.inference_mode():
            prompt = ids[:, :8]
            mask = torch.ones_like(prompt)
            runner.model.generate(
                prompt, attention_mask=mask, generation_config=settings, logits_processor=[forced]
            )
        experts[name] = recorder.total().row()["avg_experts_per_token"]
        steps = torch.tensor(forced.times).diff()
        return float(steps.quantile(0.2))

    with bh.computing_with(1):
        calls = {name: lambda name=name: timed(name) for name in names}
        times = medians(calls, 5 if args.quick else 15, warm_up=1)
    print_header("routing", "experts, mean", "CPU time a token, ms", "ratio to Top-8")
    for name, spent in times.items():
        print_row(name, f"{experts[name]:.2f}", f"{1000 * spent:.3f}", f"{spent / times['topk_8']:.3f}")


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes compute all the time inside the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def suite_seconds(args: argparse.Namespace, threads: int | None) -> float:
    """Wall time of the suite with so many threads, None: as many as the script chooses."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("The cat sat on the\nOnce upon a time, there was a\n", encoding="utf-8")
        command = [sys.executable, str(ROOT / "run_bh_experiments.py"), "--model", str(EMBEDDED), *SUITE]
        command += ["--prompts", str(prompts), "--output", str(Path(folder) / "out")]
        environment = {name: value for name, value in os.environ.items() if name not in bh.THREAD_VARIABLES}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return time.perf_counter() - start


def threads(args: argparse.Namespace) -> None:
    """Target: at most 2.5."""
    most = os.cpu_count() or 1
    turns = 1 if args.quick else 3
    taken: dict[str, list[float]] = {"alone, 1 thread": [], "beside two, chosen": []}
    if not args.quick:
        taken[f"beside two, {most} threads"] = []
    for _ in range(turns):
        taken["alone, 1 thread"].append(suite_seconds(args, 1))
        with busy(2):
            taken["beside two, chosen"].append(suite_seconds(args, None))
            if not args.quick:
                taken[f"beside two, {most} threads"].append(suite_seconds(args, most))
    print_header("suite of 4 experiments", "seconds, whole command", "ratio")
    alone = median(taken["alone, 1 thread"])
    for name, times in taken.items():
        print_row(name, f"{median(times):.1f}", f"{median(times) / alone:.2f}")


def process_memory(pid: int) -> dict[str, int]:
    """Bytes of a process now: copied (its own) and mapped (pages of files, which the system can drop)."""
    memory = {"copied": 0, "mapped": 0}
    with contextlib.suppress(OSError):  # it has ended
        # Counters; to read smaps instead walks all pages, and holds the process up for as long.
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
        memory["copied"] = sizes.get("RssAnon:", 0)
        memory["mapped"] = sizes.get("RssFile:", 0)
    return memory


def memory(args: argparse.Namespace) -> None:
    """Target: copied at most 1.25 of the weights."""
    model = random_olmoe(args.layers, torch.bfloat16, "cpu")
    saved = args.folder / "model"
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(saved)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    del model
    command = [sys.executable, str(ROOT / "run_bh_experiments.py"), "--model", str(saved)]
    command += ["--output", str(args.folder / "memory"), "--max-tokens", "4", "--dtype", "bfloat16"]
    prompts = args.folder / "prompts.txt"
    prompts.write_text("The cat sat on the\n", encoding="utf-8")
    command += ["--prompts", str(prompts), "--configs", "topk_8,bh_strict"]
    # Four windows are scored, and the nulls come from the rest of the same text, as in a first run.
    command += ["--text", str(EMBEDDED / "README.md"), "--max-windows", "4"]
    peak = {"copied": 0, "mapped": 0, "both": 0}
    log = args.folder / "memory.log"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream) as process,
    ):
        while process.poll() is None:
            now = process_memory(process.pid)
            now["both"] = now["copied"] + now["mapped"]
            peak = {name: max(peak[name], size) for name, size in now.items()}
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the script ended with {process.returncode}")
    print_header(f"{args.layers} layers, weights of {weights / 1e9:.2f} GB", "peak, GB", "/ weights")
    for name, size in peak.items():
        print_row(name, f"{size / 1e9:.2f}", f"{size / weights:.2f}")
    print(*(line for line in log.read_text(encoding="utf-8").splitlines() if " in " in line), sep="\n")


SECTIONS: dict[str, Any] = {"dtype": dtype, "decode": decode_small, "threads": threads, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all if none"
    )
    parser.add_argument("--layers", type=int, default=2, help="of the model whose memory is measured")
    parser.add_argument("--quick", action="store_true", help="few repeats, small sizes")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if args.quick:
        args.layers = 1
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.sections or SECTIONS:
            SECTIONS[name](args)


if __name__ == "__main__":
    main()
