"""What people say of one reply under one principle, and how models' labels under a principle fare against people's
votes. Each function runs inside its caller's transaction."""

from __future__ import annotations

import random
import secrets
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from keel.recipe.constitution import Principle
from keel.stats import Proportion, proportion
from keel.store.constitutions import current
from keel.store.people_tables import principle_answers as answers
from keel.store.removals import in_use
from keel.store.standing import standing
from keel.store.tables import ai_labels, annotators, assignments, event, events, items, judgements, prompts, responses
from keel.types import Message, UserError

Answer = Literal["kept", "broken", "na", "unsure"]
DRAW = random.SystemRandom()
WINDOW = 200  # answers that are looked through for one that waits for a second


@dataclass(frozen=True, slots=True)
class Question:
    """All that a page is told. ``handle`` is drawn at random, so it tells nothing of the reply."""

    handle: str
    messages: tuple[Message, ...]
    reply: str
    principle: str


def next_question(
    connection: Connection, annotator_id: int, holding: Collection[str], now: datetime
) -> Question | None:
    """A reply and a principle of a published constitution, which this person has not answered or skipped; None when
    nothing is left. One that was shown and not answered comes again, unless ``holding`` has its handle. One that a
    single other person has answered comes before new ones."""
    texts = _asked_by(connection)
    waiting = (
        select(answers)
        .join(responses, responses.c.id == answers.c.response_id)
        .where(
            answers.c.annotator_id == annotator_id,
            answers.c.undone_at.is_(None),
            answers.c.answer.is_(None),
            answers.c.token.is_(None),
            answers.c.principle_hash.in_(list(texts)),
            answers.c.handle.not_in(list(holding)),
            in_use(responses.c.prompt_id, responses.c.id),
        )
    )
    row = connection.execute(waiting.order_by(answers.c.id).limit(1)).first()
    if row is not None:
        return _question(connection, row, texts[row.principle_hash])
    found = _begun(connection, annotator_id, texts) or _fresh(connection, annotator_id, texts)
    return None if found is None else _ask(connection, annotator_id, found[0], texts[found[1]], now)


def _asked_by(connection: Connection) -> dict[str, Principle]:
    """The principles that people are asked about, by their hashes."""
    return {p.hash: p for version in current(connection) for p in version.constitution.principles}


def _begun(connection: Connection, annotator_id: int, hashes: Collection[str]) -> tuple[int, str] | None:
    """A reply and a principle's hash that one other person alone has answered, so that a second answer can agree. It
    looks at ``WINDOW`` answers from the newest on, then at as many in a row from a random place."""
    last = connection.execute(select(func.max(answers.c.id))).scalar()
    if last is None:
        return None
    place = DRAW.randint(1, max(1, last - WINDOW + 1))
    newest = select(answers).order_by(answers.c.id.desc()).limit(WINDOW)
    anywhere = select(answers).where(answers.c.id >= place).order_by(answers.c.id).limit(WINDOW)
    for rows in (newest.subquery(), anywhere.subquery()):
        other = answers.alias()
        more = exists().where(
            other.c.response_id == rows.c.response_id,
            other.c.principle_hash == rows.c.principle_hash,
            other.c.undone_at.is_(None),
            other.c.id != rows.c.id,
            or_(other.c.answer.is_not(None), other.c.annotator_id == annotator_id),
        )
        query = select(rows.c.response_id, rows.c.principle_hash).join(responses, responses.c.id == rows.c.response_id)
        stands = rows.c.answer.is_not(None), rows.c.undone_at.is_(None), rows.c.annotator_id != annotator_id
        query = query.where(*stands, rows.c.principle_hash.in_(list(hashes)), ~more)
        found = connection.execute(query.where(in_use(responses.c.prompt_id, responses.c.id))).all()
        if found:
            chosen = DRAW.choice(found)
            return chosen.response_id, chosen.principle_hash
    return None


def _fresh(connection: Connection, annotator_id: int, hashes: Collection[str]) -> tuple[int, str] | None:
    """A reply and a principle's hash that this person had not: the first such reply from a random place on, and round
    to it. It passes over those alone which they had, or which are out of use."""
    last = connection.execute(select(func.max(responses.c.id))).scalar()
    if last is None:
        return None
    place = DRAW.randint(1, last)
    for hash in DRAW.sample(list(hashes), len(hashes)):
        had = exists().where(
            answers.c.annotator_id == annotator_id,
            answers.c.response_id == responses.c.id,
            answers.c.principle_hash == hash,
            answers.c.undone_at.is_(None),
        )
        query = select(responses.c.id).where(in_use(responses.c.prompt_id, responses.c.id), ~had)
        for part in (responses.c.id >= place, responses.c.id < place):
            id = connection.execute(query.where(part).order_by(responses.c.id).limit(1)).scalar()
            if id is not None:
                return id, hash
    return None


