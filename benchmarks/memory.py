"""Peak memory of one training step by length, ELiTA and GLA against the Transformer.

    python benchmarks/memory.py [--short] [--output DIR]

The wikitext2 recipes (at most 300K parameters) at equal tokens: 8,192 a step, or one window where
that is longer, the Transformer with a window of the whole length. Then, not with --short, ELiTA and
GLA with more than 10M parameters at length 131,072.

Every case takes one step through `model.fit`, compiled as in the recipe, in a child process that
may hold 12 GiB (20 GiB for the large ones); what needs more is reported as not fitting, and longer
sequences of that model are left out. The peak counts the interpreter and TensorFlow, whose share is
`memory_before_model_bytes`. A peak is printed only if the loss of the step equals the loss of the
same windows read in four pieces chained through the state.
"""

import resource
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import harness
import keras
import numpy as np
import tensorflow as tf
from cases import NAMES, Case, load_recipe, token_windows
from matplotlib.figure import Figure
from train import StepTimes

LENGTHS = (1_024, 4_096, 16_384, 65_536, 131_072)
SHORT_LENGTHS = (1_024, 4_096)
TOKENS = 8_192
LIMIT, LARGE_LIMIT = 12 * 2**30, 20 * 2**30
LARGE = ("num_layers=2", "hidden_dim=768")
PIECES = 4


def case_of(name: str, length: int, overrides: tuple[str, ...] = ()) -> Case:
    """A recipe at a length, with as many windows a batch as make up the tokens."""
    sizes = f"context_length={length}", f"batch_size={max(1, TOKENS // length)}"
    setting = "10M" if overrides else "300K"
    return Case(setting, name, load_recipe(f"{name}-wikitext2", [*sizes, *overrides]))


def measure(case: Case, limit: int) -> dict[str, Any]:
    """One step, its peak, and then, from the same weights, the loss in pieces."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
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
        "parity_error": harness.require_parity(f"{case.name} at {case.recipe.context_length}", error),
    }


def loss_in_pieces(model: keras.Model, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean loss of windows read piece by piece."""
    score = tf.function(model.token_losses_with_state)
    state, losses = model.backbone.get_initial_state(len(inputs)), []
    for piece, targets in zip(*(np.split(x, PIECES, 1) for x in (inputs, labels)), strict=True):
        piece_losses, state = score(tf.constant(piece), tf.constant(targets), state)
        losses.append(np.mean(piece_losses, dtype="float64"))
    return float(np.mean(losses))
