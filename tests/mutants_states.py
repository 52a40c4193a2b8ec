"""Bugs to plant that show in a combination of switches only."""

from __future__ import annotations

from tests.mutants import Mutant, both

STACKED = "return stacked(self).run(\n                tokens,\n                modality=modality,\n"

STATE_MUTANTS = (
    Mutant(
        "model.transformer", "documents dropped where layers are stacked", None,
        (f"{STACKED}                kv_caches=kv_caches,\n                doc_ids=doc_ids,",
         f"{STACKED}                kv_caches=kv_caches,"),
    ),
    Mutant(
        "model.transformer", "padding dropped where layers are stacked", None,
        (STACKED, STACKED.replace("modality=modality", "modality=modality and ModalityContext("
                                  "prefix_embeds=modality.prefix_embeds, image_features=modality.image_features, "
                                  "output_slice=modality.output_slice, noise_seed=modality.noise_seed)")),
    ),
    Mutant(
        "model.transformer", "limited whatever the call says where layers are stacked", None,
        ("limit_capacity=limit_capacity,\n                factored", "factored"),
    ),
    Mutant(
        "model.transformer", "what happens after a stack is that of its first layer", None,
        ("self._extra_modules(), stacks[-1].layers[-1], x,", "self._extra_modules(), stacks[0].layers[0], x,"),
    ),
    Mutant(
        "model.stack", "stats of a stack in reverse", None,
        ("for i, layer in enumerate(self.layers)}", "for i, layer in enumerate(reversed(self.layers))}"),
    ),
    Mutant(
        "model.transformer", "recomputed layers where outputs are observed", None,
        ("remat and not is_observed()", "remat"),
    ),
    Mutant(
        "model.scan", "layers of a period in reverse", None,
        ("for graph, state, own in zip(graphs, states, inputs, strict=True):",
         "for graph, state, own in reversed(list(zip(graphs, states, inputs, strict=True))):"),
    ),
    Mutant(
        "model.scan", "stacks across what happens between layers", None,
        ("if model.architecture.breaks_after(layer) or", "if"),
    ),
    Mutant(
        "model.scan", "stacks in reverse", None,
        ("nnx.to_pure_dict(nnx.split(block)[1]) for block in blocks]",
         "nnx.to_pure_dict(nnx.split(block)[1]) for block in reversed(blocks)]"),
    ),
    Mutant(
        "model.moma", "every layer the first for the noise",
        ("self.layer_idx = layer_idx", "self.layer_idx = 0"),
        ("self.layer.set_value(jnp.asarray(layer_idx,", "self.layer.set_value(jnp.asarray(0 * layer_idx,"),
    ),
    Mutant(
        "model.module", "replaced outputs hidden by a scan", None,
        ("return bool(_observers.get() or _substitutes.get())", "return bool(_observers.get())"),
    ),
    Mutant(
        "model.hooks", "no gradient through what is captured",
        ("_detached(first_output(output)) if detach else first_output(output)", "_detached(first_output(output))"),
        ("jax.lax.stop_gradient(first) if detach else first", "jax.lax.stop_gradient(first)"),
    ),
    Mutant(
        "model.hooks", "what is replaced goes on with its gradient",
        ("first = replacement.to(own).detach()", "first = replacement.to(own).detach() + own - own.detach()"),
        ("first = jax.lax.stop_gradient(replacement.astype(own.dtype))",
         "first = replacement.astype(own.dtype) + own - jax.lax.stop_gradient(own)"),
    ),
    both("model.cross_attention", "blocks fire a layer late", "index = (layer_idx + 1) // self.every - 1",
         "index = max(0, (layer_idx + 1) // self.every - 2)"),
)  # fmt: skip
