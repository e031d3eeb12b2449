"""How fast text is prepared, beside the bare tokenizer library on the same texts.

    python scripts/peers/prepare_rates.py CORPUS TOKENIZER_JSON [--megabytes N]

CORPUS: a folder of JSONL files, as scripts/corpus.py makes it, of which N MB of text
are taken, from all files alike. Bare is `encode_batch` of `tokenizers` with all texts
in one list in memory and its own threads; ours is scripts/prepare.py from the file to
the written data set, start of its processes included. Prints rates as JSON, in MB
(10**6) of UTF-8 text a second. Needs the extras hf and data.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import runpy
import tempfile
import time

import tokenizers

from jaxinfra.data import cleaning, duplicates, sources

SCRIPT = pathlib.Path(__file__).parents[1] / "prepare.py"


def main():
    parser = argparse.ArgumentParser(prog="prepare_rates", allow_abbrev=False)
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("tokenizer_json", type=pathlib.Path)
    parser.add_argument("--megabytes", type=float, default=1e9, help="default: all")
    args = parser.parse_args()
    texts = taken(args.corpus, args.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    secs = {}
    library = tokenizers.Tokenizer.from_file(str(args.tokenizer_json))
    secs["bare"] = timed(lambda: library.encode_batch(texts, add_special_tokens=False))
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        file = folder / "corpus.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        del lines
        main = runpy.run_path(str(SCRIPT))["main"]
        command = [str(file), "--tokenizer", str(args.tokenizer_json.parent)]
        secs["prepare"] = timed(lambda: quiet(main, [*command, "--out", f"{folder}/a"]))
        one = [*command, "--workers", "1", "--out", f"{folder}/b"]
        secs["prepare, one process"] = timed(lambda: quiet(main, one))
    rules = cleaning.Rules(names=tuple(cleaning.CHANGES))
    steps = cleaning.steps(rules)
    secs["cleaning"] = timed(lambda: cleaning.clean(texts, steps))
    secs["exact duplicates"] = timed(lambda: duplicates.without_copies(texts))
    secs["near duplicates"] = timed(lambda: duplicates.without_near_copies(texts))
    rates = {name: megabytes / found for name, found in secs.items()}
    print(
        json.dumps(
            {
                "documents": len(texts),
                "megabytes": megabytes,
                "cores": os.cpu_count(),
                "tokenizers": importlib.metadata.version("tokenizers"),
                "megabytes_per_sec": rates,
                "ratio": rates["prepare"] / rates["bare"],
            },
            indent=1,
        )
    )


def taken(corpus, megabytes):
    """The first documents of every file, each file's share of them alike."""
    files = sources.find_files([corpus])
    share = min(1, megabytes * 1e6 / sum(file.stat().st_size for file in files))
    texts = []
    for file in files:
        left = share * file.stat().st_size
        for text in sources.read_documents([file]):
            left -= len(text.encode())
            if left < 0 and share < 1:
                break
            texts.append(text)
    return texts


def quiet(main, argv):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(argv)
    if code:
        raise SystemExit(told.getvalue())


def timed(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
