"""Tables and trees that code makes from random numbers."""

import random
from typing import Any

from train.synthesize.tables import Cell, Table

_FIRST = (
    "Ana Boris Chen Dora Emil Farah Goran Hana Ivan Jun Kofi Lena Marek Nadia Omar Petra Quinn Rosa Samir Tove".split()
)
_LAST = "Adler Baker Costa Duarte Ekholm Fischer Garcia Haddad Ito Jensen Kaya Lopez Moreau Novak Okafor Park".split()
_CITIES = "Lisbon Osaka Tampere Quito Nairobi Leeds Bergen Hanoi Toronto Porto Graz Lima Accra Cork Turin Pune".split()
_NOUNS = "lamp chair kettle drill tent bicycle radio blanket mirror ladder backpack keyboard printer sofa".split()
_ADJECTIVES = "small large blue heavy folding classic compact steel wooden light".split()
# Each kind of table: the column that names rows, columns of texts with what they are drawn from, and columns of numbers
# with their least and largest value, and decimals.
_KINDS: dict[str, tuple[str, dict[str, list[str]], dict[str, tuple[int, int, int]]]] = {
    "people": (
        "Name",
        {"Department": ["Sales", "Research", "Finance", "Support", "Legal"], "City": _CITIES[:6]},
        {"Age": (21, 66, 0), "Salary": (28_000, 98_000, 0), "Years employed": (1, 30, 0)},
    ),
    "cities": (
        "City",
        {"Region": ["North", "South", "East", "West"], "Harbour": ["yes", "no"]},
        {"Population": (40_000, 4_000_000, 0), "Area": (35, 1400, 1), "Parks": (3, 90, 0)},
    ),
    "products": (
        "Product",
        {"Category": ["Home", "Outdoor", "Office"], "Supplier": ["Nordica", "Halden", "Vero", "Bramley, Inc."]},
        {"Price": (4, 420, 2), "Stock": (0, 240, 0), "Weight": (1, 30, 1)},
    ),
    "matches": (
        "Team",
        {"League": ["First", "Second"], "Colour": ["red", "white", "green", "black"]},
        {"Wins": (0, 28, 0), "Losses": (0, 28, 0), "Goals": (9, 88, 0)},
    ),
}


def make_table(rng: random.Random, least_rows: int = 4, most_rows: int = 14) -> Table:
    """A table whose first column names the rows.

    Args:
      rng: of the table.
      least_rows, most_rows: how many rows; at most 16.
    """
    kind = rng.choice(sorted(_KINDS))
    key, texts, numbers = _KINDS[kind]
    count = rng.randint(least_rows, most_rows)
    names = {
        "people": [f"{first} {last}" for first in _FIRST for last in _LAST],
        "cities": _CITIES,
        "products": [f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS],
        "matches": [f"{city} {name}" for city in _CITIES for name in ("Rovers", "United", "Athletic")],
    }[kind]
    chosen_texts = rng.sample(sorted(texts), rng.randint(1, len(texts)))
    chosen_numbers = rng.sample(sorted(numbers), rng.randint(2, len(numbers)))
    others = chosen_texts + chosen_numbers
    rng.shuffle(others)
    rows = []
    for name in rng.sample(names, count):
        cells: list[Cell] = [name]
        cells += [rng.choice(texts[one]) if one in texts else _number(rng, *numbers[one]) for one in others]
        rows.append(tuple(cells))
    return Table((key, *others), tuple(rows))


def make_tree(rng: random.Random) -> dict[str, Any]:
    """A JSON object of nested objects and lists, such as the description of a company or a library."""
    people = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 24)

    def person() -> dict[str, Any]:
        return {"name": people.pop(), "age": rng.randint(21, 66), "remote": rng.random() < 0.4}

    def team(name: str) -> dict[str, Any]:
        members = [person() for _ in range(rng.randint(1, 4))]
        made: dict[str, Any] = {"lead": people.pop(), "budget": rng.randint(10, 99) * 500, "members": members}
        if rng.random() < 0.6:
            made["tools"] = rng.sample(_NOUNS, rng.randint(1, 4))
        if rng.random() < 0.5:
            made["office"] = {
                "city": rng.choice(_CITIES),
                "floor": rng.randint(1, 12),
                "address": {"room": name[:2] + str(rng.randint(100, 199))},
            }
        return made

    names = rng.sample(["design", "hardware", "finance", "support", "research"], rng.randint(2, 4))
    return {
        "company": f"{rng.choice(_LAST)} {rng.choice(['Works', 'Systems', 'Labs'])}",
        "founded": rng.randint(1950, 2015),
        "headquarters": {"city": rng.choice(_CITIES), "staff": rng.randint(20, 900)},
        "teams": {name: team(name) for name in names},
    }


def _number(rng: random.Random, least: int, most: int, decimals: int) -> int | float:
    if not decimals:
        return rng.randint(least, most)
    return round(rng.randint(least * 10**decimals, most * 10**decimals) / 10**decimals, decimals)
