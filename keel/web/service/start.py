"""What a store needs before people can label: a guideline with a text, and something to compare."""

from __future__ import annotations

import random
import secrets
from itertools import combinations

from sqlalchemy import Connection, select

from keel.store import Store, guidelines, people
from keel.store.ai_labels import judged_prompts
from keel.store.ingest import insert_missing
from keel.store.people_tables import settings
from keel.store.removals import in_use
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
    prompts with two responses or more become up to ``FIRST_ITEMS`` comparisons in a queue of their own. Those that a
    model judges by principles are left to it: nobody need read what a constitution stands for.
    """
    now = store.now
    with store.transaction(writes=False) as connection:
        ready = guidelines.current_guideline(connection) is not None
        version = guidelines.next_version(connection)
        anything = connection.execute(
            select(items.c.id)
            .where(items.c.taken < items.c.overlap, items.c.out.is_(False), items.c.kind != "step")
            .limit(1)
        ).first()
        used = connection.execute(select(items.c.id).where(items.c.batch == FIRST_BATCH).limit(1)).first()
        wanted = anything is None and used is None
        groups = open_groups(connection) if wanted else {}
        by_models = judged_prompts(connection) if wanted else set()
        left = {id: some for id, some in groups.items() if id not in by_models}
        pairs = first_pairs(connection, left, FIRST_ITEMS) if wanted else []
    if not ready:
        with store.session() as session, session.transaction(writes=True) as connection:
            session.add_guideline(version, GUIDELINE, ASPECTS)
            people.log(connection, now, "keel", "added", "guideline", version, None, {"aspects": ASPECTS})
    if pairs:
        store.add_comparisons(pairs, overlap=1, batch=FIRST_BATCH)


def name_of(store: Store) -> str:
    """What tells this store from any other one: drawn the first time, and the same from then on."""
    with store.transaction(writes=False) as connection:
        name = people.setting(connection, "store_name", "")
    if not name:
        with store.transaction(writes=True) as connection:
            insert_missing(connection, settings, [{"name": "store_name", "value": secrets.token_hex(8)}])
            name = people.setting(connection, "store_name", "")
    return str(name)


def open_groups(connection: Connection) -> dict[str, list[int]]:
    """Responses in use by prompt, oldest first; of two with the same text the first: nobody could tell them apart."""
    texts: dict[str, dict[str, int]] = {}
    query = select(responses.c.prompt_id, responses.c.id, responses.c.text).order_by(responses.c.id)
    query = query.where(in_use(responses.c.prompt_id, responses.c.id))
    for row in connection.execute(query):
        texts.setdefault(row.prompt_id, {}).setdefault(row.text.strip(), row.id)
    return {prompt: list(ids.values()) for prompt, ids in texts.items()}


def first_pairs(connection: Connection, groups: dict[str, list[int]], most: int) -> list[tuple[int, int]]:
    """One pair a prompt that is not in the people's queue, drawn at random, of up to ``most`` prompts in random
    order."""
    rng = random.Random("first pairs")
    queued = set(connection.execute(select(items.c.key).where(items.c.batch == FIRST_BATCH)).scalars())
    open_pairs = [
        [pair for pair in combinations(ids, 2) if "{}-{}".format(*pair) not in queued] for ids in groups.values()
    ]
    pairs = [rng.choice(some) for some in open_pairs if some]
    rng.shuffle(pairs)
    return pairs[:most]
