"""Settings of every test. The Keras backend is the environment's choice (KERAS_BACKEND)."""

import os

import hypothesis
import pytest

# Without it the JAX backend silently computes float64 tests in float32; JAX reads it at import.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# A first example may compile for seconds, and a run must be repeatable.
hypothesis.settings.register_profile("elita_tf", deadline=None, derandomize=True, database=None)
# Other inputs every time, and many; a test takes `tests.helpers.budget` of them.
hypothesis.settings.register_profile("soak", deadline=None, database=None, print_blob=True)

if os.environ.get("KERAS_BACKEND") == "jax":
    # Eight devices on one CPU, for the tests of sequences that are split over devices.
    devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long forms too; see `make soak`")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("soak" if config.getoption("soak") else "elita_tf")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("soak"):
        long = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
