"""Matmuls in low precision: an `Einsum` for weights that come wrapped as `Weight`.

`low_precision_einsum` wraps another einsum: a plain array goes to that, a `Weight` is
multiplied in the recipe's formats, forward and in both backward matmuls:

    y = x^ w^          x^, w^: rounded to the forward format
    dx = g^ w^         g^: rounded to the backward format
    dw = x^ g^         x^ as the forward pass kept it, in its 8 bits

A scale that varies along what the next matmul sums over is multiplied into the gradient
before that is rounded, so each operand is rounded once and every matmul is one product
of codes. Weights are rounded where they lie and gathered over `fsdp` as 8-bit codes.

Where the device has units for the format, XLA sees dot(int8, int8) -> int32 or
dot(fp8, fp8) -> float32; elsewhere the same codes are multiplied in a wider type that
holds them exactly. mxfp8 is always multiplied so, in the compute dtype.

Limits: sums over `tensor` travel as 4 bytes an activation (the codes' sum is scaled
after it). What the current scaling of gradients calls a tensor is a microbatch. To
round is to read and write activations again, and codes of one scale by channel serve
one product, so a gradient is rounded twice: products must be large beside their
operands. For a layer of 4096 to 14336 and 8,192 tokens a v6e, a roofline of published
peaks gives int8 0.87 of bfloat16's time; v6e's compiler gives it 1.19 times the cycles,
since it prices a product of int8 as one of bfloat16 (506,000 operations a cycle, where
bfloat16's peak is 524,288 and int8's twice that; scripts/results/quant_programs.json).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxinfra import mesh, sharding
from jaxinfra.ops import seam
from jaxinfra.ops.seam import Einsum, Names
from jaxinfra.precision import Policy
from jaxinfra.quant import arrays
from jaxinfra.quant.formats import FORMATS, FormatName, round_to, scale_for
from jaxinfra.quant.random_bits import bits_like
from jaxinfra.quant.recipe import Recipe
from jaxinfra.sharding import Rules

# Of an operand: largest magnitude; parts that were beyond the format, and became zero.
FIGURES = ("largest", "saturation", "underflow")
OPERANDS = ("input", "weight", "grad")
# Over which a step's rows are split. In a pipeline each device has its own of them, and
# what is said of a whole tensor is gathered here.
ROW_AXES = ("data", "fsdp")
# int32 holds the sum of so many products of int8.
_MOST_TERMS = (2**31 - 1) // 127**2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array", "probe", "scales", "seed", "rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter that is multiplied in low precision; all leaves are floats, so that a
    gradient with respect to a tree of them exists.

    array: the parameter. probe: zeros [3 operands, 3 figures]; its gradient *is* the
    figures of the three operands; or [M, 3, 3], for a microbatch each, where a pipeline
    adds gradients up. scales: [3], of the operands, where they are known before; None:
    from the operands themselves. seed: below 2^24, of rounding by chance. rows: [B],
    global row ids. In a stack of layers each has that dim in front.
    """

    array: jax.Array
    probe: jax.Array
    scales: jax.Array | None = None
    seed: jax.Array | None = None
    rows: jax.Array | None = None


def low_precision_einsum(
    plain: Einsum, recipe: Recipe, policy: Policy, rules: Rules, *, native: bool
) -> Einsum:
    """`plain` for arrays, the recipe's matmul for `Weight`s. native: the device has
    units for the formats; else products are of the same codes in a wider type."""
    block = recipe.groups == "block"
    contract = (_block_contract if block else _contract)(recipe, policy, rules, native)
    rounded = of_whole_rows(lambda eq, x, w, *, out: contract(eq, out, x, w), rules)

    def einsum(equation: str, x: jax.Array, w, *, out: Names) -> jax.Array:
        return (rounded if isinstance(w, Weight) else plain)(equation, x, w, out=out)

    return einsum


def of_whole_rows(einsum: Einsum, rules: Rules) -> Einsum:
    """`einsum`, which wants activations whole over tensor along the length, where those
    between blocks are cut: they are made whole before it and cut after it."""
    if rules.residual == rules.length:
        return einsum

    def on_whole_rows(equation: str, x: jax.Array, w, *, out: Names) -> jax.Array:
        is_cut = lambda entry: sharding.axes_of(entry) == rules.residual
        spec = (rules.length if is_cut(entry) else entry for entry in _spec_of(x))
        whole = tuple("length" if name == "residual" else name for name in out)
        y = einsum(equation, jax.reshard(x, jax.P(*spec)), w, out=whole)
        return jax.reshard(y, sharding.spec(rules, *out))

    return on_whole_rows


