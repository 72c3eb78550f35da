"""Whether Keel computes a model as the model computes itself.

Names and configs do not tell which architectures mix the sequences of a packed row (short convolutions, recurrences,
masks of their own), or what lies between a decoder and its logits. So a model is compared with its own forward pass
when it is loaded. Two sequences of unequal length and a third that shares a beginning with the first are run each by
itself, unpadded, as the model knows it, and together on Keel's roads. The first road that gives the same numbers is
taken; where none does, the model is refused.

Random numbers: none are drawn from the generators that training uses. What was found is kept for the process, by
architecture, config and device.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keel.data.collate import pack_shared
from keel.model import fused
from keel.model.held import in_float32
from keel.model.logits import LogitForm, logit_form
from keel.model.logprobs import masked_offsets, token_logprobs
from keel.model.modules import accepted, backbone, head_of, modes_of, set_attention, set_modes, stated_positions
from keel.model.packed import ATTENTION, Road, enable_packing, hidden_states, road
from keel.types import Encoded, PackedBatch, UserError

SHARED = 17  # tokens with which the third sequence begins as the first does
LENGTHS = (45, 33, 26)  # tokens of the three
MORE = (31, 64, 22)  # of three others, for the padded road, of
FEW = 12  # tokens that come again and again, as in texts: what chooses among keys minds padding where two are alike
# In float32 a model's numbers, computed in another order, differ by some 1e-6 of their spread over the vocabulary, by
# 3e-5 at most among all types that transformers can make. What leaks from a neighbour moves them by its own size.
TOLERANCE = 3e-4  # of that spread
ROUNDING = 2e-6  # nats: where all tokens are alike

_KEPT: dict[str, Verdict] = {}


@dataclass(frozen=True)
class Verdict:
    """What the probe found. ``why``: what forbade the packed road."""

    road: Road
    fused: bool
    between: bool
    attention: str | None
    form: LogitForm | None
    why: str = ""


@dataclass(frozen=True)
class _Case:
    """Three sequences and the model's own numbers, at every token: ``values`` are log-probabilities of the next token
    and entropies [L - 1, 2], or scores [L, 1]; ``spread`` is theirs over the vocabulary, or over the tokens."""

    sequences: list[Encoded]
    values: tuple[Tensor, ...]
    spread: float

    def gap(self, found: tuple[Tensor, ...]) -> float:
        """Over the tokens that both have, which are the last ones: a fork lacks its beginning."""
        pairs = [(own[-len(got) :], got[-len(own) :]) for own, got in zip(self.values, found, strict=True)]
        return float(torch.stack([(own - got).abs().max() for own, got in pairs]).max())  # NaN, where one is

    def differs(self, gap: float) -> bool:
        """By more than rounding."""
        return not gap <= TOLERANCE * self.spread + ROUNDING


def probe(model: PreTrainedModel) -> Verdict:
    """Finds the road on which ``model`` (a causal language model, or a classifier with one score) is computed as by
    itself, and puts it there. UserError when there is none, and for a model that is no causal one, that draws at random
    in training, or whose numbers are not finite."""
    key = identity(model)
    if key not in _KEPT:
        with torch.no_grad(), _exact(model):
            _KEPT[key] = _find(model)
    verdict = _KEPT[key]
    _take(model, verdict)
    return verdict


def slow_road(model: nn.Module) -> str:
    """A sentence on a model that is not on the packed road; empty where it is."""
    names = {"padded": "with padding", "alone": "one sequence at a time"}
    name = names.get(road(model))
    return (
        "" if name is None else f"this architecture cannot be computed in packed rows: it runs {name}, which is slower"
    )


def identity(model: PreTrainedModel) -> str:
    """A hash of all but the weights: class, config, kind of numbers, device."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "transformers_version", "keel_reward"):
        config.pop(name, None)
    first, kind = next(model.parameters()), type(model)
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    described = (kind.__module__, kind.__qualname__, dtypes, first.device, sorted(config.items(), key=str))
    return hashlib.blake2b(repr(described).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _exact(model: PreTrainedModel) -> Iterator[None]:
    """Float32 as it is, and every generator of random numbers, mode and setting as it was."""
    device, precision = next(model.parameters()).device, torch.get_float32_matmul_precision()
    modes, state = modes_of(model), random.getstate()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),  # convolutions
        in_float32(model),
    ):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            random.setstate(state)
            set_modes(modes)


