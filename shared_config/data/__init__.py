"""Token data: what is read, how it becomes ids, and which rows make up batch k."""

from shared_config.data.batches import Batch, TextData, document_starts, open_text_data, permute
from shared_config.data.corpus import Corpus, TokenStream, load_corpus
from shared_config.data.tokenizer import (
    BOS,
    EOS,
    VOCAB_SIZE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
)

__all__ = [
    "BOS",
    "EOS",
    "VOCAB_SIZE",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "HuggingFaceTokenizer",
    "TextData",
    "TokenStream",
    "Tokenizer",
    "build_tokenizer",
    "document_starts",
    "load_corpus",
    "open_text_data",
    "permute",
]
