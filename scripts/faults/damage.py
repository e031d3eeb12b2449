"""Bytes that are not what was written: in checkpoints, data sets, compiled programs."""

import pathlib
import random
import shutil
from typing import Any

import numpy as np

from faults import rig as rigs
from faults.rig import SAVE_EVERY, Outcome, Rig
from jaxinfra.checkpoint import checking, integrity, restore
from jaxinfra.config import DataError
from jaxinfra.data import batches, shards, tokenizer, writer

_NEWEST, _BEFORE = 3 * SAVE_EVERY, 2 * SAVE_EVERY


def trial_6(rig: Rig, number: int) -> Outcome:
    """Fifty times one bit, of the newest of a run's two checkpoints."""

    def flip(folder: pathlib.Path, chance: random.Random, turn: int) -> pathlib.Path:
        # Any bit of the checkpoint in turn with any bit of any file, small ones too.
        paths = _files(folder)
        sizes = [path.stat().st_size for path in paths] if turn % 2 else None
        [path] = chance.choices(paths, sizes)
        _flip(path, chance)
        return path

    return _each_found(rig, "6", number, flip)


def trial_7(rig: Rig, number: int) -> Outcome:
    """Fifty times a file is cut, gone, zeroed or longer."""

    def spoil(folder: pathlib.Path, chance: random.Random, turn: int) -> pathlib.Path:
        path = chance.choice(_files(folder))
        data = path.read_bytes()
        match turn % 4:
            case 0:
                path.write_bytes(data[: chance.randrange(len(data))])
            case 1:
                path.unlink()
            case 2:
                path.write_bytes(bytes(len(data)))
            case _:
                path.write_bytes(data + chance.randbytes(chance.randrange(1, 99)))
        return path

    return _each_found(rig, "7", number, spoil)


def trial_8(rig: Rig, number: int) -> Outcome:
    """Fifty times a chunk, with its valid crc32c, stands where another belongs; every
    tenth time it is a whole manifest, of the other step."""

    def swap(folder: pathlib.Path, chance: random.Random, turn: int) -> pathlib.Path:
        other = folder.with_name(str(_BEFORE))
        if turn % 10 == 9:
            path = folder / integrity.MANIFEST
            path.write_bytes((other / integrity.MANIFEST).read_bytes())
            return path
        chunks = [path for path in _files(folder) if "c" in path.parts]
        while True:
            path = chance.choice(chunks)
            size = path.stat().st_size
            here = [x for x in chunks if x != path and x.stat().st_size == size]
            there = other / path.relative_to(folder)
            data = chance.choice([there, *here]).read_bytes()
            if data != path.read_bytes():
                path.write_bytes(data)
                return path

    return _each_found(rig, "8", number, swap)


def trial_9(rig: Rig, number: int) -> Outcome:
    """A run all of whose checkpoints are bad starts nothing and overwrites nothing."""
    out, chance = Outcome(), rig.random("9", number)
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(_NEWEST, folder / "run")
        for step in rigs.saved_steps(run_dir):
            # Not a file that a restore leaves unread.
            paths = _files(run_dir / "checkpoints" / str(step))
            path = chance.choice([x for x in paths if x.name != "zarr.json"])
            chance.choice([_flip, _cut])(path, chance)
        before = _without_owners(run_dir)
        ended = rig.run(run_dir, train__steps=rigs.STEPS)
        out.check(ended.code == 12, f"exit {ended.code}: {ended.text}")
        named = [f"step {step}" in ended.text for step in (_NEWEST, _BEFORE)]
        out.check(all(named), f"not both steps are named: {ended.text}")
        out.check("Traceback" not in ended.text, ended.text)
        out.check(_without_owners(run_dir) == before, "the folder was changed")
    return out


def trial_flip(rig: Rig, number: int) -> Outcome:
    """One bit of a chunk or the manifest flipped, then the same command."""
    out, chance = Outcome(), rig.random("flip", number)
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(_NEWEST, folder / "run")
        newest = run_dir / "checkpoints" / str(_NEWEST)
        paths = [path for path in _files(newest) if path.name != "zarr.json"]
        [path] = chance.choices(paths, [x.stat().st_size for x in paths])
        _flip(path, chance)
        ended = rig.run(run_dir, train__steps=_NEWEST + 2 * SAVE_EVERY)
        out.check(ended.code == 0, f"exit {ended.code}: {ended.text}")
        [begun] = rigs.events(run_dir, "start")[-1:] or [{}]
        out.check(begun.get("step") == _BEFORE, f"went on from {begun.get('step')}")
        told = str(begun.get("rejected"))
        out.check(str(path) in told and str(_NEWEST) in told, f"told {told}")
        rigs.compare(out, rig, run_dir)
        out.check(not checking.validate(newest), "the bad step was not saved again")
    return out


