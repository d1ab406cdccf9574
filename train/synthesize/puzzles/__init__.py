"""Puzzles whose only right answer is found by code: for reasoning that is checked exactly."""

import random
from collections.abc import Iterator, Sequence

from qwen_jax.errors import InputError
from train.synthesize.item import content_key
from train.synthesize.puzzles.deductive import houses, knights, ordering, syllogism
from train.synthesize.puzzles.inductive import letters, mapping, sequence
from train.synthesize.puzzles.puzzle import Family, Puzzle, ask, is_right
from train.synthesize.puzzles.uncertain import chance, circuit, separation

__all__ = ["FAMILIES", "Family", "Puzzle", "is_right", "make_puzzle", "make_puzzles"]

FAMILIES = {
    family.name: family
    for family in (
        Family("knights", "deductive", knights),
        Family("ordering", "deductive", ordering),
        Family("houses", "deductive", houses),
        Family("syllogism", "deductive", syllogism, ("choice", "true_false")),
        Family("sequence", "inductive", sequence),
        Family("letters", "analogical", letters),
        Family("mapping", "analogical", mapping),
        Family("circuit", "causal", circuit),
        Family("separation", "causal", separation, ("choice", "true_false")),
        Family("chance", "statistical", chance),
    )
}
"""Families of puzzles by name."""


def make_puzzle(rng: random.Random, family: str, form: str | None = None, difficulty: int | None = None) -> Puzzle:
    """Makes a puzzle.

    Args:
      rng: decides everything that is not given.
      family: one of `FAMILIES`.
      form: "choice", "true_false" or "open"; by default one that the family has.
      difficulty: from 1 to 3.

    Raises:
      InputError: no such family or difficulty, or a form that the family does not have.
    """
    of = FAMILIES.get(family)
    if of is None:
        raise InputError(f"There is no family of puzzles {family}. There are: {', '.join(FAMILIES)}.")
    drawn = rng.choice(of.formats), rng.randint(1, 3)
    formats = [one for one in of.formats if one == form] if form else [drawn[0]]
    if not formats:
        raise InputError(f"Puzzles of {family} are asked as {', '.join(of.formats)}, not as {form}.")
    if difficulty not in (None, 1, 2, 3):
        raise InputError(f"The difficulty of a puzzle is 1, 2 or 3, got {difficulty}.")
    return ask(of, formats[0], difficulty or drawn[1], rng)


def make_puzzles(count: int, seed: int, families: Sequence[str] = ()) -> Iterator[Puzzle]:
    """Makes different puzzles, the families in turns.

    Args:
      count: of puzzles.
      seed: of all random numbers; the first puzzles are the same whatever the count is.
      families: of `FAMILIES`; by default all.

    Raises:
      InputError: no such family, or so many puzzles that there are no new ones.
    """
    names, seen = list(families or FAMILIES), set[str]()
    for number in range(count):
        for attempt in range(100):
            rng = random.Random(content_key("puzzle", seed, number, attempt))
            puzzle = make_puzzle(rng, names[number % len(names)])
            key = content_key(puzzle.statement, puzzle.question)[:16]
            if key not in seen:
                break
        else:
            raise InputError(f"There are no more than {number} different puzzles of {', '.join(names)}. Ask for fewer.")
        seen.add(key)
        yield puzzle
