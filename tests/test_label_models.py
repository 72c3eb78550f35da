"""A model's page: which judgements shaped it, by whom, when, under which guideline, and what came since."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from labelling_world import Client, World, fake_sources, fill, person

from keel.cli.label import with_models
from keel.cli.models import trained_stages
from keel.store import Store, guidelines, review, work
from keel.store.records import NewRanking, NewVote, NewWriting
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.service.models import Models, Part, Shaped
from keel.web.service.people import People
from keel.web.service.sources import TrainedModel
from keel.web.service.start import prepare

START = datetime(2026, 11, 1, 12, tzinfo=UTC)


class Clock:
    """Each thing that happens takes a minute."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        self.time += timedelta(minutes=1)
        return self.time


class Judged:
    """Two annotators: six votes on three items, a ranking, and a demonstration; then a model was trained; then a vote
    was taken back and given again, an item settled, another item judged, and a new guideline made."""

    def __init__(self, store: Store) -> None:
        self.store = store
        items = fill(store, 4, overlap=2, replies=4)
        prepare(store)
        self.ann, self.bo = (person(store, name) for name in ("ann", "bo"))
        for who in (self.ann, self.bo):
            for n in range(3):
                assignment = store.next_assignment(who.annotator_id)
                assert assignment is not None
                store.submit(assignment.id, NewVote("left", token=f"{who.name}-{n}", strength=2, guideline="1"))
        with store.transaction(writes=True) as connection:
            group = [response.id for response in store.responses("p0")]
            work.add_rankings(connection, [group], 1, "rank", store.now)
            work.add_writing(connection, ["p0"], 1, "write", store.now)
        ranking = store.next_assignment(self.ann.annotator_id, kind="rank")
        writing = store.next_assignment(self.ann.annotator_id, kind="write")
        assert ranking is not None
        assert writing is not None
        ranked = NewRanking([[0], [1], [2], [3]], token="a-ranking", guideline="1")
        wrote = NewWriting("Mine", token="a-writing", guideline="1")
        mine, now = self.ann.annotator_id, store.now
        with store.transaction(writes=True) as connection:
            work.rank(connection, ranking.id, ranked, annotator_id=mine, now=now)
            work.write(connection, writing.id, wrote, annotator_id=mine, now=now)
        self.trained_at = store.now
        ids = {row.token: row.id for row in self._rows()}
        again = store.undo(ids["bo-0"])
        store.submit(again.id, NewVote("right", token="bo-again", guideline="1"))
        with store.transaction(writes=True) as connection:
            review.adjudicate(connection, items[1], self.ann.annotator_id, "first", "clear", "ann", store.now)
            version = guidelines.next_version(connection)
        store.add_guideline(version, "Other words")
        assignment = store.next_assignment(self.bo.annotator_id)
        assert assignment is not None
        store.submit(assignment.id, NewVote("tie", token="bo-late", guideline=version))

    def _rows(self) -> list:  # type: ignore[type-arg]
        from sqlalchemy import select

        from keel.store.tables import judgements

        with self.store.transaction(writes=False) as connection:
            return list(connection.execute(select(judgements.c.id, judgements.c.token)))

    def reward(self) -> TrainedModel:
        """Learned from ann's votes and the ranking's pairs; bo's first two were held out, the third not used."""
        row = {"annotator": "bo", "accuracy": 0.5, "low": 0.09, "high": 0.91, "votes": 2}
        return TrainedModel(
            key="reward", run="demo", name="reward", kind="reward", status="done", started=self.trained_at,
            seconds=3.0, fingerprint="f" * 32, parents=("sft",), others=("annotate",),
            summary={"accuracy": 0.5, "annotators": [row]},
            trained=("ann-0", "ann-1", "a-ranking/1-2", "a-ranking/1-3", "from-a-file"), settled=("ann-2",),
            heldout=("bo-0", "bo-1"),
        )  # fmt: skip

    def models(self) -> list[TrainedModel]:
        sft = replace(self.reward(), key="sft", name="sft", kind="sft", parents=(), others=(), summary={})
        sft = replace(sft, trained=("a-writing",), settled=(), heldout=(), started=START)
        ppo = replace(sft, key="ppo", name="ppo", kind="ppo", trained=None, parents=("sft", "reward"))
        ppo = replace(ppo, started=self.trained_at + timedelta(minutes=30))
        bare = replace(sft, key="grpo", name="grpo", kind="grpo", trained=None, learns_from="rewards")
        return [sft, self.reward(), ppo, bare]


