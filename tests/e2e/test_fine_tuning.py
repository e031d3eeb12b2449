"""A published model by the commands that a user has: conversations are prepared with
its tokenizer, it learns their answers, is measured, and goes out again."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from e2e import command
from golden_checkpoints import GOLDEN

tokenizers = pytest.importorskip("tokenizers")

CORPUS = command.ROOT / "jaxinfra" / "data" / "corpus" / "shakespeare.txt"
STEPS = 20
# Rows of training cut some documents, whose second parts see less before them.
CUT = 0.03
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def script(name, *argv):
    done = subprocess.run(
        [sys.executable, command.ROOT / "scripts" / f"{name}.py", *map(str, argv)],
        env=command.environment(),
        cwd=command.ROOT,
        text=True,
        capture_output=True,
        timeout=command.TIMEOUT_SECS,
    )
    return done.returncode, done.stdout, done.stderr


def run(name, *argv):
    code, out, errors = script(name, *argv)
    assert code == 0, errors
    return out


def words(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def pairs(file):
    """Speeches of the shipped plays with the speech that answers each."""
    found = re.findall(
        r"\n\n([A-Z][A-Za-z ]{2,20})\.\n((?:[^\n]+\n)+)", CORPUS.read_text()
    )
    asked = [
        {"messages": [
            {"role": "user", "content": said.strip()},
            {"role": "assistant", "content": answer.strip()},
        ]}
        for (one, said), (other, answer) in itertools.pairwise(found)
        if one != other and len(said) < 60 and len(answer) < 60
    ]  # fmt: skip
    file.write_text("".join(json.dumps(pair) + "\n" for pair in asked[:200]))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The golden llama with a tokenizer of its 89 ids."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    shutil.copytree(GOLDEN / "llama", folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=89, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    lines = CORPUS.read_text().splitlines(keepends=True)
    made.train_from_iterator(lines[:8000], trainer)
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tuned(cache, published, tmp_path_factory):
    """(the run, its data, its settings)."""
    folder = tmp_path_factory.mktemp("tuned")
    pairs(folder / "pairs.jsonl")
    run(
        "prepare", folder / "pairs.jsonl", "--chat", "--tokenizer", published,
        "--out", folder / "data", "--split", "documents", "--held_out", "0.2",
    )  # fmt: skip
    settings = {
        "data.path": folder / "data", "data.cache_dir": cache["data.cache_dir"],
        "init.from": published, "init.model": "true", "run.dir": folder / "run",
        "train.steps": STEPS, "train.batch_size": 16, "train.length": 128,
        "eval.every": 10, "optimizer.learning_rate": 1e-2, "sample.tokens": 0,
    }  # fmt: skip
    done = command.run(words(settings))
    assert done.returncode == 0, done.stderr
    assert "parameters from" in done.stdout
    return folder / "run", folder / "data", settings


@pytest.mark.slow
def test_answers_are_learned_and_all_tools_agree_on_how_well(tuned, tmp_path):
    run_dir, data, _ = tuned
    told = [line for line in command.metrics(run_dir) if "eval/loss" in line]
    assert told[-1]["eval/loss"] < told[0]["eval/loss"] - 0.3
    assert "eval/bits_per_byte" not in told[-1], "answers have no bytes of their own"
    out = tmp_path / "figures.json"
    run("evaluate", "--from", run_dir, "--data", data, "--out", out)
    [figures] = json.loads(out.read_text())["results"]
    assert 0 < figures["targets"] < figures["tokens"]
    expected = told[-1]["eval/loss"]
    assert figures["nats_per_token"] == pytest.approx(expected, rel=CUT)


@pytest.mark.slow
def test_it_goes_out_and_comes_back_with_its_tokenizer(tuned, published, tmp_path):
    run_dir, data, _ = tuned
    out, again = tmp_path / "out", tmp_path / "again"
    run("convert", "--from", run_dir, "--to", out)
    run("convert", "--from", out, "--to", again)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    length = json.loads((out / "config.json").read_text())["max_position_embeddings"]
    stated = json.loads((published / "config.json").read_text())
    assert length == stated["max_position_embeddings"]
    figures = []
    for source in (run_dir, out, again):
        file = tmp_path / f"{len(figures)}.json"
        run("evaluate", "--from", source, "--data", data, "--out", file)
        figures.append(json.loads(file.read_text())["results"][0]["nats_per_token"])
    assert figures[0] == figures[1] == figures[2]
    ids = np.arange(12).reshape(2, 6)
    np.save(tmp_path / "ids.npy", ids)
    logits = []
    for source in (run_dir, again):
        asked = ["--ids", tmp_path / "ids.npy", "--logits", tmp_path / "logits.npy"]
        run("evaluate", "--from", source, *asked)
        logits.append(np.load(tmp_path / "logits.npy"))
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_transformers_loads_what_was_tuned(tuned, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    run_dir, _, _ = tuned
    run("convert", "--from", run_dir, "--to", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer("What news?", return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**asked, do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(found[0], skip_special_tokens=True)
    ours = run(
        "generate", run_dir, "--prompt", "What news?", "--tokens", 12,
        "--sample.temperature", 0,
    )  # fmt: skip
    assert ours.rstrip("\n") == text.rstrip("\n")


def test_data_of_another_tokenizer_is_refused(tuned, published, tmp_path):
    run_dir, _, settings = tuned
    (tmp_path / "text.txt").write_text("To be, or not to be.\n\n" * 400)
    run(
        "prepare", tmp_path / "text.txt", "--tokenizer", "byte",
        "--out", tmp_path / "data", "--split", "tail",
    )  # fmt: skip
    other = {"data.path": tmp_path / "data", "run.dir": tmp_path / "run"}
    other["model.vocab_size"] = 257
    for source in (published, run_dir):
        done = command.run(words(settings | other | {"init.from": source}))
        assert done.returncode == 2, done.stderr
        assert "another tokenizer than the data" in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_model_is_refused(published, tmp_path):
    damaged = tmp_path / "model"
    shutil.copytree(published, damaged)
    described = json.loads((damaged / "tokenizer.json").read_text())
    token = described["added_tokens"][0] | {"id": 89, "content": "<more>"}
    described["added_tokens"].append(token)
    (damaged / "tokenizer.json").write_text(json.dumps(described))
    for name, argv in {
        "convert": ["--from", damaged, "--to", tmp_path / "run"],
        "generate": [damaged, "--tokens", 3],
        "evaluate": ["--from", damaged, "--text", CORPUS],
    }.items():
        code, _, errors = script(name, *argv)
        assert (code, "Traceback" in errors) == (2, False), (name, errors)
        assert "has 90 ids and its model 89" in errors
    assert not (tmp_path / "run").exists()
