"""Bugs to plant in low-rank adapters."""

from __future__ import annotations

from tests.mutants import Mutant, both

PRODUCT = "return scale * linear(linear(x, a_RI), b_OR)"
LORA_MUTANTS = (
    both("model.linear", "an adapter without its scale", PRODUCT, PRODUCT.replace("scale * ", "")),
    both("model.linear", "A transposed", PRODUCT, PRODUCT.replace("a_RI", "a_RI.reshape(a_RI.shape[::-1]).T")),
    Mutant(
        "model.lora", "A of another seed",
        ("spec, config.train.seed))", "spec, config.train.seed + 1))"),
        ("spec, config.train.seed)", "spec, config.train.seed + 1)"),
    ),
    both("model.lora", "the scale of no adapter", "module.lora_scale = config.lora.scale", "module.lora_scale = 1.0"),
)  # fmt: skip
