"""scripts/evaluate.py and scripts/generate.py as a user calls them, on small models."""

import importlib.util
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from golden_checkpoints import AS_TORCH, GOLDEN, difference, layout_of

from jaxinfra import params
from jaxinfra.config import ModelConfig
from jaxinfra.data import prepare
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.interop import export
from jaxinfra.models.specs import param_specs

ROOT = pathlib.Path(__file__).resolve().parent.parent
LLAMA = GOLDEN / "llama"
IDS = LLAMA / "ids.npy"
# Longer than the windows, and a second document.
TEXT = "Tomorrow, and tomorrow, and tomorrow, creeps in this petty pace"
ROUNDING = 1e-5  # of nats a token: float32 log-likelihoods


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main(
        [*map(str, words), "--runtime.compile_cache", "false"]
    )


evaluate, generate = script("evaluate"), script("generate")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder of random parameters that reads bytes."""
    folder, layout = tmp_path_factory.mktemp("runs") / "run", layout_of()
    model = ModelConfig(
        vocab_size=257, width=16, ffn_width=16, num_heads=2, num_kv_heads=2, repeats=1,
        tied=False, init_std=0.3,
    )  # fmt: skip
    with jax.set_mesh(layout.mesh):
        weights = params.initialize(
            param_specs(model), jax.random.key(0), layout=layout, dtype=np.float32
        )
        export.write_run(folder, weights, model, tokenizer=ByteTokenizer(), files={})
    return folder


def nats(run_dir, tmp_path, ids, length, stride):
    """Of ids after EOD, each once: by the script's logits of single windows."""
    total, done, ids = 0.0, 0, [256, *ids]
    while done < len(ids) - 1:
        end = min(done + (stride if done else length), len(ids) - 1)
        first = max(0, end - length)
        np.save(tmp_path / "w.npy", [ids[first:end]])
        done_first, done = done, end
        out = tmp_path / "l.npy"
        assert (
            evaluate("--from", run_dir, "--ids", tmp_path / "w.npy", "--logits", out)
            == 0
        )
        x_TV = np.load(out)[0].astype(np.float64)
        x_TV -= np.log(np.exp(x_TV).sum(axis=-1, keepdims=True))
        places = np.arange(done_first, end)
        total -= x_TV[places - first, np.array(ids)[places + 1]].sum()
    return total


