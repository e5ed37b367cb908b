"""segment_ids of the backbone and the language model: packed documents are separate texts."""

from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM
from elita_tf.models.rematerialization import run_rematerialized
from tests import helpers
from tests.helpers import LAYER_BOUND, jitted, randomized

VOCABULARY = 23
SEGMENT_IDS = np.array(
    [[3, 3, 3, 3, 3, 3, 0, 1, 1, 3, 3], [5, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7]], "int32"
)
BATCH, TIME = SEGMENT_IDS.shape
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TIME)).astype("int32")
LABELS = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, TIME)).astype("int32")
INPUTS = {"token_ids": IDS, "segment_ids": SEGMENT_IDS}


def make_backbone(dtype: str = "float64") -> ElitaBackbone:
    keras.utils.set_random_seed(0)
    mixers = ["attention2_query", "attention2_gated", "gla", "softmax"]
    sizes = {"hidden_dim": 12, "num_heads": 3, "num_layers": 4, "context_length": 4}
    backbone = ElitaBackbone(
        VOCABULARY, **sizes, mixers=mixers, learned_positions=True, dtype=dtype
    )
    return randomized(backbone, scale=0.3)


@pytest.fixture(scope="module")
def backbone() -> ElitaBackbone:
    return make_backbone()


@pytest.fixture(scope="module")
def separate(backbone: ElitaBackbone) -> np.ndarray:
    """The hidden states of every segment alone."""
    hidden = np.zeros((BATCH, TIME, 12))
    for row in range(BATCH):
        borders = np.flatnonzero(np.diff(SEGMENT_IDS[row])) + 1
        for places in np.split(np.arange(TIME), borders):
            alone = jitted(backbone)({"token_ids": IDS[row : row + 1, places]})
            hidden[row, places] = helpers.leaves(alone)[0][0]
    return hidden


def test_packed_documents_are_separate_texts(backbone: ElitaBackbone, separate: np.ndarray) -> None:
    def rematerialized(inputs: dict[str, np.ndarray]) -> Any:
        return backbone.call_with_runner(inputs, run_rematerialized)

    received = helpers.leaves([jitted(x)(INPUTS) for x in (backbone, rematerialized)])
    helpers.assert_close(received, [separate, separate], LAYER_BOUND)
    whole = helpers.leaves(jitted(backbone)({"token_ids": IDS}))[0]
    assert helpers.relative_error(whole, separate) > 0.01
    padded = {name: np.pad(x, ((0, 0), (2, 1))) for name, x in INPUTS.items()}
    padded["padding_mask"] = np.pad(np.ones_like(IDS, bool), ((0, 0), (2, 1)))
    received = helpers.leaves(jitted(backbone)(padded))[0][:, 2:-1]
    helpers.assert_close([received], [separate], LAYER_BOUND)


@pytest.mark.parametrize("split", [(1,) * TIME, (4, 7), (6, 1, 4)], ids=str)
def test_pieces_are_the_whole(
    backbone: ElitaBackbone, separate: np.ndarray, split: tuple[int, ...]
) -> None:
    call_with_state = jitted(backbone.call_with_state)
    state, pieces, start = backbone.get_initial_state(BATCH), [], 0
    for length in split:
        piece = {name: x[:, start : start + length] for name, x in INPUTS.items()}
        hidden, state = call_with_state(piece, state)
        pieces.append(helpers.leaves(hidden)[0])
        start += length
    helpers.assert_close([np.concatenate(pieces, axis=1)], [separate], LAYER_BOUND)
    assert [name for name in state if "segment" in name] == ["segment_id"]
    assert all(len(leaf) == BATCH for leaf in state.values())


def test_steps_restart_with_another_segment(backbone: ElitaBackbone, separate: np.ndarray) -> None:
    model = ElitaCausalLM(backbone)
    expected = helpers.leaves(backbone.token_embedding(separate, reverse=True))[0]
    first = slice(0, 3)
    step = jitted(model.step)
    logits, state = jitted(model.prefill)(IDS[:, first], segment_ids=SEGMENT_IDS[:, first])
    for i in range(3, TIME):
        helpers.assert_close(helpers.leaves(logits), [expected[:, i - 1]], LAYER_BOUND)
        logits, state = step(IDS[:, i], state, SEGMENT_IDS[:, i])
    with pytest.raises(ValueError, match=r"segment_ids \(2, 11\): expected"):
        model.step(IDS[:, 0], state, SEGMENT_IDS)


@pytest.mark.long
def test_losses_training_and_a_carried_state() -> None:
    weights = (LABELS % 3 > 0).astype("float32")
    losses = []
    for carried in (None, BATCH):
        model = ElitaCausalLM(make_backbone("float32"), carried_batch_size=carried)
        model.compile(keras.optimizers.SGD(0.0), jit_compile=helpers.QUICKEST)
        expected = np.array(jitted(model.token_losses)(IDS, LABELS, segment_ids=SEGMENT_IDS))
        # A carried state goes on in the middle of a segment, at the fourth token.
        pieces = [slice(0, TIME)] if carried is None else [slice(0, 4), slice(4, TIME)]
        for piece in pieces:
            batch = {name: x[:, piece] for name, x in INPUTS.items()}
            loss = model.train_on_batch(batch, LABELS[:, piece], weights[:, piece])
            average = np.average(expected[:, piece], weights=weights[:, piece])
            assert loss == pytest.approx(average, abs=1e-5)
        losses.append(expected)
    helpers.assert_close(losses[1], losses[0], 1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SEGMENT_IDS[:, 1:], "Axis 1 of `segment_ids` has 10 elements"),
        (SEGMENT_IDS * 1.0, "`segment_ids` of .* expected integers, received float64"),
    ],
)
def test_mistakes_are_explained(backbone: ElitaBackbone, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone({"token_ids": IDS, "segment_ids": wrong})
