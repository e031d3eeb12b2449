"""Training in low precision: rules, delayed scales, meshes, microbatches, figures."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parallel import tiny_runs

from jaxinfra import options
from jaxinfra import precision as precisions
from jaxinfra.config import ConfigError, QuantConfig
from jaxinfra.data import batches, device
from jaxinfra.models.specs import param_specs
from jaxinfra.quant import recipe as recipes
from jaxinfra.train import facts, low_precision
from jaxinfra.train.low_precision import Delayed
from jaxinfra.train.objective import Maxima

# Sums in another order differ in float32's last bits; what is near the middle of two
# codes then goes the other way.
OTHER_CODES = 5e-4
# A code that flips is 6% to 25% off, and moves more of them behind it. How far that
# carries is what the same device does from parameters NOISE away, their last bits: of
# the first loss 3e-5, of a gradient's norm 0.3% to 1.4%, of the third loss 6e-3, since
# adamw takes a whole step for a gradient that is nearly zero.
NOISE = 1e-7
FIRST_LOSS = 1e-4
LATER_LOSS = {"int8": 3e-3, "fp8": 0.02, "mxfp8": 0.02}
TIMES_NOISE = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_documents(tmp_path_factory.mktemp("data"))


def model(name="tiny", **changes):
    config = options.load_config(name).model
    return dataclasses.replace(config, vocab_size=257, **changes)


def steps_of(config, data, count=3):
    """(losses, last metrics, last state) of so many steps."""
    built = tiny_runs.build(config, data)
    stream = batches.make_stream(
        data.split("train"), length=config.train.length, batch_size=32, seed=0
    )
    losses = []
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        for k in range(count):
            place = tiny_runs.experiment.batch_sharding(built.layout)
            batch = device.to_device(stream.batch, k, batch_size=32, sharding=place)
            if k == 0:
                lowered = built.train_step.lower(state, batch)
                train_step = lowered.compile(tiny_runs.QUICK)
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(metrics), jax.device_get(state)


class Trained(NamedTuple):
    """Of some steps: losses, the first gradient by parameter, clipped and without
    padding, and the last metrics."""

    losses: list
    grads: list
    metrics: dict


def runs_from(firsts, config, data, count=3):
    """A `Trained` from each of these first parameters, by one program."""
    built = tiny_runs.build(config, data)
    stream = batches.make_stream(
        data.split("train"), length=config.train.length, batch_size=32, seed=0
    )
    place = tiny_runs.experiment.batch_sharding(built.layout)
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    runs = []
    with jax.set_mesh(built.layout.mesh):
        steps = [
            device.to_device(stream.batch, k, batch_size=32, sharding=place)
            for k in range(count)
        ]
        train_step = None
        for first in firsts:
            state, losses = tiny_runs.state_of(built, first), []
            if train_step is None:
                lowered = built.train_step.lower(state, steps[0])
                train_step = lowered.compile(tiny_runs.QUICK)
            for k, batch in enumerate(steps):
                state, metrics = train_step(state, batch)
                losses.append(float(metrics["loss"]))
                if k == 0:  # the first moment is the gradient, but for its size
                    states = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
                    [mu] = [jax.device_get(s.mu) for s in states if is_adam(s)]
            grads = jax.tree.map(lambda g, w: g[tuple(map(slice, w.shape))], mu, first)
            metrics = jax.device_get(metrics)
            runs.append(Trained(losses, jax.tree.leaves(grads), metrics))
    return runs


def distances(grads, others):
    """Of each parameter's, over the norm of the other."""
    norm = np.linalg.norm
    return [norm(a - b) / norm(b) for a, b in zip(grads, others, strict=True)]


def tiny(precision, quant=None, **settings):
    config = tiny_runs.tiny(precision=precision, **settings)
    return dataclasses.replace(config, quant=quant or QuantConfig())


def test_matrices_of_blocks_are_in_and_heads_routers_and_vectors_are_not():
    recipe = recipes.make_recipe("fp8", QuantConfig())
    names = recipes.chosen(param_specs(model("tiny_moe", qkv_bias=True)), recipe)
    last = {name.rpartition("/")[2] for name in names}
    assert last == {"query", "key", "value", "out", "up", "gate", "down"}
    skip = QuantConfig(skip="down attention")
    names = recipes.chosen(param_specs(model()), recipes.make_recipe("int8", skip))
    assert {name.rpartition("/")[2] for name in names} == {"up", "gate"}


