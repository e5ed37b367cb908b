"""The house rules: who imports whom, how long things may be, what is public."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "colab", "elita_tf", "tests", "training")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_ARGUMENTS = 10
# The backbone is flat, as KerasHub's are: arguments, layers, model and config in one constructor.
FLAT = ("elita_tf/models/backbone.py", "__init__")

# What each part of the package may import of the package itself, and of others' packages.
PARTS = {
    "__init__": ({"deferred", "layers", "ops"}, set()),
    "deferred": (set(), {"keras"}),
    "ops": ({"ops"}, {"keras"}),
    "layers": ({"layers", "ops"}, {"keras"}),
    "models": (
        {
            *("data", "files", "layers", "models", "ops", "optimizers", "packaged_presets"),
            *("schedules", "tensor_files"),
        },
        {"keras", "keras_hub"},
    ),
    "packaged_presets": (set(), set()),
    "experimental": ({"experimental", "ops"}, {"jax", "keras"}),
    "files": (set(), set()),
    "tensor_files": (set(), {"ml_dtypes", "numpy"}),
    "schedules": (set(), {"keras"}),
    "optimizers": (set(), {"keras", "tensorflow"}),
    "callbacks": ({"callbacks", "files"}, {"keras", "matplotlib", "numpy"}),
    "data": (
        {"data", "files", "packaged_presets"},
        {
            *("huggingface_hub", "keras", "keras_hub", "numpy", "pyarrow"),
            *("sentencepiece", "tensorflow", "tokenizers"),
        },
    ),
    "runs": (
        {"callbacks", "data", "files", "models", "ops", "optimizers", "runs", "schedules"},
        {"keras", "keras_hub", "numpy", "tensorflow"},
    ),
}
EXCEPTIONS = {
    "layers/decay.py": {"numpy"},
    "ops/loops.py": {"tensorflow"},
    "models/decoding.py": {"jax", "numpy", "tensorflow"},
    "models/export.py": {"tensorflow", "tf2onnx"},
    "models/generation.py": {"numpy"},
    "models/saving.py": {"h5py", "numpy"},
    "models/kept_state.py": {"numpy"},
    "models/preprocessor.py": {"tensorflow"},
    "models/prompts.py": {"numpy"},
    "models/search.py": {"numpy"},
    "models/rematerialization.py": {"jax", "tensorflow"},
    "models/shared_compilation.py": {"tensorflow"},
    "models/training_data.py": {"tensorflow"},
    "runs/devices.py": {"jax"},
    "runs/generation.py": {"tensorflow_text"},
    "runs/publish.py": {"h5py"},
    "runs/results.py": {"matplotlib"},
}

PUBLIC = {
    "elita_tf": {
        "callbacks",
        "data",
        "experimental",
        "layers",
        "models",
        "ops",
        "optimizers",
        "runs",
        "schedules",
    },
    "elita_tf.callbacks": {
        "Checkpoint",
        "Checkpoints",
        "Health",
        "KeepWeights",
        "LossPlot",
        "MetricsFile",
        "Resumable",
        "StopOnSignal",
        "Stopped",
        "TrainingLog",
        "ValidateAverages",
        "newest_checkpoint",
    },
    "elita_tf.ops": {
        "Attention2State",
        "attention2",
        "attention2_empty_state",
        "attention2_recurrent",
        "attention2_step",
        "feed_forward2",
        "gated_linear_attention",
        "gated_linear_attention_recurrent",
        "gated_linear_attention_step",
        "linear_cross_entropy",
        "token_cross_entropy",
    },
    "elita_tf.experimental": {
        "attention2_sequence_parallel",
        "gated_linear_attention_sequence_parallel",
    },
    "elita_tf.layers": {
        "Attention2",
        "CausalSelfAttention",
        "FeedForward2",
        "GatedFeedForward",
        "GatedLinearAttention",
        "SequenceMixer",
        "Streaming",
    },
    "elita_tf.models": {
        "ElitaBackbone",
        "ElitaCausalLM",
        "ElitaCausalLMPreprocessor",
        "ElitaGPT2Tokenizer",
        "ElitaTokenizer",
        "architectures",
        "export_litert",
        "export_onnx",
        "export_safetensors",
        "export_saved_model",
        "load_gpt2_embeddings",
        "register_feed_forward",
        "register_mixer",
    },
    "elita_tf.runs": {
        "Recipe",
        "TrainingSetup",
        "assemble",
        "evaluate",
        "load_recipe",
        "load_run",
        "recipe_names",
        "train",
    },
    "elita_tf.data": {
        "SPLITS",
        "Corpus",
        "ElitaGPT2Tokenizer",
        "ElitaTokenizer",
        "Split",
        "Tokenizer",
        "document_ids",
        "encode_split",
        "evaluation_windows",
        "load_corpus",
        "load_tokenizer",
        "make_tokenizer",
        "num_training_windows",
        "pack_windows",
        "stream_windows",
        "train_sentencepiece",
        "training_batch",
        "training_window_indices",
        "training_windows",
        "unigram_entropy",
    },
}

FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
LIBRARY = [name for name in FILES if name.startswith("elita_tf/")]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """The absolute names in a file's import statements, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    """Everything a caller may pass; not `self`, `cls`."""
    every = function.args
    named = [*every.posonlyargs, *every.args, *every.kwonlyargs]
    starred = [argument for argument in (every.vararg, every.kwarg) if argument]
    return [argument for argument in named + starred if argument.arg not in ("self", "cls")]


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Public functions, and the constructors and public methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, FUNCTIONS) and (
            not node.name.startswith("_") or node.name == "__init__"
        ):
            yield node


