"""Weights and their gradients cross ZeRO's axes in 8 bits, for any model.

An `Einsum` in place of `seam.make_einsum`'s: what each device holds of a weight is
rounded there, in blocks of up to 128 neighbours that share a float32 scale; codes and
scales are gathered, and the weight is whole again where it is multiplied. On the way
back each device rounds its part of the gradient, block by block for every shard; the
parts meet by an all-to-all and are summed in float32, so that no sum is of codes.

Against bfloat16, 1.03 bytes travel for 2; against the float32 in which gradients are
summed otherwise, for 4. Source: ZeRO++, arXiv:2306.10209 sections 3.1 and 3.3.

In a pipeline, which gathers once a step and reduces once, the layers' weights go so.

Tasks of a user's own have their matrices gathered so, before the loss: their gradients,
which meet in sums of the task's own, are reduced in full.

Experts go so whichever way their tokens come to them: by the einsum, or (`of_experts`)
by the grouped matmuls of "dropless".

What it costs, and when it pays: rounding, and summing what came, is work for the vector
units and the memory that a plain step does not have. By a TPU v6e's compiler a
feed-forward step over 8 chips (scripts/quant_programs.py) takes 3.7 times the cycles of
bfloat16, or 2.3 times at width 4096, for 63% fewer bytes. That is won back on a network
that brings a device less than 144 GB/s, or 42 at that width, and if nothing of the
traffic was hidden behind products: between hosts, not over the links of a slice, where
the plain gathers are faster. For a GPU there is no such estimate; measure a step.

Limits: weights that `fsdp` splits, so zero 3; not the embedding and the head, which do
not pass through the seam. Blocks are those of a shard: another mesh rounds otherwise.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra import sharding
from jaxinfra.config import CommConfig, ConfigError
from jaxinfra.ops import grouped, seam
from jaxinfra.ops.seam import Einsum, Names
from jaxinfra.params import ParamSpec
from jaxinfra.precision import Policy
from jaxinfra.quant import arrays
from jaxinfra.quant.formats import FormatName
from jaxinfra.quant.matmul import of_whole_rows
from jaxinfra.sharding import Axes, Rules

BLOCK = 128
_FORMATS: dict[str, FormatName | None] = {
    "compute": None,
    "int8": "int8",
    "fp8": "fp8_e4m3",
}


def low_bit_traffic(
    policy: Policy, rules: Rules, *, gather: str, reduce: str
) -> Einsum:
    """The einsum of `policy` with weights gathered, and gradients reduced, over ZeRO's
    axes in int8 or fp8; `compute`: as `seam.make_einsum` does."""
    into, back = _FORMATS[gather], _FORMATS[reduce]

    def whole(w: jax.Array) -> jax.Array:
        if into is None or not _is_split(_spec_of(w)):
            return seam.gather(w, policy)
        return gather_low(w, into, policy.compute)

    product = seam.make_product(policy, policy.compute)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
    def contract(equation: str, x: jax.Array, w: jax.Array, out: Names) -> jax.Array:
        return product(equation, x, whole(w), sharding.spec(rules, *out))

    def forward(equation, x, w, out):
        # As in the seam: in the sight of remat's policies.
        return contract.__wrapped__(equation, x, w, out), (x, w)

    def backward(equation, out, residuals, g):
        x, w = residuals
        inputs, out_dims = equation.split("->")
        x_dims, w_dims = inputs.split(",")
        to_x = f"{out_dims},{w_dims}->{x_dims}"
        dx = product(to_x, g, whole(w), _spec_of(x))
        to_w = f"{x_dims},{out_dims}->{w_dims}"
        w_spec = _spec_of(w)
        if back is None or not _is_split(w_spec):
            to_reduce = seam.make_product(policy, policy.reduce)
            dw = seam.gradient_of(w, to_w, x, g, to_reduce)
        else:
            dw = _reduced(to_w, x, g, w_spec, back, policy)
        return dx, dw.astype(w.dtype)

    contract.defvjp(forward, backward)
    of_rows = lambda equation, x, w, *, out: contract(equation, x, w, out)
    return seam.opened(of_whole_rows(of_rows, rules))


def gather_low(w: jax.Array, form: FormatName, dtype: jnp.dtype) -> jax.Array:
    """`w`, which ZeRO splits, whole in `dtype`: its codes and scales travel."""
    spec = _spec_of(w)
    body = functools.partial(_gathered_low, spec=spec, form=form, dtype=dtype)
    return jax.shard_map(
        body, in_specs=spec, out_specs=sharding.gathered(spec), check_vma=False
    )(w)


def gathered_in_few_bits(task: Any, comm: CommConfig) -> Any:
    """`task`, one of a user's own, whose loss is given its matrices whole over fsdp,
    after they have crossed it as `comm.gather` says. Their gradients come back in full:
    how the task sums over rows is its own. Raises ConfigError if its gradients are.
    Limits: a matrix, of all layers if it is a stack, is whole while the loss runs."""
    form = _FORMATS[comm.gather]
    if task.grad_fn is not None:
        raise ConfigError(
            f"comm.gather={comm.gather!r}: the task makes its gradients itself;"
            " set comm.gather to compute"
        )

    def crossed(spec: ParamSpec, w: jax.Array) -> jax.Array:
        place = _spec_of(w)
        if spec.kind != "matrix" or form is None or not _is_split(place):
            return w
        whole = jax.custom_vjp(lambda w: gather_low(w, form, w.dtype))
        whole.defvjp(lambda w: (whole(w), ()), lambda _, g: (jax.reshard(g, place),))
        return whole(w)

    def loss_fn(weights, *rest):
        return task.loss_fn(jax.tree.map(crossed, task.specs, weights), *rest)

    return task._replace(loss_fn=loss_fn)


def in_pipeline(comm: CommConfig, policy: Policy) -> tuple[Any, Any]:
    """(gather, reduce) of `pipeline.run` as `comm` says; what `fsdp` does not split
    goes as it does without."""
    into, back = _FORMATS[comm.gather], _FORMATS[comm.reduce]

    def gather(local: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
        if into is None or not _is_split(spec):
            return sharding.all_gather(local, spec)
        return _gathered_low(local, spec=spec, form=into, dtype=local.dtype)

    def reduce(local: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
        if back is None or not _is_split(spec):
            return sharding.all_reduce(local, spec, axes=("data", "fsdp"))
        shard = reduce_scatter_low(local, _split_dim(spec), back)
        return jax.lax.psum(shard.astype(policy.reduce), "data")

    return gather, reduce


def of_experts(comm: CommConfig) -> grouped.Traffic:
    """How experts that meet their tokens by grouped matmuls cross, as `comm` says."""
    into, back = _FORMATS[comm.gather], _FORMATS[comm.reduce]

    def gather(local: jax.Array, spec: jax.sharding.PartitionSpec, policy: Policy):
        if into is None or not _is_split(spec):
            return grouped.PLAIN.gather(local, spec, policy)
        return _gathered_low(local, spec=spec, form=into, dtype=policy.compute)

    def reduce(local: jax.Array, spec: jax.sharding.PartitionSpec, policy: Policy):
        if back is None or not _is_split(spec):
            return grouped.PLAIN.reduce(local, spec, policy)
        dim = _split_dim(spec)
        shard = reduce_scatter_low(local, dim, back, sharding.zero_axes(spec[dim]))
        return shard.astype(policy.reduce)

    return grouped.Traffic(gather, reduce)


def _gathered_low(local: jax.Array, *, spec, form: FormatName, dtype: jnp.dtype):
    """Inside a shard_map: `gather_low` of a weight laid out as `spec`."""
    parts = _sent(_quantized(local, form), lambda x: sharding.all_gather(x, spec))
    return arrays.dequantize(parts, dtype)


def reduce_scatter_low(
    local: jax.Array, dim: int, form: FormatName, axes: Axes = ("fsdp",)
) -> jax.Array:
    """Inside a shard_map: the sum over `axes`, of which each device keeps its part of
    `dim`, float32; what each sends to another is rounded once."""
    parts = jax.lax.axis_size(axes)
    shape = (*local.shape[:dim], parts, -1, *local.shape[dim + 1 :])
    pieces = jnp.moveaxis(local.reshape(shape), dim, 0)
    q = _quantized(pieces, form)
    swap = lambda x: jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0)
    return jnp.sum(arrays.dequantize(_sent(q, swap)), axis=0)


def _reduced(equation, x, g, w_spec, form: FormatName, policy: Policy) -> jax.Array:
    """The weight's gradient, laid out as `w_spec`: multiplied where the activations
    are, reduced over ZeRO's axes in `form`, over others in `policy.reduce`."""
    x_spec, g_spec = _spec_of(x), _spec_of(g)
    dim = _split_dim(w_spec)
    cut = sharding.zero_axes(w_spec[dim])
    inputs, w_dims = equation.split("->")
    summed = {
        axis
        for dims, spec in zip(inputs.split(","), (x_spec, g_spec), strict=True)
        for name, entry in zip(dims, spec, strict=True)
        if name not in w_dims
        for axis in sharding.axes_of(entry)
    }

    def body(x: jax.Array, g: jax.Array) -> jax.Array:
        local = jnp.einsum(
            equation,
            x,
            g,
            precision=policy.matmul_precision,
            preferred_element_type=jnp.float32,
        )
        rest = summed
        if summed.issuperset(cut):
            shard, rest = reduce_scatter_low(local, dim, form, cut), summed - {*cut}
        else:  # the tokens are not split over them: each has the whole sum
            size = local.shape[dim] // jax.lax.axis_size(cut)
            start = jax.lax.axis_index(cut) * size
            shard = jax.lax.dynamic_slice_in_dim(local, start, size, dim)
        rest = tuple(a for a in rest if jax.lax.axis_size(a) > 1)
        return jax.lax.psum(shard.astype(policy.reduce), rest) if rest else shard

    return jax.shard_map(
        body, in_specs=(x_spec, g_spec), out_specs=w_spec, check_vma=False
    )(x, g)


def _quantized(x: jax.Array, form: FormatName) -> arrays.QuantizedArray:
    size = math.gcd(x.shape[-1], BLOCK)
    return arrays.quantize(
        x, form, dims=(x.ndim - 1,), block=size if size >= 16 else x.shape[-1]
    )


def _sent(q: arrays.QuantizedArray, send) -> arrays.QuantizedArray:
    """`q` after the collective `send`; codes go as bytes, which no compiler widens."""
    values = send(jax.lax.bitcast_convert_type(q.values, jnp.uint8))
    values = jax.lax.bitcast_convert_type(values, q.values.dtype)
    return dataclasses.replace(q, values=values, scales=send(q.scales))


def _is_split(spec: jax.sharding.PartitionSpec) -> bool:
    here = jax.sharding.get_abstract_mesh()
    return sharding.axis_product(here, sharding.zero_axes(*spec)) > 1


def _split_dim(spec: jax.sharding.PartitionSpec) -> int:
    return next(i for i, entry in enumerate(spec) if sharding.zero_axes(entry))


def _spec_of(array: jax.Array) -> jax.sharding.PartitionSpec:
    return jax.typeof(array).sharding.spec
