"""Recording of NumPy functions: an oracle, or a kernel's reference, forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from shared_config.interchange.files import PathLike
from shared_config.interchange.weights import is_floating
from shared_config.parity.foreign.containers import OUTPUT, in_pairs, listed, map_tensors, tensors_in
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.options import Arrays, Options, check_fed, fed_to, make_options
from shared_config.parity.foreign.recorder import Noise, Recorded, Store, make_trace
from shared_config.parity.foreign.taps import visiting
from shared_config.parity.traces import Summary, Trace


def record(
    function: Callable[..., object],
    inputs: Sequence[object] | Mapping[str, object],
    *,
    weights: Mapping[str, object] | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    above: int | None = None,
    deltas: bool | int = True,
    seed: int = 0,
    refeed: Trace | None = None,
    names: Map | None = None,
    path: PathLike | None = None,
    chunks: int | None = None,
) -> Trace:
    """Call a NumPy function and record what it puts out and what its taps show.

    Args:
        function: of ``*inputs`` or ``**inputs``; the weights, if there are some, come first.
        inputs: arrays and anything else, in containers of any kind.
        weights: arrays, nested in any way; names are dotted paths.
        dtype, only, above, deltas, seed, refeed, names, path, chunks: as those of `kempnerforge_torch.parity.record`.

    Raises:
        UserError: as there.
    """
    options = make_options(
        dtype=dtype, backward=False, only=only, above=above, deltas=deltas, seed=seed, refeed=refeed, names=names
    )
    return make_trace(NumpyFunction(function, inputs, weights, options), options, path, chunks)


class NumpyFunction:
    """A NumPy function as an engine; see `Engine`."""

    backend, device, packages = "numpy", "cpu", ()

    def __init__(
        self,
        function: Callable[..., object],
        inputs: Sequence[object] | Mapping[str, object],
        weights: Mapping[str, object] | None,
        options: Options,
    ):
        self._function, self._inputs, self._weights, self._options = function, inputs, weights, options
        self.drawn: list[str] = []
        self.weights: Arrays = dict(tensors_in(weights, _is_array))
        self.inputs: Arrays = dict(tensors_in(inputs, _is_array))

    def run(
        self, dtype: str, weights: Arrays, inputs: Arrays, fed: Arrays, noise: Noise | None, store: Store
    ) -> Recorded:
        """Call the function once; see `Engine.run`."""
        found: list[tuple[str, np.ndarray | Summary]] = []
        others: list[str] = []
        calls: dict[str, int] = {}
        rng = None if noise is None else np.random.default_rng(noise.seed)

        def visit(name: str, array: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(array):
                pairs = visit(name, in_pairs(array))
                return pairs[..., 0] + 1j * pairs[..., 1]
            call = calls[name] = calls.get(name, -1) + 1
            if self._options.wants(name):
                found.append((name, store(np.array(array))))
            else:
                others.append(name)
            other = fed_to(fed, name, call)
            if other is not None:
                check_fed(name, other.shape, array.shape)
                array = _cast(other, array.dtype.name)
            if noise is None or rng is None or not is_floating(array.dtype):
                return array
            return array * (1 + noise.roundoff * rng.uniform(-1, 1, array.shape))

        with visiting(lambda name, value: map_tensors(visit, value, name, _is_array)):
            arguments = _renamed(self._inputs, inputs, dtype)
            first = [] if self._weights is None else [_renamed(self._weights, weights, dtype)]
            if isinstance(arguments, Mapping):
                output = listed(self._function(*first, **arguments))
            else:
                output = listed(self._function(*first, *arguments))
            map_tensors(visit, output, OUTPUT, lambda value: _is_array(value) or isinstance(value, float))
        return Recorded(found, others=others)


def _renamed(given: Any, values: Arrays, dtype: str) -> Any:
    """A container with other values, by the names that `tensors_in` gives its arrays, in a dtype."""
    order = iter(name for name, _ in tensors_in(given, _is_array))
    return map_tensors(lambda _, __: _cast(values[next(order)], dtype), given, "", _is_array)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if not dtype or not is_floating(array.dtype):
        return np.asarray(array)
    return np.asarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray | np.floating)
