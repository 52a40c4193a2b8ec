"""Decoding through a cache is the full forward, however the tokens are cut into chunks, in both backends.

Shapes: B rows, S tokens of a chunk, D model dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.oracle.transformer import transformer as oracle_transformer
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.strategies import documents, paddings
from tests.tolerance import assert_same_function

ROWS, LENGTH, PROMPT, SLOTS = 3, 12, 4, 16
CHUNKS = (1, 4)
"""Sizes of chunks: few, as JAX compiles each."""

CONFIGS = {
    "window": ModelConfig(
        dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=SLOTS,
        qk_norm=True, attention_bias=True, sliding_window=3,
    ),
    "scaled": ModelConfig(
        dim=24, n_layers=2, n_heads=3, vocab_size=13, ffn_hidden_dim=50, max_seq_len=SLOTS, norm_type="layernorm",
        activation="gelu", tie_embeddings=True, rope_theta=50.0,
        rope_scaling=RopeScaling(type="yarn", factor=8.0, original_max_seq_len=16),
    ),
    "experts": ModelConfig(
        dim=20, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=SLOTS,
        num_experts=3, moe_frequency=2, moe_router="sigmoid_topk", moe_packed_experts=True,
    ),
}  # fmt: skip

Fed = Mapping[str, Any]
"""``tokens`` or ``inputs_embeds``, and perhaps ``doc_ids`` and ``key_padding_mask``, each (B, S) or (B, S, D)."""


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model of one backend: fed with NumPy arrays, it gives logits (B, S, V) and, with caches, the new caches."""

    backend: Torch
    config: ModelConfig

    def caches(self, slots: int = SLOTS, **options: Any) -> list[Any]:
        kind, config = self.backend.module("model.attention").KVCache, self.config
        sizes = (ROWS, slots, config.kv_heads, config.head_size)
        dtype = self.backend.array(np.zeros(0)).dtype
        return [kind(*sizes, dtype, **options) for _ in range(config.n_layers)]

    def full(self, fed: Fed) -> np.ndarray:
        return self.feed(fed, None)[0]

    def feed(self, fed: Fed, caches: Any) -> tuple[np.ndarray, Any]:
        logits, caches = self._step({name: self.backend.array(value) for name, value in fed.items()}, caches)
        return self.backend.numpy(logits), caches

    def truncate(self, caches: Sequence[Any], lengths: np.ndarray) -> list[Any]:
        return [cache.truncate(self.backend.array(lengths)) or cache for cache in caches]

    @functools.cached_property
    def model(self) -> Any:
        return self.backend.model(self.config, weights_of(self.config))

    @functools.cached_property
    def _step(self) -> Any:
        if self.backend.name == "torch":
            return lambda arrays, caches: (self._call(self.model, arrays, caches).logits, caches)
        state = self.backend.module("model.state")
        graphdef, params, buffers = state.split(self.model)

        @jax.jit
        def step(params: Any, buffers: Any, arrays: Any, caches: Any) -> Any:
            output = self._call(state.merge(graphdef, params, buffers), arrays, caches)
            return output.logits, output.kv_caches

        return functools.partial(step, params, buffers)

    def _call(self, model: Any, arrays: Mapping[str, Any], caches: Any) -> Any:
        inside = {name: arrays[name] for name in ("inputs_embeds", "key_padding_mask") if name in arrays}
        modality = self.backend.module("model.modality").ModalityContext(**inside)
        return model.run(arrays.get("tokens"), modality=modality, kv_caches=caches, doc_ids=arrays.get("doc_ids"))


@functools.cache
def decoder(backend: Torch, name: str) -> Decoder:
    return Decoder(backend, CONFIGS[name])


@functools.cache
def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return {n: w.astype(np.float64) for n, w in validation_weights(parameter_table(config), seed=5).items()}


