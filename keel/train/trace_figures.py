"""The figures of the steps of replies (``keel.types.Trace``) that online training logs, where a reward reads steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

import numpy as np

from keel.reward.trace import Trace
from keel.stats import clustered_error


def trace_figures(prompts: Sequence[Hashable], traces: Sequence[Trace], group_size: int) -> dict[str, float]:
    """Of a rollout's replies, those of a prompt following one another; ``prompts``: whose each is. What nobody knows,
    and a share of nothing, is left out. docs/metrics.md says what each is."""
    if not traces:
        return {}
    lengths = [tokens for trace in traces for tokens in trace.tokens]
    judged = [trace.scores for trace in traces if trace.scores]
    figures = {"process/steps": fmean(len(trace.tokens) for trace in traces)}
    if lengths:
        figures |= {
            "process/tokens_a_step": fmean(lengths),
            "process/tokens_a_step_p95": float(np.quantile(lengths, 0.95)),
            "process/repeated": sum(trace.repeated for trace in traces) / len(lengths),
        }
        unmatched = [trace.unmatched for trace in traces if trace.unmatched is not None]
        if unmatched:
            figures["process/unmatched"] = sum(unmatched) / len(lengths)
    if judged:
        figures["process/mean"] = fmean(score for scores in judged for score in scores)
        figures["process/min"] = fmean(min(scores) for scores in judged)
    thinking = [trace.thinking for trace in traces if trace.thinking is not None]
    if thinking:
        figures["process/thinking_tokens"] = fmean(thinking)
    return figures | _outcomes(prompts, traces, group_size)


def _outcomes(prompts: Sequence[Hashable], traces: Sequence[Trace], group_size: int) -> dict[str, float]:
    known = [(prompt, trace, trace.outcome) for prompt, trace in zip(prompts, traces, strict=True)
             if trace.outcome is not None]  # fmt: skip
    if len(known) < len(traces):
        return {}
    figures = _with_error("process/outcome", [outcome for _, _, outcome in known], prompts)
    right = [outcome > trace.right_above for _, trace, outcome in known]
    lucky = [
        (prompt, float(min(trace.scores) < trace.bound))
        for (prompt, trace, _), is_right in zip(known, right, strict=True)
        if is_right and trace.scores
    ]
    if lucky:
        figures |= _with_error("process/lucky", [share for _, share in lucky], [prompt for prompt, _ in lucky])
    figures["process/pass_at_1"] = fmean(right)
    if group_size > 1:
        groups = [sum(right[i : i + group_size]) for i in range(0, len(right), group_size)]
        figures["process/pass_at_group"] = fmean(successes > 0 for successes in groups)
    return figures


def _with_error(name: str, values: Sequence[float], prompts: Sequence[Hashable]) -> dict[str, float]:
    error = clustered_error(values, prompts)
    return {name: fmean(values)} | ({f"{name}_se": error} if error is not None else {})
