"""Every figure that the app shows of what people did, recomputed from the event log alone (and the texts' lengths)."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from counted import kept, recounted
from labelling_world import exported, fake_sources, fill, person
from sqlalchemy import select

from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.store import Store, exchange, overview, step_files, thumbs
from keel.store.lineage import works
from keel.store.overview import Vote
from keel.store.records import Event, NewRanking, NewThumb, NewVote, NewWriting
from keel.store.step_records import NewSteps
from keel.store.tables import responses
from keel.store.trained_on import count_votes
from keel.store.vote_columns import VoteColumns
from keel.types import Completion
from keel.web.service.arena import Arena
from keel.web.service.kept_quality import WHOSE
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.quality import quality
from keel.web.service.standings import ArenaStandings
from keel.web.service.start import prepare
from keel.web.service.steps import StepWork

# ----------------------------------------------------------------------------------------- the log, read from the start


@dataclass
class Log:
    """What the events say, one after the other."""

    kinds: dict[str, str] = field(default_factory=dict)  # of annotators
    done: dict[tuple[str, str], tuple[Event, str]] = field(default_factory=dict)  # what stands, with its kind of work
    undone: dict[tuple[str, str], tuple[Event, str]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)  # assignment -> who
    gold: dict[int, str] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)
    wanted: Counter[tuple[str, str]] = field(default_factory=Counter)
    flags: set[str] = field(default_factory=set)
    out: set[int] = field(default_factory=set)  # items
    arena: list[tuple[str, list[str], str]] = field(default_factory=list)

    def read(self, events: Sequence[Event]) -> Log:
        for event in events:
            getattr(self, f"_{event.action.replace(' ', '_')}", lambda event: None)(event)
        return self

    def _added(self, event: Event) -> None:
        if event.entity in ("annotator", "account"):
            self.kinds[event.entity_id] = event.new.get("kind", "person")
        elif event.entity == "batch":
            place = event.entity_id, event.new.get("kind", "compare")
            self.wanted[place] += event.new["items"] * event.new["overlap"]

    def _changed(self, event: Event) -> None:
        if event.entity == "batch":
            self.wanted[event.entity_id, event.new["kind"]] += event.new["wanted"] - event.old["wanted"]
        elif event.entity == "item":
            place = event.new["batch"], event.new.get("kind", "compare")
            if "gold" in event.new:
                self.gold[int(event.entity_id)] = event.new["gold"]
            if int(event.entity_id) not in self.out:  # "put back" says how many are wanted then
                self.wanted[place] -= 0 if event.old.get("gold") else event.old["overlap"]
                self.wanted[place] += 0 if event.new.get("gold") else event.new["overlap"]

    def _judged(self, event: Event) -> None:
        kinds = {"judgement": "compare", "ranking": "rank", "thumb": "thumb", "writing": "write"}
        kind = (kinds | {"step judgement": "step"})[event.entity]
        if kind == "write" and event.new["original_id"] is not None:
            kind = "edit"
        self.done[event.entity, event.entity_id] = event, kind
        self.skipped.pop(event.new["assignment"], None)

    _imported = _ranked = _gave = _wrote = _labelled = _judged

    def _undone(self, event: Event) -> None:
        key = event.entity, event.entity_id
        self.undone[key] = self.done.pop(key)

    def _skipped(self, event: Event) -> None:
        self.skipped[event.new["assignment"]] = event.actor

    def _unskipped(self, event: Event) -> None:
        del self.skipped[int(event.entity_id)]

    def _adjudicated(self, event: Event) -> None:
        self.words.pop(int(event.entity_id), None)
        if event.new is not None:
            self.words[int(event.entity_id)] = event.new["choice"]

    def _flagged(self, event: Event) -> None:
        self.flags.add(event.entity_id)

    def _resolved(self, event: Event) -> None:
        self.flags.remove(event.entity_id)

    def _took_out(self, event: Event) -> None:
        self.out |= set(event.new["items"])
        self.wanted.subtract({(batch, kind): count for batch, kind, count in event.new["wanted"]})

    def _put_back(self, event: Event) -> None:
        self.out -= set(event.new["items"])
        self.wanted.update({(batch, kind): count for batch, kind, count in event.new["wanted"]})

    def _voted(self, event: Event) -> None:
        self.arena.append((event.actor, event.new["models"], event.new["choice"]))

    # ------------------------------------------------------------------------------------------------------- figures

    def votes(self, lengths: Mapping[int, int]) -> list[Vote]:
        found = []
        for (_, id), (event, kind) in sorted(self.done.items(), key=lambda one: int(one[0][1])):
            if kind != "compare":
                continue
            said = event.new
            left, right = said["shown"]
            vote, longer = "tie", None
            if said["choice"] in ("left", "right"):
                best, other = (left, right) if said["choice"] == "left" else (right, left)
                vote = "first" if best < other else "second"
                longer = None if lengths[best] == lengths[other] else lengths[best] > lengths[other]
            found.append(
                Vote(
                    item_id=said["item"], annotator=event.actor, kind=self.kinds[event.actor], vote=vote,
                    left=None if vote == "tie" else said["choice"] == "left", longer=longer,
                    gold=self.gold.get(said["item"]), seconds=said["seconds"], created=when(event),
                    batch=said["batch"], guideline=event.guideline, strength=said["strength"],
                    responses=(min(left, right), max(left, right)), settled=self.words.get(said["item"]),
                )
            )  # fmt: skip
            assert id == event.entity_id
        return found

    def queues(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(wanted, done) of each queue, gold items left out."""
        done = Counter(
            (event.new["batch"], kind)
            for event, kind in self.done.values()
            if not self.gold.get(event.new["item"]) and event.new["item"] not in self.out
        )
        return {place: (wanted, done[place]) for place, wanted in self.wanted.items()}


