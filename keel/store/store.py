"""The store's public face."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType

from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection

from keel.recipe.declared import Voter
from keel.recipe.sections import SamplingConfig
from keel.store import exchange, given, hand_in, imports, ingest, overview, queue, work
from keel.store.engine import WAIT_SECONDS, compact, open_engine, parse_url
from keel.store.records import (
    AnnotatorKind,
    Assignment,
    Edit,
    Event,
    Judgement,
    NewVote,
    Progress,
    Ranking,
    Response,
    Unavailable,
    WorkKind,
)
from keel.store.rows import checked_json, prompt_record, response_record
from keel.store.tables import events, guidelines, prompts, responses
from keel.types import Completion, Demonstration, Preference, Prompt, UserError

# What the database says of a statement that is wrong. All else that it says is about itself, and passes.
_OURS = (IntegrityError, DataError, ProgrammingError, NotSupportedError)


def _now() -> datetime:
    return datetime.now(UTC)


class Store:
    """A feedback database: ``Store("runs/demo/feedback.db")`` or ``Store("postgresql://user@host/name")``.

    Opening builds an empty database and upgrades an older one; UserError for one that is not Keel's or is newer. Each
    method is one transaction. ``session()`` makes several calls one transaction::

        with store.session() as s:
            assignment = s.next_assignment(annotator)
            s.submit(assignment.id, NewVote("left", token="...", strength=2))

    A Store may be shared by threads; what ``session()`` gives belongs to one thread.

    ``seed`` decides which side a response is shown on to simulated annotators; ``lease`` is how long an annotator may
    hold an item before it can go to somebody else; ``clock`` gives the time (aware).
    """

    def __init__(
        self,
        location: str | Path,
        *,
        seed: int = 0,
        lease: timedelta = timedelta(minutes=30),
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._engine = open_engine(location)
        self._url = parse_url(location)
        self._seed, self._lease, self._clock = seed, lease, clock
        self._connection: Connection | None = None
        # SQLite has one writer at a time, and those that wait look again at intervals that grow; threads of one process
        # queue up here instead and go on the moment that the one before them is done.
        self._writer = threading.Lock() if self._engine.dialect.name == "sqlite" else None

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compact(self) -> None:
        """Rewrite a SQLite file without what was deleted or overwritten in it, which else stays readable in free pages
        and in the write-ahead log until it is written over. Somebody who is reading just now holds it up: it is then
        left to the next time. (PostgreSQL's own VACUUM does it there.)"""
        if self._engine.dialect.name == "sqlite":
            compact(self._engine)

    # ------------------------------------------------------------------------------------------- transactions

    @contextmanager
    def session(self) -> Iterator[Store]:
        """This store inside one transaction: all of what is done in it is kept, or, after an error, nothing."""
        if self._connection is not None:
            yield self
            return
        with self._begin(writes=True) as connection:
            bound = copy(self)
            bound._connection = connection
            yield bound

    @property
    def now(self) -> datetime:
        return self._clock()

    @property
    def lease(self) -> timedelta:
        return self._lease

    def unnamed(self, text: str) -> str:
        """``text`` without where the store is, for those whom that does not concern."""
        urls = {self._url.render_as_string(hide_password=hidden) for hidden in (True, False)}
        for address in sorted(urls | {str(self._url.database)} if self._writer is not None else urls, key=len)[::-1]:
            text = text.replace(address, "the store")
        return text

    @contextmanager
    def transaction(self, writes: bool) -> Iterator[Connection]:
        """A connection inside a transaction, for the functions of keel.store that this class has no method for."""
        with self._begin(writes) as connection:
            yield connection

    @contextmanager
    def moment(self) -> Iterator[Connection]:
        """A connection that reads, and sees the store as it was at one moment, however long it reads."""
        with self._begin(writes=False) as connection:
            if connection.dialect.name == "postgresql" and self._connection is None:  # SQLite does so by itself
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            yield connection

    @contextmanager
    def _turn(self, writes: bool) -> Iterator[None]:
        if not writes or self._writer is None:
            yield
            return
        mine = self._writer.acquire(timeout=WAIT_SECONDS)  # without it the database itself says that it is locked
        try:
            yield
        finally:
            if mine:
                self._writer.release()

    @contextmanager
    def _begin(self, writes: bool) -> Iterator[Connection]:
        """The session's transaction, or one of its own."""
        if self._connection is not None:
            yield self._connection
            return
        try:
            with (
                self._turn(writes),
                self._engine.connect().execution_options(keel_writes=writes) as connection,
                connection.begin(),
            ):
                yield connection
        except _OURS:
            raise
        except (DBAPIError, NoConnection) as error:  # locked for too long, disk full, server gone, pool empty
            reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            raise Unavailable(f"store {self._url}: {reason}; nothing of this step was kept, try it again") from error

    # --------------------------------------------------------------------------------------- what is judged

    def add_prompts(self, new: Iterable[Prompt]) -> None:
        """Add prompts. One that is there already is left as it is, but a ``kind`` or ``meta`` that is given replaces
        the old one. UserError when an id comes with other messages than before."""
        with self._begin(writes=True) as connection:
            ingest.add_prompts(connection, list(new), self._clock())

    def prompts(self) -> list[Prompt]:
        """All prompts, by id."""
        with self._begin(writes=False) as connection:
            return [prompt_record(row) for row in connection.execute(select(prompts).order_by(prompts.c.id))]

    def add_responses(
        self,
        prompt_id: str,
        completions: Sequence[Completion],
        model: str,
        sampling: SamplingConfig | None = None,
        fingerprint: str = "",
    ) -> list[int]:
        """Add replies to a prompt and return their ids, in order. ``model``: the checkpoint's path; ``fingerprint``: of
        its weights. The same text from the same model and settings is one response, with one id. NUL and half
        surrogate pairs, which databases can't hold, are stored as U+FFFD. UserError for a prompt that is not there."""
        settings = None if sampling is None else checked_json(sampling.model_dump(), "the sampling settings")
        new = [
            ingest.NewResponse(prompt_id, completion.text, completion.finished, model, fingerprint, settings)
            for completion in completions
        ]
        with self._begin(writes=True) as connection:
            return ingest.add_responses(connection, new, self._clock())

    def responses(self, prompt_id: str | None = None) -> list[Response]:
        """The responses, of one prompt or of all, in the order they were added."""
        query = select(responses).order_by(responses.c.id)
        if prompt_id is not None:
            query = query.where(responses.c.prompt_id == prompt_id)
        with self._begin(writes=False) as connection:
            return [response_record(row) for row in connection.execute(query)]

    def add_comparisons(self, pairs: Sequence[tuple[int, int]], overlap: int = 1, batch: str = "") -> list[int]:
        """Put pairs of response ids in the queue of ``batch`` and return the items' ids, in order. Each is wanted from
        ``overlap`` annotators. A pair that the batch has already, either way round, is the same item; its overlap
        rises to ``overlap`` when that is more. UserError when the two are not responses of one prompt."""
        if overlap < 1:
            raise UserError(f"overlap is {overlap}; each pair needs at least 1 judgement")
        with self._begin(writes=True) as connection:
            return ingest.add_items(connection, pairs, overlap, batch, self._clock())

    # ------------------------------------------------------------------------------------ who judges, and how

    def add_annotator(self, name: str, kind: AnnotatorKind = "person", role: str = "annotator") -> int:
        """The annotator's id; a name that is there already keeps its row. UserError when its kind differs."""
        with self._begin(writes=True) as connection:
            return ingest.add_annotators(connection, {name: kind}, role, self._clock())[name]

    def add_guideline(self, version: str, text: str = "", aspects: Sequence[Mapping[str, str]] | None = None) -> None:
        """Add a version of the guideline. Versions do not change: UserError when it is there with another text. An
        empty text only makes sure that the version exists. ``aspects``: what a response may be rated on, as
        ``{"name": ..., "question": ...}``."""
        with self._begin(writes=True) as connection:
            ingest.add_guideline(connection, version, text, self._clock(), aspects)

    def guideline(self, version: str) -> str | None:
        """The text of a version; None when there is no such version."""
        with self._begin(writes=False) as connection:
            query = select(guidelines.c.text).where(guidelines.c.version == version)
            return connection.execute(query).scalar_one_or_none()

    # ----------------------------------------------------------------------------------------------- the queue

    def next_assignment(
        self,
        annotator_id: int,
        batch: str | None = None,
        holding: Collection[str] = (),
        kind: WorkKind = "compare",
        seeded: bool = False,
    ) -> Assignment | None:
        """What this annotator does next (of one batch, or of any), gold items left out; None when there is nothing left
        for them. (The app's people get theirs by ``keel.store.blind``.)

        ``seeded``: the sides follow from the store's seed, for simulated annotators and models, whose work is to be the
        same each time. Whoever knows the seed knows these sides, so it is a UserError for any other kind of annotator:
        theirs are drawn.

        An assignment that the annotator holds already comes again, unless ``holding`` has its handle (a page that
        fetches ahead says what it has). Else the first item with a free slot that they have not judged is leased to
        them.
        Inside ``session()`` an item that another transaction is just taking is passed over: there None means that
        nothing is free now.
        """
        with self._begin(writes=True) as connection:
            if seeded:
                ingest.check_simulated(connection, annotator_id)
            return queue.next_assignment(
                connection,
                annotator_id,
                batch=batch,
                holding=holding,
                wait=self._connection is None,
                now=self._clock(),
                lease=self._lease,
                seed=self._seed if seeded else None,
                kind=kind,
            )

    def submit(self, assignment_id: int, vote: NewVote, annotator_id: int | None = None) -> int:
        """Count a vote and return the judgement's id. When this returns, it is on the disk.

        A vote whose token was counted before gives the same id. One whose lease has run out counts as long as nobody
        else was given the slot; after that LeaseLost. Other impossible votes (judged already, unknown guideline, ...)
        are UserErrors. ``annotator_id``: whose the assignment must be; by default anybody's.
        """
        with self._begin(writes=True) as connection:
            return hand_in.submit(connection, assignment_id, vote, annotator_id=annotator_id, now=self._clock())

    def undo(self, judgement_id: int) -> Assignment:
        """Take a judgement back; its assignment is leased to the annotator again. The judgement keeps its row and the
        log gains an event. UserError when it is unknown or was taken back before."""
        with self._begin(writes=True) as connection:
            return hand_in.undo(connection, judgement_id, now=self._clock(), lease=self._lease)

    def progress(self, batch: str | None = None, kind: WorkKind = "compare") -> Progress:
        """How far the queue of one batch is, or of all."""
        with self._begin(writes=False) as connection:
            return overview.progress(connection, batch, kind)

    # ------------------------------------------------------------------------------------------ what was said

    def judgements(self, batch: str | None = None) -> list[Judgement]:
        """Every raw vote that stands (not taken back), in the order they came, each with what a reviewer said of its
        item in the end, if one did."""
        with self._begin(writes=False) as connection:
            return list(given.judgements_given(connection, batch))

    def all_given(self, batch: str | None = None) -> list[exchange.Given]:
        """Every raw vote, then every ranking, then every edit that stands."""
        with self._begin(writes=False) as connection:
            return list(given.all_given(connection, batch))

    def preferences(self, batch: str | None = None, kinds: Collection[AnnotatorKind] | None = None) -> list[Preference]:
        """One training record for each raw vote, in the order they came, ties among them (``tie=True``); then the pairs
        of the rankings, and the edits over what was edited. Votes on gold items measure the annotator and are left out.
        Where a reviewer settled a disagreement each of its votes says so (``settled``); ``keel.store.settled.settle``
        puts that word in the place of the votes, as ``keel.feedback.aggregate`` does before anything is trained on.
        ``kinds``: of annotators of these kinds alone.
        """
        chosen = [one for one in self.all_given(batch) if kinds is None or one.annotator_kind in kinds]
        return [pair for one in chosen for pair in one.preferences()]

    def demonstrations(self, batch: str | None = None, who: Voter | None = None) -> list[Demonstration]:
        """What was written (by ``who``): each reply, and each edited reply, as a conversation."""
        with self._begin(writes=False) as connection:
            return work.demonstrations(connection, batch, who)

    def events(self) -> list[Event]:
        """The log, oldest first."""
        with self._begin(writes=False) as connection:
            return [Event(*row) for row in connection.execute(select(events).order_by(events.c.id))]

    # -------------------------------------------------------------------------------------- in and out

    def export_preferences(
        self, path: str | Path, batch: str | None = None, form: exchange.Form = "trl", plain: bool = False
    ) -> int:
        """Write every raw vote, ranking and edit to ``path`` (.jsonl, .parquet, or a folder for ``datasets``); returns
        how many rows that are. They have TRL's or OpenAI's form with all else that is known beside it, or, ``plain``,
        that form alone, without ties and gold items and with reviewers' words in the place of the votes that they
        settled; see keel/store/exchange.py."""
        with self.moment() as connection:
            settled = given.settled_pairs(connection, batch) if plain else None
            return exchange.write(given.all_given(connection, batch), Path(path), form, plain, settled)

    def import_preferences(
        self, records: Iterable[Preference | exchange.Given], annotator: str = "import", batch: str | None = None
    ) -> int:
        """Add votes that were given elsewhere and return how many were new; a vote is known by its id or token.

        ``records`` are preference pairs, or the judgements of an export (``keel.store.exchange.read``), of which
        nothing is lost. ``annotator`` names those of records that name nobody. An annotator who judged a pair more
        than once stands as NAME, NAME#2, ...: here one annotator judges an item once. ``batch``: where to put them;
        by default where they were, or ``import``.
        """
        with self._begin(writes=True) as connection:
            seen: Counter[str] = Counter()
            votes: list[Judgement] = []
            others: list[Ranking | Edit] = []
            for record in records:
                if isinstance(record, Ranking | Edit):
                    others.append(record)
                    continue
                if isinstance(record, Preference):
                    seen[record.id] += 1
                    record = exchange.from_preference(record, annotator, seen[record.id], self._seed, self._clock())
                votes.append(record)
            new = imports.add_judgements(connection, votes, batch, self._clock())
            return new + given.add_given(connection, others, batch, self._clock())
