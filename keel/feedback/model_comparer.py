"""A language model as a comparer (``keel.feedback.opinion.Comparer``): shown both replies, it is asked for a letter."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import nn

from keel.data.chat import Chat
from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.endpoint import MISSING_BOUND
from keel.feedback.compare import INSTRUCTIONS
from keel.feedback.opinion import Opinion
from keel.model.logprobs import token_logprobs
from keel.model.measure import measure
from keel.precision import Precision, autocast
from keel.rollout.tokens import context_length
from keel.stats import sigmoid
from keel.types import Completion, Encoded, Message, Prompt, UserError

TOKENS = 8192  # tokens in one forward pass
LETTERS = ("A", "B")


class LanguageModelComparer:
    """P(A) is that of the reply "A" among "A" and "B", by the model's own log-probabilities; nothing is sampled. Each
    pair is asked twice, with the left reply as A and as B, and the opinion's probability is the mean of both.

    All stands in one message of the user, since some templates know no other. A pair that does not fit into the model
    has no opinion; UserError when these are more than a fifth.
    """

    def __init__(
        self, model: nn.Module, chat: Chat, device: str, precision: Precision, instructions: str | None = None
    ) -> None:
        self.model, self.chat, self.device, self.precision = model, chat, device, precision
        self._instructions = instructions or INSTRUCTIONS

    def compare(
        self, prompts: Sequence[Prompt], left: Sequence[Completion], right: Sequence[Completion]
    ) -> list[Opinion | None]:
        asked = []
        for prompt, a, b in zip(prompts, left, right, strict=True):
            asked += [self._asked(prompt, a.text, b.text), self._asked(prompt, b.text, a.text)]
        rows = self.chat.encode_replies(
            [(messages, letter, False) for messages in asked for letter in LETTERS],
            [f"the comparison of replies to prompt {p.id!r}" for p in prompts for _ in range(4)],
        )
        limit = context_length(self.model) or max((len(row.ids) for row in rows), default=0)
        fits = [all(len(row.ids) <= limit for row in rows[i : i + 4]) for i in range(0, len(rows), 4)]
        if fits.count(False) > MISSING_BOUND * len(fits):
            raise UserError(
                f"{fits.count(False)} of {len(fits)} comparisons are longer than the judge's {limit} tokens; take a "
                "model with a longer context, or shorter instructions"
            )
        said = self._logprobs([row for i, row in enumerate(rows) if fits[i // 4]])
        found = iter(zip(said[0::4], said[1::4], said[2::4], said[3::4], strict=True))
        return [_opinion(*next(found)) if fit else None for fit in fits]

    def _asked(self, prompt: Prompt, a: str, b: str) -> tuple[Message, ...]:
        conversation = [{"role": m.role, "content": m.content} for m in prompt.messages]
        material = json.dumps({"conversation": conversation, "A": a, "B": b}, ensure_ascii=False)
        return (Message("user", f"{self._instructions}\n\n{material}"),)

    def _logprobs(self, rows: Sequence[Encoded]) -> list[float]:
        """Of each row's letter, nats."""
        with autocast(self.device, self.precision):
            found = measure(
                rows,
                micro_batches_by_prompt(rows, TOKENS),
                [lambda batch: token_logprobs(self.model, batch).logp_C],
                self.device,
                pack_by_prompt,
            )
        return [float(one[0].sum()) for one in found]


def _opinion(first_a: float, first_b: float, second_a: float, second_b: float) -> Opinion:
    """Of log-probabilities of A and B, with the left reply as A, and then as B."""
    orders = sigmoid(first_a - first_b), sigmoid(second_b - second_a)
    return Opinion.of((orders[0] + orders[1]) / 2, orders)
