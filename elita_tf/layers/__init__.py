"""Keras layers: weights, configuration and validation around the functions of `elita_tf.ops`."""

from elita_tf.layers.attention2 import Attention2
from elita_tf.layers.causal_self_attention import CausalSelfAttention
from elita_tf.layers.feed_forward2 import FeedForward2
from elita_tf.layers.gated_feed_forward import GatedFeedForward
from elita_tf.layers.gated_linear_attention import GatedLinearAttention
from elita_tf.layers.mixer import SequenceMixer
from elita_tf.layers.streaming import Streaming

__all__ = [
    "Attention2",
    "CausalSelfAttention",
    "FeedForward2",
    "GatedFeedForward",
    "GatedLinearAttention",
    "SequenceMixer",
    "Streaming",
]
