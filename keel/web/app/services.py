"""What the routes call, one record for an app: typed, so that a route is checked against what it calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from keel.store import Store
from keel.web.service.addresses import Network
from keel.web.service.arena import Arena
from keel.web.service.constitutions import Constitutions
from keel.web.service.imports import Imports
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.models import Models
from keel.web.service.ordering import Ordering
from keel.web.service.people import People
from keel.web.service.reading import Reading
from keel.web.service.sampling import Sampling
from keel.web.service.sources import Sources
from keel.web.service.standings import ArenaStandings
from keel.web.service.start import name_of
from keel.web.service.steps import StepWork
from keel.web.service.tokens import Tokens
from keel.web.service.webhooks import Webhooks


@dataclass(frozen=True, slots=True)
class Services:
    store: Store
    store_name: str
    sources: Sources
    people: People
    labelling: Labelling
    manage: Manage
    imports: Imports
    models: Models
    constitutions: Constitutions
    arena: Arena
    standings: ArenaStandings
    sampling: Sampling
    ordering: Ordering
    steps: StepWork
    tokens: Tokens
    reading: Reading
    webhooks: Webhooks

    @classmethod
    def of(cls, store: Store, sources: Sources, webhooks_to: Sequence[Network] = ()) -> Services:
        return cls(
            store=store,
            store_name=name_of(store),
            sources=sources,
            people=People(store),
            labelling=Labelling(store),
            manage=Manage(store),
            imports=Imports(store),
            models=Models(store, sources.trained),
            constitutions=Constitutions(store, sources.critiques),
            arena=Arena(store, sources.arena),
            standings=ArenaStandings(store),
            sampling=Sampling(store, sources),
            ordering=Ordering(store, sources.ensemble),
            steps=StepWork(store, sources.step_gains),
            tokens=Tokens(store),
            reading=Reading(store),
            webhooks=Webhooks(store, webhooks_to),
        )


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


def address_of(request: Request) -> str:
    """Under which address people reach the app: the configured one, else the one that this request came to. A request
    may be made to name any, so a link that is sent to others should not rest on it."""
    configured: str | None = request.app.state.address
    return configured or str(request.base_url).rstrip("/")
