import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import shards, writer
from jaxinfra.data.tokenizer import ByteTokenizer


def write(folder, *, seed=0):
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, 256, n), 256) for n in (9, 4, 30)]
    content = writer.SplitContent(documents=documents, text_bytes=43)
    return writer.write_dataset(
        folder, tokenizer=ByteTokenizer(), splits={"train": content}, shard_tokens=20
    )


def test_an_equal_folder_is_kept_and_another_one_never_overwritten(tmp_path):
    first = write(tmp_path / "set")
    inode = (tmp_path / "set").stat().st_ino
    assert write(tmp_path / "set").digest == first.digest
    assert (tmp_path / "set").stat().st_ino == inode
    with pytest.raises(DataError, match="holds another data set"):
        write(tmp_path / "set", seed=1)
    assert shards.open_dataset(tmp_path / "set").digest == first.digest
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_the_name_appears_by_one_rename_of_a_complete_folder(tmp_path, monkeypatch):
    renamed, rename = [], os.rename

    def checked(source, target):
        renamed.append((shards.open_dataset(source, verify=True).digest, target.name))
        rename(source, target)

    monkeypatch.setattr(os, "rename", checked)
    assert renamed == [(write(tmp_path / "set").digest, "set")]


def test_a_damaged_equal_folder_is_not_accepted(tmp_path):
    write(tmp_path / "set")
    (tmp_path / "set" / "train-00000.tokens.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000.tokens.npy"):
        write(tmp_path / "set")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="holds no data set"):
        write(tmp_path / "set")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["thesis.tex"]


def test_the_files_have_the_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        write(tmp_path / "set")
    finally:
        os.umask(mask)
    assert (tmp_path / "set").stat().st_mode & 0o777 == 0o755


# 2 shards of 4 files, dataset.json and the folder before the rename; its parent after.
NUM_FSYNCS = 11


@pytest.mark.parametrize("call", range(1, NUM_FSYNCS + 1))
def test_a_full_disk_leaves_a_whole_data_set_or_nothing(tmp_path, monkeypatch, call):
    calls = 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"cannot write .* No space left"):
        write(tmp_path / "set")
    assert calls == call
    monkeypatch.undo()
    names = [p.name for p in tmp_path.iterdir()]
    assert names == (["set"] if call == NUM_FSYNCS else [])
    assert write(tmp_path / "set").split("train").num_documents == 3


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
import test_writer
root = pathlib.Path(sys.argv[1])
fsync = os.fsync
for call in range(1, 12):
    if not os.fork():
        count = 0
        def counted(descriptor):
            global count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)
        os.fsync = counted
        test_writer.write(root / str(call) / "set")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_kill_at_any_fsync_leaves_a_whole_data_set_or_none(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * NUM_FSYNCS
    for call in range(1, NUM_FSYNCS + 1):
        folder = tmp_path / str(call) / "set"
        assert folder.exists() == (call == NUM_FSYNCS)
        assert write(folder).split("train").num_documents == 3


RACER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
import test_writer
sys.stdin.readline()
for number in range(30):
    test_writer.write(pathlib.Path(sys.argv[1]) / str(number))
"""


def test_processes_that_write_the_same_folder_at_once_all_succeed(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path), os.path.dirname(__file__)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    for racer in racers:
        racer.stdin.write(b"\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == list(range(30))
