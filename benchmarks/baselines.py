"""What the package is measured against: ELiTA's equations taken literally, and softmax.

The literal ELiTA decoder writes down the published equations as they stand: products as einsums
over the heads and over the three-way kernel, logits clipped to +-20, cumulative sums over time,
positions divided by the length of the tensor that arrives, and materialised logits for Keras'
sparse cross-entropy.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

CLIP = 20.0
EPSILON = 1e-5


class LiteralAttention2(keras.layers.Layer):
    """y_i = (e^self_i v_i + e^query_i S_i) / (e^self_i + e^query_i Z_i), as it is written.

    Args:
        num_heads: number of heads.
        position_dim: sine features per head.
    """

    def __init__(self, num_heads: int, position_dim: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.position_dim = position_dim

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        hidden_dim, heads = input_shape[-1], self.num_heads
        value_dim = hidden_dim // heads
        sines = (2, heads, self.position_dim)
        self.value_kernel = self._weight((hidden_dim, heads, value_dim), "value_kernel")
        self.output_kernel = self._weight((heads, value_dim, hidden_dim), "output_kernel")
        self.key_kernel = self._weight((hidden_dim, heads), "key_kernel", "random_uniform")
        self.self_kernel = self._weight((hidden_dim, heads), "self_kernel", "random_uniform")
        self.frequency = self._weight(sines, "frequency", "random_uniform")
        self.phase = self._weight(sines, "phase", "random_uniform")
        self.readout = self._weight(sines[1:], "readout", "random_uniform")

    def _weight(
        self, shape: tuple[int, ...], name: str, initializer: str = "glorot_uniform"
    ) -> Any:
        return self.add_weight(shape, initializer, name=name)

    def call(self, inputs: Any) -> Any:
        time = ops.shape(inputs)[1]
        fraction = ops.arange(time, dtype=inputs.dtype) / ops.cast(time, inputs.dtype)
        angles = fraction[:, None, None, None] * self.frequency + self.phase
        position_logits = ops.einsum("tmhp,hp->mht", ops.sin(angles), self.readout)
        key = ops.einsum("btd,dh->bht", inputs, self.key_kernel) + position_logits[0]
        own = ops.einsum("btd,dh->bht", inputs, self.self_kernel)
        key, query, own = (
            ops.exp(ops.clip(x, -CLIP, CLIP))[..., None] for x in (key, position_logits[1], own)
        )
        value = ops.einsum("btd,dhv->bhtv", inputs, self.value_kernel)
        numerator = own * value + query * ops.cumsum(key * value, axis=2)
        denominator = own + query * ops.cumsum(key, axis=2)
        return ops.einsum("bhtv,hvd->btd", numerator / denominator, self.output_kernel)


class LiteralFeedForward2(keras.layers.Layer):
    """y = W_3 (silu(W_1 x + b_1) outer silu(W_2 x + b_2)) + b_3, as one einsum of three.

    Args:
        rank: features of the second factor.
    """

    def __init__(self, rank: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rank = rank

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        hidden_dim = input_shape[-1]
        self.first = keras.layers.Dense(hidden_dim, "silu", dtype=self.dtype_policy, name="first")
        self.second = keras.layers.Dense(self.rank, "silu", dtype=self.dtype_policy, name="second")
        self.first.build(input_shape)
        self.second.build(input_shape)
        self.kernel = self.add_weight((hidden_dim, self.rank, hidden_dim), name="kernel")
        self.bias = self.add_weight((hidden_dim,), "zeros", name="bias")

    def call(self, inputs: Any) -> Any:
        first, second = self.first(inputs), self.second(inputs)
        return ops.einsum("bti,btr,ird->btd", first, second, self.kernel) + self.bias


def literal_elita(
    vocabulary_size: int, num_layers: int, hidden_dim: int, num_heads: int
) -> keras.Model:
    """The decoder of pre-norm residual blocks, from token ids to logits by the tied embedding."""

    def norm(name: str) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(epsilon=EPSILON, name=name)

    embedding = keras.layers.ReversibleEmbedding(vocabulary_size, hidden_dim, name="embedding")
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = embedding(token_ids)
    for i in range(num_layers):
        mixer = LiteralAttention2(num_heads, name=f"{i}_attention2")
        x = x + mixer(norm(f"{i}_mixer_norm")(x))
        x = x + LiteralFeedForward2(name=f"{i}_feed_forward2")(norm(f"{i}_feed_forward_norm")(x))
    logits = embedding(norm("final_norm")(x), reverse=True)
    return keras.Model({"token_ids": token_ids}, logits, name="literal_elita")


def literal_elita_logits(model: keras.Model, token_ids: np.ndarray) -> np.ndarray:
    """What `literal_elita` computes, in float64 NumPy, row by row and position by position."""
    weights = {w.path: np.asarray(w.value, "float64") for w in model.weights}

    def of(layer: str) -> dict[str, np.ndarray]:
        paths = (path for path in weights if path.startswith(f"{layer}/"))
        return {path.partition("/")[2]: weights[path] for path in paths}

    logits = []
    for ids in token_ids:
        x, i = of("embedding")["embeddings"][ids], 0
        while of(f"{i}_attention2"):
            x = x + _attention2(_norm(x, of(f"{i}_mixer_norm")), of(f"{i}_attention2"))
            normed = _norm(x, of(f"{i}_feed_forward_norm"))
            x, i = x + _feed_forward2(normed, of(f"{i}_feed_forward2")), i + 1
        logits.append(_norm(x, of("final_norm")) @ of("embedding")["embeddings"].T)
    return np.stack(logits)


def _norm(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)
    return centred / deviation * w["gamma"] + w["beta"]


def _attention2(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    outputs, numerator, denominator = np.zeros_like(x), 0.0, 0.0
    for i, row in enumerate(x):
        first, second = (np.sin(i / len(x) * w["frequency"] + w["phase"]) * w["readout"]).sum(-1)
        logits = row @ w["key_kernel"] + first, second, row @ w["self_kernel"]
        key, query, own = (np.exp(np.clip(x, -CLIP, CLIP))[:, None] for x in logits)
        value = np.tensordot(row, w["value_kernel"], 1)
        numerator, denominator = numerator + key * value, denominator + key
        mixed = (own * value + query * numerator) / (own + query * denominator)
        outputs[i] = np.tensordot(mixed, w["output_kernel"], 2)
    return outputs


def _feed_forward2(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    first, second = (x @ w[f"{name}/kernel"] + w[f"{name}/bias"] for name in ("first", "second"))
    first, second = first / (1 + np.exp(-first)), second / (1 + np.exp(-second))
    return np.tensordot(first[:, :, None] * second[:, None, :], w["kernel"], 2) + w["bias"]


def mean_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean loss in nats of materialised logits, in float64 NumPy."""
    logits = logits.astype("float64")
    maximum = logits.max(-1, keepdims=True)
    log_sums = np.log(np.exp(logits - maximum).sum(-1)) + maximum[..., 0]
    return float((log_sums - np.take_along_axis(logits, labels[..., None], -1)[..., 0]).mean())


def causal_softmax(query: Any, key: Any, value: Any) -> Any:
    """Softmax attention with all scores materialised; (batch, time, heads, features)."""
    position = ops.arange(query.shape[1])
    scores = ops.einsum("bthk,bshk->bhts", query * query.shape[-1] ** -0.5, key)
    scores = ops.where(position[:, None] >= position[None, :], scores, -float("inf"))
    return ops.einsum("bhts,bshv->bthv", ops.softmax(scores, axis=-1), value)


def materialised_feed_forward2(first: Any, second: Any, kernel: Any) -> Any:
    """FeedForward2 with the (inner, rank) product of every token materialised."""
    inner, rank, hidden = kernel.shape
    product = first[..., :, None] * second[..., None, :]
    product = ops.reshape(product, (*first.shape[:-1], inner * rank))
    return ops.matmul(product, ops.reshape(kernel, (inner * rank, hidden)))


def materialised_cross_entropy(hidden: Any, kernel: Any, labels: Any) -> Any:
    """Mean cross-entropy of the materialised (tokens, vocabulary) logits, as Keras computes it."""
    logits = ops.matmul(hidden, ops.transpose(kernel))
    return ops.mean(ops.sparse_categorical_crossentropy(labels, logits, from_logits=True))
