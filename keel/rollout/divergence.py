"""Replies that a policy samples of itself, and how much likelier each is to it than to a reference: their mean is the
KL from the reference, in nats a reply (k1 of ``keel.objective.kl``, summed over a reply's tokens)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.model.logprobs import token_logprobs
from keel.model.measure import Pass, measure
from keel.model.vocabulary import unreadable
from keel.precision import Precision, autocast
from keel.recipe.sections import SamplingConfig
from keel.rollout.sampler import Sampler
from keel.types import Completion, Encoded

TOKENS = 8192  # in one forward pass


def asked_alike(
    policy: tuple[nn.Module, PreTrainedTokenizerBase], reference: tuple[nn.Module, PreTrainedTokenizerBase]
) -> bool:
    """Whether both are asked through a template, and the reference knows the policy's tokens: else there is no KL."""
    plain = Chat(policy[1]).plain or Chat(reference[1]).plain
    return not plain and unreadable(*reference, policy[1]) is None


def own_replies(
    sampler: Sampler, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, per_prompt: int, seed: int
) -> list[list[Completion]]:
    """``per_prompt`` replies to each prompt from the model itself, whatever filters ``sampling`` has; without text."""
    requests = [ids for ids in prompt_ids for _ in range(per_prompt)]
    drawn = sampler.generate(requests, sampling.at_one(), seed)
    return [drawn[i : i + per_prompt] for i in range(0, len(drawn), per_prompt)]


def log_ratios(
    policy: nn.Module,
    reference: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    replies: Sequence[Sequence[Completion]],
    device: str,
    precision: Precision,
) -> list[list[float]]:
    """Of each prompt's replies: log policy - log reference, summed over the reply's tokens (nats). Both models see the
    same packed batches, so that equal weights give 0 to the bit."""
    rows = [Encoded.of(ids, r.ids) for ids, group in zip(prompt_ids, replies, strict=True) for r in group]
    sums = iter(sequence_logps([policy, reference], rows, device, precision))
    return [[ours - theirs for ours, theirs in (next(sums) for _ in group)] for group in replies]


def sequence_logps(
    models: Sequence[nn.Module], rows: Sequence[Encoded], device: str, precision: Precision
) -> list[list[float]]:
    """The log-probability (nats) of each row's masked tokens together, under each model: [N][models]."""
    found = token_logps(models, rows, device, precision)
    return [[float(logp_C.double().sum()) for logp_C in row] for row in found]


def token_logps(
    models: Sequence[nn.Module], rows: Sequence[Encoded], device: str, precision: Precision
) -> list[list[Tensor]]:
    """The same of each masked token: [N][models], of [C] each."""

    def logprobs(model: nn.Module) -> Pass:
        return lambda batch: token_logprobs(model, batch).logp_C

    batches = micro_batches_by_prompt(rows, TOKENS)
    with autocast(device, precision):
        return measure(rows, batches, [logprobs(model) for model in models], device, pack_by_prompt)
