"""Argilla's files -> judgements, and votes -> a data set that Argilla takes (``Dataset.from_disk``).

Read are: version 2's ``to_json``, ``to_list``, ``to_disk`` (nested) and ``to_datasets`` (flat), version 1's records and
``format_as("datasets")``, and what the server's own API answers. What Argilla 2.8's client leaves out of its files is
not made up here:

- ranks. It writes a ranking as the question's options in the order in which the server has them, which is the
  question's and not the annotator's (argilla issue 5712). So such a list is no ranking.
- in the nested form, whether an answer was submitted, is a draft, or was discarded.
- dates.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from keel.store.foreign import (
    Ask,
    ForeignError,
    Names,
    Row,
    Said,
    Taken,
    bare,
    choice_of,
    field_of,
    is_reason,
    judgements,
    moment,
    prompt_name,
    ranks_of,
    rating,
    two_responses,
)
from keel.store.handover import FIELDS, LABELS, Handover, Pair, as_messages, aspects, handover
from keel.store.records import Edit, Judgement, Ranking
from keel.store.row_files import write_whole
from keel.store.rows import messages_json
from keel.types import UserError

COMPARISON = "preference"  # which of several questions compares, where nobody says it
OF_RECORD = ("id", "status", "_server_id", "external_id", "metadata", "vectors", "score", "inserted_at", "updated_at")
NO_STATUS = (
    "answers without a status are taken, drafts and discarded ones among them: only to_datasets and "
    "to_list(flatten=True) say which are submitted"
)
NO_RANKS = (
    "a ranking without ranks, as Argilla 2's files have it: the order of its list is the question's, not the "
    "annotator's; import what the server answers to GET /api/v1/datasets/ID/records?include=responses (its items)"
)


def is_row(row: Row) -> bool:
    responses = row.get("responses")
    if isinstance(row.get("fields"), Mapping) and isinstance(responses, Mapping | list):
        return True
    if "_server_id" in row or any(name.endswith((".responses", "-suggestion-metadata")) for name in row):
        return True  # also where nobody has answered this record
    return any(_is_flat(value) for value in row.values())


def question(rows: Sequence[Row], names: Names) -> str | None:
    """The question that compares, of all that are answered in a file; None where nothing is."""
    asked = list(dict.fromkeys(question for row in rows for by in _answers(row).values() for question in by.values))
    if names.question is not None:
        if asked and names.question not in asked:
            raise ForeignError(f"no answer to {names.question!r}; the questions are {', '.join(asked)}")
        return names.question
    if len(asked) > 1 and COMPARISON not in asked:
        raise ForeignError(f"it answers {', '.join(asked)}; say which is the comparison with --question NAME")
    return COMPARISON if COMPARISON in asked else next(iter(asked), None)


def read(record: Row, names: Names, ask: Ask, now: datetime) -> Taken:
    """The answers to the question ``names.question``: a label (of two responses), or a ranking with ranks (of any
    number; each pair of them is a judgement). A text that says why and ratings of the two responses come along."""
    answers = _answers(record)
    if not answers:
        return Taken(left=["nobody has answered it"])
    nested = record.get("fields")
    metadata = record.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) and metadata else metadata
    beside = metadata if isinstance(metadata, Mapping) else record
    fields = nested if isinstance(nested, Mapping) else _flat_fields(record, names)
    asked = prompt_name(fields, names)
    prompt = ask(fields[asked])
    key = record.get("external_id") or record.get("id") or prompt.id
    taken = Taken(left=["a model's suggestion"] * _suggestions(record))
    for answer in answers.values():
        if answer.status in ("draft", "discarded", "pending"):
            taken.left.append(f"a {answer.status} answer" if answer.status != "pending" else "a pending answer")
            continue
        found = _said(answer, f"argilla/{key}/{names.question}/{answer.key}", fields, asked, names, taken)
        if found is None:
            continue
        if answer.status is None:
            taken.notes.append(NO_STATUS)
        more = judgements(fields, beside, prompt, found, now)
        taken.votes += more.votes
        taken.left += more.left
    return taken


def _said(answer: _Answer, token: str, fields: Row, asked: str, names: Names, taken: Taken) -> Said | None:
    """One person's answers to the questions of one record."""
    value = answer.values.get(names.question or "")
    if value is None or value == []:
        taken.left.append(f"an answer to other questions than {names.question}")
        return None
    if isinstance(value, Mapping):  # how `datasets` gives a list of objects back
        value = [{"value": v, "rank": r} for v, r in zip(value.get("value", []), value.get("rank", []), strict=True)]
    said = Said(token, answer.user, {}, created=answer.created)
    if isinstance(value, list):
        if not all(isinstance(one, Mapping) and one.get("rank") is not None for one in value):
            taken.left.append(NO_RANKS)
            return None
        said.ranks = {field_of(one["value"], fields): int(one["rank"]) for one in value}
        if len(said.ranks) < 2:
            raise ForeignError("the ranking has fewer than two responses")
    else:
        shown = two_responses(fields, names)
        choice = choice_of(value, shown)
        said.ranks, said.both_bad = ranks_of(choice, shown), choice == "both_bad"
    for name, other in answer.values.items():
        if name == names.question or other is None:
            continue
        about = next((one for one in said.ranks if one in name), "")
        rated = rating(name, about, other) if about and len(said.ranks) == 2 else None
        if rated is not None:
            said.ratings.setdefault(about, {})[rated[0]] = rated[1]
        elif name == "strength" and other in (1, 2, 3):
            said.strength = int(other)
        elif isinstance(other, str) and is_reason(name) and said.reason is None:
            said.reason = other
        else:
            taken.left.append(f"an answer to {name}, which is no part of a comparison")
    return said


