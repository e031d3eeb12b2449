"""A byte-level transformer of 0.9 million parameters, to see everything work.

Data: Shakespeare's works as shipped (1.1 MB), the last tenth held out.
Cost: 900 steps of 1,024 bytes, 5 TFLOP: about 2 minutes on 2 CPU cores.
Expected: held-out loss about 1.62 nats a byte; uniform guessing is 5.5.
"""

from jaxinfra.config import (
    Config,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            width=128,
            ffn_width=384,
            num_heads=4,
            num_kv_heads=4,
            repeats=4,
            qk_norm="head",
            tied=False,
        ),
        train=TrainConfig(steps=900, batch_size=8, length=128, save_every=300),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=4e-3,
            schedule="wsd",
            warmup_steps=20,
            decay_fraction=1.0,
            final_fraction=0.0,
        ),
        eval=EvalConfig(every=300),
        sample=SampleConfig(prompt="HAMLET.\n", tokens=300, temperature=0.7),
    )
