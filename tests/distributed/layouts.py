"""Jobs in parallel layouts, and what each of several processes finds that differs from one device.

The processes run all cases one after another, as starting them costs more than the cases do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.spawn import start_processes

from shared_config.contract import activations, labels
from shared_config.contract.labels import IGNORED
from shared_config.contract.parameters import EMBEDDING
from shared_config.data import open_data
from shared_config.errors import ConfigError, UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import Box, Parts, StateParts
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.jobs import EXPERTS, draw_batch, tiny_job
from tests.mutants import Mutant, planted
from tests.torch.waits import noting_waits, rows_of_no_group_spoiled

STEPS, MICRO_BATCHES = 3, 2
EVALUATED = 3
"""Batches of each rank: more than the stages of a pipeline of two, and left over."""
AGREED = 1e-10
"""Of the largest value of a tensor, or of `FLOORS`."""
LOGITS_BYTES = 8 * 8 * 37
"""Of logits that exist at a time in the steps of a layout, about: those of 8 tokens of `MODELS`, or of 16 in two parts.
"""
LARGE = 1e308
"""An embedding that is not finite once it is scaled."""
FLOORS = {"weights": 1e-3, "optimizer": 1e-6}
"""What a tensor's largest value is taken to be at least. The gradient of a key's bias is truly 0, and AdamW makes steps
of its rounding: the floor of weights is about how far a step moves one.
"""
DENSE = {
    "tie_embeddings": True, "attention_bias": True, "n_heads": 4, "n_kv_heads": 4, "norm_placement": "both",
    "mlp_bias": True, "attention_scale": 0.3, "embedding_scale": 2.5, "residual_scale": 0.7, "logit_divisor": 3.0,
}  # fmt: skip
MIXED = {
    **DENSE, "n_layers": 4, "sliding_window": 5, "attention_pattern": ("window", "full_nope"),
    "window_rope_theta": 70.0,
    "norm_type": "rmsnorm_1p", "activation": "geglu_tanh", "attention_softcap": 2.0, "logit_softcap": 1.5,
}  # fmt: skip
STAGED = {**MIXED, "tie_embeddings": False, "n_layers": 5, "attention_pattern": ("full", "window", "full_nope")}
SIGMOID = {
    **EXPERTS,
    "moe_shared_experts": 1,
    "moe_shared_expert_gate": True,
    "num_experts": 4,
    "moe_frequency": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
}
SOFTMAX = {**SIGMOID, "moe_router": "softmax_topk", "moe_sequence_aux_loss_weight": 0.0, "moe_aux_loss_weight": 0.1}
UNGATED = {"moe_shared_expert_gate": False}
LIMITED = {**SOFTMAX, "moe_capacity_factor": 0.6, "moe_gradient_scale": True, "moe_shared_experts": 0, **UNGATED}
APART = {**SIGMOID, "moe_packed_experts": False}
SCALED = {**SOFTMAX, "moe_gradient_scale": True}
MODELS = {
    "dense": DENSE,
    "mixed": MIXED,
    "staged": STAGED,
    "sigmoid": SIGMOID,
    "softmax": SOFTMAX,
    "limited": LIMITED,
    "scaled": SCALED,
    "apart": APART,
}
VLM = [
    "--model.dim=32", "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=4", "--model.ffn_hidden_dim=48",
    "--model.max_seq_len=64", "--vision_encoder.image_size=16", "--vision_encoder.feature_dim=24",
    "--vision_encoder.n_heads=4", "--vision_encoder.n_layers=1", "--train.batch_size=2", "--vlm.max_text_len=24",
    "--train.mixed_precision=fp32", "--train.compile_model=false", "--train.grad_clip_norm=0.5",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in a layout.

    Attributes:
        model: a key of `MODELS`, or the arch of an image job.
        ranks: how many processes.
        layout: fields of ``[distributed]``.
        options: further fields of the job, by section.
        exchanges: whether rows are exchanged between ranks with different experts, however few bytes tokens are.
        overflows: whether, in the first step, the last rank's last micro-batch does, by a token that no other has.
    """

    model: str
    ranks: int
    layout: Mapping[str, int]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exchanges: bool = False
    overflows: bool = False

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.layout.items())
        options = "".join(f", {name} {value}" for part in self.options.values() for name, value in part.items())
        marks = ", exchanged" * self.exchanges + ", overflows" * self.overflows
        return f"{self.model} on {self.ranks}: {sizes or 'fsdp'}{options}{marks}"

    @property
    def key(self) -> str:
        """Names what one device does, whatever the layout."""
        options = [f"{part}.{name}={value}" for part, fields in self.options.items() for name, value in fields.items()]
        return f"{self.model}-{self.shares}-{self.micro_batches}-{self.overflows}-{sorted(options)}"

    @property
    def shares(self) -> int:
        """How many ranks see different micro-batches."""
        return self.ranks // math.prod(self.layout.get(axis, 1) for axis in ("tp", "cp", "pp"))

    @property
    def micro_batches(self) -> int:
        """Of a step, of each of these ranks."""
        return max(MICRO_BATCHES, self.layout.get("pp", 1))

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """Within it, trainers get rows to experts as the case says."""
        most = -math.inf if self.exchanges else activations.GATHERED_MORE
        with patch.object(activations, "GATHERED_MORE", most):
            yield

    def batches(self) -> Callable[[int], Mapping[str, np.ndarray]]:
        """Micro-batches by number."""
        data, last = _batches(self.job({})), self.micro_batches * self.shares - 1
        return functools.partial(_with_token, data, self.job({}).model.vocab_size - 1, last) if self.overflows else data

    def prepare(self, trainer: Any, state: Callable[[Any], TrainingState]) -> None:
        """Give a trainer the weights that the case begins with."""
        if self.overflows:
            own = state(trainer)
            next(own.weights[name] for name in own.weights if name.endswith(EMBEDDING))[-1] = LARGE
            trainer.load_state(own)

    def job(self, layout: Mapping[str, int]) -> JobConfig:
        if self.model in MODELS:
            sections = {"train": {"grad_accum_steps": self.micro_batches}, "distributed": layout}
            for name, fields in self.options.items():
                sections[name] = {**sections.get(name, {}), **fields}
            return tiny_job({**MODELS[self.model], **sections.pop("model", {})}, **sections)
        sizes = [f"--distributed.{name}={size}" for name, size in layout.items()]
        more = [f"--{part}.{name}={value}" for part, fields in self.options.items() for name, value in fields.items()]
        return load_config(f"debug_vlm_{self.model}", [*VLM, *sizes, *more])


