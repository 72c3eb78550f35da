"""Rows of people's files: every accepted form, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keel.data.collate import messages_hash
from keel.data.rows import Reading
from keel.data.sources import (
    Fact,
    read_demonstrations,
    read_facts,
    read_labelled,
    read_preferences,
    read_prompts,
    read_steps,
    read_texts,
)
from keel.types import Message, UserError


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


HI = said(("user", "hi"))
HI_YO = said(("user", "hi"), ("assistant", "yo"))


# --------------------------------------------------------------------------------------------- every accepted form


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": HI_YO}, (user("hi"), assistant("yo"))),
        ({"messages": said(("developer", "be"), ("user", "hi"), ("assistant", "yo"))},
         (system("be"), user("hi"), assistant("yo"))),
        ({"prompt": "hi", "completion": "yo"}, (user("hi"), assistant("yo"))),
        ({"prompt": "hi", "completion": "yo", "system": "be"}, (system("be"), user("hi"), assistant("yo"))),
        ({"prompt": HI, "completion": said(("assistant", "yo"))}, (user("hi"), assistant("yo"))),
        ({"prompt": HI, "completion": HI_YO}, (user("hi"), assistant("yo"))),
        ({"prompt": HI, "completion": said(("assistant", "yo"), ("user", "so"), ("assistant", "no"))},
         (user("hi"), assistant("yo"), user("so"), assistant("no"))),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "be"},
         (system("be"), user("hi"), assistant("yo"))),
        ({"conversations": HI_YO}, (user("hi"), assistant("yo"))),
        ({"instruction": "add", "input": "1 2", "output": "3"}, (user("add\n\n1 2"), assistant("3"))),
        ({"instruction": "add", "input": "", "output": "3"}, (user("add"), assistant("3"))),
        ({"instruction": "add", "output": "3"}, (user("add"), assistant("3"))),
        ({"instruction": "add", "context": "1 2", "response": "3", "category": "sums"},
         (user("add\n\n1 2"), assistant("3"))),
        ({"instruction": "add", "context": "", "response": "3"}, (user("add"), assistant("3"))),
        ({"instruction": "add", "input": "", "context": "1 2", "output": "3", "response": "3"},
         (user("add\n\n1 2"), assistant("3"))),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                       {"role": "assistant", "content": "yo", "tool_calls": None, "weight": 1}]},
         (user("hi"), assistant("yo"))),
        ({"messages": HI_YO, "text": "ignored", "prompt": "ignored"}, (user("hi"), assistant("yo"))),
        ({"messages": HI_YO, "prompt": None}, (user("hi"), assistant("yo"))),
    ],
)  # fmt: skip
def test_demonstrations(write: Callable[..., Path], row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    [demonstration] = read_demonstrations(write(row))
    assert demonstration.messages == messages
    assert demonstration.id == messages_hash(messages)
    assert not demonstration.plain


def test_texts(write: Callable[..., Path]) -> None:
    path = write({"text": "once"}, {"text": "upon\u2028a time", "id": 7})
    assert read_texts(path) == ["once", "upon\u2028a time"]
    first, second = read_demonstrations(path)
    assert first.plain and first.messages == (assistant("once"),)  # noqa: PT018
    assert second.id == "7"


@pytest.mark.parametrize(
    ("row", "messages", "meta"),
    [
        ({"prompt": "hi"}, (user("hi"),), {}),
        ({"prompt": said(("system", "be"), ("user", "hi"))}, (system("be"), user("hi")), {}),
        ({"prompt": "hi", "system": "be"}, (system("be"), user("hi")), {}),
        ({"messages": HI}, (user("hi"),), {}),
        ({"instruction": "add", "input": "1 2", "output": "3"}, (user("add\n\n1 2"),), {"output": "3"}),
        ({"instruction": "add", "context": "1 2", "response": "3"}, (user("add\n\n1 2"),), {"response": "3"}),
        ({"prompt": "hi", "meta": {"a": [1]}, "answer": 4}, (user("hi"),), {"a": [1], "answer": 4}),
        ({"prompt": "hi", "meta": "{\"a\": 1}"}, (user("hi"),), {"a": 1}),
    ],
)  # fmt: skip
def test_prompts(
    write: Callable[..., Path], row: dict[str, Any], messages: tuple[Message, ...], meta: dict[str, Any]
) -> None:
    [prompt] = read_prompts(write({**row, "kind": "greeting"}))
    assert (prompt.messages, prompt.meta, prompt.kind) == (messages, meta, "greeting")
    assert prompt.id == messages_hash(messages)


PAIR = {"chosen": "yo", "rejected": "no"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", **PAIR},
        {"prompt": HI, **PAIR},
        {"prompt": HI, "chosen": said(("assistant", "yo")), "rejected": said(("assistant", "no"))},
        {"prompt": "hi", "chosen": HI_YO, "rejected": said(("user", "hi"), ("assistant", "no"))},
        {"chosen": HI_YO, "rejected": said(("user", "hi"), ("assistant", "no")), "input": "an unrelated column"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"input": {"messages": HI, "tools": [], "parallel_tool_calls": True},
         "preferred_output": said(("assistant", "yo")), "non_preferred_output": said(("assistant", "no"))},
    ],
)  # fmt: skip
def test_preferences(write: Callable[..., Path], row: dict[str, Any]) -> None:
    [pair] = read_preferences(write(row))
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == ((user("hi"),), "yo", "no")
    assert (pair.tie, pair.margin, pair.annotator) == (False, 0.0, "")
    assert pair.prompt.id == messages_hash([user("hi")])


def test_preferences_of_long_conversations_share_all_but_the_last_message(write: Callable[..., Path]) -> None:
    start = said(("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "so"))
    row = {"chosen": start + said(("assistant", "a")), "rejected": start + said(("assistant", "b"))}
    [pair] = read_preferences(write(row))
    assert [m.content for m in pair.prompt.messages] == ["be", "hi", "yo", "so"]
    assert (pair.chosen, pair.rejected) == ("a", "b")
    hh = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: so: who?\n\nAssistant:"
    [pair] = read_preferences(write({"chosen": hh + " a\n\nb", "rejected": hh}))
    assert [m.content for m in pair.prompt.messages] == ["hi", "yo", "so: who?"]
    assert (pair.chosen, pair.rejected) == ("a\n\nb", "")


def test_preference_details(write: Callable[..., Path]) -> None:
    rows = [
        {"prompt": "hi", **PAIR, "margin": 2, "annotator": "ann", "id": "p1", "prompt_id": 5,
         "kind": "k", "meta": {"a": 1}},
        {"prompt": "hi", **PAIR, "tie": True, "prompt_id": 5},
        {"prompt": "hi", "chosen": "yo", "rejected": "yo", "prompt_id": 5},
        {"prompt": "hi", **PAIR, "annotator": "bob", "prompt_id": 5},
        {"prompt": "hi", **PAIR, "annotator": "bob", "prompt_id": 5},
    ]  # fmt: skip
    first, tie, equal, bob, bob_again = read_preferences(write(*rows))
    assert (first.margin, first.annotator, first.id, first.prompt.id) == (2.0, "ann", "p1", "5")
    assert (first.prompt.kind, first.prompt.meta) == ("k", {"a": 1})
    assert tie.tie
    assert equal.tie  # two equal replies: neither can be better
    assert bob == bob_again  # rows may repeat
    assert len({p.id for p in (first, tie, equal, bob)}) == 4


def test_a_reply_with_thumbs_down_is_no_demonstration(write: Callable[..., Path]) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n != 1} for n in range(3)]
    with pytest.raises(UserError, match=r"line 2: field 'label': false, so the reply is no demonstration"):
        read_demonstrations(write(*rows))
    assert len(read_demonstrations(write(rows[0], rows[2]))) == 2


def test_labelled_steps_and_facts(write: Callable[..., Path]) -> None:
    up, down = read_labelled(
        write({"prompt": "hi", "completion": "yo", "label": True},
              {"prompt": HI, "completion": said(("assistant", "no")), "label": 0})
    )  # fmt: skip
    assert (up.completion, up.label, down.completion, down.label) == ("yo", True, "no", False)
    assert up.prompt.messages == down.prompt.messages == (user("hi"),)
    [steps] = read_steps(write({"prompt": "1+2*3?", "completions": ["2*3=6", "1+6=8"], "labels": [True, 0.25]}))
    assert (steps.steps, steps.labels) == (("2*3=6\n", "1+6=8"), (1.0, 0.25))
    by_index, by_text = read_facts(
        write(
            {"prompt": "2+2=", "choices": ["3", "4"], "answer": 1},
            {"prompt": "A", "choices": ["x", "y"], "answer": "x"},
        )
    )
    assert by_index == Fact(by_index.id, "2+2=", ("3", "4"), 1)
    assert by_text.answer == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "yo", "label": True},
        {"prompt": HI, "completion": HI_YO, "label": 1},
        {"messages": HI_YO, "label": "TRUE"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "kto_tag": True},
        {"instruction": "hi", "output": "yo", "kto_tag": "1.0"},
        {"prompt": "hi", "completion": "yo", "label": "Thumbs up"},
        {"prompt": "hi", "completion": "yo", "label": "desirable", "rating": 5},
        {"prompt": "hi", "completion": "yo", "label": None, "rating": 4.5},
        {"prompt": "hi", "completion": "yo", "label": "", "score": "5"},
    ],
)
def test_thumbs_of_every_form(write: Callable[..., Path], row: dict[str, Any]) -> None:
    file = write(row)
    (one,) = read_labelled(file, bounds=(2, 4))
    assert (one.prompt.messages, one.completion, one.label, one.finished) == ((user("hi"),), "yo", True, True)
    assert one.place == one.prompt.place == f"{file}, line 1"
    assert one.id == read_labelled(write({"prompt": "hi", "completion": "yo", "label": True}))[0].id


def test_ratings_above_and_below_their_bounds(write: Callable[..., Path]) -> None:
    file = write(*({"prompt": f"q{n}", "completion": "a", "rating": n} for n in range(1, 6)))
    told: list[int] = []
    notes: list[str] = []
    reading = Reading(note=notes.append, undecided=told.append)
    assert [(x.prompt.messages[0].content, x.label) for x in read_labelled(file, reading, (3, 3))] == [
        ("q1", False), ("q2", False), ("q4", True), ("q5", True),
    ]  # fmt: skip
    assert [x.label for x in read_labelled(file, reading, (2, 4))] == [False, True]
    assert told == [1, 3]
    assert notes == [f"{file}: {n} rows whose rating is neither up nor down are left out" for n in told]
    assert read_labelled(file, reading, (0, 9)) == []  # none of them says anything


def test_thumbs_on_gold_items_and_on_what_is_out_are_passed_over(write: Callable[..., Path]) -> None:
    row = {"prompt": "hi", "completion": "yo", "label": False, "annotator": "ann", "finished": False}
    kept, *none = read_labelled(write(row | {"gold": None}, row | {"gold": "up"}, row | {"out": True}))
    assert none == []
    assert (kept.annotator, kept.finished, kept.label) == ("ann", False, False)
    assert kept.id != read_labelled(write(row | {"finished": True}))[0].id


def test_ids_are_stable(write: Callable[..., Path]) -> None:
    row = {"prompt": "hi", **PAIR}
    first, second = read_preferences(write(row))[0], read_preferences(write(row, name="other.jsonl"))[0]
    assert first == second
    assert re.fullmatch("[0-9a-f]{32}", first.id)
    assert first.id != read_preferences(write({"prompt": "hi", "chosen": "no", "rejected": "yo"}))[0].id


# --------------------------------------------------------------------------------------------- every kind of file


def test_files_of_every_kind_give_the_same_records(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"messages": HI_YO, "id": "1"}, {"messages": said(("user", 'ünï\n"q"'), ("assistant", "a,b")), "id": "2"}]
    expected = read_demonstrations(write(*rows))
    assert len(expected) == 2
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "crlf.jsonl").write_bytes("\r\n\r\n".join(json.dumps(r) for r in rows).encode("utf-8-sig"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "messages"])
        table.writerows([row["id"], json.dumps(row["messages"])] for row in rows)
    for name in ("a.json", "crlf.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"):
        assert read_demonstrations(tmp_path / name) == expected, name


def test_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected,margin,tie,annotator\n"two\nlines",yo,,,,\nhi,yo,no,1.5,true,ann\n')
    first, second = read_preferences(path)
    assert (first.prompt.messages[0].content, first.rejected, first.margin, first.tie) == ("two\nlines", "", 0.0, False)
    assert (second.margin, second.tie, second.annotator) == (1.5, True, "ann")
    path.write_text("prompt,completion,label\nhi,yo,True\nhi,no,0\n")
    assert [x.label for x in read_labelled(path)] == [True, False]
    long = "x" * 200_000  # more than the csv module's default bound of a field
    path.write_text(f'prompt,choices,answer\n{long},"[""a"", ""b""]",1\n')
    assert read_facts(path)[0].prompt == long
    assert csv.field_size_limit() == 131_072


def test_a_folder_is_its_data_files_in_order(tmp_path: Path, write: Callable[..., Path]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"text": "second"}\n')
    (folder / "a.json").write_text('[{"text": "first"}]')
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("broken")
    assert read_texts(folder) == ["first", "second"]


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist")
        return [{"text": "a", "other": None}, {"text": "b"}]

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("hub:owner/name") == read_texts("hub:owner/name:test") == ["a", "b"]
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(UserError, match=r"hub:no/such: the data set cannot be loaded: .*doesn't exist.*check its name"):
        read_texts("hub:no/such")
    with pytest.raises(UserError, match=r"hub:owner/name, row 1 \(and 1 more\): columns are text; expected prompt"):
        read_prompts("hub:owner/name")
    with pytest.raises(UserError, match="expected hub:owner/name"):
        read_texts("hub:")


# -------------------------------------------------------------------------------------------------- what is wrong


def fails(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (read_demonstrations, {"messages": "hi"},
         "field 'messages': expected a list or an object in JSON, got the text"),
        (read_demonstrations, {"messages": []}, "field 'messages': expected a list of messages, got a list []"),
        (read_demonstrations, {"messages": ["hi"]}, "field 'messages[0]': expected a message with role and content"),
        (read_demonstrations, {"messages": said(("tool", "x"))},
         "field 'messages[0].role': expected system, user or assistant, got the text \"tool\""),
        (read_demonstrations, {"messages": [*HI, {"role": "assistant", "content": None}]},
         "field 'messages[1]': expected a text, got null"),
        (read_demonstrations, {"messages": [*HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]},
         "field 'messages[1].tool_calls': expected messages of text alone"),
        (read_demonstrations, {"messages": [*HI, {"role": "assistant", "content": "", "weight": 0}]},
         "none of its replies is learned"),
        (read_demonstrations, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content parts"),
        (read_demonstrations, {"messages": HI}, "ends with a message of the user; expected the assistant's"),
        (read_demonstrations, {"prompt": 3, "completion": "x"}, "field 'prompt': expected a text, got the number 3"),
        (read_demonstrations, {"prompt": " ", "completion": "x"}, "field 'prompt': expected a text that is not blank"),
        (read_demonstrations, {"prompt": "hi", "response": "x"},
         "columns are prompt, response; expected messages | conversations | prompt+completion |"),
        (read_demonstrations, {"instruction": "add", "input": "1", "context": "2", "output": "3"},
         "fields input and context give different inputs; keep one"),
        (read_demonstrations, {"instruction": "add", "output": "3", "response": "4"},
         "fields output and response give different replies; keep one"),
        (read_demonstrations, {"text": "\ud800"}, "half a character"),
        (read_texts, {"text": ["a"]}, "field 'text': expected a text or content parts"),
        (read_texts, {"body": "a"}, "columns are body; expected text"),
        (read_prompts, {"prompt": HI_YO},
         "field 'prompt': expected messages that end with the user's, got the assistant's"),
        (read_prompts, {"prompt": "hi", "meta": [1]}, "field 'meta': expected an object, got a list [1]"),
        (read_prompts, {"prompt": "hi", "meta": {"a": 1}, "a": 2}, "field 'a' is both in meta and a column"),
        (read_prompts, {"prompt": "hi", "kind": 1.5}, "field 'kind': expected a text, got the number 1.5"),
        (read_preferences, {"prompt": "hi", "chosen": "x"},
         "columns are prompt, chosen; expected prompt+chosen+rejected | chosen+rejected"),
        (read_preferences, PAIR, "field 'chosen': expected messages, or turns that begin with Human:"),
        (read_preferences, {"chosen": HI_YO, "rejected": said(("user", "oh"), ("assistant", "no"))},
         "share no first message"),
        (read_preferences, {"chosen": HI_YO + HI_YO, "rejected": HI_YO},
         "field 'chosen': expected one message of the assistant after the prompt, got assistant, user, assistant"),
        (read_preferences, {"prompt": "hi", "chosen": HI, "rejected": "no"}, "after the prompt, got none"),
        (read_preferences, {"prompt": "hi", **PAIR, "margin": -1},
         "field 'margin': expected a number of at least 0, got"),
        (read_preferences, {"prompt": "hi", **PAIR, "margin": "big"}, "field 'margin': expected a number"),
        (read_preferences, {"prompt": "hi", **PAIR, "margin": True}, "field 'margin': expected a number"),
        (read_preferences, {"prompt": "hi", **PAIR, "tie": "perhaps"},
         "field 'tie': expected true or false, got the text"),
        (read_preferences, {"input": {"messages": HI, "tools": [{"type": "function"}]},
          "preferred_output": [], "non_preferred_output": []},
         "field 'input.tools': expected rows without tools"),
        (read_preferences, {"input": {}, "preferred_output": [], "non_preferred_output": []},
         "field 'input.messages': expected a list of messages, got null"),
        (read_labelled, {"prompt": "hi", "completion": "x", "label": 2},
         "field 'label': expected true or false, got the number 2"),
        (read_labelled, {"prompt": "hi", "completion": "x"},
         "columns are prompt, completion; expected prompt+completion | messages | conversations | instruction+output"),
        (read_labelled, {"prompt": "hi", "response": "x", "label": 1}, "columns are prompt, response, label; expected"),
        (read_labelled, {"prompt": "hi", "completion": "x", "label": "meh"}, "expected true or false, got the text"),
        (read_labelled, {"prompt": "hi", "completion": "x", "label": True, "kto_tag": False},
         "fields label and kto_tag disagree; keep one"),
        (read_labelled, {"prompt": "hi", "completion": "x", "rating": 4},
         "field 'rating': a rating is thumbs up above a bound and down below it; set the stage's rating_bound"),
        (read_labelled, {"prompt": "hi", "completion": "x", "rating": 4, "score": 2}, "fields rating and score differ"),
        (read_labelled, {"prompt": "hi", "completion": "x", "score": "high"}, "field 'score': expected a number, got"),
        (read_labelled, {"messages": HI, "label": 1}, "expected messages that end with the assistant's reply"),
        (read_labelled, {"messages": HI_YO + HI_YO[1:], "label": 1}, "expected messages that end with the user's"),
        (read_labelled, {"prompt": "hi", "completion": "x", "label": 1, "weight": 2}, "because every row counts alike"),
        (read_steps, {"prompt": "hi", "completions": ["a"], "labels": [1, 0]},
         "expected a list of 1 labels, one a completion"),
        (read_steps, {"prompt": "hi", "completions": ["a"], "labels": [7]},
         "field 'labels': expected a number from 0 to 1, got"),
        (read_steps, {"prompt": "hi", "completions": [], "labels": []},
         "field 'completions': expected a list of texts, got"),
        (read_facts, {"prompt": "hi", "choices": ["a"], "answer": 0},
         "field 'choices': expected two different texts or more"),
        (read_facts, {"prompt": "hi", "choices": ["a", ""], "answer": 0}, "'choices': one of them is empty"),
        (read_facts, {"prompt": "hi", "choices": ["a", "b"], "answer": 2},
         "expected a whole number from 0 to 1, got the number 2"),
        (read_facts, {"prompt": "hi", "choices": ["a", "b"], "answer": 0.5}, "expected a whole number from 0 to 1"),
        (read_facts, {"prompt": "hi", "choices": ["a", "b"], "answer": "c"}, "expected a whole number from 0 to 1"),
    ],
)  # fmt: skip
def test_bad_row(write: Callable[..., Path], read: Callable[[Path], Any], row: dict[str, Any], words: str) -> None:
    path = write(row)
    message = fails(read, path)
    assert message.startswith(f"{path}: 1 of 1 rows cannot be read\n  {path}, line 1: ")
    assert words in message


def test_several_bad_rows_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "hi"}\n'
    path.write_text(good + "{broken\n" + "\n" + "[1]\n" + good + '{"prompt": 4}\n' + '{"q": 1}\n' * 3)
    message = fails(read_prompts, path)
    assert "6 of 8 rows cannot be read" in message
    lines = message.split("\n")[1:]
    assert [re.search(r"line \d+", line)[0] for line in lines] == ["line 2", "line 4", "line 6", "line 7"]  # type: ignore[index]
    assert "expected one JSON object a line, got broken JSON" in lines[0]
    assert "expected an object of fields, got a list [1]" in lines[1]
    assert "line 7 (and 2 more): columns are q;" in lines[3]
    path.write_text("".join(json.dumps({"prompt": number}) + "\n" for number in range(9)))
    message = fails(read_prompts, path)
    assert "9 of 9 rows" in message
    assert len(message.split("\n")) == 1 + 5 + 1  # the head, five rows, "..."


def test_a_home_that_nobody_has_is_no_such_file() -> None:
    assert "no such file or folder" in fails(read_texts, Path("~nobody-is-called-so/rows.jsonl"))


def test_parquet_and_csv_rows_are_counted_from_one(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": " "}]), tmp_path / "t.parquet")
    assert f"{tmp_path / 't.parquet'}, row 2: field 'text'" in fails(read_texts, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text('id,text\n1,"two\nlines"\n2,"not\nblank"\n3, \n4,a,b\n')
    message = fails(read_texts, tmp_path / "t.csv")
    assert "line 6: field 'text': expected a text that is not blank" in message
    assert "line 7: expected 2 cells, got 3" in message
    (tmp_path / "t.json").write_text('[{"text": "a"}, 5]')
    assert "item 2: expected an object of fields, got the number 5" in fails(read_texts, tmp_path / "t.json")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file or folder; name a .jsonl, .json, .csv, .parquet file"),
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n \n", "no rows"),
        ("empty.json", b"", "no rows"),
        ("none.json", b"[]", "no rows"),
        ("empty.csv", b"", "no rows"),
        ("head.csv", b"text\n", "no rows"),
        ("object.json", b'{"text": "a"}', "expected a list of objects, got an object"),
        ("lines.json", b'{"text": "a"}\n{"text": "b"}', "a file of one JSON object a line is named .jsonl"),
        ("torn.json", b'[{"text": ', "broken JSON"),
        ("latin.jsonl", '{"text": "a"}\n{"text": "é"}'.encode("latin-1"), "line 2: byte 0xe9 is not UTF-8 text"),
        ("utf16.csv", "text\na".encode("utf-16"), "line 1: byte 0xff is not UTF-8 text; save the file as UTF-8"),
        ("words.txt", b"a", "unknown kind of file; expected a name ending in .jsonl"),
        ("fake.parquet", b"nothing of the kind", "cannot be read as Parquet"),
        ("fake.jsonl.gz", b"nothing of the kind", "cannot be read"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-12], "cannot be read"),
        ("twice.csv", b"text,text\na,b\n", "line 1: column text is there twice"),
        ("quote.csv", b'text\n"a" b\n', "broken CSV"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = fails(read_texts, path)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message.strip()


def test_empty_folder(tmp_path: Path) -> None:
    assert "the folder holds no data file" in fails(read_texts, tmp_path)


def test_conflicting_ids(write: Callable[..., Path]) -> None:
    path = write({"prompt": "a", "id": "x"}, {"prompt": "a", "id": "x"})
    assert len(read_prompts(path)) == 2  # the same row twice is allowed
    path = write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"})
    assert f"line 2: field 'id': 'x' already names a different row ({path}, line 1)" in fails(read_prompts, path)
    path = write({"prompt": "a", **PAIR, "prompt_id": "x"}, {"prompt": "b", **PAIR, "prompt_id": "x"})
    assert "line 2: field 'prompt_id': 'x' already names a different row" in fails(read_preferences, path)
    path = write({"prompt": "a", "kind": "k"}, {"prompt": "a", "kind": "l"})
    assert "line 2: the same content is there with another kind, meta or prompt_id at" in fails(read_prompts, path)


def test_the_documented_examples_are_read(tmp_path: Path) -> None:
    pages = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    readers = {
        "Demonstrations": read_demonstrations,
        "Prompts": read_prompts,
        "Preferences": read_preferences,
        "Thumbs up and down": read_labelled,
        "Labelled steps": read_steps,
        "Plain text": read_texts,
        "Facts": read_facts,
    }
    for title, read in readers.items():
        examples = re.search(rf"\n### {title}\b.*?```json\n(.*?)```", pages, re.DOTALL)
        assert examples, title
        path = tmp_path / "examples.jsonl"
        path.write_text(examples[1], encoding="utf-8")
        assert len(read(path)) == examples[1].count("\n"), title
