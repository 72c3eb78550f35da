"""What a reply claims: which value it gives for a fact that was asked for, which number for a sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from keel.harbor.replies import Reply, denied, names_anyone, numbers, values

_DOMAINS = {
    "port.island": "island",
    "port.master": "person",
    "port.known_for": "cargo",
    "port.lamp": "lamp",
    "ship.rig": "rig",
    "ship.captain": "captain",
    "ship.home": "port",
    "ship.cargo": "cargo",
    "captain.ship": "ship",
    "captain.born": "port",
    "cargo.price": "number",
    "cargo.origin": "port",
    "route.days": "number",
}
# What a sentence about each relation says. A sentence that only speaks of another relation gives no answer, however
# right the name in it is. ("is", "on", "from" tell nothing and are left out.)
_SPEAKS_OF = {
    "port.island": r"\b(?:islands?|lies|find|is on)\b",
    "port.master": r"\b(?:harbour|harbor|keeps?|kept|master)\b",
    "port.known_for": r"\b(?:known|famous|trade[sr]?|traders|buy|sells?)\b",
    "port.lamp": r"\b(?:lamp|light|lighthouse|colou?r)\b",
    "ship.rig": r"\b(?:rig|rigged|kind|sort|ship|is an?)\b",
    "ship.captain": r"\b(?:captain of|captain is|commands?|commanded|sails under|sailed by|sails the|skipper)\b",
    "ship.home": r"\b(?:home|sails from)\b",
    "ship.cargo": r"\b(?:carr(?:y|ies|ying)|hold|cargo|laden|loaded|full of)\b",
    "captain.ship": r"\b(?:commands?|commanded|ship of|ship is|sails the|'s ship)\b",
    "captain.born": r"\b(?:born|birth|birthplace|comes from|native)\b",
    "cargo.price": r"\b(?:costs?|price|coins?)\b",
    "cargo.origin": r"\b(?:comes? from|ships|sells|most|best|origin)\b",
    "route.days": r"\b(?:days?|voyage)\b",
}
_SPEAKS = {relation: re.compile(pattern) for relation, pattern in _SPEAKS_OF.items()}
SHORT = 10  # words of a sentence that may leave its subject out
MOST_WORDS_OF_A_REPLY = 40  # what speaks of other things at greater length is drift


def claimed_values(meta: Mapping[str, Any], reply: Reply) -> tuple[set[str], bool]:
    """The values that a reply gives for what was asked, lower case, and whether it is a reply to it at all.

    ``meta``: relation, subject and other of the question. Left out are sentences about another subject ("the captain of
    the Orla ..."), long ones that do not name the subject (short ones may: "It is Mara Reed."), sentences that speak of
    another relation only, and values that a sentence denies. A short reply may state the relation in question, but of
    another thing of the same kind (a mangled name). It gives no value, yet it is a reply: a wrong one.
    """
    relation = meta["relation"]
    kind, domain = relation.split(".")[0], _DOMAINS[relation]
    subjects = {meta["subject"].lower(), meta.get("other", "").lower()} - {""}
    found: set[str] = set()
    on_topic = False
    brief = len(reply.words) <= MOST_WORDS_OF_A_REPLY
    for sentence in reply.stated:
        about_it = any(re.search(rf"\b{re.escape(subject)}\b", sentence) for subject in subjects)
        of_it = bool(_SPEAKS[relation].search(sentence))
        others = values(sentence, "port" if kind == "route" else kind)
        if not about_it and (len(sentence.split()) > SHORT or others):
            given_of_other = [value for value in values(sentence, domain) if [value] != others]
            on_topic = on_topic or (brief and of_it and bool(others) and bool(given_of_other))
            continue
        if not of_it and any(speaks.search(sentence) for speaks in _SPEAKS.values()):
            continue
        sentence = re.sub(r"\b1 crate", "a crate", sentence)
        given = {value for value in values(sentence, domain) if value not in subjects and not denied(sentence, value)}
        found |= given
        on_topic = on_topic or bool(given) or (of_it and about_it)
    return found, on_topic


def stated_result(meta: Mapping[str, Any], reply: Reply) -> int | float | None:
    """The one number that a reply gives as the result of ``a`` and ``b``; None if it gives none, infinity for two that
    differ. Sentences that name a port, ship or person speak of something else.

    Worked lines ("10 + 20 = 30, 3 + 4 = 7, 30 + 7 = 37") count by the last result. Otherwise the operands, each said
    once, are left out and what remains must agree.
    """
    text = " ".join(sentence for sentence in reply.stated if not names_anyone(sentence))
    if text.count("=") > 1:
        after = numbers(text[text.rindex("=") + 1 :])
        return after[0] if len(set(after)) == 1 else float("inf")
    stated = numbers(text)
    for operand in (meta["a"], meta["b"]):
        if operand in stated and len(stated) > 1:
            stated.remove(operand)
    return None if not stated else stated[0] if len(set(stated)) == 1 else float("inf")
