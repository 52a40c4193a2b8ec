"""Decoding: samplers against their definition, generation against full forwards of the oracle, caches against the full
forward whatever is appended and forgotten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, event, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared_config.contract.decoding import SamplingConfig, draw_uniforms, prefill_chunks
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.parity.numerics import allowed_error
from shared_config.parity.validation import validation_weights
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.generate import generate as oracle_generate
from tests.oracle.generate import kept_distribution
from tests.oracle.generate import sample as oracle_sample
from tests.parity.backends import BACKENDS, on_both
from tests.strategies import MAX_SEQ_LEN, model_configs
from tests.tolerance import FORWARD_K, assert_same_function, perturbation_delta, unit_roundoff

NEW, VOCABULARY = 6, 13
NIGHTLY = settings.get_current_profile_name() == "nightly"
PLAIN = ModelConfig(
    dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=MAX_SEQ_LEN,
    qk_norm=True, sliding_window=4, attention_bias=True,
)  # fmt: skip
ROUTED = ModelConfig(
    dim=12, n_layers=2, n_heads=2, vocab_size=VOCABULARY, ffn_hidden_dim=20, max_seq_len=MAX_SEQ_LEN, num_experts=5,
    moe_top_k=2, moe_router="sigmoid_topk", moe_shared_experts=1, moe_capacity_factor=0.3, tie_embeddings=True,
)  # fmt: skip
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2, 3])


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@functools.lru_cache(maxsize=8)
def model_of(backend: Any, config: ModelConfig, seed: int = 3) -> Any:
    return backend.model(config, weights_of(config, seed))


def weights_of(config: ModelConfig, seed: int = 3) -> dict[str, np.ndarray]:
    return validation_weights(parameter_table(config), seed)


def continued(backend: Any, model: Any, prompts: Any, count: int = NEW, **options: Any) -> np.ndarray:
    """The new tokens (B, count). Prompts must come first, padding last, and no wider than the longest row."""
    whole = np.asarray(generation(backend).generate(model, prompts, count, pad_token_id=-7, **options))
    missing = max(map(len, prompts)) + count - whole.shape[1]
    assert (whole[:, -1] != -7).any()
    assert missing == 0 or "eos_token_id" in options
    whole = np.pad(whole, ((0, 0), (0, missing)), constant_values=-7)
    new = np.empty((len(prompts), count), whole.dtype)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + count
        np.testing.assert_array_equal(whole[row, : len(prompt)], prompt)
        assert (whole[row, end:] == -7).all()
        new[row] = whole[row, len(prompt) : end]
    return new


def generation(backend: Any) -> Any:
    return backend.module("model.generate")


# ----------------------------------------------------------------------------------------------------------------------
# sample

levels = st.sampled_from([-4.0, -1.0, 0.0, 0.0, 1.5, 2.0, -np.inf])
rows_of_logits = st.lists(st.one_of(levels, st.floats(-5, 5)), min_size=VOCABULARY, max_size=VOCABULARY).filter(
    lambda row: max(row) > -np.inf
)
temperatures = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.05, 5))
tops = st.integers(0, VOCABULARY + 2)
masses = st.one_of(st.just(1.0), st.floats(0.01, 1))


@given(rows_of_logits, st.floats(0, 1, exclude_max=True), temperatures, tops, masses)
def test_sample_is_its_definition(
    logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    row = np.array(logits)
    truth = oracle_sample(row, uniform, temperature, top_k, top_p)
    if temperature > 0:
        assume(not is_close_call(row, uniform, temperature, top_k, top_p))
    batch = np.stack([row, row[::-1]])
    for backend in BACKENDS:
        drawn = generation(backend).sample(
            backend.array(batch), temperature, top_k, top_p, uniforms=backend.array(np.array([uniform, 0.5]))
        )
        assert drawn.shape == (2,)
        assert int(drawn[0]) == truth, backend


@on_both
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 2)])
def test_distributions_of_any_shape_are_drawn_from(backend: Any, shape: tuple[int, ...]) -> None:
    logits = np.random.default_rng(5).standard_normal((*shape, VOCABULARY))
    uniforms = np.linspace(0.05, 0.95, int(np.prod(shape))).reshape(shape)
    drawn = generation(backend).sample(backend.array(logits), uniforms=backend.array(uniforms))
    assert drawn.shape == shape
    truth = [
        oracle_sample(row, uniform, 1.0, 0, 1.0)
        for row, uniform in zip(logits.reshape(-1, VOCABULARY), uniforms.ravel(), strict=True)
    ]
    assert np.asarray(drawn).ravel().tolist() == truth


def is_close_call(row: np.ndarray, uniform: float, temperature: float, top_k: int, top_p: float) -> bool:
    """Whether rounding decides which token is drawn or kept."""
    _, whole = kept_distribution(row, temperature, top_k)
    _, kept = kept_distribution(row, temperature, top_k, top_p)
    edges = np.abs(np.cumsum(whole) - top_p).min(), np.abs(np.cumsum(kept) - uniform).min()
    return min(edges) < 1e-9


@on_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(rows=st.lists(rows_of_logits, min_size=4, max_size=4), top_k=tops, seed=st.integers(0, 99))
@settings(max_examples=settings().max_examples // 2)
def test_only_the_top_k_are_drawn_in_any_dtype(
    backend: Any, dtype: str, rows: list[list[float]], top_k: int, seed: int
) -> None:
    logits = np.array(rows).astype(ml_dtypes.bfloat16)
    random = {"generator": torch.Generator().manual_seed(seed)} if backend.name == "torch" else {"key": jax_key(seed)}
    drawn = generation(backend).sample(backend.array(logits, dtype), 2.0, top_k, **random)
    for row, token in zip(logits.astype(np.float64), drawn, strict=True):
        order, probabilities = kept_distribution(row, 2.0, top_k)
        assert int(token) in order[probabilities > 0]


@on_both
def test_extreme_temperatures_and_numbers_next_to_one(backend: Any) -> None:
    logits = backend.array(np.array([[0.0, 3.0, 1.0, -np.inf]]), "float32")
    draw = functools.partial(generation(backend).sample, logits, uniforms=backend.array(np.array([1 - 2.0**-53])))
    assert int(draw(1e-300)[0]) == 1
    assert int(draw(1.0)[0]) == 0, "the least probable token, not the impossible one"


@on_both
def test_a_number_shapes_frequencies(backend: Any) -> None:
    """Even numbers give each token its share."""
    logits, n = np.log([[0.5, 0.1, 0.4]]), 1000
    uniforms = (np.arange(n) + 0.5) / n
    drawn = generation(backend).sample(backend.array(np.repeat(logits, n, 0)), uniforms=backend.array(uniforms))
    np.testing.assert_array_equal(np.bincount(np.asarray(drawn)), [500, 100, 400])


@on_both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature = -0.5: must be at least 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be"),
        ({"top_k": -1}, "top_k = -1: must be an integer of at least 0"),
        ({"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p = 1.5: must be in \(0, 1\]"),
    ],
)
def test_values_without_meaning_are_refused(backend: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation(backend).sample(backend.array(np.zeros((1, 3))), **options)
    with pytest.raises(ValueError, match=message):
        generation(backend).stream(model_of(backend, PLAIN), [[1]], 2, **options)


def jax_key(seed: int) -> jax.Array:
    return jax.random.key(seed)


# ----------------------------------------------------------------------------------------------------------------------
# generate


@given(st.data())
@settings(max_examples=settings().max_examples if settings().max_examples > 100 else 8)
def test_any_model_gives_the_same_tokens_in_both_backends_and_the_oracle(data: st.DataObject) -> None:
    config = data.draw(model_configs(experts=True, moe_capacity_factor=0.0))
    ids = st.integers(0, config.vocab_size - 1)
    prompts = data.draw(st.lists(st.lists(ids, min_size=1, max_size=11), min_size=1, max_size=3))
    seed, greedy = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    note(f"weights of seed {seed}")
    weights = weights_of(config, seed)
    options: dict[str, Any] = {"temperature": 0.0}
    if not greedy:
        uniforms = draw_uniforms(seed, len(prompts), NEW)
        options = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "uniforms": uniforms}
    truth = oracle_generate(weights, config, prompts, NEW, **options)
    for backend in BACKENDS:
        tokens = continued(backend, backend.model(config, weights), prompts, prefill_chunk=4, **options)
        np.testing.assert_array_equal(tokens, truth, err_msg=str(backend))


@on_both
@pytest.mark.parametrize("name", ["generate", "stream"])
def test_all_that_is_given_is_asked_for(backend: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, model, asked = generation(backend), model_of(backend, PLAIN), Mock(side_effect=LookupError)
    drawn = {"temperature": 0.5, "top_k": 3, "top_p": 0.7, "eos_token_id": 5, "pad_token_id": 2, "seed": 9}
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    options = {each.name for each in parameters if each.kind == each.KEYWORD_ONLY} - drawn.keys() - {"compile"}
    given = {option: f"the {option}" for option in options}
    monkeypatch.setattr(module, "make_request", asked)
    with pytest.raises(LookupError):
        getattr(module, name)(model, PROMPTS, NEW, **drawn, **given)
    asked.assert_called_once_with(model, PROMPTS, NEW, SamplingConfig(**drawn), **given)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_stream_takes_the_numbers_that_are_given(backend: Any) -> None:
    config, prompts = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=29, max_seq_len=16), [[3, 1], [4, 1]]
    weights, uniforms = weights_of(config, 0), np.random.default_rng(1).random((2, NEW))
    model, options = backend.model(config, weights), {"temperature": 3.0, "uniforms": uniforms}
    steps = np.stack(list(generation(backend).stream(model, prompts, NEW, **options)), axis=1)
    np.testing.assert_array_equal(steps, oracle_generate(weights, config, prompts, NEW, **options))


@given(st.data())
@settings(max_examples=settings().max_examples if settings().max_examples > 100 else 5)
def test_float32_gives_the_most_probable_token_wherever_rounding_can_not_decide(data: st.DataObject) -> None:
    """Every step is judged by the float64 logits after the tokens so far: where the first leads the second by more than
    the error that their row may have, K * delta, either backend must choose it.
    """
    config = data.draw(model_configs(experts=True, moe_capacity_factor=0.0))
    seed = data.draw(st.integers(0, 99))
    prompts = [prompt[: 1 + seed % 7] for prompt in PROMPTS]
    prompts = [[token % config.vocab_size for token in prompt] for prompt in prompts]
    weights, judged = weights_of(config, seed), 0
    exact = BACKENDS[0].model(config, weights)
    for backend in BACKENDS:
        tokens = continued(backend, backend.model(config, weights, "float32"), prompts, temperature=0.0)
        for prompt, new in zip(prompts, tokens, strict=True):
            logits, reach = logits_and_reach(exact, weights, [*prompt, *new])
            leads = logits[len(prompt) - 1 : -1]
            second, first = np.sort(leads, axis=-1)[:, -2:].T
            clear = first - second > reach
            judged += int(clear.sum())
            np.testing.assert_array_equal(new[clear], leads.argmax(-1)[clear], err_msg=str(backend))
    event("judged", judged * 10 // (len(BACKENDS) * len(prompts) * NEW))
    assert judged > len(BACKENDS) * len(prompts) * NEW // 2


def logits_and_reach(model: Any, weights: dict[str, np.ndarray], tokens: list[int]) -> tuple[np.ndarray, float]:
    """Float64 logits (S, V), and by how much float32 may bring two of them closer: if their RMS error is K * delta, no
    two errors differ by more than sqrt(2 S V) of it.
    """
    set_state = BACKENDS[0].module("model.state").set_state

    def forward(values: dict[str, np.ndarray]) -> np.ndarray:
        set_state(model, values)
        with torch.no_grad():
            return model(torch.tensor([tokens]))[0].numpy()

    roundoff = unit_roundoff("float32")
    delta = perturbation_delta(forward, weights, roundoff)["output"]
    logits = forward(weights)
    return logits, float(np.sqrt(2 * logits.size)) * allowed_error(logits, delta, FORWARD_K, roundoff)


@on_both
@pytest.mark.parametrize(("config", "temperature"), [(PLAIN, 0.0), (ROUTED, 1.3)], ids=["plain", "routed"])
def test_a_row_does_not_depend_on_its_neighbours(backend: Any, config: ModelConfig, temperature: float) -> None:
    model, options = model_of(backend, config), {"temperature": temperature, "seed": 11}
    together = continued(backend, model, PROMPTS, **options)
    np.testing.assert_array_equal(together[:1], continued(backend, model, PROMPTS[:1], **options))
    others = [PROMPTS[0], [2, 2, 2, 2], [1]]
    np.testing.assert_array_equal(together[:1], continued(backend, model, others, **options)[:1])


def test_a_seed_gives_the_same_tokens_in_both_backends() -> None:
    first, second = (
        continued(backend, model_of(backend, PLAIN), PROMPTS, temperature=1.5, seed=4) for backend in BACKENDS
    )
    np.testing.assert_array_equal(first, second)
    other = continued(BACKENDS[0], model_of(BACKENDS[0], PLAIN), PROMPTS, temperature=1.5, seed=5)
    assert (first != other).any()


@on_both
def test_rows_of_one_prompt_draw_numbers_of_their_own(backend: Any) -> None:
    model = model_of(backend, PLAIN)
    new_seed = torch.Generator().manual_seed if backend.name == "torch" else jax_key
    for seed in (4, None, new_seed(4)):
        rows = continued(backend, model, [PROMPTS[0]] * len(PROMPTS), temperature=5.0, seed=seed)
        assert len({tuple(row) for row in rows.tolist()}) == len(PROMPTS), seed
    random = {"generator": new_seed(4)} if backend.name == "torch" else {"key": new_seed(4)}
    assert len(set(generation(backend).sample(backend.array(np.zeros((64, VOCABULARY))), **random).tolist())) > 5


@on_both
def test_without_a_seed_every_run_is_another(backend: Any) -> None:
    model = model_of(backend, PLAIN)
    assert (continued(backend, model, PROMPTS) != continued(backend, model, PROMPTS)).any()


def test_generators_and_keys_are_seeds_too() -> None:
    for backend, new_seed in zip(BACKENDS, (torch.Generator().manual_seed, jax_key), strict=True):
        model = model_of(backend, PLAIN)
        once, again, other = (continued(backend, model, PROMPTS, seed=new_seed(n)) for n in (1, 1, 2))
        np.testing.assert_array_equal(once, again)
        assert (once != other).any()


def test_numbers_of_a_key_are_no_narrower_than_scores() -> None:
    """Of bfloat16 there would be 256 of them, and zeros among these."""
    sample = BACKENDS[1].module("model.sampling").sample
    logits = jax.numpy.asarray(np.random.default_rng(0).standard_normal((64, 37)), "bfloat16")
    narrow, wide = (sample(each, key=jax_key(3)) for each in (logits, logits.astype("float32")))
    np.testing.assert_array_equal(narrow, wide)


@on_both
@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_that_has_ended_is_padding(backend: Any, streamed: bool) -> None:
    model, weights = model_of(backend, PLAIN), weights_of(PLAIN)
    free = oracle_generate(weights, PLAIN, PROMPTS, NEW)
    eos = int(free[0, 2])  # the first row ends at its third token or before
    truth = oracle_generate(weights, PLAIN, PROMPTS, NEW, eos_token_id=eos, pad_token_id=-7)
    assert (truth == -7).any()
    options = {"temperature": 0.0, "eos_token_id": eos}
    if not streamed:
        np.testing.assert_array_equal(continued(backend, model, PROMPTS, **options), truth)
        return
    steps = list(generation(backend).stream(model, PROMPTS[:1], NEW, pad_token_id=-7, **options))
    assert [int(step[0]) for step in steps] == [token for token in truth[0] if token != -7], "ends with its last row"
    steps = list(generation(backend).stream(model, PROMPTS, NEW, pad_token_id=-7, **options))
    np.testing.assert_array_equal(np.stack(steps, axis=1), truth[:, : len(steps)])


@on_both
@pytest.mark.parametrize("kind", [tuple, list, np.array])
def test_a_row_ends_with_any_of_several_ids(backend: Any, kind: Any) -> None:
    """Prompts of unequal lengths, each with an id of its own that ends it."""
    model, weights = model_of(backend, PLAIN), weights_of(PLAIN)
    free = oracle_generate(weights, PLAIN, PROMPTS, NEW)
    stops = sorted({int(row[1 + place % 2]) for place, row in enumerate(free)})
    truth = oracle_generate(weights, PLAIN, PROMPTS, NEW, eos_token_id=stops, pad_token_id=-7)
    assert len(stops) > 1
    assert (truth == -7).any(axis=1).all()
    options = {"temperature": 0.0, "eos_token_id": kind(stops)}
    np.testing.assert_array_equal(continued(backend, model, PROMPTS, **options), truth)
    steps = list(generation(backend).stream(model, PROMPTS, NEW, pad_token_id=-7, **options))
    np.testing.assert_array_equal(np.stack(steps, axis=1), truth[:, (truth != -7).any(axis=0)])
    others = [token for token in range(PLAIN.vocab_size) if token not in free][: 17 - len(stops)]
    many = continued(backend, model, PROMPTS, **{**options, "eos_token_id": kind([*others, *stops])})
    np.testing.assert_array_equal(many, truth, err_msg="one more than a power of two")
    none = continued(backend, model, PROMPTS, **{**options, "eos_token_id": kind([])})
    np.testing.assert_array_equal(none, free)


@on_both
def test_streamed_and_whole_are_the_same(backend: Any) -> None:
    model, options = model_of(backend, ROUTED), {"temperature": 0.9, "top_p": 0.95, "seed": 8}
    steps = generation(backend).stream(model, PROMPTS, NEW, **options)
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), continued(backend, model, PROMPTS, **options))


@on_both
@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_prompts_may_be_read_in_chunks_of_any_size(backend: Any, chunk: int) -> None:
    truth = oracle_generate(weights_of(PLAIN), PLAIN, PROMPTS, NEW)
    tokens = continued(backend, model_of(backend, PLAIN), PROMPTS, temperature=0.0, prefill_chunk=chunk)
    np.testing.assert_array_equal(tokens, truth)


@on_both
@pytest.mark.parametrize(("chunk", "slots"), [(1, 4), (3, 6), (512, 19)])
def test_memory_is_that_of_the_window_and_a_chunk(
    backend: Any, chunk: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens there are: 11 + 9, in windows of 4."""
    decode, made = backend.module("model.decode"), []
    new = decode.new_caches
    monkeypatch.setattr(decode, "new_caches", lambda *args, **options: made.extend(new(*args, **options)) or made)
    truth = oracle_generate(weights_of(PLAIN), PLAIN, PROMPTS, 9)
    tokens = continued(backend, model_of(backend, PLAIN), PROMPTS, 9, temperature=0.0, prefill_chunk=chunk)
    np.testing.assert_array_equal(tokens, truth)
    assert [cache.slots for cache in made] == [slots] * PLAIN.n_layers


