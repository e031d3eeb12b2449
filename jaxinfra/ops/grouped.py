"""Matmuls of rows that are grouped by expert, on one device, and how rows get grouped.

All of it runs inside a `shard_map`. Rows of one expert stand together, each group
padded to a multiple of `align`, so that a block of so many rows meets one expert. On
TPU the compiler's own grouped matmul multiplies them, on Hopper GPUs kernels of jax's
(`hopper`), of which that of a weight's gradient rounds each device's part to bfloat16;
elsewhere, where the compiler's multiplies every row with every expert, one block comes
after another.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxinfra
from jaxinfra import mesh, sharding
from jaxinfra.ops.varying import varies_over, varying_like
from jaxinfra.precision import Policy

_HOPPER = ("NVIDIA H100", "NVIDIA H200")  # what jax's device_kind begins with
_RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


class Groups(NamedTuple):
    """Where rows stand once they are grouped, all int32.

    source_R: the row that a place takes, or one past the last for none. place_A: the
    place of each row, or one past the last for none. sizes_E: places of each expert,
    padding included, in order.
    """

    source_R: jax.Array
    place_A: jax.Array
    sizes_E: jax.Array


class Traffic(NamedTuple):
    """How weights cross ZeRO's axes, both of (local, its partition, policy).

    gather: a device's part of a weight -> it whole over them, in compute dtype. reduce:
    a weight's gradient -> its sum over them, this device's part, in `policy.reduce`.
    """

    gather: Callable[[jax.Array, jax.sharding.PartitionSpec, Policy], jax.Array]
    reduce: Callable[[jax.Array, jax.sharding.PartitionSpec, Policy], jax.Array]


PLAIN = Traffic(
    lambda w, partition, policy: sharding.all_gather(
        w.astype(policy.compute), partition
    ),
    lambda dw, partition, policy: sharding.all_reduce(
        dw.astype(policy.reduce), partition, sharding.zero_axes(*partition)
    ),
)


def arrange(ids_A: jax.Array, *, num_experts: int, rows: int, align: int) -> Groups:
    """Groups rows by expert into `rows` places; rows of an id of num_experts or more
    get none. Rows of one expert keep their order."""
    A = ids_A.size
    sizes_E = _counts(ids_A, num_experts)
    padded_E = -(-sizes_E // align) * align
    first_E, start_E = _before(sizes_E), _before(padded_E)
    order_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    sorted_A = ids_A[order_A]
    expert_A = jnp.minimum(sorted_A, num_experts - 1)
    place_A = start_E[expert_A] + jnp.arange(A, dtype=jnp.int32) - first_E[expert_A]
    place_A = jnp.where(sorted_A < num_experts, place_A, rows)
    source_R = varying_like(jnp.full(rows, A, jnp.int32), ids_A)
    source_R = source_R.at[place_A].set(order_A, mode="drop")
    place_A = jnp.zeros_like(order_A).at[order_A].set(place_A)
    return Groups(source_R, place_A, padded_E)


def alignment(rows: int, num_experts: int) -> int:
    """Rows of a block: 1 where the compiler has a grouped matmul. A block should fill
    the device, a GPU a larger one (8 experts of 2048 x 4096 on Hopper: with 128 rows
    8.7 times a plain matmul's time, with 512 rows 5.3), and the padding of half a block
    an expert stay an eighth of the work."""
    if _has_ragged():
        return 1
    even = max(1, rows // (4 * num_experts))
    most = 512 if mesh.platform() in ("gpu", "cuda") else 128
    return min(most, max(8, 1 << (even.bit_length() - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def moved(
    x_ID: jax.Array, source_O: jax.Array, place_I: jax.Array, copies: int = 1
) -> jax.Array:
    """x[source // copies], zero for a source past the end.

    `place_I` is the way back, for each of `copies` copies of every row: both ways are
    then gathers, where the transpose of one would be a scatter.
    """
    return _taken(x_ID, source_O, copies)


def _moved_forward(x_ID, source_O, place_I, copies):
    return _taken(x_ID, source_O, copies), place_I


def _moved_backward(copies, place_I, g_OD):
    g_ID = _taken(g_OD, place_I, 1)
    g_ICD = g_ID.reshape(-1, copies, g_ID.shape[-1]).astype(jnp.float32)
    return jnp.sum(g_ICD, axis=1).astype(g_OD.dtype), None, None


moved.defvjp(_moved_forward, _moved_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def grouped(
    x_RI: jax.Array,
    w_EIO: jax.Array,
    sizes_E: jax.Array,
    partition: jax.sharding.PartitionSpec,
    align: int,
    policy: Policy,
    traffic: Traffic = PLAIN,
) -> jax.Array:
    """Rows times the matrix of their group, in compute dtype.

    As the seam's einsum: `w_EIO`, laid out as `partition`, is gathered by
    `traffic`, again in the backward pass, and its gradient leaves in `policy.reduce`,
    summed over all devices that see it.
    """
    w_EIO = traffic.gather(w_EIO, partition, policy)
    return _product(x_RI, w_EIO, sizes_E, align, policy)


def _grouped_forward(x_RI, w_EIO, sizes_E, partition, align, policy, traffic):
    y_RO = grouped(x_RI, w_EIO, sizes_E, partition, align, policy, traffic)
    return y_RO, (x_RI, w_EIO, sizes_E)


def _grouped_backward(partition, align, policy, traffic, residuals, g_RO):
    x_RI, w_EIO, sizes_E = residuals
    whole_EIO = traffic.gather(w_EIO, partition, policy)
    dx_RI = _product(g_RO, whole_EIO, sizes_E, align, policy, transposed=True)
    dw_EIO = _outer(x_RI, g_RO, sizes_E, align, policy)
    dw_EIO = traffic.reduce(dw_EIO, partition, policy)
    over = varies_over(dw_EIO) - varies_over(w_EIO)
    return dx_RI, jax.lax.psum(dw_EIO, tuple(over)).astype(w_EIO.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)


def expert_of_rows(sizes_E: jax.Array, rows: int) -> jax.Array:
    """The expert of each place, the last one past the end."""
    return _owner(sizes_E, jnp.arange(rows, dtype=jnp.int32))


def _product(x_RI, w_EIO, sizes_E, align, policy, *, transposed=False):
    outer = w_EIO.shape[1 if transposed else 2]
    if _has_kernel(x_RI, outer):
        # By its public name, which loads the module: other devices need none of it.
        return jaxinfra.grouped_on_hopper(x_RI, w_EIO, sizes_E, transposed=transposed)
    w_EIO = jnp.swapaxes(w_EIO, 1, 2) if transposed else w_EIO
    if _has_ragged():
        return jax.lax.ragged_dot(
            x_RI,
            w_EIO,
            sizes_E,
            precision=policy.matmul_precision,
            preferred_element_type=policy.compute,
        )

    def block(x_SI, expert, is_used):
        multiply = lambda x_SI, w_IO: jnp.dot(
            x_SI,
            w_IO,
            precision=policy.matmul_precision,
            preferred_element_type=policy.compute,
        )
        nothing = lambda x_SI, w_IO: varying_like(
            jnp.zeros((align, w_IO.shape[1]), policy.compute), x_SI, w_IO
        )
        return jax.lax.cond(is_used, multiply, nothing, x_SI, w_EIO[expert])

    _, y_BSO = jax.lax.scan(
        lambda _, xs: (None, block(*xs)), None, _in_blocks((x_RI,), sizes_E, align)
    )
    return y_BSO.reshape(-1, w_EIO.shape[2])


def _outer(x_RI, g_RO, sizes_E, align, policy):
    """Sum over each group's rows of x g^T, float32 [E, I, O]."""
    if _has_ragged():
        return jax.lax.ragged_dot_general(
            x_RI,
            g_RO,
            sizes_E,
            _RAGGED,
            precision=policy.matmul_precision,
            preferred_element_type=policy.accumulate,
        )

    # Not of float16: sums over all tokens may be too large for it.
    is_bfloat16 = x_RI.dtype == jnp.bfloat16 and x_RI.shape[1] % 128 == 0
    if is_bfloat16 and _has_kernel(x_RI, g_RO.shape[1]):
        dw_EIO = jaxinfra.outer_on_hopper(x_RI, g_RO, sizes_E)
        return dw_EIO.astype(policy.accumulate)

    def add(dw_EIO, block):
        x_SI, g_SO, expert, is_used = block
        more = lambda dw_EIO: dw_EIO.at[expert].add(
            jnp.dot(
                x_SI.T,
                g_SO,
                precision=policy.matmul_precision,
                preferred_element_type=policy.accumulate,
            )
        )
        return jax.lax.cond(is_used, more, lambda dw_EIO: dw_EIO, dw_EIO), None

    shape = (sizes_E.size, x_RI.shape[1], g_RO.shape[1])
    zeros = varying_like(jnp.zeros(shape, policy.accumulate), x_RI, g_RO)
    blocks = _in_blocks((x_RI, g_RO), sizes_E, align)
    return jax.lax.scan(add, zeros, blocks)[0]


def _in_blocks(arrays, sizes_E, align):
    """(*arrays by block, the expert of each block, whether there are rows in it)."""
    blocks = [x.reshape(-1, align, x.shape[-1]) for x in arrays]
    start_B = jnp.arange(len(blocks[0]), dtype=jnp.int32) * align
    # The branch is a collective's neighbour: all its operands vary alike.
    kinds = _owner(sizes_E, start_B), start_B < jnp.sum(sizes_E)
    return (*blocks, *(varying_like(x, *arrays) for x in kinds))


def _taken(x_ID, source_O, copies):
    return x_ID.at[source_O // copies].get(mode="fill", fill_value=0)


def _counts(ids_A: jax.Array, num_experts: int) -> jax.Array:
    zeros = varying_like(jnp.zeros(num_experts, jnp.int32), ids_A)
    return zeros.at[ids_A].add(1, mode="drop")


def _before(sizes_E: jax.Array) -> jax.Array:
    """Sum of those before each."""
    return jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E


def _owner(sizes_E: jax.Array, places: jax.Array) -> jax.Array:
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    found = jnp.searchsorted(ends_E, places, side="right").astype(jnp.int32)
    return jnp.minimum(found, sizes_E.size - 1)


def _has_ragged() -> bool:
    return mesh.platform() == "tpu"


def _has_kernel(x_RI: jax.Array, outer: int) -> bool:
    """Whether the device is a Hopper GPU whose kernel takes such rows, to be multiplied
    by matrices with `outer` columns."""
    R, inner = x_RI.shape
    is_large = R >= 192 and inner % 64 == 0 and outer % 128 == 0
    is_16_bits = x_RI.dtype in (jnp.bfloat16, jnp.float16)
    return is_16_bits and is_large and _device_kind().startswith(_HOPPER)


def _device_kind() -> str:
    """Of the devices of the mesh that is set, which may be compiled for from afar."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "device_kind", None) or jax.devices()[0].device_kind
