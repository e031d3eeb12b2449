import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, ROOT / "scripts" / "prepare.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )


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
