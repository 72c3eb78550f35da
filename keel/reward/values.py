"""What an answer says, as a value that can be compared exactly. Numbers are fractions, never floats.

A text that could mean two things means nothing here (None), and so does one whose value nobody could hold
(``1e999999``). All patterns run over at most ``LONGEST`` characters and none nests repetitions.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

LONGEST = 1000  # characters of an answer
_EXPONENT = 1000  # decimal places of a number written with an exponent

_SIGNS = dict.fromkeys("−–‒﹣－", "-") | {"＋": "+", "﹢": "+"}
_SPACES = dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ")
_SLASHES = {"⁄": "/", "∕": "/", "／": "/", "×": "x", "％": "%", "，": ",", "、": ",", "．": ".", "。": "."}
_SHUT = {"\u200b": None, "\u200c": None, "\u200d": None, "\u2060": None, "\ufeff": None}
_PLAIN = str.maketrans(_SIGNS | _SPACES | _SLASHES | _SHUT)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")

_LATEX = [
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),  # what moves signs together
    (re.compile(r"\\[,;: ]|\\q?quad\b|~"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|limits)\b(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac\b|\\frac\b(?=[^a-zA-Z])|\\[dtc]frac(?=\d)"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)\b"), "x"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:degree|circ)\b|°"), " degrees"),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|textrm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[()\[\]]"), " "),
]
_THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?: \d{3})+(?![\d ]*\d)|(?<!\d)\d{1,3}(?:[_']\d{3})+(?!\d)")
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"([+-]?)\s*({_DECIMAL})(?:[eE]([+-]?\d{{1,9}})|\s*[x*]\s*10\s*\^\s*\{{?\s*([+-]?\s*\d{{1,9}})\s*\}}?)?"
)
_POWER = re.compile(r"([+-]?)10\s*\^\s*\{?\s*([+-]?\d{1,9})\s*\}?")
_FRACTION = re.compile(r"([+-]?)\s*(?:(\d+)\s+)?\(?\s*(-?\d+)\s*\)?\s*/\s*\(?\s*(-?\d+)\s*\)?")
_FRAC = re.compile(r"([+-]?)\s*(\d+)?\s*\\frac\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))\s*(?:\{\s*([+-]?\d+)\s*\}|(\d))")
_LETTERS = "a-zA-Zµμ²³°€£¥₹$"
_UNIT = re.compile(rf"[{_LETTERS}%][{_LETTERS}.]*(?:[ /*·-]+[{_LETTERS}]+|\s*\^\s*\{{?[+-]?[1-3]\}}?)*")
_END = re.compile(r"(?:\s*(?:(?<![\d)])!|[.?;:,]))+$")  # an exclamation mark behind a number is a factorial
_MARKUP = re.compile(r"[*_`$]+")
_NEGATIVE = re.compile(r"^(?:negative|minus)\s+(?=[\d.])", re.IGNORECASE)

_CURRENCIES = {
    "$": "dollar", "us$": "dollar", "usd": "dollar", "dollars": "dollar", "dollar": "dollar", "bucks": "dollar",
    "€": "euro", "eur": "euro", "euros": "euro", "euro": "euro", "£": "pound", "gbp": "pound",
    "¥": "yen", "yen": "yen", "jpy": "yen", "₹": "rupee", "inr": "rupee", "rupees": "rupee", "rupee": "rupee",
}  # fmt: skip
_SYMBOLS = re.compile(r"^([+-]?)\s*(us\$|\$|€|£|¥|₹|usd|eur|gbp)\s*(?=[+-]?[\d.\\])", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_WORDS = {word: Fraction(i) for i, word in enumerate(_SMALL)}


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What stands behind a number and is no unit: it changes the number, takes it back, or names another.
CHANGES = words_of(
    "plus minus over divided squared cubed factorial choose mod modulo pi sqrt root log ln exp sin cos tan half halves "
    "third thirds fourths fifths sixths eighths tenth tenths hundredth hundredths thousandth thousandths dozen dozens "
    "score gross lakh lakhs crore crores bn mn tn mil mio mln grand"
) | (_SCALES.keys() | {f"{scale}s" for scale in _SCALES})
_NO_UNIT = words_of(
    "and or nor to by than inf infinity not no never wrong incorrect false maybe perhaps but except without unknown "
    "thirty forty fifty sixty seventy eighty ninety"
) | (CHANGES | (_WORDS.keys() - {"one"}))
# Of one letter these alone are units; right behind a digit, these alone of two or three. Other letters are variables.
_LETTER_UNITS = frozenset("gmshlLNJWVACF°€£¥₹$%")
_SHORT_UNITS = _LETTER_UNITS | words_of(
    "mm cm dm km nm µm μm um in ft yd mi mg kg lb lbs oz ms min hr hrs ml mL cl dl kJ kW kWh Hz kHz MHz GHz Pa kPa mol "
    "cal mph kph bps KB MB GB TB am pm AM PM rpm usd USD eur EUR gbp GBP jpy JPY inr INR ct cts pt pts pcs deg rad "
    "st nd rd th m² m³ cm² cm³ km² mm² °C °F"
)
_VULGAR = {c: unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_SPOKEN = re.compile(
    r"(?:(yes|true)(?=$|[,.;:!](?!.*\bnot\b))|(no|false))(?:$|[,.;:!](?!.*\b(?:yes|no|true|false)\b)[^\d]*$)",
    re.IGNORECASE,
)
_ANOTHER = re.compile(r"\b(?:or|and)\s+\(?[a-j]\b|\([a-j]\)", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?(?:\(([A-Ja-j])\)|\[([A-Ja-j])\]|([A-Ja-j]))(?:$|[.):](?:\s.*)?$|(?<=[)\]])\s.*$)",
    re.DOTALL | re.IGNORECASE,
)

Verdict = Literal["right", "wrong", "unreadable"]
Kind = Literal["number", "items", "set", "truth", "choice", "words", "other"]


@dataclass(frozen=True, slots=True)
class Value:
    """``number``: with its unit ("" where it has none, "%" for per cent). ``items``: of a list, and how it is closed
    off ("" for a bare list). ``text``: what was written, made plain; of ``other`` nothing more is known than that."""

    kind: Kind
    text: str
    number: Fraction = Fraction(0)
    unit: str = ""
    items: tuple[Value, ...] = ()
    closed: str = ""
    unsure: bool = False  # a list that may be a number with a decimal comma


def plain_digits(text: str) -> str:
    """Digits, signs and spaces of any script as ASCII has them; ``5²`` is ``5^2``, ``1½`` is ``1 1/2``."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^" + found[0].translate(_RAISED), text)
    text = "".join(f" {_VULGAR[c]}" if c in _VULGAR else c for c in text).translate(_PLAIN)
    return "".join(_plain_character(c) for c in text)


