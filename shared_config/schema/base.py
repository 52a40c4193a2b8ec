"""What every config section is: a frozen, hashable, strictly typed dataclass that reports all its problems at once."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from shared_config.errors import ConfigError
from shared_config.registry import declared_names, names_in_backends

LARGEST = 2**63 - 1
"""Of integers: what TOML and both backends can hold."""
SHOWN = 120
"""Characters of a wrong value that a message repeats."""

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
LARGEST_FLOAT = 1e18
"""What a number of a config is at most: the product of two of them is still a float32."""
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]

SectionType = TypeVar("SectionType", bound="Section")
Value = TypeVar("Value", covariant=True)


class FrozenDict(Mapping[str, Value]):
    """A mapping that can be hashed and not changed, for mapping fields of frozen sections."""

    def __init__(self, items: Mapping[str, Value]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class _Nested:
    """Annotation for a sub-section: a mapping of its fields is accepted as well as an instance."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def build(value: object) -> object:
            return source(**value) if isinstance(value, Mapping) else value

        return core_schema.no_info_before_validator_function(build, handler(source))


NESTED = _Nested()


class _KeepsFunction:
    """Annotation for a field, or a whole section, that changes how a model trains or runs, not what its weights compute
    when they decode, which they do without capacity limits.
    """


KEEPS_FUNCTION = _KeepsFunction()


class _Execution:
    """Annotation for a field, or a whole section, that says how a run is computed or what its files are, not what is
    computed: traces of one function may differ in it.
    """


EXECUTION = _Execution()


@dataclasses.dataclass(frozen=True)
class _Registered:
    categories: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": self._names()}

    def _names(self) -> list[str]:
        return sorted({name for category in self.categories for name in declared_names(category)})

    def _check(self, name: str) -> str:
        if name in self._names():
            return name
        in_backends = {known for category, known in names_in_backends() if category in self.categories}
        if name not in in_backends:
            known = sorted(in_backends.union(self._names()))
            raise ValueError(f"Input should be one of {', '.join(known)}, or registered first")
        return name


def registered(*categories: str) -> _Registered:
    """Annotation for a string field that names a registered builder of one of the categories."""
    return _Registered(categories)


Item = TypeVar("Item")
Items = Annotated[tuple[Item, ...], BeforeValidator(_as_tuple)]
Pair = Annotated[tuple[Item, Item], BeforeValidator(_as_tuple)]
CountByName = Annotated[Mapping[str, PositiveInt], AfterValidator(FrozenDict)]
TextsByName = Annotated[Mapping[str, str | Items[str]], AfterValidator(FrozenDict)]


def problems_of(error: pydantic.ValidationError, prefix: str = "") -> list[str]:
    """One line for each problem pydantic found: dotted field, value given, what is allowed."""
    return [line for entry in error.errors() for line in _describe(entry, prefix)]


