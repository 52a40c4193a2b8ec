"""What vision-language models of either backend must do, whatever their numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import strategies as st

from kempnerforge_jax.model import adapter as jax_adapter
from kempnerforge_jax.model import state as jax_state
from kempnerforge_jax.model import vlm as jax_vlm
from kempnerforge_jax.model.adapter import LinearAdapter as JaxLinearAdapter
from kempnerforge_jax.model.architecture import Architecture as JaxArchitecture
from kempnerforge_jax.model.attention import KVCache as JaxCache
from kempnerforge_jax.model.cross_attention import CrossAttentionBlock as JaxCrossAttentionBlock
from kempnerforge_jax.model.modality import ModalityContext as JaxContext
from kempnerforge_jax.model.mot import mot_warm_start_from_text_stack as warm_start_jax
from kempnerforge_jax.model.transformer import Transformer as JaxTransformer
from kempnerforge_jax.registry import registry as jax_registry
from kempnerforge_torch.model import adapter as torch_adapter
from kempnerforge_torch.model import state as torch_state
from kempnerforge_torch.model import vlm as torch_vlm
from kempnerforge_torch.model.attention import KVCache as TorchCache
from kempnerforge_torch.model.cross_attention import CrossAttentionBlock as TorchCrossAttentionBlock
from kempnerforge_torch.model.modality import ModalityContext as TorchContext
from kempnerforge_torch.model.mot import mot_warm_start_from_text_stack as warm_start_torch
from kempnerforge_torch.model.transformer import Transformer as TorchTransformer
from kempnerforge_torch.registry import registry as torch_registry
from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.weights import save_weights
from shared_config.registry import temporary
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from shared_config.schema.base import section
from tests.oracle.weights import draw

Arrays = dict[str, np.ndarray]

RNG = np.random.default_rng(4)
MODEL = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32
)
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
ARCHS: dict[str, VLMConfig] = {
    "joint_decoder": JointDecoderConfig(max_text_len=8),
    "cross_attention": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=8),
    "moma": MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3}),
}
CLIPS = RNG.standard_normal((3, 3, 3, 8, 8))
TEXT = RNG.integers(0, 37, (3, 8))
FRAMES = np.array([[True, True, False], [True, False, True], [True, True, True]])


@dataclass(frozen=True)
class Backend:
    """One backend, in float64; arrays go in and come out as NumPy's."""

    name: str

    def build(self, model: ModelConfig, vlm: VLMConfig, vision: VisionEncoderConfig = VISION, **options: Any) -> Any:
        arguments = (model, vision, options.get("adapter"), vlm, options.get("frames", 3))
        if self.name == "torch":
            return torch_vlm.build_vlm_wrapper(*arguments).double().eval()
        with jax.enable_x64(True):
            return jax_vlm.build_vlm_wrapper(*arguments, rngs=None).to(jnp.float64)

    def transformer(self, model: ModelConfig, vlm: VLMConfig | None = None) -> Any:
        if self.name == "torch":
            return TorchTransformer(model, vlm_config=vlm).double().eval()
        with jax.enable_x64(True):
            return JaxTransformer(model, vlm_config=vlm, rngs=None).to(jnp.float64)

    def load(self, model: Any, state: Arrays) -> Any:
        if self.name == "torch":
            torch_state.set_state(model, state)
        else:
            with jax.enable_x64(True):
                jax_state.set_state(model, state)
        return model

    def state(self, model: Any) -> Arrays:
        owner: Any = torch_state if self.name == "torch" else jax_state
        return {name: owner.to_numpy(value) for name, value in owner.get_state(model).items()}

    def logits(self, model: Any, pixels: Any, text: Any, frames: Any = None, **options: Any) -> np.ndarray:
        if self.name == "torch":
            given = [None if value is None else torch.from_numpy(np.asarray(value)) for value in (pixels, text, frames)]
            named = {name: torch.from_numpy(np.asarray(value)) for name, value in options.items()}
            with torch.no_grad():
                return model.run(*given, **named).logits.numpy()
        with jax.enable_x64(True):
            graphdef, params, buffers = jax_state.split(model)
            return np.asarray(compiled(graphdef)(params, buffers, pixels, text, frames, options))

    def text_logits(self, transformer: Any, text: np.ndarray) -> np.ndarray:
        if self.name == "torch":
            with torch.no_grad():
                return transformer.run(torch.from_numpy(text)).logits.numpy()
        with jax.enable_x64(True):
            return np.asarray(transformer.run(jnp.asarray(text)).logits)


