"""The proof that two implementations are the same function: any two, in PyTorch, JAX or NumPy.

    recording    `kempnerforge_torch.parity.record`, `kempnerforge_jax.parity.record`, and `record` for NumPy, each with
                 its `tap`; `read_trace`, `write_trace`
    names        `Map`, `Rule`, `make_map`, `read_map`, `parse_op`; `propose_map`; `transfer`, `nest`
    comparison   `compare_functions`; `derive_tolerance`; on the command line ``kempnerforge compare``
    tests        `assert_same_function`; `shared_config.parity.strategies` for Hypothesis, with `cache_machine`;
                 `shared_config.parity.plugin` for pytest; `mutate`
    training     `compare_runs` of two trainers, each of which gives a `Step` at a time; `AdamW`, what both should do

Imports no framework, and nothing at all before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_config.parity.foreign.compare import compare_functions
    from shared_config.parity.foreign.derive import derive_tolerance
    from shared_config.parity.foreign.layout import parse_op
    from shared_config.parity.foreign.mapping import Map, Rule, make_map, read_map
    from shared_config.parity.foreign.mutate import Score, mutate
    from shared_config.parity.foreign.numpy_function import record
    from shared_config.parity.foreign.propose import Proposal, propose_map
    from shared_config.parity.foreign.runs import AdamW, RunComparison, Step, compare_runs
    from shared_config.parity.foreign.same import DifferentError, assert_same_function, nest
    from shared_config.parity.foreign.taps import tap
    from shared_config.parity.foreign.transfer import transfer
    from shared_config.parity.traces import Trace, read_trace, write_trace

__all__ = [
    "AdamW",
    "DifferentError",
    "Map",
    "Proposal",
    "Rule",
    "RunComparison",
    "Score",
    "Step",
    "Trace",
    "assert_same_function",
    "compare_functions",
    "compare_runs",
    "derive_tolerance",
    "make_map",
    "mutate",
    "nest",
    "parse_op",
    "propose_map",
    "read_map",
    "read_trace",
    "record",
    "tap",
    "transfer",
    "write_trace",
]

HOMES = {
    "foreign.compare": ("compare_functions",),
    "foreign.derive": ("derive_tolerance",),
    "foreign.layout": ("parse_op",),
    "foreign.mapping": ("Map", "Rule", "make_map", "read_map"),
    "foreign.mutate": ("Score", "mutate"),
    "foreign.numpy_function": ("record",),
    "foreign.propose": ("Proposal", "propose_map"),
    "foreign.runs": ("AdamW", "RunComparison", "Step", "compare_runs"),
    "foreign.same": ("DifferentError", "assert_same_function", "nest"),
    "foreign.taps": ("tap",),
    "foreign.transfer": ("transfer",),
    "traces": ("Trace", "read_trace", "write_trace"),
}
"""Module of this package -> the public names that it defines."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
