"""What the operators plant, how a sample is drawn, and what counts as a kill."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from shared_config.parity.operators import Mutation, mutations_of
from tests.mutation.__main__ import draw, equivalents, table
from tests.mutation.runs import ROOT
from tests.mutation.selection import choose, unfit_tests

SOURCE = '''
"""Text of 3 < 4."""
import torch

LIMIT: int = 5

class Layer:
    """Doc."""

    def forward(self, x, mask=None):
        if x.shape[0] < LIMIT and mask is not None:
            raise ValueError(f"{x}: must be {LIMIT + 1}")
        x = torch.add(x, mask, alpha=2.0)
        x += 1
        self.keep(x)
        return x[: len(x)].to(torch.float32) * -1
'''
PLANTED = {
    ("constant", "LIMIT: int = 6"),
    ("comparison", "if x.shape[0] <= LIMIT and mask is not None:"),
    ("comparison", "if x.shape[0] < LIMIT and mask is None:"),
    ("dropped term", "if ((mask is not None)):"),
    ("negated condition", "if not (x.shape[0] < LIMIT and mask is not None):"),
    ("removed check", "if False:"),
    ("swapped arguments", "x = torch.add(mask, x, alpha=2.0)"),
    ("dropped argument", "x = torch.add(x, mask)"),
    ("constant", "x = torch.add(x, mask, alpha=4.0)"),
    ("removed call", "x = x"),
    ("removed update", "pass"),
    ("removed call", "pass"),
    ("off by one", "return x[: len(x) + 1].to(torch.float32) * -1"),
    ("dtype", "return x[: len(x)].to(torch.bfloat16) * -1"),
    ("arithmetic", "return x[: len(x)].to(torch.float32) / -1"),
    ("dropped term", "return x[: len(x)].to(torch.float32)"),
    ("dropped sign", "return x[: len(x)].to(torch.float32) * 1"),
}


def test_each_operator_plants_its_bugs_and_leaves_text_annotations_and_messages_alone() -> None:
    found = mutations_of("a.py", SOURCE.encode())
    assert {(each.operator, each.after) for each in found} >= PLANTED
    for each in found:
        assert each.is_change(SOURCE.encode())
        assert each.function == ("" if each.before.startswith("LIMIT") else "Layer.forward")
        changed = ast.parse(each.apply(SOURCE.encode()))
        assert ast.get_docstring(changed) == "Text of 3 < 4."
        assert 'f"{x}: must be {LIMIT + 1}"' in each.apply(SOURCE.encode()).decode()


def test_a_mutation_keeps_its_key_where_lines_move() -> None:
    moved = "\n\nOTHER = 3\n" + SOURCE.replace("import torch\n", "import torch\n\n\n")
    keys = {each.key for each in mutations_of("a.py", SOURCE.encode())}
    assert keys < {each.key for each in mutations_of("a.py", moved.encode())}


def test_a_sample_is_drawn_by_its_seed_from_all_operators() -> None:
    file = "shared_config/contract/schedule.py"
    every = mutations_of(file, (ROOT / file).read_bytes())
    first = draw(every, 30, 1)
    assert first == draw(every, 30, 1)
    assert first != draw(every, 30, 2)
    assert len({each.key for each in first}) == 30
    assert len({each.operator for each in first}) > 5


def test_every_equivalent_mutation_still_exists() -> None:
    known: dict[str, set[tuple[str, str, str, str]]] = {}
    for key, reason in equivalents().items():
        file = key[0]
        if file not in known:
            known[file] = {each.key for each in mutations_of(file, (ROOT / file).read_bytes())}
        assert key in known[file], key
        assert len(reason.split()) > 2


def recorded(*tests: tuple[str, float, list[str]], also: list[str]) -> dict:
    named = {name: {"seconds": seconds, "functions": functions} for name, seconds, functions in tests}
    return {"tests": named, "functions": also}


def test_tests_that_enter_the_function_are_chosen_each_file_in_turn() -> None:
    record = {
        "a": recorded(("a::1", 3.0, ["m.py:f"]), ("a::2", 2.0, ["m.py:f"]), ("a::3", 1.0, ["m.py:f"]), also=[]),
        "b": recorded(("b::1", 0.1, ["m.py:g"]), ("b::2", 9.0, ["m.py:f"]), also=["m.py:f"]),
        "c": recorded(("c::1", 0.1, ["n.py:f"]), also=[]),
    }
    mutation = Mutation("m.py", "f", "", 0, 0, "", "", "")
    names = [name for name, _ in choose(record, mutation, {}, 100)]
    assert names == ["a::3", "a::2", "b::2", "a::1", "b::1"]
    assert choose(record, mutation, {"a::1": 1}, 5) == [("a::1", 3.0), ("a::3", 1.0), ("b::1", 0.1)]
    record["a"]["tests"]["a::3"]["functions"] += ["n.py:g", "n.py:h", "n.py:i"]
    names = [name for name, _ in choose(record, mutation, {}, 100)]
    assert names == ["a::2", "a::1", "b::2", "a::3", "b::1"], "one that enters much is about it less"


def test_tests_that_read_sources_see_every_function_of_them() -> None:
    record = {"tests/test_twins.py": recorded(("twins::1", 1.0, []), also=[])}
    record["tests/config/test_settled.py"] = recorded(("settled::1", 1.0, []), also=[])
    for file, name in (("kempnerforge_jax/model/a.py", "twins::1"), ("shared_config/a.py", "settled::1")):
        chosen = [(name, 1.0)]
        assert choose(record, Mutation(file, "f", "", 0, 0, "", "", ""), {}, 100) == chosen


def test_the_table_leaves_equivalents_out() -> None:
    statuses = ["assertion", "error", "hang", "survived", "not covered", "equivalent"]
    assert (
        table([{"operator": "constant", "status": status} for status in statuses])
        .splitlines()[-1]
        .startswith(f"{'all':20}    3/5")
    )


END_TO_END = """
import sys
from collections import Counter
from pathlib import Path
from tests.mutation import __main__, runs, selection
from shared_config.parity.operators import mutations_of
tree = Path(sys.argv[1])
runs.LIBRARIES, runs.PACKAGES = (), ("shared_config",)
runs.ROOT = selection.ROOT = __main__.ROOT = tree
selection.FOLDER = tree / "record"
runs.prepare(tree)
__main__.record_all(tree, [], 2)
recorded = selection.read_record()
(tree / "gone").touch()
known = {"seconds": 0.1, "functions": ["shared_config/a.py:j"]}
recorded["tests/test_d.py"]["tests"]["tests/test_d.py::test_of_before"] = known
source = (tree / "shared_config/a.py").read_bytes()
for mutation in mutations_of("shared_config/a.py", source):
    if mutation.after not in sys.argv[2:]:
        continue
    said = __main__.plant(tree, mutation, recorded, Counter(), 60)
    print(mutation.after, "|", said["status"], flush=True)
