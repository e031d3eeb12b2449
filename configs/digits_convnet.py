"""A convolutional network on 8 x 8 digits, as a user's own task: a flax (nnx) module,
labelled images, the same loop as text.

Data: scikit-learn's digits, 1,797 images inside that package (`.[images]` installs it);
every fifth is held out.
Cost: 400 steps of 96 images, 29,162 parameters: about 20 s on 2 CPU cores.
Expected: 98.9% of the 360 held-out digits are right; logistic regression has 96.4%.
"""

import itertools

from jaxinfra.config import (
    Config,
    ConfigError,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

# Keys of text that this task reads too: --model.width, --model.dropout.
TASK_KEYS = ("model.width", "model.dropout")
CLASSES = 10


def get_config() -> Config:
    return Config(
        name="digits_convnet",
        model=ModelConfig(width=32, dropout=0.2),
        train=TrainConfig(steps=400, batch_size=96, save_every=200),
        optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=0.05),
        eval=EvalConfig(every=200),
    )


def get_data():
    """((images, labels) to train on, the same held out): uint8 [N, 8, 8, 1], int32."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            "config digits_convnet needs scikit-learn for its images; install it by "
            "pip install 'jaxinfra[images]'"
        ) from error
    import numpy as np

    digits = datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    is_held_out = np.arange(len(labels)) % 5 == 0
    return [(images[part], labels[part]) for part in (~is_held_out, is_held_out)]


def get_net(config: Config, policy, norm=None):
    """rngs -> the nnx module, from images [B, 8, 8, 1] of 0 to 16 to logits [B, 10].

    norm(num_features, momentum=, rngs=): in place of NnxRunningNorm.
    """
    # jax loads here: the config is good.
    from flax import nnx

    from jaxinfra.interop.running_norm import NnxRunningNorm

    width, make_norm = config.model.width, norm or NnxRunningNorm
    dtypes = {"dtype": policy.compute, "param_dtype": policy.param}

    class Net(nnx.Module):
        def __init__(self, rngs):
            sizes = (1, width, 2 * width)
            self.convs, self.norms = nnx.List(), nnx.List()
            for inputs, outputs in itertools.pairwise(sizes):
                self.convs.append(
                    nnx.Conv(
                        inputs, outputs, (3, 3), use_bias=False, rngs=rngs, **dtypes
                    )
                )
                self.norms.append(make_norm(outputs, momentum=0.9, rngs=rngs))
            self.dropout = nnx.Dropout(config.model.dropout, rngs=rngs)
            self.head = nnx.Linear(16 * sizes[-1], CLASSES, rngs=rngs, **dtypes)

        def __call__(self, images):
            x = images.astype(policy.compute) / 8.0 - 1.0
            for conv, norm in zip(self.convs, self.norms):
                x = nnx.relu(norm(conv(x)))
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
            return self.head(self.dropout(x.reshape(x.shape[0], -1)))

    return Net


def get_task(config, layout, policy):
    """The task; see `jaxinfra.tasks`."""
    import jax.numpy as jnp
    import optax

    from jaxinfra.data import examples
    from jaxinfra.interop import flax_bridge

    def loss(model, batch, is_training):
        del is_training  # model.train() or model.eval() says it
        logits = model(batch.inputs).astype(jnp.float32)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        is_right = jnp.argmax(logits, axis=-1) == batch.labels
        return ce, batch.weights_B, {"accuracy": is_right}

    size = config.train.batch_size
    train, held_out = get_data()
    return flax_bridge.make_task(
        flax_bridge.from_nnx(
            get_net(config, policy), loss, rows=lambda batch: batch.rows_B
        ),
        layout,
        stream=examples.make_stream(*train, batch_size=size, seed=config.run.seed),
        eval_sets={
            "held_out": examples.make_evaluation(
                *held_out, batch_size=config.eval.batch_size or size
            )
        },
        unit="image",
    )
