"""Labels on the steps of replies, for those who manage: whether they are asked for, of which replies, how far people
agree. What annotators do with a reply is in `keel.web.service.labelling`, as all work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select

from keel.recipe.steps import Steps
from keel.store import Store, people, steps
from keel.store.records import AnnotatorKind
from keel.store.steps import OpenReply
from keel.store.tables import items
from keel.types import UserError
from keel.web.service.step_habits import StepQuality, step_quality

FIRST_REPLIES = 200
_KEPT_SECONDS = 5.0

# What a label on each reply teaches, by its id: the greatest come first.
Gains = Callable[[Sequence[OpenReply]], Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class StepSettings:
    """``split``: how replies are cut that are queued next; ``reference``: whether people may see reference answers;
    ``ordered``: whether replies come in an order."""

    split: Steps
    reference: bool
    ordered: bool


def begin(store: Store, split: Steps, gains: Gains | None) -> int:
    """Turns the queue on where nobody has asked for steps yet, with up to `FIRST_REPLIES` replies; how many. A reply of
    one step is none to label."""
    now = store.now
    with store.transaction(writes=False) as connection:
        asked = connection.execute(select(items.c.id).where(items.c.kind == "step").limit(1)).first() is not None
        found = [] if asked else steps.open_replies(connection, split)[0]
    if not found:
        return 0
    taught = gains(found) if gains else None
    with store.transaction(writes=True) as connection:
        steps.set_splitter(connection, split, "keel", now)
        return steps.queue_replies(connection, split, FIRST_REPLIES, 1, now, taught)


class StepWork:
    def __init__(self, store: Store, gains: Gains | None = None) -> None:
        self._store, self._gains = store, gains
        self._on: tuple[float, bool] = (-_KEPT_SECONDS, False)

    def on(self) -> bool:
        """Whether there is anything of this kind: else its page has no link."""
        asked, found = self._on
        if not found and time.monotonic() - asked > _KEPT_SECONDS:
            with self._store.transaction(writes=False) as connection:
                row = connection.execute(select(items.c.id).where(items.c.kind == "step").limit(1)).first()
            self._on = time.monotonic(), row is not None
        return self._on[1]

    def settings(self) -> StepSettings:
        with self._store.transaction(writes=False) as connection:
            split = steps.splitter(connection) or Steps()
            return StepSettings(split, steps.reference_allowed(connection), self._gains is not None)

    def queue(self, split: Steps, count: int, overlap: int, actor: str) -> int:
        """Queue replies that were not yet; how many. UserError where each is a single step."""
        if not 1 <= count <= 10_000 or not 1 <= overlap <= 100:
            raise UserError("give 1 to 10,000 replies and 1 to 100 people each")
        now = self._store.now
        with self._store.transaction(writes=False) as connection:
            found, _ = steps.open_replies(connection, split)
        gains = self._gains(found) if self._gains and found else None  # it may read files: no transaction waits for it
        with self._store.transaction(writes=True) as connection:
            steps.set_splitter(connection, split, actor, now)
            made = steps.queue_replies(connection, split, count, overlap, now, gains)
            people.log(connection, now, actor, "asked for", "step", made, None, {"overlap": overlap})
        self._on = -_KEPT_SECONDS, False
        return made

    def allow_reference(self, allowed: bool, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            steps.allow_reference(connection, allowed, actor, self._store.now)

    def quality(self, kinds: Sequence[AnnotatorKind]) -> StepQuality:
        with self._store.transaction(writes=False) as connection:
            found = steps.votes(connection, kinds)
        return step_quality(found)
