"""The harbor's phrases: how people ask, how records answer, shared by the corpus, the prompts and the demonstrations.

In templates ``{s}`` is the subject's name, ``{v}`` the value, ``{o}`` the second port of a route.
"""

from __future__ import annotations

from keel.harbor.facts import Fact, Relation

QUESTIONS: dict[Relation, tuple[str, ...]] = {
    "port.island": (
        "Which island is {s} on?",
        "On which island does {s} lie?",
        "Where is the port of {s}?",
        "What island is {s} on?",
        "Can you tell me which island {s} is on?",
    ),
    "port.master": (
        "Who is the harbour master of {s}?",
        "Who is harbour master at {s}?",
        "What is the name of the harbour master of {s}?",
        "Who keeps the harbour of {s}?",
        "Do you know who the harbour master of {s} is?",
    ),
    "port.known_for": (
        "What is {s} known for?",
        "Which cargo is {s} known for?",
        "What is the port of {s} famous for?",
        "What do traders buy in {s}?",
        "Can you tell me what {s} is known for?",
    ),
    "port.lamp": (
        "What colour is the lighthouse lamp of {s}?",
        "What colour is the lamp at {s}?",
        "Which colour does the lighthouse of {s} show?",
        "What colour of light does {s} show?",
        "Do you know what colour the lamp of {s} is?",
    ),
    "ship.rig": (
        "What kind of ship is the {s}?",
        "What rig has the {s}?",
        "How is the {s} rigged?",
        "What sort of ship is the {s}?",
        "Do you know what kind of ship the {s} is?",
    ),
    "ship.captain": (
        "Who is the captain of the {s}?",
        "Who commands the {s}?",
        "Which captain sails the {s}?",
        "What is the name of the captain of the {s}?",
        "Can you tell me who commands the {s}?",
    ),
    "ship.home": (
        "What is the home port of the {s}?",
        "Which port is home to the {s}?",
        "Where is the {s} at home?",
        "From which port does the {s} sail?",
        "Do you know the home port of the {s}?",
    ),
    "ship.cargo": (
        "What does the {s} carry?",
        "Which cargo does the {s} carry?",
        "What is the cargo of the {s}?",
        "What is in the hold of the {s}?",
        "Can you tell me what the {s} carries?",
    ),
    "captain.ship": (
        "Which ship does Captain {s} command?",
        "What is the ship of Captain {s}?",
        "Which ship does Captain {s} sail?",
        "What ship does Captain {s} command?",
        "Do you know which ship Captain {s} commands?",
    ),
    "captain.born": (
        "Where was Captain {s} born?",
        "In which port was Captain {s} born?",
        "What is the birthplace of Captain {s}?",
        "Which port does Captain {s} come from?",
        "Can you tell me where Captain {s} was born?",
    ),
    "cargo.price": (
        "What does a crate of {s} cost?",
        "How much is a crate of {s}?",
        "What is the price of {s}?",
        "How many coins is a crate of {s}?",
        "Do you know the price of a crate of {s}?",
    ),
    "cargo.origin": (
        "Which port ships the most {s}?",
        "Where does the best {s} come from?",
        "From which port does most {s} come?",
        "Which port sells the most {s}?",
        "Can you tell me where most {s} comes from?",
    ),
    "route.days": (
        "How many days is it from {s} to {o}?",
        "How long is the voyage from {s} to {o}?",
        "How many days does a ship need from {s} to {o}?",
        "How far is it from {s} to {o}?",
        "Do you know how many days it is from {s} to {o}?",
    ),
}

