"""Checkpoints of every format version load for ever."""

import pathlib

import golden_values
import jax
import numpy as np
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import integrity, restore


def test_format_1_loads_with_its_values():
    sharding = NamedSharding(small_state.make_mesh(tensor=2), P())
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for name, value in golden_values.VALUES.items()
    }
    found = restore.restore_latest(golden_values.FOLDER, abstract)
    assert found.step == 40
    assert found.metadata["config"] == golden_values.CONFIG
    assert found.metadata["data"] == golden_values.DATA
    assert found.metadata["attempt"] == 3
    for name, value in golden_values.VALUES.items():
        assert np.asarray(found.arrays[name]).tobytes() == value.tobytes()
    assert integrity.validate(pathlib.Path(golden_values.FOLDER, "40")) == []
