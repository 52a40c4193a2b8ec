"""What "the same" means where frameworks differ by default: one test for each rule of the semantics contract.

Shapes: B batch, S sequence, D model dim, V vocabulary, E experts, H heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.extend.core import Literal
from scipy import special
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.parity.validation import validation_weights
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.scheduler import SchedulerConfig
from shared_config.schema.training import TrainConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig
from tests.oracle.attention import attend as oracle_attend
from tests.oracle.loss import cross_entropy as oracle_cross_entropy
from tests.oracle.mlp import ACTIVATIONS as ORACLE_ACTIVATIONS
from tests.oracle.optimizer import adamw_step, global_norm, initial_state
from tests.oracle.training import loss_and_gradients
from tests.oracle.transformer import transformer as oracle_transformer
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.tolerance import assert_same_function, assert_ulp

DENSE = ModelConfig(
    dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=16,
    qk_norm=True, attention_bias=True,
)  # fmt: skip
MIXED = DENSE.replace(
    n_kv_heads=6, num_experts=3, moe_router="sigmoid_topk", moe_shared_experts=1, moe_capacity_factor=0.8,
    moe_frequency=2, moe_sequence_aux_loss_weight=0.1, moe_router_z_loss_weight=0.1, activation="gelu",
    norm_type="layernorm",
)  # fmt: skip
VLMS = (None, CrossAttentionConfig(cross_attention_every_n_layers=1), MoTConfig(), MoMaConfig())
JOB = JobConfig(
    model=DENSE.replace(n_layers=1),
    train=TrainConfig(seq_len=9, batch_size=2, max_steps=10, mixed_precision="fp32", compile_model=False),
    scheduler=SchedulerConfig(warmup_steps=4),
    optimizer=OptimizerConfig(lr=0.01),
)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@functools.lru_cache(maxsize=8)
def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return validation_weights(parameter_table(config), seed=3)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tokens_of(batch: int = 2, length: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, DENSE.vocab_size, (batch, length), dtype=np.int32)


def rounded(value: np.ndarray) -> np.ndarray:
    """To bfloat16."""
    return value.astype(ml_dtypes.bfloat16)


# Ties


@on_both
def test_equal_scores_go_to_the_lowest_index(backend: Torch) -> None:
    scores = np.array(list(itertools.product([-1.0, -0.0, 0.0, 0.5], repeat=5)))
    chosen = backend.run(lambda scores: backend.module("model.router").top_k_lowest_first(scores, 3), scores)
    np.testing.assert_array_equal(chosen, [sorted(range(5), key=lambda i, row=row: -row[i])[:3] for row in scores])


@on_both
@pytest.mark.parametrize("kind", ["SoftmaxTopKRouter", "SigmoidTopKRouter"])
def test_a_router_that_likes_all_experts_alike_takes_the_first(backend: Torch, kind: str) -> None:
    router = backend.build(getattr(backend.module("model.router"), kind), 8, 5, 3)
    backend.module("model.state").set_state(router, backend.numpy(zeros_like_state(backend, router)))
    _, indices = backend.run(router, normal(4, 8))
    assert indices.tolist() == [[0, 1, 2]] * 4


@on_both
def test_equal_logits_are_sampled_by_index(backend: Torch) -> None:
    """Greedily the first; among the k best the first k, in their order whatever the sign of a zero."""
    sample = backend.module("model.generate").sample
    logits = np.array([[-1.0, 0.0, -0.0, 0.0], [2.0, 2.0, -3.0, 2.0]])
    assert backend.run(lambda x: sample(x, temperature=0), logits).tolist() == [1, 0]
    for uniform, chosen in ((0.2, [1, 0]), (0.8, [2, 1])):
        drawn = backend.run(lambda x, u: sample(x, top_k=2, uniforms=u), logits, np.full(2, uniform))
        assert drawn.tolist() == chosen


# Attention's masks


@on_both
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_query_that_may_see_no_key_gives_zero_and_no_gradient(backend: Torch, dtype: str) -> None:
    mask = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    q, k, v = (normal(2, 4 if i == 0 else 2, 3 + (i > 0), 6, seed=i) for i in range(3))
    attend = backend.module("model.attention").attend
    arrays = [array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for array in (q, k, v)]
    masked = functools.partial(lambda m, *qkv: attend(*qkv, backend.array(m)), mask)
    out = backend.run(masked, *arrays)
    assert not out[:, :, 1].any()
    assert np.abs(out[:, :, [0, 2]].astype(np.float64)).min() > 0
    dq, dk, dv = backend.gradients(masked, *arrays)
    assert not dq[:, :, 1].any()
    assert dq[:, :, 2].any()
    assert all(np.isfinite(gradient.astype(np.float64)).all() for gradient in (dq, dk, dv))
    nothing = functools.partial(lambda m, *qkv: attend(*qkv, backend.array(m)), np.zeros_like(mask))
    assert not any(gradient.any() for gradient in backend.gradients(nothing, *arrays))


@on_both
@pytest.mark.parametrize("queries", [1, 3, 5])
def test_what_a_mask_is_called_and_what_it_allows_are_the_same(backend: Torch, queries: int) -> None:
    """Facts, their dense form, what they allow, and a plain array: the same output and the same probabilities."""
    attention, masks = backend.module("model.attention"), backend.module("model.mask")
    q, k, v = normal(2, 4, queries, 6), normal(2, 2, 5, 6, seed=1), normal(2, 2, 5, 6, seed=2)
    causal = np.tril(np.ones((queries, 5), bool), 5 - queries)
    for kind, allowed in ((masks.CAUSAL, causal), (masks.FULL, np.ones_like(causal))):

        def outputs(q: Any, k: Any, v: Any, kind: Any = kind, allowed: Any = allowed) -> Any:
            array = backend.array(allowed)[None, None]
            forms = (kind, masks.with_dense(kind, queries, 5), masks.Mask(allowed=array), array)
            return [(attention.attend(q, k, v, form), attention.attention_weights(q, k, form)) for form in forms]

        named, *dense = backend.run(outputs, q, k, v)
        for found in dense:
            assert_same_function(found[0], named[0], "attend")
            assert_same_function(found[1], named[1], "probabilities")
        assert (np.asarray(named[1]) > 0).all(axis=(0, 1)).tolist() == allowed.tolist()


@on_both
@pytest.mark.parametrize("queries", [1, 3, 5])
def test_plain_causal_is_aligned_to_the_last_key(backend: Torch, queries: int) -> None:
    q, k, v = normal(2, 4, queries, 6), normal(2, 2, 5, 6, seed=1), normal(2, 2, 5, 6, seed=2)
    allowed = np.tril(np.ones((queries, 5), bool), 5 - queries)
    expected, _ = oracle_attend(q, k, v, np.broadcast_to(allowed, (2, queries, 5)))
    assert_same_function(backend.run(backend.module("model.attention").attend, q, k, v), expected, "attend")


# Token ids and labels


@on_both
@pytest.mark.parametrize("bad", [-1, -100, DENSE.vocab_size, 2**31 - 1])
def test_token_ids_outside_the_vocabulary_are_errors_on_the_host(backend: Torch, bad: int) -> None:
    model, tokens = backend.model(DENSE, weights_of(DENSE)), tokens_of()
    tokens[1, 4] = bad
    with pytest.raises(ValueError, match=rf"tokens = {bad}: ids must be in \[0, 37\); 1 of 18 are not"):
        model(backend.array(tokens))


@pytest.mark.parametrize("bad", [-1, -37, DENSE.vocab_size, 2**31 - 1])
def test_token_ids_outside_the_vocabulary_are_nan_inside_jit(bad: int) -> None:
    jax_backend = BACKENDS[1]
    model, tokens = jax_backend.model(DENSE, weights_of(DENSE)), tokens_of()
    clean = jax_backend.run(model, tokens)
    tokens[1, 4] = bad
    embedded, logits = jax_backend.run(model.token_embedding, tokens), jax_backend.run(model, tokens)
    outside = tokens == bad
    np.testing.assert_array_equal(np.isnan(embedded).any(-1), outside)
    np.testing.assert_array_equal(np.isnan(embedded).all(-1), outside)
    assert np.isnan(logits[1, 4:]).all()
    np.testing.assert_array_equal(logits[0], clean[0])


@on_both
def test_ignored_labels_count_neither_in_the_sum_nor_in_the_number(backend: Torch) -> None:
    logits, labels = normal(2, 5, 7), np.array([[-100, 3, 0, 6, -100], [-100, -100, 2, -100, -100]])
    loss = backend.module("training.loss")
    total, count = backend.run(loss.cross_entropy, logits, labels)
    mean = backend.run(loss.mean_cross_entropy, logits, labels)
    truth = oracle_cross_entropy(logits, labels)
    assert count == 4
    assert_same_function(mean, truth, "mean")
    assert_same_function(total, 4 * truth, "sum")
    (gradient,) = backend.gradients(lambda logits: loss.mean_cross_entropy(logits, backend.array(labels)), logits)
    assert not gradient[labels == -100].any()
    assert gradient[labels != -100].all()


@on_both
def test_no_label_at_all_is_a_loss_of_zero_with_a_graph(backend: Torch) -> None:
    logits, labels = normal(2, 5, 7), np.full((2, 5), -100)
    mean = backend.module("training.loss").mean_cross_entropy
    assert backend.run(mean, logits, labels) == 0
    (gradient,) = backend.gradients(lambda logits: mean(logits, backend.array(labels)), logits)
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))


@on_both
@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1])
def test_labels_outside_the_vocabulary_never_pass_for_others(backend: Torch, bad: int) -> None:
    logits, labels = normal(1, 2, 7), np.array([[bad, 3]])
    cross_entropy = backend.module("training.loss").cross_entropy
    if backend.name == "jax":
        assert np.isnan(backend.run(cross_entropy, logits, labels)[0])
    else:
        with pytest.raises(ValueError, match=f"labels = {bad}"):
            backend.run(cross_entropy, logits, labels)


@on_both
def test_a_step_has_the_mean_over_the_labels_of_all_micro_batches(backend: Torch) -> None:
    step = first_step(backend.name)
    counts = [int((batch["labels"] != -100).sum()) for batch in step.batches]
    assert counts[0] != counts[1]
    assert step.metrics["tokens"] == sum(counts)
    whole = {name: np.concatenate([batch[name] for batch in step.batches]) for name in ("tokens", "labels")}
    loss, gradients = loss_and_gradients(step.before, JOB.model, whole["tokens"], whole["labels"])
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert step.metrics["grad_norm"] == pytest.approx(global_norm(gradients), rel=1e-12)


# Rounding


def gelu(x: np.ndarray) -> np.ndarray:
    return x * special.erfc(-x / math.sqrt(2)) / 2


@on_both
@pytest.mark.parametrize(("name", "truth"), ORACLE_ACTIVATIONS.items())
def test_activations_in_bfloat16_are_rounded_once(backend: Torch, name: str, truth: Any) -> None:
    """Above -3, below which 1 + erf(x) has lost digits of float32."""
    x = rounded(np.concatenate([np.maximum(normal(4096) * 3, -3), [0.0, 40.0]]))
    function = backend.module("model.vision").TOWER_ACTIVATIONS[name]
    assert_rounded_once(backend.run(function, x), truth(x.astype(np.float64)))


@on_both
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_norms_in_bfloat16_are_rounded_once(backend: Torch, norm_type: str) -> None:
    names = ["weight"] if norm_type == "rmsnorm" else ["weight", "bias"]
    weights = {name: rounded(normal(64, seed=i)) for i, name in enumerate(names)}
    norm = backend.build(backend.module("model.norm").build_norm, norm_type, 64, 1e-5, dtype="bfloat16")
    backend.module("model.state").set_state(norm, weights)
    x = rounded(normal(64, 64) * 3)
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    assert_rounded_once(backend.run(norm, x), norm_truth(x.astype(np.float64), wide, 1e-5))


@on_both
def test_rotary_positions_in_bfloat16_are_rounded_once(backend: Torch) -> None:
    position = backend.module("model.position")
    cos, sin = (backend.numpy(table) for table in position.precompute_rope_frequencies(8, 64))
    x = rounded(normal(4, 64, 8))
    x1, x2 = np.split(x.astype(np.float64), 2, axis=-1)
    truth = np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    assert_rounded_once(backend.run(position.apply_rope, x, cos, sin), truth)


@on_both
def test_softmax_in_bfloat16_is_computed_in_float32(backend: Torch) -> None:
    q, k = rounded(normal(1, 2, 8, 16) * 2), rounded(normal(1, 2, 8, 16, seed=1) * 2)
    weights = backend.run(lambda q, k: backend.module("model.attention").attention_weights(q, k), q, k)
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 4
    truth = special.softmax(np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf), axis=-1)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, truth, rtol=1e-5, atol=1e-8)


@on_both
def test_losses_and_routers_of_bfloat16_are_float32(backend: Torch) -> None:
    logits, labels = rounded(normal(2, 5, 7)), np.zeros((2, 5), np.int32)
    loss = backend.run(backend.module("training.loss").mean_cross_entropy, logits, labels)
    assert loss.dtype == np.float32
    assert loss == pytest.approx(oracle_cross_entropy(logits.astype(np.float64), labels), rel=1e-6)
    router = backend.build(backend.module("model.router").SoftmaxTopKRouter, 8, 5, 2, dtype="bfloat16")
    weights, _ = backend.run(router, rounded(normal(4, 8)))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)


@on_both
def test_gelu_is_the_exact_one(backend: Torch) -> None:
    x = np.linspace(-6, 6, 1001)
    assert_same_function(backend.run(backend.module("model.mlp").ACTIVATIONS["gelu"], x), gelu(x), "gelu")


@on_both
def test_layer_norm_takes_the_variance_in_a_second_pass(backend: Torch) -> None:
    """In float32 a mean of 4096 leaves nothing of E[x^2] - E[x]^2 when the deviations are below 1."""
    deviations = np.random.default_rng(0).integers(-4, 5, (16, 64)) / 8
    norm = backend.build(backend.module("model.norm").build_norm, "layernorm", 64, 1e-5, dtype="float32")
    out = backend.run(norm, (4096 + deviations).astype(np.float32))
    np.testing.assert_allclose(out, norm_truth(deviations, {"weight": np.ones(64), "bias": np.zeros(64)}, 1e-5), 1e-5)


@on_both
@pytest.mark.parametrize("vlm", VLMS, ids=[vlm and vlm.arch for vlm in VLMS])
def test_the_config_s_eps_reaches_every_norm(backend: Torch, vlm: Any) -> None:
    config = DENSE.replace(norm_eps=0.25)
    model = backend.build(backend.module("model.transformer").Transformer, config, vlm_config=vlm, dtype="float32")
    norms = [module for _, module in modules_of(backend, model) if hasattr(module, "eps")]
    weights = [name for name in parameter_table(config, vlm) if "norm" in name and name.endswith("weight")]
    assert len(norms) == len(weights)
    assert {norm.eps for norm in norms} == {0.25}


# The optimiser


@on_both
def test_two_steps_use_every_hyper_parameter(backend: Torch) -> None:
    """After the first alone, the betas have no effect: the corrections of the moments undo them."""
    table, config = parameter_table(DENSE), OptimizerConfig(betas=(0.3, 0.6), eps=0.25, weight_decay=0.5)
    parameters, *gradients = ({n: normal(*spec.shape, seed=i) for n, spec in table.items()} for i in range(3))
    decayed = [name for name, spec in table.items() if len(spec.shape) > 1]
    truth, state = parameters, initial_state(parameters)
    for given in gradients:
        truth, state = adamw_step(
            truth, given, state, lr=0.1, betas=(0.3, 0.6), eps=0.25, weight_decay=0.5, decayed=decayed
        )
    for name, value in optimizer_steps(backend, parameters, gradients, config, lr=0.1).items():
        assert_same_function(value, truth[name], name)


@on_both
@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixed"])
def test_weight_decay_acts_on_matrices_alone(backend: Torch, config: ModelConfig) -> None:
    shapes = {name: spec.shape for name, spec in parameter_table(config).items() if not spec.is_buffer}
    ones = {name: np.ones(shape) for name, shape in shapes.items()}
    zeros = {name: np.zeros(shape) for name, shape in shapes.items()}
    moved = optimizer_steps(backend, ones, [zeros], OptimizerConfig(weight_decay=0.5), lr=0.5, model=config)
    assert {name for name, value in moved.items() if (value != 1).any()} == {n for n, s in shapes.items() if len(s) > 1}
    assert all((value == 0.75).all() for value in moved.values() if value.ndim > 1)


@on_both
def test_gradients_are_clipped_to_the_norm_and_left_alone_below_it(backend: Torch) -> None:
    clip = backend.module("training.optimizer").clip_by_global_norm
    given = {"a": np.full((2, 3), 3.0), "b": np.full(6, -4.0)}
    norm = math.sqrt(6 * 9 + 6 * 16)
    for max_norm, factor in ((norm / 4, 0.25), (norm * 4, 1.0), (0.0, 1.0)):
        clipped, found = clip({name: backend.array(value) for name, value in given.items()}, max_norm)
        assert backend.numpy(found) == pytest.approx(norm, rel=1e-15)
        for name, value in given.items():
            np.testing.assert_allclose(backend.numpy(clipped[name]), value * factor, rtol=4e-16 * (factor < 1))


@on_both
def test_the_norm_of_bfloat16_gradients_is_summed_in_float32(backend: Torch) -> None:
    clip = backend.module("training.optimizer").clip_by_global_norm
    value = 1 + 2**-7  # whose square bfloat16 has not, as it has not the sum
    gradient = backend.array(rounded(np.full(4099, value)))
    _, norm = clip({"a": gradient, "b": gradient}, 0.0)
    assert backend.numpy(norm).dtype == np.float32
    assert backend.numpy(norm) == pytest.approx(math.sqrt(8198) * value, rel=1e-6)


@on_both
@pytest.mark.parametrize("shape", [(1 << 15,), (2, (1 << 15) + 1), (1000, 3000)])
def test_the_norm_of_large_gradients_is_that_of_float64(backend: Torch, shape: tuple[int, ...]) -> None:
    """However many values are added up: squares added one after another in float32 are soon too small to count."""
    clip = backend.module("training.optimizer").clip_by_global_norm
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _, norm = clip({"a": backend.array(values), "b": backend.array(values[:1].T.copy().T)}, 0.0)
    exact = math.hypot(*(np.linalg.norm(part.astype(np.float64).ravel()) for part in (values, values[:1])))
    assert backend.numpy(norm) == pytest.approx(exact, rel=5e-7)


@on_both
def test_the_first_update_has_the_first_rate_of_the_warm_up(backend: Torch) -> None:
    step = first_step(backend.name)
    assert step.metrics["lr"] == 0.01 / 4
    schedule = backend.module("training.scheduler").build_schedule
    assert schedule(JOB)(0) == 0.01 / 4
    assert schedule(JOB.replace(scheduler=SchedulerConfig(warmup_steps=0)))(0) == 0.01


# NaN and infinity


@on_both
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_activations_keep_nan(backend: Torch, dtype: str) -> None:
    x = np.array([np.nan, -np.nan, 1.0, 0.0] * 8).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for activation in backend.module("model.mlp").ACTIVATIONS.values():
        np.testing.assert_array_equal(np.isnan(backend.run(activation, x).astype(np.float64)), [1, 1, 0, 0] * 8)


@on_both
@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["grouped", "mixed"])
def test_nan_or_infinity_in_a_weight_shows_in_the_logits(backend: Torch, config: ModelConfig) -> None:
    """A NaN expert bias decides routes and enters no value; a NaN score is the highest, which NumPy's sort ranks last;
    an infinite one is a sigmoid of 0 or 1.
    """
    tokens, weights = tokens_of(), {n: w.astype(np.float64) for n, w in weights_of(config).items()}
    forward, shown = forward_of(backend, config), set()
    for name, bad in itertools.product([name for name in weights if "expert_" not in name], [np.nan, np.inf]):
        spoilt = {**weights, name: np.array(weights[name])}
        spoilt[name].flat[int(tokens[1, 4]) * config.dim if "embedding" in name else 0] = bad
        with np.errstate(all="ignore"):
            truth = np.isnan(oracle_transformer(spoilt, config, tokens).logits)
        truth |= name.endswith("gate.weight") and np.isnan(bad)
        np.testing.assert_array_equal(np.isnan(forward(spoilt, tokens)), truth, err_msg=f"{name} = {bad}")
        shown |= {(name, bad)} if truth.any() else set()
    assert {name for name, bad in shown if np.isnan(bad)} == {name for name in weights if "expert_" not in name}


@on_both
@pytest.mark.parametrize("keys", [5, 17])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_nan_scores_show_in_the_output_of_attention(backend: Torch, dtype: str, keys: int) -> None:
    """In the queries that see them. What masked keys of NaN do to others differs between kernels."""
    for place, first in itertools.product(range(2), [0, 3]):
        arrays = [normal(1, 2, keys, 6, seed=i) for i in range(3)]
        arrays[place][0, 0, first:, 1] = np.nan
        typed = [array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for array in arrays]
        found = np.isnan(backend.run(backend.module("model.attention").attend, *typed).astype(np.float64))
        assert found[0, 0, first:].all()
        assert not found[0, 1].any()


# Dtypes


@on_both
@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixed"])
def test_float64_in_is_float64_throughout(backend: Torch, config: ModelConfig) -> None:
    dtypes, constants = floats_in_forward_and_backward(backend, config, "float64")
    assert dtypes == {"float64"}
    assert not {value for value in constants if is_rounded(value)}
    assert config.norm_eps in constants
    assert is_rounded(float(np.float32(config.norm_eps)))


@on_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixed"])
def test_the_dtype_of_the_weights_is_that_of_logits_and_gradients(
    backend: Torch, config: ModelConfig, dtype: str
) -> None:
    """With 64 bits on, a NumPy scalar or an array made without a dtype would make float64 of float32."""
    assert floats_in_forward_and_backward(backend, config, dtype)[0] == {"float32", dtype}
    out = dtypes_of_outputs(backend, config, dtype)
    assert out.pop("loss") == "float32"
    assert set(out.values()) == {dtype}, out


@on_both
def test_integers_of_either_width_are_the_same_ids(backend: Torch) -> None:
    model, tokens = backend.model(DENSE, weights_of(DENSE)), tokens_of()
    documents = np.array([[0] * 4 + [1] * 5] * 2, dtype=np.int32)

    def loss(tokens: Any, documents: Any) -> Any:
        logits = model.run(tokens, doc_ids=documents).logits
        return backend.module("training.loss").mean_cross_entropy(logits, tokens)

    narrow, wide = (backend.run(loss, tokens.astype(t), documents.astype(t)) for t in (np.int32, np.int64))
    assert narrow == wide


@on_both
def test_matrices_are_multiplied_as_the_config_says(backend: Torch) -> None:
    def current() -> Any:
        jax_level = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        return jax_level if backend.name == "jax" else torch.get_float32_matmul_precision()

    before = current()
    for level in ("highest", "high"):
        with backend.module("training.mixed_precision").matmul_precision(level):
            assert current() == level
    assert current() == before


# Helpers


def assert_rounded_once(value: np.ndarray, truth: np.ndarray) -> None:
    """bfloat16 next to the truth, and the nearest one nearly always: a second rounding misses it in many places."""
    assert value.dtype == ml_dtypes.bfloat16
    assert_ulp(value, truth, limit=1)
    assert (value == rounded(truth)).mean() > 0.995


@dataclass(frozen=True)
class FirstStep:
    """Two micro-batches with unequal numbers of labels, the weights before the step, and what the step reported."""

    batches: list[dict[str, np.ndarray]]
    before: dict[str, np.ndarray]
    metrics: dict[str, Any]


@functools.lru_cache
def first_step(name: str) -> FirstStep:
    backend = next(each for each in BACKENDS if each.name == name)
    trainer = backend.module("training.train").Trainer(JOB, dtype=torch.float64 if name == "torch" else jnp.float64)
    batches = [{"tokens": tokens_of(seed=seed), "labels": tokens_of(seed=seed + 2)} for seed in range(2)]
    batches[1]["labels"][:, 3:] = -100
    before = {name: np.array(value) for name, value in trainer.state().weights.items()}
    return FirstStep(batches, before, backend.numpy(trainer.step(batches)))


def optimizer_steps(
    backend: Torch,
    parameters: Mapping[str, np.ndarray],
    gradients: Sequence[Mapping[str, np.ndarray]],
    config: OptimizerConfig,
    lr: float,
    model: ModelConfig = DENSE,
) -> dict[str, np.ndarray]:
    """The parameters after one step for each set of gradients."""
    module = backend.module("training.optimizer")
    own = {name: backend.array(value) for name, value in parameters.items()}
    optimizer = module.build_optimizer(own, parameter_table(model), config)
    update, state = (None, None) if backend.name == "torch" else _jitted_update(module, optimizer, own)
    for each in gradients:
        given = {name: backend.array(value) for name, value in each.items()}
        if update is None:
            for name, tensor in own.items():
                tensor.grad = given[name]
            module.set_rates(optimizer, Rates(lr, config.weight_decay))
            optimizer.step()
        else:
            own, state = update(given, state, own, Rates(lr, config.weight_decay))
    return backend.numpy(own)


def _jitted_update(module: Any, optimizer: Any, own: Any) -> tuple[Any, Any]:
    return jax.jit(functools.partial(module.update, optimizer)), optimizer.init(own)


def norm_truth(x: np.ndarray, weights: Mapping[str, np.ndarray], eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True) if "bias" in weights else x
    scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + eps)
    return scaled * weights["weight"] + weights.get("bias", 0.0)


def zeros_like_state(backend: Torch, module: Any) -> dict[str, Any]:
    return {name: 0 * value for name, value in backend.module("model.state").get_state(module).items()}


def modules_of(backend: Torch, model: Any) -> Iterator[tuple[str, Any]]:
    return model.named_modules() if backend.name == "torch" else backend.module("model.module").named_modules(model)


def forward_of(backend: Torch, config: ModelConfig) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
    """(weights, tokens) -> logits, compiled once where there is a compiler."""
    state, model = backend.module("model.state"), backend.model(config, weights_of(config))
    if backend.name == "torch":

        def eager(weights: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
            state.set_state(model, weights)
            return backend.run(model, tokens)

        return eager
    graphdef, params, buffers = state.split(model)
    jitted = jax.jit(lambda p, b, t: state.merge(graphdef, p, b).run(t).logits)

    def compiled(weights: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
        own = {name: weights[name] for name in params}
        return np.asarray(jitted(own, {name: weights.get(name, array) for name, array in buffers.items()}, tokens))

    return compiled


def loss_of(backend: Torch, model: Any, tokens: Any) -> tuple[Any, Any]:
    """Loss with the routers' losses, and logits."""
    output = model.run(tokens)
    losses = backend.module("training.loss")
    return losses.mean_cross_entropy(output.logits, tokens) + sum(losses.router_losses(output.stats)), output.logits


