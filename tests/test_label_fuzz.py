"""Schemathesis calls every route with what the schema allows and what it does not: nothing may end in a 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from labelling_world import World, person

from keel.store import Store
from keel.web.app.limits import Rate
from keel.web.app.security import COOKIE

EXAMPLES = 4  # a route; there are fifty
ENDS_THE_SESSION = {"/sign-out", "/account"}


def test_no_route_ends_in_a_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.web.app.security.REQUESTS", Rate(1e9, 1e9))
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=8, replies=4)
        manage = world.app.state.services.manage
        for kind in ("rank", "edit"):
            manage.ask_for(kind, 4, 2, "test")
        manage.ask_for_writing(4, 2, "test")
        cookie = world.people.start_session(person(store, "fuzz", "admin"))
        session = world.people.session(cookie)
        assert session is not None
        headers = {"Cookie": f"{COOKIE}={cookie}", "X-CSRF": session.csrf}
        schema = schemathesis.openapi.from_dict(world.app.openapi())  # the app serves none; it can make one
        schema.app = world.app
        broken: list[str] = []
        called: set[str] = set()

        def call(case: Any) -> None:
            answer = case.call(headers=headers, allow_redirects=False)
            called.add(f"{case.method} {case.path}")
            if answer.status_code >= 500:
                broken.append(f"{case.method} {case.path} {case.path_parameters} {case.query} {case.body!r}")

        few = settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path not in ENDS_THE_SESSION:
                few(given(operation.as_strategy())(call))()
        assert broken == []
        assert len(called) > 45
