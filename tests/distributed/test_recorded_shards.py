"""A module that FSDP shards is recorded as it is, with plain names and whole gradients.

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

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))
x = torch.randn(4, 9, 6)
plain = record(copy.deepcopy(model), (x,), deltas=3)
mesh = dist.init_device_mesh("cpu", (1,))
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
sharded = record(model, (x,), deltas=False)
assert set(plain.tensors) < set(sharded.tensors), list(sharded.tensors)
assert compare_functions(plain, sharded, common=True).equal
try:
    record(model, (x,), dtype="float64")
except UserError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="takes seconds")
def test_a_sharded_module_is_recorded_as_the_plain_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "is sharded by FSDP: leave weights, dtype and refeed out" in said.stdout
