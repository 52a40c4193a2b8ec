"""Bugs to plant in decoding: rings, reordered caches, images before a prompt."""

from __future__ import annotations

from tests.mutants import Mutant, both

DECODING_MUTANTS = (
    both("model.transformer", "capacity in cached decoding", "kv_caches is None if limit_capacity is None else",
         "True if limit_capacity is None else"),
    both("model.block", "limited whatever the call says",
         "valid=key_padding_mask, limit_capacity=limit_capacity", "valid=key_padding_mask"),
    both("model.slots", "ring overwrites what new tokens see", "length <= self.spare + 1", "length <= self.spare + 2"),
    both("model.decode_state", "empty slots of a ring seen", "positions_BM >= self.oldest[:, None]",
         "positions_BM >= -self.policy.count"),
    Mutant(
        "model.decode_state", "a ring taken for a line",
        ("or self._max_length + length <= self.policy.count", "or True"),
        ("key_positions=key_positions,", "key_positions=None,"),
    ),
    both("model.slots", "slots of a ring in order", "last_B1 - (last_B1 - slots_M) % self.count",
         "last_B1 - (self.count - 1 - slots_M)"),
    Mutant(
        "model.decode_state", "first tokens of a long chunk kept",
        ("new.narrow(axis, length - stored, stored)", "new.narrow(axis, 0, stored)"),
        ("lax.slice_in_dim(new, length - stored, length, axis=axis)", "lax.slice_in_dim(new, 0, stored, axis=axis)"),
    ),
    Mutant(
        "model.decode_state", "what a ring has lost not refused",
        ("if self.oldest is not None and bool((self.policy.first_seen", "if False and bool((self.policy.first_seen"),
        ("if not isinstance(overwritten_B, Tracer) and bool(overwritten_B.any()):", "if False:"),
    ),
    both("model.slots", "wider window than the ring's allowed", "0 < (sliding_window or 0) <= self.window",
         "(sliding_window or 0)"),
    Mutant(
        "model.decode_state", "lengths not reordered",
        ('("lengths", "valid", "doc_ids", "oldest")', '("valid", "doc_ids", "oldest")'),
        ("jnp.where(exists_B, self.lengths[rows], self.max_seq_len)", "self.lengths"),
    ),
    Mutant(
        "model.kv_cache", "values not reordered",
        ("self.v.index_select(0, rows)", "self.v"),
        ("v=self.v[rows]", "v=self.v"),
    ),
    both("model.kv_cache", "keys in the place of values", "self.state.append(self.v, v_new)",
         "self.state.append(self.v, k_new)"),
    Mutant(
        "model.decode_state", "validity not reordered",
        ('("lengths", "valid", "doc_ids", "oldest")', '("lengths", "doc_ids", "oldest")'),
        ("None if array is None else array[rows]",
         'None if array is None else array if name == "valid" else array[rows]'),
    ),
    Mutant(
        "model.decode", "only one id ends a row",
        ("torch.tensor(eos_ids, ", "torch.tensor(eos_ids[:1], "),
        ("eos_ids_E[: len(eos_ids)] = eos_ids", "eos_ids_E[: len(eos_ids[:1])] = eos_ids[:1]"),
    ),
    both("model.decode", "image not counted in the lengths", "prompts.lengths - 1 + request.image_tokens",
         "prompts.lengths - 1"),
    both("model.request", "images that a row lacks counted in its length",
         "if places is None else places.tokens(prefix)", ""),
    both("model.request", "images that a row lacks seen", "if places is None or places.exists is None:", "if True:"),
    both("model.request", "image read before the prompt only",
         "return None if image_tokens(self.image) else self.image", "return None"),
    Mutant(
        "model.request", "frames that don't exist seen",
        ("no_text, frames, image_positions", "no_text, image_positions"),
        ("no_text, frame_mask, image_positions", "no_text, image_positions"),
    ),
    Mutant(
        "model.request", "prefixes without their images",
        ("torch.from_numpy(prompts.lengths + own)", "torch.from_numpy(prompts.lengths)"),
        ("jnp.asarray(prompts.lengths + own)", "jnp.asarray(prompts.lengths)"),
    ),
    both("model.request", "a window hides a prefix from its last token",
         "if self.prefix_lengths is not None and self.has_windows:", "if False:"),
    both("model.cross_attention", "mask of the image forgotten once it was read",
         "image_keys_values=keys_values)", "image_keys_values=keys_values, image_mask=None)"),
    both("model.cross_attention", "first block's keys for all", "modality.image_keys_values[index]",
         "modality.image_keys_values[0]"),
)  # fmt: skip
