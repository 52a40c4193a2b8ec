"""Every field of a config is read by code that acts on it: outside the schema, not just to compare it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from shared_config.schema import (
    AdapterConfig,
    CheckpointConfig,
    MetricsConfig,
    ModelConfig,
    SchedulerConfig,
    TrainConfig,
    VideoConfig,
    VisionEncoderConfig,
)
from shared_config.schema.base import Section
from tests.field_reads import (
    FieldName,
    Read,
    attributes_read,
    declared_fields,
    family,
    fields_of,
    fields_read,
    section_classes,
)

ROOT = Path(__file__).parents[2]
ONLY_TELLS = (
    "shared_config/contract/function.py",
    *(f"shared_config/interchange/huggingface_{part}.py" for part in ("config", "layers", "rope")),
)
ONE_BACKEND = {
    "kempnerforge_torch": {("TrainConfig", "compile_model")},
    "kempnerforge_jax": {("TrainConfig", "scan_layers")},
}


def sources(*folders: str) -> dict[str, str]:
    """Path -> source of all modules in some folders."""
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


SCHEMA = sources("shared_config/schema")
CODE = {
    path: source
    for path, source in sources("shared_config", "kempnerforge_torch", "kempnerforge_jax").items()
    if path not in SCHEMA and path not in ONLY_TELLS
}


@functools.cache
def all_reads() -> dict[str, set[Read]]:
    """All that schema and code take from sections, by module."""
    return attributes_read(SCHEMA | CODE)


def dead(without: str = "-") -> set[FieldName]:
    """Fields that nobody reads, in code without the modules whose paths begin so."""
    reads = (read for path, found in all_reads().items() if not path.startswith(without) for read in found)
    return declared_fields(section_classes()) - fields_read(reads)


def test_every_field_is_read_outside_the_schema() -> None:
    assert dead() == set()


@pytest.mark.parametrize(
    ("section", "name", "like"),
    [
        (VideoConfig, "path", VisionEncoderConfig),
        (ModelConfig, "type", AdapterConfig),
        (MetricsConfig, "dir", CheckpointConfig),
        (TrainConfig, "name", SchedulerConfig),
    ],
)
def test_a_planted_field_is_found_dead(
    section: type[Section], name: str, like: type[Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have read fields of the same common name."""
    planted = vars(like)["__dataclass_fields__"][name]
    monkeypatch.setitem(vars(section)["__dataclass_fields__"], name, planted)
    assert dead() == {(section.__name__, name)}


@pytest.mark.parametrize("backend", ONE_BACKEND)
def test_fields_of_one_backend_are_few(backend: str) -> None:
    assert dead(backend) == ONE_BACKEND[backend]


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        (
            "shared_config/training/profiling.py",
            {("ProfilingConfig", name) for name in ("start_step", "end_step", "dir")},
        ),
        ("shared_config/data/image_sources.py", {("VideoConfig", "sampling_policy")}),
        ("shared_config/data/media.py", {("VideoConfig", "fps")}),
        ("shared_config/contract/schedule.py", {("SchedulerConfig", name) for name in ("name", "min_lr_ratio")}),
        ("shared_config/contract/rope.py", {("RopeScaling", name) for name in ("beta_fast", "beta_slow")}),
        ("shared_config/training/resume.py", {("CheckpointConfig", "load_path")}),
    ],
)
def test_a_field_is_dead_without_the_module_that_reads_it(module: str, fields: set[FieldName]) -> None:
    assert fields <= dead(module)


def test_nothing_is_taken_for_a_section_that_is_none() -> None:
    """Every attribute that counts as one of a section exists in it: `type` or `path` of other things don't count."""
    sections = section_classes()
    taken = {(owner, name) for found in all_reads().values() for _, owner, name in found}
    assert not {
        (owner, name)
        for owner, name in taken
        if not any(hasattr(cls, name) or name in fields_of(cls) for cls in family(sections, owner))
    }


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("job.video.fps", True),
        ("video.fps", True),
        ("(job.video or VideoConfig()).fps", True),
        ("[part.fps for part in (video,)]", True),
        ("job.replace(seed=1).video.fps", True),
        ("made().fps", True),
        ("other.fps", False),
        ("job.model.fps", False),
        ("video.frames.fps", False),
        ("made.fps", False),
    ],
)
def test_a_read_counts_for_the_section_that_it_is_taken_from(line: str, read: bool) -> None:
    code = f"""
def made() -> VideoConfig: ...
def act(job: JobConfig, video: VideoConfig | None, other: Stream): return {line}
"""
    assert (("VideoConfig", "fps") in read_by(code)) == read


def test_a_member_of_a_section_counts_once_it_is_used() -> None:
    unused, used = (read_by(f"def act(model: ModelConfig): return model.{name}") for name in ("problems", "head_size"))
    assert ("ModelConfig", "head_dim") not in unused
    assert ("ModelConfig", "head_dim") in used


def read_by(code: str) -> set[FieldName]:
    """Fields that are read if this module is all there is outside the schema."""
    return fields_read(read for found in attributes_read(SCHEMA | {"": code}).values() for read in found)
