"""Puzzles of deduction: knights and knaves, orders, houses and syllogisms, each with one solution."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from train.synthesize.puzzles.puzzle import NAMES, Core, listed, narrow

Order = tuple[int, ...]
Says = tuple[str, Callable[[Sequence[bool]], bool]]


def knights(rng: random.Random, difficulty: int) -> Core:
    """Knights tell the truth and knaves lie; all 2^n ways are tried, and one is left."""
    names = rng.sample(NAMES, difficulty + 2)
    while True:
        says = [_saying(rng, names, speaker) for speaker in range(len(names))]
        # A speaker is a knight exactly if what is said is true.
        ways = [
            way
            for way in itertools.product((True, False), repeat=len(names))
            if all(holds(way) == way[i] for i, (_, holds) in enumerate(says))
        ]
        if len(ways) == 1:
            break

    def of(way: Sequence[bool]) -> str:
        return ", ".join(name for name, knight in zip(names, way, strict=True) if knight) or "nobody"

    others = [way for way in itertools.product((True, False), repeat=len(names)) if way != ways[0]]
    lines = [f'{name} says: "{text}"' for name, (text, _) in zip(names, says, strict=True)]
    return Core(
        "On an island, knights always tell the truth and knaves always lie. Everyone is either a knight or a knave. "
        f"You meet {listed(names)}.\n" + "\n".join(lines),
        "Who are the knights?",
        of(ways[0]),
        tuple(of(way) for way in rng.sample(others, 3)),
        "The knights among them are exactly these: {}.",
        "the names of all knights, separated by commas, or nobody",
        "set",
    )


def _saying(rng: random.Random, names: Sequence[str], speaker: int) -> Says:
    """What somebody says about two of the others, or about one and itself."""
    i, j = rng.sample([n for n in range(len(names)) if n != speaker], 2)
    a, b = names[i], names[j]
    return rng.choice(
        [
            (f"{a} is a knight.", lambda w: w[i]),
            (f"{a} is a knave.", lambda w: not w[i]),
            (f"{a} and {b} are both knights.", lambda w: w[i] and w[j]),
            (f"{a} and {b} are both knaves.", lambda w: not w[i] and not w[j]),
            (f"Exactly one of {a} and {b} is a knight.", lambda w: w[i] != w[j]),
            (f"{a} and I are of the same kind.", lambda w: w[i] == w[speaker]),
            (f"At least one of {a} and {b} is a knave.", lambda w: not (w[i] and w[j])),
            (f"{a} is a knave or {b} is a knight, or both.", lambda w: not w[i] or w[j]),
        ]
    )


def ordering(rng: random.Random, difficulty: int) -> Core:
    """People in a line, whose places follow from clues; all orders are tried."""
    names = rng.sample(NAMES, difficulty + 3)
    count = len(names)
    # Places by person, from 0 at the left.
    hidden = tuple(rng.sample(range(count), count))
    clues = None
    while clues is None:
        clues = narrow(itertools.permutations(range(count)), _places(rng, names, hidden), rng)
    place = rng.randrange(count)
    who = names[hidden.index(place)]
    return Core(
        f"{listed(names)} stand in a line, in positions 1 to {count} from left to right.\n" + "\n".join(clues),
        f"Who stands in position {place + 1}?",
        who,
        tuple(name for name in names if name != who),
        f"{{}} stands in position {place + 1}.",
        "the name",
        "word",
    )


def _places(rng: random.Random, names: Sequence[str], hidden: Order) -> Iterator[tuple[str, Callable[[Order], bool]]]:
    """Clues that hold in an order, at random."""
    count = len(names)
    for _ in range(200):
        i, j, k = rng.sample(range(count), 3)
        a, b, c, place = names[i], names[j], names[k], rng.randrange(count)
        text, holds = rng.choice(_clues_of_places(a, b, c, i, j, k, place, count))
        if holds(hidden):
            yield text, holds


def _clues_of_places(
    a: str, b: str, c: str, i: int, j: int, k: int, place: int, count: int
) -> list[tuple[str, Callable[[Order], bool]]]:
    return [
        (f"{a} stands somewhere to the left of {b}.", lambda w: w[i] < w[j]),
        (f"{a} stands directly to the left of {b}.", lambda w: w[i] + 1 == w[j]),
        (f"{a} stands next to {b}.", lambda w: abs(w[i] - w[j]) == 1),
        (f"{a} does not stand next to {b}.", lambda w: abs(w[i] - w[j]) != 1),
        (f"{a} does not stand in position {place + 1}.", lambda w: w[i] != place),
        (f"{a} stands at one of the two ends.", lambda w: w[i] in (0, count - 1)),
        (f"{a} stands somewhere between {b} and {c}.", lambda w: w[j] < w[i] < w[k] or w[k] < w[i] < w[j]),
    ]


# Each with its values, how somebody is called by one, and what is asked.
_ATTRIBUTES = (
    (("the cat", "the dog", "the parrot", "the rabbit"), "the owner of {}", "owns {}"),
    (("tea", "coffee", "milk", "juice"), "the person who drinks {}", "drinks {}"),
)


def houses(rng: random.Random, difficulty: int) -> Core:
    """People in houses with pets and drinks, as in Einstein's puzzle; all ways to place them are tried."""
    count = 4 if difficulty == 3 else 3
    names = rng.sample(NAMES, count)
    attributes = rng.sample(_ATTRIBUTES, 2 if difficulty == 2 else 1)
    called = [list(names)]
    for values, form, _ in attributes:
        called.append([form.format(value) for value in rng.sample(values, count)])
    # By attribute: the house of each value, from 0 at the left.
    hidden = tuple(tuple(rng.sample(range(count), count)) for _ in called)
    worlds = list(itertools.product(itertools.permutations(range(count)), repeat=len(called)))
    clues = None
    while clues is None:
        clues = narrow(worlds, _homes(rng, called, hidden), rng)
    asked = rng.randrange(len(attributes)) + 1
    value = rng.randrange(count)
    doing = attributes[asked - 1][2].format(_value(called[asked][value], attributes[asked - 1][1]))
    who = names[hidden[0].index(hidden[asked][value])]
    has = listed(["one pet" if "owns" in form else "one drink" for _, _, form in attributes])
    of_each = [
        listed([_value(one, form) for one in of]) for of, (_, form, _) in zip(called[1:], attributes, strict=True)
    ]
    return Core(
        f"{listed(names)} live in houses 1 to {count}, from left to right, one in each. Each has {has} that nobody "
        f"else has: {'; '.join(of_each)}.\n" + "\n".join(clues),
        f"Who {doing}?",
        who,
        tuple(name for name in names if name != who),
        f"{{}} {doing}.",
        "the name",
        "word",
    )


