"""The GPU's pieces, kept alive on the CPU: every piece runs on next to nothing. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bench.gpu import command
from bench.gpu.models import ARCHITECTURES, LORA, TINY
from bench.gpu.need import trained
from bench.gpu.setting import Record, Setting

# Numbers of parameters as their makers state them, tied embeddings once.
KNOWN = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_are_those_of_the_public_models(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name]
    assert ARCHITECTURES[name].parameters == KNOWN[name]


@pytest.mark.parametrize("lora", [False, True])
def test_the_need_of_a_training_step_is_what_torch_counts(lora: bool) -> None:
    shape, length = TINY["llama"], 24
    model = AutoModelForCausalLM.from_config(shape.config(), attn_implementation="eager")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=LORA.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapters == shape.adapters(LORA.rank)
    ids = torch.randint(256, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counted = counter.get_total_flops()
    # The whole square of attention is computed there.
    square = 3 * 4 * (length**2 - length * (length + 1) / 2) * shape.layers * shape.heads * shape.head_dim
    need = trained(shape, [length], length, LORA.rank if lora else None) + square
    if lora:  # below the first layer nothing is trained: its projections' inputs, and their adapters', need no gradient
        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        need -= 2 * length * shape.hidden * (outputs + 3 * LORA.rank)
    assert counted == need


def ran(piece: str, folder: Path, *more: str) -> dict[str, dict[str, object]]:
    assert command.main(["--tiny", "--device", "cpu", "--piece", piece, "--out", str(folder), *more]) == 0
    found = json.loads((folder / f"gpu-{piece}-cpu.json").read_text())
    assert found["machine"]["flops"]["fp32"] > 0
    assert not [case for case in found["cases"].values() if "problem" in case]
    return found["cases"]  # type: ignore[no-any-return]


def test_training_runs(tmp_path: Path) -> None:
    cases = ran("training", tmp_path)
    assert {name.split()[0] for name in cases} == {"sft", "dpo", "reward", "ppo", "grpo"}
    for case in cases.values():
        parts = case["parts"]
        assert isinstance(parts, dict)
        assert min(parts[name] for name in ("forward", "backward", "optimizer")) > 0
        assert sum(parts.values()) == pytest.approx(case["step"])


def test_a_record_keeps_what_it_had_and_says_what_it_left_out(tmp_path: Path) -> None:
    record = Record(Setting("cpu", True, tmp_path, budget=100), "piece")
    record.case("good", 1, lambda: {"rate": 3.0})
    record.case("too long", 1000, lambda: {"rate": 4.0})

    def memory() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    record.case("large", 1, memory)
    record.case("broken", 1, lambda: {"rate": 1 / 0})
    later = Record(Setting("cpu", True, tmp_path, budget=0), "piece")
    later.case("good", 1, lambda: {"rate": 5.0})
    kept = json.loads((tmp_path / "gpu-piece-cpu.json").read_text())["cases"]
    assert kept["good"]["rate"] == 3.0  # there was no time to measure it again
    assert kept["too long"]["left_out"].startswith("about 1000 s")
    assert kept["large"]["problem"].startswith("out of memory")
    assert kept["broken"]["problem"].startswith("ZeroDivisionError")
    assert record.failed == ["broken"]
