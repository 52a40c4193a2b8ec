"""What is JAX's own in mixtures of experts: one program for all routes, platforms, scans, values that cross jit."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from kempnerforge_jax.model import Transformer
from kempnerforge_jax.model.experts import apply_blockwise, apply_packed
from kempnerforge_jax.model.grouped import grouped_matmul, grouped_outer
from kempnerforge_jax.model.module import named_modules
from kempnerforge_jax.model.moe import MoEMLP, build_moe
from kempnerforge_jax.model.router import SigmoidTopKRouter, TopKRouter
from kempnerforge_jax.model.stack import unstack_layers
from kempnerforge_jax.model.state import get_state, merge, set_state, split
from kempnerforge_jax.model.stats import BlockOutput
from kempnerforge_jax.registry import registry
from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.registry import temporary
from shared_config.schema.model import ModelConfig

VOCAB, EXPERTS = 31, 4
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"moe_packed_experts": True},
    "sigmoid": {
        "moe_router": "sigmoid_topk",
        "moe_sequence_aux_loss_weight": 0.3,
        "moe_capacity_factor": 0.8,
        "moe_gradient_scale": True,
        "moe_shared_experts": 1,
    },
}


def config_of(case: str = "sigmoid", **fields: Any) -> ModelConfig:
    sizes = {"dim": 24, "n_layers": 4, "n_heads": 3, "vocab_size": VOCAB, "ffn_hidden_dim": 40, "max_seq_len": 32}
    experts = {"num_experts": EXPERTS, "moe_frequency": 2, **CASES[case]}
    return ModelConfig(**{**sizes, **experts, **fields})


def model_of(case: str = "sigmoid", **fields: Any) -> Any:
    config = config_of(case, **fields)
    model = Transformer(config, rngs=None)
    set_state(model, validation_weights(parameter_table(config), 1))
    return model


def layer_of(**options: Any) -> MoEMLP:
    return build_moe(8, 16, 4, 2, **options, rngs=nnx.Rngs(0))


def tokens_of(seed: int = 0, shape: tuple[int, int] = (2, 9)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


def routers_of(model: nnx.Module) -> list[SigmoidTopKRouter]:
    return [module for _, module in named_modules(model) if isinstance(module, SigmoidTopKRouter)]


def assert_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * scale, err_msg=str(name))


# Programs


def test_one_program_serves_all_routes() -> None:
    layer = layer_of(router_type="sigmoid_topk", capacity_factor=1.0)
    graphdef, params, buffers = split(layer)
    traces = 0

    @jax.jit
    def forward(buffers: Any, x_BSD: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return merge(graphdef, params, buffers)(x_BSD, return_stats=True)[1].expert_counts

    x_BSD = jax.random.normal(jax.random.key(0), (2, 5, 8))
    found = set()
    for expert in range(4):
        biased = buffers | {"router.expert_bias": 3 * jnp.eye(4)[expert]}
        counts_E = forward(biased, x_BSD)
        assert counts_E[expert] == 10
        found.add(tuple(np.asarray(counts_E).tolist()))
    assert len(found) == 4
    assert traces == 1


def test_blocks_of_rows_are_all_rows() -> None:
    """Of 23, four at a time; rows of no expert, here NaN where gradients come in, change nothing."""
    keys = jax.random.split(jax.random.key(0), 5)
    names, shapes = ("gate", "up", "down"), ((4, 6, 5), (4, 6, 5), (4, 5, 6))
    weights = {name: jax.random.normal(key, shape) for name, key, shape in zip(names, keys, shapes, strict=False)}
    x, dy = (jax.random.normal(key, (23, 6)) for key in keys[3:])

    @jax.jit
    def both(ends_E: jax.Array) -> Any:
        def blockwise(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
            return apply_blockwise(jax.nn.silu, 4, x, ends_E, weights)

        def whole(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
            return apply_packed(x, ends_E, weights["up"], weights["down"], weights["gate"], jax.nn.silu)

        own = (jnp.arange(23) < ends_E[-1])[:, None]
        pairs = [jax.vjp(function, x, weights) for function in (blockwise, whole)]
        return [
            (out, backward(jnp.where(own, dy, fill)))
            for (out, backward), fill in zip(pairs, (jnp.nan, 0.0), strict=True)
        ]

    for ends in ((0, 3, 3, 9), (4, 8, 8, 8), (0, 0, 0, 0), (1, 2, 3, 23), (5, 9, 14, 19)):
        found, truth = both(jnp.array(ends, jnp.int32))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "has", "has_not"),
    [("cpu", "while", "ragged"), ("cuda", "dot_general", "while"), ("tpu", "ragged", "while")],
)
def test_products_are_those_of_the_platform(platform: str, has: str, has_not: str) -> None:
    shapes = [((64, 8), jnp.bfloat16), ((4, 8, 16), jnp.bfloat16), ((4,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lowered = jax.jit(grouped_matmul).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert has in lowered
    assert has_not not in lowered


def test_operators_have_second_derivatives() -> None:
    rng = np.random.default_rng(0)
    ends_E = jnp.array([2, 2, 7], jnp.int32)
    with jax.enable_x64(True):
        x_RD, w_EDF, y_RF = (jnp.asarray(rng.standard_normal(shape)) for shape in ((9, 4), (3, 4, 5), (9, 5)))
        check_grads(lambda x, w: grouped_matmul(x, w, ends_E), (x_RD, w_EDF), order=2, modes=["rev"])
        check_grads(lambda x, y: grouped_outer(x, y, ends_E), (x_RD, y_RF), order=2, modes=["rev"])


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("sigmoid", {"scan_layers": True}),
        ("sigmoid", {"remat": True}),
        ("softmax", {"scan_layers": True, "remat": True}),
    ],
)
def test_scan_and_remat_change_nothing(case: str, options: dict[str, Any]) -> None:
    model = model_of(case)
    graphdef, params, buffers = split(model)

    def objective(params: Any, **options: Any) -> Any:
        output = merge(graphdef, params, buffers).run(tokens_of(), **options)
        loss = jnp.sin(output.logits).sum()
        for stats in output.stats.values():
            loss += 0.5 * stats.aux_loss + 0.1 * stats.z_loss
        return loss, output.stats

    plain, changed = (
        jax.jit(jax.value_and_grad(lambda params, kw=kw: objective(params, **kw), has_aux=True))(params)
        for kw in ({}, options)
    )
    assert_close({"loss": changed[0][0]}, {"loss": plain[0][0]})
    assert_close(changed[1], plain[1], 1e-4)
    assert set(plain[0][1]) == {1, 3}
    for layer, stats in plain[0][1].items():
        assert_close(changed[0][1][layer]._asdict(), stats._asdict())


def test_stacked_routers_move_their_biases_together() -> None:
    """A stack holds (layers, E) biases; given (layers, E) counts it does to each what a single router does."""
    model = model_of()
    graphdef, params, buffers = split(model, scan_layers=True)
    model(tokens_of())
    counts = model.get_expert_counts()
    model.update_moe_bias()

    @jax.jit
    def update(buffers: Any, counts_LE: jax.Array) -> Any:
        merged = merge(graphdef, params, buffers)
        (router,) = routers_of(merged)
        router.update_bias(counts_LE)
        return split(merged)[2]

    moved = unstack_layers(update(buffers, jnp.stack([counts[1], counts[3]])))
    expected = {name: value for name, value in get_state(model).items() if "expert_" in name}
    assert len(expected) == 4
    assert_close({name: moved[name] for name in expected}, expected, 1e-6)


@pytest.mark.parametrize("layers", [(), (1,), (1, 3)])
def test_stacked_routers_move_where_the_counts_of_all_are_given(layers: tuple[int, ...]) -> None:
    model = merge(*split(model_of(), scan_layers=True))
    before = {name: np.array(value) for name, value in get_state(model).items() if "expert_bias" in name}
    model.update_moe_bias({layer: jnp.arange(EXPERTS) for layer in layers})
    assert before
    for name, value in before.items():
        assert np.array_equal(get_state(model)[name], value) == (len(layers) < 2), name


# State


def test_copies_after_a_forward() -> None:
    model = model_of()
    logits = model(tokens_of())
    np.testing.assert_array_equal(copy.deepcopy(model)(tokens_of()), logits)
    twin = merge(*split(model))
    assert twin.get_expert_counts() == {}
    np.testing.assert_array_equal(twin(tokens_of()), logits)


def test_buffers_stay_in_at_least_float32() -> None:
    layer = layer_of(router_type="sigmoid_topk")
    router: Any = layer.router
    router.update_bias(jnp.array([8, 0, 0, 0]))
    before = np.asarray(router.expert_bias.get_value())
    layer.to(jnp.bfloat16)
    assert jax.eval_shape(layer, jnp.ones((1, 3, 8), jnp.bfloat16)).dtype == jnp.bfloat16
    assert router.expert_bias.get_value().dtype == router.expert_ema.get_value().dtype == jnp.float32
    np.testing.assert_array_equal(router.expert_bias.get_value(), before)
    with jax.enable_x64(True):
        layer.to(jnp.float64)
        assert router.expert_bias.get_value().dtype == jnp.float64


def test_routes_are_chosen_in_float32() -> None:
    """Scores that bfloat16 can't tell apart, also where products of float32 are allowed to be narrow."""
    router = build_moe(2, 4, 3, 1, rngs=None).router
    assert router.gate.weight is not None
    router.gate.weight.set_value(jnp.array([[1.0, 0.0], [1.001, 0.0], [1.0005, 0.0]]))
    weights, indices = router(jnp.ones((5, 2), jnp.bfloat16))
    assert (weights.dtype, indices.ravel().tolist()) == (jnp.float32, [1] * 5)
    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(router).trace(jnp.ones((5, 2), jnp.bfloat16)).lower().as_text()
    assert "HIGHEST" in program


