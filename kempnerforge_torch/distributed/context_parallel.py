"""Context parallelism: each rank along "cp" has a part of every sequence of a micro-batch. Its queries read the keys
and values of all parts; what is counted over a sequence or over a micro-batch is counted over all parts.

    sequence on 2 ranks    rank 0 has positions 0 1 2 3    queries 0 1 2 3 read keys 0 ... 7, as far as the mask allows
                           rank 1 has positions 4 5 6 7    queries 4 5 6 7 read keys 0 ... 7

Parts are blocks, in the order of the ranks.

Shapes: B batch, S positions of a part, T = B * S tokens, M positions of all, V vocabulary, E experts, k assignments of
each token, K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor, nn

from kempnerforge_torch.distributed.collectives import gathered, gathered_alike, summed_over
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.router import TopKRouter
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.wrappers import plain_modules
from shared_config.errors import ConfigError

CrossEntropy = Callable[..., tuple[Float[Tensor, ""], Int[Tensor, ""]]]


class OtherParts(KVCache):
    """In the place of a cache: what a forward reads besides its own keys and values are those of the other ranks."""

    def __init__(self, group: dist.ProcessGroup, max_seq_len: int, device: torch.device):
        self.group = group
        self.device = device
        self._max_seq_len = max_seq_len

    @property
    def max_seq_len(self) -> int:
        return self._max_seq_len

    def positions(self, length: int) -> Int[Tensor, "S"]:
        """Of this rank's part."""
        return torch.arange(length, device=self.device) + self.group.rank() * length

    def keys(self, length: int) -> int:
        return length * self.group.size()

    def reserve(self, length: int) -> None:
        if self.keys(length) > self.max_seq_len:
            raise ValueError(f"sequence length = {self.keys(length)}: must be at most max_seq_len = {self.max_seq_len}")

    def update(
        self,
        k_new: Float[Tensor, "B K S h"],
        v_new: Float[Tensor, "B K S h"],
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B K M h"], Float[Tensor, "B K M h"]]:
        """Those of all ranks."""
        k, v = gathered(torch.stack([k_new, v_new]), 3, self.group).unbind()
        return k, v

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
    ) -> Mask:
        """Who this rank's part may see of all."""
        return Mask(
            causal=True,
            window=sliding_window,
            query_positions=self.positions(length),
            query_doc_ids=doc_ids,
            key_doc_ids=None if doc_ids is None else gathered_alike(doc_ids, 1, self.group),
            key_valid=None if key_padding_mask is None else gathered_alike(key_padding_mask, 1, self.group),
            prefix_lengths=prefix_lengths,
        )


def spread_sequences(model: nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Let a model, which is called with this rank's part of every sequence, do what it does with the whole.

    Raises:
        ConfigError: a model, or a router, of another kind.
    """
    group = mesh.group("cp")
    if not isinstance(model, Transformer):
        raise ConfigError([f"distributed.cp = {group.size()}: must be 1 for a model of type {type(model).__name__}"])
    for path, module in plain_modules(model).items():
        if isinstance(module, TopKRouter):
            _measure_all_parts(module, group)
        elif path.endswith(".router"):
            raise ConfigError([f"distributed.cp = {group.size()}: must be 1 with {path}, a {type(module).__name__}"])
    forward, caches = model.forward, [OtherParts(group, model.config.max_seq_len, device)] * len(model.layers)
    changed: Any = model
    changed.forward = lambda *args, **kwargs: forward(*args, kv_caches=caches, **kwargs)


def own_part(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Of arrays (B, M) the part (B, S) of this rank.

    Raises:
        ValueError: sequences that can't be cut into equal parts.
    """
    if mesh is None or mesh.layout.cp == 1:
        return dict(batch)
    parts = {name: np.split(array, mesh.layout.cp, axis=1) for name, array in batch.items()}
    return {name: each[mesh.axes["cp"].get_local_rank()] for name, each in parts.items()}


def of_all_parts(cross_entropy: CrossEntropy, group: dist.ProcessGroup) -> CrossEntropy:
    """``cross_entropy``, whose sum and number of labels are those of all parts; the same on every rank."""

    def summed(logits: Tensor | FactoredLogits, labels_BS: Tensor, **options: float) -> tuple[Tensor, Tensor]:
        total, count = cross_entropy(logits, labels_BS, **options)
        return summed_over(total, group), summed_over(count, group)

    return summed


def _measure_all_parts(router: TopKRouter, group: dist.ProcessGroup) -> None:
    """Let a router's losses and counts be of all parts: a loss that all ranks have alike."""
    measure = router._measure

    def measured(
        logits_TE: Tensor, scores_TE: Tensor, indices_Tk: Tensor, valid_T: Tensor | None, batch_size: int
    ) -> Any:
        def whole(tokens: Shaped[Tensor, "T ..."]) -> Shaped[Tensor, "_ ..."]:
            return gathered_alike(torch.unflatten(tokens, 0, (batch_size, -1)), 1, group).flatten(0, 1)

        valid = None if valid_T is None else whole(valid_T)
        return measure(whole(logits_TE), whole(scores_TE), whole(indices_Tk), valid, batch_size)

    changed: Any = router
    changed._measure = measured
