"""Low-rank adapters: a matrix and its pair as one weight.

W becomes W + scale A B. A maps what W sums over to `rank` numbers and starts random, B
maps these to what W makes and starts at zero, so that training begins at W exactly.
Source: arXiv:2106.09685 section 4.1; over a base in few bits, arXiv:2305.14314 eq. 5.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import params, sharding
from jaxinfra.config import LoraConfig
from jaxinfra.ops.seam import Einsum, Names
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.quant import arrays
from jaxinfra.sharding import Layout
from jaxinfra.train.optim import STACKS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["scale", "num_experts_dims"],
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The weight base + scale a b: `seam.Wrapped`.

    base: an array or a wrapped weight. a: [stacks, summed dims, R], b: [stacks, R, kept
    dims], in base's order. num_experts_dims: how many of its dims count experts, 0 or
    1; layers do not stand in it, since they are cut away before it is used.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float
    num_experts_dims: int = 0

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        """The contraction with the base plus that with the pair, which is never
        multiplied out."""
        down, up, names = _equations(equation, out, self.num_experts_dims)
        y = einsum(equation, x, self.base, out=out)
        h = einsum(down, x, self.a, out=names)
        return y + self.scale * einsum(up, h, self.b, out=out)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "ids_B"],
    meta_fields=["num_experts_dims"],
)
@dataclasses.dataclass(frozen=True)
class LowRankByRow:
    """A weight with a pair of its own for every row of a batch: `seam.Wrapped`.

    a, b: those of `LowRank`, several along a first dim (after layers), b times scale.
    ids_B: int32, which of them each row has; by layer too where there are layers.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    ids_B: jax.Array
    num_experts_dims: int = 0

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        """As `LowRank`; each row meets its own pair, gathered for it."""
        down, up, _ = _equations(equation, out, self.num_experts_dims)
        y = einsum(equation, x, self.base, out=out)
        dims, h_dims = down.partition(",")[0], down.partition("->")[2]
        # What x and h share is laid out alike; the rest of h is whole on every device.
        laid_out = dict(zip(dims, jax.typeof(x).sharding.spec, strict=True))
        row = laid_out[dims[0]]
        h_spec = jax.P(*(laid_out.get(dim) for dim in h_dims))
        h = _dot(_by_row(down), x, self._of_rows(self.a, row), h_spec)
        b_B = self._of_rows(self.b, row)
        return y + _dot(_by_row(up), h, b_B, jax.typeof(y).sharding.spec)

    def _of_rows(self, w: jax.Array, row: Any) -> jax.Array:
        whole = jax.reshard(w, sharding.gathered(jax.typeof(w).sharding.spec))
        _, *dims = jax.typeof(whole).sharding.spec
        return whole.at[self.ids_B].get(out_sharding=jax.P(row, *dims))