# ----------------------------------------------------------------------------------------------- the files' shapes


@dataclass(slots=True)
class _Answer:
    """One person's answers to one record. ``status`` is None where the file does not say it; ``key`` tells apart those
    who are not named."""

    key: str
    user: str
    status: Any
    created: datetime | None
    values: dict[str, Any] = field(default_factory=dict)


def _answers(record: Row) -> dict[str, _Answer]:
    """By person, from whichever of Argilla's shapes this is; empty where nobody has answered."""
    people: dict[str, _Answer] = {}

    def add(user: Any, place: int, status: Any, question: str, value: Any, created: Any = None) -> None:
        name = "" if user is None else str(user)
        key = name or (f"#{place}" if place else "")
        answer = people.setdefault(key, _Answer(key, name, status, moment(created, "inserted_at")))
        answer.values[question] = value

    responses = record.get("responses")
    if isinstance(responses, Mapping):  # version 2, nested
        for question, given in responses.items():
            for place, a in enumerate(given or []):
                add(a.get("user_id"), place, a.get("status"), question, a.get("value"))
    elif isinstance(responses, list) and "fields" in record:  # version 1, nested; the server's answers
        for place, response in enumerate(responses):
            for question, value in (response.get("values") or {}).items():
                said = value.get("value") if isinstance(value, Mapping) else value
                created = response.get("inserted_at")
                add(response.get("user_id"), place, response.get("status"), question, said, created)
    else:
        for name, given in record.items():
            if name.endswith(".responses") and given is not None:  # version 2, flat
                values = _list(given, name)
                users = _list(record.get(f"{name}.users"), name) or [None] * len(values)
                states = _list(record.get(f"{name}.status"), name) or [None] * len(values)
                for place, (user, status, value) in enumerate(zip(users, states, values, strict=True)):
                    add(user, place, status, name.removesuffix(".responses"), value)
            elif _is_flat(given):  # version 1, flat
                for place, a in enumerate(given):
                    add(a.get("user_id"), place, a.get("status"), name, a.get("value"))
    return people


def _is_flat(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(a, Mapping) and "user_id" in a for a in given)


def _suggestions(record: Row) -> int:
    nested = record.get("suggestions")
    if isinstance(nested, Mapping | list):
        return len(nested)
    return sum(name.endswith((".suggestion", "-suggestion")) and value is not None for name, value in record.items())


def _list(given: Any, name: str) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise ForeignError(f"{name} is {str(given)[:40]!r}; expected a list: save the data set as JSON or Parquet")
    return given


def _flat_fields(record: Row, names: Names) -> Row:
    """The columns that may be the record's fields: texts, and conversations."""
    named = {names.prompt, *names.responses}
    return {
        name: value
        for name, value in record.items()
        if name in named
        or (name not in OF_RECORD and "." not in name and not name.endswith("-suggestion") and _is_field(value))
    }


def _is_field(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "role" in one for one in value)
    )


# ------------------------------------------------------------------------------------------------------------- out

_NAME = re.compile(r"(?=.*[a-z0-9])[a-z0-9_-]+")  # what Argilla calls a question


