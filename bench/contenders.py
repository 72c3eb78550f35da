"""Who is compared on which task, and with what settings: Keel, and each peer with its defaults and with the best
settings found for it.

The best settings are searched for, not guessed: ``python -m bench tune`` tries every candidate below and keeps the
fastest of each peer, task and model in ``bench/results/best-DEVICE.json``. A model that has no entry takes the
smallest one's, and where there is none at all, the first candidate stands in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.work import GRPO_FAMILY, SAMPLING

Settings = dict[str, Any]

# glibc keeps freed memory instead of returning it to the system: fewer page faults. Keel's command line sets malloc for
# itself (keel/cli/process.py), peers leave it to their users, who would do this.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "100000000",
}


@dataclass(frozen=True)
class Contender:
    """``environment``: whose Python runs it; ``worker``: the module that does; ``malloc``: with ``MALLOC`` above."""

    name: str
    environment: str
    worker: str
    settings: Settings = field(default_factory=dict)
    malloc: bool = False

    @property
    def ours(self) -> bool:
        return self.environment == "keel"

    @property
    def restless(self) -> bool:
        """Whether it uses a processor while it waits: continuous batching's thread, which looks for requests."""
        return "continuous" in self.settings


@dataclass(frozen=True)
class Peer:
    name: str
    environment: str
    worker: str
    tasks: tuple[str, ...]
    defaults: Settings = field(default_factory=dict)

    def contender(self, name: str, settings: Settings) -> Contender:
        given = {k: v for k, v in settings.items() if k != "malloc"}
        return Contender(name, self.environment, self.worker, given, bool(settings.get("malloc")))


PEERS = (
    Peer("TRL", "trl", "bench.workers.trl", ("sft", "dpo", "simpo", "kto", "reward", *GRPO_FAMILY)),
    Peer("TRL 1.12", "trl-ppo", "bench.workers.trl_ppo", ("ppo",)),
    Peer("generate", "transformers", "bench.workers.generate", SAMPLING),
    Peer("continuous batching", "transformers", "bench.workers.generate", SAMPLING, {"continuous": {}}),
    Peer("vLLM", "vllm", "bench.workers.vllm", SAMPLING),
)


def _trained(**more: Any) -> Settings:
    """TRL's settings that never cost speed: nothing computed twice, memory kept."""
    return {"checkpointing": False, "malloc": True, **more}


_FP32, _BF16 = {"precision": "fp32"}, {"precision": "bf16"}
_PLAIN = [_trained(**p, micro=m) for m in (8, 32) for p in (_FP32, _BF16)]
_PADDING_FREE_ON_GPU = [_trained(**_BF16, padding_free=True, attention="flash_attention_2", micro=32)]

# The first of each list stands in until `tune` has run: for SFT, DPO and the reward model what an earlier search on two
# cores found best, elsewhere a guess.
CANDIDATES: Mapping[tuple[str, str], Sequence[Settings]] = {
    ("TRL", "sft"): [
        _trained(**_FP32, group=True, micro=8),
        _trained(**_BF16, group=True, micro=8),
        _trained(**_FP32, group=True, micro=32),
        _trained(**_BF16, group=True, micro=32),
        _trained(**_FP32, padding_free=True, micro=8),
        _trained(**_BF16, padding_free=True, micro=8),
        *_PLAIN,
    ],
    ("TRL", "dpo"): [
        _trained(**_BF16, precompute=True, micro=8),
        _trained(**_FP32, precompute=True, micro=8),
        _trained(**_BF16, precompute=True, micro=32),
        _trained(**_FP32, precompute=True, micro=32),
        _trained(**_BF16, precompute=True, group=True, micro=8),
        *_PLAIN,
    ],
    ("TRL", "simpo"): _PLAIN,
    ("TRL", "kto"): [
        *(_trained(**p, precompute=True, micro=m) for m in (8, 32) for p in (_BF16, _FP32)),
        *_PLAIN,
    ],
    ("TRL", "reward"): [
        _trained(**_BF16, group=True, micro=8),
        _trained(**_FP32, group=True, micro=8),
        _trained(**_BF16, group=True, micro=32),
        *_PLAIN,
    ],
    **{
        ("TRL", task): [
            _trained(**_FP32, micro=64),
            _trained(**_BF16, micro=64),
            *_PLAIN,
            _trained(**_FP32, micro=64, continuous={"page_size": 32, "num_blocks": 512, "max_batch_tokens": 512}),
        ]
        for task in GRPO_FAMILY
    },
    ("TRL 1.12", "ppo"): [_trained(**p, micro=m) for m in (64, 8) for p in (_FP32, _BF16)],
}
_SAMPLING_CANDIDATES: Mapping[str, Sequence[Settings]] = {
    "generate": [
        {**p, "batch": batch, "malloc": True, **more}
        for batch in (64, 256)
        for p in (_FP32, _BF16)
        for more in ({}, {"attention": "eager"})
    ]
    + [{**_FP32, "batch": 64, "cache": "static", "malloc": True}],
    "continuous batching": [
        {
            **p,
            "continuous": {"page_size": page, "num_blocks": 64 * 512 // page, "max_batch_tokens": tokens},
            "persistent": True,
            "malloc": True,
        }
        for page in (32, 256)
        for tokens in (512, 2048)
        for p in (_FP32, _BF16)
    ],
    "vLLM": [
        {**p, "batch": batch, "eager": eager, "malloc": True}
        for p in (_FP32, _BF16)
        for batch in (64, 256)
        for eager in (False, True)
    ],
}


def candidates(peer: Peer, task: str, device: str) -> list[Settings]:
    """The settings that `tune` tries."""
    found = list(_SAMPLING_CANDIDATES[peer.name] if task in SAMPLING else CANDIDATES[peer.name, task])
    if device != "cpu":
        found += _PADDING_FREE_ON_GPU if task == "sft" else []
        found.sort(key=lambda settings: settings["precision"] != "bf16")  # the order matters only until `tune` has run
    return found


def keel(task: str) -> list[Contender]:
    """Keel as its recipes run it, in both precisions; and for a fair look at memory with TRL's default settings."""
    worker = "bench.workers.keel"
    both = [Contender(f"Keel {p['precision']}", "keel", worker, p, True) for p in (_FP32, _BF16)]
    if task in SAMPLING:
        return [*both, Contender("Keel bf16, 256 slots", "keel", worker, {**_BF16, "slots": 256}, True)]
    # What TRL's defaults do: activations computed again, eight examples a pass, which have about so many tokens.
    saving = {**_BF16, "checkpointing": True, "batch_tokens": 640}
    return [*both, Contender("Keel bf16, in TRL's memory settings", "keel", worker, saving, True)]


def contenders(task: str, model: str, best_file: Path, device: str) -> list[Contender]:
    """Keel, then each peer with its defaults and with its best settings."""
    found = keel(task)
    for peer in PEERS:
        if task in peer.tasks:
            found.append(peer.contender(peer.name, peer.defaults))
            found.append(peer.contender(f"{peer.name}, best", best(peer, task, model, best_file, device)))
    return found


def best(peer: Peer, task: str, model: str, best_file: Path, device: str) -> Settings:
    """What `tune` found for the model, or for the smallest; before it has run the first candidate."""
    kept = json.loads(best_file.read_text()) if best_file.exists() else {}
    searched = (kept.get(f"{peer.name}/{task}/{of}") for of in (model, "S"))
    found: Settings = next((row["settings"] for row in searched if row), candidates(peer, task, device)[0])
    return found
