"""The report: a run directory's files become one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keel.report.benchmarks import benchmarks
from keel.report.charts import Palette, guardrail_plots, learning_curves, reward_plots, scores_by_kind, win_rates
from keel.report.constitution import constitution
from keel.report.frontier import frontier
from keel.report.kinds import kind_of, title
from keel.report.reading import RunFiles, StageFiles, read_run
from keel.report.reasoning import reasoning
from keel.report.rounds import round_rows
from keel.report.sections import Fact, headline, lineage, pipeline, samples, total_seconds
from keel.report.table import table
from keel.report.wording import duration, number, one_place, percent, percent_range, three_places, two_places
from keel.run import atomic_write_text


def build_report(run_dir: Path, out: Path, heading: str = "") -> Path:
    """Writes the page of the run in ``run_dir`` to ``out`` (replacing it whole) and returns ``out``.

    Reads ``manifest.json``, ``summary.json`` and each stage's ``summary.json`` and ``metrics.jsonl``; whatever is
    missing is left out of the page. The same files give the same page, byte for byte. ``heading``: the page's title
    (default: the run's name). Raises UserError when the folder holds no run or a file of it is damaged.
    """
    run = read_run(run_dir)
    atomic_write_text(out, render(run, heading))
    return out


def render(run: RunFiles, heading: str = "") -> str:
    palette = Palette.of(run)
    environment = _environment()
    css, _, _ = environment.loader.get_source(environment, "page.css")  # type: ignore[union-attr]
    return environment.get_template("page.html.j2").render(
        css=Markup(css),
        heading=heading or title(run.name),
        run=run,
        baseline=title(run.baseline),
        byline=_byline(run),
        headline=headline(run),
        pipeline=pipeline(run),
        table=table(run),
        models=[(title(name), palette[name]) for name in run.models],
        ranked_note=run.baseline in run.models and next(iter(run.models)) != run.baseline,
        benchmarks=benchmarks(run),
        win_rates=win_rates(run, palette),
        by_kind=scores_by_kind(run, palette),
        curves=learning_curves(run, palette),
        rounds=round_rows(run),
        guardrail=guardrail_plots(run, palette),
        constitution=constitution(run, palette),
        frontier=frontier(run, palette),
        reasoning=reasoning(run, palette),
        statements=run.summary.get("guardrail", {}).get("statements", []),
        equal_kl=_equal_kl(run),
        fits=_fits(run),
        reward_models=[
            (
                title(stage.name),
                reward_facts(stage) + _gold_facts(run, stage),
                reward_plots(stage, palette),
                _annotators(stage),
            )
            for stage in run.stages
            if kind_of(stage.kind).judged and stage.summary
        ],
        samples=samples(run, palette),
        watched=any(kind_of(stage.kind).watched for stage in run.stages),
        alarms=_alarms(run),
        lineage=lineage(run),
    )


def _alarms(run: RunFiles) -> list[Mapping[str, Any]]:
    """The run's, those of the judges that label first: the report may be written before they are in its summary."""
    cards = [alarm for stage in run.stages for alarm in (stage.summary.get("card") or {}).get("alarms", [])]
    return cards + [alarm for alarm in run.summary.get("alarms", []) if alarm not in cards]


@cache
def _environment() -> Environment:
    """Everything is escaped unless it was made as Markup here; a name that the template misspells is an error."""
    environment = Environment(
        loader=PackageLoader("keel.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"name": title, "two": two_places, "one": one_place}
    return environment


def _byline(run: RunFiles) -> list[str]:
    parts = []
    started = sorted(str(stage.entry["started"]) for stage in run.stages if "started" in stage.entry)
    if started:
        parts.append(started[0][:10])
    prompts = next((n for figures in run.models.values() if (n := number(figures.get("prompts")))), None)
    if prompts is not None:
        parts.append(f"{prompts:,.0f} held-out prompts")
    if judge := run.summary.get("judge"):
        parts.append(f"judge: {judge if isinstance(judge, str) else _judge_name(judge)}")
    if "seed" in run.manifest:
        parts.append(f"seed {run.manifest['seed']}")
    if seconds := total_seconds(run):
        parts.append(duration(seconds))
    return parts


def _judge_name(judge: dict[str, object]) -> str:
    return str(judge.get("ref") or judge.get("model") or judge.get("url") or judge.get("kind") or "unknown")


def reward_facts(stage: StageFiles) -> list[Fact]:
    """How well a reward model does on pairs that it held out, in words and numbers."""
    summary = stage.summary
    accuracy, ceiling = number(summary.get("accuracy")), number(summary.get("ceiling"))
    facts = []
    if accuracy is not None:
        error = number(summary.get("accuracy_se"))
        facts.append(Fact("Accuracy on held-out pairs", percent(accuracy) + (f" ± {percent(error)}" if error else "")))
    if ceiling is not None:
        facts.append(Fact("Ceiling that noisy labels allow", percent(ceiling)))
    if (share := stage.summary.get("share_of_ceiling")) and None not in share:
        point, low, high = share
        said = f"{percent(point)} ({percent_range(low, high)})"
        facts.append(Fact("Accuracy as a share of the majority's on the same votes", said))
    elif accuracy is not None and ceiling:
        facts.append(Fact("Accuracy as a share of the ceiling", percent(accuracy / ceiling)))
    for key, label, form in (
        ("accuracy_on_truth", "Sides with the majority of annotators", percent),
        ("ece", "Expected calibration error", three_places),
        ("annotator_agreement", "Annotators agree with each other", percent),
        ("prefers_longer", "Prefers the longer reply", percent),
    ):
        if (value := number(summary.get(key))) is not None:
            facts.append(Fact(label, form(value)))
    if (pairs := number(summary.get("pairs"))) is not None:
        facts.append(Fact("Pairs trained on", f"{pairs:,.0f}"))
    if (pairs := number(summary.get("heldout_pairs"))) is not None:
        facts.append(Fact("Pairs held out", f"{pairs:,.0f}"))
    return facts


def _annotators(stage: StageFiles) -> list[tuple[str, str, str]]:
    """(accuracy, interval, votes) of each annotator, without names: the page may go further than they should."""
    return [
        (percent(row["accuracy"]), percent_range(row["low"], row["high"]), f"{row['votes']:,}")
        for row in stage.summary.get("annotators", ())
    ]


def _gold_facts(run: RunFiles, stage: StageFiles) -> list[Fact]:
    """What the evaluation's judge says of it, where it was compared with other reward models."""
    accuracy = run.summary.get("reward_models", {}).get(stage.name, {}).get("accuracy")
    if not accuracy:
        return []
    point, low, high = (percent(share) for share in accuracy)
    return [Fact("Sides with the judge on held-out pairs", f"{point} ({low} to {high})")]


def _fits(run: RunFiles) -> list[str]:
    """The least-squares fit of Gao et al. 2022, a sentence a run."""
    said = []
    for entry in run.summary.get("guardrail", {}).get("runs", []):
        if fit := entry.get("fit"):
            peak = fit.get("peak_kl")
            highest = f"highest at {one_place(peak)} nats" if peak is not None else "with no peak in the range measured"
            said.append(
                f"{title(entry['name'])}: gold = {two_places(fit['start'])} + d ({two_places(fit['alpha'])} − "
                f"{two_places(fit['beta'])} ln d) with d = √KL, {highest}; root mean square error "
                f"{three_places(fit['rmse'])} over {fit['points']} measurements."
            )
    return said


def _equal_kl(run: RunFiles) -> list[dict[str, float]]:
    """One row a level: KL, gold of the run with the penalty and of the one without."""
    rows = run.summary.get("guardrail", {}).get("equal_kl", [])
    return [
        {"kl": r["kept"]["kl"], "kept": r["kept"]["gold"], "free": r["free"]["gold"]}
        | {"kept_proxy": r["kept"]["proxy"], "free_proxy": r["free"]["proxy"]}
        for r in rows
    ]
