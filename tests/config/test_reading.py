"""What is no regular file, or lies outside a data folder, is refused at once, whatever it is given as."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared_config.data import build_tokenizer, load_corpus, open_data, open_text_data
from shared_config.data.image_sources import open_folder, read_pictures
from shared_config.data.template import ChatTemplate
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.activations import read_activations
from shared_config.interchange.huggingface import load_huggingface
from shared_config.interchange.reading import read_bytes, read_json
from shared_config.interchange.vision import read_tower
from shared_config.interchange.weights import load_weights
from shared_config.loader import load_config
from shared_config.parity.traces import read_trace
from shared_config.schema import VideoConfig
from shared_config.training.metrics import read_metrics
from tests.config.test_images import PLAIN, solid
from tests.config.test_images import job as image_job
from tests.config.test_jsonl import CHATML, job, tokenizer_folder

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("job.toml", lambda path: load_config(str(path))),
    "text": ("a.txt", load_corpus),
    "tokens npy": ("a.npy", load_corpus),
    "tokens bin": ("a.bin", load_corpus),
    "rows": ("a.jsonl", load_corpus),
    "text in a folder": ("a.txt", lambda path: load_corpus(path.parent)),
    "rows of a job": ("a.jsonl", lambda path: open_text_data(job(path))),
    "metadata": ("metadata.jsonl", lambda path: open_folder(path.parent, PLAIN, None, 0.1)),
    "image": ("a.png", lambda path: read_pictures([path], PLAIN, None)),
    "clip": ("a.mp4", lambda path: read_pictures([path], PLAIN, VideoConfig())),
    "tokenizer": ("tokenizer.json", lambda path: build_tokenizer(str(path.parent))),
    "template": ("chat_template.jinja", lambda path: ChatTemplate(path.parent)),
    "weights": ("model.safetensors", load_weights),
    "weights of a folder": ("model.safetensors", lambda path: load_weights(path.parent)),
    "index": ("model.safetensors.index.json", load_weights),
    "hugging face": ("config.json", lambda path: load_huggingface(path.parent)),
    "tower": ("config.json", lambda path: read_tower(path.parent, "clip")),
    "trace": ("a.safetensors", read_trace),
    "activations": ("a.npz", read_activations),
    "checkpoint": ("state.json", lambda path: checkpoint.load(path.parent)),
    "metrics": ("metrics.jsonl", read_metrics),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    short = Path("/tmp") / f"kempner-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(short))
    shutil.move(short, path)


@pytest.mark.parametrize("kind", [pipe, device, listening], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_pipes_devices_and_sockets_are_refused_at_once(
    reader: str, kind: Callable[[Path], None], tmp_path: Path
) -> None:
    name, read = READERS[reader]
    if reader == "template":
        tokenizer_folder(tmp_path, CHATML)
    kind(tmp_path / name)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert any(word in str(caught.value) for word in ("named pipe", "device", "socket", "link out of the folder"))


def test_a_size_is_bounded_before_and_while_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_bytes(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(UserError, match="has 10 bytes; must be at most 9"):
        read_bytes(tmp_path / "a", 9)
    with pytest.raises(UserError, match="more than 3 bytes"):
        read_bytes("/proc/self/status", 3)
    with (tmp_path / "sparse.toml").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="must be at most"):
        load_config(str(tmp_path / "sparse.toml"))
    with pytest.raises(UserError, match="null"):
        read_bytes("a\0b", 3)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


# Folders


def text_folder(folder: Path) -> Callable[..., str]:
    (folder / "plain.txt").write_text("plain text")

    def read(**data: Any) -> str:
        corpus = load_corpus(folder, **data)
        ids = np.concatenate([stream.read(0, len(stream)) for stream in (corpus.train, corpus.heldout)])
        return bytes(ids[ids < 256].astype(np.uint8)).decode()

    return read


def test_links_out_of_a_text_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "secret.txt").write_text("a secret")
    (tmp_path / "outside" / "deep" / "more.txt").write_text("another")
    folder = tmp_path / "data"
    folder.mkdir()
    read = text_folder(folder)
    (folder / "inside.txt").symlink_to("plain.txt")
    (folder / "again").symlink_to(".")
    assert read().count("plain text") == 2
    (folder / "link.txt").symlink_to("../outside/secret.txt")
    with pytest.raises(UserError, match=r"link\.txt: is a link out of the folder; set data\.follow_symlinks"):
        read()
    assert "a secret" in read(follow_symlinks=True)
    (folder / "link.txt").unlink()
    (folder / "more").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="more: is a link out of the folder"):
        read()
    assert read(follow_symlinks=True).count("another") == 1
    (folder / "more").unlink()
    (folder / "circle.txt").symlink_to("circle.txt")
    with pytest.raises(UserError, match=r"circle\.txt"):
        read()


def test_links_out_of_an_image_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    folder.mkdir()
    Image.fromarray(solid("red")).save(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "sub").symlink_to(outside)
    for name in ("link.png", "sub/secret.png"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
        with pytest.raises(UserError, match=r"metadata\.jsonl:1: file_name = .*link out of the folder"):
            open_data(image_job(data={"path": str(folder)}))
        config = image_job(data={"path": str(folder), "follow_symlinks": True, "heldout_fraction": 1e-12})
        assert open_data(config).batch(0)["pixel_values"].any()
    (folder / "metadata.jsonl").unlink()
    (outside / "metadata.jsonl").write_text('{"text": "x"}\n')
    (folder / "metadata.jsonl").symlink_to(outside / "metadata.jsonl")
    with pytest.raises(UserError, match="link out of the folder"):
        open_folder(folder, PLAIN, None, 0.1)


def test_a_link_made_later_is_masked_and_not_followed(tmp_path: Path) -> None:
    Image.fromarray(solid("red")).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n')
    source = open_folder(tmp_path, PLAIN, None, 1e-12)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("/dev/zero")
    example = source.example(0, "train")
    assert example.exists is not None
    assert not example.exists.any()
    assert not example.frames.any()
    assert "link out of the folder" in source.undecodable["1.png"]


# Lines


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_row(separator: str, tmp_path: Path) -> None:
    raw = json.dumps({"text": f"one{separator}two", "prompt": separator}, ensure_ascii=False)
    if separator > "\x1f":
        assert separator in raw
    (tmp_path / "metadata.jsonl").write_bytes(f"{raw}\r\n{raw}".encode())
    source = open_folder(tmp_path, PLAIN, None, 1e-12)
    assert [row["text"] for row in source.rows["train"]] == [f"one{separator}two"] * 2
    record = json.dumps({"step": 1, "note": f"a{separator}b"}, ensure_ascii=False)
    (tmp_path / "metrics.jsonl").write_bytes(f"{record}\n{record}\n".encode())
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