def import_faults(name: str) -> Iterator[str]:
    inner = name.removeprefix("elita_tf/")
    own, others = PARTS[inner.split("/")[0].removesuffix(".py")]
    others = others | EXCEPTIONS.get(inner, set())
    for module in imported_modules(TREES[name]):
        package, *rest = module.split(".")
        if package == "elita_tf":
            allowed = not rest or rest[0] in own
        else:
            # What is called `src` is private.
            allowed = package in others | sys.stdlib_module_names and rest[:1] != ["src"]
        if not allowed:
            yield f"{name} imports {module}"


def size_faults(name: str) -> Iterator[str]:
    lines = len(FILES[name].splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{name} has {lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, FUNCTIONS) and (name, node.name) != FLAT:
            lines = code_lines(node)
            if lines > MAX_FUNCTION_LINES:
                yield f"{name}: {node.name} has {lines} lines"


def annotation_faults(name: str) -> Iterator[str]:
    for function in public_functions(TREES[name].body):
        bare = [argument.arg for argument in arguments(function) if argument.annotation is None]
        if bare or function.returns is None:
            yield f"{name}: {function.name} leaves {bare or 'what it returns'} without annotation"


def constructor_faults(name: str) -> Iterator[str]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef) and node.name != "ElitaBackbone":
            for function in public_functions(node.body):
                named = [a for a in arguments(function) if a is not function.args.kwarg]
                if function.name == "__init__" and len(named) > MAX_CONSTRUCTOR_ARGUMENTS:
                    yield f"{name}: {node.name} takes {len(named)} arguments"


def test_imports_run_one_way() -> None:
    assert [fault for name in LIBRARY for fault in import_faults(name)] == []


def test_sizes() -> None:
    assert [fault for name in FILES for fault in size_faults(name)] == []


def test_public_code_is_annotated() -> None:
    assert [fault for name in LIBRARY for fault in annotation_faults(name)] == []


def test_constructors_are_small() -> None:
    assert [fault for name in LIBRARY for fault in constructor_faults(name)] == []


def test_public_surface() -> None:
    exported = {name: set(import_module(name).__all__) for name in PUBLIC}
    assert exported == PUBLIC
    for name, public in PUBLIC.items():
        module = import_module(name)
        assert public <= set(dir(module))
        assert all(getattr(module, each) is not None for each in public)
