"""Files of a tokenizer, and the special ids that a folder names beside the weights.

A Hugging Face folder holds them at its top; native weights and training runs hold them in a folder ``tokenizer``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, written_aside
from shared_config.interchange.reading import read_json
from shared_config.schema.job import JobConfig

TOKENIZER = "tokenizer"
READ = "tokenizer.json"
NOT_READ = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Vocabularies in formats of other libraries, which transformers makes a tokenizer.json of."""
TOKENIZER_FILES = (
    READ,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    *NOT_READ,
)
GENERATION = "generation_config.json"
NOT_APPLIED = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "num_beams": 1,
}
"""Settings of transformers' GenerationConfig that change the draws, and with which value they don't."""
NAMED_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def keep_tokenizer(config: JobConfig, folder: Path, source: Path | None = None) -> JobConfig:
    """Copy the tokenizer of a job to the ``tokenizer`` of its folder. Returns the config that the folder is to hold.

    Args:
        source: a folder whose special ids are kept where the job names no tokenizer.
    """
    if config.data.tokenizer != "bytes":
        copy_tokenizer(Path(config.data.tokenizer), folder / TOKENIZER)
        return config.replace(data=config.data.replace(tokenizer=TOKENIZER))
    if source is not None and special_ids(source):
        copy_tokenizer(source, folder / TOKENIZER)
    return config


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy the files of a tokenizer, and what `special_ids` says, to the folder ``target``. Returns the files.

    Raises:
        UserError: a file that can't be read or written, or a special id of the wrong kind.
    """
    if target.is_dir() and source.resolve() == target.resolve():
        return []
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in present:
        with written_aside(target / name) as aside, file_errors(source / name, "can't be read"):
            shutil.copyfile(source / name, aside)
    generation = _read_json(source / GENERATION) | special_ids(source)
    if not generation:
        return [target / name for name in present]
    with written_aside(target / GENERATION) as aside:
        aside.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return [target / name for name in (*present, GENERATION)]


def special_ids(folder: Path) -> dict[str, int | list[int]]:
    """``bos_token_id``, ``eos_token_id`` (an id or a list) and ``pad_token_id``, as far as the folder names them.

    What generation_config.json and config.json say about the end of a sequence is merged; otherwise the former goes
    first, and what neither says is read from tokenizer_config.json.

    Raises:
        UserError: a file that is not JSON, or a value that is not an id.
    """
    sources = [_read_json(folder / name) for name in (GENERATION, "config.json")]
    found = {key: [id for fields in sources for id in _ids(folder, fields, key)] for key in NAMED_IDS}
    first = {key: values[0] for key, values in found.items() if values}
    ids: dict[str, int | list[int]] = {**_ids_of_tokenizer(folder), **first}
    ends = list(dict.fromkeys(found["eos_token_id"]))
    return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})


def stop_ids(folder: Path) -> tuple[int, ...]:
    """All ids that end a sequence, as config.json and generation_config.json of a folder name them."""
    ends = special_ids(folder).get("eos_token_id", [])
    return tuple(ends) if isinstance(ends, list) else (ends,)


@dataclass(frozen=True)
class SamplingDefaults:
    """What generation_config.json of a folder says of sampling.

    Attributes:
        temperature: 0 where it says not to sample.
        stop_strings: texts that end what is generated.
        ignored: "name = value" of what changes the draws and is not applied.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    stop_strings: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def sampling_defaults(folder: Path | None) -> SamplingDefaults:
    """How a folder wants its model to be sampled; what it does not say is None.

    Raises:
        UserError: a file that is not JSON, or a value that is no number or text.
    """
    fields = {} if folder is None else _read_json(folder / GENERATION)
    numbers = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
    found: dict[str, Any] = {name: fields[name] for name in numbers if fields.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, numbers[name]) or isinstance(value, bool):
            raise UserError(f"{folder}/{GENERATION}: {name} = {value!r}: must be a number")
    if fields.get("do_sample") is False:
        found["temperature"] = 0.0
    stops = fields.get("stop_strings") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"{folder}/{GENERATION}: stop_strings = {stops!r}: must be text, or a list of texts")
    given = {name: fields.get(name, neutral) for name, neutral in NOT_APPLIED.items()}
    ignored = [f"{name} = {value!r}" for name, value in given.items() if value not in (None, NOT_APPLIED[name])]
    return SamplingDefaults(**found, stop_strings=tuple(stops), ignored=tuple(ignored))


def beside(path: Path) -> Path | None:
    """The folder with a tokenizer or special ids that belongs to weights or a run at ``path``; None if none does."""
    folder = path if path.is_dir() else path.parent
    run = [folder.parent / TOKENIZER] if folder.name.startswith("step_") else []
    if (folder / "config.json").is_file():
        return folder
    return next((found for found in (folder / TOKENIZER, *run) if has_tokenizer(found) or _has_ids(found)), None)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer, be it in a format that is not read: its ids are not those of bytes."""
    return any((folder / name).is_file() for name in (READ, *NOT_READ))


def tokenizer_problem(folder: Path) -> str:
    """Why the tokenizer of a folder can't be read, and what is needed; "" if there is a tokenizer.json."""
    if (folder / READ).is_file():
        return ""
    found = [name for name in NOT_READ if (folder / name).is_file()]
    if not found:
        return f"must be 'bytes' or a folder with a {READ}"
    return (
        f"holds {', '.join(found)}, which can't be read, and no {READ}; transformers makes one: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _has_ids(folder: Path) -> bool:
    return (folder / GENERATION).is_file()


def _ids_of_tokenizer(folder: Path) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json names."""
    added = _read_json(folder / READ).get("added_tokens") or []
    problem = UserError(f"{folder / READ}: added_tokens: must be a list of tokens with content and id")
    if not isinstance(added, list):
        raise problem
    try:
        ids = {str(token["content"]): int(token["id"]) for token in added}
    except (LookupError, TypeError, ValueError):
        raise problem from None
    names = {key: _read_json(folder / "tokenizer_config.json").get(key.removesuffix("_id")) for key in NAMED_IDS}
    texts = {key: name.get("content") if isinstance(name, dict) else name for key, name in names.items()}
    return {key: ids[text] for key, text in texts.items() if isinstance(text, str) and text in ids}


def _read_json(file: Path) -> dict[str, object]:
    return read_json(file) if file.exists() else {}


def _ids(folder: Path, fields: Mapping[str, object], key: str) -> Iterator[int]:
    value = fields.get(key)
    for id in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(id, int) or isinstance(id, bool):
            raise UserError(f"{folder}: {key} = {value!r}: must be an id, or a list of ids for the end of a sequence")
        if id >= 0:
            yield id
