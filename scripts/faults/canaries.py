"""Secrets in the environment and in URLs, looked for in all that a run leaves."""

import contextlib
import functools
import http.server
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from faults import rig as rigs
from faults.rig import Outcome, Rig

_SECRETS = {
    "AWS_ACCESS_KEY_ID": "CANARYAKIA0001",
    "AWS_SECRET_ACCESS_KEY": "CANARYsecret0002",
    "AWS_SESSION_TOKEN": "CANARYtoken0003",
    "HF_TOKEN": "hf_CANARY0004",
    "WANDB_API_KEY": "CANARYwandb0005",
    "GOOGLE_APPLICATION_CREDENTIALS": "/CANARY0006/key.json",
    "HADOOP_USER_NAME": "CANARY0007",
}


def trial_32(rig: Rig, number: int) -> Outcome:
    """A run with secrets in its environment, and in URLs: not one is told anywhere."""
    assert rig.quiet  # its data set is what is served
    out, searched = Outcome(), 0
    with rig.folder() as folder, _served(rig) as port:
        run_dir = folder / "run"
        secret = f"http://user:CANARY0008@127.0.0.1:{port}"
        gone = "http://user:CANARY0009@127.0.0.1:9/set?X-Amz-Signature=CANARY0010"
        signed = f"http://127.0.0.1:{port}/set?X-Amz-Signature=CANARY0011"
        crash = folder / "crash.py"
        crash.write_text(_CRASH)
        cases: list[tuple[dict[str, Any], int]] = [
            ({}, 0),
            ({"data.path": f"{secret}/set"}, 0),
            ({"data.path": signed}, 0),
            ({"data.path": gone}, 2),
            ({"data.path": f"{secret}/none"}, 2),
            ({"eval.sets.other": f"{secret}/set"}, 0),
            ({"data.sets.one": f"{secret}/set", "data.sets.two": f"{secret}/set"}, 0),
            ({"init.from": gone}, 2),
            ({"config": crash, "data.path": f"{secret}/set"}, 1),
            ({"data.path": "s3://CANARY0012:CANARY0013@bucket/set"}, 2),
        ]
        settings, code = cases[number % len(cases)]
        words = rig.words(run_dir, train__steps=6, train__save_every=3)
        cache = folder / "cache"  # of what is read by URL
        words += [f"--data.cache_dir={cache}"]
        words = [w for w in words if not w.startswith(f"--data.cache_dir={rig.home}")]
        words = [f"--{k}={v}" for k, v in settings.items()] + words

        def run() -> int:
            os.environ |= _SECRETS
            sys.argv = ["train.py", *words]  # what environment.json tells of it
            return rigs.train(words)

        ended = rigs.forked(run)
        out.check(ended.code == code, f"{settings}: {ended.code} {ended.text[-300:]}")
        if code == 0:  # and going on, and being refused to
            ended_again = rigs.forked(run)
            out.check(ended_again.code == 0, f"again: {ended_again.text[-300:]}")
            words.append("--optimizer.beta1=0.5")
            refused = rigs.forked(run)
            out.check(refused.code == 2, f"refused: {refused.code} {refused.text}")
            _search(out, "refusal", refused.text.encode())
        _search(out, "output", ended.text.encode())
        for place in (run_dir, cache):
            for path in sorted(place.rglob("*")):
                _search(out, str(path), str(path).encode())
                if path.is_file():
                    data = path.read_bytes()
                    searched += len(data)
                    _search(out, str(path), data)
    out.figures = {"bytes_searched": searched}
    return out


_CRASH = '''"""A config whose task fails in the middle of a run."""
from jaxinfra import options

TASK_KEYS = ("data", "eval", "init", "model", "sample", "train")


def get_config():
    return options.load_config("tiny")


def get_task(config, layout, policy):
    raise RuntimeError("broken on purpose")
'''


def _search(out: Outcome, where: str, data: bytes) -> None:
    at = data.find(b"CANARY")
    out.check(at < 0, f"{where} tells {data[max(0, at - 60) : at + 20]!r}")


@contextlib.contextmanager
def _served(rig: Rig) -> Iterator[int]:
    """The run's data set on a web server that wants no password; its port."""
    source = next((rig.home / "cache" / "data").iterdir())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = source / self.path.partition("?")[0].removeprefix("/set/")
            if not self.path.startswith("/set/") or not path.is_file():
                return self.send_error(404)
            data, status, where = path.read_bytes(), 200, ""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if found:
                first, last = int(found[1]), int(found[2] or len(data) - 1)
                where = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if where:
                self.send_header("Content-Range", where)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)
            return None

        do_HEAD = do_GET

        def log_message(self, format: str, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    child = rigs.Child(functools.partial(server.serve_forever, 0.01))
    port = server.server_port
    server.server_close()
    try:
        yield port
    finally:
        child.signal(9)
        child.wait()
