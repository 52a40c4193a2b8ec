"""Causal self-attention with grouped heads, its key/value cache and its masks.

Shapes: B batch, S new tokens, M keys (cached and new), D model dim, H query heads, K key/value heads, G = H / K query
heads that share a key/value head, h head_dim. Query head i reads key/value head i // G.

    mask (rows: new tokens at positions 2, 3, 4; columns: keys at positions 0 ... 4)

        causal        window=3      documents 0 0 1 1 1
        1 1 1 0 0     1 1 1 0 0     0 0 1 0 0
        1 1 1 1 0     0 1 1 1 0     0 0 1 1 0
        1 1 1 1 1     0 0 1 1 1     0 0 1 1 1
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kempnerforge_torch.model.matvec import Linear
from kempnerforge_torch.model.norm import RMSNorm
from kempnerforge_torch.model.position import apply_rope

SDPA_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}


CPU_KERNEL_KEYS = 16
"""Of fewer keys, the fused kernel of the CPU turns scores that are all NaN into an output of 0."""


class KVCache:
    """Keys and values of the tokens seen so far, one layer's. `update` writes in place.

    Each row fills its own slots from 0; the slot of a token is its position. Keys are stored after RoPE, before head
    expansion. Where documents or padding were given, the cache remembers them for the tokens to come.

    With a sliding window the slots are a ring, in which a token takes the place of one that none of the later may see:

        window 3, spare 1, 6 tokens seen        slot     0 1 2 3
                                                holds    4 5 2 3

    Attributes:
        k, v: (B, K, slots, h).
        lengths: int32 (B,), tokens seen by each row, which is the position of its next token.
        valid: bool (B, slots), or None while every token was real.
        doc_ids: int (B, slots), or None while no documents were given. Tokens written before are of document 0.
        image_tokens: how many of the first tokens were an image's, where modalities count their positions apart.
        max_seq_len: tokens of a row, at most.
        sliding_window: of a ring, how many tokens each one may see; None where a slot is a position.
        oldest: int32 (B,), of a ring, the first position that has not been overwritten; else None.
        static: if True, shapes don't follow the fill, and no number of the fill is kept on the host: `update` returns
            all slots, so that one compiled step serves every position.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        sliding_window: int | None = None,
        spare: int = 0,
        static: bool = False,
    ):
        """
        Args:
            sliding_window: hold ``sliding_window + spare`` tokens of a row instead of ``max_seq_len``, if that is less.
            spare: so many tokens of a row, and one, may be forgotten again, or read at once without a copy of the ring.
        """
        slots = max_seq_len if sliding_window is None else min(max_seq_len, sliding_window + spare)
        shape = (batch_size, n_kv_heads, slots, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.valid: Tensor | None = None
        self.doc_ids: Tensor | None = None
        self.image_tokens = 0
        self.max_seq_len = max_seq_len
        self.sliding_window = sliding_window if slots < max_seq_len else None
        self.oldest = None if self.sliding_window is None else torch.zeros_like(self.lengths)
        self.static = static
        self._most = 0  # no row is longer than this, and all layers hold the same number; unused if static
        self._even = not static  # all rows have length _most

    @property
    def slots(self) -> int:
        """Tokens of a row that are held, at most."""
        return self.k.shape[2]

    @property
    def seq_len(self) -> int:
        """Length of the longest row, read from the device."""
        return self._most if self._even else int(self.lengths.max())

    def positions(self, length: int) -> Tensor:
        """Positions of the next ``length`` tokens: (S,) where all rows are known to be equal, else (B, S)."""
        steps_S = torch.arange(length, device=self.lengths.device)
        return steps_S + self._most if self._even else self.lengths.long()[:, None] + steps_S

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't. A static cache can't be asked without waiting for the device, whose bounds check
                is that of the slots, or for a ring that of the rotary tables.
        """
        if self.static or self._most + length <= self.max_seq_len:
            return
        if self.seq_len + length > self.max_seq_len:
            raise ValueError(
                f"tokens = {length}: must fit in the cache, of whose max_seq_len = {self.max_seq_len} slots "
                f"{self.seq_len} are filled"
            )

    def update(
        self,
        k_new: Tensor,
        v_new: Tensor,
        *,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append ``S`` tokens to every row.

        Args:
            k_new, v_new: (B, K, S, h).
            doc_ids: int (B, S), of the new tokens; needed once it was given.
            key_padding_mask: bool (B, S), True where a new token is real; all are if None.

        Returns:
            k, v: (B, K, M, h), all that the new tokens may see, themselves included; every slot if static. Those of a
            ring come in no order, and where the new tokens would overwrite each other's, before the new ones.

        Raises:
            ValueError: past the end of the cache, or documents missing.
        """
        length = k_new.shape[2]
        self.reserve(length)
        (self.doc_ids, self.valid), _ = self._noted(length, doc_ids, key_padding_mask)
        k_BKMh, v_BKMh = self._append(self.k, k_new), self._append(self.v, v_new)
        self.lengths = self.lengths + length
        if self.oldest is not None:
            self.oldest = torch.maximum(self.oldest, self.lengths - self.slots)
        if not self.static:
            self._most = min(self._most + length, self.max_seq_len)
        return k_BKMh, v_BKMh

    def cut(self, lengths: Tensor) -> None:
        """Forget, in each row, what lies at or beyond its new length (the padding at the end of a ragged prompt).

        Args:
            lengths: int (B,); where it exceeds the length so far, nothing is forgotten.

        Raises:
            ValueError: a ring has overwritten what the next token may see.
        """
        lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        if self.sliding_window is not None and self.oldest is not None:
            first_seen_B = (lengths + 1 - self.sliding_window).clamp(min=0)
            if bool((first_seen_B < self.oldest).any()):
                raise ValueError(
                    f"lengths = {lengths.tolist()}: what they may see has been overwritten; of tokens seen since, at "
                    f"most spare + 1 = {self.slots - self.sliding_window + 1} can be forgotten"
                )
        self.lengths, self._even = lengths, False

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows in place of those so far, as a beam search does: row i becomes what ``rows[i]`` was.

        Args:
            rows: int (B',); a row may be taken several times, or not at all.

        Raises:
            IndexError: rows that don't exist.
        """
        for name in ("k", "v", "lengths", "valid", "doc_ids", "oldest"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.index_select(0, rows))

    def mask(
        self,
        length: int,
        *,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Tensor | None:
        """Who the next ``length`` tokens may see of what `update` will return, as `build_mask`; None: plain causal.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        if self.sliding_window is not None and not 0 < (sliding_window or 0) <= self.sliding_window:
            raise ValueError(f"sliding_window = {sliding_window}: must be at most the cache's, {self.sliding_window}")
        _, (doc_ids_BM, valid_BM) = self._noted(length, doc_ids, key_padding_mask)
        keys = self._filled(length) if self._fits(length) else self._filled(0) + length
        windowed = sliding_window is not None and sliding_window < keys
        aligned = self._even and (self._most == 0 or length == 1)
        if aligned and doc_ids_BM is None and valid_BM is None and not windowed:
            return None
        key_positions, held = self._key_positions(length)
        if held is not None:
            valid_BM = held if valid_BM is None else valid_BM & held
        return build_mask(
            self.positions(length),
            key_positions,
            query_doc_ids=doc_ids,
            key_doc_ids=doc_ids_BM,
            key_valid=valid_BM,
            sliding_window=sliding_window if windowed else None,
        )

    def _key_positions(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Positions of what `update` will return: (M,), or of a ring (B, M), and bool (B, M) which of them it holds."""
        if self.oldest is None:
            return torch.arange(self._filled(length), device=self.k.device), None
        fits = self._fits(length)
        slots_M = torch.arange(self._filled(length if fits else 0), device=self.k.device)
        last_B1 = (self.lengths + (length if fits else 0)).long()[:, None] - 1
        positions_BM = last_B1 - (last_B1 - slots_M) % self.slots
        held_BM = positions_BM >= self.oldest[:, None]
        if fits:
            return positions_BM, held_BM
        new_BS = self.positions(length).expand(len(self.k), length)
        return torch.cat([positions_BM, new_BS], dim=1), torch.cat([held_BM, torch.ones_like(new_BS).bool()], dim=1)

    def _filled(self, length: int) -> int:
        """Slots that may hold something after ``length`` more tokens."""
        return self.slots if self.static else min(self._most + length, self.slots)

    def _fits(self, length: int) -> bool:
        """Whether so many tokens overwrite nothing that one of them may see."""
        return self.sliding_window is None or length <= self.slots - self.sliding_window + 1

    def _noted(
        self, length: int, doc_ids: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """`doc_ids` and `valid` with the next tokens' entries, in new tensors; and of what these tokens may see."""
        shape = (len(self.k), self.slots)
        device = self.k.device
        if self.doc_ids is not None and doc_ids is None:
            raise ValueError("doc_ids = None: the cache holds tokens of documents, so new tokens need theirs")
        documents = valid = seen_documents = seen_valid = None
        if doc_ids is not None:
            first = torch.zeros(shape, dtype=doc_ids.dtype, device=device)
            documents = first if self.doc_ids is None else self.doc_ids.clone()
            seen_documents = self._append(documents, doc_ids)
        if self.valid is not None or key_padding_mask is not None:
            valid = torch.ones(shape, dtype=torch.bool, device=device) if self.valid is None else self.valid.clone()
            real = torch.ones((shape[0], length), dtype=torch.bool, device=device)
            seen_valid = self._append(valid, real if key_padding_mask is None else key_padding_mask)
        return (documents, valid), (seen_documents, seen_valid)

    def _append(self, slots: Tensor, new: Tensor) -> Tensor:
        """Put ``new`` (B, S) or (B, K, S, h) into the next slots; gives what the new tokens may see."""
        axis = 1 if slots.ndim == 2 else 2
        length = new.shape[axis]
        if self._fits(length):
            self._write(slots, new, axis)
            return slots.narrow(axis, 0, self._filled(length))
        seen = torch.cat([slots.narrow(axis, 0, self._filled(0)), new.to(slots.dtype)], dim=axis)
        self._write(slots, new, axis)
        return seen

    def _write(self, slots: Tensor, new: Tensor, axis: int) -> None:
        length = new.shape[axis]
        if self._even and self._most + length <= self.slots:
            slots.narrow(axis, self._most, length).copy_(new)
            return
        places = self.positions(length)
        if self.sliding_window is not None:  # of more tokens than slots the last remain
            kept = min(length, self.slots)
            places, new = places[..., length - kept :] % self.slots, new.narrow(axis, length - kept, kept)
        rows_B1 = torch.arange(slots.shape[0], device=slots.device)[:, None]
        slots.transpose(1, axis)[rows_B1, places] = new.transpose(1, axis).to(slots.dtype)


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(h)) v over the keys that the masks allow.

    Attributes:
        capture_attention_weights: if True, each call also computes its probabilities.
        last_attention_weights: (B, H, S, M), of the last such call, on the host.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int | None = None,
        qk_norm: bool = False,
        sdpa_backend: str = "auto",
        *,
        bias: bool = False,
        sliding_window: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        head_dim = resolve_head_dim(dim, n_heads, n_kv_heads, head_dim)
        if sdpa_backend != "auto" and sdpa_backend not in SDPA_BACKENDS:
            raise ValueError(f"sdpa_backend = {sdpa_backend!r}: must be one of auto, {', '.join(SDPA_BACKENDS)}")
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.sdpa_backend = sdpa_backend
        self.sliding_window = sliding_window
        self.q_proj = Linear(dim, n_heads * head_dim, bias=bias)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(n_heads * head_dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.capture_attention_weights = False
        self.last_attention_weights: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *,
        kv_cache: KVCache | None = None,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            rope_cos, rope_sin: of the new tokens' positions, (S, h/2) or (B, 1, S, h/2).
            kv_cache: the tokens before; the new ones are appended.
            mask: from `self_attention_mask`, where a caller has built it; else it is built here.
            doc_ids: int (B, S); a token sees its own document.
            key_padding_mask: bool (B, S), True where a token is real; the others are not seen.

        A query that may see no key contributes 0 before the output projection.
        """
        length = x.shape[1]
        if mask is None:
            mask = self_attention_mask(
                length,
                kv_cache=kv_cache,
                doc_ids=doc_ids,
                key_padding_mask=key_padding_mask,
                sliding_window=self.sliding_window,
                device=x.device,
            )
        q_BSHh = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k_BSKh = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v_BSKh = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHh, k_BSKh = self.q_norm(q_BSHh), self.k_norm(k_BSKh)
        q_BHSh = apply_rope(q_BSHh.transpose(1, 2), rope_cos, rope_sin)
        k_BKMh = apply_rope(k_BSKh.transpose(1, 2), rope_cos, rope_sin)
        v_BKMh = v_BSKh.transpose(1, 2)
        if kv_cache is not None:
            k_BKMh, v_BKMh = kv_cache.update(k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask)
            k_BKMh, v_BKMh = k_BKMh.to(x.dtype), v_BKMh.to(x.dtype)
        if self.capture_attention_weights:
            self.last_attention_weights = attention_weights(q_BHSh, k_BKMh, mask).detach().cpu()
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask, sdpa_backend=self.sdpa_backend)
        return self.o_proj(out_BHSh.transpose(1, 2).flatten(2))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True, sdpa_backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(h)) v.

    Args:
        q: (B, H, S, h).
        k, v: (B, K, M, h).
        mask: bool, broadcasts to (B, H, S, M), True = attend; None is plain causal, aligned to the end.
        causal: False: without a mask, every query sees every key.
        sdpa_backend: kernel that is tried first; the math path takes what that kernel can't do.

    Returns:
        (B, H, S, h); 0, with gradient 0, in rows that may attend to nothing.
    """
    length, keys = q.shape[2], k.shape[2]
    if mask is None and causal and 1 < length != keys:
        mask = _causal(length, keys, q.device)
    has_key = None
    if mask is not None:
        has_key = mask.any(dim=-1, keepdim=True)
        mask = mask | ~has_key
    if q.device.type == "cpu" and keys < CPU_KERNEL_KEYS:
        sdpa_backend = "math"
    with _sdpa(sdpa_backend):
        out_BHSh = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and causal and length > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out_BHSh if has_key is None else out_BHSh.masked_fill(~has_key, 0)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The probabilities of `attend`: (B, H, S, M) in at least float32, 0 in rows that may attend to nothing."""
    (batch, heads, length, channels), keys = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = _causal(length, keys, q.device) if mask is None else mask
    q_BKGSh = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores_BHSM = torch.einsum("bkgsh,bkmh->bkgsm", q_BKGSh, k.to(dtype)).reshape(batch, heads, length, keys)
    has_key = mask.any(dim=-1, keepdim=True)
    scores_BHSM = (scores_BHSM / math.sqrt(channels)).masked_fill(~(mask | ~has_key), -torch.inf)
    return scores_BHSM.softmax(dim=-1).masked_fill(~has_key, 0)


def build_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    query_doc_ids: Tensor | None = None,
    key_doc_ids: Tensor | None = None,
    key_valid: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Who may see whom: a query at p sees a key at k if k <= p, p - window < k, both are of one document, and the key
    is real.

    Args:
        query_positions: int (S,) or (B, S).
        key_positions: int (M,) or (B, M).
        query_doc_ids, key_doc_ids: int (B, S) and (B, M).
        key_valid: bool (B, M).

    Returns:
        bool (B, 1, S, M), or (1, 1, S, M) if nothing depends on the row; True = attend.
    """
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    mask = key <= query
    if sliding_window is not None:
        mask = mask & (key > query - sliding_window)
    if query_doc_ids is not None and key_doc_ids is not None:
        mask = mask & (query_doc_ids[:, :, None] == key_doc_ids[:, None, :])
    if key_valid is not None:
        mask = mask & key_valid[:, None, :]
    return mask[:, None] if mask.ndim == 3 else mask[None, None]


def self_attention_mask(
    length: int,
    *,
    kv_cache: KVCache | None = None,
    doc_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sliding_window: int | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """The mask of ``length`` new tokens, before they are appended to the cache; None if plain causal.

    Args:
        doc_ids, key_padding_mask: (B, S), of the new tokens; those of the cached ones come from the cache.
    """
    _check_new(length, doc_ids, key_padding_mask)
    if kv_cache is not None:
        return kv_cache.mask(length, doc_ids=doc_ids, key_padding_mask=key_padding_mask, sliding_window=sliding_window)
    windowed = sliding_window is not None and sliding_window < length
    if doc_ids is None and key_padding_mask is None and not windowed:
        return None
    positions_S = torch.arange(length, device=device)
    return build_mask(
        positions_S,
        positions_S,
        query_doc_ids=doc_ids,
        key_doc_ids=doc_ids,
        key_valid=key_padding_mask,
        sliding_window=sliding_window if windowed else None,
    )


def resolve_head_dim(dim: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> int:
    """``head_dim``, or dim // n_heads.

    Raises:
        ValueError: for numbers of heads that don't divide.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads != 0:
        raise ValueError(f"n_kv_heads = {n_kv_heads}: must divide n_heads = {n_heads}")
    if head_dim is None and dim % n_heads != 0:
        raise ValueError(f"n_heads = {n_heads}: must divide dim = {dim}, or head_dim must be given")
    return dim // n_heads if head_dim is None else head_dim


def _causal(length: int, keys: int, device: torch.device) -> Tensor:
    """Plain causal, the queries being the last of the keys."""
    return build_mask(torch.arange(keys - length, keys, device=device), torch.arange(keys, device=device))


def _check_new(length: int, doc_ids: Tensor | None, key_padding_mask: Tensor | None) -> None:
    for name, given in (("doc_ids", doc_ids), ("key_padding_mask", key_padding_mask)):
        if given is not None and (given.ndim != 2 or given.shape[1] != length):
            raise ValueError(f"{name}.shape = {tuple(given.shape)}: must be (batch, {length}), one for each new token")
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask.dtype = {key_padding_mask.dtype}: must be torch.bool, True = real")


def _sdpa(backend: str) -> contextlib.AbstractContextManager[object]:
    if backend == "auto":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPA_BACKENDS[backend], set_priority=True)
