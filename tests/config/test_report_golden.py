"""Pages, pictures and tables of a small comparison, whole: every cell, place and colour is as it was looked at once."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared_config.parity.compare import Comparison, HeatMap, Row
from shared_config.parity.parts import Part
from shared_config.parity.plan import Finding
from shared_config.parity.report import print_failures, report_page, write_report
from shared_config.parity.report.plot import LogAxis, error_plot, heat_picture, number, relative_limit
from shared_config.parity.report.style import CSS, SCRIPT
from shared_config.parity.report.terminal import failure_table
from shared_config.parity.traces import TraceMeta

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROW_PART = Part("row", (1, None), error=0.5, limit=0.125, size=1.0, position=(1, 2), beyond=2, count=3)
LONE_PART = Part("scale", (), error=0.5, limit=0.25, size=1.0, position=(0, 0), beyond=1, count=1)
FINE_PART = Part("element", (0, 3), error=0.25, limit=0.5, size=1.0, position=(0, 3), beyond=0, count=8)

A = TraceMeta(
    backend="torch",
    device="cpu & co",
    dtype="float32",
    seed=3,
    config='[model]\nname = "<x>"\n',
    machine="Linux <b>",
    versions={"torch": "2.13", "numpy": "2"},
    weights="given",
    weights_hash="0123456789abcdef",
    tokens_hash="fedcba9876543210",
    initial_hash="00112233445566",
)
B = dataclasses.replace(A, backend="jax", device="tpu", machine="", versions={"jax": "0.10"}, weights_hash="")


def row(name: str, status: str = "within", **fields: Any) -> Row:
    known = {"shape": (2, 4), "dtype_a": "float32", "dtype_b": "float32", "error": 1e-6, "limit": 1e-5, "delta": 1e-6}
    return Row(name, name.partition("/")[0], status, **{**known, "scale": 2.0, "position": (0, 3), **fields})


ROWS = (
    Row("initial weights", "initial weights", "equal"),
    row("forward/embedding", "equal", error=0.0, value_a=1.0, value_b=1.0, value_truth=1.0),
    row("forward/layers.0.a", value_a=0.1, value_b=0.1000001, value_truth=0.1, worse="a", part=FINE_PART),
    row("forward/layers.0.b", estimated=True, position=None, shape=()),
    row("forward/layers.1.<a>", "differs", error=0.5, value_a=-1.5, value_b=2.25, value_truth=2.0, part=ROW_PART),
    row("forward/layers.2.a", "differs", error=0.25, limit=0.125, delta=None, part=LONE_PART, mismatched=2),
    row("forward/out", "not finite in both", error=math.inf, nonfinite=7, position=(1, 0), value_a=math.nan),
    row("loss", "differs", shape=(), position=(), error=0.5, limit=0.0, value_a=2.0, value_b=2.5, scale=0.0),
    row("decode/1", "missing in b", dtype_b="", error=0.0, limit=0.0, delta=None, scale=0.0, position=None),
    row("gradient/layers.12.w", "differs", error=math.inf, mismatched=1, value_b=math.inf, shape=(2, 4, 3)),
    row("gradient/layers.11.w", error=1e-5, limit=1e-5),
    row("gradient/layers.10.w", "equal", error=0.0, delta=0.0, limit=0.0),
    row("updated/layers.10.w", "missing in a", dtype_a="", error=0.0, limit=0.0, scale=0.0),
    row("updated/layers.11.w", error=1e-5, limit=3e-5),
    row("updated/layers.12.w", error=1e-5, limit=3e-5),
    row("losses", error=3e-7, shape=(12,)),
)
HEATMAPS = {
    "forward/layers.1.<a>": HeatMap((2, 4), ((0.0, 1e-3, 3.75, math.inf), (1e-9, 0.1, 0.2, 1.0))),
    "gradient/layers.12.w": HeatMap((1, 1), ((math.inf,),)),
}
WITH_TRUTH = Comparison(
    ROWS, A, B, dataclasses.replace(A, dtype="float64"), "torch <1>", "jax & 2", HEATMAPS, ("a note, <b>", "another")
)
WITHOUT = dataclasses.replace(
    WITH_TRUTH, rows=(*ROWS[:4], *ROWS[11:13], *ROWS[14:15]), meta_truth=None, heatmaps={}, notes=()
)
RIGHT = dataclasses.replace(WITHOUT, rows=ROWS[1:4])
FINDINGS = (
    Finding("one step, <float32>", "torch & jax", ok=True, count=12, worst="loss", error=1e-6, limit=4e-6),
    Finding(
        "cached decoding", "jax", ok=False, worst="decode/1", error=3.0, limit=1.5, detail="off & on", backend="jax"
    ),
    Finding("routes", "torch, jax", ok=False, count=2, worst="routing/i", error=1.0, limit=0.0, detail="2 of <9>"),
    Finding("resume", "torch", ok=True, count=3, worst="loss"),
    Finding("count", "torch", ok=True, count=4),
)


def body(text: str) -> str:
    """The page without its style, script and time, and with pictures as their pixels."""
    assert text.count(f"<style>{CSS}</style>") == 1
    assert text.count(f"<script>{SCRIPT}</script>") == 1
    text, times = re.subn(r"\d{4}-\d\d-\d\d \d\d:\d\d [A-Z+-][\w+:-]*", "(time)", text)
    assert times == 1
    text = re.sub(r"data:image/png;base64,([^\"]*)", lambda found: pixels(found.group(1)).hex(), text)
    return text.replace(CSS, "").replace(SCRIPT, "")


def pixels(encoded: str) -> bytes:
    """What is compressed in a PNG of one chunk of data."""
    data = base64.b64decode(encoded)
    at = data.index(b"IDAT")
    return zlib.decompress(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")])


PAGES = {
    "all": lambda: report_page({"float32 <&>": WITH_TRUTH, "second": WITHOUT}, iter(FINDINGS), "debug <&> more"),
    "own_findings": lambda: report_page({"right": RIGHT, "wrong": WITHOUT}),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_it_was(name: str):
    assert body(PAGES[name]()) == (FIXTURES / f"report_{name}.html").read_text(encoding="utf-8")


def test_a_written_report_is_the_page_with_the_title_of_reports(tmp_path: Path):
    write_report(tmp_path / "report.html", {"right": RIGHT}, FINDINGS)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert body(text) == body(report_page({"right": RIGHT}, FINDINGS, "One config, two backends"))


def test_the_time_of_a_page_is_that_of_the_machine():
    before = datetime.now().astimezone()
    (shown,) = re.findall(r'<span class="soft">(\d{4}-.*?)</span>', report_page({"right": RIGHT}, FINDINGS))
    assert shown in {f"{moment:%Y-%m-%d %H:%M %Z}" for moment in (before, datetime.now().astimezone())}


def printed(comparison: Comparison, **options: Any) -> list[str]:
    screen = Console(file=io.StringIO(), width=220)
    print_failures(screen, comparison, **options)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


def cells(lines: Sequence[str]) -> list[list[str]]:
    """Texts of the cells of a table, with the side that they stand on."""
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines if line[0] in "┃│"]


def test_failures_are_printed_cell_by_cell():
    assert cells(printed(WITH_TRUTH)) == [
        ["tensor", "status", "error / delta", "error / limit", "at", "torch <1>", "jax & 2", "truth"],
        ["row 1 of forward/layers.1.<a>", "differs", "5.00e+05", "5e+04", "0,3", "-1.5", "2.25", "2"],
        ["scale of forward/layers.2.a", "differs", "", "2", "0,3", "", "", ""],
        ["forward/out", "not finite in both", "∞", "∞", "1,0", "nan", "", ""],
        ["loss", "differs", "5.00e+05", "∞", "", "2", "2.5", ""],
        ["decode/1", "missing in b", "", "∞", "", "", "", ""],
        ["gradient/layers.12.w", "differs", "∞", "∞", "0,3", "", "inf", ""],
        ["updated/layers.10.w", "missing in a", "0", "∞", "0,3", "", "", ""],
    ]
    assert cells(printed(WITHOUT))[0][-2:] == ["torch <1>", "jax & 2"]
    assert printed(RIGHT) == []


@pytest.mark.parametrize(("dtype", "shown"), [("float64", "0.33333333333333331"), ("float32", "0.333333333"),
                                              ("bfloat16", "0.33333")])  # fmt: skip
def test_values_are_printed_with_all_digits_of_the_coarser_dtype(dtype: str, shown: str):
    rows = (row("loss", "differs", value_a=1 / 3, part=FINE_PART),)
    a, b = dataclasses.replace(A, dtype="float64"), dataclasses.replace(B, dtype=dtype)
    (_, line) = cells(printed(dataclasses.replace(WITHOUT, rows=rows, meta_a=a, meta_b=b)))
    assert line[0] == "loss"
    assert line[5] == shown


def test_numbers_stand_on_the_right_and_long_names_are_folded():
    columns = failure_table(WITH_TRUTH).columns
    assert [column.justify for column in columns] == ["left", "left", *["right"] * 6]
    assert [column.overflow for column in columns] == ["fold", *["ellipsis"] * 7]


@pytest.mark.parametrize(("count", "most", "lines", "rest"), [(25, None, 25, None), (26, None, 25, "and 1 more"),
                                                              (3, 3, 3, None), (4, 3, 3, "and 1 more")])  # fmt: skip
def test_what_is_not_printed_is_counted(count: int, most: int | None, lines: int, rest: str | None):
    found = dataclasses.replace(WITHOUT, rows=tuple(row(f"forward/{place}", "differs") for place in range(count)))
    said = printed(found, **({} if most is None else {"most": most}))
    assert [line[0] for line in cells(said)[1:]] == [f"forward/{place}" for place in range(lines)]
    assert (said[-1] if rest else None) == rest
    assert len(failure_table(found).rows) == min(count, 25)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1e-3, 2, "0.001"), (9.994e-4, 2, "9.99e-04"), (99999.0, 2, "1e+05"), (99999.0, 5, "99999"),
        (1e5, 2, "1.00e+05"), (1e5, 5, "1.00000e+05"), (-1e-3, 2, "-0.001"), (-1e5, 2, "-1.00e+05"), (0.0, 5, "0"),
        (-math.inf, 2, "-inf"), (math.inf, 5, "∞"), (1.23456789, 5, "1.23457"), (1.23456789, 2, "1.23"),
    ],
)  # fmt: skip
def test_numbers_are_plain_from_a_thousandth_up_to_a_hundred_thousand(value: float, digits: int, text: str):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [((), -1, 1), ((0.0, math.inf, -1.0), -1, 1), ((1.0,), -1, 1), ((2.0,), -1, 1), ((3.0,), 0, 1), ((7.0,), 0, 2),
     ((1e-9, 0.0, 1e-3), -10, -2), ((math.inf, 1e-305), -306, -304)],
)  # fmt: skip
def test_an_axis_reaches_beyond_its_values(values: Sequence[float], low: int, high: int):
    axis = LogAxis(values)
    assert (axis.low, axis.high) == (low, high)
    assert axis.y(0.0) == axis.y(-1.0) == 246
    assert axis.y(math.inf) == 16
    assert axis.y(10.0 ** (low + 1)) == pytest.approx(246 - 230 / (high - low))


@pytest.mark.parametrize(("low", "high", "step"), [(-1, 0, 1), (-8, 0, 1), (-9, 0, 2), (-16, 0, 2), (-17, 0, 3)])
def test_an_axis_has_at_most_eight_steps(low: int, high: int, step: int):
    axis = LogAxis(())
    axis.low, axis.high = low, high
    assert list(axis.ticks()) == list(range(low, high + 1, step))


def test_labels_of_layers_do_not_overlap():
    for count, shown in ((47, range(47)), (48, range(0, 48, 2)), (94, range(0, 94, 2)), (95, range(0, 95, 3))):
        picture = error_plot([row(f"forward/layers.{layer}.x") for layer in range(count)], "<x>")
        labels = re.findall(r'<text class="label" x="([\d.]+)" y="266">(\d+)</text>', picture)
        assert [int(layer) for _, layer in labels] == list(shown)
        assert len(re.findall("<rect", picture)) == (count + 1) // 2
        assert all(second - first >= 21.9 for (first, _), (second, _) in itertools.pairwise(
            (float(x), layer) for x, layer in labels))  # fmt: skip
    assert 'aria-label="&lt;x&gt;"' in picture


@pytest.mark.parametrize(
    ("name", "layer"),
    [("forward/layers.3.mlp", "3"), ("layers.4", "4"), ("forward/a.layers.15.x", "15"), ("forward/players.3.x", None),
     ("forward/layers.x", None), ("forward/layers.3x", None), ("loss", None)],
)  # fmt: skip
def test_layers_are_told_by_name(name: str, layer: str | None):
    labels = re.findall(r'class="label" x="584.0" y="266">(\d+)<', error_plot([row(name)], ""))
    assert labels == ([] if layer is None else [layer])


def test_a_plot_of_nothing_is_empty():
    picture = error_plot([], "none")
    assert "circle" not in picture
    assert '<path class="limit" d=""/>' in picture
    assert [relative_limit(row("loss", scale=scale)) for scale in (0.0, 0.5)] == [0.0, 2e-5]


def test_the_least_of_a_heat_map_is_still_seen():
    values = (0.0, 5e-324, 1e-4, 4e-4, 1e-3, 0.5, 1.0, math.inf, math.nan)
    tag = heat_picture(HeatMap((3, 9), (values, (0.0,) * 9, (2.0, *values[1:]))))
    found = re.search(r'alt="([^"]*)" src="data:image/png;base64,([^"]+)"', tag)
    assert found
    assert found.group(1) == "differences by place, 3 rows of 9 channels"
    lines = np.frombuffer(pixels(found.group(2)), np.uint8).reshape(3, 37)
    assert not lines[:, 0].any()
    assert (lines[:, 1:].reshape(3, 9, 4)[..., :3] == (224, 49, 49)).all()
    share = [1 + math.log10(value / 2) / 4 for value in (4e-4, 1e-3, 0.5, 1.0)]
    first = [0, 13, 13, *(round(255 * each) for each in share), 255, 255]
    assert lines[:, 4::4].tolist() == [first, [0] * 9, [255, *first[1:]]]
    alone = heat_picture(HeatMap((1, 2), ((math.inf, 0.0),)))
    assert list(pixels(alone.split("base64,")[1].split('"')[0])[4::4]) == [255, 0]
