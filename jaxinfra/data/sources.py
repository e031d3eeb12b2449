"""Documents read from files, on disk or by URL, and which of them are held out.

Errors name file and place.
"""

import glob
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxinfra.config import DataError
from jaxinfra.data import readers, storage, urls
from jaxinfra.data.readers import File

ACCEPTED = (
    "a .txt, .jsonl (also .gz, .zst), .csv, .tsv, .parquet or .arrow file, a folder of "
    "them, or a glob; or a URL of any of these"
)
_LINES = (".txt", ".jsonl")
# Of Hugging Face data sets on disk: what lists the splits, and the files of one.
_SPLITS, _STATE = "dataset_dict.json", "state.json"
_MAX_LIST_BYTES = 64 * 2**20


class Piece(NamedTuple):
    """A document, or the part of one on one side of a `tail` cut."""

    text: str
    is_start: bool = True  # a BOS precedes, where the tokenizer has one
    is_end: bool = True  # an EOD follows: the document ends here


def find_files(sources: Sequence[str | pathlib.Path]) -> list[File]:
    """The files that the sources name, in order; a folder's and a glob's are sorted.

    A folder gives the files of these kinds directly in it; one that Hugging Face's
    `save_to_disk` wrote, the files that it lists, in its order. Raises DataError for a
    source that names nothing, another kind of file, a file named twice, or several
    splits at once.
    """
    files: list[File] = []
    for source in map(str, sources):
        found = _by_url(source) if urls.is_url(source) else _named_by(source)
        if not found:
            raise DataError(f"{urls.redacted(source)!r} names no file; give {ACCEPTED}")
        files.extend(found)
    seen: set[File] = set()
    for file in files:
        is_file = isinstance(file, storage.Url) or file.is_file()
        if not _kind(file) or not is_file:
            raise DataError(f"{file} is no file of texts; give {ACCEPTED}")
        place = file if isinstance(file, storage.Url) else file.resolve()
        if place in seen:
            raise DataError(f"{file} is named twice; name every file once")
        seen.add(place)
    return files


def read_documents(
    files: Sequence[File],
    *,
    text_key: str = "text",
    document_separator: str | None = None,
) -> Iterator[str]:
    """Every document of the files in order, its text unchanged; empty ones left out.

    A .txt file is one document, or several with `document_separator` between them; a
    .jsonl file holds one object a line with the text under `text_key`, a table a column
    of that name. Raises DataError for an empty file, text that is not UTF-8, lines that
    are not such objects, and damaged files.
    """
    if document_separator == "":
        raise DataError("document_separator is empty; give some text or leave it out")
    for file in files:
        try:
            if _num_bytes(file) == 0:
                raise DataError(f"{file} is empty; remove it from the sources")
            match _kind(file):
                case ".jsonl":
                    texts = _jsonl_texts(file, text_key=text_key)
                case ".txt":
                    texts = _txt_texts(file, document_separator)
                case _:
                    texts = readers.table_texts(file, text_key=text_key)
            yield from (text for text in texts if text)
        except OSError as error:
            raise _unreadable(file, error) from error


def read_objects(file: File) -> Iterator[tuple[str, Any]]:
    """("file:line", JSON value) of every line of a .jsonl file that is not blank.

    Raises DataError for a file that cannot be read and lines that are not UTF-8 JSON.
    """
    offset = 0
    try:
        for number, line in enumerate(readers.read_lines(file), start=1):
            text = _decoded(file, line, offset)
            offset += len(line)
            if text.strip():
                yield f"{file}:{number}", _json(f"{file}:{number}", text)
    except OSError as error:
        raise _unreadable(file, error) from error


