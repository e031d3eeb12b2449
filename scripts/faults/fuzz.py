"""Damaged texts by the thousand: manifests, configs, headers, command lines."""

import copy
import dataclasses
import json
import pathlib
import random
import re
import resource
import string
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from faults import rig as rigs
from faults import table
from faults.rig import Outcome, Rig
from jaxinfra import options, runfolder
from jaxinfra.checkpoint import integrity
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.config import RESUMABLE, ConfigError, DataError
from jaxinfra.data import idx, shards, tokenizer, writer
from jaxinfra.interop import hf_config, tensorfile

MAX_SECS = 5.0
MAX_MIB = 64
_TYPED = (CheckpointError, ConfigError, DataError)
_ROWS = {row.number: row for row in table.ROWS}
_VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, True, None, "", "x",
    "../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", [], {}, [[]], {"a": {}},
    [0] * 40, "float32", "object",
)  # fmt: skip


class Target(NamedTuple):
    """Sound bytes and how they are read; `is_json`: values in it are changed too."""

    name: str
    sound: bytes
    read: Callable[[bytes], Any]
    is_json: bool = True
    head: int = 1 << 20  # bytes are changed among the first so many


def trial_25(rig: Rig, number: int) -> Outcome:
    """Two thousand inputs, of every kind in turn."""
    count = _ROWS["25"].each
    out, chance = Outcome(count=count), rig.random("25", number)
    quiet = rig.quiet

    def run(folder: pathlib.Path) -> dict[str, Any]:
        targets = _targets(quiet, rig.words(folder), folder)
        for target in targets:
            target.read(target.sound)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        accepted, slowest, failures = 0, 0.0, []
        for turn in range(count):
            target = targets[turn % len(targets)]
            data = harmed(target, chance)
            began = time.monotonic()
            try:
                target.read(data)
                accepted += 1
            except _TYPED:
                pass
            except BaseException as error:
                failures.append(f"{target.name}: {error!r:.150} of {data[:150]!r}")
            slowest = max(slowest, time.monotonic() - began)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        return {
            "accepted": accepted,
            "slowest": slowest,
            "grown": grown,
            "failures": failures,
        }

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder))
    if ended.value is None:
        out.check(
            False, f"the interpreter ended with {ended.code}: {ended.text[-300:]}"
        )
        return out
    v = ended.value
    out.failures = v["failures"]
    out.check(v["slowest"] <= MAX_SECS, f"one took {v['slowest']:.1f} s")
    out.check(v["grown"] <= MAX_MIB, f"memory grew by {v['grown']:.0f} MiB")
    out.figures = {
        "accepted": v["accepted"],
        "max_secs": v["slowest"],
        "grown_mib": v["grown"],
    }
    return out


def harmed(target: Target, chance: random.Random) -> bytes:
    """The bytes with something wrong: a value, some bytes, the end."""
    data = bytearray(target.sound)
    kind = chance.choice(["value", "value", "bytes", "cut", "longer", "part"])
    if kind == "value" and target.is_json:
        value = json.loads(data)
        for _ in range(chance.choice([1, 1, 1, 3])):
            _change(value, chance)
        return json.dumps(value).encode("utf-8", "surrogatepass")
    match kind:
        case "cut":
            del data[chance.randrange(len(data)) :]
        case "longer":
            data += chance.randbytes(chance.randrange(1, 99))
        case "part":
            at = chance.randrange(min(target.head, len(data)))
            size = chance.randrange(1, 40)
            part = data[at : at + size]
            to = chance.randrange(min(target.head, len(data)))
            data[to:to] = part * chance.choice([1, 1, 50])
        case _:
            for _ in range(chance.choice([1, 1, 4, 64])):
                at = chance.randrange(min(target.head, len(data)))
                data[at] = chance.randrange(256)
    return bytes(data)


