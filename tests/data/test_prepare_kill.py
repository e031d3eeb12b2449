"""scripts/prepare.py is killed, whole process group, and started again."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PART_BYTES = 100_000
NUM_KILLS = 6
# The script with smaller parts; its workers start from this file, as a script's do.
DRIVER = f"""
import runpy, sys
if __name__ == "__main__":
    from jaxinfra.data import spans
    spans.PART_BYTES = {PART_BYTES}
    main = runpy.run_path({str(ROOT / "scripts" / "prepare.py")!r})["main"]
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(tmp_path):
    """Of a run with two workers, but for --out; its texts take some seconds."""
    rng = random.Random(0)
    with (tmp_path / "texts.jsonl").open("w") as lines:
        for _ in range(6_000):
            text = " ".join(f"w{rng.randrange(10**6)}" for _ in range(100))
            lines.write(json.dumps({"text": text}) + "\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    clean = ("--clean", "unicode", "space", "gopher_repetition", "--workers", "2")
    return [sys.executable, tmp_path / "driver.py", tmp_path / "texts.jsonl", *clean]


def start(command, out):
    return subprocess.Popen(
        [*map(str, command), "--out", str(out)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finished(work):
    """The parts that are whole: inode and time of each file."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for facts in work.glob("*.facts")
        for file in (facts, facts.with_suffix(".ids"))
    }


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for_parts(process, work, number):
    while process.poll() is None and len(list(work.glob("*.facts"))) < number:
        time.sleep(0.005)


def members(group):
    """The processes of a group that are there yet."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = place.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(place.parent.name)
    return found


def wait_for_the_end_of(group):
    """Of the workers, and of the process by which Python keeps track of them."""
    while members(group):
        time.sleep(0.01)


@pytest.mark.slow
def test_kills_lose_no_finished_part_and_change_no_byte(command, tmp_path):
    quiet = start(command, tmp_path / "quiet")
    assert quiet.communicate()[1] == ""
    expected = bytes_of(tmp_path / "quiet")
    rng = random.Random(1)
    out, work = tmp_path / "set", tmp_path / ".set.parts"
    before = {}
    for _ in range(NUM_KILLS):
        process = start(command, out)
        wait_for_parts(process, work, len(before) // 2 + rng.randint(1, 4))
        time.sleep(rng.random() / 10)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        assert len(list(work.glob(".*.tmp"))) <= 2 * 2  # of this kill alone
        after = finished(work)
        assert before.items() <= after.items()
        before = after
    assert len(before) > 2 * NUM_KILLS
    last = start(command, out)
    told = last.communicate()
    assert last.returncode == 0, told
    assert bytes_of(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["quiet", "set"]


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [True, False])
def test_an_interrupt_ends_it_at_once_and_leaves_no_process(
    command, tmp_path, to_group
):
    out, work = tmp_path / "set", tmp_path / ".set.parts"
    process = start(command, out)
    wait_for_parts(process, work, 2)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130, told
    assert told == "prepare: stopped; the same command goes on\n"
    wait_for_the_end_of(process.pid)
    assert not out.exists()
    assert len(finished(work)) >= 2
    assert start(command, out).wait() == 0


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(command, tmp_path):
    process = start(command, tmp_path / "set")
    wait_for_parts(process, tmp_path / ".set.parts", 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # the pipes are closed when the last of them has ended
    wait_for_the_end_of(process.pid)
