"""Body of `bench.py meshes`: every mesh of 8 devices against one device.

A case is a factorisation of 8 over the six axes, a schedule where there is a pipeline,
a kind of context parallelism where there is a context axis, and a dense model or one of
experts: 394 in all. Each trains 12 steps, 2 of them warm-up, of adamw in float32 on the
shipped text and is compared with one device: the loss of every step, and the gradient
of the last by tensor, ||g - g0|| / ||g0||, had from the first moment before and after
it. A case that the rules refuse is listed with the rule.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

DEVICES, WARMUP, STEPS = 8, 2, 12
AXES = ("data", "fsdp", "expert", "context", "tensor", "pipeline")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
CONTEXTS = ("ring", "ulysses", "all_gather")
MODELS = ("dense", "experts")
# So many have all 90 pairs of axes, schedule, kind, model; with the sizes of axes 127
# of 192, and no 25 cases have more than 129: most of the others occur in a few alone.
SAMPLE = 25

# What a case must keep to; float32 sums in another order, over 12 updates.
LOSS, GRADIENT, FALL = 1e-5, 1e-4, 0.05
# Adam's first step is by the sign of a gradient. With its usual 1e-8, one element whose
# first gradient was 5e-10 by chance, the noise of sums, moved by 1.3e-4 more on one
# mesh than on another; typical gradients are 1e-3.
EPS = 1e-6


class Case(NamedTuple):
    """One way to train; empty strings where there is no choice."""

    sizes: tuple[int, ...]
    schedule: str
    context: str
    model: str

    @property
    def name(self) -> str:
        named = zip(AXES, self.sizes, strict=True)
        axes = " x ".join(f"{axis} {size}" for axis, size in named if size > 1)
        return ", ".join(filter(None, (axes, *self[1:])))


def cases() -> list[Case]:
    """All of them, in a fixed order."""
    found = []
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)):
        if np.prod(sizes) != DEVICES:
            continue
        by_axis = dict(zip(AXES, sizes, strict=True))
        schedules = SCHEDULES if by_axis["pipeline"] > 1 else ("",)
        contexts = CONTEXTS if by_axis["context"] > 1 else ("",)
        found += [
            Case(sizes, *rest)
            for rest in itertools.product(schedules, contexts, MODELS)
        ]
    return found


def sample(chosen: list[Case], count: int = SAMPLE) -> list[Case]:
    """`count` of the cases that together have about as many pairs of choices as can be:
    each in turn that has the most new ones, with the sizes of axes and without."""
    seen: set = set()
    picked: list[Case] = []
    rest = list(chosen)
    both = lambda case: {
        (of, pair) for of in (named, sized) for pair in pairs(of(case))
    }
    while rest and len(picked) < count:
        best = max(rest, key=lambda case: len(both(case) - seen))
        seen |= both(best)
        picked.append(best)
        rest.remove(best)
    return picked


def named(case: Case) -> list[str]:
    """The choices of a case, axes by name."""
    used = [axis for axis, n in zip(AXES, case.sizes, strict=True) if n > 1]
    return [*used, *filter(None, case[1:])]


def sized(case: Case) -> list[str]:
    """The choices of a case, axes with their sizes."""
    size = dict(zip(AXES, case.sizes, strict=True))
    return [f"{x} {size[x]}" if x in size else x for x in named(case)]


def pairs(choices: list[str]) -> set[tuple[str, str]]:
    return set(itertools.combinations(choices, 2))


def config_of(case: Case | None, model: str) -> Any:
    """The Config of a case, or of one device; all dims of the model differ."""
    from jaxinfra import config as c
    from jaxinfra import options

    layer = c.LayerConfig(feed_forward="experts" if model == "experts" else "dense")
    experts = {"num_experts": 8, "experts_per_token": 3, "expert_ffn_width": 40}
    whole = c.ModelConfig(
        width=32,
        ffn_width=48,
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        repeats=16,
        pattern=(layer,),
        **(experts if model == "experts" else {}),
    )
    base = dataclasses.replace(
        options.load_config("tiny"),
        model=whole,
        train=c.TrainConfig(
            steps=STEPS, batch_size=32, length=32, microbatches=1, remat="none"
        ),
        optimizer=c.OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=WARMUP,
            schedule="constant",
            clip_norm=0.0,
            eps=EPS,
        ),
        mesh=c.MeshConfig(data=1),
    )
    if case is None:
        return base
    by_axis = dict(zip(AXES, case.sizes, strict=True))
    pipeline = by_axis["pipeline"]
    parallel = {"schedule": case.schedule or "1f1b", "context": case.context or "ring"}
    parallel |= {"virtual_stages": 2 if case.schedule == "interleaved" else 1}
    parallel |= {"balanced": "true"}
    return dataclasses.replace(
        base,
        mesh=c.MeshConfig(**by_axis),
        parallel=c.ParallelConfig(**parallel),
        train=dataclasses.replace(
            base.train,
            # So many that late stages keep a part for early ones.
            microbatches=2 * pipeline if pipeline > 1 else 1,
        ),
        runtime=c.RuntimeConfig(devices=DEVICES),
    )


# Adam's first, before a step and after it, by path, on the host without padding.
Moments = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


class Run(NamedTuple):
    """losses: of every step. moments: of the last step. params: the first, on the host
    without padding."""

    losses: list[float]
    moments: Moments
    params: Any


def trained(config: Any, first: Any = None) -> Run:
    """The run of `config` from parameters `first`, or from its own."""
    import jax

    import jaxinfra as ji
    from jaxinfra import experiment
    from jaxinfra.data import device

    cache = os.path.join(tempfile.gettempdir(), "jaxinfra-bench")
    folder = ji.prepared(
        "shakespeare",
        cache_dir=pathlib.Path(cache),
        tokenizer="byte",
        split="tail",
        held_out=0.1,
        seed=0,
    )
    data = ji.open_dataset(folder)
    config = experiment.resolve(config, data.tokenizer.vocab_size)
    count = int(np.prod(list(dataclasses.asdict(config.mesh).values())))
    built = experiment.build(config, jax.devices()[:count])
    stream = ji.make_stream(
        data.split("train"),
        length=config.train.length,
        batch_size=config.train.batch_size,
        seed=0,
    )
    rows = experiment.batch_sharding(built.layout)

    with jax.set_mesh(built.layout.mesh):
        weights = None if first is None else _placed(built, first)
        begun = None if weights is None else (weights, None)
        state, losses, moments, step = built.init(begun=begun), [], [], None
        start = _on_host(built, state.params) if first is None else first
        for k in range(config.train.steps):
            batch = device.to_device(
                stream.batch, k, batch_size=config.train.batch_size, sharding=rows
            )
            if step is None:
                step = built.train_step.lower(state, batch).compile(
                    {"xla_backend_optimization_level": 2}
                )
            if k == config.train.steps - 1:
                moments.append(moment(built, state))
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        moments.append(moment(built, state))
    return Run(losses, tuple(moments), start)


def moment(built: Any, state: Any) -> dict[str, np.ndarray]:
    """Adam's first, by path of the parameter, on the host without padding."""
    import jax

    [mu] = [
        part.mu
        for part in jax.tree.leaves(state.opt_state, is_leaf=_has_mu)
        if _has_mu(part)
    ]
    assert len(jax.tree.leaves(mu)) == len(jax.tree.leaves(built.task.specs))
    return _on_host(built, mu)


