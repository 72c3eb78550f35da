"""The harbor as an experiment's world: an SFT model and its samples, made once a seed and kept; pairs, and what the
population truly prefers; reward models trained on some votes and measured against that truth."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import keel
from keel.eval.calibration import temperature
from keel.eval.winrate import TIE_WIDTH
from keel.feedback.simulated import SimulatedAnnotator, draw, true_probability
from keel.harbor.annotators import population
from keel.harbor.export import export
from keel.harbor.judge import judge
from keel.model.checkpoint import load_scalar
from keel.pipeline.run import run_pipeline
from keel.precision import pick_precision
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.reward.ensemble import Candidate, leads
from keel.reward.scorer import RewardModelScorer, frozen_scorer
from keel.run import RunDir, Silent, cpu_count, resolve_device, write_json
from keel.run.rundir import StageDir
from keel.stages.registry import RUNNERS
from keel.store import Store
from keel.train.context import TrainContext
from keel.train.reward import Aggregate, train_reward
from keel.types import Completion, Preference

DECIDED = 0.05  # the population's preference for one side, beyond 1/2, below which a pair has no right answer


@dataclass(frozen=True)
class Sizes:
    demonstrations: int = 3200
    prompts: int = 1800
    heldout_prompts: int = 450

    @property
    def name(self) -> str:
        return f"{self.demonstrations}-{self.prompts}-{self.heldout_prompts}"


QUICK = Sizes(600, 400, 150)


@dataclass(frozen=True)
class Trained:
    """A reward model and its figures. ``temperature``: what fits its held-out votes; ``hits``: for each decided test
    pair whether it sides with the population's majority; ``gold``: how often it sides with the gold judge, of the pairs
    that the judge tells apart."""

    scorer: RewardModelScorer
    temperature: float
    hits: np.ndarray
    gold: float

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())


class World:
    """One seed's data, SFT model and samples, in a run directory under ``folder`` that a later call finds done."""

    def __init__(self, seed: int, sizes: Sizes, folder: Path) -> None:
        self.seed = seed
        run, data = RunDir(folder / f"harbor-{sizes.name}-seed{seed}"), folder / f"data-{sizes.name}-seed{seed}"
        export(
            data,
            seed,
            demonstrations=sizes.demonstrations,
            prompts=sizes.prompts,
            heldout_prompts=sizes.heldout_prompts,
        )
        tree = yaml.safe_load((Path(keel.__file__).parent / "harbor" / "demo.yaml").read_text(encoding="utf-8"))
        stages = {stage["name"]: stage for stage in tree["stages"]}
        tree |= {
            "seed": seed,
            "model": {"path": str(Path(keel.__file__).parent / "harbor" / "base")},
            "stages": [
                stages["sft"],
                stages["sample"],
                stages["sample"] | {"name": "test", "prompts": str(data / "heldout_prompts.jsonl")},
            ],
        }
        names = ("demonstrations", "prompts", "heldout_prompts")
        tree["data"] |= {name: str(data / f"{name}.jsonl") for name in names}
        self.recipe = Recipe.model_validate(tree)
        self.reward_settings = {k: v for k, v in stages["reward"].items() if k not in ("name", "preferences")}
        self.device = resolve_device("auto")
        run_pipeline(self.recipe, run, RUNNERS, Silent())
        self.sft = run.stage("sft").path
        self.store_url = run.store_url
        self.made_by = str(run.stage("sample").fingerprint)
        self.pool = self._pairs(self.made_by)
        self.test = self._pairs(str(run.stage("test").fingerprint))

    def _pairs(self, made_by: str) -> list[Candidate]:
        """Every pair of the responses to each prompt."""
        with Store(self.store_url) as store:
            prompts = {prompt.id: prompt for prompt in store.prompts()}
            groups: dict[str, list[Completion]] = {}
            for response in store.responses():
                if response.fingerprint == made_by:
                    reply = Completion(response.text, finished=response.finished)
                    groups.setdefault(response.prompt_id, []).append(reply)
        return [Candidate(prompts[id], a, b) for id, group in groups.items() for a, b in combinations(group, 2)]

    @cached_property
    def population(self) -> list[SimulatedAnnotator]:
        return population(self.seed)

    @cached_property
    def truth(self) -> np.ndarray:
        """P(the population prefers the first) of each test pair."""
        return np.array([true_probability(self.population, p.prompt, p.first.text, p.second.text) for p in self.test])

    @cached_property
    def decided(self) -> np.ndarray:
        return np.flatnonzero(np.abs(self.truth - 0.5) > DECIDED)

    @cached_property
    def test_prompts(self) -> list[str]:
        """Of each decided test pair."""
        return [self.test[i].prompt.id for i in self.decided]

    @cached_property
    def gold(self) -> np.ndarray:
        """The judge's score of the first less that of the second, of each test pair."""
        return np.array([judge(p.prompt, p.first.text).score - judge(p.prompt, p.second.text).score for p in self.test])

    def vote(self, pair: Candidate) -> Preference:
        """One annotator's vote on a pair: whose it is, and what it says, depend on the pair alone, so that ways to
        choose pairs are compared on the same votes."""
        place = (self.seed, pair.prompt.id, pair.first.text, pair.second.text)
        rng = draw("vote", *place)
        annotator = rng.choice(self.population)
        opinion = annotator.judge(pair.prompt, pair.first.text, pair.second.text, rng)
        record = Preference(
            id=rng.randbytes(8).hex(),
            prompt=pair.prompt,
            chosen=pair.first.text,
            rejected=pair.second.text,
            tie=opinion.choice == "tie",
            margin=opinion.strength or 0.0,
            annotator=annotator.name,
            chosen_finished=pair.first.finished,
            rejected_finished=pair.second.finished,
        )
        return record.swapped() if opinion.choice == "right" else record

    def train(self, votes: Sequence[Preference], seed: int, aggregate: Aggregate = list) -> Trained:
        """A reward model as the demo trains it; ``seed`` is that of its head and of the order."""
        stage = RewardStage.model_validate(self.reward_settings | {"name": "reward", "seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            context = TrainContext(
                stage=StageDir(Path(folder) / "reward"),
                reporter=Silent(),
                model_path=self.sft,
                base_model=self.recipe.model,
                data=self.recipe.data,
                device=self.device,
                precision=pick_precision("auto", self.device),
                seed=self.recipe.seed,
            )
            _, heldout = train_reward(stage, votes, context, aggregate)
            scorer = frozen_scorer(load_scalar(context.stage.path, device=self.device), context.precision)
        fitted = temperature([lead for record, lead, _, _ in heldout if not record.tie])
        lead_N = leads([scorer], self.test)[0]
        told = np.abs(self.gold) > TIE_WIDTH
        hits = (lead_N[self.decided] > 0) == (self.truth[self.decided] > 0.5)
        return Trained(scorer, fitted, hits, float(((lead_N > 0) == (self.gold > 0))[told].mean()))


def prompt_weights(prompts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """How often each pair counts when prompts are drawn with replacement."""
    names, place = np.unique(np.array(prompts), return_inverse=True)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[place].astype(float)


# -------------------------------------------------------------------------------------------- an experiment's command


def command(doc: str) -> argparse.ArgumentParser:
    """What every experiment in the harbor is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few votes: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 0 1 2; with --quick 0")
    parser.add_argument("--folder", type=Path, default=Path(".bench/harbor"), help="where worlds are kept")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    return arguments.seeds or ([0] if arguments.quick else [0, 1, 2])


def world_of(arguments: argparse.Namespace, seed: int) -> World:
    return World(seed, QUICK if arguments.quick else Sizes(), arguments.folder)


def write_results(
    arguments: argparse.Namespace,
    name: str,
    seconds: float,
    result: Mapping[str, Any],
    markdown: Callable[[Mapping[str, Any]], str],
) -> None:
    """``result`` (its ``summary`` is printed) as NAME.json, and as tables in NAME.md."""
    told = {"quick": arguments.quick, "seeds": seeds_of(arguments), "cores": cpu_count(), "seconds": round(seconds, 1)}
    whole = {**told, **result}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{name}-quick" if arguments.quick else name
    write_json(arguments.out / f"{name}.json", whole)
    (arguments.out / f"{name}.md").write_text(markdown(whole), encoding="utf-8")
    print(json.dumps(whole["summary"], indent=2))
