"""Looks into a data set, without jax.

    python scripts/data.py verify DATASET     reads every byte
    python scripts/data.py inspect DATASET [--split train] [--rows 4] [--length 256]
    python scripts/data.py mixture NAME=DATASET ... [--weights NAME=STAGES ...]
        [--steps 1000] [--batch_size 64] [--batch_ramp STAGES] [--length 2048]

`inspect` prints the rows that training would read as text, a colour for each document
in a row and " ¦ " between them, with what counts as no target dimmed; then the lengths
of documents, and how many are copies of another. `mixture` prints the share and the
rows of each set in each stage of its weights, as data.sets and data.weights would have
them, and how often its rows are read in all. Exit code 0: all is well; 1: one line
for each bad file; 2: wrong input.
"""

import argparse
import itertools
import sys

import numpy as np
import rich.console
import rich.table
import rich.text
import xxhash

from jaxinfra import stages
from jaxinfra.config import ConfigError, DataError
from jaxinfra.data import batches, folders, packing, shards
from jaxinfra.data.shards import Dataset, Split
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.resilience import exitcodes

_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
_BETWEEN = " ¦ "  # documents of a row
_BAR = 40  # signs of the longest bar
_QUANTILES = (0, 0.1, 0.5, 0.9, 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=("inspect", "verify", "mixture"))
    add("datasets", nargs="+", metavar="DATASET", help="a folder that prepare wrote")
    add("--split", default="", help="default: all")
    add("--rows", type=int, default=4, help="rows of text to show")
    add("--length", type=int, default=256, help="tokens a row, where not laid out")
    add("--seed", type=int, default=0, help="of the order: run.seed")
    add("--weights", nargs="+", default=[], metavar="NAME=STAGES")
    add("--steps", type=int, default=1000)
    add("--batch_size", type=int, default=64)
    add("--batch_ramp", default="")
    args = parser.parse_args(argv)
    try:
        if args.command == "mixture":
            mixture(args)
            return exitcodes.DONE
        if len(args.datasets) > 1:
            raise DataError(f"{args.command} is of one data set; name one")
        folder = folders.as_folder(args.datasets[0])
        if args.command == "verify":
            folder.eager_shards = 0  # one that cannot be opened is told with the rest
            return verify(shards.open_dataset(folder, verify=False))
        data = shards.open_dataset(folder, verify=False)
        names = [args.split] if args.split else [*data.splits]
        inspect([data.split(name) for name in names], data, args)
    except (ConfigError, DataError) as error:
        print(f"data: {error}", file=sys.stderr)
        return exitcodes.INPUT
    return exitcodes.DONE


def verify(data: Dataset) -> int:
    """Reads every byte; prints a line for each file that is not as it was written."""
    bad = shards.verify_dataset(data)
    for line in bad:
        print(line)
    num_files = sum(len(s) for x in data.splits.values() for s in x.checksums())
    print(f"{data.folder}: {num_files} files, {len(bad)} findings")
    return 1 if bad else exitcodes.DONE