def _plain_character(c: str) -> str:
    if c.isascii():
        return c
    digit = unicodedata.decimal(c, None)
    if digit is not None:
        return str(digit)
    wide = unicodedata.normalize("NFKC", c)
    return wide if wide.isascii() and "\uff00" <= c <= "\uffef" else c


def value_of(text: str) -> Value | None:
    """The value of an answer; None where it is empty, too long, or more than anybody could hold."""
    if len(text) > LONGEST:
        return None
    if text.isascii() and text.isdigit():
        return Value("number", text, Fraction(int(text)))
    written = _plain(text)
    if not written or not any(c.isalnum() for c in written):
        return None
    return _value(written, depth=0)


def _plain(text: str) -> str:
    text = plain_digits(text)
    for pattern, put in _LATEX:
        if "\\" in text or "~" in text or "°" in text or "{" in text:
            text = pattern.sub(put, text)
    text = text.strip()
    currency = _SYMBOLS.match(text.strip("*_` "))
    if currency is None:  # a dollar sign before a number is money, around it mathematics
        text = _unmarked(text)
    elif text.count("$") == 2 and text.strip("*_` ").endswith("$"):
        text = text.replace("$", "")
    else:
        text = _unmarked(text, but="$")
    text = re.sub(r"\s+", " ", text).strip().strip("\"'“”‘’")
    text = re.sub(r"(?<=\d) and (?:a|one) half\b", " 1/2", text)
    return _END.sub("", text).strip()


