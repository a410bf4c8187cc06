"""What the harness costs beside the model itself. Each section prints one table.

    python benchmarks/harness.py                         # all sections, about half an hour on two idle cores
    python benchmarks/harness.py append resume           # only these
    python benchmarks/harness.py --quick                 # sizes and repeats divided by ten: does it work?

generation  The suite's Top-8 rows without references, so that nothing is scored: patched, recorded, timed,
            decoded to text, checkpointed, from the end of the warm-up until the results are returned. Over
            the bare `model.generate` calls of the same tokens, the two in turns. A Top-8 row generates a
            second time to measure the noise floor (`repeat_inference_time_sec`): the ratio without and with.
recorder    One decode with and without the recorder's hooks and observer: Top-8 and BH, on the embedded
            model and on two layers of OLMoE's full shape.
scoring     Text scored under static Top-1 to Top-8, tokens x rows per second, over lm-evaluation-harness's
            `loglikelihood_rolling` of the same documents, windows and model, at each batch size. A pass for
            each row, and one more in the first batch, where the model's own routing is scored twice.
memory      Peak memory of a process that scores 1,000 texts, and of one that scores 10,000; tiny model.
append      One result appended to a checkpoint of 100 and of 100,000.
resume      Opening the checkpoint of 100,000.
processes   The script on a text with one process and two, one thread each, in turns. Start-up and most of
            the analysis drop out: the time of a long text minus that of a short one. Started by `torchrun`,
            because `accelerate launch --cpu` starts a single process, whatever --num_processes says.
"""

import argparse
import contextlib
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pandas as pd
import torch
from common import EMBEDDED, ROOT, machine, medians, olmoe_config, print_header, print_row, seconds
from full_size import random_olmoe
from transformers import AutoTokenizer, GenerationConfig, OlmoeForCausalLM

import run_bh_experiments as bh

TOP_8 = {"topk_8": {"method": "topk", "k": 8}}
TEXTS = (ROOT / "README_BH_EXPERIMENTS.md", EMBEDDED / "README.md")
BH = {"method": "bh", "alpha": 0.05, "p_values": "flat"}
CONFIGS = "topk_1,topk_2,topk_3,topk_4,topk_5,topk_6,topk_7,topk_8,bh_strict,bh_moderate"


class TimedRunner(bh.BHExperimentRunner):
    """Notes in `warm` when the warm-up was over and the experiments began."""

    warm: float

    def _warm_up(self, *args: Any) -> None:
        super()._warm_up(*args)
        self.warm = time.perf_counter()


def done(frame: pd.DataFrame) -> None:
    """A failed experiment is fast: its time means nothing."""
    if (failed := frame[frame["status"] != "ok"]).size:
        raise SystemExit(f"{len(failed)} experiments failed: {failed['error'].iloc[0]}")


def random_texts(tokens: torch.Tensor) -> list[bh.TextItem]:
    """Texts to be scored, each its own document, from token ids [N, S]."""
    return [
        bh.TextItem(
            id=f"text:{number}",
            document=f"text:{number}",
            category="text",
            token_ids=ids.numpy(),
            context=1,
            num_bytes=len(ids),
            inputs={"number": str(number)},
        )
        for number, ids in enumerate(tokens)
    ]


def generation(scale: float) -> None:
    """Target: at most 1.10."""
    prompts = [{key: prompt[key] for key in ("id", "text")} for prompt in bh.TEST_PROMPTS]
    new_tokens = 50
    with tempfile.TemporaryDirectory() as folder:
        runner = TimedRunner(str(EMBEDDED), folder)
        tokenizer, model = runner.tokenizer, runner.model
        inputs = [tokenizer(prompt["text"], return_tensors="pt") for prompt in prompts]
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

        def bare() -> float:
            with torch.inference_mode():
                return seconds(
                    lambda: [
                        model.generate(
                            input_ids=one["input_ids"],
                            attention_mask=one["attention_mask"],
                            generation_config=settings,
                        )
                        for one in inputs
                    ]
                )

        def suite() -> tuple[float, float]:
            frame = runner.run_full_experiment_suite(TOP_8, prompts, new_tokens, resume=False)
            spent = time.perf_counter() - runner.warm
            done(frame)
            return spent, frame["repeat_inference_time_sec"].fillna(0).sum()

        turns = [(bare(), *suite(), bare()) for _ in range(max(2, round(7 * scale)))]
    first = median(before / 2 + after / 2 for before, _, _, after in turns)
    once = median((spent - repeat) / (before / 2 + after / 2) for before, spent, repeat, after in turns)
    twice = median(spent / (before / 2 + after / 2) for before, spent, _, after in turns)
    print_header("12 prompts x 50 tokens, Top-8", "seconds", "ratio")
    print_row("bare generate", f"{first:.2f}", "1.000")
    print_row("suite, without the repeats of the noise floor", f"{once * first:.2f}", f"{once:.3f}")
    print_row("suite, with them", f"{twice * first:.2f}", f"{twice:.3f}")


