"""Ledgers: hand-written verdicts on what replies may hold, the traps' readings, and what voting among simulated
bookkeepers can and cannot do."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from keel.cli import main
from keel.data.chat import Chat
from keel.data.sources import read_demonstrations, read_prompts
from keel.harbor import ledger, ledger_build
from keel.harbor.build import SHIPPED, SHIPPED_LEDGER
from keel.harbor.export import export_reasoning
from keel.harbor.judge import judge
from keel.harbor.ledger import Bookkeeping, first_error, gold_steps, make_demonstrations, make_prompts, write_reply
from keel.harbor.ledger_entries import KINDS, Entry
from keel.model.checkpoint import frozen, load_policy
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.rollout.collect import stop_token_ids, with_decoded_text
from keel.rollout.sampler import make_sampler
from keel.types import Message, Prompt, UserError

STEPS = Steps(by="line", marker=None)


def store(start: int, *entries: tuple[str, int, int], answer: str, bound: int | None = None) -> Prompt:
    meta: dict[str, Any] = {
        "answer": answer, "form": "number" if bound is None else "yes_no", "lines": len(entries), "traps": [],
        "start": start, "entries": [list(entry) for entry in entries], "bound": bound,
    }  # fmt: skip
    return Prompt("ledger-1", (Message("user", "A ledger."),), "ledger", meta)


# 20, +5 = 25, 3 ships with 4 each = 37, 8 go out and 2 come back = 31
PROMPT = store(20, ("in", 5, 0), ("each", 4, 3), ("back", 8, 2), answer="31")
ENOUGH = store(20, ("in", 5, 0), ("each", 4, 3), ("back", 8, 2), answer="yes", bound=25)
GOOD = "5 in: 20+5=25\n3 ships, 4 each: 25+12=37\n8 out, 2 back: 37-6=31\nAnswer: 31."

# Replies to PROMPT, with the first wrong line (None: none) and whether its answer and all of its lines are right.
VERDICTS = [
    (GOOD, None, True, True),
    ("20 + 5 = 25\n25 + 12 = 37\n37 - 6 = 31\nThe answer is 31", None, True, True),
    ("20 plus 5 makes 25.\n25 + 3x4 = 37\n37 - 8 + 2 = 31\nAnswer: 31.", 2, True, False),  # 8 out is not all of it
    ("20+5=25\n3*4=12\n25+12=37\n8-2=6\n37-6=31\nAnswer: 31.", None, True, True),  # asides on an entry's numbers
    ("**20+5=25**\n25 + **12** = **37**\n37-6=31\nAnswer: **31**.", None, True, True),
    ("20+5+12=37\n37-6=31\nAnswer: 31.", None, True, True),  # two entries in a line
    ("20+5=25 25+12=37\n37-6=31\nAnswer: 31.", None, True, True),
    # one bit wrong: the sum, the operands, what follows
    ("20+5=26\n26+12=38\n38-6=32\nAnswer: 32.", 0, False, False),
    ("20+5=25\n25+4=29\n29-6=23\nAnswer: 23.", 1, False, False),  # the trap
    ("20+5=25\n26+12=38\n38-6=32\nAnswer: 32.", 1, False, False),
    ("5 in: 20+5=25\n9 ships, 4 each: 25+12=37\n37-6=31\nAnswer: 31.", 1, True, False),  # a number that no entry has
    # lines that are missing, in another order, or too many
    ("20+5=25\n37-6=31\nAnswer: 31.", 1, True, False),
    ("20+5=25\n25+12=37\nAnswer: 31.", 2, True, False),
    ("20+12=32\n32+5=37\n37-6=31\nAnswer: 31.", 0, True, False),
    (GOOD.replace("\nAnswer", "\n31-6=25\nAnswer"), 3, True, False),
    ("Answer: 31.", 0, True, False),
    ("20+5=25\n25+12=37\n37-6=31", None, False, True),  # cut before its answer
    ("", None, False, False),
    # lines that say nothing new are no errors, and no work
    (GOOD.replace("25+12", "25+12=37\n3 ships, 4 each: 25+12"), None, True, True),
    ("There are 20.\n" + GOOD + "\nThank you.", None, True, True),
    (GOOD.replace("\nAnswer", "\n5 in: 20+5=25\nAnswer"), None, True, True),
    ("There are 21.\n" + GOOD, 0, True, False),  # restated wrongly
    ("1+1=2\n" + GOOD, 0, True, False),  # true and beside the point
    ("20=20\n" + GOOD, 0, True, False),
    ("20+5=\n" + GOOD, 0, True, False),
    ("20+5=25\n20+5=25\n20+5=25\nAnswer: 31.", 3, True, False),
    ("1. 20+5=25\nStep 2. 3 ships, 4 each: 25+12=37\n37-6=31\nAnswer: 31.", None, True, True),
    (GOOD.replace("3 ships", "2 ships"), 1, True, False),  # the line's number is none of the entry's
    (GOOD.replace("\n3 ships", "\n7 in: 20+5=25\n3 ships"), 1, True, False),  # a sum that was, behind another clause
    (GOOD.replace("\n3 ships", "\n20 left.\n3 ships"), 1, True, False),  # 20 are there at first, and 25 are left
    (GOOD.replace("\n3 ships", "\n25 left.\n3 ships"), None, True, True),
    ("9" * 5000 + "+1=2\n" + GOOD, 0, True, False),  # more digits than Python reads
    # the answer line
    (GOOD.replace("31.", "32."), 3, False, True),
    (GOOD + "\nAnswer: 32.", 4, False, True),  # two answers are none
    (GOOD.replace("31.", "31 or 32."), 3, False, True),
    (GOOD.replace("31.", "many."), 3, False, True),
    (GOOD.replace("31.", "131."), 3, False, True),
]


@pytest.mark.parametrize(("text", "error", "correct", "lines_right"), VERDICTS)
def test_a_reply_is_read_as_it_stands(text: str, error: int | None, correct: bool, lines_right: bool) -> None:
    flags = judge(PROMPT, text).flags
    assert (first_error(PROMPT, text), flags["correct"], flags["lines_right"]) == (error, correct, lines_right)
    assert flags["lucky"] == (not lines_right if correct else None)


def test_each_bit_says_what_is_wrong_with_a_line() -> None:
    steps = ["20+5=26\n", "26+4=30\n", "37-6=31\n", "Thanks!\n", "Answer: 31."]
    bits = [(line.role, line.sum_true, line.operands_right, line.follows) for line in ledger.read_lines(PROMPT, steps)]
    assert bits == [
        ("sum", False, True, True),
        ("sum", True, False, True),
        ("sum", True, False, False),
        ("note", True, True, True),
        ("answer", False, False, False),
    ]


def test_a_step_is_as_good_as_all_before_it_and_needs_none_after_it() -> None:
    """What search relies on: a beginning has the marks that it has in the whole."""
    steps = STEPS.split("20+5=25\nThere are 25.\n25+4=29\n29-6=23\nAnswer: 31.")
    whole = gold_steps(PROMPT, steps)
    assert whole == [1, 1, 0, 0, 0]
    assert all(gold_steps(PROMPT, steps[:n]) == whole[:n] for n in range(len(steps)))


def test_steps_of_several_lines_are_as_good_as_their_worst() -> None:
    assert gold_steps(PROMPT, ["20+5=25\n25+12=37\n\n", "37-6=31\nAnswer: 31."]) == [1, 1]
    assert gold_steps(PROMPT, ["20+5=25\n25+12=37\n\n", "37-6=31\nAnswer: 32."]) == [1, 0]
    assert gold_steps(PROMPT, ["20+5=25\n25+4=29\n\n", "29-6=23\nAnswer: 31."]) == [0, 0]


def test_a_line_that_works_two_entries_counts_for_both() -> None:
    for text in ("20+5+12=37\n37-6=31\nAnswer: 31.", "20+5=25 25+12=37\n37-6=31\nAnswer: 31."):
        assert judge(PROMPT, text).score == 1
    assert judge(PROMPT, "20+5+12=37\n37-8=29").score == pytest.approx(1 / 3)


def test_repeated_lines_earn_nothing() -> None:
    half = "20+5=25\n"
    once, often = judge(PROMPT, half), judge(PROMPT, half * 9)
    assert once.score == often.score == pytest.approx(0.5 / 3)
    assert judge(PROMPT, GOOD).score == 1


def test_a_right_yes_with_wrong_working_is_lucky() -> None:
    fell = "20+5=25\n25+4=29\n29-3=26\nAnswer: yes."
    assert judge(ENOUGH, fell).flags == {"answered": True, "correct": True, "lines_right": False, "lucky": True}
    assert judge(ENOUGH, GOOD.replace("31.", "yes.")).flags["lucky"] is False
    assert judge(ENOUGH, "Answer: yes. Answer: no.").flags["correct"] is False


def test_a_yes_may_say_how_many() -> None:
    for said, error in [("Yes, 31 are left.", None), ("yes: 31 is 25 or more", None), ("yes, 30 are left.", 3)]:
        text = GOOD.replace("31.", said)
        assert (first_error(ENOUGH, text), judge(ENOUGH, text).flags["correct"]) == (error, True)
    assert judge(ENOUGH, GOOD).flags["correct"] is False, "a number is no answer to it"
    assert judge(PROMPT, GOOD.replace("31.", "no, 31.")).flags["correct"] is False


# From 30: the entry, its right change and the wrong one that convinces.
READINGS = [
    (Entry("in", 7), ("+", 7), ("+", 7)),
    (Entry("half"), ("-", 15), ("-", 15)),
    (Entry("each", 4, 3), ("+", 12), ("+", 4)),
    (Entry("price", 4, 3), ("-", 4), ("-", 12)),
    (Entry("all_but", 6), ("-", 24), ("-", 6)),
    (Entry("all_but_third"), ("-", 20), ("-", 10)),
    (Entry("called_off", 6), ("+", 0), ("+", 6)),
    (Entry("back", 8, 3), ("-", 5), ("-", 8)),
    (Entry("not_ours", 8, 3), ("+", 5), ("+", 8)),
]


@pytest.mark.parametrize(("entry", "right", "misread"), READINGS)
def test_what_an_entry_asks_for_and_how_it_is_misread(
    entry: Entry, right: tuple[str, int], misread: tuple[str, int]
) -> None:
    assert (entry.change(30), entry.misread(30)) == (right, misread)
    assert Entry("half").change(7) == ("-", None)


def test_ledgers_are_what_was_asked_for_and_no_ledger_is_on_both_sides() -> None:
    train, heldout = make_prompts(300, 1), make_prompts(300, 2, "heldout", (4, 10))
    assert not {p.messages[0].content for p in train} & {p.messages[0].content for p in heldout}
    assert train == make_prompts(300, 1)
    assert {p.meta["lines"] for p in train} == set(range(4, 9))
    assert {p.meta["lines"] for p in heldout} == set(range(4, 11))
    assert {kind for p in train for kind in p.meta["traps"]} == {name for name, kind in KINDS.items() if kind.misread}
    answers = Counter(p.meta["answer"] for p in train if p.meta["form"] == "yes_no")
    assert abs(answers["yes"] - answers["no"]) < 50
    careful = Bookkeeping(falls=0, slips=0)
    assert all(judge(p, write_reply(p, Random(0), careful)).score == 1 for p in train + heldout)


def test_what_falls_for_the_traps_is_wrong_there_and_nowhere_else() -> None:
    fallen = Bookkeeping(falls=1, slips=0, repeats=0, thanks=0)
    for prompt in make_prompts(200, 3):
        wrong = first_error(prompt, write_reply(prompt, Random(0), fallen))
        traps = [i for i, (kind, _, _) in enumerate(prompt.meta["entries"]) if KINDS[kind].misread]
        assert wrong == (traps[0] if traps else None)


def test_demonstrations_are_the_same_bytes_for_a_seed() -> None:
    assert make_demonstrations(20, 4) == make_demonstrations(20, 4) != make_demonstrations(20, 5)


def figures(samples: Iterable[tuple[Prompt, Sequence[str]]]) -> dict[str, float]:
    """Shares, of several replies to each of several ledgers."""
    majority, some, lucky, right_lines = list[bool](), list[bool](), list[bool](), list[bool]()
    for prompt, replies in samples:
        flags = [judge(prompt, reply).flags for reply in replies]
        votes = Counter(reply.rpartition("Answer: ")[2].split(".")[0] for reply in replies)
        majority.append(votes.most_common(1)[0][0] == prompt.meta["answer"])
        some.append(any(flag["correct"] for flag in flags))
        if prompt.meta["form"] == "yes_no":
            lucky += [bool(flag["lucky"]) for flag in flags if flag["correct"]]
        plain = [kind in ("in", "out", "half") for kind, _, _ in prompt.meta["entries"]]
        for reply in replies[:4]:
            sums = [line for line in ledger.read_lines(prompt, STEPS.split(reply)) if line.role == "sum"]
            right_lines += [line.right for line, counts in zip(sums, plain, strict=False) if counts]
    shares = {"majority": majority, "some": some, "lucky": lucky, "lines": right_lines}
    return {name: sum(found) / len(found) for name, found in shares.items()}


def test_a_majority_of_bookkeepers_is_wrong_where_some_are_right() -> None:
    """The world can show what a verifier is for: voting is 20 points short of the best of 16, of yes and no a third of
    the right answers have wrong working, and nine lines in ten are right outside traps."""
    habits, rng = replace(ledger.BOOKKEEPERS, slips=0.06), Random(0)
    prompts = make_prompts(160, 0, "heldout")
    found = figures((prompt, [write_reply(prompt, rng, habits) for _ in range(16)]) for prompt in prompts)
    assert found["some"] > 0.95
    assert found["some"] - found["majority"] > 0.2
    assert 0.3 < found["lucky"] < 0.5
    assert 0.9 < found["lines"] < 0.97


@pytest.mark.wide
def test_a_majority_of_a_models_samples_is_wrong_where_some_are_right(tmp_path: Path) -> None:
    """The same of the shipped model, fine-tuned as the demo does: minutes."""
    assert main(["demo", "--reasoning", "--out", str(tmp_path), "eval.bootstrap=200"]) == 0
    model, tokenizer = load_policy(str(tmp_path / "sft"))
    chat, sampling = Chat(tokenizer), SamplingConfig(temperature=1, max_new_tokens=160, batch_size=256)
    sampler = make_sampler(frozen(model), "auto", stop_token_ids(chat, sampling))
    prompts = read_prompts(tmp_path / "data" / "heldout_prompts.jsonl")
    ids = [chat.encode_prompt(prompt.messages) for prompt in prompts for _ in range(16)]
    texts = [with_decoded_text(chat, reply).text for reply in sampler.generate(ids, sampling, 0)]
    found = figures((prompt, texts[16 * i : 16 * i + 16]) for i, prompt in enumerate(prompts))
    assert found["some"] - found["majority"] >= 0.2
    assert 0.3 < found["lucky"] < 0.5
    assert found["lines"] > 0.9


def test_the_files_of_ledgers_are_read_as_any_users_and_the_same_for_a_seed(tmp_path: Path) -> None:
    sizes = {"demonstrations": 6, "prompts": 5, "heldout_prompts": 4, "labelled": 10}
    for folder in ("a", "b"):
        export_reasoning(tmp_path / folder, 3, **sizes)
    files = sorted((tmp_path / "a").iterdir())
    assert [file.read_bytes() for file in files] == [(tmp_path / "b" / file.name).read_bytes() for file in files]
    assert len(read_demonstrations(tmp_path / "a" / "demonstrations.jsonl")) == 6
    assert [p.kind for p in read_prompts(tmp_path / "a" / "heldout_prompts.jsonl")] == ["ledger"] * 4
    rows = [json.loads(line) for line in (tmp_path / "a" / "labelled_steps.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert len({row["id"] for row in rows}) == 10
    for row in rows:
        prompt = Prompt(row["prompt_id"], (Message("user", row["prompt"][0]["content"]),), row["kind"], row["meta"])
        error = first_error(prompt, "".join(row["completions"]))
        assert row["labels"] == [float(error is None or i < error) for i in range(len(row["completions"]))]


def test_a_build_learns_the_working_of_whole_pages() -> None:
    """Every batch is full, a page is a sequence, and what is learned is what stands behind its question."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_LEDGER)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(SHIPPED).get_vocab()
    batch, wanted = ledger_build._worked(tokenizer, 0, 512, 7)
    assert batch.num_tokens == 512 == int(batch.lengths().sum())
    assert wanted.tolist() == batch.ids_T[batch.mask_T].tolist()
    for start, end in zip(batch.cu_seqlens[:-2].tolist(), batch.cu_seqlens[1:-1].tolist(), strict=True):
        ids, mask = batch.ids_T[start:end], batch.mask_T[start:end]
        question, working = tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])
        assert question.endswith("?\n")
        assert "Answer: " in working
        assert working.endswith("<|end|>")
        assert batch.positions_T[start:end].tolist() == list(range(end - start))
    again, _ = ledger_build._worked(tokenizer, 0, 512, 7)
    assert bool((again.ids_T == batch.ids_T).all())
    assert not bool((ledger_build._worked(tokenizer, 0, 512, 8)[0].ids_T == batch.ids_T).all())


