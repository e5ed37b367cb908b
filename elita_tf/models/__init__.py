"""Decoder language models assembled from the layers."""

from elita_tf.data import ElitaGPT2Tokenizer, ElitaTokenizer
from elita_tf.models.architectures import architectures
from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.causal_lm import ElitaCausalLM
from elita_tf.models.export import export_litert, export_onnx, export_saved_model
from elita_tf.models.gpt2 import load_gpt2_embeddings
from elita_tf.models.preprocessor import ElitaCausalLMPreprocessor
from elita_tf.models.registry import register_feed_forward, register_mixer
from elita_tf.models.safetensors import export_safetensors

__all__ = [
    "ElitaBackbone",
    "ElitaCausalLM",
    "ElitaCausalLMPreprocessor",
    "ElitaGPT2Tokenizer",
    "ElitaTokenizer",
    "architectures",
    "export_litert",
    "export_onnx",
    "export_safetensors",
    "export_saved_model",
    "load_gpt2_embeddings",
    "register_feed_forward",
    "register_mixer",
]
