"""The harbor's constitution, lessons, red-team prompts, feedback functions, by the gold judge and by counting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random

import pytest
from tiny import Counting

from keel.data.collate import messages_hash
from keel.feedback.principled import Asked, ModelFeedback
from keel.harbor import feedback as known
from keel.harbor.demos import Habits, write_reply
from keel.harbor.export import export, export_constitutional
from keel.harbor.facts import World
from keel.harbor.judge import judge
from keel.harbor.lessons import make_choices, make_revisions, revised_replies
from keel.harbor.principles import RULES, keeps
from keel.harbor.prompts import make_prompts
from keel.harbor.redteam import about, is_red, red_team_prompts
from keel.harbor.replies import read
from keel.recipe.constitution import Principle, read_constitution
from keel.recipe.critique import CritiqueStage
from keel.recipe.sections import SamplingConfig
from keel.rollout.critique import Critic
from keel.rollout.said import Journal
from keel.rollout.writer import Answers
from keel.study.plan import ALSO
from keel.types import Completion, Demonstration, Message, Prompt, UserError

PRINCIPLES = {principle.id: principle for principle in read_constitution("harbor").principles}


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


def seen(prompt: Prompt, text: str) -> dict[str, object]:
    """What the gold judge sees of each principle, in words of its own flags and counts."""
    grade, reply = judge(prompt, text), read(text, prompt.messages[-1].content)
    return {
        "harm": grade.flags["harmful"],
        "invent": grade.flags["invented"],
        "flattery": grade.flags["flattering"],
        "closing": reply.closings > 0,
        "right": grade.flags["correct"],
        "answered": grade.flags["answered"],
        "over_refusal": grade.flags["over_refusal"],
    }


def test_the_constitution_has_the_principles_that_the_harbor_knows_the_truth_about() -> None:
    assert set(PRINCIPLES) == set(RULES)
    assert len(read_constitution("assistant").principles) == 10
    assert len(read_constitution("assistant").chosen(tags=["harmless"])) >= 3


def test_a_gold_revision_moves_what_its_principle_is_about_and_nothing_else(world: World) -> None:
    moved: dict[str, int] = {}
    for one in revised_replies(world, 300, 2, list(PRINCIPLES.values())):
        principle, prompt = one.principle.id, one.prompt
        before, after = seen(prompt, one.reply), seen(prompt, one.revision)
        if one.critique.startswith("No. "):
            assert one.revision == one.reply
            continue
        moved[principle] = moved.get(principle, 0) + 1
        better, worse = keeps(principle, prompt, one.revision), keeps(principle, prompt, one.reply)
        assert better is not None
        assert worse is not None
        assert better > worse
        if principle != "brief":
            assert before.pop(principle) != after.pop(principle)
        assert after == before, (one.reply, one.revision)
    assert moved.keys() == RULES.keys()
    assert min(moved.values()) >= 15


def test_topics_of_lessons_red_team_and_held_out_prompts_are_disjoint(world: World) -> None:
    """By what is asked, read from the prompt itself, and by the hash of its messages."""
    red = [prompt for seed in (0, 1) for prompt in red_team_prompts(world, 200, seed)]
    taught = [
        *make_revisions(world, 200, 5, list(PRINCIPLES.values())),
        *make_choices(world, 60, 5, list(PRINCIPLES.values())),
    ]
    heldout = make_prompts(world, 300, 0, "heldout")
    asked = {messages_hash(lesson.messages[:1]) for lesson in taught}
    assert not asked & {messages_hash(prompt.messages) for prompt in (*red, *heldout)}
    for prompt in red:
        phrase = prompt.meta.get("phrase")
        if phrase is not None:
            assert not any(phrase in lesson.messages[0].content for lesson in taught)
            assert not any(phrase == other.meta.get("phrase") for other in heldout)
        if prompt.kind == "nonexistent":
            assert not any(prompt.meta["subject"] in lesson.messages[0].content for lesson in taught)
    assert sum(prompt.kind == "harmful" for prompt in red) == 200
    assert {prompt.kind for prompt in red} == {"harmful", "looks_harmful", "howto", "fact", "nonexistent"}


def test_red_team_prompts_are_decided_by_their_seed(world: World) -> None:
    assert red_team_prompts(world, 60, 1) == red_team_prompts(world, 60, 1)
    assert red_team_prompts(world, 60, 1) != red_team_prompts(world, 60, 2)
    assert all(is_red(prompt) and about(prompt) for prompt in red_team_prompts(world, 60, 1))


class Gold:
    """A writer who answers a critique stage's requests as one who knows the truth, and keeps what it was asked."""

    def __init__(self, lessons: Sequence[Demonstration]) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.says = {texts(lesson.messages[:end]): lesson.messages[end].content
                     for lesson in lessons for end in (1, 3, 5)}  # fmt: skip

    def write(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, answers: Answers | None = None
    ) -> list[Completion | None]:
        self.asked += [texts(prompt.messages) for prompt in prompts]
        said: list[Completion | None] = [Completion(self.says[texts(prompt.messages)]) for prompt in prompts]
        if answers is not None:
            answers.keep({i: one for i, one in enumerate(said) if one is not None})
        return said


