"""Which function runs a kind of stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keel.stages.annotate import run_annotate
from keel.stages.context import StageContext
from keel.stages.critique import run_critique
from keel.stages.dpo import run_dpo
from keel.stages.eval import run_eval
from keel.stages.grpo import run_grpo
from keel.stages.ppo import run_ppo
from keel.stages.process_reward import run_process_reward
from keel.stages.report import run_report
from keel.stages.reward import run_reward
from keel.stages.sample import run_sample
from keel.stages.sft import run_sft
from keel.stages.step_labels import run_step_labels

RUNNERS: Mapping[str, Callable[[Any, StageContext], dict[str, Any]]] = {
    "sft": run_sft,
    "sample": run_sample,
    "critique": run_critique,
    "annotate": run_annotate,
    "reward": run_reward,
    "step_labels": run_step_labels,
    "process_reward": run_process_reward,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "grpo": run_grpo,
    "eval": run_eval,
    "report": run_report,
}