@dataclass(frozen=True)
class Found:
    """What a trainer did.

    Attributes:
        metrics: numbers of each step.
        states: after the first step and the last.
        evaluated: before the first step; {} if it was not asked to.
    """

    metrics: list[dict[str, float]]
    states: list[TrainingState]
    evaluated: dict[str, float] = field(default_factory=dict)


def run_processes(
    folder: Path,
    ranks: int,
    cases: Sequence[Case],
    mutants: Sequence[tuple[Mutant, Case]] = (),
    refused: Sequence[Case] = (),
) -> dict[str, list[str]]:
    """What differs in each case, and in the first steps under each mutant, as any of the processes sees it; and why the
    others can't be.
    """
    multiprocessing.set_forkserver_preload(["kempnerforge_torch.training.train", "tests.distributed.layouts"])
    start_processes(
        _one_of_them,
        (ranks, str(folder), list(cases), list(mutants), list(refused)),
        nprocs=ranks,
        start_method="forkserver",
    )
    return pickle.loads((folder / "found").read_bytes())


def _one_of_them(
    rank: int,
    ranks: int,
    folder: str,
    cases: list[Case],
    mutants: list[tuple[Mutant, Case]],
    refused: list[Case],
) -> None:
    torch.set_num_threads(1)
    every = list({case.key: case for case in (*cases, *(case for _, case in mutants))}.values())
    for case in every[rank::ranks]:
        Path(folder, case.key).write_bytes(pickle.dumps(on_one_device(case)))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    dist.barrier()
    truths = {case.key: pickle.loads(Path(folder, case.key).read_bytes()) for case in every}
    try:
        found = {
            str(case): _together(differences(case, truths[case.key], folder=Path(folder, f"run_{place}")))
            for place, case in enumerate(cases)
        }
        found |= {str(case): _together(refusals(case)) for case in refused}
        for mutant, case in mutants:
            with planted(mutant, "torch"):
                count = 1 if case.model in MODELS else STEPS
                found[str(mutant)] = _together(differences(case, truths[case.key], count))
        if rank == 0:
            Path(folder, "found").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


