"""Tokens a second: Keel's embedded sampler beside transformers' ``generate``, on the same random model and prompts.

    python bench/sampling.py [--threads 2] [--prompts 512] [--tokens 32] [--repeats 3]

The two are timed in turns, so that whatever else the machine does falls on both. Completions have a fixed length (no
stop token), which is the case that suits ``generate`` best: nothing that it pads, nothing that it waits for.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=32, help="completion length")
    parser.add_argument("--batch", type=int, default=256, help="slots of the embedded sampler")
    parser.add_argument("--peer-batch", type=int, default=64, help="batch of generate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(3, 2048, (args.prompts, args.prompt_length))
    ids = prompts.tolist()
    sampling = SamplingConfig(max_new_tokens=args.tokens, batch_size=args.batch)
    total = args.prompts * args.tokens

    @torch.inference_mode()
    def peer() -> None:
        for part in prompts.split(args.peer_batch):
            model.generate(part, do_sample=True, top_k=0, max_new_tokens=args.tokens, attention_mask=torch.ones_like(part))

    def embedded(precision: str) -> Callable[[], None]:
        sampler = make_sampler(model, "embedded", (), precision)  # type: ignore[arg-type]
        return lambda: (sampler.generate(ids, sampling, 0), None)[1]

    cases = {"transformers generate fp32": peer, "keel fp32": embedded("fp32"), "keel bf16": embedded("bf16")}
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(args.repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                speeds[name].append(total / (time.perf_counter() - start))
    base = speeds["transformers generate fp32"]
    for name, values in speeds.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(f"{name:28s} median {statistics.median(values):8.0f} tokens/s  best {max(values):8.0f}  ratio {ratio:5.2f}")


if __name__ == "__main__":
    main()
