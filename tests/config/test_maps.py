"""Maps of names and layouts: what they move comes back bit by bit, and what they can't move is said at once."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.errors import UserError
from shared_config.parity import (
    Map,
    Rule,
    compare_functions,
    make_map,
    mutate,
    parse_op,
    propose_map,
    read_map,
    transfer,
)
from shared_config.parity.foreign import layout
from shared_config.parity.foreign.layout import NUMBERS
from shared_config.parity.foreign.transfer import rules_of_inputs
from shared_config.parity.parts import part_errors, unpacked
from shared_config.parity.traces import Trace, TraceMeta

SHAPE = (8, 12)
OPS = ("transpose", "swap 0 1", "permute 1 0", "interleave 2 axis=0", "halves 3 axis=-1", "flip axis=1")


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, ...]:
    """Operations that a matrix of `SHAPE` allows in this order."""
    found: list[str] = []
    array = np.zeros(SHAPE)
    for text in draw(
        st.lists(st.sampled_from([*OPS, "split 4 axis=0", "split 2 axis=-1", "merge 2 axis=0"]), max_size=4)
    ):
        try:
            array = parse_op(text).apply(array)
        except (ValueError, IndexError):
            continue
        found.append(text)
    return tuple(found)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Map, dict[str, np.ndarray]]:
    """A map of every kind of rule, and weights that it fits."""
    layers, layout = draw(st.integers(1, 12)), draw(layouts())
    sizes = draw(st.sampled_from([(), (8, 8), (3, 5)]))
    parts = sizes or (4, 4)
    shapes = {"q": SHAPE, "g": (parts[0], 6), "u": (parts[1], 6), "n": (5,), "e": (3, 2)}
    weights = {f"layers.{n}.{k}": drawn(*shapes[k], seed=n) for n in range(layers) for k in shapes}
    rules = (
        Rule(("layers.*.q",), ("blocks.*.wq",), tuple(map(parse_op, layout))),
        Rule(("layers.*.g", "layers.*.u"), ("blocks.*.gu",), (), 0, sizes),
        Rule(("layers.*.n",), ("norms",), (parse_op("flip axis=0"),)),
    )
    return Map(rules), weights


@given(maps())
def test_weights_go_there_and_back_bit_by_bit(case: tuple[Map, dict[str, np.ndarray]]) -> None:
    names, weights = case
    moved = transfer(weights, names)
    assert "norms" in moved
    assert moved["norms"].shape[0] == sum(name.endswith(".n") for name in weights)
    back = transfer(moved, names.inverse(), {name: value.shape for name, value in weights.items()})
    assert list(back) == list(weights)
    for name, value in weights.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


@given(case=maps())
def test_a_map_reads_what_it_wrote(
    case: tuple[Map, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("maps") / "map.toml"
    case[0].write(file)
    assert read_map(file) == case[0]


def test_each_operation_moves_what_it_says() -> None:
    x = np.arange(24).reshape(4, 6)
    expected = {
        "transpose": x.T,
        "swap 0 1": x.T,
        "permute 1 0": x.T,
        "split 2 axis=0": x.reshape(2, 2, 6),
        "merge 4 axis=0": x.reshape(24),
        "flip axis=1": x[:, ::-1],
    }
    for text, moved in expected.items():
        np.testing.assert_array_equal(parse_op(text).apply(x), moved, text)
    row = np.arange(8)
    np.testing.assert_array_equal(parse_op("interleave 2 axis=0").apply(row), [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(parse_op("interleave 1 axis=0").apply(row), [0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_array_equal(parse_op("halves 1 axis=0").apply(row), [0, 2, 4, 6, 1, 3, 5, 7])
    assert {text.split()[0] for text in expected} | {"interleave", "halves"} == set(NUMBERS)


OF_THREE_AXES = (
    "split 2 axis=0",
    "split 2 axis=1",
    "split 4 axis=-1",
    "merge 6 axis=0",
    "merge 2 axis=-2",
    "interleave 2 axis=1",
    "halves 1 axis=-2",
    "flip axis=-1",
)


@pytest.mark.parametrize("text", [*OF_THREE_AXES, "merge 4 axis=1", "swap 0 2", "permute 2 0 1", "transpose"])
def test_operations_on_inner_axes_are_undone_and_leave_arrays_in_order(text: str) -> None:
    array = drawn(6, 4, 8) if text != "merge 2 axis=-2" else drawn(6, 2, 8)
    moved = parse_op(text).apply(array)
    assert moved.flags.c_contiguous
    assert moved.size == array.size
    np.testing.assert_array_equal(parse_op(text).inverse().apply(moved), array)
    assert str(parse_op(text)) == text
    if text == "interleave 2 axis=1":
        np.testing.assert_array_equal(moved, array)  # heads of two: one pair each
        moved = parse_op("interleave 1 axis=1").apply(array)
        np.testing.assert_array_equal(moved, array[:, [0, 2, 1, 3]])


def test_heads_of_odd_size_have_no_halves_and_parts_must_all_be_there() -> None:
    with pytest.raises(ValueError, match="must be even"):
        parse_op("halves 2 axis=0").apply(drawn(6))
    for text, shape in (("merge 5 axis=0", (6, 5)), ("merge 6 axis=0", (6,)), ("split 4 axis=0", (6,))):
        with pytest.raises(ValueError, match="must"):
            parse_op(text).apply(drawn(*shape))
    with pytest.raises(UserError, match=r"l\.\*\.g \+ l\.\*\.u -> l\.\*\.gu: missing l\.0\.u"):
        transfer({"l.0.g": drawn(2)}, Map((Rule(("l.*.g", "l.*.u"), ("l.*.gu",)),)))
    assert transfer({"a": drawn(2)}, None, {"a": [2]}).keys() == {"a"}


def test_stacked_layers_are_in_the_order_of_their_numbers() -> None:
    weights = {f"layers.{n}.w": np.full(2, n) for n in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    stacked = transfer(weights, make_map({"layers.*.w": "w"}))["w"]
    np.testing.assert_array_equal(stacked[:, 0], np.arange(11))


def test_all_that_does_not_fit_is_said_at_once() -> None:
    weights = {"a": drawn(2, 3), "b": drawn(3), "c": drawn(4)}
    expected = {"x": (2, 3), "y": (3,), "b": (4,)}
    with pytest.raises(UserError) as error:
        transfer(weights, make_map({"a": ("x", "transpose"), "c": ("z", "flip axis=0")}), expected)
    assert str(error.value).splitlines() == [
        "weights do not fit:",
        "  y: missing, of shape (3,)",
        "  x: shape = (3, 2): must be (2, 3)",
        "  b: shape = (3,): must be (4,)",
        "  z: extra, of shape (4,): the map makes it, and nothing takes it",
    ]
    with pytest.raises(UserError, match=r"c: unread, of shape \(4,\)"):
        transfer(weights, None, {"a": (2, 3), "b": (3,)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[weights]]\na = 'x'", "b = None: must be a pattern"),
        ("[[weights]]\na = []\nb = 'x'", r"a = \[\]: must be a pattern"),
        ("[[weights]]\na = [1]\nb = 'x'", r"a = \[1\]: must be a pattern"),
        ("[[weights]]\na = 'x.*'\nb = ['y', 'z']", "can't be stacked in the same rule"),
        ("[[weights]]\na = 'x.*.*'\nb = 'y'", "same number of stars"),
        ("[[weights]]\na = ['x.*', 'y']\nb = 'z'", "patterns of one side must have the same number of stars"),
        ("[[weights]]\na = 'x'\nb = ['y', 'z.*']", "patterns of one side must have the same number of stars"),
        ("[[weights]]\na = ['x', 'y']\nb = ['z', 'w']", "must be a single pattern"),
        ("[[weights]]\na = 'x'\nb = 'y'\nlayout = 'turn'", "layout 'turn': must be one of"),
        ("[[weights]]\na = 'x'\nb = 'y'\nlayout = 'split'", "split takes 1 to 1 numbers"),
        ("[[weights]]\na = 'x'\nb = 'y'\nlayout = 'split 0'", "must have 1 head or more"),
        ("[[weights]]\na = 'x'\nb = 'y'\naxes = 1", "axes: must be one of a, b, layout, axis, sizes"),
        ("[[weights]]\na = ['x', 'y']\nb = 'z'\nsizes = [1]", "must be one for each part"),
        ("[tensors]\na = 1", r"tensors: must be \[\[weights\]\]"),
    ],
)
def test_rules_that_can_not_be_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_map(tmp_path / "map.toml")


def test_what_rules_can_not_move_is_refused_by_name() -> None:
    for rule, said in (
        ({"w": ("v", "split 5")}, "w: split 5 axis=0: axis 0 of"),
        ({"w": ("v", "permute 0 1 2")}, "w: "),
        ({"w": "b"}, "b: comes from several tensors"),
    ):
        with pytest.raises(UserError, match=said):
            transfer({"w": drawn(4, 4), "b": drawn(3)}, make_map(rule))


@pytest.mark.parametrize(("a", "b"), [((), ("y",)), (("x",), ())])
def test_a_rule_has_two_sides(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="patterns of one side"):
        Rule(a, b)


def test_rules_of_inputs_name_nothing_else() -> None:
    rules = [Rule(("input.0",), ("input.x",)), Rule(("weight",), ("w",)), Rule(("input.1", "weight"), ("w",))]
    assert rules_of_inputs(Map(tuple(rules))).weights == (rules[0],)
    assert rules_of_inputs(None).weights == ()


def trace(**tensors: np.ndarray) -> Trace:
    named = {name.replace("__", "/").replace("_", "."): value for name, value in tensors.items()}
    deltas = {"float32": dict.fromkeys(named, 1e-7)}
    parts = {"float32": {name: np.zeros(3) for name in named}}
    return Trace(named, TraceMeta("torch", "cpu", "float32", 0, "", deltas=deltas, parts=parts))


def test_rules_of_activations_hold_for_gradients_inputs_and_calls_and_those_of_weights_for_updates() -> None:
    names = make_map({"m.w": ("w", "transpose")}, {"m": "f", "m@in": "before"})
    given = trace(forward__m=drawn(2, 3), cotangent__m=drawn(2, 3), gradient__m_w=drawn(2, 3), updated__m_w=drawn(2, 3))
    more = {"forward/m@1": drawn(2), "forward/m@in": drawn(2), "routing/m.indices": np.arange(3)}
    moved = names.apply_to_trace(Trace({**given.tensors, **more}, given.meta))
    assert set(moved.tensors) == {
        "forward/f", "cotangent/f", "gradient/w", "updated/w", "forward/f@1", "forward/before", "routing/f.indices"
    }  # fmt: skip
    assert moved.array("gradient/w").shape == (3, 2)
    assert set(moved.meta.deltas["float32"]) == {"forward/f", "cotangent/f", "gradient/w", "updated/w"}
    assert set(moved.meta.parts["float32"]) == {"forward/f", "cotangent/f", "gradient/w"}
    kept = make_map({"m.w": "w"}, {"m": "f"}).apply_to_trace(given).meta.parts["float32"]
    for new, old in {"updated/w": "updated/m.w", "forward/f": "forward/m"}.items():
        assert kept[new] is given.meta.parts["float32"][old]


@pytest.mark.parametrize("order", [("q", "r"), ("r", "q")])
def test_of_several_the_largest_scale_bounds_that_of_what_they_become(order: tuple[str, str]) -> None:
    values = {f"forward/{name}": drawn(6, 5) for name in order}
    errors = {"forward/q": 0.1 * values["forward/q"], "forward/r": 1e-3 * values["forward/r"]}
    parts = {name: part_errors(error, values[name]) for name, error in errors.items()}
    meta = TraceMeta(
        "torch", "cpu", "float32", 0, "", deltas={"float32": dict.fromkeys(values, 0.1)},
        parts={"float32": {name: own.packed() for name, own in parts.items()}},
    )  # fmt: skip
    moved = Map(activations=(Rule(order, ("f",), axis=1),)).apply_to_trace(Trace(values, meta))
    found = unpacked(moved.meta.parts["float32"]["forward/f"], (6, 10))
    assert found.scale == parts["forward/q"].scale > parts["forward/r"].scale
    sizes = [own.size for own in parts.values()]
    assert found.size == pytest.approx(np.sqrt(np.mean(np.square(sizes))))


@pytest.mark.parametrize("op", ["interleave 4 axis=1", "transpose", "joined"])
@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (1.0, 1.02), (1e200, 1.0)])
def test_a_factor_is_found_behind_a_layout(op: str, scale: float, factor: float) -> None:
    """Rounding adds up to none: in a tensor that it moves by 1 %, a factor of 1.02 is still one."""
    rng = np.random.default_rng(0)
    values = {"forward/q": rng.standard_normal((64, 48)), "forward/r": rng.standard_normal((64, 48))}
    if op == "joined":
        names = Map(activations=(Rule(("q", "r"), ("f",), axis=1),))
    else:
        names = make_map(None, {"q": ("f", op), "r": "g"})
    values = {name: scale * value for name, value in values.items()}
    error = {name: value * 0.01 * rng.standard_normal(value.shape) for name, value in values.items()}
    parts = {name: part_errors(error[name], value).packed() for name, value in values.items()}
    meta = TraceMeta(
        "torch",
        "cpu",
        "bfloat16",
        0,
        "",
        deltas={"bfloat16": dict.fromkeys(values, 0.01 * scale)},
        parts={"bfloat16": parts},
    )
    a = Trace(values, meta)
    moved = names.apply_to_trace(a)
    noise = {name: 1 + 0.01 * rng.standard_normal(np.shape(value)) for name, value in moved.tensors.items()}
    other = {name: np.asarray(value) * noise[name] * factor for name, value in moved.tensors.items()}
    found = compare_functions(a, Trace(other, dataclasses.replace(meta, deltas={}, parts={})), names)
    row = next(row for row in found.rows if row.name == "forward/f")
    assert (row in found.failures) is (factor > 1), row
    assert factor == 1 or (row.part is not None and row.part.label == "scale")


SOURCE = {
    f"layers.{n}.{k}": s for n in range(2) for k, s in {"q": (8, 6), "k": (8, 6), "gate": (5, 6), "up": (5, 6)}.items()
}
SOURCE |= {"embed": (11, 6), "norm": (6,), "square": (6, 6), "first": (6, 10), "second": (15, 7)}
TARGET_RULES = make_map(
    {
        "layers.*.q": ("blocks.*.wq", "interleave 2", "transpose"),
        "layers.*.k": ("blocks.*.wk", "split 4 axis=0"),
        "embed": "table",
        "norm": "scale",
        "square": ("turned", "transpose"),
        "first": ("of_heads", "transpose", "split 5 axis=0"),
        "second": ("to_heads", "transpose", "split 3 axis=1"),
    }
)
FUSED = Rule(("layers.*.gate", "layers.*.up"), ("blocks.*.gate_up",), (parse_op("transpose"),))


@given(seed=st.integers(0, 99))
def test_a_map_is_proposed_from_values_that_both_hold_and_moves_them_bit_by_bit(seed: int) -> None:
    a = {name: drawn(*shape, seed=seed + place) for place, (name, shape) in enumerate(SOURCE.items())}
    names = Map((*TARGET_RULES.weights, FUSED))
    b = transfer(a, names)
    shuffled = {name: b[name] for name in np.random.default_rng(seed).permutation(sorted(b))}
    found = propose_map(a, shuffled)
    assert set(found.evidence) == {"values"}
    moved = transfer(a, found.map, {name: value.shape for name, value in b.items()})
    for name, value in b.items():
        np.testing.assert_array_equal(moved[name], value)


@pytest.mark.parametrize("heads", [1, 3, 128])
def test_rotary_layouts_are_proposed_up_to_the_most_heads(heads: int) -> None:
    """Of two pairs a head."""
    a = {"q": drawn(4 * heads, 2)}
    b = transfer(a, make_map({"q": ("wq", f"interleave {heads}", "transpose")}))
    np.testing.assert_array_equal(transfer(a, propose_map(a, b).map)["wq"], b["wq"])


@given(st.data(), st.integers(3, 5))
def test_axes_in_any_order_are_proposed_from_values_and_from_shapes(data: st.DataObject, axes: int) -> None:
    """As the kernels of convolutions have them. Axes of one length leave shapes a choice, which the probe settles."""
    order = data.draw(st.permutations(range(axes)))
    lengths = data.draw(st.lists(st.integers(2, 4), min_size=axes, max_size=axes))
    a = {f"blocks.{n}.kernel": drawn(*lengths, seed=n) for n in range(2)}
    b = {name.replace("kernel", "w"): value.transpose(order) for name, value in a.items()}
    moved = transfer(a, propose_map(a, b).map)
    assert all(np.array_equal(moved[name], b[name]) for name in b)
    others = {name: drawn(*value.shape, seed=9) for name, value in b.items()}
    orders = [
        each
        for each in itertools.permutations(range(axes))
        if [lengths[x] for x in each] == [lengths[x] for x in order]
    ]
    if len(orders) > 1:
        with pytest.raises(UserError, match="shapes leave a choice, which a probe would settle"):
            propose_map(a, others)

    def probe(names: Map) -> bool:
        return all(np.array_equal(value, b[name]) for name, value in transfer(a, names).items())

    found = propose_map(a, others, probe)
    assert found.evidence == (("probe",) if len(orders) > 1 else ("shapes",))
    assert probe(found.map)


def test_kernels_of_convolutions_are_tried_with_channels_last_first() -> None:
    a, tried = {"conv.weight": drawn(8, 8, 3, 3)}, []
    with pytest.raises(UserError, match="of 4 maps that shapes allow the probe accepts none"):
        propose_map(a, {"conv.kernel": drawn(3, 3, 8, 8, seed=9)}, lambda names: bool(tried.append(names)))
    assert [str(op) for op in tried[0].weights[0].layout] == ["permute 2 3 1 0"]


def test_tensors_of_the_same_values_are_not_told_apart_by_them() -> None:
    a = {"norm1": np.ones(3), "norm2": np.ones(3), "w": drawn(3, 3)}
    with pytest.raises(UserError, match="shapes leave a choice"):
        propose_map(a, {"n2": np.ones(3), "n1": np.ones(3), "v": a["w"]})


def test_shapes_decide_where_they_can_and_a_probe_where_they_can_not() -> None:
    a = {"first.weight": drawn(5, 3), "q": drawn(4, 4, seed=1), "k": drawn(4, 4, seed=2), "bias": drawn(5)}
    truth = make_map({"first.weight": ("w1", "transpose"), "q": "wq", "k": ("wk", "transpose"), "bias": "b1"})
    shapes = {name: value.shape for name, value in transfer(a, truth).items()}
    b = {name: drawn(*shape, seed=7) for name, shape in shapes.items()}
    with pytest.raises(UserError, match=r"(?s)shapes leave a choice.*q: wq, wq \(transpose\), wk, wk \(transpose\)"):
        propose_map(a, b)
    x = drawn(2, 4, seed=5)
    expected = x @ a["q"] @ a["k"].T

    def probe(names: Map) -> bool:
        moved = transfer(a, names, shapes)
        return np.allclose(x @ moved["wq"] @ moved["wk"], expected)

    found = propose_map(a, b, probe)
    assert dict(zip((rule.a[0] for rule in found.map.weights), found.evidence, strict=True)) == {
        "first.weight": "shapes", "bias": "shapes", "q": "probe", "k": "probe"
    }  # fmt: skip
    assert transfer(a, found.map).keys() == shapes.keys()
    assert {name: value.tobytes() for name, value in transfer(a, found.map).items()} == {
        name: value.tobytes() for name, value in transfer(a, truth).items()
    }
    with pytest.raises(UserError, match="accepts none"):
        propose_map(a, b, lambda _: False)
    with pytest.raises(UserError, match=r"lost: no tensor of the other side"):
        propose_map({**a, "lost": drawn(9)}, b, probe)
    with pytest.raises(UserError, match="does not make the two functions the same"):
        propose_map({"w": drawn(3, 2)}, {"v": drawn(2, 3, seed=9)}, lambda _: False)


def test_stacks_of_one_shape_are_told_apart_by_how_many_layers_they_have() -> None:
    a = {f"{name}.{n}.w": drawn(3, 5, seed=n) for name, count in (("encoder", 2), ("decoder", 3)) for n in range(count)}
    b = {f"{name}.{n}.k": drawn(3, 5, seed=9) for name, count in (("left", 3), ("right", 2)) for n in range(count)}
    found = propose_map(a, b)
    assert set(found.evidence) == {"shapes"}
    moved = transfer(a, found.map)
    for name, own in (("left", "decoder"), ("right", "encoder")):
        np.testing.assert_array_equal(moved[f"{name}.1.k"], a[f"{own}.1.w"])


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="takes a minute")
def test_these_tests_find_bugs_that_a_machine_plants_in_layouts() -> None:
    def check() -> None:
        test_each_operation_moves_what_it_says()
        test_heads_of_odd_size_have_no_halves_and_parts_must_all_be_there()
        for text in OF_THREE_AXES:
            test_operations_on_inner_axes_are_undone_and_leave_arrays_in_order(text)
        for shape in ((6,), (2, 6), (4, 3, 2)):
            assert parse_op("flip axis=-1").apply(drawn(*shape)).shape == shape

    score = mutate(layout.Op, check, sample=40, seed=2)
    assert score.share >= 0.85, score.survivors
