"""Layer normalisation with right second derivatives."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="elita_tf")
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras' layer over the last axis, whose derivatives of every order are right.

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    On TensorFlow, Keras 3.15 computes the variance from a mean whose gradient is stopped. The first
    derivative is right nevertheless, as the variance does not change with the mean there. The
    second derivative is not: it is off by some 8 % for six features.

    Means and products are float32 under policies of lower precision too. A layer with
    `autocast=False` reads its inputs in the dtype that they have, and so larger numbers than a
    float16 holds.

    Args:
        epsilon: added to the variance.
        **kwargs: of `keras.layers.Layer`, such as name and dtype.
    """

    def __init__(self, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(epsilon=epsilon, **kwargs)

    def call(self, inputs: Any) -> Any:
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        x, gamma, beta = (ops.cast(each, dtype) for each in (inputs, self.gamma, self.beta))
        mean = ops.mean(x, axis=-1, keepdims=True)
        # The variance about any constant, less the square of the constant's distance to the mean.
        # That distance is 0, but its second derivative is not.
        constant = ops.stop_gradient(mean)
        about_constant = ops.mean(ops.square(x - constant), axis=-1, keepdims=True)
        variance = about_constant - ops.square(mean - constant)
        factor = ops.rsqrt(variance + self.epsilon) * gamma
        return ops.cast(x * factor + (beta - mean * factor), self.compute_dtype)