def _unmarked(text: str, but: str = "") -> str:
    """Without marks of emphasis and of mathematics. Between two numbers they are operators (``5*3``, ``101_2``)."""

    def put(found: re.Match[str]) -> str:
        before, behind = text[: found.start()].rstrip()[-1:], text[found.end() :].lstrip()[:1]
        return found[0] if before.isdigit() and behind.isdigit() else "".join(c for c in found[0] if c in but)

    return _MARKUP.sub(put, text)


def _value(text: str, depth: int) -> Value | None:
    unnamed = re.sub(r"^[a-zA-Z]\w{0,2}\s*(?:=|\\in\b)\s*", "", text) or text
    unnamed = _NEGATIVE.sub("-", unnamed)
    number = _quantity(unnamed)
    if number is not None:
        return number
    if spoken := _SPOKEN.match(text):
        return Value("truth", _TRUTH[(spoken[1] or spoken[2]).casefold()])
    if unnamed[0] + unnamed[-1] in ("()", "{}") and "," not in text and ";" not in text and _whole(unnamed):
        inner = unnamed[1:-1].strip()
        return _value(inner, depth + 1) if inner and depth < 3 else None
    items = _items(unnamed, depth)
    if items is not None:
        return items
    said = text.casefold()
    if said in _WORDS:
        return Value("number", said, _WORDS[said])
    choice = _CHOICE.fullmatch(text)
    if choice and (choice[1] or choice[2] or choice[3]).isascii():
        letter = choice[1] or choice[2] or choice[3]
        more = _ANOTHER.search(text[choice.end(choice.lastindex or 0) + 1 :])
        return None if more else Value("choice", letter.upper())
    words = re.sub(r"^(?:the|a|an)\s+", "", said)
    sure = all(c.isalpha() or c in " -'’,.&" for c in words)
    return Value("words" if sure else "other", words)


# ---------------------------------------------------------------------------------------------------------- numbers


def number_of(text: str) -> Fraction | None:
    """A number without a unit: an integer, a decimal, a fraction, mixed, with an exponent."""
    text = _THOUSANDS.sub(lambda found: found[1] + re.sub(r"[,\s]", "", found[2]), text.strip())
    if found := _FRAC.fullmatch(text):
        above, below = found[3] or found[4], found[5] or found[6]
        return _mixed(found[1], found[2], above, below)
    if found := _FRACTION.fullmatch(text):
        return _mixed(found[1], found[2], found[3], found[4])
    text = _GROUPED.sub(lambda found: re.sub("[ _']", "", found[0]), text)
    if found := _POWER.fullmatch(text):
        return _scaled(found[1], "1", found[2])
    if found := _NUMBER.fullmatch(text):
        return _scaled(found[1], found[2], (found[3] or found[4] or "0").replace(" ", ""))
    return None


def _mixed(sign: str, whole: str | None, above: str, below: str) -> Fraction | None:
    if int(below) == 0:
        return None
    part = Fraction(int(above), int(below))
    if whole is not None and not 0 <= part < 1:  # 1 3/2 is no number that anybody writes
        return None
    return (-1 if sign == "-" else 1) * (int(whole or 0) + part)


def _scaled(sign: str, digits: str, exponent: str) -> Fraction | None:
    places = int(exponent)
    if abs(places) > _EXPONENT:
        return None
    number = Fraction(int(digits)) if digits.isdigit() else Fraction(digits.rstrip("."))
    if places:
        number *= Fraction(10) ** places
    return -number if sign == "-" else number


def _quantity(text: str) -> Value | None:
    """A number with what stands before it (currency) and behind it (per cent, a scale, a unit)."""
    number = number_of(text)
    if number is not None:
        return Value("number", text, number)
    unit = ""
    if money := _SYMBOLS.match(text):
        unit, text = (
            _CURRENCIES[money[2].lower() if money[2].lower() in _CURRENCIES else "$"],
            money[1] + text[money.end() :],
        )
    head = re.match(r"[\d\s.,+\-/_'x*^{}()eE\\frac]*[\d})]\.?", text)
    if head is None:
        return None
    for end in _ends(text, head.end()):
        number = number_of(text[:end])
        if number is None:
            continue
        rest = text[end:].strip().lstrip("-").strip()
        return _with_unit(text, number, rest, unit, attached=text[end:].startswith(rest))
    return None


