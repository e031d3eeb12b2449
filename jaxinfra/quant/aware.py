"""Quantization-aware training: a loss that sees its matrices rounded, as they will be
kept, and hands their gradients on as if they were not; so does a pipeline, which gives
its gradients itself.

Source: arXiv:1308.3432 (straight-through estimator), arXiv:1712.05877 section 3.
"""

from typing import Any

import jax

from jaxinfra.config import Config, ConfigError
from jaxinfra.params import ParamSpec, Tree, named, unflatten
from jaxinfra.quant import arrays, compression, recipe
from jaxinfra.quant.compression import Compression


def quantize_aware(function: Any, specs: Tree, config: Config) -> Any:
    """`function` of the parameters of `specs` and more, a loss or a GradFn, at its
    matrices as `train.quantize_aware` and `quantize_group` say, rounded to the
    nearest; a router stays as it is.

    `compress.py --method nearest` of what was trained computes the same. Costs a copy
    of the parameters; no mesh limits the groups. Raises ConfigError where they do not
    divide a dim.
    """
    how = Compression(
        format=config.train.quantize_aware,
        method="nearest",
        group=config.train.quantize_group,
        matrices=recipe.to_round(specs),
    )

    def rounded(path: str, spec: ParamSpec, w: jax.Array) -> jax.Array:
        """The numbers that w's codes stand for, with w's gradient."""
        if path not in how.matrices:
            return w
        near = arrays.dequantize(compression.in_form(w, spec, how), w.dtype)
        if (place := jax.typeof(w).sharding.spec) != jax.typeof(near).sharding.spec:
            near = jax.reshard(near, place)  # pairs that two devices share
        return w + jax.lax.stop_gradient(near - w)

    def all_rounded(params: Tree) -> Tree:
        leaves = jax.tree.leaves(params)
        return unflatten(
            specs, [rounded(*at, w) for at, w in zip(named(specs), leaves, strict=True)]
        )

    def aware(params: Tree, *rest: Any) -> Any:
        return function(all_rounded(params), *rest)

    try:
        jax.eval_shape(
            all_rounded,
            jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, "float32"), specs),
        )
    except ValueError as error:
        raise ConfigError(
            f"train.quantize_group={config.train.quantize_group}: {error}"
        ) from error
    return aware
