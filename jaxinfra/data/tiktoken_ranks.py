"""tiktoken's files: base64 of a token's bytes, a space and its rank, a line each.

Such a file says neither how text is split nor which special tokens there are; the
number of its ranks tells a known one.

Sources: tiktoken's openai_public.py; the tokenizers of Qwen and of Llama 3.1, whose
file is Llama 3's. Limits: Llama's reserved tokens, which its publishers number in
several ways, have no names here.
"""

import base64
import pathlib
import re
from typing import Literal

from jaxinfra.config import DataError

Pattern = Literal["gpt2", "cl100k", "qwen", "o200k"]

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
PATTERNS: dict[str, str] = {
    "gpt2": _GPT2,
    "cl100k": _CL100K,  # and Llama 3's
    "qwen": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
    "o200k": _WORD % f"{_UPPER}*{_LOWER}+"
    + _WORD % f"{_UPPER}+{_LOWER}*"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_MAX_RANK = 2**31
_EOT, _PROMPT = "<|endoftext|>", "<|endofprompt|>"
# Number of ranks -> pattern, and special tokens: first the one that ends a text.
_KNOWN: dict[int, tuple[Pattern, dict[str, int]]] = {
    50_256: ("gpt2", {_EOT: 50_256}),
    50_280: ("gpt2", {_EOT: 50_256}),  # p50k
    100_256: ("cl100k", {_EOT: 100_257, _PROMPT: 100_276}),
    128_000: (
        "cl100k",
        {
            "<|end_of_text|>": 128_001,
            "<|begin_of_text|>": 128_000,
            "<|finetune_right_pad_id|>": 128_004,
            "<|start_header_id|>": 128_006,
            "<|end_header_id|>": 128_007,
            "<|eom_id|>": 128_008,
            "<|eot_id|>": 128_009,
            "<|python_tag|>": 128_010,
        },
    ),
    151_643: ("qwen", {_EOT: 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645}),
    199_998: ("o200k", {_EOT: 199_999, _PROMPT: 200_018}),
}


def is_ranks(data: bytes) -> bool:
    """Whether a file's content begins as such a file does."""
    return re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data) is not None


def read(data: bytes, *, where: pathlib.Path) -> dict[bytes, int]:
    """Token -> rank, every byte among them; raises DataError if the file is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(
                f"{where}:{number} is not base64, a space and a rank ({error}); "
                "restore the file"
            ) from error
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    is_small = all(0 <= rank < _MAX_RANK for rank in ranks.values())
    if not (has_bytes and is_small and len(set(ranks.values())) == len(ranks)):
        raise DataError(
            f"{where} must have a rank of its own, below {_MAX_RANK}, for every token, "
            "and tokens for all 256 bytes; restore the file"
        )
    return ranks


def known(ranks: dict[bytes, int]) -> tuple[Pattern | None, dict[str, int]]:
    """The pattern by which text is split, None if the file is no known one, and the
    special tokens, first the one that ends a text."""
    return _KNOWN.get(len(ranks), (None, {_EOT: max(ranks.values()) + 1}))


def spelled(ranks: dict[bytes, int]) -> dict[str, int]:
    """The tokens as byte-level BPE writes them, in the order of their ranks."""
    letters = byte_letters()
    return {
        "".join(letters[byte] for byte in token): rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    }


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where it prints,
    else one from U+0100 on. Source: bytes_to_unicode of GPT-2's encoder.py."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(b if b in prints else 256 + others.index(b)) for b in range(256)]
