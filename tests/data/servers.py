"""Small web servers in a thread, which serve bytes and fail as they are told."""

import contextlib
import dataclasses
import http.server
import json
import posixpath
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Server:
    """What is served; `fault` says for a request what goes wrong: an HTTP status,
    "reset" or "cut" (in the middle of the bytes), or nothing."""

    files: dict[str, bytes]  # by path, without the first slash
    has_ranges: bool = True
    has_sizes: bool = True
    fault: Callable[[str], int | str | None] = lambda request: None
    requests: list[str] = dataclasses.field(default_factory=list)  # "GET /a 0-9"
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    port: int = 0
    connections: list[socket.socket] = dataclasses.field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        """Serves until the block ends, each time at the same port."""
        handler = type("Handler", (_Handler,), {"served": self})
        with _Web(("127.0.0.1", self.port), handler) as web:
            self.port = web.server_port
            threading.Thread(target=web.serve_forever, args=(0.01,)).start()
            try:
                yield self
            finally:
                web.shutdown()
                for connection in self.connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


class _Web(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Says nothing: clients go away, and faults are meant."""


class _Handler(http.server.BaseHTTPRequestHandler):
    served: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.served.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = f" {found[1]}-{found[2]}" if found else ""
        request = f"{self.command} {self.path}{part}"
        self.served.requests.append(request)
        self.served.headers.append(dict(self.headers))
        fault = self.served.fault(request)
        if isinstance(fault, int):
            return self.answer(fault, b"out of order")
        if fault == "reset":
            return self.reset()
        split = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(split.path).lstrip("/")
        if path.startswith("webhdfs/v1/"):
            query = dict(urllib.parse.parse_qsl(split.query))
            return self.webhdfs(path.removeprefix("webhdfs/v1/"), query)
        if path.endswith("/") or not path:
            path = path.rstrip("/")
            names = [
                name if posixpath.join(path, name) in self.served.files else f"{name}/"
                for name in sorted(self.children(path))
            ]
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            return self.answer(200, links.encode(), kind="text/html")
        data = self.served.files.get(path)
        if data is None:
            return self.answer(404, b"no")
        if not (found and self.served.has_ranges):
            return self.answer(200, data, is_cut=fault == "cut")
        start, stop = int(found[1]), int(found[2] or len(data) - 1) + 1
        if start >= len(data):
            return self.answer(416, b"")
        where = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self.answer(206, data[start:stop], is_cut=fault == "cut", **where)

    def webhdfs(self, path, query):
        """Source: Hadoop's WebHDFS REST API, of which three operations."""
        path = path.rstrip("/")
        is_file, names = path in self.served.files, self.children(path)
        if not is_file and not names:
            said = {"exception": "FileNotFoundException", "message": path}
            return self.answer(404, json.dumps({"RemoteException": said}).encode())
        match query["op"]:
            case "GETFILESTATUS":
                return self.answer(200, b'{"FileStatus":%s}' % self.status(path))
            case "LISTSTATUS":
                inside = [self.status(posixpath.join(path, n)) for n in sorted(names)]
                listed = b'{"FileStatuses":{"FileStatus":[%s]}}' % b",".join(inside)
                return self.answer(200, listed)
            case "OPEN" if "node" not in query:  # the data is on another node
                query["node"] = "1"
                to = f"{self.served.url}/webhdfs/v1/{urllib.parse.quote(path)}?"
                return self.answer(
                    307, b"", Location=to + urllib.parse.urlencode(query)
                )
        start = int(query.get("offset", 0))
        length = int(query.get("length", len(self.served.files[path])))
        return self.answer(200, self.served.files[path][start : start + length])

    def status(self, path):
        data = self.served.files.get(path)
        kind = "DIRECTORY" if data is None else "FILE"
        name = posixpath.basename(path)
        status = {"pathSuffix": name, "type": kind, "length": len(data or b"")}
        return json.dumps(status).encode()

    def children(self, folder):
        start = f"{folder}/" if folder else ""
        inside = [
            p.removeprefix(start) for p in self.served.files if p.startswith(start)
        ]
        return {p.split("/")[0] for p in inside}

    def answer(self, status, data, *, kind="text/plain", is_cut=False, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        if self.served.has_sizes or status != 200:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self.reset()

    def reset(self):
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
