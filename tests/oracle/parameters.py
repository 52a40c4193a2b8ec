"""What every tensor of a model is, told from its name: a second statement of the parameter table, with its sources.

Matrices are normal(0, init_std), GPT-2's 0.02 by default; what writes to the residual stream is scaled by 1/sqrt(2 L)
(Radford et al. 2019, section 2.3) and silent where a block has to start as the identity: cross-attention as in Flamingo
(Alayrac et al. 2022, arXiv:2204.14198), and the modalities of a mixture of transformers. Towers and adapters are
normal(0, 1/sqrt(fan-in)), with positions and class token of ViT (Dosovitskiy et al. 2021, arXiv:2010.11929),
normal(0, 0.02). Norms start at 1, biases at 0. AdamW decays matrices only (Loshchilov & Hutter 2019; nanoGPT's rule of
two axes or more, without positions); what decides a route stays in float32 (Switch, arXiv:2101.03961, section 2.4).

Names of axes: vocab, embed, heads, kv_heads, head_dim, mlp, experts, routes; None where an axis has no rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from shared_config.contract.vision import TowerConfig
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.weights import Shapes, mlp_shapes, moe_shapes, norm_shapes, text_shapes

NORMAL, CONSTANT = "normal", "constant"
Initial = tuple[str, Any]
"""Kind and standard deviation or value."""

TEXT_AXES = {
    r"embedding\.weight|output_head\.proj\.weight": ("vocab", "embed"),
    r"q_proj\.weight": ("heads", "embed"),
    r"[kv]_proj\.weight": ("kv_heads", "embed"),
    r"o_proj\.weight": ("embed", "heads"),
    r"(gate|up)_proj\.weight": ("mlp", "embed"),
    r"down_proj\.weight": ("embed", "mlp"),
    r"(gate|up)_w": ("experts", "embed", "mlp"),
    r"down_w": ("experts", "mlp", "embed"),
    r"router\.gate\.weight": ("routes", "embed"),
    r"shared_expert_gate\.weight": (None, "embed"),
    r"router\.expert_(bias|ema)": ("routes",),
    r"[qk]_norm\.weight": ("head_dim",),
    r"(gate|up)_proj\.bias": ("mlp",),
    r"down_proj\.bias": ("embed",),
    r"q_proj\.bias": ("heads",),
    r"[kv]_proj\.bias": ("kv_heads",),
    r"o_proj\.bias": ("embed",),
    r"(?<![qk]_)(norm|norms\.(image|text))\.(weight|bias)": ("embed",),
}
VISION_AXES = {
    r"patch_embedding\.weight|position_embedding\.weight|(^|\.)proj\.weight|out_proj\.weight": None,
    r"patch_embedding\.bias|class_embedding|norm\.(weight|bias)|(^|\.)proj\.bias|out_proj\.bias": ("embed",),
    r"[qkv]_proj\.weight": ("heads", "embed"),
    r"[qkv]_proj\.bias": ("heads",),
    r"o_proj\.weight": ("embed", "heads"),
    r"o_proj\.bias|down_proj\.bias|proj2\.bias": ("embed",),
    r"up_proj\.weight": ("mlp", "embed"),
    r"up_proj\.bias|proj1\.bias": ("mlp",),
    r"(down_proj|proj2)\.weight": ("embed", "mlp"),
    r"proj1\.weight": ("mlp", None),
}


@dataclass(frozen=True)
class Fact:
    """One tensor: what the fields of a `ParameterSpec` have to be."""

    shape: tuple[int, ...]
    initial: Initial
    axes: tuple[str | None, ...]
    decay: bool = False
    is_buffer: bool = False
    full_precision: bool = False
    residual: bool = False


def model_facts(config: ModelConfig, vlm: VLMConfig | None = None) -> dict[str, Fact]:
    """Every tensor of the language model by name."""
    return {name: _text_fact(name, shape, config) for name, shape in model_shapes(config, vlm).items()}


def tower_facts(tower: TowerConfig) -> dict[str, Fact]:
    """Every tensor of a vision tower by name."""
    dim, hidden = tower.dim, tower.ffn_hidden_dim
    shapes: Shapes = {"patch_embedding.weight": (dim, 3 * tower.patch_size**2)}
    shapes |= {"patch_embedding.bias": (dim,)} if tower.patch_bias else {}
    shapes |= {"class_embedding": (dim,)} if tower.class_token else {}
    places = (tower.image_size // tower.patch_size) ** 2 + (1 if tower.class_token else 0)
    shapes |= {"position_embedding.weight": (places, dim)}
    for layer in range(tower.n_layers):
        linear = {f"attention.{name}_proj": (dim, dim) for name in "qkvo"}
        linear |= {"mlp.up_proj": (hidden, dim), "mlp.down_proj": (dim, hidden)}
        for name, size in linear.items():
            shapes |= {f"layers.{layer}.{name}.weight": size, f"layers.{layer}.{name}.bias": size[:1]}
    norms = [f"layers.{layer}.{name}" for layer in range(tower.n_layers) for name in ("attention_norm", "mlp_norm")]
    norms += ["pre_norm"] * tower.pre_norm + ["norm"] * tower.final_norm
    shapes |= {f"{name}.{part}": (dim,) for name in norms for part in ("weight", "bias")}
    return {name: _vision_fact(name, shape) for name, shape in shapes.items()}


def adapter_facts(config: AdapterConfig, in_dim: int, out_dim: int) -> dict[str, Fact]:
    """Every tensor of an adapter by name."""
    hidden = config.hidden_dim or out_dim
    shapes: dict[str, Shapes] = {
        "mlp_2layer": {
            "proj1.weight": (hidden, in_dim),
            "proj1.bias": (hidden,),
            "proj2.weight": (out_dim, hidden),
            "proj2.bias": (out_dim,),
        },
        "linear": {"proj.weight": (out_dim, in_dim), "proj.bias": (out_dim,)},
        "avgpool": {"proj.weight": (out_dim, in_dim), "proj.bias": (out_dim,)},
        "attentional_pool": {
            **{f"{name}_proj.weight": (in_dim, in_dim) for name in "qkvo"},
            **{f"{name}_proj.bias": (in_dim,) for name in "qkvo"},
            "out_proj.weight": (out_dim, in_dim),
            "out_proj.bias": (out_dim,),
        },
    }
    pools = config.type == "attentional_pool"
    return {name: _adapter_fact(name, shape, pools) for name, shape in shapes[config.type].items()}


def model_shapes(config: ModelConfig, vlm: VLMConfig | None = None) -> Shapes:
    """Names and shapes of the language model in each architecture."""
    text = text_shapes(config)
    if isinstance(vlm, CrossAttentionConfig):
        heads = vlm.cross_attention_n_heads or config.n_heads
        width = config.head_size if heads == config.n_heads else config.dim // heads
        seeing = (heads, vlm.cross_attention_n_kv_heads or heads, vlm.cross_attention_head_dim or width)
        block = _cross_attention_block(config, *seeing)
        for number in range(config.n_layers // vlm.cross_attention_every_n_layers):
            text |= {f"cross_attention_layers.{number}.{name}": shape for name, shape in block.items()}
    if isinstance(vlm, MoMaConfig):
        text = {name: shape for name, shape in text.items() if ".mlp." not in name}
        for layer in range(config.n_layers):
            for modality in ("image", "text"):
                text |= _experts(
                    f"layers.{layer}.mlp.experts.{modality}", config, vlm.moma_experts_per_modality[modality]
                )
    if isinstance(vlm, MoTConfig):
        text = _by_modality(text, config, vlm)
    return text


def _cross_attention_block(config: ModelConfig, heads: int, kv_heads: int, width: int) -> Shapes:
    """No biases and no norms of heads, whatever the text has."""
    queries, keys = (heads * width, config.dim), (kv_heads * width, config.dim)
    return {
        **norm_shapes("attn_norm", config),
        "attn.q_proj.weight": queries,
        "attn.k_proj.weight": keys,
        "attn.v_proj.weight": keys,
        "attn.o_proj.weight": queries[::-1],
        **norm_shapes("mlp_norm", config),
        **mlp_shapes("mlp", config.dim, config.computed_ffn_hidden_dim, config.activation),
    }


def _experts(path: str, config: ModelConfig, experts: int) -> Shapes:
    fields = {"moe_top_k": 1, "moe_shared_experts": 0, "moe_packed_experts": False, "moe_router": "softmax_topk"}
    return moe_shapes(path, config.replace(num_experts=experts, **fields))


def _by_modality(text: Shapes, config: ModelConfig, vlm: MoTConfig) -> Shapes:
    """Each tensor of a layer, and the last norm, twice; the image may have fewer key/value heads."""
    shapes: Shapes = {}
    kv_width = (vlm.mot_image_n_kv_heads or config.kv_heads) * config.head_size
    for name, shape in text.items():
        found = re.fullmatch(r"(layers\.\d+\.(?:attention\.\w+|\w+_norm|mlp)|norm)\.(.+)", name)
        if found is None:
            shapes[name] = shape
            continue
        path = found[1].replace(".attention_norm", ".attn_norm").replace(".attention.", ".attn.")
        path = "mot_norms" if path == "norm" else path
        for modality in ("image", "text"):
            narrow = modality == "image" and re.search(r"attn\.[kv]_proj", path)
            shapes[f"{path}.{modality}.{found[2]}"] = (kv_width, *shape[1:]) if narrow else shape
    return shapes


def _text_fact(name: str, shape: tuple[int, ...], config: ModelConfig) -> Fact:
    plain = re.sub(r"(proj|norm)\.(image|text)\.", r"\1.", name)
    axes = _axes(plain, TEXT_AXES)
    if config.qk_norm_over == "width" and plain.endswith(("q_norm.weight", "k_norm.weight")):
        axes = ("heads",) if plain.endswith("q_norm.weight") else ("kv_heads",)
    assert axes is not None
    if name.endswith(("expert_bias", "expert_ema")):
        value = 0.0 if name.endswith("bias") else 1 / shape[0]
        return Fact(shape, (CONSTANT, value), axes, is_buffer=True)
    if len(shape) == 1:
        one = 0.0 if config.norm_type == "rmsnorm_1p" else 1.0
        return Fact(shape, (CONSTANT, one if name.endswith("weight") else 0.0), axes)
    residual = re.search(r"(o_proj|down_proj)\.weight$|down_w$", plain) is not None
    std = config.init_std * (2 * config.n_layers) ** -0.5 if residual else config.init_std
    initial = (CONSTANT, 0.0) if residual and _starts_silent(name) else (NORMAL, std)
    routes = name.endswith("router.gate.weight")
    return Fact(shape, initial, axes, decay=True, full_precision=routes, residual=residual)


def _starts_silent(name: str) -> bool:
    """Cross-attention blocks; of a mixture of transformers, attention and dense feed-forward layers."""
    return re.search(r"^cross_attention_layers\.|\.attn\.o_proj\.|\.mlp\.(image|text)\.down_proj\.", name) is not None


def _vision_fact(name: str, shape: tuple[int, ...]) -> Fact:
    axes = _axes(name, VISION_AXES)
    if name == "class_embedding" or name == "position_embedding.weight":
        return Fact(shape, (NORMAL, 0.02), axes or (None, "embed"))
    return _linear_fact(name, shape, axes or ("embed", None))


def _adapter_fact(name: str, shape: tuple[int, ...], pools: bool) -> Fact:
    inside = pools and not name.startswith("out_proj")
    axes = (None,) * len(shape) if inside else _axes(name, VISION_AXES) or ("embed", None)
    return _linear_fact(name, shape, axes)


def _linear_fact(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Fact:
    if len(shape) == 1:
        return Fact(shape, (CONSTANT, 1.0 if name.endswith("norm.weight") else 0.0), axes)
    return Fact(shape, (NORMAL, shape[1] ** -0.5), axes, decay=True)


def _axes(name: str, table: dict[str, tuple[str | None, ...] | None]) -> tuple[str | None, ...] | None:
    """Of the one pattern that a name ends with."""
    (found,) = (axes for pattern, axes in table.items() if re.search(rf"({pattern})$", name))
    return found
