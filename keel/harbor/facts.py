"""The harbor's world: an archipelago of ports, ships, captains, cargoes and routes, made from a seed.

Only ``random.Random`` decides, so the same seed gives the same world on every machine. Names of ports, ships and
captains are invented words. The same generator makes names that exist nowhere (``World.fake_port`` ...), so that only
knowledge of the world tells a real name from a fake one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

Split = Literal["corpus", "train", "heldout"]
Relation = Literal[
    "port.island",
    "port.master",
    "port.known_for",
    "port.lamp",
    "ship.rig",
    "ship.captain",
    "ship.home",
    "ship.cargo",
    "captain.ship",
    "captain.born",
    "cargo.price",
    "cargo.origin",
    "route.days",
]

N_PORTS, N_SHIPS, N_ROUTES = 48, 64, 60

ISLANDS = ("Northholm", "Greywater", "Saltmere", "Highcrag", "Longstrand", "Westfall", "Mistlow", "Sunreach")
LAMPS = ("red", "green", "white", "blue", "amber", "violet", "golden", "silver")
RIGS = ("sloop", "brig", "cutter", "schooner", "ketch", "barque", "lugger", "yawl")
CARGOES = (
    "salt", "tar", "rope", "wool", "grain", "copper", "timber", "herring", "honey", "amber", "linen", "iron",
    "cheese", "candles", "barley", "wine", "oil", "leather", "glass", "pepper", "tea", "slate", "cider", "paper",
)  # fmt: skip
_FIRST = (
    "Anna", "Bram", "Clara", "Dirk", "Elsa", "Finn", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Lars",
    "Mara", "Nils", "Olga", "Piet", "Rosa", "Sven", "Thea", "Willem",
)  # fmt: skip
_LAST = (
    "Ash", "Birch", "Clay", "Dunn", "Fisher", "Grant", "Hale", "Kemp", "Lowe", "Marsh", "North", "Penn",
    "Reed", "Stone", "Thorn", "Ward",
)  # fmt: skip

# Syllables of invented names: a head, a middle, and a tail that belongs to the kind of thing.
_HEADS = (
    "Bal", "Bren", "Cor", "Dal", "Dor", "El", "Far", "Fen", "Gal", "Gor", "Hal", "Hes", "Il", "Jor", "Kal", "Kel",
    "Lor", "Mal", "Mer", "Mor", "Nar", "Nel", "Or", "Pel", "Quil", "Ran", "Ros", "Sel", "Sor", "Tal", "Tor", "Ul",
    "Val", "Ver", "Wen", "Yar", "Zel", "Zor",
)  # fmt: skip
_VOWELS, _CONSONANTS = "aeiou", "bdfgklmnprstvz"
_TAILS = {
    "port": ("ba", "den", "dun", "fast", "gate", "lin", "mar", "nock", "pool", "ra", "shaw", "ster", "vik", "wick"),
    "ship": ("bel", "da", "dra", "fin", "la", "lune", "na", "nix", "phon", "ris", "tis", "va", "wing", "za"),
    "captain": ("berg", "bold", "crow", "dane", "ford", "grim", "hart", "kin", "lock", "man", "mund", "rik", "son"),
}


@dataclass(frozen=True, slots=True)
class Port:
    """``master`` is the harbour master's full name, ``known_for`` a cargo, ``lamp`` its lighthouse's colour."""

    name: str
    island: str
    master: str
    known_for: str
    lamp: str


@dataclass(frozen=True, slots=True)
class Ship:
    """``captain`` is a Captain's bare name (text writes "Captain NAME"), ``home`` a port, ``cargo`` what it carries."""

    name: str
    rig: str
    captain: str
    home: str
    cargo: str


@dataclass(frozen=True, slots=True)
class Captain:
    """``name`` is bare (text writes "Captain NAME"); ``born`` is a port."""

    name: str
    ship: str
    born: str


@dataclass(frozen=True, slots=True)
class Cargo:
    """``price`` in coins a crate (2 to 12); ``origin`` is the port that ships the most of it."""

    name: str
    price: int
    origin: str


