"""``keel token``: tokens for programs, made and ended by whoever has the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from keel.cli.exchange import store_location
from keel.store import Store
from keel.store.people import AccountRole
from keel.types import UserError

if TYPE_CHECKING:
    from keel.web.service.tokens import Tokens

ACTOR = "keel"


def make_token(place: str, name: str, of: str | None, role: AccountRole, per_minute: int) -> str:
    """The new token's secret, which is shown this once. ``of``: an account's name; None: the owner's."""
    with _tokens(place) as (store, tokens):
        if of is None:
            from keel.web.service.people import People

            of = People(store).owner().name
        return tokens.make(name, of, role, ACTOR, per_minute)


def end_token(place: str, number: int) -> str:
    with _tokens(place) as (_, tokens):
        tokens.end(number, ACTOR)
    return f"token {number} has ended"


def list_tokens(place: str) -> str:
    """The tokens that hold, a line each."""
    with _tokens(place) as (_, tokens):
        return "\n".join(map(_line, tokens.all())) or "no tokens; make one with --make NAME"


def _line(one: Mapping[str, Any]) -> str:
    used = f"last used {one['last_used']:%Y-%m-%d %H:%M} UTC" if one["last_used"] else "never used"
    rights = f"of {one['of']}, {one['role']}, {one['per_minute']} a minute, made by {one['made_by']}"
    return f"{one['id']:>4}  {one['name']}: {rights}, {used}"


@contextmanager
def _tokens(place: str) -> Iterator[tuple[Store, Tokens]]:
    try:
        from keel.web.service.tokens import Tokens
    except ModuleNotFoundError as error:
        raise UserError(f"keel token needs {error.name}; install it with: pip install 'keel-rlhf[web]'") from error
    with Store(store_location(place)) as store:
        yield store, Tokens(store)
