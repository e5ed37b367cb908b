"""Texts token by token, what is kept of a trained model, and the command `elita generate`."""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from elita_tf.data import Split
from elita_tf.files import atomic_path
from elita_tf.models import ElitaCausalLM
from elita_tf.runs import run_folder
from elita_tf.runs.assembly import compiled, load_run
from elita_tf.runs.command_line import add_model_source, command_parser, explained, path

# Of the sample that a finished run shows: texts, words of a prompt, tokens of each text.
NUM_SAMPLES, PROMPT_WORDS, SAMPLE_TOKENS = 3, 4, 60
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


class Decoder(NamedTuple):
    """What a stream needs: of a live model, or of a SavedModel.

    tokenize: (prompt, max_length) -> `token_ids` and `padding_mask`, (1, max_length).
    detokenize: (`token_ids`, `padding_mask`) -> the text of every row.
    prefill: (`token_ids`, `padding_mask`) -> (logits, state).
    step: (`token_ids`, state) -> (logits, state).
    """

    tokenize: Callable[[str, int], dict[str, Any]]
    detokenize: Callable[[np.ndarray, np.ndarray], list[str]]
    prefill: Callable[[np.ndarray, np.ndarray], tuple[Any, dict[str, Any]]]
    step: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def live(model: ElitaCausalLM) -> Decoder:
    """The decoder of a model with a preprocessor."""
    return Decoder(
        tokenize=lambda *prompt: model.preprocessor.generate_preprocess(prompt[:1], prompt[1]),
        detokenize=lambda token_ids, mask: model.preprocessor.tokenizer.detokenize(
            [row[real].tolist() for row, real in zip(token_ids, mask, strict=True)]
        ),
        prefill=compiled(model.prefill),
        step=compiled(model.step),
    )


def served(folder: Path) -> Decoder:
    """The decoder of a SavedModel that `elita export` wrote.

    A SavedModel is a program, which TensorFlow runs: load none from a source that you do not trust.
    Run folders and presets hold no code.
    """
    import tensorflow_text  # noqa: F401, registers the tokenizer's operations

    module = tf.saved_model.load(folder)
    call: Any = module.signatures

    def tokenize(prompt: str, max_length: int) -> dict[str, Any]:
        return call["tokenize"](prompts=tf.constant([prompt]), max_length=tf.constant(max_length))

    def detokenize(token_ids: np.ndarray, mask: np.ndarray) -> list[str]:
        arguments = {"token_ids": tf.constant(token_ids), "padding_mask": tf.constant(mask)}
        return [text.decode() for text in call["detokenize"](**arguments)["texts"].numpy()]

    def prefill(token_ids: np.ndarray, mask: np.ndarray) -> tuple[Any, dict[str, Any]]:
        state = call["initial_state"](batch_size=tf.constant(1))
        arguments = {"token_ids": tf.constant(token_ids), "padding_mask": tf.constant(mask)}
        state = call["prefill"](**arguments, **state)
        return state.pop("logits"), state

    def step(token_ids: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state = call["step"](token_ids=token_ids, **state)
        return state.pop("logits"), state

    return Decoder(tokenize, detokenize, prefill, step)


def stream(
    decoder: Decoder, prompt: str, max_length: int, sampler: keras_hub.samplers.Sampler
) -> Iterator[str]:
    """The prompt, and then the text of every token that the decoder adds.

    Args:
        decoder: `live` or `served`.
        prompt: at least one token.
        max_length: tokens of prompt and continuation.
        sampler: chooses a token from the distribution of the next one.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: an empty prompt, or one of more than
            `max_length` tokens.
    """
    inputs = decoder.tokenize(prompt, max_length)
    token_ids, mask = (
        keras.ops.convert_to_numpy(inputs[name]) for name in ("token_ids", "padding_mask")
    )
    yield decoder.detokenize(token_ids, mask)[0]
    # Ids whose text is out, as context for what comes, and ids whose text is not.
    shown, pending = token_ids[mask].tolist(), []
    # Padding goes before the prompt, so that prompts of any length share one graph.
    length = len(shown)
    logits, state = decoder.prefill(*(np.roll(x, -length, axis=1) for x in (token_ids, mask)))

    def choose(logits: Any) -> Any:
        token = sampler.get_next_token(sampler.compute_probabilities(logits))
        return keras.ops.cast(token, "int32")

    choose = compiled(choose)
    for position in range(length, max_length):
        token = choose(logits)
        pending.append(int(token[0]))
        both = np.array([shown + pending] * 2, "int32")
        seen = np.arange(both.shape[1]) < np.array([[len(shown)], [both.shape[1]]])
        before, text = decoder.detokenize(both, seen)
        # A character of several bytes is shown when its last byte has come.
        if not text.endswith("\ufffd") or position == max_length - 1:
            yield text[len(before) :]
            shown, pending = pending, []
        if position < max_length - 1:
            logits, state = decoder.step(token, state)


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
    decoder, samples = live(model), []
    for prompt in first_words(text):
        sampler = SAMPLERS["top_p"](0.8, 0)
        first, *rest = stream(decoder, prompt, SAMPLE_TOKENS, sampler)
        samples.append(f"[{first}]{''.join(rest)}\n")
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
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: safer words")
    parser.add_argument("--seed", type=int, help="the same seed gives the same sample")
    options = parser.parse_args(arguments)
    if options.temperature <= 0:
        parser.error(f"--temperature {options.temperature}: expected a number above 0")
    times = []
    with explained(parser):
        decoder = served(options.saved_model) if options.saved_model else live(load_model(options))
        sampler = SAMPLERS[options.sampler](options.temperature, options.seed)
        for piece in stream(decoder, options.prompt, options.max_length, sampler):
            print(piece, end="", flush=True)
            times.append(time.perf_counter())
    print()
    # The first two tokens wait for the tracing of their graphs.
    if len(times) > 4:
        print(f"{(len(times) - 4) / (times[-1] - times[3]):.0f} tokens/s")
