"""What is torch's own in the model: compilation, devices, copies, ties, caches that are written in place, hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kempnerforge_torch.model import Transformer
from kempnerforge_torch.model.architecture import Architecture, Modules
from kempnerforge_torch.model.attention import SDPA_BACKENDS, Attention, KVCache, attend
from kempnerforge_torch.model.embedding import TokenEmbedding
from kempnerforge_torch.model.hooks import activation_names, capture
from kempnerforge_torch.model.init import init_weights
from kempnerforge_torch.model.mask import Mask, dense_mask
from kempnerforge_torch.model.mlp import StandardMLP, build_mlp
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.position import RotaryTables, precompute_rope_frequencies
from kempnerforge_torch.model.state import from_numpy, get_state, set_state, share, to_numpy
from kempnerforge_torch.registry import registry
from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import EMBEDDING, HEAD, parameter_table
from shared_config.errors import UserError
from shared_config.registry import temporary
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig
from tests.oracle.weights import draw_weights

VOCAB, DIM, LAYERS = 31, 24, 2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def config_of(**fields: Any) -> ModelConfig:
    heads = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "qk_norm": True}
    sizes = {"dim": DIM, "n_layers": LAYERS, "vocab_size": VOCAB, "ffn_hidden_dim": 40, "max_seq_len": 32}
    return ModelConfig(**{**heads, **sizes, **fields})


def model_of(dtype: torch.dtype = torch.float64, **fields: Any) -> Transformer:
    config = config_of(**fields)
    model = Transformer(config).to(dtype)
    set_state(model, draw_weights(config, seed=1))
    return model


def tokens_of(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)))


def caches_of(batch: int, length: int, dtype: torch.dtype = torch.float64, **options: Any) -> list[KVCache]:
    return [KVCache(batch, length, 2, 8, dtype, **options) for _ in range(LAYERS)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-13) -> bool:
    return bool((actual - expected).norm() <= tolerance * expected.norm())


# Compilation

compiles = pytest.mark.filterwarnings(  # torch's own, while it compiles
    "ignore:.*script_method:DeprecationWarning"
)


@compiles
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 3, "tie_embeddings": True}, {"sdpa_backend": "flash"}])
def test_compiles_without_graph_breaks(fields: dict[str, Any]) -> None:
    model, tokens = model_of(torch.float32, **fields), tokens_of()
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(tokens, doc_ids=documents), model(tokens, doc_ids=documents))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(tokens_of(seed=1), doc_ids=documents)


@compiles
def test_compiles_block_by_block_with_gradients() -> None:
    model, tokens = model_of(), tokens_of()
    twin = copy.deepcopy(model)
    for block in twin.layers.values():
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    for each in (model, twin):
        each(tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert close(twin.get_parameter(name).grad, parameter.grad), name  # type: ignore[arg-type]


@compiles
def test_one_compiled_step_decodes_every_position() -> None:
    model, tokens = model_of(torch.float32), tokens_of(length=7)
    caches = caches_of(2, 7, torch.float32, static=True)

    @torch.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    def step(token: Tensor) -> Tensor:
        return model(token, kv_caches=caches)

    with torch.no_grad():
        full = model(tokens)
        logits = [step(tokens[:, :1])]
        with torch._dynamo.config.patch(error_on_recompile=True):
            logits += [step(tokens[:, place : place + 1]) for place in range(1, 7)]
            torch.testing.assert_close(torch.cat(logits, dim=1), full)
            with pytest.raises(IndexError, match="out of bounds"):
                step(tokens[:, :1])


def test_a_compiled_block_takes_sequences_of_any_length() -> None:
    """Its program for a second length has the length as a symbol."""
    block: Any = model_of(torch.float32).layers["0"]
    tables = [torch.randn(32, block.attention.head_dim // 2) for _ in range(2)]
    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (4, 7, 20, 1):
            x, rope = torch.randn(2, length, block.attention.o_proj.out_features), [table[:length] for table in tables]
            torch.testing.assert_close(compiled(x, *rope)[0], block(x, *rope)[0])


@compiles
def test_compiled_embedding_refuses_ids_outside_the_vocabulary() -> None:
    embedding = torch.compile(TokenEmbedding(5, 3), fullgraph=True, dynamic=False)
    for bad in (-1, 5):
        with pytest.raises(RuntimeError, match="out of bounds"):
            embedding(torch.tensor([[1, bad]]))


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_row_that_is_looked_up_often_is_summed_in_float32(compiled: bool) -> None:
    """In bfloat16 256 + 1 is 256."""
    embedding = TokenEmbedding(3, 2).bfloat16()
    look_up = torch.compile(embedding, fullgraph=True, dynamic=False) if compiled else embedding
    look_up(torch.full((1, 4163), 2)).float().sum().backward()
    assert embedding.embedding.weight.grad is not None
    assert embedding.embedding.weight.grad.tolist() == [[0, 0], [0, 0], [4160, 4160]]


# Devices, dtypes, copies, ties


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_meta_device_model_is_initialised_throughout(tied: bool, norm_type: str) -> None:
    config = config_of(tie_embeddings=tied, norm_type=norm_type, attention_bias=True)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data.fill_(torch.nan)
    model.init_weights_and_freqs()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert model.output_head is not None
    assert model.token_embedding is not None
    assert (model.output_head.proj.weight is model.token_embedding.embedding.weight) == tied
    for table, expected in zip((model.rope.cos, model.rope.sin), precompute_rope_frequencies(8, 32), strict=True):
        assert torch.equal(table, expected)


def test_to_empty_on_the_same_device_keeps_the_rotary_tables() -> None:
    tables = RotaryTables(8, 16)
    tables.to_empty(device="cpu")
    assert torch.equal(tables.cos, precompute_rope_frequencies(8, 16)[0])


def test_rotary_tables_keep_their_precision() -> None:
    model = model_of().to(torch.bfloat16)
    assert model.rope.cos.dtype == torch.float64
    assert torch.equal(model.rope.sin, precompute_rope_frequencies(8, 32)[1])
    assert model(tokens_of()).dtype == torch.bfloat16
    assert not [name for name in get_state(model) if "rope" in name]


def test_copies_after_a_forward() -> None:
    model, tokens = model_of(tie_embeddings=True), tokens_of()
    expected = model(tokens)
    twins: tuple[Any, ...] = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(tokens), expected)
        assert twin.output_head.proj.weight is twin.token_embedding.embedding.weight


def test_tied_head_is_one_parameter_with_both_gradients() -> None:
    model, untied, tokens = model_of(tie_embeddings=True), model_of(), tokens_of()
    set_state(untied, {**get_state(model), HEAD: get_state(model)[EMBEDDING]})
    assert set(get_state(model)) == set(parameter_table(model.config))
    for each in (model, untied):
        each(tokens).square().sum().backward()
    both = untied.get_parameter(EMBEDDING).grad + untied.get_parameter(HEAD).grad  # type: ignore[operator]
    assert close(model.get_parameter(EMBEDDING).grad, both)  # type: ignore[arg-type]


# Initial weights and state


@pytest.mark.parametrize("tied", [False, True])
def test_seeded_weights_are_the_contract(tied: bool) -> None:
    config = config_of(tie_embeddings=tied, attention_bias=True)
    model = Transformer(config)
    init_weights(model, config, seed=5)
    state, table = get_state(model), parameter_table(config)
    assert set(state) == set(table)
    for name, value in initial_values(table, 5):
        assert np.array_equal(to_numpy(state[name]), value), name


def test_unseeded_weights_have_the_distribution_of_the_table() -> None:
    model = Transformer(config_of(dim=64, vocab_size=512, ffn_hidden_dim=128))
    assert model.get_parameter(EMBEDDING).std().item() == pytest.approx(0.02, rel=0.05)
    assert model.get_parameter("layers.0.mlp.down_proj.weight").std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(model.get_parameter("norm.weight"), torch.ones(64))


def test_init_refuses_a_model_of_another_config() -> None:
    with pytest.raises(ValueError, match=r"token_embedding.embedding.weight.shape = \(31, 24\): must be \(8, 24\)"):
        init_weights(Transformer(config_of()), config_of(vocab_size=8))


def test_set_state_reports_every_problem_and_changes_nothing() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in get_state(model).items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["norm.weight"]
    state["layers.9.extra"] = torch.zeros(1)
    state[HEAD] = torch.zeros(3, 4)
    with pytest.raises(UserError) as error:
        set_state(model, state)
    for part in ("norm.weight: missing", "layers.9.extra: unknown", f"{HEAD}.shape = (3, 4): must be (31, 24)"):
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_state(model).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_numpy_round_trip_keeps_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 3, 12).reshape(3, 4).T.to(dtype)
    array = to_numpy(tensor)
    assert array.shape == (4, 3)
    assert torch.equal(from_numpy(array).view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert from_numpy(np.array(1.5), torch.bfloat16).shape == ()


def test_share_is_the_same_memory() -> None:
    array = np.arange(6.0)
    shared = share({"x": array})["x"]
    array[0] = 9.0
    assert shared[0] == 9.0


# Activations


def test_capture_lets_gradients_through() -> None:
    model = model_of()
    with capture(model, ["layers.0.attention", "layers.1"]) as activations:
        logits = model(tokens_of())
    assert list(activations) == ["layers.0.attention", "layers.1"]
    (gradient,) = torch.autograd.grad(logits.sum(), activations["layers.0.attention"])
    assert gradient.shape == (2, 9, DIM)
    assert gradient.abs().sum() > 0


def test_capture_names_and_detaches() -> None:
    model = model_of()
    with capture(model, detach=True) as activations:
        model(tokens_of())
    assert set(activations) == set(activation_names(model))
    assert not any(tensor.requires_grad for tensor in activations.values())
    assert activations["layers.0.attention.q_norm"].shape == (2, 9, 6, 8)
    assert not any(module._forward_hooks for module in model.modules())


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
    documents: bool
    padding: bool
    static: bool


calls = st.builds(
    Call,
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([None, 1, 3, 30]),
    documents=st.booleans(),
    padding=st.booleans(),
    static=st.booleans(),
)


@given(call=calls)
def test_any_chunking_through_a_cache_is_the_full_forward(call: Call) -> None:
    rng, length = np.random.default_rng(call.seed), sum(call.chunks)
    model = model_of(sliding_window=call.window)
    embedded = torch.from_numpy(rng.normal(size=(3, length, DIM)))
    documents = torch.from_numpy(rng.integers(0, 2, (3, length)).cumsum(1)) if call.documents else None
    real = torch.from_numpy(rng.random((3, length)) < 0.7) if call.padding else None
    full = model(modality=ModalityContext(inputs_embeds=embedded, key_padding_mask=real), doc_ids=documents)
    caches, parts, begin = caches_of(3, length, static=call.static), [], 0
    with torch.no_grad():
        for chunk in call.chunks:
            part = slice(begin, begin + chunk)
            modality = ModalityContext(
                inputs_embeds=embedded[:, part], key_padding_mask=None if real is None else real[:, part]
            )
            ids = None if documents is None else documents[:, part]
            parts.append(model(modality=modality, kv_caches=caches, doc_ids=ids))
            begin += chunk
    assert close(torch.cat(parts, dim=1), full)
    assert caches[0].seq_len == length
    with pytest.raises((ValueError, IndexError)), torch.no_grad():
        model(tokens_of(3, 1), kv_caches=caches, doc_ids=None if documents is None else documents[:, :1])


@pytest.mark.parametrize("static", [False, True])
def test_ragged_prompts_decode_as_each_row_alone(static: bool) -> None:
    model, lengths = model_of(sliding_window=4), [6, 2, 5]
    prompts, continued = tokens_of(3, 6), tokens_of(3, 4, seed=1)
    real = torch.arange(6) < torch.tensor(lengths)[:, None]
    caches = caches_of(3, 10, static=static)
    assert model.token_embedding is not None
    with torch.no_grad():
        padded = ModalityContext(inputs_embeds=model.token_embedding(prompts), key_padding_mask=real)
        prefill = model(modality=padded, kv_caches=caches)
        for cache in caches:
            cache.truncate(torch.tensor(lengths))
        decoded = torch.cat([model(continued[:, i : i + 1], kv_caches=caches) for i in range(4)], dim=1)
        for row, length in enumerate(lengths):
            alone = model(torch.cat([prompts[row, :length], continued[row]])[None])[0]
            assert close(prefill[row, :length], alone[:length])
            assert close(decoded[row], alone[length:])
    assert caches[0].lengths.tolist() == [10, 6, 9]


def test_cut_makes_room_again() -> None:
    cache = KVCache(2, 6, 2, 8)
    new = torch.ones(2, 2, 5, 8)
    cache.update(new, new)
    with pytest.raises(ValueError, match="tokens = 2: must fit in the cache, of whose max_seq_len = 6 slots 5 are"):
        cache.update(new[:, :, :2], new[:, :, :2])
    cache.truncate(torch.tensor([1, 3]))
    keys, _ = cache.update(new[:, :, :3], new[:, :, :3])
    assert keys.shape == (2, 2, 6, 8)
    assert cache.seq_len == 6


def test_cache_returns_what_was_seen_and_remembers_documents() -> None:
    cache, new = KVCache(2, 8, 2, 4), torch.randn(2, 2, 3, 4)
    keys, values = cache.update(new, -new, doc_ids=torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(keys, new)
    assert torch.equal(values, -new)
    with pytest.raises(ValueError, match="doc_ids = None"):
        cache.update(new, new)


def test_to_ask_what_the_next_tokens_see_changes_nothing() -> None:
    cache, new = KVCache(2, 8, 2, 4), torch.randn(2, 2, 3, 4)
    real = torch.tensor([[True, True, False], [True, False, False]])
    cache.update(new, new, key_padding_mask=real)
    assert cache.valid is not None
    before = cache.valid.clone()
    cache.state.mask(3, key_padding_mask=~real)
    assert torch.equal(cache.valid, before)


@pytest.mark.parametrize("static", [False, True])
def test_slots_are_of_as_many_tokens_as_are_appended(static: bool) -> None:
    """Before they are counted, what is appended begins at the same slot, whatever was asked for before."""
    cache, new = KVCache(2, 8, 2, 4, sliding_window=4, spare=2, static=static), torch.randn(2, 2, 3, 4)
    for length in (3, 1, 2):
        slots = torch.zeros_like(cache.k)
        cache.state.append(slots, new[:, :, :length])
        assert torch.equal(slots[:, :, :length], new[:, :, :length])
        assert not slots[:, :, length:].any()


def test_mask_drawing() -> None:
    mask = Mask(causal=True, window=3)
    assert dense_mask(mask, 3, 5).int().tolist() == [[[[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    mask = Mask(causal=True, query_doc_ids=documents[:, 2:], key_doc_ids=documents)
    assert dense_mask(mask, 3, 5).int().tolist() == [[[[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]]


def test_a_query_without_keys_gives_zero_and_no_gradient() -> None:
    attention = Attention(DIM, 6, 2, 8).double()
    cos, sin = precompute_rope_frequencies(8, 5)
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[False, False, True, True, True], [False] * 5])
    out = attention(x, cos, sin, key_padding_mask=real)
    assert not out[0, :2].any()
    assert not out[1].any()
    assert out[0, 2:].abs().min() > 0
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()


@pytest.mark.parametrize("backend", SDPA_BACKENDS)
def test_every_sdpa_backend_runs_and_agrees(backend: str) -> None:
    model, tokens = model_of(sdpa_backend=backend), tokens_of()
    plain = model_of()
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    assert close(model(tokens), plain(tokens))
    assert close(model(tokens, doc_ids=documents), plain(tokens, doc_ids=documents))


@pytest.mark.parametrize("keys", range(1, 20))
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_are_no_numbers_give_no_numbers(keys: int, masked: bool) -> None:
    q, k = torch.full((1, 1, keys, 8), torch.nan), torch.randn(1, 1, keys, 8)
    real = torch.ones(1, keys, dtype=torch.bool) if masked else None
    assert attend(q, k, k, Mask(causal=True, key_valid=real)).isnan().all()


def test_an_sdpa_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=f"sdpa_backend = 'fast': must be one of auto, {', '.join(SDPA_BACKENDS)}"):
        Attention(DIM, 6, 2, 8, sdpa_backend="fast")


def test_attention_weights_are_captured_on_the_host() -> None:
    model = model_of(sliding_window=3)
    attention = model.layers["1"].attention
    assert isinstance(attention, Attention)
    model(tokens_of())
    assert attention.last_attention_weights is None
    attention.capture_attention_weights = True
    model(tokens_of())
    weights = attention.last_attention_weights
    assert weights is not None
    assert weights.shape == (2, 6, 9, 9)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 9, dtype=torch.float64))
    assert not weights[..., 8, :6].any()


# Inputs


def test_inputs_that_make_no_sense_are_refused() -> None:
    model, tokens, embedded = model_of(torch.float32), tokens_of(), torch.zeros(2, 9, DIM)
    real = torch.ones(2, 9, dtype=torch.bool)
    caches = caches_of(2, 16, torch.float32)
    sliced = ModalityContext(output_slice=slice(1))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("neither is", {}),
        ("both are", {"tokens": tokens, "modality": ModalityContext(inputs_embeds=embedded)}),
        ("sequence length = 33: must be at most max_seq_len = 32", {"tokens": tokens_of(length=33)}),
        ("tokens = 31: ids must be in", {"tokens": torch.tensor([[1, VOCAB]])}),
        ("tokens = -2: ids must be in", {"tokens": torch.tensor([[1, -2]])}),
        ("image_features is given", {"tokens": tokens, "modality": ModalityContext(image_features=embedded)}),
        ("not allowed together", {"tokens": tokens, "modality": sliced, "kv_caches": caches}),
        ("kv_caches = 1 caches", {"tokens": tokens, "kv_caches": caches[:1]}),
        ("max_seq_len = 33", {"tokens": tokens, "kv_caches": caches_of(2, 33)}),
        ("doc_ids.shape", {"tokens": tokens, "doc_ids": torch.zeros(2, 8, dtype=torch.int32)}),
        (
            "key_padding_mask.dtype",
            {"modality": ModalityContext(inputs_embeds=embedded, key_padding_mask=real.int())},
        ),
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
        ModalityContext(**dict.fromkeys(fields, torch.zeros(1)))  # type: ignore[arg-type]


def test_prefix_and_slice() -> None:
    model, tokens = model_of(), tokens_of()
    prefix = torch.randn(2, 4, DIM, dtype=torch.float64)
    assert model.token_embedding is not None
    whole = model(modality=ModalityContext(inputs_embeds=torch.cat([prefix, model.token_embedding(tokens)], dim=1)))
    part = model(tokens, modality=ModalityContext(prefix_embeds=prefix, output_slice=slice(4, None)))
    assert close(part, whole[:, 4:])


def test_pipeline_stages_make_the_model() -> None:
    model, tokens = model_of(), tokens_of()
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.norm = first.output_head = last.token_embedding = None
    del first.layers["1"], last.layers["0"]
    assert close(last(first(tokens)), model(tokens))
    init_weights(last, last.config, seed=5)
    init_weights(model, model.config, seed=5)
    assert all(torch.equal(tensor, get_state(model)[name]) for name, tensor in get_state(last).items())


# Extension


def test_dense_getters() -> None:
    model = model_of()
    assert model.run(tokens_of()).stats == {}
    assert model.get_moe_aux_loss() == 0
    assert model.get_moe_router_z_loss() == 0
    assert model.get_expert_counts() == {}
    assert model.get_moma_expert_counts() == {}


def test_builders_are_looked_up_by_name() -> None:
    with temporary():
        registry.register("mlp", "test_relu")(lambda dim, hidden_dim: StandardMLP(dim, hidden_dim, "relu"))
        assert isinstance(build_mlp(4, 8, "test_relu"), StandardMLP)
    with pytest.raises(KeyError, match="Unknown norm: 'batchnorm'; available: layernorm, rmsnorm"):
        build_norm("batchnorm", 4)
    with pytest.raises(KeyError, match="Unknown mlp"):
        build_mlp(4, 8, "swish")


def test_an_architecture_changes_what_happens_between_layers() -> None:
    class Doubling(Architecture):
        def after_block(self, modules: Modules, layer_idx: int, x: Tensor, modality: ModalityContext) -> Tensor:
            return 2 * x if layer_idx == LAYERS - 1 else x

    class DoublingConfig(VLMConfig):
        pass

    model = model_of()
    with temporary():
        registry.register("architecture", "test_doubling")(Doubling)
        doubled = Transformer(model.config, vlm_config=DoublingConfig(arch="test_doubling")).double()
    set_state(doubled, get_state(model))
    doubled.norm = model.norm = nn.Identity()
    assert close(doubled(tokens_of()), 2 * model(tokens_of()))
