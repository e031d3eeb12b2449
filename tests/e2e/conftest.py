"""One compile cache and one undisturbed run for all tests of a session."""

import pathlib

import pytest
from e2e import command


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The setting that makes every run share its compiled programs and its data."""
    return {"data.cache_dir": tmp_path_factory.mktemp("cache")}


@pytest.fixture(scope="session")
def quiet(cache, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nobody disturbed. Copy it; do not run in it."""
    run_dir = tmp_path_factory.mktemp("quiet") / "run"
    done = command.train(cache | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    return run_dir
