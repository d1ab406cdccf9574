"""Steps, boxes and sums: what is wrong with reasoning is seen, and what is right is left alone."""

import asyncio
from fractions import Fraction

import pytest

from tests.helpers.runs import print_seed
from train.synthesize.agreement import agree
from train.synthesize.reasoning import (
    before_answer,
    box_fault,
    false_equation,
    guided_fault,
    step_fault,
    steps_of,
)

QUESTION = "Anna has 12 apples and buys 5 more. How many apples does she have?"


def test_steps_are_numbered_or_paragraphs() -> None:
    assert steps_of("Well.\n1. one\n2) two\n**Step 3:** three\nmore") == ["one", "two", "** three\nmore"]
    # A list within a step, and a decimal number, begin no step.
    assert steps_of("1. one\n1. inner\n3.5 is a number\n2. two") == ["one\n1. inner\n3.5 is a number", "two"]
    assert steps_of("first\nline\n\nsecond\n\n\n") == ["first\nline", "second"]
    assert steps_of("## Step 1: a\n\n## Step 2: b") == ["a", "b"]


def test_forms_of_steps() -> None:
    good = "1. She has 12 + 5 = 17 after buying.\n2. So the count is 17.\n" + r"\boxed{17}"
    assert step_fault(good, QUESTION) is None
    assert step_fault("1. 12 + 5 = 17.\n2. " + r"The answer is \boxed{17}.", QUESTION) is None
    assert step_fault(good, QUESTION, least=3) == "too few steps"
    assert step_fault(f"1. {QUESTION}\n2. 12 + 5 = 17.", QUESTION) == "a step only restates"
    twice = "1. Adding the new ones gives 17.\n2. We see that.\n3. Adding the new ones gives 17."
    assert step_fault(twice, QUESTION) == "a step only restates"
    assert step_fault("1. Adding: 12 + 5 = 18.\n2. One fewer is 17.", QUESTION) == "a false equation"


def test_boxes() -> None:
    assert box_fault(r"so \boxed{\frac{1}{2}}.") is None
    assert box_fault("so 5") == box_fault(r"so \boxed{}") == box_fault(r"so \boxed{5") == "no final answer in a box"
    assert box_fault(r"\boxed{5} or \boxed{6}") == "more than one box"
    assert box_fault(r"\boxed{5} " + "and more " * 10) == "text after the final answer"


@pytest.mark.parametrize(
    "text",
    [
        "x - 3 = 5 + 2", "5% of 200 = 10", "7 / 2 = 3 remainder 1", "2^3 = 8", "half of 12 + 5 = 11", "3 + 4 = 7x",
        "10 mod 3 = 1", "1 + 2 + ... + 10 = 55", "5! = 120", "$5 + $3 = $8", "2x + 3 = 11", "(1+2)(3) = 9", "17 = 17",
        r"\sin 30 + 1 = 1.5", "1 + 1 = 10 in base 2", "a 3 + 4 = 8", "20% + 30% = 50%", "100 / 3 = 33.33",
        "2/3 = 0.667", "1,000 + 500 = 1,500", "-3 + 5 = 2", "3 - -2 = 5", "1 / 0 = 5", "x = 3 + 4 = 7", "3 + 4 = 7 + x",
        "12:30 + 1 = 13:30", "- 3 + 4 = 7", "17 / 5 = 3 with remainder 2", "f(2, 3) + 4 = 9", "5/8 = 62.5%",
        "Step 2 - 3 + 4 = 7", "100 / 3 = 33.3%", "3 * 10^2 = 300", "9 * $2 = $18", "7 / 2 = 3 (rounded down)",
    ],
)  # fmt: skip
def test_formulas_that_are_right_or_not_of_plain_numbers_pass(text: str) -> None:
    assert false_equation(text) is None


def test_random_equations_are_false_if_their_values_differ() -> None:
    rng = print_seed()
    for _ in range(300):
        a, b, c = (int(x) for x in rng.integers(1, 2000, 3))
        left, value = [
            (f"{a} + {b} - {c}", a + b - c),
            (f"{a} * ({b} - {c})", a * (b - c)),
            (rf"{a} \times {b} + {c:,}", a * b + c),
            (f"({a} + {b}) \u00f7 {c}", Fraction(a + b, c)),
            (f"{a} \u2212 {b} \u00d7 {c}", a - b * c),
        ][int(rng.integers(5))]
        value = Fraction(value)
        right = str(value) if rng.random() < 0.5 else f"{float(value):.3f}"
        wrong = str(value + 1) if rng.random() < 0.5 else f"{float(value) + 0.01:.3f}"
        before, after = [("", ""), ("So ", " apples"), ("1. Adding gives ", "."), ("$", "$"), ("It is: ", ", so")][
            int(rng.integers(5))
        ]
        assert false_equation(f"{before}{left} = {right}{after}") is None
        assert false_equation(f"{before}{left} = {wrong}{after}") is not None
        assert false_equation(f"{before}{left} = {wrong} = {right}{after}") is not None
    assert false_equation("So " + "1 + " * 20_000 + "1 = 5") is not None
    assert false_equation("So " + "1 + " * 20_000 + "x = 5") is None
    assert false_equation("So " + "(" * 20_000 + "1 = 5") is None


