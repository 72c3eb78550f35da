"""Options that trade time for memory or the other way round: gradient checkpointing, compilation, 8-bit moments. They
change no number, or a little and as much as they say."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import demonstrations, preferences, prompt, save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from keel.data.collate import pack, pack_by_prompt
from keel.model.activations import offloaded
from keel.model.checkpoint import load_policy
from keel.model.logprobs import token_logprobs
from keel.model.packed import compile_passes
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.reward import RewardStage
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from keel.recipe.sft import SftStage
from keel.rollout import make_sampler
from keel.run import RunDir, Silent
from keel.train.context import TrainContext
from keel.train.dpo import train_dpo
from keel.train.grpo import train_grpo
from keel.train.optim import make_optimizer
from keel.train.ppo import train_ppo
from keel.train.reward import train_reward
from keel.train.sft import train_sft
from keel.types import Completion, Encoded, PackedBatch, Prompt, Scores, UserError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; pip install bitsandbytes and run this file with that environment's Python",
)


def context(tmp: Path, model: Path, lora: LoraConfig | None) -> TrainContext:
    stage = RunDir(tmp).stage("stage")
    stage.begin("stage")
    torch.manual_seed(7)
    settings = ModelConfig(path=str(model), lora=lora)
    return TrainContext(stage, Silent(), model, settings, DataConfig(), "cpu", "fp32", 0)


class LikesO:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(c.text.count("o")) for c in completions]))


PROMPTS = [prompt(n) for n in range(20)]
ONLINE: dict[str, Any] = {
    "rewards": [{"source": {"kind": "python", "ref": "x:y"}}],
    "sampling": SamplingConfig(max_new_tokens=8),
    "rollout_batch": 16,
    "episodes": 32,
}


def sft(c: TrainContext, **options: Any) -> None:
    train_sft(SftStage(name="stage", batch_size=8, epochs=1, **options), demonstrations(24), c)


def reward(c: TrainContext, **options: Any) -> None:
    train_reward(RewardStage(name="stage", batch_size=8, epochs=1, **options), preferences(24), c)


def dpo(c: TrainContext, **options: Any) -> None:
    train_dpo(DpoStage(name="stage", batch_size=8, epochs=1, **options), preferences(24), c.model_path, c)


def ppo(c: TrainContext, **options: Any) -> None:
    train_ppo(PpoStage(name="stage", **ONLINE, **options), PROMPTS, LikesO(), c.model_path, None, c)


def grpo(c: TrainContext, **options: Any) -> None:
    train_grpo(GrpoStage(name="stage", **ONLINE, **options), PROMPTS, LikesO(), c.model_path, c)


STAGES: dict[str, Callable[..., None]] = {f.__name__: f for f in (sft, reward, dpo, ppo, grpo)}


def rows_of(kind: str, tmp: Path, lora: LoraConfig | None = None, **options: Any) -> list[dict[str, float]]:
    c = context(tmp / "run", save_tiny(tmp / "base"), lora)
    STAGES[kind](c, optim=OptimConfig(lr=3e-3), **options)
    return c.stage.metrics.rows()


def assert_same_figures(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        for name in (n for n in a if n.startswith(("loss", "grad_norm", "objective/kl"))):
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), name


# ------------------------------------------------------------------------------------------ gradient checkpointing


# Adapters have one road of their own through a policy (which DPO and GRPO go too) and one through a scalar head.
CHECKPOINTED = [
    pytest.param(kind, lora, id=f"{kind}-{name}", marks=[pytest.mark.wide] if lora and kind in ("dpo", "grpo") else [])
    for kind in STAGES
    for name, lora in {"whole": None, "lora": LoraConfig(rank=4)}.items()
]


@pytest.mark.parametrize(("kind", "lora"), CHECKPOINTED)
def test_gradient_checkpointing_works_in_every_stage(kind: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    plain = rows_of(kind, tmp_path / "plain", lora)
    with_checkpoints = rows_of(kind, tmp_path / "saving", lora, gradient_checkpointing=True)
    assert_same_figures(plain, with_checkpoints, 1e-4)


def saved_bytes(model: nn.Module, batch: PackedBatch) -> int:
    """What the forward pass keeps for the backward pass, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or a later tensor could lie at the same address
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, batch).logp_C.sum()
    return sum(kept.values())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