def test_a_build_learns_verdicts_where_lines_end() -> None:
    """In the place of what follows a line: right, but for a last one that is wrong. What plain sums say here agrees:
    no right line has a false one, and a false one is the page's last."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_LEDGER)
    batch, wanted = ledger_build._checked(tokenizer, 0, 20_000, 3)
    assert batch.num_tokens == 20_000
    assert len(wanted) == int(batch.mask_T.sum())
    labels = torch.full_like(batch.ids_T, -1)
    labels[batch.mask_T] = wanted
    verdicts = {tokenizer(text)["input_ids"][0]: mark for mark, text in ledger_build.VERDICTS.items()}
    seen, false_sums = Counter[bool](), 0
    bounds = batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds[:-1]):
        ids, marks = batch.ids_T[start:end].tolist(), labels[start:end].tolist()
        question, *lines = tokenizer.decode(ids).rstrip("\n").split("\n")
        assert question.endswith("?")
        asked, *newlines = [i for i, token in enumerate(ids) if tokenizer.decode([token]) == "\n"]
        assert marks[: asked + 1] == [-1] * (asked + 1)
        assert [m for i, m in enumerate(marks[asked + 1 :], asked + 1) if i not in newlines] == [
            x for i, x in enumerate(ids[asked + 1 :], asked + 1) if i not in newlines
        ]
        right = [verdicts[marks[i]] for i in newlines]
        assert len(right) == len(lines)
        assert all(right[:-1])
        for line, mark in zip(lines, right, strict=True):
            if sum_ := re.search(r"(\d+)([+-])(\d+)=(\d+)$", line):
                first, sign, second, result = sum_.groups()
                false = int(first) + int(f"{sign}{second}") != int(result)
                assert not (mark and false)
                false_sums += false
        seen.update(right)
    assert 0.1 < seen[False] / seen.total() < 0.4
    assert false_sums > 0


def test_a_prompt_that_is_no_ledger_is_refused() -> None:
    with pytest.raises(UserError, match="steps are known of ledgers alone"):
        gold_steps(Prompt("p", (Message("user", "Hello"),), "fact"), ["a"])
    with pytest.raises(UserError, match="meta lacks 'entries'"):
        judge(Prompt("p", (Message("user", "Hello"),), "ledger"), "Answer: 3.")
    with pytest.raises(UserError, match="is not one of"):
        judge(store(3, ("fly", 1, 1), answer="3"), "Answer: 3.")
