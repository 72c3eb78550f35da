"""A whole store out and in: what comes back is compared as the databases' own drivers read it, table by table."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from databases import postgres_urls, sqlite_urls
from labelling_world import PASSWORD, fake_sources, fill, person
from sqlalchemy import create_engine, text
from test_label_constitution import published
from test_label_log import Clock, live

from keel.cli import main
from keel.store import Store, ai_labels, constitutions, principles, whole
from keel.store.engine import parse_url
from keel.store.records import NewVote
from keel.store.tables import judgements
from keel.types import UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.sampling import Sampling
from keel.web.service.start import prepare

API = {"tokens", "answers", "webhooks", "deliveries"}
LEFT_BEHIND = {"keel_schema", "links", "sessions", *API}


def everything(store: Store) -> None:
    """At least one row of every table, taken back and settled, erased and taken out."""
    live(store)
    manage, labelling, people = Manage(store), Labelling(store), People(store)
    boss, cy = person(store, "boss 2", "admin"), person(store, "cy")
    people.accept(people.invite("annotator", "boss 2"), "dee", PASSWORD)
    people.accept(people.invite("annotator", "boss 2"), "eli", PASSWORD)
    people.owner_link()
    sampling = Sampling(store, fake_sources())
    sampling.request("sft", 1, 2, 1, "compare", "boss 2")
    assert sampling._thread is not None
    sampling._thread.join()
    manage.add_guideline("Newer words", 'C++/"speed": Is it, say, fast?\n1:2: Half?', "boss 2")
    labelling.forget()
    while (screen := labelling.next(cy, "compare")) is not None:
        ratings = {"left": {'c++/"speed"': 5}, "right": {"1:2": 1}}
        vote = NewVote(
            "tie", token=uuid.uuid4().hex, seconds=1 / 3, ratings=ratings, reason="¿Qué? 漢字\u2028\U0001f600"
        )
        labelling.judge(cy, screen.id, vote)
    label = ai_labels.AiLabel("true", "a hash", "house", "another", 0.1, None, "asked", "thought")
    with store.transaction(writes=True) as c:
        id = c.execute(judgements.select().order_by(judgements.c.id.desc())).first()
        assert id is not None
        ai_labels.add(c, id.id, [label], store.now)
    published(store, boss.annotator_id)
    with store.transaction(writes=True) as c:
        constitutions.make_draft(c, "house", boss.annotator_id, store.now)
        for said in ("kept", "broken"):
            asked = principles.next_question(c, cy.annotator_id, (), store.now)
            assert asked is not None
            principles.answer(c, cy.annotator_id, asked.handle, said, uuid.uuid4().hex, store.now)  # type: ignore[arg-type]
        principles.undo(c, cy.annotator_id, None, store.now)
    manage.erase("response", "1", boss)
    people.erase("dee", True, "boss 2")


def read(url: str, like: dict[str, dict[str, str]] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every table of a database as its driver gives it. SQLite's values become what PostgreSQL has columns for
    (``like``), which is the one thing that the two may differ in."""
    if url.startswith("sqlite"):
        assert like is not None
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            found = {}
            for name in names:
                cursor = connection.execute(f'SELECT * FROM "{name}"')
                columns = [column[0] for column in cursor.description]
                found[name] = [
                    {c: as_postgres(like[name][c], v) for c, v in zip(columns, row, strict=True)} for row in cursor
                ]
    else:
        engine = create_engine(parse_url(url))
        with engine.connect() as pg:
            names = list(
                pg.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")).scalars()
            )
            found = {n: [dict(row) for row in pg.execute(text(f'SELECT * FROM "{n}"')).mappings()] for n in names}
        engine.dispose()
    return {name: sorted(rows, key=lambda row: json.dumps(row, default=str)) for name, rows in found.items()}


def as_postgres(kind: str, value: Any) -> Any:
    if value is None:
        return None
    if kind.startswith("timestamp"):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    if kind == "json":
        return json.loads(value) if isinstance(value, str) else value  # SQLite keeps a lone number as one
    return bool(value) if kind == "boolean" else value


