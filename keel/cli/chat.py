"""``keel chat``: a conversation with a run's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from keel.cli.finished import find_model, loading
from keel.data.chat import Chat
from keel.model.checkpoint import load_policy
from keel.model.held import is_held
from keel.model.modules import context_length, inner_model
from keel.precision import autocast, pick_precision
from keel.recipe.sections import Source
from keel.run import resolve_device
from keel.types import Message, UserError

HELP = "/reset starts anew, /system TEXT sets the system message, /quit (or Ctrl-D) ends"


def stream_ids(model: Any, ids: Sequence[int], stop: Sequence[int], temperature: float, limit: int) -> Iterator[int]:
    """Samples a reply token by token with a KV cache; ends before a stop token or after ``limit`` tokens."""
    device = next(model.parameters()).device
    step, past = torch.tensor([list(ids)], device=device), None
    for _ in range(limit):
        with torch.no_grad(), autocast(str(device), "bf16" if is_held(model) else "fp32"):
            output = model(input_ids=step, past_key_values=past, use_cache=True)
        past, logits_V = output.past_key_values, output.logits[0, -1].float()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1))
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

    def __init__(self, source: Source, temperature: float, limit: int) -> None:
        self.device = resolve_device("auto")
        with loading():
            products = pick_precision("auto", self.device)
            model, tokenizer = load_policy(source, device=self.device, products=products)
        inner = inner_model(model)  # back from packed batches to attention that knows a KV cache
        inner.set_attn_implementation("sdpa" if getattr(inner, "_supports_sdpa", False) else "eager")
        inner.eval()
        self._inner = inner
        self.chat = Chat(tokenizer)
        self._context = context_length(model) or sys.maxsize
        self._temperature, self._limit = temperature, limit

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        """Raises UserError, before the first piece is asked for, when the conversation does not fit."""
        ids = self.chat.encode_prompt(messages)
        room = self._context - len(ids)
        if room < 1:
            raise UserError(f"the conversation fills the model's {self._context} tokens; start a new one")
        limit = min(self._limit, room)
        return stream_text(self.chat, stream_ids(self._inner, ids, self.chat.stop_ids, self._temperature, limit))


def talk(run: str, stage: str | None, temperature: float, limit: int) -> int:
    """Reads lines until the end of the input; returns the exit code."""
    name, source = find_model(run, stage)
    console = Console()
    talker = Talker(source, temperature, limit)
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
            pieces = talker.reply([*system, *turns])
        except UserError as error:
            turns.pop()
            console.print(f"[red]{error}[/] [dim](/reset starts a new one)[/]")
            continue
        reply = _print_stream(pieces)
        turns.append(Message("assistant", reply))


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
