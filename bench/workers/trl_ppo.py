"""TRL 1.12, the last with PPO.

settings as for ``bench.workers.trl``: ``precision``, ``checkpointing``, ``micro``.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

# TRL 1.12 warns that its PPO is experimental; it is what there is.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.work import OPTIM, Job, Work, prompts
from bench.worker import Outcome, Repetition, Unsupported, serve
from bench.workers.trl_models import MICRO, Clock, causal, scalar


def prepare(job: Job) -> Repetition:
    torch.set_num_threads(job.threads)
    if job.work.task != "ppo":
        raise Unsupported("this worker does PPO alone")
    return lambda work: ppo(job, work)


def ppo(job: Job, work: Work) -> Outcome:
    settings = job.settings
    micro = min(settings.get("micro", MICRO), work.batch)
    given: dict[str, Any] = {}
    if "precision" in settings:
        given["bf16"] = settings["precision"] == "bf16"
    if "checkpointing" in settings:
        given["gradient_checkpointing"] = settings["checkpointing"]
    dataset = Dataset.from_list([{"input_ids": ids} for ids in prompts(work, job.shape.vocab)])
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            **given,
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=work.batch // micro,
            num_mini_batches=1,
            num_ppo_epochs=work.epochs,
            total_episodes=work.examples,
            response_length=work.reply[1],
            temperature=1.0,
            missing_eos_penalty=1.0,
            num_sample_generations=0,
            learning_rate=OPTIM["lr"],
            adam_epsilon=OPTIM["eps"],
            max_grad_norm=OPTIM["max_grad_norm"],
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=work.seed,
            use_cpu=job.device == "cpu",
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model_path)
        timer = Clock(job.device)
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=causal(job),
            ref_model=causal(job),
            reward_model=scalar(job),
            value_model=scalar(job),
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=[timer],
        )
        trainer.train()
    return Outcome(work.examples, timer.seconds, "bf16" if args.bf16 else "fp32")


if __name__ == "__main__":
    serve(prepare)
