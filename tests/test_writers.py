"""Writers and comparers: a model sampled here, an endpoint, a reward model, simulated people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Reply, Server, chat_reply
from tiny import Counting, prompt, tiny_llama, tiny_tokenizer

from keel.data.chat import Chat
from keel.endpoint import Endpoint
from keel.feedback.compare import EndpointComparer, ScorerComparer, SimulatedComparer
from keel.feedback.opinion import Opinion
from keel.feedback.simulated import SimulatedAnnotator, label
from keel.recipe.judges import EndpointRef
from keel.recipe.sections import SamplingConfig
from keel.rollout.hf import TransformersSampler
from keel.rollout.tokens import stream_key
from keel.rollout.writer import EndpointWriter, SamplerWriter
from keel.store import Store
from keel.types import Completion, Prompt, Scores, UserError

PROMPTS = [prompt(n) for n in range(3)]
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=6, stop=["salt"])


def quick(ref: EndpointRef) -> Endpoint:
    return Endpoint(ref, "helper", "questions have no answer", timeout=60, retries=0, backoff=0.01)


def ref_of(server: Server, instructions: str | None = None) -> EndpointRef:
    return EndpointRef(url=server.url, model="m", key_env="TEST_JUDGE_KEY", instructions=instructions)


# ------------------------------------------------------------------------------------------------------------- writers


def test_a_sampler_writes_what_sampling_by_hand_gives() -> None:
    chat = Chat(tiny_tokenizer())
    model = tiny_llama().eval()
    sampler = TransformersSampler(model, chat.stop_ids, "fp32")
    greedy = SamplingConfig(temperature=0, max_new_tokens=5)
    replies = SamplerWriter(sampler, chat, Counting()).write(PROMPTS, greedy, seed=3)
    for one, reply in zip(PROMPTS, replies, strict=True):
        ids = list(chat.tokenizer.encode(one.messages[-1].content + "\n"))
        start = len(ids)
        while len(ids) - start < 5 and (len(ids) == start or ids[-1] not in chat.stop_ids):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        finished = ids[-1] in chat.stop_ids
        assert reply is not None
        assert reply.finished == finished
        assert reply.text == chat.tokenizer.decode(ids[start : len(ids) - finished])
    drawn = SamplerWriter(sampler, chat, Counting()).write([PROMPTS[0]] * 2, SAMPLING, seed=3)
    by_hand = sampler.generate([chat.encode_prompt(PROMPTS[0].messages)] * 2, SAMPLING, stream_key(3, 0))
    assert [c and c.ids for c in drawn] == [c.ids for c in by_hand]


def test_an_endpoint_writes_with_the_samplings_settings(serve: Callable[..., Server]) -> None:
    ends = {0: "stop", 1: "length", 2: "content_filter"}

    def answer(body: dict[str, Any], _: int) -> Reply:
        text = body["messages"][-1]["content"]
        choice = {"message": {"content": f"<think>A or\nB?</think>\n\non {text}"}, "finish_reason": ends[int(text[-1])]}
        return 200, {}, json.dumps({"choices": [choice]})

    server, reporter = serve(answer), Counting()
    ref = ref_of(server, "Be brief.")
    replies = EndpointWriter(ref, "critic.url", reporter, quick(ref)).write(PROMPTS, SAMPLING, seed=5)
    assert replies == [Completion("on " + p.messages[0].content, finished=n == 0) for n, p in enumerate(PROMPTS)]
    assert (reporter.started, reporter.steps) == ([("writing", 3)], 3)
    asked = {body["messages"][-1]["content"]: body for body in server.requests}
    seeds = [asked[p.messages[0].content].pop("seed") for p in PROMPTS]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    body = asked[PROMPTS[0].messages[0].content]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in body if name not in ("messages", "model")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 6,
        "stop": ["salt"],
    }


def test_a_setting_that_matters_is_not_dropped_in_silence(serve: Callable[..., Server]) -> None:
    """A server that takes neither seed nor temperature nor max_tokens, as reasoning models do."""

    def answer(body: dict[str, Any], _: int) -> Reply:
        for name, says in [("max_tokens", "use 'max_completion_tokens'"), ("seed", ""), ("temperature", "")]:
            if name in body:
                return 400, {}, f"'{name}' is not supported: {says}"
        return chat_reply(f"{body['max_completion_tokens']} {sorted(body)}")

    server = serve(answer)
    ref = ref_of(server)
    writer = EndpointWriter(ref, "critic.url", Counting(), quick(ref))
    replies = writer.write(PROMPTS, SamplingConfig(max_new_tokens=9), seed=1)
    assert [reply and reply.text for reply in replies] == ["9 ['max_completion_tokens', 'messages', 'model']"] * 3
    with pytest.raises(UserError, match=r"could not answer 'prompt p0': status 400: 'temperature' is not supported"):
        writer.write(PROMPTS, SAMPLING, seed=1)


# ----------------------------------------------------------------------------------------------------------- comparers


def test_a_simulated_comparer_says_what_the_queue_was_told(tmp_path: Path) -> None:
    def utility(prompt: Prompt, text: str) -> float:
        return float(len(text))

    annotator = SimulatedAnnotator("ann", utility, temperature=2.0, lapse=0.2, tie_width=0.5)
    with Store(tmp_path / "a.db") as store:
        store.add_prompts(PROMPTS)
        for n, one in enumerate(PROMPTS):
            first, second = store.add_responses(one.id, [Completion("x" * 9), Completion("x" * (9 + n) + ".")], "m")
            store.add_comparisons([(first, second)])
        label(store, [annotator], 4, "1", Counting())
        votes = store.judgements()
    assert len(votes) == 3
    told = [(v.choice, v.strength, v.seconds) for v in votes]
    opinions = SimulatedComparer(annotator, 4).compare(
        [next(p for p in PROMPTS if p.id == v.left.prompt_id) for v in votes],
        [v.left.completion() for v in votes],
        [v.right.completion() for v in votes],
    )
    assert [o and (o.choice, o.strength, o.seconds) for o in opinions] == told


class Lengths:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        assert len(prompts) == len(completions)
        return Scores(torch.tensor([float(len(c.text)) for c in completions]))


def test_a_reward_models_opinion_is_bradley_terrys() -> None:
    left, right = [Completion(t) for t in ("aaa", "b", "cc")], [Completion(t) for t in ("a", "bb", "dd")]
    opinions = ScorerComparer(Lengths(), temperature=2.0).compare(PROMPTS, left, right)
    assert [o and o.choice for o in opinions] == ["left", "right", "tie"]
    # sigmoid(2 / 2) = 0.7310586, sigmoid(-1 / 2) = 0.3775407
    assert [o and o.probability for o in opinions] == pytest.approx([0.7310586, 0.3775407, 0.5])


def compared(server: Server, left: str, right: str) -> Opinion | None:
    ref = ref_of(server)
    (opinion,) = EndpointComparer(ref, "annotators.url", Counting(), quick(ref)).compare(
        PROMPTS[:1], [Completion(left)], [Completion(right)]
    )
    return opinion


@pytest.mark.parametrize("text", ["{}", "Answer: {}", "**{}**", '{{"choice": "{}"}}', "<think>A? B!</think>\n{}."])
def test_an_endpoint_that_answers_letters(serve: Callable[..., Server], text: str) -> None:
    """It takes the longer reply, in whichever place; one that always says A has said nothing."""

    def longer(body: dict[str, Any], _: int) -> Reply:
        pair = json.loads(body["messages"][-1]["content"])
        return chat_reply(text.format("A" if len(pair["A"]) > len(pair["B"]) else "B"))

    server = serve(longer)
    assert compared(server, "long", "s") == Opinion("left", probability=1.0, orders=(1.0, 1.0))
    assert compared(server, "s", "long") == Opinion("right", probability=0.0, orders=(0.0, 0.0))
    stubborn = compared(serve(lambda *_: chat_reply(text.format("A"))), "s", "long")
    assert stubborn == Opinion("tie", probability=0.5, orders=(1.0, 0.0))
    assert stubborn.flipped


def test_an_endpoint_with_log_probabilities(serve: Callable[..., Server]) -> None:
    """Left first: P(A) = .6 + .2 and P(B) = .1, so .8 / .9. Left second: P(A) = .3, P(B) = .1, so .1 / .4 for left."""
    tables = {"x": {"A": 0.6, " A": 0.2, "B": 0.1, "C": 0.1}, "y": {"A": 0.3, "B\n": 0.1, "The": 0.6}}

    def answer(body: dict[str, Any], _: int) -> Reply:
        assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
        table = tables[json.loads(body["messages"][-1]["content"])["A"]]
        top = [{"token": t, "logprob": math.log(p)} for t, p in table.items()]
        tokens = [{"token": "A", "logprob": 0.0, "top_logprobs": []}, {"token": ":\n", "logprob": -1.0}]
        tokens += [{"token": "A", "logprob": top[0]["logprob"], "top_logprobs": top}]
        choice = {"message": {"content": "A:\nA"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        return 200, {}, json.dumps({"choices": [choice]})

    opinion = compared(serve(answer), "x", "y")
    assert opinion is not None
    assert opinion.orders == pytest.approx((8 / 9, 1 / 4))
    assert opinion.probability == pytest.approx((8 / 9 + 1 / 4) / 2)
    assert (opinion.choice, opinion.flipped, opinion.reason) == ("left", True, "A:")


def test_an_endpoint_without_log_probabilities_and_one_that_will_not_say(serve: Callable[..., Server]) -> None:
    refuses = serve(lambda body, _: chat_reply("A") if "logprobs" not in body else (400, {}, "logprobs: not available"))
    assert compared(refuses, "x", "y") == Opinion("tie", probability=0.5, orders=(1.0, 0.0))
    unsure = serve(lambda body, _: chat_reply("A better reply would" if '"r3"' in str(body) else "B"))
    cut = {"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]}  # the first word of many, perhaps
    with pytest.raises(UserError, match="instead of A or B"):
        compared(serve(lambda *_: (200, {}, json.dumps(cut))), "x", "y")
    ref = ref_of(unsure)
    prompts, pairs = [prompt(n) for n in range(10)], [Completion(f"r{n}") for n in range(10)]
    comparer = EndpointComparer(ref, "annotators.url", Counting(), quick(ref))
    assert [o is None for o in comparer.compare(prompts, pairs, [Completion("z")] * 10)] == [n == 3 for n in range(10)]
    with pytest.raises(UserError, match=r"the helper at .* instead of A or B.*\(1 of 2 questions have no answer"):
        compared(unsure, "r3", "z")
