"""Critique and revision by principles: a scripted writer's texts are known by hand, and so is what comes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from loopback import Reply, Server, chat_reply
from tiny import Counting

from keel.endpoint import Endpoint
from keel.recipe.constitution import Constitution, draw
from keel.recipe.critique import CritiqueStage
from keel.recipe.judges import EndpointRef
from keel.recipe.sections import SamplingConfig
from keel.rollout.critique import Chain, Critic, figures
from keel.rollout.said import Journal
from keel.rollout.writer import Answers, EndpointWriter, Writer
from keel.types import Completion, Message, Prompt, UserError


def principle(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "text": id, "critique": f"{id}?", "revision": f"not {id}", "choose": "A or B?", **more}


CONSTITUTION = Constitution.model_validate(
    {
        "name": "tiny",
        "principles": [principle("harm"), principle("length")],
        "examples": [
            {"principle": "harm", "prompt": "P1", "reply": "R1", "critique": "C1", "revision": "V1"},
            {"prompt": "P2", "reply": "R2", "critique": "C2", "revision": "V2"},
        ],
    }
)
PROMPTS = [
    Prompt(f"p{n}", (Message("system", "Be a clerk."), Message("user", f"ask {n}")) if n == 0 else
           (Message("user", f"ask {n}"),))
    for n in range(5)
]  # fmt: skip


def settings(**changes: Any) -> CritiqueStage:
    return CritiqueStage.model_validate({"name": "c", "model": "base", "constitution": "x", "revisions": 2, **changes})


class Scripted:
    """Answers a request by its text, as ``says`` has it, else by its kind: "reply to ask 1", then "seen" and "better
    reply to ask 1", "better better ...". ``fails`` raises at the n-th call."""

    def __init__(self, says: Mapping[str, Completion | None] | None = None, fails: int | None = None) -> None:
        self.says, self.fails = says or {}, fails
        self.calls: list[tuple[int, list[tuple[Message, ...]]]] = []

    def write(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, answers: Answers | None = None
    ) -> list[Completion | None]:
        if len(self.calls) + 1 == self.fails:
            raise RuntimeError("killed")
        self.calls.append((seed, [prompt.messages for prompt in prompts]))
        replies = [self._answer(prompt.messages) for prompt in prompts]
        if answers is not None:
            answers.keep({i: reply for i, reply in enumerate(replies) if reply is not None})
        return replies

    def _answer(self, messages: Sequence[Message]) -> Completion | None:
        last = messages[-1].content
        reply = next((m.content for m in reversed(messages) if "reply" in m.content), "")
        key = f"{last} | {reply}"
        if key in self.says:
            return self.says[key]
        if last.startswith("ask"):
            return Completion(f"reply to {last}")
        return Completion("seen" if last.endswith("?") else f"better {reply}")


def critic(writer: Writer, folder: Path, config: CritiqueStage, **more: Any) -> Critic:
    journal = Journal(folder / "said.jsonl")
    return Critic(writer, CONSTITUTION, CONSTITUTION.principles, config, 7, journal, Counting(), **more)


def chains(writer: Writer, folder: Path, config: CritiqueStage, **more: Any) -> list[Chain]:
    return critic(writer, folder, config, **more).chains(PROMPTS)


def texts(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages]


# ------------------------------------------------------------------------------------------------------- the chain


def test_each_request_is_the_conversation_so_far(tmp_path: Path) -> None:
    writer = Scripted()
    found = chains(writer, tmp_path, settings())
    assert [chain.texts for chain in found] == [
        [f"reply to ask {n}", f"better reply to ask {n}", f"better better reply to ask {n}"] for n in range(5)
    ]
    by_hand = [draw(CONSTITUTION.principles, 1, 7, "p0", 0, n)[0] for n in (1, 2)]
    first = by_hand[0]
    assert [revision.principle for revision in found[0].revisions] == by_hand
    shots = {
        "harm": ["P1", "R1", "harm?", "C1", "not harm", "V1", "P2", "R2", "harm?", "C2", "not harm", "V2"],
        "length": ["P2", "R2", "length?", "C2", "not length", "V2"],
    }[first.id]
    asked = [call[0] for _, call in writer.calls]
    assert texts(asked[0]) == ["Be a clerk.", "ask 0"]
    assert texts(asked[1]) == ["Be a clerk.", *shots, "ask 0", "reply to ask 0", first.critique]
    assert texts(asked[2]) == [*texts(asked[1]), "seen", first.revision]
    assert texts(asked[3])[-3:] == ["ask 0", "better reply to ask 0", by_hand[1].critique]
    for messages in asked:  # a system message first or nowhere, and turns that alternate
        roles = [message.role for message in messages[messages[0].role == "system" :]]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert roles[-1] == "user"
    record = found[1].record()
    assert record["initial"] == {"text": "reply to ask 1", "finished": True}
    assert [r["principle_hash"] for r in record["revisions"]] == [r.principle.hash for r in found[1].revisions]
    assert (record["kept"], record["why"]) == (True, None)


