"""The CausalSelfAttention layer against rotary softmax attention written as loops."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from keras import ops

from elita_tf.layers import CausalSelfAttention
from tests import helpers
from tests.helpers import BATCH, HEADS, LAYER_BOUND, TIME, randomized

WIDTH, HEAD_DIM = 18, 6
# Many windows, and what a piece before them leaves in the state.
LONG, WINDOW, FIRST = 1024, 64, 37


def make_layer(context_length: int, dtype: str = "float64") -> CausalSelfAttention:
    layer = CausalSelfAttention(HEADS, context_length, dtype=dtype)
    layer.build((None, None, WIDTH))
    return randomized(layer, scale=0.3)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """Pairs (f, f + half) turned by position / 10000^(f / half), as complex numbers."""
    half = HEAD_DIM // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize("context_length", [4, 20])
def test_equation(context_length: int) -> None:
    layer = make_layer(context_length)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    query, key, value, output = helpers.leaves(
        [
            layer.query_projection.kernel,
            layer.key_projection.kernel,
            layer.value_projection.kernel,
            layer.output_projection.kernel,
        ]
    )
    expected = np.zeros_like(inputs)
    for row, head, i in np.ndindex(BATCH, HEADS, TIME):
        x = inputs[row]
        seen = range(max(0, i - context_length + 1), i + 1)
        turned = rotated(x[i] @ query[:, head], i)
        scores = [turned @ rotated(x[j] @ key[:, head], j) / HEAD_DIM**0.5 for j in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed = sum(w * (x[j] @ value[:, head]) for w, j in zip(weights, seen, strict=True))
        expected[row, i] += mixed @ output[head]
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


def test_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15.*3.*odd 5"):
        CausalSelfAttention(3, 20).build((None, None, 15))


def test_width_must_divide() -> None:
    with pytest.raises(ValueError, match=r"10.*3"):
        CausalSelfAttention(3, 20).build((None, None, 10))


def rotated_all(x: Any, positions: np.ndarray) -> Any:
    """`rotated` for (batch, time, heads, head_dim), with gradients."""
    angles = positions[..., None, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cosine, sine = np.cos(angles), np.sin(angles)
    first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def full_form(
    layer: CausalSelfAttention, inputs: Any, mask: np.ndarray, segment_ids: np.ndarray
) -> Any:
    """All scores at once, with a mask; 0 at masked positions."""
    positions = np.zeros(mask.shape, "int64")
    visible = np.zeros((*mask.shape, mask.shape[1]), "bool")
    for row, real in enumerate(mask):
        places = np.flatnonzero(real)
        ids = segment_ids[row, places]
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
        for segment in np.split(places, starts[1:]):
            positions[row, segment] = np.arange(len(segment))
            for rank, place in enumerate(segment):
                visible[row, place, segment[max(rank - WINDOW + 1, 0) : rank + 1]] = True
    query = rotated_all(layer.query_projection(inputs), positions) / HEAD_DIM**0.5
    key = rotated_all(layer.key_projection(inputs), positions)
    scores = ops.where(visible[:, None], ops.einsum("bthv,bshv->bhts", query, key), -1e30)
    exponentials = ops.exp(scores - ops.max(scores, axis=-1, keepdims=True))
    weights = exponentials / ops.sum(exponentials, axis=-1, keepdims=True)
    outputs = ops.einsum("bhts,bshv->bthv", weights, layer.value_projection(inputs))
    return ops.where(mask[..., None], layer.output_projection(outputs), 0.0)


def in_one_call(
    layer: CausalSelfAttention, inputs: Any, mask: np.ndarray, segment_ids: np.ndarray | None
) -> Any:
    outputs = layer(inputs, mask=None if mask.all() else mask, segment_ids=segment_ids)
    return ops.where(mask[..., None], outputs, 0.0)


def in_two_calls(
    layer: CausalSelfAttention, inputs: Any, mask: np.ndarray, segment_ids: np.ndarray | None
) -> Any:
    state, pieces = layer.get_initial_state(BATCH), []
    for piece in (slice(0, FIRST), slice(FIRST, LONG)):
        outputs, state = layer.call_with_state(
            inputs[:, piece],
            state,
            mask=None if mask.all() else mask[:, piece],
            segment_ids=None if segment_ids is None else segment_ids[:, piece],
        )
        pieces.append(outputs)
    return ops.where(mask[..., None], ops.concatenate(pieces, axis=1), 0.0)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("whole", in_two_calls),
        ("left", in_two_calls),
        ("right", in_one_call),
        ("holes", in_two_calls),
        ("segments", in_one_call),
        ("both", in_one_call),
        ("both", in_two_calls),
    ],
)
def test_beyond_the_window_nothing_changes(kind: str, form: Any) -> None:
    rng = np.random.default_rng(5)
    mask, segment_ids = np.ones((BATCH, LONG), "bool"), None
    if kind in ("left", "right"):
        places = slice(0, 190) if kind == "left" else slice(-190, None)
        mask[0, places] = mask[1, : 3 if kind == "left" else 800] = False
    elif kind in ("holes", "both"):
        mask = rng.random((BATCH, LONG)) < 0.5
        mask[1, 20:300] = False
    if kind in ("segments", "both"):
        segment_ids = np.cumsum(rng.random((BATCH, LONG)) < 0.02, axis=1)
    layer = make_layer(WINDOW)
    inputs = [rng.standard_normal((BATCH, LONG, WIDTH))]
    cotangents = helpers.random_like(inputs)
    ids = np.zeros(mask.shape, "int64") if segment_ids is None else segment_ids
    expected = helpers.vjp(
        partial(full_form, layer, mask=mask, segment_ids=ids), inputs, cotangents
    )
    call = partial(form, layer, mask=mask, segment_ids=segment_ids)
    received = helpers.vjp(call, inputs, cotangents)
    # On JAX, Keras makes the sines of large angles in float32.
    helpers.assert_close(received, expected, 1e-10 if helpers.BACKEND == "tensorflow" else 1e-5)


def test_mixed_bfloat16_beyond_the_window() -> None:
    inputs = np.random.default_rng(3).standard_normal((BATCH, 300, WIDTH)).astype("float32")
    cotangents = helpers.random_like([inputs])
    expected, received = (
        helpers.vjp(make_layer(20, dtype), [inputs], cotangents)
        for dtype in ("float32", "mixed_bfloat16")
    )
    helpers.assert_finite([*received.outputs, *received.gradients])
    helpers.assert_close(received, expected, 3e-2)
