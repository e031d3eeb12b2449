"""Whole runs ended by signals at any moment, and what the same command makes of it."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from faults import rig as rigs
from faults import shim
from faults.rig import SAVE_EVERY, Outcome, Rig
from jaxinfra.checkpoint import checking, restore

_LAST = rigs.STEPS - 8 * SAVE_EVERY  # a chain ends there, well before the quiet run


def trial_1(rig: Rig, number: int) -> Outcome:
    """Ten kills of one run at random moments, then its end."""
    return _chain(rig, "1", number, kills=10, most_steps=2 * SAVE_EVERY)


def trial_23(rig: Rig, number: int) -> Outcome:
    """Kills so soon after one another that most resumes have saved nothing yet: each
    step's batch must still stand once, as its digest says."""
    begin = 8 * SAVE_EVERY
    out = _chain(rig, "23", number, kills=5, most_steps=SAVE_EVERY // 2, begin=begin)
    out.figures = {"resumes": out.figures["resumes_of_one_step"]}
    return out


def trial_15(rig: Rig, number: int) -> Outcome:
    """SIGTERM, and SIGKILL a second later, with a disk that may be slow to sync."""
    out, chance = Outcome(count=5), rig.random("15", number)
    saved_in_time = 0
    with rig.folder() as folder:
        run_dir = folder / "run"
        for _ in range(out.count):
            is_slow = chance.random() < 0.5

            def run(is_slow: bool = is_slow) -> int:
                if is_slow:  # a save takes seconds
                    shim.arm(run_dir, shim.SLEEP, ops=shim.SYNC, value=300)
                return rigs.train(rig.words(run_dir, train__steps=rigs.STEPS))

            child = rigs.Child(run)
            _wait_for_step(child, run_dir, chance.randrange(1, 60))
            child.signal(signal.SIGTERM)
            time.sleep(1.0)
            if child.is_running():
                child.signal(signal.SIGKILL)
            ended = child.wait()
            is_known = ended.code in (10, -signal.SIGKILL)
            out.check(is_known, f"SIGTERM ended it by {ended.code}: {ended.text}")
            saved_in_time += ended.code == 10
            _check_newest(out, run_dir)
        _finish(out, rig, run_dir)
    out.figures = {"saved_in_time": saved_in_time}
    return out


def trial_loop(rig: Rig, number: int) -> Outcome:
    """scripts/train.py itself, started again and again, killed every 20 s, until it
    ends. It is held to a part of the processor by SIGSTOP and SIGCONT, as a quota
    would, so that it is at work for 15 minutes, or as FAULTS_LOOP_MINUTES says."""
    del number
    return _loop(rig, minutes=float(os.environ.get("FAULTS_LOOP_MINUTES", "15")))


def _chain(
    rig: Rig, row: str, number: int, *, kills: int, most_steps: int, begin: int = 0
) -> Outcome:
    out, chance = Outcome(count=kills), rig.random(row, number)
    lost, cut, resumed, starts = [], 0, [], []
    with rig.folder() as folder:
        run_dir = folder / "run"
        if begin:
            rig.copy_as_of(begin, run_dir)
        for _ in range(kills):
            committed = max(rigs.saved_steps(run_dir), default=0)
            if committed > _LAST:
                out.count -= 1  # It was too fast for so many.
                continue
            events = len(rigs.events(run_dir, "start"))
            child = rig.start(run_dir, train__steps=rigs.STEPS)
            _wait_for_a_moment(child, run_dir, chance, most_steps=most_steps)
            child.signal(signal.SIGKILL)
            ended = child.wait()
            out.check(ended.code == -signal.SIGKILL, f"{ended.code}: {ended.text}")
            made = _check_newest(out, run_dir)
            out.check(made >= committed, f"step {committed} was saved, now {made} is")
            done = max(
                (x["step"] for x in rigs.lines(run_dir / "metrics.jsonl")), default=0
            )
            lost.append(max(0, done - made))
            # A save that was begun may be cut; the one before it stood by then.
            out.check(lost[-1] <= 2 * SAVE_EVERY, f"{lost[-1]} steps are lost")
            cut += any(run_dir.glob("checkpoints/*.writing"))
            begun = rigs.events(run_dir, "start")[events:]
            out.check(not begun or begun[0]["step"] == committed, "went on elsewhere")
            starts += [event["step"] for event in begun]
        resumed.append(_finish(out, rig, run_dir))
    repeats = max((starts.count(step) for step in starts), default=0)
    out.figures = {
        "lost_steps": lost,
        # More than an interval: a save was under way when the kill came.
        "lost_over_interval": sum(n > SAVE_EVERY for n in lost),
        "saves_cut": cut,
        "resume_secs": resumed,
        "resumes_of_one_step": repeats,
    }
    return out


def _check_newest(out: Outcome, run_dir: pathlib.Path) -> int:
    """The newest step, every byte of which must be good; 0 where there is none."""
    steps = run_dir / "checkpoints"
    newest = restore.latest(steps) or 0
    out.check(
        newest == max(rigs.saved_steps(run_dir), default=0), "a step is passed over"
    )
    bad = checking.validate(steps / str(newest)) if newest else []
    out.check(not bad, f"step {newest}: {bad[:1]}")
    return newest


def _finish(out: Outcome, rig: Rig, run_dir: pathlib.Path) -> float:
    """Runs on for two more saves and compares; seconds to the first new step."""
    end = max(rigs.saved_steps(run_dir), default=0) + 2 * SAVE_EVERY
    end -= end % SAVE_EVERY  # where the quiet run saved too
    began = time.time()
    ended = rig.run(run_dir, train__steps=end)
    out.check(ended.code == 0, f"the last run ended with {ended.code}: {ended.text}")
    if ended.code == 0:
        rigs.compare(out, rig, run_dir)
        out.check(not list(run_dir.glob("checkpoints/*.writing")), "a cut save is left")
    return rigs.events(run_dir, "compile")[-1]["time"] - began


def _wait_for_a_moment(
    child: rigs.Child, run_dir: pathlib.Path, chance: random.Random, *, most_steps: int
) -> None:
    """Waits for a random one: while the run starts, at a step, or while it saves.

    By what the run has done and not by the clock: the machine may have other work.
    """
    match chance.choices(("start", "step", "save"), (15, 50, 35))[0]:
        case "start":
            time.sleep(chance.uniform(0, 1.5))
        case "step":
            _wait_for_step(child, run_dir, chance.randint(1, most_steps))
            time.sleep(chance.uniform(0, 0.02))
        case "save":
            before = set(run_dir.glob("checkpoints/*.writing"))
            _wait_for_step(child, run_dir, 1)
            until = time.monotonic() + 1.0  # where no save comes, some step
            is_new = lambda: set(run_dir.glob("checkpoints/*.writing")) - before
            while not is_new() and time.monotonic() < until and child.is_running():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))


