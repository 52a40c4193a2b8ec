"""Rows without a label: counted, told once, and refused where there are no others."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared_config.data import BOS, ByteTokenizer, Corpus, TextData, TokenStream, open_data
from shared_config.data.conversations import Conversation, ConversationData
from shared_config.data.image_sources import Example
from shared_config.data.images import collate
from shared_config.errors import UserError
from shared_config.schema.job import JobConfig
from shared_config.training.loop import run_training
from shared_config.training.metrics import read_metrics
from tests.config.test_images import PLAIN, folder_of, image_folder
from tests.config.test_images import job as image_job
from tests.config.test_jsonl import CHATML, job, rows_file, tokenizer_folder, turns
from tests.config.test_loop import BigramTrainer, config_of, data_for


def image_data(tmp_path: Path, prompts: Sequence[int]) -> Any:
    rows = [{"file_name": f"{i % 20}.png", "text": f"t{i}", "prompt": "p" * length} for i, length in enumerate(prompts)]
    image_folder(tmp_path / "images")
    folder_of(tmp_path / "images", rows)
    config = image_job(data={"path": str(tmp_path / "images"), "heldout_fraction": 1e-12})
    return open_data(config)


def chat_data(tmp_path: Path, prompts: Sequence[int], pack: bool = False) -> Any:
    folder = tokenizer_folder(tmp_path / "tokenizer", CHATML)
    rows = [{"messages": turns("p" * length, f"t{i}")} for i, length in enumerate(prompts)]
    path = rows_file(tmp_path / "rows.jsonl", [*rows, {"messages": turns("held", "out")}])
    config = job(path, tokenizer=folder, seq_len=64, pack_documents=pack, heldout_fraction=1e-9)
    return open_data(config)


def packed_chat_data(tmp_path: Path, prompts: Sequence[int]) -> Any:
    return chat_data(tmp_path, prompts, pack=True)


SOURCES = [image_data, chat_data, packed_chat_data]


@pytest.mark.parametrize("source", SOURCES)
def test_rows_without_a_label_are_counted_and_never_drawn(source: Any, tmp_path: Path) -> None:
    data = source(tmp_path, [3, 500, 4, 500, 500])
    (note,) = [note for note in data.notes if "no label" in note]
    assert "3 of " in note
    assert "train.seq_len" in note
    for k in range(8):
        batch = data.batch(k)
        assert (batch["labels"] != -100).any(axis=1).all()
    assert not source(tmp_path, [3, 4]).notes


def test_conversations_that_are_cut_are_counted(tmp_path: Path) -> None:
    data = chat_data(tmp_path, [3, 20, 3])
    assert not data.notes
    rows = [{"messages": turns("p", "t" * length)} for length in (3, 80, 100, 4)]
    path = rows_file(tmp_path / "long.jsonl", rows)
    folder = tokenizer_folder(tmp_path / "tokenizer", CHATML)
    opened = open_data(job(path, tokenizer=folder, seq_len=64, heldout_fraction=1e-9))
    assert opened.notes == (
        f"data.path = {str(path)!r}: 2 of 4 rows are longer than train.seq_len = 64 and are truncated",
    )


@pytest.mark.parametrize("source", SOURCES)
def test_data_of_which_no_row_has_a_label_are_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path = .*none of its \d+ rows to train on has a label"):
        source(tmp_path, [500] * 5)


def test_packed_windows_without_a_label_are_counted_or_refused() -> None:
    def opened(ids: list[int]) -> TextData:
        stream = TokenStream([("here", np.array(ids, np.uint16))])
        return TextData(Corpus("it", stream, stream), batch_size=2, seq_len=2, pack_documents=True)

    assert opened([BOS, 65, 66] * 5).notes == ()
    assert opened([BOS, 65, 66, BOS, BOS, 65, 66]).notes == ("it: 1 of 3 rows have no label",)
    with pytest.raises(UserError, match="none of its 4 rows"):
        opened([BOS] * 9)


class Unlabelled(BigramTrainer):
    """Counts labels as the trainers of both backends do: without any the sum, and so the loss, is 0."""

    def step(self, micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        self.updates += 1
        return {"loss": 0.0, "grad_norm": 0.0, "tokens": 0 if self.updates < 4 else 7}

    def evaluate(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        return {"loss": 0.0, "tokens": 0}


def test_a_step_without_a_label_has_no_loss_and_says_so_once(tmp_path: Path) -> None:
    config: JobConfig = config_of(tmp_path / "run", "train.max_steps=6", "metrics.log_interval=1")
    data = data_for(config)
    data.notes = ("something to know",)
    stream = io.StringIO()
    run_training(config, Unlabelled(config), data, console=Console(file=stream, width=200))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses == [None, None, None, 0.0, 0.0, 0.0]
    assert stream.getvalue().count("no label of the whole batch") == 1
    assert stream.getvalue().count("note: something to know") == 1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["heldout_loss"] is None


def test_conversations_are_told_apart_by_their_split_too() -> None:
    rows = [Conversation(np.array([1, 9 + row, 2]), np.array([False, True, True])) for row in range(4)]
    splits = [(rows[:cut], rows[cut:]) for cut in (1, 2, 3)]
    data = [ConversationData(*split, name="talk", batch_size=1, seq_len=4) for split in [*splits, splits[0]]]
    assert len({each.fingerprint for each in data}) == 3
    assert data[0].fingerprint == data[-1].fingerprint


def test_a_text_without_ids_is_a_row_without_a_label() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.bos = None
    batch = collate([Example(np.zeros((0, 8, 8, 3), np.uint8), "")], tokenizer, PLAIN, text_len=4)
    assert not batch["text_mask"].any()
    assert (batch["labels"] == -100).all()
    assert batch["input_ids"].tolist() == [[0, 0, 0, 0]]
