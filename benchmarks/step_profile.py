"""Where a training step goes, by kind of work: `train.py --profile`.

One step of `fit` under TensorFlow's profiler, on all cores. XLA's program, which the profile holds
too, says of every operation what it consists of, and the time of an operation is its own: without
those that it contains. What the cores did not work in between is "waiting": for one another, for
memory to be set aside, and for what surrounds the program.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import keras
import numpy as np
import tensorflow as tf
from cases import Case
from matplotlib.figure import Figure

# The first compiles, the second and the third warm up, the last is profiled.
STEPS = 4
PROGRAM = "CpuExecutable::ExecuteAsyncOnStream"
WAITING = "waiting"
# An operation is of the first kind that it has something of. All that a loop without matrix
# products does is a running sum; the other loops go over slices of the tokens.
KINDS = {
    "matrix products": {"dot", "convolution", "custom-call"},
    "exponentials": {"exponential", "exponential-minus-one", "log", "log-plus-one", "logistic"},
    "running sums": {"in a loop"},
    "sums": {"reduce", "reduce-window"},  # XLA adds in two steps, by windows first
}
ELEMENTS, COPIES = "element by element", "copies"
MOVES = {"copy", "transpose", "concatenate", "pad", "slice", "reshape", "gather", "scatter"} | {
    *("dynamic-slice", "dynamic-update-slice", "reverse", "select-and-scatter"),
}
# In a fusion these decide nothing.
FREE = {"parameter", "bitcast", "broadcast", "constant", "fusion", "tuple", "get-tuple-element"}


class Program:
    """The operations of a program of XLA, by their names."""

    def __init__(self, module: Any) -> None:
        self._called = {each.id: each for each in module.computations}
        self._operations = {x.name: x for each in module.computations for x in each.instructions}
        loops = [x for x in self._operations.values() if x.opcode == "while"]
        sums = [x for x in loops if not self._opcodes(x) & KINDS["matrix products"]]
        inner = (x for loop in sums for each in loop.called_computation_ids for x in self._in(each))
        self._in_loops = {x.name for x in (*sums, *inner)}

    def _opcodes(self, operation: Any) -> set[str]:
        """What an operation consists of, those that it calls included."""
        inner = (x for each in operation.called_computation_ids for x in self._in(each))
        return {operation.opcode}.union(*map(self._opcodes, inner))

    def _in(self, computation: int) -> Iterable[Any]:
        return self._called[computation].instructions

    def kind(self, name: str) -> str | None:
        """The kind of work of an operation; None if it is none of the program's."""
        if name not in self._operations:
            return None
        operation = self._operations[name]
        # The time of a loop itself is what lies between the operations in it.
        opcodes = {operation.opcode} if operation.opcode == "while" else self._opcodes(operation)
        opcodes |= {"in a loop"} if name in self._in_loops else set()
        for kind, members in KINDS.items():
            if opcodes & members:
                return kind
        return COPIES if opcodes - FREE <= MOVES else ELEMENTS


def profile(case: Case, windows: np.ndarray) -> dict[str, Any]:
    """Seconds of the cores by kind of work in one step, and of the step by the clock."""
    folder = tempfile.mkdtemp()

    class Profiled(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == STEPS - 1:
                tf.profiler.experimental.start(folder)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])  # waits for the step
            if batch == STEPS - 1:
                tf.profiler.experimental.stop()

    inputs = {"token_ids": windows[:, :-1]}, windows[:, 1:]
    batches = tf.data.Dataset.from_tensor_slices(inputs)
    batches = batches.batch(case.recipe.batch_size, drop_remainder=True)
    case.build().fit(batches, callbacks=[Profiled()], verbose=0)
    (path,) = Path(folder).rglob("*.xplane.pb")
    return kinds_of(path)


def kinds_of(path: Path) -> dict[str, Any]:
    """Reads a profile of one step: see `profile`.

    Raises:
        ValueError: the profile has no program of XLA, or more than one.
    """
    from tensorflow.compiler.xla.service import hlo_pb2
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    planes = {each.name: each for each in xplane_pb2.XSpace.FromString(path.read_bytes()).planes}
    programs = list(planes["/host:metadata"].event_metadata.values())
    if len(programs) != 1:
        names = [each.name for each in programs]
        raise ValueError(f"{path}: expected the profile of one program, received {names}.")
    program = Program(hlo_pb2.HloProto.FromString(programs[0].stats[0].bytes_value).hlo_module)
    kinds: Counter[str] = Counter()
    step = 0.0
    for name, seconds in own_times(planes["/host:CPU"]):
        if kind := program.kind(name):
            kinds[kind] += seconds
        elif name == PROGRAM:
            step += seconds
    cores = len(os.sched_getaffinity(0))
    kinds[WAITING] = max(0.0, cores * step - sum(kinds.values()))
    return {"step_seconds": step, "cores_used": cores, "core_seconds": dict(kinds.most_common())}


def own_times(plane: Any) -> Iterator[tuple[str, float]]:
    """Every event of a profile with its own seconds; the program with those by the clock."""
    for line in plane.lines:
        names = {x: each.name for x, each in plane.event_metadata.items()}
        events = sorted(line.events, key=lambda event: (event.offset_ps, -event.duration_ps))
        own = [event.duration_ps for event in events]
        open_events: list[int] = []
        for place, event in enumerate(events):
            while open_events and _end(events[open_events[-1]]) <= event.offset_ps:
                open_events.pop()
            if open_events and names[events[open_events[-1]].metadata_id] != PROGRAM:
                own[open_events[-1]] -= event.duration_ps
            open_events.append(place)
        for event, picoseconds in zip(events, own, strict=True):
            yield names[event.metadata_id], picoseconds / 1e12


def _end(event: Any) -> int:
    return event.offset_ps + event.duration_ps


def plot(lines: list[dict[str, Any]]) -> Figure:
    """A bar of every case, its seconds by kind of work."""
    kinds = (*KINDS, ELEMENTS, COPIES, WAITING)
    figure, ((panel,),) = harness.panels(1, 1, "A training step by kind of work")
    figure.set_size_inches(9, 4)
    names = [line["case"] for line in lines][::-1]
    left = np.zeros(len(names))
    for kind in kinds:
        values = [line["core_seconds"].get(kind, 0.0) for line in lines][::-1]
        panel.barh(names, values, left=left, label=kind)
        left += values
    panel.set(xlabel="seconds of all cores")
    figure.legend(loc="outside right center", fontsize=8)
    return figure
