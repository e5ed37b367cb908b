"""The mixers on which the tests of chaining, masks, segments, streaming, precision and files run.

`MIXERS` has every form of every mixer, `MAIN` one row for each kind of state. A new mixer needs a
row in both: `tests/test_mixers.py` fails without it.
"""

from collections.abc import Callable

from elita_tf.layers import Attention2, CausalSelfAttention, GatedLinearAttention, SequenceMixer
from tests.helpers import CHUNK, HEADS, KEY_DIM, VALUE_DIM

WIDTH = 12
WINDOW = 5  # shorter than the sequences of the tests
# The longest half-life of a head but the last is short, so that a decay can be seen.
_HALF_LIVES = {"half_lives": (0.5, 4.0)}

MIXERS: dict[str, Callable[..., SequenceMixer]] = {
    "attention2": lambda **k: Attention2(HEADS, 9, VALUE_DIM, position_dim=5, **k),
    "attention2 with query": lambda **k: Attention2(HEADS, 9, VALUE_DIM, use_query=True, **k),
    "attention2, gated": lambda **k: Attention2(
        HEADS, value_dim=VALUE_DIM, use_query=True, decay="gated", **_HALF_LIVES, **k
    ),
    "attention2, learned decay and sines": lambda **k: Attention2(
        HEADS, 9, VALUE_DIM, decay="learned", **_HALF_LIVES, **k
    ),
    "gla": lambda **k: GatedLinearAttention(
        HEADS, KEY_DIM, VALUE_DIM, gate_rank=2, chunk_size=CHUNK, **k
    ),
    "gla of scalar gates": lambda **k: GatedLinearAttention(
        HEADS, KEY_DIM, VALUE_DIM, chunk_size=CHUNK, gate="scalar", half_lives=(1.0, 9.0), **k
    ),
    "gla of fixed decays": lambda **k: GatedLinearAttention(
        HEADS, KEY_DIM, VALUE_DIM, chunk_size=CHUNK, gate="fixed", half_lives=(1.0, 9.0), **k
    ),
    "gla without decay": lambda **k: GatedLinearAttention(
        HEADS, KEY_DIM, VALUE_DIM, chunk_size=CHUNK, gate=None, **k
    ),
    "softmax": lambda **k: CausalSelfAttention(HEADS, window_length=20, **k),
    "softmax in a window": lambda **k: CausalSelfAttention(HEADS, window_length=WINDOW, **k),
}
MAIN = {
    name: MIXERS[name]
    for name in ("attention2 with query", "attention2, gated", "gla", "softmax in a window")
}
