"""What the blocks of a decoder can be made of, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from elita_tf import layers
from elita_tf.layers.arguments import require_positive

MIXERS: dict[str, Callable[..., keras.layers.Layer]] = {
    "attention2": lambda heads, context, **kwargs: layers.Attention2(heads, context, **kwargs),
    "attention2_query": lambda heads, context, **kwargs: layers.Attention2(
        heads, context, use_query=True, **kwargs
    ),
    "gla": lambda heads, context, **kwargs: layers.GatedLinearAttention(heads, **kwargs),
    "softmax": lambda heads, context, **kwargs: layers.CausalSelfAttention(
        heads, context, **kwargs
    ),
}
FEED_FORWARDS: dict[str, Callable[..., keras.layers.Layer]] = {
    "feed_forward2": layers.FeedForward2,
    "swiglu": layers.GatedFeedForward,
}
NORMALIZATIONS: dict[str, Callable[..., keras.layers.Layer]] = {
    "layer_norm": lambda **kwargs: keras.layers.LayerNormalization(epsilon=1e-5, **kwargs),
    "rms_norm": lambda **kwargs: keras.layers.RMSNormalization(epsilon=1e-5, **kwargs),
}


def choose(
    argument: str, choices: dict[str, Callable[..., keras.layers.Layer]], name: str, dtype: Any
) -> Callable[..., keras.layers.Layer]:
    """The entry `name` of `choices`, or a ValueError that lists them."""
    if name not in choices:
        raise ValueError(
            f"`{argument}` of ElitaBackbone: expected one of {sorted(choices)}, received {name!r}."
        )
    return partial(choices[name], dtype=dtype)


def one_per_block(mixers: str | list[str], num_layers: int) -> list[str]:
    """The name of every block's mixer, from one for all or a list."""
    require_positive("ElitaBackbone", num_layers=num_layers)
    mixers = [mixers] * num_layers if isinstance(mixers, str) else list(mixers)
    if len(mixers) != num_layers:
        raise ValueError(
            f"`mixers` of ElitaBackbone names one mixer per block: expected {num_layers}, the "
            f"`num_layers`, received {len(mixers)}: {mixers}."
        )
    return mixers
