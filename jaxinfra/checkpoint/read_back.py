"""A step that was just committed is read back, before an older one is deleted."""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxinfra.checkpoint import checking, commits, integrity
from jaxinfra.checkpoint.integrity import ArrayRecord, FileRecord
from jaxinfra.checkpoint.snapshot import ArrayLayout
from jaxinfra.checkpoint.store import Digests


def read_back(
    folder: Any, digests: Digests, layouts: Mapping[str, ArrayLayout | ArrayRecord]
) -> None:
    """Reads this process's chunks, from the disk where the system can be asked to
    forget them; `digests` are what `store.write_arrays` gave.

    Raises:
      CheckpointError: naming the first that is not as it was written.
    """

    def check(item: tuple[str, str, str]) -> None:
        name, path, digest = item
        layout = layouts[name]
        size = integrity.chunk_file_bytes(layout.chunk_shape, layout.dtype)
        forget(folder / path)
        checking.read(folder, FileRecord(path=path, bytes=size, xxh3_128=digest))

    items = [(name, *item) for name in digests for item in digests[name].items()]
    with concurrent.futures.ThreadPoolExecutor(commits.THREADS) as pool:
        collections.deque(pool.map(check, items), maxlen=0)


def forget(path: Any) -> None:
    """Lets the system drop a file from memory, so that it is read from the disk."""
    if isinstance(path, pathlib.Path) and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
