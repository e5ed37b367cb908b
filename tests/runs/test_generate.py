import keras_hub
import pytest

from elita_tf.models import export_saved_model
from elita_tf.runs import generation as script
from elita_tf.runs.assembly import load_run


def sample(capsys, *arguments):
    script.main([*arguments, "--max_length", "14"])
    return capsys.readouterr().out.removesuffix("\n")


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


def test_a_saved_model_streams_what_its_model_does(model, saved_model):
    stream, sampler = script.served(saved_model), keras_hub.samplers.GreedySampler()
    of_model = list(model.stream("3 plus", 24, sampler))
    of_saved_model = list(stream("3 plus", 24, sampler))
    assert "".join(of_saved_model) == "".join(of_model) and len(of_saved_model) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "Prompt 0 is empty"),
        (["--prompt", "3 plus 4 is 7, is it not?", "--max_length", "4"], "max_length"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature"),
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
