"""The judge's flags by revision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from keel.eval.revisions import Chain, flags_by_revision
from keel.recipe.recipe import Recipe
from keel.reward.judge import JudgeFromPython
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stages.eval import by_revision
from keel.types import Completion, Grade, Message, Prompt


class Reads:
    """Finds what a reply says. Of "far" prompts it cannot tell whether they are rude; "gone" has no grade."""

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade | None]:
        return [
            None
            if reply.text == "gone"
            else Grade(
                0.0, {"rude": None if prompt.kind == "far" else "rude" in reply.text, "long": len(reply.text) > 9}
            )
            for prompt, reply in zip(prompts, completions, strict=True)
        ]


def chain(id: str, *replies: str, kind: str = "") -> Chain:
    return Chain(Prompt(id, (Message("user", id),), kind), replies)


def test_shares_are_counted_over_the_same_prompts_at_every_revision() -> None:
    chains = [
        chain("a", "rude", "rude again", "kind"),
        chain("b", "rude", "kind", "kind"),
        chain("c", "kind", "kind", "kind"),
        chain("d", "rude", "rude", "kind"),
        chain("far", "rude", "rude", "rude", kind="far"),  # does not apply there
        chain("e", "rude", "gone", "rude"),  # no grade in the middle
        chain("short", "rude", "rude"),  # left out: it ended early
    ]
    found = flags_by_revision(chains, Reads())
    assert [share and share[0] for share in found["rude"]] == [0.75, 0.5, 0.0]
    assert [share and share[0] for share in found["long"]] == [0.0, pytest.approx(1 / 5), 0.0]
    # Wilson's interval of 3 in 4 and of 0 in 4, worked out by hand with z = 1.959964
    assert found["rude"][0] == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert found["rude"][2] == pytest.approx((0.0, 0.0, 0.4899), abs=1e-4)


def test_chains_of_one_prompt_are_no_independent_prompts() -> None:
    apart = flags_by_revision([chain(str(i), "rude" if i % 2 else "kind") for i in range(40)], Reads())["rude"][0]
    together = flags_by_revision([chain(str(i % 4), "rude" if i % 2 else "kind") for i in range(40)], Reads())["rude"][
        0
    ]
    assert apart is not None
    assert together is not None
    assert together[2] - together[1] > 1.5 * (apart[2] - apart[1])


def test_nothing_to_count() -> None:
    assert flags_by_revision([], Reads()) == {}
    assert flags_by_revision([chain("far", "rude", "kind", kind="far")], Reads())["rude"] == [None, None]


# --------------------------------------------------------------------------------------------- by an evaluation's judge

JUDGE = "tests/test_revisions.py:knows_the_kind"


def knows_the_kind(prompt: Prompt, text: str) -> Grade:
    """A grader that needs what stands in the prompts' file alone."""
    return Grade(0.0, {"rude": "rude" in text, "far": prompt.kind == "far" and prompt.meta["where"] in text})


def recipe_of(folder: Path, **settings: object) -> Recipe:
    stages = [
        {"kind": "critique", "name": "critique", "model": "base", "prompts": str(folder / "asked.jsonl"),
         "constitution": "assistant", "revisions": 2},
        {"kind": "eval", "name": "eval", "models": ["base"], "baseline": "base",
         "judge": {"kind": "python", "ref": JUDGE}, "revisions": "critique"} | settings,
    ]  # fmt: skip
    return Recipe.model_validate({"model": {"path": "./base"}, "stages": stages})


def test_an_evaluation_counts_what_its_judge_finds_in_a_critique_stages_whole_chains(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "one", "kind": "far", "where": "port"},
        {"id": "b", "prompt": "two", "kind": "near", "where": "port"},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, run = recipe_of(tmp_path), RunDir(tmp_path / "run")
    said = {"a": ["a rude port", "the port", "kind"], "b": ["rude port", "rude\u2028line", "kind"]}
    records = [
        {"prompt_id": id, "initial": {"text": first}, "revisions": [{"revision": text} for text in rest], "kept": True}
        for id, (first, *rest) in said.items()
    ]
    records.append({"prompt_id": "a", "initial": {"text": "rude"}, "revisions": [{"revision": ""}], "kept": False})
    run.stage("critique").begin("f")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (run.stage("critique").path / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    context = StageContext(recipe, run, run.stage("eval"), Silent(), "cpu")
    found = by_revision("critique", JudgeFromPython(knows_the_kind), context)
    assert [share[0] for share in found["rude"]] == [1.0, 0.5, 0.0]
    assert [share[0] for share in found["far"]] == [0.5, 0.5, 0.0]


def test_revisions_are_counted_by_a_python_judge_of_a_critique_stage(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="which a Python judge alone gives"):
        recipe_of(tmp_path, judge={"kind": "endpoint", "url": "http://host/v1", "model": "m"})
    with pytest.raises(
        ValidationError, match=r"eval\.revisions: 'elsewhere' is no critique stage; name one of critique"
    ):
        recipe_of(tmp_path, revisions="elsewhere")
    assert "revisions" in type(recipe_of(tmp_path).stages[1]).later
