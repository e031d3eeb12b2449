"""Tokenizer files of other projects -> `HfTokenizer`.

    folder            tokenizer.json, or what `transformers` makes one of (vocab.json
                      with merges.txt, vocab.txt, tokenizer.model, ...)
    tokenizer.json    of any name
    SentencePiece     a .model file, unigram or BPE
    tiktoken          a file of ranks; see `tiktoken_ranks`

A file is told by its content. What its own settings say of the beginning and the end
of documents is the default of the policy; where they do not say, `load` asks.

Source: google/sentencepiece's sentencepiece_model.proto. Limits: a unigram model
without a piece for "<" reads "<0x41>" in a text as that byte.
"""

import importlib.util
import json
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from jaxinfra.config import DataError, did_you_mean
from jaxinfra.data import tiktoken_ranks, urls
from jaxinfra.data.tokenizer import BosRule
from jaxinfra.data.tokenizer_json import NEEDS_HF, HfTokenizer, parse_tokenizer_json

_SETTINGS = (  # the first that says something counts
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
# Key of these files -> what it must be.
_EXPECTED = {
    "eos_token": "a token",
    "bos_token": "a token",
    "eos_token_id": "an id, or a list of ids",
    "bos_token_id": "an id, or a list of ids",
    "add_bos_token": "true or false",
    "added_tokens_decoder": 'an object of {"content": ...} by id',
    "chat_template": 'a text, or a list of {"name": ..., "template": ...}',
}
_MAX_ID = 2**32 - 1  # of the library
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # pieces


class _Found(NamedTuple):
    """What a file gave: `tokenizers.Tokenizer`, its JSON, and its own policy."""

    tokenizer: Any
    text: str
    eos: str = ""
    bos: str = ""
    adds_bos: bool = False
    is_ranks: bool = False


def load_tokenizer(
    path: str | pathlib.Path,
    *,
    eod: str = "",
    bos: BosRule = "tokenizer",
    pattern: tiktoken_ranks.Pattern | Literal[""] = "",
) -> HfTokenizer:
    """The tokenizer of a folder or file.

    eod: the token that ends a document, by its text; empty takes the EOS token of the
    settings beside the tokenizer. bos: whether a document starts with the BOS token:
    as the tokenizer's settings or its post-processor say, or always, or never (a bare
    SentencePiece or tiktoken file says never). pattern: how the text of a tiktoken file
    is split; empty tells it by the number of ranks. Raises DataError, naming the path
    and what to set.
    """
    urls.check_local(path, key="data.tokenizer", fix="copy its files here first")
    path = pathlib.Path(path).expanduser()
    if bos not in get_args(BosRule):
        raise DataError(f"data.bos={bos!r} must be one of {get_args(BosRule)}")
    found = _folder(path) if path.is_dir() else _file(path, pattern)
    if pattern and not found.is_ranks:
        raise DataError(f"{path} holds no tiktoken ranks; leave the pattern out")
    vocabulary = found.tokenizer.get_vocab(with_added_tokens=True)
    eod_token = eod or found.eos
    if eod_token not in vocabulary:
        names = [t.content for t in found.tokenizer.get_added_tokens_decoder().values()]
        what = (
            f"data.eod={eod!r} is not a token of {path}"
            if eod
            else f"{path} does not say which of its tokens ends a document"
        )
        raise DataError(
            f"{what}; set data.eod (prepare: --eod) to the text of one, such as one of "
            f"{names[:8]}{did_you_mean(eod, names) if eod else ''}"
        )
    has_bos = bos == "always" or (bos == "tokenizer" and found.adds_bos)
    if has_bos and found.bos not in vocabulary:
        raise DataError(
            f"data.bos=always, but {path} names no BOS token; add bos_token to its "
            "tokenizer_config.json, or set data.bos to never"
        )
    return HfTokenizer(
        found.text,
        vocab_size=1 + max(vocabulary.values()),
        eod_id=vocabulary[eod_token],
        bos_id=vocabulary[found.bos] if has_bos else None,
    )


def settings_of(path: str | pathlib.Path) -> dict[str, Any]:
    """What the JSON files of a tokenizer's folder say, tokens as their texts; nothing
    for a file but a tokenizer.json. Raises DataError for what is no JSON object, and
    for what `_EXPECTED` does not expect."""
    path = pathlib.Path(path).expanduser()
    if not path.is_dir() and path.name != "tokenizer.json":
        return {}
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        if not (folder / name).is_file():
            continue
        try:
            found = json.loads(_read(folder / name))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{folder / name} is not JSON ({error})") from error
        if not isinstance(found, dict):
            raise DataError(f"{folder / name} must be a JSON object; restore the file")
        for key, value in found.items():
            if value is not None and not _is_expected(key, value):
                raise DataError(
                    f"{folder / name}: {key} is {json.dumps(value)[:80]}, and must be "
                    f"{_EXPECTED[key]}; correct it, or restore the file"
                )
            if isinstance(value, dict) and isinstance(value.get("content"), str):
                value = value["content"]
            if value is not None:
                settings.setdefault(key, value)
    return settings


def _is_expected(key: str, value: Any) -> bool:
    match key:
        case "eos_token" | "bos_token":
            return isinstance(value, str) or _has_texts(value, "content")
        case "eos_token_id" | "bos_token_id":
            ids = value if isinstance(value, list) else [value]
            return all(isinstance(i, int) and i <= _MAX_ID for i in ids)
        case "add_bos_token":
            return isinstance(value, bool)
        case "added_tokens_decoder":
            return isinstance(value, dict) and all(
                re.fullmatch("[0-9]{1,9}", number) and _has_texts(token, "content")
                for number, token in value.items()
            )
        case "chat_template":
            return isinstance(value, str) or (
                isinstance(value, list)
                and all(_has_texts(one, "name", "template") for one in value)
            )
    return True


def _has_texts(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in keys)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path"
        ) from error