def _contract(recipe: Recipe, policy: Policy, rules: Rules, native: bool):
    """One product of codes a matmul, scales by tensor or by channel."""
    is_tensor = recipe.groups == "tensor"
    encode = functools.partial(_encode, recipe=recipe)
    dot = functools.partial(_dot, policy=policy, native=native)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def contract(equation, out, x, w):
        return forward(equation, out, x, w)[0]

    def forward(equation, out, x, w):
        x_dims, w_dims, out_dims = _operands(equation)
        x_codes, x_scale, x_figures = encode(x, x_dims, out_dims, w, 0)
        w_codes, w_scale, w_figures = encode(w.array, w_dims, out_dims, w, 1)
        whole_codes, whole_scale = _gather(w_codes), _gather(w_scale)
        y = dot(equation, x_codes, whole_codes, sharding.spec(rules, *out))
        y *= _align(x_scale, x_dims, out_dims) * _align(whole_scale, w_dims, out_dims)
        # Kept: 8 bits an activation, and of the weight itself what is here anyway.
        kept_x = x if recipe.backward is None else (x_codes, x_scale)
        return y.astype(policy.compute), (kept_x, w, (x_figures, w_figures))

    def backward(equation, out, residuals, g):
        kept_x, w, figures = residuals
        x_dims, w_dims, out_dims = _operands(equation)
        to_x, to_w = f"{out_dims},{w_dims}->{x_dims}", f"{x_dims},{out_dims}->{w_dims}"
        if recipe.backward is None:
            dx, dw = _plain_backward(policy, to_x, to_w, kept_x, w.array, g)
            return dx, _cotangent(w, dw, (*figures, jnp.zeros(len(FIGURES))))
        x_codes, x_scale = kept_x
        w_codes, w_scale = map(_gather, encode(w.array, w_dims, out_dims, w, 1)[:2])
        x_spec = _spec_of(x_codes)
        w_scale = _align(w_scale, w_dims, out_dims)
        x_scale_out = _align(x_scale, x_dims, out_dims)
        if is_tensor:
            codes, scale, g_figures = encode(g, out_dims, "", w, 2)
            pairs = [(codes, scale * w_scale), (codes, scale * x_scale_out)]
        else:
            pairs, found = [], []
            for turn, (factor, kept) in enumerate(
                [(w_scale, x_dims), (x_scale_out, w_dims)]
            ):
                scaled = g.astype(jnp.float32) * factor
                codes, scale, part = encode(scaled, out_dims, kept, w, 2, turn)
                pairs.append((codes, scale))
                found.append(part)
            # Both are of g: the worse part; the magnitude without the folded scale.
            g_figures = jnp.maximum(*found).at[0].set(_largest(g))
        (for_x, scale_x), (for_w, scale_w) = pairs
        dx = dot(to_x, for_x, w_codes, x_spec) * _align(scale_x, out_dims, x_dims)
        dw = seam.gradient_of(w.array, to_w, x_codes, for_w, dot)
        dw *= _align(scale_w, out_dims, w_dims)
        dw = dw.astype(policy.reduce).astype(w.array.dtype)
        dx = jax.reshard(dx.astype(policy.compute), x_spec)
        dw = jax.reshard(dw, _spec_of(w.array))
        return dx, _cotangent(w, dw, (*figures, g_figures))

    contract.defvjp(forward, backward)
    return contract


