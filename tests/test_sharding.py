"""Logical names to mesh axes: the table, ZeRO's levels, and errors."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra import mesh as mesh_lib
from jaxinfra import sharding
from jaxinfra.sharding import Rules

ZERO = ("fsdp", "expert", "context")
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture
def layout():
    return sharding.make_layout(mesh_lib.make_mesh(MESH))


def test_a_spec_is_read_from_the_table():
    assert sharding.spec(Rules(), "batch", "length", "width") == P(
        ("data", "fsdp", "expert"), "context", None
    )
    assert sharding.spec(Rules(), "vocab", "embed", None) == P(
        ("pipeline", "tensor"), ZERO, None
    )
    assert sharding.spec(Rules()) == P()


def test_zero_leaves_the_expert_axis_to_experts():
    at_rest = sharding.spec(Rules(), "experts", "embed", "ffn")
    assert at_rest == P("expert", ("fsdp", "context"), "tensor")
    assert sharding.zero_axes(*at_rest) == ("fsdp", "context")
    assert sharding.gathered(at_rest) == P("expert", None, "tensor")


@pytest.mark.parametrize(
    ("zero", "embed"),
    [
        (0, (None, None, None)),
        (1, (None, None, ZERO)),
        (2, (None, ZERO, ZERO)),
        (3, (ZERO, ZERO, ZERO)),
    ],
)
def test_zero_levels_shard_optimizer_then_gradients_then_parameters(zero, embed):
    layout = sharding.make_layout(mesh_lib.make_mesh(MESH), zero=zero)
    rules = (layout.params, layout.grads, layout.optimizer)
    assert tuple(sharding.spec(r, "embed")[0] for r in rules) == embed
    # Only that row differs: activations are split alike at every level.
    assert {sharding.spec(r, "batch", "heads") for r in rules} == {
        P(("data", "fsdp", "expert"), "tensor")
    }


def test_stages_have_parameters_and_gradients_whole_but_over_fsdp():
    layout = sharding.make_layout(mesh_lib.make_mesh({"fsdp": 4, "pipeline": 2}))
    rules = (layout.params, layout.grads, layout.optimizer)
    at_rest = [sharding.spec(r, "embed")[0] for r in rules]
    assert at_rest == ["fsdp", "fsdp", ZERO]


def test_an_unknown_name_is_refused_with_the_table():
    with pytest.raises(
        ValueError, match=r"'hidden' is no logical name.*'batch'.*'ffn'"
    ):
        sharding.spec(Rules(), "hidden")


def test_an_axis_used_twice_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\('heads', 'ffn'\) use mesh axis 'tensor'"):
        sharding.spec(Rules(), "heads", "ffn")
    with pytest.raises(ValueError, match="'expert' twice"):
        sharding.spec(Rules(), "batch", "embed")


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (
            ("heads", None),
            (3, 8),
            r"query: dim 0 \(heads\) of size 3 does not divide over mesh axes "
            r"\('tensor',\) of size 2; change model.num_kv_heads or mesh.tensor",
        ),
        (
            ("heads", "embed"),
            (4, 7),
            r"query: dim 1 \(embed\) of size 7 .* of size 2; change model.width",
        ),
        (
            ("batch",),
            (6,),
            r"dim 0 \(batch\) of size 6 .* of size 4; change train.batch_size",
        ),
    ],
)
def test_a_dim_that_does_not_divide_names_array_dim_numbers_and_key(
    names, shape, message, layout
):
    with pytest.raises(ValueError, match=message):
        sharding.sharding(layout, layout.params, shape, names, "query")


def test_a_sharding_that_divides_is_on_the_mesh(layout):
    place = sharding.sharding(layout, layout.params, (6, 4), ("embed", "heads"))
    assert place == jax.NamedSharding(layout.mesh, P(ZERO, "tensor"))
    assert sharding.axis_product(layout.mesh, ("data", "fsdp", "expert")) == 4


def test_gathered_takes_axes_away_and_those_of_zero_by_default():
    partition = P("expert", ZERO, None, ("pipeline", "tensor"))
    assert sharding.gathered(partition) == P(
        "expert", None, None, ("pipeline", "tensor")
    )
    assert sharding.gathered(P("context", "fsdp"), "context") == P(None, "fsdp")
    assert sharding.gathered(P(("data", "fsdp")), "fsdp") == P("data")
