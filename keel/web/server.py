"""Serving the app."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Sequence

import uvicorn

from keel.store import Store
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.app.proxies import networks
from keel.web.service.addresses import LOOPBACK, allowed_networks
from keel.web.service.people import People
from keel.web.service.sources import Sources
from keel.web.service.start import prepare

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    store: Store,
    host: str,
    port: int,
    sources: Sources,
    say: Callable[[str], None],
    proxies: Sequence[str] = (),
    address: str | None = None,
    webhooks_to: Sequence[str] = (),
) -> None:
    """Serves the labelling app until it is stopped (Ctrl-C, SIGTERM). ``say`` gets the address and a one-time sign-in
    link; ``port`` 0 is a free one; ``proxies``: whose forwarded addresses are believed; ``address``: under which people
    reach it, where that is not the one it listens on; ``webhooks_to``: networks that are not public, to which webhooks
    may lead (to this machine itself also where it serves nobody else). UserError when the port can't be had, or a
    proxy, the address or a network is none."""
    # a page or an export that reckons for seconds holds up whoever labels a millisecond at a time, not five
    sys.setswitchinterval(0.001)
    networks(proxies)
    reached = None if address is None else checked_address(address)
    alone = host in LOCAL and not proxies
    allowed = [*allowed_networks(webhooks_to), *(LOOPBACK if alone else ())]
    prepare(store)
    app = create_app(store, sources, proxies, reached, allowed)
    app.state.services.sampling.recover()
    app.state.services.ordering.recover()
    app.state.services.webhooks.start()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{host}:{port}: {reason}; choose another --host or --port") from error
        listener.listen(2048)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        listens = f"http://{shown}:{listener.getsockname()[1]}"
        say(f"Keel labelling on {listens} (Ctrl-C stops it)")
        say(f"sign in once with {reached or listens}/enter/{People(store).owner_link()}")
        if host not in LOCAL:
            say("others can reach this address: put HTTPS in front of it before you invite anybody")
        # no access log: the paths of links are secrets
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # its own would believe this machine, or an environment variable
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,  # a reply that is still streaming does not keep the server alive
        )
        uvicorn.Server(config).run(sockets=[listener])


def checked_address(address: str) -> str:
    """``address`` without a slash at its end. UserError for what is no address of a site."""
    plain = address.rstrip("/")
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", plain):
        raise UserError(f"--address {address}: give what people type, without a path: https://label.example.org")
    return plain
