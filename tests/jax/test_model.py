"""What is JAX's own in the model: jit, pytrees, scans, abstract models, export, values instead of mutation."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge_jax.model import Transformer, attention
from kempnerforge_jax.model.architecture import Architecture, Modules
from kempnerforge_jax.model.attention import Attention, KVCache, attend
from kempnerforge_jax.model.embedding import TokenEmbedding
from kempnerforge_jax.model.hooks import activation_names, capture
from kempnerforge_jax.model.init import init_weights
from kempnerforge_jax.model.mask import CAUSAL, FULL, Mask, dense_mask
from kempnerforge_jax.model.mlp import StandardMLP, build_mlp
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Numbered
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.model.position import precompute_rope_frequencies
from kempnerforge_jax.model.scan import layer_stacks
from kempnerforge_jax.model.stack import Stack, stack_layers, unstack_layers
from kempnerforge_jax.model.state import (
    from_numpy,
    get_state,
    merge,
    set_state,
    share,
    split,
    to_numpy,
)
from kempnerforge_jax.registry import registry
from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import EMBEDDING, HEAD, parameter_table
from shared_config.errors import UserError
from shared_config.registry import temporary
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig
from tests.oracle.weights import draw_weights

VOCAB, DIM, LAYERS = 31, 24, 2


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def config_of(**fields: Any) -> ModelConfig:
    heads = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "qk_norm": True}
    sizes = {"dim": DIM, "n_layers": LAYERS, "vocab_size": VOCAB, "ffn_hidden_dim": 40, "max_seq_len": 32}
    return ModelConfig(**{**heads, **sizes, **fields})


def build(config: ModelConfig, **options: Any) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0), **options)


def model_of(dtype: Any = jnp.float64, **fields: Any) -> Transformer:
    config = config_of(**fields)
    model = build(config).to(dtype)
    set_state(model, draw_weights(config, seed=1))
    return model


@functools.partial(jax.jit, static_argnums=0)
def jitted(graphdef: Any, params: Any, buffers: Any, tokens: Any, inputs: dict[str, Any]) -> Any:
    return merge(graphdef, params, buffers)(tokens, **inputs)


def forward(model: Transformer, tokens: Any = None, **inputs: Any) -> Any:
    """The model's call inside jit; models of one structure and inputs of one shape are compiled once."""
    return jitted(*split(model), tokens, inputs)


def tokens_of(batch: int = 2, length: int = 9, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)))


def caches_of(batch: int, length: int, dtype: Any = jnp.float64) -> list[KVCache]:
    return [KVCache(batch, length, 2, 8, dtype) for _ in range(LAYERS)]


def close(actual: Any, expected: Any, tolerance: float = 1e-13) -> bool:
    actual, expected = np.asarray(actual), np.asarray(expected)
    return bool(np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected))


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return set(left) == set(right) and all(np.array_equal(left[name], right[name]) for name in left)


# Crossing jit, scans, abstract models


def test_split_and_merge_cross_jit_as_flat_dicts() -> None:
    model, tokens = model_of(tie_embeddings=True), tokens_of()
    graphdef, params, buffers = split(model)
    assert set(params) == set(parameter_table(model.config))
    assert set(buffers) == {"rope.cos", "rope.sin"}
    assert close(jitted(graphdef, params, buffers, tokens, {}), model(tokens))
    assert same(get_state(merge(graphdef, params, buffers)), get_state(model))


def _squared(graphdef: Any, buffers: Any, tokens: Any, params: Any, **options: Any) -> jax.Array:
    return jnp.square(merge(graphdef, params, buffers).run(tokens, **options).logits).sum()


def test_scan_and_remat_are_the_same_function() -> None:
    graphdef, params, buffers = split(model_of(n_layers=3, sliding_window=4))
    loss = functools.partial(_squared, graphdef, buffers, tokens_of())
    plain = jax.jit(jax.grad(loss))(params)
    for options in ({"remat": True}, {"scan_layers": True, "remat": True}):
        other = jax.jit(jax.grad(functools.partial(loss, **options)))(params)
        assert all(close(other[name], plain[name]) for name in params), options


