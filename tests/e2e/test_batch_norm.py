"""BatchNorm and dropout through scripts/train.py: configs/fashion_convnet.py on a few
images, stopped and started again."""

import gzip
import struct

import numpy as np
import pytest
from e2e import command

STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of the four files: each class has a brightness of its own."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 10)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        pixels = rng.integers(0, 25, (count, 28, 28)) + 25 * labels[:, None, None]
        for kind, array in (
            ("images-idx3", pixels.astype(np.uint8)),
            ("labels-idx1", labels),
        ):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = folder / f"{name}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def train(settings):
    settings = {
        "train.steps": STEPS,
        "train.save_every": SAVED,
        "train.batch_size": 8,
        "eval.batch_size": 4,
        "optimizer.warmup_steps": 1,
    } | settings
    argv = [f"--{key}={value}" for key, value in settings.items()]
    return command.run(["--config", "fashion_convnet", *argv])


@pytest.mark.slow
def test_batch_norm_stopped_and_started_again_is_bit_equal(images, cache, tmp_path):
    settings = cache | {"data.path": images}
    done = train(settings | {"run.dir": tmp_path / "quiet"})
    assert done.returncode == 0, done.stderr
    run_dir = command.copy_as_of(SAVED, tmp_path / "quiet", tmp_path / "again")
    done = train(settings | {"run.dir": run_dir})
    assert done.returncode == 0, done.stderr
    assert command.events(run_dir, "start")[-1]["step"] == SAVED
    ours, theirs = command.metrics(run_dir), command.metrics(tmp_path / "quiet")
    names = ("train/loss", "train/grad_norm", "train/accuracy")
    for a, b in zip(ours, theirs, strict=True):
        assert [a[name] for name in names] == [b[name] for name in names]
    for name in ("loss", "accuracy"):
        key = f"eval/held_out/{name}"
        assert ours[-1][key] == theirs[-1][key]
    arrays, expected = (
        command.contents(folder / "checkpoints" / str(STEPS) / "arrays")
        for folder in (run_dir, tmp_path / "quiet")
    )
    assert any("batch_stats/BatchNorm_2/var" in path for path in arrays)
    assert arrays == expected


def test_a_folder_without_the_images_is_refused(tmp_path):
    for path, message in (
        (tmp_path, "there is no file"),
        (tmp_path / "gone", "gone is not there; give the folder"),
    ):
        done = train({"data.path": path, "run.dir": tmp_path / "run"})
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