@st.composite
def chunkings(draw: st.DrawFn, length: int) -> list[int]:
    """Sizes of chunks that add up to ``length``."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(draw(st.sampled_from([size for size in CHUNKS if size <= length - sum(sizes)])))
    return sizes


@st.composite
def fed_with(draw: st.DrawFn, config: ModelConfig, length: int, kind: str | None = None) -> dict[str, Any]:
    """Tokens; or embeddings with documents and padding. A batch with all or with none is enough: masks combine."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if (kind or draw(st.sampled_from(["tokens", "masked"]))) == "tokens":
        return {"tokens": rng.integers(0, config.vocab_size, (ROWS, length), dtype=np.int32)}
    return {
        "inputs_embeds": rng.standard_normal((ROWS, length, config.dim)),
        "doc_ids": draw(documents(ROWS, length)),
        "key_padding_mask": draw(paddings(ROWS, length)),
    }


@on_both
@pytest.mark.parametrize("name", sorted(CONFIGS))
@given(data=st.data())
def test_any_chunking_is_the_full_forward_and_the_oracle(backend: Torch, name: str, data: st.DataObject) -> None:
    model = decoder(backend, name)
    fed, sizes = data.draw(fed_with(model.config, LENGTH)), data.draw(chunkings(LENGTH))
    static = {"static": data.draw(st.booleans())} if backend.name == "torch" else {}
    truth = oracle_transformer(weights_of(model.config), model.config, **fed).logits
    assert_same_function(model.full(fed), truth, "full forward")
    assert_same_function(in_chunks(model, fed, sizes, model.caches(**static))[0], truth, f"chunks {sizes}")


@on_both
@pytest.mark.parametrize("name", sorted(CONFIGS))
@given(data=st.data())
def test_rows_of_unequal_prompts_decode_as_each_alone(backend: Torch, name: str, data: st.DataObject) -> None:
    """A prompt is padded at its end, what lies beyond a row's length is forgotten, and decoding goes on from there."""
    model, lengths = (
        decoder(backend, name),
        np.array(data.draw(st.lists(st.integers(1, PROMPT), min_size=3, max_size=3))),
    )
    kind = data.draw(st.sampled_from(["tokens", "masked"]))
    prompt, more = (data.draw(fed_with(model.config, n, kind)) for n in (PROMPT, LENGTH - PROMPT))
    sizes = data.draw(chunkings(LENGTH - PROMPT))
    static = {"static": data.draw(st.booleans())} if backend.name == "torch" else {}
    prefilled, caches = model.feed(prompt, model.caches(**static))
    decoded, _ = in_chunks(model, more, sizes, model.truncate(caches, lengths))
    for row, length in enumerate(lengths):
        alone: dict[str, Any] = {
            key: np.concatenate([prompt[key][row, :length], more[key][row]])[None] for key in prompt
        }
        truth = oracle_transformer(weights_of(model.config), model.config, **alone).logits[0]
        assert_same_function(prefilled[row, :length], truth[:length], f"prompt of row {row}")
        assert_same_function(decoded[row], truth[length:], f"row {row} after a prompt of {length}, chunks {sizes}")


@on_both
def test_what_came_before_documents_and_padding_is_of_document_0_and_real(backend: Torch) -> None:
    model, rng = decoder(backend, "scaled"), np.random.default_rng(0)
    embeds = rng.standard_normal((ROWS, LENGTH, model.config.dim))
    masks = {
        "doc_ids": np.repeat([[0] * 8 + [1] * 4], ROWS, 0),
        "key_padding_mask": np.arange(LENGTH) % 12 != [[5]] * ROWS,
    }
    _, caches = model.feed({"inputs_embeds": embeds[:, :PROMPT]}, model.caches())
    rest: dict[str, Any] = {"inputs_embeds": embeds, **masks}
    decoded, _ = in_chunks(model, {key: value[:, PROMPT:] for key, value in rest.items()}, [4, 4], caches)
    truth = oracle_transformer(weights_of(model.config), model.config, **rest).logits
    assert_same_function(decoded, truth[:, PROMPT:], "after the prompt")


