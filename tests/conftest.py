"""Settings of every test. The Keras backend is the environment's choice (KERAS_BACKEND)."""

import os

import hypothesis
import numpy as np
import pytest

# JAX reads these at import. Without the first it silently computes float64 tests in float32.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# A GPU or TPU would multiply float32 matrices in TF32 or bfloat16.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Tiny arrays, many programs: most of the time goes into optimizing what runs once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Simulated, for what runs on several.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

# A first example may compile for seconds, and a run must be repeatable.
hypothesis.settings.register_profile("elita_tf", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("elita_tf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-cases",
        type=int,
        help="of a parametrized test run so many cases at most, evenly spread (default: all)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit = config.getoption("--max-cases")
    if limit is None:
        return
    cases: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((item.parent, getattr(item, "originalname", item.name)), []).append(item)
    kept = set()
    for each in cases.values():
        count = min(limit, len(each))
        kept.update(each[i] for i in np.linspace(0, len(each) - 1, count).round().astype(int))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