@on_both
def test_all_layers_share_one_state(backend: Any) -> None:
    """How far rows are is held once, and the caches of layers by themselves go on alike."""
    request = backend.module("model.request").make_request(model_of(backend, PLAIN), PROMPTS, 4, SamplingConfig())
    caches, _ = backend.module("model.decode").prefill(model_of(backend, PLAIN), request)
    assert len(caches) == PLAIN.n_layers
    assert all(cache.state is caches[0].state for cache in caches)
    assert caches[0].lengths.tolist() == [len(prompt) - 1 for prompt in PROMPTS]


@on_both
def test_a_ring_needs_a_window_that_it_holds(backend: Any) -> None:
    cache = backend.module("model.attention").KVCache(1, 20, 2, 6, sliding_window=4)
    for window in (None, 5):
        with pytest.raises(ValueError, match=f"sliding_window = {window}: must be at most the cache's, 4"):
            cache.mask(1, sliding_window=window)
    assert cache.mask(4, sliding_window=3).window == 3
    assert backend.module("model.attention").KVCache(1, 20, 2, 6, sliding_window=30).sliding_window is None


@on_both
def test_rows_that_do_not_exist_are_refused(backend: Any) -> None:
    cache = backend.module("model.attention").KVCache(2, 20, 2, 6)
    for row in (2, -1):
        with pytest.raises(ValueError, match=rf"rows = {row}: ids must be in \[0, 2\)"):
            cache.reorder(backend.array(np.array([0, row])))
    more = cache.reorder(backend.array(np.array([1, 1, 0]))) or cache
    assert more.k.shape == (3, 2, 20, 6)
    assert more.lengths.tolist() == [0, 0, 0]


