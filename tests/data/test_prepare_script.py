import importlib.util
import json
import pathlib
import re
import struct
import subprocess
import sys

import pytest

from jaxinfra.data import shards

ROOT = pathlib.Path(__file__).parents[2]
CHAT = {
    "messages": [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": "Nay, answer me."},
    ]
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def run(*arguments):
    command = [sys.executable, ROOT / "scripts" / "prepare.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )


@pytest.fixture(scope="module")
def main():
    """The script's main, in this process."""
    path = ROOT / "scripts" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(a) for a in argv])


def test_the_script_writes_a_data_set_and_prints_a_summary(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one|two|three|four")
    done = run(text, "--out", tmp_path / "set", "--document_separator", "|", "--seed=3")
    assert done.returncode == 0, done.stderr
    assert "tokenizer byte, 257 ids" in done.stdout
    assert "held_out 1 documents" in done.stdout
    assert f"{tmp_path / 'set'} written in" in done.stdout


def test_the_script_ends_with_2_and_one_sentence_for_a_bad_input(tmp_path):
    done = run(tmp_path / "none.txt", "--out", tmp_path / "set")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "names no file; give a .txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_script_ends_with_2_for_an_unknown_option(tmp_path):
    done = run("a.txt", "--out", tmp_path / "set", "--shards", "3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_text_is_cleaned_and_copies_are_left_out(main, tmp_path, capsys):
    texts = ["A  text\u00a0here.", "A text here.", "no", "Another\r\none.", "   "]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    code = main(
        tmp_path / "a.jsonl", "--out", tmp_path / "set", "--clean", "unicode", "space",
        "--min_chars", "5", "--duplicates", "exact", "--held_out", "0",
    )  # fmt: skip
    told = capsys.readouterr()
    assert code == 0, told.err
    [shard] = shards.open_dataset(tmp_path / "set").splits["train"].shards
    assert set(shard.lengths) == {len("A  text here.") + 1, len("Another\none.") + 1}
    for line in (
        "space              took 1 documents",
        "length             took 1 documents, 2 characters",
        "exact copies       took 1 documents",
    ):
        assert line in told.out


def test_a_tokenizer_is_trained_and_used_again_for_other_texts(main, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    text = tmp_path / "a.txt"
    text.write_text("the rain in spain stays mainly in the plain " * 50)
    first = tmp_path / "first"
    bpe = ("--train_tokenizer", "bpe", "--vocab_size", 280)
    assert main(text, "--split", "tail", "--out", first, *bpe) == 0
    assert "tokenizer hf, 2" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(text, "--split", "tail", "--out", again, "--tokenizer", first) == 0
    ours, theirs = shards.open_dataset(first), shards.open_dataset(again)
    assert ours.digest == theirs.digest
    assert ours.tokenizer.vocab_size < 281


def test_conversations_and_pairs_become_a_data_set_with_masks(main, tmp_path, capsys):
    pytest.importorskip("jinja2")
    lines = tmp_path / "a.jsonl"
    pair = {"prompt": "1 + 1 =", "completion": " 2"}
    lines.write_text(f"{json.dumps(CHAT)}\n{json.dumps(pair)}\n")
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    out = tmp_path / "set"
    chat = ("--chat", "--chat_template", template)
    assert main(lines, "--out", out, *chat, "--held_out", 0) == 0
    # "Nay, answer me.\n" and " 2", and an EOD for each.
    told = capsys.readouterr()
    assert "20 tokens count as targets" in told.out
    assert told.err == ""
    assert main(lines, "--out", out, *chat, "--held_out", 0.5) == 2
    assert "holds another data set" in capsys.readouterr().err


def test_a_megatron_data_set_becomes_a_data_set(main, tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(b"abcd")
    (tmp_path / "a.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 1, 2, 3, 3, 1, 0, 3, 0, 1, 2)
    )
    names = (tmp_path / "a.bin", tmp_path / "a.idx")
    options = ("--out", tmp_path / "set", "--tokenizer", "byte", "--held_out", 0)
    assert main(*names, *options) == 0
    assert "train    2 documents, 6 tokens, 4 bytes" in capsys.readouterr().out
    for more, message in (
        ((tmp_path / "b.bin",), "is prepared by itself"),
        ((tmp_path / "a.txt",), "is prepared by itself; name its .bin alone"),
        (("--clean", "space"), "is taken as it is; leave --chat, "),
        (("--chat",), "is taken as it is"),
        (("--split", "tail"), "is taken as it is"),
    ):
        assert main(names[0], *more, *options) == 2
        assert message in capsys.readouterr().err
    assert main(names[0], "--out", tmp_path / "other") == 2
    assert "give the --tokenizer that made them" in capsys.readouterr().err


def test_names_in_a_template_that_are_no_tokens_are_told(main, tmp_path, capsys):
    pytest.importorskip("jinja2")
    lines, template = tmp_path / "a.jsonl", tmp_path / "chat.jinja"
    lines.write_text(json.dumps(CHAT))
    template.write_text(TEMPLATE.replace("'\n'", "'<|im_end|>\n'"))
    options = ("--chat", "--chat_template", template, "--held_out", 0)
    assert main(lines, "--out", tmp_path / "set", *options) == 0
    assert "writes <|im_end|>, no tokens of the tokenizer" in capsys.readouterr().err


def test_a_line_that_is_nested_too_deeply_ends_with_2(main, tmp_path, capsys):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"messages": ' + "[" * 900 + "]" * 900 + "}")
    assert main(lines, "--out", tmp_path / "set", "--chat") == 2
    assert re.search(r"a.jsonl:1: is nested too deeply", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train_tokenizer bpe", "--vocab_size go together"),
        ("--vocab_size 300", "--vocab_size go together"),
        ("--train_tokenizer bpe --vocab_size 300 --tokenizer byte", "leave one of"),
        ("--train_tokenizer bpe --vocab_size 300 --eod x", "--eod and --bos are for"),
        ("--train_tokenizer bpe --vocab_size 300 --chat", "--chat needs a tokenizer"),
        ("--tokenizer word", "data.tokenizer='word' is not known"),
        ("--tokenizer byte --eod x", "data.eod and data.bos are for"),
        ("--tiktoken_pattern gpt2", "--tiktoken_pattern are for a tokenizer"),
        ("--chat --split tail", "holds out whole conversations"),
        ("--chat --text_key a", "--text_key and --document_separator are for text"),
        ("--chat --tokenizer char", "char tokenizer is made of texts"),
        ("--chat --tokenizer byte --bos always", "--eod, --bos and"),
        ("--chat", "messages need a chat template"),
        ("--chat --tokenizer none", "none cannot be read"),
        ("--chat_template a.jinja", "give --chat too"),
        ("--date 2026-01-31", "give --chat too"),
        ("--chat --clean space", "are for text, not for conversations"),
        ("--near_threshold 0.5", "--near_threshold is of --duplicates near"),
        ("--duplicates near --near_threshold 0", "near_threshold=0.0 must be from 0.1"),
        ("--duplicates near --near_threshold 1.5", "near_threshold=1.5 must be from"),
        ("--min_chars 5 --max_chars 4", "keep nothing"),
        ("", "no text under the key 'text'.* with --chat"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(
    main, tmp_path, capsys, options, message
):
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(CHAT))
    assert main(lines, "--out", tmp_path / "set", *options.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("prepare: ")
    assert len(told.err.splitlines()) == 1
    assert re.search(message, told.err), told.err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("options", ["--date soon", "--bos maybe", "--vocab_size many"])
def test_values_of_another_type_end_with_2(main, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as ended:
        main("a.txt", "--out", tmp_path / "set", *options.split())
    assert ended.value.code == 2
    assert options.split()[0] in capsys.readouterr().err


def test_rows_are_laid_out_and_their_padding_told(main, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("|".join("x" * n for n in (3, 30, 4, 9, 5, 8, 2, 12)))
    words = [text, "--out", tmp_path / "set", "--document_separator", "|"]
    words += ["--held_out", "0"]
    assert main(*words, "--packing", "best_fit", "--length", "15") == 0
    assert "6 rows by best_fit, 14.58% padding" in capsys.readouterr().out
    split = shards.open_dataset(tmp_path / "set").split("train")
    assert split.layout[:2] == ("best_fit", 15)
    for wrong in (["--packing", "first_fit"], ["--length", "9"]):
        words[2] = tmp_path / "other"
        assert main(*words, *wrong) == 2
        assert "the others need that of train.length" in capsys.readouterr().err


SECRET = "https://user:CANARY@127.0.0.1:9/a"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            [f"{SECRET}.bin", "--tokenizer", "byte"],
            "source='https://127.0.0.1:9/a.bin'",
        ),
        ([f"{SECRET}.png"], "https://127.0.0.1:9/a.png is no file of texts"),
        (["TEXT", "--tokenizer", SECRET], "data.tokenizer='https://127.0.0.1:9/a' is"),
        (["TEXT", "--tokenizer", SECRET, "--tiktoken_pattern", "gpt2"], "is a URL"),
        (["LINES", "--chat", "--tokenizer", SECRET], "data.tokenizer='https://127"),
        (["LINES", "--chat", "--chat_template", SECRET], "chat_template='https://127"),
        (
            ["TEXT", "--out", SECRET],
            "out='https://127.0.0.1:9/a' is a URL, and must be",
        ),
    ],
)
def test_no_message_shows_a_password(main, tmp_path, capsys, options, told):
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    places = {"TEXT": tmp_path / "a.txt", "LINES": tmp_path / "a.jsonl"}
    options = ["--out", tmp_path / "set", *(places.get(o, o) for o in options)]
    assert main(*options) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "CANARY" not in error


@pytest.mark.parametrize("kind", ["text", "chat", "megatron"])
def test_a_data_set_is_not_written_to_a_url(main, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    words = {
        "text": ["a.txt"],
        "chat": ["a.jsonl", "--chat"],
        "megatron": ["a.bin", "--tokenizer", "byte"],
    }
    assert main(*words[kind], "--out", "s3://bucket/set") == 2
    told = capsys.readouterr().err
    assert told == (
        "prepare: out='s3://bucket/set' is a URL, and must be a path on this machine; "
        "write it to a folder, and upload that (aws s3 cp --recursive, hdfs dfs -put)\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "a.jsonl"}
