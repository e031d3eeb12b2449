"""SmolLM2 135M, the published architecture exactly (arXiv:2502.02737).

Data: the published run read 2 trillion tokens, prepared with SmolLM2's tokenizer; here
20 billion of your own (--data.path). The shipped Shakespeare only shows that it runs.
Cost: 19,073 steps of 1,048,576 tokens, 2.6e19 FLOP, 7 hours on 8 A100 at 40% MFU.
Expected: not measured for 20 billion tokens.
Mesh: fsdp 8 x tensor 1 (one node; data takes the nodes).
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
        name="smollm2_135m",
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=49152,
            width=576,
            ffn_width=1536,
            num_heads=9,
            num_kv_heads=3,
            repeats=30,
            norm_eps=1e-5,
            rope_theta=100_000.0,
            activation="swiglu",
            tied=True,
        ),
        train=TrainConfig(steps=19_073, batch_size=512, length=2048, save_every=1000),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            adam_learning_rate=3e-3,
            schedule="wsd",
            warmup_steps=2000,
            decay_fraction=0.2,
            final_fraction=0.0,
        ),
        eval=EvalConfig(every=500, batches=20),
        mesh=MeshConfig(fsdp=8),
    )
