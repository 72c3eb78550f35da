"""The endpoints' client against servers that speak HTTP badly, and what it must never tell."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from loopback import Reply, Server, chat_reply, raw_server, sends

import keel.endpoint.answer
import keel.endpoint.client
from keel.endpoint import Answer, Endpoint, Question
from keel.recipe.judges import EndpointRef
from keel.types import Message, UserError

KEY = "sk-very-secret"
HELLO = Question([Message("user", "hello")], "answer")


def endpoint(url: str, **settings: Any) -> Endpoint:
    ref = EndpointRef(url=url, model="m", key_env="TEST_JUDGE_KEY")
    return Endpoint(ref, **{"place": "judge.url", "timeout": 5.0, "backoff": 0.01, "retries": 1, **settings})


def answer_of(data: bytes) -> Answer:
    """The answer to one question of a server that sends these bytes."""
    with raw_server([sends(data)]) as (url, _):
        return endpoint(url, retries=0).ask(HELLO, lambda answer: answer)


def problem_of(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        answer_of(data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# ----------------------------------------------------------------------------------------------------- strange answers


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!doctype html><h1>Welcome\nto nginx", "not a chat completion: <!doctype html><h1>Welcome to nginx"),
        (b'{"choices": []}', 'not a chat completion: {"choices": []}'),
        (b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}', "a chat completion without text"),
        (b'{"choices": [{"message": {"content": []}}]}', "a chat completion without text"),
        (b'{"choices": [{"message": {"content": ["text"]}}]}', "not a chat completion"),
        (b'{"choices": [{"message": null}]}', "not a chat completion"),
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"choices": [{"message": {"content": "h\xff"}}]}', "not a chat completion"),
        (b"[" * 100_000, "not a chat completion: [[["),
        (b"", "not a chat completion"),
        (b"x" * 400, "not a chat completion: xxx"),
    ],
)
def test_what_is_no_answer_is_told_in_a_sentence(data: bytes, says: str) -> None:
    message = problem_of(data)
    assert "/v1/chat/completions could not answer: " in message
    assert says in message


def test_an_answer_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "good "}, {"text": "day"}]
    found = answer_of(json.dumps({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}).encode())
    assert found == Answer("good day", "stop")


def test_any_success_is_one_and_half_a_character_may_be_asked(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (201, *chat_reply("hi")[1:]))
    half = Question([Message("user", "\ud83d")], "answer")  # of a pair of surrogates, as a cut text may end
    assert endpoint(server.url).ask(half, lambda answer: answer.text) == "hi"
    assert server.requests[0]["messages"] == [{"role": "user", "content": "\ud83d"}]


def test_an_answer_without_end_and_one_in_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keel.endpoint.answer, "LARGEST_ANSWER", 100_000)
    assert "an answer of more than 100,000 bytes" in problem_of(b"x" * 200_000)
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(3000):  # a minute, then the answer ends
            if gone.wait(0.02):
                return
            connection.sendall(b" ")

    with raw_server([drip]) as (url, _):
        with pytest.raises(UserError, match="timed out, though its bytes kept coming"):
            endpoint(url, retries=0, timeout=0.2).ask(HELLO, lambda answer: answer)
        gone.set()


def test_a_connection_that_breaks_is_tried_again() -> None:
    whole = chat_reply("good day")[2].encode()
    cut = sends(whole[:20], headers=f"Content-Length: {len(whole)}\r\n")
    with raw_server([cut, lambda _: None, sends(b"", head="no http"), sends(whole)]) as (url, requests):
        assert endpoint(url, retries=3).ask(HELLO, lambda answer: answer.text) == "good day"
        assert len(requests) == 4
    with raw_server([cut]) as (url, _), pytest.raises(UserError, match="after 2 tries: no answer: peer closed"):
        endpoint(url).ask(HELLO, lambda answer: answer.text)


def test_retry_after_as_a_date(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout=None: pauses.append(timeout))
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    later = [email.utils.formatdate(1_800_000_000 + seconds, usegmt=True) for seconds in (7, -30, 86_400)]
    ask = keel.endpoint.client.retry_after
    assert [ask(date) for date in later] == [7.0, 0.0, 86_400.0]
    assert [ask(text) for text in (None, "soon", "nan", "inf", "-3", "2.5")] == [None, None, None, None, 0.0, 2.5]
    server = serve(lambda _, n: chat_reply("hi") if n == 4 else (429, {"Retry-After": later[n - 1]}, ""))
    with monkeypatch.context():
        assert endpoint(server.url, retries=3).ask(HELLO, lambda answer: answer.text) == "hi"
    assert [p for p in pauses if p in (7.0, 0.0, 60.0, 86_400.0)] == [7.0, 0.0, 60.0]  # a minute at most


# ------------------------------------------------------------------------------------------------------------ streams


def event(piece: str | None, end: str | None = None) -> bytes:
    choice = {"delta": {} if piece is None else {"content": piece}, "finish_reason": end}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\r\n\r\n"


def streamed(*pieces: bytes, headers: str = "Content-Type: text/event-stream\r\n") -> list[str]:
    """What came of a stream, and the error at its end, if there was one."""
    came: list[str] = []
    with raw_server([sends(*pieces, headers=headers)]) as (url, _):
        try:
            for piece in endpoint(url, retries=0).stream(HELLO):
                came.append(piece)
        except UserError as error:
            came.append(str(error))
    return came


def test_streams_that_end_and_streams_that_break_off() -> None:
    usage = b'data: {"choices": [], "usage": {}}\n\n'
    assert streamed(b": hello\n\n", event("a"), event("\u2028b"), usage, b"data: [DONE]\n\n") == ["a", "\u2028b"]
    assert streamed(event("a"), event(None, "stop")) == ["a"]  # no [DONE], but the answer's own end
    assert streamed(event("a")[:30], event("a")[30:], event("é", "stop")) == ["a", "é"]
    first, error = streamed(event("a"), event("b")[:20])
    assert first == "a"
    assert "could not answer: its stream ended before the answer did" in error
    piece = event("a")
    first, error = streamed(f"{len(piece):x}\r\n".encode() + piece, headers="Transfer-Encoding: chunked\r\n")
    assert first == "a"
    assert "could not answer: no answer: peer closed" in error
    first, error = streamed(event("a"), b'data: {"error": {"message": "overloaded"}}\n\n')
    assert "overloaded" in error
    (error,) = streamed(b"<html>hello</html>")
    assert "its stream ended before the answer did" in error


def test_a_server_that_does_not_stream_answers_all_the_same() -> None:
    assert streamed(chat_reply("good day")[2].encode(), headers="Content-Type: application/json\r\n") == ["good day"]


def test_a_stream_is_tried_again_before_its_first_piece_alone() -> None:
    well, broken = sends(event("a"), event("b", "stop")), sends(event("a"))
    busy = sends(b"later", head="503 Busy")
    with raw_server([busy, well]) as (url, requests):
        assert list(endpoint(url).stream(HELLO)) == ["a", "b"]
        assert len(requests) == 2
    with raw_server([broken, well]) as (url, requests):
        pieces = endpoint(url).stream(HELLO)
        assert next(pieces) == "a"
        with pytest.raises(UserError, match="its stream ended"):
            next(pieces)
        assert len(requests) == 1


# ------------------------------------------------------------------------------------------------- address, key, hosts


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/openai/deployments/m?api-version=2", "/openai/deployments/m/chat/completions?api-version=2"),
    ],
)
def test_addresses(serve: Callable[..., Server], base: str, path: str) -> None:
    server = serve(lambda *_: chat_reply("hi") if "v1" in base else (404, {}, "nothing here"))
    one = endpoint(server.url.removesuffix("/v1") + base)
    if "v1" in base:
        assert one.ask(HELLO, lambda answer: answer.text) == "hi"
    else:
        with pytest.raises(UserError, match=r"404: nothing here; judge\.url is the API's base, mostly https://host/v1"):
            one.ask(HELLO, lambda answer: answer.text)
    assert server.paths == [path]


@pytest.mark.parametrize("url", ["http://host:99999/v1", "http://[::1/v1", "http://host:port/v1", "ftp://host", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(
        UserError, match=r"judge\.url: an endpoint's address starts with http:// or https:// and a host"
    ):
        endpoint(url)


@pytest.mark.parametrize("key", ["sk-very\nX-Other: secret", "sk-very-sécret", "sk-very\0secret"])
def test_a_key_that_is_none(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"TEST_JUDGE_KEY": key})
    with pytest.raises(UserError, match="TEST_JUDGE_KEY holds more than a key") as caught:
        endpoint("http://host/v1")
    assert "sk-very" not in str(caught.value)


def test_a_newline_behind_the_key_is_not_part_of_it(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", f"{KEY}\r\n")
    server = serve(lambda *_: chat_reply("hi"))
    endpoint(server.url).ask(HELLO, lambda answer: answer.text)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(serve: Callable[..., Server], status: int) -> None:
    elsewhere = serve(lambda *_: chat_reply("hi"))
    server = serve(lambda *_: (status, {"Location": elsewhere.url}, ""))
    for ask in (lambda e: e.ask(HELLO, str), lambda e: list(e.stream(HELLO))):
        with pytest.raises(UserError, match=f"status {status}.*set judge.url to the address itself"):
            ask(endpoint(server.url))
    assert not elsewhere.requests


def test_neither_key_nor_query_is_told(serve: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    """Not by errors that the server quotes them in, not by the client's logs, not by a repr."""

    def answer(_: dict[str, Any], number: int) -> Reply:
        return chat_reply("hi") if number == 1 else (500, {}, f"Bearer {KEY} at /v1?key=sk-in-url, key sk-in-url")

    server = serve(answer)
    one = endpoint(server.url + "?key=sk-in-url")
    with caplog.at_level(logging.DEBUG):
        one.ask(HELLO, lambda answer: answer.text)
        with pytest.raises(UserError, match="status 500: Bearer ") as caught:
            one.ask(HELLO, lambda answer: answer.text)
    assert "HTTP Request: POST" in caplog.text
    assert KEY not in repr(vars(one))
    for told in (str(caught.value), caplog.text, repr(one), repr(caught.value.__context__)):
        assert KEY not in told
        assert "sk-in-url" not in told


