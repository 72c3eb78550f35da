"""Judgements as files: JSONL, Parquet or a folder of Hugging Face ``datasets``, one row a raw vote.

A row is a preference pair as TRL reads it (``prompt``, ``chosen``, ``rejected`` as message lists) or as OpenAI does
(``input``, ``preferred_output``, ``non_preferred_output``; JSONL alone), with Keel's own columns beside it, so that
nothing is lost on the way out and in again:

    id, annotator, annotator_kind, tie, margin      as in keel.types.Preference; margin 0 when not known
    chosen_finished, rejected_finished              whether each reply ended by itself
    prompt_id, kind, meta                           the prompt's
    choice                                          left, right, tie, both_bad: what was said, of the sides as shown
    chosen_side                                     left or right: where ``chosen`` was shown (left in a tie)
    strength, seconds, guideline, reason, created   the judgement's; null when not known
    batch, item                                     what it was judged for, and which rows judged the same item
    settled, settled_by                             a reviewer's last word on the item (chosen, rejected, tie); null
                                                    where nobody settled it
    chosen_source, rejected_source                  what wrote each response: model, fingerprint, sampling, created

Parquet has one type for a column, so there ``meta`` and the sources are JSON in a string.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from keel.store import hub
from keel.store.records import AnnotatorKind, Choice, Judgement, Response
from keel.store.rows import messages_json
from keel.store.settled import settle
from keel.types import Message, Preference, Prompt, UserError

_JSON_COLUMNS = ("meta", "chosen_source", "rejected_source")


Form = Literal["trl", "openai"]


def write(votes: Sequence[Judgement], path: Path, form: Form = "trl", plain: bool = False) -> int:
    """Write ``votes`` to a .jsonl or .parquet file, or, when the name has no ending, as a folder that ``datasets``
    loads from disk; returns how many rows. An old file stays as it was until the new one is whole; a folder must be
    new.

    ``plain``: the form's own columns alone, for tools that refuse others. Such rows can't say that neither was
    preferred, so ties are left out; nor that a reviewer settled the pair, so that word stands for the votes on it.
    """
    if form == "openai" and path.suffix != ".jsonl":
        raise UserError(f"{path}: OpenAI's form is JSONL; give the file the ending .jsonl")
    if plain:
        rows = [pair_columns(pair) for pair in settle([vote.preference() for vote in votes]) if not pair.tie]
    else:
        rows = [_row(vote) for vote in votes]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                lines = (_openai(row) if form == "openai" else row for row in rows)
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        elif path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and not needed for JSONL

            pyarrow.parquet.write_table(_table(rows), temporary)
        elif not path.suffix:
            if path.exists():
                raise UserError(f"{path} is there already; name a new folder, or a .jsonl or .parquet file")
            hub.save(_table(rows), temporary)
        else:
            raise UserError(
                f"{path}: exports are .jsonl, .parquet, or a folder for datasets (no ending); name one of these"
            )
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return len(rows)


def read(path: str | Path) -> list[Judgement]:
    """The judgements of a file that ``write`` made. (``keel.data`` reads the same files, and any other preference
    pairs, as Preference records.) UserError names the file and the row."""
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and not needed for JSONL

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.is_dir():
            rows = hub.load(path)
        else:
            lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other characters that end a line
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); give a file that Keel exported") from error
    votes = []
    for number, row in enumerate(rows, start=1):
        try:
            votes.append(_vote(_from_openai(row) if "input" in row else row))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}, row {number}: {type(error).__name__} {error}: no row of a Keel export; read other preference "
                "pairs with keel.data.sources.read_preferences"
            ) from error
    return votes


def from_preference(pair: Preference, annotator: str, time: int, seed: int, now: datetime) -> Judgement:
    """A preference pair from elsewhere as a judgement. Which side was shown where is not known, so it is drawn.

    ``annotator`` stands in for one who is not named; ``time``: the how-manieth record with this id it is (1, 2, ...).
    """
    token = pair.id if time == 1 else f"{pair.id}#{time}"
    if not token:
        raise UserError("a preference pair without an id can't be imported; give it one")
    chosen, rejected = (
        Response(0, pair.prompt.id, text, finished, "", "", None, now)
        for text, finished in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
    )
    chosen_left = random.Random(f"import/{seed}/{token}").random() < 0.5
    if pair.tie:
        choice: Choice = "tie"
        chosen_left = True  # a tie reads back with the left response as `chosen`
    else:
        choice = "left" if chosen_left else "right"
    side, other = ("left", "right") if chosen_left else ("right", "left")
    sides = {"": None, "tie": "tie", "chosen": side, "rejected": other}
    return Judgement(
        token=token,
        batch="import",
        item_id=0,
        annotator=pair.annotator or annotator,
        annotator_kind="unknown",
        prompt=pair.prompt,
        left=chosen if chosen_left else rejected,
        right=rejected if chosen_left else chosen,
        choice=choice,
        strength=pair.margin or None,
        seconds=None,
        guideline=None,
        reason=None,
        created=now,
        settled=sides[pair.settled],  # type: ignore[arg-type]
        settled_by=annotator if pair.settled else None,
    )


def pair_columns(pair: Preference) -> dict[str, Any]:
    """The columns that every reader of preference pairs knows."""
    return {
        "prompt": messages_json(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def _row(vote: Judgement) -> dict[str, Any]:
    pair = vote.preference()
    chosen_side = "right" if vote.choice == "right" else "left"
    chosen, rejected = (vote.left, vote.right) if chosen_side == "left" else (vote.right, vote.left)
    return {
        "id": pair.id,
        **pair_columns(pair),
        "chosen_finished": pair.chosen_finished,
        "rejected_finished": pair.rejected_finished,
        "tie": pair.tie,
        "margin": pair.margin,
        "annotator": pair.annotator,
        "annotator_kind": vote.annotator_kind,
        "prompt_id": pair.prompt.id,
        "kind": pair.prompt.kind,
        "meta": dict(pair.prompt.meta),
        "choice": vote.choice,
        "chosen_side": chosen_side,
        "strength": vote.strength,
        "seconds": vote.seconds,
        "guideline": vote.guideline,
        "reason": vote.reason,
        "created": vote.created.isoformat(),
        "batch": vote.batch,
        "item": vote.item_id,
        "settled": pair.settled or None,
        "settled_by": vote.settled_by,
        "chosen_source": _source(chosen),
        "rejected_source": _source(rejected),
    }


def _source(response: Response) -> dict[str, Any]:
    return {
        "model": response.model,
        "fingerprint": response.fingerprint,
        "sampling": response.sampling,
        "created": response.created.isoformat(),
    }


def _vote(row: dict[str, Any]) -> Judgement:
    plain = {name: json.loads(row[name]) if isinstance(row[name], str) else row[name] for name in _JSON_COLUMNS}
    messages = tuple(Message(message["role"], message["content"]) for message in row["prompt"])
    prompt = Prompt(row["prompt_id"], messages, row["kind"], plain["meta"])
    chosen, rejected = (
        _response(prompt.id, row[side][0]["content"], row[f"{side}_finished"], plain[f"{side}_source"])
        for side in ("chosen", "rejected")
    )
    chosen_left = {"left": True, "right": False}[row["chosen_side"]]
    kind: AnnotatorKind = row["annotator_kind"]
    other = {"left": "right", "right": "left"}[row["chosen_side"]]
    sides = {None: None, "tie": "tie", "chosen": row["chosen_side"], "rejected": other}
    return Judgement(
        token=row["id"],
        batch=row["batch"],
        item_id=row["item"],
        annotator=row["annotator"],
        annotator_kind=kind,
        prompt=prompt,
        left=chosen if chosen_left else rejected,
        right=rejected if chosen_left else chosen,
        choice=row["choice"],
        strength=row["strength"],
        seconds=row["seconds"],
        guideline=row["guideline"],
        reason=row["reason"],
        created=datetime.fromisoformat(row["created"]),
        settled=sides[row.get("settled")],  # type: ignore[arg-type]  # an older export has no such column
        settled_by=row.get("settled_by"),
    )


def _response(prompt_id: str, text: str, finished: bool, source: dict[str, Any]) -> Response:
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
    rest = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    asked = {"messages": row["prompt"], "tools": [], "parallel_tool_calls": True}
    return {"input": asked, "preferred_output": row["chosen"], "non_preferred_output": row["rejected"], **rest}


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    own = {"prompt": row["input"]["messages"], "chosen": row["preferred_output"]}
    return {**row, **own, "rejected": row["non_preferred_output"]}


def _table(rows: list[dict[str, Any]]) -> Any:
    """The rows as an Arrow table with the same columns however many rows there are."""
    import pyarrow as pa  # slow to import, and not needed for JSONL

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    special = {"tie": pa.bool_(), "margin": pa.float64(), "strength": pa.float64(), "seconds": pa.float64()}
    special |= {"prompt": messages, "chosen": messages, "rejected": messages, "item": pa.int64()}
    special |= {"chosen_finished": pa.bool_(), "rejected_finished": pa.bool_()}
    names = [
        *("id", "prompt", "chosen", "rejected", "chosen_finished", "rejected_finished", "tie", "margin", "annotator"),
        *("annotator_kind", "prompt_id", "kind", "meta", "choice", "chosen_side", "strength", "seconds", "guideline"),
        *("reason", "created", "batch", "item", "settled", "settled_by", "chosen_source", "rejected_source"),
    ]
    flat = [row | {name: json.dumps(row[name]) for name in _JSON_COLUMNS if name in row} for row in rows]
    present = [name for name in names if not rows or name in rows[0]]
    return pa.Table.from_pylist(flat, schema=pa.schema([(name, special.get(name, pa.string())) for name in present]))
