"""Hypothesis strategies for configs and inputs, built constructively so that they shrink.

Heads are drawn as (key/value heads, group, head size) and everything else follows; sizes avoid square matrices, so
that a transposed weight has the wrong shape; sequences are at least 8 long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from shared_config.contract.initialise import stream
from shared_config.schema.model import ModelConfig, RopeScaling

LENGTHS = (8, 11)
BATCHES = (1, 3)
MAX_SEQ_LEN = 24
INPUT_KINDS = ("tokens", "documents", "embeddings", "prefix")

rope_scalings = st.one_of(
    st.just(RopeScaling()),
    st.builds(RopeScaling, type=st.just("linear"), factor=st.sampled_from([1.5, 4.0])),
    st.builds(
        RopeScaling, type=st.sampled_from(["llama3", "yarn"]), factor=st.just(8.0), original_max_seq_len=st.just(16)
    ),
)


@st.composite
def model_configs(draw: st.DrawFn, experts: bool = False, **fixed: Any) -> ModelConfig:
    """Small models of every kind that the text stack knows; with ``experts`` some layers are mixtures."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 6, 10]))
    heads = kv_heads * group
    own_width = draw(st.booleans())
    fields: dict[str, Any] = {
        "dim": draw(st.sampled_from([14, 20, 28])) if own_width else heads * head_dim,
        "head_dim": head_dim if own_width else None,
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": heads,
        "n_kv_heads": None if group == 1 and draw(st.booleans()) else kv_heads,
        "vocab_size": draw(st.sampled_from([13, 37])),
        "ffn_hidden_dim": draw(st.sampled_from([9, 24, 50])),
        "norm_type": draw(st.sampled_from(["rmsnorm", "layernorm", "rmsnorm_1p"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
        "activation": draw(st.sampled_from(["silu", "gelu", "relu", "geglu_tanh"])),
        "max_seq_len": MAX_SEQ_LEN,
        "rope_theta": draw(st.sampled_from([10000.0, 50.0, 500000.0])),
        "rope_scaling": draw(rope_scalings),
        "sliding_window": draw(st.sampled_from([None, 1, 3, 6])),
        "attention_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
    }
    fields |= draw(block_fields(experts))
    fields |= draw(layer_fields({**fields, **fixed}))
    if experts:
        fields |= draw(expert_fields({**fields, **fixed}["n_layers"]))
    return ModelConfig(**{**fields, **fixed})


def block_fields(experts: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of blocks, embedding and head by which families differ: in half the models all are as they are plainly."""
    values: dict[str, tuple[Any, ...]] = {
        "attention_output_bias": (True, False),
        "attention_scale": (None, 0.3),
        "mlp_bias": (False,) if experts else (False, True),
        "qk_norm_over": ("head", "width"),
        "norm_placement": ("before", "after", "both"),
        "embedding_scale": (1.0, 2.5),
        "residual_scale": (1.0, 0.7),
        "logit_divisor": (1.0, 3.0),
        "attention_softcap": (None, 2.0),
        "logit_softcap": (None, 1.5),
    }
    drawn = {name: st.sampled_from(choices) for name, choices in values.items()}
    return st.one_of(st.just({}), st.fixed_dictionaries(drawn))


@st.composite
def layer_fields(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Attention of one kind in half the models; else of several kinds, of which one has the window, if there is one."""
    if "attention_pattern" in fields or draw(st.booleans()):
        return {}
    pattern = draw(attention_patterns(fields["n_layers"], fields["sliding_window"]))
    return {
        "attention_pattern": pattern,
        "window_rope_theta": draw(st.sampled_from([None, 70.0])),
        "window_rope_scaled": draw(st.booleans()),
    }


@st.composite
def attention_patterns(
    draw: st.DrawFn, n_layers: int, window: int | None, full: tuple[str, ...] = ("full", "full_nope")
) -> tuple[str, ...]:
    """Kinds of attention of the first layers, some of which have the window, if there is one."""
    windows = () if window is None else tuple(kind.replace("full", "window") for kind in full)
    kinds = draw(st.lists(st.sampled_from((*full, *windows)), min_size=1, max_size=n_layers))
    if window is None or any(kind in windows for kind in kinds):
        return tuple(kinds)
    return (*kinds[:-1], draw(st.sampled_from(windows)))


@st.composite
def expert_fields(draw: st.DrawFn, n_layers: int) -> dict[str, Any]:
    """Fields of a mixture of experts."""
    experts = draw(st.integers(1, 5))
    router = draw(st.sampled_from(["softmax_topk", "sigmoid_topk"]))
    shared = draw(st.integers(0, 2))
    return {
        "num_experts": experts,
        "moe_top_k": draw(st.integers(1, experts)),
        "moe_frequency": draw(st.integers(1, n_layers)),
        "moe_router": router,
        "moe_shared_experts": shared,
        "moe_shared_expert_gate": shared > 0 and draw(st.booleans()),
        "moe_capacity_factor": draw(st.sampled_from([0.0, 0.6, 1.25])),
        "moe_sequence_aux_loss_weight": draw(st.sampled_from([0.0, 0.1])) if router == "sigmoid_topk" else 0.0,
        "moe_gradient_scale": draw(st.booleans()),
        "moe_packed_experts": draw(st.booleans()),
        "moe_router_z_loss_weight": draw(st.sampled_from([0.0, 0.01])),
        "moe_norm_topk_prob": draw(st.booleans()),
        "moe_routed_scaling": draw(st.sampled_from([1.0, 2.5])),
    }


@dataclass(frozen=True)
class Inputs:
    """What one forward is given, as NumPy arrays; None where it is not given.

    Attributes:
        tokens: int32 (B, S).
        labels: int32 (B, S_out), -100 where there is no loss.
        doc_ids: int32 (B, S).
        key_padding_mask: bool (B, stream length).
        inputs_embeds, prefix_embeds: float64 (B, S or N, D), of values that bfloat16 holds exactly.
        output_slice: start and stop of the positions that get logits.
    """

    tokens: np.ndarray | None
    labels: np.ndarray
    doc_ids: np.ndarray | None = None
    key_padding_mask: np.ndarray | None = None
    inputs_embeds: np.ndarray | None = None
    prefix_embeds: np.ndarray | None = None
    output_slice: tuple[int, int] | None = None

    def __repr__(self) -> str:
        """Structure in full, values by their shape: those follow from the seed."""
        shown = []
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                structure = value.astype(int).tolist() if name in ("doc_ids", "key_padding_mask") else value.shape
                shown.append(f"{name}={structure}")
        return f"Inputs({', '.join(shown)}, output_slice={self.output_slice})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


@st.composite
def inputs(
    draw: st.DrawFn,
    config: ModelConfig,
    kinds: tuple[str, ...] = INPUT_KINDS,
    batches: tuple[int, ...] = BATCHES,
    lengths: tuple[int, ...] = LENGTHS,
) -> Inputs:
    """One batch for ``config``: structure is drawn, values come from a seed."""
    batch, length = draw(st.sampled_from(batches)), draw(st.sampled_from(lengths))
    rng = stream(draw(st.integers(0, 10**6)), "inputs")
    kind = draw(st.sampled_from(kinds))
    if kind == "documents":
        return _with_labels(rng, config, batch, length, doc_ids=draw(documents(batch, length)))
    if kind == "embeddings":
        embeds = _embeddings(rng, batch, length, config.dim)
        return _with_labels(
            rng, config, batch, length, inputs_embeds=embeds, key_padding_mask=draw(paddings(batch, length))
        )
    if kind == "prefix":
        prefix = 3
        embeds = _embeddings(rng, batch, prefix, config.dim)
        padding = draw(paddings(batch, prefix + length))
        cut = (prefix, prefix + length) if draw(st.booleans()) else None
        return _with_labels(
            rng, config, batch, length, prefix_embeds=embeds, key_padding_mask=padding, output_slice=cut
        )
    return _with_labels(rng, config, batch, length)


def documents(batch: int, length: int) -> st.SearchStrategy[np.ndarray]:
    """Document ids (B, S): each row cut at drawn places."""
    cuts = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda row: np.cumsum(row))
    return st.lists(cuts, min_size=batch, max_size=batch).map(lambda rows: np.stack(rows).astype(np.int32))


def paddings(batch: int, length: int) -> st.SearchStrategy[np.ndarray]:
    """Validity (B, S): padding at the left, at the right, or anywhere, so that some rows see nothing."""
    left = st.integers(0, length).map(lambda n: np.arange(length) >= n)
    right = st.integers(0, length).map(lambda n: np.arange(length) < n)
    anywhere = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda row: np.array(row, dtype=bool))
    rows = st.one_of(left, right, anywhere)
    return st.lists(rows, min_size=batch, max_size=batch).map(lambda drawn: np.stack(drawn))


def _embeddings(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float64)


def _with_labels(rng: np.random.Generator, config: ModelConfig, batch: int, length: int, **fields: Any) -> Inputs:
    tokens = None
    if fields.get("inputs_embeds") is None:
        tokens = rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    prefix = fields.get("prefix_embeds")
    whole = length + (prefix.shape[1] if prefix is not None else 0)
    start, stop = fields.get("output_slice") or (0, whole)
    labels = rng.integers(0, config.vocab_size, (batch, stop - start), dtype=np.int32)
    labels[rng.random(labels.shape) < 0.25] = -100
    return Inputs(tokens=tokens, labels=labels, **fields)
