"""Bugs of parallel layouts to plant, each with the case that has to differ from one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.distributed.layouts import Case
from tests.mutants import Mutant

DENSE, COPIES, SIGMOID = Case("dense", 2, {}), Case("dense", 2, {"dp_replicate": 2}), Case("sigmoid", 2, {})
SPLIT, SPREAD = Case("dense", 2, {"tp": 2}), Case("sigmoid", 2, {"ep": 2})
SENT, SCALED = Case("sigmoid", 2, {"ep": 2}, exchanges=True), Case("scaled", 2, {"ep": 2})
LIMITED = Case("limited", 2, {"ep": 2})
STAGES = Case("staged", 2, {"pp": 2})
PADDED_STAGES = Case("staged", 2, {"pp": 2}, {"data": {"pack_documents": True}})
FROZEN = "[{module = 'vision_encoder'}]"
LATER = "[{start_step = 1, specs = [{module = 'adapter'}]}]"
CUT, ROUTED = (Case(model, 2, {"cp": 2}, {"data": {"pack_documents": True}}) for model in ("dense", "sigmoid"))

Options = Mapping[str, Mapping[str, Any]]
LORA: Options = {"lora": {"rank": 2, "alpha": 5.0, "targets": ("*_proj",)}}
ADAPTED = Case("dense", 2, {}, LORA)


class LayoutMutant(NamedTuple):
    """A bug, and the case, or the check of `tests.distributed.jax_processes`, that shows it."""

    mutant: Mutant
    case: Case | str


def torch_bug(component: str, name: str, text: str, replacement: str, case: Case) -> LayoutMutant:
    return LayoutMutant(Mutant(component, name, (text, replacement), None), case)


MUON: Options = {
    "optimizer": {"name": "muon"},
    "train": {"label_smoothing": 0.1, "logit_z_loss_weight": 0.01},
}
SCHEDULE_FREE: Options = {"optimizer": {"name": "schedule_free_adamw"}, "scheduler": {"name": "constant"}}

DISTRIBUTED_MUTANTS = (
    torch_bug(
        "distributed.mesh", "groups of one process",
        'if layout.size(axis) > 1 or axis == "dp_shard")', ")", DENSE,
    ),
    torch_bug(
        "distributed.fsdp", "gradient divided twice",
        "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)", DENSE,
    ),
    torch_bug(
        "distributed.fsdp", "gradients of adapters divided twice",
        "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)", ADAPTED,
    ),
    torch_bug(
        "distributed.ranks", "a rank's own clip",
        "    dist.all_reduce(total)\n", "", DENSE,
    ),
    torch_bug(
        "distributed.ranks", "replicas count twice in the norm",
        "return ranks // torch.Size(parts).numel()", "return 1", COPIES,
    ),
    torch_bug(
        "training.train", "labels of one rank counted",
        "self.ranks.number(label_count(micro_batches))", "label_count(micro_batches)", DENSE,
    ),
    torch_bug(
        "training.train", "counts of experts not summed",
        "balance(self.model, total.expert_counts, taken=taken)",
        "balance(self.model, summed(terms).expert_counts, taken=taken)", SIGMOID,
    ),
    torch_bug(
        "training.train", "bias updated on one rank",
        "            balance(self.model, total",
        "            if self.ranks.rank == 0: balance(self.model, total", SIGMOID,
    ),
    torch_bug(
        "training.train", "router losses of one rank's share",
        "total_micro_batches = len(micro_batches) * self.ranks.count",
        "total_micro_batches = len(micro_batches)", SIGMOID,
    ),
    torch_bug(
        "training.train", "metrics of one rank",
        "total = self.ranks.sums(summed(terms))",
        "total = summed(terms)._replace(expert_counts=self.ranks.sums(summed(terms).expert_counts))", SIGMOID,
    ),
    torch_bug(
        "training.train", "the same noise on all ranks",
        "self.updates, self.ranks.rank, self.ranks.count)", "self.updates)",
        Case("moma", 2, {}, {"vlm": {"moma_gumbel_noise": "true"}}),
    ),
    torch_bug(
        "distributed.collectives", "gradients of what ranks share not summed",
        "return _sum(dy, ctx.group), None", "return dy, None", SPLIT,
    ),
    torch_bug(
        "distributed.collectives", "parts of an output not summed", "return _sum(x, group)", "return x.clone()", SPLIT,
    ),
    torch_bug(
        "distributed.tensor_parallel", "gradients of norms of heads not summed",
        'add_up(shared, mesh.group("tp"))', "pass", SPLIT,
    ),
    torch_bug(
        "distributed.tensor_parallel", "rows of the vocabulary in reverse",
        "torch.where(mine, ids - start,", "torch.where(mine, stop - 1 - ids,", SPLIT,
    ),
    torch_bug(
        "distributed.tensor_parallel", "a bias added by every rank",
        "out = leave(linear(x, local(module.weight).to(x.dtype)))",
        "out = leave(linear(x, local(module.weight).to(x.dtype), module.bias))",
        Case("mot", 2, {"tp": 2}),
    ),
    torch_bug(
        "distributed.tensor_parallel", "whole tensors have the gradient of one data rank",
        "add_up(whole, mesh.tokens.get_group())", "pass", Case("dense", 4, {"tp": 2, "dp_replicate": 2}),
    ),
    torch_bug(
        "distributed.tensor_parallel", "gradients of norms of positions not summed",
        " or (name in partial and not ruled_axes(name, mesh, table))", "", SPLIT,
    ),
    torch_bug(
        "distributed.sequence_parallel", "gradients of an output's bias not summed",
        "mark_partial(part)", 'mark_partial(part) if "norm" in name else None', SPLIT,
    ),
    torch_bug(
        "distributed.collectives", "gathered along another axis",
        "torch.cat(_gathered_rows(x, group.size(), group.group_name).chunk(group.size()), axis)",
        "_gathered_rows(x, group.size(), group.group_name).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])", SPLIT,
    ),
    torch_bug(
        "distributed.collectives", "positions of a summand not summed",
        "return _scattered_rows(parts, ranks, group.group_name)",
        "return x.chunk(group.size(), axis)[group.rank()].contiguous()", SPLIT,
    ),
    torch_bug(
        "distributed.collectives", "a part of other positions",
        "[group.rank()].clone(", "[-1 - group.rank()].clone(", SPLIT,
    ),
    torch_bug(
        "distributed.collectives", "gradients of own positions in the place of all",
        "return _gather(dy.to(ctx.gradients), ctx.axis, ctx.group)",
        "return torch.cat([dy] * ctx.group.size(), ctx.axis)", SPLIT,
    ),
    torch_bug(
        "distributed.sequence_parallel", "a mixture's gradients of all ranks added up",
        "found = forward(gathered_alike(x_BSD", "found = forward(gathered(x_BSD", Case("sigmoid", 2, {"tp": 2}),
    ),
    torch_bug(
        "distributed.parallelize", "the whole stream on every rank",
        "        split_stream(model, mesh)\n", "        pass\n", SPLIT,
    ),
    torch_bug(
        "distributed.tensor_parallel", "the gradient of what enters the head is that of a part of the vocabulary",
        "(copied(x, group), local(module.weight)", "(x, local(module.weight)", SPLIT,
    ),
    torch_bug(
        "distributed.vocabulary", "each rank subtracts its own highest logit",
        "    dist.all_reduce(highest_BS, dist.ReduceOp.MAX, group)\n", "", SPLIT,
    ),
    torch_bug(
        "distributed.vocabulary", "the label's logit of one rank",
        "torch.where(mine_BS, found_BS, 0)", "found_BS", SPLIT,
    ),
    torch_bug(
        "distributed.expert_parallel", "rows lie by rank, not by expert",
        ".argsort(stable=True)", "", SENT,
    ),
    torch_bug(
        "distributed.expert_parallel", "rows come back in another order",
        "[order_R.argsort()]", "", SENT,
    ),
    torch_bug(
        "distributed.expert_parallel", "experts of another rank",
        "- own * group.rank()", "- own * (group.size() - 1 - group.rank())", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "tokens of other ranks go to this one's experts by their number there",
        "torch.where((number_Gk >= 0) & (number_Gk < own), number_Gk, own)", "number_Gk % own", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "what other ranks' experts make of tokens is left out",
        "scattered(y_GD, 0, group, gradients=x_TD.dtype)", "y_GD.chunk(group.size())[group.rank()]", SPREAD,
    ),
    torch_bug(
        "distributed.collectives", "gradients of tokens that are gathered summed twice",
        "return _scatter(dy, ctx.axis, ctx.group, ctx.sums)",
        "return _sum(_scatter(dy, ctx.axis, ctx.group), ctx.group)", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "weights of routes without a gradient",
        "gathered(routes.weights_Tk, 0, group)", "gathered(routes.weights_Tk.detach(), 0, group)", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "factors of gradients from another rank",
        "gathered(routes.factors_Tk, 0, group)", "gathered(routes.factors_Tk, 0, group).flip(0)", SCALED,
    ),
    torch_bug(
        "distributed.expert_parallel", "room for the rows of one expert",
        "layer.num_experts * routes.limit", "own * routes.limit", LIMITED,
    ),
    torch_bug(
        "model.dispatch", "rows beyond the end counted",
        "return found_RD if complete else", "return found_RD if True else", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "every row is taken to be of an expert",
        "Routes(weights_Gk, plan, factors_Gk, False, None)", "Routes(weights_Gk, plan, factors_Gk, True, None)", SPREAD,
    ),
    torch_bug(
        "distributed.expert_parallel", "the host waits for the rows of experts",
        "        plan = plan._replace(assignment_R=plan.assignment_R[:most])\n",
        "        plan = plan._replace(assignment_R=plan.assignment_R[:int(plan.ends_E[-1])])\n", SPREAD,
    ),
    torch_bug(
        "distributed.fsdp", "gradients of experts not summed over those who hold the same",
        "    if mesh.experts.size() == 1:\n", "    if mesh.experts.size() >= 1:\n",
        Case("limited", 4, {"ep": 2, "dp_replicate": 2}),
    ),
    torch_bug(
        "distributed.fsdp", "experts are gathered inside their block",
        "    part.register_forward_hook = block.", "    part.register_forward_hook = part.",
        Case("limited", 4, {"ep": 2, "dp_replicate": 2}),
    ),
    torch_bug(
        "distributed.context_parallel", "keys of one part",
        "gathered(torch.stack([k_new, v_new]), 3, self.group)",
        "torch.cat([torch.stack([k_new, v_new])] * self.group.size(), 3)", CUT,
    ),
    torch_bug(
        "distributed.context_parallel", "positions of another part",
        "+ self.group.rank() * length", "+ (self.group.size() - 1 - self.group.rank()) * length", CUT,
    ),
    torch_bug(
        "distributed.collectives", "gradients of keys and values not summed",
        "return _scatter(dy, ctx.axis, ctx.group, ctx.sums)",
        "return dy.chunk(ctx.group.size(), ctx.axis)[ctx.group.rank()].contiguous()", CUT,
    ),
    torch_bug(
        "distributed.context_parallel", "documents of one part",
        "gathered_alike(doc_ids, 1, self.group)", "torch.cat([doc_ids] * self.group.size(), 1)", CUT,
    ),
    torch_bug(
        "distributed.context_parallel", "padding of no part",
        "key_valid=None if key_padding_mask is None else", "key_valid=None if True else", CUT,
    ),
    torch_bug(
        "distributed.context_parallel", "loss of one part",
        "summed_over(total, group)", "total", CUT,
    ),
    torch_bug(
        "distributed.context_parallel", "losses and counts of routers of one part",
        "changed._measure = measured", "pass", ROUTED,
    ),
    torch_bug(
        "distributed.collectives", "gradients of routers' losses from another part",
        "dy.chunk(ctx.group.size(), ctx.axis)[ctx.group.rank()]", "dy.chunk(ctx.group.size(), ctx.axis)[0]", ROUTED,
    ),
    torch_bug(
        "distributed.tensor_parallel", "whole tensors have the gradient of one part",
        "add_up(whole, mesh.tokens.get_group())", "add_up(whole, mesh.data.get_group())", ROUTED,
    ),
    torch_bug(
        "distributed.collectives", "gradients of rows stay where they are",
        "return _exchange(dy, ctx.received, ctx.sent, ctx.group), None, None, None",
        "return dy.new_zeros(sum(ctx.sent), dy.shape[1]), None, None, None", SENT,
    ),
    torch_bug(
        "training.train", "what an evaluation gathered is trained, frozen or not", "        release(self.model)\n", "",
        Case("joint_decoder", 2, {}, {"vlm": {"freeze": FROZEN, "freeze_schedule": LATER}}),
    ),
    torch_bug(
        "distributed.pipeline", "loss of the last stage alone",
        '        dist.all_reduce(losses, group=self._mesh.group("pp"))\n', "", STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "gradients divided by the micro-batches again",
        "scale_grads=False", "scale_grads=True", STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "stages in reverse",
        "stage_layers(len(model.layers), stages)[stage]", "stage_layers(len(model.layers), stages)[stages - 1 - stage]",
        STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "losses counted twice in gradients",
        "(total / count).squeeze()", "(2 * total / count).squeeze()", STAGES,
    ),
    torch_bug(
        "distributed.ranks", "stages count as copies in the norm",
        "ranks = dist.get_world_size() // stages", "ranks = dist.get_world_size()", STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "loss of a micro-batch dropped",
        "for loss in losses]", "for loss in losses[1:]]", STAGES,
    ),
    torch_bug(
        "distributed.ranks", "a stage's own clip", "    dist.all_reduce(total)\n", "", STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "batches left over are not evaluated",
        "range(0, len(batches), stages)", "range(0, len(batches) - stages + 1, stages)", STAGES,
    ),
    torch_bug(
        "distributed.pipeline", "documents and padding of the first stage alone",
        "**others})", "**(others if self.model.token_embedding else {})})", PADDED_STAGES,
    ),
    torch_bug(
        "training.muon", "the matrices of shards",
        "orthogonal(whole(direction), steps)[box_of(direction)]", "orthogonal(local(direction), steps)",
        Case("dense", 4, {"tp": 2}, MUON),
    ),
    torch_bug(
        "training.muon", "another rank's part",
        "[box_of(direction)]", "[tuple(slice(0, size) for size in local(direction).shape)]",
        Case("dense", 4, {"tp": 2}, MUON),
    ),
    torch_bug(
        "training.muon", "the matrices of shards of a stack that is split too",
        "if all(axis < direction.ndim - 2", "if any(axis < direction.ndim - 2",
        Case("sigmoid", 4, {"ep": 2, "tp": 2}, MUON),
    ),
    torch_bug(
        "distributed.vocabulary", "smoothing over a part of the vocabulary",
        "summed_over(wide_BSV.sum(dim=-1), group) / vocab_size", "wide_BSV.mean(dim=-1)",
        Case("dense", 4, {"tp": 2}, MUON),
    ),
)  # fmt: skip


def jax_bug(component: str, name: str, text: str, replacement: str, case: Case | str) -> LayoutMutant:
    return LayoutMutant(Mutant(component, f"{name}, jax", None, (text, replacement)), case)


CUT_IN_JAX = Case(
    "sigmoid", 2, {"cp": 2},
    {"data": {"pack_documents": True}, "train": {"activation_checkpointing": "full", "scan_layers": True}},
)  # fmt: skip
HELD = Case("limited", 4, {"ep": 2}, {"model": {"n_layers": 1}})
JAX_MUTANTS = (
    jax_bug(
        "distributed.fsdp", "gradients of copies not summed",
        "(lax.psum(gradient, part.copies).astype(like.dtype),)", "(gradient.astype(like.dtype),)", HELD,
    ),
    jax_bug(
        "distributed.fsdp", "gradient divided by the ranks",
        "gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))",
        "gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)) / lax.psum(1, DATA_AXES)", HELD,
    ),
    jax_bug(
        "distributed.fsdp", "terms of one rank",
        "return arrays, lax.psum(sums, _several(shards.mesh, DATA_AXES))", "return arrays, sums", HELD,
    ),
    jax_bug(
        "training.objective", "router losses of one rank's share",
        "micro_batches=micro_batches * ranks)", "micro_batches=micro_batches)", HELD,
    ),
    jax_bug(
        "distributed.expert_parallel", "experts of another device",
        "- held * lax.axis_index(AXIS)", "- held * (lax.axis_size(AXIS) - 1 - lax.axis_index(AXIS))", HELD,
    ),
    jax_bug(
        "distributed.expert_parallel", "tokens of other devices go to this one's experts by their number there",
        "jnp.where((number_Gk >= 0) & (number_Gk < held), number_Gk, held)", "number_Gk % held", HELD,
    ),
    jax_bug(
        "distributed.expert_parallel", "what other devices' experts make of tokens is left out",
        "    return lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)\n",
        "    return y.reshape(lax.axis_size(AXIS), -1, *y.shape[1:])[lax.axis_index(AXIS)]\n", HELD,
    ),
    jax_bug(
        "distributed.expert_parallel", "gradients of tokens gathered, of which all devices have the sum",
        "wide = dy.astype(", "wide = lax.psum(dy, AXIS).astype(", HELD,
    ),
    jax_bug(
        "distributed.expert_parallel", "room for the rows of one expert",
        "experts * routes.limit", "held * routes.limit", HELD,
    ),
    jax_bug(
        "model.dispatch", "rows beyond the end counted",
        "return jnp.where((row_R < ends_E[-1])[:, None], found_RD, 0)", "return found_RD", HELD,
    ),
    jax_bug(
        "model.experts", "the last block of rows left out",
        "lax.fori_loop(0, -(-ends_E[-1] // block)", "lax.fori_loop(0, ends_E[-1] // block", HELD,
    ),
    jax_bug(
        "model.experts", "gradients of the last block's weights alone",
        "total + part.astype(total.dtype)", "part.astype(total.dtype)", HELD,
    ),
    jax_bug(
        "distributed.ranks", "rows of ranks trade places",
        "[[{name: part[name][rank] for name in part}", "[[{name: part[name][-1 - rank] for name in part}",
        Case("moma", 2, {}, {"vlm": {"moma_gumbel_noise": "true"}}),
    ),
    jax_bug(
        "distributed.context_parallel", "keys of one part",
        "lax.all_gather(jnp.stack([k_new, v_new]), AXIS, axis=3, tiled=True)",
        "jnp.concatenate([jnp.stack([k_new, v_new])] * lax.axis_size(AXIS), axis=3)", CUT_IN_JAX,
    ),
    jax_bug(
        "distributed.context_parallel", "positions of another part",
        "+ lax.axis_index(AXIS) * length", "+ (lax.axis_size(AXIS) - 1 - lax.axis_index(AXIS)) * length", CUT_IN_JAX,
    ),
    jax_bug(
        "distributed.context_parallel", "loss of one part",
        "return lax.psum(total, AXIS)", "return total", CUT_IN_JAX,
    ),
    jax_bug(
        "distributed.context_parallel", "gradients of keys and values not summed",
        "lax.all_gather(jnp.stack([k_new, v_new]), AXIS, axis=3, tiled=True)",
        "gathered_alike(jnp.stack([k_new, v_new]), 3)", CUT_IN_JAX,
    ),
    jax_bug(
        "distributed.context_parallel", "losses and counts of routers of one part",
        "with reading(OtherParts()), measuring(_all_parts):", "with reading(OtherParts()):", CUT_IN_JAX,
    ),
    jax_bug(
        "distributed.fsdp", "whole arrays have the gradient of one part",
        "_several(mesh, TOKEN_AXES) if axis not in used", "_several(mesh, TOKEN_AXES[:-1]) if axis not in used",
        CUT_IN_JAX,
    ),
)  # fmt: skip

PROCESS_MUTANTS = (
    jax_bug(
        "distributed.processes", "a signal that one process sees, and those before it don't",
        "zip(*of_all(numbers), strict=True)", "zip(*of_all(numbers)[: jax.process_index() + 1], strict=True)",
        "numbers",
    ),
    jax_bug(
        "training.train", "rows of the first process", "rank=own.start,", "rank=0,", "rows",
    ),
    jax_bug(
        "distributed.states", "copies of a part written by each that holds one",
        "if shard.replica_id == 0]", "if shard.replica_id >= 0]", "parts",
    ),
    jax_bug(
        "distributed.states", "parts of the other processes not written",
        "if shard.replica_id == 0]", "if shard.replica_id == 0 and is_main()]", "parts",
    ),
    jax_bug(
        "distributed.health", "products of wide numbers alone",
        "for dtype in (jnp.float32, jnp.bfloat16):", "for dtype in (jnp.float32,):", "health",
    ),
    jax_bug(
        "distributed.health", "a sum over the devices of one process",
        "lambda part: lax.psum(part, AXIS)", "lambda part: part", "health",
    ),
    jax_bug(
        "distributed.ranks", "labels of one process counted",
        "return total // holders", "return number", Case("sigmoid", 4, {"ep": 2}),
    ),
    jax_bug(
        "distributed.ranks", "labels counted by each process that has devices of the rank",
        "return total // holders", "return total", Case("dense", 4, {"tp": 4}),
    ),
    jax_bug(
        "training.train", "noise of the first ranks",
        "for rank, own in zip(self.ranks.own,", "for rank, own in zip(range(len(self.ranks.own)),",
        Case("moma", 4, {}, {"vlm": {"moma_gumbel_noise": "true"}}),
    ),
)  # fmt: skip