def write(given: Sequence[Judgement | Ranking | Edit], path: Path) -> Handover:
    """Write a folder as ``Dataset.to_disk`` does, which ``Dataset.from_disk`` reads, a record a pair. Argilla knows
    people by ids: ``.argilla/users.json`` has the id that stands for each name, and users must be made with these
    before the data set is. UserError where ``path`` is no new folder."""
    if path.suffix:
        raise UserError(f"{path}: Argilla's form is a folder (settings and records); give a name without an ending")
    out = handover(given)
    people: dict[str, str] = {}
    rated = [name for name in aspects(out.pairs) if _NAME.fullmatch(name)]
    records = [_record(pair, people, rated, as_messages(out.pairs), out) for pair in out.pairs]
    files = {
        "records.json": records,
        ".argilla/settings.json": _settings(as_messages(out.pairs), rated),
        ".argilla/dataset.json": {"name": bare(path.name) or "votes", "status": "draft"},
        ".argilla/users.json": [{"id": id, "username": name} for name, id in people.items()],
    }

    def save(folder: Path) -> None:
        (folder / ".argilla").mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    write_whole(path, save)
    return out


def _record(pair: Pair, people: dict[str, str], rated: Sequence[str], messages: bool, out: Handover) -> dict[str, Any]:
    responses: dict[str, list[dict[str, Any]]] = {}
    answered: set[str] = set()
    for said in pair.answers:
        if said.annotator in answered:
            out.left["second answers of one person to one pair"] += 1
            continue
        answered.add(said.annotator)
        out.left["dates"] += 1
        out.left["times taken"] += said.seconds is not None
        values: dict[str, Any] = {COMPARISON: said.label, "strength": said.strength, "reason": said.reason}
        for name, given in said.ratings.items():
            values |= {f"{name}_{aspect}": value for aspect, value in given.items() if aspect in rated}
            out.left["ratings on aspects whose names Argilla does not take"] += len(given.keys() - set(rated))
        user = people.setdefault(said.annotator, _user_id(said.annotator))
        for name, value in values.items():
            if value is not None:
                answer = {"value": value, "user_id": user, "status": "submitted"}
                responses.setdefault(name, []).append(answer)
    fields = {"prompt": messages_json(pair.prompt) if messages else pair.prompt.messages[0].content}
    metadata = {"prompt_id": pair.prompt.id}
    for name, response in zip(FIELDS, pair.responses, strict=True):
        fields[name] = response.text
        metadata |= {f"{name}_model": response.model} if response.model else {}
    return {
        "id": pair.id,
        "fields": fields,
        "metadata": metadata,
        "suggestions": {},
        "responses": responses,
        "vectors": {},
    }


def _user_id(name: str) -> str:
    """The name, where it is an id already (who came from Argilla is called so); else an id that follows from it."""
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"keel/annotator/{name}"))


def _settings(messages: bool, rated: Sequence[str]) -> dict[str, Any]:
    """The data set's fields and questions. Models' names are metadata that annotators do not see."""

    def named(name: str, title: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"name": name, "title": title, "settings": settings, **more}

    chat: dict[str, Any] = {"type": "chat", "use_markdown": True}
    text: dict[str, Any] = {"type": "text", "use_markdown": True}
    options = [{"value": label, "text": label.replace("_", " ")} for label in LABELS]
    label = {"type": "label_selection", "options": options, "visible_options": len(options)}
    reasons = {"type": "text", "use_markdown": False}

    def values(most: int) -> dict[str, Any]:
        return {"type": "rating", "options": [{"value": value} for value in range(1, most + 1)]}

    questions = [
        named(COMPARISON, "Which response is better?", label, required=True),
        named("strength", "How much better? 1 slightly, 3 much", values(3), required=False),
        named("reason", "Why?", reasons, required=False),
        *(named(f"{f}_{a}", f"{f.replace('_', ' ')}: {a}", values(5), required=False) for a in rated for f in FIELDS),
    ]
    hidden: dict[str, Any] = {"visible_for_annotators": False}
    terms = {"type": "terms", "values": None, **hidden}
    return {
        "guidelines": None,
        "questions": questions,
        "fields": [
            named("prompt", "prompt", chat if messages else text, required=True),
            *(named(name, name.replace("_", " "), text, required=True) for name in FIELDS),
        ],
        "vectors": [],
        "metadata": [named(f"{name}_model", f"{name}_model", terms, **hidden) for name in FIELDS],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }
