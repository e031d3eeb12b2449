import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from data import fuzzing

from jaxinfra.config import DataError
from jaxinfra.data import folders, shards, writer
from jaxinfra.data.batches import make_stream
from jaxinfra.data.tokenizer import ByteTokenizer

LENGTHS = [7, 31, 3, 64, 1, 11]


@pytest.fixture
def folder(make_split):
    return pathlib.Path(make_split(LENGTHS, shard_tokens=40).folder)


def edit_manifest(folder, edit):
    path = folder / shards.MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_anyone_reads_the_folder_with_json_and_numpy(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    train = manifest["splits"]["train"]
    lengths = [
        np.load(folder / s["file"].replace("tokens", "lengths"))
        for s in train["shards"]
    ]
    tokens = [np.load(folder / s["file"]) for s in train["shards"]]
    assert np.concatenate(lengths).tolist() == LENGTHS
    assert [len(t) for t in tokens] == [38, 3, 64, 12]
    assert [len(t) for t in tokens] == [s["tokens"] for s in train["shards"]]
    ends = np.cumsum(LENGTHS) - 1
    assert (np.concatenate(tokens)[ends] == 256).all()


def test_a_shard_is_a_memory_map_of_its_file(folder):
    shard = shards.open_dataset(folder).split("train").shards[0]
    assert isinstance(shard.tokens.base, np.memmap)
    assert not shard.tokens.flags.writeable


def test_the_digest_changes_with_the_content_and_not_with_the_place(
    folder, make_split, tmp_path
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    digest = shards.open_dataset(folder).digest
    assert shards.open_dataset(copy).digest == digest
    assert not make_split(LENGTHS[:-1]).digest.startswith(digest)


def test_every_flipped_byte_of_every_file_is_found_and_its_file_named(folder):
    dataset = shards.open_dataset(folder)
    assert shards.verify_dataset(dataset) == []
    for path in sorted(folder.glob("*.npy")):
        good = path.read_bytes()
        for place in range(0, len(good), 7):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(DataError, match=path.name):
                shards.open_dataset(folder)
        path.write_bytes(good)
    assert shards.verify_dataset(shards.open_dataset(folder)) == []


def test_checksums_may_be_skipped_and_checked_later(folder):
    path = folder / "train-00001.tokens.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    dataset = shards.open_dataset(folder, verify=False)
    bad = shards.verify_dataset(dataset)
    assert any("train-00001.tokens.npy has checksum" in line for line in bad)


def test_large_data_sets_are_not_read_whole_at_open(folder, monkeypatch):
    monkeypatch.setattr(shards, "AUTO_VERIFY_BYTES", 0)
    whole, read = folders.file_xxh3_128, []
    monkeypatch.setattr(
        folders, "file_xxh3_128", lambda path: read.append(path.name) or whole(path)
    )
    shards.open_dataset(folder)
    assert {name.split(".")[1] for name in read} == {"ends", "sums"}
    monkeypatch.setattr(folders, "file_xxh3_128", lambda path: "read")
    with pytest.raises(DataError, match="checksum read"):
        shards.open_dataset(folder, verify=True)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_cut_or_longer_file_is_an_error_even_without_verification(folder, change):
    path = folder / "train-00000.tokens.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(DataError, match=r"train-00000.tokens.npy"):
        shards.open_dataset(folder, verify=False)


def test_pickled_arrays_are_refused(folder):
    path = folder / "train-00000.tokens.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"train-00000.tokens.npy cannot be read"):
        shards.open_dataset(folder, verify=False)


def shard(manifest):
    return manifest["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version 2 is not 3"),
        (lambda m: m.update(extra=1), "exactly the keys"),
        (lambda m: m.pop("dtype"), "exactly the keys"),
        (lambda m: m.update(dtype="uint32"), "dtype is 'uint32'"),
        (lambda m: m.update(tokenizer_digest="0"), "tokenizer_digest is '0'"),
        (lambda m: m.update(tokenizer={"name": "word"}), "is not known"),
        (lambda m: m.update(splits=[]), "splits must be dict"),
        (lambda m: m["splits"]["train"].update(tokens=1), "tokens is 1"),
        (lambda m: m["splits"]["train"].update(documents=True), "must be int"),
        (lambda m: shard(m).pop("checksum"), "exactly the keys"),
        (lambda m: shard(m).update(tokens=37), "tokens is 117, but what it"),
        (lambda m: shard(m).update(documents=1), "documents is 6, but what it"),
        (lambda m: shard(m).update(file="../train-00000.tokens.npy"), "file name"),
        (lambda m: shard(m).update(file="/etc/passwd"), "file name"),
        (lambda m: shard(m).update(file="train-00009.tokens.npy"), "file name"),
        (lambda m: m["splits"]["train"]["shards"].append([]), "exactly the keys"),
        (lambda m: m["splits"]["train"].update(bytes=-1), "bytes must be int, not -1"),
        (lambda m: m["splits"]["train"].update(bytes=2**63), "bytes must be int"),
        (lambda m: m["splits"]["train"].update(most_starts=[0]), "numbers from 1"),
    ],
)
def test_a_manifest_that_is_wrong_in_any_part_is_refused(folder, edit, message):
    edit_manifest(folder, edit)
    with pytest.raises(DataError, match=message):
        shards.open_dataset(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\ud83d"])
def test_a_manifest_that_is_no_object_is_refused(folder, text):
    (folder / shards.MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="prepare"):
        shards.open_dataset(folder)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([8, 38], "has checksum"), ([7, 39], "ends at 39"), ([7, 38, 39], "says int64")],
)
def test_ends_that_are_not_those_of_documents_are_refused(folder, ends, message):
    path = folder / "train-00000.ends.npy"
    np.save(path, np.array(ends))
    if message == "ends at 39":
        checksum = folders.file_xxh3_128(path)
        edit_manifest(folder, lambda m: shard(m).update(ends_checksum=checksum))
    with pytest.raises(DataError, match=f"train-00000.ends.npy.*{message}"):
        shards.open_dataset(folder, verify=False)


