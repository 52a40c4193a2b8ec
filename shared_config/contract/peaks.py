"""What accelerators reach at most in dense matrix products of bfloat16 numbers, as their makers say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """Of one kind of device.

    Attributes:
        name: a pattern for the name that its driver gives it.
        tflops: TFLOP/s in bfloat16, without sparsity, accumulated in float32.
        source: where its maker says so. Data sheets that give numbers with sparsity give twice as much.
    """

    name: str
    tflops: float
    source: str


PEAKS: Sequence[Peak] = (
    Peak(r"A(100|800)\b", 312, "NVIDIA A100 Tensor Core GPU data sheet"),
    Peak(r"A30\b", 165, "NVIDIA A30 Tensor Core GPU data sheet"),
    Peak(r"A10\b", 125, "NVIDIA A10 Tensor Core GPU data sheet"),
    Peak(r"A40\b", 149.7, "NVIDIA A40 data sheet"),
    Peak(r"L4\b", 121, "NVIDIA L4 Tensor Core GPU data sheet"),
    Peak(r"L40\b", 181, "NVIDIA L40 GPU data sheet"),
    Peak(r"L40S\b", 362, "NVIDIA L40S data sheet"),
    Peak(r"H[12]00 NVL\b", 835.5, "NVIDIA H100 and H200 Tensor Core GPU data sheets, NVL"),
    Peak(r"H[18]00 PCIe\b", 756, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    Peak(r"(H[128]00|GH200)\b", 989, "NVIDIA H100, H200 and GH200 data sheets, SXM"),
    Peak(r"H20\b", 148, "NVIDIA H20 data sheet"),
    Peak(r"B[23]00\b", 2250, "NVIDIA HGX platform data sheet, of 8"),
    Peak(r"GB[23]00\b", 2500, "NVIDIA GB200 and GB300 NVL72 data sheets, of 72"),
    Peak(r"RTX 3090\b", 71, "NVIDIA Ampere GA102 GPU architecture, appendix A"),
    Peak(r"RTX 4090\b", 165.2, "NVIDIA Ada GPU architecture, appendix A"),
    Peak(r"RTX 5090\b", 209.5, "NVIDIA RTX Blackwell GPU architecture, appendix A"),
    Peak(r"MI250X\b", 191.5, "AMD Instinct MI250X data sheet; a device is one of its two dies"),
    Peak(r"MI3(00|25)X\b", 1307.4, "AMD Instinct MI300X and MI325X data sheets"),
    Peak(r"TPU v4$", 275, "Google Cloud documentation, TPU v4"),
    Peak(r"TPU v5( lite|e)$", 197, "Google Cloud documentation, TPU v5e"),
    Peak(r"TPU v5p?$", 459, "Google Cloud documentation, TPU v5p"),
    Peak(r"TPU v6( lite|e)$", 918, "Google Cloud documentation, TPU v6e"),
)
"""The first whose name is found counts."""


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by its name, as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".

    Returns:
        None: a device that is not in the table, or part of one (MIG).
    """
    if re.search(r"\bMIG\b", device):
        return None
    found = next((peak for peak in PEAKS if re.search(rf"\b{peak.name}", device)), None)
    return None if found is None else found.tflops * TERA
