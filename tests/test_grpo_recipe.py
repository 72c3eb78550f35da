"""GRPO's recipe: presets, what they fill, what makes no sense, and what `keel check` says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import ROOT

from keel.check import check_recipe
from keel.recipe.file import finish, read_draft
from keel.recipe.grpo import GrpoStage
from keel.recipe.grpo_presets import PRESETS, PresetName
from keel.run import RunDir
from keel.train.grpo import token_terms

PYTHON = {"source": {"kind": "python", "ref": "x:y"}}
OTHER = {"source": {"kind": "python", "ref": "c:d"}}
NAMES = get_args(PresetName)


def stage(**settings: Any) -> GrpoStage:
    common = {"name": "grpo", "rewards": [PYTHON], "group_size": 4, "rollout_batch": 12}
    return GrpoStage.model_validate({**common, **settings})


def test_every_name_has_a_preset_that_says_all() -> None:
    assert set(NAMES) == set(PRESETS)
    said = set.intersection(*(set(preset) for preset in PRESETS.values()))
    assert said >= {"baseline", "scale_rewards", "normalise", "ratio", "clip", "beta", "no_spread", "overlong"}
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in NAMES:
        assert stage(preset=name, rollout_batch=32)
        assert re.search(rf"^\| `{name}` \|", page, re.M), f"docs/recipes.md has no row of {name}"


def test_a_preset_fills_only_what_is_open() -> None:
    found = stage(preset="dapo", clip_high=0.4, no_spread="drop")
    assert (found.clip_high, found.no_spread, found.clip_low, found.beta) == (0.4, "drop", 0.2, 0.0)
    inner = stage(preset="rloo", kl={"place": "loss", "estimator": "k2"})
    assert (inner.kl.place, inner.kl.estimator, inner.beta) == ("loss", "k2", 0.03)
    kept = stage(preset="rloo", kl={})
    assert kept.kl.place == "reward"
    again = GrpoStage.model_validate(found.model_dump(mode="json"))  # as the manifest keeps it
    assert again == found
    assert found.choices()["scale_rewards"] == "group"


def test_runs_that_were_made_before_still_stand() -> None:
    """The names and values that a fingerprint had of a GRPO stage before it had a family."""
    earlier = {
        *("kind", "model", "optim", "batch_tokens", "precision", "gradient_checkpointing", "compile", "ptx"),
        *("reference", "rewards", "prompts", "episodes", "rollout_batch", "group_size", "minibatches", "epochs"),
        *("sampling", "one_base", "missing_eos_penalty", "reward_clip", "old_logprobs", "watch"),
        *("beta", "clip_low", "clip_high", "scale_rewards", "normalise"),
    }
    plain = GrpoStage.model_validate({"name": "grpo", "rewards": [PYTHON]})
    assert set(plain.settings()) == earlier
    assert plain.settings()["beta"] == 0.04
    assert set(stage(no_spread="drop").settings()) == {*earlier, "no_spread"}
    # A name is no more than what it stands for.
    assert stage(preset="dr_grpo").settings() == stage(scale_rewards="none", normalise="constant", beta=0.0).settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "critic"}, "use a stage of kind: ppo"),
        ({"ratio": "sequence"}, "normalise: token would weigh it by its length"),
        ({"clip": "detached"}, r"set cap \(CISPO: 5\)"),
        ({"clip": "detached", "cap": 0.5}, "a ratio, not a distance from 1"),
        ({"clip": "none", "cap": 2.0}, "clip: none has no ratio for cap"),
        ({"cap": 1.1}, r"above 1 \+ clip_high = 1\.2"),
        ({"baseline": "none"}, "scale_rewards: group divides by 0"),
        ({"baseline": "none", "scale_rewards": "batch"}, "scale_rewards: batch divides by 0"),
        (
            {"combine": "each", "rewards": [PYTHON, {"source": {"kind": "python", "ref": "c:d"}, "weight": -1.0}]},
            "a negative weight would make it a gain",
        ),
        ({"rewards": [PYTHON, PYTHON]}, "rewards: two terms have the same source"),
        ({"episodes": 16, "rollout_batch": 8, "keep": 3}, "keep: a run of 2 iterations has no 3 different checkpoints"),
        ({"baseline": "others", "scale_rewards": "mean"}, "goes with baseline: group, not others"),
        ({"scale_rewards": "mean"}, "set missing_eos_penalty: 0 or overlong: mask"),
        ({"preset": "maxrl", "rewards": [{**PYTHON, "weight": -1.0}]}, "never negative, and scores of reward models"),
        ({"preset": "maxrl", "rewards": [{"source": {"kind": "model", "model": "m"}}]}, "scores of reward models"),
        ({"preset": "maxrl", "beta": 0.1, "kl": {"place": "reward"}}, "kl.place: reward can make a reward negative"),
        ({"kl": {"place": "reward", "estimator": "k2"}}, "takes k1 of the whole reply"),
        ({"kl": {"place": "reward", "unbiased": True}}, "takes k1 of the whole reply"),
        ({"no_spread": "drop", "baseline": "batch", "scale_rewards": "batch"}, "a group of equal scores does teach"),
        ({"overlong": "soft", "missing_eos_penalty": 0.0}, "rises to missing_eos_penalty, which is 0"),
        ({"sampler_correction": "clip", "old_logprobs": "sampler"}, "set old_logprobs: auto or trainer"),
        ({"correction_bounds": [2.0, 5.0]}, "two ratios with 1 between them"),
        ({"combine": "each"}, "for several rewards"),
        ({"combine": "each", "rewards": [PYTHON, OTHER], "scale_rewards": "none"}, "by their deviation"),
        ({"combine": "each", "rewards": [PYTHON, OTHER], "reward_clip": 1.0}, "combine: each makes none"),
        ({"combine": "each", "rewards": [PYTHON, OTHER], "kl": {"place": "reward"}}, "has no sum to take a KL from"),
        ({"preset": "ppo"}, "Input should be 'grpo', 'dr_grpo'"),
        ({"no_spread": "resample", "max_resamples": 0}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_check_says_what_a_stage_comes_to_and_what_has_no_effect() -> None:
    assert stage(preset="dapo").resolved() == (
        "preset dapo; baseline group, scale group, normalise token; ratio token, clip ppo at ratios 0.8 to 1.28; "
        "no KL; groups without spread: resample up to 10 times; replies lose up to 1 from 0.8 x max_new_tokens on"
    )
    assert "clip detached, ratios capped at 5" in stage(preset="cispo").resolved()
    assert "KL 0.03 x k1 in the reward" in stage(preset="rloo").resolved()
    effect = "every ratio is 1, so ratio, clip and bounds change nothing"
    assert effect in stage(minibatches=1).resolved()
    assert effect not in stage().resolved()
    assert not list(stage(preset="rloo").doubts("fp32"))
    assert [d.field for d in stage(preset="rloo", minibatches=2).doubts("fp32")] == ["clip"]
    assert [d.field for d in stage(ratio="sequence", normalise="sequence").doubts("fp32")] == ["clip_low"]
    assert not list(stage(preset="gspo", minibatches=2).doubts("fp32"))


def test_a_preset_is_set_on_the_command_line_too(tmp_path: Path) -> None:
    draft = read_draft(ROOT / "recipes" / "grpo.yaml")
    recipe = finish(draft, ["grpo.preset=cispo", "grpo.clip_high=0.3", "grpo.kl.estimator=k2"])
    (found,) = recipe.stages
    notes = [str(f) for f in check_recipe(recipe, RunDir(tmp_path)) if f.level == "note"]
    assert [note for note in notes if note.startswith("grpo: preset cispo; baseline group, scale batch")]
    assert isinstance(found, GrpoStage)
    assert (found.clip, found.cap, found.clip_high, found.kl.estimator) == ("detached", 5.0, 0.3, "k2")
    assert found.beta == 0.04  # the file says so


def test_a_kl_in_the_reward_is_none_in_the_loss() -> None:
    assert token_terms(stage(preset="rloo")).beta == 0.0
    assert token_terms(stage(preset="grpo")).beta == 0.04
