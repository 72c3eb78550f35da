"""What is timed: the models' shapes, the tasks' sizes, the data. Plain Python: every peer's environment reads it.

Data is random token ids from a seed, the same for everybody. Ids below ``RESERVED`` are special tokens. The tokenizer
that lies beside each model is one word a token (``w17``), so that a text is as long as its ids for every library.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

PAD, EOS = 0, 1
RESERVED = 8

GRPO_FAMILY = ("grpo", "dr_grpo", "gspo", "cispo")

UNITS = {
    "sft": "tokens of conversations trained on (padding not counted) a second",
    "dpo": "preference pairs trained on a second, the reference's log-probabilities included",
    "simpo": "preference pairs trained on a second, without a reference",
    "kto": "single replies trained on a second, the reference's log-probabilities included",
    "reward": "preference pairs trained on a second",
    "ppo": "episodes a second: sampled, scored, and trained on for all epochs",
    **dict.fromkeys(GRPO_FAMILY, "completions a second: sampled, scored, and trained on"),
    "sample_fixed": "sampled tokens a second",
    "sample_varied": "sampled tokens a second, the stop token included, nothing after it counted",
}
SAMPLING = ("sample_fixed", "sample_varied")
STOP_EVERY = 32  # varied lengths: 1 in 32 of the vocabulary ends a completion, and an untrained model draws evenly


@dataclass(frozen=True)
class Shape:
    """A Llama decoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.ffn

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2) + norms


SHAPES = {
    "S": Shape(2048, 192, 6, 6, 6, 512, tied=False),  # 3.4M parameters
    "SM": Shape(4096, 320, 8, 8, 8, 896, tied=True),  # 11M, only to see how cost grows
    "M": Shape(8192, 512, 8, 8, 8, 1408, tied=True),  # 30M
    "S-128k": Shape(128_000, 192, 6, 6, 6, 512, tied=True),  # S under a large vocabulary: what log-probabilities cost
    "qwen-0.5b": Shape(151_936, 896, 24, 14, 2, 4864, tied=True),
    "qwen-1.5b": Shape(151_936, 1536, 28, 12, 2, 8960, tied=True),
}


@dataclass(frozen=True)
class Work:
    """One task's size. ``examples`` in all, ``batch`` of them an optimizer step (or decoded together); lengths are
    drawn evenly from the closed ranges ``prompt`` and ``reply``. SFT conversations are ``prompt`` + ``reply`` long."""

    task: str
    examples: int
    batch: int
    prompt: tuple[int, int]
    reply: tuple[int, int]
    epochs: int = 1  # over each rollout
    group: int = 1  # completions a prompt
    seed: int = 0

    @property
    def context(self) -> int:
        return self.prompt[1] + self.reply[1]

    def first(self, examples: int) -> Work:
        """The same work, shorter."""
        return replace(self, examples=min(examples, self.examples), batch=min(self.batch, examples))


WORK = {
    "sft": Work("sft", 192, 32, prompt=(10, 60), reply=(10, 60)),
    "dpo": Work("dpo", 128, 32, prompt=(10, 40), reply=(10, 40)),
    "simpo": Work("simpo", 128, 32, prompt=(10, 40), reply=(10, 40)),
    "kto": Work("kto", 128, 32, prompt=(10, 40), reply=(10, 40)),
    "reward": Work("reward", 128, 32, prompt=(10, 40), reply=(10, 40)),
    "ppo": Work("ppo", 64, 64, prompt=(32, 32), reply=(48, 48), epochs=4),
    **{task: Work(task, 128, 64, prompt=(32, 32), reply=(48, 48), group=8) for task in GRPO_FAMILY},
    "sample_fixed": Work("sample_fixed", 256, 64, prompt=(32, 32), reply=(48, 48)),
    "sample_varied": Work("sample_varied", 256, 64, prompt=(32, 32), reply=(1, 96)),
}


def work_of(task: str, model: str, device: str, quick: bool) -> Work:
    """How much of a task a model does: some seconds for the slowest peer on two cores."""
    work = WORK[task]
    if device != "cpu":  # GPUs: longer texts, and enough of them to fill the machine
        work = replace(
            work,
            examples=(4 if task in SAMPLING else 2) * work.examples,
            batch=4 * work.batch if task in SAMPLING else work.batch,
            prompt=(8 * work.prompt[0], 8 * work.prompt[1]),
            reply=(work.reply[0] if task == "sample_varied" else 8 * work.reply[0], 8 * work.reply[1]),
        )
    elif model != "S":
        work = replace(work, examples=work.examples // 2, batch=min(work.batch, work.examples // 2))
        if task in SAMPLING:
            work = replace(work, examples=64, batch=64)
    return quicker(work) if quick else work


def quicker(work: Work) -> Work:
    """An eighth of the work: whether everything runs, not how fast."""
    examples = max(16, work.examples // 8)
    return replace(work, examples=examples, batch=min(work.batch, examples))


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def prompts(work: Work, vocab: int) -> list[list[int]]:
    """One an example; with groups, one a group."""
    draw = random.Random(f"prompts/{work.seed}")
    return [_ids(draw, work.prompt, vocab) for _ in range(work.examples // work.group)]


def conversations(work: Work, vocab: int) -> list[list[int]]:
    """Every token but the first is learned."""
    draw = random.Random(f"conversations/{work.seed}")
    both = (work.prompt[0] + work.reply[0], work.prompt[1] + work.reply[1])
    return [_ids(draw, both, vocab) for _ in range(work.examples)]


def pairs(work: Work, vocab: int) -> list[Pair]:
    """The replies end with EOS."""
    draw = random.Random(f"pairs/{work.seed}")

    def reply() -> list[int]:
        return [*_ids(draw, (work.reply[0] - 1, work.reply[1] - 1), vocab), EOS]

    return [Pair(_ids(draw, work.prompt, vocab), reply(), reply()) for _ in range(work.examples)]


def thumbs(work: Work, vocab: int) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, reply, whether it is good): of every other pair the chosen reply, of the rest the rejected one."""
    return [(p.prompt, p.rejected if n % 2 else p.chosen, n % 2 == 0) for n, p in enumerate(pairs(work, vocab))]


def stop_ids(task: str, vocab: int) -> list[int]:
    """What ends a completion: nothing, or with varied lengths so many tokens that it ends after 32 on average."""
    return list(range(RESERVED, RESERVED + vocab // STOP_EVERY)) if task == "sample_varied" else []


def _ids(draw: random.Random, length: tuple[int, int], vocab: int) -> list[int]:
    return [draw.randrange(RESERVED, vocab) for _ in range(draw.randint(*length))]


def text(ids: list[int]) -> str:
    return " ".join("<eos>" if i == EOS else f"w{i}" for i in ids)


# ---------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True)
class Job:
    """What a worker is told. ``settings`` are the contender's own."""

    model: str
    model_path: str
    work: Work
    device: str
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Job:
        row = json.loads(line)
        work: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.pop("work").items()}
        return Job(**row, work=Work(**work))


OPTIM = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
"""AdamW at a constant rate, the same for everybody."""
