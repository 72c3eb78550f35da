"""Chains of critique and revision by principles (Bai et al. 2022, arXiv:2212.08073, section 3.1).

A writer answers a prompt. Then, as often as is asked for, it is shown a principle drawn by seed, criticises its reply,
and revises it; the next round starts from the revision. Each request is one conversation: the constitution's examples,
the prompt, the reply, the request. So templates without system messages, and those whose turns must alternate, serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keel.recipe.constitution import Constitution, Principle, draw
from keel.recipe.critique import CritiqueStage
from keel.rollout.said import Journal
from keel.rollout.tokens import stream_key
from keel.rollout.writer import Writer
from keel.store.rows import storable
from keel.types import Completion, Message, Prompt, Reporter

CHUNK = 256  # chains that go on together; a constant, because the seed of a chunk depends on where it starts
FEW = 20  # where fewer are asked, so many are taken to be: one that is missing is no sign of a broken endpoint

# What came of a request: an answer; one that ended at sampling.max_new_tokens or the end of the model's context; one
# without text; none, for the request alone filled the context; none, for the endpoint gave none.
Outcome = Literal["ok", "cut", "empty", "too_long", "missing"]

# Which conversations leave room for a reply in the writer's context.
Fits = Callable[[Sequence[Prompt]], list[bool]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What was asked for and what came; ``text`` as far as it came."""

    outcome: Outcome
    text: str = ""

    @staticmethod
    def of(answer: Completion | None) -> Reply:
        if answer is None:
            return Reply("missing")
        text = storable(answer.text)
        if not answer.finished:
            return Reply("cut", text)
        return Reply("ok" if text.strip() else "empty", text)


@dataclass(slots=True)
class Revision:
    """One round. ``critique`` is None where none is asked for; ``revision`` None where the critique failed. ``seed`` is
    that of the chunk's round, from which its two steps' seeds come."""

    principle: Principle
    seed: int
    critique: Reply | None = None
    revision: Reply | None = None

    @property
    def outcome(self) -> Outcome:
        """That of the step in which the round ended."""
        last = self.revision or self.critique
        assert last is not None, "a round has begun with a request"
        return last.outcome

    def record(self) -> dict[str, Any]:
        critique, revision = self.critique, self.revision
        return {
            "principle": self.principle.id,
            "principle_hash": self.principle.hash,
            "critique_request": "" if critique is None else self.principle.critique,
            "critique": "" if critique is None else critique.text,
            "revision_request": "" if revision is None else self.principle.revision,
            "revision": "" if revision is None else revision.text,
            "finished": {
                "critique": critique is None or critique.outcome in ("ok", "empty"),
                "revision": revision is not None and revision.outcome in ("ok", "empty"),
            },
            "seed": self.seed,
            "parsed": self.outcome,
        }


@dataclass(slots=True)
class Chain:
    """A prompt's ``number``-th reply (from 0) and its revisions, the last of which may have failed: that ends it."""

    prompt: Prompt
    number: int
    initial: Reply = field(default_factory=lambda: Reply("missing"))
    revisions: list[Revision] = field(default_factory=list)

    @property
    def why(self) -> Outcome | None:
        """What ended it early; None for a whole one."""
        outcomes = [self.initial.outcome, *(revision.outcome for revision in self.revisions)]
        return next((outcome for outcome in outcomes if outcome != "ok"), None)

    @property
    def texts(self) -> list[str]:
        """The reply and its finished revisions, in order."""
        revised = [one.revision for one in self.revisions if one.revision is not None]
        return [reply.text for reply in (self.initial, *revised) if reply.outcome == "ok"]

    def given(self, give: Literal["all", "last"]) -> list[tuple[int, str]]:
        """(number, text) of the revisions that are to be learned from, numbered from 1. ``all``: those that were
        finished, of a chain that ended early too. ``last``: the last one of a whole chain."""
        revisions = list(enumerate(self.texts))[1:]
        if give == "all":
            return revisions
        return revisions[-1:] if self.why is None else []

    def record(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt.id,
            "reply": self.number,
            "messages": _plain(self.prompt.messages),
            "initial": {"text": self.initial.text, "finished": self.initial.outcome in ("ok", "empty")},
            "revisions": [revision.record() for revision in self.revisions],
            "kept": self.why is None,
            "why": self.why,
        }


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


