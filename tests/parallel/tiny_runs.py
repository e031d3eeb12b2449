"""Runs of the tiny config on any mesh in this process, on rows of unequal weight."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from jaxinfra import experiment, options
from jaxinfra.config import Config, MeshConfig, OptimizerConfig
from jaxinfra.data import batches, device, prepare, shards, writer
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.train import state as states

# Compiling takes longer than 20 steps of this size; it halves that.
QUICK = {"xla_backend_optimization_level": 0}

# Name -> (sizes of the mesh, zero).
MESHES = {
    "one device": ({}, 3),
    "data 8": ({"data": 8}, 3),
    "fsdp 8, zero 0": ({"fsdp": 8}, 0),
    "fsdp 8, zero 1": ({"fsdp": 8}, 1),
    "fsdp 8, zero 2": ({"fsdp": 8}, 2),
    "fsdp 8, zero 3": ({"fsdp": 8}, 3),
    "fsdp 4 x tensor 2": ({"fsdp": 4, "tensor": 2}, 3),
    "data 2 x fsdp 2 x tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 3),
}


def write_documents(folder: pathlib.Path) -> shards.Dataset:
    """Shakespeare in documents of 1, 2 and 250 bytes, in shards that end in short rows:
    a row's number of targets goes from a few to all."""
    text = pathlib.Path(prepare.CORPORA["shakespeare"]).read_bytes()
    rng = np.random.default_rng(7)
    documents, at = [], 0
    while at < 60_000:
        is_dialogue = at // 500 % 2  # here one target of every 2 or 3 tokens is lost
        size = int(rng.integers(1, 3)) if is_dialogue else 250
        ids = np.frombuffer(text[at : at + size], np.uint8).astype(np.uint16)
        documents.append(np.append(ids, np.uint16(256)))
        at += size
    content = writer.SplitContent(documents=documents, text_bytes=at)
    return writer.write_dataset(
        folder,
        tokenizer=ByteTokenizer(),
        splits={"train": content},
        shard_tokens=1_999,
    )


def tiny(
    *,
    mesh: str = "one device",
    microbatches: int = 1,
    optimizer: str = "adamw",
    dropout: float = 0.0,
    is_whole: bool = False,
    precision: str = "float32",
) -> Config:
    """The tiny config, 20 steps of 32 rows; narrower and shorter unless `is_whole`."""
    sizes, zero = MESHES[mesh]
    config = options.load_config("tiny")
    model = dataclasses.replace(config.model, dropout=dropout)
    train = dataclasses.replace(
        config.train,
        steps=20,
        batch_size=32,
        microbatches=microbatches,
        log_batch_digest=True,
    )
    if not is_whole:
        model = dataclasses.replace(model, width=64, ffn_width=96, repeats=2)
        train = dataclasses.replace(train, length=48)
    rate = 3e-3 if optimizer == "adamw" else 0.02
    return dataclasses.replace(
        config,
        model=model,
        train=train,
        optimizer=OptimizerConfig(name=optimizer, learning_rate=rate, warmup_steps=10),
        mesh=MeshConfig(**{"data": 1, **sizes}),
        zero=zero,
        precision=precision,
    )


def build(config: Config, data: shards.Dataset) -> experiment.Experiment:
    """`config` on as many devices as its mesh asks for."""
    count = int(np.prod(list(dataclasses.asdict(config.mesh).values())))
    resolved = experiment.resolve(config, data.tokenizer.vocab_size)
    return experiment.build(resolved, jax.devices()[:count])


def first_params(config: Config, data: shards.Dataset) -> Any:
    """The first parameters of `config`, on the host, without padding."""
    built = build(config, data)
    with jax.set_mesh(built.layout.mesh):
        first = jax.device_get(built.init().params)
    return jax.tree.map(
        lambda x, spec: x[tuple(map(slice, spec.shape))], first, built.model.specs
    )


def run(
    config: Config, data: shards.Dataset, *, first: Any = None
) -> dict[str, np.ndarray]:
    """Every metric of every step, by name; from parameters `first`, or its own."""
    built = build(config, data)
    stream = batches.make_stream(
        data.split("train"),
        length=config.train.length,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
    )
    with jax.set_mesh(built.layout.mesh):
        state = built.init() if first is None else state_of(built, first)
        train_step, steps = None, []
        for k in range(config.train.steps):
            batch = device.to_device(
                stream.batch,
                k,
                batch_size=config.train.batch_size,
                sharding=experiment.batch_sharding(built.layout),
            )
            if train_step is None:
                lowered = built.train_step.lower(state, batch)
                is_small = config.model.width < 128
                train_step = lowered.compile(QUICK if is_small else None)
            state, metrics = train_step(state, batch)
            steps.append(metrics)
        steps = jax.device_get(steps)
    return {name: np.array([step[name] for step in steps]) for name in steps[0]}


def state_of(built: experiment.Experiment, first: Any) -> states.TrainState:
    """The first state with these parameters: compiling `init` takes longer."""
    abstract = built.abstract()

    def place(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        pad = [(0, big - small) for big, small in zip(like.shape, x.shape, strict=True)]
        return jax.device_put(np.pad(x, pad), like.sharding)

    weights = jax.tree.map(place, first, abstract.params)
    key = np.asarray(jax.random.key_data(jax.random.key(built.config.run.seed)))
    return states.TrainState(
        step=jax.device_put(np.int32(0), abstract.step.sharding),
        params=weights,
        opt_state=states.init_opt_state(built.tx, weights, built.shardings),
        model_state=(),
        key=jax.device_put(key, abstract.key.sharding),
    )
