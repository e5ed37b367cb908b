"""The language model for use without this package: SavedModel, LiteRT and ONNX (TensorFlow only).

LiteRT and ONNX files compute in float32, whatever the dtype policy of the model is: their runtimes
lack operations in 16 and in 64 bits.

Signatures of the SavedModel, all with named, flat inputs and outputs:

    serve          token_ids (batch, time)                     -> logits (batch, time, vocabulary)
    initial_state  batch_size ()                               -> the state's leaves
    prefill        token_ids, padding_mask (batch, time), state -> logits (batch, vocabulary), state
    step           token_ids (batch,), state                   -> logits (batch, vocabulary), state
    tokenize       prompts (batch,) of strings, max_length ()  -> token_ids, padding_mask
    detokenize     token_ids, padding_mask (batch, time)       -> texts (batch,)
    generate_text  prompts (batch,) of strings, max_length ()  -> texts (batch,)

The leaves of the state are those of `ElitaBackbone.get_initial_state`, by name. The last three,
with the tokenizer inside, are there if the model has a preprocessor; loading them needs `import
tensorflow_text`.
"""

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.causal_lm import ElitaCausalLM
from elita_tf.models.saving import is_quantized
from elita_tf.ops.arguments import require_positive

# A function, and what it takes by name.
_Endpoint = tuple[Callable[..., dict[str, Any]], dict[str, tf.TensorSpec]]
# ONNX Runtime reads it since 1.12; the step needs nothing newer.
_ONNX_OPSET = 17
_SAVED_MODEL_FILE = "saved_model.pb"
_SAVED_MODEL_NAMES = {_SAVED_MODEL_FILE, "assets", "fingerprint.pb", "variables"}


def export_saved_model(model: ElitaCausalLM, path: Path | str) -> None:
    """Write a SavedModel that TensorFlow, and TensorFlow Serving, load without this package.

    Args:
        model: an `ElitaCausalLM`; the sampler that it is compiled with makes the texts.
        path: the folder to write: absent, empty, or a SavedModel, which is replaced.

    Raises:
        ValueError: on another backend than TensorFlow, for what is no model, and for a path that
            holds something else.
    """
    _require_exportable(model)
    require_free(path, _is_saved_model, "a SavedModel")
    token_ids, mask = (tf.TensorSpec([None, None], dtype) for dtype in (tf.int32, tf.bool))
    state = _state_specs(model, None)

    def serve(token_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": model({"token_ids": token_ids})}

    def prefill(token_ids: tf.Tensor, padding_mask: tf.Tensor, **state: Any) -> dict[str, Any]:
        logits, state = model.prefill(token_ids, padding_mask, state)
        return {"logits": logits, **state}

    count = tf.TensorSpec([], tf.int32)
    endpoints: dict[str, _Endpoint] = {
        "serve": (serve, {"token_ids": token_ids}),
        "initial_state": (model.backbone.get_initial_state, {"batch_size": count}),
        "prefill": (prefill, {"token_ids": token_ids, "padding_mask": mask, **state}),
        "step": (_step(model), {"token_ids": tf.TensorSpec([None], tf.int32), **state}),
    }
    if model.preprocessor is not None:
        endpoints |= _text_endpoints(model)
    with in_place_of(path) as temporary:
        _save(model, temporary, endpoints)


def export_litert(model: ElitaCausalLM, path: Path | str, batch_size: int = 1) -> None:
    """Write the one-token step as a LiteRT (TensorFlow Lite) file, with the signature `step`.

    Args:
        model: an `ElitaCausalLM`.
        path: the `.tflite` file to write: absent, or a LiteRT file, which is replaced.
        batch_size: rows of token ids and of every leaf of the state.

    Raises:
        ValueError: on another backend than TensorFlow, for what is no model, for a quantized model,
            and for a path that holds something else.
    """
    _require_exportable(model, batch_size)
    require_free(path, _is_litert, "a LiteRT file")
    if is_quantized(model):
        raise ValueError(
            f"LiteRT can't convert `{model.name}`, which is quantized. Export the model as it was "
            "before `quantize`, or as ONNX, which takes int8."
        )
    model = _in_float32(model)
    with tempfile.TemporaryDirectory() as folder:
        token_ids = tf.TensorSpec([batch_size], tf.int32)
        specs = {"token_ids": token_ids, **_state_specs(model, batch_size)}
        _save(model, folder, {"step": (_step(model), specs)})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["step"])
        converted = converter.convert()
    with in_place_of(path) as temporary:
        temporary.write_bytes(converted)


