"""Files of the kinds that people have trouble with: each is read right, or refused with file, line and field.

The files are made here, small. What a row must become is written out by hand; that a value can be kept is asked of the
store itself.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.check import check_recipe
from keel.cli import main
from keel.cli.exchange import read_votes
from keel.data.chat import install_template
from keel.data.columns import MESSAGE, PAIRED, SYSTEM, TAUGHT, TRAINED, WEIGHTS
from keel.data.rows import Reading
from keel.data.sources import (
    read_demonstrations,
    read_facts,
    read_labelled,
    read_preferences,
    read_prompts,
    read_steps,
    read_texts,
)
from keel.recipe.recipe import Recipe
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stages.inputs import BAD_ROWS, demonstrations, preferences, training_prompts, write_kept
from keel.store import Store
from keel.store.foreign import Names
from keel.types import Completion, Message, Prompt, UserError
from tests.tiny import save_tiny, tiny_tokenizer

READERS = (read_demonstrations, read_prompts, read_preferences, read_labelled, read_steps, read_texts, read_facts)
HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SO, NO = {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, learned: bool = True) -> Message:
    return Message("assistant", text, learned)


def system(text: str) -> Message:
    return Message("system", text)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def fails(read: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    return str(caught.value)


# ------------------------------------------------------------------------------------- columns beside what is learned


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, YO]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"prompt": "hi", "completion": "yo"},
        {"prompt": [HI], "completion": [YO]},
        {"prompt": [HI], "completion": [HI, YO]},
        {"prompt": "hi", "completion": [HI, YO]},
        {"instruction": "hi", "output": "yo"},
        {"messages": [{"role": "system", "content": "be"}, HI, YO]},
    ],
)
def test_a_system_column_comes_first(write: Write, name: str, row: dict[str, Any]) -> None:
    [demonstration] = read_demonstrations(write({**row, name: "be"}))
    assert demonstration.messages == (system("be"), user("hi"), assistant("yo"))
    [without] = read_demonstrations(write({**row, name: " "}))
    assert without.messages[-2:] == (user("hi"), assistant("yo"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
        {"prompt": "hi", "chosen": [HI, YO], "rejected": [HI, NO]},
        {"chosen": [HI, YO], "rejected": [HI, NO]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"input": {"messages": [HI]}, "preferred_output": [YO], "non_preferred_output": [NO]},
    ],
)
def test_a_system_column_is_part_of_a_pair_s_prompt(write: Write, row: dict[str, Any]) -> None:
    [pair] = read_preferences(write({**row, "system": "be"}))
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == ((system("be"), user("hi")), "yo", "no")


def test_a_system_column_of_prompts_is_asked_and_no_meta(write: Write) -> None:
    for row in ({"prompt": "hi"}, {"prompt": [HI]}, {"messages": [HI]}, {"instruction": "hi"}):
        [prompt] = read_prompts(write({**row, "system_prompt": "be", "answer": 1}))
        assert (prompt.messages, prompt.meta) == ((system("be"), user("hi")), {"answer": 1})


def test_two_system_messages_are_refused(write: Write) -> None:
    other = [{"role": "system", "content": "be brief"}, HI, YO]
    words = "line 1: field 'system': the messages have another system message; keep one"
    assert words in fails(read_demonstrations, write({"messages": other, "system": "be"}))
    words = "fields system and system_prompt give different system messages; keep one"
    assert words in fails(read_prompts, write({"prompt": "hi", "system": "be", "system_prompt": "do"}))
    assert "without the system message" in fails(read_demonstrations, write({"text": "hi", "system": "be"}))


@pytest.mark.parametrize("history", [[["a", "b"], ["c", "d"]], json.dumps([["a", "b"], ["c", "d"]])])
def test_history_stands_between_the_system_message_and_the_prompt(write: Write, history: Any) -> None:
    rounds = (user("a"), assistant("b"), user("c"), assistant("d"))
    row = {"instruction": "hi", "input": "", "history": history, "system": "be"}
    assert read_demonstrations(write({**row, "output": "yo"}))[0].messages == (
        *(system("be"), *rounds, user("hi")),
        assistant("yo"),
    )
    assert read_prompts(write(row))[0].messages == (system("be"), *rounds, user("hi"))
    pair = {"prompt": "hi", "chosen": "yo", "rejected": "no", "history": history}
    assert read_preferences(write(pair))[0].prompt.messages == (*rounds, user("hi"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    row = {"prompt": "hi", "completion": "yo", "history": turns}
    assert read_demonstrations(write(row))[0].messages[:2] == (user("a"), assistant("b", False))


def test_history_that_cannot_be_told_is_refused(write: Write) -> None:
    assert "put the earlier rounds among them" in fails(
        read_demonstrations, write({"messages": [HI, YO], "history": [["a", "b"]]})
    )
    for wrong in ([["a"]], "a", [["a", 1]], 5):
        words = "field 'history': expected "
        assert words in fails(read_prompts, write({"prompt": "hi", "history": wrong})), wrong
    for nothing in ([], "[]", "", None):
        assert read_prompts(write({"prompt": "hi", "history": nothing}))[0].messages == (user("hi"),)


@pytest.mark.parametrize("name", [*WEIGHTS, *TRAINED])
def test_what_is_not_to_be_learned_is_said_in_any_spelling(write: Write, name: str) -> None:
    for no in (0, 0.0, False, "false"):
        messages = [{**HI, name: no}, {**YO, name: no}, {**SO, name: None}, {**NO, name: 1.0}]
        [demonstration] = read_demonstrations(write({"messages": messages}))
        assert demonstration.messages == (user("hi"), assistant("yo", False), user("so"), assistant("no"))
    words = "none of its replies is learned"
    assert words in fails(read_demonstrations, write({"messages": [HI, {**YO, name: 0}]}))
    words = f"field 'messages[1].{name}': expected 0 or 1"
    assert words in fails(read_demonstrations, write({"messages": [HI, {**YO, name: 0.5}]}))
    taught = write({"messages": [{**HI, name: True}, YO]})
    if name in TRAINED:
        assert f"field 'messages[0].{name}': true, and a message of the user" in fails(read_demonstrations, taught)
    else:  # some tools write a weight of 1 on every message
        assert read_demonstrations(taught)[0].messages == (user("hi"), assistant("yo"))
    pair = {"chosen": [HI, {**YO, name: 0}], "rejected": [HI, NO]}  # there it says nothing
    assert read_preferences(write(pair))[0].chosen == "yo"
    [prompt] = read_prompts(write({"messages": [HI, {**YO, name: 0}, SO]}))
    assert prompt.messages == (user("hi"), assistant("yo"), user("so"))


def test_flags_that_disagree_or_mean_two_things_are_refused(write: Write) -> None:
    row = {"messages": [HI, {**YO, "weight": 1, "train": False}]}
    assert "weight and train disagree on whether it is learned" in fails(read_demonstrations, write(row))
    row = {"messages": [HI, {**YO, "mask": 1}]}
    assert "field 'messages[1].mask': it means learned to some tools" in fails(read_demonstrations, write(row))
    assert read_demonstrations(write({"messages": [{**HI, "mask": 1}, YO]}))


def test_replies_in_a_prompt_are_shown_and_not_learned(write: Write) -> None:
    """As TRL's loss on completions alone."""
    row = {"prompt": [HI, YO, SO], "completion": [NO]}
    messages = (user("hi"), assistant("yo", False), user("so"), assistant("no"))
    assert read_demonstrations(write(row))[0].messages == messages
    row = {"prompt": [HI, YO, SO], "completion": [HI, YO, SO, NO]}
    assert read_demonstrations(write(row))[0].messages == messages


