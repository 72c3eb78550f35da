"""Judgements as files: JSONL, Parquet or a folder of Hugging Face ``datasets``, one row a raw vote.

A row is a preference pair as TRL reads it (``prompt``, ``chosen``, ``rejected`` as message lists) or as OpenAI does
(``input``, ``preferred_output``, ``non_preferred_output``; JSONL alone), with Keel's own columns beside it, so that
nothing is lost on the way out and in again:

    id, annotator, annotator_kind, tie, margin      as in keel.types.Preference; margin 0 when not known
    chosen_finished, rejected_finished              whether each reply ended by itself
    prompt_id, kind, meta                           the prompt's
    one, other                                      in the place of chosen and rejected, which are then null, where
                                                    nobody should learn that preference: a tie, a vote that a reviewer
                                                    overruled, a gold item, one that is out. So no tool takes it for one
    choice                                          left, right, tie, both_bad: what was said, of the sides as shown
    chosen_side                                     left or right: where ``chosen`` was shown (left in a tie)
    strength, seconds, guideline, reason, created   the judgement's; null when not known
    probability                                     that ``chosen`` is the better one, where a model said so; else null
    batch, item                                     what it was judged for, and which rows judged the same item
    settled, settled_by                             a reviewer's last word on the item (chosen, rejected, tie); null
                                                    where nobody settled it; settled_reason, settled_at: why, and when
    gold                                            the known answer of a gold item, in the same words: such a vote
                                                    measures its annotator and is never trained on
    ratings                                         of chosen and rejected, on the guideline's aspects
    ranking                                         of a ranking, which has a row for each of its pairs: its token, and
                                                    of chosen and rejected the place in it and on the screen
    out                                             whether its item was taken out of use: never trained on
    edit                                            whether ``chosen`` is somebody's edit of ``rejected``
    chosen_source, rejected_source                  what wrote each response: model, fingerprint, sampling, created

Parquet has one type for a column, so there ``meta``, the sources, ``ratings`` and ``ranking`` are JSON in a string.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from keel.store.records import AnnotatorKind, Edit, Judgement, Ranking, Response
from keel.store.row_checks import PAIR, check_row, check_source, check_vote, reply_text
from keel.store.row_files import Type, arrow_table, from_json, rows_of_file, write_rows
from keel.store.rows import messages_json
from keel.store.settled import replaced, words
from keel.store.sides import Side, chosen_side, in_record, of_record, side_of, turned
from keel.types import Message, Preference, Prompt, UserError

EVEN = {"chosen": "one", "rejected": "other"}
_JSON_COLUMNS = ("meta", "chosen_source", "rejected_source", "ratings", "ranking")
Given = Judgement | Ranking | Edit
COLUMNS = (
    *("id", "prompt", "chosen", "rejected", "chosen_finished", "rejected_finished", "tie", "margin", "annotator"),
    *("annotator_kind", "prompt_id", "kind", "meta", "choice", "chosen_side", "strength", "seconds", "guideline"),
    *("reason", "created", "batch", "item", "settled", "settled_by", "gold", "ratings", "ranking", "edit", "out"),
    *("chosen_source", "rejected_source", "probability", "one", "other", "settled_reason", "settled_at"),
)
Form = Literal["trl", "openai"]


def write(
    votes: Iterable[Given],
    path: Path,
    form: Form = "trl",
    plain: bool = False,
    settled: Mapping[Hashable, Preference] | None = None,
) -> int:
    """Write ``votes``, as they come, to a .jsonl or .parquet file, or, when the name has no ending, as a folder that
    ``datasets`` loads from disk; returns how many rows. An old file stays as it was until the new one is whole; a
    folder must be new.

    ``plain``: only the columns of that format, for tools that refuse others. Such rows cannot say that neither was
    preferred, so ties are left out. Votes on gold items and on items taken out of use are left out too. Where a
    reviewer settled a pair, that word (``settled``, by default worked out of all votes) replaces the votes on it.
    """
    if form == "openai" and path.suffix != ".jsonl":
        raise UserError(f"{path}: OpenAI's form is JSONL; give the file the ending .jsonl")
    if plain and settled is None:
        votes = list(votes)
        settled = words(pair for vote in votes for pair in vote.preferences())
    if plain:
        pairs = replaced((pair for vote in votes for pair in vote.preferences()), settled or {})
        rows: Iterator[dict[str, Any]] = (pair_columns(pair) for pair in pairs if not pair.tie)
    else:
        rows = all_columns(votes)
    return write_rows((_openai(row) for row in rows) if form == "openai" else rows, path, table)


def all_columns(votes: Iterable[Given]) -> Iterator[dict[str, Any]]:
    """Rows that say all that is known."""
    return (no_preference(row) for vote in votes for row in _rows(vote))


def read(path: str | Path) -> list[Given]:
    """The judgements, rankings and edits of a file that ``write`` made. (``keel.data`` reads the same files, and any
    other preference pairs, as Preference records.) UserError names the file and the row."""
    path = Path(path)
    rows = rows_of_file(path)
    votes: list[Given] = []
    ranked: dict[str, list[dict[str, Any]]] = {}  # a ranking stands where its first pair does
    for number, row in enumerate(rows, start=1):
        try:
            plain = _plain(_from_openai(row) if "input" in row else row)
            check_row(plain, PAIR)
            if plain["ranking"] is not None:
                ranked.setdefault(plain["ranking"]["token"], []).append(plain)
            else:
                votes.append(_edit(plain) if plain["edit"] else _vote(plain))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}, row {number}: {type(error).__name__} {error}: no row of a Keel export; read other preference "
                "pairs with keel.data.sources.read_preferences"
            ) from error
    for token, pairs in ranked.items():
        try:
            votes.append(_ranking(token, pairs))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path}: the ranking {token!r} is not whole; export it again") from error
    return votes


def from_preference(pair: Preference, annotator: str, time: int, seed: int, now: datetime) -> Judgement:
    """A preference pair from elsewhere as a judgement. Which side was shown where is not known, so it is drawn.

    ``annotator`` stands in for one who is not named; ``time``: which record of this id it is: 1, 2, ...
    """
    token = pair.id if time == 1 else f"{pair.id}#{time}"
    if not token:
        raise UserError("a preference pair without an id can't be imported; give it one")
    chosen, rejected = (
        Response(0, pair.prompt.id, text, finished, "", "", None, now)
        for text, finished in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
    )
    drawn_left = random.Random(f"import/{seed}/{token}").random() < 0.5
    side: Side = "left" if pair.tie or drawn_left else "right"  # a tie reads back with the left one as `chosen`
    left, right = turned((chosen, rejected), side)
    return Judgement(
        token=token,
        batch="import",
        item_id=0,
        annotator=pair.annotator or annotator,
        annotator_kind="unknown",
        prompt=pair.prompt,
        left=left,
        right=right,
        choice="tie" if pair.tie else side,
        strength=pair.margin or None,
        seconds=None,
        guideline=None,
        reason=None,
        created=now,
        settled=of_record(pair.settled, side) if pair.settled else None,
        settled_by=annotator if pair.settled else None,
        probability=pair.probability,
    )


def pair_columns(pair: Preference) -> dict[str, Any]:
    """The columns that every reader of preference pairs knows."""
    return {
        "prompt": messages_json(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def no_preference(row: dict[str, Any]) -> dict[str, Any]:
    """The row, its replies under other names where nobody should learn it as a preference."""
    learned = row.get("settled") in (None, "chosen") and not (row["tie"] or row.get("gold") or row.get("out"))
    return row if learned else row | {new: row[name] for name, new in EVEN.items()} | dict.fromkeys(EVEN)


def _rows(given: Given) -> list[dict[str, Any]]:
    pairs = [given.preference()] if isinstance(given, Judgement) else given.said()
    rows = [_common(given, pair) for pair in pairs]
    if isinstance(given, Judgement):
        side, (chosen, rejected) = chosen_side(given.choice), given.as_recorded
        ratings = {in_record(rated, side): dict(values) for rated, values in given.ratings.items()}
        rows[0] |= {"choice": given.choice, "chosen_side": side, "strength": given.strength}
        rows[0] |= {"reason": given.reason, "item": given.item_id, "settled_by": given.settled_by}
        at = given.settled_at and given.settled_at.isoformat()
        rows[0] |= {"settled_reason": given.settled_reason, "settled_at": at}
        rows[0] |= {"gold": given.gold and in_record(given.gold, side), "ratings": ratings or None}
        rows[0] |= {"chosen_source": source_columns(chosen), "rejected_source": source_columns(rejected)}
    elif isinstance(given, Edit):
        rows[0] |= {"edit": True, "rejected_source": source_columns(given.original)}
    else:
        for row, (a, b, first, second) in zip(rows, given.pairs, strict=True):
            places = {"chosen": {"place": first, "shown": a}, "rejected": {"place": second, "shown": b}}
            row |= {"ranking": {"token": given.token, **places}, "reason": given.reason}
            row |= {"chosen_source": source_columns(given.shown[a]), "rejected_source": source_columns(given.shown[b])}
    return rows


def judged_columns(pair: Preference) -> dict[str, Any]:
    """The texts, and what was said of them by whom."""
    return {
        "id": pair.id,
        **pair_columns(pair),
        "chosen_finished": pair.chosen_finished,
        "rejected_finished": pair.rejected_finished,
        "tie": pair.tie,
        "margin": pair.margin,
        "annotator": pair.annotator,
    }


def preference_row(pair: Preference) -> dict[str, Any]:
    """A row of what training takes, as in ``pairs.jsonl``."""
    row = judged_columns(pair) | {"settled": pair.settled or None, "probability": pair.probability}
    return no_preference(row)


def _common(given: Given, pair: Preference) -> dict[str, Any]:
    """A row with what every kind of judgement has; the rest of its columns are null."""
    return dict.fromkeys(COLUMNS) | {
        **judged_columns(pair),
        "annotator_kind": given.annotator_kind,
        "prompt_id": pair.prompt.id,
        "kind": pair.prompt.kind,
        "meta": dict(pair.prompt.meta),
        "seconds": given.seconds,
        "guideline": given.guideline,
        "created": given.created.isoformat(),
        "batch": given.batch,
        "settled": pair.settled or None,
        "edit": False,
        "out": given.out,
        "probability": pair.probability,
    }


def source_columns(response: Response) -> dict[str, Any]:
    """What wrote a response."""
    return {
        "model": response.model,
        "fingerprint": response.fingerprint,
        "sampling": response.sampling,
        "created": response.created.isoformat(),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns that an older export lacks, and what Parquet keeps as a string read."""
    read = from_json(row, _JSON_COLUMNS)
    later = ("settled", "settled_by", "gold", "ratings", "ranking", "edit", "out", "probability")
    whole = dict.fromkeys((*later, *EVEN.values(), "settled_reason", "settled_at")) | row | read
    return whole | {name: whole[new] for name, new in EVEN.items() if whole[new] is not None}


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of an exported row."""
    messages = tuple(Message(message["role"], message["content"]) for message in row["prompt"])
    return Prompt(row["prompt_id"], messages, row["kind"], row["meta"])


def _ranking(token: str, pairs: Sequence[dict[str, Any]]) -> Ranking:
    first, prompt = pairs[0], prompt_of(pairs[0])
    found: dict[int, Response] = {}  # by place on the screen
    tiers: dict[int, set[int]] = {}
    for row in pairs:
        for side in ("chosen", "rejected"):
            place = row["ranking"][side]
            found[place["shown"]] = _response(prompt.id, row, side)
            tiers.setdefault(place["place"], set()).add(place["shown"])
    shown = tuple(found[place] for place in range(len(found)))
    if len(pairs) != len(shown) * (len(shown) - 1) // 2:
        raise ValueError("pairs are missing")
    return Ranking(
        token, first["batch"], first["annotator"], first["annotator_kind"], prompt, shown,
        tuple(tuple(sorted(tiers[place])) for place in sorted(tiers)),
        first["seconds"], first["guideline"], first["reason"], datetime.fromisoformat(first["created"]),
        bool(first["out"]),
    )  # fmt: skip


def _edit(row: dict[str, Any]) -> Edit:
    prompt = prompt_of(row)
    return Edit(
        row["id"], row["batch"], row["annotator"], row["annotator_kind"], prompt,
        _response(prompt.id, row, "rejected"), reply_text(row["chosen"]),
        row["seconds"], row["guideline"], datetime.fromisoformat(row["created"]), bool(row["out"]),
    )  # fmt: skip


def _vote(row: dict[str, Any]) -> Judgement:
    check_vote(row)
    prompt = prompt_of(row)
    chosen, rejected = (_response(prompt.id, row, side) for side in ("chosen", "rejected"))
    side: Side = row["chosen_side"]
    left, right = turned((chosen, rejected), side)
    kind: AnnotatorKind = row["annotator_kind"]
    return Judgement(
        token=row["id"],
        batch=row["batch"],
        item_id=row["item"],
        annotator=row["annotator"],
        annotator_kind=kind,
        prompt=prompt,
        left=left,
        right=right,
        choice=row["choice"],
        strength=row["strength"],
        seconds=row["seconds"],
        guideline=row["guideline"],
        reason=row["reason"],
        created=datetime.fromisoformat(row["created"]),
        settled=of_record(row["settled"], side) if row["settled"] is not None else None,
        settled_by=row["settled_by"],
        settled_reason=row["settled_reason"],
        settled_at=datetime.fromisoformat(row["settled_at"]) if row["settled_at"] else None,
        gold=of_record(row["gold"], side) if row["gold"] is not None else None,
        ratings={side_of(rated, side): values for rated, values in (row["ratings"] or {}).items()},
        out=bool(row["out"]),
        probability=_share(row["probability"]),
    )


def _share(value: Any) -> float | None:
    if value is not None and not 0 <= float(value) <= 1:
        raise ValueError(f"probability {value}")
    return None if value is None else float(value)


def _response(prompt_id: str, row: dict[str, Any], side: str) -> Response:
    return source_of(row[f"{side}_source"], prompt_id, reply_text(row[side]), row[f"{side}_finished"])


def source_of(source: dict[str, Any], prompt_id: str, text: str, finished: bool) -> Response:
    """The response of which ``source_columns`` wrote this."""
    check_source(source)
    return Response(
        id=0,
        prompt_id=prompt_id,
        text=text,
        finished=finished,
        model=source["model"],
        fingerprint=source["fingerprint"],
        sampling=source["sampling"],
        created=datetime.fromisoformat(source["created"]),
    )


def _openai(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's row of preference fine-tuning, what else is known after its own columns."""
    rest = {name: value for name, value in row.items() if name not in ("prompt", *EVEN)}
    asked = {"messages": row["prompt"], "tools": [], "parallel_tool_calls": True}
    return {"input": asked, "preferred_output": row["chosen"], "non_preferred_output": row["rejected"], **rest}


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    own = {"prompt": row["input"]["messages"], "chosen": row["preferred_output"]}
    return {**row, **own, "rejected": row["non_preferred_output"]}


_TYPES: Mapping[str, Type] = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "one", "other"), "messages"),
    **dict.fromkeys(("tie", "chosen_finished", "rejected_finished", "edit", "out"), "bool"),
    **dict.fromkeys(("margin", "strength", "seconds", "probability"), "number"),
    "item": "whole",
}


def table(rows: list[dict[str, Any]]) -> Any:
    return arrow_table(rows, COLUMNS, _JSON_COLUMNS, _TYPES)
