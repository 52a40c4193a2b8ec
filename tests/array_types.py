"""Check shapes and dtypes as functions are called: ``pytest -p tests.array_types FILES``.

The annotations of arrays in both backends (jaxtyping's ``Float[Tensor, "B S D"]``) are compared with what a call takes
and gives; letters mean the same number throughout a call. Other annotations are the type checker's. Compilers of torch
can't see through the comparison: tests that compile are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from beartype import beartype
from jaxtyping import install_import_hook

PACKAGES = ("kempnerforge_torch", "kempnerforge_jax")
ARRAY = re.compile(r"\b(Float|Int|Integer|Bool|Num|Shaped|UInt32|Key)\[")


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose arguments and result are compared with the annotations that speak of arrays."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if ARRAY.search(str(hint))}
    return beartype(function) if function.__annotations__ else function


install_import_hook(list(PACKAGES), f"{__name__}.check_arrays")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    compiled = [item for item in items if re.search("compile|one_graph", item.name)]
    config.hook.pytest_deselected(items=compiled)
    items[:] = [item for item in items if item not in compiled]
