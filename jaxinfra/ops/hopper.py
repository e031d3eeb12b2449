"""Grouped matmuls on Hopper GPUs, by the kernels that jax ships for them.

Measured on one H100 (jax 0.11.2, bfloat16), milliseconds: a plain matmul of the same
work; blocks of 512 rows, one after another; these, forward, to rows and to weights:

| 16,384 rows, 8 experts of 2048 x 4096 | 0.38 | 2.04 | 0.45 | 0.48 | 0.47 |
| 65,536 rows, 128 experts of 2048 x 768 | 0.30 | 7.1 | 0.50 | 0.74 | 0.54 |

Results of the first are those of plain matmuls, bit by bit (to weights: of ones that
are rounded to bfloat16). The kernels were measured alone, not yet within a step.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import (
    ragged_dot_mgpu,
    transposed_ragged_dot_mgpu,
)

from jaxinfra.ops.varying import varying_like

DEPTH, STEPS = 64, 4  # of a step along what is summed over; of steps in flight


def grouped_on_hopper(
    x_RI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
    """Rows times the matrix of their group, in their dtype, of 16 bits: [R, O]; rows
    past the last group give zeros. transposed: w is [E, O, I]. R is at least 192, I a
    multiple of 64, O of 128."""
    R, outer = x_RI.shape[0], w_EIO.shape[1 if transposed else 2]
    rows, columns, turn = _tile(outer, transposed)
    y_RO = ragged_dot_mgpu.ragged_dot(
        x_RI,
        w_EIO,
        group_sizes=sizes_E,
        transpose_rhs=transposed,
        block_m=rows,
        block_n=columns,
        block_k=DEPTH,
        max_concurrent_steps=STEPS,
        grid_block_n=turn,
    )
    y_RO = varying_like(y_RO, x_RI, w_EIO)
    # The kernel leaves the memory of rows without a group as it finds it.
    is_of_group_R1 = jnp.arange(R, dtype=jnp.int32)[:, None] < jnp.sum(sizes_E)
    return jnp.where(is_of_group_R1, y_RO, 0)


def outer_on_hopper(x_RI: jax.Array, g_RO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The sum over each group's rows of x g^T, [E, I, O], made in float32 and rounded
    to their dtype. I and O are multiples of 128."""
    with _asked_for_multiprocessors():
        dw_EIO = transposed_ragged_dot_mgpu.transposed_ragged_dot(
            x_RI,
            g_RO,
            group_sizes=sizes_E,
            block_m=128,
            block_n=128,
            block_k=DEPTH,
            max_concurrent_steps=STEPS,
            grid_block_n=1,
        )
    return varying_like(dw_EIO, x_RI, g_RO)


class _Afar:
    """jax, as a kernel sees it that asks the first device here how many multiprocessors
    it has, when it is compiled for a device that is not here."""

    def __init__(self, num_cores: int):
        self._devices = [types.SimpleNamespace(core_count=num_cores)]

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def devices(self) -> list[Any]:
        return self._devices


@contextlib.contextmanager
def _asked_for_multiprocessors() -> Iterator[None]:
    """While the kernel is traced, the mesh's device answers, here or not."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if hasattr(jax.devices()[0], "core_count") or described is None:
        yield
        return
    kernel: Any = transposed_ragged_dot_mgpu
    kernel.jax = _Afar(described.num_cores)
    try:
        yield
    finally:
        kernel.jax = jax


def _tile(outer: int, transposed: bool) -> tuple[int, int, int]:
    """(its rows, its columns, how many side by side are computed one after another, so
    that they find their rows in the cache): the fastest of those that were measured
    (scripts/peers/grouped_kernels.py)."""
    if outer % (8 * 128) == 0:
        return 128 if transposed else 192, 128, 8
    if outer % (4 * 192) == 0 and not transposed:
        return 128, 192, 4
    tiles = outer // 128
    return 128, 128, next(n for n in (4, 2, 1) if tiles % n == 0)
