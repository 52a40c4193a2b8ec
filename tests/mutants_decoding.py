"""Bugs to plant in decoding: rings, reordered caches, images before a prompt."""

from __future__ import annotations

from tests.mutants import Mutant, both

DECODING_MUTANTS = (
    both("model.transformer", "capacity in cached decoding", "kv_caches is None if limit_capacity is None else",
         "True if limit_capacity is None else"),
    both("model.block", "limited whatever the call says",
         "valid=key_padding_mask, limit_capacity=limit_capacity", "valid=key_padding_mask"),
    both("model.kv_cache", "ring overwrites what new tokens see", "length <= self.slots - self.sliding_window + 1",
         "length <= self.slots - self.sliding_window + 2"),
    both("model.kv_cache", "empty slots of a ring seen", "positions_BM >= self.oldest[:, None]",
         "positions_BM >= -self.slots"),
    both("model.kv_cache", "slots of a ring in order", "last_B1 - (last_B1 - slots_M) % self.slots",
         "last_B1 - (self.slots - 1 - slots_M)"),
    Mutant(
        "model.kv_cache", "first tokens of a long chunk kept",
        ("new.narrow(axis, length - kept, kept)", "new.narrow(axis, 0, kept)"),
        ("jnp.take(new, jnp.arange(length - kept, length), axis=axis)", "jnp.take(new, jnp.arange(kept), axis=axis)"),
    ),
    Mutant(
        "model.kv_cache", "what a ring has lost not refused",
        ("if bool((first_seen_B < self.oldest).any()):", "if False:"),
        ("if not isinstance(lost_B, Tracer) and bool(lost_B.any()):", "if False:"),
    ),
    both("model.kv_cache", "wider window than the ring's allowed", "0 < (sliding_window or 0) <= self.sliding_window",
         "(sliding_window or 0)"),
    Mutant(
        "model.kv_cache", "lengths not reordered",
        ('("k", "v", "lengths", "valid", "doc_ids", "oldest")', '("k", "v", "valid", "doc_ids", "oldest")'),
        ("jnp.where(exists_B, self.lengths[rows], self.max_seq_len)", "self.lengths"),
    ),
    Mutant(
        "model.kv_cache", "values not reordered",
        ('("k", "v", "lengths", "valid", "doc_ids", "oldest")', '("k", "lengths", "valid", "doc_ids", "oldest")'),
        ("None if array is None else array[rows]", 'None if array is None else array if name == "v" else array[rows]'),
    ),
    Mutant(
        "model.kv_cache", "validity not reordered",
        ('("k", "v", "lengths", "valid", "doc_ids", "oldest")', '("k", "v", "lengths", "doc_ids", "oldest")'),
        ("None if array is None else array[rows]",
         'None if array is None else array if name == "valid" else array[rows]'),
    ),
    Mutant(
        "model.decode", "only one id ends a row",
        ("torch.tensor(stops, ", "torch.tensor(stops[:1], "),
        ("jnp.asarray(stops or (-1,)", "jnp.asarray(stops[:1] or (-1,)"),
    ),
    both("model.decode", "image not counted in the lengths", "lengths_B - 1 + taken", "lengths_B - 1"),
    both("model.request", "image read before the prompt only",
         "return None if image_tokens(self.image) else self.image", "return None"),
    Mutant(
        "model.request", "frames that don't exist seen",
        ("dtype=torch.int64, device=device), frames)", "dtype=torch.int64, device=device))"),
        ("jnp.zeros((len(pixel_values), 0), jnp.int32), frame_mask)",
         "jnp.zeros((len(pixel_values), 0), jnp.int32))"),
    ),
    both("model.cross_attention", "mask of the image forgotten once it was read",
         "image_keys_values=keys_values)", "image_keys_values=keys_values, image_mask=None)"),
    both("model.cross_attention", "first block's keys for all", "modality.image_keys_values[index]",
         "modality.image_keys_values[0]"),
)  # fmt: skip
