"""What TRL's two workers share: the models and the clock."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from bench.work import PAD, Job
from bench.worker import clock

MICRO = 8  # TRL's default per_device_train_batch_size


class Clock(TrainerCallback):  # type: ignore[misc]
    """Training alone: from after the optimizer was made to after the last step."""

    def __init__(self, device: str) -> None:
        self.device, self.began, self.ended = device, 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = clock(self.device)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = clock(self.device)

    @property
    def seconds(self) -> float:
        assert self.ended > self.began > 0, "the trainer did not say when it began and ended"
        return self.ended - self.began


def causal(job: Job) -> Any:
    given = {"attn_implementation": job.settings["attention"]} if "attention" in job.settings else {}
    return AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32, **given)


def scalar(job: Job) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(job.model_path, dtype=torch.float32, num_labels=1)
    model.config.pad_token_id = PAD
    return model
