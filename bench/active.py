"""What active choice gains: a reward model's accuracy by the number of votes, pairs chosen at random against pairs on
which an ensemble disagrees.

    python -m bench.active [--quick] [--seeds 0 1 2] [--members 3] [--folder .bench/harbor] [--out bench/results]

In each seed's harbor there is one pool of pairs, and each pair has one vote, whoever asks. Both ways begin with the
same random pairs. Then the random one takes more of them; the active one, in rounds, trains an ensemble on what it has,
ranks the pool by how much the members disagree (keel.feedback.uncertainty), and takes the best, one a prompt and round.
Accuracy: of the pairs of replies to held-out prompts, how often a reward model sides with the population's majority,
the mean over the ensemble's members, all of which see the same votes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harbor import Trained, World, command, prompt_weights, seeds_of, world_of, write_results
from keel.feedback.uncertainty import best_first, disagreement
from keel.reward.ensemble import Candidate
from keel.stats import percentiles
from keel.types import Preference

RANDOM, ACTIVE = "random", "active"
RESAMPLES = 2000


@dataclass(frozen=True)
class Plan:
    """``rounds``: votes in all after each; the last is the number whose random accuracy is to be reached."""

    rounds: tuple[int, ...]
    members: int


FULL, SHORT = (250, 600, 1200, 2000), (60, 120, 240)


@dataclass(frozen=True)
class Point:
    """``hits``: for each decided test pair the share of the members that are right."""

    votes: int
    hits: np.ndarray
    gold: float

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())


def curves(world: World, plan: Plan) -> dict[str, list[Point]]:
    """Both ways' points, the first one shared."""
    order = list(range(len(world.pool)))
    random.Random(f"active {world.seed}").shuffle(order)
    votes: dict[int, Preference] = {}

    def ensemble(asked: Sequence[int]) -> list[Trained]:
        votes.update({i: world.vote(world.pool[i]) for i in asked if i not in votes})
        return [world.train([votes[i] for i in asked], seed) for seed in range(plan.members)]

    first = order[: plan.rounds[0]]
    start = ensemble(first)
    found = {RANDOM: [_point(len(first), start)], ACTIVE: [_point(len(first), start)]}
    for total in plan.rounds[1:]:
        found[RANDOM].append(_point(total, ensemble(order[:total])))
    asked, members = list(first), start
    for total in plan.rounds[1:]:
        asked += choose(members, world.pool, asked, total - len(asked))
        members = ensemble(asked)
        found[ACTIVE].append(_point(total, members))
    return found


def choose(members: Sequence[Trained], pool: Sequence[Candidate], asked: Sequence[int], count: int) -> list[int]:
    had = set(asked)
    left = [i for i in range(len(pool)) if i not in had]
    scorers, temperatures = [trained.scorer for trained in members], [trained.temperature for trained in members]
    gains = disagreement(scorers, temperatures, [pool[i] for i in left])
    places = best_first(gains, [pool[i].prompt.id for i in left], per_group=1, count=count)
    return [left[place] for place in places]


def _point(votes: int, members: Sequence[Trained]) -> Point:
    hits = np.mean([trained.hits for trained in members], axis=0)
    return Point(votes, hits, float(np.mean([trained.gold for trained in members])))


# ------------------------------------------------------------------------------------------------- what it comes to


def votes_to_reach(votes: Sequence[int], accuracy: Sequence[float], target: float) -> float:
    """The votes at which the curve first reaches ``target``, straight between its points (in the votes' logarithm);
    infinite when it never does."""
    if accuracy[0] >= target:
        return float(votes[0])
    for i in range(1, len(votes)):
        if accuracy[i] >= target:
            share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(np.exp(np.log(votes[i - 1]) + share * np.log(votes[i] / votes[i - 1])))
    return float("inf")


