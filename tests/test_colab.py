"""The notebook for Colab: as a user runs it, and what its first cells refuse.

Nothing is installed or fetched: the checkout is importable already, and for a runtime
that lacks it, pip and the list of packages are stood in for.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import subprocess
import time

import nbclient
import nbformat
import pytest

CHECKOUT = pathlib.Path(__file__).parents[1]
NOTEBOOK = CHECKOUT / "scripts" / "colab.ipynb"
SMALL = (
    "--config tiny --optimizer.schedule constant --model.width 32 --model.ffn_width 96 "
    "--model.repeats 2 --train.length 32 --train.batch_size 8 --eval.every 10 "
    "--eval.batches 4"
)


@pytest.fixture
def run_cell(tmp_path, monkeypatch):
    """Runs a cell, by its id, with values for its settings; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run(cell_id, names=None, **settings):
        [source] = [c.source for c in read_notebook().cells if c.id == cell_id]
        path = tmp_path / f"{cell_id}.py"
        path.write_text(with_settings(source, **settings))
        return runpy.run_path(str(path), init_globals=names)

    return run


class Runtime:
    """An IPython shell where jax is old, and replaced by pip if `pip_works`."""

    def __init__(self):
        self.pip_works = True
        self.installs = []
        self.restarts = []
        self.kernel = self  # both in one: only the restart is of interest

    def do_shutdown(self, restart):
        self.restarts.append(restart)

    def pip(self, command, **unused):
        if command[1] == "-c":  # the check of the backend, which finds what it wants
            return subprocess.CompletedProcess(command, 0, "cpu [here]", "")
        assert command[1:4] == ["-m", "pip", "install"]
        self.installs.append(command[5])
        return subprocess.CompletedProcess(command, 1, "", "No matching distribution")


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    here = importlib.metadata.version

    def version(name):
        is_old = not (runtime.installs and runtime.pip_works)
        return "0.7.2" if name == "jax" and is_old else here(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", runtime.pip)
    monkeypatch.setattr(time, "sleep", lambda secs: None)
    return runtime


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def with_settings(source, **settings):
    """`source` with other values in its lines `NAME = value`, each there once."""
    for name, value in settings.items():
        lines = re.findall(rf"^{name} = .*$", source, flags=re.MULTILINE)
        assert len(lines) == 1, f"{name} is set {len(lines)} times"
        source = source.replace(lines[0], f"{name} = {value!r}")
    return source


@pytest.mark.slow
def test_the_notebook_trains_plots_samples_and_resumes(tmp_path):
    notebook = read_notebook()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = with_settings(
        first.source,
        SOURCE=str(CHECKOUT),
        BACKEND="cpu",
        RUN_DIR=str(tmp_path / "run"),
        STEPS=20,
        OPTIONS=SMALL,
    )
    # One device, and nothing of this machine: not its cache, not its files.
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=kept | {"XDG_CACHE_HOME": str(tmp_path / "cache")})

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {row["step"]: row["train/loss"] for row in map(json.loads, lines)}
    assert len(lines) == 40
    assert list(losses) == list(range(1, 41))
    assert losses[40] < losses[20] < losses[1] - 1
    said = {cell.id: text_of(cell) for cell in notebook.cells}
    assert "goes on after step" not in said["train"]
    assert "step 20/20" in said["train"]
    assert "--- sample ---\nROMEO:" in said["sample"]
    assert "goes on after step 20" in said["resume"]
    assert "each of 40 steps stands once" in said["resume"]
    for cell_id in ("plot", "resume"):
        [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
        assert any("image/png" in out.get("data", {}) for out in cell.outputs), cell_id
    device = json.loads((tmp_path / "run" / "device.json").read_text())
    assert device["attention"]["xla"]["is_right"]
    assert device["experts"]["is_right"]
    assert device["step"]["loss_falls"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def text_of(cell):
    return "".join(out.get("text", "") for out in cell.get("outputs", []))


def test_another_backend_than_the_machine_has_is_refused_by_a_sentence(run_cell):
    names = run_cell("install", SOURCE=str(CHECKOUT), BACKEND="cpu")
    with pytest.raises(RuntimeError, match=r"needs jax to find 'tpu', but .* 'cpu"):
        names["check_backend"]("tpu")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (str(CHECKOUT), f"jaxinfra @ {CHECKOUT.as_uri()}"),
        (str(CHECKOUT / "scripts"), f"jaxinfra @ {CHECKOUT.as_uri()}"),
        ("https://git.test/j.git", "jaxinfra @ git+https://git.test/j.git"),
    ],
    ids=["checkout", "a folder of it", "git"],
)
def test_an_older_jax_is_replaced_and_the_kernel_restarts_once(
    run_cell, runtime, source, wanted
):
    names = {"get_ipython": lambda: runtime}
    for _ in range(2):  # before the restart, and after it
        run_cell("install", names, SOURCE=source, BACKEND="cpu")
    assert runtime.installs == [wanted]
    assert runtime.restarts == [True]


def test_the_extra_of_the_backend_is_installed_and_nothing_restarts_without_it(
    run_cell, runtime
):
    runtime.pip_works = False
    for backend in ("tpu", "cuda"):
        with pytest.raises(RuntimeError, match=r"could not install .*: No matching"):
            run_cell("install", SOURCE="jaxinfra-9.9-py3-none-any.whl", BACKEND=backend)
    extras = [wanted.split(" @ file:")[0] for wanted in runtime.installs]
    assert extras == ["jaxinfra[tpu]", "jaxinfra[cuda]"]
    assert runtime.restarts == []


def test_a_source_that_holds_nothing_is_refused_by_a_sentence(run_cell, tmp_path):
    with pytest.raises(RuntimeError, match="no wheel, no checkout and no folder"):
        run_cell("install", SOURCE=str(tmp_path), BACKEND="cpu")


def test_the_notebook_is_stored_without_outputs():
    for cell in read_notebook().cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
