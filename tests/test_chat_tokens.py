"""What is learned and scored is what the template gives: tokenizers that put a mark before a text, and ends of turns
that only the checkpoint knows. The oracle is the tokenizer's own reading of the whole rendering."""

from __future__ import annotations

import pytest
from test_chat import GEMMA, LLAMA3, SPECIALS, dicts, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keel.data.chat import Chat
from keel.types import Demonstration, Message, UserError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}{% set content = (system if loop.first else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ASK = [Message("user", "hello world")]
SAID = [*ASK, Message("assistant", "hello you")]
TALK = [*SAID, Message("user", "how many"), Message("assistant", "four")]


def sentencepiece(template: str, style: str, marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback. ``style``: Llama 2's normalizer ("prepend"), or Metaspace's prepend_scheme."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *marks,
        "▁",
        *"helowrdyumanfit[]/INST<|>SY",
    ]
    words = ["▁hello", "▁world", "▁you", "▁how", "▁many", "▁four", "hello", "world", "you", "four"]
    merges: list[tuple[str, str]] = []
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for word in words:
        made = word[0]
        for letter in word[1:]:
            pair = (made, letter)
            made += letter
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault(made, len(vocab))
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "prepend":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        fast.decoder = decoders.Sequence(steps)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=style, split=False)
        fast.decoder = decoders.Metaspace("▁", prepend_scheme=style)
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *marks)])
    made_fast = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    made_fast.chat_template = template
    return made_fast


