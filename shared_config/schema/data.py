"""Training data, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import (
    NESTED,
    Count,
    Items,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    section,
)

TokenDtype = Literal["uint16", "uint32"]


@section
class SourceConfig(Section):
    """One of several sources: ``path``, ``text_field`` and ``token_dtype`` mean what they mean in [data].

    weight: what part of the rows it gives, beside the others; None: its number of tokens.
    """

    path: str
    weight: NonNegativeFloat | None = None
    text_field: str = "text"
    token_dtype: TokenDtype | None = None


@section
class PhaseConfig(Section):
    """Other weights of the sources, in their order, from the step after ``from_step`` updates on."""

    from_step: PositiveInt
    weights: Items[NonNegativeFloat]


@section
class DataConfig(Section):
    """What the model reads.

    path: "" is the embedded default: for text, the Python standard library's sources as bytes; for vision-language
    models, captioned shapes drawn by code. Otherwise a folder or file of text, of JSON Lines (.jsonl), of token ids
    (.npy, .bin) or as ``kempnerforge prepare`` writes them, or an image-text folder, looked for beside the config file
    too.
    tokenizer: "bytes", or a local Hugging Face tokenizer folder, looked for beside the config file too.
    eos_id: the id that ends a document, in place of the tokenizer's own; token files made with another tokenizer
    need it where documents are to be told apart.
    token_dtype: of .bin files; None is uint16, or what the index of a prepared folder says.
    text_field: of JSON Lines: the field that holds the document.
    follow_symlinks: whether links in a data folder may lead out of it; they are refused otherwise.
    sources: in place of ``path``: several of them, whose rows are mixed. Source i gives weight_i^(1/temperature) of the
    rows, over the sum of these (arXiv:2010.11934, section 3.1, has 1/temperature of 0.3 for languages).
    phases: weights from some steps on, as for annealing on the best sources.
    pack_documents: positions see only their own document (a ``doc_ids`` mask), and no loss crosses a boundary.
    max_images: the most images of a row of an image-text folder, where the model takes several; a row with more is
    refused, and one with fewer costs as much as one with so many.
    """

    path: str = ""
    tokenizer: str = "bytes"
    eos_id: Count | None = None
    token_dtype: TokenDtype | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    pack_documents: bool = False
    text_field: str = "text"
    follow_symlinks: bool = False
    max_images: PositiveInt = 1
    sources: Items[Annotated[SourceConfig, NESTED]] = ()
    temperature: PositiveFloat = 1.0
    phases: Items[Annotated[PhaseConfig, NESTED]] = ()

    def problems(self) -> Iterator[str]:
        if self.path and self.sources:
            yield f"path = {self.path!r}: must be empty beside data.sources"
        if any(not source.path for source in self.sources):
            yield "sources = a source with path '': must be a folder or file"
        if self.phases and not self.sources:
            yield f"phases = {len(self.phases)} phases: need data.sources"
        if self.sources and all(source.weight == 0 for source in self.sources):
            yield "sources = every weight is 0: one of them must be above 0"
        steps = [phase.from_step for phase in self.phases]
        if steps != sorted(set(steps)):
            yield f"phases = from_step of {steps}: must increase from each phase to the next"
        for phase in self.phases:
            if len(phase.weights) != len(self.sources) or not any(phase.weights):
                yield (
                    f"phases = weights of {list(phase.weights)}: must be a number for each of {len(self.sources)} "
                    "sources, one of them above 0"
                )


@section
class EvalConfig(Section):
    """Held-out loss every ``interval`` steps and at the end, over ``steps`` batches; interval 0: at the end only,
    steps 0: never.

    average: evaluate, and export, the average of the weights that ``optimizer.ema_decay`` keeps. An optimiser that
    averages itself is always evaluated so.
    sample_prompt: a text that the model continues at each evaluation, for samples.jsonl in the run's folder; "" for
    none. On one device, of a text model.
    sample_tokens: how many tokens it adds.
    """

    interval: Count = 0
    steps: Count = 8
    batch_size: PositiveInt | None = None
    average: bool = False
    sample_prompt: str = ""
    sample_tokens: PositiveInt = 64

    def problems(self) -> Iterator[str]:
        if self.steps == 0 and self.interval > 0:
            yield f"steps = 0: an evaluation every {self.interval} steps needs at least one batch"
