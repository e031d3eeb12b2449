"""Parts of a corpus made into ids, by several processes, each written once.

A part is cleaned, tokenized and written to the folder of parts as two files, named by a
digest of its sources and of the `Recipe`:

    KEY.ids     its documents one after the other, `id_dtype`, BOS and EOD included
    KEY.facts   for each document what `FACTS` says, `.npy` arrays and a checksum

The facts come last, by a rename, after an fsync of both: a part with facts is whole. So
after a kill what is whole is not made again, and a source or an option that has changed
gives another name. Nothing here depends on the number of processes.
"""

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import BinaryIO, overload

import numpy as np
import xxhash

from jaxinfra.config import DataError
from jaxinfra.data import cleaning, duplicates, spans, splits
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.sources import Piece

FACTS = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),  # of its text as UTF-8
        ("chars", "<i8"),
        ("key", splits.KEY_DTYPE),  # empty where nothing is held out
        ("copy", duplicates.COPY_DTYPE),  # empty where copies are kept
    ]
)

_VERSION = 1  # of the files, and of the way from text to ids
_CHUNK_CHARS = 2**21  # cleaned and encoded at a time; its tokens take about 150 MB
_SUM_BYTES = 16  # of xxh3_128

Tell = Callable[[int, int], None]  # bytes of the sources done, and of all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to the texts of every part."""

    tokenizer_json: str  # `Tokenizer.to_json`, as JSON
    text_key: str
    document_separator: str | None
    rules: cleaning.Rules
    key_seed: int | None  # of `splits.key`, None where nothing is held out
    has_copies: bool  # whether copies are to be found

    @functools.cached_property
    def digest(self) -> str:
        return tokenizers.json_sha256(dataclasses.asdict(self))

    @property
    def ids_dtype(self) -> np.dtype:
        return tokenizers.id_dtype(_tokenizer(self.tokenizer_json).vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part that was made."""

    ids: np.ndarray  # [N], memory-mapped
    facts_D: np.ndarray  # FACTS; its tokens sum to N
    counts_C2: np.ndarray  # int64: documents and characters that each step took


def make_parts(
    plan: Sequence[spans.Part],
    folder: pathlib.Path,
    *,
    recipe: Recipe,
    num_workers: int,
    tell: Tell = lambda done, total: None,
) -> list[Part]:
    """The parts of a plan, made in `folder` where they are not there and whole.

    One worker is this process, whose tokenizer may use all cores; more are processes of
    their own, which start from this program's main file: it must not start the work
    again when it is imported. Raises DataError for what is wrong with the sources, a
    disk that refuses, and a worker that was killed; what is whole then stays.
    """
    paths = [folder / _name(part, recipe) for part in plan]
    sizes = [sum(span.num_bytes for span in part) for part in plan]
    done, total = 0, sum(sizes)
    tell(done, total)
    run = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in _made(plan, paths, recipe, run, min(num_workers, len(plan))):
            done += sizes[number]
            tell(done, total)
        return [_opened(path, recipe.ids_dtype) for path in paths]
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or "
            "choose another folder, and start again: finished parts are kept"
        ) from error
    finally:
        for file in folder.glob(f".*.{run}.tmp"):  # of workers that were ended
            file.unlink(missing_ok=True)


class Documents(Sequence[np.ndarray]):
    """The ids of documents of parts, by their numbers in all parts together; read from
    the maps when they are asked for."""

    def __init__(self, parts: Sequence[Part], numbers_D: np.ndarray):
        self._ids = [part.ids for part in parts]
        lengths = [part.facts_D["tokens"] for part in parts]
        self._firsts = np.cumsum([0, *map(len, lengths)])  # documents before each part
        self._stops = np.concatenate([np.cumsum(length) for length in lengths])
        self._lengths = np.concatenate(lengths)
        self._numbers_D = numbers_D

    def __len__(self) -> int:
        return len(self._numbers_D)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), 1_000):
            yield from self[start : start + 1_000]

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        numbers = np.atleast_1d(self._numbers_D[index])
        homes = np.searchsorted(self._firsts, numbers, side="right") - 1
        stops = self._stops[numbers]
        starts = stops - self._lengths[numbers]
        places = zip(homes.tolist(), starts.tolist(), stops.tolist())
        found = [self._ids[home][start:stop] for home, start, stop in places]
        return found if isinstance(index, slice) else found[0]


def encode(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[Piece]
) -> Iterator[np.ndarray]:
    """The ids of each piece, `id_dtype`, with BOS, where the tokenizer has one, and EOD
    at the ends of its document."""
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    eod, none = np.array([tokenizer.eod_id], dtype), np.array([], dtype)
    bos = none if tokenizer.bos_id is None else np.array([tokenizer.bos_id], dtype)
    ids = tokenizer.encode_batch(piece.text for piece in pieces)
    for p, i in zip(pieces, ids, strict=True):
        yield np.concatenate(
            [bos if p.is_start else none, i, eod if p.is_end else none]
        )


def _name(part: spans.Part, recipe: Recipe) -> str:
    places = [[span.start, span.stop, *span.state] for span in part]
    return tokenizers.json_sha256([_VERSION, recipe.digest, places])[:32]


def _made(
    plan: Sequence[spans.Part],
    paths: Sequence[pathlib.Path],
    recipe: Recipe,
    run: str,
    num_workers: int,
) -> Iterator[int]:
    """Makes the parts; the number of each as soon as it is whole.

    run: in the names of files that are not whole yet.
    """
    if num_workers == 1:
        for number, (part, path) in enumerate(zip(plan, paths, strict=True)):
            _make(part, path, recipe, run)
            yield number
        return
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    context = multiprocessing.get_context("spawn")
    life, here = context.Pipe(duplex=False)
    pool = futures.ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_begin_worker,
        initargs=(threads, life),
    )
    try:
        waiting = {
            pool.submit(_make, part, path, recipe, run): number
            for number, (part, path) in enumerate(zip(plan, paths, strict=True))
        }
        for future in futures.as_completed(waiting):
            future.result()
            yield waiting[future]
        pool.shutdown()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; start again with "
            "fewer --workers: finished parts are kept"
        ) from error
    finally:
        here.close()
        pool.shutdown(cancel_futures=True)


def _begin_worker(num_threads: int, life: connection.Connection) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)  # of the tokenizer library
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()


def _end_with(life: connection.Connection) -> None:
    """Ends the worker, in the middle of a part too, when the other end of the pipe is
    closed: by the process that started it, or because that was killed."""
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def _make(part: spans.Part, path: pathlib.Path, recipe: Recipe, run: str) -> None:
    """Writes a part, unless it is there and whole."""
    if _is_whole(path, recipe.ids_dtype):
        return
    tokenizer = _tokenizer(recipe.tokenizer_json)
    steps = cleaning.steps(recipe.rules)
    counts_C2 = np.zeros((len(steps), 2), np.int64)
    facts, ids_sum = [np.empty(0, FACTS)], xxhash.xxh3_128()
    texts = spans.read(
        part, text_key=recipe.text_key, document_separator=recipe.document_separator
    )
    with _written(_ids_file(path), run) as file:
        for chunk in _chunks(texts):
            left, counts = cleaning.clean(chunk, steps)
            counts_C2 += [(c.documents, c.characters) for c in counts] or 0
            documents = list(encode(tokenizer, [*map(Piece, left)]))
            data = np.concatenate([np.empty(0, recipe.ids_dtype), *documents])
            file.write(data)
            ids_sum.update(data)
            facts.append(_facts(left, documents, recipe))
    sum_16 = np.frombuffer(ids_sum.digest(), np.uint8)
    packed = io.BytesIO()
    for array in (np.concatenate(facts), counts_C2, sum_16):
        np.lib.format.write_array(packed, array, allow_pickle=False)
    with _written(_facts_file(path), run) as file:
        file.write(packed.getbuffer())
        file.write(xxhash.xxh3_128_digest(packed.getbuffer()))


def _facts(
    texts: Sequence[str], documents: Sequence[np.ndarray], recipe: Recipe
) -> np.ndarray:
    facts_D = np.zeros(len(texts), FACTS)
    facts_D["tokens"] = [len(ids) for ids in documents]
    facts_D["bytes"] = [len(text.encode("utf-8")) for text in texts]
    facts_D["chars"] = [len(text) for text in texts]
    if recipe.key_seed is not None:
        facts_D["key"] = [splits.key(text, seed=recipe.key_seed) for text in texts]
    if recipe.has_copies:
        facts_D["copy"] = [duplicates.copy_digest(text) for text in texts]
    return facts_D


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, num_chars = [], 0
    for text in texts:
        chunk.append(text)
        num_chars += len(text)
        if num_chars >= _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _is_whole(path: pathlib.Path, dtype: np.dtype) -> bool:
    """Whether a part is there, every byte as it was written."""
    found = _read_facts(path)
    if found is None:
        return False
    facts_D, _, sum_16 = found
    try:
        with _ids_file(path).open("rb") as file:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            ids_sum = xxhash.xxh3_128()
            while data := file.read(2**22):
                ids_sum.update(data)
    except OSError:
        return False
    is_long = num_bytes == int(facts_D["tokens"].sum()) * dtype.itemsize
    return is_long and ids_sum.digest() == sum_16.tobytes()


def _read_facts(path: pathlib.Path) -> list[np.ndarray] | None:
    """[facts, counts, checksum of the ids]; None where not there or damaged."""
    try:
        whole = _facts_file(path).read_bytes()
    except OSError:
        return None
    data, checksum = whole[:-_SUM_BYTES], whole[-_SUM_BYTES:]
    if xxhash.xxh3_128_digest(data) != checksum:
        return None
    packed = io.BytesIO(data)
    return [np.lib.format.read_array(packed, allow_pickle=False) for _ in range(3)]


def _opened(path: pathlib.Path, dtype: np.dtype) -> Part:
    found = _read_facts(path)
    if found is None:
        raise DataError(
            f"{path.parent} lost a part while it was read; let one process at a time "
            "prepare a data set, and start again"
        )
    facts_D, counts_C2, _ = found
    size = int(facts_D["tokens"].sum())
    ids = (
        np.memmap(_ids_file(path), dtype, "r", shape=size)
        if size
        else np.empty(0, dtype)
    )
    return Part(ids=np.asarray(ids), facts_D=facts_D, counts_C2=counts_C2)


def _ids_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.ids")


def _facts_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.facts")


@contextlib.contextmanager
def _written(path: pathlib.Path, run: str) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.{run}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """Made once in a process, not for every part."""
    return tokenizers.from_json(json.loads(tokenizer_json))