FAMILIES = {
    "llama2": lambda: sentencepiece(LLAMA2, "prepend"),
    "llama2, new": lambda: sentencepiece(LLAMA2, "first"),
    "mistral": lambda: sentencepiece(MISTRAL, "prepend"),
    "mistral, always": lambda: sentencepiece(MISTRAL, "always"),
    "mistral3": lambda: sentencepiece(MISTRAL3, "first", ("[INST]", "[/INST]")),
    "zephyr": lambda: sentencepiece(ZEPHYR, "prepend"),
    "llama3": lambda: tokenizer(LLAMA3, SPECIALS["llama3"]),
    "gemma": lambda: tokenizer(GEMMA, SPECIALS["gemma"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_what_the_tokenizer_makes_of_the_whole_rendering(family: str) -> None:
    tok = FAMILIES[family]()
    chat = Chat(tok)
    for messages in (SAID, TALK):
        whole = tok.apply_chat_template(dicts(messages), tokenize=True, return_dict=False)
        encoded = chat.encode_conversation(messages)
        assert list(encoded.ids) == list(whole[: len(encoded.ids)])
        rest = tok.decode(whole[len(encoded.ids) :])
        assert not rest.strip(), "what is left out is the white space behind the end"
        assert encoded.ids[-1] in chat.stop_ids
        assert encoded.mask[-1]
    prompt = chat.encode_prompt(TALK[:3])
    assert prompt == list(tok.apply_chat_template(dicts(TALK[:3]), add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_learned_behind_what_they_are_sampled_from(family: str) -> None:
    chat = Chat(FAMILIES[family]())
    encoded = chat.encode_conversation(TALK)
    starts = [i for i in range(1, len(encoded.ids)) if encoded.mask[i] and not encoded.mask[i - 1]]
    assert len(starts) == 2
    for start, turns in zip(starts, (1, 3), strict=True):
        assert list(encoded.ids[:start]) == chat.encode_prompt(TALK[:turns])
    reply = chat.encode_reply(TALK[:3], "four")
    assert reply.ids == encoded.ids
    assert reply.mask == (False,) * starts[1] + (True,) * (len(reply.ids) - starts[1])
    assert chat.decode(reply.ids[starts[1] :]).strip() == "four"


def test_the_mark_before_a_text_is_there_once() -> None:
    """Llama 2: behind [/INST] comes "▁hello"; tokenized by itself behind "[/INST] " it had been "▁" and "▁hello"."""
    tok = FAMILIES["llama2"]()
    encoded = Chat(tok).encode_conversation(SAID)
    learned = [i for i, mask in zip(encoded.ids, encoded.mask, strict=True) if mask]
    assert tok.convert_ids_to_tokens(learned) == ["▁hello", "▁you", "▁", "</s>"]


def test_a_mistral_reply_has_no_mark_of_its_own() -> None:
    tok = FAMILIES["mistral"]()
    encoded = Chat(tok).encode_conversation(SAID)
    learned = [i for i, mask in zip(encoded.ids, encoded.mask, strict=True) if mask]
    assert tok.convert_ids_to_tokens(learned) == ["hello", "▁you", "</s>"]


def test_a_reply_that_merges_with_its_prompt_is_refused_where_it_would_be_learned() -> None:
    """ChatML's prompt ends with a newline, which merges with a reply's first one."""
    tok = tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        SPECIALS["qwen"],
    )
    chat, row = Chat(tok), (*ASK, Message("assistant", "\nhello"))
    with pytest.raises(UserError, match=r"demos.jsonl, line 7: the tokenizer makes one token .*'\\nhello'"):
        chat.encode_demonstrations([Demonstration("d", row, place="demos.jsonl, line 7")])
    scored = chat.encode_reply(ASK, "\nhello")  # a policy may well have written it: after its prompt, token by token
    prompt = chat.encode_prompt(ASK)
    assert list(scored.ids[: len(prompt)]) == prompt
    assert scored.ids[len(prompt) :] == tuple(tok("\nhello<|im_end|>", add_special_tokens=False)["input_ids"])


def test_white_space_at_a_prompts_end_is_cut_as_when_it_is_sampled_from() -> None:
    """GPT-2 makes two newlines one token at a text's end and two before a letter."""
    tok = tokenizer(LLAMA3, SPECIALS["llama3"], gpt2=True)
    chat = Chat(tok)
    encoded = chat.encode_conversation(SAID)
    prompt = chat.encode_prompt(ASK)
    assert list(encoded.ids[: len(prompt)]) == prompt
    with pytest.raises(UserError, match="split it into one row for each reply"):
        chat.encode_conversation(TALK)


def test_a_reply_keeps_every_mark_but_its_end() -> None:
    tok = tokenizer(LLAMA3, [*SPECIALS["llama3"], "<think>", "</think>"])
    chat = Chat(tok)
    text = "<think>hm</think>hello<|start_header_id|>user"
    ids = chat.encode_reply(ASK, text).ids[len(chat.encode_prompt(ASK)) :]
    assert chat.decode(ids) == text
    assert chat.decode([*ids, tok.pad_token_id]) == text + "<|eot_id|>"
    again = chat.encode_reply(ASK, chat.decode(ids))
    assert again.ids[-len(ids) :] == ids


def test_the_checkpoints_ends_stop_a_reply() -> None:
    tok = tokenizer(LLAMA3, [*SPECIALS["llama3"], "<|eom_id|>"])
    tok.keel_ends = (tok.convert_tokens_to_ids("<|eom_id|>"),)
    eot, eom = tok.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])
    assert Chat(tok).stop_ids == (eot, tok.eos_token_id, eom)


def test_where_the_next_speakers_mark_ends_a_turn() -> None:
    """GLM's template writes nothing behind a reply; its generation config names the roles' marks as ends."""
    marks = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tok = tokenizer(GLM, marks)
    assert any("no stop token" in problem for problem in Chat(tok).check())
    user, seen = tok.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    tok.keel_ends = (tok.eos_token_id, user, seen)
    chat = Chat(tok)
    assert chat.end_ids == (user,)
    assert set(chat.stop_ids) == {user, seen, tok.eos_token_id}
    assert chat.check() == []
    encoded = chat.encode_conversation(TALK)
    assert encoded.ids[-1] == user
    assert (
        encoded.ids.count(user) == 3
    )  # each reply's end is the next question's beginning; the last one's stands alone
    prompt = chat.encode_prompt(TALK[:3])
    assert list(encoded.ids[: len(prompt)]) == prompt


def test_what_is_not_to_be_learned_is_shown_and_not_learned() -> None:
    chat = Chat(FAMILIES["llama3"]())
    whole = chat.encode_conversation(TALK)
    quiet = [TALK[0], Message("assistant", "hello you", learned=False), *TALK[2:]]
    encoded = chat.encode_conversation(quiet)
    assert encoded.ids == whole.ids
    assert sum(encoded.mask) == sum(chat.encode_reply(TALK[:3], "four").mask)
    first = [Message("assistant", "hello", learned=False), *TALK[2:]]
    assert chat.decode(chat.encode_conversation(first).ids).count("hello") == 1
    nothing = [TALK[0], Message("assistant", "hello you", learned=False)]
    with pytest.raises(UserError, match="nothing of this conversation is learned"):
        chat.encode_conversation(nothing)
