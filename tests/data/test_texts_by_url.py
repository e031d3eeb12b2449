"""Texts by URL are those of the same files on disk; endless lines are refused."""

import io
import itertools
import json

import pytest
import servers
import test_readers

from jaxinfra.config import DataError
from jaxinfra.data import prepare, readers, sources, spans

pytest.importorskip("aiohttp")

OPTIONS = {"tokenizer": "byte", "split": "documents", "held_out": 0.3, "seed": 1}


@pytest.fixture
def folder(tmp_path):
    """Files of every kind, the texts of each different."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, (name, write) in enumerate(test_readers.WRITE.items()):
        write(folder / name, [f"{text} {number}" for text in test_readers.TEXTS * 300])
    (folder / "notes.md").write_text("no text")
    (folder / "z.txt").write_text("one|two")
    return folder


@pytest.fixture
def web(folder):
    files = {f"texts/{p.name}": p.read_bytes() for p in folder.iterdir()}
    with servers.Server(files=files).running() as server:
        yield server


def texts(source, **options):
    return list(sources.read_documents(sources.find_files([source]), **options))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_folder_by_url_gives_the_texts_of_the_folder(folder, web, has_ranges):
    web.has_ranges = has_ranges
    expected = texts(folder, document_separator="|")
    assert len(expected) == 7 * 1_500 + 2
    found = texts(f"{web.url}/texts/", document_separator="|")
    assert found == expected
    if has_ranges:
        found = texts(f"webhdfs://127.0.0.1:{web.port}/texts", document_separator="|")
        assert found == expected


def test_globs_and_signed_urls_name_files(folder, web):
    assert texts(f"{web.url}/texts/*.jsonl*") == texts(folder / "*.jsonl*")
    url = f"{web.url}/texts/a.jsonl.gz?signature=CANARY"
    assert texts(url) == texts(folder / "a.jsonl.gz")
    [file] = sources.find_files([url])
    assert str(file) == f"{web.url}/texts/a.jsonl.gz?..."


def test_texts_come_whole_through_an_unsteady_server(folder, web):
    faults = itertools.cycle([None, 503, None, None, "reset", "cut", None, 500])
    web.fault = lambda request: next(faults)
    for name in test_readers.WRITE:
        assert texts(f"{web.url}/texts/{name}") == texts(folder / name)


def test_a_data_set_by_url_is_equal_to_the_byte(folder, web, tmp_path):
    local = prepare.prepare([folder], tmp_path / "local", **OPTIONS)
    remote = prepare.prepare([f"{web.url}/texts/"], tmp_path / "remote", **OPTIONS)
    assert remote.digest == local.digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("texts/none.txt", "none.txt cannot be read: HTTP 404: there is no such"),
        ("texts/notes.md", "texts/notes.md is no file of texts; give a .txt"),
        ("texts/*.png", "'http.*/texts/.*png' names no file; give"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_url(web, source, message):
    with pytest.raises(DataError, match=message):
        texts(f"{web.url}/{source}")


def test_a_file_named_twice_or_empty_or_damaged_is_an_error(web):
    url = f"{web.url}/texts/z.txt"
    with pytest.raises(DataError, match=r"z\.txt is named twice"):
        sources.find_files([url, f"{web.url}/texts/"])
    web.files["texts/z.txt"] = b""
    with pytest.raises(DataError, match=r"z\.txt is empty"):
        texts(url)
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"):
        whole = web.files[f"texts/{name}"]
        web.files[f"texts/{name}"] = whole[: len(whole) * 2 // 3]
        with pytest.raises(DataError, match=f"http.*/{name} (is damaged|cannot be)"):
            texts(f"{web.url}/texts/{name}")


class Endless(io.RawIOBase):
    """Bytes of one line that does not end; the test fails if much is read."""

    def __init__(self, start):
        self.left, self.start = 20_000_000, start

    def readable(self):
        return True

    def readinto(self, buffer):
        assert self.left > 0, "more was read than a line may have"
        data = (self.start + b"x" * len(buffer))[: len(buffer)]
        self.start = self.start[len(buffer) :]
        self.left -= len(data)
        buffer[:] = data
        return len(buffer)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_line_that_never_ends_is_an_error_before_it_fills_the_memory(
    tmp_path, monkeypatch, suffix
):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 3_000_000)
    start = {".txt": "a\n\n", ".jsonl": '{"text": "a"}\n\n', ".csv": "text\na\n"}
    file = tmp_path / f"long{suffix}"
    file.write_text("x")
    stream = lambda *_: io.BufferedReader(Endless(start[suffix].encode()))
    monkeypatch.setattr(readers, "open_file", stream)
    monkeypatch.setattr(type(file), "open", stream)
    with pytest.raises(DataError) as told:
        list(sources.read_documents([file]))
    assert str(told.value) == (
        f"{file}:3 has more than 3000000 bytes, the most that a line may have; put "
        "line ends between its documents or paragraphs"
    )


def test_a_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_PIECE_BYTES", 7)
    line = json.dumps({"text": "x" * 80})
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", len(line) + 1)
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}")
    assert texts(tmp_path / "a.jsonl") == ["x" * 80] * 2
    text = "\n".join(["y" * (len(line) + 1), "z" * (len(line) + 1)])
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text]
    (tmp_path / "a.txt").write_text(text + "z")
    with pytest.raises(DataError, match=r"a.txt:2 has more than"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_one_file_by_url_gives_several_parts_and_the_same_bytes(
    folder, web, tmp_path, monkeypatch, name, has_ranges
):
    local = prepare.prepare([folder / name], tmp_path / "local", **OPTIONS)
    part_bytes = {"a.jsonl": 2_000, "a.parquet": 40_000, "a.jsonl.gz": 200}
    monkeypatch.setattr(spans, "PART_BYTES", part_bytes[name])
    monkeypatch.setattr(spans, "_LINE_BYTES", 16)
    web.has_ranges = has_ranges
    done, url = [], f"{web.url}/texts/{name}"
    remote = prepare.prepare(
        [url], tmp_path / "remote", tell_done=lambda *d: done.append(d), **OPTIONS
    )
    assert remote.digest == local.digest
    assert len(done) > 4
    plan = spans.plan(sources.find_files([url]))
    is_cut = name == "a.parquet" or (name == "a.jsonl" and has_ranges)
    assert [spans.is_relayed(part) for part in plan] == [not is_cut] * len(plan)
    assert (len(plan) > 4) == is_cut


def test_parts_come_whole_through_an_unsteady_server(folder, web, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 40_000)
    faults = itertools.cycle([None, 503, None, None, "reset", "cut", None, 500])
    web.fault = lambda request: next(faults)
    for name in ("a.jsonl", "a.parquet"):
        plan = spans.plan(sources.find_files([f"{web.url}/texts/{name}"]))
        options = {"text_key": "text", "document_separator": None}
        found = [text for part in plan for text in spans.read(part, **options)]
        assert found == texts(folder / name)
