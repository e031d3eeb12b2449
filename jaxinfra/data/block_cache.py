"""Blocks of bytes kept on disk for all processes of a host, and the latest in memory.

    FOLDER/total                  bytes of all blocks, as text; locked while they change
    FOLDER/blocks/<name>          the bytes of a block, nothing else
    FOLDER/blocks/<name>.tmp      one that is being written, or was when a process died

A name says what the bytes are (`remote_file` makes it of checksums), so that no block
is ever out of date. Bytes from disk are checked at each load: a block that was damaged
or cut off is dropped and fetched again. When a new block does not fit, the blocks that
were read longest ago go, by the time of their files, which each load from disk sets.

Folder and lock are for a local disk. A disk that is full, or that refuses, costs speed
alone: the block is not kept, and a line says so once.
"""

import collections
import contextlib
import errno
import fcntl
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np

from jaxinfra.config import DataError

MEMORY_BYTES = 64 * 2**20
_KEPT = 0.9  # of the limit, when blocks must go: so they seldom must


class BlockCache:
    """At most `max_bytes` on disk, all processes together, and `memory_bytes` in memory
    of this one. All of it may be called by any number of threads.

    Raises DataError if the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        max_bytes: int,
        *,
        memory_bytes: int = MEMORY_BYTES,
        tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self.folder = pathlib.Path(folder)
        self.max_bytes, self.memory_bytes = max_bytes, memory_bytes
        self._blocks = self.folder / "blocks"
        self._tell, self._has_told = tell, False
        self._lock = threading.Lock()  # of what follows
        self._memory: collections.OrderedDict[str, np.ndarray] = (
            collections.OrderedDict()  # the latest last
        )
        self._held_bytes = 0
        self._coming: dict[str, Future[np.ndarray]] = {}
        try:
            self._blocks.mkdir(parents=True, exist_ok=True)
            with self._room(0):  # counts, for there may have been another limit
                pass
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"the cache folder {self.folder} cannot be used: "
                    f"{error.strerror or error}; name another one, on a local disk"
                ) from error
            self._tell_once(error)

    def get(
        self,
        name: str,
        fetch: Callable[[], bytes],
        is_right: Callable[[bytes], bool],
    ) -> np.ndarray:
        """uint8 [N], read-only: the block of that name, fetched if it is nowhere.

        fetch: gives right bytes or raises; called by one thread at a time for a name,
        whose error the others get too. is_right: of bytes from disk.
        """
        with self._lock:
            if (block := self._memory.get(name)) is not None:
                self._memory.move_to_end(name)
                return block
            mine: Future[np.ndarray] = Future()
            coming = self._coming.setdefault(name, mine)
        if coming is not mine:
            return coming.result()
        try:
            data = self._from_disk(name, is_right)
            if data is None:
                data = fetch()
                self._to_disk(name, data)
            block = np.frombuffer(data, np.uint8)
            self._to_memory(name, block)
            mine.set_result(block)
            return block
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._coming[name]

    def holds(self, name: str) -> bool:
        """Whether the block is in memory, or on its way there."""
        with self._lock:
            return name in self._memory or name in self._coming

    def _to_memory(self, name: str, block: np.ndarray) -> None:
        with self._lock:
            self._memory[name] = block
            self._held_bytes += block.nbytes
            while self._held_bytes > self.memory_bytes:
                _, oldest = self._memory.popitem(last=False)
                self._held_bytes -= oldest.nbytes

    def _from_disk(self, name: str, is_right: Callable[[bytes], bool]) -> bytes | None:
        path = self._blocks / name
        try:
            data = path.read_bytes()
            if not is_right(data):
                path.unlink()
                return None
        except OSError:  # not there, gone since, or a disk that cannot read it
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def _to_disk(self, name: str, data: bytes) -> None:
        if len(data) > self.max_bytes:
            return
        temporary = self._blocks / f"{name}.tmp"
        try:
            with self._room(len(data)):
                temporary.write_bytes(data)
                temporary.rename(self._blocks / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._tell_once(error)

    @contextlib.contextmanager
    def _room(self, added: int) -> Iterator[None]:
        """Holds the lock of the folder, where `added` bytes more have room."""
        descriptor = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0)
            total = int(text) if text.isdigit() else None
            if added == 0 or total is None or total + added > self.max_bytes:
                total = self._evict(added)
            os.pwrite(descriptor, b"%020d" % (total + added), 0)
            yield
        finally:
            os.close(descriptor)  # and with it the lock

    def _evict(self, added: int) -> int:
        """Removes blocks read longest ago until `added` bytes fit; bytes that stay."""
        found = []
        with os.scandir(self._blocks) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    # Of the one process that writes now, none; so of a dead one.
                    is_left = entry.name.endswith(".tmp")
                    read_at = 0 if is_left else status.st_mtime_ns
                    found.append((read_at, entry.path, status.st_size))
        total = sum(size for _, _, size in found)
        most = self.max_bytes
        if total + added > most:
            most = max(most * _KEPT, added)
        for read_at, path, size in sorted(found):
            if read_at and total + added <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _tell_once(self, error: OSError) -> None:
        with self._lock:
            has_told, self._has_told = self._has_told, True
        if not has_told:
            self._tell(
                f"the cache folder {self.folder} cannot be written: "
                f"{error.strerror or error}; going on without keeping what is read"
            )
