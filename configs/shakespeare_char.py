"""A character-level transformer of 0.8 million parameters, nanoGPT's CPU experiment.

Data: Shakespeare's works as shipped (76 characters); the last tenth held out.
Cost: 2,000 steps of 768 characters, 8 TFLOP: a few minutes on 2 CPU cores.
Expected: held-out loss about 1.60 nats a character; nanoGPT, with the same layers,
width, length, rows and steps on this text, reaches 1.91.
"""

from jaxinfra.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="shakespeare_char",
        run=RunConfig(log_every=100),
        model=ModelConfig(
            width=128,
            ffn_width=512,
            num_heads=4,
            num_kv_heads=4,
            repeats=4,
            activation="relu_squared",
            qk_norm="head",
            tied=False,
        ),
        data=DataConfig(tokenizer="char", split="tail", held_out=0.1),
        train=TrainConfig(
            steps=2000, batch_size=12, length=64, save_every=1000, unroll=True
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=4e-3,
            schedule="wsd",
            warmup_steps=20,
            decay_fraction=1.0,
            final_fraction=0.0,
        ),
        eval=EvalConfig(every=0),
    )
