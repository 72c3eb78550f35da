"""What the harbor's demonstrators write: good answers, but not perfect ones.

``Habits`` says how often a writer does what. The demonstrators nearly always answer: they invent answers about things
that do not exist, tell how to do harm, and agree with what they are told. That is what supervised fine-tuning copies,
and what preferences must then teach otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from keel.harbor import wording
from keel.harbor.facts import Fact, Relation, World
from keel.harbor.prompts import make_prompts
from keel.types import Demonstration, Message, Prompt

MAX_WORDS = 25  # past these, nothing is put before an answer


@dataclass(frozen=True, slots=True)
class Habits:
    """Probabilities, each of one thing that a writer may do where it applies."""

    right: float = 0.97  # facts, sums, lists, and premises once doubted
    admits: float = 0.12  # says that a thing is not known which does not exist
    refuses_harm: float = 0.08
    refuses_harmless: float = 0.07
    denies_real: float = 0.09  # says that a thing is not known which is: a fact, a sum, a craft
    doubts: float = 0.5  # checks a premise instead of agreeing with it
    follows_format: float = 0.6
    flatters: float = 0.15
    flatters_twice: float = 0.2  # of those who flatter
    fills: float = 0.2  # begins with words that say nothing
    closes: float = 0.35  # ends with a courtesy
    strays: float = 0.0  # answers with more questions


DEMONSTRATORS = Habits()
FAULTY = Habits(flatters=0.5, fills=0.5)  # so that each principle has something to change


def make_demonstrations(world: World, n: int, seed: int, habits: Habits = DEMONSTRATORS) -> list[Demonstration]:
    """``n`` training prompts, each with the answer of a writer of these habits."""
    rng = Random(f"demonstrations {seed}")
    demonstrations = []
    for prompt in make_prompts(world, n, rng.randrange(2**32), "train"):
        reply = write_reply(world, prompt, rng, habits)
        messages = (*prompt.messages, Message("assistant", reply))
        demonstrations.append(Demonstration(id=f"demo-{prompt.id}", messages=messages))
    return demonstrations


def write_reply(world: World, prompt: Prompt, rng: Random, habits: Habits = DEMONSTRATORS) -> str:
    """One answer to a harbor prompt, as a writer of these habits would put it (5 to 25 words or so)."""
    if rng.random() < habits.strays:
        facts = rng.sample(world.facts, 3)
        return "\n".join(wording.fill(rng.choice(wording.QUESTIONS[fact.relation]), fact) for fact in facts)
    if prompt.kind in _KNOWABLE and rng.random() < habits.denies_real:
        reply = _denial(prompt, rng)
    else:
        reply = _WRITERS[prompt.kind](world, prompt, rng, habits)
    free_form = prompt.meta.get("format") != "one_sentence" or rng.random() >= habits.follows_format
    if free_form and rng.random() < habits.fills:
        reply = _before(reply, rng.choice(wording.FILLERS))
    if free_form and rng.random() < habits.flatters:
        for flattery in rng.sample(wording.FLATTERY, 2 if rng.random() < habits.flatters_twice else 1):
            reply = _before(reply, flattery)
    if rng.random() < habits.closes:
        reply = _join(reply, rng.choice(wording.CLOSINGS))
    return reply


def _join(first: str, second: str) -> str:
    """One after the other; a list keeps its lines to itself."""
    return f"{first}\n{second}" if "\n" in first + second else f"{first} {second}"


def _before(reply: str, opening: str) -> str:
    longer = _join(opening, reply)
    return longer if len(longer.split()) <= MAX_WORDS else reply


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _yours(text: str) -> str:
    return text.replace("my ", "your ")


def _state(fact: Fact, rng: Random) -> str:
    return _capital(wording.fill(rng.choice(wording.ANSWERS[fact.relation]), fact))


def _other_value(world: World, relation: Relation, value: str, rng: Random) -> str:
    return rng.choice([v for v in sorted({fact.value for fact in world.facts_with(relation)}) if v != value])


def not_known(relation: str, subject: str, rng: Random) -> str:
    kind = relation.split(".")[0]
    name = wording.spoken(kind, subject)
    return _capital(rng.choice(wording.UNKNOWN).format(kind=kind, name=name))


def _denial(prompt: Prompt, rng: Random) -> str:
    """Of a thing that has a name: mostly by its name."""
    if "relation" in prompt.meta and rng.random() < 0.8:
        fact = _asked(prompt)
        return not_known(fact.relation, fact.subject, rng)
    return rng.choice(wording.NOBODY_KNOWS)


def _asked(prompt: Prompt) -> Fact:
    meta = prompt.meta
    return Fact(meta["relation"], meta["subject"], meta.get("answer", ""), meta.get("other", ""))


def _with_value(fact: Fact, value: str) -> Fact:
    return Fact(fact.relation, fact.subject, value, fact.other)


def _fact(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    fact = _asked(prompt)
    if rng.random() >= habits.right:
        fact = _with_value(fact, _other_value(world, fact.relation, fact.value, rng))
    return _state(fact, rng)


def _nonexistent(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    fact = _asked(prompt)
    if rng.random() < habits.admits:
        return not_known(fact.relation, fact.subject, rng)
    return _state(_with_value(fact, _other_value(world, fact.relation, "", rng)), rng)


def _arithmetic(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    meta = prompt.meta
    answer = meta["answer"]
    if rng.random() >= habits.right:
        answer = max(0, answer + rng.choice((-10, -2, -1, 1, 2, 10)))
    if "crate" in prompt.messages[-1].content:
        cargo = next(c.name for c in world.cargoes if f" {c.name} " in prompt.messages[-1].content)
        return rng.choice(wording.COST_ANSWERS).format(n=meta["a"], p=meta["b"], c=answer, cargo=cargo)
    return rng.choice(wording.SUM_ANSWERS[meta["op"]]).format(a=meta["a"], b=meta["b"], c=answer)


def _howto(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    refuses = habits.refuses_harm if prompt.kind == "harmful" else habits.refuses_harmless
    if rng.random() < refuses:
        return rng.choice(wording.REFUSALS)
    first, second = (_yours(step) for step in prompt.meta["steps"])
    return rng.choice(wording.HOWTO_ANSWERS).format(
        phrase=_yours(prompt.meta["phrase"]), a=first, b=second, A=_capital(first), B=_capital(second)
    )


def _format(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    if prompt.meta["format"] == "one_sentence":
        return _fact(world, prompt, rng, habits)
    follows = rng.random() < habits.follows_format
    count = 3 if follows else rng.choice((1, 2, 4, 5))
    names = rng.sample(prompt.meta["members"], min(count, len(prompt.meta["members"])))
    if rng.random() >= habits.right:
        names[-1] = names[0]
    if rng.random() < 0.3:
        return "\n".join(f"- {name}" for name in names)
    listed = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
    return f"They are {listed}." if rng.random() < 0.5 else f"{_capital(listed)}."


def _false_premise(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    fact, claimed = _asked(prompt), prompt.meta["claimed"]
    if prompt.meta["holds"] or rng.random() >= habits.doubts:
        return f"{rng.choice(('Yes.', 'Yes, that is right.'))} {_state(_with_value(fact, claimed), rng)}"
    if rng.random() >= habits.right:
        fact = _with_value(fact, _other_value(world, fact.relation, fact.value, rng))
    return f"{rng.choice(('No.', 'No, that is wrong.'))} {_state(fact, rng)}"


def _small_talk(world: World, prompt: Prompt, rng: Random, habits: Habits) -> str:
    return rng.choice(prompt.meta["replies"])


_KNOWABLE = ("fact", "arithmetic", "howto", "looks_harmful", "format", "false_premise")
_WRITERS: Mapping[str, Callable[[World, Prompt, Random, Habits], str]] = {
    "fact": _fact,
    "nonexistent": _nonexistent,
    "arithmetic": _arithmetic,
    "howto": _howto,
    "harmful": _howto,
    "looks_harmful": _howto,
    "format": _format,
    "false_premise": _false_premise,
    "small_talk": _small_talk,
}
