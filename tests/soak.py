"""Does the memory of a long process settle? fit, evaluate and generate, over and over.

    python tests/soak.py [--minutes 45] [--output DIR]

For half of the time one language model per architecture is trained, evaluated and generates, in
turns; in the other half ever new ones are made and dropped. Writes a line a round, with the
resident memory and the open files of the process, to `DIR/soak.csv`, and the curves to
`DIR/soak.png`. Ends with 1 if in either half the memory rises by more than 2 % from the third to
the last quarter, or if the number of open files rises.

TensorFlow keeps two things of models of any kind that are gone: the kernels of its functions (in
a plain Keras model of 21 Dense layers 5 MB), which `keras.utils.clear_session` drops, and every
custom gradient with its whole graph (its issue 97697; Keras' own silu has one), which no public
call drops. Both are dropped between new models here, to see whether anything else grows. And what
malloc holds free is given back before the memory is read, for it varies by a tenth of the whole.
"""

import argparse
import csv
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from matplotlib.figure import Figure
from tensorflow.python.framework import ops as framework

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures

VOCABULARY, LENGTH, BATCH, WINDOWS, WIDTH, HEADS = 97, 48, 4, 40, 32, 4
SIZES = {"hidden_dim": WIDTH, "num_heads": HEADS, "context_length": LENGTH}
STAY, NEW = "models that stay", "new models"
QUARTERS, RISE = 4, 0.02


class Round(NamedTuple):
    """What is written of one round."""

    kind: str
    minutes: float
    resident_megabytes: float
    open_files: int


def language_model(architecture: str) -> ElitaCausalLM:
    """A small model; without XLA, whose programs TensorFlow keeps too."""
    model = ElitaCausalLM(ElitaBackbone(VOCABULARY, **{**architectures[architecture], **SIZES}))
    model.compile(jit_compile=False)
    return model


def live(model: ElitaCausalLM, number: int) -> None:
    """Train, evaluate and generate."""
    rng = np.random.default_rng(number)
    windows = rng.integers(VOCABULARY, size=(WINDOWS, LENGTH + 1))
    inputs, labels = {"token_ids": windows[:, :-1]}, windows[:, 1:]
    model.fit(inputs, labels, BATCH, epochs=3, verbose=0)
    model.evaluate(inputs, labels, BATCH, verbose=0)
    prompt = {"token_ids": windows[:2, :8], "padding_mask": np.ones((2, 8), "bool")}
    model.generate(prompt, max_length=LENGTH, stop_token_ids=None)


def forget() -> None:
    """Drop TensorFlow's kernels, and empty its registry of custom gradients."""
    keras.utils.clear_session()
    registry = framework.gradient_registry._registry
    for name in [name for name in registry if name.startswith("CustomGradient-")]:
        del registry[name]


def resident_megabytes() -> float:
    """Resident memory of this process, without what malloc holds free (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(minutes: float, path: Path) -> list[Round]:
    """Rounds until the time is over, each written as it ends."""
    names, start, rounds = list(architectures), time.monotonic(), []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Round._fields)

        def go_on(until: float, kind: str, make: Callable[[int], ElitaCausalLM]) -> None:
            while time.monotonic() - start < 60 * until:
                number = len(rounds)
                live(make(number), number)
                gc.collect()
                elapsed, files = (time.monotonic() - start) / 60, len(os.listdir("/proc/self/fd"))
                rounds.append(Round(kind, elapsed, resident_megabytes(), files))
                writer.writerow(rounds[-1])
                file.flush()
                print(rounds[-1], flush=True)

        def new_model(number: int) -> ElitaCausalLM:
            forget()
            return language_model(names[number % len(names)])

        models = [language_model(name) for name in names]
        go_on(minutes / 2, STAY, lambda number: models[number % len(models)])
        models.clear()
        go_on(minutes, NEW, new_model)
    return rounds


def verdict(rounds: list[Round]) -> list[str]:
    """What does not settle."""
    problems = []
    for kind in (STAY, NEW):
        memory = [x.resident_megabytes for x in rounds if x.kind == kind]
        if len(memory) < QUARTERS:
            problems.append(f"{len(memory)} rounds of {kind} are too few: give it more --minutes")
            continue
        medians = [float(np.median(quarter)) for quarter in np.array_split(memory, QUARTERS)]
        print(f"Quarters of the time of {kind}: {', '.join(f'{x:.0f}' for x in medians)} MB")
        third, last = medians[-2:]
        if last > third * (1 + RISE):
            problems.append(f"memory of {kind} rises from {third:.0f} to {last:.0f} MB")
    files = [x.open_files for x in rounds]
    half = len(files) // 2
    if max(files[half:]) > max(files[:half]):
        problems.append(f"open files rise to {max(files)}")
    return problems


def plot(rounds: list[Round]) -> Figure:
    """Memory and open files over time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for kind in (STAY, NEW):
        chosen = [x for x in rounds if x.kind == kind]
        memory = [x.resident_megabytes for x in chosen]
        panel.plot([x.minutes for x in chosen], memory, ".", label=f"{kind}: resident MB")
    panel.plot([x.minutes for x in rounds], [x.open_files for x in rounds], label="open files")
    panel.set(xlabel="minutes", ylim=(0, None), title="fit, evaluate, generate in one process")
    panel.legend()
    return figure


def main() -> None:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rounds = soak(options.minutes, options.output / "soak.csv")
    plot(rounds).savefig(options.output / "soak.png", dpi=120)
    problems = verdict(rounds)
    print("; ".join(problems) or "settled")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
