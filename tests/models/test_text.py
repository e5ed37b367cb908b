"""Strings in, strings out: `fit`, `generate`, presets, LoRA, int8."""

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
    ElitaGPT2Tokenizer,
    ElitaTokenizer,
    architectures,
)
from tests import helpers
from tests.helpers import jitted, randomized

pytestmark = pytest.mark.usefixtures("without_int64")
TEXTS = ["3 and 4 make 7.", "So they do: 12!", "5 and 8 make 13.", "0 and 1 make 1."]
KINDS = pytest.mark.parametrize("kind", ["lossless", "default"])


def make_model(tokenizers: dict, kind: str = "lossless", **kwargs: Any) -> ElitaCausalLM:
    keras.utils.set_random_seed(4)
    tokenizer = tokenizers[kind]
    sizes = {"hidden_dim": 16, "num_layers": 1, "context_length": 24}
    backbone = ElitaBackbone(tokenizer.vocabulary_size(), **{**architectures["elita"], **sizes})
    preprocessor = ElitaCausalLMPreprocessor(tokenizer, sequence_length=24, **kwargs)
    return ElitaCausalLM(backbone, preprocessor)


@pytest.mark.long
@KINDS
def test_learns_strings_and_says_them(tokenizers: dict, kind: str, tmp_path: Path) -> None:
    model = make_model(tokenizers, kind)
    model.compile(keras.optimizers.Adam(2e-2), jit_compile=helpers.QUICKEST, sampler="greedy")
    model.fit(TEXTS * 150, batch_size=4, verbose=0)
    assert model.evaluate(TEXTS, batch_size=4, verbose=0) < 0.3
    prompts = [text[:7] for text in TEXTS]
    assert model.generate(prompts, max_length=24) == TEXTS
    assert model.generate(prompts[2], max_length=24) == TEXTS[2]
    model.save_to_preset(tmp_path)
    for loaded in (
        ElitaCausalLM.from_preset(str(tmp_path)),
        keras_hub.models.CausalLM.from_preset(str(tmp_path)),
    ):
        loaded.compile(sampler="greedy", run_eagerly=not helpers.QUICKEST)
        assert loaded.generate(prompts[:1], max_length=24) == TEXTS[:1]
        assert loaded.preprocessor.get_config() == model.preprocessor.get_config()


def test_the_parts_of_a_preset_load_by_themselves(tokenizers: dict, tmp_path: Path) -> None:
    model = make_model(tokenizers, add_start_token=False)
    model.save_to_preset(tmp_path)
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path))
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path))
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(str(tmp_path))
    assert isinstance(backbone, ElitaBackbone) and isinstance(tokenizer, ElitaTokenizer)
    for ours, loaded in zip(model.backbone.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, loaded)
    assert tokenizer(TEXTS) == model.preprocessor.tokenizer(TEXTS)
    assert not preprocessor.add_start_token


@pytest.mark.parametrize(
    "name", ["config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"]
)
@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_broken_preset_is_refused(
    tokenizers: dict, tmp_path: Path, name: str, fault: str
) -> None:
    make_model(tokenizers).save_to_preset(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if fault == "truncated":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, OSError, RuntimeError)):
        ElitaCausalLM.from_preset(str(tmp_path))


def test_windows_of_the_preprocessor(tokenizers: dict) -> None:
    tokenizer = tokenizers["lossless"]
    ids = tokenizer.encode(TEXTS[0]).tolist()
    preprocessor = ElitaCausalLMPreprocessor(tokenizer, sequence_length=24)
    x, y, weights = preprocessor(TEXTS[:1])
    full = [1, *ids, 2, *[0] * 24]
    assert np.array(x["token_ids"])[0].tolist() == full[:24]
    assert np.array(y)[0].tolist() == full[1:25]
    assert np.array(weights)[0].tolist() == [i < len(ids) + 1 for i in range(24)]
    bare = ElitaCausalLMPreprocessor(
        tokenizer, sequence_length=24, add_start_token=False, add_end_token=False
    )
    prompt = bare.generate_preprocess(TEXTS[:1])
    assert np.array(prompt["token_ids"])[0].tolist() == (ids + [0] * 24)[:24]
    assert np.array(prompt["padding_mask"])[0].sum() == len(ids)


