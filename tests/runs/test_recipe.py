import pytest

from elita_tf.runs.recipe import FOLDER, Recipe, load_recipe

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def test_the_named_recipes_load():
    assert NAMES == [
        "elita-gated-wikitext2-tuned",
        "elita-query-wikitext2-tuned",
        "elita-wikitext2",
        "gla-ff2-wikitext2-tuned",
        "gla-gpt2-wikitext2",
        "gla-wikitext2",
        "gla-wikitext2-tuned",
        "quickstart",
        "transformer-wikitext2",
        "transformer-wikitext2-tuned",
    ]
    assert all(isinstance(load_recipe(name), Recipe) for name in NAMES)


def test_the_published_setting():
    recipe = load_recipe("elita-wikitext2")
    assert (recipe.num_layers, recipe.hidden_dim, recipe.num_heads) == (3, 64, 8)
    assert (recipe.context_length, recipe.batch_size, recipe.vocabulary_size) == (256, 128, 2048)
    assert (recipe.learning_rate, recipe.inverse_sqrt_scale) == (1e-3, 1e-2)
    assert (recipe.beta_1, recipe.beta_2, recipe.tokenizer) == (0.9, 0.99, "sentencepiece-default")


def test_overrides_are_read_as_toml_and_strings_need_no_quotes(tiny_recipe):
    recipe = load_recipe(
        str(tiny_recipe),
        ["steps=450", "seed = 1", "learning_rate=1", "jit_compile=true", "architecture=gla"],
    )
    assert (recipe.steps, recipe.seed, recipe.learning_rate) == (450, 1, 1)
    assert recipe.jit_compile is True
    assert recipe.architecture == "gla"
    assert load_recipe(str(tiny_recipe), ['corpus="text:a b"']).corpus == "text:a b"


def test_tables_of_options(tiny_recipe):
    overrides = ["mixer_options.gla.gate_rank=3", "mixer_options.gla.gate=none", "mixers=['gla']"]
    recipe = load_recipe(str(tiny_recipe), overrides)
    assert recipe.mixers == ["gla"]
    assert recipe.mixer_options == {"gla": {"gate_rank": 3, "gate": "none"}}
    whole = load_recipe(str(tiny_recipe), ["mixer_options={gla = {gate_rank = 3}}"])
    assert whole.mixer_options == {"gla": {"gate_rank": 3}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixers=gla", 'mixers = "gla": expected a list of strings'),
        ("mixers=[1]", r"mixers = \[1\]: expected a list of strings"),
        ("mixer_options=3", "mixer_options = 3: expected a table"),
        ("steps.gla=3", "--set steps.gla: steps is no table"),
        ("optimizer=sgd", 'optimizer = "sgd": expected "adam" or "muon"'),
    ],
)
def test_a_wrong_table_stops_with_what_is_allowed(tiny_recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tiny_recipe), [override])


def test_the_resolved_recipe_reads_back(tiny_recipe, tmp_path):
    overrides = ["corpus=text:/a \\ é", "learning_rate=3e-05", "mixers=['gla', 'softmax']"]
    overrides += ["mixer_options.gla={gate = 'fixed', half_lives = [1, 8.5]}"]
    recipe = load_recipe(str(tiny_recipe), overrides)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "Unknown key stepz: expected corpus, tokenizer, .*jit_compile"),
        ("steps=2.5", "steps = 2.5: expected an integer, at least 1"),
        ("steps=0", "steps = 0: expected an integer, at least 1"),
        ("steps=true", "steps = true: expected an integer, at least 1"),
        ("seed=-1", "seed = -1: expected an integer, at least 0"),
        ("dropout=none", 'dropout = "none": expected a number, at least 0'),
        ("corpus=3", "corpus = 3: expected a string"),
        ("architecture=rnn", 'architecture = "rnn": expected "elita" or "elita_query" or'),
        (
            "jit_compile=maybe",
            'jit_compile = "maybe": expected true or false or "auto" or "blocks"',
        ),
        ("on_nonfinite=go", 'on_nonfinite = "go": expected "stop" or "skip"'),
        ("checkpoint_seconds=-1", "checkpoint_seconds = -1: expected a number, at least 0"),
        ("steps", "--set 'steps': expected key=value"),
    ],
)
def test_a_wrong_value_stops_with_what_is_allowed(tiny_recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tiny_recipe), [override])


def test_a_stream_cannot_skip_steps(tiny_recipe):
    with pytest.raises(ValueError, match='carry_state = true needs on_nonfinite = "stop"'):
        load_recipe(str(tiny_recipe), ["carry_state=true", "on_nonfinite=skip"])


def test_averages_need_a_momentum_below_1(tiny_recipe):
    assert load_recipe(str(tiny_recipe), ["ema_momentum=0.99"]).ema_momentum == 0.99
    for value in ("1", "1.5"):
        with pytest.raises(ValueError, match=f"ema_momentum = {value}: expected a number below 1"):
            load_recipe(str(tiny_recipe), [f"ema_momentum={value}"])
    with pytest.raises(ValueError, match="expected a number, at least 0"):
        load_recipe(str(tiny_recipe), ["ema_momentum=-0.5"])


@pytest.mark.parametrize("change", ["beta_1=1", "beta_2=1.5", "learning_rate=0"])
def test_what_could_not_train_is_refused(tiny_recipe, change):
    key, value = change.split("=")
    with pytest.raises(ValueError, match=f"{key} = {value}(.0)?: expected a number (below|above)"):
        load_recipe(str(tiny_recipe), [change])


def test_differences_name_what_changed(tiny_recipe):
    first, second = (load_recipe(str(tiny_recipe), [f"seed={seed}"]) for seed in (0, 1))
    assert first.differences(first) == []
    assert first.differences(second) == ["seed: 0 -> 1"]


def test_a_missing_key_and_broken_toml_and_a_missing_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('corpus = "pydoc"\n')
    with pytest.raises(ValueError, match="Missing key tokenizer, architecture, num_layers"):
        load_recipe(str(path))
    path.write_text("corpus = \n")
    with pytest.raises(ValueError, match=r"recipe\.toml is not valid TOML"):
        load_recipe(str(path))
    with pytest.raises(FileNotFoundError, match="'gla-wikitext'.* Did you mean gla-wikitext2?"):
        load_recipe("gla-wikitext")
    with pytest.raises(FileNotFoundError, match="'nothing'.*one of elita-.*quickstart"):
        load_recipe("nothing")
