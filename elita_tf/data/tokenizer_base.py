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
        """The text of ids; a ValueError for one that the vocabulary lacks."""

    def require_ids(self, token_ids: Iterable[int]) -> list[int]:
        """The ids as a list, or a ValueError for one that the vocabulary lacks."""
        ids = [int(token) for token in token_ids]
        unknown = [token for token in ids if not 0 <= token < self.vocabulary_size]
        if unknown:
            raise ValueError(
                f"Expected ids from 0 to {self.vocabulary_size - 1}; received {unknown[:5]}. They "
                "come from another tokenizer, or from a model of a larger vocabulary."
            )
        return ids

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Writes the files that `load_tokenizer` reads."""

    def encode(self, text: str) -> np.ndarray:
        """The ids (int32, rank 1) of a text; the same as line by line.

        Raises:
            ValueError: for what is no string, or holds half a character (a lone surrogate).
        """
        if not isinstance(text, str):
            raise ValueError(f"Expected a string; received {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text is no Unicode: {error}. Read it with its right encoding, or replace "
                'the character: text.encode(errors="replace").decode().'
            ) from error
        return self.encode_lines(list(io.StringIO(text, newline="\n")))
