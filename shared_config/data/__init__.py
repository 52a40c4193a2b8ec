"""Training data: what is read, how it becomes arrays, and which rows make up batch k."""

from shared_config.data.batches import Batch, TextData, document_starts, permute
from shared_config.data.conversations import ConversationData
from shared_config.data.corpus import Corpus, TokenStream, load_corpus
from shared_config.data.images import ImageTextData, open_image_data
from shared_config.data.mixture import MixedData
from shared_config.data.text import open_text_data
from shared_config.data.tokenizer import (
    BOS,
    EOS,
    VOCAB_SIZE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from shared_config.schema.job import JobConfig

__all__ = [
    "BOS",
    "EOS",
    "VOCAB_SIZE",
    "Batch",
    "ByteTokenizer",
    "ConversationData",
    "Corpus",
    "HuggingFaceTokenizer",
    "ImageTextData",
    "MixedData",
    "TextData",
    "TokenStream",
    "Tokenizer",
    "build_tokenizer",
    "document_starts",
    "load_corpus",
    "open_data",
    "open_image_data",
    "open_text_data",
    "permute",
]


def open_data(
    config: JobConfig, *, rank: int = 0, world_size: int = 1, together: int = 1
) -> TextData | ConversationData | MixedData | ImageTextData:
    """The data of a job, text or images with text, for one of ``world_size`` data-parallel ranks.

    Args:
        together: of how many ranks, this one first, each batch has the rows, one rank's after another's; it divides
            ``rank`` and ``world_size``.

    Raises:
        UserError: data that can't be used.
    """
    opened = open_text_data if config.vlm is None else open_image_data
    sizes = {"train": config.train.batch_size, "eval": config.eval.batch_size}
    wide = {name: getattr(config, name).replace(batch_size=size and size * together) for name, size in sizes.items()}
    return opened(config.replace(**wide), rank=rank // together, world_size=world_size // together)