def when(event: Event) -> datetime:
    return datetime.fromisoformat(event.new["created"]) if event.action == "imported" else event.at


# --------------------------------------------------------------------------------------------- a project, all in all


class Clock:
    def __init__(self) -> None:
        self.time = datetime.fromisoformat("2026-03-01T09:00:00+00:00")

    def __call__(self) -> datetime:
        self.time += timedelta(minutes=7)
        return self.time


def live(store: Store) -> None:
    """Everything that people can do, over two days, by people and a program."""
    items = fill(store, 9, overlap=2, replies=4)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    boss, ann, bo = person(store, "boss", "reviewer"), person(store, "ann"), person(store, "bo")
    manage.set_gold(items[0], "first", "admin")
    manage.set_gold(items[1], "second", "admin")
    manage.set_gold(items[1], None, "admin")
    manage.set_gold_every(2, "admin")
    labelling.forget()
    manage.set_overlap("main", "compare", 3, "admin")
    for kind in ("rank", "edit", "thumb"):
        manage.ask_for(kind, 3, 1, "admin")  # type: ignore[arg-type]
    gold = next(item["id"] for item in manage.browse("thumb", None, False, 0))
    manage.set_gold(gold, "down", "admin")
    with store.session() as session:
        session.add_responses(
            "p8", [Completion(f"so\nit is {n}") for n in range(3)], "m", SamplingConfig(), fingerprint="s"
        )
    StepWork(store).queue(Steps(), 3, 2, "admin")
    manage.ask_for_writing(3, 2, "admin")
    program = store.add_annotator("sim", "simulated")
    for who, choices in ((ann, ("left", "right", "tie")), (bo, ("right", "both_bad", "left"))):
        for number, choice in enumerate(choices * 2):
            screen = labelling.next(who, "compare")
            assert screen is not None
            if number == 1:
                labelling.skip(who, screen.id, "no idea")
                if who is ann:
                    labelling.undo(who, "compare")
                continue
            decided = choice in ("left", "right")
            labelling.judge(
                who,
                screen.id,
                NewVote(
                    choice,
                    token=uuid.uuid4().hex,
                    strength=1 + number % 3 if decided else None,
                    seconds=number + 0.5,
                    ratings={"left": {"helpful": 3}},
                ),
            )
        labelling.undo(who, "compare")
        rank = labelling.next(who, "rank")
        assert rank is not None
        labelling.flag(who, rank.id, "odd", f"flag of {who.name}")
        labelling.rank(who, rank.id, NewRanking([[1], [0, 2], [3]], token=uuid.uuid4().hex, seconds=4.0))
        for kind in ("write", "edit"):
            screen = labelling.next(who, kind)  # type: ignore[arg-type]
            assert screen is not None
            labelling.write(who, screen.id, NewWriting(f"{who.name}'s {kind}", token=uuid.uuid4().hex, seconds=9.0))
        for up in (True, False):
            screen = labelling.next(who, "thumb")
            assert screen is not None
            labelling.thumb(who, screen.id, NewThumb(up, token=uuid.uuid4().hex, seconds=2.0))
            screen = labelling.next(who, "step")
            assert screen is not None
            labelling.label_steps(who, screen.id, NewSteps(("good", "bad"), "found_error", token=uuid.uuid4().hex))
    labelling.undo(bo, "rank")
    labelling.undo(bo, "thumb")
    labelling.undo(bo, "write")
    labelling.undo(bo, "step")
    manage.add_guideline("New words", "", "admin")
    labelling.forget()
    store._clock.time += timedelta(days=1)  # type: ignore[attr-defined]
    while (assignment := store.next_assignment(program)) is not None:
        store.submit(assignment.id, NewVote("left", token=uuid.uuid4().hex, seconds=1.0, strength=3))
    for item, word in ((items[2], "first"), (items[3], "second"), (items[3], "tie"), (items[2], None)):
        manage.adjudicate(item, word, "so", boss)
    manage.resolve_flag(manage.flags()[0]["id"], "boss")
    for what, id in (("prompt", "p1"), ("item", items[4]), ("prompt", "p5")):
        manage.take_out(what, str(id), "", None, boss)  # type: ignore[arg-type]
    manage.put_back(manage.out()[0]["id"], boss)
    arena = Arena(store, fake_sources().arena)
    id = arena.start(bo)
    list(arena.say(bo, id, "hello"))
    arena.vote(bo, id, "left", "a token of the arena", None)


