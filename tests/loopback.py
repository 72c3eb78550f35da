"""Servers on the loopback that answer as a test says: over HTTP, or with whatever bytes."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], str]  # status, headers, body


_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, for a server that is told one, and has it again when it is started again. It lies
    below those that systems give out by themselves (Linux from 32768, others from 49152): nobody gets it meanwhile.
    None is given twice: what a browser keeps belongs to its server's port."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        if port in _GIVEN:
            continue
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _GIVEN.add(port)
            return port


def chat_reply(content: str | None) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


class Server:
    """An OpenAI-compatible server on the loopback: ``answer(request body, number of the request)`` decides."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.together = self.most_together = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    number = len(outer.requests)
                    outer.together += 1
                    outer.most_together = max(outer.most_together, outer.together)
                status, headers, text = answer(body, number)
                with lock:
                    outer.together -= 1
                data = text.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def raw_server(
    answers: Sequence[Callable[[socket.socket], None]], waits: bool = True
) -> Iterator[tuple[str, list[bytes]]]:
    """(URL, requests so far). The n-th connection is handed to the n-th of ``answers`` when its request is there
    (``waits``), and closed behind it; the last answers all further ones."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                data = b""
                while waits and (b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}")):
                    data += connection.recv(65536)
                requests.append(data)
                answers[min(len(requests), len(answers)) - 1](connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def sends(*pieces: bytes, head: str = "200 OK", headers: str = "") -> Callable[[socket.socket], None]:
    """An answer of these bytes, whose end is the end of the connection."""

    def send(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {head}\r\n{headers}Connection: close\r\n\r\n".encode())
        for piece in pieces:
            connection.sendall(piece)

    return send
