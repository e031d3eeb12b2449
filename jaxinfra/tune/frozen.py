"""A task of which a part of the parameters is trained, and the rest stays as it came.

`partly_frozen` makes one of any task whose loss takes parameters as its specs say.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import params
from jaxinfra.config import Config, ConfigError, LoraConfig
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.precision import Policy
from jaxinfra.quant import arrays
from jaxinfra.sharding import Layout
from jaxinfra.tasks import Task
from jaxinfra.train import objective
from jaxinfra.train.objective import Frozen
from jaxinfra.tune import lora, roles


class Parts(NamedTuple):
    """Parameters as two trees, of what is trained and of what is not.

    specs: of what is trained: None in place of a frozen parameter, a pair's specs in
    place of an adapted one. frozen: shapes, dtypes and shardings of the rest.
    adopt(weights) -> (trained, Frozen). whole(trained, frozen) -> the parameters, with
    `lora.LowRank` in place of adapted ones.
    """

    specs: Tree
    frozen: Tree
    adopt: Callable[[Tree], tuple[Tree, Frozen]]
    whole: Callable[[Tree, Frozen], Tree]


def make_parts(
    specs: Tree,
    config: Config,
    layout: Layout,
    policy: Policy,
    model_state: Callable[[], Tree] = tuple,
) -> Parts:
    """The parts that `train.freeze` or `lora` of `config` make; `model_state()` is the
    first one of the whole.

    Raises ConfigError for patterns that match nothing, and for groups that do not fit.
    """
    tree_of_roles = roles.roles(specs, config)

    def trained_spec(spec: ParamSpec, role: roles.Role) -> Any:
        if role == "adapted":
            return lora.pair_specs(spec, config.lora.rank)
        return spec if role == "trained" else None

    def frozen_part(role: roles.Role, spec: ParamSpec, weight: Any) -> Any:
        if role == "adapted" and config.lora.base != "plain":
            return _in_few_bits(weight, spec, config.lora)
        return None if role == "trained" else weight

    def based(weights: Tree) -> Tree:
        return jax.tree.map(frozen_part, tree_of_roles, specs, weights)

    trained = jax.tree.map(trained_spec, specs, tree_of_roles)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(params.physical_shape(s, layout), policy.param),
        specs,
    )
    whole_places = params.shardings(specs, layout, layout.params)
    try:
        shapes = jax.eval_shape(based, shapes)
        places = jax.tree.map(_place, whole_places, shapes)
    except ValueError as error:
        few = f"lora.base={config.lora.base} with lora.group={config.lora.group}"
        raise ConfigError(f"{few}: {error}") from error

    def adopt(weights: Tree) -> tuple[Tree, Frozen]:
        new = params.initialize(
            trained, jax.random.key(config.run.seed), layout=layout, dtype=policy.param
        )
        taken = jax.tree.map(
            lambda role, fresh, old: old if role == "trained" else fresh,
            tree_of_roles,
            new,
            weights,
        )
        auto = jax.sharding.auto_axes(based, out_sharding=places)
        inner = jax.device_put(model_state(), jax.NamedSharding(layout.mesh, jax.P()))
        return taken, Frozen(inner, jax.jit(auto)(weights), digest(weights, layout))

    def whole(taken: Tree, frozen: Frozen) -> Tree:
        def one(role: roles.Role, spec: ParamSpec, base: Any, own: Any) -> Any:
            if role == "adapted":
                return lora.join(base, own, spec, config.lora)
            return own if role == "trained" else base

        if frozen.base == ():
            raise ConfigError(
                "the run trains beside the parameters of init.from, and they were not "
                "given; pass jaxinfra.open_source(config.init.from_) to train"
            )
        return jax.tree.map(one, tree_of_roles, specs, frozen.base, taken)

    abstract = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return Parts(trained, jax.tree.map(abstract, shapes, places), adopt, whole)


def partly_frozen(task: Task, config: Config, layout: Layout, policy: Policy) -> Task:
    """`task` with the parts of `config`: its specs are those of what is trained, its
    model state is a `Frozen`. A `grad_fn` of its own is of parameters as `tuned_specs`
    says. Raises as `make_parts`."""
    parts = make_parts(task.specs, config, layout, policy, task.model_state)

    def loss_fn(trained, model_state, batch, key):
        whole = parts.whole(trained, model_state)
        return task.loss_fn(whole, model_state.inner, batch, key)

    def grad_fn(trained, model_state, batch, key):
        """By the task's own, which has None for what is not trained."""
        assert task.grad_fn is not None
        frozen = objective.unscaled(model_state)
        inner = frozen.inner
        if isinstance(model_state, objective.Scaled):
            inner = model_state._replace(inner=inner)
        made = task.grad_fn(parts.whole(trained, frozen), inner, batch, key)
        is_pair = lambda leaf: isinstance(leaf, lora.LowRank)
        own = lambda leaf: {"a": leaf.a, "b": leaf.b} if is_pair(leaf) else leaf
        return made._replace(grads=jax.tree.map(own, made.grads, is_leaf=is_pair))

    def first(key: Any) -> Any:
        raise ConfigError(
            "lora and train.freeze train beside the parameters of init.from; set it"
        )

    def update_state(model_state, stats):
        inner = task.update_state(model_state.inner, stats)
        return model_state._replace(inner=inner)

    part, every = params.count(parts.specs), params.count(task.specs)
    told = f"trained: {part:,} parameters beside {every:,} ({part / every:.2%})"
    return task._replace(
        specs=parts.specs,
        loss_fn=loss_fn,
        grad_fn=task.grad_fn and grad_fn,
        first=first,
        update_state=update_state,
        adopt=parts.adopt,
        frozen=parts.frozen,
        whole=lambda *state: task.whole(parts.whole(*state), state[1].inner),
        notes="\n".join(filter(None, (told, task.notes))),
    )