def test_stacked_model_scans_its_own_parameters() -> None:
    model, tokens = model_of(n_layers=3), tokens_of()
    graphdef, params, buffers = split(model, scan_layers=True)
    assert params["layers.0-2.attention.q_proj.weight"].shape == (3, 48, DIM)
    stacked = merge(graphdef, params, buffers)
    program = jax.make_jaxpr(lambda params: merge(graphdef, params, buffers).run(tokens).logits)(params)
    assert sum(equation.primitive.name == "scan" for equation in program.jaxpr.eqns) == 1
    assert close(forward(stacked, tokens), forward(model, tokens))
    assert same(unstack_layers(params), split(model)[1])
    assert same(stack_layers(get_state(model), layer_stacks(model)), params)
    set_state(stacked, {name: 2 * array for name, array in get_state(model).items()})
    assert same(get_state(stacked), {name: 2 * array for name, array in get_state(model).items()})
    with pytest.raises(ValueError, match="kv_caches are given"):
        stacked(tokens, kv_caches=[])
    with pytest.raises(ValueError, match="the layers are stacked"), capture(stacked):
        stacked(tokens)


def test_layers_are_stacked_by_structure() -> None:
    class Alternating(Architecture):
        def build_block(self, layer_idx: int, *, rngs: nnx.Rngs) -> Any:
            config = self.config.replace(ffn_hidden_dim=40 + 8 * (layer_idx % 2))
            return type(self).__bases__[0](config).build_block(layer_idx, rngs=rngs)

        def breaks_after(self, layer_idx: int) -> bool:
            return layer_idx == 0

    def grouped(kind: type[Architecture], n_layers: int) -> list[range]:
        config = config_of(n_layers=n_layers)
        model = build(config)
        model.architecture = kind(config)
        model.layers = Numbered({str(i): model.architecture.build_block(i, rngs=nnx.Rngs(0)) for i in range(n_layers)})
        return [stack.layers for stack in layer_stacks(model)]

    assert grouped(Architecture, 5) == [range(5)]
    assert grouped(Alternating, 7) == [range(1), range(1, 6, 2), range(2, 7, 2)]
    assert grouped(Alternating, 4) == [range(1), range(1, 2), range(2, 3), range(3, 4)]


@pytest.mark.parametrize(("name", "group"), [("3", range(3, 4)), ("0-31", range(32)), ("1-5:2", range(1, 6, 2))])
def test_names_of_stacks(name: str, group: range) -> None:
    assert Stack.named(name).layers == group
    assert Stack(group).name == name
    assert Stack.of(f"layers.{name}.norm.weight") == Stack(group)
    assert Stack(group).parameter(group[-1], f"layers.{name}.norm.weight") == f"layers.{group[-1]}.norm.weight"


def test_names_of_no_layer_are_unknown_and_left_alone() -> None:
    names = ("norm.weight", "layers.x.norm.weight", "layers.3", "layers.1-.weight", "mot_norms.0.weight")
    assert [Stack.of(name) for name in names] == [None] * len(names)
    model = model_of(n_layers=1)
    with pytest.raises(UserError, match=r"layers\.x\.norm\.weight"):
        set_state(model, get_state(model) | {"layers.x.norm.weight": np.ones(3)})


def test_layers_are_put_together_and_taken_apart_in_order() -> None:
    stack, trees = Stack(range(1, 6, 2)), [{"a": jnp.full(2, i), "b": jnp.full((), -i)} for i in range(3)]
    whole = stack.put(trees)
    assert {name: array.shape for name, array in whole.items()} == {"a": (3, 2), "b": (3,)}
    taken = stack.take(whole)
    assert list(taken) == [1, 3, 5]
    assert all(same(taken[layer], tree) for layer, tree in zip((1, 3, 5), trees, strict=True))
    assert {layer: shape.shape for layer, shape in stack.shapes(whole["a"]).items()} == dict.fromkeys((1, 3, 5), (2,))


