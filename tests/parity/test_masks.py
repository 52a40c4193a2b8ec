"""Masks as data: what their facts say in one tensor, and how often that tensor is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig
from tests.parity import mask_checks as checks
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.parity.kernel_checks import HOPPER, gpu
from tests.parity.precision_jax import _jaxprs

LAYERS, LENGTH = 3, 24
CONFIG = ModelConfig(dim=16, n_layers=LAYERS, n_heads=2, vocab_size=11, ffn_hidden_dim=8, max_seq_len=LENGTH)
TOKENS = np.arange(2 * LENGTH).reshape(2, LENGTH) % CONFIG.vocab_size
DOCUMENTS = np.repeat([[0, 1, 2]], 2, axis=0).repeat(LENGTH // 3, axis=1)
REAL = np.arange(LENGTH)[None] < [[LENGTH], [LENGTH - 5]]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@on_both
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), facts=st.integers(0, 63))
def test_the_dense_form_of_a_mask_is_what_its_facts_say(backend: Torch, seed: int, facts: int) -> None:
    checks.compare_facts(backend, *checks.drawn_fields(np.random.default_rng(seed), facts))


@st.composite
def chunks(draw: st.DrawFn) -> list[checks.Chunk]:
    """Up to 14 tokens; what is forgotten is at most what a ring has to spare, and one."""
    sizes, documents = draw(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3)), draw(st.integers(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    padded = draw(st.sampled_from((0.7, 2)))
    return [
        checks.Chunk(
            rng.integers(0, 1 + documents, (2, size)),
            rng.random((2, size)) < padded,
            (int(rng.integers(0, min(size, checks.SPARE + 1))), int(rng.integers(0, min(size, checks.SPARE + 1)))),
        )
        for size in sizes
    ]


@on_both
@settings(max_examples=20, deadline=None)
@given(
    chunks=chunks(),
    window=st.none() | st.integers(1, checks.WINDOW),
    kind=st.integers(0, 3),
    prefix=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_what_a_cache_shows_is_what_its_tokens_say(
    backend: Torch, chunks: list[checks.Chunk], window: int | None, kind: int, prefix: tuple[int, int] | None
) -> None:
    """A prefix ends within the first chunk, before what is forgotten of it."""
    kinds = checks.CACHES[backend.name]
    options = kinds[kind % len(kinds)]
    window = window or checks.WINDOW if "sliding_window" in options else window
    kept = [chunks[0].documents.shape[1] - lost for lost in chunks[0].forgotten]
    within = None if prefix is None else (min(prefix[0], kept[0]), min(prefix[1], kept[1]))
    checks.compare_cache(backend, options, chunks, window, within)


@pytest.mark.parametrize("check", [checks.check_facts, checks.check_caches])
@on_both
def test_masks_that_every_run_compares(backend: Torch, check: Any) -> None:
    check(backend.name)


@on_both
def test_documents_are_those_of_queries_and_of_keys(backend: Torch) -> None:
    ids, masks = backend.array(np.zeros((1, 2), np.int32)), backend.module("model.mask")
    for missing, other in (("query", "key"), ("key", "query")):
        with pytest.raises(ValueError, match=f"{missing}_doc_ids = None: must be given, as {other}_doc_ids are"):
            masks.Mask(**{f"{other}_doc_ids": ids})


@on_both
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(9,), (1,), (5, 9), (1, 9), (5, 1), (2, 1, 5, 9), (2, 1, 1, 9), (1, 3, 5, 1), (3, 5, 9)]),
    query=st.integers(0, 3), key=st.integers(0, 6), size=st.integers(1, 3),
)  # fmt: skip
def test_a_part_of_what_is_allowed_is_that_of_its_queries_and_keys(
    backend: Torch, shape: tuple[int, ...], query: int, key: int, size: int
) -> None:
    """However few axes say it: 2 of the queries, ``size`` of the keys."""
    allowed = np.random.default_rng(0).random(shape) < 0.5
    masks = backend.module("model.mask")
    found = backend.numpy(masks.part(masks.Mask(allowed=backend.array(allowed)), query, 2, key, size).allowed)
    whole = np.broadcast_to(allowed, (2, 3, 5, 9))[..., query : query + 2, key : key + size]
    np.testing.assert_array_equal(np.broadcast_to(found, whole.shape), whole)


@on_both
def test_positions_of_more_keys_than_a_short_integer_counts(backend: Torch) -> None:
    masks = backend.module("model.mask")
    whole = masks.with_positions(masks.CAUSAL, 3, 70_000)
    np.testing.assert_array_equal(backend.numpy(whole.key_positions), np.arange(70_000))
    np.testing.assert_array_equal(backend.numpy(whole.query_positions), [69_997, 69_998, 69_999])


@on_both
def test_attention_alone_looks_at_dense_masks(backend: Torch) -> None:
    names = r"\.dense\b|\.allowed\b|\bdense_mask\b|\bwith_dense\b"
    folder = Path(backend.module("model.mask").__file__).parents[1]
    files = {file.name for file in folder.rglob("*.py") if re.search(names, file.read_text(encoding="utf-8"))}
    assert files == {"mask.py", "attention.py"}


@on_both
def test_a_prefix_is_one_of_causal_attention(backend: Torch) -> None:
    masks = backend.module("model.mask")
    with pytest.raises(ValueError, match="prefix_lengths is given: must be None unless causal = True"):
        masks.Mask(prefix_lengths=backend.array(np.array([1])))


# How often the dense form is built


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every dense form that is built."""
    found: list[str] = []
    for backend in BACKENDS:
        masks = backend.module("model.mask")
        build = masks.dense_mask
        monkeypatch.setattr(
            masks, "dense_mask", lambda *of, b=build, name=backend.name: (found.append(name), b(*of))[1]
        )
    return found


