"""The preflight: finds what would go wrong before compute is spent on it.

``check_recipe`` looks at a whole recipe (``keel check``), data included. ``preflight`` is its cheap part, run before
each stage: errors stop the run, warnings are noted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from keel.config import (
    PEOPLE,
    DpoStage,
    EvalStage,
    OnlineBase,
    PpoStage,
    PythonRef,
    Recipe,
    RewardModelRef,
    RewardStage,
    SampleStage,
    SftStage,
    Stage,
    TrainBase,
)
from keel.data.chat import Chat, install_template
from keel.data.collate import messages_hash, pack
from keel.data.sources import read_demonstrations, read_facts, read_preferences, read_prompts, read_texts
from keel.graph import parents, sources
from keel.model.checkpoint import load_policy, load_scalar, load_tokenizer, positions
from keel.model.logprobs import token_logprobs
from keel.model.precision import pick_precision
from keel.reward.python_ref import load_python
from keel.rollout import vllm
from keel.run import RunDir, Silent, StageContext, resolve_device
from keel.train import adamw8bit
from keel.types import Demonstration, Encoded, Message, Preference, Prompt, UserError

FEW = 100  # records below which a stage can hardly learn
KL_TOLERANCE = 1e-4  # nats a token between a policy and its reference before the first step
BATCH_TOLERANCE = 1e-3  # of a reward model's score, alone and among others
_PROBE = (Message("user", "How do I splice a rope?"),)
_REPLIES = (
    "Unlay both ends, marry the strands and tuck each one twice.",
    "Yes.",
    "I do not know.",
    "Ask the bosun. " * 4,
)


@dataclass(frozen=True)
class Finding:
    """``place``: the setting or file; ``sentence``: what is wrong; ``remedy``: what to do."""

    level: Literal["error", "warning"]
    place: str
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.sentence}; {self.remedy}"


def _error(error: UserError, place: str = "") -> Finding:
    """A room's own sentence as a finding."""
    head, _, remedy = str(error).rpartition("; ")
    return Finding("error", place or "recipe", head or remedy, remedy if head else "mend it")


def preflight(stage: Stage, context: StageContext) -> None:
    """The cheap checks before a stage: `UserError` for errors, a note for each warning."""
    found = list(_disk(context.recipe, stage, context.run))
    if isinstance(stage, TrainBase):
        found += _precision(stage, context.device)
        if context.model_path(stage.model).is_dir() or stage.model == "base":
            found += _tokenizer(stage, str(context.model_path(stage.model)), context.recipe)
    for finding in found:
        if finding.level == "error":
            raise UserError(str(finding))
        if not finding.place.startswith(f"{stage.name}.model (") or _first_to_start(stage, context.recipe):
            context.reporter.note(f"warning: {finding}")


def _first_to_start(stage: Stage, recipe: Recipe) -> bool:
    """Whether a warning about the model that ``stage`` starts from is news: a stage that made that model, or started
    from it too, has said it."""
    starts = [other for other in recipe.stages if isinstance(other, TrainBase) and other.model not in _names(recipe)]
    first = {other.model: other.name for other in reversed(starts)}
    return stage.name in first.values()


def _names(recipe: Recipe) -> set[str]:
    return {stage.name for stage in recipe.stages}


def check_recipe(recipe: Recipe, run: RunDir) -> list[Finding]:
    """Everything that can be found without training. Finished stages in ``run`` are looked at too. Never raises
    `UserError`: that is a finding."""
    found: list[Finding] = []
    try:
        device = resolve_device(recipe.device)
    except UserError as error:
        return [_error(error, "device")]
    for stage in recipe.stages:
        try:
            parents(recipe, stage)
        except UserError as error:
            found.append(_error(error, stage.name))
        found += _disk(recipe, stage, run)
        if isinstance(stage, TrainBase):
            found += _precision(stage, device)
        found += _python_refs(stage)
        found += _extras(stage)
    found += _models(recipe, run)
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------------- machine


def _precision(stage: TrainBase, device: str) -> Iterator[Finding]:
    place = f"{stage.name}.precision"
    if stage.precision == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        yield Finding("error", place, "this GPU has no bfloat16", "use precision: fp32")
    if stage.precision == "bf16" and device == "mps":
        yield Finding("warning", place, "bfloat16 is not faster than float32 on MPS", "use precision: auto")
    forced = isinstance(stage, OnlineBase) and stage.old_logprobs == "sampler"
    if forced and pick_precision(stage.precision, device) == "bf16":
        sentence = "in bfloat16 the sampler's log-probabilities differ from the trainer's, and ratios with them"
        yield Finding("warning", f"{stage.name}.old_logprobs", sentence, "use old_logprobs: auto")


