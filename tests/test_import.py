"""Importing the library pulls Keras only and leaves everything global as it was."""

import json
import subprocess
import sys
from importlib import import_module

import keras
import pytest

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


# A file's classes, by the names that Keras knows after the import of the package alone.
FILES = """
import sys, keras, elita_tf
assert not {"keras_hub", "elita_tf.models", "elita_tf.optimizers"} & set(sys.modules)
lm = keras.models.load_model(sys.argv[1])
print(type(lm).__module__, type(lm.optimizer).__module__, type(lm.backbone).__module__)
model = keras.models.load_model(sys.argv[2])
print(type(model.optimizer).__module__, type(model.optimizer._learning_rate).__module__)
"""
PRESETS = """
import sys, elita_tf, keras_hub
for cls in (keras_hub.models.Backbone, keras_hub.models.CausalLM):
    print(type(cls.from_preset(sys.argv[1])).__name__)
"""


@pytest.mark.long
def test_files_load_after_the_import_of_the_package_alone(tmp_path):
    from elita_tf.models import ElitaBackbone, ElitaCausalLM
    from elita_tf.optimizers import MonitoredAdam
    from elita_tf.schedules import CappedInverseSqrt

    lm = ElitaCausalLM(ElitaBackbone(11, num_layers=1, hidden_dim=8, num_heads=2, mixers="gla"))
    lm.compile(MonitoredAdam(CappedInverseSqrt()))
    lm.save(tmp_path / "lm.keras")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(MonitoredAdam(CappedInverseSqrt()), "mse")
    model.save(tmp_path / "model.keras")
    ours = ["models.causal_lm", "optimizers", "models.backbone", "optimizers", "schedules"]
    printed = printed_by(FILES, tmp_path / "lm.keras", tmp_path / "model.keras")
    assert printed == [f"elita_tf.{module}" for module in ours]


@pytest.mark.long
def test_keras_hub_loads_presets_after_the_import_of_the_package_alone(tmp_path):
    from elita_tf.models import ElitaBackbone, ElitaCausalLM

    backbone = ElitaBackbone(11, num_layers=1, hidden_dim=8, num_heads=2, mixers="gla")
    ElitaCausalLM(backbone).save_to_preset(tmp_path)
    assert printed_by(PRESETS, tmp_path) == ["ElitaBackbone", "ElitaCausalLM"]


def printed_by(program, *arguments):
    child = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
    return child.stdout.decode().split()


def test_every_registered_class_has_a_stand_in_or_comes_with_the_package():
    """All modules are imported here, so that their classes have taken their stand-ins' places."""
    for name in (*elita_tf.__all__, "models.learned_positions"):
        import_module(f"elita_tf.{name}")
    registered = keras.saving.get_custom_objects()
    ours = {name: cls for name, cls in registered.items() if name.startswith("elita_tf>")}
    deferred = import_module("elita_tf.deferred")
    assert not [name for name, cls in ours.items() if isinstance(cls, deferred.StandIn)]
    with_package = ("elita_tf.layers", "elita_tf.ops")
    later = {cls.__name__ for cls in ours.values() if not cls.__module__.startswith(with_package)}
    assert later == set(deferred._MODULES)
