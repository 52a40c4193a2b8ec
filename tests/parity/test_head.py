"""The loss without whole logits: in chunks of tokens the same loss and gradients, and no array of all logits."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kempnerforge_jax.training.objective as jax_objective
import kempnerforge_torch.training.loss as torch_loss
import kempnerforge_torch.training.objective as torch_objective
import kempnerforge_torch.training.train as torch_training
from kempnerforge_jax.model.build import build_model as build_jax
from kempnerforge_torch.model.build import build_model as build_torch
from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.training.loss import cross_entropy
from shared_config.contract import labels as contract
from shared_config.contract.labels import LOGITS_BYTES, rows_of_logits
from shared_config.contract.parameters import parameter_table
from shared_config.loader import load_config
from shared_config.parity.validation import validation_weights
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from tests.jobs import EXPERTS, draw_batch, tiny_job
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.parity.head_checks import check_head, check_loss, chunks_of, drawn
from tests.parity.test_no_pairs import arrays_in, shapes_seen
from tests.parity.test_vlm_training import ARCHS, SMALL
from tests.tolerance import assert_all_same_function, relative_error

sizes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 9),
    "dim": st.integers(1, 5),
    "vocabulary": st.integers(1, 11),
    "ignored": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 99),
}


@on_both
def test_the_loss_is_that_of_the_whole(backend: Torch) -> None:
    with jax.enable_x64(True):
        check_head(backend.name)


@given(
    rows=st.integers(1, 9),
    divisor=st.sampled_from([1.0, 1.7]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z=st.sampled_from([0.0, 1e-3, 2.0]),
    **sizes,
)
def test_of_any_sizes(rows: int, divisor: float, smoothing: float, z: float, **drawn_sizes: Any) -> None:
    """Shapes that JAX would compile anew each time it sees by night."""
    every = BACKENDS if settings.get_current_profile_name() == "nightly" else BACKENDS[:1]
    with jax.enable_x64(True):
        for backend in every:
            check_loss(backend, rows, *drawn(**drawn_sizes), divisor=divisor, smoothing=smoothing, z=z)


@given(st.integers(1, 2**20), st.integers(1, 2**14), st.integers(1, 2**20), st.sampled_from([2, 4, 8]))
@example(1250, 1000, 2**20, 2)
@example(1750, 1000, 2**20, 2)
def test_chunks_are_of_a_power_of_two_near_their_size(tokens: int, width: int, vocabulary: int, number: int) -> None:
    rows = rows_of_logits(tokens, width, vocabulary, number)
    few = tokens / width <= {2: 1.5, 4: 1.0, 8: 1.0}[number]
    assert not few or rows == tokens
    if rows < tokens:
        assert rows == 2 ** int(math.log2(rows))
        assert rows == 1 or rows * vocabulary * number <= math.sqrt(2) * LOGITS_BYTES
        assert rows * vocabulary * number >= LOGITS_BYTES / math.sqrt(2)
    else:
        assert few or tokens * vocabulary * number <= math.sqrt(2) * LOGITS_BYTES


class Peak(TorchDispatchMode):
    """The most bytes at a time of what PyTorch's operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for each in (each for each in tree_leaves(out) if isinstance(each, torch.Tensor)):
            storage = each.untyped_storage()
            if storage._cdata not in given | self.held.keys():
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.held.values()))
        return out


@pytest.mark.parametrize("ratio", [6, 13, 17, 30])
def test_logits_come_as_takes_less_memory(ratio: int) -> None:
    """In bfloat16 in PyTorch, for ``ratio`` tenths of the width in tokens."""
    size, width, vocabulary = 4, 64, 2048
    tokens = width * ratio // 10
    x, weight, labels = drawn(1, tokens, width, vocabulary, ignored=0.0, seed=0)
    most = {}
    for way in ("whole", "chunks", "chosen"):
        own_x, own_weight = (torch.tensor(each, dtype=torch.bfloat16).requires_grad_() for each in (x, weight))
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(torch_loss, "CHUNK_ELEMENTS", size * vocabulary))
            stack.enter_context(patch.object(contract, "LOGITS_BYTES", 2 * size * vocabulary))
            if way != "chosen":
                stack.enter_context(patch.object(contract, "takes_less_whole", lambda *_, way=way: way == "whole"))
            peak = stack.enter_context(Peak())
            cross_entropy(FactoredLogits(own_x, own_weight), torch.tensor(labels))[0].backward()
        most[way] = peak.most
    assert most["chosen"] == min(most.values()), most


@on_both
def test_narrow_gradients_are_summed_in_float32(backend: Torch) -> None:
    """Of 512 chunks: sums in bfloat16 would stop growing."""
    x, weight, labels = drawn(batch=1, length=512, dim=3, vocabulary=5, ignored=0.0, seed=3)
    x = np.abs(x)
    loss, factors = backend.module("training.loss"), backend.module("model.embedding").FactoredLogits
    narrow = [backend.numpy(backend.array(each, "bfloat16")) for each in (x, weight)]

    def total(x: Any, weight: Any) -> Any:
        return loss.cross_entropy(factors(x, weight), backend.array(labels))[0]

    found = {}
    for dtype in ("bfloat16", "float64"):
        wide = [each.astype(np.float64) if dtype == "float64" else each for each in narrow]
        with jax.enable_x64(True), chunks_of(1, 5, 2 if dtype == "bfloat16" else 8):
            found[dtype] = [each.astype(np.float64) for each in backend.gradients(total, *wide)]
    for name, value, truth in zip(("x", "weight"), found["bfloat16"], found["float64"], strict=True):
        assert relative_error(value, truth) < 2.0**-7, name


