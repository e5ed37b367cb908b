"""Any text gives a recipe or a ValueError, and a recipe reads back as it was."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elita_tf.runs.recipe import FOLDER, Recipe, load_recipe
from tests.helpers import budget

NAMES = tuple(Recipe.__dataclass_fields__)
WORDS = [
    *NAMES,
    "inf",
    "nan",
    "true",
    "1e400",
    "-0",
    "0x" + "f" * 40,
    "2000-01-01",
    "[" * 40,
    '"',
    "\\",
]
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.booleans().map(lambda value: str(value).lower()),
    st.text(max_size=8).map(lambda text: f'"{text}"'),
    st.sampled_from(
        ['"gla"', '"elita"', '"pydoc"', '"auto"', "[]", "{}", "[[1], {a = 1}]", *WORDS]
    ),
    st.text(string.printable, max_size=12),
)
LINES = st.tuples(st.one_of(st.sampled_from(NAMES), st.text(max_size=6)), VALUES)
WHOLE = (FOLDER / "quickstart.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.toml"


def read(path, content):
    """The recipe in a file of this content, or None after a ValueError; it reads back the same."""
    path.write_bytes(content)
    try:
        recipe = load_recipe(str(path))
    except ValueError as error:
        assert str(error)
        return None
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    return recipe


@budget(50, 4000)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes(path, content):
    assert read(path, content) is None  # No text of 60 characters has all the keys.


@budget(60, 4000)
@given(st.lists(LINES, max_size=4))
def test_a_recipe_with_lines_of_anything(path, lines):
    names = {name for name, _ in lines}
    kept = [line for line in WHOLE.splitlines() if line.split(" =")[0] not in names]
    added = [f"{name} = {value}" for name, value in lines]
    read(path, "\n".join([*kept, *added]).encode(errors="surrogatepass"))


@budget(60, 4000)
@given(st.lists(st.one_of(LINES.map(" = ".join), st.text(max_size=12)), max_size=3))
def test_any_overrides(path, overrides):
    try:
        recipe = load_recipe("quickstart", overrides)
    except ValueError as error:
        assert str(error)
        return
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@budget(40, 2000)
@given(
    st.text(),
    st.floats(0, 1e18, exclude_min=True),
    st.integers(1, 2**63 - 1),
    st.sampled_from([True, "auto"]),
)
def test_every_value_that_is_allowed_reads_back(path, corpus, rate, steps, jit_compile):
    path.write_text(WHOLE, encoding="utf-8")
    values = {**vars(load_recipe(str(path))), "corpus": corpus, "learning_rate": rate}
    recipe = Recipe(**{**values, "steps": steps, "jit_compile": jit_compile})
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = \xff", "not valid TOML"),
        (b"steps = " + b"[" * 10_000, "not valid TOML"),
        (b"steps = " + b"9" * 10_000, "not valid TOML"),
    ],
    ids=["no UTF-8", "nested", "digits"],
)
def test_what_the_parser_itself_does_not_name(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"recipe\.toml is {message}"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override",
    [
        "learning_rate=inf",
        "dropout=nan",
        "steps=0xffffffffffffffffff",
        "corpus=\udcff",
        "seed=1\na=2",
    ],
)
def test_values_that_no_run_can_have(override):
    with pytest.raises(ValueError, match=rf"{override.partition('=')[0]} = .*: expected"):
        load_recipe("quickstart", [override])
