"""A model in few bits, calibrated on text: layer by layer, each on the inputs that the
compressed layers before it give.

What a matrix sees is gathered at the seam: a layer runs with `_Observed` weights, which
contract as they are and note the sums of their inputs. No model knows of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import params, sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.ops import layers
from jaxinfra.ops.seam import Context, Einsum, Names
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.quant import arrays, compression, rounding_rules
from jaxinfra.quant.compression import Compression
from jaxinfra.quant.rescaled import Rescaled, in_few_bits
from jaxinfra.quant.rounding_rules import Rounded
from jaxinfra.sharding import Layout


class Inputs(NamedTuple):
    """Sums over the tokens that a matrix saw, float32. hessian: [stacks, N, N], of x
    x^T. magnitude: [stacks, N], of |x|."""

    hessian: jax.Array
    magnitude: jax.Array


def compress(
    model: Any,
    cfg: ModelConfig,
    weights: Tree,
    batches: list[np.ndarray],
    how: Compression,
    *,
    layout: Layout,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Tree, dict[str, float]]:
    """(`weights` of `model`, a `transformer.Model`, as `how` says; by matrix, the
    squared error of its outputs over theirs).

    batches: ids [B, T], each row a text from its start; nearest rounding needs none.
    To be called where the mesh of `layout` is set. Limits: a layer's matrices are
    worked on whole, on every device alike; of an expert all tokens count as its
    inputs, also those that are routed elsewhere.
    """
    specs = model.specs
    compression.abstract(specs, how, layout, jnp.dtype("float32"))  # raises if it fails
    if how.method == "nearest":
        return _laid_out(_to_nearest(weights, specs, how), specs, layout), {}
    forward = jax.jit(
        functools.partial(_forward, block=model.block), static_argnums=(3,)
    )
    placed = [_placed(ids_BT, layout) for ids_BT in batches]
    contexts = [_context(ids_BT, cfg) for ids_BT in placed]
    embed = jax.jit(model.embed)
    xs = [embed(weights, *batch) for batch in zip(placed, contexts, strict=True)]
    made: dict[str, list[Any]] = {"prefix": [], "pattern": [], "suffix": []}
    errors: dict[str, float] = {}
    for number, of in enumerate(_layers(cfg, weights, specs)):
        start = f"{of.part}/{of.place}/"
        chosen = {
            path: spec
            for path, spec in params.named(of.specs)
            if start + path in how.matrices
        }
        rest = (of.layer, jnp.int32(number))
        own, found = of.weights, {}
        if chosen:
            observe = _jitted_observe(model.block, tuple(chosen.items()))
            sums = [observe(own, *seen, *rest) for seen in zip(xs, contexts)]
            total = jax.tree.map(lambda *parts: sum(parts), *sums)
            few, found = _jitted_round(tuple(chosen.items()), how, layout)(own, total)
            leaves = [few.get(path, leaf) for path, leaf in params.named(own)]
            own = params.unflatten(own, leaves)
        xs = [forward(own, *seen, *rest) for seen in zip(xs, contexts)]
        made[of.part].append(own)
        found = {path: float(error) for path, error in found.items()}
        errors |= {f"{number}/{path}": error for path, error in found.items()}
        worst = max(found.values(), default=0.0)
        tell(f"layer {number + 1} of {cfg.num_layers}: outputs off by {worst:.2e}")
    step = len(cfg.pattern)
    stacked = [
        jax.tree.map(lambda *each: jnp.stack(each), *made["pattern"][i::step])
        for i in range(step)
    ]
    done = weights | made | {"pattern": stacked}
    return _laid_out(done, specs, layout), errors


class _Layer(NamedTuple):
    """A layer: where it stands in the model, its settings, parameters and specs."""

    part: str
    place: int
    layer: LayerConfig
    weights: Tree
    specs: Tree


class _Observed:
    """A weight that notes its inputs in `sink`: `seam.Wrapped`, within one trace."""

    def __init__(self, weight: jax.Array, num_experts: int, sink: dict, name: str):
        self._weight, self._experts = weight, num_experts
        self._sink, self._name = sink, name

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        self._sink[self._name] = _inputs(equation, x, self._experts)
        return einsum(equation, x, self._weight, out=out)


def _inputs(equation: str, x: jax.Array, num_experts_dims: int) -> Inputs:
    """The sums of x for a weight, by expert where x is."""
    dims, rest = equation.split(",")
    w = rest.partition("->")[0]
    stacks = "".join(d for d in w[:num_experts_dims] if d in dims)
    summed = "".join(d for d in w[num_experts_dims:] if d in dims)
    x = x.astype(jnp.float32)
    whole = lambda ndim: jax.P(*(None,) * ndim)
    other = summed.lower()  # the same dims once more
    again = dims.translate(str.maketrans(summed, other))
    hessian = jnp.einsum(
        f"{dims},{again}->{stacks}{summed}{other}",
        x,
        x,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=whole(len(stacks + summed + other)),
    )
    magnitude = jnp.einsum(
        f"{dims}->{stacks}{summed}",
        jnp.abs(x),
        out_sharding=whole(len(stacks + summed)),
    )
    lead = magnitude.shape[: len(stacks)]
    N = int(np.prod(magnitude.shape[len(stacks) :]))
    return Inputs(hessian.reshape(*lead, N, N), magnitude.reshape(*lead, N))


def _observe(own, x, context, layer, number, *, block, experts: dict[str, int]):
    """Inputs of the matrices of a layer, by path in it; experts: their dims of
    experts."""
    sink: dict[str, Inputs] = {}
    watched = [
        _Observed(leaf, experts[path], sink, path) if path in experts else leaf
        for path, leaf in params.named(own)
    ]
    block(params.unflatten(own, watched), x, context, layer, number, None)
    return sink


@functools.lru_cache(maxsize=8)
def _jitted_observe(block: Callable, chosen: tuple[tuple[str, ParamSpec], ...]):
    experts = {path: spec.axes.count("experts") for path, spec in chosen}
    observe = functools.partial(_observe, block=block, experts=experts)
    return jax.jit(observe, static_argnums=(3,))


@functools.lru_cache(maxsize=8)
def _jitted_round(
    chosen: tuple[tuple[str, ParamSpec], ...], how: Compression, layout: Layout
):
    """`_round_all`, whose results are whole on every device."""
    place = jax.NamedSharding(layout.mesh, jax.P())
    round_all = functools.partial(_round_all, specs=dict(chosen), how=how)
    return jax.jit(jax.sharding.auto_axes(round_all, out_sharding=place))


def _forward(own, x, context, layer, number, *, block):
    return block(own, x, context, layer, number, None)[0]


def _round_all(own, sums: dict[str, Inputs], *, specs: dict[str, ParamSpec], how):
    """(the layer's matrices in few bits, errors of their outputs), by path."""
    done, errors = {}, {}
    for path, leaf in params.named(own):
        if path in specs:
            done[path], errors[path] = _in_few_bits(leaf, specs[path], sums[path], how)
    return done, errors


def _in_few_bits(
    w: jax.Array, spec: ParamSpec, inputs: Inputs, how: Compression
) -> tuple[Any, jax.Array]:
    """A matrix as `how` says, in the form of `compression.in_form`."""
    experts, last = spec.axes.count("experts"), spec.contract[-1]
    stacks, summed = spec.shape[:experts], spec.shape[experts : last + 1]
    N = int(np.prod(summed))
    group = min(how.group, summed[-1]) or N
    w_ENO = w.astype(jnp.float32).reshape(*stacks, N, -1)
    if len(stacks) > inputs.hessian.ndim - 2:  # experts that share their inputs
        shared = lambda x: jnp.broadcast_to(x, (*stacks, *x.shape))
        inputs = Inputs(*map(shared, inputs))

    def one(w_NO: jax.Array, inputs: Inputs) -> tuple[Rounded, jax.Array]:
        if how.method == "gptq":
            rounded = rounding_rules.gptq(w_NO, inputs.hessian, how.format, group)
        else:
            rounded = rounding_rules.awq(w_NO, *inputs, how.format, group)
        return rounded, rounding_rules.output_error(w_NO, rounded, inputs.hessian)

    rounded, error = (jax.vmap(one) if experts else one)(w_ENO, inputs)
    by_group = (*summed[:-1], summed[-1] // group)
    parts = by_group if how.group else (1,) * len(summed)
    scales = rounded.scales_GO.reshape(*stacks, *parts, *spec.shape[last + 1 :])
    dims = tuple(dim - w.ndim for dim in spec.contract)
    q = arrays.encode(rounded.w_NO.reshape(w.shape), scales, how.format, dims)
    if how.method == "awq":
        q = Rescaled(q, rounded.factors_N.reshape(*stacks, *summed), experts)
    return q, jnp.mean(error)


def _taken(r: int, w: jax.Array) -> jax.Array:
    """Layer `r` of a stack, which stages of a pipeline may share."""
    return jax.reshard(w, sharding.gathered(jax.typeof(w).sharding.spec, "pipeline"))[r]


def _layers(cfg: ModelConfig, weights: Tree, specs: Tree) -> Iterator[_Layer]:
    """Every layer in the order in which tokens meet it."""
    for i, layer in enumerate(cfg.prefix):
        yield _Layer("prefix", i, layer, weights["prefix"][i], specs["prefix"][i])
    for r in range(cfg.repeats):
        for i, layer in enumerate(cfg.pattern):
            own = jax.tree.map(functools.partial(_taken, r), weights["pattern"][i])
            one = jax.tree.map(_unstacked, specs["pattern"][i])
            yield _Layer("pattern", i, layer, own, one)
    for i, layer in enumerate(cfg.suffix):
        yield _Layer("suffix", i, layer, weights["suffix"][i], specs["suffix"][i])


def _unstacked(spec: ParamSpec) -> ParamSpec:
    return dataclasses.replace(
        spec,
        shape=spec.shape[1:],
        axes=spec.axes[1:],
        contract=tuple(dim - 1 for dim in spec.contract),
    )


def _to_nearest(weights: Tree, specs: Tree, how: Compression) -> Tree:
    """All matrices at once."""

    def one(path: str, spec: ParamSpec, leaf: jax.Array) -> Any:
        if path not in how.matrices:
            return leaf
        return jax.jit(lambda w: compression.in_form(w, spec, how))(leaf)

    leaves = [
        one(path, spec, leaf)
        for (path, spec), leaf in zip(params.named(specs), jax.tree.leaves(weights))
    ]
    return params.unflatten(specs, leaves)


def _laid_out(tree: Tree, specs: Tree, layout: Layout) -> Tree:
    def one(spec: ParamSpec, leaf: Any) -> Any:
        if not in_few_bits(leaf):
            return leaf
        return compression.placed(leaf, spec, layout)

    return jax.tree.map(one, specs, tree)


def _context(ids_BT: jax.Array, cfg: ModelConfig) -> Context:
    positions_BT = jnp.zeros_like(ids_BT) + jnp.arange(ids_BT.shape[1])
    return Context(positions_BT, rotations=layers.rotations_of(cfg, positions_BT))


def _placed(ids_BT: np.ndarray, layout: Layout) -> jax.Array:
    place = sharding.sharding(layout, layout.params, ids_BT.shape, ("batch", None))
    return jax.device_put(ids_BT.astype(np.int32), place)