def tuned_specs(
    specs: Tree, config: Config, layout: Layout, policy: Policy
) -> tuple[Tree, Tree] | None:
    """Of the parameters that `Parts.whole` gives: specs, which say where each array of
    them lies, and whether it is trained. None where all are, as they are."""
    if not config.lora.rank and not config.train.freeze:
        return None
    parts = make_parts(specs, config, layout, policy)

    def lies(spec: ParamSpec, base: Any) -> Any:
        shared = lambda x: zip(x.sharding.spec, spec.axes, strict=True)
        axes = lambda x: tuple(name if entry else None for entry, name in shared(x))
        return jax.tree.map(lambda x: dataclasses.replace(spec, axes=axes(x)), base)

    base = jax.tree.map(lies, specs, parts.frozen)
    all_of = lambda tree, flag: jax.tree.map(lambda x: flag, tree)
    frozen = lambda tree: Frozen((), tree, jnp.zeros(2, jnp.uint32))
    is_trained = parts.whole(all_of(parts.specs, True), frozen(all_of(base, False)))
    return parts.whole(parts.specs, frozen(base)), is_trained


def digest(weights: Tree, layout: Layout) -> jax.Array:
    """uint32 [2] of all bits and their places, the same on every mesh: zeros, such as
    the vocabulary's padding, add nothing."""

    def both(weights: Tree) -> jax.Array:
        totals = jnp.zeros(2, jnp.uint32)
        for path, leaf in params.named(weights):
            bits = _bits(leaf)
            for i, salt in enumerate((b"first", b"second")):
                hashes = jnp.uint32(zlib.crc32(path.encode() + salt))
                for dim in range(bits.ndim):
                    place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
                    hashes = _mix(hashes + place)
                # Not linear in the bits: signs that all turn would cancel out.
                hashes = jnp.where(bits == 0, 0, _mix(hashes + bits))
                totals = totals.at[i].add(jnp.sum(hashes, dtype=jnp.uint32))
        return totals

    place = jax.NamedSharding(layout.mesh, jax.P())
    return jax.jit(jax.sharding.auto_axes(both, out_sharding=place))(weights)


def _bits(leaf: jax.Array) -> jax.Array:
    unsigned = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32. Source: MurmurHash3's fmix32, A. Appleby, 2011."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _in_few_bits(weight: jax.Array, spec: ParamSpec, cfg: LoraConfig) -> Any:
    granularity = "block" if cfg.group else "channel"
    return arrays.quantize_parameter(
        weight, spec, cfg.base, granularity, block=cfg.group
    )


def _place(place: jax.NamedSharding, leaf: Any) -> Any:
    """Where what is made of an array that lies at `place` lies itself."""
    if arrays.is_quantized(leaf):
        return arrays.shardings(leaf, place)
    return None if leaf is None else place
