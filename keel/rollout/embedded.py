"""Batched decoding of Llama-family models by Keel's own forward pass, on the trainer's own parameters.

Three parts. ``Weights`` names a model's tensors (nothing is copied in float32 but what LoRA adds). ``Decoder`` runs the
layers over a key-value cache whose rows are slots. ``EmbeddedSampler`` keeps the slots full: prompts wait in a queue, a
finished sequence gives its slot to the next, and when the queue is empty the batch shrinks to what still runs.

A slot's cache holds its prompt without the last token; that token is the first input of the decoding step, so that
there is one place alone where logits are made and tokens are chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keel.config import SamplingConfig
from keel.model.packed import inner_model
from keel.rollout.sampler import Precision, choose, context_length, room, stream_key, uniforms
from keel.types import Completion

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
PREFILL_TOKENS = 8192  # tokens in one prefill pass: bounds its memory
COLUMNS = 16  # the cache is read in multiples of this,
ROWS = 8  # prefills are padded and batches shrink to multiples of this: each new shape of a matrix product costs oneDNN
# about half a millisecond to prepare, the time of the product itself in a small model


# ------------------------------------------------------------------------------------------------- parameters


def why_unsupported(model: nn.Module) -> str:
    """Why the embedded sampler cannot run ``model``, or an empty string when it can."""
    inner: Any = inner_model(model)
    if type(inner).__name__ not in ARCHITECTURES:
        return f"{type(inner).__name__} is not one of {', '.join(ARCHITECTURES)}"
    config = inner.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its sliding window of {window} is shorter than its context"
    if config.rope_parameters["rope_type"] not in FIXED_ROPE:
        return f"its rotary embedding is of the type {config.rope_parameters['rope_type']}"
    if type(inner.model.embed_tokens) is not nn.Embedding:
        return f"its embedding is a {type(inner.model.embed_tokens).__name__}"
    linears = [inner.lm_head]
    for layer in inner.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return next((f"it has a {type(m).__name__} of an unknown kind" for m in linears if not _is_readable(m)), "")


def _is_readable(module: Any) -> bool:
    """A plain linear layer, or one with plain LoRA (no DoRA or other variant, no bias of its own)."""
    if type(module) is nn.Linear:
        return True
    plain_lora = hasattr(module, "get_delta_weight") and type(getattr(module, "base_layer", None)) is nn.Linear
    return plain_lora and not module.lora_variant and not any(module.lora_bias.values())


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: Any, dtype: torch.dtype) -> Linear:
        base = getattr(module, "base_layer", module)
        weight = base.weight
        if base is not module and not module.disable_adapters and not module.merged:
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
        return Linear(weight.to(dtype), None if base.bias is None else base.bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    norm_in: Tensor
    q: Linear
    k: Linear
    v: Linear
    q_norm: Tensor | None  # Qwen3: RMS norm of each head
    k_norm: Tensor | None
    o: Linear
    norm_mlp: Tensor
    gate: Linear
    up: Linear
    down: Linear

    @staticmethod
    def of(module: Any, dtype: torch.dtype) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        normed = hasattr(attention, "q_norm")
        return Layer(
            norm_in=module.input_layernorm.weight.float(),
            q=Linear.of(attention.q_proj, dtype),
            k=Linear.of(attention.k_proj, dtype),
            v=Linear.of(attention.v_proj, dtype),
            q_norm=attention.q_norm.weight.float() if normed else None,
            k_norm=attention.k_norm.weight.float() if normed else None,
            o=Linear.of(attention.o_proj, dtype),
            norm_mlp=module.post_attention_layernorm.weight.float(),
            gate=Linear.of(mlp.gate_proj, dtype),
            up=Linear.of(mlp.up_proj, dtype),
            down=Linear.of(mlp.down_proj, dtype),
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters, those of the matrix products in ``dtype``; read anew for each call of ``generate``."""

    embedding_VH: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    act: Callable[[Tensor], Tensor]
    eps: float
    scale: float
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module, dtype: torch.dtype) -> Weights:
        inner: Any = inner_model(model)
        attention = inner.model.layers[0].self_attn
        return Weights(
            embedding_VH=inner.model.embed_tokens.weight,
            layers=tuple(Layer.of(layer, dtype) for layer in inner.model.layers),
            norm=inner.model.norm.weight.float(),
            # The head stays in float32, as in the trainer's log-probabilities (keel.model.logprobs).
            head=Linear.of(inner.lm_head, torch.float32),
            act=inner.model.layers[0].mlp.act_fn,
            eps=inner.config.rms_norm_eps,
            scale=attention.scaling,
            heads=inner.config.num_attention_heads,
            kv_heads=inner.config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=dtype,
        )


