"""Files of texts that are neither plain text nor JSON lines, and compressed ones.

Parquet, the Arrow files of a Hugging Face data set on disk, CSV and TSV; .gz and .zst
of text and JSON lines. Whatever is wrong with the bytes is an error that names the
file. Parquet, Arrow and .zst need the extra `data`.
"""

import csv
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from jaxinfra.config import DataError

_ROWS = 1_000  # read at a time
_MAX_FIELD = 2**31 - 1  # characters of a CSV field; the module's own limit is 131,072


def open_file(file: pathlib.Path) -> BinaryIO:
    """The bytes of a file, without their compression.

    Raises DataError without the extra data; what is damaged is an OSError when it is
    read.
    """
    match file.suffix:
        case ".gz":
            return io.BufferedReader(_Checked(gzip.open(file, "rb")))
        case ".zst":
            zstandard = _library("zstandard", file)
            opened = zstandard.open(file, "rb")
            return io.BufferedReader(_Checked(opened, zstandard.ZstdError))
    return file.open("rb")


def table_texts(file: pathlib.Path, *, text_key: str) -> Iterator[str]:
    """The texts of column `text_key`, row by row; a null is an empty text.

    Raises DataError, naming file and row, for a table without such a column, values
    that are no texts, and damaged files.
    """
    for number, value in enumerate(TABLES[file.suffix](file, text_key), start=1):
        if not isinstance(value, str | None):
            raise DataError(
                f"{file} row {number} has a {type(value).__name__} under {text_key!r}; "
                "give a column of texts by text_key"
            )
        yield value or ""


def _csv_values(file: pathlib.Path, text_key: str) -> Iterator[Any]:
    csv.field_size_limit(_MAX_FIELD)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    # Null bytes and open quotes end a table; errors of the encoding name no row.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
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


def _parquet_values(file: pathlib.Path, text_key: str) -> Iterator[Any]:
    pyarrow, parquet = _library("pyarrow", file), _library("pyarrow.parquet", file)
    try:
        with parquet.ParquetFile(file) as table:
            _column(file, table.schema_arrow.names, text_key)
            for batch in table.iter_batches(_ROWS, columns=[text_key]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise _damaged(file, error) from error


def _arrow_values(file: pathlib.Path, text_key: str) -> Iterator[Any]:
    pyarrow, ipc = _library("pyarrow", file), _library("pyarrow.ipc", file)
    try:
        with pyarrow.memory_map(str(file)) as data, ipc.open_stream(data) as batches:
            column = _column(file, batches.schema.names, text_key)
            for batch in batches:
                yield from batch.column(column).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise _damaged(file, error) from error


TABLES: dict[str, Callable[[pathlib.Path, str], Iterator[Any]]] = {
    ".parquet": _parquet_values,
    ".arrow": _arrow_values,
    ".csv": _csv_values,
    ".tsv": _csv_values,
}


def _column(file: pathlib.Path, names: list[str], text_key: str) -> int:
    if names.count(text_key) != 1:
        raise DataError(
            f"{file} has the columns {names}, and not one {text_key!r}; name another "
            "by text_key"
        )
    return names.index(text_key)


def _library(name: str, file: pathlib.Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{file} needs the extra data: pip install 'jaxinfra[data]'"
        ) from error


def _damaged(file: pathlib.Path, error: Exception) -> DataError:
    return DataError(
        f"{file} is damaged or of another format ({error}); download it again"
    )


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
