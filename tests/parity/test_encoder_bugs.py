"""Bugs in ports of transformers' BERT and ViT to plain JAX: each is found in its module, and no correct pair is called
wrong. All of it under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.parity import Map, Trace, compare_functions, propose_map, transfer
from shared_config.parity.foreign.site import made_in, site_of
from tests.examples import encoders_in_jax
from tests.parity.foreign_bugs import with_change

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="takes seconds: HYPOTHESIS_PROFILE=nightly")
HEADS, PADDED = 3, 3
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 40
}  # fmt: skip
RNG = np.random.default_rng(5)
TOKENS, MASK = RNG.integers(0, 37, (2, 9)), np.ones((2, 9), np.int64)
MASK[0, -PADDED:] = 0
IMAGES = RNG.standard_normal((2, 3, 8, 12)).astype(np.float32)
GELU = 'jax.nn.gelu(tap(f"{name}.up", dense(x, own["up"])), approximate=False)'
BUGS = {
    "padding attended to": ("bert", "mask[:, None, None, :] > 0", "mask[:, None, None, :] >= 0", "attention.mixed"),
    "positions from 1 on": ("bert", '["positions"][:', '["positions"][1 : 1 +', "embed_norm@in"),
    "types left out": ("bert", ' + weights["types"][0]', "", "embed_norm@in"),
    "silu for gelu": ("bert", GELU, 'jax.nn.silu(tap(f"{name}.up", dense(x, own["up"])))', "mlp.hidden"),
    "class token last": ("vit", "[first, patches], axis=1", "[patches, first], axis=1", "embed"),
    "patches on their side": ("vit", '"HWIO"', '"WHIO"', "patches"),
    "scores not scaled": ("vit", " * (D // heads) ** -0.5", "", "attention.mixed"),
    "residual from the norm": ("vit", 'x = tap(name, x + mlp', "x = tap(name, y + mlp", "layers.*"),
}  # fmt: skip
"""Model, text, what stands in its place, and the end of the names of what is wrong then, forward."""


class Pair(NamedTuple):
    """An original, what it is called with, the arguments of the port, and the map between them."""

    model: nn.Module
    given: dict[str, np.ndarray]
    arguments: tuple[np.ndarray, ...]
    names: Map


@functools.cache
def pair(kind: str, attention: str = "eager") -> Pair:
    """Of drawn weights."""
    config: Any = (
        BertConfig(vocab_size=37, max_position_embeddings=16, pad_token_id=None, **SIZES)
        if kind == "bert"
        else ViTConfig(image_size=(8, 12), patch_size=4, layer_norm_eps=encoders_in_jax.EPS, **SIZES)
    )
    config._attn_implementation = attention
    with torch.random.fork_rng():
        model = (BertModel if kind == "bert" else ViTModel)(config).eval()
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        drawn = rng.standard_normal(tuple(parameter.shape)) / max(1, parameter[0].numel()) ** 0.5
        parameter.data = torch.from_numpy((drawn + ("norm.weight" in name.lower())).astype(np.float32))
    if kind == "bert":
        given = {"input_ids": TOKENS, "attention_mask": MASK}
        return Pair(model, given, (TOKENS, MASK), encoders_in_jax.names_of_bert())
    return Pair(model, {"pixel_values": IMAGES}, (IMAGES.transpose(0, 2, 3, 1).copy(),), encoders_in_jax.names_of_vit())


@functools.cache
def original(kind: str, dtype: str) -> Trace:
    model, given, _, _ = pair(kind)
    return of_torch.record(model, given, dtype=dtype)


def moved(kind: str) -> dict[str, np.ndarray]:
    """The weights of the port."""
    model, _, _, names = pair(kind)
    return transfer(dict(model.named_parameters()), names)


def port(kind: str, module: ModuleType, **options: Any) -> Trace:
    weights = encoders_in_jax.nested(moved(kind))
    function = functools.partial(getattr(module, kind), heads=HEADS)
    return of_jax.record(function, pair(kind).arguments, weights=weights, names=pair(kind).names, **options)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_map_of_weights_is_found_from_their_values(kind: str) -> None:
    model, _, _, names = pair(kind)
    a, b = dict(model.named_parameters()), moved(kind)
    proposal = propose_map(a, b)
    assert set(proposal.evidence) == {"values"}
    found = transfer(a, proposal.map, {name: value.shape for name, value in b.items()})
    assert all(value.tobytes() == b[name].tobytes() for name, value in found.items())
    back = transfer(b, names.inverse(), {name: tuple(value.shape) for name, value in a.items()})
    assert all(value.tobytes() == a[name].detach().numpy().tobytes() for name, value in back.items())


@nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_correct_pair_raises_no_alarm(kind: str, dtype: str) -> None:
    names, a = pair(kind).names, original(kind, dtype)
    for options in ({}, {"refeed": a}):
        found = compare_functions(a, port(kind, encoders_in_jax, dtype=dtype, **options), names, common=True)
        assert found.equal, [(row.full_label, row.status, row.share) for row in found.failures]
        assert {row.status for row in found.rows} <= {"equal", "within"}
        counts = {group: len(rows) for group, rows in found.groups.items()}
        gradients = sum(1 for name in a.tensors if name.startswith("gradient/")) - 4 * SIZES["num_hidden_layers"]
        assert counts == {"forward": 26, "cotangent": 26, "gradient": gradients, "loss": 1}


@nightly
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_another_attention_may_leave_other_noise_of_a_gradient_that_is_0(kind: str) -> None:
    a, (other, given, _, _) = original(kind, "float32"), pair(kind, "sdpa")
    zeros = a.meta.extra["zeros"]
    assert isinstance(zeros, list)
    assert len(zeros) == SIZES["num_hidden_layers"]
    assert all(name.endswith(("key.bias", "k_proj.bias")) for name in zeros)
    found = compare_functions(a, of_torch.record(other, given, dtype="float32", deltas=False), common=True)
    assert found.equal, found.failures


@nightly
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_in_its_module_forward_and_alone_where_recorded_inputs_are_given(bug: str) -> None:
    kind, old, new, end = BUGS[bug]
    names, a, module = pair(kind).names, original(kind, "float32"), with_change(encoders_in_jax, old, new)
    free = compare_functions(a, port(kind, module, dtype="float32", deltas=False), names, common=True)
    assert free.first_forward is not None
    assert without_number(free.first_forward.name).endswith(end)
    alone = compare_functions(a, port(kind, module, dtype="float32", refeed=a, deltas=3), names, common=True)
    forward = [row for row in alone.failures if row.group == "forward"]
    assert forward
    assert all(without_number(row.name).endswith(end) for row in forward), forward
    sites = {site_of(row.name) for row in forward}
    for row in alone.failures:
        assert sites & set(made_in(row.name, (alone.meta_a, alone.meta_b)).split(" or ")), row


def without_number(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers.*", name)
