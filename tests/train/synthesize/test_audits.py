"""Answers that audits hold to be wrong are wrong, and spoilt texts are spoilt, whatever they are made of."""

import itertools
import random
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from tests.helpers.runs import print_seed
from train.synthesize.item import make_item
from train.synthesize.lengths import draw_length, estimated_tokens
from train.synthesize.puzzles import FAMILIES, is_right, make_puzzles
from train.synthesize.recipes import long_responses, mathematics, structured_data
from train.synthesize.recipes.logic import _damaged
from train.synthesize.spoilt import broken_off, out_of_order
from train.synthesize.structured_tasks import TASKS, is_right_answer, tasks_of

PROSE = "The river rises in the hills, and then it runs slowly through the old town. Nobody knows how deep it is here! "
CJK = "这条河从山上流下来,慢慢地流过古老的城镇。没有人知道它有多深。"


def drawn() -> random.Random:
    return random.Random(int(print_seed().integers(1 << 30)))


class Audits:
    """Takes the place of a context: the verdicts that are counted."""

    def __init__(self) -> None:
        self.verdicts: list[tuple[str, bool, bool]] = []

    def audit(self, name: str, expected: bool, verdict: bool) -> None:
        self.verdicts.append((name, expected, verdict))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wrong_answer_of_a_puzzle_is_wrong(family: str) -> None:
    rng = drawn()
    for puzzle in make_puzzles(60, rng.randrange(1 << 20), (family,)):
        assert is_right(puzzle.answer, puzzle.answer, puzzle.compare)
        assert not is_right(puzzle.answer, puzzle.wrong, puzzle.compare)
        # Facts of which one is missing or has another number are other facts.
        found = _damaged(puzzle.statement, rng.randrange)
        assert Counter(re.findall(r"\w+", found)) != Counter(re.findall(r"\w+", puzzle.statement))


def test_the_wrong_answer_of_a_problem_is_wrong() -> None:
    rng = drawn()
    golds = ["0", "-7", "999999999999999", "1.50", "3/8", "-2/6", "7919.25", r"\frac{31677}{4}", "x + 1", r"\infty", ""]
    for gold in [*golds, *(f"{rng.randrange(-999, 999)}{rng.choice(('', '.5', '/8'))}" for _ in range(100))]:
        (right, yes), (wrong, no) = mathematics._known_answers(gold)
        assert (yes, no) == (True, False)
        values = [
            Fraction(re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text))
            for text in (right, wrong)
            if re.fullmatch(r"[-\d./]+|\\frac\{-?\d+\}\{\d+\}", text)
        ]
        # One that stands for no plain number is longer than anything that equals it by accident.
        assert len(set(values)) == 2 or (len(wrong) > 14 and wrong not in gold)


def test_wrong_answers_about_tables_are_wrong() -> None:
    seed = drawn().randrange(1 << 20)
    seen, audits = Counter[str](), Audits()
    for item in tasks_of((), 400, 2, TASKS, ("csv", "json", "markdown"), 30, seed)():
        seen[item["compare"]] += 1
        files = item["compare"] in ("csv", "json")
        shown = f"```\n{item['wrong']}\n```" if files else f"Answer: {item['wrong']}"
        assert not is_right_answer(item["answer"], item["compare"], shown), item.data
        structured_data._audit(item, audits, ["Nothing is to be said. " + item["answer"]])  # type: ignore[arg-type]
    assert {verdict == expected for _, expected, verdict in audits.verdicts} == {True}
    assert len(seen) == 6


def test_a_list_with_several_words_in_a_name_has_a_wrong_answer() -> None:
    from train.synthesize.structured_tasks import _answered

    rng = drawn()
    for value in (["Pepper", "Salt and Pepper"], ["a", "A"], ["x, y", "y", "x"], ["one"], ["b 2", "b"]):
        made = _answered("question", "", "csv", "?", value, rng)
        assert is_right(made["answer"], made["answer"], "set")
        assert not is_right(made["answer"], made["wrong"], "set"), value


@pytest.mark.parametrize("compare", ["word"])
def test_words_are_compared_with_their_signs(compare: Any) -> None:
    for one, other in (("C++", "C"), ("C#", "C"), ("F#", "F"), ("-x", "x"), ("+", "-"), ("50%", "50"), ("a-", "a")):
        assert not is_right(one, other, compare)
        assert not is_right(other, one, compare)
    for given in (
        "Berlin",
        "berlin.",
        '"Berlin"',
        "**Berlin**",
        "`berlin`",
        "(Berlin)",
        " \u201cBerlin\u201d. ",
        "$Berlin$",
    ):
        assert is_right("Berlin", given, compare), given
    for given in ("C++", "c++.", "**C++**", "`C++`."):
        assert is_right("C++", given, compare), given
    assert is_right("C", "(C)", "letter")
    assert is_right("C", "C)", "letter")
    assert is_right("Ava, Ben", "**Ben** and **Ava**.", "set")


def test_a_text_that_breaks_off_is_a_beginning_that_ends_within_a_sentence() -> None:
    rng = drawn()
    for text in (PROSE * 5, CJK * 20, f"# Title\n\n{PROSE}\n\n```\nx = 1\n```\n\n{PROSE}"):
        for _ in range(50):
            found = broken_off(text, rng.uniform(0.2, 0.8))
            assert found is not None
            assert text.startswith(found)
            assert 0 < len(found) <= 0.8 * len(text)
            assert re.search(r"\w\Z", found)
            # What follows goes on with the sentence.
            assert re.match(r" ?\w", text[len(found) :])
    for text in ("", "One.", "a\nb\nc", "Yes. No. So."[:4]):
        assert broken_off(text, 0.5) is None


def test_words_out_of_order_have_other_neighbours() -> None:
    rng = drawn()
    for _ in range(200):
        words = (PROSE * 2).split()[: rng.randrange(12, 40)]
        found = out_of_order(" ".join(words), rng)
        assert found is not None
        assert Counter(found.split()) == Counter(words)
        assert not set(itertools.pairwise(words)) & set(itertools.pairwise(found.split()))
    for text in (
        "red, lime, blue, pink, gold, grey, white, black, brown, cyan, teal",
        "a few words",
        "no " * 40,
    ):
        assert out_of_order(text, rng) is None


def test_texts_of_another_length_have_another_length() -> None:
    rng, audits = drawn(), Audits()
    recipe = long_responses._LongResponses.__new__(long_responses._LongResponses)
    recipe._tokens = estimated_tokens
    url = "https://example.org/" + "x" * 3000
    for _ in range(200):
        parts = [rng.choice((PROSE, CJK, f"\n\n# Part\n\n{PROSE}", url + " ")) for _ in range(rng.randrange(5, 60))]
        text = "".join(parts).strip()
        recipe._audit_length(draw_length(text, rng, estimated_tokens), text, audits)  # type: ignore[arg-type]
    assert [(expected, verdict) for _, expected, verdict in audits.verdicts] == [(True, True), (False, False)] * 200


def test_items_of_audits_are_drawn_by_content() -> None:
    assert make_item({"a": 1}, ["here"]).rng("audit").random() == make_item({"a": 1}, ["there"]).rng("audit").random()
