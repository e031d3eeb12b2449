"""Runs that trained a part of a model, or adapters: joined with the source that they
began from, or their adapters alone, each for rows of its own."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra import options, precision, runfolder
from jaxinfra.checkpoint import restore
from jaxinfra.config import Config, ConfigError, ModelConfig
from jaxinfra.interop import pretrained, runs
from jaxinfra.models.specs import param_specs
from jaxinfra.params import Tree
from jaxinfra.sharding import Layout
from jaxinfra.train.objective import Frozen
from jaxinfra.tune import frozen, lora


class _Trained(NamedTuple):
    """What a run trained; the digest of what it trained that beside."""

    run: str
    config: Config
    tree: Tree
    digest: np.ndarray
    parts: frozen.Parts


def read_tuned(
    run: pathlib.Path,
    step: int | None,
    config: Config,
    model: ModelConfig,
    specs: Tree,
    *,
    layout: Layout,
    dtype: Any,
) -> Tree:
    """The parameters of a run with frozen ones or adapters, joined and merged, so that
    they are those of a plain model: `pretrained.Source.read`.

    Raises ConfigError if init.from is not there, or is not what it was.
    """
    del model, specs  # the run's own
    trained = _read(run, step, config, layout)
    whole = lora.merge(trained.parts.whole(trained.tree, _beside(trained, layout)))
    return jax.tree.map(lambda x: x.astype(dtype), whole)


def by_row(
    source: pretrained.Source,
    adapters: Sequence[str],
    rows: Sequence[int],
    *,
    layout: Layout,
) -> Tree:
    """The parameters of `source`, with the adapters of run `adapters[rows[b]]`, or none
    for -1, in row b of a batch.

    Raises ConfigError for runs that did not train adapters alone, or that trained them
    beside others than those of `source`, or such as are kept otherwise.
    """
    opened = [_open(adapter) for adapter in adapters]
    first = opened[0][2]
    for name, (_, _, config) in zip(adapters, opened, strict=True):
        if not config.lora.rank or config.lora.whole:
            raise ConfigError(
                f"--adapter {name} is no run of adapters alone (lora.rank above 0, "
                "lora.whole empty); use it as SOURCE"
            )
        ours, theirs = (
            (c.model, c.precision, dataclasses.replace(c.lora, rank=0, alpha=1.0))
            for c in (first, config)
        )
        if ours != theirs:
            raise ConfigError(
                f"--adapter {name} has another model, precision, lora.targets or "
                f"lora.base than --adapter {adapters[0]}; use them one by one"
            )
    found = [_read(*of, layout) for of in opened]
    beside = _kept(found[0], source, layout)
    for trained in found:
        _check_digest(trained, beside, source.where)
    pairs = [(trained.tree, trained.config.lora) for trained in found]
    specs = param_specs(first.model)
    return lora.by_row(specs, beside.base, pairs, np.asarray(rows), layout)


def _open(adapter: str) -> tuple[pathlib.Path, int | None, Config]:
    run, step = runfolder.run_and_step(adapter)
    folder, newest = run / runfolder.CHECKPOINTS, step
    if newest is None and (newest := restore.latest(folder)) is None:
        raise ConfigError(f"{folder} has no checkpoint; name a run with adapters")
    metadata = restore.restore(folder, newest, {}).metadata
    return run, step, options.from_json(metadata["config"], fill=True)


def _read(
    run: pathlib.Path, step: int | None, config: Config, layout: Layout
) -> _Trained:
    policy = precision.policy(config.precision)
    parts = frozen.make_parts(param_specs(config.model), config, layout, policy)
    is_scaled = policy.loss_scale is not None
    name = "model_state/inner/digest" if is_scaled else "model_state/digest"
    whole = jax.NamedSharding(layout.mesh, jax.P())
    tree, beside = runs.read_params(
        run,
        step,
        config,
        parts.specs,
        layout=layout,
        beside={name: jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)},
    )
    return _Trained(str(run), config, tree, np.asarray(beside[name]), parts)


def _beside(trained: _Trained, layout: Layout) -> Frozen:
    """The frozen parameters of a run; ConfigError if they are not what they were."""
    where = trained.config.init.from_
    if not runfolder.run_and_step(where)[0].exists():
        raise ConfigError(
            f"{trained.run} was trained beside init.from={where}, which is not there "
            f"(from {os.getcwd()}); put it there"
        )
    beside = _kept(trained, pretrained.open_source(where), layout)
    _check_digest(trained, beside, where)
    return beside


def _kept(trained: _Trained, source: pretrained.Source, layout: Layout) -> Frozen:
    """The parameters of `source` as the run keeps what it does not train."""
    config = trained.config
    weights, _ = source.begin(
        config.model, layout=layout, dtype=precision.policy(config.precision).param
    )
    _, beside = trained.parts.adopt(weights)
    return beside


def _check_digest(trained: _Trained, beside: Frozen, where: str) -> None:
    if not np.array_equal(np.asarray(beside.digest), trained.digest):
        raise ConfigError(
            f"{trained.run} was trained beside other parameters than {where} holds; "
            "give it those"
        )
