"""What is registered is part of the system without an edit elsewhere: the parameter table, initial values, both
backends' functions and gradients, files and training.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from kempnerforge_jax.model.moe import build_moe as build_jax_moe
from kempnerforge_jax.model.state import get_state as jax_state
from kempnerforge_jax.model.state import merge, set_state, split
from kempnerforge_jax.registry import registry as jax_registry
from kempnerforge_jax.training import train as jax_train
from kempnerforge_torch.model import state as torch_state
from kempnerforge_torch.model.moe import build_moe as build_torch_moe
from kempnerforge_torch.registry import registry as torch_registry
from kempnerforge_torch.training import train as torch_train
from shared_config import JobConfig, load_config
from shared_config.contract.counts import count_parameters, flops_per_token, training_memory
from shared_config.contract.initialise import state_hash
from shared_config.contract.parameters import FOLDED, parameter_groups, parameter_table
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.contract.vision import adapter_table, encoder_table, job_table
from shared_config.data import open_data
from shared_config.errors import ConfigError
from shared_config.interchange.toml import json_schema
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.registry import Registry, UnknownNameError, declare, declared_names, temporary
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.vision import VisionEncoderConfig
from tests.parity import additions
from tests.parity.additions import NAME

SMALL = (
    "--model.dim=32", "--model.n_layers=3", "--model.n_heads=4", "--model.n_kv_heads=2", "--model.ffn_hidden_dim=48",
    "--vision_encoder.image_size=16", "--vision_encoder.feature_dim=24", "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1", "--train.batch_size=4", "--scheduler.warmup_steps=0", "--eval.steps=1",
    "--vlm.max_text_len=48",
)  # fmt: skip
EXPERTS = ("--model.num_experts=3", "--model.moe_frequency=2", "--model.moe_shared_experts=1")
ADDITIONS = {
    "norm": (f"--model.norm_type={NAME}",),
    "activation": (f"--model.activation={NAME}_activation", f"--adapter.activation={NAME}_activation"),
    "activation of packed experts": (
        f"--model.activation={NAME}_activation", "--model.moe_packed_experts=true", *EXPERTS,
    ),
    "mlp": (f"--model.activation={NAME}",),
    "mlp of experts": (f"--model.activation={NAME}", "--model.moe_capacity_factor=0.7", *EXPERTS),
    "router": (f"--model.moe_router={NAME}", *EXPERTS),
    "adapter": (f"--adapter.type={NAME}",),
    "vision_encoder": (f"--vision_encoder.type={NAME}",),
    "architecture": (),
    "all": (
        f"--model.norm_type={NAME}", f"--model.activation={NAME}", f"--model.moe_router={NAME}", *EXPERTS,
        f"--adapter.type={NAME}", f"--vision_encoder.type={NAME}",
    ),
}  # fmt: skip
SEED = 5
each_addition = pytest.mark.parametrize("kind", ADDITIONS)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with temporary(), jax.default_matmul_precision("highest"):
        additions.register_all()
        yield


def job(kind: str) -> JobConfig:
    own = (f"--vlm.arch={NAME}",) if kind in ("architecture", "all") else ()
    return load_config("debug_vlm_joint_decoder", [*SMALL, *own, *ADDITIONS[kind]])


def torch_model(config: JobConfig) -> Any:
    model = torch_train.build_model(config)
    model.init_weights_and_freqs(SEED)
    return model


def jax_model(config: JobConfig) -> Any:
    model = nnx.eval_shape(lambda: jax_train.build_model(config, rngs=None))
    model.init_weights_and_freqs(SEED)
    return model


def weights_of(model: Any) -> dict[str, np.ndarray]:
    state = torch_state.get_state(model) if isinstance(model, torch.nn.Module) else jax_state(model)
    return {
        name: torch_state.to_numpy(v) if isinstance(v, torch.Tensor) else np.asarray(v) for name, v in state.items()
    }


def loose(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Away from their initial values, so that nothing is hidden by a 0 or a 1."""
    draw = np.random.default_rng(0)
    return {name: value + 0.1 * draw.standard_normal(value.shape) for name, value in weights.items()}


def torch_loss_and_gradients(config: JobConfig, weights: Any, batch: Any) -> tuple[Any, Any]:
    model = torch_model(config).double()
    torch_state.set_state(model, weights)
    output = model.run(*(torch.from_numpy(batch[name]) for name in ("pixel_values", "input_ids")))
    losses = sum(layer.aux_loss for layer in output.stats.values())
    (output.logits.sin().sum() + losses).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return output.logits.detach().numpy(), gradients


