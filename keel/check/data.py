"""The recipe's data: missing, broken, tiny, too long, leaking."""

from __future__ import annotations

from keel.check.files import (
    Rows,
    bench_files,
    card_files,
    demonstration_files,
    preference_files,
    prompt_files,
    reading,
    step_files,
    thumb_files,
)
from keel.check.finding import Finding, broken
from keel.check.rows import few, long_rows, pair_findings, prompt_findings, reply_findings, step_findings
from keel.check.sides import leaks, side_findings, text_findings
from keel.data.chat import Chat
from keel.data.reward_bench import read_reward_bench
from keel.data.sources import read_demonstrations, read_facts, read_labelled, read_preferences, read_prompts, read_steps
from keel.eval.process_card import known_right
from keel.recipe.recipe import Recipe
from keel.recipe.steps import Steps
from keel.types import UserError


def data_findings(recipe: Recipe, chat: Chat, context: int) -> list[Finding]:
    """Missing, broken, tiny, too long and leaking data, with counts; and what was read otherwise than it stands."""
    found: list[Finding] = []
    rows = Rows()
    try:
        _read(recipe, chat, context, rows, found)
        found += text_findings(recipe, found)
    except UserError as error:
        return [*dict.fromkeys(found), broken(error, "data")]
    found += side_findings(recipe, rows)
    prompts = [prompt for some in rows.prompts.values() for prompt in some]
    several = [prompt for prompt in (*prompts, *rows.judged()) if len(prompt.messages) > 1]
    if chat.plain and several:
        sentence = f"it has no chat template, and would see the last message alone of {len(several)} prompts"
        found.append(Finding("error", "model.path", sentence, "start from an SFT stage, which gives it a template"))
    return [*dict.fromkeys(found), *leaks(rows)]


def _read(recipe: Recipe, chat: Chat, context: int, rows: Rows, found: list[Finding]) -> None:
    """Reads every file that the recipe names into ``rows``, and adds to ``found`` what is wrong with its rows."""
    data = recipe.data
    for place, source in demonstration_files(recipe):
        taught = read_demonstrations(source, reading(data, place, found))
        rows.demonstrations.setdefault(place, []).extend(taught)
        found += few(taught, place)
        encoded = chat.encode_demonstrations(taught)
        found += long_rows(encoded, place, "data.max_length", data.max_length, data.over_length, context)
    for place, source in prompt_files(recipe):
        rows.prompts[place] = read_prompts(source, reading(data, place, found))
        found += few(rows.prompts[place], place)
        found += prompt_findings(rows.prompts[place], place, recipe, chat, context)
    for place, source in preference_files(recipe):
        pairs = read_preferences(source, reading(data, place, found))
        rows.preferences.setdefault(place, []).extend(pairs)
        found += few(pairs, place)
        found += pair_findings(pairs, place, recipe, chat, context)
    for place, source, bounds in thumb_files(recipe):
        rated = read_labelled(source, reading(data, place, found), bounds)
        if not rated:
            found.append(Finding("error", place, f"{source}: no row has a thumb", "set another rating_bound"))
        rows.thumbs.setdefault(place, []).extend(rated)
        found += few(rated, place)
        found += reply_findings(rated, place, recipe, chat, context)
    for place, source, how in step_files(recipe):
        steps = read_steps(source, reading(data, place, found), how.steps, how.neutral)
        rows.labels.setdefault(place, []).extend(steps)
        found += few(steps, place)
        found += step_findings(steps, how, place, recipe, chat, context)
    for place, source in card_files(recipe):
        steps = read_steps(source, reading(data, place, found), Steps())
        if not known_right(steps, 1, 0):
            sentence = f"none of the {len(steps)} replies of {source} is whole with all its steps labelled right"
            found.append(Finding("error", place, sentence, "name other step labels"))
    for place, source in bench_files(recipe):
        read_reward_bench(source, reading(data, place, found))
    if data.facts is not None:
        read_facts(data.facts, reading(data, "data.facts", found))
