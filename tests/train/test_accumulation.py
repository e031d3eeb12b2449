"""Gradients that devices sum once a step are those of one device and of every
microbatch's sums, and the compiled step sums them after its loop."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import pipelines

from jaxinfra import experiment, mesh, sharding, tasks
from jaxinfra import precision as precisions
from jaxinfra.config import CommConfig, ConfigError, QuantConfig
from jaxinfra.plan import program, step, wires
from jaxinfra.quant.recipe import make_recipe
from jaxinfra.train import accumulation, low_precision, objective

FLOAT32 = 1e-5  # sums in another order, of a gradient's norm
FLOAT16 = 5e-3  # 11 bits, in which products of other shapes round differently
DENSE = {"repeats": 2, "dropout": 0.3, "tied": False}
ODD = pipelines.ODD | {"repeats": 1}
EXPERTS = pipelines.EXPERTS | {"repeats": 1, "dropout": 0.3}
ROUTED = {"balance_loss": 0.05, "router_z_loss": 0.02, "router_bias_rate": 0.01}


def config(sizes, **settings):
    """Two microbatches of a row a device."""
    rows = 2 * int(np.prod([sizes.get(axis, 1) for axis in ("data", "fsdp", "expert")]))
    return pipelines.config(sizes, **{"microbatches": 2, "rows": rows} | settings)


def changed(config, **parallel):
    parallel = dataclasses.replace(config.parallel, **parallel)
    return dataclasses.replace(config, parallel=parallel)


def summed(config, how="true", model_state=None):
    """The Gradients of a batch, on the host, without padding."""
    built = pipelines.build(config)
    task, layout = built.task, built.layout
    grad_fn = task.grad_fn or objective.grad_of(task.loss_fn)
    count, places = config.train.microbatches, built.shardings.grads
    asked = changed(config, reduce_once=how)
    if count == 1:
        grad_fn = objective.placed(grad_fn, places)
    else:
        grad_fn = accumulation.accumulated(task, asked, layout, built.policy, places)
    weights = pipelines.first_params(built)
    with jax.set_mesh(layout.mesh):
        state = task.model_state() if model_state is None else model_state
        state = jax.tree.map(lambda x: x + 0.02 * jnp.arange(x.shape[-1]), state)
        if built.policy.loss_scale:
            # Small, as the weights of these rows are large.
            state = objective.Scaled(state, jnp.float32(4), jnp.int32(0))
        run = jax.jit(grad_fn, compiler_options=pipelines.QUICK)
        here = pipelines.placed(built, weights)
        made = run(here, state, pipelines.rows(built), jax.random.key(5))
        made = jax.device_get(made)
    cut = lambda g, w: g[tuple(map(slice, w.shape))]
    return made._replace(grads=jax.tree.map(cut, made.grads, weights))


def check(found, expected, *, tolerance=FLOAT32):
    far = pipelines.distance(found.grads, expected.grads)
    assert max(far.values()) < tolerance, far
    near = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-5)
    jax.tree.map(near, found._replace(grads=()), expected._replace(grads=()))


CASES = {
    "data": ({"data": 8}, {"model": ODD}),
    "data, experts": ({"data": 8}, {"model": EXPERTS, **ROUTED}),
    "zero 2, 3 microbatches": (
        {"data": 2, "fsdp": 2},
        {"model": DENSE, "zero": 2, "microbatches": 3, "rows": 24},
    ),
    "HSDP": ({"data": 2, "fsdp": 4}, {"model": ODD}),
    "HSDP, experts": ({"data": 2, "fsdp": 4}, {"model": EXPERTS, **ROUTED}),
    "zero 1": ({"fsdp": 8}, {"model": ODD, "zero": 1}),
    "both axes, zero 1": ({"data": 2, "fsdp": 4}, {"model": DENSE, "zero": 1}),
    "zero 1, experts": (
        {"fsdp": 2, "expert": 2},
        {"model": EXPERTS, "zero": 1, **ROUTED},
    ),
    "tensor": ({"data": 2, "tensor": 2, "fsdp": 2}, {"model": ODD}),
    "tensor, experts": (
        {"data": 2, "tensor": 2, "fsdp": 2},
        {"model": EXPERTS, **ROUTED},
    ),
    "context": ({"data": 2, "context": 2, "fsdp": 2}, {"model": ODD}),
    "context, bounded experts": (
        {"data": 2, "context": 2, "expert": 2},
        {"model": EXPERTS | {"capacity_factor": 1.0}, "way": "ulysses", **ROUTED},
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c == "HSDP" else pytest.mark.slow) for c in CASES],
)
def test_the_sum_is_that_of_one_device_and_one_batch(case):
    sizes, settings = CASES[case]
    cfg = config(sizes, **settings)
    check(summed(cfg), summed(pipelines.serial(cfg)))


@pytest.mark.slow
def test_a_loss_scale_leaves_the_sum_as_it_is():
    cfg = config({"data": 2, "fsdp": 2}, precision_name="float16", model=DENSE)
    found = summed(cfg)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found.grads))
    check(found, summed(cfg, "false"), tolerance=FLOAT16)


@pytest.mark.slow
def test_weights_may_cross_fsdp_in_8_bits():
    cfg = config({"data": 2, "fsdp": 2}, model=DENSE)
    cfg = dataclasses.replace(cfg, comm=CommConfig(gather="int8", reduce="int8"))
    check(summed(cfg), summed(cfg, "false"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "fsdp": 2}])
def test_delayed_scales_follow_from_the_largest_of_all_devices(sizes, monkeypatch):
    # All but the codes in float32: a code that bfloat16 moves is a quarter off.
    monkeypatch.setitem(precisions.POLICIES, "fp8", precisions.policy("float32"))
    cfg = config(sizes, precision_name="fp8", zero=1, model=DENSE)
    cfg = dataclasses.replace(cfg, quant=QuantConfig(scaling="delayed"))
    specs, recipe = pipelines.build(cfg).task.specs, make_recipe("fp8", cfg.quant)
    state = low_precision.first_state(specs, recipe)
    found, expected = (summed(cfg, how, state) for how in ("true", "false"))
    ours, theirs = (made.aux.stats[1].tree for made in (found, expected))
    assert ours.keys() == theirs.keys()
    for path, largest in theirs.items():
        assert np.min(largest[..., :2]) > 0
        np.testing.assert_allclose(ours[path], largest, rtol=1e-4, err_msg=path)


def row_sums(params, model_state, batch, key):
    """A loss of rows alone; the largest of them once as such and once to be summed."""
    y_B = jnp.einsum("BD,D->B", batch, params["w"])
    largest = jnp.max(y_B)
    stats = (objective.Maxima({"y": largest}), largest)
    return jnp.sum(y_B**2), objective.Aux(
        jnp.float32(len(y_B)), {"y": jnp.sum(y_B)}, stats
    )


def once(grad_fn, microbatches, place):
    return accumulation.accumulate_once(
        grad_fn,
        microbatches,
        shardings={"w": place},
        axes=("data",),
        policy=precisions.policy("bfloat16"),
    )


def test_sums_are_summed_and_maxima_are_not():
    """By hand; weights and loss too, of which a device that adds a sum up again would
    have too much."""
    here = mesh.make_mesh({"data": 4}, devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    x_BD, w_D = rng.standard_normal((24, 3)), rng.standard_normal(3)
    x_BD, w_D = x_BD.astype(np.float32), w_D.astype(np.float32)
    place = jax.NamedSharding(here, jax.P(None))
    fn = once(objective.grad_of(row_sums), 3, place)
    with jax.set_mesh(here):
        rows = jax.device_put(x_BD, jax.NamedSharding(here, jax.P("data")))
        found = jax.jit(fn)({"w": jax.device_put(w_D, place)}, (), rows, None)
    y_B = x_BD @ w_D
    near = functools.partial(np.testing.assert_allclose, rtol=FLOAT32)
    near(found.grads["w"], 2 * y_B @ x_BD)
    near(found.loss_sum, np.sum(y_B**2))
    near(found.aux.weight_sum, 24)
    near(found.aux.metrics["y"], np.sum(y_B), rtol=1e-4)
    largest, summed = found.aux.stats
    near(largest.tree["y"], np.max(y_B))
    # Row r is in microbatch r % 3, and each device has 2 rows of each.
    y_DBM = y_B.reshape(4, 2, 3)
    near(summed, np.sum(np.max(y_DBM, axis=1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "zero", "axes"),
    [
        ({"data": 8}, 3, ("data",)),
        ({"fsdp": 8}, 3, ()),
        ({"fsdp": 8}, 1, ("data", "fsdp")),
        ({"data": 2, "fsdp": 4}, 3, ("data",)),
        ({"data": 2, "fsdp": 4}, 2, ("data",)),
        ({"data": 2, "fsdp": 4}, 0, ("data", "fsdp")),
        ({"context": 2, "expert": 2, "tensor": 2}, 0, ()),
    ],
)
def test_axes_are_those_that_leave_the_sum_whole(sizes, zero, axes):
    cfg = config(sizes, zero=zero)
    layout = experiment.lay_out(cfg, jax.devices())
    of = lambda c: accumulation.axes_summed_once(c, layout, is_by_row=True)
    assert of(cfg) == of(changed(cfg, reduce_once="true")) == axes
    assert of(changed(cfg, reduce_once="false")) == ()
    assert accumulation.axes_summed_once(cfg, layout, is_by_row=False) == ()
    asked = changed(cfg, reduce_once="true")
    with pytest.raises(ConfigError, match="is_by_row is false"):
        accumulation.axes_summed_once(asked, layout, is_by_row=False)


def lowered_step(get_task=None):
    """StableHLO of a step of HSDP with two microbatches."""
    cfg = config({"data": 2, "fsdp": 4}, model=DENSE)
    how = {} if get_task is None else {"get_task": get_task}
    built = experiment.build(cfg, jax.devices(), **how)
    with jax.set_mesh(built.layout.mesh):
        batch = experiment.abstract_batch(built, step.rows_of(built))
        return built.train_step.lower(built.abstract(), batch).as_text()


def test_nothing_is_left_unsummed_inside():
    """XLA ends the process at a type that is manual and unreduced at once."""
    text = lowered_step()
    assert "manual_axes={" in text
    assert "unreduced" not in text


def test_a_task_that_does_not_say_so_is_not_run_by_row():
    """A user's own, through the library: `config.task` still says text."""
    own = lambda *parts: tasks.text(*parts)._replace(is_by_row=False)
    by_row, whole = lowered_step(), lowered_step(own)
    assert by_row.count("manual_axes={") > whole.count("manual_axes={")


