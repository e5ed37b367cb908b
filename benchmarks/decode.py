"""Decoding one token: latency and size of the state by position, against a key-value cache.

    python benchmarks/decode.py [--short] [--output DIR] [--stream] [--state] [--generate]

ELiTA and GLA read a random prompt up to the position, in pieces through `model.prefill`; then
single tokens are timed, the models in turn. The Transformer of the same size has a window as long
as the position; its cache is filled with random numbers, as computing it costs the square of the
length. Its step copies the cache, as a function without side effects does; "cache read" is the
least that a step could take which keeps the cache in place: the attention of all blocks alone,
without a copy or a projection. Positions whose copies do not fit in 8 GiB are left out.

Before any figure, a step after a prefill in pieces equals the full forward pass of the same model
in float64, for every model.

`--stream` times `model.stream` of the packaged preset instead: tokens a second at positions 100 and
100,000, and the first token of a prompt. `--state` reads 100,000 tokens once, goes on from them ten
times, and compares the file of the state in another process. `--generate` times whole texts, alone
and 64 at once.
"""

from typing import Any

import conversation
import harness
import numpy as np
import tensorflow as tf
from cases import NAMES, Case, load_recipe
from matplotlib.figure import Figure

from elita_tf.models import ElitaCausalLM

POSITIONS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
SHORT_POSITIONS = POSITIONS[:-1]
# Tokens that a prefill reads at a time.
PIECE = 10_000
PARITY_POSITION = 24
# Of the cache, the one laid out for reading, the concatenation with a new key, the next window.
CACHE_COPIES = 4
# Of ELiTA's sine; the linear models read on beyond it.
WINDOW = 256
MEMORY_LIMIT = 8 * 2**30
MODES = (conversation.stream, conversation.state, conversation.generate)

State = dict[str, tf.Tensor]


def language_model(name: str, window: int, dtype: str = "float32") -> ElitaCausalLM:
    """The model of a recipe, with weights that are the same in every dtype."""
    recipe = load_recipe(f"{name}-wikitext2", [f"context_length={window}"])
    model = Case("decode", name, recipe).build(dtype)
    harness.randomize(model)
    return model


class Decoder:
    """A model, its compiled prefill and step, and the state at its position."""

    def __init__(self, name: str, window: int) -> None:
        self.model = language_model(name, window)
        self.state = self.model.backbone.get_initial_state(1)
        self.position, self.tokens_per_second = 0, 0.0
        pieces = tf.TensorSpec((1, None), "int32")
        leaves = {k: tf.TensorSpec(x.shape, x.dtype) for k, x in self.state.items()}
        prefill = tf.function(lambda ids, state: self.model.prefill(ids, state=state))
        self._prefill = prefill.get_concrete_function(pieces, leaves)
        step = tf.function(lambda ids, state: self.model.step(ids, state))
        self.advance = step.get_concrete_function(tf.TensorSpec((1,), "int32"), leaves)

    def read(self, token_ids: np.ndarray) -> None:
        """Go on with `token_ids`, (1, time), from the state's position, and note how fast."""

        def pieces() -> State:
            for start in range(0, token_ids.shape[1], PIECE):
                piece = tf.constant(token_ids[:, start : start + PIECE])
                _, self.state = self._prefill(piece, self.state)
            return self.state

        self.tokens_per_second = token_ids.shape[1] / harness.seconds(pieces)
        self.position += token_ids.shape[1]

    def fill(self, position: int) -> None:
        """Be at a position whose past is random numbers."""
        rng = tf.random.Generator.from_seed(0)
        self.state = {
            k: tf.fill(x.shape, position) if x.dtype == tf.int32 else rng.normal(x.shape)
            for k, x in self.state.items()
        }
        self.position = position

    def step(self) -> tf.Tensor:
        """Read one more token; the state stays where it is, so that every call does the same."""
        return self.advance(tf.constant([1]), self.state)[0]

    @property
    def state_bytes(self) -> int:
        """Size of all leaves."""
        return sum(x.dtype.size * int(np.prod(x.shape)) for x in self.state.values())


