"""Bugs in the experts of a port of transformers' Mixtral to plain JAX: each is found in its module, no correct pair is
called wrong. All of it under HYPOTHESIS_PROFILE=nightly.
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
from transformers import MixtralConfig, MixtralForCausalLM

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.parity import Trace, compare_functions, transfer
from shared_config.parity.foreign.site import site_of
from tests.examples import llama_in_jax, mixtral_in_jax
from tests.examples.llama_in_jax import Sizes
from tests.parity.foreign_bugs import with_change

pytestmark = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="takes minutes: HYPOTHESIS_PROFILE=nightly"
)
DTYPES = ("float32", "bfloat16")
ROUTER, EXPERTS = "layers.*.mlp.router", "layers.*.mlp.experts"
SHARES = "shares_TK / shares_TK.sum(axis=-1, keepdims=True)"
BUGS = {
    "shares not divided by their sum": (SHARES, "shares_TK", ROUTER),
    "shares exchanged": (SHARES, f"({SHARES})[:, ::-1]", ROUTER),
    "shares squared": (SHARES, f"({SHARES}) ** 2", ROUTER),
    "worst experts": ("jax.nn.softmax(wide(logits_TE), axis=-1), CHOSEN", "-wide(logits_TE), CHOSEN", ROUTER),
    "sigmoid for softmax": ("jax.nn.softmax(wide(logits_TE), axis=-1)", "jax.nn.sigmoid(wide(logits_TE))", ROUTER),
    "softmax over tokens": ("softmax(wide(logits_TE), axis=-1)", "softmax(wide(logits_TE), axis=0)", ROUTER),
    "router of other tokens": ("logits_TE = x_TD @", "logits_TE = jnp.roll(x_TD, 1, axis=0) @", ROUTER),
    "gate and up exchanged": ("gate, up = jnp", "up, gate = jnp", EXPERTS),
    "gelu for silu": ("jax.nn.silu(gate)", "jax.nn.gelu(gate)", EXPERTS),
    "every expert counts the same": ('jnp.einsum("tk,tke->te", shares_TK, chosen_TKE)', "chosen_TKE.mean(1)", EXPERTS),
    "the neighbour's weights": ('gate) * up, layer["down"]', 'gate) * up, jnp.roll(layer["down"], 1, 0)', EXPERTS),
    "first choice alone": ("shares_TK, chosen_TKE)", "shares_TK[:, :1], chosen_TKE[:, :1])", EXPERTS),
    "summed twice": (".astype(x_TD.dtype).sum(axis=1)", ".astype(x_TD.dtype).sum(axis=1) * 2", EXPERTS),
}
"""Text, what stands in its place, and the module that is wrong then."""
SAME = {
    "softmax of the chosen": (
        f"{SHARES}, indices_TK",
        "jax.nn.softmax(jnp.take_along_axis(wide(logits_TE), indices_TK, -1)), indices_TK",
    ),
    "experts in another order": ("return weighted_TED.astype", "return weighted_TED[:, ::-1].astype"),
}
"""Text, and what is the same function."""


@functools.lru_cache(maxsize=2)
def foreign(seed: int = 0, scale: float = 1.0, layers: int = 2) -> tuple[MixtralForCausalLM, Sizes, np.ndarray, Any]:
    """A Mixtral of drawn weights, its sizes, tokens, and the weights of the port.

    Args:
        scale: of the weights, relative to fan-in.
    """
    rng = np.random.default_rng(seed)
    sizes = Sizes(4, 2, 6)
    config = MixtralConfig(
        vocab_size=37, hidden_size=28, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, use_cache=False, num_local_experts=5,
        num_experts_per_tok=2, pad_token_id=None, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-6,
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    with torch.random.fork_rng():
        model = MixtralForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        fan_in = scale / parameter.shape[-1] ** 0.5
        drawn = (
            rng.uniform(0.5, 1.5, parameter.shape) if "norm" in name else rng.standard_normal(parameter.shape) * fan_in
        )
        parameter.data = torch.from_numpy(drawn.astype(np.float32))
    moved = transfer(dict(model.named_parameters()), mixtral_in_jax.names(sizes))
    return model, sizes, rng.integers(0, 37, (2, 9)), llama_in_jax.nested(moved, layers)


@functools.cache
def original(dtype: str) -> Trace:
    model, _, tokens, _ = foreign()
    return of_torch.record(model, {"input_ids": tokens}, dtype=dtype, backward=False)


def port(module: ModuleType, dtype: str) -> Trace:
    _, sizes, tokens, weights = foreign()
    return of_jax.record(
        lambda w, t: module.mixtral(w, t, sizes), (tokens,), weights=weights, dtype=dtype, backward=False, deltas=False
    )


def module_of(name: str) -> str:
    """The router or the experts, without the number of their layer."""
    return re.sub(r"(router)\.\d", r"\1", re.sub(r"layers\.\d+", "layers.*", site_of(name)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_in_its_module_forward_and_alone_where_recorded_inputs_are_given(bug: str, dtype: str) -> None:
    model, sizes, tokens, _ = foreign()
    old, new, site = BUGS[bug]
    names, wrong = mixtral_in_jax.names(sizes, eager=True), port(with_change(mixtral_in_jax, old, new), dtype)
    found = compare_functions(original(dtype), wrong, names, common=True)
    assert found.first_forward is not None
    assert module_of(found.first_forward.name) == site
    given = of_torch.record(model, {"input_ids": tokens}, dtype=dtype, refeed=wrong, names=names.inverse(), deltas=3)
    alone = compare_functions(given, wrong, names, common=True)
    assert {module_of(row.name) for row in alone.failures} == {site}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", SAME)
def test_another_way_to_write_it_is_the_same(change: str, dtype: str) -> None:
    names = mixtral_in_jax.names(foreign()[1], eager=True)
    found = compare_functions(
        original(dtype), port(with_change(mixtral_in_jax, *SAME[change]), dtype), names, common=True
    )
    assert found.equal, found.failures


@pytest.mark.parametrize("seed", range(24))
def test_correct_pairs_raise_no_alarm(seed: int) -> None:
    dtype = ("float32", "bfloat16", "float64", "float16")[seed % 4]
    model, sizes, tokens, weights = foreign(seed, (1.0, 0.3, 2.0)[seed % 3], layers=1 + seed % 2)
    names = mixtral_in_jax.names(sizes, eager=True)
    a = of_torch.record(model, {"input_ids": tokens}, dtype=dtype)
    b = of_jax.record(
        lambda w, t: mixtral_in_jax.mixtral(w, t, sizes), (tokens,), weights=weights, dtype=dtype, deltas=False
    )
    found = compare_functions(a, b, names, common=True)
    assert found.equal, [(row.full_label, row.share) for row in found.failures]
    given = of_torch.record(model, {"input_ids": tokens}, dtype=dtype, refeed=b, names=names.inverse())
    found = compare_functions(given, b, names, common=True)
    assert found.equal, [(row.full_label, row.share) for row in found.failures]
