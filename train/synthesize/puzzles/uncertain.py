"""Puzzles of cause and chance: interventions, d-separation and exact probabilities, by enumeration."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from train.synthesize.puzzles.puzzle import Core, listed

_DEVICES = ("the bell", "the fan", "the heater", "the lamp", "the motor", "the pump", "the siren", "the screen")
State = dict[str, bool]
# A rule about two things, and whether the device is on.
_RULES: dict[str, Callable[[bool, bool], bool]] = {
    "{} is on exactly if {} and {} are both on.": lambda x, y: x and y,
    "{} is on exactly if at least one of {} and {} is on.": lambda x, y: x or y,
    "{} is on exactly if {} is on and {} is off.": lambda x, y: x and not y,
    "{} is on exactly if one of {} and {} is on and the other is off.": lambda x, y: x != y,
}
_UNKNOWN = "cannot be told"


def circuit(rng: random.Random, difficulty: int) -> Core:
    """What would have been under an intervention, in all settings of switches that fit what was seen."""
    switches = [f"switch {i + 1}" for i in range(2 + (difficulty > 1))]
    wanted = rng.choice(["on", "off", "on", "off", _UNKNOWN])
    while True:
        devices = rng.sample(_DEVICES, difficulty + 1)
        rules: dict[str, tuple[str, str, str]] = {}
        for device in devices:
            one, other = rng.sample([*switches, *rules], 2)
            rules[device] = rng.choice(list(_RULES)), one, other
        true = _state(rules, {switch: rng.random() < 0.5 for switch in switches}, {})
        seen = sorted(rng.sample(sorted(true), difficulty + (len(switches) > 2)))
        forced, asked = rng.sample(devices, 2)
        force = not true[forced]
        found = set()
        for setting in itertools.product((True, False), repeat=len(switches)):
            outside = dict(zip(switches, setting, strict=True))
            was = _state(rules, outside, {})
            if all(was[name] == true[name] for name in seen):
                found.add(_state(rules, outside, {forced: force})[asked])
        answer = _UNKNOWN if len(found) > 1 else "on" if True in found else "off"
        if answer == wanted:
            break
    lines = [_upper(rule.format(device, one, other)) for device, (rule, one, other) in rules.items()]
    rng.shuffle(lines)
    return Core(
        f"A device has {listed(switches)}, which somebody sets, and parts that depend on them.\n"
        + "\n".join(lines)
        + f"\nThis was seen: {listed([f'{name} was {_on(true[name])}' for name in seen])}. Forcing a part to be on or "
        "off changes what depends on it, but neither the switches nor what it depends on.",
        f"If {forced} had been forced to be {_on(force)}, with the switches as they were, would {asked} have been on "
        "or off, or can that not be told?",
        answer,
        tuple(one for one in ("on", "off", _UNKNOWN) if one != answer),
        f"If {forced} had been forced to be {_on(force)}, with the switches as they were, the right answer to whether "
        f"{asked} would have been on or off is: {{}}.",
        "on, off or cannot be told",
        "word",
    )


def _state(rules: Mapping[str, tuple[str, str, str]], outside: State, forced: State) -> State:
    """The state of all parts; rules are in the order in which they depend on each other."""
    state = dict(outside)
    for device, (rule, one, other) in rules.items():
        state[device] = forced.get(device, _RULES[rule](state[one], state[other]))
    return state


def _on(value: bool) -> str:
    return "on" if value else "off"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


Arrow = tuple[str, str]


def separation(rng: random.Random, difficulty: int) -> Core:
    """Which variables make two others independent: d-separation, by looking at all paths (Pearl 1988)."""
    names = list("ABCDEF"[: difficulty + 3])
    while True:
        order = rng.sample(names, len(names))
        arrows = [pair for pair in itertools.combinations(order, 2) if rng.random() < 0.45]
        x, y = rng.sample(names, 2)
        others = [name for name in names if name not in (x, y)]
        sets = [given for size in range(3) for given in itertools.combinations(sorted(others), size)]
        good = [given for given in sets if not _connected(arrows, x, y, given)]
        bad = [given for given in sets if given not in good]
        # Knowing the set has to matter.
        if good and len(bad) >= 3:
            break
    return Core(
        "In a causal graph, an arrow goes from a direct cause to its effect. The arrows are: "
        + ", ".join(f"{a} -> {b}" for a, b in sorted(arrows))
        + f". The variables are {listed(names)}.",
        f"Which of these makes {x} and {y} independent in every distribution that the graph allows (d-separation)?",
        _given(rng.choice(good)),
        tuple(_given(given) for given in rng.sample(bad, 3)),
        f"This makes {x} and {y} independent in every distribution that the graph allows (d-separation): {{}}.",
        "the variables",
        "word",
    )


def _given(names: Sequence[str]) -> str:
    return f"knowing {listed(list(names))}" if names else "knowing nothing"


def _connected(arrows: Sequence[Arrow], x: str, y: str, given: Sequence[str]) -> bool:
    """Whether a path between two variables is open, given others."""
    # A collision is open if it, or something that it causes, is given.
    open_at = set(given)
    while more := {a for a, b in arrows if b in open_at} - open_at:
        open_at |= more

    def walk(path: tuple[str, ...], came_in: bool) -> bool:
        here = path[-1]
        if here == y:
            return True
        for a, b in arrows:
            if here not in (a, b) or (following := b if here == a else a) in path:
                continue
            goes_out = here == a
            if len(path) > 1:
                is_collision = came_in and not goes_out
                if (here not in open_at) if is_collision else (here in given):
                    continue
            if walk((*path, following), goes_out):
                return True
        return False

    return walk((x,), False)


def chance(rng: random.Random, difficulty: int) -> Core:
    """A probability, counted exactly among equally likely cases."""
    while True:
        statement, question, claim, likely = rng.choice([_urn, _dice, _test])(rng, difficulty)
        if 0 < likely < 1:
            break
    top, bottom = likely.as_integer_ratio()
    wrong = {1 - likely, likely / 2, (likely + 1) / 2, likely * likely, Fraction(top, bottom + 1)}
    return Core(
        statement,
        question,
        str(likely),
        tuple(str(other) for other in rng.sample(sorted(wrong - {likely}), 3)),
        claim,
        "a fraction in lowest terms, such as 3/7",
        "number",
    )


_Chance = tuple[str, str, str, Fraction]


def _urn(rng: random.Random, difficulty: int) -> _Chance:
    colours = rng.sample(["red", "blue", "green", "white"], 2 + (difficulty > 2))
    counts = {colour: rng.randint(2, 5) for colour in colours}
    drawn, colour = 2 + (difficulty > 1), rng.choice(colours)
    exactly = rng.randint(1, min(drawn, counts[colour]))
    events: list[tuple[str, Callable[[Sequence[str]], bool]]] = [
        (f"the number of {colour} balls among them is exactly {exactly}", lambda balls: balls.count(colour) == exactly),
        (f"at least one of them is {colour}", lambda balls: colour in balls),
        ("they all have the same colour", lambda balls: len(set(balls)) == 1),
    ]
    text, happens = rng.choice(events)
    balls = [of for of, count in counts.items() for _ in range(count)]
    draws = list(itertools.combinations(balls, drawn))
    holds = listed([f"{count} {of}" for of, count in counts.items()])
    return (
        f"An urn holds {holds} balls. {drawn} balls are drawn at random, without putting any back.",
        f"What is the probability that {text}?",
        f"The probability that {text} is {{}}.",
        Fraction(sum(map(happens, draws)), len(draws)),
    )


def _dice(rng: random.Random, difficulty: int) -> _Chance:
    count = 2 + (difficulty > 2)
    total, face = rng.randint(count + 2, 6 * count - 2), rng.randint(1, 6)
    rolls = list(itertools.product(range(1, 7), repeat=count))
    event = f"the sum of the numbers is at least {total}"
    if difficulty == 1:
        given = ""
    else:
        given = f", given that at least one of the dice shows {face}"
        rolls = [roll for roll in rolls if face in roll]
    return (
        f"{count} fair dice with the numbers 1 to 6 are rolled.",
        f"What is the probability that {event}{given}?",
        f"The probability that {event}{given} is {{}}.",
        Fraction(sum(sum(roll) >= total for roll in rolls), len(rolls)),
    )


def _test(rng: random.Random, difficulty: int) -> _Chance:
    people = rng.choice([200, 500, 1000, 2000])
    ill = rng.randint(5, people // 10)
    found, alarms = rng.randint(ill // 2 + 1, ill), rng.randint(1, people // 8)
    positive = rng.random() < 0.5 or difficulty == 1
    says, count = ("positive", found) if positive else ("negative", ill - found)
    other = alarms if positive else people - ill - alarms
    return (
        f"Of {people} people, {ill} have an illness. A test is positive for {found} of those who have it, and for "
        f"{alarms} of those who do not have it; for all others it is negative.",
        f"One of the people with a {says} test is chosen at random. What is the probability that this person has the "
        "illness?",
        f"The probability that a person chosen at random among those with a {says} test has the illness is {{}}.",
        Fraction(count, count + other),
    )
