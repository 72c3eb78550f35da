"""Responses that somebody asked for: sampled in the background, then queued for people."""

from __future__ import annotations

import logging
import threading
from itertools import combinations
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from keel.store import Store, overview, people, work
from keel.store.people_tables import sampling_requests
from keel.types import UserError
from keel.web.service.sources import SampledModel, Sources

Made = Literal["compare", "rank", "thumb", "edit"]
MOST_PROMPTS = 2_000
log = logging.getLogger("keel.web")


class Sampling:
    """One thread works at a time, since a model takes the machine: requests wait for one another."""

    def __init__(self, store: Store, sources: Sources) -> None:
        self._store = store
        self._models = sources.sampled
        self._working = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def models(self) -> list[str]:
        return list(self._models)

    def request(self, model: str, prompts: int, per_prompt: int, overlap: int, kind: Made, actor: str) -> int:
        if model not in self._models:
            raise UserError(f"there is no model {model!r} to sample from")
        least, most = (4, 9) if kind == "rank" else (1, 16) if kind in ("edit", "thumb") else (2, 16)
        if not least <= per_prompt <= most or not 1 <= prompts <= MOST_PROMPTS or not 1 <= overlap <= 100:
            raise UserError(
                f"give 1 to {MOST_PROMPTS} prompts, {least} to {most} responses each, and an overlap of 1 to 100"
            )
        now = self._store.now
        row = {"model": model, "prompts": prompts, "per_prompt": per_prompt, "overlap": overlap, "kind": kind}
        state = {"state": "waiting", "message": "", "made_by": actor, "created": now}
        with self._store.transaction(writes=True) as connection:
            made = connection.execute(insert(sampling_requests), row | state).inserted_primary_key
            assert made is not None
            people.log(connection, now, actor, "asked for", "responses", made.id, None, row)
        self._start()
        return int(made.id)

    def requests(self, limit: int = 20) -> list[dict[str, Any]]:
        query = select(sampling_requests).order_by(sampling_requests.c.id.desc()).limit(limit)
        with self._store.transaction(writes=False) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True, name="sampling")
        self._thread.start()

    def recover(self) -> None:
        """At the server's start: go on with what waits, and say of what was running that it was stopped."""
        with self._store.transaction(writes=True) as connection:
            stopped = {"state": "failed", "message": "the server was stopped; ask again", "ended_at": self._store.now}
            running = update(sampling_requests).where(sampling_requests.c.state == "running")
            connection.execute(running.values(**stopped))
        self._start()

    def wait(self, timeout: float = 60.0) -> None:
        """Until nothing is left to do; for tests."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        with self._working:
            self._work_off()

    def _work_off(self) -> None:
        while (job := self._take()) is not None:
            try:
                if job["model"] not in self._models:
                    raise UserError(f"the model {job['model']!r} is not here any more; ask again for another one")
                state, message = "done", self._sample(job)
            except UserError as error:
                state, message = "failed", str(error)
            except Exception:
                log.exception("sampling request %s failed", job["id"])
                state, message = "failed", "something went wrong; the server's log says what"
            with self._store.transaction(writes=True) as connection:
                _mark(connection, job["id"], state=state, message=message, ended_at=self._store.now)

    def _take(self) -> dict[str, Any] | None:
        query = select(sampling_requests).where(sampling_requests.c.state == "waiting")
        query = query.with_for_update(skip_locked=True)  # another server process on the same store
        with self._store.transaction(writes=True) as connection:
            found = connection.execute(query.order_by(sampling_requests.c.id).limit(1)).mappings().first()
            if found is not None:
                _mark(connection, found["id"], state="running")
            return None if found is None else dict(found)

    def _sample(self, job: dict[str, Any]) -> str:
        model: SampledModel = self._models[job["model"]]
        with self._store.transaction(writes=False) as connection:
            ids = set(overview.prompts_with_fewest(connection, job["prompts"]))
        prompts = [prompt for prompt in self._store.prompts() if prompt.id in ids]
        groups = model.sample(prompts, job["per_prompt"])
        batch, added, items = f"request {job['id']}", 0, 0
        with self._store.session() as session, session.transaction(writes=True) as connection:
            for prompt, replies in zip(prompts, groups, strict=True):
                new = session.add_responses(prompt.id, replies, model.path, model.sampling, model.fingerprint)
                made = sorted(set(new))
                added += len(made)
                items += self._queue(session, connection, job, batch, made)
        return f"{added} responses to {len(prompts)} prompts, {items} items queued"

    def _queue(self, store: Store, connection: Connection, job: dict[str, Any], batch: str, made: list[int]) -> int:
        overlap, now = job["overlap"], self._store.now
        if job["kind"] == "rank":
            return len(work.add_rankings(connection, [made], overlap, batch, now)) if len(made) in work.RANKED else 0
        if job["kind"] == "thumb":
            return len(work.add_thumbs(connection, made, overlap, batch, now))
        if job["kind"] == "edit":
            return len(work.add_edits(connection, made[:1], overlap, batch, now))
        pairs = list(combinations(made, 2))[: max(1, len(made) // 2)]
        return len(store.add_comparisons(pairs, overlap, batch)) if pairs else 0


def _mark(connection: Connection, id: int, **changes: Any) -> None:
    connection.execute(update(sampling_requests).where(sampling_requests.c.id == id).values(**changes))
