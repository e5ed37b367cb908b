"""Exports a run: python training/export.py --run_dir runs/quickstart --format saved_model."""

import argparse
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elita_tf.models import export_litert, export_onnx, export_saved_model
from elita_tf.runs.generation import load_model

FORMATS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "saved_model": ("saved_model", export_saved_model),
    "litert": ("step.tflite", export_litert),
    "onnx": ("step.onnx", export_onnx),
}


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, exports, says where to."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", type=Path, help="folder that train.py wrote")
    source.add_argument("--preset", help="KerasHub preset: a folder or an hf:// handle")
    parser.add_argument("--format", choices=sorted(FORMATS), default="saved_model")
    parser.add_argument("--output", type=Path, help="default: within the run folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name, write = FORMATS[options.format]
    output = options.output or (options.run_dir and options.run_dir / name)
    if output is None:
        parser.error("--output: expected where to write to, as there is no run folder")
    try:
        model = load_model(options)
        print(f"Writing {output}")
        if output.is_dir():
            shutil.rmtree(output)
        write(model, output)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    files = sorted(path for path in [output, *output.rglob("*")] if path.is_file())
    print(f"Written: {sum(path.stat().st_size for path in files):,} bytes")
