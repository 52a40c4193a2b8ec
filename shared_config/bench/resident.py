"""Memory of this process, where arrays are in the memory of the host."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from shared_config.training.speed import KIB, resident_peak

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""What Linux takes for that (proc(5))."""


def resident() -> int | None:
    """Bytes that the process has now; None where the system does not say."""
    if not STATUS.exists():
        return None
    found = re.search(r"^VmRSS:\s*(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return None if found is None else KIB * int(found[1])


def peak_beyond(before: int | None, call: Callable[[], object]) -> int | None:
    """The most bytes that the process has during a call, beyond ``before``; None where that can't be told."""
    if before is None:
        return None
    try:
        CLEAR.write_text(FORGET_PEAK, encoding="ascii")
    except OSError:
        return None
    call()
    return max(0, resident_peak() - before)