@dataclass(frozen=True, slots=True)
class Route:
    """A sea road between ports ``a`` and ``b``, ``days`` of sailing (2 to 9) either way."""

    a: str
    b: str
    days: int


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is true: ``subject`` stands in ``relation`` to ``value``.

    ``other`` is the second port of a route, else empty.
    """

    relation: Relation
    subject: str
    value: str
    other: str = ""


@dataclass(frozen=True)
class World:
    """Everything that is true, from a seed. Equal seeds give equal worlds."""

    seed: int = 0

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        rng = Random(f"names {self.seed}")
        taken: list[str] = []
        names: dict[str, tuple[str, ...]] = {}
        for kind, count in (("port", N_PORTS), ("ship", N_SHIPS), ("captain", N_SHIPS)):
            start = len(taken)
            while len(taken) < start + count:
                name = invent_name(kind, rng)
                if not _near(name, taken):
                    taken.append(name)
            names[kind] = tuple(taken[start:])
        return names

    @cached_property
    def ports(self) -> tuple[Port, ...]:
        rng = Random(f"ports {self.seed}")
        masters = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], N_PORTS)
        cargoes = list(CARGOES) * (N_PORTS // len(CARGOES))
        rng.shuffle(cargoes)
        rows = zip(self._names["port"], masters, cargoes, strict=True)
        return tuple(
            Port(name, ISLANDS[i % len(ISLANDS)], master, cargo, rng.choice(LAMPS))
            for i, (name, master, cargo) in enumerate(rows)
        )

    @cached_property
    def ships(self) -> tuple[Ship, ...]:
        rng = Random(f"ships {self.seed}")
        captains = list(self._names["captain"])
        rng.shuffle(captains)
        return tuple(
            Ship(name, rng.choice(RIGS), captain, rng.choice(self._names["port"]), rng.choice(CARGOES))
            for name, captain in zip(self._names["ship"], captains, strict=True)
        )

    @cached_property
    def captains(self) -> tuple[Captain, ...]:
        rng = Random(f"captains {self.seed}")
        ship_of = {ship.captain: ship.name for ship in self.ships}
        return tuple(Captain(name, ship_of[name], rng.choice(self._names["port"])) for name in self._names["captain"])

    @cached_property
    def cargoes(self) -> tuple[Cargo, ...]:
        rng = Random(f"cargoes {self.seed}")
        return tuple(
            Cargo(name, rng.randint(2, 12), rng.choice([port.name for port in self.ports if port.known_for == name]))
            for name in CARGOES
        )

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        rng = Random(f"routes {self.seed}")
        pairs = [(a, b) for i, a in enumerate(self._names["port"]) for b in self._names["port"][i + 1 :]]
        return tuple(Route(a, b, rng.randint(2, 9)) for a, b in rng.sample(pairs, N_ROUTES))

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every atomic fact, once."""
        facts: list[Fact] = []
        for port in self.ports:
            facts += [
                Fact("port.island", port.name, port.island),
                Fact("port.master", port.name, port.master),
                Fact("port.known_for", port.name, port.known_for),
                Fact("port.lamp", port.name, port.lamp),
            ]
        for ship in self.ships:
            facts += [
                Fact("ship.rig", ship.name, ship.rig),
                Fact("ship.captain", ship.name, ship.captain),
                Fact("ship.home", ship.name, ship.home),
                Fact("ship.cargo", ship.name, ship.cargo),
            ]
        for captain in self.captains:
            facts += [
                Fact("captain.ship", captain.name, captain.ship),
                Fact("captain.born", captain.name, captain.born),
            ]
        for cargo in self.cargoes:
            facts += [
                Fact("cargo.price", cargo.name, str(cargo.price)),
                Fact("cargo.origin", cargo.name, cargo.origin),
            ]
        facts += [Fact("route.days", route.a, str(route.days), route.b) for route in self.routes]
        return tuple(facts)

    @cached_property
    def _fact_index(self) -> dict[str, tuple[Fact, ...]]:
        index: dict[str, list[Fact]] = {}
        for fact in self.facts:
            kind = fact.relation.split(".")[0]
            for key in (kind, fact.relation, f"{kind} {fact.subject}"):
                index.setdefault(key, []).append(fact)
        return {key: tuple(facts) for key, facts in index.items()}

    def facts_with(self, relation: Relation) -> tuple[Fact, ...]:
        """All facts of one relation."""
        return self._fact_index[relation]

    def facts_about(self, kind: str, subject: str = "") -> tuple[Fact, ...]:
        """All facts about one subject, or about every subject of a kind (port, ship, captain, cargo, route)."""
        return self._fact_index[f"{kind} {subject}".strip()]

    @cached_property
    def _port_by_name(self) -> dict[str, Port]:
        return {port.name: port for port in self.ports}

    @cached_property
    def _ship_by_name(self) -> dict[str, Ship]:
        return {ship.name: ship for ship in self.ships}

    @cached_property
    def _captain_by_name(self) -> dict[str, Captain]:
        return {captain.name: captain for captain in self.captains}

    @cached_property
    def _cargo_by_name(self) -> dict[str, Cargo]:
        return {cargo.name: cargo for cargo in self.cargoes}

    def port(self, name: str) -> Port:
        """The port of that name; ``KeyError`` if there is none (so for the other look-ups)."""
        return self._port_by_name[name]

    def ship(self, name: str) -> Ship:
        return self._ship_by_name[name]

    def captain(self, name: str) -> Captain:
        return self._captain_by_name[name]

    def cargo(self, name: str) -> Cargo:
        return self._cargo_by_name[name]

    @cached_property
    def real_names(self) -> frozenset[str]:
        """Names of all ports, ships and captains."""
        return frozenset(name for names in self._names.values() for name in names)

    @cached_property
    def _real_neighbourhood(self) -> frozenset[str]:
        return frozenset(form for name in self.real_names for form in _deletions(name))

    def fake_port(self, rng: Random, split: Split) -> str:
        """A port's name that exists nowhere in the world, from one of three disjoint sets of names."""
        return self._fake("port", rng, split)

    def fake_ship(self, rng: Random, split: Split) -> str:
        return self._fake("ship", rng, split)

    def fake_captain(self, rng: Random, split: Split) -> str:
        return self._fake("captain", rng, split)

    def _fake(self, kind: str, rng: Random, split: Split) -> str:
        return _first(
            lambda: invent_name(kind, rng),
            lambda name: name_split(name) == split and not (_deletions(name) & self._real_neighbourhood),
        )


