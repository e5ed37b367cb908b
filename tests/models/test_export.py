"""Exports: what a process without this package computes is what the live model computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from elita_tf import layers
from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    ElitaGPT2Tokenizer,
    architectures,
    export,
)
from tests import helpers
from tests.helpers import randomized

pytestmark = helpers.tensorflow_only
CONTEXT, STEPS = 6, 64
# Together they have every mixer, decay, feed-forward and kind of position.
EVERY = pytest.mark.parametrize(
    "name", ["elita", "elita_gated", "learned_positions", "transformer"]
)
PROMPTS = ["3 and 4", "So they\ndo"]

# What a stranger does: no package but TensorFlow, and TensorFlow Text for the strings.
STRANGER = """
import sys

sys.modules.update(dict.fromkeys(["elita_tf", "keras_hub"]))  # cannot be imported
import json
import numpy as np
import tensorflow as tf
import tensorflow_text


def read(folder, prompts):
    served = tf.saved_model.load(folder + "/model").signatures
    ids = tf.constant(np.load(folder + "/ids.npy"))
    outputs = {"serve": served["serve"](token_ids=ids)["logits"]}
    state = served["initial_state"](batch_size=tf.constant(2))
    mask = tf.constant([[True] * 5, [False] * 2 + [True] * 3])
    results = served["prefill"](token_ids=ids[:, :5], padding_mask=mask, **state)
    outputs["prefill"] = results.pop("logits")
    results = served["step"](token_ids=ids[:, 5], **results)
    outputs["step"] = results.pop("logits")
    np.savez(folder + "/outputs.npz", **outputs, **results)
    if "generate_text" not in served:
        return None
    prompts = tf.constant(prompts)
    texts = served["generate_text"](prompts=prompts, max_length=tf.constant(15))["texts"]
    return [text.decode() for text in texts.numpy()]