@pytest.mark.parametrize("scan", [False, True])
def test_abstract_model_is_exported_without_arrays(scan: bool) -> None:
    config = config_of(dim=8192, n_heads=64, n_kv_heads=8, head_dim=128, vocab_size=128256, ffn_hidden_dim=28672)
    model = nnx.eval_shape(lambda: build(config)).to(jnp.bfloat16)
    graphdef, params, buffers = split(model, scan_layers=scan)
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in (*params.values(), *buffers.values()))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    exported = jax.export.export(jax.jit(lambda p, b, t: merge(graphdef, p, b).run(t).logits))(params, buffers, tokens)
    assert exported.out_avals[0].shape == (1, 16, 128256)
    assert exported.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_abstract_model_is_initialised_throughout(tied: bool) -> None:
    config = config_of(tie_embeddings=tied, attention_bias=True)
    model = nnx.eval_shape(lambda: build(config))
    model.init_weights_and_freqs(seed=5)
    whole = build(config)
    init_weights(whole, config, seed=5)
    assert same(get_state(model), get_state(whole))
    assert np.array_equal(forward(model, tokens_of()), forward(whole, tokens_of()))


def test_construction_crosses_jit() -> None:
    built = jax.jit(lambda key: split(Transformer(config_of(), rngs=nnx.Rngs(key)))[1])(jax.random.key(0))
    assert np.std(built[EMBEDDING]) == pytest.approx(0.02, rel=0.1)


def test_modality_context_crosses_jit_and_is_checked_inside() -> None:
    context = ModalityContext(inputs_embeds=jnp.ones((1, 2, 3)), output_slice=slice(1, None))
    double = jax.jit(lambda context: jax.tree.map(lambda array: 2 * array, context))(context)
    assert double.output_slice == slice(1, None)
    assert np.array_equal(double.inputs_embeds, 2 * np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="modality_ids is given"):
        jax.jit(lambda ids: ModalityContext(modality_ids=ids).modality_ids)(jnp.ones(1))


# Dtypes, ties, copies


def test_rotary_tables_keep_their_precision() -> None:
    model = model_of().to(jnp.bfloat16)
    assert model.rope.cos.get_value().dtype == jnp.float64
    assert np.array_equal(model.rope.sin.get_value(), precompute_rope_frequencies(8, 32)[1])
    assert forward(model, tokens_of()).dtype == jnp.bfloat16
    assert not [name for name in get_state(model) if "rope" in name]


def test_copies_after_a_forward() -> None:
    model, tokens = model_of(tie_embeddings=True), tokens_of()
    expected = model(tokens)
    assert np.array_equal(copy.deepcopy(model)(tokens), expected)
    assert np.array_equal(nnx.clone(model)(tokens), expected)


def test_tied_head_is_one_parameter_with_both_gradients() -> None:
    model, untied, tokens = model_of(tie_embeddings=True), model_of(), tokens_of()
    set_state(untied, {**get_state(model), HEAD: get_state(model)[EMBEDDING]})
    gradients = []
    for each in (model, untied):
        graphdef, params, buffers = split(each)
        loss = functools.partial(_squared, graphdef, buffers, tokens)
        gradients.append(jax.jit(jax.grad(loss))(params))
    assert HEAD not in gradients[0]
    assert close(gradients[0][EMBEDDING], gradients[1][EMBEDDING] + gradients[1][HEAD])


def test_bfloat16_products_stay_bfloat16_in_the_backward_pass() -> None:
    linear = build_mlp(DIM, 40, rngs=nnx.Rngs(0)).to(jnp.bfloat16)
    x = jnp.ones((2, DIM), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda x: linear(x).astype(jnp.float32).sum()))(x)
    products = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= 5
    assert all(variable.aval.dtype == jnp.bfloat16 for product in products for variable in product.invars)


