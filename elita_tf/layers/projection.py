"""The linear maps of the sequence layers."""

from typing import Any

import keras


def projection(
    owner: keras.layers.Layer,
    equation: str,
    output_shape: tuple[int | None, ...],
    name: str,
    initializer: Any = None,
    **kwargs: Any,
) -> keras.layers.EinsumDense:
    """An EinsumDense with the dtype policy, the initializer and the regularizer of its owner.

    The dtype policy lets mixed precision, LoRA and int8 reach it. It "supports masking" so that
    Keras does not warn of a mask that is lost: the owner uses the mask and passes it on.
    """
    layer = keras.layers.EinsumDense(
        equation,
        output_shape,
        kernel_initializer=(initializer or owner.kernel_initializer).clone(),
        kernel_regularizer=owner.kernel_regularizer,
        dtype=owner.dtype_policy,
        name=name,
        **kwargs,
    )
    layer.supports_masking = True
    return layer
