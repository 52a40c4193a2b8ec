"""Floating point operations that a training step needs, of a model with images part by part, from the config alone.

A matrix product is needed once forward, once backward for its weight where that is trained, and once for its input
where something before it is. The parts are walked through in the order of execution, with what is trained so far.

Shapes: B rows, F pictures of a row, n tokens of a picture, N = F * n image tokens, T text positions, S positions of the
stream.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from shared_config.contract.capacity import choice_capacity, choice_share
from shared_config.contract.counts import flops_per_token, is_routed_expert, mean_visible_keys
from shared_config.contract.freeze import effective_freeze, frozen_names
from shared_config.contract.parameters import EMBEDDING, HEAD, parameter_table
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import TowerConfig, adapter_table, encoder_table, vit_tower
from shared_config.registry import declaration
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig

Rows = Callable[[str], Fraction | int]
READ_LAST = ("o_proj", "down_proj", "down_w")
"""Matrices that read what the others of their part have made."""
NOT_MULTIPLIED = ("position_embedding.weight", EMBEDDING)
"""Matrices of which rows are looked up."""


@dataclass(frozen=True)
class Needed:
    """Operations of a part; a multiply-add is two.

    Attributes:
        forward: of the forward pass.
        training: of the forward and the backward pass, nothing twice, masked keys not counted.
        reaches: whether what it puts out depends on anything that is trained.
    """

    forward: int = 0
    training: int = 0
    reaches: bool = False

    def then(self, *parts: Needed) -> Needed:
        """This and what follows."""
        every = (self, *parts)
        return Needed(
            sum(part.forward for part in every), sum(part.training for part in every), any(p.reaches for p in every)
        )


@dataclass(frozen=True)
class ImageFlops:
    """Of a micro-batch, by part."""

    tower: Needed
    adapter: Needed
    model: Needed

    @property
    def forward(self) -> int:
        """All of it in the forward pass."""
        return self.tower.forward + self.adapter.forward + self.model.forward

    @property
    def training(self) -> int:
        """All of it, forward and backward."""
        return self.tower.training + self.adapter.training + self.model.training


def step_flops(
    job: JobConfig,
    tokens: int,
    tower: TowerConfig | None = None,
    *,
    frames: int | None = None,
    step: int = 0,
    prompts: Sequence[int] = (0,),
) -> float | None:
    """Of a training step with so many positions of text, of all ranks: forward and backward, nothing twice, masked keys
    not counted (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Args:
        tower, frames, step, prompts: as for `micro_batch_flops`.

    Returns:
        None where they are not known.
    """
    if job.vlm is None:
        return float(flops_per_token(job.model, job.train.seq_len).training * tokens)
    found = micro_batch_flops(job, tower, frames=frames, step=step, prompts=prompts)
    return None if found is None else found.training * tokens / (job.train.batch_size * job.train.seq_len)


def micro_batch_flops(
    job: JobConfig,
    tower: TowerConfig | None = None,
    *,
    frames: int | None = None,
    step: int = 0,
    prompts: Sequence[int] = (0,),
) -> ImageFlops | None:
    """Of a micro-batch of a job with images.

    Args:
        tower: of an encoder whose config does not describe it.
        frames: F; None: as many as a row, or a clip, has at most.
        step: of the optimiser, whose stage of ``freeze_schedule`` says what is trained.
        prompts: tokens of the prompts of rows, of which the micro-batch has some, where image and prompt see each
            other in both directions.

    Returns:
        None where a part has matrices that no formula here knows: low-rank adapters, and encoders, adapters,
        architectures and models that were registered by others.
    """
    encoder, vlm = job.vision_encoder, job.vlm
    whole = declaration("model", job.model.model_type).parameters
    if vlm is None or encoder is None or job.lora is not None or whole is not None:
        return None
    tower = vit_tower(encoder) if encoder.type == "vit" else tower
    if tower is None and encoder.type != "random":
        return None
    config = job.adapter or AdapterConfig()
    frames = job.frames_per_row if frames is None else frames
    tokens = encoder.known_num_tokens if tower is None else tower.num_tokens
    width = encoder.feature_dim if tower is None else tower.dim
    tables = {
        "vision_encoder": encoder_table(tower or encoder),
        "adapter": adapter_table(config, width, job.model.dim),
        "transformer": parameter_table(job.model, vlm),
    }
    names = [f"{part}.{name}" for part, table in tables.items() for name, spec in table.items() if not spec.is_buffer]
    specs = effective_freeze(step, vlm.freeze, vlm.freeze_schedule)
    frozen = frozen_names(names, specs, vlm.module_patterns)
    own = {
        part: [(name, _Tensor(f"{part}.{name}" not in frozen, spec)) for name, spec in table.items()]
        for part, table in tables.items()
    }
    pictures = job.train.batch_size * frames
    seen = Needed() if tower is None else _tower(tower, own["vision_encoder"], pictures)
    joined = _adapter(config, own["adapter"], pictures, tokens, width, seen.reaches)
    image_tokens = frames * config.output_num_tokens(tokens) if tokens else 0
    language = _Language(job, image_tokens, Counter(prompts) if vlm.has_prefix else Counter())
    model = None if joined is None else language.needed(own["transformer"], joined.reaches)
    return None if joined is None or model is None else ImageFlops(seen, joined, model)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a table, and whether it is trained."""

    is_trained: bool
    spec: ParameterSpec


Tensors = Sequence[tuple[str, _Tensor]]


def _tower(tower: TowerConfig, tensors: Tensors, pictures: int) -> Needed:
    layers = [entry for entry in tensors if entry[0].startswith("layers.")]
    embedding = [entry for entry in tensors if not entry[0].startswith(("layers.", "norm."))]
    found = _products(embedding, lambda _: pictures * tower.num_patches, False)
    positions = tower.num_patches + tower.class_token
    for _, layer in _by_number(layers):
        found = _layer(layer, lambda _: pictures * positions, found, 4 * tower.dim * pictures * positions**2)
    return found.then(Needed(reaches=_trains(entry for entry in tensors if entry[0].startswith("norm."))))


def _adapter(
    config: AdapterConfig, tensors: Tensors, pictures: int, tokens: int, width: int, reaches: bool
) -> Needed | None:
    """Of the adapters that this package has."""
    given, made = pictures * tokens, pictures * (config.output_num_tokens(tokens) if tokens else 0)
    found = Needed(reaches=reaches)
    if config.type == "attentional_pool":  # each cell is read by the one query of its window
        found = _layer(
            [(f"pool.{name}", tensor) for name, tensor in tensors if not name.startswith("out_proj")],
            lambda name: given if "k_proj" in name or "v_proj" in name else made,
            found,
            4 * width * given,
        )
        tensors = [entry for entry in tensors if entry[0].startswith("out_proj")]
    elif config.type not in ("mlp_2layer", "linear", "avgpool"):
        return None
    for _, module in itertools.groupby(tensors, key=lambda entry: entry[0].partition(".")[0]):
        found = found.then(_products(list(module), lambda _: made, found.reaches))
    return found


@dataclass(frozen=True)
class _Language:
    """The language model of a job, which sees so many image tokens.

    Attributes:
        prompts: how many rows have a prompt of how many tokens, which sees the image and is seen by it.
    """

    job: JobConfig
    image_tokens: int
    prompts: Counter[int]

    def needed(self, tensors: Tensors, image: bool) -> Needed | None:
        """Of its tensors in model order; None where one of them is of no kind that is known.

        Args:
            image: whether what the image tokens come from is trained.
        """
        config, vlm = self.job.model, self.job.vlm
        assert vlm is not None
        kinds: dict[str, list[tuple[str, _Tensor]]] = {}
        for name, tensor in tensors:
            kinds.setdefault(name.partition(".")[0], []).append((name, tensor))
        known = {"token_embedding", "layers", "cross_attention_layers", "norm", "mot_norms", "output_head"}
        if any(_is_matrix(*entry) for kind, own in kinds.items() if kind not in known for entry in own):
            return None
        text = self.job.train.batch_size * self.job.train.seq_len
        found = Needed(reaches=_trains(kinds["token_embedding"]) or (image and vlm.image_tokens_in_stream))
        crossing = dict(_by_number(kinds.get("cross_attention_layers", [])))
        every = vlm.layer_period(config)
        for number, layer in _by_number(kinds["layers"]):
            found = _layer(layer, self._rows, found, self._within(config.layer_windows[number]))
            block = crossing.get((number + 1) // every - 1) if (number + 1) % every == 0 else None
            if block is not None:
                found = _layer(block, self._rows_across, found, self._across(block), image)
        found = found.then(Needed(reaches=any(_trains(kinds.get(kind, [])) for kind in ("norm", "mot_norms"))))
        head = dict(tensors).get(HEAD) or dict(tensors)[EMBEDDING]
        return found.then(_product(text, head, found.reaches))

    @property
    def _stream(self) -> int:
        """S."""
        assert self.job.vlm is not None
        return self.job.vlm.residual_stream_image_tokens(self.image_tokens) + self.job.train.seq_len

    def _within(self, window: int | None) -> int:
        """Forward operations of a layer's attention over the stream."""
        config, rows = self.job.model, self.job.train.batch_size
        pairs = rows * round(self._stream * mean_visible_keys(self._stream, window))
        more = sum(count * self._ahead(self.image_tokens + prompt, window) for prompt, count in self.prompts.items())
        pairs += round(rows * more / max(1, self.prompts.total()))
        return 4 * config.n_heads * config.head_size * pairs

    def _ahead(self, prefix: int, window: int | None) -> float:
        """Pairs of positions that see each other but for causality and a window."""
        return prefix * (prefix - mean_visible_keys(prefix, window)) if prefix else 0

    def _across(self, block: Tensors) -> int:
        """Forward operations of the attention of text to image tokens."""
        heads = next(tensor.spec.shape[0] for name, tensor in block if name.endswith("q_proj.weight"))
        return 4 * heads * self.job.train.batch_size * self.job.train.seq_len * self.image_tokens

    def _rows(self, name: str) -> Fraction | int:
        """Rows that a matrix of a layer multiplies; of one of many experts, on average."""
        vlm, config, rows = self.job.vlm, self.job.model, self.job.train.batch_size
        assert vlm is not None
        positions = {"image": self.image_tokens, "text": self.job.train.seq_len}
        modality = next((one for one in vlm.modalities if f".{one}." in name), None)
        own = rows * (self._stream if modality is None else positions[modality])
        if not is_routed_expert(name):
            return own
        choosing = None if modality is None else vlm.choosing_experts(modality)
        if choosing is not None:
            return choice_capacity(own, choice_share(*choosing))
        return Fraction(own * config.moe_top_k, config.num_experts)

    def _rows_across(self, name: str) -> int:
        """Rows that a matrix of a block of cross-attention multiplies."""
        reads_image = ".k_proj." in name or ".v_proj." in name
        return self.job.train.batch_size * (self.image_tokens if reads_image else self.job.train.seq_len)


def _layer(tensors: Tensors, rows: Rows, before: Needed, attention: int, image: bool | None = None) -> Needed:
    """What comes before and a block of norms, attention and a feed-forward network, in the order of their tensors.

    Args:
        tensors: ``<part>.<name>``; that with a q_proj is attention.
        attention: forward operations of scores and of their product with the values.
        image: whether what keys and values are made of depends on what is trained; None: they are made of the stream.
    """
    found = before
    for _, part in itertools.groupby(tensors, key=lambda entry: entry[0].partition(".")[0]):
        own = list(part)
        first = [entry for entry in own if not _reads_last(entry[0])]
        last = [entry for entry in own if _reads_last(entry[0])]
        if not any("q_proj." in name for name, _ in own):
            found = found.then(_products(first, rows, found.reaches))
            found = found.then(_products(last, rows, found.reaches))
            continue
        others = found.reaches if image is None else image
        kinds = {kind: [entry for entry in first if f".{kind}_" in f".{entry[0]}"] for kind in "qkv"}
        made = {kind: _products(kinds[kind], rows, found.reaches if kind == "q" else others) for kind in "qkv"}
        q, k, v = (made[kind].reaches for kind in "qkv")
        half = attention // 2
        core = Needed(attention, attention + half * (q + k + (q or k) + v), q or k or v)
        found = found.then(*made.values(), core)
        found = found.then(_products(last, rows, core.reaches))
    return found


def _products(tensors: Tensors, rows: Rows, reaches: bool) -> Needed:
    """Of matrices that all read the same."""
    own = [_product(rows(name), tensor, reaches) for name, tensor in tensors if _is_matrix(name, tensor)]
    return Needed(reaches=reaches or _trains(tensors)).then(*own)


def _product(rows: Fraction | int, tensor: _Tensor, reaches: bool) -> Needed:
    forward = int(2 * rows * tensor.spec.size)
    return Needed(forward, forward * (1 + tensor.is_trained + reaches), reaches or tensor.is_trained)


def _is_matrix(name: str, tensor: _Tensor) -> bool:
    return len(tensor.spec.shape) > 1 and not tensor.spec.is_buffer and name not in NOT_MULTIPLIED


def _reads_last(name: str) -> bool:
    return any(part in READ_LAST for part in name.split("."))


def _trains(tensors: Iterable[tuple[str, _Tensor]]) -> bool:
    return any(tensor.is_trained for _, tensor in tensors)


def _by_number(tensors: Tensors) -> Iterator[tuple[int, list[tuple[str, _Tensor]]]]:
    """Tensors ``<kind>.<number>.<rest>`` by number, with the rest of their names."""
    found: dict[int, list[tuple[str, _Tensor]]] = {}
    for name, tensor in tensors:
        _, number, rest = name.split(".", 2)
        found.setdefault(int(number), []).append((rest, tensor))
    yield from sorted(found.items())
