"""What bad annotators cost a reward model, what weighting votes recovers, and who is named as bad.

    python -m bench.votes [--quick] [--seeds 0 1 2] [--models 2] [--folder .bench/harbor] [--out bench/results]

In each seed's harbor, beside the 20 honest annotators, three vote at random and two for the worse response: a fifth of
the votes. They judge pairs through the store's queue as the demo's annotators do, `OVERLAP` of the pairs twice. Reward
models are trained, ``--models`` times each with other seeds, on

    clean       the good votes alone, as if one knew
    raw, majority, weighted    all votes, by the recipe's `votes:`

Accuracy: of the pairs of replies to held-out prompts, how often a model sides with the majority of the honest
population, which is known. *Recovered*: (weighted - raw) / (clean - raw), of the means over seeds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.annotators import AnnotatorFigures, annotator_figures, doubtful
from bench.harbor import World, command, prompt_weights, seeds_of, world_of, write_results
from keel.feedback.aggregate import How, aggregate
from keel.feedback.pairing import PairChoice, make_comparisons
from keel.feedback.simulated import SimulatedAnnotator, label
from keel.harbor.annotators import ADVERSARIAL, LAZY, with_bad
from keel.run import Silent
from keel.stats import percentiles
from keel.store import Store
from keel.train.pairs import Aggregate
from keel.types import Preference

OVERLAP = 0.5
CLEAN = "clean"
WAYS: tuple[How, ...] = ("raw", "majority", "weighted")
RESAMPLES = 2000


def judged(world: World, annotators: Sequence[SimulatedAnnotator], overlap: float) -> tuple[list[Preference], Any]:
    """(votes, the figures of each annotator): a store of its own, filled through the queue."""
    with Store(world.store_url) as samples:
        responses = [r for r in samples.responses() if r.fingerprint == world.made_by]
        prompts = samples.prompts()
    once, twice = make_comparisons(responses, PairChoice(per_prompt=2), overlap, world.seed)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "feedback.db", seed=world.seed) as store:
        with store.session() as session:
            session.add_prompts(prompts)
            place = {}
            for response in responses:
                (place[response.id],) = session.add_responses(
                    response.prompt_id, [response.completion()], response.model, fingerprint=response.fingerprint
                )
            for pairs, times in ((once, 1), (twice, 2)):
                session.add_comparisons([(place[a], place[b]) for a, b in pairs], times, "votes")
        label(store, annotators, world.seed, "1", Silent(), "votes")
        return store.preferences("votes"), annotator_figures(store.judgements("votes"))


def measure(world: World, models: int, overlap: float) -> dict[str, Any]:
    """One seed: ``hits`` by way, for each decided test pair the share of the models that are right; who is named."""
    votes, figures = judged(world, with_bad(world.seed), overlap)
    bad = {f.name for f in figures if f.name.startswith((LAZY, ADVERSARIAL))}
    good = [vote for vote in votes if vote.annotator not in bad]
    ways: dict[str, tuple[list[Preference], Aggregate]] = {CLEAN: (good, list)}
    ways |= {how: (votes, partial(aggregate, how=how)) for how in WAYS}
    hits, gold = {}, {}
    for way, (records, make) in ways.items():
        trained = [world.train(records, seed, make) for seed in range(models)]
        hits[way] = np.mean([one.hits for one in trained], axis=0)
        gold[way] = float(np.mean([one.gold for one in trained]))
        print(f"  {way}: {hits[way].mean():.4f}", flush=True)
    named = set(doubtful(figures))
    return {
        "votes": len(votes),
        "bad_votes": len(votes) - len(good),
        "votes_each": len(votes) / len(figures),
        "hits": hits,
        "gold": gold,
        "prompts": world.test_prompts,
        "named": sorted(named),
        "bad": sorted(bad),
        "reliability": {f.name: _reliability(f) for f in figures},
    }


def _reliability(figures: AnnotatorFigures) -> list[float] | None:
    r = figures.reliability
    return None if r is None or r.interval is None else [round(x, 3) for x in (r.point, *r.interval)]


# ------------------------------------------------------------------------------------------------- what it comes to


def summarise(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """All seeds together; the intervals draw seeds, and within each its test prompts, with replacement."""
    rng = np.random.default_rng(0)
    seeds = list(found)

    def means(drawn: Sequence[int], resample: bool) -> dict[str, float]:
        rows: dict[str, list[float]] = {way: [] for way in (CLEAN, *WAYS)}
        for seed in drawn:
            prompts = found[seed]["prompts"]
            weights = prompt_weights(prompts, rng) if resample else np.ones(len(prompts))
            for way, hits in found[seed]["hits"].items():
                rows[way].append(float(np.average(hits, weights=weights)))
        return {way: float(np.mean(values)) for way, values in rows.items()}

    def recovered(mean: Mapping[str, float], how: How) -> float:
        lost = mean[CLEAN] - mean["raw"]
        return (mean[how] - mean["raw"]) / lost if lost > 0 else float("nan")

    point = means(seeds, resample=False)
    draws = [means(rng.choice(seeds, len(seeds)).tolist(), resample=True) for _ in range(RESAMPLES)]
    named = sum(len(one["named"]) for one in found.values())
    bad = sum(len(one["bad"]) for one in found.values())
    right = sum(len(set(one["named"]) & set(one["bad"])) for one in found.values())
    return {
        "accuracy": point,
        "accuracy_interval": {way: percentiles(np.array([d[way] for d in draws])) for way in point},
        "lost": point[CLEAN] - point["raw"],
        "lost_interval": percentiles(np.array([d[CLEAN] - d["raw"] for d in draws])),
        "recovered": {how: _number(recovered(point, how)) for how in WAYS[1:]},
        "recovered_interval": {how: percentiles(np.array([recovered(d, how) for d in draws])) for how in WAYS[1:]},
        "gold_accuracy": {way: float(np.mean([one["gold"][way] for one in found.values()])) for way in point},
        "named": named,
        "precision": right / named if named else None,
        "recall": right / bad if bad else None,
    }


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def markdown(result: Mapping[str, Any]) -> str:
    s = result["summary"]
    seeds = list(result["by_seed"].values())
    votes, bad = (sum(one[name] for one in seeds) for name in ("votes", "bad_votes"))
    lines = [
        "# Bad annotators in the harbor",
        "",
        f"{len(seeds)} seeds, {result['models']} reward models each; {votes / len(seeds):,.0f} votes a seed,",
        f"{bad / votes:.0%} of them bad; {result['overlap']:.0%} of the pairs judged twice;",
        f"{seeds[0]['votes_each']:.0f} votes an annotator. Accuracy: how often a reward model sides with the honest",
        "population's majority on pairs of replies to held-out prompts. Intervals: 95%, bootstrap over both.",
        "",
        "| trained on | accuracy | interval | recovered of the loss | with the gold judge |",
        "|---|---|---|---|---|",
    ]
    names = {CLEAN: "good votes alone", "raw": "all votes, raw", "majority": "majority", "weighted": "weighted"}
    for way, name in names.items():
        share = s["recovered"].get(way)
        between = s["recovered_interval"].get(way)
        cell = "" if share is None else f"{share:.0%}" + (f" ({between[0]:.0%} to {between[1]:.0%})" if between else "")
        low, high = s["accuracy_interval"][way]
        lines.append(
            f"| {name} | {s['accuracy'][way]:.4f} | {low:.4f} to {high:.4f} | {cell} | {s['gold_accuracy'][way]:.4f} |"
        )
    precision, recall = ("–" if v is None else f"{v:.0%}" for v in (s["precision"], s["recall"]))
    lost = s["lost_interval"]
    lines += [
        "",
        f"The bad votes cost {s['lost']:.4f}" + (f" ({lost[0]:.4f} to {lost[1]:.4f})." if lost else "."),
        f"Naming the bad annotators (`annotators.doubtful`): precision {precision}, recall {recall},",
        f"{s['named']} named.",
        "",
        f"Made by `python -m bench.votes` in {result['seconds'] / 60:.0f} minutes on {result['cores']} cores"
        + (" with `--quick`: it shows that the script runs, the figures mean little." if result["quick"] else "."),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = command(str(__doc__))
    parser.add_argument("--models", type=int, default=None, help="reward models each; default: 2, with --quick 1")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="share of the pairs judged twice")
    arguments = parser.parse_args()
    models = arguments.models or (1 if arguments.quick else 2)
    started = time.monotonic()
    found = {}
    for seed in seeds_of(arguments):
        world = world_of(arguments, seed)
        print(f"seed {seed}: {len(world.decided)} pairs to test on", flush=True)
        found[seed] = measure(world, models, arguments.overlap)
    result = {
        "models": models,
        "overlap": arguments.overlap,
        "summary": summarise(found),
        "by_seed": {
            str(seed): {k: v for k, v in one.items() if k not in ("hits", "prompts")}
            | {"accuracy": {way: float(hits.mean()) for way, hits in one["hits"].items()}}
            for seed, one in found.items()
        },
    }
    write_results(arguments, "votes", time.monotonic() - started, result, markdown)


if __name__ == "__main__":
    main()
