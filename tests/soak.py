"""Does the memory of a long process settle? fit, evaluate and generate, over and over.

    python tests/soak.py [--minutes 45] [--output DIR]

For two thirds of the time one language model per architecture is trained, evaluated and generates,
in turns. In the last third ever new ones are made and dropped, and then plain Keras models of the
same depth: TensorFlow keeps what it has traced of any model until the process ends, so memory must
rise here, and the plain models tell by how much it does for everybody. Writes a line a round, with
the resident memory and the open files of the process, to `DIR/soak.csv`, and both curves to
`DIR/soak.png`. Ends with 1 if the models that stay have the memory still rise by more than 2 % from
the third to the last quarter of their time, or if the number of open files rises.
"""

import argparse
import csv
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

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures

VOCABULARY, LENGTH, BATCH, WINDOWS, WIDTH, HEADS = 97, 48, 4, 40, 32, 4
SIZES = {"hidden_dim": WIDTH, "num_heads": HEADS, "context_length": LENGTH}
STAY, NEW, KERAS = "models that stay", "new models", "new plain Keras models"
RISE = 0.02


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


def plain_model() -> keras.Model:
    """A Transformer of Keras' layers alone."""
    token_ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(token_ids)
    for _ in range(architectures["transformer"]["num_layers"]):
        normed = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        x += attention(normed, normed, use_causal_mask=True)
        x += keras.layers.Dense(WIDTH)(keras.layers.Dense(2 * WIDTH, "silu")(x))
    model = keras.Model(token_ids, keras.layers.Dense(VOCABULARY)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False)
    return model


def live(model: keras.Model, number: int) -> None:
    """Train, evaluate and, if it is a language model, generate."""
    rng = np.random.default_rng(number)
    windows = rng.integers(VOCABULARY, size=(WINDOWS, LENGTH + 1))
    inputs, labels = windows[:, :-1], windows[:, 1:]
    generates = isinstance(model, ElitaCausalLM)
    inputs = {"token_ids": inputs} if generates else inputs
    model.fit(inputs, labels, BATCH, epochs=3, verbose=0)
    model.evaluate(inputs, labels, BATCH, verbose=0)
    if generates:
        prompt = {"token_ids": windows[:2, :8], "padding_mask": np.ones((2, 8), "bool")}
        model.generate(prompt, max_length=LENGTH, stop_token_ids=None)


def resident_megabytes() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(minutes: float, path: Path) -> list[Round]:
    """Rounds until the time is over, each written as it ends."""
    names, start, rounds = list(architectures), time.monotonic(), []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Round._fields)

        def go_on(until: float, kind: str, make: Callable[[int], keras.Model]) -> None:
            while time.monotonic() - start < 60 * until:
                number = len(rounds)
                live(make(number), number)
                gc.collect()
                elapsed, files = (time.monotonic() - start) / 60, len(os.listdir("/proc/self/fd"))
                rounds.append(Round(kind, elapsed, resident_megabytes(), files))
                writer.writerow(rounds[-1])
                file.flush()
                print(rounds[-1], flush=True)

        models = [language_model(name) for name in names]
        go_on(minutes * 2 / 3, STAY, lambda number: models[number % len(models)])
        go_on(minutes * 5 / 6, NEW, lambda number: language_model(names[number % len(names)]))
        go_on(minutes, KERAS, lambda number: plain_model())
    return rounds


def growth(rounds: list[Round], kind: str) -> float:
    """Megabytes that a round of a kind adds, by the line through all of them."""
    memory = [x.resident_megabytes for x in rounds if x.kind == kind]
    return float(np.polyfit(range(len(memory)), memory, 1)[0]) if len(memory) > 1 else float("nan")


def verdict(rounds: list[Round]) -> list[str]:
    """What does not settle."""
    quarters = np.array_split([x.resident_megabytes for x in rounds if x.kind == STAY], 4)
    medians = [float(np.median(quarter)) for quarter in quarters]
    print(f"Quarters of the time of {STAY}: {', '.join(f'{x:.0f}' for x in medians)} MB")
    for kind in (NEW, KERAS):
        print(f"A round of {kind} adds {growth(rounds, kind):.0f} MB")
    files = [x.open_files for x in rounds]
    half, problems = len(files) // 2, []
    if medians[3] > medians[2] * (1 + RISE):
        problems.append(f"memory rises from {medians[2]:.0f} to {medians[3]:.0f} MB")
    if max(files[half:]) > max(files[:half]):
        problems.append(f"open files rise to {max(files)}")
    return problems


def plot(rounds: list[Round]) -> Figure:
    """Memory and open files over time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for kind in (STAY, NEW, KERAS):
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
