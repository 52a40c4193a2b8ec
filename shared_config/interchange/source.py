"""A model from disk, whatever wrote it: a Hugging Face folder, a training run or checkpoint, or native weights.

The config that lies beside weights says what they compute. A config that is asked for must agree with it in every field
that changes the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from shared_config.contract.averaging import average_of, averaged, evaluated_average
from shared_config.contract.function import Difference, differences
from shared_config.contract.lora import without_adapters
from shared_config.contract.parameters import aliases, parameter_table
from shared_config.contract.warm_start import TRANSFORMER
from shared_config.errors import ConfigError, UserError
from shared_config.interchange import checkpoint, huggingface, run_layout, with_images
from shared_config.interchange.files import PathLike
from shared_config.interchange.former import current_fields, is_former
from shared_config.interchange.parts import HostArray
from shared_config.interchange.states import without_unused
from shared_config.interchange.tokens import beside, has_tokenizer
from shared_config.interchange.toml import config_from_dict, read_fields
from shared_config.interchange.weights import INDEX, SINGLE, WeightsError, entry_file, load_weights, weight_names
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.training import TrainConfig

Kind = Literal["huggingface", "checkpoint", "native"]
Say = Callable[[str], None]

CONFIG = "config.toml"
"""The config beside native weights, and of a run."""


FINE_TUNING: Mapping[str, Mapping[str, object]] = {
    "train": {"max_steps": 1000},
    "optimizer": {"lr": 2e-5},
    "scheduler": {"warmup_steps": 30},
}
"""What a model that is trained already begins with; the rate, as the decay and the cosine, is that of Llama 2's
fine-tuning (arXiv:2307.09288, section 3.1).
"""


def to_stderr(line: str) -> None:
    """Say something that is not a command's output."""
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class ModelSource:
    """A model from disk.

    Attributes:
        kind: what wrote it.
        config: the one asked for, or else the one found.
        found: the one beside the weights; None if there is none.
        weights: by native names.
    """

    path: Path
    kind: Kind
    config: JobConfig
    found: JobConfig | None
    weights: dict[str, HostArray]


