"""Bugs to plant behind the rows of a full validation: each reaches one of them, which is to name it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.mutants import Mutant, both


@dataclass(frozen=True)
class Reaching:
    """A bug and where it shows.

    Attributes:
        scenarios: that are done again with it, in order.
        check, subject: of the row that names it, "{backend}" being the one that has it.
        dtype: of the scenario.
    """

    mutant: Mutant
    scenarios: tuple[str, ...]
    check: str
    subject: str
    dtype: str = "float64"


REACHING = (
    Reaching(
        both("model.mask", "documents ignored", "    if query.doc_id is not None:", "    if False:"),
        ("documents",), "documents", "gradient",
    ),
    Reaching(
        both("model.mask", "padding ignored", "[key.valid] if key.valid is not None else []", "[]"),
        ("padding",), "padding", "loss",
    ),
    Reaching(
        Mutant(
            "training.train", "micro-batches weigh the same",
            ("take(inputs=self._inputs(batch), count=count,",
             "take(inputs=self._inputs(batch), count=max(total * label_count([batch]), 1),"),
            None,
        ),
        ("accumulation",), "accumulation", "gradient",
    ),
    Reaching(
        Mutant(
            "training.objective", "the last micro-batch counts alone", None,
            ("jax.tree.map(jnp.add, total, one(batch)), None", "one(batch), None"),
        ),
        ("accumulation",), "accumulation", "gradient",
    ),
    Reaching(
        Mutant(
            "training.train", "a step that is a little too large",
            ("Step(self.optimizer, by_master, rates, factor)\n        return Fused",
             "Step(self.optimizer, by_master, rates._replace(lr=1.001 * rates.lr), factor)\n        return Fused"),
            ("own_state, trained, rates, taken)",
             "own_state, trained, rates._replace(lr=1.001 * rates.lr), taken)"),
        ),
        ("padding",), "padding", "weights",
    ),
    Reaching(
        Mutant(
            "training.mixed_precision", "gradients of narrow vectors doubled",
            ("name: copy.grad for name, copy", "name: copy.grad * (1 + (copy.ndim == 1)) for name, copy"), None,
        ),
        ("accumulation",), "mixed precision", "gradient", "bfloat16",
    ),
    Reaching(
        Mutant(
            "training.objective", "gradients of all doubled", None,
            ("else master.astype(recipe.compute_dtype)",
             "else master.astype(recipe.compute_dtype) * (2 if recipe.compute_dtype == jnp.bfloat16 else 1)"),
        ),
        ("accumulation",), "mixed precision", "gradient", "bfloat16",
    ),
    Reaching(
        both("training.train", "one label too few in evaluation", 'max(count, 1), "tokens"',
             'max(count - 1, 1), "tokens"'),
        ("padding",), "padding", "evaluation",
    ),
    Reaching(
        both("model.decode", "cached position off by one", "prompts.lengths - 1 + req", "prompts.lengths + req"),
        ("generate",), "generate", "{backend}: static caches = forward",
    ),
    Reaching(
        Mutant(
            "model.decode", "numbers of another step in one way to generate",
            ("return torch.stack(new, dim=1) if", "return torch.stack(new, dim=1).roll(1, 1) if"),
            ("dynamic_index_in_dim(uniforms_BN, index, 1", "dynamic_index_in_dim(uniforms_BN, 0 * index, 1"),
        ),
        ("generate",), "generate", "{backend}: stream = generate",
    ),
    Reaching(
        both("model.slots", "slots of a ring in order", "last_B1 - (last_B1 - slots_M) % self.count",
             "slots_M + 0 * last_B1"),
        ("ring",), "ring", "decode",
    ),
    Reaching(
        Mutant(
            "model.hooks", "stored activations rounded",
            ("self._activations[name] = _on_host(first_output(output))",
             "self._activations[name] = _on_host(first_output(output)).float().double()"),
            ("self._activations[name] = _to_numpy(first_output(output))",
             "self._activations[name] = _to_numpy(first_output(output)).astype(np.float32).astype(np.float64)"),
        ),
        ("captures",), "captures", "{backend}: store = trace",
    ),
    Reaching(
        both("model.hooks", "samples of a batch in reverse",
             "np.concatenate([output[name] for output", "np.concatenate([output[name][::-1] for output"),
        ("captures",), "captures", "extracted",
    ),
    Reaching(
        both("training.train", "a resumed run counts from 0", "self.updates = state.step", "self.updates = 0"),
        ("resume-1", "resume-2"), "resume", "{way}: weights",
    ),
    Reaching(
        Mutant(
            "model.position", "positions from 512 on one too small",
            ("self.cos[positions].to(dtype)", "self.cos[positions - (positions >= 512).long()].to(dtype)"),
            ("table.at[positions].get", "table.at[positions - (positions >= 512)].get"),
        ),
        ("long",), "601 positions", "forward",
    ),
)  # fmt: skip
