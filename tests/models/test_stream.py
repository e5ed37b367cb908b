"""Streams and states that are kept: what a text gives at once, in pieces, and from a file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    architectures,
    decoding,
)
from tests import helpers
from tests.helpers import randomized

pytestmark = pytest.mark.usefixtures("without_int64")
VOCABULARY, CONTEXT = 23, 6
QUICK, SLOW = "elita_gated", [name for name in sorted(architectures) if name != "elita_gated"]
EVERY = pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW)]
)


def make_model(name: str = QUICK, tokenizer: Any = None, **kwargs: Any) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    size = VOCABULARY if tokenizer is None else tokenizer.vocabulary_size()
    sizes = {"hidden_dim": 16, "context_length": CONTEXT, "vocabulary_size": size}
    if name != "hybrid":
        sizes["num_layers"] = 1
    backbone = ElitaBackbone(**{**architectures[name], **sizes, **kwargs})
    preprocessor = None
    if tokenizer is not None:
        preprocessor = ElitaCausalLMPreprocessor(
            tokenizer, 16, add_start_token=False, add_end_token=False
        )
    model = ElitaCausalLM(backbone, preprocessor)
    model.compile(sampler="greedy", run_eagerly=not helpers.QUICKEST)
    return randomized(model, scale=0.4)


@pytest.fixture(scope="module")
def model() -> ElitaCausalLM:
    """One that its tests share, compiled once."""
    model = make_model()
    model.compile(sampler="greedy", jit_compile=helpers.QUICKEST)
    return model


class Varied(keras_hub.samplers.Sampler):
    """Tokens that depend on the text so far alone, and repeat less than the likeliest ones."""

    def get_next_token(self, probabilities: Any) -> Any:
        return keras.ops.argmax(keras.ops.mod(7 * keras.ops.log(probabilities), 1.0), axis=-1)


def ids(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).astype("int32")


def streamed(model: ElitaCausalLM, *arguments: Any, **kwargs: Any) -> list[int]:
    pieces = list(model.stream(*arguments, stop_token_ids=None, **kwargs))
    return np.concatenate(pieces).tolist() if pieces else []


def generated(model: ElitaCausalLM, *arguments: Any, **kwargs: Any) -> list[list[int]]:
    outputs = model.generate(*arguments, stop_token_ids=None, strip_prompt=True, **kwargs)
    token_ids, mask = np.atleast_2d(outputs["token_ids"]), np.atleast_2d(outputs["padding_mask"])
    return [row[real].tolist() for row, real in zip(token_ids, mask, strict=True)]


@EVERY
def test_a_stream_and_a_state_give_what_generate_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PIECE", 16)  # several pieces of a short prompt
    model, prompt = make_model(name), ids(37)
    model.compile(sampler=Varied(), jit_compile=helpers.QUICKEST)
    [expected] = generated(model, prompt, 57)
    assert streamed(model, prompt, 57) == expected and len(set(expected)) > 3
    state = model.read(prompt[30:], model.read(prompt[:30]))
    assert streamed(model, None, 20, state=state) == expected
    assert generated(model, [], 20, state=state) == [expected]
    # The texts of a branch are a prompt like any other, and the state is as it was.
    assert streamed(model, expected[:7], 20, state=state) == expected[7:]
    assert streamed(model, None, 20, state=state) == expected


@pytest.mark.parametrize(
    "sampler",
    ["random", *(pytest.param(each, marks=pytest.mark.long) for each in ("beam", "contrastive"))],
)
def test_every_sampler_goes_on_from_a_state(sampler: str) -> None:
    def generate(*arguments: Any, **kwargs: Any) -> list[list[int]]:
        seed = {"seed": 4} if sampler == "random" else {}
        config = {"class_name": sampler, "config": seed}
        model.compile(sampler=keras_hub.samplers.get(config), run_eagerly=not helpers.QUICKEST)
        return generated(model, *arguments, **kwargs)

    model, prompt = make_model(), ids(6)
    if sampler == "contrastive":  # it compares with the prompt of this call alone
        state = model.read(prompt[:1])
        assert generate(prompt[1:], 9, state=state) == generate(prompt, 10)
    else:
        assert generate(None, 4, state=model.read(prompt)) == generate(prompt, 10)


def test_prompts_of_any_lengths_are_read_and_go_on_by_rows(model: ElitaCausalLM) -> None:
    rows = [ids(9), ids(4, seed=5), ids(1, seed=6)]
    state = model.read(rows)
    expected = [streamed(model, row, len(row) + 8) for row in rows]
    assert generated(model, None, 8, state=state) == expected
    taken = {name: keras.ops.take(leaf, [2, 0], axis=0) for name, leaf in state.items()}
    assert generated(model, None, 8, state=taken) == [expected[2], expected[0]]
    further = [row[:k] for row, k in zip(expected, (3, 0, 5), strict=True)]
    rests = [row[k:] for row, k in zip(expected, (3, 0, 5), strict=True)]
    assert generated(model, further, 8, state=state) == rests


def test_a_state_of_one_row_serves_every_prompt(model: ElitaCausalLM) -> None:
    prompt = ids(9)
    state = model.read(prompt)
    ends = [[5], [], [7, 8]]
    expected = [streamed(model, [*prompt, *end], 9 + 6) for end in ends]
    assert generated(model, ends, 6, state=state) == expected
    with pytest.raises(ValueError, match="3 prompts and a state of 2 rows"):
        model.generate(ends, 6, None, state=model.read([prompt, prompt]))


@pytest.mark.parametrize("kind", ["lossless", "default"])
def test_the_pieces_of_a_text_are_the_text(kind: str, tokenizers: dict) -> None:
    model = make_model(tokenizer=tokenizers[kind])
    model.compile(sampler="greedy", jit_compile=helpers.QUICKEST)
    options: dict[str, Any] = {"max_length": 40, "stop_token_ids": None}
    whole = model.generate("3 and", **options)
    pieces = list(model.stream("3 and", **options))
    assert "3 and" + "".join(pieces) == whole and len(pieces) > 2
    state = model.read(" and", model.read("3")) if kind == "lossless" else model.read("3 and")
    count = 40 - len(tokenizers[kind]("3 and"))
    from_state = model.stream("", count, stop_token_ids=None, state=state)
    assert "".join(from_state) == "".join(pieces)
    assert model.generate("", count, None, strip_prompt=True, state=state).strip(" ") in whole


@helpers.tensorflow_only  # eager, as the ids come from a list
def test_a_text_ends_at_the_end_token(tokenizers: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(tokenizer=tokenizers["lossless"]), tokenizers["lossless"]
    given = [*tokenizer(" and 4 make"), tokenizer.end_token_id, *tokenizer(" more")]
    sampler = scripted(given, monkeypatch)
    assert "".join(model.stream("3", 16, sampler)) == " and 4 make"
    model.compile(sampler=scripted(given, monkeypatch), run_eagerly=not helpers.QUICKEST)
    assert model.generate("3", 16) == "3 and 4 make"


def scripted(token_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sampler that gives these ids in turn."""
    sampler = keras_hub.samplers.RandomSampler(seed=0)
    given = iter(token_ids * 4)
    next_token = lambda probabilities: keras.ops.convert_to_tensor([next(given)], "int32")  # noqa: E731
    monkeypatch.setattr(sampler, "get_next_token", next_token)
    return sampler


