"""``keel harbor build``: corpus -> tokenizer -> pretraining -> the base model that ships with Keel.

The same seed, settings, library versions and thread count give the same weights, bit for bit on a CPU. A killed build
resumes from its last saved state. Every step's documents come from the step's own random stream, so nothing about the
data need be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import cos, pi
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.harbor.corpus import document, documents
from keel.harbor.facts import World
from keel.harbor.tokenizer import train_tokenizer
from keel.model.packed import enable_packing, hidden_states
from keel.run.state import load_state, save_state
from keel.types import PackedBatch, Reporter

SHIPPED = Path(__file__).parent / "base"
SHIPPED_LEDGER = Path(__file__).parent / "ledger_base"
TOKENIZER_DOCUMENTS = 20_000
STATE = "build_state.pt"

# What a step learns of: sequences, and what each token under their mask should be (ids of the vocabulary, [C]).
Step = tuple[PackedBatch, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """How the base model is made. ``tokens`` is the pretraining budget; ``rows`` the lengths that documents are joined
    to, one a step in turn (short rows are faster, and as short as a chat; the long ones teach late positions);
    ``batch_tokens`` the tokens of an optimizer step."""

    tokens: int = 9_000_000
    batch_tokens: int = 4096
    rows: tuple[int, ...] = (128, 128, 128, 128, 128, 128, 128, 512)
    lr: float = 4e-3
    warmup: float = 0.02  # share of the steps
    weight_decay: float = 0.05
    muon: bool = True
    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    positions: int = 512
    save_every: int = 100  # steps

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)


def build(out_dir: Path, reporter: Reporter, seed: int = 0, settings: Settings = Settings()) -> LlamaForCausalLM:
    """Makes the base model of ``World(seed)`` and writes it, with its tokenizer, into ``out_dir``.

    While it runs, ``out_dir`` holds ``build_state.pt``; a build that was killed resumes from it (with the settings that
    it began with). The shipped model: seed 0, these settings, two threads, torch 2.13, half an hour.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    world = World(seed)
    tokenizer = train_tokenizer(islice(documents(world, seed), TOKENIZER_DOCUMENTS))
    torch.manual_seed(seed)
    model = new_model(tokenizer, settings)
    batches = partial(_batch, world, tokenizer, seed, settings=settings)
    pretrain(model, batches, settings, out_dir / STATE, reporter)
    save_base(model, tokenizer, out_dir)
    (out_dir / STATE).unlink(missing_ok=True)
    return model


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights (from torch's generator)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Writes bfloat16 safetensors, configs and tokenizer as transformers and vLLM load them."""
    shipped = LlamaForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.set_attn_implementation("sdpa")
    shipped.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shipped.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def pretrain(
    model: LlamaForCausalLM,
    batches: Callable[[int], Step],
    settings: Settings,
    state_file: Path,
    reporter: Reporter,
) -> None:
    """Trains on the batch of each step, from the state in ``state_file`` where there is one."""
    enable_packing(model)
    optimizers = _optimizers(model, settings)
    done = 0
    if (state := load_state(state_file)) is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["step"]
    reporter.start("pretraining", settings.steps)
    reporter.advance(done)
    for step in range(done, settings.steps):
        batch, wanted_C = batches(step)
        loss = _loss(model, batch, wanted_C)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(step, settings)
            optimizer.step()
            optimizer.zero_grad()
        reporter.advance(1, loss=loss.item(), tokens=batch.num_tokens)
        if (step + 1) % settings.save_every == 0:
            save_state(
                state_file,
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
            )


def _optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; or AdamW for all.

    Muon (Jordan et al. 2024) makes each matrix's update orthogonal; ``match_rms_adamw`` (Liu et al. 2025,
    arXiv:2502.16982) scales it so that both optimizers take the same learning rate.
    """
    layers = [p for n, p in model.named_parameters() if settings.muon and p.ndim == 2 and "embed" not in n]
    with_muon = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in with_muon]
    adamw = torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    if not layers:
        return [adamw]
    decay = settings.weight_decay
    muon = torch.optim.Muon(layers, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def schedule(step: int, settings: Settings) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, settings.steps - warmup)))


def _loss(model: LlamaForCausalLM, batch: PackedBatch, wanted_C: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats) over the tokens under the mask. Each has one before it in its row."""
    target = batch.mask_T.nonzero().squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits_CV = model.lm_head(hidden_states(model, batch).index_select(0, target - 1))
    return F.cross_entropy(logits_CV.float(), wanted_C)


def _batch(world: World, tokenizer: PreTrainedTokenizerFast, seed: int, step: int, settings: Settings) -> Step:
    """One step's rows, all of one length: oneDNN builds its kernels anew for every new shape."""
    rng = Random(f"pretraining {seed} {step}")
    length = settings.rows[step % len(settings.rows)]
    rows = list(islice(_rows(world, tokenizer, rng, length), settings.batch_tokens // length))
    positions_T = torch.arange(length).repeat(len(rows))
    ids_T, mask_T = torch.tensor(rows).view(-1), positions_T > 0
    batch = PackedBatch(
        ids_T=ids_T,
        positions_T=positions_T,
        cu_seqlens=torch.arange(len(rows) + 1) * length,
        mask_T=mask_T,
    )
    return batch, ids_T[mask_T]


def _rows(world: World, tokenizer: PreTrainedTokenizerFast, rng: Random, length: int) -> Iterator[list[int]]:
    """Documents with their end marks, joined until a row is full. Every row begins with a document's first token, as a
    prompt does in use; what does not fit is left out (there is always more)."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    row: list[int] = []
    while True:
        for ids in tokenizer([document(world, rng) for _ in range(64)])["input_ids"]:
            row = [*row, *ids, end]
            if len(row) >= length:
                yield row[:length]
                row = []
