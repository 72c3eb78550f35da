"""A language model as a comparer (``keel.feedback.opinion.Comparer``): shown both replies, it is asked for a letter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from keel.data.chat import Chat
from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.endpoint import MISSING_BOUND
from keel.feedback.compare import INSTRUCTIONS, material
from keel.feedback.opinion import Opinion
from keel.model.logprobs import token_logprobs
from keel.model.measure import measure
from keel.model.modules import context_length
from keel.precision import Precision, autocast
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
        said = self.letters(asked, [f"the comparison of replies to prompt {p.id!r}" for p in prompts for _ in range(2)])
        return [_opinion(said[i], said[i + 1]) for i in range(0, len(said), 2)]

    def _asked(self, prompt: Prompt, a: str, b: str) -> tuple[Message, ...]:
        return (Message("user", f"{self._instructions}\n\n{material(prompt, a, b)}"),)

    def letters(self, asked: Sequence[tuple[Message, ...]], places: Sequence[str]) -> list[tuple[float, float] | None]:
        """Log-probabilities (nats) of the replies A and B to each conversation; None for one that does not fit into the
        model. UserError when these are more than a fifth."""
        rows = self.chat.encode_replies(
            [(messages, letter, False) for messages in asked for letter in LETTERS],
            [place for place in places for _ in LETTERS],
        )
        limit = context_length(self.model) or max((len(row.ids) for row in rows), default=0)
        fits = [all(len(row.ids) <= limit for row in rows[i : i + 2]) for i in range(0, len(rows), 2)]
        if fits.count(False) > MISSING_BOUND * len(fits):
            raise UserError(
                f"{fits.count(False)} of {len(fits)} questions are longer than the judge's {limit} tokens; take a "
                "model with a longer context, or shorter instructions"
            )
        measured = self.logprobs([row for i, row in enumerate(rows) if fits[i // 2]])
        said = [float(one.sum()) for one in measured]
        if not all(map(math.isfinite, said)):
            raise UserError(
                "the judge's log-probabilities of A and B are not all numbers; look for NaN in its weights, or "
                "load it in another precision"
            )
        found = iter(zip(said[0::2], said[1::2], strict=True))
        return [next(found) if fit else None for fit in fits]

    def logprobs(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """Of each row's reply, by token, nats."""
        with autocast(self.device, self.precision):
            found = measure(
                rows,
                micro_batches_by_prompt(rows, TOKENS),
                [lambda batch: token_logprobs(self.model, batch).logp_C],
                self.device,
                pack_by_prompt,
            )
        return [one[0] for one in found]


def _opinion(first: tuple[float, float] | None, second: tuple[float, float] | None) -> Opinion | None:
    """Of log-probabilities of A and B, with the left reply as A, and then as B."""
    if first is None or second is None:
        return None
    orders = sigmoid(first[0] - first[1]), sigmoid(second[1] - second[0])
    return Opinion.of((orders[0] + orders[1]) / 2, orders)