def export_onnx(model: ElitaCausalLM, path: Path | str, batch_size: int = 1) -> None:
    """Write the one-token step as an ONNX file: `token_ids` and the state in, `logits` and it out.

    A leaf of the state comes out under its own name with `_next` behind it, as ONNX has one name
    space.

    Args:
        model: an `ElitaCausalLM`.
        path: the `.onnx` file to write: absent, or an ONNX file, which is replaced.
        batch_size: rows of token ids and of every leaf of the state.

    Raises:
        ImportError: without the extra `onnx`.
        ValueError: on another backend than TensorFlow, for what is no model, and for a path that
            holds something else.
    """
    _require_exportable(model, batch_size)
    require_free(path, _is_onnx, "an ONNX file")
    if find_spec("tf2onnx") is None:
        raise ImportError('ONNX needs tf2onnx: pip install "elita_tf[onnx]".')
    import tf2onnx

    model = _in_float32(model)
    state = _state_specs(model, batch_size)
    step = _step(model)

    def flat_step(token_ids: tf.Tensor, *leaves: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = step(token_ids, **dict(zip(state, leaves, strict=True)))
        return {name if name == "logits" else f"{name}_next": x for name, x in outputs.items()}

    specs = [tf.TensorSpec([batch_size], tf.int32, "token_ids")]
    specs += [tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in state.items()]
    with in_place_of(path) as temporary:
        tf2onnx.convert.from_function(
            tf.function(flat_step, input_signature=specs),
            input_signature=specs,
            opset=_ONNX_OPSET,
            output_path=str(temporary),
        )


def require_model(model: Any) -> None:
    """Raises ValueError for what no export takes."""
    if not isinstance(model, ElitaCausalLM):
        raise ValueError(f"Expected an ElitaCausalLM to export; received {model!r}.")


def _require_exportable(model: Any, batch_size: Any = 1) -> None:
    require_model(model)
    require_positive("an export", batch_size=batch_size)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Exports are TensorFlow graphs, and the Keras backend is {keras.backend.backend()!r}. "
            "Save the model with `save_to_preset`, and load and export it in a process with "
            "KERAS_BACKEND=tensorflow."
        )


def require_free(path: Path | str, is_former: Callable[[Path], bool], kind: str) -> None:
    """Raises ValueError where an export would replace what is no former export of its kind."""
    path = Path(path).expanduser()
    empty = path.is_dir() and not any(path.iterdir()) and is_former is _is_saved_model
    if (path.exists() or path.is_symlink()) and not empty and not is_former(path):
        raise ValueError(
            f"{path} exists and is not {kind}, and an export would replace it. Choose another "
            "path, or move it away."
        )


def _is_saved_model(path: Path) -> bool:
    names = {each.name for each in path.iterdir()} if path.is_dir() else set()
    # With a file besides it is more than an export.
    return _SAVED_MODEL_FILE in names and names <= _SAVED_MODEL_NAMES


def _is_litert(path: Path) -> bool:
    return path.is_file() and _beginning(path)[4:8] == b"TFL3"


def _is_onnx(path: Path) -> bool:
    return path.is_file() and b"tf2onnx" in _beginning(path)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


@contextmanager
def in_place_of(path: Path | str) -> Iterator[Path]:
    """Gives a path beside, and in the end what was written there takes the place of `path`."""
    path = Path(path).expanduser().resolve()  # what a link names is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = (path.with_name(f".{uuid.uuid4().hex}.{path.name}") for _ in range(2))
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step
            path.rename(former)
        temporary.replace(path)
    except BaseException:
        if former.exists():
            former.rename(path)
        raise
    finally:
        for each in (temporary, former):
            shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)


