"""Answers held against known ones: by a table made by hand, by what peers got wrong in public, and by hostile text."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from keel.reward.math_verify import formulas
from keel.reward.values import value_of
from keel.reward.verify import judge_reply, read_answer, same

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"

# (the known answer, a reply, the verdict)
TABLE = [
    # integers, signs
    ("18", "She sells 9 eggs at $2, so she makes 18.\n#### 18", RIGHT),
    ("18", "#### 17", WRONG),
    ("18", "I do not know.", UNREADABLE),
    ("18", "", UNREADABLE),
    ("-5", "The answer is -5.", RIGHT),
    ("-5", "The answer is −5", RIGHT),
    ("-5", "The answer is – 5.", RIGHT),
    ("-5", "#### 5", WRONG),
    ("5", "x = 5", RIGHT),
    ("5", "+5", RIGHT),
    ("7", "There are 10-3 left, that is 7", RIGHT),
    # thousands separators
    ("70000", "#### 70,000", RIGHT),
    ("70,000", "#### 70000", RIGHT),
    ("1234567", "the answer is 1 234 567", RIGHT),
    ("1234567", "\\boxed{1{,}234{,}567}", RIGHT),
    ("10080", "\\boxed{10,\\!080}", RIGHT),
    ("1234", "#### 1,234.", RIGHT),
    ("1234", "#### 12,34", UNREADABLE),
    ("1234567", "#### 1.234.567", UNREADABLE),
    ("3.5", "#### 3,5", UNREADABLE),
    # decimals, zeros and dots at the end
    ("29", "the total cost is $29.00.", RIGHT),
    ("0.5", ".5", RIGHT),
    ("0.1", "0.10", RIGHT),
    ("0.3", "0.30000000000000004", WRONG),
    ("5", "5.", RIGHT),
    ("5", "#### 5.0000", RIGHT),
    ("1.5", "The answer is 1.5. That is all.", RIGHT),
    ("0.1", "\\boxed{\\frac{1}{10}}", RIGHT),
    ("0.3333", "1/3", WRONG),
    # per cent
    ("50", "50%", RIGHT),
    ("0.5", "50%", RIGHT),
    ("50%", "0.5", RIGHT),
    ("50%", "50 percent", RIGHT),
    ("50%", "50\\%", RIGHT),
    ("50", "0.5%", WRONG),
    ("50%", "5%", WRONG),
    # money
    ("18", "$18", RIGHT),
    ("18", "18 dollars", RIGHT),
    ("$18", "18 dollars", RIGHT),
    ("$18", "€18", UNREADABLE),
    ("$1,250.50", "\\$1250.5", RIGHT),
    ("18", "$\\boxed{18}$", RIGHT),
    ("-3", "-$3", RIGHT),
    ("2000000", "$2 million", RIGHT),
    # units behind the number
    ("5", "5 apples", RIGHT),
    ("5 km", "5", RIGHT),
    ("5 km", "5 km", RIGHT),
    ("5 km", "6 km", WRONG),
    ("5 km", "5 miles", UNREADABLE),
    ("5", "5 dozen", UNREADABLE),
    ("5", "5k", UNREADABLE),
    ("12", "\\boxed{12\\text{ cm}^2}", RIGHT),
    ("12", "12 square meters", RIGHT),
    ("90", "90^\\circ", RIGHT),
    ("60", "The answer is 60 km/h.", RIGHT),
    ("5", "5 or 6", UNREADABLE),
    ("5", "#### 5 and 6", WRONG),
    # fractions
    ("3/4", "0.75", RIGHT),
    ("3/4", "6/8", RIGHT),
    ("3/4", "\\boxed{\\dfrac{3}{4}}", RIGHT),
    ("3/4", "\\boxed{\\frac34}", RIGHT),
    ("3/4", "\\boxed{\\frac{3}{5}}", WRONG),
    ("1/2", "\\boxed{\\frac{1}{3}}", WRONG),
    ("-3/4", "-\\frac{3}{4}", RIGHT),
    ("1.5", "1 1/2", RIGHT),
    ("1.5", "1\\frac{1}{2}", RIGHT),
    ("1.5", "1½", RIGHT),
    ("-1.5", "-1 1/2", RIGHT),
    ("11/2", "1½", WRONG),
    ("1", "1/0", UNREADABLE),
    ("2.5", "1 3/2", UNREADABLE),
    ("3:4", "3:4", RIGHT),
    ("3:4", "6:8", UNREADABLE),
    # powers of ten
    ("1500", "1.5e3", RIGHT),
    ("1500", "1.5 × 10^3", RIGHT),
    ("1500", "1.5 \\times 10^{3}", RIGHT),
    ("0.00015", "1.5 x 10⁻⁴", RIGHT),
    ("100000", "10^5", RIGHT),
    ("25", "5²", UNREADABLE),
    ("52", "5²", UNREADABLE),
    # digits of other scripts
    ("18", "#### １８", RIGHT),
    ("-3.5", "－３．５", RIGHT),
    ("18", "#### ١٨", RIGHT),
    # lists, tuples, sets
    ("1, 2, 3", "1,2,3", RIGHT),
    ("1, 2, 3", "1, 2 and 3", RIGHT),
    ("1, 2, 3", "1, 2, 4", WRONG),
    ("1, 2, 3", "3, 2, 1", UNREADABLE),
    ("1, 2, 3", "1, 2", WRONG),
    ("{1, 2, 3}", "{3, 1, 2}", RIGHT),
    ("{1, 2, 3}", "3, 1, 2", RIGHT),
    ("{1, 2, 3}", "\\{1, 2, 4\\}", WRONG),
    ("(1, 2)", "(1.0, 4/2)", RIGHT),
    ("(1, 2)", "(2, 1)", WRONG),
    ("(1, 2)", "[1, 2]", WRONG),
    ("(1, 2)", "\\left(1, 2\\right)", RIGHT),
    ("[1, 2, 3]", "(1, 2, 3)", RIGHT),
    ("-2, 1", "\\boxed{-2,1}", RIGHT),
    ("(3, 5)", "3,5", RIGHT),
    ("1,000, 2,000", "1000, 2000", RIGHT),
    ("5", "(5, 6)", WRONG),
    # choices
    ("B", "The answer is (B).", RIGHT),
    ("B", "The correct answer is B: forty-two", RIGHT),
    ("B", "B) 42 apples", RIGHT),
    ("B", "\\boxed{\\text{B}}", RIGHT),
    ("B", "\\boxed{C} no, wait: \\boxed{B: a score}", RIGHT),
    ("B", "**Answer:** **B**", RIGHT),
    ("(B)", "b", RIGHT),
    ("B", "Option C", WRONG),
    ("B", "B or C", UNREADABLE),
    # yes and no, words
    ("yes", "The answer is Yes.", RIGHT),
    ("yes", "...so it holds.\nYes", RIGHT),
    ("no", "The answer is yes", WRONG),
    ("True", "yes", RIGHT),
    ("Paris", "The answer is **Paris**.", RIGHT),
    ("Paris", "The answer is the paris", RIGHT),
    ("Paris", "The answer is London.", WRONG),
    ("2", "two", RIGHT),
    ("12", "There were 9. 9 + 3 = 12\nAnswer: 12.", RIGHT),
    ("yes", "9 + 3 = 12\n12 is not 13.\nAnswer: no.", WRONG),
    ("yes", "Maybe 3", UNREADABLE),
    ("A", "(A) or (B)", UNREADABLE),
    ("A", "A and B", WRONG),
    ("no", "No, wait, yes", WRONG),
    ("yes", "Yes, they are.", RIGHT),
    # what says something else with the same number
    ("5", "The answer is not 5.", UNREADABLE),
    ("5", "The answer is less than 5.", UNREADABLE),
    ("5", "\\boxed{5!}", UNREADABLE),
    ("5", "The answer is 5!", RIGHT),
    ("2", "2 of 3", WRONG),
    ("2", "so $\\sqrt{2}$", UNREADABLE),
    ("2", "x^2", UNREADABLE),
    ("-7", "it is 10 - 7", WRONG),
    ("1000", "1,000,00", UNREADABLE),
    ("1234.5", "1.234,5", UNREADABLE),
    ("2024", "2024-01-02", UNREADABLE),
    ("5", "(5)", RIGHT),
    ("5", "\\boxed{{5}}", RIGHT),
    ("100", "100€", RIGHT),
    # where the answer stands
    ("18", "<answer>18</answer>", RIGHT),
    ("18", "<answer>\nIt is 18 eggs\n</answer>", RIGHT),
    ("3, 4", "The answers are 3 and 4.", RIGHT),
    ("18", "#### 5\nNo.\n#### 18", RIGHT),
    ("3", "\\boxed{2} was wrong. \\boxed{3}", RIGHT),
    ("3", "\\boxed{2}. The answer is 3.", RIGHT),
    ("3", "The answer is 2. Check: \\boxed{3}", RIGHT),
    ("8", "The answer is 3 + 5 = 8.", RIGHT),
    ("8", "The answer is 3 + 5.", UNREADABLE),
    ("3", "So x = \\boxed{3", UNREADABLE),
    ("3", "\\fbox{3}", RIGHT),
    ("3", "The final answer is: $\\boxed{3}$. I hope it is correct.", RIGHT),
    ("\\frac{1}{2}", "\\boxed{\\dfrac{1}{2}}", RIGHT),
    ("x+1", "\\boxed{x+1}", RIGHT),
    ("x+1", "\\boxed{1+x}", UNREADABLE),
]


@pytest.mark.parametrize(("known", "reply", "verdict"), TABLE)
def test_the_table(known: str, reply: str, verdict: str) -> None:
    assert judge_reply(known, reply) == verdict


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 80
    assert {verdict for *_, verdict in TABLE} == {RIGHT, WRONG, UNREADABLE}


# Answers with the right number in them that say another one, or none; and the same right ones written alike.
ALIKE = [
    ("53", "#### 5*3", UNREADABLE),  # no emphasis: an operator
    ("53", "\\boxed{5**3}", UNREADABLE),
    ("100200", "#### 100 * 200", UNREADABLE),
    ("1012", "\\boxed{101_2}", UNREADABLE),
    ("101_2", "\\boxed{101_2}", RIGHT),
    ("1234567", "1_234_567", RIGHT),
    ("5", "**5** apples", RIGHT),
    ("5", "The answer is _5_.", RIGHT),
    ("5", "The answer is negative 5.", WRONG),
    ("-5", "The answer is minus 5.", RIGHT),
    ("-5", "So in the end it is negative 5", RIGHT),
    ("7", "it is 10 minus 7", RIGHT),  # the last number, as of 10 - 7
    ("5", "The answer is half of 5.", UNREADABLE),
    ("5", "The answer is the square root of 5.", UNREADABLE),
    ("5", "The answer is at least 5.", UNREADABLE),
    ("5", "The answer is 5 squared.", UNREADABLE),
    ("5", "The answer is 5 minus two.", UNREADABLE),
    ("5", "so x < 5", UNREADABLE),
    ("5", "so x \\ge 5", UNREADABLE),
    ("500", "#### 5 hundred thousand", UNREADABLE),
    ("5", "#### 5 thousands", UNREADABLE),
    ("5", "they pay 5 lakh", UNREADABLE),
    ("5", "\\boxed{5 pi}", UNREADABLE),
    ("5", "#### 5 choose two", UNREADABLE),
    ("5", "#### 5 thirds", UNREADABLE),
    ("18", "#### 18 plus twelve", UNREADABLE),
    ("18", "#### 18 is wrong", UNREADABLE),
    ("5", "#### 5 more than six", UNREADABLE),
    ("5.5", "#### 5 and a half", RIGHT),
    ("5", "#### 5 times", RIGHT),
    ("12", "#### 12 quarters", RIGHT),
    # letters on a number are variables, where they are no unit's
    ("5", "\\boxed{5y}", UNREADABLE),
    ("2", "\\boxed{2xy}", UNREADABLE),
    ("10n", "\\boxed{10}", UNREADABLE),
    ("10n", "\\boxed{10n}", RIGHT),
    ("5", "5km/h", RIGHT),
    ("5", "5m", RIGHT),
    ("5", "5apples", RIGHT),
    ("5", "20 / 4 = 5 apples a day", RIGHT),
    # commas with blanks part a list
    ("100, 200", "(100, 200)", RIGHT),
    ("100, 200", "100 and 200", RIGHT),
    ("10, 120", "\\boxed{10,120}", UNREADABLE),
    ("10120", "\\boxed{10, 120}", WRONG),
    ("no", "No, they are not.", RIGHT),
    ("yes", "Yes, not.", WRONG),
    ("8", "The answer is half of 16, which is 8", UNREADABLE),
]


@pytest.mark.parametrize(("known", "reply", "verdict"), ALIKE)
def test_what_is_written_alike_is_told_apart(known: str, reply: str, verdict: str) -> None:
    assert judge_reply(known, reply) == verdict


# What others' verifiers made of these, as their users reported: right answers that scored 0, wrong ones that scored 1.
PEERS = [
    ("72", "The answer is 72, in total, so the farmer earns that much.", RIGHT),  # HELM 4337: a comma as the number
    ("72", "The total is 72 clips, altogether.", RIGHT),  # omlx 3484
    ("29", "...the total cost of Rory's delivery order is $29.00.", RIGHT),  # lm-evaluation-harness 3214
    ("70000", "Josh's profit is $200,000 - $130,000 = $70,000", RIGHT),  # OpenCompass 2426
    ("1/2", "\\boxed{\\frac{1}{3}}", WRONG),  # ms-swift 10147: cut at the first closing brace
    ("1/23", "\\boxed{\\frac{12}{3}}", WRONG),  # the same, braces taken out
    ("3", "\\boxed{2} ... \\boxed{3}", RIGHT),  # lmms-eval 1512: the first of two boxes
    ("42", "\\fbox{42}", RIGHT),  # OpenRLHF 1285
    ("E", "\\boxed{\\text{E}}", RIGHT),  # NeMo Gym 1844
    ("E", "\\boxed{E: A polygenic risk score}", RIGHT),  # the same
    ("13", "Answer: `$13$`", RIGHT),  # EasyR1 382
    ("13", "Answer: $13$", RIGHT),
    ("5", "Question: how many? #### 4\n\nIn short, #### 5", RIGHT),  # lm-evaluation-harness 3438: the first of two
]


@pytest.mark.parametrize(("known", "reply", "verdict"), PEERS)
def test_what_peers_got_wrong(known: str, reply: str, verdict: str) -> None:
    assert judge_reply(known, reply) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "10^10^10",
        "1e999999",
        "1e-999999999",
        "9^{9^{9^{9}}}",
        "1" * 5000,
        "1e" + "9" * 4000,
        "\\frac{1}{" * 300,
        "{" * 900,
        "(" * 400 + ")" * 400,
        "1," * 490,
        "1, " * 300,
        "#" * 1_000_000,
        "\\boxed{" * 150_000,
        "the answer is " * 70_000,
        "answer to " + "a " * 400_000,
        "-" * 1_000_000,
        "1 " * 500_000,
        "1,111" * 200_000,
        " " * 1_000_000 + "x",
        "$" * 10_000,
        "*" * 900 + "1",
        "a b " * 240,
        "1 " + "m/" * 450,
        "½" * 900,
        "x=" * 400,
        "\x00\ud800",
    ],
)
def test_hostile_text_is_read_quickly(answer: str) -> None:
    begin = time.process_time()
    for text in (answer, f"\\boxed{{{answer}}}", f"#### {answer}", f"The answer is {answer}."):
        assert judge_reply("18", text) in ("wrong", "unreadable")
        read_answer(text, "last_number")
    value_of(answer)
    assert time.process_time() - begin < 1.0


def test_a_number_of_400_digits_is_a_number() -> None:
    long = "7" * 400
    assert judge_reply(long, f"#### {long}") == "right"
    assert judge_reply(long, f"#### {long[:-1]}8") == "wrong"
    assert judge_reply(f"{long}.10", f"#### {long}.1") == "right"


def test_ten_thousand_checks_in_a_second() -> None:
    replies = [f"First 3 and 4 make {i}.\nThe total is {i}.\n#### {i:,}" for i in range(10_000)]
    begin = time.process_time()
    assert all(judge_reply(str(i), reply) == "right" for i, reply in enumerate(replies))
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("1 and 2", "last_number", "2"),
        ("#### 3\nand 4", "last_number", "4"),
        ("#### 3\nand 4", "marked", "3"),
        ("\\boxed{5} and #### 3", "boxed", "5"),
        ("5 and 6", "marked", None),
        ("5 and 6", "boxed", None),
        ("five", "last_number", None),
        ("it is 5-7", "last_number", "7"),
        ("it is -7", "last_number", "-7"),
    ],
)
def test_where_the_answer_is_read(text: str, read: str, answer: str | None) -> None:
    assert read_answer(text, read) == answer  # type: ignore[arg-type]


def test_an_answer_where_the_reply_was_cut_may_have_gone_on() -> None:
    assert judge_reply("1", "#### 1") == "right"
    assert judge_reply("1", "#### 1", finished=False) == "unreadable"
    assert judge_reply("1", "it is 1", finished=False) == "unreadable"
    assert judge_reply("1", "it is 1.", finished=False) == "unreadable"
    assert judge_reply("1", "\\boxed{1}", finished=False) == "right"
    assert judge_reply("1", "#### 1\nNow", finished=False) == "right"


def test_answers_are_the_same_by_value() -> None:
    assert same("1/2", "0.50")
    assert same("{1, 2}", "{2,1}")
    assert not same("1/2", "0.51")
    assert not same("", "")
    assert value_of("1e-2") is not None
    assert value_of("1e-2").number == Fraction(1, 100)  # type: ignore[union-attr]


def test_a_number_is_the_same_however_it_is_written() -> None:
    """Each of 80 fractions in every way of writing it; next to each, one that is written alike and another."""
    rng = random.Random(0)
    for _ in range(80):
        number = Fraction(rng.randrange(-(10**7), 10**7), 10 ** rng.randrange(4))
        others = (number + Fraction(1, 1000), -number if number else Fraction(1), number * 10 or Fraction(1))
        for other in (number, *others):
            verdict = RIGHT if other == number else WRONG
            for written in ways(other):
                for reply in (
                    f"#### {written}",
                    f"so \\boxed{{{written}}}",
                    f"The answer is {written}.",
                    f"2 + 2. {written}",
                ):
                    assert judge_reply(str(number), reply) == verdict, (str(number), reply)


def ways(number: Fraction) -> list[str]:
    sign, size = ("-" if number < 0 else ""), abs(number)
    decimal = f"{size.numerator * 10**4 // size.denominator / 10**4:.4f}"
    whole, part = divmod(size, 1)
    found = [
        f"{sign}{decimal}",
        f"−{decimal}" if sign else decimal,
        f"{sign}{float(decimal):,.4f}",
        f"{sign}${float(decimal):,.4f}",
        f"{sign}{size.numerator}/{size.denominator}",
        f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}",
    ]
    return [*found, f"{sign}{whole} {part.numerator}/{part.denominator}"] if part and whole else found


@pytest.mark.parametrize(
    ("known", "given"),
    [("5 km", "5 miles"), ("5", "> 5"), ("5", "\\approx 5"), ("x \\le 5", "5x"), ("5", "5}{6"), ("1, 2, 3", "3, 2, 1"),
     ("x+1", "x+1 or x+2"), ("5", "less than 5"), ("3.5", "3,5"), ("no", "on"), ("3:4", "6:8"), ("5", "\\text{not }x")],
)  # fmt: skip
def test_what_is_no_formula_is_computed_by_nobody(known: str, given: str) -> None:
    assert not formulas(known, given)


@pytest.mark.parametrize(
    ("known", "given"),
    [("x+1", "1+x"), ("5", "\\sqrt{25}"), ("2\\pi", "2π"), ("x \\le 5", "x ≤ 5"), ("120", "5!"), ("5", "9^{9^{9}}"),
     ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}"),
     ("\\sin(\\pi/3)", "\\frac{\\sqrt{3}}{2}")],
)  # fmt: skip
def test_formulas_are_known_by_their_signs(known: str, given: str) -> None:
    assert formulas(known, given)
