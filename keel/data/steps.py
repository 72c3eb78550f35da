"""Steps of a reply -> the tokens with which they end.

What separates two steps may be one token with what stands before it (".\\n\\n") or behind it (a newline and the next
line's indentation), and it may be cut otherwise at the end of a text than before more of it. So white space belongs to
no step: a step ends with the token that holds the last of its signs. That token is the same whether the reply is whole
or stops there, and so is a score that is read there.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from keel.data.chat import Chat
from keel.recipe.steps import Steps
from keel.types import Encoded, Message, StepLabels, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many signs a token is by itself, by tokenizer: decoding is slow.
_ALONE: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, int]] = WeakKeyDictionary()
_BROKEN = "\ufffd"  # what bytes that are no character, or not yet, are read as
_JOINED = 8  # signs that a text may have more before one that joins them


@dataclass(frozen=True, slots=True)
class EncodedSteps:
    """A prompt with a reply, and the place in ``row.ids`` of each step's last token; no places where the tokenizer has
    no token for any of the reply. ``in_pieces``: some step has an end because it was cut there (`encode_steps`)."""

    row: Encoded
    ends: tuple[int, ...]
    in_pieces: bool = False


def encode_steps(
    chat: Chat, replies: Sequence[tuple[Sequence[Message], Sequence[str]]], places: Sequence[str] = ()
) -> list[EncodedSteps]:
    """Replies (messages, steps), whole or as far as they go, without an end token: a step is judged by what stands up
    to its end. A template may take white space off a reply's ends. ``places``: where each comes from, for errors.

    A model writes what it likes: one token may hold the end of a step and the beginning of the next, and a tokenizer
    may not give a text back as it stands. Behind each step whose end is not to be found the reply is cut, and what
    follows is encoded by itself. So all up to that end has the tokens that it has where the reply stops there.
    UserError for a step that is blank.
    """
    rows = chat.encode_replies([(messages, "".join(steps), False) for messages, steps in replies], places)
    found = []
    for i, (row, (messages, steps)) in enumerate(zip(rows, replies, strict=True)):
        begin = len(row.prompt_ids)
        ends = _ends(chat.tokenizer, row.ids[begin:], steps, places[i] if places else "")
        if None in ends:
            found.append(_in_pieces(chat, messages, steps, {k for k, end in enumerate(ends) if end is None}))
        else:
            found.append(EncodedSteps(row, tuple(begin + end for end in ends if end is not None)))
    return found


def _in_pieces(chat: Chat, messages: Sequence[Message], steps: Sequence[str], cuts: set[int]) -> EncodedSteps:
    """The reply cut behind the steps ``cuts``, and behind those that have no end of their own even then. The end of a
    piece is its last token with a sign, whatever that is read as."""
    last = len(steps) - 1
    while True:
        bounds = [0, *(k + 1 for k in sorted(cuts - {last})), len(steps)]
        groups = [steps[a:b] for a, b in pairwise(bounds)]
        pieces = chat.encode_pieces(messages, ["".join(group) for group in groups])
        found = [_ends(chat.tokenizer, ids, group) for ids, group in zip(pieces[1:], groups, strict=True)]
        more = {a + k for a, ends in zip(bounds, found, strict=False) for k, end in enumerate(ends[:-1]) if end is None}
        if not more:
            break
        cuts |= more
    prompt, begin = tuple(pieces[0]), len(pieces[0])
    reply = tuple(chain.from_iterable(pieces[1:]))
    if not reply:
        return EncodedSteps(Encoded.of(prompt, ()), (), in_pieces=True)
    places: list[int] = []
    for ids, ends in zip(pieces[1:], found, strict=True):
        signs = _signs_alone(chat.tokenizer, ids)
        sure = [next((k for k in reversed(range(len(ids))) if signs[k]), -1) if end is None else end for end in ends]
        # A step for which there is no token ends where the one before it does.
        places += [max(begin + end, len(prompt)) for end in sure]
        begin += len(ids)
    return EncodedSteps(Encoded.of(prompt, reply), tuple(places), in_pieces=True)


def ends_in_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], steps: Sequence[str], place: str = ""
) -> tuple[int, ...]:
    """The place in ``ids``, a reply's tokens, of each step's last token; they rise.

    ``ids`` may be what a template makes of the reply or a completion's own, its end token included. ``steps`` are texts
    of signs that, joined, are the reply (`keel.recipe.steps.Steps.split`). UserError where a token holds signs of two
    steps, where a step has none, or where the tokens do not give the reply back. ``place``: where it comes from.
    """
    ends = _ends(tokenizer, ids, steps, place)
    if None in ends:
        i, where = ends.index(None), f"{place}: " if place else ""
        faithful = _signs(_decoded(tokenizer, ids)).startswith(_signs("".join(steps)))
        raise UserError(where + _why(i, "".join(steps[: i + 1]), faithful))
    return tuple(end for end in ends if end is not None)


def _ends(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], steps: Sequence[str], place: str = ""
) -> list[int | None]:
    """The place of each step's last token, None where no token ends it. UserError for a step without a sign."""
    whole = _signs("".join(steps))
    so_far = list(accumulate(_signs_alone(tokenizer, ids), initial=0))
    ends: list[int | None] = []

    @cache
    def read(tokens: int) -> str:
        return _signs(_decoded(tokenizer, ids[:tokens]))

    begin = done = before = 0  # the tokens up to the last end that was found, their signs; those of the step before
    for i, text in enumerate(accumulate(steps)):
        until = len(_signs(text))
        if until == before:
            raise UserError(f"{place}: " * bool(place) + f"step {i + 1} is blank; give steps of text")
        # Where it ends if its tokens read the same alone as together. Bytes of one character do not: a step with
        # such is looked for.
        tokens = bisect_left(so_far, so_far[begin] + until - done)
        if not begin < tokens <= len(ids) or read(tokens) != whole[:until]:
            tokens = 0
            for k in range(begin + 1, len(ids) + 1):
                if read(k) == whole[:until]:
                    tokens = k
                if tokens or len(read(k).rstrip(_BROKEN)) > until + _JOINED:
                    break
        if not tokens and until == len(whole):
            tokens = len(ids) if read(len(ids)).startswith(whole) else 0  # the last sign and the end are one token
        ends.append(tokens - 1 if tokens else None)
        before = until
        if tokens:
            begin, done = tokens, until
    return ends


