"""Llama 3 70B, the published architecture exactly (arXiv:2407.21783 table 3).

Data: the published run read 15 trillion tokens; prepare yours with Llama 3's tokenizer
(--data.path). The shipped Shakespeare, as bytes, is there to trace and plan with.
Cost: 100,000 steps of 4.2 million tokens, 2.0e23 FLOP for 0.42 trillion tokens.
Expected: not measured here.
Mesh: fsdp 64 x tensor 1 (64 chips of v5p, or 8 nodes of 8 H100; data takes more).
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
        name="llama3_70b",
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=128_256,
            width=8192,
            ffn_width=28672,
            num_heads=64,
            num_kv_heads=8,
            repeats=80,
            norm_eps=1e-5,
            rope_theta=500_000.0,
            activation="swiglu",
            tied=False,
            init_std=0.02,
        ),
        train=TrainConfig(
            steps=100_000,
            batch_size=512,
            length=8192,
            remat="full",
            save_every=500,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4,
            adam_learning_rate=1.5e-4,
            warmup_steps=2000,
            final_fraction=0.01,
        ),
        eval=EvalConfig(every=1000, batches=20),
        mesh=MeshConfig(fsdp=64),
    )
