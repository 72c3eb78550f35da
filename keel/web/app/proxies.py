"""Whose word on where a request comes from is believed: that of the proxies that were named, and of nobody else.
Anybody can send ``X-Forwarded-For``."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from keel.types import UserError

log = logging.getLogger("keel.web")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def networks(named: Sequence[str]) -> list[Network]:
    """The addresses and networks of ``--proxy``. UserError for what is neither, and for everybody."""
    found = []
    for name in named:
        try:
            network = ipaddress.ip_network(name.strip())
        except ValueError as error:
            raise UserError(
                f"--proxy {name!r}: {error}; give the proxy's address, as in 127.0.0.1, or its network, 10.1.0.0/16"
            ) from None
        if network.prefixlen == 0:
            raise UserError(f"--proxy {name}: these are all addresses, and anybody has one of them; name the proxy's")
        found.append(network)
    return found


def parsed(text: str) -> Address | None:
    """The address; None for anything else. ``::ffff:1.2.3.4`` is ``1.2.3.4``; a port is left out."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


class Forwarded:
    """ASGI middleware: puts the client's address and scheme into the scope, as the named proxies tell them. Of the
    addresses in ``X-Forwarded-For`` it is the last that is no proxy's: those before it are the client's own words."""

    def __init__(self, app: ASGIApp, proxies: Sequence[Network]) -> None:
        self.app, self._proxies = app, proxies
        self._told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._place(scope)
        await self.app(scope, receive, send)

    def _place(self, scope: Scope) -> None:
        peer = parsed(scope["client"][0]) if scope.get("client") else None
        forwarded = b", ".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
        if peer is None or not self._is_proxy(peer):
            if forwarded and not self._told:
                self._told = True
                log.warning("X-Forwarded-For from %s is not believed; where that is your proxy, give --proxy", peer)
            return
        client = peer
        for one in reversed(forwarded.decode("latin-1").split(",")):
            if not self._is_proxy(client) or (before := parsed(one)) is None:
                break
            client = before
        scope["client"] = (str(client), 0)
        schemes = [value for name, value in scope["headers"] if name == b"x-forwarded-proto"]
        if schemes in ([b"http"], [b"https"]):
            scope["scheme"] = schemes[0].decode()

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._proxies)
