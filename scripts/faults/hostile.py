"""Files made to do harm: to run code, or to lead out of their folder."""

import contextlib
import json
import os
import pathlib
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from faults import fuzz
from faults import rig as rigs
from faults.rig import Outcome, Rig
from jaxinfra import options, runfolder
from jaxinfra.checkpoint import integrity, restore
from jaxinfra.checkpoint.commits import CheckpointError
from jaxinfra.config import ConfigError, DataError
from jaxinfra.data import shards, tokenizer, tokenizer_files
from jaxinfra.interop import hf, pretrained, tensorfile
from jaxinfra.resilience import ownership

TYPED = (CheckpointError, ConfigError, DataError, ownership.FolderOwned)
# What loading data has no business with; `exec` and `compile` are told below.
_EVENTS = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
    "os.fork", "os.forkpty", "pty.spawn", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "socket.sendto", "urllib.Request", "http.client.connect",
    "ftplib.connect", "smtplib.connect", "webbrowser.open", "os.startfile",
    "code.__new__", "function.__new__", "ctypes.dlopen",
)  # fmt: skip
Load = Callable[[pathlib.Path], Any]


def trial_29(rig: Rig, number: int) -> Outcome:
    """A load path with a file that is, or names, code; nothing of it may run."""
    assert rig.quiet  # made before the fork
    kinds = [(name, load) for name, load, _ in _LOADS for _ in (0, 1, 2)]
    name, load = kinds[number % len(kinds)]
    out, chance = Outcome(), rig.random("29", number)

    def run(folder: pathlib.Path) -> dict[str, Any]:
        marker = folder / "marker"
        load(_made(rig, name, folder / "sound"))  # whatever is imported late is now
        place = _made(rig, name, folder / "hostile")
        _poison(place, marker, chance, number % 3)
        seen: list[str] = []
        with _audited(seen):
            try:
                load(place)
                told = "loaded"
            except TYPED as error:
                told = f"{type(error).__name__}: {error}"
        return {"seen": seen, "told": told, "ran": marker.exists()}

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder))
    v = ended.value
    if v is None:
        out.check(False, f"{name}: {ended.text[-350:]}")
        return out
    out.check(not v["seen"], f"{name}: {v['seen'][:5]}")
    out.check(not v["ran"], f"{name}: code of the file ran")
    out.figures = {"loads": 1}
    return out


@contextlib.contextmanager
def _audited(seen: list[str]) -> Iterator[None]:
    """Collects events of running code within the block; the hook cannot be removed."""
    is_on = [True]

    def hook(event: str, words: tuple) -> None:
        if not is_on[0]:
            return
        if event in ("exec", "compile"):
            code = words[0] if event == "exec" else None
            where = code.co_filename if code is not None else str(words[1])
            # Modules of installed packages, imported where they are first needed.
            if where == "<unknown>":  # ast.literal_eval: parsed, and never run
                return
            is_module = where.endswith(".py") and not where.startswith("<")
            is_ours = where.startswith((sys.prefix, sys.base_prefix, str(rigs.ROOT)))
            if not (is_module and is_ours) and "frozen" not in where:
                seen.append(f"{event} of {where}")
        elif event in _EVENTS or event.startswith(("socket.", "pickle.")):
            seen.append(event)

    sys.addaudithook(hook)
    try:
        yield
    finally:
        is_on[0] = False


def _made(rig: Rig, name: str, place: pathlib.Path) -> pathlib.Path:
    """A sound folder of that kind."""
    place.mkdir(parents=True)
    next(make for kind, _, make in _LOADS if kind == name)(rig, place)
    return place


