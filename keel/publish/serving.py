"""The command that serves a checkpoint: vLLM's or transformers', with what its own defaults would get wrong.

vLLM's names are those of 0.32, transformers' those of 5.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel.data.chat import Chat
from keel.model.adapters import ADAPTER
from keel.model.checkpoint import load_tokenizer
from keel.model.heads import CONFIG_KEY, PROCESS_KEY
from keel.recipe.declared import Makes
from keel.recipe.sections import Source
from keel.run import read_json
from keel.types import UserError

Engine = Literal["vllm", "transformers"]
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes
_CLASSIFIERS = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's folder as servers read it. ``score``: the centre and scale of a reward model's score; ``stops``:
    at which tokens a reply ends, ``unstated`` those that its generation config does not name; ``end``: the text that
    ends a reply, ``plain``: it has no chat template."""

    folder: Path
    name: str
    makes: Makes
    dtype: str
    trust: bool
    score: tuple[float, float] | None
    stops: tuple[int, ...]
    unstated: tuple[int, ...]
    end: str
    plain: bool


@dataclass(frozen=True, slots=True)
class Server:
    """``command``: as a process is started with it; ``notes``: what a client must know, a sentence each."""

    command: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def line(self) -> str:
        return shlex.join(self.command)


def read_checkpoint(folder: Path, name: str, trust: bool = False) -> Checkpoint:
    """UserError for a folder that holds no checkpoint."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint (no config.json); name a stage's folder, as in runs/mine/dpo")
    config = read_json(folder / "config.json")
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
    chat = Chat(load_tokenizer(Source(str(folder), trust_remote_code=trust)))
    stated = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = {stated} if isinstance(stated, int) else set(stated or ())
    classifies = any(one.endswith(_CLASSIFIERS) for one in config.get("architectures") or ())
    kept = config.get(CONFIG_KEY) or {}
    makes: Makes = "process reward model" if config.get(PROCESS_KEY) else "reward model" if classifies else "policy"
    own_eos = {chat.tokenizer.eos_token_id}
    return Checkpoint(
        folder=folder,
        name=name,
        makes=makes,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        trust=trust,
        score=(float(kept.get("mean", 0.0)), float(kept.get("std", 1.0))) if classifies else None,
        stops=chat.stop_ids,
        unstated=tuple(token for token in chat.stop_ids if token not in ends | own_eos),
        end=chat.tokenizer.decode(list(chat.end_ids)),
        plain=chat.plain,
    )


def server(
    found: Checkpoint, engine: Engine, place: str = "", adapter: bool = False, host: str = "127.0.0.1", port: int = 8000
) -> Server:
    """How ``found`` is served. ``place``: what the command names it by (default: its folder); ``adapter``: its adapters
    on their base. UserError for what the engine cannot do."""
    where = place or str(found.folder)
    notes = list(_notes(found))
    if host not in ("127.0.0.1", "localhost", "::1"):
        asks = "set VLLM_API_KEY, which clients then send" if engine == "vllm" else "put a proxy before it that asks"
        notes.append(f"Whoever reaches {host} may use it; {asks}.")
    if engine == "transformers":
        return Server(_transformers(found, where, adapter, host, port), tuple(notes))
    command = ["vllm", "serve"]
    if adapter:
        command += _on_base(found, where)
    else:
        command += [where, "--served-model-name", found.name, "--dtype", found.dtype]
    if found.trust:
        command.append("--trust-remote-code")
    command += _pooling(found)
    return Server((*command, "--host", host, "--port", str(port)), tuple(notes))


def _transformers(found: Checkpoint, where: str, adapter: bool, host: str, port: int) -> tuple[str, ...]:
    if found.makes != "policy":
        raise UserError(
            f"{found.name}: transformers serve has no reward models; use --engine vllm, or the Python lines of the "
            "card that keel push writes"
        )
    if adapter:
        raise UserError(f"{found.name}: transformers serve takes whole checkpoints; leave out --adapter")
    if found.plain:
        raise UserError(
            f"{found.name}: it has no chat template, and transformers serve needs one; use --engine vllm, or set "
            "model.chat_template and train again"
        )
    trust = ("--trust-remote-code",) if found.trust else ()
    return ("transformers", "serve", where, "--dtype", found.dtype, *trust, "--host", host, "--port", str(port))


def _pooling(found: Checkpoint) -> list[str]:
    """A reward model's score as Keel gives it: the head's number, centred and scaled, and no sigmoid."""
    if found.score is None:
        return []
    mean, std = found.score
    settings: dict[str, Any] = {"use_activation": False, "logit_mean": mean, "logit_sigma": std}
    if found.makes == "process reward model":
        settings = {"task": "token_classify", **settings}
    return ["--runner", "pooling", "--convert", "classify", "--pooler-config", json.dumps(settings)]


def _on_base(found: Checkpoint, where: str) -> list[str]:
    folder = found.folder / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{found.name}: this checkpoint has no adapters by themselves; leave out --adapter")
    if found.makes != "policy":
        raise UserError(f"{found.name}: vLLM has no heads of scores beside adapters; leave out --adapter")
    config = read_json(folder / "adapter_config.json")
    base, rank = str(config["base_model_name_or_path"]), int(config["r"])
    fit = next((one for one in _RANKS if one >= rank), None)
    if fit is None:
        raise UserError(f"{found.name}: vLLM takes adapters up to rank {_RANKS[-1]}, not {rank}; leave out --adapter")
    dtype = found.dtype
    if (Path(base) / "config.json").is_file():
        dtype = str(read_json(Path(base) / "config.json").get("dtype") or dtype)
    command = [base, "--dtype", dtype, "--enable-lora", "--max-lora-rank", str(fit)]
    command += ["--lora-modules", f"{found.name}={Path(where) / ADAPTER}"]
    if (folder / "chat_template.jinja").is_file():  # the base may have another, or none
        command += ["--chat-template", str(Path(where) / ADAPTER / "chat_template.jinja")]
    return [*command, "--tokenizer", str(Path(where) / ADAPTER)]


def _notes(found: Checkpoint) -> list[str]:
    if found.makes == "process reward model":
        return [
            "POST /pooling with token ids as input gives a number a token; a step's is the one at its last token. Send "
            "ids and not messages: a template may write more behind a reply."
        ]
    if found.makes == "reward model":
        return [
            f"POST /classify with token ids as input; data[0].probs[0] is the score. End them at {found.end!r}, the "
            "end of the reply: a template may write more behind it."
        ]
    notes = []
    if found.plain:
        notes.append("It has no chat template: ask /v1/completions with the question and a newline, not the chat.")
    if found.unstated:
        notes.append(f'Send "stop_token_ids": {json.dumps(list(found.unstated))}: its generation config lacks them.')
    return notes


# --------------------------------------------------------------------------------------------------------- the card


def how_to_use(found: Checkpoint, place: str) -> list[str]:
    """Lines of Markdown: Python that runs the checkpoint that lies at ``place``, and the command that serves it."""
    python = _score_lines(found, place) if found.score is not None else _reply_lines(found, place)
    lines = [] if found.makes == "process reward model" else ["```python", *python, "```", ""]
    if found.makes == "process reward model":
        lines = ["A step's score is the head's number at the step's last token, centred and scaled; `config.json` says "
                 f"how replies are cut into steps (`{PROCESS_KEY}`).", ""]  # fmt: skip
    served = server(found, "vllm", place)
    return [*lines, "```", served.line, "```", *(["", *served.notes] if served.notes else [])]


def _reply_lines(found: Checkpoint, place: str) -> Sequence[str]:
    trust = ", trust_remote_code=True" if found.trust else ""
    ask = 'prompt = "What is a keel?\\n"'
    if not found.plain:
        ask = 'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is a keel?"}], '
        ask += "tokenize=False, add_generation_prompt=True)"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({place!r}{trust})",
        f"model = AutoModelForCausalLM.from_pretrained({place!r}{trust})",
        ask,
        f'ids = tokenizer(prompt, add_special_tokens={found.plain}, return_tensors="pt")["input_ids"]',
        f"reply = model.generate(ids, max_new_tokens=256, eos_token_id={list(found.stops)})[0, ids.shape[1] :]",
        "print(tokenizer.decode(reply, skip_special_tokens=True))",
    )


def _score_lines(found: Checkpoint, place: str) -> Sequence[str]:
    assert found.score is not None
    mean, std = found.score
    trust = ", trust_remote_code=True" if found.trust else ""
    return (
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({place!r}{trust})",
        f"model = AutoModelForSequenceClassification.from_pretrained({place!r}{trust})",
        'talk = [{"role": "user", "content": "What is a keel?"}, {"role": "assistant", "content": "A ship\'s spine."}]',
        "text = tokenizer.apply_chat_template(talk, tokenize=False)",
        f"end = {found.end!r}",
        "text = text[: text.rindex(end) + len(end)]",
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]',
        f"score = (model(ids).logits[0, 0].item() - {mean!r}) / {std!r}",
        "print(score)",
    )
