"""A model of the shapes of scripts/device_steps.py in PyTorch, compiled layer by layer,
in bfloat16 over float32 parameters; prints its figures as JSON. For speed: parameters
begin as PyTorch has them, and so losses differ.

Runs where torch and a GPU are: `torch_llama.py full|none ROWS LENGTH WARMUP STEPS`;
full: each layer is computed again in the backward pass.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, FFN, LAYERS, HEADS, KEY_HEADS = 128_256, 2048, 8192, 16, 32, 8
HEAD = WIDTH // HEADS


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, KEY_HEADS * HEAD, bias=False)
        self.value = nn.Linear(WIDTH, KEY_HEADS * HEAD, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, FFN, bias=False)
        self.up = nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        rows, length, _ = x.shape

        def heads(y):
            return y.view(rows, length, -1, HEAD).transpose(1, 2)

        def rope(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(y.dtype)

        h = self.attention_norm(x)
        q, k, v = heads(self.query(h)), heads(self.key(h)), heads(self.value(h))
        y = F.scaled_dot_product_attention(
            rope(q), rope(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, WIDTH))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, length, remat):
        super().__init__()
        self.remat = remat
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        for layer in self.layers:
            layer.compile()
        self.norm = nn.RMSNorm(WIDTH)
        angles = torch.arange(length)[:, None] * 500_000.0 ** (
            -torch.arange(HEAD // 2) / (HEAD // 2)
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.embedding(tokens[:, :-1]).bfloat16()
        for layer in self.layers:
            if self.remat == "full":
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        return loss(self.norm(x), self.embedding.weight, tokens[:, 1:])


@torch.compile
def loss(x, weight, wanted):
    logits = (x @ weight.to(x.dtype).T).flatten(0, 1).float()
    return F.cross_entropy(logits, wanted.flatten())


def main() -> None:
    remat, rows, length, warmup, steps = sys.argv[1], *map(int, sys.argv[2:])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model = Model(length, remat)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, VOCAB, (rows, length + 1), device="cuda")
    losses, secs = [], []

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            value = model(tokens)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    begin = time.perf_counter()
    losses.append(step().item())
    compile_secs = time.perf_counter() - begin
    for count in (warmup - 1, steps, steps, steps):
        begin = time.perf_counter()
        for _ in range(count):
            value = step()
        losses.append(value.item())
        secs.append((time.perf_counter() - begin) / count)
    step_secs = statistics.median(secs[1:])
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "secs": step_secs,
        "spread": max(secs[1:]) / min(secs[1:]) - 1,
        "tokens_per_sec": rows * length / step_secs,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "compile_secs": compile_secs,
        "losses": losses,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
