"""A long list, some rows at a time, and what is looked for in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Text, cast, func

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which page of a list: ``number`` counts from 0; ``find``: rows that hold this text alone, of any case."""

    find: str = ""
    number: int = 0
    size: int = 20

    def of(self, query: Select[Any]) -> Select[Any]:
        """The query for this page, and one row more, which tells whether another page follows."""
        return query.offset(self.number * self.size).limit(self.size + 1)

    def page(self, rows: Iterable[Row]) -> Page[Row]:
        """``rows``: of the query that ``of`` made."""
        found = list(islice(rows, self.size + 1))
        return Page(found[: self.size], self, len(found) > self.size)

    def within(self, rows: Iterable[Row]) -> Page[Row]:
        """The page of rows that are all there."""
        return self.page(islice(rows, self.number * self.size, None))


class Page(list[Row]):
    """Some rows of a list. ``more``: whether another page follows."""

    def __init__(self, rows: Iterable[Row], wanted: Wanted, more: bool) -> None:
        super().__init__(rows)
        self.wanted, self.more = wanted, more


def holds(column: ColumnElement[Any], find: str) -> ColumnElement[bool]:
    """Whether a column of text holds ``find``, in capitals or not (of letters beyond ASCII as they are)."""
    return func.lower(column).contains(find.lower(), autoescape=True)


def messages_hold(column: ColumnElement[Any], find: str) -> ColumnElement[bool]:
    """The same of a column of messages, which is kept as JSON."""
    return holds(cast(column, Text), json.dumps(find)[1:-1])