def answered(connection: Connection, annotator_id: int) -> int:
    """How many answers of this person stand."""
    mine = answers.c.annotator_id == annotator_id, answers.c.undone_at.is_(None), answers.c.answer.is_not(None)
    return connection.execute(select(func.count()).select_from(answers).where(*mine)).scalar_one()


def skip(connection: Connection, annotator_id: int, handle: str, token: str, now: datetime) -> None:
    """This person is not asked it again, unless they take that back. One that is answered, or skipped, stays so."""
    row = _find(connection, annotator_id, handle)
    stands = answers.c.undone_at.is_(None), answers.c.answer.is_(None), answers.c.token.is_(None)
    try:
        done = connection.execute(update(answers).where(answers.c.id == row.id, *stands).values(token=token))
    except IntegrityError as error:
        raise UserError(f"client token {token!r} was used for another answer; make a new one each time") from error
    if done.rowcount == 1:
        _log(connection, "skipped", row, None, {}, now)


def answer(connection: Connection, annotator_id: int, handle: str, said: Answer, token: str, now: datetime) -> int:
    """Keeps the answer and returns its number. One that is sent again with its token counts once."""
    row = _find(connection, annotator_id, handle)
    if row.token == token:
        return int(row.id)
    if row.answer is not None or row.undone_at is not None:
        raise UserError("this question is answered already; undo that answer to change it")
    open_ = answers.c.id == row.id, answers.c.answer.is_(None)
    try:
        done = connection.execute(update(answers).where(*open_).values(answer=said, token=token, created=now))
    except IntegrityError as error:
        raise UserError(f"client token {token!r} was used for another answer; make a new one each time") from error
    if done.rowcount != 1:
        raise UserError("this question is answered already; undo that answer to change it")
    _log(connection, "answered", row, None, {"answer": said}, now)
    return int(row.id)


def undo(connection: Connection, annotator_id: int, handle: str | None, now: datetime) -> Question | None:
    """Takes an answer back (by default this person's last), or the skip of ``handle``, and asks again; None when there
    is nothing. What was taken out of use since is passed over: nobody is shown it again."""
    mine = select(answers).join(responses, responses.c.id == answers.c.response_id)
    mine = mine.where(answers.c.annotator_id == annotator_id, answers.c.undone_at.is_(None))
    mine = mine.where(in_use(responses.c.prompt_id, responses.c.id))
    last = mine.where(answers.c.answer.is_not(None)).order_by(answers.c.created.desc(), answers.c.id.desc()).limit(1)
    done = mine.where(answers.c.handle == handle, answers.c.token.is_not(None))
    row = connection.execute(last if handle is None else done).first()
    if row is None:
        return None
    back: dict[str, Any] = {"token": None} if row.answer is None else {"undone_at": now}
    stands = answers.c.undone_at.is_(None), answers.c.token == row.token
    if connection.execute(update(answers).where(answers.c.id == row.id, *stands).values(back)).rowcount != 1:
        return None
    _log(connection, "undone", row, {"answer": row.answer}, None, now)
    texts = _asked_by(connection)
    if row.principle_hash not in texts:
        return None  # a newer version is asked about now
    return _ask(connection, annotator_id, row.response_id, texts[row.principle_hash], now)


def given(connection: Connection) -> list[dict[str, Any]]:
    """Every answer that stands, as rows of a file; with ``out`` where its reply or prompt was taken out of use."""
    used = in_use(responses.c.prompt_id, responses.c.id).label("used")
    query = select(answers, annotators.c.name, responses.c.text, responses.c.model, prompts.c.messages, used)
    query = query.join(annotators, annotators.c.id == answers.c.annotator_id)
    query = query.join(responses, responses.c.id == answers.c.response_id).join(prompts)
    query = query.where(answers.c.answer.is_not(None), answers.c.undone_at.is_(None)).order_by(answers.c.id)
    return [
        {
            "id": row.token,
            "principle": row.principle_id,
            "principle_hash": row.principle_hash,
            "answer": row.answer,
            "prompt": row.messages,
            "completion": [{"role": "assistant", "content": row.text}],
            "model": row.model,
            "annotator": row.name,
            "out": not row.used,
            "created": row.created.isoformat(),
        }
        for row in connection.execute(query)
    ]


