"""A cache holds each row's own tokens and gives the attention that they would have."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra import precision, sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.generate import cache
from jaxinfra.mesh import make_mesh
from jaxinfra.ops import attention
from jaxinfra.ops.seam import Context

CFG = ModelConfig(
    vocab_size=11,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    prefix=(LayerConfig(),),
    repeats=3,
)
B, T, CAPACITY = 2, 5, 7
FLOAT32_ROUNDING = 1e-6  # sums over the capacity and over T in other order


def layout(**sizes: int) -> sharding.Layout:
    count = int(np.prod([*sizes.values()]))
    return sharding.make_layout(make_mesh(sizes, devices=jax.devices()[:count]))


def queries_keys_values(where: sharding.Layout) -> list[jax.Array]:
    random = np.random.default_rng(0)
    heads = sharding.spec(where.params, "batch", None, "heads")
    shapes = (B, T, 2, 3, 8), (B, T, 2, 8), (B, T, 2, 8)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    return [jax.device_put(x, jax.NamedSharding(where.mesh, heads)) for x in arrays]


def places(where: sharding.Layout) -> jax.Array:
    rows = sharding.sharding(where, where.params, (B, T), ("batch", None))
    return jax.device_put(np.tile(np.arange(T, dtype=np.int32), (B, 1)), rows)


def empty(where: sharding.Layout, batch: int = B):
    return cache.make_caches(
        CFG,
        batch=batch,
        capacity=CAPACITY,
        policy=precision.policy("float32"),
        layout=where,
    )


def test_a_cache_is_split_by_rows_and_key_heads():
    split = layout(fsdp=2, tensor=2)
    with jax.set_mesh(split.mesh):
        caches = empty(split)
        assert caches["suffix"] == []
        whole, stacked = caches["prefix"][0].k_BSKH, caches["pattern"][0].v_BSKH
        assert (whole.shape, stacked.shape) == ((2, 7, 2, 8), (3, 2, 7, 2, 8))
        assert whole.addressable_shards[0].data.shape == (1, 7, 1, 8)
        with pytest.raises(ValueError, match="size 3 does not divide"):
            empty(split, batch=3)


@pytest.mark.parametrize("window", [0, 2])
def test_a_prompt_and_what_follows_attend_as_one_text(window):
    where, settings = layout(fsdp=2, tensor=2), {"window": window, "softcap": 3.0}
    rules = dataclasses.replace(where.params, length=(), residual=())
    xla = attention.make_attend(rules, kernel="xla")
    prefill_attend = cache.make_prefill_attend(xla, rules)
    cached_attend = cache.make_cached_attend(rules)

    @jax.jit
    def in_parts(arrays, positions_BT):
        def part(attend, taken, layer_cache):
            qkv, context = (
                [x[:, taken] for x in arrays],
                Context(positions_BT[:, taken]),
            )
            return attend(*qkv, context, layer_cache, **settings)

        prompt, layer_cache = part(prefill_attend, slice(3), empty(where)["prefix"][0])
        rest, _ = part(cached_attend, slice(3, T), layer_cache)
        return jnp.concatenate([prompt, rest], axis=1)

    arrays, positions_BT = queries_keys_values(where), places(where)
    with jax.set_mesh(where.mesh):
        parts = in_parts(arrays, positions_BT)
        whole = jax.jit(functools.partial(attention.xla, **settings))(*arrays)
    np.testing.assert_allclose(parts, whole, atol=FLOAT32_ROUNDING)


def test_padding_is_never_written():
    where, lengths_B = layout(fsdp=2, tensor=2), np.array([2, 4])
    rules = dataclasses.replace(where.params, length=(), residual=())
    positions_BT = places(where)
    context = Context(positions_BT, (positions_BT < lengths_B[:, None]).astype(int))
    q, k, v = queries_keys_values(where)
    with jax.set_mesh(where.mesh):
        _, written = cache.make_cached_attend(rules)(
            q, k, v, context, empty(where)["prefix"][0], window=0, softcap=0.0
        )
    for new_BTKH, cache_BSKH in zip((k, v), map(np.asarray, written), strict=True):
        for b, length in enumerate(lengths_B):
            np.testing.assert_array_equal(
                cache_BSKH[b, :length], np.asarray(new_BTKH)[b, :length]
            )
            assert not cache_BSKH[b, length:].any()
