"""Names of columns and message fields that change what is learned, as other tools write them: one table for all
readers. Each is honoured or refused; a refused one is passed over where its value says nothing.

The names are those of OpenAI's fine-tuning files, TRL, axolotl, LLaMA-Factory, ms-swift, NeMo, Mistral's finetune,
Alpaca, Dolly and ShareGPT's many heirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from keel.data.rows import RowError, shown

# ---------------------------------------------------------------------------------------------------------- honoured

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "instruction_system", "sys_prompt")
HISTORY = "history"
# Beside an ``instruction``: what it is about (Alpaca's, Dolly's), and the reply to it.
MATERIAL = ("input", "context")
ANSWER = ("output", "response")
# A question with a known answer (GSM8K's, MATH's), and its worked solution where the answer is not that.
QUESTION = ("question", "problem")
SOLUTION = ("solution", "answer")
OPTIONS = ("choices", "options")
WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss")  # of a message: 0 is not learned
TRAINED = ("train", "training", "trainable", "train_on_turn", "learn")  # the same, and 1 would teach a user's turn
# Of a pair: how probable it is that ``chosen`` is the better one. Tools agree on no name for it.
PROBABILITY = (
    *("probability", "prob", "preference_probability", "preference_prob", "chosen_probability", "p_chosen"),
    "soft_label",
)

# ----------------------------------------------------------------------------------------------------------- refused


def says_nothing(value: Any) -> bool:
    """Whether a value is none: null, empty, or JSON of the like (as CSV has it, and Parquet's texts)."""
    if isinstance(value, str):
        text = value.strip()
        return not text or (text[0] in "[{n" and text.replace(" ", "") in ("[]", "{}", "null", "none", "nan"))
    if isinstance(value, Mapping):
        return all(says_nothing(item) for item in value.values())
    if isinstance(value, list):
        return all(says_nothing(item) for item in value)
    return value is None


def _says_one(value: Any) -> bool:
    return says_nothing(value) or str(value).lower() in ("1", "1.0", "true")


def _says_no(value: Any) -> bool:
    return says_nothing(value) or str(value).lower() in ("0", "0.0", "false")


@dataclass(frozen=True, slots=True)
class Refused:
    """``why``: what was expected, and the remedy. ``neutral``: which values change nothing."""

    why: str
    neutral: Callable[[Any], bool] = says_nothing


_TEXT_ALONE = Refused("expected text alone, and this is an image, a sound or a video; leave such rows out")
_NO_TOOLS = Refused(
    "expected rows without tools, which the model would not be shown; write them into the system message as the "
    "model's template does, or leave such rows out"
)
_NO_SETTINGS = Refused("expected rows that need no setting of the chat template; leave the column out")
_NO_WEIGHTS = Refused("expected 1, because every row counts alike; repeat rows or leave them out instead", _says_one)
_NO_MASKS = Refused("expected no mask over tokens; give messages a weight of 0 or 1 instead")
_NO_THOUGHT = Refused("expected the thinking inside the reply; write it there as the model's template does")

# What the model would have to be shown.
SHOWN: dict[str, Refused] = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "available_tools"), _NO_TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "objects", "media"), _TEXT_ALONE),
    **dict.fromkeys(
        ("chosen_images", "rejected_images", "image_url", "image_path", "multimodal_inputs", "multi_modal_data"),
        _TEXT_ALONE,
    ),
    **dict.fromkeys(
        ("chat_template_kwargs", "template_kwargs", "enable_thinking", "thinking_mode", "reasoning_effort"),
        _NO_SETTINGS,
    ),
    "chat_template": _NO_SETTINGS,
}

