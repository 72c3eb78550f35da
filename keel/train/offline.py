"""How far a policy went that was trained on what others wrote. It never sampled, so nothing of this was seen on the
way: its KL from where it started on replies of its own, and what became of the replies that it learned to prefer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy
from keel.model.packed import compute_alike
from keel.recipe.offline import MeasureConfig
from keel.recipe.sections import Source
from keel.rollout.collect import stop_token_ids
from keel.rollout.divergence import asked_alike, log_ratios, own_replies, token_logps
from keel.rollout.episodes import encode_prompts
from keel.rollout.sampler import make_sampler
from keel.stats import clustered_error
from keel.train.context import TrainContext
from keel.types import Prompt

MOST = 1024  # liked replies that are looked at, spread over all of them
FEWEST = 8  # of a kind of prompt, for a figure of its own


@dataclass(frozen=True)
class Liked:
    """A reply that training is to make more probable: the chosen one of a pair, one with a thumb up."""

    prompt: Prompt
    reply: str
    finished: bool = True


def measure_offline(
    measure: MeasureConfig,
    policy: Source,
    start: Source,
    prompts: Sequence[Prompt],
    liked: Sequence[Liked],
    context: TrainContext,
) -> dict[str, Any]:
    """What a stage's summary says of the trained checkpoint ``policy`` beside ``start``, the model that it is held to:

    sampled/kl, sampled/kl_se: KL(policy || start), nats a reply, of ``measure.per_prompt`` replies of its own to each
    of ``prompts`` at temperature 1 (k1 by a forward pass of both; the error is over prompts). None where the two are
    not asked alike: one without a chat template, or of other tokens.
    sampled/mean_length (tokens, the end included), sampled/finished_rate, sampled/replies: of these replies.
    displacement/chosen: by how much the log-probability of the liked replies changed, mean over replies, in nats;
    displacement/chosen_per_token: the same over all their tokens, displacement/kinds: by the kind of prompt.
    displacement/sharpest, displacement/sharpest_kinds: the change of the token of a reply that lost most, mean over
    replies.
    All are left out without ``liked``, and None where ``start`` cannot read them.
    """
    model, tokenizer = load_policy(policy, device=context.device, products=context.precision)
    reference, reads = load_policy(start, device=context.device, products=context.precision)
    frozen(model)
    compute_alike(frozen(reference), model)
    chat = Chat(tokenizer)
    asked, prompt_ids = encode_prompts(chat, prompts[: measure.prompts], context.data, context.reporter)
    context.reporter.start("measuring", 1)
    sampler = make_sampler(model, measure.sampling.backend, stop_token_ids(chat, measure.sampling), context.precision)
    replies = own_replies(sampler, prompt_ids, measure.sampling, measure.per_prompt, context.seed)
    everything = [reply for group in replies for reply in group]
    alike = asked_alike((model, tokenizer), (reference, reads))
    found: dict[str, Any] = {"sampled/kl": None, "sampled/kl_se": None}
    if alike:
        ratios = log_ratios(model, reference, prompt_ids, replies, context.device, context.precision)
        flat = [ratio for group in ratios for ratio in group]
        groups = [prompt.id for prompt, group in zip(asked, ratios, strict=True) for _ in group]
        found = {"sampled/kl": math.fsum(flat) / len(flat), "sampled/kl_se": clustered_error(flat, groups)}
    found |= {
        "sampled/mean_length": sum(len(reply.ids) for reply in everything) / len(everything),
        "sampled/finished_rate": sum(reply.finished for reply in everything) / len(everything),
        "sampled/replies": len(everything),
    }
    if liked:
        found |= _displacement(model, reference, chat, liked, context) if alike else _no_displacement()
    context.reporter.advance(1)
    return found


def _displacement(
    model: nn.Module, reference: nn.Module, chat: Chat, liked: Sequence[Liked], context: TrainContext
) -> dict[str, Any]:
    some = [liked[i * len(liked) // MOST] for i in range(MOST)] if len(liked) > MOST else list(liked)
    encoded = chat.encode_replies([(one.prompt.messages, one.reply, one.finished) for one in some])
    longest = min(context.data.max_length, context.positions or context.data.max_length)
    rows = [(one.prompt.kind, row) for one, row in zip(some, encoded, strict=True) if len(row.ids) <= longest]
    if not rows:
        return _no_displacement()
    logps = token_logps([model, reference], [row for _, row in rows], context.device, context.precision)
    return displacement_figures([Change.of(kind, *both) for (kind, _), both in zip(rows, logps, strict=True)])


@dataclass(frozen=True)
class Change:
    """What became of one liked reply: of all its ``tokens`` together in ``nats``, of the one that lost most."""

    kind: str
    nats: float
    tokens: int
    sharpest: float

    @staticmethod
    def of(kind: str, ours_C: Tensor, theirs_C: Tensor) -> Change:
        nats = float(ours_C.double().sum()) - float(theirs_C.double().sum())
        return Change(kind, nats, len(ours_C), float((ours_C.double() - theirs_C.double()).min()))


def displacement_figures(changes: Sequence[Change]) -> dict[str, Any]:
    """What the summary says of the liked replies (`measure_offline`)."""
    by_kind: dict[str, list[Change]] = {}
    for change in changes:
        by_kind.setdefault(change.kind, []).append(change)
    kinds = {kind: some for kind, some in by_kind.items() if kind and len(some) >= FEWEST}
    return {
        "displacement/chosen": math.fsum(change.nats for change in changes) / len(changes),
        "displacement/chosen_per_token": _per_token(changes),
        "displacement/kinds": {kind: _per_token(some) for kind, some in kinds.items()},
        "displacement/sharpest": _sharpest(changes),
        "displacement/sharpest_kinds": {kind: _sharpest(some) for kind, some in kinds.items()},
    }


def _per_token(changes: Sequence[Change]) -> float:
    return math.fsum(change.nats for change in changes) / sum(change.tokens for change in changes)


def _sharpest(changes: Sequence[Change]) -> float:
    return math.fsum(change.sharpest for change in changes) / len(changes)


def _no_displacement() -> dict[str, Any]:
    none = ("displacement/chosen", "displacement/chosen_per_token", "displacement/sharpest")
    return {**dict.fromkeys(none), "displacement/kinds": {}, "displacement/sharpest_kinds": {}}