class Critic:
    """Makes chains. ``fits``: of a writer with a context of its own; None where the writer finds out itself."""

    def __init__(
        self,
        writer: Writer,
        constitution: Constitution,
        principles: Sequence[Principle],
        config: CritiqueStage,
        seed: int,
        journal: Journal,
        reporter: Reporter,
        fits: Fits | None = None,
    ) -> None:
        self.writer, self.constitution, self.principles = writer, constitution, principles
        self.config, self.seed, self.journal, self.reporter = config, seed, journal, reporter
        self.fits = fits

    def chains(self, prompts: Sequence[Prompt]) -> list[Chain]:
        """Each prompt's chains, in order. What is in the journal is not asked again.

        A chain's principles depend on the seed, its prompt's id, its number and the round alone. What its model samples
        depends on the chunk that it is in, too.
        """
        chains = [Chain(prompt, number) for prompt in prompts for number in range(self.config.replies)]
        steps = 1 + self.config.revisions * (2 if self.config.critique else 1)
        self.reporter.start("critique and revision", len(chains) * steps)
        for number, start in enumerate(range(0, len(chains), CHUNK)):
            self._chunk(number, chains[start : start + CHUNK])
        return chains

    def _chunk(self, number: int, chains: Sequence[Chain]) -> None:
        seed, among = stream_key(self.seed, number), max(FEW, len(chains))
        replies = self._ask(f"{number}/0/0", [c.prompt.messages for c in chains], chains, stream_key(seed, 0), among)
        for chain, reply in zip(chains, replies, strict=True):
            chain.initial = reply
        for n in range(1, self.config.revisions + 1):
            going = [chain for chain in chains if chain.why is None]
            turn = stream_key(seed, n)
            for chain in going:
                (principle,) = draw(self.principles, 1, self.seed, chain.prompt.id, chain.number, n)
                chain.revisions.append(Revision(principle, turn))
            if self.config.critique:
                asked = [self._conversation(chain) for chain in going]
                critiques = self._ask(f"{number}/{n}/0", asked, going, stream_key(turn, 0), among)
                for chain, reply in zip(going, critiques, strict=True):
                    chain.revisions[-1].critique = reply
                going = [chain for chain in going if chain.revisions[-1].outcome == "ok"]
            asked = [self._conversation(chain) for chain in going]
            revised = self._ask(f"{number}/{n}/1", asked, going, stream_key(turn, 1), among)
            for chain, reply in zip(going, revised, strict=True):
                chain.revisions[-1].revision = reply

    def _ask(
        self, step: str, asked: Sequence[Sequence[Message]], chains: Sequence[Chain], seed: int, among: int
    ) -> list[Reply]:
        prompts = [
            Prompt(chain.prompt.id, tuple(messages), place=chain.prompt.place)
            for messages, chain in zip(asked, chains, strict=True)
        ]
        fits = [True] * len(prompts) if self.fits is None else self.fits(prompts)
        short = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        said = self.journal.ask(self.writer, step, short, self.config.sampling, seed, among) if short else []
        answers = iter(said)
        self.reporter.advance(len(prompts))
        return [Reply.of(next(answers)) if fit else Reply("too_long") for fit in fits]

    def _conversation(self, chain: Chain) -> tuple[Message, ...]:
        """What is asked next in the chain's last round: for the critique, or, where there is one, for the revision.

        A system message of the prompt's comes first, before the examples: templates allow it nowhere else.
        """
        current = chain.revisions[-1]
        principle = current.principle
        messages = chain.prompt.messages
        first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        turns = [Message("assistant", chain.texts[-1])]
        if current.critique is not None:
            turns += [Message("user", principle.critique), Message("assistant", current.critique.text)]
        asks_for_critique = self.config.critique and current.critique is None
        turns.append(Message("user", principle.critique if asks_for_critique else principle.revision))
        return (*messages[:first], *self._examples(principle), *messages[first:], *turns)

    def _examples(self, principle: Principle) -> Iterator[Message]:
        for example in self.constitution.examples_for(principle)[: self.config.few_shots]:
            yield Message("user", example.prompt)
            yield Message("assistant", example.reply)
            if self.config.critique:
                yield Message("user", principle.critique)
                yield Message("assistant", example.critique)
            yield Message("user", principle.revision)
            yield Message("assistant", example.revision)


def figures(chains: Sequence[Chain]) -> dict[str, Any]:
    """Of the stage's summary: how many chains are whole, why the others are not, and, by principle, how often it was
    drawn and how often the revision differs from what it revised."""
    drawn: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for chain in chains:
        drawn.update(one.principle.id for one in chain.revisions)
        finished = chain.texts
        for one, before, after in zip(chain.revisions, finished, finished[1:], strict=False):
            changed[one.principle.id] += before != after
    return {
        "prompts": len({chain.prompt.id for chain in chains}),
        "chains": len(chains),
        "kept": sum(chain.why is None for chain in chains),
        "left_out": dict(sorted(Counter(chain.why for chain in chains if chain.why is not None).items())),
        "revised": sum(len(chain.texts[1:]) for chain in chains),
        "drawn": dict(sorted(drawn.items())),
        "changed": dict(sorted(changed.items())),
    }