@pytest.mark.parametrize(
    ("platform", "microbatches", "how", "is_once"),
    [
        ("tpu", 2, "auto", True),
        ("gpu", 2, "auto", False),
        ("gpu", 2, "true", True),
        ("gpu", 3, "auto", True),
    ],
)
def test_on_gpus_two_microbatches_are_summed_each_time(
    platform, microbatches, how, is_once
):
    """Unless asked otherwise."""
    cfg = config({"data": 8}, microbatches=microbatches, rows=8 * microbatches)
    cfg = changed(cfg, reduce_once=how)
    layout = experiment.lay_out(cfg, jax.devices())
    device = types.SimpleNamespace(platform=platform)
    there = types.SimpleNamespace(
        devices=np.array([device]), shape=dict(layout.mesh.shape)
    )
    there = layout._replace(mesh=there)
    axes = accumulation.axes_summed_once(cfg, there, is_by_row=True)
    assert axes == (("data",) if is_once else ())


def bytes_over(lowered, here, axis):
    """What a compiled program sends over a mesh axis, (in a loop, outside of one)."""
    made = program.parse(lowered.compile(pipelines.QUICK).as_text())
    sizes, sent = dict(here.shape), {True: 0.0, False: 0.0}
    for name in made.computations:
        for line in made[name]:
            if line.op.removesuffix("-start") in program.COLLECTIVES:
                wire = wires.of(line, name, sizes)
                is_over = axis in wire.axes.split("+")
                sent[name != made.entry] += wire.bytes * is_over
    return sent[True], sent[False]


