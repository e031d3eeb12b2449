"""Causal attention: one function for each kernel, and the table that chooses.

The table says which features a kernel covers. `make_attend` takes the platform's first
choice, or where that does not cover the case `xla`, and says so once. Kernels: `splash`
(Pallas, TPU), `cudnn` (GPU), `xla` (blocks, anywhere); the first two are fused, see
one device's rows and heads, and are in `fused_attention`.
"""

import functools
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import jaxinfra
from jaxinfra import mesh, sharding
from jaxinfra.ops.seam import Attend
from jaxinfra.sharding import Rules


class Case(NamedTuple):
    """What a call of attention asks for."""

    segments: bool
    window: bool
    softcap: bool
    grouped: bool


# Features that each kernel covers; all cover causal masks and forward + backward.
KERNELS = {
    "splash": Case(segments=True, window=True, softcap=True, grouped=True),
    "cudnn": Case(segments=True, window=True, softcap=False, grouped=True),
    "xla": Case(segments=True, window=True, softcap=True, grouped=True),
}
PLATFORM_KERNEL = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "cpu": "xla"}
LANES = 128  # of a TPU register: splash's blocks are multiples of it


def table() -> str:
    """The table kernel x feature, as text."""
    lines = ["kernel  " + "  ".join(Case._fields)]
    for kernel, covers in KERNELS.items():
        cells = [
            ("yes" if has else "no").ljust(len(name))
            for name, has in zip(Case._fields, covers, strict=True)
        ]
        lines.append(f"{kernel:<8}" + "  ".join(cells).rstrip())
    return "\n".join(lines)


def make_attend(rules: Rules, *, kernel: str | None = None) -> Attend:
    """Attention for training, by `kernel` or the mesh platform's own."""

    def attend(q_BTKGH, k_BSKH, v_BSKH, context, cache, *, window, softcap):
        segments_BT = context.segments_BT
        name = choose_kernel(
            kernel, q_BTKGH, segments_BT, window=window, softcap=softcap
        )
        if name == "xla":
            keys = jax.tree.map(_whole_length, (k_BSKH, v_BSKH, segments_BT))
            out = xla(q_BTKGH, *keys, segments_BT, window=window, softcap=softcap)
            return checkpoint_name(out, "attention"), cache
        # By its public name, which loads the module: on CPU none of it is needed.
        fused = jaxinfra.fused_attention(name)
        tokens = functools.partial(sharding.spec, rules, "batch", "length")
        heads = functools.partial(tokens, "heads")
        mapped = jax.shard_map(
            functools.partial(fused, window=window, softcap=softcap),
            in_specs=(heads(None, None), heads(None), heads(None), tokens()),
            out_specs=heads(None, None),
            check_vma=False,
        )
        return mapped(q_BTKGH, k_BSKH, v_BSKH, segments_BT), cache

    return attend


