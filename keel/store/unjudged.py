"""Responses that were written elsewhere, into a store and into a queue. Inside its caller's transaction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import combinations

from sqlalchemy import Connection, insert

from keel.store.ingest import NewResponse, add_items, add_prompts, add_responses, items_of, prompts_of, rows_of
from keel.store.rows import storable
from keel.store.tables import event, events, responses
from keel.types import Unjudged, UserError

BATCH = "responses"


@dataclass(frozen=True, slots=True)
class Added:
    """How many of each were new, and how many groups of responses there were."""

    groups: int
    prompts: int
    responses: int
    items: int

    def __str__(self) -> str:
        said = f"{self.prompts} prompts, {self.responses} responses and {self.items} pairs added"
        return said if self.items else f"{said}: all of them were there already"


def add_unjudged(
    connection: Connection,
    groups: Sequence[Unjudged],
    pairs: int | None,
    overlap: int,
    batch: str,
    actor: str,
    now: datetime,
) -> Added:
    """Add prompts with their responses, and queue ``pairs`` comparisons of each group (None: all of them), each for
    ``overlap`` people. A prompt's response with a text that it has already is that one, whatever wrote it, so the same
    group again adds nothing. UserError where a prompt's id stands for other messages."""
    if (pairs is not None and pairs < 1) or not 1 <= overlap <= 1000:
        raise UserError(f"{pairs} pairs for {overlap} people each: give 1 or more, and 1 to 1000 people")
    named = sorted({group.prompt.id for group in groups})
    asked = len(named) - len(list(prompts_of(connection, named)))
    add_prompts(connection, [group.prompt for group in groups], now)
    known: dict[tuple[str, str], int] = {}
    for row in rows_of(connection, responses, responses.c.prompt_id, named):
        key = row.prompt_id, row.text.strip()
        known[key] = min(row.id, known.get(key, row.id))
    new: dict[tuple[str, str], NewResponse] = {}
    for group in groups:
        for text, model in zip(group.responses, group.models, strict=True):
            key = group.prompt.id, storable(text).strip()
            if key not in known:
                new.setdefault(key, NewResponse(group.prompt.id, text, True, model, "", None))
    known |= dict(zip(new, add_responses(connection, list(new.values()), now), strict=True))
    wanted: list[tuple[int, int]] = []
    for group in groups:
        ids = [known[group.prompt.id, storable(text).strip()] for text in group.responses]
        wanted += _some(list(combinations(ids, 2)), pairs, group.prompt.id)
    keys = {"{}-{}".format(*sorted(pair)) for pair in wanted}
    queued = len(keys) - len(items_of(connection, batch, list(keys)))
    add_items(connection, wanted, overlap, batch, now)
    added = Added(len(groups), asked, len(new), queued)
    told = {"prompts": added.prompts, "responses": added.responses, "items": added.items, "overlap": overlap}
    connection.execute(insert(events), event(now, actor, "imported", "responses", batch, None, told))
    return added


def _some(pairs: list[tuple[int, int]], most: int | None, prompt_id: str) -> list[tuple[int, int]]:
    """Up to ``most`` of the pairs, drawn the same way each time, so that a file that is read again adds nothing."""
    if most is None or len(pairs) <= most:
        return pairs
    return random.Random(f"pairs/{prompt_id}").sample(pairs, most)


def total(pieces: Sequence[Added]) -> Added:
    return Added(*(sum(getattr(one, field.name) for one in pieces) for field in fields(Added)))
