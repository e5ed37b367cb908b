"""The losses of a trained run on a split of its corpus, and the command `elita evaluate`."""

import json
import logging
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from elita_tf.callbacks import KeepWeights
from elita_tf.data import (
    SPLITS,
    Split,
    encode_split,
    evaluation_windows,
    load_corpus,
    load_tokenizer,
)
from elita_tf.models import ElitaCausalLM
from elita_tf.runs import run_folder
from elita_tf.runs.assembly import compiled, find_documents, load_trained, packed
from elita_tf.runs.command_line import command_parser, explained, path
from elita_tf.runs.recipe import load_recipe

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 5.0


def label_losses(
    model: ElitaCausalLM,
    token_ids: np.ndarray,
    context_length: int,
    batch_size: int,
    carry_state: bool = False,
    documents: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The loss (nats) and the weight (0 or 1) of every id but the first, in their order, float64.

    Label t is at position t % `context_length` of its window. With `documents`, the first id of
    each weighs 0. With `carry_state`, a window starts from the state that the one before left, in
    batches of one.
    """
    batch_size = 1 if carry_state else batch_size
    state = model.backbone.get_initial_state(batch_size)

    def score(inputs: Any, labels: Any, state: Any) -> tuple[Any, Any]:
        ids, segments = inputs["token_ids"], inputs.get("segment_ids")
        if carry_state:
            return model.token_losses_with_state(ids, labels, state, segments)
        return model.token_losses(ids, labels, segment_ids=segments), state

    score = compiled(score)
    pieces, done, reported = [], 0, time.monotonic()
    windows = partial(evaluation_windows, context_length=context_length, batch_size=batch_size)
    for inputs, labels, weights in packed(windows, token_ids, documents):
        losses, state = score(inputs, labels, state)
        pieces.append([np.ravel(keras.ops.convert_to_numpy(x)) for x in (losses, weights)])
        done += pieces[-1][0].size
        if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            logger.info("Evaluating: %d of %d tokens", done, len(token_ids) - 1)
    losses, weights = (np.concatenate(x).astype("float64") for x in zip(*pieces, strict=True))
    return losses[: len(token_ids) - 1], weights[: len(token_ids) - 1]


def losses_by_position(
    model: ElitaCausalLM,
    token_ids: np.ndarray,
    context_length: int,
    *arguments: Any,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the losses and number of labels at every position of a window, as `label_losses`."""
    losses, weights = label_losses(model, token_ids, context_length, *arguments, **options)
    positions = np.arange(len(losses)) % context_length
    sums = np.bincount(positions, weights * losses, minlength=context_length)
    return sums, np.bincount(positions, weights, minlength=context_length)


def report(split: Split, sums: np.ndarray, counts: np.ndarray) -> dict[str, object]:
    """The figures of an evaluation: token-weighted loss and what follows from its total."""
    total, tokens = float(sums.sum()), int(counts.sum())
    words, num_bytes = split.count_words(), split.num_bytes
    return {
        "loss": total / tokens,
        "perplexity": _exp(total / tokens),
        "word_perplexity": _exp(total / words),
        "bits_per_byte": total / math.log(2) / num_bytes,
        "tokens": tokens,
        "words": words,
        "bytes": num_bytes,
        "loss_by_position": bucket_losses(sums, counts),
    }


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def bucket_losses(sums: np.ndarray, counts: np.ndarray) -> list[dict[str, float]]:
    """Mean loss of the positions [0, 1), [1, 2), [2, 4), [4, 8) and so on, where there are any."""
    edges = [0, *(2**power for power in range(len(sums).bit_length()))]
    buckets = []
    for start, stop in zip(edges, [*edges[1:], len(sums)], strict=True):
        tokens = counts[start:stop].sum()
        if tokens:
            loss = sums[start:stop].sum() / tokens
            buckets.append({"start": start, "stop": min(stop, len(sums)), "loss": float(loss)})
    return buckets


def evaluate(
    run_dir: Path | str,
    data_dir: Path | str | None = None,
    split: str = "test",
    context_length: int | None = None,
    carry_state: bool = False,
) -> dict[str, object]:
    """Evaluates the best weights of a run, or the last ones of a run without validation.

    Args:
        run_dir: the folder of the run.
        data_dir: with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw`, for WikiText.
        split: "train", "valid" or "test".
        context_length: of the windows; by default the recipe's.
        carry_state: score the split as one stream, each window from the state before it.

    Returns:
        The loss in nats per token and what follows from it.

    Raises:
        ValueError, OSError, ImportError: for what a folder can have wrong.
    """
    run_dir = Path(run_dir).expanduser()
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    text = load_corpus(recipe.corpus, data_dir)[split]
    model = load_trained(run_dir, recipe, tokenizer.vocabulary_size())
    context_length = context_length or recipe.context_length
    # As many tokens a batch as in training, so that the memory needed stays about the same.
    batch_size = max(1, recipe.batch_size * recipe.context_length // context_length)
    token_ids = encode_split(tokenizer, text)
    documents = find_documents(recipe, tokenizer, text)
    losses = losses_by_position(
        model, token_ids, context_length, batch_size, carry_state, documents
    )
    return {
        **report(text, *losses),
        "split": split,
        "context": context_length,
        "carry_state": carry_state,
        "weights": KeepWeights(run_dir).best_so_far.name,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `evaluate` for a person: a line for each, and one for every few positions.

    Example:

    >>> figures = {"loss": 2.0, "perplexity": 7.389, "word_perplexity": 90.5, "bits_per_byte": 1.5}
    >>> figures |= {"tokens": 12345, "words": 2345, "bytes": 54321, "loss_by_position": []}
    >>> figures |= {"split": "test", "context": 64, "carry_state": False, "weights": "best"}
    >>> print(table(figures).splitlines()[2])
    loss              2.0000  nats per token
    """
    carried = ", the state carried on" if figures["carry_state"] else ""
    rows = [
        f"split {figures['split']} in windows of {figures['context']:,} tokens{carried}, weights "
        f"of {figures['weights']}: {figures['tokens']:,} tokens, {figures['words']:,} words, "
        f"{figures['bytes']:,} bytes",
        "",
        f"{'loss':15} {figures['loss']:8.4f}  nats per token",
        f"{'perplexity':15} {figures['perplexity']:8.2f}  per token",
        f"{'word perplexity':15} {figures['word_perplexity']:8.2f}  per word",
        f"{'bits per byte':15} {figures['bits_per_byte']:8.4f}",
        "",
        f"{'position':15} {'loss':>8}  nats per token there",
    ]
    for bucket in figures["loss_by_position"]:
        first, last = bucket["start"], bucket["stop"] - 1
        positions = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        rows.append(f"{positions:15} {bucket['loss']:8.4f}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command `elita evaluate`: prints the figures and writes them into the run folder.

    The output is JSON, for programs. The table for people goes to the error stream.

    Returns:
        0; 1 where the figures could not be written.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = command_parser(
        "evaluate",
        "Computes the loss of a run on a split of its corpus, and writes it into the run folder.",
        "--run_dir runs/quickstart",
        "--run_dir runs/quickstart --split valid --context 1024",
        "--run_dir runs/elita --data_dir wikitext-2-raw --carry_state",
    )
    parser.add_argument("--run_dir", type=path, required=True, help="folder of `elita train`")
    parser.add_argument("--data_dir", type=path, help="folder with wiki.{train,valid,test}.raw")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--context", type=int, help="window length; default: the recipe's")
    parser.add_argument("--carry_state", action="store_true", help="score the split as one stream")
    options = parser.parse_args(arguments)
    if options.context is not None and options.context < 1:
        parser.error(f"--context {options.context}: expected at least 1")
    with explained(parser):
        figures = evaluate(
            options.run_dir, options.data_dir, options.split, options.context, options.carry_state
        )
    print(table(figures), file=sys.stderr)
    print(json.dumps(figures, indent=2))
    windows = f"-{options.context}" if options.context else ""
    name = f"evaluation-{options.split}{windows}{'-carried' * options.carry_state}.json"
    try:
        run_folder.record(options.run_dir, name)
        run_folder.write_json(options.run_dir / name, figures)
    except OSError as error:
        print(f"elita evaluate: {name} could not be written: {error}", file=sys.stderr)
        return 1
    return 0
