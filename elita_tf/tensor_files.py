"""Arrays in a file of the safetensors format, which every framework reads without running code.

A file is the length of its header (8 bytes, little-endian), the header (JSON) and the numbers of
all arrays, row by row. The header has an entry for every array by its name, and texts under
`__metadata__`.

Source: the format's description, https://github.com/huggingface/safetensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# The names that the format has for the dtypes of NumPy.
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
_DTYPES = {
    name: np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for dtype, name in _NAMES.items()
}
_METADATA = "__metadata__"
_ALIGNMENT = 8  # of the header's length, so that the numbers can be read in place
_LONGEST_HEADER = 1 << 24


def write_arrays(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays by name, and texts about them.

    Args:
        path: the file; give a temporary one where a former file must stay whole.
        arrays: NumPy arrays of any of the format's dtypes, bfloat16 included.
        metadata: texts.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    contents, end = [], 0
    for name, array in arrays.items():
        contents.append(np.ascontiguousarray(array).tobytes())
        begin, end = end, end + len(contents[-1])
        dtype, shape = _NAMES[array.dtype.name], list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.writelines(contents)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the texts of a file.

    Raises:
        ValueError: the file is broken, or of another format.
    """
    content = path.read_bytes()
    try:
        metadata, header, start = _header(content)
        arrays = {name: _array(entry, content, start) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is broken or no safetensors file ({type(error).__name__}: {error})."
        ) from error
    return arrays, metadata


def metadata_of(path: Path) -> dict[str, str]:
    """The texts of a file, empty for a file of another format."""
    with path.open("rb") as file:
        content = file.read(8 + _LONGEST_HEADER)
    try:
        return _header(content)[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _header(content: bytes) -> tuple[dict[str, str], dict[str, Any], int]:
    """The texts, the entries of the arrays, and where their numbers begin."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > min(len(content), 8 + _LONGEST_HEADER):
        raise ValueError(f"a header of {start - 8} bytes in a file of {len(content)}")
    header = json.loads(content[8:start])
    return header.pop(_METADATA), header, start


def _array(entry: dict[str, Any], content: bytes, start: int) -> np.ndarray:
    begin, end = entry["data_offsets"]
    numbers = content[start + begin : start + end]
    # A copy, as a tensor may share the memory of an array.
    return np.frombuffer(numbers, _DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
