"""Peak memory of one training step by length, ELiTA and GLA against the Transformer.

    python benchmarks/memory.py [--short] [--output DIR]

The wikitext2 recipes (at most 300K parameters) at equal tokens: 8,192 a step, or one window where
that is longer, the Transformer with a window of the whole length. Then, not with --short, ELiTA and
GLA with more than 10M parameters at length 131,072; and the loss alone, with its gradients, at
GPT-2's vocabulary, against the loss of materialised logits.

Every case takes one step through `model.fit`, compiled as in the recipe, in a child process that
may ask for 8 GiB; what needs more is reported as not fitting, and greater lengths of that model
are left out. The peak counts the interpreter and TensorFlow, whose share is
`memory_before_model_bytes`. It is printed only if the loss of the step equals the loss of the same
windows read in four pieces chained through the state; for the loss alone, if value and gradients
equal those in float64.
"""

import resource
import statistics
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import baselines
import harness
import keras
import numpy as np
import tensorflow as tf
from cases import NAMES, Case, StepTimes, load_recipe, token_windows
from matplotlib.figure import Figure

from elita_tf import ops

LENGTHS = (1_024, 4_096, 16_384, 65_536, 131_072)
SHORT_LENGTHS = (1_024, 4_096)
TOKENS = 8_192
LIMIT = 8 * 2**30
# More than 10M parameters: 12.7M and 10.5M.
LARGE_BLOCKS = {"elita": 4, "gla": 3}
LARGE = ("hidden_dim=512", "rematerialize=true")
PIECES = 4
# The loss alone: tokens, width and vocabulary; those whose loss is checked; and those that make
# the compiler load what it needs, in several slices too.
LOSS_SIZES, LOSS_PARITY_SIZES, LOSS_WARM_UP = (
    (8_192, 768, 50_257),
    (512, 768, 50_257),
    (1_024, 8, 8_192),
)
LOSSES = {
    "linear_cross_entropy": ops.linear_cross_entropy,
    "materialised": baselines.materialised_cross_entropy,
}
LOSS_RUNS = 5


def case_of(name: str, length: int, overrides: tuple[str, ...] = ()) -> Case:
    """A recipe at a length, with as many windows a batch as make up the tokens."""
    sizes = f"context_length={length}", f"batch_size={max(1, TOKENS // length)}"
    setting = "10M" if overrides else "300K"
    return Case(setting, name, load_recipe(f"{name}-wikitext2", [*sizes, *overrides]))


def measure(case: Case) -> dict[str, Any]:
    """One step, its peak, and then, from the same weights, the loss in pieces."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    before = harness.peak_memory()
    windows = token_windows(case.recipe, 1, None)
    model, times = case.build(), StepTimes()
    harness.randomize(model)
    weights = model.get_weights()
    inputs, labels = windows[:, :-1], windows[:, 1:]
    history = model.fit(
        {"token_ids": inputs}, labels, len(labels), shuffle=False, callbacks=[times], verbose=0
    )
    peak = harness.peak_memory()
    model.set_weights(weights)
    (loss,) = history.history["loss"]
    error = harness.relative_error([loss], [loss_in_pieces(model, inputs, labels)])
    return {
        "peak_memory_bytes": peak,
        "memory_before_model_bytes": before,
        "first_step_seconds": times.seconds[0],
        "parameters": model.count_params(),
        "loss": loss,
        "parity_error": harness.require_parity(case.name, error),
    }


def loss_in_pieces(model: keras.Model, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean loss of windows read piece by piece."""
    score = tf.function(model.token_losses_with_state)
    state, losses = model.backbone.get_initial_state(len(inputs)), []
    for piece, targets in zip(*(np.split(x, PIECES, 1) for x in (inputs, labels)), strict=True):
        piece_losses, state = score(tf.constant(piece), tf.constant(targets), state)
        losses.append(np.mean(piece_losses, dtype="float64"))
    return float(np.mean(losses))


