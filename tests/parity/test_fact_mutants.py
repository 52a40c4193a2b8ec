"""Every wrong fact of `tests.mutants_facts` is seen by its test, as a failed assertion."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared_config import registry
from shared_config.registry import temporary
from tests.mutants import mutated_source
from tests.mutants_facts import FACT_MUTANTS, FactMutant


@contextmanager
def planted(mutant: FactMutant, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The test, where all that it and `shared_config` took from the mutated module comes from a wrong copy of it."""
    module, _, test = mutant.test.rpartition(".")
    tests = importlib.import_module(f"tests.{module}")
    real = importlib.import_module(f"shared_config.{mutant.module}")
    assert real.__file__ is not None
    written = Path(real.__file__).read_text(encoding="utf-8")
    source = mutated_source(written, mutant.text, mutant.replacement, mutant.module)
    wrong = types.ModuleType(real.__name__)
    wrong.__file__ = real.__file__
    with temporary(), monkeypatch.context() as patch:
        patch.setitem(sys.modules, real.__name__, wrong)
        forget_declarations(real.__name__)
        exec(compile(source, real.__file__, "exec"), wrong.__dict__)
        for reader in (tests, *loaded("shared_config", but=real)):
            for name, value in list(vars(reader).items()):
                if value is real:
                    patch.setattr(reader, name, wrong)
                elif getattr(real, name, None) is value and is_part(value, real):
                    patch.setattr(reader, name, getattr(wrong, name))
        if hasattr(tests, "experts_as_products"):
            tests.experts_as_products(patch)
        yield getattr(tests, test)


def loaded(package: str, but: types.ModuleType) -> list[types.ModuleType]:
    """The modules of a package that are there."""
    return [module for name, module in sys.modules.items() if name.startswith(f"{package}.") and module is not but]


def is_part(value: object, module: types.ModuleType) -> bool:
    """Whether a value is one of the module's own: a function or class of it, or a constant."""
    return not isinstance(value, types.ModuleType) and getattr(value, "__module__", module.__name__) == module.__name__


def forget_declarations(module: str) -> None:
    """What a module has declared, so that a copy of it may declare it anew."""
    for table in registry._declared.values():
        for name, found in table.items():
            functions = {field: getattr(found, field) for field in ("parameters", "layer_parameters")}
            own = [field for field, function in functions.items() if getattr(function, "__module__", "") == module]
            table[name] = replace(found, **dict.fromkeys(own))


@pytest.mark.parametrize("mutant", FACT_MUTANTS, ids=lambda mutant: f"{mutant.module}: {mutant.replacement[:60]}")
def test_a_wrong_fact_is_seen(mutant: FactMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(mutant, monkeypatch) as test, pytest.raises(AssertionError):
        test(*mutant.arguments)
