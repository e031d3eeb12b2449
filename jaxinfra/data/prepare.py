"""Text files to a data set folder: clean, split, shuffle once, encode, write.

Which documents are held out, and the order of the others, follow from the texts and the
seed alone: the same input gives the same bytes on every machine, from any number of
processes. A folder is written whole or not at all; `shards` says what stands in it.

More text than a little is made in parts (`spans`), by several processes and whatever
the kinds of the files, in memory that does not grow with them. They stay in
`.NAME.parts` beside the data set until it is there, so that the same command goes on
where it was killed, and take as much of the disk as the data set.

Limits: what needs the texts together has all of them in memory instead, in one process:
the `tail` split, a tokenizer made of the texts (char, --train_tokenizer), and near
copies. So does a document: a .txt file without document_separator is one.

`chat` makes the documents of conversations, `megatron` takes ids that others made; all
end in `writer`.
"""

import difflib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal, assert_never

import numpy as np

import jaxinfra
from jaxinfra.config import DataError
from jaxinfra.data import (
    cleaning,
    duplicates,
    fitting,
    folders,
    parts,
    recipes,
    shards,
    sources,
    spans,
    splits,
    urls,
    writer,
)
from jaxinfra.data import tokenizer as tokenizers
from jaxinfra.data.sources import Piece
from jaxinfra.data.tokenizer import BosRule
from jaxinfra.data.tokenizer_json import HfTokenizer

# Makes the tokenizer of a data set from the texts that are trained on.
MakeTokenizer = Callable[[Sequence[str]], tokenizers.Tokenizer]
SplitRule = Literal["documents", "tail"]
Copies = Literal["keep", "exact", "near"]
TellTaken = Callable[[cleaning.Count], None]

CORPORA = {"shakespeare": pathlib.Path(__file__).parent / "corpus" / "shakespeare.txt"}

_VERSION = 1  # of the way from text to bytes: part of the name of a cached data set


def prepare(
    inputs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    tokenizer: str | tokenizers.Tokenizer | MakeTokenizer,
    split: SplitRule,
    held_out: float,
    seed: int,
    eod: str = "",
    bos: BosRule = "tokenizer",
    shard_tokens: int = writer.SHARD_TOKENS,
    layout: shards.Layout = shards.CONCAT,
    text_key: str = "text",
    document_separator: str | None = None,
    rules: cleaning.Rules = cleaning.NO_RULES,
    copies: Copies = "keep",
    near_threshold: float = duplicates.THRESHOLD,
    num_workers: int = 1,
    tell_taken: TellTaken = lambda count: None,
    tell_done: parts.Tell = lambda done, total: None,
) -> shards.Dataset:
    """Writes the data set `out` from text and JSONL files and opens it.

    `documents` holds out the fraction `held_out` of the distinct documents, at least
    one and not all, copies of a text on the same side. `tail` holds out the last
    `held_out` of the characters, and may cut one document in two. Train documents are
    shuffled by `seed`, held-out ones stay in order; after each end of a document stands
    the EOD id, and before it BOS where the tokenizer has one.

    tokenizer: byte, char (which knows the characters of both splits), a path and how
    its documents begin and end (`tokenizer_files`), a tokenizer, or what makes one of
    the texts trained on. layout: of the rows of train (`fitting`). rules and copies:
    what is changed and left out before the split, of which tell_taken hears.
    num_workers: of `parts.make_parts`; tell_done hears of each part. Raises DataError,
    and leaves nothing under the name of `out`.
    """
    check_options(split, held_out, seed, shard_tokens, layout)
    writer.make_way(out)
    if num_workers < 1:
        raise DataError(f"workers={num_workers} must be 1 or more")
    duplicates.check_threshold(near_threshold)
    steps = cleaning.steps(rules)
    coder = tokenizer
    if isinstance(tokenizer, str):
        coder = _named_tokenizer(tokenizer, eod=eod, bos=bos)
    files = sources.find_files([CORPORA.get(str(path), path) for path in inputs])
    plan = spans.plan(files)
    folder = pathlib.Path(os.path.abspath(out))
    work = folder.with_name(f".{folder.name}.parts")
    is_together = (
        split == "tail" or copies == "near" or coder is None or callable(coder)
    )
    if not spans.is_small(plan) and not is_together:
        recipe = recipes.Recipe(
            tokenizer_json=json.dumps(coder.to_json()),
            text_key=text_key,
            document_separator=document_separator,
            rules=rules,
            key_seed=seed if held_out else None,
            has_copies=copies == "exact",
        )
        made = parts.make_parts(
            plan, work, recipe=recipe, num_workers=num_workers, tell=tell_done
        )
        for step, taken in zip(steps, sum(part.counts_C2 for part in made)):
            tell_taken(cleaning.Count(step.name, *taken.tolist()))
        numbers = np.arange(sum(len(part.facts_D) for part in made))
        if copies == "exact":
            numbers = _first_copies(made, tell_taken)
        _check_some(numbers, files)
        contents = _joined(made, numbers, held_out=held_out, seed=seed)
    else:
        found = sources.read_documents(
            files, text_key=text_key, document_separator=document_separator
        )
        texts, counts = cleaning.clean(found, steps)
        for count in counts:
            tell_taken(count)
        texts = _without_copies(texts, copies, near_threshold, tell_taken)
        _check_some(texts, files)
        pieces = _split(texts, split, held_out=held_out, seed=seed)
        if coder is None:
            coder = jaxinfra.CharTokenizer("".join(set().union(*texts)))
        elif callable(coder):
            coder = coder([piece.text for piece in pieces["train"]])
        contents = {name: _encoded(coder, part) for name, part in pieces.items()}
    dataset = writer.write_dataset(
        folder,
        tokenizer=coder,
        splits=writer.laid_out(contents, layout),
        shard_tokens=shard_tokens,
    )
    shutil.rmtree(work, ignore_errors=True)
    return dataset


