import json

import pytest

from jaxinfra.config import DataError
from jaxinfra.data import sources


def read(path, **options):
    return list(sources.read_documents([path], **options))


def test_a_text_file_is_one_document_with_its_bytes_unchanged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\u00e9".encode())
    assert read(path) == ["one\r\ntwo\n\u00e9"]


def test_a_separator_cuts_a_text_file_and_empty_pieces_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<end>two<end><end>")
    assert read(path, document_separator="<end>") == ["one", "two"]


def test_a_jsonl_file_gives_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": ""}\n{"text": "x"}')
    assert read(path) == ["one\ntwo", "x"]
    path.write_text(json.dumps({"body": "y"}))
    assert read(path, text_key="body") == ["y"]


def test_folders_and_globs_give_their_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl", "notes.md"):
        (tmp_path / name).write_text("x")
    names = [p.name for p in sources.find_files([tmp_path])]
    assert names == ["a.txt", "b.txt", "c.jsonl"]
    names = [p.name for p in sources.find_files([tmp_path / "*.txt"])]
    assert names == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", r"a.txt is not UTF-8 at byte 2 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n\xff', "a.jsonl is not UTF-8 at byte 14"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b'{"text": "a"}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}', r"a.jsonl:1 has no text .* only \['txt'\]"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1 has no text under the key 'text'"),
        ("a.jsonl", b"[]", "a.jsonl:1 has no text .* only list"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl:1 holds half a surrogate"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_files_that_cannot_be_read_and_empty_separators_are_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(DataError, match="document_separator is empty"):
        read(tmp_path / "none.txt", document_separator="")


def test_sources_that_name_nothing_or_another_kind_or_twice_are_errors(tmp_path):
    text, image = tmp_path / "a.txt", tmp_path / "a.png"
    text.write_text("x")
    image.write_text("x")
    for bad in (tmp_path / "none.txt", tmp_path / "*.csv"):
        with pytest.raises(DataError, match="names no file"):
            sources.find_files([bad])
    with pytest.raises(DataError, match=r"a.png is no file of texts"):
        sources.find_files([image])
    with pytest.raises(DataError, match="named twice"):
        sources.find_files([text, tmp_path])
