"""Tokens for programs: made, looked up, ended; and writes that are sent again. A secret leaves this file once, to its
maker; the store keeps its hash."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from keel.store import Store, Unavailable, tokens
from keel.store.people import ROLES, AccountRole
from keel.store.tokens import Token
from keel.types import UserError

PREFIX = "keel_"  # by which a token that lies around is known for one
PER_MINUTE, MOST_PER_MINUTE = 600, 60_000
LONGEST_NAME = 80
_USED_EVERY = timedelta(minutes=1)


class KeyReused(UserError):
    """An Idempotency-Key came with another request than before."""


class Tokens:
    def __init__(self, store: Store) -> None:
        self._store = store

    def make(self, name: str, of: str, role: AccountRole, actor: str, per_minute: int = PER_MINUTE) -> str:
        """The secret of a new token in the name of account ``of``. UserError for what can't be."""
        name = " ".join(name.split())
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise UserError(f"a token's name has 1 to {LONGEST_NAME} characters; say what it is for")
        if role not in ROLES:
            raise UserError(f"{role!r} is no role; give one of {', '.join(ROLES)}")
        if not 1 <= per_minute <= MOST_PER_MINUTE:
            raise UserError(f"{per_minute} requests a minute: give 1 to {MOST_PER_MINUTE}")
        secret = PREFIX + secrets.token_urlsafe(32)
        with self._store.transaction(writes=True) as connection:
            tokens.add_token(connection, _digest(secret), name, of, role, per_minute, actor, self._store.now)
        return secret

    def find(self, secret: str) -> Token | None:
        """The token, if it holds; it is noted, to the minute, that it was used."""
        now = self._store.now
        with self._store.transaction(writes=False) as connection:
            found = tokens.token(connection, _digest(secret))
        if found is not None and (found.last_used is None or now - found.last_used >= _USED_EVERY):
            with suppress(Unavailable), self._store.transaction(writes=True) as connection:
                tokens.used(connection, found.id, now)
        return found

    def all(self) -> list[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return tokens.all_tokens(connection)

    def end(self, id: int, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            tokens.end_token(connection, id, actor, self._store.now)

    def once(
        self, token: Token, key: str, asked: str, call: Callable[[str], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """(what ``call`` gives, whether it was given before): for a key that came before it is not called again.
        ``call`` gets a token for the work that it hands in, which follows from the key: should the server stop before
        the answer is kept, the work counts once all the same. KeyReused when ``asked`` was another thing."""
        known, what = _digest(f"{token.id}/{key}"), _digest(f"{key}/{asked}")
        with self._store.transaction(writes=False) as connection:
            before = tokens.answer(connection, token.id, known)
        if before is not None:
            if before.asked != what:
                raise KeyReused("this Idempotency-Key came with another request before; make a new one for each")
            return before.answer, True
        said = call(known[:40])
        with self._store.transaction(writes=True) as connection:
            tokens.keep_answer(connection, token.id, known, what, said, self._store.now)
        return said, False


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