def prepared(
    path_or_name: str | pathlib.Path,
    *,
    cache_dir: str | pathlib.Path,
    tokenizer: str,
    split: SplitRule,
    held_out: float,
    seed: int,
    eod: str = "",
    bos: BosRule = "tokenizer",
    shard_tokens: int = writer.SHARD_TOKENS,
    text_key: str = "text",
    document_separator: str | None = None,
) -> pathlib.Path:
    """The data set folder for `data.path`: itself, or made once in `cache_dir`.

    A folder with dataset.json is returned as it is, whatever the options say. Text (a
    file, folder, glob or shipped name) is prepared into `cache_dir`/<sha256 of the
    bytes and the options>, unless that is there; any number of processes may do so at
    once. Raises DataError, as `prepare` does. Limits: reads all the text to name the
    folder.
    """
    path = CORPORA.get(str(path_or_name), pathlib.Path(path_or_name).expanduser())
    if (path / shards.MANIFEST).is_file():
        return path
    if not path.exists() and not any(c in str(path_or_name) for c in "*?["):
        raise DataError(_not_found(path_or_name))
    files = sources.find_files([path])
    coder = _named_tokenizer(tokenizer, eod=eod, bos=bos)
    is_file = isinstance(coder, HfTokenizer)
    options: dict[str, Any] = {
        "tokenizer": coder.digest() if is_file else tokenizer,
        "split": split,
        "held_out": held_out,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "document_separator": document_separator,
    }
    inputs = [[file.suffix, folders.file_sha256(file)] for file in files]
    key = {"version": [_VERSION, shards.FORMAT_VERSION], "inputs": inputs, **options}
    folder = pathlib.Path(cache_dir) / tokenizers.json_sha256(key)
    if not (folder / shards.MANIFEST).is_file():
        options["tokenizer"] = coder or tokenizer
        try:
            prepare(files, folder, **options)
        except DataError:
            # Another process was first, and has taken the parts away with it.
            if not (folder / shards.MANIFEST).is_file():
                raise
    return folder


def check_options(
    split: str,
    held_out: float,
    seed: int,
    shard_tokens: int,
    layout: shards.Layout = shards.CONCAT,
) -> None:
    """Raises DataError for what no data set can be made with."""
    names = [shards.CONCAT.name, *fitting.PACKINGS]
    if layout.name not in names:
        raise DataError(f"packing={layout.name!r} is not known; use {', '.join(names)}")
    if (layout.name == shards.CONCAT.name) != (layout.length == 0) or layout.length < 0:
        raise DataError(
            f"packing={layout.name} with length={layout.length}: concat is for rows of "
            "any length and takes none; the others need that of train.length"
        )
    if split not in ("documents", "tail"):
        raise DataError(f"data.split={split!r} is not known; use documents or tail")
    if not 0 <= held_out < 1:
        raise DataError(
            f"data.held_out={held_out} must be at least 0 and below 1: it is the "
            "fraction that is not trained on"
        )
    if not 0 <= seed < 2**64:
        raise DataError(f"seed={seed} must be in 0 .. 2**64 - 1")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens} must be 1 or more")


