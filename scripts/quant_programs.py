"""What compilers make of low precision, for hardware that is not here.

    python scripts/quant_programs.py v6e int8      TPU v6e, 8 chips; needs extra tpu
    python scripts/quant_programs.py h100 fp8      8 H100; needs extra cuda
    python scripts/quant_programs.py v6e int8 wide
    kinds: bfloat16, fp8, int8, comm (bfloat16 with int8 gathers and reductions)

A feed-forward layer (16 x 512 tokens, width 1024 to 2048 and back; wide: 64 x 1024
tokens, 4096 to 14336; the first half rematerialised) with its whole backward pass,
split by FSDP over 8. Of the optimised program: operand types of every matmul, bytes
that each collective gives a device; for a TPU, the compiler's estimate of cycles, loops
multiplied out, and the seconds of a roofline, of published peaks and bandwidth. That
compiler prices a product of int8 as one of bfloat16, whose peak is half as high.
Results go to scripts/results/quant_programs.json.
"""

import collections
import json
import math
import pathlib
import re
import sys

from jaxinfra.plan import compilers, cost, targets
from jaxinfra.plan.program import parse

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "quant_programs.json"
# Rows, length, width, ffn.
SIZES = {"": (16, 512, 1024, 2048), "wide": (64, 1024, 4096, 14336)}
_TARGETS = {"v6e": "v6e:2x4", "h100": "h100:1x8"}
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}  # others: 1


def main(argv: list[str]) -> int:
    target, kind, *size = argv
    text = program(target, kind, *size)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[" ".join(argv)] = found = {
        "matmuls": matmuls(text),
        "collective_bytes": traffic(text),
        "versions": compilers.versions(targets.parse(_TARGETS[target])),
    }
    if target == "v6e":
        found |= price(text, peak=2.0 if kind == "int8" else 1.0)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def program(target: str, kind: str, size: str = "") -> str:
    """The optimised program of the layer's gradient."""
    rows, length, width, ffn = SIZES[size]
    place = targets.parse(_TARGETS[target])
    compilers.prepare_process(place)
    import jax
    import jax.numpy as jnp

    import jaxinfra
    from jaxinfra import precision, sharding
    from jaxinfra.config import QuantConfig
    from jaxinfra.ops import seam
    from jaxinfra.quant import communication, matmul, recipe

    devices = compilers.devices(place)
    mesh = jaxinfra.make_mesh({"fsdp": 8}, devices=devices)
    policy, rules = precision.policy("bfloat16"), sharding.Rules()
    einsum, wrap = seam.make_einsum(policy, rules), lambda w: w
    if kind == "comm":
        einsum = communication.low_bit_traffic(
            policy, rules, gather="int8", reduce="int8"
        )
    elif kind != "bfloat16":
        how = recipe.make_recipe(kind, QuantConfig(figures=False))
        native = recipe.has_units(devices[0], how.forward)
        einsum = matmul.low_precision_einsum(einsum, how, policy, rules, native=native)
        wrap = lambda w: matmul.Weight(w, jnp.zeros((3, 3)))

    def loss(x_BTD, up_DF, down_FD, g_BTD):
        hidden, out = ("batch", "length", "ffn"), ("batch", "length", "width")
        into = lambda x: jax.nn.silu(einsum("BTD,DF->BTF", x, wrap(up_DF), out=hidden))
        h_BTF = jax.checkpoint(into)(x_BTD)
        y_BTD = einsum("BTF,FD->BTD", h_BTF, wrap(down_FD), out=out)
        return jnp.sum(y_BTD.astype(jnp.float32) * g_BTD)

    def like(shape, dtype, *names):
        place = jax.NamedSharding(mesh, sharding.spec(rules, *names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    tokens, names = (rows, length, width), ("batch", "length", "width")
    given = (
        like(tokens, jnp.bfloat16, *names),
        like((width, ffn), jnp.float32, "embed", "ffn"),
        like((ffn, width), jnp.float32, "ffn", "embed"),
        like(tokens, jnp.float32, *names),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile()
        return compiled.as_text() or ""


def matmuls(text: str) -> dict[str, int]:
    """'s8 x s8 -> s32' -> how many dots (or convolutions, a TPU's word) are so."""
    counts = collections.Counter()
    for computation in text.split("\n\n"):
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", computation))
        dots = r"= (\w+)\[\S* (?:dot|convolution)\((%[\w.\-]+), (%[\w.\-]+)\)"
        for result, a, b in re.findall(dots, computation):
            counts[f"{types.get(a)} x {types.get(b)} -> {result}"] += 1
    return dict(sorted(counts.items()))


def traffic(text: str) -> dict[str, int]:
    """Kind of collective -> bytes of its results (for a reduce-scatter: of what goes
    in) on one device."""
    total = collections.Counter()
    kinds = r"(all-gather|all-to-all|reduce-scatter|all-reduce|collective-permute)"
    for shapes, kind, suffix in re.findall(rf"= (.*?) {kinds}(-start)?\(", text):
        sizes = [
            math.prod(int(n) for n in dims.split(",") if n) * _BYTES.get(dtype, 1)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        # An asynchronous one names its inputs and then as many results.
        if suffix and shapes.startswith("(") and len(sizes) % 2 == 0:
            half = len(sizes) // 2
            sizes = sizes[:half] if kind == "reduce-scatter" else sizes[half:]
        elif kind == "reduce-scatter":
            sizes = [8 * size for size in sizes]
        total[kind] += sum(sizes)
    return dict(sorted(total.items()))


def price(text: str, *, peak: float) -> dict[str, float]:
    """What a v6e's core would take; `peak`: of its products, over bfloat16's."""
    chip, program = targets.parse("v6e:2x4").chip, parse(text)

    def secs(clock: cost.Clock) -> float:
        played = cost.play(program, clock=clock, link_bytes_per_sec=math.inf)
        return played.compute_secs

    roofline = cost.roofline(peak * chip.peak_flops, chip.hbm_bytes_per_sec)
    return {
        "estimated_cycles": secs(cost.cycles_at(1.0)),
        "roofline_millisecs": 1e3 * secs(roofline),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