def _on_host(built: Any, tree: Any) -> dict[str, np.ndarray]:
    import jax

    from jaxinfra import params as params_lib

    shapes = {path: s.shape for path, s in params_lib.named(built.task.specs)}
    return {
        path: np.asarray(x)[tuple(map(slice, shapes[path]))]
        for path, x in params_lib.named(jax.device_get(tree))
    }


def _has_mu(part: Any) -> bool:
    return hasattr(part, "mu")


def _placed(built: Any, first: dict[str, np.ndarray]) -> Any:
    import jax

    from jaxinfra import params as params_lib

    abstract = built.abstract().params
    leaves = []
    for path, like in params_lib.named(abstract):
        x = first[path]
        pad = [(0, big - small) for big, small in zip(like.shape, x.shape, strict=True)]
        leaves.append(jax.device_put(np.pad(x, pad), like.sharding))
    return params_lib.unflatten(abstract, leaves)


def compared(found: Run, expected: Run) -> dict[str, float]:
    """The largest difference of a loss, and of a tensor's gradient at the last step."""
    return {
        "loss": float(np.max(np.abs(np.subtract(found.losses, expected.losses)))),
        "gradient": gradient_difference(found.moments, expected.moments),
        "fall": 1 - found.losses[-1] / found.losses[WARMUP],
    }


