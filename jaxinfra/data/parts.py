"""Parts of a corpus made into ids, by several processes, each written once.

A part is cleaned, tokenized and written to the folder of parts (`part_files`), named by
a digest of its sources and of the `Recipe`: after a kill what is whole is not made
again, and a source or an option that has changed gives another name. Most parts are
read by the process that makes them; a large file that cannot be cut is handed on by
`relay`. Nothing here depends on the number of processes.
"""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import overload

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import leftovers, part_files, recipes, relay, spans
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.recipes import Made, Recipe

_VERSION = 2  # of the files, and of the way from text to ids
_PACKED = 4  # characters of text for a byte of a compressed file, more or less

Tell = Callable[[int, int], None]  # bytes of the sources done, and of all


def make_parts(
    plan: Sequence[spans.Part],
    folder: pathlib.Path,
    *,
    recipe: Recipe,
    num_workers: int,
    tell: Tell = lambda done, total: None,
) -> list[Made]:
    """The parts of a plan, made in `folder` where they are not there and whole.

    One worker is this process, whose tokenizer may use all cores; more are processes of
    their own, which start from this program's main file: it must not start the work
    again when it is imported. Raises DataError for what is wrong with the sources, a
    disk that refuses, and a worker that was killed; what is whole then stays.
    """
    sizes = [sum(span.num_bytes for span in part) for part in plan]
    relayed = [number for number, part in enumerate(plan) if spans.is_relayed(part)]
    cut = [number for number in range(len(plan)) if number not in relayed]
    paths = {number: [folder / _name(plan[number], recipe)] for number in cut}
    done, total = 0, sum(sizes)
    tell(done, total)
    run = leftovers.new_owner()
    if not relayed:
        num_workers = min(num_workers, len(plan))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers.remove_dead(folder)
        with _pool(num_workers, recipe) as pool:
            jobs = {number: (plan[number], *paths[number]) for number in cut}
            for number in _made(jobs, recipe, run, pool):
                done += sizes[number]
                tell(done, total)
            submit = functools.partial(_result, pool, recipe)
            for number in relayed:
                [span] = plan[number]
                paths[number] = relay.make_parts(
                    span,
                    folder,
                    recipe=recipe,
                    run=run,
                    num_relayed=len(relayed),
                    submit=submit,
                    ahead=2 * num_workers if pool else 0,
                    tell=_about(span, done, total, tell),
                )
                done += sizes[number]
                tell(done, total)
        in_order = [path for number in range(len(plan)) for path in paths[number]]
        return [part_files.opened(path, recipe.ids_dtype) for path in in_order]
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or "
            "choose another folder, and start again: finished parts are kept"
        ) from error
    finally:
        part_files.remove_unfinished(folder, run)


class Documents(Sequence[np.ndarray]):
    """The ids of documents of parts, by their numbers in all parts together; read from
    the maps when they are asked for."""

    def __init__(self, parts: Sequence[Made], numbers_D: np.ndarray):
        self._ids = [part.ids_N for part in parts]
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


def _name(part: spans.Part, recipe: Recipe) -> str:
    places = [[span.start, span.stop, span.groups, *span.state] for span in part]
    return tokenizers.json_sha256([_VERSION, recipe.digest, places])[:32]


def _about(
    span: spans.Span, done: int, total: int, tell: Tell
) -> Callable[[int], None]:
    """Tells of a relayed file by the characters of its texts, as well as is known."""
    num_chars = 0
    chars_a_byte = 1 if span.file.suffix in spans.PLAIN else _PACKED

    def tell_chars(chars: int) -> None:
        nonlocal num_chars
        num_chars += chars
        tell(done + min(num_chars // chars_a_byte, span.num_bytes - 1), total)

    return tell_chars


@contextlib.contextmanager
def _pool(num_workers: int, recipe: Recipe) -> Iterator[futures.Executor | None]:
    """Processes that end with the block, and with this process; none for one worker."""
    if num_workers == 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    context = multiprocessing.get_context("spawn")
    life, here = context.Pipe(duplex=False)
    pool = futures.ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_begin_worker,
        initargs=(threads, life, recipe),
    )
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; start again with "
            "fewer --workers: finished parts are kept"
        ) from error
    finally:
        here.close()
        pool.shutdown(cancel_futures=True)


def _made(
    jobs: dict[int, tuple[spans.Part, pathlib.Path]],
    recipe: Recipe,
    run: str,
    pool: futures.Executor | None,
) -> Iterator[int]:
    """Makes the parts; the number of each as soon as it is whole."""
    if pool is None:
        for number, (part, path) in jobs.items():
            _make(part, path, recipe, run)
            yield number
        return
    waiting = {
        pool.submit(_make, part, path, recipe, run): number
        for number, (part, path) in jobs.items()
    }
    for future in futures.as_completed(waiting):
        future.result()
        yield waiting[future]


def _result(
    pool: futures.Executor | None, recipe: Recipe, texts: list[str]
) -> relay.Result:
    """Has texts made, by this process when they are waited for."""
    if pool is None:
        return functools.partial(recipes.make, texts, recipe)
    return pool.submit(_make_here, texts).result


_recipe_here: list[Recipe] = []  # of a worker: given once, as it may be of megabytes


def _begin_worker(
    num_threads: int, life: connection.Connection, recipe: Recipe
) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)  # of the tokenizer library
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    _recipe_here[:] = [recipe]


def _end_with(life: connection.Connection) -> None:
    """Ends the worker, in the middle of a part too, when the other end of the pipe is
    closed: by the process that started it, or because that was killed."""
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def _make_here(texts: list[str]) -> Made:
    return recipes.make(texts, *_recipe_here)


def _make(part: spans.Part, path: pathlib.Path, recipe: Recipe, run: str) -> None:
    """Writes a part, unless it is there and whole."""
    if part_files.is_whole(path, recipe.ids_dtype):
        return
    texts = spans.read(
        part, text_key=recipe.text_key, document_separator=recipe.document_separator
    )
    with part_files.writing(path, run) as add:
        add(recipes.make([], recipe))
        for chunk in recipes.chunks(texts):
            add(recipes.make(chunk, recipe))
