"""A run goes on bit for bit, whatever its state is made of."""

import jax.numpy as jnp
import pytest
from e2e import command

from jaxinfra.checkpoint import checking

STEPS = 10
OTHER_MESH = 1e-5  # float32 sums in another order, over five updates
OTHER_WIDTH = 0.02  # 2% of a moment, over five updates
pytestmark = pytest.mark.slow
KINDS = {
    "factored moments": {"optimizer.name": "adafactor"},
    "bfloat16 parameters": {"precision": "bfloat16_params"},
    "a loss scale": {"precision": "float16"},
    "delayed scales": {"precision": "fp8", "quant.scaling": "delayed"},
    "gradients by chance": {"precision": "int8"},
    "moments in 8 bits": {"optimizer.name": "adamw", "optimizer.moments": "8bit"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_for_bit(cache, tmp_path, kind):
    settings = cache | KINDS[kind] | {"train.steps": STEPS, "train.microbatches": 2}
    settings |= {"model.tied": "false"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = command.train(settings | {"run.dir": whole})
    assert done.returncode == 0, done.stderr
    command.copy_as_of(5, whole, resumed)
    done = command.train(settings | {"run.dir": resumed})
    assert done.returncode == 0, done.stderr
    assert command.events(resumed, "start")[-1]["step"] == 5
    assert command.history(resumed) == command.history(whole)
    ours, theirs = (command.metrics(folder)[-1] for folder in (resumed, whole))
    for key in ("eval/loss", "train/param_norm"):
        assert ours[key] == theirs[key]

    manifest = checking.load(resumed / "checkpoints" / str(STEPS))
    kinds = {name: array.dtype for name, array in manifest.arrays.items()}
    is_half = kind == "bfloat16 parameters"
    for name, dtype in kinds.items():
        if name.startswith("params/"):
            assert jnp.dtype(dtype) == (jnp.bfloat16 if is_half else jnp.float32)
        if name.startswith("opt_state/"):
            is_narrow = name.endswith("/values")
            narrow = (jnp.int8, jnp.uint8) if is_narrow else (jnp.float32, jnp.int32)
            assert jnp.dtype(dtype) in narrow
    assert any(n.endswith("/values") for n in kinds) == (kind == "moments in 8 bits")
    history = [name for name in kinds if name.startswith("model_state/largest/")]
    assert bool(history) == (kind == "delayed scales")
    assert ("model_state/scale" in kinds) == (kind == "a loss scale")
    assert ("train/loss_scale" in ours) == (kind == "a loss scale")


def test_factored_moments_go_to_another_mesh(cache, tmp_path):
    """The vocabulary of 257 is padded there, and its moments are not."""
    settings = cache | KINDS["factored moments"] | {"train.steps": STEPS}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = command.train(settings | {"run.dir": whole})
    assert done.returncode == 0, done.stderr
    command.copy_as_of(5, whole, resumed)
    mesh = {"runtime.cpu_devices": 4, "mesh.fsdp": 2, "mesh.tensor": 2}
    done = command.train(settings | mesh | {"run.dir": resumed})
    assert done.returncode == 0, done.stderr
    ours, theirs = command.history(resumed), command.history(whole)
    for (step, loss, *_), (same, expected, *_) in zip(ours, theirs, strict=True):
        assert (step, loss) == (same, pytest.approx(expected, abs=OTHER_MESH))


def test_moments_of_either_width_go_on_as_the_other(cache, tmp_path):
    """On another mesh too; without consent it is a change that is refused."""
    widths = [{"optimizer.moments": kind} for kind in ("float32", "8bit")]
    settings = cache | {"optimizer.name": "adamw", "train.steps": STEPS}
    for here, there in (widths, widths[::-1]):
        whole = tmp_path / f"of_{here['optimizer.moments']}"
        done = command.train(settings | here | {"run.dir": whole})
        assert done.returncode == 0, done.stderr
        resumed = tmp_path / f"from_{here['optimizer.moments']}"
        command.copy_as_of(5, whole, resumed)
        mesh = {"runtime.cpu_devices": 4, "mesh.fsdp": 2, "mesh.tensor": 2}
        changed = settings | there | mesh | {"run.dir": resumed}
        refused = command.train(changed)
        assert refused.returncode == 2
        assert "optimizer.moments" in refused.stderr
        done = command.train(changed | {"run.accept_changes": "true"})
        assert done.returncode == 0, done.stderr
        assert command.events(resumed, "start")[-1]["step"] == 5
        ours, theirs = command.history(resumed), command.history(whole)
        for (step, loss, *_), (same, expected, *_) in zip(ours, theirs, strict=True):
            assert (step, loss) == (same, pytest.approx(expected, abs=OTHER_WIDTH))
