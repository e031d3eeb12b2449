"""One run folder in a bucket, one live run: known by its process, or by watching."""

import dataclasses
import functools
import subprocess
import sys
import threading

import pytest

from jaxinfra.remote.ownership import acquire_object
from jaxinfra.resilience import ownership
from jaxinfra.resilience.ownership import Fenced, FolderOwned

HERE = ownership.this_process()
ELSEWHERE = dataclasses.replace(HERE, host="other", boot_id="another")


def test_a_live_owner_here_is_refused_at_once_and_a_released_one_is_not(bucket):
    first = ownership.acquire(bucket)
    first.check()
    with pytest.raises(FolderOwned, match=r"pid \d+ on host .*attempt 1, which lives"):
        ownership.acquire(bucket)
    first.release()
    second = ownership.acquire(bucket)
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(Fenced, match="attempt 1, the folder attempt 2"):
        first.check()
    assert bucket.below() == ["owner.2.json"]
    second.release()


def test_a_dead_owner_here_is_taken_over_at_once(bucket):
    code = "import os; print(os.getpid())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    gone = dataclasses.replace(HERE, pid=int(dead.stdout))
    acquire_object(bucket, me=gone, renew_secs=1e9)
    sleeps = []
    assert acquire_object(bucket, sleep=sleeps.append, renew_secs=1e9).attempt == 2
    assert sleeps == []


def test_an_owner_elsewhere_is_watched_for_a_lease_and_then_taken_over(bucket):
    old = acquire_object(bucket, me=ELSEWHERE, renew_secs=1e9)
    slept = []
    new = acquire_object(bucket, sleep=slept.append, renew_secs=1e9)
    assert sum(slept) == 30
    assert new.attempt == 2
    with pytest.raises(Fenced):
        old.check()
    old.release()  # must not take the new one's record
    new.check()


def test_an_owner_elsewhere_that_renews_is_refused(bucket):
    old = acquire_object(bucket, me=ELSEWHERE, renew_secs=1e9)
    slept = []

    def sleep(secs):
        slept.append(secs)
        if len(slept) == 9:
            old._write(renewed=1)

    with pytest.raises(FolderOwned, match="'other', attempt 1, heard of just now"):
        acquire_object(bucket, sleep=sleep)
    assert len(slept) == 9


def test_of_several_that_take_over_at_once_one_wins(bucket):
    acquire_object(bucket, me=ELSEWHERE, renew_secs=1e9)
    owners, refused = [], []
    take_over = functools.partial(acquire_object, bucket, renew_secs=1e9)

    def take():
        try:
            owners.append(take_over(sleep=lambda secs: None))
        except FolderOwned as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    newest = max(owner.attempt for owner in owners)
    still = []
    for owner in owners:
        try:
            owner.check()
            still.append(owner)
        except Fenced:
            pass
    assert [owner.attempt for owner in still] == [newest]
    assert len(owners) == 1
    assert len(refused) == 5
