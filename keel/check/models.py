"""Tokenizers, templates and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from keel.check.data import data_findings
from keel.check.finding import Finding, broken, stage_names
from keel.check.starting import own_numbers, root
from keel.data.chat import Chat, install_template
from keel.data.collate import pack
from keel.data.rows import Reading
from keel.data.sources import read_facts, read_prompts
from keel.eval.capability import encode_facts
from keel.model.checkpoint import load_policy, load_scalar, load_tokenizer, positions
from keel.model.heads import ScalarModel
from keel.model.logprobs import token_logprobs
from keel.model.modules import inner_model, own_attention
from keel.model.places import is_checkpoint
from keel.model.vocabulary import unreadable
from keel.recipe.checkpoints import stage_of
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.stage import TrainBase
from keel.reward.process import ProcessScorer
from keel.reward.scorer import SCORE_TOKENS, RewardModelScorer
from keel.rollout.collect import stop_token_ids
from keel.rollout.episodes import encode_prompts
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stages.thinking import unopened
from keel.types import Message, UserError

KL_TOLERANCE = 1e-4  # nats a token between a policy and its reference before the first step
BATCH_TOLERANCE = 1e-3  # of a reward model's score, alone and among others
_PROBE = (Message("user", "How do I splice a rope?"),)
_REPLIES = (
    "Unlay both ends, marry the strands and tuck each one twice.",
    "Yes.",
    "I do not know.",
    "Ask the bosun. " * 4,
)


def tokenizer_findings(stage: TrainBase, path: str, recipe: Recipe) -> Iterator[Finding]:
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
    return _chat_of(path, any(stage.gives_template for stage in recipe.stages), recipe)


def _chat_of(path: str, templated: bool, recipe: Recipe) -> Chat:
    """The chat of a model that begins with the checkpoint at ``path``, before or after SFT (``templated``)."""
    tokenizer = load_tokenizer(recipe.model.source(path))
    if templated and recipe.model.chat_template is not None:
        install_template(tokenizer, recipe.model.chat_template)
    elif templated and Chat(tokenizer).plain:
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


def model_findings(recipe: Recipe, run: RunDir) -> list[Finding]:
    """Tokenizer, data and checkpoints; what cannot be loaded is a finding, and what rests on it is left out."""
    try:
        chat = _chat(recipe.model.path, recipe)
        context = positions(recipe.model.source()) or 0
    except UserError as error:
        return [broken(error, "model.path")]
    found: list[Finding] = []
    trained = [training for stage in recipe.stages if (training := stage.training()) is not None]
    first = next((training for training in trained if training.model == "base"), None)
    if first is not None:
        found += tokenizer_findings(first, recipe.model.path, recipe)
    found += own_numbers(recipe)
    found += data_findings(recipe, chat, context)
    for stage in recipe.stages:
        try:
            found += _reference(stage, recipe, run)
            found += _evaluated(stage, recipe)
            found += _reward_models(stage, recipe, run)
            found += _adapter_dropout(stage, recipe)
            found += _adapter_rate(stage, recipe)
            found += _converses(stage, recipe)
            found += _thinking(stage, recipe)
            _stop_tokens(stage, recipe)
            _process_models(stage, recipe)
        except UserError as error:
            found.append(broken(error, stage.name))
    return found


def _converses(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """A chain of requests is a conversation, of which a model without a template would see the last message alone."""
    for name in stage.converses():
        path, templated = root(recipe, name)
        if _chat_of(path, templated, recipe).plain:
            sentence = "it has no chat template, and would see the last request alone"
            remedy = "name an SFT stage, which gives it a template"
            yield Finding("error", f"{stage.name}.model ({path})", sentence, remedy)


def _thinking(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """A reply that begins within its thinking must be known to."""
    for place, sentence, remedy in unopened(stage, lambda name: _chat_of(*root(recipe, name), recipe)):
        yield Finding("error", place, sentence, remedy)


def _stop_tokens(stage: Stage, recipe: Recipe) -> None:
    """`UserError` for a stop that is no single token of a model that the stage samples from."""
    for use in stage.loads():
        for sampling in stage.samplings():
            if use.policy and sampling.stop:
                stop_token_ids(_chat_of(*root(recipe, use.name), recipe), sampling)


def _reference(stage: Stage, recipe: Recipe, run: RunDir) -> Iterator[Finding]:
    """The reference must read the policy's tokens, and the policy must be its own reference before the first step: else
    the KL penalty does not start at 0."""
    compared = stage.compares()
    if compared is None or compared[0] == compared[1]:
        return
    start, reference = compared
    context = StageContext(recipe, run, run.stage(stage.name), Silent(), "cpu")
    places = [context.source(name) for name in compared]
    if reference == "base" or stage_of(reference)[0] not in stage_names(recipe):
        policy = _chat_of(*root(recipe, start), recipe)
        problem = unreadable(*load_policy(places[1]), policy.tokenizer)
        if problem is not None:
            sentence = f"the reference ({reference}) cannot read what the policy writes: {problem}"
            remedy = "leave reference out, or name a model with the policy's tokens"
            yield Finding("error", f"{stage.name}.reference", sentence, remedy)
            return
    if not all(is_checkpoint(Path(place.path)) for place in places):
        sentence = f"the reference ({reference}) is not the model that training starts from ({start})"
        yield Finding("warning", f"{stage.name}.reference", sentence, "leave reference out: the KL at step 0 is 0 then")
        return
    logps = []
    for place in places:
        model, tokenizer = load_policy(place)
        rows = [Chat(tokenizer).encode_reply(_PROBE, reply) for reply in _REPLIES]
        with torch.no_grad():
            logps.append(token_logprobs(model, pack(rows)).logp_C)
    gap = float((logps[0] - logps[1]).abs().mean()) if logps[0].shape == logps[1].shape else float("inf")
    if gap > KL_TOLERANCE:
        sentence = f"policy and reference differ by {gap:.3g} nats a token before the first step"
        yield Finding("warning", f"{stage.name}.reference", sentence, "leave reference out, unless this is meant")


def _evaluated(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """Each model that is evaluated may have a tokenizer and positions of its own: prompts and facts must fit all."""
    if not stage.compares_models:
        return
    for path, templated in dict.fromkeys(root(recipe, name) for name in stage.asked_alike()):
        if _chat_of(path, templated, recipe).plain:
            sentence = "the frontier measures KLs, and this model has no chat template"
            yield Finding(
                "error", f"{stage.name}.frontier ({path})", sentence, "name models after SFT, or leave it out"
            )
    data, how = recipe.data, Reading(recipe.data.on_bad_row)
    named = stage.files().get("prompts")
    asked = str(named) if named else data.heldout_prompts or data.prompts
    prompts = read_prompts(asked, how) if asked else []
    facts = read_facts(data.facts, how) if data.facts else []
    for path, templated in dict.fromkeys(root(recipe, use.name) for use in stage.loads()):
        chat = _chat_of(path, templated, recipe)
        try:
            if facts:
                encode_facts(chat.tokenizer, facts, positions(recipe.model.source(path)))
            if prompts:
                encode_prompts(chat, prompts, data, Silent())
        except UserError as error:
            yield broken(error, f"{stage.name}.models ({path})")


def _adapter_dropout(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    lora = recipe.model.lora
    training = stage.training()
    if lora and lora.dropout and training is not None and not training.adapter_dropout:
        sentence = "log-probabilities of one model are compared with another's, so adapters have no dropout here"
        yield Finding("warning", f"{stage.name} (model.lora.dropout)", sentence, "nothing to do, or set it to 0")


def _adapter_rate(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """Adapters learn best at about ten times the rate of the whole model, in SFT and in RL (Schulman and Thinking
    Machines Lab, "LoRA Without Regret", 2025). Half of that is no mistake yet."""
    training = stage.training()
    if recipe.model.lora is None or training is None or training.optim.lr >= 5 * training.whole_lr:
        return
    sentence = f"adapters learn at about ten times a whole model's rate, and {training.optim.lr:g} is a whole model's"
    yield Finding("warning", f"{stage.name}.optim.lr", sentence, f"set it to about {10 * training.whole_lr:g}")


def _reward_models(stage: Stage, recipe: Recipe, run: RunDir) -> Iterator[Finding]:
    """A reply's score must not depend on what else is in its batch, and be what transformers says of it."""
    names: list[str] = []
    if "reward model" in stage.makes and run.stage(stage.name).done:
        names = [stage.name]
    else:
        named = [reference.target for reference in stage.references() if reference.makes == ("reward model",)]
        names = [name for name in dict.fromkeys(named) if Path(name).is_dir()]
    for name in names:
        path = Path(name) if Path(name).is_dir() else run.stage(name).path
        model = load_scalar(recipe.model.source(path))
        RewardModelScorer(model, SCORE_TOKENS)  # refuses what it could not read
        rows = model.encode_replies([(_PROBE, reply, True) for reply in _REPLIES])
        with torch.no_grad():
            together = model.score_packed(pack(rows))
            alone = torch.cat([model.score_packed(pack([row])) for row in rows])
            elsewhere = _in_transformers(model)
        gap = float((together - alone).abs().max())
        if not gap <= BATCH_TOLERANCE:
            sentence = f"its score of a reply changes by {gap:.3g} with the rest of the batch"
            yield Finding("error", str(path), sentence, "train it again with this version of Keel")
        gap = float((elsewhere - alone).abs().max())
        if not gap <= BATCH_TOLERANCE:
            sentence = f"AutoModelForSequenceClassification scores a reply otherwise than Keel, by {gap:.3g}"
            if model.foreign:
                yield Finding("error", str(path), sentence, "use one that scores the last token that is not padding")
            else:
                remedy = "its padding is a token that replies end with: train it again before it is used elsewhere"
                yield Finding("warning", str(path), sentence, remedy)


def _process_models(stage: Stage, recipe: Recipe) -> None:
    """`UserError` for a folder that is named as a process reward model and is none."""
    for reference in stage.references():
        if reference.makes == ("process reward model",) and Path(reference.target).is_dir():
            ProcessScorer(load_scalar(recipe.model.source(reference.target)))


def _in_transformers(model: ScalarModel) -> Tensor:
    """What the model's own forward pass makes of what it is given there: one from elsewhere whole conversations, one of
    Keel's what Keel scores. On Keel's scale: [N]."""
    inner = inner_model(model.model)
    if model.foreign:
        rows = model.chat.encode_whole([(*_PROBE, Message("assistant", reply)) for reply in _REPLIES])
    else:
        rows = [list(model.chat.encode_reply(_PROBE, reply).ids) for reply in _REPLIES]
    with own_attention(inner):
        raw = torch.cat([inner(torch.tensor([ids], device=model.device)).logits[0] for ids in rows])
    return (raw - model.mean) / model.std
