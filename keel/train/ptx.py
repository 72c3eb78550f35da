"""Pretraining text mixed into a policy's training: what neither demonstrations nor rewards speak of is otherwise
forgotten, the alignment tax of Ouyang et al. 2022 (eq. 2, "PPO-ptx"; their SFT mixes it in too, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import micro_batches, pack, pieces
from keel.model.logprobs import token_logprobs
from keel.recipe.stage import PolicyBase
from keel.train.context import TrainContext
from keel.train.loop import Micro, Stats
from keel.train.schedule import EpochSchedule
from keel.types import Encoded


class Ptx:
    """The texts' share of each optimizer step from ``begin`` on, ``config.ptx.coef`` times their mean loss in nats a
    token; nothing where the recipe mixes none in. Which texts a step sees follows from its number. Texts longer than
    ``data.max_length`` are cut into pieces, as in pretraining."""

    def __init__(
        self,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: PolicyBase,
        context: TrainContext,
        begin: int = 0,
    ) -> None:
        self.policy, self.chat, self.config, self.context, self.begin = policy, Chat(tokenizer), config, context, begin
        batch_size = config.ptx.batch_size if config.ptx else 1
        self.schedule = EpochSchedule(len(context.texts), batch_size, math.inf, context.seed)

    def __call__(self, step: int) -> list[Micro]:
        if self.config.ptx is None or step < self.begin:
            return []
        rows = [piece for i in self.schedule.batch(step - self.begin) for piece in self._pieces(self.context.texts[i])]
        weight = self.config.ptx.coef / max(1, sum(row.predicted for row in rows))
        groups = micro_batches([len(row.ids) for row in rows], self.config.batch_tokens)
        return [self._micro([rows[i] for i in group], weight) for group in groups]

    def _pieces(self, text: str) -> list[Encoded]:
        return pieces(self.chat.encode_text(text), self.context.data.max_length)

    def _micro(self, rows: Sequence[Encoded], weight: float) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            loss = -token_logprobs(self.policy, pack(rows, self.context.device)).logp_C.sum()
            count = float(sum(row.predicted for row in rows))
            return weight * loss, {"loss/ptx_avg": (float(loss.detach()), count)}

        return compute
