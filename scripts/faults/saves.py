"""A disk that fails beneath a save: kills, errors and delays at chosen I/O calls."""

import errno
import math
import os
import pathlib
import shutil
import signal
import statistics
import time
from typing import Any

import numpy as np

from faults import rig as rigs
from faults import shim, table
from faults.rig import SAVE_EVERY, Outcome, Rig
from jaxinfra.checkpoint import checking, commits, lifecycle, restore
from jaxinfra.checkpoint.commits import SaveError

_OF = {row.number: row for row in table.ROWS}
_ARRAYS = {
    "params/embedding": (64, 48),
    "params/layers/query": (3, 16, 24),
    "params/layers/norm": (3, 16),
    "opt/nu": (64, 48),
    "opt/count": (),
    "key": (2,),
}
_METADATA = {"config": {"train": {"steps": 40}}, "data": {"row": 12}}


def values(step: int) -> dict[str, np.ndarray]:
    """A small state, other bits for every step."""
    rng = np.random.default_rng(step)
    return {name: rng.random(shape, np.float32) for name, shape in _ARRAYS.items()}


def save(folder: Any, *steps: int, attempt: int = 1, keep: int = 9) -> int:
    """Saves these steps one after the other; the bytes of the last."""
    import jax

    saves = lifecycle.Checkpointer(folder, keep=keep, run_id="r", attempt=attempt)
    written = 0
    try:
        for step in steps:
            arrays = {name: jax.device_put(x) for name, x in values(step).items()}
            saves.save(step, arrays, metadata=_METADATA)
            written = [report.bytes for report in saves.wait()][-1]
    finally:
        saves.close()
    return written


def loaded(folder: Any) -> dict[str, Any]:
    """What a restore finds: the step, whether each bit is as saved, what it passed
    over."""
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
        for name, shape in _ARRAYS.items()
    }
    found = restore.restore_latest(folder, abstract)
    if found is None:
        return {"step": None, "is_right": True, "rejected": []}
    wanted = values(found.step)
    same = all(
        np.asarray(x).tobytes() == wanted[n].tobytes() for n, x in found.arrays.items()
    )
    return {"step": found.step, "is_right": same, "rejected": list(found.rejected)}


def trial_2(rig: Rig, number: int) -> Outcome:
    """The k-th call of a save is its last; k goes through all calls."""
    out = Outcome()
    with rig.folder() as folder:
        steps = folder / "checkpoints"
        rigs.forked(lambda: bool(save(steps, 10)))

        def count() -> dict[str, int]:
            save(folder / "count", 10)
            shim.arm(folder / "count", shim.COUNT)
            save(folder / "count", 20)
            return {"calls": shim.calls()}

        calls = rigs.forked(count).value["calls"]
        # The table was laid out for as many trials as there are calls, about.
        k = 1 + number * calls // _OF["2"].trials

        def killed() -> None:
            shim.arm(steps, shim.KILL, first=k)
            save(steps, 20)

        code = rigs.forked(killed).code
        while code == 0 and k > calls - 10:
            # The order of threads that make folders changes the calls by a few.
            shutil.rmtree(steps / "20")
            k -= 1
            code = rigs.forked(killed).code
        out.check(code == -signal.SIGKILL, f"call {k} of {calls} did not come: {code}")
        newest = _check_after_kill(out, steps, f"call {k}")
    out.figures = {"calls": calls, "newest": int(newest == 20)}
    return out


def trial_3(rig: Rig, number: int) -> Outcome:
    """Killed at a random moment after save() has returned, on a slow disk."""
    out, chance = Outcome(), rig.random("3", number)
    with rig.folder() as folder:
        steps = folder / "checkpoints"
        began = folder / "began"

        def killed() -> None:
            import jax

            save(steps, 10)
            shim.arm(steps, shim.SLEEP, ops=shim.SYNC, value=10)
            saves = lifecycle.Checkpointer(steps, keep=9, run_id="r", attempt=1)
            arrays = {name: jax.device_put(x) for name, x in values(20).items()}
            saves.save(20, arrays, metadata=_METADATA)
            began.touch()
            saves.close()
            time.sleep(60)

        child = rigs.Child(killed)
        while not began.exists() and child.is_running():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.25))
        child.signal(signal.SIGKILL)
        child.wait()
        newest = _check_after_kill(out, steps, "between snapshot and commit")
    out.figures = {"newest": int(newest == 20)}
    return out