@given(st.integers(0, 300), st.integers(1, 70), st.integers(0, 40))
def test_chunks_cover_a_prompt_and_stay_in_the_cache(length: int, chunk: int, spare: int) -> None:
    limit = length + spare
    chunks = prefill_chunks(length, chunk, limit)
    assert [start for start, _ in chunks] == list(np.cumsum([0, *(size for _, size in chunks)])[:-1])
    end = sum(size for _, size in chunks)
    assert length <= end <= max(limit, length)
    assert all(1 <= size <= chunk for _, size in chunks)


@on_both
def test_padded_prompts_with_lengths_are_ragged_prompts(backend: Any) -> None:
    padded = np.full((3, 11), 36)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    model = model_of(backend, PLAIN)
    whole = generation(backend).generate(
        model, backend.array(padded), NEW, temperature=0.0, prompt_lengths=backend.array(lengths)
    )
    np.testing.assert_array_equal(whole, generation(backend).generate(model, PROMPTS, NEW, temperature=0.0))


@on_both
def test_the_whole_context_can_be_used_and_no_more(backend: Any) -> None:
    model, full = model_of(backend, PLAIN), [place % 7 for place in range(MAX_SEQ_LEN)]
    truth = oracle_generate(weights_of(PLAIN), PLAIN, [full], 1)
    np.testing.assert_array_equal(continued(backend, model, [full], 1, temperature=0.0), truth)
    assert continued(backend, model, [full], 0).shape == (1, 0)
    with pytest.raises(ValueError, match="max_new_tokens = 2: must be at most 1, as the longest prompt has 24 tokens"):
        generation(backend).generate(model, [full], 2)
    alone = continued(backend, model, [full[:1]], MAX_SEQ_LEN, temperature=0.0)
    np.testing.assert_array_equal(alone, oracle_generate(weights_of(PLAIN), PLAIN, [full[:1]], MAX_SEQ_LEN))


