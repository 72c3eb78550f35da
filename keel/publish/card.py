"""The model card: what a run knows of a model, in Markdown with the hub's header. Every number is a summary's.

What the run does not know is not said; a licence is what a person typed. Names of people and texts of prompts and
replies never stand in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from keel.publish.facts import DataFile, Facts, Learned, public_name
from keel.report.benchmarks import BenchCell, benchmarks
from keel.report.build import reward_facts
from keel.report.kinds import kind_of, title
from keel.report.reading import RunFiles
from keel.report.table import Cell, table
from keel.report.wording import duration, number, phrase

_TASKS = {"policy": "text-generation"}  # of the hub's; models with a head of scores classify
_WHOSE = {
    "people": ("record of people's work", "records of people's work"),
    "models": ("judgement by a model", "judgements by models"),
    "simulated": ("judgement by a simulated annotator", "judgements by simulated annotators"),
    "files": ("record of a data file", "records of data files"),
}
_HASH = 12  # digits of a hash that are shown


def header(facts: Facts, license_id: str | None) -> dict[str, Any]:
    """The card's YAML header, as the hub reads it. ``license_id``: as a person said it; None is left out."""
    found: dict[str, Any] = {} if license_id is None else {"license": license_id}
    found |= {"library_name": "transformers", "pipeline_tag": _TASKS.get(facts.makes, "text-classification")}
    if facts.base_on_hub:
        found |= {"base_model": facts.base, "base_model_relation": "finetune"}
    if sets := [file.name.removeprefix("hub:") for file in facts.data if file.name.startswith("hub:")]:
        found["datasets"] = list(dict.fromkeys(name.split(":")[0] for name in sets))
    return found | {"tags": ["keel", "rlhf", facts.kind.replace("_", "-")]}


def write_card(facts: Facts, license_id: str | None, use: Sequence[str] = ()) -> str:
    """The card. ``use``: lines of Markdown on how to run the model."""
    head = yaml.safe_dump(header(facts, license_id), sort_keys=False, allow_unicode=True)
    sections = [
        ("", list(_opening(facts))),
        ("Use", list(use)),
        ("Whose judgements", list(_judgements(facts))),
        ("Evaluation", list(_evaluations(facts))),
        ("Limits and alarms", list(_limits(facts))),
        ("Lineage", list(_lineage(facts))),
        ("Data", list(_data(facts.data))),
    ]
    parts = [f"# {text(title(facts.name))}"]
    for heading, lines in sections:
        if lines:
            parts.append("\n".join(([f"## {heading}", ""] if heading else []) + lines))
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def text(value: str) -> str:
    """A name as Markdown shows it: on one line, with no markup of its own."""
    escaped = " ".join(value.split())
    for sign in "\\`*_[]<>|#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped


