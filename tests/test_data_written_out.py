"""Rows that say one thing in two ways: a name that stands twice, messages and dialogues written out as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keel.data.sources import read_demonstrations, read_preferences, read_prompts
from keel.types import Message, UserError

MESSAGES = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": "yes"}]


def row(folder: Path, **fields: Any) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps(fields) + "\n")
    return folder / "rows.jsonl"


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"prompt": "a", "meta": {"chosen": 1}, "chosen": "x", "rejected": "y", "chosen": "z"}'
    (tmp_path / "a.jsonl").write_text(twice)
    (tmp_path / "a.json").write_text(f"[{twice}]")
    columns = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=columns), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        with pytest.raises(UserError, match=r"'?chosen'? stands twice"):
            read_preferences(tmp_path / name)


@pytest.mark.parametrize("write", [json.dumps, str, lambda m: "[" + "\n ".join(map(str, m)) + "]"])
def test_messages_as_a_text_are_no_text(write: Callable[[Any], str], tmp_path: Path) -> None:
    """json.dumps, str and numpy, as pandas has written them into a cell."""
    for fields in ({"prompt": "hi", "chosen": write(MESSAGES), "rejected": "no"},
                   {"prompt": write(MESSAGES[:1]), "chosen": "a", "rejected": "b"}):  # fmt: skip
        with pytest.raises(UserError, match="got messages written out as a text; write the list itself"):
            read_preferences(row(tmp_path, **fields))
    with pytest.raises(UserError, match="got messages written out"):
        read_prompts(row(tmp_path, prompt=write(MESSAGES[:1])))
    spoken = [{"role": "user", "content": "What is this? " + write(MESSAGES)}]
    assert read_prompts(row(tmp_path, prompt=spoken))[0].messages[0].content.endswith("]")
    assert read_prompts(row(tmp_path, prompt="Mend " + write(MESSAGES)))[0].messages[0].content.startswith("Mend")


def test_a_dialogue_in_the_prompt_is_its_turns(tmp_path: Path) -> None:
    """HH's dialogues cut before the last reply (rm-static, full-hh-rlhf): the row without a prompt says the same."""
    asked = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go on\n\nAssistant:"
    (whole,) = read_preferences(row(tmp_path, chosen=asked + " Well.", rejected=asked + " No."))
    for chosen, rejected in ((" Well.", " No."), ("Well.", "No."), (asked + " Well.", asked + " No.")):
        (cut,) = read_preferences(row(tmp_path, prompt=asked, chosen=chosen, rejected=rejected))
        assert (cut.prompt.messages, cut.chosen, cut.rejected) == (whole.prompt.messages, "Well.", "No.")
    assert [m.role for m in read_prompts(row(tmp_path, prompt=asked))[0].messages] == ["user", "assistant", "user"]
    (taught,) = read_demonstrations(row(tmp_path, prompt=asked, completion=" Well."))
    assert [(m.content, m.learned) for m in taught.messages] == [
        ("Hi", True), ("Yes?", False), ("Go on", True), ("Well.", True),
    ]  # fmt: skip
    reply = "\n\nHuman: what a base model writes"
    (plain,) = read_demonstrations(row(tmp_path, prompt="Hi", completion=reply))
    assert plain.messages[1] == Message("assistant", reply)


def test_a_message_of_two_speakers_or_with_a_picture_in_a_part_is_refused(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "x"}
    with pytest.raises(UserError, match="role and from differ"):
        read_demonstrations(row(tmp_path, messages=[{"role": "assistant", "from": "human", "content": "a"}, reply]))
    part = {"type": "text", "text": "a", "image_url": "a.png"}
    with pytest.raises(UserError, match="expected text alone"):
        read_demonstrations(row(tmp_path, messages=[{"role": "user", "content": [part]}, reply]))
    assert read_demonstrations(
        row(tmp_path, messages=[{"role": "user", "from": "human", "content": [part | {"image_url": None}]}, reply])
    )
