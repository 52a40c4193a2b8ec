"""What both backends agree on: the config, the facts derived from it, and the files they meet in. Imports no
framework, and nothing at all before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_config.errors import ConfigError, UserError
    from shared_config.interchange.toml import config_from_toml, config_to_toml
    from shared_config.loader import load_config, preset_names
    from shared_config.schema import JobConfig, ModelConfig, VLMConfig

__all__ = [
    "ConfigError",
    "JobConfig",
    "ModelConfig",
    "UserError",
    "VLMConfig",
    "config_from_toml",
    "config_to_toml",
    "load_config",
    "preset_names",
]

HOMES = {
    "shared_config.errors": ("ConfigError", "UserError"),
    "shared_config.interchange.toml": ("config_from_toml", "config_to_toml"),
    "shared_config.loader": ("load_config", "preset_names"),
    "shared_config.schema": ("JobConfig", "ModelConfig", "VLMConfig"),
}
"""Module -> the names of this package that it defines."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
