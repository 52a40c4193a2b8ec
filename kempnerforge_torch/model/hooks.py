"""Activations by the dotted path of the module that outputs them ("layers.0.attention.q_proj", "norm")."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from kempnerforge_torch.model.decode import NO_LOGITS
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.request import inference
from kempnerforge_torch.model.state import from_numpy, to_numpy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.wrappers import plain_modules, uncompiled, unwrap, unwrapped
from shared_config.interchange.activations import (
    ActivationWriter,
    flattened,
    token_batches,
    with_suffix,
    write_activations,
)
from shared_config.interchange.files import PathLike


def activation_names(model: nn.Module) -> list[str]:
    """Names that `capture` accepts, in order of definition, without those of wrappers."""
    containers = (nn.ModuleDict, nn.ModuleList)
    return [name for name, module in plain_modules(model).items() if name and not isinstance(module, containers)]


@contextlib.contextmanager
def capture(model: nn.Module, names: Iterable[str] | None = None, *, detach: bool = False) -> Iterator[dict[str, Any]]:
    """Collect outputs of modules while the context is open; compiled parts run uncompiled in it.

    Args:
        names: which; None for all. Of a tuple the first element is kept, a dict as it is.
        detach: cut the collected tensors from the graph; otherwise gradients flow through them.

    Yields:
        name -> output of the module's last call, in the order of calls. Modules that weren't called are absent.

    Raises:
        ValueError: an unknown name; lists what exists.
    """
    modules = plain_modules(model)
    activations: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        activations[name] = _detached(first_output(output)) if detach else first_output(output)

    with contextlib.ExitStack() as hooks, uncompiled(model):
        for name in check_activation_names(activation_names(model), names):
            handle = modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
            hooks.callback(handle.remove)
        yield activations


@contextlib.contextmanager
def replacing(model: nn.Module, outputs: Mapping[str, Shaped[Tensor, "..."]]) -> Iterator[None]:
    """Replace the outputs of modules while the context is open.

    A `capture` that was opened before sees the module's own output. No gradient flows through a replaced output.

    Args:
        outputs: path of a module -> the replacement of its output (of the first element of a tuple), in any dtype.

    Raises:
        ValueError: an unknown name; lists what exists. When the module is called: an output of another shape.
    """
    modules = plain_modules(model)
    with contextlib.ExitStack() as hooks, uncompiled(model):
        for name in check_activation_names(activation_names(model), outputs):
            handle = modules[name].register_forward_hook(
                lambda _module, _inputs, output, name=name: _replaced(name, output, outputs[name])
            )
            hooks.callback(handle.remove)
        yield


class ActivationStore:
    """Host copies of the outputs of chosen modules in their last call, while the store is enabled.

    Attributes:
        layer_names: the modules, by path.
        enabled: whether calls are being recorded.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] | None = None):
        """``layers``: paths of modules, as `activation_names` lists them; None for all.

        Raises:
            ValueError: an unknown name; lists what exists.
        """
        self.layer_names = check_activation_names(activation_names(model), layers)
        self._model = model
        self._activations: dict[str, Any] = {}
        self._hooks = contextlib.ExitStack()
        self._enabled = False

    @property
    def enabled(self) -> bool:
        """Whether outputs are being captured."""
        return self._enabled

    @property
    def activations(self) -> dict[str, Any]:
        """What was recorded, by name in the order of calls: CPU tensors, or dicts of them by modality."""
        return dict(self._activations)

    def get(self, name: str) -> Any:
        """The last output of a module; None if it has not been called.

        Raises:
            ValueError: not one of ``layer_names``.
        """
        check_activation_names(self.layer_names, [name])
        return self._activations.get(name)

    def enable(self) -> None:
        """Record from now on; what is compiled runs uncompiled until `disable`."""
        if self.enabled:
            return
        modules = plain_modules(self._model)
        self._enabled = True
        self._hooks.enter_context(uncompiled(self._model))
        for name in self.layer_names:
            hook = lambda _module, _inputs, output, name=name: self._record(name, output)  # noqa: E731
            self._hooks.callback(modules[name].register_forward_hook(hook).remove)

    def disable(self) -> None:
        """Stop recording; what was recorded stays."""
        self._hooks.close()
        self._enabled = False

    def clear(self) -> None:
        """Forget what was recorded."""
        self._activations = {}

    def _record(self, name: str, output: Any) -> None:
        self._activations.pop(name, None)
        self._activations[name] = _on_host(first_output(output))


def extract_representations(
    model: Transformer,
    dataset: Iterable[object],
    layers: Iterable[str],
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
    *,
    path: PathLike | None = None,
) -> dict[str, Shaped[Tensor, "..."]] | None:
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
    batches = token_batches(dataset, batch_size, max_samples, unwrap(model).config.vocab_size)
    outputs = (_outputs(model, names, *batch, device) for batch in batches)
    if path is not None:
        with ActivationWriter(with_suffix(path)) as writer:
            for output in outputs:
                writer.append(output)
        return None
    collected = [flattened(output) for output in outputs]
    return {name: from_numpy(np.concatenate([output[name] for output in collected])) for name in collected[0]}


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


def _replaced(name: str, output: Any, replacement: Tensor) -> Any:
    """The replacement in the dtype and on the device of the module's own."""
    own = first_output(output)
    if own.shape != replacement.shape:
        raise ValueError(f"{name}: puts out {tuple(own.shape)}; its replacement is {tuple(replacement.shape)}")
    first = replacement.to(own).detach()
    if not isinstance(output, tuple):
        return first
    rest = output[1:]
    return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)


def _detached(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: _detached(value) for key, value in output.items()}
    return output.detach() if isinstance(output, Tensor) else output


def _on_host(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: _on_host(value) for key, value in output.items()}
    return output.detach().to("cpu", copy=True) if isinstance(output, Tensor) else output


def _to_numpy(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {key: _to_numpy(value) for key, value in output.items()}
    return to_numpy(output) if isinstance(output, Tensor) else np.asarray(output)


def _outputs(
    model: Transformer, names: list[str], tokens: np.ndarray, real: np.ndarray | None, device: Any
) -> dict[str, Any]:
    """The outputs of the modules for tokens (B, S), ``real`` (B, S) or padding. The head runs only if asked for."""
    device = next(model.parameters()).device if device is None else device
    headless = not any(name.startswith("output_head") for name in names)
    with unwrapped(model) as plain, inference(plain), capture(plain, names) as activations:
        mask = None if real is None else torch.from_numpy(real).to(device)
        modality = replace(NO_LOGITS if headless else ModalityContext(), key_padding_mask=mask)
        plain.run(torch.from_numpy(tokens).to(device), modality=modality, limit_capacity=False)
    return {name: _to_numpy(value) for name, value in activations.items()}