DEMO: dict[str, Any] = {"messages": [HI, YO]}
PAIR: dict[str, Any] = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
TOOLS = '[{"type": "function", "function": {"name": "tide"}}]'


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("tools", TOOLS), ("tools", json.loads(TOOLS)), ("functions", [{"name": "tide"}]), ("images", ["p.png"])),
        *(("image", {"path": "p.png", "bytes": None}), ("videos", ["v.mp4"]), ("audio", "a.wav")),
        *(("chat_template_kwargs", {"enable_thinking": False}), ("enable_thinking", False)),
        *(("weight", 0.5), ("sample_weight", 0), ("completion_mask", [0, 1]), ("mask", "Assistant"), ("label", False)),
        *(
            ("kto_tag", "false"),
            ("label", 0),
            ("thinking", "Hm."),
            ("reasoning_content", "Hm."),
            ("mask_history", True),
        ),
    ],
)
def test_a_column_that_changes_what_is_learned_is_refused(write: Write, column: str, value: Any) -> None:
    path = write({**DEMO, column: value})
    assert f"{path}, line 1: field '{column}': " in fails(read_demonstrations, path)
    if column in PAIRED:
        assert f"field '{column}': " in fails(read_preferences, write({**PAIR, column: value}))
    if column in ("label", "weight"):  # what a grader may want of a prompt
        assert read_prompts(write({"prompt": "hi", column: value}))[0].meta == {column: value}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("tools", None), ("tools", []), ("tools", "[]"), ("tools", [{"name": None}]), ("images", []), ("image", "")),
        *(("weight", 1), ("weight", 1.0), ("sample_weight", "1"), ("label", True), ("label", 1), ("mask", "User")),
        *(("chat_template_kwargs", {}), ("enable_thinking", None), ("mask_history", False), ("thinking", " ")),
        *(("system", ""), ("history", [])),
    ],
)
def test_a_column_that_says_nothing_is_passed_over_in_silence(write: Write, column: str, value: Any) -> None:
    said: list[str] = []
    assert read_demonstrations(write({**DEMO, column: value}), Reading(note=said.append))[0].messages == (
        user("hi"),
        assistant("yo"),
    )
    assert said == []