def kind_of(path: PathLike) -> Kind:
    """What wrote a model.

    Raises:
        UserError: nothing there, or a folder that two kinds of models claim.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and (run_layout.STEP_NAME.fullmatch(path.name) or checkpoint.is_checkpoint(path)):
        return "checkpoint"
    folder = _folder(path)
    if not (folder / huggingface.CONFIG).is_file() or (path.is_file() and path.name not in (SINGLE, INDEX)):
        return "native"
    if (folder / CONFIG).exists():
        raise UserError(f"{folder}: holds both {huggingface.CONFIG} and {CONFIG}: remove the one that isn't its own")
    return "huggingface"


def find_config(path: PathLike) -> dict[str, object] | None:
    """Nested fields of the config that a model on disk knows; None if there is none.

    Raises:
        UserError: nothing there, or a config that can't be read.
        ConfigError: a config.json with values that a `ModelConfig` can't express.
    """
    path, kind = Path(path), kind_of(path)
    if kind == "huggingface":
        return _huggingface_fields(_folder(path))
    if kind == "checkpoint":
        return _checkpoint_fields(path)
    folder = _folder(path)
    if path.is_file() and path.name == run_layout.WEIGHTS and (folder / run_layout.STATE).exists():
        return _checkpoint_fields(folder)
    fields = _toml_fields(folder / CONFIG)
    return current_fields(fields) if fields is not None and _is_former(path) else fields


def read_config(path: PathLike) -> dict[str, object]:
    """Nested fields of the config that a model on disk knows.

    Raises:
        UserError: as `find_config`, or there is none.
    """
    fields = find_config(path)
    if fields is None:
        raise UserError(
            f"{path}: has no config: needs a {CONFIG}, a Hugging Face folder's config.json, or a training checkpoint"
        )
    return fields


def read_model(
    path: PathLike, config: JobConfig | None = None, *, overridden: Collection[str] = (), say: Say = to_stderr
) -> ModelSource:
    """The weights at a path, mapped from their files, once it is certain that a config means what they mean.

    Tensors are checked against the config found beside them only as far as their names need it; see `check_tensors`.

    Args:
        config: the one asked for; None: the one found.
        overridden: dotted fields that the command line sets explicitly. They win over what is found, which is reported.

    Raises:
        UserError: nothing there, no config to be found, files that can't be read, or fields that change the function
            and differ, all listed.
    """
    path, kind = Path(path), kind_of(path)
    if kind == "native":
        entry_file(path)
    fields = find_config(path)
    found = None if fields is None else _job(fields, path)
    if config is None and found is None:
        raise UserError(f"{path}: has no {CONFIG} beside it")
    if config is not None and found is not None and kind == "huggingface":
        packed = config.model.moe_packed_experts
        found = found.replace(model=found.model.replace(moe_packed_experts=packed))
    used = config or found
    assert used is not None
    if found is not None:
        check_same_function(used, found, str(path), overridden=overridden, say=say)
    weights = _read_weights(path, kind, fields, found or used, used.eval.average)
    weights = without_adapters(weights, (found or used).lora)
    if found is None:
        say(f"note: {path} has no config beside it; its weights are taken to be those of the config that is given")
    used = used.replace(lora=None)  # adapters are in the weights
    return ModelSource(path, kind, used, found, _without_aliases(weights, used.model, str(path)))


def check_same_function(
    config: JobConfig, found: JobConfig, where: str, *, overridden: Collection[str] = (), say: Say = to_stderr
) -> None:
    """Refuse a config that would make another function of the weights.

    Args:
        found: the config that the weights were written with.
        overridden: as in `read_model`.

    Raises:
        UserError: lists the fields that differ and are not overridden.
    """
    differing = differences(config, found)
    refused = [difference for difference in differing if difference.field not in overridden]
    if refused:
        raise UserError("\n".join(_refusal(refused, where)))
    for difference in differing:
        say(f"note: {difference.overriding(where)}")


def _refusal(refused: list[Difference], where: str) -> list[str]:
    lines = [f"{where}: the weights were written with another config:"]
    lines += [f"{item.field} = {item.here!r}: is {item.there!r} beside the weights" for item in refused]
    return [*lines, "leave the fields as they are there, or set them on the command line to go on all the same"]


def _read_weights(
    path: Path, kind: Kind, fields: Mapping[str, object] | None, config: JobConfig, average: bool
) -> Mapping[str, HostArray]:
    if kind == "huggingface":
        if config.vlm is not None:
            return with_images.load_image_model(path, config)
        return huggingface.views_from_huggingface(load_weights(path), config.model)
    if kind == "checkpoint":
        kept = average_of(config.optimizer) if average or config.optimizer.averages else evaluated_average(config)
        state = checkpoint.load(path, with_optimizer=kept is not None).state
        return state.weights if kept is None else averaged(kept, state.weights, state.optimizer)
    table = parameter_table(config.model, config.vlm)
    return without_unused(load_weights(path, config=fields), {*table, *(f"{TRANSFORMER}{name}" for name in table)})


def _without_aliases(state: Mapping[str, HostArray], model: ModelConfig, where: str) -> dict[str, HostArray]:
    """A tied tensor under its own name, whichever of its names are on disk.

    Raises:
        WeightsError: both are, and they differ.
    """
    state = dict(state)
    for alias, name in aliases(model).items():
        if alias not in state:
            continue
        tensor = state.pop(alias)
        if not np.array_equal(state.setdefault(name, tensor), tensor):
            raise WeightsError(where, [f"{alias}: differs from {name}, though model.tie_embeddings is true"])
    return state


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _huggingface_fields(folder: Path) -> dict[str, object]:
    """The model, and what follows from it for a job: the folder's tokenizer, sequences that fit, and `FINE_TUNING`."""
    sections: Mapping[str, Mapping[str, object]]
    if with_images.is_image_folder(folder):
        sections = with_images.read_image_config(folder)
    else:
        sections = {"model": huggingface.read_huggingface_config(folder)}
    model = sections["model"]
    fields: dict[str, object] = {**sections, **{name: dict(values) for name, values in FINE_TUNING.items()}}
    length = sections.get("vlm", {}).get("max_text_len", model.get("max_seq_len"))
    if isinstance(length, int):
        fields["train"] = {**FINE_TUNING["train"], "seq_len": min(TrainConfig().seq_len, length)}
    if has_tokenizer(folder):
        fields["data"] = {"tokenizer": str(folder)}
    return fields


def _is_former(path: Path) -> bool:
    """Whether a former version wrote the weights; not where there are none."""
    try:
        return is_former(weight_names(path))
    except UserError:
        return False


def _toml_fields(file: Path) -> dict[str, object] | None:
    return read_fields(file) if file.exists() else None


def _checkpoint_fields(path: Path) -> dict[str, object] | None:
    """The config of a checkpoint, with the tokenizer that its run keeps."""
    fields = checkpoint.read_config(path)
    kept, data = beside(path), fields.get("data", {})
    if fields and kept is not None and has_tokenizer(kept) and isinstance(data, dict):
        fields["data"] = {**data, "tokenizer": str(kept)}
    return fields or None


def _job(fields: Mapping[str, object], path: Path) -> JobConfig:
    try:
        return config_from_dict(fields)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
