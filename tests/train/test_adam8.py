"""Adam with moments in 8 bits: near Adam, near the moments, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxinfra
from jaxinfra import params, sharding
from jaxinfra.train import adam8
from jaxinfra.train import state as states

ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
# Of m / sqrt(v): steps of 1/127 in the cube root of m, and of 1/255 in the sixth of v,
# by chance, are 3 x 0.3% and 3 x 0.2% of a value over its root; roots are a quarter
# of a block's largest, or more.
NEAR_A_DIRECTION = 0.05


def spec(shape, kind="matrix"):
    axes = ("embed", "ffn")[: len(shape)]
    contract = (0,) if kind == "matrix" else ()
    return params.ParamSpec(shape, axes, contract, kind, params.normal(1.0))


SPECS = {"w": spec((16, 128)), "norm": spec((128,), "vector"), "odd": spec((16, 24))}


def gradients(step):
    """Of different sizes, as those of one matrix are: a spread of e^1.5."""
    key = jax.random.fold_in(jax.random.key(0), step)
    size = lambda s: jnp.exp(1.5 * jax.random.normal(jax.random.key(1), s) - 3)
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), s.shape) * size(s.shape)
        for i, (name, s) in enumerate(SPECS.items())
    }


def moments(steps=20):
    tx = optax.scale_by_adam(**ADAM)
    state = tx.init(gradients(0))
    for k in range(steps):
        _, state = tx.update(gradients(k), state)
    return state


def dynamic_code(x, *, signed):
    """x rounded by the dynamic tree code of arXiv:2110.02861 section 2.2, by blocks."""
    values = [0.0]
    for zeros in range(7):  # zeros after the sign: the decade; the rest is linear
        count = 2 ** (6 - zeros) if signed else 2 ** (7 - zeros)
        edges = np.linspace(0.1, 1.0, count + 1)
        values += list((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros)
    values.append(1.0)
    table = np.sort(
        np.concatenate([np.negative(values), values] if signed else [values])
    )
    blocks = np.asarray(x).reshape(*x.shape[:-1], -1, 64)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    unit = blocks / np.where(largest > 0, largest, 1)
    middles = (table[1:] + table[:-1]) / 2
    return (table[np.searchsorted(middles, unit)] * largest).reshape(x.shape)


@pytest.mark.slow
def test_an_update_from_8_bits_is_nearer_than_from_the_published_code():
    """The direction m / sqrt(v) is what a code is chosen by; its error is against that
    of float32 moments, root mean square."""
    state = moments()
    m, v = np.asarray(state.mu["w"]), np.asarray(state.nu["w"])
    exact = m / (np.sqrt(v) + 1e-8)

    def error(m, v):
        wrong = np.asarray(m) / (np.sqrt(np.asarray(v)) + 1e-8) - exact
        return np.sqrt(np.mean(wrong**2) / np.mean(exact**2))

    ours = error(
        *(adam8.decode(n, adam8.encode(n, x, 0)) for n, x in (("mu/w", m), ("nu/w", v)))
    )
    theirs = error(dynamic_code(m, signed=True), dynamic_code(v, signed=False))
    assert ours < NEAR_A_DIRECTION
    assert ours < theirs


def test_a_moment_is_right_on_average_and_a_second_one_never_zero():
    state = moments()
    for name, x in (("mu/w", state.mu["w"]), ("nu/w", state.nu["w"])):
        stored = [adam8.encode(name, x, jnp.uint32(step)) for step in range(100)]
        back = np.stack([adam8.decode(name, moment) for moment in stored])
        root = np.abs(np.asarray(x)) ** (1 / 6 if "nu" in name else 1 / 3)
        mean = np.mean(np.abs(back) ** (1 / 6 if "nu" in name else 1 / 3), axis=0)
        step = np.repeat(stored[0].scales, 64, axis=-1)
        is_inside = root > step
        # Five standard errors of a mean of 100 draws of at most half a step.
        assert (np.abs(mean - root) < 0.25 * step + 1e-7)[is_inside].all()
    assert (back[:, np.asarray(x) > 0] > 0).all()


def test_an_average_moves_though_each_step_is_below_half_a_step_of_the_code():
    name, v = "nu/w", jnp.ones((1, 64)).at[0, 1:].set(0.5)
    for step in range(400):
        v = adam8.decode(name, adam8.encode(name, v, jnp.uint32(step)))
        v = v + 0.002 * (jnp.ones((1, 64)) - v)
    expected = 1 - 0.5 * (1 - 0.002) ** 400
    assert abs(float(v[0, 1:].mean()) / expected - 1) < 0.03


def test_ten_updates_are_adams():
    ours, theirs = adam8.scale_by_adam8(SPECS, **ADAM), optax.scale_by_adam(**ADAM)
    state, other = ours.init(gradients(0)), theirs.init(gradients(0))
    for k in range(10):
        direction, state = ours.update(gradients(k), state)
        exact, other = theirs.update(gradients(k), other)
    np.testing.assert_allclose(direction["norm"], exact["norm"], rtol=1e-5)
    for name in ("w", "odd"):
        error = direction[name] - exact[name]
        part = float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact[name] ** 2)))
        # An average that keeps 0.9 of itself adds up such errors of ten steps or so.
        assert part < 2 * NEAR_A_DIRECTION, name
        assert state.mu[name].values.dtype == jnp.int8
        assert state.nu[name].values.dtype == jnp.uint8
    assert state.mu["w"].scales.shape == (16, 2)
    assert state.mu["odd"].scales.shape == (16, 1)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
@pytest.mark.slow
def test_moments_lie_with_their_parameters_and_are_the_same_on_every_mesh(sizes):
    tx = adam8.scale_by_adam8(SPECS, **ADAM)
    layout = sharding.make_layout(jaxinfra.make_mesh(sizes))
    places = states.make_shardings(SPECS, tx, layout)
    w = places.params["w"]
    assert places.opt_state.mu["w"].values.is_equivalent_to(w, 2)
    assert places.opt_state.nu["w"].scales.is_equivalent_to(w, 2)

    def two_steps(state, *grads):
        for g in grads:
            _, state = tx.update(g, state)
        return state

    grads = [gradients(k) for k in range(2)]
    alone = jax.jit(two_steps)(tx.init(grads[0]), *grads)
    with jax.set_mesh(layout.mesh):
        state = states.init_opt_state(
            tx, jax.device_put(grads[0], places.params), places
        )
        step = jax.sharding.auto_axes(two_steps, out_sharding=places.opt_state)
        split = jax.jit(step)(state, *(jax.device_put(g, places.params) for g in grads))
    jax.tree.map(np.testing.assert_array_equal, split, alone)


def moment_of(arrays, which):
    """Of `w`, whichever width it is stored in."""
    if f"{which}/w" in arrays:
        return arrays[f"{which}/w"]
    pair = (arrays[f"{which}/w/{part}"] for part in adam8.Moment._fields)
    return adam8.decode(f"{which}/", adam8.Moment(*pair))


def test_a_state_of_either_width_becomes_one_of_the_other_where_it_lies(monkeypatch):
    """No array comes to the host: another process may have parts of it."""
    mesh = jaxinfra.make_mesh({"fsdp": 4, "tensor": 2})

    def place(x):
        parts = [(16, "fsdp"), (128, "tensor"), (2, "tensor")]
        return jax.NamedSharding(mesh, jax.P(*(dict(parts).get(n) for n in x.shape)))

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x))
    wide = dict(params.named(moments()))
    eight = adam8.scale_by_adam8(SPECS, **ADAM)
    narrow = dict(params.named(eight.update(gradients(0), eight.init(gradients(0)))[1]))
    for mine, theirs in ((wide, narrow), (narrow, wide)):
        stored = {name: x.shape for name, x in theirs.items()}
        plain, convert = adam8.other_moments(
            {name: like(x) for name, x in mine.items()}, stored
        )
        assert {n: (p.shape, p.dtype) for n, p in plain.items()} == {
            n: (x.shape, x.dtype) for n, x in theirs.items()
        }
        with monkeypatch.context() as patched:
            patched.setattr(jax, "device_get", None)
            made = convert(
                {n: jax.device_put(x, plain[n].sharding) for n, x in theirs.items()}
            )
        for name, x in made.items():
            assert x.sharding.is_equivalent_to(place(x), x.ndim), name
        assert {n: (x.shape, x.dtype) for n, x in made.items()} == {
            n: (x.shape, x.dtype) for n, x in mine.items()
        }
        for which in ("mu", "nu"):
            power = 1 / 3 if which == "mu" else 1 / 6
            roots = [jnp.abs(moment_of(x, which)) ** power for x in (made, theirs)]
            step = float(roots[1].max()) / 127
            np.testing.assert_allclose(*roots, atol=step, rtol=0)
