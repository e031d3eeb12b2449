"""First contact with an accelerator: what it can do, and whether we do it right there.

Every figure comes with what it is measured against: kernels with a float32 reference,
seconds with FLOPs or bytes. Sizes follow the platform, so that the same command runs on
a laptop's CPU in a minute and fills an accelerator.
"""

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import timed_steps  # pyright: ignore[reportMissingImports]

import jaxinfra
from jaxinfra import config as c
from jaxinfra import mesh as meshes
from jaxinfra.ops import attention, fused_attention, grouped
from jaxinfra.parallel import meeting
from jaxinfra.precision import policy
from jaxinfra.train import facts

# rows, length, key heads, query heads a key head, head width; width of matrices; of a
# model: width, layers, rows, length; MiB to move.
SIZES = {
    "cpu": {
        "attention": (1, 512, 2, 2, 64),
        "matrix": 1024,
        "experts": (2048, 256, 512, 8),
        "model": (128, 2, 4, 256),
        "mib": 64,
    },
    "accelerator": {
        "attention": (4, 4096, 4, 4, 128),
        "matrix": 8192,
        "experts": (16384, 2048, 4096, 8),
        "model": (2048, 12, 8, 2048),
        "mib": 1024,
    },
}
# bfloat16 has 8 bits: results about 1 are rounded by 2^-9, sums of a row's gradients by
# a few times that.
BF16_ROUNDING = 2e-2


