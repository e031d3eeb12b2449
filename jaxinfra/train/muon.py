"""Muon: the momentum of every matrix made orthogonal."""

import math

import jax
import jax.numpy as jnp
import optax

from jaxinfra.config import OptimizerConfig
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.train import optim


def orthogonalised_momentum(cfg: OptimizerConfig, specs: Tree):
    """Muon's direction for every stacked matrix, layer by layer.

    The contracted dims of the spec are one side of the matrix, the rest the other,
    layers a batch; scaled by sqrt(max(1, outputs / inputs)), so that a wide layer moves
    as far. Source: optax.contrib.muon, whose parts these are.
    """

    def sides(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers:
        outputs = (
            dim
            for dim, name in enumerate(spec.axes)
            if dim not in spec.contract and name not in optim.STACKS
        )
        return optax.contrib.MuonDimensionNumbers(spec.contract, tuple(outputs))

    def scale(spec: ParamSpec) -> float:
        inputs, outputs = (
            math.prod(spec.shape[dim] for dim in dims) for dims in sides(spec)
        )
        return math.sqrt(max(1.0, outputs / inputs))

    def matrices(of):
        return jax.tree.map(
            lambda s: of(s) if s.kind == optim.ORTHOGONALISED else optax.MaskedNode(),
            specs,
        )

    momentum = optax.contrib.scale_by_muon(
        beta=cfg.momentum,
        # One step fewer than from the Frobenius norm. Source: arXiv:2512.04632.
        ns_steps=4,
        preconditioning="aol",
        mu_dtype=jnp.float32,
        weight_dimension_numbers=lambda _: matrices(sides),
    )
    by_shape = optax.stateless(
        lambda updates, params: jax.tree.map(jnp.multiply, updates, matrices(scale))
    )
    return optax.chain(momentum, by_shape)
