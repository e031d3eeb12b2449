"""The parameters that a step of a run folder holds."""

import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra import params, precision, runfolder
from jaxinfra.checkpoint import restore
from jaxinfra.config import Config, ModelConfig
from jaxinfra.params import Tree
from jaxinfra.quant import compression, rescaled
from jaxinfra.quant.compression import Compression
from jaxinfra.sharding import Layout

_LOG = logging.getLogger(__name__)
Shapes = Mapping[str, jax.ShapeDtypeStruct]


def read_params(
    run: pathlib.Path,
    step: int | None,
    config: Config,
    specs: Tree,
    *,
    layout: Layout,
    beside: Shapes | None = None,
    kept_as: Callable[[jnp.dtype], Tree] | None = None,
) -> tuple[Tree, dict[str, jax.Array]]:
    """(what the run evaluates of its trained parameters, which are of `specs`, and the
    arrays that stand `beside` them, by path) of a step, None: the newest good one.

    kept_as(dtype) -> shapes of parameters that are not arrays of that dtype alone.
    """
    part, dtype = "params", precision.policy(config.precision).param
    if config.optimizer.ema_decay:  # the average is what the run evaluates
        part, dtype = "opt_state/average", jnp.float32
    abstract = (
        kept_as(dtype)
        if kept_as
        else params.abstract(specs, layout, layout.params, dtype)
    )
    wanted = {f"{part}/{path}": leaf for path, leaf in params.named(abstract)}
    shapes = {f"{part}/{path}": spec.shape for path, spec in params.named(specs)}
    folder, every = run / runfolder.CHECKPOINTS, wanted | dict(beside or {})
    if step is None:  # passes over a step that is found damaged only now
        found = restore.restore_latest(folder, every, logical_shapes=shapes)
    else:
        found = restore.restore(folder, step, every, logical_shapes=shapes)
    assert found is not None
    for bad, why in found.rejected:
        _LOG.warning("step %d is passed over: %s", bad, why)
    weights = params.unflatten(abstract, [found.arrays[name] for name in wanted])
    return weights, {name: found.arrays[name] for name in beside or {}}


def read_router_bias(
    run: pathlib.Path, step: int | None, config: Config, layout: Layout
) -> jax.Array:
    """The biases of the run's routers, [layers, experts]."""
    # Alone in the model state, or within what another feature keeps there.
    shapes = restore.newest_shapes(run / runfolder.CHECKPOINTS)
    [path] = [name for name in shapes if name.endswith("/router_bias")]
    place = jax.NamedSharding(layout.mesh, jax.P())
    like = jax.ShapeDtypeStruct(shapes[path], jnp.float32, sharding=place)
    _, found = read_params(run, step, config, {}, layout=layout, beside={path: like})
    return found[path]


def read_whole(
    run: pathlib.Path,
    step: int | None,
    config: Config,
    model: ModelConfig,
    specs: Tree,
    *,
    layout: Layout,
    dtype: Any,
) -> Tree:
    """The parameters of a run that trained them all: `pretrained.Source.read`."""
    del model  # the run's own
    weights, _ = read_params(run, step, config, specs, layout=layout)
    return jax.tree.map(lambda x: x.astype(dtype), weights)


def read_compressed(
    run: pathlib.Path,
    step: int | None,
    config: Config,
    how: Compression,
    model: ModelConfig,
    specs: Tree,
    *,
    layout: Layout,
    dtype: Any,
) -> Tree:
    """The parameters of a run that was compressed, as they are kept."""
    del model  # the run's own
    weights, _ = read_params(
        run,
        step,
        config,
        specs,
        layout=layout,
        kept_as=lambda kept: compression.abstract(specs, how, layout, kept),
    )
    cast = lambda leaf: leaf if rescaled.in_few_bits(leaf) else leaf.astype(dtype)
    return jax.tree.map(cast, weights, is_leaf=rescaled.in_few_bits)