def _describe(entry: ErrorDetails, prefix: str) -> Iterator[str]:
    places = [prefix, *(str(place) for place in entry["loc"])]
    path = ".".join(place for place in places if place)
    cause = entry.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        yield from (f"{path}.{line}" if path else line for line in cause.problems)
    elif entry["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        yield f"{path} = {shown(entry['input'])}: unknown key"
    elif entry["type"] in ("missing", "missing_argument"):
        yield f"{path}: required, but not given"
    else:
        message = entry["msg"].removeprefix("Value error, ")
        yield f"{path} = {shown(entry['input'])}: {_plain(message)}"


def _plain(message: str) -> str:
    """What pydantic allows, in the words of files and command lines, where several values are a list."""
    return message.replace("Input should", "must").replace("a valid tuple", "a list, as ['a', 'b'] or [1, 2]")


def shown(value: object) -> str:
    """A wrong value for a message, whatever it is: the middle of a long one is left out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:
        return f"({type(value).__name__}: {error})"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


def unfit_texts(value: object, path: str) -> Iterator[str]:
    """Lines for texts that no file, path or terminal can hold, at whatever depth of mappings and sequences."""
    if isinstance(value, str):
        if "\0" in value:
            yield f"{path} = {shown(value)}: must not contain the NUL character"
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from unfit_texts(key, path)
            yield from unfit_texts(part, f"{path}.{key}")
    elif isinstance(value, tuple):
        for part in value:
            yield from unfit_texts(part, path)


class Section:
    """Base of all sections.

    Fields whose default None means "derive me" come from ``derive`` and read as the derived value after construction;
    ``replace`` derives them again, so that changing ``n_heads`` alone changes what depends on it.
    """

    derived: ClassVar[frozenset[str]] = frozenset()  # names of the fields that were derived; set on the instance

    def derive(self) -> Mapping[str, object]:
        """Values for the fields that were left None; called once, at construction."""
        return {}

    def problems(self) -> Iterator[str]:
        """Lines "field = value: what is allowed" for what single-field types can't express."""
        return iter(())

    def idle(self) -> Collection[str]:
        """Fields that have no effect beside the values of the others."""
        return ()

    def resolved(self) -> Mapping[str, object]:
        """What fields mean that can be spelled in several ways."""
        return {}

    def function_fields(self) -> dict[str, object]:
        """Values of the fields that change the function the weights compute, nested sections by dotted name.

        All do, except those annotated with `KEEPS_FUNCTION` or `EXECUTION` and those that are idle.
        """
        values: dict[str, object] = {}
        resolved = self.resolved()
        for name in function_names(type(self)):
            value = resolved.get(name, getattr(self, name))
            if isinstance(value, Section):
                values |= {f"{name}.{inner}": part for inner, part in value.function_fields().items()}
            elif name not in self.idle():
                values[name] = value
        return values

    def __post_init__(self) -> None:
        derived = {name: value for name, value in self.derive().items() if getattr(self, name) is None}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "derived", frozenset(derived))
        found = [line for name, value in self.given().items() for line in unfit_texts(value, name)]
        found = found or list(self.problems())
        if found:
            raise ConfigError(found)

    def given(self) -> dict[str, object]:
        """Field values as they were given: derived fields are left out."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names if name not in self.derived}

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed; derived fields are derived again."""
        return type(self)(**{**self.given(), **changes})


def from_fields(cls: type[SectionType], fields: Mapping[str, object]) -> SectionType:
    """A section from values of its fields, of whatever type: its constructor checks them.

    Raises:
        ConfigError: every field that is wrong.
    """
    return cls(**fields)


@functools.cache
def function_names(cls: type[Section]) -> tuple[str, ...]:
    """Fields of a section that are annotated with neither `KEEPS_FUNCTION` nor `EXECUTION`."""
    marks = _annotations(cls)
    return tuple(name for name, marked in marks.items() if KEEPS_FUNCTION not in marked and EXECUTION not in marked)


@functools.cache
def execution_names(cls: type[Section]) -> frozenset[str]:
    """Fields of a section that are annotated with `EXECUTION`, those of nested sections by dotted name."""
    names = set()
    for name, marked in _annotations(cls).items():
        kind = typing.get_type_hints(cls).get(name)
        if EXECUTION in marked:
            names.add(name)
        elif isinstance(kind, type) and issubclass(kind, Section):
            names |= {f"{name}.{inner}" for inner in execution_names(kind)}
    return frozenset(names)


def _annotations(cls: type[Section]) -> dict[str, tuple[object, ...]]:
    """What each field of a section is annotated with, besides its type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[SectionType]) -> type[SectionType]:
    """Class decorator that makes a config section (keyword-only)."""
    return _strict(cls, kw_only=True)


@dataclass_transform(kw_only_default=False, frozen_default=True)
def entry(cls: type[SectionType]) -> type[SectionType]:
    """Class decorator for small config values that read well with positional arguments."""
    return _strict(cls, kw_only=False)


def _strict(cls: type[SectionType], kw_only: bool) -> type[SectionType]:
    config = ConfigDict(strict=True, extra="forbid")
    built = pydantic.dataclasses.dataclass(frozen=True, kw_only=kw_only, config=config)(cls)
    built.__init__ = _collecting(built.__init__)
    return built  # type: ignore[return-value]


def _collecting(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def collecting_init(self: object, *args: object, **kwargs: object) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise ConfigError(problems_of(error)) from None

    return collecting_init
