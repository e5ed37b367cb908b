"""linear_cross_entropy against materialised float64 logits."""

from collections.abc import Callable

import numpy as np
import pytest

from elita_tf.ops import cross_entropy, linear_cross_entropy, slicing, token_cross_entropy
from tests import helpers, oracles
from tests.helpers import BATCH, HIDDEN, TIME

VOCABULARY = 37


def make_inputs(
    leading: tuple[int, ...] = (BATCH, TIME), vocabulary: int = VOCABULARY, spread: float = 1.0
) -> list[np.ndarray]:
    """[hidden, kernel, labels, sample_weight], some of the weights 0."""
    rng = np.random.default_rng(vocabulary + len(leading))
    weights = rng.random(leading) * (rng.random(leading) < 0.8)
    return [
        spread * rng.standard_normal((*leading, HIDDEN)),
        rng.standard_normal((vocabulary, HIDDEN)),
        rng.integers(0, vocabulary, leading).astype("int32"),
        weights,
    ]


def check(inputs: list, bound: float, **options: Callable) -> helpers.Vjp:
    """Values and gradients of hidden, kernel and (if given) weights against the oracle."""
    hidden, kernel, labels, *weights = inputs
    exact = [x.astype("float64") for x in helpers.leaves([hidden, kernel, *weights])]
    loss, gradients = oracles.linear_cross_entropy(*exact[:2], labels, *exact[2:])

    def function(hidden, kernel, *weights):  # noqa: ANN001, ANN002, ANN202 (tensors of either backend)
        return linear_cross_entropy(hidden, kernel, labels, *weights)

    cotangent = np.array(1.7)
    result = helpers.vjp(function, [hidden, kernel, *weights], [cotangent], **options)
    helpers.assert_close(result.outputs, [np.asarray(loss)], bound)
    expected = [1.7 * gradient for gradient in gradients[: len(exact)]]
    helpers.assert_close(result.gradients, expected, bound)
    return result


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("leading", [(1,), (TIME,), (BATCH, TIME), (2, 3, 5), (257,), (1031,)])
def test_values_and_gradients_are_exact(leading: tuple[int, ...], weighted: bool) -> None:
    inputs = make_inputs(leading)
    if leading == (1,):
        inputs[3][:] = 0.4
    check(inputs if weighted else inputs[:3], 1e-10)


@pytest.mark.parametrize("vocabulary", [2, 128, 1009])
def test_any_vocabulary(vocabulary: int) -> None:
    check(make_inputs(vocabulary=vocabulary), 1e-10)


def test_two_tokens_by_hand() -> None:
    hidden, kernel = np.array([[1.0], [2.0]]), np.array([[0.5], [-1.0], [3.0]])
    losses = []
    for row, label in ((1.0, 2), (2.0, 0)):
        exponentials = [np.exp(row * k) for k in (0.5, -1.0, 3.0)]
        losses.append(-np.log(exponentials[label] / sum(exponentials)))
    weights = np.array([3.0, 1.0])
    loss = linear_cross_entropy(hidden, kernel, np.array([2, 0]), weights)
    assert float(loss) == pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-14)
    loss = linear_cross_entropy(hidden, kernel, np.array([2, 0]))
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-14)


def test_loss_of_each_token() -> None:
    hidden, kernel, labels, _ = make_inputs((2, 3, 5))
    losses = helpers.leaves(token_cross_entropy(hidden, kernel, labels))[0]
    expected = np.empty(labels.shape)
    for index in np.ndindex(labels.shape):
        logits = kernel @ hidden[index]
        expected[index] = np.log(np.exp(logits).sum()) - logits[labels[index]]
    helpers.assert_close(losses, expected, 1e-12)


def test_all_weights_zero() -> None:
    hidden, kernel, labels, weights = make_inputs()
    result = check([hidden, kernel, labels, np.zeros_like(weights)], 0.0)
    assert float(result.outputs[0]) == 0.0
    assert not any(gradient.any() for gradient in result.gradients)


def test_a_weight_of_zero_hides_the_row() -> None:
    hidden, kernel, labels, weights = make_inputs()
    loss = linear_cross_entropy(hidden, kernel, labels, weights)
    hidden[weights == 0] = 50.0
    labels[weights == 0] = 3
    assert (weights == 0).any()
    assert float(loss) == float(linear_cross_entropy(hidden, kernel, labels, weights))