def _extras(stage: Stage) -> Iterator[Finding]:
    """Packages that the stage's settings ask for and that are not installed."""
    needed = []
    if isinstance(stage, TrainBase) and stage.optim.kind == "adamw8bit":
        needed.append(adamw8bit.require)
    if isinstance(stage, SampleStage | OnlineBase | EvalStage) and stage.sampling.backend == "vllm":
        needed.append(vllm.require)
    for require in needed:
        try:
            require()
        except UserError as error:
            yield _error(error, stage.name)


def _disk(recipe: Recipe, stage: Stage, run: RunDir) -> Iterator[Finding]:
    """A training stage keeps float32 weights, and while it runs two moments and the best weights as well."""
    weights = sum(file.stat().st_size for file in Path(recipe.model.path).glob("*.safetensors"))
    if not isinstance(stage, TrainBase) or not weights:
        return
    needed = weights * 2 * (8 if isinstance(stage, PpoStage) else 5)  # at most: shipped in bfloat16, kept in float32
    folder = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        sentence = f"{stage.name} may need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        yield Finding("warning", str(run.path), sentence, "free some space or choose another --out")


def _python_refs(stage: Stage) -> Iterator[Finding]:
    for place, source in sources(stage):
        if isinstance(source, PythonRef):
            try:
                load_python(source.ref)
            except UserError as error:
                yield _error(error, f"{stage.name}.{place}")


# ------------------------------------------------------------------------------------------------ model and chat


def _tokenizer(stage: TrainBase, path: str, recipe: Recipe) -> Iterator[Finding]:
    """The traps of tokenizers and templates, on the tokenizer that the stage starts from."""
    chat = _chat(path, recipe)
    place = f"{stage.name}.model ({path})"
    for problem in chat.check():
        sentence, _, remedy = problem.partition("; ")
        yield Finding("warning", place, sentence, remedy or "set model.chat_template, or leave such rows out")
    if not chat.stop_ids:
        yield Finding(
            "error",
            place,
            "the tokenizer has no token that ends a reply",
            "set model.chat_template: keel, or add an eos",
        )
        return
    yield from _prompt_prefix(chat, place)


def _chat(path: str, recipe: Recipe) -> Chat:
    """The chat as the stages set it up: the first SFT stage gives a base model without a template Keel's own."""
    tokenizer = load_tokenizer(path, recipe.model.revision)
    if not any(isinstance(stage, SftStage) for stage in recipe.stages):
        return Chat(tokenizer)
    if recipe.model.chat_template is not None:
        install_template(tokenizer, recipe.model.chat_template)
    elif Chat(tokenizer).plain:
        install_template(tokenizer, "keel")
    return Chat(tokenizer)


def _prompt_prefix(chat: Chat, place: str) -> Iterator[Finding]:
    """What is sampled from must be how what is learned from begins, and a reply's end must be learned."""
    prompt = chat.encode_prompt(_PROBE)
    learned = chat.encode_conversation((*_PROBE, Message("assistant", _REPLIES[0])))
    remedy = "set model.chat_template: keel"
    if list(learned.ids[: len(prompt)]) != prompt or any(learned.mask[: len(prompt)]):
        yield Finding("error", place, "a prompt is not how its conversation begins, token for token", remedy)
    last = max(i for i, masked in enumerate(learned.mask) if masked)
    if learned.ids[last] not in chat.stop_ids:
        yield Finding("error", place, "the end of a reply would never be learned", remedy)
    bos = chat.tokenizer.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        yield Finding("error", place, "a prompt begins with BOS twice", remedy)
    if chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id:
        sentence = "pad and eos are one token: Keel learns it all the same, but tools that mask padding would not"
        yield Finding("warning", place, sentence, "give the tokenizer a pad token of its own")


def _models(recipe: Recipe, run: RunDir) -> list[Finding]:
    """Tokenizer, data and checkpoints; what cannot be loaded is a finding, and what rests on it is left out."""
    try:
        chat = _chat(recipe.model.path, recipe)
        model = recipe.model
        context = positions(model.path, model.revision, model.trust_remote_code) or 0
    except UserError as error:
        return [_error(error, "model.path")]
    found: list[Finding] = []
    first = next((stage for stage in recipe.stages if isinstance(stage, TrainBase) and stage.model == "base"), None)
    if first is not None:
        found += _tokenizer(first, recipe.model.path, recipe)
    found += _data(recipe, chat, context)
    for stage in recipe.stages:
        try:
            found += _reference(stage, recipe, run, chat)
            found += _reward_models(stage, run)
        except UserError as error:
            found.append(_error(error, stage.name))
    return found


