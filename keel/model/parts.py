"""Writing weights part by part, so that no second copy of a model is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

ONE_FILE = "1000TB"  # for transformers: a part is one file, however large


def write_parts(inner: Any, parts: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Has transformers write each part of a model's state as a file of its own, with its names and its forms of layers,
    and all else that belongs to a checkpoint. One part is ``model.safetensors``; several are shards with an index."""
    files: list[Path] = []
    for part in parts:
        inner.save_pretrained(str(folder), state_dict=part, max_shard_size=ONE_FILE)
        del part  # before the next one is made
        files.append((folder / SAFE_WEIGHTS_NAME).rename(folder / f"part-{len(files) + 1}.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / SAFE_WEIGHTS_NAME)
        return
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file.rename(folder / name), "pt") as shard:
            places |= dict.fromkeys(shard.keys(), name)
    size = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
