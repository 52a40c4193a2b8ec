"""Weights of a text model, wherever they come from: what a vision-language model may start from."""

from __future__ import annotations

from shared_config.interchange.files import PathLike
from shared_config.interchange.parts import HostArray
from shared_config.interchange.source import read_model
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.training import TrainConfig


def load_text_weights(path: PathLike, config: ModelConfig) -> dict[str, HostArray]:
    """Tensors by native names, from a Hugging Face folder, a training run or one of its checkpoints, or native weights.

    Args:
        config: of the language model that they are for. What is found beside them must agree with it in every field
            that changes the function.

    Raises:
        UserError: nothing there, of a kind that can't be read, or written with another config, listing the fields.
    """
    train = TrainConfig(seq_len=min(TrainConfig().seq_len, config.max_seq_len))
    return read_model(path, JobConfig(model=config, train=train)).weights