def _find(model: PreTrainedModel) -> Verdict:
    scores = getattr(model, "score", None) is not None
    measure: _Measure = _own_scores if scores else _own_logps
    ours = _our_scores if scores else _our_logps
    modes, attention = modes_of(model), _as_loaded(model)
    case = _case(model, LENGTHS, measure)
    _check_causal(model, case, 0 if scores else 1)
    _check_training(model, modes, case, measure)
    between = not _reads_the_decoder(model, case.sequences[1])
    form = None if scores else logit_form(model)
    failures: list[str] = []
    for verdict in _verdicts(model, between, attention, form):
        cases = [case]
        if verdict.road == "padded":
            _as_loaded(model)
            cases.append(_case(model, MORE, measure))
        ways = [verdict, replace(verdict, fused=False)] if verdict.fused else [verdict]
        failure = next((found for way in ways for case in cases if (found := _failure(model, way, case, ours))), "")
        if not failure:
            return replace(verdict, why=failures[0] if failures else "")
        failures.append(failure)
    raise UserError(
        f"model.path: {type(model).__name__} gives its own numbers neither packed nor padded nor one sequence at a "
        f"time ({failures[-1]}); use another architecture"
    )


def _failure(
    model: PreTrainedModel, verdict: Verdict, case: _Case, ours: Callable[[Any, PackedBatch], tuple[Tensor, ...]]
) -> str:
    """Why the model's numbers are not its own on this road; empty where they are."""
    _take(model, verdict)
    first, second, third = case.sequences
    try:
        batch = pack_shared([[first, third], [second]], next(model.parameters()).device)
        gap = case.gap(ours(model, batch))
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever an architecture says to inputs that it was not made for
        return f"{type(error).__name__}: {_first_line(error)}"
    return f"its numbers differ by {gap:.2g}" if case.differs(gap) else ""


def _as_loaded(model: Any) -> str | None:
    """The attention that transformers gave the model, put back where another role's packed attention is on."""
    attention = model.config._attn_implementation
    if attention == ATTENTION:
        attention = model.keel_attention
    if attention == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        attention = "eager"  # older versions of transformers (5.17) offer Gemma 2 torch's, and leave out the cap
    set_attention(model, attention)
    return attention  # type: ignore[no-any-return]


def _verdicts(
    model: PreTrainedModel, between: bool, attention: str | None, form: LogitForm | None
) -> Iterator[Verdict]:
    """The roads, the fastest first. Fused layers (plain weights) and transformers' own (adapters) share one."""
    found = Verdict("packed", False, between, attention, form)
    # Llama 4 scales queries by their place in the row, in steps far beyond what is probed.
    by_place = getattr(model.config.get_text_config(), "attn_temperature_tuning", False)
    if getattr(model, "_supports_attention_backend", False) and not by_place:
        if fused.is_fusable(backbone(model)) and not between:
            yield replace(found, fused=True)
        yield found
    yield replace(found, road="padded")
    yield replace(found, road="alone")


def _take(model: Any, verdict: Verdict) -> None:
    model.keel_between, model.keel_logits, model.keel_attention = verdict.between, verdict.form, verdict.attention
    backbone(model).keel_unfused = not verdict.fused  # type: ignore[assignment]
    if verdict.road == "packed":
        enable_packing(model)
    else:
        set_attention(model, verdict.attention)
        model.keel_road = verdict.road


# ------------------------------------------------------------------------------------------------- the sequences


