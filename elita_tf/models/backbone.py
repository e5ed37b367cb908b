"""The decoder without its output projection."""

import inspect
from functools import partial
from typing import Any

import keras
import keras_hub

from elita_tf.layers.arguments import reject_unknown
from elita_tf.layers.segments import follow_segments, positions_of, require_state
from elita_tf.models import registry
from elita_tf.models.blocks import (
    Block,
    ResidualBranch,
    Runner,
    require_no_remat_scope,
    run_directly,
)
from elita_tf.models.inputs import (
    OptionalInputs,
    mixer_tensors,
    require_ids,
    require_stream,
    symbolic_inputs,
)
from elita_tf.models.learned_positions import LearnedPositions
from elita_tf.models.saving import (
    Saving,
    plain_policy,
    require_no_quantized,
    require_quantizable,
    saved_policy,
)
from elita_tf.ops.arguments import require_positive
from elita_tf.packaged_presets import PackagedPresets

# How `get_layout_map` cuts weights over the devices of a mesh. Heads, inner features and the
# vocabulary are cut; what writes into the residual stream is cut along the axis that is summed
# over, so that a branch needs one sum over the devices. All other weights are on every device.
# Keras wants one pattern at most to match a path.
_MIXER = r".*_(attention2|attention2_query|attention2_gated|gla|softmax)"
_LAYOUTS = {
    _MIXER + r"/(query|key|value|logits|gate_up|output_gate)/kernel": (None, "model", None),
    _MIXER + r"/decay/kernel": (None, "model"),
    _MIXER + r"/output/kernel": ("model", None, None),
    r".*_feed_forward2/first/kernel": (None, "model"),
    r".*_feed_forward2/first/bias": ("model",),
    r".*_feed_forward2/kernel": ("model", None, None),
    r".*_swiglu/(gate|value)/kernel": (None, "model"),
    r".*_swiglu/output/kernel": ("model", None),
    r"token_embedding/embeddings": ("model", None),
    r"token_embedding/reverse_embeddings": (None, "model"),
}


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaBackbone(PackagedPresets, Saving, OptionalInputs, keras_hub.models.Backbone):
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
            sines), "gla", "softmax", or what `register_mixer` added.
        mixer_options: arguments of the mixers' layers, by the names in `mixers`, such as
            {"gla": {"gate_rank": 32}}. They come before what the backbone's own arguments say.
        feed_forward: "feed_forward2" (ELiTA), "swiglu", or what `register_feed_forward` added.
        feed_forward_options: arguments of the feed-forward's layer, such as {"rank": 4}.
        normalization: "layer_norm" or "rms_norm".
        dropout: rate on the embedding and on the output of every mixer and feed-forward.
        context_length: n of Attention2's positions, and the number of learned positions. A longer
            input is allowed: Attention2's sines go on, GLA has no positions at all, and learned
            positions beyond the last share the last one's embedding.
        window_length: how many positions softmax blocks see, by default `context_length`.
        tie_embeddings: let the output projection be the transposed embedding.
        learned_positions: add a learned embedding of the position to that of the token (GPT-2).
        **kwargs: of `keras_hub.models.Backbone`: name, dtype, trainable.

    Inputs:
        A dict of `token_ids`, int (batch, time), and optionally `padding_mask`, boolean
        (batch, time), False where a token is padding, and `segment_ids`, int (batch, time): tokens
        see none of another segment, and positions count from each segment's beginning. An id that
        is not below `vocabulary_size` is a ValueError in eager calls; a compiled function can't
        look at its values, and gives numbers that mean nothing.

    Returns:
        The normalised hidden states (batch, time, hidden).

    Raises:
        ValueError: an unknown argument, name or option, a size below 1, or a pattern of mixers that
            does not divide the blocks; on TensorFlow, within `keras.RematScope`.

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
        window_length: int | None = None,
        tie_embeddings: bool = True,
        learned_positions: bool = False,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        own = inspect.signature(ElitaBackbone.__init__).parameters
        reject_unknown("ElitaBackbone", kwargs, [*list(own)[1:-1], "name", "trainable"])
        require_no_remat_scope("ElitaBackbone")
        dtype = plain_policy(dtype)
        sizes = {"num_heads": num_heads, "context_length": context_length}
        sizes["window_length"] = context_length if window_length is None else window_length
        require_positive(
            "ElitaBackbone", vocabulary_size=vocabulary_size, hidden_dim=hidden_dim, **sizes
        )
        registry.require_options(dropout, tie_embeddings, learned_positions)
        mixer_options, feed_forward_options = mixer_options or {}, feed_forward_options or {}
        build_mixers = registry.mixer_builders(mixers, num_layers, mixer_options, sizes)
        build_feed_forward = registry.feed_forward_builder(feed_forward, feed_forward_options)
        build_norm = partial(registry.normalization_builder(normalization), dtype=dtype)

        # === Layers ===
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_embeddings, dtype=dtype, name="token_embedding"
        )
        self.position_embedding = None
        if learned_positions:
            self.position_embedding = LearnedPositions(
                context_length, hidden_dim, dtype=dtype, name="position_embedding"
            )
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=dtype, name="dropout")
        self.blocks = [
            Block(
                mixer=ResidualBranch(
                    norm=build_norm(name=f"block_{i}_mixer_norm"),
                    layer=build_mixer(dtype=dtype, name=f"block_{i}_{mixer}"),
                    dropout=self.dropout_layer,
                ),
                feed_forward=ResidualBranch(
                    norm=build_norm(name=f"block_{i}_feed_forward_norm"),
                    layer=build_feed_forward(dtype=dtype, name=f"block_{i}_{feed_forward}"),
                    dropout=self.dropout_layer,
                ),
            )
            for i, (mixer, build_mixer) in enumerate(build_mixers)
        ]
        self.final_norm = build_norm(name="final_norm")

        # === Functional model ===
        inputs = symbolic_inputs()
        hidden_states = self.call_with_runner(inputs, run_directly, training=None)
        super().__init__(inputs=inputs, outputs=hidden_states, dtype=dtype, **kwargs)

        for block in self.blocks:
            for branch in (block.mixer, block.feed_forward):
                kernel = branch.layer.output_kernel
                kernel.assign(keras.ops.zeros(kernel.shape))

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.mixers = registry.as_pattern(mixers, num_layers)
        self.mixer_options = mixer_options
        self.feed_forward = feed_forward
        self.feed_forward_options = feed_forward_options
        self.normalization = normalization
        self.dropout = dropout
        self.context_length = context_length
        self.window_length = window_length
        self.tie_embeddings = tie_embeddings
        self.learned_positions = learned_positions

    def embed(self, token_ids: Any, **tensors: Any) -> Any:
        """The embeddings (batch, time, hidden); the keyword tensors are `LearnedPositions`'."""
        x = self.token_embedding(token_ids)
        if self.position_embedding is None:
            return x
        return x + self.position_embedding(token_ids, **tensors)

    def call_with_runner(
        self, inputs: dict[str, Any], run: Runner, training: bool | None = False
    ) -> Any:
        """What a call gives, every branch beside the residual stream run by `run`.

        Args:
            inputs: as for a call.
            run: `run(layers, x, **tensors)`, as `elita_tf.models.blocks` describes it.
            training: whether dropout is on.
        """
        tensors = mixer_tensors(inputs)
        x = self.dropout_layer(self.embed(inputs["token_ids"], **tensors), training=training)
        for block in self.blocks:
            x = block(x, run, training, **tensors)
        return run([self.final_norm], x)

    def call_with_state(
        self, inputs: dict[str, Any], state: dict[str, Any], training: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Continue from `state`: (hidden states, new state); what a call does, in pieces.

        Args:
            inputs: as for a call. With `segment_ids`, the new state also holds the last one as
                `segment_id`, and a first token of another segment starts from the empty state.
            state: flat dict of arrays, at first `get_initial_state(batch_size)`.
            training: whether dropout is on.
        """
        require_stream(self.name, inputs, state)
        token_ids, mask = inputs["token_ids"], inputs.get("padding_mask")
        require_ids(self.name, self.vocabulary_size, token_ids=token_ids)
        segments, state_before, segment_id = follow_segments(
            self, state, mask, inputs.get("segment_ids")
        )
        tensors = {"mask": mask, "segment_ids": segments}
        new_state, offset = {}, state_before.get("position")
        if self.learned_positions:
            new_state["position"] = positions_of(token_ids, offset, mask, segments)[1]
        x = self.embed(token_ids, offset=offset, **tensors)
        x = self.dropout_layer(x, training=training)
        for block in self.blocks:
            prefix = f"{block.mixer.layer.name}_"
            leaves = {
                name.removeprefix(prefix): leaf
                for name, leaf in state_before.items()
                if name.startswith(prefix)
            }
            x, after = block.call_with_state(x, leaves, training, **tensors)
            # Not the mixer's own `segment_id`: there is one for all blocks.
            new_state |= {prefix + name: after[name] for name in leaves}
        require_state(self, state, set(new_state))
        return self.final_norm(x), {**new_state, **segment_id}

    def get_initial_state(self, batch_size: int) -> dict[str, Any]:
        """The state before the first token: a flat dict, the batch first in every leaf.

        Its size does not depend on the length, softmax blocks included: they hold the last
        `window_length` keys and values.
        """
        state = {}
        if self.learned_positions:
            state["position"] = keras.ops.zeros((batch_size,), "int32")
        for block in self.blocks:
            mixer = block.mixer.layer
            leaves = mixer.get_initial_state(batch_size)
            state |= {f"{mixer.name}_{name}": leaf for name, leaf in leaves.items()}
        return state

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
    ) -> keras.distribution.LayoutMap:
        """How the weights are cut over devices, for `keras.distribution.ModelParallel`.

        Weights that it does not name, such as those of registered layers, are whole on every
        device.

        Args:
            device_mesh: the devices.
            model_parallel_dim_name: the axis of the mesh over which weights are cut.
            data_parallel_dim_name: the axis of the mesh over which batches are cut.

        Raises:
            ValueError: anything but a `DeviceMesh`, or one that lacks an axis.

        Example:

        >>> import keras
        >>> from elita_tf.models import ElitaBackbone
        >>> mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], ["cpu:0", "cpu:1"])
        >>> layouts = ElitaBackbone.get_layout_map(mesh)
        >>> layouts["token_embedding/embeddings"].axes
        ('model', None)
        """
        if not isinstance(device_mesh, keras.distribution.DeviceMesh):
            raise ValueError(
                "`device_mesh` of get_layout_map: expected a keras.distribution.DeviceMesh, "
                f"received {device_mesh!r}."
            )
        for axis in (model_parallel_dim_name, data_parallel_dim_name):
            if axis not in device_mesh.axis_names:
                raise ValueError(
                    f"get_layout_map: expected a mesh with an axis {axis!r}, received one with "
                    f"{list(device_mesh.axis_names)}. Pass `model_parallel_dim_name` and "
                    "`data_parallel_dim_name` as the mesh names them."
                )
        layouts = keras.distribution.LayoutMap(device_mesh)
        for path, axes in _LAYOUTS.items():
            layouts[path] = tuple(axis and model_parallel_dim_name for axis in axes)
        return layouts

    @property
    def transformer_layers(self) -> list[Block]:
        """The blocks, by the name that they have in KerasHub's backbones."""
        return self.blocks

    @property
    def output_kernel(self) -> Any:
        """The kernel of the output projection, (vocabulary_size, hidden_dim)."""
        embedding, tied = self.token_embedding, self.tie_embeddings
        kernel = embedding.embeddings if tied else keras.ops.transpose(embedding.reverse_embeddings)
        if embedding.quantization_mode != "int8":
            return kernel
        scale = embedding.embeddings_scale if tied else embedding.reverse_embeddings_scale
        return keras.ops.cast(kernel, self.compute_dtype) / scale[:, None]

    def quantize(
        self, mode: str | None = None, config: Any = None, filters: Any = None, **kwargs: Any
    ) -> None:
        """As in Keras: int8 for the kernels and embeddings, or float8 for training.

        Args:
            mode: "int8" or "float8".
            config: a `keras.quantizers.Int8QuantizationConfig` in its place.
            filters: of `keras.Model.quantize`: which layers.
            **kwargs: of `keras.Model.quantize`.

        Raises:
            ValueError: another mode, a model that is quantized already, or one with LoRA factors.
                Nothing has changed then.
        """
        require_quantizable(self, mode, config)
        super().quantize(mode, config=config, filters=filters, **kwargs)

    def enable_lora(self, rank: int, target_layer_names: list[str] | None = None) -> None:
        """As in KerasHub; files hold the factors merged into their kernels.

        Raises:
            ValueError: the model is quantized.
        """
        require_no_quantized(self)
        super().enable_lora(rank, target_layer_names)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(saved_policy(self)),
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
            "window_length": self.window_length,
            "tie_embeddings": self.tie_embeddings,
            "learned_positions": self.learned_positions,
        }
