import gzip
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.config import DataError
from jaxinfra.data import readers, sources, spans


def write_lines(path, texts, *, end="\n"):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + end)
    return path


def read(plan):
    options = {"text_key": "text", "document_separator": None}
    return [text for part in plan for text in spans.read(part, **options)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("ab\n\u00e9\u2028", max_size=40), min_size=1, max_size=30),
    st.integers(1, 200),
    st.sampled_from(["", "\n", "\n\n \n"]),
)
def test_the_parts_hold_every_document_once_and_in_order(
    tmp_path_factory, texts, part_bytes, end
):
    folder = tmp_path_factory.mktemp("texts")
    files = [write_lines(folder / f"{i}.jsonl", texts, end=end) for i in range(2)]
    (folder / "c.txt").write_text("a text\n" * 9)
    files.insert(1, folder / "c.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PART_BYTES", part_bytes)
        plan = spans.plan(files)
    assert read(plan) == list(sources.read_documents(files))
    assert sum(s.num_bytes for p in plan for s in p) == sum(
        f.stat().st_size for f in files
    )
    sizes = [sum(span.num_bytes for span in part) for part in plan]
    for size, after in itertools.pairwise([*zip(sizes, plan)]):
        assert size[0] >= part_bytes or spans.is_relayed(after[1])


def test_there_are_never_more_parts_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 10)
    monkeypatch.setattr(spans, "MAX_PARTS", 8)
    file = write_lines(tmp_path / "a.jsonl", map(str, range(1_000)))
    plan = spans.plan([file])
    assert 4 <= len(plan) <= 9
    assert read(plan) == [*map(str, range(1_000))]


def test_only_plain_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 10)
    (tmp_path / "a.txt").write_text("text " * 20)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n' * 99)
    plan = spans.plan(sources.find_files([tmp_path]))
    assert [[span.is_whole for span in part] for part in plan] == [[True], [True]]
    assert len(read(plan)) == 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 1}', "a.jsonl:50 has no text under the key 'text'"),
        (b'["text"]', "a.jsonl:50 has no text under the key 'text'"),
        (b'{"text": ', "a.jsonl:50 is not JSON"),
        (b'{"text": "\\ud800"}', "a.jsonl:50 holds half a surrogate pair"),
        (b'{"text": "\xff"}', "a.jsonl is not UTF-8 at byte 794"),
    ],
)
def test_an_error_in_a_cut_file_names_its_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(spans, "PART_BYTES", 100)
    file = write_lines(tmp_path / "a.jsonl", ["abc"] * 49)
    with file.open("ab") as lines:
        lines.write(line + b"\n" + b'{"text": "last"}\n')
    plan = spans.plan([file])
    assert len(plan) > 4
    with pytest.raises(DataError, match=message):
        read(plan)


def test_a_line_that_ends_at_the_cut_is_not_read_twice(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", ["abc"] * 10)
    line = file.stat().st_size // 10
    monkeypatch.setattr(spans, "PART_BYTES", 2 * line)
    assert [part[0].start for part in spans.plan([file])] == [
        *range(0, 10 * line, 2 * line)
    ]


def test_a_line_without_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "PART_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 500)
    file = write_lines(
        tmp_path / "a.jsonl", ["abc"] * 20 + ["long" * 200] + ["abc"] * 9
    )
    plan = spans.plan([file])
    assert len(plan) > 3
    with pytest.raises(DataError, match=r"a.jsonl:21 has more than 500 bytes"):
        read(plan)


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    plan = spans.plan([file])
    write_lines(file, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"a.jsonl has changed while it was read"):
        read(plan)
