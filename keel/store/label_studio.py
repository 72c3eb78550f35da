"""Label Studio's files -> judgements, and votes -> tasks that Label Studio imports.

Read are the JSON export (tasks with their annotations), JSON-MIN and CSV (a row an annotation). A Pairwise, Choices or
Ranker answer compares; Ratings of the two responses and a TextArea that asks why come along, with who and when and how
long. JSON-MIN and CSV leave skipped annotations out themselves, and say nothing of drafts and predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from keel.store.foreign import (
    Ask,
    ForeignError,
    Names,
    Row,
    Said,
    Taken,
    choice_of,
    duration,
    is_reason,
    judgements,
    moment,
    prompt_name,
    ranks_of,
    rating,
    two_responses,
)
from keel.store.handover import FIELDS, LABELS, Answer, Handover, Pair, as_messages, aspects, handover
from keel.store.records import Edit, Judgement, Ranking
from keel.store.row_files import write_whole
from keel.store.rows import messages_json
from keel.types import Prompt, UserError

COMPARES = ("pairwise", "ranker", "choices")  # types of results, the surest first
OF_ROW = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


def is_task(row: Row) -> bool:
    return isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations"), list)


def is_min(row: Row) -> bool:
    return {"annotation_id", "annotator", "lead_time"} <= row.keys()


def is_row(row: Row) -> bool:
    return is_task(row) or is_min(row)


def question(rows: Sequence[Row], names: Names) -> str | None:
    """The control that compares, of all that are answered in a file; None where none is."""
    if names.question is not None:
        return names.question
    if not all(is_task(row) for row in rows):
        return _min_question(rows)
    asked: dict[str, dict[str, None]] = {}  # names by type of result, in their order
    for row in rows:
        for annotation in row["annotations"]:
            for result in annotation.get("result") or []:
                asked.setdefault(str(result.get("type")), {})[str(result.get("from_name"))] = None
    found = next((list(asked[kind]) for kind in COMPARES if kind in asked), [])
    if len(found) > 1:
        raise ForeignError(f"it answers {', '.join(found)}; say which is the comparison with --question NAME")
    return found[0] if found else None


def _min_question(rows: Sequence[Row]) -> str | None:
    """In JSON-MIN and CSV a Pairwise or Ranker answer shows by its form. A choice is a plain text like the data: it is
    the one column whose every value names a side."""
    rows = [row for row in rows if row.get("annotation_id") not in (None, "")]
    columns = dict.fromkeys(name for row in rows for name in row if name not in OF_ROW)
    kinds = {name: {_result(name, row[name])["type"] for row in rows if name in row} for name in columns}
    found = [name for name in columns if kinds[name] & {"pairwise", "ranker"}]
    if not found:
        words = {name: {_word(row[name]) for row in rows if row.get(name) not in (None, "")} for name in columns}
        found = [name for name in columns if words[name] and words[name] <= {"left", "right", "tie", "both_bad"}]
    if len(found) > 1:
        raise ForeignError(f"{', '.join(found)} may be the comparison; say which is with --question NAME")
    if rows and not found:
        raise ForeignError(f"which of {', '.join(columns)} is the comparison is not clear; give --question NAME")
    return found[0] if found else None


def _word(value: Any) -> str:
    try:
        return choice_of(value, ("left", "right")) if isinstance(value, str) else ""
    except ForeignError:
        return ""


def read(row: Row, names: Names, ask: Ask, now: datetime) -> Taken:
    """A task with all its annotations, or a row of JSON-MIN or CSV, which is one annotation."""
    taken = Taken()
    if not is_task(row):
        row = _as_task(row, names)
        taken.notes.append("JSON-MIN and CSV have no drafts and skips, and tell no texts from answers; JSON does")
    prompt: Prompt | None = None
    data, beside = row["data"], row.get("meta") or {}
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            taken.left.append("a skipped annotation")
            continue
        results = annotation.get("result") or []
        answer = next((r for r in results if r.get("from_name") == names.question), None)
        if answer is None:
            taken.left.append("an annotation without a comparison" if results else "an empty annotation")
            continue
        prompt = prompt or ask(data[prompt_name(data, names)])
        said, fields = _compared(data, answer, names)
        id = annotation.get("id")
        said.token = f"label-studio/{answer.get('id')}" if id is None else f"label-studio/{row.get('id')}/{id}"
        kept = answer.get("meta") or {}  # of a vote that came from here
        said.annotator = str(kept.get("annotator") or _who(annotation.get("completed_by")))
        said.seconds = duration(annotation.get("lead_time"))
        said.created = moment(kept.get("created") or annotation.get("created_at"), "created_at")
        for result in results:
            if result is not answer:
                _beside(said, result, taken)
        if annotation.get("ground_truth"):
            taken.notes.append("annotations marked as ground truth are votes like others; make the pair a gold item")
        more = judgements(fields, {**data, **beside}, prompt, said, now)
        taken.votes += more.votes
        taken.left += more.left
    taken.left += ["a draft"] * len(row.get("drafts") or [])
    taken.left += ["a model's prediction"] * len(row.get("predictions") or [])
    taken.left += ["a comment"] * _count(row, "comment_count", "comments")
    if not row["annotations"]:
        taken.left.append("nobody has annotated it")
    return taken


def _compared(data: Row, answer: Row, names: Names) -> tuple[Said, Row]:
    """What a result says, and the fields whose order it is."""
    value = answer["value"]
    if answer.get("type") == "ranker":
        return _ranked(data, value["ranker"], answer)
    named = tuple(part.strip() for part in str(answer.get("to_name", "")).split(","))
    tagged = len(named) == 2 and all(name in data for name in named) and not names.responses
    left, right = named if tagged else two_responses(data, names)
    chosen = value.get("selected") or value.get("choices") or ""
    if isinstance(chosen, list):
        if len(chosen) != 1:
            raise ForeignError(f"{answer.get('from_name')} has {len(chosen)} choices, {chosen}; a comparison has one")
        chosen = chosen[0]
    choice = choice_of(chosen, (left, right))
    said = Said("", "", ranks_of(choice, (left, right)), both_bad=choice == "both_bad")
    return said, {left: data.get(left), right: data.get(right)}


def _ranked(data: Row, ranker: Row, answer: Row) -> tuple[Said, Row]:
    """A Ranker's order of a List's items. Where it sorts them into buckets, nothing says which bucket is better."""
    orders = {name: ids for name, ids in ranker.items() if name != "_"}
    if list(orders) != [answer.get("from_name")]:
        raise ForeignError(
            f"{answer.get('from_name')} sorts the responses into {', '.join(orders) or 'nothing'}, and buckets have no "
            "order; leave these tasks out, or rank without buckets"
        )
    (order,) = orders.values()
    lists = [value for value in data.values() if isinstance(value, list) and all(_is_item(one) for one in value)]
    items = {str(one["id"]): one for some in lists for one in some}
    if len(set(order)) != len(order) or not {str(id) for id in order} <= items.keys():
        raise ForeignError(f"the ranking names {', '.join(map(str, order))}, and the items are {', '.join(items)}")
    fields = {id: one.get("body") or one.get("html") or one.get("title") for id, one in items.items()}
    return Said("", "", {str(id): place for place, id in enumerate(order, start=1)}), fields


def _is_item(value: Any) -> bool:
    return isinstance(value, Mapping) and "id" in value


def _beside(said: Said, result: Row, taken: Taken) -> None:
    """What was said beside the comparison: why, how much better, ratings. The rest is left."""
    name, kind, value = str(result.get("from_name")), result.get("type"), result.get("value") or {}
    about = str(result.get("to_name"))
    if kind == "textarea" and is_reason(name) and said.reason is None:
        texts = value.get("text") or []
        said.reason = "\n".join(texts) if isinstance(texts, list) else str(texts)
        return
    if kind == "rating":
        if name == "strength" and value.get("rating") in (1, 2, 3):
            said.strength = value["rating"]
            return
        rated = rating(name, about, value.get("rating")) if about in said.ranks else None
        if rated is not None:
            said.ratings.setdefault(about, {})[rated[0]] = rated[1]
            return
    taken.left.append(f"an answer to {name}, which is no part of a comparison")


def _as_task(row: Row, names: Names) -> Row:
    """A row of JSON-MIN or CSV as a task with its one annotation. Of texts nothing says which are answers and which are
    data: the comparison is known, and a text whose name asks why is taken for the reason."""
    data: dict[str, Any] = {}
    results = []
    for name, value in row.items():
        result = _result(name, value)
        if name in OF_ROW or value in (None, ""):
            continue
        if name == names.question and result["type"] == "text":
            results.append(result | {"type": "choices", "value": {"choices": [value]}})
        elif result["type"] == "text" and isinstance(value, str) and is_reason(name) and name not in _named(names):
            results.append(result | {"type": "textarea", "value": {"text": [value]}})
        elif result["type"] == "text":
            data[name] = _plain(value)
        else:
            results.append(result)
    for result in results:  # nothing says what a rating is of but its name
        result["to_name"] = next((field for field in data if field in result["from_name"]), "")
    if row.get("annotation_id") in (None, ""):
        return {"data": data, "annotations": []}
    annotation = {"id": row["annotation_id"], "completed_by": row.get("annotator"), "result": results}
    annotation |= {name: row.get(name) for name in ("lead_time", "created_at")}
    return {"id": row.get("id"), "data": data, "annotations": [annotation]}


def _named(names: Names) -> tuple[str | None, ...]:
    return (names.prompt, *names.responses)


def _result(name: str, value: Any) -> dict[str, Any]:
    """A column of JSON-MIN as a result: its type by the form of its value; ``text`` is a plain one."""
    found = _plain(value)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    kinds = {"selected": "pairwise", "ranker": "ranker", "rating": "rating", "choices": "choices"}
    if isinstance(found, Mapping):
        for key, kind in kinds.items():
            if key in found:
                return {"type": kind, "from_name": name, "to_name": "", "value": found}
    return {"type": "text", "from_name": name, "to_name": "", "value": value}


def _plain(value: Any) -> Any:
    """A value of CSV, where lists and objects are written as JSON."""
    if isinstance(value, str) and value[:2] in ("[{", '{"'):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _who(person: Any) -> str:
    if isinstance(person, Mapping):
        return str(person.get("email") or person.get("id") or "")
    return "" if person is None else str(person)


def _count(row: Row, count: str, listed: str) -> int:
    return int(row.get(count) or 0) or len(row.get(listed) or [])


# ------------------------------------------------------------------------------------------------------------- out


def write(given: Sequence[Judgement | Ranking | Edit], path: Path) -> Handover:
    """Write tasks with their annotations as Label Studio imports them (.json), a task a pair, and beside them the
    labeling interface that they answer (.xml). Label Studio puts its own date to what it imports and knows its own
    users alone, so each comparison has both in its ``meta`` too, where ``read`` looks first. UserError for another
    ending."""
    if path.suffix != ".json":
        raise UserError(f"{path}: Label Studio imports tasks as JSON; give the file the ending .json")
    out = handover(given)
    messages, rated = as_messages(out.pairs), aspects(out.pairs)
    tasks = [_task(pair, messages) for pair in out.pairs]
    write_whole(path.with_suffix(".xml"), lambda to: _save(to, _interface(messages, rated)))
    write_whole(path, lambda to: _save(to, json.dumps(tasks, ensure_ascii=False, indent=1)))
    return out


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _task(pair: Pair, messages: bool) -> dict[str, Any]:
    """Models' names are in ``meta``, which Label Studio keeps and shows to nobody who labels."""
    prompt = messages_json(pair.prompt) if messages else pair.prompt.messages[0].content
    meta: dict[str, Any] = {"keel_pair": pair.id, "prompt_id": pair.prompt.id}
    data: dict[str, Any] = {"prompt": prompt}
    for name, response in zip(FIELDS, pair.responses, strict=True):
        data[name] = response.text
        meta |= {f"{name}_model": response.model} if response.model else {}
    annotations = [
        {"result": _results(said, f"{pair.id}-{number}"), "lead_time": said.seconds, "was_cancelled": False}
        for number, said in enumerate(pair.answers)
    ]
    return {"data": data, "meta": meta, "annotations": annotations}


