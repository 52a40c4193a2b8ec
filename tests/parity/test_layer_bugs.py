"""A bug in one layer of one backend: comparing with the other backend names that layer first, and with recorded inputs
that layer alone.

Shapes: B batch, S sequence, H query heads, K key/value heads, G = H / K, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.nn import functional as F

import kempnerforge_jax.trace
import kempnerforge_torch.trace
from kempnerforge_jax.model import architecture as jax_architecture
from kempnerforge_jax.model import mask as jax_mask
from kempnerforge_torch.model import architecture as torch_architecture
from kempnerforge_torch.model import mask as torch_mask
from shared_config.loader import load_config
from shared_config.parity.compare import Comparison, compare_traces
from shared_config.parity.traces import Trace

HEADS, KV_HEADS, WINDOW, EXPERTS, DENSE, MIXED = 4, 2, 5, 4, 2, 1
CONFIG = load_config(
    "debug_moe",
    (
        "--model.dim=16",
        "--model.n_layers=4",
        f"--model.n_heads={HEADS}",
        f"--model.n_kv_heads={KV_HEADS}",
        "--model.head_dim=4",
        "--model.ffn_hidden_dim=24",
        "--model.vocab_size=19",
        f"--model.num_experts={EXPERTS}",
        "--model.moe_router=softmax_topk",
        "--model.moe_sequence_aux_loss_weight=0",
        "--model.moe_frequency=2",
        f"--model.sliding_window={WINDOW}",
        "--model.qk_norm=true",
        "--model.attention_bias=true",
    ),
)
FORWARD = ("forward/*", "routing/*")
RECORD = {"torch": kempnerforge_torch.trace.record, "jax": kempnerforge_jax.trace.record}
ARCHITECTURE = {"torch": torch_architecture.Architecture, "jax": jax_architecture.Architecture}


class Torch:
    """What bugs are written in: the few operations that backends name differently."""

    silu, gelu, flip = staticmethod(F.silu), staticmethod(F.gelu), staticmethod(torch.flip)
    roll = staticmethod(lambda x: torch.roll(x, 1, dims=-2))
    bfloat16, float32 = torch.bfloat16, torch.float32
    cast = staticmethod(lambda x, dtype: x.to(dtype))
    array = staticmethod(torch.from_numpy)
    dense_mask = staticmethod(torch_mask.dense_mask)
    value = staticmethod(lambda parameter: parameter)


class Jax:
    """The same for the other backend."""

    silu, gelu, flip = staticmethod(jax.nn.silu), staticmethod(jax.nn.gelu), staticmethod(jnp.flip)
    roll = staticmethod(lambda x: jnp.roll(x, 1, axis=-2))
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    cast = staticmethod(lambda x, dtype: x.astype(dtype))
    array = staticmethod(jnp.asarray)
    dense_mask = staticmethod(jax_mask.dense_mask)
    value = staticmethod(lambda parameter: parameter.get_value())


Wrong = Callable[..., Any]


@dataclass(frozen=True)
class Bug:
    """One that sits in one layer.

    Attributes:
        changes: path below the block, "" for the block itself -> what calling that module does: called with what the
            backend calls things, the module, what it did before, and the arguments.
    """

    name: str
    layer: int
    changes: dict[str, Wrong]


def heads_apart(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], HEADS, -1)


def regrouped(x: Any, groups: int) -> Any:
    """Heads in another order: those that are ``groups`` apart stand side by side."""
    apart = x.reshape(*x.shape[:-1], groups, HEADS // groups, -1)
    return apart.swapaxes(-3, -2).reshape(x.shape)


def masked(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Wrong:
    """Attention in which more may be seen than the mask says: what ``change`` says of query and key positions."""

    def call(be: Any, module: Any, before: Wrong, x: Any, *args: Any, mask: Any, **kwargs: Any) -> Any:
        place = np.arange(x.shape[1])
        seen = be.dense_mask(mask, len(place), len(place))
        return before(x, *args, mask=seen | be.array(change(place[:, None], place[None, :])), **kwargs)

    return call


def output(change: Callable[..., Any]) -> Wrong:
    """A module whose output is wrong."""
    return lambda be, module, before, *args, **kwargs: change(be, module, before(*args, **kwargs))


def skipped(be: Any, module: Any, before: Wrong, x: Any) -> Any:
    return x


def with_eps(eps: float) -> Wrong:
    def call(be: Any, module: Any, before: Wrong, x: Any) -> Any:
        right, module.eps = module.eps, eps
        found = before(x)
        module.eps = right
        return found

    return call


def of_router(change: Callable[..., tuple[Any, Any, Any]]) -> Wrong:
    return output(lambda be, module, found: change(*found))


def gated(activation: str, swapped: bool = False) -> Wrong:
    """down(activation(gate) * up), maybe with the two exchanged."""

    def call(be: Any, module: Any, before: Wrong, x: Any) -> Any:
        gate, up = module.gate_proj(x), module.up_proj(x)
        gate, up = (up, gate) if swapped else (gate, up)
        return module.down_proj(getattr(be, activation)(gate) * up)

    return call


BUGS = (
    Bug("eps of a norm", DENSE, {"attention_norm": with_eps(1e-6)}),
    Bug("norm that centres", 0, {"attention_norm": lambda be, m, f, x: f(x - x.mean(-1)[..., None])}),
    Bug("norm weight ignored", 3, {"mlp_norm": output(lambda be, m, y: y / be.value(m.weight))}),
    Bug("norm left out", DENSE, {"mlp_norm": skipped}),
    Bug("key norm left out", MIXED, {"attention.k_norm": skipped}),
    Bug("scale of scores forgotten", 3, {"attention.q_norm": output(lambda be, m, y: y * y.shape[-1] ** 0.5)}),
    Bug("window one too wide", DENSE, {"attention": masked(lambda query, key: key == query - WINDOW)}),
    Bug("future visible", 3, {"attention": masked(lambda query, key: key == query + 1)}),
    Bug("transposed weight", DENSE, {
        "attention.q_proj": lambda be, m, f, x: x @ be.value(m.weight) + be.value(m.bias)
    }),
    Bug("bias forgotten", 0, {"attention.o_proj": output(lambda be, m, y: y - be.value(m.bias))}),
    Bug("rotation by another position", DENSE, {
        "attention": lambda be, m, f, x, cos, sin, **kwargs: f(x, be.roll(cos), be.roll(sin), **kwargs)
    }),
    Bug("heads in reverse", MIXED, {
        "attention.o_proj": lambda be, m, f, x: f(be.flip(heads_apart(x), (-2,)).reshape(x.shape))
    }),
    Bug("heads tiled instead of grouped", DENSE, {
        "attention.q_proj": output(lambda be, m, y: regrouped(y, HEADS // KV_HEADS)),
        "attention.o_proj": lambda be, m, f, x: f(regrouped(x, KV_HEADS)),
    }),
    Bug("residual left out", DENSE, {"": lambda be, m, f, x, *args, **kwargs: _less(x, f(x, *args, **kwargs))}),
    Bug("bfloat16 inside", 0, {"mlp_norm": output(lambda be, m, y: be.cast(be.cast(y, be.bfloat16), y.dtype))}),
    Bug("float32 inside", 3, {"attention.v_proj": output(lambda be, m, y: be.cast(be.cast(y, be.float32), y.dtype))}),
    Bug("gelu for silu", DENSE, {"mlp": gated("gelu")}),
    Bug("gate and up exchanged", 0, {"mlp": gated("silu", swapped=True)}),
    Bug("experts in another order", MIXED, {
        "mlp.router": of_router(lambda w, i, stats: (w, (i + 1) % EXPERTS, stats))
    }),
    Bug("weights of experts not normalised", 3, {"mlp.router": of_router(lambda w, i, stats: (0.9 * w, i, stats))}),
    Bug("balancing loss doubled", MIXED, {
        "mlp.router": of_router(lambda w, i, stats: (w, i, stats._replace(aux_loss=2 * stats.aux_loss)))
    }),
    Bug("NaN in one place", DENSE, {
        "attention.k_proj": output(lambda be, m, y: y + be.array(_nan_at(y.shape, (1, 7, 3))))
    }),
)  # fmt: skip


def _less(x: Any, found: Any) -> Any:
    return found._replace(x=found.x - x)


def _nan_at(shape: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    zeros = np.zeros(shape)
    zeros[place] = np.nan
    return zeros


def plant(bug: Bug, backend: str, block: Any) -> Any:
    """The block with the bug: the modules get a class of their own, whose forward is wrong."""
    for path, change in bug.changes.items():
        module = block
        for name in filter(None, path.split(".")):
            module = getattr(module, name)
        module.__class__ = _wrong_class(type(module), change, Torch if backend == "torch" else Jax)
    return block


def _wrong_class(right: type, change: Wrong, be: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(be, self, lambda *args, **kwargs: right.forward(self, *args, **kwargs), *args, **kwargs)

    return type(right.__name__, (right,), {"forward": forward})


@pytest.fixture(scope="module")
def right() -> dict[str, Trace]:
    """The forward of each backend, in float64."""
    return {backend: record(CONFIG, deltas=False, device="cpu", only=FORWARD) for backend, record in RECORD.items()}


def compared(bug: Bug, backend: str, other: Trace, monkeypatch: pytest.MonkeyPatch, refeed: bool) -> Comparison:
    """A trace of the other backend with one of this, which has the bug."""
    build = ARCHITECTURE[backend].build_block

    def build_block(self: Any, layer_idx: int, **kwargs: Any) -> Any:
        block = build(self, layer_idx, **kwargs)
        return plant(bug, backend, block) if layer_idx == bug.layer else block

    with monkeypatch.context() as patch:
        patch.setattr(ARCHITECTURE[backend], "build_block", build_block)
        wrong = RECORD[backend](CONFIG, deltas=False, device="cpu", only=FORWARD, refeed=other if refeed else None)
    return compare_traces(other, wrong)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, or the tensor's name if it belongs to none."""
    parts = name.partition("/")[2].split(".")
    return parts[1] if parts[0] == "layers" else name


