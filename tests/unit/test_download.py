"""The downloader against a server that misbehaves in each way a stranger's URL may."""

import gzip
import socket
import struct
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from prx_post.base.net import is_public
from prx_post.recipes.download import Fetcher, Limits
from prx_post.recipes.urls import FetchError, parse_url, redirected
from tests.misbehaving import Server, encoded_image, endless, response, sends

QUICK = Limits(max_bytes=50_000, max_pixels=10_000, max_redirects=3, connect_s=1.0, read_s=0.3, total_s=1.0)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def fetcher():
    return Fetcher(QUICK, allow_loopback=True)


def failure(fetcher, url) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(url)
    return caught.value


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif")])
def test_a_image_arrives_byte_for_byte(server, fetcher, kind, extension):
    data = encoded_image(kind)
    server.handlers["/a"] = sends(response(data, Content_Type="text/plain"))  # what it is called does not count
    got = fetcher.fetch(server.url("/a"))
    assert got.data == data
    assert (got.extension, got.height, got.width, got.http_status) == (extension, 30, 40, 200)


def test_bodies_without_a_length_and_in_chunks_are_read(server, fetcher):
    data = encoded_image()
    server.handlers["/open"] = sends(response(data, length=-1))
    chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (100, data[:100], len(data) - 100, data[100:])
    server.handlers["/chunked"] = sends(response(chunks, length=-1, Transfer_Encoding="chunked"))
    assert fetcher.fetch(server.url("/open")).data == data
    assert fetcher.fetch(server.url("/chunked")).data == data


def test_redirects_are_followed_and_unusual_characters_quoted(server, fetcher):
    server.handlers["/from"] = sends(response(b"", "302 Found", Location="/to here?x=\u00c3\u00a9"))
    server.handlers["/to%20here?x=%C3%A9"] = sends(response(encoded_image()))
    assert fetcher.fetch(server.url("/from")).width == 40
    assert parse_url("http://bücher.example/ä b?c=ü").path == "/%C3%A4%20b?c=%C3%BC"
    assert parse_url("http://bücher.example/").host == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "refused: file scheme"),
        ("ftp://example.com/a.jpg", "refused: ftp scheme"),
        ("gopher://example.com/", "refused: gopher scheme"),
        ("data:image/png;base64,AAAA", "refused: data scheme"),
        ("example.com/a.jpg", "refused: no scheme"),
        ("", "refused: no scheme"),
        ("http://", "refused: a URL without a valid host"),
        ("http://user:secret@example.com/a.jpg", "refused: a user name or password"),
        ("http://user@example.com/a.jpg", "refused: a user name or password"),
        ("http://[::1", "refused: not a URL"),
        ("http://example.com:99999/", "refused: not a URL"),
        ("http://exa mple.com/", "refused: a URL without a valid host"),
    ],
)
def test_what_is_no_plain_web_address_is_refused_unresolved(url, reason):
    def resolver(host, port):
        raise AssertionError("it was resolved")

    error = failure(Fetcher(QUICK, resolver=resolver), url)
    assert error.reason.startswith(reason)
    assert error.permanent


PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.0.8", "198.18.0.1", "203.0.113.5"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::127.0.0.1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::"),
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_never_connected_to(address, monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("it connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    for addresses in ([address], ["93.184.215.14", address]):
        fetcher = Fetcher(QUICK, resolver=lambda host, port, found=addresses: found)
        error = failure(fetcher, "http://images.example/a.jpg")
        assert error.reason == f"refused: images.example is at {address}, which is not public"
        assert error.permanent


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_however_it_is_written(server, host):
    error = failure(Fetcher(QUICK), f"http://{host}:{server.port}/a.jpg")
    assert error.reason.startswith("refused:")
    assert not server.hits


def test_only_the_address_that_was_checked_is_connected_to(server, monkeypatch):
    """A name server that answers with a public address first and a private one later gains nothing."""
    answers = [["93.184.215.14"], ["127.0.0.1"]]
    connected = []
    real = socket.create_connection

    def connect(address, timeout):
        connected.append(address)
        return real(("127.0.0.1", server.port), timeout)

    monkeypatch.setattr(socket, "create_connection", connect)
    server.handlers["/a.jpg"] = sends(response(encoded_image()))
    resolver = lambda host, port: answers.pop(0)  # noqa: E731
    fetcher = Fetcher(QUICK, resolver=resolver)
    assert fetcher.fetch("http://rebinding.example/a.jpg").width == 40
    assert connected == [("93.184.215.14", 80)]  # a number: nothing is left to be resolved again
    assert server.host_header == "rebinding.example"
    assert failure(fetcher, "http://rebinding.example/a.jpg").reason.startswith("refused:")
    assert len(connected) == 1


def test_the_certificate_is_checked_against_the_name_and_not_the_address(monkeypatch):
    import ssl

    names = []

    class Connection:
        def close(self):
            pass

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Connection())

    def wrap_socket(self, sock, server_hostname):
        names.append((server_hostname, self.check_hostname, self.verify_mode))
        error = ssl.SSLCertVerificationError()
        error.verify_message = "self-signed certificate"
        raise error

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    error = failure(Fetcher(QUICK, resolver=lambda *_: ["93.184.215.14"]), "https://images.example/a.jpg")
    assert names == [("images.example", True, ssl.CERT_REQUIRED)]
    assert error.reason == "the certificate is not valid: self-signed certificate"
    assert error.permanent


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254 is at 169.254.169.254, which is not public"),
        ("http://10.0.0.1/", "10.0.0.1 is at 10.0.0.1, which is not public"),
        ("file:///etc/passwd", "refused: file scheme"),
        ("//user:secret@example.com/", "refused: a user name or password"),
        ("http://[", "refused: a redirect to what is no URL"),
    ],
)
def test_a_redirect_is_checked_like_a_first_address(server, fetcher, location, reason):
    server.handlers["/a"] = sends(response(b"", "302 Found", Location=location))
    error = failure(fetcher, server.url("/a"))
    assert reason in error.reason
    assert error.permanent


def test_a_redirect_to_loopback_is_refused(server, monkeypatch):
    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: real(("127.0.0.1", server.port), timeout))
    server.handlers["/a"] = sends(response(b"", "301 Moved", Location=server.url("/secret")))
    addresses = {"public.example": ["93.184.215.14"], "127.0.0.1": ["127.0.0.1"]}
    error = failure(Fetcher(QUICK, resolver=lambda host, port: addresses[host]), "http://public.example/a")
    assert error.reason == "refused: 127.0.0.1 is at 127.0.0.1, which is not public"
    assert server.hits == {"/a": 1}


def test_a_redirect_away_from_https_is_refused():
    target = parse_url("https://example.com/a")
    assert redirected(target, "/b") == "https://example.com/b"
    with pytest.raises(FetchError, match="redirect away from https"):
        redirected(target, "http://example.com/a")


def test_redirects_in_a_loop_end(server, fetcher):
    server.handlers["/a"] = sends(response(b"", "302 Found", Location="/b"))
    server.handlers["/b"] = sends(response(b"", "307 Temporary", Location="/a"))
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "too many redirects: more than 3"
    assert error.permanent
    assert server.hits.total() == 4  # the first request and three redirects


def test_a_body_shorter_than_announced_is_a_lost_connection(server, fetcher):
    data = encoded_image()
    server.handlers["/a"] = sends(response(data[:500], length=len(data)))
    error = failure(fetcher, server.url("/a"))
    assert error.reason == f"the connection closed early: after 500 of {len(data)} bytes"
    assert not error.permanent


def test_a_body_longer_than_announced_is_cut_and_found_broken(server, fetcher):
    server.handlers["/a"] = sends(response(encoded_image(), length=500))
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "no usable image: Truncated File Read"
    assert error.permanent


def test_an_announced_size_above_the_limit_is_refused_unread(server, fetcher):
    server.handlers["/a"] = endless(response(b"", length=50_001), b"", server.over, 0.05)
    assert failure(fetcher, server.url("/a")).reason == "too large: more than 50000 bytes"


