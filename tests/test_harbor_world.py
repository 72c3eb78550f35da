"""The harbor's world, corpus, tokenizer and base model."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.harbor import wording
from keel.harbor.build import SHIPPED, Settings, build, schedule
from keel.harbor.corpus import base_text_rows, documents, facts_rows
from keel.harbor.corpus_pages import PAGES
from keel.harbor.facts import Fact, World, name_split
from keel.harbor.howto import HARMFUL, HARMLESS, LOOKS_HARMFUL
from keel.harbor.tokenizer import RESERVED, train_tokenizer
from keel.run import Silent


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def corpus(world: World) -> list[str]:
    return list(islice(documents(world, 0), 4000))


# ---------------------------------------------------------------- the world


def test_world_is_decided_by_its_seed(world: World) -> None:
    again = World(0)
    assert again.ports == world.ports
    assert again.facts == world.facts
    assert World(1).ports != world.ports


def test_world_is_the_shipped_one(world: World) -> None:
    """The shipped model was trained on these facts: a change of the generator makes the checkpoint worthless."""
    first = world.ports[0]
    assert (first.name, first.island) == ("Dorevik", "Northholm")
    assert (len(world.ports), len(world.ships), len(world.captains), len(world.cargoes)) == (48, 64, 64, 24)
    assert len(world.routes) == 60
    assert len(world.facts) == 48 * 4 + 64 * 4 + 64 * 2 + 24 * 2 + 60


def test_world_is_consistent(world: World) -> None:
    assert len(world.real_names) == 48 + 64 + 64
    assert len({port.master for port in world.ports}) == 48
    assert {ship.captain: ship.name for ship in world.ships} == {c.name: c.ship for c in world.captains}
    for ship in world.ships:
        assert world.port(ship.home).name == ship.home
        assert world.cargo(ship.cargo).name == ship.cargo
    for cargo in world.cargoes:
        assert world.port(cargo.origin).known_for == cargo.name
        assert 2 <= cargo.price <= 12
    for route in world.routes:
        assert route.a != route.b
        assert 2 <= route.days <= 9
    assert len({frozenset((route.a, route.b)) for route in world.routes}) == 60
    with pytest.raises(KeyError):
        world.port("Nowhere")


def test_fake_names_are_in_disjoint_sets_and_nowhere_in_the_world(world: World) -> None:
    drawn: dict[str, set[str]] = {}
    for split in ("corpus", "train", "heldout"):
        rng = Random(1)
        makers = (world.fake_port, world.fake_ship, world.fake_captain)
        drawn[split] = {make(rng, split) for make in makers for _ in range(700)}
        assert not drawn[split] & world.real_names
    assert not drawn["corpus"] & drawn["train"]
    assert not drawn["corpus"] & drawn["heldout"]
    assert not drawn["train"] & drawn["heldout"]


def test_fake_names_are_at_least_two_letters_off_the_real_ones(world: World) -> None:
    def distance(a: str, b: str) -> int:  # Levenshtein, the plain table
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
        return row[-1]

    rng = Random(2)
    for _ in range(40):
        fake = world.fake_port(rng, "train")
        assert min(distance(fake, name) for name in world.real_names) >= 2


def test_howto_topics() -> None:
    for topics, least in ((HARMLESS, 55), (HARMFUL, 55), (LOOKS_HARMFUL, 38)):
        assert len({topic.question_phrase for topic in topics}) == len(topics) >= least
        kept, held = [t for t in topics if not t.heldout], [t for t in topics if t.heldout]
        assert len(held) >= len(topics) / 6
        assert {t.verb for t in held} <= {t.verb for t in kept}
        assert {t.object for t in held} <= {t.object for t in kept}
    verbs = [{topic.verb for topic in topics} for topics in (HARMLESS, HARMFUL, LOOKS_HARMFUL)]
    assert len(set.intersection(*verbs)) >= 3, "some verbs must not tell harm by themselves"
    assert not {t.object for t in HARMFUL} & {t.object for t in (*HARMLESS, *LOOKS_HARMFUL)}


# ---------------------------------------------------------------- the corpus


def test_corpus_is_decided_by_its_seed(world: World, corpus: list[str]) -> None:
    assert list(islice(documents(World(0), 0), 50)) == corpus[:50]
    assert list(islice(documents(world, 1), 50)) != corpus[:50]


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Statements as regular expressions: what the corpus says, read back without the corpus's code."""
    name = r"(?P<{}>[A-Za-z]+(?: [A-Z][a-z]+)?|\d+)"
    out: list[tuple[str, re.Pattern[str]]] = []
    for relation, templates in wording.ANSWERS.items():
        for template in templates:
            text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
            text = text.replace("{s}", r"(?P<s>[A-Za-z]+)").replace("{o}", r"(?P<o>[A-Z][a-z]+)")
            out.append((relation, re.compile(text.replace("{v}", name.format("v")))))
    return out