def texts_of(token_ids: list[list[int]], tokenizer: Any, context: str = "3") -> list[str]:
    pieces = [np.array(piece) for piece in token_ids]
    decode, end = tokenizer.detokenize, tokenizer.end_token_id
    return list(decoding.text_pieces(pieces, tokenizer(context), decode, end))


def test_a_character_of_several_bytes_comes_whole(tokenizers: dict) -> None:
    tokenizer = tokenizers["lossless"]
    tokens = tokenizer("\u65e5\U0001f600 a")
    assert len(tokens) > 7
    one_by_one = texts_of([[token] for token in tokens], tokenizer)
    assert one_by_one[:2] == ["\u65e5", "\U0001f600"] and "".join(one_by_one[2:]) == " a"
    for cut in range(1, len(tokens)):
        pieces = texts_of([tokens[:cut], tokens[cut:]], tokenizer)
        assert "".join(pieces) == "\u65e5\U0001f600 a" and not any("\ufffd" in x for x in pieces)


def test_bytes_that_are_no_character_come_at_last(tokenizers: dict) -> None:
    tokenizer = tokenizers["lossless"]
    half = tokenizer("\u65e5")[:-1]
    for pieces in ([half], [half * 9, half], [half, tokenizer("a")], [[x] for x in half * 9]):
        whole = tokenizer.detokenize([token for piece in pieces for token in piece])
        assert "".join(texts_of(pieces, tokenizer)) == whole


