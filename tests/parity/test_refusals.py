"""What no layer can be built with is refused as it is built, naming field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared_config.contract.vision import TowerConfig
from shared_config.schema import AdapterConfig, ModelConfig, MoMaConfig, pooled_token_count
from tests.parity.backends import Torch, on_both

Build = Callable[[Torch], Any]

MODEL = ModelConfig(dim=8, n_layers=1, n_heads=2, vocab_size=5, ffn_hidden_dim=8, max_seq_len=8)
TOWER = TowerConfig(
    image_size=4, patch_size=2, dim=4, n_layers=1, n_heads=2, ffn_hidden_dim=8, activation="tanh", norm_eps=1e-6
)
EXPERTS, FACTORS = {"image": 2, "text": 2}, {"image": 0.5, "text": 1.5}


def layer(path: str, *args: Any, **options: Any) -> Build:
    """A class or builder by its module and name, "adapter.LinearAdapter"."""
    module, _, name = path.partition(".")
    return lambda backend: backend.build(
        getattr(backend.module(f"model.{module}"), name), *args, dtype="float32", **options
    )


WIDTHS: dict[str, tuple[Build, str]] = {
    f"{kind} {field}": (layer(f"adapter.{kind}Adapter", *sizes, *rest), rf"^{field} = {size}: must be at least 1$")
    for kind, rest in (("Linear", ()), ("MLP2Layer", ()), ("AvgPool", (1,)), ("AttentionalPool", (1, 2)))
    for field, sizes, size in (("in_dim", (0, 4), 0), ("out_dim", (4, 0), 0), ("out_dim", (4, -1), -1))
}
SIZES: dict[str, tuple[Build, str]] = {
    "built": (layer("adapter.build_adapter", AdapterConfig(), 0, 4), "^in_dim = 0: must be at least 1$"),
    "hidden": (layer("adapter.MLP2LayerAdapter", 4, 4, -2), "^hidden_dim = -2: must be at least 1$"),
    "averaged": (layer("adapter.AvgPoolAdapter", 4, 4, 0), "^pool_window = 0: must be at least 1$"),
    "attended": (layer("adapter.AttentionalPoolAdapter", 4, 4, 0, 2), "^pool_window = 0: must be at least 1$"),
    "heads": (layer("adapter.AttentionalPoolAdapter", 4, 4, 2, 0), "^pool_heads = 0: must be at least 1$"),
    "counted": (lambda _: pooled_token_count(4, 0), "^window = 0: must be at least 1$"),
    "counted within": (lambda backend: backend.module("model.adapter").pooled_token_count(4, -1), "^window = -1: "),
    "called": (
        lambda backend: layer("adapter.AvgPoolAdapter", 4, 4)(backend).forward(
            backend.array(np.ones((1, 4, 4), np.float32)), 0
        ),
        "^window = 0: must be at least 1$",
    ),
}
UNKNOWN = "Unknown (mlp|activation): 'tanh'; available: gelu, relu, silu"
ACTIVATIONS: dict[str, tuple[Build, str]] = {
    "config": (lambda _: ModelConfig(activation="tanh"), "activation.*'tanh'.*gelu, relu, silu"),
    "adapter config": (lambda _: AdapterConfig(activation="tanh"), "activation.*'tanh'.*gelu, relu, silu"),
    "built mlp": (layer("mlp.build_mlp", 8, 8, "tanh"), f"^activation: {UNKNOWN}"),
    "mlp": (layer("mlp.StandardMLP", 8, 8, "tanh"), UNKNOWN),
    "adapter": (layer("adapter.MLP2LayerAdapter", 4, 4, None, "tanh"), UNKNOWN),
    "cross-attention": (layer("cross_attention.CrossAttentionBlock", 8, 2, 2, 8, "rmsnorm", "tanh"), UNKNOWN),
    "experts": (layer("moe.build_moe", 8, 8, 2, 1, "tanh"), f"^activation: {UNKNOWN}"),
    "packed experts": (layer("moe.build_moe", 8, 8, 2, 1, "tanh", packed_experts=True), UNKNOWN),
    "experts that choose": (layer("moma.ExpertChoiceMoE", 8, 8, 2, 0.5, "tanh"), UNKNOWN),
    "tower": (layer("vision.VisionTower", TOWER), "^activation = 'tanh': must be one of gelu, .*silu$"),
}
SHARE = r"^capacity_factor = (1\.5|2|-0\.5|nan): must be from 0 to 1"
CAPACITIES: dict[str, tuple[Build, str]] = {
    "config": (lambda _: MoMaConfig(moma_capacity_factor=1.5), r"moma_capacity_factor.*1\.5"),
    "router": (layer("moma.ExpertChoiceSigmoidRouter", 8, 2, 1.5), SHARE),
    "router, below 0": (layer("moma.ExpertChoiceSigmoidRouter", 8, 2, -0.5), SHARE),
    "router, no number": (layer("moma.ExpertChoiceSigmoidRouter", 8, 2, float("nan")), SHARE),
    "mixture": (layer("moma.ExpertChoiceMoE", 8, 8, 2, 2), SHARE),
    "layer": (layer("moma.MoMaFFN", MODEL, ("image", "text"), EXPERTS, FACTORS), SHARE),
    "block": (layer("moma.MoMaBlock", MODEL, ("image", "text"), EXPERTS, FACTORS, False, 0), SHARE),
}
CASES = {
    f"{kind}, {name}": case
    for kind, cases in (("width", WIDTHS | SIZES), ("activation", ACTIVATIONS), ("capacity", CAPACITIES))
    for name, case in cases.items()
}


@on_both
@pytest.mark.parametrize("name", CASES)
def test_what_no_layer_can_have_is_refused_as_it_is_built(backend: Torch, name: str) -> None:
    build, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        build(backend)


@on_both
def test_whole_shares_and_room_for_more_choices_than_an_even_split_are_fine(backend: Torch) -> None:
    """Experts that choose may take all tokens; those that are chosen may have room for more than their part."""
    assert layer("moma.ExpertChoiceSigmoidRouter", 8, 2, 1.0)(backend).share == (1, 1)
    options: dict[str, Any] = {"capacity_factor": 1.25}
    assert layer("moe.build_moe", 8, 8, 2, 1, **options)(backend).capacity_factor == 1.25
