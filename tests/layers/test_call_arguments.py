"""Inputs, masks and states that do not fit a layer are a ValueError: received, expected, fix."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers
from tests.helpers import BATCH, HEADS, TIME
from tests.mixers import MAIN, WIDTH

FACTORIES: dict[str, Callable[..., keras.layers.Layer]] = {
    **MAIN,
    "streaming": lambda: layers.Streaming(layers.GatedLinearAttention(HEADS)),
}
FEED_FORWARD = {"feed_forward2": layers.FeedForward2, "swiglu": layers.GatedFeedForward}
SEQUENCE = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
EVERY = pytest.mark.parametrize(
    "make", [*FACTORIES.values(), *FEED_FORWARD.values()], ids=[*FACTORIES, *FEED_FORWARD]
)


def built(make: Callable, width: int = WIDTH) -> keras.layers.Layer:
    layer = make()
    layer.build((None, None, width))
    return layer


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


def run(layer: keras.layers.Layer, inputs: Any, mask: Any = None) -> Any:
    """Any layer on inputs: Streaming from its empty state."""
    if not isinstance(layer, layers.Streaming):
        return layer(inputs) if mask is None else layer(inputs, mask=mask)
    return layer(inputs, layer.get_initial_state(BATCH), mask=mask)[0]


@EVERY
@pytest.mark.parametrize("shape", [(WIDTH,), (None, None, None), ()])
def test_a_shape_to_build_for(make: Callable, shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"hidden\).*Received the shape.*last size known"):
        make().build(shape)


@SEQUENCE
def test_inputs_of_another_shape(make: Callable) -> None:
    layer = built(make)
    for shape in ((TIME, WIDTH), (1, BATCH, TIME, WIDTH), (WIDTH,), (BATCH, TIME, 2 * WIDTH)):
        with pytest.raises(ValueError, match=rf"received inputs \({shape[0]}, ?.*, {WIDTH}\)"):
            run(layer, ones(*shape))
        with pytest.raises(ValueError, match=rf"received inputs \({shape[0]}, ?.*, {WIDTH}\)"):
            layer.call_with_state(ones(*shape), layer.get_initial_state(BATCH)) if hasattr(
                layer, "call_with_state"
            ) else run(layer, ones(*shape))
    for shape in ((0, TIME, WIDTH), (BATCH, 0, WIDTH)):
        with pytest.raises(ValueError, match="has 0 elements, expected one at least"):
            run(layer, ones(*shape))


@pytest.mark.parametrize("make", FEED_FORWARD.values(), ids=FEED_FORWARD)
def test_feed_forwards_take_any_leading_axes_and_one_width(make: Callable) -> None:
    layer = built(make)
    for shape in ((5, WIDTH), (1, 2, 3, WIDTH), (BATCH, 0, WIDTH)):
        assert tuple(layer(ones(*shape)).shape) == shape
    for shape in ((WIDTH,), (BATCH, TIME, WIDTH + 1)):
        with pytest.raises(ValueError, match="incompatible"):
            layer(ones(*shape))


@SEQUENCE
@pytest.mark.parametrize(
    "shape", [(BATCH, TIME + 1), (BATCH,), (BATCH, TIME, 1), (1, TIME), (BATCH + 1, TIME), ()]
)
def test_masks_of_another_shape(make: Callable, shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"mask .*expected inputs .*mask \(batch, time\)"):
        run(built(make), ones(BATCH, TIME, WIDTH), mask=np.ones(shape, "bool"))


@SEQUENCE
def test_states_of_another_batch_or_layer(make: Callable) -> None:
    layer = built(make)
    good = layer.get_initial_state(BATCH)
    more_heads = {k: x if x.ndim == 1 else np.repeat(x, 2, axis=1) for k, x in good.items()}
    call = layer if isinstance(layer, layers.Streaming) else layer.call_with_state
    for state in (
        layer.get_initial_state(1),
        layer.get_initial_state(BATCH + 1),
        more_heads,
        {name: leaf[..., None] for name, leaf in good.items()},
        dict.fromkeys(good),
    ):
        with pytest.raises(ValueError, match=r"received inputs .*state .*: expected"):
            call(ones(BATCH, TIME, WIDTH), state)
    for state in ({**good, "more": ones(BATCH)}, {}, list(good.values())):
        with pytest.raises(ValueError, match="The state of .* is a dict of .*get_initial_state"):
            call(ones(BATCH, TIME, WIDTH), state)


@SEQUENCE
@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "2", None])
def test_a_state_of_no_rows(make: Callable, batch_size: Any) -> None:
    with pytest.raises(ValueError, match=rf"`batch_size` of the state .*received {batch_size!r}"):
        built(make).get_initial_state(batch_size)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`use_query` of Attention2.*{value!r}"):
        layers.Attention2(HEADS, 9, use_query=value)


@pytest.mark.parametrize("name", ["num_heads", "position_dim"])
def test_a_size_without_a_default_is_not_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` of Attention2.*None"):
        layers.Attention2(**{"num_heads": HEADS, "context_length": 9, name: None})


@pytest.mark.parametrize("value", ["16", None])
def test_a_gate_normalizer_is_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`gate_normalizer`.*{value!r}"):
        layers.GatedLinearAttention(HEADS, gate_normalizer=value)
