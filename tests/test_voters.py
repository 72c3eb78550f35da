"""People, model judges and simulated annotators are told apart: in what is trained on, in hashes, counts and figures.

One store has all of them. By hand: ``ann`` (a person) and ``imp`` (imported, of unknown kind) voted once each, ``bot``
(a model) three times, once of them on a gold item, and ``sim`` (simulated) twice, in the queues ``b`` and ``other``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from labelling_world import World

from keel.feedback.stored import training_demonstrations, training_votes
from keel.recipe.declared import VOTERS
from keel.recipe.reward import RewardStage
from keel.run import write_json
from keel.store import NewVote, Store, gold, work
from keel.store.records import NewWriting
from keel.store.trained_on import VoteHashes, vote_hashes
from keel.types import Completion, Message, Prompt
from keel.web.app.create import create_app
from keel.web.service.manage import Manage
from keel.web.service.models import Models
from keel.web.service.sources import Sources, TrainedModel

VOTES: list[tuple[str, Any, str]] = [
    ("ann", "person", "people"),
    ("imp", "unknown", "import"),
    ("bot", "model", "import"),
    ("bot", "model", "b"),
    ("sim", "simulated", "b"),
    ("sim", "simulated", "other"),
    ("bot", "model", "people"),  # p7: gold
]


def voted(folder: Path, votes: list[tuple[str, Any, str]] = VOTES) -> Store:
    """A pair of each prompt p1, p2, ... with one vote: for the left, `better`, its token NAME-N."""
    store = Store(folder / "f.db")
    for n, (name, kind, batch) in enumerate(votes, 1):
        with store.session() as s:
            s.add_prompts([Prompt(f"p{n}", (Message("user", f"question {n}"),))])
            pair = s.add_responses(f"p{n}", [Completion(f"this {n}"), Completion(f"that {n}")], "m")
            (item,) = s.add_comparisons([(pair[0], pair[1])], batch=batch)
            assignment = s.next_assignment(s.add_annotator(name, kind), batch)
            assert assignment is not None
            s.submit(assignment.id, NewVote("left", strength=2, token=f"{name}-{n}"))
    if votes is VOTES:
        with store.transaction(writes=True) as connection:
            gold.set_gold(connection, item, "first", "boss", store.now)
    return store


def test_each_kind_is_trained_on_as_it_is_asked_for(tmp_path: Path) -> None:
    with voted(tmp_path):
        url = f"sqlite:///{tmp_path / 'f.db'}"
        expected = {"people": ["ann-1", "imp-2"], "models": ["bot-3", "bot-4"], "simulated": ["sim-5"]}
        for whose in [VOTERS, *((who,) for who in VOTERS)]:
            found = training_votes(tmp_path / "-".join(whose), url, ["b"], whose)
            assert {who: [vote.id for vote in votes] for who, votes in found.items()} == {
                who: ids if who in whose else [] for who, ids in expected.items()
            }


def test_votes_that_a_stage_kept_before_models_were_told_apart_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "votes.json", {"simulated": [], "people": []})
    assert training_votes(tmp_path, "", [], VOTERS) == {"people": [], "models": [], "simulated": []}


@pytest.mark.parametrize(
    ("preferences", "voters", "whose"),
    [
        (["annotate"], "all", {"people", "models", "simulated"}),
        (["annotate"], "people", {"people"}),
        (["annotate"], "models", {"models"}),
        (["annotate"], "simulated", {"simulated"}),
        (["people"], "all", {"people"}),
        (["annotate", "people"], "simulated", {"people", "simulated"}),
        (["annotate", "people"], "models", {"people", "models"}),
        (["annotate", "people"], "people", {"people"}),
        (["pairs.jsonl"], "all", set()),
    ],
)
def test_whose_votes_a_stage_learns_from(preferences: list[str], voters: Any, whose: set[str]) -> None:
    stage = RewardStage(kind="reward", name="reward", preferences=preferences, voters=voters)
    assert stage.from_store({"annotate"}).voters == whose


def test_hashes_of_a_store_without_models_are_what_they_were(tmp_path: Path) -> None:
    """Runs that were made before models were told apart stay done. The oracle: the rows, written out."""
    with voted(tmp_path, [("ann", "person", "x"), ("imp", "unknown", "x"), ("sim", "simulated", "x")]) as store:
        shown = {vote.token: [vote.left.id, vote.right.id] for vote in store.judgements()}
    rows = [("judgements", token, "left", 2.0, shown[token], token[:3]) for token in ("ann-1", "imp-2")]
    digest = hashlib.sha256("".join(f"{row!r}\n" for row in rows).encode()).hexdigest()
    found = vote_hashes(tmp_path / "f.db")
    assert found == VoteHashes(people=digest)
    assert found.facts() == {"people": digest, "withdrawn": "", "written": ""}


def test_a_models_vote_changes_the_models_hash_alone(tmp_path: Path) -> None:
    with voted(tmp_path, VOTES[:1]):
        before = vote_hashes(tmp_path / "f.db")
    (tmp_path / "more").mkdir()
    with voted(tmp_path / "more", [VOTES[0], VOTES[2]]) as store:
        after = vote_hashes(tmp_path / "more" / "f.db")
        assert (after.withdrawn, after.written) == ("", "")
        assert after.models
        assert before.models == ""
        assert after.facts().keys() - before.facts().keys() == {"models"}
        with store.transaction(writes=True) as connection:
            gold.set_gold(connection, 2, "first", "boss", store.now)
        assert vote_hashes(tmp_path / "more" / "f.db").models == ""


def test_what_a_model_wrote_is_no_persons_demonstration(tmp_path: Path) -> None:
    with voted(tmp_path, VOTES[:1]) as store:
        with store.transaction(writes=True) as connection:
            work.add_writing(connection, ["p1"], 2, "write", store.now)
        for name, kind in (("ann", "person"), ("bot", "model")):
            before = vote_hashes(tmp_path / "f.db").written
            who = store.add_annotator(name, kind)  # type: ignore[arg-type]
            assignment = store.next_assignment(who, kind="write")
            assert assignment is not None
            with store.transaction(writes=True) as connection:
                wrote = NewWriting(f"{name}'s reply", token=f"{name}-wrote")
                work.write(connection, assignment.id, wrote, annotator_id=who, now=store.now)
        assert vote_hashes(tmp_path / "f.db").written == before != ""
        (learned,) = training_demonstrations(tmp_path / "stage", f"sqlite:///{tmp_path / 'f.db'}")
        assert learned.messages[-1].content == "ann's reply"
        assert len(store.demonstrations()) == 2


def test_the_apps_figures_tell_them_apart(tmp_path: Path) -> None:
    with voted(tmp_path) as store:
        manage = Manage(store)
        votes = {
            who: {one.annotator: one.votes for one in manage.quality(who).annotators}  # type: ignore[arg-type]
            for who in ("people", "models", "all")
        }
        assert votes["people"] == {"ann": 1}
        assert votes["models"] == {"bot": 3}
        assert votes["all"] == {"ann": 1, "imp": 1, "bot": 3, "sim": 2}
        assert {who: (n.all, n.new) for who, n in manage.votes(None).items()} == {"people": (2, 2), "models": (2, 2)}
        ids = ("ann-1", "imp-2", "bot-3", "bot-4", "sim-5")
        model = TrainedModel("reward", "r", "reward", "reward", "done", store.now, 1.0, "f", (), (), {}, ids)
        assert Models(store, lambda: [model]).one("reward").whose == {"people": 2, "models": 2, "simulated": 1}
        world = World(store, items=0)
        world.app = create_app(store, Sources(trained=lambda: [model]))
        boss = world.client("boss", "admin")
        assert "<strong>2</strong> <span>judgements by models" in boss.get("/manage/training").text
        assert "2 by people, 2 by models, 1 simulated" in boss.get("/manage/models/reward").text
        page = boss.get("/manage/quality?who=models").text
        names = [name for name in ("ann", "bot", "imp", "sim") if f'class="name"><bdi>{name}' in page]
        assert names == ["bot"]
