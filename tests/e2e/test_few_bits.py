"""Fewer bits by the commands that a user has: compress, adapters, every mesh axis."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from e2e import command, test_fine_tuning

pytestmark = pytest.mark.slow

STEPS = 8
# Adapters and a base apart, or as one array: float32 products in another order.
MERGED = 1e-5
# Of a loss near 5.6. A sum in another order moves a code now and then, of moments too,
# and adamw takes whole steps for gradients near zero: the last bits of the parameters
# move the third loss of one device by up to 6e-3 (tests/train/test_low_precision.py).
OTHER_CODES = 1e-2
script, run = test_fine_tuning.script, test_fine_tuning.run


@pytest.fixture(scope="module")
def base(cache, tmp_path_factory):
    """A run of the small model, to be compressed and to be adapted."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = command.train(cache | {"run.dir": folder, "train.steps": 20})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def adapting(cache, base):
    """Settings of a run with adapters beside the base, which is kept in 4 bits."""
    return cache | {
        "init.from": base,
        "lora.rank": 4,
        "lora.base": "nf4",
        "lora.group": 16,
        "train.steps": STEPS,
        "train.save_every": 4,
        "train.microbatches": 2,
    }


@pytest.fixture(scope="module")
def adapted(adapting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    done = command.train(adapting | {"run.dir": folder})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def unreadable(base, tmp_path):
    """The base with damaged parameters: what reads them ends by exit code 12."""
    folder = tmp_path / "unreadable"
    shutil.copytree(base, folder)
    for file in (folder / "checkpoints").glob("*/arrays/params/embedding/c/**/*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    return folder


def perplexity(source, out):
    run("evaluate", "--from", source, "--text", out.with_name("held_out.txt"),
        "--out", out)  # fmt: skip
    [found] = json.loads(out.read_text())["results"]
    return found["perplexity"]


def logits(source, folder):
    ids, out = folder / "ids.npy", folder / "logits.npy"
    np.save(ids, np.arange(40).reshape(2, 20))
    run("evaluate", "--from", source, "--ids", ids, "--logits", out)
    return np.load(out)


@pytest.mark.parametrize(
    ("form", "method", "worst"), [("int8", "nearest", 0.01), ("int4", "gptq", 0.2)]
)
def test_what_is_compressed_is_measured_and_speaks(base, tmp_path, form, method, worst):
    few, text = tmp_path / "few", tmp_path / "held_out.txt"
    text.write_text(test_fine_tuning.CORPUS.read_text()[-6000:])
    said = run(
        "compress", "--from", base, "--to", few, "--format", form, "--method", method,
        "--group", 16, "--rows", 8, "--length", 32, "--score_tokens", 2000,
    )  # fmt: skip
    assert f"{form} by {method}" in said
    plain = perplexity(base, tmp_path / "plain.json")
    found = perplexity(few, tmp_path / "few.json")
    assert abs(found / plain - 1) < worst
    assert found != plain
    asked = ["--prompt", "ROMEO.", "--tokens", 12, "--sample.temperature", 0]
    assert len(run("generate", few, *asked)) > len("ROMEO.") + 5
    code, _, errors = script("compress", "--from", base, "--to", few, "--format", form)
    assert (code, "is there already" in errors) == (2, True), errors


def test_groups_that_do_not_fit_are_told_before_anything_is_read(unreadable, tmp_path):
    asked = ["--from", unreadable, "--to", tmp_path / "few", "--format", "int4"]
    code, _, errors = script("compress", *asked, "--group", 5)
    assert (code, "--group 5: " in errors) == (2, True), errors
    code, _, errors = script("compress", *asked, "--group", 8)
    assert code == 12, errors


def test_the_settings_that_compress_gives_as_examples_are_taken(unreadable, tmp_path):
    told = run("compress", "--help").partition("`--key value`")[2]
    pairs = re.findall(r"(--[a-z_]+(?:\.[a-z_]+)?) (\w+)", told.partition("Exit")[0])
    assert len(pairs) == 3, told
    asked = ["--from", unreadable, "--to", tmp_path / "few", "--format", "int8"]
    code, _, errors = script("compress", *asked, *itertools.chain(*pairs))
    assert code == 12, errors


def test_adapters_go_on_bit_for_bit(adapting, adapted, tmp_path):
    resumed = command.copy_as_of(4, adapted, tmp_path / "resumed")
    done = command.train(adapting | {"run.dir": resumed})
    assert done.returncode == 0, done.stderr
    assert command.events(resumed, "start")[-1]["step"] == 4
    assert command.history(resumed) == command.history(adapted)
    losses = [
        line["eval/loss"] for line in command.metrics(adapted) if "eval/loss" in line
    ]
    again = [
        line["eval/loss"] for line in command.metrics(resumed) if "eval/loss" in line
    ]
    assert losses[-1] == again[-1]


def test_adapters_do_not_go_on_beside_another_base(
    adapting, adapted, base, cache, tmp_path
):
    other = tmp_path / "other"
    done = command.train(cache | {"run.dir": other, "train.steps": 20, "run.seed": 1})
    assert done.returncode == 0, done.stderr
    resumed = command.copy_as_of(4, adapted, tmp_path / "resumed")
    before = command.contents(resumed / "checkpoints")
    settings = adapting | {"run.dir": resumed, "init.from": other}
    done = command.train(settings)
    assert done.returncode == 2, "init.from is recorded"
    done = command.train(settings | {"run.accept_changes": "true"})
    assert done.returncode == 2, done.stderr
    assert "other parameters than those that the run has trained beside" in done.stderr
    assert command.contents(resumed / "checkpoints") == before


def test_adapters_are_merged_on_the_way_out(base, adapted, tmp_path):
    out = tmp_path / "out"
    run("convert", "--from", adapted, "--to", out, "--format", "hf")
    with_adapters, merged = logits(adapted, tmp_path), logits(out, tmp_path)
    np.testing.assert_allclose(merged, with_adapters, atol=MERGED)
    moved = np.abs(with_adapters - logits(base, tmp_path)).max()
    assert moved > 100 * MERGED
    asked = ["--prompt", "ROMEO.", "--tokens", 8, "--sample.temperature", 0]
    apart = run("generate", base, "--adapter", adapted, *asked)
    assert apart == run("generate", adapted, *asked)


def test_every_axis_at_once_goes_on_bit_for_bit_and_near_one_device(cache, tmp_path):
    """int8 matmuls, moments in 8 bits, a pipeline, a save in between."""
    settings = cache | {
        "precision": "int8",
        "optimizer.name": "adamw",
        "optimizer.moments": "8bit",
        "train.steps": STEPS,
        "train.save_every": 4,
        "train.microbatches": 2,
        "model.tied": "false",
    }
    mesh = {"runtime.cpu_devices": 8, "mesh.fsdp": 2, "mesh.tensor": 2}
    mesh |= {"mesh.pipeline": 2, "zero": 3}
    whole, one = tmp_path / "whole", tmp_path / "one"
    for folder, where in ((whole, mesh), (one, {})):
        done = command.train(settings | where | {"run.dir": folder})
        assert done.returncode == 0, done.stderr
    resumed = command.copy_as_of(4, whole, tmp_path / "resumed")
    done = command.train(settings | mesh | {"run.dir": resumed})
    assert done.returncode == 0, done.stderr
    assert command.history(resumed) == command.history(whole)
    for ours, theirs in zip(command.history(whole), command.history(one), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=OTHER_CODES)
        assert ours[3] == theirs[3]
    figures = command.metrics(whole)[-1]
    assert figures["quant/grad_underflow"] > 0
