"""What `kempnerforge bench` measures of this backend; see `shared_config.bench.measure.Machine`.

Shapes: B batch, S sequence, D model dim.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kempnerforge_jax.device import device_kind, find_device, peak_memory
from kempnerforge_jax.model.build import load_model
from kempnerforge_jax.model.generate import generate
from kempnerforge_jax.model.state import merge, split
from kempnerforge_jax.model.vlm import inner_transformer
from kempnerforge_jax.training.mixed_precision import matmul_precision
from kempnerforge_jax.training.profile import profile
from kempnerforge_jax.training.train import Trainer
from shared_config.bench.kernels import Event, Kernel
from shared_config.bench.resident import peak_beyond, resident
from shared_config.bench.works import routed_layers
from shared_config.contract.freeze import trained_parameters
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

NO_KERNELS = "JAX names fusions on a CPU, not kernels, so there is no profile by kind"


class Machine:
    """This backend on a device."""

    def __init__(self, device: str | None = None):
        self.device = find_device(device)
        self.kind = device_kind(self.device)
        self.versions: Mapping[str, str] = {"jax": jax.__version__}
        self.is_accelerator = self.device.platform != "cpu"
        self.profile_note = None if self.is_accelerator else NO_KERNELS
        self._before = resident()
        self._last: object = None

    def wait(self) -> None:
        """Return once the device has done all work."""
        jax.block_until_ready(self._last)

    def product(self, size: int, dtype: str) -> Callable[[], object]:
        """The product of two square matrices."""
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.device_put(jax.random.normal(key, (size, size), dtype), self.device) for key in keys)
        return self._kept(jax.jit(lambda a, b: a @ b), a, b)

    def copy(self, size: int) -> Callable[[], object]:
        """So many bytes read and written, in place: each copy to another place would also be allocated."""
        array = jax.device_put(jnp.zeros(size // 4, jnp.float32), self.device)
        write = jax.jit(lambda array: array + 1, donate_argnums=0)

        def call() -> object:
            nonlocal array
            array = write(array)
            return array

        return self._kept(call)

    def step(self, job: JobConfig, batches: Sequence[Batch]) -> Callable[[], object]:
        """A training step of the micro-batches."""
        trainer = Trainer(job, self.device)
        return self._stepping(trainer, batches)

    def experts(self, job: JobConfig) -> Callable[[], object]:
        """The first layer of experts, forward and backward, for the tokens of a micro-batch."""
        dtype = _compute_dtype(job)
        model = inner_transformer(load_model(job.model, None, self.device))
        graphdef, parameters, buffers = split(model.layers[str(routed_layers(job)[0])].mlp)
        parameters = {
            name: array if name.startswith("router.") else array.astype(dtype) for name, array in parameters.items()
        }
        shape = (job.train.batch_size, job.train.seq_len, job.model.dim)
        x_BSD = jax.device_put(jax.random.normal(jax.random.key(0), shape, dtype), self.device)

        def total(parameters: Any, x_BSD: jax.Array) -> jax.Array:
            return merge(graphdef, parameters, buffers)(x_BSD).sum()

        return self._kept(jax.jit(jax.grad(total, argnums=(0, 1))), parameters, x_BSD)

    def decoder(self, job: JobConfig, prompts: Sequence[Sequence[int]], new: int) -> Callable[[], object]:
        """So many tokens after each prompt, in the dtype of the job's arithmetic."""
        graphdef, parameters, buffers = split(load_model(job.model, None, self.device))
        dtype = _compute_dtype(job)
        model = merge(graphdef, {name: array.astype(dtype) for name, array in parameters.items()}, buffers)

        def decoded() -> object:
            with matmul_precision(job.train.matmul_precision):
                return generate(model, prompts, new, temperature=0.0)

        return self._kept(decoded)

    def held(
        self, job: JobConfig, batches: Sequence[Batch]
    ) -> tuple[dict[str, int], Mapping[str, Callable[[], object]]]:
        """Bytes that a trainer holds throughout, by part; and what takes more: an evaluation, a step."""
        trainer = Trainer(job, self.device)
        parts = {
            "weights and buffers": _bytes((trainer.parameters, trainer.buffers)),
            "moments": _bytes(trainer.optimizer_state),
            "gradients": _bytes(trained_parameters(trainer.parameters, job.vlm)),
        }
        evaluation = self._kept(lambda: trainer.evaluate(batches)["loss"])
        return parts, {"evaluation": evaluation, "step": self._stepping(trainer, batches)}

    def peak(self, call: Callable[[], object]) -> int | None:
        """The most bytes held during a call, or before it in this process; None where that can't be told."""

        def whole() -> None:
            call()
            self.wait()

        if not self.is_accelerator:
            return peak_beyond(self._before, whole)
        whole()
        return peak_memory(self.device)

    def profile(self, call: Callable[[], object]) -> Sequence[Kernel]:
        """The kernels of a call, and how long each ran."""
        with tempfile.TemporaryDirectory(prefix="kempnerforge-") as folder:
            with profile(Path(folder), self.wait):
                call()
            (file,) = Path(folder).rglob("*.trace.json.gz")
            return kernels_of(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])

    def _stepping(self, trainer: Trainer, batches: Sequence[Batch]) -> Callable[[], object]:
        """A step ends with its metrics, and its new parameters."""

        def step() -> object:
            metrics = trainer.step(batches)
            return metrics, trainer.parameters

        return self._kept(step)

    def _kept(self, function: Callable[..., object], *arguments: object) -> Callable[[], object]:
        """A call whose result `wait` waits for; that of an earlier call is given up first."""

        def call() -> None:
            self._last = None
            self._last = function(*arguments)

        return call


def kernels_of(events: Sequence[Event]) -> list[Kernel]:
    """What ran on the streams of devices, of the events of a trace."""
    every: Any = events
    named = [event for event in every if event.get("ph") == "M"]
    devices = {
        event["pid"]
        for event in named
        if event["name"] == "process_name" and event["args"]["name"].startswith("/device:")
    }
    streams = {
        (event["pid"], event["tid"])
        for event in named
        if event["name"] == "thread_name" and event["args"]["name"].startswith("Stream")
    }
    return [
        Kernel(event["name"], event["dur"] / 1e6)
        for event in every
        if event.get("ph") == "X" and event["pid"] in devices and (event["pid"], event["tid"]) in streams
    ]


def _compute_dtype(job: JobConfig) -> Any:
    return jnp.dtype("bfloat16" if job.train.casts else "float32")


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