@pytest.mark.parametrize("field", MESSAGE)
def test_a_message_field_that_changes_what_is_learned_is_refused(write: Write, field: str) -> None:
    path = write({"messages": [HI, {**YO, field: ["x"]}]})
    for read in (read_demonstrations, read_prompts):
        assert f"{path}, line 1: field 'messages[1].{field}': expected" in fails(read, path)
    pair = {"chosen": [HI, {**YO, field: "x"}], "rejected": [HI, NO]}
    assert f"field 'chosen[1].{field}': expected" in fails(read_preferences, write(pair))
    for nothing in (None, "", [], {}):
        assert read_demonstrations(write({"messages": [HI, {**YO, field: nothing}]}))


def test_pictures_among_the_parts_of_a_message_are_refused(write: Write) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}, YO]}
    assert "line 1: field 'messages[0]': expected a text or content parts" in fails(read_demonstrations, write(row))


def test_unused_columns_are_named_once_a_file(tmp_path: Path, write: Write) -> None:
    said: list[str] = []
    reading = Reading(note=said.append)
    path = write({**DEMO, "source": "x", "empty": None}, {"messages": [{**HI, "time": 3}, YO], "score": 1})
    read_demonstrations(path, reading)
    assert said == [f"{path}: columns source, score, messages[].time are not used"]
    said.clear()
    read_demonstrations(write({**DEMO, "prompt": "hi", "reward": 1}), reading)  # its own reward is Keel's
    assert said == [f"{path}: column prompt is not used"]
    said.clear()
    read_prompts(write({"prompt": "hi", "source": "x"}), reading)  # kept in meta
    assert said == []
    read_demonstrations(write({**DEMO, **{f"c{n}": n for n in range(40)}}), reading)
    assert said[0].endswith("c10, c11 and 28 more are not used")


@pytest.mark.parametrize("role", ["User", "human", " HUMAN", "prompter"])
def test_roles_in_other_spellings(write: Write, role: str) -> None:
    for reply in ("Assistant", "GPT", "bot", "model", "ai"):
        rows = [{"from": role, "value": "hi"}, {"from": reply, "value": "yo"}]
        assert read_demonstrations(write({"conversations": rows}))[0].messages == (user("hi"), assistant("yo"))
    assert "expected system, user or assistant" in fails(
        read_demonstrations, write({"messages": [{"role": "observation", "content": "x"}, YO]})
    )


def test_a_conversation_that_begins_with_the_assistant_is_refused(write: Write) -> None:
    words = "line 1: the conversation begins with the assistant's message; put the user's before it"
    assert words in fails(read_demonstrations, write({"messages": [YO, HI, NO]}))
    assert words in fails(read_demonstrations, write({"messages": [{"role": "system", "content": "be"}, YO, HI, NO]}))
    [shown] = read_demonstrations(write({"messages": [{**YO, "weight": 0}, HI, NO]}))
    assert shown.messages == (assistant("yo", False), user("hi"), assistant("no"))
    [prompt] = read_prompts(write({"messages": [YO, HI]}))
    assert prompt.messages == (assistant("yo"), user("hi"))


