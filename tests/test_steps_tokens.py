"""Where steps end among a reply's tokens. The oracle is the tokenizer's own reading of what stands up to an end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import FAMILIES as BYTE_LEVEL
from test_chat import LLAMA3, SPECIALS, tokenizer
from test_chat_tokens import FAMILIES as SENTENCEPIECE
from tiny import tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keel.data.chat import Chat
from keel.data.steps import encode_steps, ends_in_tokens
from keel.recipe.steps import Steps
from keel.types import Message, UserError


def faithful(made: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a decoder that joins bytes, as these families have. test_chat_tokens' Metaspace alone writes them out."""
    fast = made.backend_tokenizer
    if type(fast.decoder) is decoders.Metaspace:
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), fast.decoder])
    return made


ASK = (Message("user", "how many?"),)
CHATS = {
    **{name: Chat(make()) for name, make in BYTE_LEVEL.items()},
    **{f"{name}, sentencepiece": Chat(faithful(make())) for name, make in SENTENCEPIECE.items()},
    "gpt2": Chat(tokenizer(LLAMA3, SPECIALS["llama3"], gpt2=True)),
    "plain": Chat(tiny_tokenizer()),
}
WAYS = (Steps(), Steps(by="blank_line"), Steps(by="marker", marker="ки"))
TEXTS = (
    "hello 2+2=4.\nhello you 4*5=20\n\nthe answer is 20",
    "  hello\n\n\n   indented\n\tfour\n",
    "2+3=5 ки\n5*2=10 ки\nhello ки",
    "héllo 🙂\n🙂🙂\n日本\nnaïve",
    "hello",
    "a\n.\n\n)\n\n\nb\n1",
)


def signs(text: str) -> str:
    return "".join(text.split())


def read(chat: Chat, ids: tuple[int, ...]) -> str:
    return signs(chat.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def assert_ends(chat: Chat, text: str, how: Steps) -> None:
    steps = how.split(text)
    assert "".join(steps) == text
    [found] = encode_steps(chat, [(ASK, steps)])
    begin = len(chat.encode_prompt(ASK))
    assert len(found.ends) == len(steps)
    assert [begin - 1, *found.ends] == sorted({begin - 1, *found.ends}), "they rise, all of them within the reply"
    for i, end in enumerate(found.ends):
        wanted = signs("".join(steps[: i + 1]))
        assert read(chat, found.row.ids[begin : end + 1]) == wanted, "what stands up to the end is the steps, no more"
        assert read(chat, found.row.ids[begin:end]) != wanted, "and no token less"
    # A reply that stops there has the same tokens and the same end.
    for i in range(1, len(steps)):
        [part] = encode_steps(chat, [(ASK, steps[:i])])
        assert part.ends == found.ends[:i]
        assert part.row.ids[: part.ends[-1] + 1] == found.row.ids[: part.ends[-1] + 1]


@pytest.mark.parametrize("name", CHATS)
def test_steps_end_on_tokens(name: str) -> None:
    for text in TEXTS:
        for how in WAYS:
            assert_ends(CHATS[name], text, how)


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="hello 12+=.\n\t)é🙂", min_size=1).filter(lambda text: text.strip()),
    st.sampled_from(["llama3", "gpt2", "llama2, sentencepiece", "plain"]),
    st.sampled_from(WAYS[:2]),
)
def test_steps_of_any_text_end_on_tokens(text: str, name: str, how: Steps) -> None:
    assert_ends(CHATS[name], text, how)


def test_a_run_of_blanks_is_looked_at_once() -> None:
    """A model that writes nothing but blanks: four times as many took sixteen times as long, and 60,000 a minute."""
    begun = time.process_time()
    for how in WAYS:
        text = "a" + " " * 100_000 + "b\n\n" + " " * 100_000 + "\n  c"
        assert "".join(how.split(text)) == text
    assert time.process_time() - begun < 2


def test_a_completions_own_tokens_count() -> None:
    """A policy may cut a text otherwise than its tokenizer would, and its end token is there too."""
    chat = CHATS["plain"]
    letters = [token for letter in "the\nship\n" for token in chat.tokenizer(letter)["input_ids"]]
    ids = [*letters, *chat.end_ids]
    assert chat.decode(ids) == "the\nship\n"
    assert ends_in_tokens(chat.tokenizer, ids, ("the\n", "ship\n")) == (2, 7)
    whole = chat.tokenizer("the\nship\n")["input_ids"]
    assert len(whole) < len(letters)
    assert ends_in_tokens(chat.tokenizer, whole, ("the\n", "ship\n")) == (0, len(whole) - 2)


def test_two_newlines_in_one_token_belong_to_the_step_before() -> None:
    """Behind ")" this family makes one token of sign and newlines: the step ends with it."""
    chat = CHATS["llama3"]
    ids = chat.tokenizer("a\n\n\nb", add_special_tokens=False)["input_ids"]
    tokens = chat.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["a", "ĊĊ", "Ċ", "b"]
    assert ends_in_tokens(chat.tokenizer, ids, ("a\n\n\n", "b")) == (0, 3)


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that has one for "a\\nb" and one for a newline with what stands around it."""
    words = ["a\nb", "a", "b", "\n", "c\n  ", "[UNK]"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("a\nb|c\n  |[^\n]|\n"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="[UNK]", unk_token="[UNK]")


def test_what_has_no_end_is_refused_in_a_sentence() -> None:
    made = merging()
    ids = made("c\n  b", add_special_tokens=False)["input_ids"]
    assert ends_in_tokens(made, ids, ("c\n", "  b")) == (0, 1), "the next step's indentation is no sign of it"
    with pytest.raises(UserError, match=r"^rows.jsonl, line 3: one token holds the end of step 1 and the beginning"):
        ends_in_tokens(made, made("a\nb", add_special_tokens=False)["input_ids"], ("a\n", "b"), "rows.jsonl, line 3")
    with pytest.raises(UserError, match="does not give the reply back as it stands"):
        ends_in_tokens(made, made("a\nx", add_special_tokens=False)["input_ids"], ("a\n", "x"))
    with pytest.raises(UserError, match="step 2 is blank"):
        ends_in_tokens(CHATS["plain"].tokenizer, CHATS["plain"].tokenizer("a\n\n")["input_ids"], ("a\n", "\n"))


def letters_and(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters and of ``words``, the longest first; it has no z."""
    known = [*words, *"abcdegklmnrstuwx.,;:0123456789+=\n <>|/_", "[UNK]"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(known))}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, words), "[^z]|z"])), "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="[UNK]", unk_token="[UNK]")


MERGING = Chat(letters_and("a\nb", "...", "..", ".\n", "  "))
MARKED = Steps(by="marker", marker=".")
SPACED = Steps(by="marker", marker=" ")


def pieces_by_hand(text: str, ends: Sequence[int]) -> list[int]:
    """The tokens of ``text`` cut at ``ends``, each piece by itself."""
    return [i for a, b in pairwise([0, *ends, len(text)]) for i in MERGING.tokenizer(text[a:b])["input_ids"]]


@pytest.mark.parametrize(
    ("text", "how", "ends", "cuts"),
    [
        ("a\nb", Steps(), (0, 2), [2]),  # one token for all three
        ("a\nb\na\nb", Steps(), (0, 2, 4, 6), [2, 6]),  # and of both steps; between them nothing is amiss
        ("d...e", MARKED, (1, 2, 3, 4), [2, 3]),
        ("d.e", MARKED, (1, 2), []),
        ("d\nze\ne", Steps(), (0, 3, 5), [5]),  # read as [UNK] from there on
    ],
)
def test_a_step_within_a_token_is_read_to_its_own_end(
    text: str, how: Steps, ends: tuple[int, ...], cuts: list[int]
) -> None:
    """Counted by hand: a letter is a token, but for those that the tokenizer has as one."""
    [found] = encode_steps(MERGING, [(ASK, how.split(text))])
    begin = len(found.row.prompt_ids)
    assert list(found.row.ids[begin:]) == pieces_by_hand(text, cuts)
    assert tuple(end - begin for end in found.ends) == ends
    assert found.in_pieces == bool(cuts)


def assert_as_if_it_stopped(chat: Chat, text: str, how: Steps) -> None:
    """A step's end and all tokens up to it are those that the reply has if it stops there."""
    steps = how.split(text)
    whole = encode_steps(chat, [(ASK, steps)])[0]
    assert len(whole.ends) == len(steps)
    assert all(a < b for a, b in pairwise(whole.ends)), "each has an end of its own"
    parts = encode_steps(chat, [(ASK, steps[:i]) for i in range(1, len(steps))])
    for i, part in enumerate(parts, 1):
        assert part.ends == whole.ends[:i]
        assert part.row.ids[: part.ends[-1] + 1] == whole.row.ids[: part.ends[-1] + 1]


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab.\n dz", min_size=1, max_size=14).filter(lambda text: text.strip()),
    st.sampled_from([*WAYS[:2], MARKED, SPACED]),
)
def test_no_reply_of_a_model_is_refused_and_no_score_sees_what_follows(text: str, how: Steps) -> None:
    assert "".join(how.split(text)) == text
    assert all(step.strip() for step in how.split(text))
    assert_as_if_it_stopped(MERGING, text, how)


@pytest.mark.parametrize("name", CHATS)
def test_nor_by_any_tokenizer(name: str) -> None:
    """Markers that tokens hold together with other steps, a cut character, and marks of the tokenizer's own."""
    for text in ("hello... you. \ufffd\ufffd4)).\n).)", "2..\n\n.3  .\n.a", "日..本.\ufffd"):
        for how in (MARKED, Steps(by="marker", marker=")"), Steps(), SPACED):
            assert_as_if_it_stopped(CHATS[name], text, how)
    assert_as_if_it_stopped(Chat(SENTENCEPIECE["mistral, always"]()), "hello\nyou\n2+2", Steps())  # writes bytes out


def test_many_steps_within_tokens_are_looked_at_once() -> None:
    begun = time.process_time()
    [found] = encode_steps(MERGING, [(ASK, MARKED.split("d..." * 300))])
    assert len(found.ends) == 900
    assert time.process_time() - begun < 3


def test_a_marker_of_white_space_makes_no_blank_steps() -> None:
    assert SPACED.split("a  b c") == ("a  ", "b ", "c")
    assert SPACED.split("  a \n b ") == ("  a \n ", "b ")
    assert Steps(by="marker", marker="\t ").split("a\t \t b\t ") == ("a\t \t ", "b\t ")
    assert SPACED.split("   ") == ("   ",)
