"""Accounts, links and sessions. Each function runs inside its caller's transaction. Secrets are made and hashed by the
caller (keel.web.service.people): only digests come here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Table, insert, or_, select, update

from keel.store.api_tables import tokens, webhooks
from keel.store.ingest import insert_missing, insert_new
from keel.store.people_tables import accounts, links, sessions, settings
from keel.store.tables import annotators, event, events
from keel.types import UserError

AccountRole = Literal["annotator", "reviewer", "admin"]


ACTORS = ("keel", "keel label", "somebody invited")  # what the log calls those who are nobody: no person's names


ROLES: tuple[AccountRole, ...] = ("annotator", "reviewer", "admin")


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who may sign in. ``password``: its hash; None for one who comes by link only."""

    annotator_id: int
    name: str
    role: AccountRole
    active: bool
    password: str | None


@dataclass(frozen=True, slots=True)
class Session:
    account: Account
    csrf: str


_ACCOUNT = select(
    accounts.c.annotator_id, annotators.c.name, annotators.c.role, accounts.c.active, accounts.c.password
).join(annotators)


def account(connection: Connection, name: str) -> Account | None:
    row = connection.execute(_ACCOUNT.where(annotators.c.name == name)).first()
    return None if row is None else Account(*row)


def account_of(connection: Connection, annotator_id: int) -> Account | None:
    row = connection.execute(_ACCOUNT.where(accounts.c.annotator_id == annotator_id)).first()
    return None if row is None else Account(*row)


def free_name(connection: Connection, name: str) -> str:
    """``name``, or it with the first number that makes it nobody's."""
    number, free = 1, name
    while connection.execute(select(annotators.c.id).where(annotators.c.name == free)).first() is not None:
        number += 1
        free = f"{name} {number}"
    return free


def all_accounts(connection: Connection) -> list[Account]:
    return [Account(*row) for row in connection.execute(_ACCOUNT.order_by(annotators.c.name))]


def check_free(connection: Connection, name: str) -> None:
    """UserError when the name is taken, by another account or by an annotator of earlier judgements: somebody new must
    not come to own what somebody else said."""
    if connection.execute(select(annotators.c.id).where(annotators.c.name == name)).first() is not None:
        raise UserError(
            f"the name {name!r} is taken, by an account or by imported judgements; choose another one, such as "
            f"{free_name(connection, name)!r}"
        )


def add_account(
    connection: Connection, name: str, role: AccountRole, password: str | None, actor: str, now: datetime
) -> Account:
    """UserError when the name is taken (``check_free``)."""
    check_free(connection, name)
    row = {"name": name, "kind": "person", "role": role, "created": now}
    id = insert_new(connection, annotators, row)
    if id is None:  # somebody took it since we looked
        raise UserError(f"the name {name!r} has just been taken; choose another one")
    new = {"annotator_id": id, "password": password, "active": True, "created": now}
    connection.execute(insert(accounts), new)
    log(connection, now, actor, "added", "account", name, None, {"role": role})
    return Account(id, name, role, True, password)


def still_admin(connection: Connection, actor: str) -> None:
    """UserError unless ``actor``, who was let in as an admin, is one still: they may have been demoted since. From here
    to the end of the transaction the admins stay who they are."""
    _hold_admins(connection)
    found = account(connection, actor)
    if actor not in ACTORS and not (found is not None and found.active and found.role == "admin"):
        raise UserError(f"{actor!r} is no admin any more")


_ADMINS = (
    select(annotators.c.id)
    .where(annotators.c.role == "admin")
    .order_by(annotators.c.id)
    .with_for_update(key_share=True)  # rows that refer to these may be added meanwhile
)


def _hold_admins(connection: Connection) -> None:
    """Who is an admin is changed by one transaction at a time: two that each count on the other's to be the last one
    would leave none. (SQLite has one writer.)"""
    if connection.dialect.name == "postgresql":
        connection.execute(_ADMINS)


def change_account(connection: Connection, name: str, actor: str, now: datetime, **changes: Any) -> None:
    """Change ``role``, ``active`` or ``password``. Links and tokens for the account end, and with an admin's rights the
    links, tokens and webhooks that they made. UserError when nobody could manage any more."""
    _hold_admins(connection)
    old = account(connection, name)
    if old is None:
        raise UserError(f"there is no account {name!r}")
    was = {key: getattr(old, key) for key in changes if key != "password"}
    if old.role == "admin" and old.active and (changes.get("role", "admin") != "admin" or not changes.get("active", 1)):
        others = [a for a in all_accounts(connection) if a.role == "admin" and a.active and a.name != name]
        if not others:
            raise UserError(f"{name!r} is the only admin; make somebody else an admin first")
    if "role" in changes:
        new_role = {"role": changes["role"]}
        connection.execute(update(annotators).where(annotators.c.id == old.annotator_id).values(**new_role))
    own = {key: value for key, value in changes.items() if key != "role"}
    if own:
        connection.execute(update(accounts).where(accounts.c.annotator_id == old.annotator_id).values(**own))
    if own or was.get("role") != changes.get("role"):  # whoever was signed in signs in again, with what holds now
        end_sessions(connection, old.annotator_id, now)
        _end_links(connection, links.c.annotator_id == old.annotator_id, actor, now)
        end_ways(connection, tokens, "token", tokens.c.annotator_id == old.annotator_id, actor, now)
    if not (changes.get("role", old.role) == "admin" and changes.get("active", old.active)):
        _end_links(connection, links.c.made_by == name, actor, now)
        end_ways(connection, tokens, "token", tokens.c.made_by == name, actor, now)
        end_ways(connection, webhooks, "webhook", webhooks.c.made_by == name, actor, now)
    told = {key: value for key, value in changes.items() if key != "password"} or {"password": "changed"}
    log(connection, now, actor, "changed", "account", name, was or None, told)


