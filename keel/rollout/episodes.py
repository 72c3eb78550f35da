"""Prompts -> token ids within length, and prompts -> trajectories for PPO and GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel.data.chat import Chat
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.rollout.collect import with_decoded_text
from keel.rollout.sampler import Sampler
from keel.types import Episode, Prompt, Reporter, UserError, place_of


def encode_prompts(
    chat: Chat, prompts: Sequence[Prompt], data: DataConfig, reporter: Reporter
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """The prompts within ``data.max_prompt_length`` and their tokens. A prompt is never cut: a longer one is an error,
    or left out and counted with ``data.over_length: skip``."""
    encoded = chat.encode_prompts([prompt.messages for prompt in prompts], [place_of(prompt) for prompt in prompts])
    rows = [(prompt, tuple(ids)) for prompt, ids in zip(prompts, encoded, strict=True)]
    over = [(prompt, ids) for prompt, ids in rows if len(ids) > data.max_prompt_length]
    if over and data.over_length == "error":
        prompt, ids = over[0]
        raise UserError(
            f"{len(over)} of {len(rows)} prompts are longer than data.max_prompt_length = {data.max_prompt_length} "
            f"tokens (first: {prompt.id}, {len(ids)} tokens); raise it or set data.over_length: skip"
        )
    if over:
        reporter.note(f"left out {len(over)} of {len(rows)} prompts longer than {data.max_prompt_length} tokens")
    kept = [(prompt, ids) for prompt, ids in rows if len(ids) <= data.max_prompt_length]
    if not kept:
        raise UserError("there is no prompt to sample from; give data.prompts a file with prompts")
    return [prompt for prompt, _ in kept], [ids for _, ids in kept]


@dataclass(frozen=True)
class EpisodeSampler:
    """Samples episodes of ``prompts``, whose tokens are ``prompt_ids``."""

    sampler: Sampler
    chat: Chat
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    sampling: SamplingConfig

    def sample(self, indices: Sequence[int], seed: int) -> list[Episode]:
        """An episode for each of the prompts' indices, with the completion's text."""
        completions = self.sampler.generate([self.prompt_ids[i] for i in indices], self.sampling, seed)
        return [
            Episode(self.prompts[i], tuple(self.prompt_ids[i]), with_decoded_text(self.chat, completion))
            for i, completion in zip(indices, completions, strict=True)
        ]


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a reply's n-grams that it has already said; 0 when it is shorter than n + 1 tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