prompts = json.loads(sys.argv[1])
print(json.dumps([read(folder, prompts) for folder in sys.argv[2:]]))
"""


def make_model(name: str, preprocessor: Any = None, dtype: str | None = None) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    changes = {"learned_positions": True} if name == "learned_positions" else {}
    base = architectures["gla" if name == "learned_positions" else name]
    sizes = {"hidden_dim": 16, "context_length": CONTEXT}
    if name != "hybrid":
        sizes["num_layers"] = 1
    vocabulary = preprocessor.tokenizer.vocabulary_size() if preprocessor else 23
    arguments = {**base, **sizes, **changes, "dtype": dtype}
    model = ElitaCausalLM(ElitaBackbone(vocabulary, **arguments), preprocessor)
    model.compile(sampler="greedy", run_eagerly=True)
    return randomized(model, scale=0.4)


def export_for_a_stranger(model: ElitaCausalLM, folder: Path) -> Path:
    folder.mkdir()
    size = min(model.backbone.vocabulary_size, 23)
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, size, (2, 8)).astype("int32"))
    export.export_saved_model(model, folder / "model")
    return folder


def check_what_a_stranger_saw(model: ElitaCausalLM, folder: Path) -> None:
    ids, served = np.load(folder / "ids.npy"), dict(np.load(folder / "outputs.npz"))
    helpers.assert_close(served.pop("serve"), np.array(model({"token_ids": ids})), 1e-5)
    mask = np.array([[True] * 5, [False] * 2 + [True] * 3])
    logits, state = model.prefill(ids[:, :5], mask)
    helpers.assert_close(served.pop("prefill"), np.array(logits), 1e-5)
    logits, state = model.step(ids[:, 5], state)
    helpers.assert_close(served.pop("step"), np.array(logits), 1e-5)
    assert set(served) == set(state)
    for leaf, value in state.items():
        helpers.assert_close(served[leaf], np.array(value), 1e-5)


def test_prefill_of_a_saved_model_heeds_the_padding(tmp_path: Path) -> None:
    model, ids = make_model("elita_gated"), np.arange(10).reshape(2, 5) % 7
    mask = np.array([[True] * 5, [False] * 2 + [True] * 3])
    export.export_saved_model(model, tmp_path)
    served = tf.saved_model.load(tmp_path).signatures
    state = served["initial_state"](batch_size=tf.constant(2))
    inputs = {"token_ids": tf.constant(ids, tf.int32), "padding_mask": tf.constant(mask)}
    received = served["prefill"](**inputs, **state)
    logits, expected = model.prefill(ids, mask)
    helpers.assert_close(received.pop("logits").numpy(), np.array(logits), 1e-5)
    assert received.keys() == expected.keys()
    for leaf, value in expected.items():
        helpers.assert_close(received[leaf].numpy(), np.array(value), 1e-5)


def small_gpt2_tokenizer() -> ElitaGPT2Tokenizer:
    tokens = ["<|endoftext|>", *"3ando4Sthey", "Ġ", "Ċ", "an", "Ġan", "th"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return ElitaGPT2Tokenizer(vocabulary, ["a n", "Ġ an", "t h"])


@pytest.mark.long
def test_saved_models_elsewhere(tokenizers: dict, tmp_path: Path) -> None:
    """In one process, as its start takes most of the time."""
    of_text = {
        "lossless": ("elita_query", tokenizers["lossless"], False),
        "default": ("elita_query", tokenizers["default"], True),
        "gpt2": ("gla", small_gpt2_tokenizer(), True),
    }
    models = {name: make_model(name) for name in ("hybrid", "learned_positions")}
    for kind, (name, tokenizer, start) in of_text.items():
        preprocessor = ElitaCausalLMPreprocessor(
            tokenizer, sequence_length=15, add_start_token=start
        )
        models[kind] = make_model(name, preprocessor)
    folders = [export_for_a_stranger(models[kind], tmp_path / kind) for kind in models]
    command = [sys.executable, "-c", STRANGER, json.dumps(PROMPTS), *map(str, folders)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    texts = dict(zip(models, json.loads(printed), strict=True))
    for kind, model in models.items():
        check_what_a_stranger_saw(model, tmp_path / kind)
        written = model.generate(PROMPTS, max_length=15) if kind in of_text else None
        assert texts[kind] == written, kind
    for kind in ("lossless", "default"):
        assert all(x.startswith(prompt) for x, prompt in zip(texts[kind], PROMPTS, strict=True))
    generate_text = tf.saved_model.load(tmp_path / "lossless" / "model").signatures["generate_text"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_length"):
        generate_text(prompts=tf.constant(PROMPTS), max_length=tf.constant(3))


@pytest.mark.long
def test_random_samples_differ(tokenizers: dict, tmp_path: Path) -> None:
    preprocessor = ElitaCausalLMPreprocessor(tokenizers["lossless"], sequence_length=15)
    model = make_model("elita", preprocessor)
    model.compile(sampler="random")
    export.export_saved_model(model, tmp_path)
    generate_text = tf.saved_model.load(tmp_path).signatures["generate_text"]
    arguments = {"prompts": tf.constant(PROMPTS[:1]), "max_length": tf.constant(30)}
    texts = {generate_text(**arguments)["texts"].numpy()[0] for _ in range(3)}
    assert len(texts) == 3


def chain(model: ElitaCausalLM, step: Callable[[dict], dict], steps: int = STEPS) -> None:
    """Compares a chain of steps with the model's own."""
    live = model.backbone.get_initial_state(1)
    other = {name: np.array(leaf) for name, leaf in live.items()}
    for token in np.random.default_rng(4).integers(0, 23, steps):
        ids = np.array([token], "int32")
        logits, live = model.step(ids, live)
        outputs = step({"token_ids": ids, **other})
        helpers.assert_close(outputs.pop("logits"), np.array(logits), 1e-4)
        assert set(outputs) == set(live)
        other = outputs


@pytest.mark.long
@EVERY
def test_litert(name: str, tmp_path: Path) -> None:
    interpreter_module = pytest.importorskip("ai_edge_litert.interpreter")
    model = make_model(name)
    export.export_litert(model, tmp_path / "step.tflite")
    interpreter = interpreter_module.Interpreter(str(tmp_path / "step.tflite"))
    step = interpreter.get_signature_runner("step")
    chain(model, lambda inputs: step(**inputs))
    content = (tmp_path / "step.tflite").read_bytes()
    assert b"Flex" not in content


def onnx_step(path: Path) -> Callable[[dict], dict]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def step(inputs: dict) -> dict:
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        return {name.removesuffix("_next"): value for name, value in outputs.items()}

    return step


