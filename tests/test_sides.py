"""The three ways to say which of two responses, by a table made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from keel.store.sides import chosen_side, in_record, in_store, of_record, on_screen, preferred, turned

# said on the screen | ids shown, left first | of the store | preferred | side of the record's `chosen`
TABLE: list[tuple[Any, tuple[int, int], str, int | None, str]] = [
    ("left", (3, 8), "first", 3, "left"),
    ("left", (8, 3), "second", 8, "left"),
    ("right", (3, 8), "second", 8, "right"),
    ("right", (8, 3), "first", 3, "right"),
    ("tie", (3, 8), "tie", None, "left"),
    ("both_bad", (8, 3), "tie", None, "left"),
]


@pytest.mark.parametrize(("said", "shown", "word", "better", "chosen"), TABLE)
def test_what_is_said_on_a_screen(
    said: Any, shown: tuple[int, int], word: Any, better: int | None, chosen: str
) -> None:
    assert in_store(said, shown) == word
    assert preferred(said, shown) == better
    assert chosen_side(said) == chosen
    assert on_screen(word, shown) == ("tie" if said == "both_bad" else said)


# a word on a screen | the side on which `chosen` stood | the same word of the record
RECORDS: list[tuple[Any, Any, Any]] = [
    ("left", "left", "chosen"),
    ("left", "right", "rejected"),
    ("right", "right", "chosen"),
    ("right", "left", "rejected"),
    ("tie", "right", "tie"),
]


@pytest.mark.parametrize(("said", "chosen", "word"), RECORDS)
def test_what_is_said_of_a_record(said: Any, chosen: Any, word: Any) -> None:
    assert in_record(said, chosen) == word
    assert of_record(word, chosen) == said


def test_a_pair_on_the_screen_and_in_the_record() -> None:
    assert turned(("this", "that"), "left") == ("this", "that")
    assert turned(("this", "that"), "right") == ("that", "this")


def test_a_word_that_a_file_made_up_is_none() -> None:
    with pytest.raises(KeyError):
        of_record("first", "left")  # type: ignore[arg-type]
