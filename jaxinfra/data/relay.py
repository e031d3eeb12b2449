"""A file that cannot be cut, read once and made into parts by many processes.

What is compressed, and a table of another kind than Parquet, can only be read from its
beginning. One process reads it and hands its texts on, a chunk at a time, no more than
a few chunks ahead; what comes back is written in the order of the texts, as parts that
are each kept. So memory does not grow with the file, tokenizing is shared, and after a
kill the file is read again but its finished parts are not made again.

Parts grow with their numbers, since nothing says how much text there will be: their
ends follow from the file alone.
"""

import collections
import itertools
import operator
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jaxinfra.data import part_files, recipes, spans
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.recipes import Made, Recipe

# Parts of all relayed files before they double in size: text of 20 times the bytes of
# the files, compressed as well as this can be, is some 200 parts.
_PARTS_OF_A_SIZE = 24

Result = Callable[[], Made]  # waits for it
Submit = Callable[[list[str]], Result]


class _Chunk(NamedTuple):
    path: pathlib.Path  # of its part
    is_there: bool  # the part of it, from before
    result: Result


def make_parts(
    span: spans.Span,
    folder: pathlib.Path,
    *,
    recipe: Recipe,
    run: str,
    num_relayed: int,
    submit: Submit,
    ahead: int,
    tell: Callable[[int], None],
) -> list[pathlib.Path]:
    """The parts of a file, made in `folder` where they are not there and whole.

    num_relayed: files of the corpus that are read so. submit: has a chunk made by
    another process, or when it is waited for; `ahead` chunks at most wait to be
    written. tell: hears of the characters of each chunk that was read. Raises
    DataError as `spans.read`.
    """
    paths = []
    chunks = _started(span, folder, recipe, num_relayed, submit, tell)
    in_order = _ahead(chunks, ahead)
    for path, here in itertools.groupby(in_order, key=operator.attrgetter("path")):
        paths.append(path)
        first = next(here)
        if not first.is_there:
            with part_files.writing(path, run) as add:
                for chunk in itertools.chain([first], here):
                    add(chunk.result())
    if not paths:  # no texts at all: what reads the parts finds one without documents
        paths = [folder / _name(span, recipe, _growth(num_relayed), 0)]
        with part_files.writing(paths[0], run) as add:
            add(recipes.make([], recipe))
    return paths


def _started(
    span: spans.Span,
    folder: pathlib.Path,
    recipe: Recipe,
    num_relayed: int,
    submit: Submit,
    tell: Callable[[int], None],
) -> Iterator[_Chunk]:
    growth = _growth(num_relayed)
    texts = spans.read(
        (span,), text_key=recipe.text_key, document_separator=recipe.document_separator
    )
    max_chars = min(recipes.CHUNK_CHARS, span.relay_chars)
    number, num_chars, path, is_there = -1, 0, folder, False
    for chunk in recipes.chunks(texts, max_chars):
        if num_chars <= 0:
            number += 1
            num_chars = span.relay_chars << (number // growth)
            path = folder / _name(span, recipe, growth, number)
            is_there = part_files.is_whole(path, recipe.ids_dtype)
        chars = sum(map(len, chunk))
        yield _Chunk(path, is_there, _no_result if is_there else submit(chunk))
        num_chars -= chars
        tell(chars)


def _no_result() -> Made:
    raise AssertionError("a part that is there is not written")


def _ahead(chunks: Iterable[_Chunk], ahead: int) -> Iterator[_Chunk]:
    waiting: collections.deque[_Chunk] = collections.deque()
    for chunk in chunks:
        waiting.append(chunk)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _growth(num_relayed: int) -> int:
    return max(1, _PARTS_OF_A_SIZE // num_relayed)


def _name(span: spans.Span, recipe: Recipe, growth: int, number: int) -> str:
    place = [span.start, span.stop, *span.state, span.relay_chars, growth, number]
    return tokenizers.json_sha256(["relay", 1, recipe.digest, place])[:32]
