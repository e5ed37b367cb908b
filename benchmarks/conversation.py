"""What a reader waits for: `decode.py --stream`, `--state` and `--generate`."""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import keras_hub
import numpy as np

from elita_tf.models import ElitaCausalLM

PRESET = "elita_wikitext2"
# As `elita generate` takes by default.
TOP_P = {"p": 0.9, "temperature": 0.8, "seed": 0}
PROMPT, POSITIONS, LONG = "The game was", (100, 100_000), 100_000
CONTINUATIONS, TOKENS = 10, 480
BATCHES = (1, 64)


def stream(report: harness.Report) -> None:
    """Tokens a second and the first token, at the beginning and deep in a text."""
    model = ElitaCausalLM.from_preset(PRESET)
    require_parity(model)
    for name in ("greedy", "top_p"):
        sampler = keras_hub.samplers.get({"class_name": name, "config": options(name)})
        list(model.stream(PROMPT, 40, sampler, stop_token_ids=None))  # compiles
        first = [timed(model.stream(PROMPT, 40, sampler, None))[0] for _ in range(7)]
        for position in POSITIONS if not report.is_short else POSITIONS[:1]:
            state = model.read(random_ids(model, position))
            runs = [timed(model.stream(None, TOKENS, sampler, None, state=state)) for _ in range(7)]
            report.write(
                sampler=name,
                position=position,
                tokens_per_second=TOKENS / statistics.median(total for _, total in runs),
                first_token_milliseconds=1e3 * statistics.median(first),
            )


def state(report: harness.Report) -> None:
    """A long prompt read once, ten texts that go on from it, and its file in another process."""
    model = ElitaCausalLM.from_preset(PRESET)
    require_parity(model)
    length = 10_000 if report.is_short else LONG
    prompt = random_ids(model, length)
    sampler = keras_hub.samplers.TopPSampler(**TOP_P)
    list(model.stream(None, 20, sampler, None, model.read(random_ids(model, 100))))  # compiles
    began = time.perf_counter()
    kept = model.read(prompt)
    seconds = time.perf_counter() - began
    first, texts = [], []
    for _ in range(CONTINUATIONS):
        began = time.perf_counter()
        pieces = model.stream(None, 20, sampler, None, state=kept)
        texts.append(next(pieces))
        first.append(time.perf_counter() - began)
        texts[-1] += "".join(pieces)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.state"
        model.save_state(path, kept)
        bit_equal = harness.in_child(digest_of_file, path) == digest(kept)
        size = path.stat().st_size
    if not bit_equal:
        raise harness.ParityError("the state of another process differs, no figure is given")
    report.write(
        prompt_tokens=length,
        read_seconds=seconds,
        different_texts=len(set(texts)),
        start_milliseconds=[round(1e3 * each, 2) for each in first],
        file_bytes=size,
        bit_equal_in_another_process=bit_equal,
    )


def generate(report: harness.Report) -> None:
    """Whole texts by `generate`, alone and many at once."""
    model = ElitaCausalLM.from_preset(PRESET)
    require_parity(model)
    new = TOKENS - len(model.preprocessor.tokenizer(PROMPT))

    def texts(batch: int) -> float:
        began = time.perf_counter()
        model.generate([PROMPT] * batch, TOKENS, stop_token_ids=None)
        return time.perf_counter() - began

    for name in ("greedy", "top_p"):
        model.compile(sampler=keras_hub.samplers.get({"class_name": name, "config": options(name)}))
        for batch in BATCHES:
            first, *runs = [texts(batch) for _ in range(3 if report.is_short else 8)]
            seconds = statistics.median(runs)
            report.write(
                sampler=name,
                batch=batch,
                tokens_per_second=batch * new / seconds,
                milliseconds_per_step=1e3 * seconds / new,
                first_call_seconds=first,
                compilation_seconds=first - seconds,
            )


def options(sampler: str) -> dict[str, Any]:
    """What a sampler of this name is made with."""
    return TOP_P if sampler == "top_p" else {}


def random_ids(model: ElitaCausalLM, count: int) -> dict[str, np.ndarray]:
    """A prompt of ids, as a model with a tokenizer takes them."""
    rng = np.random.default_rng(0)
    return {"token_ids": rng.integers(model.vocabulary_size, size=(1, count), dtype="int32")}


def timed(pieces: Iterator[str]) -> tuple[float, float]:
    """Seconds until the first piece and until the last one."""
    began = time.perf_counter()
    next(pieces)
    first = time.perf_counter() - began
    for _ in pieces:
        pass
    return first, time.perf_counter() - began


def require_parity(model: ElitaCausalLM) -> None:
    """The state after a prompt in pieces says what a call on the whole text says."""
    prompt = random_ids(model, 41)["token_ids"]
    kept = model.read({"token_ids": prompt[:, 30:]}, model.read({"token_ids": prompt[:, :30]}))
    last = np.array(kept.pop("last_token"))
    logits, _ = model.step(last, kept)
    whole = model({"token_ids": prompt})[:, -1]
    harness.require_parity(PRESET, harness.relative_error([logits], [whole]))


def digest(kept: dict[str, Any]) -> str:
    """SHA-256 of all leaves and their names."""
    found = hashlib.sha256()
    for name, leaf in kept.items():
        found.update(name.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def digest_of_file(path: Path) -> str:
    """`digest` of a file of `save_state`."""
    return digest(ElitaCausalLM.from_preset(PRESET).load_state(path))