def loss_arguments(tokens: int, width: int, vocabulary: int) -> list[tf.Tensor]:
    """Hidden states, the kernel and labels; logits of about 1."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.standard_normal((n, width), "float32") for n in (tokens, vocabulary))
    kernel /= np.float32(width**0.5)
    return [tf.constant(x) for x in (hidden, kernel, rng.integers(vocabulary, size=tokens))]


def measure_loss(name: str) -> dict[str, Any]:
    """Memory above that of the arguments, and the median time, of a loss and its gradients."""

    def loss_and_gradients(hidden: Any, kernel: Any, labels: Any, loss: Any = LOSSES[name]) -> list:
        with tf.GradientTape() as tape:
            tape.watch([hidden, kernel])
            value = loss(hidden, kernel, labels)
        return [value, *tape.gradient(value, [hidden, kernel])]

    call = tf.function(loss_and_gradients, jit_compile=True)
    harness.seconds(lambda: call(*loss_arguments(*LOSS_WARM_UP)))
    arguments = loss_arguments(*LOSS_SIZES)
    before = harness.resident_memory()
    times = [harness.seconds(lambda: call(*arguments)) for _ in range(1 + LOSS_RUNS)]
    peak = harness.peak_memory()
    arguments = loss_arguments(*LOSS_PARITY_SIZES)
    exact = [tf.cast(x, "float64") for x in arguments[:2]]
    expected = loss_and_gradients(*exact, arguments[2], LOSSES["materialised"])
    error = harness.relative_error(call(*arguments), expected)
    return {
        "peak_above_arguments_bytes": peak - before,
        "median_seconds": statistics.median(times[1:]),
        "runs": LOSS_RUNS,
        "parity_error": harness.require_parity(name, error),
    }


def run(cases: list[Case], report: harness.Report) -> None:
    """Every case in a child; a model that did not fit is not tried at a greater length."""
    too_long: set[tuple[str, str]] = set()
    for case in cases:
        recipe, key = case.recipe, (case.setting, case.name)
        sizes = {
            "setting": case.setting,
            "case": case.name,
            "length": recipe.context_length,
            "batch": recipe.batch_size,
            "width": recipe.hidden_dim,
            "blocks": recipe.num_layers,
            "vocabulary_size": recipe.vocabulary_size,
        }
        if key in too_long:
            continue
        harness.progress(f"{case.setting}: {case.name}, length {recipe.context_length}")
        try:
            report.write(**sizes, fits=True, **harness.in_child(measure, case))
        except (BrokenProcessPool, MemoryError, tf.errors.ResourceExhaustedError):
            too_long.add(key)
            report.write(**sizes, fits=False, limit_bytes=LIMIT)


def plot(lines: list[dict[str, Any]]) -> Figure:
    """Peaks by length, with the limit, and the large models as single points."""
    figure, ((panel,),) = harness.panels(1, 1, "Peak memory of a training step")
    lengths = sorted({line["length"] for line in lines})
    merged = [
        {
            "length": length,
            "peak": {
                f"{line['case']} ({line['setting']})": line["peak_memory_bytes"] / 1e9
                for line in lines
                if line["length"] == length and line["fits"]
            },
        }
        for length in lengths
    ]
    harness.curves(panel, merged, "peak")
    before = next(line["memory_before_model_bytes"] for line in lines if line["fits"])
    panel.axhline(before / 1e9, color="grey", linestyle=":", label="before the model")
    panel.axhline(LIMIT / 1e9, color="grey", linestyle="--", label="limit")
    panel.set(title=f"{TOKENS:,} tokens, or one window if longer", ylabel="GB")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run every case and write."""
    options = harness.parse(__doc__, arguments)
    report = harness.Report("memory", options)
    lengths = SHORT_LENGTHS if options.short else LENGTHS
    cases = [case_of(name, length) for length in lengths for name in NAMES]
    if not options.short:
        for name, blocks in LARGE_BLOCKS.items():
            cases.append(case_of(name, LENGTHS[-1], (f"num_layers={blocks}", *LARGE)))
    run(cases, report)
    report.save(plot(report.lines))
    if not options.short:
        for name in LOSSES:
            harness.progress(f"the loss alone: {name}")
            sizes = dict(zip(("tokens", "width", "vocabulary_size"), LOSS_SIZES, strict=True))
            report.write(setting="loss", case=name, **sizes, **harness.in_child(measure_loss, name))


if __name__ == "__main__":
    main()