@pytest.mark.parametrize(
    "leak",
    [
        "This matches the answer.", "As the hint says, we add.", "The given answer is 17.", "We know the final answer.",
        "This is consistent with the solution.", "The answer was already given.", "Compare the reference solution.",
        "We were told the answer.", "\u63d0\u793a",
    ],
)  # fmt: skip
def test_a_hint_that_leaks_is_seen(leak: str) -> None:
    good = "1. The count is 12 + 5 = 17 in all.\n2. Nothing else is bought.\n" + r"The answer is \boxed{17}."
    assert guided_fault(good, QUESTION, "17") is None
    assert guided_fault(good.replace("\n2.", f" {leak}\n2."), QUESTION, "17") == "the hint leaks"


def test_steps_must_come_before_the_given_answer() -> None:
    end = "\n" + r"\boxed{17}"
    early = "the answer comes before the steps"
    assert guided_fault("1. There are 17 apples.\n2. Indeed 12 + 5 = 17." + end, QUESTION, "17") == early
    assert guided_fault("1. The answer is a sum.\n2. It is 12 + 5 = 17." + end, QUESTION, "17") == early
    assert guided_fault(r"\boxed{17}", QUESTION, "17") == early
    # To set the answer is not to derive it.
    assert guided_fault("1. Let the count be x = 17.\n2. Indeed 12 + 5 = 17." + end, QUESTION, "17") == early
    assert guided_fault("1. Well-known: x = 17.\n2. Indeed 12 + 5 = 17." + end, QUESTION, "17") == early
    assert guided_fault("1. Let x - 5 = 12.\n2. Hence x = 17." + end, QUESTION, "17") is None
    never = "1. We think about apples.\n2. Then about Anna." + end
    assert guided_fault(never, QUESTION, "17") == "the steps do not reach the answer"
    assert guided_fault("1. Apples.\n2. Sum.\nThis is $12 + 5 = " + r"\boxed{17}$", QUESTION, "17") is None
    # 117 and 1.17 are other numbers; 12 stands in the question, so that it may stand anywhere.
    text = "1. Not 117 and 1.17.\n2. But 12 + 5 = 17.\n3. The end." + end
    assert before_answer(text, QUESTION, "17") == "1. Not 117 and 1.17.\n2. But 12 + 5 ="
    assert before_answer(text.replace("12 + 5 = 17", "it is 17"), QUESTION, "17") == "1. Not 117 and 1.17."
    assert before_answer("1. She has 12.\n2. Less 0.\n" + r"\boxed{12}", QUESTION, "12") == "1. She has 12.\n2. Less 0."


def test_the_largest_group_is_what_samples_agree_on() -> None:
    asked = []

    async def equal(one: str, other: str) -> bool | None:
        asked.append((one, other))
        return None if "?" in one + other else Fraction(one) == Fraction(other)

    async def found(*answers: str | None) -> tuple[object, ...] | None:
        made = await agree(answers, equal)
        return made and (made.answer, made.votes, made.share, made.groups)

    assert asyncio.run(found("1/2", "0.5", "0.5", "3", None)) == ("0.5", 3, 0.6, (0, 0, 0, 1, None))
    assert asyncio.run(found("1", "2")) is None
    assert asyncio.run(found(None, None)) is None
    assert asyncio.run(found("?", "? ", "1", "1")) == ("1", 2, 0.5, (0, 1, 2, 2))
    # Each spelling is compared with one of each group at most.
    assert len(asked) == len(set(asked)) <= 8


def test_solutions_as_models_write_them_pass() -> None:
    question = (
        "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
        "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. "
        "How much in dollars does she make every day at the farmers' market?"
    )
    numbered = r"""To determine how much Janet makes every day, we need to follow these steps:

1. **Calculate the number of eggs that are not sold:**
   She eats 3 and bakes with 4, so \( 3 + 4 = 7 \) eggs are used.

2. **Calculate the number of eggs that are sold:**
   \[
   16 - 7 = 9
   \]

3. **Calculate the money:**
   \[
   9 \times 2 = 18
   \]

Therefore, Janet makes \(\boxed{18}\) dollars every day at the farmers' market."""
    paragraphs = r"""First we find how many eggs she uses: $3 + 4 = 7$.

Hence $16 - 7 = 9$ eggs remain for the market, at $2 each.

This gives 9 * 2 = 18. The final answer is $\boxed{18}$."""
    for text in (numbered, paragraphs):
        assert step_fault(text, question) is None
        assert box_fault(text) is None
        assert guided_fault(text, question, "18") is None
        assert false_equation(text.replace("= 9", "= 8")) is not None
