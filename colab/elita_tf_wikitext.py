# %% [markdown]
# # A language model on WikiText-2
#
# Trains a decoder made of ELiTA's layers with `model.fit`, plots its loss, lets it write, and
# exports it as a SavedModel. Choose CPU, GPU or TPU under *Runtime > Change runtime type*, then
# *Runtime > Run all*.

# %% [markdown]
# ## What to train
#
# The setting of ELiTA's authors, for a few hundred steps: enough to see the loss fall and words
# appear. More steps and a larger model give better text.

# %% tags=["parameters"]
CORPUS = "wikitext-2"  # or "wikitext-103", "pydoc" (inside every Python), "text:PATH"
DATA_DIR = None  # a folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw; None downloads
VOCABULARY_SIZE = 2048
ARCHITECTURE = "elita_gated"  # or "elita_query", "gla", "gla_ff2", "transformer", "hybrid"
NUM_LAYERS = 3
CONTEXT_LENGTH = 256
BATCH_SIZE = 128
STEPS = 300
VALIDATION_INTERVAL = 50  # steps
VALIDATION_BATCHES = 10
JIT_COMPILE = "auto"  # with XLA; False starts at once, but every step takes longer
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
from elita_tf import data

corpus = data.load_corpus(CORPUS, DATA_DIR)
tokenizer = data.make_tokenizer("sentencepiece", corpus["train"], vocabulary_size=VOCABULARY_SIZE)
train_ids = data.encode_split(tokenizer, corpus["train"])
valid_ids = data.encode_split(tokenizer, corpus["valid"])

bytes_per_token = corpus["valid"].num_bytes / len(valid_ids)
print(f"{len(train_ids):,} training tokens, {bytes_per_token:.2f} bytes each")
print("|".join(tokenizer.detokenize([token]) for token in valid_ids[100:140]))

# %% [markdown]
# ## The model
#
# A decoder of blocks, each of them attention and a feed-forward. A fresh block adds nothing to its
# input, and learns what to add.

# %%
from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures

keras.utils.set_random_seed(0)
arguments = {
    **architectures[ARCHITECTURE],
    "num_layers": NUM_LAYERS,
    "context_length": CONTEXT_LENGTH,
}
backbone = ElitaBackbone(vocabulary_size=tokenizer.vocabulary_size(), **arguments)
model = ElitaCausalLM(backbone)
model.compile(jit_compile=JIT_COMPILE)
backbone.summary()

# %% [markdown]
# ## Training
#
# Without further arguments the optimizer is ELiTA's, Adam(min(1e-3, 1e-2 / sqrt(step)), 0.9, 0.99).
# The first step takes long, as XLA compiles the model. The loss is in nats per token. An epoch of
# Keras is here what lies between two validations.

# %%
from pathlib import Path

from elita_tf.callbacks import KeepWeights, LossPlot, TrainingLog

run_dir = Path("run")
run_dir.mkdir(exist_ok=True)
sizes = {"context_length": CONTEXT_LENGTH, "batch_size": BATCH_SIZE}
entropy = data.unigram_entropy(valid_ids, tokenizer.vocabulary_size())
weights = KeepWeights(run_dir)
plot = LossPlot(run_dir / "loss.png", CORPUS, ("unigram entropy of the validation text", entropy))

history = model.fit(
    data.training_windows(train_ids, **sizes, seed=0),
    validation_data=data.evaluation_windows(valid_ids, **sizes).take(VALIDATION_BATCHES),
    steps_per_epoch=VALIDATION_INTERVAL,
    epochs=STEPS // VALIDATION_INTERVAL,
    callbacks=[TrainingLog(BATCH_SIZE * CONTEXT_LENGTH, STEPS), weights, plot],
)

# %% [markdown]
# Below the dashed line a model makes use of what came before: no guess that looks at the
# frequencies of the pieces alone gets there.

# %%
import math

from IPython.display import Image, display

display(Image(plot.path))
loss = min(history.history["val_loss"])
print(f"validation loss {loss:.3f} nats per token: perplexity {math.exp(loss):.1f},")
print(f"{loss / math.log(2) / bytes_per_token:.3f} bits per byte")

# %% [markdown]
# ## Writing
#
# The best weights, now with a tokenizer around them: strings in, strings out. After the prompt
# every token costs the same, as the model keeps a state of constant size, not all that came
# before. Expect words and scraps of sentences: the model is small and has barely begun to learn.

# %%
import keras_hub

from elita_tf.models import ElitaCausalLMPreprocessor

model.load_weights(weights.best_so_far)
preprocessor = ElitaCausalLMPreprocessor(
    tokenizer,
    CONTEXT_LENGTH,
    # The windows were cut from running text: no token marked a start or an end.
    add_start_token=False,
    add_end_token=False,
)
model = ElitaCausalLM(backbone, preprocessor)
model.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=0))
for text in model.generate(["The", "In the"], max_length=TEXT_LENGTH):
    print(text, "\n")

# %% [markdown]
# ## Export
#
# A preset loads again with `ElitaCausalLM.from_preset`. A SavedModel needs TensorFlow and
# TensorFlow Text, and nothing of this package. TensorFlow writes it in a process of its own, as
# this one may run on JAX; the device stays with this process.

# %%
import subprocess

PRESET, SAVED_MODEL = str(run_dir / "preset"), str(run_dir / "saved_model")
model.save_to_preset(PRESET)
export = (
    "from elita_tf.models import ElitaCausalLM, export_saved_model\n"
    f"export_saved_model(ElitaCausalLM.from_preset({PRESET!r}), {SAVED_MODEL!r})"
)
on_cpu = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
subprocess.run([sys.executable, "-c", export], env={**os.environ, **on_cpu}, check=True)

# %%
import tensorflow as tf
import tensorflow_text  # noqa: F401, registers the tokenizer's operations

served = tf.saved_model.load(SAVED_MODEL)
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
