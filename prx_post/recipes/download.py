"""Images from URLs that strangers wrote.

A URL may be an attempt to reach what only this machine can reach, to fill its memory or disk, or to keep it waiting.
So: http and https only; a host name is resolved here, every address it has must be public, and the connection goes
to the very address that was checked, at each redirect anew. Size, header, pixels and time are bounded, and what
arrives must decode as an image. Proxies of the environment are not used: a proxy would resolve the name elsewhere.
"""

import contextlib
import hashlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from prx_post import __version__
from prx_post.base.net import TRANSIENT, is_loopback, is_public, resolve, retry_after
from prx_post.data.images import decode, readable
from prx_post.recipes.urls import FetchError, Target, parse_url, redirected

EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
"""Formats that are accepted, by Pillow's names. Of moving images the first frame is what counts."""
FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]
"""What Pillow may try to open; its JPEG reader finds out about MPO, a JPEG with more images behind the first."""
REDIRECTS = (301, 302, 303, 307, 308)
HEADER_BYTES = 64 * 2**10
CHUNK_BYTES = 64 * 2**10
HEADERS = {
    "User-Agent": f"prx-post/{__version__} (data set download)",
    "Accept": "image/jpeg,image/png,image/webp,image/gif,*/*;q=0.1",  # not AVIF, which some servers prefer
    "Accept-Encoding": "identity",  # so that a few bytes cannot unpack to gigabytes
    "Connection": "close",
}


