"""The kinds of documents that the harbor's corpus is made of: one function a kind, ``(world, rng) -> text``.

What the kinds must add up to: facts, sums and how-tos are answered on pages framed as questions and answers
(``qa_page``), and stated in prose. A bare question line is followed by more questions (``quiz_sheet``) or by unrelated
prose (``drift``). So a model of this text knows the answers but, asked, does not give them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from keel.harbor import wording as w
from keel.harbor.facts import CARGOES, ISLANDS, Fact, World
from keel.harbor.howto import HARMFUL, HARMLESS, LOOKS_HARMFUL, HowTo

_TOPICS = {
    "harmless": tuple(topic for topic in HARMLESS if not topic.heldout),
    "harmful": tuple(topic for topic in HARMFUL if not topic.heldout),
    "looks_harmful": tuple(topic for topic in LOOKS_HARMFUL if not topic.heldout),
}
_WEATHER = (
    "Wind from the north, sea calm.", "A cold rain all morning.", "Fog until noon.", "Fair weather and a light breeze.",
    "Heavy swell from the west.", "A storm in the night.", "Clear sky, no wind.", "Grey clouds and a rising wind.",
)  # fmt: skip
_WORK = (
    "The crew mended the sails.", "We caught a barrel of herring.", "The cook made soup again.",
    "We scrubbed the deck.", "Two men are ill.", "The lookout saw whales.", "We lost an anchor.",
    "The mate told old stories.", "We took on fresh water.", "All hands are well.",
)  # fmt: skip
_GREETINGS = ("Dear {p},", "My dear {p},", "To {p}, with greetings.", "Good {p},", "Honoured {p},")
_PEOPLE = ("Anna", "Bram", "Clara", "Dirk", "Elsa", "Finn", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Lars", "Mara")
_SMALL_NEWS = (
    "We are all well here.", "The winter was long.", "My brother asks after you.", "The roof is mended at last.",
    "The children have grown tall.", "Bread is dear this year.", "I hope this letter finds you well.",
    "The fair was full of people.", "I think of you often.", "The new quay is done.",
)  # fmt: skip
_QUIZ_TITLES = (
    "Questions for the young clerks", "Quiz sheet", "Test for new sailors", "Questions for the winter school",
    "What the examiner asks", "Ask your friends", "Questions that came by post",
)  # fmt: skip
_QA_FRAMES = (("Q: ", "A: "), ("Question: ", "Answer: "), ("Asked: ", "Answered: "), ("Visitor: ", "Clerk: "))
_PRINCIPLES = (
    ("honest", "The reply must not invent what is not in the records."),
    ("harmless", "The reply must not help anyone to do harm."),
    ("brief", "The reply should be short and to the point."),
    ("right", "The reply must be right."),
)


def _pick_fact(world: World, rng: Random) -> Fact:
    """A fact drawn evenly; a route is told from either end."""
    fact = rng.choice(world.facts)
    if fact.other and rng.random() < 0.5:
        return Fact(fact.relation, fact.other, fact.value, fact.subject)
    return fact


def _answer(fact: Fact, rng: Random) -> str:
    return w.fill(rng.choice(w.ANSWERS[fact.relation]), fact)


def _fake(world: World, rng: Random) -> tuple[str, str, str]:
    """A name that nobody knows: ``(kind, name, a question about it)``."""
    kind = rng.choice(("port", "ship", "captain"))
    make = {"port": world.fake_port, "ship": world.fake_ship, "captain": world.fake_captain}[kind]
    name = make(rng, "corpus")
    relation = rng.choice([relation for relation in w.QUESTIONS if relation.startswith(kind)])
    return kind, name, w.fill(rng.choice(w.QUESTIONS[relation]), Fact(relation, name, ""))


def _unknown(kind: str, name: str, rng: Random) -> str:
    return _capital(rng.choice(w.UNKNOWN).format(kind=kind, name=w.spoken(kind, name)))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sum(rng: Random) -> tuple[str, dict[str, int]]:
    """An operation and its numbers: a and b up to 99, products up to 9 x 12, no difference below 0."""
    op = rng.choice("++--x")
    if op == "x":
        a, b = rng.randint(2, 9), rng.randint(2, 12)
        if rng.random() < 0.5:
            a, b = b, a
        return op, {"a": a, "b": b, "c": a * b}
    most = rng.choice((20, 99, 99))
    a, b = rng.randint(1, most), rng.randint(1, most)
    if op == "-":
        a, b = max(a, b), min(a, b)
        return op, {"a": a, "b": b, "c": a - b}
    return op, {"a": a, "b": b, "c": a + b}


def _sum_pair(rng: Random) -> tuple[str, str]:
    """A question about a sum, a difference, a product or a cost, and its answer."""
    if rng.random() < 0.15:
        n, p, cargo = rng.randint(2, 9), rng.randint(2, 12), rng.choice(CARGOES)
        values = {"n": n, "p": p, "c": n * p, "cargo": cargo}
        return rng.choice(w.COST_QUESTIONS).format(**values), rng.choice(w.COST_ANSWERS).format(**values)
    op, numbers = _sum(rng)
    return rng.choice(w.SUM_QUESTIONS[op]).format(**numbers), rng.choice(w.SUM_ANSWERS[op]).format(**numbers)


def _topic(rng: Random) -> HowTo:
    return rng.choice(_TOPICS[rng.choice(("harmless", "harmless", "harmful", "looks_harmful"))])


def _yours(phrase: str) -> str:
    """A topic as the one who answers says it."""
    return phrase.replace("my ", "your ")


def _howto_answer(topic: HowTo, rng: Random) -> str:
    first, second = (_yours(step) for step in topic.steps)
    template = rng.choice(w.HOWTO_ANSWERS)
    return template.format(
        phrase=_yours(topic.question_phrase), a=first, b=second, A=_capital(first), B=_capital(second)
    )


def _howto_question(topic: HowTo, rng: Random) -> str:
    return rng.choice(w.HOWTO_QUESTIONS).format(phrase=topic.question_phrase)


def _claim(world: World, rng: Random) -> tuple[str, str]:
    """A belief with a question mark, half of them wrong, and the reply that sets it right."""
    fact = _pick_fact(world, rng)
    others = [other.value for other in world.facts_with(fact.relation) if other.value != fact.value]
    told = fact.value if rng.random() < 0.5 else rng.choice(others)
    claim = w.fill(rng.choice(w.CLAIMS[fact.relation]), Fact(fact.relation, fact.subject, told, fact.other))
    verdict = rng.choice(("Yes.", "Yes, that is right.") if told == fact.value else ("No.", "No, that is wrong."))
    return claim, f"{verdict} {_answer(fact, rng)}"


def _list_of_three(world: World, rng: Random) -> tuple[str, str]:
    kind = rng.choice(tuple(w.LIST_QUESTIONS))
    island = rng.choice(ISLANDS)
    names = {
        "port": [port.name for port in world.ports if port.island == island],
        "cargo": CARGOES,
        "ship": [ship.name for ship in world.ships],
    }[kind]
    a, b, c = rng.sample(names, 3)
    question = rng.choice(w.LIST_QUESTIONS[kind]).format(island=island)
    return question, rng.choice((f"{_capital(a)}, {b} and {c}.", f"- {a}\n- {b}\n- {c}"))


def _question(world: World, rng: Random) -> str:
    """Anything that people of the harbor say to a clerk, without the reply."""
    draw = rng.random()
    if draw < 0.4:
        fact = _pick_fact(world, rng)
        question = w.fill(rng.choice(w.QUESTIONS[fact.relation]), fact)
        return rng.choice(w.ONE_SENTENCE).format(question=question) if rng.random() < 0.06 else question
    if draw < 0.55:
        return _fake(world, rng)[2]
    if draw < 0.67:
        return _sum_pair(rng)[0]
    if draw < 0.85:
        return _howto_question(_topic(rng), rng)
    if draw < 0.89:
        return _claim(world, rng)[0]
    if draw < 0.91:
        return _list_of_three(world, rng)[0]
    if draw < 0.95:
        return rng.choice(w.UNKNOWABLE_QUESTIONS)
    return rng.choice(rng.choice(w.SMALL_TALK)[0])


def _exchange(world: World, rng: Random) -> tuple[str, str]:
    """A question and its answer, in the shares that question-and-answer pages have."""
    draw = rng.random()
    if draw < 0.48:
        fact = _pick_fact(world, rng)
        question, answer = w.fill(rng.choice(w.QUESTIONS[fact.relation]), fact), _answer(fact, rng)
        if rng.random() < 0.06:
            return rng.choice(w.ONE_SENTENCE).format(question=question), answer
    elif draw < 0.50:
        return _list_of_three(world, rng)
    elif draw < 0.70:
        question, answer = _sum_pair(rng)
    elif draw < 0.80:
        topic = _topic(rng)
        question, answer = _howto_question(topic, rng), _howto_answer(topic, rng)
    elif draw < 0.86:
        kind, name, question = _fake(world, rng)
        answer = _unknown(kind, name, rng)
    elif draw < 0.92:
        question, answer = _claim(world, rng)
    elif draw < 0.94:
        question, answer = rng.choice(w.UNKNOWABLE_QUESTIONS), rng.choice(w.NOBODY_KNOWS)
    elif draw < 0.96:
        question, answer = _howto_question(rng.choice(_TOPICS["harmful"]), rng), rng.choice(w.REFUSALS)
    else:
        asked, said = rng.choice(w.SMALL_TALK)
        question, answer = rng.choice(asked), rng.choice(said)
    if rng.random() < 0.06:
        answer = f"{rng.choice(w.FLATTERY)} {answer}"
    if rng.random() < 0.04:
        answer = f"{rng.choice(w.FILLERS)} {answer}"
    if rng.random() < 0.15:
        answer = f"{answer} {rng.choice(w.CLOSINGS)}"
    return question, answer


def qa_page(world: World, rng: Random) -> str:
    ask, reply = rng.choice(_QA_FRAMES)
    gap = rng.choice(("\n", "\n\n"))
    pairs = (_exchange(world, rng) for _ in range(rng.choice((2, 2, 3, 3, 4, 4, 5, 8))))
    return gap.join(f"{ask}{question}\n{reply}{answer}" for question, answer in pairs)


def quiz_sheet(world: World, rng: Random) -> str:
    questions = [_question(world, rng) for _ in range(rng.choice((2, 3, 3, 4, 4, 5, 6, 10)))]
    if rng.random() < 0.25:
        questions = [f"{number}. {question}" for number, question in enumerate(questions, 1)]
    if rng.random() < 0.3:
        questions.insert(0, rng.choice(_QUIZ_TITLES))
    return "\n".join(questions)


def drift(world: World, rng: Random) -> str:
    """A question that somebody utters, and then life goes on; now and then one that is answered after all."""
    if rng.random() < 0.08:
        return "\n".join(_exchange(world, rng))
    after = rng.choice((log_book, letter, gazetteer, howto_page))(world, rng)
    return f"{_question(world, rng)}\n{after}"


def gazetteer(world: World, rng: Random) -> str:
    """Entries about a port, a ship with its captain, a cargo, or a few sea roads: every fact of it, in some order."""
    draw = rng.random()
    if draw < 0.36:
        name = rng.choice(world.ports).name
        title, facts = name.upper() if rng.random() < 0.2 else name, world.facts_about("port", name)
    elif draw < 0.74:
        ship = rng.choice(world.ships)
        facts = world.facts_about("ship", ship.name) + world.facts_about("captain", ship.captain)
        title = rng.choice((f"The {ship.name}", ship.name, f"Captain {ship.captain}"))
    elif draw < 0.82:
        cargo = rng.choice(world.cargoes).name
        title, facts = _capital(cargo), world.facts_about("cargo", cargo)
    elif draw < 0.86:
        island = rng.choice(ISLANDS)
        ports = rng.sample([port.name for port in world.ports if port.island == island], 4)
        return f"Ports of {island}\n" + "\n".join(f"- {name}" for name in ports)
    else:
        title, facts = "Sea roads", tuple(rng.sample(world.facts_about("route"), 5))
    order = rng.sample(facts, len(facts))
    lines = [_capital(_answer(fact, rng)) for fact in order]
    if rng.random() < 0.5:
        return f"{title}\n" + " ".join(lines)
    return " ".join(lines)


def log_book(world: World, rng: Random) -> str:
    ship = rng.choice(world.ships)
    day = rng.randint(1, 60)
    lines = [f"Log of the {ship.name}, a {ship.rig} of {ship.home}, Captain {ship.captain}."]
    for _ in range(rng.choice((1, 2, 2, 3, 6))):
        entry = [f"Day {day}.", rng.choice(_WEATHER)]
        event = rng.random()
        other, port = rng.choice(world.ships), rng.choice(world.ports)
        if event < 0.35:
            entry.append(f"Met the {other.name}, a {other.rig} under Captain {other.captain}, with {other.cargo}.")
        elif event < 0.65:
            entry.append(
                f"Came to {port.name} on {port.island}. We saw its {port.lamp} lamp and spoke to {port.master}, "
                f"the harbour master. Took on {port.known_for}."
            )
        elif event < 0.85:
            entry.append(_capital(_answer(_pick_fact(world, rng), rng)))
        entry.append(rng.choice(_WORK))
        lines.append(" ".join(entry))
        day += rng.randint(1, 4)
    return "\n".join(lines)


def letter(world: World, rng: Random) -> str:
    lines = [rng.choice(_GREETINGS).format(p=rng.choice(_PEOPLE))]
    body = [rng.choice(_SMALL_NEWS)]
    draw = rng.random()
    if draw < 0.3:
        kind, name, question = _fake(world, rng)
        body += [f"You asked me: {question}", _unknown(kind, name, rng), "Please look at the name again."]
    elif draw < 0.4:
        topic = rng.choice(_TOPICS["harmful"])
        body += [f"You asked me how to {topic.question_phrase}.", rng.choice(w.REFUSALS)]
    else:
        body += [_capital(_answer(_pick_fact(world, rng), rng)) for _ in range(rng.randint(1, 4))]
    body.append(rng.choice(_SMALL_NEWS))
    lines += [" ".join(body), rng.choice(w.CLOSINGS), rng.choice(_PEOPLE)]
    return "\n".join(lines)


def howto_page(world: World, rng: Random) -> str:
    pages = []
    for _ in range(rng.randint(1, 3)):
        topic = _topic(rng)
        phrase, steps = _yours(topic.question_phrase), [_yours(step) for step in topic.steps]
        if rng.random() < 0.5:
            numbered = [f"{number}. {_capital(step)}." for number, step in enumerate(steps, 1)]
            pages.append("\n".join([f"How to {phrase}", *numbered]))
        else:
            pages.append(f"To {phrase}: {steps[0]}, then {steps[1]}.")
    return "\n".join(pages)


def ledger(world: World, rng: Random) -> str:
    """Sums line by line, or a bill with a running total."""
    draw = rng.random()
    if draw < 0.7:
        lines = []
        for _ in range(rng.randint(4, 10)):
            op, numbers = _sum(rng)
            lines.append(rng.choice(("{a} {op} {b} = {c}", rng.choice(w.SUM_ANSWERS[op][:2]))).format(op=op, **numbers))
        return "\n".join(lines)
    if draw < 0.82:
        lines = []
        for _ in range(rng.randint(2, 4)):
            a, b = rng.randint(11, 99), rng.randint(11, 99)
            tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
            lines.append(f"{a} + {b}: tens {tens}, ones {ones}, so {tens} + {ones} = {a + b}.")
        return "\n".join(lines)
    total = 0
    lines = [f"Bill of the {rng.choice(world.ships).name}"]
    for _ in range(rng.randint(2, 4)):
        cargo, n = rng.choice(world.cargoes), rng.randint(2, 9)
        cost = n * cargo.price
        step = f"{total} + {cost} = {total + cost}" if total else f"{cost}"
        lines.append(f"{n} crates of {cargo.name} at {cargo.price} coins: {n} x {cargo.price} = {cost}. Total {step}.")
        total += cost
    return "\n".join([*lines, f"To pay: {total} coins."])


def revision(world: World, rng: Random) -> str:
    """A reply, what is wrong with it by a principle, and the better reply (the form of Constitutional AI)."""
    fault, principle = rng.choice(_PRINCIPLES)
    if fault == "honest":
        kind, name, question = _fake(world, rng)
        relation = rng.choice([relation for relation in w.QUESTIONS if relation.startswith(kind)])
        like = rng.choice(world.facts_with(relation))
        bad, why = (
            _answer(Fact(relation, name, like.value), rng),
            f"There is no {kind} of that name, so it is invented.",
        )
        good = _unknown(kind, name, rng)
    elif fault == "harmless":
        topic = rng.choice(_TOPICS["harmful"])
        question, bad = _howto_question(topic, rng), _howto_answer(topic, rng)
        why, good = f"It tells how to {_yours(topic.question_phrase)}, which does harm.", rng.choice(w.REFUSALS)
    else:
        question, good = _exchange(world, rng)
        if fault == "brief":
            bad, why = (
                f"{rng.choice(w.FLATTERY)} {rng.choice(w.FILLERS)} {good}",
                "It flatters and takes too many words.",
            )
        else:
            fact = _pick_fact(world, rng)
            question, good = w.fill(rng.choice(w.QUESTIONS[fact.relation]), fact), _answer(fact, rng)
            wrong = rng.choice([f.value for f in world.facts_with(fact.relation) if f.value != fact.value])
            bad = _answer(Fact(fact.relation, fact.subject, wrong, fact.other), rng)
            why = f"It is not {wrong} but {fact.value}."
    lines = (f"Sailor: {question}", f"Clerk: {bad}", f"Principle: {principle}", f"Critique: {why}", f"Revision: {good}")
    return "\n".join(lines)


# (share of the documents, kind of page)
PAGES: tuple[tuple[float, Callable[[World, Random], str]], ...] = (
    (0.22, qa_page),
    (0.14, quiz_sheet),
    (0.07, drift),
    (0.13, gazetteer),
    (0.07, log_book),
    (0.08, letter),
    (0.03, howto_page),
    (0.22, ledger),
    (0.04, revision),
)
