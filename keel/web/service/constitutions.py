"""Constitutions as the pages have them: read, drafted, published; questions about one principle; why a model said what
it said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from keel.recipe.constitution import Constitution
from keel.store import Store, ai_labels, constitutions, principles
from keel.store.ai_labels import AiLabel
from keel.store.constitutions import Change, Version
from keel.store.people import Account
from keel.store.principles import Answer, Figures, Question
from keel.store.tables import annotators, assignments, items, judgements
from keel.types import UserError

Used = Callable[[], Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Shown:
    """One constitution: versions newest first, each with what it changed."""

    name: str
    versions: Sequence[tuple[Version, Sequence[Change]]]
    draft: Version | None
    draft_changes: Sequence[Change]


@dataclass(frozen=True, slots=True)
class Why:
    annotator: str
    choice: str
    labels: Sequence[tuple[AiLabel, int | None]]  # with the version here that has this very hash


class Constitutions:
    """``used``: of the run's critique stages, the hash of each principle that they drew from, and their summary."""

    def __init__(self, store: Store, used: Used) -> None:
        self._store, self._used = store, used

    # ------------------------------------------------------------------------------------------------- versions

    def all(self) -> list[Shown]:
        with self._store.transaction(writes=False) as c:
            return [
                self._shown(constitutions.versions(c, name), constitutions.draft(c, name))
                for name in constitutions.names(c)
            ]

    @staticmethod
    def _shown(versions: Sequence[Version], draft: Version | None) -> Shown:
        before: list[Version | None] = [*versions[1:], None]
        told = [
            (one, constitutions.changes(old.constitution, one.constitution) if old else [])
            for one, old in zip(versions, before, strict=False)
        ]
        newest = versions[0] if versions else None
        drafted = constitutions.changes(newest.constitution, draft.constitution) if draft and newest else []
        name = (draft or versions[0]).name
        return Shown(name, told, draft, drafted)

    def file(self, name: str, number: int) -> str:
        with self._store.transaction(writes=False) as c:
            return constitutions.as_file(constitutions.published(c, name, number).constitution)

    def publish_file(self, read: Constitution, person: Account) -> int:
        with self._store.transaction(writes=True) as c:
            return constitutions.publish_file(c, read, person.annotator_id, self._store.now)

    def make_draft(self, name: str, person: Account) -> None:
        with self._store.transaction(writes=True) as c:
            constitutions.make_draft(c, name, person.annotator_id, self._store.now)

    def change(
        self, name: str, id: str, values: Mapping[str, Any] | None, seen: str, person: Account, added: bool = False
    ) -> None:
        with self._store.transaction(writes=True) as c:
            constitutions.change(c, name, id, values, seen, person.annotator_id, self._store.now, added)

    def drop_draft(self, name: str, person: Account) -> None:
        with self._store.transaction(writes=True) as c:
            constitutions.drop_draft(c, name, person.annotator_id, self._store.now)

    def publish(self, name: str, seen: str, person: Account) -> int:
        with self._store.transaction(writes=True) as c:
            return constitutions.publish(c, name, seen, person.annotator_id, self._store.now)

    # -------------------------------------------------------------------------------------------------- figures

    def figures(self) -> dict[str, Figures]:
        """By principle's hash, of the newest versions."""
        with self._store.transaction(writes=False) as c:
            newest = constitutions.current(c)
            return principles.figures(c, [p for one in newest for p in one.constitution.principles])

    def used(self) -> dict[str, tuple[int, int]]:
        """Hash of a principle -> how often it was drawn, and how many revisions changed the reply: whatever else stood
        in the constitution, and whatever that was called."""
        found: dict[str, tuple[int, int]] = {}
        for hashes, summary in self._used():
            for id, drawn in summary["drawn"].items():
                before = found.get(hashes[id], (0, 0))
                found[hashes[id]] = before[0] + drawn, before[1] + summary["changed"].get(id, 0)
        return found

    # ------------------------------------------------------------------------------------------------ questions

    def next(self, person: Account, holding: Collection[str]) -> tuple[Question | None, int]:
        """Also how many this person has answered."""
        with self._store.transaction(writes=True) as c:
            question = principles.next_question(c, person.annotator_id, holding, self._store.now)
            return question, principles.answered(c, person.annotator_id)

    def answer(self, person: Account, handle: str, said: Answer, token: str) -> None:
        with self._store.transaction(writes=True) as c:
            principles.answer(c, person.annotator_id, handle, said, token, self._store.now)

    def skip(self, person: Account, handle: str, token: str) -> None:
        with self._store.transaction(writes=True) as c:
            principles.skip(c, person.annotator_id, handle, token, self._store.now)

    def undo(self, person: Account, handle: str | None) -> tuple[Question | None, int]:
        """Also how many this person has answered."""
        with self._store.transaction(writes=True) as c:
            question = principles.undo(c, person.annotator_id, handle, self._store.now)
            return question, principles.answered(c, person.annotator_id)

    # ------------------------------------------------------------------------------------------------------ why

    def why(self, token: str, person: Account) -> Why:
        """What a model was asked for its vote. UserError for one who has the same pair before them and has not voted:
        it would tell them the model's word."""
        with self._store.transaction(writes=False) as c:
            votes = select(judgements.c.choice, annotators.c.name, items.c.key).select_from(judgements)
            votes = votes.join(assignments, assignments.c.id == judgements.c.assignment_id)
            votes = votes.join(annotators, annotators.c.id == assignments.c.annotator_id)
            votes = votes.join(items, items.c.id == assignments.c.item_id)
            vote = c.execute(votes.where(judgements.c.token == token, annotators.c.kind == "model")).first()
            labels = ai_labels.of(c, [token]).get(token, []) if vote else []
            if vote is None or not labels:
                raise UserError("nothing is kept of why this was said: it is no model's vote under a principle")
            mine = select(assignments.c.id).join(items, items.c.id == assignments.c.item_id)
            mine = mine.where(assignments.c.annotator_id == person.annotator_id, assignments.c.state == "leased")
            if c.execute(mine.where(items.c.key == vote.key)).first() is not None:
                raise UserError("this pair waits for your own vote; look at the model's after that")
            numbers = {
                v.constitution.hash: v.number for n in constitutions.names(c) for v in constitutions.versions(c, n)
            }
            return Why(vote.name, vote.choice, [(one, numbers.get(one.constitution_hash)) for one in labels])
