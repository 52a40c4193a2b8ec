"""What collectives move in a training step, counted where PyTorch calls them: kind, mesh axes, times and bytes."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge_torch.distributed import collectives
from shared_config.contract.sharding import MESH_AXES
from shared_config.schema.job import JobConfig
from tests.distributed.layouts import Case
from tests.jobs import draw_batch

FEWEST = 12
"""Elements of a message. Scalars, and counts by expert, are smaller."""
KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "gathered_rows": "all-gather",
    "scattered_rows": "reduce-scatter",
    "total": "all-reduce",
    "exchanged_rows": "all-to-all",
}
BUFFERS = "buffers", ("pp",)
"""What a pipeline holds between steps, among what is counted."""
RECEIVING = "recv_"
"""The other side of what is sent."""
Key = tuple[str, tuple[str, ...]]
"""Kind, and mesh axes."""


class Counting(TorchDispatchMode):
    """Counts the collectives called within it.

    Attributes:
        times, bytes: by key; of an exchange of rows the bytes that are sent, of others the larger side.
    """

    def __init__(self, mesh: Any):
        super().__init__()
        self.axes_of = _axes_of_groups(mesh)
        self.times: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func._schema.name.partition("::")
        result = func(*args, **(kwargs or {}))
        if library == "c10d" and name != RECEIVING:
            group = next(dist.ProcessGroup.unbox(each) for each in args if isinstance(each, torch.ScriptObject))
            self._note(name, args[:2], group)
        elif library == "kempnerforge" and name in KINDS:
            self._note(name, (result, args[0]), collectives._group_named(args[-1]))
        return result

    def _note(self, name: str, values: Sequence[Any], group: dist.ProcessGroup) -> None:
        tensors = [each for value in values for each in (value if isinstance(value, list) else [value])]
        sides = [each for each in tensors if isinstance(each, torch.Tensor)]
        largest = sides[1:] if KINDS[name] == "all-to-all" else sides
        if group.size() == 1 or max(side.numel() for side in largest) < FEWEST:
            return
        key = KINDS[name], self.axes_of[frozenset(dist.get_process_group_ranks(group))]
        self.times[key] += 1
        self.bytes[key] += max(side.numel() * side.element_size() for side in largest)


def _axes_of_groups(mesh: Any) -> dict[frozenset[int], tuple[str, ...]]:
    """Ranks of this one's row along any axes of the mesh -> those of them that have several devices."""
    several = [axis for axis in MESH_AXES if mesh.layout.size(axis) > 1]
    ranks, own, names = mesh.axes.mesh, mesh.axes.get_coordinate(), mesh.axes.mesh_dim_names
    found = {}
    for number in range(2 ** len(several)):
        axes = tuple(axis for place, axis in enumerate(several) if number >> place & 1)
        index = tuple(slice(None) if axis in axes else own[place] for place, axis in enumerate(names))
        found[frozenset(ranks[index].flatten().tolist())] = axes
    return found


def count_in_processes(folder: Path, ranks: int, cases: Sequence[Case]) -> dict[str, dict[Key, tuple[int, float]]]:
    """Times and bytes of a step of each case: the mean over ranks; of stages, those of the rank with most."""
    multiprocessing.set_forkserver_preload(["kempnerforge_torch.training.train", __name__])
    start_processes(_one_of_them, (ranks, str(folder), list(cases)), nprocs=ranks, start_method="forkserver")
    return pickle.loads((folder / "counted").read_bytes())


def _one_of_them(rank: int, ranks: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    try:
        found = {str(case): _counted(case) for case in cases}
        if rank == 0:
            Path(folder, "counted").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


def _counted(case: Case) -> dict[Key, tuple[int, float]]:
    job = case.job(case.layout)
    with case.as_asked():
        trainer = importlib.import_module("kempnerforge_torch.training.train").Trainer(job, "cpu")
    batches = [draw_batch(job, number) for number in range(job.train.grad_accum_steps)]
    trainer.step(batches)
    with Counting(trainer.mesh) as counting:
        trainer.step(batches)
    if case.layout.get("pp", 1) > 1:
        trainer.evaluate([draw_batch(job, number) for number in range(job.eval.steps)])
        streams = _streams(job)
        counting.times[BUFFERS], counting.bytes[BUFFERS] = len(streams), sum(each.nbytes for each in streams)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (counting.times, counting.bytes))
    keys = sorted({key for times, _ in every for key in times})
    many = {key: [(times[key], moved[key]) for times, moved in every] for key in keys}
    if case.layout.get("pp", 1) > 1:
        return {key: max(found) for key, found in many.items()}
    return {key: (found[0][0], sum(size for _, size in found) / len(found)) for key, found in many.items()}


def _streams(job: JobConfig) -> list[torch.Tensor]:
    """Residual streams, and their gradients, that are in memory between steps."""
    gc.collect()
    length = job.train.seq_len // job.distributed.cp
    shape = (job.train.batch_size, length, job.model.dim)
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and not each.is_meta]
    return list({each.data_ptr(): each for each in tensors if tuple(each.shape) == shape}.values())
