"""Texts token by token, what is kept of a trained model, and the command `elita generate`."""

import argparse
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from elita_tf.data import Split
from elita_tf.files import atomic_path
from elita_tf.models import ElitaCausalLM, decoding
from elita_tf.runs import run_folder
from elita_tf.runs.assembly import load_run
from elita_tf.runs.command_line import add_model_source, command_parser, explained, path

# Of the sample that a finished run shows: texts, words of a prompt, tokens of each text.
NUM_SAMPLES, PROMPT_WORDS, SAMPLE_TOKENS = 3, 4, 60
# Small models make few words up at this temperature, and repeat themselves little.
TEMPERATURE = 0.8
# A line of prose: it begins with a word and has several after it.
_PROSE = re.compile(rf"\s*((?:[A-Za-z][A-Za-z',]*\s+){{{PROMPT_WORDS}}})[A-Za-z]")
# What a model card says of the training text, by the name of the corpus.
_WIKITEXT = {"license": "cc-by-sa-3.0", "datasets": ["Salesforce/wikitext"]}
ORIGINS = {"wikitext-2": _WIKITEXT, "wikitext-103": _WIKITEXT}
# What each takes of the temperature and the seed.
SAMPLERS: dict[str, Callable[[float, int | None], keras_hub.samplers.Sampler]] = {
    "greedy": lambda temperature, seed: keras_hub.samplers.GreedySampler(),
    "random": lambda temperature, seed: keras_hub.samplers.RandomSampler(
        temperature=temperature, seed=seed
    ),
    "top_k": lambda temperature, seed: keras_hub.samplers.TopKSampler(
        k=40, temperature=temperature, seed=seed
    ),
    "top_p": lambda temperature, seed: keras_hub.samplers.TopPSampler(
        p=0.9, temperature=temperature, seed=seed
    ),
}


# (prompt, max_length, sampler) -> pieces of the text after the prompt.
Stream = Callable[[str, int, keras_hub.samplers.Sampler], Iterator[str]]


def served(folder: Path) -> Stream:
    """The `stream` of a SavedModel that `elita export` wrote.

    A SavedModel is a program, which TensorFlow runs: load none from a source that you do not trust.
    Run folders and presets hold no code.
    """
    import tensorflow_text  # noqa: F401, registers the tokenizer's operations

    module = tf.saved_model.load(folder)
    call: Any = module.signatures

    def detokenize(token_ids: list[int]) -> str:
        mask = tf.ones([1, len(token_ids)], tf.bool)
        texts = call["detokenize"](token_ids=tf.constant([token_ids]), padding_mask=mask)["texts"]
        return texts.numpy()[0].decode()

    def read(token_ids: Any, padding_mask: Any, state: decoding.State) -> decoding.State:
        state = call["prefill"](token_ids=token_ids, padding_mask=padding_mask, **state)
        del state["logits"]
        return state

    def step(token_ids: Any, state: decoding.State) -> tuple[Any, decoding.State]:
        after = call["step"](token_ids=token_ids, **state)
        # The signature is for any number of rows, and a loop must know that it stays the same.
        logits = tf.ensure_shape(after["logits"], [1, None])
        return logits, {name: tf.ensure_shape(after[name], x.shape) for name, x in state.items()}

    def stream(prompt: str, max_length: int, sampler: keras_hub.samplers.Sampler) -> Iterator[str]:
        prompts, length = tf.constant([prompt]), tf.constant(max_length)
        inputs = call["tokenize"](prompts=prompts, max_length=length)
        row = inputs["token_ids"].numpy()[inputs["padding_mask"].numpy()]
        decoder = decoding.Decoder(
            lambda rows: call["initial_state"](batch_size=tf.constant(rows)),
            read,
            _program(step, sampler),
        )
        end = int(module.end_token_id)
        pieces = decoding.row_pieces(decoder, row, None, max_length - len(row), [end])
        return decoding.text_pieces(pieces, row.tolist(), detokenize, end)

    return stream