def prefixes_in_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], steps: Sequence[str], place: str = ""
) -> tuple[int, ...]:
    """How many of ``ids`` hold each prefix of the steps, to be gone on from: up to the step's last sign and, as far as
    whole tokens hold it, what separates it from the next step. Raises what `ends_in_tokens` does."""
    lengths = []
    for end, step in zip(ends_in_tokens(tokenizer, ids, steps, place), steps, strict=True):
        rest = step[len(step.rstrip()) :]
        held = _decoded(tokenizer, [ids[end]])
        rest = rest[len(held) - len(held.rstrip()) :]
        tokens = end + 1
        # One that holds the next line's indentation too is taken: without the line's end the step could go on.
        while rest and tokens < len(ids):
            blank = _decoded(tokenizer, [ids[tokens]])
            if not blank or blank.strip() or not (rest.startswith(blank) or blank.startswith(rest)):
                break
            rest, tokens = rest[len(blank) :], tokens + 1
        lengths.append(tokens)
    return tuple(lengths)


def cut_otherwise(records: Sequence[StepLabels], steps: Steps) -> list[StepLabels]:
    """The replies whose steps are labelled otherwise than ``steps`` would cut them. UserError where one of the two has
    no steps at all: every reply is one, though some hold several lines."""
    lines = sum("\n" in record.text.strip() for record in records)
    cut = [steps.split(record.text) for record in records]
    if lines and all(len(record.steps) == 1 for record in records):
        raise UserError(
            f"each of {len(records)} replies is labelled as one step, and {lines} of them hold several lines; give a "
            "list of steps with a label each, or learn level: outcome"
        )
    if lines and all(len(parts) == 1 for parts in cut):
        raise UserError(
            f"steps.by: {steps.by} makes one step of each of {len(records)} replies, though {lines} of them hold "
            "several lines; set steps.by to what ends a step there"
        )
    return [record for record, parts in zip(records, cut, strict=True) if parts != record.steps]


def _why(step: int, text: str, faithful: bool) -> str:
    """Why no token ends a step, ``text`` being all up to its end. ``faithful``: the tokens give the reply back."""
    if faithful:
        return (
            f"one token holds the end of step {step + 1} and the beginning of step {step + 2} ({text[-10:]!r}), so "
            "neither has an end of its own; cut steps by a blank line or a marker"
        )
    return (
        f"the tokenizer does not give the reply back as it stands, so it is not known where step {step + 1} ends "
        f"({text[-20:]!r}); leave it out, or use a tokenizer that keeps every sign"
    )


def _signs_alone(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """How many signs each token is by itself."""
    alone = _ALONE.setdefault(tokenizer, {})
    for token in set(ids) - alone.keys():
        alone[token] = len(_signs(_decoded(tokenizer, [token])))
    return [alone[token] for token in ids]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _signs(text: str) -> str:
    """A text without white space, in the form that tokenizers which rewrite texts (NFC, NFKC) bring them to."""
    return "".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).split())
