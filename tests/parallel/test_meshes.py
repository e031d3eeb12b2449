"""The same numbers on every mesh, for every zero and every number of microbatches."""

import os

import jax
import numpy as np
import pytest
from parallel import tiny_runs

from jaxinfra.data import batches
from jaxinfra.train import facts

LOSS = 1e-5  # float32 sums in another order, carried through 20 updates
GRAD_NORM = 1e-4  # the same, of a norm about 4
# Each takes 10 s to compile, so all but the one with every axis are among the slow.
QUICK = ("data 2 x fsdp 2 x tensor 2", 1, "muon", 0.0)
MORE = [
    ("data 8", 1, "adamw", 0.1),
    ("fsdp 8, zero 0", 4, "muon", 0.0),
    ("fsdp 8, zero 1", 2, "adamw", 0.1),
    ("fsdp 8, zero 2", 2, "adamw", 0.1),
    ("fsdp 4 x tensor 2", 4, "adamw", 0.1),
    ("fsdp 8, zero 2", 2, "muon", 0.0),
    ("fsdp 8, zero 3", 1, "adamw", 0.1),
]
# The whole config: every mesh by every way to train it, half a minute a case. In turn
# every mesh meets one way; JAXINFRA_ALL_MESHES=1 runs all 48.
WAYS = [
    (1, "adamw", 0.1),
    (1, "muon", 0.0),
    (2, "adamw", 0.0),
    (2, "muon", 0.1),
    (4, "adamw", 0.1),
    (4, "muon", 0.0),
]
WHOLE = [
    (mesh, *way)
    for i, mesh in enumerate(tiny_runs.MESHES)
    for j, way in enumerate(WAYS)
    if j == i % len(WAYS) or os.environ.get("JAXINFRA_ALL_MESHES")
]


def check(found, expected):
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=LOSS)
    np.testing.assert_allclose(
        found["grad_norm"], expected["grad_norm"], rtol=0, atol=GRAD_NORM
    )
    np.testing.assert_array_equal(found["digest"], expected["digest"])
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert expected["loss"][-1] < expected["loss"][0] - 1.0, "it must have learned"


def test_rows_have_unequal_weights(documents):
    config = tiny_runs.tiny()
    stream = batches.make_stream(
        documents.split("train"), length=config.train.length, batch_size=32, seed=0
    )
    segments = np.concatenate([stream.batch(k).segments_BT1 for k in range(20)])
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).sum(1)
    assert np.quantile(weights, 0.25) < 0.7 * np.quantile(weights, 0.75)
    assert (segments == 0).any(), "a row with padding must come"


@pytest.mark.parametrize(
    ("mesh", "microbatches", "optimizer", "dropout"),
    [QUICK, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in MORE)],
)
def test_twenty_steps_are_those_of_one_device(
    documents, reference, first_params, mesh, microbatches, optimizer, dropout
):
    kind = {"optimizer": optimizer, "dropout": dropout}
    config = tiny_runs.tiny(mesh=mesh, microbatches=microbatches, **kind)
    found = tiny_runs.run(config, documents, first=first_params)
    check(found, reference(**kind))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "microbatches", "optimizer", "dropout"), WHOLE)
def test_twenty_steps_of_the_whole_tiny_are_those_of_one_device(
    documents, reference, mesh, microbatches, optimizer, dropout
):
    kind = {"optimizer": optimizer, "dropout": dropout, "is_whole": True}
    config = tiny_runs.tiny(mesh=mesh, microbatches=microbatches, **kind)
    check(tiny_runs.run(config, documents), reference(**kind))


def initial(documents, mesh):
    return tiny_runs.first_params(tiny_runs.tiny(mesh=mesh), documents)


def test_first_parameters_have_the_same_bits_on_a_mesh(documents, first_params):
    found = initial(documents, "data 2 x fsdp 2 x tensor 2")
    jax.tree.map(np.testing.assert_array_equal, found, first_params)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", tiny_runs.MESHES)
def test_first_parameters_have_the_same_bits_on_every_mesh(
    documents, first_params, mesh
):
    found = initial(documents, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, first_params)


def bytes_by_hand(config, vocab_size, sizes, zero):
    """Bytes of (params, grads, optimizer's state) on one device, written from the
    model's equations: float32, RMS norms without bias, a gated feed-forward."""
    m = config.model
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    vocab = -(-vocab_size // tensor) * tensor
    tables = vocab * m.width * (1 if m.tied else 2)  # both split both ways, as matrices
    matrices = m.repeats * (4 * m.width * m.width + 3 * m.width * m.ffn_width)
    head_norms = 2 * m.width // m.num_heads if m.qk_norm == "head" else 0
    norms = m.repeats * (2 * m.width + head_norms) + m.width  # whole on every device

    def floats(numbers, is_sharded):
        return numbers // tensor // (fsdp if is_sharded else 1)

    def all_floats(is_sharded):
        return floats(tables + matrices, is_sharded) + norms

    moments = 2 * all_floats(zero >= 1)
    counts = 1  # of adam's updates
    if config.optimizer.name == "muon":  # a momentum for matrices, no second moment
        moments -= floats(matrices, zero >= 1)
        counts += 1 + 3  # its own count, and its polynomial's coefficients
    return {
        "memory/params_bytes": 4 * all_floats(zero >= 3),
        "memory/grads_bytes": 4 * all_floats(zero >= 2),
        "memory/opt_bytes": 4 * (moments + counts),
    }


def bytes_told(built):
    """What the start of a run tells."""
    state = built.abstract()
    return facts.bytes_at_rest(state, built.model.specs, built.layout, built.policy)


@pytest.mark.parametrize("mesh", tiny_runs.MESHES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_on_a_device_follow_zero(documents, mesh, optimizer):
    sizes, zero = tiny_runs.MESHES[mesh]
    config = tiny_runs.tiny(mesh=mesh, optimizer=optimizer, is_whole=True)
    built = tiny_runs.build(config, documents)
    vocab_size = documents.tokenizer.vocab_size
    expected = bytes_by_hand(config, vocab_size, sizes, zero)
    assert bytes_told(built) == expected


def test_the_state_made_takes_the_bytes_told(documents):
    config = tiny_runs.tiny(mesh="fsdp 4 x tensor 2")
    built = tiny_runs.build(config, documents)
    told = bytes_told(built)
    with jax.set_mesh(built.layout.mesh):
        state = built.init()

    def on_first(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert on_first(state.params) == told["memory/params_bytes"]
    assert on_first(state.opt_state) == told["memory/opt_bytes"]