@pytest.mark.parametrize("spread", [1e3, 1e4])
def test_large_logits(spread: float) -> None:
    result = check(make_inputs(spread=spread), 1e-10)
    helpers.assert_finite([*result.outputs, *result.gradients])


@pytest.mark.parametrize(
    ("dtype", "spread", "bound"),
    [("float32", 1.0, 3e-5), ("float32", 1e3, 3e-3), ("bfloat16", 1.0, 2e-2)],
)
def test_low_precision_inputs(dtype: str, spread: float, bound: float) -> None:
    inputs = make_inputs((BATCH, 67), spread=spread)
    hidden, kernel, weights = helpers.cast([*inputs[:2], inputs[3]], dtype)
    check([hidden, kernel, inputs[2], weights], bound)


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e5])
def test_products_in_float16_with_any_weight(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on accelerators. The smallest number of float16 is 6e-8, the largest 65,504."""
    monkeypatch.setattr(cross_entropy, "product_dtype", lambda _: "float16")
    hidden, kernel, labels, _ = make_inputs((BATCH, 67))
    low = helpers.cast([hidden, kernel], "float16")
    weights = np.full(labels.shape, weight, "float32")
    weights[0, 0] *= 0.5
    check([*low, labels, weights], 5e-3)


@pytest.mark.parametrize("transform", [helpers.jitted, helpers.xla])
def test_gradient_of_the_kernel_in_blocks(
    transform: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of 3 tokens, blocks of 10 of the 37 rows: the last overlaps the third by 3."""
    monkeypatch.setattr(slicing, "_MIN_TOKENS", 3)
    monkeypatch.setattr(slicing, "_ELEMENTS", 1)
    check(make_inputs(), 1e-10, transform=transform)


def test_compiled_by_xla() -> None:
    check(make_inputs((BATCH, 131)), 1e-10, transform=helpers.xla)


@helpers.tensorflow_only
def test_one_graph_serves_every_batch_and_length() -> None:
    import tensorflow as tf

    inputs = make_inputs()
    flat = helpers.differentiated(linear_cross_entropy_of_floats, inputs)
    specs = [
        tf.TensorSpec([None, None, HIDDEN], "float64"),
        tf.TensorSpec(inputs[1].shape, "float64"),
    ]
    specs += [tf.TensorSpec([None, None], dtype) for dtype in ("float64", "float64")]
    traced = tf.function(flat, input_signature=[specs, [tf.TensorSpec([], "float64")]])
    for leading in ((1, 1), (BATCH, TIME), (3, 401)):
        hidden, kernel, labels, weights = make_inputs(leading)
        weights[0, 0] = 1.0
        expected, gradients = oracles.linear_cross_entropy(hidden, kernel, labels, weights)
        arguments = [hidden, kernel, labels.astype("float64"), weights]
        result = helpers.vjp(
            linear_cross_entropy_of_floats, arguments, [np.ones(())], lambda _, f=traced: f
        )
        helpers.assert_close(result.outputs, [np.asarray(expected)], 1e-10)
        kept = [result.gradients[index] for index in (0, 1, 3)]
        helpers.assert_close(kept, gradients, 1e-10)


def linear_cross_entropy_of_floats(hidden, kernel, labels, weights):  # noqa: ANN001, ANN201
    """The op with labels passed as floats, so that all arguments can be watched alike."""
    import keras

    return linear_cross_entropy(hidden, kernel, keras.ops.cast(labels, "int32"), weights)


@helpers.tensorflow_only
def test_logits_are_never_held() -> None:
    costs, vocabulary = {}, 1024
    for tokens in (8192, 32768):
        labels = np.random.default_rng(0).integers(0, vocabulary, tokens)

        def function(hidden, kernel, labels=labels):  # noqa: ANN001, ANN202
            return linear_cross_entropy(hidden, kernel, labels)

        shapes = [(tokens, HIDDEN), (vocabulary, HIDDEN)]
        costs[tokens] = helpers.traced_cost(function, shapes, [()])
    assert costs[8192].operations == costs[32768].operations
    assert costs[32768].largest <= 32768 * vocabulary // 4
