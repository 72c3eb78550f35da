"""Webhooks: given by admins, and sent to by a thread of the server. Each delivery is signed, and sent until it is
taken: at least once, in the log's order."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import ssl
import threading
import uuid
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

from keel.store import Store, Unavailable, feed, webhooks
from keel.store.webhooks import Delivery
from keel.types import UserError
from keel.web.service.addresses import Network, reachable
from keel.web.service.reading import entry_json

SECONDS = 10.0  # for an answer, from the name server's to the receiver's
EVERY = 2.0  # seconds between two looks for news
LEASE = timedelta(seconds=60)
MOST = 50  # webhooks at a time
log = logging.getLogger("keel.web")


def signature(secret: str, time: int, body: bytes) -> str:
    """The header ``Keel-Signature``: HMAC-SHA256, in hexadecimal, over the time (Unix seconds), a dot and the body."""
    signed = hmac.new(secret.encode(), f"{time}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={time},v1={signed}"


class Webhooks:
    """``allowed``: networks that are not public and may be sent to all the same."""

    def __init__(self, store: Store, allowed: Sequence[Network] = ()) -> None:
        self._store, self._allowed = store, allowed
        self._process = uuid.uuid4().hex
        self._stop = threading.Event()

    def make(self, url: str, actor: str) -> str:
        """The secret that deliveries will be signed with. UserError for an address that must not be sent to."""
        url = url.strip()
        reachable(url, self._allowed)
        secret = "whsec_" + secrets.token_urlsafe(32)
        with self._store.transaction(writes=True) as connection:
            if len(webhooks.all_webhooks(connection)) >= MOST:
                raise UserError(f"there are {MOST} webhooks already; end one first")
            webhooks.add_webhook(connection, url, secret, actor, self._store.now)
        return secret

    def end(self, id: int, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            webhooks.end_webhook(connection, id, actor, self._store.now)

    def send_again(self, id: int, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            webhooks.send_again(connection, id, actor, self._store.now)

    def all(self) -> list[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return webhooks.all_webhooks(connection)

    # ------------------------------------------------------------------------------------------------------ sending

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The machine's certificates; to read them takes a while."""
        return httpx2.create_ssl_context()

    def start(self) -> None:
        """Begin to deliver, in a thread that ends with the process or with ``stop``."""
        threading.Thread(target=self._work, daemon=True, name="webhooks").start()

    def stop(self) -> None:
        self._stop.set()

    def _work(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                while self.deliver() and not self._stop.is_set():
                    pass
            except Unavailable:
                pass  # the database is away; the next look may find it
            except Exception:
                log.exception("webhooks: a look for news failed")

    def deliver(self) -> int:
        """Send what is to be sent now, one delivery a webhook; how many were taken."""
        with self._store.transaction(writes=False) as connection:
            ids = webhooks.due(connection, self._store.now)
        due = []
        for id in ids:
            with self._store.transaction(writes=True) as connection:
                found = webhooks.take(connection, id, self._process, self._store.now, LEASE)
                if found is not None:
                    entries, _ = feed.entries(connection, found.after, found.upto, webhooks.MOST_SENT)
                    due.append((found, [entry_json(one) for one in entries]))
        return sum(asyncio.run(self._send_all(due))) if due else 0

    async def _send_all(self, due: Sequence[tuple[Delivery, list[dict[str, Any]]]]) -> list[bool]:
        return await asyncio.gather(*(self._send(one, votes) for one, votes in due))

    async def _send(self, one: Delivery, votes: list[dict[str, Any]]) -> bool:
        status, problem = None, ""
        try:
            async with asyncio.timeout(SECONDS):
                status = await self._post(one, votes)
            if not 200 <= status < 300:
                moved = " (redirects are not followed: give the address that it leads to)" if status // 100 == 3 else ""
                problem = f"it answered {status}{moved}"
        except TimeoutError:
            problem = f"no answer within {SECONDS:.0f} seconds"
        except UserError as error:
            problem = str(error)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            problem = f"it could not be reached ({type(error).__name__})"
        with self._store.transaction(writes=True) as connection:
            if problem:
                webhooks.failed(connection, one, status, problem, self._store.now)
            else:
                assert status is not None
                webhooks.delivered(connection, one, status, self._store.now)
        return not problem

    async def _post(self, one: Delivery, votes: list[dict[str, Any]]) -> int:
        """The answer's status. Its body is not read; no proxy is asked, which would look the host up once more."""
        address = await asyncio.to_thread(reachable, one.url, self._allowed)
        parts = urlsplit(one.url)
        netloc = f"[{address}]" if ":" in address else address
        netloc += f":{parts.port}" if parts.port else ""
        body = json.dumps({"delivery": one.name, "votes": votes}, ensure_ascii=False).encode()
        headers = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "User-Agent": "keel",
            "Keel-Delivery": one.name,
            "Keel-Signature": signature(one.secret, int(self._store.now.timestamp()), body),
        }
        named = {"sni_hostname": parts.hostname}  # whose certificate it must be
        async with (
            httpx2.AsyncClient(
                trust_env=False, follow_redirects=False, timeout=SECONDS, verify=self._trusted
            ) as client,
            client.stream(
                "POST",
                urlunsplit(parts._replace(netloc=netloc)),
                content=body,
                headers=headers,
                extensions=named,
            ) as answer,
        ):
            return int(answer.status_code)