def test_the_work_for_a_piece_does_not_grow(tokenizers: dict) -> None:
    seen = []

    def decode(row: list[int]) -> str:
        seen.append(len(row))
        return tokenizers["lossless"].detokenize(row)

    pieces = [np.array(tokenizers["lossless"]("3 and 4 make 7"))] * 50
    text = "".join(decoding.text_pieces(pieces, [5], decode, 2))
    assert text == "3 and 4 make 7" * 50 and max(seen) <= len(pieces[0]) + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [[3], [4]]}, "one prompt"),
        ({"sampler": "beam"}, "BeamSampler"),
        ({"sampler": 0.5}, "sampler"),
        ({"max_length": 0}, "max_length"),
        ({"prompt": []}, "Prompt 0 is empty"),
        ({"state": 3}, "dict"),
        ({"state": {}}, "lacks"),
    ],
)
def test_a_stream_refuses_at_once(model: ElitaCausalLM, arguments: dict, message: str) -> None:
    defaults = {"prompt": [3], "max_length": 5, "stop_token_ids": None}
    with pytest.raises(ValueError, match=message):
        model.stream(**{**defaults, **arguments})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_a_file_gives_the_state_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    model = make_model("hybrid", dtype=dtype)
    state = model.read([ids(9), ids(4)])
    model.save_state(tmp_path / "chat.state", state)
    loaded = model.load_state(tmp_path / "chat.state")
    assert list(loaded) == list(state)
    for name, leaf in state.items():
        assert keras.backend.standardize_dtype(loaded[name].dtype) == leaf.dtype.name
        arrays = map(keras.ops.convert_to_numpy, (loaded[name], leaf))
        np.testing.assert_array_equal(*(x.view("uint8") for x in arrays))
    assert [path.name for path in tmp_path.iterdir()] == ["chat.state"]
    names = {keras.backend.standardize_dtype(leaf.dtype) for leaf in state.values()}
    assert ("bfloat16" in names) == (dtype != "float32")


def test_the_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "chat.state"
    model.save_state(path, model.read(ids(9)))
    make_model().load_state(path)  # the same weights, made again
    randomized(model, scale=0.3, seed=4)
    with pytest.raises(ValueError, match=r"weights .* there and .* here"):
        model.load_state(path)
    with pytest.raises(ValueError, match="num_layers 1 there and 2 here"):
        make_model(num_layers=2).load_state(path)
    with pytest.raises(ValueError, match=r"numerator' of shape \(1, 8, 2\), received \(1, 8, 4\)"):
        model.generate(None, 5, None, state=make_model(hidden_dim=32).read(ids(9)))


@pytest.mark.parametrize("change", ["cut", "empty", "text", "numpy", "shape", "offsets", "leaf"])
def test_a_broken_file_is_refused(change: str, model: ElitaCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "chat.state"
    state = model.read(ids(9))
    model.save_state(path, state)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    leaf = header["block_0_attention2_gated_numerator"]
    if change == "shape":
        leaf["shape"][0] = 10**9
    elif change == "offsets":
        leaf["data_offsets"] = [0, 10**12]
    elif change == "leaf":
        del header["block_0_attention2_gated_numerator"]
    encoded = json.dumps(header).encode()
    content = {
        "cut": content[:-3],
        "empty": b"",
        "text": b"a text that somebody else wrote" * 9,
    }.get(change, len(encoded).to_bytes(8, "little") + encoded + content[end:])
    path.write_bytes(content)
    if change == "numpy":
        np.savez(path.with_suffix(".npz"), **{k: np.array(leaf) for k, leaf in state.items()})
        path = path.with_suffix(".npz")
    with pytest.raises(ValueError, match="chat|lacks"):
        model.load_state(path)


def test_a_state_of_other_leaves_is_not_saved(model: ElitaCausalLM, tmp_path: Path) -> None:
    state = model.read(ids(9))
    with pytest.raises(ValueError, match="shape"):
        model.save_state(tmp_path / "x", {**state, "last_token": np.zeros((3,), "int32")})
    with pytest.raises(ValueError, match="other"):
        model.save_state(tmp_path / "x", {**state, "other": np.zeros((1,))})
    assert not list(tmp_path.iterdir())


RESUME = """
import sys
import numpy as np
from elita_tf.models import ElitaCausalLM

folder = sys.argv[1]
model = ElitaCausalLM.from_preset(folder)
state = model.load_state(folder + "/chat.state")
state.pop("last_token")
logits, _ = model.prefill(np.array([[3], [8]]), state=state)
np.save(folder + "/logits.npy", logits)
"""


@pytest.mark.long
def test_a_parked_conversation_goes_on_in_another_process(tmp_path: Path) -> None:
    model = make_model("hybrid")
    state = model.read([ids(9), ids(9, seed=4)])
    model.save_to_preset(tmp_path)
    model.save_state(tmp_path / "chat.state", state)
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True)
    own = {name: leaf for name, leaf in state.items() if name != "last_token"}
    expected, _ = model.prefill(np.array([[3], [8]]), state=own)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), np.array(expected))
