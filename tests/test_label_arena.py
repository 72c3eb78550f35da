"""The arena's models: checkpoints and OpenAI-compatible endpoints, which stream, and whose faults name nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from labelling_world import person
from tiny import save_tiny

from keel.cli.endpoint import endpoint_reply
from keel.cli.finished import trained_models
from keel.cli.label import TOO_LONG, Reply, arena_models
from keel.data.chat import BUILT_IN, install_template
from keel.run import RunDir
from keel.store import Store
from keel.types import Message, UserError
from keel.web.service.arena import FAILED, Arena
from keel.web.service.sources import ArenaModel
from keel.web.service.start import prepare

KEY = "sk-the-key"
HELLO = [Message("system", "Be brief."), Message("user", "hello")]


class Endpoint(BaseHTTPRequestHandler):
    """Answers as its path says; keeps what it was asked. It sends the second piece when ``go`` is set."""

    asked: list[tuple[dict, str | None]]
    go: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((body, self.headers["Authorization"]))
        if self.path.startswith("/broken"):
            self.send_error(500)
            return
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant"}}]})
        self.wfile.write(b": a comment\n\ndata: no json\n\n")
        self._event({"choices": [{"delta": {"content": "Hé"}}]})
        self.go.wait(10)
        self._event({"choices": [{"delta": {"content": "llo"}}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Endpoint.asked, Endpoint.go = [], threading.Event()
    monkeypatch.setenv("THE_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Endpoint.go.set()
        server.shutdown()


def test_an_endpoint_streams_and_gets_the_key_in_its_header(endpoint: str) -> None:
    pieces = endpoint_reply(f"{endpoint}/v1", "tall-model", "THE_KEY", 0.5, 7)(HELLO)
    assert next(pieces) == "Hé"  # before the rest was sent
    Endpoint.go.set()
    assert list(pieces) == ["llo"]
    ((body, key),) = Endpoint.asked
    assert key == f"Bearer {KEY}"
    assert (body["model"], body["stream"], body["temperature"], body["max_tokens"]) == ("tall-model", True, 0.5, 7)
    assert body["messages"] == [{"role": m.role, "content": m.content} for m in HELLO]
    assert KEY not in json.dumps(body)


@pytest.mark.parametrize(("path", "message"), [("broken", "status 500"), ("moved", "status 302")])
def test_an_endpoint_that_fails_says_how_and_the_key_goes_nowhere_else(endpoint: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(endpoint_reply(f"{endpoint}/{path}", "tall-model", "THE_KEY", 0.5, 7)(HELLO))
    with pytest.raises(UserError, match="no answer"):
        list(endpoint_reply("http://127.0.0.1:1/v1", "tall-model", "THE_KEY", 0.5, 7)(HELLO))
    with pytest.raises(UserError, match="leave user:password@ out"):
        endpoint_reply("http://me:secret@host/v1", "tall-model", "THE_KEY", 0.5, 7)


def checkpoint(folder: Path, seed: int) -> str:
    save_tiny(folder, seed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    install_template(tokenizer, next(iter(BUILT_IN)))
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_whatever_goes_wrong_with_a_model_nothing_names_it(endpoint: str, tmp_path: Path) -> None:
    Endpoint.go.set()
    here, gone = checkpoint(tmp_path / "small-one", 1), checkpoint(tmp_path / "lost-one", 2)
    named = [here, gone, f"tall-model@{endpoint}/broken"]
    models = {name: ArenaModel(name, reply) for name, reply in arena_models(None, named, "THE_KEY").items()}
    assert list(models) == [here, gone, "tall-model"]
    (Path(gone) / "model.safetensors").unlink()
    with Store(tmp_path / "feedback.db") as store:
        prepare(store)
        who = person(store, "ann")
        said: dict[str, str] = {}
        for left, right in ((here, gone), (here, "tall-model")):
            place = Arena(store, [models[left], models[right]])
            id = place.start(who)
            for message in ("hello", "many words " * 200):  # more than the model can hold
                for _, piece in place.say(who, id, message):
                    assert "small-one" not in piece
                    assert "lost-one" not in piece
                    assert "tall-model" not in piece
            found = place.current(who)
            assert found is not None
            names = place.vote(who, id, "tie", f"a token for {right}", None).names
            assert names is not None
            for side, name in enumerate(names):
                said[name] = (found.turns[-1].left, found.turns[-1].right)[side] or ""
    assert said == {here: TOO_LONG, gone: FAILED, "tall-model": FAILED}


def test_models_that_are_loaded_at_once_all_answer(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"model-{n}", n) for n in range(4)]
    start = threading.Barrier(len(paths))
    said: list[str] = []

    def talk(reply: Reply) -> None:
        start.wait()
        said.append("".join(reply([Message("user", "hello")])))

    threads = [threading.Thread(target=talk, args=(r,)) for r in arena_models(None, paths, "THE_KEY").values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == len(paths)


def test_what_a_run_has_trained_can_be_talked_to_grpo_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    recipe = yaml.safe_load(Path(__file__).parents[1].joinpath("recipes/grpo.yaml").read_text())
    recipe["stages"].insert(0, {"kind": "sft", "name": "sft"})
    run.manifest.update({"recipe": recipe})
    for name in ("sft", "grpo"):
        run.stage(name).begin("f")
        run.stage(name).finish({})
    assert list(trained_models(str(tmp_path))) == ["sft", "grpo"]
    assert list(arena_models(str(tmp_path), (), "THE_KEY")) == ["sft", "grpo"]
