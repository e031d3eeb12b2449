"""The values in `golden/format_1` and later ones, and how the newest was written.

    PYTHONPATH=. python tests/checkpoint/golden_values.py    on 8 simulated devices

Never write an existing version anew: it must load for ever as it is.
"""

import pathlib

import ml_dtypes
import numpy as np

FOLDERS = {n: pathlib.Path(__file__).parent / "golden" / f"format_{n}" for n in (1, 2)}
FOLDER = FOLDERS[2]  # the one that `write` makes
METRICS = {"eval/loss": 2.5}  # of format 2 on
CONFIG = {"model": {"width": 6}, "train": {"lr": 0.001}}
DATA = {"row": 1234567890123, "epoch": 2}
VALUES = {
    "params/embedding": (np.arange(42, dtype=np.float32).reshape(7, 6) - 20) / 8,
    "params/pattern/0/scale": np.linspace(-2, 2, 9).astype(ml_dtypes.bfloat16),
    "opt/count": np.array(-7, np.int32),
    "model_state/key": np.array([0, 2**32 - 1], np.uint32),
}
LOGICAL = {"params/embedding": (7, 6)}


def write() -> None:
    import jax
    import small_state
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxinfra.checkpoint import lifecycle

    mesh = small_state.make_mesh(fsdp=2)
    padded = np.zeros((8, 6), np.float32)
    padded[:7] = VALUES["params/embedding"]
    arrays = {
        name: jax.device_put(value, NamedSharding(mesh, P()))
        for name, value in VALUES.items()
    }
    split = NamedSharding(mesh, P("fsdp"))
    arrays["params/embedding"] = jax.device_put(padded, split)
    saves = lifecycle.Checkpointer(FOLDER, keep=1, run_id="golden", attempt=3)
    metadata = {"config": CONFIG, "data": DATA, "metrics": METRICS}
    saves.save(40, arrays, metadata=metadata, logical_shapes=LOGICAL)
    saves.close()


if __name__ == "__main__":
    if FOLDER.exists():
        raise SystemExit(f"{FOLDER} exists: a format that was released never changes")
    write()
