import keras
import numpy as np
import pytest

from elita_tf.schedules import CappedInverseSqrt


def test_values_by_hand():
    schedule = CappedInverseSqrt(peak=2e-3, scale=1e-2)
    # Steps count from 1 in the formula and from 0 in Keras; the cap ends at step 25.
    rates = [float(schedule(step)) for step in (0, 23, 24, 99, 9999)]
    np.testing.assert_allclose(rates, [2e-3, 2e-3, 2e-3, 1e-3, 1e-4], rtol=1e-6)


def test_it_is_saved_with_an_optimizer():
    optimizer = keras.optimizers.Adam(CappedInverseSqrt(3e-3, 2e-2))
    config = keras.optimizers.serialize(optimizer)
    schedule = keras.optimizers.deserialize(config)._learning_rate
    assert isinstance(schedule, CappedInverseSqrt)
    assert schedule.get_config() == {"peak": 3e-3, "scale": 2e-2}


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (1.0, -1.0)])
def test_rates_are_positive(arguments):
    with pytest.raises(ValueError, match="above 0"):
        CappedInverseSqrt(*arguments)