def test_kept_replies_can_be_read_again(tmp_path: Path) -> None:
    """What a stage wrote after compute must not be refused by the next: greetings, and bytes that models can write."""
    prompt = Prompt("p", (assistant("welcome"), user("hi"), assistant("yo"), user("so")))
    write_kept(tmp_path / "kept.jsonl", [prompt], [[Completion("a\0b\ud83d"), Completion("")]])
    first, empty = read_demonstrations(tmp_path / "kept.jsonl")
    before = (assistant("welcome", False), user("hi"), assistant("yo", False), user("so"))
    assert first.messages == (*before, assistant("a\ufffdb\ufffd"))
    assert empty.messages == (*before, assistant(""))


def test_right_to_left_text_is_read_as_it_stands(write: Write) -> None:
    text = "\u05e9\u05dc\u05d5\u05dd \u202eevil =HYPERLINK(1)"
    [pair] = read_preferences(write({"prompt": text, "chosen": text, "rejected": "b", "annotator": text}))
    assert (pair.prompt.messages, pair.chosen, pair.annotator) == ((user(text),), text, text)


# ----------------------------------------------------------------------------------------------------------- values


def test_values_that_json_lacks_get_their_plain_form(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a"],
        "at": pa.array([datetime(2024, 5, 1, 12)], pa.timestamp("us")),
        "zoned": pa.array([datetime(2024, 5, 1, 12, tzinfo=UTC)], pa.timestamp("us", "UTC")),
        "day": pa.array([datetime(2024, 5, 1).date()], pa.date32()),
        "price": pa.array([Decimal("1.50")], pa.decimal128(3, 2)),
        "whole": pa.array([Decimal(12)], pa.decimal128(3, 0)),
        "score": [float("nan")],
        "deep": [{"scores": [1.0, float("nan")], "at": datetime(2024, 5, 1)}],
        "pairs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    [prompt] = read_prompts(tmp_path / "t.parquet")
    assert prompt.meta == {
        "at": "2024-05-01T12:00:00",
        "zoned": "2024-05-01T12:00:00+00:00",
        "day": "2024-05-01",
        "price": 1.5,
        "whole": 12,
        "deep": {"scores": [1.0, None], "at": "2024-05-01T00:00:00"},
        "pairs": [["a", 1]],
    }
    assert _kept(tmp_path, [prompt]) == [prompt.meta]


def _kept(tmp_path: Path, prompts: list[Prompt]) -> list[Any]:
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        store.add_prompts(prompts)
        return [prompt.meta for prompt in store.prompts()]


def test_missing_numbers_leave_equal_prompts_equal(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b", "a"], "score": [float("nan")] * 3})
    pq.write_table(table, tmp_path / "t.parquet")
    first, _, again = read_prompts(tmp_path / "t.parquet")
    assert first == again
    assert first.meta == {}


def test_values_of_datasets_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "prompt": np.str_("a"),
        "n": np.int64(3),
        "x": np.float32(0.5),
        "none": np.float32("nan"),
        "yes": np.bool_(True),
        "list": np.array([[1.0, np.nan]]),
        "at": np.datetime64("2024-05-01T00:00:00", "ns"),
        "pair": (1, 2),
    }
    fake = SimpleNamespace(load_dataset=lambda name, split: [row])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    [prompt] = read_prompts("hub:a/b")
    assert prompt.meta == {
        "n": 3,
        "x": 0.5,
        "none": None,
        "yes": True,
        "list": [[1.0, None]],
        "pair": [1, 2],
        "at": "2024-05-01T00:00:00.000000000",
    }
    assert type(prompt.meta["n"]) is int
    assert type(prompt.meta["yes"]) is bool


HALF, HUGE = "half \ud83d", 10**400


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "kind": HALF}, "field 'kind': character 6 is half a character"),
        ({"prompt": "a", "id": HALF}, "field 'id': character 6 is half a character"),
        ({"prompt": "a", "meta": {"x": [1, {"y": HALF}]}}, "field 'meta.x[1].y': character 6 is half"),
        ({"prompt": "a", "meta": {HALF: 1}}, "field 'meta': character 6 is half"),
        ({"prompt": "a", "note": HALF}, "field 'note': character 6 is half a character"),
        ({"prompt": "a\0b"}, "field 'prompt': character 2 is NUL, which databases refuse"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "field 'messages[0].content': character 2 is NUL"),
        ({"prompt": "a", "kind": "\0"}, "field 'kind': character 1 is NUL"),
        ({"prompt": "a", "answer": HUGE}, "field 'answer': expected a number that a float holds"),
        ({"prompt": "a", "meta": '{"x": "\\ud83d"}'}, "field 'meta.x': character 1 is half"),
        ({"prompt": "a", "meta": {"x": float("inf")}}, "field 'meta.x': expected a finite number, got infinity"),
        ({"prompt": "a", "deep": json.loads("[" * 200 + "]" * 200)}, "expected at most 100 lists"),
    ],
)
def test_values_that_no_store_holds_are_found_when_read(write: Write, row: dict[str, Any], words: str) -> None:
    path = write(row)
    message = fails(read_prompts, path)
    assert f"{path}, line 1: field '" in message
    assert words in message
    message.encode()  # a terminal can show it


