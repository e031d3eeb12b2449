"""Lines of steps that are made again, and of a run that was taken over."""

import json

from jaxinfra import resuming, runfolder


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_of_lost_steps_are_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {k}}}\n' for k in (1, 2, 3)) + '{"st')
    assert resuming.rewind_metrics(tmp_path, 2) == 2
    assert steps(path) == [1, 2]
    assert (tmp_path / "metrics.lost.jsonl").read_text() == '{"step": 3}\n{"st\n'


def test_who_was_taken_over_writes_to_the_old_file(tmp_path):
    old = runfolder.json_lines(tmp_path / "metrics.jsonl")
    old.write({"step": 1})
    assert resuming.rewind_metrics(tmp_path, 1) == 0
    new = runfolder.json_lines(tmp_path / "metrics.jsonl")
    for lines in (old, new):
        lines.write({"step": 2})
        lines.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
