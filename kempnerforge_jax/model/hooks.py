"""Activations by the dotted path of the module that outputs them ("layers.0.attention.q_proj", "norm")."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Shaped

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Module, observing, start_observing, stop_observing, substituting
from kempnerforge_jax.model.state import merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.wrappers import plain_modules, unwrapped
from shared_config.interchange.activations import (
    ActivationWriter,
    flattened,
    token_batches,
    with_suffix,
    write_activations,
)
from shared_config.interchange.files import PathLike


def activation_names(model: nnx.Module) -> list[str]:
    """Names that `capture` accepts, in order of definition, without those of wrappers."""
    return [name for name, module in plain_modules(model).items() if name and isinstance(module, Module)]


@contextlib.contextmanager
def capture(model: nnx.Module, names: Iterable[str] | None = None, *, detach: bool = False) -> Iterator[dict[str, Any]]:
    """Collect outputs of modules while the context is open. Works inside a trace, on the model that was merged there.

    Layers run one by one in it, whatever scans and rematerialisation `Transformer.run` is called with.

    Args:
        names: which; None for all. Of a tuple the first element is kept, a dict as it is.
        detach: stop gradients at the collected arrays.

    Yields:
        name -> output of the module's last call, in the order of calls. Modules that weren't called are absent.

    Raises:
        ValueError: an unknown name; lists what exists.
    """
    wanted = set(check_activation_names(activation_names(model), names))
    name_of = {id(module): name for name, module in plain_modules(model).items() if name in wanted}
    activations: dict[str, Any] = {}

    def keep(module: Module, output: Any) -> None:
        name = name_of.get(id(module))
        if name is not None:
            first = first_output(output)
            activations[name] = jax.lax.stop_gradient(first) if detach else first

    with observing(keep):
        yield activations


@contextlib.contextmanager
def replacing(model: nnx.Module, outputs: Mapping[str, Shaped[Array, "..."]]) -> Iterator[None]:
    """Replace the outputs of modules while the context is open.

    A `capture` sees the module's own output. No gradient flows through a replaced output. Works inside a trace.

    Args:
        outputs: path of a module -> the replacement of its output (of the first element of a tuple), in any dtype.

    Raises:
        ValueError: an unknown name; lists what exists. When the module is called: an output of another shape.
    """
    wanted = set(check_activation_names(activation_names(model), outputs))
    name_of = {id(module): name for name, module in plain_modules(model).items() if name in wanted}

    def replace(module: Module, output: Any) -> Any:
        name = name_of.get(id(module))
        return output if name is None else _replaced(name, output, outputs[name])

    with substituting(replace):
        yield


class ActivationStore:
    """Host copies of the outputs of chosen modules in their last call, while the store is enabled.

    Calls of this model outside jit are recorded; inside, use `capture`.

    Attributes:
        layer_names: the modules, by path.
        enabled: whether calls are being recorded.
    """

    def __init__(self, model: nnx.Module, layers: Iterable[str] | None = None):
        """``layers``: paths of modules, as `activation_names` lists them; None for all.

        Raises:
            ValueError: an unknown name; lists what exists.
        """
        self.layer_names = check_activation_names(activation_names(model), layers)
        self._model = model
        self._activations: dict[str, Any] = {}
        wanted = set(self.layer_names)
        self._name_of = {id(module): name for name, module in plain_modules(model).items() if name in wanted}
        self._enabled = False

    @property
    def enabled(self) -> bool:
        """Whether outputs are being captured."""
        return self._enabled

    @property
    def activations(self) -> dict[str, Any]:
        """What was recorded, by name in the order of calls: NumPy arrays, or dicts of them by modality."""
        return dict(self._activations)

    def get(self, name: str) -> Any:
        """The last output of a module; None if it has not been called.

        Raises:
            ValueError: not one of ``layer_names``.
        """
        check_activation_names(self.layer_names, [name])
        return self._activations.get(name)

    def enable(self) -> None:
        """Record from now on."""
        if not self.enabled:
            start_observing(self._record)
        self._enabled = True

    def disable(self) -> None:
        """Stop recording; what was recorded stays."""
        stop_observing(self._record)
        self._enabled = False

    def clear(self) -> None:
        """Forget what was recorded."""
        self._activations = {}

    def _record(self, module: Module, output: Any) -> None:
        name = self._name_of.get(id(module))
        if name is None:
            return
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(output)):
            raise ValueError(
                f"{name} was called inside jit: ActivationStore records calls outside, capture those inside"
            )
        self._activations.pop(name, None)
        self._activations[name] = _to_numpy(first_output(output))


def extract_representations(
    model: Transformer,
    dataset: Iterable[object],
    layers: Iterable[str],
    device: Device | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
    *,
    path: PathLike | None = None,
) -> dict[str, Shaped[Array, "..."]] | None:
    """Run a dataset through a model and keep the outputs of some modules, in evaluation mode and without capacity
    limits.

    Args:
        dataset: samples of one length: token ids (S,), or mappings with "tokens" or "input_ids", and perhaps
            "text_mask" or "attention_mask" (S,), bools or 0 and 1, False at padding.
        layers: paths of modules.
        device: where the batches go; where the model is if None.
        max_samples: how many samples at most; all if None.
        path: a .npz file (the suffix is appended if missing) that gets the outputs batch by batch, so that memory
            holds one batch whatever the number of samples. It appears when it is complete. `read_activations` of
            shared_config reads it.

    Returns:
        name -> outputs of all samples along the first axis, on the host ("name/modality" where there is one a
        modality); None if they went to ``path``.

    Raises:
        ValueError: an unknown name; lists what exists. Samples that don't fit together or the model, or none.
    """
    names = check_activation_names(activation_names(model), layers)
    batches = token_batches(dataset, batch_size, max_samples, unwrapped(model).config.vocab_size)
    run = _compiled_outputs(model, names)
    outputs = (_to_numpy(run(*jax.device_put(batch, device))) for batch in batches)
    if path is not None:
        with ActivationWriter(with_suffix(path)) as writer:
            for output in outputs:
                writer.append(output)
        return None
    collected = [flattened(output) for output in outputs]
    host = jax.devices("cpu")[0]
    return {name: jax.device_put(np.concatenate([output[name] for output in collected]), host) for name in collected[0]}


def save_activations(activations: Mapping[str, object], path: PathLike) -> None:
    """Write activations, dicts by modality included, to a .npz file, whole or not at all; the suffix is appended if
    ``path`` has none.

    bfloat16 is stored as integers with a note of the type; `read_activations` of shared_config restores it.
    """
    write_activations(path, {name: _to_numpy(value) for name, value in activations.items()})


def first_output(output: Any) -> Any:
    """The first element of a tuple; anything else as it is."""
    return output[0] if isinstance(output, tuple) else output


def check_activation_names(existing: list[str], names: Iterable[str] | None) -> list[str]:
    """The names asked for, or all.

    Raises:
        ValueError: an unknown name; lists close matches and what exists.
    """
    if names is None:
        return existing
    names = list(names)
    for name in names:
        if name not in existing:
            close = difflib.get_close_matches(str(name), existing)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"name = {name!r}: no such module{hint} Modules: {', '.join(existing)}")
    return names


def _replaced(name: str, output: Any, replacement: jax.Array) -> Any:
    """The replacement in the dtype of the module's own."""
    own = first_output(output)
    if own.shape != replacement.shape:
        raise ValueError(f"{name}: puts out {tuple(own.shape)}; its replacement is {tuple(replacement.shape)}")
    first = jax.lax.stop_gradient(replacement.astype(own.dtype))
    if not isinstance(output, tuple):
        return first
    rest = output[1:]
    return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)


def _to_numpy(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {key: _to_numpy(value) for key, value in output.items()}
    return np.asarray(output)


def _compiled_outputs(model: Transformer, names: list[str]) -> Callable[..., dict[str, Any]]:
    """The outputs of the modules for tokens (B, S), ``real`` (B, S) or padding.

    What is not asked for, such as the head, is not computed.
    """
    graphdef, params, buffers = split(unwrapped(model))

    @jax.jit
    def run(params: Any, buffers: Any, tokens_BS: jax.Array, real_BS: jax.Array | None) -> dict[str, Any]:
        merged = merge(graphdef, params, buffers)
        with capture(merged, names) as activations:
            merged.run(tokens_BS, modality=ModalityContext(key_padding_mask=real_BS), limit_capacity=False)
        return dict(activations)

    return functools.partial(run, params, buffers)
