"""vLLM, its engine in the worker's own process.

settings: ``precision``, ``batch`` (most sequences decoded together), ``eager`` (no compilation).
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's memory and time are then this process's
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; more than any of these tasks needs
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from bench.work import SAMPLING, Job, Work, prompts, stop_ids
from bench.worker import Outcome, Repetition, Unsupported, clock, serve


def prepare(job: Job) -> Repetition:
    if job.work.task not in SAMPLING:
        raise Unsupported("vLLM samples, it does not train")
    if job.device == "cpu":  # vLLM binds its own threads
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job.threads - 1}" if job.threads > 1 else "nobind")
    from vllm import LLM, SamplingParams

    precision = job.settings.get("precision", "bf16")
    engine = LLM(
        model=job.model_path,
        dtype="bfloat16" if precision == "bf16" else "float32",
        max_model_len=min(4096, 2 * job.work.context),
        max_num_seqs=job.settings.get("batch", job.work.batch),
        enforce_eager=job.settings.get("eager", False),
        enable_prefix_caching=False,  # the prompts of a repetition must not be found in the last one's cache
        gpu_memory_utilization=0.5,
        seed=job.work.seed,
    )

    def run(work: Work) -> Outcome:
        stops = stop_ids(work.task, job.shape.vocab)
        settings = SamplingParams(
            temperature=1.0, max_tokens=work.reply[1], ignore_eos=True, stop_token_ids=stops, detokenize=False
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts(work, job.shape.vocab)]
        began = clock(job.device)
        outputs = engine.generate(requests, settings, use_tqdm=False)
        return Outcome(sum(len(o.outputs[0].token_ids) for o in outputs), clock(job.device) - began, precision)

    return run


if __name__ == "__main__":
    serve(prepare)
