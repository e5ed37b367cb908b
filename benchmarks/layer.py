"""The layers against softmax attention: Keras' own and the package's, by length.

    python benchmarks/layer.py [--short] [--output DIR]

Attention2 and GatedLinearAttention, CausalSelfAttention with a window of the whole length and of at
most 256 positions, and keras.layers.MultiHeadAttention with a causal mask: batch 1, width 256,
8 heads, projections included, forward and forward+backward (inputs and weights), with TensorFlow's
default compilation and with XLA. The layers are timed in turn, after each has agreed with its
float64 twin to 3e-5 and, if it has a state, with itself step by step.

Left out: softmax without a window beyond length 4,096 (its scores would take 8 GiB at the next
length).
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from elita_tf import layers

WIDTH, HEADS = 256, 8
LENGTHS = (256, 1_024, 4_096, 16_384, 65_536, 131_072)
SHORT_LENGTHS = (256, 2_048)
LONGEST_SOFTMAX = 4_096
WINDOW = 256
PARITY_LENGTH = 128

MAKE: dict[str, Callable[..., keras.layers.Layer]] = {
    "Attention2": lambda length, **kwargs: layers.Attention2(HEADS, length, **kwargs),
    "GatedLinearAttention": lambda length, **kwargs: layers.GatedLinearAttention(**kwargs),
    "CausalSelfAttention": lambda length, **kwargs: layers.CausalSelfAttention(
        HEADS, length, **kwargs
    ),
    # Half of a short length, so that parity is about a window too.
    "CausalSelfAttention, window": lambda length, **kwargs: layers.CausalSelfAttention(
        HEADS, min(WINDOW, length // 2), **kwargs
    ),
    "MultiHeadAttention": lambda length, **kwargs: keras.layers.MultiHeadAttention(
        HEADS, WIDTH // HEADS, use_bias=False, **kwargs
    ),
}
SOFTMAX = ("CausalSelfAttention", "MultiHeadAttention")


def build(name: str, length: int, dtype: str = "float32") -> tuple[keras.layers.Layer, Callable]:
    """A built layer with weights that show, and its call on inputs."""
    layer = MAKE[name](length, dtype=dtype)
    shape = 1, length, WIDTH
    if name == "MultiHeadAttention":
        layer.build(shape, shape)
        call = functools.partial(_attend_to_itself, layer)
    else:
        layer.build(shape)
        call = layer
    harness.randomize(layer)
    return layer, call


def _attend_to_itself(layer: keras.layers.Layer, inputs: Any) -> Any:
    return layer(inputs, inputs, use_causal_mask=True)


def inputs_of(length: int, dtype: str = "float32") -> tf.Tensor:
    """Standard normal inputs, (1, length, width)."""
    return tf.constant(np.random.default_rng(1).standard_normal((1, length, WIDTH)), dtype)


def parity(name: str) -> float:
    """The largest error against the float64 twin, of every way it is timed and of its steps."""
    layer, call = build(name, PARITY_LENGTH)
    twin, exact = build(name, PARITY_LENGTH, "float64")
    inputs, inputs64 = inputs_of(PARITY_LENGTH), inputs_of(PARITY_LENGTH, "float64")
    errors = []
    for transform in harness.PASSES:
        expected = transformed(transform, exact, twin, False)(inputs64)
        for jit_compile in (False, True):
            received = transformed(transform, call, layer, jit_compile)(inputs)
            errors.append(harness.relative_error(received, expected))
    if hasattr(layer, "call_with_state"):
        state, steps = layer.get_initial_state(1), []
        advance = tf.function(layer.call_with_state)
        for position in range(PARITY_LENGTH):
            outputs, state = advance(inputs[:, position : position + 1], state)
            steps.append(outputs)
        errors.append(harness.relative_error([tf.concat(steps, 1)], [exact(inputs64)]))
    return harness.require_parity(name, max(errors))


def transformed(transform: str, call: Callable, layer: Any, jit_compile: bool) -> Callable:
    """The forward or the forward+backward of a layer, compiled."""
    if transform == "forward":
        return harness.forward(call, jit_compile)
    variables = [weight.value for weight in layer.trainable_weights]
    return harness.forward_backward(call, jit_compile, variables)


def measure(length: int, transform: str, runs: int) -> dict[str, harness.Timing]:
    """First call and median of every layer and compilation, timed in turn."""
    calls, inputs = {}, inputs_of(length)
    for name in MAKE:
        if length <= LONGEST_SOFTMAX or name not in SOFTMAX:
            layer, call = build(name, length)
            for kind, jit_compile in {"default": False, "xla": True}.items():
                compiled = transformed(transform, call, layer, jit_compile)
                calls[f"{name}, {kind}"] = functools.partial(compiled, inputs)
    return harness.side_by_side(calls, runs)


def plot(lines: list[dict[str, Any]]) -> Figure:
    """Forward, forward+backward, and the first call of the latter."""
    figure, axes = harness.panels(1, 3, "Layers with their projections: batch 1, width 256")
    panels = (
        ("forward", "median_milliseconds", "forward"),
        ("forward+backward", "median_milliseconds", "forward+backward"),
        ("forward+backward", "first_milliseconds", "forward+backward, first call"),
    )
    for panel, (transform, field, title) in zip(axes[0], panels, strict=True):
        harness.curves(panel, [line for line in lines if line["pass"] == transform], field)
        panel.set(title=title, ylabel="ms")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Check, time, write, length by length."""
    options = harness.parse(__doc__, arguments)
    report = harness.Report("layer", options)
    lengths, runs = (SHORT_LENGTHS, 5) if options.short else (LENGTHS, 7)
    harness.progress("parity")
    errors = {name: parity(name) for name in MAKE}
    for length in lengths:
        for transform in harness.PASSES:
            harness.progress(f"length {length}, {transform}")
            timings = measure(length, transform, runs)
            report.write(
                **{"pass": transform},
                length=length,
                width=WIDTH,
                batch=1,
                runs=runs,
                parity_error=errors,
                median_milliseconds={k: 1e3 * x.median for k, x in timings.items()},
                first_milliseconds={k: 1e3 * x.first for k, x in timings.items()},
            )
    report.save(plot(report.lines))


if __name__ == "__main__":
    main()
