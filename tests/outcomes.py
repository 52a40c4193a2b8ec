"""Errors as properties: what must be refused is refused by name, and what must work does; anything else is a failed
assertion, not a crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    """The block raises a ValueError (ConfigError and UserError are such) whose message matches."""
    try:
        yield
    except ValueError as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"refused for another reason than {pattern!r}: {error}") from error
    except Exception as error:
        raise AssertionError(f"not refused for {pattern!r}, but failed: {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"not refused for {pattern!r}")


@contextmanager
def accepted(what: str) -> Iterator[None]:
    """The block raises nothing but failed assertions."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