def on_one_device(case: Case) -> Found:
    """What the layout has to do, with the micro-batches of all ranks."""
    job = case.job({})
    data = case.batches()
    count = case.micro_batches * case.shares
    trainer, batches = _trainer(job), [[data(step * count + index) for index in range(count)] for step in range(STEPS)]
    case.prepare(trainer, whole_state)
    evaluated = _numbers(trainer.evaluate([data(index) for index in range(EVALUATED * case.shares)]))
    return replace(steps(trainer, batches), evaluated=evaluated)


def differences(case: Case, truth: Found, count: int = STEPS, folder: Path | None = None) -> list[str]:
    """What this rank finds to differ from one device, or between ranks, in the first steps; where they wait for a
    device; and, given a folder, what differs once the state has been written there and read again. Rows of no group are
    NaN.
    """
    with case.as_asked(), rows_of_no_group_spoiled():
        return _differences(case, truth, count, folder)


@contextlib.contextmanager
def chunks_of_logits() -> Iterator[None]:
    """Within it, logits exist of about `LOGITS_BYTES` at a time."""
    never = patch.object(labels, "takes_less_whole", lambda *_: False)
    with patch.object(labels, "LOGITS_BYTES", LOGITS_BYTES), never:
        yield


def _differences(case: Case, truth: Found, count: int, folder: Path | None) -> list[str]:
    job = case.job(case.layout)
    trainer, data = _trainer(job), case.batches()
    case.prepare(trainer, whole_state)
    asked = [] if job.train.compile_model else noting_waits(trainer)
    rank, every = trainer.ranks.rank, case.micro_batches * case.shares
    own = [[data(step * every + index) for index in range(rank, every, case.shares)] for step in range(count)]
    held_out = [data(index) for index in range(rank, EVALUATED * case.shares, case.shares)]
    with positions_of_norms(trainer.model) as positions:
        assert _numbers(trainer.evaluate([])) == {"loss": 0.0, "tokens": 0.0}
        evaluated = _numbers(trainer.evaluate(held_out))
    with chunks_of_logits():
        found = replace(steps(trainer, own), evaluated=evaluated)
    lines = [*_compare(found, truth), *_replicas(found.states[-1]), *_alone(trainer.mesh.axes)]
    lines += [f"{path} is called with hooks, inside a block" for path in called_with_hooks(trainer.model)]
    lines += [] if case.exchanges else [f"the host waits: {place}" for place in dict.fromkeys(asked)]
    copied = trainer.state()
    lines += _bits(copied, found.states[-1]) if dist.get_rank() == 0 else list({**copied.weights, **copied.optimizer})
    if not positions <= {own_positions(trainer)}:
        lines.append(f"norms see {positions} positions, not {own_positions(trainer)}")
    if folder is None:
        return [*lines, *_taken_over(trainer, truth.states[0])]
    parallel = importlib.import_module("kempnerforge_torch.distributed.processes")
    checkpoint.save(folder, trainer.parts(), processes=parallel.processes())
    lines += _taken_over(trainer, truth.states[0])
    written = checkpoint.load(folder, processes=parallel.processes())
    return [*lines, *_bits(written.state, found.states[-1]), *_read_again(trainer, written.parts, found.states[-1])]


