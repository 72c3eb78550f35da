"""What the names of GRPO's family stand for: settings of :class:`keel.recipe.grpo.GrpoStage`, with the papers' numbers.

Each row is whole, so that a name means the same whatever the defaults are. docs/recipes.md has the sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["grpo", "dr_grpo", "dapo", "lite_ppo", "rloo", "reinforce_pp", "gspo", "cispo", "maxrl"]

# GRPO with its loss averaged over tokens and without a KL; each preset says what it does otherwise.
_COMMON: Mapping[str, Any] = {
    "baseline": "group",
    "scale_rewards": "group",
    "normalise": "token",
    "ratio": "token",
    "clip": "ppo",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "cap": None,
    "beta": 0.0,
    "no_spread": "keep",
    "overlong": "penalty",
}
_IN_REWARD = {"place": "reward"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {**_COMMON, "normalise": "sequence", "beta": 0.04},
    "dr_grpo": {**_COMMON, "scale_rewards": "none", "normalise": "constant"},
    "dapo": {**_COMMON, "clip_high": 0.28, "no_spread": "resample", "overlong": "soft"},
    "lite_ppo": {**_COMMON, "scale_rewards": "batch"},
    "rloo": {
        **_COMMON,
        "baseline": "others",
        "scale_rewards": "none",
        "normalise": "constant",
        "clip": "none",
        "beta": 0.03,
        "kl": _IN_REWARD,
        "epochs": 1,
        "minibatches": 1,
    },
    "reinforce_pp": {**_COMMON, "scale_rewards": "batch", "beta": 0.01, "kl": _IN_REWARD},
    "gspo": {
        **_COMMON,
        "normalise": "sequence",
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "minibatches": 4,
    },
    "cispo": {**_COMMON, "scale_rewards": "batch", "clip": "detached", "cap": 5.0},
    "maxrl": {**_COMMON, "scale_rewards": "mean", "missing_eos_penalty": 0.0},
}
