"""Solves puzzles from their words alone, in other ways than the code that makes them."""

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

# Whether an answer is the only right one to a question, or to the claim that names it.
Judge = Callable[[str, str, str], bool]


def split(text: str) -> list[str]:
    return [part for part in re.split(r", and |, | and ", text) if part]


def knights(statement: str, question: str, answer: str) -> bool:
    names = split(re.search(r"You meet (.*)\.", statement)[1])
    said = dict(re.findall(r'(\w+) says: "(.*)"', statement))

    def true(who: str, text: str, honest: set[str]) -> bool:
        found = [name for name in re.findall(r"\w+", text) if name in names]
        if "same kind" in text:
            return (found[0] in honest) == (who in honest)
        if text.startswith("Exactly one"):
            return len({*found} & honest) == 1
        if text.startswith("At least one"):
            return not {*found} <= honest
        if "or both" in text:
            return found[0] not in honest or found[1] in honest
        if "both knaves" in text or text.endswith("is a knave."):
            return not {*found} & honest
        assert "both knights" in text or text.endswith("is a knight.")
        return {*found} <= honest

    possible = []
    for size in range(len(names) + 1):
        for honest in map(set, itertools.combinations(names, size)):
            if {who for who in names if true(who, said[who], honest)} == honest:
                possible.append(honest)
    (only,) = possible
    return set(split(answer)) - {"nobody"} == only


def ordering(statement: str, question: str, answer: str) -> bool:
    first, *clues = statement.split("\n")
    people = split(first.split(" stand in")[0])

    def holds(line: tuple[str, ...], clue: str) -> bool:
        who = [line.index(name) + 1 for name in re.findall(r"[A-Z]\w+", clue)]
        if "directly to the left" in clue:
            return who[1] - who[0] == 1
        if "somewhere to the left" in clue:
            return who[0] < who[1]
        if "not stand next to" in clue:
            return abs(who[0] - who[1]) > 1
        if "stands next to" in clue:
            return abs(who[0] - who[1]) == 1
        if "not stand in position" in clue:
            return who[0] != int(re.search(r"\d", clue)[0])
        if "two ends" in clue:
            return who[0] in (1, len(line))
        assert "between" in clue
        return sorted(who)[1] == who[0]

    lines = [line for line in itertools.permutations(people) if all(holds(line, clue) for clue in clues)]
    (only,) = lines
    return only[int(re.search(r"position (\d)", question)[1]) - 1] == answer


def houses(statement: str, question: str, answer: str) -> bool:
    first, *clues = statement.split("\n")
    people = split(first.split(" live in")[0])
    groups = [split(group) for group in first.rstrip(".").rpartition(": ")[2].split("; ")]
    numbers = range(1, len(people) + 1)

    def house(where: dict[str, int], text: str) -> int:
        (found,) = (place for name, place in where.items() if re.search(rf"\b{name}\b", text))
        return found

    def holds(where: dict[str, int], clue: str) -> bool:
        for words, test in (
            (" lives directly to the left of ", lambda x, y: y - x == 1),
            (" lives in a house to the left of ", lambda x, y: x < y),
            (" lives next to ", lambda x, y: abs(x - y) == 1),
            (" is not ", lambda x, y: x != y),
            (" is ", lambda x, y: x == y),
        ):
            if words in clue:
                left, _, right = clue.partition(words)
                return test(house(where, left), house(where, right))
        assert "does not live in house" in clue
        return house(where, clue) != int(re.search(r"house (\d)", clue)[1])

    possible = []
    for placed in itertools.product(itertools.permutations(numbers), repeat=1 + len(groups)):
        where = {
            name.removeprefix("the "): place
            for of, places in zip((people, *groups), placed, strict=True)
            for name, place in zip(of, places, strict=True)
        }
        if all(holds(where, clue) for clue in clues):
            possible.append(where)
    (only,) = possible
    asked = re.search(r"(?:drinks|owns the) (\w+)", question)[1]
    return only[answer] == only[asked]


def syllogism(statement: str, question: str, answer: str) -> bool:
    premises = statement.split("\n")[1:]
    terms = sorted({word for line in premises for word in re.findall(r"\w+", line) if word.endswith("s")} - {"is"})
    kinds = [frozenset(c) for size in range(len(terms) + 1) for c in itertools.combinations(terms, size)]

    def true(world: tuple[frozenset[str], ...], sentence: str) -> bool:
        if found := re.fullmatch(r"There is at least one of the (\w+)\.", sentence):
            return any(found[1] in thing for thing in world)
        form, a, no, b = re.fullmatch(r"(All|No|Some) (\w+) are (not )?(\w+)\.", sentence).groups()
        both, only = any({a, b} <= thing for thing in world), any(a in thing and b not in thing for thing in world)
        return {"All": not only, "No": not both, "Some": only if no else both}[form]

    # Each sentence that says that there is something needs one thing, and so does the denial of the conclusion.
    most = 1 + sum(line.startswith(("Some", "There")) for line in premises)
    sizes = range(1, most + 1)
    worlds = itertools.chain.from_iterable(itertools.combinations_with_replacement(kinds, size) for size in sizes)
    # A world in which the conclusion is false is looked for first: most have one with few things.
    return not any(not true(world, answer) and all(true(world, line) for line in premises) for world in worlds)


