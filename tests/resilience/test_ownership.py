"""One live run a folder: who dies is followed at once, who lives is left alone."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from jaxinfra.resilience import ownership

# Both also run in processes of their own: these must not load jax, nor take long.
HOLD = """
import sys, time
from jaxinfra.resilience import ownership
print(ownership.acquire(sys.argv[1]).attempt, flush=True)
time.sleep(60)
"""
CONTEND = """
import sys, time
from jaxinfra.resilience import ownership
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    print(ownership.acquire(sys.argv[1]).attempt, flush=True)
    time.sleep(1)
except ownership.FolderOwned:
    print("owned", flush=True)
assert "jax" not in sys.modules
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def test_a_live_owner_is_left_alone_and_a_killed_one_followed_at_once(tmp_path):
    owner = start(HOLD, tmp_path)
    assert owner.stdout.readline() == "1\n"
    with pytest.raises(ownership.FolderOwned, match=f"pid {owner.pid} on host"):
        ownership.acquire(tmp_path)
    owner.kill()
    owner.wait()
    started = time.monotonic()
    mine = ownership.acquire(tmp_path)
    assert mine.attempt == 2
    assert time.monotonic() - started < 1
    mine.check()
    mine.release()


def test_of_many_contenders_one_wins(tmp_path):
    at = time.time() + 1.0
    contenders = [start(CONTEND, tmp_path, at) for _ in range(6)]
    answers = sorted(contender.communicate()[0].strip() for contender in contenders)
    assert answers == ["1", *["owned"] * 5]


def test_threads_that_take_over_a_dead_owner_get_one_attempt_each(tmp_path):
    gone = dataclasses.replace(ownership.this_process(), pid=2**22 + 1)
    ownership.acquire(tmp_path, me=gone).release()
    taken, barrier = [], threading.Barrier(8)

    def contend():
        barrier.wait()
        taken.append(ownership.acquire(tmp_path, me=gone).attempt)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8, "a dead identity may be followed, never shared"
    assert [path.name for path in tmp_path.iterdir()] == [f"owner.{max(taken)}.json"]


@pytest.mark.parametrize("other", ["host", "boot_id", "namespace"])
def test_an_owner_elsewhere_keeps_the_folder_for_its_lease(other, tmp_path):
    me = ownership.this_process()
    stranger = dataclasses.replace(me, **{other: "elsewhere"})
    ownership.acquire(tmp_path, me=stranger, renew_secs=1000)
    with pytest.raises(ownership.FolderOwned, match="the folder is free in 30 s"):
        ownership.acquire(tmp_path)
    record = tmp_path / "owner.1.json"
    for age_secs, taken in [(25, False), (31, True)]:
        then = time.time() - age_secs
        os.utime(record, (then, then))
        if taken:
            assert ownership.acquire(tmp_path).attempt == 2
        else:
            with pytest.raises(ownership.FolderOwned, match="heard of 25 s ago"):
                ownership.acquire(tmp_path)


def test_a_lease_is_renewed(tmp_path):
    stranger = dataclasses.replace(ownership.this_process(), host="elsewhere")
    owner = ownership.acquire(tmp_path, me=stranger, renew_secs=0.05)
    os.utime(tmp_path / "owner.1.json", (0, 0))
    time.sleep(0.3)
    with pytest.raises(ownership.FolderOwned):
        ownership.acquire(tmp_path)
    owner.release()
    assert ownership.acquire(tmp_path).attempt == 2


def test_who_was_taken_over_is_fenced(tmp_path):
    stranger = dataclasses.replace(ownership.this_process(), host="elsewhere")
    stalled = ownership.acquire(tmp_path, me=stranger, renew_secs=1000)
    stalled.check()
    os.utime(tmp_path / "owner.1.json", (0, 0))
    successor = ownership.acquire(tmp_path)
    with pytest.raises(ownership.Fenced, match="has attempt 1, the folder attempt 2"):
        stalled.check()
    stalled.release()
    successor.check()


def test_a_pid_that_came_around_again_is_not_the_owner(tmp_path):
    me = ownership.this_process()
    former = dataclasses.replace(me, started=me.started - 5)
    ownership.acquire(tmp_path, me=former)
    assert ownership.acquire(tmp_path).attempt == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": 3}', "[" * 100_000])
def test_a_record_that_cannot_be_read_counts_for_a_lease(text, tmp_path):
    (tmp_path / "owner.7.json").write_text(text)
    with pytest.raises(ownership.FolderOwned):
        ownership.acquire(tmp_path)
    os.utime(tmp_path / "owner.7.json", (0, 0))
    assert ownership.acquire(tmp_path).attempt == 8


def test_it_works_without_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert ownership.acquire(tmp_path).attempt == 1
    record = json.loads((tmp_path / "owner.1.json").read_text())
    assert record["pid"] == os.getpid()
    with pytest.raises(ownership.FolderOwned):
        ownership.acquire(tmp_path)
