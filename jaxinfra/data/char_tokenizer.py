"""Characters of one corpus as tokens: for small experiments on plain text."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxinfra.config import DataError
from jaxinfra.data.tokenizer import checked_ids, id_dtype, json_sha256

_CODE_POINT = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """The given characters in the order of their code points; the last id is EOD."""

    characters: str
    name = "char"
    bos_id = None

    def __post_init__(self):
        if not self.characters:
            raise DataError("a char tokenizer needs at least one character; got none")
        object.__setattr__(self, "characters", "".join(sorted(set(self.characters))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    @property
    def eod_id(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        table, codes = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(table, codes)
        known = table[np.minimum(ids, len(table) - 1)] == codes
        if not known.all():
            position = int(np.argmin(known))
            raise DataError(
                f"character {text[position]!r} at position {position} is not one of "
                f"the tokenizer's {len(table)} characters; remove it, or prepare the "
                "data with the byte tokenizer"
            )
        return ids.astype(id_dtype(self.vocab_size))

    def encode_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)

    def decode(self, ids: np.ndarray) -> str:
        ids = checked_ids(ids, self.vocab_size)
        codes = _code_points(self.characters)[ids[ids != self.eod_id]]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}

    def digest(self) -> str:
        return json_sha256(self.to_json())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), _CODE_POINT)
