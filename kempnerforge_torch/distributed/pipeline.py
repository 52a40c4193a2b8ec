"""Pipeline parallelism: ranks along "pp" hold layers that follow one another, and send each other the residual stream
of each micro-batch and its gradient, by the engine of torch.

    4 layers on 2 stages    stage 0    token_embedding, layers.0, layers.1
                            stage 1    layers.2, layers.3, norm, output_head; the loss

A step runs in the order 1F1B (Narayanan et al. 2021, arXiv:2006.09503): once the pipeline is full, each stage takes a
micro-batch forward and one backward in turn, and keeps the activations of at most as many as there are stages. An
evaluation runs forward alone.

Shapes: N micro-batches, B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from kempnerforge_torch.distributed.context_parallel import CrossEntropy
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.training.terms import Terms, model_inputs
from shared_config.contract.labels import loss_terms
from shared_config.contract.sharding import stage_layers
from shared_config.errors import ConfigError
from shared_config.schema.job import JobConfig

Batches = Sequence[Mapping[str, Shaped[Tensor, "B S"]]]
"""Tokens, labels and what else there is of each micro-batch, all of one shape."""


def keep_stage(model: nn.Module, mesh: Mesh) -> None:
    """Leave a model, in place, what this rank's stage holds of it, under the names that the whole has.

    Raises:
        ConfigError: a model of another kind.
    """
    stages, stage = mesh.layout.pp, mesh.group("pp").rank()
    if not isinstance(model, Transformer):
        raise ConfigError([f"distributed.pp = {stages}: must be 1 for a model of type {type(model).__name__}"])
    own = stage_layers(len(model.layers), stages)[stage]
    for name in [name for name in model.layers if int(name) not in own]:
        del model.layers[name]
    if stage > 0:
        model.token_embedding = None
    if stage < stages - 1:
        model.norm = model.output_head = None


def pipeline_of(
    model: nn.Module, mesh: Mesh | None, config: JobConfig, dtype: torch.dtype, cross_entropy: CrossEntropy
) -> Pipeline | None:
    """The pipeline of a layout that has one; arguments as for `Pipeline`."""
    if mesh is None or mesh.layout.pp == 1:
        return None
    assert isinstance(model, Transformer)
    return Pipeline(model, mesh, dtype, cross_entropy, loss_terms(config.train))


class Pipeline:
    """The stages of a model, of which this rank has one. All ranks along "pp" are given the same micro-batches, and
    call each method together.

    Args:
        model: what this rank holds of it.
        dtype: of the residual stream.
        cross_entropy: of the logits of the last stage.
        loss_terms: what it takes where the model is trained.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        loss_terms: Mapping[str, float],
    ):
        self._stage = _Stage(model, cross_entropy, loss_terms)
        self._mesh, self._dim, self._dtype = mesh, model.config.dim, dtype
        self._schedules: dict[tuple[int, torch.Size, torch.device, bool], Schedule1F1B | ScheduleGPipe] = {}

    def differentiate(self, micro_batches: Batches, count: int) -> list[Terms]:
        """Add the gradients of the cross entropy of all micro-batches, divided by ``count``, to those of the parameters
        of this stage. Returns the terms of each micro-batch, the same on all stages.
        """
        losses = self._agreed(self._run(micro_batches, count)) / count
        zero = torch.zeros_like(losses[0])
        return [Terms(loss, zero, zero, 0.0, {}) for loss in losses]

    def losses(self, batches: Batches) -> Iterator[Float[Tensor, ""]]:
        """The summed cross entropy of each batch, the same on all stages. As many are on their way at a time as there
        are stages.
        """
        stages = self._mesh.layout.pp
        for first in range(0, len(batches), stages):
            yield from self._agreed(self._run(batches[first : first + stages]))

    def _run(self, batches: Batches, count: int | None = None) -> Float[Tensor, "N"]:
        """The summed cross entropy of each batch on the last stage, 0 on others; differentiated if there is a count."""
        inputs: dict[str, Any] = _joined(batches)
        tokens, schedule = inputs.pop("tokens"), self._schedule(batches, trains=count is not None)
        arguments = [tokens] if self._mesh.group("pp").rank() == 0 else []
        counts = None if count is None else torch.full((len(batches),), count, device=tokens.device)
        try:
            losses = schedule.step(*arguments, target=counts, **inputs)
        except RuntimeError as error:  # the engine's account of one that a stage has raised
            raise error.__cause__ or error from None
        return tokens.new_zeros(len(batches), dtype=self._loss_dtype) if losses is None else losses.detach()

    def _agreed(self, losses: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """What the last stage has, on all."""
        dist.all_reduce(losses, group=self._mesh.group("pp"))
        return losses

    def _schedule(self, batches: Batches, trains: bool) -> Schedule1F1B | ScheduleGPipe:
        """The order in which stages take so many micro-batches of this shape. What they send each other is known
        beforehand, so that no batch runs an extra time to find out.
        """
        tokens = batches[0]["tokens"]
        key = (len(batches), tokens.shape, tokens.device, trains)
        if key not in self._schedules:
            stages, group = self._mesh.layout.pp, self._mesh.group("pp")
            stream = torch.empty(*tokens.shape, self._dim, dtype=self._dtype, device="meta", requires_grad=True)
            loss = torch.empty(1, dtype=self._loss_dtype, device="meta", requires_grad=True)
            stage = PipelineStage(
                self._stage,
                group.rank(),
                stages,
                tokens.device,
                input_args=tokens.to("meta") if group.rank() == 0 else stream,
                output_args=loss if group.rank() == stages - 1 else stream,
                group=group,
            )
            order = Schedule1F1B(stage, len(batches), _share, scale_grads=False) if trains else None
            self._schedules[key] = order or ScheduleGPipe(stage, len(batches))
        return self._schedules[key]

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self._dtype, torch.float32)


class _Stage(nn.Module):
    """What a stage computes of a micro-batch: the residual stream that leaves it, or the loss."""

    def __init__(self, model: Transformer, cross_entropy: CrossEntropy, loss_terms: Mapping[str, float]):
        super().__init__()
        self.model = model
        self.loss_terms = loss_terms
        self.cross_entropy = cross_entropy

    def forward(
        self, x: Integer[Tensor, "B S"] | Float[Tensor, "B S D"], labels: Integer[Tensor, "B S"], **others: Any
    ) -> Float[Tensor, "B S D"] | Float[Tensor, "1"]:
        """The stream (B, S, D); on the last stage the summed cross entropy (1,)."""
        inputs = model_inputs({"tokens": x, **others})
        output = self.model(**inputs, factored_logits=True, return_stats=True)
        if self.model.output_head is None:
            return output.logits
        terms = self.loss_terms if self.model.training else {}
        return torch.stack([self.cross_entropy(output.factors or output.logits, labels, **terms)[0]])


def _share(total: Float[Tensor, "1"], count: Integer[Tensor, "1"]) -> Float[Tensor, ""]:
    """What is differentiated of a micro-batch: its share of the mean over all labels of the step."""
    return (total / count).squeeze()


def _joined(batches: Batches) -> dict[str, Tensor]:
    """One batch of all their rows, (N * B, S), which the engine divides again.

    Raises:
        ValueError: they are not all of one shape.
    """
    shapes = {tuple(array.shape) for batch in batches for array in batch.values()}
    if len(shapes) > 1 or len({frozenset(batch) for batch in batches}) > 1:
        raise ValueError(f"micro-batches of a pipeline have shapes {sorted(shapes)}: must be of one shape")
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
