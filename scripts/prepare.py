"""Turns text, JSONL files, conversations and ids into a data set folder.

    python scripts/prepare.py books/*.txt --out data/books --tokenizer byte
    python scripts/prepare.py books/*.txt --out data/books --tokenizer models/smollm2
    python scripts/prepare.py books/*.txt --out data/books \
        --train_tokenizer bpe --vocab_size 4096
    python scripts/prepare.py pages/*.jsonl --out data/pages --min_chars 200 \
        --clean unicode space gopher_quality gopher_repetition --duplicates near
    python scripts/prepare.py s3://bucket/texts/*.jsonl.gz --out data/texts
    python scripts/prepare.py chats.jsonl --out data/chats --tokenizer models/smollm2 \
        --chat
    python scripts/prepare.py old_text.bin --out data/old --tokenizer models/gpt2

Prints a summary. Ends with 2 and one sentence if an option or a file is wrong.
"""

import argparse
import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data import (
    chat,
    chat_template,
    cleaning,
    duplicates,
    fitting,
    megatron,
    prepare,
    shards,
    tiktoken_ranks,
    tokenizer_files,
    tokenizer_training,
    writer,
)
from jaxinfra.data.tokenizer import ByteTokenizer, Tokenizer
from jaxinfra.data.tokenizer_json import HfTokenizer

