#!/usr/bin/env python3
"""What the tests notice: one thing of the script is changed at a time, and the tests that reach it are run.

    pip install cosmic-ray pytest-cov
    python benchmarks/mutants.py --sample 150            # a random sample of places, seeded
    python benchmarks/mutants.py --sample 0              # every place: days
    python benchmarks/mutants.py --again survivors.json  # once more what survived, after new tests

A mutant is the script with one operator, number, keyword, condition or decorator changed, by the operators of
cosmic-ray. Places are drawn evenly, whatever their kind; of the changes possible at a place one is drawn.
Annotations are left out: nothing evaluates them. cosmic-ray's own command line starts a process with one test
command for each mutant, which here takes a quarter of a minute to import torch and minutes to test; this
program asks coverage which tests reach a line, runs those in a fork of a process that has imported the
libraries, the quickest first, and stops at the first that fails or after 60 seconds of tests.

Everything is done in a copy below `--work`, which keeps the map of lines to tests and the outcome, one JSON
object a line: place, change, "killed", "survived" or "timeout". What survived and why stands in mutants.md.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SCRIPT = "run_bh_experiments.py"
TESTS = "test_bh_experiments.py"
SECTIONS = ("Nulls", "Rules", "Routers", "The seam", "Calibration", "Tables", "Checkpoints", "Analysis")
# Of the tests: what takes minutes, or runs in processes of its own.
SKIPPED = "not embedded and not notebook_runs and not notebook_snippets and not killed_at"


def sections(source: str) -> dict[str, range]:
    """Name of a section -> its lines, by the numbered rulers."""
    starts = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), 1)
        if (match := re.match(r"# \d+\. ([^:]+)", line))
    ]
    ends = [number for number, _ in starts[1:]] + [len(source.splitlines()) + 1]
    return {name: range(start, end) for (start, name), end in zip(starts, ends, strict=True)}


def annotated_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(line, column) from and to of every annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if part is not None:
                spans.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return spans


def section_source(source: str, section: str) -> str:
    """The text of a section: whole statements, and quicker to parse than everything."""
    lines = sections(source)[section]
    return "".join(source.splitlines(keepends=True)[lines[0] - 1 : lines[-1]])


def find_places(source: str) -> dict[tuple, list[tuple[str, int]]]:
    """(section, line, column, kind of change) -> the changes possible there: (operator, occurrence in the
    section)."""
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    spans = annotated_spans(source)
    places = collections.defaultdict(list)

    class Look(Visitor):
        def __init__(self, name, section):
            self.name = name
            self.section = section
            self.operator = get_operator(name)()
            self.before = sections(source)[section][0] - 1
            self.number = 0

        def visit(self, node):
            for (line, column), _ in self.operator.mutation_positions(node):
                place = (line + self.before, column)
                if not any(low <= place < high for low, high in spans):
                    kind = self.name.split("/")[1].split("_")[0]
                    places[(self.section, *place, kind)].append((self.name, self.number))
                self.number += 1
            return node

    for section in SECTIONS:
        tree = get_ast(section_source(source, section))
        for name in operator_names():
            if "Variable" not in name:  # these need to be told which variables
                Look(name, section).walk(tree)
    return places


def mutate(source: str, mutant: dict) -> str:
    """The script with one thing changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    part = section_source(source, mutant["section"])
    changed = mutate_code(part, get_operator(mutant["operator"])(), mutant["occurrence"])
    return source.replace(part, changed)


def make_copy(folder: Path) -> None:
    """The project in a folder of its own: its files copied, its folders linked."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for path in HERE.iterdir():
        if path.is_file():
            shutil.copy(path, folder, follow_symlinks=False)
        elif path.name != ".git":
            (folder / path.name).symlink_to(path)


def make_map(work: Path) -> None:
    """Run the tests once and keep which of them reaches which line, and how long each takes."""
    make_copy(work / "map")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SKIPPED, "--cov"]
    command += ["--cov-context=test", "--cov-report=", f"--junitxml={work / 'durations.xml'}"]
    subprocess.run(command, cwd=work / "map", check=True)
    shutil.copy(work / "map" / ".coverage", work / "coverage.db")


class TestMap:
    """Which tests reach a place of the script, and how long each took, as `make_map` found."""

    def __init__(self, work: Path, source: str):
        import coverage

        self.tree = ast.parse(source)
        cases = xml.etree.ElementTree.parse(work / "durations.xml").iter("testcase")
        passed = [case for case in cases if len(case) == 0]  # with no word of a failure or a skip
        self.durations = {
            f"{TESTS}::{case.get('name')}": float(case.get("time")) for case in passed if case.get("name")
        }
        data = coverage.CoverageData(basename=str(work / "coverage.db"))
        data.read()
        script = next(path for path in data.measured_files() if path.endswith(SCRIPT))
        self.contexts = data.contexts_by_lineno(script)

    def statement_lines(self, line: int) -> set[int]:
        """A line, and where the smallest statement around it begins: there coverage counts it."""
        around = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
        ]
        starts = {max(node.lineno for node in around)} if around else set()
        return {line, *starts}

    def reaching(self, section: str, line: int) -> set[str]:
        """Tests that run a line; where it runs on import only, those of the section of the test file that has
        the section's name."""
        contexts = {context for at in self.statement_lines(line) for context in self.contexts.get(at, [])}
        tests = {context.rpartition("|")[0] for context in contexts} & set(self.durations)
        if tests:
            return tests
        source = (HERE / TESTS).read_text(encoding="utf-8")
        lines = next((lines for name, lines in sections(source).items() if name == section), range(0))
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        names = {function.name for function in functions if function.lineno in lines}
        return {test for test in self.durations if test.split("::")[1].split("[")[0] in names}

    def choose(self, tests: set[str], first: list[str], budget: float) -> list[str]:
        """`first`, then the quickest of the tests, as many as took `budget` seconds together."""
        chosen = list(first)
        spent = 0.0
        for test in sorted(tests, key=self.durations.get):
            spent += self.durations[test]
            if spent > budget and chosen:
                break
            chosen.append(test)
        return chosen


