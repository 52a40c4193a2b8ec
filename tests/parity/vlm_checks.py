"""Checks that the bugs of `tests.mutants_vlm` must not pass: forwards of one backend against the oracle, on the
smallest models in which every changed line matters. JAX runs eagerly, since every mutant would have to be compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from shared_config.contract import noise
from shared_config.contract.parameters import parameter_table
from shared_config.contract.rope import rope_tables
from shared_config.contract.specs import ParameterTable
from shared_config.contract.vision import TowerConfig, adapter_table, tower_table, wrapper_table
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    FreezeSpec,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from tests.oracle.adapter import adapter as oracle_adapter
from tests.oracle.cross_attention import cross_attention_block
from tests.oracle.linear import submodule
from tests.oracle.mot import mot_block, stream
from tests.oracle.vision import vision_tower
from tests.oracle.vlm import cross_attention_decoder, joint_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw
from tests.outcomes import refused
from tests.tolerance import assert_same_function

Arrays = dict[str, np.ndarray]

RNG = np.random.default_rng(23)
DIM, IMAGE_LEN, TEXT_LEN = 12, 6, 5
MODEL = ModelConfig(
    dim=DIM, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=2, vocab_size=13, ffn_hidden_dim=10, max_seq_len=24,
    norm_eps=1e-2, rope_theta=50.0,
)  # fmt: skip
NORMED = MODEL.replace(qk_norm=True, sliding_window=3)
CROSS = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1, cross_attention_n_kv_heads=3)
MOT = MoTConfig(max_text_len=8, mot_image_n_kv_heads=2)
MOMA = MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3})
TOWER = TowerConfig(
    image_size=7, patch_size=3, dim=6, n_layers=1, n_heads=2, ffn_hidden_dim=10, activation="gelu_pytorch_tanh",
    norm_eps=1e-2, class_token=True, pre_norm=True,
)  # fmt: skip
IDS = RNG.integers(0, 2, (2, IMAGE_LEN + TEXT_LEN), np.int32)
STREAM = RNG.standard_normal((2, IMAGE_LEN + TEXT_LEN, DIM))
DOCUMENTS = np.array([[0] * 4 + [1] * 7, [0] * 11], np.int32)
REAL = np.array([[True] * 8 + [False] * 3, [False, False] + [True] * 9])


@dataclass(frozen=True)
class Side:
    """The backend that is importable now, in float64."""

    name: str

    def module(self, path: str) -> Any:
        return importlib.import_module(f"kempnerforge_{self.name}.{path}")

    def built(self, builder: Callable[..., Any], *args: Any, drawn: bool = False, **options: Any) -> Any:
        if self.name == "torch":
            return builder(*args, **options).double()
        rngs = nnx.Rngs(0) if drawn else None
        return builder(*args, **options, rngs=rngs).to(jnp.float64)

    def filled(self, table: ParameterTable, builder: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A module with the weights of `weights_of`."""
        module = self.built(builder, *args, **options)
        self.module("model.state").set_state(module, weights_of(table))
        return module

    def compiled(self, model: Any) -> Callable[..., Any]:
        """``model.run``, in JAX as one program for the shapes that it is called with."""
        if self.name == "torch":
            return model.run
        state = self.module("model.state")
        graphdef, params, buffers = state.split(model)

        @functools.partial(jax.jit, static_argnames="limit_capacity")
        def run(params: Any, buffers: Any, args: Any, given: Any, limit_capacity: bool | None) -> Any:
            return state.merge(graphdef, params, buffers).run(*args, **given, limit_capacity=limit_capacity)

        return lambda *args, limit_capacity=None, **given: run(params, buffers, args, given, limit_capacity)

    def once(self, call: Callable[[], Any]) -> Any:
        """What a call gives, in JAX as one program."""
        return call() if self.name == "torch" else jax.jit(call)()

    def array(self, value: Any) -> Any:
        return (
            None if value is None else torch.from_numpy(np.array(value)) if self.name == "torch" else jnp.asarray(value)
        )

    def numpy(self, value: Any) -> np.ndarray:
        return self.module("model.state").to_numpy(value)

    def same(self, value: Any, truth: np.ndarray, name: str) -> None:
        assert_same_function(self.numpy(value), truth, name)


def weights_of(table: ParameterTable) -> Arrays:
    return draw({name: spec.shape for name, spec in table.items()}, 6)


# Parts