@functools.lru_cache(maxsize=16)
def compiled(graphdef: Any) -> Any:
    """The forward of a JAX model, one function for all models of the same structure."""

    @jax.jit
    def run(params: Any, buffers: Any, pixels: Any, text: Any, frames: Any, options: Any) -> Any:
        return jax_state.merge(graphdef, params, buffers).run(pixels, text, frames, **options).logits

    return run


@pytest.fixture(params=["torch", "jax"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


def weights_of(model: ModelConfig, vlm: VLMConfig, adapter: AdapterConfig | None = None, seed: int = 3) -> Arrays:
    tower = vit_tower(VISION)
    table = wrapper_table(model, vlm, adapter or AdapterConfig(), tower, tower.dim)
    return draw({name: spec.shape for name, spec in table.items()}, seed)


def built(backend: Backend, arch: str, model: ModelConfig = MODEL) -> Any:
    return backend.load(backend.build(model, ARCHS[arch]), weights_of(model, ARCHS[arch]))


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize(("arch", "place"), [("joint_decoder", 2), ("cross_attention", 1), ("mot", 0), ("moma", 2)])
def test_absent_frames_change_nothing_beyond_the_ends_of_what_positions_count(
    backend: Backend, arch: str, place: int
) -> None:
    """A clip of one frame is an image: next to the text where positions count it with the text, first where they count
    from the start of the image, anywhere where there are none.
    """
    model = built(backend, arch)
    truth = backend.logits(model, CLIPS, TEXT, FRAMES)
    garbage = np.where(FRAMES[..., None, None, None], CLIPS, np.nan)
    np.testing.assert_array_equal(backend.logits(model, garbage, TEXT, FRAMES), truth)
    alone = np.tile(np.arange(3) == place, (3, 1))
    close(backend.logits(model, CLIPS, TEXT, alone), backend.logits(model, CLIPS[:, [place]], TEXT))
    close(backend.logits(model, CLIPS, TEXT, np.ones((3, 3), bool)), backend.logits(model, CLIPS, TEXT))


@pytest.mark.parametrize("arch", ARCHS)
def test_permuting_the_batch_permutes_the_outputs(backend: Backend, arch: str) -> None:
    model, order = built(backend, arch), [2, 0, 1]
    truth = backend.logits(model, CLIPS, TEXT, FRAMES)
    close(backend.logits(model, CLIPS[order], TEXT[order], FRAMES[order]), truth[order])
    assert np.abs(backend.logits(model, CLIPS[order], TEXT, FRAMES[order]) - truth).max() > 1e-3


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot"])
def test_text_padding_and_neighbours_do_not_matter(backend: Backend, arch: str) -> None:
    model = built(backend, arch)
    truth = backend.logits(model, CLIPS, TEXT, FRAMES)
    other = np.where(np.arange(8) < 5, TEXT, 0)
    mask = np.tile(np.arange(8) < 5, (3, 1))
    close(backend.logits(model, CLIPS, other, FRAMES, text_mask=mask)[:, :5], truth[:, :5])
    close(backend.logits(model, CLIPS[1:2], TEXT[1:2], FRAMES[1:2]), truth[1:2])


def test_moma_never_takes_padding(backend: Backend) -> None:
    model = built(backend, "moma")
    mask = np.arange(8) < np.array([[8], [5], [2]])
    first = backend.logits(model, CLIPS, TEXT, FRAMES, text_mask=mask)
    second = backend.logits(model, CLIPS, np.where(mask, TEXT, 0), FRAMES, text_mask=mask)
    close(np.where(mask[..., None], second, 0), np.where(mask[..., None], first, 0))


def test_noise_moves_choices_in_training_only(backend: Backend) -> None:
    model = built(backend, "moma")
    still = backend.logits(model, CLIPS, TEXT)
    one, again, two = (backend.logits(model, CLIPS, TEXT, noise_seed=np.int32(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - still).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3
    quiet = ARCHS["moma"].replace(moma_gumbel_noise=False)  # type: ignore[call-arg]
    silent = backend.load(backend.build(MODEL, quiet), weights_of(MODEL, quiet))
    np.testing.assert_array_equal(backend.logits(silent, CLIPS, TEXT, noise_seed=np.int32(1)), still)


def test_cross_attention_starts_as_the_text_model(backend: Backend) -> None:
    vlm = ARCHS["cross_attention"]
    model = backend.build(MODEL, vlm)
    own = {name: value for name, value in backend.state(model.transformer).items() if not name.startswith("cross")}
    text = backend.load(backend.transformer(MODEL), own)
    close(backend.logits(model, CLIPS, TEXT, FRAMES), backend.text_logits(text, TEXT))


def test_mot_blocks_start_as_the_identity(backend: Backend) -> None:
    model = backend.build(MODEL, ARCHS["mot"])
    state = backend.state(model.transformer)
    text = backend.text_logits(model.transformer, TEXT)
    x = state["token_embedding.embedding.weight"][TEXT]
    normed = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + MODEL.norm_eps)
    close(text, normed @ state["output_head.proj.weight"].T)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "norm_type": "layernorm", "tie_embeddings": True},
        {"qk_norm": True, "norm_type": "rmsnorm_1p"},
    ],
    ids=str,
)
def test_mot_warm_start_equals_the_dense_model_on_text(backend: Backend, changes: dict[str, Any]) -> None:
    config = MODEL.replace(**changes)
    weights = draw({name: spec.shape for name, spec in parameter_table(config).items()}, 5)
    text = backend.load(backend.transformer(config), weights)
    mixture = backend.transformer(config, ARCHS["mot"])
    warm_start: Any = warm_start_torch if backend.name == "torch" else warm_start_jax
    with jax.enable_x64(True):
        warm_start(mixture, weights)
    np.testing.assert_array_equal(backend.text_logits(mixture, TEXT), backend.text_logits(text, TEXT))
    state = backend.state(mixture)
    for modality in ("image", "text"):
        np.testing.assert_array_equal(
            state[f"layers.1.attn.k_proj.{modality}.weight"], weights["layers.1.attention.k_proj.weight"]
        )
    broken = {name: value for name, value in weights.items() if name != "layers.1.mlp.up_proj.weight"}
    broken["layers.0.attention.q_proj.weight"] = np.zeros((3, 3))
    broken["layers.7.mlp.up_proj.weight"] = np.zeros(2)
    with pytest.raises(UserError) as error:
        warm_start(mixture, broken)
    for part in ("layers.1.mlp.up_proj.weight: missing", "layers.0.attention.q_proj.weight.shape", "layers.7"):
        assert part in str(error.value)


