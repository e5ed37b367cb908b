"""The ops: fast forms against recurrent, softmax and materialised ones, by length.

    python benchmarks/op.py [--short] [--output DIR]

attention2, gated_linear_attention, feed_forward2 and linear_cross_entropy, forward and
forward+backward, with TensorFlow's default compilation and with XLA, batch 1, width 256. Every call
is timed beside the others of its op and length, after all have agreed with a float64 definition to
3e-5; at lengths above 1,024 the fast form must also equal itself run in two pieces. `first` is the
first call, which traces and compiles; `median` is the steady state.

Left out: the gradient of the recurrent form under XLA, which TensorFlow does not have; beyond
length 4,096 the recurrent form (its time is linear in the length) and softmax (its scores would
take 8 GiB at the next length).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import baselines
import harness
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from elita_tf import ops

HEADS, WIDTH, GLA_HEADS, RANK, VOCABULARY = 8, 256, 4, 8, 2048
LENGTHS = (256, 1_024, 4_096, 16_384, 65_536, 131_072)
SHORT_LENGTHS = (256, 2_048)
# The longest sequence that is checked against its definition, which for two ops is a loop.
PARITY_LENGTH = 1_024
# Of the recurrent form and of softmax.
LONGEST_BASELINE = 4_096

# (batch, length) of attention2 with and without decays, 8 heads of 8 features.
DECAY_SIZES = ((128, 256), (1, 16_384))

Arguments = list[np.ndarray]


class Form(NamedTuple):
    """One way to compute something."""

    function: Callable[..., Any]
    # The definition it is checked against, in float64.
    exact: Callable[..., Any]
    arguments: Callable[[int], Arguments]
    longest: int = LENGTHS[-1]
    xla_gradient: bool = True


def outputs_of(op: Callable[..., Any]) -> Callable[..., Any]:
    """A sequence op without its final state."""
    return lambda *arguments: op(*arguments)[0]


def normal(*shapes: tuple[int, ...]) -> Arguments:
    """Standard normal float64 arrays."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def attention2_arguments(length: int) -> Arguments:
    """Three logits and the values."""
    logits = 1, length, HEADS
    return normal(logits, logits, logits, (*logits, WIDTH // HEADS))


def gla_arguments(length: int) -> Arguments:
    """The log-decays of gates around a half, as the layer makes them."""
    keys = 1, length, GLA_HEADS, WIDTH // 2 // GLA_HEADS
    query, key, gate, value = normal(keys, keys, keys, (*keys[:3], WIDTH // GLA_HEADS))
    return [query, key, value, -np.log1p(np.exp(-gate)) / 16]


def softmax_arguments(length: int) -> Arguments:
    """Query, key and value of the same width and heads."""
    return normal(*[(1, length, HEADS, WIDTH // HEADS)] * 3)


def feed_forward2_arguments(length: int) -> Arguments:
    """The two factors and the kernel."""
    return normal((length, WIDTH), (length, RANK), (WIDTH, RANK, WIDTH))


def cross_entropy_arguments(length: int) -> Arguments:
    """Hidden states, the kernel and labels; logits of about 1.6."""
    labels = np.random.default_rng(1).integers(VOCABULARY, size=length, dtype="int32")
    hidden, kernel = normal((length, WIDTH), (VOCABULARY, WIDTH))
    return [hidden, 0.1 * kernel, labels]


def in_two(op: Callable[..., Any]) -> Callable[..., Any]:
    """A sequence op on the two halves of its arguments, chained through the state."""

    def halves(*arguments: Any) -> Any:
        half = arguments[0].shape[1] // 2
        first, state = op(*(x[:, :half] for x in arguments))
        return tf.concat([first, op(*(x[:, half:] for x in arguments), state)[0]], axis=1)

    return halves


def feed_forward2_in_two(first: Any, second: Any, kernel: Any) -> Any:
    """The two halves of the tokens, one after the other."""
    pieces = zip(tf.split(first, 2), tf.split(second, 2), strict=True)
    return tf.concat([ops.feed_forward2(*piece, kernel) for piece in pieces], axis=0)


def cross_entropy_in_two(hidden: Any, kernel: Any, labels: Any) -> Any:
    """The mean of the losses of the two halves."""
    pieces = zip(tf.split(hidden, 2), tf.split(labels, 2), strict=True)
    return sum(ops.linear_cross_entropy(x, kernel, y) for x, y in pieces) / 2


def sequence_forms(fast: Callable, recurrent: Callable, arguments: Callable) -> dict[str, Form]:
    """The forms of an op over time; softmax, another function, is its own definition."""
    softmax = baselines.causal_softmax
    fast, loop = outputs_of(fast), outputs_of(recurrent)
    return {
        "fast": Form(fast, loop, arguments),
        "recurrent": Form(loop, loop, arguments, LONGEST_BASELINE, xla_gradient=False),
        "softmax": Form(softmax, softmax, softmax_arguments, LONGEST_BASELINE),
    }


def token_forms(fast: Callable, materialised: Callable, arguments: Callable) -> dict[str, Form]:
    """The forms of an op on tokens."""
    return {
        "fast": Form(fast, materialised, arguments),
        "materialised": Form(materialised, materialised, arguments),
    }


OPS: dict[str, dict[str, Form]] = {
    "attention2": sequence_forms(ops.attention2, ops.attention2_recurrent, attention2_arguments),
    "gated_linear_attention": sequence_forms(
        ops.gated_linear_attention, ops.gated_linear_attention_recurrent, gla_arguments
    ),
    "feed_forward2": token_forms(
        ops.feed_forward2, baselines.materialised_feed_forward2, feed_forward2_arguments
    ),
    "linear_cross_entropy": token_forms(
        ops.linear_cross_entropy, baselines.materialised_cross_entropy, cross_entropy_arguments
    ),
}
PIECES = {
    "attention2": in_two(ops.attention2),
    "gated_linear_attention": in_two(ops.gated_linear_attention),
    "feed_forward2": feed_forward2_in_two,
    "linear_cross_entropy": cross_entropy_in_two,
}
COMPILATION = {"default": False, "xla": True}


def tensors(arguments: Arguments, dtype: str) -> list[tf.Tensor]:
    """Floating arrays in `dtype`, labels as they are."""
    return [tf.constant(x, dtype if x.dtype.kind == "f" else x.dtype) for x in arguments]


def compilations(form: Form, transform: str) -> dict[str, Callable]:
    """The form's forward or forward+backward in the compilations that it has."""
    transformed, backward = harness.PASSES[transform], transform != "forward"
    kinds = {"default": False} if backward and not form.xla_gradient else COMPILATION
    return {kind: transformed(form.function, jit_compile) for kind, jit_compile in kinds.items()}


@functools.cache
def definition_error(op: str, length: int, transform: str) -> float:
    """The largest error of any form and compilation against its float64 definition."""
    errors = []
    for name, form in OPS[op].items():
        exact = harness.PASSES[transform](form.exact, False)
        expected = exact(*tensors(form.arguments(length), "float64"))
        for kind, call in compilations(form, transform).items():
            received = call(*tensors(form.arguments(length), "float32"))
            error = harness.relative_error(received, expected)
            errors.append(harness.require_parity(f"{op}, {name}, {kind}, {transform}", error))
    return max(errors)


def pieces_error(op: str, length: int, transform: str) -> float:
    """The error of the fast form run in two pieces against the whole."""
    form = OPS[op]["fast"]
    arguments = tensors(form.arguments(length), "float32")
    calls = (harness.PASSES[transform](f, False) for f in (PIECES[op], form.function))
    error = harness.relative_error(*(call(*arguments) for call in calls))
    return harness.require_parity(f"{op} in two pieces at {length}, {transform}", error)


def check(op: str, length: int, transform: str) -> float:
    """The largest error at a length; beyond the definition's length also that of the pieces."""
    error = definition_error(op, min(length, PARITY_LENGTH), transform)
    return max(error, pieces_error(op, length, transform)) if length > PARITY_LENGTH else error


def measure(op: str, length: int, transform: str, runs: int) -> dict[str, harness.Timing]:
    """First call and median of every form and compilation, timed in turn."""
    calls = {}
    for name, form in OPS[op].items():
        if length <= form.longest:
            arguments = tensors(form.arguments(length), "float32")
            for kind, call in compilations(form, transform).items():
                calls[f"{name}, {kind}"] = functools.partial(call, *arguments)
    return harness.side_by_side(calls, runs)


def decay_arguments(batch: int, length: int) -> Arguments:
    """Three logits, the values, and the log-decays of half-lives of 1 to 64 positions."""
    logits = batch, length, HEADS
    arguments = normal(logits, logits, logits, (*logits, 8))
    half_lives = np.geomspace(1, 64, HEADS)
    return [*arguments, np.broadcast_to(-np.log(2) / half_lives, logits)]


def measure_decay(batch: int, length: int, runs: int) -> dict[str, Any]:
    """Forward and backward under XLA with and without decays, timed in turn after parity."""
    forms = {
        "without decays": lambda *x: ops.attention2(*x[:4])[0] + 0 * x[4][..., None],
        "with decays": lambda *x: ops.attention2(*x[:4], log_decay=x[4])[0],
    }
    loop = harness.forward_backward(
        lambda *x: ops.attention2_recurrent(*x[:4], log_decay=x[4])[0], False
    )
    small = decay_arguments(2, 256)
    compiled = {name: harness.forward_backward(form, True) for name, form in forms.items()}
    error = harness.relative_error(
        compiled["with decays"](*tensors(small, "float32")), loop(*tensors(small, "float64"))
    )
    harness.require_parity("attention2 with decays", error)
    arguments = tensors(decay_arguments(batch, length), "float32")
    calls = {name: functools.partial(call, *arguments) for name, call in compiled.items()}
    medians = {name: 1e3 * x.median for name, x in harness.side_by_side(calls, runs).items()}
    return {
        "parity_error": error,
        "median_milliseconds": medians,
        "ratio": medians["with decays"] / medians["without decays"],
    }


def plot(lines: list[dict[str, Any]]) -> Figure:
    """A column per op; forward, forward+backward, and the first call of the latter."""
    figure, axes = harness.panels(3, len(OPS), "Ops: fast forms and what they replace, batch 1")
    rows = (
        ("forward", "median_milliseconds"),
        ("forward+backward", "median_milliseconds"),
        ("forward+backward", "first_milliseconds"),
    )
    for row, (transform, field) in zip(axes, rows, strict=True):
        for panel, op in zip(row, OPS, strict=True):
            chosen = [x for x in lines if (x["op"], x["pass"]) == (op, transform)]
            harness.curves(panel, chosen, field)
            what = "first call" if field.startswith("first") else transform
            panel.set(title=f"{op}\n{what}", ylabel="ms")
    for top, bottom in zip(axes[0], axes[-1], strict=True):
        labels = top.get_legend_handles_labels()
        bottom.legend(*labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.4), ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Check, time, write, length by length."""
    options = harness.parse(__doc__, arguments)
    report = harness.Report("op", options)
    lengths, runs = (SHORT_LENGTHS, 5) if options.short else (LENGTHS, 7)
    for op in OPS:
        for length in lengths:
            for transform in harness.PASSES:
                harness.progress(f"{op}, length {length}, {transform}")
                fields = {"op": op, "pass": transform, "length": length, "runs": runs}
                error = check(op, length, transform)
                timings = measure(op, length, transform, runs)
                report.write(
                    **fields,
                    parity_error=error,
                    median_milliseconds={k: 1e3 * x.median for k, x in timings.items()},
                    first_milliseconds={k: 1e3 * x.first for k, x in timings.items()},
                    shapes=[x.shape for x in OPS[op]["fast"].arguments(length)],
                )
    figure = plot(report.lines)
    for batch, length in DECAY_SIZES:
        harness.progress(f"attention2 with decays, batch {batch}, length {length}")
        fields = {"op": "attention2 with decays", "batch": batch, "length": length, "runs": 15}
        report.write(**fields, **measure_decay(batch, length, 15))
    report.save(figure)


if __name__ == "__main__":
    main()
