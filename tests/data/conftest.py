"""Small data sets with documents of every awkward length."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxinfra.data import shards, writer
from jaxinfra.data.tokenizer import ByteTokenizer


@pytest.fixture
def make_split(tmp_path: pathlib.Path) -> Callable[..., shards.Split]:
    """A train split of documents with the given lengths (EOD included)."""

    def make(lengths: Sequence[int], *, shard_tokens: int = 10**6) -> shards.Split:
        rng = np.random.default_rng(len(lengths))
        documents = [
            np.append(rng.integers(1, 256, n - 1), 256).astype(np.uint16)
            for n in lengths
        ]
        content = writer.SplitContent(documents=documents, text_bytes=sum(lengths))
        folder = tmp_path / f"set-{len(list(tmp_path.iterdir()))}"
        dataset = writer.write_dataset(
            folder,
            tokenizer=ByteTokenizer(),
            splits={"train": content},
            shard_tokens=shard_tokens,
        )
        return dataset.split("train")

    return make