@KINDS
def test_texts_come_back_as_they_were(tokenizers: dict, kind: str) -> None:
    texts = ["3 and 4\nmake 7.", "So", "\nthey do"]
    if kind == "lossless":
        texts.append(" Grüße \u2581 日本 😀\n")
    for start in (True, False):
        preprocessor = ElitaCausalLMPreprocessor(
            tokenizers[kind], sequence_length=60, add_start_token=start
        )
        prompts = preprocessor.generate_preprocess(texts)
        assert preprocessor.generate_postprocess(prompts) == texts


def gpt2_tokenizer() -> ElitaGPT2Tokenizer:
    letters = sorted(set("".join(TEXTS).replace(" ", "Ġ")))
    vocabulary = {"<|endoftext|>": 0, **{letter: 1 + i for i, letter in enumerate(letters)}}
    return ElitaGPT2Tokenizer({**vocabulary, "an": len(vocabulary)}, ["a n"])


@pytest.mark.parametrize("kind", ["lossless", "default", "gpt2"])
def test_one_text_without_a_batch(tokenizers: dict, kind: str) -> None:
    tokenizer = gpt2_tokenizer() if kind == "gpt2" else tokenizers[kind]
    preprocessor = ElitaCausalLMPreprocessor(tokenizer, sequence_length=20)
    text = TEXTS[0]
    single, batch = preprocessor.generate_preprocess(text), preprocessor.generate_preprocess([text])
    for name, expected in batch.items():
        np.testing.assert_array_equal(np.array(single[name]), np.array(expected)[0])
    assert preprocessor.generate_postprocess(single) == text
    assert preprocessor.generate_postprocess(batch) == [text]
    for received, expected in zip(preprocessor(text), preprocessor([text]), strict=True):
        for leaf, row in zip(*map(keras.tree.flatten, (received, expected)), strict=True):
            np.testing.assert_array_equal(np.array(leaf), np.array(row)[0])


@KINDS
def test_what_is_not_a_text_is_neither_trained_on_nor_continued(
    tokenizers: dict, kind: str
) -> None:
    model = make_model(tokenizers, kind)
    model.compile(jit_compile=False, sampler="greedy")
    before = model.get_weights()
    for texts in (
        *(["3 and", None], ["3 and", float("nan")], [3, 4], [["3"], ["4"]], np.array([[5, 6]])),
        np.array(["3 and", None], object),
    ):
        for call in (
            *(model.fit, model.evaluate, model.predict, model.generate, model.preprocessor),
            *(model.train_on_batch, model.test_on_batch, model.predict_on_batch),
            lambda texts: model.fit(TEXTS, validation_data=(texts,)),
        ):
            with pytest.raises(ValueError, match="Expected a string"):
                call(texts)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert model.generate([b"3 and"], max_length=8) == model.generate(["3 and"], max_length=8)


@pytest.mark.long
@helpers.tensorflow_only
def test_texts_in_every_form_are_the_same(tokenizers: dict) -> None:
    import tensorflow as tf

    model = make_model(tokenizers)
    model.compile(run_eagerly=True)
    expected = model.evaluate(TEXTS, verbose=0)
    encoded = [text.encode() for text in TEXTS]
    for texts in (encoded, np.array(TEXTS), np.array(encoded, object), tf.constant(TEXTS)):
        assert model.evaluate(texts, verbose=0) == pytest.approx(expected, abs=1e-6)
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
    assert model.evaluate(dataset.batch(3), verbose=0) == pytest.approx(expected, abs=1e-6)
    assert model.generate(dataset.batch(3).take(0)) == []
    for call in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=r"a single text.*dataset\.batch"):
            call(dataset)
        with pytest.raises(ValueError, match="batch dimension"):
            call(TEXTS[0])
    with pytest.raises(ValueError, match="a single text"):
        model.train_on_batch(TEXTS[0])