@pytest.mark.long
@EVERY
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx")
    model = make_model(name)
    export.export_onnx(model, tmp_path / "step.onnx")
    chain(model, onnx_step(tmp_path / "step.onnx"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float64"])
@pytest.mark.parametrize("writer", ["onnx", "litert"])
def test_steps_compute_in_float32_under_every_policy(
    writer: str, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("tf2onnx" if writer == "onnx" else "ai_edge_litert")
    model, path = make_model("transformer", dtype=dtype), tmp_path / "deep" / "step"
    if writer == "onnx":
        export.export_onnx(model, path)
        step = onnx_step(path)
    else:
        from ai_edge_litert.interpreter import Interpreter

        export.export_litert(model, path)
        runner = Interpreter(str(path)).get_signature_runner("step")

        def step(inputs: dict) -> dict:
            return runner(**inputs)

    sizes = {**model.backbone.get_config(), "dtype": "float32"}
    exact = ElitaCausalLM(ElitaBackbone.from_config(sizes))
    exact.set_weights([np.array(keras.ops.cast(w, "float32")) for w in model.weights])
    chain(exact, step, 3)
    assert {w.dtype for w in model.weights} <= {dtype.removeprefix("mixed_"), "float32"}


@pytest.mark.long
def test_what_is_quantized_goes_to_onnx_and_not_to_litert(tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx")
    model = make_model("elita_gated")
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized. Export the model as it was"):
        export.export_litert(model, tmp_path / "step.tflite")
    export.export_onnx(model, tmp_path / "step.onnx")
    chain(model, onnx_step(tmp_path / "step.onnx"), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]


@pytest.mark.parametrize("decay", [None, "gated"])
def test_a_step_that_keras_writes_as_onnx_begins_empty(decay: str | None, tmp_path: Path) -> None:
    """With a free batch: arrays of -inf became products there, and those NaN."""
    pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    streaming = layers.Streaming(layers.Attention2(num_heads=2, context_length=5, decay=decay))
    x = np.random.default_rng(2).normal(size=(3, 1, 8)).astype("float32")
    streaming.build(x.shape)
    state = {name: np.array(leaf) for name, leaf in streaming.get_initial_state(3).items()}
    inputs = {
        name: keras.Input(leaf.shape[1:], dtype=leaf.dtype.name, name=name)
        for name, leaf in state.items()
    }
    inputs["x"] = keras.Input((1, 8), name="x")
    step = keras.Model(inputs, streaming(inputs["x"], {name: inputs[name] for name in state}))
    randomized(step)
    expected = keras.tree.flatten(step({**state, "x": x}))
    step.export(tmp_path / "step.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    given = {each.name: {**state, "x": x}[each.name] for each in session.get_inputs()}
    received = session.run(None, given)
    for output, value in zip(received, expected, strict=True):
        helpers.assert_close(output, np.array(value), 1e-5)


@EVERY
def test_step_under_xla(name: str) -> None:
    model = make_model(name)
    step = tf.function(model.step, jit_compile=True)

    def compiled(inputs: dict) -> dict:
        logits, state = step(inputs.pop("token_ids"), inputs)
        return {"logits": np.array(logits), **state}

    chain(model, compiled)


def test_onnx_without_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"elita_tf\[onnx\]"):
        export.export_onnx(make_model("gla"), tmp_path / "step.onnx")


# === What a path holds already ===
WRITERS = (export.export_saved_model, export.export_litert, export.export_onnx)
TAKEN = {
    "a file": {"mine": "x"},
    "a folder with a file": {"mine/notes.txt": "x"},
    "a SavedModel and a file": {"mine/saved_model.pb": "x", "mine/notes.txt": "x"},
}


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("files", TAKEN.values(), ids=TAKEN)
def test_what_is_not_a_former_export_stays(
    write: Callable[..., None], files: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="mine exists and is not a.* an export would replace it"):
        write(make_model("elita"), tmp_path / "mine")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_is_not_written_over_a_folder(number: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists and is not"):
        WRITERS[number](make_model("elita"), tmp_path)
    assert tmp_path.is_dir()


def test_an_export_replaces_a_former_one_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make_model("elita"), tmp_path / "deep" / "model"
    content = "first"

    def save(model: Any, folder: Path, endpoints: Any) -> None:
        (folder / "variables").mkdir(parents=True)
        (folder / "saved_model.pb").write_text(content)
        (folder / "variables" / content).touch()
        if content == "broken":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", save)
    export.export_saved_model(model, path)
    content = "second"
    export.export_saved_model(model, path)
    before = files_of(tmp_path)
    assert list(map(Path, before)) == [
        Path("deep/model/saved_model.pb"),
        Path("deep/model/variables/second"),
    ]
    content = "broken"
    with pytest.raises(OSError, match="No space left"):
        export.export_saved_model(model, path)
    assert files_of(tmp_path) == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("former", [b"\x00\x00\x00\x00TFL3...", b"\x08\x08\x12\x07tf2onnx\x1a"])
def test_a_former_file_is_told_by_its_content(former: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step"
    path.write_bytes(former)
    is_former = {b"TFL3": export._is_litert, b"tf2onnx": export._is_onnx}
    assert [check(path) for mark, check in is_former.items()] == [
        mark in former for mark in is_former
    ]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    with export.in_place_of(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]
