"""Batched decoding of Llama-family models on the trainer's own parameters, with the slots kept full.

Prompts wait in a queue; a finished sequence gives its slot to the next; when the queue is empty the batch shrinks to
what still runs. A slot's cache holds its prompt without the last token: that token is the first input of the decoding
step, so that there is one place alone where logits are made and tokens are chosen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from keel.model.modules import context_length, inner_model
from keel.precision import Precision
from keel.recipe.sections import SamplingConfig
from keel.rollout.cuda import CudaDecoder, slots_that_fit
from keel.rollout.llama import Decoder, Weights
from keel.rollout.slots import Slots
from keel.rollout.tokens import completion_limits, finite, not_finite, streams_of, uniforms
from keel.types import Completion

if TYPE_CHECKING:
    from keel.rollout.cpu import CpuDecoder

ALONE_UP_TO = 50_000_000  # parameters; see EmbeddedSampler._workers
ALONE_SLOTS = 32  # the fewest that are worth a thread: products of fewer rows run at half their speed
PREFILL_TOKENS = 8192  # tokens in one prefill pass: bounds its memory


@dataclass(frozen=True, slots=True)
class Request:
    index: int
    prompt: tuple[int, ...]
    limit: int
    stream: int = 0


class EmbeddedSampler:
    """See ``keel.rollout.sampler.Sampler``. ``precision="bf16"``: the numbers in matrix products and the cache in
    bfloat16; the residual stream, norms, softmaxes and logits in float32, as in the trainer."""

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], precision: Precision = "fp32") -> None:
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        limits = completion_limits(prompts, sampling.max_new_tokens, context_length(self.model))
        if not prompts:
            return []
        keys = streams_of(seed, len(prompts), streams)
        requests = [Request(i, tuple(p), *of) for i, (p, *of) in enumerate(zip(prompts, limits, keys, strict=True))]
        weights = Weights.of(self.model, self.dtype, apart=on_gpu(self.model))
        if weights.packed and not _finite_head(self.model):
            raise not_finite("prompt 0")
        parts = divided(requests, self._workers(weights, min(sampling.batch_size, len(requests))))
        slots = -(-sampling.batch_size // len(parts))
        done: list[Completion | None] = [None] * len(requests)
        threads = torch.get_num_threads() if len(parts) == 1 else 1
        runs = [Scheduler(self, weights, part, min(slots, len(part)), threads, sampling, done) for part in parts]
        if len(runs) == 1:
            runs[0].run()
        else:
            side_by_side(runs)
        return finite([completion for completion in done if completion is not None])

    def _workers(self, weights: Weights, slots: int) -> int:
        """The slots of a small model are divided among threads that decode by themselves: but for the large products
        nothing in a step is worth a second thread. In a large model each would read all weights again."""
        small = sum(p.numel() for p in self.model.parameters()) <= ALONE_UP_TO
        if weights.embedding_VH.device.type != "cpu" or not small:
            return 1
        return max(1, min(torch.get_num_threads(), slots // ALONE_SLOTS))


def _finite_head(model: nn.Module) -> bool:
    """Compiled code takes a single token's logit that is no number for a small one, so its weights are looked at; what
    is wrong below the head spreads to all tokens, which it sees."""
    head = inner_model(model).get_output_embeddings()
    return all(math.isfinite(float(p.detach().sum(dtype=torch.float32))) for p in head.parameters())


def divided(requests: Sequence[Request], parts: int) -> list[list[Request]]:
    """Requests for each thread, the samples of a prompt in one. The same in every run, whatever the threads' pace, or
    a resumed run would round differently."""
    # Longest first: prompts of a length are prefilled together, and a prompt's samples lie side by side.
    ordered = sorted(requests, key=lambda r: (-len(r.prompt), r.prompt, r.index))
    dealt: list[list[Request]] = [[] for _ in range(parts)]
    for _, same in groupby(ordered, key=lambda r: r.prompt):
        min(dealt, key=len).extend(same)
    return [part for part in dealt if part]


def side_by_side(runs: Sequence[Scheduler]) -> None:
    """Each run in a thread of its own, which computes alone."""
    threads = torch.get_num_threads()

    def alone(run: Scheduler) -> None:
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


def on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def make_decoder(
    model: nn.Module, weights: Weights, slots: int, context: int, threads: int
) -> Decoder | CpuDecoder | CudaDecoder:
    """The one for the device. All do the same; the others, where they run, several times faster than the first."""
    if on_gpu(model):
        return CudaDecoder(model, weights, slots, context)
    if weights.packed:
        from keel.rollout.cpu import CpuDecoder  # numba is slow to import

        return CpuDecoder(model, weights, slots, context, threads)
    return Decoder(model, weights, slots, context)


class Scheduler:
    """Decodes ``requests``, and writes the completions into ``done``."""

    def __init__(
        self,
        sampler: EmbeddedSampler,
        weights: Weights,
        requests: Sequence[Request],
        slots: int,
        threads: int,
        sampling: SamplingConfig,
        done: list[Completion | None],
    ) -> None:
        self.sampling = sampling
        context = max(len(r.prompt) + r.limit for r in requests)
        if weights.embedding_VH.is_cuda:
            slots = slots_that_fit(weights, slots, context)
        self.decoder = make_decoder(sampler.model, weights, slots, context, threads)
        device = self.decoder.device
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
            try:
                finished = self.decoder.advance(self.state, self.stops, self.sampling).nonzero().squeeze(1)
            except ValueError as error:  # from compiled code, which does not say in which slot
                slot = next(slot for slot, request in enumerate(self.running) if request is not None)
                request = self.running[slot]
                assert request is not None
                where = f"prompt {request.index}" + (" or one beside it" if sum(map(bool, self.running)) > 1 else "")
                raise not_finite(where, int(self.state.sampled[slot])) from error
            if finished.numel():
                self._collect(finished)

    def _collect(self, finished: Tensor) -> None:
        s = self.state
        stopped = torch.isin(s.token[finished], self.stops)
        table = zip(
            finished.tolist(), s.sampled[finished].tolist(), s.ids[finished].tolist(), s.logprobs[finished].tolist(),
            stopped.tolist(), strict=True,
        )  # fmt: skip
        for slot, count, ids, logprobs, stop in table:
            request = self.running[slot]
            assert request is not None
            self.done[request.index] = Completion("", tuple(ids[:count]), tuple(logprobs[:count]), stop)
            self.running[slot] = None
        for of_slot in (s.active, s.position, s.sampled):
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
        s, device = self.state, self.decoder.device
        requests = [request for _, request in new]
        rows = torch.tensor([slot for slot, _ in new], device=device)
        s.token[rows] = torch.tensor([r.prompt[-1] for r in requests], device=device)
        s.position[rows] = torch.tensor([len(r.prompt) - 1 for r in requests], device=device)
        s.limit[rows] = torch.tensor([r.limit for r in requests], device=device)
        s.sampled[rows] = 0
        s.active[rows] = 1
        s.uniforms[rows] = uniforms([r.stream for r in requests], self.sampling.max_new_tokens).to(device)

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
        size = self.decoder.batch_for(len(busy))
        if self.queue or not busy or size > 0.75 * len(self.running):
            return
        idle = [i for i, request in enumerate(self.running) if request is None]
        kept = busy + idle[: size - len(busy)]
        rows = torch.tensor(kept, device=self.decoder.device)
        self.decoder.keep(rows)
        self.state.keep(rows)
        self.running = [self.running[i] for i in kept]
