from collections.abc import Iterator
from pathlib import Path

import pytest

from elita_tf.data import Split, train_sentencepiece
from elita_tf.models import ElitaTokenizer
from tests import helpers

SENTENCES = "".join(
    f"{i} and {j} make {i + j}.\nSo they do: {i * j}!\n" for i in range(20) for j in range(9)
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """By kind: the tokenizer of `elita_tf.data`, and the KerasHub layer of the same model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = folder / "text.txt"
    text.write_text(SENTENCES)
    pairs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(folder))
        for kind, size in (("lossless", 300), ("default", 50)):
            data = train_sentencepiece(Split(text), size, lossless=kind == "lossless")
            data.save(folder / kind)
            pairs[kind] = (
                data,
                ElitaTokenizer(Path(folder / kind / "sentencepiece.model").read_bytes()),
            )
    return pairs


@pytest.fixture
def without_int64() -> Iterator[None]:
    """On JAX, KerasHub's samplers pair int32 indices with 0, which must not be an int64 then."""
    if helpers.BACKEND != "jax":
        yield
        return
    import jax

    with jax.enable_x64(False):
        yield
