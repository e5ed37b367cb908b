"""Is the package right, and how fast is it, on the accelerator of this machine? `make check-gpu`.

    python benchmarks/accelerator.py [--device gpu|cpu] [--backends tensorflow jax] [--output DIR]

Three parts for each Keras backend, in processes of their own:

1. the numerical tests of the ops and the layers, matrix products in full float32 (no TF32);
2. `fit` of every named architecture under float32 and mixed_bfloat16: the loss falls;
3. the time of a step, tokens a second and the peak of the device's memory, through `fit`: the
   wikitext2 recipes as they are (at most 300K parameters, float32), and decoders of 12 blocks of
   width 768 by length (mixed_bfloat16). What does not fit into the memory is reported so, and
   greater lengths of that model are left out.

A part that fails is a line of its own, and the script ends with 1; no figure is given of a backend
whose tests or fits failed. `--device cpu` is a test of the script itself, in small sizes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BACKENDS = ("tensorflow", "jax")
POLICIES = ("float32", "mixed_bfloat16")
SPEED_NAMES = ("elita-gated", "gla", "transformer")
# The policy that each setting is timed in.
SPEED_POLICIES = {"300K": "float32", "large": "mixed_bfloat16"}
# Fits: sizes at which a step takes milliseconds, on a text that repeats itself.
FIT_SIZES = {"vocabulary_size": 50, "hidden_dim": 24, "num_heads": 3}
FIT_EPOCHS, FIT_ROWS, FIT_BATCH, FIT_LENGTH = 10, 48, 8, 32
FALLEN = 0.7  # of the first loss, at the most
# Speed: lengths of the large decoders, and the tokens that a step has at least.
SIZES = {
    "gpu": {
        "small": (),
        "large": ("num_layers=12", "hidden_dim=768", "num_heads=12", "rematerialize=true"),
        "lengths": (1_024, 16_384, 131_072),
        "tokens": 32_768,
        "steps": 12,
    },
    "cpu": {
        "small": ("batch_size=4",),
        "large": ("num_layers=2", "hidden_dim=48", "num_heads=4", "rematerialize=true"),
        "lengths": (256,),
        "tokens": 1_024,
        "steps": 4,
    },
}
SKIPPED_STEPS = 2  # the first compiles, the second warms up
TIME_LIMIT = 480  # seconds for one child


def environment(backend: str, device: str) -> dict[str, str]:
    """Of a child: its backend and device, full float32, and memory taken as it is needed."""
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"} if device == "cpu" else {}
    return {
        **os.environ,
        **hidden,
        "KERAS_BACKEND": backend,
        "NVIDIA_TF32_OVERRIDE": "0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
    }


def in_backend(backend: str, device: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """The JSON lines of this script as a child, `--child` with these arguments, as they come.

    Raises:
        RuntimeError: the child failed or took too long; the message has the end of what it said.
    """
    command = [sys.executable, __file__, "--device", device, "--child", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        child = subprocess.Popen(
            command,
            env=environment(backend, device),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        limit = threading.Timer(TIME_LIMIT, child.kill)
        limit.start()
        with child:
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        limit.cancel()
        if child.returncode:
            said.seek(0)
            raise RuntimeError(
                f"ended with {child.returncode} (after {TIME_LIMIT} s a child is killed): "
                f"{said.read().strip()[-2000:]}"
            )


# === In a child ===
def device_memory() -> int:
    """The peak of the device's memory so far in bytes; on a CPU, that of the process."""
    import harness
    import keras

    if keras.backend.backend() == "jax":
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else harness.peak_memory()
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return harness.peak_memory()


def devices() -> dict[str, Any]:
    """What the backend of this process computes on."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        device = jax.local_devices()[0]
        return {"platform": device.platform, "device": device.device_kind}
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    if not found:
        return {"platform": "cpu", "device": "cpu"}
    details = tf.config.experimental.get_device_details(found[0])
    return {"platform": "gpu", "device": details.get("device_name", "unknown")}


def fits(device: str) -> None:
    """A line for every architecture and policy: its losses, or an error."""
    import keras

    from elita_tf.models import architectures

    # The test of the script itself does without XLA, which takes half a minute for each.
    jit_compile = "auto" if device == "gpu" or keras.backend.backend() == "jax" else False

    for architecture in architectures:
        for policy in POLICIES:
            try:
                result = fit(architecture, policy, jit_compile)
            except Exception as error:
                result = {"error": repr(error)[:300]}
            print(json.dumps({"case": architecture, "policy": policy, **result}), flush=True)


def fit(architecture: str, policy: str, jit_compile: bool | str) -> dict[str, Any]:
    """The loss of the first and the last epoch, on a text that repeats itself."""
    import keras
    import numpy as np

    from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    arguments = {**architectures[architecture], **FIT_SIZES, "context_length": FIT_LENGTH}
    # A block of every mixer: each takes seconds to compile.
    arguments["num_layers"] = len(np.atleast_1d(arguments["mixers"]))
    model = ElitaCausalLM(ElitaBackbone(**arguments, dtype=policy))
    model.compile(keras.optimizers.Adam(3e-3), jit_compile=jit_compile)
    order = np.random.default_rng(0).permutation(FIT_SIZES["vocabulary_size"])
    text = np.resize(order, (FIT_ROWS, FIT_LENGTH + 1))
    inputs, labels = {"token_ids": text[:, :-1]}, text[:, 1:]
    history = model.fit(inputs, labels, FIT_BATCH, epochs=FIT_EPOCHS, verbose=0).history["loss"]
    return {"first_loss": float(history[0]), "last_loss": float(history[-1])}


def speed(name: str, policy: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """A step's median time and the peak of the memory, through `fit`."""
    import statistics

    import harness
    import keras
    import tensorflow as tf
    from cases import Case, StepTimes, load_recipe, token_windows

    if keras.backend.backend() == "jax":
        tf.config.set_visible_devices([], "GPU")  # TensorFlow makes the batches only
    suffix = "-tuned" if name == "elita-gated" else ""
    case = Case("speed", name, load_recipe(f"{name}-wikitext2{suffix}", overrides))

    class Synchronised(StepTimes):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])  # waits for the device
            super().on_train_batch_end(batch, logs)

    windows = token_windows(case.recipe, steps, None)
    batches = tf.data.Dataset.from_tensor_slices(({"token_ids": windows[:, :-1]}, windows[:, 1:]))
    batches = batches.batch(case.recipe.batch_size, drop_remainder=True)
    model, times = case.build(policy), Synchronised()
    model.fit(batches, callbacks=[times], verbose=0)
    step = statistics.median(times.seconds[SKIPPED_STEPS:])
    tokens = case.recipe.batch_size * case.recipe.context_length
    return {
        "parameters": model.count_params(),
        "batch": case.recipe.batch_size,
        "length": case.recipe.context_length,
        "step_seconds": step,
        "steps": steps - SKIPPED_STEPS,
        "first_step_seconds": times.seconds[0],
        "tokens_per_second": tokens / step,
        "peak_memory_bytes": device_memory(),
        "processor": harness.machine()["device"],
    }


