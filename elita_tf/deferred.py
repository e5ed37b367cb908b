"""Registered classes whose part of the package need not be imported yet.

Keras and KerasHub find the classes of a file by the names that they have registered. Those of
`layers` register with the package. Others would load KerasHub and TensorFlow, so stand-ins import
them when a file asks. The import puts the class in the place of its stand-in.
"""

from importlib import import_module
from typing import Any

import keras

_MODULES = {
    "CappedInverseSqrt": "elita_tf.schedules",
    "MonitoredAdam": "elita_tf.optimizers",
    "MonitoredAdamW": "elita_tf.optimizers",
    "MonitoredMuon": "elita_tf.optimizers",
    "ElitaBackbone": "elita_tf.models",
    "ElitaCausalLM": "elita_tf.models",
    "ElitaCausalLMPreprocessor": "elita_tf.models",
    "ElitaGPT2Tokenizer": "elita_tf.data",
    "ElitaTokenizer": "elita_tf.data",
    "LearnedPositions": "elita_tf.models.learned_positions",
}


class StandIn:
    """Stands for a class, with all its attributes; to `issubclass` it is a subclass of it.

    Args:
        name: of the class.
        module: where to import it from.
    """

    def __init__(self, name: str, module: str) -> None:
        self._name, self._module = name, module

    def _load(self) -> Any:
        return getattr(import_module(self._module), self._name)

    @property
    def __bases__(self) -> tuple[Any]:
        return (self._load(),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __eq__(self, other: Any) -> bool:
        return self is other or other is self._load()

    def __hash__(self) -> int:
        return hash(self._name)


for _name, _module in _MODULES.items():
    keras.saving.register_keras_serializable("elita_tf", _name)(StandIn(_name, _module))
