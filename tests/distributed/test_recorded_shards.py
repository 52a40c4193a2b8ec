"""A module that FSDP shards over two processes is recorded as it is, with plain names and whole gradients.

What it takes is a new tensor there, and recorded as an input of the module.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]
SCRIPT = """
import copy, sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from kempnerforge_torch.parity import record
from shared_config.errors import UserError
from shared_config.parity import compare_functions

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))
x = torch.randn(4, 9, 6)
plain = record(copy.deepcopy(model), (x,), deltas=3)
small = record(copy.deepcopy(model), (x,), deltas=False, above=0)
mesh = dist.init_device_mesh("cpu", (2,))
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
sharded = record(model, (x,), deltas=False)
assert set(plain.tensors) < set(sharded.tensors), list(sharded.tensors)
assert compare_functions(plain, sharded, common=True).equal
assert not any(module._forward_hooks for module in model[1:])
summarized = record(model, (x,), deltas=False, above=0).tensors
for name, summary in small.tensors.items():
    assert abs(summary.rms - summarized[name].rms) < 1e-6 if hasattr(summary, "rms") else name == "loss", name
try:
    record(model, (x,), dtype="float64")
except UserError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="takes seconds")
def test_a_sharded_module_is_recorded_as_the_plain_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    started = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "is sharded by FSDP: leave weights, dtype and refeed out" in said
