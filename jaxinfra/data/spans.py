"""Sources cut into parts of whole documents: what one process reads at a time.

The cut follows from the files alone, whatever the number of processes. A .jsonl file is
cut after line ends, a Parquet file between its row groups; small files share a part.
Other files cannot be cut: where one is much of the corpus, its texts are relayed from
one process to the others (`relay`). Parts grow with the sources, so that there are
`MAX_PARTS` at most.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from jaxinfra.config import DataError
from jaxinfra.data import readers, sources, storage
from jaxinfra.data.readers import File

PART_BYTES = 8 * 2**20  # seconds of work: beside it, a process starts quickly
MAX_PARTS = 200  # all of them are open at last, and a process may open 256 files
PLAIN = (".txt", ".jsonl", ".csv", ".tsv", ".arrow")  # about as many bytes as text
_MAX_RELAYED = 8  # files: of more there is work for all processes, one file each
_LINE_BYTES = 2**16  # read of a URL to find the end of a line


class Span(NamedTuple):
    """Bytes [start, stop) of a file, the whole file where it is not cut."""

    file: File
    start: int
    stop: int
    state: tuple[int | str, ...]  # of the file: its bytes, and what else names them
    groups: tuple[int, int] | None = None  # the row groups that the bytes stand for
    relay_chars: int = 0  # text of a part of it, where it is relayed

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == self.state[0]


Part = tuple[Span, ...]


def plan(files: Sequence[File]) -> list[Part]:
    """The parts of the files, in order. Raises DataError for a file that is gone."""
    states = {file: _state(file) for file in files}
    total = sum(state[0] for state in states.values())
    part_bytes = PART_BYTES
    while total > MAX_PARTS * part_bytes:
        part_bytes *= 2  # in powers of two: a little more text moves no cut
    parts, spans, size = [], [], 0
    for file, state in states.items():
        for span in _cut(file, state, part_bytes, total):
            if span.relay_chars:
                parts += [tuple(spans)] if spans else []
                parts.append((span,))
                spans, size = [], 0
                continue
            spans.append(span)
            size += span.num_bytes
            if size >= part_bytes:
                parts.append(tuple(spans))
                spans, size = [], 0
    return [*parts, tuple(spans)] if spans else parts


def is_relayed(part: Part) -> bool:
    """Whether the part is a file to be relayed, which gives several parts."""
    return part[0].relay_chars > 0


def is_small(plan: Sequence[Part]) -> bool:
    """Whether the sources are known to have little text, compressed ones never."""
    if len(plan) > 1 or is_relayed(plan[0]):
        return False
    return all(span.file.suffix in PLAIN and span.num_bytes for span in plan[0])


def read(part: Part, *, text_key: str, document_separator: str | None) -> Iterator[str]:
    """The documents of a part, as `sources.read_documents` gives those of its files.

    Raises DataError as that does, and if a file has changed since it was planned.
    """
    for span in part:
        if span.groups:
            yield from _rows(span, span.groups, text_key)
        elif span.is_whole:
            yield from sources.read_documents(
                [span.file], text_key=text_key, document_separator=document_separator
            )
        else:
            yield from _lines(span, text_key)
        if _state(span.file) != span.state:
            raise DataError(
                f"{span.file} has changed while it was read; start again when it is "
                "whole"
            )


def _state(file: File) -> tuple[int | str, ...]:
    """Size in bytes, place, and what changes when anyone writes to the file."""
    if isinstance(file, storage.Url):
        return storage.state(file.url)
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    place = str(file.resolve())
    return found.st_size, place, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _cut(
    file: File, state: tuple[int | str, ...], part_bytes: int, total: int
) -> list[Span]:
    size, ends = state[0], []
    if size > part_bytes:
        try:
            if file.suffix == ".jsonl" and _has_ranges(file):
                ends = _line_ends(file, size, part_bytes)
            elif file.suffix == ".parquet":
                groups = _groups(file, size, part_bytes)
                if len(groups) > 1:
                    return [Span(file, a, b, state, g) for a, b, g in groups]
        except OSError as error:
            raise _unreadable(file, error) from error
        if not ends and size > total // _MAX_RELAYED:
            return [Span(file, 0, size, state, relay_chars=part_bytes)]
    places = sorted({0, size, *ends}) if size else [0, 0]
    return [Span(file, a, b, state) for a, b in itertools.pairwise(places)]


def _has_ranges(file: File) -> bool:
    """False for a web server that serves whole files only."""
    if isinstance(file, storage.Url):
        try:
            storage.read_bytes(file.url, 0, 1)
        except DataError:
            return False
    return True


def _line_ends(file: File, size: int, part_bytes: int) -> list[int]:
    """Where the lines end that reach over the multiples of `part_bytes`."""
    ends: list[int] = []
    with _bytes_of(file, size, _LINE_BYTES) as lines:
        for place in range(part_bytes, size, part_bytes):
            if ends and ends[-1] >= place:
                continue
            # From the byte before, with which a line may end.
            lines.seek(place - 1)
            lines.readline(readers.MAX_LINE_BYTES + 1)  # longer: told when it is read
            ends.append(lines.tell())
    return ends


def _groups(
    file: File, size: int, part_bytes: int
) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, stop, row groups) of the parts: bytes as if the groups, by their sizes,
    had the file to themselves."""
    sizes = readers.row_group_bytes(file)
    ends = [size * end // max(1, sum(sizes)) for end in itertools.accumulate(sizes)]
    found, start, first = [], 0, 0
    for group, end in enumerate(ends, start=1):
        if end - start >= part_bytes or group == len(ends):
            end = size if group == len(ends) else end
            found.append((start, end, (first, group)))
            start, first = end, group
    return found


def _bytes_of(file: File, stop: int, buffer_bytes: int) -> BinaryIO:
    """The bytes of a file up to `stop`, of a URL read so many at a time."""
    if isinstance(file, storage.Url):
        return storage.open_ranges(file.url, stop, buffer_bytes=buffer_bytes)
    return file.open("rb")


def _rows(span: Span, groups: tuple[int, int], text_key: str) -> Iterator[str]:
    try:
        texts = readers.group_texts(span.file, groups, text_key=text_key)
        yield from (text for text in texts if text)
    except OSError as error:
        raise _unreadable(span.file, error) from error


def _lines(span: Span, text_key: str) -> Iterator[str]:
    """The texts of the lines of a span."""
    try:
        with _bytes_of(span.file, span.stop, storage.STREAM_BYTES) as lines:
            offset = lines.seek(span.start)
            while offset < span.stop and (
                line := lines.readline(readers.MAX_LINE_BYTES + 1)
            ):
                offset += len(line)
                if len(line) > readers.MAX_LINE_BYTES:
                    raise ValueError
                text = _text(line, text_key)
                if text:
                    yield text
    except OSError as error:
        raise _unreadable(span.file, error) from error
    except (ValueError, LookupError, TypeError, RecursionError):
        # Read from its beginning the file gives the same error, with the line's number.
        for _ in sources.read_documents([span.file], text_key=text_key):
            pass
        raise


def _text(line: bytes, text_key: str) -> str:
    whole = line.decode("utf-8")
    if not whole.strip():
        return ""
    text = json.loads(whole)[text_key]
    if not isinstance(text, str):
        raise TypeError
    return sources.checked_text("the line", text)


def _unreadable(file: File, error: OSError) -> DataError:
    return DataError(
        f"{file} cannot be read: {error.strerror or error}; "
        "check the path and its permissions"
    )
