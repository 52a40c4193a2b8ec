"""The report: one page that stands alone, shows every tensor and where it went wrong; and the table of failures."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import struct
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared_config.errors import UserError
from shared_config.parity.compare import HeatMap, compare_traces
from shared_config.parity.plan import Finding
from shared_config.parity.report import print_failures, report_page, write_report
from shared_config.parity.report.plot import HEAT_RGB, MAX_TICKS, LogAxis, error_plot, heat_picture, number, png
from shared_config.parity.traces import Trace
from tests.config.test_compare import DELTA, trace, values

FORWARD = ("token_embedding", *(f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")), "output_head")
GRADIENT = ("output_head.proj.weight", *(f"layers.{i}.mlp.up_proj.weight" for i in (2, 1, 0)))
NAMES = (*(f"forward/{name}" for name in FORWARD), "loss", *(f"gradient/{name}" for name in GRADIENT))
VOID = ("meta", "img", "input")


def pair(wrong: str = "", error: Any = 1.0) -> tuple[Trace, Trace, Trace]:
    """float32 traces of two backends and the truth; from the tensor ``wrong`` on, the second is off."""
    truth = {name: values(2, 6, 5, seed=i) if name != "loss" else np.asarray(2.5) for i, name in enumerate(NAMES)}
    noise = {name: np.asarray(array + 0.1 * DELTA * values(*array.shape, seed=99)) for name, array in truth.items()}
    later = NAMES[NAMES.index(wrong) :] if wrong else ()
    off = {name: np.asarray(array + (error if name in later else 0.0)) for name, array in truth.items()}
    deltas = {"float32": dict.fromkeys(truth, DELTA)}
    versions = {"torch": "2.13", "<b>": "1"}
    a = trace(noise, dtype="float32", versions=versions, machine="Linux & co", weights_hash="abc123")
    b = trace(off, dtype="float32", backend="jax", device="tpu", versions={"jax": "0.10"}, weights_hash="abc123")
    return a, b, trace(truth, deltas=deltas)


class Page(HTMLParser):
    """Tags with their attributes, texts, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def having(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and (not kind or kind in _classes(attrs))]


def _classes(attrs: dict[str, str | None]) -> list[str]:
    return (attrs.get("class") or "").split()