assert (tree / "shared_config/a.py").read_bytes() == source
"""
PROJECT = {
    "shared_config/__init__.py": "",
    "shared_config/a.py": """
def f(x):
    return x + 1

def g(x):
    return x % 3  # g

def h(x):
    return x * 7

def i(x):
    return x % 5  # i

def j(x):
    return x * 9  # j

FIRST = [0][3 % 3]  # at import

def k(x):
    return x * 3 # k
""",
    "tests/__init__.py": "",
    "tests/conftest.py": "",
    "tests/test_a.py": """
from shared_config import a

def test_f():
    assert a.f(1) == 2

def test_g():
    [0, 0][a.g(4)]

def test_broken():
    assert a.f(1) == 3
""",
    "tests/test_b.py": """
from shared_config import a
from tests import test_a

def test_alone():
    a.h(2)
    assert not hasattr(test_a, "spoilt")
""",
    "tests/test_c.py": """
from shared_config import a
from tests import test_a
test_a.spoilt = True

def test_beside():
    a.h(2)
""",
    "tests/test_d.py": """
from pathlib import Path
from shared_config import a

def test_of_what_is_gone():
    a.h(2)
    assert not Path("gone").exists()
""",
    "tests/test_e.py": """
from pathlib import Path
from shared_config import a
assert not Path("gone").exists()

def test_in_what_can_not_be_imported():
    a.h(2)
    a.i(2)
""",
}


def test_a_failed_assertion_and_a_crash_kill_and_are_told_apart(tmp_path: Path) -> None:
    """What fails without a bug as well kills none."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = {
        "return x - 1": "assertion",
        "return x # g": "error",
        "return x // 3 # g": "survived",
        "return x * 8": "survived",
        "return x // 5 # i": "survived",
        "return x * 10 # j": "survived",
        "FIRST = [0][3 // 3] # at import": "error",
        "return x # k": "not covered",
    }
    command = [sys.executable, "-c", END_TO_END, str(tmp_path), *expected]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert dict(line.split(" | ") for line in done.stdout.splitlines() if " | " in line) == expected


LISTED = """
from tests.mutants import BACKENDS, planted

def survey(backend):
    return not_killed(MUTANTS, backend)

@pytest.fixture(scope="module")
def found():
    return {backend: survey(backend) for backend in BACKENDS}

@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permutation_is_one(backend):
    assert check(backend)

def test_of_a_list(backend):
    assert not survey(backend)

def test_of_a_fixture(found):
    assert found

def test_of_a_signal(process):
    process.send_signal(2)
"""


def test_tests_of_bugs_in_source_text_are_left_out_and_others_of_their_files_are_not() -> None:
    assert unfit_tests(LISTED) == {"test_of_a_list", "test_of_a_fixture", "test_of_a_signal"}
    assert unfit_tests(LISTED.replace("not_killed(MUTANTS, backend)", "backend")) == {"test_of_a_signal"}