@pytest.mark.parametrize("proxy", ["socks5://me:word@127.0.0.1:1", "gopher://me:word@127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=r"the environment's proxy .* name the endpoint's host in NO_PROXY") as caught:
        endpoint("http://127.0.0.1/v1")
    assert "word" not in str(caught.value)


def test_the_environments_proxy_is_used(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(lambda *_: chat_reply("hi"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    assert endpoint("http://nowhere.invalid/v1").ask(HELLO, lambda answer: answer.text) == "hi"
    assert proxy.paths == ["http://nowhere.invalid/v1/chat/completions"]
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    with pytest.raises(UserError, match="no answer: "):
        endpoint("http://nowhere.invalid/v1", retries=0).ask(HELLO, lambda answer: answer.text)


@pytest.mark.skipif(which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_nobody_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         key, "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    def over_tls(connection: socket.socket) -> None:
        with context.wrap_socket(connection.dup(), server_side=True) as secure:
            secure.recv(65536)
            secure.recv(65536)
            sends(chat_reply("hi")[2].encode())(secure)

    with raw_server([over_tls], waits=False) as (url, requests):
        url = url.replace("http:", "https:")
        with pytest.raises(UserError, match=r"certificate that this machine does not trust .*SSL_CERT_FILE"):
            endpoint(url, retries=3).ask(HELLO, lambda answer: answer.text)
        assert len(requests) == 1  # it does not pass by waiting
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert endpoint(url, retries=0).ask(HELLO, lambda answer: answer.text) == "hi"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match="SSL_CERT_FILE: the certificates cannot be read"):
        endpoint(url)
