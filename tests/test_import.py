"""Importing the library pulls Keras only and leaves everything global as it was."""

import json
import subprocess
import sys

import elita_tf

# Runs in a child process, as this one has imported far more already.
REPORT = """
import json, logging, os, random, sys, warnings
import keras, numpy

def state():
    return {
        "backend": keras.config.backend(),
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "image data format": keras.config.image_data_format(),
        "dtype policy": keras.config.dtype_policy().name,
        "random": repr(random.getstate()),
        "numpy random": repr(numpy.random.get_state()),
        "numpy errors": repr(numpy.geterr()),
        "logging": repr((logging.root.handlers, logging.root.level, logging.root.manager.disable)),
        "environment": dict(os.environ),
        "warnings": repr(warnings.filters),
        "path": list(sys.path),
        "folder": os.getcwd(),
    }

before, modules = state(), set(sys.modules)
from elita_tf import layers
modules = sorted(set(sys.modules) - modules)
print(json.dumps({"modules": modules, "before": before, "after": state()}))
"""


def test_import_loads_keras_alone_and_changes_nothing():
    child = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    # The whole output is the one line of the report: the import itself prints nothing.
    report = json.loads(child.stdout)
    assert "elita_tf.layers" in report["modules"]
    strangers = [name for name in report["modules"] if name.split(".")[0] != "elita_tf"]
    assert strangers == []
    assert report["after"] == report["before"]
    assert {"elita_tf.models", "elita_tf.data", "elita_tf.callbacks"}.isdisjoint(report["modules"])


def test_unknown_attributes_are_refused():
    assert not hasattr(elita_tf, "layer")


def test_parts_load_on_demand():
    for name in elita_tf.__all__:
        assert getattr(elita_tf, name).__name__ == f"elita_tf.{name}"
