"""A model written as a folder: the published form, or a run folder of one step.

Both are made beside their name and renamed when they are whole, so that nothing half-
written ever stands under it.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfra import options, params, runfolder
from jaxinfra.checkpoint import lifecycle
from jaxinfra.config import Config, ConfigError, DataError, ModelConfig
from jaxinfra.data import tokenizer_training
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokenizer_json import HfTokenizer
from jaxinfra.interop import families, hf, hf_config, tensorfile
from jaxinfra.models.specs import param_specs
from jaxinfra.params import Tree
from jaxinfra.quant import rescaled
from jaxinfra.quant.compression import Compression

# What a published folder may hold of its text side; copied as it is.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
GENERATION = "generation_config.json"  # of which the ids that end a text are read
RUN_PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16_params"}
TOKENIZER_FOLDER = "tokenizer"  # of a run folder: those files, as they came


def write_published(
    folder: pathlib.Path,
    weights: Tree,
    model: ModelConfig,
    *,
    family: str = "",
    dtype: Any = np.float32,
    files: Mapping[str, bytes],
    shard_bytes: int = tensorfile.SHARD_BYTES,
) -> str:
    """Writes config.json, safetensors and `files`; returns the family it was written
    as: `family`, or the first that fits.

    Raises ConfigError where no family, or not that one, has such a model, and DataError
    if the disk refuses; then nothing is there.
    """
    fields = hf_config.write_config(model, family)
    family = fields["model_type"]
    dtype = np.dtype(dtype)
    fields |= {"dtype": dtype.name, "torch_dtype": dtype.name}
    fields |= _ids(files)
    with made_folder(folder) as made:
        _write(made / "config.json", json.dumps(fields, indent=2).encode() + b"\n")
        hf.write_params(
            made,
            weights,
            model,
            param_specs(model),
            families.FAMILIES[family],
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        for name, data in files.items():
            _write(made / name, data)
    return family


def write_run(
    folder: pathlib.Path,
    weights: Tree,
    model: ModelConfig,
    *,
    tokenizer: Tokenizer | None,
    files: Mapping[str, bytes],
    how: Compression | None = None,
) -> None:
    """Writes a run folder whose one step, 0, holds the parameters alone.

    `--init.from`, `generate` and `evaluate` take it; it is not to be trained on under
    its own name. how: what of `weights` is in few bits. Raises DataError if the disk
    refuses; then nothing is there.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name).lstrip("_.-") or "model"
    leaves = jax.tree.leaves(weights, is_leaf=rescaled.in_few_bits)
    [dtype] = {x.dtype.name for x in leaves if not rescaled.in_few_bits(x)}
    if dtype not in RUN_PRECISIONS:
        raise ConfigError(
            f"a run folder holds parameters in {' or '.join(RUN_PRECISIONS)}, and not "
            f"in {dtype}; choose one of them by --dtype"
        )
    config = Config(name=name, model=model, precision=RUN_PRECISIONS[dtype])
    specs = param_specs(model)
    with made_folder(folder) as made:
        runfolder.write_json(made / "config.json", options.to_json(config))
        if tokenizer is not None:
            runfolder.write_json(made / runfolder.TOKENIZER, tokenizer.to_json())
        for file, data in files.items():
            (made / TOKENIZER_FOLDER).mkdir(exist_ok=True)
            _write(made / TOKENIZER_FOLDER / file, data)
        saver = lifecycle.Checkpointer(
            made / runfolder.CHECKPOINTS, keep=1, run_id=uuid.uuid4().hex, attempt=1
        )
        saver.save(
            0,
            {f"params/{path}": leaf for path, leaf in params.named(weights)},
            metadata={
                "config": options.to_json(config),
                "data": {runfolder.COMPRESSED: how.to_json()} if how else {},
            },
            logical_shapes={f"params/{p}": s.shape for p, s in params.named(specs)},
        )
        saver.close()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files by which other libraries read the tokenizer; none for those that are
    ours alone."""
    if not isinstance(tokenizer, HfTokenizer):
        return {}
    texts = tokenizer_training.published_files(tokenizer)
    return {name: text.encode() for name, text in texts.items()}


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """The tokenizer's files that stand in a folder."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {name: (folder / name).read_bytes() for name in present}


def _ids(files: Mapping[str, bytes]) -> dict[str, int | None]:
    """bos_token_id and eos_token_id for config.json, as the tokenizer's files say; null
    where they do not, since a family's own default may be no id of this model."""
    ids: dict[str, int | None] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    if not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return ids
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        described = json.loads(files["tokenizer.json"])
        settings = json.loads(files["tokenizer_config.json"])
        vocab = dict(described["model"]["vocab"]) if _is_map(described) else {}
        vocab |= {t["content"]: t["id"] for t in described.get("added_tokens", [])}
        names = {role: settings.get(f"{role}_token") for role in ("bos", "eos")}
        texts = {
            r: n["content"] if isinstance(n, dict) else n for r, n in names.items()
        }
        ids |= {f"{r}_token_id": vocab[n] for r, n in texts.items() if n in vocab}
    return ids


def _is_map(described: Any) -> bool:
    return isinstance(described["model"].get("vocab"), dict)


@contextlib.contextmanager
def made_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which gets its name when the block ends well."""
    if folder.exists():
        raise ConfigError(f"--to {folder} is there already; choose another folder")
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        _fsync(made)
        os.rename(made, folder)
        _fsync(folder.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _fsync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: pathlib.Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