def _value(called: str, form: str) -> str:
    return called.removeprefix(form.format(""))


def _homes(
    rng: random.Random, called: Sequence[Sequence[str]], hidden: Sequence[Order]
) -> Iterator[tuple[str, Callable[[Sequence[Order]], bool]]]:
    """Clues that hold in houses, at random."""
    count = len(hidden[0])
    for _ in range(300):
        (p, i), (q, j) = ((rng.randrange(len(called)), rng.randrange(count)) for _ in range(2))
        if (p, i) == (q, j):
            continue
        a, b, place = called[p][i], called[q][j], rng.randrange(count)
        text, holds = rng.choice(_clues_of_homes(a, b, p, i, q, j, place))
        # That two names, or two pets, are of different people goes without saying.
        if holds(hidden) and not (p == q and " not " in text and "house" not in text):
            yield text[0].upper() + text[1:], holds


def _clues_of_homes(
    a: str, b: str, p: int, i: int, q: int, j: int, place: int
) -> list[tuple[str, Callable[[Sequence[Order]], bool]]]:
    return [
        (f"{a} is {b}.", lambda w: p != q and w[p][i] == w[q][j]),
        (f"{a} is not {b}.", lambda w: w[p][i] != w[q][j]),
        (f"{a} lives directly to the left of {b}.", lambda w: w[p][i] + 1 == w[q][j]),
        (f"{a} lives next to {b}.", lambda w: abs(w[p][i] - w[q][j]) == 1),
        (f"{a} does not live in house {place + 1}.", lambda w: w[p][i] != place),
        (f"{a} lives in a house to the left of {b}.", lambda w: w[p][i] < w[q][j]),
    ]


