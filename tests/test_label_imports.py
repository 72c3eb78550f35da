"""Files that come in over HTTP: how much is unpacked, that nothing of a wrong one stays, and that people go on
labelling meanwhile."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling_world import Client, World, fill, person, token

from keel.data.rows import Most, Reading
from keel.data.sources import read_prompts
from keel.data.unjudged import read_unjudged
from keel.store import NewVote, Store
from keel.types import Message, Prompt, Unjudged, UserError
from keel.web.app.create import create_app
from keel.web.service import imports
from keel.web.service.imports import Imports
from keel.web.service.labelling import Labelling
from keel.web.service.sources import Sources
from keel.web.service.start import prepare

SMALL = Most(rows=10, size=2_000_000)
ROW = {"prompt": "Q?", "responses": ["A", "B"]}


def groups(count: int, replies: int = 2, first: int = 0) -> list[Unjudged]:
    return [
        Unjudged(
            Prompt(f"sent-{n}", (Message("user", f"Sent {n}?"),)),
            tuple(f"{n}, {reply}" for reply in range(replies)),
            ("",) * replies,
            f"line {n}",
        )
        for n in range(first, first + count)
    ]


# ------------------------------------------------------------------------------------------------------ how much it is


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz", ".csv.gz", ".parquet"])
def test_what_is_counted_is_what_a_file_holds_once_it_is_unpacked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"bomb{ending}"
    if ending == ".parquet":  # one long text, and a thousand rows that refer to it
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 8, pa.int32()), pa.array(["x" * 1_000_000]))
        pq.write_table(pa.table({"prompt": texts}), path)
    else:
        path.write_bytes(gzip.compress(b" " * 50_000_000))
    assert path.stat().st_size < 1_100_000
    for read in (
        lambda: read_prompts(path, Reading(most=SMALL)),
        lambda: read_unjudged(path, most=SMALL),
    ):
        with pytest.raises(UserError, match="more than 2 MB once it is unpacked"):
            read()


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_are_counted_and_what_fits_is_read(tmp_path: Path, ending: str) -> None:
    for count in (10, 11):
        path = tmp_path / f"{count}{ending}"
        rows = [{"prompt": f"{n}?"} for n in range(count)]
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(read_prompts(tmp_path / f"10{ending}", Reading(most=SMALL))) == 10
    with pytest.raises(UserError, match="more than 10 rows; split it"):
        read_prompts(tmp_path / f"11{ending}", Reading(most=SMALL))
    assert len(read_prompts(tmp_path / f"11{ending}")) == 11  # as ever, by the command


def test_over_http_packed_files_are_read_and_counted(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=0)
        world.app = create_app(store, Sources(read_unjudged=lambda path, bare: read_unjudged(path, bare, SMALL)))
        admin = world.client("boss", "admin")

        def send(client: Client, content: bytes) -> Any:
            files = {"file": ("mine.jsonl.gz", gzip.compress(content))}
            return client.http.post("/manage/prompts/responses", data={"csrf": client.csrf}, files=files)

        assert send(admin, json.dumps(ROW).encode()).status_code == 303
        assert store.progress("responses").wanted == 1
        refused = send(admin, b" " * 3_000_000)
        assert (refused.status_code, "mine.jsonl.gz: more than 2 MB" in refused.text) == (400, True)
        assert "/upload" not in refused.text


# ------------------------------------------------------------------------------------------------------------- pieces


def test_people_go_on_labelling_while_an_import_runs(
    new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(new_url()) as store:
        fill(store, 2)
        prepare(store)
        labelling, ann, taken = Labelling(store), person(store, "ann"), Imports(store)
        screen = labelling.next(ann, "compare")
        assert screen is not None
        between, voted = threading.Event(), threading.Event()
        monkeypatch.setattr(imports, "PIECE", 15)

        def pause(seconds: float) -> None:
            between.set()
            voted.wait(20)

        monkeypatch.setattr(imports, "sleep", pause)
        added: list[Any] = []
        thread = threading.Thread(target=lambda: added.append(taken.responses(lambda: groups(20), None, 2, "boss")))
        thread.start()
        assert between.wait(20)
        labelling.judge(ann, screen.id, NewVote("left", token=token()))  # while the import is not at its end
        assert 0 < store.progress("responses").wanted < 40
        with pytest.raises(UserError, match="another import is under way"):
            taken.prompts(list, "boss")
        voted.set()
        thread.join(20)
        assert str(added[0]) == "20 prompts, 40 responses and 20 pairs added"
        assert store.progress("responses").wanted == 40
        assert "already" in str(taken.responses(lambda: groups(20), None, 2, "boss"))
        assert taken.prompts(lambda: [one.prompt for one in groups(50, first=100)], "boss") == 50
        assert len(store.prompts()) == 2 + 20 + 50


def test_of_a_wrong_file_nothing_is_kept(new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "PIECE", 2)
    with Store(new_url()) as store:
        store.add_prompts([Prompt("sent-9", (Message("user", "Something else?"),))])
        taken = Imports(store)
        unstorable = Prompt("x", (Message("user", "half \ud800"),))
        for call, said in (
            (lambda: taken.responses(lambda: groups(10), None, 1, "boss"), "other messages"),
            (lambda: taken.prompts(lambda: [one.prompt for one in groups(10)], "boss"), "other messages"),
            (lambda: taken.prompts(lambda: [groups(1)[0].prompt, unstorable], "boss"), "can't be stored"),
            (lambda: taken.responses(lambda: groups(3), None, 0, "boss"), "1 to 1000 people"),
            (lambda: taken.responses(lambda: [*groups(3), *groups(1, 60, 3)], None, 1, "boss"), "1,770 pairs"),
            (lambda: taken.responses(lambda: groups(1, 1_001), 1, 1, "boss"), "1001 responses"),
        ):
            with pytest.raises(UserError, match=said):
                call()
            assert [prompt.id for prompt in store.prompts()] == ["sent-9"]
        monkeypatch.setattr(imports, "MOST_PAIRS", 10)
        with pytest.raises(UserError, match="12 pairs"):
            taken.responses(lambda: groups(4, 3), None, 1, "boss")
        assert taken.responses(lambda: groups(4, 3), 2, 1, "boss").items == 8