def gradient_difference(found: Moments, expected: Moments, beta1: float = 0.9) -> float:
    """||g - g0|| / ||g0|| of the step between two moments, largest of all tensors."""
    ours, theirs = (
        {path: after[path] - beta1 * before[path] for path in after}
        for before, after in (found, expected)
    )
    return max(
        float(np.linalg.norm(ours[path] - g) / np.linalg.norm(g))
        for path, g in theirs.items()
    )


def refusal(case: Case) -> str:
    """The rule that refuses a case; empty where none does."""
    from jaxinfra import checks
    from jaxinfra.config import ConfigError

    try:
        checks.check(config_of(case, case.model), vocab_size=257)
    except ConfigError as error:
        return str(error)
    return ""


def measured(results: pathlib.Path, *, full: bool, secs: float) -> Iterator[dict]:
    """After every case, all results so far. What `results` has is not run again."""
    import time

    known = json.loads(results.read_text()) if results.exists() else {}
    ran, failed = known.get("cases", {}), {}
    refused = {case.name: why for case in cases() if (why := refusal(case))}
    valid = [case for case in cases() if case.name not in refused]
    began, references = time.monotonic(), {}

    def told() -> dict:
        worst = {
            key: max((c[key] for c in ran.values()), default=0.0)
            for key in ("loss", "gradient")
        }
        least = min((c["fall"] for c in ran.values()), default=0.0)
        return {
            "meshes": len({case.sizes for case in cases()}),
            "cases": dict(sorted(ran.items())),
            "summary": {
                "valid": len(valid),
                "run": len(ran),
                "refused": len(refused),
                "failed": len(failed),
                "largest_loss_difference": worst["loss"],
                "largest_gradient_difference": worst["gradient"],
                "least_fall_of_the_loss": least,
                "limits": {"loss": LOSS, "gradient": GRADIENT, "fall": FALL},
            },
            "failed": failed,
            "refused": refused,
        }

    # The sample first, so that what is run in part is spread over all choices.
    chosen = sample(valid)
    chosen += [case for case in valid if full and case not in chosen]
    for case in chosen:
        if case.name in ran:
            continue
        if time.monotonic() - began > secs:
            break
        if case.model not in references:
            references[case.model] = trained(config_of(None, case.model))
        expected = references[case.model]
        try:
            found = trained(config_of(case, case.model), expected.params)
        except Exception as error:  # the table tells it, and the other cases go on
            failed[case.name] = f"{type(error).__name__}: {error}"[:400]
        else:
            figures = compared(found, expected)
            is_good = figures["loss"] <= LOSS and figures["gradient"] <= GRADIENT
            if is_good and figures["fall"] >= FALL:
                ran[case.name] = figures
            else:
                failed[case.name] = figures
        print(case.name, ran.get(case.name) or failed[case.name], file=sys.stderr)
        yield told()
    yield told()
