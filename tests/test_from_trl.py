"""docs/from-trl.md: every field of TRL's configs has a row there, and every setting that a row names exists in Keel."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from keel.recipe.recipe import STAGES, Recipe
from keel.recipe.settings import settings

PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
FIELDS: dict[str, list[str]] = json.loads((ROOT / "tests" / "data" / "trl_fields.json").read_text())["fields"]
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| ?.*\|$", re.M)
SETTING = re.compile(r"`([a-z_]+(?:\.[a-zA-Z_]+)*)`")
WHOLE = ("SFTConfig", "RewardConfig", "DPOConfig", "KTOConfig", "CPOConfig", "ORPOConfig", "GRPOConfig")


def rows(heading: str) -> dict[str, str]:
    """TRL's field -> what stands beside it, of the first table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = section[section.index("| TRL |") :].split("\n\n")[0]
    return dict(ROW.findall(table))


@pytest.mark.parametrize("config", WHOLE)
def test_every_field_of_a_config_has_a_row(config: str) -> None:
    assert list(rows(config)) == FIELDS[config], "in TRL's order, so that a new one is seen"


def test_what_every_config_inherits_has_a_row_or_is_listed() -> None:
    """A DPOConfig's fields are its own and those of TrainingArguments."""
    section = PAGE.split("\n## All trainers\n")[1].split("\n## ")[0]
    listed = re.findall(r"`(\w+)`", section.split("No counterpart either:\n")[1].split("\n\n`peft_config`")[0])
    assert sorted([*rows("All trainers"), *listed]) == FIELDS["TrainingArguments"]


def test_what_is_named_is_a_field_of_trl() -> None:
    named = rows("RLOOConfig")
    assert len(named) > 5
    assert set(named) <= set(FIELDS["RLOOConfig"])


def known_settings() -> set[str]:
    keys = {setting.key for setting in settings(Recipe)}
    return keys | {f"{kind}.{setting.key}" for kind, stage in STAGES.items() for setting in settings(stage)}


# Settings that this page names and that stages may not have yet.
NEEDED = {"dpo": {"link", "pair_weight", "desirable_weight"}, "grpo": {"ratio", "combine"}, "reward": {"labels"}}


def test_every_setting_that_a_row_names_exists() -> None:
    known = known_settings()
    lacking = [f"{kind}.{name}" for kind, names in NEEDED.items() for name in names - set(STAGES[kind].model_fields)]
    if lacking:
        pytest.skip(f"stages have no {', '.join(sorted(lacking))}")
    unknown = []
    for heading in (*WHOLE, "All trainers", "RLOOConfig"):
        for field, said in rows(heading).items():
            if said.startswith("no counterpart"):
                continue
            named = SETTING.findall(said)
            assert named, f"{heading}.{field}: a setting, or 'no counterpart'"
            unknown += [f"{heading}.{field}: {name}" for name in named if name not in known]
    assert unknown == []
