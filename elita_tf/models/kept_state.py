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

# The names that safetensors has for dtypes.
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32"},
}
# What does not change a model's numbers.
_NAMES = ("name", "trainable")
_MAX_HEADER = 1 << 20
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
    header: dict[str, Any] = {"__metadata__": _identity(backbone)}
    content = b""
    for name, leaf in state.items():
        array = np.ascontiguousarray(ops.convert_to_numpy(leaf))
        offsets = [len(content), len(content) + array.nbytes]
        dtype = _DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        content += array.tobytes()
    encoded = json.dumps(header).encode()
    with atomic_path(Path(path).expanduser()) as temporary:
        temporary.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)


def load(path: Path | str, backbone: Any) -> State:
    """Read what `save` wrote: see `ElitaCausalLM.load_state`."""
    path = Path(path).expanduser()
    file = path.read_bytes()
    try:
        end = 8 + int.from_bytes(file[:8], "little")
        header = json.loads(file[8:end]) if end <= _MAX_HEADER else {}
        identity = header.pop("__metadata__")
        config = json.loads(identity["config"])
        weights, name = identity["weights"], identity["name"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no whole file of `save_state` ({type(error).__name__}: {error})."
        ) from error
    _require_same_model(path, name, config, weights, backbone)
    leaves = _leaves(backbone)
    try:
        state = {
            name: ops.convert_to_tensor(_array(each, leaves[name], file[end:]))
            for name, each in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is broken: {type(error).__name__}: {error}.") from error
    require_state(backbone, state, is_read=False)
    return state


def _array(entry: dict[str, Any], leaf: Any, content: bytes) -> np.ndarray:
    dtype, (start, stop) = leaf.dtype, entry["data_offsets"]
    if entry["dtype"] != _DTYPES[dtype.name]:
        raise ValueError(f"expected {dtype.name}, received {entry['dtype']}")
    shape = (-1, *leaf.shape[1:])
    # A copy, as a tensor may share the memory of an array.
    array = np.frombuffer(content[start:stop], dtype).reshape(shape).copy()
    if list(array.shape) != entry["shape"]:
        raise ValueError(f"expected {entry['shape']}, received data for {list(array.shape)}")
    return array


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
