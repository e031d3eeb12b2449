"""Two published decoders written out in numpy: the references of the transformer."""

import numpy as np
from ops import naive_attention


def llama(params, tokens_BT, segments_BT, positions_BT, cfg):
    """Logits of Llama with rotary positions by layer, windows, caps and q-k norms."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    def turn(x_BTNH, theta):
        half = x_BTNH.shape[-1] // 2
        z = x_BTNH[..., :half] + 1j * x_BTNH[..., half:]
        angle_BTh = positions_BT[..., None] * theta ** (-np.arange(half) / half)
        z = z * np.exp(1j * angle_BTh)[:, :, None]
        return np.concatenate([z.real, z.imag], -1)

    B, T = tokens_BT.shape
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_width
    x = params["embedding"][tokens_BT]
    for layer, p in zip(cfg.layers, in_order(params, cfg), strict=True):
        a, f = p["attention"], p["ffn"]
        h = norm(x, p["attention_norm"]["scale"])
        q = (h @ a["query"].reshape(cfg.width, N * H)).reshape(B, T, N, H)
        k = (h @ a["key"].reshape(cfg.width, K * H)).reshape(B, T, K, H)
        v = (h @ a["value"].reshape(cfg.width, K * H)).reshape(B, T, K, H)
        q, k = norm(q, a["query_norm"]), norm(k, a["key_norm"])
        theta = layer.rope_theta or cfg.rope_theta
        q, k = turn(q, theta), turn(k, theta)
        q = q.reshape(B, T, K, N // K, H)
        o = attention(q, k, v, segments_BT, layer.window, cfg.attention_softcap)
        x = x + o.reshape(B, T, N * H) @ a["out"].reshape(N * H, cfg.width)
        h = norm(x, p["ffn_norm"]["scale"])
        gate = h @ f["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f["up"])) @ f["down"]
    return norm(x, params["final_norm"]["scale"]) @ params["head"].T


def gpt2(params, tokens_BT, segments_BT, positions_BT, cfg):
    """Logits of GPT-2: learned positions, layer norms, biases, tied head."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        std = np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
        return x / std * p["scale"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    B, T = tokens_BT.shape
    D, N, H = cfg.width, cfg.num_heads, cfg.head_width
    x = params["embedding"][tokens_BT] + params["positions"][positions_BT]
    for p in in_order(params, cfg):
        a, f = p["attention"], p["ffn"]
        h = norm(x, p["attention_norm"])
        q, k, v = (
            (h @ a[n].reshape(D, N * H) + a[f"{n}_bias"].reshape(-1)).reshape(
                B, T, N, H
            )
            for n in ("query", "key", "value")
        )
        o = attention(q[:, :, :, None], k, v, segments_BT, 0, 0.0).reshape(B, T, N * H)
        x = x + o @ a["out"].reshape(N * H, D) + a["out_bias"]
        h = norm(x, p["ffn_norm"])
        x = x + gelu(h @ f["up"] + f["up_bias"]) @ f["down"] + f["down_bias"]
    return norm(x, params["final_norm"]) @ params["embedding"].T


def attention(q, k, v, segments_BT, window, softcap):
    out, *_ = naive_attention.forward_backward(
        q, k, v, q, segments_BT, window=window, softcap=softcap
    )
    return out


def in_order(params, cfg):
    """Every layer's parameters, first to last."""

    def pick(tree, r):
        if isinstance(tree, dict):
            return {name: pick(leaf, r) for name, leaf in tree.items()}
        return tree[r]

    yield from params["prefix"]
    for r in range(cfg.repeats):
        for stacked in params["pattern"]:
            yield pick(stacked, r)
    yield from params["suffix"]
