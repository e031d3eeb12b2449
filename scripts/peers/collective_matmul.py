"""Collective matmuls, rings of products of a part of the length each, in place of the
gathers and scatters of `jaxinfra.ops.seam`: what both cost over `tensor`, by the TPU's
own compiler (extra tpu).

    python scripts/peers/collective_matmul.py RESULTS.json

A product whose activations are cut along the length over the axis by which the weight
is cut keeps what is here, and multiplies what comes by; one whose result is cut so adds
its part to what goes round. Forward and to activations; products that make gradients of
weights are as they are. For dense models without a context axis.
Source: arXiv:2302.05442 section 3.1 (ViT-22B's asynchronous parallel linear layers).
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import plan  # noqa: E402  # pyright: ignore[reportMissingImports]
import plan_rows  # noqa: E402  # pyright: ignore[reportMissingImports]

from jaxinfra import sharding  # noqa: E402
from jaxinfra.ops import seam  # noqa: E402

COMMAND = (
    "--config llama3_8b --model.repeats 4 --target v6e:4x4 --train.batch_size 32"
    " --mesh.fsdp 8 --mesh.tensor 2 --json"
)
AXIS = "tensor"


def main(argv: list[str]) -> int:
    if argv[0] == "rings":
        apart, make, of_weight = seam._apart, seam.make_product, seam.gradient_of

        def gradient_of(w, equation, a, b, product):
            return of_weight(w, equation, *_alike(equation, a, b), product.plain)

        seam._apart = lambda x, w, equation: x
        seam.make_product = lambda *how: with_rings(make(*how), apart)
        seam.gradient_of = gradient_of
        return plan.main(COMMAND.split())
    found = {}
    for way in ("collectives", "rings"):
        called = [sys.executable, str(ROOT / "scripts" / "plan.py"), *COMMAND.split()]
        if way == "rings":
            called = [sys.executable, __file__, way]
        done = subprocess.run(called, stdout=subprocess.PIPE, check=True)
        found[way] = plan_rows.short(json.loads(done.stdout))
        print(way, json.dumps(found[way]), flush=True)
    told = {"command": COMMAND, **found}
    pathlib.Path(argv[0]).write_text(json.dumps(told, indent=1) + "\n")
    return 0


def with_rings(product: seam.Product, apart) -> seam.Product:
    """`product`, but by a ring where both operands, or operand and result, are cut."""

    def run(equation, a, b, spec):
        a_dims, b_dims, out_dims = seam._operands(equation)
        at_a, at_b = (cut(seam._spec_of(x), d) for x, d in ((a, a_dims), (b, b_dims)))
        at_out = cut(spec, out_dims)
        # One axis of the mesh may not be manual where another of the same dim is not.
        alone, back = sharding.gathered(spec, "context"), spec
        if at_a and at_b and at_a in out_dims and at_a not in b_dims:
            return jax.reshard(_enter(product, equation, _apart(a), b, alone), back)
        if at_out and at_a and at_a == at_b and at_out in a_dims:
            return jax.reshard(_leave(product, equation, _apart(a), b, alone), back)
        return product(equation, apart(a, b, equation), b, spec)

    run.plain = product
    return run


def cut(spec: jax.P, dims: str) -> str:
    """The dim that is cut over the axis; empty if none is."""
    pairs = zip(dims, spec.partitions, strict=True)
    return next((dim for dim, e in pairs if AXIS in sharding.axes_of(e)), "")


def _enter(product, equation, x, w, spec):
    """Each device multiplies its part of the length, and then those that come by."""
    n = jax.sharding.get_abstract_mesh().shape[AXIS]
    _, _, out_dims = seam._operands(equation)
    along = out_dims.index(cut(seam._spec_of(x), equation.split(",")[0]))
    inside = sharding.gathered(spec, AXIS)

    def run(x, w):
        here, parts = jax.lax.axis_index(AXIS), []
        for step in range(n):
            after = _passed_on(x) if step < n - 1 else x
            parts.append(product(equation, x, w, inside))
            x = after
        size = parts[0].shape[along]
        shape = (*parts[0].shape[:along], n * size, *parts[0].shape[along + 1 :])
        y = jnp.zeros(shape, parts[0].dtype, out_sharding=inside)
        for step, part in enumerate(parts):
            at = (here - step) % n * size
            y = jax.lax.dynamic_update_slice_in_dim(y, part, at, along)
        return y

    return _mapped(run, x, w, spec)


def _leave(product, equation, x, w, spec):
    """What ends at a device goes round, and each adds its own product to it."""
    n = jax.sharding.get_abstract_mesh().shape[AXIS]
    x_dims, _, out_dims = seam._operands(equation)
    along = x_dims.index(cut(spec, out_dims))
    inside = sharding.gathered(spec, AXIS)

    def run(x, w):
        here, size = jax.lax.axis_index(AXIS), x.shape[along] // n
        total = None
        for step in reversed(range(n)):
            at = (here + step) % n * size
            part = jax.lax.dynamic_slice_in_dim(x, at, size, along)
            mine = product(equation, part, w, inside)
            total = mine if total is None else total + mine
            total = _passed_on(total) if step else total
        return total

    return _mapped(run, x, w, spec)


def _mapped(run, x, w, spec):
    only = lambda spec: jax.P(*(AXIS if cut(jax.P(e), "T") else None for e in spec))
    return jax.shard_map(
        run,
        in_specs=(only(seam._spec_of(x)), only(seam._spec_of(w))),
        out_specs=only(spec),
        axis_names={AXIS},
        check_vma=False,
    )(x, w)


def _passed_on(x: jax.Array) -> jax.Array:
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _apart(x: jax.Array) -> jax.Array:
    return jax.reshard(x, sharding.gathered(seam._spec_of(x), "context"))


def _alike(equation: str, a: jax.Array, b: jax.Array) -> list[jax.Array]:
    """Whole, where one is cut in a dim in which the other is not."""
    dims = seam._operands(equation)
    at_a, at_b = (cut(seam._spec_of(x), d) for x, d in ((a, dims[0]), (b, dims[1])))
    whole = lambda x: jax.reshard(x, sharding.gathered(seam._spec_of(x), AXIS))
    is_summed = lambda dim: dim and at_a != at_b and dim not in dims[2]
    return [whole(x) if is_summed(d) else x for x, d in ((a, at_a), (b, at_b))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