@pytest.fixture
def judged(tmp_path: Path) -> Iterator[Judged]:
    with Store(tmp_path / "a.db", clock=Clock()) as store:
        yield Judged(store)


def tokens(shaped: Shaped, part: Part) -> set[str]:
    return {work.token for work in shaped.parts[part]}


def test_a_models_judgements_by_hand(judged: Judged) -> None:
    models = Models(judged.store, judged.models)
    found = models.one("reward")
    assert tokens(found, "trained") == {"ann-0", "ann-1", "a-ranking", "a-writing"}  # the last one through sft
    assert tokens(found, "settled") == {"ann-2"}
    assert tokens(found, "heldout") == {"bo-0", "bo-1"}
    assert tokens(found, "since") == {"bo-again", "bo-late"}
    assert tokens(found, "undone") == {"bo-0"}
    assert tokens(found, "unused") == {"bo-2"}
    assert found.elsewhere == 1
    assert (found.words, found.versions_since) == (1, ["2"])
    ann, bo = found.contributors
    assert (ann.name, ann.trained, ann.settled, ann.heldout, ann.accuracy) == ("ann", 4, 1, 0, None)
    assert (bo.name, bo.trained, bo.heldout) == ("bo", 0, 2)
    assert bo.accuracy is not None
    assert bo.accuracy["votes"] == 2
    assert ann.first is not None
    assert START < ann.first < judged.trained_at
    assert [(version.name, version.count) for version in found.versions] == [("1", 7)]


def test_what_is_since_depends_on_when_the_data_was_read(judged: Judged) -> None:
    """Runs trained at different times: sft knew of nothing yet but its demonstration; ppo, trained after everything,
    learned by what its reward model knew."""
    sft, reward, ppo, bare = Models(judged.store, judged.models).all()
    assert tokens(sft, "since") >= {"ann-0", "bo-2", "bo-late", "a-ranking"}
    assert tokens(sft, "undone") == set()
    assert tokens(ppo, "trained") == tokens(reward, "trained")
    assert [one.key for one in ppo.sources] == ["sft", "reward"]
    assert tokens(ppo, "since") == {"bo-again", "bo-late"}
    assert (bare.known, bare.contributors) == (False, [])


def test_judgements_are_shown_page_by_page(judged: Judged) -> None:
    models = Models(judged.store, judged.models)
    count, entries = models.work("reward", "trained", "ann", None, 0)
    assert count == len(entries) == 4
    times = [entry["work"].created for entry in entries]
    assert times == sorted(times, reverse=True)
    by_token = {entry["work"].token: entry for entry in entries}
    assert [reply["note"] for reply in by_token["a-ranking"]["replies"]] == [f"place {n}" for n in (1, 2, 3, 4)]
    assert by_token["a-writing"]["replies"] == [{"text": "Mine", "note": "written"}]
    assert sorted(reply["note"] for reply in by_token["ann-0"]["replies"]) == ["", "preferred"]
    assert by_token["ann-0"]["said"] == "better"
    assert by_token["ann-1"]["word"].by == "ann"
    assert models.work("reward", "heldout", "ann", None, 0) == (0, [])
    assert models.work("reward", "since", None, "2", 0)[0] == 1
    assert models.work("reward", "trained", None, None, 7) == (4, [])
    with pytest.raises(UserError, match="no trained model 'nothing'"):
        models.one("nothing")


