"""Sequences that are split over devices (JAX only): every device holds a piece of the time axis.

What a piece does to the state is small: for Attention2 the state that the piece alone leaves, for
gated linear attention that and the decay over the whole piece. Every device computes it for its
piece, all devices exchange it, and each runs the usual op from the state that the pieces before
leave. What is exchanged does not depend on the length. Gradients go the same way back.

Call these functions on whole arrays, best inside `jax.jit` on arrays that are sharded over time.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from elita_tf.ops.attention2 import Attention2State, attention2, attention2_empty_state
from elita_tf.ops.chunking import state_dtype
from elita_tf.ops.gated_linear_attention import gated_linear_attention
from elita_tf.ops.running import running_sums


def attention2_sequence_parallel(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    initial_state: Attention2State | None = None,
    *,
    log_decay: Any = None,
    mesh: Any,
    axis_name: str,
) -> tuple[Any, Attention2State]:
    """`attention2` with time split over the devices along one axis of a mesh.

    Args:
        key_logits, query_logits, self_logits: (batch, time, heads).
        value: (batch, time, heads, value_dim).
        initial_state: before the whole sequence, by default empty.
        log_decay: optional (batch, time, heads).
        mesh: a `jax.sharding.Mesh` (of axes of type Auto, as its constructor makes them).
        axis_name: the axis of the mesh that time is split over. Other axes stay free for the
            compiler to split the batch or the heads over.

    Returns:
        As `attention2`: the outputs, split over time, and the final state, on every device.

    Raises:
        ValueError: another backend than JAX, an axis that the mesh lacks, or a time that its
            devices do not divide.
    """
    dtype = state_dtype(key_logits, value)
    if initial_state is None:
        batch_size, _, num_heads, value_dim = ops.shape(value)
        initial_state = attention2_empty_state(batch_size, num_heads, value_dim, dtype)
    initial_state = Attention2State(*(ops.cast(x, dtype) for x in initial_state))

    def piece(inputs: Any, initial: Attention2State, exchange: Callable, index: Any) -> Any:
        *inputs, log_decay = inputs
        _, added = attention2(*inputs, log_decay=log_decay)
        whole = None if log_decay is None else ops.sum(ops.cast(log_decay, dtype), axis=1)
        log_decays, added = exchange((whole, added))
        states = [
            ops.concatenate([first[None], others])
            for first, others in zip(initial, added, strict=True)
        ]
        # The state before piece 0 comes first, so the first index + 1 states precede this piece.
        before = _merged(states, log_decays, index)
        outputs, _ = attention2(*inputs, before, log_decay=log_decay)
        return outputs, _merged(states, log_decays, len(states[0]) - 1)

    inputs = (key_logits, query_logits, self_logits, value, log_decay)
    return _over_pieces(piece, inputs, initial_state, mesh, axis_name)


def gated_linear_attention_sequence_parallel(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    initial_state: Any = None,
    *,
    mesh: Any,
    axis_name: str,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Any, Any]:
    """`gated_linear_attention` with time split over the devices along one axis of a mesh.

    Args:
        query, key, log_decay: (batch, time, heads, key_dim).
        value: (batch, time, heads, value_dim).
        initial_state: (batch, heads, key_dim, value_dim), before the whole sequence, by default
            zeros.
        mesh: a `jax.sharding.Mesh` (of axes of type Auto, as its constructor makes them).
        axis_name: the axis of the mesh that time is split over. Other axes stay free for the
            compiler to split the batch or the heads over.
        scale: as for `gated_linear_attention`.
        chunk_size: as for `gated_linear_attention`.

    Returns:
        As `gated_linear_attention`: the outputs, split over time, and the final state, on every
        device.

    Raises:
        ValueError: another backend than JAX, an axis that the mesh lacks, or a time that its
            devices do not divide.
    """
    dtype = state_dtype(query, key, value, log_decay)
    if initial_state is None:
        batch_size, _, num_heads, value_dim = ops.shape(value)
        initial_state = ops.zeros((batch_size, num_heads, query.shape[-1], value_dim), dtype)
    initial_state = ops.cast(initial_state, dtype)
    settings = {"scale": scale, "chunk_size": chunk_size}

    def piece(inputs: Any, initial: Any, exchange: Callable, index: Any) -> Any:
        _, added = gated_linear_attention(*inputs, **settings)
        log_decay = ops.sum(ops.cast(inputs[3], dtype), axis=1)[..., None]
        log_decays, increments = (ops.moveaxis(x, 0, 1) for x in exchange((log_decay, added)))
        (ends,), (final,) = running_sums(log_decays, [increments], [initial])
        starts = ops.concatenate([initial[:, None], ends], axis=1)
        start = ops.take(starts, index, axis=1)
        return gated_linear_attention(*inputs, start, **settings)[0], final

    return _over_pieces(piece, (query, key, value, log_decay), initial_state, mesh, axis_name)


def _merged(states: list[Any], log_decays: Any, index: Any) -> Attention2State:
    """The state before piece `index` (0 to n).

    Args:
        states: the leaves (n + 1, batch, ...) of the initial state and of those that every piece
            alone leaves.
        log_decays: (n, batch, heads), over each whole piece, or None.
        index: of the piece.
    """
    max_logits, numerators, denominators = states
    # Piece p comes after state j and before piece `index` where j <= p < index.
    places, ages = ops.arange(len(max_logits), dtype="int32"), ops.zeros_like(max_logits)
    if log_decays is not None:
        pieces = ops.arange(len(log_decays), dtype="int32")
        between = (places[:, None] <= pieces[None, :]) & (pieces < index)[None, :]
        ages = ops.sum(ops.where(between[..., None, None], log_decays[None], 0.0), axis=1)
    ages = ops.where((places <= index)[:, None, None], ages, -float("inf"))
    max_logit = ops.max(max_logits + ages, axis=0)
    # An empty state has weight 0, even if all states are empty.
    kept = (max_logits > -float("inf")) & (ages > -float("inf"))
    weights = ops.exp(ops.where(kept, max_logits - max_logit + ages, -float("inf")))
    return Attention2State(
        max_logit,
        ops.sum(weights[..., None] * numerators, axis=0),
        ops.sum(weights * denominators, axis=0),
    )


def _over_pieces(
    piece: Callable, inputs: tuple[Any, ...], initial: Any, mesh: Any, axis_name: str
) -> Any:
    """`piece(inputs, initial, exchange, index)` on every device, with its part of the inputs.

    `exchange` stacks what every device gives, `index` is the device's own place.
    """
    _require_split(inputs[0].shape[1], mesh, axis_name)
    import jax

    def exchange(structure: Any) -> Any:
        return jax.lax.all_gather(structure, axis_name)

    def on_device(inputs: Any, initial: Any) -> Any:
        return piece(inputs, initial, exchange, jax.lax.axis_index(axis_name))

    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, axis_name)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(split, whole),
        out_specs=(split, whole),
        axis_names={axis_name},
        # The loops inside the ops start from zeros, the same on every device, and JAX's check
        # wants a carry that is so to stay so.
        check_vma=False,
    )(inputs, initial)


def _require_split(time: int, mesh: Any, axis_name: str) -> None:
    if keras.backend.backend() != "jax":
        raise ValueError(
            "Sequences are split over devices by JAX. The backend is "
            f"{keras.backend.backend()!r}; set KERAS_BACKEND=jax before Keras is imported."
        )
    if axis_name not in mesh.shape:
        raise ValueError(
            f"`axis_name`: expected one of the mesh's axes {tuple(mesh.shape)}, received "
            f"{axis_name!r}."
        )
    if time % mesh.shape[axis_name]:
        raise ValueError(
            f"A time of {time} does not split over {mesh.shape[axis_name]} devices alike. Pad it "
            "to a multiple, with key_logits of -inf (or keys of 0) and log_decays of 0."
        )
