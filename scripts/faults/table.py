"""The rows, the ledger of their verdicts, and the table that both make.

A ledger line is a trial: row, number, how many checks it made, which failed, figures.
A trial stands once; one that is in the ledger is not run again.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from faults import shim
from faults.rig import ROOT

FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. `trials` of `each` checks are the whole of it, `sample`
    trials its sample; `file` is where `trial_<number>` stands. `figures`: what is told
    of the trials' figures, name -> how they are put together."""

    number: str
    what: str
    target: str
    file: str
    trials: int
    each: int = 1
    sample: int
    figures: dict[str, str] = dataclasses.field(default_factory=dict)


ROWS = [
    Row(number="1", what="kill -9 at random points", file="kills", trials=30, each=10,
        sample=2, target="bit-exact, one interval lost, and the save under way",
        figures={"lost_steps": "max", "lost_over_interval": "sum", "saves_cut": "sum",
                 "resume_secs": "median"}),
    Row(number="2", what="kill at every k-th I/O call of a save", file="saves",
        trials=190, sample=12, target="the newest or the previous commit loads",
        figures={"calls": "max", "newest": "sum"}),
    Row(number="3", what="kill between snapshot and commit", file="saves", trials=100,
        sample=8, target="latest is never uncommitted", figures={"newest": "sum"}),
    Row(number="4", what="a background save fails", file="saves", trials=20, sample=2,
        target="told by the next step, later saves go on, the last one exits 15",
        figures={"told_after_steps": "max"}),
    Row(number="5", what="donate or mutate right after a save", file="saves", trials=10,
        each=10, sample=1, target="saved bits are from before"),
    Row(number="6", what="one random bit flipped, anywhere in a checkpoint",
        file="damage", trials=20, each=50, sample=2,
        target="0 silent, falls back, names file and array",
        figures={"fell_back": "sum", "in_files_not_read": "sum"}),
    Row(number="7", what="truncate, delete, zero, append", file="damage", trials=8,
        each=50, sample=1, target="0 silent, falls back one interval",
        figures={"fell_back": "sum", "in_files_not_read": "sum"}),
    Row(number="8", what="valid chunks swapped between steps, or within one",
        file="damage", trials=4, each=50, sample=1, target="100% detected"),
    Row(number="9", what="all checkpoints bad", file="damage", trials=20, sample=1,
        target="exit 12, nothing overwritten"),
    Row(number="10", what="disk full at 10, 50, 90% of a save", file="saves", trials=30,
        sample=3, target="prior intact, told at once, goes on"),
    Row(number="11", what="EIO, short write, failing fsync or close", file="saves",
        trials=200, sample=15, target="0 told as saved but lost",
        figures={"failed": "sum", "survived": "sum"}),
    Row(number="12", what="30% of S3 calls 503 or reset; nobody answers for 60 s",
        file="outage", trials=10, each=6, sample=1,
        target="all saves complete, or a typed error; no hang",
        figures={"most_secs": "max", "typed": "sum"}),
    Row(number="13", what="fsync takes 60 s (3 s in the sample)", file="saves",
        trials=2, sample=1, target="a step at most 5% slower until a save waits",
        figures={"step_ratio": "max", "fsync_secs": "max"}),
    Row(number="15", what="grace too short: SIGKILL 1 s after SIGTERM", file="kills",
        trials=10, each=5, sample=1, target="last commit loads, bit-exact",
        figures={"saved_in_time": "sum"}),
    Row(number="21", what="8 -> 4 -> 2 -> 8 devices, data, fsdp, tensor", file="meshes",
        trials=6, sample=1, target="arrays bitwise, order same, loss within 1e-6",
        figures={"loss_relative": "max"}),
    Row(number="22", what="impossible mesh or batch", file="meshes", trials=24,
        sample=4, target="exit 2 in under 2 s, before jax",
        figures={"secs": "max"}),
    Row(number="23", what="kills with second and third resumes", file="kills",
        trials=4, each=5, sample=1, target="0 missing, 0 duplicate rows of data",
        figures={"resumes": "max"}),
    Row(number="24", what="damaged data shard", file="damage", trials=4, each=50,
        sample=1, target="detected at first read: stop, or quarantine",
        figures={"stopped": "sum", "quarantined": "sum"}),
    Row(number="25", what="fuzzed manifests, configs, headers", file="fuzz", trials=50,
        each=2000, sample=1, target="typed errors alone, <= 5 s, bounded memory",
        figures={"accepted": "sum", "max_secs": "max", "grown_mib": "max"}),
    Row(number="28", what="config typos; a changed config on resume", file="fuzz",
        trials=11, each=50, sample=2, target="refused with a hint, or with a diff",
        figures={"hinted": "sum"}),
    Row(number="29", what="malicious files under an audit hook", file="hostile",
        trials=30, sample=4, target="0 pickle, exec, subprocess, socket events",
        figures={"loads": "sum"}),
    Row(number="30", what="path traversal in names and indexes", file="hostile",
        trials=16, sample=3, target="refused, 0 opens outside the folder"),
    Row(number="31", what="resource bombs", file="bombs", trials=18, sample=4,
        target="<= 5 s, limit + 64 MiB", figures={"secs": "max", "grown_mib": "max"}),
    Row(number="32", what="secrets in the environment and in URLs", file="canaries",
        trials=10, sample=2, target="0 hits in output, run folder, checkpoints",
        figures={"bytes_searched": "sum"}),
    Row(number="36", what="damaged compile cache", file="damage", trials=12, sample=1,
        target="goes on, bit-exact"),
    Row(number="37", what="two jobs on one run folder", file="owners", trials=50,
        sample=4, target="the second exits 16, a fenced writer cannot commit"),
    Row(number="flip", what="one bit flipped, then resumed", file="damage", trials=20,
        sample=1, target="newest passed over, file and array named, bit-exact"),
    Row(number="loop", what="the command under kill -9 every 20 s for 15 minutes",
        file="kills", trials=1, each=45, sample=0, target="finishes, bit-exact",
        figures={"steps": "max", "lost_steps": "max", "minutes": "max"}),
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A trial's outcome, as a ledger holds it."""

    row: str
    trial: int
    count: int
    failures: list[str]
    figures: dict[str, Any]
    secs: float
    commit: str


class Ledger:
    """A file of verdicts, one JSON object a line, appended to as they come."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[tuple[str, int], Verdict]:
        """What is known; a last line that was cut short is a trial not made."""
        found = {}
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.split("\n"):
            if line.endswith("}"):
                verdict = Verdict(**json.loads(line))
                found[verdict.row, verdict.trial] = verdict
        return found

    def add(self, verdict: Verdict) -> None:
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps(dataclasses.asdict(verdict)))
            file.flush()
            os.fsync(file.fileno())


def cache_folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home, "jaxinfra", "faults")


def choose(names: str) -> list[Row]:
    """The rows of `1,6,loop`; all where it is empty."""
    known = {row.number: row for row in ROWS}
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"--rows {unknown[0]}: must be of {', '.join(known)}")
    return [known[name] for name in wanted]


def measure(args: Any, results: pathlib.Path) -> dict[str, Any]:
    """The verb of `bench.py`: makes the trials that are wanted, and writes the table
    as text beside its JSON; not where `--ledger` names a ledger of one's own."""
    own = args.ledger or ""
    ledger = Ledger(pathlib.Path(own or cache_folder() / "ledger.jsonl"))
    rows = choose(args.rows)
    run(rows, ledger, is_full=args.full, trials=args.trials, minutes=args.minutes)
    told = summary(ROWS, ledger)
    print(markdown(told))
    if not own:
        (results / "faults.md").write_text(markdown(told))
    failed = sum(row["verdict"] == "fail" for row in told)
    return {"rows": told, "failed": failed, "is_trial": bool(own)}


def run(
    rows: list[Row], ledger: Ledger, *, is_full: bool, trials: int, minutes: float
) -> None:
    """Makes the trials that the ledger lacks, until done or `minutes` are over.

    `trials`: of each row at most so many; 0: as the rows say.
    """
    began, known = time.monotonic(), ledger.read()
    jobs = [
        (row.number, number)
        for row in rows
        for number in range(
            min(row.trials, trials or (row.trials if is_full else row.sample))
        )
        if (row.number, number) not in known
    ]
    commit = _commit()
    while jobs:
        left = minutes * 60 - (time.monotonic() - began) if minutes else 0.0
        if minutes and left <= 0:
            print(f"{len(jobs)} trials are left: the same command goes on")
            return
        for told in _work(jobs, secs=left):
            verdict = Verdict(commit=commit, **told)
            ledger.add(verdict)
            jobs.remove((verdict.row, verdict.trial))
            sign = "FAILED " + verdict.failures[0] if verdict.failures else "ok"
            print(
                f"row {verdict.row} trial {verdict.trial}: {sign} "
                f"({verdict.secs:.1f} s) {verdict.figures or ''}",
                flush=True,
            )


def _work(jobs: list[tuple[str, int]], *, secs: float) -> Iterable[dict[str, Any]]:
    """A worker's verdicts; one that dies has failed the trial that it was at."""
    home = cache_folder() / _version()
    home.mkdir(parents=True, exist_ok=True)
    begun = None
    # JAX_* and XLA_* of the caller would make other runs of these.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    kept |= {"LD_PRELOAD": str(shim.build(cache_folder()))}
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(FOLDER / "worker.py"), str(home), work]
        with subprocess.Popen(
            [*command, str(secs), json.dumps(jobs)],
            stdout=subprocess.PIPE,
            text=True,
            env=kept,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "begun" in told:
                    begun = told["begun"]
                else:
                    begun = None
                    yield told
        if process.returncode and begun is None:
            raise SystemExit(f"a worker ended with {process.returncode}")
        if process.returncode in (-signal.SIGTERM, -signal.SIGINT):
            raise SystemExit("stopped: the same command goes on")
        if begun:
            text = f"the worker died of it: {process.returncode}"
            row, number = begun
            yield {"row": row, "trial": number, "count": 1, "failures": [text],
                   "figures": {}, "secs": 0.0}  # fmt: skip


def summary(rows: list[Row], ledger: Ledger) -> list[dict[str, Any]]:
    """One object a row: N, passed, figures, verdict."""
    known, told = ledger.read(), []
    for row in rows:
        made = [v for (name, _), v in sorted(known.items()) if name == row.number]
        if not made:
            continue
        count = sum(v.count for v in made)
        failures = [f for v in made for f in v.failures]
        figures = {
            name: _together([v.figures[name] for v in made if name in v.figures], how)
            for name, how in row.figures.items()
        }
        told.append(
            {
                "row": row.number,
                "what": row.what,
                "target": row.target,
                "n": count,
                "passed": count - min(count, len(failures)),
                "of": row.trials * row.each,
                "figures": {k: v for k, v in figures.items() if v is not None},
                "verdict": "fail" if failures else "pass",
                "failures": failures[:5],
                "secs": round(sum(v.secs for v in made), 1),
                "commits": sorted({v.commit for v in made}),
            }
        )
    return told


def markdown(told: list[dict[str, Any]]) -> str:
    """The table as people read it."""
    text = [
        "# The fault table, as measured",
        "",
        "Written by `scripts/bench.py faults`; `faults.json` beside it has the same.",
        "N is of checks made so far; in brackets the whole of a row that is not done.",
        "",
        "| # | what | N | passed | figures | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in told:
        count = str(row["n"]) + (f" ({row['of']})" if row["n"] < row["of"] else "")
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in row["figures"].items()
        )
        text.append(
            f"| {row['row']} | {row['what']}: {row['target']} | {count} | "
            f"{row['passed']} | {figures} | {row['verdict']} |"
        )
    return "\n".join(text) + "\n"


def _together(values: list[Any], how: str) -> Any:
    if not values:
        return None
    flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
    if not flat:
        return None
    middle = sorted(flat)[len(flat) // 2]
    value = {"max": max(flat), "sum": sum(flat), "median": middle}[how]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _version() -> str:
    """A digest of the sources that the quiet runs come from."""
    found = hashlib.sha256()
    for path in sorted([*(ROOT / "jaxinfra").rglob("*.py"), FOLDER / "rig.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
