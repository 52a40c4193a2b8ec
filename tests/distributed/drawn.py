"""Cases of `layouts`, drawn: any model, with sizes that layouts divide or not, in any layout of so many devices."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import strategies as st

from shared_config.contract.sharding import MESH_AXES
from shared_config.errors import ConfigError
from tests.distributed.layouts import MODELS, Case
from tests.mutants_distributed import FROZEN, LATER, LORA, MUON, SCHEDULE_FREE

VLMS = ("joint_decoder", "cross_attention", "mot", "moma")
BIASED = ("dense", "mixed", "staged")
"""With biases of keys, whose gradient is 0 but for rounding: Lion goes by its sign."""
MOST = 100
"""Choices of one case of which none may be a config."""


def layouts(devices: int) -> list[dict[str, int]]:
    """Sizes of the mesh axes, with what is left for "dp_shard"; that of 1 is left out."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    axes = [axis for axis in MESH_AXES if axis != "dp_shard"]
    every = (dict(zip(axes, sizes, strict=True)) for sizes in itertools.product(divisors, repeat=len(axes)))
    fitting = [each for each in every if devices % math.prod(size for axis, size in each.items() if axis != "ep") == 0]
    found = [{axis: size for axis, size in each.items() if size > 1} for each in fitting]
    return [each for each in found if each.get("ep", 1) <= _shards(each, devices)]


def _shards(layout: dict[str, int], devices: int) -> int:
    return devices // math.prod(size for axis, size in layout.items() if axis != "ep")


@st.composite
def cases(draw: st.DrawFn, devices: int, axes: tuple[str, ...] = MESH_AXES) -> Case:
    """One whose config is valid; its layout may be refused.

    Args:
        axes: that may be larger than 1.
    """
    able = [layout for layout in layouts(devices) if set(layout) <= set(axes)]
    for _ in range(MOST):
        layout = draw(st.sampled_from(able))
        model = draw(st.sampled_from([*_likely(layout), *MODELS, *VLMS]))
        options = draw(_image_options() if model in VLMS else _text_options(model))
        exchanges = layout.get("ep", 1) > 1 and model in MODELS and draw(st.booleans())
        case = Case(model, devices, layout, options, exchanges=exchanges)
        try:
            for sizes in (layout, {}):
                case.job(sizes)
        except ConfigError:
            continue
        return case
    raise AssertionError("no config is valid")


def _likely(layout: dict[str, int]) -> list[str]:
    """Models that are not refused for what they are."""
    if layout.get("pp", 1) > 1:
        return ["staged"] * len(MODELS)
    experts = ["softmax", "sigmoid", "limited", "scaled"]
    return experts * 3 if layout.get("ep", 1) > 1 else []


def _some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.sets(st.sampled_from(sorted(fields)), max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in sorted(chosen)})
    )


@st.composite
def _text_options(draw: st.DrawFn, model: str) -> dict[str, dict[str, Any]]:
    any_of, yes = st.sampled_from, st.booleans()
    heads = draw(any_of([None, (2, 1), (4, 2), (6, 3), (6, 2), (8, 4), (3, 3)]))
    own: dict[str, Any] = {} if heads is None else {"n_heads": heads[0], "n_kv_heads": heads[1]}
    sizes = {
        "vocab_size": any_of([3, 5, 9, 13, 35, 64]), "dim": any_of([7, 9, 10, 18, 20]), "head_dim": any_of([2, 4, 6]),
        "ffn_hidden_dim": any_of([6, 7, 14, 22]), "tie_embeddings": yes, "qk_norm": yes,
        "qk_norm_over": any_of(["head", "width"]), "norm_placement": any_of(["before", "after", "both"]),
        "n_layers": any_of([1, 2, 3, 5]), "sliding_window": any_of([1, 3, 20]), "mlp_bias": yes,
        "activation": any_of(["silu", "gelu", "relu", "geglu_tanh"]), "logit_softcap": st.just(2.0),
    }  # fmt: skip
    own |= draw(_some(sizes))
    if "num_experts" in MODELS[model]:
        experts = {
            "num_experts": any_of([2, 3, 4, 6, 8]), "moe_top_k": any_of([1, 2, 3]),
            "moe_capacity_factor": any_of([0.0, 0.3, 1.0, 1.7]), "moe_gradient_scale": yes,
            "moe_frequency": any_of([1, 2]), "moe_norm_topk_prob": yes, "moe_routed_scaling": st.just(2.5),
            "moe_shared_experts": any_of([1, 2]), "moe_expert_ffn_multiplier": any_of([0.3, 0.5]),
            "moe_bias_schedule": any_of(["constant", "linear_warmup"]),
        }  # fmt: skip
        own |= draw(_some(experts))
    train = {
        "batch_size": any_of([1, 2, 4]), "seq_len": any_of([4, 7, 9, 12]), "label_smoothing": st.just(0.1),
        "logit_z_loss_weight": st.just(0.01), "activation_checkpointing": any_of(["full", "narrow", "selective"]),
        "on_nonfinite": st.just("skip"), "grad_clip_norm": any_of([0.0, 100.0]),
    }  # fmt: skip
    found = {"model": own, "train": draw(_some(train)), "data": {"pack_documents": draw(yes)}}
    lion = [] if model in BIASED else [{"optimizer": {"name": "lion"}}]
    optimizers = [{}, {"optimizer": {"ema_decay": 0.9}}, MUON, SCHEDULE_FREE, LORA, *lion]
    for name, fields in draw(any_of(optimizers)).items():
        found[name] = {**found.get(name, {}), **fields}
    return found


@st.composite
def _image_options(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    any_of = st.sampled_from
    vlm = {
        "freeze": any_of(["[]", FROZEN, "[{module = 'vision_encoder'}, {module = 'transformer'}]"]),
        "freeze_schedule": st.just(LATER),
    }
    train = {"batch_size": any_of([1, 3]), "on_nonfinite": st.just("skip")}
    optimizer = draw(any_of([{}, {"ema_decay": 0.9}, {"name": "muon"}]))
    return {"vlm": draw(_some(vlm)), "train": draw(_some(train)), "optimizer": optimizer}
