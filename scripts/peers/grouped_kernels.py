"""Grouped matmuls on one Hopper GPU, in bfloat16: what a loop over blocks takes, and
what jax's kernels do by their tiles, forward, to rows (`dx`) and to weights (`dw`).

    python scripts/peers/grouped_kernels.py        one JSON object a line

error: the largest, of the result's largest number, against one matmul an expert; told
where there are few experts. "branch": of a block without rows nothing is multiplied, as
in `ops.grouped`. `scripts/results/grouped_h100.jsonl` is what an earlier form of this
printed, with other names of blocks and fewer tiles.
"""

import functools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]
import device  # noqa: E402  # pyright: ignore[reportMissingImports]
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental.pallas.ops.gpu import (  # noqa: E402
    ragged_dot_mgpu,
    transposed_ragged_dot_mgpu,
)

# Rows, width of x, of y, experts: Mixtral's kind and Qwen 3 MoE's.
SHAPES = [(16384, 2048, 4096, 8), (65536, 2048, 768, 128)]
# Rows and columns of a tile, its step, steps in flight, tiles side by side.
TILES = [(128, 128, 64, 4, 8), (192, 128, 64, 4, 8), (128, 192, 64, 4, 4),
         (64, 256, 64, 4, 4), (128, 256, 64, 4, 4)]  # fmt: skip
NAMES = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")


def main() -> None:
    for N, D, F, E in SHAPES:
        draw = lambda i, *of: jax.random.normal(jax.random.key(i), of, jnp.bfloat16)
        owner_N = jnp.sort(jax.random.randint(jax.random.key(0), (N,), 0, E))
        sizes_E = jnp.bincount(owner_N, length=E).astype(jnp.int32)
        x_ND, w_EDF, g_NF = draw(1, N, D), draw(2, E, D, F), draw(3, N, F)
        tell = functools.partial(_tell, shape=[N, D, F, E], flops=2 * N * D * F)
        tell("plain", lambda x, w: x @ w[0], x_ND, w_EDF)
        is_few = E <= 8

        def alone(x_NI, w_EIO, owner_N=owner_N, E=E):
            y = jnp.zeros((len(x_NI), w_EIO.shape[2]), x_NI.dtype)
            for e in range(E):
                y = jnp.where((owner_N == e)[:, None], x_NI @ w_EIO[e], y)
            return y

        def each(x_NI, g_NO, owner_N=owner_N, E=E):
            mine = lambda e: jnp.where((owner_N == e)[:, None], x_NI, 0).T @ g_NO
            return jnp.stack([mine(e) for e in range(E)])

        forward = jax.jit(alone)(x_ND, w_EDF) if is_few else None
        to_rows = jax.jit(alone)(g_NF, w_EDF.swapaxes(1, 2)) if is_few else None
        to_weights = jax.jit(each)(x_ND, g_NF) if is_few else None
        for rows, branch in ((512, True), (512, False), (1024, False)):
            name = f"blocks {rows}{', branch' * branch}"
            tell(name, functools.partial(_blocks, rows, branch), x_ND, w_EDF)
        for tile in TILES:
            for name, kernel, args, expected, columns in [
                ("forward", ragged_dot_mgpu.ragged_dot, (x_ND, w_EDF), forward, F),
                ("dx", functools.partial(ragged_dot_mgpu.ragged_dot,
                 transpose_rhs=True), (g_NF, w_EDF), to_rows, D),
                ("dw", transposed_ragged_dot_mgpu.transposed_ragged_dot,
                 (x_ND, g_NF), to_weights, F),
            ]:  # fmt: skip
                how = dict(zip(NAMES, tile, strict=True))
                if columns % how["block_n"]:
                    continue
                if columns % (how["block_n"] * how["grid_block_n"]):
                    how["grid_block_n"] = 1
                run = functools.partial(kernel, group_sizes=sizes_E, **how)
                tell(name, run, *args, expected=expected, tile=list(how.values()))


def _blocks(rows: int, branch: bool, x_ND: jax.Array, w_EDF: jax.Array) -> jax.Array:
    """As many blocks as there are, each with the matrix of one expert."""
    blocks = x_ND.reshape(-1, rows, x_ND.shape[1])
    expert_S = jnp.arange(len(blocks)) * len(w_EDF) // len(blocks)
    is_used_S = expert_S >= 0

    def multiply(_, one):
        x_SD, expert, is_used = one
        if not branch:
            return None, x_SD @ w_EDF[expert]
        nothing = lambda x, w: jnp.zeros((rows, w.shape[1]), x.dtype)
        return None, jax.lax.cond(is_used, jnp.dot, nothing, x_SD, w_EDF[expert])

    return jax.lax.scan(multiply, None, (blocks, expert_S, is_used_S))[1]


def _tell(name, run, *args, shape, flops, expected=None, tile=None) -> None:
    found = {"what": name, "shape": shape, "tile": tile}
    try:
        run = jax.jit(run)
        if expected is not None:
            off = jnp.abs(jnp.float32(run(*args)) - jnp.float32(expected))
            found["error"] = float(off.max() / jnp.abs(jnp.float32(expected)).max())
        secs = device.timed(run, *args, repeats=3)
        found |= {"ms": 1e3 * secs, "tflops": flops / secs / 1e12}
    except Exception as error:  # a tile that does not fit must not end the others
        found["failed"] = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
