"""Fused kernels without their hardware: splash interpreted, cuDNN's to be traced; and
in the place of cuDNN's, what they are said to compute, written out."""

import functools

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.interpreters import mlir

from jaxinfra.ops import fused_attention, rematerialisation
from jaxinfra.ops.seam import Context

CUDNN_VERSION = 92000  # 9.20, newer than anything that is asked for


def allow(monkeypatch):
    splash = functools.partial(fused_attention.splash, interpret=True)
    monkeypatch.setattr(fused_attention, "splash", splash)
    found = lambda *_: CUDNN_VERSION
    for of_gpus in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(fused_attention_stablehlo, of_gpus, found)
    _compute_on_cpu()


def saving(attend, remat, *, window=0):
    """Attention over (q, k, v), which keeps what `remat` says; squared, as whatever
    follows it is of use to the gradient."""

    def run(*arrays):
        out, _ = attend(*arrays, Context(None), None, window=window, softcap=0.0)
        return jnp.square(out)

    return jax.checkpoint(run, policy=rematerialisation.policy(remat))


def sizes_kept(function, arrays, *, block=0):
    """(size of the result, those of all arrays that the pull-back holds, but masks of
    so many queries and keys)."""
    out, pull = jax.eval_shape(functools.partial(jax.vjp, function), *arrays)
    is_mask = lambda x: x.dtype == bool and x.shape[-2:] == (block, block)
    return out.size, sorted(x.size for x in jax.tree.leaves(pull) if not is_mask(x))


@functools.cache
def _compute_on_cpu():
    for name, function in (("fwd", _forward), ("bwd", _backward)):
        kernel = getattr(
            fused_attention_stablehlo, f"_dot_product_attention_{name}_p_wrapper"
        )
        lowering = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(kernel, lowering, platform="cpu")


def _scores(q_BTNH, k_BSKH, bias, scale, mask_type):
    """Float32, [B, K, G, T, S], with the mask as a number that is added."""
    B, T, _, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, **_FLOAT32) * scale
    if bias.size:
        assert bias.shape[1] == 1
        scores += bias[:, :, None].astype(jnp.float32)
    if mask_type == fused_attention_stablehlo.MaskType.CAUSAL:
        is_past = jnp.arange(T)[:, None] >= jnp.arange(k_BSKH.shape[1])
        scores = jnp.where(is_past, scores, -jnp.inf)
    return scores


def _forward(q, k, v, bias, *_, scale, mask_type, is_training, **__):
    scores = _scores(q, k, bias, scale, mask_type)
    log_sum = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - log_sum).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, **_FLOAT32)
    out = out.reshape(q.shape).astype(q.dtype)
    B, T, N, _ = q.shape
    return (out, log_sum.reshape(B, N, T)) if is_training else (out,)


def _backward(q, k, v, bias, *more, scale, mask_type, variadic_args, **_):
    """By the result and the log-sum-exp that are given: those of all keys, where there
    are more than these. Source: arXiv:2307.08691 algorithm 2."""
    log_sum, out, g = more[6:9]
    scores = _scores(q, k, bias, scale, mask_type)
    weights = jnp.exp(scores - log_sum.reshape(*scores.shape[:-1], 1))
    B, T, N, H = q.shape
    by_group = lambda x: x.reshape(B, T, k.shape[2], -1, H)
    q, out, g = by_group(q), by_group(out), by_group(g)
    mean = jnp.einsum("BTKGH,BTKGH->BKGT", g, out, **_FLOAT32)
    dv = jnp.einsum("BKGTS,BTKGH->BSKH", weights.astype(g.dtype), g, **_FLOAT32)
    dweights = jnp.einsum("BTKGH,BSKH->BKGTS", g, v, **_FLOAT32)
    dscores = weights * (dweights - mean[..., None])
    narrow = (dscores * scale).astype(q.dtype)
    dq = jnp.einsum("BKGTS,BSKH->BTKGH", narrow, k, **_FLOAT32)
    dk = jnp.einsum("BKGTS,BTKGH->BSKH", narrow, q, **_FLOAT32)
    made = (
        dq.reshape(B, T, N, H).astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
    )
    if variadic_args[1]:
        dbias = jnp.sum(dscores, (1, 2))[:, None]
        made += (dbias.astype(bias.dtype),)
    return made


_FLOAT32 = {"preferred_element_type": jnp.float32}
