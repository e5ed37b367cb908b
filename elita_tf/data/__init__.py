"""Text to batches: corpora, tokenizers, stored token ids, windows."""

from elita_tf.data.corpora import SPLITS, Corpus, Split, load_corpus
from elita_tf.data.documents import document_ids, pack_windows
from elita_tf.data.gpt2 import ElitaGPT2Tokenizer
from elita_tf.data.sentence_piece import ElitaTokenizer
from elita_tf.data.token_ids import encode_split, unigram_entropy
from elita_tf.data.tokenizer_base import Tokenizer
from elita_tf.data.tokenizers import load_tokenizer, make_tokenizer, train_sentencepiece
from elita_tf.data.windows import (
    evaluation_windows,
    num_training_windows,
    stream_windows,
    training_batch,
    training_window_indices,
    training_windows,
)

__all__ = [
    "SPLITS",
    "Corpus",
    "ElitaGPT2Tokenizer",
    "ElitaTokenizer",
    "Split",
    "Tokenizer",
    "document_ids",
    "encode_split",
    "evaluation_windows",
    "load_corpus",
    "load_tokenizer",
    "make_tokenizer",
    "num_training_windows",
    "pack_windows",
    "stream_windows",
    "train_sentencepiece",
    "training_batch",
    "training_window_indices",
    "training_windows",
    "unigram_entropy",
]
