"""What `kempnerforge bench` measures of this backend; see `shared_config.bench.measure.Machine`.

Shapes: B batch, S sequence, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kempnerforge_torch.device import device_kind, find_device, peak_memory
from kempnerforge_torch.model.build import load_model
from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.model.state import own_tensors
from kempnerforge_torch.model.vlm import inner_transformer
from kempnerforge_torch.programs import compile_module
from kempnerforge_torch.training.mixed_precision import matmul_precision
from kempnerforge_torch.training.train import Trainer
from shared_config.bench.kernels import Kernel
from shared_config.bench.resident import peak_beyond, resident
from shared_config.bench.works import routed_layers
from shared_config.contract.labels import label_count
from shared_config.errors import UserError
from shared_config.interchange.huggingface_config import config_to_huggingface
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch


class Machine:
    """This backend on a device."""

    def __init__(self, device: str | None = None):
        self.device = find_device(device)
        self.kind = device_kind(self.device)
        self.versions: Mapping[str, str] = {"torch": torch.__version__}
        self.is_accelerator = self.device.type != "cpu"
        self.profile_note: str | None = None
        self._before = resident()

    def wait(self) -> None:
        """Return once the device has done all work."""
        if self.is_accelerator:
            torch.accelerator.synchronize(self.device)

    def product(self, size: int, dtype: str) -> Callable[[], object]:
        """The product of two square matrices."""
        a, b = (torch.randn(size, size, device=self.device).to(getattr(torch, dtype)) for _ in range(2))
        return lambda: a @ b

    def copy(self, size: int) -> Callable[[], object]:
        """A copy of so many bytes to another place of the device's memory."""
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return lambda: target.copy_(source)

    def step(self, job: JobConfig, batches: Sequence[Batch]) -> Callable[[], object]:
        """A training step of the micro-batches."""
        trainer = Trainer(job, self.device)
        return lambda: trainer.step(batches)

    def experts(self, job: JobConfig) -> Callable[[], object]:
        """The first layer of experts, forward and backward, for the tokens of a micro-batch."""
        dtype = _compute_dtype(job)
        model = inner_transformer(load_model(job.model, None, self.device))
        block: Any = model.layers[str(routed_layers(job)[0])]
        layer = block.mlp.train()
        for name, parameter in layer.named_parameters():
            if not name.startswith("router."):
                parameter.data = parameter.data.to(dtype)
        if job.train.compile_model and self.is_accelerator:
            compile_module(layer)
        x_BSD = torch.randn(job.train.batch_size, job.train.seq_len, job.model.dim, device=self.device)
        x_BSD = x_BSD.to(dtype).requires_grad_()
        wanted = [x_BSD, *layer.parameters()]

        def call() -> None:
            torch.autograd.grad(layer(x_BSD).sum(), wanted, allow_unused=True)

        return call

    def decoder(self, job: JobConfig, prompts: Sequence[Sequence[int]], new: int) -> Callable[[], object]:
        """So many tokens after each prompt, in the dtype of the job's arithmetic."""
        model = load_model(job.model, None, self.device).to(_compute_dtype(job))
        compiled = job.train.compile_model
        return lambda: generate(model, prompts, new, temperature=0.0, compile=compiled)

    def held(
        self, job: JobConfig, batches: Sequence[Batch]
    ) -> tuple[dict[str, int], Mapping[str, Callable[[], object]]]:
        """Bytes that a trainer holds throughout, by part; and what takes more: an evaluation, a step."""
        trainer = Trainer(job, self.device)
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        copies = trainer.copies.current()
        narrow = copies if len(batches) == 1 else {}
        parts = {
            "weights and buffers": _bytes([*own_tensors(trainer.model).values(), *copies.values()]),
            "moments": _bytes(value for value in states if isinstance(value, Tensor)),
            "gradients": _bytes(narrow.get(name, parameter) for name, parameter in trainer.parameters.items()),
        }
        return parts, {"evaluation": lambda: trainer.evaluate(batches), "step": lambda: trainer.step(batches)}

    def peak(self, call: Callable[[], object]) -> int | None:
        """The most bytes held during a call; None where that can't be told."""

        def whole() -> None:
            call()
            self.wait()

        if not self.is_accelerator:
            return peak_beyond(self._before, whole)
        forget = getattr(torch.get_device_module(self.device), "reset_peak_memory_stats", None)
        if forget is None:
            return None
        forget(self.device)
        whole()
        most = peak_memory(self.device)
        return None if most is None else most + (kept_by_graphs() if self.device.type == "cuda" else 0)

    def profile(self, call: Callable[[], object]) -> Sequence[Kernel]:
        """The kernels of a call, and how long each ran; on a CPU its operators, without those that they call."""
        self.wait()
        with torch.profiler.profile(acc_events=True) as found:
            call()
            self.wait()
        if not self.is_accelerator:
            return [Kernel(each.key, each.self_cpu_time_total / 1e6) for each in found.key_averages()]
        return [
            Kernel(each.key, each.self_device_time_total / 1e6)
            for each in found.key_averages()
            if each.device_type.name != "CPU" and not each.is_user_annotation
        ]


class Foreign(Machine):
    """The same work by the model of transformers that has the same family and shapes, its weights as that draws them:
    masters in float32 with autocast and torch's AdamW where the job is so, attention by torch's SDPA.
    """

    def __init__(self, device: str | None = None):
        super().__init__(device)
        import transformers  # pyright: ignore[reportMissingImports]

        self.versions = {**self.versions, "transformers": transformers.__version__}

    def step(self, job: JobConfig, batches: Sequence[Batch]) -> Callable[[], object]:
        """As `Machine.step`."""
        if any("doc_ids" in batch for batch in batches):
            raise UserError("--against hf: its models keep no documents of a row apart; leave packed out")
        model = self._model(job).train()
        if job.train.compile_model and self.is_accelerator:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=job.optimizer.lr, fused=self.is_accelerator)
        inputs = [{name: torch.from_numpy(np.int64(batch[name])) for name in ("tokens", "labels")} for batch in batches]
        count = max(label_count(batches), 1)

        def call() -> None:
            for batch in inputs:
                tokens, labels = (batch[name].to(self.device, non_blocking=True) for name in ("tokens", "labels"))
                with self._autocast(job):
                    logits = model(input_ids=tokens, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
                (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def precise() -> None:
            with matmul_precision(job.train.matmul_precision):
                call()

        return precise

    def decoder(self, job: JobConfig, prompts: Sequence[Sequence[int]], new: int) -> Callable[[], object]:
        """As `Machine.decoder`; `generate` with a static cache, which on a GPU compiles by itself."""
        model = self._model(job).to(_compute_dtype(job)).eval()
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return lambda: model.generate(ids, attention_mask=mask, cache_implementation="static", **options)

    def _model(self, job: JobConfig) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

        fields: dict[str, Any] = config_to_huggingface(job.model)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).to(self.device)

    def _autocast(self, job: JobConfig) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if job.train.casts else contextlib.nullcontext()


def kept_by_graphs() -> int:
    """Bytes that CUDA graphs hold for what they compute at each replay, which the allocator counts as free."""
    segments: Any = torch.cuda.memory_snapshot()
    own = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in own)


def _compute_dtype(job: JobConfig) -> torch.dtype:
    return torch.bfloat16 if job.train.casts else torch.float32


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
