"""Training in JAX: loss, clipping, AdamW, the trainer's step against the specification, resume after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kempnerforge_jax.training.loss import cross_entropy, mean_cross_entropy
from kempnerforge_jax.training.mixed_precision import matmul_precision
from kempnerforge_jax.training.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    get_optimizer_state,
    set_optimizer_state,
    update,
)
from kempnerforge_jax.training.scheduler import build_schedule
from kempnerforge_jax.training.train import Trainer, compiled_step, train
from shared_config.contract.schedule import Rates, scheduled_learning_rate
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.data import open_text_data
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.schema.job import JobConfig
from shared_config.schema.optimizer import OptimizerConfig
from tests.jobs import (
    EXPERTS,
    assert_same_bits,
    draw_batch,
    joined,
    last_checkpoint,
    oracle_steps,
    run_folder,
    run_killed,
    text_job,
    tiny_job,
)
from tests.oracle import loss as oracle_loss
from tests.oracle import optimizer as oracle
from tests.oracle.transformer import transformer
from tests.tolerance import assert_all_same_function, assert_same_function

V = 11
IGNORED = -100
CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.97), eps=1e-4)
TABLE = {
    "matrix": ParameterSpec((3, 4), Constant(0.0), (None, None), decay=True),
    "norm": ParameterSpec((5,), Constant(1.0), (None,)),
}


@pytest.fixture
def logits() -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal((2, 7, V))


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.random.default_rng(1).integers(0, V, (2, 7), dtype=np.int32)
    labels[0, :3] = labels[1, -1] = IGNORED
    return labels


@pytest.fixture
def x64() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
class TestLoss:
    def test_mean_and_gradient_are_those_of_the_specification(self, logits: np.ndarray, labels: np.ndarray):
        loss, gradient = jax.jit(jax.value_and_grad(mean_cross_entropy))(logits, labels)
        assert_same_function(np.asarray(loss), oracle_loss.cross_entropy(logits, labels), "loss")
        truth = oracle_loss.cross_entropy_backward(1.0, logits, labels)
        assert_same_function(np.asarray(gradient), truth, "gradient")

    def test_count_is_of_the_labels_that_are_not_ignored(self, logits: np.ndarray, labels: np.ndarray):
        total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
        assert int(count) == 10
        assert_same_function(np.asarray(total) / 10, oracle_loss.cross_entropy(logits, labels), "loss")

    def test_without_labels_it_is_0_with_gradient_0(self, logits: np.ndarray):
        loss, gradient = jax.value_and_grad(mean_cross_entropy)(logits, np.full((2, 7), IGNORED, np.int32))
        assert loss == 0
        assert not gradient.any()

    def test_bfloat16_logits_are_widened_first(self, logits: np.ndarray, labels: np.ndarray):
        narrow = jnp.asarray(logits, jnp.bfloat16)
        loss, gradient = jax.value_and_grad(mean_cross_entropy)(narrow, labels)
        truth = oracle_loss.cross_entropy(np.asarray(narrow, np.float64), labels)
        assert loss.dtype == jnp.float32
        assert abs(float(loss) - truth) < 1e-6 * truth
        assert gradient.dtype == jnp.bfloat16

    def test_only_the_logits_are_kept_for_the_backward_pass(self, logits: np.ndarray, labels: np.ndarray):
        _, backward = jax.vjp(lambda x: cross_entropy(x, jnp.asarray(labels))[0], jnp.asarray(logits, jnp.bfloat16))
        kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= logits.size]
        assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]

    @pytest.mark.parametrize("label", [-1, V])
    def test_label_outside_the_vocabulary_gives_nan(self, label: int, logits: np.ndarray, labels: np.ndarray):
        labels[1, 2] = label
        assert jnp.isnan(jax.jit(mean_cross_entropy)(logits, labels))


@pytest.mark.usefixtures("x64")
class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.3, 1e3])
    def test_formula(self, max_norm: float):
        values = draw_gradients()
        clipped, norm = clip_by_global_norm({n: jnp.asarray(value) for n, value in values.items()}, max_norm)
        assert_same_function(np.asarray(norm), np.array(oracle.global_norm(values)), "norm")
        assert_all_same_function({n: np.asarray(g) for n, g in clipped.items()}, oracle.clip(values, max_norm))

    def test_0_does_not_clip(self):
        values = draw_gradients()
        clipped, norm = clip_by_global_norm({n: jnp.asarray(value) for n, value in values.items()}, 0.0)
        assert norm > 1
        assert_all_same_function({n: np.asarray(g) for n, g in clipped.items()}, values, 0.0)

    def test_norm_of_bfloat16_is_summed_in_float32(self):
        clipped, norm = clip_by_global_norm({"a": jnp.ones(4097, jnp.bfloat16)}, 1.0)
        assert norm.dtype == jnp.float32
        assert abs(float(norm) - 4097**0.5) < 1e-4
        assert clipped["a"].dtype == jnp.bfloat16

    def test_nan_stays_nan(self):
        clipped, norm = clip_by_global_norm({"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}, 0.5)
        assert jnp.isnan(norm)
        assert all(jnp.isnan(gradient).all() for gradient in clipped.values())


@pytest.mark.usefixtures("x64")
class TestOptimizer:
    def parameters(self) -> dict[str, Any]:
        values = draw_gradients(seed=5)
        return {name: jnp.asarray(values[name]) for name in TABLE}

    def test_steps_are_those_of_the_specification(self):
        parameters = self.parameters()
        optimizer = build_optimizer(parameters, TABLE, CONFIG)
        own = optimizer.init(parameters)
        truth = {name: np.asarray(p) for name, p in parameters.items()}
        state = oracle.initial_state(truth)
        for step, lr in enumerate((0.1, 0.07, 0.2)):
            gradients = {name: value for name, value in draw_gradients(seed=step).items() if name in truth}
            given = {name: jnp.asarray(value) for name, value in gradients.items()}
            parameters, own = update(optimizer, given, own, parameters, Rates(lr, CONFIG.weight_decay))
            truth, state = oracle.adamw_step(
                truth, gradients, state, lr=lr, betas=(0.8, 0.97), eps=1e-4, weight_decay=0.3, decayed=["matrix"]
            )
        assert_all_same_function({name: np.asarray(p) for name, p in parameters.items()}, truth)
        moments = {f"m.{n}": m for n, m in state.m.items()} | {f"v.{n}": v for n, v in state.v.items()}
        moments |= {f"t.{n}": np.array(steps) for n, steps in state.steps.items()}
        assert_all_same_function({n: np.asarray(m) for n, m in get_optimizer_state(own).items()}, moments)

    def test_it_is_the_adamw_of_optax(self):
        parameters = self.parameters()
        gradients = {name: jnp.asarray(draw_gradients()[name]) for name in TABLE}
        decay = {"matrix": True, "norm": False}
        theirs = optax.adamw(0.1, 0.8, 0.97, 1e-4, weight_decay=0.3, mask=decay)
        updates, _ = theirs.update(gradients, theirs.init(parameters), parameters)
        ours = build_optimizer(parameters, TABLE, CONFIG)
        moved, _ = update(ours, gradients, ours.init(parameters), parameters, Rates(0.1, CONFIG.weight_decay))
        truth = jax.tree.map(np.asarray, optax.apply_updates(parameters, updates))
        assert_all_same_function(jax.tree.map(np.asarray, moved), truth, 1e-15)

    def test_a_gradient_of_0_only_decays_matrices(self):
        parameters = self.parameters()
        optimizer = build_optimizer(parameters, TABLE, CONFIG)
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        moved, _ = update(optimizer, zeros, optimizer.init(parameters), parameters, Rates(0.1, CONFIG.weight_decay))
        np.testing.assert_allclose(moved["matrix"], parameters["matrix"] * (1 - 0.1 * 0.3), rtol=1e-15)
        np.testing.assert_array_equal(moved["norm"], parameters["norm"])

    def test_state_that_does_not_fit_is_refused(self):
        parameters = self.parameters()
        own = build_optimizer(parameters, TABLE, CONFIG).init(parameters)
        state = {"m.matrix": np.ones((3, 4)), "v.matrix": np.ones((4, 3)), "m.norm": np.ones(5), "m.other": np.ones(1)}
        with pytest.raises(UserError) as refusal:
            set_optimizer_state(own, state, 7)
        for problem in ("v.norm: missing", "m.other: unknown", "v.matrix.shape = (4, 3): must be (3, 4)"):
            assert problem in str(refusal.value)


@pytest.mark.usefixtures("x64")
class TestStep:
    @pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "norm_type": "layernorm"}, EXPERTS])
    def test_steps_are_those_of_the_specification(self, model: dict[str, Any]):
        job = tiny_job(model)
        trainer = double(job)
        weights = trainer.state().weights
        batches = [draw_batch(job, seed) for seed in range(3)]
        rates = [scheduled_learning_rate(job, step) for step in range(3)]
        losses = []
        for batch in batches:
            metrics = trainer.step([batch])
            router = job.model.moe_aux_loss_weight * metrics.get("aux_loss", 0.0)
            router = router + job.model.moe_router_z_loss_weight * metrics.get("z_loss", 0.0)
            losses.append(float(metrics["loss"] + router))
            fix_buffers(trainer, weights)
        experts = {"aux_loss", "z_loss", "routing_entropy", "dead_experts"} if job.model.is_moe else set()
        assert set(metrics) == {"loss", "grad_norm", "lr", "tokens", *experts}
        assert 0 <= metrics.get("routing_entropy", 0.0) <= np.log(5)
        truth_losses, truth, state = oracle_steps(job, weights, batches, rates)
        assert_same_function(np.array(losses), np.array(truth_losses), "losses")
        done = trainer.state()
        assert done.step == 3
        assert_all_same_function(done.weights, truth)
        moments = {f"m.{n}": m for n, m in state.m.items()} | {f"v.{n}": v for n, v in state.v.items()}
        moments |= {f"t.{n}": np.array(steps) for n, steps in state.steps.items()}
        assert_all_same_function(done.optimizer, moments)

    def test_micro_batches_are_one_big_batch(self):
        job = tiny_job()
        batches = [draw_batch(job, seed, ignored=0.1 + 0.3 * (seed % 3)) for seed in range(11)]
        results = []
        for micro_batches in (batches, [joined(*batches)]):
            trainer = double(job)
            metrics = trainer.step(micro_batches)
            results.append({**trainer.state().weights, **{n: np.array(float(v)) for n, v in metrics.items()}})
        assert_all_same_function(*results)

    def test_scanned_and_recomputed_layers_change_nothing(self):
        """Four layers, every second one of experts: two stacks in one scan of two steps."""
        plain = tiny_job(EXPERTS | {"n_layers": 4})
        other = plain.replace(train=plain.train.replace(activation_checkpointing="selective", scan_layers=True))
        states = []
        for job in (plain, other):
            trainer = double(job)
            for seed in range(2):
                trainer.step([draw_batch(job, seed)])
            states.append(trainer.state())
        assert_all_same_function(states[1].weights, states[0].weights)
        assert_all_same_function(states[1].optimizer, states[0].optimizer)

    def test_settings_reach_the_compiled_step(self):
        def occurrences(of: str, **train: Any) -> int:
            return str(step_jaxpr(double(tiny_job(train=train)))).count(of)

        none, selective, full = (
            occurrences("dot_general", activation_checkpointing=mode) for mode in ("none", "selective", "full")
        )
        assert none <= selective < full
        assert occurrences("dot_general", scan_layers=True) < none
        assert occurrences("scan[", scan_layers=True) == 2

    def test_biases_move_once_a_step_by_the_counts_of_all_micro_batches(self):
        job = tiny_job(EXPERTS | {"moe_bias_schedule": "linear_warmup"}, train={"max_steps": 100})
        trainer = double(job)
        bias, ema = np.zeros(5), np.full(5, np.float32(0.2), np.float64)
        batches = [draw_batch(job, seed) for seed in range(2)]
        for step in range(3):
            weights = trainer.state().weights
            counts = sum(transformer(weights, job.model, batch["tokens"]).expert_counts[1] for batch in batches)
            trainer.step(batches)
            ema = 0.99 * ema + 0.01 * counts / np.sum(counts)
            bias = bias + 0.001 * (step / 100 / 0.1) * (0.2 - ema)
            np.testing.assert_allclose(trainer.buffers["layers.1.mlp.router.expert_ema"], ema, rtol=1e-14)
            np.testing.assert_allclose(trainer.buffers["layers.1.mlp.router.expert_bias"], bias, atol=1e-17)


class TestFloat32Step:
    def test_without_labels_nothing_moves_but_by_decay(self):
        job = tiny_job()
        trainer = Trainer(job)
        before = trainer.state().weights
        metrics = trainer.step([draw_batch(job, 0, ignored=1.0)])
        assert set(metrics) == {"loss", "grad_norm", "lr", "tokens"}
        assert float(metrics["loss"]) == float(metrics["grad_norm"]) == metrics["tokens"] == 0
        kept = 1 - scheduled_learning_rate(job, 0) * job.optimizer.weight_decay
        for name, value in trainer.state().weights.items():
            scale = kept if trainer.table[name].decay else 1.0
            np.testing.assert_allclose(value, before[name] * scale, rtol=1e-6, err_msg=name)

    def test_bfloat16_masters_move(self):
        job = tiny_job(train={"mixed_precision": "bf16"}, optimizer={"lr": 3e-4}, scheduler={"warmup_steps": 0})
        trainer = Trainer(job)
        trainer.step([draw_batch(job, 0)])
        moved = np.asarray(trainer.parameters["norm.weight"]) - 1
        assert trainer.recipe.compute_dtype == jnp.bfloat16
        assert all(p.dtype == jnp.float32 for p in (*trainer.parameters.values(), *trainer.buffers.values()))
        assert (np.abs(moved) > 2.9e-4).mean() > 0.9
        assert np.float32(jnp.bfloat16(1 + moved[0])) == 1

    def test_gates_stay_in_float32_under_bfloat16(self):
        text = str(step_jaxpr(Trainer(tiny_job(EXPERTS, train={"mixed_precision": "bf16"}))))
        assert "bf16[48,24]" in text
        assert "bf16[5,24]" not in text

    def test_documents_reach_the_model(self):
        job = tiny_job()
        batch = draw_batch(job, 0)
        documents = {**batch, "doc_ids": np.repeat([[0, 1]], 5, axis=1).repeat(3, axis=0).astype(np.int32)}
        assert float(Trainer(job).step([documents])["loss"]) != float(Trainer(job).step([batch])["loss"])

    def test_a_step_gives_the_memory_of_the_state_away(self):
        trainer = Trainer(tiny_job())
        before = jax.tree.leaves((trainer.parameters, trainer.optimizer_state))
        trainer.step([draw_batch(trainer.config, 0)])
        assert all(array.is_deleted() for array in before)

    def test_a_step_is_compiled_once(self):
        job = tiny_job()
        trainer = Trainer(job)
        step: Any = compiled_step(trainer.recipe)
        trainer.step([draw_batch(job, 0)])
        compiled = step._cache_size()
        trainer.load_state(trainer.state())
        trainer.step([draw_batch(job, 1)])
        other = Trainer(job.replace(checkpoint=job.checkpoint.replace(dir="elsewhere")))
        other.step([draw_batch(job, 0)])
        assert step is compiled_step(other.recipe)
        assert step._cache_size() == compiled


@pytest.mark.usefixtures("x64")
class TestEvaluation:
    def test_mean_over_all_labels_changes_nothing(self):
        job = tiny_job()
        trainer = double(job)
        batches = [draw_batch(job, seed, ignored) for seed, ignored in enumerate((0.1, 0.9))]
        before = trainer.state()
        numbers = trainer.evaluate(batches)
        assert_same_bits(trainer.state(), before)
        assert numbers["tokens"] == sum((batch["labels"] != IGNORED).sum() for batch in batches)
        whole = np.asarray(trainer.evaluate([joined(*batches)])["loss"])
        assert_same_function(np.asarray(numbers["loss"]), whole, "loss")
        assert_same_function(np.asarray(trainer.step(batches)["loss"]), whole, "loss of the step")


class TestState:
    def test_state_is_a_copy(self):
        trainer = Trainer(tiny_job())
        state = trainer.state()
        kept = {name: value.copy() for name, value in {**state.weights, **state.optimizer}.items()}
        trainer.step([draw_batch(trainer.config, 0)])
        for name, value in {**state.weights, **state.optimizer}.items():
            np.testing.assert_array_equal(value, kept[name])

    @pytest.mark.parametrize("scan", [False, True])
    def test_resumed_steps_have_the_same_bits(self, scan: bool):
        job = tiny_job(train={"scan_layers": scan})
        batches = [draw_batch(job, seed) for seed in range(4)]
        through, resumed = Trainer(job), Trainer(job)
        for batch in batches[:2]:
            through.step([batch])
        state = through.state()
        assert list(state.weights) == list(through.table)
        for batch in batches[2:]:
            through.step([batch])
        resumed.step([batches[3]])
        resumed.load_state(state)
        for batch in batches[2:]:
            resumed.step([batch])
        assert_same_bits(resumed.state(), through.state())

    def test_weights_alone_leave_the_moments(self):
        trainer = Trainer(tiny_job())
        weights = {name: value + 1 for name, value in trainer.state().weights.items()}
        trainer.load_state(TrainingState(0, weights, {}))
        state = trainer.state()
        np.testing.assert_array_equal(state.weights["norm.weight"], weights["norm.weight"])
        assert not any(moment.any() for moment in state.optimizer.values())

    def test_state_of_another_model_is_refused(self):
        with pytest.raises(UserError, match=r"layers\.1\.attention\.q_norm\.weight: unknown"):
            Trainer(tiny_job({"qk_norm": False})).load_state(Trainer(tiny_job()).state())

    def test_optimizer_state_must_be_whole(self):
        trainer = Trainer(tiny_job())
        state = trainer.state()
        with pytest.raises(UserError, match=r"m\.norm\.weight: missing"):
            trainer.load_state(TrainingState(5, state.weights, {}))


class TestRun:
    def test_killed_runs_end_in_the_same_bits(self, tmp_path: Path):
        moments = sorted(np.random.default_rng().choice(np.arange(1, 12), 2, replace=False).tolist())
        through = text_job(tmp_path, EXPERTS, train={"grad_accum_steps": 2}, checkpoint=run_folder(tmp_path, "through"))
        train(through)
        job = text_job(tmp_path, EXPERTS, train={"grad_accum_steps": 2}, checkpoint=run_folder(tmp_path, "killed"))
        for moment in moments:
            run_killed(job, "jax", moment)
        summary = train(job)
        assert summary.step == 12
        assert summary.resumed_from == moments[-1] // 3 * 3, moments
        assert_same_bits(last_checkpoint(job).state, last_checkpoint(through).state)

    def test_loss_falls(self, tmp_path: Path):
        job = text_job(tmp_path, train={"max_steps": 30}, optimizer={"lr": 0.01})
        before = float(Trainer(job).evaluate(open_text_data(job).heldout())["loss"])
        summary = train(job)
        assert summary.heldout_loss is not None
        assert summary.heldout_loss < before - 1


def test_schedule_is_the_shared_one():
    job = tiny_job()
    assert [build_schedule(job)(step) for step in range(13)] == [scheduled_learning_rate(job, s) for s in range(13)]


def test_matmul_precision_is_that_of_products():
    with matmul_precision("high"):
        text = str(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 2))))
    assert "Precision.HIGH" in text
    assert "HIGHEST" not in text


def double(job: JobConfig) -> Trainer:
    return Trainer(job, dtype=jnp.float64)


def draw_gradients(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"matrix": rng.standard_normal((3, 4)), "norm": rng.standard_normal(5), "scalar": rng.standard_normal(())}


def fix_buffers(trainer: Trainer, weights: dict[str, np.ndarray]) -> None:
    """Put the balancing buffers back, which the specification's step leaves alone."""
    kept = {name: jnp.asarray(weights[name]) for name in trainer.buffers if name in weights}
    trainer.buffers = {**trainer.buffers, **jax.device_put(kept, trainer.device)}


def step_jaxpr(trainer: Trainer) -> Any:
    batches = {name: array[None] for name, array in draw_batch(trainer.config, 0).items()}
    scalar = np.zeros((), np.float32)
    arguments = (
        trainer.parameters,
        trainer.buffers,
        trainer.optimizer_state,
        batches,
        scalar,
        Rates(scalar, scalar, scalar),
        scalar,
    )
    return jax.make_jaxpr(compiled_step(trainer.recipe))(*arguments)