def test_linear_refuses_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"x.dtype = bfloat16: must be the dtype of the weight, float32"):
        build_mlp(4, 8, rngs=nnx.Rngs(0))(jnp.ones((1, 4), jnp.bfloat16))


# Initial weights and state


def test_seeded_weights_are_the_contract() -> None:
    config = config_of(attention_bias=True)
    model = build(config)
    init_weights(model, config, seed=5)
    state = get_state(model)
    assert list(state) == list(Transformer(config, rngs=nnx.Rngs(1)) and get_state(build(config)))
    for name, value in initial_values(parameter_table(config), 5):
        assert np.array_equal(to_numpy(state[name]), value), name


def test_unseeded_weights_have_the_distribution_of_the_table() -> None:
    config = config_of(dim=64, vocab_size=512, ffn_hidden_dim=128)
    state, other = get_state(build(config)), get_state(Transformer(config, rngs=nnx.Rngs(1)))
    assert np.std(state[EMBEDDING]) == pytest.approx(0.02, rel=0.05)
    assert np.std(state["layers.0.mlp.down_proj.weight"]) == pytest.approx(0.01, rel=0.05)
    assert np.array_equal(state["norm.weight"], np.ones(64))
    assert not np.array_equal(state[EMBEDDING], other[EMBEDDING])
    assert not np.array_equal(state["layers.0.mlp.up_proj.weight"], state["layers.1.mlp.up_proj.weight"])


def test_init_refuses_a_model_of_another_config() -> None:
    with pytest.raises(ValueError, match=r"token_embedding.embedding.weight.shape = \(31, 24\): must be \(8, 24\)"):
        init_weights(build(config_of()), config_of(vocab_size=8))


def test_set_state_reports_every_problem_and_changes_nothing() -> None:
    model = model_of()
    before = get_state(model)
    state: dict[str, Any] = {name: np.zeros(array.shape) for name, array in before.items()}
    del state["norm.weight"]
    state["layers.9.extra"] = np.zeros(1)
    state[HEAD] = np.zeros((3, 4))
    with pytest.raises(UserError) as error:
        set_state(model, state)
    for part in ("norm.weight: missing", "layers.9.extra: unknown", f"{HEAD}.shape = (3, 4): must be (31, 24)"):
        assert part in str(error.value)
    assert same(get_state(model), before)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32, jnp.bool_])
def test_numpy_round_trip_keeps_every_bit(dtype: Any) -> None:
    array = jnp.linspace(-3, 3, 12).reshape(3, 4).T.astype(dtype)
    back = from_numpy(to_numpy(array))
    assert back.dtype == array.dtype
    assert np.asarray(back).tobytes() == np.asarray(array).tobytes()
    assert to_numpy(jnp.ones(2, jnp.bfloat16)).dtype == ml_dtypes.bfloat16


def test_numpy_values_are_not_narrowed_silently() -> None:
    with jax.enable_x64(False):
        assert from_numpy(np.arange(3)).dtype == jnp.int32
        assert from_numpy(np.ones(3), jnp.float32).dtype == jnp.float32
        with pytest.raises(ValueError, match="JAX holds float32 unless"):
            from_numpy(np.ones(3))
        with pytest.raises(ValueError, match="must fit int32"):
            from_numpy(np.array([2**40]))
        for edge, beyond in ((2**31 - 1, 2**31), (-(2**31), -(2**31) - 1)):
            assert from_numpy(np.array([edge])).tolist() == [edge]
            with pytest.raises(ValueError, match="must fit int32"):
                from_numpy(np.array([0, beyond]))


def test_nothing_is_remembered_of_a_trace() -> None:
    norm = build_norm("rmsnorm", 4, rngs=nnx.Rngs(0))
    norm.keep(inner=jnp.ones(1), outer=2)
    jax.jit(lambda x: norm.keep(inner=x, outer=3))(jnp.zeros(1))
    assert (norm.kept("inner"), norm.kept("outer")) == (1, 2)


def test_share_is_the_same_memory() -> None:
    array = jnp.arange(64.0)
    assert share({"x": array})["x"].unsafe_buffer_pointer() == array.unsafe_buffer_pointer()