# ------------------------------------------------------------------------------------------------- forward pass


class Decoder:
    """The forward pass over a cache of ``slots`` rows: ``prefill`` fills rows, ``step`` reads one token a row.

    Keys are kept as [S, kv_heads, head_dim, capacity] and values as [S, kv_heads, capacity, head_dim]: the layouts in
    which the two products of a single query are fastest on a CPU. The capacity grows as sequences do.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, slots: int, context: int) -> None:
        self.w = Weights.of(model, dtype)
        device = self.w.embedding_VH.device
        positions = torch.arange(context, device=device)[None]
        cos, sin = inner_model(model).model.rotary_emb(torch.zeros(1, device=device), positions)  # type: ignore[operator, union-attr]
        self.cos, self.sin = cos[0], sin[0]  # [context, head_dim]
        self.capacity = 0
        shape = (slots, self.w.kv_heads, self.w.head_dim, 0)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.w.layers]
        self.values = [key.transpose(2, 3) for key in self.keys]

    def reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each row."""
        if columns <= self.capacity:
            return
        # Half as much again, or growing would copy the cache every few steps.
        self.capacity = _up(max(columns, self.capacity * 3 // 2), COLUMNS)
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            more = self.capacity - key.shape[3]
            self.keys[i], self.values[i] = F.pad(key, (0, more)), F.pad(value, (0, 0, 0, more))

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], source: Sequence[int]) -> None:
        """Computes the keys and values of ``prompts`` once each, and writes those of ``prompts[source[i]]`` to row
        ``slots[i]``. The prompts are padded on the right: the causal mask keeps real tokens from seeing the padding,
        and a step does not look beyond its own position."""
        w, device = self.w, self.cos.device
        longest = max(map(len, prompts))
        if longest == 0:
            return
        longest = min(_up(longest, ROWS), self.cos.shape[0])
        self.reserve(longest)
        padded = [[*p, *[0] * (longest - len(p))] for p in prompts]
        padded += [[0] * longest] * (_up(len(padded), ROWS) - len(padded))
        ids = torch.tensor(padded, device=device)
        rows, from_rows = torch.tensor(slots, device=device), torch.tensor(source, device=device)
        cos, sin = self.cos[:longest, None], self.sin[:longest, None]
        x = F.embedding(ids, w.embedding_VH).float()
        for i, layer in enumerate(w.layers):
            q, k, v = self._qkv(layer, x, cos, sin)  # [U, L, heads, head_dim]
            self.keys[i][rows, :, :, :longest] = k.permute(0, 2, 3, 1)[from_rows]
            self.values[i][rows, :, :longest] = v.transpose(1, 2)[from_rows]
            if i + 1 == len(w.layers):
                break  # nobody reads the last layer's output: the prompt's last token goes through `step`
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=w.scale,
                enable_gqa=w.heads != w.kv_heads,
            )  # fmt: skip
            x = self._after_attention(layer, x, out.transpose(1, 2).flatten(2))

    def step(self, tokens_S: Tensor, positions_S: Tensor, columns: int) -> Tensor:
        """Logits [S, V] float32 after one more token a row. ``columns``: more than the largest position."""
        self.reserve(columns)
        w, S = self.w, tokens_S.shape[0]
        W = _up(columns, COLUMNS)  # the capacity is a multiple too
        rows = torch.arange(S, device=tokens_S.device)
        cos, sin = self.cos[positions_S, None], self.sin[positions_S, None]
        hidden = torch.arange(W, device=tokens_S.device) > positions_S[:, None]
        bias_S1W = torch.zeros(S, 1, W, device=tokens_S.device).masked_fill_(hidden[:, None], float("-inf"))
        group = w.heads // w.kv_heads
        x = F.embedding(tokens_S, w.embedding_VH).float()
        for i, layer in enumerate(w.layers):
            q, k, v = self._qkv(layer, x, cos, sin)  # [S, heads, head_dim]
            key, value = self.keys[i], self.values[i]
            key[rows, :, :, positions_S] = k
            value[rows, :, positions_S] = v
            scores = torch.bmm(q.view(S * w.kv_heads, group, w.head_dim), key.flatten(0, 1)[:, :, :W])
            scores = torch.add(bias_S1W, scores.view(S, w.heads, W), alpha=w.scale)
            probs = torch.softmax(scores, -1).to(w.dtype).view(S * w.kv_heads, group, W)
            out = torch.bmm(probs, value.flatten(0, 1)[:, :W])
            x = self._after_attention(layer, x, out.view(S, w.heads * w.head_dim))
        return w.head(self._norm(x, w.norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.w.eps)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., H] -> q [..., heads, head_dim], k and v [..., kv_heads, head_dim], with rotary positions."""
        w = self.w
        h = self._norm(x, layer.norm_in).to(w.dtype)
        q = layer.q(h).unflatten(-1, (w.heads, w.head_dim)).float()
        k = layer.k(h).unflatten(-1, (w.kv_heads, w.head_dim)).float()
        v = layer.v(h).unflatten(-1, (w.kv_heads, w.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return _rotate(q, cos, sin).to(w.dtype), _rotate(k, cos, sin).to(w.dtype), v

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.o(attended)
        h = self._norm(x, layer.norm_mlp).to(self.w.dtype)
        return x + layer.down(self.w.act(layer.gate(h)) * layer.up(h))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face checkpoints."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


# ------------------------------------------------------------------------------------------------- scheduling


@dataclass(slots=True)
class Slots:
    """What each slot is at; all [S] or [S, max_new_tokens]. A slot that is not active stays where it is."""

    token: Tensor  # the next input
    position: Tensor  # its place in the sequence
    count: Tensor  # tokens sampled so far
    limit: Tensor
    active: Tensor  # 1 or 0
    uniforms: Tensor
    ids: Tensor
    logprobs: Tensor

    @staticmethod
    def empty(slots: int, length: int, device: torch.device) -> Slots:
        def zeros() -> Tensor:
            return torch.zeros(slots, dtype=torch.int64, device=device)

        def table(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, length, dtype=dtype, device=device)

        return Slots(
            token=zeros(), position=zeros(), count=zeros(), limit=zeros(), active=zeros(),
            uniforms=table(torch.float32), ids=table(torch.int64), logprobs=table(torch.float32),
        )  # fmt: skip

    def keep(self, rows: Tensor) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[rows])


@dataclass(frozen=True, slots=True)
class Request:
    index: int
    prompt: tuple[int, ...]
    limit: int


class EmbeddedSampler:
    """See ``keel.rollout.sampler.Sampler``. ``precision="bf16"``: matrix products and cache in bfloat16; the residual
    stream, norms, softmaxes and the head in float32, as in the trainer."""

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], precision: Precision = "fp32") -> None:
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        limits = room(prompts, sampling.max_new_tokens, context_length(self.model))
        if not prompts:
            return []
        requests = [Request(i, tuple(p), n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
        return _Run(self, requests, sampling, seed).run()


class _Run:
    """One call of ``generate``."""

    def __init__(self, sampler: EmbeddedSampler, requests: list[Request], sampling: SamplingConfig, seed: int) -> None:
        self.sampling, self.seed = sampling, seed
        slots = min(sampling.batch_size, len(requests))
        context = max(len(r.prompt) + r.limit for r in requests)
        self.decoder = Decoder(sampler.model, sampler.dtype, slots, context)
        device = self.decoder.cos.device
        self.stops = torch.tensor(sampler.stop_ids, dtype=torch.int64, device=device)
        self.state = Slots.empty(slots, sampling.max_new_tokens, device)
        # Longest first: prompts of a length are prefilled together, and a prompt's samples lie side by side.
        self.queue = deque(sorted(requests, key=lambda r: (-len(r.prompt), r.prompt, r.index)))
        self.running: list[Request | None] = [None] * slots
        self.done: list[Completion | None] = [None] * len(requests)

    def run(self) -> list[Completion]:
        columns = 0  # above every active position
        while True:
            if self._fill() or self._shrink():
                columns = int((self.state.position * self.state.active).max())
            if not any(self.running):
                break
            columns += 1
            finished = self._step(columns).nonzero().squeeze(1)
            if finished.numel():
                self._collect(finished)
        return [c for c in self.done if c is not None]

    def _step(self, columns: int) -> Tensor:
        """Samples a token in every slot: -> [S] bool, the sequences that ended."""
        s = self.state
        logits = self.decoder.step(s.token, s.position, columns)
        at = s.count.clamp(max=s.ids.shape[1] - 1)[:, None]  # a slot that waits may be full
        ids, logprobs = choose(logits, s.uniforms.gather(1, at).squeeze(1), self.sampling)
        s.ids.scatter_(1, at, ids[:, None])
        s.logprobs.scatter_(1, at, logprobs[:, None])
        s.token = ids
        s.position += s.active
        s.count += s.active
        return ((s.count >= s.limit) | torch.isin(ids, self.stops)) & s.active.bool()

    def _collect(self, finished: Tensor) -> None:
        s = self.state
        s.active[finished] = 0
        stopped = torch.isin(s.token[finished], self.stops)
        table = zip(
            finished.tolist(), s.count[finished].tolist(), s.ids[finished].tolist(), s.logprobs[finished].tolist(),
            stopped.tolist(), strict=True,
        )  # fmt: skip
        for slot, count, ids, logprobs, stop in table:
            request = self.running[slot]
            assert request is not None
            self.done[request.index] = Completion("", tuple(ids[:count]), tuple(logprobs[:count]), stop)
            self.running[slot] = None

    def _fill(self) -> bool:
        """Gives free slots to waiting prompts, an eighth of the slots at a time: a prefill of few tokens wastes more
        than a slot that idles for a few steps."""
        free = [i for i, request in enumerate(self.running) if request is None]
        if not self.queue or len(free) < min(max(1, len(self.running) // 8), len(self.queue)):
            return False
        new = [(slot, self.queue.popleft()) for slot, _ in zip(free, range(len(self.queue)), strict=False)]
        for slot, request in new:
            self.running[slot] = request
        self._prefill(new)
        s, device = self.state, self.decoder.cos.device
        requests = [request for _, request in new]
        rows = torch.tensor([slot for slot, _ in new], device=device)
        s.token[rows] = torch.tensor([r.prompt[-1] for r in requests], device=device)
        s.position[rows] = torch.tensor([len(r.prompt) - 1 for r in requests], device=device)
        s.limit[rows] = torch.tensor([r.limit for r in requests], device=device)
        s.count[rows] = 0
        s.active[rows] = 1
        keys = [stream_key(self.seed, r.index) for r in requests]
        s.uniforms[rows] = uniforms(keys, self.sampling.max_new_tokens).to(device)
        return True

    def _prefill(self, new: list[tuple[int, Request]]) -> None:
        """Fills the cache for ``new``, in passes of bounded size, every distinct prompt once a pass."""
        while new:
            prompts: dict[tuple[int, ...], int] = {}
            width, taken = len(new[0][1].prompt), 0  # the longest comes first
            for _, request in new:
                if request.prompt not in prompts and prompts and (len(prompts) + 1) * width > PREFILL_TOKENS:
                    break
                prompts.setdefault(request.prompt, len(prompts))
                taken += 1
            part, new = new[:taken], new[taken:]
            source = [prompts[request.prompt] for _, request in part]
            self.decoder.prefill([p[:-1] for p in prompts], [slot for slot, _ in part], source)

    def _shrink(self) -> bool:
        """Without a queue, finished slots are dropped once they are a quarter of the batch: copying the cache then
        costs about what their idling would in a step or two."""
        busy = [i for i, request in enumerate(self.running) if request is not None]
        size = _up(len(busy), ROWS)
        if self.queue or not busy or size > 0.75 * len(self.running):
            return False
        idle = [i for i, request in enumerate(self.running) if request is None]
        kept = busy + idle[: size - len(busy)]
        rows = torch.tensor(kept, device=self.decoder.cos.device)
        self.decoder.keep(rows)
        self.state.keep(rows)
        self.running = [self.running[i] for i in kept]
        return True