@pytest.mark.long
def test_the_weight_of_a_text_is_that_of_its_tokens(tokenizers: dict) -> None:
    model = randomized(make_model(tokenizers), scale=0.4)
    model.compile(jit_compile=helpers.QUICKEST, run_eagerly=not helpers.QUICKEST)
    weights = np.array([1.0, 0.0, 2.0, 0.0], "float32")
    x, y, mask = model.preprocessor(TEXTS)
    losses = np.array(jitted(model.token_losses)(x["token_ids"], y, x["padding_mask"]))
    by_token = np.array(mask) * weights[:, None]
    expected = np.sum(losses * by_token) / np.sum(by_token)
    assert abs(expected - model.evaluate(TEXTS, verbose=0)) > 1e-3
    loss = model.evaluate(TEXTS, batch_size=3, sample_weight=weights, verbose=0)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert float(model.test_on_batch(TEXTS, None, weights)) == pytest.approx(expected, abs=1e-5)
    single = model.preprocessor(TEXTS[2], sample_weight=2.0)[2]
    np.testing.assert_array_equal(np.array(single), by_token[2])
    with pytest.raises(ValueError, match=r"`sample_weight` weighs texts.*\(4, 24\)"):
        model.preprocessor(TEXTS, sample_weight=by_token)
    with pytest.raises(ValueError, match="a text model takes no labels"):
        model.preprocessor(TEXTS, y)
    with pytest.raises(ValueError, match="a text model takes no labels"):
        model.fit(TEXTS, TEXTS, verbose=0)


def test_a_tokenizer_that_pads_is_refused(tokenizers: dict) -> None:
    padding = ElitaTokenizer(tokenizers["lossless"].proto, sequence_length=9)
    preprocessor = ElitaCausalLMPreprocessor(padding, sequence_length=20)
    with pytest.raises(ValueError, match="tokenizer without `sequence_length`.* 9"):
        preprocessor(TEXTS)


def test_prompts_that_cannot_be(tokenizers: dict) -> None:
    model = make_model(tokenizers, add_start_token=False)
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        model.generate(["3 and", ""])
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tokens.*max_length.*of 4"):
        model.generate(["3 and 4 make 7.", "3"], max_length=4)


def test_only_the_continuation(tokenizers: dict) -> None:
    model = randomized(make_model(tokenizers), scale=0.4)
    model.compile(sampler="greedy")
    whole = model.generate("3 and", max_length=20, stop_token_ids=None)
    rest = model.generate("3 and", max_length=20, stop_token_ids=None, strip_prompt=True)
    assert whole == "3 and" + rest and rest


@pytest.mark.long
def test_lora_trains_its_factors_only(tokenizers: dict) -> None:
    model = randomized(make_model(tokenizers), scale=0.2)
    ones = {"token_ids": np.ones((1, 5), "int32")}
    before = np.array(jitted(model)(ones))
    model.backbone.enable_lora(2)
    names = sorted(variable.name for variable in model.trainable_variables)
    assert names == ["lora_kernel_a", "lora_kernel_b"]
    model.compile(keras.optimizers.Adam(1e-1), jit_compile=helpers.QUICKEST)
    model.fit(TEXTS, batch_size=4, verbose=0)
    assert np.abs(np.array(jitted(model)(ones)) - before).max() > 1e-4


@pytest.mark.long
def test_int8_is_close_and_generates(tokenizers: dict) -> None:
    model = randomized(make_model(tokenizers), scale=0.3)
    ids = np.array(model.preprocessor.generate_preprocess(TEXTS)["token_ids"])
    logits = np.array(jitted(model)({"token_ids": ids}))
    losses = np.array(jitted(model.token_losses)(ids, ids))
    model.quantize("int8")
    quantized = np.array(jitted(model)({"token_ids": ids}))
    assert {"int8"} < {v.dtype for v in model.weights}
    assert 0 < np.linalg.norm(quantized - logits) < 0.05 * np.linalg.norm(logits)
    after = np.array(jitted(model.token_losses)(ids, ids))
    np.testing.assert_allclose(after, losses, atol=0.1)
    model.compile(sampler="greedy")
    assert model.generate("3 and", max_length=12, stop_token_ids=None).startswith("3 and")
