"""The GPU's pieces, kept alive on the CPU: every piece runs on next to nothing. Nothing is timed here."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import bench.__main__
from bench.gpu import command, report
from bench.gpu.models import ARCHITECTURES, LORA, TINY
from bench.gpu.need import trained
from bench.gpu.setting import Record, Setting
from bench.gpu.steps import OneBase

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


@pytest.mark.wide
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


def test_sampling_runs(tmp_path: Path) -> None:
    cases = ran("sampling", tmp_path, "--only", "fixed|Keel")
    for name, case in cases.items():
        if "fixed" in name:
            assert case["tokens"] == 8 * 12  # nothing ends a completion
    assert {name.partition(",")[0] for name in cases} == {"Keel", "generate", "continuous batching"}


def test_steps_run_and_their_split_adds_up(tmp_path: Path) -> None:
    cases = ran("steps", tmp_path)
    for case in cases.values():
        split = case["split"]
        assert isinstance(split, dict)
        assert sum(split.values()) == pytest.approx(case["seconds"])
        assert min(split.values()) > -1e-3  # no part is counted twice
    whole, grouped, based = cases.values()
    assert {"sampling", "scores", "reference", "old log-probabilities", "critic"} <= set(whole["split"])  # type: ignore[call-overload]
    assert "critic" not in grouped["split"]  # type: ignore[operator]
    assert "critic" in based["split"]  # type: ignore[operator]


def test_memory_runs(tmp_path: Path) -> None:
    cases = ran("memory", tmp_path, "--only", "head|sft")
    assert len(cases) == 4
    assert cases["head of qwen3-1.7b, trained"]["head_gradient"] == 256 * 32 * 4


def test_models_on_one_base_share_its_weights(tmp_path: Path) -> None:
    base = OneBase(Setting("cpu", True, tmp_path), "llama-3.1-8b", tmp_path)
    policy, _ = base.policy(False)
    models = [policy, base.reference(), base.new_critic(1, False).model]
    held = {id(p) for p in base.model.parameters()}
    own = [sum(p.numel() for p in model.parameters() if id(p) not in held) for model in models]
    adapters = TINY["llama"].adapters(LORA.rank)
    head = TINY["llama"].hidden
    assert own[:2] == [adapters, 0]
    assert own[2] in (adapters + head, adapters + 2 * head)  # peft keeps the head that it found beside the trained one


def test_peers_keep_what_the_bench_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"Keel": {"rate": 6.0, "rates": [6.0], "precision": "bf16", "peak_mb": 10.0, "cores": 1.0}}
    rows["TRL"] = {"problem": "not installed"}
    asked = []

    class Fake:
        def __init__(self, args: Namespace) -> None:
            asked.append(args.only)

        def task(self, task: str, model: str) -> dict[str, object]:
            asked.append(f"{task} {model}")
            return {"unit": "pairs a second", "work": {}, "contenders": rows, "ratios": []}

    monkeypatch.setattr(bench.__main__, "Bench", Fake)
    cases = ran("peers", tmp_path)
    assert asked == ["Keel fp32$", "reward S"]
    assert cases["reward S"]["contenders"]["TRL"] == {"problem": "not installed"}  # type: ignore[index]
    text = (tmp_path / "gpu.md").read_text()
    assert "| reward S | Keel | bf16 | 6 | 10 MiB |" in text.replace("6.00", "6")
    assert "not measured: not installed" in text


def test_tables_show_figures_and_reasons(tmp_path: Path) -> None:
    machine = {"device": "NVIDIA H100", "flops": {"bf16": 8e14, "fp32": 5e13}, "bandwidth": 3e12, "versions": {}}
    machine |= {"datasheet": 989e12, "memory": 80 * 2**30}
    training = {
        "sft a": {"tokens_a_second": 10_500.0, "of_datasheet": 0.41, "peak": 3 * 2**30, "parts": {"forward": 1.0}},
        "sft b": {"problem": "out of memory: tried"},
        "sft c": {"left_out": "about 60 s, of which 3 are left"},
    }
    checks = [
        {"check": "head", "what": "log-probabilities", "state": "FAIL", "error": 0.02, "bound": 0.01, "seconds": 1},
        {"check": "QLoRA", "what": "steps", "state": "left out", "why": "no bitsandbytes", "seconds": 0},
    ]
    for piece, found in (("training", {"cases": training}), ("correctness", {"checks": checks, "failed": ["head"]})):
        path = tmp_path / f"gpu-{piece}-nvidia-h100.json"
        path.write_text(json.dumps({"piece": piece, "machine": machine, **found}))
    assert report.write(tmp_path) == [tmp_path / "gpu.md", tmp_path / "gpu.html"]
    tables, page = (tmp_path / "gpu.md").read_text(), (tmp_path / "gpu.html").read_text()
    assert tables.index("### Correctness") < tables.index("### Training")
    assert "10,500 | 41% | 3.00 GiB | forward 100%" in tables
    assert "failed: out of memory: tried" in tables
    assert "not measured: about 60 s" in tables
    assert "| head | log-probabilities | FAIL | 0.02 | 0.01 |" in tables
    assert "| QLoRA | steps | left out | no bitsandbytes | |" in tables
    assert "Training: tokens a second" in page
    assert "Training: model FLOPs utilisation" in page
    assert report.write(tmp_path / "nowhere") == []