# ---------------------------------------------------------------------------------------------------------- data


def _data(recipe: Recipe, chat: Chat, context: int) -> list[Finding]:
    """Missing, broken, tiny, too long and leaking data, with counts."""
    data = recipe.data
    found: list[Finding] = []
    demonstrations: list[Demonstration] = []
    prompts: list[Prompt] = []
    preferences: list[Preference] = []
    heldout: list[Prompt] = []
    try:
        for place, source in _demonstrations(recipe):
            rows = read_demonstrations(_needed(source, place, "sft"))
            demonstrations += rows
            found += _few(rows, place)
            encoded = chat.encode_demonstrations(rows)
            found += _lengths(encoded, place, "data.max_length", data.max_length, data.over_length, context)
        if data.prompts is not None:
            prompts = read_prompts(data.prompts)
            found += _few(prompts, "data.prompts")
        if data.preferences is not None:
            preferences = read_preferences(data.preferences)
            found += _few(preferences, "data.preferences")
            found += _pairs(preferences, recipe, chat, context)
        if data.heldout_prompts is not None:
            heldout = read_prompts(data.heldout_prompts)
            found += _few(heldout, "data.heldout_prompts")
        if data.facts is not None:
            read_facts(data.facts)
        measured, mixed = (
            set(read_texts(source)) if source else set() for source in (data.base_text, data.pretraining)
        )
        if both := len(measured & mixed):
            sentence = f"{both} of {len(measured)} texts are in data.pretraining too"
            remedy = "take them out of either: the loss on them would measure memory"
            found.append(Finding("error", "data.base_text", sentence, remedy))
    except UserError as error:
        return [*found, _error(error, "data")]
    for name, some in (("data.prompts", prompts), ("data.heldout_prompts", heldout)):
        ids = chat.encode_prompts([prompt.messages for prompt in some])
        encoded = [Encoded(tuple(prompt), (False,) * len(prompt)) for prompt in ids]
        found += _lengths(encoded, name, "data.max_prompt_length", data.max_prompt_length, data.over_length, context)
        found += _room(recipe, name, max((len(row) for row in ids), default=0), context)
    several = [p for p in (*prompts, *(pair.prompt for pair in preferences)) if len(p.messages) > 1]
    if chat.plain and several:
        sentence = f"it has no chat template, and would see the last message alone of {len(several)} prompts"
        found.append(Finding("error", "model.path", sentence, "start from an SFT stage, which gives it a template"))
    learned = {messages_hash(d.messages[:-1]) for d in demonstrations if not d.plain}
    learned |= {messages_hash(p.prompt.messages) for p in preferences}
    sampled = {messages_hash(p.messages) for p in prompts}
    return [*found, *_leaks(heldout, learned, sampled)]


def _demonstrations(recipe: Recipe) -> list[tuple[str, str | None]]:
    """(the setting that names it, file) of everything that SFT stages learn from, but for what lies in the store."""
    stages = [stage for stage in recipe.stages if isinstance(stage, SftStage)]
    made = {PEOPLE, *_names(recipe)}
    named = [(f"{s.name}.demonstrations", file) for s in stages for file in s.sources if file not in made]
    default = [("data.demonstrations", recipe.data.demonstrations)] if any(not s.sources for s in stages) else []
    return [*default, *named]


def _leaks(heldout: Sequence[Prompt], learned: set[str], sampled: set[str]) -> Iterator[Finding]:
    """Held-out prompts that training sees. The stages leave those among data.prompts out of sampling and training."""
    hashes = [messages_hash(prompt.messages) for prompt in heldout]
    place = "data.heldout_prompts"
    if both := sum(h in learned for h in hashes):
        sentence = f"{both} of {len(heldout)} are in the demonstrations or preferences too"
        yield Finding("error", place, sentence, "take them out of either: the evaluation would measure memory")
    if both := sum(h in sampled for h in hashes):
        sentence = f"{both} of {len(heldout)} are in data.prompts too and will be left out there"
        yield Finding("warning", place, sentence, "take them out of either to be rid of this line")


