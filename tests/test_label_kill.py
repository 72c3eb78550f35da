"""The server is killed with SIGKILL while many judge: nothing that it acknowledged is lost, nothing is given twice."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from labelling_world import fill, person

from keel.store import Store
from keel.web.app.security import COOKIE
from keel.web.service.people import People
from keel.web.service.start import prepare

SERVER = """
import sys
from keel.store import Store
from keel.web.server import serve
from keel.web.service.sources import Sources
serve(Store(sys.argv[1]), "127.0.0.1", 0, Sources(), lambda line: print(line, flush=True))
"""
PEOPLE = 8


def serve(url: str) -> tuple[subprocess.Popen[str], int]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SERVER, url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    found = re.search(r":(\d+)", process.stdout.readline())
    assert found is not None
    return process, int(found.group(1))


def post(connection: http.client.HTTPConnection, path: str, body: dict, headers: dict[str, str]) -> dict:
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    said = json.loads(answer.read())
    assert answer.status == 200, said
    return dict(said)


def test_a_server_killed_under_load_loses_nothing_that_it_acknowledged(new_url: Callable[[], str]) -> None:
    url = new_url()
    with Store(url) as store:
        items = fill(store, 30, overlap=2)
        prepare(store)
        door = People(store)
        headers = {}
        for number in range(PEOPLE):
            cookie = door.start_session(person(store, f"person {number}"))
            session = door.session(cookie)
            assert session is not None
            sent = {"Cookie": f"{COOKIE}={cookie}", "X-CSRF": session.csrf, "Content-Type": "application/json"}
            headers[number] = sent
        acknowledged: list[str] = []

        def judge(port: int, number: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                while (item := post(connection, "/api/next", {"kind": "compare"}, headers[number])["item"]) is not None:
                    body = {"assignment": item["id"], "token": uuid.uuid4().hex, "choice": "left"}
                    post(connection, "/api/judge", body, headers[number])
                    acknowledged.append(body["token"])
            except (OSError, http.client.HTTPException, ValueError):
                pass  # the server is gone

        def all_judge(port: int) -> list[threading.Thread]:
            threads = [threading.Thread(target=judge, args=(port, number)) for number in range(PEOPLE)]
            for thread in threads:
                thread.start()
            return threads

        process, port = serve(url)
        threads = all_judge(port)
        while len(acknowledged) < 15 and any(thread.is_alive() for thread in threads):
            threads[0].join(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for thread in threads:
            thread.join()
        votes = store.judgements()
        assert 15 <= len(acknowledged) < 60
        assert {vote.token for vote in votes} >= set(acknowledged)
        assert len(votes) - len(acknowledged) <= PEOPLE  # those that were just being acknowledged

        process, port = serve(url)  # and the work goes on
        for thread in all_judge(port):
            thread.join()
        process.terminate()
        process.wait()
        votes = store.judgements()
        assert {vote.token for vote in votes} >= set(acknowledged)
        assert Counter(vote.item_id for vote in votes) == dict.fromkeys(items, 2)
        assert len({(vote.item_id, vote.annotator) for vote in votes}) == len(votes)
        assert Counter(event.action for event in store.events())["judged"] == len(votes)