def texts(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.content for message in messages)


@pytest.mark.parametrize("principle", RULES)
def test_lessons_are_the_very_conversations_of_the_critique_stage(world: World, tmp_path: Path, principle: str) -> None:
    """Who knows the lessons by heart can answer all that the stage asks: a request with other words is a KeyError."""
    lessons = make_revisions(world, 8, 0, [PRINCIPLES[principle]])
    prompts = [Prompt(str(i), lesson.messages[:1]) for i, lesson in enumerate(lessons)]
    config = CritiqueStage.model_validate({"name": "c", "model": "base", "constitution": "harbor", "revisions": 1})
    writer, journal = Gold(lessons), Journal(tmp_path / "said.jsonl")
    constitution = read_constitution("harbor")
    critic = Critic(writer, constitution, constitution.chosen(ids=[principle]), config, 0, journal, Counting())
    chains = critic.chains(prompts)
    assert [chain.texts for chain in chains] == [[m.content for m in lesson.messages[1::4]] for lesson in lessons]
    for lesson in lessons:
        assert [message.role for message in lesson.messages] == ["user", "assistant"] * 3
        assert [message.learned for message in lesson.messages if message.role == "assistant"] == [False, True, True]


def test_neither_critique_nor_revision_can_be_had_from_the_request_alone(world: World) -> None:
    lessons = make_revisions(world, 150, 0, list(PRINCIPLES.values()))
    changed = [lesson.messages[5].content != lesson.messages[1].content for lesson in lessons]
    assert changed == [lesson.messages[3].content.startswith("Yes. ") for lesson in lessons]
    assert 45 <= sum(changed) <= 105


def test_choices_name_the_better_reply_as_often_by_either_letter(world: World) -> None:
    lessons = make_choices(world, 200, 0, list(PRINCIPLES.values()))
    letters = [lesson.messages[-1].content for lesson in lessons]
    assert set(letters) == {"A", "B"}
    assert 70 <= letters.count("A") <= 130
    assert len(lessons) >= 190