def test_principles_depend_on_their_place_alone_and_seeds_differ(tmp_path: Path) -> None:
    writer = Scripted()
    both = critic(writer, tmp_path, settings(replies=2)).chains(PROMPTS)
    alone = critic(Scripted(), tmp_path / "b", settings(replies=2)).chains(PROMPTS[3:4])
    drawn = [[revision.principle.id for revision in chain.revisions] for chain in both]
    assert drawn[6:8] == [[revision.principle.id for revision in chain.revisions] for chain in alone]
    assert [(chain.prompt.id, chain.number) for chain in both[:3]] == [("p0", 0), ("p0", 1), ("p1", 0)]
    assert len({seed for seed, _ in writer.calls}) == len(writer.calls) == 5
    counted = figures(both)
    assert sum(counted["drawn"].values()) == sum(counted["changed"].values()) == 20
    assert counted["drawn"] == {id: sum(ids.count(id) for ids in drawn) for id in ("harm", "length")}
    assert (counted["prompts"], counted["chains"], counted["revised"]) == (5, 10, 20)


def test_without_critique_the_revision_is_asked_for_directly(tmp_path: Path) -> None:
    writer = Scripted()
    found = chains(writer, tmp_path, settings(critique=False, few_shots=1, revisions=1))
    assert [len(call) for _, call in writer.calls] == [5, 5]
    first = found[0].revisions[0].principle
    shots = {"harm": ["P1", "R1", "not harm", "V1"], "length": ["P2", "R2", "not length", "V2"]}[first.id]
    assert texts(writer.calls[1][1][0]) == ["Be a clerk.", *shots, "ask 0", "reply to ask 0", first.revision]
    record = found[0].record()["revisions"][0]
    assert (record["critique_request"], record["critique"], record["finished"]) == (
        "", "", {"critique": True, "revision": True},
    )  # fmt: skip
    bare = Scripted()
    chains(bare, tmp_path / "b", settings(few_shots=0, revisions=1))
    assert len(bare.calls[1][1][1]) == 3


def test_what_is_cut_empty_missing_or_too_long_ends_its_chain_alone(tmp_path: Path) -> None:
    """p0's first reply is cut; p1's first critique never ends; p2's second revision is blank; p3 has no answer at its
    second critique; p4 is whole until its second critique is longer than the context."""
    says: dict[str, Completion | None] = {"ask 0 | ": Completion("reply to", finished=False)}
    for one in CONSTITUTION.principles:
        says |= {
            f"{one.critique} | reply to ask 1": Completion("It is, it is", finished=False),
            f"{one.revision} | better reply to ask 2": Completion(" \n"),
            f"{one.critique} | better reply to ask 3": None,
        }

    def fits(asked: Sequence[Prompt]) -> list[bool]:
        return [not any("better reply to ask 4" in message.content for message in one.messages) for one in asked]

    found = chains(Scripted(says), tmp_path, settings(), fits=fits)
    assert [chain.why for chain in found] == ["cut", "cut", "empty", "missing", "too_long"]
    assert figures(found)["left_out"] == {"cut": 2, "empty": 1, "missing": 1, "too_long": 1}
    assert [len(chain.revisions) for chain in found] == [0, 1, 2, 2, 2]
    cut, never_ends, blank = (chain.record() for chain in found[:3])
    assert cut["initial"] == {"text": "reply to", "finished": False}
    assert never_ends["revisions"][0]["parsed"] == "cut"
    assert never_ends["revisions"][0]["critique"] == "It is, it is"
    assert never_ends["revisions"][0]["finished"] == {"critique": False, "revision": False}
    assert [r["parsed"] for r in blank["revisions"]] == ["ok", "empty"]
    assert not blank["kept"]
    # What was finished before may be learned from; of whole chains alone where the last is given.
    assert [chain.given("all") for chain in found] == [[], [], *[[(1, f"better reply to ask {n}")] for n in (2, 3, 4)]]
    assert [chain.given("last") for chain in found] == [[]] * 5
    whole = chains(Scripted(), tmp_path / "whole", settings())[0]
    assert whole.given("last") == [(2, "better better reply to ask 0")]
    assert [number for number, _ in whole.given("all")] == [1, 2]


def test_an_unchanged_revision_is_counted_as_such(tmp_path: Path) -> None:
    says = {f"{one.revision} | reply to ask 1": Completion("reply to ask 1") for one in CONSTITUTION.principles}
    found = chains(Scripted(says), tmp_path, settings(revisions=1))
    assert sum(figures(found)["drawn"].values()) == 5
    assert sum(figures(found)["changed"].values()) == 4


# ---------------------------------------------------------------------------------------------------------- resuming