def choose_kernel(
    kernel: str | None,
    q_BTKGH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int,
    softcap: float,
    chunks: int = 1,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """`kernel`, or the mesh platform's own; "xla", said once, if that does not cover
    the case. chunks: into which rows are cut, of which a kernel sees one or two.
    refused: why a fused kernel cannot be used there, by its name."""
    case = Case(segments_BT is not None, window > 0, softcap > 0, q_BTKGH.shape[3] > 1)
    name = kernel or PLATFORM_KERNEL.get(mesh.platform(), "xla")
    reason = name != "xla" and _uncovered(name, case, q_BTKGH, chunks)
    if reason := reason or refused.get(name):
        say_once(f"attention: {name} does not cover {reason}; xla is used instead")
        name = "xla"
    return name


def xla(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
    block: int = 512,
) -> jax.Array:
    """Causal attention in blocks of queries, each against the keys it may see.

    Scores exist for one block at a time, forward and backward (several blocks are
    rematerialised), so memory is linear in T. Softmax in float32.
    Limits: at most 32 blocks, so beyond 16k tokens a block grows with T.
    Source: arXiv:1706.03762 eq. 1; arXiv:2112.05682 for the blocks.
    """
    T = q_BTKGH.shape[1]
    block = max(block, -(-T // 32))
    one = functools.partial(_block, window=window, softcap=softcap)
    if block >= T:
        return one(q_BTKGH, k_BSKH, v_BSKH, segments_BT, segments_BS, first=0, low=0)
    outs = []
    for first in range(0, T, block):
        last = min(first + block, T)
        low = max(0, first - window + 1) if window else 0
        queries, keys = slice(first, last), slice(low, last)
        part = functools.partial(one, first=first, low=low)
        outs.append(
            jax.checkpoint(part)(
                q_BTKGH[:, queries],
                k_BSKH[:, keys],
                v_BSKH[:, keys],
                None if segments_BT is None else segments_BT[:, queries],
                None if segments_BS is None else segments_BS[:, keys],
            )
        )
    return jnp.concatenate(outs, axis=1)


def _block(q_BTKGH, k_BSKH, v_BSKH, seg_BT, seg_BS, *, first, low, window, softcap):
    """Queries from position `first` on against keys from position `low` on."""
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    query_T1 = first + jnp.arange(T)[:, None]
    key_1S = low + jnp.arange(S)[None, :]
    seen_TS = key_1S <= query_T1
    if window:
        seen_TS &= query_T1 - key_1S < window
    seen_BTS = seen_TS[None]
    if seg_BT is not None:
        seen_BTS = seen_BTS & (seg_BT[:, :, None] == seg_BS[:, None, :])
    return masked(q_BTKGH, k_BSKH, v_BSKH, seen_BTS, softcap=softcap)


def masked(q_BTKGH, k_BSKH, v_BSKH, seen_BTS, *, softcap: float) -> jax.Array:
    """Attention over the keys that `seen_BTS` marks (at least one for each query)."""
    full = precision(q_BTKGH)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        q_BTKGH * jnp.asarray(1.0 / math.sqrt(q_BTKGH.shape[-1]), q_BTKGH.dtype),
        k_BSKH,
        precision=full,
        preferred_element_type=jnp.float32,
    )
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights_BKGTS,
        v_BSKH,
        precision=full,
        preferred_element_type=jnp.float32,
    ).astype(q_BTKGH.dtype)


def _whole_length(x: jax.Array) -> jax.Array:
    """Keys are read whole by every query: gathered over `context`."""
    return jax.reshard(x, sharding.gathered(jax.typeof(x).sharding.spec, "context"))


def _uncovered(kernel: str, case: Case, q_BTKGH: jax.Array, chunks: int) -> str:
    """Why a fused kernel cannot do it; empty if it can."""
    covers = KERNELS[kernel]
    missing = [n for n in Case._fields if getattr(case, n) and not getattr(covers, n)]
    if missing:
        return " + ".join(missing)
    chunk = q_BTKGH.shape[1] // chunks
    if kernel == "splash":
        return splash_uncovered(length=chunk)
    most = 2**14 // min(chunks, 2)  # a mask of the square of all that it sees
    return _cudnn_uncovered(q_BTKGH, chunk, most if case.segments else 0)


def splash_uncovered(*, length: int) -> str:
    """Why splash cannot take rows of this length; empty if it can."""
    if length % LANES:
        return f"a length of {length}, which is no multiple of {LANES}"
    return ""


def _cudnn_uncovered(q_BTKGH: jax.Array, length: int, most: int) -> str:
    """Why cuDNN cannot take such rows and heads; empty if it can. most: tokens of a row
    of documents; 0 without them."""
    width, dtype = q_BTKGH.shape[-1], q_BTKGH.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {dtype}"
    if width % 8 or width > 128:
        return f"heads of width {width}"
    if most and (length % 2 or length > most):
        return f"documents in rows of {length}"
    return ""


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full for float32, which a TPU would multiply in bfloat16."""
    is_full = x.dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if is_full else jax.lax.Precision.DEFAULT


@functools.cache
def say_once(message: str) -> None:
    """A warning of what is not done as one may expect."""
    logging.getLogger("jaxinfra").warning(message)