# Besides, what a row or a token of it counts for in what is learned.
_COUNTED: dict[str, Refused] = {
    **dict.fromkeys(
        ("weight", "sample_weight", "loss_weight", "instance_weight", "loss_scale", "weights"), _NO_WEIGHTS
    ),
    **dict.fromkeys(("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "train_mask"), _NO_MASKS),
    **dict.fromkeys(("train_detail", "training_detail", "train_on_turn"), _NO_MASKS),
    "mask": Refused(
        "expected none (or NeMo's User: the user's turns are never learned); give messages a weight of 0 or 1 instead",
        lambda value: says_nothing(value) or str(value).lower() in ("user", "human"),
    ),
    "mask_history": Refused("expected false; give the earlier replies a weight of 0 instead", _says_no),
    "train_on_inputs": Refused("expected false, because the assistant's messages alone are learned", _says_no),
}
PAIRED = {**SHOWN, **_COUNTED}
_NO_THUMB_DOWN = Refused(
    "false, so the reply is no demonstration; leave out rows with thumbs down",
    lambda value: str(value).lower() not in ("0", "0.0", "false"),
)
TAUGHT = {
    **PAIRED,
    "label": _NO_THUMB_DOWN,
    "kto_tag": _NO_THUMB_DOWN,
    "labels": _NO_MASKS,
    **dict.fromkeys(("reasoning_content", "thinking", "thought"), _NO_THOUGHT),
}

_NO_CALLS = Refused("expected messages of text alone; leave out rows with tool calls")
MESSAGE: dict[str, Refused] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools", "functions"), _NO_CALLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), _NO_THOUGHT),
    **{name: SHOWN[name] for name in ("image", "images", "video", "videos", "audio", "audios", "image_url", "media")},
    "refusal": Refused("expected the refusal as the content of the message; write it there"),
    "name": Refused("expected no name of the speaker; write it into the content, or take it out"),
    "channel": Refused("expected messages without channels; write them into the content as the template does"),
    "train_detail": _NO_MASKS,
    "training_detail": _NO_MASKS,
}
MASK = "mask"  # of a message: some tools mean that it is learned, others that it is not

_FLAGS = {*WEIGHTS, *TRAINED, MASK}

# Keel's own columns, which a reader may pass over without a word.
OWN = {
    *("annotator_kind", "choice", "chosen_side", "strength", "seconds", "guideline", "reason", "created", "batch"),
    *("item", "settled_by", "gold", "ratings", "ranking", "edit", "chosen_source", "rejected_source", "reward"),
    *("marks", "outcome", "reasons", "correction", "note", "reference_shown", "step_seconds", "drawn", "steps"),
    *("completion_source", "settled_reason", "settled_at"),
}
# What stands in the place of `chosen` and `rejected` in rows of Keel's own exports that are no preference.
EVEN = {"chosen": "one", "rejected": "other"}


def refuse(columns: Mapping[str, Any], table: Mapping[str, Refused], path: str = "") -> None:
    """RowError for the first of ``columns`` that ``table`` refuses; ``path`` stands before its name."""
    for name in columns:
        if name in table and not table[name].neutral(columns[name]):
            raise RowError(f"field '{path}{name}': {table[name].why}")


def is_learned(message: Mapping[str, Any], role: str, path: str) -> bool:
    """What a message's flags and weights, in any spelling, say of whether it is learned.

    A user's or system message never is, so 0 is ignored there, and so is a weight of 1, which some tools write on every
    message. A flag that it be trained on is refused, and so is what would be half learned.
    """
    if _FLAGS.isdisjoint(message):
        return True
    flags = {name: _flag(message[name], f"{path}.{name}") for name in _given(message, (*WEIGHTS, *TRAINED))}
    if role != "assistant":
        taught = next((name for name in TRAINED if flags.get(name)), None)
        if taught:
            raise RowError(
                f"field '{path}.{taught}': true, and a message of the {role} is never learned; set it to false"
            )
        return True
    if _given(message, (MASK,)):
        raise RowError(
            f"field '{path}.{MASK}': it means learned to some tools and left out to others; write it as weight: 0 or 1"
        )
    if len(set(flags.values())) > 1:
        raise RowError(f"field '{path}': {' and '.join(flags)} disagree on whether it is learned; keep one")
    return all(flags.values())


def _given(message: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if message.get(name) is not None]


def _flag(value: Any, path: str) -> bool:
    known = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    found = known.get(str(value).lower())
    if found is None:
        raise RowError(f"field '{path}': expected 0 or 1, because a message is learned or not; got {shown(value)}")
    return found