@on_both
def test_more_tokens_may_be_asked_for_than_a_short_integer_holds(backend: Any) -> None:
    config = PLAIN.replace(max_seq_len=1 << 16, n_layers=1)
    model = model_of(backend, config)
    every = tuple(range(config.vocab_size))
    whole = generation(backend).generate(model, [[1, 2]], 40_000, temperature=0.0, eos_token_id=every)
    assert np.asarray(whole).shape == (1, 3)


@on_both
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompt_tokens is empty"),
        ([[1], []], {}, r"prompt_tokens\[1\] is empty"),
        ([1, 2], {}, r"prompt_tokens\[0\] has 0 dimensions: must be \(batch, length\)"),
        ([[0.5]], {}, r"prompt_tokens\[0\] is of float64: token ids are integers"),
        ([[1], [2, 37]], {}, r"prompt_tokens\[1\] holds 37: token ids must be in \[0, 37\)"),
        ([[-1]], {}, r"prompt_tokens\[0\] holds -1"),
        ([[1] * 25], {}, "prompt_tokens has a row of 25 tokens: must be at most max_seq_len = 24"),
        ([[1]], {"prompt_lengths": [2]}, r"prompt_lengths\[0\] = 2: must be in \[0, 1\]"),
        ([[1]], {"prompt_lengths": [1, 1]}, r"prompt_lengths\.shape = \(2,\): must be one for each of 1 prompts"),
        ([[1]], {"prompt_lengths": [0]}, r"prompt_tokens\[0\] is empty"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens = -1: must be at least 0"),
        ([[1]], {"eos_token_id": 37}, r"eos_token_id = 37: must be in \[0, 37\)"),
        ([[1]], {"eos_token_id": [3, 37]}, r"eos_token_id = 37: must be in \[0, 37\)"),
        ([[1]], {"eos_token_id": True}, "eos_token_id = True: must be an id, a sequence of ids, or None"),
        ([[1]], {"eos_token_id": [[1]]}, "must be an id, a sequence of ids, or None"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk = 0: must be at least 1"),
        ([[1]], {"uniforms": np.zeros((2, 2))}, r"uniforms.shape = \(2, 2\): must be .* = \(1, 2\)"),
        ([[1]], {"uniforms": np.ones((1, 2))}, r"uniforms has numbers outside \[0, 1\)"),
    ],
)
def test_requests_without_meaning_are_refused(backend: Any, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation(backend).generate(model_of(backend, PLAIN), prompts, **{"max_new_tokens": 2, **options})


# ----------------------------------------------------------------------------------------------------------------------
# Images

SEEING = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32
)  # fmt: skip
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
ADAPTER, FRAMES = AdapterConfig(type="linear"), 2
ARCHITECTURES: dict[str, VLMConfig] = {
    "joint_decoder": JointDecoderConfig(max_text_len=8),
    "cross_attention": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=8, mot_image_n_kv_heads=2),
}
WITHIN = [4, 0, 2]
"""Tokens of each prompt that stand before its image."""
PIXELS = np.random.default_rng(2).standard_normal((3, FRAMES, 3, 8, 8))
SHOWN = np.array([[True, False], [True, True], [False, False]])


