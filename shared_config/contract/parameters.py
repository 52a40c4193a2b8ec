"""The parameter table: name -> shape, initialiser and logical axes of every weight and buffer of a model.

Both backends build exactly these tensors, in this orientation; initialising, sharding, counting and loading read the
table.

Names of axes: vocab, embed (the residual width), heads and kv_heads (times head_dim), head_dim, mlp, experts; None
for an axis that is never sharded. A linear weight is (out, in); packed experts are (expert, in, out).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared_config.errors import ConfigError
from shared_config.registry import Declaration, declaration, declare
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig

Axes = tuple[str | None, ...]
Named = Iterator[tuple[str, "ParameterSpec"]]

EMBEDDING = "token_embedding.embedding.weight"
HEAD = "output_head.proj.weight"
PACKED = {f"{name}_proj.weight": f"{name}_w" for name in ("gate", "up", "down")}
"""Weights of an expert, and what they are called where those of all experts are one tensor."""


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Initializer = Normal | Constant


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of the model.

    Attributes:
        shape: sizes.
        initializer: distribution of the initial values.
        axes: logical name of each axis, as long as ``shape``.
        is_buffer: not trained by gradient, float32 whatever the compute dtype.
        full_precision: stays float32 in mixed precision (what decides a route).
        decay: whether weight decay acts on it.
        residual: it writes to the residual stream, and is 0 where a block starts as the identity.
    """

    shape: tuple[int, ...]
    initializer: Initializer
    axes: Axes
    is_buffer: bool = False
    full_precision: bool = False
    decay: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes = {self.axes}: must name each axis of shape = {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


ParameterTable = dict[str, ParameterSpec]

FOLDED = re.compile(r"\{(\d+)(?:,(\d+))?(?:\.\.(\d+))?\}")
"""Where a name stands for several: ``{0..31}``, ``{1,3..31}`` or ``{0,1}``."""


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that are alike but for the numbers of their layers, blocks and experts.

    Attributes:
        name: with the numbers in braces, as ``layers.{0..31}.attention.q_proj.weight``.
        copies: number of tensors.
    """

    name: str
    spec: ParameterSpec
    copies: int

    @property
    def size(self) -> int:
        """Number of elements of all copies."""
        return self.copies * self.spec.size


def parameter_table(config: ModelConfig, vlm: VLMConfig | None = None) -> ParameterTable:
    """Every tensor that a `Transformer` owns, in model order.

    A tied output head owns nothing: it is listed in `aliases`.
    """
    whole = declaration("model", config.model_type).parameters
    if whole is not None:
        return dict(_unfolded(_given(whole(config, vlm))))
    table: ParameterTable = dict(_before_layers(config))
    for layer in range(config.n_layers):
        table.update(_unfolded(_prefixed(f"layers.{layer}", _layer(config, vlm, layer))))
    table.update(_unfolded(_after_layers(config, vlm)))
    return table


def parameter_groups(config: ModelConfig, vlm: VLMConfig | None = None) -> Iterator[ParameterGroup]:
    """The parameter table with equal layers, blocks and experts folded; as fast for a million of them as for one."""
    whole = declaration("model", config.model_type).parameters
    if whole is not None:
        yield from (ParameterGroup(name, spec, _copies(name)) for name, spec in _given(whole(config, vlm)))
        return
    for name, spec in _before_layers(config):
        yield ParameterGroup(name, spec, 1)
    kinds = _layer_kinds(config, vlm)
    owners: dict[tuple[str, ParameterSpec], list[_LayerKind]] = {}
    for kind in kinds:
        for entry in _layer(config, vlm, kind.first):
            owners.setdefault(entry, []).append(kind)
    for (name, spec), of in owners.items():
        everywhere = len(of) == len(kinds)
        layers = fold(range(config.n_layers)) if everywhere else " and ".join(kind.numbers for kind in of)
        count = sum(kind.count for kind in of)
        yield ParameterGroup(f"layers.{layers}.{name}", spec, count * _copies(name))
    for name, spec in _after_layers(config, vlm):
        yield ParameterGroup(name, spec, _copies(name))


def layer_groups(config: ModelConfig, vlm: VLMConfig | None = None) -> Iterator[list[ParameterGroup]]:
    """The tensors of one layer, for each kind of layer that the model has; of a custom model, all that it has."""
    if declaration("model", config.model_type).parameters is not None:
        yield list(parameter_groups(config, vlm))
        return
    for kind in _layer_kinds(config, vlm):
        yield [ParameterGroup(name, spec, _copies(name)) for name, spec in _layer(config, vlm, kind.first)]


def fold(numbers: range) -> str:
    """Numbers in braces, as `FOLDED` reads them; a single one stands alone."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if first + numbers.step == last:
        return f"{{{first},{last}}}"
    return f"{{{first}..{last}}}" if numbers.step == 1 else f"{{{first},{first + numbers.step}..{last}}}"


def unfold(numbers: re.Match[str]) -> range:
    """The numbers that a match of `FOLDED` stands for."""
    first, second, last = (None if text is None else int(text) for text in numbers.groups())
    assert first is not None
    step = 1 if second is None else second - first
    return range(first, (last or second or first) + 1, step)


@dataclass(frozen=True)
class _LayerKind:
    """Layers with the same tensors: the first of them, their numbers in braces, and how many they are."""

    first: int
    numbers: str
    count: int


def _layer_kinds(config: ModelConfig, vlm: VLMConfig | None) -> list[_LayerKind]:
    """Dense layers, then those with experts; of a custom architecture, groups of equal layers."""
    every = range(config.n_layers)
    own = _architecture(vlm)
    if own.layer_parameters is not None and not own.equal_layers:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for layer in every:
            alike.setdefault(tuple(_layer(config, vlm, layer)), []).append(layer)
        return [_LayerKind(layers[0], _runs(layers), len(layers)) for layers in alike.values()]
    if not config.is_moe:
        return [_LayerKind(0, fold(every), config.n_layers)]
    step = config.moe_frequency
    routed = every[step - 1 :: step]
    moe = _LayerKind(step - 1, fold(routed), config.n_layers // step)
    if step == 1:
        return [moe]
    dense = fold(every[::2]) if step == 2 else f"{fold(every)} but {fold(routed)}"
    return [_LayerKind(0, dense, config.n_layers - moe.count), moe]


def _runs(numbers: list[int]) -> str:
    """Rising numbers in braces: one progression, else each run of consecutive ones."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    progression = range(numbers[0], numbers[-1] + 1, step)
    if list(progression) == numbers:
        return fold(progression)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " and ".join(fold(range(run[0], run[-1] + 1)) for run in runs)


def _copies(name: str) -> int:
    """Number of tensors that a folded name stands for."""
    numbers = [unfold(found) for found in FOLDED.finditer(name)]
    return math.prod((every[-1] - every[0]) // every.step + 1 for every in numbers)


def _unfolded(specs: Named) -> Named:
    """Every tensor under its own name; those that are folded together stand together for each number."""
    for start, entries in itertools.groupby(specs, key=_folded_start):
        if start is None:
            yield from entries
            continue
        numbers = FOLDED.search(start)
        assert numbers is not None
        repeated = [(name.removeprefix(start), spec) for name, spec in entries]
        for number in unfold(numbers):
            yield from ((f"{start[: numbers.start()]}{number}{rest}", spec) for rest, spec in repeated)


def _folded_start(entry: tuple[str, ParameterSpec]) -> str | None:
    """A folded name up to the end of its numbers."""
    numbers = FOLDED.search(entry[0])
    return None if numbers is None else entry[0][: numbers.end()]


def aliases(config: ModelConfig) -> dict[str, str]:
    """Names that are another tensor of the table: alias -> name."""
    return {HEAD: EMBEDDING} if config.tie_embeddings else {}


def _before_layers(config: ModelConfig) -> Named:
    yield EMBEDDING, _matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))


def _after_layers(config: ModelConfig, vlm: VLMConfig | None) -> Named:
    yield from _given((_architecture(vlm).parameters or decoder_parameters)(config, vlm))
    if not config.tie_embeddings:
        yield HEAD, _matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))


def _layer(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> Named:
    """The tensors of one layer; names of experts are folded."""
    return _given((_architecture(vlm).layer_parameters or decoder_layer_parameters)(config, vlm, layer))


def _architecture(vlm: VLMConfig | None) -> Declaration:
    """What was declared of an architecture, or else of the nearest one that its config derives from."""
    if vlm is not None:
        for arch in (vlm.arch, *(vars(cls).get("arch", "") for cls in type(vlm).__mro__)):
            found = declaration("architecture", arch)
            if found != Declaration():
                return found
    return Declaration()


def _given(specs: Mapping[str, ParameterSpec]) -> Named:
    """What a declared function gives, item by item.

    Raises:
        ConfigError: it gives something else.
    """
    if not isinstance(specs, Mapping) or not all(isinstance(spec, ParameterSpec) for spec in specs.values()):
        raise ConfigError([f"declared parameters = {specs!r}: must be a mapping from names to ParameterSpec"])
    return iter(specs.items())


def decoder_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> ParameterTable:
    """What the plain decoder has besides embedding, layers and head: its final norm."""
    return dict(_prefixed("norm", _norm(config)))


def decoder_layer_parameters(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> ParameterTable:
    """The tensors of a layer of the plain decoder."""
    return dict(_decoder_layer(config, _feed_forward(config, layer)))


def _decoder_layer(config: ModelConfig, feed_forward: Named) -> Named:
    yield from _prefixed("attention_norm", _norm(config))
    yield from _prefixed("attention", _attention(config))
    yield from _prefixed("mlp_norm", _norm(config))
    yield from _prefixed("mlp", feed_forward)


def _feed_forward(config: ModelConfig, layer: int) -> Named:
    if config.is_moe_layer(layer):
        return _moe(config)
    return _mlp(config, config.computed_ffn_hidden_dim)


def _attention(config: ModelConfig) -> Named:
    yield from _projections(config, config.n_heads, config.kv_heads, config.head_size, config.attention_bias)
    if config.qk_norm:
        yield from _head_norms(config)


def _head_norms(config: ModelConfig) -> Named:
    for name in ("q_norm.weight", "k_norm.weight"):
        yield name, _ones((config.head_size,), ("head_dim",))


def _projections(config: ModelConfig, heads: int, kv_heads: int, head_dim: int, bias: bool = False) -> Named:
    """Query, key, value and output projections, biases after all weights."""
    h, dim = head_dim, config.dim
    yield "q_proj.weight", _matrix(config, (heads * h, dim), ("heads", "embed"))
    yield "k_proj.weight", _matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "v_proj.weight", _matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "o_proj.weight", _residual(config, (dim, heads * h), ("embed", "heads"))
    if bias:
        yield "q_proj.bias", _zeros((heads * h,), ("heads",))
        yield "k_proj.bias", _zeros((kv_heads * h,), ("kv_heads",))
        yield "v_proj.bias", _zeros((kv_heads * h,), ("kv_heads",))
        yield "o_proj.bias", _zeros((dim,), ("embed",))


def _mlp(config: ModelConfig, hidden_dim: int) -> Named:
    """A feed-forward network."""
    return _given((declaration("mlp", config.activation).parameters or _standard_mlp)(config, hidden_dim))


def _standard_mlp(config: ModelConfig, hidden_dim: int) -> ParameterTable:
    return {
        "up_proj.weight": _matrix(config, (hidden_dim, config.dim), ("mlp", "embed")),
        "down_proj.weight": _residual(config, (config.dim, hidden_dim), ("embed", "mlp")),
    }


def _gated_mlp(config: ModelConfig, hidden_dim: int) -> ParameterTable:
    gate = _matrix(config, (hidden_dim, config.dim), ("mlp", "embed"))
    return {"gate_proj.weight": gate, **_standard_mlp(config, hidden_dim)}


def _moe(config: ModelConfig) -> Named:
    experts, hidden_dim = config.num_experts, config.computed_expert_ffn_hidden_dim
    router = declaration("router", config.moe_router).parameters or router_parameters
    yield from _prefixed("router", _given(router(config)))
    yield from _experts(config, experts, hidden_dim, config.moe_packed_experts)
    if config.moe_shared_experts > 0:
        yield from _prefixed("shared_expert", _mlp(config, hidden_dim * config.moe_shared_experts))


def router_parameters(config: ModelConfig) -> ParameterTable:
    """What every router has: its gate."""
    return _gate(config, config.num_experts)


def _balanced_router(config: ModelConfig) -> ParameterTable:
    experts = config.num_experts
    buffers = {
        name: ParameterSpec((experts,), Constant(value), ("experts",), is_buffer=True)
        for name, value in (("expert_bias", 0.0), ("expert_ema", 1.0 / experts))
    }
    return {**router_parameters(config), **buffers}


def _gate(config: ModelConfig, experts: int) -> ParameterTable:
    gate = _matrix(config, (experts, config.dim), ("experts", "embed"))
    return {"gate.weight": replace(gate, full_precision=True)}


def _experts(config: ModelConfig, experts: int, hidden_dim: int, packed: bool) -> Named:
    if not packed:
        yield from _prefixed(f"experts.{fold(range(experts))}", _mlp(config, hidden_dim))
        return
    for name, spec in _mlp(config, hidden_dim):
        if name not in PACKED or len(spec.shape) != 2:
            allowed = f"must be False, as only {', '.join(PACKED)} can be packed"
            given = f"with activation = {config.activation!r}, whose experts have {name}"
            raise ConfigError([f"model.moe_packed_experts = True: {allowed}; {given}"])
        shape, axes = (experts, *spec.shape[::-1]), ("experts", *spec.axes[::-1])
        yield PACKED[name], replace(spec, shape=shape, axes=axes)


def _cross_attention(config: ModelConfig, vlm: CrossAttentionConfig) -> ParameterTable:
    blocks = config.n_layers // vlm.cross_attention_every_n_layers
    prefix = f"cross_attention_layers.{fold(range(blocks))}" if blocks else ""
    added = dict(_prefixed(prefix, _cross_attention_block(config, vlm))) if blocks else {}
    return {**added, **decoder_parameters(config)}


def _cross_attention_block(config: ModelConfig, vlm: CrossAttentionConfig) -> Named:
    """Starts as the identity: what writes to the residual stream is 0."""
    heads, kv_heads = vlm.resolved_heads(config.n_heads)
    yield from _prefixed("attn_norm", _norm(config))
    yield from _prefixed("attn", _silent(_projections(config, heads, kv_heads, vlm.resolved_head_dim(config))))
    yield from _prefixed("mlp_norm", _norm(config))
    yield from _prefixed("mlp", _silent(_mlp(config, config.computed_ffn_hidden_dim)))


def _moma_layer(config: ModelConfig, vlm: MoMaConfig, layer: int) -> ParameterTable:
    experts = [
        _prefixed(f"experts.{modality}", _expert_choice(config, vlm.moma_experts_per_modality[modality]))
        for modality in vlm.moma_modalities
    ]
    return dict(_decoder_layer(config, itertools.chain.from_iterable(experts)))


def _expert_choice(config: ModelConfig, experts: int) -> Named:
    yield from _prefixed("router", _given(_gate(config, experts)))
    yield from _experts(config, experts, config.computed_expert_ffn_hidden_dim, packed=False)


def _mot(config: ModelConfig, vlm: MoTConfig) -> ParameterTable:
    norms = (_prefixed(f"mot_norms.{modality}", _norm(config)) for modality in vlm.mot_modalities)
    return dict(itertools.chain.from_iterable(norms))


def _mot_layer(config: ModelConfig, vlm: MoTConfig, layer: int) -> ParameterTable:
    return dict(_mot_block(config, vlm, layer))


def _mot_block(config: ModelConfig, vlm: MoTConfig, layer: int) -> Named:
    """Own norms, projections and FFN for each modality; attention and dense FFN start silent."""
    for modality in vlm.mot_modalities:
        yield from _prefixed(f"attn_norm.{modality}", _norm(config))
    per_modality = {modality: dict(_mot_projections(config, vlm, modality)) for modality in vlm.mot_modalities}
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        for modality, specs in per_modality.items():
            for part in ("weight", "bias"):
                if f"{projection}.{part}" in specs:
                    yield f"attn.{projection}.{modality}.{part}", specs[f"{projection}.{part}"]
    for modality in vlm.mot_modalities:
        yield from _prefixed(f"mlp_norm.{modality}", _norm(config))
    for modality in vlm.mot_modalities:
        ffn = _feed_forward(config, layer)
        yield from _prefixed(f"mlp.{modality}", ffn if config.is_moe_layer(layer) else _silent(ffn))


def _mot_projections(config: ModelConfig, vlm: MoTConfig, modality: str) -> Named:
    heads, kv_heads = config.n_heads, config.kv_heads
    if modality == "image":
        heads, kv_heads = vlm.resolved_image_heads(heads, kv_heads)
    yield from _silent(_projections(config, heads, kv_heads, config.head_size, config.attention_bias))
    if config.qk_norm:
        yield from _head_norms(config)


def _silent(specs: Named) -> Named:
    """The same tensors with those that write to the residual stream set to 0."""
    for name, spec in specs:
        yield name, replace(spec, initializer=Constant(0.0)) if spec.residual else spec


def _norm(config: ModelConfig) -> Named:
    return _given((declaration("norm", config.norm_type).parameters or _scale)(config))


def _scale(config: ModelConfig) -> ParameterTable:
    return {"weight": _ones((config.dim,), ("embed",))}


def _scale_and_shift(config: ModelConfig) -> ParameterTable:
    return {**_scale(config), "bias": _zeros((config.dim,), ("embed",))}


def _matrix(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Normal(config.init_std), axes, decay=True)


def _residual(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    """A matrix that writes to the residual stream: scaled by 1/sqrt(2 * n_layers) (GPT-2, Radford et al. 2019)."""
    std = config.init_std / math.sqrt(2 * config.n_layers)
    return ParameterSpec(shape, Normal(std), axes, decay=True, residual=True)


def _ones(shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Constant(1.0), axes)


def _zeros(shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Constant(0.0), axes)


def _prefixed(prefix: str, specs: Named) -> Named:
    for name, spec in specs:
        yield f"{prefix}.{name}", spec


declare("norm", "rmsnorm", parameters=_scale)
declare("norm", "layernorm", parameters=_scale_and_shift)
declare("mlp", "silu", parameters=_gated_mlp)
declare("mlp", "gelu", parameters=_standard_mlp)
declare("mlp", "relu", parameters=_standard_mlp)
declare("router", "softmax_topk", parameters=router_parameters)
declare("router", "sigmoid_topk", parameters=_balanced_router)
declare("architecture", "joint_decoder", parameters=decoder_parameters)
declare("architecture", "cross_attention", parameters=_cross_attention)
declare("architecture", "mot", parameters=_mot, layer_parameters=_mot_layer, equal_layers=True)
declare("architecture", "moma", layer_parameters=_moma_layer, equal_layers=True)
