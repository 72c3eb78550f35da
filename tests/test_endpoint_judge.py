"""The judge behind an OpenAI-compatible endpoint, against a server on the loopback that misbehaves in every way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from loopback import Reply, Server, chat_reply
from tiny import Counting, prompt

from keel.recipe.judges import EndpointRef
from keel.reward.judge import EndpointJudge
from keel.types import Completion, Grade, Message, Prompt, UserError

PROMPTS = [prompt(n) for n in range(7)]
REPLIES = [Completion("good day captain " * n) for n in range(7)]


def judge(url: str, instructions: str | None = None, **settings: Any) -> EndpointJudge:
    ref = EndpointRef(url=url, model="grader-1", key_env="TEST_JUDGE_KEY", instructions=instructions)
    return EndpointJudge(ref, **{"timeout": 60.0, "backoff": 0.01, "retries": 2, **settings})


def material(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(body["messages"][-1]["content"])  # type: ignore[no-any-return]


def test_endpoint_grades_in_order_and_concurrently(serve: Callable[..., Server]) -> None:
    barrier = threading.Barrier(3, timeout=60)

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number <= 3:
            barrier.wait()  # passes only if three requests are under way together
        return chat_reply(json.dumps({"score": 1 + len(material(body)["reply"]) / 17}))

    server, reporter = serve(answer), Counting()
    grades = judge(server.url, concurrency=3, reporter=reporter).grade(PROMPTS, REPLIES)
    assert [g.score for g in grades] == [1 + n for n in range(7)]
    assert server.most_together == 3
    assert (reporter.started, reporter.steps) == ([("judging", 7)], 7)


def test_endpoint_request_is_what_openai_takes(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: chat_reply('{"score": 5}'))
    secret = Prompt("p", (Message("system", "Be kind."), Message("user", 'Say "hi" }')), meta={"answer": "gold"})
    judge(server.url, instructions="Grade it.").grade([secret], [Completion("hi")])
    body = server.requests[0]
    assert body["model"] == "grader-1"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == "Grade it."
    assert material(body) == {
        "conversation": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'Say "hi" }'}],
        "reply": "hi",
    }
    assert "gold" not in json.dumps(body)  # a prompt's meta never reaches a model
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very" not in json.dumps(body)
    assert server.paths == ["/v1/chat/completions"]
    judge(server.url + "/chat/completions").grade([secret], [Completion("hi")])
    assert server.paths[1] == "/v1/chat/completions"
    assert "score" in server.requests[1]["messages"][0]["content"]


def test_endpoint_without_key_sends_none(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_KEY")
    server = serve(lambda *_: chat_reply('{"score": 5}'))
    judge(server.url).grade(PROMPTS[:1], REPLIES[:1])
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7.0),
        ('```json\n{"score": 7.5}\n```', 7.5),
        ('The form {"x": 1} aside, {"score": 2} at first, but: {"reason": "a } b", "score": 9}', 9.0),
        ('{"score": 8, "parts": {"truth": 1}}', 8.0),
    ],
)
def test_endpoint_reads_a_score(serve: Callable[..., Server], text: str, score: float) -> None:
    server = serve(lambda *_: chat_reply(text))
    assert judge(server.url).grade(PROMPTS[:1], REPLIES[:1]) == [Grade(score)]


@pytest.mark.parametrize(
    "text",
    ["eight", '{"score": 11}', '{"score": 0}', '{"score": true}', '{"score": "8"}', '{"score": NaN}', "{}", None],
)
def test_endpoint_asks_again_for_a_readable_score(serve: Callable[..., Server], text: str | None) -> None:
    server = serve(lambda _, number: chat_reply(text if number == 1 else '{"score": 4}'))
    assert judge(server.url).grade(PROMPTS[:1], REPLIES[:1]) == [Grade(4.0)]
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_endpoint_tries_again_while_the_server_is_busy(serve: Callable[..., Server], status: int) -> None:
    server = serve(lambda _, number: chat_reply('{"score": 3}') if number == 3 else (status, {}, "busy"))
    assert judge(server.url).grade(PROMPTS[:1], REPLIES[:1]) == [Grade(3.0)]
    assert len(server.requests) == 3


def test_endpoint_waits_as_long_as_the_server_asks(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float | None] = []
    monkeypatch.setattr(threading.Event, "wait", _recording(threading.Event.wait, pauses))
    answers: Sequence[Reply] = [(429, {"Retry-After": "0.125"}, ""), (503, {}, ""), (429, {"Retry-After": "soon"}, "")]
    server = serve(lambda _, number: answers[number - 1] if number <= 3 else chat_reply('{"score": 3}'))
    judge(server.url, backoff=0.03125, retries=3).grade(PROMPTS[:1], REPLIES[:1])
    # Asked for; then its own pauses, which have doubled meanwhile.
    assert [p for p in pauses if p in (0.125, 0.03125, 0.0625)] == [0.125, 0.0625, 0.125]


def _recording(wait: Callable[..., bool], pauses: list[float | None]) -> Callable[..., bool]:
    def recorded(self: threading.Event, timeout: float | None = None) -> bool:
        pauses.append(timeout)
        return wait(self, timeout)

    return recorded


def test_endpoint_gives_up_with_the_address_and_status(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (503, {}, "the key sk-very-secret is\nover its limit"))
    with pytest.raises(UserError) as caught:
        judge(server.url + "?key=sk-in-url").grade(PROMPTS[:1], REPLIES[:1])
    message = str(caught.value)
    assert "/v1/chat/completions could not grade prompt 'p0': after 3 tries: status 503" in message
    assert message.endswith("; look after it, or set another judge, and run the same command again")
    assert "the key *** is over its limit" in message
    assert "sk-" not in message
    assert "\n" not in message
    assert server.paths == ["/v1/chat/completions?key=sk-in-url"] * 3


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "status 401.*set the environment variable TEST_JUDGE_KEY"), (404, "status 404"), (302, "302")],
)
def test_endpoint_does_not_repeat_what_cannot_work(serve: Callable[..., Server], status: int, says: str) -> None:
    """A redirect is refused too: it would carry the key to another host."""
    elsewhere = serve(lambda *_: chat_reply('{"score": 3}'))
    server = serve(lambda *_: (status, {"Location": elsewhere.url}, "no"))
    with pytest.raises(UserError, match=says) as caught:
        judge(server.url, concurrency=1).grade(PROMPTS, REPLIES)
    assert len(server.requests) <= 2  # the failure, and at most one that had been begun
    assert not elsewhere.requests
    assert "sk-very" not in str(caught.value)


def test_endpoint_that_hangs_or_is_not_there(serve: Callable[..., Server]) -> None:
    release = threading.Event()

    def hang(*_: Any) -> Reply:
        release.wait(5)
        return 500, {}, ""

    server = serve(hang)
    try:
        with pytest.raises(UserError, match="after 2 tries: no answer: timed out"):
            judge(server.url, timeout=0.1, retries=1).grade(PROMPTS[:1], REPLIES[:1])
    finally:
        release.set()
    server.close()
    with pytest.raises(UserError, match=r"no answer: .*refused"):
        judge(server.url, retries=0).grade(PROMPTS[:1], REPLIES[:1])


def test_endpoint_that_is_no_chat_server(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (200, {}, "<html>welcome</html>"))
    with pytest.raises(UserError, match="not a chat completion: <html>welcome"):
        judge(server.url, retries=0).grade(PROMPTS[:1], REPLIES[:1])


@pytest.mark.parametrize("url", ["file:///etc/passwd", "api.example.org/v1", "http://"])
def test_endpoint_address_must_be_http(url: str) -> None:
    with pytest.raises(UserError, match="http:// or https://"):
        judge(url)
    with pytest.raises(UserError, match="leave user:password@ out") as caught:
        judge("https://me:word@host/v1")
    assert "me:word" not in str(caught.value)


def test_the_key_is_not_in_the_judges_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-very-secret")
    assert "sk-very" not in repr(judge("http://localhost/v1"))


# ------------------------------------------------------------------------------- grades that are missing, and kept ones


def test_a_model_that_takes_no_temperature_is_asked_without(serve: Callable[..., Server]) -> None:
    says = '{"error": {"message": "Unsupported value: \'temperature\' does not support 0 with this model."}}'
    server = serve(lambda body, _: (400, {}, says) if "temperature" in body else chat_reply('{"score": 5}'))
    one = judge(server.url, concurrency=1)
    assert one.grade(PROMPTS, REPLIES) == [Grade(5.0)] * 7
    assert one.grade(PROMPTS[:1], [Completion("another")]) == [Grade(5.0)]
    assert ["temperature" in body for body in server.requests] == [True] + [False] * 8  # refused once


def test_an_unreadable_grade_costs_that_grade(serve: Callable[..., Server]) -> None:
    """Of ten replies one is refused by the server and one never graded readably: eight grades, two missing."""

    def answer(body: dict[str, Any], _: int) -> Reply:
        reply = material(body)["reply"]
        if reply == "r3":
            return 400, {}, '{"error": {"code": "content_filter"}}'
        return chat_reply("I would rather not." if reply == "r7" else '{"score": 6}')

    server = serve(answer)
    told: list[str] = []
    reporter = Counting()
    reporter.note = told.append  # type: ignore[method-assign]
    prompts, replies = [prompt(n) for n in range(10)], [Completion(f"r{n}") for n in range(10)]
    grades = judge(server.url, reporter=reporter).grade(prompts, replies)
    assert grades == [None if n in (3, 7) else Grade(6.0) for n in range(10)]
    assert len(told) == 1
    assert told[0].startswith("2 of 10 replies have no grade: the judge could not grade prompt 'p3': status 400")
    with pytest.raises(UserError, match=r"could not grade prompt 'p3'.*\(2 of 9 replies have no grade, and 20% may"):
        judge(server.url, concurrency=1).grade(prompts[:9], replies[:9])


@pytest.mark.parametrize(
    ("text", "end", "score"),
    [
        ('<think>perhaps {"score": 2}, no</think>\n{"score": 8}', "stop", 8.0),
        ('<think>perhaps {"score": 2}</think> I cannot say', "stop", None),
        ('<think>perhaps {"score": 2} or', "length", None),
        ('{"score": 9}', "length", 9.0),
        ('{"sco', "length", None),
    ],
)
def test_thoughts_are_no_grade(serve: Callable[..., Server], text: str, end: str, score: float | None) -> None:
    body = {"choices": [{"message": {"content": text}, "finish_reason": end}]}
    server = serve(lambda *_: (200, {}, json.dumps(body)))
    if score is not None:
        assert judge(server.url).grade(PROMPTS[:1], REPLIES[:1]) == [Grade(score)]
        return
    says = "cut at its length limit" if end == "length" else "instead of"
    with pytest.raises(UserError, match=says):
        judge(server.url, retries=0).grade(PROMPTS[:1], REPLIES[:1])


def test_grades_so_far_are_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    """A server that dies after four grades; half a line of a killed process; a second run asks what is missing."""
    file = tmp_path / "grades.jsonl"
    dying = serve(lambda _, number: chat_reply('{"score": 4}') if number <= 4 else (503, {}, "gone"))
    with pytest.raises(UserError, match="status 503"):
        judge(dying.url, concurrency=1, retries=0, kept=file).grade(PROMPTS, REPLIES)
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as half:
        half.write('{"key": "abc", "sco')
    dying.requests.clear()
    again = judge(dying.url, concurrency=1, kept=file)
    assert again.grade(PROMPTS[:4], REPLIES[:4]) == [Grade(4.0)] * 4
    assert again.grade([PROMPTS[1]] * 2, [REPLIES[1]] * 2) == [Grade(4.0)] * 2
    assert not dying.requests
    well = serve(lambda *_: chat_reply('{"score": 7}'))
    assert judge(well.url, kept=file).grade(PROMPTS[:1], REPLIES[:1]) == [Grade(7.0)]  # another server's own grade
    assert judge(well.url, kept=file, instructions="Be strict.").grade(PROMPTS[:1], REPLIES[:1]) == [Grade(7.0)]
    assert len(well.requests) == 2
    assert sum("score" in json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")) == 6


def test_the_same_reply_is_asked_for_once(serve: Callable[..., Server]) -> None:
    server = serve(lambda _, number: chat_reply(json.dumps({"score": number})))
    one = judge(server.url)
    assert one.grade([PROMPTS[0]] * 3, [REPLIES[1]] * 3) == [Grade(1.0)] * 3
    assert one.grade(PROMPTS[:1], REPLIES[1:2]) == [Grade(1.0)]
    assert len(server.requests) == 1
