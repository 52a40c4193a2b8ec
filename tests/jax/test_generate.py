"""What is JAX's own in generation: few programs, caches that are given away, dtypes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kempnerforge_jax.model import decode
from kempnerforge_jax.model.generate import generate, stream
from kempnerforge_jax.model.kv_cache import KVCache, SharedCaches
from kempnerforge_jax.model.request import make_request
from kempnerforge_jax.model.sampling import sample
from kempnerforge_jax.model.state import split
from kempnerforge_jax.model.transformer import Transformer
from shared_config.contract.decoding import SamplingConfig
from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=64)
PROMPTS = [[1, 2, 3], [4]]


def new_model(**options: Any) -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0), **options)


def test_few_programs_serve_all_lengths_and_options() -> None:
    model = new_model()
    decode._compiled_loop.cache_clear()
    decode._compiled_prefill.cache_clear()
    for length in (1, 2, 5, 9, 11):
        for new, temperature in ((3, 0.5), (6, 2.0)):
            tokens = generate(model, [[2] * length], new, temperature=temperature, top_k=length, seed=1)
            assert tokens.shape == (1, length + new)
    graphdef = split(model)[0]
    assert decode._compiled_loop(graphdef)._cache_size() <= 2  # caches of 16 and 32 slots
    assert decode._compiled_prefill(graphdef)._cache_size() <= 2


COMPILED: list[str] = []
"""An entry for each program that XLA compiles, once a test has asked for them."""


@functools.cache
def compilations() -> list[str]:
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: COMPILED.append(event) if "backend_compile" in event else None
    )
    return COMPILED


def test_calls_of_other_lengths_compile_nothing_at_all() -> None:
    """Nor do other numbers, prompts and ends; not even the small programs of what runs outside jit."""
    model = new_model()
    compiled = compilations()
    generate(model, PROMPTS, 6, seed=1)
    list(stream(model, PROMPTS, 6, seed=1))
    compiled.clear()
    calls: tuple[tuple[Any, int, dict[str, Any]], ...] = (
        (PROMPTS, 5, {"temperature": 0.3, "top_k": 3}),
        ([[5, 6, 7, 8], [9]], 3, {"top_p": 0.4, "eos_token_id": [1, 3, 5], "seed": 2}),
        ([[7], [1, 2]], 9, {"eos_token_id": 2, "pad_token_id": 4}),
    )
    for prompts, new, options in calls:
        assert generate(model, prompts, new, **options).shape[0] == 2
        assert len(list(stream(model, prompts, new, **options))) >= 1
    assert not compiled


def test_a_step_takes_the_memory_of_the_caches() -> None:
    model = new_model()
    request = make_request(model, PROMPTS, 3, SamplingConfig(temperature=0.0))
    graphdef, params, buffers = split(model)
    each, tokens = decode.prefill(model, request)
    caches = SharedCaches.of(each)
    uniforms, options = decode._numbers(model, request, 3)
    old = caches.layers[0][0][0]
    step = decode._compiled_step(graphdef)
    _, _, caches = step(params, buffers, caches, decode._start(tokens), None, uniforms[:, 0], options)
    assert old.is_deleted()
    assert caches.states[0].lengths.tolist() == [3, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_any_dtype(dtype: str) -> None:
    tokens = generate(new_model().to(dtype), PROMPTS, 4, seed=1)
    assert tokens.dtype == jnp.int32
    assert tokens.shape == (2, 7)


def test_generation_works_with_a_scan_turned_off_only() -> None:
    graphdef, params, buffers = split(Transformer(CONFIG.replace(n_layers=2), rngs=nnx.Rngs(0)), scan_layers=True)
    from kempnerforge_jax.model.state import merge

    with pytest.raises(ValueError, match="stacked layers can't use them"):
        generate(merge(graphdef, params, buffers), PROMPTS, 2)


def test_sample_needs_numbers() -> None:
    with pytest.raises(ValueError, match="uniforms = None, key = None"):
        sample(jnp.zeros((1, 3)))
    assert sample(jnp.zeros((2, 3)), key=jax.random.key(0)).shape == (2,)


def test_pipeline_stages_are_refused() -> None:
    stage = new_model()
    stage.output_head = None
    with pytest.raises(ValueError, match="pipeline stage"):
        generate(stage, PROMPTS, 2)


@pytest.mark.parametrize("window", [None, 2])
def test_all_of_a_cache_lies_where_it_is_told_to(window: int | None) -> None:
    """The one device of a mesh is another place than the device by itself."""
    place: Any = NamedSharding(Mesh(np.array(jax.devices("cpu")[:1]), ("x",)), PartitionSpec())
    cache = KVCache(2, 5, 1, 4, device=place, sliding_window=window)
    arrays = [cache.k, cache.v, cache.lengths, *(() if window is None else (cache.oldest,))]
    assert [array is not None and array.sharding for array in arrays] == [place] * len(arrays)


@pytest.mark.parametrize("new", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("ends", [None, [0, 3, 5, 7, 11, 13, 17]])
def test_steps_taken_together_draw_the_same(new: int, ends: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are taken at a time, and wherever a row ends within them."""
    model, options = new_model(), {"temperature": 1.5, "eos_token_id": ends, "pad_token_id": 18}

    def drawn() -> list[np.ndarray]:
        return [np.asarray(generate(model, PROMPTS, new, seed=seed, **options)) for seed in range(4)]

    expected = drawn()
    monkeypatch.setattr(decode, "_strides", lambda: (4, 1))
    decode._compiled_loop.cache_clear()
    found = drawn()
    decode._compiled_loop.cache_clear()
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("new", "ends", "most"), [(5, None, 5), (9, None, 9), (3, None, 3), (9, list(range(19)), 4)])
def test_no_step_is_taken_in_vain(new: int, ends: list[int] | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of the four in which the last row ends."""
    taken, step = [], decode._step

    def counted(*inputs: Any) -> Any:
        jax.debug.callback(lambda: taken.append(1))
        return step(*inputs)

    monkeypatch.setattr(decode, "_step", counted)
    monkeypatch.setattr(decode, "_strides", lambda: (4, 1))
    decode._compiled_loop.cache_clear()
    generate(new_model(), PROMPTS, new, seed=1, temperature=1.0, eos_token_id=ends)
    jax.effects_barrier()
    decode._compiled_loop.cache_clear()
    assert len(taken) == most


def test_a_gpu_is_asked_once_for_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode._strides() == (1,)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert decode._strides() == (decode.STEPS_TOGETHER, 1)
