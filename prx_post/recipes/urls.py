"""URLs that strangers wrote: what is requested of whom, or why nothing is."""

import re
import urllib.parse
from dataclasses import dataclass


class FetchError(Exception):
    """A URL that gave no image. The reason is a class of failures, and details after a colon.

    `permanent`: trying again is of no use. `retry_after_s`: how long the server asked to be left alone.
    """

    def __init__(
        self, reason: str, *, permanent: bool, http_status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.permanent = reason, permanent
        self.http_status, self.retry_after_s = http_status, retry_after_s


@dataclass(frozen=True)
class Target:
    """The parts of a URL that a request needs."""

    scheme: str
    host: str
    port: int
    path: str
    url: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """Raises FetchError for anything but http(s)://host[:port]/..., and for user names and passwords in it."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except (ValueError, UnicodeError) as error:
        raise FetchError("refused: not a URL", permanent=True) from error
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"refused: {parts.scheme or 'no'} scheme; only http and https are read", permanent=True)
    if not re.fullmatch(r"[a-z0-9._:-]+", host):
        raise FetchError("refused: a URL without a valid host name", permanent=True)
    if parts.username is not None or parts.password is not None:
        raise FetchError("refused: a user name or password in the URL", permanent=True)
    path = urllib.parse.quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
    query = urllib.parse.quote(parts.query, safe="/%:=&?~+!$,;'@()*[]")
    return Target(parts.scheme, host, port, f"{path}?{query}" if query else path, url)


def redirected(target: Target, location: str) -> str:
    """The URL that a redirect from `target` leads to. Raises FetchError if it is none, or leaves https."""
    try:
        url = urllib.parse.urljoin(target.url, location)
    except ValueError as error:
        raise FetchError("refused: a redirect to what is no URL", permanent=True) from error
    if target.scheme == "https" and not url.lower().startswith("https:"):
        raise FetchError("refused: a redirect away from https", permanent=True)
    return url
