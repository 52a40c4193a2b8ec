"""Profiles of training steps: files that viewers open, with the operations of the model and the steps that were asked
for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kempnerforge_jax.training.train import train as train_jax
from kempnerforge_torch.training.train import train as train_torch
from shared_config.schema.job import JobConfig
from tests.jobs import assert_same_bits, last_checkpoint, text_job

TRAIN = {"torch": train_torch, "jax": train_jax}
PRODUCTS = {"torch": ("aten::mm",), "jax": ("dot", "fusion")}


def job(folder: Path, name: str, **profiling: Any) -> JobConfig:
    sections = {"checkpoint": {"dir": str(folder / name)}, "train": {"max_steps": 5}, "profiling": profiling}
    return text_job(folder, **sections)


def events(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.rglob("*.trace.json.gz")
    return [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.parametrize("backend", TRAIN)
def test_a_profile_holds_the_operations_of_the_steps_asked_for(backend: str, tmp_path: Path) -> None:
    profiled = job(tmp_path, "profiled", start_step=1, end_step=3)
    TRAIN[backend](profiled, device="cpu")
    found = events(tmp_path / "profiled" / "profile")
    names = [event["name"] for event in found]
    assert any(product in name for name in names for product in PRODUCTS[backend])
    if backend == "torch":
        assert {name for name in names if "ProfilerStep" in name} == {"ProfilerStep#1", "ProfilerStep#2"}
    else:
        spans = [event["args"]["step_num"] for event in found if event["name"] == "step"]
        assert spans == ["1", "2"]
        assert list((tmp_path / "profiled").rglob("plugins/profile/*/*.xplane.pb"))
    plain = job(tmp_path, "plain")
    TRAIN[backend](plain, device="cpu")
    assert not list((tmp_path / "plain").rglob("*.trace.json.gz"))
    assert_same_bits(last_checkpoint(profiled).state, last_checkpoint(plain).state)