_LINE_SECS = 30  # between lines that say how far it is


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    start_secs = time.perf_counter()
    try:
        _check(options)
        if options.chat:
            dataset = _prepare_chat(options)
        elif _indexed(options):
            dataset = _prepare_megatron(options)
        else:
            dataset = _prepare_text(options)
        if options.train_tokenizer and isinstance(dataset.tokenizer, HfTokenizer):
            tokenizer_training.save(dataset.tokenizer, dataset.folder)
    except DataError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(_summary(dataset))
    print(f"{dataset.folder} written in {time.perf_counter() - start_secs:.1f} s")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises DataError for options that do not go together."""
    indexed = _indexed(options)
    is_cleaned = bool(cleaning.steps(_rules(options)) or options.duplicates)
    for is_wrong, message in (
        (
            options.train_tokenizer and options.tokenizer,
            "--train_tokenizer makes a tokenizer and --tokenizer names one; leave one "
            "of them out",
        ),
        (
            bool(options.train_tokenizer) != (options.vocab_size is not None),
            "--train_tokenizer and --vocab_size go together; give both or neither",
        ),
        (
            options.train_tokenizer and (options.eod or options.bos != "tokenizer"),
            "--eod and --bos are for a tokenizer from files; a trained one ends "
            f"documents with {tokenizer_training.EOD}; leave them out",
        ),
        (
            options.chat and options.train_tokenizer,
            "--chat needs a tokenizer that is there; train one on text first, and give "
            "its folder as --tokenizer",
        ),
        (
            options.chat and options.split != "documents",
            "--chat holds out whole conversations; leave --split out",
        ),
        (
            options.chat and (options.text_key or options.document_separator),
            "--text_key and --document_separator are for text; leave them out",
        ),
        (
            options.chat and is_cleaned,
            "--clean, --min_chars, --max_chars and --duplicates are for text, not for "
            "conversations; leave them out",
        ),
        (
            len({name[: -len(".bin")] for name in indexed}) > 1
            or (indexed and indexed != set(options.sources)),
            "a Megatron data set is prepared by itself; name its .bin alone",
        ),
        (
            indexed and not options.tokenizer,
            "a Megatron data set holds ids; give the --tokenizer that made them",
        ),
        (
            indexed
            and (
                options.chat
                or options.train_tokenizer
                or is_cleaned
                or options.text_key
                or options.document_separator
                or options.split != "documents"
            ),
            "a Megatron data set is taken as it is; leave --chat, --train_tokenizer, "
            "--clean, --min_chars, --max_chars, --duplicates, --text_key, "
            "--document_separator and --split out",
        ),
        (
            options.near_threshold is not None and options.duplicates != "near",
            "--near_threshold is of --duplicates near; give both or leave it out",
        ),
        (
            not options.chat and (options.chat_template or options.date),
            "--chat_template and --date are for conversations; give --chat too",
        ),
    ):
        if is_wrong:
            raise DataError(message)


def _prepare_text(options: argparse.Namespace) -> shards.Dataset:
    tokenizer = options.tokenizer or "byte"
    if options.train_tokenizer:
        tokenizer = functools.partial(
            tokenizer_training.train_bpe, vocab_size=options.vocab_size
        )
    elif options.tiktoken_pattern:
        tokenizer = _tokenizer(options)
    is_named = isinstance(tokenizer, str)
    with _progress() as tell_done:
        return prepare.prepare(
            options.sources,
            options.out,
            tokenizer=tokenizer,
            eod=options.eod if is_named else "",
            bos=options.bos if is_named else "tokenizer",
            split=options.split,
            held_out=options.held_out,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            layout=_layout(options),
            text_key=options.text_key or "text",
            document_separator=options.document_separator,
            rules=_rules(options),
            copies=options.duplicates or "keep",
            near_threshold=_near_threshold(options),
            num_workers=options.workers,
            tell_taken=_tell_taken,
            tell_done=tell_done,
        )


def _near_threshold(options: argparse.Namespace) -> float:
    given = options.near_threshold
    return duplicates.THRESHOLD if given is None else given


def _rules(options: argparse.Namespace) -> cleaning.Rules:
    return cleaning.Rules(
        names=tuple(options.clean),
        min_chars=options.min_chars,
        max_chars=options.max_chars,
    )


def _tell_taken(count: cleaning.Count) -> None:
    print(
        f"{count.name:18} took {count.documents:,} documents, "
        f"{count.characters:,} characters"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows how much of the sources is done: a bar on a terminal, elsewhere a line now
    and then."""
    if not sys.stderr.isatty():
        told_secs = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told_secs
            if time.monotonic() - told_secs >= _LINE_SECS:
                told_secs = time.monotonic()
                print(
                    f"prepare: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB",
                    file=sys.stderr,
                )

        yield tell
        return
    from rich import console, progress  # 50 ms, which worker processes do not need

    columns = (
        *progress.Progress.get_default_columns(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(
        *columns, console=console.Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("prepare", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _indexed(options: argparse.Namespace) -> set[str]:
    """The sources that are one of the two files of a Megatron data set."""
    return {name for name in options.sources if name.endswith(megatron.SUFFIXES)}


def _prepare_megatron(options: argparse.Namespace) -> shards.Dataset:
    return megatron.prepare_megatron(
        options.sources[0],
        options.out,
        tokenizer=_tokenizer(options),
        held_out=options.held_out,
        seed=options.seed,
        shard_tokens=options.shard_tokens,
        layout=_layout(options),
    )


def _prepare_chat(options: argparse.Namespace) -> shards.Dataset:
    tokenizer = _tokenizer(options)
    template = chat_template.load(
        tokenizer,
        folder=options.tokenizer if isinstance(tokenizer, HfTokenizer) else "",
        file=options.chat_template,
        date=options.date or datetime.date.today(),
    )
    unknown = chat.unknown_names(template, tokenizer) if template else ()
    if unknown:
        print(
            f"prepare: the chat template writes {', '.join(unknown)}, no tokens of the "
            "tokenizer, which reads them as letters",
            file=sys.stderr,
        )
    return chat.prepare_chat(
        options.sources,
        options.out,
        tokenizer=tokenizer,
        template=template,
        held_out=options.held_out,
        seed=options.seed,
        shard_tokens=options.shard_tokens,
        layout=_layout(options),
    )


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    """The tokenizer that does not depend on the texts."""
    if options.tokenizer == "char":
        raise DataError(
            "a char tokenizer is made of texts; give --tokenizer byte or a path"
        )
    if options.tokenizer in (None, "byte"):
        if options.eod or options.bos != "tokenizer" or options.tiktoken_pattern:
            raise DataError(
                "--eod, --bos and --tiktoken_pattern are for a tokenizer from files; "
                "give its path as --tokenizer"
            )
        return ByteTokenizer()
    return tokenizer_files.load_tokenizer(
        options.tokenizer,
        eod=options.eod,
        bos=options.bos,
        pattern=options.tiktoken_pattern,
    )


def _layout(options: argparse.Namespace) -> shards.Layout:
    return shards.Layout(options.packing, options.length)


def _summary(dataset: shards.Dataset) -> str:
    tokenizer = dataset.tokenizer
    lines = [f"tokenizer {tokenizer.name}, {tokenizer.vocab_size} ids"]
    for split in dataset.splits.values():
        masks = [shard.mask for shard in split.shards if shard.mask is not None]
        num_targets = sum(int(mask.sum(dtype="int64")) for mask in masks)
        lines.append(
            f"{split.name:8} {split.num_documents:,} documents, "
            f"{split.num_tokens:,} tokens, {split.text_bytes:,} bytes, "
            f"{len(split.shards)} shards"
            + (f", {num_targets:,} tokens count as targets" if masks else "")
            + _rows_told(split)
        )
    return "\n".join(lines)


def _rows_told(split: shards.Split) -> str:
    layout = split.layout
    if not layout.length:
        return ""
    rows_R2 = np.concatenate([s.rows for s in split.shards if s.rows is not None])
    padding = fitting.padding_fraction(rows_R2, length=layout.length)
    return f", {len(rows_R2):,} rows by {layout.name}, {padding:.2%} padding"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare",
        description="Text, conversations and pairs to a data set.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="file, folder, glob, a URL of them (extra remote), or Megatron's NAME.bin",
    )
    add("--out", required=True, help="data set folder to make")
    add("--split", choices=["documents", "tail"], default="documents")
    add("--held_out", type=float, default=0.1, help="fraction")
    add("--seed", type=int, default=0, help="of what is held out, and of the order")
    add("--shard_tokens", type=int, default=writer.SHARD_TOKENS)
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that clean and tokenize more than 8 MB (default: the cores); "
        "the result is the same for any number",
    )
    add(
        "--packing",
        choices=["concat", *fitting.PACKINGS],
        default="concat",
        help="how rows are cut: concat, documents one after another, for rows of any "
        "length (default); best_fit or first_fit, whole documents in rows of --length; "
        "documents, one a row",
    )
    add("--length", type=int, default=0, help="tokens a row of --packing: train.length")
    add("--text_key", help="key of the text in JSONL (default: text)")
    add("--document_separator", help="text between documents in .txt")
    add(
        "--clean",
        nargs="+",
        default=[],
        choices=[*cleaning.CHANGES],
        metavar="STEP",
        help=f"what is done to each document, in order: {', '.join(cleaning.CHANGES)}",
    )
    add("--min_chars", type=int, default=0, help="leave shorter documents out")
    add("--max_chars", type=int, default=0, help="leave longer documents out")
    add(
        "--duplicates",
        choices=["exact", "near"],
        default="",
        help="leave copies of documents out (near: extra data)",
    )
    add("--near_threshold", type=float, help="shared runs of words (default: 0.7)")
    add(
        "--tokenizer",
        help="byte (the default), char, a Hugging Face folder, a tokenizer.json, a "
        "SentencePiece .model or a .tiktoken file",
    )
    add(
        "--eod",
        default="",
        metavar="TOKEN",
        help="the token of it that ends a document (default: its EOS)",
    )
    add(
        "--bos",
        choices=["tokenizer", "always", "never"],
        default="tokenizer",
        help="whether documents start with its BOS (default: as it says itself)",
    )
    add(
        "--tiktoken_pattern",
        choices=[*tiktoken_ranks.PATTERNS],
        default="",
        help="how text is split, for a .tiktoken file that is not a known one",
    )
    add(
        "--train_tokenizer",
        choices=["bpe"],
        help="train a byte-level BPE tokenizer on the text that is trained on; written "
        "to the data set, and beside it as tokenizer.json",
    )
    add("--vocab_size", type=int, metavar="N", help="ids of the trained tokenizer")
    add(
        "--chat",
        action="store_true",
        help="JSONL lines are conversations (messages) or pairs (prompt, completion): "
        "answers alone count as targets",
    )
    add(
        "--chat_template",
        default="",
        metavar="FILE",
        help="Jinja file that writes conversations (default: the tokenizer's own)",
    )
    add(
        "--date",
        type=datetime.date.fromisoformat,
        help="day that chat templates are told, as 2026-01-31 (default: today)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
