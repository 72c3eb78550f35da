"""The order of the open comparisons: as they were added, or those first on which the run's reward models differ."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from keel.store import Store, people, priority
from keel.types import UserError
from keel.web.service.sources import Ensemble

SETTING = "order"
log = logging.getLogger("keel.web")


@dataclass(frozen=True, slots=True)
class OrderState:
    """What was asked for last. ``state``: none, running, done, failed."""

    state: str = "none"
    message: str = ""


class Ordering:
    """Scoring takes a model: it is done beside the server, one at a time, and nobody waits for it."""

    def __init__(self, store: Store, ensemble: Ensemble | None) -> None:
        self._store = store
        self._ensemble = ensemble
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def models(self) -> list[str]:
        return self._ensemble.names() if self._ensemble else []

    def state(self) -> OrderState:
        with self._store.transaction(writes=False) as connection:
            return OrderState(**people.setting(connection, SETTING, {}))

    def uncertain_first(self, actor: str) -> None:
        """Returns at once; ``state`` says how it went."""
        if len(self.models) < 2:
            raise UserError(
                "this needs two reward models or more, which may differ; train several reward stages, each with a "
                "seed of its own"
            )
        with self._starting:
            if self._thread is not None and self._thread.is_alive():
                raise UserError("the pairs are being scored already; wait for it")
            self._mark("running", "", actor)
            self._thread = threading.Thread(target=self._work, args=(actor,), daemon=True, name="ordering")
            self._thread.start()

    def as_added(self, actor: str) -> int:
        with self._store.transaction(writes=False) as connection:
            ids = [pair.item_id for pair in priority.open_pairs(connection)]
        count = self._order(ids, None, "added", [], actor)
        self._mark("done", f"{count} pairs in the order they were added", actor)
        return count

    def recover(self) -> None:
        """At the server's start: what was running was stopped."""
        if self.state().state == "running":
            self._mark("failed", "the server was stopped; ask again", "keel")

    def wait(self, timeout: float = 60.0) -> None:
        """Until nothing is left to do; for tests."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self, actor: str) -> None:
        try:
            assert self._ensemble is not None
            models = self.models
            with self._store.transaction(writes=False) as connection:
                pairs = priority.open_pairs(connection)
            if not pairs:
                raise UserError("no comparison is open; queue some first")
            scored = [(pair.prompt, pair.first.completion(), pair.second.completion()) for pair in pairs]
            worth = self._ensemble.gains(scored)
            gains = {pair.item_id: gain for pair, gain in zip(pairs, worth, strict=True)}
            count = self._order(list(gains), gains, "uncertain", models, actor)
            said = f"{count} pairs, those first on which {', '.join(models)} differ most"
            state, message = "done", f"{said}. {_gained(worth)}"
        except UserError as error:
            state, message = "failed", str(error)
        except Exception:
            log.exception("ordering the queue failed")
            state, message = "failed", "something went wrong; the server's log says what"
        self._mark(state, message, actor)

    def _order(self, ids: list[int], gains: dict[int, float] | None, order: str, models: list[str], actor: str) -> int:
        count = 0
        for some in priority.chunks(ids):  # a transaction each: labelling goes on in between
            with self._store.transaction(writes=True) as connection:
                count += priority.give_turns(connection, some, gains)
        with self._store.transaction(writes=True) as connection:
            priority.log_order(connection, order, count, models, actor, self._store.now)
        return count

    def _mark(self, state: str, message: str, actor: str) -> None:
        value = {"state": state, "message": message}
        with self._store.transaction(writes=True) as connection:
            people.set_setting(connection, SETTING, value, actor, self._store.now)


def _gained(worth: Sequence[float]) -> str:
    """What the order is worth by the models' own reckoning: measured is how much more they know after training."""
    first = sorted(worth, reverse=True)[: max(1, len(worth) // 10)]
    best, mean = sum(first) / len(first), sum(worth) / len(worth)
    return (
        f"A vote on the first {len(first)} should tell {best:.3f} nats about them, one on any pair {mean:.3f}; what it "
        "gained in accuracy is under Training, once they were trained again"
    )
