"""Mixtral 8x7B, the published architecture exactly (arXiv:2401.04088 table 1).

Data: the paper does not say; prepare yours with Mixtral's tokenizer (--data.path).
The shipped Shakespeare, as bytes, is there to trace and plan with.
Cost: 100,000 steps of 1 million tokens, 8.8e21 FLOP for 0.1 trillion tokens (12.9
billion of its 46.7 billion parameters work on a token).
Expected: not measured. A token costs its two experts (`parallel.expert`); --mesh.expert
8 with --mesh.fsdp 8 gives each chip one of them.
Mesh: fsdp 64 x tensor 1 (64 chips of v5p, or 8 nodes of 8 H100; data takes more).
"""

from jaxinfra.config import (
    Config,
    EvalConfig,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="mixtral_8x7b",
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=32_000,
            width=4096,
            ffn_width=14_336,
            num_heads=32,
            num_kv_heads=8,
            pattern=(LayerConfig(feed_forward="experts"),),
            repeats=32,
            norm_eps=1e-5,
            rope_theta=1_000_000.0,
            activation="swiglu",
            tied=False,
            init_std=0.02,
            num_experts=8,
            experts_per_token=2,
        ),
        train=TrainConfig(
            steps=100_000,
            batch_size=256,
            length=4096,
            remat="full",
            save_every=500,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            adam_learning_rate=3e-4,
            warmup_steps=2000,
        ),
        eval=EvalConfig(every=1000, batches=20),
        mesh=MeshConfig(fsdp=64),
    )
