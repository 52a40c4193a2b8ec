"""The narrow operations of the backends' programs: a training step, evaluation, decoding, and parts by themselves."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from shared_config.contract.vision import TowerConfig
from shared_config.data.images import with_noise_seeds
from tests.parity import precision_jax, precision_torch
from tests.parity.head_checks import chunks_of
from tests.parity.precision import Operation, violations
from tests.parity.precision_cases import JOBS, TOWERS, batch_of, job_of
from tests.parity.precision_rules import RULES
from tests.parity.rounding_checks import SIDES, narrow_operations

PROMPTS = [[1, 2, 3, 4, 5], [6]]
TIED = "dense, tied"
IN_CHUNKS = 4, 37, 2
"""Tokens, vocabulary and bytes of a number: the logits of so many exist at a time."""
DECODED = ("dense", "experts, balanced", "joint_decoder", "cross_attention", "mot")


def module(backend: str, path: str) -> Any:
    return importlib.import_module(f"kempnerforge_{backend}.{path}")


def step(backend: str, case: str) -> list[Operation]:
    """A training step of two micro-batches."""
    job, train = job_of(case), module(backend, "training.train")
    batch, trainer = batch_of(job), trainer_of(train, case)
    if backend == "torch":
        return precision_torch.narrow_operations(lambda: trainer.step([batch, batch]))
    trainer._freeze()
    batches = with_noise_seeds(job, [batch] * 2, 0)
    stacked = {name: np.stack([one[name] for one in batches]) for name in batches[0]}
    program, rates = functools.partial(train._step, trainer.recipe), train.Rates(*np.full(3, 0.1, np.float32))
    numbers = np.float32(16), rates, np.float32(0.1)
    return traced(program, trainer.parameters, trainer.buffers, trainer.optimizer_state, stacked, *numbers)


def evaluation(backend: str, case: str) -> list[Operation]:
    """A forward pass and its loss."""
    train = module(backend, "training.train")
    batch, trainer = batch_of(job_of(case)), trainer_of(train, case)
    if backend == "torch":
        return precision_torch.narrow_operations(lambda: trainer.evaluate([batch]))
    program = functools.partial(train.summed_loss, trainer.recipe)
    batches = {name: np.asarray(array)[None] for name, array in batch.items()}
    return traced(program, trainer.parameters, trainer.buffers, batches)


@functools.lru_cache(maxsize=len(JOBS))
def trainer_of(train: Any, case: str) -> Any:
    """
    Args:
        train: the module that is importable now.
    """
    return train.Trainer(job_of(case), "cpu")


def decoding(backend: str, case: str) -> list[Operation]:
    """Prompts that are read in chunks, and sampling, of a model that is bfloat16 altogether."""
    job = job_of(case)
    generate, batch = module(backend, "model.generate"), batch_of(job)
    given = {name: batch[name] for name in ("pixel_values", "frame_mask") if name in batch}
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 1, "prefill_chunk": 2, **given}
    config = job if job.vlm is not None else job.model
    if backend == "torch":
        model = module(backend, "model.build").load_model(config, None, "cpu").to(torch.bfloat16)
        return precision_torch.narrow_operations(lambda: generate.generate(model, PROMPTS, 3, **options))
    model = module(backend, "model.build").load_model(config, None, "cpu").to(jnp.bfloat16)
    operations: list[Operation] = []
    request, decode = module(backend, "model.request"), module(backend, "model.decode")
    names = {"_compiled_reading": request, "_compiled_prefill": decode, "_compiled_loop": decode}
    with contextlib.ExitStack() as stack:
        for name, home in names.items():
            stack.enter_context(mock.patch.object(home, name, abstract(getattr(home, name), operations)))
        generate.generate(model, PROMPTS, 3, **options)
    return operations


def abstract(compiled: Callable[..., Any], operations: list[Operation]) -> Callable[..., Any]:
    """In the place of a function that gives compiled programs: they are traced, and give zeros."""

    def program(graphdef: Any) -> Any:
        function = compiled(graphdef).__wrapped__

        def call(*arguments: Any) -> Any:
            operations.extend(traced(function, *arguments))
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))

        return call

    return program


def parts(backend: str) -> list[Operation]:
    """What no job has on a CPU: towers with all their switches, products over groups, a vector's product."""
    grouped = module(backend, "model.grouped")
    x, w, y = (np.ones(shape) for shape in ((9, 8), (3, 8, 16), (9, 16)))
    ends = np.array([2, 2, 7], np.int32)
    found = [operation for tower in TOWERS for operation in encoding(backend, tower)]
    if backend == "jax":
        x_RD, w_EDF, y_RF = (jnp.asarray(array, jnp.bfloat16) for array in (x, w, y))
        for kind in ("tiled", "looped", "ragged"):
            found += traced(getattr(grouped, f"{kind}_matmul"), x_RD, w_EDF, ends)
            found += traced(getattr(grouped, f"{kind}_outer"), x_RD, y_RF, ends)
        return found
    x_RD, w_EDF, y_RF, ends_E = (torch.from_numpy(array) for array in (x, w, y, ends))
    x_RD, w_EDF, y_RF = (tensor.to(torch.bfloat16) for tensor in (x_RD, w_EDF, y_RF))

    def run() -> None:
        for kind in ("tiled", "looped"):
            getattr(grouped, f"{kind}_matmul")(x_RD, w_EDF, ends_E)
            getattr(grouped, f"{kind}_outer")(x_RD, y_RF, ends_E)
        module(backend, "model.linear")._matrix_times_vector(w_EDF[0], y_RF[0], x_RD[0])

    return found + precision_torch.narrow_operations(run)


