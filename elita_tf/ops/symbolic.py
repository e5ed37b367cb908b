"""The ops as Keras operations, for functional models."""

import functools
from collections.abc import Callable
from typing import Any

import keras

_FUNCTIONS: dict[str, Callable] = {}


def symbolic(function: Callable) -> Callable:
    """Let a function of tensors take KerasTensors too, as the functions of `keras.ops` do."""
    _FUNCTIONS[function.__name__] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = keras.tree.flatten((args, kwargs))
        if any(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
            return Operation(function.__name__).symbolic_call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@keras.saving.register_keras_serializable(package="elita_tf")
class Operation(keras.Operation):
    """The call of an op within a functional model.

    Args:
        function: the name of the op.
        **kwargs: of `keras.Operation`.
    """

    def __init__(self, function: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return _FUNCTIONS[self.function](*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_structure(_dense, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {"function": self.function, "name": self.name}


def _dense(leaf: Any) -> Any:
    """The same shape and dtype: Keras has the product of a tensor and a number for sparse."""
    is_symbol = isinstance(leaf, keras.KerasTensor)
    return keras.KerasTensor(leaf.shape, leaf.dtype) if is_symbol else leaf
