"""Bugs in a port of transformers' Llama to plain JAX: each is found in its module, and no correct pair is called wrong.

By day a few; all of them, and a hundred correct pairs, under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.parity import Map, Trace, compare_functions, transfer
from shared_config.parity.foreign.causes import PLACES, cause_of
from shared_config.parity.foreign.site import site_of
from shared_config.parity.result import Comparison
from tests.examples import llama_in_jax
from tests.examples.llama_in_jax import Sizes
from tests.parity.foreign_bugs import BUGS, Bug

NIGHTLY = settings.get_current_profile_name() == "nightly"
OF_THE_DAY = ("eps",)
DTYPES = ("float32", "bfloat16")
PAIRS = 100 if NIGHTLY else 1


@functools.lru_cache(maxsize=2)
def foreign(seed: int = 0, scale: float = 1.0, layers: int = 2) -> tuple[LlamaForCausalLM, Sizes, np.ndarray, Any]:
    """A Llama of drawn weights, its sizes, tokens, and the weights of the port.

    Args:
        scale: of the weights, relative to fan-in.
    """
    rng = np.random.default_rng(seed)
    kv_heads, group, head_dim = ((2, 2, 6), (1, 3, 4), (3, 1, 8))[seed % 3]
    sizes = Sizes(kv_heads * group, kv_heads, head_dim)
    config = LlamaConfig(
        vocab_size=37, hidden_size=7 * sizes.heads, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=64, use_cache=False,
        pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = ("eager", "sdpa")[seed % 2]
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        fan_in = scale / parameter.shape[-1] ** 0.5
        drawn = (
            rng.uniform(0.5, 1.5, parameter.shape) if "norm" in name else rng.standard_normal(parameter.shape) * fan_in
        )
        parameter.data = torch.from_numpy(drawn.astype(np.float32))
    moved = transfer(dict(model.named_parameters()), llama_in_jax.names(sizes))
    return model, sizes, rng.integers(0, 37, (2, 9)), llama_in_jax.nested(moved, layers)


def names_of() -> Map:
    """From the names of `foreign` to those of the port."""
    return llama_in_jax.names(foreign()[1], eager=True)


@functools.cache
def original(dtype: str) -> Trace:
    model, _, tokens, _ = foreign()
    return of_torch.record(model, {"input_ids": tokens}, dtype=dtype, backward=False)


def port(module: ModuleType, dtype: str, *, backward: bool = False) -> Trace:
    _, sizes, tokens, weights = foreign()

    def function(weights: Any, tokens: Any) -> Any:
        return module.llama(weights, tokens, sizes)

    return of_jax.record(function, (tokens,), weights=weights, dtype=dtype, backward=backward, deltas=False)


def kinds(found: Comparison, a: Trace, b: Trace) -> set[str]:
    """Kinds of the causes that are named for what differs."""
    moved = names_of().apply_to_trace(a)
    order = [row.name for row in found.rows]
    causes = [cause_of(row, moved, b, order) for row in found.failures]
    return {cause.kind for cause in causes if cause is not None} - set(PLACES)


def without_number(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers.*", name)


@pytest.mark.parametrize("dtype", DTYPES if NIGHTLY else ["float32"])
@pytest.mark.parametrize("bug", [bug for bug in BUGS if NIGHTLY or bug.name in OF_THE_DAY], ids=lambda bug: bug.name)
def test_a_bug_is_found_in_its_module_forward_and_alone_where_recorded_inputs_are_given(bug: Bug, dtype: str) -> None:
    model, _, tokens, _ = foreign()
    names, wrong = names_of(), port(bug.planted(), dtype)
    found = compare_functions(original(dtype), wrong, names, common=True)
    assert found.first_forward is not None
    assert without_number(site_of(found.first_forward.name) + ".").startswith(f"{bug.sites[0]}.")
    assert kinds(found, original(dtype), wrong) <= {*bug.causes}
    given = of_torch.record(model, {"input_ids": tokens}, dtype=dtype, refeed=wrong, names=names.inverse(), deltas=3)
    alone = compare_functions(given, wrong, names, common=True)
    assert alone.failures
    for row in alone.failures:
        site = without_number(site_of(row.name))
        assert any(site == one or (site.startswith(f"{one}.") and one != "layers.*") or site == f"{one}.middle"
                   for one in bug.sites), row  # fmt: skip
    assert kinds(alone, given, wrong) <= {*bug.causes}


@pytest.mark.parametrize("dtype", DTYPES if NIGHTLY else ["float32"])
@pytest.mark.parametrize("bug", [bug for bug in BUGS if NIGHTLY or bug.name in OF_THE_DAY], ids=lambda bug: bug.name)
def test_a_bug_is_found_by_statistics_alone(bug: Bug, dtype: str) -> None:
    a = names_of().apply_to_trace(original(dtype)).summarized(0)
    assert compare_functions(a, port(llama_in_jax, dtype).summarized(0), common=True).equal
    found = compare_functions(a, port(bug.planted(), dtype).summarized(0), common=True)
    assert found.first_forward is not None
    assert without_number(site_of(found.first_forward.name) + ".").startswith(f"{bug.sites[0]}.")


def test_there_are_enough_bugs() -> None:
    assert len({bug.name for bug in BUGS}) >= 24
    assert set(OF_THE_DAY) < {bug.name for bug in BUGS}


@pytest.mark.parametrize("seed", range(PAIRS))
def test_correct_pairs_raise_no_alarm(seed: int) -> None:
    dtype = ("float32", "bfloat16", "float64", "float16")[seed % 4]
    scale = (1.0, 0.3, 2.0)[seed % 5 % 3]
    model, sizes, tokens, weights = foreign(seed, scale, layers=1 + seed % 3 if NIGHTLY else 1)
    a = of_torch.record(model, {"input_ids": tokens}, dtype=dtype)
    b = of_jax.record(
        lambda w, t: llama_in_jax.llama(w, t, sizes), (tokens,), weights=weights, dtype=dtype, deltas=False
    )
    names = llama_in_jax.names(sizes, eager=seed % 2 == 0)
    found = compare_functions(a, b, names, common=True)
    assert found.equal, [(row.full_label, row.share) for row in found.failures]
    given = of_torch.record(model, {"input_ids": tokens}, dtype=dtype, refeed=b, names=names.inverse())
    found = compare_functions(given, b, names, common=True)
    assert found.equal, [(row.full_label, row.share) for row in found.failures]
