"""Puzzles: the answer that is given follows from their words, and no other one does."""

import random
import re
from collections import Counter

import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.timing import best_rate
from tests.train.synthesize.puzzles.solvers import CLAIMED, SOLVERS
from train.synthesize.puzzles import FAMILIES, Puzzle, is_right, make_puzzle, make_puzzles


def solved(puzzle: Puzzle) -> str:
    """The answer that a solver finds, which reads the puzzle's words only."""
    judge = SOLVERS[puzzle.family]
    if puzzle.format == "choice":
        question, *options = puzzle.question.split("\n")
        letters = [line[0] for line in options if judge(puzzle.statement, question, line[3:])]
        assert len(letters) == 1, f"{letters} are right: {puzzle}"
        assert [line[:3] for line in options] == [f"{letter}) " for letter in "ABCD"[: len(options)]]
        return letters[0]
    if puzzle.format == "true_false":
        claimed = re.search(CLAIMED[puzzle.family], puzzle.question)
        assert claimed is not None, puzzle
        return str(judge(puzzle.statement, puzzle.question, next(filter(None, claimed.groups()))))
    assert not judge(puzzle.statement, puzzle.question, puzzle.wrong), puzzle
    assert judge(puzzle.statement, puzzle.question, puzzle.answer), puzzle
    return puzzle.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_solver_finds_the_same_answer(family: str) -> None:
    seed = int(print_seed().integers(1 << 30))
    found = list(make_puzzles(25 if family == "houses" else 45, seed, [family]))
    for puzzle in found:
        assert solved(puzzle) == puzzle.answer, puzzle
        assert puzzle.reasoning == FAMILIES[family].reasoning
        assert is_right(puzzle.answer, puzzle.answer, puzzle.compare)
        assert not is_right(puzzle.answer, puzzle.wrong, puzzle.compare)
    assert {puzzle.format for puzzle in found} == set(FAMILIES[family].formats)
    assert {puzzle.difficulty for puzzle in found} == {1, 2, 3}


def test_a_solver_sees_a_wrong_answer() -> None:
    """The test of the tests: with the wrong answer in its place, or one clue less, solvers disagree."""
    seed = int(print_seed().integers(1 << 30))
    for puzzle in make_puzzles(60, seed):
        assert solved(puzzle) != puzzle.wrong


def test_no_clue_can_be_left_out() -> None:
    seed = int(print_seed().integers(1 << 30))
    for puzzle in make_puzzles(10, seed, ["ordering", "houses"]):
        first, *clues = puzzle.statement.split("\n")
        for left_out in clues:
            fewer = "\n".join([first, *(clue for clue in clues if clue != left_out)])
            with pytest.raises(ValueError, match="too many values"):
                SOLVERS[puzzle.family](fewer, "position 1, drinks tea, owns the cat", puzzle.answer)


def test_puzzles_are_different_balanced_and_the_same_in_every_run() -> None:
    seed = int(print_seed().integers(1 << 30))
    found = list(make_puzzles(400, seed))
    assert len({(p.statement, p.question) for p in found}) == 400
    assert list(make_puzzles(50, seed)) == found[:50]
    assert list(make_puzzles(50, seed + 1)) != found[:50]
    assert set(Counter(p.family for p in found).values()) == {40}
    assert {p.reasoning for p in found} == {"deductive", "inductive", "analogical", "causal", "statistical"}
    # A reader that always gives the same answer is right no more often than by chance (99.99% limits).
    truths = Counter(p.answer for p in found if p.format == "true_false")
    assert 0.3 < truths["True"] / truths.total() < 0.7
    letters = Counter(p.answer for p in found if p.format == "choice")
    assert max(letters.values()) < 0.45 * letters.total()


def test_answers_are_compared_exactly() -> None:
    for answer, given, compare in (
        ("B", "(b)", "letter"), ("B", "**B**.", "letter"), ("True", "true.", "truth"), ("3/7", "6/14", "number"),
        ("3/4", "75%", "number"), ("3/4", r"$\frac{3}{4}$", "number"), ("1000", "1,000", "number"),
        ("-5", "-5", "number"), ("Ava, Ben", "Ben and Ava", "set"), ("nobody", "Nobody.", "set"),
        ("cannot be told", '"Cannot be told"', "word"),
    ):  # fmt: skip
        assert is_right(answer, given, compare), (answer, given)  # type: ignore[arg-type]
    for answer, given, compare in (
        ("B", "A", "letter"), ("B", "B or C", "letter"), ("B", "", "letter"), ("True", "not true", "truth"),
        ("3/7", "0.43", "number"), ("3/7", "3 / 7 or so", "number"), ("1", "1/0", "number"), ("1", "1/00", "number"),
        ("1", "9" * 5000, "number"), ("Ava, Ben", "Ava", "set"), ("Ava", "Ava, Ben", "set"), ("nobody", "", "set"),
        ("on", "off", "word"), ("5", "five", "number"),
    ):  # fmt: skip
        assert not is_right(answer, given, compare), (answer, given)  # type: ignore[arg-type]


def test_what_cannot_be_made_is_refused() -> None:

    rng = random.Random(0)
    with pytest.raises(InputError, match="no family"):
        make_puzzle(rng, "sudoku")
    with pytest.raises(InputError, match="not as open"):
        make_puzzle(rng, "syllogism", "open")
    with pytest.raises(InputError, match="difficulty"):
        make_puzzle(rng, "knights", difficulty=4)


def test_two_hundred_puzzles_a_second() -> None:
    seed = int(print_seed().integers(1 << 30))
    # The first ones build tables.
    list(make_puzzles(100, seed))
    assert best_rate(500, lambda attempt: list(make_puzzles(500, seed + attempt)), enough=200) > 200