def test_numbers_beyond_float(write: Write, tmp_path: Path) -> None:
    assert "line 1: field 'margin': expected a number that a float holds" in fails(
        read_preferences, write({**PAIR, "margin": HUGE})
    )
    path = tmp_path / "inf.jsonl"
    path.write_text(json.dumps(PAIR)[:-1] + ', "margin": 1e999}\n')
    assert "line 1: field 'margin': expected a finite number" in fails(read_preferences, path)
    assert "field 'margin': expected a number of at least 0" in fails(
        read_preferences, write({**PAIR, "margin": "9" * 400})
    )


def test_bytes_are_refused_where_they_are_needed_alone(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "completion": ["b"], "blob": [b"\x89PNG"]})
    pq.write_table(table, tmp_path / "t.parquet")
    message = fails(read_prompts, tmp_path / "t.parquet")
    assert f"{tmp_path / 't.parquet'}, row 1: field 'blob': expected a text, got bytes" in message
    assert len(read_demonstrations(tmp_path / "t.parquet")) == 1


def test_what_cannot_be_shown_is_spelled_out_in_errors(write: Write) -> None:
    message = fails(read_prompts, write({HALF: 1, "\x1b[31m": 2}))
    message.encode()
    assert "\x1b" not in message


def test_imports_find_them_as_well(tmp_path: Path, write: Write) -> None:
    assert "line 1: field 'meta.note': character 6 is half" in fails(
        read_votes, str(write({**PAIR, "meta": {"note": HALF}})), Names()
    )
    own = {"id": "t", "annotator_kind": "person", "prompt_id": "p", "batch": "b", "reason": "a\0b"}
    assert "line 1: field 'reason': character 2 is NUL" in fails(read_votes, str(write(own)), Names())
    task = {"data": {"prompt": "hi\0", "a": "x", "b": "y"}, "annotations": []}
    assert "line 1: field 'data.prompt': character 3 is NUL" in fails(read_votes, str(write(task)), Names())


@pytest.mark.parametrize(
    "change", [{"id": HALF}, {"kind": "\0"}, {"meta": {"x": HALF}}, {"messages": (Message("user", "a\0"),)}]
)
def test_the_store_says_what_it_cannot_hold(tmp_path: Path, change: dict[str, Any]) -> None:
    prompt = replace(Prompt("p", (user("hi"),)), **change)
    assert "can't be stored: character " in fails(_kept, tmp_path, [prompt])


# ------------------------------------------------------------------------------------------------ rows that are bad

_HH = "\n\nHuman: Open?\n\nAssistant: {}"


