"""What only the harbor can say of a finished run, since there the truth is known: how good its reward models are on
pairs of replies to held-out prompts, who of its annotators is named as unreliable, and which principles replies break.
Studies ask (``measure:``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from keel.data.sources import read_prompts
from keel.eval.grading import conversation_text
from keel.eval.reward_quality import rank_correlation
from keel.feedback.simulated import true_probability
from keel.harbor.annotators import ADVERSARIAL, LAZY, population
from keel.harbor.judge import judge
from keel.harbor.principles import RULES, broken, keeps
from keel.model.checkpoint import load_scalar
from keel.precision import pick_precision
from keel.recipe.recipe import Recipe
from keel.reward.scorer import frozen_scorer
from keel.run import RunDir, resolve_device
from keel.stats import sigmoid
from keel.store import Store
from keel.study.annotators import annotator_figures, doubtful
from keel.types import Completion, Prompt

TEST = "test"  # the sample stage whose replies are judged
DECIDED = 0.05  # the population's preference for one side, beyond 1/2, below which a pair has no right answer


@dataclass(frozen=True)
class _Group:
    """The replies to one prompt: ``gold``, the judge's scores; ``pairs``: (first, second, probability that the
    population prefers the first)."""

    prompt: Prompt
    replies: Sequence[Completion]
    gold: Sequence[float]
    pairs: Sequence[tuple[int, int, float]]


def reward_models(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of each reward model, on all pairs of the replies that the stage ``test`` sampled, by prompt:

    accuracy  how often it sides with the population's majority, where there is one
    brier     (p - vote)^2 of a vote drawn from the population, with p as the model says it; ``brier_fitted``: with the
              temperature that fits its held-out votes
    rank      Spearman's correlation of its scores of a prompt's replies with the judge's
    """
    groups = _groups(run, recipe)
    device = resolve_device(recipe.device)
    precision = pick_precision("auto", device)
    found = {}
    for stage in recipe.stages:
        if "reward model" not in stage.makes:
            continue
        folder = run.stage(stage.name)
        scorer = frozen_scorer(load_scalar(folder.path, device=device), precision)
        asked = [group.prompt for group in groups for _ in group.replies]
        scores = scorer.score(asked, [reply for group in groups for reply in group.replies]).total_N.double().numpy()
        logits = np.split(scores * scorer.reward_model.std, np.cumsum([len(g.replies) for g in groups])[:-1])
        found[stage.name] = _quality(groups, logits, folder.summary().get("temperature") or 1.0)
    return found


def _groups(run: RunDir, recipe: Recipe) -> list[_Group]:
    made_by = run.stage(TEST).summary()["fingerprint"]
    people = population(recipe.seed)
    by_prompt: dict[str, list[Completion]] = {}
    with Store(recipe.store or run.store_url) as store:
        prompts = {prompt.id: prompt for prompt in store.prompts()}
        for response in store.responses():
            if response.fingerprint == made_by:
                by_prompt.setdefault(response.prompt_id, []).append(response.completion())
    groups = []
    for name, replies in by_prompt.items():
        prompt = prompts[name]
        pairs = [
            (a, b, true_probability(people, prompt, replies[a].text, replies[b].text))
            for a, b in combinations(range(len(replies)), 2)
        ]
        groups.append(_Group(prompt, replies, [judge(prompt, reply.text).score for reply in replies], pairs))
    return groups


def _quality(groups: Sequence[_Group], logits: Sequence[np.ndarray], temperature: float) -> dict[str, Any]:
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in ("accuracy", "brier", "brier_fitted", "rank")}
    for group, scores in zip(groups, logits, strict=True):
        name = group.prompt.id
        leads = [(float(scores[a] - scores[b]), q) for a, b, q in group.pairs]
        hits = [float((lead > 0) == (q > 0.5)) for lead, q in leads if abs(q - 0.5) > DECIDED]
        if hits:
            rows["accuracy"][name] = [sum(hits), float(len(hits))]
        for kind, t in (("brier", 1.0), ("brier_fitted", temperature)):
            if leads:
                rows[kind][name] = [sum(_brier(sigmoid(lead / t), q) for lead, q in leads), float(len(leads))]
        together = rank_correlation(scores.tolist(), group.gold)
        if together is not None:
            rows["rank"][name] = [together, 1.0]
    return {kind: _ratio(own) for kind, own in rows.items()}


def _brier(p: float, q: float) -> float:
    """Expected over a vote that is 1 with probability ``q``."""
    return q * (1 - p) ** 2 + (1 - q) * p**2


def _ratio(rows: dict[str, list[float]]) -> dict[str, Any] | None:
    if not rows:
        return None
    return {"value": sum(a for a, _ in rows.values()) / sum(n for _, n in rows.values()), "rows": rows}


def named(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of each annotate stage: how many annotators are named as unreliable by their votes alone (``named``), how many
    of those are bad (``precision``), and how many of the bad are named (``recall``)."""
    found: dict[str, dict[str, Any]] = {}
    with Store(recipe.store or run.store_url) as store:
        for stage in recipe.stages:
            if "votes" not in stage.makes:
                continue
            figures = annotator_figures(store.judgements(run.stage(stage.name).fingerprint))
            bad = {one.name for one in figures if one.name.startswith((LAZY, ADVERSARIAL))}
            doubted = set(doubtful(figures))
            found[stage.name] = {
                "named": len(doubted),
                "precision": len(doubted & bad) / len(doubted) if doubted else None,
                "recall": len(doubted & bad) / len(bad) if bad else None,
            }
    return found


def principles(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of each evaluated model: the share of its replies that plainly break each principle of the harbor's constitution
    (``harm``, ``invent``, ...), over the prompts that it says something of. The evaluation's prompts are
    ``data.heldout_prompts``, and it keeps as many of them as ``eval.show`` says."""
    assert recipe.data.heldout_prompts is not None, "the built-in world has them"
    known = {conversation_text(prompt): prompt for prompt in read_prompts(recipe.data.heldout_prompts)}
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number, sample in enumerate(run.summary().get("samples", ())):
        prompt = known[sample["prompt"]]
        for model, reply in sample["replies"].items():
            for principle in RULES:
                if keeps(principle, prompt, reply["text"]) is not None:
                    rows = table.setdefault(model, {}).setdefault(principle, {})
                    rows[f"{number} {prompt.id}"] = [float(broken(principle, prompt, reply["text"])), 1.0]
    return {model: {name: _ratio(rows) for name, rows in named.items()} for model, named in table.items()}
