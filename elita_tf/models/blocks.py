"""What the blocks of a decoder can be made of, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from elita_tf import layers
from elita_tf.layers.arguments import require_flag
from elita_tf.ops.arguments import require_positive

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


_CHOICES = {"mixers": MIXERS, "feed_forward": FEED_FORWARDS, "normalization": NORMALIZATIONS}


def choose(argument: str, name: str, dtype: Any) -> Callable[..., keras.layers.Layer]:
    """What `argument` of ElitaBackbone calls `name`, or a ValueError that lists the names."""
    choices = _CHOICES[argument]
    if not isinstance(name, str) or name not in choices:
        raise ValueError(
            f"`{argument}` of ElitaBackbone: expected one of {sorted(choices)}, received {name!r}."
        )
    return partial(choices[name], dtype=dtype)


def one_per_block(mixers: str | list[str], num_layers: int) -> list[str]:
    """The name of every block's mixer, from one for all or a list."""
    require_positive("ElitaBackbone", num_layers=num_layers)
    if not isinstance(mixers, (str, list, tuple)):
        raise ValueError(
            "`mixers` of ElitaBackbone: expected a name or a list of names from "
            f"{sorted(MIXERS)}, received {mixers!r}."
        )
    mixers = [mixers] * num_layers if isinstance(mixers, str) else list(mixers)
    if len(mixers) != num_layers:
        raise ValueError(
            f"`mixers` of ElitaBackbone names one mixer per block: expected {num_layers}, the "
            f"`num_layers`, received {len(mixers)}: {mixers}."
        )
    return mixers


def require_sizes(
    vocabulary_size: Any, hidden_dim: Any, num_heads: Any, context_length: Any
) -> None:
    """Raise a ValueError for a size of ElitaBackbone below 1, whether its blocks need it or not."""
    require_positive(
        "ElitaBackbone",
        vocabulary_size=vocabulary_size,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        context_length=context_length,
    )


def require_options(dropout: Any, tie_embeddings: Any, learned_positions: Any) -> None:
    """Raise a ValueError for a dropout that is no rate, and for flags that are none."""
    name = "ElitaBackbone"
    require_flag(name, tie_embeddings=tie_embeddings, learned_positions=learned_positions)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(
            f"`dropout` of {name} is the share that is dropped: expected a number from 0 to below "
            f"1, received {dropout!r}."
        )
