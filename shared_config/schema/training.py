"""The training run: sizes, precision, memory and compilation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import EXECUTION, Count, NonNegativeFloat, PositiveInt, Section, section

FP8_FEWEST_LAYERS = 3
"""The first layer and the last stay in bfloat16."""

FP8_MULTIPLE = 16
"""What rows, inputs and outputs must be multiples of for FP8 units: of 16 bytes, each in its turn summed over."""


@section
class TrainConfig(Section):
    """``batch_size`` is sequences per micro-batch and data-parallel rank; an optimiser step sees ``grad_accum_steps``
    of them.

    mixed_precision: "fp32" computes in float32; "bf16" keeps float32 masters and computes in bfloat16;
    "fp8" does so too, with the products of all layers but the first and the last in FP8 (`shared_config.contract.fp8`).
    matmul_precision: "highest" is full float32 multiplication; "high" allows TF32 or the like on both backends.
    grad_clip_norm: 0 does not clip.
    label_smoothing: e takes (1 - e) of the loss from the label and e from all of the vocabulary alike (Szegedy et al.
    2016, arXiv:1512.00567, section 7). Evaluation is without it.
    logit_z_loss_weight: w adds w log(Z)^2 of each token's logits (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    on_nonfinite: what follows a loss or a norm of the gradient that is not finite: "stop" ends the run; "skip" leaves
    that update out, and one that would give weights or moments that are not finite (weights, moments, counts of updates
    and balancing biases stay; the step number, the learning rate and the place in the data move on), and ends the run
    after ``max_skipped_steps`` in a row. Records then count ``skipped_steps``.
    health_check_seconds: before the run all devices compute a product and a sum that are known, each within so many
    seconds; one that fails is named, and nothing is trained. 0 checks nothing.
    scan_layers: JAX only; one compiled layer looped over the stack instead of an unrolled graph.
    """

    batch_size: PositiveInt = 8
    seq_len: PositiveInt = 2048
    max_steps: PositiveInt = 100_000
    grad_accum_steps: PositiveInt = 1
    grad_clip_norm: NonNegativeFloat = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: PositiveInt = 10
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    logit_z_loss_weight: NonNegativeFloat = 0.0
    seed: Count = 42
    health_check_seconds: Annotated[Count, EXECUTION] = 0
    mixed_precision: Annotated[Literal["fp32", "bf16", "fp8"], EXECUTION] = "bf16"
    matmul_precision: Annotated[Literal["highest", "high"], EXECUTION] = "highest"
    compile_model: Annotated[bool, EXECUTION] = True
    scan_layers: Annotated[bool, EXECUTION] = False
    activation_checkpointing: Annotated[Literal["none", "full", "narrow", "selective"], EXECUTION] = "none"

    @property
    def casts(self) -> bool:
        """Whether the arithmetic is in bfloat16, on a copy of the float32 masters."""
        return self.mixed_precision != "fp32"
