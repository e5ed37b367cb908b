"""What a model's files say of the model, and what Keras would do to a model and lose."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from elita_tf.models.model_card import write_card

# The entry of a weights file, beside the weights, that says which backbone they are of.
_ARCHITECTURE = "architecture"
# What a backbone of the same weights may have otherwise.
_FREE = {"name", "trainable", "dtype", "dropout"}
# Of Keras' ways to quantize, those after which a model trains and its files load.
_MODES = ["int8", "float8"]


class Saving:
    """Mixin of the backbone, and of models that have one as `backbone`: files that are checked.

    A weights file, whole models and presets included, holds the arguments of its backbone. A model
    with others refuses it: weights of fewer blocks, or of another `context_length`, would fit all
    the same and mean something else. Files without them load as in Keras.
    """

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Any:
        """As in KerasHub, and with the dtype policy that was saved, unless `dtype` is given.

        What was saved in float32 comes in the default policy of Keras, as KerasHub has it; so does
        a backbone by itself from a handle.

        Args:
            preset: a folder, a handle, or a name of `presets`.
            load_weights: False for fresh weights.
            **kwargs: of KerasHub, such as `dtype`.

        Raises:
            ValueError: a `dtype` for a preset of quantized weights, and all that KerasHub refuses.
        """
        saved = _policies_in(Path(preset))
        if saved and kwargs.get("dtype") is None:
            kwargs["dtype"] = saved
        elif saved and saved["config"].get("policy_map"):
            raise ValueError(
                f"The weights of the preset {preset} are quantized, and would mean something else "
                f"as {kwargs['dtype']!r}. Leave out `dtype`, or save the model as it was before "
                "`quantize`."
            )
        return super().from_preset(preset, load_weights, **kwargs)

    def save_to_preset(
        self,
        preset_dir: Path | str,
        max_shard_size: float | None = 10,
        license: str = "unknown",
        datasets: Sequence[str] = (),
    ) -> None:
        """As in KerasHub, with a model card, `README.md`.

        A card that somebody has written or changed stays as it is.

        Args:
            preset_dir: the folder.
            max_shard_size: GB of weights in a file.
            license: of the weights, for the card: a name of the Hugging Face Hub, "cc-by-sa-3.0".
            datasets: what they were trained on, for the card: names of the Hub.
        """
        super().save_to_preset(preset_dir, max_shard_size)
        write_card(self, preset_dir, license, datasets)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store[_ARCHITECTURE] = np.frombuffer(json.dumps(self._architecture()).encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        entries = {name: store[name] for name in store.keys()}  # noqa: SIM118, not a dict
        self._require_same(entries.pop(_ARCHITECTURE, None))
        super().load_own_variables(entries)

    def load_weights(
        self, filepath: Path | str, skip_mismatch: bool = False, **kwargs: Any
    ) -> None:
        """As in Keras, but weights of another backbone are refused before any is loaded.

        Args:
            filepath: of `save_weights`.
            skip_mismatch: load what fits, with a warning.
            **kwargs: of `keras.Model.load_weights`.

        Raises:
            ValueError: the weights are of a backbone with other arguments, which are named.
        """
        # Keras reports what a model refuses after it has loaded all the rest.
        is_one_file = str(filepath).endswith(".weights.h5") and Path(filepath).is_file()
        if is_one_file and not skip_mismatch:
            # What is no such file is for Keras to refuse.
            with suppress(OSError), h5py.File(filepath) as file:
                self._require_same(file.get(f"vars/{_ARCHITECTURE}"))
        super().load_weights(filepath, skip_mismatch, **kwargs)

    def _architecture(self) -> dict[str, Any]:
        backbone = getattr(self, "backbone", self)
        config = {k: v for k, v in backbone.get_config().items() if k not in _FREE}
        config["window_length"] = config["window_length"] or config["context_length"]
        # Through JSON, as a tuple and a list are the same there.
        return json.loads(json.dumps({**config, "quantized": is_quantized(backbone)}))

    def _require_same(self, entry: Any) -> None:
        if entry is None:
            return
        saved, own = json.loads(np.asarray(entry).tobytes()), self._architecture()
        differing = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))
        if differing:
            of_file, of_model = (
                ", ".join(f"{name}={each.get(name)!r}" for name in differing)
                for each in (saved, own)
            )
            raise ValueError(
                f"These weights are of a backbone with {of_file}; `{self.name}` has {of_model}. "
                "Load them into a model that is made as theirs was, and quantized if theirs was. "
                "To take over what fits all the same, pass skip_mismatch=True."
            )

    def export(self, filepath: Any, format: str = "tf_saved_model", **kwargs: Any) -> None:
        """As in Keras, for SavedModels of the forward pass; all else has writers of its own.

        Args:
            filepath: the folder to write.
            format: "tf_saved_model".
            **kwargs: of `keras.Model.export`.

        Raises:
            ValueError: another format. Keras would write a file that no runtime loads.
        """
        if format != "tf_saved_model":
            raise ValueError(
                f"`format` of `{self.name}.export`: expected 'tf_saved_model', received {format!r}."
                " The forward pass has loops that other formats lack, and its one-token step has "
                "none: write that of an ElitaCausalLM with elita_tf.models.export_onnx or "
                "export_litert, or with `elita export --format onnx` or `litert`."
            )
        super().export(filepath, format=format, **kwargs)

    def _run_through_graph(
        self, inputs: Any, operation_fn: Callable[[Any], Any] = lambda op: op, call_fn: Any = None
    ) -> Any:
        # The one method by which `keras.models.clone_model` goes through a model.
        def checked(operation: Any) -> Any:
            found = operation_fn(operation)
            if found is not operation and isinstance(found, keras.layers.Layer):
                raise ValueError(
                    f"keras.models.clone_model would make a plain model of the layers of "
                    f"`{self.name}`, without its loss, state and generation. For a "
                    f"{type(self).__name__} with fresh weights call "
                    "`type(model).from_config(model.get_config())`, and for a copy "
                    "`copy.deepcopy(model)`."
                )
            return found

        return super()._run_through_graph(inputs, checked, call_fn)


def is_quantized(model: keras.Model) -> bool:
    """Whether `quantize` has changed a layer."""
    return any(layer.quantization_mode is not None for layer in _layers(model))


def saved_policy(model: keras.Model) -> Any:
    """The dtype policy for the model's configuration: as a map, unless it is float32.

    Of a map, KerasHub takes all as it was saved; any other policy it converts to the default of
    Keras, or refuses. The map that it makes of a quantized model leaves the other layers out.
    """
    policy = model.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy
    quantized = {
        layer.path: layer.dtype_policy
        for layer in _layers(model)
        if layer.quantization_mode is not None
    }
    if not quantized and policy.name == "float32":
        return policy
    return keras.dtype_policies.DTypePolicyMap(policy.name, quantized)


def plain_policy(dtype: Any) -> Any:
    """The policy itself, for a map that has it for all layers."""
    if isinstance(dtype, keras.dtype_policies.DTypePolicyMap) and not dtype:
        return dtype.default_policy
    return dtype


def _policies_in(folder: Path) -> dict[str, Any] | None:
    """The map of dtype policies in the configuration of a preset, if it has one."""
    try:
        dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["dtype"]
        return dtype if dtype["class_name"] == "DTypePolicyMap" else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # a handle, or for KerasHub to refuse


def require_quantizable(model: keras.Model, mode: Any, config: Any) -> None:
    """Raises ValueError for a quantization that would lose the model's loss or its files."""
    found = mode if config is None else config.mode
    if found not in _MODES or mode not in (None, found):
        raise ValueError(
            f"`quantize` of `{model.name}`: expected one of {_MODES}, received {mode!r} and the "
            f"config {config!r}. Files of a model that Keras quantizes otherwise do not load again."
        )
    if is_quantized(model):
        raise ValueError(f"`{model.name}` is quantized already. Take the model as it was before.")
    if any(getattr(layer, "lora_enabled", False) for layer in _layers(model)):
        raise ValueError(
            f"`{model.name}` has LoRA factors, which files of quantized models do not hold exactly."
            " Save it with `save_to_preset`, which merges them into the kernels, and quantize the "
            "model that `from_preset` gives."
        )


def require_no_quantized(model: keras.Model) -> None:
    """Raises ValueError where LoRA would be added to quantized kernels."""
    if is_quantized(model):
        raise ValueError(
            f"`{model.name}` is quantized, and its files would not hold LoRA factors exactly. "
            "Train the factors before `quantize`: save the model with `save_to_preset`, which "
            "merges them, load it and quantize it."
        )


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    return list(model._flatten_layers(include_self=False))
