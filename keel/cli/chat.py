"""``keel chat``: a conversation with a run's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from keel.cli.finished import answering, find_model, loading
from keel.cli.searching import SearchTalker, find_search, shown
from keel.data.chat import Chat
from keel.model.checkpoint import load_policy
from keel.model.held import is_held
from keel.model.modules import context_length, inner_model
from keel.precision import autocast, pick_precision
from keel.recipe.sections import SamplingConfig, Source
from keel.rollout.collect import stop_token_ids
from keel.rollout.tokens import filtered_weights
from keel.run import resolve_device
from keel.search.paths import Found
from keel.types import Message, UserError

HELP = "/reset starts anew, /system TEXT sets the system message, /quit (or Ctrl-D) ends"


def stream_ids(model: Any, ids: Sequence[int], stop: Sequence[int], sampling: SamplingConfig) -> Iterator[int]:
    """Samples a reply token by token with a KV cache; ends before a stop token or after ``max_new_tokens`` tokens."""
    device = next(model.parameters()).device
    step, past = torch.tensor([list(ids)], device=device), None
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad(), autocast(str(device), "bf16" if is_held(model) else "fp32"):
            output = model(input_ids=step, past_key_values=past, use_cache=True)
        past, logits_1V = output.past_key_values, output.logits[:1, -1].float()
        if sampling.temperature == 0:
            token = int(logits_1V.argmax())
        else:
            probs_1V = (logits_1V / sampling.temperature).softmax(-1)
            token = int(torch.multinomial(filtered_weights(probs_1V, sampling), 1))
        if token in stop:
            return
        yield token
        step = torch.tensor([[token]], device=device)


def stream_text(chat: Chat, ids: Iterator[int]) -> Iterator[str]:
    """The text of ids as it grows; a character whose bytes are not all there yet waits for them."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = chat.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = chat.decode(seen)[len(shown) :]
    if rest:
        yield rest


class Talker:
    """A model that answers conversations, its reply in pieces as it comes."""

    def __init__(self, source: Source, sampling: SamplingConfig, device: str) -> None:
        self.device = resolve_device(device)
        with loading():
            products = pick_precision("auto", self.device)
            model, tokenizer = load_policy(source, device=self.device, products=products)
        inner = inner_model(model)  # back from packed batches to attention that knows a KV cache
        inner.set_attn_implementation("sdpa" if getattr(inner, "_supports_sdpa", False) else "eager")
        inner.eval()
        self._inner = inner
        self.chat = Chat(tokenizer)
        self._context = context_length(model) or sys.maxsize
        self._sampling = sampling
        self._stop = stop_token_ids(self.chat, sampling)

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        """Raises UserError, before the first piece is asked for, when the conversation does not fit."""
        ids = self.chat.encode_prompt(messages)
        room = self._context - len(ids)
        if room < 1:
            raise UserError(f"the conversation fills the model's {self._context} tokens; start a new one")
        limited = self._sampling.model_copy(update={"max_new_tokens": min(self._sampling.max_new_tokens, room)})
        return stream_text(self.chat, stream_ids(self._inner, ids, self._stop, limited))


def talk(
    run: str, stage: str | None, temperature: float, limit: int, device: str | None = None, search: str | None = None
) -> int:
    """Reads lines until the end of the input; returns the exit code. The rest of how the model answers is the recipe's
    (`answering`), the device too where none is named. ``search``: the recipe's search that answers."""
    if stage is None and search is not None:  # the search says whose replies it goes through
        stage = getattr(find_search(run, search)[2], "model", None)
    name, source = find_model(run, stage)
    console = Console()
    how = answering(run, name)
    sampling = how.sampling.model_copy(update={"temperature": temperature, "max_new_tokens": limit})
    talker: Talker | SearchTalker
    if search is None:
        talker = Talker(source, sampling, device or how.device)
    else:
        talker = SearchTalker(run, search, source, sampling, device or how.device)
    chat, device = talker.chat, talker.device
    what = "no chat template: each line is asked by itself" if chat.plain else HELP
    console.print(f"[bold]{name}[/] from {source.path} on {device}. {what}", highlight=False)
    system: list[Message] = []
    turns: list[Message] = []
    while True:
        try:
            line = console.input("[bold cyan]> [/]").strip()
        except EOFError:
            console.print()
            return 0
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return 0
        if command in ("/reset", "/system"):
            turns = []
            if command == "/system":
                system = [Message("system", rest.strip())] if rest.strip() else []
            console.print("[dim]a new conversation" + (" with that system message[/]" if rest.strip() else "[/]"))
            continue
        if command.startswith("/"):
            console.print(f"[dim]{HELP}[/]")
            continue
        if not line:
            continue
        turns.append(Message("user", line))
        try:
            if isinstance(talker, Talker):
                reply: str | None = _print_stream(talker.reply([*system, *turns]))
            else:
                reply = _print_found(talker.find([*system, *turns]), console)
        except KeyboardInterrupt:  # of a search: nothing of it is a reply
            turns.pop()
            console.print("[dim] ... (stopped; nothing was found)[/]")
            continue
        except UserError as error:
            turns.pop()
            console.print(f"[red]{error}[/] [dim](/reset starts a new one)[/]")
            continue
        if reply is None:
            turns.pop()
        else:
            turns.append(Message("assistant", reply))


def _print_found(found: Found, console: Console) -> str | None:
    """Writes what a search found, and the reply that answers, if one does."""
    for line in shown(found):
        console.print(line, style="dim", markup=False, highlight=False)
    if found.answer is None:
        console.print("[dim]nothing that was found answers: all was cut, or says no answer[/]")
        return None
    sys.stdout.write(f"{found.answer.text}\n")
    sys.stdout.flush()
    return found.answer.text


def _print_stream(parts: Iterator[str]) -> str:
    """Writes a reply as it comes; Ctrl-C ends the reply, not the conversation."""
    reply = ""
    try:
        for part in parts:
            reply += part
            sys.stdout.write(part)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    sys.stdout.write("\n")
    return reply
