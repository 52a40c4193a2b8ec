"""Bugs to plant in how a model gets its weights."""

from __future__ import annotations

from tests.mutants import Mutant, both

AT_ONCE = "set_state(model, {name: __import__('numpy').asarray(value) for name, value in weights.items()})"
LOADING_MUTANTS = (
    both("model.build", "values are drawn before weights are read", "model.init_freqs()",
         "model.init_weights_and_freqs(seed)"),
    Mutant(
        "model.build", "weights are read into another dtype",
        ("model.to(getattr(torch, dtype))", "model.to(torch.float32)"),
        (".to(held_dtype(dtype))", '.to(held_dtype("float32"))'),
    ),
    both("model.build", "all stacks of experts are copied at once", "set_state(model, weights)", AT_ONCE),
)  # fmt: skip
