"""What killed writers leave is removed by the next one, and only that."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxinfra.data import leftovers, prepare

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = {"tokenizer": "byte", "split": "documents", "held_out": 0.0, "seed": 0}
KILLED = f"""
import os, signal, sys
from jaxinfra.data import prepare
os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare(sys.argv[1:2], sys.argv[2], **{OPTIONS})
"""

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc"
)


def test_the_copy_of_a_killed_writer_is_removed_by_the_next(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    words = [tmp_path / "a.txt", tmp_path / "set"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".set.*.tmp"))) == 1
    prepare.prepare([words[0]], words[1], **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "set"]


def of(path, process):
    """A temporary file of another process, which may be gone by now."""
    started = leftovers._started(process.pid)
    random = leftovers.new_owner().split("-")[-1]
    owner = f"{leftovers._machine()}-{process.pid}-{started}-{random}"
    return leftovers.temporary(path, owner)


def test_only_what_is_of_a_dead_process_and_of_the_name_is_removed(tmp_path):
    path = tmp_path / "set"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead, folder, other = (
        of(path, process),
        of(path, process),
        of(tmp_path / "b", process),
    )
    reborn = leftovers.temporary(
        path, f"{leftovers._machine()}-{os.getpid()}-1-{'0' * 8}"
    )  # the number of a living process, which started at another time
    mine = leftovers.temporary(path, leftovers.new_owner())
    elsewhere = leftovers.temporary(path, f"{'0' * 12}-{process.pid}-1-{'0' * 8}")
    strange = tmp_path / ".set.0123456789abcdef.tmp"
    for file in (dead, other, reborn, mine, elsewhere, strange):
        file.write_text("x")
    (folder / "deep").mkdir(parents=True)
    leftovers.remove_dead(tmp_path, "set")
    assert not reborn.exists()
    assert dead.exists()
    assert folder.exists()
    process.kill()
    while leftovers._started(process.pid) is not None:  # a zombie, not waited for
        time.sleep(0.01)
    leftovers.remove_dead(tmp_path, "set")
    assert set(tmp_path.iterdir()) == {other, mine, elsewhere, strange}
    leftovers.remove_dead(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, strange}
    process.communicate()


def test_where_nothing_is_known_of_processes_nothing_is_removed(tmp_path, monkeypatch):
    left = leftovers.temporary(
        tmp_path / "set", f"{leftovers._machine()}-{2**30}-1-{'0' * 8}"
    )
    left.touch()
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "_knows_processes", lambda: False)
        leftovers.remove_dead(tmp_path)
    assert left.exists()
    leftovers.remove_dead(tmp_path)
    assert not left.exists()
    leftovers.remove_dead(tmp_path / "none")
