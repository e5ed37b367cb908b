"""Logits, state and gradients of every architecture as they were before a change of structure.

`python -m tests.models.test_goldens` writes goldens.npz anew: only where numbers are to change.
Weights are drawn by the name of their variable, so that none is stored. All in float64, as the
rounding of float32 differs from one processor to another.
"""

import zlib
from pathlib import Path

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from elita_tf.ops import linear_cross_entropy
from tests import helpers

GOLDENS = Path(__file__).with_name("goldens.npz")
VOCABULARY, ROWS, TIME, FIRST_PIECE = 37, 3, 21, 8
BOUND = 1e-12
SIZES = {"hidden_dim": 16, "num_heads": 4, "context_length": 11}
# New names of variables, and what they were called when the goldens were written.
RENAMED: dict[str, str] = {}


def build(architecture: str) -> ElitaCausalLM:
    layers = 3 if architecture == "hybrid" else 2
    arguments = {**architectures[architecture], **SIZES, "num_layers": layers, "dtype": "float64"}
    model = ElitaCausalLM(ElitaBackbone(vocabulary_size=VOCABULARY, **arguments), compile=False)
    for variable in model.weights:
        name = old_name(variable)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        variable.assign(0.4 * rng.standard_normal(variable.shape) + ("gamma" in name))
    return model


def old_name(variable: keras.Variable) -> str:
    """The path without the counted names of the models."""
    path = "/".join(variable.path.split("/")[-3:])
    for new, old in RENAMED.items():
        path = path.replace(new, old)
    block = path.find("block_")
    return path[block:] if block >= 0 else "/".join(path.split("/")[-2:])


def inputs() -> dict[str, np.ndarray]:
    """A row that is padded on the left, one that is padded on the right, and two segments."""
    positions = np.arange(TIME)
    token_ids = (np.arange(ROWS)[:, None] * 5 + positions * 7) % VOCABULARY
    mask = np.stack([positions >= 3, positions >= 0, positions < 17])
    segments = np.stack([positions // 13, positions // 6, positions // 30])
    return {
        "token_ids": token_ids.astype("int32"),
        "padding_mask": mask,
        "segment_ids": segments.astype("int32"),
    }


def figures(architecture: str) -> dict[str, np.ndarray]:
    """Logits, of a call and of a stream in two pieces, its state, and the loss's gradients."""
    model, x = build(architecture), inputs()
    backbone, state, hidden_states = model.backbone, model.backbone.get_initial_state(ROWS), []
    for part in (np.s_[:, :FIRST_PIECE], np.s_[:, FIRST_PIECE:]):
        piece = {name: each[part] for name, each in x.items()}
        outputs, state = backbone.call_with_state(piece, state)
        hidden_states.append(helpers.leaves(outputs)[0])
    real = x["padding_mask"][..., None]  # what a model gives at padding is nobody's business
    kernel = helpers.leaves(backbone.output_kernel)[0]
    found = {
        "logits": real * helpers.leaves(model(x))[0],
        "stream": real * (np.concatenate(hidden_states, axis=1) @ kernel.T),
    }
    found |= {f"state/{name}": helpers.leaves(leaf)[0] for name, leaf in state.items()}
    return found | gradients(model, x)


def gradients(model: ElitaCausalLM, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import tensorflow as tf

    labels = np.roll(x["token_ids"], -1, axis=1)
    with tf.GradientTape() as tape:
        hidden_states, kernel = model.backbone(x), model.backbone.output_kernel
        loss = linear_cross_entropy(hidden_states, kernel, labels, x["padding_mask"])
    variables = model.trainable_variables
    found = tape.gradient(loss, [variable.value for variable in variables])
    named = zip(variables, found, strict=True)
    return {f"gradient/{old_name(v)}": np.asarray(tf.convert_to_tensor(g)) for v, g in named}


@pytest.mark.every_case
@pytest.mark.parametrize("architecture", architectures)
@helpers.tensorflow_only
def test_an_architecture_is_as_it_was(architecture: str) -> None:
    with np.load(GOLDENS) as file:
        prefix = f"{architecture}:"
        expected = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
    found = figures(architecture)
    assert found.keys() == expected.keys()
    for name, golden in expected.items():
        error = helpers.relative_error(found[name], golden)
        assert error <= BOUND, f"{name}: {error:.1e}, expected at most {BOUND}"


def main() -> None:
    found = {f"{a}:{k}": x for a in architectures for k, x in figures(a).items()}
    np.savez_compressed(GOLDENS, **found)


if __name__ == "__main__":
    main()