def _targets(
    quiet: pathlib.Path, words: list[str], folder: pathlib.Path
) -> list[Target]:
    """What is fuzzed; each reads all that a run would of it."""
    step = quiet / "checkpoints" / str(rigs.SAVE_EVERY)
    manifest = (step / integrity.MANIFEST).read_bytes()

    def signed(data: bytes) -> None:
        """A manifest whose own digest is right, as a forger would make it."""
        try:
            body = json.loads(data)
            body.pop("sha256", None)
            data = integrity.dump(body)
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
        integrity.parse(data)

    config = (quiet / "config.json").read_bytes()
    resumed, _ = options.read_command(words)

    def resume(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        runfolder.check_resume(resumed)

    def in_file(name: str, read: Callable[[pathlib.Path], Any]) -> Any:
        def written(data: bytes) -> None:
            (folder / name).write_bytes(data)
            read(folder / name)

        return written

    def tensors(path: pathlib.Path) -> None:
        for stored in tensorfile.open_file(path).values():
            stored.read()

    data = writer.write_dataset(
        folder / "set",
        tokenizer=tokenizer.ByteTokenizer(),
        splits={"train": _content(), "held_out": _content()},
        shard_tokens=200,
    ).folder
    array = next(data.glob("*.tokens.npy"))

    def opened(path: pathlib.Path) -> None:
        for split in shards.open_dataset(path.parent, verify=False).splits.values():
            for shard in split.shards:
                np.array(shard.ends_D)
                shard.lengths.sum()

    def array_of(path: pathlib.Path) -> None:
        sound = path.read_bytes()
        array.write_bytes(sound)
        opened(data / shards.MANIFEST)

    images = struct.pack(">HBB3I", 0, 8, 3, 4, 3, 2) + bytes(24)
    published = json.dumps(LLAMA).encode()
    index = b'{"weight_map": {"x": "x-1.safetensors", "y": "y.safetensors"}}'
    described = json.dumps(tokenizer.ByteTokenizer().to_json()).encode()
    family = lambda d: hf_config.read_config(_json(d))
    return [
        Target("manifest", manifest, integrity.parse),
        Target("signed manifest", manifest, signed),
        Target("config.json", config, lambda d: options.from_json(_json(d), fill=True)),
        Target("config.json of a run", config, resume),
        Target("safetensors", _safetensors(folder), in_file("x.safetensors", tensors),
               is_json=False, head=300),
        Target("index", index, _index(folder)),
        Target("dataset.json", (data / shards.MANIFEST).read_bytes(),
               in_file(f"set/{shards.MANIFEST}", opened)),
        Target("npy", array.read_bytes(), in_file("a.npy", array_of), is_json=False,
               head=140),
        Target("tokenizer.json", described, lambda d: tokenizer.from_json(_json(d))),
        Target("published config", published, family),
        Target("idx", images, in_file("a.idx", lambda p: idx.read(p, num_dims=3)),
               is_json=False),
    ]  # fmt: skip


def _json(data: bytes) -> Any:
    """As the readers of these files do; what is no JSON is not theirs to refuse."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("no JSON") from error


def _index(folder: pathlib.Path) -> Callable[[bytes], None]:
    place = folder / "indexed"
    place.mkdir()
    for name in ("x-1.safetensors", "y.safetensors"):
        (place / name).write_bytes(_safetensors(folder, name[0]))

    def read(data: bytes) -> None:
        (place / tensorfile.INDEX).write_bytes(data)
        tensorfile.open_folder(place)

    return read


def _safetensors(folder: pathlib.Path, name: str = "") -> bytes:
    made = folder / f"made{name}"
    made.mkdir(exist_ok=True)
    names = [name] if name else ["a", "b.c"]
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = [
        tensorfile.Writing(n, values.dtype, values.shape, lambda: values) for n in names
    ]
    tensorfile.write_folder(made, tensors)
    return (made / tensorfile.WEIGHTS).read_bytes()


def _content() -> writer.SplitContent:
    documents = [np.append(np.arange(n) % 256, 256) for n in range(1, 30)]
    return writer.SplitContent(documents=documents, text_bytes=9)


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "rms_norm_eps": 1e-5,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "hidden_act": "silu", "rope_theta": 10000.0,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def _change(node: Any, chance: random.Random) -> None:
    """Another value, a key or an item more or less, somewhere in a JSON value."""
    while isinstance(node, dict | list) and node:
        keys = [*node] if isinstance(node, dict) else [*range(len(node))]
        key = chance.choice(keys)
        if isinstance(node[key], dict | list) and chance.random() < 0.8:
            node = node[key]
            continue
        match chance.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(chance.choice(_VALUES))] = copy.deepcopy(
                    chance.choice(_VALUES)
                )
            case _:
                node[key] = copy.deepcopy(chance.choice(_VALUES))
        return


def trial_28(rig: Rig, number: int) -> Outcome:
    """Fifty keys with a slip of the finger; the last trial changes fifty settings of a
    run that has begun."""
    out, chance = Outcome(count=50), rig.random("28", number)
    if number == _ROWS["28"].trials - 1:
        return _changed(rig, out, chance)
    keys = list(options.leaves(options.load_config("tiny")))
    hinted = 0
    while out.count and hinted + len(out.failures) < out.count:
        key = chance.choice(keys)
        wrong = _slip(key, chance)
        if wrong in keys or _is_section(wrong, keys):
            continue
        try:
            options.read_command([f"--{wrong}", "1"])
            out.check(False, f"--{wrong} was taken")
        except ConfigError as error:
            text = str(error)
            is_named = f"--{wrong}" in text
            is_hint = "did you mean" in text or "--help" in text or "section" in text
            if is_named and is_hint:
                hinted += 1
            else:
                out.check(False, f"--{wrong}: {text}")
    out.figures = {"hinted": hinted}
    return out


def _changed(rig: Rig, out: Outcome, chance: random.Random) -> Outcome:
    """Settings that may not change, changed: refused with the key and both values."""
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(2 * rigs.SAVE_EVERY, folder / "run")
        config, _ = options.read_command(rig.words(run_dir))
        leaves = options.leaves(config)
        fixed = [
            key
            for key, value in leaves.items()
            if not any(key == r or key.startswith(f"{r}.") for r in RESUMABLE)
            and type(value) in (int, float, bool, str)
            and key not in ("name", "task")
        ]
        for _ in range(out.count):
            key = chance.choice(fixed)
            changed = _with(config, key.replace("init.from", "init.from_"), chance)
            try:
                runfolder.check_resume(changed)
                out.check(False, f"{key} may change")
            except ConfigError as error:
                text = str(error)
                said = re.search(rf"\n  {re.escape(key)}: .* -> .*\n", text)
                out.check(said and "run.accept_changes" in text, f"{key}: {text}")
            accepted = dataclasses.replace(
                changed, run=dataclasses.replace(changed.run, accept_changes=True)
            )
            runfolder.check_resume(accepted)
    return out


def _with(record: Any, key: str, chance: random.Random) -> Any:
    """The config with another value of that key."""
    name, _, rest = key.partition(".")
    value = getattr(record, name)
    if rest:
        changed = _with(value, rest, chance)
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, int | float):
        changed = value + 1
    else:
        changed = value + "x"
    return dataclasses.replace(record, **{name: changed})


def _slip(key: str, chance: random.Random) -> str:
    """The key as a hurried person types it."""
    at = chance.randrange(len(key))
    letter = chance.choice(string.ascii_lowercase + "_-")
    match chance.randrange(6):
        case 0:
            return key[:at] + key[at + 1 :]
        case 1:
            return key[:at] + letter + key[at:]
        case 2:
            return key[:at] + letter + key[at + 1 :]
        case 3:
            return key[:at] + key[at : at + 2][::-1] + key[at + 2 :]
        case 4:
            return key.replace("_", "-") if "_" in key else key.upper()
        case _:
            return key.rpartition(".")[2]


def _is_section(key: str, keys: list[str]) -> bool:
    """Whether it is one that takes any name below it, or an empty one."""
    return not key or any(k.startswith(f"{key}.") for k in keys)
