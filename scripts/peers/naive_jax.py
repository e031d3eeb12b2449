"""A Llama-like training step as one writes it by hand in an hour: the yardstick.

Jitted and donated, layers unrolled, no remat, whole float32 logits, plain optax. It
knows no mesh, no documents in a row, no checkpoint. 5.2 million parameters, 8 x 256
tokens.
"""

import math

import jax
import jax.numpy as jnp
import optax

VOCAB, WIDTH, FFN, LAYERS, HEADS = 4096, 256, 1024, 4, 4
HEAD_WIDTH = WIDTH // HEADS
ROWS, LENGTH = 8, 256


def init(key):
    keys = iter(jax.random.split(key, 8 * LAYERS + 1))

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) / math.sqrt(rows)

    def layer():
        return {
            "attention_norm": jnp.ones(WIDTH),
            "query": matrix(WIDTH, WIDTH),
            "key": matrix(WIDTH, WIDTH),
            "value": matrix(WIDTH, WIDTH),
            "out": matrix(WIDTH, WIDTH),
            "ffn_norm": jnp.ones(WIDTH),
            "gate": matrix(WIDTH, FFN),
            "up": matrix(WIDTH, FFN),
            "down": matrix(FFN, WIDTH),
        }

    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (VOCAB, WIDTH)),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
    }


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rope(x):
    half = HEAD_WIDTH // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(p, x):
    rows, length, _ = x.shape
    shape = (rows, length, HEADS, HEAD_WIDTH)
    q, k, v = ((x @ p[name]).reshape(shape) for name in ("query", "key", "value"))
    scores = jnp.einsum("btnh,bsnh->bnts", rope(q), rope(k)) / math.sqrt(HEAD_WIDTH)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(rows, length, WIDTH)
    return out @ p["out"]


def loss(params, tokens):
    x = params["embedding"][tokens[:, :-1]]
    for p in params["layers"]:
        x = x + attention(p, rms_norm(x, p["attention_norm"]))
        h = rms_norm(x, p["ffn_norm"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    logits = rms_norm(x, params["norm"]) @ params["embedding"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def make_step():
    """(step, state): step(state, tokens [8, 257]) -> (state, loss)."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)
    )

    def step(state, tokens):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = init(jax.random.key(0))
    return jax.jit(step, donate_argnums=0), (params, tx.init(params))