class Letters:
    """In the place of a model that judges: keeps the conversations behind which it is to measure A and B."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def letters(self, asked: Sequence[tuple[Message, ...]], places: Sequence[str]) -> list[tuple[float, float]]:
        self.asked += [texts(messages) for messages in asked]
        return [(0.0, 0.0)] * len(asked)


def test_choices_are_asked_in_the_text_that_a_model_that_judges_reads(world: World) -> None:
    """The pair, read back from the lesson, is asked about by the comparer in just these words."""
    for lesson in make_choices(world, 25, 1, list(PRINCIPLES.values())):
        principle, sent = PRINCIPLES[lesson.id.split("-")[1]], lesson.messages[0].content
        material = json.loads(sent.removeprefix(f"{principle.choose}\n\n"))
        prompt = Prompt("p", tuple(Message(m["role"], m["content"]) for m in material["conversation"]))
        model = Letters()
        said = ModelFeedback(model, None, None, 0).prefer(  # type: ignore[arg-type]
            [Asked(prompt, material["A"], material["B"], principle)]
        )
        assert [one.asked for one in said if one is not None] == [sent]
        assert model.asked == [(sent,)]


def pairs(world: World, kind: str, n: int) -> list[tuple[Prompt, str, str]]:
    """(prompt, better, worse) of a harmful or a nonexistent thing."""
    rng = Random(2)
    good, bad = Habits(refuses_harm=1, admits=1), Habits(refuses_harm=0, admits=0)
    prompts = make_prompts(world, n, 7, "train", {kind: 1.0})
    return [(p, write_reply(world, p, rng, good), write_reply(world, p, rng, bad)) for p in prompts]


@pytest.mark.parametrize(("function", "rate"), [(known.exact, 0.0), (known.feedback, 0.1), (known.noisy, 0.25)])
def test_feedback_errs_at_its_rate_and_says_how_sure_it_is(world: World, function: known.Feedback, rate: float) -> None:
    harm = PRINCIPLES["harm"]
    found = pairs(world, "harmful", 300)
    said = [function(prompt, better, worse, harm) for prompt, better, worse in found]
    wrong = [p < 0.5 for p in said]
    assert abs(sum(wrong) / len(wrong) - rate) <= 2.5 * (rate * (1 - rate) / len(wrong)) ** 0.5
    told = sum(min(p, 1 - p) for p in said) / len(said)
    assert told == pytest.approx(rate, abs=0.025)
    turned = [function(prompt, worse, better, harm) for prompt, better, worse in found]
    assert [1 - p for p in turned] == pytest.approx(said)  # without a bias the order means nothing
    other = [(p, function(p, a, b, PRINCIPLES["invent"])) for p, a, b in found]
    assert {round(p, 9) for _, p in other} == {0.5}  # of harmful prompts this principle says nothing


def test_an_order_bias_is_the_same_for_every_pair_and_gone_in_the_mean_of_both(world: World) -> None:
    harm = PRINCIPLES["harm"]
    equal = [(prompt, a, a + " ") for prompt, a, _ in pairs(world, "harmful", 50)]
    for prompt, a, b in equal:
        both = known.order_biased(prompt, a, b, harm), known.order_biased(prompt, b, a, harm)
        assert both == pytest.approx((0.68997, 0.68997), abs=1e-4)  # 1 / (1 + e^-0.8)
        assert (both[0] + 1 - both[1]) / 2 == pytest.approx(0.5)


def test_a_length_bias_grows_with_the_words_and_a_taste_for_its_own_is_for_its_own(world: World) -> None:
    (prompt,) = make_prompts(world, 1, 0, "train", {"harmful": 1.0})
    harm = PRINCIPLES["harm"]
    short, long = "I cannot help with that.", "I am sorry, but I cannot help with that. It would do harm."
    words = 5, 13
    odds = ((1 + words[1]) / (1 + words[0])) ** 0.8
    assert known.length_biased(prompt, long, short, harm) == pytest.approx(odds / (1 + odds))
    texts = [f"I cannot help with that, friend {i}." for i in range(400)]
    own = [known.is_own(text) for text in texts]
    assert 150 <= sum(own) <= 250
    for a, b in product(texts[:12], texts[:12]):
        lean = known.self_biased(prompt, a, b, harm) - 0.5
        assert (lean > 0.18, lean < -0.18) == (
            known.is_own(a) > known.is_own(b),
            known.is_own(a) < known.is_own(b),
        )


def test_a_principle_that_the_harbor_knows_nothing_about_is_refused(world: World) -> None:
    (prompt,) = make_prompts(world, 1, 0, "train", {"harmful": 1.0})
    odd = Principle(id="odd", text="t", critique="c", revision="r", choose="w")
    with pytest.raises(UserError, match="not about 'odd'"):
        known.feedback(prompt, "a", "b", odd)


def test_what_was_exported_before_is_the_same_bytes(tmp_path: Path) -> None:
    """Hashes of the files as they were before the constitution was there."""
    sizes = {"demonstrations": 60, "prompts": 50, "heldout_prompts": 40, "facts": 20}
    export(tmp_path, 0, **sizes, pretraining_tokens=500, base_text_tokens=500)
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(tmp_path.iterdir())}
    assert found == {
        "base_text.jsonl": "74994ae73cb70756",
        "demonstrations.jsonl": "983f5e59ef9f0542",
        "facts.jsonl": "10cd4c27f043cc7f",
        "heldout_prompts.jsonl": "2b8a85b56394e0c9",
        "pretraining.jsonl": "5ef3bb75b332a152",
        "prompts.jsonl": "d1b8df8cb44aae49",
    }


def test_constitutional_files(tmp_path: Path) -> None:
    export_constitutional(tmp_path, 1, demonstrations=50, red_team=40, helpful=60, revisions=30, choices=20)
    rows = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in tmp_path.iterdir()
    }
    assert sorted(rows) == sorted(ALSO["constitutional"])
    red = [{row["id"] for row in rows[name]} for name in ("red_team", "red_team_test")]
    assert red[1]
    assert not red[0] & red[1]
    assert not any(row["kind"] == "harmful" for row in rows["helpful_prompts"])
    assert sum(row["kind"] == "harmful" for row in rows["red_team"]) == 20
    ids = [row["id"] for row in rows["training_prompts"]]
    assert len(set(ids)) == len(ids)
    assert {*ids} == {row["id"] for name in ("red_team", "helpful_prompts") for row in rows[name]}
    weights = [[m.get("weight") for m in row["messages"]] for row in rows["lessons"]]
    assert [None, 0, None, None, None, None] in weights
    assert [None, None] in weights
