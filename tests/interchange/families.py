"""Configs of Hugging Face families, drawn."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.strategies import attention_patterns, model_configs


@st.composite
def configs_of(draw: st.DrawFn, name: str, **changes: Any) -> ModelConfig:
    """Configs of a family, spelled as they are read: widths as they come out, experts one by one."""
    family = FAMILIES[name]
    fixed: dict[str, Any] = {**family.fixed, "family": name}
    if family.scaled_embeddings:
        dim = draw(st.sampled_from([18, 24]))
        fixed |= {"dim": dim, "head_dim": 6, "embedding_scale": math.sqrt(dim)}
    if family.query_scalar:
        fixed |= {"attention_scale": draw(st.sampled_from([3, 16, 144])) ** -0.5}
    fixed |= {"rope_scaling": RopeScaling()} if family.rope_types == ("default",) else {}
    if "attention_pattern" not in changes:
        fixed |= draw(_layers(name))
    if not family.experts:
        return draw(model_configs(**{**fixed, **changes}))
    fixed |= {"moe_shared_experts": draw(st.sampled_from([1, 2]))} if family.experts.shared else {}
    fixed |= {"moe_sequence_aux_loss_weight": 0.0, "moe_packed_experts": False}
    fixed |= {"moe_gradient_scale": False, "moe_router_z_loss_weight": 0.0, "ffn_hidden_dim": 48}
    return draw(model_configs(experts=True, **{**fixed, **changes}))


@st.composite
def _layers(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """The attention of each layer, as the family may have it."""
    family = FAMILIES[name]
    windows = family.windows is not None
    n_layers, window = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 3, 6])) if windows else None
    fields: dict[str, Any] = {"n_layers": n_layers, "sliding_window": window, "attention_pattern": None}
    fields |= {"window_rope_theta": draw(st.sampled_from([70.0, 500.0]))} if family.rope_by_kind else {}
    if not (family.unrotated or (family.windows and family.windows.mixed)):
        return fields
    full = ("full", "full_nope") if family.unrotated else ("full",)
    pattern = draw(attention_patterns(n_layers, window, full))
    layers = [pattern[layer % len(pattern)] for layer in range(n_layers)]
    plain = set(layers) in ({"full"}, {"window"})
    shortest = next(
        layers[:length] for length in range(1, n_layers + 1) if layers == (layers[:length] * n_layers)[:n_layers]
    )
    return {**fields, "attention_pattern": None if plain else tuple(shortest)}


any_family = st.sampled_from(sorted(FAMILIES)).flatmap(configs_of)
