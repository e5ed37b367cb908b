"""Public functions that the layers do not use yet; they may change in any release."""

from elita_tf.experimental.sequence_parallel import (
    attention2_sequence_parallel,
    gated_linear_attention_sequence_parallel,
)

__all__ = ["attention2_sequence_parallel", "gated_linear_attention_sequence_parallel"]
