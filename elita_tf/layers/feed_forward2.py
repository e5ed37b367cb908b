"""The FeedForward2 layer of ELiTA."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import input_width, require_known, require_sizes
from elita_tf.ops import feed_forward2
from elita_tf.ops.arguments import require_positive


@keras.saving.register_keras_serializable(package="elita_tf")
class FeedForward2(keras.layers.Layer):
    """Bilinear feed-forward (ELiTA): two light projections meet in a three-way kernel.

        y = W_3 (silu(W_1 x + b_1) outer silu(W_2 x + b_2)) + b_3

    W_1 is hidden x inner, W_2 hidden x rank, W_3 (inner, rank) x hidden.

    Args:
        inner_dim: features of the first factor; by default the input width.
        rank: features of the second factor.
        activation: of both factors.
        kernel_initializer: for W_1, W_2 and W_3, which counts as an (inner * rank, hidden) matrix.
        kernel_regularizer: for W_1, W_2 and W_3.

    Call arguments:
        inputs: (..., hidden).

    Returns:
        (..., hidden).

    Raises:
        ValueError: `inner_dim` or `rank` below 1, or an unknown argument.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> layer = layers.FeedForward2(rank=4)
    >>> tuple(layer(np.ones((2, 3, 8), "float32")).shape)
    (2, 3, 8)

    Source: the elita-transformer repository, equations of its README.
    """

    def __init__(
        self,
        inner_dim: int | None = None,
        rank: int = 8,
        activation: Any = "silu",
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        require_known(self, kwargs)
        super().__init__(**kwargs)
        require_positive("FeedForward2", rank=rank)
        require_sizes("FeedForward2", inner_dim=inner_dim)
        self.inner_dim = inner_dim
        self.rank = rank
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.supports_masking = True

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        hidden_dim = input_width("FeedForward2", inputs_shape, "(..., hidden)")
        inner_dim = self.inner_dim or hidden_dim
        self.first_projection = self._projection(inner_dim, "first")
        self.second_projection = self._projection(self.rank, "second")
        self.first_projection.build(inputs_shape)
        self.second_projection.build(inputs_shape)
        self.kernel = self.add_weight(
            (inner_dim, self.rank, hidden_dim),
            lambda shape, dtype: ops.reshape(
                self.kernel_initializer.clone()((inner_dim * self.rank, hidden_dim), dtype), shape
            ),
            regularizer=self.kernel_regularizer,
            name="kernel",
        )
        self.bias = self.add_weight((hidden_dim,), "zeros", name="bias")

    def _projection(self, units: int, name: str) -> keras.layers.Layer:
        return keras.layers.Dense(
            units,
            activation=self.activation,
            kernel_initializer=self.kernel_initializer.clone(),
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, inputs: Any) -> Any:
        # The projections may have other dtype policies, from a `DTypePolicyMap`.
        factors = self.first_projection(inputs), self.second_projection(inputs)
        outputs = feed_forward2(*(ops.cast(x, self.compute_dtype) for x in (*factors, self.kernel)))
        return outputs + ops.cast(self.bias, outputs.dtype)

    @property
    def output_kernel(self) -> keras.Variable:
        """The kernel that makes the outputs. A residual block scales it or sets it to zero."""
        return self.kernel

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "inner_dim": self.inner_dim,
            "rank": self.rank,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }
