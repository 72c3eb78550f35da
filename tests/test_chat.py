"""Chat templates: token ids and loss masks against transformers' own rendering, over templates of several families."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import keel.data.tokens
from keel.data.chat import BUILT_IN, Chat, install_template
from keel.types import Demonstration, Encoded, Message, UserError

# Written for these tests after the habits of the families they are named for.
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set last = namespace(user=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > last.user and (loop.last or thought) %}"
    "{%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{%- endif %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN25 = (  # writes a system message of its own when there is none
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NO_END = (  # no token ends a turn
    "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
OTHER_PROMPT = (  # the prompt does not look like the conversation
    "{%- if add_generation_prompt %}{{- 'Now answer: ' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{%- endfor %}"
)
SPECIALS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
}
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ċ", "Ċ"), ("u", "s"), ("e", "r"), ("us", "er")]

HELLO = [Message("user", "hello world")]
SHORT = [*HELLO, Message("assistant", "hello hello")]
LONG = [*SHORT, Message("user", "how many?"), Message("assistant", "three.\nOr four"), Message("user", "hm"),
        Message("assistant", "Five")]  # fmt: skip
SYSTEM = [Message("system", "Be brief."), *LONG]


def tokenizer(
    template: str | None = None,
    specials: list[str] | None = None,
    add_bos: bool = False,
    pad_is_eos: bool = True,
    gpt2: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, cut as Llama 3 and Qwen cut texts (``gpt2``: as GPT-2 does); two newlines are
    one token, so borders between segments matter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    words = r" ?[a-zA-Z]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = [] if gpt2 else [pre_tokenizers.Split(Regex(words), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True) for t in ["<s>", "</s>", "<pad>", *(specials or [])]])
    if add_bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<pad>"
    )
    wrapped.chat_template = template
    return wrapped


def built_in(name: str, add_bos: bool = False) -> PreTrainedTokenizerFast:
    made = tokenizer(add_bos=add_bos)
    install_template(made, name)
    return made


FAMILIES = {
    "keel": lambda: built_in("keel"),
    "chatml": lambda: built_in("chatml"),
    "keel with bos": lambda: built_in("keel", add_bos=True),
    "llama3": lambda: tokenizer(LLAMA3, SPECIALS["llama3"], add_bos=True),
    "gemma": lambda: tokenizer(GEMMA, SPECIALS["gemma"], add_bos=True),
    "qwen2.5": lambda: tokenizer(QWEN25, SPECIALS["qwen"]),
    "qwen3": lambda: tokenizer(QWEN3, SPECIALS["qwen"]),
}
END = {
    "keel": "<|turn|>",
    "chatml": "<|im_end|>",
    "keel with bos": "<|turn|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def learned_runs(tok: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The text of each unbroken run of the mask, special tokens shown."""
    runs: list[list[int]] = []
    before = False
    for token, learned in zip(encoded.ids, encoded.mask, strict=True):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(token)
        before = learned
    return [tok.decode(run, clean_up_tokenization_spaces=False) for run in runs]


# ----------------------------------------------------------------------------------------------- each family alike


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_what_transformers_renders(family: str) -> None:
    tok = FAMILIES[family]()
    for messages in (HELLO, LONG[:3], LONG[:5]):
        expected = tok.apply_chat_template(dicts(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = Chat(tok).encode_prompt(messages)
        assert ids == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_starts_with_its_prompt_and_ends_with_the_stop_token(family: str) -> None:
    tok = FAMILIES[family]()
    chat = Chat(tok)
    end = tok.convert_tokens_to_ids(END[family])
    assert chat.end_ids == (end,)
    assert chat.stop_ids == (end, tok.eos_token_id)
    for messages in (HELLO, LONG[:3], LONG[:5]):
        prompt = chat.encode_prompt(messages)
        # "\n" at the reply's start would merge with the prompt's last newline if both were tokenized together.
        for reply in ("hello", "hello world, and\nmore", "", "x" + "\n"):
            encoded = chat.encode_reply(messages, reply)
            assert list(encoded.ids[: len(prompt)]) == prompt
            assert encoded.ids[-1] == end
            assert encoded.mask == (False,) * len(prompt) + (True,) * (len(encoded.ids) - len(prompt))
            kept = reply.strip() if family in ("llama3", "gemma") else reply
            assert chat.decode(encoded.ids[len(prompt) :]) == kept
            cut = chat.encode_reply(messages, reply, finished=False)
            assert (cut.ids, cut.mask) == (encoded.ids[:-1], encoded.mask[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_learns_each_reply_with_its_end_and_nothing_else(family: str) -> None:
    tok = FAMILIES[family]()
    chat = Chat(tok)
    encoded = chat.encode_conversation(LONG)
    end = END[family]
    assert learned_runs(tok, encoded) == [f"hello hello{end}", f"three.\nOr four{end}", f"Five{end}"]
    alone = chat.encode_reply(LONG[:5], "Five")  # scored after a history: the earlier replies are no longer learned
    assert learned_runs(tok, alone) == [f"Five{end}"]
    assert alone.ids == encoded.ids
    # Before each learned reply stands what encode_prompt gives at inference.
    starts = [i for i in range(1, len(encoded.ids)) if encoded.mask[i] and not encoded.mask[i - 1]]
    for start, turns in zip(starts, (1, 3, 5), strict=True):
        assert list(encoded.ids[:start]) == chat.encode_prompt(LONG[:turns])
    assert chat.encode_conversation(SHORT) == chat.encode_reply(HELLO, "hello hello")
    if family != "qwen3":  # its last reply is rendered with an empty thought, which check reports
        full = tok.apply_chat_template(dicts(LONG), tokenize=False)
        assert full.removesuffix("\n") == tok.decode(encoded.ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("template", "specials"),
    [
        (
            "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
            "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
            "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
            SPECIALS["qwen"],
        ),
        (
            "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<start_of_turn>model\n' }}"
            "{%- generation %}{{- m.content + '<end_of_turn>' }}{%- endgeneration %}{{- '\n' }}{%- else %}"
            "{{- '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}",
            SPECIALS["gemma"],
        ),
    ],
)
def test_mask_equals_the_one_that_generation_markers_give(template: str, specials: list[str]) -> None:
    """transformers computes a mask by itself from templates that mark what the assistant generates (TRL's masks)."""
    tok = tokenizer(template, specials)
    for messages in (SHORT, LONG):
        oracle = tok.apply_chat_template(dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
        encoded = Chat(tok).encode_conversation(messages)
        # What the template writes after the last end token is never sampled and not kept.
        assert list(encoded.ids) == oracle["input_ids"][: len(encoded.ids)]
        assert [int(learned) for learned in encoded.mask] == oracle["assistant_masks"][: len(encoded.ids)]
        assert not any(oracle["assistant_masks"][len(encoded.ids) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_is_never_doubled(family: str) -> None:
    tok = FAMILIES[family]()
    chat = Chat(tok)
    bos = tok.bos_token_id
    expected = 1 if family in ("keel with bos", "llama3", "gemma") else 0
    for ids in (chat.encode_prompt(HELLO), chat.encode_conversation(LONG).ids, chat.encode_reply(HELLO, "hello").ids):
        assert list(ids).count(bos) == expected
        assert ids[:1] == type(ids)([bos]) or not expected
    text = chat.encode_text("hello world")
    assert list(text.ids).count(bos) == (1 if tok("x")["input_ids"][0] == bos else 0)


@pytest.mark.parametrize("family", ["keel", "chatml", "llama3", "qwen2.5", "qwen3"])
def test_system_messages_are_not_learned(family: str) -> None:
    tok = FAMILIES[family]()
    encoded = Chat(tok).encode_conversation(SYSTEM)
    assert len(learned_runs(tok, encoded)) == 3
    assert "Be brief." in tok.decode(encoded.ids)
    assert not any("brief" in run for run in learned_runs(tok, encoded))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_single_calls(family: str) -> None:
    chat = Chat(FAMILIES[family]())
    prompts = [HELLO, LONG[:3], LONG[:5], HELLO]
    assert chat.encode_prompts(prompts) == [chat.encode_prompt(p) for p in prompts]
    replies = [(p, f"reply {i}", i % 2 == 0) for i, p in enumerate(prompts)]
    assert chat.encode_replies(replies) == [chat.encode_reply(m, text, finished) for m, text, finished in replies]
    assert (chat.encode_prompts([]), chat.encode_replies([])) == ([], [])
    demonstrations = [Demonstration("a", tuple(LONG)), Demonstration("b", (Message("assistant", "hello"),), plain=True)]
    expected = [chat.encode_conversation(LONG), chat.encode_text("hello")]
    assert chat.encode_demonstrations(demonstrations) == expected


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3"])
def test_check_is_silent_about_sound_templates(family: str) -> None:
    assert Chat(FAMILIES[family]()).check() == []


# ------------------------------------------------------------------------------------------------ one trap at a time


def test_eos_is_learned_although_it_is_the_pad_token() -> None:
    tok = tokenizer(pad_is_eos=True)
    assert tok.pad_token_id == tok.eos_token_id
    chat = Chat(tok)
    for encoded in (chat.encode_text("hello"), chat.encode_reply(HELLO, "hello"), chat.encode_conversation(SHORT)):
        assert encoded.ids[-1] == tok.eos_token_id
        assert encoded.mask[-1]


def test_plain_mode_asks_the_last_question() -> None:
    tok = tokenizer(add_bos=True)
    chat = Chat(tok)
    assert chat.plain
    assert chat.stop_ids == chat.end_ids == (tok.eos_token_id,)
    assert tok.decode(chat.encode_prompt(LONG[:5])) == "<s>hm\n"
    assert tok.decode(chat.encode_reply(HELLO, "yes").ids) == "<s>hello world\nyes</s>"
    assert learned_runs(tok, chat.encode_conversation(SHORT)) == ["hello hello</s>"]
    assert any("no chat template" in problem for problem in chat.check())
    for messages in (LONG, SYSTEM[:3]):
        with pytest.raises(UserError, match=r"no chat template.*model\.chat_template"):
            chat.encode_conversation(messages)
    with pytest.raises(UserError, match="needs a user message"):
        chat.encode_prompt([Message("system", "x")])


def test_text_ends_with_one_eos_and_leaves_bos_unlearned() -> None:
    tok = tokenizer(add_bos=True)
    chat = Chat(tok)
    hello = tok.convert_tokens_to_ids("hello")
    bos, eos = tok.bos_token_id, tok.eos_token_id
    assert chat.encode_text("hello") == Encoded((bos, hello, eos), (False, True, True))
    assert chat.encode_text("hello</s>") == Encoded((bos, hello, eos), (False, True, True))
    assert chat.encode_text("hello", finished=False) == Encoded((bos, hello), (False, True))


def test_prompts_that_do_not_wait_and_conversations_without_a_reply() -> None:
    chat = Chat(built_in("keel"))
    for messages in ([], SHORT):
        with pytest.raises(UserError, match="wait for the assistant"):
            chat.encode_prompt(messages)
    for messages in ([], HELLO, LONG[:5]):
        with pytest.raises(UserError, match="end with an assistant message"):
            chat.encode_conversation(messages)
    with pytest.raises(UserError, match="demonstration d7: a conversation"):
        chat.encode_demonstrations([Demonstration("d7", tuple(HELLO))])


def test_a_template_without_a_system_role_says_so() -> None:
    chat = Chat(FAMILIES["gemma"]())
    with pytest.raises(UserError, match=r"roles system, user: System role not supported.*chat_template"):
        chat.encode_prompt(SYSTEM[:2])


def test_thinking_stripped_from_history() -> None:
    tok = FAMILIES["qwen3"]()
    chat = Chat(tok)
    thought = [*HELLO, Message("assistant", "<think>\nhm\n</think>\n\nYes"), Message("user", "why?")]
    # At inference the model is given what the template writes: history without the thought.
    rendered = tok.apply_chat_template(dicts(thought), add_generation_prompt=True, tokenize=False)
    assert "hm" not in rendered
    assert tok.decode(chat.encode_prompt(thought), clean_up_tokenization_spaces=False) == rendered
    # Learned in one piece, the second reply would see what it never sees at inference.
    with pytest.raises(UserError, match=r"before message 4 differently .*at character \d+: .*<think>"):
        chat.encode_conversation([*thought, Message("assistant", "Because")])
    assert learned_runs(tok, chat.encode_conversation(thought[:2])) == ["<think>\nhm\n</think>\n\nYes<|im_end|>"]
    problems = " ".join(chat.check())
    assert "strips thinking" in problems
    assert r"'<think>\n\n</think>\n\n' between" in problems


def test_a_prompt_that_is_no_prefix_of_the_rendering_is_refused() -> None:
    chat = Chat(tokenizer(OTHER_PROMPT, SPECIALS["qwen"]))
    with pytest.raises(UserError, match=r"full rendering .*at character 1: 'Now answer"):
        chat.encode_conversation(SHORT)
    assert any("full rendering" in problem for problem in chat.check())


def test_a_template_without_a_stop_token_falls_back_to_eos() -> None:
    tok = tokenizer(NO_END)
    chat = Chat(tok)
    assert chat.end_ids == chat.stop_ids == (tok.eos_token_id,)
    assert learned_runs(tok, chat.encode_conversation(SHORT)) == ["hello hello</s>"]
    assert any("no stop token" in problem for problem in chat.check())
    with pytest.raises(UserError, match="before message 4 differently"):
        chat.encode_conversation(LONG)


def test_templates_that_trim_give_the_trimmed_reply() -> None:
    tok = FAMILIES["llama3"]()
    ragged = [*HELLO, Message("assistant", "  hello \n"), Message("user", "so?"), Message("assistant", "yes \n")]
    assert learned_runs(tok, Chat(tok).encode_conversation(ragged)) == ["hello<|eot_id|>", "yes<|eot_id|>"]
    kept = built_in("keel")
    assert learned_runs(kept, Chat(kept).encode_conversation(ragged)) == ["  hello \n<|turn|>", "yes \n<|turn|>"]


@pytest.mark.parametrize(
    ("how", "reply"),
    [
        (".lstrip()", " \n hello \n"),
        (".rstrip()", "  hello \n"),
        (".strip('\n')", "\n  hello \n"),
        (".lstrip('\n')", "\n hello \n"),
        ("", "  hello \n"),
    ],
)
def test_a_template_takes_white_space_off_one_side_and_of_one_kind(how: str, reply: str) -> None:
    """transformers renders the whole; the row's own white space stands where the template leaves it."""
    tok = tokenizer(LLAMA3.replace(" | trim", how), SPECIALS["llama3"])
    ragged = [*HELLO, Message("assistant", reply), Message("user", "so?"), Message("assistant", reply)]
    encoded = Chat(tok).encode_conversation(ragged)
    assert list(encoded.ids) == tok.apply_chat_template(dicts(ragged), return_dict=False)
    assert Chat(tok).encode_prompt(ragged[:3]) == tok.apply_chat_template(
        dicts(ragged[:3]), add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("marks", [["[gMASK]", "<sop>"], ["</s>"]])
def test_what_the_tokenizer_puts_before_a_text_stands_there(marks: list[str]) -> None:
    """GLM's two tokens, XGLM's end of text: whatever it is, not BOS alone."""
    tok = tokenizer(specials=marks)
    before = tok.convert_tokens_to_ids(marks)
    written = " ".join([*marks, "$A"])
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=written, pair=f"{written} $B", special_tokens=list(zip(marks, before, strict=True))
    )
    text, chat = tok("hello world")["input_ids"], Chat(tok)
    assert text[: len(marks)] == before
    assert chat.encode_text("hello world", finished=False) == Encoded(
        tuple(text), (False,) * len(marks) + (True,) * (len(text) - len(marks))
    )
    assert chat.encode_prompt(HELLO) == tok("hello world\n")["input_ids"]
    for name in BUILT_IN:
        install_template(tok, name)
        templated = Chat(tok)
        assert templated.encode_prompt(HELLO)[: len(marks)] == before
        assert list(templated.encode_conversation(LONG).ids).count(before[0]) == 1
        assert templated.check() == []
    tok.chat_template = QWEN25
    assert f"starts a text with {''.join(marks)} and the template does not" in " ".join(Chat(tok).check())


def test_of_several_templates_one_is_named() -> None:
    tok = tokenizer(specials=[*SPECIALS["qwen"], *SPECIALS["llama3"]])
    tok.chat_template = {"tool_use": QWEN25, "rag": LLAMA3}
    with pytest.raises(UserError, match=r"templates tool_use, rag and none called default; .*model\.chat_template"):
        Chat(tok)
    assert Chat(tok, template="rag").encode_prompt(HELLO) == tok.apply_chat_template(
        dicts(HELLO), chat_template=LLAMA3, add_generation_prompt=True, return_dict=False
    )
    install_template(tok, "tool_use")
    assert tok.chat_template == QWEN25
    tok.chat_template = {"rag": LLAMA3, "default": QWEN25}
    assert Chat(tok).template == QWEN25


@pytest.mark.parametrize(
    ("template", "specials", "words"),
    [
        ("{{ bos_token }}" + LLAMA3, SPECIALS["llama3"], "<s> twice"),
        (LLAMA3.replace("{{- bos_token }}", ""), SPECIALS["llama3"], "with <s> and the template does not"),
        (LLAMA3, ["<|eot_id|>"], "<|start_header_id|>, <|end_header_id|>, which the tokenizer cuts up"),
        (LLAMA3 + "{#- strftime_now -#}", SPECIALS["llama3"], "today's date"),
    ],
)
def test_check_finds(template: str, specials: list[str], words: str) -> None:
    problems = Chat(tokenizer(template, specials, add_bos=True)).check()
    assert len(problems) == 1
    assert words in problems[0]


def test_templates_that_cannot_serve() -> None:
    with pytest.raises(UserError, match="does not write the assistant's messages"):
        Chat(tokenizer("{{ messages[0].content }}"))
    with pytest.raises(UserError, match="the chat template refuses"):
        Chat(tokenizer("{% for m in messages %}"))


# ------------------------------------------------------------------------------------------------------- installing


@pytest.mark.parametrize("name", BUILT_IN)
def test_install_adds_what_is_missing_and_survives_saving(name: str, tmp_path: Path) -> None:
    tok = tokenizer(specials=["<kept>"])
    size = len(tok)
    added = install_template(tok, name)
    assert added == len(BUILT_IN[name]) == len(tok) - size
    assert install_template(tok, name) == 0
    tok.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert Chat(again).encode_conversation(LONG) == Chat(tok).encode_conversation(LONG)
    assert Chat(again).stop_ids == Chat(tok).stop_ids
    encoded = Chat(again).encode_conversation(LONG)
    assert "<" not in again.decode(encoded.ids, skip_special_tokens=True)  # the new tokens are special
    assert Chat(again).decode(encoded.ids).endswith("Five")
    assert again.decode(again("<kept>")["input_ids"], skip_special_tokens=True) == ""


def test_keel_writes_turns_without_anything_between() -> None:
    tok = built_in("keel")
    assert tok.decode(Chat(tok).encode_conversation(SYSTEM[:3]).ids) == (
        "<|system|>Be brief.<|turn|><|user|>hello world<|turn|><|assistant|>hello hello<|turn|>"
    )


def test_install_makes_ordinary_tokens_special_in_place() -> None:
    tok = tokenizer()
    tok.add_tokens(["<|im_start|>", "<|im_end|>"])
    ids = tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert install_template(tok, "chatml") == 0
    assert tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == ids
    assert Chat(tok).end_ids == (ids[1],)


def test_a_jinja_file_and_a_template_for_one_chat(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(QWEN25)
    tok = tokenizer(specials=SPECIALS["qwen"])
    chat = Chat(tok, template=str(path))
    assert tok.chat_template is None  # lent to this chat only
    assert "You help." in tok.decode(chat.encode_prompt(HELLO))
    assert install_template(tok, str(path)) == 0
    assert Chat(tok).encode_prompt(HELLO) == chat.encode_prompt(HELLO)
    with pytest.raises(UserError, match=r"'nowhere\.jinja' is neither a built-in template"):
        install_template(tok, "nowhere.jinja")
    with pytest.raises(UserError, match=r"lacks the keel template's tokens <\|system\|>"):
        Chat(tok, template="keel")


def test_many_replies_cost_one_call_of_the_tokenizer_and_a_rendering_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand take a second so, and a minute one by one."""
    chat = Chat(built_in("keel"))
    replies = [([Message("user", f"hello {i // 4} user")], f"hello number {i}", True) for i in range(40)]
    one_by_one = [chat.encode_reply(*reply) for reply in replies]
    calls: list[str] = []
    for owner, name in ((Chat, "_render_prompt"), (keel.data.tokens, "token_ids")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, plain=plain: (calls.append(name), plain(*a))[1])
    assert chat.encode_replies(replies) == one_by_one
    assert Counter(calls) == {"_render_prompt": 10, "token_ids": 1}
