"""Plant bugs drawn at random, one at a time, in a copy of the tree, and see whether a test fails.

    python -m tests.mutation --record                                   which tests enter which functions: once, slow
    python -m tests.mutation --folder shared_config --sample 100 --seed 7
    python -m tests.mutation --folder torch jax --workers 16            both at once, 16 mutants at a time
    python -m tests.mutation --folder torch --again results.jsonl       survivors of a sample once more

Each mutant runs in a process of its own, with the tests that enter its function (``selection``), until one fails. Any
red test kills, and a run that takes ten times as long as it should; both are told apart from failed assertions. What
survives is either in ``equivalent.toml``, with the reason why it changes nothing that anyone may rely on, or it wants
a test. Results go to .cache/mutation, a line per mutant; the table counts them by folder and kind of bug. The operators
are drawn with equal chances, so that frequent kinds don't crowd out the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared_config.parity.operators import Mutation, mutations_of
from tests.mutation.runs import ROOT, Reporter, copy_tree, run_tests
from tests.mutation.selection import NOT_OF_TREE, Record, choose, read_record, record
from tests.mutation.workers import each

EQUIVALENT = Path(__file__).parent / "equivalent.toml"
FOLDER = ROOT / ".cache" / "mutation"
SURVIVED = ("survived", "not covered")
FINE = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
FOLDERS = {
    "torch": ("kempnerforge_torch/model", "kempnerforge_torch/training"),
    "jax": ("kempnerforge_jax/model", "kempnerforge_jax/training"),
    "shared_config": tuple(f"shared_config/{folder}" for folder in ("contract", "interchange", "data", "parity")),
}


def all_mutations(folder: str) -> list[Mutation]:
    places = [ROOT / place for place in FOLDERS[folder]]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return [mutation for file in files for mutation in mutations_of(str(file.relative_to(ROOT)), file.read_bytes())]


def draw(mutations: Iterable[Mutation], count: int, seed: int) -> list[Mutation]:
    """A random sample: first the operator, then one of its mutations."""
    rng, by_operator = random.Random(seed), defaultdict(list)
    for mutation in mutations:
        by_operator[mutation.operator].append(mutation)
    drawn: dict[tuple[str, str, str, str], Mutation] = {}
    while len(drawn) < count:
        mutation = rng.choice(by_operator[rng.choice(sorted(by_operator))])
        if mutation.is_change((ROOT / mutation.file).read_bytes()):
            drawn[mutation.key] = mutation
    return list(drawn.values())


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """Reasons by the key of the mutation."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutation", [])
    return {(each["file"], each["function"], each["before"], each["after"]): each["reason"] for each in entries}


def plant(tree: Path, mutation: Mutation, recorded: Record, killers: Counter[str], seconds: float) -> dict[str, Any]:
    """How the tests took the mutation: its status, and the failure that killed it."""
    file = tree / mutation.file
    source, times = file.read_bytes(), file.stat()
    chosen = choose(recorded, mutation, killers, seconds)
    rounds = [chosen[:12], chosen[12:]]
    file.write_bytes(mutation.apply(source))
    try:
        for tests in filter(None, rounds):
            said = _run(tree, tests)
            while said.get("failure") and not _tells(tree, said["failure"]["test"], mutation, source):
                tests = [test for test in tests if not _is_of(test[0], said["failure"]["test"])]
                said = _run(tree, tests)
            if said.get("hangs") or said.get("dies"):
                return {"status": "hang" if "hangs" in said else "error", "tests": len(chosen)}
            if said["failure"]:
                killers[said["failure"]["test"]] += 1
                return {"status": said["failure"]["kind"], "tests": len(chosen), **said["failure"]}
            if said["status"] not in FINE:
                return {"status": "error", "tests": len(chosen), "said": f"pytest ended with {said['status']}"}
    finally:
        file.write_bytes(source)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return {"status": "survived" if chosen else "not covered", "tests": len(chosen)}


