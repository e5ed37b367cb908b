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
if os.environ.get("KERAS_BACKEND") == "jax":
    # Three times as quick to compile. A jaxlib without this flag would stop and name it.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Simulated, for what runs on several.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# A first example may compile for seconds, and a run must be repeatable.
hypothesis.settings.register_profile("elita_tf", deadline=None, derandomize=True, database=None)
# Other inputs every time, and many; a test takes `tests.helpers.budget` of them.
hypothesis.settings.register_profile("soak", deadline=None, database=None, print_blob=True)


# Cases of a parametrized test in a quick run.
QUICK_CASES = 2


@pytest.fixture(scope="session", autouse=True)
def without_autotuners() -> None:
    """Lets `fit` on arrays end at once: see `elita_tf.data.windows.made_ahead`."""
    import tensorflow as tf
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    make_dataset = ArrayDataAdapter.get_tf_dataset

    def get_tf_dataset(adapter: ArrayDataAdapter) -> tf.data.Dataset:
        options = tf.data.Options()
        options.autotune.enabled = False
        return make_dataset(adapter).with_options(options)

    ArrayDataAdapter.get_tf_dataset = get_tf_dataset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every test and case: `make test-all`")
    parser.addoption("--soak", action="store_true", help="the long forms too; see `make soak`")
    parser.addoption(
        "--max-cases",
        type=int,
        help="of a parametrized test run so many cases at most, evenly spread (default: "
        f"{QUICK_CASES}; with --all or --soak, all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("soak" if config.getoption("soak") else "elita_tf")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    everything, max_cases = config.getoption("all"), config.getoption("max_cases")
    kept = items
    if config.getoption("soak"):
        everything = True
    else:
        kept = [item for item in kept if not item.get_closest_marker("soak")]
    # A test that is named is run, with all its cases.
    named = any("::" in argument for argument in config.args)
    if not everything and not named:
        kept = [item for item in kept if not item.get_closest_marker("long")]
        max_cases = max_cases or QUICK_CASES
    if max_cases is not None:
        kept = spread(kept, max_cases)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def spread(items: list[pytest.Item], limit: int) -> list[pytest.Item]:
    """At most so many cases of every parametrized test."""
    cases: dict[tuple, list[pytest.Item]] = {}
    kept = {item for item in items if item.get_closest_marker("every_case")}
    for item in items:
        cases.setdefault((item.parent, getattr(item, "originalname", item.name)), []).append(item)
    for each in cases.values():
        count = min(limit, len(each))
        kept.update(each[i] for i in np.linspace(0, len(each) - 1, count).round().astype(int))
    return [item for item in items if item in kept]
