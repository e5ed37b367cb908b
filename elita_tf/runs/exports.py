"""The exports of a trained model as files, and the command `elita export`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elita_tf.models import (
    export_litert,
    export_onnx,
    export_safetensors,
    export_saved_model,
)
from elita_tf.runs.command_line import add_model_source, command_parser, explained, path
from elita_tf.runs.generation import load_model

FORMATS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "saved_model": ("saved_model", export_saved_model),
    "litert": ("step.tflite", export_litert),
    "onnx": ("step.onnx", export_onnx),
    "safetensors": ("model.safetensors", export_safetensors),
}


def main(arguments: list[str] | None = None) -> None:
    """The command `elita export`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = command_parser(
        "export",
        "Writes a model for use without this package: whole as a SavedModel, its one-token step "
        "for LiteRT or ONNX, or its weights as safetensors.",
        "--run_dir runs/quickstart",
        "--run_dir runs/quickstart --format onnx --output step.onnx",
        "--preset elita_wikitext2 --output served",
    )
    add_model_source(parser)
    parser.add_argument("--format", choices=sorted(FORMATS), default="saved_model")
    parser.add_argument("--output", type=path, help="default: within the run folder")
    options = parser.parse_args(arguments)
    name, write = FORMATS[options.format]
    output = options.output or (options.run_dir and options.run_dir / name)
    if output is None:
        parser.error("--output: expected where to write to, as there is no run folder")
    with explained(parser):
        model = load_model(options)
        print(f"Writing {output}")
        write(model, output)
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    print(f"Written: {sum(path.stat().st_size for path in files):,} bytes")