# Activations


def test_capture_inside_jit_lets_gradients_through() -> None:
    model, tokens = model_of(), tokens_of()
    graphdef, params, buffers = split(model)

    def run(params: Any, names: list[str] | None) -> Any:
        inner = merge(graphdef, params, buffers)
        with capture(inner, names) as activations:
            inner.run(tokens, scan_layers=True, remat=True)
        return activations

    with capture(model) as expected:
        model(tokens)
    assert list(expected)[:2] == ["token_embedding.embedding", "token_embedding"]
    traced = jax.jit(lambda params: run(params, None))(params)
    assert set(traced) == set(expected) == set(activation_names(model))
    assert all(close(traced[name], expected[name]) for name in expected if name != "rope")
    assert expected["layers.0.attention.q_norm"].shape == (2, 9, 6, 8)
    gradient = jax.jit(jax.grad(lambda params: run(params, ["layers.0"])["layers.0"].sum()))(params)
    assert np.abs(gradient["layers.0.mlp.up_proj.weight"]).sum() > 0
    assert not gradient["layers.1.mlp.up_proj.weight"].any()


def test_capture_of_an_unknown_name_lists_what_exists() -> None:
    message = r"name = 'layers.0.atention': .* did you mean 'layers.0.attention'.*output_head"
    with pytest.raises(ValueError, match=message), capture(model_of(), ["layers.0.atention"]):
        pass


# Attention, masks and caches


@dataclass(frozen=True)
class Call:
    """One sequence with everything that masks can depend on, and how it is cut into chunks."""

    chunks: list[int]
    seed: int
    window: int | None
    documents: int
    real_share: float


calls = st.builds(
    Call,
    chunks=st.permutations([1, 3, 5]),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([None, 3]),
    documents=st.integers(1, 3),
    real_share=st.sampled_from([1.0, 0.7, 0.2]),
)


@given(call=calls)
def test_any_chunking_through_a_cache_is_the_full_forward(call: Call) -> None:
    with jax.enable_x64(True):
        rng, length = np.random.default_rng(call.seed), sum(call.chunks)
        model = model_of(sliding_window=call.window)
        embedded, real = rng.normal(size=(3, length, DIM)), rng.random((3, length)) < call.real_share
        documents = rng.integers(0, call.documents, (3, length)).cumsum(1)

        def run(part: slice, caches: list[KVCache] | None) -> Any:
            modality = ModalityContext(
                inputs_embeds=jnp.asarray(embedded[:, part]), key_padding_mask=jnp.asarray(real[:, part])
            )
            return forward(model, modality=modality, kv_caches=caches, doc_ids=jnp.asarray(documents[:, part]))

        full = run(slice(length), None)
        caches, parts, begin = caches_of(3, 12), [], 0
        for chunk in call.chunks:
            logits, caches = run(slice(begin, begin + chunk), caches)
            parts.append(logits)
            begin += chunk
        assert close(np.concatenate(parts, axis=1), full)
        assert caches[0].seq_len == length


def test_ragged_prompts_decode_as_each_row_alone() -> None:
    model, lengths = model_of(sliding_window=4), [6, 2, 5]
    prompts, continued = tokens_of(3, 6), tokens_of(3, 4, seed=1)
    real = jnp.arange(6) < jnp.asarray(lengths)[:, None]
    assert model.token_embedding is not None
    padded = ModalityContext(inputs_embeds=model.token_embedding(prompts), key_padding_mask=real)
    prefill, caches = forward(model, modality=padded, kv_caches=caches_of(3, 10))
    caches, decoded = [cache.truncate(jnp.asarray(lengths)) for cache in caches], []
    for step in range(4):
        logits, caches = forward(model, continued[:, step : step + 1], kv_caches=caches)
        decoded.append(logits[:, 0])
    assert caches[0].lengths.tolist() == [10, 6, 9]
    for row, length in enumerate(lengths):
        alone = forward(model, jnp.concatenate([prompts[row, :length], continued[row]])[None])[0]
        assert close(prefill[row, :length], alone[:length])
        assert close(jnp.stack(decoded, axis=1)[row], alone[length:])


