"""Recipes: TOML files whose keys are the fields of `Recipe`."""

import difflib
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from elita_tf.data import tokenizers
from elita_tf.data.documents import DOCUMENTS
from elita_tf.models import architectures
from elita_tf.runs.command_line import command_parser, explained

FOLDER = Path(__file__).parent / "recipes"
# The recipe of a run, in its folder.
RECIPE = "recipe.toml"
ON_NONFINITE = ("stop", "skip")
SCHEDULES = ("constant", "capped_inverse_sqrt", "cosine")
OPTIMIZERS = ("adam", "muon")
_LARGEST = 2**63 - 1  # TOML promises no larger integer.
_NOUNS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list of strings",
    dict: "a table",
}


class AtLeast(NamedTuple):
    """The smallest value of a number."""

    minimum: float


class OneOf(NamedTuple):
    """The values of a string."""

    choices: tuple[str, ...]


Positive = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]
Amount = Annotated[float, AtLeast(0)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run; a field without a default must be given.

    In the tables of options, "none" stands for Python's None, which TOML lacks.
    """

    # === Text ===
    # pydoc, wikitext-2, wikitext-103 or text:PATH: see elita_tf.data.load_corpus.
    corpus: str
    # SentencePiece that keeps every byte, SentencePiece as it comes, or GPT-2's tokenizer.
    tokenizer: Annotated[str, OneOf(tokenizers.KINDS)]
    # Pieces of a SentencePiece tokenizer, which is trained on the text.
    vocabulary_size: Positive = 2048
    # For gpt2: holds vocab.json and merges.txt; "" downloads them.
    tokenizer_folder: str = ""
    # Documents do not see one another: see elita_tf.data.document_ids. "" reads on through all.
    documents: Annotated[str, OneOf(("", *DOCUMENTS))] = ""

    # === Model ===
    # The mixers and the feed-forward of the blocks, by a name of elita_tf.models.architectures.
    architecture: Annotated[str, OneOf(tuple(architectures))]
    # Blocks.
    num_layers: Positive
    # Width of the embedding and of every block.
    hidden_dim: Positive
    # Heads of every mixer.
    num_heads: Positive
    # Tokens of a training window.
    context_length: Positive
    # Share of a branch's outputs that training drops.
    dropout: Amount = 0.0
    # Adds a learned vector for every position of the window to the embeddings.
    learned_positions: bool = False
    # Mixers of the blocks in turn, in place of the architecture's: see ElitaBackbone.
    mixers: list[str] = field(default_factory=list)
    # Arguments of the mixers, a table for each by its name.
    mixer_options: dict[str, Any] = field(default_factory=dict)
    # A feed-forward in place of the architecture's.
    feed_forward: str = ""
    # Arguments of the feed-forward.
    feed_forward_options: dict[str, Any] = field(default_factory=dict)
    # Token embeddings to start from: "gpt2", or a KerasHub GPT-2 preset, a folder or hf:// handle.
    init_embeddings: str = ""

    # === Run ===
    # Windows of a step.
    batch_size: Positive
    # Optimizer steps of the whole run.
    steps: Positive
    # Steps from one validation to the next.
    validation_interval: Positive
    # Batches of a validation, from the beginning of the split.
    validation_batches: Positive
    # Of the initial weights, the order of the windows and dropout.
    seed: NotNegative = 0
    # Windows of a row follow one another in the text, and each starts from the state of the last.
    carry_state: bool = False
    # Less memory for more time, in deep models and long windows.
    rematerialize: bool = False
    # How much XLA compiles: see ElitaCausalLM.compile.
    jit_compile: bool | Annotated[str, OneOf(("auto", "blocks"))] = "auto"
    # What to do at a step whose loss or gradient is not finite.
    on_nonfinite: Annotated[str, OneOf(ON_NONFINITE)] = "stop"
    # A killed run repeats at most so much; 0 saves every step.
    checkpoint_seconds: Amount = 60.0

    # === Optimizer ===
    # The learning rate by step: see learning_rate, inverse_sqrt_scale and warmup_steps.
    schedule: Annotated[str, OneOf(SCHEDULES)]
    # The highest rate of the schedule.
    learning_rate: Amount
    # For capped_inverse_sqrt: the rate is min(learning_rate, inverse_sqrt_scale / sqrt(step)).
    inverse_sqrt_scale: Amount = 0.01
    # For cosine: steps in which the rate rises from 0 to the highest.
    warmup_steps: NotNegative = 0
    # For cosine: the rate at the end.
    final_learning_rate: Amount = 0.0
    # Muon is for matrices, beside Adam for all else.
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adam"
    # Of Adam: how much of the mean of the gradients a step keeps.
    beta_1: Amount = 0.9
    # Of Adam: how much of the mean of their squares a step keeps.
    beta_2: Amount = 0.999
    # Of matrices alone, decoupled from the gradient.
    weight_decay: Amount = 0.0
    # The largest norm of the whole gradient; 0 does not clip.
    clip_norm: Amount = 0.0
    # Below 1; validates and keeps moving averages of the weights; 0 does not.
    ema_momentum: Amount = 0.0

    def to_toml(self) -> str:
        """The recipe as a TOML file that `load_recipe` reads."""
        return "".join(f"{key} = {_to_toml(value)}\n" for key, value in asdict(self).items())

    def differences(self, other: "Recipe") -> list[str]:
        """What changes from this recipe to the other: `key: before -> after`."""
        before, after = asdict(self), asdict(other)
        return [f"{k}: {before[k]!r} -> {after[k]!r}" for k in before if before[k] != after[k]]


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe and checks it.

    Args:
        name: of a recipe of the package (see `elita_tf/runs/recipes`), or the path of a file.
        overrides: `key=value`, the value written as in TOML; quotes of strings may be left out. A
            key of a table is `table.key`.

    Raises:
        FileNotFoundError: when there is no such recipe; the message lists those there are.
        ValueError: for broken TOML, an unknown or missing key or a wrong value; the message says
            what is allowed.
    """
    path = _find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    # Besides TOML's own error: no UTF-8, numbers of thousands of digits, deeply nested brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    for key, value in map(_parse_override, overrides):
        _assign(values, key.split("."), value)
    return checked_recipe(values)


def recipe_names() -> list[str]:
    """The names of the recipes of the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def _find(name: str) -> Path:
    for path in (FOLDER / f"{name}.toml", Path(name).expanduser()):
        if path.is_file():
            return path
    if Path(name).name == RECIPE:
        raise FileNotFoundError(
            f"{Path(name).parent} holds no run: it has no {RECIPE}. Name a folder that `elita "
            "train` wrote."
        )
    known = recipe_names()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(
        f"No recipe {name!r}: expected a file, or one of {', '.join(known)}.{hint}"
    )


def _to_toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_to_toml(key)} = {_to_toml(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_to_toml, value))}]"
    # JSON's strings are TOML's but for this character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets values[path[0]][path[1]]..., making the tables that are missing."""
    for i, key in enumerate(path[:-1], start=1):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {'.'.join(path)}: {'.'.join(path[:i])} is no table.")
    values[path[-1]] = value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise ValueError(f"--set {text!r}: expected key=value.")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key, value
    return key, parsed["value"] if len(parsed) == 1 else value


def checked_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe of these values.

    Raises:
        ValueError: as `load_recipe`.
    """
    annotations = typing.get_type_hints(Recipe, include_extras=True)
    unknown = sorted(set(values) - set(annotations))
    if unknown:
        raise ValueError(f"Unknown key {', '.join(unknown)}: expected {', '.join(annotations)}.")
    required = [
        each.name for each in fields(Recipe) if each.default is each.default_factory is MISSING
    ]
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"Missing key {', '.join(missing)}: every recipe needs it.")
    for key, value in values.items():
        if not _accepts(annotations[key], value):
            expected = describe(annotations[key])
            raise ValueError(f"{key} = {json.dumps(value, default=str)}: expected {expected}.")
    recipe = Recipe(**values)
    for key in ("beta_1", "beta_2", "ema_momentum"):
        if getattr(recipe, key) >= 1:
            raise ValueError(f"{key} = {getattr(recipe, key)}: expected a number below 1.")
    if not recipe.learning_rate:
        raise ValueError("learning_rate = 0: expected a number above 0, as nothing would train.")
    if recipe.carry_state and recipe.on_nonfinite == "skip":
        raise ValueError(
            'carry_state = true needs on_nonfinite = "stop": a stream cannot go on from the state '
            "that a step left behind whose loss is not finite."
        )
    return recipe


def _accepts(annotation: Any, value: Any) -> bool:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_accepts(member, value) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(_is_of(str, each) for each in value)
    if typing.get_origin(annotation) is dict:
        return isinstance(value, dict) and _is_plain(value)
    if typing.get_origin(annotation) is not Annotated:
        return _is_of(annotation, value)
    kind, constraint = typing.get_args(annotation)
    if not _accepts(kind, value):
        return False
    if isinstance(constraint, OneOf):
        return value in constraint.choices
    return value >= constraint.minimum


def _is_plain(value: Any) -> bool:
    """Whether a value is made of tables, lists, strings, finite numbers and booleans."""
    if isinstance(value, dict):
        return all(_is_of(str, key) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return any(_is_of(kind, value) for kind in (str, bool, int, float))


def _is_of(kind: type, value: Any) -> bool:
    if type(value) is not kind and not (kind is float and type(value) is int):
        return False
    if kind is str:
        # Half a character, as the command line gives for bytes that are no UTF-8.
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return kind is bool or abs(value) <= _LARGEST


def describe(annotation: Any) -> str:
    """What values an annotation of `Recipe` allows, in words."""
    if typing.get_origin(annotation) is Annotated:
        kind, constraint = typing.get_args(annotation)
        if isinstance(constraint, OneOf):
            return " or ".join(f'"{choice}"' for choice in constraint.choices)
        return f"{_NOUNS[kind]}, at least {constraint.minimum}"
    kind = typing.get_origin(annotation) or annotation
    if kind in _NOUNS:
        return _NOUNS[kind]
    return " or ".join(map(describe, typing.get_args(annotation)))


def main(arguments: list[str] | None = None) -> None:
    """The command `elita recipes`."""
    parser = command_parser(
        "recipes", "Lists the recipes of the package, or prints one.", "", "quickstart"
    )
    parser.add_argument("name", nargs="?", help="the recipe to print")
    options = parser.parse_args(arguments)
    with explained(parser):
        if options.name:
            print(_find(options.name).read_text(encoding="utf-8"), end="")
            return
        for name in recipe_names():
            print(f"{name:28} {_first_sentence(_find(name).read_text(encoding='utf-8'))}")


def _first_sentence(text: str) -> str:
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0]