def recorder(scale: float) -> None:
    """Target: at most 1.03."""
    repeats, new_tokens = max(3, round(21 * scale)), 32
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=1, eos_token_id=0
    )
    ids = torch.arange(5, 21)[None]
    wide = random_olmoe(2, torch.bfloat16, "cpu")
    embedded, _ = bh.load_model(str(EMBEDDED), torch.device("cpu"), torch.bfloat16)
    print_header("model", "routing", "recorded, ms a token", "not recorded, ms a token", "ratio")
    for where, model in (("embedded", embedded), ("2 layers of OLMoE's shape", wide)):
        layers = bh.find_moe_layers(model)

        def timed(config: Any, recorded: bool, model=model, layers=layers) -> float:
            with contextlib.ExitStack() as stack:
                if not recorded:
                    nothing = mock.Mock(return_value=lambda counts: None)
                    stack.enter_context(mock.patch.object(bh.RoutingRecorder, "observer", nothing))
                recorder = stack.enter_context(bh.patched_routing(model, config, layers=layers))
                if not recorded:
                    model._forward_pre_hooks.clear()
                    for layer in layers:
                        layer.router._forward_hooks.clear()
                stack.enter_context(torch.inference_mode())
                options = {"attention_mask": torch.ones_like(ids), "generation_config": settings}
                # Reading the sums is part of recording.
                return seconds(lambda: (model.generate(ids, **options), recorder.total())) / new_tokens

        for name, config in (("Top-8", TOP_8["topk_8"]), ("BH", BH)):
            calls = {on: lambda on=on, c=config, timed=timed: timed(c, on) for on in (True, False)}
            times = medians(calls, repeats, warm_up=1)
            cells = (f"{1000 * times[on]:.2f}" for on in (True, False))
            print_row(where, name, *cells, f"{times[True] / times[False]:.3f}")


def scoring(scale: float) -> None:
    """Target: at least 1.0."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    window, batch_sizes = 256, (1, 8)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for path in TEXTS:
            files.append(Path(folder) / path.with_suffix(".txt").name)
            text = path.read_text(encoding="utf-8")
            files[-1].write_text(text[: round(len(text) * max(scale, 0.2))], encoding="utf-8")
        configs = {f"topk_{k}": {"method": "topk", "k": k} for k in range(1, 9)}
        print_header("batch size", "rows' tokens/s", "lm-eval, tokens/s", "ratio")
        for batch_size in batch_sizes:
            output = Path(folder) / f"out{batch_size}"
            runner = TimedRunner(str(EMBEDDED), output, use_fp16=False, batch_size=batch_size)
            texts = bh.text_windows(files, runner.tokenizer, window)
            tokens = sum(len(text.token_ids) - 1 for text in texts)

            def ours(runner=runner, texts=texts, tokens=tokens) -> float:
                runner.run_full_experiment_suite(configs, [], texts=texts, resume=False)
                spent = time.perf_counter() - runner.warm
                done(runner.results.scores)
                return len(configs) * tokens / spent

            reference = HFLM(
                pretrained=runner.model, tokenizer=runner.tokenizer, batch_size=batch_size, max_length=window
            )
            requests = [
                Instance("loglikelihood_rolling", {}, (file.read_text(encoding="utf-8"),), 0)
                for file in files
            ]
            all_tokens = sum(
                len(runner.tokenizer(request.args[0], add_special_tokens=False)["input_ids"])
                for request in requests
            )

            def theirs(reference=reference, requests=requests, all_tokens=all_tokens) -> float:
                return all_tokens / seconds(
                    lambda: reference.loglikelihood_rolling(requests, disable_tqdm=True)
                )

            rates = medians({"ours": ours, "theirs": theirs}, max(1, round(3 * scale)), warm_up=0)
            ratio = rates["ours"] / rates["theirs"]
            print_row(batch_size, f"{rates['ours']:.0f}", f"{rates['theirs']:.0f}", f"{ratio:.3f}")


def score_many(items: int) -> None:
    """For `memory`, in a process of its own: score short texts with a tiny model, print the peak in MiB."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = olmoe_config(num_hidden_layers=2, vocab_size=512, num_experts=8, num_experts_per_tok=2, **shape)
    texts = random_texts(torch.randint(2, 512, (items, 17)))
    with tempfile.TemporaryDirectory() as folder:
        model = OlmoeForCausalLM(config)
        runner = bh.BHExperimentRunner("tiny", folder, model=model, tokenizer=tokenizer, batch_size=64)
        configs = {"topk_8": {"method": "topk", "k": 2}, "topk_1": {"method": "topk", "k": 1}}
        runner.run_full_experiment_suite(configs, [], texts=texts)
        done(runner.results.scores)
    # Not `resource.getrusage`: its peak counts what the parent process held when it started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))


