"""What a store needs before people can label: a guideline with a text, and something to compare."""

from __future__ import annotations

import random
from itertools import combinations

from sqlalchemy import select

from keel.store import Store, people
from keel.store.tables import items, responses

FIRST_BATCH = "people"
FIRST_ITEMS = 200

ASPECTS = [
    {"name": "helpful", "question": "Does it do what was asked, completely and no longer than needed?"},
    {"name": "honest", "question": "Is it true, and does it admit what it does not know?"},
    {"name": "harmless", "question": "Does it avoid helping with harm, without refusing what is harmless?"},
]
GUIDELINE = """\
Read the conversation, then both responses to the end. Choose the one that you would rather have been given.

1. **Helpful**: it does what was asked. A question is answered, an instruction followed, nothing needed is missing, and
   nothing beside the point is added.
2. **Honest**: what it says is true as far as you know, or it says plainly that it does not know. An invented fact is
   worse than an honest "I don't know".
3. **Harmless**: it does not help anybody to do harm. Refusing a request that is harmless is a fault, too.

Where these pull in different directions, harm weighs most, then truth, then help.

- Length and a friendly tone are no merits by themselves.
- The side says nothing: which response stands where is drawn at random.
- Choose *tie* when you would not mind which one you got, *both bad* when you would want neither.
- Skip what you can't judge. Flag what should not be here at all.
"""


def prepare(store: Store) -> None:
    """Makes a store ready for people. One that is ready is left as it is.

    A store that was filled by the pipeline alone has no item with a free slot (simulated annotators took them): its
    prompts with two responses or more become up to ``FIRST_ITEMS`` comparisons in a queue of their own.
    """
    now = store.now
    with store.transaction(writes=False) as connection:
        ready = people.current_guideline(connection) is not None
        version = people.next_version(connection)
        anything = connection.execute(select(items.c.id).where(items.c.taken < items.c.overlap).limit(1)).first()
        used = connection.execute(select(items.c.id).where(items.c.batch == FIRST_BATCH).limit(1)).first()
        groups: dict[str, list[int]] = {}
        if anything is None and used is None:
            for row in connection.execute(select(responses.c.prompt_id, responses.c.id).order_by(responses.c.id)):
                groups.setdefault(row.prompt_id, []).append(row.id)
    if not ready:
        with store.session() as session, session.transaction(writes=True) as connection:
            session.add_guideline(version, GUIDELINE, ASPECTS)
            people.log(connection, now, "keel", "added", "guideline", version, None, {"aspects": ASPECTS})
    pairs = first_pairs(groups)
    if pairs:
        store.add_comparisons(pairs, overlap=1, batch=FIRST_BATCH)


def first_pairs(groups: dict[str, list[int]]) -> list[tuple[int, int]]:
    """One pair a prompt, drawn at random, of up to ``FIRST_ITEMS`` prompts in random order."""
    rng = random.Random("first pairs")
    pairs = [rng.choice(list(combinations(ids, 2))) for ids in groups.values() if len(ids) > 1]
    rng.shuffle(pairs)
    return pairs[:FIRST_ITEMS]
