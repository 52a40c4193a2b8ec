"""The language model: `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import (
    EXECUTION,
    KEEPS_FUNCTION,
    LARGEST,
    NESTED,
    Count,
    Items,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    registered,
    section,
)
from shared_config.schema.pattern import LayerKind, beside_a_window, has_window, shortest_pattern
from shared_config.schema.rope import RopeScaling, RopeTheta

FFN_MULTIPLE = 256
EXPERT_FFN_MULTIPLE = 16
UNIT = "Tokens are counted over one micro-batch of one data-parallel rank, so how a batch is cut changes the result."
EvenInt = Annotated[int, Field(gt=0, le=LARGEST, multiple_of=2)]
FamilyName = Literal[
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3", "granite", "qwen2_moe", "smollm3",
    "olmo3", "gemma", "gemma2", "gemma3_text",
]  # fmt: skip
"""The ``model_type`` of the Hugging Face models that can be read and written."""


@section
class ModelConfig(Section):
    """One decoder-only transformer, dense or mixture of experts.

    ``n_kv_heads`` None means ``n_heads``; ``head_dim`` None means ``dim // n_heads``; both read as numbers after
    construction. The unit of what experts count, for router losses, capacity and gradient scale, is the micro-batch of
    one data-parallel rank, and of a modality where each has its own experts; the sequence-wise loss does not depend on
    how a batch is split.
    """

    dim: PositiveInt = 4096
    n_layers: PositiveInt = 32
    n_heads: PositiveInt = 32
    n_kv_heads: PositiveInt | None = None
    head_dim: EvenInt | None = None
    vocab_size: PositiveInt = 32000
    ffn_dim_multiplier: PositiveFloat = 1.0
    ffn_hidden_dim: PositiveInt | None = None
    norm_type: Annotated[str, registered("norm")] = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    activation: Annotated[str, registered("mlp", "activation")] = "silu"
    max_seq_len: Annotated[PositiveInt, KEEPS_FUNCTION] = 2048
    rope_theta: RopeTheta = 10000.0
    rope_scaling: Annotated[RopeScaling, NESTED] = Field(default_factory=RopeScaling)
    window_rope_theta: Annotated[
        RopeTheta | None, Field(description="Theta of layers with a window. None: rope_theta.")
    ] = None
    window_rope_scaled: Annotated[
        bool, Field(description="Whether rope_scaling is that of layers with a window, too.")
    ] = True
    sliding_window: PositiveInt | None = None
    attention_pattern: Annotated[
        Items[LayerKind] | None,
        Field(
            description="Attention of the first layers, repeated to the last: to all that came before (full) or to "
            "sliding_window tokens (window), and with _nope without rotary positions. None: all layers have the "
            "window, if there is one."
        ),
    ] = None
    attention_bias: bool = False
    attention_output_bias: Annotated[
        bool, Field(description="Whether, with attention_bias, the output projection has one too.")
    ] = True
    attention_scale: Annotated[
        PositiveFloat | None, Field(description="Factor on products of queries and keys. None: head_dim^-0.5.")
    ] = None
    mlp_bias: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = False
    qk_norm_over: Annotated[
        Literal["head", "width"],
        Field(description="What a norm of queries and keys is taken over: each head, or all heads together."),
    ] = "head"
    norm_placement: Annotated[
        Literal["before", "after", "both"],
        Field(description="Where the norms of attention and of feed-forward parts are: on their inputs or outputs."),
    ] = "before"
    embedding_scale: Annotated[PositiveFloat, Field(description="Factor on the embeddings of tokens.")] = 1.0
    residual_scale: Annotated[
        PositiveFloat, Field(description="Factor on what attention and feed-forward parts add to the residual stream.")
    ] = 1.0
    logit_divisor: Annotated[PositiveFloat, Field(description="What logits are divided by.")] = 1.0
    attention_softcap: Annotated[
        PositiveFloat | None, Field(description="Scores s of attention become cap * tanh(s / cap). None: they stay.")
    ] = None
    logit_softcap: Annotated[
        PositiveFloat | None, Field(description="Logits l, divided, become cap * tanh(l / cap). None: they stay.")
    ] = None
    init_std: Annotated[PositiveFloat, KEEPS_FUNCTION] = 0.02
    model_type: Annotated[str, registered("model")] = "transformer"
    sdpa_backend: Annotated[Literal["auto", "flash", "efficient", "cudnn", "math"], EXECUTION] = "auto"
    family: Annotated[
        FamilyName | None,
        EXECUTION,
        Field(
            description="Hugging Face family that the model is written as. None: the only one that expresses the "
            "config; where several do, one of them has to be named."
        ),
    ] = None

    num_experts: Count = 0
    moe_top_k: PositiveInt = 2
    moe_frequency: PositiveInt = 1
    moe_router: Annotated[str, registered("router")] = "softmax_topk"
    moe_shared_experts: Count = 0
    moe_shared_expert_gate: Annotated[
        bool,
        Field(description="Multiply what the shared expert gives a token by the sigmoid of a gate's product with it."),
    ] = False
    moe_aux_loss_weight: Annotated[
        NonNegativeFloat, KEEPS_FUNCTION, Field(description=f"Weight of the balancing loss. {UNIT}")
    ] = 0.01
    moe_capacity_factor: Annotated[
        NonNegativeFloat,
        KEEPS_FUNCTION,
        Field(
            description="An expert takes at most max(1, ceil(tokens * moe_top_k / num_experts * factor)) assignments; "
            f"0: any number. Decoding has no limits, so weights may be used with another factor. {UNIT}"
        ),
    ] = 0.0
    moe_sequence_aux_loss_weight: Annotated[
        NonNegativeFloat,
        KEEPS_FUNCTION,
        Field(
            description="Weight of the balancing loss within each sequence, averaged over sequences: it does not "
            "depend on how a batch is cut into micro-batches."
        ),
    ] = 0.0
    moe_gradient_scale: Annotated[
        bool,
        KEEPS_FUNCTION,
        Field(
            description="Scale what flows back through an expert by (mean assignments to an expert) / (its own). "
            f"{UNIT}"
        ),
    ] = False
    moe_bias_schedule: Annotated[Literal["constant", "cosine_decay", "linear_warmup"], KEEPS_FUNCTION] = "constant"
    moe_packed_experts: bool = False
    moe_expert_ffn_multiplier: PositiveFloat = 1.0
    moe_router_z_loss_weight: Annotated[NonNegativeFloat, KEEPS_FUNCTION] = 0.0
    moe_norm_topk_prob: bool = True
    moe_routed_scaling: PositiveFloat = 1.0

    def derive(self) -> Mapping[str, object]:
        head_dim = self.dim // self.n_heads
        return {
            "n_kv_heads": self.n_heads,
            "head_dim": head_dim,
            "attention_scale": max(1, self.head_dim or head_dim) ** -0.5,
            "window_rope_theta": self.rope_theta,
            "attention_pattern": ("full",) if self.sliding_window is None else ("window",),
        }

    def idle(self) -> Collection[str]:
        names = {field.name for field in dataclasses.fields(self)}
        experts = set() if self.is_moe else {name for name in names if name.startswith("moe_")}
        unused = {"attention_output_bias"} if not self.attention_bias else set()
        unused |= set() if "window" in self.pattern else {"window_rope_theta", "window_rope_scaled"}
        unused |= {"window_rope_scaled"} if self.rope_scaling.type == "none" else set()
        unused |= set() if {"full", "window"} & set(self.pattern) else {"rope_theta"}
        return experts | unused | {"ffn_dim_multiplier"} | (set() if self.qk_norm else {"qk_norm_over"})

    def resolved(self) -> Mapping[str, object]:
        """Widths as they come out, and the attention of every layer."""
        width = self.computed_ffn_hidden_dim
        scaled = "full" in self.pattern or ("window" in self.pattern and self.window_rope_scaled)
        theta = self.rope_theta if "full" in self.pattern else self.window_rope_theta
        kinds = self._first_kinds(min(self.n_layers, 2 * len(self.pattern)))
        return {
            "rope_theta": theta,
            "window_rope_theta": None if self.window_rope_theta == theta else self.window_rope_theta,
            "rope_scaling": self.rope_scaling if scaled else RopeScaling(),
            "attention_pattern": shortest_pattern(beside_a_window(kinds)),
            "ffn_hidden_dim": width,
            "moe_expert_ffn_multiplier": self.computed_expert_ffn_hidden_dim / width,
        }

    def problems(self) -> Iterator[str]:
        yield from self._attention_problems()
        yield from self._width_problems()
        if self.is_moe:
            yield from self._expert_problems()

    def _attention_problems(self) -> Iterator[str]:
        if self.n_heads % self.kv_heads != 0:
            yield f"n_kv_heads = {self.n_kv_heads}: must divide n_heads = {self.n_heads}"
        if "head_dim" in self.derived and self.dim % self.n_heads != 0:
            yield f"n_heads = {self.n_heads}: must divide dim = {self.dim}, or head_dim must be given"
        elif self.head_size < 2 or self.head_size % 2 != 0:
            yield f"head_dim = {self.head_dim}: must be an even number of at least 2 (rotary positions pair channels)"
        if not 1 <= len(self.pattern) <= self.n_layers:
            yield f"attention_pattern = {self.pattern!r}: must have 1 to n_layers = {self.n_layers} entries"
        if has_window(self.pattern) and self.sliding_window is None:
            yield f"sliding_window = None: must be given with attention_pattern = {self.pattern!r}"
        if self.sliding_window is not None and not has_window(self.pattern):
            yield f"sliding_window = {self.sliding_window}: must be None with attention_pattern = {self.pattern!r}"

    def _width_problems(self) -> Iterator[str]:
        """A product of floats may be infinite, which is not a width."""
        if self.ffn_hidden_dim is None and 4 * self.dim * self.ffn_dim_multiplier > LARGEST:
            yield f"ffn_dim_multiplier = {self.ffn_dim_multiplier}: with dim = {self.dim} the width must be below 2^63"
        elif self.is_moe and self.computed_ffn_hidden_dim * self.moe_expert_ffn_multiplier > LARGEST:
            yield f"moe_expert_ffn_multiplier = {self.moe_expert_ffn_multiplier}: the width must be below 2^63"

    def _expert_problems(self) -> Iterator[str]:
        if self.mlp_bias:
            yield f"mlp_bias = True: must be False with num_experts = {self.num_experts}"
        if self.moe_shared_expert_gate and not self.moe_shared_experts:
            yield "moe_shared_expert_gate = True: must be False with moe_shared_experts = 0"
        if self.moe_top_k > self.num_experts:
            yield f"moe_top_k = {self.moe_top_k}: must be at most num_experts = {self.num_experts}"
        if self.moe_frequency > self.n_layers:
            yield f"moe_frequency = {self.moe_frequency}: must be at most n_layers = {self.n_layers} (no MoE layer)"
        if self.moe_router == "softmax_topk" and self.moe_sequence_aux_loss_weight > 0:
            yield (
                f"moe_sequence_aux_loss_weight = {self.moe_sequence_aux_loss_weight}: must be 0 with moe_router "
                "'softmax_topk'; only 'sigmoid_topk' has a sequence loss"
            )
        if self.moe_router == "softmax_topk" and self.moe_bias_schedule != "constant":
            yield (
                f"moe_bias_schedule = {self.moe_bias_schedule!r}: must be 'constant' with moe_router 'softmax_topk', "
                "which has no balancing bias"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, as a plain int."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Channels of a head, as a plain int."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def score_scale(self) -> float:
        """Factor on products of queries and keys, as a plain float."""
        assert self.attention_scale is not None
        return self.attention_scale

    @property
    def qk_norm_type(self) -> str:
        """The norm of queries and keys: an RMSNorm whatever that of blocks is, of its kind if that is one."""
        return self.norm_type if self.norm_type == "rmsnorm_1p" else "rmsnorm"

    @property
    def is_gated(self) -> bool:
        """Whether feed-forward parts have a gate."""
        return self.activation in ("silu", "geglu_tanh")

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        """The kinds of attention that are repeated, as a plain tuple."""
        assert self.attention_pattern is not None
        return self.attention_pattern

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of attention of each layer."""
        return self._first_kinds(self.n_layers)

    def _first_kinds(self, count: int) -> tuple[LayerKind, ...]:
        return (self.pattern * -(-count // max(1, len(self.pattern))))[:count]

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None where it attends to all that came before."""
        return tuple(self.sliding_window if has_window([kind]) else None for kind in self.layer_kinds)

    @property
    def window_counts(self) -> dict[int | None, int]:
        """How many layers have which window, without listing them."""
        whole, rest = divmod(self.n_layers, len(self.pattern))
        windowed = whole * sum(has_window([kind]) for kind in self.pattern)
        windowed += sum(has_window([kind]) for kind in self.pattern[:rest])
        counts = {self.sliding_window: windowed, None: self.n_layers - windowed}
        return {window: count for window, count in counts.items() if count}

    @property
    def layer_rotates(self) -> tuple[bool, ...]:
        """Whether each layer has rotary positions."""
        return tuple(not kind.endswith("_nope") for kind in self.layer_kinds)

    @property
    def window_rope(self) -> tuple[float, RopeScaling]:
        """Theta and scaling of layers with a window."""
        assert self.window_rope_theta is not None
        return self.window_rope_theta, self.rope_scaling if self.window_rope_scaled else RopeScaling()

    @property
    def has_window_rope(self) -> bool:
        """Whether layers with a window rotate otherwise than the others would."""
        return "window" in self.pattern and self.window_rope != (self.rope_theta, self.rope_scaling)

    def with_window(self, window: int) -> ModelConfig:
        """The same with this window, in all layers where none had one."""
        if self.sliding_window is not None or "attention_pattern" in self.derived:
            return self.replace(sliding_window=window)
        pattern = tuple(kind.replace("full", "window") for kind in self.pattern)
        return self.replace(sliding_window=window, attention_pattern=pattern)

    @property
    def is_moe(self) -> bool:
        """Whether some layers route tokens to experts."""
        return self.num_experts > 0

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` (from 0) is a mixture of experts."""
        return self.is_moe and (layer_idx + 1) % self.moe_frequency == 0

    @property
    def computed_ffn_hidden_dim(self) -> int:
        """Width of a dense feed-forward layer."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        width = int(4 * self.dim * 2 / 3 * self.ffn_dim_multiplier)
        return max(1, -(-width // FFN_MULTIPLE)) * FFN_MULTIPLE

    @property
    def computed_expert_ffn_hidden_dim(self) -> int:
        """Width of one expert: the nearest multiple of 16, of two equally near ones the even multiple; at least 16."""
        width = self.computed_ffn_hidden_dim * self.moe_expert_ffn_multiplier
        return max(1, round(width / EXPERT_FFN_MULTIPLE)) * EXPERT_FFN_MULTIPLE

    @property
    def num_params_estimate(self) -> int:
        """Number of parameters of the text model, exact: counted from the parameter table."""
        from shared_config.contract.counts import count_parameters

        return count_parameters(self)