def sequence(statement: str, question: str, answer: str) -> bool:
    terms = list(map(int, statement.split("\n")[1].split(", ")))
    count, a, b = len(terms), terms[0], terms[1]
    small, found = range(-80, 81), set()

    def note(made: list[int]) -> None:
        if made[:count] == terms:
            found.add(made[count])

    places = range(count + 1)
    for step in small:
        note([a + (b - a) * n + step * n * (n - 1) // 2 for n in places])
        note([a + (b - a) * ((n + 1) // 2) + step * (n // 2) for n in places])
        note([a * step**n for n in places])
        note([a + (terms[2] - a) * (n // 2) if n % 2 == 0 else b + step * (n // 2) for n in places])
        made = [a]
        for _ in range(count):
            made.append(made[-1] * step + b - a * step)
        note(made)
    made = [a, b]
    while len(made) <= count:
        made.append(made[-2] + made[-1])
    note(made)
    (only,) = found
    return Fraction(answer) == only


def letters(statement: str, question: str, answer: str) -> bool:
    pairs = [(old, new) for new, old in re.findall(r"(\w+) of (\w+)(?=,|\.)", statement.split(" It consists")[0])]
    following = dict(zip("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza", strict=True))

    def apply(step: str, word: str) -> str:
        made = list(word)
        if step == "reverse the word":
            made.reverse()
        elif step == "move the first letter to the end":
            made.append(made.pop(0))
        elif step.startswith("swap"):
            other = 1 if "two" in step else len(made) - 1
            made[0], made[other] = made[other], made[0]
        elif step == "double the last letter":
            made.append(made[-1])
        elif step == "drop the first letter":
            made.pop(0)
        elif step.startswith("replace the last"):
            made.append(following[made.pop()])
        else:
            assert step.startswith("replace each")
            made = [following[letter] for letter in made]
        return "".join(made)

    steps = statement.rstrip(".").rpartition(": ")[2].split("; ")
    assert len(pairs) == 2
    assert len(steps) == 8
    asked = re.search(r"(?:make|makes \w+) of (\w+)", question)[1]
    found = set()
    for size in (1, 2) if "or of two" in statement else (1,):
        for change in itertools.product(steps, repeat=size):
            results = []
            for word in [*(old for old, _ in pairs), asked]:
                for step in change:
                    word = apply(step, word)
                results.append(word)
            if results[:2] == [new for _, new in pairs]:
                found.add(results[2])
    return found == {answer}


def mapping(statement: str, question: str, answer: str) -> bool:
    links = set(re.findall(r"([A-Z]\w+) advises ([A-Z]\w+)", statement))
    second = statement.split("In the second, ")[1].split("; nothing")[0]
    others = {(a, b) for a, b in re.findall(r"the (\w+) \w+ the (\w+)", second)}
    people = split(re.search(r"Match each of (.*?) with", statement)[1])
    parts = [part.removeprefix("the ") for part in split(re.search(r"different one of (.*?), so that", statement)[1])]
    assert len(people) == len(parts)
    who = next(name for name in people if name in question)
    matches = set()
    for order in itertools.permutations(parts):
        match = dict(zip(people, order, strict=True))
        if all(((a, b) in links) == ((match[a], match[b]) in others) for a in people for b in people):
            matches.add("the " + match[who])
    return matches == {answer}


def circuit(statement: str, question: str, answer: str) -> bool:
    lines = statement.split("\n")
    switches = split(re.search(r"A device has (.*), which", lines[0])[1])
    rules = {line.split(" is on exactly if ")[0].lower(): line.split(" is on exactly if ")[1] for line in lines[1:-1]}
    names = [*switches, *rules]

    def is_on(part: str, setting: dict[str, bool]) -> bool:
        if part in setting:
            return setting[part]
        rule = rules[part]
        used = sorted((name for name in names if re.search(rf"{name}\b", rule)), key=rule.index)
        one, other = (is_on(name, setting) for name in used)
        if "are both on" in rule:
            return one and other
        if "at least one" in rule:
            return one or other
        if "the other is off" in rule:
            return one is not other
        assert rule.endswith("is off.")
        return one and not other

    seen = re.findall(r"((?:switch \d|the \w+)) was (on|off)", lines[-1].split("Forcing")[0])
    forced, to = re.search(r"If (the \w+) had been forced to be (on|off)", question).groups()
    asked = re.search(r"(?:would|whether) (the \w+) ", question.replace("would have", "")) or re.search(
        r"whether (the \w+)", question
    )
    outcomes = set()
    for bits in itertools.product([False, True], repeat=len(switches)):
        setting = dict(zip(switches, bits, strict=True))
        if all(is_on(name, setting) == (state == "on") for name, state in seen):
            outcomes.add("on" if is_on(asked[1], {**setting, forced: to == "on"}) else "off")
    return (outcomes.pop() if len(outcomes) == 1 else "cannot be told") == answer


def separation(statement: str, question: str, answer: str) -> bool:
    """By the moral graph of the ancestors (Lauritzen et al. 1990)."""
    arrows = re.findall(r"([A-F]) -> ([A-F])", statement)
    x, y = re.search(r"makes ([A-F]) and ([A-F]) independent", question).groups()
    given = set(re.findall(r"\b[A-F]\b", answer))
    ancestors, before = {x, y, *given}, 0
    while len(ancestors) > before:
        before = len(ancestors)
        ancestors |= {a for a, b in arrows if b in ancestors}
    inside = [(a, b) for a, b in arrows if b in ancestors]
    joined = {frozenset(arrow) for arrow in inside}
    joined |= {frozenset((a, c)) for a, b in inside for c, d in inside if b == d and a != c}
    reached, before = {x}, 0
    while len(reached) > before:
        before = len(reached)
        reached |= {n for edge in joined if edge & (reached - given) for n in edge if n not in given}
    return y not in reached


def chance(statement: str, question: str, answer: str) -> bool:
    numbers = list(map(int, re.findall(r"\d+", statement)))
    if "urn" in statement:
        counts = {colour: int(count) for count, colour in re.findall(r"(\d+) (\w+)(?=,| and| balls)", statement)}
        drawn, total = numbers[-1], sum(counts.values())
        if "same colour" in question:
            favourable = sum(math.comb(count, drawn) for count in counts.values())
        else:
            colour = next(colour for colour in counts if re.search(rf"\b{colour}\b", question))
            if "exactly" in question:
                exactly = int(re.search(r"exactly (\d)", question)[1])
                favourable = math.comb(counts[colour], exactly) * math.comb(total - counts[colour], drawn - exactly)
            else:
                favourable = math.comb(total, drawn) - math.comb(total - counts[colour], drawn)
        return Fraction(answer) == Fraction(favourable, math.comb(total, drawn))
    if "dice" in statement:
        dice, least = numbers[0], int(re.search(r"at least (\d+)", question)[1])
        face = re.search(r"dice shows (\d)", question)

        def ways(sides: tuple[int, ...]) -> dict[int, int]:
            sums = {0: 1}
            for _ in range(dice):
                new: dict[int, int] = {}
                for total, count in sums.items():
                    for side in sides:
                        new[total + side] = new.get(total + side, 0) + count
                sums = new
            return sums

        every = tuple(range(1, 7))
        all_ways, without = ways(every), ways(tuple(s for s in every if s != int(face[1])) if face else ())
        left = {total: count - (without.get(total, 0) if face else 0) for total, count in all_ways.items()}
        return Fraction(answer) == Fraction(sum(c for t, c in left.items() if t >= least), sum(left.values()))
    people, ill, found, alarms = numbers
    share, sensitivity, false = Fraction(ill, people), Fraction(found, ill), Fraction(alarms, people - ill)
    if "negative test" in question:
        sensitivity, false = 1 - sensitivity, 1 - false
    return Fraction(answer) == share * sensitivity / (share * sensitivity + (1 - share) * false)


SOLVERS: dict[str, Judge] = {
    solver.__name__: solver
    for solver in (
        knights, ordering, houses, syllogism, sequence, letters, mapping, circuit, separation, chance
    )
}  # fmt: skip
# Where a claim names the answer.
CLAIMED = {
    "knights": r"exactly these: (.*)\.$", "ordering": r"false\? (\w+) stands", "houses": r"false\? (\w+) ",
    "syllogism": r'imply: "(.*)"$', "sequence": r"number is (.*)\.$", "letters": r"change makes (\w+) of",
    "mapping": r"matched with (.*)\.$", "circuit": r"or off is: (.*)\.$", "separation": r"\): (.*)\.$",
    "chance": r" is (\S+?)\.$| illness is (\S+)\.$",
}  # fmt: skip