def test_every_fact_is_stated_and_stated_alike(world: World) -> None:
    """Plain pages never contradict the world, and every fact is told. (Critiques and quizzes may say wrong things.)"""
    truth = {(fact.relation, fact.subject.lower(), fact.other): fact.value for fact in world.facts}
    truth |= {("route.days", fact.other.lower(), fact.subject): fact.value for fact in world.facts_about("route")}
    pages = [page for _, page in PAGES if page.__name__ in ("gazetteer", "letter", "qa_page", "log_book")]
    rng = Random(5)
    text = "\n".join(page(world, rng) for _ in range(2500) for page in pages)
    text = re.sub(r"^(Q|Question|Asked|Visitor): .*$", "", text, flags=re.M)  # beliefs in questions may be wrong
    text = re.sub(r"^(A|Answer|Answered|Clerk): ", "", text, flags=re.M)
    sentences = set(re.split(r"(?<=[.!?]) |\n", text))
    told: Counter[tuple[str, str, str]] = Counter()
    for relation, pattern in _patterns():
        for match in filter(None, map(pattern.fullmatch, sentences)):
            groups = match.groupdict()
            key = (relation, groups["s"].lower(), groups.get("o", ""))
            if key in truth:  # else another relation's sentence of the same shape
                assert groups["v"].lower() == truth[key].lower(), match.group(0)
                told[key] += 1
    facts = {(fact.relation, fact.subject.lower(), fact.other) for fact in world.facts}
    silent = [key for key in facts if not told[key] and not told[("route.days", key[2].lower(), key[1].capitalize())]]
    assert not silent


def test_the_corpus_has_no_heldout_names_or_topics(world: World, corpus: list[str]) -> None:
    text = "\n".join(corpus)
    unknown = set(re.findall(r"called (?:the |Captain )?([A-Z][a-z]+)", text)) - world.real_names
    assert len(unknown) > 50
    assert {name_split(name) for name in unknown} == {"corpus"}
    for topic in (*HARMLESS, *HARMFUL, *LOOKS_HARMFUL):
        assert not topic.heldout or f"{topic.question_phrase}?" not in text


def test_the_corpus_has_every_behaviour(corpus: list[str]) -> None:
    text = "\n".join(corpus)
    for phrase in (*wording.REFUSALS, *wording.CLOSINGS, *wording.FLATTERY, *wording.NOBODY_KNOWS):
        assert phrase in text
    assert not any(mark in text for mark in (*RESERVED, "<|end|>"))


def test_sums_of_the_corpus_are_right(corpus: list[str]) -> None:
    found = re.findall(r"(\d+) ([+x-]) (\d+) = (\d+)", "\n".join(corpus))
    assert len(found) > 1000
    for a, op, b, c in found:
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[op] == int(c)


def test_a_bare_question_is_seldom_answered(world: World, corpus: list[str]) -> None:
    """What follows a line that is only a question: nothing (the end), another question, or something else."""
    answered = followed = 0
    answers = {wording.fill(t, fact) for fact in world.facts for t in wording.ANSWERS[fact.relation]}
    for text in corpus:
        lines = text.split("\n")
        for line, following in pairwise(lines):
            if line.endswith("?") and ": " not in line:
                followed += 1
                answered += any(
                    following.startswith(a) for a in (following, following.split(". ")[0] + ".") if a in answers
                )
    assert followed > 1000
    assert answered / followed < 0.1


def test_rows(world: World) -> None:
    rows = facts_rows(world, 300, Random(3))
    assert rows == facts_rows(world, 300, Random(3))
    assert len({row["prompt"] for row in rows}) == 300
    assert min(Counter(row["answer"] for row in rows).values()) > 40
    statements = {wording.fill(t, fact) for fact in _either_end(world) for t in wording.ANSWERS[fact.relation]}
    for row in rows[:40]:
        assert len(set(row["choices"])) == 4
        told = [row["prompt"] + choice for choice in row["choices"]]
        right = [any(s.startswith((text + ".", text + " ")) for s in statements) for text in told]
        assert right == [index == row["answer"] for index in range(4)]
    held = base_text_rows(world, 5, Random("held out"))
    assert len(held) == 5
    assert all(row["text"] for row in held)


