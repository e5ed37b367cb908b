"""The weights of a model as a safetensors file."""

import json
from pathlib import Path

from keras import ops

from elita_tf.models.causal_lm import ElitaCausalLM
from elita_tf.models.export import in_place_of, require_free, require_model
from elita_tf.tensor_files import metadata_of, write_arrays

_PACKAGE = "elita_tf"


def export_safetensors(model: ElitaCausalLM, path: Path | str) -> None:
    """Write the backbone's weights, on any backend; the output projection is among them.

    A tensor has the path of its variable in the backbone as its name, such as
    `token_embedding/embeddings` or `block_0_gla/query/kernel`. The metadata hold the arguments of
    the backbone under `config`, as JSON. Kernels are as Keras has them: `inputs @ kernel`, and by
    heads (inputs, heads, features). The weights of a quantized layer are int8, with its scales
    beside them.

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
    require_free(path, _is_ours, "a safetensors file of this package")
    config = json.dumps({**model.backbone.get_config(), "package": _PACKAGE})
    arrays = {x.path: ops.convert_to_numpy(x) for x in model.backbone.weights}
    with in_place_of(path) as temporary:
        write_arrays(temporary, arrays, {"format": "keras", "config": config})


def _is_ours(path: Path) -> bool:
    return path.is_file() and f'"package": "{_PACKAGE}"' in metadata_of(path).get("config", "")
