"""Trace files: order, values and origin survive; what is no trace is refused; summaries estimate distances."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from shared_config.errors import UserError
from shared_config.interchange.tensors import TRACE, TensorFile, write_tensors
from shared_config.parity.measure import measure
from shared_config.parity.numerics import rms
from shared_config.parity.summaries import SKETCH_SIZE
from shared_config.parity.traces import (
    META_KEY,
    Summary,
    Trace,
    TraceMeta,
    read_trace,
    summarize,
    write_trace,
)
from tests.interchange.test_weights import arrays, assert_same


def meta(**fields: Any) -> TraceMeta:
    given: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float32", "seed": 3}
    return TraceMeta(**{**given, "config": "[model]\ndim = 20\n", **fields})


def example() -> Trace:
    rng = np.random.default_rng(0)
    tensors = {
        "forward/token_embedding": rng.standard_normal((2, 8, 20)).astype(np.float32),
        "forward/layers.0.attention": rng.standard_normal((2, 8, 20)).astype(np.float32),
        "routing/layers.0.mlp.router.indices": np.arange(6, dtype=np.int32).reshape(3, 2).T,
        "loss": np.float32(3.5) * np.ones((), np.float32),
        "gradient/norm.weight": rng.standard_normal(20).astype(np.float32),
    }
    return Trace(tensors, meta())


names = st.text("abz/.", min_size=1, max_size=6)


@given(tensors=st.dictionaries(names, arrays(), max_size=6), data=st.data())
def test_what_is_written_is_read_in_the_same_order(tmp_path_factory, tensors, data):
    order = data.draw(st.permutations(list(tensors)))
    deltas = data.draw(st.dictionaries(st.sampled_from(["float32", "bfloat16"]), st.dictionaries(names, st.floats(0))))
    origin = meta(versions={"numpy": "2.4"}, deltas=deltas, weights_hash="ab", extra={"note": [1, None]})
    path = tmp_path_factory.mktemp("trace") / "a.trace"
    write_trace(path, Trace({name: tensors[name] for name in order}, origin))
    read = read_trace(path)
    assert list(read.tensors) == order
    assert_same(read.tensors, tensors)
    assert read.meta == origin
    assert read.meta.config_fields == {"model": {"dim": 20}}


def test_tensors_stay_on_disk_until_looked_at(tmp_path):
    write_trace(tmp_path / "a.trace", example())
    base: Any = read_trace(tmp_path / "a.trace").tensors["forward/token_embedding"]
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("kept", [0, 5, 400, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "a.trace"
    write_trace(path, example())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.trace: can't be read as a safetensors file"):
        read_trace(path)


def test_what_is_no_trace_is_refused_by_name(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", {"a": np.ones(3)})
    with pytest.raises(UserError, match=r"weights\.safetensors: is a safetensors file, but no trace"):
        read_trace(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"absent: can't be read"):
        read_trace(tmp_path / "absent")


def damaged(change: Any) -> dict[str, str]:
    content = {"order": ["a"], "summaries": {}, **meta().__dict__}
    return {TRACE: "1", META_KEY: json.dumps(change(content))}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({TRACE: "7"}, "trace format = 7: must be 1"),
        ({TRACE: "1"}, "description of the trace is damaged: KeyError"),
        ({TRACE: "1", META_KEY: "{"}, "description of the trace is damaged: JSONDecodeError"),
        (damaged(lambda content: [1]), "is damaged"),
        (damaged(lambda content: "text"), "is damaged"),
        (damaged(lambda content: {**content, "order": None}), "is damaged"),
        (damaged(lambda content: {**content, "unknown": 1}), "is damaged"),
        (damaged(lambda content: {k: v for k, v in content.items() if k != "seed"}), "is damaged"),
        (damaged(lambda content: {**content, "order": ["a", "b"]}), "has no tensor 'b'"),
        (damaged(lambda content: {**content, "summaries": {"a": {}}}), "is damaged"),
        (damaged(lambda content: {**content, "dtype": "float12"}), "dtype = 'float12': must be one of"),
        *(
            (
                damaged(lambda content, dtype=dtype, name=name: {**content, "parts": {dtype: {name: 0}}}),
                "a list of numbers",
            )
            for dtype, name in (("float12", "list"), ("float32", "square"), ("float32", "whole"))
        ),
        *(
            ({**damaged(dict), "chunks": json.dumps({"a": "a.trace.chunks/1", "b": beside})}, "must name files of the")
            for beside in ("../b", "/b", 1)
        ),
    ],
)
def test_damage_inside_is_one_error(tmp_path, metadata, message):
    path = tmp_path / "a.trace"
    parts = {"list": np.ones(3), "square": np.ones((3, 3)), "whole": np.ones(3, int)}
    named = {f"{name}#parts.{dtype}": part for name, part in parts.items() for dtype in ("float12", "float32")}
    write_tensors(path, {"a": np.ones(3), **named}, metadata)
    with pytest.raises(UserError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_large_tensors_can_be_summarized(tmp_path):
    trace = example()
    small = trace.summarized(above_bytes=100)
    write_trace(tmp_path / "a.trace", small)
    read = read_trace(tmp_path / "a.trace")
    assert list(read.tensors) == list(trace.tensors)
    summarized = {name for name, tensor in read.tensors.items() if isinstance(tensor, Summary)}
    assert summarized == {"forward/token_embedding", "forward/layers.0.attention"}
    for name in summarized:
        whole, summary = trace.tensors[name], read.tensors[name]
        assert isinstance(whole, np.ndarray)
        assert isinstance(summary, Summary)
        assert (summary.shape, summary.dtype, summary.size) == (whole.shape, "float32", whole.size)
        assert (summary.minimum, summary.maximum) == (whole.min(), whole.max())
        assert summary.rms == pytest.approx(rms(whole), rel=1e-7)
        assert summary.mean == pytest.approx(whole.astype(np.float64).mean(), abs=1e-7 * summary.rms)
        assert np.array_equal(summary.sketch, summarize(whole).sketch)
    assert set(TensorFile(tmp_path / "a.trace").entries) >= {f"{name}#sketch" for name in summarized}


def test_a_hash_tells_values_shapes_and_dtypes_apart():
    array = np.arange(6, dtype=np.float32)
    variants = [array, array.reshape(2, 3), array.view(np.int32), array.astype(ml_dtypes.bfloat16), array + 1]
    assert len({summarize(variant).hash for variant in variants}) == len(variants)
    assert summarize(array.reshape(3, 2).T).hash == summarize(array.reshape(3, 2).T.copy()).hash


def test_nan_and_infinity_are_kept_by_place():
    plain = np.ones(5)
    assert summarize(plain).nonfinite_hash == ""
    places = [np.where(np.arange(5) == at, value, plain) for at, value in [(1, np.nan), (2, np.nan), (1, np.inf)]]
    hashes = {summarize(array).nonfinite_hash for array in (*places, -places[2])}
    assert len(hashes) == 4
    summary = summarize(places[0])
    assert (summary.rms, summary.mean, summary.maximum) == (1.0, 1.0, 1.0)
    assert np.isfinite(summary.sketch).all()


@pytest.mark.parametrize("size", [1, 100, 3000, (1 << 20) + 777])
@pytest.mark.parametrize("error", [1e-13, 1e-3, 10.0])
def test_sketches_estimate_the_distance_of_tensors(size, error):
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size)
    y = x + error * rng.standard_normal(size)
    between = summarize(x).sketch - summarize(y).sketch
    estimate = np.sqrt(np.sum(between**2) / size)
    assert estimate == pytest.approx(rms(x - y), rel=4 * np.sqrt(0.5 / SKETCH_SIZE))


@pytest.mark.parametrize("place", [0, 3, 1020, 1021, 64 * 1021 - 1, 64 * 1021, 3 * 64 * 1021 + 7])
def test_the_sketch_is_a_format(place: int) -> None:
    """Traces of different machines and versions are compared: buckets and signs may never change."""
    values = np.zeros(place + 2)
    values[place] = 3.0
    piece, within = divmod(place, 64 * 1021)
    drawn = split_mix_64(piece)
    negative = (drawn >> 63) ^ (split_mix_64(drawn % (64 * 1021) + within) >> 63)
    expected = np.zeros(1021)
    expected[place % 1021] = -3.0 if negative else 3.0
    assert np.array_equal(summarize(values).sketch, expected)


STRUCTURES = {
    "constant": lambda rows, columns: np.ones((rows, columns)),
    "a row": lambda rows, columns: np.ones((rows, columns)) * (np.arange(rows) == 3)[:, None],
    "a column": lambda rows, columns: np.ones((rows, columns)) * (np.arange(columns) == 5),
    "an outer product": lambda rows, columns: np.outer(np.cos(np.arange(rows) ** 2), np.sin(np.arange(columns) ** 2)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(300, 64), (1024, 1024), (40, 1536)])
def test_sketches_estimate_distances_that_have_a_structure(structure: str, shape: tuple[int, int]) -> None:
    """As those of a missing bias, of one wrong token or of one wrong head are."""
    values = STRUCTURES[structure](*shape)
    found = summarize(values)
    assert np.linalg.norm(found.sketch) == pytest.approx(np.linalg.norm(values), rel=0.15)


def test_statistics_of_a_former_format_are_not_compared_with_those_of_now() -> None:
    now = summarize(np.ones(5))
    former = dataclasses.replace(now, sketch=np.zeros(1024))
    assert measure(former, former).error == 0
    with pytest.raises(UserError, match="1024 and 1021 numbers: one trace is of a former format"):
        measure(former, np.ones(5))


def test_traces_of_the_format_before_are_read_as_they_are(tmp_path) -> None:
    """Names are those of now; only sketches had another size."""
    trace = example()
    summary = dataclasses.replace(summarize(np.ones(9)), sketch=np.arange(1024.0))
    write_trace(tmp_path / "now", Trace({**trace.tensors, "forward/wide": summary}, trace.meta))
    file = TensorFile(tmp_path / "now")
    write_tensors(tmp_path / "then", {name: file.read(name) for name in file.entries}, {**file.metadata, TRACE: "3"})
    now, then = read_trace(tmp_path / "now"), read_trace(tmp_path / "then")
    assert then.meta == now.meta
    assert list(then.tensors) == list(now.tensors)
    kept = then.tensors["forward/wide"]
    assert isinstance(kept, Summary)
    assert np.array_equal(kept.sketch, summary.sketch)


def split_mix_64(seed: int) -> int:
    """First output of the published generator with this state, in Python integers."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_integers_of_another_width_are_the_same():
    wide = np.arange(-3, 7)
    assert summarize(wide).hash == summarize(wide.astype(np.int32)).hash
    assert summarize(wide > 0).hash == summarize((wide > 0).astype(np.int8)).hash
    assert summarize(wide).hash != summarize(wide.astype(np.float64)).hash


def test_integers_are_summarized_by_hash_alone():
    summary = summarize(np.arange(10))
    assert summary.sketch.size == 0
    assert (summary.minimum, summary.maximum) == (0.0, 9.0)
