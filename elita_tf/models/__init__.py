"""Decoder language models assembled from the layers."""

from elita_tf.models.architectures import architectures
from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.causal_lm import ElitaCausalLM

__all__ = ["ElitaBackbone", "ElitaCausalLM", "architectures"]
