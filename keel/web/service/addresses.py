"""Where a webhook may lead. Whoever gives an address must not make the server knock at doors that are open to the
server alone: its own machine, the network behind it, a cloud's metadata."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from keel.types import UserError

Network = IPv4Network | IPv6Network
LOOPBACK: tuple[Network, ...] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_NAT64 = IPv6Network("64:ff9b::/96")
LONGEST = 2000


def allowed_networks(named: Sequence[str]) -> list[Network]:
    """Those of ``--webhooks-to``. UserError for what is none."""
    try:
        return [ip_network(name.strip()) for name in named]
    except ValueError as error:
        raise UserError(f"--webhooks-to: {error}; give an address or a network, as in 10.1.0.0/16") from None


def host_of(url: str) -> tuple[str, int]:
    """(host, port) of a webhook's address. UserError unless it is https, or http to this machine."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
        parts = urlsplit("")
    plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= LONGEST
    if not plain or parts.scheme not in ("https", "http") or not host or port == 0:
        raise UserError("a webhook's address starts with https:// and a host")
    if "@" in parts.netloc or parts.fragment:
        raise UserError("a webhook's address has no user:password@ and no #; the signature says who sends")
    if parts.scheme == "http" and host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError("a webhook's address starts with https://; http:// is for this machine alone (127.0.0.1)")
    return host, port or (443 if parts.scheme == "https" else 80)


def reachable(url: str, allowed: Sequence[Network]) -> str:
    """The IP address to connect to. It is looked up here and then used as it is, so that no other answer of the name
    server's can lead elsewhere. UserError when one of the host's addresses is neither public nor ``allowed``."""
    host, port = host_of(url)
    try:
        found = sorted({str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        raise UserError(f"the webhook's host {host} is not known to the name server") from None
    for one in found:
        address = _inner(ip_address(one.partition("%")[0]))
        if not any(address in network for network in allowed) and (not address.is_global or address.is_multicast):
            raise UserError(
                f"the webhook's host {host} has an address that is not public ({address}); whoever runs keel label may "
                f"allow it with --webhooks-to {address}"
            )
    return next((one for one in found if ":" not in one), found[0])


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Of an IPv6 address that stands for an IPv4 one, that one."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
