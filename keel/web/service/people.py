"""Who may come in: links that work once, passwords, sessions. Secrets leave this file once, to their owner; the store
keeps hashes."""

from __future__ import annotations

import hashlib
import secrets
import threading
from datetime import datetime, timedelta
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Connection

from keel.store import Store, erase, people
from keel.store.people import Account, AccountRole, Session
from keel.types import UserError

INVITATION_LASTS = timedelta(days=7)
SIGN_IN_LINK_LASTS = timedelta(minutes=30)
SESSION_LASTS = timedelta(days=14)
SHORTEST_PASSWORD = 10
LONGEST_PASSWORD = 256
LONGEST_NAME = 40
OWNER = "owner"  # the account of whoever starts `keel label` on their own machine

_HASHER = PasswordHasher()  # RFC 9106's low-memory profile: 64 MiB, three passes
HASHING = 2  # at once: each takes 64 MiB and a core, and a crowd at the door must not take the machine
_HASHING = threading.BoundedSemaphore(HASHING)


class WrongPassword(UserError):
    """The name or the password does not fit; which of them is not said."""


class People:
    def __init__(self, store: Store) -> None:
        self._store = store
        # verified against when there is no such account, so that the time taken does not tell whether there is one
        self._nobody = _HASHER.hash(secrets.token_urlsafe())

    # ------------------------------------------------------------------------------------------------------- links

    def owner_link(self) -> str:
        """The secret of a one-time link for the owner's account, an admin; made with it when it is missing."""
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            owner = self._owner(connection, now)
            if owner.role != "admin" or not owner.active:
                people.change_account(connection, owner.name, "keel", now, role="admin", active=True)
            secret, digest = _secret()
            expires = now + SIGN_IN_LINK_LASTS
            people.add_link(connection, digest, "admin", owner.annotator_id, "keel", now, expires)
        return secret

    def owner(self) -> Account:
        """The owner's account; made when it is missing."""
        with self._store.transaction(writes=True) as connection:
            return self._owner(connection, self._store.now)

    def _owner(self, connection: Connection, now: datetime) -> Account:
        """The owner's account. Judgements that were imported may be somebody else's of that name: a setting says whose
        account it is, and not the name."""
        id = people.setting(connection, OWNER, None)
        owner = people.account(connection, OWNER) if id is None else people.account_of(connection, id)
        if owner is None:
            name = people.free_name(connection, OWNER)
            owner = people.add_account(connection, name, "admin", None, "keel", now)
        if id is None:
            people.set_setting(connection, OWNER, owner.annotator_id, "keel", now)
        return owner

    def invite(self, role: AccountRole, actor: str) -> str:
        """The secret of an invitation to make an account with this role."""
        secret, digest = _secret()
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            people.still_admin(connection, actor)
            people.add_link(connection, digest, role, None, actor, now, now + INVITATION_LASTS)
        return secret

    def way_in(self, name: str, actor: str) -> str:
        """The secret of a one-time link for somebody who has an account (a forgotten password)."""
        secret, digest = _secret()
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            people.still_admin(connection, actor)
            account = people.account(connection, name)
            if account is None or not account.active:
                raise UserError(f"there is no active account {name!r}")
            until = now + SIGN_IN_LINK_LASTS
            people.add_link(connection, digest, account.role, account.annotator_id, actor, now, until)
        return secret

    def link(self, secret: str) -> dict[str, Any] | None:
        """What a link is for, without using it; None when it does not hold (any more)."""
        with self._store.transaction(writes=False) as connection:
            return people.link(connection, _digest(secret), self._store.now)

    def accept(self, secret: str, name: str, password: str) -> str:
        """Use an invitation: make the account and sign in. Returns the session's cookie."""
        name = " ".join(name.split())
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise UserError(f"the name must have 1 to {LONGEST_NAME} characters")
        if name in people.ACTORS:
            raise UserError(f"the name {name!r} is one of Keel's own; choose another one")
        now = self._store.now
        with self._store.transaction(writes=False) as connection:  # what can't be is refused before it is paid for
            _invited(people.link(connection, _digest(secret), now))
            people.check_free(connection, name)
        hashed = self._hash(password)
        with self._store.transaction(writes=True) as connection:
            found = _invited(people.link(connection, _digest(secret), now, use=True))
            account = people.add_account(connection, name, found["role"], hashed, name, now)
        return self.start_session(account)

    def enter(self, secret: str) -> str | None:
        """Use a one-time link of an account. Returns the session's cookie; None when the link does not hold."""
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            found = people.link(connection, _digest(secret), now)
            if found is None or found["annotator_id"] is None:
                return None
            if people.link(connection, _digest(secret), now, use=True) is None:
                return None
            account = people.account(connection, found["name"])
        return self.start_session(account) if account is not None and account.active else None

    # ---------------------------------------------------------------------------------------------------- sessions

    def sign_in(self, name: str, password: str) -> str:
        """The session's cookie. Raises WrongPassword."""
        with self._store.transaction(writes=False) as connection:
            account = people.account(connection, " ".join(name.split()))
        known = account is not None and account.active and account.password is not None
        hashed = account.password if known and account is not None and account.password else self._nobody
        if not self._fits(hashed, password) or not known or account is None:
            raise WrongPassword("the name or the password is not right")
        return self.start_session(account)

    def start_session(self, account: Account) -> str:
        cookie, digest = _secret()
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            csrf = secrets.token_urlsafe(24)
            people.add_session(connection, digest, account.annotator_id, csrf, now, now + SESSION_LASTS)
            people.log(connection, now, account.name, "signed in", "account", account.name, None, None)
        return cookie

    def session(self, cookie: str) -> Session | None:
        with self._store.transaction(writes=False) as connection:
            return people.session(connection, _digest(cookie), self._store.now)

    def sign_out(self, cookie: str) -> None:
        with self._store.transaction(writes=True) as connection:
            people.end_session(connection, _digest(cookie), self._store.now)

    def set_password(self, account: Account, password: str) -> str:
        """Change one's own password: every session ends; the cookie of a new one is returned."""
        hashed = self._hash(password)
        with self._store.transaction(writes=True) as connection:
            people.change_account(connection, account.name, account.name, self._store.now, password=hashed)
        return self.start_session(account)

    # ---------------------------------------------------------------------------------------------------- accounts

    def accounts(self) -> list[Account]:
        with self._store.transaction(writes=False) as connection:
            return people.all_accounts(connection)

    def invitations(self) -> list[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return people.open_links(connection, self._store.now)

    def withdraw(self, id: int, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            people.withdraw_link(connection, id, actor, self._store.now)

    def change(self, name: str, actor: str, role: AccountRole | None = None, active: bool | None = None) -> None:
        changes = {key: value for key, value in (("role", role), ("active", active)) if value is not None}
        if changes:
            with self._store.transaction(writes=True) as connection:
                people.still_admin(connection, actor)
                people.change_account(connection, name, actor, self._store.now, **changes)

    def erase(self, name: str, texts: bool, actor: str) -> str:
        """Make somebody nobody (keel.store.erase); the name under which their judgements stay."""
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            found = people.account(connection, name)
            if found is not None and found.annotator_id == self._owner(connection, now).annotator_id:
                raise UserError("the owner's account is that of whoever starts keel label, and nobody's name")
            if found is not None and found.active:
                people.change_account(connection, name, actor, now, active=False)  # refuses the only admin
            new = erase.erase_person(connection, name, texts, actor, now)
        self._store.compact()
        return new

    # ---------------------------------------------------------------------------------------------------- passwords

    def _hash(self, password: str) -> str:
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise UserError(f"the password must have {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
        with _HASHING:
            return _HASHER.hash(password)

    def _fits(self, hashed: str, password: str) -> bool:
        if len(password) > LONGEST_PASSWORD:
            return False
        try:
            with _HASHING:
                return _HASHER.verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False


def _invited(found: dict[str, Any] | None) -> dict[str, Any]:
    if found is None or found["annotator_id"] is not None:
        raise UserError("this invitation was used already or is too old; ask for a new one")
    return found


def _secret() -> tuple[str, str]:
    """A new secret of 256 bits, and its digest for the store."""
    secret = secrets.token_urlsafe(32)
    return secret, _digest(secret)


def _digest(secret: str) -> str:
    # a plain hash is enough for what was drawn at random: nobody can guess 256 bits
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
