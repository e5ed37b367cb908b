# %% [markdown]
# # A tour of the layers
#
# `Attention2`, `FeedForward2` and `GatedLinearAttention`: what each computes, what its positions
# look like, how to feed it piece by piece, and what it costs. A CPU is enough.

# %% tags=["parameters"]
NUM_BLOCKS = 2
TRAINING_WINDOWS = 2048
EPOCHS = 5
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_SOFTMAX = 4096  # beyond, its scores take gigabytes

# %%
import importlib.util
import sys

from IPython import get_ipython

if importlib.util.find_spec("elita_tf") is None:
    package = "elita_tf @ git+https://github.com/{{repository}}"
    get_ipython().system(f'{sys.executable} -m pip install --quiet "{package}"')

# %%
import time

import keras
import matplotlib.pyplot as plt
import numpy as np

from elita_tf import layers, ops

keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(1, 100, 64)).astype("float32")  # batch, time, width

# %% [markdown]
# ## Attention2
#
# Softmax attention compares every position with every other one. Here a position has no key and
# query vectors but single numbers per head, `key`, `self` and `query`, and what came before is
# two sums:
#
# $$y_i = \frac{e^{self_i} v_i + e^{query_i} S_i}{e^{self_i} + e^{query_i} Z_i}, \qquad
# S_i = \sum_{j \le i} e^{key_j} v_j, \qquad Z_i = \sum_{j \le i} e^{key_j}$$
#
# So the cost grows with the length, not with its square.

# %%
attention = layers.Attention2(num_heads=8, context_length=100)
outputs = attention(inputs)

changed = inputs.copy()
changed[:, 60:] = 0  # the future of the first 60 positions
same = np.array_equal(outputs[:, :60], attention(changed)[:, :60])
print(tuple(outputs.shape), "same past, same outputs:", same)

# The function behind it, on numbers: each output is (v_i + v_1 + ... + v_i) / (1 + i).
zeros, value = np.zeros((1, 3, 1)), np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
print(np.ravel(ops.attention2(zeros, zeros, zeros, value)[0]))

# %% [markdown]
# ## FeedForward2
#
# In place of a hidden layer four times as wide, the products of all pairs of two sets of features,
# by default as many as the input has and 8, with about as many weights:
#
# $$y = W_3\,(\mathrm{silu}(W_1 x + b_1) \otimes \mathrm{silu}(W_2 x + b_2)) + b_3$$

# %%
feed_forward = layers.FeedForward2(rank=8)
print(tuple(feed_forward(inputs).shape))

usual = keras.Sequential([keras.layers.Dense(4 * 64, "silu"), keras.layers.Dense(64)])
usual(inputs)
print(f"{feed_forward.count_params():,} weights; {usual.count_params():,} in the usual one")

# %% [markdown]
# ## GatedLinearAttention
#
# Keeps a matrix per head, to which every position adds `key` times `value`, and which fades at a
# rate between 0 and 1 that each position sets for each key feature:
#
# $$S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t, \qquad y_t = q_t S_t / \sqrt{d_k}$$

# %%
gla = layers.GatedLinearAttention(num_heads=4)
print(tuple(gla(inputs).shape))

# The function behind it: a single 1 at the start, read at every later position.
ones, impulse = np.ones((1, 50, 1, 1)), np.zeros((1, 50, 1, 1))
impulse[:, 0] = 1
for rate in (0.99, 0.9, 0.7):
    faded, state = ops.gated_linear_attention(ones, ones, impulse, np.log(rate) * ones)
    plt.plot(np.ravel(faded), label=f"rate {rate}")
plt.gca().set(xlabel="position", ylabel="what is left of the first value", ylim=(0, 1.05))
plt.legend()
plt.show()

# %% [markdown]
# ## Streaming
#
# `Streaming` makes the state an input and an output. Pieces of any length, chained through the
# state, give what the whole gives. The state of these two does not grow with the length.

# %%
for layer in (attention, gla):
    streaming = layers.Streaming(layer)
    state, pieces = streaming.get_initial_state(batch_size=1), []
    for piece in np.split(inputs, [1, 30, 37], axis=1):  # lengths 1, 29, 7 and 63
        outputs, state = streaming(piece, state)
        pieces.append(outputs)
    difference = np.max(np.abs(np.concatenate(pieces, axis=1) - layer(inputs)))
    size = sum(np.asarray(leaf).nbytes for leaf in state.values())
    print(f"{layer.name}: at most {difference:.0e} from the whole; a state of {size:,} bytes:")
    print("   ", {name: tuple(leaf.shape) for name, leaf in state.items()})

