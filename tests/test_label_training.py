"""From the app: the queue ordered by an ensemble, and training again in the background."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from labelling_world import World, fill
from test_stages import loop_recipe
from test_stages import run as run_recipe
from waiting import eventually

from keel.cli.ensemble import RunEnsemble
from keel.cli.label import _RunModels
from keel.cli.retrain import FOLDER, Retraining
from keel.run import RunDir, write_json
from keel.store import Store, gold, priority, review
from keel.store.records import NewVote
from keel.types import Completion, Prompt, UserError
from keel.web.app.create import create_app
from keel.web.service.ordering import Ordering
from keel.web.service.sources import Sources


@pytest.fixture
def store(new_url: Callable[[], str]) -> Iterator[Store]:
    with Store(new_url()) as found:
        yield found


class Odd:
    """An ensemble that differs most on the highest prompt number, and says which pairs it was asked about."""

    def __init__(self, models: Sequence[str] = ("one", "two")) -> None:
        self.models, self.asked = list(models), 0

    def names(self) -> list[str]:
        return self.models

    def gains(self, pairs: Sequence[tuple[Prompt, Completion, Completion]]) -> list[float]:
        self.asked = len(pairs)
        assert all(first.text.endswith("number 0") and second.text.endswith("number 1") for _, first, second in pairs)
        return [float(prompt.id.removeprefix("p")) for prompt, _, _ in pairs]


def given_out(store: Store, name: str, count: int) -> list[str]:
    """The prompts that somebody is given, judging each."""
    who, found = store.add_annotator(name), []
    for n in range(count):
        assignment = store.next_assignment(who)
        if assignment is None:
            break
        store.submit(assignment.id, NewVote("left", token=f"{name}-{n}-{assignment.id}"))
        found.append(assignment.prompt.id)
    return found


# ------------------------------------------------------------------------------------------------------- the order


def test_uncertain_pairs_come_first_and_back_again(store: Store) -> None:
    fill(store, 6, overlap=2)
    assert given_out(store, "ann", 2) == ["p0", "p1"]
    ensemble = Odd()
    ordering = Ordering(store, ensemble)
    ordering.uncertain_first("admin")
    ordering.wait()
    assert ordering.state().state == "done"
    assert "A vote on the first 1 should tell 5.000 nats about them, one on any pair 2.500" in ordering.state().message
    assert ensemble.asked == 6
    assert given_out(store, "ann", 9) == ["p5", "p4", "p3", "p2"]  # not again what she had
    assert given_out(store, "bo", 2) == ["p5", "p4"]
    assert ordering.as_added("admin") == 4  # p5 and p4 have their two
    assert given_out(store, "bo", 9) == ["p0", "p1", "p2", "p3"]
    assert [e.new["order"] for e in store.events() if e.action == "ordered"] == ["uncertain", "added"]
    ordering.uncertain_first("admin")
    ordering.wait()
    assert ordering.state().state == "failed"
    assert "no comparison is open" in ordering.state().message


def test_ranked_pairs_stay_within_their_queue(store: Store) -> None:
    fill(store, 4)
    with store.session() as s:
        pairs = []
        for i in (7, 8):
            s.add_prompts([Prompt(f"p{i}", ())])
            ids = s.add_responses(f"p{i}", [Completion("number 0"), Completion("number 1")], "m")
            pairs.append((ids[0], ids[1]))
        s.add_comparisons(pairs, batch="urgent")
    with store.transaction(writes=True) as connection:
        review.put_first(connection, "urgent", "compare", "admin", store.now)
    ordering = Ordering(store, Odd())
    for _ in range(2):  # again is the same
        ordering.uncertain_first("admin")
        ordering.wait()
    fresh = fill_more(store)
    with store.transaction(writes=True) as connection:
        review.put_first(connection, "last word", "compare", "admin", store.now)
    assert given_out(store, "ann", 9) == ["q", "p8", "p7", "p3", "p2", "p1", "p0", fresh]


def fill_more(store: Store) -> str:
    """One more pair in the first queue, and one in a new queue."""
    with store.session() as s:
        for name, batch in (("new", "main"), ("q", "last word")):
            s.add_prompts([Prompt(name, ())])
            ids = s.add_responses(name, [Completion("a"), Completion("b")], "m")
            s.add_comparisons([(ids[0], ids[1])], batch=batch)
    return "new"


def test_a_gold_item_keeps_its_place(store: Store) -> None:
    items = fill(store, 3)
    with store.transaction(writes=True) as connection:
        gold.set_gold(connection, items[2], "first", "admin", store.now)
    ensemble = Odd()
    ordering = Ordering(store, ensemble)
    ordering.uncertain_first("admin")
    ordering.wait()
    assert ensemble.asked == 2
    assert given_out(store, "ann", 9) == ["p1", "p0"]


def test_labelling_goes_on_while_the_queue_is_ordered(store: Store) -> None:
    """Eight people judge while the order changes all the time: nobody fails, no item is had by more than wanted."""
    fill(store, 40, overlap=3)
    ids = [store.add_annotator(f"a{n}") for n in range(8)]
    stop, problems, votes = threading.Event(), [], []

    def reorder() -> None:
        try:
            with store.transaction(writes=False) as connection:
                items = [pair.item_id for pair in priority.open_pairs(connection)]
            n = 0
            while not stop.is_set():
                n += 1
                gains = {item: float(hash((item, n)) % 97) for item in items}
                with store.transaction(writes=True) as connection:
                    priority.give_turns(connection, items, gains)
        except Exception as error:
            problems.append(error)

    def work(annotator: int) -> None:
        try:
            while (assignment := store.next_assignment(annotator)) is not None:
                store.submit(assignment.id, NewVote("left", token=f"{annotator}-{assignment.id}"))
                votes.append((annotator, assignment.item_id))
        except Exception as error:
            problems.append(error)

    other = threading.Thread(target=reorder)
    threads = [threading.Thread(target=work, args=(id,)) for id in ids]
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    other.join(30)
    assert problems == []
    assert len(votes) == len(set(votes)) == 40 * 3
    assert len(store.judgements()) == 40 * 3


def test_one_model_differs_from_nobody(tmp_path: Path) -> None:
    with Store(tmp_path / "f.db") as store:
        fill(store, 1)
        for ensemble in (None, Odd(["one"])):
            with pytest.raises(UserError, match="two reward models or more"):
                Ordering(store, ensemble).uncertain_first("admin")


def test_the_order_over_http_and_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path / "f.db") as store:
        world = World(store)
        plain = world.client("root", "admin")
        assert "With two reward models or more" in plain.get("/manage/queue").text
        assert plain.form("/manage/queue/order", by="uncertain").status_code == 400
        app = create_app(store, Sources(ensemble=Odd()))
        world.app = app
        client = world.client("boss", "admin")
        assert "where one, two differ" in client.get("/manage/queue").text
        assert client.form("/manage/queue/order", by="uncertain").status_code == 303
        app.state.services.ordering.wait()
        assert "6 pairs, those first" in client.get("/manage/queue").text
        ann = world.client("ann")
        item = ann.api("next", {"kind": "compare"})
        assert item.json()["item"]["messages"][0]["html"].find("Question 5") >= 0
        assert set(item.json()["item"]) == {"id", "kind", "messages", "shown"}  # no word of the order
        app.state.services.ordering._mark("running", "", "boss")
        app.state.services.ordering.recover()
        assert "the server was stopped" in client.get("/manage/queue").text


# ------------------------------------------------------------------------------------------------------- training


def wait_for(training: Retraining, *states: str, seconds: float = 60.0) -> Any:
    eventually(lambda: training.status().state in states, seconds=seconds)
    return training.status()


def a_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "manifest.json", {"recipe": {"stages": [{"name": "reward", "kind": "reward"}]}, "stages": {}})
    return run


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_training_is_one_at_a_time_and_its_end_is_kept(tmp_path: Path) -> None:
    run, gate = a_run(tmp_path), tmp_path / "gate"
    command = script(f"import pathlib, time\nprint('reward: 1/2', flush=True)\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.02)\nprint('over')")  # fmt: skip  # noqa: E501
    training = Retraining(run, command)
    assert training.status().state == "never"
    with pytest.raises(UserError, match="nothing is being trained"):
        training.stop()
    training.start("boss")
    another_server = Retraining(run, command)
    for one in (training, another_server):
        assert one.status().state == "running"
        with pytest.raises(UserError, match="under way already"):
            one.start("other")
    eventually(lambda: "reward: 1/2" in another_server.status().log)
    gate.touch()
    status = wait_for(another_server, "done")
    assert status.by == "boss"
    assert status.log[-1] == "over"
    assert status.ended > status.started


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (2, "failed"), (130, "stopped")])
def test_how_it_ended(tmp_path: Path, code: int, state: str) -> None:
    training = Retraining(a_run(tmp_path), script(f"raise SystemExit({code})"))
    training.start("boss")
    wait_for(training, state)


def test_stopping_interrupts_it(tmp_path: Path) -> None:
    training = Retraining(a_run(tmp_path), script("import time\nprint('begun', flush=True)\ntime.sleep(60)"))
    for _ in range(2):  # and again
        training.start("boss")
        eventually(lambda: "begun" in training.status().log)
        training.stop()
        wait_for(training, "stopped", "failed")
        assert any("KeyboardInterrupt" in line for line in training.status().log)
        assert training._process is not None
        training._process.wait()  # which lets its lock go


def test_a_killed_training_is_no_longer_running(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    training = Retraining(run, script("import time\ntime.sleep(60)"))
    training.start("boss")
    eventually(lambda: "pid" in json.loads((run / FOLDER / "state.json").read_text()))
    os.killpg(json.loads((run / FOLDER / "state.json").read_text())["pid"], signal.SIGKILL)
    status = wait_for(Retraining(run), "stopped")
    assert "killed" in status.message
    training.start("boss")
    assert training.status().state == "running"
    os.killpg(training._process.pid, signal.SIGKILL)  # type: ignore[union-attr]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run yet"):
        Retraining(tmp_path).start("boss")


def test_the_page_starts_it_and_labelling_goes_on(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with Store(run / "feedback.db") as store:
        world = World(store)
        admin = world.client("root", "admin")
        assert "with a run directory" in admin.get("/manage/training").text
        assert admin.form("/manage/training/start").status_code == 400
        training = Retraining(run, script("import time\nprint('<b>step 1</b>', flush=True)\ntime.sleep(60)"))
        world.app = create_app(store, Sources(training=training))
        client, ann = world.client("boss", "admin"), world.client("ann")
        assert "Train again with the judgements so far" in client.get("/manage/training").text
        assert client.form("/manage/training/start").status_code == 303
        again = client.form("/manage/training/start")
        assert again.status_code == 400
        assert "under way already" in again.text
        item = ann.api("next", {"kind": "compare"}).json()["item"]
        body = {"assignment": item["id"], "token": "t" * 12, "choice": "left"}
        assert ann.api("judge", body).status_code == 200
        eventually(lambda: "step 1" in client.get("/manage/training").text)
        page = client.get("/manage/training").text
        assert "&lt;b&gt;step 1" in page
        assert "http-equiv" in page
        assert "<strong>1</strong> <span>judgements by people" in page
        assert client.form("/manage/training/stop").status_code == 303
        wait_for(training, "stopped", "failed")
        assert [e.action for e in store.events() if e.entity == "training"] == ["started", "stopped"]
        assert ann.get("/manage/training").status_code == 403


def test_from_the_app_to_new_weights(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    """Nothing faked: a run, votes given over HTTP, `keel run` in the background, other weights, and the models that the
    app knows change with them."""
    recipe = loop_recipe(tmp_path, None)
    recipe["stages"] = [s for s in recipe["stages"] if s["name"] in ("sft", "sample", "annotate", "reward", "dpo")]
    recipe["stages"].insert(4, recipe["stages"][3] | {"name": "second", "seed": 7})
    done = run_recipe(recipe, tmp_path / "run")
    before = {name: done.stage(name).fingerprint for name in ("sft", "annotate", "reward", "dpo")}
    models = _RunModels(str(done.path))
    assert models["dpo"].fingerprint == before["dpo"]
    os.environ |= {"PYTHONPATH": subprocess_env["PYTHONPATH"]}
    training = Retraining(done.path)
    with Store(done.store_url) as store:
        world = World(store, items=0)
        world.app = create_app(store, Sources(training=training, ensemble=RunEnsemble(done.path)))
        admin, ann = world.client("boss", "admin"), world.client("ann")
        world.app.state.services.ordering.uncertain_first("boss")
        world.app.state.services.ordering.wait()
        assert world.app.state.services.ordering.state().state == "done"
        for n in range(9):
            item = ann.api("next", {"kind": "compare"}).json()["item"]
            body = {"assignment": item["id"], "token": f"token-{n:04d}", "choice": "right", "strength": 3}
            assert ann.api("judge", body).status_code == 200
        assert "<strong>9</strong> <span>since the models were trained" in admin.get("/manage/training").text
        assert admin.form("/manage/training/start").status_code == 303
        status = wait_for(training, "done", "failed", "stopped", seconds=300)
        assert status.state == "done", status.log
        page = admin.get("/manage/training").text
        assert "<strong>0</strong> <span>since the models were trained" in page
    stages = {stage.name: stage for stage in status.stages}
    assert (stages["reward"].people_votes, stages["dpo"].people_votes) == (9, 9)
    assert stages["reward"].before is not None
    assert stages["sft"].state == "not touched"
    after = {name: done.stage(name).fingerprint for name in before}
    assert {name for name in before if before[name] != after[name]} == {"reward", "dpo"}
    assert models["dpo"].fingerprint == after["dpo"]


def test_run_without_a_recipe_takes_the_runs_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from keel.cli import main

    assert main(["run", "--out", str(tmp_path / "none")]) == 2
    assert "keel run needs a recipe" in capsys.readouterr().err
    recipe = loop_recipe(tmp_path, None)
    recipe["stages"] = recipe["stages"][:1]
    done = run_recipe(recipe, tmp_path / "run")
    assert main(["run", "--out", str(done.path)]) == 0
    assert "sft: up to date" in capsys.readouterr().out
    assert main(["run", "sft.epochs=2", "--out", str(done.path)]) == 0
    assert RunDir(done.path).manifest.read()["recipe"]["stages"][0]["epochs"] == 2
