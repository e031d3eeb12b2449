"""Parts of a model that are not trained: what is made of the config, on every mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tune import small

from jaxinfra import experiment, options, params, patterns
from jaxinfra.config import CommConfig, ConfigError, LoraConfig, ParallelConfig
from jaxinfra.data import packing
from jaxinfra.models.specs import param_specs
from jaxinfra.train import state as states
from jaxinfra.tune import frozen

# float32 sums in another order, carried through 4 updates.
OTHER_MESH = 2e-5
# Half a step of int8 is 0.4% of a block's largest value, and averages out in the loss.
IN_8_BITS = 0.003
RANK = LoraConfig(rank=2, alpha=4.0)
NF4 = dataclasses.replace(RANK, base="nf4", group=4)


def rows(step, cfg, sharding):
    """A batch of rows of unequal length."""
    rng = np.random.default_rng(step)
    size, length = cfg.train.batch_size, cfg.train.length
    tokens = rng.integers(0, cfg.model.vocab_size, (size, length + 1)).astype(np.uint16)
    cuts = rng.integers(4, length + 1, (size, 1)).astype(np.uint16)
    return packing.Batch(
        jax.device_put(tokens, sharding), jax.device_put(cuts, sharding)
    )


def built(cfg):
    count = int(np.prod(list(dataclasses.asdict(cfg.mesh).values())))
    return experiment.build(cfg, jax.devices()[:count])


def trained(cfg, steps=4):
    """(losses, the last state on the host, the frozen parameters at first)."""
    e = built(cfg)
    with jax.set_mesh(e.layout.mesh):
        begun = e.task.adopt(small.weights(e.layout, cfg.model))
        first = small.host(getattr(begun[1], "base", ()))
        state, losses = e.init(begun=begun), []
        for k in range(steps):
            batch = rows(k, cfg, experiment.batch_sharding(e.layout))
            state, metrics = e.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses), small.host(state), first


@pytest.mark.parametrize("lora", [NF4, RANK], ids=["nf4", "plain"])
@pytest.mark.slow
def test_every_mesh_and_any_microbatches_train_the_same_adapters(lora):
    on_many = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    cfg = small.config(lora=lora, train={"microbatches": 2}, **on_many)
    expected, _, _ = trained(small.config(lora=lora))
    losses, _, _ = trained(cfg)
    np.testing.assert_allclose(losses, expected, atol=OTHER_MESH)
    assert len(set(losses)) == len(losses)


@pytest.mark.slow
def test_devices_share_groups_of_64_of_the_576_inputs_of_a_published_model():
    model = options.load_config("smollm2_135m").model
    model = dataclasses.replace(model, repeats=2, vocab_size=30)
    few = {"model": model, "lora": LoraConfig(rank=2, base="nf4")}
    expected, _, base = trained(small.config(**few), steps=2)
    meshes = [({"fsdp": 2}, 1), ({"fsdp": 2, "pipeline": 2}, 2)]
    for mesh, microbatches in meshes:
        train = {"microbatches": microbatches}
        cfg = small.config(**few, mesh=mesh, train=train, zero=3)
        losses, _, split = trained(cfg, steps=2)
        jax.tree.map(np.testing.assert_array_equal, split, base)
        np.testing.assert_allclose(losses, expected, rtol=OTHER_MESH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "mesh", "schedule"),
    [
        ({"lora": NF4}, {"fsdp": 2, "tensor": 2, "pipeline": 2}, "1f1b"),
        ({"train": {"freeze": "ffn embedding"}}, {"pipeline": 2}, "zero_bubble"),
    ],
)
def test_a_pipeline_trains_the_same_parts(settings, mesh, schedule):
    """Its stages take no gradient of what is frozen, which may have none."""
    train = settings.get("train", {})
    expected, state, _ = trained(small.config(**settings))
    cfg = small.config(
        **settings | {"train": train | {"microbatches": 2}},
        mesh=mesh,
        zero=3,
        parallel=ParallelConfig(schedule=schedule),
    )
    losses, piped, base = trained(cfg)
    np.testing.assert_allclose(losses, expected, rtol=OTHER_MESH)
    assert losses[-1] < losses[0]
    paths = {path for path, _ in params.named(state.params)}
    assert {path for path, _ in params.named(piped.params)} == paths
    for a, b in zip(*map(jax.tree.leaves, (base, piped.model_state.base)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "sizes"),
    [(RANK, {"fsdp": 2}), (NF4, {"fsdp": 2}), (NF4, {"fsdp": 2, "pipeline": 2})],
)
def test_adapters_train_alike_where_weights_cross_in_8_bits(lora, sizes):
    """A base that is in few bits already crosses as it is. One update, since a later
    one of adamw would follow the sign of what was near zero."""
    cfg = small.config(lora=lora, mesh=sizes, zero=3)
    expected, _, _ = trained(cfg, steps=2)
    comm = CommConfig(gather="int8", reduce="int8")
    losses, _, _ = trained(dataclasses.replace(cfg, comm=comm), steps=2)
    far = np.abs(losses / expected - 1)
    assert 0 < far.max() < IN_8_BITS


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_source():
    losses = [
        built_loss(small.config(**settings))
        for settings in ({"lora": RANK}, {"train": {"freeze": "ffn"}}, {"lora": NF4})
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[2] - losses[1]) > 1e-4, "few bits must show"


def built_loss(cfg):
    """The loss of the first batch, before any step."""
    e = built(cfg)
    with jax.set_mesh(e.layout.mesh):
        begun = e.task.adopt(small.weights(e.layout, cfg.model))
        batch = rows(0, cfg, experiment.batch_sharding(e.layout))
        loss, aux = e.eval_step(*begun, batch)
        return float(loss / aux.weight_sum)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": RANK},
        {"lora": dataclasses.replace(NF4, whole="final_norm")},
        {"train": {"freeze": "ffn attention"}},
    ],
    ids=["lora", "nf4", "freeze"],
)
@pytest.mark.slow
def test_what_is_frozen_does_not_change_and_what_is_trained_does(settings):
    cfg = small.config(**settings)
    _, state, first = trained(cfg)
    last = state.model_state.base
    jax.tree.map(np.testing.assert_array_equal, last, first)
    e = built(cfg)
    with jax.set_mesh(e.layout.mesh):
        begun = small.host(e.task.adopt(small.weights(e.layout, cfg.model))[0])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, begun)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_a_trained_part_moves_as_it_does_when_all_is_trained():
    """Its gradient knows nothing of the rest being frozen: the first step of sgd."""
    whole, part = (
        dataclasses.replace(
            small.config(train={"freeze": freeze}),
            optimizer=dataclasses.replace(
                small.config().optimizer, name="sgd", clip_norm=0.0, weight_decay=0.0
            ),
        )
        for freeze in ("", "ffn embedding")
    )
    _, all_of_it, _ = trained(whole, steps=1)
    _, some, _ = trained(part, steps=1)
    theirs = dict(params.named(all_of_it.params))
    ours = dict(params.named(some.params))
    assert 0 < len(ours) < len(theirs)
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_the_digest_is_the_same_on_every_mesh_and_tells_any_change():
    found = []
    for sizes in ({}, {"fsdp": 4, "tensor": 2}):
        with small.mesh_of(sizes) as layout:
            weights = small.weights(layout)  # a vocabulary of 29 is padded on tensor 2
            found.append(np.asarray(frozen.digest(weights, layout)))
    np.testing.assert_array_equal(*found)
    with small.mesh_of({}) as layout:
        weights = small.weights(layout)
        ffn = weights["pattern"][0]["ffn"]
        place, up = ffn["up"].sharding, np.asarray(ffn["up"])
        one_bit, exchanged = up.copy(), up.copy()
        one_bit[1, 3, 2] = np.nextafter(up[1, 3, 2], np.float32(9))
        exchanged[0, [0, 1]] = up[0, [1, 0]]
        for changed in (one_bit, exchanged, -up):
            ffn["up"] = jax.device_put(changed, place)
            other = np.asarray(frozen.digest(weights, layout))
            assert (other != found[0]).all()


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2}])
def test_adapters_of_a_published_model_are_a_fiftieth_of_it(sizes):
    model = options.load_config("smollm2_135m").model
    cfg = small.config(model=model, lora=LoraConfig(rank=8, base="nf4"))
    specs = param_specs(model)
    with small.mesh_of(sizes) as layout:
        parts = frozen.make_parts(specs, cfg, layout, small.POLICY)
    # Moments are as large as what they are of, on both sides.
    assert params.count(parts.specs) < 0.02 * params.count(specs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lora": LoraConfig(rank=2, targets="atention")},
            ["lora.targets", "attention"],
        ),
        ({"lora": LoraConfig(rank=2, targets="embedding")}, ["matches no matrix"]),
        # Of two key heads of 4: 16 x 8.
        ({"lora": LoraConfig(rank=8)}, ["lora.rank=8", "attention/key is 16 x 8"]),
        ({"train": {"freeze": "embeding"}}, ["train.freeze", "mean embedding?"]),
        ({"train": {"freeze": "*"}}, ["leaves nothing to train"]),
        ({"lora": dataclasses.replace(NF4, group=5)}, ["lora.group=5", "divide"]),
        (
            {
                "lora": NF4,
                "model": dataclasses.replace(small.MODEL, width=12, head_dim=4),
                "mesh": {"fsdp": 4},
            },
            ["lora.base=nf4", "'fsdp'", "stored in pairs; use int8"],
        ),
    ],
)
def test_patterns_and_groups_that_do_not_fit_are_told(settings, words):
    with pytest.raises(ConfigError) as error:
        built(small.config(**settings))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("ffn", "pattern/0/ffn/up", True),
        ("ffn", "pattern/0/ffn_norm/scale", False),
        ("attention/query", "suffix/1/attention/query", True),
        ("pattern/0", "pattern/0/ffn/up", True),
        ("pattern/0", "pattern/01/ffn/up", False),
        ("*norm", "pattern/0/ffn_norm/scale", True),
        ("quer", "suffix/1/attention/query", False),
    ],
)
def test_a_pattern_is_of_whole_parts_of_a_path(pattern, path, expected):
    assert patterns.is_match(path, pattern) == expected


def test_a_checkpoint_holds_no_frozen_parameter():
    e = built(small.config(lora=RANK))
    with jax.set_mesh(e.layout.mesh):
        begun = e.task.adopt(small.weights(e.layout))
        saved = states.without_frozen(e.init(begun=begun))
        again = states.with_frozen(saved, begun)
        other = e.task.adopt(small.weights(e.layout, seed=4))
        with pytest.raises(ConfigError, match="other parameters than"):
            states.with_frozen(saved, other)
    paths = [path for path, _ in params.named(saved)]
    held = [path for path in paths if path.startswith(("params", "model_state"))]
    assert "model_state/digest" in held
    assert all(path.endswith(("/a", "/b", "digest")) for path in held)
    jax.tree.map(np.testing.assert_array_equal, again.model_state.base, begun[1].base)