def report(repeats: int = 5) -> dict:
    """Everything, as one JSON object; what cannot run says why. Each part is told as it
    ends: blocked XLA attention has so many shapes that a GPU's compiler may take
    minutes over it."""
    device = jax.devices()[0]
    platform = "cpu" if device.platform == "cpu" else "accelerator"
    sizes = SIZES[platform]
    measured = {
        "matmul": lambda: matmul(sizes["matrix"], repeats),
        "memory": lambda: memory(sizes["mib"], repeats),
        "host": lambda: host(sizes["mib"], repeats),
        "links": lambda: links(sizes["mib"], repeats),
        "experts": lambda: experts(sizes["experts"], repeats),
        "step": lambda: step(sizes["model"], repeats),
        "parts": lambda: parts(sizes["attention"], repeats),
        "attention": lambda: kernels(sizes["attention"], repeats),
    }
    result = {
        "device": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "peak_flops": facts.peak_flops(device),
    }
    for name, part in measured.items():
        begin = time.perf_counter()
        try:
            result[name] = part()
        except Exception as error:  # one part that fails must not hide the others
            result[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        took = f"{time.perf_counter() - begin:.0f} s"
        print(name, took, json.dumps(result[name]), file=sys.stderr, flush=True)
    return result


def matmul(size: int, repeats: int) -> dict:
    """FLOP/s of square products, and of the peak."""
    peak, found = facts.peak_flops(jax.devices()[0]), {}
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        secs = timed(jax.jit(lambda x: x @ x), x, repeats=repeats)
        rate = 2 * size**3 / secs
        found[jnp.dtype(dtype).name] = {
            "secs": secs,
            "flops": rate,
            "of_peak": peak and rate / peak,
        }
    return found


def memory(mib: int, repeats: int) -> dict:
    """Bytes a second that an addition reads and writes on the device."""
    x = jnp.zeros(mib * 2**18, jnp.float32)
    secs = timed(jax.jit(lambda x: x + 1), x, repeats=repeats)
    return {"secs": secs, "bytes_per_sec": 2 * x.nbytes / secs}


def host(mib: int, repeats: int) -> dict:
    """Bytes a second to the device and back, and by pinned memory, where optimizer
    state and activations may be offloaded to, if there is any."""
    device = jax.devices()[0]
    on_host = np.zeros(mib * 2**18, np.float32)
    on_device = jax.device_put(on_host, device)
    kinds = [kind.kind for kind in device.addressable_memories()]
    found = {
        "memories": kinds,
        "to_device_bytes_per_sec": on_host.nbytes
        / timed(lambda: jax.device_put(on_host, device), repeats=repeats),
        # Copied first: an array keeps what it has once been read as.
        "to_host_bytes_per_sec": on_host.nbytes
        / timed(lambda: np.asarray(on_device + 0), repeats=repeats),
    }
    if "pinned_host" not in kinds:
        return found
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    here = jax.sharding.SingleDeviceSharding(device)
    away = jax.device_put(on_device, pinned)
    for name, x, place in (("offload", on_device, pinned), ("fetch", away, here)):
        secs = timed(lambda x=x, place=place: jax.device_put(x, place), repeats=repeats)
        found[f"{name}_bytes_per_sec"] = on_host.nbytes / secs
    is_same = np.array_equal(np.asarray(away), on_host)
    return found | {"offload_is_bitwise": bool(is_same)}


def links(mib: int, repeats: int) -> dict:
    """Bytes a second and device of collectives over all devices, by the bytes that one
    must send at least."""
    count = jax.device_count()
    if count == 1:
        return {"skipped": "one device has no link"}
    grid = meshes.make_mesh({"fsdp": count})
    with jax.set_mesh(grid):
        split = jax.NamedSharding(grid, jax.P("fsdp"))
        size = mib * 2**18 // count**2 * count**2
        x = jax.device_put(np.zeros(size, np.float32), split)
        own = x.nbytes // count
        ring = [(i, (i + 1) % count) for i in range(count)]
        kinds = {
            "all_gather": (
                lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
                own * (count - 1),
                jax.P(None),
            ),
            "reduce_scatter": (
                lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
                own * (count - 1) // count,
                jax.P("fsdp"),
            ),
            "all_reduce": (
                lambda x: jax.lax.psum(x, "fsdp"),
                2 * own * (count - 1) // count,
                jax.P(None),
            ),
            "all_to_all": (
                lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
                own * (count - 1) // count,
                jax.P("fsdp"),
            ),
            "ppermute": (
                lambda x: jax.lax.ppermute(x, "fsdp", ring),
                own,
                jax.P("fsdp"),
            ),
        }
        found = {}
        for name, (function, sent, out) in kinds.items():
            mapped = jax.shard_map(
                function, in_specs=jax.P("fsdp"), out_specs=out, check_vma=False
            )
            secs = timed(jax.jit(mapped), x, repeats=repeats)
            found[name] = {"secs": secs, "bytes_per_sec": sent / secs}
        return found


def kernels(sizes: tuple[int, ...], repeats: int) -> dict:
    """Every attention kernel that runs here, forward and backward in bfloat16, against
    float32."""
    B, T, K, G, H = sizes
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    exact = [draw(0, B, T, K, G, H), draw(1, B, T, K, H), draw(2, B, T, K, H)]
    g_BTKGH = draw(3, B, T, K, G, H)
    given = [x.astype(jnp.bfloat16) for x in exact]
    # As in training: without them a GPU's compiler tries many ways for each shape.
    options = jaxinfra.options_for(meshes.make_mesh({"data": jax.device_count()}))
    run = lambda kernel: jax.jit(
        functools.partial(_both, kernel), compiler_options=options
    )
    with_xla = lambda q, k, v: attention.xla(q, k, v, None, None)
    rounded = [x.astype(jnp.float32) for x in given]
    expected = run(_by_row)(*rounded, g_BTKGH)
    flops = 3.5 * 2 * B * K * G * T * T * H  # causal: half of 4 products of each pass
    platform = jax.devices()[0].platform
    found = {}
    settings = {"window": 0, "softcap": 0.0}
    candidates = {}
    if platform == "tpu":
        candidates["splash"] = lambda q, k, v: fused_attention.splash(
            q, k, v, None, **settings
        )
    if platform in ("gpu", "cuda"):
        candidates["cudnn"] = lambda q, k, v: fused_attention.cudnn(
            q, k, v, None, **settings
        )
    candidates["xla"] = with_xla  # the last: it has the most to compile
    for name, kernel in candidates.items():
        both = run(kernel)
        got = both(*given, g_BTKGH)
        error = _error(got, expected)
        secs = timed(both, *given, g_BTKGH, repeats=repeats)
        found[name] = {
            "error": error,
            "is_right": error < BF16_ROUNDING,
            "secs": secs,
            "flops": flops / secs,
        }
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def parts(sizes: tuple[int, ...], repeats: int) -> dict:
    """What a device of a ring computes of rows in two halves, as the later one's: its
    queries meet their own keys, causally, and all earlier ones. By the kernel of a ring
    here, forward and backward in bfloat16, with documents and without, against
    float32."""
    B, T, K, G, H = sizes
    half = T // 2
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    q, k, v = draw(0, B, T, K, G, H), draw(1, B, T, K, H), draw(2, B, T, K, H)
    g = draw(3, B, T, K, G, H).at[:, :half].set(0)
    places_T = jnp.arange(T)
    platform = jax.devices()[0].platform
    kernel = attention.PLATFORM_KERNEL.get(platform, "xla")
    how = {"kernel": kernel, "window": 0, "softcap": 0.0}
    options = jaxinfra.options_for(meshes.make_mesh({"data": jax.device_count()}))

    def later(q, k, v, g, segments_BT):
        of = lambda tree, at: jax.tree.map(
            lambda x: x[at] if x.ndim == 1 else x[:, at], tree
        )
        early, late = slice(0, half), slice(half, T)
        ready, by_late = jax.vjp(lambda q: meeting.ready(q, kernel), q[:, late])
        queries = of(meeting.Queries(q, places_T, segments_BT), late)
        queries = queries._replace(q_BTKGH=ready)
        keys = meeting.Keys(k, v, places_T, segments_BT)
        own, before = of(keys, late), of(keys, early)
        result = meeting.merged(
            meeting.forward(queries, own, seen="own", **how),
            meeting.forward(queries, before, seen="all", **how),
        )
        out = result.out_BTKGH.astype(q.dtype)
        asked = meeting.asked(g[:, late], out, result.log_sum_BTKG)
        dq, *of_own = meeting.backward(queries, own, asked, seen="own", **how)
        more, *of_before = meeting.backward(queries, before, asked, seen="all", **how)
        both = zip(of_before, of_own, strict=True)
        [dq] = by_late((dq.astype(jnp.float32) + more).astype(q.dtype))
        return out, dq, *(jnp.concatenate(pair, axis=1) for pair in both)

    found: dict = {"kernel": kernel}
    documents_BT = 1 + (places_T > T // 3) + (places_T > T - T // 8) + jnp.zeros((B, 1))
    for name, segments_BT in (("whole", None), ("documents", documents_BT)):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        exact = functools.partial(_by_row, segments_BT=segments_BT)
        expected = list(jax.jit(functools.partial(_both, exact))(*wide, g))
        expected[:2] = [x[:, half:] for x in expected[:2]]
        if segments_BT is not None:
            segments_BT = segments_BT.astype(jnp.int32)
        run = jax.jit(later, compiler_options=options)
        error = _error(run(q, k, v, g, segments_BT), expected)
        secs = timed(run, q, k, v, g, segments_BT, repeats=repeats)
        found[name] = {"error": error, "is_right": error < BF16_ROUNDING, "secs": secs}
    return found


def _error(got, expected) -> float:
    """The largest of all arrays, of an array's largest number."""
    return max(
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y)))
        for x, y in zip(got, expected, strict=True)
    )