def add_link(
    connection: Connection,
    digest: str,
    role: AccountRole,
    annotator_id: int | None,
    made_by: str,
    now: datetime,
    expires_at: datetime,
) -> None:
    row = {"digest": digest, "role": role, "annotator_id": annotator_id, "made_by": made_by, "created": now}
    made = connection.execute(insert(links), row | {"expires_at": expires_at}).inserted_primary_key
    assert made is not None
    log(connection, now, made_by, "made", "link", made.id, None, {"role": role, "for": annotator_id})


# Whoever made it may still make one. (A link ends with its maker's rights; this is for what older Keels left open.)
MAKERS = select(annotators.c.name).join(accounts).where(annotators.c.role == "admin", accounts.c.active)
_HOLDS = links.c.used_at.is_(None) & or_(links.c.made_by.in_(ACTORS), links.c.made_by.in_(MAKERS))


def link(connection: Connection, digest: str, now: datetime, use: bool = False) -> dict[str, Any] | None:
    """The link with this digest that still holds: its id, role, made_by, and annotator's name (None: an invitation).
    ``use``: it holds no longer. Of two who use it at once one gets it."""
    query = (
        select(links.c.id, links.c.role, links.c.made_by, links.c.annotator_id, annotators.c.name)
        .outerjoin(annotators, annotators.c.id == links.c.annotator_id)
        .where(links.c.digest == digest, _HOLDS, links.c.expires_at > now)
    )
    found = connection.execute(query).mappings().first()
    row = None if found is None else dict(found)
    if row is None or not use:
        return row
    mark = update(links).where(links.c.id == row["id"], links.c.used_at.is_(None)).values(used_at=now)
    if connection.execute(mark).rowcount != 1:
        return None
    log(connection, now, row["name"] or "somebody invited", "used", "link", row["id"], None, None)
    return row


def open_links(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """Invitations that nobody has used yet."""
    query = select(links).where(_HOLDS, links.c.expires_at > now, links.c.annotator_id.is_(None))
    return [dict(row) for row in connection.execute(query.order_by(links.c.id)).mappings()]


def _end_links(connection: Connection, which: ColumnElement[bool], actor: str, now: datetime) -> None:
    """They hold no longer, also when the rights that they rest on come back."""
    ended = update(links).where(which, links.c.used_at.is_(None), links.c.expires_at > now).values(used_at=now)
    for row in connection.execute(ended.returning(links.c.id)).all():
        log(connection, now, actor, "withdrew", "link", row.id, None, None)


def end_ways(
    connection: Connection, table: Table, what: str, which: ColumnElement[bool], actor: str, now: datetime
) -> list[int]:
    """End tokens or webhooks that have not ended, for good; their ids."""
    ended = update(table).where(which, table.c.ended_at.is_(None)).values(ended_at=now)
    ids = [int(row.id) for row in connection.execute(ended.returning(table.c.id))]
    for id in ids:
        log(connection, now, actor, "ended", what, id, None, None)
    return ids


def withdraw_link(connection: Connection, id: int, actor: str, now: datetime) -> None:
    _end_links(connection, links.c.id == id, actor, now)


def add_session(
    connection: Connection, digest: str, annotator_id: int, csrf: str, now: datetime, expires_at: datetime
) -> None:
    row = {"digest": digest, "annotator_id": annotator_id, "csrf": csrf, "created": now, "expires_at": expires_at}
    connection.execute(insert(sessions), row)


_SESSION = (
    select(
        sessions.c.csrf,
        accounts.c.annotator_id,
        annotators.c.name,
        annotators.c.role,
        accounts.c.active,
        accounts.c.password,
    )
    .join(accounts, accounts.c.annotator_id == sessions.c.annotator_id)
    .join(annotators, annotators.c.id == sessions.c.annotator_id)
    .where(sessions.c.ended_at.is_(None), accounts.c.active)
)


def session(connection: Connection, digest: str, now: datetime) -> Session | None:
    """The session with this digest, if it still holds and its account is active."""
    row = connection.execute(_SESSION.where(sessions.c.digest == digest, sessions.c.expires_at > now)).first()
    return None if row is None else Session(Account(*row[1:]), row.csrf)


def end_session(connection: Connection, digest: str, now: datetime) -> None:
    connection.execute(update(sessions).where(sessions.c.digest == digest).values(ended_at=now))


def end_sessions(connection: Connection, annotator_id: int, now: datetime) -> None:
    mine = sessions.c.annotator_id == annotator_id, sessions.c.ended_at.is_(None)
    connection.execute(update(sessions).where(*mine).values(ended_at=now))


def setting(connection: Connection, name: str, default: Any) -> Any:
    row = connection.execute(select(settings.c.value).where(settings.c.name == name)).first()
    return default if row is None else row.value


def set_setting(connection: Connection, name: str, value: Any, actor: str, now: datetime) -> None:
    old = setting(connection, name, None)
    insert_missing(connection, settings, [{"name": name, "value": value}])
    connection.execute(update(settings).where(settings.c.name == name).values(value=value))
    log(connection, now, actor, "changed", "setting", name, old, value)


def log(
    connection: Connection,
    now: datetime,
    actor: str,
    action: str,
    entity: str,
    entity_id: object,
    old: Any,
    new: Any,
    guideline: str | None = None,
) -> None:
    connection.execute(insert(events), event(now, actor, action, entity, entity_id, old, new, guideline))
