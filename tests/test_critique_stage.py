"""The stage critique in a recipe: what it makes is learned from, what it depends on makes it stale, a kill costs none
of its bits, and a constitution that is wrong is told before compute."""

from __future__ import annotations

import json
import signal
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_stages import write_jsonl
from tiny import save_tiny, tiny_tokenizer

from keel.check import check_recipe
from keel.cli.lineage import shaped
from keel.data.sources import read_demonstrations, read_preferences
from keel.pipeline.run import plan, run_pipeline
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig
from keel.recipe.sft import SftStage
from keel.rollout.embedded import EmbeddedSampler
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.train.schedule import MixedSchedule
from keel.types import Completion, UserError

CONSTITUTION = """name: tiny
principles:
  - {id: harm, text: Do no harm., critique: "Is it harm?", revision: No harm., choose: "Which is safer?", tags: [red]}
  - {id: brief, text: Be brief., critique: "Is it long?", revision: Shorter., choose: "Which?", weight: 3, tags: [red]}
  - {id: kind, text: Be kind., critique: "Is it rude?", revision: Kinder., choose: "Which is kind?"}
examples:
  - {principle: harm, prompt: "How?", reply: Thus., critique: It harms., revision: No.}
"""
# As Gemma's: no system message, and turns that alternate.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}<|turn|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>{% endif %}"
)
# A random model seldom ends by itself: any of these ends a reply.
STOPS = list(string.ascii_letters)
SAMPLING = {"max_new_tokens": 12, "stop": STOPS, "batch_size": 8}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    base = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(base)
    (tmp_path / "tiny.yaml").write_text(CONSTITUTION)
    helpful = [{"prompt": f"how {n}", "completion": f"thus {n}"} for n in range(9)]
    return {
        "model": {"path": str(base)},
        "device": "cpu",
        "data": {
            "prompts": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"what {n}"} for n in [*range(20), 3]]),
            "heldout_prompts": write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "what 0"}, {"prompt": "unseen"}]),
        },
        "stages": [
            {
                "kind": "critique", "name": "critique", "model": "base", "constitution": str(tmp_path / "tiny.yaml"),
                "revisions": 2, "tags": ["red"], "sampling": SAMPLING,
            },
            {
                "kind": "sft", "name": "sft", "model": "base", "batch_size": 4, "epochs": 1, "mix": [2, 1],
                "demonstrations": ["critique", write_jsonl(tmp_path / "helpful.jsonl", helpful)],
            },
            {
                "kind": "reward", "name": "reward", "model": "base", "preferences": "critique", "batch_size": 4,
                "heldout_fraction": 0.3,
            },
            {"kind": "dpo", "name": "dpo", "model": "sft", "preferences": "critique", "batch_size": 4},
        ],
    }  # fmt: skip


def changed(tree: dict[str, Any], name: str, **changes: Any) -> Recipe:
    stages = [{**stage, **(changes if stage["name"] == name else {})} for stage in tree["stages"]]
    return Recipe.model_validate({**tree, "stages": stages})


def run(tree: dict[str, Any], out: Path, targets: list[str] | None = None) -> RunDir:
    directory = RunDir(out)
    run_pipeline(Recipe.model_validate(tree), directory, RUNNERS, Silent(), targets)
    return directory


MADE = ("records.jsonl", "demonstrations.jsonl", "pairs.jsonl", "constitution.json", "summary.json")


def made(folder: Path) -> list[bytes]:
    return [(folder / "critique" / name).read_bytes() for name in MADE]


# ----------------------------------------------------------------------------------------------- what is made of it


