"""Registered classes whose part of the package need not be imported yet.

Keras finds the classes of a file by the names that they have registered. Those of `layers` register
with the package. Others would load KerasHub and TensorFlow, so stand-ins of their names import
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
    """What Keras asks of a registered class."""

    module: str

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """An object of the class itself."""
        return getattr(import_module(cls.module), cls.__name__).from_config(config, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """A stand-in has no objects; Keras registers only what has this method."""
        raise NotImplementedError


for _name, _module in _MODULES.items():
    _stand_in = type(_name, (StandIn,), {"module": _module})
    keras.saving.register_keras_serializable("elita_tf", _name)(_stand_in)
