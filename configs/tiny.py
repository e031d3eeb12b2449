"""A byte-level transformer of 0.9 million parameters, to see everything work.

Data: Shakespeare's works as shipped (1.1 MB), the last tenth held out.
Cost: 300 steps of 2,048 bytes, 4 TFLOP: under 2 minutes on 2 CPU cores.
Expected: held-out loss about 2.5 nats a byte; uniform guessing is 5.5.
"""

from jaxinfra.config import Config, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            width=128, ffn_width=384, num_heads=4, num_kv_heads=4, repeats=4
        ),
        train=TrainConfig(steps=300, batch_size=16, length=128),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, adam_learning_rate=3e-3, warmup_steps=10
        ),
    )
