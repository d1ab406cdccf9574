"""What the curation of a corpus costs: measured rates a core, times its size.

    python -m experiments.data.cost --tokens 18e12 --raw 5

Rates were measured on 2 cores of a shared x86-64 machine (experiments/data/README.md, docs/curation.md); a core of a
server may be twice as fast. Not in the table: finding duplicates among the features (138 CPU seconds for 20 million
documents by text and URL), shuffles over a network, and downloads. Models read at most 2,048 tokens
of a document on one H200, at the rate that scoring.md gives; longer documents would be cut.
"""

import argparse
import dataclasses

BYTES_PER_TOKEN = 4.3
"""In the vocabulary of Qwen2.5, of the sources and docstrings that `data build` was measured with."""

PAGE_BYTES = 20.0
"""Of HTML for each byte of its text: an assumption, which decides the largest cost."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of curation.

    Attributes:
      what: is done.
      megabytes: a second and core, of what the step reads.
      reads: "pages", "raw" text, or text that is "kept".
    """

    what: str
    megabytes: float
    reads: str = "raw"

    def core_hours(self, raw: float, kept: float) -> float:
        """Of a corpus with so many bytes of raw text, and of text that is kept."""
        size = {"pages": raw * PAGE_BYTES, "raw": raw, "kept": kept}[self.reads]
        return size / (self.megabytes * 1e6) / 3600


STEPS = (
    Step("read and write shards", 28.0),
    Step("text of pages (`ExtractText`)", 12.7, "pages"),
    Step("Unicode (`RepairUnicode`)", 125.0),
    Step("languages (`Language`)", 17.5),
    Step("Gopher, C4 and FineWeb (`Statistics` and filters)", 3.3),
    Step("personal data (`MaskPII`)", 20.0),
    Step("features for duplicates (`Fingerprint`)", 34.8),
    Step("decontamination", 30.7, "kept"),
    Step("repeated runs of words in shards (`RemoveSharedRuns`)", 4.5, "kept"),
    Step("tokenise and pack (`data build`)", 6.4, "kept"),
)

MODELS = (("0.5B scores all raw text", 594_000, "raw"), ("0.5B scores what is kept", 594_000, "kept"))
"""Name, tokens a second of an H200 (scoring.md), and what is read by a model."""


def table(tokens: float, raw: float) -> str:
    """Markdown: core-hours and GPU-hours of each step.

    Args:
      tokens: that are kept.
      raw: bytes of raw text for each byte that is kept.
    """
    kept = tokens * BYTES_PER_TOKEN
    lines = ["| step | reads | MB/s a core | core-hours a TB | core-hours in all |", "|---|---|---|---|---|"]
    total = 0.0
    for step in STEPS:
        hours = step.core_hours(raw * kept, kept)
        total += hours
        a_terabyte = 1e6 / step.megabytes / 3600
        lines.append(f"| {step.what} | {step.reads} | {step.megabytes:g} | {a_terabyte:.1f} | {_rounded(hours)} |")
    lines.append(f"| all of these | | | | {_rounded(total)} |")
    for name, rate, reads in MODELS:
        hours = tokens * (raw if reads == "raw" else 1) / rate / 3600
        lines.append(f"| {name} | {reads} | | | {_rounded(hours)} GPU-hours |")
    return "\n".join(lines)


def _rounded(hours: float) -> str:
    """Two significant digits, with thousands separated."""
    return f"{float(f'{hours:.2g}'):,.0f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=18e12, help="that are kept")
    parser.add_argument("--raw", type=float, default=5.0, help="bytes of raw text for each byte that is kept")
    args = parser.parse_args()
    print(table(args.tokens, args.raw))


if __name__ == "__main__":
    main()
