"""Which tests see which function: a record of runs of every test file by itself, and the tests chosen from it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_config.parity.operators import Mutation
from tests.mutation.runs import ROOT, Recorder, run_tests

Record = dict[str, dict[str, Any]]
FOLDER = ROOT / ".cache" / "mutation" / "record"
AT_ONCE = 2
READERS = {
    "tests/test_twins.py": "kempnerforge_",
    "tests/test_annotations.py": "",
    "tests/test_parameters.py": "",
    "tests/config/test_settled.py": "shared_config/",
}
"""Test files that read sources or signatures instead of entering functions, and which paths they read."""
UNFIT = re.compile(
    r"(?i)mutant|mutated_source|in_a_process"  # every change of a line is an error to lists of bugs in source text
    r"|send_signal"  # depends on what else the machine does
)
"""What tests do that can't tell a bug."""
NOT_OF_TREE = "tests/mutation/"
"""Tests of this tool look at the tree that it is in."""


def read_record() -> Record:
    """All test files that were ever recorded."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return {about.pop("file"): about for about in every}


def record(tree: Path, file: str, seconds: float = 3600) -> int:
    """Run a test file in a process of its own, so that nothing is cached for it, and keep what its tests enter.

    Returns:
        How many tests that are.
    """
    unfit = unfit_tests((tree / file).read_text(encoding="utf-8"))
    said = run_tests(tree, [file], Recorder(tree, unfit), seconds)
    if "tests" not in said:
        print(file, said, (tree / "output.txt").read_text(), flush=True)
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"file": file, "tests": said["tests"], "functions": said["functions"]}
    (FOLDER / f"{file.replace('/', '.')}.json").write_text(json.dumps(about), encoding="utf-8")
    return len(about["tests"])


def unfit_tests(source: str) -> frozenset[str]:
    """Test functions of a file that, or what of the file they use, are `UNFIT`."""
    bodies = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    names = {name: {each.id for each in ast.walk(body) if isinstance(each, ast.Name)} for name, body in bodies.items()}
    used = {
        name: names[name] | {each.arg for each in ast.walk(bodies[name].args) if isinstance(each, ast.arg)}
        for name in bodies
    }
    unfit = {name for name, body in bodies.items() if UNFIT.search(name + ast.unparse(body))}
    while further := {name for name in bodies if used[name] & unfit} - unfit:
        unfit |= further
    return frozenset(name for name in unfit if name.startswith("test"))


def choose(recorded: Record, mutation: Mutation, killers: Mapping[str, int], seconds: float) -> list[tuple[str, float]]:
    """(test, seconds) of tests that run the function of a mutation, the most telling first, ``seconds`` in all.

    Tests that saw other bugs of the file come first, then the two of every test file that are fast and enter few other
    functions, so that they are about this one more than others are, and so on. A test whose function may have been
    cached by an earlier test of its file comes after those that are known to enter it.
    """
    name = f"{mutation.file}:{mutation.function}"
    enters = lambda functions: any(f == name if mutation.function else f.startswith(name) for f in functions)  # noqa: E731
    ranked = []
    for file, about in recorded.items():
        reads = mutation.file.startswith(READERS.get(file, "/"))
        if reads or enters(about["functions"]) or any(enters(test["functions"]) for test in about["tests"].values()):
            tests = [
                (not enters(test["functions"]), test["seconds"] * len(test["functions"]), node)
                for node, test in about["tests"].items()
            ]
            for rank, (cached, cost, node) in enumerate(sorted(tests)):
                ranked.append(
                    (-killers.get(node, 0), cached, rank // AT_ONCE, cost, node, about["tests"][node]["seconds"])
                )
    chosen, total = [], 0.0
    for *_, node, took in sorted(ranked):
        if total + took <= seconds:
            chosen.append((node, took))
            total += took
    return chosen
