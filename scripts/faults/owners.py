"""Two runs that want one folder: one has it, and who lost it commits nothing."""

import json
import os
import pathlib
import signal
import time
from typing import Any

from faults import rig as rigs
from faults import saves
from faults.rig import SAVE_EVERY, Outcome, Rig
from jaxinfra.checkpoint import lifecycle, restore
from jaxinfra.checkpoint.commits import SaveError
from jaxinfra.resilience import ownership


def trial_37(rig: Rig, number: int) -> Outcome:
    """In turn: a second command beside a live one; four that begin at one moment; a
    writer that was taken over while it slept."""
    return (_second, _race, _fenced, _fenced)[number % 4](rig, number)


def _second(rig: Rig, number: int) -> Outcome:
    out = Outcome()
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(2 * SAVE_EVERY, folder / "run")
        first = rig.start(run_dir, train__steps=4 * SAVE_EVERY)
        path = run_dir / "metrics.jsonl"
        while first.is_running() and len(rigs.lines(path)) < 2 * SAVE_EVERY + 5:
            time.sleep(0.002)
        first.signal(signal.SIGSTOP)
        before = rigs.contents(run_dir)
        second = rig.run(run_dir, train__steps=4 * SAVE_EVERY)
        out.check(rigs.contents(run_dir) == before, "the second changed the folder")
        first.signal(signal.SIGCONT)
        ended = first.wait()
        out.check(second.code == 16, f"the second: {second.code} {second.text}")
        out.check(f"pid {first.pid}" in second.text, f"who has it? {second.text}")
        out.check(ended.code == 0, f"the first: {ended.code} {ended.text}")
        rigs.compare(out, rig, run_dir)
    return out


def _race(rig: Rig, number: int) -> Outcome:
    del number
    out = Outcome()
    with rig.folder() as folder:
        gate = folder / "gate"

        def contend() -> dict[str, Any]:
            while not gate.exists():
                pass
            try:
                held = ownership.acquire(folder / "run")
            except ownership.FolderOwned:
                return {"attempt": 0}
            time.sleep(0.3)  # lives while the others look
            held.check()
            return {"attempt": held.attempt}

        children = [rigs.Child(contend) for _ in range(4)]
        time.sleep(0.05)
        gate.touch()
        ended = [child.wait() for child in children]
        out.check(all(e.value for e in ended), f"{[e.text for e in ended]}")
        won = sum(bool(e.value and e.value["attempt"]) for e in ended)
        out.check(won == 1, f"{won} of 4 have the folder")
    return out


def _fenced(rig: Rig, number: int) -> Outcome:
    """The owner's record says another machine, silent for longer than its lease; it is
    taken over between the begin and the commit of its save."""
    out, chance = Outcome(), rig.random("37", number)
    with rig.folder() as folder:
        run_dir = folder / "run"
        ready, go = folder / "ready", folder / "go"

        def old() -> dict[str, Any]:
            import jax

            held = ownership.acquire(run_dir, renew_secs=1000)
            mine = lifecycle.Checkpointer(
                run_dir / "checkpoints", keep=9, run_id="r", attempt=held.attempt,
                fence=held.check,
            )  # fmt: skip
            arrays = {n: jax.device_put(x) for n, x in saves.values(10).items()}
            mine.save(10, arrays, metadata={"config": {}, "data": {}})
            mine.wait()
            ready.touch()
            while not go.exists():
                time.sleep(0.001)
            try:
                for step in range(11, 15):
                    mine.save(step, arrays, metadata={"config": {}, "data": {}})
                    mine.wait()
            except SaveError as error:
                return {"told": str(error)}
            return {"told": ""}

        child = rigs.Child(old)
        while not ready.exists() and child.is_running():
            time.sleep(0.002)
        record = next(run_dir.glob("owner.*.json"))
        owner = json.loads(record.read_text()) | {"host": "elsewhere"}
        record.write_text(json.dumps(owner))
        os.utime(record, (time.time() - 60,) * 2)
        is_during = chance.random() < 0.5
        if is_during:
            go.touch()
            time.sleep(chance.uniform(0, 0.1))
        attempt = ownership.acquire(run_dir).attempt
        at_take_over = set(rigs.saved_steps(run_dir))
        go.touch()
        ended = child.wait()
        told = (ended.value or {}).get("told", "")
        out.check(attempt == 2, f"the new run has attempt {attempt}")
        is_fenced = "taken over" in told and "attempt 1" in told
        out.check(is_fenced, f"the old run was not told: {ended.value} {ended.text}")
        late = set(rigs.saved_steps(run_dir)) - at_take_over
        # `lifecycle` says of it: a rename that had begun is one commit, and no more.
        out.check(len(late) <= int(is_during), f"it committed {late} afterwards")
        out.check(restore.latest(run_dir / "checkpoints") is not None, "latest")
        code = rigs.forked(
            lambda: saves.save(pathlib.Path(run_dir, "checkpoints"), 20, attempt=2) * 0
        ).code
        out.check(code == 0, "the new run cannot save")
    return out