def records(found: Sequence[Chain]) -> str:
    return json.dumps([chain.record() for chain in found])


@pytest.mark.parametrize("fails", [1, 2, 4])
def test_killed_at_any_step_it_asks_for_the_rest_alone(tmp_path: Path, fails: int) -> None:
    whole = Scripted()
    before = records(chains(whole, tmp_path / "whole", settings()))
    killed = Scripted(fails=fails)
    with pytest.raises(RuntimeError):
        chains(killed, tmp_path, settings())
    path = tmp_path / "said.jsonl"
    if path.exists():  # a kill in the middle of a line
        with path.open("a", encoding="utf-8") as file:
            file.write('{"step": "0/1/0", "pla')
    again = Scripted()
    assert records(chains(again, tmp_path, settings())) == before
    assert killed.calls + again.calls == whole.calls
    done = Scripted(fails=1)
    assert records(chains(done, tmp_path, settings())) == before


def test_what_an_ended_step_lacks_is_not_asked_again(tmp_path: Path) -> None:
    chains(Scripted({"ask 2 | ": None}), tmp_path, settings(revisions=1))
    done = Scripted(fails=1)
    assert [chain.why for chain in chains(done, tmp_path, settings(revisions=1))] == [None, None, "missing", None, None]


# --------------------------------------------------------------------------------------------------------- endpoints


def endpoint_writer(server: Server, retries: int = 2) -> EndpointWriter:
    ref = EndpointRef(url=server.url, model="m", key_env="TEST_JUDGE_KEY")
    endpoint = Endpoint(ref, "writer", "prompts have no reply", "c.writer.url", 60, retries, 2, 0.01)
    return EndpointWriter(ref, "c.writer.url", Counting(), endpoint)


def polite(body: Mapping[str, Any]) -> Reply:
    """Depends on all that was asked, the seed too."""
    asked = [message["content"] for message in body["messages"]]
    return chat_reply(f"{len(asked)} turns, {asked[-1]}, {body['seed']}")


def test_a_busy_failing_and_babbling_server_changes_nothing(
    tmp_path: Path, serve: Callable[[Callable[[dict[str, Any], int], Reply]], Server]
) -> None:
    def moody(body: dict[str, Any], number: int) -> Reply:
        if number % 4 == 0:
            return [(429, {"Retry-After": "0"}, "slow down"), (500, {}, "oops"), (200, {}, "<html>")][number // 4 % 3]
        return polite(body)

    calm = records(chains(endpoint_writer(serve(lambda body, _: polite(body))), tmp_path / "a", settings()))
    assert records(chains(endpoint_writer(serve(moody), 9), tmp_path / "b", settings())) == calm


def test_a_server_that_goes_down_loses_nothing_that_came(
    tmp_path: Path, serve: Callable[[Callable[[dict[str, Any], int], Reply]], Server]
) -> None:
    def dies(body: dict[str, Any], number: int) -> Reply:
        return polite(body) if number <= 8 else (503, {}, "gone")

    calm = serve(lambda body, _: polite(body))
    before = records(chains(endpoint_writer(calm), tmp_path / "a", settings()))
    with pytest.raises(UserError, match=r"the writer at .* could not answer .*503: gone.*run the same command again"):
        chains(endpoint_writer(serve(dies), 0), tmp_path / "b", settings())
    kept = [json.loads(line) for line in (tmp_path / "b" / "said.jsonl").read_text().splitlines()]
    assert sum("text" in row for row in kept) == 8  # five replies, and three critiques of a step that was not ended
    back = serve(lambda body, _: polite(body))
    assert records(chains(endpoint_writer(back), tmp_path / "b", settings())) == before
    assert len(back.requests) == len(calm.requests) - 8 == 17


def test_a_request_that_the_server_refuses_ends_one_chain(
    tmp_path: Path, serve: Callable[[Callable[[dict[str, Any], int], Reply]], Server]
) -> None:
    def refuses(body: dict[str, Any], _: int) -> Reply:
        if body["messages"][-1]["content"] == "ask 1":
            return 400, {}, "context length exceeded"
        cut = body["messages"][-1]["content"] == "ask 2"
        choice = {"message": {"content": "half a"}, "finish_reason": "length" if cut else "stop"}
        return 200, {}, json.dumps({"choices": [choice]})

    found = chains(endpoint_writer(serve(refuses)), tmp_path, settings(revisions=1))
    assert [chain.why for chain in found] == [None, "missing", "cut", None, None]


def test_who_writes_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="who writes"):
        settings(model=None)
    with pytest.raises(ValueError, match="who writes"):
        settings(writer={"url": "http://x/v1", "model": "m"})
    stage = settings(model=None, writer={"url": "http://x/v1", "model": "m"})
    assert (stage.needs_model(), stage.samples(), list(stage.loads()), list(stage.references())) == (
        False,
        None,
        [],
        [],
    )
