"""Heuristics that find pages of mathematics."""

import dataclasses
import re

import pyarrow as pa

from train.curate.operator import Compute, Operator

# Commands of LaTeX that hardly occur outside of formulas.
_COMMAND = re.compile(
    r"\\(?:frac|dfrac|tfrac|sqrt|sum|prod|int|iint|oint|lim|infty|partial|nabla|alpha|beta|gamma|delta|epsilon|varepsilon"
    r"|zeta|eta|theta|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi"
    r"|Omega|leq?|geq?|neq|approx|equiv|cong|sim|subset(?:eq)?|cup|cap|in|notin|forall|exists|cdot|times|otimes|oplus"
    r"|mathbb|mathcal|mathbf|mathrm|mathfrak|operatorname|overline|hat|vec|left|right|binom|to|mapsto|rightarrow"
    r"|Rightarrow|iff|implies|ldots|cdots|log|ln|sin|cos|tan|exp|max|min|sup|inf|det|dim|ker|gcd|bmod|pmod"
    r"|begin\{(?:equation|align|gather|multline|eqnarray|cases|[bpv]?matrix|array|theorem|lemma|proof)\*?\})(?![A-Za-z])"
)
_FORMULA = re.compile(
    r"\$\$[^$]{2,2000}\$\$|\\\[|\\\(|(?<![\\$\w])\$(?=[^$\n]{0,300}[\\^_=+<>])[^\s$][^$\n]{0,300}\$(?![\w$])"
)
_SYMBOL = re.compile("[\u00b1\u00d7\u00f7\u2200-\u22ff\u27c0-\u27ef\u2980-\u2aff\u2102\u2115\u211a\u211d\u2124]")
# Parts of words: to count them is five times as fast as to match words.
_WORDS = (
    "theorem", " lemma", "corollar", "proposition", "conjecture", "equation", "polynomial", "matrix", "matrices",
    "eigenvalue", "derivative", "integral", "rational number", "algebra", "calculus", "geometry", "trigonometr",
    "probabilit", "convergen", "divisible", "prime number", "quadratic", "logarithm", "exponent", "differential",
    "topolog", "isomorphi", "bijection", "denominator", "numerator", "inequalit", "perpendicular", "hypotenuse",
    "factoriz", "factoris",
)  # fmt: skip
_MARKUP = (b"<math", b"MathJax", b"mathjax", b"katex", b"KaTeX", b"math-container", b'class="tex"', b"math/tex")


@dataclasses.dataclass(frozen=True)
class Mathematics(Operator):
    """How much mathematics a page holds.

    In the manner of OpenWebMath (Paster et al. 2023, arXiv:2310.06786, section 3), but without a trained model: what
    marks formulas in the page and in the text, and words of mathematics. All but the first are per 1,000 characters.

    math_markup: pieces of the page that are MathML, MathJax or KaTeX; 0 without a page. math_commands: commands that
    LaTeX has for formulas. math_formulas: formulas between delimiters. math_symbols: signs such as ∑, ∫ and ≤.
    math_words: words such as theorem and polynomial.

    math_score: commands + 2 * formulas + 2 * symbols + words, and 2 more if the page has mark-up of mathematics.
    math_page: whether the score reaches `threshold`.

    Attributes:
      threshold: of a page of mathematics. A page of prose has below 0.5, one that speaks of mathematics now and then 1,
        one with formulas above 5.
      min_characters: a shorter text is no page of mathematics.
    """

    threshold: float = 3.0
    min_characters: int = 100

    reads = ("html", "text")
    makes = pa.schema(
        [
            pa.field("math_markup", pa.int32()),
            pa.field("math_commands", pa.float32()),
            pa.field("math_formulas", pa.float32()),
            pa.field("math_symbols", pa.float32()),
            pa.field("math_words", pa.float32()),
            pa.field("math_score", pa.float32()),
            pa.field("math_page", pa.bool_()),
        ]
    )

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            rows = [
                self._row(page.as_buffer().to_pybytes() if page.is_valid else b"", text)
                for page, text in zip(table["html"], table["text"].to_pylist(), strict=True)
            ]
            arrays = list(map(list, zip(*rows, strict=True))) if rows else [[] for _ in self.makes]
            return pa.table(arrays, schema=self.makes)

        return compute

    def _row(self, page: bytes, text: str | None) -> tuple[object, ...]:
        if text is None:
            return (None,) * len(self.makes)
        markup = sum(map(page.count, _MARKUP))
        per = 1000 / max(len(text), 1)
        commands = len(_COMMAND.findall(text)) * per if "\\" in text else 0.0
        formulas = len(_FORMULA.findall(text)) * per if "$" in text or "\\" in text else 0.0
        symbols = 0.0 if text.isascii() else len(_SYMBOL.findall(text)) * per
        words = sum(map(text.lower().count, _WORDS)) * per
        score = commands + 2 * formulas + 2 * symbols + words + 2 * (markup > 0)
        page_of_it = len(text) >= self.min_characters and score >= self.threshold
        return markup, commands, formulas, symbols, words, score, page_of_it
