"""What a decoder can take over from GPT-2: embeddings and norms."""

from typing import Any

import keras
import keras_hub

from elita_tf.models.backbone import ElitaBackbone

# KerasHub's name of the smallest GPT-2.
_PRESET = "gpt2_base_en"


def load_gpt2_embeddings(backbone: ElitaBackbone, preset: str = _PRESET) -> None:
    """Copy GPT-2's token and position embeddings and layer norms into a backbone.

    Token ids are GPT-2's. Of the positions the first `context_length` are taken, and of the
    blocks, from the first on, as many as the backbone has; the last norm is GPT-2's last.

    Args:
        backbone: an `ElitaBackbone` with `learned_positions` and "layer_norm".
        preset: of a KerasHub GPT-2: a name, a local folder, or an `hf://` handle.

    Raises:
        ValueError: a backbone of another width, vocabulary or normalisation, without learned
            positions, or with more positions or blocks than GPT-2 has.
        OSError: a preset that cannot be read or downloaded.

    Source: Radford et al. 2019 (GPT-2).
    """
    if not isinstance(backbone, ElitaBackbone):
        raise ValueError(f"Expected an ElitaBackbone to fill; received {backbone!r}.")
    if not backbone.learned_positions or backbone.normalization != "layer_norm":
        raise ValueError(
            "GPT-2 has learned positions and layer norms. Received a backbone with "
            f"learned_positions={backbone.learned_positions} and "
            f"normalization={backbone.normalization!r}; pass True and 'layer_norm'."
        )
    try:
        gpt2 = keras_hub.models.GPT2Backbone.from_preset(preset)
    except OSError as error:
        raise OSError(
            f"The GPT-2 preset {preset!r} could not be read or downloaded ({error}). Pass a local "
            "preset folder, or start from random embeddings (in a recipe: init_embeddings)."
        ) from error
    for name, ours, theirs, fits in (
        ("hidden_dim", backbone.hidden_dim, gpt2.hidden_dim, "equal"),
        ("vocabulary_size", backbone.vocabulary_size, gpt2.vocabulary_size, "equal"),
        ("context_length", backbone.context_length, gpt2.max_sequence_length, "at most"),
        ("num_layers", backbone.num_layers, gpt2.num_layers, "at most"),
    ):
        if ours > theirs or (fits == "equal" and ours != theirs):
            raise ValueError(
                f"`{name}` of the backbone is {ours}, that of the GPT-2 preset {preset!r} is "
                f"{theirs}: expected {fits} to it."
            )
    weights = {weight.path: keras.ops.convert_to_numpy(weight) for weight in gpt2.weights}

    def norm(path: str) -> list[Any]:
        return [weights[f"{path}/gamma"], weights[f"{path}/beta"]]

    backbone.token_embedding.embeddings.assign(weights["token_embedding/embeddings"])
    positions = weights["position_embedding/embeddings"]
    backbone.position_embedding.embeddings.assign(positions[: backbone.context_length])
    for i, block in enumerate(backbone.blocks):
        layer = f"transformer_layer_{i}"
        block.mixer.norm.set_weights(norm(f"{layer}/self_attention_layer_norm"))
        block.feed_forward.norm.set_weights(norm(f"{layer}/feedforward_layer_norm"))
    backbone.final_norm.set_weights(norm("layer_norm"))
