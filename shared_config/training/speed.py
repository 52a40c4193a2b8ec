"""How fast a run is, and what share of its devices' peak that is."""

from __future__ import annotations

import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_config.contract.flops import step_flops
from shared_config.contract.peaks import TERA, peak_flops
from shared_config.interchange.vision import tower_of
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
        least: seconds that all devices together need for a step at their peak, from a step on; () where that is not
            known. They change where other parts are frozen.
    """

    tokens: int
    least: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, config: JobConfig, devices: Devices, tokens: int, prompts: Sequence[int] = (0,)) -> Speed:
        """That of a job whose steps have so many tokens. The peak is ``metrics.peak_tflops``, or that of the kind.

        Args:
            prompts: as for `micro_batch_flops`.
        """
        given = config.metrics.peak_tflops
        peak = peak_flops(devices.kind) if given is None else given * TERA
        if peak is None:
            return cls(tokens)
        starts = {0, *(stage.start_step for stage in config.vlm.freeze_schedule)} if config.vlm is not None else {0}
        tower = tower_of(config)
        flops = {start: step_flops(config, tokens, tower, step=start, prompts=prompts) for start in sorted(starts)}
        known = [(start, each / (devices.count * peak)) for start, each in flops.items() if each is not None]
        return cls(tokens, tuple(known))

    def record(self, seconds: float, step: int = 1) -> dict[str, float | None]:
        """What a step of so many seconds is told to have been.

        Args:
            step: its number, from 1.

        Returns:
            seconds; tokens_per_second, over all ranks; where it is known mfu, the model's FLOPs as a share of what all
            devices do at their peak: forward and backward, nothing twice, masked keys not counted (Chowdhery et al.
            2022, arXiv:2204.02311, appendix B).
        """
        least = [needed for start, needed in self.least if start < step]
        share = {"mfu": least[-1] / seconds} if least else {}
        return {"seconds": seconds, "tokens_per_second": self.tokens / seconds, **share}


def resident_peak() -> int:
    """The most bytes of memory that this process has had at once, its program and libraries included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:  # macOS, which counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)  # `getrusage` has that of the parent, if larger
    return KIB * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