def jax_loss_and_gradients(config: JobConfig, weights: Any, batch: Any) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        model = jax_model(config).to(jnp.float64)
        set_state(model, weights)
        graphdef, parameters, buffers = split(model)

        def objective(parameters: Any) -> Any:
            output = merge(graphdef, parameters, buffers).run(batch["pixel_values"], batch["input_ids"])
            losses = sum(layer.aux_loss for layer in output.stats.values())
            return jnp.sin(output.logits).sum() + losses, output.logits

        gradients, logits = jax.jit(jax.grad(objective, has_aux=True))(parameters)
        return np.asarray(logits), {name: np.asarray(value) for name, value in gradients.items()}


@each_addition
def test_the_table_knows_what_was_registered_and_seeds_give_the_same_bits(kind: str) -> None:
    config = job(kind)
    table = job_table(config, tower_of(config))
    states = [weights_of(build(config)) for build in (torch_model, jax_model)]
    assert [set(state) for state in states] == [set(table)] * 2
    assert state_hash(states[0]) == state_hash(states[1])
    for name, spec in table.items():
        assert states[0][name].shape == spec.shape, name
        if isinstance(spec.initializer, Constant):
            assert (states[0][name] == np.float32(spec.initializer.value)).all(), name


@each_addition
def test_the_groups_are_the_table(kind: str) -> None:
    config = job(kind)
    table = parameter_table(config.model, config.vlm)
    groups = list(parameter_groups(config.model, config.vlm))
    assert sum(group.copies for group in groups) == len(table)
    assert sum(group.size for group in groups) == sum(spec.size for spec in table.values())
    assert count_parameters(config.model, config.vlm) == sum(s.size for s in table.values() if not s.is_buffer)
    for group in groups:
        ending = FOLDED.split(group.name)[-1]
        assert any(name.endswith(ending) and spec == group.spec for name, spec in table.items())
    assert flops_per_token(config.model, 16).forward > 0
    assert training_memory(config).total > 0


@each_addition
def test_functions_and_gradients_agree(kind: str) -> None:
    config = job(kind)
    batch = {
        name: value.astype(float) if value.dtype == np.float32 else value for name, value in batch_of(config).items()
    }
    weights = loose(weights_of(torch_model(config)))
    (truth, torch_gradients), (found, jax_gradients) = (
        run(config, weights, batch) for run in (torch_loss_and_gradients, jax_loss_and_gradients)
    )
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-11 * np.abs(truth).max())
    trained = {name for name, spec in job_table(config, tower_of(config)).items() if not spec.is_buffer}
    assert set(torch_gradients) == set(jax_gradients) == trained
    largest = max(np.abs(gradient).max() for gradient in torch_gradients.values())
    for name, gradient in torch_gradients.items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(jax_gradients[name], gradient, rtol=0, atol=1e-11 * largest, err_msg=name)


@each_addition
def test_weights_go_through_files_and_both_backends(kind: str, tmp_path: Path) -> None:
    config = job(kind)
    weights = {name: value.astype(np.float32) for name, value in loose(weights_of(torch_model(config))).items()}
    save_weights(tmp_path / "weights.safetensors", weights)
    loaded = load_weights(tmp_path / "weights.safetensors")
    models = torch_model(config), jax_model(config)
    for model, put in zip(models, (torch_state.set_state, set_state), strict=True):
        put(model, loaded)
        assert state_hash(weights_of(model)) == state_hash(weights)


