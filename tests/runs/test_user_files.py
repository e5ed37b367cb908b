"""Files of users stay as they are: folders that no run wrote, names of ours in them, other runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elita_tf.callbacks import newest_checkpoint
from elita_tf.runs import run_folder, training
from elita_tf.runs.recipe import load_recipe

FOREIGN = {
    "checkpoints": {"checkpoints/epoch1.pt": "weights"},
    "preset": {"preset/config.json": "{}"},
    "sample": {"sample.txt": "a sample of mine"},
    "summary": {"summary.json": '{"loss": 1.0}'},
    "finished": {"summary.json": '{"finished": true}'},
    "list": {"summary.json": "[1, 2]"},
    "manifest": {"manifest.json": '{"name": "a web page", "files": ["index.html"]}', "a.html": ""},
    "hidden": {".env": "SECRET=1"},
}


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("option", [[], ["--restart"], ["--force"]])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_no_run_wrote_is_refused(tiny_recipe, tmp_path, capsys, files, option):
    write(tmp_path, files)
    arguments = ["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path), *option]
    with pytest.raises(SystemExit, match="2"):
        training.main(arguments)
    printed = " ".join(capsys.readouterr().err.split())
    assert "holds files that no run of elita_tf wrote" in printed
    assert content(tmp_path) == files


def test_a_file_in_place_of_the_folder(tiny_recipe, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        training.main(["--recipe", str(tiny_recipe), "--run_dir", str(path)])
    assert "is a file. Choose a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


class Tokenizer:
    """Writes nothing, so that the test needs no trained one."""

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


def test_only_what_a_run_wrote_is_removed(tiny_recipe, tmp_path):
    recipe, folder = load_recipe(str(tiny_recipe)), tmp_path / "run"
    folder.mkdir()
    run_folder.prepare(folder, recipe, Tokenizer())
    checkpoint = f"checkpoints/step-00000003-{'a' * 64}.npz"
    run_folder.record(folder, "summary.json", "evaluation-test.json", "preset/config.json")
    ours = ["summary.json", "evaluation-test.json", "preset/config.json", "best.weights.h5"]
    mine = {"notes.txt": "1", "checkpoints/epoch1.pt": "2", "evaluation-mine.json": "3"}
    write(folder, {**dict.fromkeys([*ours, checkpoint], ""), **mine})
    run_folder.prepare(folder, recipe, Tokenizer())
    assert not (folder / "preset").exists()
    names = {"manifest.json", "recipe.toml", "versions.json"}
    left = content(folder)
    assert set(left) == names | set(mine)
    assert left.items() > mine.items()


@pytest.mark.parametrize("name", ["sample.txt", "preset/config.json"])
def test_a_name_of_ours_that_a_user_took_is_refused(tiny_recipe, tmp_path, name):
    recipe = load_recipe(str(tiny_recipe))
    run_folder.prepare(tmp_path, recipe, Tokenizer())
    write(tmp_path, {name: "mine"})
    with pytest.raises(ValueError, match=f"{name} is not of a run .* Move it away"):
        run_folder.prepare(tmp_path, recipe, Tokenizer())
    assert (tmp_path / name).read_text() == "mine"


def test_a_manifest_from_a_stranger_reaches_nothing_outside(tiny_recipe, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file.txt").write_text("mine")
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    files = ["../victim.txt", str(victim), "link/file.txt", 5, None, "..", ""]
    manifest = {"written_by": "elita_tf", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run_folder.prepare(folder, load_recipe(str(tiny_recipe)), Tokenizer())
    assert victim.read_text() == "mine"
    assert (tmp_path / "elsewhere" / "file.txt").read_text() == "mine"


# === Two runs in one folder ===
posix = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 123 of a machine")
file.flush()
print("locked", flush=True)
time.sleep(600)
"""


