"""What a pipeline's mesh saves, any other restores, to the bit, and back."""

import jax
import numpy as np
from parallel import hops, pipelines

# Repeats and a vocabulary that no mesh divides: padding differs from mesh to mesh.
MODEL = {"repeats": 5}
CHAIN = [
    {},
    {"pipeline": 2, "fsdp": 2},
    {"fsdp": 4},
    {"pipeline": 4, "tensor": 2},
    {"pipeline": 2, "data": 2, "tensor": 2},
    {"data": 2},
]


def test_each_mesh_restores_what_the_one_before_it_saved(tmp_path):
    built = pipelines.build(pipelines.config(CHAIN[0], model=MODEL))
    with jax.set_mesh(built.layout.mesh):
        state = built.init()
        first = hops.on_host(built, state)
        hops.save(tmp_path / "0", built, state)
    for i, sizes in enumerate(CHAIN[1:], start=1):
        schedule = "zero_bubble" if sizes.get("pipeline") == 4 else "1f1b"
        config = pipelines.config(sizes, model=MODEL, schedule=schedule, microbatches=2)
        built = pipelines.build(config)
        with jax.set_mesh(built.layout.mesh):
            state = hops.restored(tmp_path / str(i - 1), built)
            jax.tree.map(
                np.testing.assert_array_equal, hops.on_host(built, state), first
            )
            hops.save(tmp_path / str(i), built, state)
    assert {x.sharding.mesh.size for x in jax.tree.leaves(state)} == {2}


def test_the_table_of_meshes_is_whole(meshes):
    """56 factorisations of 8 over six axes, 394 cases; each runs or names a rule."""
    every = meshes.cases()
    assert len({case.sizes for case in every}) == 56
    assert len(every) == len({case.name for case in every}) == 394
    assert all(np.prod(case.sizes) == 8 for case in every)
    refused = [why for case in every if (why := meshes.refusal(case))]
    assert all("mesh." in why for why in refused)
    assert len(every) - len(refused) >= 100
