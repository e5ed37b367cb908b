import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.data import training_batch
from elita_tf.layers import GatedLinearAttention
from elita_tf.runs.assembly import (
    assemble,
    build_model,
    build_optimizer,
    build_schedule,
    describe_batch,
    validation_windows,
)
from elita_tf.runs.evaluation import losses_by_position
from elita_tf.runs.recipe import load_recipe
from tests.helpers import randomized


def rates(recipe, steps):
    schedule = build_schedule(recipe)
    return [float(schedule(step)) for step in steps]


def test_warm_up_then_cosine():
    recipe = load_recipe("gla-gpt2-wikitext2", ["steps=300", "warmup_steps=100"])
    middle = (3e-4 + 3e-5) / 2
    expected = [0.0, 1.5e-4, 3e-4, middle, 3e-5, 3e-5]
    assert rates(recipe, [0, 50, 100, 200, 300, 400]) == pytest.approx(expected, rel=1e-5)


def test_cosine_without_warm_up_starts_at_the_peak(tiny_recipe):
    recipe = load_recipe(str(tiny_recipe), ["schedule=cosine", "steps=10", "learning_rate=0.5"])
    assert rates(recipe, [0, 5, 10]) == pytest.approx([0.5, 0.25, 0.0], abs=1e-6)


def test_the_published_schedule_and_a_constant(tiny_recipe):
    assert rates(load_recipe("elita-wikitext2"), [0, 99, 399]) == pytest.approx([1e-3, 1e-3, 5e-4])
    assert build_schedule(load_recipe(str(tiny_recipe), ["schedule=constant"])) == 1e-2


def test_the_optimizer_is_adamw_only_with_weight_decay():
    adamw = build_optimizer(load_recipe("gla-gpt2-wikitext2"))
    assert isinstance(adamw, keras.optimizers.AdamW)
    assert (adamw.weight_decay, adamw.global_clipnorm) == (0.01, 1.0)
    adam = build_optimizer(load_recipe("elita-wikitext2"))
    assert not isinstance(adam, keras.optimizers.AdamW)
    assert not adam.skip_nonfinite
    assert build_optimizer(load_recipe("quickstart", ["on_nonfinite=skip"])).skip_nonfinite
    assert (adam.beta_1, adam.beta_2, adam.global_clipnorm) == (0.9, 0.99, None)


@pytest.mark.parametrize(
    "name", ["elita-wikitext2", "gla-wikitext2", "transformer-wikitext2", "quickstart"]
)
def test_small_recipes_have_at_most_300k_parameters(name):
    recipe = load_recipe(name)
    assert 200_000 < build_model(recipe, recipe.vocabulary_size).count_params() <= 300_000


def test_the_recipe_replaces_the_arguments_of_its_architecture(tiny_recipe):
    overrides = ["dropout=0.25", "num_layers=2", "num_heads=4"]
    model = build_model(load_recipe(str(tiny_recipe), overrides), 50)
    config = model.backbone.get_config()
    assert (config["dropout"], config["num_layers"], config["num_heads"]) == (0.25, 2, 4)
    assert (config["hidden_dim"], config["context_length"]) == (8, 16)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_assemble_compiles_as_the_recipe_says(tiny_recipe, jit_compile):
    recipe = load_recipe(str(tiny_recipe), [f"jit_compile={str(jit_compile).lower()}"])
    parts = assemble(recipe, None)
    assert parts.model.jit_compile is jit_compile
    assert isinstance(parts.model.optimizer, keras.optimizers.Adam)
    inputs, labels = next(iter(parts.training))
    np.testing.assert_array_equal(inputs["token_ids"][:, 1:], labels[:, :-1])
    held_out = b"".join(parts.corpus["valid"].byte_lines()).decode()
    np.testing.assert_array_equal(parts.valid_ids, parts.tokenizer.encode(held_out))


@pytest.mark.parametrize(("length", "batches"), [(1000, 2), (129, 2), (128, 1), (65, 1), (20, 1)])
def test_validation_takes_full_batches_of_64_labels_at_most_two(tiny_recipe, length, batches):
    windows = list(validation_windows(load_recipe(str(tiny_recipe)), np.arange(length)))
    assert len(windows) == batches
    total = sum(float(np.sum(weight)) for _, _, weight in windows)
    assert total == min(64 * batches, length - 1)


def test_a_carried_state_trains_on_streams(tiny_recipe):
    recipe = load_recipe(str(tiny_recipe), ["carry_state=true"])
    parts = assemble(recipe, None)
    first, second = (np.array(x["token_ids"]) for x, _ in parts.training.take(2))
    stream = np.concatenate([first[0], second[0]])
    np.testing.assert_array_equal(stream, parts.train_ids[: 2 * recipe.context_length])
    assert parts.model.carried_batch_size == recipe.batch_size
    losses = parts.model.fit(parts.training, steps_per_epoch=2, epochs=2, verbose=0).history["loss"]
    assert losses[1] < losses[0]


def test_a_batch_of_a_stream_in_words(tiny_recipe):
    recipe = load_recipe(str(tiny_recipe), ["carry_state=true"])
    assert describe_batch(recipe, np.arange(99), 3) == "rows 48 ids after their starts"


@pytest.mark.parametrize("carry_state", [True, False])
def test_training_begins_at_a_step(tiny_recipe, carry_state):
    recipe = load_recipe(str(tiny_recipe), [f"carry_state={str(carry_state).lower()}"])
    parts = assemble(recipe, None, 2)
    inputs, _ = next(iter(parts.training))
    if carry_state:
        expected = parts.train_ids[32:48]
        np.testing.assert_array_equal(inputs["token_ids"][0], expected)
    else:
        sizes = {"context_length": 16, "batch_size": 4, "seed": 0}
        expected = training_batch(parts.train_ids, 2, **sizes)
        np.testing.assert_array_equal(inputs["token_ids"], expected[:, :-1])