@functools.lru_cache(maxsize=8)
def seeing_model(backend: Any, vlm: VLMConfig, window: int | None = None, experts: int = 0) -> Any:
    config = SEEING.replace(sliding_window=window, num_experts=experts, moe_top_k=2)
    model = backend.build(backend.module("model.vlm").build_vlm_wrapper, config, VISION, ADAPTER, vlm, FRAMES)
    table = wrapper_table(config, vlm, ADAPTER, vit_tower(VISION), VISION.feature_dim)
    backend.module("model.state").set_state(model, validation_weights(table, 3))
    return model


@functools.lru_cache(maxsize=8)
def seen_and_continued(vlm: VLMConfig, masked: bool, window: int | None = None) -> np.ndarray:
    """The most probable tokens (B, NEW) by full forwards of each row alone, without a cache."""
    model, new = seeing_model(BACKENDS[0], vlm, window), np.zeros((len(PROMPTS), NEW), np.int64)
    for row, prompt in enumerate(PROMPTS):
        pixels, shown = torch.from_numpy(PIXELS[row : row + 1]), torch.from_numpy(SHOWN[row : row + 1])
        text = list(prompt)
        for step in range(NEW):
            with torch.no_grad():
                logits = model.run(pixels, torch.tensor([text]), shown if masked else None).logits
            new[row, step] = int(logits[0, -1].argmax())
            text.append(int(new[row, step]))
    return new