def _program(step: Callable, sampler: keras_hub.samplers.Sampler) -> Callable:
    """`decoding.advance` of a step that is TensorFlow's."""
    if keras.backend.backend() == "tensorflow":
        return tf.function(partial(decoding.advance, step, sampler))

    def advance(state: decoding.State, num_tokens: Any) -> tuple[np.ndarray, decoding.State]:
        """The same token by token, as a sampler on JAX can't be in a graph of TensorFlow."""
        state, tokens = dict(state), []
        last = keras.ops.convert_to_numpy(state.pop(decoding.LAST_TOKEN))
        for _ in range(int(num_tokens)):
            logits, state = step(tf.constant(last), state)
            probabilities = sampler.compute_probabilities(keras.ops.convert_to_tensor(logits))
            chosen = sampler.get_next_token(probabilities)
            last = keras.ops.convert_to_numpy(chosen).astype("int32")
            tokens.append(last)
        return np.stack(tokens, axis=1), {**state, decoding.LAST_TOKEN: last}

    return advance


def keep_for_use(
    run_dir: Path, model: ElitaCausalLM, text: Split, origin: dict[str, Any] | None = None
) -> None:
    """Writes what a run is for into its folder: `preset`, and texts in `sample.txt`.

    The texts go on from the first words of sentences of `text`, which are marked by brackets. What
    is known of the training text, `origin`, stands in the model card: license and datasets.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / run_dir.resolve().name  # the card names the model by its folder
        model.save_to_preset(folder, **(origin or {}))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [f"{run_folder.PRESET}/{path.relative_to(folder).as_posix()}" for path in files]
        run_folder.record(run_dir, run_folder.SAMPLE, *names)
        for name, file in zip(names, files, strict=True):
            with atomic_path(run_dir / name) as temporary:
                shutil.copyfile(file, temporary)
    sampler, samples = SAMPLERS["top_p"](TEMPERATURE, 0), []
    for prompt in first_words(text):
        pieces = model.stream(prompt, SAMPLE_TOKENS, sampler)
        samples.append(f"[{prompt}]{''.join(pieces)}\n")
    with atomic_path(run_dir / run_folder.SAMPLE) as temporary:
        temporary.write_text("\n".join(samples), encoding="utf-8")


def first_words(text: Split) -> list[str]:
    """The first words of sentences that lie evenly in the text, or its first characters."""
    found = [match[1].strip() for match in map(_PROSE.match, text.lines()) if match]
    places = np.linspace(0, len(found) - 1, min(NUM_SAMPLES, len(found))).astype(int)
    return [found[place] for place in places] or ["".join(text.lines())[:10]]


def load_model(options: argparse.Namespace) -> ElitaCausalLM:
    """The model of `--run_dir` or `--preset`."""
    if options.preset is None:
        return load_run(options.run_dir)
    return ElitaCausalLM.from_preset(options.preset)


def main(arguments: list[str] | None = None) -> None:
    """The command `elita generate`."""
    parser = command_parser(
        "generate",
        "Prints a text of a model, token by token.",
        '--preset elita_wikitext2 --prompt "The"',
        '--run_dir runs/quickstart --prompt "The" --sampler greedy --max_length 60',
        '--saved_model runs/quickstart/saved_model --prompt "The" --seed 1',
    )
    source = add_model_source(parser)
    source.add_argument("--saved_model", type=path, help="a folder that `elita export` wrote")
    parser.add_argument("--prompt", default="\n", help="what to go on from; default: a line end")
    parser.add_argument("--max_length", type=int, default=200, help="tokens, the prompt's included")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="top_p")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="lower: safer words; default: 0.8"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same sample")
    options = parser.parse_args(arguments)
    if not 0 < options.temperature < math.inf:
        parser.error(f"--temperature {options.temperature}: expected a number above 0")
    with explained(parser):
        from_folder = options.saved_model
        stream: Stream = served(from_folder) if from_folder else load_model(options).stream
        sampler = SAMPLERS[options.sampler](options.temperature, options.seed)
        pieces = stream(options.prompt, options.max_length, sampler)
        print(options.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
