"""The kinds of stage with their lines of help, from the text of this folder's files.

``keel --help`` names them. To import the recipe takes several times as long as the whole answer, so its text is read.
"""

from __future__ import annotations

import re
from pathlib import Path

_HERE = Path(__file__).parent
_UNION = re.compile(r"^Stage = Annotated\[(.*?)Field\(", re.DOTALL | re.MULTILINE)
_HELP = re.compile(r'^    help: ClassVar\[str\] = "(.*)"$', re.MULTILINE)


def stage_kinds() -> dict[str, str]:
    """Kind -> its ``help``, in the order of the recipe's union of stages: ``SftStage`` is kind ``sft``, in sft.py;
    ``ProcessRewardStage`` is ``process_reward``."""
    union = _UNION.search((_HERE / "recipe.py").read_text(encoding="utf-8"))
    assert union is not None, "recipe.py has no union of stages"
    names = re.findall(r"(\w+)Stage\b", union.group(1))
    return {kind: _help(kind) for kind in (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names)}


def _help(kind: str) -> str:
    line = _HELP.search((_HERE / f"{kind}.py").read_text(encoding="utf-8"))
    assert line is not None, f"recipe/{kind}.py has no line of help"
    return line.group(1)