def _in_float32(model: ElitaCausalLM) -> ElitaCausalLM:
    """The model, or one of the same weights whose policy is float32."""
    backbone = model.backbone
    if backbone.compute_dtype == backbone.variable_dtype == "float32":
        return model
    if is_quantized(backbone):
        raise ValueError(
            f"`{model.name}` is quantized and computes in {backbone.compute_dtype}; ONNX needs "
            "float32. Quantize a model that was loaded with dtype='float32'."
        )
    copied = ElitaBackbone.from_config({**backbone.get_config(), "dtype": "float32"})
    copied.set_weights([ops.convert_to_numpy(weight) for weight in backbone.weights])
    return ElitaCausalLM(copied, compile=False)


def _state_specs(model: ElitaCausalLM, batch_size: int | None) -> dict[str, tf.TensorSpec]:
    leaves = model.backbone.get_initial_state(1)
    return {name: tf.TensorSpec([batch_size, *x.shape[1:]], x.dtype) for name, x in leaves.items()}


def _step(model: ElitaCausalLM) -> Callable[..., dict[str, Any]]:
    def step(token_ids: tf.Tensor, **state: Any) -> dict[str, Any]:
        logits, state = model.step(token_ids, state)
        return {"logits": logits, **state}

    return step


def _text_endpoints(model: ElitaCausalLM) -> dict[str, _Endpoint]:
    preprocessor, tokenizer = model.preprocessor, model.preprocessor.tokenizer

    def tokenize(prompts: tf.Tensor, max_length: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tokenizer(prompts)
        if preprocessor.add_start_token:
            start = tf.fill([tf.size(prompts), 1], tokenizer.start_token_id)
            rows = tf.concat([tf.RaggedTensor.from_tensor(start), rows], axis=1)
        lengths = tf.cast(rows.row_lengths(), tf.int32)
        message = "Every prompt needs a token at least, and max_length at most."
        checks = [
            tf.debugging.assert_positive(lengths, message),
            tf.debugging.assert_less_equal(lengths, max_length, message),
        ]
        with tf.control_dependencies(checks):
            token_ids = rows.to_tensor()
        token_ids = tf.pad(token_ids, [[0, 0], [0, max_length - tf.shape(token_ids)[1]]])
        return {"token_ids": token_ids, "padding_mask": tf.sequence_mask(lengths, max_length)}

    def detokenize(token_ids: tf.Tensor, padding_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        return {"texts": preprocessor.generate_postprocess(inputs)}

    def generate_text(prompts: tf.Tensor, max_length: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = tokenize(prompts, max_length)
        return detokenize(**model.generate_step(inputs, [tokenizer.end_token_id]))

    prompts = {
        "prompts": tf.TensorSpec([None], tf.string),
        "max_length": tf.TensorSpec([], tf.int32),
    }
    ids, mask = (tf.TensorSpec([None, None], dtype) for dtype in (tf.int32, tf.bool))
    return {
        "tokenize": (tokenize, prompts),
        "detokenize": (detokenize, {"token_ids": ids, "padding_mask": mask}),
        "generate_text": (generate_text, prompts),
    }


def _save(model: ElitaCausalLM, path: Path | str, endpoints: dict[str, _Endpoint]) -> None:
    module = tf.Module()
    signatures = {
        name: tf.function(function).get_concrete_function(**specs)
        for name, (function, specs) in endpoints.items()
    }
    # What the graphs read and TensorFlow must save with them.
    module.variables_read = [variable.value for variable in model.variables]
    if model.preprocessor is not None:
        kinds = (tf.Module, tf.saved_model.experimental.TrackableResource)
        resources = vars(model.preprocessor.tokenizer).values()
        module.resources = [resource for resource in resources if isinstance(resource, kinds)]
        end_token_id = model.preprocessor.tokenizer.end_token_id
        module.end_token_id = tf.Variable(end_token_id, trainable=False)
        module.seeds = [variable.value for variable in model.sampler.variables]
    tf.saved_model.save(module, str(path), signatures=signatures)