def _folder(path: pathlib.Path) -> _Found:
    if (path / "tokenizer.json").is_file():
        return _file(path / "tokenizer.json", "")
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        what = f"{path}, which has no tokenizer.json,"
        raise DataError(NEEDS_HF.format(what=what)) from error
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        text = made.backend_tokenizer.to_str()
    except Exception as error:  # whatever a file of whatever format leads to
        raise DataError(
            f"transformers {transformers.__version__} makes no tokenizer of {path} "
            f"({' '.join(str(error).split())[:200]}); give the file itself"
        ) from error
    settings = {"eos_token": made.eos_token, "bos_token": made.bos_token}
    settings |= settings_of(path)
    return _with_policy(text, settings, where=path)


def _file(path: pathlib.Path, pattern: str) -> _Found:
    data = _read(path)
    if data.lstrip()[:1] == b"{":
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error
        return _with_policy(text, settings_of(path), where=path)
    if not importlib.util.find_spec("tokenizers"):
        raise DataError(NEEDS_HF.format(what=path))
    if tiktoken_ranks.is_ranks(data):
        return _tiktoken(data, pattern, where=path)
    try:
        return _sentencepiece(data, where=path)
    except DataError:
        raise
    except Exception as error:  # of ours or the library's, by whatever is damaged
        raise DataError(
            f"{path} is no tokenizer.json, no tiktoken ranks and no SentencePiece "
            f"model ({error}); restore the file"
        ) from error


def _with_policy(text: str, settings: dict[str, Any], *, where: Any) -> _Found:
    """A tokenizer.json with what the settings beside it say."""
    made = parse_tokenizer_json(text, where=where)
    import tokenizers

    listed = settings.get("added_tokens_decoder", {})
    for number, token in listed.items():  # in the order of their ids
        name, is_special = token["content"], bool(token.get("special"))
        if made.token_to_id(name) is None:  # tokenizer.json is older
            made.add_tokens([tokenizers.AddedToken(name, special=is_special)])
            text = made.to_str()
        if made.token_to_id(name) != int(number):
            raise DataError(
                f"{where}: tokenizer_config.json says that {name!r} has id {number}, "
                "and tokenizer.json does not; restore both files"
            )
    eos = settings.get("eos_token") or _named(made, settings.get("eos_token_id"))
    bos = settings.get("bos_token") or _named(made, settings.get("bos_token_id"))
    plain = made.encode("a", add_special_tokens=False).ids
    first, *rest = made.encode("a").ids or [None]
    starts_with_bos = bool(plain) and rest[: len(plain)] == plain
    if starts_with_bos and (not bos or "add_bos_token" not in settings):
        bos = made.id_to_token(first)
    adds_bos = bool(settings.get("add_bos_token", starts_with_bos))
    return _Found(made, text, eos=eos, bos=bos, adds_bos=adds_bos)


def _named(tokenizer: Any, number: Any) -> str:
    first = number[0] if isinstance(number, list) and number else number
    is_id = isinstance(first, int) and first >= 0
    return (tokenizer.id_to_token(first) or "") if is_id else ""


def _merges(tokens: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Every pair of tokens that is a third, in the order of the third: BPE's merges."""
    rank = {token: number for number, token in enumerate(tokens)}
    for token in rank:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in rank and b in rank]
        yield from sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))