def kinds(url: str) -> dict[str, dict[str, str]]:
    engine = create_engine(parse_url(url))
    query = "SELECT table_name, column_name, data_type FROM information_schema.columns"
    query += " WHERE table_schema = current_schema()"
    found: dict[str, dict[str, str]] = {}
    with engine.connect() as connection:
        for table, column, kind in connection.execute(text(query)):
            found.setdefault(table, {})[column] = kind
    engine.dispose()
    return found


def test_a_whole_store_comes_back_row_by_row(tmp_path: Path, postgres: str, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite_urls(tmp_path) as sqlite, postgres_urls(postgres) as make:
        first, second, third = sqlite(), make(), sqlite()
        with Store(first, clock=Clock()) as store:
            everything(store)
        out, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl.gz"
        assert main(["export", first, str(out), "--whole"]) == 0
        assert main(["import", second, str(out)]) == 0
        assert main(["export", second, str(again), "--whole"]) == 0
        assert main(["import", third, str(again)]) == 0
        like = kinds(second)
        source, there, back = read(first, like), read(second), read(third, like)
        assert source.keys() == there.keys() == back.keys()
        assert [
            name for name, rows in source.items() if not rows and name not in API
        ] == []  # one of everything at least
        for name in source.keys() - LEFT_BEHIND:
            if name == "accounts":
                assert any(row["password"] for row in source[name])
                source[name] = [row | {"password": None} for row in source[name]]
            assert there[name] == source[name], name
            assert back[name] == source[name], name
        assert {name: there[name] for name in ("links", "sessions")} == {"links": [], "sessions": []}
        for url in (second, third):  # a second time changes nothing, and what is done since stays
            capsys.readouterr()
            assert main(["import", url, str(out)]) == 0
            assert "nothing is new" in capsys.readouterr().out
            assert read(url, like) == (there if url == second else back)
            with Store(url) as store:
                prompts = store.prompts()
                more = fill(store, 12)  # numbers go on where they were
                assert len(set(more)) == 12
                assert len(store.prompts()) > len(prompts)
            assert main(["import", url, str(out)]) == 0


def test_what_is_no_whole_store_is_refused_and_nothing_is_kept(new_url: Callable[[], str], tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    with Store(new_url()) as store:
        fill(store, 2)
        prepare(store)
        with store.transaction(writes=False) as connection:
            whole.export(connection, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    def with_value(table: str, column: str, value: Any) -> list[str]:
        place = next(n for n, row in enumerate(rows) if row.get("table") == table)
        changed = {"table": table, "row": rows[place]["row"] | {column: value}}
        return [*lines[:place], json.dumps(changed), *lines[place + 1 :]]

    wrong = {
        "missing": lines[:-1],
        "more rows": [*lines, lines[-1]],
        "schema 0001": [json.dumps(rows[0] | {"keel_store": "0001"}), *lines[1:]],
        "not a store's": [json.dumps(rows[0] | {"rows": {"prompts": 2}}), *lines[1:]],
        "overlap is True": with_value("items", "overlap", True),
        "columns": with_value("items", "colour", "red"),
        "fit together": with_value("responses", "prompt_id", "nobody's"),
        "no time in UTC": with_value("prompts", "created", "2026-01-01T00:00:00"),
        "NUL": with_value("responses", "text", "a\0b"),
        "can't be read": [*lines[:3], "{", *lines[3:]],
    }
    with Store(new_url()) as store:
        for words, changed in wrong.items():
            path.write_text("\n".join(changed) + "\n", encoding="utf-8")
            with pytest.raises(UserError, match=words), store.transaction(writes=True) as connection:
                whole.add(connection, path)
            assert (store.prompts(), store.events()) == ([], []), words
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        store.add_annotator("ann")
        with pytest.raises(UserError, match="other work"), store.transaction(writes=True) as connection:
            whole.add(connection, path)
        assert store.prompts() == []