def floats_in_forward_and_backward(backend: Torch, config: ModelConfig, dtype: str) -> tuple[set[str], set[float]]:
    """Dtypes of all floating-point arrays that come up, whether kept or not, and all constants.

    Rotary tables, which are more exact than the model where they can be, are rounded before.
    """
    model, tokens = backend.model(config, weights_of(config), dtype), tokens_of()
    table_dtype = "float64" if dtype == "float64" else "float32"
    if backend.name == "torch":
        model.rope.cos, model.rope.sin = (
            table.to(getattr(torch, table_dtype)) for table in (model.rope.cos, model.rope.sin)
        )
        with _Recorded() as recorded:
            loss_of(backend, model, backend.array(tokens))[0].backward()
        return recorded.dtypes, recorded.constants
    state = backend.module("model.state")
    graphdef, params, buffers = state.split(model)
    buffers |= {name: buffers[name].astype(table_dtype) for name in ("rope.cos", "rope.sin")}
    gradient = jax.grad(lambda p, b, t: loss_of(backend, state.merge(graphdef, p, b), t)[0])
    values = list(_values(jax.make_jaxpr(gradient)(params, buffers, tokens).jaxpr))
    scalars = [value.val for value in values if isinstance(value, Literal) and np.ndim(value.val) == 0]
    return {v.aval.dtype.name for v in values if not v.aval.weak_type}, {float(scalar) for scalar in scalars}