def _hh(path: Path, good: int) -> Path:
    """The form of the published HH file, with one row in which the assistant speaks twice."""
    rows = [{"chosen": _HH.format(f"Yes {n}."), "rejected": _HH.format("No idea.")} for n in range(good)]
    rows.insert(1, {"chosen": _HH.format("I looked.\n\nAssistant: Yes."), "rejected": _HH.format("No idea.")})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_turns_of_the_assistant_are_an_error_or_left_out(tmp_path: Path) -> None:
    path = _hh(tmp_path / "hh.jsonl", good=4)
    message = fails(read_preferences, path)
    assert message.startswith(f"{path}: 1 of 5 rows cannot be read\n  {path}, line 2: field 'chosen': 2 turns of the")
    assert "join them, or leave such rows out with data.on_bad_row: skip" in message
    told: list[tuple[str, str, str]] = []
    pairs = read_preferences(path, Reading("skip", skipped=lambda bad: told.extend(bad.found)))
    assert [pair.chosen for pair in pairs] == ["Yes 0.", "Yes 1.", "Yes 2.", "Yes 3."]
    [(file, line, problem)] = told
    assert (file, line) == (str(path), "line 2")
    assert "2 turns of the assistant" in problem


def test_rows_that_are_all_bad_are_an_error_all_the_same(write: Write) -> None:
    path = write({"q": 1}, {"q": 2})
    assert "2 of 2 rows cannot be read" in fails(read_prompts, path, Reading("skip"))


def test_broken_lines_are_skipped_too(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    told: list[str] = []
    assert read_texts(path, Reading("skip", skipped=lambda bad: told.extend(line for _, line, _ in bad.found))) == [
        "a",
        "b",
    ]
    assert told == ["line 2", "line 3"]


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def _context(tmp_path: Path, stage: dict[str, Any], **data: Any) -> tuple[Any, StageContext, Notes]:
    tree = {"model": {"path": "m"}, "data": data, "stages": [{"name": "s", "model": "base", **stage}]}
    recipe, run, notes = Recipe.model_validate(tree), RunDir(tmp_path / "run"), Notes()
    return recipe.stages[0], StageContext(recipe, run, run.stage("s"), notes, "cpu"), notes


def test_a_stage_lists_all_that_it_left_out(tmp_path: Path, write: Write) -> None:
    path = _hh(tmp_path / "hh.jsonl", good=3)
    stage, context, _ = _context(tmp_path, {"kind": "dpo"}, preferences=str(path))
    assert "1 of 4 rows cannot be read" in fails(preferences, stage, context)
    stage, context, notes = _context(tmp_path, {"kind": "dpo"}, preferences=str(path), on_bad_row="skip")
    for _ in range(2):  # a stage that goes on after a kill reads its files again
        assert len(preferences(stage, context).pairs) == 3
    [listed] = (context.stage_dir.path / BAD_ROWS).read_text().splitlines()
    assert json.loads(listed)["line"] == "line 2"
    assert notes.said[0].startswith(f"{path}: 1 of 4 rows cannot be read and are left out; all of them are in ")
    assert f"\n  {path}, line 2: field 'chosen': 2 turns" in notes.said[0]

    bad = [{"prompt": n} for n in range(9)]
    prompts = write({"prompt": "a"}, *bad, {"prompt": "b"}, name="prompts.jsonl")
    settings = {"prompts": str(prompts), "heldout_prompts": str(write({"prompt": "b"})), "on_bad_row": "skip"}
    _, context, notes = _context(
        tmp_path, {"kind": "grpo", "rewards": [{"source": {"kind": "python", "ref": "a:b"}}]}, **settings
    )
    assert [prompt.messages[0].content for prompt in training_prompts(None, context)] == ["a"]
    assert len((context.stage_dir.path / BAD_ROWS).read_text().splitlines()) == 10  # the pair's stays
    assert notes.said[0].endswith("\n  ...")


def test_a_stage_notes_what_it_does_not_use(tmp_path: Path, write: Write) -> None:
    path = write({**DEMO, "source": "x"})
    stage, context, notes = _context(tmp_path, {"kind": "sft"}, demonstrations=str(path))
    [(_, [demonstration])] = demonstrations(stage, context)[0]
    assert notes.said == [f"{path}: column source is not used"]
    assert demonstration.place == f"{path}, line 1"


def test_messages_in_a_csv_s_cells(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])
        table.writerow([json.dumps([HI]), json.dumps([YO]), "no"])
        table.writerow(['[{"a": 1}]', "[{", "[1]"])
    first, second = read_preferences(path)
    assert (first.prompt.messages, first.chosen, first.rejected) == ((user("hi"),), "yo", "no")
    assert (second.prompt.messages, second.chosen, second.rejected) == ((user('[{"a": 1}]'),), "[{", "[1]")