def memory(scale: float) -> None:
    """Target: at most 1.05."""
    few, many = round(1000 * scale), round(10_000 * scale)
    peaks = {}
    for items in (few, many):
        command = [sys.executable, __file__, "--score-many", str(items)]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[items] = float(finished.stdout.split()[-1])
    print_header("texts x 2 configurations", "peak memory, MiB", "ratio")
    for items, peak in peaks.items():
        print_row(f"{items:,}", f"{peak:.0f}", f"{peak / peaks[few]:.3f}")


def _row(number: int) -> dict[str, Any]:
    """A result as large as a real one: every column, with the text of a prompt and of 50 tokens."""
    row = dict.fromkeys(bh.GENERATION.names, 1.2345678901234567)
    words = {"prompt_text": "word " * 40, "generated_text": "word " * 50, "full_text": "word " * 90}
    key = {"kind": "generation", "config_name": "bh_strict", "prompt_id": f"item:{number}", "sample": 0}
    return row | words | key | {"status": "ok", "routing": "x" * 1000}


def _checkpoint(folder: str, rows: int) -> bh.Checkpoint:
    settings = {"model": "none"}
    checkpoint = bh.Checkpoint(Path(folder) / str(rows), settings, sync_every=rows)  # while it is filled
    for number in range(rows):
        checkpoint.append(_row(number))
    checkpoint.own.sync_every = bh.DEFAULT_CHECKPOINT_INTERVAL
    return checkpoint


def append(scale: float) -> None:
    """Target: at most 2. Means of 50 appends, every fifth of which waits for the disk as in a run."""
    many = round(100_000 * scale)
    numbers = itertools.count(many)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {rows: _checkpoint(folder, rows) for rows in (100, many)}
        calls = {
            rows: lambda c=checkpoint: (
                seconds(lambda: [c.append(_row(next(numbers))) for _ in range(50)]) / 50
            )
            for rows, checkpoint in checkpoints.items()
        }
        times = medians(calls, 9)
        for checkpoint in checkpoints.values():
            checkpoint.close()
    print_header("results in the checkpoint", "append one, ms", "ratio")
    for rows, spent in times.items():
        print_row(f"{rows:,}", f"{1000 * spent:.3f}", f"{spent / times[100]:.2f}")


def resume(scale: float) -> None:
    """Target: at most 10 s."""
    many = round(100_000 * scale)
    with tempfile.TemporaryDirectory() as folder:
        _checkpoint(folder, many).close()
        path = Path(folder) / str(many)
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            bh.Checkpoint(path, {"model": "none"}).close()
            spent.append(time.perf_counter() - start)
        size = (path / bh.CHECKPOINT_FILE).stat().st_size
    print_header("results in the checkpoint", "size, MB", "opened in, s")
    print_row(f"{many:,}", f"{size / 1e6:.0f}", f"{median(spent):.2f}")


def processes(scale: float) -> None:
    """Target: at least 1.7."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    long = text[: round(len(text) * max(scale, 0.3))]
    parts = {"short": long[: len(long) // 5], "long": long}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, part in parts.items():
            Path(folder, f"{size}.txt").write_text(part, encoding="utf-8")

        def run(count: int, size: str) -> float:
            output = Path(folder) / f"{size}_{count}"
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(count),
            ]
            command += [str(ROOT / "run_bh_experiments.py"), "--model", str(EMBEDDED), "--device", "cpu"]
            command += ["--no-fp16", "--configs", CONFIGS, "--text", f"{folder}/{size}.txt"]
            command += ["--window", "128", "--no-resume", "--output", str(output)]
            start = time.perf_counter()
            finished = subprocess.run(command, env=environment, capture_output=True, text=True)
            if finished.returncode:
                raise SystemExit(f"{count} processes failed:\n{finished.stderr[-2000:]}")
            spent = time.perf_counter() - start
            rows[size] = len(bh.Results.read(output).scores)
            return spent

        calls = {(count, size): lambda c=count, s=size: run(c, s) for count in (1, 2) for size in parts}
        times = medians(calls, max(1, round(3 * scale)), warm_up=0)
    print_header("processes", *(f"{rows[size]} rows, s" for size in parts), "rows/s", "ratio")
    extra = rows["long"] - rows["short"]
    rates = {count: extra / (times[count, "long"] - times[count, "short"]) for count in (1, 2)}
    for count, rate in rates.items():
        taken = (f"{times[count, size]:.1f}" for size in parts)
        print_row(count, *taken, f"{rate:.2f}", f"{rate / rates[1]:.2f}")


SECTIONS: dict[str, Callable[[float], None]] = {
    section.__name__: section
    for section in (generation, recorder, scoring, memory, append, resume, processes)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="sizes and repeats divided by ten")
    parser.add_argument("--score-many", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if args.score_many:
        return score_many(args.score_many)
    torch.manual_seed(0)
    print(machine())
    for name in args.sections or SECTIONS:
        print(f"\n{name}. {SECTIONS[name].__doc__}")
        SECTIONS[name](0.1 if args.quick else 1.0)


if __name__ == "__main__":
    main()
