"""From a recipe to its data, its model and its optimizer."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from elita_tf.callbacks import KeepWeights
from elita_tf.data import (
    Corpus,
    Split,
    Tokenizer,
    document_ids,
    encode_split,
    evaluation_windows,
    load_corpus,
    load_tokenizer,
    make_tokenizer,
    num_training_windows,
    pack_windows,
    stream_windows,
    training_window_indices,
    training_windows,
)
from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    architectures,
    load_gpt2_embeddings,
)
from elita_tf.optimizers import MonitoredAdam, MonitoredAdamW, MonitoredMuon
from elita_tf.runs.recipe import Recipe, load_recipe
from elita_tf.schedules import CappedInverseSqrt

# Names of variables that weight decay leaves alone.
_NO_MATRICES = ["bias", "gamma", "beta", "frequency", "phase", "readout"]


class TrainingSetup(NamedTuple):
    """What a recipe names, ready for `fit`: the model is compiled."""

    corpus: Corpus
    tokenizer: Tokenizer
    train_ids: np.ndarray
    valid_ids: np.ndarray
    training: tf.data.Dataset
    validation: tf.data.Dataset
    model: ElitaCausalLM
    valid_documents: np.ndarray | None


def assemble(recipe: Recipe, data_dir: Path | None, start_step: int = 0) -> TrainingSetup:
    """Finds the corpus, trains the tokenizer on its training split, makes windows and model.

    Training windows begin with those of `start_step`.

    Raises:
        ValueError, OSError, ImportError: for what a recipe or a folder can have wrong.
    """
    keras.utils.set_random_seed(recipe.seed)
    corpus = load_corpus(recipe.corpus, data_dir)
    tokenizer = make_tokenizer(
        recipe.tokenizer,
        corpus["train"],
        vocabulary_size=recipe.vocabulary_size,
        folder=os.path.expanduser(recipe.tokenizer_folder) or None,
    )
    train_ids, valid_ids = (encode_split(tokenizer, corpus[split]) for split in ("train", "valid"))
    train_documents, valid_documents = (
        find_documents(recipe, tokenizer, corpus[split]) for split in ("train", "valid")
    )
    sizes = {"context_length": recipe.context_length, "batch_size": recipe.batch_size}
    if recipe.carry_state:
        windows = partial(stream_windows, **sizes, start_step=start_step)
    else:
        windows = partial(training_windows, **sizes, seed=recipe.seed, start_step=start_step)
    training = packed(windows, train_ids, train_documents)
    validation = validation_windows(recipe, valid_ids, valid_documents)
    model = build_model(recipe, tokenizer.vocabulary_size())
    if recipe.init_embeddings == "gpt2":
        load_gpt2_embeddings(model.backbone)
    elif recipe.init_embeddings:
        load_gpt2_embeddings(model.backbone, os.path.expanduser(recipe.init_embeddings))
    model.compile(build_optimizer(recipe), jit_compile=recipe.jit_compile)
    return TrainingSetup(
        corpus, tokenizer, train_ids, valid_ids, training, validation, model, valid_documents
    )


def find_documents(recipe: Recipe, tokenizer: Tokenizer, split: Split) -> np.ndarray | None:
    """The document of every id, or None where the recipe knows no documents."""
    return document_ids(tokenizer, split, recipe.documents) if recipe.documents else None


def packed(
    windows: Callable[[np.ndarray], tf.data.Dataset],
    token_ids: np.ndarray,
    documents: np.ndarray | None,
) -> tf.data.Dataset:
    """`windows` of the ids, told apart by their documents where there are any."""
    if documents is None:
        return windows(token_ids)
    return pack_windows(windows(token_ids), windows(documents))


def describe_batch(recipe: Recipe, train_ids: np.ndarray, step: int) -> str:
    """The windows of the training step of this number, counted from 0, in words."""
    if recipe.carry_state:
        return f"rows {step * recipe.context_length} ids after their starts"
    chosen = training_window_indices(
        num_training_windows(train_ids, recipe.context_length),
        step,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    return f"windows {', '.join(map(str, chosen.numpy()))} of {recipe.context_length + 1} ids"


def build_model(recipe: Recipe, vocabulary_size: int) -> ElitaCausalLM:
    """The model with fresh weights, not compiled."""
    overridden = {
        "num_layers": recipe.num_layers,
        "hidden_dim": recipe.hidden_dim,
        "num_heads": recipe.num_heads,
        "context_length": recipe.context_length,
        "dropout": recipe.dropout,
        "learned_positions": recipe.learned_positions,
    }
    replaced = {
        "mixers": recipe.mixers,
        "feed_forward": recipe.feed_forward,
        "feed_forward_options": _with_none(recipe.feed_forward_options),
    }
    overridden |= {name: value for name, value in replaced.items() if value}
    arguments = {**architectures[recipe.architecture], **overridden}
    arguments["mixer_options"] = _mixer_options(recipe)
    backbone = ElitaBackbone(vocabulary_size=vocabulary_size, **arguments)
    carried = recipe.batch_size if recipe.carry_state else None
    return ElitaCausalLM(
        backbone,
        carried_batch_size=carried,
        rematerialize=recipe.rematerialize,
        compile=False,
    )


def _mixer_options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Those of the recipe, and those of the architecture for what the recipe leaves open."""
    options = _with_none(recipe.mixer_options)
    if recipe.mixers:
        return options
    own = architectures[recipe.architecture].get("mixer_options", {})
    return {name: {**own.get(name, {}), **options.get(name, {})} for name in {**own, **options}}


