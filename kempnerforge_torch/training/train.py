"""The trainer of one device: the gradient of a whole step's loss, the update, evaluation, and the state of it all.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kempnerforge_torch.model.grouped import GROUPED_MATMUL
from kempnerforge_torch.model.looped import LOOPED_MOE
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.state import get_state, own_tensors, set_state, to_numpy
from kempnerforge_torch.model.vlm import build_vlm_wrapper, inner_transformer
from kempnerforge_torch.model.wrappers import plain_modules
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training.freeze import apply_freeze_specs
from kempnerforge_torch.training.loss import IGNORED, cross_entropy, router_losses, router_stats
from kempnerforge_torch.training.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    get_optimizer_state,
    set_optimizer_state,
    stays_finite,
    update,
)
from kempnerforge_torch.training.profile import profile, step_span
from kempnerforge_torch.training.scheduler import build_schedule
from shared_config.contract.freeze import effective_freeze, moments_under, never_trained
from shared_config.contract.vision import job_table
from shared_config.data import open_data
from shared_config.data.images import with_noise_seeds
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.vision import tower_of
from shared_config.schema.job import JobConfig
from shared_config.training.loop import refuse_other_processes, run_training
from shared_config.training.trainer import TrainingSummary

Batch = Mapping[str, np.ndarray]

MATRIX_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        GROUPED_MATMUL,
        LOOPED_MOE,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)

log = logging.getLogger(__name__)


def train(
    config: JobConfig,
    *,
    device: torch.device | str | None = None,
    console: Console | None = None,
    overridden: Collection[str] = (),
) -> TrainingSummary:
    """Train the job on one device, from where its folder left it, and tell how it ended.

    Args:
        overridden: dotted fields that the command line sets: see `shared_config.training.resume.restore`.

    Raises:
        UserError: what can't be used, of data, folders and checkpoints; or this is one of several processes.
    """
    refuse_other_processes(process_count())
    data = open_data(config)
    return run_training(config, Trainer(config, device), data, console=console, overridden=overridden)


class Trainer:
    """A model, its optimiser, and what `shared_config.training.loop` asks of them.

    Masters, gradients and moments are of ``dtype``. With ``train.mixed_precision`` "bf16" a float32 trainer computes in
    bfloat16, on a copy of the masters that is cast for each micro-batch.

    Attributes:
        model: the masters.
        masters: all parameters, by name.
        parameters: those of them that are trained at one step or another.
        updates: optimiser steps done.
    """

    backend = "torch"

    def __init__(
        self, config: JobConfig, device: torch.device | str | None = None, *, dtype: torch.dtype = torch.float32
    ):
        self.config = config
        self.device = find_device(device)
        self.model = _build_model(config, self.device, dtype)
        shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(self.model).items()}
        self.table = job_table(config, tower_of(config), shapes)
        self.compute_dtype = compute_dtype(config, dtype)
        self.masters = {name: p for name, p in own_tensors(self.model).items() if isinstance(p, nn.Parameter)}
        self.parameters = trained_parameters(self.masters, config)
        self.optimizer = build_optimizer(self.parameters, self.table, config.optimizer)
        self.learning_rate = build_schedule(config)
        self.updates = 0
        checkpoint_activations(self.model, config.train.activation_checkpointing)
        if config.train.compile_model:
            compile_blocks(self.model, self.device)
        self._objective = _Objective(self.model, config, fused=config.train.compile_model and self.device.type != "cpu")

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """One update from the mean loss over all labels of the micro-batches.

        Args:
            micro_batches: each has ``tokens`` and ``labels``, int (B, S), and may have ``doc_ids`` and ``text_mask``,
                bool (B, S), False at padding; for images, what
                `shared_config.data.images.collate` gives.

        Returns:
            loss (cross entropy), grad_norm (before clipping), lr, tokens (labels that counted). With experts also
            aux_loss and z_loss (unweighted, averaged over the micro-batches), routing_entropy (of a token's
            distribution over experts, in nats, averaged over the routers) and dead_experts (that no token chose, over
            all routers). Where updates may be left out, taken (whether this one was not).
            What the device computes is left there, as scalar tensors.
        """
        count, lr = label_count(micro_batches), self.learning_rate(self.updates)
        self.model.train()
        inner_transformer(self.model).set_moe_step(self.updates, self.config.train.max_steps)
        self._freeze()
        micro_batches = with_noise_seeds(self.config, micro_batches, self.updates)
        with step_span(self.updates), matmul_precision(self.config.train.matmul_precision):
            terms = [self._differentiate(batch, max(count, 1), len(micro_batches)) for batch in micro_batches]
            total = _summed(terms)
            norm, taken = self._update(lr, total.loss)
            self._balance(total.expert_counts, taken)
        self.updates += 1
        metrics = {"loss": total.loss, "grad_norm": norm, **_routing_metrics(total), **_taken_metric(taken)}
        return {**metrics, "lr": lr, "tokens": count}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """``loss``: mean cross entropy over all labels of the batches; ``tokens``: their number. Changes nothing."""
        self.model.eval()
        total, count = torch.zeros((), device=self.device), label_count(batches)
        with matmul_precision(self.config.train.matmul_precision):
            for batch in batches:
                inputs = self._inputs(batch)
                output = self._call(self.model, "", {**model_inputs(inputs), "return_stats": True})
                total = total + cross_entropy(output.logits, inputs["labels"])[0]
        return {"loss": total / max(count, 1), "tokens": count}

    def state(self) -> TrainingState:
        """Copies, on the host, of weights, buffers, moments and counts of updates."""
        own = get_state(self.model)
        weights = {name: _host_copy(own[name]) for name in self.table if name in own}
        moments = get_optimizer_state(self.optimizer, self.parameters)
        return TrainingState(self.updates, weights, {name: _host_copy(tensor) for name, tensor in moments.items()})

    def load_state(self, state: TrainingState) -> None:
        """Go on from a state of either backend; without moments, only the weights are taken. What was frozen there and
        is not here starts with moments and a count of 0.

        Raises:
            UserError: names or shapes that do not fit.
        """
        set_state(self.model, state.weights)
        if state.optimizer or state.step:
            moments = moments_under(self.config.vlm, self.table, state.optimizer)
            set_optimizer_state(self.optimizer, self.parameters, moments, state.step)
        self.updates = state.step

    def profile(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Trace the steps taken within it, to new files of a folder."""
        return profile(folder, self._wait)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _differentiate(self, batch: Batch, count: int, micro_batches: int) -> Terms:
        """Add the gradient of one micro-batch's share of the loss to the masters'."""
        inputs = {"inputs": self._inputs(batch), "count": count, "micro_batches": micro_batches}
        return self._call(self._objective, "model.", inputs)

    def _call(self, module: nn.Module, prefix: str, inputs: dict[str, Any]) -> Any:
        """Call a module that holds the model under ``prefix``, with the masters cast to the compute dtype."""
        if self.compute_dtype == next(iter(self.masters.values())).dtype:
            return module(**inputs)
        masters = {name: master for name, master in self.masters.items() if not self.table[name].full_precision}
        narrow = dict(zip(masters, _Cast.apply(self.compute_dtype, *masters.values()), strict=True))
        weights = {prefix + name: weight for name, weight in {**self.masters, **narrow}.items()}
        return torch.func.functional_call(module, weights, kwargs=inputs)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in batch.items()}

    def _update(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clip and apply the gradients. One that autograd left out counts as 0; what is frozen has none, and stays.

        Returns:
            The norm of the gradients, and whether the update is taken, a bool scalar; None if it always is.
        """
        for master in self.parameters.values():
            if master.grad is None and master.requires_grad:
                master.grad = torch.zeros_like(master)
        gradients = {name: master.grad for name, master in self.parameters.items() if master.grad is not None}
        norm = clip_by_global_norm(gradients, self.config.train.grad_clip_norm)[1]
        taken = None
        if self.config.train.on_nonfinite == "skip":
            taken = loss.isfinite() & norm.isfinite() & stays_finite(self.optimizer, lr)
        update(self.optimizer, lr, taken)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, taken

    def _freeze(self) -> None:
        """Apply the freeze schedule at this step."""
        vlm = self.config.vlm
        if vlm is not None:
            specs = effective_freeze(self.updates, vlm.freeze, vlm.freeze_schedule)
            apply_freeze_specs(self.model, specs, vlm.module_patterns)

    def _balance(self, counts: Mapping[str, Tensor], taken: Tensor | None) -> None:
        """Let routers that balance move their buffers by the choices of the whole step, unless it is left out."""
        routers = {path: module for path, module in plain_modules(self.model).items() if hasattr(module, "update_bias")}
        for path, router in routers.items():
            before = {} if taken is None else {name: buffer.clone() for name, buffer in router.named_buffers()}
            cast(Any, router).update_bias(counts[router_key(path)])
            if taken is not None:
                for name, buffer in router.named_buffers():
                    buffer.copy_(torch.where(taken, buffer, before[name]))


class Terms(NamedTuple):
    """What a micro-batch adds to a step's metrics, without a graph.

    Attributes:
        loss: its share of the mean cross entropy.
        aux_loss, z_loss, entropy: its share of their means over micro-batches; the entropy also over routers.
        expert_counts: router -> (E,) choices; {} if dense.
    """

    loss: Any
    aux_loss: Any
    z_loss: Any
    entropy: Any
    expert_counts: dict[str, Any]


class _Objective(nn.Module):
    """Loss and its backward pass in one module, so that the weights that `functional_call` puts in are there when
    checkpointed blocks run again.
    """

    def __init__(self, model: nn.Module, config: JobConfig, *, fused: bool):
        super().__init__()
        self.model = model
        self.fused = fused
        self.aux_weight = config.model.moe_aux_loss_weight
        self.z_weight = config.model.moe_router_z_loss_weight

    def forward(self, inputs: dict[str, Tensor], count: int, micro_batches: int) -> Terms:
        """The terms of a micro-batch; gradients go to the leaves of the graph."""
        logits, stats = self.model(**model_inputs(inputs), return_stats=True)
        loss = cross_entropy(logits, inputs["labels"], fused=self.fused)[0] / count
        aux_loss, z_loss = (torch.as_tensor(term) / micro_batches for term in router_losses(stats))
        (loss + self.aux_weight * aux_loss + self.z_weight * z_loss).backward()
        entropies = [router.entropy / micro_batches for router in router_stats(stats)]
        entropy = sum(entropies) / max(len(entropies), 1)
        return Terms(loss.detach(), aux_loss.detach(), z_loss.detach(), entropy, expert_counts(stats))


class _Cast(torch.autograd.Function):
    """All tensors in another dtype, and their gradients back, each way at once: one by one they keep a host busy."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, *tuple[Tensor | None, ...]]:
        found = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        cast = dict(zip(found, _cast(list(found.values()), [ctx.dtypes[i] for i in found]), strict=True))
        return None, *(cast.get(i) for i in range(len(gradients)))


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if results:
        torch._foreach_copy_(results, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return results


@contextlib.contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compute_dtype(config: JobConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    return torch.bfloat16 if config.train.mixed_precision == "bf16" and dtype == torch.float32 else dtype


def find_device(name: torch.device | str | None) -> torch.device:
    """The device of a name, as "cpu" or "cuda:1"; None is the accelerator, or the CPU where there is none.

    Raises:
        UserError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    allowed = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
        known = device.type in allowed and torch.empty(1, device=device).numel() == 1
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"device = {str(name)!r}: {str(error).splitlines()[0]}; torch has {', '.join(allowed)}"
        ) from None
    if not known:
        raise UserError(f"device = {str(name)!r}: must be one of {', '.join(allowed)}, or one with its index, as cpu:0")
    return device


def process_count() -> int:
    """How many processes the framework has joined to work together; 1 without."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def label_count(batches: Sequence[Batch]) -> int:
    """Labels that count in the loss, over all batches."""
    return sum(int(np.count_nonzero(batch["labels"] != IGNORED)) for batch in batches)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch, without its labels, as the arguments of a model; a text model is told of padding as
    `ModalityContext` does.
    """
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    if "tokens" in inputs and "text_mask" in inputs:
        inputs["modality"] = ModalityContext(key_padding_mask=inputs.pop("text_mask"))
    return inputs


def expert_counts(stats: Mapping[int, Any]) -> dict[str, Any]:
    """The choices of each expert by router: "3" for layer 3, "3.image" where each modality has a router."""
    counts: dict[str, Any] = {}
    for layer, layer_stats in stats.items():
        routers = layer_stats if isinstance(layer_stats, dict) else {"": layer_stats}
        counts |= {f"{layer}.{name}".rstrip("."): router.expert_counts for name, router in routers.items()}
    return counts


def router_key(path: str) -> str:
    """The key in `expert_counts` of a router by its path, "layers.3.mlp.router" or "layers.3.mlp.image.router", of a
    model within another too.
    """
    layer, _, *modality, _ = path.partition("layers.")[2].split(".")
    return ".".join([layer, *modality[-1:]])


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Let each block keep less for its backward pass, and compute the rest again.

    Args:
        mode: "none"; "full" keeps the block's input; "selective" also what matrix products and attention put out.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keeps_products)
    for block in _blocks(model):
        _wrap_forward(block, functools.partial(checkpoint, **options))


def compile_blocks(model: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile each block as it is first called; on a CPU without a C++ compiler say so, and leave it."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        log.warning("train.compile_model: no C++ compiler (%s) on this machine; the model runs uncompiled", compiler)
        return
    for block in _blocks(model):
        block.compile(fullgraph=True, backend=backend)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for owner in (inner_transformer(model), getattr(model, "vision_encoder", None)):
        for stack in ("layers", "cross_attention_layers"):
            yield from getattr(owner, stack, nn.ModuleDict()).children()


def _wrap_forward(block: nn.Module, wrapper: Callable[..., Any]) -> None:
    """A plain function in the place of ``forward``, as compilation passes over others."""
    forward = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, *args, **kwargs)

    block.forward = wrapped


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def build_model(config: JobConfig) -> Any:
    """The model of a job: a transformer, or one with an encoder and an adapter around it."""
    if config.vlm is None or config.vision_encoder is None:
        return registry.get("model", config.model.model_type)(config.model)
    frames = config.video.max_frames if config.video is not None else 1
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm, frames)


def trained_parameters(masters: Mapping[str, Any], config: JobConfig) -> dict[str, Any]:
    """The parameters that are trained at one step of the job or another.

    Raises:
        UserError: there are none.
    """
    vlm = config.vlm
    if vlm is None:
        return dict(masters)
    never = never_trained(masters, vlm.freeze, vlm.freeze_schedule, vlm.module_patterns)
    trained = {name: master for name, master in masters.items() if name not in never}
    if not trained:
        raise UserError(f"vlm.freeze = {[spec.module for spec in vlm.freeze]}: freezes all there is, always")
    return trained


def _build_model(config: JobConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The seeded model. It comes into being without storage, and its initial values are float32 ones."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device=device)
    model.init_weights_and_freqs(config.train.seed)
    return model.to(dtype)


def _host_copy(tensor: Tensor) -> np.ndarray:
    return to_numpy(tensor.detach().to("cpu", copy=True))


def _summed(terms: Sequence[Terms]) -> Terms:
    counts = {router: sum(term.expert_counts[router] for term in terms) for router in terms[0].expert_counts}
    sums = {name: sum(getattr(term, name) for term in terms) for name in ("loss", "aux_loss", "z_loss", "entropy")}
    return Terms(**sums, expert_counts=counts)


def _taken_metric(taken: Any) -> dict[str, Any]:
    return {} if taken is None else {"taken": taken}


def _routing_metrics(total: Terms) -> dict[str, Any]:
    if not total.expert_counts:
        return {}
    dead = sum((counts_E == 0).sum() for counts_E in total.expert_counts.values())
    losses = {"aux_loss": total.aux_loss, "z_loss": total.z_loss}
    return {**losses, "routing_entropy": total.entropy, "dead_experts": dead}
