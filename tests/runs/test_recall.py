import json

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaCausalLM
from elita_tf.runs import recall
from tests import helpers

SIZES = {"length": 43, "vocabulary": 61, "pairs": (2, 5, 10)}
TINY = recall.Plan(
    vocabulary_size=23,
    length=13,
    pairs=(2, 3),
    training_examples=22,
    validation_examples=3,
    test_examples=7,
    hidden_dim=8,
    rates=(1e-3, 1e-2),
    batch_size=4,
    warmup_steps=2,
    steps_per_loss=2,
    jit_compile=helpers.QUICKEST,
)


def draw(num=37, seed=0, **sizes):
    return recall.examples(num, **{**SIZES, **sizes}, rng=np.random.default_rng(seed))


def test_a_key_that_comes_again_asks_for_its_value():
    data = draw()
    assert [array.dtype.name for array in data] == ["int32", "int32", "float32"]
    for token_ids, labels, weights in zip(*data, strict=True):
        count = int(weights.sum())
        pairs = dict(token_ids[: 2 * count].reshape(count, 2).tolist())
        assert count in SIZES["pairs"] and len(pairs) == count
        assert max(pairs) < 30 <= min(pairs.values())
        assert len(set(pairs.values())) == count
        # Exactly these positions are asked for, and every key once.
        asked = [t for t in range(2 * count, 43) if token_ids[t] in pairs]
        assert asked == np.flatnonzero(weights).tolist()
        assert sorted(token_ids[asked]) == sorted(pairs)
        assert all(labels[t] == pairs[token_ids[t]] for t in asked)
        assert set(weights) == {0.0, 1.0}


def test_numbers_of_pairs_take_turns():
    counts = draw(num=8).weights.sum(axis=1)
    assert counts.tolist() == [2, 5, 10, 2, 5, 10, 2, 5]


def test_every_token_comes():
    data = draw(num=200)
    assert set(data.token_ids[:, 40:].ravel()) == set(range(61))


def test_a_seed_gives_its_own_examples():
    first, again, other = draw(), draw(), draw(seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_an_example_without_choice():
    """One place for the one key, and one token that can be a key."""
    data = draw(num=1, length=4, vocabulary=3, pairs=(1,))
    value = data.labels[0, 2]
    assert value in (1, 2)
    assert data.token_ids[0, :3].tolist() == [0, value, 0]
    assert data.labels.tolist() == [[0, 0, value, 0]]
    assert data.weights.tolist() == [[0, 0, 1, 0]]


def test_near_places_are_likelier():
    rng = np.random.default_rng(0)
    drawn = np.concatenate([recall.places(20, 1, rng) for _ in range(2_000)])
    counts = np.bincount(drawn, minlength=20)
    # Twice the distance, about half the weight.
    assert counts[0] / counts[1] == pytest.approx(2**0.99, rel=0.2)
    assert sorted(recall.places(20, 20, rng)) == list(range(20))


@pytest.mark.parametrize("sizes", [{"length": 39}, {"vocabulary": 19}])
def test_what_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="10 pairs need a length of at least 40 and a vocab"):
        draw(**sizes)


def test_accuracies():
    logits = np.zeros((3, 4, 5))
    for example, position, token in [(0, 1, 2), (0, 3, 4), (1, 2, 1), (2, 0, 3), (2, 3, 1)]:
        logits[example, position, token] = 1.0
    labels = np.array([[0, 2, 0, 3], [0, 0, 1, 0], [3, 0, 0, 1]])
    weights = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]], "float32")
    data = recall.Data(np.zeros_like(labels), labels, weights)
    expected = {"all": 4 / 5, "1": 1.0, "2": 3 / 4}
    assert recall.accuracies(np.argmax(logits, axis=-1), data) == expected


def random_model():
    keras.utils.set_random_seed(0)
    model = helpers.randomized(recall.build(recall.Case(TINY, "gated", 1e-3)))
    # It would decide most predictions.
    model.backbone.final_norm.beta.assign(np.zeros(8))
    return model


def test_the_loss_is_that_of_the_language_model():
    model, data = random_model(), recall.Data(*(x[:4] for x in recall.splits(TINY)[0]))
    assert data.weights.sum() == model.num_labels == 10
    plain = ElitaCausalLM(model.backbone)
    plain.compile()
    losses = [
        m.compute_loss({"token_ids": data.token_ids}, data.labels, None, data.weights, False)
        for m in (model, plain)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_predictions_are_those_of_the_logits():
    model, data = random_model(), recall.splits(TINY)[2]
    logits = keras.ops.convert_to_numpy(model({"token_ids": data.token_ids}))
    predicted = recall.predict(model, data, batch_size=3)
    expected = np.where(data.weights > 0, np.argmax(logits, axis=-1), 0)
    assert np.array_equal(predicted, expected) and len(np.unique(expected)) > 2


def test_names_are_those_of_files_and_differ():
    names = [case.name for case in recall.cases(recall.FULL)]
    assert len(set(names)) == len(names) == 15
    assert names[-2:] == [
        "recall,gated-and-softmax,rate=0.003",
        "recall,gated-and-softmax,rate=0.01",
    ]


@pytest.mark.long
def test_a_run():
    record = recall.run(recall.Case(TINY, "softmax", 1e-2))
    assert json.loads(json.dumps(record))["task"]["pairs"] == [2, 3]
    assert (record["model"], record["rate"], record["steps"]) == ("softmax", 1e-2, 5)
    assert [step for step, _ in record["losses"]] == [2, 4, 5]
    assert set(record["test_accuracy_by_pairs"]) == {"2", "3"}


@pytest.mark.parametrize("model", recall.MODELS)
def test_every_model(model):
    backbone = recall.build(recall.Case(TINY, model, 1e-2)).backbone
    assert backbone.num_layers == 2 and backbone.mixers == recall.MODELS[model]
    heads = [block.mixer.layer.num_heads for block in backbone.blocks]
    assert (
        heads
        == {
            "gated": [1, 8],
            "gla": [1, 2],
            "softmax": [1, 1],
            "gated and gla": [8, 2],
            "gated and softmax": [8, 1],
        }[model]
    )
    assert backbone({"token_ids": np.ones((2, 13), "int32")}).shape == (2, 13, 8)


def test_the_first_block_sees_two_positions():
    model = helpers.randomized(recall.build(recall.Case(TINY, "gla", 1e-2)))
    first = model.backbone.blocks[0].mixer.layer
    inputs = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
    changed = inputs.copy()
    changed[0, 1] += 1.0
    differs = np.abs(np.array(first(inputs)) - np.array(first(changed))).max(axis=-1) > 1e-6
    assert differs.tolist() == [[False, True, True, False, False]]


def test_every_example_is_seen_once_in_order():
    seen = []

    class Model:
        def fit(self, x, y, **kwargs):
            seen.extend(x["token_ids"].tolist())
            history = keras.callbacks.History()
            history.history = {"loss": [0.0]}
            return history

    data = recall.splits(TINY)[0]
    losses = recall.train(Model(), data, TINY)
    # 22 examples are five batches of 4.
    assert seen == data.token_ids[:20].tolist() and losses == [[2, 0.0], [4, 0.0], [5, 0.0]]
