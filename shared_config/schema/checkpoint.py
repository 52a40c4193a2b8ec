"""Checkpoints of a training run."""

from __future__ import annotations

from shared_config.schema.base import Count, PositiveInt, Section, section


@section
class CheckpointConfig(Section):
    """``dir`` is the run's folder: checkpoints, metrics and the resolved config; a run started again there resumes.

    interval: steps between checkpoints, 0 for the last step only. keep_last_n: older ones are removed, but for those
    whose step is a multiple of milestone_interval (0: none is). async_save: training goes on while a checkpoint is
    written. load_path: weights to start from when the folder holds no checkpoint.
    """

    dir: str = "runs/latest"
    interval: Count = 1000
    keep_last_n: PositiveInt = 3
    milestone_interval: Count = 0
    async_save: bool = False
    load_path: str = ""
