"""Learning-rate schedules."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="elita_tf")
class CappedInverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """ELiTA's schedule: min(peak, scale / sqrt(step)), with steps counted from 1.

    Args:
        peak: the learning rate until step (scale / peak)^2, which is 100 by default.
        scale: the learning rate that step 1 would have without the cap.

    Raises:
        ValueError: `peak` or `scale` not above 0.

    Example:

    >>> from elita_tf.schedules import CappedInverseSqrt
    >>> schedule = CappedInverseSqrt(peak=1e-3, scale=1e-2)
    >>> [round(float(schedule(step)), 6) for step in (0, 99, 399)]
    [0.001, 0.001, 0.0005]

    Source: the elita-transformer repository, README.
    """

    def __init__(self, peak: float = 1e-3, scale: float = 1e-2) -> None:
        super().__init__()
        numbers = all(isinstance(rate, (int, float)) for rate in (peak, scale))
        if not (numbers and peak > 0 and scale > 0):
            raise ValueError(
                "A learning rate is above 0: expected `peak` and `scale` above 0, received "
                f"peak={peak!r}, scale={scale!r}."
            )
        self.peak = peak
        self.scale = scale

    def __call__(self, step: Any) -> Any:
        # Keras counts steps from 0.
        return ops.minimum(self.peak, self.scale / ops.sqrt(ops.cast(step, "float32") + 1.0))

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "scale": self.scale}