def test_builders_start_from_a_dense_model_on_disk(backend: Backend, tmp_path: Path) -> None:
    dense = dict(initial_values(parameter_table(MODEL), 8))
    save_weights(tmp_path, dense)
    vlm = MoTConfig(max_text_len=8, mot_warm_start_from_text=True, mot_warm_start_path=str(tmp_path))
    state = backend.state(backend.build(MODEL, vlm))
    np.testing.assert_array_equal(
        state["transformer.layers.0.mlp.image.up_proj.weight"], dense["layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot"])
def test_cached_text_after_an_image_equals_the_full_forward(backend: Backend, arch: str) -> None:
    model = built(backend, arch)
    truth = backend.logits(model, CLIPS, TEXT, FRAMES)
    heads, is_torch = model.transformer.config.kv_heads, backend.name == "torch"
    with jax.enable_x64(True), torch.no_grad():
        if is_torch:
            text, context = torch.from_numpy(TEXT), model.context(*map(torch.from_numpy, (CLIPS, TEXT, FRAMES)))
            caches: Any = [TorchCache(3, 32, heads, 4, torch.float64) for _ in range(2)]
        else:
            text = jnp.asarray(TEXT)
            context = model.context(jnp.asarray(CLIPS), text, jnp.asarray(FRAMES))
            caches = [JaxCache(3, 32, heads, 4, jnp.float64) for _ in range(2)]
        pieces = []
        for start, stop in ((0, 3), (3, 4), (4, 8)):
            given = prefill(context, stop) if start == 0 else later(context)
            out = model.transformer(
                text[:, start:stop], modality=given, kv_caches=caches, allow_image_inputs=given is not None
            )
            out, caches = (out, caches) if is_torch else out
            pieces.append(np.asarray(out)[:, -(stop - start) :])
    close(np.concatenate(pieces, axis=1), truth)


