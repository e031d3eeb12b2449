"""The mesh of the next start: another that must not matter, or an impossible one."""

import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

from faults import rig as rigs
from faults.rig import SAVE_EVERY, Outcome, Rig

LOSS = 1e-6  # relative; float32 sums in another order on another mesh
# Of the next segments: devices, and sizes of the axes that are not 1.
_ROADS = [
    ("8 fsdp 8", "4 fsdp 2 tensor 2", "2 data 2", "8 data 8"),
    ("8 data 8", "4 fsdp 4", "2 tensor 2", "8 fsdp 4 tensor 2"),
    ("8 fsdp 4 tensor 2", "4 data 4", "2 fsdp 2", "8 data 2 fsdp 2 tensor 2"),
    ("8 data 4 tensor 2", "4 data 2 tensor 2", "2 fsdp 2", "8 fsdp 8"),
    ("8 data 2 fsdp 4", "4 data 2 fsdp 2", "2 tensor 2", "8 data 8"),
    ("8 data 2 fsdp 2 tensor 2", "4 fsdp 4", "2 data 2", "8 fsdp 4 tensor 2"),
]
_SEGMENT = SAVE_EVERY // 2  # steps on each mesh, so that the sums do not drift apart
_IMPOSSIBLE = [
    ({"mesh.tensor": 3, "runtime.cpu_devices": 8}, "mesh"),
    ({"mesh.fsdp": 16, "runtime.cpu_devices": 8}, "mesh"),
    ({"mesh.data": 3, "runtime.cpu_devices": 8}, "mesh"),
    ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh"),
    ({"mesh.tensor": 0}, "mesh.tensor"),
    ({"mesh.tensor": -2}, "mesh.tensor"),
    ({"mesh.tensor": 4, "runtime.cpu_devices": 4}, "tensor"),
    ({"mesh.fsdp": 8, "runtime.cpu_devices": 8, "train.batch_size": 6}, "batch_size"),
    ({"mesh.data": 8, "runtime.cpu_devices": 8, "train.batch_size": 12}, "batch_size"),
    ({"train.microbatches": 3}, "microbatches"),
    ({"train.microbatches": 16}, "microbatches"),
    ({"train.batch_size": 0}, "batch_size"),
    ({"train.batch_size": -8}, "batch_size"),
    ({"train.length": 0}, "length"),
    ({"zero": 4}, "zero"),
    ({"zero": -2}, "zero"),
    ({"mesh.slices": 3, "runtime.cpu_devices": 8}, "slices"),
    ({"mesh.fsdp": "x"}, "mesh.fsdp"),
    ({"mesh.fsdpp": 2}, "mesh.fsdp"),
    ({"runtime.devices": 6, "mesh.fsdp": 4}, "mesh"),
    ({"mesh.expert": 16, "runtime.cpu_devices": 8}, "mesh"),
    ({"runtime.num_processes": 2}, "coordinator"),
    ({"runtime.coordinator": "a:1", "runtime.process_id": 1}, "process_id"),
    ({"model.num_heads": 3}, "num_heads"),
]  # fmt: skip


def trial_21(rig: Rig, number: int) -> Outcome:
    """A run goes from mesh to mesh; before each segment what is restored on the new
    one is compared, bit by bit, with what stands on disk."""
    out, worst = Outcome(), 0.0
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(2 * SAVE_EVERY, folder / "run")
        end = 2 * SAVE_EVERY
        for axes in _ROADS[number]:
            devices, *words = axes.split()
            sizes = {"mesh__data": "1"}
            sizes |= {f"mesh__{a}": n for a, n in zip(words[::2], words[1::2])}
            steps, step = run_dir / "checkpoints", end
            mesh = {"runtime__cpu_devices": devices, **sizes}
            words = rig.words(run_dir, **mesh)
            same = rigs.forked(lambda s=step, w=words, at=steps: _is_bitwise(w, at, s))
            out.check(same.value == {"same": True}, f"{axes}: {same.value} {same.text}")
            end += _SEGMENT
            ended = rig.run(run_dir, train__steps=end, **mesh)
            out.check(ended.code == 0, f"{axes}: exit {ended.code}: {ended.text}")
        found, wanted = rigs.history(run_dir), rigs.history(rig.quiet)[:end]
        out.check([x[0] for x in found] == [x[0] for x in wanted], "steps")
        out.check(
            [x[-1] for x in found] == [x[-1] for x in wanted], "order of the data"
        )
        pairs = [(a[1], b[1]) for a, b in zip(found, wanted)]
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        out.check(worst <= LOSS, f"a loss differs by {worst:.2g}")
    out.figures = {"loss_relative": worst}
    return out


def _is_bitwise(words: list[str], steps: pathlib.Path, step: int) -> dict[str, Any]:
    """Whether the state restored on the mesh of `words` is the state on one device."""
    import jax

    from jaxinfra import experiment, launcher, options, params, tasks
    from jaxinfra.checkpoint import restore
    from jaxinfra.train import state as states

    config, _ = options.read_command(words)
    launcher.prepare_process(config)
    [data] = tasks.open_sets(config).values()
    built = experiment.build(experiment.resolve(config, data.tokenizer.vocab_size))
    abstract = built.abstract()
    named = dict(params.named(abstract))
    shapes = states.logical_shapes(abstract, built.task.specs, built.layout)
    there = restore.restore(steps, step, named, logical_shapes=shapes).arrays
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    alone = {
        name: jax.ShapeDtypeStruct(shapes[name], x.dtype, sharding=place)
        for name, x in named.items()
    }
    here = restore.restore(steps, step, alone).arrays
    for name, array in here.items():
        window = tuple(map(slice, array.shape))
        if np.asarray(there[name])[window].tobytes() != np.asarray(array).tobytes():
            return {"same": False, "array": name}
    return {"same": len(jax.devices()) > 1}


def trial_22(rig: Rig, number: int) -> Outcome:
    """The command with a mesh or batch that cannot be; it may not load jax."""
    settings, named = _IMPOSSIBLE[number]
    out = Outcome()
    with rig.folder() as folder:
        (folder / "jax.py").write_text("raise SystemExit('jax was loaded')\n")
        run_dir = folder / "run"
        words = rig.words(run_dir) + [f"--{k}={v}" for k, v in settings.items()]
        kept = [w for w in words if w.partition("=")[0][2:] not in settings]
        kept += [f"--{k}={v}" for k, v in settings.items()]
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(rigs.SCRIPTS / "train.py"), *kept],
            env=environment | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=rigs.TIMEOUT_SECS,
        )
        secs = time.monotonic() - began
        text = done.stderr
        out.check(done.returncode == 2, f"exit {done.returncode}: {text}")
        out.check(text.startswith("error: ") and named in text, f"{named}: {text}")
        out.check("Traceback" not in text, text)
        out.check(not run_dir.exists(), "something was written")
        out.check(secs < 2, f"it took {secs:.1f} s")
    out.figures = {"secs": secs}
    return out