def _by_row(q_BTKGH, k_BSKH, v_BSKH, segments_BT=None):
    """All scores of a row at once, one row after the other: few shapes for a compiler
    that tries ways of multiplying for each."""
    B, T = q_BTKGH.shape[:2]
    if segments_BT is None:
        segments_BT = jnp.zeros((B, T))

    def one(row):
        q, k, v, segments_1T = (x[None] for x in row)
        same_1TS = segments_1T[:, :, None] == segments_1T[:, None, :]
        seen_1TS = jnp.tri(T, dtype=bool) & same_1TS
        return attention.masked(q, k, v, seen_1TS, softcap=0.0)[0]

    return jax.lax.map(jax.checkpoint(one), (q_BTKGH, k_BSKH, v_BSKH, segments_BT))


def _both(kernel, q, k, v, g):
    out, back = jax.vjp(kernel, q, k, v)
    return out, *back(g.astype(out.dtype))


def experts(sizes: tuple[int, ...], repeats: int) -> dict:
    """The grouped matmul of experts and both its gradients, in bfloat16, against
    products of a few rows, and of one expert's rows, in float32; FLOP/s beside those of
    plain matmuls of the same work."""
    N, D, F, E = sizes
    own = policy("bfloat16")
    one = meshes.make_mesh({}, devices=jax.devices()[:1])
    ids_A = jax.random.randint(jax.random.key(0), (N,), 0, E, jnp.int32)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    x_ND, w_EDF, g_NF = draw(1, N, D), draw(2, E, D, F), draw(3, N, F)
    with jax.set_mesh(one):
        align = grouped.alignment(N, E)
        rows = N if align == 1 else (-(-N // align) + E) * align

        def local(x_ND, w_EDF, g_NF, ids_A):
            at = grouped.arrange(ids_A, num_experts=E, rows=rows, align=align)

            def multiply(x_ND, w_EDF):
                x_RD = grouped.moved(x_ND, at.source_R, at.place_A)
                y_RF = grouped.grouped(x_RD, w_EDF, at.sizes_E, jax.P(), align, own)
                return grouped.moved(y_RF, at.place_A, at.source_R)

            y_NF, pull = jax.vjp(multiply, x_ND, w_EDF)
            return y_NF, *pull(g_NF)

        whole = (jax.P(),) * 4
        run = jax.jit(jax.shard_map(local, in_specs=whole, out_specs=whole[:3]))
        place = jax.NamedSharding(one, jax.P())
        given = jax.device_put((x_ND, w_EDF, g_NF, ids_A), place)
        wide = lambda array: np.asarray(array, np.float32)
        y, dx, dw = run(*given)
        few, ids = slice(0, 64), np.asarray(ids_A)
        w, mine = wide(w_EDF), ids == 0
        pairs = {
            "forward": (y[few], np.einsum("nd,ndf->nf", wide(x_ND[few]), w[ids[few]])),
            "to_rows": (dx[few], np.einsum("nf,ndf->nd", wide(g_NF[few]), w[ids[few]])),
            "to_weights": (dw[0], wide(x_ND)[mine].T @ wide(g_NF)[mine]),
        }
        error = {
            name: float(np.abs(wide(got) - expected).max() / np.abs(expected).max())
            for name, (got, expected) in pairs.items()
        }
        secs = timed(run, *given, repeats=repeats)
        plain = jax.jit(lambda x, w, g: (x @ w[0], g @ w[0].T, x.T @ g))
        plain_secs = timed(plain, *given[:3], repeats=repeats)
    return {
        "error": error,
        "is_right": max(error.values()) < BF16_ROUNDING,
        "secs": secs,
        "flops": 3 * 2 * N * D * F / secs,
        "over_plain_matmuls": secs / plain_secs,
    }


def step(sizes: tuple[int, ...], repeats: int) -> dict:
    """A training step in bfloat16 on all devices, as `timed_steps.measured` tells."""
    width, layers, rows, length = sizes
    count = jax.device_count()
    config = c.Config(
        name="device",
        precision="bfloat16",
        model=c.ModelConfig(
            vocab_size=32_000 if width > 1000 else 512,
            width=width,
            ffn_width=4 * width,
            num_heads=width // 64,
            num_kv_heads=width // 128,
            repeats=layers,
        ),
        train=c.TrainConfig(
            batch_size=rows * count, length=length, remat="full", steps=1000
        ),
        mesh=c.MeshConfig(data=1, fsdp=count),
    )
    found = timed_steps.measured(
        jaxinfra.build(config), warmup=2, steps=1, rounds=repeats
    )
    losses = found.pop("losses")
    del found["init_peak_bytes"], found["peak_bytes"]  # of all parts before it too
    return found | {"loss_falls": losses[-1] < losses[0]}


def timed(function, *args, repeats: int) -> float:
    """Median seconds of a call; the first is not counted. Short ones are sent ten at a
    time before one waits, as the sending of one hides behind another's work."""
    jax.block_until_ready(function(*args))
    secs, count = [], 1
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(count):
            result = function(*args)
        jax.block_until_ready(result)
        secs.append((time.perf_counter() - begin) / count)
        count = 10 if secs[0] < 0.01 else 1
    return statistics.median(secs[1:])
