"""What both backends agree on: the config, the facts derived from it, and the files they meet in. Imports no
framework.
"""

from shared_config.errors import ConfigError, UserError
from shared_config.loader import config_from_toml, config_to_toml, load_config, preset_names
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
