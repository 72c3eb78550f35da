"""Training against plain loops in float64 that know nothing of Keel, and what must be equal: a resumed run, a policy
and its reference at the start, a checkpoint on another device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from bench.gpu import correct_shard
from bench.gpu.correct import (
    Check,
    Gap,
    LeftOut,
    Said,
    Setting,
    copied,
    drawn,
    forked,
    furthest,
    llama,
    low,
    relative,
    row_logps,
    saved,
    small,
    text,
    tokenizer,
)
from bench.workers.keel import context_of
from keel.data.collate import pack_shared
from keel.model.checkpoint import frozen, load_policy, load_scalar, prepared, save
from keel.model.logprobs import token_logprobs
from keel.model.packed import compute_alike
from keel.model.shared_base import SharedBase
from keel.recipe.dpo import DpoStage
from keel.recipe.sections import LoraConfig, OptimConfig
from keel.recipe.sft import SftStage
from keel.run import Silent, StageDir
from keel.train.dpo import Dpo, reference_logps, with_reference
from keel.train.loop import Algorithm, train
from keel.train.pairs import Pair
from keel.train.sft import Sft
from keel.types import Encoded, Message, Preference, Prompt

VOCAB = len(tokenizer())
LORA = LoraConfig(rank=4, alpha=8)
LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.99), 1e-4, 1.0  # so large an eps that rounding turns no sign
OPTIM = OptimConfig(lr=LR, betas=BETAS, eps=EPS, max_grad_norm=CLIP, warmup=0, schedule="constant")
PRECISIONS = ("fp32", "bf16")
# What three optimizer steps may be off: (loss, largest weight, moves as a share of their norm). In bfloat16 a gradient
# is some percent off, and Adam's steps are of one size whatever the gradient's.
BOUNDS = {"fp32": (1e-4, 1e-4, 1e-2), "bf16": (5e-2, 2 * 3 * LR, 0.3)}


def policy_config(kind: Any, precision: str, **changes: Any) -> Any:
    return kind(name="check", optim=OPTIM, precision=precision, batch_tokens=256, save_every_seconds=1e9, **changes)


def trained(algorithm: Algorithm, config: Any, device: str, precision: str) -> list[dict[str, Any]]:
    """Runs Keel's loop in a folder of its own; -> its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        stage = StageDir(Path(folder) / "check")
        stage.begin("check")
        train(algorithm, config, context_of(device, precision, stage=stage))
        rows = stage.metrics.rows()
        stage.metrics.close()
    return rows


