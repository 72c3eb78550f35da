"""Files of step labels: TRL's rows, PRM800K's and Math-Shepherd's, as their READMEs and readers describe them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.data.rows import Reading
from keel.data.sources import read_steps
from keel.recipe.steps import Steps
from keel.types import Message, UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    return written


def step(*completions: tuple[str, int | None], chosen: int | None = 0, human: Any = None) -> dict[str, Any]:
    rated = [{"text": text, "rating": rating, "flagged": None} for text, rating in completions]
    return {"completions": rated, "human_completion": human, "chosen_completion": chosen}


def prm800k(*steps: dict[str, Any], reason: str = "solution", **more: Any) -> dict[str, Any]:
    return {
        "labeler": "a",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "What is 2+2?", "ground_truth_answer": "4", "ground_truth_solution": "It is 4."},
        "label": {"steps": list(steps), "total_time": 10, "finish_reason": reason},
        **more,
    }


def labelled(write: Write, *rows: Any, **how: Any) -> list[tuple[tuple[str, ...], tuple[float | None, ...], bool]]:
    return [(r.steps, r.labels, r.finished) for r in read_steps(write(*rows), **how)]


def test_steps_of_a_list_are_joined_by_what_the_splitter_cuts_at(write: Write) -> None:
    row = {"prompt": "hi", "completions": ["a=1", "b=2", "c"], "labels": [True, 0.25, None], "annotator": "x"}
    for how, steps in [
        (Steps(), ("a=1\n", "b=2\n", "c")),
        (Steps(by="blank_line"), ("a=1\n\n", "b=2\n\n", "c")),
        (Steps(by="marker", marker="ки"), ("a=1 ки\n", "b=2 ки\n", "c ки")),
    ]:
        [found] = read_steps(write(row), steps=how)
        assert (found.steps, found.labels, found.annotator) == (steps, (1.0, 0.25, None), "x")
        assert how.split(found.text) == found.steps
    there = {"prompt": "hi", "completions": ["a\n", "b ", "\n c\n\n", "d\n"], "labels": [1, 1, 1, 1], "finished": False}
    [found] = read_steps(write(there))
    assert found.steps == ("a\n", "b ", "\n c\n\n", "d\n"), "what the row has stays as it is"
    assert not found.finished
    assert found.place.endswith("rows.jsonl, line 1")


def test_a_marker_is_put_where_the_row_has_none_of_its_own(write: Write) -> None:
    """A model's own replies, which a stage wrote down, stay as they stand to their last word: so are they scored."""
    marked = Steps(by="marker", marker="ки")

    def read(parts: list[str], steps: Steps = marked, **more: Any) -> tuple[str, ...]:
        [found] = read_steps(
            write({"prompt": "hi", "completions": parts, "labels": [1] * len(parts), **more}), steps=steps
        )
        return found.steps

    for own in (("a ки\n", "b"), ("a",), ("a ки\n", "b ки")):
        assert read(list(own)) == marked.split("".join(own)) == own
    assert read(["a", "b"], finished=False) == ("a ки\n", "b"), "half a step"
    for marker in ("\n\n", "\n", " ки\n"):
        how = Steps(by="marker", marker=marker)
        for text in (f"a{marker}b{marker}c", f"a{marker}\nb"):
            assert read(list(how.split(text)), how) == how.split(text), "not put where it stands"
        assert len(how.split("".join(read(["a", "b", "c"], how)))) == 3
    row = prm800k(step(("4.", 1)))
    assert read_steps(write(row), steps=marked)[0].steps == ("4. ки",), "as every other solution of the file"
    said = "How many? It is 7. ки\nSo 7 ки and"
    shepherd = {"input": said, "label": said.replace("ки", "+"), "task": "GSM8K"}
    assert read_steps(write(shepherd), steps=marked)[0].steps == ("It is 7. ки\n", "So 7 ки\n", "and")


def test_prm800k_phase_1(write: Write) -> None:
    """Several candidates a step: the chosen one, or what a person wrote, goes on; the others are learned where they
    stand, behind steps that are labelled in the solution's own record."""
    row = prm800k(
        step(("One.", 1), ("Bad one.", -1)),
        step(("Worse.", -1), ("Worst.", -1), chosen=None, human={"text": "Mine.", "rating": None, "source": "human"}),
        step(("Four.", 0)),
    )
    assert labelled(write, row) == [
        (("One.\n", "Mine.\n", "Four."), (1.0, 1.0, 1.0), True),
        (("Bad one.",), (0.0,), False),
        (("One.\n", "Worse."), (None, 0.0), False),
        (("One.\n", "Worst."), (None, 0.0), False),
    ]
    [first, *_] = read_steps(write(row))
    assert first.prompt.messages == (Message("user", "What is 2+2?"),)
    assert dict(first.prompt.meta) == {"answer": "4"}
    assert first.annotator == "a"
    assert labelled(write, row, neutral="bad")[0][1] == (1.0, 1.0, 0.0)
    assert labelled(write, row, neutral="out")[0][1] == (1.0, 1.0, None)


