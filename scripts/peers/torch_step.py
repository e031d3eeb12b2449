"""The model of `naive_jax` in PyTorch, compiled; prints its seconds a step as JSON.

Runs in an environment of its own: `torch_step.py STEPS`.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, WIDTH, FFN, LAYERS, HEADS, ROWS, LENGTH = 4096, 256, 1024, 4, 4, 8, 256


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, FFN, bias=False)
        self.up = nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        rows, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)

        def rope(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, WIDTH))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        half = WIDTH // HEADS // 2
        angles = torch.arange(LENGTH)[:, None] * 10_000.0 ** (
            -torch.arange(half) / half
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    steps = int(sys.argv[1])
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    compiled = torch.compile(model)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1))
    secs = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        loss = compiled(tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        secs.append(time.perf_counter() - start)
    print(json.dumps({"secs": secs[2:], "median": statistics.median(secs[2:])}))


if __name__ == "__main__":
    main()
