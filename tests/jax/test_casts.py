"""Training in bfloat16: weights are cast once for all micro-batches of a step, and XLA fuses the cast of gradients and
their clipping into the update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from kempnerforge_jax.training.train import Trainer, compiled_step
from shared_config.contract.schedule import Rates
from shared_config.schema.job import JobConfig
from tests.jobs import EXPERTS, draw_batch, tiny_job

ON_GPU = jax.default_backend() == "gpu"


def narrow_job(model: dict[str, Any], **train: Any) -> JobConfig:
    return tiny_job(model, train={"mixed_precision": "bf16", **train})


def arguments(trainer: Trainer, micro_batches: int) -> tuple[Any, ...]:
    batches = [[draw_batch(trainer.config, seed) for seed in range(micro_batches)]]
    numbers = np.float32(30), Rates(*np.full(3, 0.1, np.float32)), np.float32(0.1)
    return trainer.parameters, trainer.buffers, trainer.optimizer_state, trainer._stacked(batches), *numbers


def casts_of_inputs(program: Jaxpr, is_within: bool = False) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Of every cast to bfloat16 of a float32 array that a program, or one within it, is given: whether it is in a loop,
    and the shape.
    """
    inputs = {id(variable) for variable in (*program.invars, *program.constvars)}
    for equation in program.eqns:
        if equation.primitive.name == "convert_element_type" and id(equation.invars[0]) in inputs:
            given, made = (variables[0].aval for variables in (equation.invars, equation.outvars))
            if made.shape and (str(given.dtype), str(made.dtype)) == ("float32", "bfloat16"):  # type: ignore[attr-defined]
                yield is_within, made.shape  # type: ignore[attr-defined]
        is_loop = is_within or equation.primitive.name in ("scan", "while")
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from casts_of_inputs(getattr(inner, "jaxpr", inner), is_loop)


def is_program(value: object) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_masters_are_cast_once_for_all_micro_batches(scan_layers: bool) -> None:
    trainer = Trainer(narrow_job(EXPERTS | {"n_layers": 4}, scan_layers=scan_layers))
    program = jax.make_jaxpr(compiled_step(trainer.recipe))(*arguments(trainer, 3))
    found = sorted(casts_of_inputs(program.jaxpr))
    assert found == sorted((False, array.shape) for name, array in trainer.parameters.items() if "router" not in name)


def test_the_cast_and_the_clipping_of_gradients_are_fused_into_the_update() -> None:
    """Each moment is written by what reads the gradient in bfloat16: of matrices no gradient in float32 exists."""
    trainer = Trainer(narrow_job({"n_layers": 1}))
    text = compiled_step(trainer.recipe).lower(*arguments(trainer, 1)).compile().as_text() or ""
    entry = text[text.index("\nENTRY ") :]
    types = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+\[[\d,]*\])", entry))
    readers = re.findall(r"%?([\w.\-]+) = [^\n]*? fusion\(([^)]*optimizer_state__layers_\w*proj\w*_mu[^)]*)\)", entry)
    matrices = [name for name in trainer.parameters if name.startswith("layers.") and "proj" in name]
    assert len(readers) >= len(matrices)
    for name, operands in readers:
        given = [types[operand.strip().lstrip("%")] for operand in re.sub(r"/\*.*?\*/", "", operands).split(",")]
        assert any(each.startswith("bf16[") for each in given), (name, given)
    if ON_GPU:
        assert len(readers) == len(matrices), "moments and parameter are written by one kernel"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_an_update_is_one_kernel_for_each_parameter() -> None:
    test_the_cast_and_the_clipping_of_gradients_are_fused_into_the_update()
