"""Training in low precision: a task whose matrices are multiplied by a recipe.

`in_low_precision` is a function from `Task` to `Task`, and the model stays as it is:
before the loss each chosen parameter is wrapped as a `matmul.Weight`, which the seam's
einsum knows how to multiply. The figures of each matmul come back as the gradient of a
probe that the weight carries, and leave as metrics `quant/...` and, for delayed scales,
as `Aux.stats`, maxima that microbatches and devices merge in any order.

Parameters, optimizer and checkpoints are those of bfloat16; evaluation and sampling
multiply in the compute dtype, as whoever uses the weights will.
"""

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config import Config
from jaxinfra.models.transformer import Model
from jaxinfra.ops.seam import Context, Einsum
from jaxinfra.params import ParamSpec, Tree, named, unflatten
from jaxinfra.precision import Policy
from jaxinfra.quant.formats import FORMATS, scale_for
from jaxinfra.quant.matmul import OPERANDS, ROW_AXES, Weight, low_precision_einsum
from jaxinfra.quant.random_bits import mix
from jaxinfra.quant.recipe import (
    Recipe,
    chosen,
    has_units,
    make_recipe,
    share_of_flops,
)
from jaxinfra.sharding import Layout, Rules
from jaxinfra.train import objective
from jaxinfra.train.objective import GradFn, LossFn, Maxima

_LARGEST, _SATURATION, _UNDERFLOW = range(3)  # of matmul.FIGURES


class Delayed(NamedTuple):
    """A model state, and the history that delayed scales follow from.

    largest: path -> float32 [..., 3 operands, history], newest first; a stack of layers
    has that dim in front. Zero: not seen yet.
    """

    inner: Any
    largest: dict[str, jax.Array]


class Turns(NamedTuple):
    """How often in a step a pipeline uses a weight: once a microbatch, by as many
    devices as have rows of their own. Gradients, and so figures, are added up over
    both."""

    microbatches: int
    devices: int


class LowPrecision(NamedTuple):
    """What config.precision makes of a text model.

    einsum_of(rules) -> the einsum of a model by these rules. staged(model) -> the model
    whose layers run in a pipeline's stages. trained(task, FLOPs a token) -> the task.
    """

    einsum_of: Callable[[Rules], Einsum]
    staged: Callable[[Model], Model]
    trained: Callable[[Any, float], Any]


def low_precision_training(
    config: Config, layout: Layout, policy: Policy, plain_of: Callable[[Rules], Einsum]
) -> LowPrecision:
    """The recipe of config.precision on the devices of `layout`; plain_of(rules) is the
    einsum of what it leaves out."""
    recipe = make_recipe(config.precision, config.quant)
    device = layout.mesh.devices.flat[0]
    native = has_units(device, recipe.forward)
    if not native:
        logging.getLogger("jaxinfra").warning(
            "precision=%s: %s has no units for it that are used here, so the rounded "
            "numbers are multiplied in a wider type, and not faster",
            config.precision,
            device.device_kind,
        )
    model, sizes, turns = config.model, layout.mesh.shape, None
    if sizes["pipeline"] > 1:
        devices = math.prod(sizes[axis] for axis in ROW_AXES)
        turns = Turns(config.train.microbatches, devices)

    def einsum_of(rules: Rules) -> Einsum:
        plain = plain_of(rules)
        return low_precision_einsum(plain, recipe, policy, rules, native=native)

    def trained(task: Any, flops_per_token: float) -> Any:
        used = model.experts_per_token / model.num_experts if model.num_experts else 1.0
        share = share_of_flops(
            task.specs, recipe, flops_per_token=flops_per_token, experts_used=used
        )
        notes = f"precision {config.precision}: {share:.1%} of FLOPs outside the head"
        return in_low_precision(task, recipe, notes=notes, turns=turns)

    staged = functools.partial(in_stages, recipe=recipe)
    return LowPrecision(einsum_of, staged, trained)


def in_low_precision(
    task: Any, recipe: Recipe, *, notes: str = "", turns: Turns | None = None
) -> Any:
    """`task`, a `tasks.Task` whose model has `low_precision_einsum`, trained so. turns:
    if its own `grad_fn` is that of a model `in_stages`."""
    grad_fn = task.grad_fn or objective.grad_of(task.loss_fn)
    return task._replace(
        grad_fn=low_precision(grad_fn, task.specs, recipe, turns=turns),
        loss_fn=inner_loss(task.loss_fn),
        model_state=lambda: first_state(task.specs, recipe, task.model_state()),
        update_state=functools.partial(next_state, task.update_state),
        notes="\n".join(filter(None, (task.notes, notes))),
    )


def first_state(specs: Tree, recipe: Recipe, inner: Any = ()) -> Any:
    """The first model state: `inner`, with an empty history if scales are delayed."""
    if not recipe.is_delayed:
        return inner
    names, empty = chosen(specs, recipe), {}
    for path, spec in named(specs):
        if path in names:
            shape = (*_stack(spec, spec), len(OPERANDS), recipe.history)
            empty[path] = np.zeros(shape, np.float32)
    return Delayed(inner, empty)


