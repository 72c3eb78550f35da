"""What a large store costs the labelling app: its pages, exports, leases and votes.

    python -m bench labelling-scale --prompts 200000 --votes-each 5 [--db postgresql://...] [--people 40]

Fills an empty database by bulk inserts straight into the tables (two responses and one comparison a prompt), serves it
as a process of its own, and prints one JSON object: for each page and export the seconds of the first and the second
view, the bytes and how far the server's memory rose; how long a lease and a vote take in the store; and what people
who label wait while nobody looks at these pages, and while somebody does all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, text

from bench.label_load import SERVER, Tally, labeler, percentiles
from keel.store import NewVote, Store, people
from keel.store.engine import open_engine
from keel.store.tables import (
    annotators,
    assignments,
    event,
    events,
    item_responses,
    items,
    judgements,
    prompts,
    responses,
)
from keel.web.app.security import COOKIE
from keel.web.service.labelling import Labelling
from keel.web.service.people import People
from keel.web.service.start import prepare

CROWD = 200  # who gave the votes that are there
DAYS = 60
COUNTED = "keel.store.migrations.versions.v0013_tallies"  # counts what is in the tables
PAGES = (
    "", "/quality", "/quality?who=all", "/disagreements", "/flags", "/prompts", "/queue", "/gold", "/people",
    "/events", "/training", "/models", "/export", "/arena",
)  # fmt: skip
EXPORTS = ("pairs.jsonl", "votes.jsonl", "votes.parquet", "events.jsonl", "whole.jsonl")
_CHUNK = 5_000  # rows of one statement


# ------------------------------------------------------------------------------------------------------------- filling


def fill(location: str, count: int, votes_each: int) -> None:
    """``count`` prompts, each with a comparison that ``votes_each`` people judged. The last tenth of the comparisons
    has three free slots; one person has judged the first half of these."""
    with Store(location) as store:
        prepare(store)
    engine = open_engine(location)
    start = datetime.now(UTC) - timedelta(days=DAYS)
    with engine.connect().execution_options(keel_writes=True) as connection, connection.begin():
        crowd = [
            {"id": 1000 + n, "name": f"crowd {n}", "kind": "person", "role": "annotator", "created": start}
            for n in range(CROWD)
        ]
        connection.execute(insert(annotators), crowd)
        for first in range(0, count, _CHUNK):
            _chunk(connection, range(first, min(count, first + _CHUNK)), count, votes_each, start)
        if connection.dialect.name == "postgresql":
            for table in (annotators, responses, items, assignments, judgements, events):
                last = select(func.max(table.c.id)).scalar_subquery()
                connection.execute(select(func.setval(func.pg_get_serial_sequence(table.name, "id"), last)))
        for statement in import_module(COUNTED).fill(connection.dialect.name):
            connection.execute(text(statement))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def _chunk(connection: Connection, numbers: range, count: int, votes_each: int, start: datetime) -> None:
    rng = random.Random(f"scale {numbers.start}")
    rows: dict[Table, list[dict[str, Any]]] = {
        table: [] for table in (prompts, responses, items, item_responses, assignments, judgements, events)
    }
    for n in numbers:
        at = start + timedelta(days=DAYS * n / count)
        open_from = count * 9 // 10
        one, two = 2 * n + 1, 2 * n + 2
        asked = [{"role": "user", "content": f"Question {n}? " + "What then, and why? " * rng.randrange(1, 15)}]
        rows[prompts].append({"id": f"p{n}", "messages": asked, "kind": "", "meta": {}, "created": at})
        for id in (one, two):
            reply = f"Reply {id}. " + "It goes **on** and on. " * rng.randrange(1, 30)
            rows[responses].append(
                {"id": id, "prompt_id": f"p{n}", "text": reply, "finished": True, "model": "m", "fingerprint": "f",
                 "sampling": None, "key": f"scale/{id}", "created": at}
            )  # fmt: skip
            rows[item_responses].append({"item_id": n + 1, "response_id": id})
        rows[items].append(
            {"id": n + 1, "prompt_id": f"p{n}", "batch": "scale", "key": f"{one}-{two}", "taken": votes_each,
             "overlap": votes_each + 3 * (n >= open_from), "created": at, "kind": "compare", "turn": 0.0,
             "gold": None, "place": n / count, "out": False}
        )  # fmt: skip
        better = rng.choice((one, two))
        busy = open_from <= n < open_from + (count - open_from) // 2
        who = rng.sample(range(1, CROWD), votes_each)
        for k, person in enumerate([0, *who[1:]] if busy else who):
            id = n * votes_each + k + 1
            shown = rng.sample((one, two), 2)
            right = rng.random() < 0.6 + 0.35 * person / CROWD
            choice = "tie" if rng.random() < 0.1 else ("left", "right")[(shown[0] == better) != right]
            when = at + timedelta(minutes=k)
            rows[assignments].append(
                {"id": id, "item_id": n + 1, "annotator_id": 1000 + person, "shown": shown, "state": "judged",
                 "leased_at": when, "expires_at": when, "handle": f"scale{id}"}
            )  # fmt: skip
            said = {"choice": choice, "strength": None if choice == "tie" else float(rng.randrange(1, 4)),
                    "seconds": 3 + 20 * rng.random(), "guideline": "1", "token": f"scale-vote-{id}"}  # fmt: skip
            rows[judgements].append(said | {"id": id, "assignment_id": id, "created": when, "reason": None})
            told = said | {"assignment": id, "item": n + 1, "shown": shown, "batch": "scale"}
            rows[events].append(event(when, f"crowd {person}", "judged", "judgement", id, None, told, "1"))
    for table, some in rows.items():
        connection.execute(insert(table), some)


# ----------------------------------------------------------------------------------------------------------- measuring


class Serving:
    """The app on a store, as a process, and an admin who is signed in."""

    def __init__(self, location: str, folder: Path) -> None:
        self.store = Store(location)
        self.door = People(self.store)
        self.cookie, _ = self.sign_in("bench admin", "admin")
        command = [sys.executable, "-c", SERVER, location, str(folder / "times.json")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.get("/manage/people")

    def sign_in(self, name: str, role: str) -> tuple[str, str]:
        with self.store.transaction(writes=True) as connection:
            account = people.add_account(connection, name, role, None, "bench", self.store.now)  # type: ignore[arg-type]
        cookie = self.door.start_session(account)
        session = self.door.session(cookie)
        assert session is not None
        return cookie, f"Cookie: {COOKIE}={cookie}\r\nX-CSRF: {session.csrf}\r\nContent-Type: application/json\r\n"

    def get(self, path: str) -> tuple[int, float, float, int]:
        """Status, seconds to the first byte, seconds to the last, bytes."""
        call = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        start = time.perf_counter()
        call.request("GET", path, headers={"Cookie": f"{COOKIE}={self.cookie}"})
        answer = call.getresponse()
        first, size = time.perf_counter() - start, 0
        while part := answer.read(1 << 20):
            size += len(part)
        call.close()
        return answer.status, first, time.perf_counter() - start, size

    def peak(self) -> float:
        """The most memory that the process has held since ``forget``, MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def busy(self) -> float:
        """Seconds of processor time so far: what else the machine does is not in it."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def forget(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def measured(self, path: str) -> dict[str, Any]:
        self.forget()
        before, busy = self.peak(), self.busy()
        status, first, whole, size = self.get(path)
        return {
            "status": status,
            "first_byte": round(first, 2),
            "seconds": round(whole, 2),
            "cpu_seconds": round(self.busy() - busy, 2),
            "MB": round(size / 1e6, 2),
            "rose_MB": round(self.peak() - before),
            "peak_MB": round(self.peak()),
        }

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.store.close()


def in_the_store(store: Store, times: int) -> dict[str, Any]:
    """Leases and votes without HTTP, by somebody new and by the one who has done most of what is open."""
    labelling = Labelling(store)
    found: dict[str, Any] = {}
    with store.transaction(writes=True) as connection:
        new = people.add_account(connection, "bench new", "annotator", None, "bench", store.now)
        row = connection.execute(select(annotators).where(annotators.c.id == 1000)).one()
    busy = people.Account(row.id, row.name, "annotator", True, None)
    for who, person in (("new", new), ("busy", busy)):
        leases, votes = [], []
        for number in range(times):
            start = time.perf_counter()
            screen = labelling.next(person, "compare")
            leases.append(time.perf_counter() - start)
            assert screen is not None
            start = time.perf_counter()
            labelling.judge(person, screen.id, NewVote("left", token=f"bench {who} {number}"))
            votes.append(time.perf_counter() - start)
        found |= {f"lease, {who}": percentiles(leases), f"vote, {who}": percentiles(votes)}
    return found


def labelling_beside(
    serving: Serving, headers: Sequence[str], seconds: float, think: float, looks: Sequence[str]
) -> dict[str, Any]:
    """What labelers wait, with somebody who opens ``looks`` one after the other all the while."""
    tally, stop, looked = Tally(), threading.Event(), [0]

    def look() -> None:
        while looks and not stop.is_set():
            serving.get(looks[looked[0] % len(looks)])
            looked[0] += 1

    async def all_of_them() -> None:
        until = time.monotonic() + seconds
        jobs = [labeler(serving.port, h, until, think, random.Random(i), tally) for i, h in enumerate(headers)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        tally.errors += [repr(result) for result in results if result is not None]

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    asyncio.run(all_of_them())
    stop.set()
    looker.join(600)
    waits = percentiles(tally.waits)
    return {"requests": len(tally.waits), "errors": len(tally.errors), "looked": looked[0], **waits}


def run(args: argparse.Namespace, location: str, folder: Path) -> Iterator[tuple[str, Any]]:
    start = time.perf_counter()
    if not args.filled:
        fill(location, args.prompts, args.votes_each)
    yield "filled_seconds", round(time.perf_counter() - start, 1)
    with Store(location) as store:
        yield "store", in_the_store(store, args.times)
    serving = Serving(location, folder)
    try:
        for page in () if args.no_pages else PAGES:
            yield page or "/", [serving.measured(f"/manage{page}") for _ in range(2)]
        for name in args.export if args.export is not None else EXPORTS:
            yield name, serving.measured(f"/manage/export/{name}")
        headers = [serving.sign_in(f"bench labeler {n}", "annotator")[1] for n in range(args.people)]
        beside = {"alone": (), "beside pages": [f"/manage{p}" for p in ("", "/quality", "/disagreements", "/prompts")]}
        for name, looks in (beside | {"beside an export": ["/manage/export/pairs.jsonl"]}).items():
            yield f"labelers {name}", labelling_beside(serving, headers, args.seconds, args.think, looks)
    finally:
        serving.close()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench labelling-scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--db", help="an empty database; default: a new SQLite file")
    parser.add_argument("--filled", action="store_true", help="--db was filled by an earlier run")
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--votes-each", type=int, default=5)
    parser.add_argument("--people", type=int, default=40, help="who label at once")
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds between an item and its vote")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--times", type=int, default=200, help="leases and votes without HTTP")
    parser.add_argument("--export", action="append", help="these alone; may be repeated")
    parser.add_argument("--no-pages", action="store_true")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        location = args.db or f"sqlite:///{folder}/scale.db"
        for name, value in run(args, location, Path(folder)):
            print(json.dumps({name: value}), flush=True)
    return 0
