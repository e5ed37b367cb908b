# %% [markdown]
# # A language model on WikiText-2
#
# Trains a decoder made of ELiTA's layers with `model.fit`, plots its loss, lets it write, and
# exports it as a SavedModel. Choose CPU, GPU or TPU under *Runtime > Change runtime type*, then
# *Runtime > Run all*.

# %% [markdown]
# ## What to train
#
# A recipe holds everything that decides a run. These are `elita-gated-wikitext2-tuned` (the one
# here), `elita-query-wikitext2-tuned`, `gla-wikitext2-tuned`, `gla-ff2-wikitext2-tuned`,
# `transformer-wikitext2-tuned` and `quickstart`; `elita recipes` lists all. A few hundred steps are
# enough to see the loss fall and words appear. More steps and a larger model give better text.

# %% tags=["parameters"]
RECIPE = "elita-gated-wikitext2-tuned"
DATA_DIR = None  # a folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw; None downloads
# What replaces values of the recipe: corpus=pydoc (a text inside every Python) or corpus=text:PATH,
# num_layers=6, hidden_dim=256, context_length=512, jit_compile=false (starts at once, but every
# step takes longer), ...
CHANGES = ["steps=300"]
TEXT_LENGTH = 150  # tokens

# %% [markdown]
# ## Device and installation
#
# TensorFlow does the work on a CPU or GPU. On a TPU it is JAX: the layers are the same, only
# `KERAS_BACKEND` differs, which Keras reads when it is first imported. If pip has replaced packages
# that were loaded already, Colab asks to restart the session; then run all cells again.

# %%
import glob
import importlib.util
import os
import shutil
import sys

from IPython import get_ipython

if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
    DEVICE = "TPU"
    os.environ["KERAS_BACKEND"] = "jax"
else:
    DEVICE = "GPU" if shutil.which("nvidia-smi") else "CPU"

if importlib.util.find_spec("elita_tf") is None:
    extras = "gpu,wikitext" if DEVICE == "GPU" else "wikitext"
    package = f"elita_tf[{extras}] @ git+https://github.com/{{repository}}"
    get_ipython().system(f'{sys.executable} -m pip install --quiet "{package}"')

import keras

print(f"{DEVICE}, Keras {keras.version()} on {keras.backend.backend()}")

# %% [markdown]
# A TPU rounds the factors of a float32 matrix product to bfloat16, 8 significant bits of 24. With
# `float32` it multiplies them in six passes, and is about as exact as a CPU. The price is up to six
# times the time of matrix products. Leave the line out if you want speed and can do with less.

# %%
if DEVICE == "TPU":
    import jax

    jax.config.update("jax_default_matmul_precision", "float32")

# %% [markdown]
# ## Text to tokens
#
# SentencePiece learns its pieces from the training text; a model predicts the next piece.

# %%
from elita_tf import runs

recipe = runs.load_recipe(RECIPE, CHANGES)
setup = runs.assemble(recipe, DATA_DIR)
valid_ids, tokenizer = setup.valid_ids, setup.tokenizer
bytes_per_token = setup.corpus["valid"].num_bytes / len(valid_ids)
print(f"{len(setup.train_ids):,} training tokens, {bytes_per_token:.2f} bytes each")
print("|".join(tokenizer.detokenize([token]) for token in valid_ids[100:140]))

# %% [markdown]
# ## The model
#
# A decoder of blocks, each of them attention and a feed-forward. A fresh block adds nothing to its
# input, and learns what to add.

# %%
setup.model.backbone.summary()

# %% [markdown]
# ## Training
#
# `model.fit` trains, with callbacks that keep the weights, draw the loss and write checkpoints.
# After an interruption, run the cell again, and the training goes on. The first step takes long, as
# XLA compiles the model. The loss is in nats per token. An epoch of Keras is here what lies between
# two validations.

# %%
run_dir = "run"
summary = runs.train(recipe, run_dir, DATA_DIR)

# %% [markdown]
# Below the dashed line a model makes use of what came before: no guess that looks at the
# frequencies of the pieces alone gets there.

# %%
from IPython.display import Image, display

display(Image(f"{run_dir}/loss.png"))
print(f"validation loss {summary['validation_loss']:.3f} nats per token:", end=" ")
print(f"perplexity {summary['validation_perplexity']:.1f},", end=" ")
print(f"{summary['validation_bits_per_byte']:.3f} bits per byte")

# %% [markdown]
# ## Writing
#
# The best weights, with a tokenizer around them: strings in, strings out. After the prompt
# every token costs the same, as the model keeps a state of constant size, not all that came
# before. Expect words and scraps of sentences: the model is small and has barely begun to learn.

# %%
import keras_hub

model = runs.load_run(run_dir)
sampler = keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=0)
for prompt in ("The", "In the"):
    print(prompt, end="")
    for piece in model.stream(prompt, TEXT_LENGTH, sampler):
        print(piece, end="", flush=True)
    print("\n")

# %% [markdown]
# ## Export
#
# `run/preset` loads again with `ElitaCausalLM.from_preset`. A SavedModel needs TensorFlow and
# TensorFlow Text, and nothing of this package. TensorFlow writes it in a process of its own, as
# this one may run on JAX; the device stays with this process.

# %%
import subprocess

command = [sys.executable, "-m", "elita_command", "export", "--run_dir", run_dir]
on_cpu = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
subprocess.run(command, env={**os.environ, **on_cpu}, check=True)

# %%
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401, registers the tokenizer's operations

served = tf.saved_model.load(f"{run_dir}/saved_model")
prompts, max_length = tf.constant(["The"]), tf.constant(TEXT_LENGTH)
texts = served.signatures["generate_text"](prompts=prompts, max_length=max_length)["texts"]
print(texts.numpy()[0].decode())

# %% [markdown]
# The SavedModel and the preset as one file, to download:

# %%
archive = shutil.make_archive("elita_tf_run", "zip", run_dir)
print(f"{archive}: {Path(archive).stat().st_size:,} bytes")
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(archive)