def test_a_page_stands_alone_and_is_well_formed(tmp_path):
    a, b, truth = pair("forward/layers.1.attention")
    write_report(tmp_path / "report.html", {"float32": compare_traces(a, b, truth)}, title="debug <&> <u>more")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import|<link", text)
    assert [str(attrs["src"])[:22] for attrs in page.having("img")] == ["data:image/png;base64,"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "prefers-color-scheme: dark" in text
    assert "debug <&> <u>more" in page.text
    assert page.having("u") == []
    for fact in ("Linux & co", "torch 2.13, <b> 1", "jax 0.10", "tpu", "abc123", "dim = 20", "seed 3"):
        assert fact in page.text


def test_every_tensor_stands_in_the_table_and_in_a_plot():
    a, b, truth = pair("gradient/layers.1.mlp.up_proj.weight")
    page = Page(report_page({"float32": compare_traces(a, b, truth)}))
    dots = [*page.having("circle", "dot"), *page.having("path", "dot")]
    assert len(dots) == len(NAMES)
    assert len(page.having("circle", "bad")) == 2
    cells = [text.strip() for text in page.texts]
    assert [text for text in cells if text in NAMES][-len(NAMES) :] == list(NAMES)
    tips = [text.split("\n")[0] for text in cells if "relative error" in text and "limit" in text]
    assert [text for text in tips if text in NAMES] == list(NAMES)
    assert "First to diverge, backward" in page.text
    assert "First to diverge, forward" not in page.text


def test_the_verdict_counts():
    a, b, truth = pair()
    right = Page(report_page({"float32": compare_traces(a, b, truth)}))
    assert "the same function" in right.text
    assert not right.having("span", "bad")
    a, b, truth = pair("loss")
    wrong = Page(report_page({"float32": compare_traces(a, b, truth)}))
    assert "2 of 3 comparisons differ" in wrong.text
    assert "5 of 13 differ" in wrong.text


def test_a_scalar_has_no_place():
    a, b, truth = pair("loss")
    b = Trace({**b.tensors, **{name: truth.tensors[name] for name in NAMES if name != "loss"}}, b.meta)
    page = Page(report_page({"float32": compare_traces(a, b, truth)}))
    assert "First to diverge, forward loss status differs torch" in page.text
    assert page.having("img") == []


def test_the_overview_takes_findings_of_other_checks():
    a, b, truth = pair()
    findings = [
        Finding("cached decoding", "jax", ok=False, worst="decode/drawn", error=3.0, limit=1.5, detail="off & on")
    ]
    page = Page(report_page({"float32": compare_traces(a, b, truth)}, findings))
    assert "1 of 1 comparisons differ" in page.text
    assert "decode/drawn" in page.text
    assert "off & on" in page.text


def test_places_and_values_of_the_first_divergence_are_told():
    a, b, truth = pair()
    wrong = np.array(b.tensors["forward/layers.1.mlp"])
    wrong[1, 3, 2] = np.nan
    b = Trace({**b.tensors, "forward/layers.1.mlp": wrong}, b.meta)
    page = Page(report_page({"float32": compare_traces(a, b, truth)}))
    assert "First to diverge, forward" in page.text
    assert "(1, 3, 2)" in page.text
    assert "jax nan" in page.text
    assert "1 of 60 places" in page.text
    assert len(page.having("path", "bad")) == 1  # an infinite error is a triangle


def test_layers_are_numbered_in_the_order_of_the_pass():
    a, b, truth = pair()
    page = Page(report_page({"float32": compare_traces(a, b, truth)}))
    below = [text for text in page.texts if re.fullmatch(r"[0-2]", text.strip())]
    assert [text for text in below if text in "012"][-6:] == ["0", "1", "2", "2", "1", "0"] or below[:3] == [
        "0",
        "1",
        "2",
    ]


def test_missing_tensors_do_not_break_the_page():
    a, b, truth = pair()
    b = Trace({name: array for name, array in b.tensors.items() if name != "loss"}, b.meta)
    page = Page(report_page({"float32": compare_traces(a, b, truth)}))
    assert "missing in b" in page.text


def test_nothing_to_report_and_nowhere_to_write(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        report_page({})
    a, b, truth = pair()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; the name of a folder is needed"):
        write_report(tmp_path / "file" / "report.html", {"float32": compare_traces(a, b, truth)})


def test_dots_stand_below_their_limit_exactly_if_they_are_within():
    a, b, truth = pair("gradient/layers.2.mlp.up_proj.weight", 30 * DELTA)
    rows = [row for row in compare_traces(a, b, truth).rows if row.group == "gradient"]
    picture = error_plot(rows, "x")
    heights = [float(y) for y in re.findall(r'<circle class="dot[^>]* cy="([\d.]+)"', picture)]
    limits = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)H", picture)]
    assert len(heights) == len(limits) == len(rows)
    assert [y > limit for y, limit in zip(heights, limits, strict=True)] == [row.ok for row in rows]
    assert [row.ok for row in rows] == [True, False, False, False]


def test_the_axis_is_logarithmic():
    axis = LogAxis([1e-15, 1e-12, 0.0, np.inf])
    equal_steps = np.diff([axis.y(value) for value in (1e-15, 1e-14, 1e-13, 1e-12)])
    assert np.allclose(equal_steps, equal_steps[0])
    assert equal_steps[0] < 0
    assert axis.y(0.0) > axis.y(1e-15)
    assert axis.y(np.inf) < axis.y(1e-12)


@pytest.mark.parametrize("decades", [1, 5, 8, 9, 12, 17, 33, 300])
def test_an_axis_has_a_handful_of_ticks_from_its_foot_on(decades: int):
    axis = LogAxis([1.0, 10.0**-decades])
    ticks = list(axis.ticks())
    assert ticks[0] == axis.low
    assert ticks[-1] <= axis.high < ticks[-1] + (ticks[1] - ticks[0])
    assert len(ticks) <= MAX_TICKS + 1
    finer = max(1, ticks[1] - ticks[0] - 1)
    assert finer == ticks[1] - ticks[0] or (axis.high - axis.low) / finer > MAX_TICKS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.5, "1.5"), (123.4, "123"), (1e-12, "1.00e-12"), (np.inf, "∞"), (np.nan, "nan"), (None, "")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_pictures_hold_the_pixels_they_were_given():
    alphas = [[0, 128, 255], [1, 2, 3]]
    data = png(alphas)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">II", 3, 2) + bytes((8, 6, 0, 0, 0))  # eight bits of RGBA, deflated, rows from the top
    kinds, at, pixels = [], 8, b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        kinds.append(kind)
        assert kind != b"IHDR" or body == header
        pixels += zlib.decompress(body) if kind == b"IDAT" else b""
        at += length + 12
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    assert pixels == b"".join(b"\0" + b"".join(bytes((*HEAT_RGB, alpha)) for alpha in row) for row in alphas)


