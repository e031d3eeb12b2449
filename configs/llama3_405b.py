"""Llama 3.1 405B, the published architecture (arXiv:2407.21783 table 3).

Data: the published run read 15.6 trillion; prepare yours with Llama 3's tokenizer
(--data.path). The shipped Shakespeare, as bytes, is there to trace and plan with.
Cost: 1,000,000 steps of 16.8 million tokens, 4.4e25 FLOP (the paper: 3.8e25).
Expected: not measured here.
Limits: no scaling of rotary frequencies, which Llama 3.1 adds beyond 8,192 tokens.
Mesh: fsdp 128 x tensor 8 (1,024 chips of v5p, or 128 nodes of 8 H100; data takes more).
"""

from jaxinfra.config import (
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="llama3_405b",
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=128_256,
            width=16384,
            ffn_width=53248,
            num_heads=128,
            num_kv_heads=8,
            repeats=126,
            norm_eps=1e-5,
            rope_theta=500_000.0,
            activation="swiglu",
            tied=False,
            init_std=0.02,
        ),
        train=TrainConfig(
            steps=1_000_000,
            batch_size=2048,
            length=8192,
            remat="full",
            save_every=500,
        ),
        optimizer=OptimizerConfig(
            learning_rate=8e-5,
            adam_learning_rate=8e-5,
            warmup_steps=8000,
            final_fraction=0.01,
        ),
        eval=EvalConfig(every=1000, batches=20),
        mesh=MeshConfig(fsdp=128, tensor=8),
    )
