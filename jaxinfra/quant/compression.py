"""What of a model is kept in few bits, and how that lies: a record and its arrays."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxinfra import params, sharding
from jaxinfra.config import ConfigError
from jaxinfra.params import ParamSpec, Tree
from jaxinfra.quant import arrays
from jaxinfra.quant.rescaled import Rescaled
from jaxinfra.sharding import Layout

Format = Literal["int8", "int4", "nf4"]
Method = Literal["nearest", "gptq", "awq"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """Weights in few bits: activations, and all that stands in no path of `matrices`,
    stay as they are.

    group: inputs that share a scale for each output, 0: all, a scale a channel. A dim
    that is shorter is one group.
    """

    format: Format
    method: Method
    group: int
    matrices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"matrices": list(self.matrices)}


def from_json(fields: Any) -> Compression:
    """The inverse of `to_json`; ConfigError for what no version of it has written."""
    match fields:
        case {
            "format": str(form),
            "method": str(method),
            "group": int(group),
            "matrices": [*paths],
            **others,
        } if (
            not others
            and form in get_args(Format)
            and method in get_args(Method)
            and group >= 0
            and all(isinstance(path, str) for path in paths)
        ):
            return Compression(
                format=form, method=method, group=group, matrices=tuple(paths)
            )
    raise ConfigError(
        f"the model is compressed in a way that this version does not know: {fields}"
    )


def abstract(specs: Tree, how: Compression, layout: Layout, dtype: jnp.dtype) -> Tree:
    """Shapes, dtypes and shardings of the compressed parameters.

    Raises ConfigError if groups do not divide a dim, or devices a dim's bytes.
    """
    plain = params.abstract(specs, layout, layout.params, dtype)
    known = dict(params.named(specs))
    if lost := [path for path in how.matrices if path not in known]:
        raise ConfigError(f"the model has no matrix {lost[0]}, which is compressed")

    def one(path: str, spec: ParamSpec, leaf: jax.ShapeDtypeStruct) -> Any:
        if path not in how.matrices:
            return leaf
        try:
            shapes = jax.eval_shape(
                lambda w: in_form(w, spec, how),
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            )
            return placed(shapes, spec, layout)
        except ValueError as error:
            raise ConfigError(f"{path} with groups of {how.group}: {error}") from error

    leaves = [
        one(path, spec, leaf)
        for (path, spec), leaf in zip(known.items(), jax.tree.leaves(plain))
    ]
    return params.unflatten(specs, leaves)


def in_form(w: jax.Array, spec: ParamSpec, how: Compression) -> Any:
    """`w`, to the nearest, in the form that `how` leaves it in."""
    granularity = "block" if how.group else "channel"
    q = arrays.quantize_parameter(w, spec, how.format, granularity, block=how.group)
    if how.method != "awq":
        return q
    kept = num_kept(spec)
    return Rescaled(q, jnp.ones(w.shape[: w.ndim - kept]), spec.axes.count("experts"))


def num_kept(spec: ParamSpec) -> int:
    """How many last dims a matmul keeps; stacks and what it sums over stand before."""
    return len(spec.shape) - 1 - spec.contract[-1]


def placed(tree: Any, spec: ParamSpec, layout: Layout) -> Any:
    """`tree`, of `in_form`'s form, shapes or arrays, laid out as the parameter is."""
    rules = layout.params

    def put(x: Any, place: jax.NamedSharding) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.device_put(x, place)

    q = tree.weight if isinstance(tree, Rescaled) else tree
    place = jax.NamedSharding(layout.mesh, sharding.spec(rules, *spec.axes))
    q = jax.tree.map(put, q, arrays.shardings(q, place))
    if not isinstance(tree, Rescaled):
        return q
    axes = spec.axes[: len(spec.axes) - num_kept(spec)]
    place = jax.NamedSharding(layout.mesh, sharding.spec(rules, *axes))
    return dataclasses.replace(tree, weight=q, factors=put(tree.factors, place))
