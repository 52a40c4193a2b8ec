"""Weights of a text model, wherever they come from: what a vision-language model may start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared_config.interchange import checkpoint
from shared_config.interchange.files import PathLike
from shared_config.interchange.huggingface import load_huggingface
from shared_config.interchange.weights import load_weights


def load_text_weights(path: PathLike) -> dict[str, np.ndarray]:
    """Tensors by native names, from a Hugging Face folder (one with a config.json), from a training run or one of its
    checkpoints, or from native weights.

    Raises:
        UserError: nothing there, or of a kind that can't be read.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return load_huggingface(path)[1]
    if checkpoint.is_checkpoint(path) or (path.is_dir() and checkpoint.latest(path) is not None):
        return checkpoint.load(path, with_optimizer=False).state.weights
    return load_weights(path)
