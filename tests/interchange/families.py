"""Configs of Hugging Face families, drawn."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.strategies import model_configs


@st.composite
def configs_of(draw: st.DrawFn, name: str, **changes: Any) -> ModelConfig:
    """Configs of a family, spelled as they are read: widths as they come out, experts one by one."""
    family = FAMILIES[name]
    fixed: dict[str, Any] = {**family.fixed, "family": name}
    fixed |= {"rope_scaling": RopeScaling()} if family.rope_types == ("default",) else {}
    if not family.experts:
        return draw(model_configs(**{**fixed, **changes}))
    fixed |= {"moe_shared_experts": draw(st.sampled_from([1, 2]))} if family.experts.shared else {}
    fixed |= {"moe_sequence_aux_loss_weight": 0.0, "moe_packed_experts": False}
    fixed |= {"moe_gradient_scale": False, "moe_router_z_loss_weight": 0.0, "ffn_hidden_dim": 48}
    return draw(model_configs(experts=True, **{**fixed, **changes}))


any_family = st.sampled_from(sorted(FAMILIES)).flatmap(configs_of)
