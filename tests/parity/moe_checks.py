"""Checks that the bugs of `tests.mutants_moe` must not pass: one backend against the oracle, on the smallest layers in
which every changed line matters.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig
from tests.oracle.router import expert_bias_rate, expert_bias_update
from tests.outcomes import accepted
from tests.parity.moe_layers import GATE, Layer, module, run, run_oracle
from tests.tolerance import assert_all_same_function, assert_same_function

Array = np.ndarray

X_BSD = np.random.default_rng(3).standard_normal((2, 4, 6))
VALID_BS = np.array([[True, True, False, True], [False, True, True, True]])
LAYERS = (
    Layer(dim=6, hidden_dim=4, num_experts=3, capacity_factor=0.7, gradient_scale=True),
    Layer(dim=6, hidden_dim=4, num_experts=4, router_type="sigmoid_topk", sequence_aux_loss_weight=0.5,
          packed_experts=True, activation="gelu", gradient_scale=True, shared_experts=1, routed_scaling=2.5),
)  # fmt: skip
RATE, DECAY = 0.1, 0.9


def check_layers(backend: str) -> None:
    """Outputs, routes, losses, counts and gradients of layers with padding and limits."""
    for layer in LAYERS:
        weights = layer.weights()
        truth = run_oracle(layer, weights, X_BSD, VALID_BS)
        found = run(backend, layer, weights, X_BSD, VALID_BS)
        np.testing.assert_array_equal(found.indices_Tk, truth.indices_Tk)
        np.testing.assert_array_equal(found.counts_E, truth.counts_E)
        assert found.dropped == truth.dropped
        assert_all_same_function(found.named, truth.named)


def check_no_tokens(backend: str) -> None:
    """Of no tokens nothing comes out, and all losses are 0."""
    for layer in LAYERS:
        built = layer.build(backend)
        for shape in ((0, 4, 6), (2, 0, 6)):
            with torch.no_grad():
                out, stats = built(array(backend, np.zeros(shape), "float32"), return_stats=True)
            assert tuple(out.shape) == shape
            losses = [float(value) for value in (stats.aux_loss, stats.z_loss, stats.entropy)]
            assert losses == [0, 0, 0]


def check_ties(backend: str) -> None:
    """Of equal scores those of the lowest index, and a tie is a tie."""
    layer = Layer(dim=6, hidden_dim=4, num_experts=5, top_k=3)
    weights = layer.weights()
    weights[GATE][:] = 0
    found = run(backend, layer, weights, X_BSD)
    np.testing.assert_array_equal(found.indices_Tk, np.tile(np.arange(3), (8, 1)))


def check_precision(backend: str) -> None:
    """A router that gets bfloat16 decides and weighs in float32."""
    layer = Layer(dim=6, hidden_dim=4, num_experts=3)
    built = layer.build(backend)
    weights_Tk = built.router(array(backend, X_BSD[0], "bfloat16"))[0]
    assert str(weights_Tk.dtype).endswith("float32")


def check_balancing(backend: str) -> None:
    """The bias after steps with and without tokens, under each schedule."""
    for schedule in ("constant", "cosine_decay", "linear_warmup"):
        options: Any = {"bias_update_rate": RATE, "ema_decay": DECAY, "bias_schedule": schedule}
        extra = {"rngs": None} if backend == "jax" else {}
        router = module(backend, "router").SigmoidTopKRouter(6, 4, 2, **options, **extra)
        bias_E, ema_E = np.zeros(4), np.full(4, 0.25)
        for step, counts_E in enumerate(np.array([[8, 4, 3, 1], [0, 0, 0, 0], [0, 16, 0, 0], [1, 2, 3, 4]])):
            router.set_step(step, 3)
            router.update_bias(array(backend, counts_E, "int32"))
            rate = expert_bias_rate(RATE, schedule, step, 3)
            bias_E, ema_E = expert_bias_update(bias_E, ema_E, counts_E, rate=rate, decay=DECAY)
            buffers = (router.expert_bias, router.expert_ema)
            found = [np.asarray(b if backend == "torch" else b.get_value()) for b in buffers]
            np.testing.assert_allclose(found, [bias_E, ema_E], rtol=1e-5, atol=1e-7)


def check_steps(backend: str) -> None:
    """Biases move by the choices of all forwards since the last update, and of none before."""
    config = ModelConfig(
        dim=6, n_layers=1, n_heads=1, vocab_size=7, ffn_hidden_dim=8, max_seq_len=8, num_experts=3, moe_top_k=1,
        moe_router="sigmoid_topk",
    )  # fmt: skip
    extra = {"rngs": None} if backend == "jax" else {}
    model = module(backend, "transformer").Transformer(config, **extra)
    module(backend, "state").set_state(model, validation_weights(parameter_table(config), 1))
    state = module(backend, "state").get_state(model)
    bias_E, ema_E = (np.asarray(state[f"layers.0.mlp.router.{name}"]).copy() for name in ("expert_bias", "expert_ema"))
    for batches in ((range(4), range(3, 7)), (range(2, 6),)):
        counts_E = np.zeros(3)
        for tokens in batches:
            model(array(backend, np.array([tokens]), "int32"))
            counts_E = counts_E + np.asarray(model.get_expert_counts()[0])
        model.update_moe_bias()
        bias_E, ema_E = expert_bias_update(bias_E, ema_E, counts_E, rate=0.001)
        found = module(backend, "state").get_state(model)["layers.0.mlp.router.expert_bias"]
        np.testing.assert_allclose(np.asarray(found), bias_E, rtol=1e-6, atol=1e-9)


def check_checkpointing(backend: str) -> None:
    """Loss, gradients, counts and balancing are the same where the backward pass runs the blocks again."""
    config = ModelConfig(
        dim=6, n_layers=1, n_heads=1, vocab_size=7, ffn_hidden_dim=8, max_seq_len=8, num_experts=3, moe_top_k=2,
        moe_router="sigmoid_topk", moe_sequence_aux_loss_weight=0.5, moe_shared_experts=1,
    )  # fmt: skip
    tokens_BS = array(backend, np.random.default_rng(4).integers(0, 7, (2, 4)), "int32")
    differentiate = _torch_gradients if backend == "torch" else _jax_gradients
    plain, again = (differentiate(config, tokens_BS, checkpointed) for checkpointed in (False, True))
    assert plain.keys() == again.keys()
    assert any(np.abs(value).max() > 1e-3 for name, value in again.items() if name.endswith("_proj.weight"))
    for name, value in plain.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


def _torch_gradients(config: ModelConfig, tokens_BS: Any, checkpointed: bool) -> dict[str, Array]:
    """Loss, counts, gradients and buffers after a backward pass."""
    model = module("torch", "transformer").Transformer(config).double()
    module("torch", "state").set_state(model, validation_weights(parameter_table(config), 1))
    if checkpointed:
        importlib.import_module("kempnerforge_torch.training.blocks").checkpoint_activations(model, "full")
    logits, stats = model.run(tokens_BS)[:2]
    loss = logits.square().sum() + stats[0].aux_loss + stats[0].z_loss
    loss.backward()
    gradients = {name: 0 * p.detach() if p.grad is None else p.grad for name, p in model.named_parameters()}
    found = {"loss": loss.detach(), "counts": stats[0].expert_counts, **gradients, **dict(model.named_buffers())}
    return {name: np.asarray(value) for name, value in found.items()}


def _jax_gradients(config: ModelConfig, tokens_BS: Any, checkpointed: bool) -> dict[str, Array]:
    state = module("jax", "state")
    model = module("jax", "transformer").Transformer(config, rngs=None)
    state.set_state(model, validation_weights(parameter_table(config), 1))
    graphdef, params, buffers = state.split(model)

    def objective(params: Any) -> Any:
        output = state.merge(graphdef, params, buffers).run(tokens_BS, remat=checkpointed)
        stats = output.stats[0]
        return jnp.square(output.logits).sum() + stats.aux_loss + stats.z_loss, stats.expert_counts

    wide = {name: value.astype("float64") for name, value in params.items()}
    (loss, counts), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(wide)
    found = {"loss": loss, "counts": counts, **gradients, **buffers}
    return {name: np.asarray(value) for name, value in found.items()}


def check_initial_experts(backend: str) -> None:
    """Experts start the same whether they are packed or not: seeded ones to the bit, others in their spread."""
    for packed in (True, False):
        config = ModelConfig(
            dim=24, n_layers=1, n_heads=1, vocab_size=7, ffn_hidden_dim=32, max_seq_len=8, num_experts=3,
            moe_packed_experts=packed,
        )  # fmt: skip
        state, initialise = module(backend, "state"), module(backend, "init").init_weights
        extra = {"rngs": nnx.Rngs(0)} if backend == "jax" else {}
        model = module(backend, "transformer").Transformer(config, **extra)
        held = {name: np.asarray(value) for name, value in state.get_state(model).items()}
        for name, factor in {"gate": 1.0, "up": 1.0, "down": 1 / math.sqrt(2)}.items():
            endings = (f"{name}_w", f"{name}_proj.weight")
            drawn = np.concatenate([value.ravel() for key, value in held.items() if key.endswith(endings)])
            assert drawn.size == 3 * 24 * 32
            assert abs(drawn.std() / (config.init_std * factor) - 1) < 0.1, name
        initialise(model, config, seed=4)
        held = state.get_state(model)
        for name, value in initial_values(parameter_table(config), 4):
            np.testing.assert_array_equal(np.asarray(held[name]), value, err_msg=name)


def check_copies(backend: str) -> None:
    """A layer can be copied after a call, and a model of torch: what they keep of the call belongs to a graph."""
    layer = LAYERS[0].build(backend)
    layer(array(backend, X_BSD, "float32"))
    called = [layer]
    if backend == "torch":
        config = ModelConfig(dim=4, n_layers=1, n_heads=1, vocab_size=3, ffn_hidden_dim=4, max_seq_len=4, num_experts=2)
        called.append(module(backend, "transformer").Transformer(config))
        called[-1](array(backend, np.array([[1, 2]]), "int64"))
    for built in called:
        with accepted("a copy after a call"):
            copy.deepcopy(built)


def check_products(backend: str) -> None:
    """Grouped products of rows of which some are of no group: one group without rows, and every tile needed."""
    rng = np.random.default_rng(5)
    x_RD, w_EDF, y_RF = (rng.standard_normal(shape) for shape in ((7, 3), (3, 3, 2), (7, 2)))
    products: Callable[..., Iterator[Any]] = _torch_products if backend == "torch" else _jax_products
    given = [array(backend, value) for value in (x_RD, w_EDF, y_RF)]
    for ends in ((2, 2, 5), (1, 3, 5)):
        groups = [slice(*bounds) for bounds in zip((0, *ends), ends, strict=False)]
        product_RF = np.zeros((7, 2))
        for group, matrix in zip(groups, w_EDF, strict=True):
            product_RF[group] = x_RD[group] @ matrix
        outer_EDF = np.stack([x_RD[group].T @ y_RF[group] for group in groups])
        found = list(products(module(backend, "grouped"), *given, array(backend, np.array(ends), "int32")))
        for product, outer in found:
            assert_same_function(np.asarray(product), product_RF, "product")
            assert_same_function(np.asarray(outer), outer_EDF, "outer")


def check_tiles(backend: str) -> None:
    """Products by tiles gather tiles of the rows asked for, and no more of them than rows and groups can need."""
    grouped = module(backend, "grouped")
    x_RD, w_EDF, y_RF = (array(backend, np.ones(shape)) for shape in ((50, 3), (4, 3, 2), (50, 2)))
    ends_E = array(backend, np.array([7, 7, 30, 45]), "int32")
    with mock.patch.object(grouped, "_gather", wraps=grouped._gather) as gather:
        grouped.tiled_matmul(x_RD, w_EDF, ends_E, 8)
        grouped.tiled_outer(x_RD, y_RF, ends_E, 8)
    assert [tuple(call.args[1].shape) for call in gather.call_args_list] == [(50 // 8 + 4, 8)] * 3


def _torch_products(grouped: Any, x_RD: Any, w_EDF: Any, y_RF: Any, ends_E: Any) -> Iterator[tuple[Any, Any]]:
    """By loops and by tiles both shorter and longer than groups; and by gradients, each product's being the other, of
    matrices in one tensor or apart.
    """
    yield grouped.looped_matmul(x_RD, w_EDF, ends_E), grouped.looped_outer(x_RD, y_RF, ends_E)
    together = grouped._stacked(w_EDF.unbind())
    yield grouped.tiled_matmul(x_RD, together, ends_E), grouped.tiled_outer(x_RD, y_RF, ends_E)
    apart = [w_DF.t().clone().requires_grad_() for w_DF in w_EDF]
    product_RF = grouped.grouped_matmul(x_RD, [w_FD.t() for w_FD in apart], ends_E)
    gradients = torch.autograd.grad(product_RF, apart, y_RF)
    yield product_RF.detach(), torch.stack(gradients).transpose(1, 2)
    for rows in (2, 8):
        yield grouped.tiled_matmul(x_RD, w_EDF, ends_E, rows), grouped.tiled_outer(x_RD, y_RF, ends_E, rows)
    w_EDF, y_RF = w_EDF.clone().requires_grad_(), y_RF.clone().requires_grad_()
    (grouped.grouped_matmul(x_RD, w_EDF, ends_E) * y_RF.detach()).sum().backward()
    (grouped.grouped_outer(x_RD, y_RF, ends_E) * w_EDF.detach()).sum().backward()
    yield y_RF.grad, w_EDF.grad


def _jax_products(grouped: Any, x_RD: Any, w_EDF: Any, y_RF: Any, ends_E: Any) -> Iterator[tuple[Any, Any]]:
    """By every way of every platform, blocks and tiles both shorter and longer than groups; and by gradients, each
    product's being the other.
    """
    for rows in (2, 8):
        yield grouped.looped_matmul(x_RD, w_EDF, ends_E, rows), grouped.looped_outer(x_RD, y_RF, ends_E, rows)
        yield grouped.tiled_matmul(x_RD, w_EDF, ends_E, rows), grouped.tiled_outer(x_RD, y_RF, ends_E, rows)
    yield grouped.ragged_matmul(x_RD, w_EDF, ends_E), grouped.ragged_outer(x_RD, y_RF, ends_E)
    outer_EDF = jax.grad(lambda w: (grouped.grouped_matmul(x_RD, w, ends_E) * y_RF).sum())(w_EDF)
    product_RF = jax.grad(lambda y: (grouped.grouped_outer(x_RD, y, ends_E) * w_EDF).sum())(y_RF)
    yield product_RF, outer_EDF


def check_stacks(backend: str) -> None:
    """Stacked layers of JAX, whose kinds alternate and of which one is left over, give what single ones do."""
    if backend == "torch":
        return
    config = ModelConfig(
        dim=6, n_layers=5, n_heads=1, vocab_size=7, ffn_hidden_dim=8, max_seq_len=8, num_experts=3, moe_top_k=2,
        moe_frequency=2, init_std=0.5,
    )  # fmt: skip
    model = module(backend, "transformer").Transformer(config, rngs=None)
    module(backend, "state").set_state(model, validation_weights(parameter_table(config), 1))
    tokens_BS = jnp.asarray(np.random.default_rng(6).integers(0, 7, (2, 4)), jnp.int32)
    stacked = module(backend, "scan").stacked(model)
    assert list(stacked.layers) == ["0-2:2", "1-3:2", "4"]
    with jax.disable_jit():
        single, together = (np.asarray(each.run(tokens_BS).logits) for each in (model, stacked))
    np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-6)


def array(backend: str, value: Array, dtype: str = "float64") -> Any:
    return torch.tensor(value).to(getattr(torch, dtype)) if backend == "torch" else jnp.asarray(value, dtype)


MOE_CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {
    "model.router": (
        check_layers,
        check_ties,
        check_no_tokens,
        check_precision,
        check_balancing,
        check_copies,
        check_checkpointing,
    ),
    "model.moe": (check_layers, check_no_tokens, check_copies),
    "model.dispatch": (check_layers, check_no_tokens),
    "model.grouped": (check_products, check_tiles),
    "model.stats": (check_copies, check_steps),
    "model.transformer": (check_steps,),
    "model.init": (check_initial_experts,),
    "model.scan": (check_checkpointing, check_stacks),
    "training.blocks": (check_checkpointing,),
}