def test_gradient_checkpointing_keeps_less(lora: LoraConfig | None, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    batch = pack([Encoded(tuple(range(10, 110)), (False,) + (True,) * 99)] * 4)
    plain, saving = (
        saved_bytes(load_policy(base, lora=lora, gradient_checkpointing=on)[0], batch) for on in (False, True)
    )
    assert saving < plain / 3


def test_selective_checkpoints_compute_few_products_again_and_offloading_changes_nothing(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    batch = pack([Encoded(tuple(range(10, 50)), (False,) + (True,) * 39)] * 2)
    products, gradients = {}, {}
    kinds: list[Any] = [False, True, "selective", "offload"]
    for kind in kinds:
        torch.manual_seed(0)
        model = load_policy(base, lora=LoraConfig(rank=4), gradient_checkpointing=kind)[0]
        with offloaded("cpu") if kind == "offload" else contextlib.nullcontext(), Products() as count:
            loss = token_logprobs(model, batch).logp_C.sum()
            loss.backward()
        products[kind] = count.of
        gradients[kind] = [p.grad for p in model.parameters() if p.grad is not None]
    again = {kind: count - products[False] for kind, count in products.items()}  # a few are another kind of product
    assert again[True] == again["offload"] > 4 * again["selective"]
    for kind in kinds[1:]:
        assert all(map(torch.equal, gradients[False], gradients[kind])), kind


class Products(TorchDispatchMode):
    """Counts matrix products."""

    of = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


# --------------------------------------------------------------------------------------------------- compilation


def batches() -> list[PackedBatch]:
    """Of many shapes: packed, with shared prompts, of one sequence, longer than plain attention takes."""
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> Encoded:
        ids = torch.randint(6, 200, (length,), generator=generator).tolist()
        return Encoded(tuple(ids), (False,) + (True,) * (length - 1))

    def group(prompt_length: int, size: int) -> list[Encoded]:
        start = tuple(range(10, 10 + prompt_length))
        return [
            Encoded((*start, 30 + i, 40 + i), (False,) * prompt_length + (True, True)) for i in range(size)
        ]  # fmt: skip

    lengths = [[5, 9, 30], [40, 80, 3, 7], [60], [100, 90, 33], [11] * 20]
    return [pack([row(n) for n in some]) for some in lengths] + [
        pack_by_prompt(group(n, k)) for n, k in ((9, 4), (30, 2))
    ]


def one_layer(folder: Path) -> Path:
    """Tracing takes as long as the model is deep."""
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def losses_and_gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for batch in batches():
        model.zero_grad()
        loss = token_logprobs(model, batch).logp_C.sum()
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([loss.detach()[None], *grads]))
    return found


@pytest.mark.wide
@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # traced, not compiled: graphs and shapes are as they will be
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                "KEEL_TEST_COMPILE" not in os.environ,
                reason="compiling takes minutes; set KEEL_TEST_COMPILE=1 to run it",
            ),
        ),
    ],
)
@pytest.mark.parametrize("options", [{"lora": LoraConfig(rank=2), "gradient_checkpointing": True}])
def test_compiled_passes_give_the_same_numbers_for_any_shape(
    options: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, _ = load_policy(one_layer(tmp_path / "base"), **options)
    expected = losses_and_gradients(model)
    with torch.no_grad():
        measured = token_logprobs(model, batches()[0]).logp_C
    compile_passes(model, backend)
    for got, want in zip(losses_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 4  # shapes do not compile anew
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():  # measuring and sampling stay as they were
        assert torch.equal(token_logprobs(model, batches()[0]).logp_C, measured)
    make_sampler(model, "transformers", ()).generate([[5, 6], [7]], SamplingConfig(max_new_tokens=4), 0)
    assert counters["stats"]["unique_graphs"] == graphs


def test_every_module_that_is_trained_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr("keel.train.loop.compile_passes", compiled.append)
    rows_of("ppo", tmp_path / "a", compile=True)
    assert len(set(map(id, compiled))) == 2
    compiled.clear()
    rows_of("ppo", tmp_path / "b")  # auto: not on a CPU
    assert not compiled


def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"install g\+\+"):
        compile_passes(load_policy(save_tiny(tmp_path / "base"))[0])


# ------------------------------------------------------------------------------------------------- 8-bit moments


def test_a_missing_bitsandbytes_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'keel-rlhf\[adamw8bit\]'"):
        make_optimizer({"m": nn.Linear(2, 2)}, OptimConfig(kind="adamw8bit"), {})


def fit(kind: str, steps: int, stop_at: int | None = None) -> tuple[float, torch.optim.Optimizer, nn.Module]:
    """A small regression; ``stop_at``: the optimizer is written and read again there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    config = OptimConfig(kind=kind, lr=1e-2)  # type: ignore[arg-type]
    optimizer = make_optimizer({"m": model}, config, {})
    x = torch.randn(256, 64)
    y = torch.sin(x @ torch.randn(64, 64) / 8)
    for step in range(steps):
        if step == stop_at:
            state = optimizer.state_dict()
            optimizer = make_optimizer({"m": model}, config, {})
            optimizer.load_state_dict(state)
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss), optimizer, model


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@needs_bitsandbytes
def test_8_bit_moments_learn_as_well_in_a_quarter_of_the_memory() -> None:
    first, _, _ = fit("adamw8bit", 1)
    exact, plain, model = fit("adamw", 150)
    rough, small, _ = fit("adamw8bit", 150)
    assert exact < first / 20
    assert rough < first / 10
    weights = sum(p.numel() for p in model.parameters())
    assert state_bytes(plain) >= 8 * weights
    assert state_bytes(small) < 2.5 * weights


@needs_bitsandbytes
def test_8_bit_moments_are_resumed_to_the_bit() -> None:
    whole, cut = fit("adamw8bit", 40)[2], fit("adamw8bit", 40, stop_at=17)[2]
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_bitsandbytes
def test_a_stage_trains_with_8_bit_moments_and_saves_its_state(tmp_path: Path) -> None:
    c = context(tmp_path / "run", save_tiny(tmp_path / "base"), None)
    sft(c, optim=OptimConfig(kind="adamw8bit", lr=3e-3), save_every_seconds=0)
    rows = c.stage.metrics.rows()
    assert rows[-1]["loss"] < rows[0]["loss"]