def called_with_hooks(model: torch.nn.Module) -> list[str]:
    """Parts of blocks, at which a compiled block would break."""
    blocks = importlib.import_module("kempnerforge_torch.training.blocks").blocks(model)
    parts = [(path, part) for block in blocks for path, part in block.named_modules() if path]
    return [path for path, part in parts if part._forward_pre_hooks or part._forward_hooks]


@contextlib.contextmanager
def positions_of_norms(model: torch.nn.Module) -> Iterator[set[int]]:
    """How many positions of a sequence the norms of blocks see, where these are not by modality and not compiled."""
    seen: set[int] = set()
    layers = importlib.import_module("kempnerforge_torch.model.vlm").inner_transformer(model).layers
    blocks = [block for block in layers.children() if block._compiled_call_impl is None]
    norms = [block.mlp_post_norm if block.mlp_norm is None else block.mlp_norm for block in blocks]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[1])) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def own_positions(trainer: Any) -> int:
    """How many a rank has between two blocks: all of its sequences, unless "tp" divides their number."""
    tower = importlib.import_module("kempnerforge_torch.model.vlm")
    layout, model = trainer.mesh.layout, trainer.model
    images = model.num_image_tokens if isinstance(model, tower.VLMWrapper) else 0
    positions = trainer.config.train.seq_len // layout.cp + images
    return positions // layout.tp if positions % layout.tp == 0 else positions


def refusals(case: Case) -> list[str]:
    """Why a layout can't be."""
    try:
        _trainer(case.job(case.layout))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def steps(
    trainer: Any, micro_batches: Sequence[Sequence[Any]], state: Callable[[Any], TrainingState] | None = None
) -> Found:
    metrics, states = [], []
    for step, batches in enumerate(micro_batches):
        metrics.append(_numbers(trainer.step(batches)))
        if step in (0, len(micro_batches) - 1):
            states.append((state or whole_state)(trainer))
    return Found(metrics, states)


def whole_state(trainer: Any) -> TrainingState:
    """The state, put together on every rank from the parts that it sees."""
    state = importlib.import_module("kempnerforge_torch.model.state")
    optimizer = importlib.import_module("kempnerforge_torch.training.optimizer")
    states = importlib.import_module("kempnerforge_torch.distributed.states")
    moments = optimizer.get_optimizer_state(trainer.optimizer, trainer.parameters)
    own = (
        {name: state.to_numpy(tensor).copy() for name, tensor in tensors.items()}
        for tensors in (state.get_state(trainer.model), moments)
    )
    weights, kept = (states.of_all_stages(tensors, trainer.mesh) for tensors in own)
    return TrainingState(trainer.updates, weights, kept)


def _trainer(job: JobConfig, **options: bool) -> Any:
    train = importlib.import_module("kempnerforge_torch.training.train")
    return train.Trainer(job, "cpu", dtype=torch.float64, **options)


def _batches(job: JobConfig) -> Any:
    """Micro-batches by number; where the job packs documents, of some, with padding among the tokens."""
    if job.vlm is not None:
        return open_data(job).batch
    return functools.partial(_draw_documents if job.data.pack_documents else draw_batch, job)


def _with_token(
    data: Callable[[int], Mapping[str, np.ndarray]], token: int, last: int, number: int
) -> Mapping[str, np.ndarray]:
    """A micro-batch, which has a token if it is the ``last`` one of the first step."""
    batch = data(number)
    tokens = np.where(batch["tokens"] == token, 0, batch["tokens"])
    tokens[0, 0] = token if number == last else tokens[0, 0]
    return {**batch, "tokens": tokens}


def _draw_documents(job: JobConfig, seed: int) -> dict[str, np.ndarray]:
    batch = draw_batch(job, seed)
    rng, (rows, length) = np.random.default_rng(seed), batch["tokens"].shape
    real, starts = rng.random((2, rows, length)) < [[[0.8]], [[0.3]]]
    doc_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    return {**batch, "labels": np.where(real, batch["labels"], IGNORED), "doc_ids": doc_ids, "text_mask": real}


