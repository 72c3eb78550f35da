"""Serving the app."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import uvicorn

from keel.store import Store
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.app.proxies import networks
from keel.web.service.people import People
from keel.web.service.sources import Sources
from keel.web.service.start import prepare


def serve(
    store: Store, host: str, port: int, sources: Sources, say: Callable[[str], None], proxies: Sequence[str] = ()
) -> None:
    """Serves the labelling app until it is stopped (Ctrl-C, SIGTERM). ``say`` gets the address and a one-time sign-in
    link; ``port`` 0 is a free one; ``proxies``: whose forwarded addresses are believed. UserError when the port can't
    be had, or a proxy is no address."""
    networks(proxies)
    prepare(store)
    app = create_app(store, sources, proxies)
    app.state.services.sampling.recover()
    app.state.services.ordering.recover()
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
        address = f"http://{shown}:{listener.getsockname()[1]}"
        say(f"Keel labelling on {address} (Ctrl-C stops it)")
        say(f"sign in once with {address}/enter/{People(store).owner_link()}")
        if host not in ("127.0.0.1", "::1", "localhost"):
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
