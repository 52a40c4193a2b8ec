"""What the host tells a training step of the documents in its rows, so that no layer has to look."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kempnerforge_jax.model import fused
from kempnerforge_jax.model.attention import attend
from kempnerforge_jax.model.mask import Mask
from kempnerforge_jax.training import train
from tests.jobs import draw_batch, tiny_job
from tests.parity.kernel_checks import HOPPER, gpu, kernels_in

LENGTH = 160


def batch_of(ids: Any, **others: Any) -> dict[str, np.ndarray]:
    return {"tokens": np.zeros((1, 1)), "labels": np.zeros((1, 1)), "doc_ids": np.asarray(ids, np.int32), **others}


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Documents of some rows (B, S), of which the last may go on with the first one's number."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, LENGTH]))
        numbers = np.random.default_rng(draw(st.integers(0, 99))).permutation(count)
        if count > 2 and draw(st.booleans()):
            numbers[-1] = numbers[0]
        found.append(numbers[np.sort(np.arange(LENGTH) % count)])
    return np.stack(found).astype(np.int32)


@settings(max_examples=40)
@given(ids=rows(), together=st.booleans())
def test_the_host_says_what_a_program_finds(ids: np.ndarray, together: bool) -> None:
    segments = jax.jit(lambda ids: fused._segments(Mask(causal=True, query_doc_ids=ids, key_doc_ids=ids), LENGTH).way)
    ways = (*fused.SEGMENTS, None)
    with gpu(HOPPER):
        found = fused.segments_of([batch_of(ids)] if together else [batch_of(row[None]) for row in ids])
    assert found == ways[int(segments(ids))]


def test_of_what_else_cuts_rows_the_host_says_nothing() -> None:
    ids = np.zeros((1, LENGTH))
    with gpu(HOPPER):
        assert fused.segments_of([batch_of(ids)]) == fused.SEGMENTS[0]
        assert fused.segments_of([batch_of(ids), batch_of(ids, text_mask=np.ones((1, LENGTH)))]) is None
        assert fused.segments_of([{"tokens": ids, "labels": ids}]) is None
    assert fused.segments_of([batch_of(ids)]) is None  # of other platforms nothing depends on it


def test_programs_that_are_told_do_not_look() -> None:
    """Of two choices, one forward and one backward, nothing is left; nor do they start from the inputs again."""
    heads = jax.ShapeDtypeStruct((2, 4, LENGTH, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def program(count: int | None) -> Any:
        def loss(q: Any, ids: Any) -> Any:
            return attend(q, q, q, Mask(causal=True, query_doc_ids=ids, key_doc_ids=ids)).astype(jnp.float32).sum()

        with gpu(HOPPER), fused.of_segments(count):
            return jax.jit(jax.grad(loss)).trace(heads, ids).jaxpr

    looking = program(None)
    assert len(kernels_in(looking.jaxpr)) == 3 * len(fused.SEGMENTS)
    for count in fused.SEGMENTS:
        told = program(count)
        assert str(told).count(" cond[") == str(looking).count(" cond[") - 2
        kernels = kernels_in(told.jaxpr)
        assert len(kernels) == 2
        widths = {shape[1] for kernel in kernels for shape in kernel["shapes"] if len(shape) == 2}
        assert widths == {count, count + 1}
    assert fused._known.get() is None


def test_the_trainer_tells_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one program serves batches of few documents, another of many."""
    told: list[int | None] = []
    compiled = train.compiled_step
    job = tiny_job({"max_seq_len": LENGTH}, train={"batch_size": 1, "seq_len": LENGTH})
    monkeypatch.setattr(train, "compiled_step", lambda recipe, segments: told.append(segments) or compiled(recipe))
    trainer = train.Trainer(job)
    for count in (1, 16, 17, 129):
        batch = draw_batch(job, 0)
        ids = np.sort(np.arange(LENGTH) % count)[None].astype(np.int32)
        batch = {"tokens": batch["tokens"], "labels": batch["labels"], "doc_ids": ids}
        monkeypatch.setattr(train, "segments_of", lambda batches: len(np.unique(batches[0]["doc_ids"])))
        trainer.step([batch])
    assert told == [1, 16, 17, 129]


def test_steps_of_unlike_segments_are_unlike_programs() -> None:
    job = tiny_job()
    recipe = train.Trainer(job).recipe
    assert train.compiled_step(recipe, 16) is train.compiled_step(recipe, 16)
    assert train.compiled_step(recipe, 16) is not train.compiled_step(recipe, 128)
