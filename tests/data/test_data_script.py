"""scripts/data.py: what it prints of a data set, and its exit codes."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jaxinfra.data import chat, packing, prepare
from jaxinfra.data.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "data.py"
    spec = importlib.util.spec_from_file_location("data_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(tmp_path):
    texts = ["short", "short", "[bold]no markup[/bold]", "x" * 100]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return prepare.prepare(
        [file], tmp_path / "set", tokenizer="byte", split="documents", held_out=0,
        seed=0,
    )  # fmt: skip


def test_it_shows_rows_lengths_and_copies(script, dataset, capsys):
    assert script.main(["inspect", str(dataset.folder), "--length", "200"]) == 0
    out = capsys.readouterr().out
    assert "4 documents, 136 tokens" in out
    assert "[bold]no markup[/bold]" in out
    assert "x" * 100 in out.replace("\n", "")
    assert "4..7          2 ####" in out
    assert "64..127          1 ####" in out
    assert "quantiles: 0% 6, 10% 6, 50% 14, 90% 78, 100% 101" in out
    assert "1 documents (25.0%) are copies of another" in out


def test_documents_have_colours_of_their_own_and_padding_none(script):
    tokens = np.frombuffer(b"aabbb\0\0", np.uint8).astype(np.uint16)[None]
    cuts = np.array([[5, 2]], np.uint8)
    weights = np.array([[1, 1, 0, 1, 1, 0, 0]], np.uint8)
    batch = packing.Batch(tokens, cuts, weights)
    [row] = script.as_texts(batch, ByteTokenizer())
    assert row.plain == "aa ¦ bbb"
    styles = [(row.plain[s.start : s.end], str(s.style)) for s in row.spans]
    assert styles == [
        ("aa", "cyan"), (" ¦ ", "bold"), ("b", "dim magenta"), ("bb", "magenta"),
    ]  # fmt: skip


def test_masks_of_conversations_are_seen(script, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "Who? ", "completion": "I."}) + "\n")
    chat.prepare_chat(
        [file], tmp_path / "set", tokenizer=ByteTokenizer(), template=None,
        held_out=0, seed=0,
    )  # fmt: skip
    assert script.main(["inspect", str(tmp_path / "set"), "--rows", "1"]) == 0
    assert "Who? I." in capsys.readouterr().out


def test_verify_tells_damage_by_its_exit_code(script, dataset, capsys):
    assert script.main(["verify", str(dataset.folder)]) == 0
    assert "4 files, 0 findings" in capsys.readouterr().out
    file = dataset.folder / "train-00000.tokens.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert script.main(["verify", str(dataset.folder)]) == 1
    out = capsys.readouterr().out
    assert "train-00000.tokens.npy has checksum" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "none"], "dataset.json cannot be read"),
        (["inspect", "SET", "--split", "held_out"], "has no split 'held_out'"),
        (["inspect", "SET", "--length", "0"], "train.length=0 must be 1 or more"),
    ],
)
def test_wrong_input_ends_with_2(script, dataset, capsys, argv, message):
    argv = [str(dataset.folder) if word == "SET" else word for word in argv]
    assert script.main(argv) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_it_shows_what_each_set_gives_in_each_stage(script, dataset, capsys):
    words = ["mixture", f"a={dataset.folder}", f"b={dataset.folder}", "--length", "8"]
    words += ["--weights", "a=0.75 0.5@10", "b=0.25 0.5@10", "--batch_size", "4"]
    assert script.main([*words, "--steps", "30"]) == 0
    out = capsys.readouterr().out.replace("│", " ").replace("┃", " ")
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert [row[:4] for row in rows] == [
        ["a", "0", "75.000%", "30"],
        ["b", "0", "25.000%", "10"],
        ["a", "40", "50.000%", "40"],
        ["b", "40", "50.000%", "40"],
    ]
    num_rows = 17  # of 136 tokens
    assert rows[2][4] == f"{70 / num_rows:.2f}"
    assert script.main([*words[:5], "--weights", "a=1", "c=1"]) == 2
    assert "give each set a weight" in capsys.readouterr().err
    assert script.main(["mixture", str(dataset.folder)]) == 2
    assert "must be NAME=VALUE words" in capsys.readouterr().err
    secret = "a=https://user:CANARY@host/set"
    assert script.main(["mixture", secret, secret]) == 2
    assert "a a must be NAME=VALUE words" in capsys.readouterr().err
    for steps in ("0", "-5"):
        assert script.main([*words, "--steps", steps]) == 2
        assert f"--steps {steps} must be 1 or more" in capsys.readouterr().err
