"""datatrove's decisions, for `experiments.data.heuristics`: run by a Python that has datatrove, and nothing of ours.

Reads one JSON string a line. Writes, for each, a JSON list: what the filters say in the order of `FILTERS`, null or
the reason; with --words, the words instead. The last line is an object: seconds of processor time by filter, and
versions.
"""

import importlib.metadata
import json
import sys
import time

from datatrove.data import Document  # type: ignore[import-not-found]
from datatrove.pipeline.filters import (  # type: ignore[import-not-found]
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_words  # type: ignore[import-not-found]

# In this order the words of a document are split once, because datatrove remembers those of the last five texts.
FILTERS = {
    "gopher_quality": GopherQualityFilter,
    "gopher_repetition": GopherRepetitionFilter,
    "fineweb": FineWebQualityFilter,
    "c4": C4QualityFilter,
}


def main() -> None:
    filters = {name: make() for name, make in FILTERS.items()}
    split_into_words("Loads the word splitter.")
    seconds = dict.fromkeys(filters, 0.0)
    for number, line in enumerate(sys.stdin):
        text = json.loads(line)
        if "--words" in sys.argv:
            print(json.dumps(split_into_words(text)))
            continue
        decisions = []
        for name, one in filters.items():
            document = Document(text=text, id=str(number))
            begin = time.process_time()
            result = one.filter(document)
            seconds[name] += time.process_time() - begin
            decisions.append(result[1] if isinstance(result, tuple) and not result[0] else None)
        print(json.dumps(decisions))
    versions = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
