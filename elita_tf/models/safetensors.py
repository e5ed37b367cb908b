"""The weights of a model as a safetensors file, which other frameworks read without running code.

A file is the length of its header (8 bytes, little-endian), the header (JSON) and the numbers of
all tensors, row by row. The header has an entry for every tensor, by the path of its variable in
the backbone, such as `token_embedding/embeddings` or `block_0_gla/query/kernel`, and under
`__metadata__` the arguments of the backbone, as JSON.

Source: the format's description, https://github.com/huggingface/safetensors.
"""

import json
from pathlib import Path

import numpy as np
from keras import ops

from elita_tf.models.causal_lm import ElitaCausalLM
from elita_tf.models.export import in_place_of, require_free, require_model

_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8", "bool": "BOOL"},
}
_ALIGNMENT = 8  # of the header's length, so that the numbers can be read in place


def export_safetensors(model: ElitaCausalLM, path: Path | str) -> None:
    """Write the backbone's weights, on any backend; the output projection is among them.

    Kernels are as Keras has them: `inputs @ kernel`, and by heads (inputs, heads, features). The
    weights of a quantized layer are int8, with its scales beside them.

    Args:
        model: an `ElitaCausalLM`.
        path: the `.safetensors` file to write: absent, or one that this function wrote.

    Raises:
        ValueError: for what is no model, and for a path that holds something else.

    Example:

    >>> import tempfile
    >>> from elita_tf.models import ElitaBackbone, ElitaCausalLM, export_safetensors
    >>> backbone = ElitaBackbone(50, num_layers=1, hidden_dim=8, num_heads=2, mixers="gla")
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> export_safetensors(ElitaCausalLM(backbone), path)
    >>> header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    >>> header["token_embedding/embeddings"]["shape"]
    [50, 8]
    """
    require_model(model)
    require_free(path, _is_safetensors, "a safetensors file of this package")
    config = json.dumps({**model.backbone.get_config(), "package": "elita_tf"})
    header: dict[str, dict] = {"__metadata__": {"format": "keras", "config": config}}
    content, end = [], 0
    for variable in model.backbone.variables:
        array = np.ascontiguousarray(ops.convert_to_numpy(variable))
        begin, end = end, end + array.nbytes
        header[variable.path] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        content.append(array.tobytes())
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % _ALIGNMENT)
    with in_place_of(path) as temporary, temporary.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.writelines(content)


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"format": "keras"' in file.read(64)
