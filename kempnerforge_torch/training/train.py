"""The trainer of one device, or of one of several: the gradient of a whole step's loss, the update, evaluation, and the
state of it all.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from rich.console import Console
from torch import Tensor, nn

from kempnerforge_torch.device import device_kind, find_device, peak_memory, process_count, to_device
from kempnerforge_torch.distributed.context_parallel import own_part
from kempnerforge_torch.distributed.fsdp import release
from kempnerforge_torch.distributed.health import check_health
from kempnerforge_torch.distributed.mesh import Mesh, open_mesh
from kempnerforge_torch.distributed.parallelize import parallelize
from kempnerforge_torch.distributed.pipeline import pipeline_of
from kempnerforge_torch.distributed.processes import joined, processes
from kempnerforge_torch.distributed.ranks import Ranks, global_norm
from kempnerforge_torch.distributed.states import host_copies, of_own_stage, own_parts
from kempnerforge_torch.distributed.tensor_parallel import complete_gradients
from kempnerforge_torch.distributed.vocabulary import cross_entropy_of
from kempnerforge_torch.model.balancing import balance
from kempnerforge_torch.model.build import build_model
from kempnerforge_torch.model.lora import add_adapters, init_adapters
from kempnerforge_torch.model.state import get_state, own_tensors, set_state
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, inner_transformer
from kempnerforge_torch.training.averaging import evaluated_weights
from kempnerforge_torch.training.freeze import apply_freeze_specs
from kempnerforge_torch.training.fused_adamw import FusedStep, can_fuse
from kempnerforge_torch.training.mixed_precision import Copies, compute_dtype, matmul_precision, use_fp8
from kempnerforge_torch.training.objective import Objective
from kempnerforge_torch.training.optimizer import (
    Step,
    build_optimizer,
    clip_factor,
    get_optimizer_state,
    set_optimizer_state,
)
from kempnerforge_torch.training.profile import profile, step_span
from kempnerforge_torch.training.recorded import RecordedCalls, can_record
from kempnerforge_torch.training.sampling import continued
from kempnerforge_torch.training.scheduler import build_rates
from kempnerforge_torch.training.terms import Terms, model_inputs, routing_metrics, summed, taken_metric
from shared_config.contract.freeze import effective_freeze, moments_under, trained_parameters
from shared_config.contract.labels import label_count
from shared_config.contract.lora import adapter_table, trained_with, with_adapters
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import ParameterTable
from shared_config.contract.vision import job_table
from shared_config.data import open_data
from shared_config.data.images import with_noise_seeds
from shared_config.evaluation.samples import sample_loggers
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import StateParts
from shared_config.interchange.vision import tower_of
from shared_config.schema.job import JobConfig
from shared_config.training.loop import run_training
from shared_config.training.resume import has_weights
from shared_config.training.speed import Devices
from shared_config.training.trainer import Batch, TrainingSummary


def train(
    config: JobConfig,
    *,
    device: torch.device | str | None = None,
    console: Console | None = None,
    overridden: Collection[str] = (),
) -> TrainingSummary:
    """Train the job, from where its folder left it, and return how it ended.

    Where a launcher started several processes, or a library has joined some, they train together in the layout of
    ``[distributed]``; the first writes the files and the console.

    Args:
        overridden: dotted fields that the command line sets: see `shared_config.training.resume.restore`.

    Raises:
        UserError: what can't be used, of data, folders, checkpoints and layouts; devices that fail the check that
            ``train.health_check_seconds`` asks for.
    """
    with joined(device) as target:
        check_health(config, target)
        trainer = Trainer(config, target, draws=not has_weights(config))
        data = open_data(config, rank=trainer.ranks.rank, world_size=trainer.ranks.count)
        loggers = sample_loggers(config, functools.partial(continued, trainer), trainer.devices.count)
        return run_training(
            config, trainer, data, console=console, processes=processes(), overridden=overridden, loggers=loggers
        )


class Trainer:
    """A model, its optimiser, and what `shared_config.training.loop` asks of them.

    Masters, moments and sums of gradients are of ``dtype``. With ``train.mixed_precision`` "bf16" or "fp8" a float32
    trainer computes in bfloat16, on copies of the masters that are made once for each update.

    Of several processes each has a trainer with its own share of the micro-batches, and all take each step together: R
    data ranks with N micro-batches each do what one device does with the N * R, ordered rank by rank within each of the
    N.

    Attributes:
        devices: what all ranks compute on.
        ranks: those that see different micro-batches.
        model: the masters.
        masters: all parameters, by name.
        copies: of masters in the dtype of the arithmetic, where that is another.
        parameters: those of them that are trained at some step.
        updates: optimiser steps done.
    """

    backend = "torch"

    def __init__(
        self,
        config: JobConfig,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        draws: bool = True,
        trains: bool = True,
    ):
        """``draws``: initial weights; False where `load_state` gives all next. ``trains``: whether it has moments."""
        self.config = config
        self.device = find_device(device)
        self.mesh = open_mesh(config, self.device)
        self.devices = Devices(process_count(), device_kind(self.device))
        self.ranks = Ranks(self.mesh)
        self.model, self.table = _build_model(config, self.device, dtype, self.mesh, draws)
        self.compute_dtype = compute_dtype(config, dtype)
        self.masters = {name: p for name, p in own_tensors(self.model).items() if isinstance(p, nn.Parameter)}
        self.parameters = trained_with(config.lora, trained_parameters(self.masters, config.vlm)) if trains else {}
        self.copies = Copies(self._narrowed() if self.mesh is None else {}, self.compute_dtype)
        self.optimizer = build_optimizer(self.parameters, self.table, config.optimizer)
        self._is_fused = self.mesh is None and can_fuse(self.optimizer)
        self.rates = build_rates(config)
        self.updates = 0
        self._cross_entropy = cross_entropy_of(self.mesh, config.model.vocab_size)
        fused = config.train.compile_model and self.device.type != "cpu"
        cross_entropy = functools.partial(self._cross_entropy, fused=fused)
        self._objective = Objective(self.model, config, cross_entropy)
        self._pipeline = pipeline_of(self.model, self.mesh, config, self.compute_dtype, cross_entropy)
        self._recorded: RecordedCalls | None = None
        if can_record(config, self.device, is_alone=self.mesh is None):
            self._recorded = RecordedCalls(self._micro_batch, self.model, self.masters, self.copies.current())

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Shaped[Tensor, "..."] | float]:
        """One update from the mean loss over all labels of the micro-batches.

        Args:
            micro_batches: each has ``tokens`` and ``labels``, int (B, S), and may have ``doc_ids`` and ``text_mask``,
                bool (B, S), False at padding; for images, what `shared_config.data.images.collate` gives.

        Returns:
            loss (cross entropy), grad_norm (before clipping), lr, tokens (labels that counted). With experts also
            aux_loss and z_loss (unweighted, averaged over the micro-batches), routing_entropy (of a token's
            distribution over experts, in nats, averaged over the routers) and dead_experts (that no token chose, over
            all routers). Where updates may be skipped, taken (whether this one was applied).
            Results of the device stay there, as scalar tensors.
        """
        count, rates = self.ranks.number(label_count(micro_batches)), self.rates(self.updates)
        self.model.train()
        inner_transformer(self.model).set_moe_step(self.updates, self.config.train.max_steps)
        self._freeze()
        micro_batches = with_noise_seeds(self.config, micro_batches, self.updates, self.ranks.rank, self.ranks.count)
        with step_span(self.updates), matmul_precision(self.config.train.matmul_precision):
            total_micro_batches = len(micro_batches) * self.ranks.count
            terms = self._differentiate(micro_batches, max(count, 1), total_micro_batches)
            total = self.ranks.sums(summed(terms))
            norm, taken = self._update(rates, total.loss)
            balance(self.model, total.expert_counts, taken=taken)
        self.updates += 1
        metrics = {"loss": total.loss, "grad_norm": norm, **routing_metrics(total), **taken_metric(taken)}
        return {**metrics, "lr": rates.lr, "tokens": count}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Shaped[Tensor, "..."] | float]:
        """``loss``: mean cross entropy over all labels of the batches, of all ranks; ``tokens``: their number. Changes
        nothing.
        """
        self.model.eval()
        total, count = torch.zeros((), device=self.device), self.ranks.number(label_count(batches))
        average = evaluated_weights(self.config, self.parameters, self.optimizer)
        with matmul_precision(self.config.train.matmul_precision), average:
            for loss in self._losses(batches):
                total = total + loss
            release(self.model)
        total = self.ranks.sums(total)
        return {"loss": total / max(count, 1), "tokens": count}

    def state(self) -> TrainingState:
        """Copies, on the host, of weights, buffers, moments and counts of updates. With several ranks all must call it,
        and the first gets the tensors.
        """
        own = get_state(self.model)
        weights = host_copies({name: own[name] for name in self.table if name in own}, self.mesh)
        moments = host_copies(get_optimizer_state(self.optimizer, self.parameters), self.mesh)
        return TrainingState(self.updates, weights, moments)

    def parts(self) -> StateParts:
        """Copies, on the host, of what this rank is to write of the state: together the ranks give each part once."""
        own, moments = get_state(self.model), get_optimizer_state(self.optimizer, self.parameters)
        weights = own_parts({name: own[name] for name in self.table if name in own}, self.mesh)
        return StateParts(self.updates, weights, own_parts(moments, self.mesh))

    def load_state(self, state: TrainingState | StateParts) -> None:
        """Continue from a state of either backend; without moments, only the weights are taken. A parameter that was
        frozen there and is not here starts with moments and a count of 0.

        Each rank reads what it holds.

        Raises:
            UserError: names or shapes that do not fit.
        """
        weights, optimizer = (
            of_own_stage(tensors, self.config.model.n_layers, self.mesh) for tensors in (state.weights, state.optimizer)
        )
        set_state(self.model, with_adapters(weights, self.config))
        if state.optimizer or state.step:
            moments = moments_under(self.config.vlm, self.table, optimizer, self.config.optimizer)
            set_optimizer_state(self.optimizer, self.parameters, moments, state.step)
        self.updates = state.step

    def profile(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Trace the steps taken within it, to new files of a folder."""
        return profile(folder, self._wait)

    def peak_memory(self) -> int | None:
        """The most bytes that the device of this rank has held at once; see `kempnerforge_torch.device.peak_memory`."""
        return peak_memory(self.device)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _differentiate(self, micro_batches: Sequence[Batch], count: int, total: int) -> list[Terms]:
        """Add the gradient of each micro-batch's share of the loss to the masters', one by one or in a pipeline.

        Args:
            count: labels of the step that count.
            total: micro-batches of the step, of all ranks.
        """
        if self._pipeline is not None:
            return self._pipeline.differentiate([self._inputs(batch) for batch in micro_batches], count)
        self.copies.current()  # cast here, where nothing is recorded
        is_only, terms = len(micro_batches) == 1, []
        take = functools.partial(self._recorded, is_only=is_only) if self._recorded else self._micro_batch
        for batch in micro_batches:
            terms.append(take(inputs=self._inputs(batch), count=count, micro_batches=total))
            if not is_only:
                self.copies.add_up()
        return terms

    def _micro_batch(self, **step: Any) -> Terms:
        return self._call(self._objective, "model.", step)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """The summed cross entropy of each batch."""
        if self._pipeline is not None:
            yield from self._pipeline.losses([self._inputs(batch) for batch in batches])
            return
        for batch in batches:
            inputs = self._inputs(batch)
            output = self._call(self.model, "", {**model_inputs(inputs), "factored_logits": True, "return_stats": True})
            yield self._cross_entropy(output.factors or output.logits, inputs["labels"])[0]

    def _call(self, module: nn.Module, prefix: str, inputs: dict[str, object]) -> Any:
        """Call a module that holds the model under ``prefix``, with the copies of the masters that have some."""
        if not (copies := self.copies.current()):
            return module(**inputs)
        weights = {prefix + name: weight for name, weight in {**self.masters, **copies}.items()}
        return torch.func.functional_call(module, weights, kwargs=inputs)

    def _narrowed(self) -> dict[str, Tensor]:
        """The masters that are cast to compute with: all, but for what decides a route."""
        cast = [name for name in self.masters if not self.table[name].full_precision]
        return {name: self.masters[name] for name in cast if self.masters[name].dtype != self.compute_dtype}

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        own = own_part(batch, self.mesh)
        return {name: to_device(array, self.device) for name, array in own.items()}

    def _update(self, rates: Rates, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clip and apply the gradients.

        Returns:
            The norm of the gradients, and whether the update is taken, a bool scalar; None if it always is.
        """
        gradients = self._take_gradients()
        complete_gradients(gradients, self.model, self.mesh, self.table)
        norm = global_norm(list(gradients.values()), 1 if self.mesh is None else self.mesh.layout.pp)
        step = self._step_of(gradients, rates, clip_factor(norm, self.config.train.grad_clip_norm))
        taken = None
        if self.config.train.on_nonfinite == "skip":
            taken = self.ranks.all_agree(loss.isfinite() & norm.isfinite() & step.stays_finite())
        step.take(taken)
        self.copies.note_update(gradients, is_copied=self._is_fused)
        return norm, taken

    def _take_gradients(self) -> dict[str, Tensor]:
        """The gradients by name. One that autograd left out counts as 0; frozen parameters have none, and stay."""
        found, gradients = self.copies.take_gradients(), {}
        for name, master in self.parameters.items():
            gradient = found.get(name, master.grad)
            if gradient is not None or master.requires_grad:
                gradients[name] = torch.zeros_like(master) if gradient is None else gradient
            master.grad = None
        return gradients

    def _step_of(self, gradients: dict[str, Tensor], rates: Rates, factor: Tensor | None) -> Step | FusedStep:
        by_master: dict[Tensor, Tensor] = {self.parameters[name]: gradient for name, gradient in gradients.items()}
        if not self._is_fused or not gradients:
            return Step(self.optimizer, by_master, rates, factor)
        return FusedStep(self.optimizer, by_master, rates, factor, self.copies.by_master())

    def _freeze(self) -> None:
        """Apply the freeze schedule at this step."""
        vlm = self.config.vlm
        if vlm is not None:
            specs = effective_freeze(self.updates, vlm.freeze, vlm.freeze_schedule)
            apply_freeze_specs(self.model, specs, vlm.module_patterns)


def _build_model(
    config: JobConfig, device: torch.device, dtype: torch.dtype, mesh: Mesh | None, draws: bool
) -> tuple[Transformer | VLMWrapper, ParameterTable]:
    """The model, seeded if it ``draws``, and its table. It is built without storage, and drawn in float32."""
    with torch.device("meta"):
        model = build_model(config)
    add_adapters(model, config)
    use_fp8(model, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    table = job_table(config, tower_of(config), shapes) | adapter_table(config)
    model = parallelize(model, config, mesh, table, device, dtype)
    model = (model if draws else model.to(dtype)).to_empty(device=device)
    model.init_weights_and_freqs(config.train.seed) if draws else model.init_freqs()
    init_adapters(model, config)
    return model.to(dtype), table