@on_both
@pytest.mark.parametrize(
    ("arch", "masked", "window"),
    [("joint_decoder", True, None), ("cross_attention", True, None), ("mot", True, 7), ("joint_decoder", False, 7)],
)
def test_images_are_seen_as_in_the_full_forward(backend: Any, arch: str, masked: bool, window: int | None) -> None:
    """By rows of unequal prompts, one of which has no image at all, one half of a clip."""
    vlm = ARCHITECTURES[arch]
    model, images = (
        seeing_model(backend, vlm, window),
        {"pixel_values": PIXELS, "frame_mask": SHOWN if masked else None},
    )
    tokens = continued(backend, model, PROMPTS, temperature=0.0, prefill_chunk=4, **images)
    np.testing.assert_array_equal(tokens, seen_and_continued(vlm, masked, window))
    if masked:
        alone = continued(backend, model, PROMPTS[2:], temperature=0.0, prefill_chunk=4)
        np.testing.assert_array_equal(tokens[2:], alone)


@on_both
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_single_token_may_follow_an_image_and_be_streamed(backend: Any, arch: str) -> None:
    model = seeing_model(backend, ARCHITECTURES[arch])
    images = {"pixel_values": PIXELS[1:2], "frame_mask": SHOWN[1:2]}
    steps = generation(backend).stream(model, PROMPTS[1:2], NEW, temperature=0.0, **images)
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), seen_and_continued(ARCHITECTURES[arch], True)[1:2])


@on_both
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_after_an_image_as_much_is_read_as_a_prompt_has_tokens(backend: Any, arch: str) -> None:
    model, request = seeing_model(backend, ARCHITECTURES[arch]), backend.module("model.request")
    options = {"prompt_lengths": None, "uniforms": None, "image_positions": None, "frame_mask": SHOWN}
    asked = request.make_request(
        model, PROMPTS, NEW, SamplingConfig(temperature=0.0), prefill_chunk=1, pixel_values=PIXELS, **options
    )
    assert list(asked.chunks) == [(start, 1) for start in range(max(map(len, PROMPTS)) - 1)]


@on_both
def test_frames_that_are_not_there_stay_unseen_however_the_text_is_read(backend: Any) -> None:
    model, request = seeing_model(backend, ARCHITECTURES["joint_decoder"]), backend.module("model.request")
    images = {"pixel_values": PIXELS, "frame_mask": SHOWN, "prefill_chunk": 2}
    asked = request.make_request(model, PROMPTS, 2, SamplingConfig(temperature=0.0), **images)
    caches, _ = backend.module("model.decode").prefill(model.transformer, asked)
    image = np.repeat(SHOWN, 4, axis=1)
    valid = backend.numpy(caches[0].state.valid)
    np.testing.assert_array_equal(valid[:, : image.shape[1]], image)
    for row, prompt in zip(valid[:, image.shape[1] :], PROMPTS, strict=True):
        assert row[: len(prompt) - 1].all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_that_sees_may_be_given_text_alone(arch: str) -> None:
    model = seeing_model(BACKENDS[0], ARCHITECTURES[arch])
    blind = continued(BACKENDS[0], model, PROMPTS, temperature=0.0)
    np.testing.assert_array_equal(blind, continued(BACKENDS[0], model.transformer, PROMPTS, temperature=0.0))
    assert (blind != seen_and_continued(ARCHITECTURES[arch], True)).any()


@on_both
def test_images_that_do_not_fit_are_refused(backend: Any) -> None:
    generate, model = generation(backend).generate, seeing_model(backend, ARCHITECTURES["joint_decoder"])
    with pytest.raises(ValueError, match=r"pixel_values.shape = \(2, 2, 3, 8, 8\): must be .* for 3 prompts"):
        generate(model, PROMPTS, 2, pixel_values=PIXELS[:2])
    with pytest.raises(ValueError, match=r"pixel_values.shape = \(1, 3, 9, 8\): must be \(batch, 3, 8, 8\)"):
        generate(model, [[1]], 2, pixel_values=np.zeros((1, 3, 9, 8)))
    with pytest.raises(ValueError, match="pixel_values has 3 frames: must have from 1 to 2"):
        generate(model, [[1]], 2, pixel_values=np.zeros((1, 3, 3, 8, 8)))
    with pytest.raises(ValueError, match="frame_mask is given, pixel_values = None"):
        generate(model, PROMPTS, 2, frame_mask=SHOWN)
    with pytest.raises(ValueError, match=r"max_new_tokens = 15: must be at most 14, .* of which the image takes 8"):
        generate(model, PROMPTS, 15, pixel_values=PIXELS)
    with pytest.raises(ValueError, match="a row of 25 tokens: must be at most max_seq_len = 32, of which the image"):
        generate(model, [[1] * 25], 1, pixel_values=PIXELS[:1])
    with pytest.raises(ValueError, match="pixel_values is given: model = Transformer has no encoder"):
        generate(model_of(backend, PLAIN), PROMPTS, 2, pixel_values=PIXELS)


