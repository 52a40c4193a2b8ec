"""Bugs to plant in what only a GPU runs."""

from __future__ import annotations

from tests.mutants import Mutant

GPU_MUTANTS = (
    Mutant("model.grouped", "rows of no group are not 0",
           ("out_RF, 0)", "out_RF, 9)"), None),
    Mutant("model.grouped", "groups by the weights of others",
           ("_dense(w_EDF), offs", "_dense(w_EDF.roll(1, 0)), offs"), None),
    Mutant("model.grouped", "the kernel's outer product transposed",
           ("x_RD.contiguous().t(), y_RF.contiguous()", "y_RF.contiguous().t(), x_RD.contiguous()"), None),
    Mutant("model.grouped", "tiles are one row short",
           ("rows_Nb < ends_E[expert_N][:, None]", "rows_Nb < ends_E[expert_N][:, None] - 1"),
           ("rows_Nb < ends_E[expert_N][:, None]", "rows_Nb < ends_E[expert_N][:, None] - 1")),
    Mutant("model.grouped", "loops on a GPU", None, ("cuda=tiled_outer", "cuda=lambda *a: 2 * tiled_outer(*a)")),
    Mutant("model.attention", "the mask is dropped", ("attn_mask=allowed,", "attn_mask=None,"), None),
    Mutant("model.attention", "never causal", ("is_causal=causal,", "is_causal=False,"),
           ("is_causal=mask.causal, ", "is_causal=False, ")),
    Mutant("model.attention", "scores 3 % too large in bfloat16",
           ("            q,\n            k,\n",
            "            q * (1.03 if q.dtype == torch.bfloat16 else 1),\n            k,\n"),
           ("(heads.swapaxes(1, 2) for heads in (q, k, v))", "(heads.swapaxes(1, 2) for heads in (1.03 * q, k, v))")),
    Mutant("model.attention", "heads of the wrong group", ("            k,\n            v,\n",
                                                            "            k.flip(1),\n            v.flip(1),\n"),
           ("(heads.swapaxes(1, 2) for heads in (q, k, v))",
            "(heads.swapaxes(1, 2) for heads in (q, k[:, ::-1], v[:, ::-1]))")),
    Mutant("model.cuda_graph", "replays draw with the first numbers", ("self.uniforms.copy_(uniforms)", "pass"), None),
    Mutant("model.cuda_graph", "replays read the first tokens", ("        self.tokens.copy_(tokens)\n", ""), None),
    Mutant("training.loss", "loss in the dtype of the logits",
           ("wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))", "wide_NV = logits_NV"),
           ("wide_BSV = logits_BSV.astype(jnp.promote_types(logits_BSV.dtype, jnp.float32))", "wide_BSV = logits_BSV")),
    Mutant("training.optimizer", "updates that are not finite are taken",
           ("(~finite).to(torch.float32)", "finite.to(torch.float32) * 0"), None),
    Mutant("model.linear", "looked-up rows lose their scale",
           (".to(ctx.dtype), None", ".to(ctx.dtype) * 0.9, None"),
           ("total_VD.at[ids].add(dy.", "total_VD.at[ids].add(0.9 * dy.")),
)  # fmt: skip
