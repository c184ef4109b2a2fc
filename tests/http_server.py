"""A web server in a thread that serves a folder by byte ranges and misbehaves as it is told."""

from __future__ import annotations

import re
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DRIP_SECONDS = 0.05
LARGEST = 1 << 26


class Misbehaving(ThreadingHTTPServer):
    """Serves `folder` at `url`.

    Attributes:
        faults: what the next requests for a tar meet, one each; then `always`, if that is set. A
            status, or `drop` (the connection, amid the body), `short` (half of the body, as if it
            were all), `corrupt`, `long` (endless), `whole` (the range is ignored), `elsewhere`
            (another range), `gzip`, `hang`, `drip`.
        latency: seconds before each answer.
        requests: path and range of each so far.
        busiest: most requests that were under way at once.
    """

    daemon_threads = True

    def __init__(self, folder: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = Path(folder), f"http://127.0.0.1:{self.server_port}"
        self.faults: deque = deque()
        self.always = None
        self.latency = 0.0
        self.requests: list[tuple[str, str | None]] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.busy = self.busiest = 0

    def handle_error(self, *_) -> None:
        """A client that went away is what the tests are about."""

    def tars(self) -> int:
        return sum(path.endswith(".tar") for path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server: Misbehaving = self.server
        wanted = self.headers.get("Range")
        with server.lock:
            server.requests.append((self.path, wanted))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = None
            if self.path.endswith(".tar"):
                fault = server.faults.popleft() if server.faults else server.always
        try:
            server.stopped.wait(server.latency)
            self.answer(server, wanted, fault)
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, server: Misbehaving, wanted: str | None, fault) -> None:
        path = server.folder / self.path.lstrip("/")
        if fault == "hang":
            server.stopped.wait()
            self.close_connection = True
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        # Of an absurdly large file only as much as its refusal takes.
        length, status = path.stat().st_size, 200
        start, stop = 0, min(length, LARGEST)
        if wanted and fault != "whole":
            start, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            if start >= length:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start += 512 if fault == "elsewhere" else 0
            stop, status = min(last + 1, length), 206
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if fault == "corrupt":
            data = data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(status)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{length}")
        if fault == "long":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data) if length <= LARGEST or wanted else length))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "drip":
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                if server.stopped.wait(DRIP_SECONDS):
                    return
        elif fault == "long":
            while not server.stopped.is_set():
                self.wfile.write(data)
        else:
            self.wfile.write(data)


@contextmanager
def serve(folder: str):
    server = Misbehaving(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
