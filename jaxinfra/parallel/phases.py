"""A layer's forward and backward pass, cut into parts that run at different times.

The whole, forward pass and pull-back, is traced once to one list of equations. Each
part is the equations that its results need, up to values that an earlier part has left,
those inside of a shard_map likewise: so the parts together do what the whole does, to
the bit, and no product or kernel twice. What depends on parameters and context alone is
not left but computed again where needed.

What the forward part leaves follows `train.remat`; the cut replaces `jax.checkpoint`,
inside which weight gradients could not be told from those of the activations.

Limits: an equation that is there for its effect alone, as a print, is in no part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxinfra.ops import rematerialisation
from jaxinfra.params import Tree

Values = list[jax.Array]


class Needed(NamedTuple):
    """The equations, in order, that make values of what is given; and those variables
    given that they, or the values themselves, read."""

    eqns: list[core.JaxprEqn]
    read: list[core.Var]


class Phases(NamedTuple):
    """The parts of a layer y, told = layer(params, x, context).

    keep(params, x, context) -> (y, told, kept)
    back(params, context, kept, dy) -> (dx, dparams), or, where the weights have a part
    of their own, (dx, left)
    weigh(params, context, left) -> dparams; None where there is none
    """

    keep: Callable[..., tuple[jax.Array, Tree, Values]]
    back: Callable[..., tuple[jax.Array, Any]]
    weigh: Callable[..., Tree] | None


def cut(
    layer: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]],
    params: Tree,
    x: jax.Array,
    context: Tree,
    *,
    remat: str,
    split: bool,
) -> Phases:
    """The parts of `layer` for arguments like these, whose values are not used. What
    it tells beside y has no gradient.

    remat: what `keep` leaves, as in `ops.rematerialisation` (nothing is offloaded).
    split: whether the gradients of matrices, and others of two or more dims, get a part
    of their own.
    """
    free, structure = jax.tree.flatten((params, context))

    def whole(free, x, dy):
        params, context = structure.unflatten(free)
        of_both = lambda params, x: layer(params, x, context)
        y, pull, told = jax.vjp(of_both, params, x, has_aux=True)
        dparams, dx = pull(dy)
        return y, told, dx, jax.tree.leaves(dparams)

    closed, made = jax.make_jaxpr(whole, return_shape=True)(free, x, x)
    like_told = jax.tree.structure(made[1])
    num_told = like_told.num_leaves
    jaxpr = inlined(closed.jaxpr)
    closed = core.ClosedJaxpr(jaxpr, closed.consts)
    *free_vars, x_var, dy_var = jaxpr.invars
    y_var, *told_vars = jaxpr.outvars[: 1 + num_told]
    dx_var, *dparams_vars = jaxpr.outvars[1 + num_told :]
    on_x = _depending(jaxpr.eqns, {x_var})
    on_dy = _depending(jaxpr.eqns, {dy_var})
    given = {*free_vars, *jaxpr.constvars}

    may_keep = {x_var} | {
        var for var in _kept(jaxpr.eqns, remat) if var in on_x and var not in on_dy
    }
    _, kept = needed(jaxpr.eqns, [dx_var, *dparams_vars], given | {dy_var} | may_keep)
    kept = [var for var in kept if var in may_keep]

    def free_and(inputs: Sequence, outputs: Sequence) -> Callable[..., list]:
        """(free values, values of `inputs`) -> values of `outputs`."""
        run = part(closed, [*free_vars, *inputs], outputs)

        def call(params, context, values):
            return run(*jax.tree.leaves((params, context)), *values)

        return call

    forward = free_and([x_var], [y_var, *told_vars, *kept])

    def keep(params, x, context):
        y, *values = forward(params, context, [x])
        return y, like_told.unflatten(values[:num_told]), values[num_told:]

    like_params = jax.tree.structure(params)
    if not split:
        backward = free_and([*kept, dy_var], [dx_var, *dparams_vars])

        def back(params, context, kept, dy):
            dx, *dparams = backward(params, context, [*kept, dy])
            return dx, like_params.unflatten(dparams)

        return Phases(keep, back, None)

    small = [var for var in dparams_vars if len(var.aval.shape) < 2]
    # Whole, so that what a shard_map makes for both parts may be left.
    done, _ = needed(
        jaxpr.eqns, [dx_var, *small], given | {dy_var, *kept}, is_whole=True
    )
    may_leave = {*kept, dy_var, *small} | {
        var for eqn in done for var in eqn.outvars if var in on_x or var in on_dy
    }
    _, left = needed(jaxpr.eqns, dparams_vars, given | may_leave)
    left = [var for var in left if var in may_leave]
    backward = free_and([*kept, dy_var], [dx_var, *left])
    weights = free_and(left, dparams_vars)

    def back_split(params, context, kept, dy):
        dx, *left = backward(params, context, [*kept, dy])
        return dx, left

    def weigh(params, context, left):
        return like_params.unflatten(weights(params, context, left))

    return Phases(keep, back_split, weigh)


def part(
    closed: core.ClosedJaxpr, inputs: Sequence, outputs: Sequence
) -> Callable[..., list]:
    """(values of `inputs`) -> values of `outputs`: variables of a program, of which the
    outputs need no others than these."""
    jaxpr = closed.jaxpr
    eqns, _ = needed(jaxpr.eqns, outputs, {*inputs, *jaxpr.constvars})
    sub = _with(jaxpr, eqns, inputs, outputs)
    return core.jaxpr_as_fun(core.ClosedJaxpr(sub, closed.consts))


def needed(
    eqns: Sequence[core.JaxprEqn],
    outputs: Sequence,
    given: set,
    *,
    is_whole: bool = False,
) -> Needed:
    """What makes `outputs` of what is `given`. is_whole: a shard_map with all that it
    makes."""
    wanted = set(_variables(outputs))
    read = {var: None for var in _variables(outputs) if var in given}
    chosen = []
    for eqn in reversed(eqns):
        if not any(var in wanted and var not in given for var in eqn.outvars):
            continue
        if eqn.primitive.name == "shard_map" and not is_whole:
            eqn = _with_less(eqn, wanted - given, given)
        chosen.append(eqn)
        for var in _variables(eqn.invars):
            wanted.add(var)
            if var in given:
                read[var] = None
    return Needed(chosen[::-1], list(read))


def _kept(eqns: Iterable[core.JaxprEqn], remat: str) -> Iterator[core.Var]:
    """The results of these equations of the forward pass that `remat` lets stay."""
    is_saved = rematerialisation.policy(remat)
    for eqn in eqns:
        if is_saved(eqn.primitive, **eqn.params):
            yield from eqn.outvars
        elif remat.startswith("save:") and eqn.primitive.name == "shard_map":
            # What is saved in there, or all that is made of it where it stays there.
            inner = inlined(eqn.params["jaxpr"])
            outs = set(_variables(inner.outvars))
            saved = set(_kept(inner.eqns, remat))
            leaving = saved & outs | _depending(inner.eqns, saved - outs)
            for var, atom in zip(eqn.outvars, inner.outvars, strict=True):
                if not _is_literal(atom) and atom in leaving:
                    yield var


def _depending(eqns: Iterable[core.JaxprEqn], roots: set) -> set:
    """`roots` and every variable that is computed from one of them."""
    found = set(roots)
    for eqn in eqns:
        if any(var in found for var in _variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def _with_less(eqn: core.JaxprEqn, wanted: set, given: set) -> core.JaxprEqn:
    """A shard_map that makes those of its results that are wanted, of its inputs and
    of those of its results that are given, whose specs must tell all that differs
    between devices, as those of pull-backs do."""
    inner, specs = inlined(eqn.params["jaxpr"]), eqn.params["out_specs"]
    outputs = list(zip(eqn.outvars, inner.outvars, specs, strict=True))
    made = [output for output in outputs if output[0] in wanted]
    # Inside -> what stands for it outside, and its spec.
    outside = zip(eqn.invars, eqn.params["in_specs"], strict=True)
    inputs = dict(zip(inner.invars, outside, strict=True))
    for var, atom, spec in outputs:
        if var in given and not _is_literal(atom):
            inputs[atom] = var, spec
    atoms = [atom for _, atom, _ in made]
    eqns, read = needed(inner.eqns, atoms, {*inputs})
    changed = {
        "jaxpr": _with(inner, eqns, read, atoms),
        "in_specs": tuple(inputs[var][1] for var in read),
        "out_specs": tuple(spec for _, _, spec in made),
    }
    return eqn.replace(
        invars=[inputs[var][0] for var in read],
        outvars=[var for var, _, _ in made],
        params=eqn.params | changed,
    )


def _with(
    jaxpr: core.Jaxpr, eqns: list[core.JaxprEqn], inputs: Sequence, outputs: Sequence
) -> core.Jaxpr:
    """`jaxpr` with these equations, inputs and outputs alone, whose names go."""
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(
        eqns=eqns, invars=[*inputs], outvars=[*outputs], debug_info=names
    )


def inlined(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """`jaxpr` with the equations of jitted functions in place of their calls, so that a
    result is not taken to read what only another result of the same call does."""

    def flat(eqns, env: dict) -> Iterator[core.JaxprEqn]:
        read = lambda atom: atom if _is_literal(atom) else env.get(atom, atom)
        for eqn in eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in _CALLS else None
            if inner is None or inner.consts:
                outs = [core.Var(var.aval) for var in eqn.outvars]
                env.update(zip(eqn.outvars, outs, strict=True))
                yield eqn.replace(invars=inputs, outvars=outs)
                continue
            inside = dict(zip(inner.jaxpr.invars, inputs, strict=True))
            yield from flat(inner.jaxpr.eqns, inside)
            for var, atom in zip(eqn.outvars, inner.jaxpr.outvars, strict=True):
                env[var] = atom if _is_literal(atom) else inside.get(atom, atom)

    env: dict = {}
    eqns = list(flat(jaxpr.eqns, env))
    outs = [a if _is_literal(a) else env.get(a, a) for a in jaxpr.outvars]
    return jaxpr.replace(eqns=eqns, outvars=outs)


_CALLS = ("jit", "pjit")


def _is_literal(atom) -> bool:
    return isinstance(atom, core.Literal)


def _variables(atoms: Iterable) -> list:
    return [atom for atom in atoms if not _is_literal(atom)]
