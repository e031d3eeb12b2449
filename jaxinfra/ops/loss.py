"""Cross-entropy against a large vocabulary without the logits of the whole batch.

Tokens are taken in chunks. A chunk's logits give its loss and, at once, its gradients:
the backward pass only scales them, so that no logit is computed twice or kept.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra import mesh, sharding
from jaxinfra.ops import seam
from jaxinfra.precision import Policy
from jaxinfra.sharding import Rules


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight; float32 scalars.

    nll: -log p(target), or the cross-entropy to smoothed targets. z: log(Z)^2, whose
    multiple z_loss keeps logits from drifting.
    """

    nll: jax.Array
    z: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """vocab_size: ids from here on are padding and get no probability. chunk: tokens a
    device whose logits exist at a time; 0 lets the platform decide. softcap: of the
    logits, 0 for none. z_loss: weight of z in the gradient. label_smoothing: the part
    of each target that is spread evenly over the vocabulary."""

    vocab_size: int
    policy: Policy
    rules: Rules
    chunk: int = 0
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cfg: LossConfig,
) -> CrossEntropy:
    """Sums of the next-token loss of logits = h_BTD head_VD^T.

    head_VD may be split over vocabulary and width; h_BTD over batch and length.
    Differentiable by h and head in the first field only, with z_loss added there.
    Source: chunked gradients as in arXiv:2410.10989 section 3.2; z-loss
    arXiv:2204.02311 section 5; label smoothing arXiv:1512.00567 section 7.
    Limits: in float16 the weight of a token must be below 60.
    """
    sums, _ = _on_devices(h_BTD, head_VD, targets_BT, weights_BT, cfg, grads=False)
    return sums


def with_gradients(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cfg: LossConfig,
    scale: jax.Array | float = 1.0,
) -> tuple[CrossEntropy, tuple[jax.Array, jax.Array]]:
    """`cross_entropy`, and `scale` times its gradients by h and head."""
    sums, grads = _on_devices(h_BTD, head_VD, targets_BT, weights_BT, cfg, grads=True)
    dh_BTD, dhead_VD, *_ = _backward(cfg, grads, CrossEntropy(scale, 0.0))
    return sums, (dh_BTD, dhead_VD)


def _forward(h_BTD, head_VD, targets_BT, weights_BT, cfg):
    return _on_devices(h_BTD, head_VD, targets_BT, weights_BT, cfg, grads=True)


