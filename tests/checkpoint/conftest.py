"""A state on 8 simulated devices and a checkpointer in a folder of its own."""

import pytest
import small_state

from jaxinfra.checkpoint import lifecycle


@pytest.fixture
def state():
    """Arrays of seed 0 on fsdp 4 x tensor 2."""
    mesh = small_state.make_mesh(fsdp=4, tensor=2)
    return small_state.place(
        small_state.make_values(0),
        mesh,
        padded_rows=264,
        split=("fsdp", "tensor"),
        other=None,
    )


@pytest.fixture
def checkpointer(tmp_path):
    made = lifecycle.Checkpointer(
        tmp_path / "checkpoints", keep=2, run_id="test", attempt=1
    )
    yield made
    made._worker.shutdown()