def model_of(backend: Torch, config: ModelConfig = CONFIG, vlm: Any = None) -> Any:
    options = {} if vlm is None else {"vlm_config": vlm}
    return backend.model(config, validation_weights(parameter_table(config, vlm), 0), **options)


@on_both
@pytest.mark.parametrize("facts", ["causal", "window", "documents", "padding", "mixture"])
def test_a_forward_builds_one_dense_mask_for_all_layers(backend: Torch, facts: str, built: list[str]) -> None:
    """And none where a kernel takes the facts: on a CPU JAX has no such kernel, torch one for plain causality."""
    config = CONFIG.replace(sliding_window=3) if facts == "window" else CONFIG
    model = model_of(backend, config, MoTConfig(max_text_len=LENGTH) if facts == "mixture" else None)
    context = backend.module("model.modality").ModalityContext
    documents = backend.array(DOCUMENTS) if facts in ("documents", "mixture") else None
    modality = context(key_padding_mask=backend.array(REAL)) if facts == "padding" else None
    backend.run(lambda tokens: model.run(tokens, modality=modality, doc_ids=documents).logits, TOKENS)
    assert len(built) == (0 if backend.name == "torch" and facts == "causal" else 1)


@on_both
def test_a_decode_step_builds_one_dense_mask_for_all_layers(backend: Torch, built: list[str]) -> None:
    model, cache = model_of(backend), backend.module("model.attention").KVCache
    caches = [cache(2, LENGTH, 2, 8, model.norm.weight.dtype) for _ in range(LAYERS)]
    counts = []
    for step, size in enumerate((4, 1, 2, 1)):
        tokens = backend.array(TOKENS[:, :size])
        caches = model.run(tokens, kv_caches=caches).kv_caches if backend.name == "jax" else run(model, tokens, caches)
        if step == 1:
            caches = [one.truncate(backend.array(np.array([5, 3]))) or one for one in caches]
        counts.append(len(built))
    assert counts == ([0, 0, 1, 2] if backend.name == "torch" else [1, 2, 3, 4])


def run(model: Any, tokens: Any, caches: list[Any]) -> list[Any]:
    model.run(tokens, kv_caches=caches)
    return caches


def comparisons(jaxpr: Any, within: str = "") -> Iterator[tuple[str, str]]:
    """Of each comparison of all queries with all keys, and of each operation on such, what it is in (a loop, a
    checkpoint) and its name. Those of scores, which have heads, are left out, and branches, which are chosen when a
    program is lowered.
    """
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        shapes = [variable.aval.shape for variable in eqn.outvars if variable.aval.dtype == bool]
        pairs = any(shape[-2:] == (LENGTH, LENGTH) and CONFIG.n_heads not in shape[:-2] for shape in shapes)
        if pairs and name in ("lt", "le", "gt", "ge", "eq", "and", "or", "not"):
            yield within, name
        if name != "cond":
            for inner in _jaxprs(eqn.params):
                yield from comparisons(inner, within if name in ("jit", "pjit") else name)


def program_of(dtype: str, **options: Any) -> Any:
    """The gradient of a model's logits by the stream that enters its layers."""
    backend = BACKENDS[1]
    model, context = model_of(backend).to(dtype), backend.module("model.modality").ModalityContext

    def total(stream: Any) -> Any:
        return model.run(modality=context(inputs_embeds=stream), **options).logits.sum()

    return jax.make_jaxpr(jax.grad(total))(jnp.ones((1, LENGTH, CONFIG.dim), dtype)).jaxpr


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_layers_share_the_dense_mask_of_a_program(scan_layers: bool, remat: bool, built: list[str]) -> None:
    """Nothing is compared again in a loop over layers, nor when activations are computed again."""
    program = program_of("float64", scan_layers=scan_layers, remat=remat)
    assert list(comparisons(program)) == [("", "le")]
    assert len(built) == 1
    with gpu(HOPPER):
        assert list(comparisons(program_of("bfloat16", scan_layers=scan_layers, remat=remat))) == []
