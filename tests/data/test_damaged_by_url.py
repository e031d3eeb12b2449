"""Damaged data sets behind a URL: rows or a DataError, as from a disk."""

import pytest
import servers
from data import fuzzing

pytest.importorskip("aiohttp")


@pytest.mark.parametrize(
    ("count", "seed"), [(60, 1), pytest.param(1_000, 2, marks=pytest.mark.slow)]
)
def test_damage_by_url_never_crashes_hangs_or_fills_the_memory(count, seed):
    with servers.Server(files={}).running() as web:
        outcomes = fuzzing.run(count, seed, web)
    assert outcomes["DataError"] > count // 2
    assert sum(outcomes.values()) == count
