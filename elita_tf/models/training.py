"""Training: the loss without logits, and how much of a step XLA compiles at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from elita_tf.models.padding import require_inputs
from elita_tf.ops import linear_cross_entropy
from elita_tf.schedules import CappedInverseSqrt

# More blocks in one program would take XLA over twenty seconds to compile on two cores.
_BLOCKS_IN_ONE_PROGRAM = 4


class Training:
    """Mixin of a KerasHub CausalLM with a `backbone`, `carried_state` and `rematerialize`."""

    _programs: Any = None

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """As in Keras, with other defaults.

        Args:
            optimizer: "auto" is ELiTA's Adam(min(1e-3, 1e-2 / sqrt(step)), 0.9, 0.99).
            loss: "auto" is `linear_cross_entropy`; any other loss gets the logits.
            weighted_metrics: by default none: a metric needs the logits.
            jit_compile: True compiles the whole training step with XLA. "blocks", for TensorFlow
                and the default loss, compiles a program for each kind of block, which all blocks
                of that kind share: the first step comes in half the time or less and takes less
                memory; the steps of small models take up to a tenth longer. "auto" trains with XLA
                wherever there is one device, on a CPU too, where Keras' own "auto" does not: by
                blocks where it can and there are more than four. It leaves generation, which gains
                nothing, to Keras. Pass False for a few steps only, or for batches of ever new
                shapes: the first step of a shape takes longer. (On JAX, False runs operation by
                operation.)
            **kwargs: of `keras_hub.models.CausalLM.compile`, `sampler` among them.

        Raises:
            ValueError: "blocks" where a step can't be compiled so.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(CappedInverseSqrt(), beta_1=0.9, beta_2=0.99)
        loss = None if isinstance(loss, str) and loss == "auto" else loss
        self._asked_jit_compile = jit_compile
        one_device = self._num_replicas == 1 and not kwargs.get("run_eagerly")
        needs_logits = loss is not None or weighted_metrics or kwargs.get("metrics")
        by_blocks = self._shares_programs and one_device and not needs_logits
        if self.chooses_jit_compile and one_device:
            deep = len(self.backbone.blocks) > _BLOCKS_IN_ONE_PROGRAM
            jit_compile = "blocks" if by_blocks and deep else True
        self._programs = None
        if jit_compile == "blocks":
            self._programs, jit_compile = self._new_programs(by_blocks), False
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            jit_compile=jit_compile,
            **kwargs,
        )

    @property
    def chooses_jit_compile(self) -> bool:
        """Whether nobody asked for XLA, or for none."""
        return self._asked_jit_compile == "auto"

    @property
    def _num_replicas(self) -> int:
        # Keras' TensorFlow models know their strategy, under several replicas of which XLA fails.
        # On JAX a step is one program, however many devices run it.
        strategy = getattr(self, "distribute_strategy", None)
        return 1 if strategy is None else strategy.num_replicas_in_sync

    @property
    def _shares_programs(self) -> bool:
        return keras.backend.backend() == "tensorflow" and self.carried_state is None

    def _new_programs(self, by_blocks: bool) -> Any:
        if not by_blocks:
            raise ValueError(
                "jit_compile='blocks' is for TensorFlow on one device, with the default loss and "
                "no metrics, and not for run_eagerly or a carried state. Pass jit_compile='auto'."
            )
        # Here, as it imports TensorFlow.
        from elita_tf.models.programs import Programs

        return Programs(self.rematerialize)

    def get_compile_config(self) -> dict[str, Any]:
        """As compiled: "auto" chooses anew where the model is loaded."""
        config = super().get_compile_config()
        return config and {**config, "jit_compile": self._asked_jit_compile}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as saved, so that a reloaded model goes on with its optimizer's state."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> Any:
        # Variables that come up while TensorFlow traces the step have it trace once more.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def __call__(self, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # `fit` asks for the logits too. Its loss needs none, but to trace them would take as long.
        if kwargs.get("training") and self._programs is not None and self._programs.in_a_step:
            hidden_states = self._hidden_states(inputs, training=True)
            return self.backbone.token_embedding(hidden_states, reverse=True)
        return super().__call__(inputs, *args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self.loss is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        require_inputs(self.name, x, labels=y)
        # The logits of `y_pred` stay unused, so a compiled step never computes them.
        hidden_states, cross_entropy = self._hidden_states(x, training), linear_cross_entropy
        if self._programs is not None:
            cross_entropy = self._programs.compiled(linear_cross_entropy)
        loss = cross_entropy(hidden_states, self.backbone.output_kernel, y, sample_weight)
        # Every replica has the mean over its part of the batch, and Keras adds these up.
        return sum(self.losses, loss) / self._num_replicas

    def _hidden_states(self, x: dict[str, Any], training: bool) -> Any:
        if self._programs is not None:
            return self.backbone.call_wrapped(x, self._programs.compiled, training)
        if training and self.rematerialize:
            return self.backbone.call_wrapped(x, _rematerialized, training)
        if training and self.carried_state is not None:
            state = self.carried_state.read()
            hidden_states, state = self.backbone.call_with_state(x, state, training=True)
            self.carried_state.write(state)
            return hidden_states
        return self.backbone(x, training=training)


def _rematerialized(branch: Callable[..., Any], layers: Sequence[Any]) -> Callable[..., Any]:
    return lambda x, options: keras.remat(lambda x: branch(x, options))(x)
