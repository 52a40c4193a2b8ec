"""``kempnerforge eval``: what both backends say of a run and of given text, against the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.data import ByteTokenizer
from shared_config.errors import UserError
from shared_config.evaluation.numbers import evaluate, evaluation_batches, text_bytes
from shared_config.interchange import checkpoint
from shared_config.interchange.toml import config_to_dict
from shared_config.loader import load_config
from tests.jobs import text_job

WORDS = "naïve cats sat on the mat — twice. "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that was not trained."""
    from kempnerforge_jax.training.train import Trainer

    job = text_job(tmp_path_factory.mktemp("run"))
    return checkpoint.save(job.checkpoint.dir, Trainer(job).state(), config=config_to_dict(job), backend="jax").parent


def evaluated(run: Path, backend: str, output: Path, *options: str) -> dict[str, Any]:
    assert main(["eval", str(run), "--backend", backend, "--json", str(output), *options]) == 0
    return json.loads(output.read_text())


def test_both_backends_agree_on_all_of_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 4, encoding="utf-8")
    found = {
        backend: evaluated(run, backend, tmp_path / f"{backend}.json", "--data", str(tmp_path / "text.txt"))
        for backend in ("torch", "jax")
    }
    assert found["jax"]["loss"] == pytest.approx(found["torch"]["loss"], rel=1e-5)
    size = len((WORDS * 4).encode())
    for numbers in found.values():
        assert numbers["tokens"] == size  # with the two ends; the first id of either stream is not predicted
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
        assert size - 2 <= numbers["bytes"] <= size
        bits = numbers["loss"] * numbers["tokens"] / math.log(2) / numbers["bytes"]
        assert numbers["bits_per_byte"] == pytest.approx(bits)
    assert f"loss {found['torch']['loss']:.4f}, perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_it_asks_for_no_moments(run: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def trainer(*_: object, **options: object) -> None:
        asked.update(options)
        raise UserError("asked")

    monkeypatch.setattr(f"kempnerforge_{backend}.training.train.Trainer", trainer)
    assert main(["eval", str(run), "--backend", backend]) == 2
    assert (asked["draws"], asked["trains"]) == (False, False)


class Counting:
    """A model that gives each label a loss of its id."""

    def evaluate(self, batches: Any) -> dict[str, float]:
        labels = np.concatenate([batch["labels"][batch["labels"] >= 0] for batch in batches])
        return {"loss": float(labels.mean()) if len(labels) else 0.0, "tokens": len(labels)}


@given(length=st.integers(12, 300), size=st.integers(1, 4), most=st.integers(1, 3))
def test_every_id_but_the_first_of_a_stream_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, length: int, size: int, most: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    ids = np.random.default_rng(length).integers(0, 200, length).astype(np.uint16)
    np.save(folder / "ids.npy", ids)
    job = text_job(
        folder, train={"seq_len": 5}, eval={"batch_size": size},
        data={"path": str(folder / "ids.npy"), "heldout_fraction": 0.2},
    )  # fmt: skip
    trainer: Any = Counting()
    whole = evaluate(job, trainer, evaluation_batches(job, "all"))
    split = min(length - 2, round(length * 0.8))
    predicted = np.concatenate([ids[1:split], ids[split + 1 :]]).astype(np.int64)
    assert (whole.tokens, whole.bytes, whole.bits_per_byte) == (len(predicted), None, None)
    assert whole.loss == pytest.approx(predicted.mean())
    held = evaluate(job, trainer, evaluation_batches(job, "heldout"))
    assert held.tokens == length - split - 1
    assert len(list(evaluation_batches(job, "all", most))) <= most


def test_pictures_without_end_are_as_many_as_evaluations_have(tmp_path: Path) -> None:
    drawn = load_config("debug_vlm_mot", ["--eval.steps=3", "--eval.interval=2", "--train.batch_size=2"])
    assert [len(list(evaluation_batches(drawn, "heldout", most))) for most in (None, 1, 5)] == [3, 1, 5]
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in range(40)))
    few, many = (
        drawn.replace(data=drawn.data.replace(path=str(tmp_path), heldout_fraction=part)) for part in (1e-9, 0.5)
    )
    assert len(list(evaluation_batches(many, "heldout"))) > 3
    with pytest.raises(UserError, match=r"holds nothing that is held out, by data\.heldout_fraction = 1e-09"):
        evaluation_batches(few, "heldout")


def test_bytes_are_those_of_the_text() -> None:
    labels = np.array([[97, 195, 175, 256, -100], [257, 98, -100, -100, 99]])
    assert text_bytes(ByteTokenizer(), {"labels": labels}) == 5


def test_a_config_without_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "debug", "--backend", "torch"]) == 2
    assert "debug: has no weights to evaluate; name some with --weights" in capsys.readouterr().err
