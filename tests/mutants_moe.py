"""Bugs to plant in mixtures of experts: routing, losses, balancing, dispatch, grouped products, combination."""

from __future__ import annotations

from tests.mutants import Mutant, both

MOE_MUTANTS = (
    both("model.moe", "the gate of the shared expert is ignored", "self._shared(self.shared_expert(x_TD), x_TD)",
         "self.shared_expert(x_TD)"),
    Mutant(
        "model.router", "ties to the highest index",
        ("torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]",
         "scores_TE.shape[1] - 1 - torch.sort(scores_TE.flip(1), dim=-1, descending=True, stable=True).indices[:, :k]"),
        ("jax.lax.top_k(scores_TE, k)[1]", "scores_TE.shape[1] - 1 - jax.lax.top_k(scores_TE[:, ::-1], k)[1]"),
    ),
    Mutant(
        "model.router", "logits in the dtype of the tokens",
        ("dtype = _at_least_float32(torch.promote_types(x.dtype, self.weight.dtype))", "dtype = x.dtype"),
        ("dtype = _at_least_float32(jnp.promote_types(x.dtype, weight.dtype))", "dtype = x.dtype"),
    ),
    Mutant(
        "model.router", "z-loss not squared",
        ("torch.logsumexp(logits_TE, dim=-1).square()", "torch.logsumexp(logits_TE, dim=-1)"),
        ("jnp.square(jax.nn.logsumexp(logits_TE, axis=-1))", "jax.nn.logsumexp(logits_TE, axis=-1)"),
    ),
    both("model.router", "padding counted", "chosen_TE = chosen_TE & valid_T[:, None]", "pass"),
    both("model.router", "balancing loss without the number of experts", "return shares_BSE.shape[-1] * (f_BE",
         "return (f_BE"),
    both("model.router", "padding in the balancing loss", "masked_mean(shares_BSE, valid_BS, axis=1)",
         "masked_mean(shares_BSE, None, axis=1)"),
    both("model.router", "sequence loss over the whole batch",
         "losses_B = balance_losses(shares_BSE, chosen_BSE, valid_BS)",
         "losses_B = balance_losses(*(a.reshape(1, -1, a.shape[-1]) for a in (shares_BSE, chosen_BSE)),"
         " None if valid_BS is None else valid_BS.reshape(1, -1))"),
    both("model.router", "sequence loss not weighted", "axis=0) * self.sequence_aux_loss_weight", "axis=0)"),
    both("model.router", "scores of the chosen not normalised over all", "return scores_TE / (scores_TE.sum(",
         "return scores_TE / (1 + 0 * scores_TE.sum("),
    both("model.router", "bias moves away from balance", "(1 / ema_E.shape[-1] - new_ema_E)",
         "(new_ema_E - 1 / ema_E.shape[-1])"),
    both("model.router", "bias moves without tokens", "where(total > 0, bias_E + step_E, bias_E)",
         "where(total > -1, bias_E + step_E, bias_E)"),
    both("model.router", "average forgets too fast", "ema_decay * ema_E + (1 - ema_decay) *",
         "(1 - ema_decay) * ema_E + ema_decay *"),
    both("model.router", "schedule not reached", "self.bias_update_rate * factor", "self.bias_update_rate"),
    Mutant(
        "model.dispatch", "padding routed",
        ("torch.where(valid_T.repeat(top_k), expert_R, num_experts)", "expert_R"),
        ("jnp.where(jnp.tile(valid_T, top_k), expert_R, num_experts)", "expert_R"),
    ),
    Mutant(
        "model.dispatch", "validity of other tokens",
        ("valid_T.repeat(top_k)", "valid_T.repeat_interleave(top_k)"),
        ("jnp.tile(valid_T, top_k)", "jnp.repeat(valid_T, top_k)"),
    ),
    both("model.dispatch", "one more than the capacity", "starts[expert_R] < capacity", "starts[expert_R] <= capacity"),
    Mutant(
        "model.dispatch", "last tokens kept under capacity",
        ("rows_R - starts[expert_R] < capacity",
         "F.pad(ends_E, (0, 1), value=len(rows_R))[expert_R] - rows_R <= capacity"),
        ("rows_R - starts[expert_R] < capacity",
         "jnp.pad(ends_E, (0, 1), constant_values=len(rows_R))[expert_R] - rows_R <= capacity"),
    ),
    both("model.dispatch", "gradient factors upside down", "wide_E.sum() / (", "1 / wide_E.sum() * ("),
    Mutant(
        "model.dispatch", "combine weights ignored",
        ("(out_kTD * weights_Tk.t()[:, :, None])", "(out_kTD + 0 * weights_Tk.t()[:, :, None])"),
        ("(out_kTD * weights_Tk.T[:, :, None])", "(out_kTD + 0 * weights_Tk.T[:, :, None])"),
    ),
    Mutant(
        "model.dispatch", "gradient of one choice only",
        ("ctx.tokens, dy_RD.shape[1]).sum(dim=0), None", "ctx.tokens, dy_RD.shape[1])[0], None"),
        ("return dx_kTD.sum(axis=0), None", "return dx_kTD[0], None"),
    ),
    Mutant(
        "model.moe", "packed matrices transposed back",
        ("_stacked(experts, name).detach().contiguous()", "_stacked(experts, name).detach().transpose(1, 2)"),
        ("nnx.Param(_stacked(experts, name))", "nnx.Param(_stacked(experts, name).swapaxes(1, 2))"),
    ),
    Mutant(
        "model.stats", "last call copied",
        ('self.__dict__.items() if name != "_last"', "self.__dict__.items()"), None,
    ),
    Mutant(
        "model.stats", "last call of a model copied",
        ('{**self.__dict__, "_last_stats": {}}', "self.__dict__"), None,
    ),
    Mutant(
        "model.grouped", "rows of no group computed",
        ("    out_RF[start:] = 0\n", "    out_RF[start:] = 1\n"),
        ("jnp.where(owned_b1, new_bF, old_bF)", "new_bF"),
    ),
    Mutant(
        "model.grouped", "groups one row late",
        ("torch.mm(x_RD[start:end].t(), y_RF[start:end], out=out_DF)",
         "torch.mm(x_RD[start + 1:end].t(), y_RF[start + 1:end], out=out_DF)"),
        ("owned_b1 = ((rows_b >= start) & (rows_b < end))[:, None]",
         "owned_b1 = ((rows_b > start) & (rows_b < end))[:, None]"),
    ),
    Mutant(
        "model.stats", "counts of the last micro-batch only",
        ("added(self._pending_counts, counts)", "counts"),
        ('added(self.kept("pending", {}), counts)', "added({}, counts)"),
    ),
    Mutant(
        "model.transformer", "counts of earlier steps again",
        ("        self._pending_counts = {}\n", "        pass\n"),
        ("        self.keep(pending={})\n", "        pass\n"),
    ),
    Mutant(
        "model.decode", "padding of prompts routed",
        ("        if config.is_moe:\n", "        if False:\n"),
        ("if model.config.is_moe and length:", "if False:"),
    ),
    Mutant(
        "training.train", "padding routed in evaluation",
        ("{**model_inputs(inputs), ", "{**model_inputs({n: a for n, a in inputs.items() if n != 'text_mask'}), "),
        None,
    ),
    Mutant(
        "training.objective", "padding routed in evaluation", None,
        ("model.run(**model_inputs(batch), ",
         "model.run(**model_inputs({n: a for n, a in batch.items() if n != 'text_mask'}), "),
    ),
    both("model.router", "means of no tokens", "max(values.shape[axis], 1)", "values.shape[axis]"),
    Mutant(
        "model.dispatch", "rows hold tokens of others",
        ("x_TD.index_select(0, assignment_R % max(x_TD.shape[0], 1))",
         "x_TD.index_select(0, assignment_R // (len(row_R) // x_TD.shape[0]))"),
        ("x_TD[assignment_R % max(x_TD.shape[0], 1)]", "x_TD[assignment_R // (len(row_R) // x_TD.shape[0])]"),
    ),
    Mutant(
        "model.init", "packed experts drawn too wide",
        ("tensor.normal_(0.0, spec", "tensor.normal_(0.0, (1 + tensor.ndim // 3) * spec"),
        ("(spec.initializer.std * values)", "((1 + values.ndim // 3) * spec.initializer.std * values)"),
    ),
    both("model.init", "packed experts of another seed", "initial_value(name, spec, seed)",
         "initial_value(name, spec, seed + len(spec.shape) // 3)"),
    Mutant(
        "model.router", "average moved by every forward, and again by those of checkpointing",
        ("        if return_stats:\n            return RouterOutput",
         "        getattr(self, 'expert_ema', torch.zeros(())).mul_(0.9)\n        if return_stats:\n"
         "            return RouterOutput"), None,
    ),
    Mutant(
        "training.blocks", "no gradient through checkpointed blocks",
        ("return wrapper(forward, *args, **kwargs)", "return wrapper(torch.no_grad()(forward), *args, **kwargs)"), None,
    ),
    Mutant(
        "training.blocks", "losses of checkpointed blocks without a gradient",
        ("return wrapper(forward, *args, **kwargs)",
         "output = wrapper(forward, *args, **kwargs)\n"
         "        stats = type(output.stats)(*(s.detach() for s in output.stats))\n"
         "        return output._replace(stats=stats)"),
        None,
    ),
    Mutant(
        "model.scan", "no gradient through what is computed again", None,
        ("jax.checkpoint(step,", "jax.checkpoint(lambda *given, step=step: jax.lax.stop_gradient(step(*given)),"),
    ),
    Mutant(
        "model.scan", "losses of what is computed again without a gradient", None,
        ("jax.checkpoint(step,",
         "jax.checkpoint(lambda *given, step=step: (lambda x, s: (x, jax.lax.stop_gradient(s)))(*step(*given)),"),
    ),
    Mutant(
        "model.grouped", "gradients of experts apart in reverse",
        ("[*dw_EDF.unbind()]", "[*dw_EDF.unbind()][::-1]"), None,
    ),
    Mutant(
        "model.grouped", "experts apart by the first one's weights",
        ("_grouped_matmul(x_RD, list(w_EDF), ends_E, complete)",
         "_grouped_matmul(x_RD, [w_EDF[0]] * len(w_EDF), ends_E, complete)"), None,
    ),
    Mutant(
        "model.grouped", "no gradient through experts apart",
        ("[matrix.mT for matrix in matrices]", "[matrix.mT * (matrix.ndim - 2) for matrix in matrices]"), None,
    ),
    Mutant(
        "model.grouped", "tiles of all rows",
        ("_tiles(ends_E, x_RD.shape[0], tile_rows)\n    x_NbD =",
         "_tiles(ends_E, tile_rows, x_RD.shape[0])\n    x_NbD ="),
        ("_tiles(ends_E, x_RD.shape[0], tile_rows)\n    out_N", "_tiles(ends_E, tile_rows, x_RD.shape[0])\n    out_N"),
    ),
    both("model.grouped", "one tile too few", "rows // tile_rows + groups,", "rows // tile_rows + groups - 1,"),
    both("model.grouped", "last row of a tile of the next group", "rows_Nb < ends_E[expert_N][:, None]",
         "rows_Nb <= ends_E[expert_N][:, None]"),
    Mutant(
        "model.grouped", "blocks begin before their group", None,
        ("rows_b >= start) &", "rows_b >= start - 1) &"),
    ),
    Mutant(
        "model.grouped", "last row of the last group in none", None,
        ("< ends_E[-1])[:, None]", "< ends_E[-1] - 1)[:, None]"),
    ),
    Mutant(
        "model.grouped", "no gradient through the weights' gradient", None,
        ("_grouped_matmul(False, x_RD, dw_EDF, ends_E), None",
         "0 * _grouped_matmul(False, x_RD, dw_EDF, ends_E), None"),
    ),
    Mutant(
        "model.scan", "layers in reverse", None,
        ("lax.scan(step, x, states)", "lax.scan(step, x, states, reverse=True)"),
    ),
    Mutant(
        "model.scan", "layers of a period in reverse", None,
        ("zip(graphs, states, inputs, strict=True):", "reversed(list(zip(graphs, states, inputs, strict=True))):"),
    ),
    Mutant(
        "model.scan", "what is left over joins a stack", None,
        ("whole = (same + period) // period * period", "whole = same + period"),
    ),
)  # fmt: skip