def _block_contract(recipe: Recipe, policy: Policy, rules: Rules, native: bool):
    """Both operands of each matmul in blocks along what it sums over, multiplied in the
    compute dtype, which holds every value of the format."""
    del native

    def rounded(a, dims, kept, form):
        """`a` on the grid of blocks along the last dim that is summed over; figures."""
        summed = [dim for dim, name in enumerate(dims) if name not in kept]
        q = arrays.quantize(
            a, form, dims=tuple(summed), block=_fitting_block(a, summed[-1], form)
        )
        back = arrays.dequantize(_gather_array(q), _wide(policy))
        return back, _figures(a, None, q.values, recipe, form)

    dot = seam.make_product(policy, policy.compute)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def contract(equation, out, x, w):
        return forward(equation, out, x, w)[0]

    def forward(equation, out, x, w):
        x_dims, w_dims, out_dims = _operands(equation)
        x_hat, x_figures = rounded(x, x_dims, out_dims, recipe.forward)
        w_hat, w_figures = rounded(w.array, w_dims, out_dims, recipe.forward)
        y = dot(equation, x_hat, w_hat, sharding.spec(rules, *out))
        return y, (x, w, (x_figures, w_figures))

    def backward(equation, out, residuals, g):
        x, w, figures = residuals
        x_dims, w_dims, out_dims = _operands(equation)
        to_x, to_w = f"{out_dims},{w_dims}->{x_dims}", f"{x_dims},{out_dims}->{w_dims}"
        if recipe.backward is None:
            dx, dw = _plain_backward(policy, to_x, to_w, x, w.array, g)
            return dx, _cotangent(w, dw, (*figures, jnp.zeros(len(FIGURES))))
        x_spec = _spec_of(x)
        for_x, g_figures = rounded(g, out_dims, x_dims, recipe.backward)
        w_hat, _ = rounded(w.array, w_dims, x_dims, recipe.forward)
        dx = dot(to_x, for_x, w_hat, x_spec)
        x_hat, _ = rounded(x, x_dims, w_dims, recipe.forward)
        for_w, _ = rounded(g, out_dims, w_dims, recipe.backward)
        product = seam.make_product(policy, policy.reduce)
        dw = seam.gradient_of(w.array, to_w, x_hat, for_w, product)
        return dx, _cotangent(w, dw.astype(w.array.dtype), (*figures, g_figures))

    contract.defvjp(forward, backward)
    return contract


def _plain_backward(policy: Policy, to_x: str, to_w: str, x, w, g):
    """Both backward matmuls in the compute dtype, as `seam.make_einsum` has them."""
    to_compute = seam.make_product(policy, policy.compute)
    dx = to_compute(to_x, g, seam.gather(w, policy), _spec_of(x))
    to_reduce = seam.make_product(policy, policy.reduce)
    return dx, seam.gradient_of(w, to_w, x, g, to_reduce).astype(w.dtype)


def _cotangent(w: Weight, dw: jax.Array, figures) -> Weight:
    zeros = lambda leaf: None if leaf is None else jnp.zeros_like(leaf)
    probe = jnp.stack(figures).astype(w.probe.dtype)
    if w.probe.ndim > probe.ndim:  # row r is in microbatch r % M (accumulation)
        assert w.rows is not None
        microbatches = len(w.probe)
        mine = jnp.max(w.rows).astype(jnp.int32) % microbatches
        is_mine = jnp.arange(microbatches) == mine
        probe = jnp.where(is_mine[:, None, None], probe, 0)
    return Weight(dw, probe, zeros(w.scales), zeros(w.seed), zeros(w.rows))


def _encode(
    a: jax.Array,
    dims: str,
    kept: str,
    w: Weight,
    operand: int,
    turn: int = 0,
    *,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes, float32 scale with dims of size 1 where values share one, figures) of an
    operand whose dims in `kept` go on into the product."""
    is_grad = operand == 2
    form = recipe.backward if is_grad and recipe.backward else recipe.forward
    if w.scales is not None:
        scale = w.scales[operand].reshape((1,) * a.ndim)
    else:
        is_tensor = recipe.groups == "tensor"
        shared = tuple(i for i, d in enumerate(dims) if is_tensor or d not in kept)
        magnitudes = jnp.abs(a).astype(jnp.float32)
        largest = jnp.max(magnitudes, axis=shared, keepdims=True)
        if operand != 1 and (is_tensor or turn == 1):  # rows are among what shares it
            largest = _over_rows(largest)
        scale = scale_for(largest, form)
    bits = None
    if is_grad and recipe.by_chance and w.seed is not None:
        rows = w.rows if _are_rows(w.rows, a, dims) else None
        rows = None if rows is None else rows.astype(jnp.uint32)
        bits = bits_like(a, 2 * w.seed.astype(jnp.uint32) + turn, rows)
    codes = round_to(a.astype(jnp.float32) / scale, form, bits)
    return codes, scale, _figures(a, scale, codes, recipe, form)


def _are_rows(rows: jax.Array | None, a: jax.Array, dims: str) -> bool:
    return rows is not None and dims[0] == "B" and rows.shape == a.shape[:1]


def _figures(a, scale, codes, recipe: Recipe, form: FormatName) -> jax.Array:
    """`FIGURES` of operand `a`; scale None: nothing can saturate."""
    if not (recipe.figures or recipe.is_delayed):
        return jnp.zeros(len(FIGURES))
    shares = jnp.zeros(2)
    if recipe.figures:
        saturated = jnp.float32(0)
        is_lost = (codes.astype(jnp.float32) == 0) & (a != 0)
        underflow = jnp.mean(is_lost.astype(jnp.float32))
        if recipe.is_delayed and scale is not None:
            limit = scale * FORMATS[form].largest
            is_over = jnp.abs(a).astype(jnp.float32) > limit
            saturated = jnp.mean(is_over.astype(jnp.float32))
        shares = _over_rows(jnp.stack([saturated, underflow]), jax.lax.pmean)
    return jnp.stack([_largest(a), *shares])


def _largest(a: jax.Array) -> jax.Array:
    return _over_rows(jnp.max(jnp.abs(a)).astype(jnp.float32))


def _over_rows(figure: jax.Array, met=jax.lax.pmax) -> jax.Array:
    """Of devices that have rows of their own, all that `met` makes of it."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in ROW_AXES if axis in manual)
    return met(figure, axes) if axes else figure


