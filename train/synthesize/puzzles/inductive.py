"""Puzzles of induction and analogy: sequences, changes of words, and systems of one structure.

Each says which rules there may be, and all rules that fit what is shown give the same answer.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from train.synthesize.puzzles.puzzle import NAMES, Core, listed

Terms = Sequence[int]

_RULES = """The rule is of one of these kinds: equal differences; equal ratios; differences that themselves have equal
differences; two differences that take turns; each number is the sum of the two before it; each number is the one before
times a fixed number, plus a fixed number; two sequences with equal differences that take turns.""".replace("\n", " ")


def sequence(rng: random.Random, difficulty: int) -> Core:
    """Numbers that follow a rule; all rules that fit them give the same next one."""
    while True:
        terms = _terms(rng, difficulty)
        found = {next_term for fit in _FITS if (next_term := fit(terms[:-1])) is not None}
        if found == {terms[-1]} and len(set(terms)) > 3 and abs(terms[-1]) < 10**5:
            break
    *shown, answer = terms
    near = {answer + 1, answer - 1, answer + 2, 2 * shown[-1] - shown[-2], shown[-1] + shown[0], answer + 10}
    return Core(
        f"These numbers follow a rule:\n{', '.join(map(str, shown))}\n{_RULES}",
        "Which number comes next?",
        str(answer),
        tuple(str(number) for number in rng.sample(sorted(near - {answer}), 3)),
        "The next number is {}.",
        "a number",
        "number",
    )


def _terms(rng: random.Random, difficulty: int) -> list[int]:
    """Seven terms, the last of which is asked for, by a random rule."""
    a, b, c = rng.randint(1, 20), rng.choice([-7, -5, -4, -3, 2, 3, 4, 5, 6, 7, 9]), rng.randint(1, 4)
    places = range(7)
    if difficulty == 1:
        return [a + b * n for n in places] if rng.random() < 0.5 else [a * (c + 1) ** n for n in places]
    terms = [a, a + b]
    if difficulty == 2:
        kind = rng.randrange(3)
        if kind == 0:
            return [a + b * n + c * n * n for n in places]
        for n in range(5):
            terms.append(terms[-1] + terms[-2] if kind == 1 else terms[n] + b + c)
        return terms
    if rng.random() < 0.5:
        terms = [a]
        for _ in range(6):
            terms.append(terms[-1] * (c + 1) + b)
        return terms
    other = rng.randint(1, 40)
    return [a + b * (n // 2) if n % 2 == 0 else other + c * (n // 2) for n in places]


def _polynomial(degree: int) -> Callable[[Terms], int | None]:
    def fit(terms: Terms) -> int | None:
        rows = [list(terms)]
        for _ in range(degree):
            rows.append([y - x for x, y in itertools.pairwise(rows[-1])])
        return sum(row[-1] for row in rows) if len(set(rows[-1])) == 1 else None

    return fit


def _ratio(terms: Terms) -> int | None:
    if 0 in terms:
        return None
    ratios = {Fraction(y, x) for x, y in itertools.pairwise(terms)}
    following = terms[-1] * min(ratios)
    return int(following) if len(ratios) == 1 and following.denominator == 1 else None


def _turns(terms: Terms) -> int | None:
    steps = [y - x for x, y in itertools.pairwise(terms)]
    fits = len(set(steps[::2])) == 1 and len(set(steps[1::2])) == 1
    return terms[-1] + steps[len(steps) % 2] if fits else None


def _sum(terms: Terms) -> int | None:
    fits = all(x + y == z for x, y, z in zip(terms, terms[1:], terms[2:], strict=False))
    return terms[-1] + terms[-2] if fits else None


def _affine(terms: Terms) -> int | None:
    a, b, c = terms[:3]
    if a == b:
        return b if len(set(terms)) == 1 else None
    times = Fraction(c - b, b - a)
    plus = b - times * a
    fits = all(y == times * x + plus for x, y in itertools.pairwise(terms))
    following = times * terms[-1] + plus
    return int(following) if fits and following.denominator == 1 else None


def _interleaved(terms: Terms) -> int | None:
    line = _polynomial(1)
    return line(terms[len(terms) % 2 :: 2]) if None not in (line(terms[::2]), line(terms[1::2])) else None


_FITS: tuple[Callable[[Terms], int | None], ...] = (
    _polynomial(1), _polynomial(2), _ratio, _turns, _sum, _affine, _interleaved,
)  # fmt: skip


def _later(word: str, step: int = 1) -> str:
    return "".join(chr((ord(letter) - 97 + step) % 26 + 97) for letter in word)


# What a step is called, and what it does.
STEPS: dict[str, Callable[[str], str]] = {
    "reverse the word": lambda w: w[::-1],
    "move the first letter to the end": lambda w: w[1:] + w[:1],
    "swap the first two letters": lambda w: w[1::-1] + w[2:],
    "swap the first and the last letter": lambda w: w[-1] + w[1:-1] + w[0],
    "double the last letter": lambda w: w + w[-1],
    "drop the first letter": lambda w: w[1:],
    "replace the last letter by the next one of the alphabet": lambda w: w[:-1] + _later(w[-1]),
    "replace each letter by the next one of the alphabet": _later,
}


def letters(rng: random.Random, difficulty: int) -> Core:
    """A change of letters that is carried over to another word; all changes that fit the examples agree."""
    changes: list[tuple[Callable[[str], str], ...]] = [(one,) for one in STEPS.values()]
    changes += [(one, other) for one in STEPS.values() for other in STEPS.values()] if difficulty > 1 else []
    while True:
        meant = rng.choice(changes if difficulty == 1 else changes[len(STEPS) :])
        words = ["".join(rng.sample("abcdefghijklmnopqrstuvw", 4 + (difficulty > 2))) for _ in range(3)]
        (one, two, asked), (new_one, new_two, answer) = words, (_changed(word, meant) for word in words)
        if answer == asked or one == new_one:
            continue
        fits = [c for c in changes if _changed(one, c) == new_one and _changed(two, c) == new_two]
        wrong = sorted({_changed(asked, c) for c in changes} - {answer})
        if {_changed(asked, c) for c in fits} == {answer} and len(wrong) >= 3:
            break
    steps = "one of these steps" if difficulty == 1 else "one of these steps, or of two, one after the other"
    return Core(
        f"A change makes {new_one} of {one}, and {new_two} of {two}. It consists of {steps}: {'; '.join(STEPS)}.",
        f"What does the same change make of {asked}?",
        answer,
        tuple(rng.sample(wrong, 3)),
        f"The same change makes {{}} of {asked}.",
        "the letters, without spaces",
        "word",
    )


def _changed(word: str, steps: Sequence[Callable[[str], str]]) -> str:
    for step in steps:
        word = step(word)
    return word


# What the parts of groups are called, and what they do to each other.
_SYSTEMS = (
    (("moon", "comet", "planet", "star", "ring"), "pulls"),
    (("pump", "tank", "valve", "boiler", "filter"), "feeds"),
    (("wolf", "hare", "hawk", "snake", "frog"), "hunts"),
    (("gear", "belt", "shaft", "wheel", "crank"), "drives"),
)


def mapping(rng: random.Random, difficulty: int) -> Core:
    """Two systems of one structure; all ways to match their parts match one part to the same one."""
    count = 4 if difficulty == 1 else 5
    people = rng.sample(NAMES, count)
    parts, verb = rng.choice(_SYSTEMS)
    pairs = list(itertools.permutations(range(count), 2))
    while True:
        links = set(rng.sample(pairs, count + (difficulty > 2)))
        matched = rng.sample(range(count), count)
        image = {(matched[i], matched[j]) for i, j in links}
        ways = [way for way in itertools.permutations(range(count)) if {(way[i], way[j]) for i, j in links} == image]
        fixed = [i for i in range(count) if len({way[i] for way in ways}) == 1]
        if fixed:
            break
    asked = rng.choice(fixed)
    first = [f"{people[i]} advises {people[j]}" for i, j in sorted(links)]
    second = [f"the {parts[i]} {verb} the {parts[j]}" for i, j in sorted(image)]
    rng.shuffle(first)
    rng.shuffle(second)
    used = [f"the {part}" for part in parts[:count]]
    answer = used[matched[asked]]
    return Core(
        f"There are two groups. In the first, {listed(first)}; nobody else advises anybody. In the second, "
        f"{listed(second)}; nothing else {verb} anything. Match each of {listed(people)} with a different one of "
        f"{listed(used)}, so that a person advises another one exactly if the match of the first {verb} the match of "
        "the second.",
        f"Which is matched with {people[asked]}?",
        answer,
        tuple(part for part in used if part != answer),
        f"{people[asked]} is matched with {{}}.",
        f"one of {listed(used)}",
        "word",
    )
