"""How fast a run is, and what share of its devices' peak that is."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path

from shared_config.contract.counts import flops_per_token
from shared_config.contract.peaks import TERA, peak_flops
from shared_config.schema.job import JobConfig

KIB = 2**10


@dataclass(frozen=True)
class Devices:
    """What a run computes on.

    Attributes:
        count: of all processes together.
        kind: the model, as drivers call it, of one of them; all are alike.
    """

    count: int
    kind: str


@dataclass(frozen=True)
class Speed:
    """Of steps, by their seconds.

    Attributes:
        tokens: of a step, over all ranks.
        least: seconds that all devices together need for a step at their peak; None where that is not known.
    """

    tokens: int
    least: float | None

    @classmethod
    def of(cls, config: JobConfig, devices: Devices, tokens: int) -> Speed:
        """That of a job whose steps have so many tokens. The peak is ``metrics.peak_tflops``, or that of the kind."""
        given = config.metrics.peak_tflops
        peak = peak_flops(devices.kind) if given is None else given * TERA
        if peak is None or config.vlm is not None:
            return cls(tokens, None)
        flops = flops_per_token(config.model, config.train.seq_len).training * tokens
        return cls(tokens, flops / (devices.count * peak))

    def record(self, seconds: float) -> dict[str, float | None]:
        """What a step of so many seconds is told to have been.

        Returns:
            seconds; tokens_per_second, over all ranks; where it is known mfu, the model's FLOPs as a share of what all
            devices do at their peak: forward and backward, nothing twice, masked keys not counted (Chowdhery et al.
            2022, arXiv:2204.02311, appendix B).
        """
        share = {} if self.least is None else {"mfu": self.least / seconds}
        return {"seconds": seconds, "tokens_per_second": self.tokens / seconds, **share}


def resident_peak() -> int:
    """The most bytes of memory that this process has had at once, its program and libraries included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:  # macOS, which counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)  # `getrusage` has that of the parent, if larger
    return KIB * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
