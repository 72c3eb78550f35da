"""Writes ../data/trl_fields.json: the fields of TRL's config classes, for docs/from-trl.md. To make it again, in an
environment with trl 1.16 (nothing of it is imported, its sources are read)::

    python tests/oracles/make_trl_fields.py $(python -c "import trl, os; print(os.path.dirname(trl.__file__))")
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

CONFIGS = {
    "SFTConfig": "trainer/sft_config.py",
    "RewardConfig": "trainer/reward_config.py",
    "DPOConfig": "trainer/dpo_config.py",
    "KTOConfig": "trainer/kto_config.py",
    "GRPOConfig": "trainer/grpo_config.py",
    "RLOOConfig": "trainer/rloo_config.py",
    "CPOConfig": "experimental/cpo/cpo_config.py",
    "ORPOConfig": "experimental/orpo/orpo_config.py",
}
SHARED = ("trainer/base_config.py", "../transformers/training_args.py")


def fields(path: Path) -> list[str]:
    """The annotated fields of the file's dataclasses."""
    found = [
        node.target.id
        for kind in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    ]
    return list(dict.fromkeys(found))


def main() -> None:
    trl = Path(sys.argv[1])
    table = {name: fields(trl / file) for name, file in CONFIGS.items()}
    table["TrainingArguments"] = sorted({name for file in SHARED for name in fields(trl / file)})
    out = Path(__file__).parent.parent / "data" / "trl_fields.json"
    out.write_text(json.dumps({"trl": "1.16", "fields": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
