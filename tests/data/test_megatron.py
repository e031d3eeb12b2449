import json
import struct

import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import megatron, prepare, shards, tokenizer_training
from jaxinfra.data.tokenizer import ByteTokenizer

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
OPTIONS = {"tokenizer": ByteTokenizer(), "held_out": 0.2, "seed": 0}
TEXTS = [f"document {i}: {'x' * (i * 7 % 23)}\u00e9" for i in range(40)]


def write(path, documents, *, dtype="uint16", modes=False):
    """A data set as the format's definition has it; a document is a list of sequences
    of ids."""
    sequences = [s for document in documents for s in document]
    data = [np.array(s, dtype).tobytes() for s in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(data))
    pointers, ends = [0], [0]
    for piece in data:
        pointers.append(pointers[-1] + len(piece))
    for document in documents:
        ends.append(ends[-1] + len(document))
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(ends)))
        file.write(np.array([len(s) for s in sequences], np.int32).tobytes())
        file.write(np.array(pointers[:-1], np.int64).tobytes())
        file.write(np.array(ends, np.int64).tobytes())
        if modes:
            file.write(np.zeros(len(sequences), np.int8).tobytes())
    return path.with_suffix(".bin")


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_documents_are_read_as_they_were_written(tmp_path, dtype, modes):
    documents = [[[1, 2, 3], [4]], [[5, 6]], [], [[], [7]]]
    write(tmp_path / "a", documents, dtype=dtype, modes=modes)
    for suffix in megatron.SUFFIXES:
        found = megatron.open_indexed(tmp_path / f"a{suffix}")
        assert found.ids.dtype == dtype
        assert [found[i].tolist() for i in range(len(found))] == [
            [1, 2, 3, 4], [5, 6], [], [7]
        ]  # fmt: skip


@pytest.mark.parametrize("eod", ["with", "without", "mixed"])
@pytest.mark.parametrize("kind", ["byte", "bpe", "bpe with BOS"])
def test_ids_give_the_data_set_that_their_texts_give(tmp_path, eod, kind):
    tokenizer = ByteTokenizer()
    if kind != "byte":
        pytest.importorskip("tokenizers")
        tokenizer = tokenizer_training.train_bpe(TEXTS, vocab_size=300)
    if kind == "bpe with BOS":
        fields = tokenizer.to_json() | {"bos_id": tokenizer.eod_id}
        tokenizer = prepare.tokenizers.from_json(fields)
    documents = []
    for number, ids in enumerate(tokenizer.encode_batch(TEXTS)):
        has_eod = eod == "with" or (eod == "mixed" and number % 2)
        ids = [*ids.tolist(), *([tokenizer.eod_id] if has_eod else [])]
        documents.append([ids[:5], ids[5:]])
    documents.insert(3, [])
    documents.insert(9, [[tokenizer.eod_id]])
    file = write(tmp_path / "a", documents)
    options = OPTIONS | {"tokenizer": tokenizer, "shard_tokens": 100}
    ours = megatron.prepare_megatron(file, tmp_path / "ids", **options)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    texts = prepare.prepare([lines], tmp_path / "text", split="documents", **options)
    assert ours.digest == texts.digest
    assert len(ours.split("train").shards) > 1
    assert shards.verify_dataset(ours) == []


def changed(file, place, data):
    whole = bytearray(file.read_bytes())
    whole[place : place + len(data)] = data
    file.write_bytes(whole)


SIZES = 34  # bytes of the header; three sizes, three pointers, three ends follow


@pytest.mark.parametrize(
    ("place", "data", "message"),
    [
        (0, b"X", r"begins with b'XMIDIDX\\x00\\x00', version 1"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", r"its ids are of type 7, none of \[1, 2, 3, 4, 5, 8\]"),
        (17, b"\x09", "its ids are of type 9"),
        (17, b"\x04", "sequence 1 begins at byte 6, and not at 12"),
        (18, b"\x04", "it has 94 bytes, and 106 by the counts"),
        (26, b"\xff" * 8, "by the counts in its header"),
        (SIZES, b"\xff" * 4, "sequence 0 has a negative length"),
        (SIZES + 8, b"\x02", r"a.bin has 10 bytes, and 12 by its index a.idx"),
        (SIZES + 20, b"\x64", "sequence 1 begins at byte 100, and not at 6"),
        (SIZES + 12, b"\xff" * 8, "sequence 0 begins at byte -1, and not at 0"),
        (SIZES + 36, b"\x01", "its documents do not end in order at 3"),
        (SIZES + 44, b"\x09", "its documents do not end in order at 3"),
        (SIZES + 52, b"\x02", "its documents do not end in order at 3"),
    ],
)
def test_an_index_that_is_wrong_is_refused_by_name(tmp_path, place, data, message):
    file = write(tmp_path / "a", [[[1, 2, 3], [4]], [[5]]])
    changed(tmp_path / "a.idx", place, data)
    with pytest.raises(DataError, match=r"a\.idx.*" + message + "|" + message):
        megatron.open_indexed(file)


@pytest.mark.parametrize("length", range(94))
def test_an_index_that_is_cut_off_is_refused(tmp_path, length):
    file = write(tmp_path / "a", [[[1, 2, 3], [4]], [[5]]])
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:length])
    with pytest.raises(DataError, match=r"a\.idx is no index"):
        megatron.open_indexed(file)


@pytest.mark.parametrize("data", [b"\x01\x00\x02", b"", bytes(12)])
def test_ids_that_are_cut_off_or_too_many_are_refused(tmp_path, data):
    file = write(tmp_path / "a", [[[1, 2, 3], [4]], [[5]]])
    file.write_bytes(data)
    with pytest.raises(
        DataError, match=rf"a\.bin has {len(data)} bytes, and 10 by its"
    ):
        megatron.open_indexed(file)


@pytest.mark.parametrize("gone", megatron.SUFFIXES)
def test_one_file_without_the_other_is_refused(tmp_path, gone):
    file = write(tmp_path / "a", [[[1]]])
    file.with_suffix(gone).unlink()
    with pytest.raises(DataError, match=rf"a\{gone} cannot be read: .* side by side"):
        megatron.open_indexed(file)


@pytest.mark.parametrize(("bad", "dtype"), [(257, "uint16"), (-1, "int32")])
def test_ids_of_another_tokenizer_are_refused(tmp_path, bad, dtype):
    file = write(tmp_path / "a", [[[1, 2]], [[3, bad]]], dtype=dtype)
    message = rf"a.bin holds the id {bad} at place 3, .* 257 ids: it is the wrong"
    with pytest.raises(DataError, match=message):
        megatron.prepare_megatron(file, tmp_path / "set", **OPTIONS)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("documents", [[], [[]], [[[256]], [[]]]])
def test_a_file_without_text_is_refused(tmp_path, documents):
    file = write(tmp_path / "a", documents)
    with pytest.raises(DataError, match=r"a.bin holds no document with text"):
        megatron.prepare_megatron(file, tmp_path / "set", **OPTIONS)