def next_state(update_inner, model_state: Any, stats: Any) -> Any:
    """The model state after a step; `update_inner(inner, stats)` makes the inner one.

    The newest maxima enter the history, the oldest leave it; one that is not finite
    counts as none, so that the scale stays what the others say. Source: Transformer
    Engine's DelayedScaling recipe (`amax_compute_algo` max).
    """
    if not isinstance(model_state, Delayed):
        return update_inner(model_state, stats)
    inner, largest = stats
    newest = {k: jnp.where(jnp.isfinite(x), x, 0) for k, x in largest.tree.items()}
    history = {
        path: jnp.concatenate([newest[path][..., None], old[..., :-1]], axis=-1)
        for path, old in model_state.largest.items()
    }
    return Delayed(update_inner(model_state.inner, inner), history)


def delayed_scales(history: jax.Array, recipe: Recipe) -> jax.Array:
    """float32 [..., 3] from the history of one parameter, [..., 3, history]: the
    largest magnitude of it fills the format; 1 where nothing was seen yet."""
    assert recipe.backward is not None
    largest = jnp.max(history, axis=-1)
    formats = (recipe.forward, recipe.forward, recipe.backward)
    scales = [scale_for(largest[..., i], name) for i, name in enumerate(formats)]
    return jnp.where(largest > 0, jnp.stack(scales, axis=-1), 1.0)


def in_stages(model: Model, recipe: Recipe, *, is_random: bool) -> Model:
    """`model` for the stages of a pipeline, whose parameters come wrapped as
    `low_precision` does with `turns`: its specs are of those, and each layer gives its
    weights the rows of the microbatch whose turn it is."""
    names = frozenset(chosen(model.specs, recipe))
    by_chance = recipe.by_chance and is_random

    def wrapped(path: str, spec: ParamSpec) -> Any:
        if path not in names:
            return spec
        lead = spec.axes[:1] if _stack(spec, spec) else ()
        like = lambda *axes: dataclasses.replace(spec, axes=(*lead, *axes))
        seed = like() if by_chance else None
        if recipe.is_delayed:
            return Weight(spec, like(None, None, None), like(None), seed, None)
        return Weight(spec, like(None, None), None, seed, None)

    def block(params, x_BTD, context: Context, layer, number, cache):
        def with_rows(leaf):
            if not _is_weight(leaf) or not (recipe.is_delayed or by_chance):
                return leaf
            return dataclasses.replace(leaf, rows=context.rows_B.astype(jnp.float32))

        params = jax.tree.map(with_rows, params, is_leaf=_is_weight)
        return model.block(params, x_BTD, context, layer, number, cache)

    leaves = [wrapped(path, spec) for path, spec in named(model.specs)]
    return model._replace(specs=unflatten(model.specs, leaves), block=block)


def low_precision(
    grad_fn: GradFn, specs: Tree, recipe: Recipe, *, turns: Turns | None = None
) -> GradFn:
    """`grad_fn` with the recipe's weights wrapped on the way in, and their gradients
    and figures taken apart on the way out. turns: of a pipeline."""
    names = frozenset(chosen(specs, recipe))
    by_path = dict(named(specs))
    # Sums would do for means over microbatches, and not for the largest of them.
    apart = (turns.microbatches,) if turns and recipe.is_delayed else ()

    def wrapped(params, model_state, batch, key):
        is_delayed = isinstance(model_state, Delayed)
        inner, in_use = model_state, {}
        if is_delayed:
            inner, largest = model_state
            in_use = {k: delayed_scales(x, recipe) for k, x in largest.items()}

        def wrap(path: str, array: jax.Array):
            if path not in names:
                return array
            stack = _stack(by_path[path], array)
            scales = in_use.get(path)
            if scales is not None:
                if stack:  # stages pad their layers
                    more = stack[0] - len(scales)
                    scales = jnp.pad(scales, ((0, more), (0, 0)), constant_values=1)
                scales = _laid_out(scales, stack, array)
            zeros = jnp.zeros((*stack, *apart, len(OPERANDS), 3))
            probe = _laid_out(zeros, stack, array)
            seed = _seed(key, path, stack, recipe)
            if seed is None:
                return Weight(array, probe, scales)
            seed = _laid_out(seed, stack, array)
            # In a pipeline rows come by turns (`in_stages`).
            rows = None if turns else _rows(batch, stack)
            return Weight(array, probe, scales, seed, rows)

        leaves = [wrap(path, leaf) for path, leaf in named(params)]
        result = grad_fn(unflatten(params, leaves), inner, batch, key)
        found = jax.tree.leaves(result.grads, is_leaf=_is_weight)
        paths = [path for path, _ in named(params)]
        probes, largest = {}, {}
        for path, leaf in zip(paths, found, strict=True):
            if _is_weight(leaf):
                probe = _told(leaf.probe, by_path[path])
                if turns:
                    probe /= turns.devices if apart else math.prod(turns)
                largest[path] = probe[..., _LARGEST]
                if apart:
                    largest[path] = jnp.max(largest[path], axis=-2)
                    probe = jnp.mean(probe, axis=-3)
                probes[path] = probe
        grads = [leaf.array if _is_weight(leaf) else leaf for leaf in found]
        aux = result.aux
        metrics = aux.metrics
        if recipe.figures:
            shown = _metrics(probes, list(in_use.values()), recipe)
            # A metric is shown divided by the weight, which it is multiplied by here.
            metrics = metrics | {k: v * aux.weight_sum for k, v in shown.items()}
        stats = aux.stats
        if is_delayed:
            stats = (stats, Maxima(largest))
        return result._replace(
            grads=unflatten(params, grads),
            aux=aux._replace(metrics=metrics, stats=stats),
        )

    return wrapped


