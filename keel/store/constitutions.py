"""Versions of constitutions: imported from a file, drafted from the newest version, published, and then unchangeable.
Each function runs inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml
from pydantic import ValidationError
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from keel.recipe.constitution import Constitution, Principle
from keel.store.people_tables import constitutions
from keel.store.tables import annotators, event, events
from keel.types import UserError


@dataclass(frozen=True, slots=True)
class Version:
    """``published`` is None for a draft; ``author`` who published it, or began the draft."""

    id: int
    number: int
    constitution: Constitution
    author: str
    created: datetime
    published: datetime | None

    @property
    def name(self) -> str:
        return self.constitution.name


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(constitutions.c.name).distinct().order_by(constitutions.c.name)).scalars())


def versions(connection: Connection, name: str) -> list[Version]:
    """Those that are published, newest first."""
    return [one for one in _all(connection, name) if one.published is not None]


def draft(connection: Connection, name: str) -> Version | None:
    return next((one for one in _all(connection, name) if one.published is None), None)


def published(connection: Connection, name: str, number: int | None = None) -> Version:
    """One version, by default the newest."""
    found = [one for one in versions(connection, name) if number in (None, one.number)]
    if not found:
        raise UserError(f"no constitution {name!r} is published here" + (f" as version {number}" if number else ""))
    return found[0]


def current(connection: Connection) -> list[Version]:
    """The newest published version of each constitution."""
    return [found[0] for name in names(connection) if (found := versions(connection, name))]


def publish_file(connection: Connection, read: Constitution, author_id: int, now: datetime) -> int:
    """A constitution of a file becomes a version of its own; its number. What is the newest already stays that."""
    found = versions(connection, read.name)
    if found and found[0].constitution.hash == read.hash:
        return found[0].number
    if draft(connection, read.name) is not None:
        raise UserError(f"{read.name} has a draft; publish it or throw it away before you import another version")
    number = 1 + max((one.number for one in found), default=0)
    _insert(connection, read, number, author_id, now, now)
    _log(connection, "published", read, number, author_id, now)
    return number


def make_draft(connection: Connection, name: str, author_id: int, now: datetime) -> Version:
    """The draft of the next version, which everybody shares: begun from the newest one where there is none."""
    there = draft(connection, name)
    if there is None:
        newest = published(connection, name)
        _insert(connection, newest.constitution, newest.number + 1, author_id, now, None)
        _log(connection, "drafted", newest.constitution, newest.number + 1, author_id, now)
        there = draft(connection, name)
    assert there is not None
    return there


def change(
    connection: Connection,
    name: str,
    id: str,
    values: Mapping[str, Any] | None,
    seen: str,
    author_id: int,
    now: datetime,
    added: bool = False,
) -> Version:
    """Sets, adds (``added``: it must be new) or, for None, takes out one principle of the draft. ``seen``: the draft's
    hash as its editor saw it; UserError where somebody changed it since, or the principle can't be so."""
    there = _seen(connection, name, seen)
    old = there.constitution
    try:
        new = [] if values is None else [Principle.model_validate({**values, "id": id})]
        if added and any(one.id == id for one in old.principles):
            raise UserError(f"the draft of {name} has a principle {id!r} already; edit that one, or take another id")
        rest = [new or [] if one.id == id else [one] for one in old.principles]
        principles = [one for some in rest for one in some]
        if new and new[0] not in principles:
            principles += new
        examples = [e for e in old.examples if values is not None or e.principle != id]
        content = {"name": name, "principles": principles, "examples": examples}
        made = Constitution.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place or name}: {first['msg'].removeprefix('Value error, ')}") from None
    mine = constitutions.c.id == there.id, constitutions.c.draft.is_(True), constitutions.c.hash == seen
    values_ = {"content": made.model_dump(mode="json"), "hash": made.hash}
    if connection.execute(update(constitutions).where(*mine).values(**values_)).rowcount != 1:
        raise _changed(name)
    _log(connection, "edited", made, there.number, author_id, now)
    found = draft(connection, name)
    assert found is not None
    return found


