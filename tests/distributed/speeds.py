"""What a run of several devices says of its speed, against what its config and its own seconds come to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared_config.contract.counts import flops_per_token
from shared_config.interchange.checkpoint import read_config
from shared_config.interchange.run_layout import METRICS
from shared_config.loader import config_from_dict
from shared_config.training.progress import STEPS_AVERAGED

TERA = 1e12


def check_speeds(run: Path, said: str, devices: int, begun: int = 0) -> None:
    """Tokens, tokens/s and the share of the peak are those of all devices together, in records and in the last line.

    Args:
        said: what the process printed that began after step ``begun``.
    """
    job = config_from_dict(read_config(run))
    layout, train, peak = job.distributed, job.train, job.metrics.peak_tflops
    assert peak is not None
    replicas = devices // (layout.cp * layout.tp * layout.pp)
    tokens = replicas * train.grad_accum_steps * train.batch_size * train.seq_len
    needed = tokens * flops_per_token(job.model, train.seq_len).training / (devices * peak * TERA)
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    own = [record for record in records if "seconds" in record][begun:]
    assert len(own) == train.max_steps - begun
    for record in own:
        assert record["tokens"] == tokens
        assert record["tokens_per_second"] == tokens / record["seconds"]
        assert record["mfu"] == pytest.approx(needed / record["seconds"], rel=1e-12)
    recent = [record["seconds"] for record in own[1:]][-STEPS_AVERAGED:]
    pace = sum(recent) / len(recent)
    last = [line for line in said.splitlines() if f"step {train.max_steps}/{train.max_steps}  " in line]
    assert len(last) == 1, said
    assert f"  {tokens / pace:,.0f} tokens/s  MFU {needed / pace:.1%}  " in last[0]
