"""The interface of every tokenizer."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


class Tokenizer(ABC):
    """Text to token ids and back."""

    #: ids appended once at the end of a split
    end_of_text: tuple[int, ...] = ()

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the tokenizer's files."""

    @abstractmethod
    def encode_lines(self, lines: Sequence[str]) -> np.ndarray:
        """The ids (int32, rank 1) of lines, each with its line end."""

    @abstractmethod
    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Writes the files that `load_tokenizer` reads."""

    def encode(self, text: str) -> np.ndarray:
        """The ids (int32, rank 1) of a text; the same as line by line."""
        return self.encode_lines(list(io.StringIO(text, newline="\n")))
