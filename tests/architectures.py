"""``python -m tests.architectures [TYPE ...]``: holds Keel against every causal LM type of the installed transformers.

Writes ``tests/architectures.md``; with types it prints those rows alone. Each type is a tiny random model (``zoo.py``).

Trained: the model is loaded as for training and asked for the log-probabilities of two unequal sequences and of a third
that shares a beginning with the first; the error is the largest of a token, against the model's own forward pass over
each sequence alone. Sampled: greedy replies to prompts of four lengths; the error is that of the sampler's
log-probabilities against the model's own forward pass, and the tokens are held against its own ``generate`` of each
prompt alone. Both in float32.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as hf_logging

from keel.data.collate import pack_shared
from keel.model import packed
from keel.model.checkpoint import prepared
from keel.model.logprobs import masked_offsets, token_logprobs
from keel.model.modules import accepted
from keel.recipe.sections import SamplingConfig
from keel.rollout.hf import TransformersSampler
from keel.types import Encoded, UserError
from tests import zoo

BOUND = 1e-4  # nats: a larger error is wrong
PROMPTS = ((9, 20, 33), (40, 50, 61, 70, 80, 9, 11, 12, 13, 14, 15, 16), (31, 29, 28, 77, 55, 44, 33), (66, 77))
NEW = 8
FILE = Path(__file__).with_name("architectures.md")


@dataclass(frozen=True)
class Found:
    """``how``: the road, ``refused`` or ``traceback``. ``note``: why it is refused, or what else is to be said."""

    how: str
    error: float | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.how == "traceback" or self.note.startswith("WRONG") or not (self.error or 0.0) <= BOUND


@dataclass(frozen=True)
class Row:
    name: str
    trained: Found | None = None  # None: the type cannot be made
    sampled: Found | None = None
    why_not: str = ""


def road(model: Any) -> str:
    """What Keel decided about computing this model's batches."""
    return packed.road(model)


def examine(name: str) -> Row:
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if reason := zoo.why_not(name):
            return Row(name, why_not=reason)
        return Row(name, _guarded(_trained, name), _guarded(_sampled, name))


def _guarded(measure: Callable[[Any], Found], name: str) -> Found:
    try:
        return measure(zoo.make(name))
    except UserError as error:
        return Found("refused", note=str(error))
    except Exception as error:  # one type's trouble is a row of the table
        return Found("traceback", note=f"{type(error).__name__}: {error}".splitlines()[0])


# ------------------------------------------------------------------------------------------------- training


def _trained(model: Any) -> Found:
    first, second, third = _sequences()
    own = [_own_logps(model, s) for s in (first, third, second)]
    model = prepared(model, "cpu", None, False, "CAUSAL_LM", [])
    batch = pack_shared([[first, third], [second]])
    with torch.no_grad():
        logp = token_logprobs(model, batch).logp_C
    parts = logp.split(masked_offsets(batch).diff().tolist())
    return Found(road(model), _largest([got - want for got, want in zip(parts, own, strict=True)]))


def _sequences() -> tuple[Encoded, Encoded, Encoded]:
    generator = torch.Generator().manual_seed(1)
    first, second, third = (torch.randint(8, 150, (n,), generator=generator).tolist() for n in (29, 14, 21))
    third = first[:9] + third[9:]
    return tuple(Encoded(tuple(ids), (*[False] * 9, *[True] * (len(ids) - 9))) for ids in (first, second, third))  # type: ignore[return-value]


def _own_logps(model: Any, sequence: Encoded) -> Tensor:
    ids = torch.tensor(sequence.ids)
    mask = torch.tensor(sequence.mask)[1:]
    try:
        return _forward(model, ids)[:-1].gather(1, ids[1:, None]).squeeze(1)[mask]
    except Exception:  # a model that cannot run by itself has no numbers of its own; Keel is to say so
        return torch.full((int(mask.sum()),), torch.nan)


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> Tensor:
    return model(**accepted(model, input_ids=ids[None], use_cache=False)).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- sampling


