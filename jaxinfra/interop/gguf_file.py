"""llama.cpp's GGUF files of Llama-like models, read as a published folder is.

Quantized tensors are made float32 as they are read, by the `gguf` package (extra
`gguf`); the metadata become the fields of a `config.json` and the files of a
tokenizer. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfra.config import ConfigError, DataError, RopeScaling, did_you_mean
from jaxinfra.interop import families, hf, hf_config
from jaxinfra.ops import layers

# Architectures -> families of the same function. llama.cpp turns rotary pairs that are
# neighbours in `llama` and stores queries and keys in that order.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NEIGHBOURS = ("llama",)

# Settings `ARCHITECTURE.name`: read below; without effect on what is computed; and
# without effect at the value here. Any other is refused.
_READ = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.freq_base",
    "rope.scaling.original_context_length",
)  # fmt: skip
_IGNORED = ("rope.scaling.finetuned", "tensor_data_layout")
_NEUTRAL = {
    "attention.causal": True, "attention.sliding_window": 0, "expert_count": 0,
    "expert_used_count": 0, "logit_scale": 1.0, "rope.scale_linear": 1.0,
    "rope.scaling.factor": 1.0, "rope.scaling.type": "none",
    "use_parallel_residual": False,
}  # fmt: skip
# Llama 3's scaled rotary: files have the divisors of its frequencies, and these made
# them. Source: config.json of Llama 3.1 (8) and 3.2 (32).
_SCALED = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3_FACTORS = (8.0, 32.0)

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How text is cut before byte-pair merges, by the name in the file.
_BYTES = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(pattern: str) -> dict[str, Any]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    whole = _BYTES | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, whole]}


_CUTS = {
    "gpt-2": _BYTES,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES],
    },
    "llama-bpe": _split_by(_WORDS % "{1,3}"),
    "qwen2": _split_by(_WORDS % ""),
}


def open_file(file: pathlib.Path) -> hf.Published:
    """The model of a GGUF file, as `hf.read_params` takes it.

    Raises DataError for a damaged file, ConfigError for a model that is not known here.
    """
    reader = _open(file)
    about = _Metadata(reader)
    kind = about.get("general.architecture")
    if kind not in _FAMILIES:
        raise ConfigError(
            f"{file}: architecture {kind!r} is not one of {', '.join(_FAMILIES)}"
            f"{did_you_mean(str(kind), _FAMILIES)}"
        )
    names = {tensor.name: tensor for tensor in reader.tensors}
    fields = _config_fields(file, about, kind, is_tied="output.weight" not in names)
    if _SCALED in names:
        factors_h = _Stored(file, names.pop(_SCALED), heads=0).read()
        fields["rope_scaling"] = _scaling(file, factors_h, fields)
    model = hf_config.read_config(fields, where=str(file))
    heads = {"attn_q": model.num_heads, "attn_k": model.num_kv_heads}
    stored = {
        _published_name(file, name): _Stored(
            file, tensor, _turned_heads(name, heads) if kind in _NEIGHBOURS else 0
        )
        for name, tensor in names.items()
    }
    return hf.Published(file, model, families.FAMILIES[_FAMILIES[kind]], lambda: stored)


def tokenizer_files(file: pathlib.Path) -> dict[str, str]:
    """`tokenizer.json`, `tokenizer_config.json` and, for the ids that end a text,
    `generation_config.json` as text, for byte-pair tokenizers.

    Raises ConfigError for another kind, DataError for ids that are none.
    """
    about = _Metadata(_open(file))
    kind, cut = (about.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or cut not in _CUTS:
        raise ConfigError(
            f"{file}: a tokenizer of kind {kind!r}, cut {cut!r}, is not read from "
            "GGUF; give the tokenizer of the model's published folder"
        )
    tokens = about.get("tokenizer.ggml.tokens", [])
    types = about.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise DataError(
            f"{file} has {len(tokens)} tokens with {len(types)} types; download it "
            "again"
        )

    def token(key: str) -> tuple[int, str] | None:
        number = about.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            return None
        if not 0 <= number < len(tokens):
            raise DataError(
                f"{file}: tokenizer.ggml.{key}_token_id={number} is none of its "
                f"{len(tokens)} tokens; download it again"
            )
        return int(number), tokens[number]

    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] == 3,  # 3: control, 4: user-defined
        }
        for i in range(len(tokens))
        if types[i] in (3, 4)
    ]
    merges = [merge.split(" ", 1) for merge in about.get("tokenizer.ggml.merges", ())]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _CUTS[cut],
        "post_processor": None,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(about.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
        if found := token(key):
            settings[f"{role}_token"] = found[1]
    ends = [found[0] for key in ("eos", "eot", "eom") if (found := token(key))]
    if template := about.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(described, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
        "generation_config.json": json.dumps({"eos_token_id": ends}),
    }


@dataclasses.dataclass(frozen=True)
class _Stored:
    """`hf.Stored` of a GGUF tensor; `heads` above 0: its rows pair neighbours."""

    file: pathlib.Path
    tensor: Any
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.tensor.shape))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        import gguf

        rows = slice(start, stop)
        cut = slice(None) if self.heads else rows
        array = gguf.quants.dequantize(self.tensor.data[cut], self.tensor.tensor_type)
        if self.heads:
            pairs = array.reshape(self.heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)[rows]
        return array


def _open(file: pathlib.Path) -> Any:
    """A reader of the file. One is kept, since its lists of tokens take seconds to
    read, and a model and its tokenizer are opened one after the other."""
    try:
        about = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return _reader(file, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _reader(file: pathlib.Path, *version: int) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{file} needs the extra gguf: pip install 'jaxinfra[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(file)
        for tensor in reader.tensors:  # a file that is cut off has not all of them
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} is cut off")
        return reader
    except Exception as error:  # the reader raises whatever damaged bytes lead to
        raise _unreadable(file, error) from error


def _unreadable(file: pathlib.Path, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read as GGUF ({error}); download it again")


class _Metadata:
    """The file's settings by name, each read when it is asked for."""

    def __init__(self, reader: Any):
        self._fields = reader.fields

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that begin with it."""
        return [n.removeprefix(prefix) for n in self._fields if n.startswith(prefix)]

    def get(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def count(self, name: str) -> int:
        """Items of a list, 0 where there is none."""
        field = self._fields.get(name)
        return 0 if field is None else len(field.data)


def _config_fields(
    file: pathlib.Path, about: _Metadata, kind: str, *, is_tied: bool
) -> dict[str, Any]:
    """The fields that the model's config.json would have."""

    def take(name: str) -> Any:
        if (value := about.get(f"{kind}.{name}")) is None:
            raise DataError(f"{file} does not say {kind}.{name}; convert it again")
        return value

    heads = take("attention.head_count")
    width = take("embedding_length")
    head_dim = about.get(f"{kind}.attention.key_length", width // max(heads, 1))
    vocab_size = about.count("tokenizer.ggml.tokens")
    neutral = _NEUTRAL | {
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": vocab_size,
    }
    for name in about.names(f"{kind}."):
        value = about.get(f"{kind}.{name}")
        if name in neutral and value != neutral[name]:
            raise ConfigError(
                f"{file}: {kind}.{name}={value!r} is not supported, only "
                f"{neutral[name]!r}"
            )
        if name not in (*_READ, *_IGNORED, *neutral):
            raise ConfigError(f"{file}: {kind}.{name}={value!r} is not known here")
    return {
        "model_type": _FAMILIES[kind],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": take("block_count"),
        "max_position_embeddings": take("context_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": about.get(f"{kind}.attention.head_count_kv", heads),
        # Written as float32: the shortest number that is the same one.
        "rms_norm_eps": _shortest(take("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(about.get(f"{kind}.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": is_tied,
    } | ({} if kind == "qwen2" else {"head_dim": head_dim})


def _scaling(
    file: pathlib.Path, factors_h: np.ndarray, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The published scaling of rotary frequencies that has these divisors."""
    for factor in _LLAMA3_FACTORS:
        scaling = _LLAMA3 | {"factor": factor}
        like = {**fields, "rope_scaling": scaling}
        model = hf_config.read_config(like, where=str(file))
        plain_h, scaled_h = (
            layers.rope_frequencies(model.head_width, model.rope_theta, kind)
            for kind in (RopeScaling(), model.rope_scaling)
        )
        if factors_h.shape == plain_h.shape and np.allclose(
            factors_h, plain_h / scaled_h, rtol=1e-5
        ):
            return scaling
    raise ConfigError(
        f"{file}: {_SCALED} is not the scaling of Llama 3.1 or 3.2; use the model's "
        "safetensors folder"
    )


def _shortest(number: float) -> float:
    return float(str(np.float32(number)))


def _published_name(file: pathlib.Path, name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    parts = name.split(".")
    match parts:
        case ["blk", number, part, kind] if part in _LAYER_TENSORS:
            return f"model.layers.{number}.{_LAYER_TENSORS[part]}.{kind}"
    raise ConfigError(f"{file}: tensor {name!r} is not known here; convert it again")


def _turned_heads(name: str, heads: Mapping[str, int]) -> int:
    parts = name.split(".")
    return heads.get(parts[2], 0) if parts[0] == "blk" else 0
