"""Sequences split over devices: exact as on one, and what is exchanged does not grow with them."""

import math
import re
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest

from elita_tf.experimental import (
    attention2_sequence_parallel,
    gated_linear_attention_sequence_parallel,
)
from tests import helpers, oracles
from tests.helpers import BATCH, HEADS, KEY_DIM, VALUE_DIM
from tests.ops import test_attention2, test_gated_linear_attention

DOCUMENT = Path(__file__).parents[2] / "docs" / "sequence_parallel.md"
# Pieces of 12, 6 and 3 positions.
TIME = 24
NUM_DEVICES = pytest.mark.parametrize("num_devices", [2, 4, 8])
jax_only = pytest.mark.skipif(helpers.BACKEND != "jax", reason="needs JAX's devices")


def mesh_of(num_devices, num_rows=1):
    import jax

    devices = np.reshape(jax.devices()[: num_rows * num_devices], (num_rows, num_devices))
    return jax.sharding.Mesh(devices, ("batch", "time"))


class Compiled:
    """`helpers.xla` for arrays that lie on a mesh, with the compiled program in `text`."""

    def __init__(self, mesh):
        self.mesh = mesh

    def __call__(self, function):
        import jax

        def call(*arguments):
            arguments = jax.tree.map(self._placed, arguments)
            program = jax.jit(function).lower(*arguments).compile()
            self.text = program.as_text()
            return program(*arguments)

        return call

    def _placed(self, x):
        import jax

        # Only sequences have as many positions in their second axis.
        axes = ("batch", "time") if x.ndim > 1 and x.shape[1] % TIME == 0 else ()
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(self.mesh, spec))


def exchanged_floats(program, num_devices):
    """Float64 numbers in the whole arrays that the collectives of a program work on, by kind."""
    floats = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", program):
        sizes = [
            math.prod(map(int, sizes.split(",")))
            for sizes in re.findall(r"f64\[([\d,]+)\]", shapes)
        ]
        # A reduce-scatter's result is one device's part.
        whole = sum(sizes) * (num_devices if kind == "reduce-scatter" else 1)
        floats[kind] = floats.get(kind, 0) + whole
    return floats


def attention2_case(time):
    inputs = test_attention2.make_inputs(time, state=True)
    # Nothing is kept by the first pieces of a row and by the whole last one.
    inputs[0][0, : time // 2] = -np.inf
    inputs[0][1, -time // 8 :] = -np.inf
    return attention2_sequence_parallel, oracles.attention2, oracles.attention2_gradients, inputs


def decayed_attention2_case(time):
    op, _, _, inputs = attention2_case(time)
    decay = test_attention2.make_decay("mixed", time)
    decay[0, time // 3], decay[1, time // 2] = -np.inf, -1e4
    inputs = [*inputs, decay]

    def gradients(inputs, cotangents):
        return oracles.attention2_gradients(inputs[:-1], cotangents, inputs[-1])

    def split(*inputs, **options):
        return op(*inputs[:-1], log_decay=inputs[-1], **options)

    return split, test_attention2.decayed(oracles.attention2), gradients, inputs


def gated_linear_attention_case(time):
    inputs = test_gated_linear_attention.make_inputs(time, state=True)
    inputs[3][0, time // 2] = -np.inf
    op = gated_linear_attention_sequence_parallel
    oracle = oracles.gated_linear_attention
    return op, oracle, oracles.gated_linear_attention_gradients, inputs


# Floats of a state, and of the decay that is exchanged with it.
SIZES = {
    attention2_case: (BATCH * HEADS * (VALUE_DIM + 2), 0),
    decayed_attention2_case: (BATCH * HEADS * (VALUE_DIM + 2), BATCH * HEADS),
    gated_linear_attention_case: (BATCH * HEADS * KEY_DIM * VALUE_DIM, BATCH * HEADS * KEY_DIM),
}
CASES = pytest.mark.parametrize("case", SIZES)


@jax_only
@CASES
@NUM_DEVICES
def test_as_on_one_device(case, num_devices):
    op, oracle, oracle_gradients, inputs = case(TIME)
    mesh = mesh_of(num_devices)
    expected = oracle(*inputs)
    cotangents = helpers.random_like(expected)
    split = partial(op, mesh=mesh, axis_name="time")
    compiled = Compiled(mesh)
    result = helpers.vjp(split, inputs, cotangents, compiled)
    helpers.assert_close(result.outputs, keras.tree.flatten(expected), 1e-12)
    helpers.assert_close(result.gradients, oracle_gradients(inputs, cotangents), 1e-12)
    assert exchanged_floats(compiled.text, num_devices) == {
        "all-gather": num_devices * sum(SIZES[case]),
        "reduce-scatter": num_devices * sum(SIZES[case]),
        "all-reduce": SIZES[case][0],
    }


@jax_only
@CASES
def test_batch_on_the_other_axis(case):
    op, oracle, oracle_gradients, inputs = case(TIME)
    mesh = mesh_of(4, num_rows=BATCH)
    expected = oracle(*inputs)
    cotangents = helpers.random_like(expected)
    split = partial(op, mesh=mesh, axis_name="time")
    result = helpers.vjp(split, inputs, cotangents, Compiled(mesh))
    helpers.assert_close(result.outputs, keras.tree.flatten(expected), 1e-12)
    helpers.assert_close(result.gradients, oracle_gradients(inputs, cotangents), 1e-12)


@jax_only
@CASES
def test_exchange_does_not_grow_with_the_length(case):
    op, _, _, inputs = case(3 * TIME)
    mesh = mesh_of(2)
    compiled = Compiled(mesh)
    compiled(partial(op, mesh=mesh, axis_name="time"))(*inputs)
    assert exchanged_floats(compiled.text, 2) == {"all-gather": 2 * sum(SIZES[case])}


@jax_only
def test_document_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(example, DOCUMENT.name, "exec"), names)
    assert names["outputs"].sharding.spec == names["by_time"].spec
    inputs = [np.asarray(names[name]) for name in ("query", "key", "value", "log_decay")]
    expected, _ = oracles.gated_linear_attention(*inputs)
    helpers.assert_close(names["outputs"], expected, 1e-12)


@pytest.mark.skipif(helpers.BACKEND == "jax", reason="about the other backends")
def test_other_backends_are_refused():
    inputs = test_attention2.make_inputs()
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        attention2_sequence_parallel(*inputs, mesh=None, axis_name="time")


@jax_only
@pytest.mark.parametrize("axis_name, message", [("row", "received 'row'"), ("time", "time of 13")])
def test_what_cannot_be_split(axis_name, message):
    inputs = test_gated_linear_attention.make_inputs(13)
    with pytest.raises(ValueError, match=message):
        gated_linear_attention_sequence_parallel(*inputs, mesh=mesh_of(2), axis_name=axis_name)
