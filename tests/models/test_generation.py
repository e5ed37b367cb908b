"""Generation, prefill and step: what a full recomputation gives, from a state of constant size."""

from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures, decoding
from elita_tf.models.decoding import piece_length
from tests import helpers
from tests.helpers import jitted, randomized

pytestmark = pytest.mark.usefixtures("without_int64")
VOCABULARY, CONTEXT, LENGTH = 23, 6, 12
NAMES = [*sorted(architectures), "learned_positions"]
EVERY = pytest.mark.parametrize("name", NAMES)
QUICK, SLOW = "elita_gated", [name for name in NAMES if name != "elita_gated"]


def make_model(name: str, **kwargs: Any) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    if name == "learned_positions":
        name, kwargs = "gla", {**kwargs, "learned_positions": True}
    sizes = {"hidden_dim": 16, "context_length": CONTEXT, "vocabulary_size": VOCABULARY}
    model = ElitaCausalLM(ElitaBackbone(**{**architectures[name], **sizes, **kwargs}))
    model.compile(sampler="greedy", run_eagerly=not helpers.QUICKEST)
    return randomized(model, scale=0.4)


def prompts(lengths: tuple[int, ...], max_length: int = LENGTH) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (len(lengths), max_length))
    mask = np.arange(max_length) < np.array(lengths)[:, None]
    return {"token_ids": np.where(mask, ids, 0).astype("int32"), "padding_mask": mask}


def recomputed(
    model: ElitaCausalLM, inputs: dict, sampler: keras_hub.samplers.Sampler
) -> np.ndarray:
    """What the sampler makes of the logits of the whole text so far, once for every token."""
    forward = jitted(model)
    lengths = inputs["padding_mask"].sum(axis=1)
    tokens = np.where(inputs["padding_mask"], inputs["token_ids"], 0)
    rows = np.arange(len(tokens))
    for added in range(tokens.shape[1] - lengths.min()):
        # What stands after the last one does not reach it.
        last = np.minimum(lengths + added, tokens.shape[1]) - 1
        logits = keras.ops.convert_to_numpy(forward({"token_ids": tokens}))[rows, last]
        chosen = sampler.get_next_token(sampler.compute_probabilities(logits))
        missing = lengths + added < tokens.shape[1]
        tokens[rows[missing], last[missing] + 1] = np.array(chosen)[missing]
    return tokens


def searched(model: ElitaCausalLM, inputs: dict, sampler: Any) -> np.ndarray:
    """KerasHub's search of one row on the logits of the whole text so far."""

    @jitted
    def both(tokens: Any) -> tuple[Any, Any]:
        return model({"token_ids": tokens}), model.backbone({"token_ids": tokens})

    def advance(tokens: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        logits, hidden = (keras.ops.take(x, index - 1, axis=1) for x in both(tokens))
        return logits, hidden, cache

    return np.array(
        sampler(
            next=advance,
            prompt=keras.ops.convert_to_tensor(inputs["token_ids"]),
            cache=(),
            index=int(inputs["padding_mask"].sum(axis=1).min()),
            mask=keras.ops.convert_to_tensor(inputs["padding_mask"]),
            hidden_states=jitted(model.backbone)(inputs),
        )
    )


SAMPLERS = {
    "greedy": lambda: keras_hub.samplers.GreedySampler(),
    "random": lambda: keras_hub.samplers.RandomSampler(seed=5),
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=4, seed=5),
    "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.7, seed=5),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.4),
}
SEARCHES = ("beam", "contrastive")


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(x, marks=pytest.mark.long) for x in SLOW)])
def test_tokens_are_those_of_the_full_recomputation(name: str) -> None:
    model = make_model(name)
    model.compile(sampler=SAMPLERS["random"](), run_eagerly=not helpers.QUICKEST)
    inputs = prompts((3, 6, 1))
    outputs = model.generate(inputs, stop_token_ids=None)
    expected = recomputed(model, inputs, SAMPLERS["random"]())
    np.testing.assert_array_equal(outputs["token_ids"], expected)
    assert outputs["padding_mask"].all() and len(set(expected[0, 3:])) > 3


@pytest.mark.long
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_compiled(sampler: str) -> None:
    model = make_model("gla", num_layers=1)
    model.compile(sampler=SAMPLERS[sampler]())
    inputs = prompts((3, 5), max_length=11)
    outputs = model.generate(inputs, stop_token_ids=None)
    if sampler in SEARCHES:
        of_row = [{k: x[i : i + 1] for k, x in inputs.items()} for i in range(2)]
        rows = [searched(model, row, SAMPLERS[sampler]()) for row in of_row]
        expected = np.concatenate(rows)
    else:
        expected = recomputed(model, inputs, SAMPLERS[sampler]())
    np.testing.assert_array_equal(outputs["token_ids"], expected)


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    model = make_model("hybrid")
    inputs = prompts((3, 6, 1))
    together = model.generate(inputs, stop_token_ids=None)["token_ids"]
    for row in range(3):
        alone = model.generate({k: x[row : row + 1] for k, x in inputs.items()}, None, None)
        np.testing.assert_array_equal(alone["token_ids"][0], together[row])


def test_padding_before_the_prompt_is_moved() -> None:
    model = make_model("gla")
    inputs = prompts((3, 6))
    before = {k: np.stack([np.roll(x[0], 4), x[1]]) for k, x in inputs.items()}
    expected = model.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(model.generate(before, None, None)["token_ids"], expected)