def inner_loss(loss_fn: LossFn) -> LossFn:
    """`loss_fn` for a model state with a history around it, in plain precision."""

    def plain(params, model_state, batch, key):
        if isinstance(model_state, Delayed):
            model_state = model_state.inner
        return loss_fn(params, model_state, batch, key)

    return plain


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Weight)


def _stack(spec: ParamSpec, array: Any) -> tuple[int, ...]:
    """The dim of layers of `array`, a parameter of `spec`, which stages may pad."""
    return array.shape[:1] if spec.axes[0] == "layers" else ()


def _laid_out(x: jax.Array, stack: tuple[int, ...], array: jax.Array) -> jax.Array:
    """`x` with its layers, if any, where those of the parameter are."""
    first = jax.typeof(array).sharding.spec[:1] if stack else ()
    return jax.reshard(x, jax.P(*first, *(None,) * (x.ndim - len(first))))


def _told(probe: jax.Array, spec: ParamSpec) -> jax.Array:
    """Of all layers that there are, on every device."""
    probe = jax.reshard(probe, jax.P(*(None,) * probe.ndim))
    return probe[: spec.shape[0]] if _stack(spec, probe) else probe


def _seed(key, path: str, stack: tuple[int, ...], recipe: Recipe) -> jax.Array | None:
    """`Weight.seed`, from which rounding by chance follows."""
    if key is None or not recipe.by_chance:
        return None
    first, second = jax.random.key_data(key)[:2]
    seed = mix(mix(first + jnp.uint32(zlib.crc32(path.encode()))) + second)
    if stack:
        seed = mix(seed + jnp.arange(stack[0], dtype=jnp.uint32))
    return (seed >> 8).astype(jnp.float32)  # 24 bits: exact


def _rows(batch: Any, stack: tuple[int, ...]) -> jax.Array | None:
    rows = getattr(batch, "rows_B", None)
    if rows is None:
        return None
    return jnp.broadcast_to(rows.astype(jnp.float32), (*stack, *rows.shape))


def _metrics(probes: dict[str, jax.Array], scales: list, recipe: Recipe) -> dict:
    """Over all matmuls: the mean and the worst of saturation and underflow, the largest
    scale in use; and of each kind of matrix, as ffn/up, the worst layer's."""
    by_path = {k: x.reshape(-1, len(OPERANDS), 3) for k, x in probes.items()}
    flat = jnp.concatenate(list(by_path.values()))
    kinds: dict[str, list[jax.Array]] = {}
    for path, probe in by_path.items():
        kinds.setdefault("/".join(path.split("/")[-2:]), []).append(probe)
    worst = {k: jnp.max(jnp.concatenate(x), axis=0) for k, x in kinds.items()}
    formats = (recipe.forward, recipe.forward, recipe.backward or recipe.forward)
    operands = OPERANDS if recipe.backward else OPERANDS[:2]
    metrics = {}
    for i, operand in enumerate(operands):
        figures = flat[:, i]
        largest = FORMATS[formats[i]].largest
        in_use = [jnp.max(scale[..., i]) for scale in scales]
        scale = functools.reduce(jnp.maximum, in_use) if in_use else None
        metrics |= {
            f"quant/{operand}_saturation": jnp.mean(figures[:, _SATURATION]),
            f"quant/{operand}_saturation_worst": jnp.max(figures[:, _SATURATION]),
            f"quant/{operand}_underflow": jnp.mean(figures[:, _UNDERFLOW]),
            f"quant/{operand}_underflow_worst": jnp.max(figures[:, _UNDERFLOW]),
            f"quant/{operand}_scale": (
                jnp.max(figures[:, _LARGEST]) / largest if scale is None else scale
            ),
        }
        for kind, figure in worst.items():
            metrics[f"quant/{operand}_underflow_worst/{kind}"] = figure[i, _UNDERFLOW]
            if recipe.is_delayed:
                saturation = figure[i, _SATURATION]
                metrics[f"quant/{operand}_saturation_worst/{kind}"] = saturation
    return metrics
