"""A rendered conversation -> token ids and loss mask.

What is learned and scored must be what the whole rendering's own tokens are: a tokenizer that puts a mark before each
text (SentencePiece's "▁": Llama 2, Mistral, TinyLlama, Zephyr) cuts a conversation otherwise than its pieces. And a
prompt's tokens must be how its conversation begins, or a reply would be learned behind other tokens than it is sampled
from. Where a tokenizer cuts at the pieces' borders anyway (marks of their own, byte-level pieces) the pieces are
tokenized apart, each different one once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from keel.types import Encoded, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A piece of a conversation; ``learned``: the assistant wrote it. ``mark``: a token by itself, whatever is beside
    it (the BOS and EOS that no template writes)."""

    text: str
    learned: bool
    mark: bool = False


Row = Sequence[Segment]


class _Merged(Exception):
    """What is learned from the segment ``index`` on does not follow its prompt's own tokens. One token reaches over the
    border (``over``), or an earlier reply's beginning changes how the prompt's end is cut."""

    def __init__(self, index: int, over: bool) -> None:
        super().__init__()
        self.index, self.over = index, over

    def sentence(self, row: Row) -> str:
        begins = row[self.index].text[:30]
        if self.over:
            return (
                f"the tokenizer makes one token of the prompt's end and the beginning of the reply {begins!r}, so what "
                "is learned would not be what is sampled; take the white space or sign off the reply's beginning, or "
                "set model.chat_template: keel"
            )
        return (
            f"the tokenizer cuts what stands before the reply {begins!r} otherwise than when that reply is sampled, so "
            "this conversation cannot be learned in one piece; split it into one row for each reply, or set "
            "model.chat_template: keel"
        )


class Tokens:
    """Segments -> ids and mask, for one tokenizer. ``samples`` show whether pieces may be tokenized by themselves,
    because their tokens are the whole's. This is asked apart for replies that begin with white space: after a prompt
    that ends with a newline many tokenizers merge the two."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Row]) -> None:
        self.tokenizer = tokenizer
        cut = [(_begins_white(row), self._is_cut(row)) for row in samples]
        always = all(clean for _, clean in cut)
        others = [clean for white, clean in cut if not white]
        self.apart = {True: always, False: all(others) if others else always}

    def _is_cut(self, row: Row) -> bool:
        return self._pieces([row])[0].ids == tuple(token_ids(self.tokenizer, [_text(row)])[0])

    def encode(self, rows: Sequence[Row], strict: bool) -> list[Encoded]:
        """The rows' ids, True in the mask where something is learned.

        Where a tokenizer would merge a prompt's end with a reply's beginning, ``strict`` is an error that shows the
        reply. Otherwise the reply's tokens are those it has by itself, as the model could write them after that prompt.
        """
        apart = [self.apart[_begins_white(row)] for row in rows]
        pieces = iter(self._pieces([row for row, by_itself in zip(rows, apart, strict=True) if by_itself]))
        if all(apart):
            return list(pieces)
        whole = iter(self._whole([row for row, by_itself in zip(rows, apart, strict=True) if not by_itself], strict))
        return [next(pieces) if by_itself else next(whole) for by_itself in apart]

    def _pieces(self, rows: Sequence[Row]) -> list[Encoded]:
        texts = list(dict.fromkeys(segment.text for row in rows for segment in row))
        ids_of = dict(zip(texts, token_ids(self.tokenizer, texts), strict=True))
        encoded = []
        for row in rows:
            ids: list[int] = []
            mask: list[bool] = []
            for segment in row:
                ids += ids_of[segment.text]
                mask += [segment.learned] * len(ids_of[segment.text])
            encoded.append(Encoded(tuple(ids), tuple(mask)))
        return encoded

    def _whole(self, rows: Sequence[Row], strict: bool) -> list[Encoded]:
        """Each row as one text, and the beginnings up to where something learned starts, which must be its own."""
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} cannot say which text its tokens stand for, and cuts a conversation "
                "otherwise than its turns; use the model's fast tokenizer (tokenizer.json), or set "
                "model.chat_template: keel"
            )
        cores = [[segment for segment in row if not segment.mark] for row in rows]
        texts = list(dict.fromkeys(text for core in cores for text in (*_beginnings(core).values(), _text(core))))
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = dict(zip(texts, zip(found["input_ids"], found["offset_mapping"], strict=True), strict=True))
        encoded = []
        for row, core in zip(rows, cores, strict=True):
            try:
                inside = _cut(core, spans)
            except _Merged as merged:
                if strict:
                    raise UserError(merged.sentence(core)) from None
                inside = self._behind(core, merged.index)
            encoded.append(self._with_marks(row, inside))
        return encoded

    def _behind(self, row: Row, index: int) -> Encoded:
        """The prompt as it is by itself, and what follows as it is by itself."""
        prompt, rest = token_ids(self.tokenizer, [_text(row[:index]), _text(row[index:])])
        return Encoded.of(prompt, rest)

    def _with_marks(self, row: Row, inside: Encoded) -> Encoded:
        """What the row's marks put before and behind its text."""
        text = [i for i, segment in enumerate(row) if not segment.mark]
        before, behind = self._pieces([row[: text[0]], row[text[-1] + 1 :]])
        return Encoded((*before.ids, *inside.ids, *behind.ids), (*before.mask, *inside.mask, *behind.mask))


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text by itself, without what the tokenizer puts around a text."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _begins_white(row: Row) -> bool:
    """Whether something learned begins with white space."""
    return any(
        segment.learned and segment.text[:1].isspace() and not (i and row[i - 1].learned)
        for i, segment in enumerate(row)
    )


def _text(row: Row) -> str:
    return "".join(segment.text for segment in row)


def _beginnings(row: Row) -> dict[int, str]:
    """The text before each place where something learned starts, by that segment's index."""
    before = (False, *(segment.learned for segment in row))
    starts = [i for i, segment in enumerate(row) if segment.learned and not before[i]]
    return {i: _text(row[:i]) for i in starts}


def _cut(row: Row, spans: dict[str, tuple[list[int], list[tuple[int, int]]]]) -> Encoded:
    """The whole text's ids with the mask of its segments. Raises `_Merged` where they are not cut between them."""
    ids, offsets = spans[_text(row)]
    mask: list[bool] = []
    end = 0
    for i, segment in enumerate(row):
        end += len(segment.text)
        tokens = bisect_left(offsets, end, key=lambda span: span[0]) if i + 1 < len(row) else len(ids)
        mask += [segment.learned] * (tokens - len(mask))
        if i + 1 < len(row) and row[i + 1].learned != segment.learned and tokens and offsets[tokens - 1][1] > end:
            raise _Merged(i + 1 if row[i + 1].learned else i, over=True)
    starts = list(_beginnings(row).items())
    for i, beginning in starts:
        own = spans[beginning][0]
        at = mask.index(True) if i == starts[0][0] and True in mask else len(own)
        if i == starts[0][0] and ids[:at] != own:
            # What white space at a prompt's end becomes may depend on what follows: the model is asked without that.
            ids, mask = [*own, *ids[at:]], [False] * len(own) + mask[at:]
        if ids[: len(own)] != own or mask[len(own) : len(own) + 1] != [True] or any(mask[len(own) - 1 : len(own)]):
            raise _Merged(i, over=False)
    return Encoded(tuple(ids), tuple(mask))