class CacheRead:
    """The attention of a Transformer's blocks on its cache, laid out for it, and nothing else."""

    def __init__(self, transformer: Decoder) -> None:
        caches = {"_key": [], "_value": []}
        for name, leaf in transformer.state.items():
            for suffix, cache in caches.items():
                if name.endswith(suffix):
                    cache.append(tf.transpose(leaf, (0, 2, 1, 3)))
        self.caches = list(zip(*caches.values(), strict=True))
        self.step = tf.function(lambda: [self._attend(*cache) for cache in self.caches])

    @staticmethod
    def _attend(key: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        """The newest key as the query; (batch, heads, position, features)."""
        scores = tf.matmul(key, key[:, :, -1:], transpose_b=True)
        return tf.matmul(tf.nn.softmax(scores, axis=2), value, transpose_a=True)

    def error(self) -> float:
        """Against float64 NumPy."""
        exact = []
        for key, value in (tuple(x.numpy().astype("float64") for x in c) for c in self.caches):
            weights = np.exp(key @ key[:, :, -1:].swapaxes(2, 3))
            exact.append(np.sum(weights * value, 2, keepdims=True) / weights.sum(2, keepdims=True))
        return harness.relative_error(self.step(), exact)


def parity(name: str) -> float:
    """Error of the logits after a prefill in two pieces and a step, against a full pass."""
    length = PARITY_POSITION + 1
    token_ids = np.random.default_rng(1).integers(2048, size=(1, length), dtype="int32")
    decoder = Decoder(name, length)
    decoder.read(token_ids[:, : length // 3])
    decoder.read(token_ids[:, length // 3 : -1])
    logits, _ = decoder.advance(tf.constant(token_ids[:, -1]), decoder.state)
    exact = language_model(name, length, "float64")({"token_ids": token_ids})
    return harness.require_parity(name, harness.relative_error([logits], [exact[:, -1]]))


def steppers(linear: dict[str, Decoder], position: int) -> dict[str, Any]:
    """Whatever can be at a position: the linear models read on, a cache is filled."""
    rng = np.random.default_rng(position)
    for decoder in linear.values():
        missing = position - decoder.position
        decoder.read(rng.integers(2048, size=(1, missing), dtype="int32"))
    found: dict[str, Any] = dict(linear)
    transformer = Decoder("transformer", position)
    if CACHE_COPIES * transformer.state_bytes <= MEMORY_LIMIT:
        transformer.fill(position)
        found |= {"transformer": transformer, "cache read": CacheRead(transformer)}
    return found


def plot(lines: list[dict[str, Any]]) -> Figure:
    """Latency and size of the state by position."""
    figure, ((latency, size),) = harness.panels(1, 2, "Decoding one token, batch 1")
    harness.curves(latency, lines, "median_milliseconds", "position")
    harness.curves(size, lines, "state_bytes", "position")
    latency.set(title="latency", ylabel="ms")
    size.set(title="state", ylabel="bytes")
    latency.legend()
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Check, read on from position to position, time, write."""
    modes = {each.__name__: each for each in MODES}
    flags = {name: f"only: {mode.__doc__}" for name, mode in modes.items()}
    options = harness.parse(__doc__, arguments, **flags)
    chosen = [name for name in modes if getattr(options, name)]
    for name in chosen:
        modes[name](harness.Report(f"decode_{name}", options))
    if chosen:
        return
    report = harness.Report("decode", options)
    positions, runs = (SHORT_POSITIONS, 7) if options.short else (POSITIONS, 21)
    errors = {name: parity(name) for name in NAMES}
    linear = {name: Decoder(name, WINDOW) for name in NAMES if name != "transformer"}
    for position in positions:
        harness.progress(f"position {position}")
        found = steppers(linear, position)
        if "cache read" in found and position <= PIECE:
            errors["cache read"] = harness.require_parity("cache read", found["cache read"].error())
        timings = harness.side_by_side({name: x.step for name, x in found.items()}, runs)
        models = {name: x for name, x in found.items() if isinstance(x, Decoder)}
        report.write(
            position=position,
            median_milliseconds={name: 1e3 * x.median for name, x in timings.items()},
            state_bytes={name: x.state_bytes for name, x in models.items()},
            parameters={name: x.model.count_params() for name, x in models.items()},
            prefill_tokens_per_second={
                name: decoder.tokens_per_second for name, decoder in linear.items()
            },
            transformer_over_elita=timings["transformer"].median / timings["elita"].median
            if "transformer" in timings
            else None,
            runs=runs,
            parity_error=errors,
        )
    report.save(plot(report.lines))


if __name__ == "__main__":
    main()