def child(device: str, arguments: list[str]) -> None:
    """One of the three above, which prints lines of JSON."""
    what, *rest = arguments
    if what == "fits":
        fits(device)
    elif what == "devices":
        print(json.dumps(devices()), flush=True)
    else:
        name, policy, steps, *overrides = rest
        print(json.dumps(speed(name, policy, int(steps), overrides)), flush=True)


# === In the parent ===
class Check:
    """What was found, printed and written as it comes."""

    def __init__(self, device: str, output: Path) -> None:
        self.device, self.failures = device, 0
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / f"accelerator-{device}.jsonl"
        self.path.write_text("", encoding="utf-8")

    def write(self, failed: bool = False, **fields: Any) -> None:
        """One line, of which a failed one decides how the script ends."""
        self.failures += failed
        line = json.dumps({**fields, **({"failed": True} if failed else {})})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def tests(self, backend: str) -> None:
        """The numerical tests; on a CPU, where other targets run them, one case each of the ops."""
        folders = ["tests/ops", "tests/layers"] if self.device == "gpu" else ["tests/ops"]
        options = [] if self.device == "gpu" else ["--max-cases=1"]
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, *options],
            env=environment(backend, self.device),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        counts = {
            word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", child.stdout)
        }
        named = re.findall(r"^(?:FAILED|ERROR) (\S+)", child.stdout, re.MULTILINE)
        self.write(child.returncode != 0, part="tests", backend=backend, **counts, which=named)

    def fits(self, backend: str) -> None:
        """Every architecture under every policy."""
        fields = {"part": "fit", "backend": backend}
        try:
            for line in in_backend(backend, self.device, "fits"):
                # A loss that is not a number is no less than any other.
                fallen = "error" not in line and line["last_loss"] < FALLEN * line["first_loss"]
                self.write(not fallen, **fields, **line)
        except RuntimeError as error:
            self.write(True, **fields, error=str(error))

    def speeds(self, backend: str) -> None:
        """The recipes as they are, then larger ones by length."""
        sizes = SIZES[self.device]
        cases = [("300K", name, sizes["small"]) for name in SPEED_NAMES]
        for length in sizes["lengths"]:
            batch = max(1, sizes["tokens"] // length)
            overrides = (*sizes["large"], f"context_length={length}", f"batch_size={batch}")
            cases += [("large", name, overrides) for name in SPEED_NAMES]
        too_long: set[str] = set()
        for setting, name, overrides in cases:
            if name in too_long:
                continue
            policy, steps = SPEED_POLICIES[setting], str(sizes["steps"])
            fields = {"part": "speed", "backend": backend, "setting": setting, "case": name}
            fields |= {"policy": policy, "overrides": list(overrides)}
            command = "speed", name, policy, steps, *overrides
            try:
                (figures,) = in_backend(backend, self.device, *command)
                self.write(**fields, fits=True, **figures)
            except RuntimeError as error:
                out_of_memory = re.search("RESOURCE_EXHAUSTED|ResourceExhausted", str(error))
                too_long.add(name)
                self.write(not out_of_memory, **fields, fits=False, error=str(error)[-300:])


def main(arguments: list[str] | None = None) -> None:
    """Tests, fits, then figures of the backends that passed; ends with 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(SIZES), default="gpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.device, options.child)
        return
    check = Check(options.device, options.output)
    for backend in options.backends:
        try:
            (found,) = in_backend(backend, options.device, "devices")
        except RuntimeError as error:
            check.write(True, part="device", backend=backend, error=str(error))
            continue
        missing = options.device == "gpu" and found["platform"] not in ("gpu", "cuda", "rocm")
        check.write(missing, part="device", backend=backend, **found)
        if missing:
            continue
        before = check.failures
        check.tests(backend)
        check.fits(backend)
        if check.failures == before:
            check.speeds(backend)
    print(f"{check.failures} failures. Written: {check.path}", flush=True)
    sys.exit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
