"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 3000  # characters of a text that are shown

ACRONYMS = {  # besides the kinds of stage that are acronyms
    "kl": "KL", "rm": "RM", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO", "slic": "SLiC", "exo": "EXO",
    "prm": "PRM", "orm": "ORM", "mc": "MC", "ai": "AI", "cai": "CAI", "sl": "SL", "rlaif": "RLAIF",
    "nca": "NCA", "bco": "BCO", "cpo": "CPO", "sppo": "SPPO",
}  # fmt: skip

Format = Callable[[float], str]


def number(value: Any) -> float | None:
    """The value as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def phrase(name: str) -> str:
    """``over_refusal`` -> ``over-refusal`` for the judge's known findings, else underscores become spaces."""
    return {"over_refusal": "over-refusal", "false_premise": "false premise"}.get(name, name.replace("_", " "))


def plain(value: float) -> str:
    """Three significant digits or so, a true minus sign, thousands separated."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000 or (value == round(value) and size >= 100):
        text = f"{value:,.0f}"
    elif (value == round(value) and size >= 1) or size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.001:
        text = f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"
    else:
        text = f"{value:.0e}"
    return text.replace("-", "−")


def two_places(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")


def three_places(value: float) -> str:
    return f"{value:z.3f}".replace("-", "−")


def one_place(value: float) -> str:
    return f"{value:z.1f}".replace("-", "−")


def percent(value: float) -> str:
    """``0.8437`` -> ``84.4%``; whole when it is whole or 0 or 1."""
    text = f"{100 * value:z.1f}"
    return text.removesuffix(".0").replace("-", "−") + "%"


def percent_range(low: float, high: float) -> str:
    return f"{100 * low:.0f}–{100 * high:.0f}%"


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shortened(text: str, longest: int = LONGEST) -> str:
    text = text.strip()
    return text if len(text) <= longest else text[:longest].rstrip() + " …"


def asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt; of several messages, who said each."""
    if len(messages) == 1:
        return shortened(messages[0]["content"])
    return shortened("\n".join(f"{message['role']}: {message['content']}" for message in messages))
