"""Recording and comparing functions of any framework: what can't be is refused, with what is wrong and what is allowed.

The functions are of NumPy, so that no framework is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.parity import Map, Rule, compare_functions, mutate, nest, read_map
from shared_config.parity.foreign.named import file_of, is_named, recorded
from shared_config.parity.foreign.numpy_function import record
from shared_config.parity.foreign.options import fed_values
from shared_config.parity.foreign.states import aligned, first_difference, unshared
from shared_config.parity.traces import FORWARD, Trace

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
MADE = f"""
import numpy as np
from shared_config.parity.foreign.numpy_function import record
x = np.array({X.tolist()}, np.float32)
made = lambda **options: record(np.tanh, (x,), **options)
stubborn = lambda **options: record(np.tanh, (x,), dtype="float32")
empty = lambda **options: None
number = 3
"""


def doubled(x: np.ndarray) -> np.ndarray:
    return 2 * x


def of(x: np.ndarray = X, **options: Any) -> Trace:
    return record(doubled, (x,), deltas=0, **options)


def without(trace: Trace, *names: str) -> Trace:
    return Trace({name: value for name, value in trace.tensors.items() if name not in names}, trace.meta)


def renamed(trace: Trace, name: str) -> Trace:
    """The same with another name for each activation."""
    return Trace({f"{FORWARD}/{name}{place}": each for place, each in enumerate(trace.tensors.values())}, trace.meta)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int8"}, "^dtype = 'int8': must be one of .*, or None for the function's own$"),
    "deltas": ({"deltas": -1}, "^delta_runs = -1: must be 0 or more$"),
    "seed": ({"seed": -1}, "^seed = -1: must be 0 or more$"),
    "above": ({"above": -2}, "^above = -2: must be 0 or more$"),
    "only": ({"only": "output"}, r"^only = 'output': must be a list of patterns, as \['output'\]$"),
    "chunks": ({"chunks": 5}, "^chunks = 5: needs path"),
    "no chunks": ({"chunks": 0, "path": "there"}, "^chunks = 0: must be a number of bytes, 1 or more$"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options, message = OPTIONS[name]
    with pytest.raises(UserError, match=message):
        record(doubled, (X,), **options)


def test_weights_are_real() -> None:
    with pytest.raises(UserError, match=r"^weights: w: dtype = complex64: must be real, as with a last axis of 2$"):
        record(lambda weights, x: x, (X,), weights={"w": np.ones(2, np.complex64)})


def test_what_is_fed_was_made_by_a_plain_run() -> None:
    plain = of()
    assert fed_values(plain).keys() == {name.partition("/")[2] for name in plain.tensors}
    fed = of(refeed=plain)
    with pytest.raises(UserError, match=r"^refeed: the other trace was itself given recorded inputs; one of a plain"):
        of(refeed=fed)
    with pytest.raises(UserError, match=f"^refeed: the other trace holds no activation, as {FORWARD}/output$"):
        of(refeed=without(plain, *plain.tensors))
    with pytest.raises(UserError, match=r"^trace b: was fed with another recording than the one that it is compared"):
        compare_functions(record(np.tanh, (X,), deltas=0), fed)
    assert compare_functions(plain, fed).equal


def test_two_that_are_compared_had_one_input_and_have_something_in_common() -> None:
    plain, other = of(), of(X + 1)
    with pytest.raises(UserError, match=r"^inputs: other values: the two were called with different arrays$"):
        compare_functions(plain, other)
    turned = of(X.T.copy())
    with pytest.raises(UserError, match=r"different arrays; the numbers are the same: \[\[weights\]\] of the map says"):
        compare_functions(plain, turned)
    with pytest.raises(UserError, match=r"^the two have no activation in common: a map is needed \(--map\)$"):
        compare_functions(plain, renamed(plain, "mine"), common=True)


def test_seeds_of_what_was_drawn_may_differ() -> None:
    assert compare_functions(of(seed=0), of(seed=1)).equal


def test_what_one_side_alone_has_is_named_with_the_side() -> None:
    both = of()
    more = Trace({**both.tensors, f"{FORWARD}/extra": X}, both.meta)
    for pair, side in (((more, both), "numpy (a)"), ((both, more), "numpy (b)")):
        found = compare_functions(*pair)
        assert not found.equal
        said = f"forward: only {side} has {FORWARD}/extra: a map names it on the other side, --common leaves it out"
        assert said in found.notes
        assert compare_functions(*pair, common=True).equal


def test_named_recordings(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MADE)
    assert is_named(f"{file}:made")
    assert not is_named(str(file))
    assert (file_of(f"{file}:made"), file_of("package.module:made"), file_of("there")) == (str(file), None, None)
    assert recorded(f"{file}:made", {"dtype": "float64", "deltas": 0}).meta.dtype == "float64"
    plain = recorded(f"{file}:made", {"deltas": 0})
    assert recorded(f"{file}:made", {"deltas": 0, "refeed": plain}).meta.refed
    passed = "must pass its options on"
    for name, options, message in (
        ("made:", {}, "must be file.py:name or package.module:name$"),
        ("mode", {}, "mode is not there; it has made"),
        ("number", {}, "number is not callable; it has "),
        ("empty", {}, "returned NoneType: must be what record"),
        ("stubborn", {"dtype": "float64"}, f"dtype = 'float32' where 'float64' was asked for: {passed}"),
        ("stubborn", {"refeed": plain}, f"recorded without refeed: {passed}"),
        ("stubborn", {"only": ["output", "outer"]}, "^only = 'outer': matches no tensor of "),
    ):
        with pytest.raises(UserError, match=message):
            recorded(f"{file}:{name}", options)
    with pytest.raises(UserError, match=f"^{tmp_path / 'none.py'}: is no file; a recording is named as file.py:name"):
        recorded(f"{tmp_path / 'none.py'}:made", {})


def test_trees_are_made_of_names_that_fit() -> None:
    assert nest({"a.0.w": 1, "a.1.w": 2, "b": 3}) == {"a": [{"w": 1}, {"w": 2}], "b": 3}
    with pytest.raises(UserError, match=r"^a\.b: a is a tensor of its own$"):
        nest({"a": 1, "a.b": 2})
    with pytest.raises(UserError, match=r"^a: is a tensor, and a part of other names$"):
        nest({"a.b": 2, "a": 1})


def test_states_of_optimisers_are_those_of_parameters() -> None:
    parameters: dict[str, np.ndarray] = {"w": np.ones((2, 3)), "b": np.ones(3)}
    found = aligned({"m.w": np.ones((2, 3)), "step.b": np.array(2)}, parameters)
    assert found["step"]["b"].tolist() == [2, 2, 2]
    with pytest.raises(UserError, match=r"^state: m\.c: must be a kind, a dot and one of w, b$"):
        aligned({"m.c": np.ones(3)}, parameters)
    with pytest.raises(UserError, match=r"^state: m\.w: shape = \(3, 2\): must be \(\) or that of w, \(2, 3\)$"):
        aligned({"m.w": np.ones((3, 2))}, parameters)
    with pytest.raises(UserError, match=r"^state: m\.w: only one of the two runs keeps it$"):
        first_difference(found, {"m": {}, "step": found["step"]}, 1e-6)
    assert unshared(found, {"m": {}, "v": {}}) == ("step", "v")
    assert first_difference(found, found, 1e-6) == ("", 0.0)


def constant() -> None:
    pass


def test_bugs_are_planted_in_source() -> None:
    with pytest.raises(UserError, match=r"must be a function, class or module of Python with its source$"):
        mutate(len, constant)
    with pytest.raises(UserError, match=r"^component = .*: has no source in which a bug could be planted$"):
        mutate(constant, constant)


def test_maps_move_whole_tensors_into_parts_that_add_up(tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    for line in ("axis = 'rows'", "sizes = 3", "sizes = [1, 'b']"):
        file.write_text(f"[[weights]]\na = 'x'\nb = ['y', 'z']\n{line}\n")
        with pytest.raises(UserError, match=r"axis = .*, sizes = .*: must be a number and a list of numbers"):
            read_map(file)
    state = {"x": np.ones((4, 2))}
    moved = Map((Rule(("x",), ("y", "z"), sizes=(1, 3)),)).apply(state)
    assert {name: value.shape for name, value in moved.items()} == {"y": (1, 2), "z": (3, 2)}
    with pytest.raises(UserError, match=r"axis 0 of \(4, 2\): must be the sum of sizes = \[1, 2\]"):
        Map((Rule(("x",), ("y", "z"), sizes=(1, 2)),)).apply(state)