def test_revisions_are_learned_from_and_nobody_voted(tree: dict[str, Any], tmp_path: Path) -> None:
    done = run(tree, tmp_path / "run")
    folder = done.stage("critique").path
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [record["messages"][0]["content"] for record in records] == [f"what {n}" for n in range(1, 20)]
    finished = {  # (prompt, number) -> text, by hand from the records
        (record["prompt_id"], n): revision["revision"]
        for record in records
        for n, revision in enumerate(record["revisions"], start=1)
        if revision["parsed"] == "ok"
    }
    shown = read_demonstrations(folder / "demonstrations.jsonl")
    assert [(one.id, one.messages[-1].content) for one in shown] == [
        (f"critique:{prompt}:0:{n}", text) for (prompt, n), text in finished.items()
    ]
    last = {prompt: text for (prompt, _), text in finished.items()}  # the later ones stand last
    initial = {record["prompt_id"]: record["initial"]["text"] for record in records}
    pairs = read_preferences(folder / "pairs.jsonl")
    assert {pair.prompt.id: (pair.chosen, pair.rejected) for pair in pairs} == {
        prompt: (text, initial[prompt]) for prompt, text in last.items() if text != initial[prompt]
    }
    assert {pair.annotator for pair in pairs} == {"constitution:tiny"}
    summary = done.stage("critique").summary()
    drawn = Counter(revision["principle"] for record in records for revision in record["revisions"])
    assert set(drawn) == {"harm", "brief"}  # the third has no tag of those
    assert summary["drawn"] == drawn
    assert summary["demonstrations"] == len(finished) > 5
    assert summary["pairs"] == len(pairs)
    assert summary["equal_pairs"] == len(last) - len(pairs)
    assert summary["kept"] == sum(record["kept"] for record in records) > 1
    assert sum(summary["left_out"].values()) == len(records) - summary["kept"]
    # SFT: two to one; what is learned from are the revisions and the file, and no store was opened for any of it.
    counts = list(done.stage("sft").summary()["mix"].values())
    assert counts[0] // 2 == counts[1] > 0
    learned = json.loads((done.stage("reward").path / "judgements.json").read_text())
    assert sorted(learned["trained"] + learned["heldout"]) == sorted(pair.id for pair in pairs)
    assert done.stage("dpo").summary()["pairs"] > 0
    of_reward = next(one.own for one in shaped(str(done.path)) if one.own.stage == "reward")
    assert {source: sorted(ids) for source, ids in of_reward.trained.items()} == {
        "critique": sorted(learned["trained"])
    }
    assert not (tmp_path / "run" / "feedback.db").exists()