def test_records_know_their_place(write: Write) -> None:
    path = write({**PAIR, "id": "x"}, {**PAIR, "id": "y"})
    assert [pair.place for pair in read_preferences(path)] == [f"{path}, line 1", f"{path}, line 2"]
    assert read_preferences(path)[1].prompt.place == f"{path}, line 2"
    first, again = read_prompts(write({"prompt": "hi"}, {"prompt": "hi"}))
    assert first == again  # where a record stands is no part of what it says
    assert first.place != again.place


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_dataset_dict_is_read_by_its_split_train(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in range(2)]) for name in ("test", "train")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    said: list[str] = []
    assert read_texts(tmp_path / "d", Reading(note=said.append)) == ["train 0", "train 1"]
    assert said == [f"{tmp_path}/d: of its splits test, train train is read; name {tmp_path}/d/SPLIT to read another"]
    assert read_texts(tmp_path / "d" / "test") == ["test 0", "test 1"]
    listed = tmp_path / "d" / "dataset_dict.json"
    listed.write_text('{"splits": ["test", "dev"]}')
    assert "holds the splits test, dev; name one of them" in fails(read_texts, tmp_path / "d")
    listed.write_text('{"splits": ["test"]}')
    assert read_texts(tmp_path / "d") == ["test 0", "test 1"]
    listed.write_text("{}")
    assert f"{listed}: cannot be read" in fails(read_texts, tmp_path / "d")


