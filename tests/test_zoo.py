from __future__ import annotations

import pytest
import torch

from tests import zoo


@pytest.mark.wide
def test_most_types_can_be_made_and_the_others_say_why() -> None:
    names = zoo.names()
    made = [name for name in names if zoo.why_not(name) is None]
    assert len(made) >= min(120, 0.9 * len(names))
    assert all(zoo.why_not(name) for name in set(names) - set(made))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba2", "lfm2", "qwen3_next", "deepseek_v3", "bloom", "gpt_oss"])
def test_models_are_small_alike_for_a_seed_and_neither_uniform_nor_certain(name: str) -> None:
    model, again, other = zoo.make(name), zoo.make(name), zoo.make(name, seed=1)
    assert sum(p.numel() for p in model.parameters()) < 250_000
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        logits, same, differ = (m(input_ids=ids).logits for m in (model, again, other))
    assert torch.equal(logits, same)
    assert not torch.allclose(logits, differ)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.1 < entropy.mean() < torch.tensor(zoo.VOCABULARY).log() - 0.1
