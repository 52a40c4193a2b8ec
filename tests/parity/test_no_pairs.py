"""No tensor of a training path has an entry for each pair of a query and a key, beyond 1,024 positions; and in
JAX no integer is so narrow that it could not count them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig
from tests.parity.attention_cases import documents, padding
from tests.parity.backends import BACKENDS
from tests.parity.kernel_checks import HOPPER, gpu
from tests.parity.precision_jax import INTEGERS, _jaxprs

LENGTH = 1100
CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11, ffn_hidden_dim=8, max_seq_len=LENGTH)
Shape = tuple[int, ...]
FACTS = ["causal", "window", "documents", "padding", "all"]
each_mask = pytest.mark.parametrize("facts", FACTS)


def has_pairs(shape: Shape) -> bool:
    return sum(size >= LENGTH for size in shape) > 1


def given(name: str, facts: str) -> tuple[Any, dict[str, Any]]:
    """A model of two layers and what it is called with, besides the stream."""
    backend = BACKENDS[name == "jax"]
    config = CONFIG.replace(sliding_window=300) if facts in ("window", "all") else CONFIG
    model = backend.model(config, validation_weights(parameter_table(config), 0), dtype="float32")
    options: dict[str, Any] = {}
    if facts in ("documents", "all"):
        options["doc_ids"] = backend.array(documents(LENGTH)["key_doc_ids"])
    if facts in ("padding", "all"):
        options["key_padding_mask"] = backend.array(padding(LENGTH)["key_valid"])
    return model, options


def with_stream(name: str, stream: Any, options: dict[str, Any]) -> dict[str, Any]:
    context = BACKENDS[name == "jax"].module("model.modality").ModalityContext
    real = options.get("key_padding_mask")
    return {"modality": context(inputs_embeds=stream, key_padding_mask=real), "doc_ids": options.get("doc_ids")}


@contextlib.contextmanager
def shapes_seen() -> Iterator[list[Shape]]:
    """The shapes of all that operators of torch give, of backward passes too."""
    found: list[Shape] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            found.extend(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    with Noting():
        yield found


@each_mask
def test_torch_computes_none(facts: str) -> None:
    model, options = given("torch", facts)
    stream = torch.from_numpy(np.random.default_rng(0).standard_normal((2, LENGTH, CONFIG.dim), np.float32))
    with shapes_seen() as found:
        model.run(**with_stream("torch", stream.requires_grad_(), options)).logits.sum().backward()
    assert (2, CONFIG.n_heads, LENGTH, CONFIG.dim // CONFIG.n_heads) in found
    assert not [shape for shape in found if has_pairs(shape)]


def arrays_in(jaxpr: Any) -> Iterator[Any]:
    """All arrays of a program, and of all programs within it, abstract."""
    for eqn in jaxpr.eqns:
        yield from (variable.aval for variable in eqn.outvars)
        for inner in _jaxprs(eqn.params):
            yield from arrays_in(inner)


@each_mask
@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", None), ("bfloat16", HOPPER), ("float32", HOPPER)], ids=["CPU", "GPU", "GPU, wide"]
)
def test_jax_programs_have_none(facts: str, dtype: str, kind: tuple[str, str] | None) -> None:
    with gpu(kind):
        model, options = given("jax", facts)
        model = model.to(dtype)

        def total(stream: Any) -> Any:
            return model.run(**with_stream("jax", stream, options), scan_layers=True).logits.sum()

        program = jax.make_jaxpr(jax.grad(total))(jnp.ones((2, LENGTH, CONFIG.dim), dtype))
    found = list(arrays_in(program.jaxpr))
    assert (2, CONFIG.n_heads, LENGTH, CONFIG.dim // CONFIG.n_heads) in [array.shape for array in found]
    assert not [array for array in found if has_pairs(array.shape) or getattr(array, "dtype", None) in INTEGERS]


def test_pairs_are_seen() -> None:
    """A length of which a dense mask is made, in a path that may make one."""
    q = torch.ones((1, 1, LENGTH, 4))
    attention, masks = (BACKENDS[0].module(f"model.{name}") for name in ("attention", "mask"))
    with shapes_seen() as found:
        attention.attend(q, q, q, masks.with_dense(masks.Mask(causal=True, window=3), LENGTH, LENGTH))
    assert any(has_pairs(shape) for shape in found)
