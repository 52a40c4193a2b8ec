"""The ends of ranges: numbers beyond 16 bits, scores that underflow, runs of one step."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
import torch

from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from tests.oracle.router import SCORE_EPS
from tests.parity.backends import Torch, on_both

MANY = 40_000
"""More than an integer of 16 bits holds."""


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@on_both
def test_packed_experts_take_many_rows(backend: Torch) -> None:
    forward = backend.module("model.experts").grouped_expert_forward_packed
    weights = [np.array([[[1.0]], [[2.0]]])] * 2
    found = backend.run(
        lambda x, up, down: forward(x, [MANY - 1, 1], up, down, None, lambda hidden: hidden),
        np.ones((MANY, 1)),
        *weights,
    )
    assert found[[0, -2, -1], 0].tolist() == [1, 1, 4]


@on_both
@pytest.mark.parametrize("experts", [2**15 - 1, 2**15, MANY])
def test_many_experts_have_numbers_of_their_own(backend: Torch, experts: int) -> None:
    """Tokens that have none come after those of the last."""
    plan = backend.module("model.dispatch").plan_dispatch
    chosen, valid = np.array([[experts - 1], [0], [0], [experts - 1]]), np.array([True, False, True, True])
    found = plan(backend.array(chosen), backend.array(valid), experts, capacity=1)
    assert backend.numpy(found.assignment_R)[:2].tolist() == [2, 0]
    assert backend.numpy(found.ends_E)[[0, 1, -2, -1]].tolist() == [1, 1, 1, 2]


@on_both
@pytest.mark.parametrize("kind", ["SoftmaxTopKRouter", "SigmoidTopKRouter"])
def test_routers_count_many_tokens(backend: Torch, kind: str) -> None:
    router = backend.build(getattr(backend.module("model.router"), kind), 1, 2, 1)
    biases = {"expert_bias": np.zeros(2), "expert_ema": np.zeros(2)} if kind.startswith("Sigmoid") else {}
    backend.module("model.state").set_state(router, {"gate.weight": np.array([[1.0], [0.0]]), **biases})
    counts = backend.run(lambda x: router(x, return_stats=True)[2].expert_counts, np.ones((MANY, 1)))
    assert counts.dtype == np.int32
    assert counts.tolist() == [MANY, 0]


@on_both
def test_losses_count_many_labels(backend: Torch) -> None:
    labels = np.zeros((1, MANY), np.int32)
    total, count = backend.run(backend.module("training.loss").cross_entropy, np.zeros((1, MANY, 2)), labels)
    assert (int(count), float(total)) == (MANY, pytest.approx(MANY * np.log(2)))
    assert count.dtype == ("int64" if backend.name == "torch" else "int32")


@on_both
def test_caches_count_many_tokens(backend: Torch) -> None:
    cache = backend.module("model.kv_cache").KVCache(2, MANY + 8, 1, 1)
    keys = backend.array(np.zeros((2, 1, MANY, 1), np.float32))
    updated = cache.update(keys, keys)
    cache = cache if backend.name == "torch" else updated[0]
    for lengths in ([2**31 - 1, 2**31 - 1], [MANY - 1, 3]):
        cache = cache.truncate(backend.array(np.array(lengths))) or cache
    with pytest.raises(ValueError, match=r"lengths = 2147483648: ids must be in \[0, 2147483648\)"):
        cache.truncate(backend.array(np.array([0, 2**31])))
    assert backend.numpy(cache.lengths).dtype == np.int32
    assert backend.numpy(cache.positions(2)).tolist() == [[MANY - 1, MANY], [3, 4]]
    if backend.name == "jax":
        assert cache.positions(2).dtype == "int32"


@on_both
@pytest.mark.parametrize("logit", [-45.0, -46.0, -47.0, -700.0, -2000.0])
def test_scores_that_underflow_are_divided_by_no_less_than_an_epsilon(backend: Torch, logit: float) -> None:
    """Weights and shares of sigmoid routers are score / (sum + 1e-20)."""
    router = backend.build(backend.module("model.router").SigmoidTopKRouter, 1, 2, 2)
    backend.module("model.state").set_state(
        router, {"gate.weight": np.ones((2, 1)), "expert_bias": np.zeros(2), "expert_ema": np.zeros(2)}
    )
    weights, _, stats = backend.run(lambda x: router(x, return_stats=True), np.full((1, 1), logit))
    score = float(np.exp(logit))
    share = score / (2 * score + SCORE_EPS)
    np.testing.assert_allclose(weights, [[share, share]], rtol=1e-12)
    entropy = 0.0 if share == 0 else -2 * share * np.log(share)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-12)


@on_both
@pytest.mark.parametrize("logit", [-46.0, -80.0])
def test_experts_choose_by_scores_that_underflow(backend: Torch, logit: float) -> None:
    choice = backend.module("model.expert_choice").ExpertChoiceMoE
    moe = backend.build(choice, 1, 1, 2, 0.5, gumbel_noise=False)
    state = backend.module("model.state")
    state.set_state(moe, {**state.get_state(moe), "router.gate.weight": np.ones((2, 1))})
    stats = backend.run(lambda x: moe(x, return_stats=True)[1], np.full((2, 1), logit))
    share = np.exp(logit) / (2 * np.exp(logit) + SCORE_EPS)
    np.testing.assert_allclose(stats.entropy, -2 * share * np.log(share), rtol=1e-9)


@on_both
def test_many_tokens_have_positions_of_their_own(backend: Torch) -> None:
    cache = backend.module("model.kv_cache").KVCache(2, MANY + 1, 1, 2)
    positions = backend.numpy(cache.state.positions(MANY))
    np.testing.assert_array_equal(np.broadcast_to(positions, (2, MANY)), np.tile(np.arange(MANY), (2, 1)))


@on_both
def test_progress_of_training_is_a_share_of_its_steps(backend: Torch) -> None:
    progress = backend.module("model.router").training_progress
    assert [progress(step, 4) for step in (0, 1, 4, 5)] == [0.0, 0.25, 1.0, 1.0]
    assert [progress(step, 1) for step in (0, 1, 2)] == [0.0, 1.0, 1.0]
    assert progress(0, 0) == 1.0


@on_both
def test_experts_take_many_tokens(backend: Torch) -> None:
    moe = backend.build(backend.module("model.moe").build_moe, 1, 1, 2, 1, "relu", capacity_factor=1.0)
    weights = {"router.gate.weight": np.array([[1.0], [-1.0]])}
    for expert, slope in enumerate((2.0, -3.0)):
        weights |= {f"experts.{expert}.up_proj.weight": np.array([[np.sign(slope)]])}
        weights |= {f"experts.{expert}.down_proj.weight": np.array([[slope]])}
    backend.module("model.state").set_state(moe, weights)
    x = np.where(np.arange(MANY) < MANY - 10, 1.0, -1.0).reshape(1, MANY, 1)
    members = np.arange(MANY).reshape(1, MANY) >= 2_000
    free, stats = backend.run(lambda x: moe(x, limit_capacity=False, return_stats=True), x)
    np.testing.assert_array_equal(free, np.where(x > 0, 2.0, -3.0))
    assert (stats.expert_counts.tolist(), int(stats.dropped)) == ([MANY - 10, 10], 0)
    found, stats = backend.run(lambda x: moe(x, return_stats=True), x)
    assert (found != 0).sum() == MANY // 2 + 10
    assert int(stats.dropped) == MANY - 10 - MANY // 2
    _, stats = backend.run(lambda x, members: moe(x, members=members, return_stats=True), x, members)
    assert int(stats.dropped) == MANY - 2_010 - (MANY - 2_000) // 2


@on_both
def test_experts_choose_among_many_tokens(backend: Torch) -> None:
    choice = backend.module("model.expert_choice").ExpertChoiceMoE
    x, valid = np.ones((MANY, 1)), np.arange(MANY) < MANY - 1
    for factor, taken in ((1.0, MANY - 1), (0.125, MANY // 8)):
        moe = backend.build(choice, 1, 1, 2, factor, gumbel_noise=False)
        stats = backend.run(lambda x, valid, moe=moe: moe(x, valid, return_stats=True)[1], x, valid)
        assert (stats.expert_counts.tolist(), int(stats.dropped)) == ([taken] * 2, MANY - 1 - taken)
        assert stats.expert_counts.dtype == stats.dropped.dtype == np.int32


@on_both
def test_a_token_is_drawn_from_a_large_vocabulary(backend: Torch) -> None:
    sample, logits = backend.module("model.sampling").sample, np.zeros((1, MANY))
    logits[0, -1] = 50.0
    for temperature in (0.0, 1.0):
        token = backend.run(lambda x, u, t=temperature: sample(x, t, uniforms=u), logits, np.array([0.5]))
        assert (token.tolist(), token.dtype) == ([MANY - 1], "int64" if backend.name == "torch" else "int32")


@on_both
def test_narrow_ids_name_rows_of_a_large_table(backend: Torch) -> None:
    embedding = backend.build(backend.module("model.embedding").TokenEmbedding, MANY, 1)
    ids = np.array([[0, 2**15 - 1]], np.int16)
    assert np.isfinite(backend.run(embedding, ids)).all()


@on_both
def test_updates_are_counted_beyond_any_narrow_number(backend: Torch) -> None:
    optimizer, config = backend.module("training.optimizer"), OptimizerConfig()
    table = {"norm": ParameterSpec((2,), Constant(1.0), (None,))}
    moments = {f"{moment}.norm": np.full(2, 0.5, np.float32) for moment in ("m", "v")}
    given = backend.array(np.ones(2, np.float32))
    if backend.name == "torch":
        norm = torch.nn.Parameter(given)
        norm.grad = torch.ones_like(norm)
        built = optimizer.build_optimizer({"norm": norm}, table, config)
        optimizer.set_optimizer_state(built, {"norm": norm}, moments, MANY)
        optimizer.update(built, Rates(0.25, 0.0))
        state, moved = optimizer.get_optimizer_state(built, {"norm": norm}), norm
    else:
        built = optimizer.build_optimizer({"norm": given}, table, config)
        held = optimizer.set_optimizer_state(built.init({"norm": given}), moments, MANY)
        values, held = optimizer.update(built, {"norm": given}, held, {"norm": given}, Rates(0.25, 0.0))
        state, moved = optimizer.get_optimizer_state(held), values["norm"]
    count = backend.numpy(state["t.norm"])
    assert (int(count), count.dtype) == (MANY + 1, np.int32)
    m, v = (beta * 0.5 + (1 - beta) for beta in config.betas)
    np.testing.assert_allclose(backend.numpy(moved), 1 - 0.25 * m / (np.sqrt(v) + config.eps), rtol=1e-5)
    assert {backend.numpy(state[name]).dtype for name in ("m.norm", "v.norm")} == {np.dtype(np.float32)}


@on_both
def test_ids_of_a_large_vocabulary_are_generated_end_rows_and_pad_them(backend: Torch) -> None:
    """A model whose blocks add nothing: token 1 is followed by the last one of the vocabulary, token 2 by token 5."""
    config = ModelConfig(dim=2, n_layers=1, n_heads=1, vocab_size=MANY, ffn_hidden_dim=1, max_seq_len=8)
    weights = {name: np.zeros(spec.shape, np.float32) for name, spec in parameter_table(config).items()}
    weights["norm.weight"] += 1
    weights["token_embedding.embedding.weight"][[1, 2]] = [[1, 1], [-1, -1]]
    weights["output_head.proj.weight"][[MANY - 1, 5]] = [[30, 30], [-30, -30]]
    model = backend.model(config, weights, "float32")
    found = backend.module("model.generate").generate(
        model,
        [[1], [2]],
        2,
        top_k=MANY - 1,
        eos_token_id=MANY - 1,
        pad_token_id=2**31 - 1,
        uniforms=np.full((2, 2), 0.5),
    )
    tokens = backend.numpy(found)
    assert tokens[0].tolist() == [1, MANY - 1, 2**31 - 1]
    assert tokens[1, :2].tolist() == [2, 5]
    assert abs(tokens[1, 2] - MANY // 2) < 16, "of equal tokens, the one in the middle"


@on_both
def test_caches_begin_empty_in_float32(backend: Torch) -> None:
    cache = backend.module("model.kv_cache").KVCache(2, 5, 1, 3)
    for held in (cache.k, cache.v):
        assert (backend.numpy(held).dtype, tuple(held.shape)) == (np.float32, (2, 1, 5, 3))
        assert not backend.numpy(held).any()
    assert (backend.numpy(cache.lengths).tolist(), backend.numpy(cache.lengths).dtype) == ([0, 0], np.int32)
    assert (cache.slots, cache.max_seq_len, cache.seq_len, cache.image_tokens) == (5, 5, 0, 0)
    assert cache.sliding_window is cache.valid is cache.doc_ids is cache.oldest is None


@on_both
def test_more_tokens_may_be_asked_for_than_come(backend: Torch) -> None:
    config = ModelConfig(dim=2, n_layers=1, n_heads=1, vocab_size=4, ffn_hidden_dim=1, max_seq_len=MANY + 8)
    model = backend.build(backend.module("model.transformer").Transformer, config, dtype="float32")
    found = backend.module("model.generate").generate(model, [[1, 2]], MANY, temperature=0.0, eos_token_id=[0, 1, 2, 3])
    assert backend.numpy(found).shape == (1, 3)
