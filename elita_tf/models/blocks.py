"""What the blocks of a decoder can be made of, by name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras

from elita_tf import layers
from elita_tf.layers.arguments import require_flag
from elita_tf.ops.arguments import require_positive


class Kind(NamedTuple):
    """A layer, the arguments that its name stands for, and whether it has a context length."""

    layer: type[keras.layers.Layer]
    arguments: dict[str, Any] = {}
    takes_context_length: bool = False


MIXERS = {
    "attention2": Kind(layers.Attention2, takes_context_length=True),
    "attention2_query": Kind(layers.Attention2, {"use_query": True}, takes_context_length=True),
    "attention2_gated": Kind(layers.Attention2, {"use_query": True, "decay": "gated"}),
    "gla": Kind(layers.GatedLinearAttention),
    "softmax": Kind(layers.CausalSelfAttention, takes_context_length=True),
}
FEED_FORWARDS = {
    "feed_forward2": Kind(layers.FeedForward2),
    "swiglu": Kind(layers.GatedFeedForward),
}
NORMALIZATIONS: dict[str, Callable[..., keras.layers.Layer]] = {
    "layer_norm": lambda **kwargs: keras.layers.LayerNormalization(epsilon=1e-5, **kwargs),
    "rms_norm": lambda **kwargs: keras.layers.RMSNormalization(epsilon=1e-5, **kwargs),
}


def mixer_builders(
    mixers: str | list[str],
    num_layers: int,
    options: dict[str, dict[str, Any]],
    num_heads: int,
    context_length: int,
) -> list[tuple[str, Callable[..., keras.layers.Layer]]]:
    """The name of every block's mixer, and what makes the layer."""
    pattern = as_pattern(mixers, num_layers)
    _require_table("mixer_options", options)
    for name, own in options.items():
        if name not in pattern:
            raise ValueError(
                f"`mixer_options` of ElitaBackbone are for its mixers {sorted(set(pattern))}, "
                f"received some for {name!r}. Leave them out, or name the mixer in `mixers`."
            )
        _require_options(f"mixer_options[{name!r}]", MIXERS[name].layer, own)

    def builder(name: str) -> Callable[..., keras.layers.Layer]:
        kind, arguments = MIXERS[name], {"num_heads": num_heads}
        if kind.takes_context_length:
            arguments["context_length"] = context_length
        return partial(kind.layer, **{**arguments, **kind.arguments, **options.get(name, {})})

    builders = {name: builder(name) for name in set(pattern)}
    return [(name, builders[name]) for name in pattern * (num_layers // len(pattern))]


def feed_forward_builder(name: str, options: dict[str, Any]) -> Callable[..., keras.layers.Layer]:
    """What makes the feed-forward of a block."""
    kind = _choose("feed_forward", name, FEED_FORWARDS)
    _require_options("feed_forward_options", kind.layer, options)
    return partial(kind.layer, **options)


def normalization_builder(name: str) -> Callable[..., keras.layers.Layer]:
    """What makes a norm."""
    return _choose("normalization", name, NORMALIZATIONS)


def as_pattern(mixers: str | list[str], num_layers: int) -> list[str]:
    """The names of the mixers of the first blocks, which repeat over all `num_layers`."""
    require_positive("ElitaBackbone", num_layers=num_layers)
    if not isinstance(mixers, (str, list, tuple)) or not mixers:
        raise ValueError(
            "`mixers` of ElitaBackbone: expected a name or a list of names from "
            f"{sorted(MIXERS)}, received {mixers!r}."
        )
    pattern = [mixers] if isinstance(mixers, str) else list(mixers)
    for name in pattern:
        _choose("mixers", name, MIXERS)
    if num_layers % len(pattern):
        raise ValueError(
            "`mixers` of ElitaBackbone is a pattern that repeats over the blocks: expected a "
            f"number of names that divides {num_layers}, the `num_layers`, received "
            f"{len(pattern)}: {pattern}."
        )
    return pattern


def _choose(argument: str, name: Any, choices: dict[str, Any]) -> Any:
    if not isinstance(name, str) or name not in choices:
        raise ValueError(
            f"`{argument}` of ElitaBackbone: expected one of {sorted(choices)}, received {name!r}."
        )
    return choices[name]


def _require_table(argument: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"`{argument}` of ElitaBackbone: expected a dict, received {options!r}.")


def _require_options(argument: str, layer: type, options: Any) -> None:
    """Raise a ValueError unless `options` are arguments of the layer's constructor."""
    _require_table(argument, options)
    parameters = list(inspect.signature(layer.__init__).parameters)[1:-1]  # no self, no **kwargs
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise ValueError(
            f"`{argument}` of ElitaBackbone are arguments of {layer.__name__}: expected some of "
            f"{parameters}, received {', '.join(unknown)}."
        )


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