def test_the_pages_name_annotators_to_reviewers_alone(judged: Judged) -> None:
    app = create_app(judged.store, replace(fake_sources(), trained=judged.models))
    accounts = People(judged.store)
    boss = Client(app, accounts.start_session(person(judged.store, "boss", "reviewer")))
    ann = Client(app, accounts.start_session(judged.ann))
    for path in ("", "/reward", "/ppo", "/grpo", "/reward/judgements?part=trained&annotator=ann", "/sft/judgements"):
        assert boss.get(f"/manage/models{path}").status_code == 200, path
        assert ann.get(f"/manage/models{path}").status_code == 403
    page = boss.get("/manage/models/reward").text
    assert '50% <small class="nowrap">9% to 91%, of 2</small>' in page
    assert "/manage/models/reward/judgements?part=trained&amp;annotator=ann" in page
    listed = boss.get("/manage/models/reward/judgements?part=trained&annotator=ann").text
    assert "Question 0?" in listed
    assert ">bo<" not in boss.get("/manage/models/sft").text.partition("By annotator")[2].partition("Since")[0]
    assert boss.get("/manage/models/nothing").status_code == 400


# -------------------------------------------------------------------------------------------------- from the folder


def write_run(folder: Path, started: str) -> Path:
    entry = {"fingerprint": "f", "status": "done", "seconds": 1.0, "started": started}
    stages = {
        "annotate": entry | {"kind": "annotate", "parents": {}},
        "reward": entry | {"kind": "reward", "parents": {"annotate": "f"}},
        "ppo": entry | {"kind": "ppo", "parents": {"reward": "f"}},
        "eval": entry | {"kind": "eval", "parents": {"ppo": "f"}},
    }
    (folder / "reward").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"recipe": {}, "stages": stages}))
    ids = {"trained": ["x"], "settled": [], "heldout": ["y"]}
    (folder / "reward" / "judgements.json").write_text(json.dumps(ids))
    (folder / "reward" / "summary.json").write_text(json.dumps({"accuracy": 0.75}))
    return folder


def test_models_are_read_from_run_directories(tmp_path: Path) -> None:
    first = str(write_run(tmp_path / "first", "2026-11-01T12:00:00Z"))
    reward, ppo = trained_stages([first])
    assert (reward.key, reward.parents, reward.others) == ("reward", (), ("annotate",))
    assert (reward.trained, reward.heldout, reward.started) == (("x",), ("y",), START)
    assert (ppo.parents, ppo.trained, ppo.summary) == (("reward",), None, {})
    second = str(write_run(tmp_path / "second", "2026-11-02T12:00:00Z"))
    assert [m.key for m in trained_stages([first, second])] == [
        "first:reward",
        "first:ppo",
        "second:reward",
        "second:ppo",
    ]
    assert trained_stages([first, second])[3].parents == ("second:reward",)
    with pytest.raises(UserError, match="two runs are called 'first'"):
        trained_stages([first, str(write_run(tmp_path / "other" / "first", "2026-11-02T12:00:00Z"))])
    with pytest.raises(UserError, match="not a run directory"):
        trained_stages([str(tmp_path)])


def test_whose_models_have_a_page(tmp_path: Path) -> None:
    run, empty = str(write_run(tmp_path / "run", "2026-11-01T12:00:00Z")), str(tmp_path)
    assert with_models(run, []) == [run]
    assert with_models(None, [run]) == [run]
    assert with_models(None, []) == with_models(empty, []) == []
    with pytest.raises(UserError, match=r"--models .*: not a run directory"):
        with_models(run, [empty])


def test_without_models_the_page_says_how_to_have_them(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        world = World(store)
        assert "keel label RUN" in world.client("boss", "reviewer").get("/manage/models").text
