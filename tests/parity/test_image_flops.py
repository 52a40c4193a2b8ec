"""FLOPs of models with images are those of the operators that run, whatever is frozen; but for masked keys, which
counters take for work.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge_jax.model.state import merge, split
from kempnerforge_jax.model.vlm import build_vlm_wrapper as build_in_jax
from kempnerforge_torch.model.mask import Mask, dense_mask
from kempnerforge_torch.model.vlm import build_vlm_wrapper
from kempnerforge_torch.training.freeze import apply_freeze_specs
from shared_config.contract import flops
from shared_config.contract.counts import flops_per_token
from shared_config.contract.flops import ImageFlops, _Language, micro_batch_flops
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config, preset_names
from shared_config.parity.shrink import shrink
from shared_config.schema import JointDecoderConfig, VisionEncoderConfig
from shared_config.schema.job import JobConfig
from tests.parity.test_counts import ATTENTION, PRODUCTS, experts_as_products

NIGHTLY = settings.get_current_profile_name() == "nightly"
PRESETS = [name for name in preset_names() if "vlm" in name]
FREEZE = {
    "tower": '[{module="vision_encoder"}]',
    "nothing": "[]",
    "all but adapter": '[{module="vision_encoder"},{module="transformer"}]',
    "all but tower": '[{module="adapter"},{module="transformer"}]',
    "tower and adapter": '[{module="vision_encoder"},{module="adapter"}]',
    "all but the last layer": (
        '[{module="vision_encoder"},{module="adapter"},{module="transformer"},'
        '{module="transformer.layers.1.*",frozen=false}]'
    ),
    "all but the head": (
        '[{module="vision_encoder"},{module="adapter"},{module="transformer"},'
        '{module="transformer.output_head.*",frozen=false}]'
    ),
    "keys": (
        '[{module="vision_encoder"},{module="adapter"},{module="transformer.token_embedding.*"},{module="*k_proj*"}]'
    ),
}
NARROW = ("--vlm.mot_image_n_kv_heads=1",)
VARIANTS = {name: (name, ()) for name in PRESETS} | {
    "pooled": ("debug_vlm_joint_decoder", ("--adapter.type=attentional_pool", "--adapter.pool_heads=2")),
    "averaged": ("debug_vlm_mot", ("--adapter.type=avgpool",)),
    "projected": ("debug_vlm_moma", ("--adapter.type=linear", "--vlm.moma_capacity_factor=0.4")),
    "experts": (
        "debug_vlm_mot",
        ("--model.num_experts=4", "--model.moe_top_k=2", "--model.moe_router=softmax_topk", *NARROW),
    ),
    "clips": ("debug_vlm_joint_decoder", ("--video.max_frames=2", "--video.min_frames=1", "--video.frame_size=32")),
    "several": ("debug_vlm_joint_decoder", ("--vlm.image_token_id=1", "--data.max_images=3")),
    "prefix": ("debug_vlm_joint_decoder", ("--vlm.prefix_lm=true", "--data.max_images=2", "--adapter.type=linear")),
    "every third": (
        "debug_vlm_cross_attention",
        ("--model.n_layers=6", "--vlm.cross_attention_every_n_layers=3"),
    ),
    "tied": ("debug_vlm_cross_attention", ("--model.tie_embeddings=true", "--vlm.cross_attention_n_heads=2")),
}  # fmt: skip
CROSSED = [(v, f) for v in VARIANTS for f in FREEZE if (v, f) != ("tied", "all but the head")]
BY_DAY = [("debug_vlm_joint_decoder", "tower"), ("debug_vlm_cross_attention", "tower and adapter"),
          ("experts", "all but the last layer"), ("projected", "keys"), ("pooled", "all but adapter"),
          ("several", "nothing"), ("prefix", "tower"), ("every third", "nothing")]  # fmt: skip


def small(variant: str, frozen: str) -> JobConfig:
    preset, overrides = VARIANTS[variant]
    flags = [f"--vlm.freeze={FREEZE[frozen]}", "--train.compile_model=false", *overrides]
    whole = load_config(preset, flags)
    config = shrink(whole)
    return config.replace(train=config.train.replace(batch_size=2, seq_len=7), data=whole.data)


_experts_as_products = pytest.fixture(autouse=True)(experts_as_products)


def stated(config: JobConfig) -> ImageFlops:
    """With all keys, as counters see it."""
    with mock.patch.object(flops, "mean_visible_keys", lambda length, window=None: float(length)):
        found = micro_batch_flops(config, tower_of(config))
    assert found is not None
    return found


def batch_of(config: JobConfig, side: int) -> dict[str, np.ndarray]:
    frames = () if config.video is None and config.data.max_images == 1 else (config.frames_per_row,)
    assert config.vlm is not None
    batch = {
        "pixel_values": np.random.default_rng(0).standard_normal((2, *frames, 3, side, side), np.float32),
        "input_ids": np.arange(14, dtype=np.int32).reshape(2, 7) % (config.model.vocab_size - 2) + 2,
    }
    if config.vlm.places_image:
        batch["image_positions"] = np.array([[0, 2, 7], [3, 3, 4]])
    if config.vlm.has_prefix:
        batch["prompt_lengths"] = np.array([3, 0])
    return batch


@pytest.mark.parametrize(("variant", "frozen"), CROSSED if NIGHTLY else BY_DAY, ids=str)
def test_flops_are_those_of_the_operators_that_run_in_torch(variant: str, frozen: str) -> None:
    config = small(variant, frozen)
    assert config.vlm is not None
    assert config.vision_encoder is not None
    frames = config.video.max_frames if config.video else 1
    model = build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm, frames)
    model.init_weights_and_freqs(seed=1)
    apply_freeze_specs(model, config.vlm.freeze, config.vlm.module_patterns)
    batch = {name: torch.from_numpy(each) for name, each in batch_of(config, model.vision_encoder.image_size).items()}
    counts = []
    with sdpa_kernel(SDPBackend.MATH):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                logits = model(**batch)[0]
                if backward:
                    logits.sum().backward()
            found = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
            assert found.keys() <= {*PRODUCTS, *ATTENTION}, found
            counts.append(sum(found.values()))
    told = stated(config)
    assert told.forward == counts[0]
    assert told.training == counts[1]


@pytest.mark.parametrize("variant", [*PRESETS, "several", "prefix"] if NIGHTLY else ["debug_vlm_cross_attention"])
@pytest.mark.parametrize("frozen", ["tower", "nothing"] if NIGHTLY else ["tower"])
def test_flops_are_those_that_xla_counts(variant: str, frozen: str) -> None:
    """The program of loss and gradients, before it is optimised; what is no product adds some."""
    config = small(variant, frozen)
    if "moma" in variant:
        pytest.skip("XLA counts the loop over the rows of experts as one turn")
    assert config.vlm is not None
    assert config.vision_encoder is not None
    frames = 1 if config.video is None else config.video.max_frames
    parts = (config.model, config.vision_encoder, config.adapter, config.vlm, frames)
    model: Any = nnx.eval_shape(lambda: build_in_jax(*parts, rngs=nnx.Rngs(0)))
    graphdef, parameters, buffers = split(model)
    frozen_names = flops.frozen_names(parameters, config.vlm.freeze, config.vlm.module_patterns)
    trained = {name: value for name, value in parameters.items() if name not in frozen_names}
    rest = {name: value for name, value in parameters.items() if name in frozen_names}
    batch = batch_of(config, model.vision_encoder.image_size)

    def loss(trained: Any, rest: Any, buffers: Any, batch: Any) -> Any:
        return merge(graphdef, {**trained, **rest}, buffers)(**batch)[0].sum()

    shapes = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in batch.items()}
    lowered = jax.jit(jax.value_and_grad(loss)).lower(trained, rest, buffers, shapes)
    analysis: Any = lowered.cost_analysis()
    told = stated(config).training
    assert told <= analysis["flops"] <= 1.12 * told


@settings(max_examples=50 if NIGHTLY else 10, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 7), min_size=1, max_size=4), images=st.integers(1, 3),
    tokens=st.sampled_from([1, 4]), window=st.none() | st.integers(1, 24), prefix=st.booleans(),
)  # fmt: skip
def test_what_a_mask_lets_through_is_counted(
    prompts: list[int], images: int, tokens: int, window: int | None, prefix: bool
) -> None:
    """Of each row, in a layer with a window and in one without: the keys that its queries see."""
    config = small("prefix", "nothing")
    assert config.vision_encoder is not None
    model = config.model.replace(sliding_window=window, attention_pattern=("window", "full") if window else None)
    config = config.replace(
        model=model,
        train=config.train.replace(batch_size=len(prompts)),
        data=config.data.replace(max_images=images),
        vision_encoder=VisionEncoderConfig(feature_dim=12, num_tokens=tokens),
        vlm=JointDecoderConfig(max_text_len=7, image_token_id=1, prefix_lm=prefix),
    )
    seen, before = 0, images * tokens
    for own in model.layer_windows:
        lengths = torch.tensor(prompts) + before if prefix else None
        mask = Mask(causal=True, window=own, prefix_lengths=lengths)
        allowed = dense_mask(mask, before + 7, before + 7)
        seen += int(allowed.expand(len(prompts), *allowed.shape[1:]).sum())
    with mock.patch.object(_Language, "_within", return_value=0):
        products = micro_batch_flops(config)
    found = micro_batch_flops(config, prompts=prompts)
    assert found is not None
    assert products is not None
    assert found.model.forward - products.model.forward == 4 * model.n_heads * model.head_size * seen


@pytest.mark.parametrize("variant", ["debug_vlm_joint_decoder", "debug_vlm_mot", "debug_vlm_cross_attention"])
def test_without_image_tokens_it_is_what_text_needs(variant: str) -> None:
    """Everything is trained, and the image has no tokens in the stream: what is left is the model of text."""
    config = small(variant, "nothing")
    found = micro_batch_flops(config, tower_of(config), frames=0)
    assert found is not None
    text = flops_per_token(config.model, 7, config.vlm)
    crossing = found.model.training - 3 * 14 * text.forward
    if variant == "debug_vlm_cross_attention":
        assert crossing > 0
    else:
        assert abs(crossing) <= 14 * 3 * config.model.n_layers
    assert (found.tower.training, found.adapter.training) == (0, 0)


def test_what_is_frozen_follows_the_schedule_and_what_is_not_known_is_not_told() -> None:
    thawing = (
        f"--vlm.freeze={FREEZE['tower']}",
        "--vlm.freeze_schedule=[{start_step=5, specs=[]}]",
    )
    config = shrink(load_config("debug_vlm_mot", thawing))
    first, last, all_trained = (
        micro_batch_flops(job, tower_of(job), step=step)
        for job, step in ((config, 4), (config, 5), (shrink(load_config("debug_vlm_mot", ["--vlm.freeze=[]"])), 0))
    )
    assert first is not None
    assert last == all_trained
    assert first.tower.training == first.tower.forward
    assert first.training < (0 if last is None else last.training)
    assert micro_batch_flops(load_config("debug")) is None
    assert micro_batch_flops(load_config("debug_vlm_joint_decoder", ["--lora.rank=2"])) is None
