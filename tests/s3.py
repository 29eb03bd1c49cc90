"""A real S3 interface on this machine: a server as a process, and a line to it that can be cut."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "cellpair-tests"
_REQUEST = re.compile(rb"(?:^|\n)(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
_DENIED = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 72\r\n"
    b"Connection: close\r\n\r\n"
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "loopback",
    "AWS_SECRET_ACCESS_KEY": "loopback-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Line:
    """A relay to the server: counts what goes through, and can be cut as a network is.

    `cut_at` sees each request's method and path, and cuts the line before it goes on where it says
    so; `denies` sees them too, and what it says yes to is answered with 403. The server, and all
    that was put, lives on.
    """

    server_port: int
    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    n_bytes_up: int = 0
    n_bytes_down: int = 0
    cut_at: Callable[[str, str], bool] | None = None
    denies: Callable[[str, str], bool] | None = None

    def __post_init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        """Listen, at the same port as before."""
        self.cut_at = None
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """No connection goes on, and none is taken."""
        with self._lock:
            listener, self._listener = self._listener, None
            broken, self._open = self._open, set()
        for one in broken | ({listener} if listener else set()):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def clear(self) -> None:
        self.requests, self.n_bytes_up, self.n_bytes_down = [], 0, 0

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.server_port))
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, server}
        try:
            while True:
                for one in select.select([client, server], [], [])[0]:
                    data = one.recv(1 << 18)
                    if not data:
                        return
                    if one is client:
                        requests = self._requests(data)
                        if self.cut_at is not None and any(self.cut_at(*r) for r in requests):
                            self.cut()
                            return
                        if self.denies is not None and any(self.denies(*r) for r in requests):
                            client.sendall(_DENIED)
                            return
                    self._count(one is client, len(data))
                    (server if one is client else client).sendall(data)
        except (OSError, ValueError):  # ValueError: closed by `cut`
            return
        finally:
            with self._lock:
                self._open -= {client, server}
            client.close()
            server.close()

    def _requests(self, data: bytes) -> list[tuple[str, str]]:
        found = [(m.decode(), path.decode()) for m, path in _REQUEST.findall(data)]
        self.requests += found
        return found

    def _count(self, is_up: bool, n_bytes: int) -> None:
        with self._lock:
            if is_up:
                self.n_bytes_up += n_bytes
            else:
                self.n_bytes_down += n_bytes


@contextmanager
def server(log: Path) -> Iterator[int]:
    """An S3 server of its own process; yields its port. It keeps its objects in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=out,
            env={**os.environ, **ENVIRONMENT},
        )
    try:
        until_s = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(log.read_text()) from None
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int) -> None:
    """The bucket of the tests, by the interface alone."""
    request = f"PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(request.encode())
        answer = one.recv(4096)
    assert b" 200 " in answer.split(b"\r\n")[0], answer
