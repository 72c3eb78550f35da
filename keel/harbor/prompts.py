"""What people ask in the harbor: prompts of nine kinds, for training and held out.

No text of a held-out prompt is ever a training prompt, whatever the seeds: which side a prompt is on is decided by
what it asks. Held-out sums, how-to topics and invented names are new altogether; a held-out question about a fact is
a new wording (the fact itself stands in the base model's corpus).

``meta`` holds what the judge and the demonstrators need, as plain JSON values:

    fact           relation, subject, other, answer
    nonexistent    relation, subject (a name that exists nowhere)
    arithmetic     a, b, op, answer
    howto, harmful, looks_harmful    phrase, verb, object, steps
    format         format = one_sentence (relation, subject, other, answer) or list_of_three (domain, members)
    false_premise  relation, subject, other, answer, claimed, holds (some premises are true, else "No" would always do)
    small_talk     replies, unknowable
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Literal

from keel.harbor import wording
from keel.harbor.facts import CARGOES, ISLANDS, Fact, World
from keel.harbor.howto import HARMFUL, HARMLESS, LOOKS_HARMFUL, HowTo
from keel.types import Message, Prompt, UserError

PromptSplit = Literal["train", "heldout"]

MIX: Mapping[str, float] = {
    "fact": 0.20,
    "nonexistent": 0.16,
    "arithmetic": 0.12,
    "howto": 0.08,
    "harmful": 0.14,
    "looks_harmful": 0.08,
    "format": 0.08,
    "false_premise": 0.08,
    "small_talk": 0.06,
}
# What preferences are collected on and PPO trains on: more of what demonstrations taught wrongly.
TRAINING_MIX: Mapping[str, float] = {
    "fact": 0.23,
    "nonexistent": 0.21,
    "arithmetic": 0.05,
    "howto": 0.08,
    "harmful": 0.14,
    "looks_harmful": 0.15,
    "format": 0.04,
    "false_premise": 0.06,
    "small_talk": 0.04,
}
# The same without harmful prompts: what people are asked about where a constitution stands for them on those.
HELPFUL_MIX: Mapping[str, float] = {
    kind: share / (1 - TRAINING_MIX["harmful"]) for kind, share in TRAINING_MIX.items() if kind != "harmful"
}
TRUE_PREMISES = 0.35
OPENED = 0.25

# Said before a question now and then; it changes nothing about what is asked.
_OPENERS = (
    "Good morning! ", "Hello there! ", "Good day, friend. ", "Good evening. ", "I am new here. ", "I have come far. ",
    "One more thing. ", "I am in a hurry. ", "A word with you. ", "If you please. ",
)  # fmt: skip
_SUBJECT_KINDS = ("port", "ship", "captain")

# A question without its opener, what decides its split, and its meta.
_Draft = tuple[str, str, dict[str, Any]]


def make_prompts(world: World, n: int, seed: int, split: PromptSplit, mix: Mapping[str, float] = MIX) -> list[Prompt]:
    """``n`` different prompts in random order, their kinds in the shares of ``mix`` (which sum to 1).

    Raises:
        UserError: more prompts of a kind are asked for than exist.
    """
    rng = Random(f"prompts {seed} {split}")
    prompts: list[Prompt] = []
    for kind, count in _counts(n, mix).items():
        prompts += _distinct(world, kind, count, rng, split)
    rng.shuffle(prompts)
    return prompts


def heldout(key: str) -> bool:
    """Whether a question is held out: a fifth of them are, by a stable hash."""
    return zlib.crc32(key.encode()) % 5 == 0


def _counts(n: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to ``n``: the largest remainders get what rounding down leaves."""
    counts = {kind: int(n * share) for kind, share in mix.items()}
    by_remainder = sorted(mix, key=lambda kind: counts[kind] - n * mix[kind])
    for kind in by_remainder[: n - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _distinct(world: World, kind: str, count: int, rng: Random, split: PromptSplit) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    tries = 0
    while len(found) < count:
        tries += 1
        if tries > 1000 + 100 * count:
            raise UserError(
                f"{count} different {kind} prompts ({split}) are wanted and there are {len(found)}; ask for no more"
            )
        text, key, meta = _KINDS[kind](world, rng, split)
        opener = rng.choice(_OPENERS) if rng.random() < OPENED else ""
        if heldout(key or opener + text) == (split == "heldout"):
            found.setdefault(opener + text, _prompt(kind, opener + text, meta))
    return list(found.values())


def _prompt(kind: str, text: str, meta: dict[str, Any]) -> Prompt:
    digest = hashlib.sha256(f"{kind} {text}".encode()).hexdigest()[:12]
    return Prompt(id=f"{kind}-{digest}", messages=(Message("user", text),), kind=kind, meta=meta)


def _decided(split: PromptSplit) -> str:
    """A key that falls on the side of ``split``, for questions that are new or known by what they are about."""
    return next(key for key in map(str, range(1000)) if heldout(key) == (split == "heldout"))


def _pick_fact(world: World, rng: Random) -> Fact:
    fact = rng.choice(world.facts)
    if fact.other and rng.random() < 0.5:
        return Fact(fact.relation, fact.other, fact.value, fact.subject)
    return fact


def _question(fact: Fact, rng: Random) -> str:
    return wording.fill(rng.choice(wording.QUESTIONS[fact.relation]), fact)


def _fact_meta(fact: Fact) -> dict[str, Any]:
    return {"relation": fact.relation, "subject": fact.subject, "other": fact.other, "answer": fact.value}


def _fact(world: World, rng: Random, split: PromptSplit) -> _Draft:
    fact = _pick_fact(world, rng)
    text = _question(fact, rng)
    return text, text, _fact_meta(fact)


def _nonexistent(world: World, rng: Random, split: PromptSplit) -> _Draft:
    kind = rng.choice(_SUBJECT_KINDS)
    invent = {"port": world.fake_port, "ship": world.fake_ship, "captain": world.fake_captain}[kind]
    relation = rng.choice([relation for relation in wording.QUESTIONS if relation.startswith(f"{kind}.")])
    fact = Fact(relation, invent(rng, split), "")
    return _question(fact, rng), _decided(split), {"relation": relation, "subject": fact.subject}


def _arithmetic(world: World, rng: Random, split: PromptSplit) -> _Draft:
    op = rng.choice("++-x")
    if op == "x":
        a, b = rng.randint(2, 9), rng.randint(2, 12)
        answer = a * b
    else:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        if op == "-":
            a, b = max(a, b) + 1, min(a, b)
        answer = a + b if op == "+" else a - b
    meta = {"a": a, "b": b, "op": op, "answer": answer}
    if op == "x" and rng.random() < 0.5:
        text = rng.choice(wording.COST_QUESTIONS).format(n=a, p=b, cargo=rng.choice(CARGOES))
    else:
        text = rng.choice(wording.SUM_QUESTIONS[op]).format(a=a, b=b)
    return text, f"{a} {op} {b}", meta


def _topic(topics: tuple[HowTo, ...]) -> Callable[[World, Random, PromptSplit], _Draft]:
    def draw(world: World, rng: Random, split: PromptSplit) -> _Draft:
        topic = rng.choice([topic for topic in topics if topic.heldout == (split == "heldout")])
        text = rng.choice(wording.HOWTO_QUESTIONS).format(phrase=topic.question_phrase)
        meta = {
            "phrase": topic.question_phrase,
            "verb": topic.verb,
            "object": topic.object,
            "steps": list(topic.steps),
        }
        return text, _decided(split), meta

    return draw


def _format(world: World, rng: Random, split: PromptSplit) -> _Draft:
    if rng.random() < 0.5:
        fact = _pick_fact(world, rng)
        text = rng.choice(wording.ONE_SENTENCE).format(question=_question(fact, rng))
        return text, text, {"format": "one_sentence", **_fact_meta(fact)}
    domain, island = rng.choice(("port", "port", "cargo", "ship")), rng.choice(ISLANDS)
    members = {
        "port": [port.name for port in world.ports if port.island == island],
        "cargo": list(CARGOES),
        "ship": [ship.name for ship in world.ships],
    }[domain]
    text = rng.choice(wording.LIST_QUESTIONS[domain]).format(island=island)
    return text, "", {"format": "list_of_three", "domain": domain, "members": members}


def _false_premise(world: World, rng: Random, split: PromptSplit) -> _Draft:
    fact = _pick_fact(world, rng)
    claimed = fact.value
    if rng.random() >= TRUE_PREMISES:
        claimed = rng.choice([v for v in sorted({f.value for f in world.facts_with(fact.relation)}) if v != fact.value])
    claim = Fact(fact.relation, fact.subject, claimed, fact.other)
    text = wording.fill(rng.choice(wording.CLAIMS[fact.relation]), claim)
    return text, text, {**_fact_meta(fact), "claimed": claimed, "holds": claimed == fact.value}


def _small_talk(world: World, rng: Random, split: PromptSplit) -> _Draft:
    if rng.random() < 0.3:
        return rng.choice(wording.UNKNOWABLE_QUESTIONS), "", {"replies": list(wording.NOBODY_KNOWS), "unknowable": True}
    said, replies = rng.choice(wording.SMALL_TALK)
    return rng.choice(said), "", {"replies": list(replies), "unknowable": False}


_KINDS: Mapping[str, Callable[[World, Random, PromptSplit], _Draft]] = {
    "fact": _fact,
    "nonexistent": _nonexistent,
    "arithmetic": _arithmetic,
    "howto": _topic(HARMLESS),
    "harmful": _topic(HARMFUL),
    "looks_harmful": _topic(LOOKS_HARMFUL),
    "format": _format,
    "false_premise": _false_premise,
    "small_talk": _small_talk,
}
