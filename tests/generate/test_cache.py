"""A cache holds each row's own tokens and gives the attention that they would have."""

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


def queries_keys_values() -> list[jax.Array]:
    random = np.random.default_rng(0)
    shapes = (B, T, 2, 3, 8), (B, T, 2, 8), (B, T, 2, 8)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


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
    one, settings = layout(data=1), {"window": window, "softcap": 3.0}
    prefill_attend = cache.make_prefill_attend(
        attention.make_attend(one.params, kernel="xla"), one.params
    )
    cached_attend = cache.make_cached_attend(one.params)
    arrays = queries_keys_values()
    positions_BT = jnp.zeros((B, T), jnp.int32) + jnp.arange(T)

    def part(attend, places, layer_cache):
        q, k, v = (x[:, places] for x in arrays)
        context = Context(positions_BT[:, places])
        return attend(q, k, v, context, layer_cache, **settings)

    with jax.set_mesh(one.mesh):
        prompt, layer_cache = part(prefill_attend, slice(3), empty(one)["prefix"][0])
        rest, _ = part(cached_attend, slice(3, T), layer_cache)
        whole = attention.xla(*arrays, **settings)
    both = jnp.concatenate([prompt, rest], axis=1)
    np.testing.assert_allclose(both, whole, atol=FLOAT32_ROUNDING)


def test_padding_is_never_written():
    one = layout(data=1)
    cached_attend = cache.make_cached_attend(one.params)
    lengths_B1 = jnp.array([[2], [4]])
    positions_BT = jnp.zeros((B, T), jnp.int32) + jnp.arange(T)
    context = Context(positions_BT, (positions_BT < lengths_B1).astype(jnp.int32))
    q, k, v = queries_keys_values()
    with jax.set_mesh(one.mesh):
        layer_cache = empty(one)["prefix"][0]
        _, (k_BSKH, v_BSKH) = cached_attend(
            q, k, v, context, layer_cache, window=0, softcap=0.0
        )
    for b, length in enumerate([2, 4]):
        np.testing.assert_array_equal(v_BSKH[b, :length], v[b, :length])
        np.testing.assert_array_equal(k_BSKH[b, :length], k[b, :length])
        assert not k_BSKH[b, length:].any()
