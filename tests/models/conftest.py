from collections.abc import Iterator

import pytest

from elita_tf.data import Split, train_sentencepiece
from elita_tf.models import ElitaTokenizer
from tests import helpers

SENTENCES = "".join(
    f"{i} and {j} make {i + j}.\nSo they do: {i * j}!\n" for i in range(20) for j in range(9)
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElitaTokenizer]:
    """By kind: a tokenizer trained on the sentences above."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = folder / "text.txt"
    text.write_text(SENTENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(folder))
        return {
            kind: train_sentencepiece(Split(text), size, lossless=kind == "lossless")
            for kind, size in (("lossless", 300), ("default", 50))
        }


@pytest.fixture
def without_int64() -> Iterator[None]:
    """On JAX, KerasHub's samplers pair int32 indices with 0, which must not be an int64 then."""
    if helpers.BACKEND != "jax":
        yield
        return
    import jax

    with jax.enable_x64(False):
        yield
