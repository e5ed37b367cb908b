"""Text after text on a recurrent state: what `generate`, `stream` and SavedModels share.

A prompt is read in the parallel form, in pieces of constant length. Then a compiled program adds
some tokens at a time, so that the cost of Python is paid once for all of them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

State = dict[str, Any]
# The leaf of a state, int32 (batch,), with the token that has been given and not been read yet.
LAST_TOKEN = "last_token"
# Tokens that are read at once: more would take more memory and save no time.
PIECE = 2048
# The same where the pieces are part of one program, and no piece is filled up.
PREFILL_PIECE = 16_384
# A shorter piece would cost another compilation and save next to nothing.
_SHORTEST_PIECE = 16
# A stream adds up to so many tokens at once, if they take no longer than so many seconds together:
# a reader does not notice.
MAX_STEPS, _PIECE_SECONDS = 16, 0.05
# A tokenizer writes a token in one way only once it knows those before it.
_CONTEXT = 8
# What an unfinished character of several bytes is decoded to, at most three times.
_UNFINISHED, _MOST_UNFINISHED = "\ufffd", 3


class Decoder(NamedTuple):
    """What reads and adds tokens: of a model, or of a SavedModel.

    initial_state: (rows) -> the state before the first token.
    read: (`token_ids`, `padding_mask`, state) -> the state after them.
    advance: (state with its last token, number of tokens) -> (tokens, the state after them).
    """

    initial_state: Callable[[int], State]
    read: Callable[[Any, Any, State], State]
    advance: Callable[[State, Any], tuple[Any, State]]


class Programs:
    """The last few programs of a model, by what they are for."""

    def __init__(self, limit: int = 12) -> None:
        self._limit, self._kept = limit, {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave for this key."""
        if key not in self._kept:
            if len(self._kept) == self._limit:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]


def piece_length(length: int) -> int:
    """The power of two at or above `length`, at least 16 and at most `PIECE`."""
    return min(PIECE, max(_SHORTEST_PIECE, 1 << max(length - 1, 0).bit_length()))


