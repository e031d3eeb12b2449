"""The seam: every weight contraction of a model goes through `Ops`, closed over.

Precision, ZeRO's gathers, and later quantization, low-rank adapters, context
parallelism and expert dispatch enter here and nowhere else; model code is never touched
for them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxinfra import mesh, sharding
from jaxinfra.precision import Policy
from jaxinfra.sharding import Rules

Names = tuple[str | None, ...]
Product = Callable[[str, jax.Array, jax.Array, jax.sharding.PartitionSpec], jax.Array]


class Einsum(Protocol):
    """How activations meet a weight."""

    def __call__(
        self, equation: str, x: jax.Array, w: jax.Array, *, out: Names
    ) -> jax.Array:
        """Contracts activations `x` with a weight `w`, in compute dtype.

        `equation` has two operands; `out` gives the logical names of the result's dims.
        """
        ...


class Wrapped(Protocol):
    """A weight that is more than an array: quantized, with a low-rank pair beside it,
    watched. A pytree node whose leaves, stacked by layer, are cut as an array is."""

    def contract(
        self, einsum: Einsum, equation: str, x: jax.Array, *, out: Names
    ) -> jax.Array:
        """What `einsum(equation, x, w, out=out)` is for the weight that this stands
        for; `einsum` takes arrays and wrapped weights."""
        ...


class Context(NamedTuple):
    """What a layer may know of the tokens besides their activations.

    positions_BT: int32, place in the document. segments_BT: int32 document number in
    the row, 0 is padding; None: one document. rows_B: uint32 global row id, and key: of
    the step; both feed dropout, which is off where key is None. weights_BT: 1 where a
    token has a target; None where no loss is computed. router_bias_LE: what balances
    the experts of each layer; None: nothing. order_T: the token of the row in each
    place, where `context` splits the rows; None: as they are. told_scale: what a layer
    multiplies gradients of its own loss by, where a pipeline takes them.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    rows_B: jax.Array | None = None
    key: jax.Array | None = None
    rotations: Any = None
    weights_BT: jax.Array | None = None
    router_bias_LE: jax.Array | None = None
    order_T: Any = None
    told_scale: Any = None


class Attend(Protocol):
    """How queries meet keys and values."""

    def __call__(
        self,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        context: Context,
        cache: Any,
        /,
        *,
        window: int,
        softcap: float,
    ) -> tuple[jax.Array, Any]:
        """Causal attention: (result of q's shape, named "attention" for remat, cache).

        `window` keys are seen, 0 means all; scores are scaled by 1/sqrt(H), then
        capped by `softcap` (0: not). `cache` is None in training.
        """
        ...


class Dispatch(Protocol):
    """How tokens choose experts and meet them: a whole layer of experts."""

    def __call__(
        self,
        params: Any,
        x_BTD: jax.Array,
        context: Context,
        number: Any,
        /,
        *,
        einsum: Einsum,
    ) -> tuple[jax.Array, Any]:
        """(sum over experts of share x expert(x), [B, T, D]; `experts.Told`, or None).

        `params`: the router, and those of `layers.mlp`, each with a first dim E.
        `number` is the layer's place in the stack.
        """
        ...


class Ops(NamedTuple):
    """The functions that touch weights: see the protocols. `dispatch` is None where the
    model has no experts."""

    einsum: Einsum
    attend: Attend
    dispatch: Dispatch | None = None


def make_einsum(policy: Policy, rules: Rules) -> Einsum:
    """The plain einsum of `policy`: parameters are cast to compute dtype, gathered over
    `fsdp` where used (and again in the backward pass, so no gathered copy is kept), and
    their gradients leave in `policy.reduce`, sharded as the parameters are. Activations
    that are cut over an axis of the weight (`tensor`, along the length) are gathered
    likewise: of 0.188 s for 4 layers of Llama-3-8B on v6e 4x4, tensor 2, 10 ms are
    waited for these. Rings of smaller products ("collective matmul") in their place
    waited 3 ms and computed 48 ms longer."""

    product = make_product(policy, policy.compute)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
    def contract(equation: str, x: jax.Array, w: jax.Array, out: Names) -> jax.Array:
        x = _apart(x, w, equation)
        return product(equation, x, gather(w, policy), sharding.spec(rules, *out))

    def forward(equation, x, w, out):
        # Not as a custom_vjp, in which remat's policies do not see the dot.
        return contract.__wrapped__(equation, x, w, out), (x, w)

    def backward(equation, out, residuals, g):
        x, w = residuals
        x_dims, w_dims, out_dims = _operands(equation)
        back, part = f"{out_dims},{w_dims}->{x_dims}", _spec_of(x)
        x, g = _apart(x, w, equation), _apart(g, w, back)
        dx = product(back, g, gather(w, policy), part)
        # The first operand is transposed on the way: let it be the smaller one.
        (a, a_dims), (b, b_dims) = sorted(
            [(x, x_dims), (g, out_dims)], key=lambda pair: pair[0].size
        )
        to_w = f"{a_dims},{b_dims}->{w_dims}"
        dw = gradient_of(w, to_w, a, b, make_product(policy, policy.reduce))
        return dx, dw.astype(w.dtype)

    contract.defvjp(forward, backward)
    return opened(lambda equation, x, w, *, out: contract(equation, x, w, out))


