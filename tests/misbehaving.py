"""A server on the loopback interface that answers each path in its own, mostly bad, way."""

import io
import socket
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

Handler = Callable[[socket.socket], None]


def encoded_image(kind: str = "JPEG", size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    """An encoded image of noise: (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def response(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    """An HTTP answer; `length` is the Content-Length it claims, -1 for none."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    if length != -1:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def sends(*parts: bytes) -> Handler:
    """The parts in turn, one a request; the last one for ever."""
    left = list(parts)

    def handle(connection: socket.socket) -> None:
        connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    return handle


def endless(head: bytes, piece: bytes, pause: threading.Event, pause_s: float) -> Handler:
    """`head`, then `piece` again and again, `pause_s` apart, until the client hangs up or the test ends."""

    def handle(connection: socket.socket) -> None:
        connection.sendall(head)
        while not pause.wait(pause_s):
            connection.sendall(piece)

    return handle


class Server:
    """Listens on 127.0.0.1; `handlers` by path, `hits` counts requests by path, `host_header` is the last one."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.hits: Counter[str] = Counter()
        self.host_header = ""
        self.over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        if self.over.is_set():
            return
        self.over.set()
        self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would leave `accept` waiting
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    if not (part := connection.recv(4096)):
                        return
                    request += part
                lines = request.decode("latin-1").split("\r\n")
                path = lines[0].split(" ")[1]
                self.hits[path] += 1
                self.host_header = next(line[6:] for line in lines if line.lower().startswith("host: "))
                self.handlers.get(path, sends(response(b"nothing here", "404 Not Found")))(connection)
            except OSError:
                return  # the client hung up, which is what many of these answers are for
