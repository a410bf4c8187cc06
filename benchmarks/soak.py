#!/usr/bin/env python3
"""A long run: does memory stay, does speed stay, is it resumed and analysed in reasonable time?

    python benchmarks/soak.py --rows 100000

Scores windows of 8 random tokens with the embedded model under one rule and the static ladder beside it.
After every 1,000 rows it notes the memory of the process and its processor time: speed is rows a second of
that, so that other work on the machine does not count.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import EMBEDDED

import run_bh_experiments as bh

WINDOW = 8  # tokens
DOCUMENT = 10  # windows
BATCH = 100  # windows in a forward pass


def resident_mb() -> float:
    """Memory of this process that is in use now, not at its most."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch:
    """Rows saved so far -> memory and processor time, at every 1,000th."""

    def __init__(self) -> None:
        self.rows = 0
        self.seen: dict[int, tuple[float, float]] = {}
        save = bh._Saver.save

        def counting(saver: bh._Saver, row: dict) -> None:
            save(saver, row)
            self.rows += 1
            if self.rows % 1000 == 0:
                self.seen[self.rows] = (resident_mb(), time.process_time())
                if self.rows % 10_000 == 0:
                    print(f"{self.rows} rows, {resident_mb():.0f} MB", flush=True)

        bh._Saver.save = counting

    def memory(self, rows: int) -> float:
        """MB at so many rows: the median of the five notes around it."""
        return median(mb for at, (mb, _) in self.seen.items() if abs(at - rows) <= 2000)

    def speed(self, first: int, last: int) -> float:
        """Rows a second of processor time."""
        return (last - first) / (self.seen[last][1] - self.seen[first][1])


def items(number: int, vocabulary: int) -> list[bh.TextItem]:
    tokens = torch.randint(2, vocabulary, (number, WINDOW), generator=torch.Generator().manual_seed(0))
    texts = []
    for number_of_text, ids in enumerate(tokens.tolist()):
        document, place = divmod(number_of_text, DOCUMENT)
        name = f"d{document}:{place}"
        inputs = {"text": bh.fingerprint(ids)}
        texts.append(bh.TextItem(name, f"d{document}", "random", ids, 1, 4 * len(ids), inputs))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.output or Path(tempfile.mkdtemp(prefix="soak-"))
    configs = {"bh_moderate": bh.ROUTING_CONFIGS["bh_moderate"] | {"p_values": "flat"}}

    def run() -> float:
        start = time.process_time()
        runner = bh.BHExperimentRunner(str(EMBEDDED), folder, device="cpu", use_fp16=False, batch_size=BATCH)
        vocabulary = runner.model.config.vocab_size
        texts = items(-(-args.rows // 9), vocabulary)  # the rule, and static Top-1 to Top-8
        runner.run_full_experiment_suite(configs, [], 1, texts=texts)
        return time.process_time() - start

    watch = Watch()
    spent = run()
    rows = watch.rows
    print(f"{rows} rows in {spent:.0f} s of processor time")
    tenth = max(1000, rows // 10 // 1000 * 1000)
    last = rows // 1000 * 1000
    growth = watch.memory(last) / watch.memory(tenth)
    print(f"memory at {last} rows over that at {tenth}: {growth:.3f}, {watch.memory(last):.0f} MB")
    ratio = watch.speed(last - tenth, last) / watch.speed(1000, tenth + 1000)
    first = watch.speed(1000, tenth + 1000)
    print(f"rows a second: {first:.0f} at the beginning, {ratio:.3f} of that at the end")
    print(f"resume: {run():.1f} s of processor time, {watch.rows - rows} rows run again")
    start = time.process_time()
    bh.write_report(bh.Results.read(folder).generation, folder)
    print(f"analysis, plots and report: {time.process_time() - start:.1f} s of processor time")
    print(f"{os.path.getsize(folder / 'checkpoints' / bh.CHECKPOINT_FILE) / 2**20:.0f} MB of checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
