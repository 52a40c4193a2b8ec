"""Bugs to plant that begin beyond some length, width, vocabulary or number of rows."""

from __future__ import annotations

from tests.mutants import Mutant, both

LENGTH_MUTANTS = (
    both("model.mask", "no causal mask from position 256 on", "(key.position <= query.position)",
         "((key.position <= query.position) | (query.position >= 256))"),
    both("model.mask", "windows reach back to the start from position 250 on",
         "(key.position > query.position - window)",
         "((key.position > query.position - window) | (key.position < 99) & (query.position > 250))"),
    Mutant(
        "model.attention", "whole sequences from 512 on see everything",
        ("allowed is None and length > 1 else False", "allowed is None and 1 < length < 512 else False"),
        ("jnp.where(dense.allowed, scores_BHSM", "jnp.where(dense.allowed | (length >= 512), scores_BHSM"),
    ),
    Mutant(
        "model.attention", "keys from 512 on not read",
        ("length, keys = q.shape[2], k.shape[2]\n    mask",
         "length, keys = q.shape[2], k.shape[2]\n    v = v * (torch.arange(keys) < 512)[:, None]\n    mask"),
        ("return attend_dense(q, k, v, mask) if", "return attend_dense(q, k, v.at[:, :, 512:].set(0), mask) if"),
    ),
    Mutant(
        "model.position", "positions from 128 on one too small",
        ("self.cos[positions].to(dtype)", "self.cos[positions - (positions >= 128).long()].to(dtype)"),
        ("table.at[positions].get", "table.at[positions - (positions >= 128)].get"),
    ),
    Mutant(
        "model.position", "angles off from position 4,095 on",
        ("cos, sin = self.cos[positions].to(dtype)",
         "positions = positions - (positions >= 4095).long()\n        cos, sin = self.cos[positions].to(dtype)"),
        ("table.at[positions].get", "table.at[positions - (positions >= 4095)].get"),
    ),
    Mutant(
        "model.decode_state", "a token beyond 256 takes the slot before its own",
        ("slots[rows_B1[..., None], heads_K1, targets.unsqueeze(-2)] =",
         "slots[rows_B1[..., None], heads_K1, (targets - (targets > 256).long()).unsqueeze(-2)] ="),
        ("ref = slots.at[rows_B1, targets] if", "ref = slots.at[rows_B1, targets - (targets > 256)] if"),
    ),
    Mutant(
        "model.decode_state", "rows stop counting at 255",
        ("self.lengths.long()[:, None] + steps_S", "self.lengths.long()[:, None].clamp(max=255) + steps_S"),
        ("return self.lengths[:, None] +", "return jnp.minimum(self.lengths, 255)[:, None] +"),
    ),
    Mutant(
        "model.sampling", "draws among the first 1,024 tokens",
        ("device=logits.device) >= top_k", "device=logits.device) >= min(top_k, 1024)"),
        ("jnp.arange(logits.shape[-1]) >= top_k", "jnp.arange(logits.shape[-1]) >= jnp.minimum(top_k, 1024)"),
    ),
    both("model.decode", "prompts read up to token 128", "in request.chunks:", "in request.chunks[:2]:"),
    Mutant(
        "model.dispatch", "choices from 512 on of no expert",
        ("expert_R = indices_Tk.t().flatten()",
         "expert_R = indices_Tk.t().flatten()\n    expert_R[512:] = num_experts"),
        ("expert_R = indices_Tk.T.ravel()", "expert_R = indices_Tk.T.ravel().at[512:].set(num_experts)"),
    ),
    Mutant(
        "training.loss", "vocabulary of 1,024",
        ("F.cross_entropy(wide_NV, labels_N,", "F.cross_entropy(wide_NV[:, :1024], labels_N.clamp(max=1023),"),
        ("jax.nn.logsumexp(wide_BSV, axis=-1)", "jax.nn.logsumexp(wide_BSV[..., :1024], axis=-1)"),
    ),
    both("model.vision", "patches from 512 on not seen", "k_BHNh, v_BHNh, FULL",
         "k_BHNh[:, :, :512], v_BHNh[:, :, :512], FULL"),
    both("model.cross_attention", "image tokens from 512 on not seen", "attend(q_BHSh, k_BKNh, v_BKNh, mask",
         "attend(q_BHSh, k_BKNh[:, :, :512], v_BKNh[:, :, :512], "
         "Mask(key_valid=None if image_mask is None else image_mask[:, :512])"),
    Mutant(
        "training.head", "tokens after the last full chunk dropped",
        ("for start in range(0, len(x_ND), rows):", "for start in range(0, len(x_ND) - rows + 1, rows):"),
        ("return x_ND.reshape(-1, rows, x_ND.shape[1]), labels_N.reshape(-1, rows)",
         "labels_N = labels_N.at[len(labels_N) - rows :].set(IGNORED) if missing else labels_N\n"
         "    return x_ND.reshape(-1, rows, x_ND.shape[1]), labels_N.reshape(-1, rows)"),
    ),
    Mutant(
        "training.head", "a mean of the means of chunks",
        ("loss = loss_of(logits_cV.requires_grad_(), labels_c)",
         "loss = loss_of(logits_cV.requires_grad_(), labels_c) / (labels_c != IGNORED).sum().clamp(min=1)"),
        ("jax.value_and_grad(loss_of)(",
         "jax.value_and_grad(lambda z, own: loss_of(z, own) / jnp.maximum((own != IGNORED).sum(), 1))("),
    ),
    Mutant(
        "training.head", "an evaluation of the mean of the means of chunks",
        ("return loss_of(logits_cV, labels_c)",
         "return loss_of(logits_cV, labels_c) / (labels_c != IGNORED).sum().clamp(min=1)"),
        ("return total + loss_of(linear(x_cD, weight_VD), labels_c), None",
         "own = loss_of(linear(x_cD, weight_VD), labels_c)\n"
         "        return total + own / jnp.maximum((labels_c != IGNORED).sum(), 1), None"),
    ),
    Mutant(
        "training.head", "the weight's gradient of the last chunk alone",
        ("_add_product(dw_VD, dlogits_cV.t(), x_cD)", "_add_product(dw_VD.zero_(), dlogits_cV.t(), x_cD)"),
        ("dw_VD += lax.dot_general(", "dw_VD = lax.dot_general("),
    ),
    Mutant(
        "training.head", "labels of a chunk from one token further on",
        ("labels_N[start : start + rows]", "labels_N.roll(-1)[start : start + rows]"),
        ("return x_ND.reshape(-1, rows, x_ND.shape[1]), labels_N.reshape(-1, rows)",
         "return x_ND.reshape(-1, rows, x_ND.shape[1]), jnp.roll(labels_N, -1).reshape(-1, rows)"),
    ),
    Mutant(
        "training.head", "the scale of the loss left out of the weight's gradient",
        ("torch.mul(dw_VD, gradient,", "torch.mul(dw_VD, 1,"), ("(dw_VD * gradient)", "dw_VD"),
    ),
    Mutant(
        "training.head", "the scale of the loss left out of the gradient of what enters the head",
        ("dx_ND * gradient", "dx_ND"), ("(dx_ND * gradient)", "dx_ND"),
    ),
    Mutant(
        "training.head", "every chunk's gradient written to the first",
        ("dx_ND[start : start + rows]", "dx_ND[: len(x_cD)]"),
        ("dx_ncD.reshape(-1, x_ND.shape[1])", "jnp.broadcast_to(dx_ncD[-1], dx_ncD.shape).reshape(-1, x_ND.shape[1])"),
    ),
    both("training.head", "logits of a chunk not divided", "logits.finished(logits_cV)", "logits_cV"),
    Mutant(
        "training.head", "the weight's gradient only where what enters the head has one",
        ("if dw_VD is not None:\n        _add", "if dw_VD is not None and dx_cD is not None:\n        _add"), None,
    ),
)  # fmt: skip
