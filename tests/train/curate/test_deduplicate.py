"""Duplicates of a corpus: all that were planted and no others, and the same ones kept however the work is divided."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.train.curate.duplicate_corpus import Document, documents, find, write_features
from train.curate.curation import Curation, Input, Map, Output
from train.curate.deduplicate import DUPLICATES, DuplicateOptions, find_duplicates
from train.curate.deduplicate_stage import Deduplicate
from train.curate.engine import Engine
from train.curate.operators.fingerprint import Fingerprint, Shingles, normalise_text
from train.curate.run import RunOptions, run
from train.curate.urls import normalise_url

ROOT = Path(__file__).parents[3]
BOOKS = DuplicateOptions(domains=("books",))


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    _ = Engine().daft
    return documents(print_seed())


@pytest.fixture(scope="module")
def features(corpus: list[Document], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_features(tmp_path_factory.mktemp("features"), corpus, 3)


@pytest.fixture(scope="module")
def found(features: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return find(features, tmp_path_factory.mktemp("found") / "tables", BOOKS)


def place(corpus: list[Document], row: dict[str, object], shards: int = 3) -> Document:
    return corpus[int(str(row["row"])) * shards + int(str(row["shard"]))]


def test_planted_duplicates_are_found_and_no_others(corpus: list[Document], found: list[dict[str, object]]) -> None:
    """Groups are those of a search by brute force: same text, same address, or a text of which all but the last word is
    the same. Of each group one document is kept: of the preferred domain, then the longest."""
    parent = list(range(len(corpus)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    first: dict[object, int] = {}
    for number, (_, _, url, words) in enumerate(corpus):
        keys: list[object] = [words and ("text", *words[:-1])] if words else []
        keys += [("url", normalise_url(url))] if url else []
        for key in keys:
            one, other = root(first.setdefault(key, number)), root(number)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[Document]] = {}
    for number, document in enumerate(corpus):
        groups.setdefault(root(number), []).append(document)
    # Of pairs of this similarity one of 1000 shares no band, so that a few near duplicates may be missing.
    expected = {name: group for group in groups.values() for name, _, _, _ in group if len(group) > 1}
    removed = {place(corpus, row)[0]: row for row in found}
    assert len(removed) == len(found)
    missing = sum(len(group) - 1 for group in groups.values()) - len(removed)
    assert 0 <= missing <= 5
    by_name = {name: document for document in corpus for name in [document[0]]}
    for name, row in removed.items():
        kept = by_name[str(row["kept_id"])]
        assert kept in expected[name]
        assert kept[0] not in removed
        mine = by_name[name]
        length = {n: len(" ".join(d[3])) for n, d in by_name.items() if n in (name, kept[0])}
        assert (kept[1] != "books", -length[kept[0]]) <= (mine[1] != "books", -length[name])
        same_text = normalise_text(" ".join(mine[3])) == normalise_text(" ".join(kept[3]))
        same_url = mine[2] is not None and kept[2] is not None and normalise_url(mine[2]) == normalise_url(kept[2])
        assert row["reason"] == ("exact duplicate" if same_text else "same URL" if same_url else "near duplicate")
    sizes = Counter(str(row["kept_id"]) for row in found)
    assert all(row["cluster_size"] == sizes[str(row["kept_id"])] + 1 for row in found)
    # Empty documents are no duplicates.
    assert not any(name.startswith("none") for name in removed)
    assert [(row["shard"], row["row"]) for row in found] == sorted((row["shard"], row["row"]) for row in found)


@pytest.mark.parametrize(("workers", "rows_at_once"), [(1, 10**6), (2, 2000), (8, 500)])
def test_the_same_are_kept_however_the_work_is_divided(
    workers: int, rows_at_once: int, features: list[Path], found: list[dict[str, object]], tmp_path: Path
) -> None:
    """1, 2 and 8 partitions, one pass or many: the same rows."""
    import daft

    with daft.execution_config_ctx(shuffle_aggregation_default_partitions=workers, default_morsel_size=100 * workers):
        again = find(features, tmp_path / "tables", dataclasses.replace(BOOKS, rows_at_once=rows_at_once))
    assert again == found


def test_the_same_are_kept_in_another_order_of_documents(
    corpus: list[Document], found: list[dict[str, object]], tmp_path: Path
) -> None:
    """The survivor depends on domain, length and id alone: other shards and another order keep the same ids."""
    mixed = [corpus[number] for number in print_seed().permutation(len(corpus))]
    other = find(write_features(tmp_path, mixed, 2), tmp_path / "tables", BOOKS)
    names = {(place(mixed, row, 2)[0], row["reason"], row["kept_id"], row["cluster_size"]) for row in other}
    assert names == {(place(corpus, row)[0], row["reason"], row["kept_id"], row["cluster_size"]) for row in found}


def test_similarity_leaves_pairs_that_are_similar(features: list[Path], tmp_path: Path) -> None:
    """A similarity of 1 leaves the texts with the same words, whatever is in a band with them; 0.5 leaves more."""
    only_near = DuplicateOptions(text=False, url=False, similarity=1.0)
    exact = DuplicateOptions(near=False, url=False)
    found, same = find(features, tmp_path / "near", only_near), find(features, tmp_path / "exact", exact)
    assert [(row["shard"], row["row"]) for row in found] == [(row["shard"], row["row"]) for row in same]
    half = find(features, tmp_path / "half", dataclasses.replace(only_near, similarity=0.5))
    assert len(half) > len(found)
    passes = dataclasses.replace(only_near, similarity=0.5, rows_at_once=5000)
    assert find(features, tmp_path / "passes", passes) == half


def test_a_huge_group_takes_a_star(tmp_path: Path) -> None:
    """20,000 copies are 19,999 edges of each key, and one is kept: the first by the hash of its id."""
    count = 20_000
    columns = {
        "shard": pa.array([0] * count, pa.int64()),
        "row": pa.array(range(count), pa.int64()),
        "id": pa.array([f"id-{number}" for number in range(count)]),
        "domain": pa.array(["web"] * count),
        "text_length": pa.array([5] * count, pa.int64()),
        "text_key": pa.array([7] * count, pa.uint64()),
        "url_key": pa.array([None] * count, pa.uint64()),
        "bands": pa.array([[1, 2, 3]] * count, pa.list_(pa.uint64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "features.parquet")
    found = find_duplicates([tmp_path / "features.parquet"], tmp_path / "tables")
    assert (found.removed, found.clusters, found.edges) == (count - 1, 1, 4 * (count - 1))
    assert found.rounds <= 2


def test_no_document_and_no_duplicate(tmp_path: Path) -> None:
    """An empty corpus and one without duplicates give empty tables of the right columns."""
    for name, given in (("empty", []), ("one", [("a", "web", None, ["word"] * 9)])):
        (tmp_path / name).mkdir()
        found = find_duplicates(write_features(tmp_path / name, given, 2), tmp_path / name / "tables")
        table = pa.concat_tables([pq.read_table(file) for file in found.files])
        assert (len(table), found.documents) == (0, len(given))
        assert table.column_names == DUPLICATES.names


@pytest.mark.parametrize("options", [DuplicateOptions(similarity=0.5), DuplicateOptions(text=False, url=False)])
def test_documents_without_bands_have_no_near_duplicates(tmp_path: Path, options: DuplicateOptions) -> None:
    """A corpus of short texts, as a selection may leave, has exact duplicates at most."""
    texts = ["two words", "two words", "three other words"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stages = [Map("features", [Fingerprint(), Shingles()]), Deduplicate(options)]
    made = run(Curation([Input("web", str(tmp_path / "a.jsonl"))], stages), tmp_path / "run", RunOptions(workers=1))
    assert made["output"]["web"]["documents"] == (2 if options.text else 3)


def test_columns_that_are_missing_are_named(tmp_path: Path, features: list[Path]) -> None:
    pq.write_table(pq.read_table(features[0]).drop_columns(["bands"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet needs the columns bands \(list<.*Fingerprint"):
        find_duplicates([tmp_path / "a.parquet"], tmp_path / "tables")
    table = pq.read_table(features[0])
    other = pa.array([bands and bands[:3] for bands in table["bands"].to_pylist()], pa.list_(pa.uint64()))
    pq.write_table(table.set_column(table.column_names.index("bands"), "bands", other), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="have 3, 14 bands"):
        find_duplicates([features[0], tmp_path / "b.parquet"], tmp_path / "tables")
    for wrong in ({"similarity": 0.0}, {"text": False, "url": False, "near": False}, {"rows_at_once": 0}):
        with pytest.raises(InputError):
            DuplicateOptions(**wrong)  # type: ignore[arg-type]


def process(features: list[Path], output: Path, runner: str, rows_at_once: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.curate.duplicate_corpus", str(features[0].parent), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command += [runner, str(rows_at_once)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_search_that_is_killed_goes_on(features: list[Path], found: list[dict[str, object]], tmp_path: Path) -> None:
    """Tables that are complete are not made again; the result is the same."""
    output = tmp_path / "tables"
    running = process(features, output, "native", 2000)
    deadline = time.monotonic() + 60
    rng: np.random.Generator = print_seed()
    enough = int(rng.integers(1, 12))
    while len(list(output.glob("*/0*/*.parquet"))) < enough and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/0*/*.parquet")}
    assert before
    assert find(features, output, dataclasses.replace(BOOKS, rows_at_once=2000)) == found
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_ray_keeps_the_same(
    features: list[Path], found: list[dict[str, object]], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Two workers of a local Ray give the rows of the native runner."""
    if not pytestconfig.getoption("--all-cases"):
        pytest.skip("Ray takes half a minute: --all-cases runs it")
    output, _ = process(features, tmp_path / "tables", "ray", 10**7).communicate(timeout=300)
    assert json.loads(output.splitlines()[-1]) == found


def test_a_curation_writes_one_of_each_group(
    corpus: list[Document], found: list[dict[str, object]], tmp_path: Path
) -> None:
    """The stage removes the documents that `find_duplicates` names, and the output has all others."""
    lines = [{"id": name, "text": " ".join(words), "url": url} for name, _, url, words in corpus]
    for domain in ("books", "web"):
        chosen = [line for line, document in zip(lines, corpus, strict=True) if document[1] == domain and document[3]]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    curation = Curation(
        inputs=[Input(domain, [str(tmp_path / f"{domain}.jsonl")], id="id") for domain in ("books", "web")],
        stages=[Map("features", [Fingerprint()]), Deduplicate(BOOKS)],
        output=Output("parquet"),
        shard_megabytes=1,
    )
    assert run(curation, tmp_path / "run", RunOptions(workers=1))["finished"]
    paths = tmp_path.glob("run/output/*/*.parquet")
    written = pa.concat_tables([pq.read_table(path, columns=["id"]) for path in paths])
    removed = {place(corpus, row)[0] for row in found}
    assert sorted(written["id"].to_pylist()) == sorted({name for name, _, _, words in corpus if words} - removed)
