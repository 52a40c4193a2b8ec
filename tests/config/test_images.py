"""Images, clips and their captions: drawn by code, read from folders, collated into rows of fixed length."""

from __future__ import annotations

import json
import logging
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared_config import JobConfig, load_config
from shared_config.data import open_data
from shared_config.data.image_sources import Example, Folder, Shapes, open_folder, read_pictures
from shared_config.data.images import ImageTextData, collate, open_image_data, with_noise_seeds
from shared_config.data.media import UndecodableError, drawn_frames, nearest_frames, read_clip, read_image, sample_times
from shared_config.data.shapes import COLOURS, PLACES, caption_entropy, shape_clip, shape_image
from shared_config.data.tokenizer import BOS, EOS, ByteTokenizer
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.interchange.vision import picture_format
from shared_config.schema import VideoConfig, VisionEncoderConfig

PLAIN = PixelRange(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
VIT: dict[str, Any] = {
    "type": "vit", "feature_dim": 24, "image_size": 16, "patch_size": 8, "n_heads": 3, "n_layers": 1
}  # fmt: skip


def job(**changes: Any) -> JobConfig:
    fields: dict[str, Any] = {
        "model": {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 260, "max_seq_len": 128},
        "vision_encoder": VIT,
        "vlm": {"arch": "joint_decoder", "max_text_len": 48},
        "train": {"batch_size": 4, "seq_len": 48},
        "eval": {"steps": 2},
    }
    return JobConfig(**{**fields, **changes})


def text_of(ids: np.ndarray) -> str:
    return ByteTokenizer().decode(ids).rstrip("\0")


def solid(colour: str) -> np.ndarray:
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8), (10, 12, 3)).copy()


