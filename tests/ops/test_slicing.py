import pytest
from keras import ops

from elita_tf.ops.slicing import largest_slice, slice_size


@pytest.mark.parametrize("tokens", [0, 3, 10_000])
def test_a_slice_is_no_larger_than_the_tokens(tokens: int) -> None:
    """Also of a number that a graph learns only when it runs: it would compute padding."""
    expected = min(max(tokens, 1), 4096)
    assert largest_slice(512) == 4096
    assert slice_size(tokens, 512) == expected
    assert int(slice_size(ops.convert_to_tensor(tokens, "int32"), 512)) == expected
