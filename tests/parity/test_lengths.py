"""Both backends beyond short sequences and small counts; `length_checks` says what is checked."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from shared_config.contract.decoding import SMALLEST_BUCKET, Prompts, cache_length, prefill_chunks
from tests.parity import length_checks as checks

on_both = pytest.mark.parametrize("backend", ["torch", "jax"])


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@on_both
@pytest.mark.parametrize("mode", checks.MASKS)
def test_600_positions_of_text(backend: str, mode: str) -> None:
    checks.check_long_text(backend, mode)


@on_both
@pytest.mark.parametrize("check", ["attention", "prefix", "cross_attention", "tower", "modalities"])
def test_600_positions_of_text_and_image(backend: str, check: str) -> None:
    getattr(checks, f"check_long_{check}")(backend)


@on_both
@pytest.mark.parametrize("place", range(len(checks.EDGE_CASES)))
def test_sizes_around_the_edges_of_tiles(backend: str, place: int) -> None:
    checks.check_edges(backend, place)


@on_both
@pytest.mark.parametrize("check", ["sampling", "tables", "masks", "generation", "chunks"])
def test_positions_and_vocabularies(backend: str, check: str) -> None:
    getattr(checks, f"check_{check}")(backend)


def test_caches_hold_what_is_to_be_generated() -> None:
    """Of every length, within a bucket of it; chunks of the prompt stay inside."""
    for needed in range(1, 2100):
        for new, image in ((1, 0), (needed, 0), (max(1, needed // 3), needed // 3)):
            width = needed + 1 - new - image
            if width < 1:
                continue
            prompts = Prompts(np.zeros((1, width), np.int32), np.array([width], np.int32))
            slots = cache_length(prompts, new, 2048, image)
            assert min(needed, 2048) <= slots <= min(max(SMALLEST_BUCKET, 2 * needed - 1), 2048), (needed, new, image)
    for length in range(1, 2100, 7):
        for chunk in (1, 16, 100, 512):
            slots = -(-(length + 1) // 16) * 16
            parts = prefill_chunks(length, chunk, slots)
            ends = [start + size for start, size in parts]
            assert [start for start, _ in parts] == [0, *ends[:-1]], (length, chunk)
            assert length <= ends[-1] <= slots, (length, chunk)