def _poison(place: pathlib.Path, marker: pathlib.Path, chance: Any, how: int) -> None:
    """Makes code of the folder's files: pickles, Python in their texts, modules."""
    command = f"touch {marker}"
    pickled = b"cos\nsystem\n(S'" + command.encode() + b"'\ntR."
    python = f"__import__('os').system('{command}')"
    paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
    match how:
        case 0:  # a pickle where data should be, whole or in a .npy
            path = chance.choice(paths)
            if path.suffix == ".npy":
                header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
                header = header.ljust(117) + b"\n"
                size = struct.pack("<H", len(header))
                path.write_bytes(b"\x93NUMPY\x01\x00" + size + header + pickled)
            else:
                path.write_bytes(pickled)
        case 1:  # Python where a value should be
            texts = [path for path in paths if path.suffix == ".json"]
            for path in texts:
                value = json.loads(path.read_text())
                _replace(value, python, chance)
                text = json.dumps(value)
                if path.name == integrity.MANIFEST:
                    value.pop("sha256", None)
                    text = integrity.dump(value).decode()
                path.write_text(text)
            for path in [path for path in paths if path.suffix == ".npy"][:1]:
                data = path.read_bytes()
                header = f"{{'descr': {python}, 'shape': (1,)}}".encode().ljust(117)
                path.write_bytes(data[:10] + header + b"\n" + data[128:])
        case _:  # modules that a trusting loader would import
            body = f"import os\nos.system({command!r})\n"
            for name in ("modeling_evil", "tokenization_evil", "__init__", "setup"):
                (place / f"{name}.py").write_text(body)
            auto = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"}
            auto["AutoTokenizer"] = ["tokenization_evil.T", None]
            for name in ("config.json", "tokenizer_config.json"):
                path = place / name
                value = json.loads(path.read_text()) if path.exists() else {}
                value |= {"auto_map": auto, "tokenizer_class": "Evil"}
                path.write_text(json.dumps(value))
            (place / "pytorch_model.bin").write_bytes(pickled)


def _replace(value: Any, text: str, chance: Any) -> None:
    """One value, somewhere, is the text; and there is one that a YAML loader runs."""
    node = value
    while isinstance(node, dict) and node:
        key = chance.choice(list(node))
        if isinstance(node[key], dict) and node[key] and chance.random() < 0.8:
            node = node[key]
            continue
        node[key] = text
        break
    if isinstance(value, dict):
        value["py/reduce"] = [{"py/type": "os.system"}, {"py/tuple": [text]}]


def checkpoint(rig: Rig, place: pathlib.Path) -> None:
    source = rig.quiet / "checkpoints" / str(rigs.SAVE_EVERY)
    shutil.copytree(source, place / "checkpoints" / str(rigs.SAVE_EVERY))


def _run_folder(rig: Rig, place: pathlib.Path) -> None:
    checkpoint(rig, place)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(rig.quiet / name, place)


def _published(rig: Rig, place: pathlib.Path) -> None:
    del rig
    (place / "config.json").write_text(json.dumps(fuzz.LLAMA))
    values = np.zeros((4, 4), np.float32)
    tensor = tensorfile.Writing(
        "model.norm.weight", values.dtype, (4, 4), lambda: values
    )
    tensorfile.write_folder(place, [tensor])


def _tokenizer(rig: Rig, place: pathlib.Path) -> None:
    del rig
    vocab = {"a": 0, "b": 1, "ab": 2, "<e>": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"]}
    model |= {"dropout": None, "unk_token": None, "byte_fallback": False}
    described = {"version": "1.0", "model": model, "added_tokens": []}
    (place / "tokenizer.json").write_text(json.dumps(described))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))


def data_set(rig: Rig, place: pathlib.Path) -> None:
    source = next((rig.home / "cache" / "data").iterdir())
    for path in source.iterdir():
        shutil.copy(path, place)


def _load_checkpoint(place: pathlib.Path) -> None:
    import jax

    steps = place / "checkpoints"
    restore.latest(steps)
    step_folder = steps / str(rigs.SAVE_EVERY)
    integrity.validate(step_folder)
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    manifest = integrity.load(step_folder)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
        for name, x in manifest.arrays.items()
    }
    restore.restore_latest(steps, abstract)
    options.from_json(manifest.config, fill=True)


def _load_run(place: pathlib.Path) -> None:
    config, _ = options.read_command([f"--run.dir={place}"])
    with contextlib.suppress(ConfigError):
        runfolder.check_resume(config)
    pretrained.open_source(str(place))
    tokenizer.from_json(json.loads((place / "tokenizer.json").read_text()))


def _load_published(place: pathlib.Path) -> None:
    hf.open_folder(place)
    for stored in tensorfile.open_folder(place).values():
        stored.read()


def _load_tokenizer(place: pathlib.Path) -> None:
    tokenizer_files.load_tokenizer(place, eod="<e>", bos="never").encode("ab")


def _load_data(place: pathlib.Path) -> None:
    for how in (True, False):
        data = shards.open_dataset(place, verify=how)
        for split in data.splits.values():
            for shard in split.shards:
                np.array(shard.tokens)