def test_a_stop_token_ends_its_row() -> None:
    model = make_model("elita")
    inputs = prompts((3, 6))
    free = model.generate(inputs, stop_token_ids=None)["token_ids"]
    stop = int(free[0, 8])
    first = [n + int(np.argmax(free[i, n:] == stop)) for i, n in enumerate((3, 6))]
    if stop not in free[1, 6:]:
        first[1] = LENGTH - 1
    outputs = model.generate(inputs, stop_token_ids=[stop])
    for row, last in enumerate(first):
        np.testing.assert_array_equal(outputs["token_ids"][row, : last + 1], free[row, : last + 1])
        assert outputs["padding_mask"][row].tolist() == [i <= last for i in range(LENGTH)]


@pytest.mark.long
def test_lengths_share_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    call_with_state = ElitaBackbone.call_with_state

    def counted(self: Any, inputs: dict, state: dict, training: bool = False) -> tuple:
        traced.append(tuple(inputs["token_ids"].shape))
        return call_with_state(self, inputs, state, training)

    monkeypatch.setattr(ElitaBackbone, "call_with_state", counted)
    model = make_model("elita", num_layers=1)
    model.compile(sampler="greedy")
    for length in (9, 12, 64, 40, 65, 100):
        outputs = model.generate(prompts((3, 6), length), stop_token_ids=None)
        assert outputs["token_ids"].shape == (2, length)
    assert sorted(set(traced)) == [(2, 1), (2, 16)] and len(traced) <= 4
    assert [piece_length(n) for n in (1, 16, 17, 2048, 10_000)] == [16, 16, 32, 2048, 2048]


@pytest.mark.long
def test_generate_sees_the_weights_of_a_later_fit() -> None:
    model = make_model("elita", num_layers=1)
    model.compile(keras.optimizers.SGD(5.0), jit_compile=helpers.QUICKEST, sampler="greedy")
    inputs = prompts((3, 6))
    before = model.generate(inputs, stop_token_ids=None)["token_ids"]
    windows = prompts((LENGTH, LENGTH))
    model.fit({"token_ids": windows["token_ids"]}, windows["token_ids"], verbose=0)
    after = model.generate(inputs, stop_token_ids=None)["token_ids"]
    expected = recomputed(model, inputs, keras_hub.samplers.GreedySampler())
    np.testing.assert_array_equal(after, expected)
    assert (before != after).any()


def test_an_empty_prompt_is_refused() -> None:
    model = make_model("elita")
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        model.generate(prompts((3, 0)), stop_token_ids=None)


@EVERY
def test_prefill_and_steps_give_the_logits_of_the_whole(name: str) -> None:
    model = make_model(name)
    ids = prompts((LENGTH, LENGTH))["token_ids"]
    whole, step = np.array(jitted(model)({"token_ids": ids})), jitted(model.step)
    logits, state = jitted(model.prefill)(ids[:, :5])
    rows = [logits]
    for position in range(5, LENGTH):
        logits, state = step(ids[:, position], state)
        rows.append(logits)
    helpers.assert_close(np.stack(rows, axis=1), whole[:, 4:], 1e-5)


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(x, marks=pytest.mark.long) for x in SLOW)])
@pytest.mark.parametrize("transform", [jitted, helpers.xla], ids=["eager", "xla"])
def test_a_long_prompt_is_read_in_pieces(
    name: str, transform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding on both sides, so that the last real token of a row is in any of the pieces."""
    model = make_model(name)
    inputs = prompts((11, 2, 7), max_length=11)
    inputs["padding_mask"][0, :3] = False
    inputs["segment_ids"] = np.arange(11)[None] // np.array([[4], [20], [3]])
    expected = jitted(model.prefill)(**inputs)
    monkeypatch.setattr(decoding, "PREFILL_PIECE", 4)
    helpers.assert_close(transform(model.prefill)(**inputs), expected, 1e-5)
    ids = inputs["token_ids"]
    whole = model.backbone.token_embedding(model.backbone({"token_ids": ids}), reverse=True)
    helpers.assert_close(transform(model.prefill)(ids)[0], whole[:, -1], 1e-5)


@EVERY
def test_prefill_knows_padding_on_either_side_and_goes_on_from_a_state(name: str) -> None:
    model = make_model(name)
    inputs = prompts((9, 4))
    sides = {k: np.stack([np.roll(x[0], LENGTH - 9), x[1]]) for k, x in inputs.items()}
    prefill = jitted(model.prefill)
    logits, state = prefill(sides["token_ids"], sides["padding_mask"])
    for row, length in enumerate((9, 4)):
        ids = inputs["token_ids"][row : row + 1, :length]
        _, half = prefill(ids[:, :3])
        alone, final = prefill(ids[:, 3:], state=half)
        helpers.assert_close(np.array(logits)[row : row + 1], alone, 1e-5)
        for leaf, value in final.items():
            helpers.assert_close(np.array(state[leaf])[row : row + 1], value, 1e-5)


@EVERY
def test_the_state_has_one_size_and_is_flat(name: str) -> None:
    model = make_model(name)
    empty = model.backbone.get_initial_state(2)
    for length in (1, 5, 30):
        _, state = jitted(model.prefill)(prompts((length, length), length)["token_ids"])
        assert {k: tuple(x.shape) for k, x in state.items()} == {
            k: tuple(x.shape) for k, x in empty.items()
        }
    assert {x.shape[0] for x in empty.values()} == {2}


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_wrong_state_is_refused(change: str) -> None:
    model = make_model("gla")
    _, state = jitted(model.prefill)(prompts((5,), 5)["token_ids"])
    if change == "missing":
        state.pop("block_1_gla_state")
    else:
        state["block_9_gla_state"] = state["block_1_gla_state"]
    with pytest.raises(ValueError, match="get_initial_state"):
        model.step(np.array([1]), state)
