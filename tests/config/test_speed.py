"""How fast a run says that it is: shares of a peak by hand, peaks of data sheets, memory of a process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.contract.flops import micro_batch_flops
from shared_config.contract.peaks import peak_flops
from shared_config.contract.scale import HARDWARE
from shared_config.loader import load_config
from shared_config.schema.metrics import MOST_TFLOPS, MetricsConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.training.speed import Devices, Speed, resident_peak

SPARSE = {
    "NVIDIA A100-SXM4-40GB": 624, "NVIDIA A100 80GB PCIe": 624, "NVIDIA A30": 330, "NVIDIA A10": 250,
    "NVIDIA A40": 299.4, "NVIDIA L4": 242, "NVIDIA L40": 362, "NVIDIA L40S": 724,
    "NVIDIA H100 80GB HBM3": 1978, "NVIDIA H100 PCIe": 1512, "NVIDIA H100 NVL": 1671, "NVIDIA H800": 1978,
    "NVIDIA H200": 1978, "NVIDIA H200 NVL": 1671, "NVIDIA GH200 480GB": 1978, "NVIDIA H20": 296,
    "NVIDIA B200": 36_000 / 8, "NVIDIA GB200": 360_000 / 72, "NVIDIA GB300": 360_000 / 72,
    "NVIDIA GeForce RTX 3090": 142, "NVIDIA GeForce RTX 4090": 330.4, "NVIDIA GeForce RTX 5090": 419,
    "AMD Instinct MI300X": 2614.9, "AMD Instinct MI325X": 2614.9,
}  # fmt: skip
"""TFLOP/s in bfloat16 with sparsity, twice what there is without, by the names that drivers give."""
DENSE = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v5p": 459, "TPU v6 lite": 918,
         "AMD Instinct MI250X": 383 / 2}  # fmt: skip
UNKNOWN = (
    "cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "Tesla V100-SXM2-32GB", "TPU v5 litepod", "TPU v40",
    "NVIDIA A1000", "an H1000", "NVIDIA RTX A4000",
)  # fmt: skip


def test_peaks_are_those_of_data_sheets() -> None:
    for name, tflops in {**{name: sparse / 2 for name, sparse in SPARSE.items()}, **DENSE}.items():
        assert peak_flops(name) == pytest.approx(tflops * 1e12, rel=1e-3), name
    assert [name for name in UNKNOWN if peak_flops(name) is not None] == []
    on_paper = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
    assert {name: hardware.flops for name, hardware in HARDWARE.items()} == {
        name: peak_flops(device) for name, device in on_paper.items()
    }


@given(
    layers=st.integers(1, 4), kv_heads=st.sampled_from((1, 2, 4)), head_dim=st.sampled_from((2, 6)),
    length=st.integers(1, 64), tokens=st.integers(1, 10**9), devices=st.integers(1, 10**5),
    tflops=st.floats(1e-3, MOST_TFLOPS), seconds=st.floats(1e-3, 1e3),
)  # fmt: skip
def test_the_share_is_that_of_a_sum_by_hand(
    layers: int, kv_heads: int, head_dim: int, length: int, tokens: int, devices: int, tflops: float, seconds: float
) -> None:
    """6 FLOPs of a weight and 12 of a number of each head that meets a key, of which a query sees half."""
    sizes = {"dim": 12, "ffn_hidden_dim": 20, "vocab_size": 300, "n_heads": 4, "n_layers": layers}
    model = {**sizes, "n_kv_heads": kv_heads, "head_dim": head_dim}
    flags = [f"--model.{name}={value}" for name, value in model.items()]
    job = load_config("debug", [*flags, f"--train.seq_len={length}", f"--metrics.peak_tflops={tflops}"])
    weights = 12 * 300 + layers * (2 * 12 * (4 + kv_heads) * head_dim + 3 * 12 * 20)
    flops = 6 * weights + 12 * layers * 4 * head_dim * (length + 1) / 2
    found = Speed.of(job, Devices(devices, "cpu"), tokens).record(seconds)
    assert found["seconds"] == seconds
    assert found["tokens_per_second"] == tokens / seconds
    assert found["mfu"] == pytest.approx(tokens / seconds * flops / (devices * tflops * 1e12))


def test_a_share_is_told_where_the_peak_is_known() -> None:
    """What a config says counts more than the name of a device."""
    text = load_config("debug")
    known = Speed.of(text, Devices(2, "NVIDIA H200"), 100).least
    ((_, alone),) = Speed.of(text, Devices(1, "NVIDIA H200"), 100).least
    assert alone == pytest.approx(2 * known[0][1])
    given = text.replace(metrics=text.metrics.replace(peak_tflops=1978.0))
    assert Speed.of(given, Devices(1, "NVIDIA H200"), 100).least == known
    assert "mfu" not in Speed.of(text, Devices(1, "cpu"), 100).record(1.0)


def test_a_share_of_a_model_with_images_is_of_what_is_trained_at_the_step() -> None:
    stages = (
        '--vlm.freeze=[{module="vision_encoder"}]',
        '--vlm.freeze_schedule=[{start_step=3, specs=[]}, {start_step=5, specs=[{module="transformer"}]}]',
    )
    config = load_config("debug_vlm_mot", stages)
    tokens = 2 * config.train.batch_size * config.train.seq_len
    speed = Speed.of(config, Devices(2, "NVIDIA H200"), tokens)
    for step, start in ((1, 0), (3, 0), (4, 3), (5, 3), (6, 5), (100, 5)):
        found = micro_batch_flops(config, step=start)
        assert found is not None
        assert speed.record(1e-3, step)["mfu"] == pytest.approx(2 * found.training / (2 * 989e12) / 1e-3, rel=1e-3)
    several = load_config("debug_vlm_joint_decoder", ["--vlm.image_token_id=1", "--data.max_images=3"])
    one = several.replace(data=several.data.replace(max_images=1))
    more, less = (Speed.of(job, Devices(1, "NVIDIA H200"), tokens).least[0][1] for job in (several, one))
    assert 1.5 * less < more < 3 * less
    prefix = load_config("debug_vlm_joint_decoder", ["--vlm.prefix_lm=true"])
    empty, asked = (
        Speed.of(prefix, Devices(1, "NVIDIA H200"), tokens, prompts).least[0][1] for prompts in ([0], [0, 40])
    )
    assert less < empty < asked < 1.1 * empty
    strange = config.replace(vision_encoder=VisionEncoderConfig(type="siglip2", path="nowhere"))
    assert micro_batch_flops(strange) is None


@pytest.mark.parametrize("value", ["0", "-1", "9.89e14", "nan", "fast"])
def test_peaks_that_can_not_be_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "debug", f"--metrics.peak_tflops={value}"]) == 2
    assert "metrics.peak_tflops = " in capsys.readouterr().err
    assert MetricsConfig().peak_tflops is None


def test_the_memory_of_a_process_is_its_largest() -> None:
    before = resident_peak()
    held = np.ones(before + 2**26, np.uint8)
    grown = resident_peak()
    assert grown > before + 2**25
    del held
    assert resident_peak() > before + 2**25, "what was held, not what is"


def test_without_a_proc_file_system_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert resident_peak() > 0