def _dot(equation, a, b, spec, *, policy: Policy, native: bool) -> jax.Array:
    """float32 einsum of codes, before it is scaled."""
    a_dims, b_dims, out_dims = _operands(equation)
    (a, a_dims), (b, b_dims) = sorted(
        [(a, a_dims), (b, b_dims)], key=lambda pair: pair[0].size
    )
    is_int = a.dtype == jnp.int8
    sizes = dict(zip(a_dims + b_dims, a.shape + b.shape, strict=True))
    terms = math.prod(n for dim, n in sizes.items() if dim not in out_dims)
    if not native or (is_int and terms > _MOST_TERMS):
        a, b, is_int = a.astype(_wide(policy)), b.astype(_wide(policy)), False
    return jnp.einsum(
        f"{a_dims},{b_dims}->{out_dims}",
        a,
        b,
        preferred_element_type=jnp.int32 if is_int else jnp.float32,
        out_sharding=spec,
    ).astype(jnp.float32)


def _wide(policy: Policy) -> jnp.dtype:
    """A type that holds every code of 8 bits exactly: bfloat16's significand has 8, and
    a CPU multiplies float32 best."""
    return jnp.dtype(jnp.float32) if mesh.platform() == "cpu" else policy.compute


def _align(scale: jax.Array, dims: str, to: str) -> jax.Array:
    """A scale with dims `dims`, those that are shared of size 1, for an array with dims
    `to`."""
    if scale.size == 1:
        return scale.reshape((1,) * len(to))
    gone = tuple(i for i, dim in enumerate(dims) if dim not in to)
    scale = jnp.squeeze(scale, gone)
    left = [dim for dim in dims if dim in to]
    order = [left.index(dim) for dim in to if dim in left]
    missing = tuple(i for i, dim in enumerate(to) if dim not in left)
    return jnp.expand_dims(jnp.transpose(scale, order), missing)


def _fitting_block(a: jax.Array, dim: int, form: FormatName) -> int:
    """The format's block, or what of it fits the part of `dim` that a device has."""
    local = a.shape[dim]
    entry = _spec_of(a)[dim] if a.ndim == len(_spec_of(a)) else None
    for axis in (entry,) if isinstance(entry, str) else entry or ():
        local //= jax.sharding.get_abstract_mesh().shape[axis]
    return math.gcd(local, FORMATS[form].block)


def _gather(a: jax.Array) -> jax.Array:
    """`a`, whole over fsdp."""
    return jax.reshard(a, sharding.gathered(_spec_of(a)))


def _gather_array(q: arrays.QuantizedArray) -> arrays.QuantizedArray:
    return jax.tree.map(_gather, q)


def _operands(equation: str) -> tuple[str, str, str]:
    inputs, out = equation.split("->")
    x, w = inputs.split(",")
    return x, w, out


def _spec_of(array: jax.Array) -> jax.sharding.PartitionSpec:
    return jax.typeof(array).sharding.spec
