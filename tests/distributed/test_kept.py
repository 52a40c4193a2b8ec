"""What ranks that gather tokens keep for the backward pass, as the model of costs says and as PyTorch does."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch.multiprocessing.spawn import start_processes

from shared_config.contract.activations import kept_bytes
from shared_config.contract.sharding import layout_of
from shared_config.schema.job import JobConfig
from tests.distributed.layouts import LIMITED, SCALED, SIGMOID, SOFTMAX, UNGATED
from tests.jobs import draw_batch, tiny_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
MODELS: dict[str, dict[str, Any]] = {
    "a shared expert": SIGMOID,
    "a capacity": LIMITED,
    "scaled gradients": SCALED,
    "none shared": {**SOFTMAX, "num_experts": 8, "moe_top_k": 3, "moe_shared_experts": 0, **UNGATED},
}


def job_of(model: str, layers: int, ranks: int) -> JobConfig:
    """As many tokens as no tensor of the model has rows."""
    sizes = {"n_layers": layers, "dim": 32, "ffn_hidden_dim": 48, "max_seq_len": 64}
    return tiny_job({**MODELS[model], **sizes}, train={"seq_len": 34, "batch_size": 2}, distributed={"ep": ranks})


def kept(job: JobConfig) -> int:
    """Bytes that autograd keeps in a forward, weights that were gathered for it aside."""
    from kempnerforge_torch.distributed.ranks import local
    from kempnerforge_torch.training.terms import model_inputs
    from kempnerforge_torch.training.train import Trainer

    trainer = Trainer(job, "cpu")
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    own = {local(tensor).untyped_storage().data_ptr() for tensor in tensors}
    shapes = {shape for tensor in tensors for shape in (tuple(tensor.shape), tuple(tensor.shape[::-1]))}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            found[storage.data_ptr()] = storage.nbytes()
            everything.append(tensor)
        return tensor

    everything: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.model(**model_inputs(trainer._inputs(draw_batch(job, 0))), return_stats=True)
    return sum(found.values())


def one_of_them(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    try:
        found = {model: kept(job_of(model, 2, ranks)) - kept(job_of(model, 1, ranks)) for model in MODELS}
        if rank == 0:
            Path(folder, "kept").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not NIGHTLY, reason="starts processes: HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_keeps_what_the_model_of_costs_says(ranks: int, tmp_path: Path) -> None:
    """Numbers whose count does not grow with that of tokens aside, and what rounding of shares leaves."""
    start_processes(one_of_them, (ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")
    found = pickle.loads((tmp_path / "kept").read_bytes())
    for model in MODELS:
        job = job_of(model, 2, ranks)
        said = kept_bytes(job, layout_of(job.distributed, ranks), is_moe=True, mode="none")
        assert found[model] == pytest.approx(said, rel=0.015), model
