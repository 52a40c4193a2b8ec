"""Folders that `datasets` of Hugging Face has saved (`save_to_disk`): which of their files are the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from shared_config.errors import UserError
from shared_config.interchange.reading import MAX_JSON_BYTES, parse_json, read_bytes

STATE, DESCRIPTIONS = "state.json", ("dataset_info.json", "dataset_dict.json")


def data_files(root: Path, names: Sequence[str]) -> list[str]:
    """The names of files below a folder, without what stands beside the data of such folders: descriptions, and results
    that were cached there, which `state.json` does not list.

    Raises:
        UserError: a state that can't be read, or that lists what is not there.
    """
    listed = {PurePosixPath(name).parent: _listed(root / name) for name in names if PurePosixPath(name).name == STATE}
    for folder, files in listed.items():
        missing = sorted(files - {PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder})
        if missing:
            raise UserError(f"{root / folder / STATE}: lists {', '.join(missing)}, which is not there")
    above = {parent for folder in listed for parent in (folder, *folder.parents)}
    return [name for name in names if _is_data(PurePosixPath(name), listed) and not _describes(name, above)]


def _is_data(name: PurePosixPath, listed: dict[PurePosixPath, set[str]]) -> bool:
    return name.parent not in listed or name.name in listed[name.parent]


def _describes(name: str, folders: set[PurePosixPath]) -> bool:
    path = PurePosixPath(name)
    return path.name in DESCRIPTIONS and path.parent in folders


def _listed(state: Path) -> set[str]:
    try:
        content = parse_json(read_bytes(state, MAX_JSON_BYTES))
        assert isinstance(content, dict)
        return {str(file["filename"]) for file in content["_data_files"]}
    except (ValueError, LookupError, TypeError, AssertionError):
        raise UserError(f"{state}: is no state of a folder that datasets saved: must list _data_files") from None