def trial_24(rig: Rig, number: int) -> Outcome:
    """Fifty times a byte of a data set is another; opened, and its rows read, with a
    check of every byte first, without one, and for quarantine."""
    out, chance = Outcome(count=50), rig.random("24", number)
    stopped = quarantined = 0
    with rig.folder() as folder:
        whole = _data_set(folder / "whole")
        wanted = [_rows(whole, verify=False, damaged="stop")[0]]
        for turn in range(out.count):
            damaged = pathlib.Path(shutil.copytree(whole, folder / str(turn)))
            arrays = sorted(damaged.glob("*.npy"))
            path = chance.choice(arrays)
            _flip(path, chance)
            is_kept = turn % 3 == 2
            how = "quarantine" if is_kept else "stop"
            verify = [True, False, "auto"][turn % 3]
            try:
                found, told = _rows(damaged, verify=verify, damaged=how)
            except DataError as error:
                stopped += 1
                out.check(path.stem.split(".")[0] in str(error), f"{path}: {error}")
            else:
                # Lengths beside their sums are read by a whole check alone.
                is_unread = ".lengths." in path.name and verify is not True
                is_told = is_kept and any(path.name in line for line in told)
                quarantined += is_told
                same = all(np.array_equal(a, b) for a, b in zip(found, wanted[0]))
                out.check(is_told or (is_unread and same), f"{path.name} read as good")
            shutil.rmtree(damaged)
    out.figures = {"stopped": stopped, "quarantined": quarantined}
    return out


def trial_36(rig: Rig, number: int) -> Outcome:
    """A file of the compile cache is damaged, or all are; the run goes on as it was."""
    out, chance = Outcome(), rig.random("36", number)
    with rig.folder() as folder:
        run_dir = rig.copy_as_of(_NEWEST, folder / "run")
        assert rig.quiet  # so that the programs are there
        cache = pathlib.Path(shutil.copytree(rig.home / "cache", folder / "cache"))
        paths = [x for x in sorted((cache / "compiled").rglob("*")) if x.is_file()]
        out.check(paths, "there are no compiled programs")
        how = (_flip, _cut, _zero)[number % 3]
        for path in paths if number % 2 else [chance.choice(paths)]:
            how(path, chance)
        settings = {"train__steps": _NEWEST + SAVE_EVERY, "data__cache_dir": cache}
        ended = rig.run(run_dir, **settings)
        out.check(ended.code == 0, f"{how.__name__}: exit {ended.code}: {ended.text}")
        rigs.compare(out, rig, run_dir)
    return out


def _each_found(rig: Rig, row: str, number: int, harm: Any) -> Outcome:
    """Does one harm after the other to the newer of two checkpoints and undoes it."""
    out, chance = Outcome(count=50), rig.random(row, number)
    source = rig.quiet / "checkpoints"

    def run(folder: pathlib.Path) -> dict[str, Any]:
        for step in (_BEFORE, _NEWEST):
            shutil.copytree(source / str(step), folder / str(step))
        newest, counts, failures = folder / str(_NEWEST), [0, 0], []
        abstract = _abstract(newest)
        wanted = {
            step: _bits(restore.restore(folder, step, abstract).arrays)
            for step in (_BEFORE, _NEWEST)
        }
        whole = {path: path.read_bytes() for path in _files(newest)}
        for turn in range(out.count):
            path = harm(newest, chance, turn)
            name = str(path.relative_to(newest))
            problems = checking.validate(newest)
            if not any(name in problem for problem in problems):
                failures.append(f"verify does not name {name}: {problems}")
            found = restore.restore_latest(folder, abstract)
            assert found is not None
            if _bits(found.arrays) != wanted.get(found.step):
                failures.append(f"{name}: SILENT: wrong values of step {found.step}")
            elif found.step == _NEWEST:
                counts[1] += 1
                # zarr.json is for other readers: a restore has all from the manifest.
                if path.name != "zarr.json":
                    failures.append(f"{name} was not passed over")
            else:
                counts[0] += 1
                [(step, reason)] = found.rejected
                # A chunk's path has the array's name.
                if step != _NEWEST or name not in reason:
                    failures.append(f"{name} is not named: {reason}")
            path.write_bytes(whole[path])
        return {"counts": counts, "failures": failures}

    with rig.folder() as folder:
        ended = rigs.forked(lambda: run(folder))
    if ended.value is None:
        out.check(False, ended.text[-400:])
        return out
    out.failures = ended.value["failures"]
    fell_back, unread = ended.value["counts"]
    out.figures = {"fell_back": fell_back, "in_files_not_read": unread}
    return out


def _abstract(step_folder: pathlib.Path) -> dict[str, Any]:
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for name, x in checking.load(step_folder).arrays.items()
    }


def _bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _flip(path: pathlib.Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _cut(path: pathlib.Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def _zero(path: pathlib.Path, chance: random.Random) -> None:
    del chance
    path.write_bytes(bytes(path.stat().st_size))


def _without_owners(run_dir: pathlib.Path) -> dict[str, bytes | None]:
    found = rigs.contents(run_dir)
    return {name: x for name, x in found.items() if not name.startswith("owner.")}


def _data_set(folder: pathlib.Path) -> pathlib.Path:
    """Two shards whose tokens are several checked blocks, with a mask."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 257, 20_000) for _ in range(60)]
    masks = [rng.integers(0, 2, 20_000) for _ in range(60)]
    content = writer.SplitContent(documents=documents, text_bytes=9, masks=masks)
    return writer.write_dataset(
        folder,
        tokenizer=tokenizer.ByteTokenizer(),
        splits={"train": content},
        shard_tokens=700_000,
    ).folder


def _rows(
    folder: pathlib.Path, *, verify: Any, damaged: Any
) -> tuple[list[np.ndarray], list[str]]:
    """All rows of an epoch, and what was told of damage."""
    data = shards.open_dataset(folder, verify=verify, damaged=damaged)
    stream = batches.make_stream(
        data.split("train"), length=4000, batch_size=60, seed=0
    )
    found = [array for step in range(5) for array in stream.batch(step, np.arange(60))]
    return [np.array(array) for array in found], list(data.damage)