def _run(tree: Path, tests: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """What `run_tests` says of tests, with the seconds that each takes; once more if the process died."""
    files = list(dict.fromkeys(name.partition("::")[0] for name, _ in tests))
    said: dict[str, Any] = {"failure": {}, "status": 0}
    for _ in range(2 if tests else 0):
        said = run_tests(tree, files, Reporter([name for name, _ in tests]), 60 + 10 * sum(took for _, took in tests))
        if not said.get("dies"):
            break
    return said


def _tells(tree: Path, test: str, mutation: Mutation, source: bytes) -> bool:
    """Whether a test that failed among those of other files fails without them, and passes without the bug."""
    if test not in _SOUND:
        file, planted = tree / mutation.file, (tree / mutation.file).read_bytes()
        file.write_bytes(source)
        try:
            _SOUND[test] = _passes_alone(tree, test)
        finally:
            file.write_bytes(planted)
    return _SOUND[test] and not _passes_alone(tree, test)


_SOUND: dict[str, bool] = {}
"""Whether a test passes without any bug."""


def _is_of(test: str, failed: str) -> bool:
    """Whether a test is the one that failed, or of the file that could not be collected."""
    return test == failed or test.startswith(f"{failed}::")


def _passes_alone(tree: Path, test: str) -> bool:
    said = run_tests(tree, [test.partition("::")[0]], Reporter([test]), 600)
    return said.get("status") in FINE and not said["failure"]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Killed of planted, without equivalents, by operator and in all."""
    lines = []
    for name in [*sorted({result["operator"] for result in results}), "all"]:
        found = Counter(result["status"] for result in results if name in (result["operator"], "all"))
        planted = found.total() - found["equivalent"]
        killed = planted - found["survived"] - found["not covered"]
        lines.append(f"{name:20} {killed:4}/{planted:<4} {dict(sorted(found.items()))}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", choices=FOLDERS, nargs="+", default=["shared_config"])
    parser.add_argument("--sample", type=int, default=100, help="of each folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="of a processor, for the tests of a mutant")
    parser.add_argument("--workers", type=int, default=1, help="runs of tests beside each other")
    parser.add_argument("--record", nargs="*", metavar="TEST_FILE", help="record these files, or all")
    parser.add_argument("--again", type=Path, metavar="RESULTS", help="plant survivors of an earlier sample again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = copy_tree(Path(folder).resolve() / "tree")
        if arguments.record is not None:
            record_all(tree, arguments.record, arguments.workers)
            return 0
        drawn = [mutation for name in arguments.folder for mutation in wanted(name, arguments)]
        random.Random(arguments.seed).shuffle(drawn)  # so that the first few are a sample, too
        again = "again-" if arguments.again else ""
        results_file = FOLDER / f"{again}{'-'.join(arguments.folder)}-{arguments.seed}.jsonl"
        results = plant_all(tree, drawn, results_file, arguments.seconds, arguments.workers)
    print(table(results))
    return int(any(result["status"] in SURVIVED for result in results))


def record_all(tree: Path, files: Sequence[str], workers: int) -> None:
    """Add these test files, or all, to the record; those that took longest last time come first."""
    earlier = read_record()
    took = {file: sum(test["seconds"] for test in about["tests"].values()) for file, about in earlier.items()}
    every = sorted(str(file.relative_to(tree)) for file in tree.glob("tests/**/test_*.py"))
    asked = [file for file in files or every if not file.startswith(NOT_OF_TREE)]
    for line in each(_recorded, sorted(asked, key=lambda file: -took.get(file, 0)), tree, workers):
        print(line, flush=True)


def _recorded(tree: Path, file: str) -> str:
    return f"{file} {record(tree, file)} tests"


def wanted(folder: str, arguments: argparse.Namespace) -> list[Mutation]:
    """The sample of a folder, or what survived of an earlier one."""
    mutations = all_mutations(folder)
    if not arguments.again:
        return draw(mutations, arguments.sample, arguments.seed)
    earlier = [json.loads(line) for line in arguments.again.read_text().splitlines()]
    left = [result for result in earlier if result["status"] in SURVIVED]
    keys = {tuple(result[part] for part in ("file", "function", "before", "after")) for result in left}
    return [mutation for mutation in mutations if mutation.key in keys]


def plant_all(
    tree: Path, drawn: Sequence[Mutation], results_file: Path, seconds: float, workers: int
) -> list[dict[str, Any]]:
    """Results of all, each written as soon as it is known."""
    taken, results = partial(result_of, equivalents(), read_record(), Counter(), seconds), []
    results_file.parent.mkdir(parents=True, exist_ok=True)
    with results_file.open("w", encoding="utf-8") as file:
        for result in each(taken, drawn, tree, workers):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            key = (result[part] for part in ("file", "function", "before", "after"))
            print(f"{result['status']:11} {result['took']:6} {' | '.join(key)}", flush=True)
    return results


def result_of(
    known: Mapping[tuple[str, str, str, str], str],
    recorded: Record,
    killers: Counter[str],
    seconds: float,
    tree: Path,
    mutation: Mutation,
) -> dict[str, Any]:
    """What a mutation is, how the tests took it, and how long."""
    start = time.monotonic()
    if mutation.key in known:
        said: dict[str, Any] = {"status": "equivalent", "reason": known[mutation.key]}
    else:
        said = plant(tree, mutation, recorded, killers, seconds)
    return {**asdict(mutation), **said, "took": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())
