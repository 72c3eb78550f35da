"""Messages -> token ids and loss mask: the only place in Keel where a chat template is read.

One construction serves training and inference. A conversation is cut into *segments*: what the template writes until
the assistant starts, the assistant's reply, its end token, what the template writes next, and so on. The tokens before
a reply are the same whether the reply is going to be sampled (``encode_prompt``), scored (``encode_reply``) or learned
among others (``encode_conversation``). :mod:`keel.data.tokens` makes ids of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from keel.data.template import BUILT_IN as BUILT_IN
from keel.data.template import PROBE, REMEDY, Habits, habits_of, own_template, put_before, render, template_text
from keel.data.tokens import Segment, Tokens, token_ids
from keel.types import Demonstration, Encoded, Message, UserError, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """A tokenizer with its chat template.

    ``template`` (a built-in name or a Jinja file) stands in for the tokenizer's own. Without either, the chat is
    *plain*, the way one asks a base model: the prompt is the last user message and a newline, a reply ends with eos.

    ``end_ids``  ends an assistant turn: the stop token that the template writes after a reply, else eos; () if neither.
    ``stop_ids`` tokens at which sampling stops: those, eos, and what the checkpoint's generation config names as ends
    (``tokenizer.keel_ends``, which ``keel.model.loading`` sets: Llama 3's two, GLM's marks of the next speaker).

    What the tokenizer puts before a text (BOS, GLM's ``[gMASK]<sop>``) comes from the template alone, or in plain mode
    and plain text from the tokenizer: never from both. ``begin_ids`` are these tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None
        if template is None:
            self.template = own_template(tokenizer)
        else:
            self.template = template_text(template, tokenizer)
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in BUILT_IN.get(template, ()) if token not in vocabulary]
            if missing:
                raise UserError(
                    f"the tokenizer lacks the {template} template's tokens {', '.join(missing)}; a training stage adds "
                    "them when the recipe's model.chat_template names it"
                )
        ends: tuple[int, ...] = tuple(getattr(tokenizer, "keel_ends", ()))
        self._habits = Habits() if self.template is None else habits_of(tokenizer, self.template, ends)
        self._begin_text = put_before(tokenizer)
        self._eos_text: str = tokenizer.eos_token or ""
        self._end_text = self._habits.end or self._eos_text
        self.begin_ids: tuple[int, ...] = tuple(token_ids(tokenizer, [self._begin_text])[0]) if self._begin_text else ()
        self.end_ids: tuple[int, ...] = tuple(token_ids(tokenizer, [self._end_text])[0])
        eos: tuple[int, ...] = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(self.end_ids[-1:] + eos + ends))
        self._tokens = Tokens(tokenizer, self._samples())

    @property
    def plain(self) -> bool:
        return self.template is None

    # ------------------------------------------------------------------------------------------------- encoding

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's next message starts.

        Raises UserError for messages that the template refuses, or that do not wait for the assistant.
        """
        return self.encode_prompts([messages])[0]

    def encode_prompts(self, prompts: Sequence[Sequence[Message]], places: Sequence[str] = ()) -> list[list[int]]:
        """``encode_prompt`` of many, in one call of the tokenizer. ``places``: where each comes from, for errors."""
        rows = []
        for i, messages in enumerate(prompts):
            with _at(places[i] if places else ""):
                rows.append(self._prompt_segments(messages))
        return [list(encoded.ids) for encoded in self._tokens.encode(rows, strict=False)]

    def encode_reply(self, messages: Sequence[Message], reply: str, finished: bool = True) -> Encoded:
        """``encode_prompt(messages)``, then the reply and its end token, both in the mask.

        ``finished=False`` (a reply cut at the length limit) leaves the end token out.
        """
        return self.encode_replies([(messages, reply, finished)])[0]

    def encode_replies(
        self, replies: Sequence[tuple[Sequence[Message], str, bool]], places: Sequence[str] = ()
    ) -> list[Encoded]:
        """``encode_reply`` of many (messages, reply, finished); a prompt that several share is rendered once.
        ``places``: where each comes from, for errors."""
        prompts: dict[tuple[Message, ...], list[Segment]] = {}
        rows = []
        for i, (messages, reply, finished) in enumerate(replies):
            key = tuple(messages)
            if key not in prompts:
                with _at(places[i] if places else ""):
                    prompts[key] = self._prompt_segments(key)
            rows.append(prompts[key] + self._reply_segments(reply, finished))
        return self._tokens.encode(rows, strict=False)

    def encode_pieces(self, messages: Sequence[Message], pieces: Sequence[str]) -> list[list[int]]:
        """The prompt, and each piece of a reply by itself: the first as if the reply stopped there. White space that
        the template takes off a reply's end begins the next piece."""
        parts, rest = [], ""
        for piece in pieces:
            text = rest + piece
            parts.append(text.rstrip(self._habits.right))
            rest = text[len(parts[-1]) :]
        row = self.encode_reply(messages, parts[0], finished=False)
        begin = len(row.prompt_ids)
        return [list(row.ids[:begin]), list(row.ids[begin:]), *token_ids(self.tokenizer, parts[1:])]

    def encode_whole(self, conversations: Sequence[Sequence[Message]], places: Sequence[str] = ()) -> list[list[int]]:
        """``apply_chat_template`` of many, to its last token: what stands behind a reply's end (ChatML's newline) too.
        ``places``: where each comes from, for errors."""
        texts = []
        for i, messages in enumerate(conversations):
            with _at(places[i] if places else ""):
                texts.append(self._render(messages))
        return token_ids(self.tokenizer, texts)

    def encode_conversation(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation with every assistant turn, its end token included, in the mask.

        What precedes a reply is ``encode_prompt`` of the messages before it, token for token. Raises UserError
        where the template makes that impossible, because it writes an earlier turn differently later on.
        """
        return self._tokens.encode([self._conversation_segments(messages)], strict=True)[0]

    def encode_text(self, text: str, finished: bool = True) -> Encoded:
        """Plain text, every token in the mask but the tokenizer's BOS; eos at its end when ``finished``."""
        return self._tokens.encode([self._text_segments(text, finished)], strict=True)[0]

    def encode_demonstrations(self, demonstrations: Sequence[Demonstration]) -> list[Encoded]:
        """``encode_conversation``, or ``encode_text`` of the plain ones, of many in one call of the tokenizer."""
        rows = []
        for demonstration in demonstrations:
            with _at(place_of(demonstration)):
                if demonstration.plain:
                    rows.append(self._text_segments(demonstration.messages[0].content, finished=True))
                else:
                    rows.append(self._conversation_segments(demonstration.messages))
        try:
            return self._tokens.encode(rows, strict=True)
        except UserError:
            for demonstration, row in zip(demonstrations, rows, strict=True):  # which one it is
                with _at(place_of(demonstration)):
                    self._tokens.encode([row], strict=True)
            raise

    def opens(self, mark: str) -> bool:
        """Whether the template ends a prompt with ``mark``, so that a reply begins behind it."""
        return not self.plain and self._render_prompt([Message("user", "Hello")]).rstrip().endswith(mark)

    def decode(self, ids: Sequence[int], so_far: bool = False) -> str:
        """The text of a reply's ids with every mark that the model wrote (thinking, tools, roles): what judges it must
        see them. Left out are the token that ended it, padding, and the white space that the template puts around.
        ``so_far``: the reply goes on, so what stands at its end is the model's own."""
        tokenizer, own = self.tokenizer, list(ids)
        if own and own[-1] in self.stop_ids:
            own.pop()
        kept = [i for i in own if i != tokenizer.pad_token_id or i in self.stop_ids]
        text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        begun = text.removeprefix(self._habits.before)
        return begun if so_far else begun.removesuffix(self._habits.after)

    # ------------------------------------------------------------------------------------------------- segments

    def _prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        if not messages or messages[-1].role == "assistant":
            last = "is empty" if not messages else "ends with an assistant message"
            raise UserError(f"a prompt must wait for the assistant, and this one {last}")
        rendered = self._render_prompt(messages)
        if self.plain:
            return [*self._begin(), Segment(rendered.removeprefix(self._begin_text), False)]
        segments: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant" or i == 0:
                continue
            before = self._render_prompt(messages[:i])
            turn = self._reply_segments(message.content, finished=True)
            after = before + "".join(s.text for s in turn)
            if not before.startswith(done) or not rendered.startswith(after) or turn[0].text[:1].isspace():
                # The template rewrites its history (strips thinking, ...), or the tokenizer may merge it. The model is
                # given the rendering, so that is taken whole; only a conversation may not be learnable in one piece.
                return [Segment(rendered, False)]
            segments += [Segment(before[len(done) :], False), *(Segment(s.text, False) for s in turn)]
            done = after
        return [*segments, Segment(rendered[len(done) :], False)]

    def _reply_segments(self, reply: str, finished: bool) -> list[Segment]:
        text = self._habits.before + self._habits.taken_off(reply)
        if not finished or not self._end_text:
            return [Segment(text, True)]
        return [Segment(text + self._habits.after, True), Segment(self._end_text, True, mark=self.plain)]

    def _begin(self) -> list[Segment]:
        return [Segment(self._begin_text, False, mark=True)] if self._begin_text else []

    def _text_segments(self, text: str, finished: bool) -> list[Segment]:
        segments = [*self._begin(), Segment(text, True)]
        if finished and self._eos_text and not text.endswith(self._eos_text):
            segments.append(Segment(self._eos_text, True, mark=True))
        return segments

    def _conversation_segments(self, messages: Sequence[Message]) -> list[Segment]:
        if not messages or messages[-1].role != "assistant":
            raise UserError("a conversation to learn from must end with an assistant message")
        if self.plain and [m.role for m in messages] != ["user", "assistant"]:
            raise UserError(
                "the tokenizer has no chat template, and without one only a user message and one reply can be learned; "
                + REMEDY
            )
        if self.plain:
            return self._prompt_segments(messages[:-1]) + self._reply_segments(messages[-1].content, finished=True)
        segments: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.learned:
                continue
            prompt = self._render_prompt(messages[:i])
            if not prompt.startswith(done):
                raise UserError(
                    f"the chat template writes the turns before message {i + 1} differently from how they were learned "
                    f"({_first_difference(done, prompt)}), so this conversation cannot be learned in one piece; "
                    f"split it into one row for each reply, or {REMEDY}"
                )
            turn = self._reply_segments(message.content, finished=True)
            segments += [Segment(prompt[len(done) :], False), *turn]
            done = prompt + "".join(s.text for s in turn)
        if not segments:
            raise UserError("nothing of this conversation is learned: every reply has a weight of 0; leave it out")
        self._verify(messages, prompt)
        return segments

    def _verify(self, messages: Sequence[Message], prompt: str) -> None:
        """The template's own rendering of the whole conversation must start with the last reply's prompt."""
        full = self._render(messages)
        if not full.startswith(prompt):
            raise UserError(
                "the chat template's prompt is not how its full rendering of the conversation starts "
                f"({_first_difference(prompt, full)}); fix the template, or {REMEDY}"
            )

    def _samples(self) -> list[list[Segment]]:
        """Conversations whose replies begin and end with what tokenizers like to merge with their neighbours."""
        ask, rows = Message("user", "Hello"), []
        for reply in ("Hi", " Hi", "\nHi", "\n\nHi", "hi\n", "hi ", "1", ".", ""):
            turns = (ask, Message("assistant", reply))
            try:
                rows.append(self._conversation_segments(turns if self.plain else (*turns, *turns)))
            except UserError:  # a template that rewrites earlier turns
                rows.append(self._prompt_segments([ask]) + self._reply_segments(reply, finished=True))
        return [[segment for segment in row if not segment.mark] for row in rows]

    # ------------------------------------------------------------------------------------------------ rendering

    def _render(self, messages: Sequence[Message]) -> str:
        assert self.template is not None
        return render(self.tokenizer, self.template, messages)

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        if self.template is not None:
            return render(self.tokenizer, self.template, messages, prompt=True)
        questions = [m.content for m in messages if m.role == "user"]
        if not questions:
            raise UserError("without a chat template a prompt needs a user message, and this one has none")
        return self._begin_text + questions[-1] + "\n"

    # ---------------------------------------------------------------------------------------------------- check

    def check(self) -> list[str]:
        """What is wrong or surprising about this tokenizer and template, a sentence each; [] is a clean bill."""
        if self.plain:
            problems = [f"the tokenizer has no chat template: only single questions can be asked and learned; {REMEDY}"]
            return problems if self.end_ids else [*problems, "the tokenizer has no eos token: no reply can end"]
        return [*self._check_tokens(), *self._check_history()]

    def _check_tokens(self) -> list[str]:
        problems = []
        if not self.end_ids:
            problems.append(
                "the template writes no stop token after a reply and the tokenizer has no eos: no reply ends"
            )
        elif not self._habits.end:
            problems.append(
                f"the template writes no stop token after a reply, so {self._eos_text} ends one instead, and "
                "conversations of several replies cannot be learned"
            )
        question = [Message("user", "Hello")]
        ids, bos = self.encode_prompt(question), self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            problems.append(f"the template writes {self.tokenizer.bos_token} twice")
        if tuple(ids[: len(self.begin_ids)]) != self.begin_ids:
            problems.append(f"the tokenizer starts a text with {self._begin_text} and the template does not")
        vocabulary = self.tokenizer.get_vocab()
        written = dict.fromkeys(
            re.findall(r"<\|\w+\|>|<\w+_of_\w+>", self._render([*question, Message("assistant", "Hi")]))
        )
        lacking = [token for token in written if token not in vocabulary]
        if lacking:
            problems.append(f"the template writes {', '.join(lacking)}, which the tokenizer cuts up as ordinary text")
        if "strftime_now" in (self.template or ""):
            problems.append("the template writes today's date: prompts change from one day to the next")
        return problems

    def _check_history(self) -> list[str]:
        ask, again = Message("user", "Hello"), Message("user", "Go on")
        prompt = self._render_prompt([ask])
        full = self._render([ask, Message("assistant", PROBE)])
        if not full.startswith(prompt):
            return [f"the prompt is not how the full rendering starts ({_first_difference(prompt, full)})"]
        problems = []
        between = full[len(prompt) : full.index(PROBE)]
        if between.strip():
            problems.append(
                f"the template puts {between!r} between a prompt and the last reply; Keel learns and samples without it"
            )
        thought = Message("assistant", f"<think>\n{PROBE}\n</think>\n\nHi")
        done = prompt + "".join(s.text for s in self._reply_segments("Hi", finished=True))
        self.encode_conversation([ask, Message("assistant", "Hi")])
        try:
            later = self._render_prompt([ask, Message("assistant", "Hi"), again])
            later_thought = self._render_prompt([ask, thought, again])
        except UserError as error:
            return [*problems, str(error)]
        if not later.startswith(done):
            problems.append(
                "the template rewrites earlier replies, so conversations of several replies cannot be learned "
                f"({_first_difference(done, later)})"
            )
        if PROBE not in later_thought:
            problems.append(
                "the template strips thinking from earlier replies: conversations with thinking in a reply that is not "
                "the last cannot be learned"
            )
        return problems


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """An error within it names the place of the record that it came from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from error


def install_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> int:
    """Give a tokenizer a chat template: ``keel``, ``chatml``, or a Jinja file.

    Returns the number of special tokens added to the vocabulary because a built-in template needs them: the model's
    embeddings must then have at least ``len(tokenizer)`` rows (``model.resize_token_embeddings``).
    Raises UserError when the name is neither a built-in template nor a readable file, or is no valid Jinja.
    """
    text = template_text(name_or_path, tokenizer)
    known = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A token that is in the vocabulary but not special is made so, under its own id.
    wanted = [token for token in BUILT_IN.get(name_or_path, ()) if token not in special]
    if wanted:
        tokenizer.add_tokens(wanted, special_tokens=True)
    tokenizer.chat_template = text
    Chat(tokenizer)  # a template that cannot render the simplest conversation fails here
    return sum(token not in known for token in wanted)


def _first_difference(expected: str, got: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    start = max(0, at - 20)
    return f"at character {at + 1}: {expected[start : at + 20]!r} against {got[start : at + 20]!r}"