def check_towers(backend: str) -> None:
    """Patches that leave a rest, biases, a class token, dropped and kept, both activations."""
    side, pixels = Side(backend), np.random.default_rng(1).standard_normal((2, 3, 7, 7))
    for activation in ("gelu_pytorch_tanh", "quick_gelu"):
        tower = dataclasses.replace(TOWER, activation=activation, keep_class_token=activation == "quick_gelu")
        built = side.filled(tower_table(tower), side.module("model.vision").VisionTower, tower)
        found = built(side.array(pixels))
        assert found.shape == (2, tower.num_tokens, tower.dim)
        side.same(found, vision_tower(pixels, weights_of(tower_table(tower)), tower), activation)


ADAPTERS = (
    AdapterConfig(type="avgpool", pool_window=2),
    AdapterConfig(activation="silu"),
    AdapterConfig(type="attentional_pool", pool_window=3, pool_heads=2),
)


def check_adapters(backend: str) -> None:
    """A grid of 3 x 3, which windows of 2 leave ragged."""
    side, rng = Side(backend), np.random.default_rng(2)
    for config in ADAPTERS:
        given = rng.standard_normal((2, 36 if config.type == "attentional_pool" else 9, 6)) + 0.3
        table = adapter_table(config, 6, 8)
        built = side.filled(table, side.module("model.adapter").build_adapter, config, 6, 8)
        truth = oracle_adapter(given, weights_of(table), config)
        side.same(built(side.array(given)), truth, config.type)
        assert built.output_num_tokens(given.shape[1]) == truth.shape[1]


def check_noise(backend: str) -> None:
    """The same bits as the contract, in narrow dtypes too; Gumbel noise in float64."""
    side, source = Side(backend), Side(backend).module("model.noise")
    pixels = np.random.default_rng(5).uniform(-1, 1, (2, 3, 2, 2))
    narrow = pixels.astype(ml_dtypes.bfloat16)
    narrow[1, 0, 0, 0] = np.nan
    for given in (pixels, narrow):
        found = side.numpy(source.image_noise(side.module("model.state").from_numpy(given), 2, 3))
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found.astype(np.float64), noise.image_noise(given, 2, 3).astype(np.float64))
    seed, float64 = side.array(np.asarray(5, np.int32)), torch.float64 if backend == "torch" else jnp.float64
    gumbel = source.gumbel_noise(seed, 2, 1, 4, 3, float64)
    np.testing.assert_allclose(side.numpy(gumbel), noise.gumbel_noise(5, 2, 1, 4, 3), rtol=1e-12)
    lowest = side.numpy(source.uniforms(side.array(np.zeros(1, np.int64 if backend == "torch" else np.uint32))))
    assert lowest[0] > 0


# Cross-attention


def check_cross_attention(backend: str) -> None:
    """A block with and without a mask, one row of which hides the whole image; silent at the start."""
    side, rng = Side(backend), np.random.default_rng(3)
    x, image = rng.standard_normal((2, TEXT_LEN, DIM)), rng.standard_normal((2, IMAGE_LEN, DIM))
    mask = np.array([[True, False, True, True, False, True], [False] * IMAGE_LEN])
    path = "cross_attention_layers.0."
    table = {name.removeprefix(path): spec for name, spec in parameter_table(MODEL, CROSS).items() if path in name}
    kind, sizes = side.module("model.cross_attention").CrossAttentionBlock, (DIM, 6, 3, 10)
    options: dict[str, Any] = {"head_dim": 2, "norm_eps": MODEL.norm_eps}
    block = side.filled(table, kind, *sizes, **options)
    for given in (mask, None):
        truth, _ = cross_attention_block(x, image, weights_of(table), MODEL, CROSS, given)
        side.same(block(side.array(x), side.array(image), side.array(given)), truth, f"mask {given is not None}")
    fresh = side.built(kind, *sizes, **options, drawn=True)
    np.testing.assert_array_equal(side.numpy(fresh(side.array(x), side.array(image))), x)


def check_cross_attention_layers(backend: str) -> None:
    """Each block follows its own layer; a row without an image has none."""
    side, rng, config = Side(backend), np.random.default_rng(4), MODEL.replace(n_layers=2)
    tokens, image = rng.integers(0, 13, (2, TEXT_LEN)), rng.standard_normal((2, IMAGE_LEN, DIM))
    table = parameter_table(config, CROSS)
    model = side.filled(table, side.module("model.transformer").Transformer, config, vlm_config=CROSS)
    context, mask = side.module("model.modality").ModalityContext, np.array([[True] * IMAGE_LEN, [False] * IMAGE_LEN])
    for given in (mask, None):
        truth = cross_attention_decoder(weights_of(table), config, CROSS, tokens, image, given).logits
        seen = context(image_features=side.array(image), image_mask=side.array(given))
        side.same(model.run(side.array(tokens), modality=seen).logits, truth, f"mask {given is not None}")


