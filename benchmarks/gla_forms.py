"""Time the chunked form of gated linear attention against its recurrent form, parity first.

python benchmarks/gla_forms.py: one JSON line per length, from one chunk up; forward and backward,
both forms in one run and in turn, the median of the runs.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import tensorflow as tf

from elita_tf.ops import gated_linear_attention, gated_linear_attention_recurrent

CHUNK_SIZE = 64
BATCH, HEADS, KEY_DIM, VALUE_DIM = 4, 4, 64, 128
# The relative error that float32 may have against the recurrent form in float64.
PARITY_BOUND = 3e-5


def inputs(time_steps: int, dtype: str) -> list[tf.Tensor]:
    """Query, key, value and log-decay with a half-life of tens of positions."""
    rng = np.random.default_rng(0)
    leading = (BATCH, time_steps, HEADS)
    query, key, gate = (rng.normal(size=(*leading, KEY_DIM)) for _ in range(3))
    value = rng.normal(size=(*leading, VALUE_DIM))
    arrays = query, key, value, -np.log1p(np.exp(-gate)) / 16
    return [tf.constant(array, dtype) for array in arrays]


def forward_backward(form: Callable, jit_compile: bool) -> Callable:
    """The compiled gradients of the squared outputs of a form."""

    @tf.function(jit_compile=jit_compile)
    def gradients(*arguments: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            loss = tf.reduce_sum(tf.square(form(*arguments)[0]))
        return tape.gradient(loss, arguments)

    return gradients


def parity_error(form: Callable, time_steps: int) -> float:
    """The largest relative error of a form's float32 gradients against float64."""
    exact = forward_backward(gated_linear_attention_recurrent, False)(
        *inputs(time_steps, "float64")
    )
    received = form(*inputs(time_steps, "float32"))
    return max(
        float(tf.norm(tf.cast(x, "float64") - y) / tf.norm(y))
        for x, y in zip(received, exact, strict=True)
    )


def seconds(function: Callable, arguments: list[tf.Tensor]) -> float:
    """Wall time of one call, its results read."""
    start = time.perf_counter()
    for gradient in function(*arguments):
        gradient.numpy()
    return time.perf_counter() - start


def main() -> None:
    """Check parity, time both forms, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    def chunked(*arguments: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return gated_linear_attention(*arguments, chunk_size=CHUNK_SIZE)

    forms = {
        "chunked": forward_backward(chunked, False),
        "chunked_xla": forward_backward(chunked, True),
        "recurrent": forward_backward(gated_linear_attention_recurrent, False),
    }
    for length in options.lengths:
        for name, form in forms.items():
            error = parity_error(form, length)
            if not error <= PARITY_BOUND:
                raise SystemExit(f"{name} at {length}: relative error {error}, no time is given")
        arguments = inputs(length, "float32")
        times = {name: [] for name in forms}
        for _ in range(options.runs):
            for name, form in forms.items():
                times[name].append(seconds(form, arguments))
        medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
        print(
            json.dumps(
                {
                    "op": "gated_linear_attention forward+backward",
                    "milliseconds": {name: round(value, 1) for name, value in medians.items()},
                    "recurrent_over_chunked": round(medians["recurrent"] / medians["chunked"], 1),
                    "length": length,
                    "batch": BATCH,
                    "heads": HEADS,
                    "key_dim": KEY_DIM,
                    "value_dim": VALUE_DIM,
                    "chunk_size": CHUNK_SIZE,
                    "runs": options.runs,
                    "cores": os.cpu_count(),
                    "tensorflow": version("tensorflow"),
                    "keras": version("keras"),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