def planted() -> list[Any]:
    """Bugs and backends; each bug of JAX is compiled twice, and two of three wait for the night."""
    night = settings.get_current_profile_name() == "nightly"
    cases = [(bug, backend) for place, bug in enumerate(BUGS) for backend in RECORD
             if backend == "torch" or night or place % 3 == 1]  # fmt: skip
    return [pytest.param(bug, backend, id=f"{bug.name}-{backend}") for bug, backend in cases]


@pytest.mark.parametrize(("bug", "backend"), planted())
def test_a_wrong_layer_is_named_first_and_alone(
    bug: Bug, backend: str, right: dict[str, Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = right["jax" if backend == "torch" else "torch"]
    plain = compared(bug, backend, other, monkeypatch, refeed=False)
    assert plain.first_forward is not None
    assert layer_of(plain.first_forward.name) == str(bug.layer)
    assert {layer_of(row.name) for row in plain.failures} > {str(bug.layer)}, "what comes after is wrong too"
    fed = compared(bug, backend, other, monkeypatch, refeed=True)
    assert fed.first_forward is not None
    assert fed.first_forward.name == plain.first_forward.name
    assert {layer_of(row.name) for row in fed.failures} == {str(bug.layer)}


def test_right_layers_raise_no_alarm(right: dict[str, Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Bug("none", DENSE, {"": lambda be, module, before, *args, **kwargs: before(*args, **kwargs)})
    for backend, other in (("torch", right["jax"]), ("jax", right["torch"])):
        for refeed in (False, True):
            assert compared(nothing, backend, other, monkeypatch, refeed).equal