# Mixture of transformers


def check_mot_block(backend: str) -> None:
    """One block: modalities in any order, documents, padding, a window; no mask is built beforehand."""
    side, where = Side(backend), stream(IDS, DOCUMENTS, REAL)
    path, mot = "layers.0.", side.module("model.mot")
    table = {name.removeprefix(path): spec for name, spec in parameter_table(NORMED, MOT).items() if path in name}
    block = side.filled(table, mot.MoTBlock, NORMED, MOT.mot_modalities, 0, image_n_kv_heads=2)
    layout, x = mot.Layout(MOT.mot_modalities, ids=side.array(IDS)), side.array(STREAM)
    rope = rope_tables(NORMED.head_size, NORMED.max_seq_len, NORMED.rope_theta)
    cos, sin = (side.array(rows[side.numpy(layout.positions(x))][:, None]) for rows in rope)
    masks = {"doc_ids": side.array(DOCUMENTS), "key_padding_mask": side.array(REAL)}
    truth, _ = mot_block(STREAM, weights_of(table), NORMED, MOT, 0, where)
    side.same(block(x, (cos, sin), layout=layout, **masks), truth, "block")


def check_mot_experts(backend: str) -> None:
    """Under capacity, the experts of a modality see its own tokens: told by ids, and by spans."""
    side, config = Side(backend), MODEL.replace(num_experts=3, moe_capacity_factor=0.6)
    path, mot = "layers.0.", side.module("model.mot")
    table = {name.removeprefix(path): spec for name, spec in parameter_table(config, MOT).items() if path in name}
    block = side.filled(table, mot.MoTBlock, config, MOT.mot_modalities, 0, image_n_kv_heads=2)
    rope = tuple(side.array(rows) for rows in (np.ones((11, 1)), np.zeros((11, 1))))
    plain = dataclasses.replace(stream(IDS), valid_BS=REAL)
    prefix = np.broadcast_to(np.arange(11) >= IMAGE_LEN, IDS.shape).astype(np.int32)
    by_span = mot.Layout(MOT.mot_modalities, spans=(("image", 0, IMAGE_LEN), ("text", IMAGE_LEN, 11)))
    for ids, layout in ((IDS, mot.Layout(MOT.mot_modalities, ids=side.array(IDS))), (prefix, by_span)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.oracle.mot.apply_rope", lambda x, *_: x)
            truth, losses = mot_block(
                STREAM, weights_of(table), config, MOT, 0, dataclasses.replace(plain, modality_BS=ids)
            )
        given = {"layout": layout, "key_padding_mask": side.array(REAL)}
        out, stats = side.once(functools.partial(block.run, side.array(STREAM), rope, **given))[:2]
        side.same(out, truth, "block")
        for name in MOT.mot_modalities:
            np.testing.assert_array_equal(side.numpy(stats[name].expert_counts), losses.counts[name])


def check_mot_stream(backend: str) -> None:
    """The transformer, its modalities told by ids, and by a prefix."""
    side, tokens = Side(backend), np.random.default_rng(7).integers(0, 13, (2, TEXT_LEN))
    table, context = parameter_table(MODEL, MOT), Side(backend).module("model.modality").ModalityContext
    weights = weights_of(table)
    model = side.filled(table, side.module("model.transformer").Transformer, MODEL, vlm_config=MOT)
    given = context(inputs_embeds=side.array(STREAM), modality_ids=side.array(IDS))
    mixed = side.once(functools.partial(model.run, modality=given)).logits
    side.same(mixed, mot_decoder(weights, MODEL, MOT, STREAM, IDS).logits, "ids")
    image = STREAM[:, :IMAGE_LEN]
    embeds = np.concatenate([image, weights["token_embedding.embedding.weight"][tokens]], axis=1)
    truth = mot_decoder(weights, MODEL, MOT, embeds, np.array([[0] * IMAGE_LEN + [1] * TEXT_LEN] * 2)).logits
    side.same(model.run(side.array(tokens), modality=context(prefix_embeds=side.array(image))).logits, truth, "prefix")


def check_mot_cache(backend: str) -> None:
    """Text goes on after the cached text, an image before it not counted."""
    side = Side(backend)
    model = side.built(side.module("model.transformer").Transformer, MODEL, vlm_config=MOT)
    cache: Any = SimpleNamespace(positions=lambda length: side.array(np.arange(8, 8 + length)), image_tokens=6)
    context, x = side.module("model.modality").ModalityContext(), side.array(STREAM[:, :2])
    given = side.module("model.mot").MoTArchitecture(MODEL, MOT).block_inputs({}, x, context, [cache], model.rope)
    cos, _ = rope_tables(MODEL.head_size, MODEL.max_seq_len, MODEL.rope_theta)
    np.testing.assert_allclose(side.numpy(given["rope"][0]), cos[2:4], rtol=1e-6)


def check_mot_start(backend: str) -> None:
    """A new block is the identity."""
    side, mot = Side(backend), Side(backend).module("model.mot")
    block = side.built(mot.MoTBlock, MODEL, MOT.mot_modalities, 0, drawn=True)
    layout, rope = mot.Layout(MOT.mot_modalities, ids=side.array(IDS)), side.array(np.ones((11, 1)))
    out = block(side.array(STREAM), (rope, rope), layout=layout)
    np.testing.assert_array_equal(side.numpy(out), STREAM)


# Modality-aware experts


def check_moma(backend: str) -> None:
    """Choices with noise among valid tokens of each modality, in any order and after a prefix; no generation."""
    side, config = Side(backend), MODEL
    table = parameter_table(config, MOMA)
    model = side.filled(table, side.module("model.transformer").Transformer, config, vlm_config=MOMA)
    context = side.module("model.modality").ModalityContext
    given = {"inputs_embeds": STREAM, "modality_ids": IDS, "key_padding_mask": REAL, "noise_seed": np.int32(4)}
    found = model.run(modality=context(**{name: side.array(value) for name, value in given.items()})).logits
    masks = {"key_padding_mask": REAL, "noise": moma_noise(IDS, REAL, 4)}
    side.same(found, moma_decoder(weights_of(table), config, MOMA, STREAM, IDS, **masks).logits, "ids")
    heads = (2, 24, 3, 2, torch.float64 if backend == "torch" else jnp.float64)
    with refused("causal routers"):
        model.run(side.array(IDS), kv_caches=[side.module("model.attention").KVCache(*heads)])


def moma_noise(ids: np.ndarray, real: np.ndarray, seed: int) -> dict[int, dict[str, np.ndarray]]:
    """Of the only layer, for the real tokens of each modality."""
    return {
        0: {
            name: noise.gumbel_noise(seed, 0, group, ids.size, MOMA.moma_experts_per_modality[name])[
                ((ids == group) & real).ravel()
            ]
            for group, name in enumerate(MOMA.moma_modalities)
        }
    }


# Wrappers

VISION = VisionEncoderConfig(feature_dim=6, num_tokens=2)
PLAIN = AdapterConfig(type="linear")
CLIPS = np.random.default_rng(8).uniform(-1, 1, (3, 3, 3, 2, 2))
TOKENS = np.random.default_rng(9).integers(0, 13, (3, TEXT_LEN))
FRAMES = np.array([[True, False, True], [False, True, False], [False] * 3])
TEXT_MASK = np.arange(TEXT_LEN) >= np.array([[0], [2], [1]])
ARCHITECTURES: dict[str, VLMConfig] = {
    "joint_decoder": JointDecoderConfig(max_text_len=8), "cross_attention": CROSS, "mot": MOT,
    "prefix": JointDecoderConfig(max_text_len=8, prefix_lm=True),
}  # fmt: skip


def wrapper_check(
    arch: str,
    positions: tuple[int | tuple[int, ...], ...] | None = None,
    prompts: tuple[int, ...] | None = None,
) -> Callable[[str], None]:
    """Clips with frames that don't exist, before the text or within, and padded text, through a whole model of one
    architecture, in which prompts may have attention in both directions.
    """

    places = None if positions is None else np.array(positions)

    def check(backend: str) -> None:
        side, vlm = Side(backend), ARCHITECTURES[arch]
        table = wrapper_table(MODEL, vlm, PLAIN, None, 6)
        build = side.module("model.vlm").build_vlm_wrapper
        model = side.filled(table, build, MODEL, VISION, PLAIN, vlm, frames_per_clip=3)
        given = [side.array(value) for value in (CLIPS, TOKENS, FRAMES)]
        placed = {} if places is None else {"image_positions": side.array(places)}
        placed |= {} if prompts is None else {"prompt_lengths": side.array(np.array(prompts))}
        logits = side.numpy(model.run(*given, text_mask=side.array(TEXT_MASK), **placed).logits)
        truth = wrapper_truth(arch, positions, prompts)
        assert_same_function(logits * TEXT_MASK[..., None], truth * TEXT_MASK[..., None], arch)

    check.__name__ = f"check_{arch}_wrapper{'' if places is None else ('', '_within', '_apart')[places.ndim]}"
    return check


@functools.cache
def wrapper_truth(
    arch: str, positions: tuple[int | tuple[int, ...], ...] | None, prompts: tuple[int, ...] | None
) -> np.ndarray:
    vlm = ARCHITECTURES[arch]
    weights = weights_of(wrapper_table(MODEL, vlm, PLAIN, None, 6))
    features = noise.image_noise(CLIPS.reshape(9, 3, 2, 2), 2, 6)
    tokens_BFnD = (features @ weights["adapter.proj.weight"].T + weights["adapter.proj.bias"]).reshape(3, 3, 2, DIM)
    image, mask = tokens_BFnD.reshape(3, 6, DIM), np.repeat(FRAMES, 2, axis=1)
    own = submodule(weights, "transformer")
    padding = np.concatenate([mask, TEXT_MASK], axis=1)
    if isinstance(vlm, CrossAttentionConfig):
        return cross_attention_decoder(own, MODEL, vlm, TOKENS, image, mask, key_padding_mask=TEXT_MASK).logits
    if not isinstance(vlm, MoTConfig):
        places = None if positions is None else np.array(positions)
        lengths = None if prompts is None else np.array(prompts)
        return joint_decoder(own, MODEL, TOKENS, image, padding, places, lengths).logits
    embeds = np.concatenate([image, own["token_embedding.embedding.weight"][TOKENS]], axis=1)
    ids = np.array([[0] * image.shape[1] + [1] * TEXT_LEN] * 3)
    cut = slice(image.shape[1], None)
    return mot_decoder(own, MODEL, vlm, embeds, ids, key_padding_mask=padding, output_slice=cut).logits


def check_seed(backend: str) -> None:
    """The seed of the noise arrives."""
    side, seed = Side(backend), Side(backend).array(np.int32(3))
    image = side.module("model.modality").ModalityContext(prefix_embeds=side.array(STREAM))
    assert side.module("model.vlm").with_text(image, None, seed).noise_seed is seed


APART = ((0, 2, 2), (3, 1, TEXT_LEN), (TEXT_LEN, TEXT_LEN, 4))
WRAPPERS = (
    *(wrapper_check(arch) for arch in ("joint_decoder", "cross_attention", "mot")),
    *(wrapper_check("joint_decoder", positions) for positions in ((2, 0, TEXT_LEN), APART)),
    wrapper_check("prefix", prompts=(3, 1, TEXT_LEN)),
)


def check_places(backend: str) -> None:
    """Places that no text has are refused, and where the image has a place of its own all are."""
    side, build = Side(backend), Side(backend).module("model.vlm").build_vlm_wrapper
    given = [*map(side.array, (CLIPS.astype(np.float32), TOKENS))]
    for arch, places, said in (
        ("joint_decoder", [0, TEXT_LEN + 1, 0], f"prefix_positions = {TEXT_LEN + 1}: ids must be in"),
        ("joint_decoder", [0, 0], r"prefix_positions.shape = \(2,\): must be \(3,\)"),
        ("joint_decoder", [[0, 0, 0], [0, -1, 0], [0, 0, 0]], "prefix_positions = -1: ids must be in"),
        ("joint_decoder", [[0, 0]] * 3, r"image_positions.shape = \(3, 2\): must be \(3, 3\)"),
        ("mot", [0, 0, 0], "image_positions is given: must be None with MoTStrategy"),
    ):
        model = side.built(build, MODEL, VISION, PLAIN, ARCHITECTURES[arch], 3)
        with refused(said):
            model.run(*given, image_positions=side.array(np.array(places, np.int32)))
        with refused("image_positions is given, pixel_values = None"):
            model.run(None, given[1], image_positions=side.array(np.array(places, np.int32)))


def check_prompts(backend: str) -> None:
    """Prompts that no text has are refused, and where attention is causal all are; images there stand first. An image
    without a prompt sees itself alone.
    """
    side, build = Side(backend), Side(backend).module("model.vlm").build_vlm_wrapper
    given = [*map(side.array, (CLIPS.astype(np.float32), TOKENS))]
    prefix, causal = (
        side.built(build, MODEL, VISION, PLAIN, ARCHITECTURES[arch], 3) for arch in ("prefix", "joint_decoder")
    )
    for model, argument, values, said in (
        (prefix, "prompt_lengths", [0, TEXT_LEN + 1, 0], f"prompt_lengths = {TEXT_LEN + 1}: ids must be in"),
        (prefix, "prompt_lengths", [0, 0], r"prompt_lengths.shape = \(2,\): must be \(3,\)"),
        (prefix, "image_positions", [0, 0, 0], "image_positions is given: must be None with vlm.prefix_lm = true"),
        (causal, "prompt_lengths", [0, 0, 0], "prompt_lengths is given: must be None unless vlm.prefix_lm = true"),
    ):
        with refused(said):
            model.run(*given, **{argument: side.array(np.array(values, np.int32))})
    with refused("frame_mask is given, pixel_values = None: the mask needs the images that it masks"):
        causal.run(None, given[1], frame_mask=side.array(np.ones((3, 1), bool)))
    context = side.module("model.modality").ModalityContext
    for options, said in (
        (
            {"prefix_lengths": [3, TEXT_LEN + 1, 1]},
            rf"prefix_lengths\[1\] = {TEXT_LEN + 1}: must be at most {TEXT_LEN}",
        ),
        ({"prefix_lengths": [-1, 0, 0]}, "prefix_lengths = -1: ids must be in"),
    ):
        with refused(said):
            arrays = {name: side.array(np.array(values)) for name, values in options.items()}
            prefix.transformer.run(given[1], modality=context(**arrays))
    with refused("prefix_lengths is given: must be None with doc_ids"):
        modality = context(prefix_lengths=side.array(np.array([1, 0, 0])))
        prefix.transformer.run(given[1], modality=modality, doc_ids=side.array(np.zeros((3, TEXT_LEN), np.int32)))
    alone, none = (
        prefix.context(*given, **lengths) for lengths in ({}, {"prompt_lengths": side.array(np.zeros(3, np.int32))})
    )
    np.testing.assert_array_equal(side.numpy(alone.prefix_lengths), side.numpy(none.prefix_lengths))


def check_budget(backend: str) -> None:
    """What does not fit is refused, when it is built and when it is called."""
    side, build = Side(backend), Side(backend).module("model.vlm").build_vlm_wrapper
    with refused("image tokens must fit"):
        side.built(build, MODEL, VISION, PLAIN, MOT, 9)
    model = side.built(build, MODEL, VISION, PLAIN, CROSS, 2)
    with refused("3 frames: must have from 1 to 2"):
        model.run(*map(side.array, (CLIPS.astype(np.float32), TOKENS)))


# Freezing


def check_freeze(backend: str) -> None:
    """What is frozen, how much of it changed, and what a frozen parameter does not get."""
    side, freeze = Side(backend), Side(backend).module("training.freeze")
    model = side.built(side.module("model.vlm").build_vlm_wrapper, MODEL, VISION, AdapterConfig(), CROSS)
    names = {name for name in wrapper_table(MODEL, CROSS, AdapterConfig(), None, 6) if name.startswith("adapter.")}
    size = 6 * DIM + DIM + DIM * DIM + DIM
    assert freeze.freeze_params(model, "adapter.*") == size
    assert freeze.freeze_params(model, "adapter.*") == 0
    assert freeze.frozen_parameters(model) == names
    specs = (FreezeSpec("transformer"), FreezeSpec("transformer", frozen=False))
    assert freeze.apply_freeze_specs(model, specs, CROSS.module_patterns) == size
    assert freeze.frozen_parameters(model) == set()


VLM_CHECKS: Mapping[str, tuple[Callable[[str], None], ...]] = {
    "model.vision": (check_towers,),
    "model.adapter": (check_adapters,),
    "model.noise": (check_noise,),
    "model.cross_attention": (check_cross_attention, check_cross_attention_layers),
    "model.layout": (check_mot_stream, check_mot_cache),
    "model.mot": (check_mot_block, check_mot_stream, check_mot_start, check_mot_cache, check_mot_experts),
    "model.expert_choice": (check_moma,),
    "model.moma": (check_moma,),
    "model.modality": (check_seed, check_places, check_prompts, *WRAPPERS),
    "model.stream": (check_prompts,),
    "model.strategy": (check_places, *WRAPPERS),
    "model.vlm": (check_budget, check_places, check_prompts, check_seed, *WRAPPERS),
    "training.freeze": (check_freeze,),
}