def checked_text(where: str, text: str) -> str:
    """`text`; raises DataError if UTF-8 cannot write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start} of its "
            "text, which UTF-8 has no bytes for; remove it"
        ) from error
    return text


def split_tail(
    documents: Sequence[Piece], *, held_out: float
) -> tuple[list[Piece], list[Piece]]:
    """(train, held out): cuts the corpus, read as one text, before its last `held_out`
    characters, and one document in two where the cut falls in it."""
    total = sum(len(piece.text) for piece in documents)
    if held_out == 0:
        return list(documents), []
    if total < 2:
        raise DataError(
            f"data.split=tail needs at least 2 characters and has {total}; "
            "give more text, or data.held_out=0"
        )
    left = total - min(max(round(held_out * total), 1), total - 1)
    train, held = [], []
    for text, *_ in documents:
        before, after = text[:left], text[left:]
        if before:
            train.append(Piece(before, is_end=not after))
        if after:
            held.append(Piece(after, is_start=not before))
        left -= len(before)
    return train, held


def _kind(file: File) -> str:
    """The suffix that says how the file is read; empty for one that is not."""
    if file.suffix in (".gz", ".zst"):
        inner = file.with_suffix("").suffix
        return inner if inner in _LINES else ""
    return file.suffix if file.suffix in (*_LINES, *readers.TABLES) else ""


def _num_bytes(file: File) -> int | None:
    if isinstance(file, storage.Url):
        return storage.size(file.url)
    return file.stat().st_size


def _by_url(source: str) -> list[File]:
    files = [storage.Url(url) for url in storage.list_files(source)]
    is_folder = not urls.is_glob(source) and files != [storage.Url(source)]
    return _in_folder(source, files) if is_folder else [*files]


def _named_by(source: str) -> list[File]:
    path = pathlib.Path(source)
    try:
        if path.is_dir():
            return _in_folder(source, sorted(path.iterdir()))
        if path.exists():
            return [path]
        return [*sorted(pathlib.Path(p) for p in glob.glob(source))]
    except OSError as error:
        raise _unreadable(path, error) from error


def _in_folder(folder: str, files: Sequence[File]) -> list[File]:
    """The files of texts among those of a folder."""
    named = {file.name: file for file in files}
    if _SPLITS in named:
        splits = _listed(named[_SPLITS], lambda record: record["splits"])
        raise DataError(
            f"{urls.redacted(folder)} is a data set on disk with the splits "
            f"{', '.join(splits)}; name the folder of one, such as {splits[0]}"
        )
    if _STATE not in named or not any(file.suffix == ".arrow" for file in files):
        return [file for file in files if _kind(file)]
    data_files = lambda record: [one["filename"] for one in record["_data_files"]]
    names = _listed(named[_STATE], data_files)
    if gone := [name for name in names if name not in named]:
        raise DataError(
            f"{named[_STATE]} lists {gone[0]!r}, which is not in the folder; save the "
            "data set again"
        )
    return [named[name] for name in names]


def _listed(file: File, names_of: Callable[[Any], list[str]]) -> list[str]:
    """The names in a JSON file of a data set on disk, one at least."""
    try:
        with file.open("rb") as data:
            names = names_of(json.loads(data.read(_MAX_LIST_BYTES)))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _no_list(file) from error
    if not names or not all(isinstance(name, str) for name in names):
        raise _no_list(file)
    return names


def _no_list(file: File) -> DataError:
    return DataError(
        f"{file} is not as save_to_disk writes it, or damaged; save the data set again"
    )


def _unreadable(path: File, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}; "
        "check the path and its permissions"
    )


def _txt_texts(file: File, separator: str | None) -> Iterator[str]:
    if separator is None:
        yield _decoded(file, b"".join(readers.read_pieces(file)), 0)
        return
    # In bytes: in UTF-8, no character is a part of others.
    mark = separator.encode("utf-8", "surrogatepass")
    rest, offset = bytearray(), 0
    for piece in readers.read_pieces(file):
        searched = max(0, len(rest) - len(mark) + 1)
        rest += piece
        if rest.find(mark, searched) < 0:
            continue
        *documents, rest = rest.split(mark)
        for data in documents:
            yield _decoded(file, data, offset)
            offset += len(data) + len(mark)
    yield _decoded(file, rest, offset)


def _decoded(file: File, data: bytes, offset: int) -> str:
    """`data`, which starts at byte `offset` of the file, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}); convert it, for example with iconv -t UTF-8"
        ) from error


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); one object a line") from error


def _jsonl_texts(file: File, *, text_key: str) -> Iterator[str]:
    for where, value in read_objects(file):
        if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(
                f"{where} has no text under the key {text_key!r}, only {found}; fix "
                "the line, name another key with text_key, or prepare conversations "
                "and pairs with --chat"
            )
        yield checked_text(where, value[text_key])
