"""The builders of this backend by category and name: norms, feed-forward layers, models, architectures, ..."""

from __future__ import annotations

from shared_config.registry import Registry

registry = Registry()