def rows(headings: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    yield from ("| " + " | ".join(cells) + " |" for cells in body)


def _opening(facts: Facts) -> Iterator[str]:
    what = {"policy": "A language model", "reward model": "A reward model: it scores replies"}
    said = what.get(facts.makes, "A process reward model: it scores the steps of replies")
    how = " with low-rank adapters" if facts.lora else ""
    base = text(facts.base) + (f" at {text(facts.revision)}" if facts.revision else "")
    yield f"{said}. Made by Keel's stage `{facts.name}` ({facts.kind}) of the run {text(facts.run)}, from {base}{how}."
    if facts.percent is not None:
        yield f"It is a checkpoint {facts.percent}% along that stage; the counts below are of the whole stage."
    if facts.without_kl:
        yield ""
        yield "**It was trained without a KL penalty, to show what goes wrong then. It is not meant to be used.**"


# ------------------------------------------------------------------------------------------------------- judgements


def _judgements(facts: Facts) -> Iterator[str]:
    for learned in facts.learned:
        yield f"- `{learned.stage}` ({learned.kind}) learned from {_counts(learned)}{_besides(learned)}."
    versions = sorted({version for learned in facts.learned for version in learned.guidelines})
    if versions:
        yield ""
        yield f"Guideline: version {', '.join(map(text, versions))}. " + "; ".join(
            f"`{learned.stage}`: {', '.join(f'{n:,} under {text(v)}' for v, n in learned.guidelines.items())}"
            for learned in facts.learned
            if learned.guidelines
        )
    principles = dict.fromkeys(row for learned in facts.learned for row in learned.principles)
    if facts.constitutions or principles:
        yield ""
        yield from (f"Constitution: {text(name)}, version `{hash[:_HASH]}`." for name, hash in facts.constitutions)
        yield from (
            f"- under {text(constitution)}/{text(principle)} (version `{version[:_HASH]}`): {votes:,} votes of models"
            for constitution, principle, version, votes in principles
        )


def _counts(learned: Learned) -> str:
    said = []
    for who, count in learned.whose.items():
        gave = learned.annotators.get(who)
        of = f" (of {gave:,})" if gave else ""
        said.append(f"{count:,} {_WHOSE[who][count != 1]}{of}")
    return ", ".join(said) or "nothing that it recorded"


def _besides(learned: Learned) -> str:
    more = f"; a reviewer settled {learned.settled:,}" if learned.settled else ""
    return more + (f"; {learned.heldout:,} held out" if learned.heldout else "")


# ------------------------------------------------------------------------------------------------------- evaluation


def _evaluations(facts: Facts) -> Iterator[str]:
    for run in facts.evaluations:
        yield from _evaluation(facts.name, run)
        yield ""
    own = list(_measured(facts))
    if own:
        yield f"What `{facts.name}` measured at its end:"
        yield ""
        yield from rows(("Figure", "Value"), own)


def _evaluation(name: str, run: RunFiles) -> Iterator[str]:
    if name in run.models:
        yield from _compared(name, run)
    for bench in benchmarks(run):
        if title(name) in bench.columns:
            place = bench.columns.index(title(name))
            body = [[text(label), _both(row[place])] for label, row in bench.rows]
            yield from ("", f"{bench.heading} (stage `{run.name}`). {text(bench.caption)}", "")
            yield from rows((bench.heading, text(title(name))), body)


def _compared(name: str, run: RunFiles) -> Iterator[str]:
    prompts = number(run.models[name].get("prompts"))
    asked = f" on {prompts:,.0f} held-out prompts" if prompts is not None else ""
    yield f"Stage `{run.name}`{asked}, judged by {text(_judge(run))}. ± one standard error, ranges are 95% intervals."
    yield ""
    names = list(run.models)
    shown = [one for one in dict.fromkeys((name, run.baseline)) if one in names]
    body = []
    for group in table(run):
        for row in group.rows:
            label = text(row.label) + (f" ({text(row.unit)})" if row.unit else "")
            body.append([label, *(_both(row.cells[names.index(one)]) for one in shown)])
    heads = [text(title(one)) + (" (the baseline)" if one == run.baseline else "") for one in shown]
    yield from rows(("Figure", *heads), body)


def _both(cell: Cell | BenchCell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def _judge(run: RunFiles) -> str:
    said = run.summary.get("judge") or "an unknown judge"
    return " ".join(public_name(word) for word in str(said).split())


def _measured(facts: Facts) -> Iterator[Sequence[str]]:
    stage = facts.measured
    if stage is None:
        return
    if facts.makes == "reward model":
        yield from ((text(fact.label), fact.value) for fact in reward_facts(stage))
        return
    for shown in kind_of(facts.kind).facts:
        if (value := number(stage.summary.get(shown.key))) is not None:
            yield text(shown.label), shown.format(value)


# ----------------------------------------------------------------------------------------------------------- limits


def _limits(facts: Facts) -> Iterator[str]:
    whose = {who for learned in facts.learned for who in learned.whose}
    if not facts.evaluations and facts.makes == "policy":
        yield "- No evaluation of the run compares this version: how well it does is not known."
    for name in facts.outdated:
        yield f"- The evaluation `{name}` is of an earlier version of this model and is left out."
    if facts.makes == "policy" and "the reward model" in {str(run.summary.get("judge")) for run in facts.evaluations}:
        yield "- The judge is a reward model of the run itself: it says what that model likes, not what people do."
    if "simulated" in whose:
        yield "- Simulated annotators are programs. Their judgements are no person's."
    if "models" in whose:
        yield "- Judgements by models may share those models' faults."
    if "files" in whose:
        yield "- Whose work the data files are, and under which terms, the run does not record."
    if facts.evaluations:
        yield "- What is not in the table was not measured."
    alarms = [alarm for run in facts.evaluations for alarm in _alarms(run, facts)]
    yield from dict.fromkeys(f"- Alarm, {text(title(a['stage']))}: {_told(a)}" for a in alarms)
    if facts.evaluations and not alarms:
        yield "- No alarm was raised on this model or what it rests on."


def _alarms(run: RunFiles, facts: Facts) -> Iterator[Mapping[str, Any]]:
    own = {facts.name, *(step.name for step in facts.steps)}
    yield from (alarm for alarm in run.summary.get("alarms", ()) if alarm.get("stage") in own)


def _told(alarm: Mapping[str, Any]) -> str:
    at = alarm.get("step")
    return text(f"{alarm['message']}" + (f" (step {at})" if at is not None else ""))


# ---------------------------------------------------------------------------------------------------------- lineage


def _lineage(facts: Facts) -> Iterator[str]:
    body = [
        (f"`{s.name}`", s.kind, f"`{s.fingerprint[:_HASH]}`", "" if s.seconds is None else duration(s.seconds))
        for s in facts.steps
    ]
    yield from rows(("Stage", "Kind", "Fingerprint", "Time"), body)
    yield ""
    made_with = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    base = f" Base: {text(facts.base)}" + (f", SHA-256 `{facts.base_sha256}`." if facts.base_sha256 else ".")
    yield f"Seed {facts.seed}, on {facts.device or 'an unknown device'}, with {text(made_with)}.{base}"


def _data(files: Sequence[DataFile]) -> Iterator[str]:
    if files:
        yield from rows(
            ("For", "File", "SHA-256", "Read by"),
            [
                (
                    phrase(f.use),
                    text(f.name),
                    f"`{f.sha256}`" if f.sha256 else "–",
                    ", ".join(f"`{s}`" for s in f.stages),
                )
                for f in files
            ],
        )