def inspect(splits: list[Split], data: Dataset, args: argparse.Namespace) -> None:
    """Prints each split's figures, its first rows in training's order, its lengths."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    tokenizer = data.tokenizer
    console.print(f"{data.folder}  {tokenizer.name}, {tokenizer.vocab_size} ids")
    for split in splits:
        console.rule(split.name)
        console.print(
            f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{split.text_bytes:,} bytes, {len(split.shards)} shards"
        )
        if args.rows > 0:
            stream = batches.make_stream(
                split,
                length=split.layout.length or args.length,
                batch_size=args.rows,
                seed=args.seed,
            )
            for row in as_texts(stream.batch(0), tokenizer):
                console.print(row)
                console.print()
        console.print("\n".join(length_lines(split)))
        copies = num_copies(split)
        share = copies / split.num_documents
        console.print(f"{copies:,} documents ({share:.1%}) are copies of another")


def mixture(args: argparse.Namespace) -> None:
    """Prints what each set gives in each stage of a mixture."""
    if args.steps < 1:
        raise DataError(f"--steps {args.steps} must be 1 or more")
    sets, weights = (_named(words) for words in (args.datasets, args.weights))
    splits = {
        name: shards.open_dataset(path, verify=False).split("train")
        for name, path in sets.items()
    }
    laid_out = {split.layout.length for split in splits.values()} - {0}
    stream = batches.make_stream(
        splits,
        length=max(laid_out, default=args.length),
        batch_size=args.batch_size,
        ramp=args.batch_ramp,
        seed=args.seed,
        weights={name: stages.parse(text, key=name) for name, text in weights.items()}
        or None,
    )
    table = rich.table.Table("set", "from row", "share", "rows", "epochs at its end")
    total = stream.sizes.rows_before(args.steps)
    parts = [] if stream.order.mixture is None else stream.order.mixture.identity()
    firsts = [first for first, *_ in parts or [[0]] if first < total]
    for first, stop in itertools.pairwise([*firsts, total]):
        for number, (name, rows) in enumerate(zip(splits, stream.sources.rows)):
            begin, end = (stream.order.rows_of(number, row) for row in (first, stop))
            share = (end - begin) / max(stop - first, 1)
            figures = f"{share:.3%}", f"{end - begin:,}", f"{end / rows.num_rows:.2f}"
            table.add_row(name, f"{first:,}", *figures)
        table.add_section()
    rich.console.Console(soft_wrap=True).print(table)


def _named(words: list[str]) -> dict[str, str]:
    named = {name: value for name, _, value in (w.partition("=") for w in words)}
    if "" in named or not all(named.values()) or len(named) < len(words):
        names = " ".join(word.partition("=")[0] for word in words)
        raise DataError(f"{names} must be NAME=VALUE words, each name once")
    return named


def as_texts(batch: packing.Batch, tokenizer: Tokenizer) -> list[rich.text.Text]:
    """Each row as text: documents in turns of colour, targets that do not count
    dimmed, padding left out."""
    rows = []
    tokens_BT1, segments_BT1, _ = batch.per_token
    for b, (tokens_T1, segments_T1) in enumerate(zip(tokens_BT1, segments_BT1)):
        counts_T1 = np.ones_like(segments_T1)
        if batch.weights_BT1 is not None:
            counts_T1 = batch.weights_BT1[b]
        row = rich.text.Text()
        key_T1 = 2 * segments_T1.astype(np.int64) + (counts_T1 > 0)
        starts = np.flatnonzero(np.diff(key_T1, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(key_T1)], strict=True):
            segment, counts = divmod(int(key_T1[start]), 2)
            if segment:
                if start and segments_T1[start - 1] != segment:
                    row.append(_BETWEEN, "bold")
                colour = _COLOURS[segment % len(_COLOURS)]
                text = tokenizer.decode(tokens_T1[start:end])
                row.append(text, colour if counts else f"dim {colour}")
        rows.append(row)
    return rows


def length_lines(split: Split) -> list[str]:
    """A histogram of tokens a document, by powers of two, and its quantiles."""
    lengths = np.concatenate([shard.lengths for shard in split.shards])
    powers, counts = np.unique(
        np.floor(np.log2(lengths)).astype(int), return_counts=True
    )
    lines = []
    for power in range(powers.min(), powers.max() + 1):
        count = int(counts[powers == power].sum())
        bar = "#" * round(_BAR * count / counts.max())
        span = f"{2**power:,}..{2 ** (power + 1) - 1:,}"
        lines.append(f"{span:>21} {count:>10,} {bar}".rstrip())
    shown = np.quantile(lengths, _QUANTILES).round().astype(int)
    named = zip(_QUANTILES, shown, strict=True)
    told = ", ".join(f"{q:.0%} {length:,}" for q, length in named)
    return ["tokens a document", *lines, f"quantiles: {told}"]


def num_copies(split: Split) -> int:
    """Documents whose tokens are those of one before them."""
    seen: set[bytes] = set()
    for shard in split.shards:
        tokens = shard.tokens  # by URL, the whole file
        for start, end in shard.spans():
            seen.add(xxhash.xxh3_128_digest(tokens[start:end].tobytes()))
    return split.num_documents - len(seen)


if __name__ == "__main__":
    sys.exit(main())