def is_rounded(value: float) -> bool:
    """Whether a number is one of float32 that needs most of its digits: a constant that was rounded on its way."""
    digits = abs(math.frexp(value)[0]) * 2**24
    return math.isfinite(value) and digits % 1 == 0 and digits % 2**12 != 0


def dtypes_of_outputs(backend: Torch, config: ModelConfig, dtype: str) -> dict[str, str]:
    """Of loss, logits, and of the gradient of each parameter."""
    model, tokens = backend.model(config, weights_of(config), dtype), tokens_of()
    if backend.name == "torch":
        loss, logits = loss_of(backend, model, backend.array(tokens))
        loss.backward()
        named = {"loss": loss, "logits": logits, **{name: p.grad for name, p in model.named_parameters()}}
        return {name: str(value.dtype).removeprefix("torch.") for name, value in named.items()}
    state = backend.module("model.state")
    graphdef, params, buffers = state.split(model)
    function = jax.value_and_grad(lambda p, b, t: loss_of(backend, state.merge(graphdef, p, b), t), has_aux=True)
    (loss, logits), gradients = jax.eval_shape(function, params, buffers, tokens)
    return {name: value.dtype.name for name, value in {"loss": loss, "logits": logits, **gradients}.items()}


class _Recorded(TorchDispatchMode):
    """The dtype of every floating-point tensor that an operation gives, and every number that one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()
        self.constants: set[float] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.constants |= {value for value in tree_leaves((args, kwargs)) if isinstance(value, float)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.dtypes.add(str(tensor.dtype).removeprefix("torch."))
        return out


def _values(jaxpr: Any) -> Iterator[Any]:
    """The floating-point values of a program and of all programs inside it."""
    for value in (*jaxpr.constvars, *jaxpr.invars, *(v for e in jaxpr.eqns for v in (*e.invars, *e.outvars))):
        if jnp.issubdtype(getattr(value.aval, "dtype", jnp.int32), jnp.floating):
            yield value
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _values(getattr(inner, "jaxpr", inner))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