def test_heat_is_the_logarithm_of_the_difference():
    tag = heat_picture(HeatMap((1, 6), ((0.0, 1.0, 1e-2, 1e-4, 1e-9, np.inf),)))
    found = re.search(r"base64,([^\"]+)", tag)
    assert found
    data = base64.b64decode(found.group(1))
    start = data.index(b"IDAT") + 4
    pixels = zlib.decompressobj().decompress(data[start:])
    assert list(pixels[4::4]) == [0, 255, 128, 13, 13, 255]


def test_failures_are_printed_in_full_up_to_a_number():
    def printed(wrong: str, **options: Any) -> str:
        a, b, truth = pair(wrong)
        screen = Console(file=io.StringIO(), width=200)
        print_failures(screen, compare_traces(a, b, truth), **options)
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    assert printed("") == ""
    text = printed("loss")
    assert [name for name in NAMES if name in text] == list(NAMES[NAMES.index("loss") :])
    assert all(word in text for word in ("torch", "jax", "truth", "differs", "e+03"))
    assert "more" not in text
    text = printed("loss", most=2)
    assert [name for name in NAMES if name in text] == list(NAMES[NAMES.index("loss") :][:2])
    assert "and 3 more" in text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_tensors_need_no_plot(count):
    tensors = {f"forward/x{place}": values(4, seed=place) for place in range(count)}
    page = Page(report_page({"float64": compare_traces(trace(tensors), trace(tensors))}))
    assert len(page.having("svg")) == (count >= 3)


def test_limits_are_one_line_broken_where_there_is_none_and_failures_are_larger():
    tensors = {f"forward/x{place}": values(4, seed=place) for place in range(5)}
    wrong = {**tensors, "forward/x1": tensors["forward/x1"] + 1, "forward/x3": tensors["forward/x3"] * (1 + 1e-7)}
    deltas = {"float32": dict.fromkeys(tensors, 1e-7)}
    a, b = (trace(given, dtype="float32", deltas=deltas) for given in (tensors, wrong))
    rows = compare_traces(a, b).rows
    assert [row.ok for row in rows] == [True, False, True, True, True]
    page = Page(error_plot(rows, "x"))
    (path,) = page.having("path", "limit")
    assert re.sub("[^MLH]", "", str(path["d"])) == "MH" + "LH" * 4
    assert [float(str(dot["r"])) for dot in page.having("circle", "dot")] == [3, 4.5, 3, 3, 3]
    unlimited = [rows[0], dataclasses.replace(rows[1], limit=0.0), *rows[2:4]]
    (path,) = Page(error_plot(unlimited, "x")).having("path", "limit")
    assert re.sub("[^MLH]", "", str(path["d"])) == "MHMHLH"