def summarise(plan: Plan, found: Mapping[int, Mapping[str, Sequence[Point]]], prompts: Mapping[int, list[str]]) -> Any:
    """Figures of all seeds together. The interval: seeds drawn with replacement, and within each its test prompts."""
    rng = np.random.default_rng(0)
    seeds = list(found)

    def mean_curves(drawn: Sequence[int], resample: bool) -> dict[str, np.ndarray]:
        rows: dict[str, list[list[float]]] = {RANDOM: [], ACTIVE: []}
        for seed in drawn:
            weight = prompt_weights(prompts[seed], rng) if resample else np.ones(len(prompts[seed]))
            for way, points in found[seed].items():
                rows[way].append([float(np.average(point.hits, weights=weight)) for point in points])
        return {way: np.mean(values, axis=0) for way, values in rows.items()}

    def reach(drawn: Sequence[int], resample: bool) -> float:
        mean = mean_curves(drawn, resample)
        return votes_to_reach(plan.rounds, mean[ACTIVE].tolist(), float(mean[RANDOM][-1]))

    point = reach(seeds, resample=False)
    draws = np.array([reach(rng.choice(seeds, len(seeds)).tolist(), resample=True) for _ in range(RESAMPLES)])
    never = float(np.isinf(draws).mean())
    low, high = percentiles(np.where(np.isinf(draws), 1e9, draws)) or (np.nan, np.nan)
    mean = mean_curves(seeds, resample=False)
    return {
        "target_votes": plan.rounds[-1],
        "target_accuracy": float(mean[RANDOM][-1]),
        "active_votes": _finite(point),
        "active_votes_interval": [_finite(low), _finite(high)],
        "share_of_resamples_that_never_reach_it": never,
        "rounds": list(plan.rounds),
        "accuracy": {way: values.tolist() for way, values in mean.items()},
    }


def _finite(votes: float) -> float | None:
    return round(votes, 1) if votes < 1e9 else None


def markdown(result: Mapping[str, Any]) -> str:
    summary = result["summary"]
    low, high = ("more" if v is None else f"{v:,.0f}" for v in summary["active_votes_interval"])
    reached = summary["active_votes"]
    needed = f"**{reached:,.0f}**" if reached is not None else f"more than {summary['target_votes']:,}"
    lines = [
        "# Active choice in the harbor",
        "",
        f"{len(result['seeds'])} seeds, {result['members']} reward models in the ensemble, one vote a pair. Accuracy:",
        "how often a reward model sides with the population's majority on pairs of replies to held-out prompts.",
        "",
        "| votes | random | active | by seed (random → active) |",
        "|---|---|---|---|",
    ]
    for i, votes in enumerate(summary["rounds"]):
        each = ", ".join(
            f"{curve['random'][i]['accuracy']:.3f} → {curve['active'][i]['accuracy']:.3f}"
            for curve in result["curves"].values()
        )
        accuracy = summary["accuracy"]
        lines.append(f"| {votes:,} | {accuracy['random'][i]:.3f} | {accuracy['active'][i]:.3f} | {each} |")
    lines += [
        "",
        f"To reach the accuracy of {summary['target_votes']:,} random votes ({summary['target_accuracy']:.3f}), active",
        f"choice needs {needed} votes (95% interval {low} to {high}; bootstrap over seeds and held-out prompts; in",
        f"{summary['share_of_resamples_that_never_reach_it']:.0%} of the resamples it does not get there).",
        "",
        f"Made by `python -m bench.active` in {result['seconds'] / 60:.0f} minutes on {result['cores']} cores"
        + (" with `--quick`: it shows that the script runs, the figures mean nothing." if result["quick"] else "."),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = command(str(__doc__))
    parser.add_argument("--rounds", type=int, nargs="+", default=None, help="votes in all after each; default: 250 ...")
    parser.add_argument("--members", type=int, default=None, help="default: 3; with --quick 2")
    arguments = parser.parse_args()
    quick = arguments.quick
    plan = Plan(tuple(arguments.rounds or (SHORT if quick else FULL)), arguments.members or (2 if quick else 3))
    started = time.monotonic()
    found, prompts = {}, {}
    for seed in seeds_of(arguments):
        world = world_of(arguments, seed)
        print(f"seed {seed}: {len(world.pool)} pairs to ask, {len(world.decided)} to test on", flush=True)
        found[seed], prompts[seed] = curves(world, plan), world.test_prompts
        for way, points in found[seed].items():
            print(f"  {way}: " + ", ".join(f"{p.votes} {p.accuracy:.3f}" for p in points), flush=True)
    result = {
        "members": plan.members,
        "summary": summarise(plan, found, prompts),
        "curves": {
            str(seed): {
                way: [{"votes": p.votes, "accuracy": p.accuracy, "gold_accuracy": p.gold} for p in points]
                for way, points in ways.items()
            }
            for seed, ways in found.items()
        },
    }
    write_results(arguments, "active", time.monotonic() - started, result, markdown)


if __name__ == "__main__":
    main()
