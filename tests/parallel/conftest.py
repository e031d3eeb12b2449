"""What the mesh tests share: one data set, one compile cache, one-device runs."""

import importlib.util
import pathlib
import types
from collections.abc import Callable

import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra.data import shards

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def meshes() -> types.ModuleType:
    """The script whose table has every mesh of 8 devices."""
    spec = importlib.util.spec_from_file_location("meshes", ROOT / "scripts/meshes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> shards.Dataset:
    return tiny_runs.write_documents(tmp_path_factory.mktemp("documents") / "set")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Prepared text and compiled programs of the runs in other processes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reference(documents) -> Callable[..., dict[str, np.ndarray]]:
    """The metrics of a run on one device with one microbatch, each made once."""
    made = {}

    def metrics(**kind) -> dict[str, np.ndarray]:
        name = tuple(sorted(kind.items()))
        if name not in made:
            made[name] = tiny_runs.run(tiny_runs.tiny(**kind), documents)
        return made[name]

    return metrics


@pytest.fixture(scope="session")
def first_params(documents):
    """The first parameters of the small tiny config."""
    return tiny_runs.first_params(tiny_runs.tiny(), documents)