def read_rows(decoder: Decoder, rows: Sequence[np.ndarray], state: State | None = None) -> State:
    """The state after rows of ids of any lengths but 0, with the last token of each unread.

    Args:
        decoder: whose `read` is called with pieces of `piece_length` columns.
        rows: int32 arrays of rank 1. All but the last id of each are read.
        state: where to go on from, without a last token; by default the beginning.
    """
    state = decoder.initial_state(len(rows)) if state is None else state
    lengths = np.array([len(row) - 1 for row in rows])
    longest = int(lengths.max())
    for start in range(0, longest, PIECE):
        columns = start + np.arange(piece_length(longest - start))
        mask = columns < lengths[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        for i, row in enumerate(rows):
            token_ids[i, mask[i]] = row[columns[mask[i]]]
        state = decoder.read(*map(ops.convert_to_tensor, (token_ids, mask)), state)
    last = np.array([row[-1] for row in rows], "int32")
    return {**state, LAST_TOKEN: ops.convert_to_tensor(last)}


def read_prompt(backbone: Any, inputs: dict[str, Any], state: State) -> tuple[Any, State]:
    """Read a prompt, in pieces of `PREFILL_PIECE` tokens if it has more and its length is known.

    Returns:
        What the backbone gives for the last real token of each row, (batch, hidden), and the state.
    """
    inputs = {name: ops.convert_to_tensor(x) for name, x in inputs.items() if x is not None}
    batch_size, time = ops.shape(inputs["token_ids"])
    size = min(time, time % PREFILL_PIECE or PREFILL_PIECE) if isinstance(time, int) else time

    def read(piece: dict[str, Any], last: Any, state: State) -> tuple[Any, State]:
        hidden_states, state = backbone.call_with_state(piece, state)
        return _last_real(hidden_states, piece.get("padding_mask"), last), state

    def go_on(start: Any, last: Any, state: State) -> tuple[Any, Any, State]:
        corner, sizes = (ops.zeros_like(start), start), (batch_size, PREFILL_PIECE)
        piece = {name: ops.slice(x, corner, sizes) for name, x in inputs.items()}
        return start + PREFILL_PIECE, *read(piece, last, state)

    last, state = read({name: x[:, :size] for name, x in inputs.items()}, None, state)
    if not isinstance(time, int) or size == time:
        return last, state
    return ops.while_loop(lambda start, *_: start < time, go_on, (size, last, state))[1:]


def _last_real(hidden_states: Any, mask: Any, before: Any) -> Any:
    """The hidden states of each row's last real token, or those before where it has none here."""
    if mask is None:
        return hidden_states[:, -1]
    places = ops.where(mask, ops.arange(ops.shape(mask)[1], dtype="int32"), -1)
    index = ops.max(places, axis=1, keepdims=True)
    last = ops.take_along_axis(hidden_states, ops.maximum(index, 0)[..., None], axis=1)[:, 0]
    return last if before is None else ops.where(index >= 0, last, before)


def advance(
    step: Callable[[Any, State], tuple[Any, State]],
    sampler: keras_hub.samplers.Sampler,
    state: State,
    num_tokens: Any,
    *,
    max_tokens: Any = MAX_STEPS,
    stop_token_ids: Sequence[int] = (),
    model: Any = None,
) -> tuple[Any, State]:
    """Add tokens, each chosen by the sampler from what `step` says of it.

    Args:
        step: (`token_ids` (batch,), state) -> (logits, state).
        sampler: chooses one token after another.
        state: with its last token, which is read first.
        num_tokens: how many to add: a number or a tensor.
        max_tokens: the columns of the result.
        stop_token_ids: end when every row has one of them.
        model: whose weights `step` reads, for JAX.

    Returns:
        int32 (batch, max_tokens), of which the first `num_tokens` columns count, and the state.
    """
    state = dict(state)
    last = ops.cast(state.pop(LAST_TOKEN), "int32")
    tokens = ops.tile(ops.zeros_like(last)[:, None], (1, max_tokens))
    first = ops.zeros((), "int32")
    loop = (first, last, ops.zeros_like(last, "bool"), tokens, state)

    def goes_on(index: Any, last: Any, ended: Any, *_: Any) -> Any:
        return (index < num_tokens) & ~ops.all(ended)

    def body(index: Any, last: Any, ended: Any, tokens: Any, state: State) -> tuple[Any, ...]:
        logits, state = step(last, state)
        chosen = sampler.get_next_token(sampler.compute_probabilities(logits))
        chosen = ops.cast(chosen, "int32")
        for stop in stop_token_ids:
            ended = ended | (chosen == stop)
        # JAX takes indices of one dtype only, and a number is an int64 where it has them.
        tokens = ops.slice_update(tokens, [first, index], chosen[:, None])
        return index + 1, chosen, ended, tokens, state

    _, last, _, tokens, state = sampler.run_loop(goes_on, body, model=model, loop_vars=loop)
    return tokens, {**state, LAST_TOKEN: last}


def chooses_token_by_token(sampler: Any) -> bool:
    """Whether a sampler needs no more than the distribution of the next token."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__


def token_pieces(
    decoder: Decoder, state: State, num_tokens: int, stop_token_ids: Sequence[int]
) -> Iterator[np.ndarray]:
    """New tokens, (batch, any number), until there are enough or every row has met a stop token.

    The first piece is one token, and later ones are as long as a reader does not have to wait.
    """
    ended = np.zeros(state[LAST_TOKEN].shape[0], bool)
    missing, steps = num_tokens, 1
    while missing and not ended.all():
        steps = min(steps, missing)
        began = time.perf_counter()
        tokens, state = decoder.advance(state, ops.convert_to_tensor(steps, "int32"))
        tokens = np.array(ops.convert_to_numpy(tokens)[:, :steps])
        seconds = (time.perf_counter() - began) / steps
        ended |= np.isin(tokens, stop_token_ids).any(axis=1)
        missing -= steps
        yield tokens
        steps = min(MAX_STEPS, max(1, int(_PIECE_SECONDS / seconds)))


def until_stop(token_ids: np.ndarray, stop_token_ids: Sequence[int]) -> np.ndarray:
    """The ids of rank 1 up to the first stop token, which is the last one then."""
    stops = np.flatnonzero(np.isin(token_ids, stop_token_ids))
    return token_ids[: stops[0] + 1] if stops.size else token_ids


def row_pieces(
    decoder: Decoder,
    row: np.ndarray,
    state: State | None,
    num_tokens: int,
    stop_token_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """What goes on after the ids of one row: `read_rows`, and then arrays of new ids."""
    state = read_rows(decoder, [row], state)
    for piece in token_pieces(decoder, state, num_tokens, stop_token_ids):
        yield until_stop(piece[0], stop_token_ids)


def text_pieces(
    pieces: Iterable[np.ndarray],
    context: Sequence[int],
    detokenize: Callable[[list[int]], str],
    end_token_id: int | None,
) -> Iterator[str]:
    """The text of pieces of ids: whole characters, and no end token at the end.

    Args:
        pieces: arrays of ids of rank 1.
        context: at least one id that comes before, and is not shown.
        detokenize: the text of a list of ids, the same whatever follows but for a last character
            that lacks some of its bytes.
        end_token_id: the id that the tokenizer has for the end of a text.
    """
    window, text = [int(token) for token in context[-_CONTEXT:]], ""
    shown = len(detokenize(window))
    for piece in pieces:
        window += piece.tolist()
        text = detokenize(window[:-1] if window[-1] == end_token_id else window)
        unfinished = min(len(text) - len(text.rstrip(_UNFINISHED)), _MOST_UNFINISHED)
        if text[shown : len(text) - unfinished]:
            yield text[shown : len(text) - unfinished]
        # The work for a piece must not grow with the text.
        window = window[-_CONTEXT:]
        text = detokenize(window[:-1] if window[-1] == end_token_id else window)
        shown = len(text) - unfinished
    if text[shown:]:
        yield text[shown:]


def compiled(function: Callable, model: Any, sampler: Any = None) -> Callable:
    """`function` of tensors as a program, unless the model runs eagerly.

    Args:
        function: reads the variables of the model, and reads and writes those of the sampler.
        model: an `ElitaCausalLM`.
        sampler: optional, with the seeds that the function draws from.
    """
    if model.run_eagerly:
        return function
    if keras.backend.backend() == "jax":
        return _compiled_by_jax(function, model, sampler)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True)


def compiled_step(model: Any) -> Callable[[Any, State], tuple[Any, State]]:
    """`model.step` for a program: with XLA where the model trains with XLA as a whole.

    Samplers stay outside, as XLA sorts slowly on a CPU.
    """
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if not on_tensorflow or model.run_eagerly or not model.jit_compile:
        return model.step
    import tensorflow as tf

    return tf.function(model.step, jit_compile=True)


def _compiled_by_jax(function: Callable, model: Any, sampler: Any) -> Callable:
    import jax

    seeds = [] if sampler is None else sampler.variables

    @jax.jit
    def pure(values: list, seed_values: list, *arguments: Any) -> tuple[Any, list]:
        mapping = [*zip(model.variables, values, strict=True)]
        mapping += zip(seeds, seed_values, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = function(*arguments)
        return outputs, [scope.get_current_value(seed) for seed in seeds]

    def call(*arguments: Any) -> Any:
        values = [variable.value for variable in model.variables]
        outputs, after = pure(values, [seed.value for seed in seeds], *arguments)
        for seed, value in zip(seeds, after, strict=True):
            seed.assign(value)
        return outputs

    return call
