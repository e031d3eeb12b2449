"""Several real processes through scripts/train.py: one run, one set of files."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from e2e import command

from jaxinfra.config import LOW_PRECISION

ROOT = pathlib.Path(__file__).parents[2]
LOSS = 1e-5  # float32 sums in another order, carried through 20 updates
EVALUATION = 1e-4  # relative, bfloat16 activations over 128 targets
STEPS = 30  # so many that a signal sent after a few lands before the end
SMALL = {
    "model.width": 64,
    "model.ffn_width": 96,
    "model.repeats": 2,
    "train.length": 48,
    "train.steps": STEPS,
    "train.save_every": 1000,
    "train.log_batch_digest": "true",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": "constant",
    "eval.batches": 1,
    "sample.tokens": 4,
}
MESHES = {
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
STAGES = {"fsdp": 2, "tensor": 2, "pipeline": 2}
TINY = {
    "model.width": 32,
    "model.ffn_width": 64,
    "train.length": 16,
    "train.steps": 4,
    "train.save_every": 2,
    "sample.tokens": 0,
}
# What goes with each other is in one run: a kind's programs take most of its time.
_TRAFFIC = {"comm.gather": "int8", "comm.reduce": "int8", "zero": 3}
_AWARE = {"train.quantize_aware": "int4", "train.quantize_group": 16}
_ADAPTERS = {"lora.rank": 4, "lora.base": "nf4", "lora.group": 16}
_NARROW = {"optimizer.moments": "8bit"}
FEW_BITS = {
    "fp8 by delayed scales": {"precision": "fp8", "quant.scaling": "delayed"} | _NARROW,
    "int8": {"precision": "int8"} | _NARROW,
    "mxfp8": {"precision": "mxfp8"},
    "int4 in the loss, 8-bit traffic": _AWARE | _TRAFFIC,
    "adapters beside nf4, 8-bit traffic": _ADAPTERS | _TRAFFIC,
}


def arguments(run_dir, cache_dir, settings):
    settings = {
        "run.dir": run_dir,
        "data.cache_dir": cache_dir,
        **SMALL,
        **settings,
    }
    words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    return [sys.executable, str(ROOT / "scripts/train.py"), *words]


def quick():
    """Compiling takes longer than the steps here; the flag halves that."""
    return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


class Job:
    """The processes of one job, with their output in files; killed at the end."""

    def __init__(
        self,
        run_dir,
        cache_dir,
        *,
        mesh,
        steps=STEPS,
        processes=2,
        microbatches=1,
        more=None,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "mesh.data": 1,
            **{f"mesh.{axis}": size for axis, size in mesh.items()},
            "train.steps": steps,
            "train.microbatches": microbatches,
            "runtime.cpu_devices": 8 // processes,
            "runtime.coordinator": f"127.0.0.1:{port}",
            "runtime.num_processes": processes,
            **(more or {}),
        }
        self.run_dir = run_dir
        names = [f"{run_dir.name}.{i}.txt" for i in range(processes)]
        self.outs = [run_dir.with_name(name) for name in names]
        self.processes = []
        for i, out in enumerate(self.outs):
            words = arguments(run_dir, cache_dir, settings | {"runtime.process_id": i})
            with open(out, "a") as file:
                self.processes.append(
                    subprocess.Popen(
                        words, stdout=file, stderr=file, cwd=ROOT, env=quick()
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for_steps(self, count):
        deadline = time.monotonic() + 200
        while len(read(self.run_dir, "metrics.jsonl")) < count:
            assert all(p.poll() is None for p in self.processes), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def codes(self, timeout_secs=200):
        deadline = time.monotonic() + timeout_secs
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]

    def text(self):
        return "\n".join(f"-- {out}\n{out.read_text()[-3000:]}" for out in self.outs)


def read(run_dir, name):
    path = run_dir / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def one_process(run_dir, cache_dir, **settings):
    words = arguments(run_dir, cache_dir, settings)
    return subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, timeout=300, env=quick()
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache_dir):
    """The metrics of one process with one device."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = one_process(
        run_dir, cache_dir, **{"train.steps": 20, "runtime.cpu_devices": 1}
    )
    assert done.returncode == 0, done.stderr
    return read(run_dir, "metrics.jsonl")


