"""How the labelling app holds up: N simulated labelers at once, each with a think time, on SQLite and PostgreSQL.

    python bench/label_load.py --people 200 --items 4000 --seconds 60 [--db postgresql://...] [--think 5]

Prints one JSON object: requests, errors, server time (from a request's last byte read to its response's last byte
handed over, measured in the server) and the clients' own waiting time at the 50th, 95th and 99th percentile, votes
acknowledged, votes found in the store, items judged by more people than wanted, items judged twice by one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from keel.store import Store, people
from keel.types import Completion, Message, Prompt
from keel.web.app.security import COOKIE
from keel.web.service.people import People
from keel.web.service.start import prepare

# Runs the app as `keel label` does, with a clock around each request.
SERVER = """
import json, signal, socket, sys, time

sys.setswitchinterval(0.001)  # as the app's own server does
import uvicorn
from keel.store import Store
from keel.web.app.create import create_app

times = []
app = create_app(Store(sys.argv[1]))

async def timed(scope, receive, send):
    if scope["type"] != "http":
        return await app(scope, receive, send)
    start = time.perf_counter()
    await app(scope, receive, send)
    times.append((scope["path"], time.perf_counter() - start))

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(2048)
print(listener.getsockname()[1], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once it has stopped
try:
    config = uvicorn.Config(timed, log_level="warning", access_log=False, timeout_keep_alive=600)
    uvicorn.Server(config).run(sockets=[listener])
finally:
    json.dump(times, open(sys.argv[2], "w"))
"""


class Tally:
    def __init__(self) -> None:
        self.errors: list[str] = []
        self.waits: list[float] = []
        self.acknowledged: list[str] = []


async def post(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    path: str,
    body: dict[str, Any],
    headers: str,
    tally: Tally,
) -> dict[str, Any]:
    reader, writer = streams
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    start = time.perf_counter()
    writer.write(head.encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(answer.split("content-length:")[1].split("\r\n")[0])
    said = json.loads(await reader.readexactly(length))
    tally.waits.append(time.perf_counter() - start)
    status = int(answer.split()[1])
    if status != 200:
        tally.errors.append(f"{path}: {status} {said}")
    return dict(said)


async def labeler(port: int, headers: str, until: float, think: float, rng: random.Random, tally: Tally) -> None:
    await asyncio.sleep(rng.random() * think)  # they do not all sit down in the same second
    streams = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        item = (await post(streams, "/api/next", {"kind": "compare"}, headers, tally)).get("item")
        if item is None:
            break
        await asyncio.sleep(rng.expovariate(1 / think))
        body = {"assignment": item["id"], "token": uuid.uuid4().hex, "choice": rng.choice(["left", "right", "tie"])}
        if "progress" in await post(streams, "/api/judge", body, headers, tally):
            tally.acknowledged.append(body["token"])
    streams[1].close()


def fill(store: Store, items: int, overlap: int) -> None:
    with store.session() as session:
        pairs = []
        for i in range(items):
            session.add_prompts([Prompt(f"p{i}", (Message("user", f"Question {i}? " + "and so on " * 20),))])
            replies = [Completion(f"Reply {j} to {i}. " + "It goes **on** and on. " * 20) for j in range(2)]
            first, second = session.add_responses(f"p{i}", replies, "model")
            pairs.append((first, second))
        session.add_comparisons(pairs, overlap, "load")


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{q}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 95, 99)}


def run(db: str, crowd: int, items: int, overlap: int, seconds: float, think: float) -> dict[str, Any]:
    with Store(db) as store, tempfile.TemporaryDirectory() as folder:
        fill(store, items, overlap)
        prepare(store)
        door = People(store)
        headers = []
        for number in range(crowd):
            with store.transaction(writes=True) as connection:
                account = people.add_account(connection, f"labeler {number}", "annotator", None, "bench", store.now)
            cookie = door.start_session(account)
            session = door.session(cookie)
            assert session is not None
            headers.append(f"Cookie: {COOKIE}={cookie}\r\nX-CSRF: {session.csrf}\r\nContent-Type: application/json\r\n")
        times = Path(folder) / "times.json"
        server = subprocess.Popen([sys.executable, "-c", SERVER, db, str(times)], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        time.sleep(2)
        tally = Tally()

        async def all_of_them() -> None:
            until = time.monotonic() + seconds
            jobs = [labeler(port, h, until, think, random.Random(i), tally) for i, h in enumerate(headers)]
            results = await asyncio.gather(*jobs, return_exceptions=True)
            tally.errors += [repr(result) for result in results if result is not None]

        asyncio.run(all_of_them())
        server.terminate()
        server.wait(30)
        votes = store.judgements()
        per_item = Counter(vote.item_id for vote in votes)
        twice = len(votes) - len({(vote.item_id, vote.annotator) for vote in votes})
        kept = {vote.token for vote in votes}
        return {
            "database": db.split(":")[0] if "://" in db else "sqlite",
            "people": crowd,
            "think_seconds": think,
            "requests": len(tally.waits),
            "requests_per_second": round(len(tally.waits) / seconds, 1),
            "errors": len(tally.errors),
            "first_errors": tally.errors[:3],
            "server": percentiles([spent for _, spent in json.loads(times.read_text())]),
            "client": percentiles(tally.waits),
            "acknowledged": len(tally.acknowledged),
            "lost": len(set(tally.acknowledged) - kept),
            "over_the_overlap": sum(count > overlap for count in per_item.values()),
            "judged_twice_by_one": twice,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", default=None, help="default: a new SQLite file")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--overlap", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=5.0, help="mean seconds between an item and its vote")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        db = given.db or f"sqlite:///{folder}/load.db"
        print(json.dumps(run(db, given.people, given.items, given.overlap, given.seconds, given.think), indent=1))


if __name__ == "__main__":
    main()
