"""Bugs to plant in weights that are held as int8."""

from __future__ import annotations

from tests.mutants import Mutant, both

INT8_MUTANTS = (
    Mutant("model.linear", "scales forgotten",
           ("(weight * scales).to(dtype)", "weight.to(dtype)"),
           ("(weight * scales.get_value()).astype(dtype)", "weight.astype(dtype)")),
    Mutant("model.linear", "the reciprocal of the scale",
           ("(weight * scales).to(dtype)", "(weight / scales).to(dtype)"),
           ("(weight * scales.get_value()).astype(dtype)", "(weight / scales.get_value()).astype(dtype)")),
    Mutant("model.linear", "one scale for all outputs",
           ("(weight * scales).to(dtype)", "(weight * scales.mean()).to(dtype)"),
           ("(weight * scales.get_value()).astype(dtype)", "(weight * scales.get_value().mean()).astype(dtype)")),
    both("model.int8", "the head as well", "if is_int8(name)", 'if (is_int8(name) or "head" in name)'),
    both("model.int8", "not the experts", "if is_int8(name)", 'if is_int8(name) and not name.endswith("_w")'),
    Mutant("model.int8", "codes as float32",
           ("nn.Parameter(codes, requires_grad=False)", "nn.Parameter(codes.float(), requires_grad=False)"),
           ("variable.set_value(codes)", "variable.set_value(codes.astype(jnp.float32))")),
    both("model.int8", "scales across", "quantised(to_numpy(weight), name)",
         "(a.swapaxes(-1, -2) for a in quantised(to_numpy(weight).swapaxes(-1, -2), name))"),
    Mutant("model.moe", "codes of single experts as weights",
           ('matrix(getattr(expert, f"{name}_proj"), "weight", dtype).t()',
            'getattr(expert, f"{name}_proj").weight.to(dtype).t()'),
           ('matrix(getattr(expert, f"{name}_proj"), "weight", dtype)',
            'getattr(expert, f"{name}_proj").weight.get_value().astype(dtype)')),
    Mutant("model.moe", "codes of packed experts as weights",
           ('            return matrix(self, f"{name}_w", dtype)\n',
            '            return getattr(self, f"{name}_w").to(dtype)\n'),
           ('matrix(self, f"{name}_w", dtype)', 'getattr(self, f"{name}_w").get_value().astype(dtype)')),
    both("model.build", "never int8", 'weights_dtype == "int8"', 'weights_dtype == "int4"'),
    both("model.build", "any dtype", "    check_weights_dtype(weights_dtype)\n", ""),
)  # fmt: skip