def test_past_the_end_of_a_cache() -> None:
    model, tokens = model_of(), tokens_of(2, 6)
    _, caches = forward(model, tokens, kv_caches=caches_of(2, 8))
    caches = [cache.truncate(jnp.array([6, 5])) for cache in caches]
    with pytest.raises(ValueError, match="tokens = 3: must fit in the cache, of whose max_seq_len = 8 slots 6 are"):
        model(tokens[:, :3], kv_caches=caches)
    logits, after = forward(model, tokens[:, :3], kv_caches=caches)
    assert np.isnan(logits).all(axis=-1).tolist() == [[False, False, True], [False, False, False]]
    expected, _ = forward(model, tokens[:, :2], kv_caches=caches)
    assert close(logits[:, :2], expected)
    assert np.array_equal(after[0].k[0, :, :6], caches[0].k[0, :, :6])


def test_caches_are_values() -> None:
    cache, new = KVCache(2, 8, 2, 4), jnp.ones((2, 2, 3, 4))
    updated, keys, values = cache.update(new, -new, doc_ids=jnp.zeros((2, 3), jnp.int32))
    assert cache.seq_len == 0
    assert not cache.k.any()
    assert updated.seq_len == 3
    assert np.array_equal(keys[:, :, :3], new)
    assert np.array_equal(values[:, :, :3], -new)
    with pytest.raises(ValueError, match="doc_ids = None"):
        updated.update(new, new)
    leaves = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(updated)]
    assert leaves == [".k", ".v", ".state.lengths", ".state.doc_ids"]


