"""Every kind of file gives the same texts; damaged ones are refused by name."""

import csv
import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest
import servers

from jaxinfra.config import DataError
from jaxinfra.data import readers, sources

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
from pyarrow import parquet  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ["plain", "two\nlines, and a comma", 'a "quote"', "caf\u00e9 \U0001f469", "\t"]


def write_csv(file, texts, delimiter=","):
    with file.open("w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines, delimiter=delimiter)
        table.writerow(["id", "text"])
        table.writerows(enumerate(texts))


def table_of(texts):
    return pa.table({"id": list(range(len(texts))), "text": texts})


def write_arrow(file, texts):
    write_stream(table_of(texts), file)


def write_stream(table, file):
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as w:
        w.write_table(table, max_chunksize=2)


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


WRITE = {
    "a.jsonl": lambda f, t: f.write_bytes(lines_of(t)),
    "a.jsonl.gz": lambda f, t: f.write_bytes(gzip.compress(lines_of(t))),
    "a.jsonl.zst": lambda f, t: f.write_bytes(zstandard.compress(lines_of(t))),
    "a.csv": write_csv,
    "a.tsv": lambda f, t: write_csv(f, t, "\t"),
    "a.parquet": lambda f, t: parquet.write_table(table_of(t), f, row_group_size=2),
    "a.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITE)
def test_every_kind_gives_the_same_texts(tmp_path, name):
    WRITE[name](tmp_path / name, TEXTS)
    [file] = sources.find_files([tmp_path])
    assert list(sources.read_documents([file])) == TEXTS
    with pytest.raises(DataError, match="'body'"):
        list(sources.read_documents([file], text_key="body"))


def test_compressed_text_is_one_document_or_parted(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one|two"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"three"))
    files = sources.find_files([tmp_path])
    assert list(sources.read_documents(files)) == ["one|two", "three"]
    found = sources.read_documents(files, document_separator="|")
    assert list(found) == ["one", "two", "three"]


@pytest.mark.parametrize("name", [n for n in WRITE if n != "a.jsonl"])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, name):
    file = tmp_path / name
    WRITE[name](file, [f"{text} {i}" for i in range(2000) for text in TEXTS])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3 + 1])
    if name.endswith(("csv", "tsv")):
        file.write_bytes(whole[: whole.index(b'""quote') + 3])  # in open quotes
    with pytest.raises(DataError, match=name):
        list(sources.read_documents([file]))


@pytest.mark.parametrize("num_bytes", [1, 4, 40])
def test_a_zst_file_without_its_last_bytes_is_refused(tmp_path, num_bytes):
    file = tmp_path / "a.txt.zst"
    text = " ".join(map(str, range(9_000)))
    whole = zstandard.compress(text.encode())
    file.write_bytes(whole + whole)
    assert list(sources.read_documents([file])) == [text + text]
    for data in (whole, whole + whole):
        file.write_bytes(data[:-num_bytes])
        with pytest.raises(DataError, match="zst cannot be read: damaged or cut off"):
            list(sources.read_documents([file]))


@pytest.mark.parametrize("name", [n for n in WRITE if n not in ("a.jsonl", "a.csv")])
def test_bytes_of_another_format_are_refused_by_name(tmp_path, name):
    if name == "a.tsv":
        (tmp_path / name).write_bytes(b"text\n\xff\xfe\n")
    else:
        (tmp_path / name).write_bytes(b"no such format at all" * 9)
    with pytest.raises(DataError, match=name):
        list(sources.read_documents([tmp_path / name]))


def test_a_null_is_left_out_and_a_number_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", None, "", "b"]}), file)
    assert list(sources.read_documents([file])) == ["a", "b"]
    parquet.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(DataError, match=r"a\.parquet row 1 has a int under 'text'"):
        list(sources.read_documents([file]))


def test_a_csv_row_of_another_width_is_refused_with_its_line(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,id\na,1\n\nb\n")
    with pytest.raises(DataError, match=r"a\.csv:4 has 1 fields and the first line 2"):
        list(sources.read_documents([file]))
    file.write_text("\ufefftext\n" + "x" * 300_000 + "\n", encoding="utf-8")
    assert [len(text) for text in sources.read_documents([file])] == [300_000]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.txt.zst"
    file.write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a.txt.zst needs the extra data: pip install"):
        readers.open_file(file)


@pytest.mark.parametrize("name", ["a.gz", "a.csv.gz", "a.png", "a"])
def test_other_kinds_are_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"is no file of texts; give a \.txt, \.jsonl"):
        sources.find_files([tmp_path / name])