TEXT = [{"tie_embeddings": True, "activation": "gelu", "logit_divisor": 3.0}, {**EXPERTS, "moe_frequency": 1}]
JOBS = {"tied": tiny_job(TEXT[0]), "experts": tiny_job(TEXT[1])}
IMAGES = [*SMALL, "--vlm.max_text_len=24", "--train.compile_model=false", "--train.mixed_precision=fp32"]


def batches_of(name: str) -> tuple[JobConfig, list[dict[str, np.ndarray]]]:
    """Of one step and one evaluation: unequal numbers of labels, documents in rows of text."""
    if name in JOBS:
        job = JOBS[name]
        documents = np.arange(30, dtype=np.int32).reshape(3, 10) // 4
        return job, [{**draw_batch(job, seed, 0.3 * seed), "doc_ids": documents} for seed in range(3)]
    job = load_config(f"debug_vlm_{name}", IMAGES)
    data = torch_training.open_data(job)
    return job, [data.batch(index) for index in range(3)]


@pytest.mark.parametrize("name", [*JOBS, *ARCHS])
def test_a_step_and_an_evaluation_are_those_of_whole_logits(name: str) -> None:
    """Of torch; `test_training` and `test_vlm_training` hold JAX in chunks to torch without."""
    job, batches = batches_of(name)
    results, vocabulary = [], job.model.vocab_size
    whole = {(*batches[0]["labels"].shape, vocabulary), (batches[0]["labels"].size, vocabulary)}
    for rows in (4, 10**6):
        trainer = torch_training.Trainer(job, "cpu", dtype=torch.float64)
        with chunks_of(rows, vocabulary), shapes_seen() as seen:
            metrics = {key: np.array(float(value)) for key, value in trainer.step(batches[:2]).items()}
            metrics["heldout"] = np.array(float(trainer.evaluate(batches[2:])["loss"]))
        assert ((4, vocabulary) in seen, bool(whole & set(seen))) == (rows == 4, rows != 4)
        state = {**trainer.state().weights, **trainer.state().optimizer}
        rounding = [key for key in state if key.endswith("k_proj.bias")]  # whose gradient is truly 0
        results.append({**metrics, **{key: value for key, value in state.items() if key not in rounding}})
    assert_all_same_function(*results)


WIDE = tiny_job(
    {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "vocab_size": 128_256,
     "max_seq_len": 4096, "tie_embeddings": True},
    train={"batch_size": 4, "seq_len": 4096, "mixed_precision": "bf16"},
)  # fmt: skip
MOST = 1024 * 128_256
"""Logits of a chunk."""


def shapes_of_torch(job: JobConfig) -> list[tuple[int, ...]]:
    """In a step and an evaluation without values."""
    with torch.device("meta"):
        model = build_torch(job).to(torch.bfloat16)
        inputs = {name: torch.zeros(4, 4096, dtype=torch.int32) for name in ("tokens", "labels")}
        objective = torch_objective.Objective(model, job, cross_entropy)
        with shapes_seen() as found:
            objective(inputs, 1, 1)
            with torch.no_grad():
                output = model(inputs["tokens"], factored_logits=True, return_stats=True)
                cross_entropy(output.factors or output.logits, inputs["labels"])
    return found


def shapes_of_jax(job: JobConfig) -> list[tuple[int, ...]]:
    model = nnx.eval_shape(lambda: build_jax(job, rngs=None)).to(jnp.float32)
    recipe, *arrays = jax_objective.Recipe.of(job, None, model, jnp.float32)
    batches = {name: jax.ShapeDtypeStruct((2, 4, 4096), jnp.int32) for name in ("tokens", "labels")}
    count = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.make_jaxpr(functools.partial(jax_objective.gradients_of, recipe))(*arrays, batches, count)
    evaluation = jax.make_jaxpr(functools.partial(jax_objective.summed_loss, recipe))(*arrays, batches)
    return [array.shape for program in (step, evaluation) for array in arrays_in(program.jaxpr)]


SHAPES = {"torch": shapes_of_torch, "jax": shapes_of_jax}


@pytest.mark.parametrize("backend", SHAPES)
def test_nothing_is_larger_than_the_logits_of_a_chunk(backend: str) -> None:
    assert max(map(math.prod, SHAPES[backend](WIDE))) == MOST


@pytest.mark.parametrize("backend", SHAPES)
def test_whole_logits_would_be_seen(backend: str) -> None:
    with chunks_of(10**6, 128_256):
        assert max(map(math.prod, SHAPES[backend](WIDE))) == 16 * MOST


@on_both
def test_who_captures_logits_gets_them_whole(backend: Torch) -> None:
    config = ModelConfig(
        dim=8, n_layers=1, n_heads=2, vocab_size=11, ffn_hidden_dim=8, max_seq_len=16, logit_divisor=1.7
    )
    model = backend.model(config, validation_weights(parameter_table(config), 0), dtype="float32")
    tokens = backend.array(np.arange(6, dtype=np.int32).reshape(2, 3))
    hooks = backend.module("model.hooks")
    with hooks.capture(model, ["output_head.proj"]) as found:
        output = model.run(tokens, factored_logits=True)
    assert output.factors is None
    assert tuple(found["output_head.proj"].shape) == tuple(output.logits.shape) == (2, 3, 11)
    apart = model.run(tokens, factored_logits=True)
    assert apart.factors is not None
    for logits in (apart.factors.whole(), model.run(tokens).logits):
        np.testing.assert_array_equal(backend.numpy(logits), backend.numpy(output.logits))
