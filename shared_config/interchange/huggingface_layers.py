"""Which layers of a Hugging Face model have a window, and which rotary positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shared_config.interchange.huggingface_content import default_of, family_in, number
from shared_config.interchange.huggingface_description import Family
from shared_config.schema.model import ModelConfig
from shared_config.schema.pattern import has_window, shortest_pattern

FULL, SLIDING = "full_attention", "sliding_attention"
NOPE_INTERVAL = 4
"""Of SmolLM3: one layer of so many, the last, is not rotated."""


def layer_problems(content: Mapping[str, object]) -> Iterator[str]:
    """What a `ModelConfig` can't express, or no model of transformers has."""
    kinds, window, windows = layer_types(content), declared_window(content), family_in(content).windows
    if len(kinds) != _layers(content):
        yield f"layer_types has {len(kinds)} entries: must be num_hidden_layers = {_layers(content)}"
    elif len(set(kinds)) > 1 and not (windows and windows.mixed):
        yield f"layer_types = {kinds!r}: must be the same for all layers"
    elif not set(kinds) <= {FULL, SLIDING}:
        yield f"layer_types = {kinds!r}: must be full_attention or sliding_attention"
    elif SLIDING in kinds and window is None:
        yield "layer_types: sliding_attention: must be full_attention, as there is no sliding_window"
    elif FULL in kinds and window and windows and not windows.listed:
        yield f"layer_types: full_attention: must be sliding_attention, as sliding_window = {window}"
    rotated, layers = content.get("no_rope_layers"), _layers(content)
    listed = rotated if family_in(content).unrotated and isinstance(rotated, list) else [1] * layers
    if len(listed) < layers or any(one not in (0, 1) for one in listed):
        yield f"no_rope_layers = {rotated!r}: must be a 0 or 1 for each of {layers} layers"


def layer_types(content: Mapping[str, object]) -> list[str]:
    """The attention of each layer."""
    windows, listed, layers = family_in(content).windows, content.get("layer_types"), range(_layers(content))
    if isinstance(listed, list):
        return [FULL if kind == "attention" else kind for kind in listed]
    if windows is not None and windows.full_every is not None:
        every = (
            windows.full_every if windows.interval is None else number(content, windows.interval, windows.full_every)
        )
        return [SLIDING if (layer + 1) % every else FULL for layer in layers]
    if windows is None or declared_window(content) is None:
        return [FULL for _ in layers]
    if windows.of_unrotated:
        return [FULL if is_rotated else SLIDING for is_rotated in rotated_layers(content)]
    first = number(content, "max_window_layers", 28) if windows.from_layer else 0
    return [SLIDING if layer >= first else FULL for layer in layers]


def rotated_layers(content: Mapping[str, object]) -> list[bool]:
    """Whether each layer has rotary positions."""
    layers, listed = range(_layers(content)), content.get("no_rope_layers")
    if not family_in(content).unrotated:
        return [True for _ in layers]
    if isinstance(listed, list):
        return [bool(one) for one in listed[: len(layers)]]
    every = number(content, "no_rope_layer_interval", NOPE_INTERVAL)
    return [(layer + 1) % every != 0 for layer in layers]


def declared_window(content: Mapping[str, object]) -> int | None:
    """The window of the layers that have one."""
    family = family_in(content)
    if family.windows is None or (family.windows.switch and not content.get("use_sliding_window", False)):
        return None
    window = content.get("sliding_window", default_of(family, "sliding_window"))
    return window if isinstance(window, int) else None


def layers_from_huggingface(content: Mapping[str, object]) -> dict[str, object]:
    """Window and attention pattern. Mistral's layer_types are read as transformers does, which takes such a model for a
    Ministral.
    """
    kinds, rotated = layer_types(content), rotated_layers(content)
    named = [
        ("window" if kind == SLIDING else "full") + ("" if is_rotated else "_nope")
        for kind, is_rotated in zip(kinds, rotated, strict=True)
    ]
    pattern = None if set(named) in ({"full"}, {"window"}) else shortest_pattern(named)
    return {"sliding_window": declared_window(content) if SLIDING in kinds else None, "attention_pattern": pattern}


def layers_to_huggingface(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys of windows and of layers that are not rotated."""
    windows, content = family.windows, {}
    if windows is not None:
        content |= {"sliding_window": config.sliding_window}
        content |= {"use_sliding_window": config.sliding_window is not None} if windows.switch else {}
        content |= {"max_window_layers": 0} if windows.switch and not windows.of_unrotated else {}
        kinds = [FULL if window is None else SLIDING for window in config.layer_windows]
        is_told = len(set(kinds)) > 1 or windows.full_every is not None or windows.of_unrotated
        content |= {"layer_types": kinds} if is_told else {}
    if family.unrotated:
        content |= {"no_rope_layers": [int(is_rotated) for is_rotated in config.layer_rotates]}
    return content


def layers_not_expressed(config: ModelConfig, family: Family) -> Iterator[tuple[str, str]]:
    """Fields of the layers' attention that a family can't express, with what they must be."""
    if not family.unrotated and any(kind.endswith("_nope") for kind in config.pattern):
        yield "attention_pattern", "without _nope"
    if len({has_window([kind]) for kind in config.pattern}) > 1 and not (family.windows and family.windows.mixed):
        yield "attention_pattern", "the same for all layers"


def _layers(content: Mapping[str, object]) -> int:
    return int(number(content, "num_hidden_layers", 0))
