"""A training step against what a user would take instead: PyTorch, and KerasHub's RWKV-7.

    pip install '.[peers]'
    python benchmarks/peers.py [--short] [--output DIR]

All models have 3 blocks of width 64, 2,048 pieces and at most 300,000 parameters (RWKV-7, whose
output projection is a matrix of its own, 400,000), and train on the same random windows of 256
tokens, 128 a step, with Adam in float32 on the CPU. The package's recipes run through `model.fit`,
as in `train.py`. The Transformer and GLA in PyTorch are written down here as one would write them:
`scaled_dot_product_attention`, GLA in chunks, fused Adam, eager and with `torch.compile`. RWKV-7 is
KerasHub's backbone on the loss of its logits.

Before any figure, the logits of the PyTorch models with the package's weights equal the package's.
Every case trains in a child process of its own, cases in turn. A case that has not made its steps
after ten minutes (two with --short) is reported so, without a figure, and gets no other turn.
"""

import statistics
import time
from typing import Any

import harness
import keras
import numpy as np
from cases import Case, StepTimes, load_recipe, token_windows

SKIPPED_STEPS = 2
RECIPES = {
    "elita_gated": "elita-gated-wikitext2-tuned",
    "gla": "gla-wikitext2",
    "transformer": "transformer-wikitext2",
}
PYTORCH = ("transformer", "gla")
RWKV7 = "RWKV-7, KerasHub"
RWKV7_SIZES = {
    **{"hidden_size": 64, "head_size": 8, "num_layers": 3, "intermediate_dim": 176},
    **{"gate_lora": 16, "mv_lora": 8, "aaa_lora": 8, "decay_lora": 8},
}
CHUNK = 32
ROTARY_BASE = 10_000.0
PARITY_ROWS = 2


def case_of(name: str) -> Case:
    """The recipe of one of the package's models."""
    return Case("300K", name, load_recipe(RECIPES[name]))


def cases() -> list[str]:
    """The names of all cases, in the order in which they take turns."""
    peers = [f"{name}, PyTorch{how}" for name in PYTORCH for how in ("", " compiled")]
    return [*RECIPES, *peers, RWKV7]


# === PyTorch ===
def rotate(x: Any) -> Any:
    """Rotary positions of (batch, heads, time, features), by halves."""
    import torch

    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    cosine, sine = torch.cos(angles), torch.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def chunked_gla(query: Any, key: Any, value: Any, log_decay: Any) -> Any:
    """In chunks: the decay between two positions is an exponential of a difference of sums."""
    import torch

    batch, heads, length, key_dim = query.shape
    state = query.new_zeros(batch, heads, key_dim, value.shape[-1])
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()[..., None]
    outputs = []
    for start in range(0, length, CHUNK):
        piece = slice(start, start + CHUNK)
        q, k, v = query[:, :, piece] * key_dim**-0.5, key[:, :, piece], value[:, :, piece]
        sums = log_decay[:, :, piece].cumsum(2)
        difference = sums[:, :, :, None] - sums[:, :, None]
        decay = torch.where(causal, difference, -torch.inf).exp()
        scores = torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay)
        outputs.append(scores @ v + (q * sums.exp()) @ state)
        last = sums[:, :, -1:]
        state = last.exp().transpose(2, 3) * state + (k * (last - sums).exp()).mT @ v
    return torch.cat(outputs, 2)


def pytorch_model(name: str, weights: dict[str, np.ndarray], num_heads: int) -> Any:
    """A decoder of the package's weights, by the names that they have in the backbone."""
    import torch
    from torch.nn import functional

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for path, array in weights.items():
                name = path.replace("/", "_")
                self.register_parameter(name, torch.nn.Parameter(torch.tensor(array)))

        def norm(self, x: Any, path: str) -> Any:
            gamma, beta = (getattr(self, f"{path}_{part}") for part in ("gamma", "beta"))
            return functional.layer_norm(x, x.shape[-1:], gamma, beta, 1e-5)

        def heads(self, x: Any, path: str) -> Any:
            return torch.einsum("btd,dhk->bhtk", x, getattr(self, f"{path}_kernel"))

        def softmax(self, x: Any, path: str) -> Any:
            query, key = (rotate(self.heads(x, f"{path}_{part}")) for part in ("query", "key"))
            value = self.heads(x, f"{path}_value")
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            return torch.einsum("bhtv,hvd->btd", mixed, getattr(self, f"{path}_output_kernel"))

        def gla(self, x: Any, path: str) -> Any:
            query, key, value = (self.heads(x, f"{path}_{p}") for p in ("query", "key", "value"))
            gate = self.heads(x @ getattr(self, f"{path}_gate_down_kernel"), f"{path}_gate_up")
            gate = gate + getattr(self, f"{path}_gate_bias")[:, None]
            mixed = chunked_gla(query, key, value, functional.logsigmoid(gate) / 16.0)
            bias = getattr(self, f"{path}_output_gate_bias")[:, None]
            output_gate = functional.silu(self.heads(x, f"{path}_output_gate") + bias)
            mixed = output_gate * self.norm(mixed, f"{path}_norm")
            return torch.einsum("bhtv,hvd->btd", mixed, getattr(self, f"{path}_output_kernel"))

        def forward(self, token_ids: Any) -> Any:
            table = self.token_embedding_embeddings
            x = functional.embedding(token_ids, table)
            for i in range(3):
                mix = self.softmax if name == "transformer" else self.gla
                kind = "softmax" if name == "transformer" else "gla"
                x = x + mix(self.norm(x, f"block_{i}_mixer_norm"), f"block_{i}_{kind}")
                y, path = self.norm(x, f"block_{i}_feed_forward_norm"), f"block_{i}_swiglu"
                gate, value, output = (
                    getattr(self, f"{path}_{part}_kernel") for part in ("gate", "value", "output")
                )
                x = x + (functional.silu(y @ gate) * (y @ value)) @ output
            return self.norm(x, "final_norm") @ table.T

    return Decoder()


