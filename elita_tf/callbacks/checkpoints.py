"""A callback that saves the whole state of training, and goes on from it step for step."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import keras
import numpy as np

from elita_tf.callbacks.checkpoint_files import Checkpoint, save_checkpoint

Logs = dict[str, Any] | None

# Keys of a model's configuration that say what a layer computes, and keys that do not.
_KINDS = ("class_name", "activation", "recurrent_activation")
_IGNORED = re.compile(
    "build_config|compile_config|dtype|inbound_nodes|preprocessor"
    "|.*(initializer|regularizer|constraint)"
)


class Resumable(Protocol):
    """A callback with a state of its own: a dict of values that JSON can store."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""


class Checkpoints(keras.callbacks.Callback):
    """Saves the whole state of training after steps, and puts it back into a new process.

    The state is every variable of the model (random seeds and carried states among them), of the
    optimizer and of the metrics, and the `state` of other callbacks. It is saved after the last
    step before every validation, after every step at which `seconds` have passed or `due` says
    so, and after the last step of all. Weights that are not finite are never saved; the norm of a
    gradient may be, as its step may have been left out.

    A resumed `fit` begins one step before the checkpoint, at `Checkpoint.start_step`, both in its
    data and in its `initial_epoch` (`start_step // steps_per_epoch`). The first step builds every
    variable; its results are then overwritten by the checkpoint. The first epoch ends as soon as it
    is complete. The steps after it are the same, bit for bit, as if training had never stopped, as
    far as the device computes reproducibly.

    This callback comes after the callbacks that it saves, and `fit` needs `steps_per_epoch`.

    Args:
        folder: where to write.
        callbacks: those whose state is part of the checkpoint; one of each class.
        seconds: the longest time without a checkpoint; 0 saves after every step.
        metadata: further entries of `Checkpoint.metadata`.
        resumed: the checkpoint to go on from.
        due: called after every step; a true value asks for a checkpoint.

    Raises:
        ValueError: two callbacks of one class; or, at the first step, a `resumed` that belongs to
            a model with other variables, layers or activations, or to another optimizer.
        FloatingPointError: a weight is not finite when a checkpoint is due.
    """

    def __init__(
        self,
        folder: Path | str,
        callbacks: Sequence[Resumable] = (),
        *,
        seconds: float = 60.0,
        metadata: dict[str, Any] | None = None,
        resumed: Checkpoint | None = None,
        due: Callable[[], Any] = lambda: False,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.step = 0
        self._callbacks = {type(callback).__name__: callback for callback in callbacks}
        if len(self._callbacks) < len(callbacks):
            received = ", ".join(type(callback).__name__ for callback in callbacks)
            raise ValueError(
                "`callbacks` of Checkpoints: their states are saved by the names of their classes, "
                f"so expected one callback of each class; received {received}. Derive a class of "
                "another name for the second one."
            )
        self._seconds = seconds
        self._metadata = metadata or {}
        self._resumed = resumed
        self._due = due
        # A resumed epoch is shorter than `fit` knows, and so ended by `stop_training`.
        self._in_resumed_epoch = resumed is not None
        self._ends_training = False
        self._saved_at = 0.0

    def on_train_begin(self, logs: Logs = None) -> None:
        self._saved_at = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._resumed is not None:
            self._restore(self._resumed)
            self._resumed = None
            if logs is not None:
                logs.update({k: float(v) for k, v in self.model.get_metrics_result().items()})
        else:
            self.step += 1
            late = time.perf_counter() - self._saved_at >= self._seconds
            if self._completes_epoch() or self.model.stop_training or late or self._due():
                self.save()
        if self._in_resumed_epoch and self._completes_epoch():
            self._ends_training = self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self._in_resumed_epoch and self._completes_epoch():
            self.model.stop_training = self._ends_training
        self._in_resumed_epoch = False

    def save(self) -> None:
        """Writes a checkpoint of the state as it is now."""
        variables = self._variables()
        arrays = {name: keras.ops.convert_to_numpy(v) for name, v in variables.items()}
        for name, array in arrays.items():
            if name.startswith("optimizer/") and variables[name].name == "gradient_norm":
                continue
            # A state carried from batch to batch may hold -inf, where nothing was read yet.
            carried = name.startswith("model/") and not variables[name].trainable
            if np.isnan(array).any() if carried else not np.isfinite(array).all():
                raise FloatingPointError(
                    f"After step {self.step}, {variables[name].path} is not finite: no checkpoint "
                    "was made of it."
                )
        states = {name: callback.state() for name, callback in self._callbacks.items()}
        own = {"callbacks": states, "layers": layer_kinds(self.model)}
        save_checkpoint(self.folder, self.step, arrays, {**self._metadata, **own})
        self._saved_at = time.perf_counter()

    def _completes_epoch(self) -> bool:
        return self.step % self.params["steps"] == 0

    def _variables(self) -> dict[str, keras.Variable]:
        return {**_trained(self.model), **_named("metric", self.model.metrics_variables)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        variables, arrays = self._variables(), checkpoint.arrays
        require_same_model(checkpoint, self.model)
        _require_same_variables(checkpoint, variables)
        if missing := self._callbacks.keys() - checkpoint.metadata["callbacks"].keys():
            _refuse(checkpoint, f"it has no state of {', '.join(sorted(missing))}")
        for name, variable in variables.items():
            # NumPy's files know bfloat16 as two bytes without a meaning.
            plain = arrays[name].dtype.kind != "V"
            dtype = None if plain else keras.ops.convert_to_numpy(variable).dtype
            variable.assign(arrays[name] if plain else arrays[name].view(dtype))
        self.step = checkpoint.step
        for name, callback in self._callbacks.items():
            callback.restore(checkpoint.metadata["callbacks"][name])


def require_same_model(checkpoint: Checkpoint, model: keras.Model) -> None:
    """Raises ValueError unless the checkpoint is of such a model with such an optimizer.

    The model is built, and its optimizer will be. Nothing is known yet of metrics, which Keras
    makes in the first step.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    _require_same_variables(checkpoint, _trained(model), ("model/", "optimizer/"))
    kinds = layer_kinds(model)
    if kinds != checkpoint.metadata["layers"]:
        layers = checkpoint.metadata["layers"]
        _refuse(checkpoint, f"its layers are {layers}, those of the model {kinds}")


def _require_same_variables(
    checkpoint: Checkpoint, variables: dict[str, keras.Variable], groups: tuple[str, ...] = ("",)
) -> None:
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    arrays = checkpoint.arrays.items()
    received = {name: array.shape for name, array in arrays if name.startswith(groups)}
    names = sorted({name for name, _ in expected.items() ^ received.items()})
    if names:
        _refuse(checkpoint, f"{', '.join(names)} differ in shape or are missing")


def _refuse(checkpoint: Checkpoint, problem: str) -> NoReturn:
    raise ValueError(
        f"{checkpoint.path} belongs to another model, optimizer or set of callbacks: {problem}. "
        "Resume with what made it, or start anew."
    )


def _trained(model: keras.Model) -> dict[str, keras.Variable]:
    """The variables of the model and of its optimizer."""
    return {**_named("model", model.variables), **_named("optimizer", model.optimizer.variables)}


def _named(group: str, variables: Sequence[keras.Variable]) -> dict[str, keras.Variable]:
    paths = stable_paths(variables)
    return {f"{group}/{path}": x for path, x in zip(paths, variables, strict=True)}


def stable_paths(variables: Sequence[keras.Variable]) -> list[str]:
    """The paths of variables, which are the same whenever the same model is built.

    Keras numbers layers over the whole life of a process, so the numbers are counted anew, in the
    order of the variables.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> stable_paths(model.variables)[1:3]
    ['sequential_0/dense_0/bias_0', 'sequential_0/dense_1/kernel_0']
    """
    names: dict[str, list[str]] = {}

    def renumber(name: str) -> str:
        # An optimizer's variable has the path of the weight in its name, joined by underscores.
        without_numbers = re.sub(r"_\d+(?=_|$)", "", name)
        known = names.setdefault(without_numbers, [])
        if name not in known:
            known.append(name)
        return f"{without_numbers}_{known.index(name)}"

    paths = ["/".join(map(renumber, variable.path.split("/"))) for variable in variables]
    # Keras does not demand that paths are unique.
    return [
        f"{path}#{paths[:i].count(path)}" if path in paths[:i] else path
        for i, path in enumerate(paths)
    ]


def layer_kinds(model: keras.Model) -> list[str]:
    """The classes of layers and their activations in a model's configuration, in order.

    Two models can have variables of the same paths and shapes, and differ in these.

    Example:

    >>> layers = [keras.Input((3,)), keras.layers.Dense(2, "relu"), keras.layers.Softmax()]
    >>> layer_kinds(keras.Sequential(layers))
    ['InputLayer', 'Dense', 'relu', 'Softmax']
    """
    try:
        config = model.get_config()
    except NotImplementedError:  # a model that cannot be saved as a configuration
        return []
    kinds: list[str] = []

    def visit(value: Any, key: str = "") -> None:
        if key in _KINDS and isinstance(value, str):
            kinds.append(value)
        elif _IGNORED.fullmatch(key):
            return
        elif isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, name)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    visit(config)
    return kinds
