"""What the blocks of a decoder can be made of, by name; `register_mixer` adds to it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras

from elita_tf import layers
from elita_tf.layers.arguments import require_flag
from elita_tf.layers.normalization import LayerNormalization
from elita_tf.ops.arguments import require_positive


class Kind(NamedTuple):
    """A layer, and the arguments that its name stands for."""

    layer: type[keras.layers.Layer]
    arguments: dict[str, Any] = {}


MIXERS = {
    "attention2": Kind(layers.Attention2),
    "attention2_query": Kind(layers.Attention2, {"use_query": True}),
    "attention2_gated": Kind(
        layers.Attention2, {"use_query": True, "decay": "gated", "context_length": None}
    ),
    "gla": Kind(layers.GatedLinearAttention),
    "softmax": Kind(layers.CausalSelfAttention),
}
FEED_FORWARDS = {
    "feed_forward2": Kind(layers.FeedForward2),
    "swiglu": Kind(layers.GatedFeedForward),
}
NORMALIZATIONS: dict[str, Callable[..., keras.layers.Layer]] = {
    "layer_norm": lambda **kwargs: LayerNormalization(epsilon=1e-5, **kwargs),
    "rms_norm": lambda **kwargs: keras.layers.RMSNormalization(epsilon=1e-5, **kwargs),
}


def register_mixer(name: str, layer_class: type[keras.layers.Layer], **arguments: Any) -> None:
    """Let `mixers` of `ElitaBackbone` name a layer of your own.

    A backbone that has such a layer is trained, saved, loaded, streamed and exported as any other.
    A process that loads it registers the layer first, under the same name.

    Args:
        name: the new name. Variables have it in their paths: letters, digits and underscores.
        layer_class: a Keras layer that mixes positions. It has `call(inputs, mask=None,
            segment_ids=None)`, `call_with_state(inputs, state, mask=None, segment_ids=None)`,
            which returns outputs and the new state, and `get_initial_state(batch_size)`, which
            returns the empty state, a dict of arrays, the batch first; and `output_kernel`, the
            weight that a new backbone sets to zero, so that its blocks start as the identity.
            The backbone's `num_heads`, `context_length` and `window_length` are passed to a
            constructor that has arguments of these names.
        **arguments: of the layer's constructor, which the name stands for. They come before the
            backbone's; `mixer_options` of a backbone come before both.

    Raises:
        ValueError: a name that is in use or unfit, a class that lacks any of the above, or an
            argument that its constructor does not have.

    Example:

    >>> from elita_tf import layers
    >>> from elita_tf.models import ElitaBackbone, register_mixer
    >>> register_mixer("fixed_gla", layers.GatedLinearAttention, gate="fixed")
    >>> backbone = ElitaBackbone(100, num_layers=2, hidden_dim=8, num_heads=2, mixers="fixed_gla")
    >>> backbone.blocks[0].mixer.layer.gate
    'fixed'
    """
    needed = ("call_with_state", "get_initial_state", "output_kernel")
    _register("mixer", MIXERS, name, layer_class, arguments, needed)


def register_feed_forward(
    name: str, layer_class: type[keras.layers.Layer], **arguments: Any
) -> None:
    """Let `feed_forward` of `ElitaBackbone` name a layer of your own: see `register_mixer`.

    Args:
        name: the new name.
        layer_class: a Keras layer that works on every position by itself: `call(inputs)`. Like a
            mixer, it has an `output_kernel`.
        **arguments: of the layer's constructor, which the name stands for.

    Raises:
        ValueError: as `register_mixer`.

    Example:

    >>> from elita_tf import layers
    >>> from elita_tf.models import ElitaBackbone, register_feed_forward
    >>> register_feed_forward("geglu", layers.GatedFeedForward, activation="gelu")
    >>> sizes = {"num_layers": 2, "hidden_dim": 8, "num_heads": 2}
    >>> backbone = ElitaBackbone(100, **sizes, feed_forward="geglu")
    >>> backbone.blocks[0].feed_forward.layer.activation.__name__
    'gelu'
    """
    _register("feed_forward", FEED_FORWARDS, name, layer_class, arguments, ("output_kernel",))


def _register(
    kind: str,
    table: dict[str, Kind],
    name: Any,
    layer_class: Any,
    arguments: dict[str, Any],
    needed: tuple[str, ...],
) -> None:
    function = f"register_{kind}"
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"`name` of {function}: expected letters, digits and underscores, received {name!r}."
        )
    in_use = sorted({*MIXERS, *FEED_FORWARDS, "mixer_norm", "feed_forward_norm"})
    if name in in_use:
        raise ValueError(
            f"`name` of {function}: {name!r} is in use, as all of {in_use} are. Choose another."
        )
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise ValueError(
            f"`layer_class` of {function}: expected a class of Keras layers, received "
            f"{layer_class!r}."
        )
    lacking = [method for method in needed if not hasattr(layer_class, method)]
    if not _takes_keras_arguments(layer_class):
        lacking.append("**kwargs of its constructor, with `name` and `dtype`")
    if lacking:
        raise ValueError(
            f"`layer_class` of {function}: {layer_class.__name__} lacks {', '.join(lacking)}. See "
            f"`help({function})` for what a backbone needs of a layer."
        )
    _require_options(f"**arguments of {function}", layer_class, arguments)
    table[name] = Kind(layer_class, arguments)


def _parameters(layer: type) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]  # without self
    return {each.name: each for each in parameters}


def _takes_keras_arguments(layer: type) -> bool:
    parameters = _parameters(layer)
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return open_ended or {"name", "dtype"} <= parameters.keys()


def mixer_builders(
    mixers: str | list[str],
    num_layers: int,
    options: dict[str, dict[str, Any]],
    sizes: dict[str, int],
) -> list[tuple[str, Callable[..., keras.layers.Layer]]]:
    """The name of every block's mixer, and what makes the layer.

    `sizes` are the backbone's `num_heads`, `context_length` and `window_length`. A mixer receives
    those that its constructor has arguments for.
    """
    pattern = as_pattern(mixers, num_layers)
    _require_table("`mixer_options` of ElitaBackbone", options)
    for name, own in options.items():
        if name not in pattern:
            raise ValueError(
                f"`mixer_options` of ElitaBackbone are for its mixers {sorted(set(pattern))}, "
                f"received some for {name!r}. Leave them out, or name the mixer in `mixers`."
            )
        _require_options(f"`mixer_options[{name!r}]` of ElitaBackbone", MIXERS[name].layer, own)

    def builder(name: str) -> Callable[..., keras.layers.Layer]:
        kind = MIXERS[name]
        known = _parameters(kind.layer)
        own_sizes = {argument: size for argument, size in sizes.items() if argument in known}
        return partial(kind.layer, **{**own_sizes, **kind.arguments, **options.get(name, {})})

    builders = {name: builder(name) for name in set(pattern)}
    return [(name, builders[name]) for name in pattern * (num_layers // len(pattern))]


def feed_forward_builder(name: str, options: dict[str, Any]) -> Callable[..., keras.layers.Layer]:
    """What makes the feed-forward of a block."""
    kind = _choose("feed_forward", name, FEED_FORWARDS)
    _require_options("`feed_forward_options` of ElitaBackbone", kind.layer, options)
    return partial(kind.layer, **{**kind.arguments, **options})


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
            f"`{argument}` of ElitaBackbone: expected one of {sorted(choices)}, received {name!r}. "
            "A layer of your own is registered first: see `register_mixer` and "
            "`register_feed_forward`."
        )
    return choices[name]


def _require_table(owner: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"{owner}: expected a dict, received {options!r}.")


def _require_options(owner: str, layer: type, options: Any) -> None:
    """Raise a ValueError unless `options` are arguments of the layer's constructor."""
    _require_table(owner, options)
    named = [name for name, each in _parameters(layer).items() if each.kind is not each.VAR_KEYWORD]
    unknown = sorted(set(options) - set(named))
    if unknown:
        raise ValueError(
            f"{owner} are arguments of {layer.__name__}: expected some of {named}, received "
            f"{', '.join(unknown)}."
        )


def require_options(dropout: Any, tie_embeddings: Any, learned_positions: Any) -> None:
    """Raise a ValueError for a dropout outside of 0 to 1, and for flags that are not booleans."""
    name = "ElitaBackbone"
    require_flag(name, tie_embeddings=tie_embeddings, learned_positions=learned_positions)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(
            f"`dropout` of {name} is the share that is dropped: expected a number from 0 to below "
            f"1, received {dropout!r}."
        )
