"""The decoder without its output projection."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import keras_hub

from elita_tf.layers.arguments import positions_of, require_state
from elita_tf.layers.segments import LEAF, follow_segments
from elita_tf.models import blocks, padding
from elita_tf.models.learned_positions import LearnedPositions
from elita_tf.packaged_presets import PackagedPresets


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaBackbone(PackagedPresets, padding.OptionalInputs, keras_hub.models.Backbone):
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
        mixers: the mixer of every block, or a pattern of fewer names that repeats over the
            blocks, or one name for all: "attention2" (ELiTA), "attention2_query" (its later form,
            with the query term), "attention2_gated" (with the query term and a forget gate, without
            sines), "gla", "softmax".
        mixer_options: arguments of the mixers' layers, by the names in `mixers`, such as
            {"gla": {"gate_rank": 32}}. They come before what the backbone's own arguments say.
        feed_forward: "feed_forward2" (ELiTA) or "swiglu".
        feed_forward_options: arguments of the feed-forward's layer, such as {"rank": 4}.
        normalization: "layer_norm" or "rms_norm".
        dropout: rate on the embedding and on the output of every mixer and feed-forward.
        context_length: n of Attention2's positions, the window of softmax blocks, and the number
            of learned positions. A longer input is allowed: Attention2's sines go on, softmax
            blocks see the last `context_length` positions, GLA has no positions at all, and
            learned positions beyond the last share the last one's embedding.
        tie_embeddings: let the output projection be the transposed embedding.
        learned_positions: add a learned embedding of the position to that of the token (GPT-2).
        **kwargs: of `keras_hub.models.Backbone`: name, dtype, trainable.

    Inputs:
        A dict of `token_ids`, int (batch, time), and optionally `padding_mask`, boolean
        (batch, time), False where a token is padding, and `segment_ids`, int (batch, time): tokens
        see none of another segment, and positions count from each segment's beginning.

    Returns:
        The normalised hidden states (batch, time, hidden).

    Raises:
        ValueError: an unknown name or option, a size below 1, or a pattern of mixers that does not
            divide the blocks.

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
        mixer_options: dict[str, dict[str, Any]] | None = None,
        feed_forward: str = "feed_forward2",
        feed_forward_options: dict[str, Any] | None = None,
        normalization: str = "layer_norm",
        dropout: float = 0.0,
        context_length: int = 256,
        tie_embeddings: bool = True,
        learned_positions: bool = False,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # === Layers ===
        blocks.require_sizes(vocabulary_size, hidden_dim, num_heads, context_length)
        blocks.require_options(dropout, tie_embeddings, learned_positions)
        mixer_options, feed_forward_options = mixer_options or {}, feed_forward_options or {}
        build_mixers = blocks.mixer_builders(
            mixers, num_layers, mixer_options, num_heads, context_length
        )
        build_norm = partial(blocks.normalization_builder(normalization), dtype=dtype)
        build_feed_forward = blocks.feed_forward_builder(feed_forward, feed_forward_options)
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_embeddings, dtype=dtype, name="token_embedding"
        )
        self.position_embedding = None
        if learned_positions:
            self.position_embedding = LearnedPositions(
                context_length, hidden_dim, dtype=dtype, name="position_embedding"
            )
        self.blocks = [
            {
                "mixer_norm": build_norm(name=f"block_{i}_mixer_norm"),
                "mixer": build_mixer(dtype=dtype, name=f"block_{i}_{mixer}"),
                "feed_forward_norm": build_norm(name=f"block_{i}_feed_forward_norm"),
                "feed_forward": build_feed_forward(dtype=dtype, name=f"block_{i}_{feed_forward}"),
            }
            for i, (mixer, build_mixer) in enumerate(build_mixers)
        ]
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=dtype, name="dropout")
        self.final_norm = build_norm(name="final_norm")

        # === Functional model ===
        inputs = padding.symbolic_inputs()
        hidden_states = self.call_wrapped(inputs, lambda branch, layers: branch, training=None)
        super().__init__(inputs=inputs, outputs=hidden_states, dtype=dtype, **kwargs)

        for block in self.blocks:
            for layer in (block["mixer"], block["feed_forward"]):
                layer.output_kernel.assign(keras.ops.zeros(layer.output_kernel.shape))

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.mixers = blocks.as_pattern(mixers, num_layers)
        self.mixer_options = mixer_options
        self.feed_forward = feed_forward
        self.feed_forward_options = feed_forward_options
        self.normalization = normalization
        self.dropout = dropout
        self.context_length = context_length
        self.tie_embeddings = tie_embeddings
        self.learned_positions = learned_positions

    def _embed(self, token_ids: Any, **options: Any) -> Any:
        """The embedding, wired once; `options` are those of `LearnedPositions`."""
        x, positions = self.token_embedding(token_ids), self.position_embedding
        return x if positions is None else x + positions(token_ids, **options)

    def _decode(
        self,
        embedded: Any,
        options: dict[str, Any],
        mix: Callable[..., Any] = lambda mixer, x, options: mixer(x, **options),
        intercept: Callable[[Any, int], Any] = lambda x, index: x,
        training: bool | None = None,
        wrap: Callable[..., Callable] = lambda branch, layers: branch,
    ) -> Any:
        """The decoder, wired once.

        `mix` applies a mixer, `intercept` sees what a block makes, and `wrap` gets every branch
        beside the residual stream as a function. Dropout is none of it: a branch may run twice.
        """

        def run(norm: keras.layers.Layer, layer: keras.layers.Layer, apply: Callable) -> Any:
            branch = wrap(lambda x, options: apply(layer, norm(x), options), [norm, layer])
            return self.dropout_layer(branch(x, options), training=training)

        x = self.dropout_layer(intercept(embedded, -1), training=training)
        for i, block in enumerate(self.blocks):
            mixer_norm, mixer, feed_forward_norm, feed_forward = block.values()
            x = x + run(mixer_norm, mixer, mix)
            x = x + run(feed_forward_norm, feed_forward, lambda layer, x, _: layer(x))
            x = intercept(x, i)
        return wrap(lambda x, _: self.final_norm(x), [self.final_norm])(x, options)

    def call_wrapped(
        self, inputs: dict[str, Any], wrap: Callable[..., Callable], training: bool | None = False
    ) -> Any:
        """What a call gives; `wrap(branch, layers)` returns how to run a branch of these layers.

        Branches are those beside the residual stream, and the last norm: functions `(x, options)`,
        `options` a dict of tensors or None.
        """
        options = padding.mixer_options(inputs)
        x = self._embed(inputs["token_ids"], **options)
        return self._decode(x, options, training=training, wrap=wrap)

    def call_with_state(
        self,
        inputs: dict[str, Any],
        state: dict[str, Any],
        intercept: Callable[[Any, int], Any] = lambda x, index: x,
        training: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Continue from `state`: (hidden states, new state); what a call does, in pieces.

        Args:
            inputs: as for a call. With `segment_ids`, the new state also holds the last one as
                `segment_id`, and a first token of another segment starts from the empty state.
            state: flat dict of arrays, at first `get_initial_state(batch_size)`.
            intercept: `(x, index) -> x` on the embeddings (index -1) and on each block's output.
            training: whether dropout is on.
        """
        padding.require_stream(self.name, inputs, state)
        token_ids, mask = inputs["token_ids"], inputs.get("padding_mask")
        segments, own_state, kept = follow_segments(self, state, mask, inputs.get("segment_ids"))
        options = {"mask": mask, "segment_ids": segments}
        offset, new_state = own_state.get("position"), {}
        if self.learned_positions:
            new_state["position"] = positions_of(token_ids, offset, mask, segments)[1]

        def mix(mixer: keras.layers.Layer, x: Any, options: dict[str, Any]) -> Any:
            prefix = f"{mixer.name}_"
            own = {k.removeprefix(prefix): v for k, v in own_state.items() if k.startswith(prefix)}
            outputs, own = mixer.call_with_state(x, own, **options)
            # The segment of all is one.
            new_state.update({prefix + leaf: own[leaf] for leaf in own if leaf != LEAF})
            return outputs

        embedded = self._embed(token_ids, offset=offset, **options)
        hidden_states = self._decode(embedded, options, mix, intercept, training)
        require_state(self, state, set(new_state))
        return hidden_states, {**new_state, **kept}

    def get_initial_state(self, batch_size: int) -> dict[str, Any]:
        """The state before the first token: a flat dict, the batch first in every leaf.

        Its size does not depend on the length, softmax blocks included: they hold the last
        `context_length` keys and values.
        """
        state = {}
        if self.learned_positions:
            state["position"] = keras.ops.zeros((batch_size,), "int32")
        for block in self.blocks:
            leaves = block["mixer"].get_initial_state(batch_size)
            state.update({f"{block['mixer'].name}_{leaf}": x for leaf, x in leaves.items()})
        return state

    @property
    def output_kernel(self) -> Any:
        """The kernel of the output projection, (vocabulary_size, hidden_dim)."""
        embedding, tied = self.token_embedding, self.tie_embeddings
        kernel = embedding.embeddings if tied else keras.ops.transpose(embedding.reverse_embeddings)
        if embedding.quantization_mode != "int8":
            return kernel
        scale = embedding.embeddings_scale if tied else embedding.reverse_embeddings_scale
        return keras.ops.cast(kernel, self.compute_dtype) / scale[:, None]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "mixers": self.mixers,
            "mixer_options": self.mixer_options,
            "feed_forward": self.feed_forward,
            "feed_forward_options": self.feed_forward_options,
            "normalization": self.normalization,
            "dropout": self.dropout,
            "context_length": self.context_length,
            "tie_embeddings": self.tie_embeddings,
            "learned_positions": self.learned_positions,
        }