def test_embeddings_of_a_gpt2_preset(tiny_recipe, tmp_path):
    gpt2 = keras_hub.models.GPT2Backbone(
        vocabulary_size=300,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=9,
        max_sequence_length=16,
    )
    gpt2.save_to_preset(str(tmp_path))
    overrides = ["learned_positions=true", f"init_embeddings={tmp_path}"]
    parts = assemble(load_recipe(str(tiny_recipe), overrides), None)
    expected = keras.ops.convert_to_numpy(gpt2.token_embedding.embeddings)
    received = keras.ops.convert_to_numpy(parts.model.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(received, expected)


def test_a_recipe_replaces_what_the_architecture_says(tiny_recipe):
    overrides = ["architecture=elita_gated", "mixers=['gla']", "feed_forward=swiglu"]
    overrides += ["mixer_options.gla.gate=none", "feed_forward_options.inner_dim=24"]
    backbone = build_model(load_recipe(str(tiny_recipe), overrides), 40).backbone
    block = backbone.blocks[0]
    assert isinstance(block.mixer.layer, GatedLinearAttention) and block.mixer.layer.gate is None
    assert block.feed_forward.layer.inner_dim == 24
    with pytest.raises(ValueError, match="GatedLinearAttention: expected some of .*received rank"):
        build_model(load_recipe(str(tiny_recipe), [*overrides, "mixer_options.gla.rank=2"]), 40)


@pytest.mark.parametrize(
    ("change", "half_lives"),
    [
        ("mixer_options.gla.gate_rank=3", (1.0, 64.0)),
        ("mixer_options.gla.half_lives=[2, 8]", (2, 8)),
        ("mixer_options.gla.half_lives=none", None),
        ('mixers=["gla"]', None),
    ],
)
def test_options_are_added_to_those_of_the_architecture(tiny_recipe, change, half_lives):
    recipe = load_recipe(str(tiny_recipe), ["architecture=gla_ff2", change])
    layer = build_model(recipe, 300).backbone.blocks[0].mixer.layer
    assert layer.half_lives == half_lives
    assert layer.gate_rank == (3 if "gate_rank" in change else 16)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_weight_decay_is_for_matrices(tiny_recipe, optimizer):
    overrides = ["weight_decay=0.5", f"optimizer={optimizer}", "learning_rate=0.1"]
    recipe = load_recipe(str(tiny_recipe), [*overrides, "schedule=constant"])
    model, optimizer = build_model(recipe, 40), build_optimizer(recipe)
    randomized(model)
    before = {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables}
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        share = 0.95 if variable.name in ("kernel", "embeddings") else 1.0
        after = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(after, share * before[variable.path], rtol=1e-6)


def test_the_gpt2_row():
    recipe = load_recipe("gla-gpt2-wikitext2")
    assert (recipe.hidden_dim, recipe.num_layers, recipe.num_heads) == (768, 12, 4)
    assert recipe.learned_positions and recipe.init_embeddings == "gpt2"
    small = {"num_layers": 1, "hidden_dim": 16}
    overrides = [f"{key}={value}" for key, value in small.items()]
    model = build_model(load_recipe("gla-gpt2-wikitext2", overrides), 40)
    assert model.backbone.mixers == ["gla"] and model.backbone.context_length == 64


@pytest.mark.long
@pytest.mark.parametrize("carry_state", [True, False])
def test_documents_are_packed_for_training_and_validation(tiny_recipe, carry_state):
    overrides = ["documents=line", f"carry_state={str(carry_state).lower()}"]
    recipe = load_recipe(str(tiny_recipe), [*overrides, "validation_batches=1"])
    parts = assemble(recipe, None)
    (line_end,) = parts.tokenizer.encode("\n")
    for windows in (parts.training.take(1), parts.validation.take(1)):
        inputs, _, weights = next(iter(windows))
        ids, segments = np.array(inputs["token_ids"]), np.array(inputs["segment_ids"])
        # Every line is a document, so a segment begins after a line's end and nowhere else.
        ends = ids == line_end
        np.testing.assert_array_equal(np.diff(segments) > 0, ends[:, :-1])
        np.testing.assert_array_equal(weights, ~ends)
    history = parts.model.fit(
        parts.training, validation_data=parts.validation, steps_per_epoch=1, verbose=0
    ).history
    sizes = (recipe.context_length, recipe.batch_size)
    ids, documents = (x[: np.prod(sizes) + 1] for x in (parts.valid_ids, parts.valid_documents))
    sums, counts = losses_by_position(parts.model, ids, *sizes, documents=documents)
    assert counts.sum() == np.prod(sizes) - documents[-1]
    assert sums.sum() / counts.sum() == pytest.approx(history["val_loss"][0], rel=1e-5)


@pytest.mark.long
def test_a_stream_of_documents_is_one_long_window(tiny_recipe):
    parts = assemble(load_recipe(str(tiny_recipe), ["documents=line"]), None)
    randomized(parts.model.backbone)  # Fresh blocks are the identity and see no context.
    ids, documents = parts.valid_ids[:66], parts.valid_documents[:66]
    (whole, count), (carried, carried_count) = (
        map(np.sum, losses_by_position(parts.model, ids, *arguments, documents))
        for arguments in ((65, 1, False), (13, 1, True))
    )
    assert count == carried_count == 65 - documents[-1]
    assert carried == pytest.approx(whole, rel=1e-5)
    unpacked = losses_by_position(parts.model, ids, 65, 1)[0][np.diff(documents) == 0].sum()
    assert unpacked != pytest.approx(whole, rel=1e-3)
