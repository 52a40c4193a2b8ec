"""Parts that a model only reaches compiled, on several devices or with images, each by itself in both backends."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kempnerforge_jax.model import within_map
from kempnerforge_torch.model.grouped import skips_rows
from kempnerforge_torch.model.linear import _matrix_times_vector
from shared_config.schema.model import ModelConfig
from tests.parity.backends import Torch, on_both


@on_both
def test_the_expert_of_each_assignment(backend: Torch) -> None:
    """That which was chosen, if the token is there and the expert has room for it; else one more than there are."""
    dispatch = backend.module("model.dispatch")
    indices = np.array([[0, 2], [0, 1], [2, 0], [0, 1], [1, 2]])
    valid = np.array([True, True, True, True, False])
    plan = dispatch.plan_dispatch(backend.array(indices), backend.array(valid), 3, capacity=2)
    weights = backend.array(np.ones(indices.shape, np.float32))
    more = {"complete": False, "limit": 2} if backend.name == "torch" else {}
    found = dispatch.experts_of(dispatch.Routes(weights, plan, None, **more))
    assert backend.numpy(found).tolist() == [[0, 2], [0, 1], [2, 3], [3, 1], [3, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_vector_is_multiplied_in_at_least_float32(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((7, 600), (600,), (7,)))
    found = _matrix_times_vector(weight, x, bias if has_bias else None)
    truth = weight.double() @ x.double() + (bias.double() if has_bias else 0)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, truth.to(dtype))
    else:
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=600 * torch.finfo(dtype).eps)


def test_a_cpu_skips_rows_of_no_group() -> None:
    assert skips_rows(torch.device("cpu"), torch.float32)
    assert not skips_rows(torch.device("meta"), torch.bfloat16)


@on_both
def test_masks_of_keys_alone_are_those_that_tell_queries_not_apart(backend: Torch) -> None:
    build, ids = backend.module("model.mask").Mask, backend.array(np.zeros((1, 4), np.int32))
    documents: dict[str, Any] = {"query_doc_ids": ids, "key_doc_ids": ids}
    for causal, window, given in itertools.product((False, True), (None, 3), ({}, documents)):
        alone = not causal and window is None and not given
        assert build(causal=causal, window=window, **given).of_keys_alone == alone
    real = backend.array(np.ones((1, 4), bool))
    assert build(key_valid=real, allowed=real).of_keys_alone


@on_both
@pytest.mark.parametrize(("name", "takes"), [("JointDecoder", 3 * 5), ("CrossAttention", 0), ("MoT", 3 * 5)])
def test_an_image_takes_the_positions_of_its_tokens_if_it_is_in_the_stream(
    backend: Torch, name: str, takes: int
) -> None:
    strategy = getattr(backend.module("model.strategy"), f"{name}Strategy")
    wrapper = SimpleNamespace(frames_per_clip=3, tokens_per_frame=5)
    assert strategy.num_image_tokens(object.__new__(strategy), wrapper) == takes


@on_both
def test_padding_that_was_truncated_is_forgotten(backend: Torch) -> None:
    cache = backend.module("model.kv_cache").KVCache(1, 8, 1, 1)
    keys, real = backend.array(np.zeros((1, 1, 3, 1), np.float32)), backend.array(np.array([[True, True, False]]))
    updated = cache.update(keys, keys, key_padding_mask=real)
    cache = cache if backend.name == "torch" else updated[0]
    cache = cache.truncate(backend.array(np.array([2]))) or cache
    assert backend.numpy(cache.valid)[0, :3].tolist() == [True, True, False]
    cache = cache.without_padding() or cache
    assert cache.valid is None
    assert backend.numpy(cache.lengths).tolist() == [2]


def test_what_holds_within_a_map_over_devices_ends_with_it() -> None:
    routes: Any = SimpleNamespace(plan=SimpleNamespace(ends_E=jnp.zeros(4)))
    x, cache = jnp.ones((2, 3)), object()

    def routed(x: Any, given: Any) -> Any:
        assert given is routes
        return x + 1

    def found(held: int) -> tuple[float, object, float]:
        y = within_map.of_all(routed, x, routes, held)
        return float(y[0, 0]), within_map.read_besides(), float(within_map.measured(x, 2)[0, 0])

    outside = (2.0, None, 1.0)
    assert found(2) == found(4) == outside
    with (
        within_map.gathering(lambda routed, x, routes, held: 10 * routed(x, routes) + held),
        within_map.reading(cache),  # type: ignore[arg-type]
        within_map.measuring(lambda tokens, batch_size: tokens + batch_size),
    ):
        assert found(2) == (22.0, cache, 3.0)
        assert found(4) == (2.0, cache, 3.0), "who holds all of them asks no others"
    for enter in (within_map.gathering, within_map.reading, within_map.measuring):
        with pytest.raises(KeyError), enter(lambda *_: None):  # type: ignore[operator]
            raise KeyError
    assert found(2) == outside


@on_both
def test_rows_of_no_expert_may_be_left_out(backend: Torch) -> None:
    """What they would hold counts as 0, and to their tokens no gradient flows."""
    dispatch = backend.module("model.dispatch")
    indices = np.array([[0, 3], [2, 1], [3, 0], [1, 2], [2, 3]])
    valid = np.array([True, False, True, True, True])
    plan = dispatch.plan_dispatch(backend.array(indices), backend.array(valid), 4)
    held = int(plan.ends_E[-1])
    assert held == 8
    rng = np.random.default_rng(0)
    x, rows, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (held, 3), (5, 2)))
    more = {"complete": False, "limit": None} if backend.name == "torch" else {}
    routes = dispatch.Routes(backend.array(weights), plan._replace(assignment_R=plan.assignment_R[:held]), None, **more)
    places = backend.numpy(plan.row_R).reshape(2, 5).T
    kept = np.append(rows, np.zeros((2, 3), np.float32), axis=0)[places]
    found = backend.numpy(dispatch.combine(backend.array(rows), routes))
    np.testing.assert_allclose(found, (kept * weights[..., None]).sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(backend.numpy(dispatch.dispatch(backend.array(x), routes)).shape, (held, 3))
    (gradient,) = backend.gradients(lambda x: dispatch.dispatch(x, routes) * backend.array(rows), x)
    np.testing.assert_allclose(gradient, kept.sum(axis=1), rtol=1e-6)


@on_both
def test_routers_count_the_tokens_of_cached_passes_too(backend: Torch) -> None:
    config = ModelConfig(
        dim=4, n_layers=2, n_heads=1, vocab_size=11, ffn_hidden_dim=4, max_seq_len=8, num_experts=2, moe_top_k=1,
        moe_frequency=2,
    )  # fmt: skip
    model = backend.build(backend.module("model.transformer").Transformer, config, dtype="float32")
    caches = [backend.module("model.kv_cache").KVCache(2, 8, 1, 4) for _ in range(2)]

    def counts(tokens: Any, caches: Any) -> Any:
        return {layer: own.expert_counts for layer, own in model.run(tokens, kv_caches=caches).stats.items()}

    tokens = backend.array(np.arange(14, dtype=np.int32).reshape(2, 7) % 11)
    found = (counts if backend.name == "torch" else jax.jit(counts))(tokens, caches)
    assert {layer: int(counts_E.sum()) for layer, counts_E in found.items()} == {1: 14}


@on_both
def test_means_are_over_what_counts_however_little_that_is(backend: Torch) -> None:
    """Of rows in which none, one, two, or all tokens are real."""
    router, loss = backend.module("model.router"), backend.module("training.loss")
    rng, real_BS = np.random.default_rng(0), np.arange(5) < np.array([[0], [1], [2], [5]])
    shares_BSE, logits_BSV = (rng.dirichlet(np.ones(3), (4, 5)).astype(np.float32) for _ in "ab")
    labels_BS = rng.integers(0, 3, real_BS.shape)
    chosen_BSE = np.eye(3, dtype=bool)[labels_BS] & real_BS[..., None]
    bias_BE, ema_BE = (rng.random((4, 3), np.float32) for _ in "ab")

    def run(shares: Any, chosen: Any, real: Any, counts: Any, bias: Any, ema: Any, logits: Any, labels: Any) -> Any:
        return (
            router.masked_mean(shares, real, axis=1),
            router.balance_losses(shares, chosen, real),
            router.updated_bias(bias, ema, counts, 0.1, 0.9),
            [loss.mean_cross_entropy(logits[row : row + 1], labels[row : row + 1]) for row in range(4)],
        )

    given = (bias_BE, ema_BE, logits_BSV, np.where(real_BS, labels_BS, -100))
    means, losses, (biases, emas), entropies = backend.run(
        run, shares_BSE, chosen_BSE, real_BS, chosen_BSE.sum(1, dtype=np.int32), *given
    )
    for row, real in enumerate(real_BS):
        mean, share, ema, bias, entropy = np.zeros(3), np.zeros(3), ema_BE[row], bias_BE[row], 0.0
        if real.any():
            mean, share = shares_BSE[row, real].mean(axis=0), chosen_BSE[row, real].mean(axis=0)
            ema = 0.9 * ema + 0.1 * share
            bias = bias + 0.1 * (1 / 3 - ema)
            own = logits_BSV[row, real]
            entropy = (np.log(np.exp(own).sum(1)) - own[np.arange(real.sum()), labels_BS[row, real]]).mean()
        for found, expected in zip(
            (means[row], losses[row], emas[row], biases[row], entropies[row]),
            (mean, 3 * (share * mean).sum(), ema, bias, entropy),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@on_both
def test_the_entropy_of_experts_that_choose_is_a_mean_over_real_tokens(backend: Torch) -> None:
    layer = backend.build(backend.module("model.moma").ExpertChoiceMoE, 4, 6, 3, 0.5, dtype="float32")
    x, real_BT = np.random.default_rng(0).standard_normal((3, 4), np.float32), np.tri(4, 3, -1, dtype=bool)

    def run(x: Any, real: Any) -> Any:
        return [layer.run(x, one).stats.entropy for one in real], [
            layer.run(x[t : t + 1]).stats.entropy for t in range(3)
        ]

    found, each_T = backend.run(run, x, real_BT)
    np.testing.assert_allclose(found, [0.0, *np.cumsum(each_T) / np.arange(1, 4)], rtol=1e-5)