def test_mask_drawing() -> None:
    mask = Mask(causal=True, window=3)
    assert dense_mask(mask, 3, 5).astype(int).tolist() == [[[[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]
    documents = jnp.array([[0, 0, 1, 1, 1]])
    mask = Mask(causal=True, query_doc_ids=documents[:, 2:], key_doc_ids=documents)
    assert dense_mask(mask, 3, 5).astype(int).tolist() == [[[[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]]


def test_a_query_without_keys_gives_zero_and_no_gradient() -> None:
    attention = Attention(DIM, 6, 2, 8, rngs=nnx.Rngs(0)).to(jnp.float64)
    cos, sin = precompute_rope_frequencies(8, 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, DIM)))
    real = jnp.array([[False, False, True, True, True], [False] * 5])
    out = attention(x, cos, sin, key_padding_mask=real)
    assert not out[0, :2].any()
    assert not out[1].any()
    assert np.abs(out[0, 2:]).min() > 0
    gradient = jax.grad(lambda x: jnp.square(attention(x, cos, sin, key_padding_mask=real)).sum())(x)
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()


def test_attention_repeats_no_keys() -> None:
    q, k = jnp.ones((1, 6, 4, 8), jnp.bfloat16), jnp.ones((1, 2, 4, 8), jnp.bfloat16)
    program = str(jax.make_jaxpr(attend)(q, k, k))
    assert "bf16[1,6,4,8]" in program
    assert "f32[1,2,3,4,4]" in program
    assert attend(q, k, k).dtype == jnp.bfloat16
    assert attend(q.astype(jnp.float32), k, k).dtype == jnp.float32  # of a narrow cache


def test_attention_weights_are_captured_on_the_host() -> None:
    model = model_of(sliding_window=3)
    attention = model.layers["1"].attention
    attention.capture_attention_weights = True
    assert attention.last_attention_weights is None
    forward(model, tokens_of())
    assert attention.last_attention_weights is None
    model(tokens_of())
    weights = attention.last_attention_weights
    assert isinstance(weights, np.ndarray)
    assert weights.shape == (2, 6, 9, 9)
    np.testing.assert_allclose(weights.sum(-1), 1)
    assert not weights[..., 8, :6].any()


# Inputs


def test_ids_outside_the_vocabulary() -> None:
    embedding = TokenEmbedding(5, 3, rngs=nnx.Rngs(0))
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"tokens = {bad}: ids must be in \[0, 5\)"):
            embedding(jnp.array([[1, bad]]))
        rows = jax.jit(lambda tokens: embedding(tokens))(jnp.array([[1, bad]]))
        assert np.isnan(rows).all(axis=-1).tolist() == [[False, True]]


def test_inputs_that_make_no_sense_are_refused() -> None:
    model, tokens, embedded = model_of(jnp.float32), tokens_of(), jnp.zeros((2, 9, DIM), jnp.float32)
    real = jnp.ones((2, 9), jnp.int32)
    caches = caches_of(2, 16, jnp.float32)
    sliced = ModalityContext(output_slice=slice(1))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("neither is", {}),
        ("both are", {"tokens": tokens, "modality": ModalityContext(inputs_embeds=embedded)}),
        ("sequence length = 33: must be at most max_seq_len = 32", {"tokens": tokens_of(length=33)}),
        ("image_features is given", {"tokens": tokens, "modality": ModalityContext(image_features=embedded)}),
        ("not allowed together", {"tokens": tokens, "modality": sliced, "kv_caches": caches}),
        ("kv_caches = 1 caches", {"tokens": tokens, "kv_caches": caches[:1]}),
        ("max_seq_len = 33", {"tokens": tokens, "kv_caches": caches_of(2, 33)}),
        ("doc_ids.shape", {"tokens": tokens, "doc_ids": jnp.zeros((2, 8), jnp.int32)}),
        ("key_padding_mask.dtype", {"modality": ModalityContext(inputs_embeds=embedded, key_padding_mask=real)}),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("inputs_embeds", "prefix_embeds"), "inputs_embeds and prefix_embeds"),
        (("prefix_embeds", "image_features"), "prefix_embeds and image_features"),
        (("image_mask",), "image_features = None"),
        (("modality_ids",), "modality_ids is given"),
        (("modality_ids", "image_features"), "modality_ids is given"),
    ],
)
def test_modality_context_refuses_what_has_no_meaning(fields: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalityContext(**dict.fromkeys(fields, jnp.zeros(1)))  # type: ignore[arg-type]


def test_prefix_and_slice() -> None:
    model, tokens = model_of(), tokens_of()
    prefix = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, DIM)))
    assert model.token_embedding is not None
    embedded = jnp.concatenate([prefix, model.token_embedding(tokens)], axis=1)
    whole = forward(model, modality=ModalityContext(inputs_embeds=embedded))
    part = forward(model, tokens, modality=ModalityContext(prefix_embeds=prefix, output_slice=slice(4, None)))
    assert close(part, whole[:, 4:])


def test_pipeline_stages_make_the_model() -> None:
    model, tokens = model_of(), tokens_of()
    first, last = nnx.clone(model), nnx.clone(model)
    first.norm = first.output_head = last.token_embedding = None
    del first.layers["1"], last.layers["0"]
    assert close(forward(last, forward(first, tokens)), forward(model, tokens))
    init_weights(last, last.config, seed=5)
    init_weights(model, model.config, seed=5)
    assert all(np.array_equal(array, get_state(model)[name]) for name, array in get_state(last).items())


# Extension


def test_dense_getters() -> None:
    model = model_of()
    assert model.run(tokens_of()).stats == {}
    assert model.get_moe_aux_loss() == 0
    assert model.get_moe_router_z_loss() == 0
    assert model.get_expert_counts() == {}
    assert model.get_moma_expert_counts() == {}


def test_values_of_the_last_call_are_kept_outside_the_module() -> None:
    model = model_of()
    model.keep(example=jnp.ones(2))
    assert np.array_equal(model.kept("example"), np.ones(2))
    jax.jit(lambda x: model.keep(example=x))(jnp.zeros(2))
    assert np.array_equal(model.kept("example"), np.ones(2))
    assert split(model)[0] == split(nnx.clone(model))[0]