_TERMS = ("wugs", "blickets", "daxes", "toves", "fendles", "zorps", "mimsies", "kerns", "lorps", "pavels")
# Form, and the sentence about two terms.
_SENTENCES = {
    "all": "All {} are {}.",
    "no": "No {} are {}.",
    "some": "Some {} are {}.",
    "some not": "Some {} are not {}.",
}
_Sentence = tuple[str, int, int]


def syllogism(rng: random.Random, difficulty: int) -> Core:
    """What follows from statements about all, some and no things, by looking at all models.

    With k terms a thing is of one of 2^k types, and a statement depends on nothing but which types there are: 2^(2^k)
    models decide what follows.
    """
    count = 4 if difficulty == 3 else 3
    terms = rng.sample(_TERMS, count)
    everything = [(form, i, j) for form in _SENTENCES for i in range(count) for j in range(count) if i != j]
    while True:
        # Terms in a chain, each sentence in one direction or the other.
        links = list(itertools.pairwise(rng.sample(range(count), count)))
        directed = [rng.sample(link, 2) for link in links]
        premises = [(rng.choice(list(_SENTENCES)), i, j) for i, j in directed]
        if difficulty == 2:
            premises.append(("exist", premises[0][1], premises[0][1]))
        models = functools.reduce(int.__and__, (_models(count, *one) for one in premises))
        if not models:
            continue
        follows = [one for one in everything if not models & ~_models(count, *one)]
        # It takes more than one of the premises.
        new = [one for one in follows if all(_models(count, *p) & ~_models(count, *one) for p in premises)]
        others = [one for one in everything if one not in follows]
        if new and len(others) >= 3 and (difficulty != 2 or _needs(premises, new[0], count)):
            break
    right = rng.choice([one for one in new if difficulty != 2 or _needs(premises, one, count)])
    rng.shuffle(premises)
    return Core(
        'Here "some" means at least one, and a statement about all does not say that there are any.\n'
        + "\n".join(_sentence(one, terms) for one in premises),
        "Which of these conclusions follows from the statements?",
        _sentence(right, terms),
        tuple(_sentence(one, terms) for one in rng.sample(others, 3)),
        'The statements together imply: "{}"',
        "the conclusion",
        "word",
    )


def _needs(premises: Sequence[_Sentence], conclusion: _Sentence, count: int) -> bool:
    """Whether a conclusion does not follow without the last premise."""
    models = functools.reduce(int.__and__, (_models(count, *one) for one in premises[:-1]))
    return bool(models & ~_models(count, *conclusion))


def _sentence(sentence: _Sentence, terms: Sequence[str]) -> str:
    form, i, j = sentence
    if form == "exist":
        return f"There is at least one of the {terms[i]}."
    return _SENTENCES[form].format(terms[i], terms[j])


@functools.cache
def _models(count: int, form: str, i: int, j: int) -> int:
    """The models in which a sentence is true, as bits; a model is a set of types as bits, and has at least one."""
    types = range(1 << count)
    there = sum(1 << t for t in types if t >> i & 1 and (t >> j & 1) == (form in ("no", "some", "exist")))
    exists = form in ("some", "some not", "exist")
    # The empty model is the last digit.
    digits = ("1" if bool(model & there) == exists else "0" for model in range((1 << (1 << count)) - 1, 0, -1))
    return int("".join(digits) + "0", 2)