def _backward(cfg, residuals, cotangent):
    dh_BTD, dhead_VD = residuals
    g = cotangent.nll
    dh_BTD = (dh_BTD * g).astype(cfg.policy.compute)
    return dh_BTD, (dhead_VD * g).astype(dhead_VD.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _on_devices(h_BTD, head_VD, targets_BT, weights_BT, cfg, *, grads):
    """Runs `_local` on each device's tokens and vocabulary; sums what must be summed.

    A shard_map: with sharding types alone the head's gradient would be reduced over the
    mesh once a chunk, here once a step.
    """
    tokens_spec = sharding.spec(cfg.rules, "batch", "length")
    h_spec = sharding.spec(cfg.rules, "batch", "length", "width")
    head_spec = jax.typeof(head_VD).sharding.spec
    way = _by_vocabulary if _do_tokens_travel(h_BTD, head_VD, cfg) else _by_tokens
    axes = sharding.axes_here(cfg.rules, "batch", "length")
    sums_spec = CrossEntropy(jax.P(), jax.P())
    return jax.shard_map(
        functools.partial(way, cfg=cfg, head_spec=head_spec, axes=axes, grads=grads),
        in_specs=(h_spec, head_spec, tokens_spec, tokens_spec),
        out_specs=(sums_spec, (h_spec, head_spec) if grads else None),
        check_vma=False,
    )(h_BTD, head_VD, targets_BT, weights_BT)


def _do_tokens_travel(h_BTD, head_VD, cfg) -> bool:
    """Whether the head that ZeRO has cut by width is to be cut by vocabulary, and the
    activations of all its axes gathered: where that is less on the wire.

    For Llama-3-8B, fsdp 8 and 8192 tokens a device, 1.2 GB in place of 4.6 (v5p sums
    all of a gradient to scatter it), and no whole head with its float32 gradient.
    """
    head_spec = jax.typeof(head_VD).sharding.spec
    cut = sharding.zero_axes(head_spec[1])
    n = sharding.axis_product(jax.sharding.get_abstract_mesh(), cut)
    if n == 1:
        return False
    V = seam.local_shape(head_VD.shape, head_spec)[0]
    B, T, _ = seam.local_shape(h_BTD.shape, jax.typeof(h_BTD).sharding.spec)
    compute, reduce = cfg.policy.compute.itemsize, cfg.policy.reduce.itemsize
    activations = n * B * T * 2 * compute
    return V % n == 0 and activations < V * (compute + reduce) * (n - 1) // n


def _by_tokens(h_BTD, head_VD, targets_BT, weights_BT, *, cfg, head_spec, axes, grads):
    """Each device's own tokens against the head, gathered over ZeRO's axes."""
    whole_VD = sharding.all_gather(head_VD.astype(cfg.policy.compute), head_spec)
    sums, dh_BTD, dhead_VD = _local(
        h_BTD, whole_VD, targets_BT, weights_BT, cfg, cfg.rules.vocab, grads=grads
    )
    sums = jax.lax.psum(sums, axes)
    if not grads:
        return sums, None
    dhead_VD = sharding.all_reduce(dhead_VD.astype(cfg.policy.reduce), head_spec, axes)
    return sums, (_summed(dh_BTD, cfg), dhead_VD.astype(head_VD.dtype))


def _by_vocabulary(
    h_BTD, head_VD, targets_BT, weights_BT, *, cfg, head_spec, axes, grads
):
    """All tokens of ZeRO's axes against each device's own part of the vocabulary, which
    these cut within what `rules.vocab` has cut."""
    cut = sharding.zero_axes(head_spec[1])
    gather = functools.partial(jax.lax.all_gather, axis_name=cut, axis=0, tiled=True)
    exchange = functools.partial(jax.lax.all_to_all, axis_name=cut, tiled=True)
    others = tuple(axis for axis in axes if axis not in cut)
    own_VD = exchange(head_VD.astype(cfg.policy.compute), split_axis=0, concat_axis=1)
    sums, dh_BTD, dhead_VD = _local(
        gather(h_BTD),
        own_VD,
        gather(targets_BT),
        gather(weights_BT),
        cfg,
        (*cfg.rules.vocab, *cut),
        grads=grads,
    )
    sums = jax.lax.psum(sums, others)
    if not grads:
        return sums, None
    # Parts are rounded to travel and summed in float32: a reduce-scatter that no
    # compiler makes an all-reduce of.
    parts = exchange(_rounded(dh_BTD, cfg)[None], split_axis=1, concat_axis=0)
    dh_BTD = _summed(jnp.sum(parts, axis=0, dtype=jnp.float32), cfg)
    dhead_VD = jax.lax.psum(dhead_VD.astype(cfg.policy.reduce), others)
    dhead_VD = exchange(dhead_VD, split_axis=1, concat_axis=0)
    return sums, (dh_BTD, dhead_VD.astype(head_VD.dtype))


def _summed(dh: jax.Array, cfg: LossConfig) -> jax.Array:
    """A gradient of activations, summed over the parts of the vocabulary in float32."""
    return _rounded(jax.lax.psum(dh.astype(jnp.float32), cfg.rules.vocab), cfg)


def _rounded(dh: jax.Array, cfg: LossConfig) -> jax.Array:
    """A gradient of activations in compute dtype; in float16 it is rounded once it has
    been scaled."""
    is_half = cfg.policy.compute == jnp.float16
    return dh if is_half else dh.astype(cfg.policy.compute)


def _local(h_BTD, head_VD, targets_BT, weights_BT, cfg, axes, *, grads):
    """Loss sums and gradients, not yet summed over devices, of these tokens; of h as
    `_rounded`, of the head float32. The vocabulary is split over `axes`."""
    B, T, D = h_BTD.shape
    num_chunks, size = _chunks(B * T, head_VD.shape[0], cfg.chunk)
    pad = num_chunks * size - B * T

    def split(x):  # [B, T, ...] -> [chunks, size, ...]; padding has weight zero
        flat = x.reshape(B * T, *x.shape[2:])
        flat = jnp.pad(flat, [(0, pad)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(num_chunks, size, *x.shape[2:])

    one_chunk = functools.partial(
        _chunk, head_VD=head_VD, cfg=cfg, axes=axes, grads=grads
    )

    def step(carry, chunk):
        sums, dhead_VD = carry
        chunk_sums, dh_CD, chunk_dhead_VD = one_chunk(*chunk)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        return (sums, dhead_VD + chunk_dhead_VD if grads else None), dh_CD

    zeros = jnp.zeros(head_VD.shape, cfg.policy.accumulate) if grads else None
    start = (CrossEntropy(jnp.float32(0), jnp.float32(0)), zeros)
    chunks = (split(h_BTD), split(targets_BT), split(weights_BT))
    if num_chunks == 1:
        (sums, dhead_VD), dh = step(start, jax.tree.map(lambda x: x[0], chunks))
    else:
        (sums, dhead_VD), dh = jax.lax.scan(step, start, chunks)
    if not grads:
        return sums, None, None
    return sums, dh.reshape(-1, D)[: B * T].reshape(B, T, D), dhead_VD


def _chunk(h_CD, targets_C, weights_C, *, head_VD, cfg, axes, grads):
    """Loss sums and gradients of one chunk; V is this device's part of the vocabulary,
    which is split over `axes`."""
    precision = cfg.policy.matmul_precision
    dot = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=jnp.float32
    )
    logits_CV = dot("CD,VD->CV", h_CD, head_VD)
    if cfg.softcap:
        logits_CV = cfg.softcap * jnp.tanh(logits_CV / cfg.softcap)
    ids_V = jax.lax.axis_index(axes) * head_VD.shape[0] + jnp.arange(head_VD.shape[0])
    capped_CV = jnp.where(ids_V < cfg.vocab_size, logits_CV, -jnp.inf)
    max_C = jax.lax.pmax(jnp.max(capped_CV, axis=-1), axes)
    exp_CV = jnp.exp(capped_CV - max_C[:, None])
    total_C = jax.lax.psum(jnp.sum(exp_CV, axis=-1), axes)
    log_z_C = max_C + jnp.log(total_C)
    is_target_CV = ids_V == targets_C[:, None].astype(jnp.int32)
    # A masked sum: a gather over a split vocabulary would replicate the logits.
    label_C = jax.lax.psum(jnp.sum(jnp.where(is_target_CV, logits_CV, 0), -1), axes)
    even = cfg.label_smoothing / cfg.vocab_size
    if cfg.label_smoothing:
        known_CV = jnp.where(ids_V < cfg.vocab_size, logits_CV, 0)
        all_C = jax.lax.psum(jnp.sum(known_CV, axis=-1), axes)
        label_C = (1 - cfg.label_smoothing) * label_C + even * all_C
    sums = CrossEntropy(
        nll=jnp.sum(weights_C * (log_z_C - label_C)), z=jnp.sum(weights_C * log_z_C**2)
    )
    if not grads:
        return sums, None, None
    lift = _LIFT if cfg.policy.compute == jnp.float16 else 1.0
    weights_C *= lift
    scale_C = weights_C * (1 + 2 * cfg.z_loss * log_z_C) / total_C
    sharp_C = weights_C * (1 - cfg.label_smoothing)
    dlogits_CV = exp_CV * scale_C[:, None] - jnp.where(
        is_target_CV, sharp_C[:, None], 0
    )
    if cfg.label_smoothing:
        even_C1 = even * weights_C[:, None]
        dlogits_CV -= jnp.where(ids_V < cfg.vocab_size, even_C1, 0)
    if cfg.softcap:
        dlogits_CV *= 1 - (logits_CV / cfg.softcap) ** 2
    dlogits_CV = dlogits_CV.astype(cfg.policy.compute)
    dh_CD = dot("CV,VD->CD", dlogits_CV, head_VD)
    dhead_VD = dot("CV,CD->VD", dlogits_CV, h_CD)
    return sums, _rounded(dh_CD / lift, cfg), dhead_VD / lift


# float16 has no number between 0 and 6e-8, which is near the probability of a rare
# token: gradients of logits, at most the token's weight, are taken times this.
_LIFT = 2.0**10

# Bytes of float32 logits at a time: what a core's cache holds; what feeds a matrix
# unit.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_DEFAULT = 512 << 20


def _chunks(tokens: int, vocab: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk), of equal size but for the last's padding."""
    budget = _CHUNK_BYTES.get(mesh.platform(), _CHUNK_BYTES_DEFAULT)
    chunk = chunk or max(256, budget // (4 * vocab))
    num_chunks = -(-tokens // chunk)
    return num_chunks, -(-tokens // num_chunks)
