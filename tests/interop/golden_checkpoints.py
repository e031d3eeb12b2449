"""Thirteen small published checkpoints with random weights, and torch's logits."""

import pathlib

import jax
import numpy as np

from jaxinfra import mesh, precision, sharding
from jaxinfra.generate import score
from jaxinfra.interop import hf

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
FLOAT32 = precision.policy("float32")
# Of the largest logit: float32 sums of some 100 terms in another order than torch's.
AS_TORCH = 2e-5


def layout_of(**sizes: int) -> sharding.Layout:
    """On as many of the simulated devices as the sizes name; one by default."""
    count = int(np.prod(list(sizes.values())))
    grid = mesh.make_mesh(sizes or {"data": 1}, devices=jax.devices()[:count])
    return sharding.make_layout(grid, zero=3)


def torch_logits(folder: pathlib.Path) -> np.ndarray:
    return np.load(folder / "logits.npy")


def difference(folder: pathlib.Path, logits: np.ndarray) -> float:
    """From torch's logits, in parts of the largest of them."""
    expected = torch_logits(folder)
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def logits_of(folder, model, weights, layout, logits_fn=None) -> np.ndarray:
    """Of the folder's token ids; the mesh must be set."""
    logits_fn = logits_fn or score.make_logits(model, policy=FLOAT32, layout=layout)
    return logits_fn(weights, np.load(folder / "ids.npy"))


def read(published: hf.Published, layout, model=None):
    from jaxinfra.models.specs import param_specs

    model = model or published.model
    specs = param_specs(model)
    return hf.read_params(published, model, specs, layout=layout, dtype=np.float32)
