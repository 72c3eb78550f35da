"""Chat templates: by name or file, what they write, and what a tokenizer puts before a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keel.data.tokens import token_ids
from keel.types import Message, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = {
    "keel": ("<|system|>", "<|user|>", "<|assistant|>", "<|turn|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""Keel's own templates (``templates/NAME.jinja``) and the special tokens that each one writes."""

REMEDY = "set model.chat_template to keel, chatml or a Jinja file"
PROBE = "kEEL-rEPLY-pROBE"  # stands for a reply where a template's habits are found out; no template knows it
_WHITE = " \n\t\r"


def template_text(name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A built-in template, one of the tokenizer's own by its name where it has several, or a Jinja file."""
    own = tokenizer.chat_template
    if name_or_path in BUILT_IN:
        text = (Path(__file__).parent / "templates" / f"{name_or_path}.jinja").read_text(encoding="utf-8").rstrip("\n")
        # A template's text is all a model sees, here and in any server. So what the tokenizer puts before a text must
        # stand in it.
        before = put_before(tokenizer)
        written = "bos_token" if before == tokenizer.bos_token else json.dumps(before)
        return f"{{{{- {written} -}}}}\n{text}" if before else text
    if isinstance(own, dict) and name_or_path in own:
        return str(own[name_or_path])
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.chat_template: {name_or_path!r} is neither a built-in template ({', '.join(BUILT_IN)}) nor a "
            f"readable Jinja file ({error})"
        ) from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template, of several the one called default; None where it has none."""
    own = tokenizer.chat_template
    if isinstance(own, dict) and own and not own.get("default"):
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(own)} and none called default; name one of them in "
            "model.chat_template (an SFT stage gives it to the model), or save the tokenizer with one alone"
        )
    return own.get("default") if isinstance(own, dict) else own or None


def put_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens that the tokenizer itself puts before a text, written as text: BOS for most that have any, GLM's
    ``[gMASK]<sop>``, XGLM's ``</s>``; "" for none. UserError where it would not read them back."""
    own, whole = token_ids(tokenizer, ["a"])[0], list(tokenizer("a")["input_ids"])
    starts = (at for at in range(len(whole)) if own and whole[at : at + len(own)] == own)
    before = whole[: next(starts, int(whole[:1] == [tokenizer.bos_token_id]))]
    written = "".join(tokenizer.convert_ids_to_tokens(before))
    if before and token_ids(tokenizer, [written])[0] != before:
        raise UserError(
            f"the tokenizer puts {written!r} before a text and reads something else where that is written, so no "
            "template can write it; use the model's fast tokenizer (tokenizer.json)"
        )
    return written


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that can end a turn: special tokens, which no ordinary text turns into."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {i for i in tokenizer.all_special_ids if i != tokenizer.bos_token_id}


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], prompt: bool = False) -> str:
    """What a template writes for these messages, with (``prompt``) or without the start of a reply."""
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # whatever a template raises, jinja2's errors and Python's
        roles = ", ".join(m.role for m in messages)
        raise UserError(
            f"the chat template refuses a conversation of roles {roles}: {error}; change the rows, or {REMEDY}"
        ) from error
    assert isinstance(text, str)
    return text


@dataclass(frozen=True)
class Habits:
    """What a template does to a reply.

    ``before``, ``after``: white space that it writes around one. ``end``: the token that ends one, as text; "" where it
    writes none. ``left``, ``right``: the characters that it takes off either side of one; None is all white space.
    """

    before: str = ""
    after: str = ""
    end: str = ""
    left: str | None = ""
    right: str | None = ""

    def taken_off(self, reply: str) -> str:
        return reply.lstrip(self.left).rstrip(self.right)


def habits_of(tokenizer: PreTrainedTokenizerBase, template: str, ends: Iterable[int]) -> Habits:
    """Finds out a template's habits by rendering. ``ends``: tokens that the checkpoint names as ends of a reply, such
    as the next speaker's mark (GLM). UserError for a template that leaves replies out."""
    question = Message("user", "Hello")

    def said(reply: str, *then: Message) -> str:
        return render(tokenizer, template, [question, Message("assistant", reply), *then])

    whole = said(PROBE)
    _, found, tail = whole.partition(PROBE)
    if not found:
        raise UserError(f"the chat template does not write the assistant's messages; fix it, or {REMEDY}")
    after, end = _first_mark(tokenizer, tail, stop_tokens(tokenizer))
    if not end:
        after, end = _first_mark(tokenizer, said(PROBE, question).partition(PROBE)[2], set(ends))
    prompt = render(tokenizer, template, [question], prompt=True)
    between = whole[len(prompt) :].partition(PROBE)[0] if whole.startswith(prompt) else ""
    left = "".join(white for white in _WHITE if said(white + PROBE) == whole)
    right = "".join(white for white in _WHITE if said(PROBE + white) == whole)
    return Habits(
        before=between if between.isspace() else "",
        after=after,
        end=end,
        left=None if left == _WHITE else left,
        right=None if right == _WHITE else right,
    )


def _first_mark(tokenizer: PreTrainedTokenizerBase, text: str, marks: set[int]) -> tuple[str, str]:
    """(white space, the one of ``marks`` behind it) that a text begins with; ("", "") where it does not."""
    after = text.lstrip()
    ids = token_ids(tokenizer, [after])[0]
    if not ids or ids[0] not in marks:
        return "", ""
    mark = tokenizer.convert_ids_to_tokens(ids[0])
    assert isinstance(mark, str)
    return (text[: len(text) - len(after)], mark) if after.startswith(mark) else ("", "")
