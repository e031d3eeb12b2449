"""A small state on a mesh of 8 simulated devices, and where it is restored to."""

import pathlib

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "context", "tensor", "pipeline")
METADATA = {"config": {"train": {"steps": 40}}, "data": {"row": 12}}
LOGICAL = {"params/embedding": (257, 6)}
ROOT = pathlib.Path(__file__).parents[2]


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 6)


def make_values(seed: int) -> dict[str, np.ndarray]:
    """Random bits of several dtypes, NaNs among them, at their logical shapes."""
    rng = np.random.default_rng(seed)
    shapes = {
        "params/embedding": ((257, 6), "float32"),
        "params/pattern/0/attention/query": ((3, 8, 4), "bfloat16"),
        "opt/nu": ((16,), "float16"),
        "opt/count": ((), "int32"),
        "model_state/key": ((2,), "uint32"),
        "model_state/zeros": ((8, 4), "float32"),
    }
    values = {}
    for name, (shape, dtype) in shapes.items():
        num_bytes = max(1, int(np.prod(shape))) * np.dtype(dtype).itemsize
        bits = np.frombuffer(rng.bytes(num_bytes), np.uint8)
        values[name] = bits.view(dtype).reshape(shape)
    values["model_state/zeros"] = np.zeros((8, 4), np.float32)
    return values


def place(values, mesh, *, padded_rows: int, split, other) -> dict[str, jax.Array]:
    """Global arrays; the embedding is padded with ones, which must not be stored."""
    embedding = np.ones((padded_rows, 6), np.float32)
    embedding[:257] = values["params/embedding"]
    specs = {
        "params/embedding": P(split),
        "params/pattern/0/attention/query": P(None, split, other),
    }
    values = {**values, "params/embedding": embedding}
    return {
        name: jax.device_put(value, NamedSharding(mesh, specs.get(name, P())))
        for name, value in values.items()
    }


def abstract_of(arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in arrays.items()
    }


def assert_same_bits(arrays, values) -> None:
    for name, value in values.items():
        found = np.asarray(arrays[name])
        assert found.dtype == value.dtype
        if name in LOGICAL:
            assert not found[257:].any(), "padding must read as zeros"
            found = found[:257]
        assert found.tobytes() == value.tobytes(), name


def save_now(checkpointer, step, arrays):
    checkpointer.save(step, arrays, metadata=METADATA, logical_shapes=LOGICAL)
    return checkpointer.wait()