@pytest.mark.parametrize(
    ("skip", "text"),
    [
        ("dwon", r"quant.skip='dwon': 'dwon' matches no matrix.*did you mean.*down"),
        ("attention ffn", "leaves no matrix in low precision"),
        ("*/down+*/out", "matches no matrix"),
    ],
)
def test_a_pattern_that_skips_nothing_or_all_is_refused(skip, text):
    recipe = recipes.make_recipe("fp8", QuantConfig(skip=skip))
    with pytest.raises(ConfigError, match=text):
        recipes.chosen(param_specs(model()), recipe)


def test_at_least_nine_tenths_of_tinys_flops_outside_the_head_are_low():
    specs = param_specs(model())
    share = functools.partial(
        recipes.share_of_flops,
        specs,
        flops_per_token=facts.train_flops_per_token(model(), specs, length=128),
    )
    full = share(recipes.make_recipe("fp8", QuantConfig()))
    assert 0.9 < full < 1.0
    forward = share(recipes.make_recipe("fp8", QuantConfig(backward="compute")))
    assert forward == pytest.approx(full / 3)
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 384)
    scores = 12 * 4 * 32 * 64 * 4  # width 128, on average 64 keys, 4 layers
    # The count of all FLOPs takes vectors for matrices, 0.2% of the parameters.
    assert full == pytest.approx(6 * matrices / (6 * matrices + scores), rel=2e-3)


def test_delayed_scales_are_those_of_the_published_recipe():
    """Transformer Engine: scale from the largest of the last `history` steps, 1 before
    there is one; the newest maximum enters after the step."""
    cfg = QuantConfig(scaling="delayed", history=3)
    recipe, specs = recipes.make_recipe("fp8", cfg), param_specs(model())
    path = recipes.chosen(specs, recipe)[0]
    state = low_precision.first_state(specs, recipe, inner=jnp.float32(7))
    assert state.largest[path].shape == (4, 3, 3)  # layers, operands, history
    rng, seen = np.random.default_rng(0), np.zeros((0, 4, 3))
    update = lambda inner, stats: inner + stats
    for _ in range(5):
        scales = low_precision.delayed_scales(state.largest[path], recipe)
        last = seen[-3:].max(axis=0, initial=0)
        formats = np.array([448.0, 448.0, 57344.0])
        np.testing.assert_allclose(scales, np.where(last, last / formats, 1), rtol=1e-6)
        now = rng.uniform(0.1, 10, (4, 3))
        now[0, 0] = np.inf  # not finite: as if nothing had been seen
        largest = {p: jnp.asarray(now, jnp.float32) for p in state.largest}
        now[0, 0] = 0
        stats = (jnp.float32(1), Maxima(largest))
        state = low_precision.next_state(update, state, stats)
        seen = np.concatenate([seen, now[None]])
    assert float(state.inner) == 12


@pytest.fixture
def compute_float32(monkeypatch):
    """All but the codes in float32: bfloat16's rounding would hide a difference."""
    wide = precisions.policy("float32")
    for name in ("fp8", "int8", "mxfp8"):
        monkeypatch.setitem(precisions.POLICIES, name, wide)


@pytest.fixture(scope="module")
def plain(data):
    """In float32, from the same first parameters."""
    first = tiny_runs.first_params(tiny("float32"), data)
    [run] = runs_from([first], tiny("float32"), data)
    return run


@pytest.mark.parametrize("precision", ["int8", "fp8", "mxfp8"])
@pytest.mark.usefixtures("compute_float32")
@pytest.mark.slow
def test_a_mesh_of_eight_is_as_far_from_one_device_as_its_last_bits_are(
    data, plain, precision
):
    first = tiny_runs.first_params(tiny(precision), data)
    rng = np.random.default_rng(0)
    near = [
        jax.tree.map(lambda x: x * (1 + NOISE * rng.standard_normal(x.shape)), first)
        for _ in range(3)
    ]
    one, *moved = runs_from([first, *near], tiny(precision), data)
    mesh = "data 2 x fsdp 2 x tensor 2"
    [many] = runs_from([first], tiny(precision, mesh=mesh), data)
    # Of gradients, by parameter. What one of the draws moves, the order of sums may.
    far = np.array([distances(run.grads, one.grads) for run in (many, *moved)])
    assert far[1:].max() > 1e-3, "no code flips by the last bits"
    assert far[0].max() < TIMES_NOISE * far[1:].max()
    assert np.median(far[0]) < TIMES_NOISE * np.median(far[1:], axis=1).max()
    for run in (many, *moved):
        assert run.losses[0] == pytest.approx(one.losses[0], abs=FIRST_LOSS)
        np.testing.assert_allclose(run.losses, one.losses, atol=LATER_LOSS[precision])
    low = distances(plain.grads, one.grads)
    assert np.median(low) > TIMES_NOISE * far[0].max(), "what rounding itself moves"
    np.testing.assert_allclose(one.losses, plain.losses, atol=0.05)
    for operand in ("input", "weight", "grad"):
        assert one.metrics[f"quant/{operand}_saturation"] == 0
        assert 0 <= one.metrics[f"quant/{operand}_underflow"] < 0.3
        assert 0 < one.metrics[f"quant/{operand}_scale"] < 1


