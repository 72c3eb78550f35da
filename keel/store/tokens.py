"""What programs sign in with, and what their writes were answered. Each function runs inside its caller's transaction.
Secrets are made and hashed by the caller (keel.web.service.tokens): only digests come here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select, update

from keel.store import people
from keel.store.api_tables import answers, tokens
from keel.store.ingest import insert_missing
from keel.store.people import ROLES, Account, AccountRole
from keel.store.people_tables import accounts
from keel.store.tables import annotators
from keel.types import UserError

ANSWERS_KEPT = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Token:
    """A token that holds. ``account``: in whose name, with the role that the token has."""

    id: int
    name: str
    account: Account
    per_minute: int
    last_used: datetime | None


@dataclass(frozen=True, slots=True)
class Answer:
    asked: str
    answer: dict[str, Any]


# A token ends with its maker's rights, as links do. This stands behind that.
_HOLDS = (
    tokens.c.ended_at.is_(None),
    accounts.c.active,
    or_(tokens.c.made_by.in_(people.ACTORS), tokens.c.made_by.in_(people.MAKERS)),
)
_TOKEN = (
    select(tokens, annotators.c.name.label("of"), annotators.c.role.label("most"))
    .join(accounts, accounts.c.annotator_id == tokens.c.annotator_id)
    .join(annotators, annotators.c.id == tokens.c.annotator_id)
    .where(*_HOLDS)
)


def add_token(
    connection: Connection, digest: str, name: str, of: str, role: AccountRole, per_minute: int, by: str, now: datetime
) -> int:
    """A token in the name of account ``of``, made ``by`` somebody who must be an admin; its id. UserError for an
    account that is not there or closed, and for a role beyond the account's."""
    people.still_admin(connection, by)
    account = people.account(connection, of)
    if account is None or not account.active:
        raise UserError(f"there is no active account {of!r}")
    if not allowed(role, account.role):
        raise UserError(f"{of!r} is {account.role}; a token in that name may be no more, so not {role}")
    row = {"digest": digest, "name": name, "annotator_id": account.annotator_id, "role": role, "created": now}
    made = connection.execute(insert(tokens), row | {"per_minute": per_minute, "made_by": by}).inserted_primary_key
    assert made is not None
    told = {"role": role, "for": account.annotator_id, "per_minute": per_minute}
    people.log(connection, now, by, "made", "token", made.id, None, told)
    return int(made.id)


def allowed(role: AccountRole, most: AccountRole) -> bool:
    return ROLES.index(role) <= ROLES.index(most)


def token(connection: Connection, digest: str) -> Token | None:
    """The token with this digest, if it holds."""
    row = connection.execute(_TOKEN.where(tokens.c.digest == digest)).first()
    if row is None or not allowed(row.role, row.most):
        return None
    account = Account(row.annotator_id, row.of, row.role, True, None)
    return Token(row.id, row.name, account, row.per_minute, row.last_used)


def used(connection: Connection, id: int, now: datetime) -> None:
    connection.execute(update(tokens).where(tokens.c.id == id).values(last_used=now))


def all_tokens(connection: Connection) -> list[dict[str, Any]]:
    """Those that hold: id, name, of (an account's name), role, per_minute, made_by, created, last_used."""
    shown = ("id", "name", "of", "role", "per_minute", "made_by", "created", "last_used")
    rows = connection.execute(_TOKEN.order_by(tokens.c.id)).mappings()
    return [{name: row[name] for name in shown} for row in rows]


def end_token(connection: Connection, id: int, by: str, now: datetime) -> None:
    """UserError for one that is not there, or ended already."""
    people.still_admin(connection, by)
    if not people.end_ways(connection, tokens, "token", tokens.c.id == id, by, now):
        raise UserError(f"there is no token {id} that holds")


def answer(connection: Connection, token_id: int, key: str) -> Answer | None:
    query = select(answers.c.asked, answers.c.answer).where(answers.c.token_id == token_id, answers.c.key == key)
    row = connection.execute(query).first()
    return None if row is None else Answer(*row)


def keep_answer(
    connection: Connection, token_id: int, key: str, asked: str, said: dict[str, Any], now: datetime
) -> None:
    """Of two that come at once the first one's is kept. What is old is forgotten."""
    connection.execute(delete(answers).where(answers.c.created < now - ANSWERS_KEPT))
    row = {"token_id": token_id, "key": key, "asked": asked, "answer": said, "created": now}
    insert_missing(connection, answers, [row])