def _tiktoken(data: bytes, pattern: str, *, where: pathlib.Path) -> _Found:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ranks = tiktoken_ranks.read(data, where=where)
    known, special = tiktoken_ranks.known(ranks)
    if not (pattern or known):
        raise DataError(
            f"{where} has {len(ranks)} ranks, and no tokenizer known here has so many; "
            "say how text is split: prepare --tiktoken_pattern, one of "
            f"{[*tiktoken_ranks.PATTERNS]}"
        )
    spelled = tiktoken_ranks.spelled(ranks)
    made = tokenizers.Tokenizer(
        models.BPE(spelled | special, list(_merges(spelled)), ignore_merges=True)
    )
    split = tokenizers.Regex(tiktoken_ranks.PATTERNS[pattern or known])
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), to_letters]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*special])
    eos, bos = next(iter(special)), next((t for t in special if "begin" in t), "")
    return _Found(made, made.to_str(), eos=eos, bos=bos, is_ranks=True)


def _sentencepiece(data: bytes, *, where: pathlib.Path) -> _Found:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces, trainer, normalizer = _parse_sentencepiece(data)
    model_type = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}.get(trainer.get(3, 1))
    names, kinds = [name for name, *_ in pieces], [kind for *_, kind in pieces]
    for is_there, what in (
        (model_type not in ("unigram", "bpe"), f"model type {model_type}"),
        (_UNUSED in kinds, "unused pieces"),
        (_UNKNOWN not in kinds, "no piece for unknown text"),
        (trainer.get(24, 0), "whitespace as a suffix"),
        (not normalizer.get(5, 1), "spaces that are not escaped"),
    ):
        if is_there:
            raise DataError(
                f"{where} has {what}, which is not read; train the model again without"
            )
    unknown, has_bytes = kinds.index(_UNKNOWN), bool(trainer.get(35, 0))
    if model_type == "unigram":
        # A text is never a control or byte piece: what spells it out scores higher.
        low = 20 * min(score for _, score, _ in pieces)
        is_text = [kind in (_NORMAL, _USER_DEFINED) for kind in kinds]
        scored = [(n, s if ok else low) for (n, s, _), ok in zip(pieces, is_text)]
        model = models.Unigram(scored, unknown, has_bytes)
    else:
        # Scores fall from merge to merge.
        order = sorted((-s, i) for i, (_, s, k) in enumerate(pieces) if k == _NORMAL)
        model = models.BPE(
            {name: i for i, name in enumerate(names)},
            list(_merges(names[i] for _, i in order)),
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    made = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if normalizer.get(2):
        steps.append(normalizers.Precompiled(normalizer[2]))
    if normalizer.get(4, 1):
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    has_prefix = bool(normalizer.get(3, 1))
    if has_prefix:  # of a text, and not of a user-defined piece, which is looked for in
        # normalized text, itself normalized.
        own = "|".join(re.escape(n) for n, k in zip(names, kinds) if k == _USER_DEFINED)
        start = tokenizers.Regex(rf"\A(?!(?:{own})\z)(?=.|\n)")
        steps.append(normalizers.Replace(start, "\u2581"))
    steps.append(normalizers.Replace(" ", "\u2581"))
    made.normalizer = normalizers.Sequence(steps)
    spaces = decoders.Replace("\u2581", " ")
    ends = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    made.decoder = decoders.Sequence(
        [spaces, decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    for is_special, added in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        kind_of = {"special": is_special, "normalized": not is_special}
        found = [name for name, kind in zip(names, kinds) if kind in added]
        made.add_tokens([tokenizers.AddedToken(name, **kind_of) for name in found])
    eos, bos = ([*names, ""][trainer.get(key, key - 40)] for key in (42, 41))  # -1: no
    return _Found(made, made.to_str(), eos=eos, bos=bos)


def _parse_sentencepiece(data: bytes) -> tuple[list[tuple[str, float, int]], Any, Any]:
    """(text, score, kind) of every piece, the trainer's and the normalizer's fields."""
    pieces, specs = [], {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            [score] = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
        elif number in (2, 3):
            specs[number] = dict(_fields(value))
    if not pieces or len(specs) < 2:
        raise ValueError("it is cut off")
    return pieces, specs[2], specs[3]


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: an int or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - 2**64 if value >= 2**63 else value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7, -1)
        value = message[at : at + size]
        if size < 0 or len(value) != size:
            raise ValueError(f"a field is cut off at byte {at}")
        at += size
        yield key >> 3, value