def check_losses(found, alone):
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    for ours, theirs in zip(found[:20], alone, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=LOSS)
        assert ours["data/digest"] == theirs["data/digest"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp 4 x tensor 2", "data 2 x fsdp 2 x tensor 2"])
def test_a_signal_to_one_stops_both_and_one_process_can_go_on(
    tmp_path, cache_dir, alone, mesh
):
    run_dir = tmp_path / "run"
    with Job(run_dir, cache_dir, mesh=MESHES[mesh]) as job:
        job.wait_for_steps(2)
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.codes() == [10, 10], job.text()
    steps = [line["step"] for line in read(run_dir, "metrics.jsonl")]
    stopped = steps[-1]
    assert steps == list(range(1, stopped + 1))
    assert stopped < STEPS
    assert os.listdir(run_dir / "checkpoints") == [str(stopped)]

    with Job(run_dir, cache_dir, mesh=MESHES[mesh]) as job:
        assert job.codes() == [0, 0], job.text()
    found = read(run_dir, "metrics.jsonl")
    assert len(found) == STEPS
    check_losses(found, alone)
    starts = [e["step"] for e in read(run_dir, "events.jsonl") if e["event"] == "start"]
    assert starts == [0, stopped]  # and each told by one process alone
    assert "step " not in job.outs[1].read_text(), "process 0 alone shows steps"

    more = STEPS + 5
    settings = {"train.steps": more, "runtime.cpu_devices": 1}
    done = one_process(run_dir, cache_dir, **settings)
    assert done.returncode == 0, done.stderr
    assert len(read(run_dir, "metrics.jsonl")) == more
    check_losses(read(run_dir, "metrics.jsonl"), alone)
    assert not (run_dir / "metrics.lost.jsonl").exists()


@pytest.mark.slow
def test_a_pipeline_over_four_processes_trains_to_the_losses_of_one(
    tmp_path, cache_dir, alone
):
    run_dir = tmp_path / "run"
    how = {"processes": 4, "microbatches": 2, "steps": 20}
    with Job(run_dir, cache_dir, mesh=STAGES, **how) as job:
        assert job.codes(timeout_secs=500) == [0] * 4, job.text()
    found = read(run_dir, "metrics.jsonl")
    assert len(found) == 20
    check_losses(found, alone)


@pytest.fixture(scope="module", params=FEW_BITS)
def few_bits(request, tmp_path_factory, cache_dir):
    """Settings of a kind, and its run by one process that has 8 devices."""
    folder = tmp_path_factory.mktemp("few_bits")
    more = TINY | FEW_BITS[request.param]
    if "lora.rank" in more:
        # Of another seed, so that it shows if a run does not begin there.
        begun = TINY | {"train.steps": 1, "run.seed": 1, "runtime.cpu_devices": 1}
        done = one_process(folder / "base", cache_dir, **begun)
        assert done.returncode == 0, done.stderr
        more |= {"init.from": folder / "base"}
    go_on_alone(folder / "run", cache_dir, more)
    return more, folder / "run"


def go_on_alone(run_dir, cache_dir, more):
    settings = more | {f"mesh.{axis}": size for axis, size in STAGES.items()}
    settings |= {"mesh.data": 1, "runtime.cpu_devices": 8, "train.microbatches": 2}
    done = one_process(run_dir, cache_dir, **settings)
    assert done.returncode == 0, done.stderr


def go_on_as_four(run_dir, cache_dir, more):
    how = {"processes": 4, "microbatches": 2, "steps": 4, "more": more}
    with Job(run_dir, cache_dir, mesh=STAGES, **how) as job:
        assert job.codes(timeout_secs=500) == [0] * 4, job.text()


def check_it_went_on(resumed, whole):
    """From step 2, to the figures of `whole` digit by digit and to its last state byte
    by byte."""
    starts = [e["step"] for e in read(resumed, "events.jsonl") if e["event"] == "start"]
    assert starts == [0, 2]
    of_training = re.compile(r"step|(train|quant|eval)/.*|data/digest")
    figures = lambda folder: [
        {name: x for name, x in line.items() if of_training.fullmatch(name)}
        for line in read(folder, "metrics.jsonl")
    ]
    assert len(figures(whole)) == 4
    assert figures(resumed) == figures(whole)
    ours, theirs = (
        command.contents(folder / "checkpoints/4/arrays") for folder in (resumed, whole)
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.slow
def test_few_bits_on_eight_devices_go_on_byte_for_byte(few_bits, tmp_path, cache_dir):
    more, whole = few_bits
    resumed = command.copy_as_of(2, whole, tmp_path / "resumed")
    go_on_alone(resumed, cache_dir, more)
    check_it_went_on(resumed, whole)


@pytest.mark.slow
def test_few_bits_in_four_processes_go_on_byte_for_byte_and_train_as_one_does(
    few_bits, tmp_path, cache_dir
):
    """When they go on, one process finds its programs kept and the others make theirs.

    What differs from one process is the order of sums, of all devices' in the norms
    and of the vocabulary's parts: no more than a last bit, which moved no code.
    """
    more, alone = few_bits
    whole = tmp_path / "whole"
    go_on_as_four(whole, cache_dir, more)
    resumed = command.copy_as_of(2, whole, tmp_path / "resumed")
    go_on_as_four(resumed, cache_dir, more)
    check_it_went_on(resumed, whole)
    found = read(whole, "metrics.jsonl")
    for ours, theirs in zip(found, read(alone, "metrics.jsonl"), strict=True):
        names = ["train/loss", "train/grad_norm", "train/param_norm"]
        names += [name for name in ours if re.fullmatch("quant/.*_scale", name)]
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=LOSS), name
        assert ours["data/digest"] == theirs["data/digest"]
        is_low = more.get("precision") in LOW_PRECISION
        assert is_low == (ours.get("quant/input_scale", 0) > 0)
    assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=EVALUATION)
    assert len({line["train/loss"] for line in found}) == 4