def folder_of(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def write_clip(file: Path, frames: int, rate: int = 10) -> None:
    """Frames whose brightness tells their number."""
    with av.open(str(file), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt, video.bit_rate = 32, 32, "yuv420p", 2_000_000
        for index in range(frames):
            grey = np.full((32, 32, 3), 20 + index * 200 // max(frames - 1, 1), np.uint8)
            for packet in video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in video.encode(None):
            container.mux(packet)


# Shapes


def test_captions_say_what_is_drawn() -> None:
    seen = set()
    for index in range(60):
        image, caption = shape_image(index, 32)
        _, _, colour, form, _, _, *where = caption.split()
        seen.add((colour, form, *where))
        x, y = PLACES[" ".join(where)]
        middle = image[int(y * 32), int(x * 32)].astype(int)
        assert np.abs(middle - np.array(COLOURS[colour])).max() <= 30, caption
        corner = image[31 - 31 * (y > 0.5), 31 - 31 * (x > 0.5)].astype(int)
        assert np.abs(corner - 60).max() <= 25
    assert len(seen) > 30
    large = sum(
        int((np.abs(shape_image(i, 32)[0].astype(int) - 60) > 30).any(axis=2).sum())
        for i in range(60)
        if "large" in shape_image(i, 32)[1]
    )
    small = sum(
        int((np.abs(shape_image(i, 32)[0].astype(int) - 60) > 30).any(axis=2).sum())
        for i in range(60)
        if "small" in shape_image(i, 32)[1]
    )
    assert large > 2 * small
    assert caption_entropy() == pytest.approx(np.log(144))


def test_shapes_follow_from_index_and_split() -> None:
    first, again = shape_image(7, 24), shape_image(7, 24)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.array_equal(first[0], shape_image(8, 24)[0])
    assert not np.array_equal(first[0], shape_image(7, 24, "heldout")[0])


def test_moving_shapes_move_where_the_caption_says() -> None:
    for index in range(12):
        clip, caption = shape_clip(index, 32, 5)
        assert clip.shape == (5, 32, 32, 3)
        bright = [np.argwhere((np.abs(frame.astype(int) - 60) > 30).any(axis=2)).mean(axis=0) for frame in clip]
        down, right = bright[-1] - bright[0]
        axis, sign = {"right": (right, 1), "left": (right, -1), "down": (down, 1), "up": (down, -1)}[
            caption.split()[-1]
        ]
        assert sign * axis > 8, caption


# Collator


def test_rows_have_fixed_length_and_prompts_are_not_learned() -> None:
    examples = [
        Example(solid("red")[None, :8, :8], "ab", prompt="Q: "),
        Example(np.zeros((0, 8, 8, 3), np.uint8), "a longer text than fits"),
    ]
    batch = collate(examples, ByteTokenizer(), PLAIN, text_len=8)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "input_ids": ("int32", (2, 8)),
        "labels": ("int32", (2, 8)),
        "text_mask": ("bool", (2, 8)),
        "pixel_values": ("float32", (2, 3, 8, 8)),
        "frame_mask": ("bool", (2, 1)),
    }
    assert batch["input_ids"][0].tolist() == [BOS, *b"Q: ab", 0, 0]
    assert batch["labels"][0].tolist() == [-100, -100, -100, *b"ab", EOS, -100, -100]
    assert batch["text_mask"][0].tolist() == [True] * 6 + [False] * 2
    assert batch["input_ids"][1].tolist() == [BOS, *b"a longe"]
    assert batch["labels"][1].tolist() == [*b"a longer"]
    assert batch["frame_mask"].tolist() == [[True], [False]]
    np.testing.assert_allclose(batch["pixel_values"][0, :, 3, 4], np.array(COLOURS["red"]) / 127.5 - 1, rtol=1e-6)
    assert not batch["pixel_values"][1].any()


def test_clips_are_padded_and_cut() -> None:
    frames = np.stack([np.full((8, 8, 3), 10 * index, np.uint8) for index in range(5)])
    batch = collate([Example(frames[:2], "x"), Example(frames, "y")], ByteTokenizer(), PLAIN, text_len=4, frames=3)
    assert batch["pixel_values"].shape == (2, 3, 3, 8, 8)
    assert batch["frame_mask"].tolist() == [[True, True, False], [True] * 3]
    assert not batch["pixel_values"][0, 2].any()


# Batches


def test_embedded_default() -> None:
    data = open_data(job())
    assert isinstance(data, ImageTextData)
    batch = data.batch(0)
    assert set(batch) == {"input_ids", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    text = text_of(batch["input_ids"][0])
    assert text.startswith(("a small", "a large"))
    assert "at the" in text
    for name, array in open_data(job()).batch(0).items():
        np.testing.assert_array_equal(array, batch[name])
    other = open_data(job(train={"batch_size": 4, "seq_len": 48, "seed": 1})).batch(0)
    assert not np.array_equal(other["pixel_values"], batch["pixel_values"])
    heldout = data.heldout()
    assert len(heldout) == 2
    assert not np.array_equal(heldout[0]["pixel_values"], batch["pixel_values"])
    with pytest.raises(ValueError, match="index = -1"):
        data.batch(-1)
    with pytest.raises(ValueError, match="rank = 2: must be at least 0 and below world_size = 2"):
        open_image_data(job(), rank=2, world_size=2)


def test_ranks_share_the_rows_of_a_batch() -> None:
    whole = open_image_data(job(train={"batch_size": 4, "seq_len": 48})).batch(3)
    halves = [open_image_data(job(train={"batch_size": 2, "seq_len": 48}), rank=r, world_size=2) for r in (0, 1)]
    joined = np.concatenate([half.batch(3)["pixel_values"] for half in halves])
    np.testing.assert_array_equal(joined, whole["pixel_values"])
    assert halves[0].rows_per_batch == 4
    assert halves[0].tokens_per_batch == 4 * 48


def test_clips_of_the_embedded_default_are_ragged() -> None:
    video = {"max_frames": 4, "min_frames": 2, "frame_size": 16}
    data = open_image_data(job(video=video, eval={"steps": 3, "batch_size": 8}))
    masks = np.concatenate([batch["frame_mask"] for batch in data.heldout()])
    assert set(masks.sum(axis=1)) == {2, 3, 4}
    assert data.batch(0)["pixel_values"].shape == (4, 4, 3, 16, 16)
    assert "moving" in text_of(data.batch(0)["input_ids"][0])


def test_only_experts_are_told_what_is_padding() -> None:
    moma = job(vlm={"arch": "moma", "max_text_len": 48})
    assert "text_mask" in open_image_data(moma).batch(0)
    assert "text_mask" not in open_image_data(job()).batch(0)
    batches = [{"labels": np.zeros(2)}] * 2
    seeded = with_noise_seeds(moma, batches, step=5)
    assert [int(batch["noise_seed"]) for batch in seeded] == [42 * 1_000_003 + 10, 42 * 1_000_003 + 11]
    assert with_noise_seeds(job(), batches, step=5) is batches
    silent = job(vlm={"arch": "moma", "max_text_len": 48, "moma_gumbel_noise": False})
    assert with_noise_seeds(silent, batches, step=5) is batches


def test_vocabulary_must_hold_the_tokenizer() -> None:
    small = job(model={"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 200, "max_seq_len": 128})
    with pytest.raises(UserError, match=r"model\.vocab_size = 200"):
        open_image_data(small)


# Folders


def image_folder(path: Path) -> Path:
    lines = [{"file_name": f"{index}.png", "text": f"number {index}", "prompt": "what? "} for index in range(20)]
    folder = folder_of(
        path,
        [*lines, {"file_name": "broken.png", "text": "b"}, {"file_name": "none.png", "text": "n"}, {"text": "alone"}],
    )
    for index in range(20):
        Image.fromarray(np.full((5, 9, 3), index * 10, np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n and nothing more")
    return folder


def test_folders_give_every_row_once_an_epoch(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    config = job(data={"path": str(folder), "heldout_fraction": 0.2}, train={"batch_size": 1, "seq_len": 48})
    data = open_image_data(config)
    assert not isinstance(data.source, type(None))
    count = len(data.source.rows["train"])  # type: ignore[union-attr]
    epochs = [[text_of(data.batch(epoch * count + k)["input_ids"][0]) for k in range(count)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]
    heldout = open_image_data(
        job(data={"path": str(folder), "heldout_fraction": 0.2}, eval={"steps": 9, "batch_size": 4})
    ).heldout()
    rows = sum(int((batch["labels"] != -100).any(axis=1).sum()) for batch in heldout)
    assert rows + count == 23
    assert all(batch["labels"].shape == (4, 48) for batch in heldout)


def test_rows_whose_prompt_leaves_no_label_are_left_out(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": "yes", "prompt": "x" * length} for length in range(6, 22)]
    folder = folder_of(tmp_path, lines)
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(folder / "a.png")
    config = job(data={"path": str(folder), "heldout_fraction": 1e-12}, train={"batch_size": 1, "seq_len": 16})
    data = open_image_data(config)
    batches = [data.batch(index) for index in range(len(data.prompts))]
    assert all((batch["labels"] != -100).any() for batch in batches)
    assert sorted(data.prompts) == list(range(7, 7 + len(batches)))
    assert len(batches) == 10, "of 6 to 15 bytes, after which the last of 16 labels is learned"
    assert f"{len(lines) - len(batches)} of {len(lines)} rows have no label" in data.notes[0]


def test_what_can_not_be_decoded_is_counted_told_once_and_masked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_folder(image_folder(tmp_path), PLAIN, None, 1e-12)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            examples = [source.example(index, "train") for index in range(23)]
    assert sorted(source.undecodable) == ["broken.png", "none.png"]
    assert len(caplog.records) == 2
    assert "2 so far" in caplog.text
    masked = [example.text for example in examples if example.exists is not None and not example.exists.any()]
    assert masked == ["b", "n", "alone"]
    assert examples[3].frames.shape == (1, 8, 8, 3)
    assert examples[3].frames[0, 4, 4].tolist() == [30, 30, 30]
    assert examples[3].prompt == "what? "


def test_adding_rows_moves_none(tmp_path: Path) -> None:
    lines = [{"file_name": f"{index}.png", "text": "x"} for index in range(40)]
    few = open_folder(folder_of(tmp_path, lines[:20]), PLAIN, None, 0.3)
    many = open_folder(folder_of(tmp_path, lines), PLAIN, None, 0.3)
    for split in ("train", "heldout"):
        assert [row for row in many.rows[split] if row in lines[:20]] == few.rows[split]
    assert few.rows["heldout"]
    assert few.fingerprint != many.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"file_name": "a.png"}', "a string 'text'"),
        ('{"file_name": 3, "text": "x"}', "'file_name' must be"),
        ('{"file_name": "../a.png", "text": "x"}', "must lie within the folder"),
        (
            '{"file_name": ["a.png", "b.png"], "text": "x"}',
            r"must be one .* neither a \[video\] section nor vlm",
        ),
        (
            '{"file_name": ["a.mp4", "b.mp4"], "text": "clips"}',
            r"'b\.mp4'\]: must be one clip, or pictures that",
        ),
        (
            '{"file_name": ["a.png", "b.mp4"], "text": "clips"}',
            r"'b\.mp4'\]: must be one clip, or pictures that",
        ),
    ],
)
def test_lines_that_can_not_be_used_are_listed(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    video = VideoConfig(frame_size=8) if "clips" in line else None
    with pytest.raises(UserError, match=rf"metadata\.jsonl:3: .*{message}"):
        open_folder(tmp_path, PLAIN, video, 0.1)


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a folder with a metadata\.jsonl"):
        open_folder(tmp_path, PLAIN, None, 0.1)
    with pytest.raises(UserError, match="none is left to train on"):
        open_folder(folder_of(tmp_path, []), PLAIN, None, 0.1)


# Clips


def test_times_are_uniform_and_keep_both_ends() -> None:
    config = VideoConfig(max_frames=6, min_frames=3, fps=2.0)
    assert sample_times(0.0, 2.0, 50, config).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert sample_times(0.0, 9.0, 50, config).tolist() == [0.0, 1.8, 3.6, 5.4, 7.2, 9.0]
    assert sample_times(1.0, 1.4, 50, config).tolist() == pytest.approx([1.0, 1.2, 1.4])
    assert sample_times(1.0, 1.4, 2, config).tolist() == [1.0, 1.4]
    assert sample_times(3.0, 3.0, 1, config).tolist() == [3.0]


def test_frames_closest_to_the_times_and_none_twice() -> None:
    assert nearest_frames([0.0, 0.1, 0.2, 0.9, 1.0], np.linspace(0, 1, 3)) == [0, 2, 4]
    assert nearest_frames([0.0, 0.1, 0.2], np.linspace(0, 0.2, 3)) == [0, 1, 2]
    assert nearest_frames([0.0, 5.0, 5.1, 5.2], np.linspace(0, 5.2, 4)) == [0, 1, 2, 3]
    assert nearest_frames([0.0, 0.1, 0.2], np.array([0.1, 0.15, 0.2])) == [0, 1, 2]


def test_clips_are_sampled_uniformly_with_first_and_last_frame(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", frames=21)
    clip = read_clip(tmp_path / "clip.mp4", PLAIN, VideoConfig(max_frames=5, min_frames=2, fps=2.0))
    assert clip.shape == (5, 8, 8, 3)
    assert clip.dtype == np.uint8
    np.testing.assert_allclose(clip.mean(axis=(1, 2, 3)), [20, 70, 120, 170, 220], atol=6)
    short = read_clip(tmp_path / "clip.mp4", PLAIN, VideoConfig(max_frames=64, min_frames=64))
    assert len(short) == 21


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 2**32))
def test_a_frame_is_drawn_from_each_segment(count: int, more: int, seed: int) -> None:
    available = count + more
    frames = drawn_frames(available, count, np.random.default_rng(seed))
    assert len(frames) == count
    for place, frame in enumerate(frames):
        assert place * available // count <= frame < (place + 1) * available // count


def test_any_frame_of_a_segment_may_be_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = {frame for _ in range(200) for frame in drawn_frames(11, 3, rng)}
    assert drawn == set(range(11))


Policy = Literal["uniform", "random_segments"]


def clips(folder: Path, policy: Policy, seed: int = 0) -> ImageTextData:
    video = VideoConfig(max_frames=4, min_frames=2, frame_size=8, fps=3.0, sampling_policy=policy)
    return ImageTextData(
        open_folder(folder, PLAIN, video, 0.4), tokenizer=ByteTokenizer(), pixels=PLAIN, batch_size=1, text_len=8,
        vocab_size=260, frames=4, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder_of_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(8):
        write_clip(folder / f"{index}.mp4", frames=21)
    for index in range(9):
        Image.fromarray(np.full((8, 8, 3), 25 * index, np.uint8)).save(folder / f"{index}.png")
    rows: list[dict[str, Any]] = [{"file_name": f"{index}.mp4", "text": str(index)} for index in range(8)]
    return folder_of(folder, [*rows, {"file_name": [f"{index}.png" for index in range(9)], "text": "many"}])


def test_frames_are_drawn_anew_at_each_visit_and_the_same_in_each_run(folder_of_clips: Path) -> None:
    def batches(
        policy: Literal["uniform", "random_segments"], epochs: int, seed: int = 0
    ) -> list[dict[str, np.ndarray]]:
        data = clips(folder_of_clips, policy, seed)
        rows = len(data._rows["train"])
        assert 3 <= rows < 9
        return [data.batch(index) for index in range(epochs * rows)]

    def shown(batches: list[dict[str, np.ndarray]]) -> dict[bytes, list[bytes]]:
        """Pictures by text, in the order of visits."""
        found: dict[bytes, list[bytes]] = {}
        for batch in batches:
            found.setdefault(batch["input_ids"].tobytes(), []).append(batch["pixel_values"].tobytes())
        return found

    drawn, again = shown(batches("random_segments", 4)), shown(batches("random_segments", 4))
    uniform = shown(batches("uniform", 4))
    assert drawn == again
    assert all(len(set(visits)) > 1 for visits in drawn.values()), "each visit draws"
    assert all(len(set(visits)) == 1 for visits in uniform.values())
    assert drawn != shown(batches("random_segments", 4, seed=1)), "another seed draws others"
    assert all(batch["frame_mask"].sum() == 4 for batch in batches("random_segments", 1))


def test_held_out_clips_are_sampled_uniformly_whatever_the_policy(folder_of_clips: Path) -> None:
    drawn, uniform = clips(folder_of_clips, "random_segments").heldout(), clips(folder_of_clips, "uniform").heldout()
    assert drawn
    for one, other in zip(drawn, uniform, strict=True):
        np.testing.assert_equal(one, other)
    video = VideoConfig(max_frames=4, frame_size=8)
    shapes = Shapes(8, video.replace(sampling_policy="random_segments")), Shapes(8, video)
    held, trained = ([source.example(3, split).frames for source in shapes] for split in ("heldout", "train"))
    np.testing.assert_array_equal(held[0], held[1])
    assert trained[0].shape == trained[1].shape
    assert (trained[0] != trained[1]).any()


def test_more_pictures_than_a_row_may_show_are_sampled_from_all_over(folder_of_clips: Path) -> None:
    source = clips(folder_of_clips, "uniform").source
    assert isinstance(source, Folder)
    (split, index) = next(
        (split, index) for split, rows in source.rows.items() for index, row in enumerate(rows) if row["text"] == "many"
    )
    assert source.example(index, split).frames[:, 0, 0, 0].tolist() == [0, 75, 125, 200]


@pytest.mark.parametrize(
    ("matrix", "bright"), [((1, 0, 0, 1), "left"), ((0, 1, -1, 0), "top"), ((-1, 0, 0, -1), "right")]
)
def test_clips_stand_upright_as_their_container_says(matrix: tuple[int, ...], bright: str, tmp_path: Path) -> None:
    """The left half of the coded frames is bright; the display matrix of the track turns them clockwise."""
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt, video.bit_rate = 32, 32, "yuv420p", 2_000_000
        coded = np.full((32, 32, 3), 20, np.uint8)
        coded[:, :16] = 220
        for packet in [*video.encode(av.VideoFrame.from_ndarray(coded, format="rgb24")), *video.encode(None)]:
            container.mux(packet)
    content = bytearray(file.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    (frame,) = read_clip(file, PLAIN, VideoConfig(max_frames=1, min_frames=1))
    halves = {"left": frame[:, :4], "right": frame[:, 4:], "top": frame[:4], "bottom": frame[4:]}
    assert max(halves, key=lambda side: halves[side].mean()) == bright


def test_clips_in_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "clip.mp4", frames=9)
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    Image.fromarray(solid("red")).save(tmp_path / "1.png")
    folder_of(
        tmp_path,
        [
            {"file_name": "clip.mp4", "text": "video"},
            {"file_name": ["1.png", "gone.png", "1.png"], "text": "frames"},
            {"file_name": "cut.mp4", "text": "broken"},
        ],
    )
    video = VideoConfig(max_frames=4, min_frames=2, frame_size=8)
    source = open_folder(tmp_path, PLAIN, video, 1e-12)
    shown = [source.example(index, "train").exists for index in range(3)]
    assert [each.tolist() for each in shown if each is not None] == [[True] * 3, [True] * 2, [False]]
    assert sorted(source.undecodable) == ["cut.mp4", "gone.png"]


def test_a_clip_is_shown_alone(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", frames=3)
    Image.fromarray(solid("red")).save(tmp_path / "1.png")
    video = VideoConfig(max_frames=8, min_frames=3, frame_size=8)
    clip, picture = tmp_path / "clip.mp4", tmp_path / "1.png"
    for files in ([clip, clip], [picture, clip]):
        with pytest.raises(UserError, match=r"clip\.mp4: must stand alone, as the config has one clip"):
            read_pictures(files, PLAIN, video)
    assert [len(read_pictures(files, PLAIN, video)) for files in ([clip], [picture] * 5)] == [3, 5]


def test_readers_say_why(tmp_path: Path) -> None:
    with pytest.raises(UndecodableError, match="No such file"):
        read_image(tmp_path / "a.png", PLAIN)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UndecodableError):
        read_clip(tmp_path / "a.mp4", PLAIN, VideoConfig())


def test_missing_libraries_are_named_with_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"1\.png: reading images needs Pillow \(pip install .*\[images\]\)"):
        read_image(tmp_path / "1.png", PLAIN)
    with pytest.raises(UserError, match=r"1\.mp4: reading clips needs PyAV \(pip install .*\[video\]\)"):
        read_clip(tmp_path / "1.mp4", PLAIN, VideoConfig())


def test_sound_alone_is_no_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        audio: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*audio.encode(frame), *audio.encode(None)])
    with pytest.raises(UndecodableError, match="holds no video"):
        read_clip(tmp_path / "sound.mp4", PLAIN, VideoConfig())


# What the encoder takes


def test_picture_formats(tmp_path: Path) -> None:
    assert picture_format(VisionEncoderConfig(**VIT)) == PixelRange(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    random = VisionEncoderConfig(feature_dim=4, num_tokens=4)
    assert picture_format(random).side == 32
    assert picture_format(random, VideoConfig(frame_size=20)).side == 20
    with pytest.raises(ConfigError, match=r"video\.frame_size = 20"):
        picture_format(VisionEncoderConfig(**VIT), VideoConfig(frame_size=20))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14})
    )
    clip = VisionEncoderConfig(type="clip", path=str(tmp_path))
    assert picture_format(clip).side == 56
    assert picture_format(clip).mean[0] == pytest.approx(0.4815, abs=1e-4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    assert picture_format(clip).mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": 1}))
    with pytest.raises(UserError, match="image_std = 1: must be three numbers"):
        picture_format(clip)


def test_pixels_become_numbers_channel_first() -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    frames[0, 0, 1] = (255, 0, 51)
    numbers = PixelRange(2, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)).numbers(frames)
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers[0, :, 0, 1], [1.0, -1.0, 0.2], rtol=1e-6)


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot", "moma"])
def test_presets_find_their_data(arch: str) -> None:
    config = load_config(f"debug_vlm_{arch}")
    batch = open_data(config).batch(0)
    assert batch["labels"].shape == (config.train.batch_size, config.train.seq_len)