@functools.lru_cache(maxsize=2)
def seen_within(masked: bool) -> np.ndarray:
    """As `seen_and_continued`, of images within the prompts."""
    model = seeing_model(BACKENDS[0], ARCHITECTURES["joint_decoder"], experts=3)
    new = np.zeros((len(PROMPTS), NEW), np.int64)
    for row, prompt in enumerate(PROMPTS):
        pixels, shown = torch.from_numpy(PIXELS[row : row + 1]), torch.from_numpy(SHOWN[row : row + 1])
        text, places = list(prompt), torch.tensor([WITHIN[row]])
        for step in range(NEW):
            with torch.no_grad():
                given = (pixels, torch.tensor([text]), shown if masked else None)
                logits = model.run(*given, image_positions=places, limit_capacity=False).logits
            new[row, step] = int(logits[0, -1].argmax())
            text.append(int(new[row, step]))
    return new


@on_both
@pytest.mark.parametrize(("masked", "chunk"), [(True, 3), *[(False, 3), (True, 64), (False, 64)] * NIGHTLY])
def test_images_within_prompts_are_seen_as_in_the_full_forward(backend: Any, masked: bool, chunk: int) -> None:
    images = {"pixel_values": PIXELS, "frame_mask": SHOWN if masked else None, "image_positions": WITHIN}
    model = seeing_model(backend, ARCHITECTURES["joint_decoder"], experts=3)
    tokens = continued(backend, model, PROMPTS, temperature=0.0, prefill_chunk=chunk, **images)
    np.testing.assert_array_equal(tokens, seen_within(masked))


@on_both
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 0], r"image_positions = \[0, 0\]: must be one integer for each of 3 prompts, or a row"),
        ([0, 0.5, 0], "image_positions = .*: must be one integer for each"),
        ([0, 0, -1], r"image_positions\[2\] = -1: must be in \[0, {}\), as text follows the image"),
        ([0, len(PROMPTS[1]), 0], r"image_positions\[1\] = {}: must be in \[0, {}\), as text follows the image"),
        ([[0], 0, [0]], r"image_positions = \[\[0\], 0, \[0\]\]: must be one integer for each of 3 prompts, or a row"),
        ([[0], [0, -1], [0]], r"image_positions\[1\] = \[0, -1\]: must be in"),
        (
            [[0], [0, 0, 0], [0]],
            r"\[0, 0, 0\], \[0\]\]: the most in a row are 3, must be 2, the images of pixel_values",
        ),
        ([[0], [0], []], r"\[\]\]: the most in a row are 1, must be 2, the images of pixel_values"),
    ],
)
def test_images_that_can_not_stand_there_are_refused(backend: Any, positions: list[Any], message: str) -> None:
    model = seeing_model(backend, ARCHITECTURES["joint_decoder"])
    sizes = [len(PROMPTS[2])] if positions[-1] == -1 else [len(PROMPTS[1])] * 2
    with pytest.raises(ValueError, match=message.format(*sizes)):
        generation(backend).generate(model, PROMPTS, 1, pixel_values=PIXELS, image_positions=positions)
    for images in ({}, {"pixel_values": PIXELS}):
        other = model if not images else seeing_model(backend, ARCHITECTURES["mot"])
        with pytest.raises(ValueError, match="must be None without an image that has no fixed place"):
            generation(backend).generate(other, PROMPTS, 1, image_positions=[0, 0, 0], **images)


@on_both
def test_prompts_that_hold_the_id_of_the_image_are_refused(backend: Any) -> None:
    model = seeing_model(backend, JointDecoderConfig(max_text_len=8, image_token_id=5))
    for images in ({}, {"pixel_values": PIXELS[:1]}):
        with pytest.raises(ValueError, match=r"prompt_tokens\[0\] holds 5 at 1: must not, as vlm.image_token_id = 5"):
            generation(backend).generate(model, [[4, 5]], 1, **images)


@on_both
@pytest.mark.parametrize("images", [{}, {"pixel_values": PIXELS}])
def test_experts_that_look_ahead_are_refused(backend: Any, images: dict[str, Any]) -> None:
    moma = MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3})
    with pytest.raises(ValueError, match=r"vlm\.arch = 'moma': its experts .* needs causal routers"):
        generation(backend).stream(seeing_model(backend, moma), PROMPTS, 2, **images)


# ----------------------------------------------------------------------------------------------------------------------
# Caches

ROWS, SLOTS, WINDOW = 2, 12, 3


