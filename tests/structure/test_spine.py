"""The shape of the code: its size, its way of importing, what it must not contain.

Everything is counted from the files' syntax trees; nothing is imported to be counted.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SPINE = (
    "scripts/train.py",
    "jaxinfra/experiment.py",
    "jaxinfra/params.py",
    "jaxinfra/sharding.py",
    "jaxinfra/models/transformer.py",
    "jaxinfra/data/batches.py",
    "jaxinfra/train/step.py",
    "jaxinfra/train/loop.py",
    "jaxinfra/checkpoint/lifecycle.py",
)
MAX_SPINE_LINES = 1_500
MAX_CLOSURE_FILES = 50
MAX_CLOSURE_LINES = 10_000
MAX_FILE_LINES = 400
# Longer files, and why one subject there does not fall into two.
LONG = {
    "jaxinfra/config.py": "every setting of a run, with its meaning",
    "jaxinfra/checks.py": "every rule between settings, in the order it is checked",
    "jaxinfra/options.py": "command line, JSON and files to a Config and back",
}
VAGUE = ("utils", "util", "helpers", "helper", "misc", "common", "base")
# jax-free by design; `data` but for `device`, and what decides about a run's start.
WITHOUT_JAX = (
    "jaxinfra",
    "jaxinfra.config",
    "jaxinfra.checks",
    "jaxinfra.compiler_options",
    "jaxinfra.compositions",
    "jaxinfra.feature_checks",
    "jaxinfra.options",
    "jaxinfra.plan.targets",
    "jaxinfra.resuming",
    "jaxinfra.runfolder",
    "jaxinfra.command",
    "jaxinfra.launcher",
    "jaxinfra.data",
    "jaxinfra.stages",
    "jaxinfra.data.batches",
    "jaxinfra.data.fitting",
    "jaxinfra.data.folders",
    "jaxinfra.data.remote_folder",
    "jaxinfra.data.mixture",
    "jaxinfra.data.windows",
    "jaxinfra.data.records",
    "jaxinfra.data.read_ahead",
    "jaxinfra.data.tokenizer_json",
    "jaxinfra.data.chat",
    "jaxinfra.data.chat_template",
    "jaxinfra.data.char_tokenizer",
    "jaxinfra.data.cleaning",
    "jaxinfra.data.duplicates",
    "jaxinfra.data.block_cache",
    "jaxinfra.data.filesystems",
    "jaxinfra.data.patience",
    "jaxinfra.data.remote_file",
    "jaxinfra.data.storage",
    "jaxinfra.data.urls",
    "jaxinfra.data.readers",
    "jaxinfra.data.examples",
    "jaxinfra.data.idx",
    "jaxinfra.data.megatron",
    "jaxinfra.data.order",
    "jaxinfra.data.packing",
    "jaxinfra.data.leftovers",
    "jaxinfra.data.part_files",
    "jaxinfra.data.parts",
    "jaxinfra.data.recipes",
    "jaxinfra.data.relay",
    "jaxinfra.data.prepare",
    "jaxinfra.data.shards",
    "jaxinfra.data.spans",
    "jaxinfra.data.splits",
    "jaxinfra.data.writer",
    "jaxinfra.data.sources",
    "jaxinfra.data.tiktoken_ranks",
    "jaxinfra.data.tokenizer",
    "jaxinfra.data.tokenizer_files",
    "jaxinfra.data.tokenizer_training",
    "jaxinfra.launch.discovery",
    "jaxinfra.resilience.exitcodes",
    "jaxinfra.resilience.ownership",
    "jaxinfra.resilience.preemption",
    "jaxinfra.resilience.peers",
)
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore")
EXTRAS = (  # but for zstandard, which jax's compile cache loads where it is there
    "transformers", "tokenizers", "torch", "tensorflow", "gguf", "lm_eval", "pyarrow",
    "datasketch", "s3fs", "gcsfs", "tensorboard", "mlflow", "ray", "sklearn", "jinja2",
    "sentencepiece", "tiktoken", "aiohttp", "botocore", "fsspec",
)  # fmt: skip

SOURCES = sorted([*(ROOT / "jaxinfra").rglob("*.py"), *(ROOT / "configs").glob("*.py")])


def lines(path):
    return len(path.read_text().splitlines())


def relative(path):
    return path.relative_to(ROOT).as_posix()


def module_file(name):
    """The file of module `name` of ours, None if it is none."""
    path = ROOT / name.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def imported(path):
    """Files of ours that the file imports anywhere in it, functions included; a
    package's own __init__ comes with each of its modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if module_file(whole) else node.module)
    return {
        file
        for name in names
        if name.split(".")[0] in ("jaxinfra", "configs") and (file := module_file(name))
    }


def packages_of(path):
    """The __init__ files that Python runs before the module."""
    folders = [f for f in path.parents if ROOT in f.parents]
    inits = {folder / "__init__.py" for folder in folders}
    return {init for init in inits if init.is_file()} - {path}


