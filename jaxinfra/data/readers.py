"""The bytes, lines and rows of files of texts, on disk or by URL.

Parquet, the Arrow files of a Hugging Face data set on disk, CSV and TSV; .gz and .zst
of text and JSON lines. Whatever is wrong with the bytes is an error that names the
file. Parquet, Arrow and .zst need the extra `data`, URLs the extra `remote`.

A line is of `MAX_LINE_BYTES` at most, so that a file without line ends is an error
before it fills the memory.
"""

import contextlib
import csv
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from jaxinfra.config import DataError
from jaxinfra.data.storage import Url

MAX_LINE_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20  # read at a time
_ZSTD_BYTES = 4_096  # compressed, at a time: at most 128 MiB of nothing but one letter
_ROWS = 1_000  # read at a time

File = pathlib.Path | Url


def open_file(file: File) -> BinaryIO:
    """The bytes of a file, without their compression.

    Raises DataError without the extra data; what is damaged is an OSError when it is
    read.
    """
    match file.suffix:
        case ".gz":
            return io.BufferedReader(_Checked(gzip.open(_path_or_stream(file), "rb")))
        case ".zst":
            zstandard = _library("zstandard", file)
            frames = _ZstdFrames(file.open("rb"), zstandard.ZstdDecompressor())
            return io.BufferedReader(_Checked(frames, zstandard.ZstdError))
    return file.open("rb")


def read_lines(file: File) -> Iterator[bytes]:
    """The lines of a file, with their ends. Raises DataError for one that is too long,
    before all of it is read."""
    with open_file(file) as data:
        number = 1
        while line := data.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise _too_long(f"{file}:{number}")
            yield line
            number += 1


def read_pieces(file: File) -> Iterator[bytes]:
    """All bytes of a file of lines, in order. Raises DataError as `read_lines`."""
    number, since_line_end = 1, 0
    with open_file(file) as data:
        while piece := data.read(_PIECE_BYTES):
            number += piece.count(b"\n")
            end = piece.rfind(b"\n")
            since_line_end = len(piece) - end - 1 + (since_line_end if end < 0 else 0)
            if since_line_end > MAX_LINE_BYTES:
                raise _too_long(f"{file}:{number}")
            yield piece


def table_texts(file: File, *, text_key: str) -> Iterator[str]:
    """The texts of column `text_key`, row by row; a null is an empty text.

    Raises DataError, naming file and row, for a table without such a column, values
    that are no texts, and damaged files.
    """
    yield from _texts(file, TABLES[file.suffix](file, text_key), 0, text_key)


def row_group_bytes(file: File) -> list[int]:
    """Of each row group of a Parquet file, as it stands there. Raises DataError."""
    with _open_parquet(file) as table:
        found = map(table.metadata.row_group, range(table.metadata.num_row_groups))
        columns = [[g.column(i) for i in range(g.num_columns)] for g in found]
        return [sum(c.total_compressed_size for c in group) for group in columns]


def group_texts(file: File, groups: tuple[int, int], *, text_key: str) -> Iterator[str]:
    """As `table_texts`, of the row groups [first, stop) of a Parquet file."""
    with _open_parquet(file) as table:
        before = map(table.metadata.row_group, range(groups[0]))
        num_before = sum(group.num_rows for group in before)
        values = _batches(file, table, text_key, range(*groups))
        yield from _texts(file, values, num_before, text_key)


def _texts(
    file: File, values: Iterator[Any], num_before: int, text_key: str
) -> Iterator[str]:
    for number, value in enumerate(values, start=num_before + 1):
        if not isinstance(value, str | None):
            raise DataError(
                f"{file} row {number} has a {type(value).__name__} under {text_key!r}; "
                "give a column of texts by text_key"
            )
        yield value or ""


def _csv_values(file: File, text_key: str) -> Iterator[Any]:
    csv.field_size_limit(MAX_LINE_BYTES)  # its own limit is 131,072
    delimiter = "\t" if file.suffix == ".tsv" else ","
    # Null bytes and open quotes end a table; errors of the encoding name no row.
    with io.TextIOWrapper(file.open("rb"), "utf-8-sig", newline="") as data:
        lines = iter(lambda: data.readline(MAX_LINE_BYTES + 1), "")
        rows = csv.reader(_not_long(file, lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            column = _column(file, header, text_key)
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{file}:{rows.line_num} has {len(row)} fields and the first "
                        f"line {len(header)}; quote fields that hold a delimiter"
                    )
                if row:
                    yield row[column]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}:{rows.line_num + 1} is no table in UTF-8 ({error}); repair it"
            ) from error