# Statistics and balancing


def test_getters_show_the_last_forward_outside_jit() -> None:
    model = model_of()
    assert (model.get_moe_aux_loss(), model.get_moe_router_z_loss(), model.get_expert_counts()) == (0, 0, {})
    pure = model.run(tokens_of())
    assert model.get_expert_counts() == {}
    model(tokens_of())
    jax.jit(model)(tokens_of(7))
    layers: list[Any] = [model.layers[str(layer)].mlp for layer in pure.stats]
    assert model.get_moe_aux_loss() == sum(stats.aux_loss for stats in pure.stats.values()) > 0
    assert model.get_moe_router_z_loss() == sum(stats.z_loss for stats in pure.stats.values()) > 0
    for layer, (index, stats) in zip(layers, pure.stats.items(), strict=True):
        np.testing.assert_array_equal(model.get_expert_counts()[index], stats.expert_counts)
        for holder in (layer, layer.router):
            np.testing.assert_array_equal(holder.expert_counts, stats.expert_counts)
            assert (holder.aux_loss, holder.z_loss) == (stats.aux_loss, stats.z_loss)


def test_a_fresh_layer_has_no_losses() -> None:
    layer = layer_of()
    assert layer.aux_loss == layer.z_loss == layer.expert_counts.sum() == 0