@pytest.mark.usefixtures("compute_float32")
@pytest.mark.slow
def test_delayed_scales_are_the_same_for_any_microbatches(data):
    cfg = QuantConfig(scaling="delayed", history=4)
    once, _, whole = steps_of(tiny("fp8", cfg), data)
    cut, _, parts = steps_of(tiny("fp8", cfg, microbatches=4), data)
    np.testing.assert_allclose(cut, once, atol=OTHER_CODES)
    assert isinstance(whole.model_state, Delayed)
    for path, largest in whole.model_state.largest.items():
        assert (largest[..., :3] > 0).all()
        assert (largest[..., 3] == 0).all()
        # The first step has the same parameters, and the same maxima but for sums.
        first = parts.model_state.largest[path][..., 2]
        np.testing.assert_allclose(largest[..., 2], first, rtol=0.02)


@pytest.mark.slow
def test_a_scale_that_is_too_small_shows_as_saturation(data):
    """Without a history all scales are 1, too large for gradients and fine for others;
    a history that is far too small clips."""
    cfg = QuantConfig(scaling="delayed", history=4)
    built = tiny_runs.build(tiny("fp8", cfg), data)
    stream = batches.make_stream(data.split("train"), length=48, batch_size=32, seed=0)
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        place = tiny_runs.experiment.batch_sharding(built.layout)
        batch = device.to_device(stream.batch, 0, batch_size=32, sharding=place)
        step = built.train_step.lower(state, batch).compile(tiny_runs.QUICK)
        small = jax.tree.map(lambda x: jnp.full_like(x, 0.5), state.model_state)
        _, metrics = step(state._replace(model_state=small), batch)
        state = built.init()  # the first one was donated
        one = state.model_state.largest | {
            path: jnp.full_like(x, 0.5)
            for path, x in state.model_state.largest.items()
            if path.endswith("ffn/up")
        }
        in_one = state.model_state._replace(largest=one)
        _, metrics_of_one = step(state._replace(model_state=in_one), batch)
    assert metrics["quant/input_saturation"] > 0.1
    assert metrics["quant/input_saturation_worst"] >= metrics["quant/input_saturation"]
    assert metrics["quant/input_scale"] == pytest.approx(0.5 / 448)
    # The metrics tell which kind of matrix it is.
    name = "quant/input_saturation_worst"
    by_kind = {k: x for k, x in metrics_of_one.items() if k.startswith(f"{name}/")}
    assert len(by_kind) > 4
    assert by_kind.pop(f"{name}/ffn/up") == metrics_of_one[name] > 0.1
    assert max(by_kind.values()) == 0


@pytest.mark.slow
def test_evaluation_multiplies_in_the_compute_dtype(data):
    losses = []
    for config in (tiny("bfloat16"), tiny("fp8", QuantConfig(scaling="delayed"))):
        built = tiny_runs.build(config, data)
        stream = batches.make_stream(
            data.split("train"), length=48, batch_size=32, seed=0
        )
        with jax.set_mesh(built.layout.mesh):
            state = built.init()
            place = tiny_runs.experiment.batch_sharding(built.layout)
            batch = device.to_device(stream.batch, 0, batch_size=32, sharding=place)
            loss, _ = built.eval_step(state.params, state.model_state, batch)
            losses.append(float(loss))
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])


def test_units_are_known_by_the_device():
    class Chip:
        def __init__(self, platform, kind="", capability=""):
            self.platform, self.device_kind = platform, kind
            self.compute_capability = capability

    has = recipes.has_units
    assert has(Chip("tpu", "TPU v6 lite"), "int8")
    assert not has(Chip("tpu", "TPU v6 lite"), "fp8_e4m3")
    assert not has(Chip("tpu", "TPU v4"), "int8")
    assert has(Chip("gpu", capability="9.0"), "fp8_e4m3")
    assert not has(Chip("gpu", capability="8.0"), "fp8_e4m3")
    assert has(Chip("gpu", capability="8.0"), "int8")
    assert not has(Chip("cpu"), "int8")
    assert not has(Chip("gpu", capability="10.0"), "mxfp8")