def test_builders_are_looked_up_by_name() -> None:
    with temporary():

        @registry.register("mlp", "test_relu")
        def relu_mlp(dim: int, hidden_dim: int, *, rngs: nnx.Rngs) -> StandardMLP:
            return StandardMLP(dim, hidden_dim, "relu", rngs=rngs)

        assert isinstance(build_mlp(4, 8, "test_relu", rngs=nnx.Rngs(0)), StandardMLP)
    with pytest.raises(KeyError, match="Unknown norm: 'batchnorm'; available: layernorm, rmsnorm"):
        build_norm("batchnorm", 4, rngs=nnx.Rngs(0))
    with pytest.raises(KeyError, match="Unknown mlp"):
        build_mlp(4, 8, "swish", rngs=nnx.Rngs(0))


def test_an_architecture_changes_what_happens_between_layers() -> None:
    class Doubling(Architecture):
        def breaks_after(self, layer_idx: int) -> bool:
            return layer_idx == LAYERS - 1

        def after_block(self, modules: Modules, layer_idx: int, x: jax.Array, modality: ModalityContext) -> jax.Array:
            return 2 * x if self.breaks_after(layer_idx) else x

        def final_norm(self, modules: Modules, x: jax.Array, modality: ModalityContext) -> jax.Array:
            return x

    class DoublingConfig(VLMConfig):
        pass

    model = model_of()
    with temporary():
        registry.register("architecture", "test_doubling")(Doubling)
        doubled = build(model.config, vlm_config=DoublingConfig(arch="test_doubling")).to(jnp.float64)
    set_state(doubled, get_state(model))
    model.norm = None
    for scan in (False, True):
        run = jax.jit(functools.partial(doubled.run, scan_layers=scan))
        assert close(run(tokens_of()).logits, 2 * forward(model, tokens_of()))


# The GPU


@pytest.mark.parametrize("mask", [CAUSAL, FULL])
def test_the_kernel_of_a_gpu_is_the_same_attention(mask: Mask) -> None:
    """In bfloat16 its errors, forward and backward, are no larger than those of the products that it replaces."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    shapes = ((2, 4, 96, 64), (2, 2, 96, 64), (2, 2, 96, 64), (2, 4, 96, 64))
    arrays = [jax.random.normal(jax.random.key(i), shape, jnp.float64) for i, shape in enumerate(shapes)]
    arrays = [array.astype(jnp.bfloat16).astype(jnp.float64) for array in arrays]

    def differentiated(function: Any, dtype: Any) -> list[np.ndarray]:
        *inputs, cotangent = (array.astype(dtype) for array in arrays)
        out, backward = jax.vjp(jax.jit(functools.partial(function, mask=mask)), *inputs)
        return [np.asarray(value.astype(jnp.float64)) for value in (out, *backward(cotangent))]

    narrow = [array.astype(jnp.bfloat16) for array in arrays[:3]]
    assert "cudnn" in jax.jit(functools.partial(attend, mask=mask)).lower(*narrow).as_text()
    truth = differentiated(attention._attention, jnp.float64)
    fused, plain = (differentiated(function, jnp.bfloat16) for function in (attend, attention._attention))
    for exact, found, replaced in zip(truth, fused, plain, strict=True):
        assert np.linalg.norm(found - exact) <= 2 * np.linalg.norm(replaced - exact)


def test_the_kernel_of_gpus_is_given_queries_keys_and_values_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (jnp.asarray(part) for part in np.random.default_rng(0).standard_normal((3, 1, 2, 4, 8)))
    expected = attention.attend(q, k, v)
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, _: Any, scale: float | None) -> jax.Array:
        return attention._attention(q, k, v, mask, scale=scale, softcap=None)

    monkeypatch.setattr(attention, "fused_attention", plain)
    monkeypatch.setattr(attention.lax, "platform_dependent", lambda *given, cuda, default: cuda(*given))
    np.testing.assert_array_equal(attention.attend(q, k, v), expected)
