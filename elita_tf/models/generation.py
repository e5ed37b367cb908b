"""Generation on the recurrent state: the prompt in parallel, then one step a token."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from elita_tf.models import decoding, kept_state
from elita_tf.models.decoding import LAST_TOKEN, Decoder, Programs, State
from elita_tf.models.inputs import require_inputs
from elita_tf.models.prompts import Prompts, prompts_of, stop_ids
from elita_tf.models.search import search, search_rows
from elita_tf.ops.arguments import require_shapes


class Generation:
    """Mixin of a KerasHub CausalLM whose `backbone` has a recurrent state.

    A state is a flat dict of arrays, the batch first in every leaf. That of `read` has a leaf
    `last_token` beside those of the backbone: the last token of the prompt, which generation reads
    first, so that none is read twice or left out. Nothing changes a state, so that any number of
    texts go on from one. `keras.ops.take(leaf, rows, axis=0)` of every leaf repeats and chooses
    rows.
    """

    _programs: Programs | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in KerasHub; programs that were compiled before are forgotten."""
        super().compile(*args, **kwargs)
        self._programs = Programs()

    def prefill(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        state: dict[str, Any] | None = None,
        segment_ids: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Read a prompt, in the parallel form.

        A prompt of more than 16,384 tokens is read in pieces, so that it needs hardly more memory,
        unless it is in a graph for prompts of any length.

        Args:
            token_ids: (batch, time).
            padding_mask: optional boolean (batch, time); padding may stand on either side.
            state: where to go on from, by default the beginning.
            segment_ids: optional integers (batch, time): see `ElitaBackbone`.

        Returns:
            The logits of the token after the last real one, (batch, vocabulary_size), without
            meaning in a row that has none; and the state: a flat dict of arrays, the batch first,
            that can be stored and fed back.
        """
        optional = {"padding_mask": padding_mask, "segment_ids": segment_ids}
        inputs = {"token_ids": token_ids, **optional}
        require_inputs(self.name, inputs)
        if state is None:
            state = self.backbone.get_initial_state(ops.shape(token_ids)[0])
        last, state = decoding.read_prompt(self.backbone, inputs, state)
        return self.backbone.token_embedding(last[:, None], reverse=True)[:, 0], state

    def step(
        self, token_ids: Any, state: dict[str, Any], segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read one token: the logits of the next one, (batch, vocabulary_size), and the state.

        Args:
            token_ids: (batch,).
            state: of `prefill`, or of the step before.
            segment_ids: optional integers (batch,). A row whose id is not that of its last token
                starts from the empty state.

        Raises:
            ValueError: token ids of another rank, or a state of other rows or of another model.
        """
        segments = {} if segment_ids is None else {"segment_ids": (segment_ids, "batch")}
        require_shapes(self.name, token_ids=(token_ids, "batch"), **segments)
        # An empty state would be a new beginning for `prefill`, and is a mistake here.
        state = {} if state is None else state
        if segment_ids is not None:
            segment_ids = ops.expand_dims(segment_ids, 1)
        return self.prefill(ops.expand_dims(token_ids, 1), state=state, segment_ids=segment_ids)

    def read(self, prompt: Any, state: State | None = None) -> State:
        """Read a prompt of any length, in pieces of constant length: the state to go on from.

        Args:
            prompt: a text, or ids, or a batch of them, as `generate` takes them.
            state: where to go on from, by default the beginning. With a state the text may be
                empty.

        Raises:
            ValueError: an empty prompt without a state, a state that is none of this method, or
                one of other rows than the prompt's.

        Example:

        >>> from elita_tf.models import ElitaCausalLM
        >>> model = ElitaCausalLM.from_preset("elita_wikitext2")
        >>> state = model.read("The game was played in")
        >>> one = "".join(model.stream("", 8, sampler="greedy", state=state))
        >>> other = "".join(model.stream(" London and", 8, sampler="greedy", state=state))
        >>> again = "".join(model.stream(None, 8, sampler="greedy", state=state))
        >>> one == again != other
        True
        """
        _, rows, start = self._begin(prompt, state)
        return decoding.read_rows(self._decoder(), rows, start)

    def save_state(self, path: Path | str, state: State) -> None:
        """Write a state of `read`, of any dtype, with what tells this model from others.

        Args:
            path: the file to write, whole or not at all. It has the format of safetensors.
            state: of `read`, or another one of this model.

        Raises:
            ValueError: a state of another model.
        """
        kept_state.save(path, state, self.backbone)

    def load_state(self, path: Path | str) -> State:
        """What `save_state` wrote, bit for bit.

        Raises:
            ValueError: the file is of a model with other weights or another configuration, or
                broken, or none of `save_state`.
        """
        return kept_state.load(path, self.backbone)

    def generate(
        self,
        inputs: Any = None,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        state: State | None = None,
    ) -> Any:
        """Go on with prompts, by the sampler that the model is compiled with.

        Args:
            inputs: with a preprocessor a text, or a batch of texts; else ids: a list, an array, a
                ragged list, or a dict of `token_ids` and `padding_mask`, whose padding may stand
                on either side. A `tf.data.Dataset` of any of these is worked off by batches. With
                a state, prompts may be empty, and None stands for no prompt.
            max_length: tokens of prompt and continuation. With a state those of this call alone.
                By default the preprocessor's `sequence_length`, or the width of ids that come
                with a mask.
            stop_token_ids: an id or several, at the first of which a text ends; "auto" is the end
                token of the tokenizer; None or no id goes on to `max_length`.
            strip_prompt: give the continuations alone.
            state: of `read`, where to go on from. A state of one row serves every prompt.

        Returns:
            A text for a text, a list for a list. For ids in any form a dict of `token_ids` and
            `padding_mask`, (batch, max_length), padded at the end; without the batch axis for a
            single row.

        Raises:
            ValueError: a prompt that is empty or longer than `max_length`, `segment_ids`, a mask
                of another shape, ids outside of the vocabulary, or a state of other rows.

        Prompts of one batch may have different lengths with every sampler. KerasHub's own loop for
        beam search has a fault there (0.32): tokens that a longer prompt replaces decide between
        the beams. So prompts of one length are searched together here. Exported models and
        `generate_step` keep KerasHub's loop: with a search, give them prompts of one length.
        """
        if hasattr(inputs, "as_numpy_iterator"):
            options = (max_length, stop_token_ids, strip_prompt, state)
            batches = [self.generate(batch, *options) for batch in inputs.as_numpy_iterator()]
            return _joined(batches)
        stops = self._stops(stop_token_ids)
        given, rows, start = self._begin(inputs, state, max_length)
        max_length = given.max_length(self, max_length)
        if decoding.chooses_token_by_token(self.sampler):
            decoder = self._decoder(self.sampler)
            after = decoding.read_rows(decoder, rows, start)
            num_tokens = max_length - min(map(len, given.rows))
            pieces = decoding.token_pieces(decoder, after, num_tokens, stops)
            added = np.concatenate([np.zeros((len(rows), 0), "int32"), *pieces], axis=1)
        else:
            num_columns = max_length + len(rows[0]) - len(given.rows[0])
            added = search_rows(self, rows, start, num_columns, stops)
        texts = []
        for prompt, new in zip(given.rows, added, strict=True):
            new = decoding.until_stop(new[: max_length - len(prompt)], stops)
            texts.append(new if strip_prompt else np.concatenate([prompt, new]))
        return self._result(texts, given.is_single, max_length)

    def stream(
        self,
        prompt: Any,
        max_length: int | None = None,
        sampler: Any = None,
        stop_token_ids: Any = "auto",
        state: State | None = None,
    ) -> Iterator[Any]:
        """Go on with one prompt, and give what is added as it comes.

        The prompt and the pieces together are what `generate` gives. Every token costs the same,
        however many came before.

        Args:
            prompt: one text, or the ids of one, as `generate` takes them.
            max_length: tokens of prompt and continuation. With a state those of this call alone.
            sampler: a KerasHub sampler or its name, by default the one that the model is compiled
                with; not one that looks ahead, as beam and contrastive search do.
            stop_token_ids: as for `generate`.
            state: of `read`, of one row, where to go on from; then the prompt may be empty.

        Returns:
            An iterator of texts, which are never half a character; of ids as int32 arrays if the
            model has no preprocessor.

        Raises:
            ValueError: as for `generate`; also more than one prompt, or a sampler that looks ahead.

        Example:

        >>> from elita_tf.models import ElitaCausalLM
        >>> model = ElitaCausalLM.from_preset("elita_wikitext2")
        >>> pieces = list(model.stream("The game was", 30, sampler="greedy"))
        >>> len(pieces) > 1
        True
        >>> model.compile(sampler="greedy")
        >>> "The game was" + "".join(pieces) == model.generate("The game was", 30)
        True
        """
        stops = self._stops(stop_token_ids)
        given, rows, start = self._begin(prompt, state, max_length)
        num_tokens = given.max_length(self, max_length) - len(given.rows[0])
        if len(rows) != 1:
            raise ValueError(
                f"`stream` goes on with one prompt; received {len(rows)}. Call it for each, or "
                "`generate` for all."
            )
        decoder = self._decoder(self._sampler(sampler))
        pieces = decoding.row_pieces(decoder, rows[0], start, num_tokens, stops)
        if self.preprocessor is None:
            return pieces
        tokenizer = self.preprocessor.tokenizer
        end = tokenizer.end_token_id
        return decoding.text_pieces(pieces, rows[0], tokenizer.detokenize, end)

    def generate_step(
        self, inputs: dict[str, Any], stop_token_ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Fill up one batch of prompts in one graph: what an exported model does.

        Args:
            inputs: `token_ids` and `padding_mask`, (batch, max_length), padded at the end, and
                optionally the `state` that they go on from.
            stop_token_ids: a row ends at the first of these that is not of its prompt.
        """
        token_ids, prompts = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        state = inputs.get("state") or self.backbone.get_initial_state(ops.shape(token_ids)[0])
        by_token = decoding.chooses_token_by_token(self.sampler)
        fill = self._fill if by_token else partial(search, self)
        token_ids = fill(token_ids, prompts, state, stop_token_ids)
        ended = ops.zeros_like(prompts)
        for stop in stop_token_ids or ():
            ended = ended | (~prompts & (token_ids == stop))
        after_end = ops.cumsum(ops.cast(ended, "int32"), axis=1) - ops.cast(ended, "int32") > 0
        return {"token_ids": token_ids, "padding_mask": ~after_end}

    def _fill(self, token_ids: Any, prompts: Any, state: State, stops: Any) -> Any:
        """The rows, padding replaced by what a sampler of single tokens adds."""
        max_length = ops.shape(token_ids)[1]
        columns = ops.arange(max_length, dtype="int32")
        lengths = ops.sum(ops.cast(prompts, "int32"), axis=1)[:, None]
        seen = {"token_ids": token_ids, "padding_mask": prompts & (columns < lengths - 1)}
        _, state = self.backbone.call_with_state(seen, state)
        last = ops.take_along_axis(token_ids, lengths - 1, axis=1)[:, 0]
        added, _ = decoding.advance(
            self.step,
            self.sampler,
            {**state, LAST_TOKEN: last},
            max_length - ops.min(lengths),
            max_tokens=max_length,
            stop_token_ids=stops or (),
            model=self,
        )
        added = ops.take_along_axis(added, ops.maximum(columns - lengths, 0), axis=1)
        return ops.where(prompts, token_ids, ops.cast(added, token_ids.dtype))

    def _begin(
        self, inputs: Any, state: State | None, max_length: Any = None
    ) -> tuple[Prompts, list[np.ndarray], State | None]:
        """The prompts, what is to be read for each, and the state from which it is read."""
        if state is None:
            prompts = prompts_of(self, inputs, max_length, None)
            return prompts, prompts.rows, None
        num_rows = kept_state.require_state(self.backbone, state)
        prompts = prompts_of(self, inputs, max_length, num_rows)
        count = len(prompts.rows)
        if num_rows != count:
            state = {name: ops.repeat(leaf, count, axis=0) for name, leaf in state.items()}
        else:
            state = {name: ops.convert_to_tensor(leaf) for name, leaf in state.items()}
        last = ops.convert_to_numpy(state.pop(LAST_TOKEN))[:, None].astype("int32")
        rows = [np.concatenate(each) for each in zip(last, prompts.rows, strict=True)]
        return prompts, rows, state

    def _stops(self, stop_token_ids: Any) -> list[int]:
        end = None if self.preprocessor is None else self.preprocessor.tokenizer.end_token_id
        return stop_ids(self.name, self.vocabulary_size, stop_token_ids, end)

    def _result(self, rows: list[np.ndarray], is_single: bool, max_length: int) -> Any:
        """What `generate` returns for the ids of every row."""
        token_ids = np.stack([np.pad(row, [0, max_length - len(row)]) for row in rows])
        mask = np.arange(max_length) < np.array([len(row) for row in rows])[:, None]
        outputs: Any = {"token_ids": token_ids.astype("int32"), "padding_mask": mask}
        if self.preprocessor is not None:
            texts = self.preprocessor.generate_postprocess(outputs)
            return texts[0] if is_single else texts
        return {name: x[0] for name, x in outputs.items()} if is_single else outputs

    def _decoder(self, sampler: Any = None) -> Decoder:
        """What reads prompts and, with a sampler, adds tokens to them."""

        def read(token_ids: Any, padding_mask: Any, state: State) -> State:
            inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
            return self.backbone.call_with_state(inputs, state)[1]

        step = decoding.compiled_step(self)

        def advance(state: State, num_tokens: Any) -> tuple[Any, State]:
            return decoding.advance(step, sampler, state, num_tokens, model=self)

        # LoRA and quantization put other variables in their places.
        variables = tuple(map(id, self.variables))
        return Decoder(
            self.backbone.get_initial_state,
            self._program(("read", variables), read),
            sampler and self._program(("advance", variables), advance, sampler),
        )

    def _program(self, key: Any, function: Callable, sampler: Any = None) -> Callable:
        """The function as it was compiled for this key and sampler before."""
        self._programs = self._programs or Programs()  # of a model that is not compiled
        # The sampler is kept too, as another one could get its id.
        make = partial(decoding.compiled, function, self, sampler)
        key = (key, id(sampler), self.run_eagerly)
        return self._programs.get(key, lambda: (make(), sampler))[0]

    def _sampler(self, sampler: Any) -> Any:
        """The sampler of a stream, by default the model's."""
        if isinstance(sampler, str):
            self._programs = self._programs or Programs()
            sampler = self._programs.get(sampler, partial(keras_hub.samplers.get, sampler))
        sampler = self.sampler if sampler is None else sampler
        if not isinstance(sampler, keras_hub.samplers.Sampler):
            raise ValueError(
                f"`sampler` of {self.name}: expected a sampler of keras_hub.samplers, or the name "
                f"of one; received {sampler!r}."
            )
        if not decoding.chooses_token_by_token(sampler):
            raise ValueError(
                f"{type(sampler).__name__} weighs whole texts, and a stream gives tokens as they "
                'come. Take "greedy", "random", "top_k" or "top_p", or call `generate`.'
            )
        return sampler


def _joined(batches: list[Any]) -> Any:
    """What `generate` gives for the batches of a dataset, as one."""
    if not batches:
        return []
    if isinstance(batches[0], str):
        return batches
    if isinstance(batches[0], dict):
        rows = [{name: np.atleast_2d(x) for name, x in batch.items()} for batch in batches]
        return {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    return [text for batch in batches for text in batch]
