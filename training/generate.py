"""Prints a sample as it is made: python training/generate.py --run_dir runs/quickstart."""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from assembly import compiled, load_run

from elita_tf.models import ElitaCausalLM

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


def stream(
    model: ElitaCausalLM, prompt: str, max_length: int, sampler: keras_hub.samplers.Sampler
) -> Iterator[str]:
    """The prompt, and then the text of every token that the model adds.

    Args:
        model: with a preprocessor.
        prompt: at least one token.
        max_length: tokens of prompt and continuation.
        sampler: chooses a token from the distribution of the next one.

    Raises:
        ValueError: an empty prompt, or one of more than `max_length` tokens.
    """
    preprocessor = model.preprocessor
    inputs = preprocessor.generate_preprocess([prompt], sequence_length=max_length)
    # Padding goes before the prompt, so that prompts of any length share one graph.
    length = int(np.sum(inputs["padding_mask"]))
    token_ids, mask = (
        np.roll(keras.ops.convert_to_numpy(inputs[name]), -length, axis=1)
        for name in ("token_ids", "padding_mask")
    )
    prefill, step = compiled(model.prefill), compiled(model.step)
    # Ids whose text is out, as context for what comes, and ids whose text is not.
    shown, pending = token_ids[mask].tolist(), []
    yield preprocessor.tokenizer.detokenize([shown])[0]
    logits, state = prefill(token_ids, mask)
    for position in range(length, max_length):
        probabilities = sampler.compute_probabilities(logits)
        token = keras.ops.cast(sampler.get_next_token(probabilities), "int32")
        pending.append(int(token[0]))
        before, text = preprocessor.tokenizer.detokenize([shown, shown + pending])
        # A character of several bytes is shown when its last byte has come.
        if not text.endswith("\ufffd") or position == max_length - 1:
            yield text[len(before) :]
            shown, pending = pending, []
        if position < max_length - 1:
            logits, state = step(token, state)


def load_model(options: argparse.Namespace) -> ElitaCausalLM:
    """The model of `--run_dir` or `--preset`."""
    if options.preset is None:
        return load_run(options.run_dir)
    return ElitaCausalLM.from_preset(str(options.preset))


def served_text(folder: Path, prompt: str, max_length: int) -> str:
    """The text that a SavedModel generates, all at once."""
    import tensorflow_text  # noqa: F401, registers the tokenizer's operations

    served = tf.saved_model.load(folder)
    generate: Any = served.signatures["generate_text"]
    outputs = generate(prompts=tf.constant([prompt]), max_length=tf.constant(max_length))
    return outputs["texts"][0].numpy().decode()


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, generates, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", type=Path, help="folder that train.py wrote")
    source.add_argument("--preset", help="KerasHub preset: a folder or an hf:// handle")
    source.add_argument("--saved_model", type=Path, help="folder that export.py wrote")
    parser.add_argument("--prompt", default="\n", help="what to go on from; default: a line end")
    parser.add_argument("--max_length", type=int, default=200, help="tokens, the prompt's included")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="top_p")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the same seed gives the same sample")
    options = parser.parse_args(arguments)
    if options.temperature <= 0:
        parser.error(f"--temperature {options.temperature}: expected a number above 0")
    try:
        if options.saved_model:
            print(served_text(options.saved_model, options.prompt, options.max_length))
            return
        sampler = SAMPLERS[options.sampler](options.temperature, options.seed)
        times = []
        for piece in stream(load_model(options), options.prompt, options.max_length, sampler):
            print(piece, end="", flush=True)
            times.append(time.perf_counter())
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print()
    # The first two tokens wait for the tracing of their graphs.
    if len(times) > 4:
        print(f"{(len(times) - 4) / (times[-1] - times[3]):.0f} tokens/s")


if __name__ == "__main__":
    main()