def closure(start):
    """Every file that running `start` may load."""
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path) | packages_of(path)
    return found


def loaded_by(start):
    """The closure, with what the command loads by name: the default config."""
    return closure(start) | closure(ROOT / "configs/tiny.py")


def has_code(path):
    """Whether there is more than a docstring: a package's is a chapter to read before
    its files, not one more file to read."""
    return len(ast.parse(path.read_text()).body) > 1


def test_the_spine_tells_the_story_in_under_1500_lines():
    counts = {name: lines(ROOT / name) for name in SPINE}
    assert sum(counts.values()) < MAX_SPINE_LINES, (sum(counts.values()), counts)


def test_training_loads_few_files():
    files = loaded_by(ROOT / "scripts/train.py")
    listed = "\n".join(f"{lines(f):5} {relative(f)}" for f in sorted(files))
    num_files = sum(map(has_code, files))
    assert num_files < MAX_CLOSURE_FILES, f"{num_files} files with code:\n{listed}"
    total = sum(map(lines, files))
    assert total < MAX_CLOSURE_LINES, f"{total} lines:\n{listed}"


def test_the_closure_is_what_the_spine_is_part_of():
    files = {relative(f) for f in loaded_by(ROOT / "scripts/train.py")}
    assert set(SPINE) <= files


def test_no_import_goes_round():
    """Python's own edges: what a module imports. An __init__ that imports its modules
    lazily, or not at all, makes none."""
    graph = {path: imported(path) for path in SOURCES}
    done, path_now = set(), []

    def visit(path):
        if path in path_now:
            circle = [*path_now[path_now.index(path) :], path]
            pytest.fail(" -> ".join(map(relative, circle)))
        if path in done:
            return
        path_now.append(path)
        for other in sorted(graph.get(path, ())):
            visit(other)
        path_now.pop()
        done.add(path)

    for path in SOURCES:
        visit(path)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_is_short_and_named_for_a_subject(path):
    if relative(path) not in LONG:
        assert lines(path) <= MAX_FILE_LINES
    assert path.stem not in VAGUE
    assert not set(path.relative_to(ROOT).parent.parts) & set(VAGUE)


def test_a_reason_stands_only_for_a_long_file():
    assert [n for n in LONG if lines(ROOT / n) <= MAX_FILE_LINES] == []


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=relative
)
def test_nothing_runs_what_it_read(path):
    """No pickle, eval, exec or yaml.load, imported or called."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "yaml.load", "pickle.load")
            assert "serialize_executable" not in called
            allows = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert all(ast.unparse(k.value) == "False" for k in allows)


def public_definitions(path):
    """Functions and classes a reader may use, with methods of public classes."""
    body = ast.parse(path.read_text()).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node


def is_described(node):
    """By its docstring; a protocol of one call by that call's."""
    call = [m for m in node.body if getattr(m, "name", "") == "__call__"]
    return bool(ast.get_docstring(node) or (call and ast.get_docstring(call[0])))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_what_is_public_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the module has no docstring"
    names = [
        node.name
        for node in public_definitions(path)
        if not is_described(node) and node.name != "get_config"
    ]
    assert names == [], "these have no docstring"


def in_new_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_bad_option_is_refused_without_jax():
    code = f"""
import importlib, sys
for name in {WITHOUT_JAX!r}:
    importlib.import_module(name)
    heavy = set({HEAVY!r}) & set(sys.modules)
    if heavy:
        print(name, *heavy)
        break
"""
    assert in_new_process(code) == []


def test_every_jax_free_module_is_named_here():
    """A new file of `data` or `resilience` is free of jax, or known not to be."""
    with_jax = {"jaxinfra.data.device", "jaxinfra.data.digests"}
    names = {
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for folder in ("data", "resilience")
        for path in (ROOT / "jaxinfra" / folder).glob("*.py")
    }
    assert names - set(WITHOUT_JAX) - with_jax - {"jaxinfra.resilience"} == set()


def test_importing_the_whole_of_it_loads_no_extra():
    names = [
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if path.parts[-2] != "configs"
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(*sorted(set({EXTRAS!r}) & set(sys.modules)))
"""
    assert in_new_process(code) == []


def tracked_texts():
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        path = ROOT / name
        if path.is_file() and path != pathlib.Path(__file__):
            try:
                yield name, path.read_text()
            except UnicodeDecodeError:
                continue


def test_tracked_files_hold_no_machine_path_and_no_todo():
    corpus = "jaxinfra/data/corpus/"
    path_of_here = re.compile(r"(?<![\w.])/(root|work|home/\w+|Users/\w+)/[\w.]")
    undone = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, text in tracked_texts()
        if not name.startswith(corpus)
        for number, line in enumerate(text.splitlines(), 1)
        if path_of_here.search(line) or undone.search(line)
    ]
    assert found == []