def test_lengths_that_are_not_those_of_the_ends_are_found(folder):
    path = folder / "train-00000.lengths.npy"
    np.save(path, np.array([8, 30]))
    checksum = folders.file_xxh3_128(path)
    edit_manifest(folder, lambda m: shard(m).update(lengths_checksum=checksum))
    with pytest.raises(DataError, match=r"train-00000.lengths.npy has other lengths"):
        shards.open_dataset(folder)


def test_an_id_outside_the_vocabulary_is_found(tmp_path):
    content = writer.SplitContent(documents=[np.array([5, 257])], text_bytes=1)
    dataset = writer.write_dataset(
        tmp_path / "set",
        tokenizer=ByteTokenizer(),
        splits={"train": content},
        shard_tokens=10,
    )
    expected = ["train-00000.tokens.npy has ids above 256"]
    assert shards.verify_dataset(dataset) == expected


def test_a_split_that_is_not_there_is_an_error_with_the_fix(folder):
    with pytest.raises(DataError, match=r"no split 'held_out'.*held_out above 0"):
        shards.open_dataset(folder).split("held_out")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="name a folder that prepare wrote"):
        shards.open_dataset(tmp_path / "none")


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/b", "..", "", "x\0y"])
def test_no_name_of_a_split_leads_out_of_the_folder(folder, name):
    opened = []

    def watch(event, args):
        if event == "open" and watching:
            opened.append(str(args[0]))

    watching = False
    sys.addaudithook(watch)  # there is no way to take it off: it only looks

    def rename(manifest):
        train = manifest["splits"].pop("train")
        for number, record in enumerate(train["shards"]):
            record["file"] = f"{name}-{number:05d}.tokens.npy"
        manifest["splits"][name] = train

    edit_manifest(folder, rename)
    watching = True
    with pytest.raises(DataError, match="file name"):
        shards.open_dataset(folder)
    watching = False
    assert opened == [str(folder / shards.MANIFEST)]


def test_damaged_data_sets_never_crash_hang_or_fill_the_memory():
    outcomes = fuzzing.run(400, seed=1)
    assert outcomes["DataError"] > 300


@pytest.mark.slow
def test_many_more_damaged_data_sets():
    fuzzing.run(5_000, seed=2)


def test_verification_names_every_bad_file_though_shards_cannot_be_opened(folder):
    (folder / "train-00000.ends.npy").write_bytes(b"cut")
    (folder / "train-00001.tokens.npy").unlink()
    lazy = folders.LocalFolder(folder)
    lazy.eager_shards = 0
    data = shards.open_dataset(lazy, verify=False)
    found = "\n".join(shards.verify_dataset(data))
    assert "train-00000.ends.npy has checksum" in found
    assert "train-00001.tokens.npy cannot be read" in found


def test_more_rows_than_there_can_be_are_refused(folder):
    data = shards.open_dataset(folder)
    many = np.array([2**62, 2**62], np.int64)
    split = dataclasses.replace(data.split("train"), tokens_S=many)
    with pytest.raises(DataError, match="more rows than"):
        make_stream(split, length=1, batch_size=2, seed=0)


def test_two_tokenizers_are_refused_by_the_library_too(folder):
    split = shards.open_dataset(folder).split("train")
    other = dataclasses.replace(split, tokenizer_digest="other")
    with pytest.raises(DataError, match="have different tokenizers"):
        make_stream({"a": split, "b": other}, length=4, batch_size=2, seed=0)
