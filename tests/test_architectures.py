from __future__ import annotations

import pytest
import torch

from tests import architectures
from tests.architectures import BOUND, Found, Row, examine, table

# One a family: fused, absolute positions, ALiBi, soft caps and windows, sinks, experts, latent attention, recurrent and
# hybrid layers, a layer between decoder and head; and two that look ahead.
FAMILIES = (
    "llama", "gpt2", "bloom", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "mamba2", "lfm2", "doge", "bert",
    "xlnet", "cpmant",
)  # fmt: skip


@pytest.mark.wide
@pytest.mark.parametrize("name", FAMILIES)
def test_one_a_family_is_right_or_refused(name: str) -> None:
    row = examine(name)
    assert row.trained is not None
    assert row.sampled is not None
    for found in (row.trained, row.sampled):
        assert not found.wrong, found
        assert found.how == "refused" or (found.error is not None and found.error <= BOUND)
    assert (row.sampled.how == "refused") == (name in ("xlnet", "cpmant"))
    if row.sampled.how != "refused":
        assert row.sampled.note == "equal" or name == "doge"


def test_what_is_wrong_is_seen_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = architectures.token_logprobs
    monkeypatch.setattr(architectures, "token_logprobs", lambda m, b: _moved(measured(m, b)))
    assert examine("llama").trained.wrong  # type: ignore[union-attr]
    monkeypatch.setattr(architectures, "TransformersSampler", None)
    row = examine("llama")
    assert row.sampled == Found("traceback", note="TypeError: 'NoneType' object is not callable")
    text = table([row, Row("other", why_not="no such package")])
    assert "1 traceback" in text
    assert "| llama | packed | 1.0e-03 **wrong** | traceback |  **wrong** |" in text
    assert "- other: no such package" in text


def _moved(found: object) -> object:
    logp = found.logp_C.clone()  # type: ignore[attr-defined]
    logp[3] += 1e-3
    return type(found)(logp, None)


def test_an_error_that_is_no_number_is_wrong() -> None:
    assert Found("packed", error=float(torch.nan)).wrong
    assert not Found("packed", error=1e-5).wrong
    assert not Found("refused", note="because").wrong