def prefill(context: Any, length: int) -> Any:
    """The context of the first tokens only."""
    if context.image_features is not None:
        return context
    kind = type(context)
    image = context.prefix_embeds.shape[1]
    return kind(prefix_embeds=context.prefix_embeds, key_padding_mask=context.key_padding_mask[:, : image + length])


def later(context: Any) -> Any:
    """What the tokens after them need: cross-attention reads the image at every step."""
    return context if context.image_features is not None else None


def test_moma_refuses_to_generate(backend: Backend) -> None:
    transformer = backend.transformer(MODEL, ARCHS["moma"])
    caches: Any = [(TorchCache if backend.name == "torch" else JaxCache)(1, 32, 3, 4) for _ in range(2)]
    tokens: Any = torch.zeros(1, 2, dtype=torch.long) if backend.name == "torch" else jnp.zeros((1, 2), int)
    with jax.enable_x64(True), pytest.raises(ValueError, match="causal routers"):
        transformer(tokens, kv_caches=caches)


def test_contexts_that_do_not_fit_an_architecture_are_refused(backend: Backend) -> None:
    is_torch = backend.name == "torch"
    context: Any = TorchContext if is_torch else JaxContext
    zeros: Any = torch.zeros if is_torch else jnp.zeros
    tokens: Any = torch.zeros(1, 2, dtype=torch.long) if is_torch else jnp.zeros((1, 2), int)
    image = zeros((1, 4, 20))
    with pytest.raises(ValueError, match=r"prefix_embeds is given: .* takes image_features"):
        backend.transformer(MODEL, ARCHS["cross_attention"])(tokens, modality=context(prefix_embeds=image))
    for arch in ("mot", "moma"):
        model = backend.transformer(MODEL, ARCHS[arch])
        with pytest.raises(ValueError, match="image_features is given"):
            model(tokens, modality=context(image_features=image))
        with pytest.raises(ValueError, match=r"modality_ids\.shape = \(1, 3\)"):
            model(modality=context(inputs_embeds=image, modality_ids=zeros((1, 3))))


def test_parts_refuse_what_has_no_meaning(backend: Backend) -> None:
    is_torch = backend.name == "torch"
    context: Any = TorchContext if is_torch else JaxContext
    cache: Any = TorchCache if is_torch else JaxCache
    zeros: Any = torch.zeros if is_torch else jnp.zeros
    mixed = context(inputs_embeds=zeros((1, 4, 20)), modality_ids=zeros((1, 4)))
    with pytest.raises(ValueError, match=r"modality_ids .* with kv_caches"):
        backend.transformer(MODEL, ARCHS["mot"])(modality=mixed, kv_caches=[cache(1, 32, 3, 4)] * 2)
    with pytest.raises(ValueError, match="modality_ids is given: the architecture"):
        backend.transformer(MODEL, ARCHS["cross_attention"])(modality=mixed)
    pool: Any = torch_adapter.AttentionalPoolAdapter if is_torch else jax_adapter.AttentionalPoolAdapter
    with pytest.raises(ValueError, match="pool_heads = 5: must divide in_dim = 12"):
        pool(12, 20, 2, 5, **({} if is_torch else {"rngs": None}))
    vlm: Any = torch_vlm if is_torch else jax_vlm
    with pytest.raises(NotImplementedError, match="ModalityStrategy defines no prepare"):
        vlm.ModalityStrategy(ARCHS["mot"]).prepare(None, None, None)


