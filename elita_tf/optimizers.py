"""Optimizers that keep the norm of their gradient."""

from typing import Any

import keras
from keras import ops


class _Monitored:
    """Mixin of optimizers: keeps `gradient_norm`, and can skip steps.

    The learning rate is computed once for each step. Keras computes it for every variable: a
    schedule is a graph of its own, and hundreds of them take long to trace and compile.
    """

    _rate_of_step: Any = None

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

    @property
    def learning_rate(self) -> Any:
        if self._rate_of_step is None:
            return super().learning_rate
        return self._rate_of_step

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(list(trainable_variables))
        grads = [_dense(gradient) for gradient in grads]
        norm = _global_norm(grads)
        kept = [*self._trainable_variables, *self.variables] if self.skip_nonfinite else []
        before = [ops.copy(variable) for variable in kept]
        try:
            self._rate_of_step = self.learning_rate
            self._begin_step()
            super().apply(grads, trainable_variables)
        finally:
            self._rate_of_step = None
        for variable, value in zip(kept, before, strict=True):
            after = ops.convert_to_tensor(variable)
            variable.assign(ops.where(ops.isfinite(norm), after, value))
        self.gradient_norm.assign(norm)

    def _begin_step(self) -> None:
        """Called in each step when its learning rate is known."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "skip_nonfinite": self.skip_nonfinite}


class _MonitoredAdam(_Monitored):
    """Mixin of Adam and AdamW: the bias correction, too, is computed once for each step.

    On TensorFlow the rest is one operation a variable, where Keras has 58, which take long to trace
    and compile and each pass over the whole variable: see benchmarks/README.md.
    """

    _scalars_of_step: tuple[Any, ...] = ()

    def _begin_step(self) -> None:
        dtype = keras.backend.result_type(self._trainable_variables[0].dtype, "float32")
        step = ops.cast(self.iterations + 1, dtype)
        given = self.beta_1, self.beta_2, self.epsilon
        beta_1, beta_2, epsilon = (ops.convert_to_tensor(x, dtype) for x in given)
        first, second = (1 - ops.power(beta, step) for beta in (beta_1, beta_2))
        rate = ops.cast(self.learning_rate, dtype) * ops.sqrt(second) / first
        self._scalars_of_step = rate, beta_1, beta_2, epsilon

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        index = self._get_variable_index(variable)
        mean, square = self._momentums[index], self._velocities[index]
        gradient = ops.cast(gradient, variable.dtype)
        scalars = [ops.cast(scalar, variable.dtype) for scalar in self._scalars_of_step]
        # Not in 16 bits, which round a beta of 0.999 to 1.
        if keras.backend.backend() == "tensorflow" and variable.dtype in ("float32", "float64"):
            _apply_adam(variable, mean, square, gradient, *scalars)
            return
        self.assign_add(mean, (gradient - mean) * (1 - self.beta_1))
        self.assign_add(square, (ops.square(gradient) - square) * (1 - self.beta_2))
        self.assign_sub(variable, mean * scalars[0] / (ops.sqrt(square) + self.epsilon))


@keras.saving.register_keras_serializable(package="elita_tf")
class MonitoredAdam(_MonitoredAdam, keras.optimizers.Adam):
    """`keras.optimizers.Adam` that keeps the norm of its gradient.

    After a step, the variable `gradient_norm` is the norm of the whole gradient before clipping.
    If the norm is NaN or infinite, the gradient is not finite, or its square is too large for
    float32. With `skip_nonfinite` such a step changes neither the weights nor the optimizer. That
    needs a second copy of both during an update, and a single device.

    Args:
        *args: of `keras.optimizers.Adam`.
        **kwargs: of `keras.optimizers.Adam`.
        skip_nonfinite: skip steps whose gradient is not finite.

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
class MonitoredAdamW(_MonitoredAdam, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` that keeps the norm of its gradient: see `MonitoredAdam`."""


@keras.saving.register_keras_serializable(package="elita_tf")
class MonitoredMuon(_Monitored, keras.optimizers.Muon):
    """`keras.optimizers.Muon` that keeps the norm of its gradient: see `MonitoredAdam`."""


def _dense(gradient: Any) -> Any:
    """The gradient as one array.

    TensorFlow's gradient of an embedding can hold several parts of one row, of which Keras would
    take the squares before their sum. Reshaping adds them up.
    """
    is_sparse = hasattr(gradient, "indices")
    return ops.reshape(ops.reshape(gradient, (-1,)), gradient.shape) if is_sparse else gradient


def _global_norm(gradients: list[Any]) -> Any:
    wide = [ops.cast(gradient, "float32") for gradient in gradients if gradient is not None]
    return ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in wide))


def _apply_adam(
    variable: Any,
    mean: Any,
    square: Any,
    gradient: Any,
    rate: Any,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
) -> None:
    """A step of Adam in place; `rate` has the bias correction in it."""
    import tensorflow as tf

    corrected = tf.zeros((), gradient.dtype)  # powers of the betas that leave the rate as it is
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=mean.handle,
        v=square.handle,
        beta1_power=corrected,
        beta2_power=corrected,
        lr=rate,
        beta1=beta_1,
        beta2=beta_2,
        epsilon=epsilon,
        grad=gradient,
    )
