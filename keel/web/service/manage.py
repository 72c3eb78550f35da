"""What reviewers and admins do: look at queues and quality, have the last word, invite work and people, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from keel.recipe.declared import Voter
from keel.store import (
    Store,
    erase,
    gold,
    guidelines,
    overview,
    people,
    removals,
    review,
    steps,
    tallies,
    work,
)
from keel.store.guidelines import Guideline, parse_aspects
from keel.store.overview import Queue
from keel.store.paging import Page, Wanted
from keel.store.people import Account
from keel.store.records import WorkKind
from keel.store.removals import What
from keel.store.tallies import DayDone
from keel.store.trained_on import VoteCount, count_votes
from keel.types import UserError
from keel.web.service import log_words
from keel.web.service.exports import Export, export
from keel.web.service.kept_quality import WAIT_SECONDS, WHOSE, Kept, QualityKeeper, Whose
from keel.web.service.labelling import GOLD_EVERY
from keel.web.service.log_words import EVERYTHING, Entries
from keel.web.service.quality import Quality
from keel.web.service.start import FIRST_BATCH, first_pairs, open_groups
from keel.web.service.thumb_habits import ThumbHabits, thumb_habits


@dataclass(frozen=True, slots=True)
class Overview:
    queues: Page[Queue]
    open: int  # judgements that are wanted, of all queues
    held: int
    days: list[DayDone]
    flags: int
    prompts: int
    responses: int
    done: dict[str, int]  # by people, for each kind of work
    annotators: int  # people who did any


FIRST = Wanted(size=50)


class Manage:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._quality = QualityKeeper(store)

    def overview(self) -> Overview:
        with self._store.transaction(writes=False) as connection:
            figures, queues = overview.prompt_figures(connection), overview.queues(connection)
            return Overview(
                queues=FIRST.within(queues),
                open=sum(queue.open for queue in queues),
                held=sum(queue.held for queue in queues),
                days=tallies.last_days(connection, 14),
                flags=overview.count_flags(connection),
                prompts=figures["prompts"],
                responses=figures["responses"],
                done={"compare": 0} | tallies.done_by_people(connection),
                annotators=tallies.people_at_work(connection),
            )

    def quality(self, who: Whose) -> Quality:
        """As it is now."""
        kept = self.quality_kept(who, wait=600)
        if kept is None:
            raise UserError("the figures could not be worked out; the server's log says why")
        return kept.quality

    def quality_kept(self, who: Whose, wait: float = WAIT_SECONDS) -> Kept | None:
        """What is kept of it; None when there is nothing yet (`QualityKeeper.found`)."""
        return self._quality.found(who, wait)

    def thumbs(self, who: Whose) -> list[ThumbHabits]:
        with self._store.transaction(writes=False) as connection:
            return thumb_habits(overview.thumb_votes(connection, WHOSE[who]))

    # ---------------------------------------------------------------------------------------------- queue, gold items

    def queues(self, wanted: Wanted | None = None) -> Page[Queue]:
        """All of them, or one page."""
        with self._store.transaction(writes=False) as connection:
            found = overview.queues(connection)
        wanted = wanted or Wanted(size=len(found))
        return wanted.within(queue for queue in found if wanted.find.lower() in queue.batch.lower())

    def browse(
        self, kind: WorkKind, batch: str | None, gold: bool, number: int, size: int = 20, find: str = ""
    ) -> Page[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            found = overview.browse(connection, kind, batch, gold, Wanted(find, number, size))
            return Page(steps.cut_up(connection, found), found.wanted, found.more) if kind == "step" else found

    def set_gold(self, item_id: int, answer: str | None, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            gold.set_gold(connection, item_id, answer, actor, self._store.now)

    def gold_every(self) -> int:
        with self._store.transaction(writes=False) as connection:
            return int(people.setting(connection, "gold_every", GOLD_EVERY))

    def set_gold_every(self, every: int, actor: str) -> None:
        if not 0 <= every <= 1000:
            raise UserError(f"one gold item in {every}: give 0 (none) to 1000")
        with self._store.transaction(writes=True) as connection:
            people.set_setting(connection, "gold_every", every, actor, self._store.now)

    def set_overlap(self, batch: str, kind: str, overlap: int, actor: str) -> int:
        with self._store.transaction(writes=True) as connection:
            return review.set_overlap(connection, batch, kind, overlap, actor, self._store.now)

    def put_first(self, batch: str, kind: str, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            review.put_first(connection, batch, kind, actor, self._store.now)

    # ------------------------------------------------------------------------------------------------ prompts, writing

    def newest_prompts(self, wanted: Wanted = FIRST) -> Page[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return overview.newest_prompts(connection, wanted)

    def ask_for_writing(self, prompts: int, overlap: int, actor: str) -> int:
        """Queue prompts that were not yet (those with the fewest responses first) for people to reply to; how many."""
        if not 1 <= prompts <= 10_000 or not 1 <= overlap <= 100:
            raise UserError("give 1 to 10,000 prompts and 1 to 100 people each")
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            ids = overview.prompts_with_fewest(connection, prompts, work.prompts_asked(connection, "write"))
            made = work.add_writing(connection, ids, overlap, "write", now)
            people.log(connection, now, actor, "asked for", "writing", len(made), None, {"overlap": overlap})
        return len(made)

    def ask_for(self, kind: Literal["compare", "rank", "thumb", "edit"], prompts: int, overlap: int, actor: str) -> int:
        """Queue responses that are there to be compared (a pair of each prompt that people have not had), ranked
        (prompts with four or more), given a thumb (all of each prompt) or edited (the first of each prompt), of prompts
        that were not yet; how many."""
        if not 1 <= prompts <= 10_000 or not 1 <= overlap <= 100:
            raise UserError("give 1 to 10,000 prompts and 1 to 100 people each")
        now = self._store.now
        with self._store.session() as session, session.transaction(writes=True) as connection:
            groups = open_groups(connection)
            asked = work.prompts_asked(connection, kind)
            fresh = [ids for prompt, ids in groups.items() if prompt not in asked]
            if kind == "compare":
                made = session.add_comparisons(first_pairs(connection, groups, prompts), overlap, FIRST_BATCH)
            elif kind == "rank":
                chosen = [ids[:9] for ids in fresh if len(ids) >= 4][:prompts]
                made = work.add_rankings(connection, chosen, overlap, "rank", now)
            elif kind == "thumb":
                made = work.add_thumbs(connection, [id for ids in fresh[:prompts] for id in ids], overlap, "thumb", now)
            else:
                made = work.add_edits(connection, [ids[0] for ids in fresh][:prompts], overlap, "edit", now)
            people.log(connection, now, actor, "asked for", kind, len(made), None, {"overlap": overlap})
        return len(made)

    # ------------------------------------------------------------------------------------------------------- training

    def votes(self, since: datetime | None) -> dict[Voter, VoteCount]:
        """How many judgements by people, and by models, training would take, and how many came after ``since``."""
        with self._store.transaction(writes=False) as connection:
            return {who: count_votes(connection, who, since) for who in ("people", "models")}

    def log_training(self, what: str, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            people.log(connection, self._store.now, actor, what, "training", "", None, None)

    # --------------------------------------------------------------------------------------------------- last words

    def disagreements(self) -> Page[dict[str, Any]]:
        return self.disagreements_counted()[0]

    def disagreements_counted(self, wanted: Wanted = FIRST) -> tuple[Page[dict[str, Any]], int]:
        """A page of them, and how many there are."""
        with self._store.transaction(writes=False) as connection:
            return overview.disagreements(connection, wanted)

    def settled(self) -> list[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return overview.settled_lately(connection)

    def adjudicate(self, item_id: int, choice: str | None, reason: str, person: Account) -> None:
        with self._store.transaction(writes=True) as connection:
            review.adjudicate(
                connection, item_id, person.annotator_id, choice, reason or None, person.name, self._store.now
            )

    def flags(self, wanted: Wanted = FIRST) -> Page[dict[str, Any]]:
        with self._store.transaction(writes=False) as connection:
            return overview.open_flags(connection, wanted)

    def resolve_flag(self, id: int, actor: str) -> None:
        with self._store.transaction(writes=True) as connection:
            review.resolve_flag(connection, id, actor, self._store.now)

    # ---------------------------------------------------------------------------------------------- out, and erased

    def out(self, wanted: Wanted = FIRST) -> Page[dict[str, Any]]:
        """What is taken out of use, the last first."""
        with self._store.transaction(writes=False) as connection:
            return removals.standing(connection, wanted)

    def take_out(self, what: What, id: str, reason: str, flag: int | None, person: Account) -> None:
        """``flag``: that which it answers, which is resolved by it."""
        now = self._store.now
        with self._store.transaction(writes=True) as connection:
            removals.take_out(connection, what, _key(what, id), reason, person.annotator_id, now)
            if flag is not None:
                review.resolve_flag(connection, flag, person.name, now)

    def put_back(self, removal_id: int, person: Account) -> None:
        with self._store.transaction(writes=True) as connection:
            removals.put_back(connection, removal_id, person.annotator_id, self._store.now)

    def erase(self, what: Literal["response", "prompt"], id: str, person: Account) -> None:
        """Overwrite the texts of a response or a prompt for good, with what was written about them."""
        now, key = self._store.now, _key(what, id)
        with self._store.transaction(writes=True) as connection:
            if what == "prompt":
                erase.erase_prompt(connection, str(key), person.annotator_id, person.name, now)
            else:
                erase.erase_response(connection, int(key), person.annotator_id, person.name, now)
        self._store.compact()

    # -------------------------------------------------------------------------------------------------- the guideline

    def guidelines(self) -> list[Guideline]:
        with self._store.transaction(writes=False) as connection:
            return guidelines.all_guidelines(connection)

    def add_guideline(self, text: str, aspects: str, actor: str) -> str:
        """A new version, which is in force from now on. ``aspects``: a line each, ``name: question``."""
        text = text.replace("\r\n", "\n").strip()
        if not text:
            raise UserError("the guideline is empty; write what annotators should go by")
        parsed = parse_aspects(aspects)
        with self._store.session() as session, session.transaction(writes=True) as connection:
            version = guidelines.next_version(connection)
            session.add_guideline(version, text, parsed)
            now = self._store.now
            people.log(connection, now, actor, "added", "guideline", version, None, {"aspects": parsed}, version)
        return version

    def events(self, wanted: Entries = EVERYTHING) -> list[dict[str, Any]]:
        """The log's newest entries of those wanted, each with its ``words``."""
        with self._store.transaction(writes=False) as connection:
            return log_words.entries(connection, wanted)

    # -------------------------------------------------------------------------------------------------------- export

    def export(self, what: Export, folder: Path, wanted: Callable[[], bool] = lambda: True) -> Path:
        """Write one export into ``folder``; its path."""
        return export(self._store, what, folder, wanted)


def _key(what: What, id: str) -> int | str:
    if what == "prompt":
        return id
    if not id.isdecimal() or len(id) > 9:
        raise UserError(f"there is no {what} {id}")
    return int(id)
