"""Weights of layers held as integers of 8 bits for decoding, which reads every weight for every token.

Each output of a matrix has a scale of its own, so that an outlier costs no other output its digits (Dettmers et al.
2022, arXiv:2208.07339, keep scales of rows as well):

    scale = max(|w|) / 127        code = w / scale, rounded to the nearest integer, ties to even

in float32, the maximum taken over the inputs. A product is computed with code * scale, which is within scale / 2 of w,
in the dtype of its other factor.

The products of all layers are held so, those of cross-attention and of experts too. Embedding and head stay as they
are: the former multiplies nothing, they may be one tensor, and errors of the head are errors of logits. So do norms,
biases, routers, whose errors are other routes, and adapters and encoders, which read an image once.
"""

from __future__ import annotations

import re

import numpy as np

LARGEST = 127
"""Of a code, and of its negative: -128 is not used."""

FLOOR = 2.0**-100
"""Of the largest weight that a scale is made of, so that it is never 0."""

WEIGHTS_DTYPES = ("float32", "int8")
"""How ``generate`` may hold weights."""

_HELD = re.compile(
    r"(?:transformer\.)?(?:cross_attention_)?layers\.\d+\.(?:\w+\.)+(?:\w+_proj(?:\.\w+)?\.weight|(?:gate|up|down)_w)"
)


def is_int8(name: str) -> bool:
    """Whether the weight of this name is held as codes and scales."""
    return _HELD.fullmatch(name) is not None


def quantised(weight: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes in the shape of a weight (out, in), or (expert, in, out), and float32 scales, of size 1 along in.

    Raises:
        ValueError: a weight that is not finite, by its name.
    """
    wide = weight.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name}: must be finite to be held as int8")
    largest = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(FLOOR))
    scales = largest / np.float32(LARGEST)
    return np.rint(wide / scales).astype(np.int8), scales


def check_weights_dtype(weights_dtype: str) -> None:
    """Refuse what weights can't be held as.

    Raises:
        ValueError: naming what is allowed.
    """
    if weights_dtype not in WEIGHTS_DTYPES:
        raise ValueError(f"weights_dtype = {weights_dtype!r}: must be one of {', '.join(WEIGHTS_DTYPES)}")