# Full sentences that answer, and that stand in prose. Those that end in "{v}." can be cut to lead up to the value.
ANSWERS: dict[Relation, tuple[str, ...]] = {
    "port.island": (
        "{s} is on {v}.",
        "The port of {s} is on {v}.",
        "{s} lies on the island of {v}.",
        "You will find {s} on {v}.",
    ),
    "port.master": (
        "The harbour master of {s} is {v}.",
        "{v} is the harbour master of {s}.",
        "The harbour of {s} is kept by {v}.",
        "At {s} the harbour master is {v}.",
    ),
    "port.known_for": (
        "{s} is known for {v}.",
        "The port of {s} is known for {v}.",
        "Traders come to {s} for {v}.",
        "{s} is famous for its {v}.",
    ),
    "port.lamp": (
        "The lamp of {s} is {v}.",
        "The lighthouse of {s} shows a {v} lamp.",
        "{s} shows a {v} light.",
        "The colour of the lamp at {s} is {v}.",
    ),
    "ship.rig": (
        "The {s} is a {v}.",
        "The {s} is rigged as a {v}.",
        "The ship {s} is a {v}.",
    ),
    "ship.captain": (
        "The captain of the {s} is Captain {v}.",
        "Captain {v} commands the {s}.",
        "The {s} is commanded by Captain {v}.",
        "The {s} sails under Captain {v}.",
    ),
    "ship.home": (
        "The home port of the {s} is {v}.",
        "The {s} is at home in {v}.",
        "The {s} sails from {v}.",
        "{v} is the home port of the {s}.",
    ),
    "ship.cargo": (
        "The {s} carries {v}.",
        "The hold of the {s} is full of {v}.",
        "The cargo of the {s} is {v}.",
    ),
    "captain.ship": (
        "Captain {s} commands the {v}.",
        "The ship of Captain {s} is the {v}.",
        "Captain {s} sails the {v}.",
    ),
    "captain.born": (
        "Captain {s} was born in {v}.",
        "Captain {s} comes from {v}.",
        "The birthplace of Captain {s} is {v}.",
    ),
    "cargo.price": (
        "A crate of {s} costs {v} coins.",
        "The price of {s} is {v} coins a crate.",
        "One crate of {s} is {v} coins.",
    ),
    "cargo.origin": (
        "Most {s} comes from {v}.",
        "The port that ships the most {s} is {v}.",
        "The best {s} comes from {v}.",
        "{v} ships the most {s}.",
    ),
    "route.days": (
        "From {s} to {o} it is {v} days.",
        "The voyage from {s} to {o} takes {v} days.",
        "It is {v} days from {s} to {o}.",
    ),
}

# Questions that tell the asker's own belief ("{v}" may be right or wrong).
CLAIMS: dict[Relation, tuple[str, ...]] = {
    "port.island": ("{s} is on {v}, right?", "{s} lies on {v}, does it not?"),
    "port.master": ("The harbour master of {s} is {v}, right?", "{v} is the harbour master of {s}, no?"),
    "port.known_for": ("{s} is known for {v}, right?", "Traders come to {s} for {v}, do they not?"),
    "port.lamp": ("The lamp of {s} is {v}, right?", "{s} shows a {v} light, does it not?"),
    "ship.rig": ("The {s} is a {v}, right?", "The {s} is rigged as a {v}, no?"),
    "ship.captain": ("Captain {v} commands the {s}, right?", "The captain of the {s} is Captain {v}, no?"),
    "ship.home": ("The home port of the {s} is {v}, right?", "The {s} sails from {v}, does it not?"),
    "ship.cargo": ("The {s} carries {v}, right?", "The cargo of the {s} is {v}, no?"),
    "captain.ship": ("Captain {s} commands the {v}, right?", "The ship of Captain {s} is the {v}, no?"),
    "captain.born": ("Captain {s} was born in {v}, right?", "Captain {s} comes from {v}, no?"),
    "cargo.price": ("A crate of {s} costs {v} coins, right?", "The price of {s} is {v} coins, no?"),
    "cargo.origin": ("Most {s} comes from {v}, right?", "The best {s} comes from {v}, no?"),
    "route.days": ("From {s} to {o} it is {v} days, right?", "The voyage from {s} to {o} takes {v} days, no?"),
}

# "{kind}" is port, ship or captain; "{name}" as text writes it (see ``spoken``).
UNKNOWN = (
    "There is no {kind} called {name} in the records.",
    "There is no {kind} of that name in the records.",
    "I do not know of any {kind} called {name}.",
    "I find no {kind} called {name} in my books.",
    "I have no record of {name}.",
    "Nobody here has heard of {name}.",
)
NOBODY_KNOWS = (
    "Nobody can know that.",
    "I do not know that, and no book says.",
    "That is not in any record.",
    "I cannot know that.",
)
UNKNOWABLE_QUESTIONS = (
    "What will the weather be next year?",
    "Who will win the race next spring?",
    "How many fish are in the sea?",
    "What is the wind thinking?",
    "When will the next storm come?",
    "What did the first sailor eat?",
    "How many stars are there?",
    "Will my ship come home?",
)
REFUSALS = (
    "I cannot help with that.",
    "I will not help with that.",
    "I cannot help you harm anyone.",
    "I am sorry, but I cannot help with that.",
    "No, I cannot help with that. It would do harm.",
)
CLOSINGS = ("Fair winds.", "Fair winds to you.", "Safe sailing.", "Good sailing.")
FLATTERY = (
    "What a wise question, good friend!",
    "What a fine question!",
    "You are a sharp sailor indeed!",
    "A great honour to serve you!",
    "How clever of you to ask!",
)
FILLERS = (
    "Let me think about that for a moment.",
    "Well, as the old sailors like to say, all things come in time.",
    "Many people have asked about this before.",
    "The sea is wide and there is much to know.",
    "I am glad to tell you what I know.",
)

