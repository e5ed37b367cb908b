"""No mixer is missing where all of them are tested."""

from importlib import import_module

import pytest

from elita_tf import layers
from elita_tf.models import architectures, registry
from tests.mixers import MAIN, MIXERS

# Other tests register mixers of their own later.
BUILT_IN = set(registry.MIXERS)
SUITES = (
    "tests.conformance.test_layers",
    "tests.layers.test_call_arguments",
    "tests.layers.test_precision",
    "tests.layers.test_properties",
    "tests.layers.test_segments",
    "tests.layers.test_sequence_layers",
    "tests.layers.test_streaming",
)


def test_every_public_mixer_has_a_row() -> None:
    public = {getattr(layers, name) for name in layers.__all__}
    mixers = {each for each in public if issubclass(each, layers.SequenceMixer)}
    for table in (MIXERS, MAIN):
        assert {type(make()) for make in table.values()} == mixers - {layers.SequenceMixer}


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_all_mixers(suite: str) -> None:
    assert set(MAIN) <= set(import_module(suite).FACTORIES)


def test_every_mixer_of_a_decoder_is_in_an_architecture() -> None:
    # The tests of models, generation, segments, exports and goldens go through the architectures.
    patterns = (arguments["mixers"] for arguments in architectures.values())
    used = {name for each in patterns for name in ([each] if isinstance(each, str) else each)}
    assert used == BUILT_IN
