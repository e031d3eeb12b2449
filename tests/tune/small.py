"""A model of a few thousand parameters, on any mesh of this process."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import mesh, params, precision, sharding
from jaxinfra.config import (
    Config,
    DataConfig,
    InitConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxinfra.models.specs import param_specs
from jaxinfra.tune import lora, roles

POLICY = precision.policy("float32")
MODEL = ModelConfig(
    vocab_size=29, width=16, ffn_width=24, num_heads=4, num_kv_heads=2, repeats=2
)


def config(**sections) -> Config:
    train = sections.pop("train", {})
    whole = {"steps": 6, "batch_size": 8, "length": 12} | train
    return Config(
        name="small",
        model=sections.pop("model", MODEL),
        init=InitConfig(from_="elsewhere"),
        data=DataConfig(),
        train=TrainConfig(**whole),
        optimizer=OptimizerConfig(
            learning_rate=0.05, warmup_steps=0, schedule="constant"
        ),
        mesh=MeshConfig(**{"data": 1, **sections.pop("mesh", {})}),
        **sections,
    )


@contextlib.contextmanager
def mesh_of(sizes: dict[str, int]):
    """The layout of a mesh of these sizes, which is set within the block."""
    devices = jax.devices()[: math.prod(sizes.values())]
    layout = sharding.make_layout(mesh.make_mesh(sizes, devices=devices))
    with jax.set_mesh(layout.mesh):
        yield layout


def weights(layout, cfg=MODEL, seed=3):
    """Parameters of the model, the same numbers on every mesh; no norm is 1."""
    specs = param_specs(cfg)
    made = params.initialize(
        specs, jax.random.key(seed), layout=layout, dtype=jnp.float32
    )
    bend = lambda x, s: x * 1.3 if s.kind == "vector" else x
    return jax.tree.map(bend, made, specs)


def pairs(specs, settings, layout, key):
    """A pair for every adapted matrix, none of its numbers zero; None elsewhere."""
    found = roles.roles(specs, config(lora=settings))
    wanted = jax.tree.map(
        lambda s, role: (
            lora.pair_specs(s, settings.rank) if role == "adapted" else None
        ),
        specs,
        found,
    )
    random = jax.tree.map(
        lambda s: dataclasses.replace(s, init=params.normal(0.5)), wanted
    )
    return params.initialize(
        random, jax.random.key(key), layout=layout, dtype=jnp.float32
    )


def merged(specs, base, tree, settings):
    """The base with the pairs of `tree` multiplied out."""

    def one(spec, leaf, pair):
        return lora.join(leaf, pair, spec, settings) if pair else leaf

    return lora.merge(jax.tree.map(one, specs, base, tree))


def host(tree):
    return jax.tree.map(np.asarray, tree)