class PlainAdamW:
    """AdamW without decay (Loshchilov and Hutter 2019) behind a clip of the gradient's norm, written out."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        slopes = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        norm = sum(float((g**2).sum()) for g in slopes if g is not None) ** 0.5
        self.steps += 1
        for p, (m, v), slope in zip(self.parameters, self.moments, slopes, strict=True):
            if slope is None:
                continue
            g = slope * min(1.0, CLIP / (float(norm) + 1e-6))
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g**2)
            first, second = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
            p.sub_(LR * first / (second.sqrt() + EPS))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for _, p in sorted(model.named_parameters())])


def weights(what: str, model: nn.Module, right: nn.Module, start: Tensor, precision: str) -> Said:
    _, most, share = BOUNDS[precision]
    found, wanted = flat(model), flat(right)
    yield Gap(f"{what}: weights, largest difference", furthest(found, wanted), most)
    yield Gap(f"{what}: how the weights moved, of its norm", relative(found - start, wanted - start), share)


# --------------------------------------------------------------------------------------------------------- DPO


def dpo(setting: Setting) -> Said:
    """Three optimizer steps, with replies that share a prompt and micro-batches, against float64."""
    beta, device = 0.02, setting.device
    prompts = 2 if setting.tiny else 8
    replies = [forked(20, (30, 9, 17), VOCAB, n) for n in range(prompts)]
    pairs = [(row[0], row[n]) for row in replies for n in (1, 2)]
    base, other = llama(VOCAB), drawn(llama(VOCAB), 1)
    losses, right = _dpo_in_float64(
        copied(base, "cpu", torch.float64), copied(other, "cpu", torch.float64), pairs, beta
    )
    for precision in PRECISIONS:
        config = policy_config(DpoStage, precision, epochs=3, batch_size=len(pairs), beta=beta)
        model, reference = (prepared(copied(m, "cpu"), device, None, False, "CAUSAL_LM", []) for m in (base, other))
        every = [_pair(row[0], row[n], i) for i, row in enumerate(replies) for n in (1, 2)]
        context = context_of(device, precision)
        known = with_reference(every, reference_logps(frozen(reference), every, config.batch_tokens, context))
        groups = [known[n : n + 2] for n in range(0, len(known), 2)]
        rows = trained(Dpo(model, groups, [], config, context), config, device, precision)
        worst = max(abs(row["loss"] - loss) for row, loss in zip(rows, losses, strict=True))
        yield Gap(
            f"{precision}: losses of three steps ({losses[0]:.4f} ... {losses[-1]:.4f})", worst, BOUNDS[precision][0]
        )
        yield from weights(precision, model, right, flat(base), precision)


def _pair(chosen: Encoded, rejected: Encoded, n: int) -> Pair:
    return Pair(Preference(f"r{n}", Prompt(f"p{n}", (Message("user", f"{n}"),)), "", ""), chosen, rejected)


def _dpo_in_float64(
    policy: Any, reference: Any, pairs: Sequence[tuple[Encoded, Encoded]], beta: float
) -> tuple[list[float], nn.Module]:
    """Rafailov et al. 2023, eq. 7: the losses before each step, and the trained model."""
    with torch.no_grad():
        before = [[row_logps(reference, row, "cpu").sum() for row in pair] for pair in pairs]
    adam, losses = PlainAdamW(policy), []
    for _ in range(3):
        total = torch.zeros((), dtype=torch.float64)
        for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs, before, strict=True):
            lead = row_logps(policy, chosen, "cpu").sum() - ref_chosen
            lead = lead - (row_logps(policy, rejected, "cpu").sum() - ref_rejected)
            total = total - torch.log(torch.sigmoid(beta * lead)) / len(pairs)
        losses.append(float(total.detach()))
        adam.step(total)
    return losses, policy


# ---------------------------------------------------------------------------------------------------- adapters


def lora(setting: Setting) -> Said:
    """Three SFT steps of adapters against peft in a plain loop; the base stays, merged is what the adapters are."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    device = setting.device
    base, rows = llama(VOCAB), [text(n, VOCAB, n, prompt=4) for n in ((9, 30) if setting.tiny else (9, 30, 60, 200))]
    count = sum(row.predicted for row in rows)
    for precision in PRECISIONS:
        model = prepared(copied(base, "cpu"), device, LORA, False, "CAUSAL_LM", [])
        plain = get_peft_model(
            copied(base, device), PeftLora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if p.requires_grad:
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
                    model.get_parameter(name).copy_(p)
        names = [name for name, p in plain.named_parameters() if p.requires_grad]
        start = torch.cat([plain.get_parameter(n).detach().double().flatten() for n in names])
        config = policy_config(SftStage, precision, epochs=3, batch_size=len(rows))
        found = trained(Sft(model, rows, [], config, context_of(device, precision)), config, device, precision)
        adam = torch.optim.AdamW((plain.get_parameter(n) for n in names), LR, BETAS, EPS, weight_decay=0.0)
        losses = []
        for _ in range(3):
            loss = -torch.cat([row_logps(plain, row, device) for row in rows]).sum() / count
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([plain.get_parameter(n) for n in names], CLIP)
            adam.step()
            losses.append(float(loss.detach()))
        most, largest, share = BOUNDS[precision]
        yield Gap(f"{precision}: losses of three steps", max(
            abs(row["loss"] - loss) for row, loss in zip(found, losses, strict=True)), most)  # fmt: skip
        moved, right = (
            torch.cat([m.get_parameter(n).detach().double().flatten() for n in names]) for m in (model, plain)
        )
        yield Gap(f"{precision}: adapters, largest difference", furthest(moved, right), largest)
        yield Gap(f"{precision}: how the adapters moved, of its norm", relative(moved - start, right - start), share)
        kept = [(p, base.get_parameter(_base_name(name))) for name, p in model.named_parameters() if name not in names]
        yield Gap(f"{precision}: base weights that changed", sum(
            not torch.equal(p.cpu(), own) for p, own in kept), 0)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(model, tokenizer(), Path(folder))
            merged = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(device)

            batch = pack_shared([[row] for row in rows], device)
            apart = furthest(
                token_logprobs(model, batch).logp_C, torch.cat([row_logps(merged, r, device) for r in rows])
            )
        yield Gap(f"{precision}: merged checkpoint against adapters, nats", apart, 1e-4)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        yield LeftOut("QLoRA", "bitsandbytes is not installed")
    else:
        yield LeftOut("QLoRA", "Keel has none")


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


# ------------------------------------------------------------------------------------------------------ resumed


class Killed(Exception):
    pass


class Killing(Silent):
    """A reporter that ends the run after so many iterations."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: int = 1, **_: float) -> None:
        self.left -= steps
        if self.left < 0:
            raise Killed


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Operations that add in the same order each time, where torch has them."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resumed(setting: Setting) -> Said:
    """A run killed in the middle and gone on with against the unbroken one, which is run twice: where those two are
    equal to the bit, so must this one be."""
    device = setting.device
    rows = [text(n, VOCAB, n) for n in (range(9, 17) if setting.tiny else range(20, 340, 10))]
    for precision in PRECISIONS:
        config = policy_config(SftStage, precision, epochs=3, batch_size=len(rows) // 2)
        config = config.model_copy(update={"save_every_seconds": 0.0})

        def run(folder: Path, reporter: Any, config: Any = config, precision: str = precision) -> Tensor:
            model = prepared(llama(VOCAB), device, None, False, "CAUSAL_LM", [])
            stage = StageDir(folder)
            stage.begin("check")
            context = context_of(device, precision, stage=stage, reporter=reporter)
            try:
                train(Sft(model, rows, [], config, context), config, context)
            finally:
                stage.metrics.close()
            return flat(model)

        with tempfile.TemporaryDirectory() as where, deterministic(device):
            unbroken, again = (run(Path(where) / name, Silent()) for name in ("one", "two"))
            try:
                run(Path(where) / "three", Killing(3))
            except Killed:
                gone_on = run(Path(where) / "three", Silent())
        chance = furthest(again, unbroken)
        yield Gap(f"{precision}: the unbroken run twice, largest weight", chance, 0.0 if device == "cpu" else 1e-3)
        yield Gap(f"{precision}: killed and resumed, largest weight", furthest(gone_on, unbroken), 3 * chance)


# ------------------------------------------------------------------------------------------------ at the start


def start(setting: Setting) -> Said:
    """Before the first step the policy is its reference, to the bit, on every road that training takes."""
    device = setting.device
    rows = [forked(20, (9, 30, 1), VOCAB, 1), [text(40, VOCAB, 2)]] + ([] if setting.tiny else [[text(900, VOCAB, 3)]])
    whole = [[text(n, VOCAB, n)] for n in ((7, 12) if setting.tiny else (7, 300, 900))]
    qwen = small("qwen3", vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=64,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        folders = {"Llama": saved(llama(VOCAB), Path(where) / "llama"), "Qwen3": saved(qwen, Path(where) / "qwen")}
        for name, folder in list(folders.items())[: 1 if setting.tiny else None]:
            for adapters in (None, LORA):
                policy, _ = load_policy(folder, device=device, lora=adapters)
                reference = frozen(load_policy(folder, device=device)[0])
                compute_alike(reference, policy)
                yield from _alike(f"{name}{', adapters' * bool(adapters)}", policy, reference, (whole, rows), device)
        base = SharedBase(folders["Llama"], device, LORA)
        policy, reference = base.policy(False)[0], base.reference()
        compute_alike(reference, policy)
        yield from _alike("Llama, one base", policy, reference, (whole, rows), device)
        yield from _values(Path(where), [row for group in rows for row in group], device)


def _alike(what: str, policy: nn.Module, reference: nn.Module, batches: Sequence[Any], device: str) -> Said:
    for precision in PRECISIONS:
        kl = now = 0.0
        for rows in batches:
            batch = pack_shared(rows, device)
            with low(device, precision):
                with torch.no_grad():
                    old, ref = token_logprobs(policy, batch).logp_C, token_logprobs(reference, batch).logp_C
                new = token_logprobs(policy, batch).logp_C
            kl, now = max(kl, furthest(old, ref)), max(now, furthest(new, old))
        yield Gap(f"{what}, {precision}: policy against reference, nats", kl, 0.0)
        yield Gap(f"{what}, {precision}: with gradients against without, nats", now,
                  1e-4 if precision == "fp32" else 5e-2)  # fmt: skip


def _values(where: Path, rows: Sequence[Encoded], device: str) -> Said:
    """A critic that begins as a reward model says of a text's end what that model says."""
    trunk = llama(VOCAB)
    judge = drawn(LlamaForSequenceClassification(type(trunk.config)(**{**trunk.config.to_dict(), "num_labels": 1})))
    folder = saved(judge, where / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").to(device).eval()
    with torch.no_grad():
        right = torch.cat([plain(torch.tensor([row.ids], device=device)).logits[0] for row in rows])
        # The value of the state before the last token, which a text of one token more predicts.
        longer = [Encoded((*row.ids, 9), (*[False] * len(row.ids), True)) for row in rows]
        critic = load_scalar(folder, device=device)
        for precision in PRECISIONS:
            with low(device, precision):
                rough = torch.cat([plain(torch.tensor([row.ids], device=device)).logits[0] for row in rows])
                scores = critic.raw_packed(pack_shared([[row] for row in rows], device))
                values = critic.values_packed(pack_shared([[row] for row in longer], device))
            for name, found in (("scores", scores), ("values", values)):
                bound = 1e-5 if precision == "fp32" else max(2e-2, 2 * relative(rough, right))
                yield Gap(f"critic, {precision}: {name} against the reward model's, of their norm",
                          relative(found, right), bound)  # fmt: skip


# ------------------------------------------------------------------------------------------------ other devices


def moved(setting: Setting) -> Said:
    """A checkpoint that was trained and saved on the device says the same on the CPU."""
    device = setting.device
    rows = [text(n, VOCAB, n) for n in ((9, 20) if setting.tiny else (9, 60, 300, 700))]
    for precision in PRECISIONS:
        model = prepared(llama(VOCAB), device, None, False, "CAUSAL_LM", [])
        config = policy_config(SftStage, precision, epochs=2, batch_size=len(rows))
        trained(Sft(model, rows, [], config, context_of(device, precision)), config, device, precision)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(model, tokenizer(), Path(folder))
            there, _ = load_policy(Path(folder), device="cpu")
            right = token_logprobs(there, pack_shared([[row] for row in rows], "cpu")).logp_C
            with low(device, precision):
                found = token_logprobs(model, pack_shared([[row] for row in rows], device)).logp_C.cpu()
        what = f"{precision} on {device.split(':')[0]} against fp32 on cpu: log-probabilities, of their norm"
        yield Gap(what, relative(found, right), 1e-5 if precision == "fp32" else 2e-2)


# ------------------------------------------------------------------------------------------------------- sharded


def sharded(setting: Setting) -> Said:
    """``fully_shard`` in a group of one; but for a tiny run in a process of its own, which may die without taking the
    others along."""
    if setting.tiny:
        yield from correct_shard.comparisons(setting.device)
        return
    command = [sys.executable, "-m", "bench.gpu.correct_shard", setting.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    for line in done.stdout.splitlines():
        if line.count("\t") == 2:
            what, error, bound = line.split("\t")
            yield Gap(what, float(error), float(bound))
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), "") or f"it ended by {done.returncode}"
        yield LeftOut("the rest of Keel's log-probabilities under fully_shard", last[:300])


CHECKS = (
    Check("DPO", dpo),
    Check("LoRA", lora),
    Check("resume", resumed),
    Check("start", start),
    Check("other device", moved),
    Check("fully_shard", sharded),
)
