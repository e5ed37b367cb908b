"""The SwiGLU feed-forward layer."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import input_width, require_known, require_sizes


@keras.saving.register_keras_serializable(package="elita_tf")
class GatedFeedForward(keras.layers.Layer):
    """Gated feed-forward; SwiGLU with the default activation.

        y = W_3 (activation(W_1 x) * W_2 x)

    Args:
        inner_dim: features between the projections; by default 8/3 of the input width, rounded up
            to a multiple of 8, which has the parameters of a plain feed-forward of four widths.
        activation: of the gate.
        kernel_initializer: for all three matrices.
        kernel_regularizer: for all three matrices.

    Call arguments:
        inputs: (..., hidden).

    Returns:
        (..., hidden).

    Raises:
        ValueError: `inner_dim` below 1, or an unknown argument.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> tuple(layers.GatedFeedForward()(np.ones((2, 3, 6), "float32")).shape)
    (2, 3, 6)

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        inner_dim: int | None = None,
        activation: Any = "silu",
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        require_known(self, kwargs)
        super().__init__(**kwargs)
        require_sizes("GatedFeedForward", inner_dim=inner_dim)
        self.inner_dim = inner_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.supports_masking = True

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        hidden_dim = input_width("GatedFeedForward", inputs_shape, "(..., hidden)")
        inner_dim = self.inner_dim or 8 * -(-hidden_dim // 3)
        self.gate_projection = self._projection(inner_dim, "gate", self.activation)
        self.value_projection = self._projection(inner_dim, "value")
        self.output_projection = self._projection(hidden_dim, "output")
        self.gate_projection.build(inputs_shape)
        self.value_projection.build(inputs_shape)
        self.output_projection.build((*inputs_shape[:-1], inner_dim))

    def _projection(self, units: int, name: str, activation: Any = None) -> keras.layers.Layer:
        return keras.layers.Dense(
            units,
            activation=activation,
            use_bias=False,
            kernel_initializer=self.kernel_initializer.clone(),
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, inputs: Any) -> Any:
        gate, value = self.gate_projection(inputs), self.value_projection(inputs)
        return self.output_projection(ops.multiply(gate, value))

    @property
    def output_kernel(self) -> keras.Variable:
        """The kernel that makes the outputs. A residual block scales it or sets it to zero."""
        return self.output_projection.kernel

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "inner_dim": self.inner_dim,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }
