"""Internet addresses and HTTP: where a stranger's URL may lead to, and what may be tried again."""

import email.utils
import ipaddress
import socket
from datetime import UTC, datetime

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that another try may turn into a success."""

NAT64 = ipaddress.ip_network("64:ff9b::/96")
NOT_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments, of which Python 3.11 knows only a part as private
        "192.88.99.0/24",  # 6to4 relays
        "::/96",  # IPv4-compatible addresses
        "64:ff9b:1::/48",  # local NAT64, which may lead to private IPv4 addresses
        "2001::/23",  # Teredo and other protocol assignments
        "2002::/16",  # 6to4: an IPv4 address, possibly a private one, in disguise
    )
)
"""Blocks that `is_global` of some supported Python takes for public."""


def is_public(text: str) -> bool:
    """Whether this numeric address is one of the public internet; an IPv4 address inside an IPv6 one counts itself."""
    address = ipaddress.ip_address(text)
    if address.version == 6:
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address.version == block.version and address in block for block in NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_loopback(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback


def resolve(host: str, port: int) -> list[str]:
    """The numeric addresses of a host name, in the system's order of preference. Raises OSError if there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None if it holds neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