def test_wrappers_refuse_shapes_that_do_not_fit(backend: Backend) -> None:
    model = backend.build(MODEL, ARCHS["joint_decoder"], frames=2)
    with pytest.raises(ValueError, match="3 frames: must have from 1 to 2"):
        backend.logits(model, CLIPS, TEXT)
    with pytest.raises(ValueError, match="frame_mask"):
        backend.logits(model, CLIPS[:, :2], TEXT, FRAMES)
    with pytest.raises(ValueError, match="frame_mask"):
        backend.logits(model, CLIPS[:, :2], TEXT, FRAMES[:, :2].astype(np.int64))
    with pytest.raises(ValueError, match=r"pixel_values\.shape"):
        backend.logits(model, CLIPS[:, :2, :, :4], TEXT)


def test_what_does_not_fit_is_refused_when_built(backend: Backend) -> None:
    with pytest.raises(ConfigError, match="with 28 image tokens must fit"):
        backend.build(MODEL, ARCHS["mot"], frames=7)
    backend.build(MODEL, ARCHS["cross_attention"], frames=7)
    with pytest.raises(ConfigError, match="pool_heads = 5"):
        backend.build(MODEL, ARCHS["mot"], adapter=AdapterConfig(type="attentional_pool", pool_heads=5))
    with pytest.raises(ConfigError, match="cross_attention_every_n_layers = 3"):
        backend.build(MODEL, CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=3))
    with pytest.raises(ConfigError, match="every_n_layers = 3"):
        backend.transformer(MODEL, CrossAttentionConfig(cross_attention_every_n_layers=3))
    with pytest.raises(ConfigError, match="num_experts = 2"):
        backend.build(MODEL.replace(num_experts=2), ARCHS["moma"])


def test_the_transformer_inside(backend: Backend) -> None:
    vlm: Any = torch_vlm if backend.name == "torch" else jax_vlm
    model = backend.build(MODEL, ARCHS["mot"])
    assert vlm.inner_transformer(model) is vlm.inner_transformer(model.transformer) is model.transformer
    assert model.transformer.num_image_tokens == 12
    assert backend.build(MODEL, ARCHS["cross_attention"]).transformer.num_image_tokens == 0
    with pytest.raises(ValueError, match="holds no transformer"):
        vlm.inner_transformer(object())


def test_names_of_the_wrapper(backend: Backend) -> None:
    for arch, vlm in ARCHS.items():
        state = backend.state(backend.build(MODEL, vlm))
        tower = vit_tower(VISION)
        table = wrapper_table(MODEL, vlm, AdapterConfig(), tower, tower.dim)
        assert list(state) == list(table), arch
        assert all(state[name].shape == spec.shape for name, spec in table.items())


def test_seeded_weights_are_the_same_bits_in_both_backends() -> None:
    for vlm in ARCHS.values():
        one, two = (Backend(name).build(MODEL, vlm) for name in ("torch", "jax"))
        one.float().init_weights_and_freqs(seed=5)
        with jax.enable_x64(True):
            two.to(jnp.float32).init_weights_and_freqs(seed=5)
        first, second = Backend("torch").state(one), Backend("jax").state(two)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], err_msg=name)
        assert not np.array_equal(
            first["vision_encoder.layers.0.attention.q_proj.weight"],
            first["vision_encoder.layers.0.attention.k_proj.weight"],
        )


@pytest.fixture(autouse=True, scope="module")
def late_fusion() -> Iterator[type[VLMConfig]]:
    """An architecture that is not built in: one config class and one strategy per backend are all that it needs."""

    @section
    class LateFusion(VLMConfig, arch="late_fusion_of_tests"):
        arch: str = "late_fusion_of_tests"

    with temporary():
        for registry, vlm in ((torch_registry, torch_vlm), (jax_registry, jax_vlm)):
            registry.register("modality_strategy", LateFusion().arch)(vlm.JointDecoderStrategy)
        jax_registry.register("adapter", "test_adapter")(
            lambda config, in_dim, out_dim, *, rngs: JaxLinearAdapter(in_dim, out_dim, rngs=rngs)
        )
        yield LateFusion
    VLMConfig.forget(LateFusion().arch)


