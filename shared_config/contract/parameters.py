"""The parameter table: name -> shape, initialiser and logical axes of every weight and buffer of a model.

Both backends build exactly these tensors, in this orientation; initialising, sharding, counting and loading read the
table.

Names of axes: vocab, embed (the residual width), heads and kv_heads (times head_dim), head_dim, mlp, experts, routes
(what a router chooses among); None for an axis without a rule. A linear weight is (out, in); packed experts are
(expert, in, out).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared_config.contract.layers import decoder_layer_parameters, decoder_parameters, matrix
from shared_config.contract.specs import FOLDED, Named, ParameterSpec, ParameterTable, fold, given, prefixed, unfold
from shared_config.registry import Declaration, declaration
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

EMBEDDING = "token_embedding.embedding.weight"
HEAD = "output_head.proj.weight"


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that are alike but for the numbers of their layers, blocks and experts.

    Attributes:
        name: with the numbers in braces, as ``layers.{0..31}.attention.q_proj.weight``.
        copies: number of tensors.
    """

    name: str
    spec: ParameterSpec
    copies: int

    @property
    def size(self) -> int:
        """Number of elements of all copies."""
        return self.copies * self.spec.size


def parameter_table(config: ModelConfig, vlm: VLMConfig | None = None) -> ParameterTable:
    """Every tensor that a `Transformer` owns, in model order.

    A tied output head owns nothing: it is listed in `aliases`.
    """
    whole = declaration("model", config.model_type).parameters
    if whole is not None:
        return dict(_unfolded(given(whole(config, vlm))))
    table: ParameterTable = dict(_before_layers(config))
    for layer in range(config.n_layers):
        table.update(_unfolded(prefixed(f"layers.{layer}", _layer(config, vlm, layer))))
    table.update(_unfolded(_after_layers(config, vlm)))
    return table


def parameter_groups(config: ModelConfig, vlm: VLMConfig | None = None) -> Iterator[ParameterGroup]:
    """The parameter table with equal layers, blocks and experts folded; as fast for a million of them as for one."""
    whole = declaration("model", config.model_type).parameters
    if whole is not None:
        yield from (ParameterGroup(name, spec, _copies(name)) for name, spec in given(whole(config, vlm)))
        return
    for name, spec in _before_layers(config):
        yield ParameterGroup(name, spec, 1)
    kinds = _layer_kinds(config, vlm)
    owners: dict[tuple[str, ParameterSpec], list[_LayerKind]] = {}
    for kind in kinds:
        for entry in _layer(config, vlm, kind.first):
            owners.setdefault(entry, []).append(kind)
    for (name, spec), of in owners.items():
        everywhere = len(of) == len(kinds)
        layers = fold(range(config.n_layers)) if everywhere else " and ".join(kind.numbers for kind in of)
        count = sum(kind.count for kind in of)
        yield ParameterGroup(f"layers.{layers}.{name}", spec, count * _copies(name))
    for name, spec in _after_layers(config, vlm):
        yield ParameterGroup(name, spec, _copies(name))


def layer_groups(config: ModelConfig, vlm: VLMConfig | None = None) -> Iterator[list[ParameterGroup]]:
    """The tensors of one layer, for each kind of layer that the model has; of a custom model, all that it has."""
    if declaration("model", config.model_type).parameters is not None:
        yield list(parameter_groups(config, vlm))
        return
    for kind in _layer_kinds(config, vlm):
        yield [ParameterGroup(name, spec, _copies(name)) for name, spec in _layer(config, vlm, kind.first)]


@dataclass(frozen=True)
class _LayerKind:
    """Layers with the same tensors: the first of them, their numbers in braces, and how many they are."""

    first: int
    numbers: str
    count: int


def _layer_kinds(config: ModelConfig, vlm: VLMConfig | None) -> list[_LayerKind]:
    """Dense layers, then those with experts; of a custom architecture, groups of equal layers."""
    every = range(config.n_layers)
    own = _architecture(vlm)
    if own.layer_parameters is not None and not own.equal_layers:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for layer in every:
            alike.setdefault(tuple(_layer(config, vlm, layer)), []).append(layer)
        return [_LayerKind(layers[0], _runs(layers), len(layers)) for layers in alike.values()]
    if not config.is_moe:
        return [_LayerKind(0, fold(every), config.n_layers)]
    step = config.moe_frequency
    routed = every[step - 1 :: step]
    moe = _LayerKind(step - 1, fold(routed), config.n_layers // step)
    if step == 1:
        return [moe]
    dense = fold(every[::2]) if step == 2 else f"{fold(every)} but {fold(routed)}"
    return [_LayerKind(0, dense, config.n_layers - moe.count), moe]


def _runs(numbers: list[int]) -> str:
    """Rising numbers in braces: one progression, else each run of consecutive ones."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    progression = range(numbers[0], numbers[-1] + 1, step)
    if list(progression) == numbers:
        return fold(progression)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " and ".join(fold(range(run[0], run[-1] + 1)) for run in runs)


def _copies(name: str) -> int:
    """Number of tensors that a folded name stands for."""
    numbers = [unfold(found) for found in FOLDED.finditer(name)]
    return math.prod((every[-1] - every[0]) // every.step + 1 for every in numbers)


def _unfolded(specs: Named) -> Named:
    """Every tensor under its own name; those that are folded together stand together for each number."""
    for start, entries in itertools.groupby(specs, key=_folded_start):
        if start is None:
            yield from entries
            continue
        numbers = FOLDED.search(start)
        assert numbers is not None
        repeated = [(name.removeprefix(start), spec) for name, spec in entries]
        for number in unfold(numbers):
            yield from ((f"{start[: numbers.start()]}{number}{rest}", spec) for rest, spec in repeated)


def _folded_start(entry: tuple[str, ParameterSpec]) -> str | None:
    """A folded name up to the end of its numbers."""
    numbers = FOLDED.search(entry[0])
    return None if numbers is None else entry[0][: numbers.end()]


def aliases(config: ModelConfig) -> dict[str, str]:
    """Names that are another tensor of the table: alias -> name."""
    return {HEAD: EMBEDDING} if config.tie_embeddings else {}


def _before_layers(config: ModelConfig) -> Named:
    yield EMBEDDING, matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))


def _after_layers(config: ModelConfig, vlm: VLMConfig | None) -> Named:
    yield from given((_architecture(vlm).parameters or decoder_parameters)(config, vlm))
    if not config.tie_embeddings:
        yield HEAD, matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))


def _layer(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> Named:
    """The tensors of one layer; names of experts are folded."""
    return given((_architecture(vlm).layer_parameters or decoder_layer_parameters)(config, vlm, layer))


def _architecture(vlm: VLMConfig | None) -> Declaration:
    """What was declared of an architecture, or else of the nearest one that its config derives from."""
    if vlm is not None:
        for arch in (vlm.arch, *(vars(cls).get("arch", "") for cls in type(vlm).__mro__)):
            found = declaration("architecture", arch)
            if found != Declaration():
                return found
    return Declaration()
