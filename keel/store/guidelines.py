"""Versions of the text that annotators work by."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from keel.store.tables import guidelines
from keel.types import UserError


@dataclass(frozen=True, slots=True)
class Guideline:
    """``aspects``: (name, question) of what a response may be rated on."""

    version: str
    text: str
    aspects: tuple[tuple[str, str], ...]
    created: datetime


def current_guideline(connection: Connection) -> Guideline | None:
    """The newest version that has a text."""
    return next((guideline for guideline in all_guidelines(connection) if guideline.text), None)


def all_guidelines(connection: Connection) -> list[Guideline]:
    """Newest first, by number: a clock may go back, and an imported version comes late. Those that have no number
    (a recipe may call them anything) stand behind those that have one, by their dates."""
    found = [_guideline(row) for row in connection.execute(select(guidelines))]
    return sorted(found, key=lambda g: (_number(g.version), g.created, g.version), reverse=True)


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1


def next_version(connection: Connection) -> str:
    """One more than the highest whole number among the versions."""
    versions = connection.execute(select(guidelines.c.version)).scalars()
    return str(1 + max((*map(_number, versions), 0)))


def _guideline(row: Any) -> Guideline:
    aspects = tuple((aspect["name"], aspect["question"]) for aspect in row.aspects or ())
    return Guideline(row.version, row.text, aspects, row.created)


def parse_aspects(text: str) -> list[dict[str, str]]:
    """Aspects as they are typed, a line each: ``name: question``."""
    found = []
    for line in text.splitlines():
        # "1:2 ratio: Is it?": a colon inside the name has no space behind it
        name, _, question = (part.strip() for part in line.partition(": " if ": " in line else ":"))
        if not name and not question:
            continue
        if not name or len(name) > 40:
            raise UserError(f"aspect {line.strip()!r}: write a line each, as in helpful: Does it do what was asked?")
        found.append({"name": name.lower(), "question": question})
    if len(found) > 8 or len({aspect["name"] for aspect in found}) < len(found):
        raise UserError("give up to 8 aspects with different names")
    return found