def opened(einsum: Einsum) -> Einsum:
    """`einsum`, which takes `Wrapped` weights too: they say how they are contracted."""

    def contract(equation, x, w, *, out):
        if hasattr(w, "contract"):
            return w.contract(contract, equation, x, out=out)
        return einsum(equation, x, w, out=out)

    return contract


def gather(w: jax.Array, policy: Policy) -> jax.Array:
    """`w` in compute dtype, whole over `fsdp`; cast first, so half the bytes travel."""
    return jax.reshard(w.astype(policy.compute), sharding.gathered(_spec_of(w)))


def make_product(policy: Policy, dtype: jnp.dtype) -> Product:
    """The einsum in the precision of `policy`; its sum, which the unit has in
    `policy.accumulate`, is rounded once, to `dtype`."""
    return lambda equation, a, b, spec: jnp.einsum(
        equation,
        a,
        b,
        precision=policy.matmul_precision,
        preferred_element_type=dtype,
        out_sharding=spec,
    )


def gradient_of(
    w: jax.Array, equation: str, a: jax.Array, b: jax.Array, product: Product
) -> jax.Array:
    """The gradient of the weight `w`, laid out as it is: `product(equation, a, b,
    spec)`, an einsum that sums over all tokens, whose result lies as spec says.

    Made whole: asked for what a device keeps, a TPU's partitioner makes a ring of n
    small products, 8% of a step. Summed over ZeRO's axes first, as a reduce-scatter;
    over others only what a device keeps. Not so inside a shard_map, where XLA has no
    type for it; nor on GPUs, whose one all-reduce goes by all ports of a node and under
    the next product (Llama-3-8B on 64 H100, planned: 0.861 s, 0.962 s in two parts).
    """
    a_dims, b_dims, w_dims = _operands(equation)
    partition = _spec_of(w)
    whole = sharding.gathered(partition)
    is_inside = jax.sharding.get_abstract_mesh().manual_axes
    if is_inside or mesh.platform() in ("gpu", "cuda") or partition == whole:
        return jax.reshard(product(equation, a, b, whole), partition)
    summed = {d: e for d, e in zip(b_dims, _spec_of(b), strict=True) if d not in w_dims}
    alike = (summed.get(d, e) for d, e in zip(a_dims, _spec_of(a), strict=True))
    over = {axis for entry in summed.values() for axis in sharding.axes_of(entry)}
    a = jax.reshard(a, jax.P(*alike))  # as jax asks of a product not summed yet
    dw = product(equation, a, b, whole.update(unreduced=over))
    over.difference_update(sharding.zero_axes(*partition))
    dw = jax.reshard(dw, partition.update(unreduced=over))
    return jax.reshard(dw, partition)


def local_shape(
    shape: tuple[int, ...], partition: jax.sharding.PartitionSpec
) -> tuple[int, ...]:
    """What one device of the mesh that is set has of an array laid out so."""
    here = jax.sharding.get_abstract_mesh()
    parts = [sharding.axis_product(here, sharding.axes_of(e)) for e in partition]
    return tuple(size // n for size, n in zip(shape, parts, strict=True))


def _apart(x: jax.Array, w: jax.Array, equation: str) -> jax.Array:
    """`x` whole over those axes by which `w` is cut and a dim of x's own is too."""
    x_dims, w_dims, _ = _operands(equation)
    whole = sharding.gathered(_spec_of(w))
    taken = {axis for entry in whole for axis in sharding.axes_of(entry)}
    spec = _spec_of(x)
    for dim, entry in zip(x_dims, spec, strict=True):
        for axis in taken.intersection(sharding.axes_of(entry)):
            spec = spec if dim in w_dims else sharding.gathered(spec, axis)
    return jax.reshard(x, spec)


def _operands(equation: str) -> tuple[str, str, str]:
    inputs, out = equation.split("->")
    x, w = inputs.split(",")
    return x, w, out


def _spec_of(array: jax.Array) -> jax.sharding.PartitionSpec:
    return jax.typeof(array).sharding.spec
