"""Supervised fine-tuning: next-token loss on the assistant's tokens, its end token included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.data.collate import micro_batches, pack, split_by_prompt
from keel.model.checkpoint import load_tokenizer, save
from keel.model.logprobs import token_logprobs
from keel.model.packed import inner_model
from keel.precision import autocast
from keel.recipe.sft import SftStage
from keel.train.context import TrainContext, record_lineage, within_length
from keel.train.loop import Algorithm, Micro, Stats, train
from keel.train.ptx import Ptx
from keel.train.roles import roles_of
from keel.train.schedule import EpochSchedule, MixedSchedule, in_ratio
from keel.types import Demonstration, Encoded, UserError


@dataclass(frozen=True)
class Share:
    """What a recipe calls ``source``, with its rows and their weight among others."""

    source: str
    records: Sequence[Demonstration]
    weight: float


# Of the end token where a reply ends: below it, nineteen replies in twenty run past their end.
ENDS = 0.05


class Sft(Algorithm):
    """The SFT algorithm for the training loop: one iteration is one optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Encoded],
        heldout: Sequence[Encoded],
        config: SftStage,
        context: TrainContext,
        schedule: EpochSchedule | None = None,
    ) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": model}
        self.rows, self.heldout, self.config = rows, heldout, config
        self.context = context
        self.schedule = schedule or EpochSchedule(len(rows), config.batch_size, config.epochs, context.seed)
        self.iterations = self.schedule.steps
        self.eval_every = config.eval_every or max(1, self.schedule.steps_per_epoch // 4)
        self.best_loss = math.inf
        self.best_weights: dict[str, Tensor] | None = None
        self.misses = 0

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        rows = [self.rows[i] for i in self.schedule.batch(iteration)]
        total = max(1, sum(row.predicted for row in rows))
        groups = micro_batches([len(row.ids) for row in rows], self.config.batch_tokens)
        yield [self._micro([rows[i] for i in group], total) for group in groups]

    def _micro(self, rows: Sequence[Encoded], total: int) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            batch = pack(rows, self.context.device)
            loss = -token_logprobs(self.modules["policy"], batch).logp_C.sum()
            return loss / total, {"tokens": (float(batch.num_tokens), 1.0)}

        return compute

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        last = iteration + 1 == self.iterations
        if not self.heldout or not (last or (iteration + 1) % self.eval_every == 0):
            return {}, False
        loss = mean_loss(self.modules["policy"], self.heldout, self.config.batch_tokens, self.context)
        if loss < self.best_loss:
            self.best_loss, self.misses = loss, 0
            self.best_weights = {
                name: p.detach().clone() for name, p in self.modules["policy"].named_parameters() if p.requires_grad
            }
        else:
            self.misses += 1
        return {"eval/loss": loss}, self.misses >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_weights": self.best_weights, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_weights, self.misses = state["best_loss"], state["best_weights"], state["misses"]

    def restore_best(self) -> None:
        """Puts back the weights of the best held-out loss (early stopping)."""
        if self.best_weights is not None:
            self.modules["policy"].load_state_dict(self.best_weights, strict=False)


def mean_loss(model: nn.Module, rows: Sequence[Encoded], batch_tokens: int, context: TrainContext) -> float:
    """Mean negative log-likelihood (nats a token) of the masked tokens."""
    total, count = 0.0, 0
    with torch.no_grad(), autocast(context.device, context.precision):
        for group in micro_batches([len(row.ids) for row in rows], batch_tokens):
            logp_C = token_logprobs(model, pack([rows[i] for i in group], context.device)).logp_C
            total, count = total - float(logp_C.double().sum()), count + logp_C.numel()
    return total / max(count, 1)


def end_probability(
    model: nn.Module, rows: Sequence[Encoded], chat: Chat, batch_tokens: int, context: TrainContext
) -> float | None:
    """Mean probability of the token that stops a sampler, where the replies of ``rows`` end; None where none ends."""
    ends = [
        tuple(
            learned and token in chat.stop_ids and not (i + 1 < len(row.ids) and row.mask[i + 1])
            for i, (token, learned) in enumerate(zip(row.ids, row.mask, strict=True))
        )
        for row in rows
    ]
    ending = [Encoded(row.ids, mask) for row, mask in zip(rows, ends, strict=True) if any(mask)]
    total, count = 0.0, 0
    with torch.no_grad(), autocast(context.device, context.precision):
        for group in micro_batches([len(row.ids) for row in ending], batch_tokens):
            logp_C = token_logprobs(model, pack([ending[i] for i in group], context.device)).logp_C
            total, count = total + float(logp_C.double().exp().sum()), count + logp_C.numel()
    return total / count if count else None


def train_sft(
    config: SftStage,
    demonstrations: Sequence[Demonstration],
    context: TrainContext,
    mix: Sequence[Share] | None = None,
) -> dict[str, Any]:
    """Fine-tunes the model on demonstrations and writes its checkpoint; returns the stage's summary. ``mix``: the same
    demonstrations by where they come from, of which each epoch, and the held-out loss, have shares by weight."""
    template = context.base_model.chat_template
    if template is None and Chat(load_tokenizer(context.source())).plain:
        template = "keel"
    model, tokenizer = roles_of(config, context).assistant(template)
    chat = Chat(tokenizer)
    training, heldout = split_by_prompt(demonstrations, context.data.heldout_fraction, context.seed)
    (trained, rows), (held, heldout_rows) = (_encode(part, chat, context) for part in (training, heldout))
    schedule, counts = None, {}
    if mix is not None:
        schedule = _mixed(trained, mix, config, context)
        counts = {"mix": {share.source: count for share, count in zip(mix, schedule.counts, strict=True)}}
        held, heldout_rows = _in_ratio(held, heldout_rows, mix)
    record_lineage(context.stage, [record.id for record in trained], [record.id for record in held])
    algorithm = Sft(model, rows, heldout_rows, config, context, schedule)
    before = mean_loss(model, heldout_rows, config.batch_tokens, context)
    texts = Ptx(model, tokenizer, config, context)
    steps = train(algorithm, config, context, texts)
    algorithm.restore_best()
    ending = end_probability(model, heldout_rows, chat, config.batch_tokens, context)
    if ending is not None and ending < ENDS:
        context.reporter.note(
            f"{config.name}: at the ends of held-out replies the end token has a mean probability of {ending:.2g}, so "
            "replies will run on; train longer, or without model.lora"
        )
    # generate and vLLM stop where Keel's samplers stop: at the end of the turn, not only at the end of text.
    inner_model(model).generation_config.eos_token_id = list(chat.stop_ids)  # type: ignore[union-attr]
    with context.stage.checkpoint() as folder:
        dtype = save(model, tokenizer, folder)
    return {
        "demonstrations": len(rows),
        "heldout": len(heldout_rows),
        "steps": steps,
        "heldout_loss_before": before,
        "heldout_loss": algorithm.best_loss,
        "end_probability": ending,
        "stopped_early": steps < algorithm.iterations,
        "dtype": dtype,
        **counts,
    }


def _encode(
    records: Sequence[Demonstration], chat: Chat, context: TrainContext
) -> tuple[list[Demonstration], list[Encoded]]:
    """Those that fit, and their conversations."""
    encoded = chat.encode_demonstrations(records)
    ids = [record.id for record in records]
    kept, parts = within_length(records, [(row,) for row in encoded], ids, context)
    return kept, [row for (row,) in parts]


def _by_source(records: Sequence[Demonstration], mix: Sequence[Share]) -> list[list[int]]:
    """The places of each source's records. They are told apart as objects: two sources may have equal ones."""
    source = {id(record): n for n, share in enumerate(mix) for record in share.records}
    places: list[list[int]] = [[] for _ in mix]
    for place, record in enumerate(records):
        places[source[id(record)]].append(place)
    return places


def _mixed(
    records: Sequence[Demonstration], mix: Sequence[Share], config: SftStage, context: TrainContext
) -> MixedSchedule:
    sources = _by_source(records, mix)
    empty = next((share.source for share, places in zip(mix, sources, strict=True) if not places), None)
    if empty is not None:
        raise UserError(
            f"stage {config.name}: mix: there is nothing to train on in {empty}; add to it, or take it out of "
            "demonstrations and mix"
        )
    weights = [share.weight for share in mix]
    return MixedSchedule.of(sources, weights, config.batch_size, config.epochs, context.seed)


def _in_ratio(
    records: Sequence[Demonstration], rows: Sequence[Encoded], mix: Sequence[Share]
) -> tuple[list[Demonstration], list[Encoded]]:
    """Held-out rows in the ratio of the mix, those of the sources that have any: the first ones of each."""
    sources = [(places, share.weight) for places, share in zip(_by_source(records, mix), mix, strict=True) if places]
    counts = in_ratio([len(places) for places, _ in sources], [weight for _, weight in sources])
    kept = sorted(place for (places, _), count in zip(sources, counts, strict=True) for place in places[:count])
    return [records[i] for i in kept], [rows[i] for i in kept]