def pair_specs(spec: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    """Specs of `a` and `b` for a matrix of `spec`; they are split as it is."""
    stacks = [dim for dim, name in enumerate(spec.axes) if name in STACKS]
    kept = [d for d in range(len(spec.shape)) if d not in (*stacks, *spec.contract)]
    n = len(stacks)

    def of(values, before, after, between):
        at = lambda dims: tuple(values[dim] for dim in dims)
        return (*at(stacks), *at(before), between, *at(after))

    a_shape = of(spec.shape, spec.contract, (), rank)
    fan_in = math.prod(spec.shape[dim] for dim in spec.contract)
    return {
        "a": ParamSpec(
            a_shape,
            of(spec.axes, spec.contract, (), None),
            tuple(range(n, n + len(spec.contract))),
            "matrix",
            params.normal(1.0 / math.sqrt(fan_in)),
        ),
        "b": ParamSpec(
            of(spec.shape, (), kept, rank),
            of(spec.axes, (), kept, None),
            (n,),
            "matrix",
            params.constant(0.0),
        ),
    }


def join(base: Any, pair: dict[str, jax.Array], spec: ParamSpec, cfg: LoraConfig):
    """The base of a matrix of `spec` and its trained pair, as one weight."""
    experts = spec.axes.count("experts")
    return LowRank(base, pair["a"], pair["b"], cfg.alpha / cfg.rank, experts)


def merge(tree: Tree) -> Tree:
    """Every `LowRank` of a tree as the array that it stands for, of its base's dtype,
    or float32 where that is in few bits, and laid out as it."""
    is_pair = lambda leaf: isinstance(leaf, LowRank)
    return jax.tree.map(
        lambda leaf: _merged(leaf) if is_pair(leaf) else leaf, tree, is_leaf=is_pair
    )


def by_row(
    specs: Tree,
    base: Tree,
    adapters: Sequence[tuple[Tree, LoraConfig]],
    ids_B: np.ndarray,
    layout: Layout,
) -> Tree:
    """The parameters `base`, and for row b the pairs of adapters[ids_B[b]]; -1: none.

    adapters: (a tree with the pair of every adapted matrix and else None, its
    settings), as trained; which matrices and what ranks may differ. The batch has B
    rows and those that fill it up over the mesh, which have no adapter.
    """
    parts = sharding.axis_product(layout.mesh, layout.params.batch)
    ids_B = np.where(ids_B < 0, len(adapters), ids_B).astype(np.int32)
    ids_B = np.pad(ids_B, (0, -len(ids_B) % parts), constant_values=len(adapters))

    def one(spec: ParamSpec, base: Any, *pairs: dict[str, jax.Array] | None) -> Any:
        if not any(pairs):
            return base
        is_layered = spec.axes[0] == "layers"
        ids = (
            np.broadcast_to(ids_B, (spec.shape[0], len(ids_B))) if is_layered else ids_B
        )
        names = (None, "batch") if is_layered else ("batch",)
        ids = jax.device_put(
            ids, sharding.sharding(layout, layout.params, ids.shape, names)
        )
        found = [
            (pair, cfg.alpha / cfg.rank)
            for pair, (_, cfg) in zip(pairs, adapters, strict=True)
        ]
        a, b = _stacked(found, spec, layout)
        return LowRankByRow(base, a, b, ids, spec.axes.count("experts"))

    return jax.tree.map(one, specs, base, *(tree for tree, _ in adapters))


def _stacked(
    pairs: list[tuple[dict[str, jax.Array] | None, float]],
    spec: ParamSpec,
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """`a` and `b` of several pairs and a last one of zeros, along a dim that follows
    the layers; ranks are filled up by zeros, which change nothing."""
    dim = spec.axes.count("layers")
    rank = max(pair["a"].shape[-1] for pair, _ in pairs if pair)
    wanted = pair_specs(spec, rank)

    def stack(name: str, found: list[jax.Array | None]) -> jax.Array:
        to = wanted[name]
        ranks = len(to.shape) - 1 if name == "a" else to.contract[0]
        arrays = [jnp.zeros(to.shape)] * (len(found) + 1)
        for i, (array, (_, scale)) in enumerate(zip(found, pairs, strict=True)):
            if array is not None:
                missing = [(0, 0)] * len(to.shape)
                missing[ranks] = (0, rank - array.shape[ranks])
                arrays[i] = jnp.pad(array, missing) * (scale if name == "b" else 1.0)
        return jnp.stack(arrays, axis=dim)

    def made(name: str) -> jax.Array:
        to = wanted[name]
        several = lambda dims, one: (*dims[:dim], one, *dims[dim:])
        place = sharding.sharding(
            layout,
            layout.params,
            several(to.shape, len(pairs) + 1),
            several(to.axes, None),
        )
        of_name = functools.partial(stack, name)
        auto = jax.sharding.auto_axes(of_name, out_sharding=place)
        return jax.jit(auto)([pair and pair[name] for pair, _ in pairs])

    return made("a"), made("b")


def _merged(w: LowRank) -> jax.Array:
    """W + scale A B; summed in float32."""
    base = arrays.dequantize(w.base) if arrays.is_quantized(w.base) else w.base

    def add(base, a, b):
        stacks = a.ndim + b.ndim - 2 - base.ndim
        A = a.reshape(*a.shape[:stacks], -1, a.shape[-1]).astype(jnp.float32)
        B = b.reshape(*b.shape[: stacks + 1], -1).astype(jnp.float32)
        product = jnp.matmul(A, B, precision=jax.lax.Precision.HIGHEST)
        added = w.scale * product.reshape(base.shape)
        return (base.astype(jnp.float32) + added).astype(base.dtype)

    auto = jax.sharding.auto_axes(add, out_sharding=jax.typeof(base).sharding)
    return jax.jit(auto)(base, w.a, w.b)


def _equations(
    equation: str, out: Names, num_experts_dims: int
) -> tuple[str, str, Names]:
    """(x with a -> h, h with b -> y, names of h's dims): h has, before its ranks r,
    those dims of x that are not summed over, and those that count experts.

    BTD,DKH->BTKH: BTD,Dr->BTr and BTr,rKH->BTKH.
    """
    inputs, y = equation.split("->")
    x, w = inputs.split(",")
    stacks = w[:num_experts_dims]
    summed = "".join(d for d in w if d in x and d not in stacks)
    kept = "".join(d for d in w if d not in summed + stacks)
    h = "".join(d for d in x if d not in summed + stacks) + stacks + "r"
    names = tuple(dict(zip(y, out, strict=True)).get(dim) for dim in h)
    return f"{x},{stacks}{summed}r->{h}", f"{h},{stacks}r{kept}->{y}", names


def _by_row(equation: str) -> str:
    """The equation where the weight has the rows of x, its first dim."""
    x, rest = equation.split(",")
    return f"{x},{x[0]}{rest}"


def _dot(equation: str, x: jax.Array, w: jax.Array, out: jax.sharding.PartitionSpec):
    is_full = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if is_full else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        equation, x, w.astype(x.dtype), precision=precision, out_sharding=out
    )