@on_both
@pytest.mark.parametrize("name", sorted(CONFIGS))
@given(data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(backend: Torch, name: str, data: st.DataObject) -> None:
    model, kind = decoder(backend, name), data.draw(st.sampled_from(["tokens", "masked"]))
    fed, other = (data.draw(fed_with(model.config, LENGTH, kind)) for _ in range(2))
    row, sizes = data.draw(st.integers(0, ROWS - 1)), data.draw(chunkings(LENGTH))
    mixed = {key: np.array(value) for key, value in other.items()}
    for key, value in fed.items():
        mixed[key][row] = value[row]
    both = [in_chunks(model, given, sizes, model.caches())[0][row] for given in (fed, mixed)]
    if name == "experts":  # products over other groups of rows round differently
        assert_same_function(both[0], both[1], f"row {row}")
    else:
        np.testing.assert_array_equal(both[0], both[1])


@on_both
def test_overflow_raises_where_lengths_can_be_seen(backend: Torch) -> None:
    model = decoder(backend, "window")
    tokens = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH) % 13
    caches = in_chunks(model, {"tokens": tokens[:, :3]}, [1] * 3, model.caches(7))[1]
    with pytest.raises(
        ValueError, match="tokens = 5: must fit in the cache, of whose max_seq_len = 7 slots 3 are filled"
    ):
        model.model(backend.array(tokens[:, 3:8]), kv_caches=caches)
    last, caches = model.feed({"tokens": tokens[:, 3:7]}, caches)
    truth = oracle_transformer(weights_of(model.config), model.config, tokens[:, :7]).logits
    assert_same_function(last, truth[:, 3:], "what still fits")
    with pytest.raises(ValueError, match=r"tokens = 1: .* 7 are filled"):
        model.model(backend.array(tokens[:, :1]), kv_caches=caches)


def test_overflow_of_a_static_cache_raises_on_the_host() -> None:
    model = decoder(BACKENDS[0], "window")
    with pytest.raises(IndexError):
        model.feed({"tokens": np.zeros((ROWS, 7), np.int32)}, model.caches(6, static=True))


def test_overflow_inside_jit_is_nan_and_overwrites_nothing() -> None:
    """In the row that is full: the others go on."""
    model, tokens = decoder(BACKENDS[1], "window"), np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH) % 13
    _, caches = model.feed({"tokens": tokens[:, :4]}, model.caches(6))
    caches = model.truncate(caches, np.array([4, 1, 4]))
    logits, after = model.feed({"tokens": tokens[:, 4:8]}, caches)
    past_end = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(np.isnan(logits).all(-1), past_end)
    np.testing.assert_array_equal(np.isnan(logits).any(-1), past_end)
    for before, cache in zip(caches, after, strict=True):
        np.testing.assert_array_equal(cache.k[0, :, :4], before.k[0, :, :4])
        assert np.isfinite(cache.k).all()
    alone = np.concatenate([tokens[1, :1], tokens[1, 4:8]])[None]
    truth = oracle_transformer(weights_of(model.config), model.config, alone).logits[0, 1:]
    assert_same_function(logits[1], truth, "the row that has room")


@on_both
def test_no_more_is_forgotten_than_a_ring_has_room_for(backend: Torch) -> None:
    """Of the tokens seen since, spare + 1; what is seen again must not have been overwritten, in any row."""
    cache = backend.module("model.kv_cache").KVCache(2, 16, 1, 1, sliding_window=3, spare=2)
    keys = backend.array(np.zeros((2, 1, 8, 1), np.float32))
    updated = cache.update(keys, keys)
    cache = cache if backend.name == "torch" else updated[0]
    for lengths in ([8, 4], [4, 8], [0, 0]):
        with pytest.raises(ValueError, match=rf"^lengths = \[{lengths[0]}, {lengths[1]}\]: what they may see has been"):
            cache.truncate(backend.array(np.array(lengths)))
    if backend.name == "jax":  # where it can't be seen, the row is past its end
        assert jax.jit(lambda lengths: cache.truncate(lengths).lengths)(np.array([5, 4])).tolist() == [5, 16]
    cache = cache.truncate(backend.array(np.array([5, 8]))) or cache
    assert backend.numpy(cache.lengths).tolist() == [5, 8]


def in_chunks(model: Decoder, fed: Fed, sizes: Sequence[int], caches: Any) -> tuple[np.ndarray, Any]:
    """Logits of all tokens, fed chunk by chunk, and the caches after them."""
    parts, start = [], 0
    for size in sizes:
        logits, caches = model.feed({key: value[:, start : start + size] for key, value in fed.items()}, caches)
        parts.append(logits)
        start += size
    return np.concatenate(parts, axis=1), caches