def test_layers_in_nested_containers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with one mixture for each modality, whose stats are a dict."""
    model = model_of()
    block: Any = model.layers["1"]
    block.mlp = nnx.Dict({"image": block.mlp, "text": copy.deepcopy(model.layers["3"].mlp)})

    def forward(x: jax.Array, *_: Any, **__: Any) -> BlockOutput:
        outputs = {name: mlp(x, return_stats=True) for name, mlp in block.mlp.items()}
        counted = {name: stats for name, (_, stats) in outputs.items()}
        return BlockOutput(x + sum(out for out, _ in outputs.values()), counted, None)

    whole = type(block).forward
    monkeypatch.setattr(
        type(block), "forward", lambda self, *a, **kw: (forward if self is block else whole.__get__(self))(*a, **kw)
    )
    model(tokens_of())
    counts = model.get_expert_counts()
    assert set(counts) == {1, 3}
    assert set(counts[1]) == {"image", "text"}
    inner = [module for _, module in named_modules(model) if isinstance(module, MoEMLP)]
    assert len(inner) == 3
    np.testing.assert_allclose(model.get_moe_aux_loss(), sum(layer.aux_loss for layer in inner), rtol=1e-6)
    np.testing.assert_allclose(model.get_moe_router_z_loss(), sum(layer.z_loss for layer in inner), rtol=1e-6)
    model.set_moe_step(3, 4)
    assert [router.kept("progress") for router in routers_of(model)] == [0.75] * 3
    before = [np.asarray(router.expert_bias.get_value()) for router in routers_of(model)]
    model.update_moe_bias()
    for router, old in zip(routers_of(model), before, strict=True):
        assert (router.expert_bias.get_value() != old).any()


def test_bias_moves_once_by_the_counts_of_all_micro_batches() -> None:
    parts, told = (model_of(moe_capacity_factor=0.0) for _ in range(2))
    tokens, run = tokens_of(shape=(4, 9)), jax.jit(told.run)
    for part in jnp.split(tokens, 2):
        parts(part)
    parts.eval()
    parts(tokens_of())
    parts.update_moe_bias()
    told.update_moe_bias({layer: stats.expert_counts for layer, stats in run(tokens).stats.items()})
    for router, expected in zip(routers_of(parts), routers_of(told), strict=True):
        np.testing.assert_array_equal(router.expert_bias.get_value(), expected.expert_bias.get_value())
        np.testing.assert_array_equal(router.expert_ema.get_value(), expected.expert_ema.get_value())
    after = np.asarray(routers_of(parts)[0].expert_bias.get_value())
    parts.update_moe_bias()
    np.testing.assert_array_equal(routers_of(parts)[0].expert_bias.get_value(), after)


@pytest.mark.parametrize("schedule", ["constant", "cosine_decay", "linear_warmup"])
def test_progress_may_be_traced(schedule: str) -> None:
    counts_E = jnp.array([9, 1, 1, 1])
    layer = layer_of(router_type="sigmoid_topk", bias_schedule=schedule)
    graphdef, params, buffers = split(layer)

    @jax.jit
    def update(progress: jax.Array) -> jax.Array:
        router: Any = merge(graphdef, params, buffers).router
        router.update_bias(counts_E, progress)
        return router.expert_bias.get_value()

    for step in (1, 7, 12):
        router: Any = merge(graphdef, params, buffers).router
        router.set_step(step, 12)
        router.update_bias(counts_E)
        np.testing.assert_allclose(
            update(jnp.float32(step / 12)), router.expert_bias.get_value(), rtol=1e-5, atol=1e-10
        )


def test_a_router_of_its_own_is_found_by_name() -> None:
    class FirstK(TopKRouter):
        def _score(self, logits_TE: jax.Array) -> jax.Array:
            return jnp.ones_like(logits_TE)

        def _balance(self, shares_BSE: jax.Array, chosen_BSE: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
            return jnp.ones((), shares_BSE.dtype)

    with temporary():
        registry.register("router", "test_first_k_of_jax")(FirstK)
        model: Any = Transformer(config_of("softmax", moe_router="test_first_k_of_jax"), rngs=None)
    model(tokens_of())
    assert model.get_moe_aux_loss() == 2
    assert model.get_expert_counts()[1].tolist() == [18, 18, 0, 0]