def _needed(source: str | None, place: str, kind: str) -> str:
    if source is None:
        raise UserError(f"{place} is not set and stage kind {kind} needs it; set {place}=FILE")
    return source


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
        yield Finding("warning", place, f"{long} of {len(rows)} records are left out ({setting})", f"raise {setting}")
    kept = [len(row.ids) for row in rows if len(row.ids) <= limit]
    beyond = sum(length > context for length in kept) if context else 0
    if beyond:
        sentence = f"{beyond} of {len(rows)} records are longer than the model's {context} positions"
        yield Finding("error", place, sentence, f"lower {setting} to {context} and set data.over_length: skip")
    empty = sum(not any(row.mask) for row in rows) if setting == "data.max_length" else 0
    if empty:
        yield Finding("error", place, f"{empty} records have nothing to learn", "take out the empty replies")


def _room(recipe: Recipe, place: str, longest: int, context: int) -> Iterator[Finding]:
    for stage in recipe.stages:
        if context and isinstance(stage, SampleStage | OnlineBase | EvalStage):
            room = context - longest
            if stage.sampling.max_new_tokens > room:
                sentence = f"replies to the longest prompt ({longest} tokens) have room for {room} tokens only"
                remedy = f"lower {stage.name}.sampling.max_new_tokens ({stage.sampling.max_new_tokens})"
                yield Finding("warning", place, sentence, remedy)


def _pairs(preferences: Sequence[Preference], recipe: Recipe, chat: Chat, context: int) -> Iterator[Finding]:
    replies = [(p.prompt.messages, text, True) for p in preferences for text in (p.chosen, p.rejected)]
    data = recipe.data
    yield from _lengths(
        chat.encode_replies(replies), "data.preferences", "data.max_length", data.max_length, data.over_length, context
    )
    seen = {(messages_hash(p.prompt.messages), p.chosen, p.rejected) for p in preferences if not p.tie}
    contrary = sum((prompt, worse, better) in seen for prompt, better, worse in seen) // 2
    if contrary:
        sentence = f"{contrary} pairs are judged both ways"
        yield Finding(
            "warning", "data.preferences", sentence, "keep them if annotators truly disagree; else mend the rows"
        )


# --------------------------------------------------------------------------------------------------- checkpoints


def _reference(stage: Stage, recipe: Recipe, run: RunDir, chat: Chat) -> Iterator[Finding]:
    """The policy must be its own reference before the first step: else the KL penalty does not start at 0."""
    if not isinstance(stage, DpoStage | OnlineBase) or stage.reference in (None, stage.model):
        return
    context = StageContext(recipe, run, run.stage(stage.name), Silent(), "cpu")
    paths = [context.model_path(name) for name in (stage.model, str(stage.reference))]
    if not all(path.is_dir() and (path / "config.json").exists() for path in paths):
        sentence = f"the reference ({stage.reference}) is not the model that training starts from ({stage.model})"
        yield Finding("warning", f"{stage.name}.reference", sentence, "leave reference out: the KL at step 0 is 0 then")
        return
    logps = []
    for path in paths:
        model, tokenizer = load_policy(path)
        rows = [Chat(tokenizer).encode_reply(_PROBE, reply) for reply in _REPLIES]
        with torch.no_grad():
            logps.append(token_logprobs(model, pack(rows)).logp_C)
    gap = float((logps[0] - logps[1]).abs().mean()) if logps[0].shape == logps[1].shape else float("inf")
    if gap > KL_TOLERANCE:
        sentence = f"policy and reference differ by {gap:.3g} nats a token before the first step"
        yield Finding("warning", f"{stage.name}.reference", sentence, "leave reference out, unless this is meant")


def _reward_models(stage: Stage, run: RunDir) -> Iterator[Finding]:
    """A reply's score must not depend on what else is in its batch."""
    names: list[str] = []
    if isinstance(stage, RewardStage) and run.stage(stage.name).done:
        names = [stage.name]
    else:
        named = [source.model for _, source in sources(stage) if isinstance(source, RewardModelRef)]
        names = [name for name in dict.fromkeys(named) if Path(name).is_dir()]
    for name in names:
        path = Path(name) if Path(name).is_dir() else run.stage(name).path
        model = load_scalar(path)
        rows = [model.chat.encode_reply(_PROBE, reply) for reply in _REPLIES]
        with torch.no_grad():
            together = model.score_packed(pack(rows))
            alone = torch.cat([model.score_packed(pack([row])) for row in rows])
        gap = float((together - alone).abs().max())
        if not gap <= BATCH_TOLERANCE:
            sentence = f"its score of a reply changes by {gap:.3g} with the rest of the batch"
            yield Finding("error", str(path), sentence, "train it again with this version of Keel")
