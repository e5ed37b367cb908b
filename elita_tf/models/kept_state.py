"""States in files, in the format of safetensors, with what tells their model from others."""

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from elita_tf.files import atomic_path
from elita_tf.layers.segments import SEGMENT_ID
from elita_tf.models.decoding import LAST_TOKEN, State
from elita_tf.tensor_files import read_arrays, write_arrays

# What does not change a model's numbers.
_NAMES = ("name", "trainable")
# A stream must not wait for what is the same each time.
_LEAVES: weakref.WeakKeyDictionary[Any, dict[str, np.ndarray]] = weakref.WeakKeyDictionary()


def require_state(backbone: Any, state: Any, *, is_read: bool = True) -> int:
    """The rows of a state, or a ValueError for what is no state of the backbone.

    Args:
        backbone: an `ElitaBackbone`.
        state: a flat dict of arrays.
        is_read: whether it must have the last token of `read`, or may lack it.
    """
    expected = {name: tuple(leaf.shape[1:]) for name, leaf in _leaves(backbone).items()}
    if not isinstance(state, dict):
        raise ValueError(
            f"`state` of {backbone.name}: expected a dict that `read` gave, received "
            f"{type(state).__name__}."
        )
    optional = {SEGMENT_ID} if is_read else {SEGMENT_ID, LAST_TOKEN}
    missing = sorted(set(expected) - set(state) - optional)
    unknown = sorted(set(state) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"`state` of {backbone.name} lacks {missing} and has {unknown} that the model does "
            "not know. Pass what `model.read(prompt)` of this model gave."
        )
    shapes = {name: tuple(leaf.shape) for name, leaf in state.items()}
    num_rows = shapes[next(iter(state))][:1]
    for name, shape in shapes.items():
        wanted = (*num_rows, *expected[name])
        if shape != wanted:
            raise ValueError(
                f"`state` of {backbone.name}: expected {name!r} of shape {wanted}, received "
                f"{shape}. Rows are the first axis of every leaf; pass what "
                "`model.read(prompt)` of this model gave."
            )
    return num_rows[0]


def save(path: Path | str, state: State, backbone: Any) -> None:
    """Write a state and what its model is: see `ElitaCausalLM.save_state`."""
    require_state(backbone, state, is_read=False)
    arrays = {name: ops.convert_to_numpy(leaf) for name, leaf in state.items()}
    with atomic_path(Path(path).expanduser()) as temporary:
        write_arrays(temporary, arrays, _identity(backbone))


def load(path: Path | str, backbone: Any) -> State:
    """Read what `save` wrote: see `ElitaCausalLM.load_state`."""
    path = Path(path).expanduser()
    arrays, identity = read_arrays(path)
    try:
        config = json.loads(identity["config"])
        weights, name = identity["weights"], identity["name"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of `save_state`.") from error
    _require_same_model(path, name, config, weights, backbone)
    require_state(backbone, arrays, is_read=False)
    leaves = _leaves(backbone)
    for leaf, array in arrays.items():
        if array.dtype != leaves[leaf].dtype:
            raise ValueError(
                f"{path} is broken: expected {leaf!r} of {leaves[leaf].dtype.name}, received "
                f"{array.dtype.name}."
            )
    return {leaf: ops.convert_to_tensor(array) for leaf, array in arrays.items()}


def _leaves(backbone: Any) -> dict[str, np.ndarray]:
    """Every leaf that a state can have, of one row."""
    if backbone not in _LEAVES:
        leaves = backbone.get_initial_state(1).items()
        integer = np.zeros((1,), "int32")
        _LEAVES[backbone] = {
            **{name: ops.convert_to_numpy(leaf) for name, leaf in leaves},
            **{LAST_TOKEN: integer, SEGMENT_ID: integer},
        }
    return _LEAVES[backbone]


def _identity(backbone: Any) -> dict[str, str]:
    config = {k: value for k, value in backbone.get_config().items() if k not in _NAMES}
    config["dtype"] = backbone.dtype_policy.name
    digest = hashlib.sha256()
    for weight in backbone.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight)).tobytes())
    return {
        "name": backbone.name,
        "config": json.dumps(config, sort_keys=True),
        "weights": digest.hexdigest(),
    }


def _require_same_model(
    path: Path, name: str, config: dict[str, Any], weights: str, backbone: Any
) -> None:
    own = _identity(backbone)
    own_config = json.loads(own["config"])
    differing = [
        f"{key} {config.get(key)!r} there and {own_config.get(key)!r} here"
        for key in sorted({*config, *own_config})
        if config.get(key) != own_config.get(key)
    ]
    if weights != own["weights"]:
        differing.append(f"weights {weights[:12]} there and {own['weights'][:12]} here (SHA-256)")
    if differing:
        raise ValueError(
            f"{path} is a state of {name!r}, and this is {own['name']!r} with other numbers: "
            f"{'; '.join(differing)}. A state goes on only in the model that read the text; load "
            "that model, or read the text again."
        )