def test_pairs_of_no_change_are_no_pairs(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parrot(
        self: EmbeddedSampler, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int
    ) -> list[Completion]:
        yes = tuple(tiny_tokenizer().encode("yes"))
        return [Completion("", (*yes, 0), (0.0,) * (len(yes) + 1)) for _ in prompts]

    monkeypatch.setattr(EmbeddedSampler, "generate", parrot)
    with pytest.raises(UserError, match="stage reward: critique made no pairs"):
        run(tree, tmp_path / "run", ["reward"])
    summary = RunDir(tmp_path / "run").stage("critique").summary()
    assert (summary["demonstrations"], summary["pairs"], summary["equal_pairs"]) == (38, 0, 19)
    assert summary["changed"] == dict.fromkeys(summary["drawn"], 0)


# ------------------------------------------------------------------------------------------------ what it depends on


def test_a_changed_principle_makes_stale_what_may_draw_it(tree: dict[str, Any], tmp_path: Path) -> None:
    critique = tree["stages"][0]
    more = [
        critique | {"name": "kindly", "tags": [], "principle_ids": ["kind"]},
        critique | {"name": "all", "tags": []},
        {"kind": "sft", "name": "of_kindly", "model": "base", "demonstrations": "kindly"},
    ]
    recipe, directory = Recipe.model_validate({**tree, "stages": tree["stages"] + more}), RunDir(tmp_path / "run")
    run_pipeline(recipe, directory, dict.fromkeys(RUNNERS, lambda stage, context: {}), Silent())

    def stale(old: str, new: str) -> set[str]:
        assert old in CONSTITUTION
        (tmp_path / "tiny.yaml").write_text(CONSTITUTION.replace(old, new))
        return {step.stage.name for step in plan(recipe, directory) if step.state == "stale"}

    assert stale("Be kind.", "Be kind.") == set()
    assert stale("Be kind.", "Be kinder.") == {"kindly", "of_kindly", "all"}
    assert stale("Shorter.", "Much shorter.") == {"critique", "sft", "reward", "dpo", "all"}
    assert stale("weight: 3", "weight: 2") == {"critique", "sft", "reward", "dpo", "all"}
    assert stale("It harms.", "It hurts.") == {"critique", "sft", "reward", "dpo", "all"}


# ---------------------------------------------------------------------------------------------------------- a kill


def test_interrupted_it_goes_on_to_the_same_bits(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel.rollout.critique.CHUNK", 8)
    before = made(run(tree, tmp_path / "whole", ["critique"]).path)
    generate, calls = EmbeddedSampler.generate, 0

    def dies(self: EmbeddedSampler, *arguments: Any) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls in (3, 8):
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(EmbeddedSampler, "generate", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tree, tmp_path / "run", ["critique"])
    assert made(run(tree, tmp_path / "run", ["critique"]).path) == before
    assert calls == 2 + 3 * 5  # three chunks of five steps, and two that were begun again
    assert not (tmp_path / "run" / "critique" / "state").exists()


KILLED = """
import os, signal, sys, yaml
from keel.pipeline.run import run_pipeline
from keel.recipe.recipe import Recipe
from keel.rollout.embedded import EmbeddedSampler
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS

generate, calls = EmbeddedSampler.generate, 0

def dies(self, *arguments):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, *arguments)

EmbeddedSampler.generate = dies
recipe = Recipe.model_validate(yaml.safe_load(open(sys.argv[1])))
run_pipeline(recipe, RunDir(sys.argv[2]), RUNNERS, Silent(), ["critique"])
"""


@pytest.mark.wide
def test_killed_it_goes_on_to_the_same_bits(
    tree: dict[str, Any], tmp_path: Path, subprocess_env: dict[str, str]
) -> None:
    before = made(run(tree, tmp_path / "whole", ["critique"]).path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    assert subprocess.run(command, env=subprocess_env, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "critique" / "state" / "said.jsonl").exists()
    assert made(run(tree, tmp_path / "run", ["critique"]).path) == before


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "changes", "said"),
    [
        ("text: Be kind.", "text: ' '", {}, "tiny.yaml:5: principles.2.text: is blank"),
        ("id: kind", "id: harm", {}, "two principles have the id 'harm'"),
        ("", "", {"tags": ["blue"]}, "no tag of tiny is called 'blue'; there are red in"),
        ("", "", {"principle_ids": ["x"]}, "no principle of tiny is called 'x'; there are harm, brief, kind in"),
        ("", "", {"constitution": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_constitution_is_told_before_compute(
    tree: dict[str, Any], tmp_path: Path, old: str, new: str, changes: dict[str, Any], said: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONSTITUTION.replace(old, new))
    recipe, directory = changed(tree, "critique", **changes), RunDir(tmp_path / "run")
    errors = [str(finding) for finding in check_recipe(recipe, directory) if finding.level == "error"]
    assert any(said in error and error.startswith("critique.constitution: ") for error in errors), errors
    with pytest.raises(UserError) as error:
        run_pipeline(recipe, directory, RUNNERS, Silent())
    assert said in str(error.value)


def test_a_model_that_cannot_converse_and_draws_that_are_too_few_are_told(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base" / "chat_template.jinja").unlink()
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    recipe = Recipe.model_validate({**tree, "stages": [{**tree["stages"][0], "revisions": 1}]})
    found = check_recipe(recipe, RunDir(tmp_path / "run"))
    note = next(str(finding) for finding in found if finding.level == "note" and "principles" in finding.sentence)
    assert "has 2 principles to draw from, and draws 1 times at most (1 a prompt, 1 prompts)" in note
    assert any("no chat template, and would see the last request alone" in finding.sentence for finding in found)
    with pytest.raises(UserError, match=r"critique.model \(.*\): it has no chat template"):
        run(recipe.model_dump(mode="json"), tmp_path / "run")


# -------------------------------------------------------------------------------------------------------- the mix


def test_a_mixed_epoch_has_its_ratio_and_none_twice() -> None:
    """Sizes 7 and 4 at weights 1 and 2: four of the second need two of the first. 7 // 2 = 3 epochs have different ones
    of the first, and the fourth begins anew."""
    sources = [tuple(range(7)), tuple(range(10, 14))]
    schedule = MixedSchedule.of(sources, [1, 2], batch_size=4, epochs=6, seed=5)
    assert (schedule.counts, schedule.size, schedule.steps) == ((2, 4), 6, 9)
    seen = [i for step in range(schedule.steps) for i in schedule.batch(step)]
    epochs = [seen[i : i + 6] for i in range(0, 36, 6)]
    for epoch in epochs:
        assert sorted(i for i in epoch if i >= 10) == [10, 11, 12, 13]
        assert len({i for i in epoch if i < 10}) == 2
    first = [i for epoch in epochs for i in epoch if i < 10]
    assert len(set(first[:6])) == len(set(first[6:])) == 6
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[3]


@pytest.mark.parametrize(
    ("sources", "mix", "said"),
    [
        ("a.jsonl", [1], "list two sources or more"),
        (["a.jsonl", "b.jsonl"], [1, 2, 3], "mix has 3 weights and demonstrations names 2"),
        (["a.jsonl", "a.jsonl"], [1, 2], "names the same twice"),
        (["a.jsonl", "b.jsonl"], [1, 0], "a weight is above 0"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(sources: Any, mix: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SftStage(name="sft", demonstrations=sources, mix=mix)


def test_a_mix_came_later() -> None:
    assert "mix" not in SftStage(name="sft").settings()
