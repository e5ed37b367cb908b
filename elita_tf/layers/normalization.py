"""Layer normalisation with right second derivatives."""

from typing import Any

import keras
from keras import ops

from elita_tf.ops.normalization import normalized


@keras.saving.register_keras_serializable(package="elita_tf")
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras' layer over the last axis, whose derivatives of every order are right.

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta

    The gradient is written by hand. On TensorFlow, Keras 3.15 stops a gradient on the way, so that
    its second derivative is off by some 8 % for six features.

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
        return ops.cast(normalized(x, gamma, self.epsilon) + beta, self.compute_dtype)
