"""An average of the parameters over the steps, kept beside the optimizer's state."""

import jax
import jax.numpy as jnp
import optax

from jaxinfra.train.optim import Averaged


def averaging(
    tx: optax.GradientTransformationExtraArgs, decay: float
) -> optax.GradientTransformationExtraArgs:
    """`tx` and an exponential moving average of what the parameters become, in float32
    and before they are rounded; it starts at the first parameters.

    Source: Polyak and Juditsky, 1992; optax.incremental_update.
    """

    def init(params):
        # A copy: the state is donated, and may not have one buffer twice.
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return Averaged(tx.init(params), average)

    def update(updates, state, params=None, **extra):
        updates, rule = tx.update(updates, state.rule, params, **extra)
        new = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, params, updates)
        average = optax.incremental_update(new, state.average, 1 - decay)
        return updates, Averaged(rule, average)

    return optax.GradientTransformationExtraArgs(init, update)
