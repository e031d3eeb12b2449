"""Makes a corpus of about 130 MB of English from Debian packages: for measuring.

    python scripts/corpus.py data/debmix

Kernel documentation, two dictionaries and WordNet, Python's documentation, the Jargon
File and the shipped plays: one JSONL file each, a text a line. Needs a Debian machine
(`apt-get download`, no root). The texts keep their licences (GPL, WordNet, PSF, GFDL,
public domain), and none is shipped with the project.
"""

import gzip
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

from jaxinfra.data import prepare

PACKAGES = (
    "linux-doc-6.1",
    "python3.11-doc",
    "dict-gcide",
    "dict-wn",
    "dict-foldoc",
    "jargon-text",
)
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def main(out: str) -> None:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=root, check=True)
        for package in root.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        share = root / "usr" / "share"
        kernel = share / "doc" / "linux-doc-6.1" / "Documentation"
        sources = share / "doc" / "python3.11" / "html" / "_sources"
        jargon = share / "doc" / "jargon-text" / "jargon.txt.gz"
        for name, texts in {
            "kernel": _files(kernel.rglob("*")),
            "python": _files(sources.rglob("*.txt*")),
            "gcide": _entries(share / "dictd" / "gcide"),
            "wordnet": _entries(share / "dictd" / "wn"),
            "foldoc": _entries(share / "dictd" / "foldoc"),
            "jargon": _files([jargon]),
            "shakespeare": _files([prepare.CORPORA["shakespeare"]]),
        }.items():
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
                for text in texts:
                    lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _files(paths: Iterable[pathlib.Path]) -> Iterator[str]:
    """The files that are UTF-8 text, unpacked."""
    for path in sorted(paths):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            try:
                text = (
                    gzip.decompress(data) if path.suffix == ".gz" else data
                ).decode()
            except UnicodeDecodeError:
                continue
            if text.strip() and "\x00" not in text:
                yield text


def _entries(path: pathlib.Path) -> Iterator[str]:
    """The entries of a dictionary in DICT's format: an index of offsets and lengths in
    base 64, beside a text in gzip."""
    whole = gzip.decompress(path.with_suffix(".dict.dz").read_bytes())
    places = set()
    for line in path.with_suffix(".index").read_text(encoding="utf-8").splitlines():
        _, offset, length = line.rsplit("\t", 2)
        places.add((_number(offset), _number(length)))
    for offset, length in sorted(places):
        text = whole[offset : offset + length].decode("utf-8", "replace")
        if text.strip():
            yield text


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _DIGITS.index(digit)
    return number


if __name__ == "__main__":
    main(*sys.argv[1:])
