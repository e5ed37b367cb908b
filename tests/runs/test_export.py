import pytest

from elita_tf.packaged_presets import PRESETS
from elita_tf.runs import exports as script
from elita_tf.runs import generation
from elita_tf.runs.assembly import load_run


@pytest.mark.long
def test_a_saved_model_of_a_run_makes_the_text_of_the_run(run_dir, tmp_path, capsys):
    folder = tmp_path / "served"
    script.main(["--preset", str(run_dir / "preset"), "--output", str(folder)])
    assert "bytes" in capsys.readouterr().out
    generation.main(["--saved_model", str(folder), "--prompt", "3 plus", "--max_length", "14"])
    assert capsys.readouterr().out.startswith("3 plus")
    script.main(["--run_dir", str(run_dir), "--format", "litert", "--output", str(folder / "a")])
    assert (folder / "a").read_bytes()[4:8] == b"TFL3"
    assert load_run(run_dir).preprocessor.add_start_token is False
    card = (run_dir / "preset" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: keras-hub\n") and f"# {run_dir.name}\n" in card
    assert "preset/README.md" in (run_dir / "manifest.json").read_text(encoding="utf-8")


def test_the_weights_of_a_preset_as_safetensors(tmp_path, capsys):
    path = tmp_path / "deep" / "weights"
    arguments = ["--preset", "elita_wikitext2", "--format", "safetensors", "--output", str(path)]
    script.main(arguments)
    assert f"Written: {path.stat().st_size:,} bytes" in capsys.readouterr().out
    assert 4 * PRESETS["elita_wikitext2"]["metadata"]["params"] < path.stat().st_size
    assert b"token_embedding/embeddings" in path.read_bytes()[:10_000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run_dir", "/nowhere"], "nowhere"),
        (["--preset", "/nowhere"], "--output"),
        (["--run_dir", "/nowhere", "--format", "pickle"], "pickle"),
    ],
)
def test_mistakes_stop(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err
