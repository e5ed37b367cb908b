"""Second derivatives of every op and layer, against differences of first derivatives."""

from collections.abc import Callable, Sequence
from functools import partial

import keras
import numpy as np
import pytest

from elita_tf import layers, ops
from elita_tf.layers.normalization import LayerNormalization
from elita_tf.ops import slicing
from tests import helpers
from tests.helpers import BATCH, HEADS, HIDDEN, KEY_DIM, TIME, VALUE_DIM

# On JAX, Keras computes parts of float64 layers in float32.
BOUND = 1e-5 if helpers.BACKEND == "tensorflow" else 2e-2
SIZE = 1e-4  # of the step between two first derivatives
INNER, RANK, VOCABULARY = 6, 4, 37
LABELS = np.random.default_rng(5).integers(0, VOCABULARY, (BATCH, TIME)).astype("int32")


def drawn(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape) for shape in shapes]


def attention2(form, *arguments):
    key, query, own, value, decay, maximum, numerator, denominator = arguments
    state = ops.Attention2State(maximum, numerator, keras.ops.exp(denominator))
    options = {"log_decay": -keras.ops.softplus(decay)}
    return form(key, query, own, value, state, **options)


def gla(form, query, key, value, decay, state):
    return form(query, key, value, -keras.ops.softplus(decay), state)


def loss(hidden, kernel, weight):
    return ops.linear_cross_entropy(hidden, kernel, LABELS, keras.ops.exp(weight))


def token_losses(hidden, kernel):
    return ops.token_cross_entropy(hidden, kernel, LABELS)


HEAD = BATCH, TIME, HEADS
LOGITS_VALUE_STATE = (
    *[HEAD, HEAD, HEAD, (*HEAD, VALUE_DIM), HEAD],
    *[(BATCH, HEADS), (BATCH, HEADS, VALUE_DIM), (BATCH, HEADS)],
)
KEYS_VALUE_STATE = (
    *[(*HEAD, KEY_DIM), (*HEAD, KEY_DIM), (*HEAD, VALUE_DIM), (*HEAD, KEY_DIM)],
    (BATCH, HEADS, KEY_DIM, VALUE_DIM),
)
TERMS = (BATCH, TIME, INNER), (BATCH, TIME, RANK), (INNER, RANK, HIDDEN)
OPS = {
    "attention2": (partial(attention2, ops.attention2), LOGITS_VALUE_STATE),
    "attention2_recurrent": (partial(attention2, ops.attention2_recurrent), LOGITS_VALUE_STATE),
    "gla": (partial(gla, ops.gated_linear_attention), KEYS_VALUE_STATE),
    "gla_chunks": (
        partial(gla, partial(ops.gated_linear_attention, chunk_size=4)),
        KEYS_VALUE_STATE,
    ),
    "gla_recurrent": (partial(gla, ops.gated_linear_attention_recurrent), KEYS_VALUE_STATE),
    "feed_forward2": (ops.feed_forward2, TERMS),
    "loss": (loss, ((BATCH, TIME, HIDDEN), (VOCABULARY, HIDDEN), (BATCH, TIME))),
    "token_losses": (token_losses, ((BATCH, TIME, HIDDEN), (VOCABULARY, HIDDEN))),
}
LAYERS = {
    "attention2": partial(layers.Attention2, HEADS, context_length=TIME, value_dim=VALUE_DIM),
    "attention2_gated": partial(layers.Attention2, HEADS, value_dim=VALUE_DIM, decay="gated"),
    "gla": partial(layers.GatedLinearAttention, HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM),
    "softmax": partial(layers.CausalSelfAttention, 5, window_length=64),
    "softmax_window": partial(layers.CausalSelfAttention, 5, window_length=5),
    "feed_forward2": layers.FeedForward2,
    "swiglu": layers.GatedFeedForward,
    "layer_norm": LayerNormalization,
}


def check(
    function: Callable, arguments: Sequence[np.ndarray], transform: Callable | None = None
) -> None:
    """The Hessian of a weighted sum of the outputs, times a vector."""
    cotangents = helpers.random_like(helpers.leaves(function(*arguments)))
    steps = helpers.random_like(list(arguments), seed=13)

    def gradients(*arguments):
        run = helpers.differentiated(function, arguments)
        return run(list(arguments), list(map(keras.ops.convert_to_tensor, cotangents)))[1]

    above, below = (
        helpers.vjp(
            function,
            [x + sign * SIZE * step for x, step in zip(arguments, steps, strict=True)],
            cotangents,
            transform,
        ).gradients
        for sign in (1, -1)
    )
    expected = [(a - b) / (2 * SIZE) for a, b in zip(above, below, strict=True)]
    second = helpers.vjp(gradients, arguments, steps, transform)
    helpers.assert_close(second.gradients, expected, BOUND)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_of_ops(name: str) -> None:
    function, shapes = OPS[name]
    check(function, drawn(*shapes))


@pytest.mark.parametrize("name", ["feed_forward2", "loss"])
def test_second_derivatives_over_several_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 3 tokens; the loss adds up its kernel's gradient in blocks of 10 rows."""
    monkeypatch.setattr(slicing, "_MIN_TOKENS", 3)
    monkeypatch.setattr(slicing, "_ELEMENTS", 1)
    function, shapes = OPS[name]
    check(function, drawn(*shapes))


@pytest.mark.long
@pytest.mark.parametrize("name", ["attention2", "gla_chunks", "feed_forward2", "loss"])
def test_second_derivatives_under_xla(name: str) -> None:
    function, shapes = OPS[name]
    check(function, drawn(*shapes), helpers.xla)


@pytest.mark.long
def test_second_derivatives_beyond_a_window_under_xla() -> None:
    layer = LAYERS["softmax_window"](dtype="float64")
    layer.build((BATCH, TIME, HIDDEN))
    helpers.randomized(layer)
    check(layer, drawn((BATCH, TIME, HIDDEN)), helpers.xla)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_layers(name: str) -> None:
    layer = LAYERS[name](dtype="float64")
    layer.build((BATCH, TIME, HIDDEN))
    helpers.randomized(layer)
    check(layer, drawn((BATCH, TIME, HIDDEN)))
