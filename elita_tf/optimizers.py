"""Optimizers that know the norm of their gradient."""

from typing import Any

import keras
from keras import ops


class _Monitored:
    """For an optimizer: keeps `gradient_norm`, and can leave out steps."""

    def __init__(self, *args: Any, skip_nonfinite: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_nonfinite = skip_nonfinite

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.gradient_norm = self.add_variable(
            (), dtype="float32", aggregation="mean", name="gradient_norm"
        )

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(list(trainable_variables))
        norm = _global_norm(grads)
        kept = [*self._trainable_variables, *self.variables] if self.skip_nonfinite else []
        before = [ops.copy(variable) for variable in kept]
        super().apply(grads, trainable_variables)
        for variable, value in zip(kept, before, strict=True):
            after = ops.convert_to_tensor(variable)
            variable.assign(ops.where(ops.isfinite(norm), after, value))
        self.gradient_norm.assign(norm)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "skip_nonfinite": self.skip_nonfinite}


@keras.saving.register_keras_serializable(package="elita_tf")
class MonitoredAdam(_Monitored, keras.optimizers.Adam):
    """`keras.optimizers.Adam` that knows the norm of its gradient.

    After a step, the variable `gradient_norm` is the norm of the whole gradient before clipping;
    where that is NaN or infinite, the gradient is not finite, or too large for its square. With
    `skip_nonfinite` such a step changes neither the weights nor the optimizer. That needs a second
    copy of both for the time of an update, and one device.

    Args:
        *args, **kwargs: of `keras.optimizers.Adam`.
        skip_nonfinite: leave out steps whose gradient is not finite.

    Example:

    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer = MonitoredAdam(0.5, global_clipnorm=1.0, skip_nonfinite=True)
    >>> optimizer.apply([ops.array([3.0, float("nan")])], [weight])
    >>> weight.numpy().tolist()
    [1.0, 2.0]
    >>> optimizer.apply([ops.array([3.0, 4.0])], [weight])
    >>> float(optimizer.gradient_norm.numpy())
    5.0
    """


@keras.saving.register_keras_serializable(package="elita_tf")
class MonitoredAdamW(_Monitored, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` that knows the norm of its gradient: see `MonitoredAdam`."""


def _global_norm(gradients: list[Any]) -> Any:
    # Reshaping adds up what TensorFlow's gradient of an embedding holds of one row in parts.
    flat = [ops.cast(ops.reshape(g, (-1,)), "float32") for g in gradients if g is not None]
    return ops.sqrt(sum(ops.sum(ops.square(g)) for g in flat))
