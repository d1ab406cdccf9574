"""A corpus with planted duplicates, and a process that finds them: `python -m ... FEATURES OUTPUT RUNNER ROWS`."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from train.curate.deduplicate import DuplicateOptions, find_duplicates
from train.curate.engine import Engine
from train.curate.operators.fingerprint import Fingerprint, Shingles

Document = tuple[str, str, str | None, list[str]]
"""Id, domain, address and words."""


def documents(rng: np.random.Generator, count: int = 400) -> list[Document]:
    """Different documents, then copies, copies with another word, other texts at the same address, and empty ones."""

    def fresh(length: int) -> list[str]:
        return [f"w{word}" for word in rng.integers(0, 2**40, length)]

    made: list[Document] = []
    for number in range(count):
        url = f"http://site.org/{number}" if number % 2 else None
        made.append((f"first-{number}", "web", url, fresh(int(rng.integers(30, 200)))))
    for number in range(count // 4):
        _, _, _, words = made[int(rng.integers(count))]
        made.append((f"copy-{number}", "books", None, words))
        _, _, _, words = made[int(rng.integers(count))]
        changed = [*words[:-1], "another"]
        made.append((f"near-{number}", "web", None, changed))
        _, _, url, _ = made[1 + 2 * int(rng.integers(count // 2))]
        made.append((f"page-{number}", "web", f"{url}/?utm_source=a#b".replace("http", "HTTPS"), fresh(40)))
        made.append((f"none-{number}", "web", None, []))
    return [made[place] for place in rng.permutation(len(made))]


def write_features(folder: Path, given: list[Document], shards: int) -> list[Path]:
    """The features of documents, which are dealt to shards in turn."""
    compute, shingles = Fingerprint().start(), Shingles().start()
    paths = []
    for shard in range(shards):
        part = given[shard::shards]
        texts = pa.array([" ".join(words) for _, _, _, words in part], pa.large_string())
        table = pa.table({"text": texts, "url": pa.array([url for _, _, url, _ in part], pa.string())})
        made = compute(table)
        columns = {
            "shard": pa.array([shard] * len(part), pa.int64()),
            "row": pa.array(range(len(part)), pa.int64()),
            "id": pa.array([name for name, _, _, _ in part], pa.string()),
            "domain": pa.array([domain for _, domain, _, _ in part], pa.string()),
            **{name: made[name] for name in made.column_names},
            "shingles": shingles(table)["shingles"],
        }
        paths.append(folder / f"{shard}.parquet")
        pq.write_table(pa.table(columns), paths[-1])
    return paths


def find(features: list[Path], folder: Path, options: DuplicateOptions) -> list[dict[str, object]]:
    """The rows that are not kept."""
    found = find_duplicates(features, folder, options)
    rows = pa.concat_tables([pq.read_table(file) for file in found.files]).to_pylist()
    assert len(rows) == found.removed
    return rows


def main() -> None:
    features, output, runner, rows_at_once = sys.argv[1:]
    _ = Engine(runner, workers=2).daft  # type: ignore[arg-type]
    options = DuplicateOptions(domains=("books",), rows_at_once=int(rows_at_once))
    rows = find(sorted(Path(features).glob("*.parquet")), Path(output), options)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
