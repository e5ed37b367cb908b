"""Every form of prompts and of stop tokens means the same; what has no meaning is refused."""

from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from tests import helpers
from tests.helpers import randomized

pytestmark = pytest.mark.usefixtures("without_int64")
VOCABULARY, LENGTH = 23, 9
ROWS = [[3, 1, 4, 1, 5], [9, 2]]


@pytest.fixture(scope="module")
def model() -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    arguments = {**architectures["elita_gated"], "num_layers": 1, "hidden_dim": 16}
    model = ElitaCausalLM(ElitaBackbone(vocabulary_size=VOCABULARY, **arguments))
    model.compile(sampler="greedy", jit_compile=helpers.QUICKEST)
    return randomized(model, scale=0.4)


def padded(side: str) -> dict[str, np.ndarray]:
    token_ids, mask = np.full((2, LENGTH), 7), np.zeros((2, LENGTH), bool)
    for i, row in enumerate(ROWS):
        columns = slice(len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        token_ids[i, columns], mask[i, columns] = row, True
    return {"token_ids": token_ids, "padding_mask": mask}


FORMS = {
    "ragged list": lambda: ROWS,
    "dict of a ragged list": lambda: {"token_ids": ROWS},
    "arrays": lambda: [np.array(row, "uint8") for row in ROWS],
    "padded before": lambda: padded("left"),
    "tensors": lambda: keras.tree.map_structure(keras.ops.convert_to_tensor, padded("right")),
    "integers as mask": lambda: {k: x.astype("int64") for k, x in padded("right").items()},
    "no segments": lambda: {**padded("right"), "segment_ids": None},
}


@pytest.mark.parametrize("strip_prompt", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ids_gives_the_same(
    model: ElitaCausalLM, form: str, strip_prompt: bool
) -> None:
    expected = model.generate(padded("right"), None, None)
    rows = [row[len(prompt) :] for row, prompt in zip(expected["token_ids"], ROWS, strict=True)]
    outputs = model.generate(FORMS[form](), LENGTH, None, strip_prompt)
    if not strip_prompt:
        np.testing.assert_array_equal(outputs["token_ids"], expected["token_ids"])
        assert outputs["padding_mask"].all()
        return
    for row, prompt, ids, mask in zip(rows, ROWS, *outputs.values(), strict=True):
        assert ids[mask].tolist() == row.tolist() and len(row) == LENGTH - len(prompt)
        assert mask.tolist() == sorted(mask, reverse=True)


def test_one_row_of_any_form_gives_one_row(model: ElitaCausalLM) -> None:
    expected = model.generate([ROWS[0]], 8, None)["token_ids"][0]
    for one in (ROWS[0], tuple(ROWS[0]), np.array(ROWS[0]), {"token_ids": ROWS[0]}):
        outputs = model.generate(one, 8, None)
        assert outputs["token_ids"].tolist() == expected.tolist()
        assert outputs["padding_mask"].shape == (8,)


def test_max_length_widens_and_narrows_ids(model: ElitaCausalLM) -> None:
    wide = model.generate(padded("right"), 14, None)["token_ids"]
    narrow = model.generate(padded("right"), 6, None)["token_ids"]
    assert wide.shape == (2, 14) and narrow.shape == (2, 6)
    np.testing.assert_array_equal(wide[:, :6], narrow)


@pytest.mark.parametrize(
    ("inputs", "max_length", "message"),
    [
        ({**padded("right"), "segment_ids": np.ones((2, LENGTH), int)}, None, "segment_ids"),
        ({**padded("right"), "padding_mask": np.ones((2, 4), bool)}, None, "padding_mask"),
        ({**padded("right"), "attention_mask": 1}, None, "attention_mask"),
        (ROWS, None, "max_length"),
        (ROWS, 4, "Prompt 0 has 5 tokens"),
        (ROWS, 5.0, "max_length"),
        (ROWS, True, "max_length"),
        ([[3], []], 5, "Prompt 1 is empty"),
        ([], 5, "Prompt 0 is empty"),
        (np.zeros((0, 4), int), 5, "received"),
        (7, 5, "received"),
        (None, 5, "received"),
        ([[0.5, 1.0]], 5, "float64"),
        ([[[3]]], 5, "received"),
        ([[3, VOCABULARY]], 5, "vocabulary_size"),
        ("3 and", 5, "received"),
    ],
)
def test_prompts_without_a_meaning_are_refused(
    model: ElitaCausalLM, inputs: Any, max_length: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(inputs, max_length, None)


def test_every_form_of_stop_tokens_means_the_same(model: ElitaCausalLM) -> None:
    free = model.generate(ROWS[:1], 12, None)["token_ids"][0]
    stop = int(free[8])
    expected = free[: 6 + free[5:].tolist().index(stop)].tolist()
    forms = [stop, np.int64(stop), [stop], (stop, stop), {stop}, np.array([stop]), np.array(stop)]
    for form in [*forms, keras.ops.convert_to_tensor([stop])]:
        outputs = model.generate(ROWS[:1], 12, form)
        assert outputs["token_ids"][0][outputs["padding_mask"][0]].tolist() == expected
        streamed = np.concatenate(list(model.stream(ROWS[0], 12, stop_token_ids=form)))
        assert streamed.tolist() == expected[5:]
    for form in (None, [], (), set(), np.array([], int)):
        assert model.generate(ROWS[:1], 12, form)["token_ids"][0].tolist() == free.tolist()


@pytest.mark.parametrize("stop", ["auto", "end", 3.0, True, [VOCABULARY], [-1], [[3]], [None]])
def test_stop_tokens_without_a_meaning_are_refused(model: ElitaCausalLM, stop: Any) -> None:
    with pytest.raises(ValueError, match="stop_token_ids"):
        model.generate(ROWS, 12, stop)
    with pytest.raises(ValueError, match="stop_token_ids"):
        model.stream(ROWS[0], 12, stop_token_ids=stop)


def test_kerashub_still_lets_a_longer_prompt_choose_between_beams() -> None:
    # What `elita_tf.models.search` works around. When this fails, KerasHub has repaired it, and
    # `search_rows` need not group the rows by their length.
    logits = np.log([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]]).astype("float32")

    def advance(tokens: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        return keras.ops.take(logits, tokens[:, index - 1], axis=0), None, cache

    def search(forced: int) -> list[int]:
        """The beams' log-probabilities of a prompt 0, 2 that is searched from index 1 or 2."""
        sampler = keras_hub.samplers.BeamSampler(num_beams=2, return_all_beams=True)
        prompt = keras.ops.convert_to_tensor(np.array([[0, 2, 0, 0]], "int32"))
        mask = keras.ops.convert_to_tensor(np.array([[True, True, False, False]]))
        return np.array(sampler(advance, prompt, index=2 - forced, mask=mask)[1])[0]

    assert not np.allclose(search(forced=1), search(forced=0))


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_a_search_gives_prompts_of_any_lengths_what_each_gets_alone(
    model: ElitaCausalLM, sampler: str
) -> None:
    searching = ElitaCausalLM(model.backbone)
    searching.compile(sampler=sampler, run_eagerly=not helpers.QUICKEST)
    together = searching.generate(ROWS, LENGTH, None)["token_ids"]
    for row, prompt in zip(together, ROWS, strict=True):
        assert searching.generate(prompt, LENGTH, None)["token_ids"].tolist() == row.tolist()
