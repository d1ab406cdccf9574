"""Mathematics: pages of it are told from prose and code, and hostile texts take linear time."""

# ruff: noqa: RUF001

import time

import pytest

from tests.helpers.curation import applied, check_laws, documents
from tests.helpers.runs import print_seed
from train.curate.operators.mathematics import Mathematics
from train.data.text import standard_library

PROSE = (
    "The committee will meet again next week. It costs $5 to enter, or $8 for two, and the doors open at seven. "
    "Whoever comes late has to wait until the interval. C:\\Users\\alice holds the programme as a file."
)
PAGES = [
    r"The sum of the first $n$ numbers is $\frac{n(n+1)}{2}$. We prove it by induction: for $n = 1$ both sides are 1, "
    r"and if it holds for $n$, then \(\sum_{k=1}^{n+1} k = \frac{n(n+1)}{2} + n + 1\), which is the claim.",
    "Theorem. Every bounded sequence has a convergent subsequence. Proof. Consider the matrix of the quadratic "
    "equation; its eigenvalues satisfy the inequality of the lemma above, and the integral of the polynomial is "
    "divisible by two.",
    "For all x ∈ ℝ we have x² ≥ 0, and ∑ 1/n² = π²/6 ≈ 1.645, while ∫ f dx ≤ ∞ holds whenever f ∈ L¹ and f ≥ 0 "
    "almost everywhere on the set where it is defined and finite.",
]


def test_pages_of_mathematics_and_others() -> None:
    page = b"<html><math><mi>x</mi></math> <math></math><script src=MathJax.js></script></html>"
    table = documents([*PAGES, PROSE, PAGES[0][:50], "", None], html=[None, None, None, None, None, None, page])
    made = check_laws(Mathematics(), table, print_seed())
    assert made["math_page"].to_pylist() == [True, True, True, False, False, False, None]
    assert applied(Mathematics(), documents([PROSE], html=[page])).to_pylist()[0]["math_markup"] == 3
    row = applied(Mathematics(), documents([PAGES[0]])).to_pylist()[0]
    per = 1000 / len(PAGES[0])
    assert row["math_commands"] == pytest.approx(3 * per)
    assert row["math_formulas"] == pytest.approx(3 * per)  # $n$ alone has no sign of a formula.
    assert row["math_symbols"] == 0


def test_code_is_no_mathematics() -> None:
    files = [path for path in standard_library()[::20] if path.name not in ("statistics.py", "fractions.py")]
    made = applied(Mathematics(), documents([path.read_text("utf-8") for path in files]))
    assert sum(made["math_page"].to_pylist()) <= 0.05 * len(files)


@pytest.mark.parametrize("piece", ["$", "$x", "$ x", "$$", "$x^", "\\", "\\(", "\\fra", "$x\n", "$$x"])
def test_hostile_texts_take_linear_time(piece: str) -> None:
    table = documents([piece * (100_000 // len(piece))])
    begin = time.process_time()
    applied(Mathematics(), table)
    assert time.process_time() - begin < 4
