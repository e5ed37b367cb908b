"""The decoder without its output projection."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import keras_hub

from elita_tf import layers

_MIXERS: dict[str, Callable[..., keras.layers.Layer]] = {
    "attention2": lambda heads, context, **kwargs: layers.Attention2(heads, context, **kwargs),
    "attention2_query": lambda heads, context, **kwargs: layers.Attention2(
        heads, context, use_query=True, **kwargs
    ),
    "gla": lambda heads, context, **kwargs: layers.GatedLinearAttention(heads, **kwargs),
    "softmax": lambda heads, context, **kwargs: layers.CausalSelfAttention(
        heads, context, **kwargs
    ),
}
_FEED_FORWARDS: dict[str, Callable[..., keras.layers.Layer]] = {
    "feed_forward2": layers.FeedForward2,
    "swiglu": layers.GatedFeedForward,
}
_NORMALIZATIONS: dict[str, Callable[..., keras.layers.Layer]] = {
    "layer_norm": lambda **kwargs: keras.layers.LayerNormalization(epsilon=1e-5, **kwargs),
    "rms_norm": lambda **kwargs: keras.layers.RMSNormalization(epsilon=1e-5, **kwargs),
}


class OptionalPaddingMask:
    """Mixin of functional models: inputs without a `padding_mask` have no padding.

    Keras takes None for an optional input, but not a dict without it.
    """

    def __call__(self, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().__call__({"padding_mask": None, **inputs}, *args, **kwargs)

    def call(self, inputs: dict[str, Any], training: bool | None = None, mask: Any = None) -> Any:
        return super().call({"padding_mask": None, **inputs}, training=training, mask=mask)


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaBackbone(OptionalPaddingMask, keras_hub.models.Backbone):
    """A pre-norm decoder with a mixer and a feed-forward in every block.

        x = embedding(token_ids)
        x = x + mixer(norm(x));  x = x + feed_forward(norm(x))      in every block
        hidden states = norm(x)

    The kernels that write into the residual stream start at zero, so every block starts as the
    identity: the small embedding is not drowned by untrained blocks, and training starts faster.

    Args:
        vocabulary_size: number of token ids.
        num_layers: number of blocks.
        hidden_dim: width of the residual stream.
        num_heads: heads of every mixer.
        mixers: the mixer of every block, or one name for all: "attention2" (ELiTA),
            "attention2_query" (its later form, with the query term), "gla", "softmax".
        feed_forward: "feed_forward2" (ELiTA) or "swiglu".
        normalization: "layer_norm" or "rms_norm".
        dropout: rate on the embedding and on the output of every mixer and feed-forward.
        context_length: n of Attention2's positions, and the window of softmax blocks.
        tie_embeddings: let the output projection be the transposed embedding.
        **kwargs: of `keras_hub.models.Backbone`: name, dtype, trainable.

    Inputs:
        A dict of `token_ids`, int (batch, time), and optionally `padding_mask`, boolean
        (batch, time), False where a token is padding.

    Returns:
        The normalised hidden states (batch, time, hidden).

    Raises:
        ValueError: an unknown name, a size below 1, or mixers that are not one per block.

    Example:

    >>> import numpy as np
    >>> from elita_tf.models import ElitaBackbone, architectures
    >>> backbone = ElitaBackbone(vocabulary_size=100, **architectures["elita"])
    >>> tuple(backbone({"token_ids": np.ones((2, 7), "int32")}).shape)
    (2, 7, 64)

    Sources: ELiTA (the elita-transformer repository); Yang et al., arXiv:2312.06635.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        hidden_dim: int,
        num_heads: int,
        mixers: str | list[str] = "attention2",
        feed_forward: str = "feed_forward2",
        normalization: str = "layer_norm",
        dropout: float = 0.0,
        context_length: int = 256,
        tie_embeddings: bool = True,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # === Layers ===
        mixers = _one_per_block(mixers, num_layers)
        build_mixers = [_choose("mixers", _MIXERS, mixer, dtype) for mixer in mixers]
        build_norm = _choose("normalization", _NORMALIZATIONS, normalization, dtype)
        build_feed_forward = _choose("feed_forward", _FEED_FORWARDS, feed_forward, dtype)
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_embeddings, dtype=dtype, name="token_embedding"
        )
        self.blocks = [
            {
                "mixer_norm": build_norm(name=f"block_{i}_mixer_norm"),
                "mixer": build_mixer(num_heads, context_length, name=f"block_{i}_{mixer}"),
                "feed_forward_norm": build_norm(name=f"block_{i}_feed_forward_norm"),
                "feed_forward": build_feed_forward(name=f"block_{i}_{feed_forward}"),
            }
            for i, (mixer, build_mixer) in enumerate(zip(mixers, build_mixers, strict=True))
        ]
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=dtype, name="dropout")
        self.final_norm = build_norm(name="final_norm")

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="bool", name="padding_mask", optional=True)
        hidden_states = self._decode(token_ids, lambda mixer, x: mixer(x, mask=padding_mask))
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=hidden_states,
            dtype=dtype,
            **kwargs,
        )

        for block in self.blocks:
            for layer in (block["mixer"], block["feed_forward"]):
                layer.output_kernel.assign(keras.ops.zeros_like(layer.output_kernel))

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.mixers = mixers
        self.feed_forward = feed_forward
        self.normalization = normalization
        self.dropout = dropout
        self.context_length = context_length
        self.tie_embeddings = tie_embeddings

    def _decode(self, token_ids: Any, mix: Callable[[keras.layers.Layer, Any], Any]) -> Any:
        """The decoder, wired once; `mix` says how a mixer is applied."""
        x = self.dropout_layer(self.token_embedding(token_ids))
        for block in self.blocks:
            x = x + self.dropout_layer(mix(block["mixer"], block["mixer_norm"](x)))
            x = x + self.dropout_layer(block["feed_forward"](block["feed_forward_norm"](x)))
        return self.final_norm(x)

    @property
    def output_kernel(self) -> Any:
        """The kernel of the output projection, (vocabulary_size, hidden_dim)."""
        if self.tie_embeddings:
            return self.token_embedding.embeddings
        return keras.ops.transpose(self.token_embedding.reverse_embeddings)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "mixers": self.mixers,
            "feed_forward": self.feed_forward,
            "normalization": self.normalization,
            "dropout": self.dropout,
            "context_length": self.context_length,
            "tie_embeddings": self.tie_embeddings,
        }


def _choose(
    argument: str, choices: dict[str, Callable[..., keras.layers.Layer]], name: str, dtype: Any
) -> Callable[..., keras.layers.Layer]:
    if name not in choices:
        raise ValueError(
            f"`{argument}` of ElitaBackbone: expected one of {sorted(choices)}, received {name!r}."
        )
    return partial(choices[name], dtype=dtype)


def _one_per_block(mixers: str | list[str], num_layers: int) -> list[str]:
    layers.arguments.require_positive("ElitaBackbone", num_layers=num_layers)
    mixers = [mixers] * num_layers if isinstance(mixers, str) else list(mixers)
    if len(mixers) != num_layers:
        raise ValueError(
            f"`mixers` of ElitaBackbone names one mixer per block: expected {num_layers}, the "
            f"`num_layers`, received {len(mixers)}: {mixers}."
        )
    return mixers
