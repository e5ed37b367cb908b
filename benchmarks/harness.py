"""What all benchmarks share: the parity gate, timing side by side, child processes, results."""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Progress and results only; TensorFlow reads it at import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Every form at every length is a graph of its own, which TensorFlow would warn about.
tf.get_logger().setLevel("ERROR")

# The relative error that float32 may have against float64.
PARITY_BOUND = 3e-5
PACKAGES = ("tensorflow", "keras", "numpy")


class ParityError(Exception):
    """Two ways to compute the same thing disagree, so there is no figure to give."""


class Timing(NamedTuple):
    """Seconds of the first call, which traces and compiles, and the median of later ones."""

    first: float
    median: float


class Report:
    """The JSON lines of one benchmark, printed and written as they come."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.folder, self.is_short = name, options.output, options.short
        self.lines: list[dict[str, Any]] = []
        self._common = {"benchmark": name, "short": options.short}
        self._machine = machine()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{name}.jsonl"
        self.path.write_text("", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        """Print one result, and append it to the file together with what the machine is."""
        self.lines.append(fields)
        print(json.dumps(fields), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**self._common, **fields, **self._machine}) + "\n")

    def save(self, figure: Figure) -> None:
        """Write the benchmark's plot beside its lines."""
        path = self.folder / f"{self.name}.png"
        figure.savefig(path, dpi=120)
        print(f"Written: {self.path} and {path}", flush=True)


def parse(docstring: str, arguments: list[str] | None = None, **flags: str) -> argparse.Namespace:
    """The options of a benchmark, with `flags` of its own; all understand `train`'s `data_dir`."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    parser.add_argument("--data_dir", type=Path, help="folder with wiki.train.raw (train only)")
    for name, description in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=description)
    return parser.parse_args(arguments)


def machine() -> dict[str, Any]:
    """The processor and the versions, for every line of results."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "device": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def progress(message: str) -> None:
    """A line on the error stream, so that the results can be piped."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def relative_error(actual: Iterable[Any], expected: Iterable[Any]) -> float:
    """The largest norm of a difference over the norm of what was expected, in float64."""
    errors = []
    for received, target in zip(actual, expected, strict=True):
        received, target = np.asarray(received, "float64"), np.asarray(target, "float64")
        errors.append(np.linalg.norm(received - target) / np.linalg.norm(target))
    return float(np.max(errors))


def require_parity(what: str, error: float, bound: float = PARITY_BOUND) -> float:
    """The error, or an end of the run if it is above the bound or not a number."""
    if not error <= bound:
        raise ParityError(f"{what}: relative error {error:.2e} above {bound}, no figure is given")
    return error


def forward(function: Callable, jit_compile: bool) -> Callable:
    """The compiled function, its results as a list."""

    @tf.function(jit_compile=jit_compile)
    def outputs(*arguments: Any) -> list[Any]:
        return [function(*arguments)]

    return outputs


def forward_backward(function: Callable, jit_compile: bool, variables: Sequence = ()) -> Callable:
    """The compiled gradients of the mean square of a function's result.

    They are those of its floating arguments and of `variables`; a scalar result, such as a loss,
    is taken as it is.
    """

    @tf.function(jit_compile=jit_compile)
    def gradients(*arguments: Any) -> list[Any]:
        watched = [x for x in arguments if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            result = function(*arguments)
            result = tf.reduce_mean(tf.square(result)) if result.shape.rank else result
        return tape.gradient(result, [*watched, *variables])

    return gradients


PASSES = {"forward": forward, "forward+backward": forward_backward}


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, its results read to their end."""
    start = time.perf_counter()
    for result in keras.tree.flatten(call()):
        np.asarray(result)
    return time.perf_counter() - start


def side_by_side(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, Timing]:
    """Time several calls in turn, so that whatever else the machine does hits all alike.

    The first call of each is timed apart, and a second one warms up uncounted.
    """
    first = {name: seconds(call) for name, call in calls.items()}
    for call in calls.values():
        seconds(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: Timing(first[name], statistics.median(times[name])) for name in calls}


def in_child(function: Callable, *arguments: Any) -> Any:
    """The result of a function called in a process of its own, which then ends.

    A process on Linux starts with the peak memory of the one that started it. So the benchmarks
    that report peaks compute nothing in the parent, whose memory is that of the imports alone.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def in_child_within(seconds: float, function: Callable, *arguments: Any) -> Any:
    """As `in_child`; None, and the process is ended, if it takes longer than so many seconds.

    Raises:
        EOFError: the function failed; what it said is on the error stream.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    finally:
        process.kill()
        process.join()


def _send(sender: Any, function: Callable, *arguments: Any) -> None:
    sender.send(function(*arguments))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident memory of this process now, in bytes (Linux; elsewhere the largest so far)."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_memory()
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def gemm_rate(size: int = 2048, runs: int = 9) -> float:
    """FLOP/s of the fastest float32 product of two square matrices here and now."""
    matrix = tf.random.normal((size, size))
    product = tf.function(tf.matmul)
    seconds(lambda: product(matrix, matrix))
    return 2 * size**3 / min(seconds(lambda: product(matrix, matrix)) for _ in range(runs))


def randomize(model: keras.layers.Layer, scale: float = 0.1, seed: int = 0) -> None:
    """Draw every weight anew: fresh blocks of the package are the identity and hide their mixer."""
    rng = np.random.default_rng(seed)
    model.set_weights([scale * rng.standard_normal(w.shape) for w in model.get_weights()])


def panels(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure of small panels, an array (rows, columns) of axes."""
    figure = Figure(figsize=(1.5 + 4 * columns, 1 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title)
    return figure, axes


def curves(panel: Axes, lines: list[dict[str, Any]], field: str, x: str = "length") -> None:
    """What `field` says of every "name, compilation" by length: a colour a name, default dashed."""
    names = dict.fromkeys(name for line in lines for name in line[field])
    colors = {form: f"C{i}" for i, form in enumerate(dict.fromkeys(map(form_of, names)))}
    for name in names:
        points = [(line[x], line[field][name]) for line in lines if name in line[field]]
        style = "o--" if name.endswith(", default") else "o-"
        panel.plot(*zip(*points, strict=True), style, color=colors[form_of(name)], label=name)
    panel.set(xscale="log", yscale="log", xlabel=x)
    ticks = sorted({line[x] for line in lines})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30, fontsize=8)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    panel.grid(alpha=0.3)


def form_of(name: str) -> str:
    """The name without its compilation."""
    return name.partition(", ")[0]