def _named_tokenizer(
    name: str, *, eod: str, bos: BosRule
) -> tokenizers.Tokenizer | None:
    """The tokenizer of data.tokenizer; None for char, which is made of the texts."""
    if name in ("byte", "char"):
        if eod or bos != "tokenizer":
            raise DataError(
                f"data.eod and data.bos are for tokenizers from files, and data."
                f"tokenizer={name} has its own EOD and no BOS; leave them out"
            )
        return tokenizers.ByteTokenizer() if name == "byte" else None
    urls.check_local(name, key="data.tokenizer", fix="copy its files here first")
    if not pathlib.Path(name).expanduser().exists():
        raise DataError(
            f"data.tokenizer={name!r} is not known: give byte, char, or a path that "
            "exists, of a Hugging Face folder, a tokenizer.json, a SentencePiece "
            ".model or a .tiktoken file"
        )
    # By its public name, which loads the module: a plain run needs none of it.
    return jaxinfra.load_tokenizer(name, eod=eod, bos=bos)


def _check_some(documents: Sequence[Any] | np.ndarray, files: Sequence[Any]) -> None:
    if not len(documents):
        raise DataError(
            f"{files[0]} and {len(files) - 1} more files hold no document with text; "
            "give files with text, or another document_separator"
        )


def _joined(
    made: Sequence[recipes.Made], numbers_D: np.ndarray, *, held_out: float, seed: int
) -> dict[str, writer.SplitContent]:
    """The splits of the documents of these numbers."""
    keys_D = np.concatenate([part.facts_D["key"] for part in made])[numbers_D]
    bytes_D = np.concatenate([part.facts_D["bytes"] for part in made])
    return {
        name: writer.SplitContent(
            documents=parts.Documents(made, numbers_D[here]),
            text_bytes=int(bytes_D[numbers_D[here]].sum()),
        )
        for name, here in splits.split(keys_D, held_out=held_out, seed=seed).items()
    }


def _first_copies(made: Sequence[recipes.Made], tell: TellTaken) -> np.ndarray:
    digests_D = np.concatenate([part.facts_D["copy"] for part in made])
    kept = duplicates.first_of_each(digests_D)
    _tell_copies(
        tell, "exact", np.concatenate([p.facts_D["chars"] for p in made]), kept
    )
    return kept


def _without_copies(
    texts: list[str], copies: Copies, near_threshold: float, tell: TellTaken
) -> list[str]:
    match copies:
        case "keep":
            return texts
        case "exact":
            kept = duplicates.without_copies(texts)
        case "near":
            kept = duplicates.without_near_copies(texts, threshold=near_threshold)
        case _:
            assert_never(copies)
    _tell_copies(tell, copies, np.array([*map(len, texts)]), np.array(kept, np.int64))
    return [texts[i] for i in kept]


def _tell_copies(
    tell: TellTaken, copies: str, chars_D: np.ndarray, kept: np.ndarray
) -> None:
    characters = int(chars_D.sum()) - int(chars_D[kept].sum())
    tell(cleaning.Count(f"{copies} copies", len(chars_D) - len(kept), characters))


def _split(
    texts: Sequence[str], rule: SplitRule, *, held_out: float, seed: int
) -> dict[str, list[Piece]]:
    """The pieces of each split, in the order in which they are written."""
    match rule:
        case "documents":
            keys = [splits.key(text, seed=seed) for text in texts]
            keys_D = np.array(keys, splits.KEY_DTYPE)
            numbers = splits.split(keys_D, held_out=held_out, seed=seed)
            return {
                name: [Piece(texts[i]) for i in here] for name, here in numbers.items()
            }
        case "tail":
            whole = [Piece(text) for text in texts]
            train, held = sources.split_tail(whole, held_out=held_out)
            found = {"train": writer.shuffled(train, seed=seed)}
            return found | ({"held_out": held} if held else {})
        case _:
            assert_never(rule)


def _encoded(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[Piece]
) -> writer.SplitContent:
    return writer.SplitContent(
        documents=list(recipes.encode(tokenizer, pieces)),
        text_bytes=sum(len(piece.text.encode("utf-8")) for piece in pieces),
    )


def _not_found(path: str | pathlib.Path) -> str:
    folder = pathlib.Path(path).parent
    beside = [str(p) for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), [*CORPORA, *beside], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"data.path={urls.redacted(str(path))!r} does not exist; give a folder that "
        f"prepare wrote, {sources.ACCEPTED}, or a corpus that ships "
        f"here ({', '.join(CORPORA)}){hint}"
    )
