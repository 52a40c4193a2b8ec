"""A parallel layout held to one device: the training steps that show it, and the trace of what they did.

A step has the same micro-batches in every layout, as many as one device accumulates; each data rank computes its share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared_config.contract.initialise import state_hash
from shared_config.contract.sharding import layout_of
from shared_config.contract.warm_start import without_warm_start
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.images import images_of
from shared_config.parity.request import default_length, make_request, request_meta
from shared_config.parity.scenarios import STATE, trained_tensors
from shared_config.parity.traces import Trace
from shared_config.parity.work import Trained, Work, scenario_batch
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

LAYOUT = "layout"
"""What the command `trace` calls these steps."""
MOST = 5
"""How many layouts are compared at a time."""
STEPS, CLIP = 3, 0.1
"""How many, and the norm that gradients are clipped to: far below that of a gradient, so that every step is clipped."""
REPLICAS = "replicas"
"""Group of a trace: int64 (devices, 2), for each device the number of the part that it holds and a hash of its bits."""
SHARES_OF_LABELS = (0.8, 0.6, 0.9, 0.4)
"""Of the micro-batches, in turn: a step's mean is over labels that ranks have in different numbers."""


@dataclass(frozen=True)
class Spread:
    """What a backend did in a layout.

    Attributes:
        trained: numbers of each step; the states after the first and the last.
        initial: values that the trainer started with by itself, by name.
        device: the platform of the devices.
        sizes: of the mesh axes; {} without a mesh.
        held: elements of the model's tensors that each device holds.
        replicas: as in a trace, of all that the devices hold.
    """

    trained: Trained
    initial: Mapping[str, np.ndarray]
    device: str
    sizes: Mapping[str, int]
    held: Sequence[int]
    replicas: Mapping[str, np.ndarray]


class LayoutBackend(Protocol):
    """What the module ``layouts`` of a backend provides."""

    NAME: str

    def train(self, config: JobConfig, state: TrainingState, steps: Sequence[Sequence[Batch]]) -> Spread:
        """Steps of micro-batches from a state on, in float64 on the CPU, on as many devices as the layout of the config
        has; the micro-batches are those of all data ranks, in the order in which one device takes them.

        Raises:
            ConfigError: a layout that the model or the backend can't have.
        """
        ...


def layout_overrides(layout: DistributedConfig, micro_batches: int) -> list[str]:
    """What the steps in a layout change of a config, of whose steps each has so many micro-batches."""
    ranks = layout_of(layout, layout.fewest_devices).data_ranks
    fields = {f"distributed.{field.name}": getattr(layout, field.name) for field in dataclasses.fields(layout)}
    fields |= {
        "train.grad_accum_steps": micro_batches // ranks,
        "train.grad_clip_norm": CLIP,
        "train.mixed_precision": "fp32",
        "train.compile_model": "false",
        "scheduler.name": "constant",
        "scheduler.warmup_steps": 0,
    }
    return [f"--{name}={value}" for name, value in fields.items()]


def micro_batches_for(layouts: Sequence[DistributedConfig]) -> int:
    """Of a step: as many for each data rank of each layout, more than one, and for each pipeline stage one."""
    own = max((layout.pp for layout in layouts), default=1)
    return max(2, own) * math.lcm(*(layout_of(layout, layout.fewest_devices).data_ranks for layout in layouts))


def described(layout: DistributedConfig) -> str:
    """The sizes that are not 1."""
    sizes = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def record_layout(
    backend: LayoutBackend, config: JobConfig, *, seed: int = 0, weights: str | Mapping[str, np.ndarray] = "validation"
) -> Trace:
    """Let a backend take the steps in the layout of a config, and keep what came of it.

    Args:
        weights: as for a trace.

    Raises:
        ConfigError: a layout that the model or the backend can't have.
    """
    config = without_warm_start(config)
    request = make_request(config, dtype="float64", seed=seed, weights=weights)
    work = Work(config, "float64", seed, request.weights, False, None, None)
    spread = backend.train(as_drawn(config), work.state, drawn_steps(work))
    extra = {"scenario": LAYOUT, "sizes": dict(spread.sizes), "held": list(spread.held)}
    extra["lr"] = sum(float(metrics["lr"]) for metrics in spread.trained.metrics)
    tensors = trained_tensors(spread.trained, config)
    tensors |= {f"{REPLICAS}/{name}": parts for name, parts in spread.replicas.items()}
    initial = {name: np.asarray(value, np.float32) for name, value in spread.initial.items()}
    meta = dataclasses.replace(
        request_meta(request),
        backend=backend.NAME,
        device=spread.device,
        dtype=str(tensors[next(name for name in tensors if name.startswith(f"{STATE}/"))].dtype),
        initial_hash=state_hash(initial),
        extra=extra,
    )
    return Trace(tensors, meta)


def as_drawn(config: JobConfig) -> JobConfig:
    """The config with the sizes of what is drawn: a layout divides the positions of rows as its config counts them."""
    train, data = config.train.replace(seq_len=default_length(config)), config.data
    return config.replace(train=train, data=data.replace(max_images=images_of(config)))


def drawn_steps(work: Work) -> list[list[dict[str, np.ndarray]]]:
    """The micro-batches of each step, of all data ranks."""
    layout = work.config.distributed
    count = work.config.train.grad_accum_steps * layout_of(layout, layout.fewest_devices).data_ranks

    def drawn(place: int) -> dict[str, np.ndarray]:
        own = dataclasses.replace(work, seed=work.seed + place)
        return scenario_batch(own, LAYOUT, ignored=1 - SHARES_OF_LABELS[place % len(SHARES_OF_LABELS)])

    return [[drawn(step * count + index) for index in range(count)] for step in range(STEPS)]


def bits_of(array: np.ndarray) -> int:
    """A hash of the bits of an array."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