def encoding(backend: str, tower: TowerConfig, gradients: bool = False) -> list[Operation]:
    """A tower that is bfloat16 altogether, with gradients or without."""
    build, state = module(backend, "model.vision").VisionTower, module(backend, "model.state")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, tower.image_size, tower.image_size))
    if backend == "torch":
        encoder = build(tower).to(torch.bfloat16)
        given = torch.from_numpy(pixels)

        def run() -> None:
            features = encoder(given)
            if gradients:
                features.backward(features.detach())

        return precision_torch.narrow_operations(run)
    encoder = build(tower, rngs=None).to(jnp.bfloat16)
    graphdef, params, buffers = state.split(encoder)

    def encode(params: Any) -> Any:
        return state.merge(graphdef, params, buffers)(jnp.asarray(pixels))

    def differentiate(params: Any) -> Any:
        features, backward = jax.vjp(encode, params)
        return backward(features)

    return traced(differentiate if gradients else encode, params)


def traced(function: Callable[..., Any], *arguments: Any) -> list[Operation]:
    """With float32 products that round their factors, unless they ask for better."""
    with jax.default_matmul_precision("bfloat16"):
        return precision_jax.narrow_operations(function, *arguments)


def check_forward(backend: str, cases: Iterable[str] = JOBS) -> list[Operation]:
    """Evaluation."""
    operations = [operation for case in cases for operation in evaluation(backend, case)]
    with chunks_of(*IN_CHUNKS):
        operations += evaluation(backend, TIED)
    return allowed(backend, operations, backward=False)


def check_steps(backend: str, cases: Iterable[str] = JOBS) -> list[Operation]:
    """Training."""
    operations = [operation for case in cases for operation in step(backend, case)]
    operations += [operation for tower in TOWERS for operation in encoding(backend, tower, gradients=True)]
    with chunks_of(*IN_CHUNKS):
        operations += step(backend, TIED)
    return allowed(backend, operations, backward=True)


def check_decoding(backend: str, cases: Iterable[str] = DECODED) -> list[Operation]:
    """Generation."""
    operations = [operation for case in cases for operation in decoding(backend, case)]
    return allowed(backend, operations, backward=False)


def check_parts(backend: str) -> list[Operation]:
    """Parts by themselves."""
    return allowed(backend, parts(backend), backward=False)


def check_gradients_of(backend: str, *names: str) -> list[Operation]:
    """Parts, without their gradients and with them: in the former no rounding can be a gradient's."""
    check_forward_of(backend, *names)
    operations = [operation for name in names for operation in narrow_operations(SIDES[backend], name)]
    return allowed(backend, operations, backward=True)


def check_forward_of(backend: str, *names: str) -> list[Operation]:
    """Parts without their gradients."""
    operations = [op for name in names for op in narrow_operations(SIDES[backend], name, with_gradient=False)]
    return allowed(backend, operations, backward=False)


def check_full_precision(backend: str) -> None:
    """The weights that a step computes with are narrow, but for those of routers."""
    train = module(backend, "training.train")
    job = job_of("experts, balanced")
    trainer = train.Trainer(job, "cpu")
    if backend == "jax":
        seen = {
            name: str(array.dtype)
            for name, array in module(backend, "training.objective")
            .compute_copy(trainer.recipe, trainer.parameters)
            .items()
        }
    else:
        with mock.patch.object(torch.func, "functional_call") as call:
            trainer._call(trainer.model, "", {})
        seen = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in call.call_args.args[1].items()}
    expected = {name: "float32" if "router" in name else "bfloat16" for name in seen}
    assert any("router" in name for name in seen)
    assert seen == expected


def allowed(backend: str, operations: list[Operation], *, backward: bool) -> list[Operation]:
    """The operations, if rules allow all of them."""
    problems = violations(operations, RULES[backend], backward=backward)
    assert not problems, f"narrow in {backend}:\n" + "\n".join(problems)
    return operations