def _ends(text: str, end: int) -> list[int]:
    """Where the number may end, the longest first: few, since each is read whole."""
    places = [end]
    for _ in range(3):
        cut = re.search(r"\s*[^\d\s][^\d]*$|\s+[\d^{}]+$", text[: places[-1]])
        if cut is None or cut.start() == 0:
            break
        places.append(cut.start())
    return places


def _with_unit(text: str, number: Fraction, rest: str, unit: str, attached: bool) -> Value | None:
    scale = rest.split(" ", 1)
    if scale[0].lower() in _SCALES:
        number, rest = number * 10 ** _SCALES[scale[0].lower()], (scale[1] if len(scale) > 1 else "")
    if not rest:
        return Value("number", text, number, unit)
    if rest.lower() in ("%", "percent", "per cent", "percents"):
        return None if unit else Value("number", text, number, "%")
    if not _UNIT.fullmatch(rest) or not _names_unit(rest, attached):
        return None
    return Value("number", text, number, _same_unit(unit, rest))


def _names_unit(text: str, attached: bool) -> bool:
    """Whether words name a unit. ``attached``: nothing stands between the first one and the number's last digit."""
    if len(text.split()) > 4:
        return False
    words = re.findall(r"[^\W\d_]+[²³]?|[°€£¥₹$%][A-Z]?", text)
    if any(
        word.casefold() in _NO_UNIT or (len(word) == 1 and word not in _LETTER_UNITS | {"a", "A"}) for word in words
    ):
        return False
    first = words[0]
    return first in _SHORT_UNITS or len(first) > 3 or (not attached and len(first) > 1)


def _same_unit(unit: str, rest: str) -> str:
    plain = re.sub(r"[{}\s]+", " ", rest.casefold()).strip()
    plain = _CURRENCIES.get(plain, plain)
    if plain == unit or not unit:
        return plain.removesuffix("s") if len(plain) > 2 else plain
    return f"{unit} {plain}"


# ------------------------------------------------------------------------------------------------------------ lists

_CLOSED = {"(": ")", "[": "]", "{": "}", "⟨": "⟩"}


def _items(text: str, depth: int) -> Value | None:
    """A list, tuple, set or interval; None for what is none."""
    if depth > 3 or not ("," in text or ";" in text or " and " in text or text.startswith("{")):
        return None
    closed, inner = "", text
    if text[0] in "([{" and text[-1] in ")]}" and _whole(text):
        closed, inner = text[0] + text[-1], text[1:-1].strip()
    inner = re.sub(r"\s*,?\s+and\s+", ", ", inner) if not closed else inner
    parts = _parts(inner)
    if (len(parts) < 2 and closed != "{}") or not all(part for part in parts):
        return None
    values = [_value(part, depth + 1) for part in parts]
    if any(value is None for value in values) or (not closed and not _short(values)):
        return None
    unsure = not closed and re.fullmatch(r"[+-]?\d[\d.,]*", inner) is not None
    found = tuple(value for value in values if value is not None)
    return Value("set" if closed == "{}" else "items", text, items=found, closed=closed, unsure=unsure)


def _short(values: list[Value | None]) -> bool:
    """Whether the parts of a bare list look like things and not like a sentence."""
    return all(
        value is not None and (value.kind != "other" or len(value.text) < 20) and value.text.count(" ") < 3
        for value in values
    )


def _whole(text: str) -> bool:
    """Whether the first bracket is closed by the last (an interval's may differ)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _parts(text: str) -> list[str]:
    """Cut at commas (or semicolons, where it has any) outside brackets. A thousands separator is no comma of a list
    that has blanks behind its commas."""
    mark = ";" if ";" in text else ","
    spaced = mark == "," and re.search(r",\s", text) is not None
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        joined = spaced and text[max(i - 1, 0)].isdigit() and re.match(r"\d{3}(?!\d)", text[i + 1 : i + 5]) is not None
        if c == mark and depth == 0 and not joined:
            parts.append(text[begin:i].strip())
            begin = i + 1
    return [*parts, text[begin:].strip()]
