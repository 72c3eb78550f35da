"""Constitutions: what a file may say, what a hash covers, how principles are drawn. The oracles are counts and text."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel.recipe.constitution import Constitution, Principle, draw, read_constitution
from keel.types import UserError

GOOD = """name: tiny
principles:
  - {id: harm, text: Do no harm., critique: "Is it harm?", revision: No harm., choose: "Which is safer?", tags: [red]}
  - {id: brief, text: Be brief., critique: "Is it long?", revision: Shorter., choose: "Which is shorter?", weight: 3}
examples:
  - {principle: harm, prompt: "How?", reply: Thus., critique: It harms., revision: I cannot help with that.}
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "constitution.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("text: Do no harm.", "text: ' '", "constitution.yaml:3: principles.0.text: is blank"),
        ("text: Do no harm., ", "", "constitution.yaml:3: principles.0.text: is missing"),
        ("id: brief", "id: harm", "two principles have the id 'harm'"),
        ("weight: 3", "weight: 0", "constitution.yaml:4: principles.1.weight"),
        ("weight: 3", "wieght: 3", "constitution.yaml:4: principles.1.wieght: there is no such key"),
        ("principle: harm", "principle: hram", "an example is of the principle 'hram'"),
        ("critique: It harms.", "critique: ' '", "constitution.yaml:6: examples.0.critique: is blank"),
        ("principles:", "principles: []\nrules:", "constitution.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_constitution(written(tmp_path, GOOD.replace(old, new)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_depends_on_the_principles_that_it_may_draw_and_on_no_other(tmp_path: Path) -> None:
    before = read_constitution(written(tmp_path, GOOD))
    after = read_constitution(written(tmp_path, GOOD.replace("Be brief.", "Be very brief.")))
    assert before.hash != after.hash
    assert before.depends_on(tags=["red"]) == after.depends_on(tags=["red"])
    assert before.depends_on(ids=["brief"]) != after.depends_on(ids=["brief"])
    example = read_constitution(written(tmp_path, GOOD.replace("It harms.", "It hurts.")))
    assert before.depends_on(ids=["brief"]) == example.depends_on(ids=["brief"])
    assert before.depends_on(ids=["harm"]) != example.depends_on(ids=["harm"])


def test_unknown_ids_and_tags_are_named(tmp_path: Path) -> None:
    constitution = read_constitution(written(tmp_path, GOOD))
    with pytest.raises(ValueError, match="no tag of tiny is called 'blue'; there are red"):
        constitution.chosen(tags=["blue"])
    with pytest.raises(ValueError, match="no principle of tiny is called 'x'; there are harm, brief"):
        constitution.chosen(ids=["x"])
    assert [p.id for p in constitution.chosen()] == ["harm", "brief"]


def principles(**weights: float) -> list[Principle]:
    return [Principle(id=i, text="t", critique="c", revision="r", choose="q", weight=w) for i, w in weights.items()]


def test_draws_follow_the_weights_and_depend_on_their_place_alone() -> None:
    some = principles(a=1.0, b=3.0)
    drawn = [draw(some, 1, 0, prompt, 2)[0].id for prompt in range(4000)]
    assert drawn.count("b") / 4000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)
    assert drawn == [draw(some, 1, 0, prompt, 2)[0].id for prompt in range(4000)]
    assert drawn != [draw(some, 1, 0, prompt, 3)[0].id for prompt in range(4000)]
    assert {p.id for p in draw(some, 2, 5)} == {p.id for p in draw(some, 9, 5)} == {"a", "b"}


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e16])
def test_only_the_weights_ratio_counts(scale: float) -> None:
    some = principles(a=scale, b=3 * scale)
    drawn = [draw(some, 1, "seed", n)[0].id for n in range(2000)]
    assert drawn.count("b") / 2000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 2000) ** 0.5)


def test_names_of_shipped_ones_are_found() -> None:
    assert Constitution.model_validate({"name": "x", "principles": [p.model_dump() for p in principles(a=1.0)]}).hash
    with pytest.raises(UserError, match="nowhere"):
        read_constitution("nowhere")
