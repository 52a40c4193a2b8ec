"""Recordings that a command line names: a callable, in a file or a module, that passes its options on to ``record``.

    # ours.py
    def ours(**options):
        return record(model(), (tokens,), **options)

``ours.py:ours`` names it, and where the file is part of a package ``package.ours:ours``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from shared_config.errors import UserError
from shared_config.parity.foreign.containers import OUTPUT
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.options import fed_values, refed_fields
from shared_config.parity.selection import LOSS, Selection
from shared_config.parity.traces import FORWARD, Trace

NAMED = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
FORM = "file.py:name or package.module:name"
CALLABLE = "called as name(**options), and give what record(model, inputs, **options) gives"


def is_named(text: str) -> bool:
    """Whether a text names a recording, and no file that is there."""
    return NAMED.fullmatch(text) is not None and not Path(text).exists()


def file_of(text: str) -> str | None:
    """The file that a name has, if it has one."""
    found = NAMED.fullmatch(text)
    return found["place"] if found is not None and found["place"].endswith(".py") else None


def recorded(text: str, options: Mapping[str, object]) -> Trace:
    """The trace that a named recording makes.

    Args:
        options: of ``record``.

    Raises:
        UserError: there is none of this name; what it raises, with its place; it gives no trace, or one that does not
            follow the options.
    """
    found = NAMED.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r}: must be {FORM}")
    with _importing_from(found["place"]), _placed(text, found["place"]):
        module = _module(found["place"])
        record = _recording(module, text, found["name"])
        trace = record(**options)
    if not isinstance(trace, Trace):
        raise UserError(f"{text}: returned {type(trace).__name__}: must be what record(model, inputs, **options) gives")
    _check_options(text, trace, options)
    return trace


def _module(place: str) -> ModuleType:
    """The module of a file or of a dotted name.

    Raises:
        UserError: there is none.
    """
    if not place.endswith(".py"):
        return importlib.import_module(place)
    if not Path(place).is_file():
        raise UserError(f"{place}: is no file; a recording is named as {FORM}")
    spec = importlib.util.spec_from_file_location(f"recorded_{Path(place).stem}", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _recording(module: ModuleType, text: str, name: str) -> Callable[..., object]:
    own = getattr(module, name, None)
    if callable(own):
        return own
    known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
    close = difflib.get_close_matches(name, known, 3) or known[:6]
    hint = f"; it has {', '.join(close)}" if close else ""
    raise UserError(f"{text}: {name} is {'not callable' if hasattr(module, name) else 'not there'}{hint}")


def _check_options(text: str, trace: Trace, options: Mapping[str, Any]) -> None:
    """Refuse a trace that its maker recorded in its own way, or patterns that match nothing.

    Raises:
        UserError: naming the option.
    """
    passed = "must pass its options on, as in record(model, inputs, **options)"
    dtype, fed, names = options.get("dtype"), options.get("refeed"), options.get("names")
    if dtype is not None and trace.meta.dtype != dtype:
        raise UserError(f"{text}: dtype = {trace.meta.dtype!r} where {dtype!r} was asked for: {passed}")
    for pattern in options.get("only", ()):
        if not any(Selection(None, (pattern,)).wants(name) for name in trace.tensors if name != LOSS):
            raise UserError(f"only = {pattern!r}: matches no tensor of {text}")
    if fed is None:
        return
    if {**trace.meta.refed, "backward": False} != {**refed_fields(fed), "backward": False}:
        raise UserError(f"{text}: recorded without refeed: {passed}")
    given = {f"{FORWARD}/{name}" for name in fed_values(_moved(fed, names)) if name.partition(".")[0] != OUTPUT}
    if given and not options.get("only") and given.isdisjoint(trace.tensors):
        raise UserError(
            f"refeed: {text} has none of the activations that the other trace holds, as {min(given)}: a map is needed"
        )


def _moved(trace: Trace, names: Map | None) -> Trace:
    return trace if names is None else names.apply_to_trace(trace)


@contextlib.contextmanager
def _importing_from(place: str) -> Iterator[None]:
    """Let imports find what lies beside a file, or of a module what lies in the current folder."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(place).resolve().parent) if place.endswith(".py") else "")
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _placed(text: str, place: str) -> Iterator[None]:
    """What goes wrong in code of others is said with its place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
            raise UserError(
                f"{text}: no module {error.name} in the current folder or among what is installed"
            ) from error
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of(frame.filename, place)]
        line = f", line {frames[-1].lineno}" if frames else ""
        hint = f"; must be {CALLABLE}" if isinstance(error, TypeError) and not frames else ""
        raise UserError(f"{text}{line}: {type(error).__name__}: {error}{hint}") from error


def _is_of(file: str, place: str) -> bool:
    """Whether a file has the name that the file of a place has."""
    return Path(file).name == (Path(place).name if place.endswith(".py") else f"{place.rpartition('.')[2]}.py")
