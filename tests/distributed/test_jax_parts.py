"""What JAX's layouts are built of, where one device or none shows it: dtypes of gradients and positions, refusals,
settings.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from kempnerforge_jax.distributed import ahead_of_time, expert_parallel, processes
from kempnerforge_jax.distributed.context_parallel import OtherParts, check_spread
from kempnerforge_jax.distributed.expert_parallel import AXIS
from kempnerforge_jax.distributed.flops import product_flops
from kempnerforge_jax.distributed.health import Bench
from kempnerforge_jax.model.build import build_model
from kempnerforge_jax.training.muon import muon
from shared_config.errors import ConfigError
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.training.launch import Launch
from tests.jobs import EXPERTS, tiny_job

LAUNCH = Launch(0, 2, 0, "a", 1, "JAX")


def mesh_of(cp: int) -> Any:
    return SimpleNamespace(layout=SimpleNamespace(cp=cp))


def test_parts_of_sequences_are_for_models_and_routers_that_are_known() -> None:
    model: Any = nnx.eval_shape(lambda: build_model(tiny_job(EXPERTS), rngs=nnx.Rngs(0)))
    check_spread(model, mesh_of(2))
    model.layers["1"].mlp.router = nnx.Dict()
    for mesh in (None, mesh_of(1)):
        check_spread(model, mesh)
        check_spread(nnx.Dict(), mesh)
    with pytest.raises(ConfigError, match=r"distributed\.cp = 2: must be 1 with layers\.1\.mlp\.router, a Dict"):
        check_spread(model, mesh_of(2))
    with pytest.raises(ConfigError, match=r"distributed\.cp = 2: must be 1 for a model of type Dict"):
        check_spread(nnx.Dict(), mesh_of(2))


def test_positions_of_a_long_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "axis_index", lambda _: jnp.asarray(1, jnp.int32))
    positions = OtherParts().positions(40_000)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, np.arange(40_000, 80_000))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_of_gathered_tokens_are_of_their_dtype(dtype: Any) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    gathered = jax.shard_map(expert_parallel._gathered, mesh=mesh, in_specs=P(AXIS), out_specs=P(None), check_vma=False)
    gradient = jax.grad(lambda x: (2 * gathered(x)).sum().astype(jnp.float32))(jnp.ones((3, 2), dtype))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient.astype(jnp.float32), np.full((3, 2), 2.0))


@pytest.mark.parametrize(
    ("has_joined", "launch"), [(False, None), (True, None), (False, Launch(0, 2, 0, "a", 1, "JAX"))]
)
def test_programs_of_several_processes_run_one_after_another(
    has_joined: bool, launch: Launch | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(processes, "launch_of", lambda backend: launch)
    monkeypatch.setattr(processes, "_join", lambda _: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: has_joined)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    with processes.joined("cpu"):
        pass
    assert told == ({"jax_cpu_enable_async_dispatch": False} if has_joined or launch else {})


def test_slices_are_of_tpus_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    def describe(**given: str) -> Any:
        asked.update(given)
        return SimpleNamespace(devices=("chip",))

    monkeypatch.setattr(ahead_of_time, "get_topology_desc", describe)
    topology: Any = SimpleNamespace(name="v5e:2x2")
    assert ahead_of_time.devices_of_slice(topology) == ["chip"]
    assert asked == {"platform": "tpu", "topology_name": "v5e:2x2"}


def test_products_within_a_map_are_those_of_all_devices() -> None:
    mesh = AbstractMesh((4,), ("rows",))
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
    traced = jax.make_jaxpr(product)(jnp.ones((8, 3)), jnp.ones((3, 5)))
    assert product_flops(traced.jaxpr, "cpu") == 2 * 8 * 3 * 5


def test_reports_are_waited_for_as_long_as_is_said() -> None:
    waits: list[int] = []

    def get(place: str, milliseconds: int) -> str:
        waits.append(milliseconds)
        return place

    bench = Bench(jax.devices()[:1])
    bench._service = SimpleNamespace(blocking_key_value_get=get, key_value_delete=lambda place: None)
    assert bench.receive(3, 2.5) == "kempnerforge/health/3/0"
    assert waits == [2500]


def test_updates_are_counted_beyond_16_bits() -> None:
    state: Any = muon(OptimizerConfig(name="muon")).init(jnp.zeros((2, 3)))
    assert (state.count.dtype, int(state.count)) == (jnp.int32, 0)