_LOADS: list[tuple[str, Load, Callable[[Rig, pathlib.Path], None]]] = [
    ("checkpoint", _load_checkpoint, checkpoint),
    ("run folder", _load_run, _run_folder),
    ("published folder", _load_published, _published),
    ("tokenizer", _load_tokenizer, _tokenizer),
    ("data set", _load_data, data_set),
]

_NAMES = (
    "../outside/secret", "/OUTSIDE/secret", "..", "a/../../outside/secret", "./x",
    "outside\\..\\secret", "x\x00/../secret", "%2e%2e/outside/secret",
)  # fmt: skip


def trial_30(rig: Rig, number: int) -> Outcome:
    """A name in a manifest, an index or a data set leads out of its folder, where a
    file stands that would fit; all that is opened is told by an audit hook."""
    assert rig.quiet  # made before the fork
    out = Outcome()
    kind, name = number % 2, _NAMES[number // 2 % len(_NAMES)]

    def run(folder: pathlib.Path) -> dict[str, Any]:
        outside = folder / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"x" * 64)
        named = name.replace("/OUTSIDE", str(outside))
        loads = (_manifest_names, _published_names, _data_names)
        opened, told = [], []
        for make in loads[:2] if kind else loads[2:]:
            place = folder / make.__name__
            place.mkdir()
            for attack in make(rig, place, named, outside):
                is_on = [True]

                def hook(event: str, words: tuple, is_on: list = is_on) -> None:
                    is_path = words and isinstance(words[0], str | bytes | os.PathLike)
                    if (
                        is_on[0]
                        and event.startswith(("open", "os.", "shutil."))
                        and is_path
                    ):
                        path = os.path.abspath(os.fsdecode(words[0]))
                        if path.startswith(str(outside)):
                            opened.append(f"{event} {path}")

                sys.addaudithook(hook)
                try:
                    attack()
                    told.append("accepted")
                except TYPED as error:
                    told.append(type(error).__name__)
                is_on[0] = False
        return {"opened": opened, "told": told}

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder))
    v = ended.value
    if v is None:
        out.check(False, f"{name!r}: {ended.text[-350:]}")
        return out
    out.check(not v["opened"], f"{name!r}: {v['opened']}")
    out.check("accepted" not in v["told"], f"{name!r} was accepted: {v['told']}")
    return out


def _manifest_names(rig: Rig, place: pathlib.Path, name: str, outside: pathlib.Path):
    """Of an array, and of its chunk, in a manifest with a right digest."""
    del outside
    checkpoint(rig, place)
    step = place / "checkpoints" / str(rigs.SAVE_EVERY)
    sound = json.loads((step / integrity.MANIFEST).read_text())
    sound.pop("sha256")

    def attack(change: Callable[[dict], None]) -> None:
        body = json.loads(json.dumps(sound))
        change(body["arrays"])
        (step / integrity.MANIFEST).write_bytes(integrity.dump(body))
        integrity.check_sizes(step, integrity.load(step))

    def array(arrays: dict) -> None:
        first = sorted(arrays)[0]
        arrays[name] = _renamed(arrays.pop(first), first, name)

    def chunk(arrays: dict) -> None:
        next(iter(arrays.values()))["chunks"][0]["path"] = name

    return [lambda: attack(array), lambda: attack(chunk)]


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, old, new) for inner in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _published_names(rig: Rig, place: pathlib.Path, name: str, outside: pathlib.Path):
    """Of a file, in the index of a published folder."""
    _published(rig, place)
    shutil.copy(place / tensorfile.WEIGHTS, outside / "secret")
    index = {"weight_map": {"model.norm.weight": name}}
    (place / tensorfile.INDEX).write_text(json.dumps(index))
    return [lambda: tensorfile.open_folder(place)]


def _data_names(rig: Rig, place: pathlib.Path, name: str, outside: pathlib.Path):
    """Of a shard, in dataset.json."""
    data_set(rig, place)
    for path in place.glob("train-00000.*"):
        shutil.copy(path, outside / path.name.replace("train-00000", "secret"))
    value = json.loads((place / shards.MANIFEST).read_text())
    record = value["splits"]["train"]["shards"][0]
    record["file"] = f"{name}.tokens.npy"
    (place / shards.MANIFEST).write_text(json.dumps(value))
    return [
        lambda: shards.open_dataset(place, verify=False),
        lambda: shards.open_dataset(place, verify=True),
    ]