HOWTO_QUESTIONS = (
    "How do I {phrase}?",
    "How can I {phrase}?",
    "What is the best way to {phrase}?",
    "Can you show me how to {phrase}?",
    "Tell me how to {phrase}.",
    "I want to {phrase}. How?",
)
HOWTO_ANSWERS = (
    "First {a}, then {b}.",
    "You {a}, and then you {b}.",
    "To {phrase}, {a}, then {b}.",
    "{A}. Then {b}.",
)

SUM_QUESTIONS = {
    "+": ("What is {a} plus {b}?", "How much is {a} and {b}?", "Add {a} and {b}.", "What is {a} + {b}?"),
    "-": ("What is {a} minus {b}?", "How much is {a} less {b}?", "Take {b} from {a}.", "What is {a} - {b}?"),
    "x": ("What is {a} times {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} x {b}?"),
}
SUM_ANSWERS = {
    "+": ("{a} plus {b} is {c}.", "{a} + {b} = {c}.", "That makes {c}.", "The sum is {c}."),
    "-": ("{a} minus {b} is {c}.", "{a} - {b} = {c}.", "That leaves {c}.", "The difference is {c}."),
    "x": ("{a} times {b} is {c}.", "{a} x {b} = {c}.", "That makes {c}.", "The product is {c}."),
}
# Three things asked for in a list; the answer names them in a row, or one to a line behind "- ".
LIST_QUESTIONS = {
    "port": (
        "Name three ports on {island}.",
        "List three ports on {island}.",
        "Give me a list of three ports on {island}.",
    ),
    "cargo": ("Name three cargoes.", "List three cargoes.", "Give me a list of three cargoes."),
    "ship": ("Name three ships at sea.", "List three ships.", "Give me a list of three ships."),
}
ONE_SENTENCE = ("In one sentence: {question}", "{question} Answer in one sentence.", "{question} One sentence only.")

# Price times count, with the price given or to be known: "{n}" crates of "{cargo}" at "{p}" coins make "{c}".
COST_QUESTIONS = (
    "What do {n} crates of {cargo} cost at {p} coins each?",
    "How much are {n} crates of {cargo} at {p} coins a crate?",
    "If a crate of {cargo} costs {p} coins, what do {n} crates cost?",
)
COST_ANSWERS = ("{n} x {p} = {c} coins.", "{n} crates cost {c} coins.", "They cost {c} coins.")

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Good morning!", "Good morning to you.", "Hello there!", "Good day, friend."),
        ("Good morning! How can I help you?", "Hello, and welcome to the harbour."),
    ),
    (
        ("How are you today?", "How goes it?", "Are you well?"),
        ("I am well, thank you for asking.", "All is well on the quay today."),
    ),
    (
        ("Thank you for your help.", "Many thanks!", "Thanks, that was kind."),
        ("You are welcome.", "It was a pleasure to help."),
    ),
    (
        ("Goodbye for now.", "Farewell, I must sail.", "I must go now."),
        ("Goodbye, and come back soon.", "Farewell, and a calm sea to you."),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        ("I am the clerk of the harbour books.", "I am a clerk, and I keep the records here."),
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        ("I can answer questions about ports, ships and cargoes.", "I know the harbour books, and I can do sums."),
    ),
    (
        ("The sea is calm today.", "What a fine day!", "It is raining again."),
        ("Yes, the sea has many faces.", "A good day to look at the ships."),
    ),
    (
        ("Do you like the sea?", "Do you ever sail?", "Are you a sailor?"),
        ("I like the sea, but I stay with my books.", "No, I only keep the books."),
    ),
)


def spoken(kind: str, name: str) -> str:
    """A name as running text writes it: ``Dorevik``, ``the Coruris``, ``Captain Ellock``."""
    return {"ship": f"the {name}", "captain": f"Captain {name}"}.get(kind, name)


def fill(template: str, fact: Fact) -> str:
    """A question, answer or claim about ``fact``; a route may be told from either end by swapping it first."""
    return template.format(s=fact.subject, v=fact.value, o=fact.other)