@dataclass(frozen=True)
class Limits:
    """What one URL may cost. Times are in seconds; `total_s` bounds all of it but the name's resolution."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 80_000_000
    max_redirects: int = 5
    connect_s: float = 10.0
    read_s: float = 20.0
    total_s: float = 120.0


@dataclass(frozen=True)
class Fetched:
    """An image that was fetched and decoded: its original bytes, and what they are."""

    data: bytes
    extension: str
    height: int
    width: int
    http_status: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class Fetcher:
    """Fetches one image at a time; threads may share one.

    Args:
        resolver: (host, port) -> numeric addresses.
        allow_loopback: for tests alone, whose server listens on 127.0.0.1.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        resolver: Callable[[str, int], list[str]] = resolve,
        allow_loopback: bool = False,
    ) -> None:
        self.limits, self._resolver, self._allow_loopback = limits, resolver, allow_loopback
        self._tls = ssl.create_default_context()
        self._decoding = threading.Semaphore(2)  # a decoded image takes 3 to 4 bytes a pixel

    def fetch(self, url: str) -> Fetched:
        """The image at `url`, after redirects. Raises FetchError."""
        deadline = time.monotonic() + self.limits.total_s
        for _ in range(self.limits.max_redirects + 1):
            target = parse_url(url)
            try:
                answer = self._get(target, deadline)
            except TimeoutError as error:
                raise FetchError("the server took too long", permanent=False) from error
            except ssl.SSLCertVerificationError as error:
                raise FetchError(f"the certificate is not valid: {error.verify_message}", permanent=True) from error
            except OSError as error:
                raise FetchError(f"the connection failed: {error.strerror or error}", permanent=False) from error
            except (http.client.HTTPException, ValueError) as error:
                reason = f"the server does not speak HTTP properly: {type(error).__name__}"
                raise FetchError(reason, permanent=False) from error
            if isinstance(answer, str):
                url = redirected(target, answer)
                continue
            status, data = answer
            return self._image(data, status)
        raise FetchError(f"too many redirects: more than {self.limits.max_redirects}", permanent=True)

    def _get(self, target: Target, deadline: float) -> str | tuple[int, bytes]:
        """One request: where it redirects to, or the status and body of a success."""
        with contextlib.closing(self._connect(target, deadline)) as sock:
            connection = http.client.HTTPConnection(target.host, target.port)
            stream = _Stream(sock, self.limits.read_s, deadline)
            connection.sock = stream  # type: ignore[assignment]  # all that http.client uses of a socket
            connection.request("GET", target.path, headers={"Host": target.host_header, **HEADERS})
            with connection.getresponse() as response:
                stream.header_bytes_left = None
                location = response.headers.get("Location")
                if response.status in REDIRECTS and location:
                    return location.encode("latin-1").decode("utf-8", "replace")  # http.client reads latin-1
                _check_status(response)
                return response.status, self._body(response)

    def _connect(self, target: Target, deadline: float) -> socket.socket:
        addresses = self._checked_addresses(target)
        for i, address in enumerate(addresses):
            timeout_s = min(self.limits.connect_s, _left(deadline))
            try:
                sock = socket.create_connection((address, target.port), timeout=timeout_s)
            except OSError:
                if i == len(addresses) - 1:
                    raise
                continue
            if target.scheme == "http":
                return sock
            with contextlib.ExitStack() as on_error:
                on_error.callback(sock.close)
                secured = self._tls.wrap_socket(sock, server_hostname=target.host)
                on_error.pop_all()
                return secured
        raise FetchError(f"the host name was not found: {target.host} has no address", permanent=False)

    def _checked_addresses(self, target: Target) -> list[str]:
        """Where the host is. One address that is not public is enough to refuse: an honest host has none."""
        try:
            addresses = self._resolver(target.host, target.port)
        except (OSError, UnicodeError) as error:
            reason = f"the host name was not found: {target.host} ({getattr(error, 'strerror', None) or error})"
            raise FetchError(reason, permanent=False) from error
        for address in addresses:
            if not (is_public(address) or (self._allow_loopback and is_loopback(address))):
                raise FetchError(f"refused: {target.host} is at {address}, which is not public", permanent=True)
        return addresses

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        limit, status = self.limits.max_bytes, response.status
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise FetchError(f"compressed unasked: {encoding}", permanent=True, http_status=status)
        expected = response.length
        too_large = FetchError(f"too large: more than {limit} bytes", permanent=True, http_status=status)
        if expected is not None and expected > limit:
            raise too_large
        body = bytearray()
        while chunk := response.read(CHUNK_BYTES):
            body += chunk
            if len(body) > limit:
                raise too_large
        if expected is not None and len(body) < expected:
            reason = f"the connection closed early: after {len(body)} of {expected} bytes"
            raise FetchError(reason, permanent=False, http_status=status)
        return bytes(body)

    def _image(self, data: bytes, status: int) -> Fetched:
        try:
            with readable(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind, pixels = str(image.format), image.width * image.height
            if pixels > self.limits.max_pixels:  # from the header: nothing is decoded yet
                raise OSError(f"{pixels} pixels, more than {self.limits.max_pixels}")
            with self._decoding:
                shown = decode(data, FORMATS)
        except OSError as error:
            raise FetchError(f"no usable image: {error}", permanent=True, http_status=status) from error
        return Fetched(data, EXTENSIONS[kind], shown.height, shown.width, status)


def _check_status(response: http.client.HTTPResponse) -> None:
    status = response.status
    if status != 200:
        permanent = status not in TRANSIENT
        retry_after_s = retry_after(response.headers.get("Retry-After"))
        raise FetchError(f"HTTP {status}", permanent=permanent, http_status=status, retry_after_s=retry_after_s)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Stream:
    """A socket as http.client sees it, with every read bounded by the fetch's deadline and a limit on the header.

    A socket's own timeout starts anew at each byte, so a server that drips would never meet it.
    """

    def __init__(self, sock: socket.socket, read_s: float, deadline: float) -> None:
        self._sock, self._read_s, self._deadline = sock, read_s, deadline
        self.header_bytes_left: int | None = HEADER_BYTES

    def sendall(self, data: bytes) -> None:
        self._wait_at_most()
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Nothing: http.client closes before the body is read; the fetch closes the socket."""

    def receive_into(self, buffer: memoryview) -> int:
        self._wait_at_most()
        if self.header_bytes_left is not None:
            if self.header_bytes_left <= 0:
                raise http.client.LineTooLong("header")
            buffer = buffer[: self.header_bytes_left]
        count = self._sock.recv_into(buffer)
        if self.header_bytes_left is not None:
            self.header_bytes_left -= count
        return count

    def _wait_at_most(self) -> None:
        self._sock.settimeout(min(self._read_s, _left(self._deadline)))


class _Reader(io.RawIOBase):
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        return self._stream.receive_into(memoryview(buffer))
