"""The decoders that are measured: recipes as they are, enlarged, and the literal baseline."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import keras
import numpy as np

from elita_tf.data import encode_split, load_corpus, make_tokenizer
from elita_tf.layers import CausalSelfAttention, GatedLinearAttention
from elita_tf.models import ElitaCausalLM
from elita_tf.runs.assembly import build_model, build_optimizer
from elita_tf.runs.recipe import Recipe, load_recipe

NAMES = ("elita", "gla", "transformer")
LITERAL = "literal ELiTA"
MIXED = "mixed_bfloat16"
LARGE = ("num_layers=6", "hidden_dim=512", "context_length=1024", "batch_size=8")
DEEP = load_recipe("gla-gpt2-wikitext2", ('init_embeddings=""', "vocabulary_size=50257"))


class Case(NamedTuple):
    """What is trained: a recipe, or the literal baseline in that recipe's setting."""

    setting: str
    name: str
    recipe: Recipe
    literal: bool = False
    jit_compile: bool | str = "auto"
    policy: str = "float32"

    def build(self, policy: str | None = None) -> keras.Model:
        """The compiled model with fresh weights, of another dtype policy if asked for."""
        keras.config.set_dtype_policy(policy or self.policy)
        keras.utils.set_random_seed(self.recipe.seed)
        sizes = self.recipe.vocabulary_size, self.recipe.num_layers, self.recipe.hidden_dim
        optimizer = build_optimizer(self.recipe)
        if self.literal:
            model = baselines.literal_elita(*sizes, self.recipe.num_heads)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer, loss, jit_compile=self.jit_compile)
        else:
            model = build_model(self.recipe, self.recipe.vocabulary_size)
            model.compile(optimizer, jit_compile=self.jit_compile)
        return model


class StepTimes(keras.callbacks.Callback):
    """Seconds from one step's end to the next; the first from the start of `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def training_cases(short: bool) -> list[Case]:
    """The cases of all settings, in the order in which they take turns."""
    small = [Case("300K", name, load_recipe(f"{name}-wikitext2")) for name in NAMES]
    elita = small[0].recipe
    gated = Case("300K", "elita_gated", load_recipe("elita-gated-wikitext2-tuned"))
    small += [gated, gated._replace(name=f"elita_gated, {MIXED}", policy=MIXED)]
    small.append(Case("300K", LITERAL, elita, literal=True))
    small.append(Case("300K", f"{LITERAL}, XLA", elita, literal=True, jit_compile=True))
    mixed = [case._replace(name=f"{case.name}, {MIXED}", policy=MIXED) for case in small[1:3]]
    large = [Case("large", name, load_recipe(f"{name}-wikitext2", LARGE)) for name in NAMES]
    choices = {"gla-gpt2": "auto", "one program": True, "no XLA": False}
    deep = [Case("deep", name, DEEP, jit_compile=choice) for name, choice in choices.items()]
    return small if short else small + mixed + large + deep


def matmul_flops(model: keras.Model, recipe: Recipe) -> float:
    """FLOPs of the matrix products in a training step, from the model's own layers.

    A weight in a product costs 2 FLOPs a token forward and 4 backward; the embedding, a look-up at
    the input, is one product at the output when tied. Softmax attention adds its scores and their
    use, half of the square for a causal mask; gated linear attention adds, per head, the update
    and the read of a key_dim x value_dim state. Attention2 mixes without products.
    """
    kernels = [w for w in model.trainable_weights if w.name.endswith(("kernel", "embeddings"))]
    per_token = 6 * sum(int(np.prod(w.shape)) for w in kernels)
    blocks = model.backbone.blocks if isinstance(model, ElitaCausalLM) else []
    for mixer in (block.mixer.layer for block in blocks):
        if isinstance(mixer, CausalSelfAttention):
            per_token += 3 * 2 * recipe.context_length * recipe.hidden_dim
        elif isinstance(mixer, GatedLinearAttention):
            per_token += 3 * 4 * int(np.prod(mixer.get_initial_state(1)["state"].shape))
    return float(per_token * recipe.batch_size * recipe.context_length)


def token_windows(recipe: Recipe, steps: int, data_dir: Path | None) -> np.ndarray:
    """Windows of one id more than the length, for so many steps: of the text, or random."""
    shape = steps * recipe.batch_size, recipe.context_length + 1
    if data_dir is None:
        return np.random.default_rng(0).integers(recipe.vocabulary_size, size=shape, dtype="int32")
    text = load_corpus(recipe.corpus, data_dir)["train"]
    tokenizer = make_tokenizer(recipe.tokenizer, text, vocabulary_size=recipe.vocabulary_size)
    token_ids = np.asarray(encode_split(tokenizer, text)[: shape[0] * shape[1]], "int32")
    return np.resize(token_ids, shape)
