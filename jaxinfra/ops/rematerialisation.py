"""What a layer's backward pass finds kept, and what it makes again: `train.remat`.

    none                           all that it reads is kept
    full                           the layer's input alone
    dots                           and what matmuls made
    save:NAME+NAME                 and the activations of these names
    offload:NAME+NAME              these rest in the host's pinned memory meanwhile
    save:NAME+NAME,offload:NAME    both

`config.REMAT_NAMES` has the names. layer_input is what every layer keeps: with
offload:layer_input it keeps nothing on the device. A CPU, whose memory is the host's,
keeps what is offloaded. A fused kernel under Ulysses has its result kept twice: as it
made it, and as what follows reads it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core.primitives import name_p

import jaxinfra
from jaxinfra.mesh import HOST

# cuDNN's attention, whose backward pass reads its result and the sums of its softmax:
# what is kept as attention there.
CUDNN = "dot_product_attention_fwd_wrapper"


def rematerialised(block: Callable, remat: str, *, prevent_cse: bool) -> Callable:
    """`block` (params, x, context, layer, number, cache), which keeps what `remat`
    says. Raises ConfigError for a word or a name that is unknown."""

    def named(params: Any, x_BTD: jax.Array, *more: Any) -> Any:
        return block(params, checkpoint_name(x_BTD, "layer_input"), *more)

    return jax.checkpoint(
        named, policy=policy(remat), static_argnums=(3,), prevent_cse=prevent_cse
    )


def policy(remat: str) -> Callable[..., Any]:
    """Of an equation's primitive and parameters, as `jax.checkpoint` takes it: whether
    its results are kept; with offload, and where."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.everything_saveable
    if remat == "full":
        return policies.nothing_saveable
    if remat == "dots":
        return policies.dots_saveable
    names = jaxinfra.remat_names(remat)
    by_name = policies.save_only_these_names(*names["save"])
    if names["offload"]:
        by_name = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=names["save"],
            names_which_can_be_offloaded=names["offload"],
            offload_src="device",
            offload_dst=HOST,
        )

    def kept(primitive: Any, *avals: Any, **parameters: Any) -> Any:
        if primitive.name == CUDNN:
            return by_name(name_p, *avals, name="attention")
        return by_name(primitive, *avals, **parameters)

    return kept