def run_tests(folder: Path, tests: list[str], limit_sec: float) -> str:
    """Run tests in a fork of this process, which has imported the libraries: how it ended."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        sink = os.open(folder / "output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        import pytest

        code = 70
        try:
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "--no-header", "--tb=line"]
            base = folder.parent / "tests"
            code = int(pytest.main([*arguments, f"--basetemp={base}", "-o", "addopts=", *tests]))
        finally:
            os._exit(code)
    until = time.monotonic() + limit_sec
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def interval(killed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    centre = (killed + z * z / 2) / (tried + z * z)
    half = z / (tried + z * z) * math.sqrt(killed * (tried - killed) / tried + z * z / 4)
    return centre - half, centre + half


def import_libraries() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # A mutant of the same size in the same second would be taken for the one before it.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import hypothesis
    import matplotlib.pyplot
    import pandas
    import pytest
    import scipy.optimize
    import scipy.stats
    import seaborn
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("MixtralForCausalLM", "OlmoeForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)
    del hypothesis, matplotlib, pandas, pytest, scipy, seaborn


def draw(args: argparse.Namespace, source: str) -> list[dict]:
    """The mutants to try: all that an earlier run found to survive, or a sample of places."""
    if args.again:
        tried = [json.loads(line) for line in args.again.read_text().splitlines()]
        return [mutant for mutant in tried if mutant["outcome"] == "survived"]
    places = find_places(source)
    print(f"{len(places)} places, {sum(map(len, places.values()))} mutants", flush=True)
    generator = random.Random(args.seed)
    keys = sorted(places)
    generator.shuffle(keys)
    drawn = []
    for section, line, column, kind in keys[: args.sample or None]:
        operator, occurrence = generator.choice(places[section, line, column, kind])
        place = {"section": section, "line": line, "column": column}
        drawn.append(place | {"operator": operator, "occurrence": occurrence})
    return drawn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="how many places; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for a mutant, at most")
    parser.add_argument("--work", type=Path, default=HERE / "results" / "mutants", help="where it works")
    parser.add_argument("--again", type=Path, help="outcomes whose survivors are tried again")
    parser.add_argument("--first", default="", help="tests that are run first for every mutant, by commas")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "coverage.db").exists():
        make_map(work)
    source = (HERE / SCRIPT).read_text(encoding="utf-8")
    mutants = draw(args, source)
    known = TestMap(work, source)
    first = [f"{TESTS}::{name}" for name in args.first.split(",") if name]
    import_libraries()
    make_copy(work / "copy")
    counts = collections.Counter()
    with (work / f"outcomes-{time.strftime('%H%M%S')}.json").open("w", encoding="utf-8") as log:
        for mutant in mutants:
            changed = mutate(source, mutant)
            (work / "copy" / SCRIPT).write_text(changed, encoding="utf-8")
            reaching = known.reaching(mutant["section"], mutant["line"])
            tests = known.choose(reaching, first, args.budget)
            start = time.monotonic()
            outcome = run_tests(work / "copy", tests, 3 * args.budget) if tests else "survived"
            counts[outcome] += 1
            diff = list(difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm=""))[3:]
            found = mutant | {"outcome": outcome, "sec": round(time.monotonic() - start, 1), "diff": diff}
            log.write(json.dumps(found | {"tests": len(tests)}) + "\n")
            log.flush()
            if outcome != "killed":
                print(outcome, json.dumps(found), flush=True)
    killed = counts["killed"] + counts["timeout"]
    low, high = interval(killed, sum(counts.values()))
    print(f"{sum(counts.values())} mutants, {dict(counts)}: {low:.1%} to {high:.1%} are killed (95 %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
