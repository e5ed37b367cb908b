"""Linear-time sequence layers for Keras 3, and the decoder language model made of them.

Importing the package loads Keras only and registers its classes for `keras.models.load_model`.
The modules that need more (`models`, `data`, `callbacks`, `runs` and the like) load at their first
use, or when a file needs them.
"""

from importlib import import_module
from types import ModuleType

from elita_tf import deferred, layers, ops

__version__ = "0.1.0"

__all__ = [
    "callbacks",
    "data",
    "experimental",
    "layers",
    "models",
    "ops",
    "optimizers",
    "runs",
    "schedules",
]


# It has registered what it has to.
del deferred


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
