"""The Attention2 layer of ELiTA."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import require_flag, require_sizes, split_heads
from elita_tf.layers.decay import half_life_bias, require_half_lives, spread_half_lives
from elita_tf.layers.mixer import POSITION, SequenceMixer
from elita_tf.layers.projection import projection
from elita_tf.ops import Attention2State, attention2, attention2_step
from elita_tf.ops.arguments import require_positive


@keras.saving.register_keras_serializable(package="elita_tf")
class Attention2(SequenceMixer):
    """Causal attention with scalar logits, linear in time (ELiTA), with or without a forget gate.

    Per head, with i the absolute position, n the `context_length`, and m = 1, 2:

        p_m,i = sin(i a_m / n + b_m)
        key_logits_i = k_1 . x_i + p_1,i . c        self_logits_i = k_2 . x_i
        query_logits_i = p_2,i . c                  (+ k_3 . x_i with `use_query`)
        S_i = e^log_decay_i S_{i-1} + e^key_i v_i   Z_i = e^log_decay_i Z_{i-1} + e^key_i
        y_i = (e^self_i v_i + e^query_i S_i) / (e^self_i + e^query_i Z_i),       v_i = V x_i

    then the heads are joined and projected back to the input width. The positions are divided by
    the saved `context_length`, never by the length that happens to arrive, so a prefix and the
    whole sequence agree; positions beyond `context_length` continue the same sine. Without a
    `context_length` there are no sines, and p is 0.

    What decays is chosen by `decay`:

        None        log_decay_i = 0                        as published
        "learned"   log_decay_i = -softplus(b)             one learned half-life a head
        "gated"     log_decay_i = -softplus(w . x_i + b)   read from the input, w from 0

    The published form has the sines alone to tell near from far: how two earlier positions weigh
    against one another does not depend on where the query stands. With a decay it does. For
    language take `context_length=None, use_query=True, decay="gated"`, which is as good far beyond
    the length that it was trained on; docs/results.md has the figures.

    Args:
        num_heads: number of heads.
        context_length: n, the number of positions over which the sine's phase advances by `a`;
            None for no sines, which needs a `decay`.
        value_dim: features of a head's values; by default the input width over `num_heads`.
        position_dim: sine features per head.
        use_query: add k_3 . x to the query logits, as the authors' later form does.
        decay: None, "learned" or "gated".
        half_lives: the half-lives in positions that a decay starts from: those of all heads but the
            last are geometric from the first number to the second, and the last head's is 65,536.
            Of two heads the first has the first number; one head alone has the second.
        kernel_initializer: for the value and output projections.
        logit_initializer: for k, a, b and c; by default uniform between -0.05 and 0.05.
        kernel_regularizer: for the kernels of all projections, k and w among them.

    Call arguments:
        inputs: (batch, time, hidden).
        mask: optional boolean (batch, time). A masked position takes no part and advances no
            position; its own output is finite and otherwise unspecified.
        segment_ids: optional integers (batch, time). Where they differ from the real position
            before, a segment begins: it sees nothing earlier, and its positions count from 0.

    Returns:
        (batch, time, hidden).

    Raises:
        ValueError: a size below 1, a width that `num_heads` does not divide, neither a
            `context_length` nor a `decay`, half-lives that are not two positive numbers, an
            unknown argument, or a shape of inputs, mask, segments or state that does not fit.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> layer = layers.Attention2(num_heads=2, use_query=True, decay="gated")
    >>> tuple(layer(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    Source: the elita-transformer repository, equations of its README; the decay is this package's.
    """

    masked_terms = {"key_logits": -float("inf"), "log_decay": 0.0}
    initial_values = {"max_logit": -float("inf")}

    def __init__(
        self,
        num_heads: int,
        context_length: int | None = None,
        value_dim: int | None = None,
        position_dim: int = 8,
        use_query: bool = False,
        decay: str | None = None,
        half_lives: tuple[float, float] = (1.0, 64.0),
        kernel_initializer: Any = "glorot_uniform",
        logit_initializer: Any = "random_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_positive("Attention2", num_heads=num_heads, position_dim=position_dim)
        require_sizes("Attention2", context_length=context_length, value_dim=value_dim)
        require_flag("Attention2", use_query=use_query)
        require_half_lives("Attention2", half_lives)
        _require_decay(decay, context_length)
        self.num_heads = num_heads
        self.context_length = context_length
        self.value_dim = value_dim
        self.position_dim = position_dim
        self.use_query = use_query
        self.decay = decay
        self.half_lives = tuple(half_lives)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.logit_initializer = keras.initializers.get(logit_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def create_weights(self, inputs_shape: tuple[int | None, ...]) -> None:
        value_dim = self.value_dim or split_heads(
            "Attention2", "value_dim", self.hidden_dim, self.num_heads
        )
        self._head_value_dim = value_dim
        self.value_projection = projection(
            self, "btd,dhv->bthv", (None, self.num_heads, value_dim), "value"
        )
        self.logit_projection = projection(
            self,
            "btd,dhm->bthm",
            (None, self.num_heads, 3 if self.use_query else 2),
            "logits",
            self.logit_initializer,
        )
        self.output_projection = projection(
            self, "bthv,hvd->btd", (None, self.hidden_dim), "output"
        )
        self.value_projection.build(inputs_shape)
        self.logit_projection.build(inputs_shape)
        self.output_projection.build((*inputs_shape[:-1], self.num_heads, value_dim))
        if self.context_length is not None:
            sines = (2, self.num_heads, self.position_dim)
            self.frequency = self._logit_weight(sines, "frequency")
            self.phase = self._logit_weight(sines, "phase")
            self.readout = self._logit_weight(sines[1:], "readout")
        if self.decay is not None:
            self._create_decay(inputs_shape)

    def _create_decay(self, inputs_shape: tuple[int | None, ...]) -> None:
        bias = half_life_bias(spread_half_lives(self.half_lives, self.num_heads))
        # Not in the policy's dtype: bfloat16 would keep two digits of a long half-life.
        self.decay_bias = self.add_weight(
            (self.num_heads,),
            keras.initializers.Constant(bias),
            dtype=self.state_dtype,
            autocast=False,
            name="decay_bias",
        )
        self.decay_projection = None
        if self.decay == "gated":
            self.decay_projection = projection(
                self, "btd,dh->bth", (None, self.num_heads), "decay", keras.initializers.Zeros()
            )
            self.decay_projection.build(inputs_shape)

    def _logit_weight(self, shape: tuple[int, ...], name: str) -> Any:
        # Not cast to the compute dtype: the phase of a far position needs all of float32.
        return self.add_weight(shape, self.logit_initializer.clone(), name=name, autocast=False)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of `elita_tf.ops.Attention2State`, and the position if there are sines."""
        heads, value_dim = self.num_heads, self._head_value_dim
        sums = Attention2State((heads,), (heads, value_dim), (heads,))._asdict()
        return sums if self.context_length is None else {**sums, POSITION: ()}

    def make_terms(self, inputs: Any, positions: Any, mask: Any) -> dict[str, Any]:
        logits = ops.cast(self.logit_projection(inputs), self.state_dtype)
        key_logits, self_logits = logits[..., 0], logits[..., 1]
        query_logits = logits[..., 2] if self.use_query else ops.zeros_like(key_logits)
        if positions is not None:
            key_position, query_position = self._position_logits(positions)
            key_logits, query_logits = key_logits + key_position, query_logits + query_position
        return {
            "key_logits": key_logits,
            "query_logits": query_logits,
            "self_logits": self_logits,
            "value": self.value_projection(inputs),
            "log_decay": None if self.decay is None else self.log_decays(inputs),
        }

    def run_step(self, terms: dict[str, Any], state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        outputs, final = attention2_step(**terms, state=_sums(state))
        return outputs, final._asdict()

    def run_sequence(
        self, terms: dict[str, Any], state: dict[str, Any] | None, segment_ids: Any
    ) -> tuple[Any, dict[str, Any]]:
        initial = state and _sums(state)
        outputs, final = attention2(**terms, initial_state=initial, segment_ids=segment_ids)
        return outputs, final._asdict()

    def position_bases(self, length: int) -> Any:
        """P(i, j) = c . (p_1,j + p_2,i) of every head: float array (heads, length, length).

        Raises:
            ValueError: the layer has no sines.
        """
        if self.context_length is None:
            raise ValueError(
                f"`{self.name}` has no position bases: they are made of the sines of a layer with "
                "a `context_length`, and this one has None. Its positions are in its decays."
            )
        key, query = self._position_logits(ops.arange(length, dtype="int32")[None, :])
        return ops.transpose(query[0])[:, :, None] + ops.transpose(key[0])[:, None, :]

    def log_decays(self, inputs: Any) -> Any:
        """The log_decay of every position and head, (batch, time, heads), of such inputs.

        A half-life in positions is ln 2 / -log_decay.

        Raises:
            ValueError: the layer has no decay.
        """
        if self.decay is None:
            raise ValueError(
                f"`{self.name}` has no decays: its `decay` is None. Pass decay='gated', say."
            )
        bias = ops.cast(self.decay_bias, self.state_dtype)
        if self.decay_projection is None:
            return ops.broadcast_to(-ops.softplus(bias), (*ops.shape(inputs)[:2], self.num_heads))
        return -ops.softplus(ops.cast(self.decay_projection(inputs), self.state_dtype) + bias)

    def _position_logits(self, positions: Any) -> tuple[Any, Any]:
        """p_1 . c and p_2 . c, each (batch or 1, time, heads), for int32 (batch or 1, time)."""
        frequency, phase, readout = (
            ops.cast(x, self.state_dtype) for x in (self.frequency, self.phase, self.readout)
        )
        fraction = ops.cast(positions, self.state_dtype) / self.context_length
        angles = fraction[..., None, None, None] * frequency + phase
        logits = ops.sum(ops.sin(angles) * readout, axis=-1)
        return logits[:, :, 0], logits[:, :, 1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "context_length": self.context_length,
            "value_dim": self.value_dim,
            "position_dim": self.position_dim,
            "use_query": self.use_query,
            "decay": self.decay,
            "half_lives": self.half_lives,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "logit_initializer": keras.initializers.serialize(self.logit_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


def _require_decay(decay: Any, context_length: int | None) -> None:
    if decay not in (None, "learned", "gated"):
        raise ValueError(
            "`decay` of Attention2: expected None, as published, 'learned' or 'gated', received "
            f"{decay!r}."
        )
    if decay is None and context_length is None:
        raise ValueError(
            "Attention2 knows positions by the sines of a `context_length` or by a `decay`, and "
            "received None for both. Pass context_length=256, say, or decay='gated'."
        )


def _sums(state: dict[str, Any]) -> Attention2State:
    return Attention2State(*(state[name] for name in Attention2State._fields))
