"""Checkpoints of every format version load for ever."""

import golden_values
import jax
import numpy as np
import pytest
import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.checkpoint import checking, restore


@pytest.mark.parametrize("version", golden_values.FOLDERS)
def test_every_format_loads_with_its_values(version):
    folder = golden_values.FOLDERS[version]
    sharding = NamedSharding(small_state.make_mesh(tensor=2), P())
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for name, value in golden_values.VALUES.items()
    }
    found = restore.restore_latest(folder, abstract)
    assert found.step == 40
    assert found.metadata["config"] == golden_values.CONFIG
    assert found.metadata["data"] == golden_values.DATA
    assert found.metadata["attempt"] == 3
    for name, value in golden_values.VALUES.items():
        assert np.asarray(found.arrays[name]).tobytes() == value.tobytes()
    assert checking.validate(folder / "40") == []
    manifest = checking.load(folder / "40")
    assert manifest.metrics == (golden_values.METRICS if version > 1 else {})
    assert checking.load(golden_values.FOLDER / "40").unix_secs > 0
