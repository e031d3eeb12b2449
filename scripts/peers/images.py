"""What others make of the images of a config: the same network by plain flax and optax,
and scikit-learn's classifiers on raw pixels.

    python scripts/peers/images.py digits_convnet [--key value ...]

Takes the options of scripts/train.py. The plain loop has the same batches, steps and
schedule; BatchNorm stands where digits_convnet has a running norm. Prints the held-out
accuracy and the seconds of each as JSON. Needs scikit-learn (`.[images]`).
"""

import argparse
import json
import pathlib
import runpy
import sys
import time
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from jaxinfra import options, precision
from jaxinfra.data import examples
from jaxinfra.train import optim

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
EVAL_ROWS = 1000


def main(argv):
    parser = argparse.ArgumentParser(prog="images", allow_abbrev=False)
    parser.add_argument(
        "name", choices=["digits_convnet", "fashion_convnet"], help="the config"
    )
    args, rest = parser.parse_known_args(argv)
    name = args.name
    config, _ = options.read_command(["--config", name, *rest])
    policy = precision.policy(config.precision)
    file = runpy.run_path(str(CONFIGS / f"{name}.py"))
    if name == "digits_convnet":
        train, held_out = file["get_data"]()
        make_net = file["get_net"](config, policy, norm=nnx.BatchNorm)
        net = make_net(nnx.Rngs(config.run.seed))
    else:
        train, held_out = file["get_data"](config)
        net = file["get_net"](config, policy)
    found = {"flax and optax": plain(config, net, train, held_out)}
    for classifier in (
        LogisticRegression(max_iter=100),
        MLPClassifier((128,), max_iter=200 if len(train[0]) < 10_000 else 10),
    ):
        begin, scale = time.perf_counter(), train[0].max()
        flat = [x.reshape(len(x), -1) / scale for x, _ in (train, held_out)]
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            classifier.fit(flat[0], train[1])
        accuracy = classifier.score(flat[1], held_out[1])
        found[type(classifier).__name__] = told(accuracy, begin)
    print(json.dumps(found, indent=1))


def told(accuracy, begin):
    return {"accuracy": float(accuracy), "secs": time.perf_counter() - begin}


def plain(config, net, train, held_out):
    """The network through a loop as flax's documents have it."""
    begin = time.perf_counter()
    settings, steps = config.optimizer, config.train.steps
    schedule = optim.make_schedule(settings, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            lambda step: settings.learning_rate * schedule(step),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
    stream = examples.make_stream(
        *train, batch_size=config.train.batch_size, seed=config.run.seed
    )
    loop = linen_loop if isinstance(net, nn.Module) else nnx_loop
    step, logits = loop(net, tx, jax.random.key(config.run.seed), stream.batch(0))
    for k in range(steps):
        batch = stream.batch(k)
        step(jnp.asarray(batch.inputs), jnp.asarray(batch.labels))
    right = [
        np.argmax(logits(held_out[0][i : i + EVAL_ROWS]), axis=-1)
        == held_out[1][i : i + EVAL_ROWS]
        for i in range(0, len(held_out[1]), EVAL_ROWS)
    ]
    return told(np.concatenate(right).mean(), begin)


def linen_loop(net, tx, key, batch):
    variables = net.init(key, batch.inputs[:1], False)
    state = [variables["params"], variables["batch_stats"], None, jnp.int32(0)]
    state[2] = tx.init(state[0])

    @jax.jit
    def update(params, stats, opt_state, count, images, labels):
        def mean_loss(params):
            logits, changed = net.apply(
                {"params": params, "batch_stats": stats},
                images,
                True,
                rngs={"dropout": jax.random.fold_in(key, count)},
                mutable=["batch_stats"],
            )
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return ce.mean(), changed["batch_stats"]

        grads, stats = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, count + 1

    def step(images, labels):
        state[:] = update(*state, images, labels)

    predict = jax.jit(
        lambda params, stats, images: net.apply(
            {"params": params, "batch_stats": stats}, images, False
        )
    )
    return step, lambda images: predict(*state[:2], images)


def nnx_loop(net, tx, key, batch):
    del key, batch
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def update(net, optimizer, images, labels):
        def mean_loss(net):
            logits = net(images)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        optimizer.update(net, nnx.grad(mean_loss)(net))

    def step(images, labels):
        net.train()
        update(net, optimizer, images, labels)

    def logits(images):
        net.eval()
        return net(jnp.asarray(images))

    return step, logits


if __name__ == "__main__":
    main(sys.argv[1:])
