"""GPT-2 124M, the published architecture exactly; dropout is 0, as nanoGPT trains it.

Data: 10 billion tokens of web text, prepared with GPT-2's tokenizer (--data.path);
the shipped Shakespeare, as bytes, only shows that it runs.
Cost: 19,073 steps of 524,288 tokens, 8.6e18 FLOP: 2.4 hours on 8 A100 at 40% MFU.
Expected: about 3.3 nats a token on held-out web text, as llm.c reports for FineWeb.
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
        name="gpt2_124m",
        precision="bfloat16",
        model=ModelConfig(
            vocab_size=50257,
            width=768,
            ffn_width=3072,
            num_heads=12,
            num_kv_heads=12,
            repeats=12,
            norm="layernorm",
            norm_eps=1e-5,
            positions="learned",
            max_length=1024,
            activation="gelu_tanh",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tied=True,
            dropout=0.0,
            init_std=0.02,
        ),
        train=TrainConfig(steps=19_073, batch_size=512, length=1024, save_every=1000),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            adam_learning_rate=6e-4,
            warmup_steps=700,
            final_fraction=0.0,
        ),
        eval=EvalConfig(every=250, batches=20),
        mesh=MeshConfig(fsdp=8),
    )