def _card(folder: Path, configs: str, **files: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{configs}\n---\n# A data set\n")
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return folder


def test_the_configurations_of_a_folder_s_card(tmp_path: Path) -> None:
    two = "configs:\n- config_name: main\n  data_files: main.jsonl\n- config_name: other\n  data_files: other.jsonl"
    folder = _card(tmp_path / "two", two, main="a", other="b")
    message = fails(read_texts, folder)
    assert f"{folder}: holds several configurations (main: main.jsonl; other: other.jsonl); name the file" in message
    assert read_texts(folder / "other.jsonl") == ["b"]
    said: list[str] = []
    default = _card(tmp_path / "default", two.replace("main\n", "main\n  default: true\n"), main="a", other="b")
    assert read_texts(default, Reading(note=said.append)) == ["a"]
    assert said == [f"{default}: main.jsonl is read, as its README.md says, and no other file"]
    named = "  - {split: train, path: a*.jsonl}\n  - {split: test, path: b.jsonl}"
    splits = f"configs:\n- config_name: x\n  data_files:\n{named}"
    assert read_texts(_card(tmp_path / "splits", splits, a1="a", a2="b", b="c")) == ["a", "b"]
    assert "there are no files" in fails(
        read_texts, _card(tmp_path / "none", two.replace("other.j", "main.j")[:55], b="")
    )
    assert read_texts(_card(tmp_path / "free", "license: mit", a="a", b="b")) == ["a", "b"]


def test_files_that_are_splits_are_not_read_together(tmp_path: Path) -> None:
    for name in ("train-00000", "test-00000"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    assert "its files are the splits of one data set" in fails(read_texts, tmp_path)
    assert read_texts(tmp_path / "train-00000.jsonl") == ["a"]


def test_configurations_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*name: str, split: str) -> list[dict[str, Any]]:
        asked.append((*name, split))
        if len(name) == 1:
            raise ValueError("Config name is missing. Pick one among ['main', 'socratic']")
        return [{"text": "a"}]

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("hub:o/n:main:test") == read_texts("hub:o/n:main:") == ["a"]
    assert asked == [("o/n", "main", "test"), ("o/n", "main", "train")]
    message = fails(read_texts, "hub:o/n")
    assert "['main', 'socratic']; check its name, configuration, split" in message
    assert "hub:owner/name:config:split" in message
    assert "expected hub:owner/name" in fails(read_texts, "hub:o/n:a:b:c")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # not installed
    assert "hub:o/n: needs a package: pip install" in fails(read_texts, "hub:o/n")


# ------------------------------------------------------------------------------------------------------- keel check


def _recipe(tmp_path: Path, stage: dict[str, Any], **data: Any) -> dict[str, Any]:
    base = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tokenizer.save_pretrained(base)
    stages = [{"name": "s", "model": "base", **stage}]
    return {"name": "c", "model": {"path": str(base)}, "device": "cpu", "data": data, "stages": stages}


def test_check_finds_bad_rows_and_exits_with_2(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "2000")
    other = {"prompt": "Something else?", "completion": "Yes."}
    path = write(DEMO, {**DEMO, "tools": TOOLS}, other)
    recipe = tmp_path / "recipe.json"
    recipe.with_suffix(".yaml").write_text(json.dumps(_recipe(tmp_path, {"kind": "sft"}, demonstrations=str(path))))
    assert main(["check", str(recipe.with_suffix(".yaml"))]) == 2
    assert f"{path}, line 2: field 'tools': expected rows without tools" in capsys.readouterr().out
    assert main(["check", str(recipe.with_suffix(".yaml")), "data.on_bad_row=skip"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 1 of 3 rows cannot be read and are left out (data.on_bad_row: skip)" in out
    assert f"{path}, line 2: field 'tools'" in out
    path = write({**DEMO, "source": "x"}, other)
    assert main(["check", str(recipe.with_suffix(".yaml"))]) == 0
    out = capsys.readouterr().out
    assert f"note data.demonstrations: {path}: column source is not used" in out
    assert "0 errors, 1 warnings" in out  # that there are few rows


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ({"kind": "dpo", "preferences": "FILE"}, "preferences"),
        ({"kind": "sample", "prompts": "FILE"}, "prompts"),
        ({"kind": "sft", "demonstrations": "FILE"}, "demonstrations"),
    ],
)
def test_check_reads_the_files_that_stages_name(
    tmp_path: Path, write: Write, stage: dict[str, Any], setting: str
) -> None:
    path = write({"prompt": 3, "chosen": "a", "rejected": "b", "completion": "c"})
    stage = {key: str(path) if value == "FILE" else value for key, value in stage.items()}
    recipe = Recipe.model_validate(_recipe(tmp_path, stage))
    found = [f for f in check_recipe(recipe, RunDir(tmp_path / "run")) if f.level == "error"]
    assert [str(f) for f in found if f"{path}, line 1: field 'prompt': expected a text" in str(f)], setting


# ------------------------------------------------------------------------------------------------------- anything

_NAMES = [*TAUGHT, *SYSTEM, "messages", "conversations", "prompt", "completion", "instruction", "input", "output"]
_NAMES += ["text", "chosen", "rejected", "margin", "tie", "annotator", "id", "kind", "meta", "prompt_id", "history"]
_NAMES += ["completions", "choices", "answer", "settled", "gold", "preferred_output", "non_preferred_output"]
_KEYS = ["role", "content", "from", "value", "type", "text", *MESSAGE, *WEIGHTS, *TRAINED, "mask"]
_TEXTS = st.sampled_from(["user", "gpt", "", "0", "[]", "[[1]]", '[{"role": "user"}]', HALF, "\0", _HH, "hi"])
_LEAVES = st.one_of(st.none(), st.booleans(), st.sampled_from([0, 1, HUGE]), st.floats(), _TEXTS)
_MESSAGES = st.lists(st.dictionaries(st.sampled_from(_KEYS), _LEAVES, max_size=4), max_size=3)
_VALUES = st.one_of(
    _LEAVES, _MESSAGES, st.lists(_LEAVES, max_size=3), st.dictionaries(st.sampled_from(_KEYS), _LEAVES, max_size=2)
)
_ROWS = st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_ROWS, min_size=1, max_size=3))
def test_any_row_is_read_or_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in READERS:
        for how in ("error", "skip"):
            try:
                read(path, Reading(how))  # type: ignore[arg-type]
            except UserError as error:
                str(error).encode()


def test_prompts_that_were_read_are_kept(tmp_path: Path) -> None:
    """What the readers let through, the store takes: on many random values."""
    draw = random.Random(0)
    values = [1, 1.5, True, None, "a", "\u05e9", [1, [2]], {"a": {"b": []}}, float("nan"), HALF, HUGE, "\0"]
    rows = [{"prompt": f"q{n}", "meta": {"x": draw.choice(values)}, "y": draw.choice(values)} for n in range(60)]
    rows.append({"prompt": "column", HALF: 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(tmp_path / "rows.jsonl", Reading("skip"))
    assert _kept(tmp_path, prompts) == [prompt.meta for prompt in sorted(prompts, key=lambda prompt: prompt.id)]
    assert 20 < len(prompts) < 60
