"""What programs read, as JSON: prompts, responses, work as it comes, preferences."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import select

from keel.store import Store, exchange, feed
from keel.store.feed import Entry
from keel.store.removals import in_use
from keel.store.rows import messages_json
from keel.store.settled import settle
from keel.store.tables import prompts, responses

PAGE = 500


class Reading:
    def __init__(self, store: Store) -> None:
        self._store = store

    def prompts(self, after: str, limit: int) -> list[dict[str, Any]]:
        """By id, behind ``after``."""
        query = select(prompts, in_use(prompts.c.id).label("in_use")).where(prompts.c.id > after)
        with self._store.transaction(writes=False) as connection:
            return [dict(row) for row in connection.execute(query.order_by(prompts.c.id).limit(limit)).mappings()]

    def responses(self, prompt: str | None, after: int, limit: int) -> list[dict[str, Any]]:
        """In the order they were added, behind ``after``; of one prompt or of all."""
        shown = (responses.c[name] for name in ("id", "prompt_id", "text", "finished", "model", "created"))
        used = in_use(responses.c.prompt_id, responses.c.id).label("in_use")
        query = select(*shown, used).where(responses.c.id > after).order_by(responses.c.id).limit(limit)
        query = query if prompt is None else query.where(responses.c.prompt_id == prompt)
        with self._store.transaction(writes=False) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def votes(self, cursor: int, since: datetime | None, limit: int) -> tuple[list[dict[str, Any]], int, bool]:
        """(work behind ``cursor``, the cursor to go on from, whether there is more already)."""
        with self._store.transaction(writes=False) as connection:
            upto = feed.end(connection, cursor)
            found, read = feed.entries(connection, cursor, upto, limit, since)
        return [entry_json(one) for one in found], max(read, cursor), read < upto

    def all_votes(self, cursor: int, since: datetime | None) -> Iterator[dict[str, Any]]:
        """The same to the log's end, some at a time: nobody waits for a slow reader."""
        more = True
        while more:
            found, cursor, more = self.votes(cursor, since, PAGE)
            yield from found

    def preferences(self, since: datetime | None) -> Iterator[dict[str, Any]]:
        """What training takes, as in ``pairs.jsonl``: of what was given ``since`` then, or of all."""
        given = [one for one in self._store.all_given() if since is None or one.created >= since]
        settled = settle([pair for one in given for pair in one.preferences()])
        yield from map(exchange.preference_row, settled)


def entry_json(one: Entry) -> dict[str, Any]:
    return {
        "cursor": one.cursor,
        "news": one.news,
        "kind": one.kind,
        "id": one.id,
        "at": one.at.isoformat(),
        "annotator": one.annotator,
        "annotator_kind": one.annotator_kind,
        "batch": one.batch,
        "item": one.item,
        "gold": one.gold,
        "out": one.out,
        "prompt": {"id": one.prompt.id, "messages": messages_json(one.prompt)},
        "shown": [{"id": r.id, "text": r.text, "finished": r.finished, "model": r.model} for r in one.shown],
        "said": dict(one.said),
    }
