"""The recipe's data: missing, broken, tiny, too long, leaking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from keel.check.finding import Finding, broken, stage_names
from keel.data.chat import Chat
from keel.data.collate import messages_hash, split_by_prompt
from keel.data.rows import BadRows, Reading
from keel.data.sources import (
    read_demonstrations,
    read_facts,
    read_labelled,
    read_preferences,
    read_prompts,
    read_texts,
)
from keel.recipe.declared import PEOPLE
from keel.recipe.recipe import Recipe
from keel.recipe.sections import DataConfig
from keel.stages.inputs import training_side
from keel.types import Demonstration, Encoded, LabelledCompletion, Message, Preference, Prompt, UserError, place_of

FEW = 100  # records below which a stage can hardly learn
HELDOUT = "data.heldout_prompts"


def data_findings(recipe: Recipe, chat: Chat, context: int) -> list[Finding]:
    """Missing, broken, tiny, too long and leaking data, with counts; and what was read otherwise than it stands."""
    data = recipe.data
    found: list[Finding] = []
    taught: dict[str, list[Demonstration]] = {}
    prompts: dict[str, list[Prompt]] = {}
    judged: dict[str, list[Preference]] = {}
    thumbs: dict[str, list[LabelledCompletion]] = {}
    try:
        for place, source in _demonstrations(recipe):
            rows = read_demonstrations(source, _reading(data, place, found))
            taught.setdefault(place, []).extend(rows)
            found += _few(rows, place)
            encoded = chat.encode_demonstrations(rows)
            found += _lengths(encoded, place, "data.max_length", data.max_length, data.over_length, context)
        for place, source in _prompts(recipe):
            prompts[place] = read_prompts(source, _reading(data, place, found))
            found += _few(prompts[place], place)
            found += _asked(prompts[place], place, recipe, chat, context)
        for place, source in _preferences(recipe):
            pairs = read_preferences(source, _reading(data, place, found))
            judged.setdefault(place, []).extend(pairs)
            found += _few(pairs, place)
            found += _pairs(pairs, place, recipe, chat, context)
        for place, source, bounds in _thumbs(recipe):
            rated = read_labelled(source, _reading(data, place, found), bounds)
            if not rated:
                found.append(Finding("error", place, f"{source}: no row has a thumb", "set another rating_bound"))
            thumbs.setdefault(place, []).extend(rated)
            found += _few(rated, place)
            found += _replies(rated, place, recipe, chat, context)
        if data.facts is not None:
            read_facts(data.facts, _reading(data, "data.facts", found))
        found += _texts(recipe, found)
    except UserError as error:
        return [*dict.fromkeys(found), broken(error, "data")]
    demonstrations = [row for rows in taught.values() for row in rows]
    preferences: list[Preference | LabelledCompletion] = [pair for pairs in judged.values() for pair in pairs]
    preferences += [one for rated in thumbs.values() for one in rated]
    found += _sides(recipe, taught, prompts, judged, thumbs)
    asked = [prompt for some in prompts.values() for prompt in some]
    several = [p for p in (*asked, *(pair.prompt for pair in preferences)) if len(p.messages) > 1]
    if chat.plain and several:
        sentence = f"it has no chat template, and would see the last message alone of {len(several)} prompts"
        found.append(Finding("error", "model.path", sentence, "start from an SFT stage, which gives it a template"))
    learned = {messages_hash(_shown(d.messages[:-1])) for d in demonstrations if not d.plain}
    learned |= {messages_hash(p.prompt.messages) for p in preferences}
    sampled = {messages_hash(p.messages) for p in prompts.get("data.prompts", [])}
    return [*dict.fromkeys(found), *_leaks(prompts.get(HELDOUT, []), learned, sampled)]


def _sides(
    recipe: Recipe,
    taught: dict[str, list[Demonstration]],
    prompts: dict[str, list[Prompt]],
    judged: dict[str, list[Preference]],
    thumbs: dict[str, list[LabelledCompletion]],
) -> Iterator[Finding]:
    """Each stage holds prompts out, and must have some to learn from, as it will find itself."""
    data, made = recipe.data, {PEOPLE, *stage_names(recipe)}
    read: dict[str, Mapping[str, Sequence[Demonstration] | Sequence[Preference] | Sequence[LabelledCompletion]]]
    read = {"demonstrations": taught, "preferences": judged, "thumbs": thumbs}
    for stage in recipe.stages:
        share = stage.held_out(data)
        field = next((name for name in read if name in stage.files()), None)
        if share is None or field is None or made & set(stage.files()[field]):
            continue
        place = f"{stage.name}.{field}"
        rows = read[field].get(place if stage.files()[field] else f"data.{field}", [])
        try:
            training = split_by_prompt(rows, share, recipe.seed)[0] if rows else []
        except UserError as error:
            yield broken(error, place)
            continue
        tied = [isinstance(row, Preference) and row.tie for row in training]
        if tied and all(tied):
            yield Finding("error", place, "every pair to train on is a tie", "add decided pairs")
    pool = prompts.get("data.prompts", [])
    named = None if data.heldout_prompts is None else {messages_hash(p.messages) for p in prompts.get(HELDOUT, [])}
    asking = [s for s in recipe.stages if "prompts" in s.reads(data) and "prompts" not in s.files()]
    if pool and any(named is None or s.makes for s in asking):
        try:
            training_side(pool, named, data, recipe.seed)
        except UserError as error:
            yield broken(error, "data.prompts")


def _reading(data: DataConfig, place: str, found: list[Finding]) -> Reading:
    """As the stages read it; what they would note or leave out becomes a finding."""

    def skipped(bad: BadRows) -> None:
        rows = "".join(f"\n  {line}" for line in bad.first())
        found.append(Finding("warning", place, f"{bad.summary} and are left out (data.on_bad_row: skip){rows}"))

    return Reading(data.on_bad_row, lambda text: found.append(Finding("note", place, text)), skipped)


def _shown(messages: Sequence[Message]) -> list[Message]:
    """Messages as a prompt has them: which of them are learned says nothing there."""
    return [replace(message, learned=True) for message in messages]


def _texts(recipe: Recipe, found: list[Finding]) -> Iterator[Finding]:
    data = recipe.data
    named = {"data.base_text": data.base_text, "data.pretraining": data.pretraining}
    measured, mixed = (
        set(read_texts(source, _reading(data, place, found))) if source else set() for place, source in named.items()
    )
    if both := len(measured & mixed):
        sentence = f"{both} of {len(measured)} texts are in data.pretraining too"
        yield Finding(
            "error", "data.base_text", sentence, "take them out of either: the loss on them would measure memorisation"
        )


def _demonstrations(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of everything that SFT stages learn from, but for what lies in the store.
    UserError for a stage that names none where the recipe has none either."""
    place, default = "data.demonstrations", recipe.data.demonstrations
    leaning = [stage for stage in recipe.stages if stage.files().get("demonstrations") == ()]
    if leaning and default is None:
        raise UserError(f"{place} is not set and stage kind {leaning[0].kind} needs it; set {place}=FILE")
    return [*([(place, default)] if leaning and default is not None else []), *_named(recipe, "demonstrations")]