def test_an_architecture_is_added_by_registration(backend: Backend, late_fusion: type[VLMConfig]) -> None:
    late = backend.build(MODEL, late_fusion(max_text_len=8))
    joint = ARCHS["joint_decoder"]
    weights = weights_of(MODEL, joint)
    backend.load(late, weights)
    truth = backend.logits(built(backend, "joint_decoder"), CLIPS, TEXT, FRAMES)
    np.testing.assert_array_equal(backend.logits(late, CLIPS, TEXT, FRAMES), truth)
    assert JaxArchitecture(MODEL, joint) == JaxArchitecture(MODEL, joint)


def test_an_adapter_is_added_by_registration() -> None:
    model = Backend("jax").build(MODEL, ARCHS["mot"], adapter=AdapterConfig(type="test_adapter"))
    assert Backend("jax").logits(model, CLIPS, TEXT).shape == (3, 8, 37)


@pytest.mark.parametrize("kind", [TorchCrossAttentionBlock, JaxCrossAttentionBlock])
def test_a_row_without_an_image_gets_nothing_from_it(kind: Any) -> None:
    is_torch = kind is TorchCrossAttentionBlock
    rngs = {} if is_torch else {"rngs": nnx.Rngs(0)}
    attention = kind(20, 6, 3, 26, head_dim=4, **rngs).attn
    if is_torch:
        torch.nn.init.normal_(attention.o_proj.weight)
    else:
        attention.o_proj.weight.set_value(jnp.ones((20, 24)))
    wrap: Any = torch.from_numpy if is_torch else jnp.asarray
    x, image = (RNG.standard_normal((2, n, 20)).astype(np.float32) for n in (8, 5))
    out = attention(wrap(x), wrap(image), wrap(np.array([[False] * 5, [True] * 5])))
    out = out.detach().numpy() if is_torch else np.asarray(out)
    assert not out[0].any()
    assert out[1].any(axis=-1).all()


@st.composite
def vlm_jobs(draw: st.DrawFn) -> tuple[ModelConfig, VLMConfig, AdapterConfig, int]:
    """Any vision-language config of a small size."""
    model = MODEL.replace(
        norm_type=draw(st.sampled_from(["rmsnorm", "layernorm", "rmsnorm_1p"])),
        activation=draw(st.sampled_from(["silu", "gelu"])),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        num_experts=draw(st.sampled_from([0, 0, 3])),
    )
    arch = draw(st.sampled_from(sorted(ARCHS)))
    if arch == "moma":
        model = model.replace(num_experts=0)
    fields: dict[str, Any] = {"max_text_len": 8}
    if arch == "cross_attention":
        fields |= {"cross_attention_every_n_layers": draw(st.integers(1, 2))}
        fields |= {"cross_attention_n_heads": draw(st.sampled_from([0, 4]))}
    if arch == "mot":
        fields |= {"mot_image_n_kv_heads": draw(st.sampled_from([0, 1, 2]))}
        fields |= {"mot_modalities": draw(st.permutations(["image", "text"]).map(tuple))}
    if arch == "moma":
        fields |= {"moma_capacity_factor": draw(st.sampled_from([0.0, 0.3, 1.0]))}
    kind = draw(st.sampled_from(["mlp_2layer", "linear", "avgpool", "attentional_pool"]))
    window = draw(st.sampled_from([1, 2] if kind == "attentional_pool" else [1, 2, 3]))
    adapter = AdapterConfig(type=kind, pool_window=window, pool_heads=draw(st.sampled_from([1, 4])))
    return model, VLMConfig.for_arch(arch, **fields), adapter, draw(st.integers(1, 3))


@pytest.mark.parametrize("name", ["torch", "jax"])
@hypothesis.settings(max_examples=8)
@hypothesis.given(job=vlm_jobs())
def test_any_accepted_config_runs_and_depends_on_its_image(
    name: str, job: tuple[ModelConfig, VLMConfig, AdapterConfig, int]
) -> None:
    model, vlm, adapter, frames = job
    backend = Backend(name)
    wrapper = backend.build(model, vlm, adapter=adapter, frames=frames)
    backend.load(wrapper, weights_of(model, vlm, adapter))
    clips = CLIPS[:, :frames]
    logits = backend.logits(wrapper, clips, TEXT)
    assert logits.shape == (3, 8, 37)
    assert np.isfinite(logits).all()
    assert np.abs(backend.logits(wrapper, clips + 0.5, TEXT) - logits).max() > 1e-6
