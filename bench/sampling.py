"""Tokens a second: Keel's embedded sampler beside transformers' ``generate``, on the same random model and prompts.

    python bench/sampling.py [--threads 2] [--prompts 128] [--samples 4] [--tokens 48] [--repeats 3]

Two workloads. ``fixed``: no stop token, every completion has ``--tokens`` tokens, one for each prompt; what suits
``generate`` best. ``replies``: ``--samples`` completions a prompt that end with a stop token, on average after 24
tokens; what a recipe samples. Tokens are counted up to the stop token. The samplers are timed in turns, so that what
else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.config import SamplingConfig
from keel.rollout import make_sampler

VOCABULARY = 2048
STOPS = list(range(3, 3 + VOCABULARY // 32))  # an untrained model draws one of these every 32 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompt-length", type=int, default=25)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a completion")
    parser.add_argument("--batch", type=int, default=256, help="slots of the embedded sampler")
    parser.add_argument("--peer-batch", type=int, default=64, help="batch of generate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(100, VOCABULARY, (args.prompts, args.prompt_length))
    sampling = SamplingConfig(max_new_tokens=args.tokens, batch_size=args.batch)

    def peer(requests: torch.Tensor, stops: list[int]) -> Callable[[], int]:
        @torch.inference_mode()
        def run() -> int:
            tokens = 0
            for part in requests.split(args.peer_batch):
                out = model.generate(
                    part, do_sample=True, top_k=0, max_new_tokens=args.tokens, attention_mask=torch.ones_like(part),
                    eos_token_id=stops or None,
                )[:, part.shape[1] :]  # fmt: skip
                ended = torch.isin(out, torch.tensor(stops)).long().cumsum(1)
                tokens += int((ended - torch.isin(out, torch.tensor(stops)).long() == 0).sum())
            return tokens

        return run

    def keel(requests: torch.Tensor, stops: list[int], precision: str) -> Callable[[], int]:
        sampler, ids = make_sampler(model, "embedded", stops, precision), requests.tolist()  # type: ignore[arg-type]
        return lambda: sum(len(c.ids) for c in sampler.generate(ids, sampling, 0))

    workloads = {"fixed": (prompts, []), "replies": (prompts.repeat_interleave(args.samples, 0), STOPS)}
    for workload, (requests, stops) in workloads.items():
        cases = {
            "transformers generate fp32": peer(requests, stops),
            "keel fp32": keel(requests, stops, "fp32"),
            "keel bf16": keel(requests, stops, "bf16"),
        }
        compare(workload, cases, args.repeats)


def compare(workload: str, cases: dict[str, Callable[[], int]], repeats: int) -> None:
    """Times the cases in turns and prints tokens a second and the median ratio to the first case."""
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            tokens = run()
            if turn:  # the first turn warms up
                speeds[name].append(tokens / (time.perf_counter() - start))
    base = next(iter(speeds.values()))
    for name, values in speeds.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        middle, best = statistics.median(values), max(values)
        print(
            f"{workload:8s} {name:27s} median {middle:7.0f} tokens/s  best {best:7.0f}  ratio {ratio:5.2f}", flush=True
        )


if __name__ == "__main__":
    main()
