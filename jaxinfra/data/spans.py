"""Sources cut into parts of whole documents: what one process reads at a time.

The cut follows from the files alone, whatever the number of processes. A .jsonl file on
disk is cut after line ends, other files and URLs are never cut, and small ones share a
part. Parts grow with the sources, so that there are `MAX_PARTS` at most.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxinfra.config import DataError
from jaxinfra.data import readers, sources, storage
from jaxinfra.data.readers import File

PART_BYTES = 8 * 2**20  # seconds of work: beside it, a process starts quickly
MAX_PARTS = 200  # all of them are open at last, and a process may open 256 files


class Span(NamedTuple):
    """Bytes [start, stop) of a file, the whole file where it is not cut."""

    file: File
    start: int
    stop: int
    state: tuple[int | str, ...]  # of the file: its bytes, and what else names them

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
        for span in _cut(file, state, part_bytes):
            spans.append(span)
            size += span.num_bytes
            if size >= part_bytes:
                parts.append(tuple(spans))
                spans, size = [], 0
    return [*parts, tuple(spans)] if spans else parts


def read(part: Part, *, text_key: str, document_separator: str | None) -> Iterator[str]:
    """The documents of a part, as `sources.read_documents` gives those of its files.

    Raises DataError as that does, and if a file has changed since it was planned.
    """
    for span in part:
        if span.is_whole:
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


def _cut(file: File, state: tuple[int | str, ...], part_bytes: int) -> list[Span]:
    size, ends = state[0], []
    is_local = isinstance(file, pathlib.Path)
    if is_local and file.suffix == ".jsonl" and size > part_bytes:
        try:
            with file.open("rb") as lines:
                for place in range(part_bytes, size, part_bytes):
                    if ends and ends[-1] >= place:
                        continue
                    # From the byte before, with which a line may end.
                    lines.seek(place - 1)
                    lines.readline(
                        readers.MAX_LINE_BYTES + 1
                    )  # longer: told when it is read
                    ends.append(lines.tell())
        except OSError as error:
            raise _unreadable(file, error) from error
    places = sorted({0, size, *ends}) if size else [0, 0]
    return [Span(file, a, b, state) for a, b in itertools.pairwise(places)]


def _lines(span: Span, text_key: str) -> Iterator[str]:
    """The texts of the lines of a span."""
    try:
        with span.file.open("rb") as lines:
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
