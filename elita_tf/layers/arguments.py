"""Checks of the arguments of constructors and of `build`."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import keras

from elita_tf.ops.arguments import require_positive

# Keras takes these from every layer, with a warning, and does not list them.
_OLD_KERAS_ARGUMENTS = {"input_shape", "input_dim"}


def reject_unknown(owner: str, received: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names every unknown argument and the known one nearest to it.

    Args:
        owner: the class that received the arguments, for the message.
        received: the names of the arguments, such as `kwargs`.
        known: the names that the class takes.

    Example:

    >>> reject_unknown("Dog", {"nane": "Rex"}, ["name", "age"])
    Traceback (most recent call last):
        ...
    ValueError: Dog has no argument `nane` (did you mean `name`?). It takes: age, name.
    """
    known = sorted(known)
    unknown = [name for name in received if name not in known]
    if not unknown:
        return
    nearest = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    hints = [
        f"`{name}`" + (f" (did you mean `{near[0]}`?)" if near else "")
        for name, near in nearest.items()
    ]
    raise ValueError(f"{owner} has no argument {', '.join(hints)}. It takes: {', '.join(known)}.")


def require_known(layer: keras.layers.Layer, received: Iterable[str]) -> None:
    """`reject_unknown` of the arguments that neither the layer nor its parents take."""
    parents = type(layer).__mro__
    parents = parents[: parents.index(keras.layers.Layer) + 1]
    parameters = [
        parameter
        for parent in parents
        if "__init__" in vars(parent)
        for parameter in list(inspect.signature(parent.__init__).parameters.values())[1:]
    ]
    known = {each.name for each in parameters if each.kind != each.VAR_KEYWORD}
    reject_unknown(type(layer).__name__, received, known | _OLD_KERAS_ARGUMENTS)


def require_sizes(layer: str, **sizes: Any) -> None:
    """`require_positive` of the sizes that are given; None stands for a default."""
    require_positive(layer, **{name: size for name, size in sizes.items() if size is not None})


def require_flag(layer: str, **flags: Any) -> None:
    """Raise a ValueError unless every flag is True or False: "no" would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"`{name}` of {layer}: expected True or False, received {flag!r}.")


def input_width(layer: str, input_shape: Any, axes: str = "(batch, time, hidden)") -> int:
    """The last size of a shape that has as many axes as `axes`, or "..." before the last one."""
    rank = axes.count(",") + 1
    fits = len(input_shape) >= rank if "..." in axes else len(input_shape) == rank
    width = input_shape[-1] if fits else None
    if width is None:
        raise ValueError(
            f"{layer} takes inputs of the shape {axes}, and its weights have sizes that come from "
            f"the last one. Received the shape {tuple(input_shape)}; pass one of that form, its "
            "last size known."
        )
    return int(width)


def split_heads(layer: str, name: str, total_dim: int, num_heads: int) -> int:
    """`total_dim // num_heads`, or a ValueError that says how to make it divide."""
    if total_dim % num_heads:
        raise ValueError(
            f"{layer} splits {total_dim} features over {num_heads} heads, which does not divide. "
            f"Pass `{name}`, or a `num_heads` that divides {total_dim}."
        )
    return total_dim // num_heads