def test_an_endless_body_is_cut_at_the_size_limit(server, fetcher):
    server.handlers["/a"] = endless(response(b"", length=-1), b"x" * 8192, server.over, 0)
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "too large: more than 50000 bytes"
    assert error.permanent


@pytest.mark.parametrize(
    "head", [response(b"", length=1000), response(b"", length=-1), b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 2"]
)
def test_a_dripping_server_meets_the_deadline(server, fetcher, head):
    server.handlers["/a"] = endless(head, b"x", server.over, 0.05)
    start = time.monotonic()
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "the server took too long"
    assert not error.permanent
    assert time.monotonic() - start >= QUICK.total_s * 0.9  # each byte came in time: it was the deadline that ended it


def test_a_server_that_never_answers_meets_the_read_timeout(server, fetcher):
    server.handlers["/a"] = lambda connection: server.over.wait()
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "the server took too long"
    assert not error.permanent


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 2000) for i in range(90)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
    ids=["large headers", "one large header", "endless continue", "many headers", "another protocol", "hangs up"],
)
def test_an_answer_that_is_no_decent_http_is_a_failure(server, fetcher, answer):
    server.handlers["/a"] = sends(answer)
    error = failure(fetcher, server.url("/a"))
    assert "does not speak HTTP properly" in error.reason or "connection failed" in error.reason
    assert not error.permanent


def test_a_refused_connection_is_transient(server, fetcher):
    server.close()
    error = failure(fetcher, server.url("/a"))
    assert error.reason.startswith("the connection failed")
    assert not error.permanent


@pytest.mark.parametrize(
    ("status", "permanent"),
    [
        *(("404 Not Found", True), ("410 Gone", True), ("403 Forbidden", True), ("204 No Content", True)),
        *(("429 Too Many", False), ("500 Error", False), ("503 Unavailable", False), ("304 Not Modified", True)),
    ],
)
def test_statuses_are_permanent_or_transient(server, fetcher, status, permanent):
    server.handlers["/a"] = sends(response(b"", status))
    error = failure(fetcher, server.url("/a"))
    assert (error.reason, error.http_status) == (f"HTTP {status[:3]}", int(status[:3]))
    assert error.permanent == permanent


def test_retry_after_is_read_as_seconds_and_as_a_date(server, fetcher):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    server.handlers["/a"] = sends(
        response(b"", "429 Too Many", Retry_After="7"),
        response(b"", "503 Unavailable", Retry_After=soon),
        response(b"", "503 Unavailable", Retry_After="soon"),
    )
    assert failure(fetcher, server.url("/a")).retry_after_s == 7
    assert 50 < failure(fetcher, server.url("/a")).retry_after_s <= 60
    assert failure(fetcher, server.url("/a")).retry_after_s is None


def test_compressed_bodies_are_refused(server, fetcher):
    bomb = gzip.compress(b"\0" * 10_000_000)
    server.handlers["/a"] = sends(response(bomb, Content_Encoding="gzip"))
    error = failure(fetcher, server.url("/a"))
    assert error.reason == "compressed unasked: gzip"
    assert error.permanent


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises far more pixels than it has."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html><body>Sorry, this image was removed.</body></html>", "no image format that Pillow knows"),
        (b"", "no image format that Pillow knows"),
        (encoded_image()[:700], "image file is truncated"),
        (encoded_image("BMP"), "no image format that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format that Pillow knows"),
        (png_bomb(101, 100), "10100 pixels, more than 10000"),
        (png_bomb(60_000, 60_000), "DecompressionBombError"),
    ],
    ids=["html", "empty", "truncated", "bmp", "postscript", "too many pixels", "bomb"],
)
def test_what_does_not_decode_as_a_image_is_refused(server, fetcher, body, reason):
    server.handlers["/a"] = sends(response(body, Content_Type="image/jpeg"))
    error = failure(fetcher, server.url("/a"))
    assert error.reason.startswith("no usable image: ")
    assert reason in error.reason
    assert error.permanent
    assert "0x" not in error.reason  # no address in memory


def test_proxies_of_the_environment_are_not_used(server, fetcher, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.handlers["/a"] = sends(response(encoded_image()))
    assert fetcher.fetch(server.url("/a")).width == 40
