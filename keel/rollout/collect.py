"""Prompts -> replies worth comparing or learning from: several a prompt, as text, near-duplicates left out, the
best of many where a scorer says which those are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keel.data.chat import Chat
from keel.recipe.sections import SamplingConfig
from keel.rollout.sampler import Sampler
from keel.rollout.tokens import stream_key
from keel.types import Completion, Prompt, Reporter, Scorer, UserError, place_of

CHUNK = 2048  # sequences between two signs of life; a constant, because the seed of a chunk depends on where it starts


@dataclass(frozen=True)
class Choice:
    """Which of a prompt's samples are kept: ``per_prompt`` of ``candidates`` (0: as many as are kept), by
    :func:`choose_different`; fewer only where the samples do not hold that many different texts.

    With a ``scorer`` (best-of-n) the samples come to that choice in the order of their scores, highest first. Those
    below ``min_score`` are left out, and so are those that were cut at the length limit: they are worse than what was
    scored of them.
    """

    per_prompt: int = 1
    candidates: int = 0
    max_similarity: float = 1.0
    scorer: Scorer | None = None
    min_score: float = -math.inf

    @property
    def samples(self) -> int:
        return max(self.per_prompt, self.candidates)

    def of(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> list[list[Completion]]:
        """What is kept of each prompt's samples."""
        if self.scorer is not None:
            groups = _best_first(prompts, groups, self.scorer, self.min_score)
        return [choose_different(group, self.per_prompt, self.max_similarity) for group in groups]


def sample_replies(
    sampler: Sampler,
    chat: Chat,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    choice: Choice,
    seed: int,
    reporter: Reporter,
) -> list[list[Completion]]:
    """The replies to each prompt that ``choice`` keeps.

    ``Completion.text`` is the reply without its stop token. Raises UserError naming the prompt that does not fit.
    """
    samples = choice.samples
    encoded = chat.encode_prompts([p.messages for p in prompts], [place_of(p) for p in prompts])
    replies: list[list[Completion]] = []
    reporter.start("sampling", len(prompts) * samples)
    step = max(1, CHUNK // samples)
    for start in range(0, len(prompts), step):
        part = encoded[start : start + step]
        requests = [ids for ids in part for _ in range(samples)]
        try:
            completions = sampler.generate(requests, sampling, stream_key(seed, start))
        except UserError as error:
            raise UserError(f"{error} (of those sampled from {prompts[start].id} on)") from error
        drawn = [with_decoded_text(chat, c) for c in completions]
        groups = [drawn[i : i + samples] for i in range(0, len(drawn), samples)]
        replies += choice.of(prompts[start : start + step], groups)
        reporter.advance(len(requests), tokens=sum(len(c.ids) for c in completions))
    return replies


def _best_first(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], scorer: Scorer, min_score: float
) -> list[list[Completion]]:
    """Each prompt's samples with their scores, the best first, without the cut ones and those below ``min_score``."""
    whole = [(i, reply) for i, group in enumerate(groups) for reply in group if reply.finished]
    ordered: list[list[Completion]] = [[] for _ in groups]
    if not whole:
        return ordered
    scores = scorer.score([prompts[i] for i, _ in whole], [reply for _, reply in whole]).total_N.tolist()
    for (i, reply), score in sorted(zip(whole, scores, strict=True), key=lambda pair: -pair[1]):
        if score >= min_score:
            ordered[i].append(replace(reply, reward=score))
    return ordered


def with_decoded_text(chat: Chat, completion: Completion) -> Completion:
    """The same completion with its text, the stop token left out (one of the recipe's own, too)."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return replace(completion, text=chat.decode(ids))


def stop_token_ids(chat: Chat, sampling: SamplingConfig) -> tuple[int, ...]:
    """The chat's stop tokens and the recipe's ``sampling.stop``; UserError for one that is not a single token."""
    ids = list(chat.stop_ids)
    for text in sampling.stop:
        tokens = chat.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(f"sampling.stop: {text!r} is {len(tokens)} tokens for this model's tokenizer; "
                            "stop only works on single tokens")  # fmt: skip
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


def similarity(a: Completion, b: Completion) -> float:
    """Jaccard similarity of the two token sets: 1 for the same set, 0 for nothing in common."""
    first, second = set(a.ids), set(b.ids)
    return len(first & second) / len(first | second) if first or second else 1.0


def choose_different(samples: Sequence[Completion], keep: int, max_similarity: float) -> list[Completion]:
    """Up to ``keep`` samples with different texts.

    Samples are taken in the order they were drawn, so that those kept are still the model's own distribution, but one
    that is as similar as ``max_similarity`` to a kept one waits. Those that wait fill up what is missing, always the
    least similar to what is kept (with a ``max_similarity`` of 0 all but the first are chosen so). A text that is there
    already is never taken twice.
    """
    kept: list[Completion] = []
    waiting: list[Completion] = []
    texts: set[str] = set()
    for sample in samples:
        if sample.text in texts:
            continue
        texts.add(sample.text)
        near = any(similarity(sample, other) >= max_similarity for other in kept)
        (waiting if near or len(kept) == keep else kept).append(sample)
    while len(kept) < keep and waiting:
        best = min(waiting, key=lambda s: max((similarity(s, other) for other in kept), default=0.0))
        waiting.remove(best)
        kept.append(best)
    return kept