@pytest.mark.parametrize(
    "mesh", [(), ("--mesh.fsdp", 2, "--mesh.tensor", 2, "--zero", 3)], ids=str
)
def test_logits_are_those_of_torch(tmp_path, mesh):
    out = tmp_path / "out.npy"
    assert evaluate("--from", LLAMA, "--ids", IDS, "--logits", out, *mesh) == 0
    logits = np.load(out)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 40, 89))
    assert difference(LLAMA, logits) < AS_TORCH
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.slow
def test_text_data_and_tasks_are_measured_and_written_down(run_dir, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    lines = [{"text": TEXT}, {"text": "é!"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    data = prepare.prepare(
        [tmp_path / "b.jsonl"], tmp_path / "data", tokenizer="byte",
        split="documents", held_out=0.5, seed=0,
    )  # fmt: skip
    choices = {"question": "To be", "choices": ["or not", "and"], "answer": 0}
    (tmp_path / "c.jsonl").write_text(json.dumps(choices) + "\n")
    answer = {"prompt": "To be", "answer": "?", "until": ["\n", "a"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(answer) + "\n")
    done = evaluate(
        "--from", run_dir, "--text", tmp_path / "a.txt", tmp_path / "b.jsonl",
        "--data", data.folder, "--split", "train", "--length", 32, "--stride", 8,
        "--tasks", tmp_path / "c.jsonl", tmp_path / "d.jsonl", "--new_tokens", 8,
        "--out", tmp_path / "out.json",
    )  # fmt: skip
    assert done == 0
    written = json.loads((tmp_path / "out.json").read_text())
    text, two, prepared, choice, exact = written["results"]
    expected = nats(run_dir, tmp_path, TEXT.encode(), 32, 8)
    assert text["nats_per_token"] == pytest.approx(expected / len(TEXT), abs=ROUNDING)
    assert (text["tokens"], text["bytes"]) == (len(TEXT), len(TEXT))
    assert text["bits_per_byte"] == pytest.approx(text["nats_per_token"] / math.log(2))
    expected += nats(run_dir, tmp_path, "é!".encode(), 32, 8)
    assert (two["documents"], two["tokens"]) == (2, len(TEXT) + 3)
    assert two["nats_per_token"] * two["tokens"] == pytest.approx(expected, abs=1e-3)
    one = [r for r in (text, prepared) if r["tokens"] == prepared["tokens"]]
    assert prepared["documents"] == 1
    assert len({r["nats_per_token"] for r in one}) == 1
    assert choice["n"] == exact["n"] == 1
    assert choice["accuracy"] in (0, 1)
    assert written["settings"]["length"] == 32
    assert "jax" in written["environment"]["versions"]
    assert f"perplexity  {tmp_path / 'a.txt'}" in capsys.readouterr().out


@pytest.mark.slow
def test_prompts_are_continued_by_a_run(run_dir, capsys):
    words = (run_dir, "--tokens", 5, "--prompt", "To be", "--prompt", "")
    greedy = ("--sample.temperature", 0)
    assert generate(*words, *greedy, "--mesh.tensor", 2) == 0
    out = capsys.readouterr().out
    assert out.startswith("To be")
    assert "\n---\n" in out
    assert generate(f"{run_dir}@0", *words[1:], *greedy) == 0
    assert capsys.readouterr().out == out


def test_damage_is_told_by_the_exit_code(run_dir, tmp_path, capsys):
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    chunk = next(p for p in broken.glob("checkpoints/0/**/c/**/*") if p.is_file())
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    out = tmp_path / "out.npy"
    np.save(tmp_path / "ids.npy", [[1, 2]])
    asked = ("--ids", tmp_path / "ids.npy", "--logits", out)
    assert evaluate("--from", broken, *asked) == 12
    assert generate(broken, "--tokens", 3) == 12
    assert generate(f"{run_dir}@7", "--tokens", 3) == 12
    assert not out.exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[1, 89]], "from 1 to 89, and the model has 0 to 88"), ([[-1]], "from -1 to -1")],
)
def test_ids_outside_the_vocabulary_leave_no_file(tmp_path, capsys, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    words = ("--ids", tmp_path / "ids.npy", "--logits", tmp_path / "out.npy")
    assert evaluate("--from", LLAMA, *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]


def test_a_folder_without_a_tokenizer_is_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    assert evaluate("--from", LLAMA, "--text", tmp_path / "a.txt") == 2
    assert "tokenizer" in capsys.readouterr().err


# Words after --from LLAMA -> what the error says. {tmp} is a folder.
REFUSED = {
    "": "nothing is asked for",
    "--ids {tmp}/good.npy": "--ids and --logits go together",
    "--ids {tmp}/float.npy --logits {tmp}/o.npy": "holds float64 (2, 3)",
    "--ids {tmp}/one.npy --logits {tmp}/o.npy": "holds int64 (3,)",
    "--ids {tmp}/bool.npy --logits {tmp}/o.npy": "holds bool (1, 1)",
    "--ids {tmp}/empty.npy --logits {tmp}/o.npy": "holds no id",
    "--ids {tmp}/text.txt --logits {tmp}/o.npy": "cannot be read",
    "--ids {tmp}/two.npz --logits {tmp}/o.npy": "several arrays",
    "--ids {tmp}/none.npy --logits {tmp}/o.npy": "cannot be read",
    "--ids {tmp}/good.npy --logits {tmp}/no/o.npy": "is a folder, or in none",
    "--text {tmp}/none.txt": "names no file",
    "--text {tmp}/text.txt --length 0": "--length 0 must be 1 or more",
    "--text {tmp}/text.txt --out {tmp}": "--out",
    "--data {tmp}": "dataset.json",
    "--tasks {tmp}/text.txt": "text.txt:1 is not JSON",
    "--harness x --include_path {tmp}/none": "is no folder of tasks",
    "--text {tmp}/text.txt --mesh.fdsp 2": "did you mean --mesh.fsdp",
    "--text {tmp}/text.txt --train.steps 2": "changes nothing here",
}


def test_wrong_input_is_refused_before_jax_loads(tmp_path):
    np.save(tmp_path / "good.npy", [[1, 2]])
    np.save(tmp_path / "float.npy", np.zeros((2, 3)))
    np.save(tmp_path / "one.npy", [1, 2, 3])
    np.save(tmp_path / "bool.npy", [[True]])
    np.save(tmp_path / "empty.npy", np.zeros((0, 3), int))
    np.savez(tmp_path / "two.npz", a=[[1]])
    (tmp_path / "text.txt").write_text(TEXT)
    before = sorted(tmp_path.iterdir())
    lines = [["--from", str(LLAMA), *w.format(tmp=tmp_path).split()] for w in REFUSED]
    lines.append(["--from", str(tmp_path / "none"), "--text", "x"])
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
main = runpy.run_path({str(ROOT / "scripts/evaluate.py")!r})["main"]
for line in {lines!r}:
    print(main(line), "jax" in sys.modules, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 False"] * len(lines), done.stderr
    for message, error in zip(
        [*REFUSED.values(), "is not there"], done.stderr.splitlines(), strict=True
    ):
        assert error.startswith("error: ")
        assert message in error
    assert sorted(tmp_path.iterdir()) == before