def weights_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Those of the backbone by path."""
    return {x.path: keras.ops.convert_to_numpy(x) for x in model.backbone.variables}


def parity(name: str, windows: np.ndarray) -> float:
    """Error of the PyTorch model's logits against the package's with the same weights."""
    import torch

    case = case_of(name)
    model, token_ids = case.build(), windows[:PARITY_ROWS, :-1]
    harness.randomize(model)
    peer = pytorch_model(name, weights_of(model), case.recipe.num_heads)
    with torch.no_grad():
        received = peer(torch.tensor(token_ids, dtype=torch.long)).numpy()
    expected = keras.ops.convert_to_numpy(model({"token_ids": token_ids}))
    return harness.require_parity(name, harness.relative_error([received], [expected]))


def train_in_pytorch(name: str, compiled: bool, windows: np.ndarray) -> dict[str, Any]:
    """Seconds of every step, from the package's fresh weights."""
    import torch
    from torch.nn import functional

    before, case = harness.peak_memory(), case_of(name)
    model = pytorch_model(name, weights_of(case.build()), case.recipe.num_heads)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.99), fused=True)
    run = torch.compile(model) if compiled else model
    seconds = []
    for batch in np.split(windows, len(windows) // case.recipe.batch_size):
        began = time.perf_counter()
        token_ids = torch.tensor(batch, dtype=torch.long)
        logits = run(token_ids[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    parameters = sum(x.numel() for x in model.parameters())
    return figures(seconds, parameters, before)


# === Keras ===
def train_in_keras(name: str, windows: np.ndarray) -> dict[str, Any]:
    """Seconds of every step of one of the package's models, or of RWKV-7."""
    import keras_hub
    import tensorflow as tf

    before, batch_size = harness.peak_memory(), case_of("elita_gated").recipe.batch_size
    inputs = {"token_ids": windows[:, :-1]}
    if name == RWKV7:
        model = keras_hub.models.RWKV7Backbone(vocabulary_size=2048, **RWKV7_SIZES)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3, beta_2=0.99), loss)
        inputs["padding_mask"] = np.ones_like(inputs["token_ids"])
    else:
        model = case_of(name).build()
    batches = tf.data.Dataset.from_tensor_slices((inputs, windows[:, 1:]))
    times = StepTimes()
    model.fit(batches.batch(batch_size, drop_remainder=True), callbacks=[times], verbose=0)
    return figures(times.seconds, model.count_params(), before)


def figures(seconds: list[float], parameters: int, before: int) -> dict[str, Any]:
    """What is reported of a run."""
    return {
        "parameters": parameters,
        "first_step_seconds": seconds[0],
        "step_seconds": seconds[SKIPPED_STEPS:],
        "memory_before_model_bytes": before,
        "peak_memory_bytes": harness.peak_memory(),
    }


def measure(name: str, windows: np.ndarray) -> dict[str, Any]:
    """One turn of a case."""
    model, _, how = name.partition(", PyTorch")
    if model == name:
        return train_in_keras(name, windows)
    return train_in_pytorch(model, how == " compiled", windows)


def main(arguments: list[str] | None = None) -> None:
    """Check, train in turn, write."""
    options = harness.parse(__doc__, arguments)
    report = harness.Report("peers", options)
    steps, turns, limit = (5, 1, 120) if options.short else (8, 3, 600)
    windows = harness.in_child(token_windows, case_of("elita_gated").recipe, steps, None)
    errors = {name: harness.in_child(parity, name, windows) for name in PYTORCH}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases()}
    for turn in range(turns):
        for name in list(runs):
            harness.progress(f"{name}, turn {turn + 1} of {turns}")
            figures_of_turn = harness.in_child_within(limit, measure, name, windows)
            if figures_of_turn is None:
                del runs[name]
                report.write(case=name, finished=False, limit_seconds=limit)
            else:
                runs[name].append(figures_of_turn)
    base = statistics.median(s for run in runs["elita_gated"] for s in run["step_seconds"])
    for name, each in runs.items():
        step = statistics.median(s for run in each for s in run["step_seconds"])
        report.write(
            case=name,
            parameters=each[0]["parameters"],
            step_seconds=step,
            over_elita_gated=step / base,
            first_step_seconds=statistics.median(run["first_step_seconds"] for run in each),
            peak_memory_bytes=max(run["peak_memory_bytes"] for run in each),
            memory_before_model_bytes=each[0]["memory_before_model_bytes"],
            steps=turns * (steps - SKIPPED_STEPS),
            parity_error=errors.get(name.partition(",")[0]),
        )


if __name__ == "__main__":
    main()