@each_addition
def test_a_training_step_is_the_same_step(kind: str) -> None:
    config = job(kind)
    trainers = torch_train.Trainer(config, "cpu"), jax_train.Trainer(config, "cpu")
    before = trainers[0].state().weights
    losses = [float(trainer.step([batch_of(config)])["loss"]) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (trainer.state().weights for trainer in trainers)
    assert list(one) == list(two)
    for name, value in one.items():
        assert not np.array_equal(value, before[name]), name
        np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
    assert [trainer.table for trainer in trainers] == [job_table(config, tower_of(config))] * 2


@pytest.mark.parametrize("scan", ["true", "false"])
def test_a_router_balances_its_own_buffer(scan: str) -> None:
    """Also where layers are stacked, and only when the update is taken."""
    routed = (f"--model.moe_router={NAME}", "--model.num_experts=3", "--train.on_nonfinite=skip")
    config = load_config("debug", [*SMALL[:5], *routed, f"--train.scan_layers={scan}", "--train.compile_model=false"])
    batch = open_data(config).batch(0)
    states = []
    for trainer in (torch_train.Trainer(config, "cpu"), jax_train.Trainer(config, "cpu")):
        trainer.step([batch])
        states.append(trainer.state().weights)
    choices = config.model.moe_top_k * batch["tokens"].size * additions.RATE
    for layer in range(config.model.n_layers):
        name = f"layers.{layer}.mlp.router.handicap"
        np.testing.assert_allclose([(s[name] - 0.125).sum() for s in states], choices, rtol=1e-4)
        np.testing.assert_allclose(states[0][name], states[1][name], rtol=0.05, atol=2 * additions.RATE)


def test_a_tensor_that_was_not_declared_is_refused_by_name() -> None:
    torch_registry.register("norm", "test_undeclared")(additions.TorchNorm)
    jax_registry.register("norm", "test_undeclared")(additions.JaxNorm)
    config = job("norm")
    config = config.replace(model=config.model.replace(norm_type="test_undeclared"))
    for build in (torch_model, jax_model):
        with pytest.raises(ValueError, match=r"norm\.strength.*must be in the table"):
            build(config)


def test_experts_of_their_own_kind_are_not_packed() -> None:
    config = job("mlp of experts")
    packed = config.model.replace(moe_packed_experts=True)
    with pytest.raises(ConfigError, match=f"moe_packed_experts = True: must be False.*{NAME}.*left.weight"):
        parameter_table(packed)
    for build in (build_torch_moe, functools.partial(build_jax_moe, rngs=None)):
        with pytest.raises(ValueError, match="packed_experts = True: must be False"):
            build(8, 16, 2, 1, activation=NAME, packed_experts=True)


@pytest.mark.parametrize("category", ["norm", "mlp", "router", "adapter", "vision_encoder", "architecture"])
def test_a_name_of_one_backend_is_refused_by_the_other(category: str) -> None:
    kind = category
    for registry, other in ((torch_registry, jax_registry), (jax_registry, torch_registry)):
        builder = registry.builders(category).pop(NAME)
        with pytest.raises(UnknownNameError, match=f"Unknown {category}: '{NAME}'; available: .*another backend only"):
            (torch_model if registry is torch_registry else jax_model)(job(kind))
        (jax_model if registry is torch_registry else torch_model)(job(kind))
        assert other.has(category, NAME)
        registry.builders(category)[NAME] = builder


@pytest.mark.parametrize(
    ("field", "category"),
    [
        ("model.norm_type", "norm"),
        ("model.activation", "mlp"),
        ("model.moe_router", "router"),
        ("adapter.type", "adapter"),
        ("adapter.activation", "activation"),
        ("vision_encoder.type", "vision_encoder"),
        ("vlm.arch", "architecture"),
    ],
)
def test_unknown_names_list_what_exists(field: str, category: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("debug_vlm_joint_decoder", [*SMALL, f"--{field}=nonesuch"])
    assert f"{field} = 'nonesuch': must be one of " in str(caught.value)
    assert all(name in str(caught.value) for name in declared_names(category))
    assert NAME in json.dumps(json_schema())


def test_what_is_temporary_is_forgotten() -> None:
    registry = Registry()
    with temporary():
        registry.register("norm", "test_short")(object)
        declare("router", "test_short", parameters=additions.own_router_parameters)
        assert "test_short" in declared_names("norm")
        assert "test_short" in declared_names("router")
    assert not registry.has("norm", "test_short")
    assert "test_short" not in (*declared_names("norm"), *declared_names("router"))
    assert NAME in declared_names("norm")


def test_declarations_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="category = 'normal'"):
        declare("normal", NAME)
    with pytest.raises(ValueError, match="parameters is given for activation"):
        declare("activation", NAME, parameters=additions.norm_parameters)
    with pytest.raises(ValueError, match="parameters is declared already"):
        declare("norm", "rmsnorm", parameters=additions.norm_parameters)
    with pytest.raises(ValueError, match="must name each axis"):
        ParameterSpec((2, 3), Constant(0.0), ("embed",))


def test_what_a_declared_function_gives_is_checked() -> None:
    for category in ("norm", "adapter", "vision_encoder"):
        declare(category, "test_wrong", parameters=lambda *_: {"weight": 3})
    for table in (
        lambda: parameter_table(job("norm").model.replace(norm_type="test_wrong")),
        lambda: adapter_table(AdapterConfig(type="test_wrong"), 4, 4),
        lambda: encoder_table(VisionEncoderConfig(type="test_wrong")),
    ):
        with pytest.raises(ConfigError, match="must be a mapping from names to ParameterSpec"):
            table()


def batch_of(config: JobConfig) -> Any:
    return open_data(config).batch(0)
