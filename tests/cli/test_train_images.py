"""`kempnerforge train` and `validate` with images: a folder that is not whole, clips, a start from a text model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from kempnerforge_jax.training.train import Trainer as JaxTrainer
from kempnerforge_torch.training.train import Trainer as TorchTrainer
from shared_config.cli import main
from shared_config.interchange import checkpoint
from shared_config.loader import load_config
from shared_config.training.metrics import read_metrics
from tests.cli.processes import run_python

NIGHTLY = settings.get_current_profile_name() == "nightly"
ARCHS = ("joint_decoder", "cross_attention", "mot", "moma")
DENSE = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=64",
    "--train.seq_len=16",
    "--train.batch_size=3",
    "--eval.interval=0",
    "--eval.steps=1",
)
SEES = (
    *DENSE,
    "--vlm.max_text_len=24",
    "--vision_encoder.image_size=8",
    "--vision_encoder.patch_size=4",
    "--vision_encoder.feature_dim=12",
    "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1",
    "--train.max_steps=3",
    "--data.heldout_fraction=0.2",
)


def train(preset: str, backend: str, folder: Path, *options: str) -> int:
    command = ["train", preset, "--backend", backend, "--device=cpu", "--quiet", "--output", str(folder)]
    return main([*command, *options])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures with captions, a damaged file, a missing one and a line without a picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines: list[dict[str, str]] = [{"file_name": f"{i}.png", "text": f"grey {i}", "prompt": "? "} for i in range(12)]
    lines += [{"file_name": "cut.jpg", "text": "cut"}, {"file_name": "gone.png", "text": "gone"}, {"text": "alone"}]
    for index in range(12):
        Image.fromarray(np.full((6, 9, 3), 20 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_backends_train_alike_on_a_folder_that_is_not_whole(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mixture of transformers that starts from a text model's training run."""
    assert train("debug", "torch", tmp_path / "text", *DENSE, "--train.max_steps=1") == 0
    dense = checkpoint.load(tmp_path / "text").state.weights
    start = ("--vlm.mot_warm_start_from_text=true", f"--vlm.mot_warm_start_path={tmp_path / 'text'}")
    options = (*SEES, *start, f"--data.path={pictures}", "--train.batch_size=5")
    for build in (TorchTrainer, JaxTrainer):
        weights = build(load_config("debug_vlm_mot", options), "cpu").state().weights
        for name in ("image", "text"):
            own = weights[f"transformer.layers.0.mlp.{name}.up_proj.weight"]
            np.testing.assert_array_equal(own, dense["layers.0.mlp.up_proj.weight"])
    for backend in ("torch", "jax"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert train("debug_vlm_mot", backend, tmp_path / backend, *options) == 0
        assert "can't be decoded, 2 so far" in caplog.text
        assert {Path(record.args[0]).name for record in caplog.records if record.args} == {"cut.jpg", "gone.png"}  # type: ignore[index]
    a, b = (read_metrics(tmp_path / backend / "metrics.jsonl") for backend in ("torch", "jax"))
    assert [record["step"] for record in a] == [1, 2, 3]
    assert [record["loss"] for record in a] == pytest.approx([record["loss"] for record in b], rel=1e-5)
    assert a[-1]["heldout_loss"] == pytest.approx(b[-1]["heldout_loss"], rel=1e-5)


def test_clips_of_a_folder_are_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    with av.open(str(folder / "1.mp4"), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 16  # type: ignore[union-attr]
        for index in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * index, np.uint8), format="rgb24")
            container.mux(video.encode(frame))  # type: ignore[union-attr]
        container.mux(video.encode(None))  # type: ignore[union-attr]
    (folder / "2.mp4").write_bytes((folder / "1.mp4").read_bytes()[:99])
    lines = [{"file_name": f"{index}.mp4", "text": f"clip {index}"} for index in (1, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips = ("--video.frame_size=8", "--video.max_frames=3", "--video.min_frames=1", "--data.heldout_fraction=1e-9")
    options = (*SEES, *clips, f"--data.path={folder}", "--train.batch_size=2", "--eval.steps=0")
    assert train("debug_vlm_joint_decoder", "torch", tmp_path / "run", *options) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("arch", ARCHS if NIGHTLY else ["cross_attention"])
def test_validate(arch: str) -> None:
    own = () if NIGHTLY else ("--shrink", "--dtypes=float64", "--steps=2")
    result = run_python("-m", "shared_config.cli", "validate", f"debug_vlm_{arch}", *own, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the backends agree" in result.stdout
