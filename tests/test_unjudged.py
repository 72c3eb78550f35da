"""Responses that were written elsewhere: the forms they come in, into a store and onto the page of whoever judges."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from labelling_world import Client, World

from keel.cli import main
from keel.data.unjudged import read_unjudged
from keel.store import Store
from keel.store.unjudged import add_unjudged
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.service.people import People
from keel.web.service.sources import Sources


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows
            )
    return path


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


FORMS: list[tuple[list[dict[str, Any]], bool]] = [
    ([{"prompt": "Q?", "responses": ["A", "B"], "models": ["m1", "m2"]}], False),
    ([{"prompt": "Q?", "responses": [{"text": "A", "model": "m1"}, {"text": "B", "model": "m2"}]}], False),
    ([{"messages": talk("Q?"), "responses": [{"content": "A", "model": "m1"}, {"content": "B", "model": "m2"}]}],
     False),
    ([{"prompt": "Q?", "response_a": "A", "response_b": "B", "model_a": "m1", "model_b": "m2"}], False),
    ([{"instruction": "Q?", "output_1": "A", "output_2": "B", "generator_1": "m1", "generator_2": "m2"}], False),
    ([{"conversation_a": talk("Q?", "A"), "conversation_b": talk("Q?", "B"), "model_a": "m1", "model_b": "m2"}], False),
    ([{"prompt": "Q?", "response": "A", "model": "m1"}, {"prompt": "Q?", "response": "B", "model": "m2"}], False),
    ([{"instruction": "Q?", "output": "A", "generator": "m1"}, {"instruction": "Q?", "output": "B", "generator": "m2"}],
     False),
    ([{"prompt": "Q?", "chosen": "A", "rejected": "B", "chosen_model": "m1", "rejected_model": "m2"}], True),
    ([{"prompt": "Q?", "response_a": "A", "response_b": "B", "model_a": "m1", "model_b": "m2", "winner": "model_a"}],
     True),
]  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(("rows", "answers"), FORMS)
def test_every_form_says_the_same(tmp_path: Path, rows: list[dict], answers: bool, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", rows)
    (group,) = read_unjudged(path, unlabelled=answers)
    assert [(message.role, message.content) for message in group.prompt.messages] == [("user", "Q?")]
    assert (group.responses, group.models) == (("A", "B"), ("m1", "m2"))
    if answers:
        with pytest.raises(UserError, match="holds an annotation"):
            read_unjudged(path)


def test_what_an_instruction_is_about_and_earlier_rounds_belong_to_the_prompt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "context": "1 2", "output_1": "A", "output_2": "B"},
        {"prompt": "Q?", "history": [["P?", "O"]], "responses": ["A", "B"]},
    ]
    found = read_unjudged(write(tmp_path / "rows.jsonl", rows))
    assert [[m.content for m in group.prompt.messages] for group in found] == [["Add.\n\n1 2"], ["P?", "O", "Q?"]]


def test_rows_of_one_prompt_belong_together_by_its_id(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": "q1", "prompt": "Q?", "completion": "A", "model": "m1"},
        {"prompt_id": "q2", "prompt": "R?", "completion": "C"},
        {"prompt_id": "q1", "prompt": "Q?", "completion": "B", "model": "m2"},
        {"prompt_id": "q2", "prompt": "R?", "completion": "D"},
        {"prompt_id": "q1", "prompt": "Q?", "completion": "A", "model": "m1"},  # the same again
    ]
    found = read_unjudged(write(tmp_path / "rows.jsonl", rows))
    assert [(g.prompt.id, g.responses, g.models) for g in found] == [
        ("q1", ("A", "B"), ("m1", "m2")),
        ("q2", ("C", "D"), ("", "")),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q?", "responses": ["A"]}, "line 2: 1 response to the prompt"),
        ({"prompt": "Q?", "responses": []}, "line 2: 0 response"),
        ({"prompt": "Q?", "responses": ["A", " A\n"]}, "line 2: responses 1 and 2 are the same text"),
        ({"prompt": "Q?", "responses": ["A", "  "]}, "line 2: response 2 is empty"),
        ({"prompt": "Q?", "responses": ["A", 3]}, r"line 2: field 'responses\[1\]'"),
        ({"prompt": "Q?", "responses": ["A", "B"], "models": ["m"]}, "line 2: field 'models': expected 2"),
        ({"prompt": " ", "responses": ["A", "B"]}, "line 2: field 'prompt'"),
        ({"prompt": "Q?", "response_a": "A", "response_b": None}, "line 2: columns are prompt, response_a"),
        ({"prompt": "Q?", "response": "alone"}, "line 2: 1 response to the prompt"),
        ({"conversation_a": talk("Q?", "A"), "conversation_b": talk("R?", "B")}, "line 2: .*differ before"),
        ({"conversation_a": talk("Q?"), "conversation_b": talk("Q?", "B")}, "line 2: field 'conversation_a'"),
        ({"prompt": "Q?", "chosen": "A", "rejected": "B"}, "line 2: field 'chosen': the row holds an annotation"),
        ({"question": "Q?"}, "line 2: columns are question; expected prompt"),
        ({"responses": ["A", "B"]}, "line 2: columns are responses"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_its_place(tmp_path: Path, row: dict, said: str) -> None:
    good = {"prompt": "Good?", "responses": ["yes", "no"]}
    path = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(UserError, match=said):
        read_unjudged(path)


def test_pairs_are_queued_and_the_same_again_adds_nothing(new_url: Callable[[], str], tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q?", "responses": ["A", "B", "C", "D"], "models": ["m1", "m2", "m3", "m4"]},
        {"prompt": "R?", "responses": ["E", "F"]},
    ]
    groups = read_unjudged(write(tmp_path / "rows.jsonl", rows))
    with Store(new_url()) as store, Store(new_url()) as few:
        with store.transaction(writes=True) as connection:
            added = add_unjudged(connection, groups, None, 3, "mine", "test", store.now)
            again = add_unjudged(connection, groups, None, 3, "mine", "test", store.now)
        assert (added.prompts, added.responses, added.items) == (2, 6, 7)  # 4 choose 2, and one
        assert (again.prompts, again.responses, again.items) == (0, 0, 0)
        assert "already" in str(again)
        assert store.progress("mine").wanted == 21
        assert {r.text: r.model for r in store.responses()} == {
            "A": "m1", "B": "m2", "C": "m3", "D": "m4", "E": "", "F": "",
        }  # fmt: skip
        for _ in range(2):
            with few.transaction(writes=True) as connection:
                add_unjudged(connection, groups, 2, 1, "mine", "test", few.now)
        assert few.progress("mine").wanted == 3  # two of the six, and the one
        # another file with the same texts, whatever it calls the models
        other = read_unjudged(write(tmp_path / "o.jsonl", [{"prompt": "R?", "response_a": "F", "response_b": "E "}]))
        with few.transaction(writes=True) as connection:
            assert add_unjudged(connection, other, None, 1, "mine", "test", few.now).items == 0
        clash = read_unjudged(write(tmp_path / "c.jsonl", [{"id": "x", "prompt": "1?", "responses": ["a", "b"]}]))
        clash += read_unjudged(write(tmp_path / "c.jsonl", [{"id": "x", "prompt": "2?", "responses": ["c", "d"]}]))
        with pytest.raises(UserError, match="other messages"), few.transaction(writes=True) as connection:
            add_unjudged(connection, clash, None, 1, "mine", "test", few.now)
        assert len(few.responses()) == 6  # nothing of it


def test_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, file = (
        str(tmp_path / "new.db"),
        write(tmp_path / "r.jsonl", [{"prompt": "Q?", "responses": ["A", "B", "C"]}]),
    )
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "Q?", "chosen": "A", "rejected": "Z"}])
    assert main(["import", store, str(file), "--pairs", "2", "--overlap", "2"]) == 0
    assert capsys.readouterr().out == "1 prompts, 3 responses and 2 pairs added\n"
    assert main(["import", store, str(file), "--pairs", "2", "--overlap", "2"]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["import", store, str(pairs), str(file)]) == 2
    assert "one after the other" in capsys.readouterr().err
    assert main(["import", store, str(pairs), "--unlabelled"]) == 0
    capsys.readouterr()
    assert main(["import", store, str(pairs)]) == 0  # as ever, a vote
    assert capsys.readouterr().out == "1 votes imported\n"
    with Store(store) as opened:
        assert opened.progress("responses").wanted == 5
        assert len(opened.judgements()) == 1


def test_in_the_app_and_nobody_is_told_the_models(tmp_path: Path) -> None:
    rows = [{"prompt": "Q?", "responses": [{"text": "A", "model": "secret-x"}, {"text": "B", "model": "secret-y"}]}]
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=0)
        world.app = create_app(store, Sources(read_unjudged=read_unjudged))
        admin, ann = world.client("boss", "admin"), world.client("ann")

        def send(client: Client, content: str, **more: str):  # type: ignore[no-untyped-def]
            files = {"file": ("mine.jsonl", content.encode())}
            return client.http.post("/manage/prompts/responses", data={"csrf": client.csrf, **more}, files=files)

        broken = json.dumps(rows[0]) + '\n{"prompt": "R?", "responses": ["A"]}\n'
        answer = send(admin, broken)
        assert (answer.status_code, "mine.jsonl, line 2: 1 response" in answer.text) == (400, True)
        assert store.prompts() == []
        assert send(ann, json.dumps(rows[0])).status_code == 403
        assert send(admin, json.dumps(rows[0]), overlap="2").status_code == 303
        assert "1 prompts, 2 responses and 1 pairs added." in admin.get("/manage/prompts").text
        assert store.progress("responses").wanted == 2
        shown = ann.api("next", {"kind": "compare"})
        assert sorted(one["text"] for one in shown.json()["item"]["shown"]) == ["A", "B"]
        vote = {"assignment": shown.json()["item"]["id"], "token": "t" * 8, "choice": "left"}
        for answer in (shown, ann.api("judge", vote), ann.get("/compare"), ann.get("/mine")):
            assert answer.status_code == 200
            assert "secret-" not in answer.text + json.dumps(dict(answer.headers))
        assert People(store).accounts()
