"""Pure functions of the linear-time mechanisms: no weights, no layers, only `keras.ops`.

Notation, for the whole project. Axes, in this order and with these letters in every einsum:

    b  batch          t  time (s: a second time axis)     h  heads           d  hidden
    k  key_dim        v  value_dim                        p  position_dim    i  inner      r  rank
    n  num_chunks     c  chunk (position within a chunk)

Every sequence op of one mechanism takes the same arguments and returns `(outputs, final_state)`:
`*_step` advances one position, `*_recurrent` is the loop of that step and so the definition, and
the op without suffix is the fast form of the same function. States, and all sums behind them, are
float32, or float64 where the inputs are float64. A `log_` prefix or a `_logits` suffix says that a
quantity lives in log space.

`segment_ids`, integers (b, t), pack documents into rows: where they differ from the position
before, a segment begins, from an empty state. The first position of a call goes on with the initial
state. A `*_step` takes `segment_start`, booleans (b,), instead.
"""

from elita_tf.ops.attention2 import (
    Attention2State,
    attention2,
    attention2_empty_state,
    attention2_recurrent,
    attention2_step,
)
from elita_tf.ops.cross_entropy import linear_cross_entropy, token_cross_entropy
from elita_tf.ops.feed_forward2 import feed_forward2
from elita_tf.ops.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_recurrent,
    gated_linear_attention_step,
)

__all__ = [
    "Attention2State",
    "attention2",
    "attention2_empty_state",
    "attention2_recurrent",
    "attention2_step",
    "feed_forward2",
    "gated_linear_attention",
    "gated_linear_attention_recurrent",
    "gated_linear_attention_step",
    "linear_cross_entropy",
    "token_cross_entropy",
]
