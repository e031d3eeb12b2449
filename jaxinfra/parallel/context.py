"""A row's length split over devices: attention across the mesh axis `context`.

Three ways, all equal to attention over whole rows. `ring`: keys and values go round the
devices, each of which meets what passes. `all_gather`: they come to every device at
once. For both a row is cut into 2 P chunks and device i has chunks i and 2 P - 1 - i:
late queries see many keys and early ones few, so this gives all devices the same work.
`ulysses`: heads are exchanged for length, so that a device has whole rows of some heads
and any kernel serves.

Source: arXiv:2310.01889 (ring), arXiv:2311.09431 (balanced order), arXiv:2309.14509
(Ulysses).
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxinfra import sharding
from jaxinfra.ops import attention, fused_attention
from jaxinfra.ops.seam import Attend
from jaxinfra.parallel import gathered, meeting, ring
from jaxinfra.parallel.context_part import Settings
from jaxinfra.sharding import Rules

Way = Literal["ring", "ulysses", "all_gather"]


def make_split_attend(rules: Rules, *, way: Way, kernel: str | None = None) -> Attend:
    """Attention for training where `context` splits the rows, which must stand in
    `row_order`. `kernel`: of `attention.KERNELS`, or the mesh platform's own."""

    def attend(q_BTKGH, k_BSKH, v_BSKH, context, cache, *, window, softcap):
        devices = jax.sharding.get_abstract_mesh().shape["context"]
        chosen = attention.choose_kernel(
            kernel,
            q_BTKGH,
            context.segments_BT,
            window=window,
            softcap=softcap,
            chunks=1 if way == "ulysses" else 2 * devices,
            refused=_refused(way, window),
        )
        settings = {"window": window, "softcap": softcap, "kernel": chosen}
        match way:
            case "ring":
                settings = Settings(**settings)
                local = functools.partial(_in_parts, ring.attend, settings)
            case "all_gather":
                settings = Settings(**settings)
                local = functools.partial(_in_parts, gathered.attend, settings)
            case "ulysses":
                local = functools.partial(_ulysses, **settings)
        tokens = functools.partial(sharding.spec, rules, "batch", "length")
        heads = functools.partial(tokens, "heads")
        mapped = jax.shard_map(
            local,
            in_specs=(heads(None, None), heads(None), heads(None), tokens()),
            out_specs=heads(None, None),
            check_vma=False,  # Pallas kernels do not say what their results vary over
        )
        a_BTKGH = mapped(q_BTKGH, k_BSKH, v_BSKH, context.segments_BT)
        if way == "ulysses":  # the others name it themselves
            a_BTKGH = checkpoint_name(a_BTKGH, "attention")
        return a_BTKGH, cache

    return attend


def row_order(length: int, *, parts: int, way: Way) -> np.ndarray | None:
    """int32 [length]: the token of a row that stands in each place, so that equal parts
    of the places have equal work; None where that is the row as it is."""
    if parts == 1 or way == "ulysses":
        return None
    if length % (2 * parts):
        raise ValueError(
            f"rows of {length} tokens do not divide into two chunks for each of the "
            f"{parts} devices along 'context'; take a multiple of {2 * parts}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    both = [(part, 2 * parts - 1 - part) for part in range(parts)]
    return np.concatenate([chunks[list(pair)].reshape(-1) for pair in both])


def _refused(way: Way, window: int) -> dict[str, str]:
    """Why a fused kernel does not serve inside `way`, by its name."""
    if way == "ulysses" or not window:
        return {}
    where = "in a ring" if way == "ring" else "over gathered keys"
    return {"cudnn": f"a window {where}"}


def _in_parts(attend, settings: Settings, q_BTKGH, k_BSKH, v_BSKH, segments_BT):
    """By `attend`, which meets keys in parts, with queries as its kernel takes them."""
    q_BTKGH = meeting.ready(q_BTKGH, settings.kernel)
    return attend(q_BTKGH, k_BSKH, v_BSKH, segments_BT, settings)


def _ulysses(q_BTKGH, k_BSKH, v_BSKH, segments_BT, *, window, softcap, kernel):
    """Whole rows of 1/P of the heads, by `kernel`, and back."""
    P = jax.lax.axis_size("context")
    shape = q_BTKGH.shape
    K, G = shape[2], shape[3]
    # Fewer key heads than devices: each is copied, and its queries are shared out.
    copies = P // math.gcd(K, P)
    if G % copies:
        raise ValueError(
            f"parallel.context='ulysses' cannot share {K} key heads of {G} queries each"
            f" out over mesh axis 'context' of size {P}; take parallel.context='ring'"
        )
    q_BTKGH = q_BTKGH.reshape(*shape[:2], K * copies, G // copies, shape[4])
    if copies > 1:
        k_BSKH, v_BSKH = (jnp.repeat(x, copies, axis=2) for x in (k_BSKH, v_BSKH))
    to_heads = lambda x: jax.lax.all_to_all(x, "context", 2, 1, tiled=True)
    whole = None
    if segments_BT is not None:
        whole = jax.lax.all_gather(segments_BT, "context", axis=1, tiled=True)
    given = map(to_heads, (q_BTKGH, k_BSKH, v_BSKH))
    settings = {"window": window, "softcap": softcap}
    if kernel == "xla":
        out = attention.xla(*given, whole, whole, **settings)
    else:
        fused = fused_attention.splash if kernel == "splash" else fused_attention.cudnn
        out = fused(*given, whole, **settings)
    return jax.lax.all_to_all(out, "context", 1, 2, tiled=True).reshape(shape)
