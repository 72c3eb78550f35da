"""A process reward model on people's labels: from a judgement in the app to the weights, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import labelled_steps
from labelling_world import person, token
from test_process_reward import base, run

from keel.cli.lineage import shaped
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.run import RunDir, read_json
from keel.store import Store, steps
from keel.store.step_records import NewSteps
from keel.types import Completion, StepLabels
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage

__all__ = ["base"]


def judged(one: StepLabels, correct: bool) -> NewSteps:
    """What somebody says of a reply whose labels are known."""
    if 0.0 not in one.labels:
        return NewSteps(("good",) * len(one.steps), "solution", token=token())
    bad = one.labels.index(0.0)
    said = ["good"] * bad + ["bad"] + [None] * (len(one.steps) - bad - 1)
    return NewSteps(said, "found_error", correction="to the port" if correct else None, token=token())  # type: ignore[arg-type]


def label(store: Store) -> None:
    """Ann labels 48 replies; the first half were ranked by what they teach."""
    truth = {}
    ids = []
    for one in labelled_steps.replies(24, each=2):
        truth[one.prompt.messages[0].content, one.text] = one
        with store.session() as session:
            session.add_prompts([one.prompt])
            ids += session.add_responses(one.prompt.id, [Completion(one.text)], "m", SamplingConfig(), fingerprint="f")
    with store.transaction(writes=True) as connection:
        ids = list(dict.fromkeys(ids))
        steps.add_steps(connection, ids, Steps(), 1, "steps", store.now, set(ids[: len(ids) // 2]))
    ann, labelling = person(store, "ann"), Labelling(store)
    while (screen := labelling.next(ann, "step")) is not None:
        one = truth[screen.messages[0].content, screen.shown[0]]
        labelling.label_steps(ann, screen.id, judged(one, correct=True))


def test_people_steps_reach_the_weights_and_lead_back(base: Path, tmp_path: Path) -> None:
    out = RunDir(tmp_path / "run")
    settings = ("process_reward.labels=people", "process_reward.heldout_fraction=0.3")
    code, _ = run(tmp_path, base, *settings)
    assert code == 2  # nobody has labelled anything
    out.path.mkdir(exist_ok=True)
    with Store(out.store_url) as store:
        label(store)
        with store.transaction(writes=False) as connection:
            found = steps.labels(connection)
            random = {one.id for one in steps.labels(connection, drawn="random") if "/corrected" not in one.id}
            given = steps.given(connection)
    code, summary = run(tmp_path, base, *settings)
    assert code == 0
    ids = read_json(out.path / "process_reward" / "judgements.json")
    assert {*ids["trained"], *ids["heldout"]} == {one.id for one in found}
    (model,) = shaped(str(out.path))
    assert set(model.own.trained) == {"people"}  # corrected lines, too, lead back to their judgement
    assert any(id.endswith("/corrected") for id in model.own.trained["people"])
    measured: dict[str, Any] = summary["heldout"]
    assert measured["replies"] == len(random & set(ids["heldout"])) < len(ids["heldout"])
    before = out.manifest.read()["stages"]["process_reward"]["fingerprint"]
    with Store(out.store_url) as store:
        boss = person(store, "boss", "admin")
        Manage(store).erase("response", str(given[0].response.id), boss)
    code, summary = run(tmp_path, base, *settings)
    assert code == 0
    assert out.manifest.read()["stages"]["process_reward"]["fingerprint"] != before  # what was erased is unlearned
    again = read_json(out.path / "process_reward" / "judgements.json")
    assert given[0].token not in {*again["trained"], *again["heldout"]}


def test_people_stand_beside_files(base: Path, tmp_path: Path) -> None:
    rows = labelled_steps.write(tmp_path / "rows.jsonl", labelled_steps.replies(12, each=2, seed=3))
    RunDir(tmp_path / "run").path.mkdir()
    with Store(RunDir(tmp_path / "run").store_url) as store:
        label(store)
    code, _ = run(tmp_path, base, f"process_reward.labels=[people,{rows}]")
    assert code == 0
    (model,) = shaped(str(tmp_path / "run"))
    assert {source: bool(ids) for source, ids in model.own.trained.items()} == {"files": True, "people": True}
