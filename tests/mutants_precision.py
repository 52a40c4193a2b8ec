"""Bugs to plant that only narrow dtypes show: sums, softmaxes, norms, rotations, routes and losses in bfloat16."""

from __future__ import annotations

from tests.mutants import Mutant, both

PRECISION_MUTANTS = (
    Mutant(
        "model.norm", "RMSNorm of narrow squares",
        ("torch.rsqrt(wide.square()", "torch.rsqrt(x.square()"), ("jnp.square(wide)", "jnp.square(x)"),
    ),
    Mutant(
        "model.norm", "LayerNorm with a narrow mean",
        ("wide - wide.mean(dim=-1, keepdim=True)", "wide - x.mean(dim=-1, keepdim=True)"),
        ("wide - wide.mean(axis=-1, keepdims=True)", "wide - x.mean(axis=-1, keepdims=True)"),
    ),
    Mutant(
        "model.position", "tables handed out in the dtype of the queries",
        ("dtype = torch.promote_types(dtype, torch.float32)", "pass"),
        ("dtype = jnp.promote_types(dtype, jnp.float32)", "pass"),
    ),
    both("model.position", "rotation in the dtype of the queries",
         "cos, sin = cos.", "dtype = x.dtype\n    cos, sin = cos."),
    Mutant(
        "model.adapter", "mean of a window in its dtype",
        ("dtype = torch.promote_types(windows_BMCF.dtype, torch.float32)", "dtype = windows_BMCF.dtype"),
        ("dtype = jnp.promote_types(windows_BMCF.dtype, jnp.float32)", "dtype = windows_BMCF.dtype"),
    ),
    Mutant(
        "model.attention", "scores 3 % too large in bfloat16",
        ("            q,\n            k,\n",
         "            q * (1.03 if q.dtype == torch.bfloat16 else 1),\n            k,\n"),
        ("* (channels**-0.5 if scale", "* (1.03 if q.dtype == jnp.bfloat16 else 1) * (channels**-0.5 if scale"),
    ),
    Mutant(
        "model.attention", "narrow scores", ("q_BKGSh, k.to(dtype))", "q_BKGSh.to(k.dtype), k).to(dtype)"),
        (", preferred_element_type=dtype)", ").astype(dtype)"),
    ),
    Mutant(
        "model.attention", "narrow softmax",
        ("scores_BHSM.softmax(dim=-1)", "scores_BHSM.to(q.dtype).softmax(dim=-1).to(dtype)"),
        ("jax.nn.softmax(jnp.where(dense.allowed, scores_BHSM, -jnp.inf), axis=-1)",
         "jax.nn.softmax(jnp.where(dense.allowed, scores_BHSM, -jnp.inf).astype(q.dtype), axis=-1).astype('f4')"),
    ),
    Mutant(
        "model.attention", "queries rounded after their scale",
        ("            q,\n            k,\n", "            (q.double() / 3).to(q.dtype) * 3,\n            k,\n"),
        ("= _scores(q_BKGSh, k)", "= _scores(q_BKGSh, (k / 3) * 3)"),
    ),
    Mutant(
        "model.mlp", "activation in the dtype of its input",
        ("F.silu(self.gate_proj(x))", "(lambda gate: gate * gate.sigmoid())(self.gate_proj(x))"),
        ("function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)", "function(x)"),
    ),
    Mutant(
        "model.factors", "a factor rounded to the dtype of what it multiplies",
        ("x * factor", "x * x.new_full((), factor)"), ("(_wide(x) * factor).astype(x.dtype)", "x * factor"),
    ),
    Mutant(
        "model.factors", "a divisor rounded to the dtype of what it divides",
        ("x / divisor", "x / x.new_full((), divisor)"), ("(_wide(x) / divisor).astype(x.dtype)", "x / divisor"),
    ),
    Mutant(
        "model.moe", "gate of a shared expert in the dtype of the tokens",
        ("gate_T1.to(torch.promote_types(gate_T1.dtype, torch.float32)).sigmoid()", "gate_T1.sigmoid()"),
        ("gate_T1.astype(jnp.promote_types(gate_T1.dtype, jnp.float32))", "gate_T1"),
    ),
    Mutant(
        "model.moe", "combine weights rounded to the dtype of the tokens",
        ("weights_Tk = nan_outside(weights_Tk, ", "weights_Tk = nan_outside(weights_Tk.to(x_TD.dtype), "),
        ("weights_Tk = nan_outside(weights_Tk, ", "weights_Tk = nan_outside(weights_Tk.astype(x_TD.dtype), "),
    ),
    Mutant(
        "model.dispatch", "combine weights rounded, and widened again",
        ("out_kTD * weights_Tk.t()[", "out_kTD * weights_Tk.to(out_RD.dtype).to(weights_Tk.dtype).t()["),
        ("out_kTD * weights_Tk.T[", "out_kTD * weights_Tk.astype(out_RD.dtype).astype(weights_Tk.dtype).T["),
    ),
    Mutant(
        "model.dispatch", "choices combined in their dtype",
        ("    out_kTD = out_kTD.to(weights_Tk.dtype)\n", "    weights_Tk = weights_Tk.to(out_RD.dtype)\n"),
        ("    out_kTD = out_kTD.astype(weights_Tk.dtype)\n", "    weights_Tk = weights_Tk.astype(out_RD.dtype)\n"),
    ),
    Mutant(
        "model.router", "logits rounded", ("logits_TE = self.gate(x)", "logits_TE = self.gate(x).to(x.dtype)"),
        ("logits_TE = self.gate(x)", "logits_TE = self.gate(x).astype(x.dtype)"),
    ),
    Mutant(
        "model.router", "scores rounded before they are compared",
        ("self._preference(scores_TE.detach())", "self._preference(scores_TE.detach().to(x.dtype))"),
        ("self._preference(jax.lax.stop_gradient(scores_TE))",
         "self._preference(jax.lax.stop_gradient(scores_TE).astype(x.dtype))"),
    ),
    Mutant("model.router", "logits at the precision of products", None, (", precision=jax.lax.Precision.HIGHEST", "")),
    Mutant(
        "model.grouped", "tiles of the gradient of experts added up in their dtype",
        ("dtype = torch.promote_types(x_RD.dtype, torch.float32)", "dtype = x_RD.dtype"),
        ("x_NbD, y_NbF, preferred_element_type=dtype)", "x_NbD, y_NbF).astype(dtype)"),
    ),
    Mutant(
        "model.grouped", "blocks of the gradient of experts added up in their dtype", None,
        ("out_EDF.shape[1:], dtype), block)", "out_EDF.shape[1:], x_RD.dtype), lambda *place: "
         "block(*place).astype(x_RD.dtype))"),
    ),
    Mutant(
        "model.grouped", "tiles added up at the precision of products",
        None, (", precision=lax.Precision.HIGHEST)", ")"),
    ),
    Mutant(
        "model.expert_choice", "scores rounded",
        ("scores_TE = logits_TE.sigmoid()", "scores_TE = logits_TE.sigmoid().to(x.dtype)"),
        ("scores_TE = jax.nn.sigmoid(logits_TE)", "scores_TE = jax.nn.sigmoid(logits_TE).astype(x.dtype)"),
    ),
    Mutant(
        "model.expert_choice", "experts added up in the dtype of the tokens",
        ("y_TD = torch.zeros(x_TD.shape, dtype=weights_CE.dtype,", "weights_CE = weights_CE.to(x_TD.dtype)\n        "
         "y_TD = torch.zeros(x_TD.shape, dtype=x_TD.dtype,"),
        ("y_TD = jnp.zeros(x_TD.shape, weights_CE.dtype)", "weights_CE = weights_CE.astype(x_TD.dtype)\n        "
         "y_TD = jnp.zeros(x_TD.shape, x_TD.dtype)"),
    ),
    Mutant(
        "model.linear", "looked-up rows added up in their dtype",
        ("        return look_up(self.weight, ids)", "        return super().forward(ids)"),
        ("jnp.zeros(weight_VD.shape, jnp.promote_types(dy.dtype, jnp.float32))",
         "jnp.zeros(weight_VD.shape, dy.dtype)"),
    ),
    Mutant(
        "model.linear", "gradient of a bias added up in its dtype", None,
        ("y + broadcast(bias, y.shape)", "y + bias"),
    ),
    Mutant(
        "model.vision", "quick_gelu in the dtype of its input",
        ("wide = x.to(torch.promote_types(x.dtype, torch.float32))", "wide = x"),
        ("wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))\n    return (wide *",
         "wide = x\n    return (wide *"),
    ),
    Mutant(
        "model.sampling", "sampling in the dtype of the logits",
        ("    dtype = wide(logits.dtype)\n    sorted_V", "    dtype = logits.dtype\n    sorted_V"),
        ("    dtype = wide(logits.dtype)\n    order_V", "    dtype = logits.dtype\n    order_V"),
    ),
    Mutant(
        "model.sampling", "cumulative probabilities in the dtype of the logits",
        ("probabilities_V.cumsum(dim=-1)[", "probabilities_V.to(logits.dtype).cumsum(dim=-1).to(dtype)["),
        ("probabilities_V.cumsum(axis=-1)", "probabilities_V.astype(logits.dtype).cumsum(axis=-1).astype(dtype)"),
    ),
    Mutant(
        "training.loss", "loss in the dtype of the logits",
        ("wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))", "wide_NV = logits_NV"),
        ("wide_BSV = logits_BSV.astype(jnp.promote_types(logits_BSV.dtype, jnp.float32))", "wide_BSV = logits_BSV"),
    ),
    Mutant(
        "training.loss", "loss of rounded probabilities",
        ('F.cross_entropy(wide_NV, labels_N, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)',
         'F.nll_loss(logits_NV.log_softmax(-1).to(wide_NV.dtype), labels_N, ignore_index=IGNORED, reduction="sum")'),
        ("jax.nn.logsumexp(wide_BSV, axis=-1)", "jax.nn.logsumexp(logits_BSV, axis=-1).astype(wide_BSV.dtype)"),
    ),
    Mutant(
        "training.objective", "gradients of micro-batches rounded before they are added up", None,
        ("jax.tree.map(jnp.add, total, one(batch))",
         "jax.tree.map(lambda a, b: (a + b).astype(recipe.compute_dtype).astype(a.dtype), total, one(batch))"),
    ),
    Mutant(
        "training.train", "gradients rounded before they are clipped",
        ("norm = global_norm(list(",
         "gradients = {name: g.to(self.compute_dtype).to(g.dtype) for name, g in gradients.items()}\n"
         "        norm = global_norm(list("),
        ("gradients, norm = clip_by_global_norm(gradients,", "gradients, norm = clip_by_global_norm("
         "jax.tree.map(lambda g: g.astype(recipe.compute_dtype).astype(g.dtype), gradients),"),
    ),
    Mutant(
        "training.train", "what decides a route is rounded", (" if not self.table[name].full_precision]", "]"), None,
    ),
    Mutant(
        "training.objective", "what decides a route is rounded", None,
        ("master if table[in_first_layer(name)].full_precision else ", ""),
    ),
)  # fmt: skip
