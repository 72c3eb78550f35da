"""What annotators do: get an item, judge, rank, rate or write, take it back, skip, flag. What is handed out here is all
that a page may send before the vote: no model, no score, no item's or response's number, no sign of a gold item."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, func, select

from keel.store import Assignment, Store, blind, guidelines, leases, people, steps, tallies, work
from keel.store.guidelines import Guideline
from keel.store.hand_in import WORK_TABLES
from keel.store.leases import Renewed
from keel.store.lineage import outcome_words, thumb_word
from keel.store.people import Account
from keel.store.records import NewRanking, NewThumb, NewVote, NewWriting, WorkKind
from keel.store.step_records import NewSteps
from keel.store.steps import Sheet
from keel.store.tables import assignments, items
from keel.types import Message, UserError

Given = TypeVar("Given", NewRanking, NewThumb, NewSteps, NewWriting)

GOLD_EVERY = 20  # of this many items one is a gold item, as long as there are any that the annotator has not had
MOST_HELD = 8  # items in one pair of hands: the one on the screen, and those fetched ahead for a train ride
_KEPT_SECONDS = 5.0  # how old a figure of progress may be


@dataclass(frozen=True, slots=True)
class Screen:
    """One item as a page shows it. ``id``: the assignment's handle; ``sheet``: of a reply that is labelled in steps;
    ``said``: what its person said of these and took back."""

    id: str
    kind: WorkKind
    messages: tuple[Message, ...]
    shown: tuple[str, ...]
    sheet: Sheet | None = None
    said: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """``today``: what this annotator did since midnight UTC; ``done`` of ``wanted``: all people's, for this kind. What
    is done counts gold items like others, lest the figure tell them apart; what is wanted counts none, so at the end
    ``wanted`` is as many as are ``done``."""

    today: int
    done: int
    wanted: int


@dataclass(frozen=True, slots=True)
class PastWork:
    """One thing that somebody did, for their own list of it."""

    at: datetime
    kind: WorkKind
    prompt: str
    what: str


class Labelling:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._places = blind.Places()
        self._progress: dict[str, tuple[float, tuple[int, int]]] = {}
        self._guideline: tuple[float, Guideline | None] = (-_KEPT_SECONDS, None)
        self._gold_every: tuple[float, int] = (-_KEPT_SECONDS, GOLD_EVERY)

    # ----------------------------------------------------------------------------------------------------- the queue

    def next(self, person: Account, kind: WorkKind, holding: Collection[str] = ()) -> Screen | None:
        """What this person does next; ``holding``: the handles of what their page has already."""
        if len(holding) >= MOST_HELD:
            return None
        with self._store.transaction(writes=True) as connection:
            asked, every = self._gold_every
            if time.monotonic() - asked > _KEPT_SECONDS:
                every = int(people.setting(connection, "gold_every", GOLD_EVERY))
                self._gold_every = time.monotonic(), every
            now, lease = self._store.now, self._store.lease
            found = blind.next_for(connection, person.annotator_id, kind, holding, every, now, lease, self._places)
            return None if found is None else _with_sheet(connection, found)

    def judge(self, person: Account, handle: str, vote: NewVote) -> int:
        """A vote without a guideline was given by the one in force. Ratings on what it does not ask for are dropped."""
        rules = self._rules(vote.guideline)
        asked = {name for name, _ in rules.aspects} if rules else set()
        rated = {
            side: {aspect: value for aspect, value in given.items() if aspect in asked}
            for side, given in vote.ratings.items()
        }
        ratings = {side: given for side, given in rated.items() if given}
        vote = replace(vote, guideline=rules.version if rules else None, ratings=ratings)
        with self._store.session() as session, session.transaction(writes=True) as connection:
            found = blind.find(connection, handle, person.annotator_id)
            new = _is_new(connection, "compare", vote.token)
            id = session.submit(found, vote, annotator_id=person.annotator_id)
        self._count("compare", int(new))
        return id

    def rank(self, person: Account, handle: str, ranking: NewRanking) -> int:
        return self._hand_in(person, handle, ranking, work.rank)

    def thumb(self, person: Account, handle: str, given: NewThumb) -> int:
        return self._hand_in_counted(person, handle, given, work.thumb, "thumb")

    def label_steps(self, person: Account, handle: str, given: NewSteps) -> int:
        return self._hand_in_counted(person, handle, given, steps.hand_in, "step")

    def write(self, person: Account, handle: str, writing: NewWriting) -> int:
        return self._hand_in(person, handle, writing, work.write)

    def _hand_in_counted(
        self, person: Account, handle: str, given: Given, add: Callable[..., int], kind: WorkKind
    ) -> int:
        with self._store.transaction(writes=False) as connection:
            new = _is_new(connection, kind, given.token)
        id = self._hand_in(person, handle, given, add)
        self._count(kind, int(new))
        return id

    def _hand_in(self, person: Account, handle: str, given: Given, add: Callable[..., int]) -> int:
        """Work without a guideline was done under the one in force."""
        rules = self._rules(given.guideline)
        given = replace(given, guideline=rules.version if rules else None)
        mine, now = person.annotator_id, self._store.now
        with self._store.transaction(writes=True) as connection:
            found = blind.find(connection, handle, mine)
            return add(connection, found, given, annotator_id=mine, now=now)

    def hold(self, person: Account, handles: Collection[str]) -> Renewed:
        """The person's page is open with these before them: they stay theirs for longer."""
        with self._store.transaction(writes=True) as connection:
            return leases.renew(connection, handles, person.annotator_id, self._store.now, self._store.lease)

    def skip(self, person: Account, handle: str, reason: str, token: str | None = None) -> None:
        with self._store.transaction(writes=True) as connection:
            work.skip(
                connection,
                blind.find(connection, handle, person.annotator_id),
                reason,
                token=token,
                guideline=self._version(),
                annotator_id=person.annotator_id,
                now=self._store.now,
            )

    def flag(self, person: Account, handle: str, text: str, token: str) -> None:
        with self._store.transaction(writes=True) as connection:
            work.flag(
                connection,
                blind.find(connection, handle, person.annotator_id),
                text,
                token=token,
                guideline=self._version(),
                annotator_id=person.annotator_id,
                now=self._store.now,
            )

    def undo(self, person: Account, kind: WorkKind, handle: str | None = None) -> Screen | None:
        """Take back what this person did last, or did with this assignment; None when there is nothing."""
        store = self._store
        with store.transaction(writes=True) as connection:
            back = work.undo_last(
                connection,
                kind,
                person.annotator_id,
                guideline=self._version(),
                now=store.now,
                lease=store.lease,
                assignment_id=None if handle is None else blind.find(connection, handle, person.annotator_id),
            )
            shown = None if back is None else _with_sheet(connection, back[0])
        if back is not None and back[1] == "judged":
            self._count(kind, -1)
        return shown

    # ------------------------------------------------------------------------------------------- guideline, progress

    def guideline(self) -> Guideline | None:
        asked, found = self._guideline
        if time.monotonic() - asked > _KEPT_SECONDS:
            with self._store.transaction(writes=False) as connection:
                found = guidelines.current_guideline(connection)
            self._guideline = time.monotonic(), found
        return found

    def _rules(self, version: str | None) -> Guideline | None:
        """The guideline that a page was made with: a new one may have come since, or while a vote waited offline."""
        current = self.guideline()
        if version is None or (current is not None and current.version == version):
            return current
        with self._store.transaction(writes=False) as connection:
            found = [one for one in guidelines.all_guidelines(connection) if one.version == version and one.text]
        if not found:
            raise UserError(f"there is no guideline {version!r}; load the page again")
        return found[0]

    def forget(self) -> None:
        """Somebody changed the guideline or a setting: look again."""
        self._guideline = -_KEPT_SECONDS, None
        self._gold_every = -_KEPT_SECONDS, GOLD_EVERY
        self._progress = {}

    def progress(self, person: Account, kind: WorkKind) -> Done:
        with self._store.transaction(writes=False) as connection:
            today = tallies.done_on(connection, person.annotator_id, kind, tallies.day_of(self._store.now))
        done, wanted = self._of_all(kind)
        return Done(today, done, wanted)

    def _count(self, kind: WorkKind, change: int) -> None:
        """What this process just did shows at once, in a figure that is otherwise some seconds old."""
        asked, (done, wanted) = self._progress.get(kind, (-_KEPT_SECONDS, (0, 0)))
        self._progress[kind] = asked, (done + change, wanted)

    def _of_all(self, kind: WorkKind) -> tuple[int, int]:
        asked, figures = self._progress.get(kind, (-_KEPT_SECONDS, (0, 0)))
        if time.monotonic() - asked > _KEPT_SECONDS:
            if asked > 0:  # others are told the old figures meanwhile: a hundred at once would all add up the queue
                self._progress[kind] = time.monotonic(), figures
            plain = items.c.kind == kind, items.c.gold.is_(None), items.c.out.is_(False)
            still = select(func.coalesce(func.sum(items.c.overlap - items.c.taken), 0)).where(*plain)
            hands = select(func.count()).select_from(assignments.join(items))
            with self._store.transaction(writes=False) as connection:
                wanted = int(connection.execute(still.where(items.c.taken < items.c.overlap)).scalar_one())
                held = int(connection.execute(hands.where(*plain, assignments.c.state == "leased")).scalar_one())
                done = tallies.done_by_people(connection).get(kind, 0)
                of_wanted = tallies.done_by_people(connection, plain=True).get(kind, 0)
            figures = done, of_wanted + held + wanted
            self._progress[kind] = time.monotonic(), figures
        return figures[0], max(figures)

    def mine(self, person: Account, limit: int = 100) -> list[PastWork]:
        """What this person did last, newest first. Their own work alone."""
        found: list[PastWork] = []
        with self._store.transaction(writes=False) as connection:
            for kind in ("compare", "rank", "thumb", "step", "write", "edit"):
                rows = connection.execute(work.done_by(kind, person.annotator_id, limit)).mappings()
                found += [
                    PastWork(row["created"], kind, _last_message(row["messages"]), _said(dict(row))) for row in rows
                ]
        return sorted(found, key=lambda done: done.at, reverse=True)[:limit]

    def _version(self) -> str | None:
        guideline = self.guideline()
        return guideline.version if guideline else None


