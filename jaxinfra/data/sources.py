"""Documents read from text and JSONL files, with errors that name file and place."""

import glob
import json
import pathlib
from collections.abc import Iterator, Sequence

from jaxinfra.config import DataError

ACCEPTED = "a .txt or .jsonl file, a folder of them, or a glob"
_SUFFIXES = (".txt", ".jsonl")


def find_files(sources: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """The files that the sources name, in order; a folder's and a glob's are sorted.

    A folder gives the .txt and .jsonl files directly in it. Raises DataError for a
    source that names nothing, another kind of file, or a file named twice.
    """
    files: list[pathlib.Path] = []
    for source in sources:
        found = _named_by(str(source))
        if not found:
            raise DataError(f"{str(source)!r} names no file; give {ACCEPTED}")
        files.extend(found)
    seen: set[pathlib.Path] = set()
    for file in files:
        if file.suffix not in _SUFFIXES or not file.is_file():
            raise DataError(f"{file} is neither .txt nor .jsonl; give {ACCEPTED}")
        if file.resolve() in seen:
            raise DataError(f"{file} is named twice; name every file once")
        seen.add(file.resolve())
    return files


def read_documents(
    files: Sequence[pathlib.Path],
    *,
    text_key: str = "text",
    document_separator: str | None = None,
) -> Iterator[str]:
    """Every document of the files in order, its text unchanged; empty ones left out.

    A .txt file is one document, or several with `document_separator` between them; a
    .jsonl file holds one object a line with the text under `text_key`. Raises DataError
    for an empty file, text that is not UTF-8 and lines that are not such objects.
    """
    if document_separator == "":
        raise DataError("document_separator is empty; give some text or leave it out")
    for file in files:
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty; remove it from the sources")
            if file.suffix == ".jsonl":
                texts = _jsonl_texts(file, text_key=text_key)
            else:
                texts = _txt_texts(file, document_separator)
            yield from (text for text in texts if text)
        except OSError as error:
            raise _unreadable(file, error) from error


def _named_by(source: str) -> list[pathlib.Path]:
    path = pathlib.Path(source)
    try:
        if path.is_dir():
            return sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if path.exists():
            return [path]
        return sorted(pathlib.Path(p) for p in glob.glob(source))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}; "
        "check the path and its permissions"
    )


def _txt_texts(file: pathlib.Path, separator: str | None) -> list[str]:
    text = _decoded(file, file.read_bytes(), 0)
    return [text] if separator is None else text.split(separator)


def _decoded(file: pathlib.Path, data: bytes, offset: int) -> str:
    """`data`, which starts at byte `offset` of the file, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}); convert it, for example with iconv -t UTF-8"
        ) from error


def _jsonl_texts(file: pathlib.Path, *, text_key: str) -> Iterator[str]:
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decoded(file, line, offset)
            offset += len(line)
            if text.strip():
                yield _json_text(f"{file}:{number}", text, text_key)


def _json_text(where: str, line: str, text_key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); one object a line") from error
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where} has no text under the key {text_key!r}, only {found}; "
            "fix the line or name another key with text_key"
        )
    text = value[text_key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start} of its "
            "text, which UTF-8 has no bytes for; remove it"
        ) from error
    return text
