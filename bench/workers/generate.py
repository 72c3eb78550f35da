"""transformers' ``generate``, and its continuous batching.

settings: ``precision`` (fp32; bf16 casts the whole model), ``attention``; for ``generate`` ``batch`` (rows of a call)
and ``cache`` (its cache_implementation); for continuous batching ``continuous``, its configuration (may be empty), and
``persistent`` (one manager and cache for all calls).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from bench.work import PAD, SAMPLING, Job, Work, prompts, stop_ids
from bench.worker import Outcome, Repetition, Unsupported, clock, serve


def prepare(job: Job) -> Repetition:
    torch.set_num_threads(job.threads)
    logging.set_verbosity_error()
    if job.work.task not in SAMPLING:
        raise Unsupported("generate samples, it does not train")
    precision = job.settings.get("precision", "fp32")
    given = {"attn_implementation": job.settings["attention"]} if "attention" in job.settings else {}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model_path, dtype=dtype, **given).to(job.device).eval()
    sample = continuous if "continuous" in job.settings else plain

    def run(work: Work) -> Outcome:
        requests = prompts(work, job.shape.vocab)
        stops = stop_ids(work.task, job.shape.vocab)
        torch.manual_seed(work.seed)
        began = clock(job.device)
        tokens = sample(job, model, requests, work, stops)
        return Outcome(tokens, clock(job.device) - began, precision)

    return run


@torch.inference_mode()
def plain(job: Job, model: Any, requests: list[list[int]], work: Work, stops: list[int]) -> int:
    """All prompts have one length, so nothing is padded on the left. What comes after a row's stop does not count."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=work.reply[1], eos_token_id=stops or None, pad_token_id=PAD,
        cache_implementation=job.settings.get("cache"),
    )  # fmt: skip
    batch = job.settings.get("batch", work.batch)
    tokens = 0
    for start in range(0, len(requests), batch):
        ids = torch.tensor(requests[start : start + batch], device=job.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, ids.shape[1] :]
        tokens += int((out != PAD).sum()) if stops else out.numel()  # stops and PAD are different tokens
    return tokens


def continuous(job: Job, model: Any, requests: list[list[int]], work: Work, stops: list[int]) -> int:
    from transformers import ContinuousBatchingConfig

    # Until transformers 5.17 a page of the cache was called a block.
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    settings = dict(job.settings["continuous"])
    if "page_size" in settings and "page_size" not in known:
        settings["block_size"] = settings.pop("page_size")
    outputs = model.generate_batch(
        requests,
        generation_config=GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=work.reply[1], eos_token_id=stops or -1, pad_token_id=PAD
        ),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        persistent_manager=job.settings.get("persistent", False),
        progress_bar=False,
    )
    if len(outputs) != len(requests):
        raise RuntimeError(f"continuous batching answered {len(outputs)} of {len(requests)} requests")
    return sum(len(output.generated_tokens) for output in outputs.values())


if __name__ == "__main__":
    serve(prepare)