def trial_4(rig: Rig, number: int) -> Outcome:
    """One save of a run fails in the background; or, in every other trial, all do."""
    out, chance = Outcome(), rig.random("4", number)
    is_last = number % 2 == 1
    begin = 4 * SAVE_EVERY
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(begin, folder / "run")
        steps = run_dir / "checkpoints"

        def run() -> int:
            last = shim.FOREVER if is_last else 1
            kind = chance.choice([errno.EIO, errno.ENOSPC])
            ops = chance.choice([shim.WRITE, shim.SYNC, shim.OPEN, shim.RENAME])
            shim.arm(steps, shim.FAIL, ops=ops, first=1, last=last, value=kind)
            words = rig.words(run_dir, train__steps=begin + 3 * SAVE_EVERY)
            return rigs.train(words)

        ended = rigs.forked(run)
        wanted = 15 if is_last else 0
        out.check(
            ended.code == wanted, f"exit {ended.code}, not {wanted}: {ended.text}"
        )
        failed = rigs.events(run_dir, "save_failed")
        out.check(bool(failed), "no save_failed event")
        known = ("Input/output error", "No space left", "os_error_code")
        out.check(
            all(any(k in e["reason"] for k in known) for e in failed), f"{failed}"
        )
        if is_last:
            out.check(rigs.saved_steps(run_dir)[-1] == begin, "a failed save is there")
            ended = rig.run(run_dir, train__steps=begin + 3 * SAVE_EVERY)
            out.check(ended.code == 0, f"did not go on: {ended.text}")
        rigs.compare(out, rig, run_dir)
    out.figures = {"told_after_steps": rigs.forked(_told_after).value["steps"]}
    return out


def _told_after() -> dict[str, int]:
    """Polls after the end of a failing save until it is told: 1 is the next step."""
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        saves = lifecycle.Checkpointer(folder, keep=1, run_id="r", attempt=1)
        shim.arm(folder, shim.FAIL, ops=shim.WRITE, value=errno.EIO)
        saves.save(1, {"x": jax.device_put(np.ones(3))}, metadata=_METADATA)
        while not saves._pending[0].done():
            time.sleep(0.001)
        for polls in range(1, 9):
            try:
                saves.poll()
            except SaveError:
                return {"steps": polls}
    return {"steps": 99}


def trial_5(rig: Rig, number: int) -> Outcome:
    """Ten saves on a slow disk, each array donated, or the memory that it came from
    overwritten, as soon as save() returns."""
    out = Outcome(count=10)

    def run(folder: pathlib.Path) -> list[str]:
        import jax

        steps = folder / "checkpoints"
        saves = lifecycle.Checkpointer(steps, keep=99, run_id="r", attempt=1)
        add = jax.jit(
            lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0
        )
        shim.arm(steps, shim.SLEEP, ops=shim.OPEN, value=2)
        wrong = []
        for turn in range(out.count):
            step = 1 + number * 100 + turn
            host = values(step)
            arrays = {name: jax.device_put(x) for name, x in host.items()}
            saves.save(step, arrays, metadata=_METADATA)
            if turn % 2:
                jax.block_until_ready(add(arrays))
            else:
                for x in host.values():
                    x[...] = -1.0
            saves.wait()
            found = loaded(steps)
            if found["step"] != step or not found["is_right"]:
                wrong.append(f"save {step}: {found}")
        saves.close()
        return wrong

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder))
    out.check(ended.code == 0, ended.text)
    out.failures += ended.value or []
    return out


def trial_10(rig: Rig, number: int) -> Outcome:
    """The disk has room for a part of a save; then it has room again."""
    out, part = Outcome(), (0.1, 0.5, 0.9)[number % 3]
    chance = rig.random("10", number)

    def run(steps: pathlib.Path) -> dict[str, Any]:
        size = save(steps, 10)
        room = int(size * min(0.99, part + chance.uniform(-0.08, 0.08)))
        shim.arm(steps, shim.SPACE, value=room)
        try:
            save(steps, 20)
            told = "nothing"
        except SaveError as error:
            told = str(error)
        acted = shim.acted()
        found = loaded(steps)
        shim.disarm()
        left = sorted(path.name for path in steps.iterdir())
        save(steps, 30)
        return {
            "told": told,
            "acted": acted,
            "then": found,
            "left": left,
            "end": loaded(steps),
        }

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder / "checkpoints"))
    if ended.value is None:
        out.check(False, ended.text)
        return out
    v = ended.value
    out.check(v["acted"] > 0, "the disk was never full")
    is_told = "No space left" in v["told"] or "os_error_code='28'" in v["told"]
    out.check(is_told, f"told: {v['told']}")
    out.check(
        v["then"] == {"step": 10, "is_right": True, "rejected": []}, f"{v['then']}"
    )
    out.check(v["left"] == ["10"], f"its space is not free: {v['left']}")
    out.check(v["end"]["step"] == 30 and v["end"]["is_right"], f"then {v['end']}")
    return out


_KINDS = (
    ("EIO", shim.FAIL, shim.WRITE, errno.EIO),
    ("short write", shim.SHORT, shim.WRITE, 0),
    ("failing fsync", shim.FAIL, shim.SYNC, errno.EIO),
    ("failing close", shim.FAIL, shim.CLOSE, errno.EIO),
    ("failing rename", shim.FAIL, shim.RENAME, errno.EIO),
    ("failing open", shim.FAIL, shim.OPEN, errno.EMFILE),
    ("EDQUOT", shim.FAIL, shim.WRITE, errno.EDQUOT),
)


