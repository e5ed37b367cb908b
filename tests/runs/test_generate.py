import keras_hub
import pytest
import tensorflow as tf

from elita_tf.data import load_tokenizer
from elita_tf.models import export_saved_model
from elita_tf.runs import generation as script
from elita_tf.runs.assembly import load_run


def sample(capsys, *arguments):
    script.main([*arguments, "--max_length", "14"])
    return capsys.readouterr().out.rsplit("\n", 2)[0]


@pytest.fixture(scope="module")
def model(run_dir):
    return load_run(run_dir)


@pytest.fixture(scope="module")
def saved_model(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    export_saved_model(model, folder)
    return folder


@pytest.mark.long
def test_a_run_its_preset_and_its_saved_model_say_the_same(run_dir, saved_model, capsys):
    arguments = ["--prompt", "3 plus", "--seed", "5"]
    of_run = sample(capsys, "--run_dir", str(run_dir), *arguments)
    of_preset = sample(capsys, "--preset", str(run_dir / "preset"), *arguments)
    of_saved_model = sample(capsys, "--saved_model", str(saved_model), *arguments)
    assert of_run == of_preset == of_saved_model
    assert of_run.startswith("3 plus") and len(of_run) > 8
    other = sample(capsys, "--run_dir", str(run_dir), "--prompt", "3 plus", "--seed", "6")
    assert other != of_run


def test_the_stream_is_what_generate_makes(model):
    sampler = keras_hub.samplers.GreedySampler()
    pieces = list(script.stream(script.live(model), "3 plus", 14, sampler))
    model.compile(sampler="greedy", run_eagerly=True)
    assert "".join(pieces) == model.generate("3 plus", max_length=14, stop_token_ids=None)
    assert pieces[0] == "3 plus"


def test_a_character_of_several_bytes_comes_whole(model, run_dir, monkeypatch):
    tokens = load_tokenizer(run_dir / "tokenizer").encode("\u65e5").tolist()
    assert len(tokens) > 1
    sampler, given = keras_hub.samplers.GreedySampler(), tf.Variable(tokens)

    def next_token(probabilities):
        first = given[:1] + 0
        given.assign(tf.roll(given, -1, 0))
        return first

    monkeypatch.setattr(sampler, "get_next_token", next_token)
    length = len(load_tokenizer(run_dir / "tokenizer").encode("3"))
    pieces = list(script.stream(script.live(model), "3", length + len(tokens), sampler))
    assert pieces == ["3", "\u65e5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "Prompt 0 is empty"),
        (["--prompt", "3 plus 4 is 7, is it not?", "--max_length", "4"], "max_length"),
        (["--temperature", "0"], "--temperature"),
        (["--run_dir", "/nowhere"], "nowhere"),
        (["--preset", "/nowhere"], "nowhere"),
        (["--saved_model", "/nowhere"], "nowhere"),
    ],
)
def test_mistakes_stop(run_dir, capsys, arguments, message):
    source = [] if arguments[-1] == "/nowhere" else ["--run_dir", str(run_dir)]
    with pytest.raises(SystemExit, match="2"):
        script.main([*source, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "max_length"), [("", "9"), ("3 plus 4 is 7, is it not?", "4")])
def test_a_saved_model_refuses_prompts_too(saved_model, capsys, prompt, max_length):
    arguments = ["--saved_model", str(saved_model), "--prompt", prompt, "--max_length", max_length]
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert "Every prompt needs a token at least, and max_length at most" in capsys.readouterr().err
