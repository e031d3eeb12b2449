"""Turns text and JSONL files into a data set folder.

    python scripts/prepare.py books/*.txt --out data/books --tokenizer byte

Prints a summary. Ends with 2 and one sentence if an option or a file is wrong.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from jaxinfra.config import DataError
from jaxinfra.data import prepare, shards


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    start_secs = time.perf_counter()
    try:
        dataset = prepare.prepare(
            options.sources,
            options.out,
            tokenizer=options.tokenizer,
            split=options.split,
            held_out=options.held_out,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            text_key=options.text_key,
            document_separator=options.document_separator,
        )
    except DataError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(_summary(dataset))
    print(f"{dataset.folder} written in {time.perf_counter() - start_secs:.1f} s")
    return 0


def _summary(dataset: shards.Dataset) -> str:
    tokenizer = dataset.tokenizer
    lines = [f"tokenizer {tokenizer.name}, {tokenizer.vocab_size} ids"]
    for split in dataset.splits.values():
        lines.append(
            f"{split.name:8} {split.num_documents:,} documents, "
            f"{split.num_tokens:,} tokens, {split.text_bytes:,} bytes, "
            f"{len(split.shards)} shards"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare",
        description="Text and JSONL files to a data set.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder, glob"
    )
    parser.add_argument("--out", required=True, help="data set folder to make")
    parser.add_argument("--tokenizer", choices=["byte", "char"], default="byte")
    parser.add_argument("--split", choices=["documents", "tail"], default="documents")
    parser.add_argument("--held_out", type=float, default=0.1, help="fraction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_tokens", type=int, default=prepare.SHARD_TOKENS)
    parser.add_argument("--text_key", default="text", help="key of the text in JSONL")
    parser.add_argument("--document_separator", help="text between documents in .txt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