def _parquet_values(file: File, text_key: str) -> Iterator[Any]:
    with _open_parquet(file) as table:
        groups = range(table.metadata.num_row_groups)
        yield from _batches(file, table, text_key, groups)


@contextlib.contextmanager
def _open_parquet(file: File) -> Iterator[Any]:
    parquet = _library("pyarrow.parquet", file)
    # A buffer: else all of a column of a row group is read at once.
    options = {"buffer_size": _PIECE_BYTES}
    with (
        _named_damage(file),
        parquet.ParquetFile(_path_or_stream(file), **options) as table,
    ):
        yield table


def _batches(
    file: File, table: Any, text_key: str, groups: Sequence[int]
) -> Iterator[Any]:
    _column(file, table.schema_arrow.names, text_key)
    for batch in table.iter_batches(_ROWS, row_groups=groups, columns=[text_key]):
        yield from _values(batch.column(0))


def _arrow_values(file: File, text_key: str) -> Iterator[Any]:
    pyarrow, ipc = _library("pyarrow", file), _library("pyarrow.ipc", file)
    with (
        _named_damage(file),
        _mapped(pyarrow, file) as data,
        ipc.open_stream(data) as batches,
    ):
        column = _column(file, batches.schema.names, text_key)
        for batch in batches:
            yield from _values(batch.column(column))


def _values(column: Any) -> list[Any]:
    column.validate(full=True)  # else damaged places of texts end the interpreter
    return column.to_pylist()


@contextlib.contextmanager
def _named_damage(file: File) -> Iterator[None]:
    pyarrow = _library("pyarrow", file)
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} is damaged or of another format ({error}); download it again"
        ) from error


TABLES: dict[str, Callable[[File, str], Iterator[Any]]] = {
    ".parquet": _parquet_values,
    ".arrow": _arrow_values,
    ".csv": _csv_values,
    ".tsv": _csv_values,
}


def _path_or_stream(file: File) -> Any:
    return file.open("rb") if isinstance(file, Url) else file


def _mapped(pyarrow: Any, file: File) -> Any:
    if isinstance(file, Url):
        return pyarrow.PythonFile(file.open("rb"), "r")
    return pyarrow.memory_map(str(file))


def _not_long(file: File, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise _too_long(f"{file}:{number}")
        yield line


def _too_long(where: str) -> DataError:
    return DataError(
        f"{where} has more than {MAX_LINE_BYTES} bytes, the most that a line may have; "
        "put line ends between its documents or paragraphs"
    )


def _column(file: File, names: list[str], text_key: str) -> int:
    if names.count(text_key) != 1:
        raise DataError(
            f"{file} has the columns {names}, and not one {text_key!r}; name another "
            "by text_key"
        )
    return names.index(text_key)


def _library(name: str, file: File) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{file} needs the extra data: pip install 'jaxinfra[data]'"
        ) from error


class _ZstdFrames(io.RawIOBase):
    """What zstd frames hold, one after the other.

    The library's own stream takes a file that is cut off for one that ends.
    """

    def __init__(self, compressed: BinaryIO, decompressor: Any):
        self._compressed, self._decompressor = compressed, decompressor
        self._frame: Any = None  # the one that has not ended yet
        self._compressed_rest = self._rest = b""

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._compressed_rest or self._compressed.read(_ZSTD_BYTES)
            if not data and self._frame:
                raise EOFError("it ends within a frame")
            if not data:
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._rest = frame.decompress(data)
            self._compressed_rest = frame.unused_data
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()


class _Checked(io.RawIOBase):
    """A stream whose errors of decompression are OSErrors, as others are."""

    def __init__(self, stream: Any, *errors: type[Exception]):
        self._stream, self._errors = stream, (EOFError, zlib.error, *errors)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except self._errors as error:
            raise OSError(f"damaged or cut off ({error})") from error

    def close(self) -> None:
        self._stream.close()
        super().close()