def trial_11(rig: Rig, number: int) -> Outcome:
    """One call of a save fails, or some from there on; what is told as saved is."""
    out, chance = Outcome(), rig.random("11", number)
    name, action, ops, value = _KINDS[number % len(_KINDS)]
    first, is_once = 1 + math.floor(chance.random() ** 2 * 40), chance.random() < 0.7

    def run(steps: pathlib.Path) -> dict[str, Any]:
        save(steps, 10)
        last = first if is_once else first + 3
        shim.arm(steps, action, ops=ops, first=first, last=last, value=value)
        try:
            save(steps, 20)
            told = ""
        except SaveError as error:
            told = str(error)
        acted = shim.acted()
        shim.disarm()
        bad = [
            problem
            for _, path in commits.step_folders(steps)
            for problem in checking.validate(path)
        ]
        return {"told": told, "acted": acted, "then": loaded(steps), "bad": bad}

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder / "checkpoints"))
    if ended.value is None:
        out.check(False, f"{name}: {ended.text[-800:]}")
        return out
    v, what = ended.value, f"{name} at call {first}"
    # A call that fails after the rename reports a save that is there: no loss.
    allowed = (20,) if not v["told"] else (10, 20)
    out.check(v["then"]["step"] in allowed, f"{what}: told {v['told']!r}, {v['then']}")
    out.check(
        v["then"]["is_right"] and not v["then"]["rejected"], f"{what}: {v['then']}"
    )
    out.check(not v["bad"], f"{what}: {v['bad']}")
    # What could not be synced is not on the disk, whatever reads back from memory.
    is_synced = ops != shim.SYNC or not v["acted"]
    out.check(is_synced or v["told"], f"{what}: told as saved")
    out.figures = {
        "failed": int(bool(v["told"])),
        "survived": int(not v["told"] and v["acted"] > 0),
    }
    return out


def trial_13(rig: Rig, number: int) -> Outcome:
    """The first fsync of the first save takes very long: 3 s in trial 0, then 60."""
    out, secs = Outcome(), 60 if number else 3
    begin = 4 * SAVE_EVERY
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(begin, folder / "run")

        def run() -> int:
            shim.arm(
                run_dir / "checkpoints",
                shim.SLEEP,
                ops=shim.SYNC,
                last=1,
                value=1000 * secs,
            )
            # No second save falls into the long one's time.
            words = rig.words(
                run_dir,
                train__steps=begin + 2400,
                train__save_every=800,
                eval__batches=1,
            )
            return rigs.train(words)

        ended = rigs.forked(run)
        out.check(ended.code == 0, f"exit {ended.code}: {ended.text}")
        saves = rigs.events(run_dir, "save")
        slow = [e for e in saves if e["secs"] >= secs]
        out.check(len(slow) == 1, f"{len(slow)} saves were slow")
        out.check(rigs.saved_steps(run_dir)[-1] == begin + 2400, "the last save")
        found = [x.get("perf/step_secs") for x in rigs.lines(run_dir / "metrics.jsonl")]
        # The first save is at 800 and the next, which has to wait, at 1600.
        during = [x for x in found[805 : 800 + min(780, 60 * secs)] if x]
        before = [x for x in found[begin + 20 : 795] if x]
        ratio = statistics.median(during) / statistics.median(before)
        # In 3 s there are too few steps for a median good to 5%.
        out.check(ratio <= 1.05 or secs < 60, f"a step takes {ratio:.3f} times as long")
    out.figures = {"step_ratio": ratio, "fsync_secs": secs}
    return out


def _check_after_kill(out: Outcome, steps: pathlib.Path, when: str) -> int | None:
    """The newest committed step is whole, its values right, and saves go on."""
    newest = restore.latest(steps)
    out.check(newest in (10, 20), f"{when}: latest is {newest}")
    bad = checking.validate(steps / str(newest))
    out.check(not bad, f"{when}: {bad[:1]}")

    def go_on() -> dict[str, Any]:
        found = loaded(steps)
        save(steps, 30, attempt=2)
        return {
            "found": found,
            "then": loaded(steps),
            "names": sorted(os.listdir(steps)),
        }

    ended = rigs.forked(go_on)
    if ended.value is None:
        out.check(False, f"{when}: {ended.text}")
        return newest
    found, then = ended.value["found"], ended.value["then"]
    out.check(
        found == {"step": newest, "is_right": True, "rejected": []}, f"{when}: {found}"
    )
    out.check(then["step"] == 30 and then["is_right"], f"{when}: then {then}")
    is_clean = all(name.isdigit() for name in ended.value["names"])
    out.check(is_clean, f"{when}: left {ended.value['names']}")
    return newest