def _sequences(model: PreTrainedModel, lengths: tuple[int, int, int]) -> list[Encoded]:
    """Three, of ordinary tokens; the third begins as the first does."""
    config: Any = model.config.get_text_config()
    rows = getattr(model.get_input_embeddings(), "num_embeddings", config.vocab_size)
    if (head := model.get_output_embeddings()) is not None:
        rows = min(rows, getattr(head, "out_features", rows))
    special = set(given_tokens(model.config.to_dict()))
    ordinary = [token for token in range(rows) if token not in special][: 1 << 16] or list(range(rows))
    if lengths == MORE:
        ordinary = ordinary[:: max(1, len(ordinary) // FEW)]
    limit = stated_positions(config)
    shrink = 1.0 if limit is None else min(1.0, limit / (max(MORE) + 4))
    first, second, third = (max(3, int(length * shrink)) for length in lengths)
    shared = max(1, int(SHARED * shrink))
    step = next(prime for prime in (7919, 104729, 3, 1) if len(ordinary) % prime or prime == 1)
    drawn = [ordinary[(i * step + i * i // 7 + 11) % len(ordinary)] for i in range(first + second + third)]
    ids = drawn[:first], drawn[first : first + second], drawn[:shared] + drawn[first + second + shared :]
    prompt = [False] * shared
    return [Encoded(tuple(row), tuple(prompt + [True] * (len(row) - shared))) for row in ids]


def given_tokens(config: dict[str, Any]) -> Iterator[int]:
    """Every token that the config gives a meaning of its own: ends, padding, places of images."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from given_tokens(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


# ------------------------------------------------------------------------------------------------- the model's own


_Measure = Callable[[Any, Tensor], tuple[Tensor, float]]


def _case(model: PreTrainedModel, lengths: tuple[int, int, int], measure: _Measure) -> _Case:
    model.eval()
    sequences = _sequences(model, lengths)
    device = next(model.parameters()).device
    try:
        found = [measure(model, torch.tensor([s.ids], device=device)) for s in sequences]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.path: {type(model).__name__} cannot run by itself ({type(error).__name__}: {_first_line(error)}); "
            "repair the checkpoint or use another"
        ) from error
    values, spreads = tuple(values for values, _ in found), [spread for _, spread in found]
    if not all(bool(v.isfinite().all()) for v in values):
        raise UserError(
            f"model.path: {type(model).__name__} computes numbers that are not finite (NaN or infinite weights); "
            "use another checkpoint"
        )
    return _Case(sequences, values, sum(spreads) / len(spreads))


def _own_logps(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    logits = model(**accepted(model, input_ids=ids, use_cache=False)).logits[0].float()
    return _measured(torch.log_softmax(logits, -1), ids[0])


def _measured(logps_LV: Tensor, ids_L: Tensor) -> tuple[Tensor, float]:
    logp = logps_LV[:-1].gather(1, ids_L[1:, None]).squeeze(1)
    entropy = -(logps_LV.exp() * logps_LV.clamp(min=-1e4)).sum(-1)[:-1]
    return torch.stack([logp, entropy], 1), float(logps_LV.clamp(min=-1e2).std(-1).mean())


def _own_scores(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Of every token where the model scores them all before it picks the last; that one is the model's own pick."""
    seen: list[Tensor] = []
    hook = model.score.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        picked = model(**accepted(model, input_ids=ids, use_cache=False)).logits[0, :1].float()
    finally:
        hook.remove()
    scores = seen[0].reshape(-1, seen[0].shape[-1])[:, :1].float()
    scores = torch.cat([scores[:-1], picked[None]]) if len(scores) == ids.shape[1] else picked[None]
    return scores, float(scores.std()) if len(scores) > 1 else float(scores.abs().max())


def _check_causal(model: PreTrainedModel, case: _Case, ahead: int) -> None:
    """What the first and the third sequence share must not know how they go on. A number is of the token so far
    ``ahead``."""
    alike = case.sequences[2].mask.index(True) - ahead
    first, _, third = case.values
    gap = float((first[:alike] - third[:alike]).abs().max()) if 0 < alike <= len(third) else 0.0
    if case.differs(gap):
        raise UserError(
            f"model.path: {type(model).__name__} is not causal: what it predicts changes by {gap:.2g} nats with the "
            "tokens behind; use a decoder (BERT's family needs is_decoder: true in its config)"
        )


def _check_training(
    model: PreTrainedModel, modes: list[tuple[nn.Module, bool]], case: _Case, measure: _Measure
) -> None:
    """A policy is measured and trained in training mode: that must not draw anything at random."""
    set_modes(modes)
    found, _ = measure(model, torch.tensor([case.sequences[1].ids], device=next(model.parameters()).device))
    model.eval()
    gap = float((found - case.values[1]).abs().max())
    if case.differs(gap):
        raise UserError(
            f"model.path: {type(model).__name__} computes other numbers in training than in evaluation (by {gap:.2g}), "
            "by dropout or another draw that Keel cannot switch off; set it to 0 in the checkpoint's config.json"
        )


def _reads_the_decoder(model: Any, sequence: Encoded) -> bool:
    """Whether the head reads the decoder's last hidden states as they are."""
    seen: dict[str, Any] = {}
    hooks = [
        head_of(model).register_forward_pre_hook(lambda _, inputs: seen.update(read=inputs[0])),
        backbone(model).register_forward_hook(lambda _m, _i, output: seen.update(made=output)),
    ]
    try:
        ids = torch.tensor([sequence.ids], device=next(model.parameters()).device)
        model(**accepted(model, input_ids=ids, use_cache=False))
    finally:
        for hook in hooks:
            hook.remove()
    made = getattr(seen.get("made"), "last_hidden_state", None)
    read = seen.get("read")
    return made is not None and read is not None and made.shape == read.shape and torch.equal(made, read)


# ------------------------------------------------------------------------------------------------- Keel's


def _our_logps(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, ...]:
    everything = replace(batch, mask_T=batch.positions_T > 0)
    found = token_logprobs(model, everything, entropy=True)
    assert found.entropy_C is not None
    counts = masked_offsets(everything).diff().tolist()
    first, third, second = torch.stack([found.logp_C, found.entropy_C], 1).split(counts)
    return first, second, third


def _our_scores(model: Any, batch: PackedBatch) -> tuple[Tensor, ...]:
    scores = model.score(hidden_states(model, batch).float())[:, :1]
    first, third, second = scores.split(batch.lengths().tolist())
    return first, second, third


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