@pytest.mark.slow
def test_moments_are_made_narrow_by_the_processes_that_share_them(tmp_path, cache_dir):
    more = {
        "model.repeats": 1,
        "model.width": 32,
        "model.ffn_width": 64,
        "train.length": 16,
        "sample.tokens": 0,
        "eval.every": 0,
        "runtime.cpu_devices": 1,
        "run.accept_changes": "true",
    }
    run_dir = tmp_path / "run"
    for turn, kind in enumerate(("float32", "8bit"), 1):
        how = {"steps": 2 * turn, "more": more | {"optimizer.moments": kind}}
        with Job(run_dir, cache_dir, mesh={"fsdp": 2}, **how) as job:
            assert job.codes() == [0, 0], job.text()
    starts = [e["step"] for e in read(run_dir, "events.jsonl") if e["event"] == "start"]
    assert starts == [0, 2]
    losses = [line["train/loss"] for line in read(run_dir, "metrics.jsonl")]
    assert len(losses) == 4
    # Moments that had lost their scale would throw it off by far more within a step.
    assert max(losses) - min(losses) < 0.5


@pytest.mark.parametrize(
    ("killed", "codes"),
    [
        pytest.param(1, (14,), marks=pytest.mark.slow),
        # Process 0 is the coordinator: jax's own client may end the other by SIGABRT.
        pytest.param(0, (14, -6), marks=pytest.mark.slow),
    ],
)
def test_a_killed_peer_ends_the_other_soon(tmp_path, cache_dir, killed, codes):
    run_dir = tmp_path / "run"
    mesh = MESHES["fsdp 4 x tensor 2"]
    with Job(run_dir, cache_dir, mesh=mesh, steps=100_000) as job:
        job.wait_for_steps(3)
        job.processes[killed].kill()
        started_secs = time.monotonic()
        code = job.processes[1 - killed].wait(60)
        took_secs = time.monotonic() - started_secs
    assert code in codes, job.text()
    assert took_secs < 25  # 15 of silence, where the other waits within a collective