@dataclass(frozen=True, slots=True)
class Judged:
    """Of one judge's labels under one version of one principle: how often people who voted on the same pair agree, and
    how often the label turns with the order. None where there is nothing to count. ``labels``: how many there are."""

    judge: str
    labels: int
    agreement: Proportion | None
    flips: Proportion | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one version of one principle. ``judged``: by each judge that labelled under it, by name: one may be good where
    another is not. ``answers``: people's, by answer."""

    judged: tuple[Judged, ...]
    answers: dict[str, int]


def figures(connection: Connection, principles: Sequence[Principle]) -> dict[str, Figures]:
    """By principle's hash. A label without a preference and a vote without one are left out of the agreement, whose
    interval counts the votes on one pair together."""
    hashes = [p.hash for p in principles]
    votes: dict[str, list[int]] = defaultdict(list)
    query = standing(judgements, judgements.c.choice, assignments.c.shown, items.c.key)
    people = query.where(annotators.c.kind == "person", items.c.kind == "compare", items.c.gold.is_(None))
    for row in connection.execute(people.where(items.c.out.is_(False))):
        if row.choice in ("left", "right"):
            votes[row.key].append(row.shown[row.choice == "right"])
    agree: dict[tuple[str, str], list[tuple[bool, str]]] = defaultdict(list)
    flips: dict[tuple[str, str], list[tuple[bool, str]]] = defaultdict(list)
    made: dict[tuple[str, str], int] = defaultdict(int)
    labels = standing(judgements, ai_labels, assignments.c.shown, items.c.key, annotators.c.name.label("judge"))
    labels = labels.join(ai_labels, ai_labels.c.judgement_id == judgements.c.id)
    for row in connection.execute(labels.where(ai_labels.c.principle_hash.in_(hashes), items.c.out.is_(False))):
        place = row.principle_hash, row.judge
        made[place] += 1
        said = [p for p in (row.p_left_first, row.p_left_second) if p is not None]
        if len(said) == 2:
            flips[place].append(((said[0] - 0.5) * (said[1] - 0.5) < 0, row.key))
        mean = sum(said) / len(said) if said else 0.5
        if mean != 0.5:
            agree[place] += [(vote == row.shown[mean < 0.5], row.key) for vote in votes[row.key]]
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    stands = answers.c.answer.is_not(None), answers.c.undone_at.is_(None), answers.c.principle_hash.in_(hashes)
    for row in connection.execute(select(answers).where(*stands)):
        counts[row.principle_hash][row.answer] += 1
    judged: dict[str, list[Judged]] = defaultdict(list)
    for hash, judge in sorted(made):
        place = hash, judge
        judged[hash].append(Judged(judge, made[place], _share(agree[place]), _share(flips[place])))
    return {hash: Figures(tuple(judged[hash]), dict(counts[hash])) for hash in hashes}


def _share(found: Sequence[tuple[bool, str]]) -> Proportion | None:
    return proportion([hit for hit, _ in found], [group for _, group in found]) if found else None


def _ask(connection: Connection, annotator_id: int, response_id: int, principle: Principle, now: datetime) -> Question:
    row: dict[str, Any] = {
        "handle": secrets.token_urlsafe(16),
        "principle_id": principle.id,
        "principle_hash": principle.hash,
    }
    row |= {"response_id": response_id, "annotator_id": annotator_id, "created": now}
    try:
        with connection.begin_nested():
            connection.execute(insert(answers), row)
    except IntegrityError:  # another window of this person got it at this very moment
        pass
    mine = answers.c.annotator_id == annotator_id, answers.c.response_id == response_id
    query = select(answers).where(*mine, answers.c.principle_hash == principle.hash, answers.c.undone_at.is_(None))
    return _question(connection, connection.execute(query).one(), principle)


def _question(connection: Connection, row: Row[Any], principle: Principle) -> Question:
    query = select(responses.c.text, prompts.c.messages).join(prompts).where(responses.c.id == row.response_id)
    shown = connection.execute(query).one()
    messages = tuple(Message(one["role"], one["content"]) for one in shown.messages)
    return Question(row.handle, messages, shown.text, principle.text)


def _find(connection: Connection, annotator_id: int, handle: str) -> Row[Any]:
    query = select(answers).where(answers.c.handle == handle, answers.c.annotator_id == annotator_id)
    row = connection.execute(query).first()
    if row is None:
        raise UserError("this question is not yours; load the page again")
    return row


def _log(connection: Connection, what: str, row: Row[Any], old: Any, new: Any, now: datetime) -> None:
    actor = connection.execute(select(annotators.c.name).where(annotators.c.id == row.annotator_id)).scalar_one()
    about = {"principle": row.principle_id, "principle_hash": row.principle_hash, "response": row.response_id}
    told = None if new is None else new | about
    connection.execute(insert(events), event(now, actor, what, "principle answer", row.id, old, told))
