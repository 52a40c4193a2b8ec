"""Which positions of the residual stream belong to which modality, and streams of modalities as one.

Shapes: B batch, S positions of the residual stream, _S positions of a modality, each its own number, D model
dim, h head_dim, A = h/2 angles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from kempnerforge_torch.model.checks import check_ids, check_shape, nan_outside
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext

Span = tuple[str, int, int]
Streams = Mapping[str, Float[Tensor, "B _S D"]] | Float[Tensor, "B S D"]
"""(B, _S, D) of each modality, or one stream (B, S, D) with a `Layout`."""
Rope = tuple[Float[Tensor, "... _S A"], Float[Tensor, "... _S A"]]
"""Rows of the rotary tables: cos and sin, of a modality (S, h/2), of a whole stream also (B, 1, S, h/2)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which positions of the residual stream belong to which modality: spans known beforehand, or ids by position.

    Attributes:
        modalities: names, by index.
        spans: (modality, start, stop) in the order of the sequence; empty ones count, so that every weight has a
            gradient. None where ids are given instead.
        ids: int (B, S), index into the modalities.
    """

    modalities: tuple[str, ...]
    spans: tuple[Span, ...] | None = None
    ids: Integer[Tensor, "B S"] | None = None

    def apply(
        self,
        function: Callable[[str, Shaped[Tensor, "B _S ..."]], Shaped[Tensor, "B _S ..."]],
        x: Shaped[Tensor, "B S ..."],
    ) -> Shaped[Tensor, "B S ..."]:
        """``function(modality, x)``, each position by its own modality: (B, S, ...) -> (B, S, ...).

        Spans cost what one modality costs; ids cost every modality at every position.
        """
        if self.spans is not None:
            spans = [span for span in self.spans if span[1] < span[2] or torch.is_grad_enabled()]
            return torch.cat([function(name, x[:, start:stop]) for name, start, stop in spans], dim=1)
        first, *others = self.modalities
        out = function(first, x)
        for name in others:
            other_out = function(name, x)
            out = torch.where(self.of(name).reshape(*x.shape[:2], *[1] * (other_out.ndim - 2)), other_out, out)
        return self.known(out)

    def known(self, x: Float[Tensor, "B S ..."]) -> Float[Tensor, "B S ..."]:
        """``x`` (B, S, ...), NaN where the id names no modality."""
        return x if self.ids is None else nan_outside(x, self.ids, len(self.modalities))

    def of(self, modality: str) -> Bool[Tensor, "B S"]:
        """bool (B, S): the positions of one modality; of ids alone."""
        assert self.ids is not None
        return self.ids == self.modalities.index(modality)

    def split(self, x: Shaped[Tensor, "B S ..."]) -> dict[str, Shaped[Tensor, "B _S ..."]]:
        """The part of each modality of ``x`` (B, S, ...); of spans alone."""
        assert self.spans is not None
        return {name: x[:, start:stop] for name, start, stop in self.spans}

    @property
    def image_tokens(self) -> int:
        """How many of the first positions are known to be an image's."""
        return max([0, *(stop for name, start, stop in self.spans or () if name == "image" and start == 0)])

    def positions(self, x: Shaped[Tensor, "B S ..."]) -> Int[Tensor, "... S"]:
        """How many earlier positions have the same modality: (S,), or (B, S) where rows differ."""
        if self.spans is not None:
            return torch.cat([torch.arange(stop - start, device=x.device) for _, start, stop in self.spans])
        counts = [(self.of(name).cumsum(dim=1) - 1, self.of(name)) for name in self.modalities]
        return sum((torch.where(members, count, 0) for count, members in counts), torch.zeros_like(counts[0][0]))


def layout_of(
    modalities: Sequence[str], modality_ids: Integer[Tensor, "B S"] | None, x: Float[Tensor, "B S D"]
) -> Layout:
    """The layout of ``x`` (B, S, D) by ``modality_ids``, int (B, S).

    Raises:
        ValueError: as `stream_layout`; no ids.
    """
    if modality_ids is None:
        raise ValueError("modality_ids = None: must be given, an integer for each position")
    check_shape("modality_ids", modality_ids, x.shape[:2])
    check_ids("modality_ids", modality_ids, len(modalities))
    return Layout(tuple(modalities), ids=modality_ids)


def stream_layout(modalities: Sequence[str], modality: ModalityContext, x: Float[Tensor, "B S D"]) -> Layout:
    """The layout of ``x`` (B, S, D): by ``modality_ids`` if given, else a prefix of the image and then text.

    Raises:
        ValueError: ids of another shape, not integers, or outside the modalities. Where values can't be seen, such a
            position becomes NaN.
    """
    names, length = tuple(modalities), x.shape[1]
    if modality.modality_ids is not None:
        return layout_of(modalities, modality.modality_ids, x)
    prefix = 0 if modality.prefix_embeds is None else modality.prefix_embeds.shape[1]
    return Layout(names, spans=(("image", 0, prefix), ("text", prefix, length)))


def one_stream(
    modalities: Sequence[str], streams: Streams, rope: Mapping[str, Rope] | Rope, layout: Layout | None
) -> tuple[Float[Tensor, "B S D"], Rope, Layout]:
    """Streams of modalities as one, in the order of ``modalities``, with its rotary tables and its layout; what comes
    with a layout already is one stream.

    Raises:
        ValueError: modalities that don't exist or have no rotary tables; one stream without a layout.
    """
    if layout is not None:
        assert not isinstance(streams, Mapping)
        assert not isinstance(rope, Mapping)
        return streams, rope, layout
    if not isinstance(streams, Mapping) or not isinstance(rope, Mapping):
        raise ValueError("streams and rope: must be given by modality, or be of one stream with its layout")
    names = [name for name in modalities if name in streams and name in rope]
    if not names or set(names) != set(streams):
        raise ValueError(f"streams = {sorted(streams)}: must be of {', '.join(modalities)}, with rope for each")
    ends = list(itertools.accumulate(streams[name].shape[1] for name in names))
    spans = tuple(zip(names, [0, *ends], ends, strict=False))
    cos, sin = (torch.cat([rope[name][part] for name in names], dim=-2) for part in (0, 1))
    return torch.cat([streams[name] for name in names], dim=1), (cos, sin), Layout(tuple(modalities), spans=spans)


def positions_after(
    kv_cache: KVCache, modality: ModalityContext, positions: Int[Tensor, "... S"]
) -> Int[Tensor, "... S"]:
    """An image comes first, into empty caches; text continues where the cached text ended."""
    if modality.modality_ids is not None:
        raise ValueError("modality_ids is given: with kv_caches the image must come as prefix_embeds")
    if modality.prefix_embeds is not None:
        return positions
    return kv_cache.positions(len(positions)) - kv_cache.image_tokens
