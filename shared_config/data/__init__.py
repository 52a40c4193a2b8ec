"""Training data: what is read, how it becomes arrays, and which rows make up batch k."""

from shared_config.data.batches import Batch, TextData, document_starts, permute
from shared_config.data.conversations import ConversationData
from shared_config.data.corpus import Corpus, TokenStream, load_corpus
from shared_config.data.images import ImageTextData, open_image_data
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


def open_data(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> TextData | ConversationData | ImageTextData:
    """The data of a job, text or images with text, for one of ``world_size`` data-parallel ranks.

    Raises:
        UserError: data that can't be used.
    """
    opened = open_text_data if config.vlm is None else open_image_data
    return opened(config, rank=rank, world_size=world_size)
