"""The benchmarks' literal baseline is what its equations say, and every script starts."""

import importlib.util
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import relative_error, tensorflow_only

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = ("accelerator", "decode", "layer", "memory", "op", "peers", "train")

pytestmark = tensorflow_only


def load(name):
    """A benchmark as a module of its own name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # NamedTuples and pickles look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    smaller = "--device" if name == "accelerator" else "--short"
    assert f"python benchmarks/{name}.py" in printed and smaller in printed


def test_literal_baseline_equals_its_equations():
    baselines, harness = load("baselines"), load("harness")
    model = baselines.literal_elita(vocabulary_size=23, num_layers=2, hidden_dim=10, num_heads=5)
    # Some logits lie beyond the clip, so that it shows.
    harness.randomize(model, scale=3.0)
    token_ids = np.random.default_rng(0).integers(23, size=(2, 7))
    expected = baselines.literal_elita_logits(model, token_ids)
    assert relative_error(model({"token_ids": token_ids}), expected) < 3e-5


@pytest.mark.long
def test_decoders_go_on_from_their_state():
    before = keras.config.dtype_policy()
    try:
        assert load("decode").parity("elita") < 3e-5
    finally:
        keras.config.set_dtype_policy(before)


def test_a_profile_knows_kinds_of_work():
    """The loop is a running sum as a whole, its sines and its own time included."""
    from tensorflow.compiler.xla.service import hlo_pb2

    profile = load("step_profile")

    @tf.function(jit_compile=True)
    def work(x):
        _, sums = tf.while_loop(
            lambda i, s: i < 5,
            lambda i, s: (i + 1, s + tf.sin(s) / 3),
            (0, x),
            maximum_iterations=9,
        )
        return tf.exp(x @ x) - 1, tf.reduce_sum(x, 0), sums, tf.transpose(x)

    ir = work.experimental_get_compiler_ir(tf.ones((40, 40)))
    module = hlo_pb2.HloModuleProto.FromString(ir(stage="optimized_hlo_serialized"))
    program = profile.Program(module)
    operations = [x for each in module.computations for x in each.instructions]
    assert set(profile.KINDS) <= {program.kind(x.name) for x in operations}
    loops = {program.kind(x.name) for x in operations if x.opcode == "while"}
    assert loops == {"running sums"} and program.kind("unknown") is None


def test_own_times_leave_out_what_an_event_contains():
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    profile = load("step_profile")
    plane = xplane_pb2.XPlane()
    for number, name in enumerate((profile.PROGRAM, "a", "b")):
        plane.event_metadata[number].name = name
    events = [(0, 0, 100), (1, 10, 60), (2, 20, 30), (2, 75, 5)]
    plane.lines.add().events.extend(
        xplane_pb2.XEvent(metadata_id=name, offset_ps=start, duration_ps=length)
        for name, start, length in events
    )
    found = [(name, round(seconds * 1e12)) for name, seconds in profile.own_times(plane)]
    assert sorted(found) == [(profile.PROGRAM, 100), ("a", 30), ("b", 5), ("b", 30)]


def test_parity_gate_refuses():
    harness = load("harness")
    for error in (1e-3, float("nan")):
        with pytest.raises(harness.ParityError, match="no figure"):
            harness.require_parity("case", error)
