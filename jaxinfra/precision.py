"""Which dtype each kind of number has: one frozen policy, chosen by name."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """param: parameters at rest; compute: activations and matmul inputs; reduce:
    gradients while they are summed over devices; accumulate: sums inside a matmul and
    over microbatches; optimizer_state: moments, at rest. An update is computed in
    float32 whatever these are. loss_scale: the first factor of the loss in the backward
    pass, which then moves; None where compute has float32's range."""

    param: jnp.dtype
    compute: jnp.dtype
    reduce: jnp.dtype
    accumulate: jnp.dtype
    optimizer_state: jnp.dtype
    loss_scale: float | None = None

    @property
    def matmul_precision(self) -> jax.lax.Precision:
        """float32 asked for is float32 had: a TPU would multiply in bfloat16."""
        is_full = self.compute == jnp.float32
        return jax.lax.Precision.HIGHEST if is_full else jax.lax.Precision.DEFAULT


_FLOAT32 = jnp.dtype("float32")
_BFLOAT16 = jnp.dtype("bfloat16")
_FLOAT16 = jnp.dtype("float16")

POLICIES = {
    "float32": Policy(
        param=_FLOAT32,
        compute=_FLOAT32,
        reduce=_FLOAT32,
        accumulate=_FLOAT32,
        optimizer_state=_FLOAT32,
    ),
    # float32 masters: an update of 1e-3 of a weight is below bfloat16's 8 bits.
    "bfloat16": Policy(
        param=_FLOAT32,
        compute=_BFLOAT16,
        reduce=_FLOAT32,
        accumulate=_FLOAT32,
        optimizer_state=_FLOAT32,
    ),
    # No masters: `rounding.apply_stochastic` keeps small updates on average.
    "bfloat16_params": Policy(
        param=_BFLOAT16,
        compute=_BFLOAT16,
        reduce=_FLOAT32,
        accumulate=_FLOAT32,
        optimizer_state=_FLOAT32,
    ),
    # Gradients of activations fit between 6e-8 and 65504 by a loss scale that moves.
    "float16": Policy(
        param=_FLOAT32,
        compute=_FLOAT16,
        reduce=_FLOAT32,
        accumulate=_FLOAT32,
        optimizer_state=_FLOAT32,
        loss_scale=2.0**10,
    ),
}
# `quant.recipe` says which matmuls have fewer bits; all else is bfloat16's.
POLICIES |= dict.fromkeys(("fp8", "int8", "mxfp8"), POLICIES["bfloat16"])


def policy(name: str) -> Policy:
    """The policy called `name`; KeyError for one that `checks` should have refused."""
    return POLICIES[name]
