"""Builders by category and name, and what both backends know about a name.

Each backend owns a `Registry` of builders. A config may use every name that is built in, declared or registered in a
backend. What the builder's module holds is said once for both, without a framework: `declare` takes functions that
give its entries of the parameter table, from which it is initialised, counted, decayed, sharded, saved and loaded::

    declare("norm", "scaled", parameters=lambda config: {"gain": ParameterSpec((1,), Constant(1.0), (None,))})
    torch_registry.register("norm", "scaled")(ScaledNorm)
    jax_registry.register("norm", "scaled")(JaxScaledNorm)

What an optimizer is: `kempnerforge_torch.training.optimizer` and its twin.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shared_config.errors import ConfigError

Builder = TypeVar("Builder", bound=Callable[..., object])
Item = TypeVar("Item")


@dataclass(frozen=True)
class Declaration:
    """What is known of a name in every backend; see `declare`."""

    parameters: Callable[..., Mapping[str, object]] | None = None
    layer_parameters: Callable[..., Mapping[str, object]] | None = None
    equal_layers: bool = False
    output_num_tokens: Callable[..., int] | None = None
    moments: tuple[str, ...] = ()
    others: str = ""


_tables: list[dict[str, Any]] = []


def named_table(items: Mapping[str, Item] | None = None) -> dict[str, Item]:
    """A dict by name that `temporary` puts back as it was."""
    table = dict(items or {})
    _tables.append(table)
    return table


def _built_in(*names: str) -> dict[str, Declaration]:
    return named_table({name: Declaration() for name in names})


_declared: dict[str, dict[str, Declaration]] = {
    "model": _built_in("transformer"),
    "architecture": _built_in("joint_decoder", "cross_attention", "mot", "moma"),
    "norm": _built_in("rmsnorm", "rmsnorm_1p", "layernorm"),
    "activation": _built_in("silu", "gelu", "relu"),
    "mlp": _built_in("silu", "gelu", "relu", "geglu_tanh"),
    "router": _built_in("softmax_topk", "sigmoid_topk"),
    "vision_encoder": _built_in("random", "siglip2", "clip", "vit"),
    "adapter": _built_in("mlp_2layer", "linear", "avgpool", "attentional_pool"),
    "modality_strategy": _built_in("joint_decoder", "cross_attention", "mot", "moma"),
    "optimizer": named_table(
        {
            "adamw": Declaration(),
            "lion": Declaration(moments=("m",)),
            "muon": Declaration(moments=("m",), others="adamw"),
            "schedule_free_adamw": Declaration(moments=("d", "v")),
        }
    ),
}

PARAMETERS_OF = ("model", "architecture", "norm", "mlp", "router", "vision_encoder", "adapter")
"""Categories whose modules may own tensors."""


def declare(
    category: str,
    name: str,
    *,
    parameters: Callable[..., Mapping[str, object]] | None = None,
    layer_parameters: Callable[..., Mapping[str, object]] | None = None,
    equal_layers: bool = False,
    output_num_tokens: Callable[..., int] | None = None,
    moments: Sequence[str] = (),
    others: str = "",
) -> None:
    """State once for both backends what a registered name means for the parameter table and the sizes of a model.

    Args:
        parameters: gives the tensors as {name within the module: `ParameterSpec`}. Called with the `ModelConfig` for a
            norm (over ``config.dim``) and a router; with it and the width for an mlp; with it and the `VLMConfig` for
            an architecture, where it stands for ``extra_modules`` (the final norm is one), and for a model, whose
            whole table it is; with the `VisionEncoderConfig` for an encoder; with the `AdapterConfig`, the width of
            the features and that of the model for an adapter. Where it is left out: a norm has a weight, a router a
            gate, an mlp up_proj and down_proj, an architecture what the plain decoder has; encoders and adapters
            initialise themselves.
        layer_parameters: of an architecture, called with both configs and the number of the layer; stands for
            ``build_block``.
        equal_layers: the layers differ only in having experts or not, so that one of each kind needs to be asked.
        output_num_tokens: of an adapter, called with its config and the number of tokens that enter.
        moments: of an optimizer, names of what it keeps of each parameter, in the parameter's shape and 0 at the start;
            left out: "m" and "v", as AdamW.
        others: of an optimizer that updates the matrices of blocks alone, that of all other parameters.

    Raises:
        ValueError: no such category, an argument that it does not use, a declaration that contradicts an earlier one,
            or invalid names of moments.
    """
    given = Declaration(parameters, layer_parameters, equal_layers, output_num_tokens, tuple(moments), others)
    taken = {"t", "ema"}
    different = len({*given.moments, *taken}) == len(given.moments) + len(taken)
    if not different or not all(name.isidentifier() for name in given.moments):
        raise ValueError(f"moments = {given.moments}: must be names, all different, none of them 't' or 'ema'")
    if category not in _declared:
        raise ValueError(f"category = {category!r}: must be one of {', '.join(sorted(_declared))}")
    allowed = {
        "parameters": PARAMETERS_OF,
        "layer_parameters": ("architecture",),
        "equal_layers": ("architecture",),
        "output_num_tokens": ("adapter",),
        "moments": ("optimizer",),
        "others": ("optimizer",),
    }
    before = _declared[category].get(name, Declaration())
    for field in fields(Declaration):
        old, new = getattr(before, field.name), getattr(given, field.name)
        if new and category not in allowed[field.name]:
            raise ValueError(f"{field.name} is given for {category} {name!r}: only {allowed[field.name]} have it")
        if old and new and old != new:
            raise ValueError(f"{category} {name!r}: {field.name} is declared already, as {old!r}")
    changes = {field.name: getattr(given, field.name) for field in fields(given) if getattr(given, field.name)}
    _declared[category][name] = replace(before, **changes)


def declaration(category: str, name: str) -> Declaration:
    """What was declared of a name; of an unknown one nothing."""
    return _declared[category].get(name, Declaration())


def declared_names(category: str) -> tuple[str, ...]:
    """Names a config may use in ``category``: the built-in ones, and all that were declared or registered."""
    return tuple(sorted(_declared.get(category, ())))


def import_declared(category: str, package: str) -> None:
    """Import the modules of a package that are called as what is declared in a category, so that they register it."""
    for name in declared_names(category):
        if name.isidentifier() and importlib.util.find_spec(f"{package}.{name}") is not None:
            importlib.import_module(f"{package}.{name}")


@functools.cache
def names_in_backends() -> frozenset[tuple[str, str]]:
    """(category, name) of all that the files of the backends register by ``registry.register("category", "name")``.

    They are read, not imported: that would take seconds, and the frameworks.
    """
    found: set[tuple[str, str]] = set()
    for package in ("kempnerforge_torch", "kempnerforge_jax"):
        spec = importlib.util.find_spec(package)
        for folder in () if spec is None else spec.submodule_search_locations or ():
            for file in Path(folder).rglob("*.py"):
                found |= _registered_in(file.read_text(encoding="utf-8"))
    return frozenset(found)


def _registered_in(source: str) -> set[tuple[str, str]]:
    if "registry.register(" not in source:
        return set()
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="registry"), attr="register"),
                args=[ast.Constant(value=str(category)), ast.Constant(value=str(name))],
            ):
                found.add((category, name))
    return found


@contextlib.contextmanager
def temporary() -> Iterator[None]:
    """What is registered or declared inside, in whichever registry, is forgotten on leaving."""
    before = {id(table): dict(table) for table in _tables}
    try:
        yield
    finally:
        for table in _tables:
            table.clear()
            table.update(before.get(id(table), {}))


class UnknownNameError(ConfigError, KeyError):
    """A name that no builder is registered under."""

    __str__ = ConfigError.__str__


class Registry:
    """Maps (category, name) to a builder, e.g. ("norm", "rmsnorm") to the RMSNorm class."""

    def __init__(self) -> None:
        self._builders: dict[str, dict[str, Callable[..., Any]]] = {}

    def register(self, category: str, name: str) -> Callable[[Builder], Builder]:
        """Decorator that files a builder under ``category`` and ``name``.

        Raises:
            ValueError: if the name is taken.
        """

        def file(builder: Builder) -> Builder:
            builders = self.builders(category)
            if name in builders:
                raise ValueError(f"{category} {name!r} is registered already, as {builders[name]!r}")
            builders[name] = builder
            if category not in _declared:
                _declared[category] = named_table()
            _declared[category].setdefault(name, Declaration())
            return builder

        return file

    def get(self, category: str, name: str, field: str = "") -> Callable[..., Any]:
        """The builder of ``name``.

        Args:
            field: where the name was given, if that is not called as the category.

        Raises:
            UnknownNameError: a `ConfigError` and `KeyError`, "Unknown <category>: ..." with the names that exist.
        """
        builders = self.builders(category)
        if name not in builders:
            problem = f"Unknown {category}: {name!r}; available: {', '.join(sorted(builders)) or 'none'}"
            problem = f"{field}: {problem}" if field else problem
            known = name in declared_names(category)
            raise UnknownNameError([problem + (" (declared, or registered in another backend only)" if known else "")])
        return builders[name]

    def check(self, category: str, name: str) -> str:
        """The name, if a builder is registered under it.

        Raises:
            UnknownNameError: as `get`.
        """
        self.get(category, name)
        return name

    def builders(self, category: str) -> dict[str, Callable[..., Any]]:
        """The builders of a category by name, as they are at any time."""
        if category not in self._builders:
            self._builders[category] = named_table()
        return self._builders[category]

    def has(self, category: str, name: str) -> bool:
        """Whether ``name`` is registered in ``category``."""
        return name in self._builders.get(category, {})

    def names(self, category: str) -> tuple[str, ...]:
        """The registered names of a category, sorted."""
        return tuple(sorted(self._builders.get(category, {})))
