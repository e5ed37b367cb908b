"""Named architectures: arguments of `ElitaBackbone`, complete but for `vocabulary_size`."""

from typing import Any

# The published ELiTA setting: 3 blocks of width 64, at most 300K parameters at 2,048 pieces.
_SMALL = {
    "num_layers": 3,
    "hidden_dim": 64,
    "normalization": "layer_norm",
    "dropout": 0.0,
    "context_length": 256,
    "tie_embeddings": True,
}
_ELITA = {**_SMALL, "num_heads": 8, "feed_forward": "feed_forward2"}
_SWIGLU = {**_SMALL, "feed_forward": "swiglu"}

architectures: dict[str, dict[str, Any]] = {
    # ELiTA as published, and its authors' later form with the query term k_3 . x.
    "elita": {**_ELITA, "mixers": "attention2"},
    "elita_query": {**_ELITA, "mixers": "attention2_query"},
    # ELiTA with a forget gate for every head in place of the sines.
    "elita_gated": {**_ELITA, "mixers": "attention2_gated"},
    # GLA as published: 4 heads, SwiGLU, no positional encoding.
    "gla": {**_SWIGLU, "num_heads": 4, "mixers": "gla"},
    # GLA with ELiTA's feed-forward, and other half-lives for every head.
    "gla_ff2": {
        **_ELITA,
        "num_heads": 4,
        "mixers": "gla",
        "mixer_options": {"gla": {"half_lives": (1.0, 64.0)}},
    },
    # The baseline: softmax attention with rotary positions and SwiGLU.
    "transformer": {**_SWIGLU, "num_heads": 8, "mixers": "softmax"},
    # Constant-size state in all blocks but the last, which looks up what was read.
    "hybrid": {**_ELITA, "mixers": ["attention2_gated", "attention2_gated", "softmax"]},
}
