"""No damage is silent: flipped, cut, lost, or swapped bytes are found and named."""

import json
import os
import pathlib
import random
import shutil

import pytest
import small_state

from jaxinfra.checkpoint import checking, integrity, restore
from jaxinfra.checkpoint.commits import CheckpointError, IncompatibleCheckpoint

NUM_FLIPS = 150
NUM_FUZZED = 2000


@pytest.fixture
def folder(state, checkpointer, tmp_path):
    """Steps 1 and 2 with different values."""
    small_state.save_now(checkpointer, 1, {**state, "opt/nu": state["opt/nu"] * 0})
    small_state.save_now(checkpointer, 2, state)
    return tmp_path / "checkpoints"


def all_files(step_folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def restored(folder, state):
    return restore.restore_latest(
        folder, small_state.abstract_of(state), logical_shapes=small_state.LOGICAL
    )


def test_no_flipped_bit_is_silent(folder, state):
    rng = random.Random(0)
    files = all_files(folder / "2")
    num_walked_back = 0
    for _ in range(NUM_FLIPS):
        path = rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        assert checking.validate(folder / "2"), f"{path} verified although damaged"
        found = restored(folder, state)
        if found.step == 2:  # zarr.json is for other readers: damage there is harmless.
            assert path.name == "zarr.json"
            small_state.assert_same_bits(found.arrays, small_state.make_values(0))
        else:
            (rejected,) = found.rejected
            assert rejected[0] == 2
            assert path.name in rejected[1]
            num_walked_back += 1
        path.write_bytes(good)
    assert num_walked_back > NUM_FLIPS / 2
    assert restored(folder, state).step == 2


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "longer"])
def test_no_lost_byte_is_silent(damage, folder, state):
    for path in all_files(folder / "2"):
        good = path.read_bytes()
        match damage:
            case "truncated":
                path.write_bytes(good[:-1])
            case "emptied":
                path.write_bytes(b"")
            case "deleted":
                path.unlink()
            case "longer":
                path.write_bytes(good + b"\0")
        assert restored(folder, state).step == 1
        assert restore.latest(folder) == 1
        assert checking.validate(folder / "2")
        path.write_bytes(good)
    assert restored(folder, state).step == 2


def test_a_valid_chunk_or_manifest_of_another_step_is_found(folder, state):
    for name in ("arrays/opt/nu/c/0", "manifest.json"):
        good = (folder / "2" / name).read_bytes()
        shutil.copy(folder / "1" / name, folder / "2" / name)
        assert restored(folder, state).step == 1
        (folder / "2" / name).write_bytes(good)


def signed(values: dict) -> bytes:
    """A manifest as a forger writes it: any values, a right sha256."""
    return integrity.dump({key: values[key] for key in values if key != "sha256"})


def changed(values, path, new):
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if new is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return signed(copy)


NU = ("arrays", "opt/nu")


@pytest.mark.parametrize(
    ("path", "new", "says"),
    [
        (("step",), -1, "step must be"),
        (("step",), True, "step must be"),
        (("attempt",), 1.5, "attempt must be"),
        (("run_id",), 7, "run_id must be"),
        (("config",), [], "config must be an object"),
        (("data",), None, "its fields must be"),
        (("more",), 1, "its fields must be"),
        (NU, [], "its fields"),
        ((*NU, "dtype"), "object", "has dtype 'object'"),
        ((*NU, "dtype"), ["float32"], "has dtype"),
        ((*NU, "shape"), [10**15], "must list"),
        ((*NU, "shape"), [-16], "shape"),
        ((*NU, "chunk_shape"), [0], "shape"),
        ((*NU, "chunk_shape"), [16, 1], "differ in rank"),
        ((*NU, "chunk_shape"), [2**30], "far more than it holds"),
        ((*NU, "chunks"), [], "must list 1 chunks"),
        (
            (*NU, "chunks", 0, "path"),
            "../../../etc/passwd",
            "must be arrays/opt/nu/c/0",
        ),
        ((*NU, "chunks", 0, "path"), "/etc/passwd", "must be arrays/opt/nu/c/0"),
        ((*NU, "chunks", 0, "bytes"), 10**12, "size 1000000000000"),
        ((*NU, "chunks", 0, "xxh3_128"), "0" * 31, "digest"),
        (("arrays", "../../x"), {"dtype": "int8"}, "not plain"),
        (("arrays", "a//b"), {"dtype": "int8"}, "not plain"),
        (("arrays", "/etc"), {"dtype": "int8"}, "not plain"),
        (("arrays", "opt/nu/c"), {"dtype": "int8"}, "inside"),
    ],
)
def test_a_forged_manifest_is_refused_by_rule(path, new, says, folder):
    values = json.loads((folder / "2/manifest.json").read_bytes())
    with pytest.raises(CheckpointError) as error:
        integrity.parse(changed(values, path, new))
    assert says in str(error.value)


@pytest.mark.parametrize("name", [integrity.MANIFEST, "arrays/opt/nu/c/0"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_plain_file_is_not_read(name, kind, folder, tmp_path):
    path = folder / "2" / name
    path.rename(tmp_path / "aside")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "aside")
    [problem] = checking.validate(folder / "2")
    assert "is no plain file" in problem


def test_a_newer_format_is_named_and_not_walked_back_from(folder, state):
    values = json.loads((folder / "2/manifest.json").read_bytes())
    newer = changed(values, ("format_version",), 3)
    (folder / "2/manifest.json").write_bytes(newer)
    with pytest.raises(IncompatibleCheckpoint, match="format_version=3"):
        restored(folder, state)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b'{"a":NaN}',
        b'{"a":1e999}',
        b"1" * 10_000,
        b'{"a":' + b"1" * 10_000 + b"}",
        b"\xff\xfe",
        b'{"sha256":"","sha256":""}',
    ],
    ids=range(12),
)
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(CheckpointError):
        integrity.parse(text)


def test_fuzzed_manifests_are_refused_or_unchanged(folder):
    text = (folder / "2/manifest.json").read_bytes()
    rng = random.Random(1)
    for _ in range(NUM_FUZZED):
        bad = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(bad))
            bad[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        if bytes(bad) == text:
            continue
        with pytest.raises(CheckpointError):
            integrity.parse(bytes(bad))
