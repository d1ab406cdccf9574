"""The final answer of a response is found in one place only, whatever else the response says."""

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.rewards.text import answer_span, column_of, count_words, last_box, last_code_block


def random_latex(rng: object, depth: int = 3) -> str:
    """A text with balanced braces."""
    draw = rng.integers  # type: ignore[attr-defined]
    parts = []
    for _ in range(int(draw(1, 4))):
        kind = int(draw(4)) if depth else 0
        parts.append(["x+1", "{%s}", r"\frac{%s}{2}", r"\{%s\}"][kind])
        if "%s" in parts[-1]:
            parts[-1] = parts[-1] % random_latex(rng, depth - 1)
    return "".join(parts)


def test_the_last_box_is_found_with_all_of_its_braces() -> None:
    rng = print_seed()
    for _ in range(200):
        wrong, right = random_latex(rng), random_latex(rng)
        text = rf"We try \boxed{{{wrong}}} and { {1} } \{{ then \boxed{{{right}}}. Done }} {{."
        found = last_box(text)
        assert found is not None
        assert found[1] == right
        assert text[found[0] :].startswith(rf"\boxed{{{right}}}")
        assert answer_span(text) == right.strip()


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (r"\boxed{42}", "42"),
        (r"So $\boxed{ 42. }$.", "42"),
        (r"\boxed{$42$}", "42"),
        (r"\boxed{\(x\)}", "x"),
        # The last of several boxes, in whatever order the right one stands.
        (r"\boxed{42} no, \boxed{41}", "41"),
        (r"\boxed{41} no, \boxed{42}", "42"),
        # An answer outside of a box is none.
        ("The answer is 42.", None),
        ("42", None),
        ("", None),
        (r"\boxed 42", None),
        # An open box is no answer, and no earlier box stands in for it.
        (r"\boxed{42} and \boxed{41", None),
        (r"\boxed{42", None),
        (r"\boxed{}", None),
        (r"\boxed{42} and \boxed{ }", None),
        # A box around a box, and a box beside another answer.
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{41 \boxed{42}}", None),
        (r"\boxed{\boxed{41}\boxed{42}}", None),
    ],
)
def test_answers_in_boxes(text: str, span: str | None) -> None:
    assert answer_span(text) == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("The answer is 42.", "42"),
        ("... the ANSWER IS: **42**\nHope it helps with 43", "42"),
        ("The answer is 41. No: the answer is 42. I hope it is correct.", "42"),
        ("12 + 30 = 42\n#### 42", "42"),
        ("#### 42\n#### 41", "41"),
        ("The answer is 3.14. Good", "3.14"),
        # A box behind the last marker is its answer, one before it is not.
        (r"The answer is $\boxed{42}$.", "42"),
        (r"\boxed{42} and so the answer is 41.", "41"),
        (r"The answer is 41, that is \boxed{42}", "42"),
        (r"The answer is \boxed{42", None),
        ("42 is it", None),
        ("The answer is", None),
        ("The answer is \n42", None),
    ],
)
def test_answers_behind_markers(text: str, span: str | None) -> None:
    assert answer_span(text, ("The answer is", "####")) == span


def test_answers_behind_the_end_of_thoughts() -> None:
    text = r"<think>\boxed{42}</think> It is \boxed{41}."
    assert answer_span(text, after="</think>") == "41"
    assert answer_span(r"<think>\boxed{42}</think> done", after="</think>") is None
    assert answer_span(r"<think>\boxed{42}", after="</think>") is None
    # The last one counts: an early end opens no second chance.
    assert answer_span(r"</think>\boxed{42}</think>", after="</think>") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\n```python\nx = 1\n```\nb", ("python", "x = 1\n")),
        ("```\na\n```\n```Py\n  b\n\n```", ("py", "  b\n\n")),
        ("````md\n```\ncode\n```\n````", ("md", "```\ncode\n```\n")),
        ("```python\na\n```\n```python\nb", None),
        ("no code, `inline` and ```one line```", None),
        ("", None),
    ],
)
def test_the_last_code_block(text: str, found: tuple[str, str] | None) -> None:
    assert last_code_block(text) == found


def test_long_hostile_texts_take_no_time() -> None:
    """No search is quadratic in what a policy may write."""
    for text in (r"\boxed{" * 50_000, "{" * 200_000, "```\n" * 50_001, "The answer is " * 20_000, "<<" * 100_000):
        answer_span(text, ("The answer is",))
        last_code_block(text)
        count_words(text)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InputError, match=r"answers in the column answer .* are: question\. Add"):
        column_of({"question": [], "prompts": [], "completion_ids": []}, "answer", "answers")
