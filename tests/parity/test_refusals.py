"""What no layer can be built with is refused as it is built, naming field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shared_config.contract.vision import TowerConfig
from shared_config.errors import ConfigError
from shared_config.schema import AdapterConfig, CrossAttentionConfig, ModelConfig, MoMaConfig, pooled_token_count
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
UNKNOWN = "Unknown (mlp|activation): 'tanh'; available: (geglu_tanh, )?gelu, relu, silu"
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
HEADS: dict[str, tuple[Build, str]] = {
    f"{kind} {name}": (layer(kind, *sizes, *rest), f"^{message}$")
    for kind, rest in (
        ("attention.Attention", ()),
        ("cross_attention.CrossAttention", ()),
        ("mot.MoTAttention", (("image", "text"),)),
    )
    for name, sizes, message in (
        ("uneven", (8, 4, 3), "n_kv_heads = 3: must divide n_heads = 4"),
        ("none", (8, 4, 0), "n_kv_heads = 0: must divide n_heads = 4"),
        ("wide", (8, 3, 1), "n_heads = 3: must divide dim = 8, or head_dim must be given"),
    )
}
IMAGE_HEADS = "n_kv_heads = 3: must divide n_heads = 4"
HEADS["of images"] = (layer("mot.MoTAttention", 8, 4, 2, ("image", "text"), image_n_kv_heads=3), f"^{IMAGE_HEADS}$")
CASES = {
    f"{kind}, {name}": case
    for kind, cases in (
        ("width", WIDTHS | SIZES),
        ("activation", ACTIVATIONS),
        ("capacity", CAPACITIES),
        ("heads", HEADS),
    )
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
    for factor in (0.0, 0.07, 1 / 3, 1.25, 1e18):
        options: dict[str, Any] = {"capacity_factor": factor}
        experts = layer("moe.build_moe", 8, 8, 2, 1, **options)(backend)
        assert experts.capacity_factor == factor
        with pytest.raises(AttributeError, match="capacity_factor"):
            experts.capacity_factor = 2.0


@on_both
def test_heads_need_not_divide_the_width_if_theirs_is_given(backend: Torch) -> None:
    attention = layer("attention.Attention", 8, 3, 3, 4)(backend)
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (3, 3, 4)
    mixed = layer("mot.MoTAttention", 8, 4, 2, ("image", "text"), image_n_kv_heads=4)(backend)
    assert (mixed.n_heads, mixed.n_kv_heads, mixed.head_dim) == (4, 4, 2)


@on_both
def test_a_head_is_tied_to_a_table_of_its_shape_alone(backend: Torch) -> None:
    head = layer("embedding.OutputHead", 8, 5)(backend)
    with pytest.raises(ValueError, match=r"^embedding\.weight = \(6, 8\): must have the head's shape \(5, 8\)$"):
        head.tie_weights(layer("embedding.TokenEmbedding", 6, 8)(backend))
    head.tie_weights(layer("embedding.TokenEmbedding", 5, 8)(backend))


@on_both
def test_a_text_model_can_not_be_warmed_up(backend: Torch) -> None:
    warm_start = backend.module("model.mot").mot_warm_start_from_text_stack
    for model in (layer("transformer.Transformer", MODEL), layer("linear.Linear", 8, 8)):
        with pytest.raises(ValueError, match=r"^transformer\.vlm_config = None: must be the config of a mixture"):
            warm_start(model(backend), {})


@on_both
def test_a_block_that_reads_the_image_after_the_last_layer_is_enough(backend: Torch) -> None:
    two = MODEL.replace(n_layers=2)
    for every, blocks in ((1, 2), (2, 1)):
        vlm = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=every)
        architecture = backend.module("model.cross_attention").CrossAttentionArchitecture(two, vlm)
        extra = architecture.extra_modules(**({} if backend.name == "torch" else {"rngs": None}))
        assert list(extra) == ["cross_attention_layers", "norm"]
        assert list(extra["cross_attention_layers"].keys()) == [str(i) for i in range(blocks)]
    with pytest.raises(ConfigError, match=r"every_n_layers = 3: must be at most model\.n_layers = 2"):
        backend.module("model.cross_attention").CrossAttentionArchitecture(
            two, CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=3)
        )


@on_both
def test_a_stage_of_a_tied_model_does_without_the_other_end(backend: Torch) -> None:
    """It is cast, and the first one set anew."""
    whole, first, last = (layer("transformer.Transformer", MODEL.replace(tie_embeddings=True))(backend) for _ in "123")
    first.output_head = last.token_embedding = None
    state = backend.module("model.state")
    for model in (whole, first):
        model.init_weights_and_freqs(0)
    expected, held = (backend.numpy(state.get_state(model)) for model in (whole, first))
    assert expected.keys() == held.keys()
    assert all(np.array_equal(held[name], expected[name]) for name in expected)
    kind = torch.float64 if backend.name == "torch" else "bfloat16"
    assert {str(value.dtype).rpartition(".")[2] for value in state.get_state(last.to(kind)).values()} == {
        str(kind).rpartition(".")[2]
    }