def drop_draft(connection: Connection, name: str, author_id: int, now: datetime) -> None:
    there = draft(connection, name)
    if there is not None:
        connection.execute(delete(constitutions).where(constitutions.c.id == there.id, constitutions.c.draft.is_(True)))
        _log(connection, "dropped", there.constitution, there.number, author_id, now)


def publish(connection: Connection, name: str, seen: str, author_id: int, now: datetime) -> int:
    """The draft becomes the newest version; its number. ``seen``: its hash as its publisher read it. Of two who publish
    it at once one is told."""
    there = _seen(connection, name, seen)
    before = next(iter(versions(connection, name)), None)
    if before is not None and before.constitution.hash == there.constitution.hash:
        raise UserError(f"the draft says what version {before.number} says; change it before you publish it")
    mine = constitutions.c.id == there.id, constitutions.c.draft.is_(True), constitutions.c.hash == seen
    values = {"draft": False, "published": now, "author_id": author_id}
    if connection.execute(update(constitutions).where(*mine).values(**values)).rowcount != 1:
        raise _changed(name)
    _log(connection, "published", there.constitution, there.number, author_id, now)
    return there.number


def as_file(constitution: Constitution) -> str:
    """The YAML that recipes name: read back it has the same hashes."""
    content = constitution.model_dump(mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True, slots=True)
class Change:
    """What one version did to a principle: ``what`` is new, gone or changed; ``fields``: (name, before, after)."""

    id: str
    what: str
    fields: tuple[tuple[str, str, str], ...] = ()


def changes(before: Constitution, after: Constitution) -> list[Change]:
    old, new = ({p.id: p for p in one.principles} for one in (before, after))
    found = [Change(id, "gone") for id in old if id not in new]
    for id, principle in new.items():
        if id not in old:
            found.append(Change(id, "new"))
        elif principle != old[id]:
            then, now = old[id].model_dump(), principle.model_dump()
            fields = tuple((name, _words(then[name]), _words(now[name])) for name in now if then[name] != now[name])
            found.append(Change(id, "changed", fields))
    if before.examples != after.examples:
        found.append(Change("examples", "changed"))
    return found


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _all(connection: Connection, name: str) -> list[Version]:
    query = select(constitutions, annotators.c.name.label("author")).outerjoin(annotators)
    query = query.where(constitutions.c.name == name).order_by(constitutions.c.version.desc())
    return [
        Version(
            row.id, row.version, Constitution.model_validate(row.content), row.author or "", row.created, row.published
        )
        for row in connection.execute(query)
    ]


def _seen(connection: Connection, name: str, seen: str) -> Version:
    there = draft(connection, name)
    if there is None:
        raise UserError(f"{name} has no draft any more; somebody published it, or threw it away")
    if there.constitution.hash != seen:
        raise _changed(name)
    return there


def _changed(name: str) -> UserError:
    return UserError(f"the draft of {name} was changed or published in the meantime; load the page and read it again")


def _insert(
    connection: Connection, one: Constitution, number: int, author_id: int, now: datetime, at: datetime | None
) -> None:
    row = {"name": one.name, "version": number, "hash": one.hash, "content": one.model_dump(mode="json")}
    row |= {"draft": at is None, "author_id": author_id, "created": now, "published": at}
    try:
        connection.execute(insert(constitutions), row)
    except IntegrityError as error:  # another transaction made it at this very moment
        raise _changed(one.name) from error


def _log(connection: Connection, what: str, one: Constitution, number: int, author_id: int, now: datetime) -> None:
    actor = connection.execute(select(annotators.c.name).where(annotators.c.id == author_id)).scalar_one()
    told = {"version": number, "hash": one.hash, "principles": {p.id: p.hash for p in one.principles}}
    connection.execute(insert(events), event(now, actor, what, "constitution", one.name, None, told))
