"""The harbor's corpus: an endless stream of documents, and the rows by which a model's knowledge of it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Any

from keel.harbor import wording
from keel.harbor.corpus_pages import PAGES
from keel.harbor.facts import Fact, World

_KINDS = [page for _, page in PAGES]
_SHARES = list(accumulate(share for share, _ in PAGES))


def document(world: World, rng: Random) -> str:
    """One document, its kind drawn by ``corpus_pages.PAGES``. No end mark: that is the tokenizer's ``<|end|>``."""
    return rng.choices(_KINDS, cum_weights=_SHARES)[0](world, rng)


def documents(world: World, seed: int) -> Iterator[str]:
    """Documents without end; the same ones for the same world and seed."""
    rng = Random(f"corpus {seed}")
    while True:
        yield document(world, rng)


def base_text_rows(world: World, n: int, rng: Random) -> list[dict[str, Any]]:
    """``n`` plain documents ``{"text": ...}``. They are held out as long as ``rng`` is not the corpus's own stream."""
    return [{"text": document(world, rng)} for _ in range(n)]


def facts_rows(world: World, n: int, rng: Random) -> list[dict[str, Any]]:
    """``n`` multiple-choice rows ``{"prompt", "choices": [4], "answer"}`` about different facts.

    The prompt is a sentence of the corpus cut before the value. Choices are values of the same relation and begin
    with a space: ``prompt + choice`` is the text to score. At most 684 rows exist (one a fact).
    """
    return [_fact_row(world, fact, rng) for fact in rng.sample(world.facts, n)]


def _fact_row(world: World, fact: Fact, rng: Random) -> dict[str, Any]:
    leads = [
        lead for text in wording.ANSWERS[fact.relation] if "{s}" in (lead := text.split(" {v}")[0]) and lead != text
    ]
    lead = wording.fill(rng.choice(leads), fact)
    others = sorted({other.value for other in world.facts_with(fact.relation)} - {fact.value})
    values = [fact.value, *rng.sample(others, 3)]
    rng.shuffle(values)
    return {"prompt": lead, "choices": [f" {value}" for value in values], "answer": values.index(fact.value)}
