"""The language model: a backbone with its loss and its training."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
from keras import ops

from elita_tf.layers.arguments import reject_unknown, require_flag
from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.blocks import draws_random_numbers, require_no_remat_scope
from elita_tf.models.carried_state import CarriedState
from elita_tf.models.generation import Generation
from elita_tf.models.inputs import OptionalInputs, require_ids, require_inputs
from elita_tf.models.losses import TokenMean, token_weights, weigh_labels, weight_of_batch
from elita_tf.models.preprocessor import ElitaCausalLMPreprocessor
from elita_tf.models.rematerialization import run_rematerialized
from elita_tf.models.saving import Saving
from elita_tf.models.scoring import Scoring
from elita_tf.models.training_data import CheckedData
from elita_tf.ops import linear_cross_entropy
from elita_tf.optimizers import MonitoredAdam
from elita_tf.packaged_presets import PackagedPresets
from elita_tf.schedules import CappedInverseSqrt

# More blocks in one program would take XLA over twenty seconds to compile on two cores.
_BLOCKS_IN_ONE_PROGRAM = 4


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaCausalLM(
    PackagedPresets,
    Saving,
    OptionalInputs,
    CheckedData,
    Scoring,
    Generation,
    keras_hub.models.CausalLM,
):
    """A causal language model on an `ElitaBackbone`: `fit`, `generate`, `stream` and `step`.

    Calling it gives logits. `fit` and `evaluate` need none: their loss is the mean cross-entropy
    in nats per token, weights included, through `linear_cross_entropy`, which never holds the
    (tokens, vocabulary) logits. Negative labels are left out of the mean, and so are labels at
    positions that `padding_mask` excludes, unless there are weights: one a label, or one a row. A
    label that is not below the vocabulary's size is a ValueError in eager steps and makes the loss
    NaN in compiled ones. The loss that is reported is the mean over the tokens of all batches, so
    that of `evaluate` does not depend on the batch size.

    Generation reads the prompt in the parallel form and goes on one step a token. What it keeps
    of the past is the blocks' state, whose size does not depend on the length: `stream` gives the
    text as it comes, `read` the state after a text, and `generate` and `stream` go on from one.

    Args:
        backbone: an `ElitaBackbone`.
        preprocessor: an `ElitaCausalLMPreprocessor`, for strings; None for inputs that are token
            ids already.
        carried_batch_size: train each batch from the state that the one before left (truncated
            backpropagation through time: no gradient goes into earlier batches). Every batch has
            this size, and its rows go on where those of the last one ended, as in
            `elita_tf.data.stream_windows`, until `reset_carried_state()`. None starts every batch
            anew.
        rematerialize: keep the residual stream alone for the backward pass, which computes every
            mixer and feed-forward again, in pieces of 16,384 tokens: for models that are deep or
            texts that are long.
        **kwargs: of `keras_hub.models.CausalLM`: name, trainable, compile.

    Inputs:
        As for `ElitaBackbone`.

    Returns:
        The logits (batch, time, vocabulary_size).

    Raises:
        ValueError: `carried_batch_size` together with `rematerialize`, either of them with blocks
            that draw random numbers, an unknown argument, or anything else than a backbone and a
            preprocessor.

    Example:

    >>> import numpy as np
    >>> from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
    >>> arguments = {**architectures["elita_query"], "num_layers": 1}
    >>> model = ElitaCausalLM(ElitaBackbone(vocabulary_size=50, **arguments))
    >>> model.compile(jit_compile=False)  # for a single step
    >>> windows = np.arange(2 * 9).reshape(2, 9) % 50
    >>> history = model.fit({"token_ids": windows[:, :-1]}, windows[:, 1:], verbose=0)
    >>> history.history["loss"][0] < 5  # log 50 is 3.9
    True
    >>> logits, state = model.prefill(windows)
    >>> logits, state = model.step(np.argmax(logits, axis=-1), state)
    >>> tuple(logits.shape)
    (2, 50)
    """

    backbone_cls = ElitaBackbone
    preprocessor_cls = ElitaCausalLMPreprocessor
    _asked_jit_compile: bool | str = "auto"
    # How many steps of Keras that need no logits are under way: replicas take turns within theirs.
    _steps_without_logits = 0

    def __init__(
        self,
        backbone: ElitaBackbone,
        preprocessor: Any = None,
        carried_batch_size: int | None = None,
        rematerialize: bool = False,
        **kwargs: Any,
    ) -> None:
        own = inspect.signature(ElitaCausalLM.__init__).parameters
        reject_unknown("ElitaCausalLM", kwargs, [*list(own)[1:-1], "name", "trainable", "compile"])
        if not isinstance(backbone, ElitaBackbone):
            raise ValueError(f"Expected an ElitaBackbone; received {backbone!r}.")
        if not hasattr(preprocessor, "generate_preprocess") and preprocessor is not None:
            raise ValueError(
                "`preprocessor` of ElitaCausalLM: expected an ElitaCausalLMPreprocessor, or None "
                f"for inputs that are token ids; received {preprocessor!r}."
            )
        require_flag("ElitaCausalLM", rematerialize=rematerialize)
        if rematerialize and carried_batch_size is not None:
            raise ValueError(
                "A carried state leaves the branches that `rematerialize` runs twice. Received "
                f"rematerialize=True and carried_batch_size={carried_batch_size}; pass one of them."
            )
        self._draws_in_blocks = any(map(draws_random_numbers, backbone.blocks))
        if self._draws_in_blocks and (rematerialize or carried_batch_size is not None):
            raise ValueError(
                "A mixer or a feed-forward of the backbone draws random numbers, as dropout does. "
                "`rematerialize` would draw others for the gradient, and `carried_batch_size` "
                f"none. Received rematerialize={rematerialize} and carried_batch_size="
                f"{carried_batch_size}; leave both out, or take the backbone's own `dropout`."
            )
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.carried_state = None
        if carried_batch_size is not None:
            self.carried_state = CarriedState(backbone, carried_batch_size)

        # === Functional model ===
        # These two before the constructor of Keras, which calls `compile`.
        self.rematerialize = rematerialize
        self._shared_compilation: Any = None
        hidden_states = backbone(backbone.input)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)

        # === Config ===
        self.carried_batch_size = carried_batch_size

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids, that of the backbone."""
        return self.backbone.vocabulary_size

    def reset_carried_state(self) -> None:
        """Let the next training batch begin new texts, as the first one did.

        Raises:
            ValueError: the model has no `carried_batch_size`.
        """
        if self.carried_state is None:
            raise ValueError(
                "Every batch begins anew already: `carried_batch_size` of this model is None, so "
                "no state is carried that could be reset."
            )
        self.carried_state.reset(self.backbone)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "carried_batch_size": self.carried_batch_size,
            "rematerialize": self.rematerialize,
        }

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

        A step follows the mean over its own tokens. `gradient_accumulation_steps` of an optimizer
        takes the mean of these means, as it is given no number of tokens, and so do the replicas of
        `tf.distribute`: a token counts for more in a part of the batch that has fewer. Where rows
        differ much in length, take larger batches instead, with `rematerialize` if need be.

        Args:
            optimizer: "auto" is ELiTA's Adam(min(1e-3, 1e-2 / sqrt(step)), 0.9, 0.99).
            loss: "auto" is `linear_cross_entropy`; any other loss gets the logits, and may have
                `loss_weights`. Losses of Keras divide by the number of labels, unless made with
                `reduction="mean_with_sample_weight"`, which divides by their weights as "auto"
                does; what is reported weighs the batches by the same number.
            weighted_metrics: by default none: a metric needs the logits.
            jit_compile: True compiles the whole training step with XLA. "blocks", for TensorFlow
                and the default loss, compiles a program for each kind of block, which all blocks
                of that kind share: the first step comes in half the time or less and takes less
                memory; the steps of small models take up to a tenth longer. "auto" trains with XLA
                wherever there is one device, on a CPU too, where Keras' own "auto" does not: by
                blocks where it can and there are more than four. Where the whole training step is
                compiled so, a generated token is, too. Pass False for a few steps only, or for
                batches of ever new shapes: the first step of a shape takes longer. (On JAX, False
                runs operation by operation.)
            **kwargs: of `keras_hub.models.CausalLM.compile`, `sampler` among them.

        Raises:
            ValueError: "blocks" where a step can't be compiled so, or `loss_weights` without a
                loss that they belong to.
        """
        if optimizer == "auto":
            optimizer = MonitoredAdam(CappedInverseSqrt(), beta_1=0.9, beta_2=0.99)
        loss = None if isinstance(loss, str) and loss == "auto" else loss
        if loss is None and kwargs.get("loss_weights") is not None:
            raise ValueError(
                "`loss_weights` weigh the losses that are passed as `loss`; received "
                f"{kwargs['loss_weights']!r} for the default loss. Scale the learning rate, or "
                "pass a `loss`."
            )
        # Keras would keep those of an earlier `compile`.
        self.loss = self._compile_loss = self._compile_metrics = None
        self._asked_jit_compile = jit_compile
        one_device = self._num_replicas == 1 and not kwargs.get("run_eagerly")
        needs_logits = loss is not None or weighted_metrics or kwargs.get("metrics")
        self._needs_logits = bool(needs_logits or self._has_a_loss_of_its_own)
        can_share = one_device and not needs_logits and self._blocks_can_share
        if self.chooses_jit_compile and one_device:
            deep = len(self.backbone.blocks) > _BLOCKS_IN_ONE_PROGRAM
            jit_compile = "blocks" if can_share and deep else True
        self._shared_compilation = None
        if jit_compile == "blocks":
            self._shared_compilation = _share_compilation(can_share, self.rematerialize)
            jit_compile = False
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            jit_compile=jit_compile,
            **kwargs,
        )
        # Past Keras, which would track it a second time.
        object.__setattr__(self, "_loss_tracker", TokenMean())

    @property
    def chooses_jit_compile(self) -> bool:
        """Whether `compile` left the choice of XLA to the model."""
        return self._asked_jit_compile == "auto"

    @property
    def _has_a_loss_of_its_own(self) -> bool:
        """Whether a subclass computes its loss or its metrics, perhaps from the logits."""
        own, cls = ElitaCausalLM, type(self)
        return (cls.compute_loss, cls.compute_metrics) != (own.compute_loss, own.compute_metrics)

    @property
    def _blocks_can_share(self) -> bool:
        """Whether the blocks compute with nothing but their inputs and weights."""
        on_tensorflow = keras.backend.backend() == "tensorflow"
        return on_tensorflow and self.carried_state is None and not self._draws_in_blocks

    @property
    def _num_replicas(self) -> int:
        # Keras' TensorFlow models know their strategy, under several replicas of which XLA fails.
        # On JAX a step is one program, however many devices run it.
        strategy = getattr(self, "distribute_strategy", None)
        return 1 if strategy is None else strategy.num_replicas_in_sync

    def get_compile_config(self) -> dict[str, Any]:
        """As compiled: "auto" chooses anew where the model is loaded."""
        config = super().get_compile_config()
        sampler = keras_hub.samplers.serialize(self.sampler)
        return config and {**config, "jit_compile": self._asked_jit_compile, "sampler": sampler}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as saved, so that a reloaded model goes on with its optimizer's state."""
        sampler = keras_hub.samplers.deserialize(config["sampler"])
        rest = {name: value for name, value in config.items() if name != "sampler"}
        self.compile(**keras.saving.deserialize_keras_object(rest), sampler=sampler)
        self.optimizer.build(self.trainable_variables)

    def quantize(self, mode: str | None = None, **kwargs: Any) -> None:
        """Quantizes the backbone: see `ElitaBackbone.quantize`."""
        # Of the model's layers, a tokenizer could not be quantized.
        self.backbone.quantize(mode, **kwargs)
        self.train_function = self.test_function = self.predict_function = None
        self._post_quantize(mode)

    def make_train_function(self, force: bool = False) -> Any:
        require_no_remat_scope(self.name)
        # Variables that come up while TensorFlow traces the step have it trace once more.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def train_step(self, *args: Any) -> Any:
        return self._step(super().train_step, *args)

    def test_step(self, *args: Any) -> Any:
        return self._step(super().test_step, *args)

    def _step(self, step: Callable, *args: Any) -> Any:
        """A step of Keras, which calls the model for its logits before it asks for the loss.

        The loss of this class needs no logits, and to trace them takes seconds.
        """
        self._steps_without_logits += not self._needs_logits
        try:
            return step(*args)
        finally:
            self._steps_without_logits -= not self._needs_logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._steps_without_logits else super().__call__(*args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self.loss is not None:
            return self._loss_of_keras(x, y, y_pred, sample_weight, training)
        require_inputs(self.name, x, labels=y)
        require_ids(self.name, self.vocabulary_size, labels=y)
        labels, weights = weigh_labels(self.name, y, sample_weight, x.get("padding_mask"))
        token_ids, size = ops.convert_to_tensor(x["token_ids"]), self.vocabulary_size
        is_outside = ops.any(labels >= size) | ops.any((token_ids < 0) | (token_ids >= size))
        labels = ops.minimum(labels, size - 1)
        hidden_states = self._hidden_states(x, training)
        kernel, shared = self.backbone.output_kernel, self._shared_compilation
        cross_entropy = linear_cross_entropy if shared is None else shared.linear_cross_entropy
        loss = cross_entropy(hidden_states, kernel, labels, weights)
        # A compiled step has no other way to say that an id is outside of the vocabulary.
        loss = ops.where(is_outside, float("nan"), loss)
        self._report_weight(ops.sum(ops.cast(weights, "float32")))
        # Every replica has the mean over its part of the batch, and Keras adds these up.
        return sum(self.losses, loss) / self._num_replicas

    def _loss_of_keras(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool
    ) -> Any:
        """A `loss` that was passed to `compile`, of the logits."""
        if len(getattr(y, "shape", ())) > 1:
            mask = x.get("padding_mask")
            sample_weight = token_weights(self.name, y, sample_weight, mask)
            reduction = getattr(self.loss, "reduction", None)
            self._report_weight(weight_of_batch(y, sample_weight, reduction))
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _report_weight(self, weight: Any) -> None:
        if self._loss_tracker is not None:  # It is None without `compile`.
            self._loss_tracker.weigh_batch(weight)

    def _hidden_states(self, x: dict[str, Any], training: bool) -> Any:
        """What the backbone gives, computed in the way that the model was made and compiled for."""
        if self._shared_compilation is not None:
            return self.backbone.call_with_runner(x, self._shared_compilation.run, training)
        if training and self.rematerialize:
            return self.backbone.call_with_runner(x, run_rematerialized, training)
        if training and self.carried_state is not None:
            self.carried_state.require_rows(x["token_ids"].shape[0])
            state = self.carried_state.read()
            hidden_states, state = self.backbone.call_with_state(x, state, training=True)
            self.carried_state.write(state)
            return hidden_states
        return self.backbone(x, training=training)


def _share_compilation(can_share: bool, rematerialize: bool) -> Any:
    if not can_share:
        raise ValueError(
            "jit_compile='blocks' is for TensorFlow on one device, with the default loss and "
            "no metrics, and not for run_eagerly, a carried state, or mixers and feed-forwards "
            "that draw random numbers. Pass jit_compile='auto'."
        )
    # Here, as it imports TensorFlow.
    from elita_tf.models.shared_compilation import SharedCompilation

    return SharedCompilation(rematerialize)