def test_prm800k_phase_2(write: Write) -> None:
    """Labelling stops at the first error, where nothing is chosen: the solution's own step is the first there."""
    row = prm800k(step(("I add.", 0)), step(("5.", -1), ("4.", 1), chosen=None), reason="found_error", generation=9)
    assert labelled(write, row) == [(("I add.\n", "5."), (1.0, 0.0), False), (("I add.\n", "4."), (None, 1.0), False)]
    ended = {"completions": None, "human_completion": None, "chosen_completion": None}
    unsure = prm800k(step(("I add.", None)), ended, reason="give_up")
    unsure["label"]["steps"][0]["completions"].append({"text": "Hm.", "rating": 1, "flagged": True})
    assert labelled(write, unsure) == [(("I add.",), (None,), False), (("Hm.",), (None,), False)]


def test_prm800ks_rows_that_teach_nothing_are_counted(write: Write) -> None:
    good = prm800k(step(("4.", 1)))
    rows = [
        good,
        {**good, "is_quality_control_question": True},
        {**good, "is_initial_screening_question": True},
        prm800k(step(("What?", -1)), reason="bad_problem"),
    ]
    notes: list[str] = []
    assert len(read_steps(write(*rows), Reading(note=notes.append))) == 1
    assert [note.split(": ", 1)[1] for note in notes if "left out" in note] == [
        "2 rows are left out: questions for quality control or screening",
        "1 row is left out: problems that a labeler found broken",
    ]


def test_math_shepherd(write: Write) -> None:
    said = "Ann has 3 and buys 4. How many? Step 1: 3 + 4 = 8. ки\nStep 2: So 8. The answer is: 8 ки"
    row = {"input": said, "label": said.replace("8. ки", "8. +", 1).replace("ки", "-"), "task": "GSM8K"}
    [found] = read_steps(write(row))
    assert found.prompt.messages == (Message("user", "Ann has 3 and buys 4. How many?"),)
    assert found.prompt.kind == "GSM8K"
    assert found.steps == ("Step 1: 3 + 4 = 8.\n", "Step 2: So 8. The answer is: 8")
    assert found.labels == (1.0, 0.0)
    marked = Steps(by="marker", marker="ки")
    [found] = read_steps(write(row), steps=marked)
    assert found.steps == ("Step 1: 3 + 4 = 8. ки\n", "Step 2: So 8. The answer is: 8 ки")
    assert marked.split(found.text) == found.steps


def test_math_shepherds_odd_rows(write: Write) -> None:
    for said, prompt, steps, labels in [
        ("How many? It is 7. ки\nSo 7 ки and", "How many?", ("It is 7.\n", "So 7\n", "and"), (1.0, 0.0, None)),
        ("Ann, ки aged 3. Step 1: 7 ки", "Ann,  aged 3.", ("Step 1: 7",), (0.0,)),
    ]:
        row = {"input": said, "label": said.replace("ки", "+", 1).replace("ки", "-"), "task": "GSM8K"}
        [found] = read_steps(write(row))
        assert (found.prompt.messages[0].content, found.steps, found.labels) == (prompt, steps, labels)


def test_bad_rows_are_named_with_file_line_and_field(write: Write) -> None:
    good = {"prompt": "hi", "completions": ["a", "b"], "labels": [1, 0]}
    broken = prm800k(step(("4.", 2)))
    early = prm800k(step(("3.", -1), chosen=None), step(("4.", 1)))
    said = "How many? It is 7. ки"
    for row, sentence in [
        ({**good, "labels": [1]}, "field 'labels': expected a list of 2 labels, one a completion, got a list [1]"),
        ({**good, "labels": [1, 1.5]}, "field 'labels': expected a number from 0 to 1, got the number 1.5"),
        ({**good, "completions": ["a", " \n"]}, "field 'completions': step 2 is blank; take it out, with its label"),
        (broken, "field 'label.steps[0].completions[0].rating': expected -1, 0, 1 or null, got the number 2"),
        (early, "field 'label.steps[0].chosen_completion': null, and steps follow"),
        (prm800k(step(("4.", 1), chosen=3)), "chosen_completion': expected one of 1 completions, got the number 3"),
        (prm800k(), "field 'label.steps': expected a list of steps, got a list"),
        ({**prm800k(step(("4.", 1))), "question": {}}, "field 'question.problem': expected a text, got null"),
        (prm800k(step(("4.", 1)), reason="bored"), "field 'label.finish_reason': expected solution, found_error"),
        (
            {"input": said, "label": said},
            "field 'label': expected the text of input with + or - in the place of each",
        ),
        ({"input": "How many?", "label": "How many?"}, "field 'input': expected steps that end with ки"),
        ({"input": "It is 7. ки", "label": "It is 7. +"}, "field 'input': expected a problem before 'Step 1:'"),
        ({"text": "hm"}, "columns are text; expected prompt+completions+labels | question+label"),
    ]:
        with pytest.raises(UserError) as error:
            read_steps(write(good, row))
        assert sentence in str(error.value).partition("rows.jsonl, line 2: ")[2], str(error.value)