def _is_new(connection: Connection, kind: WorkKind, token: str) -> bool:
    """Whether work with this token was not handed in before: a page sends it again when no answer came."""
    table = WORK_TABLES[kind].table
    return connection.execute(select(table.c.id).where(table.c.token == token)).first() is None


def _with_sheet(connection: Connection, assignment: Assignment) -> Screen:
    found = screen(assignment)
    if assignment.kind != "step":
        return found
    cut = steps.sheet(connection, assignment.item_id, assignment.prompt, assignment.shown[0])
    return replace(found, sheet=cut, said=steps.taken_back(connection, assignment.id))


def screen(assignment: Assignment) -> Screen:
    """What may be sent of an assignment."""
    return Screen(assignment.handle, assignment.kind, assignment.prompt.messages, assignment.shown)


STRENGTHS: Mapping[int, str] = {1: "slightly better", 2: "better", 3: "much better"}
_PLAIN: Mapping[str, Callable[[Any], str]] = {
    "tie": lambda row: "tie",
    "both_bad": lambda row: "both bad",
    "left": lambda row: f"A {STRENGTHS.get(int(row['strength'] or 0), 'better')}",
    "right": lambda row: f"B {STRENGTHS.get(int(row['strength'] or 0), 'better')}",
}


def _said(row: Mapping[str, Any]) -> str:
    if "choice" in row:
        return _PLAIN[row["choice"]](row)
    if "tiers" in row:
        return f"{sum(len(tier) for tier in row['tiers'])} responses ranked"
    if "outcome" in row:
        return outcome_words(row)
    if "up" in row:
        return thumb_word(row["up"])
    return str(row["text"])


def _last_message(messages: Sequence[Mapping[str, str]]) -> str:
    return messages[-1]["content"] if messages else ""