class CacheMachine(RuleBasedStateMachine):
    """Tokens are appended and forgotten, rows trade places; what the caches give is the full forward of each row's own
    tokens. Of a ring only its spare tokens can be forgotten.
    """

    backend: Any
    sizes: st.SearchStrategy[int]
    spares: tuple[int | None, ...]

    @initialize(
        window=st.sampled_from([None, WINDOW]),
        ring=st.data(),
        rich=st.booleans(),
        static=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(self, window: int | None, ring: st.DataObject, rich: bool, static: bool, seed: int) -> None:
        self.config = PLAIN.replace(sliding_window=window)
        self.rich, self.rng = rich, np.random.default_rng(seed)
        self.rows: list[list[tuple[int, int, bool]]] = [[] for _ in range(ROWS)]
        self.static = static and self.backend.name == "torch"
        options: dict[str, Any] = {"static": True} if self.static else {}
        self.spare = ring.draw(st.sampled_from(self.spares)) if window is not None else None
        if self.spare is not None:
            options |= {"sliding_window": window, "spare": self.spare}
        self.written = [0] * ROWS
        dtype = torch.float64 if self.backend.name == "torch" else "float64"
        shape = (ROWS, SLOTS, self.config.kv_heads, self.config.head_size)
        cache = self.backend.module("model.attention").KVCache
        self.caches = [cache(*shape, dtype, **options) for _ in range(self.config.n_layers)]

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))

    @precondition(lambda self: self.longest < SLOTS)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        size = data.draw(self.sizes)
        assume(self.longest + size <= SLOTS)
        tokens = self.rng.integers(0, self.config.vocab_size, (ROWS, size))
        documents, real = np.zeros((ROWS, size), np.int64), np.ones((ROWS, size), bool)
        if self.rich:
            documents, real = self.rng.integers(0, 2, (ROWS, size)), self.rng.random((ROWS, size)) < 0.7
        for row in range(ROWS):
            self.rows[row] += zip(tokens[row], documents[row], real[row], strict=True)
            self.written[row] = max(self.written[row], len(self.rows[row]))
        given_masks = (documents, real) if self.rich else (None, None)
        logits, self.caches = cached_forward(self.backend, self.config, tokens, *given_masks, self.caches)
        for row in range(ROWS):
            truth = full_forward(self.config, self.rows[row], self.rich)[-size:]
            assert_same_function(logits[row], truth, f"logits of row {row}, {len(self.rows[row])} tokens")

    @precondition(lambda self: self.longest > 0)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        spare = SLOTS if self.spare is None else self.spare + 1
        least = [written - spare if written > spare + WINDOW - 1 else 0 for written in self.written]
        lengths = [data.draw(st.integers(max(0, n), SLOTS)) for n in least]
        if self.spare is not None and any(n > 0 for n in least) and data.draw(st.booleans()):
            with pytest.raises(ValueError, match="what they may see has been overwritten"):
                self.caches[0].truncate(self.backend.array(np.array([n - 1 if n > 0 else SLOTS for n in least])))
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        cut = [cache.truncate(self.backend.array(np.array(lengths))) for cache in self.caches]
        self.caches = self.caches if self.backend.name == "torch" else cut
        assert self.caches[0].lengths.tolist() == [len(row) for row in self.rows]

    @rule(rows=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, rows: list[int]) -> None:
        self.rows, self.written = [list(self.rows[row]) for row in rows], [self.written[row] for row in rows]
        taken = [cache.reorder(self.backend.array(np.array(rows))) for cache in self.caches]
        self.caches = self.caches if self.backend.name == "torch" else taken

    @invariant()
    def a_ring_holds_no_more_than_it_must(self) -> None:
        slots = SLOTS if self.spare is None else WINDOW + self.spare
        assert all(cache.k.shape[2] == slots for cache in self.caches)

    @precondition(lambda self: not self.static)
    @rule()
    def too_much_is_refused(self) -> None:
        with pytest.raises(ValueError, match=f"slots {self.longest} are filled"):
            self.caches[0].reserve(SLOTS - self.longest + 1)


class TorchMachine(CacheMachine):
    backend = BACKENDS[0]
    sizes = st.integers(1, 6)
    spares = (None, 0, 2, 5)


class JaxMachine(CacheMachine):
    backend = BACKENDS[1]
    sizes = st.sampled_from([1, 4])
    spares = (None, 0, 4)


@pytest.mark.parametrize("machine", [TorchMachine, JaxMachine])
def test_caches_give_the_full_forward_whatever_is_appended_and_forgotten(machine: type[CacheMachine]) -> None:
    few = max(5, settings().max_examples // 2)
    run_state_machine_as_test(machine, settings=settings(max_examples=few, stateful_step_count=8))


def cached_forward(
    backend: Any, config: ModelConfig, tokens: Any, documents: Any, real: Any, caches: Any
) -> tuple[np.ndarray, Any]:
    """Logits of new tokens, and the caches."""
    tokens, documents, real = (None if value is None else backend.array(value) for value in (tokens, documents, real))
    if backend.name == "jax":
        logits, caches = compiled_forward(config)(tokens, documents, real, caches)
        return np.asarray(logits), caches
    with torch.no_grad():
        model = model_of(backend, config)
        return embedded_forward(backend, model, tokens, documents, real, caches).numpy(), caches


def full_forward(config: ModelConfig, row: list[tuple[int, int, bool]], rich: bool) -> np.ndarray:
    """Logits of all tokens of one row, in torch, without a cache."""
    tokens, documents, real = (torch.tensor(np.array(column))[None] for column in zip(*row, strict=True))
    if not rich:
        documents = real = None
    with torch.no_grad():
        return embedded_forward(BACKENDS[0], model_of(BACKENDS[0], config), tokens, documents, real)[0].numpy()


def embedded_forward(
    backend: Any, model: Any, tokens: Any, documents: Any = None, real: Any = None, caches: Any = None
) -> Any:
    context = backend.module("model.modality").ModalityContext
    modality = context(inputs_embeds=model.token_embedding(tokens), key_padding_mask=real)
    return model(modality=modality, doc_ids=documents, kv_caches=caches)


@functools.lru_cache(maxsize=4)
def compiled_forward(config: ModelConfig) -> Any:
    model = model_of(BACKENDS[1], config)
    graphdef, params, buffers = BACKENDS[1].module("model.state").split(model)
    merge = BACKENDS[1].module("model.state").merge

    @jax.jit
    def forward(params: Any, buffers: Any, tokens: Any, documents: Any, real: Any, caches: Any) -> Any:
        return embedded_forward(BACKENDS[1], merge(graphdef, params, buffers), tokens, documents, real, caches)

    return functools.partial(forward, params, buffers)