@posix
def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_is_not_in_the_way(
    tiny_recipe, tmp_path, capsys
):
    run_folder.prepare(tmp_path, load_recipe(str(tiny_recipe)), Tokenizer())
    before = content(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / run_folder.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(SystemExit, match="2"):
            training.main(["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path)])
        printed = " ".join(capsys.readouterr().err.split())
        assert "is in use: process 123 of a machine trains there" in printed
        holder.send_signal(signal.SIGKILL)
    assert content(tmp_path) == {**before, "run.lock": "process 123 of a machine"}
    with run_folder.locked(tmp_path):
        assert f"process {os.getpid()} of" in (tmp_path / run_folder.LOCK).read_text()
    assert content(tmp_path) == before


@posix
def test_a_lock_is_of_one_holder_and_leaves_nothing(tmp_path):
    folder = tmp_path / "new"
    with run_folder.locked(folder):
        with pytest.raises(ValueError, match="is in use"), run_folder.locked(folder):
            pass
        assert (folder / run_folder.LOCK).exists()
    assert not folder.exists()


# === No room ===
FULL = """
import resource, sys
from pathlib import Path
import keras
from elita_tf.callbacks import KeepWeights
from elita_tf.callbacks.checkpoint_files import save_checkpoint

folder = Path(sys.argv[1])
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1024)])
keep = KeepWeights(folder)
keep.set_model(model)
model.compile("adam", "mse")
save_checkpoint(folder, 1, {"kernel": model.get_weights()[0]}, {})
keep.save_last()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
arrays = {"kernel": model.get_weights()[0]}
for write in (keep.save_last, lambda: save_checkpoint(folder, 2, arrays, {})):
    try:
        write()
    except OSError as error:
        print("refused:", error)
"""


@pytest.mark.long
@posix
def test_without_room_the_last_good_files_stay(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr  # HDF5 would end the process with a signal
    assert child.stdout.count("refused:") == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:13] for name in names] == ["last.weights.", "step-00000001"]
    import h5py

    with h5py.File(tmp_path / "last.weights.h5") as file:
        assert "layers" in file


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many KB, where this process may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        options = ["-t", "tmpfs", "-o", f"size={size}k", "none", str(folder)]
        try:
            subprocess.run(["mount", *options], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a disk")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def train_in_a_process(recipe, folder, limit=None):
    """`elita train` in a process of its own, which HDF5 may end; `limit` is that of `ulimit -f`."""
    command = f"{sys.executable} -m elita_command train --recipe {recipe} --run_dir {folder}"
    limited = f"ulimit -f {limit}; {command}" if limit else command
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, check=False, env=environment
    )


def check_refused(child, folder):
    """The command said what is wrong, and what it left is whole."""
    assert child.returncode == 1, child.stderr[-2000:]
    assert "elita train: error: [Errno" in child.stderr and "There is no room" in child.stderr
    assert "Traceback" not in child.stderr
    assert load_recipe(str(folder / "recipe.toml")).steps == 5
    unfinished = [p.name for p in folder.rglob(".*")]
    assert unfinished == []


@pytest.mark.long
@posix
def test_a_whole_run_on_a_full_disk(tiny_recipe, small_disk):
    folder = small_disk(120) / "run"
    check_refused(train_in_a_process(tiny_recipe, folder), folder)
    assert not list(folder.rglob("*.h5"))


@pytest.mark.long
@posix
def test_a_disk_that_fills_up_in_a_run_keeps_the_last_good_files(tiny_recipe, small_disk):
    import h5py

    folder = small_disk(320) / "run"
    for _ in range(2):  # and when it goes on
        check_refused(train_in_a_process(tiny_recipe, folder), folder)
        assert newest_checkpoint(folder / "checkpoints").step == 2
        with h5py.File(folder / "last.weights.h5") as file:
            assert "layers" in file


@pytest.mark.long
@posix
def test_a_whole_run_with_a_limit_on_the_size_of_files(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    check_refused(train_in_a_process(tiny_recipe, folder, limit=80), folder)
