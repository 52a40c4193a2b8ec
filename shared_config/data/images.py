"""Batches of images, or clips, with text: from a folder, or drawn by code where none is given.

A folder holds pictures and a ``metadata.jsonl`` (as Hugging Face's ImageFolder has it), one JSON object per line:

    {"file_name": "cats/1.png", "text": "a cat on a chair"}
    {"file_name": "2.jpg", "prompt": "What is this? ", "text": "a boat"}
    {"file_name": "clips/3.mp4", "text": "a dog runs"}                        with a [video] section
    {"file_name": ["f/1.png", "f/2.png"], "text": "frames, in order"}         with a [video] section
    {"file_name": ["a.png", "b.png"], "prompt": "<image> or <image>? ", "text": "the first"}
                         with data.max_images of 2 or more, and vlm.image_token_id, the id of what stands for a picture
    {"text": "no picture at all"}

What can't be decoded is counted, reported once, and masked: its row is trained as text alone.

Shapes: B rows of a batch on one rank, T text positions of a row, F frames, s pixels per side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.data.batches import Batch, permute
from shared_config.data.image_sources import Example, Folder, PictureRow, Shapes, images_of, open_folder, row_tokens
from shared_config.data.tokenizer import Tokenizer, build_tokenizer, check_vocabulary
from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.interchange.vision import picture_format, tokens_per_image
from shared_config.schema.job import JobConfig

MAX_SEED = 2**31


class ImageTextData:
    """Training batches by index, and a fixed set of held-out batches; see `shared_config.data.batches.TextData`.

    Attributes:
        rows_per_batch: rows of a batch over all ranks.
        tokens_per_batch: text positions of a batch over all ranks.
        prompts: tokens of the prompt of each row to train on.
        notes: what a user should know about the data, one line each.
    """

    def __init__(
        self,
        source: Shapes | Folder,
        *,
        tokenizer: Tokenizer,
        pixels: PixelRange,
        batch_size: int,
        text_len: int,
        vocab_size: int,
        frames: int = 0,
        images: int = 1,
        text_mask: bool = False,
        image_token: int | None = None,
        has_prefix: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        heldout_batch_size: int | None = None,
        heldout_steps: int = 8,
    ):
        """
        Args:
            pixels: how bytes become numbers.
            frames: F of clips; 0 for images, which have no axis of frames.
            images: N, the most of a row that are no frames of a clip.
            text_mask: also give which text positions are real, so that no padding is sent to experts.
            image_token: the id that stands for an image in a row, once for each, and says where it is; None, or if it
                is not in a row with one image: that stands before the text.
            has_prefix: prompts have attention in both directions, as `row_tokens` has it.

        Raises:
            UserError: a vocabulary that is too small, a row with more or fewer ids of images than images, or no row to
                train on has a label within ``text_len``.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size}: must be at least that of the tokenizer, {tokenizer.vocab_size}"
            )
        self.source, self.tokenizer, self.pixels = source, tokenizer, pixels
        self.image_token, self.has_prefix, self.images = image_token, has_prefix, images
        self.batch_size, self.text_len, self.frames, self.text_mask = batch_size, text_len, frames, text_mask
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.heldout_batch_size = heldout_batch_size or batch_size
        self.heldout_steps = heldout_steps
        self.rows_per_batch = batch_size * world_size
        self.tokens_per_batch = self.rows_per_batch * text_len
        self.notes: tuple[str, ...] = ()
        self._rows: dict[str, list[int]] = {"train": [], "heldout": []}
        self.prompts: Sequence[int]
        if isinstance(source, Folder):
            self._rows, self.prompts = self._check_labels(source)
        else:
            self.prompts = [self._prompt_tokens({"text": " "}) or 0]

    def _check_labels(self, folder: Folder) -> tuple[dict[str, list[int]], list[int]]:
        """The rows that have a label, by split: those whose prompt fills ``text_len`` have none; and the tokens of the
        prompts of those to train on.
        """
        prompts = {split: [self._prompt_tokens(row) for row in rows] for split, rows in folder.rows.items()}
        kept = {split: [row for row, prompt in enumerate(own) if prompt is not None] for split, own in prompts.items()}
        every, left = (sum(map(len, parts.values())) for parts in (folder.rows, kept))
        if left < every:
            self.notes = (
                f"data.path = {folder.name!r}: {every - left} of {every} rows have no label within "
                f"train.seq_len = {self.text_len} and are left out",
            )
        if not kept["train"]:
            raise UserError(
                f"data.path = {folder.name!r}: none of its {len(folder.rows['train'])} rows to train on has a label "
                f"within train.seq_len = {self.text_len}; the prompts are longer"
            )
        return kept, [prompt for prompt in prompts["train"] if prompt is not None]

    def _prompt_tokens(self, row: PictureRow) -> int | None:
        """How many tokens of a row stand before what is learned; None: nothing is, within ``text_len``."""
        shown = 0 if not isinstance(self.source, Folder) else images_of(row, self.source.video)
        text = row["text"], row.get("prompt", "")
        _, learned, _ = row_tokens(*text, self.tokenizer, self.image_token, shown, self.has_prefix)
        return int((~learned).sum()) if learned[1 : self.text_len + 1].any() else None

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs see the same rows."""
        return self.source.fingerprint

    def batch(self, index: int) -> Batch:
        """Training batch ``index`` (from 0) of this rank; see `collate`."""
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        first = (index * self.world_size + self.rank) * self.batch_size
        rows = range(first, first + self.batch_size)
        if isinstance(self.source, Shapes):
            start = self.seed << 32  # another seed, other pictures
            return self._collated([self.source.example(start + row, "train") for row in rows])
        kept = self._rows["train"]
        visits = [f"{self.seed} {row // len(kept)}" for row in rows]
        chosen = [kept[self._shuffled(row, len(kept))] for row in rows]
        return self._collated(
            [self.source.example(row, "train", visit) for row, visit in zip(chosen, visits, strict=True)]
        )

    def in_steps_of(self, rows: int) -> ImageTextData:
        """The same data: no batch depends on how many rows a step has."""
        return self

    def heldout(self) -> list[Batch]:
        """The evaluation batches of this rank, the same at every call and for every seed; a short last one is filled up
        with rows whose labels are all -100.
        """
        size, total = self.heldout_batch_size, self.heldout_steps * self.heldout_batch_size * self.world_size
        available = total if isinstance(self.source, Shapes) else min(len(self._rows["heldout"]), total)
        steps = -(-available // (size * self.world_size))
        starts = [(index * self.world_size + self.rank) * size for index in range(steps)]
        return [self._heldout_batch(range(start, min(start + size, available))) for start in starts]

    def _heldout_batch(self, rows: range) -> Batch:
        kept = self._rows["heldout"]
        examples = [
            self.source.example(row if isinstance(self.source, Shapes) else kept[row], "heldout") for row in rows
        ]
        missing = self.heldout_batch_size - len(examples)
        blank = Example(np.zeros((0, self.pixels.side, self.pixels.side, 3), np.uint8), "")
        batch = self._collated([*examples, *[blank] * missing])
        batch["labels"][len(examples) :] = IGNORED
        return batch

    def _shuffled(self, row: int, count: int) -> int:
        """The example of a row: every epoch visits all of them in its own order."""
        epoch, place = divmod(row, count)
        return int(permute(np.array([place], np.uint64), count, f"images {self.seed} {epoch}")[0])

    def _collated(self, examples: Sequence[Example]) -> Batch:
        how = self.text_len, self.frames, self.image_token, self.images, self.has_prefix
        batch = collate(examples, self.tokenizer, self.pixels, *how)
        if isinstance(self.source, Shapes) and self.frames == 0 and self.images == 1:
            del batch["frame_mask"]  # all are there, and attention needs no mask
        if not self.text_mask:
            del batch["text_mask"]
        return batch


def collate(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    pixels: PixelRange,
    text_len: int,
    frames: int = 0,
    image_token: int | None = None,
    images: int = 1,
    has_prefix: bool = False,
) -> Batch:
    """Rows of fixed length.

    Text is begin, prompt, text, end, as far as ``text_len`` + 1 tokens go; labels are the next tokens, -100 where the
    prompt or padding comes next.

    Returns:
        input_ids, labels: int32 (B, T).
        text_mask: bool (B, T), True at real tokens.
        pixel_values: float32 (B, 3, s, s), or (B, F, 3, s, s) with ``frames``, or (B, N, 3, s, s) with ``images`` = N.
            Where ``has_prefix``, those that a row does not have come first: text follows on the others.
        frame_mask: bool (B, 1), (B, F) or (B, N), True where there is a picture, and the row goes as far as its place.
        image_positions: int32 (B,), or (B, N) where N > 1, with ``image_token``: how many tokens stand before the
            picture; of pictures that a row does not have, all.
        prompt_lengths: int32 (B,), in place of those where ``has_prefix``: how many stand before what is learned.
    """
    shape, several = (len(examples), text_len), max(frames, images)
    prompts = np.zeros(len(examples), np.int32)
    input_ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    text_mask, frame_mask = np.zeros(shape, bool), np.zeros((len(examples), several), bool)
    pictures = np.zeros((len(examples), several, 3, pixels.side, pixels.side), np.float32)
    positions = np.full((len(examples), images), text_len, np.int32)
    for row, example in enumerate(examples):
        shown, exists = example.frames[:several], np.ones(len(example.frames), bool)
        exists = (exists if example.exists is None else example.exists)[:several]
        count = min(1, len(shown)) if frames else len(shown)
        ids, learned, places = row_tokens(example.text, example.prompt, tokenizer, image_token, count, has_prefix)
        positions[row, : len(places)] = np.minimum(places, text_len)
        ids, learned = ids[: text_len + 1], learned[: text_len + 1]
        count = max(len(ids) - 1, 0)
        prompts[row] = min((~learned).sum(), count)
        input_ids[row, :count] = ids[:-1]
        labels[row, :count] = np.where(learned[1:], ids[1:], IGNORED)
        text_mask[row, :count] = True
        within = np.resize(np.array(places) <= text_len, len(shown)) if places else exists
        first = several - len(shown) if has_prefix and not frames else 0
        own = slice(first, first + len(shown))
        frame_mask[row, own] = exists & within
        pictures[row, own] = np.where(exists[:, None, None, None], pixels.numbers(shown), 0)
    standing = {} if image_token is None else {"image_positions": positions if images > 1 else positions[:, 0]}
    standing = {"prompt_lengths": prompts} if has_prefix else standing
    return {
        **standing,
        "input_ids": input_ids,
        "labels": labels,
        "text_mask": text_mask,
        "pixel_values": pictures if frames or images > 1 else pictures[:, 0],
        "frame_mask": frame_mask,
    }


def open_image_data(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> ImageTextData:
    """The data of a vision-language job, for one of ``world_size`` data-parallel ranks.

    Raises:
        UserError: a folder that can't be read, or a vocabulary that is too small.
    """
    assert config.vision_encoder is not None
    _check_room(config)
    pixels = picture_format(config.vision_encoder, config.video)
    source: Shapes | Folder
    if config.data.path:
        source = open_folder(
            config.data.path,
            pixels,
            config.video,
            config.data.heldout_fraction,
            follow_symlinks=config.data.follow_symlinks,
            most=config.data.max_images if config.vlm is not None and config.vlm.takes_several else None,
        )
    else:
        source = Shapes(pixels.side, config.video)
    tokenizer = build_tokenizer(config.data.tokenizer, config.data.eos_id)
    check_vocabulary(tokenizer, config.data.tokenizer, config.model.vocab_size)
    return ImageTextData(
        source,
        tokenizer=tokenizer,
        pixels=pixels,
        batch_size=config.train.batch_size,
        text_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        frames=config.video.max_frames if config.video is not None else 0,
        images=config.data.max_images,
        text_mask=config.has_routers,
        image_token=None if config.vlm is None else config.vlm.image_token,
        has_prefix=config.vlm is not None and config.vlm.has_prefix,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        heldout_batch_size=config.eval.batch_size,
        heldout_steps=config.eval.steps,
    )


def _check_room(config: JobConfig) -> None:
    """Refuse rows longer than the residual stream."""
    assert config.vlm is not None
    tokens = config.vlm.residual_stream_image_tokens(config.frames_per_row * tokens_per_image(config))
    if tokens + config.train.seq_len > config.model.max_seq_len:
        field = "data.max_images" if config.video is None else "video.max_frames"
        raise UserError(
            f"train.seq_len = {config.train.seq_len}: with {tokens} image tokens, of {field} = "
            f"{config.frames_per_row}, must fit in model.max_seq_len = {config.model.max_seq_len}"
        )


def with_noise_seeds(
    config: JobConfig, micro_batches: Sequence[Mapping[str, np.ndarray]], step: int, rank: int = 0, world_size: int = 1
) -> Sequence[Mapping[str, np.ndarray]]:
    """The micro-batches of a step, each with the seed of its routing noise where experts choose with noise. Those of
    ``world_size`` ranks have the seeds that one rank's would have, dealt out in turn.
    """
    if config.vlm is None or not config.vlm.routing_noise:
        return micro_batches
    first = config.train.seed * 1_000_003 + step * len(micro_batches) * world_size + rank
    seeds = [np.asarray((first + index * world_size) % MAX_SEED, np.int32) for index in range(len(micro_batches))]
    return [{**batch, "noise_seed": seed} for batch, seed in zip(micro_batches, seeds, strict=True)]
