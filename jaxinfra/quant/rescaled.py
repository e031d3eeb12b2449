"""A weight whose inputs are scaled before they meet it, as AWQ leaves it.

Activation-aware quantization multiplies the inputs that matter by less than one and the
weights that they meet by as much more, so that these are rounded finer. Published code
folds the factors into the norm before; here they stand beside the weight, so that any
model takes them and every matrix has its own. Source: arXiv:2306.00978 section 3.2.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.ops.seam import Einsum, Names
from jaxinfra.params import Tree
from jaxinfra.quant import arrays


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "factors"],
    meta_fields=["num_experts_dims"],
)
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """The weight factors * `weight`: `seam.Wrapped`.

    weight: a `QuantizedArray`. factors: [stacks, summed dims], one an input; what
    follows in the weight is what it makes. num_experts_dims: as `lora.LowRank`'s.
    """

    weight: Any
    factors: jax.Array
    num_experts_dims: int = 0

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        """The contraction of the scaled inputs with the quantized weight."""
        inputs, y = equation.split("->")
        x_dims, w = inputs.split(",")
        stacks = w[: self.num_experts_dims]
        summed = "".join(d for d in w if d in x_dims and d not in stacks)
        # Experts that share their inputs scale them each by its own factors.
        new = "".join(d for d in stacks if d not in x_dims)
        first = min(x_dims.index(d) for d in summed)
        dims = x_dims[:first] + new + x_dims[first:]
        for dim in range(len(new)):
            x = jnp.expand_dims(x, first + dim)
        factors = _beside(self.factors, stacks + summed, x, dims)
        order = sorted(
            range(factors.ndim), key=lambda i: dims.index((stacks + summed)[i])
        )
        factors = jnp.transpose(factors, order)
        used = stacks + summed
        for dim, letter in enumerate(dims):
            if letter not in used:
                factors = jnp.expand_dims(factors, dim)
        x = (x.astype(jnp.float32) * factors).astype(x.dtype)
        return einsum(f"{dims},{w}->{y}", x, self.weight, out=out)


def plain(tree: Tree, dtype: jnp.dtype) -> Tree:
    """`tree` with arrays of `dtype` in place of weights in few bits, laid out as
    they."""

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, Rescaled):
            w = arrays.dequantize(leaf.weight)
            factors = leaf.factors.reshape(
                (*leaf.factors.shape, *(1,) * (w.ndim - leaf.factors.ndim))
            )
            return (w * factors).astype(dtype)
        if arrays.is_quantized(leaf):
            return arrays.dequantize(leaf, dtype)
        return leaf.astype(dtype)

    return jax.tree.map(one, tree, is_leaf=in_few_bits)


def in_few_bits(leaf: Any) -> bool:
    """Whether it is a weight of this package and no array."""
    return isinstance(leaf, Rescaled) or arrays.is_quantized(leaf)


def _beside(factors: jax.Array, letters: str, x: jax.Array, dims: str) -> jax.Array:
    """`factors` laid out to be multiplied with `x`: whole over `fsdp`, as activations
    are, and over what cuts another dim of x's (rows, where experts are cut)."""
    spec = sharding.gathered(jax.typeof(factors).sharding.spec)
    for dim, cut in zip(dims, jax.typeof(x).sharding.spec, strict=True):
        here = letters.find(dim)
        for axis in sharding.axes_of(cut):
            if here < 0 or axis not in sharding.axes_of(spec[here]):
                spec = sharding.gathered(spec, axis)
    return jax.reshard(factors, spec)
