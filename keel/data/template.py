"""Chat templates by name or file, and what a tokenizer puts around them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from keel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = {
    "keel": ("<|system|>", "<|user|>", "<|assistant|>", "<|turn|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""Keel's own templates (``templates/NAME.jinja``) and the special tokens that each one writes."""


def template_text(name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name_or_path in BUILT_IN:
        text = (Path(__file__).parent / "templates" / f"{name_or_path}.jinja").read_text(encoding="utf-8").rstrip("\n")
        # A template's text is all a model sees, here and in any server, so a BOS the model knows must stand in it.
        return "{{- bos_token -}}\n" + text if bos_that_tokenizer_adds(tokenizer) else text
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.chat_template: {name_or_path!r} is neither a built-in template ({', '.join(BUILT_IN)}) nor a "
            f"readable Jinja file ({error})"
        ) from error


def bos_that_tokenizer_adds(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token's text when the tokenizer itself puts one before a text, else ""."""
    ids = tokenizer("a")["input_ids"]
    bos: str | None = tokenizer.bos_token
    return bos if bos and ids and ids[0] == tokenizer.bos_token_id else ""


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that can end a turn: special tokens, which no ordinary text turns into."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {i for i in tokenizer.all_special_ids if i != tokenizer.bos_token_id}
