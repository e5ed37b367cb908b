"""Where a run trains: on one device, or on several of this machine or of several machines.

`find` gives what the option `--devices` of `elita train` names, as a scope for building the model
and for `fit`:

    one       the backend's first device
    data      the model on every device, each with its part of the batch
    model=K   the model cut over K devices, and every K devices with their part of the batch (JAX)
    tpu       TensorFlow's TPUStrategy (best effort: on a TPU, use JAX and `data`)

Several processes, one a machine, are told of one another by the variables of
`keras.distribution.initialize` (KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID),
on JAX alone: under MultiWorkerMirroredStrategy Keras 3.15's `fit` ends with "ValueError: Attempt to
convert a value ({'token_ids': PerReplica:{...}}) with an unsupported type (<class 'dict'>) to a
Tensor."
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import keras
import tensorflow as tf

from elita_tf.models import ElitaBackbone
from elita_tf.runs.recipe import Recipe


class Devices(NamedTuple):
    """A scope, the parts that it cuts a batch into, and whether this process writes the run."""

    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    num_replicas: int = 1
    is_first: bool = True

    @contextlib.contextmanager
    def folder(self, run_dir: Path) -> Iterator[Path]:
        """Where to write: the run folder, or, but in the first process, one that is removed."""
        if self.is_first:
            yield run_dir
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)


ONE_DEVICE = Devices()


def find(devices: str, recipe: Recipe) -> Devices:
    """The devices of a run. Call it before anything computes.

    Raises:
        ValueError: devices that the backend cannot use, or that the recipe does not divide over.
    """
    kind, _, size = devices.partition("=")
    if kind not in ("one", "data", "model", "tpu") or (
        size and not (kind == "model" and size.isdecimal())
    ):
        raise ValueError(f"--devices {devices}: expected one, data, model=K or tpu.")
    backend = keras.backend.backend()
    if backend == "jax" and tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")  # TensorFlow only reads the data
    if kind == "one":
        return ONE_DEVICE
    found = _on_jax(kind, int(size or 0)) if backend == "jax" else _on_tensorflow(kind)
    if recipe.batch_size % found.num_replicas:
        raise ValueError(
            f"--devices {devices}: a batch of {recipe.batch_size} does not divide over "
            f"{found.num_replicas} parts. Choose another batch_size."
        )
    if backend == "tensorflow" and recipe.carry_state:
        raise ValueError("carry_state needs --devices one, or KERAS_BACKEND=jax.")
    if backend == "tensorflow" and recipe.clip_norm:
        raise ValueError(
            f"clip_norm={recipe.clip_norm}: on TensorFlow, Keras clips what each device has of the "
            "gradient, not their sum. Choose clip_norm=0, --devices one or KERAS_BACKEND=jax."
        )
    return found


def _on_tensorflow(kind: str) -> Devices:
    if kind == "model":
        raise ValueError("--devices model needs KERAS_BACKEND=jax.")
    if kind == "tpu":
        strategy = tf.distribute.TPUStrategy(_tpu())
    elif "TF_CONFIG" in os.environ:
        raise ValueError(
            "TF_CONFIG names several machines: on TensorFlow, Keras trains on those of one only. "
            "Choose KERAS_BACKEND=jax, or unset TF_CONFIG."
        )
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    return Devices(strategy.scope, strategy.num_replicas_in_sync)


def _tpu() -> tf.distribute.cluster_resolver.TPUClusterResolver:
    try:
        return tf.distribute.cluster_resolver.TPUClusterResolver.connect("")
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(
            f"TensorFlow reaches no TPU ({error}). On a TPU, JAX is the way that works: "
            "KERAS_BACKEND=jax and --devices data."
        ) from error


def _on_jax(kind: str, size: int) -> Devices:
    import jax

    if kind == "tpu":
        raise ValueError("--devices tpu is TensorFlow's; JAX uses a TPU's cores with data.")
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        keras.distribution.initialize()
    count = keras.distribution.get_device_count()
    size = size or count
    if kind == "data":
        distribution = keras.distribution.DataParallel()
    elif count % size:
        raise ValueError(f"--devices model={size}: {count} devices do not divide into {size}s.")
    elif jax.process_count() > 1:
        raise ValueError("--devices model is for one process, which saves all of the model.")
    else:
        distribution = model_parallel(count // size, size)
    return Devices(distribution.scope, distribution.num_model_replicas, jax.process_index() == 0)


def model_parallel(num_replicas: int, size: int) -> keras.distribution.ModelParallel:
    """`num_replicas` copies of the model, each cut over `size` devices: `get_layout_map`."""
    mesh = keras.distribution.DeviceMesh((num_replicas, size), ["batch", "model"])
    layouts = ElitaBackbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
