"""What decoding settles before a framework is involved: prompts, sampling values, lengths and random numbers.

Shapes: B rows, S tokens of the longest prompt, N new tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from shared_config.contract.image_token import refuse_image_token
from shared_config.contract.initialise import stream
from shared_config.errors import UserError
from shared_config.schema.vlm import VLMConfig

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16
DTYPES = ("float32", "bfloat16", "float64")
"""What a model that speaks may hold its weights in and compute in; routers and norms in at least float32."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of any lengths, aligned to the left.

    Attributes:
        tokens: int32 (B, S), 0 after the end of a row.
        lengths: int32 (B,), at least 1.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def followed_by(self, new: np.ndarray, pad_token_id: int, stops: Sequence[int] = ()) -> np.ndarray:
        """int32 (B, W): each row's prompt, its new tokens up to the first of ``stops``, and padding up to the longest.

        Args:
            new: (B, N); what follows a stop is not read.
        """
        rows = [
            np.concatenate([prompt[:length], _until(made, stops)])
            for prompt, length, made in zip(self.tokens, self.lengths, new, strict=True)
        ]
        whole = np.full((len(rows), max(map(len, rows))), pad_token_id, np.int32)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = row
        return whole


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of a row are chosen, and where it ends.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: tokens that are kept, the most probable ones; 0 keeps all.
        top_p: probability of the tokens that are kept; 1 keeps all.
        eos_token_id: one id that ends a row, or several (a sequence or an array); None: no row ends early.
        pad_token_id: what follows the end of a row; any 32-bit number.
        seed: an integer, or what draws random numbers in the backend; None: a new one each time.

    Raises:
        UserError: naming the value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_id: object = None
    pad_token_id: int = 0
    seed: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature}: must be at least 0 and finite; 0 takes the most probable token"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k = {self.top_k}: must be an integer of at least 0; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be in (0, 1]; 1 keeps all tokens")
        check_integer("pad_token_id", self.pad_token_id, -(2**31), 2**31)
        read_stops(self.eos_token_id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a row."""
        return read_stops(self.eos_token_id)


def _until(tokens: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """The tokens up to the first stop, itself included."""
    found = np.flatnonzero(np.isin(tokens, list(stops)))
    return tokens[: found[0] + 1] if found.size else tokens


def read_prompts(
    prompt_tokens: Iterable[ArrayLike],
    prompt_lengths: ArrayLike | None,
    vocab_size: int,
    image_token: int | None = None,
) -> Prompts:
    """Check and align prompts.

    Args:
        prompt_tokens: integers (B, S), or a sequence of B rows of any lengths.
        prompt_lengths: integers (B,), how many tokens of each row count; one integer for one row; None: all.
        image_token: the id that stands for the image, which no prompt may hold; None: there is none.

    Raises:
        UserError: no prompt, an empty one, an id outside the vocabulary or of the image, lengths that don't fit.
    """
    rows = [np.asarray(row) for row in prompt_tokens]
    if not rows:
        raise UserError("prompt_tokens is empty: at least one prompt is needed")
    for place, row in enumerate(rows):
        if row.ndim != 1:
            raise UserError(
                f"prompt_tokens[{place}] has {row.ndim} dimensions: must be (batch, length), or a sequence of rows"
            )
    if prompt_lengths is not None:
        rows = [row[:length] for row, length in zip(rows, _checked_lengths(prompt_lengths, rows), strict=True)]
    for place, row in enumerate(rows):
        _check_row(f"prompt_tokens[{place}]", row, vocab_size)
        refuse_image_token(f"prompt_tokens[{place}]", row, image_token)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return Prompts(tokens, lengths)


def check_request(
    prompts: Prompts,
    max_new_tokens: int,
    max_seq_len: int,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    image_tokens: np.ndarray | int = 0,
) -> None:
    """Check how much to generate, and where it ends.

    Args:
        image_tokens: positions that the images of a row take, of each row (B,) or of all.

    Raises:
        UserError: an invalid number, or more tokens than the model has positions.
    """
    check_integer("max_new_tokens", max_new_tokens, 0)
    check_integer("prefill_chunk", prefill_chunk, 1)
    row = int((prompts.lengths + image_tokens).argmax())
    longest, taken = int(prompts.lengths[row]), int(np.broadcast_to(image_tokens, prompts.lengths.shape)[row])
    room, image = max_seq_len - taken, f", of which the image takes {taken}" if taken else ""
    if longest > room:
        raise UserError(
            f"prompt_tokens has a row of {longest} tokens: must be at most max_seq_len = {max_seq_len}{image}"
        )
    if longest + max_new_tokens - 1 > room:
        raise UserError(
            f"max_new_tokens = {max_new_tokens}: must be at most {room - longest + 1}, as the longest prompt "
            f"has {longest} tokens and max_seq_len = {max_seq_len}{image}"
        )
    for eos_token_id in eos_token_ids:
        check_integer("eos_token_id", eos_token_id, 0, vocab_size, "or None")


def read_stops(eos_token_id: object) -> tuple[int, ...]:
    """The ids that end a row: of an id, several of them (a sequence or an array), or None.

    Raises:
        UserError: what is not an id.
    """
    tolist = getattr(eos_token_id, "tolist", None)
    on_host: Any = eos_token_id if tolist is None else tolist()
    given = np.asarray([] if on_host is None else on_host)
    if given.ndim > 1 or (given.size and given.dtype.kind not in "iu"):
        raise UserError(f"eos_token_id = {eos_token_id!r}: must be an id, a sequence of ids, or None")
    return tuple(dict.fromkeys(given.reshape(-1).tolist()))


def check_integer(name: str, value: object, low: int, high: int | None = None, others: str = "") -> None:
    """Check an integer of Python or NumPy.

    Args:
        high: the first number that is too large.
        others: what else is allowed.

    Raises:
        UserError: another type, or out of range.
    """
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    number: Any = value
    if is_integer and low <= number and (high is None or number < high):
        return
    allowed = f"at least {low}" if high is None else f"in [{low}, {high})"
    kind = "" if is_integer else "an integer "
    raise UserError(f"{name} = {value!r}: must be {kind}{allowed}{', ' * bool(others)}{others}")


def check_dtype(dtype: str) -> None:
    """Refuse what a model can't compute in.

    Raises:
        ValueError: naming what is allowed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")


def check_architecture(vlm: VLMConfig | None) -> None:
    """Check that a model can generate token by token.

    Raises:
        UserError: its routers are not causal.
    """
    if vlm is not None and not vlm.can_generate:
        raise UserError(
            f"vlm.arch = {vlm.arch!r}: its experts choose among all tokens, later ones too, so it can't generate token "
            "by token; it needs causal routers first"
        )


def bucket(length: int, limit: int) -> int:
    """The next power of two, at least 16 and at most ``limit``: what one compiled program serves."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def cache_length(prompts: Prompts, max_new_tokens: int, max_seq_len: int, image_tokens: np.ndarray | int = 0) -> int:
    """Positions that the caches must serve: the images of a row, and every token but the last new one."""
    return bucket(int((prompts.lengths + image_tokens).max()) + max_new_tokens - 1, max_seq_len)


def prefill_chunks(length: int, chunk: int, limit: int) -> list[tuple[int, int]]:
    """(start, size) of the chunks that cover ``length`` tokens of caches with ``limit`` slots.

    All are of size ``chunk`` but the last, whose size is a bucket: it may reach past ``length``, never past ``limit``.
    """
    whole = [(start, chunk) for start in range(0, length - chunk + 1, chunk)]
    start = len(whole) * chunk
    return [*whole, (start, bucket(length - start, min(chunk, limit - start)))] if start < length else whole


def draw_uniforms(seed: int | None, rows: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (B, N). A row's numbers follow from the seed and its index; None draws a seed."""
    seed = secrets.randbits(63) if seed is None else seed
    return np.stack([stream(seed, f"sampling {row}").random(count) for row in range(rows)])


def check_uniforms(uniforms: np.ndarray, rows: int, count: int) -> np.ndarray:
    """The numbers given for sampling, as float64 (B, N).

    Raises:
        UserError: of another shape, or outside [0, 1).
    """
    uniforms = np.asarray(uniforms, np.float64)
    if uniforms.shape != (rows, count):
        raise UserError(f"uniforms.shape = {uniforms.shape}: must be (prompts, max_new_tokens) = {(rows, count)}")
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise UserError("uniforms has numbers outside [0, 1)")
    return uniforms


def _checked_lengths(prompt_lengths: ArrayLike, rows: Sequence[np.ndarray]) -> list[int]:
    given = np.atleast_1d(np.asarray(prompt_lengths))
    if not np.issubdtype(given.dtype, np.integer):
        raise UserError(f"prompt_lengths is of {given.dtype}: lengths are integers")
    if given.shape != (len(rows),):
        raise UserError(f"prompt_lengths.shape = {given.shape}: must be one for each of {len(rows)} prompts")
    lengths = given.tolist()
    for place, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if not 0 <= length <= len(row):
            raise UserError(f"prompt_lengths[{place}] = {length}: must be in [0, {len(row)}], the tokens of the row")
    return lengths


def _check_row(name: str, row: np.ndarray, vocab_size: int) -> None:
    if row.size == 0:
        raise UserError(f"{name} is empty: a prompt has at least one token")
    if not np.issubdtype(row.dtype, np.integer):
        raise UserError(f"{name} is of {row.dtype}: token ids are integers")
    bad = row[(row < 0) | (row >= vocab_size)]
    if bad.size:
        raise UserError(f"{name} holds {bad[0]}: token ids must be in [0, {vocab_size})")
