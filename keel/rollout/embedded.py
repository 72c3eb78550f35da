"""Batched decoding of Llama-family models on the trainer's own parameters, with the slots kept full.

Prompts wait in a queue; a finished sequence gives its slot to the next; when the queue is empty the batch shrinks to
what still runs. A slot's cache holds its prompt without the last token: that token is the first input of the decoding
step, so that there is one place alone where logits are made and tokens are chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from torch import Tensor, nn

from keel.config import SamplingConfig
from keel.rollout.llama import ROWS, Decoder, Weights, round_up
from keel.rollout.sampler import Precision, choose, context_length, room, stream_key, uniforms
from keel.types import Completion

ALONE_UP_TO = 16_000_000  # parameters; see EmbeddedSampler._workers
ALONE_SLOTS = 32  # the fewest that are worth a thread: with less to compute threads wait for each other in Python
PREFILL_TOKENS = 8192  # tokens in one prefill pass: bounds its memory


@dataclass(slots=True)
class Slots:
    """What each slot is at; all [S] or [S, max_new_tokens]. A slot that waits is decoded like the others, at
    position 0 again and again, and what it says is ignored."""

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
        weights = Weights.of(self.model, self.dtype)
        parts = divided(requests, self._workers(weights, min(sampling.batch_size, len(requests))))
        slots = -(-sampling.batch_size // len(parts))
        done: list[Completion | None] = [None] * len(requests)
        runs = [_Run(self, weights, part, min(slots, len(part)), sampling, seed, done) for part in parts]
        if len(runs) == 1:
            runs[0].run()
        else:
            side_by_side(runs)
        return [completion for completion in done if completion is not None]

    def _workers(self, weights: Weights, slots: int) -> int:
        """In a small model most operations of a step are too short for a second thread to join in: the slots are then
        divided among threads that decode by themselves. In a large one each would read all weights again."""
        small = sum(p.numel() for p in self.model.parameters()) <= ALONE_UP_TO
        if weights.embedding_VH.device.type != "cpu" or not small:
            return 1
        return max(1, min(torch.get_num_threads(), slots // ALONE_SLOTS))


def divided(requests: Sequence[Request], parts: int) -> list[list[Request]]:
    """Requests for each thread, the samples of a prompt in one. The same in every run, whatever the threads' pace, or
    a resumed run would round differently."""
    # Longest first: prompts of a length are prefilled together, and a prompt's samples lie side by side.
    ordered = sorted(requests, key=lambda r: (-len(r.prompt), r.prompt, r.index))
    dealt: list[list[Request]] = [[] for _ in range(parts)]
    for _, same in groupby(ordered, key=lambda r: r.prompt):
        min(dealt, key=len).extend(same)
    return [part for part in dealt if part]


def side_by_side(runs: Sequence[_Run]) -> None:
    """Each run in a thread of its own, which computes alone."""
    threads = torch.get_num_threads()

    def alone(run: _Run) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode():
            run.run()

    try:
        with ThreadPoolExecutor(len(runs)) as pool:
            futures = [pool.submit(alone, run) for run in runs]
            try:
                for future in futures:
                    future.result()
            finally:
                for run in runs:
                    run.stopped = True
    finally:
        torch.set_num_threads(threads)


class _Run:
    """Decodes ``requests``, and writes the completions into ``done``."""

    def __init__(
        self,
        sampler: EmbeddedSampler,
        weights: Weights,
        requests: Sequence[Request],
        slots: int,
        sampling: SamplingConfig,
        seed: int,
        done: list[Completion | None],
    ) -> None:
        self.sampling, self.seed = sampling, seed
        self.decoder = Decoder(sampler.model, weights, slots, max(len(r.prompt) + r.limit for r in requests))
        device = self.decoder.cos.device
        self.stops = torch.tensor(sampler.stop_ids, dtype=torch.int64, device=device)
        self.state = Slots.empty(slots, sampling.max_new_tokens, device)
        self.queue = deque(requests)
        self.running: list[Request | None] = [None] * slots
        self.done = done
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            self._fill()
            self._shrink()
            if not any(self.running):
                return
            finished = self._step().nonzero().squeeze(1)
            if finished.numel():
                self._collect(finished)

    def _step(self) -> Tensor:
        """Samples a token in every slot: -> [S] bool, the sequences that ended."""
        s = self.state
        columns = int(s.position.max()) + 1
        logits = self.decoder.step(s.token, s.position, columns)
        at = s.count[:, None]
        ids, logprobs = choose(logits, s.uniforms.gather(1, at).squeeze(1), self.sampling)
        s.ids.scatter_(1, at, ids[:, None])
        s.logprobs.scatter_(1, at, logprobs[:, None])
        s.token = ids
        s.position += s.active
        s.count += s.active
        return ((s.count >= s.limit) | torch.isin(ids, self.stops)) & s.active.bool()

    def _collect(self, finished: Tensor) -> None:
        s = self.state
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
        for of_slot in (s.active, s.position, s.count):
            of_slot[finished] = 0

    def _fill(self) -> None:
        """Gives free slots to waiting prompts, an eighth of the slots at a time: a prefill of few tokens wastes more
        than a slot that idles for a few steps."""
        free = [i for i, request in enumerate(self.running) if request is None]
        if not self.queue or len(free) < min(max(1, len(self.running) // 8), len(self.queue)):
            return
        new = [(slot, self.queue.popleft()) for slot in free[: len(self.queue)]]
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

    def _shrink(self) -> None:
        """Without a queue, finished slots are dropped once they are a quarter of the batch: copying the cache then
        costs about what their idling would in a step or two."""
        busy = [i for i, request in enumerate(self.running) if request is not None]
        size = round_up(len(busy), ROWS)
        if self.queue or not busy or size > 0.75 * len(self.running):
            return
        idle = [i for i, request in enumerate(self.running) if request is None]
        kept = busy + idle[: size - len(busy)]
        rows = torch.tensor(kept, device=self.decoder.cos.device)
        self.decoder.keep(rows)
        self.state.keep(rows)
        self.running = [self.running[i] for i in kept]
