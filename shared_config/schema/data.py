"""Training data, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import Count, PositiveInt, Section, section


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
    pack_documents: positions see only their own document (a ``doc_ids`` mask), and no loss crosses a boundary.
    """

    path: str = ""
    tokenizer: str = "bytes"
    eos_id: Count | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    pack_documents: bool = False
    text_field: str = "text"
    follow_symlinks: bool = False


@section
class EvalConfig(Section):
    """Held-out loss every ``interval`` steps and at the end, over ``steps`` batches; interval 0: at the end only,
    steps 0: never.
    """

    interval: Count = 0
    steps: Count = 8
    batch_size: PositiveInt | None = None

    def problems(self) -> Iterator[str]:
        if self.steps == 0 and self.interval > 0:
            yield f"steps = 0: an evaluation every {self.interval} steps needs at least one batch"