def _with_none(options: Any) -> Any:
    """The options with None for "none", which is how a recipe writes it."""
    if isinstance(options, dict):
        return {name: _with_none(value) for name, value in options.items()}
    return None if options == "none" else options


def compiled(function: Callable) -> Callable:
    """The function as a TensorFlow graph; on another backend, as it is."""
    return tf.function(function) if keras.backend.backend() == "tensorflow" else function


def load_trained(run_dir: Path, recipe: Recipe, vocabulary_size: int) -> ElitaCausalLM:
    """The model of a run, for token ids, with its best weights, or else its last ones.

    Raises:
        OSError, ValueError: the weights are missing, broken, or another model's.
    """
    model = build_model(recipe, vocabulary_size)
    load_best_weights(model, run_dir)
    return model


def load_best_weights(model: ElitaCausalLM, run_dir: Path) -> None:
    """Gives the model the best weights of its run, or else the last ones.

    Raises:
        OSError, ValueError: the weights are missing, broken, or another model's.
    """
    weights = KeepWeights(run_dir).best_so_far
    try:
        model.load_weights(weights)
    except (OSError, ValueError) as error:
        # HDF5's own message names no file.
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{weights} does not hold the weights of the model in recipe.toml: {error}"
        ) from error


def load_run(run_dir: Path | str) -> ElitaCausalLM:
    """The model of a run folder for use: its best weights, and strings as inputs.

    Raises:
        OSError: a file is missing or broken.
    """
    run_dir = Path(run_dir).expanduser()
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    trained = load_trained(run_dir, recipe, tokenizer.vocabulary_size())
    return text_model(trained, tokenizer, recipe.context_length)


def text_model(trained: ElitaCausalLM, tokenizer: Tokenizer, context_length: int) -> ElitaCausalLM:
    """The model with strings as inputs; it shares the weights of the trained one."""
    # Training windows are cut from running text: no token marks a start or an end.
    preprocessor = ElitaCausalLMPreprocessor(
        tokenizer, context_length, add_start_token=False, add_end_token=False
    )
    return ElitaCausalLM(trained.backbone, preprocessor)


def build_optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    """Adam, with weight decay AdamW, or Muon, on the recipe's schedule.

    Weight decay is for matrices: biases, norms, and what Attention2 and GLA know of positions and
    half-lives have none. Muon is Keras': for matrices of rank 2 but embeddings, and Adam for all
    else, such as the kernels of heads, of rank 3.
    """
    arguments = {
        "learning_rate": build_schedule(recipe),
        "global_clipnorm": recipe.clip_norm or None,
        "skip_nonfinite": recipe.on_nonfinite == "skip",
    }
    if recipe.ema_momentum:
        arguments |= {"use_ema": True, "ema_momentum": recipe.ema_momentum}
    betas = {"beta_1": recipe.beta_1, "beta_2": recipe.beta_2}
    if recipe.optimizer == "muon":
        arguments |= {f"adam_{name}": beta for name, beta in betas.items()}
        decay = recipe.weight_decay
        optimizer = MonitoredMuon(weight_decay=decay, adam_weight_decay=decay, **arguments)
    elif recipe.weight_decay:
        optimizer = MonitoredAdamW(weight_decay=recipe.weight_decay, **arguments, **betas)
    else:
        return MonitoredAdam(**arguments, **betas)
    optimizer.exclude_from_weight_decay(var_names=_NO_MATRICES)
    return optimizer


def build_schedule(recipe: Recipe) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate: constant, capped inverse square root, or (warm-up and) cosine."""
    peak = recipe.learning_rate
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "capped_inverse_sqrt":
        return CappedInverseSqrt(peak, recipe.inverse_sqrt_scale)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if recipe.warmup_steps else peak,
        decay_steps=max(recipe.steps - recipe.warmup_steps, 1),
        alpha=recipe.final_learning_rate / peak,
        warmup_target=peak if recipe.warmup_steps else None,
        warmup_steps=recipe.warmup_steps,
    )


def validation_windows(
    recipe: Recipe, token_ids: np.ndarray, documents: np.ndarray | None = None
) -> tf.data.Dataset:
    """The first `validation_batches` batches of evaluation windows that are full.

    For the shape of a partly filled batch TensorFlow would compile the model again. A split of less
    than one batch is that batch.
    """
    sizes = {"context_length": recipe.context_length, "batch_size": recipe.batch_size}
    windows = packed(partial(evaluation_windows, **sizes), token_ids, documents)
    full = (len(token_ids) - 1) // (recipe.batch_size * recipe.context_length)
    return windows.take(min(recipe.validation_batches, max(full, 1)))