@pytest.mark.parametrize("how", ["once", "every microbatch"])
def test_devices_meet_after_the_loop(how):
    here = mesh.make_mesh({"data": 4}, devices=jax.devices()[:4])
    place = jax.NamedSharding(here, jax.P(None))
    fn = objective.grad_of(row_sums)
    if how == "once":
        fn = once(fn, 3, place)
    else:
        fn = accumulation.accumulate(fn, 3, shardings={"w": place})
    with jax.set_mesh(here):
        rows = jax.NamedSharding(here, jax.P("data"))
        rows = jax.ShapeDtypeStruct((24, 1000), jnp.float32, sharding=rows)
        w_D = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=place)
        inside, outside = bytes_over(
            jax.jit(fn).lower({"w": w_D}, (), rows, None), here, "data"
        )
    least, little = 2 * 3 / 4 * 4 * 1000, 200
    if how == "every microbatch":
        inside, outside = outside, inside
    assert outside >= least
    assert inside < little


@pytest.mark.slow
def test_the_compiled_step_sums_over_data_after_its_loop():
    """The same of a whole step, where fsdp has parts of every microbatch's sum."""
    cfg = config({"data": 2, "fsdp": 2}, model={"repeats": 2})

    def sent(cfg):
        built = pipelines.build(cfg)
        here = built.layout.mesh
        with jax.set_mesh(here):
            batch = experiment.abstract_batch(built, step.rows_of(built))
            lowered = built.train_step.lower(built.abstract(), batch)
        weights = built.abstract().params
        # Twice (n - 1) / n of the float32 gradients that a device holds, n = 2.
        return *bytes_over(lowered, here, "data"), sharding.bytes_per_device(weights)

    inside, outside, whole = sent(cfg)
    assert whole <= outside < 1.1 * whole
    assert inside < 0.01 * whole
    inside, outside, whole = sent(changed(cfg, reduce_once="false"))
    assert inside > 0.5 * whole  # of the loop over 2 layers one turn is counted
    assert outside < 0.1 * whole
