"""Training in torch: loss, clipping, AdamW, the trainer's step against the specification, resume after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge_torch.model.vlm import inner_transformer
from kempnerforge_torch.training import blocks
from kempnerforge_torch.training import loss as loss_module
from kempnerforge_torch.training.blocks import compile_blocks
from kempnerforge_torch.training.loss import cross_entropy, mean_cross_entropy
from kempnerforge_torch.training.mixed_precision import matmul_precision
from kempnerforge_torch.training.optimizer import (
    _initial_state,
    build_optimizer,
    clip_by_global_norm,
    get_optimizer_state,
    set_optimizer_state,
    set_rates,
)
from kempnerforge_torch.training.scheduler import build_schedule
from kempnerforge_torch.training.train import Trainer, train
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
    labels = np.random.default_rng(1).integers(0, V, (2, 7))
    labels[0, :3] = labels[1, -1] = IGNORED
    return labels


class TestLoss:
    def test_mean_and_gradient_are_those_of_the_specification(self, logits: np.ndarray, labels: np.ndarray):
        x = torch.from_numpy(logits).requires_grad_()
        loss = mean_cross_entropy(x, torch.from_numpy(labels))
        loss.backward()
        assert_same_function(loss.detach().numpy(), oracle_loss.cross_entropy(logits, labels), "loss")
        assert x.grad is not None
        assert_same_function(x.grad.numpy(), oracle_loss.cross_entropy_backward(1.0, logits, labels), "gradient")

    def test_count_is_of_the_labels_that_are_not_ignored(self, logits: np.ndarray, labels: np.ndarray):
        total, count = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels.astype(np.int32)))
        assert int(count) == 10
        assert_same_function(total.numpy() / 10, oracle_loss.cross_entropy(logits, labels), "loss")

    def test_without_labels_it_is_0_with_gradient_0(self, logits: np.ndarray):
        x = torch.from_numpy(logits).requires_grad_()
        loss = mean_cross_entropy(x, torch.full((2, 7), IGNORED))
        loss.backward()
        assert loss.item() == 0
        assert x.grad is not None
        assert not x.grad.any()

    def test_bfloat16_logits_are_widened_first(self, logits: np.ndarray, labels: np.ndarray):
        narrow = torch.from_numpy(logits).to(torch.bfloat16).requires_grad_()
        loss = mean_cross_entropy(narrow, torch.from_numpy(labels))
        loss.backward()
        truth = oracle_loss.cross_entropy(narrow.detach().double().numpy(), labels)
        assert loss.dtype == torch.float32
        assert abs(loss.item() - truth) < 1e-6 * truth
        assert narrow.grad is not None
        assert narrow.grad.dtype == torch.bfloat16

    def test_chunks_change_nothing(self, logits: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch):
        def value_and_gradient() -> tuple[np.ndarray, np.ndarray]:
            x = torch.from_numpy(logits).requires_grad_()
            total, _ = cross_entropy(x, torch.from_numpy(labels))
            total.backward()
            assert x.grad is not None
            return total.detach().numpy(), x.grad.numpy()

        whole = value_and_gradient()
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 3 * V + 1)
        for value, truth in zip(value_and_gradient(), whole, strict=True):
            assert_same_function(value, truth, "chunked", 1e-14)

    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 2.0**-8)])
    def test_the_fused_kernel_is_the_same_sum(
        self, dtype: torch.dtype, tolerance: float, logits: np.ndarray, labels: np.ndarray
    ):
        found = []
        for fused in (False, True):
            x = torch.from_numpy(logits).to(dtype).requires_grad_()
            total, count = cross_entropy(x, torch.from_numpy(labels), fused=fused)
            total.backward()
            assert x.grad is not None
            assert int(count) == 10
            assert total.dtype == torch.promote_types(dtype, torch.float32)
            found.append((total.detach().double().numpy(), x.grad.double().numpy()))
        for value, truth in zip(*found, strict=True):
            assert_same_function(value, truth, "fused", tolerance)

    @pytest.mark.parametrize("label", [-1, V])
    def test_label_outside_the_vocabulary_is_an_error(self, label: int, logits: np.ndarray, labels: np.ndarray):
        labels[1, 2] = label
        with pytest.raises(ValueError, match=rf"labels = {label}: ids must be in \[0, {V}\) or -100"):
            cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.3, 1e3])
    def test_formula(self, max_norm: float):
        values = draw_gradients()
        gradients = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
        clipped, norm = clip_by_global_norm(gradients, max_norm)
        assert_same_function(norm.numpy(), np.array(oracle.global_norm(values)), "norm")
        assert_all_same_function({n: g.numpy() for n, g in clipped.items()}, oracle.clip(values, max_norm))

    def test_0_does_not_clip(self):
        values = draw_gradients()
        clipped, norm = clip_by_global_norm({n: torch.from_numpy(v.copy()) for n, v in values.items()}, 0.0)
        assert norm > 1
        assert_all_same_function({name: g.numpy() for name, g in clipped.items()}, values, 0.0)

    def test_norm_of_bfloat16_is_summed_in_float32(self):
        gradients = {"a": torch.full((4097,), 1.0, dtype=torch.bfloat16)}
        norm = clip_by_global_norm(gradients, 0.0)[1]
        assert norm.dtype == torch.float32
        assert abs(float(norm) - 4097**0.5) < 1e-4

    def test_nan_stays_nan(self):
        gradients = {"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2)}
        clipped, norm = clip_by_global_norm(gradients, 0.5)
        assert torch.isnan(norm)
        assert all(torch.isnan(gradient).all() for gradient in clipped.values())


class TestOptimizer:
    def test_steps_are_counted_in_float32_whatever_the_default(self):
        weight = torch.zeros(3)
        torch.set_default_dtype(torch.float64)
        try:
            state = _initial_state(weight, ["exp_avg"])
        finally:
            torch.set_default_dtype(torch.float32)
        assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(state, torch.float32)

    def parameters(self) -> dict[str, torch.Tensor]:
        values = draw_gradients(seed=5)
        return {name: torch.nn.Parameter(torch.from_numpy(values[name])) for name in TABLE}

    def test_steps_are_those_of_the_specification(self):
        parameters = self.parameters()
        optimizer = build_optimizer(parameters, TABLE, CONFIG)
        truth = {name: p.detach().numpy().copy() for name, p in parameters.items()}
        state = oracle.initial_state(truth)
        for step, lr in enumerate((0.1, 0.07, 0.2)):
            gradients = {name: value for name, value in draw_gradients(seed=step).items() if name in truth}
            for name, parameter in parameters.items():
                parameter.grad = torch.from_numpy(gradients[name])
            set_rates(optimizer, Rates(lr, CONFIG.weight_decay))
            optimizer.step()
            truth, state = oracle.adamw_step(
                truth, gradients, state, lr=lr, betas=(0.8, 0.97), eps=1e-4, weight_decay=0.3, decayed=["matrix"]
            )
        assert_all_same_function({name: p.detach().numpy() for name, p in parameters.items()}, truth)
        moments = {f"m.{n}": m for n, m in state.m.items()} | {f"v.{n}": v for n, v in state.v.items()}
        moments |= {f"t.{n}": np.array(steps) for n, steps in state.steps.items()}
        own = get_optimizer_state(optimizer, parameters)
        assert_all_same_function({name: tensor.numpy() for name, tensor in own.items()}, moments)

    def test_a_gradient_of_0_only_decays_matrices(self):
        parameters = self.parameters()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = build_optimizer(parameters, TABLE, CONFIG)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameters["matrix"], before["matrix"] * (1 - 0.1 * 0.3))
        assert torch.equal(parameters["norm"], before["norm"])

    def test_state_that_does_not_fit_is_refused_whole(self):
        parameters = self.parameters()
        optimizer = build_optimizer(parameters, TABLE, CONFIG)
        state = {"m.matrix": np.ones((3, 4)), "v.matrix": np.ones((4, 3)), "m.norm": np.ones(5), "m.other": np.ones(1)}
        with pytest.raises(UserError) as refusal:
            set_optimizer_state(optimizer, parameters, state, 7)
        for problem in ("v.norm: missing", "m.other: unknown", "v.matrix.shape = (4, 3): must be (3, 4)"):
            assert problem in str(refusal.value)
        assert not any(tensor.any() for tensor in get_optimizer_state(optimizer, parameters).values())

    def test_every_hyper_parameter_is_given(self):
        group = build_optimizer(self.parameters(), TABLE, CONFIG).param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.97), 1e-4, 0.3)
        assert not any(group[name] for name in ("amsgrad", "maximize", "capturable"))


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

    def test_without_labels_nothing_moves_but_by_decay(self):
        job = tiny_job(EXPERTS | {"moe_aux_loss_weight": 0.0, "moe_router_z_loss_weight": 0.0})
        trainer = Trainer(job)
        before = trainer.state().weights
        metrics = trainer.step([draw_batch(job, 0, ignored=1.0)])
        assert float(metrics["loss"]) == float(metrics["grad_norm"]) == metrics["tokens"] == 0
        kept = 1 - scheduled_learning_rate(job, 0) * job.optimizer.weight_decay
        for name, value in trainer.state().weights.items():
            if not name.endswith(("expert_bias", "expert_ema")):
                scale = kept if trainer.table[name].decay else 1.0
                np.testing.assert_allclose(value, before[name] * scale, rtol=1e-6, err_msg=name)

    def test_bfloat16_masters_move(self):
        job = tiny_job(train={"mixed_precision": "bf16"}, optimizer={"lr": 3e-4}, scheduler={"warmup_steps": 0})
        trainer = Trainer(job)
        name = "norm.weight"
        trainer.step([draw_batch(job, 0)])
        moved = trainer.parameters[name].detach().cpu() - 1
        assert trainer.compute_dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
        assert (moved.abs() > 2.9e-4).float().mean() > 0.9
        assert torch.equal(torch.ones(1), (1 + moved[:1]).bfloat16().float())

    def test_gates_stay_in_float32_under_bfloat16(self):
        job = tiny_job(EXPERTS, train={"mixed_precision": "bf16"})
        trainer = Trainer(job)
        seen: dict[str, torch.dtype] = {}
        for name, module in trainer.model.named_modules():
            if name.endswith((".gate", "q_proj")):
                module.register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
        trainer.step([draw_batch(job, 0)])
        assert seen["layers.1.mlp.router.gate"] == torch.float32
        assert seen["layers.1.attention.q_proj"] == torch.bfloat16
        assert all(b.dtype == torch.float32 for n, b in trainer.model.named_buffers() if "expert_" in n)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("mode", ["full", "narrow", "selective"])
    def test_checkpointed_activations_change_nothing(self, mode: str, precision: str):
        results = []
        for activations in ("none", mode):
            job = tiny_job(EXPERTS, train={"activation_checkpointing": activations, "mixed_precision": precision})
            trainer = Trainer(job)
            for seed in range(2):
                trainer.step([draw_batch(job, seed), draw_batch(job, 9)])
            results.append(trainer.state())
        assert_same_bits(*results)

    def test_checkpointing_runs_blocks_again(self):
        calls = []
        trainer = Trainer(tiny_job(train={"activation_checkpointing": "full"}))
        inner_transformer(trainer.model).layers["0"].get_submodule("attention").register_forward_hook(
            lambda *_: calls.append(1)
        )
        trainer.step([draw_batch(trainer.config, 0)])
        assert len(calls) == 2

    def test_biases_move_once_a_step_by_the_counts_of_all_micro_batches(self):
        job = tiny_job(EXPERTS | {"moe_bias_schedule": "linear_warmup"}, train={"max_steps": 100})
        trainer, counts = double(job), []
        router: Any = inner_transformer(trainer.model).layers["1"].get_submodule("mlp.router")
        router.register_forward_hook(lambda *call: counts.append(call[2].stats.expert_counts.double().cpu().numpy()))
        bias, ema = np.zeros(5), np.full(5, np.float32(0.2), np.float64)
        for step in range(3):
            counts.clear()
            trainer.step([draw_batch(job, seed) for seed in range(2)])
            assert len(counts) == 2
            ema = 0.99 * ema + 0.01 * sum(counts) / np.sum(counts)
            bias = bias + 0.001 * (step / 100 / 0.1) * (0.2 - ema)
            np.testing.assert_allclose(router.expert_ema.cpu(), ema, rtol=1e-14)
            np.testing.assert_allclose(router.expert_bias.cpu(), bias, atol=1e-17)

    def test_metrics_of_experts(self):
        job = tiny_job(EXPERTS)
        metrics = {name: float(value) for name, value in Trainer(job).step([draw_batch(job, 0)]).items()}
        assert set(metrics) == {
            "loss", "grad_norm", "lr", "tokens", "aux_loss", "z_loss", "routing_entropy", "dead_experts",
        }  # fmt: skip
        assert 0 < metrics["routing_entropy"] <= np.log(5)
        assert metrics["dead_experts"] in range(5)
        assert set(Trainer(tiny_job()).step([draw_batch(job, 0)])) == {"loss", "grad_norm", "lr", "tokens"}

    def test_documents_reach_the_model(self):
        job = tiny_job()
        batch = draw_batch(job, 0)
        documents = {**batch, "doc_ids": np.repeat([[0, 1]], 5, axis=1).repeat(3, axis=0).astype(np.int32)}
        assert float(Trainer(job).step([documents])["loss"]) != float(Trainer(job).step([batch])["loss"])


class TestEvaluation:
    def test_mean_over_all_labels_changes_nothing(self):
        job = tiny_job()
        trainer = double(job)
        batches = [draw_batch(job, seed, ignored) for seed, ignored in enumerate((0.1, 0.9))]
        before = trainer.state()
        numbers = trainer.evaluate(batches)
        assert_same_bits(trainer.state(), before)
        assert numbers["tokens"] == sum((batch["labels"] != IGNORED).sum() for batch in batches)
        whole = trainer.evaluate([joined(*batches)])
        step = trainer.step(batches)
        parts, all_at_once, of_step = (
            torch.as_tensor(part["loss"]).double().cpu().numpy() for part in (numbers, whole, step)
        )
        assert_same_function(parts, all_at_once, "loss")
        assert_same_function(of_step, all_at_once, "loss of the step")


class TestState:
    def test_state_is_a_copy(self):
        trainer = Trainer(tiny_job())
        state = trainer.state()
        kept = {name: value.copy() for name, value in {**state.weights, **state.optimizer}.items()}
        trainer.step([draw_batch(trainer.config, 0)])
        for name, value in {**state.weights, **state.optimizer}.items():
            np.testing.assert_array_equal(value, kept[name])

    @pytest.mark.parametrize("model", [{"tie_embeddings": True}, EXPERTS])
    def test_resumed_steps_have_the_same_bits(self, model: dict[str, Any]):
        job = tiny_job(model)
        batches = [draw_batch(job, seed) for seed in range(4)]
        through, resumed = Trainer(job), Trainer(job)
        for batch in batches[:2]:
            through.step([batch])
        state = through.state()
        for batch in batches[2:]:
            through.step([batch])
        resumed.step([batches[3]])
        resumed.load_state(state)
        for batch in batches[2:]:
            resumed.step([batch])
        assert_same_bits(resumed.state(), through.state())

    def test_weights_alone_leave_the_moments(self):
        job = tiny_job()
        trainer = Trainer(job)
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
            run_killed(job, "torch", moment)
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


def test_matmul_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_without_a_compiler_blocks_run_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("CXX", "no-such-compiler")
    trainer = Trainer(tiny_job(train={"compile_model": True}), "cpu")
    assert "no-such-compiler" in caplog.text
    assert np.isfinite(float(trainer.step([draw_batch(trainer.config, 0)])["loss"]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_compute_the_same():
    job = tiny_job(EXPERTS, train={"activation_checkpointing": "full"})
    plain, compiled = double(job), double(job)
    compile_blocks(compiled.model, torch.device("cpu"), backend="aot_eager")
    for trainer in (plain, compiled):
        trainer.step([draw_batch(job, 0)])
    assert_all_same_function(compiled.state().weights, plain.state().weights)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch._dynamo.config.patch(recompile_limit=2)
def test_more_models_of_a_process_compile_than_the_compiler_allows_by_itself():
    torch.compiler.reset()
    for width in (16, 32, 48, 64):
        model = Trainer(tiny_job({"dim": width, "ffn_hidden_dim": width}), "cpu").model
        compile_blocks(model, torch.device("cpu"), backend="eager")
        model(torch.zeros((1, 3), dtype=torch.int64))
    assert torch._dynamo.config.recompile_limit == 2


def test_blocks_are_compiled_as_one_program_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch):
    model, asked = Trainer(tiny_job(EXPERTS), "cpu").model, []
    monkeypatch.setattr(blocks, "compile_module", lambda _, **options: asked.append(options["fullgraph"]))
    compile_blocks(model, torch.device("meta"))
    compile_blocks(model, torch.device("meta"), fullgraph=False)
    layers = len(asked) // 2
    assert layers
    assert asked == [True] * layers + [False] * layers


def double(job: JobConfig) -> Trainer:
    return Trainer(job, dtype=torch.float64)


def draw_gradients(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"matrix": rng.standard_normal((3, 4)), "norm": rng.standard_normal(5), "scalar": rng.standard_normal(())}


def fix_buffers(trainer: Trainer, weights: dict[str, np.ndarray]) -> None:
    """Put the balancing buffers back, which the specification's step leaves alone."""
    for name, buffer in trainer.model.named_buffers():
        if name in weights:
            buffer.copy_(torch.from_numpy(weights[name]))