def _results(said: Answer, id: str) -> list[dict[str, Any]]:
    def result(kind: str, name: str, about: str, value: Any) -> dict[str, Any]:
        key = {"textarea": "text"}.get(kind, kind)
        return {"id": f"{id}-{name}", "type": kind, "from_name": name, "to_name": about, "value": {key: value}}

    compared = result("choices", "preference", "prompt", [said.label])
    compared["meta"] = {"annotator": said.annotator, "created": said.created.isoformat()}
    found = [compared]
    if said.strength is not None:
        found.append(result("rating", "strength", "prompt", said.strength))
    if said.reason is not None:
        found.append(result("textarea", "reason", "prompt", [said.reason]))
    for name, values in said.ratings.items():
        found += [result("rating", f"{aspect}/{name}", name, value) for aspect, value in values.items()]
    return found


def _interface(messages: bool, rated: Sequence[str]) -> str:
    """The labeling interface: what the tasks show and ask."""
    shown = '<Text name="prompt" value="$prompt"/>'
    if messages:
        shown = '<Paragraphs name="prompt" value="$prompt" nameKey="role" textKey="content" layout="dialogue"/>'
    lines = [shown]
    for name in FIELDS:
        lines.append(f'<Header value="{name.replace("_", " ")}"/>')
        lines.append(f'<Text name="{name}" value="${name}"/>')
        lines += [f'<Rating name={quoteattr(f"{a}/{name}")} toName="{name}" maxRating="5"/>' for a in rated]
    lines.append('<Choices name="preference" toName="prompt" choice="single" required="true" showInline="true">')
    lines += [f'  <Choice value="{label}"/>' for label in LABELS]
    lines.append("</Choices>")
    lines.append('<Rating name="strength" toName="prompt" maxRating="3"/>')
    lines.append('<TextArea name="reason" toName="prompt" placeholder="Why?"/>')
    return "<View>\n" + "".join(f"  {line}\n" for line in lines) + "</View>\n"