def test_every_figure_can_be_recomputed_from_the_log(new_url: Callable[[], str], tmp_path: Path) -> None:
    with Store(new_url(), clock=Clock()) as store, Store(new_url(), clock=Clock()) as copy:
        live(store)
        store.export_preferences(tmp_path / "votes.jsonl")
        thumbs.export(store, tmp_path / "thumbs.jsonl")
        step_files.export(store, tmp_path / "steps.jsonl")
        fill(copy, 2)
        copy.import_preferences(exchange.read(tmp_path / "votes.jsonl"))
        with copy.transaction(writes=True) as connection:
            assert thumbs.add(connection, thumbs.read(tmp_path / "thumbs.jsonl"), None, copy.now) == 3
            assert step_files.add(connection, step_files.read(tmp_path / "steps.jsonl"), None, copy.now) == 3
        for one in (store, copy):
            check(one)


def test_a_late_reply_on_what_is_out_is_wanted_when_it_is_put_back(new_url: Callable[[], str]) -> None:
    with Store(new_url(), clock=Clock(), lease=timedelta(minutes=1)) as store:
        fill(store, 2)
        prepare(store)
        manage, labelling = Manage(store), Labelling(store)
        manage.ask_for_writing(2, 1, "admin")
        boss, ann, bo = person(store, "boss", "reviewer"), person(store, "ann"), person(store, "bo")
        late = labelling.next(ann, "write")
        assert late is not None
        for _ in range(2):  # each look at the clock takes seven minutes
            given = labelling.next(bo, "write")
            assert given is not None
            labelling.write(bo, given.id, NewWriting("bo's", token=uuid.uuid4().hex, seconds=1.0))
        prompt = late.messages[-1].content.removeprefix("Question ").removesuffix("?")
        manage.take_out("prompt", f"p{prompt}", "", None, boss)
        check(store)
        labelling.write(ann, late.id, NewWriting("ann's", token=uuid.uuid4().hex, seconds=1.0))
        check(store)
        manage.put_back(manage.out()[0]["id"], boss)
        check(store)
        assert [(q.wanted, q.done) for q in manage.queues() if q.kind == "write"] == [(3, 3)]


def check(store: Store) -> None:
    assert kept(store) == recounted(store)
    log = Log().read(store.events())
    manage = Manage(store)
    with store.transaction(writes=False) as connection:
        lengths = {row.id: len(row.text) for row in connection.execute(select(responses.c.id, responses.c.text))}
        votes, skips = overview.votes(connection, WHOSE["all"]), overview.skips(connection)
        trained = count_votes(connection, "people", None)
        known = works(connection)
    again = log.votes(lengths)
    assert again == votes
    assert Counter(log.skipped.values()) == skips
    assert quality(VoteColumns.of(again), Counter(log.skipped.values())) == manage.quality("all")
    in_use = {place: figures for place, figures in log.queues().items() if any(figures)}  # the others are out
    assert {(q.batch, q.kind): (q.wanted, q.done) for q in manage.queues() if q.items} == in_use
    assert {word.item_id: word.choice for word in _words(store)} == log.words
    assert {str(flag["id"]) for flag in manage.flags()} == log.flags
    told = [
        (row["annotator"], [row["model_left"], row["model_right"]], row["choice"])
        for row in exported(store, "arena.jsonl")
    ]
    assert told == log.arena
    won = Counter(models[choice == "right"] for _, models, choice in log.arena if choice in ("left", "right"))
    met = Counter(model for _, models, _ in log.arena for model in models)
    shown = ArenaStandings(store).found().plain.standings
    assert {one.model: (one.won, one.votes) for one in shown} == {model: (won[model], met[model]) for model in met}
    # what the pages of the models show: each piece of work by its token
    standing = {e.new["token"]: (e.actor, kind, e.guideline, when(e)) for e, kind in log.done.values()}
    assert standing == {
        token: (w.annotator, w.kind, w.guideline, w.created) for token, w in known.items() if w.undone is None
    }
    assert {e.new["token"] for e, _ in log.undone.values()} == {t for t, w in known.items() if w.undone is not None}
    mine = [
        e
        for e, kind in log.done.values()
        if kind != "write"
        and e.new["item"] not in log.out
        and log.kinds[e.actor] != "simulated"
        and not log.gold.get(e.new["item"])
    ]
    assert len(mine) == trained.all
    days: dict[str, int] = defaultdict(int)
    for event, _ in log.done.values():
        days[f"{when(event):%d}"] += log.kinds[event.actor] == "person"
    kinds = Counter(kind for event, kind in log.done.values() if log.kinds[event.actor] == "person")
    assert Counter(manage.overview().done) == kinds
    assert {f"{day.day:%d}": day.done for day in manage.overview().days} == {d: n for d, n in days.items() if n}


def _words(store: Store) -> list[Any]:
    from keel.store.people_tables import adjudications

    with store.transaction(writes=False) as connection:
        return list(connection.execute(select(adjudications).where(adjudications.c.undone_at.is_(None))))