def _prompts(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of the prompts that the recipe and its stages name."""
    own = [("data.prompts", recipe.data.prompts), (HELDOUT, recipe.data.heldout_prompts)]
    return [*((place, source) for place, source in own if source is not None), *_named(recipe, "prompts")]


def _preferences(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of the pairs that the recipe and its stages name."""
    default = recipe.data.preferences
    return [*([("data.preferences", default)] if default else []), *_named(recipe, "preferences")]


def _thumbs(recipe: Recipe) -> Iterator[tuple[str, str, tuple[float, float] | None]]:
    """(the setting that names it, file, bounds of ratings) of the single replies that stages name."""
    bounds = {stage.name: stage.rating_bounds() for stage in recipe.stages}
    for place, file in _named(recipe, "thumbs"):
        yield place, file, bounds[place.partition(".")[0]]


def _named(recipe: Recipe, field: str) -> Iterator[tuple[str, str]]:
    """(the setting that names it, file) of the files in one field of the stages."""
    made = {PEOPLE, *stage_names(recipe)}
    for stage in recipe.stages:
        named = stage.files().get(field, ())
        files = (named,) if isinstance(named, str) else [name for name in named if name not in made]
        yield from ((f"{stage.name}.{field}", file) for file in files)


def _leaks(heldout: Sequence[Prompt], learned: set[str], sampled: set[str]) -> Iterator[Finding]:
    """Held-out prompts that training sees. The stages leave those among data.prompts out of sampling and training."""
    hashes = [messages_hash(prompt.messages) for prompt in heldout]
    place = HELDOUT
    if both := sum(h in learned for h in hashes):
        sentence = f"{both} of {len(heldout)} are in the demonstrations or preferences too"
        yield Finding("error", place, sentence, "take them out of either: the evaluation would measure memorisation")
    if both := sum(h in sampled for h in hashes):
        sentence = f"{both} of {len(heldout)} are in data.prompts too and will be left out there"
        yield Finding("warning", place, sentence, "take them out of either to silence this warning")


def _few(records: Sequence[object], place: str) -> Iterator[Finding]:
    if len(records) < FEW:
        yield Finding("warning", place, f"only {len(records)} records", f"expect little below {FEW}; add more")


def _lengths(
    rows: Sequence[Encoded], place: str, setting: str, limit: int, over: str, context: int
) -> Iterator[Finding]:
    long = sum(len(row.ids) > limit for row in rows)
    if long and over == "error":
        sentence = f"{long} of {len(rows)} records are longer than {setting} = {limit} tokens"
        yield Finding("error", place, sentence, f"raise {setting} or set data.over_length: skip")
    elif long:
        level: Literal["error", "warning"] = "error" if long == len(rows) else "warning"
        yield Finding(level, place, f"{long} of {len(rows)} records are left out ({setting})", f"raise {setting}")
    kept = [len(row.ids) for row in rows if len(row.ids) <= limit]
    beyond = sum(length > context for length in kept) if context else 0
    if beyond:
        sentence = f"{beyond} of {len(rows)} records are longer than the model's {context} positions"
        yield Finding("error", place, sentence, f"lower {setting} to {context} and set data.over_length: skip")
    empty = sum(not row.predicted for row in rows) if setting == "data.max_length" else 0
    if empty:
        yield Finding("error", place, f"{empty} records have nothing to learn", "take out the empty replies")


def _asked(prompts: Sequence[Prompt], place: str, recipe: Recipe, chat: Chat, context: int) -> Iterator[Finding]:
    """Raises UserError for a prompt that the template refuses."""
    data = recipe.data
    ids = chat.encode_prompts([prompt.messages for prompt in prompts], [place_of(prompt) for prompt in prompts])
    encoded = [Encoded(tuple(prompt), (False,) * len(prompt)) for prompt in ids]
    yield from _lengths(encoded, place, "data.max_prompt_length", data.max_prompt_length, data.over_length, context)
    yield from _room(recipe, place, max((len(row) for row in ids), default=0), context)


def _room(recipe: Recipe, place: str, longest: int, context: int) -> Iterator[Finding]:
    for stage in recipe.stages:
        sampling = stage.samples()
        if context and sampling is not None:
            room = context - longest
            if sampling.max_new_tokens > room:
                sentence = f"replies to the longest prompt ({longest} tokens) have room for {room} tokens only"
                remedy = f"lower {stage.name}.sampling.max_new_tokens ({sampling.max_new_tokens})"
                yield Finding("warning", place, sentence, remedy)


def _replies(
    rows: Sequence[LabelledCompletion], place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    data = recipe.data
    replies = [(r.prompt.messages, r.completion, r.finished) for r in rows]
    encoded = chat.encode_replies(replies, [place_of(r) for r in rows])
    yield from _lengths(encoded, place, "data.max_length", data.max_length, data.over_length, context)
    said: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        said.setdefault((messages_hash(row.prompt.messages), row.completion), set()).add(row.label)
    if both := sum(len(labels) > 1 for labels in said.values()):
        yield Finding("warning", place, f"{both} replies have thumbs up and down", "keep them if people truly disagree")
    if rows and len({row.label for row in rows}) == 1:
        way = "up" if rows[0].label else "down"
        yield Finding("warning", place, f"all {len(rows)} replies have thumbs {way}", "add some that have not")


def _pairs(
    preferences: Sequence[Preference], place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    replies = [
        (p.prompt.messages, text, finished)
        for p in preferences
        for text, finished in ((p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished))
    ]
    data = recipe.data
    encoded = chat.encode_replies(replies, [place_of(p) for p in preferences for _ in range(2)])
    yield from _lengths(encoded, place, "data.max_length", data.max_length, data.over_length, context)
    seen = {(messages_hash(p.prompt.messages), p.chosen, p.rejected) for p in preferences if not p.tie}
    contrary = sum((prompt, worse, better) in seen for prompt, better, worse in seen) // 2
    if contrary:
        sentence = f"{contrary} pairs are judged both ways"
        yield Finding("warning", place, sentence, "keep them if annotators truly disagree; else fix the rows")