def _wait_for_step(child: rigs.Child, run_dir: pathlib.Path, more: int) -> None:
    path = run_dir / "metrics.jsonl"
    count = lambda: path.read_bytes().count(b"\n") if path.exists() else 0
    wanted, deadline = count() + more, time.monotonic() + rigs.TIMEOUT_SECS
    while count() < wanted and child.is_running() and time.monotonic() < deadline:
        time.sleep(0.002)


def _loop(rig: Rig, *, minutes: float) -> Outcome:
    """The kills go on where an interrupted one was, since the run folder is kept."""
    out, run_dir = Outcome(count=0), rig.home / "loop"
    run_dir.mkdir(exist_ok=True)
    steps = round(minutes * 60 * _PACE)
    settings: dict[str, Any] = {"train__steps": steps, "checkpoint__keep": 3}
    settings |= {"train__save_every": 50}
    words = rig.words(run_dir / "run", **settings)
    command = [sys.executable, str(rigs.SCRIPTS / "train.py"), *words]
    kept = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    lost = []
    while True:
        began = time.monotonic()
        with open(run_dir / "text.txt", "a") as text:
            process = subprocess.Popen(command, stdout=text, stderr=text, env=kept)
        while process.poll() is None and time.monotonic() - began < 20:
            _hold(process, run_dir / "run", steps_a_sec=_PACE, since=began)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        with open(run_dir / "kills.jsonl", "a") as file:
            saved = max(rigs.saved_steps(run_dir / "run"), default=0)
            done = rigs.lines(run_dir / "run" / "metrics.jsonl")
            lost = max(0, (done[-1]["step"] if done else 0) - saved)
            file.write(json.dumps({"step": saved, "lost": lost}) + "\n")
    kills = rigs.lines(run_dir / "kills.jsonl")
    out.count = len(kills)
    out.check(process.returncode == 0, f"ended with {process.returncode}")
    out.check(
        len(kills) >= 2 * minutes, f"only {len(kills)} kills in {minutes} minutes"
    )
    quiet = rig.made("loop_quiet", lambda folder: rig.run(folder, **settings))
    same = rigs.history(run_dir / "run") == rigs.history(quiet)
    out.check(same, "losses or batches are not the quiet run's")
    here, there = (f / "checkpoints" / str(steps) for f in (run_dir / "run", quiet))
    same = rigs.array_digests(here) == rigs.array_digests(there)
    out.check(same and any(here.iterdir()), "arrays are not the quiet run's")
    lost = [kill["lost"] for kill in kills]
    out.figures = {
        "steps": steps,
        "lost_steps": max(lost, default=0),
        "minutes": len(kills) * 20 / 60,
    }
    if not out.failures:
        shutil.rmtree(run_dir)
    return out


_PACE = 16.0  # steps a second over all, starts included


def _hold(
    process: subprocess.Popen,
    run_dir: pathlib.Path,
    *,
    steps_a_sec: float,
    since: float,
) -> None:
    """A quarter of a second of a run that may not be faster than that: as soon as it
    has made its steps for the moment it stands still."""
    path = run_dir / "metrics.jsonl"
    count = lambda: path.read_bytes().count(b"\n") if path.exists() else 0
    before, until = count(), time.monotonic() + 0.25
    while time.monotonic() < until and process.poll() is None:
        if count() >= before + 0.25 * 1.4 * steps_a_sec:
            process.send_signal(signal.SIGSTOP)
            time.sleep(max(0.0, until - time.monotonic()))
            process.send_signal(signal.SIGCONT)
            return
        time.sleep(0.005)