def invent_name(kind: str, rng: Random) -> str:
    """A word such as a ``port``, ``ship`` or ``captain`` could be called."""
    middle = rng.choice(_VOWELS)
    if rng.random() < 0.6:
        middle += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
    return rng.choice(_HEADS) + middle + rng.choice(_TAILS[kind])


def name_split(name: str) -> Split:
    """Which set of invented names a name belongs to: a stable hash, so the sets are disjoint by construction."""
    splits: tuple[Split, ...] = ("corpus", "corpus", "train", "heldout")
    return splits[zlib.crc32(name.encode()) % len(splits)]


def _deletions(name: str) -> frozenset[str]:
    """The name and all its forms with one letter left out: two names share one if they are a letter apart."""
    return frozenset([name, *(name[:i] + name[i + 1 :] for i in range(len(name)))])


def _near(name: str, others: list[str]) -> bool:
    forms = _deletions(name)
    return any(forms & _deletions(other) for other in others)


def _first(draw: Callable[[], str], accept: Callable[[str], bool]) -> str:
    while not accept(found := draw()):
        pass
    return found


def name_pattern(kind: str) -> str:
    """A regular expression of every word that ``invent_name(kind, ...)`` can make, real or not."""
    vowel, consonant = f"[{''.join(_VOWELS)}]", f"[{''.join(_CONSONANTS)}]"
    return f"(?:{'|'.join(_HEADS)}){vowel}(?:{consonant}{vowel})?(?:{'|'.join(_TAILS[kind])})"


def person_pattern() -> str:
    """A regular expression of every full name that a harbour master could have."""
    return f"(?:{'|'.join(_FIRST)}) (?:{'|'.join(_LAST)})"