# %% [markdown]
# ## What Attention2 learns about positions and half-lives
#
# Positions enter through sines: position i reads position j with $e^{P(i, j)}$ times the weight
# that the contents say. With `decay="gated"`, every head also has a forget gate: what it has kept
# decays at every position, at a rate that it reads from the input. To see both at work, train a
# small model on the bytes of the reference text inside every Python.

# %%
from pydoc_data.topics import topics

text = np.frombuffer("".join(topics.values()).encode(), "uint8")
windows = np.resize(text, (TRAINING_WINDOWS, 129))

tokens = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(256, 64)(tokens)
options = {"num_heads": 8, "context_length": 128, "use_query": True, "decay": "gated"}
mixers, normed = [layers.Attention2(**options) for _ in range(NUM_BLOCKS)], []
for mixer in mixers:
    normed.append(keras.layers.LayerNormalization()(x))
    x += mixer(normed[-1])
    x += layers.FeedForward2()(keras.layers.LayerNormalization()(x))
model = keras.Model(tokens, keras.layers.Dense(256)(x))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(3e-3), loss)
history = model.fit(windows[:, :-1], windows[:, 1:], batch_size=32, epochs=EPOCHS)

# %% [markdown]
# Down the picture, the reader moves on; to the right, what it reads. Where P grows to the right,
# recent positions count more than early ones: e times as much for each unit of P.

# %%
for number, mixer in enumerate(mixers, start=1):
    bases = np.array(mixer.position_bases(128))
    bases[:, *np.triu_indices(128, 1)] = np.nan  # j > i is never read
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(2, 4, figsize=(11, 5), **shared)
    for head, panel in enumerate(axes.flat):
        image = panel.imshow(bases[head], vmin=np.nanmin(bases), vmax=np.nanmax(bases))
        panel.set_title(f"head {head + 1}")
    figure.supxlabel("j, the position that is read")
    figure.supylabel("i, the position that reads")
    figure.suptitle(f"P(i, j) of the attention in block {number}")
    figure.colorbar(image, ax=axes)
    plt.show()

# %% [markdown]
# The half-lives of the heads on a piece of the text, in positions: before training, half-lives of 1
# to 64 and one of 65,536, the same at every position. Without sines (`context_length=None`) this is
# all that tells near from far, and the layer is as good far beyond the length it was trained on.

# %%
figure, axes = plt.subplots(1, NUM_BLOCKS, figsize=(5 * NUM_BLOCKS, 4), squeeze=False)
for number, (mixer, norm) in enumerate(zip(mixers, normed, strict=True)):
    seen = keras.Model(tokens, norm).predict(windows[:8, :-1])
    half_lives = np.log(2) / -np.array(mixer.log_decays(seen)).reshape(-1, 8)
    panel = axes[0, number]
    panel.boxplot(half_lives, showfliers=False)
    panel.set(yscale="log", xlabel="head", title=f"half-lives in block {number + 1}")
axes[0, 0].set_ylabel("positions")
plt.show()

# %% [markdown]
# ## Cost by length
#
# One forward pass, the best of three, against softmax attention over the whole length. Twice the
# length takes the first two about twice as long once they have enough to do, softmax four times.


# %%
def milliseconds(layer, length):
    inputs = np.random.default_rng(0).normal(size=(1, length, 64)).astype("float32")
    model = keras.Sequential([keras.Input((length, 64)), layer])
    model.predict_on_batch(inputs)  # the first call compiles
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.predict_on_batch(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


makers = {
    "Attention2": lambda length: layers.Attention2(num_heads=4, context_length=length),
    "GatedLinearAttention": lambda length: layers.GatedLinearAttention(num_heads=4),
    "softmax": lambda length: layers.CausalSelfAttention(num_heads=4, window_length=length),
}
for name, make in makers.items():
    lengths = [n for n in LENGTHS if name != "softmax" or n <= LONGEST_SOFTMAX]
    plt.plot(lengths, [milliseconds(make(n), n) for n in lengths], marker="o", label=name)
plt.gca().set(xscale="log", yscale="log", xlabel="length", ylabel="milliseconds")
plt.xticks(LENGTHS, LENGTHS)
plt.gca().xaxis.set_minor_locator(plt.NullLocator())
plt.legend()
plt.show()