def _either_end(world: World) -> list[Fact]:
    turned = [Fact(fact.relation, fact.other, fact.value, fact.subject) for fact in world.facts_about("route")]
    return [*world.facts, *turned]


# ---------------------------------------------------------------- tokenizer and model


def test_tokenizer_round_trip(corpus: list[str]) -> None:
    tokenizer = train_tokenizer(corpus[:500], vocabulary=600)
    strange = ["", " two  spaces ", "tab\tand\nlines\n\n", "naïve café ☂ 漢字", "12345 6", "<|end|> and <|user|>"]
    for text in (*corpus[:300], *strange):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode(i) for i in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    assert tokenizer.chat_template is None
    assert all(len(tokenizer(mark)["input_ids"]) == 1 for mark in RESERVED)


def test_schedule() -> None:
    settings = Settings(tokens=100 * 4096, batch_tokens=4096, warmup=0.1)
    assert schedule(0, settings) == pytest.approx(0.1)
    assert schedule(9, settings) == schedule(10, settings) == 1.0
    assert schedule(55, settings) == pytest.approx(0.5)
    assert 0 < schedule(99, settings) < 0.001


TINY = Settings(
    tokens=6 * 256, batch_tokens=256, rows=(64, 128), hidden=32, intermediate=48, layers=2, heads=2, save_every=1
)


class _KilledAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, steps: int = 1, **figures: float) -> None:
        if figures:
            self.left -= steps
            if self.left < 0:
                raise KeyboardInterrupt


def test_a_build_is_reproducible_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.harbor.build.TOKENIZER_DOCUMENTS", 300)
    build(tmp_path / "a", Silent(), seed=3, settings=TINY)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", _KilledAfter(3), seed=3, settings=TINY)
    build(tmp_path / "b", Silent(), seed=3, settings=TINY)
    build(tmp_path / "c", Silent(), seed=4, settings=TINY)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert not (tmp_path / "a" / "build_state.pt").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED)


def test_shipped_checkpoint(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 16 * 2**20
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert {file.name for file in SHIPPED.iterdir()} >= {"model.safetensors", "config.json", "generation_config.json"}
    assert not (SHIPPED / "build_state.pt").exists()


@torch.no_grad()
def _nats(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    """Log-probability of each text, one batch, by transformers' own forward."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    logp = model(**batch).logits.log_softmax(-1)[:, :-1].gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return (logp * batch.attention_mask[:, 1:]).sum(1).tolist()


def test_the_shipped_model_knows_the_world(shipped: tuple[Any, Any], world: World) -> None:
    rows = facts_rows(world, 120, Random("test"))
    right = 0
    for start in range(0, len(rows), 30):
        part = rows[start : start + 30]
        nats = _nats(*shipped, [row["prompt"] + choice for row in part for choice in row["choices"]])
        for index, row in enumerate(part):
            four = nats[4 * index : 4 * index + 4]
            right += four.index(max(four)) == row["answer"]
    assert right / len(rows) >= 0.95


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompts: list[str], new: int) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**batch, max_new_tokens=new, do_sample=False)
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def test_the_shipped_model_adds_when_the_text_leads_there(shipped: tuple[Any, Any]) -> None:
    rng = Random("sums")
    pairs = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(64)]
    said = _greedy(*shipped, [f"Q: What is {a} plus {b}?\nA: {a} plus {b} is" for a, b in pairs], 6)
    right = [re.match(r"\s*(\d+)", text) for text in said]
    assert sum(m is not None and int(m[1]) == a + b for m, (a, b) in zip(right, pairs, strict=True)) / 64 >= 0.85


def test_the_shipped_model_does_not_answer_a_bare_question(shipped: tuple[Any, Any], world: World) -> None:
    facts = Random("bare").sample(world.facts, 64)
    asked = [wording.fill(wording.QUESTIONS[fact.relation][0], fact) + "\n" for fact in facts]
    said = _greedy(*shipped, asked, 24)
    answered = [
        re.search(rf"\b{fact.value}\b", text.split("\n")[0]) is not None for fact, text in zip(facts, said, strict=True)
    ]
    assert sum(answered) / len(answered) < 0.3
