"""Curves of runs: what is drawn is what the records say, on a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config import load_config
from shared_config.cli import main
from shared_config.curves import read_run, runs_page
from shared_config.curves.plot import MOST_POINTS, Axis, curves_plot, thinned
from shared_config.curves.runs import differing_fields, flattened
from shared_config.errors import ConfigError, UserError
from shared_config.evaluation.samples import SampleLogger, read_samples, sample_loggers
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.toml import config_to_toml
from tests.jobs import text_job, tiny_job

VOID = ("meta", "input", "br")


class Balanced(HTMLParser):
    """Tags that are open, and what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run_in(folder: Path, records: list[dict[str, Any]], **sections: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.toml").write_text(config_to_toml(tiny_job(**sections)))
    return folder


def records(steps: int, slope: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 5 - slope * step, "lr": 1e-3, "grad_norm": None, "tokens_per_second": 90.0 + step}
        | ({"heldout_loss": 6 - slope * step} if step == steps else {})
        for step in range(1, steps + 1)
    ]


def test_a_page_shows_every_run_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_in(tmp_path / "<one>", records(9, 0.1))
    two = run_in(tmp_path / "two", records(700, 0.001), optimizer={"lr": 0.5})
    (two / "samples.jsonl").write_text('{"step": 3, "text": "<b>once"}\n{"step": 9, "te')
    checkpoint.save(two, TrainingState(700, {"a": np.ones(1)}, {}), backend="jax")
    assert (read_run(one).label, read_run(two).label) == (str(one), f"{two} (jax)")
    output = tmp_path / "page.html"
    assert main(["report", str(one), str(two), "--output", str(output)]) == 0
    assert "2 runs" in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert (parser.open, parser.loads) == ([], [])
    assert "<one>" not in page
    assert "&lt;b&gt;once" in page
    for text in ("4.1000", "4.3000", "5.1000", "optimizer.lr", "Held-out loss", "Tokens per second", ">0.5<"):
        assert text in page, text
    assert "Norm of the gradient" not in page, "no run has a finite one"
    assert page.count("<polyline") == 2 * 3
    assert page.count("<circle") == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no training run: needs a metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no records yet"):
        read_run(tmp_path)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_thinned_curves_keep_mean_and_end(values: list[float]) -> None:
    points = list(enumerate(values, 1))
    found = thinned(points)
    assert len(found) <= MOST_POINTS
    assert found[-1][0] == len(values)
    if len(values) <= MOST_POINTS:
        assert found == points
    elif len(values) % -(-len(values) // MOST_POINTS) == 0:
        assert np.mean([value for _, value in found]) == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_an_axis_has_round_labels_within_it(low: float, size: float) -> None:
    axis = Axis([low, low + size], 300.0, 10.0)
    assert axis.place(axis.low) == pytest.approx(300)
    assert axis.place(axis.high) == pytest.approx(10)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(9.9 <= axis.place(tick) <= 300.1 for tick in ticks)


def test_points_are_where_their_values_are() -> None:
    picture = curves_plot({"a": [(1, 2.0), (3, 4.0)], "none": [], "b": [(2, 3.0)]}, "caption")
    (line,) = re.findall(r'points="([^"]*)"', picture)
    (first, second) = (tuple(map(float, point.split(","))) for point in line.split())
    assert (first[0] < second[0], first[1] > second[1]) == (True, True)
    (x, y) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)[0]
    assert float(x) == pytest.approx((first[0] + second[0]) / 2, abs=0.1)
    assert float(y) == pytest.approx((first[1] + second[1]) / 2, abs=0.1)


def test_only_fields_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [
        read_run(run_in(tmp_path / name, records(1, 0.0), train={"seed": seed})) for name, seed in (("a", 1), ("b", 2))
    ]
    assert differing_fields(runs) == {"train.seed": [1, 2]}
    assert differing_fields(runs[:1]) == {}
    assert flattened({"a": {"b": 1, "c": {}}}) == {"a.b": 1}
    assert "Settings that differ" not in runs_page(runs[:1], "one")


def test_samples_are_taken_with_held_out_losses(tmp_path: Path) -> None:
    job = text_job(tmp_path, eval={"sample_prompt": "the", "sample_tokens": 4})
    asked: list[Any] = []

    def continued(prompt: Any, uniforms: np.ndarray) -> list[int]:
        asked.append((list(prompt), uniforms))
        return [97 + len(asked), 98, 257, 99]

    (tmp_path / "run").mkdir()
    logger = SampleLogger(job, continued)
    for step, record in (
        (1, {"loss": 1.0}),
        (2, {"heldout_loss": 1.0}),
        (4, {"heldout_loss": None}),
        (2, {"heldout_loss": 1.0}),
    ):
        logger.write(step, record)
    samples = read_samples(tmp_path / "run" / "samples.jsonl")
    assert [(sample.step, sample.text) for sample in samples] == [(2, "thedbc")]
    assert [uniforms.shape for _, uniforms in asked] == [(1, 4)] * 3
    assert asked[0][0] == [256, *b"the"]
    np.testing.assert_array_equal(asked[0][1], asked[2][1])
    assert (asked[0][1] != asked[1][1]).all()
    with pytest.raises(UserError, match=r"eval\.sample_tokens = 99: with the prompt 103 positions, must be at most"):
        sample_loggers(text_job(tmp_path, eval={"sample_prompt": "the", "sample_tokens": 99}), continued, 1)
    with pytest.raises(UserError, match=r"eval\.sample_prompt = 'the': must be empty on 2 devices"):
        sample_loggers(job, continued, 2)
    assert sample_loggers(text_job(tmp_path), continued, 2) == []
    with pytest.raises(ConfigError, match=r"eval\.sample_prompt = 'a': must be empty with a \[vlm\] section"):
        load_config("debug_vlm_mot", ["--eval.sample_prompt", "a"])
