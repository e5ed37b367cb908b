"""Layer normalisation with right second derivatives."""

from typing import Any

import keras
from keras import ops


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
        return ops.cast(_normalize(self.epsilon)(x, gamma) + beta, self.compute_dtype)


def _normalize(epsilon: float) -> Any:
    """gamma (x - mean) / sqrt(variance + epsilon) of `x` (..., features), with its gradient."""

    def parts(x: Any) -> tuple[Any, Any]:
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        factor = ops.rsqrt(ops.mean(ops.square(centred), axis=-1, keepdims=True) + epsilon)
        return centred * factor, factor

    @ops.custom_gradient
    def normalize(x: Any, gamma: Any) -> Any:
        def grad(upstream: Any) -> tuple[Any, Any]:
            # From `x` again, so that this has a gradient too.
            normal, factor = parts(x)
            d_normal = gamma * upstream
            along = ops.mean(d_normal * normal, axis=-1, keepdims=True)
            d_x = factor * (d_normal - ops.mean(d_normal, axis=-1, keepdims=True) - normal * along)
            axes = list(range(len(x.shape) - 1))
            return d_x, ops.sum(upstream * normal, axis=axes)

        return gamma * parts(x)[0], grad

    return normalize