def _compare(found: Found, truth: Found) -> list[str]:
    lines = _compare_numbers("before", found.evaluated, truth.evaluated)
    for step, (own, true) in enumerate(zip(found.metrics, truth.metrics, strict=False)):
        lines += _compare_numbers(f"step {step}", own, true)
    for step, (own, true) in enumerate(zip(found.states, truth.states, strict=False)):
        for kind in ("weights", "optimizer"):
            values, truths = getattr(own, kind), getattr(true, kind)
            assert values.keys() == truths.keys()
            for name, value in values.items():
                limit = AGREED * max(np.abs(truths[name]).max(initial=0.0), FLOORS[kind])
                if not np.abs(value - truths[name]).max(initial=0.0) <= limit:
                    lines.append(f"state {step}: {name} differs by {np.abs(value - truths[name]).max()}")
    return lines


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _compare_numbers(when: str, found: Mapping[str, float], truth: Mapping[str, float]) -> list[str]:
    assert found.keys() == truth.keys()
    return [
        f"{when}: {name} = {found[name]}, not {value}"
        for name, value in truth.items()
        if not np.isclose(found[name], value, rtol=AGREED, atol=AGREED, equal_nan=True)
    ]


def _replicas(state: TrainingState) -> list[str]:
    """Which tensors have other bits on this rank than on the first."""
    own = {name: value.tobytes() for name, value in {**state.weights, **state.optimizer}.items()}
    first: list[Any] = [own]
    dist.broadcast_object_list(first, src=0)
    return [f"{name}: other bits than on rank 0" for name, value in own.items() if value != first[0][name]]


def _alone(axes: DeviceMesh) -> list[str]:
    """Which axes open groups of one process for nothing: each has threads of its own."""
    return [
        f"a group of one process for {axis!r}"
        for axis, size in zip(axes.mesh_dim_names or (), axes.shape, strict=True)
        if size == 1 and axis != "dp_shard"
    ]


def _taken_over(trainer: Any, state: TrainingState) -> list[str]:
    """Which tensors of another's state a trainer does not have the bits of, after it has loaded it; or why it can't."""
    try:
        trainer.load_state(state)
    except UserError as error:
        return str(error).splitlines()
    return _bits(whole_state(trainer), state)


def _read_again(trainer: Any, written: StateParts, state: TrainingState) -> list[str]:
    """Likewise of what is written in a checkpoint, by one that draws nothing; and whether this rank has read more than
    it holds.
    """
    trainer = _trainer(trainer.config, draws=False)
    read: list[int] = []
    real = Parts.__getitem__

    def noted(parts: Parts, box: Box) -> np.ndarray:
        values = real(parts, box)
        read.append(values.size)
        return values

    with patch.object(Parts, "__getitem__", noted):
        trainer.load_state(written)
    lines = _bits(whole_state(trainer), state)
    local = importlib.import_module("kempnerforge_torch.distributed.ranks").local
    model = importlib.import_module("kempnerforge_torch.model.state").get_state(trainer.model)
    held = sum(local(tensor).numel() for tensor in model.values())
    kept = importlib.import_module("kempnerforge_torch.training.optimizer").get_optimizer_state(
        trainer.optimizer, trainer.parameters
    )
    held += sum(local(tensor).numel() for tensor in kept.values())
    return lines if sum(read) == held else [*lines, f"{sum(read)} values read, {held} held"]


def _bits(own: TrainingState, given: TrainingState) -> list[str]:
    pairs = [(own.weights, given.weights), (own.optimizer, given.optimizer)]
    return [
        f"{name}: other bits than those loaded"
        for found, true in pairs
        for name, value in true.items()
        if found[name].tobytes() != value.tobytes()
    ]


def _together(lines: list[str]) -> list[str]:
    """What all processes found."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, lines)
    return [f"rank {rank}: {line}" for rank, found in enumerate(every) for line in found]