def _sampled(model: Any) -> Found:
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW, batch_size=3)
    replies = TransformersSampler(model, ()).generate(PROMPTS, sampling, seed=0)
    way = model.keel_road_of_samples
    errors, notes = [], []
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor([*prompt, *reply.ids])
        whole = _forward(model, ids)[len(prompt) - 1 : -1]
        before = torch.stack([_forward(model, ids[: len(prompt) + n])[-1] for n in range(len(reply.ids))])
        got, at = torch.tensor(reply.logprobs), ids[len(prompt) :, None]
        gaps = [(logps.gather(1, at).squeeze(1) - got).abs() for logps in (whole, before)]
        errors.append(torch.minimum(*gaps))
        notes.append(_against_generate(model, prompt, reply.ids, before))
    note = max(notes, key=lambda n: (n.startswith("WRONG"), n != "equal"))
    return Found(f"{way.way}, {way.batch}", _largest(errors), note)


def _against_generate(model: Any, prompt: tuple[int, ...], got: tuple[int, ...], before: Tensor) -> str:
    """What there is to say of the tokens against ``generate``; ``before``: the forward pass's own log-probabilities
    [NEW, V] of each token."""
    model.generation_config = GenerationConfig()
    ids = torch.tensor([prompt])
    try:
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )
    except Exception as error:
        return f"generate itself fails ({type(error).__name__})"
    want = out[0, len(prompt) :].tolist()
    differing = [n for n, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    if not differing:
        return "equal"
    n = differing[0]
    lead = float(before[n, got[n]] - before[n, want[n]])
    if abs(lead) <= BOUND:
        return f"a tie at token {n}"
    return f"generate is not its forward pass at token {n}" if lead > 0 else f"WRONG: another token at {n}"


def _largest(errors: list[Tensor]) -> float:
    """nan where there is one."""
    return float(torch.cat(errors).abs().max())


# ------------------------------------------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    made = [row for row in rows if row.trained is not None]
    trained, sampled = ([getattr(row, part) for row in made] for part in ("trained", "sampled"))
    lines = [
        "# Causal language models of transformers, as Keel computes them", "",
        f"Written by `python -m tests.architectures` with transformers {transformers.__version__}; its docstring says "
        "what is measured, and how.", "",
        f"{len(rows)} types, {len(made)} of them made tiny.", "",
        f"- Trained: {_counts(trained)}. {_verdict(trained)}",
        f"- Sampled: {_counts(sampled)}. {_verdict(sampled)}", "",
        "| type | trained | error | sampled | error | tokens against generate |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in made), "", "## Refused", "",
        *(f"- {row.name}, {what}: {found.note}" for row in made
          for what, found in (("trained", row.trained), ("sampled", row.sampled))
          if found is not None and found.how in ("refused", "traceback")),
        "", "## Not made", "", *(f"- {row.name}: {row.why_not}" for row in rows if row.trained is None), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _counts(found: list[Found]) -> str:
    return ", ".join(f"{count} {how}" for how, count in Counter(f.how for f in found).most_common())


def _verdict(found: list[Found]) -> str:
    wrong = sum(f.wrong for f in found)
    errors = [f.error for f in found if f.error is not None]
    return f"{wrong or 'None'} wrong; the largest error is {max(errors, default=0.0):.1e}."


def _line(row: Row) -> str:
    assert row.trained is not None
    assert row.sampled is not None
    cells = [row.name, row.trained.how, _error(row.trained), row.sampled.how, _error(row.sampled)]
    cells.append("" if row.sampled.how in ("refused", "traceback") else row.sampled.note)
    return f"| {' | '.join(cells)} |"


def _error(found: Found) -> str:
    mark = " **wrong**" if found.wrong else ""
    return ("" if found.error is None else f"{found.error:.1e}") + mark


def main(names: list[str]) -> int:
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(examine, names or zoo.names(), chunksize=1)
    if names:
        print(table(rows))
    else:
        FILE.write_text(table(rows), encoding="utf-8")
    print(f"{len(rows)} types in {time.monotonic() - started:.0f} s")
    return int(any(f is not None and f.wrong for row in rows for f in (row.trained, row.sampled)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