def binary_texts(texts):
    """The column of texts says that it is UTF-8, and is not."""
    length = pa.array(["x" * len(text) for text in texts]).buffers()
    return pa.StringArray.from_buffers(
        len(texts), length[1], pa.py_buffer(b"".join(texts))
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.parquet", parquet.write_table), ("a.arrow", write_stream)],
)
def test_a_table_with_bytes_that_are_no_text_is_refused_by_name(tmp_path, name, write):
    write(
        pa.table({"text": binary_texts([b"one", b"caf\xe9", b"two"])}), tmp_path / name
    )
    with pytest.raises(DataError, match=rf"{name} is damaged or of another.*UTF-?8"):
        list(sources.read_documents([tmp_path / name]))


def test_places_of_texts_outside_the_file_are_an_error_and_no_crash(tmp_path):
    file = tmp_path / "a.arrow"
    write_arrow(file, ["here", "there"])
    whole = bytearray(file.read_bytes())
    place = whole.index((4).to_bytes(4, "little") + (9).to_bytes(4, "little"))
    whole[place + 7] = 0x3F  # the second text ends a gigabyte later
    file.write_bytes(whole)
    code = "from jaxinfra.data import sources; print(*sources.read_documents([FILE]))"
    code = code.replace("FILE", f"__import__('pathlib').Path({str(file)!r})")
    done = run_python("-c", code)
    assert done.returncode == 1, done
    assert f"DataError: {file} is damaged or of another format" in done.stderr


def run_python(*words):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("count", [400, pytest.param(30_000, marks=pytest.mark.slow)])
def test_damaged_files_give_texts_or_an_error_without_a_crash(count):
    done = run_python("tests/data/reader_fuzzing.py", str(count), "5")
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout).values()) == count


def save_to_disk(folder, names, record=None):
    """A data set as Hugging Face's `save_to_disk` writes it."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        write_arrow(folder / name, [f"text {number}"])
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(record or {"_data_files": files}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_data_set_on_disk_gives_the_files_that_it_lists(tmp_path):
    folder = save_to_disk(tmp_path / "set", ["data-1.arrow", "data-0.arrow"])
    write_arrow(folder / "cache-0123.arrow", ["cached"])
    files = sources.find_files([folder])
    assert list(sources.read_documents(files)) == ["text 0", "text 1"]
    pytest.importorskip("aiohttp")
    with servers.Server(
        files={f"set/{p.name}": p.read_bytes() for p in folder.iterdir()}
    ).running() as web:
        files = sources.find_files([f"{web.url}/set/"])
        assert list(sources.read_documents(files)) == ["text 0", "text 1"]


def test_a_data_set_on_disk_of_several_splits_is_refused_by_their_names(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "set" / split, ["data.arrow"])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError) as told:
        sources.find_files([tmp_path / "set"])
    assert str(told.value) == (
        f"{tmp_path / 'set'} is a data set on disk with the splits train, test; name "
        "the folder of one, such as train"
    )
    [file] = sources.find_files([tmp_path / "set" / "train"])
    assert file.name == "data.arrow"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"_data_files": [{"filename": "../a.arrow"}]},
            r"lists '\.\./a\.arrow', which is",
        ),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "lists 'gone.arrow', which is"),
        ({"_data_files": []}, "is not as save_to_disk writes it"),
        ({"_data_files": 3}, "is not as save_to_disk writes it"),
        ({"_data_files": [{"filename": 3}]}, "is not as save_to_disk writes it"),
        ([1], "is not as save_to_disk writes it"),
    ],
)
def test_a_damaged_list_of_files_is_refused(tmp_path, record, message):
    write_arrow(tmp_path / "a.arrow", ["outside"])
    folder = save_to_disk(tmp_path / "set", ["data.arrow"], record)
    with pytest.raises(DataError, match=message):
        sources.find_files([folder])


def test_a_state_of_something_else_is_no_list(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    assert [file.name for file in sources.find_files([tmp_path])] == ["a.txt"]
