"""Bugs to plant in products with FP8."""

from __future__ import annotations

from tests.mutants import Mutant, both

FP8_MUTANTS = (
    both("model.fp8", "the reciprocal of the scale", "wide * (1 / scales)", "wide * scales"),
    Mutant("model.fp8", "scales of the other axis",
           ("amax(dim=-1, keepdim=True)", "amax(dim=0, keepdim=True).amax(dim=-1, keepdim=True).expand(len(x), 1)"),
           ("axis=-1, keepdims=True)", "keepdims=True) + jnp.zeros((len(x), 1))")),
    Mutant("model.fp8", "no saturation",
           (".clamp(-format.largest, format.largest)", " * (1 + 2.0**-4)"),
           ("jnp.clip(wide * (1 / scales), -format.largest, format.largest)", "wide * (1 / scales) * (1 + 2.0**-4)")),
    Mutant("model.fp8", "no floor of scales", (".clamp(min=FLOOR)", ""),
           ("jnp.maximum(largest, np.float32(FLOOR))", "largest")),
    Mutant("model.fp8", "the scale of the second factor forgotten",
           ("sums * b.scales.t() * a.scales", "sums * a.scales"),
           ("sums * b.scales.T * a.scales", "sums * a.scales")),
    Mutant("model.fp8", "the scale of the first factor forgotten",
           ("sums * b.scales.t() * a.scales", "sums * b.scales.t()"),
           ("sums * b.scales.T * a.scales", "sums * b.scales.T")),
    Mutant("model.fp8", "narrow sums",
           ("F.linear(a.codes.float(), b.codes.float())", "F.linear(a.codes.bfloat16(), b.codes.bfloat16())"),
           None),  # XLA sums in float32 on a CPU, whatever it is asked for
    both("model.fp8", "formats swapped", "import BACKWARD, FLOOR, FORWARD, Format",
         "import BACKWARD as FORWARD, FLOOR, FORWARD as BACKWARD, Format"),
    both("model.fp8", "gradients in the forward format", "quantise(dy_RO, BACKWARD)", "quantise(dy_RO, FORWARD)"),
    Mutant("model.fp8", "weights in the backward format",
           ("quantise(weight_OI, FORWARD))\n", "quantise(weight_OI, BACKWARD))\n"),
           ("quantise(weight_OI, FORWARD))\n\n\ndef", "quantise(weight_OI, BACKWARD))\n\n\ndef")),
    Mutant("model.fp8", "scales of rows in the gradient of weights",
           ("quantise(x_RI.t().contiguous(), FORWARD)",
            "Quantised((q := quantise(x_RI, FORWARD)).codes.t(), q.scales.mean().expand(x_RI.shape[1], 1))"),
           ("quantise(x_RI.T, FORWARD)",
            "Quantised((q := quantise(x_RI, FORWARD)).codes.T, q.scales.mean() + jnp.zeros((x_RI.shape[1], 1)))")),
    Mutant("model.fp8", "sums of few digits", ("use_fast_accum=False", "use_fast_accum=True"),
           ("precision=lax.Precision.HIGHEST, ", "")),
    Mutant("model.fp8", "scales of rows as those of columns", ("scale_b=b.scales.t()", "scale_b=b.scales"), None),
    Mutant("model.fp8", "codes that lie across", ("weight_OI.t().contiguous()", "weight_OI.t()"), None),
    both("model.linear", "sizes that don't fit", " and fits(", " and not fits("),
    both("model.linear", "modules in FP8 that are not", "if fp8 and", "if"),
    Mutant("model.linear", "float32 products in FP8", ("x.dtype == torch.bfloat16", "True"),
           ("fp8 and x.dtype == jnp.bfloat16", "fp8")),
    Mutant("model.linear", "no bias after FP8", ("        return y if bias is None else y + bias", "        return y"),
           ("    return y if bias is None else y + broadcast", "    return y if fp8 or bias is None else y + "
            "broadcast")),
    both("training.mixed_precision", "bfloat16 in FP8", '== "fp8"', '!= "fp32"'),
    both("training.mixed_precision", "every layer in FP8", "is_fp8(path, config.model.n_layers)", "True"),
    both("training.mixed_precision", "the last layer in FP8", "config.model.n_layers)", "config.model.n_layers + 1)"),
    Mutant("training.train", "a trainer without FP8", ("    use_fp8(model, config)\n", ""), None),
    Mutant("training.objective", "a trainer without FP8", None, ("        use_fp8(model, config)\n", "")),
)  # fmt: skip
