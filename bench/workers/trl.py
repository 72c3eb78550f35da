"""TRL 1.16: SFT, DPO, reward model, GRPO.

settings (a missing one leaves TRL's default): ``precision``, ``checkpointing``, ``micro`` (examples in one forward
pass), ``group`` (batches of similar lengths), ``padding_free``, ``precompute`` (DPO's reference in a pass of its own),
``attention``, ``continuous`` (GRPO: sample by continuous batching, so configured).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from bench.work import EOS, GRPO_FAMILY, OPTIM, Job, Pair, Work, conversations, pairs, prompts, text, thumbs
from bench.worker import Outcome, Repetition, Unsupported, clock, serve
from bench.workers.trl_models import MICRO, Clock, causal, scalar


def prepare(job: Job) -> Repetition:
    torch.set_num_threads(job.threads)
    disable_progress_bars()
    own = {"sft": sft, "dpo": dpo, "simpo": simpo, "kto": kto, "reward": reward}
    run = {**own, **dict.fromkeys(GRPO_FAMILY, grpo)}.get(job.work.task)
    if run is None:
        raise Unsupported(f"TRL 1.16 has no {job.work.task}")
    return lambda work: run(job, work)


def arguments(job: Job, work: Work, folder: str) -> dict[str, Any]:
    """What all of TRL's configurations are given: the work's own, and only those settings that the job names."""
    settings = job.settings
    micro = min(settings.get("micro", MICRO), work.batch)
    given: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.batch // micro,
        "num_train_epochs": 1,
        "learning_rate": OPTIM["lr"],
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": OPTIM["eps"],
        "weight_decay": OPTIM["weight_decay"],
        "max_grad_norm": OPTIM["max_grad_norm"],
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": work.seed,
        "use_cpu": job.device == "cpu",
    }
    if "precision" in settings:
        given["bf16"] = settings["precision"] == "bf16"
    if "checkpointing" in settings:
        given["gradient_checkpointing"] = settings["checkpointing"]
    if settings.get("group"):
        given["train_sampling_strategy"] = "group_by_length"
        given["remove_unused_columns"] = False  # or the column with the lengths, which only SFT can do without, is lost
    if "padding_free" in settings:
        given["padding_free"] = settings["padding_free"]
    return given


def precision(args: Any) -> str:
    return "bf16" if args.bf16 else "fp32"


def sft(job: Job, work: Work) -> Outcome:
    rows = conversations(work, job.shape.vocab)
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(job, work, folder)
        # Padding-free batches may not be truncated by TRL; others are not, as nothing is that long.
        args = SFTConfig(**given, max_length=None if job.settings.get("padding_free") else 4096)
        timer = Clock(job.device)
        trainer = SFTTrainer(
            model=causal(job),
            args=args,
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows]),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    return Outcome(sum(map(len, rows)), timer.seconds, precision(args))


def longest(pair: Pair) -> int:
    """What a pair is padded to, and so what to group pairs by."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


class TimedReference:
    """Also times the reference's pass over the data, which TRL makes while a trainer is set up. Stands before it."""

    args: Any
    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        device = "cpu" if self.args.use_cpu else "cuda"
        began = clock(device)
        result = super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]
        self.reference_seconds += clock(device) - began
        return result


class TimedDpo(TimedReference, DPOTrainer):  # type: ignore[misc]
    pass


class TimedKto(TimedReference, KTOTrainer):  # type: ignore[misc]
    pass


def dpo(job: Job, work: Work) -> Outcome:
    rows = [
        {
            "prompt": text(p.prompt),
            "chosen": " " + text(p.chosen),
            "rejected": " " + text(p.rejected),
            "length": longest(p),
        }
        for p in pairs(work, job.shape.vocab)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(job, work, folder)
        if "precompute" in job.settings:
            given["precompute_ref_log_probs"] = job.settings["precompute"]
        args = DPOConfig(**given, max_length=4096)
        timer = Clock(job.device)
        trainer = TimedDpo(
            model=causal(job),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    parts = {"reference": trainer.reference_seconds, "training": timer.seconds}
    return Outcome(len(rows), sum(parts.values()), precision(args), parts)


def simpo(job: Job, work: Work) -> Outcome:
    from trl.experimental.cpo import CPOConfig, CPOTrainer  # it warns that it may change

    rows = [
        {"prompt": text(p.prompt), "chosen": " " + text(p.chosen), "rejected": " " + text(p.rejected)}
        for p in pairs(work, job.shape.vocab)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = CPOConfig(**arguments(job, work, folder), loss_type="simpo", cpo_alpha=0.0, max_length=4096)
        timer = Clock(job.device)
        trainer = CPOTrainer(
            model=causal(job),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    return Outcome(len(rows), timer.seconds, precision(args))


def kto(job: Job, work: Work) -> Outcome:
    rows = [
        {"prompt": text(asked), "completion": " " + text(reply), "label": good}
        for asked, reply, good in thumbs(work, job.shape.vocab)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(job, work, folder)
        if "precompute" in job.settings:
            given["precompute_ref_log_probs"] = job.settings["precompute"]
        args = KTOConfig(**given, max_length=4096)
        timer = Clock(job.device)
        trainer = TimedKto(
            model=causal(job),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    parts = {"reference": trainer.reference_seconds, "training": timer.seconds}
    return Outcome(len(rows), sum(parts.values()), precision(args), parts)


def reward(job: Job, work: Work) -> Outcome:
    rows: list[dict[str, Any]] = [
        {"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected, "length": longest(p)}
        for p in pairs(work, job.shape.vocab)
    ]
    assert all(row["chosen_ids"][-1] == EOS for row in rows), "TRL expects its end token"
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(**arguments(job, work, folder), max_length=4096)
        timer = Clock(job.device)
        trainer = RewardTrainer(
            model=scalar(job),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    return Outcome(len(rows), timer.seconds, precision(args))


# What TRL calls Keel's presets; by default it is DAPO's loss over a group's deviation.
FAMILY: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "batch"},
}


def grpo(job: Job, work: Work) -> Outcome:
    rows = [{"prompt": text(ids)} for ids in prompts(work, job.shape.vocab)]
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(job, work, folder)
        if "continuous" in job.settings:
            given["use_transformers_continuous_batching"] = True
            given["transformers_continuous_batching_config"] = job.settings["continuous"]
        args = GRPOConfig(
            **given,
            **FAMILY[job.work.task],
            max_steps=work.examples // work.batch,
            num_generations=work.group,
            max_completion_length=work.reply[1],
            generation_kwargs={"eos_token_id": None},  # every completion has its full length
        )
        timer = Clock(job.device)
        trainer = GRPOTrainer(
            model=causal(job),
            args=args,
            reward_funcs=even_words,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model_path),
            callbacks=[timer],
        )
        trainer.train()
    return Outcome(work.examples, timer.seconds, precision(args))


def even_words(completions: list[str], **_: Any) -> list[float]:
    """The share of words with an even number: as good a reward as any, and it costs nothing."""
    return [sum(w[-1:] in "02468" for w in words) / max(len(words), 1) for words in map(str.split, completions)]


if __name__ == "__main__":
    serve(prepare)
