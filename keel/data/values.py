"""A value as a file's reader gives it -> what JSON and every database hold.

Parquet and ``datasets`` have types that JSON lacks, and Python's JSON reads more than other readers do. What has one
plain form gets it: dates become ISO text, decimals and durations numbers, numpy's values Python's, and NaN (pandas'
missing number) null. The rest is refused when the file is read, and not by a store after everything was sampled.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from keel.data.rows import RowError, shown

LARGEST = int(sys.float_info.max)  # about 1.8e308
DEEPEST = 100  # lists and objects inside one another


def plain(value: Any, field: str) -> Any:
    """``value`` of texts, finite numbers, truth values, null, lists and objects alone. RowError with the place inside
    ``field`` where something has no such form."""
    try:
        return _plain(value, 0)
    except _NotPlainError as error:
        raise RowError(f"field '{field}{error.place}': {error}") from None


class _NotPlainError(Exception):
    """What is wrong; ``place`` grows while the error climbs out of lists and objects (".a[0]")."""

    place = ""


def _plain(value: Any, depth: int) -> Any:
    how = _FORMS.get(type(value)) or _other_form(value)
    return how(value, depth)


def _same(value: Any, depth: int) -> Any:
    return value


def _text(value: str, depth: int) -> str:
    if value.isascii():
        at = value.find("\0")
    else:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write half a character; no tokenizer and no file can hold it
            raise _NotPlainError(f"character {error.start + 1} is half a character (lone surrogate)") from None
        at = value.find("\0")
    if at >= 0:
        raise _NotPlainError(f"character {at + 1} is NUL, which databases refuse; take it out")
    return str(value)


def _whole(value: int, depth: int) -> int:
    if not -LARGEST <= value <= LARGEST:
        raise _NotPlainError("expected a number that a float holds, up to about 1.8e308")
    return int(value)


def _real(value: float, depth: int) -> float | None:
    if math.isinf(value):
        raise _NotPlainError("expected a finite number, got infinity")
    return None if math.isnan(value) else float(value)


def _decimal(value: Decimal, depth: int) -> float | int | None:
    if value.is_nan():
        return None
    if not -LARGEST <= value <= LARGEST:
        return _whole(LARGEST + 1, depth)
    return int(value) if value == value.to_integral_value() else float(value)


def _iso(value: date | time, depth: int) -> str | None:
    return value.isoformat() if value == value else None


def _seconds(value: timedelta, depth: int) -> float | None:
    return value.total_seconds() if value == value else None


def _list(value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
    _not_too_deep(depth)
    found = []
    for i, item in enumerate(value):
        try:
            found.append(_plain(item, depth + 1))
        except _NotPlainError as error:
            error.place = f"[{i}]{error.place}"
            raise
    return found


def _object(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    _not_too_deep(depth)
    found = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise _NotPlainError(f"expected names that are texts, got {shown(key)}")
        name = _text(key, depth)
        try:
            how = _FORMS.get(type(item)) or _other_form(item)
            found[name] = how(item, depth + 1)
        except _NotPlainError as error:
            error.place = f".{key}{error.place}"
            raise
    return found


def _not_too_deep(depth: int) -> None:
    if depth >= DEEPEST:
        raise _NotPlainError(f"expected at most {DEEPEST} lists and objects inside one another")


def _array(value: Any, depth: int) -> Any:
    """numpy's scalars and arrays, and torch's."""
    if getattr(value.dtype, "kind", "") in "mM":  # as numbers, dates would be nanoseconds
        value = value.astype(str)
    return _plain(value.tolist(), depth + 1)


def _bytes(value: Any, depth: int) -> Any:
    raise _NotPlainError("expected a text, got bytes, such as a picture's; leave the column out")


def _refused(value: Any, depth: int) -> Any:
    raise _NotPlainError(f"expected a text, a number, a list or an object, got {shown(value)}; leave the column out")


_FORMS: dict[type, Callable[[Any, int], Any]] = {
    str: _text,
    type(None): _same,
    bool: _same,  # before int, whose subclass it is
    int: _whole,
    float: _real,
    list: _list,
    tuple: _list,
    dict: _object,
    date: _iso,  # datetime is a subclass
    time: _iso,
    timedelta: _seconds,
    Decimal: _decimal,
    UUID: lambda value, depth: str(value),
    bytes: _bytes,
    bytearray: _bytes,
}


def _other_form(value: Any) -> Callable[[Any, int], Any]:
    """For subclasses, and for what other libraries have instead."""
    known = next((how for kind, how in _FORMS.items() if isinstance(value, kind)), None)
    if known is not None:
        return known
    return _array if hasattr(value, "tolist") and hasattr(value, "dtype") else _refused
