"""The tokenizers of the models' tests."""

from tests.models.conftest import tokenizers

__all__ = ["tokenizers"]
