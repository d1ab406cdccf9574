"""Queries have the answers that plain loops over fractions find; texts say what they should; faults are seen."""

import itertools
import json
import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tests.helpers.runs import print_seed
from train.synthesize.corruptions import FAULTS, corrupt, has_fault
from train.synthesize.grounding import numbers_of, ungrounded_number
from train.synthesize.made_tables import make_table, make_tree
from train.synthesize.table_formats import records_of, table_of_csv, table_of_records, table_text, tree_text
from train.synthesize.table_questions import draw_question, draw_statement, wording_fault
from train.synthesize.tables import Cell, Table, answer, exact, is_number, typed
from train.synthesize.trees import draw_tree_query


def fraction(cell: Cell) -> Fraction:
    return Fraction(str(cell))


def by_force(table: Table, steps: Any) -> Any:
    """The answer by enumeration: an order is the only permutation that is sorted, a rank is a count of larger ones."""
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    *before, last = steps
    for step in before:
        if step[0] == "filter":
            _, column, sign, value = step
            if sign == "in":
                rows = [row for row in rows if any(row[column] == one for one in value)]
            elif isinstance(value, str):
                rows = [row for row in rows if (row[column] == value) == (sign == "=")]
            else:
                sides = {">": (1,), "<": (-1,), ">=": (0, 1), "<=": (-1, 0)}[sign]
                signs = [fraction(row[column]) - fraction(value) for row in rows]
                rows = [row for row, d in zip(rows, signs, strict=True) if ((d > 0) - (d < 0)) in sides]
        elif step[0] == "sort":
            better = 1 if step[2] == "descending" else -1
            ranks = [sum(better * (fraction(o[step[1]]) - fraction(r[step[1]])) > 0 for o in rows) for r in rows]
            if sorted(ranks) != list(range(len(rows))):
                return None
            rows = [rows[ranks.index(i)] for i in range(len(rows))]
        else:
            rows = rows[: step[1]] if step[1] <= len(rows) else []
        if not rows:
            return None
    name, *columns = last
    if name == "count":
        return Fraction(len(rows))
    cells = [row[columns[0]] for row in rows]
    if name == "value":
        return (fraction(cells[0]) if is_number(cells[0]) else cells[0]) if len(cells) == 1 else None
    if name == "values":
        return sorted(cells)
    if name == "distinct":
        return Fraction(sum(cell not in cells[:i] for i, cell in enumerate(cells)))
    if name in ("most", "top"):
        weights = [Fraction(1) if name == "most" else fraction(row[columns[1]]) for row in rows]
        sums = Counter[Any]()
        for cell, weight in zip(cells, weights, strict=True):
            sums[cell] += weight  # type: ignore[assignment]
        (first, most), *rest = sums.most_common()
        return None if (name == "top" and not rest) or (rest and rest[0][1] == most) else first
    numbers = [fraction(cell) for cell in cells]
    if name == "mean":
        hundred = sum(numbers) / len(numbers) * 100
        if (hundred * 2) % 2 == 1:
            return None
        return Fraction(min((abs(hundred - n), n) for n in (hundred // 1, hundred // 1 + 1))[1], 100)
    if name == "range":
        return max(a - b for a, b in itertools.permutations(numbers, 2)) if len(numbers) > 1 else None
    return {"sum": sum(numbers), "max": sorted(numbers)[-1], "min": sorted(numbers)[0]}[name]


def comparable(value: Any) -> Any:
    return Fraction(value) if isinstance(value, Decimal) else sorted(value) if isinstance(value, list) else value


def test_queries_have_the_answers_of_plain_loops() -> None:
    seed = int(print_seed().integers(1 << 30))
    kinds, declined = Counter[str](), 0
    for i in range(400):
        rng = random.Random(seed + i)
        table = make_table(rng)
        question = draw_question(table, rng)
        assert question is not None
        assert comparable(question.answer) == by_force(table, question.steps), question
        kinds[question.kind] += 1
        # The same query of another table of these columns: ties and empty results are met there.
        cut = Table(table.columns, tuple(row for row in table.rows for _ in range(rng.randint(0, 2))))
        found = answer(cut, question.steps)
        if question.steps[-1][0] != "values":
            assert comparable(found) == (by_force(cut, question.steps) if cut.rows else None), (question, cut)
        declined += found is None
    print(kinds, f"{declined} declined")
    assert len(kinds) == 9
    assert declined > 20


def test_statements_are_what_the_table_says() -> None:
    """Statements are read by their words: the value at the end is right if, and only if, they are supported."""
    seed, seen = int(print_seed().integers(1 << 30)), Counter[str]()
    for i in range(300):
        rng = random.Random(seed + i)
        table = make_table(rng)
        found = draw_statement(table, rng)
        if found is None:
            continue
        seen[found.verdict] += 1
        if found.verdict == "not enough information":
            assert found.needed[0] not in table.columns
        for name in table.columns:
            for prefix, best in (
                (f"The highest {name} in the table is ", max),
                (f"The lowest {name} in the table is ", min),
            ):
                if found.text.startswith(prefix):
                    stated = Decimal(found.text.removeprefix(prefix).rstrip("."))
                    right = best(exact(cell) for cell in table.column(name))
                    assert (stated == right) == (found.verdict == "supported")
            prefix = f"The {name} of the row whose {table.columns[0]} is "
            if found.text.startswith(prefix) and found.verdict != "not enough information":
                key, stated_text = found.text.removeprefix(prefix).rstrip(".").split('" is ', 1)
                row = next(row for row in records_of(table) if row[table.columns[0]] == key.strip('"'))
                assert (typed(stated_text.strip('"')) == row[name]) == (found.verdict == "supported")
    assert len(seen) == 3


def test_answers_about_trees_follow_from_their_text() -> None:
    seed = int(print_seed().integers(1 << 30))
    kinds = Counter[str]()
    for i in range(300):
        rng = random.Random(seed + i)
        tree = make_tree(rng)
        drawn = draw_tree_query(tree, rng)
        assert drawn is not None
        (kind, path, *rest), found = drawn
        kinds[kind] += 1
        node = tree
        for name in path:
            node = node[name]
        text = json.dumps(node)
        if kind == "depth":
            levels = list(itertools.accumulate((c in "{[") - (c in "}]") for c in text))
            assert found == max(levels)
        if kind == "leaves":
            assert found == sum(
                not line.rstrip(",").endswith(("{", "[", "}", "]")) for line in json.dumps(node, indent=1).split("\n")
            )
        if kind == "children":
            assert found == sum(
                line.startswith(" ") and line[1] not in " }]" for line in json.dumps(node, indent=1).split("\n")
            )
        if kind == "total":
            parts = text.split(f'"{rest[0]}": ')[1:]
            assert found == sum(int(part.split(",")[0].split("}")[0]) for part in parts)
        if kind == "path":
            assert str(found) == str(node)
    assert len(kinds) == 6


def test_yaml_is_read_back_as_the_same_value() -> None:
    yaml = pytest.importorskip("yaml")
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for _ in range(10):
        tree, table = make_tree(rng), make_table(rng)
        tree["odd"] = ["no", "null", "1.0", 'a "b": c', "", {}, [], [[1], {"x": [None, True]}], "\u00fc\n#"]
        assert yaml.safe_load(tree_text(tree, "yaml")) == tree
        assert yaml.safe_load(table_text(table, "yaml")) == records_of(table)


def test_tables_are_read_back_as_the_same_table() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for _ in range(50):
        table = make_table(rng)
        assert table_of_csv(table_text(table, "csv")) == table
        assert table_of_records(json.loads(table_text(table, "json"))) == table
    assert [typed(text) for text in ("007", "-0", "1e5", "1.50", "", " 3 ", "nan", "0.1", "1" * 30)] == [
        "007", "-0", "1e5", 1.5, None, 3, "nan", 0.1, "1" * 30,
    ]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen_and_only_the_right_correction_passes(fault: Any) -> None:
    seed, made = int(print_seed().integers(1 << 30)), 0
    for i in range(60):
        rng = random.Random(seed + i)
        table = make_table(rng)
        found = corrupt(table, fault, rng)
        if found is None:
            continue
        made += 1
        columns = {name: table.is_numeric(name) for name in table.columns}
        assert has_fault(found.text, found.form, fault, columns)
        assert not has_fault(found.right, found.form, fault, columns)
        assert found.is_corrected(found.right)
        assert not found.is_corrected(found.text)
        lines = found.right.split("\n")
        assert not found.is_corrected("\n".join(lines[:-1]))
        if found.form == "json":
            assert found.is_corrected(json.dumps(json.loads(found.right)))
        assert sum(a != b for a, b in itertools.zip_longest(found.text.split("\n"), lines)) == 1
    assert made > 40


def test_numbers_that_come_from_nowhere_are_seen() -> None:
    rng = print_seed()
    for _ in range(100):
        a, b, c = (int(n) for n in rng.integers(100, 10**6, 3))
        known = [Decimal(n) for n in (a, b, c)]
        text = f"1. We need {a}, {b} and {c:,}.\n2. {a} + {b} = {a + b}.\n3. Then {a + b} + {c} = {a + b + c}.\n"
        text += f"4. Divided by 3 it is {Decimal(a + b + c) / 3:.2f}, which is {a + b + c} / 3.\nAnswer: {a + b + c}"
        assert ungrounded_number(text, known, 5) is None
        assert ungrounded_number(f"All of {a}, {b} and {c} add up to {a + b + c}.", known, 5) is None
        assert ungrounded_number(f"The ratio {a} to {b} is {Decimal(a) / b:.3f}.", known, 5) is None
        wrong = a + b + c + 10**7
        assert ungrounded_number(text.replace(str(a + b + c), str(wrong)), known, 5) == wrong
        # In other lines there are no numbers that give it.
        assert ungrounded_number(f"1. We need {a}.\n2. Now {b}.\n3. And {c}.\n4. It is {a + 2 * c + 10**8}.", known, 5)
    assert numbers_of("A4 costs 1,234.50 in 2024.") == [Decimal("1234.50"), Decimal(2024)]


def test_wordings_that_may_mean_something_else_are_seen() -> None:
    text, needed = (
        'Which City has the highest Area among the rows in which Harbour is not "yes"?',
        ("City", "Area", "Harbour", "yes"),
    )
    for wording, why in (
        ("Among rows whose Harbour is not yes, which City has the largest Area?", None),
        ("Among rows whose Harbour is not yes, which City has the smallest Area?", "another direction"),
        ("Among rows whose Harbour is yes, which City has the largest Area?", "another direction"),
        ("Which City has the largest Area where it is not yes?", "a column or value is missing"),
        ("Among the 4 rows whose Harbour is not yes, which City has the largest Area?", "other numbers"),
        ("Is Porto the City with the largest Area whose Harbour is not yes?", "the answer is given away"),
    ):
        assert wording_fault(wording, text, needed, "Porto") == why
